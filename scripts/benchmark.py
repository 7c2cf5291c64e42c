"""Time the audit of one recording against reading it, and against the old notebook's arithmetic.

    python scripts/benchmark.py
    python scripts/benchmark.py results/run.safetensors --token-groups results/run-token-groups.safetensors

Every job runs in a fresh process, so that its peak resident memory is its own, in interleaved rounds:

    read            two threads read the file into one buffer and sum it: no audit can be faster
    audit           all stages and norms under torch-cpu-loop
    audit-auto      the same under --arithmetic auto: identify, then replay two arithmetics
    accounting      what scripts/run_audit.py --only accounting does: that, and the free run
    ledger          what scripts/run_audit.py does: that, and where the updates went
    notebook        float32 Adam in PyTorch, norms and cosine of the dead rows (all, if none are dead)
    notebook-all    the same with norms and cosine of all rows

`work` is what grows with the recording. For an audit it is taken from a second audit in the same process,
which has nothing left to compile: the time from the end of its first window to its end, scaled up by the
one window (a recording of fewer than ten windows is cut into ten for that). `prepare` is how much
longer the first audit took: compilation, self-test, and identification for audit-auto. `start-up` is the
rest of the process: interpreter, imports, exit. The three add up to `total`, what one waits for. The file
is read before every job, so all times are those of a file in the page cache, as far as that holds it; the
peak resident memory includes mapped pages of the file.

Exit status: 0 measured; 2 wrong usage, or an output that cannot be written; 3 input missing, unreadable
or inconsistent; 130 interrupted.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxaudit.hyperparameters import Hyperparameters
from jaxaudit.provenance import cpu_name, version_of
from jaxaudit.recording import (
    Recording,
    TokenGroups,
    open_recording,
    open_token_groups,
    sample_paths,
    token_groups_of,
)
from jaxaudit.safetensors_file import FileError

if TYPE_CHECKING:  # the audit's processes must not hold torch
    import torch

#: Bytes that each of the two reading threads holds at a time: they stay in its core's cache.
CHUNK = 1 << 20

#: An audit's streaming is timed over at least so many windows.
WINDOWS = 10

#: The jobs that all others are compared with.
REFERENCES = ("read", "accounting", "notebook-all")

#: Columns of the table, and their widths.
COLUMNS = {
    "total s": 9,
    "start-up": 10,
    "prepare": 9,
    "work s (min-max)": 25,
    "Melem/s": 9,
    "GB/s": 7,
    "peak MB": 9,
    "/ read": 8,
    "/ accounting": 14,
    "/ notebook-all": 16,
}

#: Packages whose versions the times depend on.
PACKAGES = ("jaxaudit", "jax", "jaxlib", "numpy", "torch", "safetensors")

#: Measured seconds of one process, by part, and its peak resident bytes.
Measured = dict[str, float]


class Failure(Exception):
    """An error for people, and the exit status that goes with it."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Input:
    """What every job works on."""

    recording: Path
    token_groups: Path | None
    torch_threads: int | None = None

    def groups(self, recording: Recording) -> TokenGroups:
        """Read the token groups from their own file, else from the recording."""
        if self.token_groups:
            return open_token_groups(self.token_groups)
        return token_groups_of(recording)


