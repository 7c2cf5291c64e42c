"""What the measuring scripts share: files in and out, refusals in one line, and facts about the machine."""

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxaudit.provenance import cpu_name, version_of
from jaxaudit.recording import Recording
from jaxaudit.safetensors_file import FileError

#: Packages whose versions the times depend on.
PACKAGES = ("jaxaudit", "jax", "jaxlib", "numpy", "ml_dtypes", "torch", "safetensors")


class Failure(Exception):
    """An error for people, and the exit status that goes with it."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def add_files(p: argparse.ArgumentParser, output: Path | None) -> None:
    """Add the options for what is read and written; without `output` the script says what is the default."""
    p.add_argument("recording", nargs="?", type=Path, help="the recording (default: the sample)")
    p.add_argument("--token-groups", type=Path, metavar="FILE", help="sets of tokens to count by")
    told = "(%(default)s)" if output else "JSON file to write"
    p.add_argument("--output", type=Path, default=output, metavar="PATH", help=told)
    p.add_argument("--overwrite", action="store_true", help="replace an existing output")


def positive(text: str) -> int:
    """Parse a whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def guarded(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command and turn what people can mend into one line and an exit status."""
    try:
        return command(arguments)
    except KeyboardInterrupt:
        return complain("interrupted; nothing was written", 130)
    except FileError as error:
        return complain(str(error), 3)
    except Failure as error:
        return complain(str(error), error.status)
    except OSError as error:
        return complain(
            f"cannot write {error.filename}: {error.strerror}. Choose another place.", 2
        )


def complain(message: str, status: int) -> int:
    """Print an error and return the exit status."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    return status


def notify(text: str) -> None:
    """Tell of progress."""
    print(text, file=sys.stderr, flush=True)


def check_output(arguments: argparse.Namespace, *others: Path) -> None:
    """Refuse before any work what would be refused after it."""
    for output in (arguments.output, *others):
        if output.is_dir():
            raise Failure(f"{output} is a folder; name a file.", 2)
        if output.exists() and not arguments.overwrite:
            raise Failure(f"{output} exists already. Choose another name, or pass --overwrite.", 2)
        output.parent.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            json.dump(found, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def facts_of(recording: Recording) -> dict[str, Any]:
    """Describe a recording."""
    return {
        "name": recording.path.name,
        "bytes": recording.path.stat().st_size,
        "steps": recording.steps,
        "rows": recording.tokens,
        "row_elements": recording.width,
        "elements": recording.steps * recording.step_elements,
        "formats": {name: fmt.name for name, fmt in recording.formats.items()},
    }


def machine_facts() -> dict[str, Any]:
    """Describe what computes here."""
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Return the bytes of memory that a new process can get."""
    table = Path("/proc/meminfo")
    if table.exists():
        lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_resident_bytes() -> int:
    """Return the largest resident set of this process so far, mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():
        # `ru_maxrss` would start from the parent's, which a new process inherits until it executes.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
