"""What the commands do, apart from parsing and printing: check first, work, then write whole files."""

import collections
import contextlib
import csv
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import xarray as xr

from jaxaudit import auditing, identification, results, summary, workbench
from jaxaudit.arithmetics import CATALOGUE
from jaxaudit.devices import BackendError, find_devices
from jaxaudit.ledger.subject import LedgerOptions
from jaxaudit.parts import OtherAudit, Parts
from jaxaudit.process import keep_freed_memory, keep_programs
from jaxaudit.provenance import now, version_of
from jaxaudit.recording import (
    Recording,
    TokenGroups,
    open_recording,
    open_token_groups,
    sample_paths,
    token_groups_of,
)
from jaxaudit.replay import SelfTestError
from jaxaudit.safetensors_file import FileError, printable
from jaxaudit.sources.model_folder import file_name
from jaxaudit.spreading import SpreadingError, do_with_dask, share_of

# What draws is imported where something is to be drawn: it takes a third of a second.
if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOT_AS_EXPECTED, WRONG_USAGE, BAD_INPUT, SELF_TEST_FAILED = 1, 2, 3, 4

#: What of a request must not be empty.
_NAMES = (
    "recording",
    "parameter",
    "parameters",
    "token_groups",
    "output",
    "csv",
    "plots",
    "report",
    "scheduler",
    "shard",
)

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
    """An error for people: one line, and the exit status that goes with it."""

    def __init__(self, message: str, status: int):
        super().__init__(printable(message))
        self.status = status


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """What the command line asks for; see jaxaudit/command_line/audit.py."""

    recording: str | None = None
    parameter: str | None = None
    parameters: str | None = None
    token_groups: str | None = None
    backend: Any = "auto"
    devices: int | None = None
    arithmetic: str = "auto"
    steps: str | None = None
    output: str | None = None
    csv: str | None = None
    plots: str | None = None
    expect: str | None = None
    report: str | None = None
    only: str | None = None
    counterfactual_beta2: str = "0.95"
    seed: int = 0
    per_token: bool = False
    workers: int | None = None
    scheduler: str | None = None
    shard: str | None = None
    overwrite: bool = False
    json: bool = False
    quiet: bool = False


#: Takes a sentence for people who watch.
Notice = Callable[[str], None]


def run_audit(
    request: AuditRequest,
    progress: auditing.Progress | None = None,
    notice: Notice | None = None,
) -> tuple[int, str]:
    """Audit, write the files asked for, and return the exit status and what goes to stdout.

    Args:
        request: what was asked for.
        progress: called after each window.
        notice: told what is not in the result: that an audit goes on where it was interrupted, say.

    Raises:
        Failure: anything that people can mend.
    """
    with failures(), contextlib.ExitStack() as opened:
        job = opened.enter_context(_Job(request, progress))
        inputs = [job.recording.path, *filter(None, [request.token_groups])]
        outputs = list(_outputs(request, job.output, job.groups, job.wanted))
        check_outputs(outputs, inputs, overwrite=request.overwrite)
        several = len(job.names) > 1 + (job.options["ledger"] is not None)
        parts = None
        if several or spreads(request):
            parts = opened.enter_context(kept_parts(request, job.output, job.manifest(), notice))
            told = progress and (lambda done, of: progress(done, of, job.recording.steps))
            mine = own_tasks(request, job.names, parts, one_task, told)
            if mine is not None:
                job.publish(parts, mine)
                last = opened.enter_context(parts.alone()) or request.shard is None
                if not last or not all(map(parts.has, job.names)):
                    return 0, so_far(request, job.output, parts, job.names)
        found = auditing.audit_groups(job.recording, job.groups, parts=parts, **job.options)
        lacking = _lacking(request, job.recording)
        write_together(_writers(request, found, job.output), overwrite=request.overwrite)
        if parts:
            parts.remove()
    return _status(request, found[""]), _text(request, found, job.output, lacking)


def one_task(request: AuditRequest, name: str) -> None:
    """Do a task of an audit and publish its part, in a process that does others too."""
    global _held
    if _held is None or _held[0] != request:
        if _held:
            _held[1].close()
            _held = None
        job = _Job(request, None)
        _held = request, job, Parts(parts_path(job.output), job.manifest())
    _held[1].publish(_held[2], [name])


