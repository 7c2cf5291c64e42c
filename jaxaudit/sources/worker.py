"""A process that looks into files with a library of someone else's, with limits of time and memory.

Such libraries are written in C: a damaged file can make them crash, loop or ask for all memory. In a process of its
own that ends in an error, and the audit's process loads neither h5py (whose HDF5 may not be netCDF4's) nor torch.
"""

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxaudit.byte_files import Closing, FileError, short

#: Seconds that one answer may take.
SECONDS = 120.0

_LARGEST_ANSWER = 1 << 28
_SHARED: dict[str, "Worker"] = {}
_SHARING = threading.Lock()


class Worker(Closing):
    """A process that runs one of this folder's `*_process.py`; a context manager.

    Args:
        program: which.
    """

    def __init__(self, program: str):
        script = Path(__file__).parent / program
        environment = os.environ | {"HDF5_PLUGIN_PRELOAD": "::"}  # no filters from libraries
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
        )
        self._lock = threading.Lock()
        self._rest = bytearray()

    @classmethod
    def shared(cls, program: str) -> "Worker":
        """Return the process that runs a program for everyone, started if it does not live; not to be closed.

        Torch takes seconds to start. The process ends by itself when nothing was asked for a while.
        """
        with _SHARING:
            found = _SHARED.get(program)
            if found is None or found._process.poll() is not None:
                if found is not None:
                    found.close()
                found = _SHARED[program] = cls(program)
                atexit.register(found.close)
            return found

    def close(self) -> None:
        """End the process."""
        process = self._process
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def ask(self, path: Path, **request: Any) -> Any:
        """Ask about a file.

        Raises:
            FileError: the file is refused, or the process failed on it.
        """
        with self._lock:
            return self._ask(path, request)

    def fill(self, path: Path, buffer: NDArray[np.uint8], **request: Any) -> None:
        """Ask for bytes, of which there must be as many as the buffer holds."""
        with self._lock:
            count = self._ask(path, request)
            if count != len(buffer):
                raise FileError(f"{path}: {short(count)} bytes came, expected {len(buffer)}.")
            self._receive(path, buffer.data, time.monotonic() + SECONDS)

    def _ask(self, path: Path, request: dict[str, Any]) -> Any:
        until = time.monotonic() + SECONDS
        line = json.dumps({"path": os.fspath(path), **request}).encode() + b"\n"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
        except (OSError, ValueError):
            self._give_up(path, "has ended before")
        answer = self._line(path, until)
        if "error" in answer:
            raise FileError(f"{path}: {short_sentence(answer['error'])}")
        return answer["answer"]

    def _line(self, path: Path, until: float) -> Any:
        chunk = bytes(self._rest)
        while b"\n" not in chunk:
            chunk = self._some(path, until)
            self._rest += chunk
            if len(self._rest) > _LARGEST_ANSWER:
                self._give_up(path, "has too much to say of it")
        line, _, rest = bytes(self._rest).partition(b"\n")
        self._rest = bytearray(rest)
        return json.loads(line)

    def _receive(self, path: Path, view: memoryview, until: float) -> None:
        taken = min(len(self._rest), len(view))
        view[:taken] = self._rest[:taken]
        del self._rest[:taken]
        while taken < len(view):
            self._wait(path, until)
            assert self._process.stdout is not None
            count = os.readv(self._process.stdout.fileno(), [view[taken:]])
            if not count:
                self._give_up(path)
            taken += count

    def _some(self, path: Path, until: float) -> bytes:
        self._wait(path, until)
        assert self._process.stdout is not None
        chunk = os.read(self._process.stdout.fileno(), 1 << 20)
        if not chunk:
            self._give_up(path)
        return chunk

    def _wait(self, path: Path, until: float) -> None:
        left = max(0.0, until - time.monotonic())
        poll = select.poll()  # select() takes no descriptor above 1023
        assert self._process.stdout is not None
        poll.register(self._process.stdout, select.POLLIN | select.POLLHUP)
        if not poll.poll(left * 1000):
            self._give_up(path, f"took longer than {SECONDS:g} seconds")

    def _give_up(self, path: Path, why: str | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1 if why is None else 0)
        code = self._process.poll()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        reason = why or (f"died of signal {-code}" if code and code < 0 else "ended unexpectedly")
        raise FileError(
            f"{path}: the process that reads it {reason}; the file is damaged or of a kind that cannot be read. "
            "Write it again."
        )


def short_sentence(text: object) -> str:
    """Show what a process says in at most 400 printable characters."""
    found = "".join(c if c.isprintable() else "?" for c in str(text))
    return found if len(found) <= 400 else found[:397] + "..."
