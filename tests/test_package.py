"""What pyproject.toml states is so: versions agree, and both ends of the bounds were tried."""

import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TRIED = json.loads((ROOT / "results" / "versions.json").read_text(encoding="utf-8"))


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.split("post")[0])))


def bounds() -> dict[str, tuple[str, str | None]]:
    """Return the least version of each core package, and the first that is too new."""
    found = {}
    for text in PROJECT["dependencies"]:
        name, least, beyond = re.fullmatch(r"(\w+)>=([\d.]+)(?:,<([\d.]+))?", text).groups()
        found[name] = (least, beyond)
    return found


def minors(python: str) -> str:
    return ".".join(python.split(".")[:2])


def test_the_version_is_stated_once_and_the_same():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == PROJECT["version"]
    assert f"license: {PROJECT['license']}" in citation


def test_both_ends_were_tried_and_passed():
    oldest, *newest = TRIED["environments"]
    assert TRIED["passed"] and TRIED["same_numbers_everywhere"] and newest
    assert oldest["resolution"] == "lowest-direct" and newest[-1]["resolution"] == "highest"
    for each in TRIED["environments"]:
        assert each["audit"]["replays_exactly"] and each["tests"]["passed"] > 100
        assert not each["tests"]["failed"]


@pytest.mark.parametrize("name", bounds())
def test_bounds_are_those_that_were_tried(name):
    """The oldest environment had the least version of each package itself, the newest one that is allowed."""
    least, beyond = bounds()[name]
    oldest, *newest = (numbers(each["packages"][name]) for each in TRIED["environments"])
    assert oldest[: len(numbers(least))] == numbers(least) and not any(
        oldest[len(numbers(least)) :]
    ), f"{name}>={least}, but {oldest} was tried; run scripts/check_versions.py"
    for each in newest:
        assert each > oldest
        assert beyond is None or each < numbers(beyond)


def test_pythons_are_those_that_were_tried():
    stated = [x.split(" :: ")[-1] for x in PROJECT["classifiers"] if ":: Python :: 3." in x]
    oldest, *newest = (minors(each["python"]) for each in TRIED["environments"])
    assert PROJECT["requires-python"] == f">={oldest}"
    assert stated == [oldest, *newest]


def test_readme_states_what_was_tried():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    stated = " ".join(readme.split("\n## Install\n")[1].split("\n## ")[0].split())
    oldest, *newest = TRIED["environments"]
    for text in (
        f"Python {minors(oldest['python'])} to {minors(newest[-1]['python'])}",
        f"jax {minors(oldest['packages']['jax'])} to {minors(newest[-1]['packages']['jax'])}",
        f"numpy from {minors(oldest['packages']['numpy'])}",
        f"xarray from {minors(oldest['packages']['xarray'])}",
    ):
        assert text in stated
    for extra in {*PROJECT["optional-dependencies"]} - {"test", "docs", "dev"}:
        assert f"| `{extra}` |" in stated


def test_extras_hold_what_the_core_does_not_need():
    heavy = ("torch", "transformers", "h5py", "optax", "tokenizers")
    assert not {*bounds()} & {*heavy}
    assert {"torch", "transformers", "optax", "hdf5", "test", "dev"} <= {
        *PROJECT["optional-dependencies"]
    }
