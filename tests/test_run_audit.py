"""The command, as people use it: what it prints, writes, refuses, and leaves behind."""

import contextlib
import csv
import errno
import html
import importlib.util
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
import xarray as xr
from recordings import Tensor, f32, f64, header_of, parse, serialize, short_run, small_run, write

import jaxaudit
from jaxaudit import auditing, commands, operations, plots, results, summary
from jaxaudit.arithmetics import CATALOGUE
from jaxaudit.ledger import figures
from jaxaudit.replay import SelfTestError

SCRIPT = Path(__file__).parents[1] / "scripts" / "run_audit.py"
CSV_HEADER = "t,norm_predicted,norm_observed,norm_difference,cosine_similarity,ratio"
#: Enough for what is not about identification, which replays every arithmetic that fits.
ONLY = ("--only", "accounting")
FEW = ("--arithmetic", "torch-cpu-loop,float32-then-bfloat16", *ONLY)
MISMATCH_FIELDS = ["timestep", "token", "position", "recorded_bits", "replayed_bits"]


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


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Run every command in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(capsys) -> Callable[..., Outcome]:
    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture
def run(folder) -> Path:
    """Write a short recording that replays under `torch-cpu-loop`."""
    return write(folder / "run.safetensors", *short_run())


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return everything below a folder; None for what is no file."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(command, folder) -> Callable[..., str]:
    """Run a command that must fail: in one line, without a result, leaving nothing behind."""

    def run(status: int, *arguments: object, keeps: bool = True) -> str:
        before = tree(folder)
        outcome = command(*arguments)
        assert_refusal(outcome, status)
        assert not keeps or tree(folder) == before
        return outcome.err

    return run


def assert_refusal(outcome: Outcome, status: int) -> None:
    assert (outcome.status, outcome.out) == (status, ""), outcome.err
    lines = outcome.err.splitlines()
    assert 1 <= len(lines) <= 2 and outcome.err.endswith("\n"), outcome.err
    assert lines[0].startswith("run_audit.py: error: ") and "Traceback" not in outcome.err


@pytest.fixture
def no_work(monkeypatch) -> None:
    """Fail if anything is replayed: what is refused must be refused before."""

    def audit(*_: object, **__: object) -> None:
        raise AssertionError("the audit was started")

    monkeypatch.setattr(auditing, "audit_groups", audit)


def process(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    parts = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(
        parts, text=True, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    )


def finish(started: subprocess.Popen[str], timeout: float = 120) -> Outcome:
    out, err = started.communicate(timeout=timeout)
    return Outcome(started.returncode, out or "", err or "")


# --- help, version, streams ---


def test_help(command):
    outcome = command("--help")
    assert (outcome.status, outcome.err) == (0, "")
    for option in (
        *("--token-groups", "--backend", "--arithmetic", "--steps", "--output", "--csv", "--plots"),
        *("--expect", "--overwrite", "--json", "--quiet", "--version", "--help"),
        *("--only", "--report", "--counterfactual-beta2", "--seed", "--per-token"),
    ):
        assert option in outcome.out
    assert "Exit status: 0 the audit ran" in outcome.out


def test_version(command):
    assert command("--version") == (0, f"jaxaudit {version('jaxaudit')}\n", "")


def test_sample_is_the_default(command, folder):
    outcome = command()
    assert (outcome.status, outcome.err) == (0, "")
    assert "torch-cpu-loop" in outcome.out and "dead 384, live 256" in outcome.out
    assert outcome.out.endswith("Written to results/sample.nc\n")
    assert list(tree(folder)) == ["results", "results/sample.nc"]
    with xr.open_dataset("results/sample.nc") as dataset:
        assert dataset.sizes["timestep"] == 1000
        assert dataset.identified_arithmetic.split(",")[0] == "torch-cpu-loop"
        assert list(dataset.token_group.values) == ["all", "dead", "live"]


def test_json_is_one_object(command, run):
    outcome = command(run, "--json", *FEW, "--expect", "float32-then-bfloat16")
    assert outcome.status == 1 and outcome.err == "" and outcome.out.count("\n") == 1

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    found = json.loads(outcome.out, parse_constant=refuse)
    json.dumps(found, allow_nan=False)
    assert found["source"] == str(run) and found["output"] == "results/run.nc"
    assert found["timesteps"] == [1, 12] and found["timestep_count"] == 12
    assert found["expected"] == "float32-then-bfloat16" and found["expectation_met"] is False
    assert found["identified_arithmetic"] == ["torch-cpu-loop"]
    assert found["arithmetics"]["torch-cpu-loop"]["mismatch_count"]["param"] == 0
    assert found["arithmetics"]["torch-cpu-loop"]["first_mismatch"]["param"] is None


def test_streams_are_kept_apart(command, run):
    outcome = command(run, *FEW, "--steps", "1:3", "--output", "a.nc")
    quiet = command(run, *FEW, "--steps", "1:3", "--output", "b.nc", "--quiet")
    assert outcome.err == quiet.err == ""
    assert outcome.out.replace("a.nc", "b.nc") == quiet.out


def test_unset_stdout_encoding_does_not_matter(run, folder):
    """A name that the locale cannot show is escaped, not a crash."""
    run.rename(folder / "läuft 走.safetensors")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    started = process("läuft 走.safetensors", *FEW, "--json", "--quiet", env=environment)
    outcome = finish(started)
    assert outcome.status == 0 and outcome.err == ""
    assert json.loads(outcome.out)["source"] == "läuft 走.safetensors"
    assert (folder / "results" / "läuft 走.nc").exists()


@pytest.mark.parametrize("options", [["--version"], ["--version", "--quiet"]])
def test_reader_that_went_away(options):
    read, write_end = os.pipe()
    os.close(read)
    outcome = finish(process(*options, stdout=write_end))
    os.close(write_end)
    assert outcome == (0, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_stdout():
    with open("/dev/full", "w") as full:
        outcome = finish(process("--version", stdout=full))
    assert_refusal(outcome, 2)
    assert "No space left" in outcome.err


def test_closed_streams(run, folder):
    parts = [sys.executable, str(SCRIPT), str(run), *FEW]
    parts += ["--expect", "float32-then-bfloat16"]
    shell = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh"]
    done = subprocess.run([*shell, *parts], check=False, timeout=120)
    assert done.returncode == 1
    with xr.open_dataset("results/run.nc") as dataset:
        assert dataset.sizes["timestep"] == 12


# --- input that is wrong: exit status 3 ---


def test_missing_file(refused, no_work):
    assert "absent.safetensors: cannot be opened (No such file" in refused(3, "absent.safetensors")


def test_folder_as_recording(refused, folder, no_work):
    assert "0 checkpoints found" in refused(3, folder)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a safetensors file"),
        (b"x", "not a safetensors file"),
        (b"PK\3\4" * 99, "a file of torch.save, which holds one state at most"),
        (b"\x89HDF\r\n\x1a\n" * 9, "HDF5 cannot read it"),
        (b"{}" * 99, "the index is not valid JSON"),
    ],
)
def test_not_a_recording(refused, folder, content, message, no_work):
    (folder / "x.safetensors").write_bytes(content)
    assert message in refused(3, "x.safetensors")


