"""The command that writes a rounding certificate, with one made by hand in place of the real work."""

import contextlib
import errno
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import pytest
import test_rounding_figures as made
import xarray as xr

from jaxaudit import results
from jaxaudit.rounding import certificate, checks, command, figures, tables

SCRIPT = Path(__file__).parents[1] / "scripts" / "cross_check_rounding.py"
PNG = b"\x89PNG"
WRONG: made.Differences = {("float32 sqrt", "jaxaudit", "ieee"): (7, 1.0, "a bug", "mend it")}


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


main = load(SCRIPT).main


class Fake:
    """Stands in for `certificate.cross_check`: keeps finished operations, and may then fail."""

    def __init__(self, differences: made.Differences = made.SOME, **options: Any):
        self.differences, self.options = differences, options
        self.calls: list[dict[str, Any]] = []
        self.error: BaseException | None = None

    def __call__(self, **given: Any) -> xr.Dataset:
        self.calls.append(given)
        operations = given["operations"] or made.OPERATIONS
        for name in operations:
            if name not in made.OPERATIONS:
                known = ", ".join(made.OPERATIONS)
                raise ValueError(f"unknown operation {name!r}; there are {known}.")
        dataset = made.certificate(operations, self.differences, **self.options)
        first = dataset.isel(operation=slice(0, 2))
        results.save(first, given["unfinished"], overwrite=True)
        if given["progress"]:
            given["progress"](2, 4)
        if self.error:
            raise self.error
        extent = {"extent": "full" if given["full"] else "quick"}
        return dataset.assign_attrs(extent)


@pytest.fixture
def cross_check(monkeypatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(certificate, "cross_check", fake)
    return fake


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Run every command in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys, cross_check) -> Callable[..., Outcome]:
    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = main(["--backend", "cpu", *map(str, arguments)])
        return Outcome(status, *capsys.readouterr())

    return run


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return everything below a folder; None for what is no file."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(run, folder, cross_check) -> Callable[..., str]:
    """Run a command that must fail before any work: in one line, leaving nothing behind."""

    def refused(*arguments: object) -> str:
        before = tree(folder)
        outcome = run(*arguments)
        assert_refusal(outcome)
        assert tree(folder) == before and not cross_check.calls
        return outcome.err

    return refused


def assert_refusal(outcome: Outcome) -> None:
    assert (outcome.status, outcome.out) == (2, ""), outcome.err
    assert outcome.err.startswith("cross_check_rounding.py: error: ")
    assert len(outcome.err.splitlines()) == 1 and outcome.err.endswith("\n")


# --- what it prints and writes ---


def test_help(run):
    outcome = run("--help")
    assert (outcome.status, outcome.err) == (0, "")
    for option in (
        *("--backend", "--quick", "--full", "--operations", "--output", "--table", "--plots"),
        *("--overwrite", "--json", "--quiet", "--version", "--help"),
    ):
        assert option in outcome.out
    assert "Exit status: 0 what jaxaudit computes" in outcome.out


def test_version(run, cross_check):
    assert run("--version") == (0, f"jaxaudit {version('jaxaudit')}\n", "")
    assert not cross_check.calls


def test_defaults(run, folder, cross_check):
    outcome = run()
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.endswith("\nWritten to results/rounding_cpu.nc\n")
    assert "float32 sqrt (1,020 of 6,000)" in outcome.out
    assert list(tree(folder)) == ["results", "results/rounding_cpu.nc"]
    (given,) = cross_check.calls
    assert given == {
        "backend": "cpu",
        "full": False,
        "operations": None,
        "progress": None,
        "unfinished": Path("results/rounding_cpu.nc.unfinished"),
    }
    with xr.open_dataset("results/rounding_cpu.nc") as dataset:
        xr.testing.assert_identical(dataset.load(), made.certificate())


@pytest.mark.parametrize(("option", "full"), [("--quick", False), ("--full", True)])
def test_extent(run, cross_check, option, full):
    assert run(option).status == 0 and cross_check.calls[0]["full"] is full


