"""What the commands do, apart from parsing and printing: check first, work, then write whole files."""

import contextlib
import csv
import dataclasses
import errno
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import xarray as xr

from jaxaudit import auditing, identification, plots, results, summary, workbench
from jaxaudit.arithmetics import CATALOGUE
from jaxaudit.devices import BackendError, find_device
from jaxaudit.recording import (
    Recording,
    TokenGroups,
    open_recording,
    open_token_groups,
    sample_paths,
    token_groups_of,
)
from jaxaudit.replay import SelfTestError
from jaxaudit.safetensors_file import FileError

NOT_AS_EXPECTED, WRONG_USAGE, BAD_INPUT, SELF_TEST_FAILED = 1, 2, 3, 4

#: Header of the tables, as the first analyses of such runs wrote it.
CSV_COLUMNS = (
    "t",
    "norm_predicted",
    "norm_observed",
    "norm_difference",
    "cosine_similarity",
    "ratio",
)


class Failure(Exception):
    """An error for people: one or two lines, and the exit status that goes with them."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """What the command line asks for; see scripts/run_audit.py."""

    recording: str | None = None
    token_groups: str | None = None
    backend: Any = "auto"
    arithmetic: str = "auto"
    steps: str | None = None
    output: str | None = None
    csv: str | None = None
    plots: str | None = None
    expect: str | None = None
    overwrite: bool = False
    json: bool = False
    quiet: bool = False


def run_audit(
    request: AuditRequest, progress: Callable[[int, int], None] | None = None
) -> tuple[int, str]:
    """Audit, write the files asked for, and return the exit status and what goes to stdout.

    Raises:
        Failure: anything that people can mend.
    """
    with _failures():
        wanted = _wanted_arithmetics(request)
        find_device(request.backend)  # before any file is opened
        with _open(request) as recording:
            groups = _groups(request, recording)
            steps = _steps(request, recording)
            output = Path(request.output or Path("results") / f"{recording.path.stem}.nc")
            for path in _outputs(request, output, groups):
                _check_writable(path, overwrite=request.overwrite)
            dataset = auditing.audit(
                recording,
                groups,
                arithmetics=wanted,
                backend=request.backend,
                steps=steps,
                progress=progress,
            )
        _write(request, dataset, output)
    return _status(request, dataset), _text(request, dataset, output)


def write_tables(
    dataset: xr.Dataset, path: Path, groups: Sequence[str], arithmetics: Sequence[str]
) -> list[Path]:
    """Write `CSV_COLUMNS` for each token group and arithmetic, and return the files' names."""
    written = []
    for group in groups:
        for arithmetic in arithmetics:
            one = dataset.sel(token_group=group, arithmetic=arithmetic)
            columns = [one.timestep.values, *(one[name].values for name in CSV_COLUMNS[1:])]
            with _whole_file(_table_path(path, group, arithmetic)) as file:
                text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
                writer = csv.writer(text, lineterminator="\n")
                writer.writerow(CSV_COLUMNS)
                writer.writerows(zip(*(c.tolist() for c in columns), strict=True))
                text.detach()
            written.append(_table_path(path, group, arithmetic))
    return written


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Turn the library's exceptions into failures with an exit status."""
    try:
        yield
    except FileError as error:
        raise Failure(str(error), BAD_INPUT) from error
    except SelfTestError as error:
        raise Failure(f"{error} No numbers were written.", SELF_TEST_FAILED) from error
    except BackendError as error:
        raise Failure(str(error), WRONG_USAGE) from error
    except OSError as error:
        raise Failure(_output_problem(error), WRONG_USAGE) from error
    except MemoryError as error:
        raise Failure(
            f"out of memory ({error}); the recording's rows are too large.", BAD_INPUT
        ) from error


def _output_problem(error: OSError) -> str:
    where = error.filename2 or error.filename or ""
    if error.errno == errno.ENOSPC:
        return (
            f"no space left on the device for {where or 'the output'}; nothing was written there. "
            "Free some space or choose another --output."
        )
    if error.strerror:
        return f"cannot write {where}: {error.strerror}. Choose another place."
    return str(error)


