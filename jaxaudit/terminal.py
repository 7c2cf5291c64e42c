"""What commands do with a terminal: one-line errors, closed or full streams, a progress bar."""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that explains wrong usage in one line, where argparse would print the whole usage first."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see --help\n")


def described_parser(program: str, described: str, name: str = "") -> Parser:
    """Return a parser whose help begins with the first paragraph of a text and ends with the others.

    Args:
        program: as it was called: a file of scripts/, or a command.
        described: the text.
        name: the command as the text's examples call it; they are shown as the program was called.
    """
    called = f"python scripts/{program}" if program.endswith(".py") else program
    if name:
        described = described.replace(f"    {name}", f"    {called}")
    first, *others = described.split("\n\n")
    return Parser(
        prog=program,
        description=first,
        epilog="\n\n".join(others),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_usual_options(p: Parser) -> None:
    """Add what every command offers."""
    p.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    p.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    p.add_argument("--quiet", action="store_true", help="no progress")
    p.add_argument("--version", action="store_true", help="print the version and exit")


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import what takes a second; an interruption ends the process at once, as extensions would make an ImportError of it."""

    def stop(*_: object) -> None:
        os.write(2, b"interrupted; no result was written\n")
        os._exit(130)

    usual = signal.getsignal(signal.SIGINT)
    if (
        usual is not signal.default_int_handler
        or threading.current_thread() is not threading.main_thread()
    ):
        yield  # somebody else's to decide
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def run(command: Callable[[], int]) -> int:
    """Run a command with whole streams; return its exit status, 130 where it was interrupted."""
    replace_closed_streams()
    try:
        return command()
    except SystemExit as done:  # argparse: --help, or wrong usage, already explained
        return done.code if isinstance(done.code, int) else 2
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted; no result was written", file=sys.stderr)
        return 130


def answer(
    parser: Callable[[str], argparse.ArgumentParser],
    work: Callable[[argparse.Namespace, str], int],
    argv: Sequence[str] | None,
    program: str,
) -> int:
    """Understand a command line and do the work, or say the version; return the exit status.

    Args:
        parser: describes the command line of a program of some name; it has the option --version.
        work: is given what was understood, and the program's name.
        argv: the arguments; by default those of the process.
        program: as it was called.
    """

    def command() -> int:
        arguments = parser(program).parse_args(argv)
        return put_version(program) if arguments.version else work(arguments, program)

    return run(command)


def put_version(program: str) -> int:
    """Write the package's version to stdout; return the exit status."""
    from importlib.metadata import version

    return put(f"jaxaudit {version('jaxaudit')}", program)


def complete(
    work: Callable[[Callable[..., None] | None], tuple[int, str, Sequence[str]]],
    failure: type[Exception],
    progress: tuple[str, str],
    program: str,
    *,
    quiet: bool,
) -> int:
    """Do work under a progress bar, and say what came of it; return the exit status.

    Args:
        work: is given what shows progress; returns the exit status, what goes to stdout, and notices.
        failure: what it raises for people to mend: one line, with the exit status as its `status`.
        progress: what is being done, and what is counted (see `progress_bar`).
        program: as it was called.
        quiet: show no progress.
    """
    show, close = progress_bar(*progress, quiet=quiet)
    try:
        status, text, notices = work(show)
    except failure as error:
        close()
        print(f"{program}: error: {error}", file=sys.stderr)
        return getattr(error, "status", 2)
    finally:
        close()
    for notice in notices:
        print(f"{program}: {notice}", file=sys.stderr)
    return put(text, program) or status


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
) -> tuple[Callable[..., None] | None, Callable[[], None]]:
    """Return a function that shows units done on a terminal, and one that ends the display.

    The function takes the units done, the units in all, and, where steps are counted as well, the last one done.

    Args:
        what: what is being done.
        unit: what is counted.
        quiet: show nothing, as where stderr is no terminal.
    """
    if quiet or not sys.stderr.isatty():
        return None, lambda: None
    from tqdm import tqdm

    bar: Any = None

    def show(done: int, total: int, timestep: int | None = None) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, unit=unit, unit_scale=True, desc=what, leave=False)
        if timestep is not None:
            bar.set_postfix_str(f"timestep {timestep:,}", refresh=False)
        bar.update(done - bar.n)

    return show, lambda: bar.close() if bar is not None else None