def test_no_operation_has_a_comma_in_its_name():
    """It could not be given to --operations."""
    assert not [check.name for check in checks.all_checks("cpu") if "," in check.name]


def test_operations_are_split_at_commas(run, cross_check):
    assert run("--operations", "float32 sqrt, bfloat16 sqrt").status == 0
    assert cross_check.calls[0]["operations"] == ["float32 sqrt", "bfloat16 sqrt"]


def test_all_outputs(run, folder):
    outcome = run("--output", "a/x.nc", "--table", "b/c/x.md", "--plots", "figures")
    assert (outcome.status, outcome.err) == (0, "")
    written = {name: content for name, content in tree(folder).items() if content is not None}
    drawn = {f"figures/{name}" for name in figures.FIGURES}
    assert written.keys() == {"a/x.nc", "b/c/x.md", *drawn}
    assert all(written[name].startswith(PNG) for name in drawn)
    assert "## Explanations" in written["b/c/x.md"].decode()


@pytest.mark.parametrize(
    ("differences", "status"),
    [
        (made.SOME, 0),
        (made.NOTHING, 0),
        (made.EVERYTHING, 1),
        (WRONG, 1),
        ({("float32 sqrt", "jaxaudit-float64", "ieee"): (1, 1.0, "", "")}, 1),
        ({("float32 sqrt", "jaxaudit", "pytorch"): (7, 1.0, *made.ROOT)}, 0),
        ({("float32 sqrt", "pytorch", "ieee"): (7, 1.0, *made.ROOT)}, 0),
    ],
)
def test_status_is_1_where_jaxaudit_differs_from_ieee(run, cross_check, differences, status):
    cross_check.differences = differences
    outcome = run()
    assert (outcome.status, outcome.err) == (status, "")
    assert Path("results/rounding_cpu.nc").exists()


def test_json_is_one_object(run, cross_check):
    cross_check.differences = WRONG
    cross_check.options = {"torch": False, "attributes": {"notices": ["no PyTorch"]}}
    outcome = run("--json", "--output", "x.nc")
    assert outcome.status == 1 and outcome.out.count("\n") == 1

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    found = json.loads(outcome.out, parse_constant=refuse)
    assert (found["output"], found["extent"], found["exact"]) == ("x.nc", "quick", False)
    assert found["notices"] == ["no PyTorch"]
    assert found["jaxaudit_against_ieee"]["jaxaudit"]["differing"] == 7
    assert found["differing_from_ieee"]["jaxaudit"] == ["float32 sqrt"]
    operation = found["operations"]["float32 sqrt"]
    assert operation["jaxaudit"]["ieee"] == {
        "compared": 6000,
        "differing": 7,
        "max_ulp": 1.0,
        "cause": "a bug",
        "remedy": "mend it",
    }
    assert operation["jit"]["pytorch"]["differing"] is None


@pytest.mark.parametrize("notices", ["", [], ["one"], ["one", "two"], "one"])
def test_notices_go_to_stderr(run, cross_check, notices):
    cross_check.options = {"attributes": {"notices": notices}}
    lines = [notices] if isinstance(notices, str) else notices
    wanted = "".join(f"cross_check_rounding.py: {line}\n" for line in lines if line)
    assert run("--quiet").err == wanted


# --- what it refuses ---


@pytest.mark.parametrize(
    "arguments",
    [
        ["--backend", "abacus"],
        ["--unknown"],
        ["x"],
        ["--quick", "--full"],
        ["--full=yes"],
        ["--out", "x.nc"],
        ["--output", ""],
        ["--table", ""],
        ["--plots", ""],
        ["--operations", ""],
        ["--operations", "float32 sqrt,,bfloat16 sqrt"],
        ["--output", "."],
        ["--table", "."],
        ["--table", "x", "--output", "x"],
        ["--table", "x.nc.unfinished", "--output", "x.nc"],
        ["--output", os.fsdecode(b"\xff.nc")],
    ],
    ids=str,
)
def test_wrong_usage(refused, arguments):
    refused(*arguments)


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_absent_backend(refused, backend):
    with contextlib.suppress(RuntimeError):
        jax.devices(backend)
        pytest.skip(f"there is a {backend}")
    assert f"backend '{backend}' is not available" in refused("--backend", backend)


