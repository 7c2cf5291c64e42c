"""Time the audit of one recording against the machine's limits, and against the same work without the project.

    python scripts/benchmark.py
    python scripts/benchmark.py results/run.safetensors --token-groups results/run-token-groups.safetensors
    python scripts/benchmark.py --make 1000x10000x64 --scratch /scratch --backend gpu
    python scripts/benchmark.py --scaling --scratch /scratch

Every job runs in a fresh process, so that its peak memory is its own, in interleaved rounds:

    host-bandwidth    NumPy's copy and triad in memory, a thread for each core
    device-bandwidth  JAX's on the chosen backend; copying from the host to it where that is another
    read              a thread for each core reads the file and sums it: the floor, no audit can be faster
    read-cold         the same after the page cache was asked to forget the file; looked at with preadv2
    audit             all three stages and all variables of the dataset under one arithmetic
    audit-auto        the same under --arithmetic auto: identify, then replay what fits and the usual assumption
    accounting        what scripts/run_audit.py --only accounting does: that, and the free run
    ledger            what scripts/run_audit.py does: that, and where the updates went
    torch-exact       eager PyTorch, operation by operation as torch.optim.Adam's loop: all three stages compared
                      bit for bit, ulp distances, norms and cosine in float64; on data in memory
    numpy-exact       the same in NumPy with ml_dtypes, a thread for each core; on a share of the timesteps
                      where there are very many elements, and scaled up
    notebook          inexact: float32 Adam in PyTorch, norms and cosine of the dead rows (all, if none are dead)
    notebook-all      the same with norms and cosine of all rows

`work` is what grows with the recording. For an audit it is taken from a second audit in the same process,
which has nothing left to compile: the time from the end of its first window to its end, scaled up by the
one window (a recording of fewer than ten windows is cut into ten for that). It holds the reading of the file.
`prepare` is how much longer the first audit took: compilation, self-test, and identification for audit-auto;
the seconds of XLA's compilations are told apart (several at a time count each). `load` is reading into memory
for the jobs that work there. `start-up` is the rest of the process: interpreter, imports, exit. The four add
up to `total`, what one waits for. `of floor` is the time of `read` divided by that of `work`. The file is read
before every job, so all times but read-cold's are those of a file in the page cache, as far as that holds it;
the peak resident memory includes mapped pages of the file. What lies below this machine's page cache (a disk's
own cache, that of a host of virtual machines) cannot be emptied from here.

With --scaling no job is timed but `audit`, on made recordings (see `benchmark_recordings`) of which one measure
grows at a time, with slopes fitted. A PNG figure is written beside the JSON file.

Exit status: 0 measured; 2 wrong usage, or an output that cannot be written; 3 input missing, unreadable
or inconsistent; 130 interrupted.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import benchmark_recordings
import benchmark_scaling
from benchmark_jobs import BANDWIDTHS, JOBS, Input, Measured, cached_share, read, reason_to_skip
from reporting import (
    Failure,
    add_files,
    check_output,
    cores,
    facts_of,
    guarded,
    machine_facts,
    notify,
    peak_resident_bytes,
    positive,
    write_json,
)

from jaxaudit.devices import BACKENDS
from jaxaudit.recording import Recording, open_recording, sample_paths

#: The jobs that all others are compared with.
REFERENCES = ("read", "accounting", "torch-exact", "notebook-all")

#: What the seconds of a process are made of.
PARTS = ("total", "start-up", "preparation", "loading", "work")

#: Columns of the table, and their widths.
COLUMNS = {
    "total s": 9,
    "start-up": 10,
    "prepare": 9,
    "(compile)": 11,
    "load": 8,
    "work s (min-max)": 28,
    "Melem/s": 9,
    "GB/s": 7,
    "of floor": 10,
    "peak MB": 9,
    "device MB": 11,
    "/ torch": 9,
}

#: A file of which less is in the page cache counts as cold.
COLD = 0.02

#: Where results go.
OUTPUT, SCALING_OUTPUT = Path("results/benchmark.json"), Path("results/benchmark-scaling.json")


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    add_files(p, None)
    curves = ",".join(benchmark_scaling.CURVES)
    p.add_argument("--rounds", type=positive, default=5, metavar="N", help="(%(default)s)")
    p.add_argument("--backend", choices=BACKENDS, default="auto", help="of JAX (%(default)s)")
    p.add_argument("--arithmetic", default="torch-cpu-loop", metavar="NAME",
                   help="of the job audit (%(default)s)")  # fmt: skip
    p.add_argument(
        "--torch-threads",
        type=positive,
        metavar="N",
        help="of PyTorch's jobs (its own choice, which a shared machine can slow down 20-fold)",
    )
    p.add_argument(
        "--jobs", metavar="JOB[,JOB...]", default=",".join(JOBS), help="only these (%(default)s)"
    )
    p.add_argument("--make", type=sizes, metavar="STEPSxTOKENSxWIDTH",
                   help="time a recording made for it, and deleted afterwards")  # fmt: skip
    p.add_argument("--scaling", nargs="?", const=curves, metavar="CURVE[,CURVE...]",
                   help=f"time growing recordings instead: {curves}")  # fmt: skip
    p.add_argument("--scaling-elements", type=positive, default=1 << 27, metavar="N",
                   help="elements of all timesteps of the largest of them (%(default)s)")  # fmt: skip
    p.add_argument("--scratch", type=Path, metavar="DIR",
                   help="for recordings that are made (the system's folder for temporary files)")  # fmt: skip
    p.add_argument("--array-bytes", type=positive, metavar="N",
                   help="of each array that is copied for a bandwidth (as fits the device)")  # fmt: skip
    p.add_argument("--job", choices=list(JOBS), help=argparse.SUPPRESS)  # what a process is for
    p.add_argument("--given", help=argparse.SUPPRESS)
    return p


def sizes(text: str) -> tuple[int, int, int]:
    """Parse steps, tokens and width."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1000x10000x64")
    steps, tokens, width = map(int, text.split("x"))
    return steps, tokens, width


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report, or do one job; return the exit status."""
    return guarded(run, parser().parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Do one job, or all of them in rounds."""
    if arguments.job:
        found = JOBS[arguments.job](Input.from_json(arguments.given))
        print(json.dumps({"peak": peak_resident_bytes()} | found))
        return 0
    arguments.output = arguments.output or (SCALING_OUTPUT if arguments.scaling else OUTPUT)
    figure = arguments.output.with_suffix(".png")
    if figure == arguments.output:
        raise Failure(f"{figure}: the figure has this name; name a .json file.", 2)
    check_output(arguments, figure)
    found = scaling(arguments) if arguments.scaling else benchmark(arguments)
    write_json(arguments.output, found)
    draw(found, figure)
    print(benchmark_scaling.table(found) if arguments.scaling else table(found))
    print(f"Written to {arguments.output} and {figure}")
    return 0


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Write the figure, whole or not at all."""
    import benchmark_figures  # only now: the jobs' processes need no matplotlib

    figure = (benchmark_figures.curves if "curves" in found else benchmark_figures.jobs)(found)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}.png")
    try:
        figure.savefig(temporary, dpi=150)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the jobs that were asked for."""
    jobs = jobs_of(arguments)
    check_arithmetic(arguments.arithmetic)
    with input_for(arguments) as given, open_recording(given.recording) as recording:
        given.groups(recording)
        return measure(recording, given, arguments.rounds, jobs)


