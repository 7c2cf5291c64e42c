"""Figures of comparisons of two models; each function takes an overview and returns a matplotlib Figure."""

import math

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from jaxaudit.divergence.account import share
from jaxaudit.divergence.overview import parting, worst_first
from jaxaudit.divergence.variables import NEVER, RUNS
from jaxaudit.ledger.verdict import number, short

#: Parameters that are drawn at most; more would not be readable.
SHOWN = 40

_NAME = 34  # characters of a parameter's name

# Okabe and Ito's palette, which colour-blind readers tell apart.
_A, _B, _APART = "#0072B2", "#D55E00", "#000000"


def parameters(overview: xr.Dataset) -> Figure:
    """Draw how far the models are apart over timesteps: all weights above, each parameter below, the worst on top.

    Args:
        overview: of two recorded models.
    """
    order = worst_first(overview)[:SHOWN]
    figure = Figure(figsize=(9, 0.24 * order.size + 4.2), layout="constrained")
    above, below = figure.subplots(
        2, 1, sharex=True, height_ratios=[2.2, max(0.24 * order.size, 0.6)]
    )
    t = overview.compared_timestep.values
    if not t.size:
        t = np.array([0])
    figure.suptitle(_headline(overview), fontsize=11, parse_math=False)
    _draw_totals(above, overview, t)
    _draw_parameters(below, overview, order, t)
    margin = max(0.02 * (t[-1] - t[0]), 0.5)
    below.set_xlim(t[0] - margin, t[-1] + margin)
    below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    below.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    below.set_xlabel("timestep")
    return figure


def lost_updates(overview: xr.Dataset) -> Figure:
    """Draw the share of lost updates of each parameter in both audits, those that differ most on top.

    Args:
        overview: of two audits of models.
    """
    shares = overview.lost_share.values
    apart = np.nan_to_num(np.abs(shares[0] - shares[1]), nan=-1.0)
    order = np.argsort(-apart, kind="stable")[:SHOWN]
    figure = Figure(figsize=(7.5, 0.24 * order.size + 1.8), layout="constrained")
    axis, places = figure.subplots(), np.arange(order.size)
    axis.hlines(places, *(100 * np.nan_to_num(s[order]) for s in shares), color="0.75", lw=2)
    for run, values, colour, marker in zip(RUNS, shares, (_A, _B), ("o", "D"), strict=True):
        axis.plot(100 * values[order], places, marker, color=colour, ms=6, label=run, alpha=0.85)
    _name_rows(axis, overview, order)
    axis.set_xlabel("% of the updates that left their weight as it was", parse_math=False)
    axis.set_xlim(-3, 103)
    axis.grid(axis="x", alpha=0.25, lw=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    if np.isfinite(shares).any():
        axis.legend(frameon=False, fontsize=9)
    else:
        axis.text(0.5, 0.5, "no audit counted updates", transform=axis.transAxes, ha="center")
    figure.suptitle("Lost updates in a and b, the largest difference first", fontsize=11)
    return figure


def _headline(overview: xr.Dataset) -> str:
    found = parting(overview)
    if found is None:
        return "Nothing differs in any parameter that is compared"
    timestep, tensor, places = found
    name = short(str(overview.parameter.values[places[0]]), _NAME)
    of = "" if len(places) == 1 else f" and {len(places) - 1:,} more"
    return f"First to differ: {tensor} of {name}{of}, at timestep {timestep:,}"


def _draw_totals(axis: Axes, overview: xr.Dataset, t: NDArray[np.int64]) -> None:
    drawn = False
    moved = overview.total_displacement_norm.values
    for values, style in (
        (moved[0], {"color": "0.7", "lw": 3, "label": "a moved since the start"}),
        (moved[1], {"color": "0.3", "lw": 1, "ls": "--", "label": "b moved since the start"}),
        (overview.total_distance.values, {"color": _APART, "lw": 1.6, "label": "a and b apart"}),
    ):
        known = np.isfinite(values) & (values > 0)
        drawn |= bool(known.any())
        if values.size:
            marker = {"marker": "o", "ms": 5} if values.size == 1 else {}
            axis.plot(t, np.where(known, values, np.nan), **style, **marker)
    if drawn:
        axis.set_yscale("log")
    end = overview.total_distance.values[-1:]
    told = f"; at the end {number(float(end[0]))}" if end.size and math.isfinite(end[0]) else ""
    axis.set_title(f"L2 distance of all weights{told}", fontsize=10, loc="left")
    axis.legend(fontsize=8.5, frameon=False, loc="best")
    axis.grid(alpha=0.25, lw=0.5)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_parameters(
    axis: Axes, overview: xr.Dataset, order: NDArray[np.int64], t: NDArray[np.int64]
) -> None:
    """Draw a row for each parameter, dark where the distance is small, and a mark at its first difference."""
    values = overview.relative_distance.values[order]
    known = np.isfinite(values) & (values > 0)
    places = np.arange(order.size + 1) - 0.5
    if known.any():
        low, high = values[known].min(), values[known].max()
        norm = LogNorm(low, high if high > low else 10 * low)
        mesh = axis.pcolormesh(_edges(t), places, np.where(known, values, np.nan), norm=norm, cmap="cividis", rasterized=True)  # fmt: skip
        axis.figure.colorbar(
            mesh, ax=axis, label="distance over the way of a", pad=0.01, fraction=0.05
        )
    first = overview.first_difference.sel(divergence_field="timestep").values[order]
    parted = np.flatnonzero(first != NEVER)
    axis.plot(first[parted], parted, "|", color="#D55E00", ms=9, mew=2.2)
    _name_rows(axis, overview, order)
    rest = overview.sizes["parameter"] - order.size
    more = f", and {rest:,} more that are nearer" if rest else ""
    worst = overview.relative_distance.values[order[0]]
    worst = worst[np.isfinite(worst)]
    told = (
        f"; the worst ends {share(float(worst[-1]))} of its way apart"
        if worst.size and worst[-1] > 0
        else ""
    )
    axis.set_title(
        f"each parameter, the worst on top{more}{told}; white: no difference, orange: the first one",
        fontsize=10,
        loc="left",
        parse_math=False,
    )


def _name_rows(axis: Axes, overview: xr.Dataset, order: NDArray[np.int64]) -> None:
    names = [short(str(overview.parameter.values[k]), _NAME) for k in order]
    axis.set_yticks(np.arange(order.size), names, fontsize=8, parse_math=False)
    axis.set_ylim(order.size - 0.4, -0.6)


def _edges(t: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return edges halfway between timesteps."""
    middle = (t[1:] + t[:-1]) / 2
    return np.concatenate([[t[0] - 0.5], middle, [t[-1] + 0.5]])


#: The figures of two recorded models, and of two audits of models, by file name.
FIGURES = {"parameters.png": parameters}
RESULT_FIGURES = {"lost_updates.png": lost_updates}