def test_unknown_operation_lists_the_known_ones(run, folder):
    outcome = run("--operations", "float32 sqrt,float32 cosine")
    assert_refusal(outcome)
    assert "--operations: unknown operation 'float32 cosine'; there are float32 to" in outcome.err
    assert tree(folder) == {}


def test_what_another_check_keeps_is_not_lost(run, folder, monkeypatch):
    def refuse(**given):
        raise certificate.UnfinishedError("x.nc.unfinished keeps 3 operations of another check.")

    monkeypatch.setattr(certificate, "cross_check", refuse)
    (folder / "x.nc.unfinished").write_text("3 operations")
    outcome = run("--output", "x.nc")
    assert outcome.status == 2 and "keeps 3 operations of another check" in outcome.err
    assert "continues" not in outcome.err and len(outcome.err.splitlines()) == 1
    assert (folder / "x.nc.unfinished").read_text() == "3 operations"


def test_other_value_errors_are_not_wrong_usage(run, cross_check):
    cross_check.error = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        run("--operations", "float32 sqrt")


@pytest.mark.parametrize("name", ["x.nc", "x.md", *(f"figures/{n}" for n in figures.FIGURES)])
def test_existing_output(refused, run, folder, name):
    (folder / "figures").mkdir()
    (folder / name).write_text("precious")
    arguments = ("--output", "x.nc", "--table", "x.md", "--plots", "figures")
    message = refused(*arguments)
    assert f"{name} exists already" in message and "--overwrite" in message
    assert run(*arguments, "--overwrite").status == 0
    assert (folder / name).read_bytes() != b"precious"


@pytest.mark.parametrize("name", ["x.nc", "x.nc.unfinished", "x.md"])
def test_folder_in_place_of_a_file(refused, folder, name):
    (folder / name).mkdir()
    arguments = ("--output", "x.nc", "--table", "x.md", "--overwrite")
    assert f"{name} is a folder" in refused(*arguments)


@pytest.mark.parametrize("option", ["--output", "--table", "--plots"])
def test_folder_that_cannot_be(refused, folder, option):
    (folder / "file").write_text("")
    assert "file is not a folder that can be written to" in refused(option, "file/deep/x")


# --- all outputs or none; what was finished is kept until then ---


@pytest.mark.parametrize("writer", ["write", "_write_report", "_write_figure"])
def test_full_disk(run, folder, monkeypatch, writer):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = results.write
    at = {"write": results}.get(writer, command)
    if writer == "write":  # the dataset, not what is kept of it

        def write(dataset: xr.Dataset, path: Path, **options: Any) -> None:
            (full if dataset.sizes["operation"] == len(made.OPERATIONS) else real)(dataset, path)

        monkeypatch.setattr(results, "write", write)
    else:
        monkeypatch.setattr(at, writer, full)
    outcome = run("--output", "new/x.nc", "--table", "t/x.md", "--plots", "figures")
    assert_refusal(outcome)
    assert "no space left on the device for " in outcome.err
    assert "2 operations are kept in new/x.nc.unfinished" in outcome.err
    assert list(tree(folder)) == ["new", "new/x.nc.unfinished"]


def test_output_that_appears_meanwhile_is_kept(run, folder, cross_check, monkeypatch):
    def slow(**given: Any) -> xr.Dataset:
        (folder / "x.nc").write_text("faster")
        return cross_check(**given)

    monkeypatch.setattr(certificate, "cross_check", slow)
    outcome = run("--output", "x.nc")
    assert_refusal(outcome)
    assert "x.nc exists already" in outcome.err
    assert (folder / "x.nc").read_text() == "faster"


