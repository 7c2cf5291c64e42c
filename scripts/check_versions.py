"""Try the oldest and the newest packages that pyproject.toml allows: the sample's audit, and a set of tests to the bit.

    python scripts/check_versions.py --overwrite
    python scripts/check_versions.py --oldest /opt/python3.11/bin/python --newest python3.13

Each environment is made anew by uv, with the core packages and a wheel of this checkout alone: the lowest versions that
are allowed under the oldest Python, the highest under the newest. All must find the sample to replay bit for bit, pass
the tests, and write the same numbers to the last bit. It takes some minutes for each.

Exit status: 0 they do; 1 they do not; 2 wrong usage, or an output that cannot be written; 130 interrupted.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from environments import ROOT, called, needed, uv
from reporting import Failure, check_output, guarded, machine_facts, notify, write_json

#: Packages whose bounds are stated.
CORE = (
    *("jax", "jaxlib", "matplotlib", "ml_dtypes", "netCDF4"),
    *("numpy", "safetensors", "tqdm", "xarray"),
)
#: Named where xarray's own bounds choose them.
WITH_THEM = ("pandas", "scipy")

#: Tests that need the core packages alone, and look at bits.
TESTS = (
    *("tests/test_floats.py", "tests/test_operations.py", "tests/test_conformance.py"),
    "tests/test_replay.py::test_programs_are_exact_on_whatever_a_recording_may_hold",
)
#: Of the last one, a few arithmetics.
KEYWORDS = "not test_programs or torch-cpu-loop"

#: Prints the packages, and a digest of every number of a result, as that environment's xarray reads it.
DESCRIBE = """
import hashlib, importlib.metadata, json, platform, sys
import xarray as xr
import jaxaudit
assert jaxaudit.__file__.startswith(sys.prefix), jaxaudit.__file__
digest = hashlib.sha256()
with xr.open_datatree(sys.argv[1]) as tree:
    for node in sorted(tree.subtree, key=lambda node: node.path):
        for name, array in sorted(node.to_dataset(inherit=False).variables.items()):
            values = array.values
            data = "\\0".join(map(str, values.ravel())).encode() if values.dtype.kind in "OUT" else values.tobytes()
            digest.update(f"{node.path}/{name}{array.dims}{array.shape}".encode() + data)
packages = {name: importlib.metadata.version(name) for name in sys.argv[2:]}
print(json.dumps({"python": platform.python_version(), "packages": packages, "digest": digest.hexdigest()}))
"""


class Environment(NamedTuple):
    """What is tried: a name, the interpreter (as uv takes it), and which of the allowed versions."""

    name: str
    python: str
    resolution: str


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    result.add_argument("--oldest", metavar="PYTHON", default="3.11", help="(%(default)s)")
    result.add_argument(
        "--newest",
        metavar="PYTHON",
        nargs="+",
        default=["3.13"],
        help="one or several versions or interpreters (3.13)",
    )
    default = Path("results/versions.json")
    result.add_argument("--output", type=Path, default=default, help="to write (%(default)s)")
    result.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return guarded(run, parser().parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Try every environment, write what was found, and return the exit status."""
    check_output(arguments)
    environments = [
        Environment("oldest", arguments.oldest, "lowest-direct"),
        *(Environment("newest", python, "highest") for python in arguments.newest),
    ]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        wheel = build_wheel(place)
        found = [tried(each, wheel, place / str(k)) for k, each in enumerate(environments)]
    alike = len({each["audit"].pop("digest") for each in found}) == 1
    passed = alike and all(each["passed"] for each in found)
    # Packages differ from environment to environment.
    machine = {k: v for k, v in machine_facts().items() if k not in ("packages", "python")}
    report = {"passed": passed, "same_numbers_everywhere": alike, "machine": machine}
    write_json(arguments.output, report | {"environments": found})
    for each in found:
        versions = ", ".join(f"{name} {version}" for name, version in each["packages"].items())
        said = "passed" if each["passed"] else "FAILED"
        print(f"{each['name']}: {said}; Python {each['python']}, {versions}")
    print("The same numbers everywhere." if alike else "The numbers differ.")
    return 0 if passed else 1


def build_wheel(place: Path) -> Path:
    """Build the wheel that every environment gets."""
    needed(uv("build", "--quiet", "--wheel", "--out-dir", place, ROOT))
    return next(place.glob("*.whl"))


def tried(environment: Environment, wheel: Path, place: Path) -> dict[str, Any]:
    """Make an environment, audit the sample and run the tests in it."""
    name, wanted, resolution = environment
    notify(f"{name}: Python {wanted}, {resolution}")
    python = place / "venv" / "bin" / "python"
    install(environment, wheel, place, python)
    result = place / "sample.nc"
    audit = called(
        [python, "-P", "-m", "jaxaudit", "audit", "--json", "--quiet", "--output", result]
        + ["--expect", "torch-cpu-loop"],
        place,
    )
    if audit.returncode not in (0, 1):
        raise Failure(f"{name}: the sample's audit failed: {audit.stderr.strip()[-500:]}", 1)
    described = json.loads(
        needed([python, "-P", "-c", DESCRIBE, result, *CORE, *WITH_THEM]).strip()
    )
    tests = tested(python)
    return {
        "name": name,
        "resolution": resolution,
        "python": described["python"],
        "packages": described["packages"],
        "passed": audit.returncode == 0 and tests["failed"] == 0 < tests["passed"],
        "audit": {"replays_exactly": audit.returncode == 0, "digest": described["digest"]},
        "tests": tests,
    }


def install(environment: Environment, wheel: Path, place: Path, python: Path) -> None:
    """Fill a new environment with the versions that pyproject.toml leads to, the wheel, and pytest."""
    pins = place / "pins.txt"
    needed(uv("venv", "--quiet", "--python", environment.python, place / "venv"))
    how = ("--quiet", "--resolution", environment.resolution, "--python", python)
    needed(uv("pip", "compile", *how, "--output-file", pins, ROOT / "pyproject.toml"))
    pip = ("pip", "install", "--quiet", "--python", python)
    needed(uv(*pip, "-r", pins, "pytest>=8.3,<10", "hypothesis>=6.100,<7"))
    needed(uv(*pip, "--no-deps", wheel))
    needed(uv("pip", "check", "--quiet", "--python", python))


def tested(python: Path) -> dict[str, Any]:
    """Run the tests against the installed wheel; return how many passed."""
    notify("  tests")
    # Newest packages warn of what the oldest ones do: that is theirs to mend.
    quiet = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings="]
    done = called([python, "-P", "-m", "pytest", *quiet, *TESTS, "-k", KEYWORDS])
    if done.returncode not in (0, 1):
        raise Failure(f"pytest: {(done.stdout + done.stderr).strip()[-500:]}", 1)
    if done.returncode:
        notify("\n".join(x for x in done.stdout.splitlines() if x.startswith("FAILED")))
    closing = done.stdout.strip().splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", closing)}
    return {"selected": list(TESTS), "keywords": KEYWORDS} | {
        x: counts.get(x, 0) for x in ("passed", "failed", "skipped")
    }


if __name__ == "__main__":
    sys.exit(main())
