"""Environments made anew, and programs run in them, for the scripts that check what users get."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from reporting import Failure

ROOT = Path(__file__).parents[1]


def uv(*words: object) -> list[object]:
    """Return a command of uv, which lies beside this interpreter or on the path.

    Raises:
        Failure: it is not there.
    """
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise Failure('uv is missing; pip install uv, or pip install -e ".[dev]"', 2)
    return [found, *words]


def called(command: Sequence[object], folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a program that sees nothing of this environment's packages."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    kept |= {"JAX_ENABLE_COMPILATION_CACHE": "false", "UV_PYTHON_DOWNLOADS": "never"}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=folder, env=kept, text=True, capture_output=True)


def needed(command: Sequence[object], folder: Path = ROOT) -> str:
    """Run a program that must succeed; return what it printed.

    Raises:
        Failure: it did not.
    """
    done = called(command, folder)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        said = " ".join(lines[-3:])
        raise Failure(f"{' '.join(map(str, command))[:200]}: status {done.returncode}: {said}", 1)
    return done.stdout