def jobs_of(arguments: argparse.Namespace) -> list[str]:
    """Return the jobs asked for, in the order of a round."""
    wanted = arguments.jobs.split(",")
    unknown = [job for job in wanted if job not in JOBS]
    if unknown:
        raise Failure(f"--jobs: unknown job {unknown[0]!r}; there are {', '.join(JOBS)}.", 2)
    return [job for job in JOBS if job in wanted]


def check_arithmetic(name: str) -> None:
    """Refuse an arithmetic that is not there before the first job is done."""
    from jaxaudit.identification import check_names

    try:
        check_names(name.split(","))
    except ValueError as error:
        raise Failure(f"--arithmetic: {error}", 2) from error


@contextlib.contextmanager
def input_for(arguments: argparse.Namespace) -> Iterator[Input]:
    """Find the recording, or make it for as long as it is needed."""
    options = dict(
        torch_threads=arguments.torch_threads,
        backend=arguments.backend,
        arithmetics=arguments.arithmetic,
        array_bytes=arguments.array_bytes,
    )
    if not arguments.make:
        recording, groups = files_of(arguments)
        yield Input(recording, groups, **options)
        return
    if arguments.recording or arguments.token_groups:
        raise Failure("give a recording or --make, not both.", 2)
    steps, tokens, width = arguments.make
    with scratch(arguments) as folder:
        notify(f"making a recording of {steps} x {tokens} x {width}")
        path = folder / f"made-{steps}x{tokens}x{width}.safetensors"
        benchmark_recordings.make(path, steps, tokens, width)
        groups = benchmark_recordings.make_groups(folder / "groups.safetensors", tokens, 2)
        yield Input(path, groups, **options)


