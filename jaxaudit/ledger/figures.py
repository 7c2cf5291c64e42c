"""Figures of a ledger. Each function takes the datasets of its groups and returns a matplotlib Figure.

A figure to draw in may be given, or one part of it; otherwise a new one is made. Titles say what is seen in the data.
"""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from jaxaudit.ledger.remedies import MASTER, RECORDED
from jaxaudit.ledger.variables import REGIMES
from jaxaudit.ledger.verdict import (
    EXPECTED,
    group_names,
    number,
    onsets_of,
    percent,
    remedy_name,
    remedy_total,
    short,
    shown_groups,
    tokens_of,
    total,
)

#: What figures are drawn in.
Canvas = Figure | SubFigure

#: Groups in one figure, at most, and tokens that are followed.
MOST_GROUPS, MOST_TRACED = 4, 4

# Okabe and Ito's palette, which colour-blind readers tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_LINES = ("-", "--", "-.", ":")
_POINTS = ("o", "s", "^", "D")
_HATCHES = ("", "////", "....", "xxxx")
_REGIME_COLOURS = ("#D55E00", "#F0B84D", "#9AD0F0", "#0072B2")
_REGIME_HATCHES = ("", "....", "", "////")
_REGIME_MEANINGS = ("L2 > √D", "L∞ > 1", "L∞ ≤ 1", "no move")

#: Names of remedies beside the axis, where that of prose is not enough.
_NAMES = {
    EXPECTED: "stochastic rounding, on average",
    "stochastic-rounding": "stochastic rounding, one draw",
}

_WIDTH = 8.0  # inches
_TITLE = 84  # characters of a line
_BINS = 12  # of a histogram over all timesteps, at most


def cooling(lattice: xr.Dataset, figure: Canvas | None = None) -> Canvas:
    """Draw the shares of tokens by settled regime, a panel per group, over a logarithmic time axis."""
    counts = lattice.settled_regime_count
    first = counts.isel(timestep=0).sum("regime")
    sizes = {name: int(first.sel(token_group=name)) for name in group_names(lattice)}
    shown = shown_groups(lattice, MOST_GROUPS, sizes)
    names = group_names(lattice)
    figure = figure or _new(1.5 * len(shown) + 1.5)
    axes = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    seen = []
    for axis, name in zip(axes, shown, strict=True):
        part = counts.sel(token_group=name, regime=list(REGIMES)).values
        _areas(axis, lattice.timestep.values, part / max(sizes[name], 1))
        remark = _cooling_remark(lattice.timestep.values, part[-1], sizes[name])
        seen.append(f"{_whose(name, names, sizes[name])}: {remark}")
        _title(axis, seen[-1])
        axis.set_ylabel("tokens")
    chosen = next((k for k, name in enumerate(shown) if name == "dead"), 0)
    _headline(figure, f"How tokens cool down. {seen[chosen]}")
    axes[-1].set_xlabel("timestep (D elements of a token, displacement in ulp)")
    handles = axes[0].collections[:4]
    labels = [f"{r} ({m})" for r, m in zip(REGIMES, _REGIME_MEANINGS, strict=True)]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    _note_left_out(axes[-1], sizes, shown)
    return figure


def lost_updates(updates: xr.Dataset, figure: Canvas | None = None) -> Canvas:
    """Draw the share of wanted updates that is lost, and the visibility margin, over timesteps."""
    names = group_names(updates)
    sizes = {name: total(updates, "wanted_count", name) or 0 for name in names}
    shown = _without_all(shown_groups(updates, MOST_GROUPS + 1, sizes))
    figure = figure or _new(5.2)
    above, below = figure.subplots(2, 1, sharex=True)
    t, seen = updates.timestep.values, []
    for k, name in enumerate(shown):
        one = updates.sel(token_group=name)
        label = _whose(name, names)
        lost, wanted = one.lost_count.values, one.wanted_count.values
        share = np.where(wanted > 0, lost / np.maximum(wanted, 1), np.nan)
        above.plot(t, share, label=label, **_style(k, len(t)))
        _band(below, t, one.margin_quantile, k, label)
        if wanted.sum():
            seen.append(f"{percent(int(lost.sum()), int(wanted.sum()))} of {label}")
    _headline(
        figure, f"Wanted updates that changed nothing: {', '.join(seen[:2]) or 'none wanted'}"
    )
    above.set_ylim(-0.03, 1.03)
    above.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    _title(above, "share of the wanted updates that is lost")
    _title(
        below,
        "visibility margin: median and middle half; below 0 rounding to nearest loses the update",
    )
    for axis in (above, below):
        _calm(axis)
        _over_time(axis, t)
    below.axhline(0, color="black", lw=1)
    below.set_ylabel("log2 of update over half an ulp", fontsize=9)
    below.set_xlabel("timestep")
    _legend_below(figure, above)
    _note_left_out(below, sizes, shown)
    return figure


