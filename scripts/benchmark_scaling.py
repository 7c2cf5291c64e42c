"""How an audit's time grows: one measure of a made recording at a time, with fitted slopes.

    timesteps    100 to 1000, of the same parameter
    tokens       1,000 to 100,000, of as many timesteps
    groups       2 to 64 token groups of the same recording
    arithmetics  1 to 8 arithmetics over the same recording; all but the first differ in most weights
    devices      1 to 8 devices; on CPU the cores are shared among as many of XLA's host devices
    windows      7 to 200 windows, of 32 down to 1 timesteps of the same recording

Time is the `work` of the job `audit` (see `benchmark`). Two lines are fitted to each curve by least squares: through
the logarithms, whose slope is the exponent of the growth, and through the values themselves, whose intercept is what
does not grow. Residuals are root mean squares: of the former as a factor, of the latter in seconds.
"""

import dataclasses
import inspect
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import benchmark_recordings
import numpy as np
from benchmark_jobs import Input, Measured, read
from reporting import notify

#: Elements of a row.
WIDTH = 64

#: Arithmetics in the order in which they are added; the first fits.
ARITHMETICS = (
    "torch-cpu-loop",
    "float32-then-bfloat16",
    "torch-cpu-foreach",
    "torch-cpu-fused",
    "torch-cuda-loop",
    "torch-cuda-foreach",
    "torch-cuda-fused",
    "optax",
)


@dataclasses.dataclass(frozen=True)
class Point:
    """One audit of a curve.

    Attributes:
        x: the measure that grows.
        steps: of the recording.
        tokens: of it.
        groups: token groups beside `all`.
        arithmetics: how many of `ARITHMETICS`.
        devices: None to leave it unsaid.
        window_steps: None for the project's own choice.
    """

    x: int
    steps: int
    tokens: int
    groups: int = 2
    arithmetics: int = 1
    devices: int | None = None
    window_steps: int | None = None


