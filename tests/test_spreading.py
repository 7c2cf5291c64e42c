"""Tasks done by workers of dask.distributed, which come and go."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from recordings import Tensor, f64, write

from jaxaudit import spreading
from jaxaudit.parts import Parts
from jaxaudit.safetensors_file import FileError
from jaxaudit.spreading import SpreadingError, do_with_dask, share_of

pytest.importorskip("distributed")

NAMES = [f"task-{k}" for k in range(6)]
MANIFEST = {"source": "x", "started_at": "now"}


def test_shares_are_disjoint_and_whole():
    for count in range(1, 9):
        shares = [share_of(f"{k}/{count}", NAMES) for k in range(1, count + 1)]
        assert sorted(name for share in shares for name in share) == NAMES
    for wrong in ("", "0/1", "2/1", "1/0", "1/2/3", "1", "x/2", "1/9999999999"):
        with pytest.raises(ValueError, match="from 1 to N"):
            share_of(wrong, NAMES)


def do(folder: str, name: str) -> None:
    Parts(Path(folder), MANIFEST).write(name, {"n": np.array([int(name[-1])])}, name)


def do_or_die(folder: str, name: str) -> None:
    """Kill the worker at the first try of one task."""
    tried = Path(folder) / "tried"
    if name == NAMES[3] and not tried.exists():
        tried.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    do(folder, name)


def refuse(folder: str, name: str) -> None:
    raise FileError(f"{name}: no such thing")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_workers_that_die_are_replaced(tmp_path):
    parts, told = Parts(tmp_path / "p", MANIFEST), []
    do(str(parts.path), NAMES[0])
    how: dict[str, Any] = {"workers": 2, "progress": lambda done, of: told.append((done, of))}
    do_with_dask(do_or_die, str(parts.path), NAMES, parts, **how)
    assert (parts.path / "tried").exists() and all(map(parts.has, NAMES))
    assert told[0] == (1, 6) and told[-1] == (6, 6) and told == sorted(told)
    # What is done is not done again, and needs no workers.
    do_with_dask(refuse, str(parts.path), NAMES, parts, workers=2)
    with pytest.raises(FileError, match="task-9: no such thing"):
        do_with_dask(refuse, str(parts.path), ["task-9"], parts, workers=1)


def test_no_scheduler_no_dask(tmp_path, monkeypatch):
    parts = Parts(tmp_path / "p", MANIFEST)
    monkeypatch.setattr(spreading, "_LOST", 1.0)
    with pytest.raises(SpreadingError, match="missing port number"):
        do_with_dask(do, str(parts.path), NAMES, parts, scheduler="tcp://host")
    with pytest.raises(SpreadingError, match="tcp://127.0.0.1:9 cannot be reached"):
        do_with_dask(do, str(parts.path), NAMES, parts, scheduler="tcp://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SpreadingError, match=r"pip install .*jaxaudit\[distributed\]"):
        do_with_dask(do, str(parts.path), NAMES, parts, workers=1)


def kill_scheduler(folder: str, name: str) -> None:
    """Kill the process whose number is in a file."""
    if name == NAMES[1]:
        os.kill(int((Path(folder) / "scheduler").read_text()), signal.SIGKILL)
        time.sleep(60)
    do(folder, name)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_a_scheduler_that_dies_ends_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(spreading, "_LOST", 5.0)
    parts = Parts(tmp_path / "p", MANIFEST)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    python = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--port",
        "0",
        "--no-dashboard",
    ]
    scheduler = subprocess.Popen(
        [*python, "--scheduler-file", tmp_path / "s.json"],
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    worker = None
    try:
        (parts.path / "scheduler").write_text(str(scheduler.pid))
        end = time.monotonic() + 60
        while not (tmp_path / "s.json").exists() and time.monotonic() < end:
            time.sleep(0.1)
        address = re.search(r'"address": "(tcp:[^"]+)"', (tmp_path / "s.json").read_text())
        assert address
        start = [sys.executable, "-m", "distributed.cli.dask_worker", address[1], "--nthreads", "1"]
        worker = subprocess.Popen(
            [*start, "--no-nanny", "--no-dashboard", "--death-timeout", "10"],
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        began = time.monotonic()
        with pytest.raises(SpreadingError, match="connection to the scheduler was lost"):
            do_with_dask(kill_scheduler, str(parts.path), NAMES[:2], parts, scheduler=address[1])
        assert time.monotonic() - began < 60
        assert not parts.has(NAMES[1])
    finally:
        for process in filter(None, (worker, scheduler)):
            process.kill()
            process.wait()


@pytest.mark.long
def test_workers_give_the_bits_of_one_process(tmp_path):
    """Of a recording of three strips, and random bits."""
    rng, shape = np.random.default_rng(0), (3, 9000, 64)

    def drawn(scale: float, dtype: str) -> Tensor:
        values = (rng.standard_normal(shape) * scale).astype(np.float32).view(np.uint32)
        return (dtype, (values >> 16).astype(np.uint16)) if dtype == "BF16" else (dtype, values)

    rest = {"learning_rate": 1e-3, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-8}  # fmt: skip
    tensors = {
        "W": drawn(1, "BF16"),
        "grad_W": drawn(1e-3, "BF16"),
        "momentum_W": drawn(1e-3, "F32"),
    }
    tensors["variance_W"] = "F32", drawn(1e-6, "F32")[1] & np.uint32(0x7FFFFFFF)
    tensors |= {name: f64(value) for name, value in rest.items()}
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    script = Path(__file__).parents[1] / "scripts" / "run_audit.py"
    usual = ["run.safetensors", "--arithmetic", "torch-cpu-loop", "--only", "accounting"]
    for name, options in (("one", []), ("two", ["--workers", "2"])):
        folder = tmp_path / name
        folder.mkdir()
        write(folder / "run.safetensors", tensors)
        os.utime(folder / "run.safetensors", ns=(0, 0))
        subprocess.run(
            [sys.executable, script, *usual, *options],
            cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        assert os.listdir(folder / "results") == ["run.nc"]
    one, two = (tmp_path / name / "results" / "run.nc" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    with xr.open_dataset(two) as dataset:
        assert dataset.mismatch_count.sum() > 0