def ratchet(moments: xr.Dataset, figure: Canvas | None = None) -> Canvas:
    """Draw the root of the second moment, stored and kept in float32, of traced tokens, and the ratio of all."""
    figure = figure or _new(6.0)
    above, below = figure.subplots(2, 1, sharex=True)
    _trace(above, moments)
    names, t = group_names(moments), moments.timestep.values
    sizes = {name: total(moments, "root_ratio_count", name) or 0 for name in names}
    shown = _without_all(shown_groups(moments, MOST_GROUPS + 1, sizes))
    for k, name in enumerate(shown):
        quantiles = moments.root_ratio_quantile.sel(token_group=name)
        _band(below, t, quantiles, k, _whose(name, names))
    _calm(below)
    _over_time(below, t)
    below.axhline(1, color="black", lw=1)
    _log_y(below, least=8)
    _title(
        below, "root of the stored second moment over that of a float32 one: median and middle half"
    )
    below.set_ylabel("ratio")
    below.set_xlabel("timestep")
    _legend_below(figure, below)
    _headline(figure, _ratchet_title(moments))
    _note_left_out(below, sizes, shown)
    return figure


def freeze_onset(tokens: xr.Dataset, figure: Canvas | None = None) -> Canvas:
    """Draw when tokens moved last, as shares of each group; those that still move, or never did, on their own."""
    names = group_names(tokens)
    onsets = {name: onsets_of(tokens, name) for name in names}
    sizes = {name: len(found) for name, found in onsets.items()}
    shown = _without_all(shown_groups(tokens, MOST_GROUPS + 1, sizes))
    figure = figure or _new(3.8)
    axis = figure.subplots()
    _calm(axis)
    edges = _edges(tokens.timestep.values, [onsets[name] for name in shown])
    width, seen = 0.84 / len(shown), []
    for k, name in enumerate(shown):
        found = onsets[name]
        counts = [(found == 0).sum(), *np.histogram(found, edges)[0], (found < 0).sum()]
        at = np.arange(len(counts)) + (k - (len(shown) - 1) / 2) * width
        share = np.array(counts) / max(len(found), 1)
        label = _whose(name, names, len(found))
        axis.bar(at, share, width * 0.92, color=_COLOURS[k], hatch=_HATCHES[k], edgecolor="white", lw=0, label=label)  # fmt: skip
        seen.append(f"{int((found >= 0).sum()):,} of {label}")
    _headline(figure, f"Frozen at the end: {', '.join(seen[:2])}")
    _label_onsets(axis, edges)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axis.set_ylabel("share of the group's tokens")
    axis.set_xlabel("timestep of the last move")
    axis.legend(fontsize=9, frameon=False, loc="best")
    _note_left_out(axis, sizes, shown)
    return figure


