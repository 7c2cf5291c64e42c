"""Figures of a comparison. Each function takes its dataset and returns a matplotlib Figure; titles say what is seen."""

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from jaxaudit.divergence.account import parting
from jaxaudit.divergence.variables import NEVER, RUNS
from jaxaudit.ledger.verdict import number, percent
from jaxaudit.safetensors_file import short

#: Groups in one figure, at most.
MOST_GROUPS = 4

# Okabe and Ito's palette, which colour-blind readers tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))

_WIDTH = 8.0  # inches
_TITLE = 84  # characters of a line


def growth(dataset: xr.Dataset) -> Figure:
    """Draw the distance of the weights over timesteps, how far they moved, and the angle between both moves."""
    weights = dataset.sel(tensor="param")
    names, t = _groups(dataset), dataset.timestep.values
    figure = _new(6.4)
    above, below = figure.subplots(2, 1, sharex=True)
    moved = dataset.displacement_norm.sel(token_group="all")
    for run, style in zip(
        RUNS, ({"color": "0.7", "lw": 3.2}, {"color": "0.15", "lw": 0.9, "ls": "--"}), strict=True
    ):
        _plot(
            above, t, _positive(moved.sel(run=run)), label=f"moved since the start: {run}", **style
        )
    for k, name in enumerate(names):
        style = _style(k)
        _plot(above, t, _positive(weights.distance.sel(token_group=name)), label=f"distance: {_shown(name)}", **style)  # fmt: skip
        apart = 1 - dataset.displacement_cosine.sel(token_group=name)
        _plot(below, t, _positive(apart), label=_shown(name), **style)
    _title(above, "L2 distance of the weights, and L2 norm of their displacement since the start")
    _title(below, "1 - cosine of the two displacements: 0 is one direction, 1 a right angle")
    for axis in (above, below):
        _calm(axis, t)
        _log_y(axis)
    below.set_xlabel("timestep")
    above.legend(fontsize=8.5, frameon=False, loc="best", ncols=2)
    end = weights.isel(timestep=-1).sel(token_group="all")
    far, way = float(end.distance), float(moved.isel(timestep=-1).sel(run="a"))
    told = f"At timestep {int(t[-1]):,} the weights are {number(far)} apart (L2)"
    if math.isfinite(far) and way > 0:
        told += f", {percent_of(far, way)} of the way that a has gone"
    _headline(figure, told)
    return figure


def differing(dataset: xr.Dataset) -> Figure:
    """Draw the share of elements that differ, a panel per token group, a line per tensor."""
    names, t = _groups(dataset), dataset.timestep.values
    figure = _new(2.0 * len(names) + 1.3)
    axes = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
    for axis, name in zip(axes, names, strict=True):
        size = int(dataset.element_count.sel(token_group=name))
        for k, tensor in enumerate(map(str, dataset.tensor.values)):
            one = dataset.sel(tensor=tensor, token_group=name)
            total = int(one.differing_count.sum())
            label = tensor if total else f"{tensor} (never)"
            _plot(axis, t, one.differing_count.values / max(size, 1), label=label, **_style(k))
        _title(axis, f"{_shown(name)} ({size:,} elements)")
        _calm(axis, t)
        axis.set_ylim(-0.03, 1.03)
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axis.set_ylabel("elements that differ", fontsize=9)
        axis.legend(fontsize=8.5, frameon=False, loc="best", ncols=2)
    axes[-1].set_xlabel("timestep")
    found = parting(dataset)
    _headline(
        figure,
        "Nothing differs"
        if found is None
        else f"First to differ: {found[1]}, at timestep {found[0]:,}",
    )
    return figure


