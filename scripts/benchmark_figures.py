"""Figures of what `benchmark.py` measured. Each function takes the contents of a JSON file."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers tell apart.
BLUE, RED, GREEN, PINK, ORANGE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
)  # fmt: skip

#: Parts of a process's time, in their order.
PARTS = {"start-up": "0.75", "preparation": ORANGE, "loading": SKY, "work": BLUE}

#: Colours of reading and of bandwidths.
FLOORS = {"read": RED, "read-cold": PINK}


def jobs(found: Mapping[str, Any]) -> Figure:
    """Draw seconds by part, bytes per second against the limits of the machine, and peak memory."""
    names = list(found["jobs"])
    figure = Figure(figsize=(14, max(3.0, 0.42 * (len(names) + len(found["bandwidth"])) + 1.6)), layout="constrained")  # fmt: skip
    recording, machine = found["recording"], found["machine"]
    figure.suptitle(
        f"{recording['name']}: {recording['steps']} timesteps of {recording['rows']:,} x "
        f"{recording['row_elements']}, {recording['bytes'] / 1e9:.2f} GB; {machine['cores']} cores, "
        f"{', '.join(machine['devices']) or 'no device'}; medians of {found['rounds']} rounds",
        fontsize=10,
        parse_math=False,
    )
    seconds, rates, memory = figure.subplots(1, 3)
    if names:
        draw_seconds(seconds, found["jobs"])
        draw_memory(memory, found["jobs"])
    draw_rates(rates, found)
    return figure


def draw_seconds(axis: Axes, found: Mapping[str, Any]) -> None:
    """Draw what one waits for, by part."""
    left = np.zeros(len(found))
    for part, colour in PARTS.items():
        values = np.array([max(figure[part]["median"], 0) for figure in found.values()])
        axis.barh(list(found), values, left=left, color=colour, label=part)
        left += values
    for k, figure in enumerate(found.values()):
        scaled = "*" if figure.get("share_of_timesteps", 1) < 1 else ""
        axis.text(left[k], k, f" {left[k]:.1f}{scaled}", va="center", fontsize=8)
    starred = any(figure.get("share_of_timesteps", 1) < 1 for figure in found.values())
    axis.set_title("seconds of a process" + (" (* scaled up from a share)" if starred else ""), fontsize=10)  # fmt: skip
    axis.set_xlim(0, left.max() * 1.15)
    axis.legend(fontsize=8, frameon=False, loc="best")
    calm(axis)


def draw_rates(axis: Axes, found: Mapping[str, Any]) -> None:
    """Draw bytes per second of bandwidths, readings and jobs."""
    bars: dict[str, tuple[float, float, float, str]] = {}
    for name, rate in found["bandwidth"].items():
        bars[name] = (rate["median"], rate["min"], rate["max"], GREEN)
    size = found["recording"]["bytes"]
    for name, figure in found["jobs"].items():
        work = figure["work"]
        colour = FLOORS.get(name, BLUE)
        bars[name] = (size / work["median"], size / work["max"], size / work["min"], colour)
    if not bars:
        return
    for k, (middle, least, most, colour) in enumerate(bars.values()):
        axis.barh(k, middle / 1e9, color=colour)
        axis.plot([least / 1e9, most / 1e9], [k, k], color="0.2", lw=1.2)
        axis.text(most / 1e9, k, f"  {middle / 1e9:.3g}", va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), list(bars))
    axis.set_xscale("log")
    values = [bar[0] for bar in bars.values()]
    axis.set_xlim(min(values) / 3e9, max(values) * 5e-9)
    if "read" in found["jobs"]:
        floor = found["jobs"]["read"]["bytes_per_second"] / 1e9
        axis.axvline(floor, color=RED, lw=0.9, ls="--", label="reading: no audit can be faster")
        axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    axis.set_title("GB/s of work (line: range of the rounds)", fontsize=10)
    calm(axis)


def draw_memory(axis: Axes, found: Mapping[str, Any]) -> None:
    """Draw peak resident memory, and that of the device where it tells."""
    places = np.arange(len(found))
    resident = [figure["peak_resident_bytes"] / 1e9 for figure in found.values()]
    device = [figure["peak_device_bytes"] for figure in found.values()]
    told = any(value is not None for value in device)
    height = 0.4 if told else 0.8
    axis.barh(places - (0.2 if told else 0), resident, height, color=BLUE, label="resident")
    if told:
        values = [(value or 0) / 1e9 for value in device]
        axis.barh(places + 0.2, values, height, color=ORANGE, label="device")
        axis.legend(fontsize=8, frameon=False)
    for k, value in enumerate(resident):
        axis.text(value, k - (0.2 if told else 0), f" {value:.2f}", va="center", fontsize=8)
    axis.set_yticks(places, list(found))
    axis.set_xlim(0, max(resident) * 1.2)
    axis.set_title("peak memory, GB", fontsize=10)
    calm(axis)


def calm(axis: Axes) -> None:
    """Draw bars from the top, and little else."""
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, lw=0.5, axis="x")
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)


def curves(found: Mapping[str, Any]) -> Figure:
    """Draw each scaling curve with its fitted power, on logarithmic axes."""
    told = found["curves"]
    columns = min(3, max(1, len(told)))
    rows = max(1, math.ceil(len(told) / columns))
    figure = Figure(figsize=(4.4 * columns, 3.4 * rows + 0.6), layout="constrained")
    machine = found["machine"]
    figure.suptitle(
        f"Time of an audit's work: {machine['cores']} cores, backend {found['backend']}, medians of "
        f"{found['rounds']} rounds (bars: range)",
        fontsize=10,
    )
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, curve) in zip(axes, told.items(), strict=False):
        draw_curve(axis, name, curve)
    for axis in axes[len(told) :]:
        axis.set_visible(False)
    return figure


def draw_curve(axis: Axes, name: str, curve: Mapping[str, Any]) -> None:
    """Draw one curve."""
    points = curve["points"]
    xs = np.array([point["x"] for point in points])
    work = [point["work"] for point in points]
    middle = np.array([each["median"] for each in work])
    below, above = (abs(middle - [each[end] for each in work]) for end in ("min", "max"))
    axis.errorbar(xs, middle, yerr=[below, above], fmt="o", color=BLUE, ms=4, lw=1, capsize=2)
    if fit := curve.get("fit"):
        label = f"power {fit['exponent']:.2f} (residual x{fit['exponent_residual_factor']:.2f})"
        grid = np.geomspace(xs.min(), xs.max(), 100)
        axis.plot(
            grid, fit["factor"] * grid ** fit["exponent"], color=RED, lw=1, ls="--", label=label
        )
        label = f"{fit['fixed_seconds']:.2g} s + {fit['seconds_per_unit']:.2g} s each"
        line = fit["fixed_seconds"] + fit["seconds_per_unit"] * grid
        axis.plot(grid, np.where(line > 0, line, np.nan), color=GREEN, lw=1, ls=":", label=label)
        axis.legend(fontsize=8, frameon=False)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(xs, [f"{x:,}" for x in xs])
    axis.set_xticks([], minor=True)
    first = points[0]
    fixed = ", ".join(f"{first[key]:,} {key}" for key in ("steps", "tokens") if key != {"timesteps": "steps"}.get(name, name))  # fmt: skip
    axis.set_title(f"{name} ({fixed})", fontsize=10)
    axis.set_ylabel("seconds")
    axis.tick_params(labelsize=8, which="both")
    axis.grid(alpha=0.25, lw=0.5)
    axis.spines[["top", "right"]].set_visible(False)
