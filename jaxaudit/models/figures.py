"""The figure of a model's overview."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from jaxaudit.ledger.verdict import percent, short

#: Parameters that are drawn at most; more would not be readable.
SHOWN = 40

_NAME = 34  # characters of a parameter's name

# Okabe and Ito's palette, which colour-blind readers tell apart.
_WRONG, _LOST, _NONE = "#D55E00", "#0072B2", "0.75"


def parameters(overview: xr.Dataset) -> Figure:
    """Draw mismatches and the share of lost updates of each parameter, each with the worst on top.

    Args:
        overview: of a model; without lost updates it has the first panel alone.
    """
    known = np.isfinite(overview.lost_share.values)
    panels = 1 + bool(known.any())
    rows = min(overview.sizes["parameter"], SHOWN)
    figure = Figure(figsize=(6.2 * panels, 0.24 * rows + 1.8), layout="constrained")
    figure.suptitle(f"{overview.sizes['parameter']:,} parameters, the worst first")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _draw_mismatches(axes[0], overview)
    if panels > 1:
        _draw_lost(axes[1], overview)
    return figure


def _draw_mismatches(axis: Axes, overview: xr.Dataset) -> None:
    values = np.maximum(overview.mismatch_total.values, 0).sum(axis=1)
    audited = overview.audited.values.any(axis=1)
    order = np.argsort(overview.rank_by_mismatches.values)
    shown = order[:SHOWN]
    texts = [f"{values[k]:,}" if audited[k] else "not audited" for k in shown]
    _bars(axis, overview, shown, values, texts, _WRONG)
    rest = order[SHOWN:]
    more = f"and {rest.size:,} more with {int(values[rest].sum()):,} in all" if rest.size else ""
    axis.set_xlabel("elements whose replayed bits differ", parse_math=False)
    axis.set_title(f"mismatches  {more}", fontsize=10, loc="left", parse_math=False)
    axis.set_xscale("symlog", linthresh=1)
    # A power of ten in which the longest bar leaves room for its number.
    axis.set_xlim(0, 10 ** (np.ceil(np.log10(max(1, values.max()) + 1)) + 1))


def _draw_lost(axis: Axes, overview: xr.Dataset) -> None:
    shares = np.nan_to_num(overview.lost_share.values)
    known = np.isfinite(overview.lost_share.values)
    order = np.argsort(overview.rank_by_lost_share.values)
    shown = order[:SHOWN]
    texts = [percent(float(shares[k]), 1.0) if known[k] else "none wanted" for k in shown]
    _bars(axis, overview, shown, 100 * shares, texts, _LOST)
    rest = order[SHOWN:]
    more = f"and {rest.size:,} more with less or as much" if rest.size else ""
    axis.set_xlabel("% of the updates that left their weight as it was", parse_math=False)
    axis.set_title(f"lost updates  {more}", fontsize=10, loc="left", parse_math=False)
    axis.set_xlim(0, 118)
    axis.set_xticks([0, 25, 50, 75, 100])


def _bars(
    axis: Axes,
    overview: xr.Dataset,
    shown: NDArray[np.int64],
    values: NDArray[np.generic],
    texts: list[str],
    colour: str,
) -> None:
    places = np.arange(shown.size)
    bars = axis.barh(places, values[shown].astype(np.float64), color=colour, height=0.72)
    axis.bar_label(bars, texts, padding=3, fontsize=7)
    names = [short(str(overview.parameter.values[k]), _NAME) for k in shown]
    axis.set_yticks(places, names, fontsize=8, parse_math=False)
    axis.set_ylim(shown.size - 0.4, -0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.25, lw=0.5)


#: The figures that the command writes, by file name.
FIGURES = {"parameters.png": parameters}