def read(given: Input) -> Measured:
    """Read the file in two threads, and sum its bytes so that each is touched."""
    size = given.recording.stat().st_size
    buffer = np.empty((2, CHUNK // 8), np.uint64)
    descriptor = os.open(given.recording, os.O_RDONLY)

    def share(thread: int) -> int:
        part, total = buffer[thread], np.uint64(0)
        for offset in range(thread * CHUNK, size, 2 * CHUNK):
            count = os.preadv(descriptor, [part], offset)
            total += np.add.reduce(part[: -(-count // 8)])
        return int(total)

    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(share, range(2)))
    seconds = time.perf_counter() - start
    os.close(descriptor)
    return {"work": seconds}


def audit(given: Input, arithmetic: str, parts: str = "audit") -> Measured:
    """Audit, and audit again to see what the streaming alone costs."""
    with open_recording(given.recording) as recording:
        groups = given.groups(recording)
        ends = window_ends(recording, groups, arithmetic, parts, None)
        peak = peak_resident_bytes()
        cut = -(-recording.steps // WINDOWS) if len(ends) - 1 <= WINDOWS else None
        start = time.perf_counter()
        if cut:  # compiles for the shorter windows
            window_ends(recording, groups, arithmetic, parts, cut)
        again = window_ends(recording, groups, arithmetic, parts, cut)
        extra = time.perf_counter() - start
    count = len(again) - 2
    work = (again[-1] - again[1]) * count / (count - 1) if count > 1 else again[-1]
    return {"preparation": ends[-1] - work, "work": work, "extra": extra, "peak": peak}


def window_ends(
    recording: Recording,
    groups: TokenGroups,
    arithmetic: str,
    parts: str,
    window_steps: int | None,
) -> list[float]:
    """Audit and return the seconds from its start to its start (0), to the end of each window, and to its end."""
    from jaxaudit.auditing import audit, audit_groups
    from jaxaudit.ledger.subject import LedgerOptions

    start, ends = time.perf_counter(), [0.0]
    options: dict[str, Any] = {
        "arithmetics": arithmetic,
        "window_steps": window_steps,
        "progress": lambda done, total: ends.append(time.perf_counter() - start),
    }
    if parts == "audit":
        audit(recording, groups, **options)
    else:
        ledger = LedgerOptions() if parts == "ledger" else None
        audit_groups(recording, groups, ledger=ledger, **options)
    return [*ends, time.perf_counter() - start]


def notebook(given: Input, group: str) -> Measured:
    """Load whole tensors and account for every step of one token group, as the old notebook did."""
    import torch
    from safetensors.torch import load_file

    with open_recording(given.recording) as recording:
        members = given.groups(recording).members
    if given.torch_threads:
        torch.set_num_threads(given.torch_threads)
    rows: Any = slice(None)
    if group in members:
        rows = torch.zeros(recording.tokens, dtype=torch.bool)
        rows[torch.from_numpy(members[group])] = True
    assert recording.hyperparameters is not None  # see `reason_to_skip`
    start = time.perf_counter()
    tensors = load_file(given.recording)
    weight, first, second = (tensors[key] for key in ("W", "momentum_W", "variance_W"))
    for t in range(1, recording.steps + 1):
        after = adam_weight(weight[t - 1], first[t], second[t], recording.hyperparameters, t)
        changes = after - weight[t - 1], weight[t] - weight[t - 1]
        notebook_figures(*(change[rows] for change in changes))
    return {"work": time.perf_counter() - start}


def adam_weight(
    before: "torch.Tensor",
    first: "torch.Tensor",
    second: "torch.Tensor",
    given: Hyperparameters,
    t: int,
    root: "Callable[[torch.Tensor], torch.Tensor] | None" = None,
) -> "torch.Tensor":
    """Replay a step as the old notebook did: in float32, from left to right, rounded at the end.

    Args:
        before: weight before the step.
        first: first moment after the step.
        second: second moment after the step.
        given: hyperparameters; weight decay, which the notebook had none of, is left out.
        t: the step, from 1.
        root: square root in the place of PyTorch's own.
    """
    import torch

    rate = float(given.learning_rate[t - 1])
    m_hat = first.float() / (1 - given.beta1**t)
    v_hat = second.float() / (1 - given.beta2**t)
    denominator = (root or torch.sqrt)(v_hat) + given.epsilon
    return (before.float() - rate * m_hat / denominator).to(before.dtype)


def notebook_figures(
    predicted: "torch.Tensor", observed: "torch.Tensor"
) -> tuple[float, float, float]:
    """Return the norms of both changes and their cosine as the old notebook did, in float32."""
    p, o = predicted.float(), observed.float()
    norm_p, norm_o = p.norm(), o.norm()
    cosine = (p * o).sum() / (norm_p * norm_o + 1e-10)
    return norm_p.item(), norm_o.item(), cosine.item()


#: The jobs, in the order of a round.
JOBS: dict[str, Callable[[Input], Measured]] = {
    "read": read,
    "audit": lambda given: audit(given, "torch-cpu-loop"),
    "audit-auto": lambda given: audit(given, "auto"),
    "accounting": lambda given: audit(given, "auto", "accounting"),
    "ledger": lambda given: audit(given, "auto", "ledger"),
    "notebook": lambda given: notebook(given, "dead"),
    "notebook-all": lambda given: notebook(given, "all rows"),
}


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    add_files(p, Path("results/benchmark.json"))
    p.add_argument("--rounds", type=positive, default=5, metavar="N", help="(%(default)s)")
    p.add_argument(
        "--torch-threads",
        type=positive,
        metavar="N",
        help="of the notebook's jobs (torch's own choice, which a shared machine can slow down 20-fold)",
    )
    p.add_argument(
        "--jobs", metavar="JOB[,JOB...]", default=",".join(JOBS), help="only these (%(default)s)"
    )
    p.add_argument("--job", choices=list(JOBS), help=argparse.SUPPRESS)  # what a process is for
    return p


def add_files(p: argparse.ArgumentParser, output: Path) -> None:
    """Add the options for what is read and written."""
    p.add_argument("recording", nargs="?", type=Path, help="the recording (default: the sample)")
    p.add_argument("--token-groups", type=Path, metavar="FILE", help="sets of tokens to count by")
    p.add_argument("--output", type=Path, default=output, metavar="PATH", help="(%(default)s)")
    p.add_argument("--overwrite", action="store_true", help="replace an existing output")


def positive(text: str) -> int:
    """Parse a whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report, or do one job; return the exit status."""
    return guarded(run, parser().parse_args(argv))


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


def run(arguments: argparse.Namespace) -> int:
    """Do one job, or all of them in rounds."""
    given = input_of(arguments)
    if arguments.job:
        seconds = JOBS[arguments.job](given)
        print(json.dumps({"peak": peak_resident_bytes()} | seconds))
        return 0
    check_output(arguments)
    with open_recording(given.recording) as recording:
        given.groups(recording)
        found = measure(recording, given, arguments.rounds, jobs_of(arguments))
    write_json(arguments.output, found)
    print(table(found))
    print(f"Written to {arguments.output}")
    return 0


def input_of(arguments: argparse.Namespace) -> Input:
    """Return the files that the arguments name, else the sample."""
    threads = getattr(arguments, "torch_threads", None)
    if arguments.recording:
        return Input(arguments.recording, arguments.token_groups, threads)
    recording, groups = sample_paths()
    return Input(recording, arguments.token_groups or groups, threads)


def check_output(arguments: argparse.Namespace) -> None:
    """Refuse before any work what would be refused after it."""
    output: Path = arguments.output
    if output.is_dir():
        raise Failure(f"{output} is a folder; name a file.", 2)
    if output.exists() and not arguments.overwrite:
        raise Failure(f"{output} exists already. Choose another name, or pass --overwrite.", 2)
    output.parent.mkdir(parents=True, exist_ok=True)


def jobs_of(arguments: argparse.Namespace) -> list[str]:
    """Return the jobs asked for, in the order of a round."""
    wanted = arguments.jobs.split(",")
    unknown = [job for job in wanted if job not in JOBS]
    if unknown:
        raise Failure(f"--jobs: unknown job {unknown[0]!r}; there are {', '.join(JOBS)}.", 2)
    return [job for job in JOBS if job in wanted]


def measure(
    recording: Recording, given: Input, rounds: int, wanted: Sequence[str]
) -> dict[str, Any]:
    """Run jobs in interleaved rounds and gather the times."""
    skipped = {job: reason for job in wanted if (reason := reason_to_skip(job, recording))}
    for job, reason in skipped.items():
        notify(f"{job} is skipped: {reason}")
    jobs = [job for job in wanted if job not in skipped]
    runs: dict[str, list[Measured]] = {job: [] for job in jobs}
    cached = []
    for number in range(1, rounds + 1):
        for job in jobs:
            notify(f"round {number} of {rounds}: {job}")
            read(given)
            cached.append(cached_share(given.recording))
            runs[job].append(measured(job, given))
    return {
        "recording": facts_of(recording),
        "machine": machine_facts(),
        "rounds": rounds,
        "torch_threads": given.torch_threads or "torch's own choice",
        "least_share_in_page_cache": None if None in cached else min(cached),
        "jobs": figures(recording, runs),
        "skipped": skipped,
    }


def measured(job: str, given: Input) -> Measured:
    """Do a job in a process of its own and return its parts, with start-up as what is left."""
    command = [sys.executable, __file__, "--job", job, str(given.recording)]
    command += ["--token-groups", str(given.token_groups)] if given.token_groups else []
    command += ["--torch-threads", str(given.torch_threads)] if given.torch_threads else []
    start, before = time.perf_counter(), foreign_seconds()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall, foreign = time.perf_counter() - start, foreign_seconds() - before
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failure(f"{job} ended with status {done.returncode}: {last}", max(done.returncode, 3))
    found: Measured = {"preparation": 0.0, "extra": 0.0} | json.loads(done.stdout)
    found["foreign"] = max(foreign, 0) / (wall * cores())
    found["total"] = wall - found["extra"]
    found["start-up"] = found["total"] - found["preparation"] - found["work"]
    return found


def foreign_seconds() -> float:
    """Return the CPU seconds that all but this process and its children have taken, from any start."""
    table = Path("/proc/stat")
    if not table.exists():
        return 0.0
    user, nice, system, _, _, *rest = map(int, table.read_text().split()[1:9])
    ours = os.times()
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - sum(ours[:4])


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_resident_bytes() -> int:
    """Return the largest resident set of this process so far, mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():
        # `ru_maxrss` would start from the parent's, which a new process inherits until it executes.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def reason_to_skip(job: str, recording: Recording) -> str:
    """Say why a job cannot run; "" where it can."""
    if not job.startswith("notebook"):
        return ""
    if importlib.util.find_spec("torch") is None:
        return 'torch is missing; pip install "jaxaudit[torch]".'
    if recording.hyperparameters is None or not {"exp_avg", "exp_avg_sq"} <= set(recording.formats):
        return "the recording lacks moments or hyperparameters."
    available, needed = available_memory(), 2 * recording.path.stat().st_size
    if available < needed:
        return f"it loads whole tensors; {needed} bytes of memory are needed, {available} are free."
    return ""


def available_memory() -> int:
    """Return the bytes of memory that a new process can get."""
    table = Path("/proc/meminfo")
    if table.exists():
        lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cached_share(path: Path) -> float | None:
    """Return the share of a file that lies in the page cache, from 1024 probes; None if unknown."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    size, found = path.stat().st_size, 0
    with open(path, "rb") as file:
        for k in range(1024):
            try:
                found += os.preadv(file.fileno(), [bytearray(1)], k * size // 1024, os.RWF_NOWAIT)
            except BlockingIOError:
                pass
            except OSError:  # the file system cannot tell
                return None
    return found / 1024


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


def figures(recording: Recording, runs: Mapping[str, list[Measured]]) -> dict[str, Any]:
    """Turn the seconds of every round into medians, rates and ratios."""
    found: dict[str, Any] = {}
    for job, seconds in runs.items():
        parts = {
            part: spread([run[part] for run in seconds])
            for part in ("total", "start-up", "preparation", "work")
        }
        work = parts["work"]["median"]
        found[job] = parts | {
            "elements_per_second": recording.steps * recording.step_elements / work,
            "bytes_per_second": recording.path.stat().st_size / work,
            "largest_load_by_others": max(run["foreign"] for run in seconds),
            "peak_resident_bytes": statistics.median(run["peak"] for run in seconds),
        }
    for other in REFERENCES:
        for job in found:
            known = other in found
            ratio = found[job]["work"]["median"] / found[other]["work"]["median"] if known else None
            found[job][f"work_relative_to_{other}"] = ratio
    return found


def spread(values: list[float]) -> dict[str, Any]:
    """Return median, least and largest, and every value."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "each": values,
    }


def table(found: Mapping[str, Any]) -> str:
    """Lay the figures out in columns."""
    recording, machine = found["recording"], found["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
    foreign = max(figure["largest_load_by_others"] for figure in found["jobs"].values())
    lines = [
        f"{recording['name']}: {recording['steps']} steps, {recording['rows']} x "
        f"{recording['row_elements']}, {recording['bytes'] / 1e9:.3f} GB",
        f"{machine['cpu']}; {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB",
        f"Python {machine['python']}, {versions}; {machine['date']}",
        f"Medians of {found['rounds']} rounds; before each job, {found['least_share_in_page_cache']} or more "
        f"of the file was in the page cache; torch threads: {found['torch_threads']};",
        f"during one, other programs took up to {foreign:.0%} of the cores",
        "",
        line("", list(COLUMNS)),
    ]
    lines += [row(job, figure) for job, figure in found["jobs"].items()]
    lines += [f"{job:<13} skipped: {reason}" for job, reason in found["skipped"].items()]
    return "\n".join(lines)


def row(job: str, figure: Mapping[str, Any]) -> str:
    """Lay out one job's figures."""
    parts = [f"{figure[part]['median']:.2f}" for part in ("total", "start-up", "preparation")]
    work = figure["work"]
    relative = [figure[f"work_relative_to_{other}"] for other in REFERENCES]
    cells = [
        *parts,
        f"{work['median']:.3f} ({work['min']:.3f}-{work['max']:.3f})",
        f"{figure['elements_per_second'] / 1e6:.1f}",
        f"{figure['bytes_per_second'] / 1e9:.2f}",
        f"{figure['peak_resident_bytes'] / 1e6:.0f}",
        *("-" if ratio is None else f"{ratio:.2f}" for ratio in relative),
    ]
    return line(job, cells)


def line(name: str, cells: Sequence[str]) -> str:
    """Lay out a name and what belongs under each of `COLUMNS`."""
    widths = COLUMNS.values()
    return f"{name:<13}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))


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


def notify(text: str) -> None:
    """Tell of progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