#: What `one_task` was asked for last: the next task is of the same audit, as a rule.
_held: "tuple[AuditRequest, _Job, Parts] | None" = None


class _Job(contextlib.ExitStack):
    """A recording, opened, with what an audit of it needs; a context manager.

    Attributes:
        recording: the run.
        groups: of its tokens.
        wanted: the arithmetics.
        output: the NetCDF file.
        options: arguments of the audit.
        names: of its tasks.
    """

    def __init__(self, request: AuditRequest, progress: auditing.Progress | None):
        super().__init__()
        self.wanted, ledger = begin(request)
        self.recording = self.enter_context(_open(request))
        try:
            self.groups = _groups(request, self.recording)
            name = f"{_stem(request, self.recording)}.nc"
            self.output = Path(request.output or Path("results") / name)
            self.options: dict[str, Any] = {
                "arithmetics": self.wanted,
                "backend": request.backend,
                "devices": request.devices,
                "steps": _steps(request, self.recording),
                "ledger": ledger,
                "progress": progress,
            }
        except BaseException:
            self.close()
            raise
        self.names = auditing.task_names(self.recording, ledger=ledger is not None)
        self._audit: auditing.Audit | None = None

    def manifest(self) -> dict[str, Any]:
        """Return what decides the result (see `Parts`)."""
        path = self.recording.path
        return manifest(path, self.recording.fingerprint(), self.groups, self.options)

    def publish(self, parts: Parts, names: Sequence[str]) -> None:
        """Do tasks and keep their numbers."""
        if names and not all(map(parts.has, names)):
            if self._audit is None:
                audit = auditing.Audit(self.recording, self.groups, **self.options)
                self._audit = self.enter_context(audit)
            self._audit.publish(parts, names)


def _lacking(request: AuditRequest, recording: Recording) -> dict[str, str]:
    """Say what a recording made of something else does not allow; one in a file of its own shows it as it is."""
    if request.parameter is None and not recording.path.is_dir() and recording.gaps is None:
        return {}
    return {name: why for name, why in recording.coverage().items() if why != "yes"}


def spreads(request: AuditRequest) -> bool:
    """Tell whether others take part in the work."""
    return any(x is not None for x in (request.workers, request.scheduler, request.shard))


def parts_path(output: Path) -> Path:
    """Name the folder of the parts of an unfinished result."""
    return output.with_name(f"{output.name}.parts")


@contextlib.contextmanager
def kept_parts(
    request: AuditRequest, output: Path, stated: Mapping[str, Any], notice: Notice | None
) -> Iterator[Parts]:
    """Open the folder of an audit's parts; what is done in it stays there until the result is written.

    Raises:
        Failure: its parts are those of another audit, or another process is making them.
    """
    # Of several that begin at once, none may throw away what the others have done.
    renew = request.overwrite and request.shard is None
    try:
        parts = Parts(parts_path(output), stated, renew=renew)
    except OtherAudit as error:
        raise Failure(str(error), WRONG_USAGE) from error
    sharing = contextlib.nullcontext(True) if request.shard else parts.sole()
    with sharing as mine:
        if not mine:
            raise Failure(str(parts.in_use()), WRONG_USAGE)
        if parts.found and notice:
            notice(f"going on with the audit of {parts.started_at} in {parts.path}")
        with _kept_when_interrupted(parts):
            yield parts
    # Over NFS a folder with a lock in it outlives what was in it.
    with contextlib.suppress(OSError):
        parts.path.rmdir()


@contextlib.contextmanager
def _kept_when_interrupted(parts: Parts) -> Iterator[None]:
    """Leave the parts where they are, if there are any, and say so."""
    try:
        yield
    except KeyboardInterrupt as error:
        parts.remove_empty()
        if parts.path.exists():
            raise KeyboardInterrupt(
                f"interrupted; no result was written. What is done is kept in {parts.path}: the same command goes on."
            ) from error
        raise
    except BaseException:
        parts.remove_empty()
        raise