def _timesteps(elements: int) -> list[Point]:
    tokens = max(1, elements // (1000 * WIDTH))
    return [Point(x, x, tokens) for x in (100, 200, 400, 700, 1000)]


def _tokens(elements: int) -> list[Point]:
    largest = max(min(100_000, elements // (10 * WIDTH)), 100)
    # Two windows at least: the first is not timed.
    steps = max(10, elements // (largest * WIDTH))
    return [Point(n, steps, n) for n in dict.fromkeys(largest // d for d in (100, 30, 10, 3, 1))]


def _usual(elements: int) -> tuple[int, int]:
    """Return steps and tokens of half of the elements."""
    return 200, max(64, elements // (2 * 200 * WIDTH))


def _groups(elements: int) -> list[Point]:
    return [Point(x, *_usual(elements), groups=x) for x in (2, 4, 8, 16, 32, 64)]


def _arithmetics(elements: int) -> list[Point]:
    return [Point(x, *_usual(elements), arithmetics=x) for x in (1, 2, 4, 8)]


def _devices(elements: int) -> list[Point]:
    return [Point(x, *_usual(elements), devices=x) for x in (1, 2, 4, 8)]


def _windows(elements: int) -> list[Point]:
    steps, tokens = _usual(elements)
    lengths = (32, 16, 8, 4, 2, 1)
    return [Point(-(-steps // n), steps, tokens, window_steps=n) for n in lengths]


#: The points of each curve, by name.
CURVES: dict[str, Callable[[int], list[Point]]] = {
    "timesteps": _timesteps,
    "tokens": _tokens,
    "groups": _groups,
    "arithmetics": _arithmetics,
    "devices": _devices,
    "windows": _windows,
}

#: Does a job in a process of its own, in an environment.
Measure = Callable[[str, Input, Mapping[str, str]], Measured]


def measure(
    wanted: Sequence[str],
    folder: Path,
    elements: int,
    rounds: int,
    backend: str,
    measured: Measure,
) -> dict[str, Any]:
    """Time each curve that is wanted, in the order of `CURVES`.

    Args:
        wanted: names of curves.
        folder: for the recordings; they are deleted when their curve is done.
        elements: of all timesteps of the largest recording, about.
        rounds: how often each point is timed, in turn with the others of its curve.
        backend: where JAX runs.
        measured: does the job.
    """
    found, skipped = {}, {}
    for name in [name for name in CURVES if name in wanted]:
        points = CURVES[name](elements)
        if name == "devices":
            points, reason = possible(points, backend)
            if reason:
                notify(f"{name}: {reason}")
                skipped[name] = reason
        if points:
            found[name] = curve(name, points, folder, rounds, backend, measured)
    return {"backend": backend, "scaling_elements": elements, "curves": found, "skipped": skipped}


def possible(points: list[Point], backend: str) -> tuple[list[Point], str]:
    """Return the points for which there are devices, and why there are no more."""
    from jaxaudit.auditing import audit

    if "devices" not in inspect.signature(audit).parameters:
        return [], "this version of jaxaudit.audit takes no number of devices"
    platform, count = devices_of(backend)
    if platform == "cpu":
        return points, ""
    kept = [point for point in points if point.x <= count]
    return kept, "" if kept == points else f"no more than {count} of {platform} here"


def devices_of(backend: str) -> tuple[str, int]:
    """Ask another process for platform and number of devices; asking would keep a GPU's memory in this one."""
    name = None if backend == "auto" else backend
    program = f"import jax; d = jax.devices({name!r}); print(d[0].platform, len(d))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return backend, 0
    platform, count = done.stdout.split()
    return platform, int(count)


def curve(
    name: str,
    points: Sequence[Point],
    folder: Path,
    rounds: int,
    backend: str,
    measured: Measure,
) -> dict[str, Any]:
    """Time the points of one curve in turn, and fit."""
    files = recordings(name, points, folder)
    try:
        runs: dict[Point, list[Measured]] = {point: [] for point in points}
        for number in range(1, rounds + 1):
            for point in points:
                notify(f"{name}, round {number} of {rounds}: {point.x}")
                given = input_of(point, files[point], backend)
                read(given)
                runs[point].append(measured("audit", given, environment(point)))
    finally:
        for path in {path for pair in files.values() for path in pair}:
            path.unlink(missing_ok=True)
    told = [told_of(point, runs[point]) for point in points]
    xs, ys = [each["x"] for each in told], [each["work"]["median"] for each in told]
    return {"points": told} | ({"fit": fit(xs, ys)} if len(points) > 1 else {})


def recordings(name: str, points: Sequence[Point], folder: Path) -> dict[Point, tuple[Path, Path]]:
    """Make the recording and the token groups of every point; points share what they can."""
    files = {}
    for point in points:
        size = f"{name}-{point.steps}x{point.tokens}"
        path, groups = (folder / f"{size}{end}.safetensors" for end in ("", f"-{point.groups}"))
        if not path.exists():
            notify(f"{name}: making a recording of {point.steps} x {point.tokens} x {WIDTH}")
            benchmark_recordings.make(path, point.steps, point.tokens, WIDTH)
        if not groups.exists():
            benchmark_recordings.make_groups(groups, point.tokens, point.groups)
        files[point] = path, groups
    return files


def input_of(point: Point, files: tuple[Path, Path], backend: str) -> Input:
    """Say what the job of a point works on."""
    return Input(
        *files,
        backend=backend,
        arithmetics=",".join(ARITHMETICS[: point.arithmetics]),
        window_steps=point.window_steps,
        devices=point.devices,
    )


def environment(point: Point) -> dict[str, str]:
    """Give XLA's CPU as many devices as a point asks for; other backends take no notice."""
    if point.devices is None:
        return {}
    flag = f"--xla_force_host_platform_device_count={point.devices}"
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}


def told_of(point: Point, runs: Sequence[Measured]) -> dict[str, Any]:
    """Tell what was measured at a point."""
    work = [run["work"] for run in runs]
    middle = statistics.median(work)
    elements = point.steps * point.tokens * WIDTH
    return dataclasses.asdict(point) | {
        "elements": elements,
        "work": {"median": middle, "min": min(work), "max": max(work), "each": work},
        "preparation": statistics.median(run["preparation"] for run in runs),
        "elements_per_second": elements / middle,
        "peak_resident_bytes": statistics.median(run["peak"] for run in runs),
        "peak_device_bytes": runs[0].get("device_peak"),
        "device": runs[0].get("device"),
    }


def fit(xs: Sequence[float], ys: Sequence[float]) -> dict[str, Any]:
    """Fit both lines (see the module)."""
    slope, intercept = np.polyfit(np.log(xs), np.log(ys), 1)
    residual = np.log(ys) - (slope * np.log(xs) + intercept)
    each, fixed = np.polyfit(xs, ys, 1)
    rest = np.array(ys) - (each * np.array(xs) + fixed)
    return {
        "exponent": float(slope),
        "factor": float(math.exp(intercept)),
        "exponent_residual_factor": float(np.exp(np.sqrt(np.mean(residual**2)))),
        "seconds_per_unit": float(each),
        "fixed_seconds": float(fixed),
        "linear_residual_seconds": float(np.sqrt(np.mean(rest**2))),
    }


def table(found: Mapping[str, Any]) -> str:
    """Lay the curves out in columns."""
    machine = found["machine"]
    lines = [
        f"{machine['cpu']}; {machine['cores']} cores; medians of {found['rounds']} rounds; {machine['date']}",
    ]
    for name, curve in found["curves"].items():
        lines += ["", f"{name:<12}{'work s (min-max)':>27}{'Melem/s':>10}{'peak MB':>9}"]
        lines += [row(point) for point in curve["points"]]
        lines += [fitted(curve["fit"])] if "fit" in curve else []
    lines += [f"{name}: {reason}" for name, reason in found["skipped"].items()]
    return "\n".join(lines)


def row(point: Mapping[str, Any]) -> str:
    """Lay out one point."""
    work = point["work"]
    seconds = f"{work['median']:.4f} ({work['min']:.4f}-{work['max']:.4f})"
    rate, peak = point["elements_per_second"] / 1e6, point["peak_resident_bytes"] / 1e6
    return f"{point['x']:<12}{seconds:>27}{rate:>10.1f}{peak:>9.0f}"


def fitted(fit: Mapping[str, float]) -> str:
    """Say what was fitted."""
    return (
        f"grows with the power {fit['exponent']:.3f} (residual: factor {fit['exponent_residual_factor']:.3f}); "
        f"{fit['fixed_seconds']:.4f} s + {fit['seconds_per_unit']:.3g} s each (residual "
        f"{fit['linear_residual_seconds']:.4f} s)"
    )