def remedies(
    counterfactual: xr.Dataset,
    updates: xr.Dataset,
    tokens: xr.Dataset,
    figure: Canvas | None = None,
) -> Canvas:
    """Compare remedies: lost updates that would have landed, distance to float32 masters, and tokens that move.

    The first is one step ahead from the recorded weights; the others are at the end of a run over the recorded
    gradients, in which each is left to itself.
    """
    names = group_names(counterfactual)
    sizes = {name: len(onsets_of(tokens, name)) for name in names}
    shown = _without_all(shown_groups(counterfactual, MOST_GROUPS + 1, sizes))
    rows = [str(name) for name in counterfactual.remedy.values]
    figure = figure or _new(0.2 * len(rows) * (len(shown) + 1) + 2.2)
    axes = figure.subplots(1, 3, sharey=True)
    end = counterfactual.isel(timestep=-1).sel(remedy=rows)
    alone = np.array(rows) != EXPECTED  # an expectation is no run
    for k, name in enumerate(shown):
        at = np.arange(len(rows)) + 0.8 * ((k + 0.5) / len(shown) - 0.5)
        lost, size = total(updates, "lost_count", name) or 0, sizes[name]
        landed = [remedy_total(counterfactual, "recovered_count", row, name) for row in rows]
        apart = np.where(alone, end.free_distance.sel(token_group=name), np.nan)
        moving = np.where(alone, end.free_moving_tokens.sel(token_group=name), -1)
        _dots(axes[0], _shares(landed, lost), at, k, [_percent(n, lost) for n in landed])
        _dots(axes[1], apart, at, k, [number(x) if math.isfinite(x) else "" for x in apart])
        share = np.where(moving >= 0, _shares(moving, size), np.nan)
        _dots(axes[2], share, at, k, [f"{n:,}" for n in moving])
        axes[0].get_lines()[-1].set_label(_whose(name, names, size))
    _label_remedies(axes, rows, int(end.timestep))
    far = end.free_distance.sel(token_group=shown).values[alone]
    _leave_room(axes[1], max(far[np.isfinite(far)], default=0) or 1)
    _headline(figure, _remedies_title(end))
    _legend_below(figure, axes[0])
    _note_left_out(axes[1], sizes, shown)
    return figure


#: The figures that the command writes, by file name: the groups whose datasets they need, and the function.
FIGURES: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "cooling.png": (("lattice",), cooling),
    "lost_updates.png": (("updates",), lost_updates),
    "ratchet.png": (("moments",), ratchet),
    "freeze_onset.png": (("tokens",), freeze_onset),
    "remedies.png": (("counterfactual", "updates", "tokens"), remedies),
}


# Canvas and axes.