def own_tasks(
    request: AuditRequest,
    names: Sequence[str],
    parts: Parts,
    task: Callable[[AuditRequest, str], None],
    progress: Callable[[int, int], None] | None,
) -> list[str] | None:
    """Have workers do the tasks, where they were asked for; name those that this process is to do.

    None where it does everything.
    """
    if request.shard is not None:
        return share_of(request.shard, names)
    if request.workers is None and request.scheduler is None:
        return None
    do_with_dask(
        task, _anywhere(request, parts), names, parts, workers=request.workers,
        scheduler=request.scheduler, progress=progress,
    )  # fmt: skip
    return []


def _anywhere(request: AuditRequest, parts: Parts) -> AuditRequest:
    """Return a request that means the same in another folder."""
    output = str(parts.path.absolute()).removesuffix(".parts")
    paths = {
        name: os.path.abspath(value)
        for name in ("recording", "token_groups")
        if (value := getattr(request, name)) is not None
    }
    return dataclasses.replace(request, **paths, output=output, overwrite=False)


def so_far(request: AuditRequest, output: Path, parts: Parts, names: Sequence[str]) -> str:
    """Say how much of an audit is done, where others do the rest."""
    done = sum(map(parts.has, names))
    if request.json:
        return json.dumps({"output": None, "tasks_done": done, "tasks": len(names)})
    if done in (0, len(names)):
        return f"Another process writes {printable(str(output))}, or has written it"
    return (
        f"{done} of {len(names)} tasks are done, in {printable(str(parts.path))}. Whoever does the last one writes "
        f"{printable(str(output))}; without --shard, this command does what is left."
    )