def files_of(arguments: argparse.Namespace) -> tuple[Path, Path | None]:
    """Return the files that the arguments name, else the sample."""
    if arguments.recording:
        return arguments.recording, arguments.token_groups
    recording, groups = sample_paths()
    return recording, arguments.token_groups or groups


@contextlib.contextmanager
def scratch(arguments: argparse.Namespace) -> Iterator[Path]:
    """Make a folder for as long as it is needed."""
    if arguments.scratch and not arguments.scratch.is_dir():
        raise Failure(f"--scratch: {arguments.scratch} is not a folder.", 2)
    folder = tempfile.mkdtemp(prefix="benchmark-", dir=arguments.scratch)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder)


def scaling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time growing recordings."""
    wanted = arguments.scaling.split(",")
    unknown = [name for name in wanted if name not in benchmark_scaling.CURVES]
    if unknown:
        raise Failure(f"--scaling: unknown curve {unknown[0]!r}; there are {', '.join(benchmark_scaling.CURVES)}.", 2)  # fmt: skip
    if arguments.recording or arguments.token_groups or arguments.make:
        raise Failure("--scaling makes its own recordings; give none.", 2)
    with scratch(arguments) as folder:
        found = benchmark_scaling.measure(
            wanted,
            folder,
            arguments.scaling_elements,
            arguments.rounds,
            arguments.backend,
            measured,
        )
    return {"machine": machine_facts(), "rounds": arguments.rounds} | found


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
            if job not in BANDWIDTHS:
                read(given)
                cached.append(cached_share(given.recording))
            runs[job].append(measured(job, given))
    devices = {run["device"] for each in runs.values() for run in each if "device" in run}
    return {
        "recording": facts_of(recording),
        "machine": machine_facts() | {"devices": sorted(devices)},
        "rounds": rounds,
        "torch_threads": given.torch_threads or "torch's own choice",
        "least_share_in_page_cache": None if None in cached else min(cached, default=None),
        "cold": coldness(runs.get("read-cold", [])),
        "bandwidth": bandwidths(runs),
        "jobs": figures(recording, runs),
        "skipped": skipped,
    }


def measured(job: str, given: Input, environment: Mapping[str, str] | None = None) -> Measured:
    """Do a job in a process of its own and return its parts, with start-up as what is left."""
    command = [sys.executable, __file__, "--job", job, "--given", given.as_json()]
    start, before = time.perf_counter(), foreign_seconds()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | (environment or {})
    )
    wall, foreign = time.perf_counter() - start, foreign_seconds() - before
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failure(f"{job} ended with status {done.returncode}: {last}", max(done.returncode, 3))
    nothing = {"preparation": 0.0, "loading": 0.0, "extra": 0.0}
    found: Measured = nothing | json.loads(done.stdout.splitlines()[-1])
    found["foreign"] = max(foreign, 0) / (wall * cores())
    found["total"] = wall - found["extra"]
    inside = found["preparation"] + found["loading"] + found["work"]
    found["start-up"] = found["total"] - inside
    return found


def foreign_seconds() -> float:
    """Return the CPU seconds that all but this process and its children have taken, from any start."""
    table = Path("/proc/stat")
    if not table.exists():
        return 0.0
    user, nice, system, _, _, *rest = map(int, table.read_text().split()[1:9])
    ours = os.times()
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - sum(ours[:4])


def coldness(runs: Sequence[Measured]) -> dict[str, Any]:
    """Tell whether the file was really out of the page cache when it was read cold."""
    shares = [run["cached_before"] for run in runs]
    if not shares:
        return {"is_cold": None, "note": "not measured"}
    if None in shares:
        return {"is_cold": None, "note": "this system does not tell what is in its page cache"}
    left, asked = max(shares), hasattr(os, "posix_fadvise")
    note = (
        f"at most {left:.1%} of the file was in the page cache"
        if asked
        else "this system has no posix_fadvise"
    )
    if left > COLD:
        note += "; it could not be dropped, and read-cold is no cold reading"
    return {"is_cold": left <= COLD, "largest_share_in_page_cache": left, "note": note}


def bandwidths(runs: Mapping[str, list[Measured]]) -> dict[str, Any]:
    """Gather bytes per second; each byte that is read or written counts, as in McCalpin's STREAM."""
    found: dict[str, Any] = {}
    for job in BANDWIDTHS:
        where = job.removesuffix("-bandwidth")
        for name in runs[job][0]["rates"] if runs.get(job) else ():
            found[f"{where} {name}"] = spread([run["rates"][name] for run in runs[job]])
    return found