@pytest.mark.parametrize(
    "error",
    [MemoryError("8 EiB"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")],
)
def test_out_of_memory(run, cross_check, error):
    cross_check.error = error
    outcome = run()
    assert_refusal(outcome)
    assert "out of memory" in outcome.err and "2 operations are kept in" in outcome.err


def test_interrupted(run, folder, cross_check):
    cross_check.error = KeyboardInterrupt()
    outcome = run("--output", "x.nc", "--plots", "figures")
    told = "interrupted; 2 operations are kept in x.nc.unfinished; the same command continues from there\n"
    assert outcome == (130, "", told)
    assert list(tree(folder)) == ["x.nc.unfinished"]
    cross_check.error = None
    assert run("--output", "x.nc", "--plots", "figures").status == 0
    assert "x.nc.unfinished" not in tree(folder)


def test_interrupted_before_anything_was_done(run, folder, monkeypatch):
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(certificate, "cross_check", interrupt)
    assert run() == (130, "", "interrupted; no result was written\n")
    assert tree(folder) == {}


def test_interrupted_where_what_is_kept_cannot_be_read(run, folder, monkeypatch):
    def interrupt(**_: object) -> None:
        (folder / "x.nc.unfinished").write_text("?")
        raise KeyboardInterrupt

    monkeypatch.setattr(certificate, "cross_check", interrupt)
    outcome = run("--output", "x.nc")
    assert outcome == (130, "", "interrupted; what was finished is kept in x.nc.unfinished\n")


def test_interrupted_while_writing(run, folder, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_write_figure", interrupt)
    outcome = run("--output", "x.nc", "--plots", "figures")
    assert outcome.status == 130 and "2 operations are kept in x.nc.unfinished" in outcome.err
    assert list(tree(folder)) == ["x.nc.unfinished"]


# --- streams, in a process of its own ---

PROGRAM = f"""
import runpy, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_cross_check_rounding as here
here.certificate.cross_check = here.Fake(here.WRONG)
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
PARTS = [sys.executable, "-c", PROGRAM, "--backend", "cpu"]


def process(
    *arguments: str, environment: Mapping[str, str] | None = None, **streams: Any
) -> Outcome:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    done = subprocess.run(
        [*PARTS, *arguments],
        text=True,
        check=False,
        timeout=120,
        env=os.environ | dict(environment or {}),
        **options,
    )
    return Outcome(done.returncode, done.stdout or "", done.stderr or "")


def test_closed_streams(folder):
    shell = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh"]
    assert subprocess.run([*shell, *PARTS], check=False, timeout=120).returncode == 1
    with xr.open_dataset("results/rounding_cpu.nc") as dataset:
        assert dataset.sizes["operation"] == len(made.OPERATIONS)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_stdout():
    with open("/dev/full", "w") as full:
        outcome = process(stdout=full)
    assert_refusal(outcome)
    assert "No space left" in outcome.err


def test_reader_that_went_away_and_stdout_without_unicode():
    read, write = os.pipe()
    os.close(read)
    outcome = process(
        "--output", "läuft 走.nc", environment={"PYTHONIOENCODING": "ascii"}, stdout=write
    )
    os.close(write)
    assert outcome == (1, "", "") and Path("läuft 走.nc").exists()


def test_the_kept_certificate_is_exact_and_the_pages_show_it():
    root = SCRIPT.parents[1]
    dataset = xr.load_dataset(root / "results" / "rounding_cpu.nc")
    assert dataset.attrs["extent"] == "full"
    assert not tables.differs_from_ieee(dataset)
    assert not any("not explained" in str(cause) for cause in dataset.cause.values.flat)
    page = (root / "results" / "rounding_cpu.md").read_text(encoding="utf-8")
    assert page == tables.report(dataset)
    assert tables.short(dataset) in (root / "README.md").read_text(encoding="utf-8")