def manifest(
    path: Path, fingerprint: str, groups: TokenGroups | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what decides the result of an audit, for the folder of its parts."""
    ledger = options["ledger"]
    return {
        "source": path.name,
        "source_state": f"{fingerprint} {_dates(path)}",
        "token_groups": _digest(groups),
        "arithmetics": list(options["arithmetics"]),
        "steps": options["steps"],
        "backend": options["backend"],
        "ledger": dataclasses.asdict(ledger) if ledger else None,
        "versions": {name: version_of(name) for name in ("jaxaudit", "jax", "jaxlib", "numpy")},
        "started_at": now(),
    }


def _dates(path: Path) -> str:
    """Digest sizes and dates of change of a file, or of every file in a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [(str(f.relative_to(path.parent)), f.stat()) for f in files if f.is_file()]
    told = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _digest(groups: TokenGroups | None) -> str | None:
    """Digest the names and members of token groups."""
    if groups is None:
        return None
    digest = hashlib.sha256()
    for name, tokens in groups.members.items():
        digest.update(repr((name, tokens.size)).encode() + tokens.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def begin(request: AuditRequest) -> tuple[list[str], LedgerOptions | None]:
    """Check what needs no file, and set up the process; return the arithmetics and what is asked of the ledger."""
    refuse_empty_names(request, _NAMES)
    _check_spreading(request)
    found = _wanted_arithmetics(request), _wanted_ledger(request)
    keep_freed_memory()
    keep_programs()
    find_devices(request.backend, request.devices)  # before any file is opened
    return found


def _check_spreading(request: AuditRequest) -> None:
    given = {f"--{name}": getattr(request, name) for name in ("workers", "scheduler", "shard")}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise Failure(f"{' and '.join(given)} exclude each other; give one of them.", WRONG_USAGE)
    if request.workers is not None and request.workers < 1:
        raise Failure(f"--workers: got {request.workers}, needed at least 1.", WRONG_USAGE)
    if request.shard is not None:
        try:
            share_of(request.shard, ())
        except ValueError as error:
            raise Failure(f"--shard: {error}", WRONG_USAGE) from error


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Turn the library's exceptions into failures with an exit status."""
    try:
        yield
    except FileError as error:
        raise Failure(str(error), BAD_INPUT) from error
    except SelfTestError as error:
        raise Failure(f"{error} No numbers were written.", SELF_TEST_FAILED) from error
    except (BackendError, SpreadingError) as error:
        raise Failure(str(error), WRONG_USAGE) from error
    except OSError as error:
        raise Failure(_output_problem(error), WRONG_USAGE) from error
    except MemoryError as error:
        raise Failure(
            f"out of memory ({error}); the recording's rows are too large.", BAD_INPUT
        ) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise Failure(
            "out of memory on the device; the recording's rows are too large. Try --backend cpu.",
            BAD_INPUT,
        ) from error


def _output_problem(error: OSError) -> str:
    where = error.filename2 or error.filename or "the output"
    if error.errno == errno.ENOSPC:
        return (
            f"no space left on the device for {where}; nothing was written. Free some space or choose "
            "another place."
        )
    if error.strerror:
        return f"cannot write {where}: {error.strerror}. Choose another place."
    return str(error)


def refuse_empty_names(request: object, names: Sequence[str]) -> None:
    """Refuse what an unset variable of a shell script turns into, and names of folders for files to be written."""
    for name in names:
        if getattr(request, name) == "":
            raise Failure(f"{name}: the name is empty. Give a path or leave it out.", WRONG_USAGE)
        if name in ("output", "csv", "report") and str(getattr(request, name)).endswith(os.sep):
            raise Failure(
                f"--{name}: {getattr(request, name)} is a folder; name a file.", WRONG_USAGE
            )


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


def _wanted_ledger(request: AuditRequest) -> LedgerOptions | None:
    """Parse what is asked of the ledger; None for no ledger."""
    if request.seed < 0:
        raise Failure(f"--seed: got {request.seed}, needed 0 or more.", WRONG_USAGE)
    if request.only == "accounting":
        return None
    try:
        values = [float(value) for value in request.counterfactual_beta2.split(",") if value]
        return LedgerOptions(beta2=values, seed=request.seed, per_token=request.per_token or None)
    except ValueError as error:
        raise Failure(
            f"--counterfactual-beta2: got {request.counterfactual_beta2!r}, needed numbers of at least 0 and "
            "below 1, separated by commas, for example 0.95,0.99.",
            WRONG_USAGE,
        ) from error


def _open(request: AuditRequest) -> Recording:
    try:
        return open_recording(request.recording or sample_paths()[0], request.parameter)
    except FileError as error:
        text = str(error)
        for words in ("name one with", "Leave"):  # the library's argument is the command's option
            text = text.replace(f"{words} parameter=", f"{words} --parameter")
        raise FileError(text) from error


def _stem(request: AuditRequest, recording: Recording) -> str:
    """Name the result after the recording's file, and the parameter where that is one of several."""
    if request.parameter is None or not recording.path.is_dir():
        return recording.path.stem
    return f"{recording.path.absolute().name}-{file_name(request.parameter)}"


def _groups(request: AuditRequest, recording: Recording) -> TokenGroups:
    if request.token_groups:
        return open_token_groups(request.token_groups)
    return open_token_groups(sample_paths()[1]) if request.recording is None else token_groups_of(recording)  # fmt: skip


def _steps(request: AuditRequest, recording: Recording) -> tuple[int, int] | None:
    if request.steps is None:
        return None
    first, end = parse_steps(request.steps)
    start = 1 if first is None else first
    stop = recording.number_of(recording.steps) + 1 if end is None else end
    try:
        workbench.check_steps(recording, (start, stop))
    except ValueError as error:
        raise Failure(f"--steps: {error}", WRONG_USAGE) from error
    return start, stop


def parse_steps(text: str) -> tuple[int | None, int | None]:
    """Parse START:STOP; None for what is left out.

    Raises:
        Failure: it is something else.
    """
    parts = re.fullmatch(r"(\d{0,18}):(\d{0,18})", text.strip())
    if not parts:
        raise Failure(f"--steps: got {text!r}, needed START:STOP, for example 1:101.", WRONG_USAGE)
    first, end = (int(part) if part else None for part in parts.groups())
    return first, end


def _outputs(
    request: AuditRequest, output: Path, groups: TokenGroups, wanted: Sequence[str]
) -> Iterator[Path]:
    yield output
    if request.csv:
        path = Path(request.csv)
        if not path.name or path.is_dir():
            raise Failure(f"--csv: {path} is a folder; name a file.", WRONG_USAGE)
        names = list(CATALOGUE) if {"auto", "all"} & set(wanted) else sorted(set(wanted))
        yield from itertools.starmap(
            functools.partial(_table_path, path), itertools.product(groups.names, names)
        )
    if request.plots:
        yield from (Path(request.plots) / name for name in _figures(request))
    if request.report:
        yield Path(request.report)


def _figures(request: AuditRequest) -> list[str]:
    """Name the figures that may be written."""
    from jaxaudit import plots
    from jaxaudit.ledger import figures as ledger_figures

    return [*plots.FIGURES, *(() if request.only else ledger_figures.FIGURES)]


def check_outputs(
    outputs: Sequence[Path], inputs: Sequence[Path | str] = (), *, overwrite: bool
) -> None:
    """Refuse before any work what cannot be written, or must not be; the first is a NetCDF file.

    Raises:
        Failure: for the first output that is refused.
    """
    _check_text(outputs[0])
    _check_distinct(outputs, inputs)
    for path in outputs:
        _check_free(path, overwrite=overwrite)
    for folder in {path.parent for path in outputs}:
        _check_writable(folder)


def _check_distinct(outputs: Sequence[Path], inputs: Sequence[Path | str]) -> None:
    """Refuse to write one file twice, or over what is read."""
    path, times = collections.Counter(outputs).most_common(1)[0]
    if times > 1:
        raise Failure(
            f"{path} would be written twice. Rename the output or the token group.", WRONG_USAGE
        )
    for path, source in itertools.product(outputs, inputs):
        if path.exists() and path.samefile(source):
            raise Failure(
                f"{path} is what this command reads; it is not replaced. Choose another name.",
                WRONG_USAGE,
            )


def _check_text(output: Path) -> None:
    """Refuse a name that holds bytes which are no text: netCDF can neither write nor open such a file."""
    try:
        str(output.absolute()).encode()
    except UnicodeEncodeError as error:
        raise Failure(
            f"{output.absolute()} is not Unicode, which netCDF needs. Choose another --output.",
            WRONG_USAGE,
        ) from error


def _check_free(path: Path, *, overwrite: bool) -> None:
    if path.is_dir():
        raise Failure(f"{path} is a folder; name a file.", WRONG_USAGE)
    if path.exists() and not path.is_file():
        raise Failure(f"{path} is not a regular file; name another.", WRONG_USAGE)
    if path.exists() and not overwrite:
        raise Failure(
            f"{path} exists already. Choose another name, or pass --overwrite to replace it.",
            WRONG_USAGE,
        )


def _check_writable(folder: Path) -> None:
    """Refuse before any work what would be refused after it."""
    nearest = next((f for f in (folder, *folder.parents) if os.path.lexists(f)), folder)
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return
    except OSError as error:
        raise Failure(
            f"{nearest} is not a folder that can be written to ({error.strerror}). Choose another place.",
            WRONG_USAGE,
        ) from error


def write_together(
    writers: Iterable[tuple[Path, Callable[[Path], None]]], *, overwrite: bool
) -> None:
    """Write every file under a temporary name first: all of them appear, or none.

    Args:
        writers: each output with the function that writes it.
        overwrite: replace what is there.

    Raises:
        Failure: an output has appeared meanwhile.
        OSError: one cannot be written.
    """
    with contextlib.ExitStack() as unfinished:
        written = []
        for path, write in writers:
            try:
                temporary = unfinished.enter_context(results.temporary_beside(path))
                write(temporary)
            except OSError as error:  # name the file that was wanted, not the temporary one
                raise OSError(error.errno, error.strerror, str(path)) from error
            written.append((temporary, path))
        for _, path in written:
            _check_free(path, overwrite=overwrite)  # another run may have been faster
        for temporary, path in written:
            results.publish(temporary, path)


def _writers(
    request: AuditRequest, found: Mapping[str, xr.Dataset], output: Path
) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """Pair each output with the function that writes it."""
    dataset = found[""]
    further = {name: each for name, each in found.items() if name}
    yield output, functools.partial(results.write, dataset, groups=further)
    if request.csv:
        names = itertools.product(dataset.token_group.values, dataset.arithmetic.values)
        for group, arithmetic in names:
            one = dataset.sel(token_group=group, arithmetic=arithmetic)
            path = _table_path(Path(request.csv), str(group), str(arithmetic))
            yield path, functools.partial(_write_table, one)
    if request.plots:
        for name, figure in drawn(found):
            yield Path(request.plots) / name, functools.partial(_write_figure, figure)
    if request.report:
        from jaxaudit import report

        page = functools.partial(report.html, found)
        yield Path(request.report), lambda path: _write_page(page(), path)


def drawn(found: Mapping[str, xr.Dataset]) -> Iterator[tuple[str, "Figure"]]:
    """Draw every figure for which the groups are there, with its file name."""
    from jaxaudit import plots
    from jaxaudit.ledger import figures as ledger_figures

    replayed = found[""].sizes["arithmetic"] > 0  # weights alone replay under none
    for name, draw in plots.FIGURES.items() if replayed else ():
        yield name, draw(found[""])
    for name, (groups, draw) in ledger_figures.FIGURES.items():
        if found.keys() >= set(groups):
            yield name, draw(*(found[group] for group in groups))


def _write_table(one: xr.Dataset, path: Path) -> None:
    """Write `CSV_COLUMNS` of one token group and arithmetic."""
    columns = [one.timestep.values, *(one[name].values for name in CSV_COLUMNS[1:])]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        writer.writerows(zip(*(column.tolist() for column in columns), strict=True))


def _write_figure(figure: "Figure", path: Path) -> None:
    figure.savefig(path, format="png", dpi=110)


def _write_page(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _table_path(path: Path, group: str, arithmetic: str) -> Path:
    group = re.sub(r"[^\w.-]", "_", group)
    return path.with_name(f"{path.stem}-{group}-{arithmetic}{path.suffix or '.csv'}")


def _status(request: AuditRequest, dataset: xr.Dataset) -> int:
    met = not request.expect or summary.replays_exactly(dataset, request.expect)
    return 0 if met else NOT_AS_EXPECTED


def _text(
    request: AuditRequest,
    found: Mapping[str, xr.Dataset],
    output: Path,
    lacking: Mapping[str, str],
) -> str:
    dataset, own_way = found[""], found["free_run"]
    told = json.loads(dataset.attrs.get("verdict", "[]"))
    met = request.expect is None or summary.replays_exactly(dataset, request.expect)
    if request.json:
        one: dict[str, Any] = summary.summarize(dataset, own_way) | {"verdict": told}
        if request.expect:
            one |= {"expected": request.expect, "expectation_met": met}
        if lacking:
            one["coverage"] = dict(lacking)
        return json.dumps(one | {"output": str(output)}, allow_nan=False, default=_plain)
    lines = [summary.describe(dataset, own_way), *_looking(request, dataset)]
    lines += ["", *(each["sentence"] for each in told)] if told else []
    lines += _lacking_lines(lacking)
    if not met:
        lines.append(
            f"Expected {request.expect}, but the recording does not replay bit for bit under it."
        )
    return "\n".join([*lines, f"Written to {printable(str(output))}"])


def _looking(request: AuditRequest, dataset: xr.Dataset) -> list[str]:
    """Say what to look at where nothing fits, or that not everything was tried."""
    if dataset.attrs["identified_arithmetic"] or not dataset.sizes["arithmetic"]:
        return []
    if not {"auto", "all"} & {*_wanted_arithmetics(request)}:
        return ["`--arithmetic auto` tries all others."]
    return [*filter(None, [summary.where_to_look(dataset)])]


def _lacking_lines(lacking: Mapping[str, str]) -> list[str]:
    """Say together what has one reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in lacking.items():
        reasons.setdefault(why, []).append(name)
    lines = []
    for why, names in reasons.items():
        covered, reason = re.split("[:,] ", why, maxsplit=1)
        how = "Not covered" if covered == "no" else "Covered in part"
        lines.append(f"{how}: {', '.join(names)} ({reason})")
    return lines


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
