"""What commands do with a terminal: one-line errors, closed or full streams, a progress bar."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that explains wrong usage in one line, where argparse would print the whole usage first."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see --help\n")


def put(text: str, program: str) -> int:
    """Write to stdout; return 2 where that fails. A reader that went away is no failure."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
        return 0
    except OSError as error:
        with contextlib.suppress(OSError):  # else Python would fail again when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"{program}: error: stdout cannot be written ({error.strerror})", file=sys.stderr)
        return 2


def replace_closed_streams() -> None:
    """Stand in for streams that the caller closed, or files would get their numbers."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")


def progress_bar(
    what: str, unit: str, *, quiet: bool
) -> tuple[Callable[[int, int], None] | None, Callable[[], None]]:
    """Return a function that shows units done on a terminal, and one that ends the display.

    Args:
        what: what is being done.
        unit: what is counted.
        quiet: show nothing, as where stderr is no terminal.
    """
    if quiet or not sys.stderr.isatty():
        return None, lambda: None
    from tqdm import tqdm

    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, unit=unit, unit_scale=True, desc=what, leave=False)
        bar.update(done - bar.n)

    return show, lambda: bar.close() if bar is not None else None