@pytest.mark.parametrize("size", [9, 100, 1500, 30_000])
def test_truncated(refused, run, size, no_work):
    run.write_bytes(run.read_bytes()[:size])
    assert "truncated" in refused(3, run)


def test_offsets_that_lie(refused, run, no_work):
    header, data = header_of(*short_run())
    header["W"]["data_offsets"] = [0, header["W"]["data_offsets"][1]]
    run.write_bytes(serialize(header, data))
    assert "bytes by its offsets, but BF16" in refused(3, run)
    header["W"] = dict(header["grad_W"])
    run.write_bytes(serialize(header, data))
    assert "overlap or leave a gap" in refused(3, run)


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in (small_run() | changes).items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(W=None), "no `W`"),
        (changed(W=("BF16", np.zeros((4, 3), "<u2"))), "`grad_W` has shape [4, 3, 2], but `W`"),
        (changed(grad_W=("BF16", np.zeros((4, 3, 3), "<u2"))), "`grad_W` has shape [4, 3, 3]"),
        (changed(variance_W=("F32", np.zeros((3, 3, 2), "<u4"))), "`variance_W` has shape [3"),
        (changed(momentum_W=("F64", np.zeros((4, 3, 2), "<u8"))), "`momentum_W` has dtype F64"),
        (changed(W=("I32", np.zeros((4, 3, 2), "<u4"))), "`W` has dtype I32"),
        ({"W": ("BF16", np.zeros((1, 3, 2), "<u2"))}, "holds no step (T = 0)"),
        (changed(num_steps=f32(5)), "`num_steps` says 5, but `W` holds 3"),
        (changed(learning_rate=None), "missing hyperparameters: learning_rate"),
        (changed(adam_beta1=f32(1)), "beta1 is 1; needed 0 <= beta1 < 1"),
        (changed(adam_epsilon=f32(math.nan)), "epsilon is nan"),
        (changed(learning_rate=f64([0.1, 0.2])), "`learning_rate` has shape [2]"),
        (changed(dead_mask=("BOOL", np.zeros(3, bool))), "'dead' has no token"),
        (changed(dead_mask=("BOOL", np.ones(4, bool))), "has no token"),
        (changed(rare_mask=("BOOL", np.ones(4, bool))), "over 4 tokens, but the recording has 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inconsistent_recording(refused, folder, tensors, message):
    write(folder / "x.safetensors", tensors)
    assert message in refused(3, "x.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"dead_mask": ("U8", np.asarray([0, 1, 1, 0], "u1"))},
            "over 4 tokens, but the recording has 10",
        ),
        ({"dead_mask": ("U8", np.zeros(10, "u1"))}, "'dead' has no token"),
        ({"dead_mask": ("F32", np.zeros(10, "<u4"))}, "needed one axis over tokens"),
        ({"other": ("U8", np.zeros(10, "u1"))}, "no usable token group"),
        ({"a\nb_mask": ("U8", np.ones(10, "u1"))}, "cannot name a token group"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_token_groups_that_do_not_fit(refused, run, folder, tensors, message):
    write(folder / "groups.safetensors", tensors)
    assert message in refused(3, run, "--token-groups", "groups.safetensors")


def _off_by_one(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        dtype, array = tensors[key]
        array = array.copy()
        array[1:-1] = array[2:].copy()
        return tensors | {key: (dtype, array)}

    return change


def _one_bit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    dtype, array = tensors["W"]
    array = array.copy()
    array[9, 2, 3] ^= 1
    return tensors | {"W": (dtype, array)}


def _one_row(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    dtype, array = tensors["W"]
    array = array.copy()
    array[9] ^= 1
    return tensors | {"W": (dtype, array)}


@pytest.mark.parametrize(
    ("change", "stated", "told"),
    [
        (dict, {"learning_rate": 2e-3}, "exp_avg and exp_avg_sq agree and param differs: look at the learning rate (0.002 is stored)"),
        (dict, {"beta2": 0.95}, "exp_avg agrees and exp_avg_sq and param differ: look at beta2 (0.95 is stored)."),
        (_off_by_one("grad_W"), {}, "param agrees and exp_avg and exp_avg_sq differ: look at whether `grad_W` holds in row t"),
        (_one_bit, {}, "all but 2 of param agree: look at these elements."),
        (_one_row, {}, "the weights differ in 2 of 12 timesteps, the first 9: look at what other than the optimizer"),
        (dict, {}, ""),
    ],
    ids=["rate", "beta2", "gradients", "bit", "row", "right"],
)  # fmt: skip
def test_what_does_not_fit_is_told_where_to_look(folder, change, stated, told):
    tensors, metadata = short_run()
    numbers = json.loads(metadata["hyperparameters"]) | stated
    metadata |= {"hyperparameters": json.dumps(numbers)}
    path = write(folder / "run.safetensors", change(tensors), metadata)
    with jaxaudit.open_recording(path) as recording:
        said = summary.where_to_look(jaxaudit.audit(recording, arithmetics="torch-cpu-loop"))
    assert told in said and bool(said) == bool(told)
    assert ("docs/limits.md" in said) == bool(told)


def test_the_command_says_where_to_look_after_all_were_tried(command, folder):
    tensors, metadata = short_run()
    write(folder / "run.safetensors", _one_bit(tensors), metadata)
    said = command("run.safetensors", *ONLY).out
    assert "all but 2 of param agree: look at these elements." in said
    said = command("run.safetensors", *FEW, "--overwrite").out
    assert "look at" not in said and "`--arithmetic auto` tries all others." in said


def test_where_no_moment_is_wrong_the_first_wrong_one_is_named(command, folder):
    tensors, metadata = short_run()
    dtype, array = tensors["grad_W"]
    array = array.copy()
    array[7, 3, 4] = 0x7FC0
    write(folder / "run.safetensors", tensors | {"grad_W": (dtype, array)}, metadata)
    said = command("run.safetensors", "--arithmetic", "torch-cpu-loop", *ONLY).out
    assert (
        "First exp_avg that differs under torch-cpu-loop: timestep 7, token 3, position 4" in said
    )


def test_a_resumed_run_says_which_steps_of_the_optimizer_it_holds(command, folder):
    tensors, metadata = short_run()
    cut = {k: (d, a[4:] if a.shape[:1] == (13,) else a) for k, (d, a) in tensors.items()}
    cut["num_steps"] = ("I64", np.asarray(8, "<i8"))
    write(folder / "run.safetensors", cut, metadata | {"first_step": "5"})
    said = command("run.safetensors", "--arithmetic", "torch-cpu-loop", *ONLY).out
    assert "timesteps 1 to 8 (steps 5 to 12 of the optimizer), bfloat16" in said
    assert "Replays bit for bit under torch-cpu-loop" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "--seed: got -1"),
        (["--output", "x/"], "--output: x/ is a folder"),
        (["--report", "x/"], "--report: x/ is a folder"),
    ],
)
def test_arguments_that_mean_nothing(refused, run, arguments, message):
    assert message in refused(2, run, *arguments)


def test_an_interruption_while_modules_load_is_one(folder):
    (folder / "slow.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from jaxaudit import terminal\n"
        "def work():\n"
        "    with terminal.importing():\n"
        "        try:\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "        except KeyboardInterrupt as error:  # as NumPy and jaxlib do\n"
        "            raise ImportError('failed to import') from error\n"
        "    return 0\n"
        "sys.exit(terminal.run(work))\n"
    )
    done = subprocess.run([sys.executable, "slow.py"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted; no result was written\n"


def test_a_folder_of_recordings_and_an_archive_are_told_from_checkpoints(refused, run, folder):
    assert "Of a recording in one file, give the file." in refused(3, folder)
    shutil.copy(run, folder / "run-1.safetensors")
    os.rename(run, folder / "run-2.safetensors")
    assert "run-1.safetensors in it is a recording of its own" in refused(3, folder)
    np.savez(folder / "x.npz", W=np.zeros(3))
    assert "an archive of NumPy" in refused(3, "x.npz")


def test_token_groups_that_are_no_file(refused, run):
    assert "absent: cannot be opened" in refused(3, run, "--token-groups", "absent")
    assert "no usable token group" in refused(3, run, "--token-groups", run)


def test_names_with_line_breaks_and_bytes_that_are_no_text(refused, folder):
    bad = os.fsencode(folder) + b"/a\nb\xff\x1b[31m.safetensors"
    Path(os.fsdecode(bad)).write_bytes(b"x")
    assert "a?b??[31m.safetensors: not a safetensors file" in refused(3, os.fsdecode(bad))
    assert "too long" in refused(3, "x" * 300)


def test_odd_names_are_audited(command, refused, run, folder):
    odd = os.fsdecode(b"a\nb\xff.x.safetensors")
    run.rename(odd)
    assert "a?b?.x.nc is not Unicode" in refused(2, odd)
    outcome = command(odd, *FEW, "--json", "--output", "1.nc")
    assert outcome.status == 0 and json.loads(outcome.out)["source"] == odd
    outcome = command(odd, *FEW, "--output", "~/a::b/2\n.nc")
    assert outcome.status == 0 and "Recording   a?b?.x.safetensors: timesteps" in outcome.out
    assert outcome.out.endswith("Written to ~/a::b/2?.nc\n")
    for name in ("1.nc", "~/a::b/2\n.nc"):
        with xr.open_dataset(folder / name) as dataset:
            assert dataset.source == "a\nb\\udcff.x.safetensors"


# --- wrong usage: exit status 2 ---


@pytest.mark.parametrize(
    "arguments",
    [
        ["--backend", "abacus"],
        ["--unknown"],
        ["a", "b"],
        ["--steps"],
        ["--out", "x.nc"],
        ["--arithmetic", "floaty"],
        ["--arithmetic", ""],
        ["--arithmetic", "float32,,optax"],
        ["--expect", "floaty"],
        ["--expect", "all"],
        [""],
        ["--output", ""],
        ["--token-groups", ""],
        ["--csv", ""],
        ["--plots", ""],
        ["--csv", "."],
        ["--csv", "/"],
    ],
    ids=" ".join,
)
def test_wrong_usage(refused, no_work, arguments):
    refused(2, *arguments)


def test_unknown_arithmetic_lists_the_known_ones(refused, no_work):
    message = refused(2, "--arithmetic", "float32,floaty")
    assert "unknown arithmetic 'floaty'" in message and all(name in message for name in CATALOGUE)


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_absent_backend(refused, run, no_work, backend):
    try:
        jax.devices(backend)
        pytest.skip(f"there is a {backend}")
    except RuntimeError:
        pass
    assert f"backend '{backend}' is not available" in refused(2, run, "--backend", backend)


@pytest.mark.parametrize(
    "steps",
    ["0:5", "1:14", "5:5", "6:5", "13:", ":1", "20:30", "99999999999999999:", "1", "", "a:b"]
    + ["1:2:3", "-3:5", "1.5:3", "1;5", "0x1:0x5", "9" * 5000 + ":"],
)
def test_steps_outside_or_malformed(refused, run, no_work, steps):
    message = refused(2, run, f"--steps={steps}")
    assert message.startswith("run_audit.py: error: --steps: ")


@pytest.mark.parametrize(
    ("steps", "first", "last"), [("2:5", 2, 4), (":3", 1, 2), ("11:", 11, 12), (":", 1, 12)]
)
def test_steps(command, run, steps, first, last):
    assert command(run, "--steps", steps, "--arithmetic", "torch-cpu-loop", *ONLY).status == 0
    with xr.open_dataset("results/run.nc") as dataset:
        assert list(dataset.timestep.values) == list(range(first, last + 1))
        assert (dataset.mismatch_count == 0).all()


# --- outputs that exist or cannot be written: exit status 2 ---


def test_existing_output(refused, command, run, folder, no_work):
    (folder / "results").mkdir()
    precious = folder / "results" / "run.nc"
    precious.write_text("precious")
    before = precious.stat()
    message = refused(2, run)
    assert "results/run.nc exists already" in message and "--overwrite" in message
    assert precious.stat() == before and precious.read_text() == "precious"


@pytest.mark.parametrize(
    "name", ["x-all-float32-then-bfloat16.csv", f"figures/{next(iter(plots.FIGURES))}"]
)
def test_existing_table_or_figure(refused, run, folder, no_work, name):
    (folder / "figures").mkdir()
    (folder / name).write_text("precious")
    assert f"{name} exists already" in refused(2, run, "--csv", "x.csv", "--plots", "figures")


def test_overwrite(command, run, folder):
    (folder / "x.nc").write_text("old")
    assert command(run, *FEW, "--output", "x.nc", "--overwrite").status == 0
    with xr.open_dataset("x.nc") as dataset:
        assert dataset.sizes["timestep"] == 12
    assert sorted(os.listdir(folder)) == ["run.safetensors", "x.nc"]


def test_output_that_appears_meanwhile_is_kept(refused, run, folder, monkeypatch):
    """Of two audits at the same time, the slower one does not replace what the faster one wrote."""
    audit = auditing.audit_groups

    def slow(*arguments: Any, **options: Any) -> Any:
        found = audit(*arguments, **options)
        (folder / "x.nc").write_text("faster")
        return found

    monkeypatch.setattr(auditing, "audit_groups", slow)
    assert "x.nc exists already" in refused(2, run, *FEW, "--output", "x.nc", keeps=False)
    assert tree(folder).keys() == {"run.safetensors", "x.nc"}
    assert (folder / "x.nc").read_text() == "faster"


def test_output_is_a_folder(refused, run, folder, no_work):
    (folder / "results").mkdir()
    (folder / "results" / "run.nc").mkdir()
    assert "is a folder; name a file" in refused(2, run, "--overwrite")
    assert "is a folder; name a file" in refused(2, run, "--csv", "results", "--output", "x.nc")


def test_output_is_the_input(refused, run, folder, no_work):
    (folder / "link.nc").symlink_to(run)
    os.link(run, folder / "hard.nc")
    for name in (run, "link.nc", "hard.nc", "./../" + folder.name + "/run.safetensors"):
        assert "what this command reads" in refused(2, run, "--output", name, "--overwrite")
    groups = shutil.copy(jaxaudit.sample_paths()[1], folder / "groups.safetensors")
    arguments = (run, "--token-groups", groups, "--overwrite", "--output", groups)
    assert "what this command reads" in refused(2, *arguments)


def test_output_is_no_regular_file(refused, run, folder, no_work):
    os.mkfifo(folder / "pipe.nc")
    for name in ("/dev/null", "pipe.nc"):
        assert "not a regular file" in refused(2, run, "--output", name, "--overwrite")
    assert Path("/dev/null").is_char_device()


def test_one_name_for_two_outputs(refused, run, folder, no_work):
    masks = {"a b_mask": ("U8", np.ones(10, "u1")), "a/b_mask": ("U8", np.ones(10, "u1"))}
    write(folder / "groups.safetensors", masks)
    arguments = (run, "--token-groups", "groups.safetensors", "--csv", "x.csv")
    assert "x-a_b-torch-cpu-loop.csv would be written twice" in refused(2, *arguments)


@pytest.mark.parametrize("option", ["--output", "--csv", "--plots"])
def test_folder_that_cannot_be(refused, run, folder, no_work, option):
    """A file, or a link to nowhere, where a folder is needed."""
    (folder / "file").write_text("")
    (folder / "link").symlink_to("nowhere")
    for parent in ("file", "file/deep", "link", "link/deep"):
        message = refused(2, run, option, f"{parent}/x.nc")
        assert f"{parent.split('/')[0]} is not a folder that can be written to" in message


def test_new_folders_are_made(command, run, folder):
    arguments = ("--csv", "b/c/x.csv", "--plots", "d/e", "--arithmetic", "float32", *ONLY)
    assert command(run, "--output", "a/b/c.nc", *arguments).status == 0
    made = {path for path in tree(folder) if path.endswith((".nc", ".csv", ".png"))}
    assert {"a/b/c.nc", "b/c/x-all-float32.csv"} < made and len(made) >= 3


@pytest.fixture
def mounted(folder) -> Iterator[Callable[[str], Path]]:
    """Mount small memory file systems, where that is allowed."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = folder / f"mounted{len(places)}"
        place.mkdir()
        if shutil.which("mount") is None or os.geteuid() != 0:
            pytest.skip("needs root to mount")
        parts = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if subprocess.run(parts, capture_output=True, check=False).returncode:
            pytest.skip("mount is not allowed here")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


def test_read_only_file_system(refused, run, mounted, no_work):
    place = mounted("ro")
    message = refused(2, run, "--output", place / "deep" / "x.nc")
    assert f"{place} is not a folder that can be written to (Read-only file system)" in message


@pytest.mark.parametrize(
    "outputs",
    [
        ["--output", "{}/deep/x.nc"],
        ["--output", "x.nc", "--csv", "{}/deep/x.csv"],
        ["--output", "new/x.nc", "--plots", "{}"],
    ],
    ids=["dataset", "tables", "figures"],
)
def test_full_disk(refused, mounted, outputs):
    """All of the outputs appear, or none, and no new folder either."""
    place = mounted("size=64k")
    message = refused(2, *FEW, *(part.format(place) for part in outputs))
    assert (
        f"no space left on the device for {place}" in message and "nothing was written" in message
    )


@pytest.mark.parametrize("at", [1, 2, 3])
def test_full_disk_without_a_mount(refused, run, monkeypatch, at):
    """The same where the disk is full when it comes to the dataset, to a table, to a figure."""
    calls: list[Any] = []

    def full(*_: object, **__: object) -> None:
        calls.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    name = ["write", "_write_table", "_write_figure"][at - 1]
    monkeypatch.setattr(results if at == 1 else commands, name, full)
    arguments = ("--csv", "new/x.csv", "--plots", "new/deep", "--output", "results/deep/x.nc")
    assert "no space left on the device for " in refused(2, run, *FEW, *arguments)
    assert calls


def test_disk_that_fails_at_the_last_moment(refused, run, monkeypatch):
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    assert "cannot write the output: Input/output error" in refused(2, run, *FEW)


def test_netcdf_error_names_the_output(refused, run, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("NetCDF: HDF error")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", broken)
    assert "cannot write results/run.nc: NetCDF: HDF error" in refused(2, run, *FEW)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root to be nobody")
def test_folder_of_somebody_else(run, folder):
    """Asked as nobody, who may enter the folder, but not write there."""
    program = (
        "import os, runpy, sys\n"
        "import jaxaudit.command_line.audit, jaxaudit.models.command\n"
        "os.setegid(65534); os.seteuid(65534)\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    for parent in (folder, *folder.parents):
        if parent.name.startswith("pytest-"):
            parent.chmod(0o755)
    folder.chmod(0o755)
    run.chmod(0o644)
    before = tree(folder)
    parts = [sys.executable, "-c", program, "run.safetensors"]
    done = subprocess.run(parts, capture_output=True, text=True, check=False, timeout=120)
    assert_refusal(Outcome(done.returncode, done.stdout, done.stderr), 2)
    assert "Permission denied" in done.stderr and tree(folder) == before


def test_two_audits_at_the_same_time(run, folder):
    """Both end; the output is whole, and nothing else is there."""
    both = [process(run, *FEW, "--output", "x.nc") for _ in range(2)]
    outcomes = [finish(one) for one in both]
    assert {outcome.status for outcome in outcomes} <= {0, 2}
    assert any(outcome.status == 0 for outcome in outcomes)
    assert sorted(os.listdir(folder)) == ["run.safetensors", "x.nc"]
    with xr.open_dataset("x.nc") as dataset:
        assert dataset.sizes["timestep"] == 12


# --- other ways to fail ---


def test_self_test_that_fails(refused, run, monkeypatch):
    def audit(*_: object, **__: object) -> None:
        raise SelfTestError("this device cannot add.")

    monkeypatch.setattr(auditing, "audit_groups", audit)
    assert "cannot add. No numbers were written." in refused(4, run)


@pytest.mark.usefixtures("fresh_programs")
def test_device_that_can_compute_in_neither_way(refused, run, monkeypatch):
    """Nothing stands in for a self-test: both formulations compute wrongly, and no number is written."""
    for kind in (operations.Float32Operations, operations.Float64Operations):
        monkeypatch.setattr(kind, "round_to", lambda self, value, fmt: value)
    message = refused(4, run, *FEW)
    assert "self-test failed on cpu" in message and "of torch-cpu-loop in float64" in message
    assert "--backend" in message and "No numbers were written." in message


@pytest.mark.parametrize("moment", ["audit_groups", "write"])
def test_interrupted(command, run, folder, monkeypatch, moment):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = tree(folder)
    monkeypatch.setattr(auditing if moment == "audit_groups" else results, moment, interrupt)
    outcome = command(run, *FEW, "--output", "new/x.nc")
    assert outcome == (130, "", "interrupted; no result was written\n")
    assert tree(folder) == before


def test_out_of_memory(refused, run, monkeypatch):
    def audit(*_: object, **__: object) -> None:
        raise MemoryError("8 EiB")

    monkeypatch.setattr(auditing, "audit_groups", audit)
    assert "out of memory (8 EiB)" in refused(3, run)


def test_file_that_shrinks_meanwhile(refused, run, monkeypatch):
    audit = auditing.audit_groups

    def shrink(*arguments: Any, **options: Any) -> Any:
        os.truncate(run, 4000)
        return audit(*arguments, **options)

    monkeypatch.setattr(auditing, "audit_groups", shrink)
    assert "became shorter while it was read" in refused(3, run, *FEW, keeps=False)


def hollow_run(path: Path, steps: int, tokens: int, width: int) -> Path:
    """Write a large recording of zeros that takes no room: a file of holes."""
    header: dict[str, Any] = {}
    end = 0
    for name, dtype, size in (("W", "BF16", 2), ("momentum_W", "F32", 4), ("variance_W", "F32", 4)):
        begin, end = end, end + (steps + 1) * tokens * width * size
        shape = [steps + 1, tokens, width]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    given = {"lr": 0.1, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0}
    header["__metadata__"] = {"hyperparameters": json.dumps(given)}
    content = serialize(header)
    path.write_bytes(content)
    os.truncate(path, len(content) + end)
    return path


def test_control_c_on_a_terminal(folder):
    """A progress bar where stderr is a terminal; SIGINT ends the audit within seconds."""
    path = hollow_run(folder / "hollow.safetensors", 1000, 1000, 1000)
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("the file system has no holes")
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))
    started = process(path, *FEW, "--csv", "x.csv", "--plots", "p", stderr=end)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed, when the process is done
        while b"replaying" not in shown and select.select([terminal], [], [], 90)[0]:
            shown += os.read(terminal, 4096)
    started.send_signal(signal.SIGINT)
    interrupted = time.monotonic()
    with contextlib.suppress(OSError):
        while select.select([terminal], [], [], 90)[0]:
            shown += os.read(terminal, 4096)
    outcome = finish(started)
    os.close(terminal)
    assert b"replaying" in shown
    assert outcome.status == 130 and outcome.out == ""
    assert time.monotonic() - interrupted < 30
    assert b"Traceback" not in shown and shown.rstrip().endswith(
        b"interrupted; no result was written"
    )
    assert os.listdir(folder) == ["hollow.safetensors"]


# --- what is not finite ---


def test_nonfinite_values_are_counted(command, folder):
    tensors, metadata = short_run()
    random = np.random.default_rng(0)
    special = {
        "BF16": np.asarray([0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81], "<u2"),
        "F32": np.asarray([0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x7F800001], "<u4"),
    }
    for key in ("W", "grad_W", "momentum_W", "variance_W"):
        dtype, array = tensors[key]
        places = random.integers(0, array.size, 40)
        array.reshape(-1)[places] = random.choice(special[dtype], 40)
        tensors[key] = dtype, array
    write(folder / "run.safetensors", tensors, metadata)
    groups = jaxaudit.sample_paths()[1]
    outcome = command("run.safetensors", *FEW, "--token-groups", groups)
    assert (outcome.status, outcome.err) == (0, "")
    members = jaxaudit.open_token_groups(groups).members
    with xr.open_dataset("results/run.nc") as dataset:
        for key in ("W", "grad_W", "momentum_W", "variance_W"):
            dtype, array = tensors[key]
            kind = ml_dtypes.bfloat16 if dtype == "BF16" else np.float32
            bad = ~np.isfinite(array.view(kind).astype(np.float32))[1:]
            for group, tokens in members.items():
                expected = bad[:, tokens].sum(axis=(1, 2))
                found = dataset.nonfinite_count.sel(tensor=key, token_group=group)
                np.testing.assert_array_equal(found, expected)
            assert f"{key} {bad.sum()}" in outcome.out.split("Infinite or NaN elements")[1]
    found = json.loads(command("run.safetensors", *FEW, "--json", "--overwrite").out)
    assert all(count > 0 for count in found["nonfinite_count"].values())


# --- tables, figures ---


def test_tables_hold_what_the_dataset_holds(command, run, folder):
    groups = jaxaudit.sample_paths()[1]
    arguments = ("--token-groups", groups, "--csv", "tables/x.csv", *ONLY, "--arithmetic")
    assert command(run, *arguments, "float32,float32-then-bfloat16").status == 0
    names = {
        f"x-{g}-{a}.csv"
        for g in ("all", "dead", "live")
        for a in ("float32", "float32-then-bfloat16")
    }
    assert set(os.listdir("tables")) == names
    with xr.open_dataset("results/run.nc") as dataset:
        for group in dataset.token_group.values:
            for arithmetic in dataset.arithmetic.values:
                text = Path(f"tables/x-{group}-{arithmetic}.csv").read_text()
                header, *rows = csv.reader(text.splitlines())
                assert ",".join(header) == CSV_HEADER and text.endswith("\n") and "\r" not in text
                one = dataset.sel(token_group=group, arithmetic=arithmetic)
                assert [int(row[0]) for row in rows] == one.timestep.values.tolist()
                for k, name in enumerate(header[1:], 1):
                    values = np.asarray([float(row[k]) for row in rows])
                    np.testing.assert_array_equal(values, one[name].values)


@pytest.mark.parametrize(
    ("path", "expected"), [("x", "x-all-float32.csv"), ("x.y.tsv", "x.y-all-float32.tsv")]
)
def test_names_of_tables(command, run, folder, path, expected):
    assert (
        command(run, "--csv", path, "--arithmetic", "float32", *ONLY, "--output", "o.nc").status
        == 0
    )
    assert sorted(os.listdir(folder)) == sorted(["o.nc", "run.safetensors", expected])


def test_tables_asked_for_again_under_other_arithmetics(command, run):
    assert (
        command(run, "--csv", "x.csv", "--arithmetic", "float32", *ONLY, "--output", "a.nc").status
        == 0
    )
    assert (
        command(
            run,
            *("--csv", "x.csv", "--arithmetic", "float32-then-bfloat16", *ONLY, "--output", "b.nc"),
        ).status
        == 0
    )


def test_figures(command, run):
    assert command(run, *FEW, "--plots", "figures/new").status == 0
    assert set(os.listdir("figures/new")) == set(plots.FIGURES)
    for name in plots.FIGURES:
        assert Path("figures/new", name).read_bytes().startswith(b"\x89PNG")
    mask = os.umask(0)
    os.umask(mask)
    for path in ("results/run.nc", f"figures/new/{name}"):
        assert Path(path).stat().st_mode & 0o777 == 0o666 & ~mask


LEDGER = ("updates", "moments", "lattice", "tokens", "counterfactual")


def test_where_the_updates_went(command, run):
    """The groups, the verdict in three places, the figures and the page come by default."""
    groups = str(jaxaudit.sample_paths()[1])
    files = ("--plots", "figures", "--report", "page.html")
    beta2 = ("--counterfactual-beta2", "0.9,0.99")
    arguments = (run, "--arithmetic", "torch-cpu-loop", *beta2, "--token-groups", groups)
    outcome = command(*arguments, *files, "--per-token")
    assert (outcome.status, outcome.err) == (0, "")
    with xr.open_datatree("results/run.nc") as found:
        assert {*LEDGER, "free_run"} == {*found.children}
        told = json.loads(found.attrs["verdict"])
        assert found.attrs["ledger_arithmetic"] == "torch-cpu-loop"
        assert found.attrs["ledger_arithmetic_replays_exactly"] == 1
        assert {"beta2-0.9", "beta2-0.99"} <= {*found["counterfactual"].remedy.values}
        assert found["lattice"].displacement.sizes["token"] == 10
        counted = found["updates"].wanted_count.sum("timestep")
        assert (counted > 0).all() and (
            found["updates"].lost_count <= found["updates"].wanted_count
        ).all()
        for each in told:
            assert f"\n{each['sentence']}\n" in outcome.out
            for name in each["variables"]:
                group, variable = name.split(".")
                assert variable in found[group]
    assert 3 <= len(told) <= 6
    assert {*os.listdir("figures")} == {*plots.FIGURES, *figures.FIGURES}
    page = Path("page.html").read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    assert told[0]["sentence"] in html.unescape(page)
    outcome = command(*arguments, "--json", "--overwrite")
    assert json.loads(outcome.out)["verdict"] == told


def test_weights_alone_have_a_ledger_of_their_own(command, folder):
    tensors, metadata = short_run()
    kept = {name: tensors[name] for name in ("W", "num_steps")}
    metadata.pop("hyperparameters")
    write(folder / "bare.safetensors", kept, metadata)
    outcome = command("bare.safetensors", "--plots", "figures", "--report", "page.html")
    assert (outcome.status, outcome.err) == (0, "")
    with xr.open_datatree("results/bare.nc") as found:
        assert {*found.children} & {*LEDGER} == {"lattice", "tokens"}
        assert found.attrs["ledger_arithmetic"] == ""
    drawn = os.listdir("figures")
    assert "cooling.png" in drawn and "agreement.png" not in drawn
    assert "no arithmetic was tried" in Path("page.html").read_text()


def test_only_accounting(command, run):
    outcome = command(run, "--arithmetic", "torch-cpu-loop", "--only", "accounting", "--json")
    assert outcome.status == 0 and json.loads(outcome.out)["verdict"] == []
    with xr.open_datatree("results/run.nc") as found:
        assert {*found.children} == {"free_run"} and "verdict" not in found.attrs


@pytest.mark.parametrize("values", ["1", "-0.1", "nan", "0.9,x", "0.9,1.5"])
def test_beta2_that_is_none(refused, run, no_work, values):
    message = refused(2, run, f"--counterfactual-beta2={values}")
    assert "--counterfactual-beta2: got" in message and "for example 0.95" in message


def test_report_that_exists_already(refused, run, folder, no_work):
    (folder / "page.html").write_text("old")
    assert "page.html exists already" in refused(2, run, "--report", "page.html")
    assert (folder / "page.html").read_text() == "old"


def test_long_names(command, run):
    """The temporary name does not have to be longer than the name that is wanted."""
    name = "x" * 250 + ".nc"
    assert command(run, *FEW, "--output", name).status == 0
    assert Path(name).exists()


def test_long_schedules_and_metadata(command, folder):
    """Labels of any size fit into the dataset."""
    steps = 4_000  # more than 64 KiB of numbers, which is what an attribute of HDF5's header holds
    rates = [0.0, *(1e-3 / (k + 3) for k in range(steps))]
    patterns = np.zeros((steps + 1, 1, 1), "<u4")
    tensors = {key: ("F32", patterns) for key in ("W", "grad_W", "momentum_W", "variance_W")}
    given = {"lr": rates, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0}
    metadata = {"hyperparameters": json.dumps(given), "text": "é" * 100_000}
    write(folder / "x.safetensors", tensors, metadata)
    outcome = command("x.safetensors", "--arithmetic", "torch-cpu-loop", *ONLY)
    assert outcome.status == 0 and outcome.err == ""
    with xr.open_dataset("results/x.nc") as dataset:
        np.testing.assert_array_equal(dataset.learning_rate, rates[1:])
        assert json.loads(dataset.hyperparameters)["learning_rate"]["value"] == rates[1:]


# --- expectations ---


def test_expectation_met_on_the_sample(command):
    outcome = command(*FEW, "--expect", "torch-cpu-loop")
    assert (outcome.status, outcome.err) == (0, "")
    assert "Replays bit for bit under torch-cpu-loop" in outcome.out


def test_expectation_not_met(command, run):
    outcome = command(run, *FEW, "--expect", "float32-then-bfloat16")
    assert (outcome.status, outcome.err) == (1, "")
    assert "Expected float32-then-bfloat16, but" in outcome.out and Path("results/run.nc").exists()


def test_expectation_is_replayed_whatever_else_is_asked_for(command, run):
    outcome = command(run, "--expect", "torch-cpu-loop", "--arithmetic", "float32", *ONLY, "--json")
    assert outcome.status == 0 and json.loads(outcome.out)["expectation_met"] is True
    assert set(json.loads(outcome.out)["arithmetics"]) == {"float32", "torch-cpu-loop"}


def test_expectation_without_moments(command, folder):
    tensors, metadata = short_run()
    write(folder / "x.safetensors", {"W": tensors["W"]}, metadata)
    outcome = command("x.safetensors", *FEW, "--expect", "torch-cpu-loop")
    assert outcome.status == 1 and outcome.err == ""


def assert_flip_is_found(
    command: Callable[..., Outcome],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    key: str,
    place: tuple[int, int, int],
    bit: int,
    *options: str,
) -> None:
    """Flip one bit of one element: it is the first mismatch of its stage, and nothing is before."""
    dtype, original = tensors[key]
    flipped = original.copy()
    flipped[place] ^= flipped.dtype.type(1 << bit)
    write(Path("flipped.safetensors"), dict(tensors) | {key: (dtype, flipped)}, metadata)
    arguments = ("--arithmetic", "torch-cpu-loop", "--expect", "torch-cpu-loop", "--json")
    outcome = command("flipped.safetensors", *arguments, *options, "--overwrite")
    assert outcome.status == 1 and outcome.err == ""
    stage = {"W": "param", "momentum_W": "exp_avg", "variance_W": "exp_avg_sq"}[key]
    replayed = int(original[place]) >> (0 if dtype == "BF16" else 16)
    expected = [*place, int(flipped[place]), replayed]
    found = json.loads(outcome.out)["arithmetics"]["torch-cpu-loop"]
    assert list(found["first_mismatch"][stage].values()) == expected
    with xr.open_dataset("results/flipped.nc") as dataset:
        one = dataset.sel(arithmetic="torch-cpu-loop")
        assert one.mismatch_field.values.tolist() == MISMATCH_FIELDS
        assert one.first_mismatch.sel(stage=stage).values.tolist() == expected
        t = place[0]
        assert (one.mismatch_count.sel(timestep=slice(None, t - 1)) == 0).all()
        assert (one.mismatch_count.sel(timestep=slice(t + 2, None)) == 0).all()
        at = one.mismatch_count.sel(timestep=t, token_group="all")
        for other in ("exp_avg", "exp_avg_sq"):
            assert int(at.sel(stage=other)) == (other == stage)
        assert int(at.sel(stage="param")) <= 1
        others = one.mismatch_count.sel(token_group="all").sum(("stage", "timestep"))
        assert 1 <= int(others) <= 4


@pytest.mark.parametrize(("key", "bit"), [("W", 0), ("momentum_W", 16), ("variance_W", 0)])
def test_one_flipped_bit_of_the_sample(command, key, bit):
    tensors, metadata = parse(jaxaudit.sample_paths()[0].read_bytes())
    assert_flip_is_found(command, tensors, metadata, key, (777, 6, 41), bit, *ONLY)


@pytest.mark.parametrize("key", ["W", "momentum_W", "variance_W"])
@pytest.mark.parametrize(
    "place", [(1, 0, 0), (1, 9, 63), (12, 0, 0), (12, 9, 63), (7, 3, 31)], ids=str
)
def test_one_flipped_bit_anywhere(command, key, place):
    tensors, metadata = short_run()
    random = np.random.default_rng(place)
    bits = random.choice(8 * tensors[key][1].itemsize, 3, replace=False).tolist()
    for number, bit in enumerate(bits):
        # Once for each tensor together with the ledger, of which this reads nothing.
        options = () if place == (7, 3, 31) and number == 0 else ONLY
        assert_flip_is_found(command, tensors, metadata, key, place, bit, *options)


def test_errors_never_show_a_traceback(folder):
    """Once as a real process: nothing but the one line, whatever Python prints at its end."""
    (folder / "x.safetensors").write_bytes(b"\0" * 100)
    outcome = finish(process("x.safetensors"))
    assert_refusal(outcome, 3)
    assert re.fullmatch(r"run_audit.py: error: x.safetensors: not a .*\n", outcome.err)
    assert os.listdir(folder) == ["x.safetensors"]