def ulps(dataset: xr.Dataset, tensor: str = "param") -> Figure:
    """Draw the histogram of the distances in ulp over timesteps, a panel per token group."""
    names, t = _groups(dataset), dataset.timestep.values
    one = dataset.sel(tensor=tensor)
    figure = _new(2.2 * len(names) + 1.3)
    axes = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
    highest = int(np.flatnonzero(one.ulp_histogram.sum(["timestep", "token_group"]).values)[-1])
    bins = np.arange(max(highest, 3) + 1)
    scale = LogNorm(1e-5, 1)
    image = None
    for axis, name in zip(axes, names, strict=True):
        size = int(dataset.element_count.sel(token_group=name))
        counts = one.ulp_histogram.sel(token_group=name).values[:, : len(bins)]
        shares = np.where(counts > 0, counts / max(size, 1), np.nan)
        edges = np.append(t, t[-1] + 1) - 0.5
        image = axis.pcolormesh(edges, np.append(bins, len(bins)) - 0.5, np.maximum(shares, 1e-5).T, norm=scale, cmap="cividis", rasterized=True)  # fmt: skip
        chosen = bins[:: max(1, len(bins) // 8)]
        axis.set_yticks(chosen, [_bin(int(k)) for k in chosen], fontsize=8.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylabel("distance, ulp", fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        same = percent(int(counts[-1, 0]), size) if size else "none"
        _title(axis, f"{_shown(name)}: at distance 0 at the last timestep: {same}")
    axes[-1].set_xlabel("timestep")
    if image is not None:
        figure.colorbar(image, ax=axes, label="share of the elements", fraction=0.05, pad=0.02)
    last = int(one.max_ulp_distance.sel(token_group="all").values[-1])
    what = "weights" if tensor == "param" else tensor
    told = f"Distance of the {what} in ulp of {one.ulp_format.values}: up to {last:,} at the last timestep"
    signs = one.max_ulp_distance.max() > 1 << 13
    _headline(figure, told + (" (the farthest have changed sign)" if signs else ""))
    return figure


def parted(dataset: xr.Dataset, tensor: str = "param") -> Figure:
    """Draw the share of tokens that have parted, over a logarithmic time axis, per token group."""
    names, t = _groups(dataset), dataset.timestep.values
    first = dataset.first_divergence.sel(tensor=tensor).values
    figure = _new(3.8)
    axis = figure.subplots()
    seen = []
    for k, name in enumerate(names):
        inside = dataset.in_group.sel(token_group=name).values == 1
        found = np.sort(first[inside & (first != NEVER)])
        size = int(inside.sum())
        share = np.searchsorted(found, t, side="right") / max(size, 1)
        axis.step(t, share, where="post", label=f"{_shown(name)} ({size:,} tokens)", **_style(k))
        if len(found) and 2 * len(found) >= size:
            half = int(found[(size + 1) // 2 - 1])
            seen.append(f"half of the {_shown(name)} ones by timestep {half:,}")
        else:
            seen.append(f"{len(found):,} of {size:,} {_shown(name)} ones at all")
    _calm(axis, t)
    if t[-1] >= 20 * t[0]:
        axis.set_xscale("log")
        axis.set_xlim(t[0], t[-1])
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_ylim(-0.03, 1.03)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axis.set_ylabel("tokens that have differed", fontsize=9)
    axis.set_xlabel("timestep")
    axis.legend(fontsize=9, frameon=False, loc="best")
    what = "weights" if tensor == "param" else tensor
    _headline(figure, f"When the {what} of tokens part: {', '.join(seen[:2])}")
    return figure


def updates(dataset: xr.Dataset) -> Figure:
    """Draw the share of wanted updates that is lost in two audits, a panel per token group."""
    names, t = _groups(dataset), dataset.timestep.values
    figure = _new(2.0 * len(names) + 1.3)
    axes = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
    seen = []
    for axis, name in zip(axes, names, strict=True):
        told = []
        for k, run in enumerate(RUNS):
            one = dataset.sel(run=run, token_group=name)
            lost, wanted = one.lost_count.values, one.wanted_count.values
            share = np.where(wanted > 0, lost / np.maximum(wanted, 1), np.nan)
            whole = percent(int(lost.sum()), int(wanted.sum())) if wanted.sum() else "none wanted"
            told.append(f"{whole} in {run}")
            _plot(axis, t, share, label=f"{run}: {whole}", **(_style(k) | {"lw": 2.6 - 1.4 * k}))
        seen.append(f"{_shown(name)} {', '.join(told)}")
        _title(axis, _shown(name))
        _calm(axis, t)
        axis.set_ylim(-0.03, 1.03)
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axis.set_ylabel("lost updates", fontsize=9)
        axis.legend(fontsize=8.5, frameon=False, loc="best")
    axes[-1].set_xlabel("timestep")
    _headline(figure, f"Wanted updates that changed nothing: {'; '.join(seen[:2])}")
    return figure


#: The figures that the command writes, by file name: the variable without which there is none, and the function.
FIGURES: dict[str, tuple[str, Callable[[xr.Dataset], Figure]]] = {
    "growth.png": ("displacement_cosine", growth),
    "differing.png": ("differing_count", differing),
    "ulps.png": ("ulp_histogram", ulps),
    "parted.png": ("first_divergence", parted),
    "updates.png": ("lost_count", updates),
}


def percent_of(part: float, whole: float) -> str:
    """Write a ratio as a percentage, which may be above 100."""
    return percent(part, whole) if part <= whole else f"{number(100 * part / whole)} %"


def _groups(dataset: xr.Dataset) -> list[str]:
    """Choose the groups to draw: `all` only where it is not the sum of two others, and none that is empty."""
    names = [str(name) for name in dataset.token_group.values]
    if "element_count" in dataset:
        sizes = dataset.element_count
        names = [name for name in names if name == "all" or int(sizes.sel(token_group=name))]
    others = [name for name in names if name != "all"]
    return (others if len(others) > 1 else names)[:MOST_GROUPS]


def _shown(name: str) -> str:
    """Show a group's name; a dollar sign in it begins no formula."""
    return short(name)[:28].replace("$", r"\$")


def _bin(k: int) -> str:
    """Name a bin of distances."""
    if k < 3:
        return str(k)
    low, high = (1 << (k - 2)) + 1, 1 << (k - 1)
    return f"{low:,}-{high:,}" if high < 1 << 14 else f"to 2^{k - 1}"


def _new(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _style(k: int) -> dict[str, Any]:
    return {"color": _COLOURS[k % len(_COLOURS)], "ls": _LINES[k % len(_LINES)], "lw": 1.4}


def _plot(axis: Axes, t: NDArray[np.int64], values: NDArray[np.float64], **style: Any) -> None:
    axis.plot(t, values, **style, **({"marker": "o", "ms": 6} if len(t) == 1 else {}))


def _positive(values: xr.DataArray) -> NDArray[np.float64]:
    """Leave gaps where there is nothing to draw on a logarithmic axis."""
    return np.where((values.values > 0) & np.isfinite(values.values), values.values, np.nan)


def _calm(axis: Axes, t: NDArray[np.int64]) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, lw=0.5)
    axis.tick_params(labelsize=9)
    margin = max(0.02 * (t[-1] - t[0]), 0.5)
    axis.set_xlim(t[0] - margin, t[-1] + margin)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _log_y(axis: Axes) -> None:
    """Make the axis logarithmic where there is a number to draw; else say that there is none."""
    drawn: Sequence[Any] = [np.asarray(line.get_ydata(), float) for line in axis.get_lines()]
    if any(np.isfinite(values).any() for values in drawn):
        axis.set_yscale("log")
    else:
        axis.text(0.5, 0.5, "no number above 0", transform=axis.transAxes, ha="center", fontsize=10)


def _title(axis: Axes, text: str) -> None:
    axis.set_title(text, fontsize=10, loc="left")


def _headline(figure: Figure, text: str) -> None:
    """Set the figure's title, broken into lines of about one length that fit."""
    count = -(-len(text) // _TITLE)
    figure.suptitle("\n".join(textwrap.wrap(text, len(text) // count + 8)), fontsize=11.5)