def _new(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _calm(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, lw=0.5)
    axis.tick_params(labelsize=9)


def _whose(group: str, names: Sequence[str], count: int = 0) -> str:
    """Name a group's tokens; a dollar sign in its name begins no formula."""
    return tokens_of(group, names, count).replace("$", r"\$")


def _title(axis: Axes, text: str) -> None:
    axis.set_title(text, fontsize=10, loc="left")


def _headline(figure: Canvas, text: str) -> None:
    """Set the figure's title, broken into lines of about one length that fit."""
    count = -(-len(text) // _TITLE)
    figure.suptitle("\n".join(textwrap.wrap(text, len(text) // count + 8)), fontsize=11.5)


def _style(k: int, length: int) -> dict[str, Any]:
    """Return a line's colour and pattern; a single timestep is a point."""
    style: dict[str, Any] = {"color": _COLOURS[k], "ls": _LINES[k], "lw": 1.4}
    return style | ({"marker": _POINTS[k], "ms": 6} if length == 1 else {})


def _legend_below(figure: Canvas, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)


def _note_left_out(axis: Axes, sizes: Mapping[str, int], shown: Sequence[str]) -> None:
    """Say how many groups are not shown; `all` and empty ones do not count."""
    left = [name for name, size in sizes.items() if size and name not in (*shown, "all")]
    if left:
        some = "1 more group is" if len(left) == 1 else f"{len(left)} more groups are"
        axis.set_xlabel(f"{axis.get_xlabel()}\n{some} not shown")


def _without_all(shown: list[str]) -> list[str]:
    """Leave out `all` where it is only the sum of the others, and no more than there is room for."""
    others = [name for name in shown if name != "all"]
    return (others if len(others) > 1 else shown)[:MOST_GROUPS]


def _over_time(axis: Axes, t: NDArray[np.int64]) -> None:
    """Let an axis span the timesteps, with whole numbers; say so where there is nothing to see on it."""
    margin = max(0.02 * (t[-1] - t[0]), 0.5)
    axis.set_xlim(t[0] - margin, t[-1] + margin)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if not any(np.isfinite(np.asarray(line.get_ydata(), float)).any() for line in axis.get_lines()):
        axis.text(0.5, 0.6, "no finite numbers", transform=axis.transAxes, ha="center", fontsize=10)


def _log_y(axis: Axes, least: float) -> None:
    """Make the axis logarithmic where its numbers differ by this factor at least."""
    drawn = [np.asarray(line.get_ydata(), float) for line in axis.get_lines()]
    values = np.concatenate([found[np.isfinite(found) & (found > 0)] for found in drawn])
    if len(values) and values.max() >= least * values.min():
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        centre, half = math.sqrt(low * high), max(math.sqrt(high / low), math.sqrt(10))
        axis.set_ylim(centre / half, centre * half)  # a decade at least


def _band(axis: Axes, t: NDArray[np.int64], quantiles: xr.DataArray, k: int, label: str) -> None:
    """Draw the median over timesteps, and the middle half as a band, or as a bar for one timestep."""
    low, median, high = (
        quantiles.sel(quantile=q, method="nearest").values for q in (0.25, 0.5, 0.75)
    )
    axis.plot(t, median, label=label, **_style(k, len(t)))
    if len(t) == 1:
        axis.plot([t[0], t[0]], [low[0], high[0]], color=_COLOURS[k], lw=4, alpha=0.3)
    else:
        axis.fill_between(t, low, high, color=_COLOURS[k], alpha=0.18, lw=0)


# Cooling.


def _areas(axis: Axes, t: NDArray[np.int64], shares: NDArray[np.float64]) -> None:
    """Stack shares (regime, timestep); each timestep reaches up to the next."""
    edges = np.append(t, t[-1] + 1)
    shares = np.concatenate([shares, shares[:, -1:]], axis=1)
    areas = axis.stackplot(edges, shares, colors=_REGIME_COLOURS, step="post", lw=0)
    for area, hatch in zip(areas, _REGIME_HATCHES, strict=True):
        area.set_hatch(hatch)
        area.set_edgecolor("white")
    axis.set_xscale("log")
    axis.set_xlim(edges[0], edges[-1])
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axis.set_yticks([0, 0.5, 1])
    axis.tick_params(labelsize=9)
    _plain_log_x(axis)


def _plain_log_x(axis: Axes) -> None:
    """Label a logarithmic axis of timesteps with whole numbers."""
    low, high = axis.get_xlim()
    if high < 20 * low:
        axis.set_xticks(np.unique(np.linspace(low, high - 1, 5).round()))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _cooling_remark(t: NDArray[np.int64], frozen: NDArray[np.int64], size: int) -> str:
    """Say when half of a group's tokens are frozen, or how many are in the end."""
    if not size:
        return "none"
    end = int(frozen[-1])
    found = "all" if end == size else f"{end:,}" if end else "none"
    half = 2 * frozen >= size
    if not half.any():
        return f"{found} frozen at the end"
    since = f"frozen from timestep {int(t[np.argmax(half)]):,} on"
    return since if size == 1 else f"half {since}, {found} at the end"


# The ratchet.


def _trace(axis: Axes, moments: xr.Dataset) -> None:
    """Draw stored roots solid and float32 roots dashed, a colour for each token."""
    _calm(axis)
    t, count = moments.timestep.values, moments.sizes["traced_token"]
    chosen = np.unique(np.linspace(0, count - 1, min(count, MOST_TRACED)).astype(int))
    for k, index in enumerate(chosen):
        one = moments.isel(traced_token=index)
        group = short(str(one.traced_group.values), 18).replace("$", r"\$")
        label = f"token {int(one.traced_token):,} ({group})"
        style = _style(k, len(t))
        axis.plot(t, _positive(one.float32_root), **style)
        axis.get_lines()[-1].set(ls=(0, (4, 2)), lw=1.1)
        axis.plot(t, _positive(one.stored_root), **style, label=label)
        axis.get_lines()[-1].set_linestyle("-")
    _title(axis, "root of the token's mean second moment: stored (solid), kept in float32 (dashed)")
    axis.set_ylabel("√ exp_avg_sq")
    _over_time(axis, t)
    _log_y(axis, least=1)
    if count:
        axis.legend(fontsize=9, framealpha=0.85, edgecolor="none", loc="best", ncols=2)


def _positive(values: xr.DataArray) -> NDArray[np.float64]:
    """Leave gaps where there is nothing to draw on a logarithmic axis."""
    return np.where(values.values > 0, values.values, np.nan)


def _ratchet_title(moments: xr.Dataset) -> str:
    should = total(moments, "exp_avg_sq_fall_count", "all") or 0
    stuck = total(moments, "exp_avg_sq_stuck_count", "all") or 0
    if not should:
        return "The second moment never should have fallen"
    what = f"The second moment did not fall in {percent(stuck, should)} of the cases in which it should have"
    if stuck == should:
        what = "The second moment never fell where it should have"
    if not stuck:
        what = "The second moment always fell where it should have"
    ratios = moments.root_ratio_quantile.sel(token_group="all").sel(quantile=0.5, method="nearest")
    last = float(ratios.values[-1])
    if math.isfinite(last) and last > 1:
        what += f"; its root ends at least {number(last)} times that of a float32 one (median)"
    return what


# The freeze.


def _edges(t: NDArray[np.int64], onsets: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return whole edges of bins, about equally wide on a logarithmic axis, from the first onset to the end."""
    found = np.concatenate(onsets)
    first, end = int(min(found[found > 0], default=t[0])), int(t[-1]) + 1
    edges = np.geomspace(first, end, min(_BINS, end - first) + 1).round().astype(np.int64)
    return np.unique(np.concatenate([[first], edges, [end]]))


def _label_onsets(axis: Axes, edges: NDArray[np.int64]) -> None:
    """Name each bin by its first and last timestep."""
    spans = zip(edges[:-1].tolist(), (edges[1:] - 1).tolist(), strict=True)
    named = [f"{a:,}" if a == b else f"{a:,}-{b:,}" for a, b in spans]
    ticks = ["never moved", *named, "still moving"]
    axis.set_xticks(range(len(ticks)), ticks, fontsize=8.5)
    for label in axis.get_xticklabels() if len(named) > 4 else []:
        label.set(rotation=40, ha="right", rotation_mode="anchor")
    axis.tick_params(axis="x", length=0)
    axis.grid(visible=False, axis="x")
    for border in (0.5, len(ticks) - 1.5):
        axis.axvline(border, color="0.6", lw=0.8, ls=":")


# Remedies.


def _shares(parts: Sequence[float] | NDArray[Any], whole: int) -> NDArray[np.float64]:
    return np.asarray(parts, float) / (whole or math.nan)


def _percent(part: float, whole: int) -> str:
    if not whole or not math.isfinite(part):
        return ""
    return percent(part, whole).replace("more than", ">").replace("less than", "<")


def _dots(
    axis: Axes, values: NDArray[np.float64], at: NDArray[Any], k: int, told: Sequence[str]
) -> None:
    """Draw a group's numbers as points, each with its text beside it."""
    axis.plot(values, at, _POINTS[k], color=_COLOURS[k], ms=6)
    for x, y, text in zip(values, at, told, strict=True):
        if math.isfinite(x):
            axis.annotate(
                text, (x, y), (6, 0), textcoords="offset points", va="center", fontsize=8.5
            )


def _label_remedies(axes: Sequence[Axes], rows: Sequence[str], last: int) -> None:
    _title(axes[0], "lost updates that would\nhave landed, one step\nahead")
    _title(axes[1], "L2 distance to float32\nmasters, left to itself,\ntimestep " + f"{last:,}")
    _title(axes[2], "tokens still moving,\nleft to itself,\ntimestep " + f"{last:,}")
    for axis in axes:
        _calm(axis)
        axis.grid(visible=False, axis="y")
        for border in range(1, len(rows)):
            axis.axhline(border - 0.5, color="0.85", lw=0.8)
        axis.tick_params(axis="y", length=0)
    for axis in (axes[0], axes[2]):
        _leave_room(axis, 1)
        axis.set_xticks([0, 0.5, 1])
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes[0].set_yticks(range(len(rows)), [_row_label(row) for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)


def _leave_room(axis: Axes, far: float) -> None:
    """Leave room for the texts beside points that lie between 0 and `far`."""
    axis.set_xlim(-0.06 * far, 1.6 * far)


def _row_label(name: str) -> str:
    found = name if name == RECORDED else _NAMES.get(name) or remedy_name(name)
    return "\n".join(textwrap.wrap(found, 22))


def _remedies_title(end: xr.Dataset) -> str:
    """Say what comes nearest to float32 masters in the end."""
    apart = {
        str(name): float(end.free_distance.sel(remedy=name, token_group="all"))
        for name in end.remedy.values
    }
    usable = {n: x for n, x in apart.items() if n not in (MASTER, EXPECTED) and math.isfinite(x)}
    if not usable or MASTER not in apart:
        return "Remedies compared, over the recorded gradients"
    best = min(usable, key=lambda name: usable[name])
    if usable[best] >= usable.get(RECORDED, math.inf):
        return "Over the recorded gradients, no remedy ends nearer to float32 masters than the recorded arithmetic"
    return f"Over the recorded gradients, {remedy_name(best)} ends nearest to float32 masters"
