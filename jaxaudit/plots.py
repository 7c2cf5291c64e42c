"""Figures of an audit's dataset. Each function takes the dataset and returns a matplotlib Figure."""

from collections.abc import Iterable

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKS = ("-", "--", ":", "-.")


def accounting(dataset: xr.Dataset, arithmetic: str | None = None) -> Figure:
    """Draw the norms of replayed and recorded change and of their difference, a panel per token group.

    Args:
        dataset: of an audit.
        arithmetic: which one; by default the first, the identified one where there is one.
    """
    name = arithmetic or str(dataset.arithmetic.values[0])
    one = dataset.sel(arithmetic=name)
    groups = [str(group) for group in dataset.token_group.values]
    figure, axes = _panels(len(groups), f"Weight change per timestep, replayed under {name}")
    for group, axis in zip(groups, axes, strict=True):
        part = one.sel(token_group=group)
        t = part.timestep.values
        axis.plot(t, _positive(part.norm_observed), color="0.55", lw=3.2, label="recorded")
        axis.plot(t, _positive(part.norm_predicted), color=_COLOURS[0], lw=1.1, label="replayed")
        difference = _positive(part.norm_difference)
        exact = not np.isfinite(difference).any()
        label = "difference (zero throughout)" if exact else "difference"
        axis.plot(t, difference, color=_COLOURS[1], lw=0.9, ls="--", label=label)
        frozen = int((part.norm_observed == 0).sum())
        title = _group_title(group, part, f"{frozen} timesteps without any change")
        axis.set_title(title, parse_math=False)  # a dollar sign begins no formula
        axis.set_ylabel("L2 norm")
        _log(axis)
        axis.legend(fontsize=8, frameon=False, loc="best")
    return figure


def agreement(dataset: xr.Dataset) -> Figure:
    """Draw ratio and cosine of replayed against recorded change, every arithmetic, per token group."""
    groups = [str(group) for group in dataset.token_group.values]
    weights = dataset.mismatch_count.sel(stage="param", token_group="all")
    lines = _together(weights)
    figure = Figure(figsize=(9.5, 2.4 * len(groups) + 1), layout="constrained")
    figure.suptitle("Replayed against recorded change: 1 is agreement")
    axes = figure.subplots(len(groups), 2, squeeze=False, sharex=True)
    for row, group in zip(axes, groups, strict=True):
        part = dataset.sel(token_group=group)
        for axis, variable in zip(row, ("ratio", "cosine_similarity"), strict=True):
            # The first, the identified one, is drawn last, on top of the others.
            for k, (label, a) in reversed([*enumerate(lines)]):
                values = part[variable].isel(arithmetic=a)
                colour, mark = _style(k)
                width = 1.3 if k == 0 else 0.8
                axis.plot(part.timestep, values, mark, color=colour, lw=width, label=label)
            title = f"{group}: {variable.replace('_', ' ')}"
            axis.set_title(title, fontsize=10, loc="left", parse_math=False)
            axis.set_xlabel("timestep" if group == groups[-1] else "")
            _calm(axis)
    _legend_above(figure, axes[0][0])
    return figure


def mismatches(dataset: xr.Dataset) -> Figure:
    """Draw the share of elements whose bits differ, a panel per stage, a line per arithmetic."""
    whole = dataset.sel(token_group="all")
    stages = [str(stage) for stage in dataset.stage.values]
    figure, axes = _panels(
        len(stages), "Elements whose replayed bits differ from the recorded ones"
    )
    for stage, axis in zip(stages, axes, strict=True):
        for k, (name, a) in enumerate(_together(whole.mismatch_count.sel(stage=stage))):
            part = whole.sel(stage=stage).isel(arithmetic=a)
            if not int(part.audited):
                label, share = f"{name}: not audited", np.full(part.sizes["timestep"], np.nan)
            else:
                total = int(part.mismatch_count.sum())
                label = f"{name}: {total:,} in all" if total else f"{name}: none"
                share = part.mismatch_count.values / int(whole.element_count)
            colour, mark = _style(k)
            axis.plot(part.timestep, share, mark, color=colour, lw=1.2, label=label)
        axis.set_title(stage, fontsize=10, loc="left")
        axis.set_ylabel("share of elements")
        axis.set_ylim(-0.03, 1.03)
        axis.set_yscale("symlog", linthresh=1e-4)
        axis.set_ylim(-2e-5, 2)
        axis.legend(fontsize=8, frameon=False, loc="best")
    return figure


#: The figures that the command writes, by file name.
FIGURES = {
    "accounting.png": accounting,
    "agreement.png": agreement,
    "mismatches.png": mismatches,
}


def _together(counts: xr.DataArray) -> list[tuple[str, int]]:
    """Name the lines to draw, with the number of an arithmetic: those without a mismatch share one.

    Args:
        counts: mismatches (arithmetic, timestep); negative where nothing was audited.
    """
    names = [str(name) for name in counts.arithmetic.values]
    exact = [a for a in range(len(names)) if not counts.isel(arithmetic=a).any()]
    lines = [(names[a], a) for a in range(len(names)) if a not in exact[1:]]
    shared = "\n".join(names[a] for a in exact)
    return [(shared if a in exact else name, a) for name, a in lines]


def _style(k: int) -> tuple[str, str]:
    return _COLOURS[k % len(_COLOURS)], _MARKS[k % len(_MARKS)]


def _panels(count: int, title: str) -> tuple[Figure, Iterable[Axes]]:
    figure = Figure(figsize=(8, 2.3 * count + 0.6), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
    for axis in axes:
        _calm(axis)
    axes[-1].set_xlabel("timestep")
    return figure, axes


def _calm(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, lw=0.5)


def _log(axis: Axes) -> None:
    if any(np.isfinite(line.get_ydata()).any() for line in axis.get_lines()):
        axis.set_yscale("log")


def _positive(values: xr.DataArray) -> np.ndarray:
    """Leave gaps where there is nothing to draw on a logarithmic axis."""
    return np.where(values.values > 0, values.values, np.nan)


def _group_title(group: str, part: xr.Dataset, remark: str) -> str:
    return f"{group} ({int(part.element_count):,} elements): {remark}"


def _legend_above(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