def _wanted_arithmetics(request: AuditRequest) -> list[str]:
    """Parse --arithmetic, with what --expect names added."""
    if request.expect is not None and request.expect not in CATALOGUE:
        known = ", ".join(CATALOGUE)
        raise Failure(
            f"--expect: unknown arithmetic {request.expect!r}; there are {known}.", WRONG_USAGE
        )
    names = [name.strip() for name in request.arithmetic.split(",")]
    try:
        identification.check_names(names)
    except ValueError as error:
        raise Failure(f"--arithmetic: {error}", WRONG_USAGE) from error
    return names + ([request.expect] if request.expect else [])


def _open(request: AuditRequest) -> Recording:
    return open_recording(request.recording or sample_paths()[0])


def _groups(request: AuditRequest, recording: Recording) -> TokenGroups:
    if request.token_groups:
        return open_token_groups(request.token_groups)
    return open_token_groups(sample_paths()[1]) if request.recording is None else token_groups_of(recording)  # fmt: skip


def _steps(request: AuditRequest, recording: Recording) -> tuple[int, int] | None:
    if request.steps is None:
        return None
    parts = re.fullmatch(r"(\d{0,18}):(\d{0,18})", request.steps.strip())
    if not parts:
        raise Failure(
            f"--steps: got {request.steps!r}, needed START:STOP, for example 1:101.", WRONG_USAGE
        )
    start, stop = int(parts[1] or 1), int(parts[2] or recording.steps + 1)
    try:
        return workbench.check_steps(recording, (start, stop))
    except ValueError as error:
        raise Failure(f"--steps: {error}", WRONG_USAGE) from error


def _outputs(request: AuditRequest, output: Path, groups: TokenGroups) -> Iterator[Path]:
    yield output
    if request.csv:
        for group in groups.names:
            yield from (_table_path(Path(request.csv), group, name) for name in CATALOGUE)
    if request.plots:
        yield from (Path(request.plots) / name for name in plots.FIGURES)


def _check_writable(path: Path, *, overwrite: bool) -> None:
    """Refuse before any work what would be refused after it."""
    if path.is_dir():
        raise Failure(f"{path} is a folder; name a file.", WRONG_USAGE)
    if path.exists() and not overwrite:
        raise Failure(
            f"{path} exists already. Choose another name, or pass --overwrite to replace it.",
            WRONG_USAGE,
        )
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise Failure(
            f"{folder} is not a folder that can be written to, so {path} cannot be made there. "
            "Choose another place.",
            WRONG_USAGE,
        )


def _write(request: AuditRequest, dataset: xr.Dataset, output: Path) -> None:
    arithmetics = [str(name) for name in dataset.arithmetic.values]
    if request.csv:
        names = [str(name) for name in dataset.token_group.values]
        write_tables(dataset, Path(request.csv), names, arithmetics)
    if request.plots:
        for name, draw in plots.FIGURES.items():
            with _whole_file(Path(request.plots) / name) as file:
                draw(dataset).savefig(file, format="png", dpi=110)
    results.save(dataset, output, overwrite=request.overwrite)


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that gets its name only when everything has been written to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        results.publish(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _table_path(path: Path, group: str, arithmetic: str) -> Path:
    group = re.sub(r"[^\w.-]", "_", group)
    return path.with_name(f"{path.stem}-{group}-{arithmetic}{path.suffix or '.csv'}")


def _status(request: AuditRequest, dataset: xr.Dataset) -> int:
    met = not request.expect or summary.replays_exactly(dataset, request.expect)
    return 0 if met else NOT_AS_EXPECTED


def _text(request: AuditRequest, dataset: xr.Dataset, output: Path) -> str:
    if request.json:
        found: Mapping[str, Any] = summary.summarize(dataset) | {"output": str(output)}
        if request.expect:
            found = dict(found) | {
                "expected": request.expect,
                "expectation_met": summary.replays_exactly(dataset, request.expect),
            }
        return json.dumps(found, allow_nan=False, default=_plain)
    lines = [summary.describe(dataset)]
    if request.expect and not summary.replays_exactly(dataset, request.expect):
        lines.append(
            f"Expected {request.expect}, but the recording does not replay bit for bit under it."
        )
    return "\n".join([*lines, f"Written to {output}"])


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