def figures(recording: Recording, runs: Mapping[str, list[Measured]]) -> dict[str, Any]:
    """Turn the seconds of every round into medians, rates and ratios."""
    found: dict[str, Any] = {}
    for job, seconds in runs.items():
        if job in BANDWIDTHS:
            continue
        parts = {part: spread([run[part] for run in seconds]) for part in PARTS}
        work = parts["work"]["median"]
        found[job] = parts | {
            "elements_per_second": recording.steps * recording.step_elements / work,
            "bytes_per_second": recording.path.stat().st_size / work,
            "largest_load_by_others": max(run["foreign"] for run in seconds),
            "peak_resident_bytes": statistics.median(run["peak"] for run in seconds),
            "peak_device_bytes": median_of(seconds, "device_peak"),
            "compile_seconds": median_of(seconds, "compile"),
        }
        for name in ("share", "threads", "mismatches"):
            if name in seconds[0]:
                key = "share_of_timesteps" if name == "share" else name
                found[job][key] = min(run[name] for run in seconds)
    for other in REFERENCES:
        for job in found:
            known = other in found
            ratio = found[job]["work"]["median"] / found[other]["work"]["median"] if known else None
            found[job][f"work_relative_to_{other}"] = ratio
    for figure in found.values():
        ratio = figure["work_relative_to_read"]
        figure["share_of_floor"] = None if ratio is None else 1 / ratio
    return found


def median_of(runs: Sequence[Measured], name: str) -> float | None:
    """Return the median of what runs tell; None where they do not."""
    values = [run.get(name) for run in runs]
    return None if None in values else statistics.median(v for v in values if v is not None)


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
    foreign = max((f["largest_load_by_others"] for f in found["jobs"].values()), default=0)
    lines = [
        f"{recording['name']}: {recording['steps']} steps, {recording['rows']} x "
        f"{recording['row_elements']}, {recording['bytes'] / 1e9:.3f} GB",
        f"{machine['cpu']}; {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB; "
        f"{', '.join(machine['devices']) or 'no device used'}",
        f"Python {machine['python']}, {versions}; {machine['date']}",
        f"Medians of {found['rounds']} rounds; before each job, {found['least_share_in_page_cache']} or more "
        f"of the file was in the page cache; torch threads: {found['torch_threads']};",
        f"during one, other programs took up to {foreign:.0%} of the cores",
        *(["read-cold: " + found["cold"]["note"]] if "read-cold" in found["jobs"] else []),
        *bandwidth_lines(found["bandwidth"]),
        "",
        line("", list(COLUMNS)),
    ]
    lines += [row(job, figure) for job, figure in found["jobs"].items()]
    for job, figure in found["jobs"].items():
        if figure.get("share_of_timesteps", 1) < 1:
            share = figure["share_of_timesteps"]
            lines.append(f"{job}: done on {share:.1%} of the timesteps, and scaled up to all")
        if figure.get("mismatches"):
            lines.append(f"{job}: {figure['mismatches']} elements differ from the recording")
    lines += [f"{job:<13} skipped: {reason}" for job, reason in found["skipped"].items()]
    return "\n".join(lines)


def bandwidth_lines(found: Mapping[str, Any]) -> list[str]:
    """Tell the bandwidths, GB/s."""
    told = [
        f"{name} {rate['median'] / 1e9:.1f} ({rate['min'] / 1e9:.1f}-{rate['max'] / 1e9:.1f})"
        for name, rate in found.items()
    ]
    return ["bandwidth in GB/s: " + ", ".join(told)] if told else []


def row(job: str, figure: Mapping[str, Any]) -> str:
    """Lay out one job's figures."""
    work, floor = figure["work"], figure["share_of_floor"]
    relative = figure["work_relative_to_torch-exact"]
    cells = [
        *(f"{figure[part]['median']:.2f}" for part in ("total", "start-up", "preparation")),
        told(figure["compile_seconds"], ".2f"),
        f"{figure['loading']['median']:.2f}",
        f"{work['median']:.3f} ({work['min']:.3f}-{work['max']:.3f})",
        f"{figure['elements_per_second'] / 1e6:.1f}",
        f"{figure['bytes_per_second'] / 1e9:.2f}",
        told(floor, ".1%"),
        f"{figure['peak_resident_bytes'] / 1e6:.0f}",
        told(figure["peak_device_bytes"], ".0f", 1e6),
        told(relative, ".2f"),
    ]
    return line(job, cells)


def told(value: float | None, form: str, unit: float = 1) -> str:
    """Write a number, or a dash where there is none."""
    return "-" if value is None else format(value / unit, form)


def line(name: str, cells: Sequence[str]) -> str:
    """Lay out a name and what belongs under each of `COLUMNS`."""
    widths = COLUMNS.values()
    return f"{name:<13}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))


if __name__ == "__main__":
    sys.exit(main())
