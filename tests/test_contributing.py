"""CONTRIBUTING.md: its examples run, and what it names is there."""

import re
from pathlib import Path

import pytest

from jaxaudit import arithmetics

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"\n## (Adding [\w ]+)\n.*?```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example in a folder of its own; forget the arithmetic that it adds."""
    monkeypatch.chdir(tmp_path)
    for name in ("VARIANTS", "CATALOGUE"):
        table = getattr(arithmetics, name)
        monkeypatch.setitem(table, "numpy-plain", None)  # so that it is removed afterwards
        del table["numpy-plain"]

    def example(title: str) -> tuple[dict, str]:
        names: dict = {}
        exec(compile(EXAMPLES[title], f"CONTRIBUTING.md: {title}", "exec"), names)
        return names, capsys.readouterr().out

    return example


def test_there_is_an_example_of_each():
    assert [*EXAMPLES] == ["Adding an arithmetic", "Adding a metric", "Adding a reader"]


def test_the_new_arithmetic_replays_its_run_and_the_old_one_does_not(run):
    names, said = run("Adding an arithmetic")
    counts = names["found"].mismatch_count.sum(("timestep", "token_group"))
    assert (counts.sel(arithmetic="numpy-plain") == 0).all()
    assert (counts.sel(arithmetic="torch-cpu-loop") > 0).all() and "numpy-plain" in said
    assert names["found"].audited.all()


def test_examples_leave_the_catalogue_as_it_was():
    assert "numpy-plain" not in {*arithmetics.VARIANTS, *arithmetics.CATALOGUE}


def test_the_new_metric_counts_what_it_says(run):
    names, said = run("Adding a metric")
    values = names["patterns"].astype(int) << 16
    by_hand = ((values & 0x7FFFFF) == 0) & ((values & 0x7FFFFFFF) != 0)
    groups = names["edges"].edge_count.sel(token_group=["dead", "live"]).sum("token_group")
    assert (groups.values == by_hand.sum((1, 2))).all() and groups.sum() > 0
    assert said.startswith("weights that are a power of two")


def test_the_new_reader_gives_the_recorded_bits(run):
    _, said = run("Adding a reader")
    assert said == "0 mismatches in 8 timesteps\n"


def test_what_the_page_names_is_there():
    for name in re.findall(r"`((?:scripts|tests|docs)/[\w/.-]+)`", PAGE):
        assert (ROOT / name).exists(), name
    certificates = PAGE.split("## Certificates")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| (.+?) \|", certificates, re.MULTILINE))
    named = {name for cell in listed for name in re.findall(r"`([^`]*\w[./][^`]*)`", cell)}
    there = {path.name for path in (ROOT / "results").glob("*.json")}
    assert there <= named, f"CONTRIBUTING.md does not say how to renew {sorted(there - named)}"
