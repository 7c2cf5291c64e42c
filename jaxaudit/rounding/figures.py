"""Figures of a rounding certificate. Each function takes the dataset and returns a matplotlib Figure."""

import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, NullLocator

from jaxaudit.rounding.tables import REFERENCES, Cell, cells, names, percent, ulp

#: Rows of the number line, at most.
NUMBER_LINES = 8

#: Binades of the subnormal numbers, from the lowest to the one below the smallest normal number.
SUBNORMAL = {"float32 and bfloat16": (-149, -127), "float16": (-24, -15)}

_EXACT, _UNKNOWN, _LINE = "#F4F6F8", "#D9D9D9", "#444444"
_BAR, _SHADES = "#0072B2", ("#E69F00", "#009E73")

_CELL = (0.56, 0.215)  # inches
_TITLE = 125  # characters
_SMALLEST = 1e-9  # share at which the colours start, at the lowest


def heat_map(dataset: xr.Dataset, reference: str | None = None) -> Figure:
    """Draw the share of results that differ, operation by mode, in colours on a logarithmic scale.

    A pale cell with a dot is exact: not one result differs. A hatched one was not compared.

    Args:
        dataset: of `cross_check`.
        reference: which the results are compared with; by default each with which anything was compared,
            side by side.
    """
    found, operations = cells(dataset), names(dataset, "operation")
    references = [reference] if reference else _compared_references(dataset)
    columns = {r: _modes(dataset, r) for r in references}
    figure, axes = _heat_panels(len(operations), [len(m) for m in columns.values()])
    norm, colours = (
        _norm([c.share for (_, _, r), c in found.items() if r in references]),
        _colours(),
    )
    for axis, (name, modes) in zip(axes, columns.items(), strict=True):
        grid = [[found[operation, mode, name] for mode in modes] for operation in operations]
        _draw_grid(axis, grid, norm, colours)
        _label_grid(axis, modes, operations if axis is axes[0] else [])
        axis.set_title(f"against {REFERENCES.get(name, name)}", fontsize=11, pad=8)
        _separate(axis, operations, named=axis is axes[-1])
    figure.suptitle("Share of results whose bits differ", fontsize=13)
    _explain_colours(figure, axes[-1], norm, colours)
    return figure


def number_line(dataset: xr.Dataset) -> Figure:
    """Draw where on the number line results differ, for the operations of `worst_differences`."""
    found, worst = cells(dataset), worst_differences(dataset)
    figure = Figure(figsize=(9.5, 1.75 * max(len(worst), 1) + 1.2), layout="constrained")
    figure.suptitle("Where on the number line results differ")
    if not worst:
        figure.text(0.5, 0.5, "No result differs from its reference.", ha="center", va="center")
        return figure
    axes = figure.subplots(len(worst), 1, squeeze=False, sharex=True)[:, 0]
    for axis, key in zip(axes, worst, strict=True):
        _draw_line(axis, dataset, key)
        axis.set_title(_line_title(key, found[key]), fontsize=9, loc="left")
    _label_binades(axes[-1])
    figure.supylabel("share of the binade's results that differ", fontsize=10)
    handles = [
        Patch(color=colour, alpha=0.25, lw=0, label=f"subnormal in {name}")
        for name, colour in zip(SUBNORMAL, _SHADES, strict=True)
    ]
    handles.append(Patch(facecolor="white", edgecolor="0.6", hatch="////", label="not compared"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    return figure


#: The figures that the command writes, by file name.
FIGURES = {
    "rounding_heat_map.png": heat_map,
    "rounding_number_line.png": number_line,
}


def worst_differences(dataset: xr.Dataset, count: int = NUMBER_LINES) -> list[tuple[str, str, str]]:
    """Choose operation, mode and reference with large shares of differences, not all alike.

    At most one per operation. Each cause is there, the worst first, where it stands alone as far as it does
    so anywhere; what is then left of the number goes to the largest shares.
    """
    found = {key: cell for key, cell in cells(dataset).items() if cell.differing}
    by_share = sorted(found, key=lambda key: -found[key].share)
    kinds = {key: _kinds(found[key]) for key in by_share}
    chosen: dict[str, tuple[str, str, str]] = {}  # by operation
    for kind in dict.fromkeys(itertools.chain(*kinds.values())):
        free = [key for key in by_share if key[0] not in chosen and kind in kinds[key]]
        if free:
            key = min(free, key=lambda key: len(kinds[key]))  # the first, and worst, of these
            chosen[key[0]] = key
    for key in by_share:
        chosen.setdefault(key[0], key)
    return sorted([*chosen.values()][:count], key=lambda key: -found[key].share)


def _kinds(cell: Cell) -> list[str]:
    """List the causes, which are alike for all formats."""
    return [re.sub(r"b?float\d+", "a format", cause) for cause, _ in cell.explanations]


def family(operation: str) -> str:
    """Return the family of an operation, by its name."""
    what = operation.partition(" ")[2]
    if "Adam" in what:
        return "Adam steps"
    if "foreach" in what:
        return "foreach forms"
    if what.startswith("to "):
        return "casts"
    if what in ("add", "subtract", "multiply", "divide"):
        return "binary"
    part = re.search(r"\b(scalar|multiple|lerp|addcmul|addcdiv)\b", what)
    return "optimizer parts" if part else "unary"


# The heat map.


def _compared_references(dataset: xr.Dataset) -> list[str]:
    counts = dataset.compared_count.sum(("operation", "mode", "input_class")).values
    found = [r for r, n in zip(names(dataset, "reference"), counts, strict=True) if n]
    return found or ["ieee"]


def _modes(dataset: xr.Dataset, reference: str) -> list[str]:
    """List the columns of a panel: nothing is compared with itself."""
    return [mode for mode in names(dataset, "mode") if mode != reference]


def _heat_panels(rows: int, columns: Sequence[int]) -> tuple[Figure, Sequence[Axes]]:
    """Make panels whose cells have one size, whatever their number."""
    width, height = _CELL
    left, right, gap, top, bottom = 3.0, 1.4, 0.25, 2.0, 1.05  # inches
    across = left + width * sum(columns) + gap * (len(columns) - 1) + right
    down = top + height * rows + bottom
    figure = Figure(figsize=(across, down))
    axes, at = [], left
    for count in columns:
        box = (at / across, bottom / down, width * count / across, height * rows / down)
        axes.append(figure.add_axes(box))
        at += width * count + gap
    return figure, axes


def _colours() -> Colormap:
    """Return colours that darken evenly; the darkest end, where text would drown, is left out."""
    return ListedColormap(colormaps["viridis_r"](np.linspace(0.03, 0.9, 256)))


def _norm(shares: Sequence[float]) -> LogNorm:
    positive = [share for share in shares if share > 0]
    low = min(positive, default=1e-3)
    return LogNorm(vmin=max(10 ** np.floor(np.log10(low) - 1e-9), _SMALLEST), vmax=1, clip=True)


def _draw_grid(
    axis: Axes, grid: Sequence[Sequence[Cell]], norm: LogNorm, colours: Colormap
) -> None:
    shares = np.array([[cell.share for cell in row] for row in grid], dtype=float)
    differing = np.ma.masked_where(~(shares > 0), shares)
    axis.set_facecolor(_EXACT)
    axis.imshow(differing, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    for y, x in np.argwhere(np.isnan(shares)):
        axis.add_patch(_hatched(x - 0.5, y - 0.5))
    exact_y, exact_x = np.nonzero(shares == 0)
    axis.plot(exact_x, exact_y, "o", ms=2.4, color="0.5", mew=0, label="exact")
    for y, x in np.argwhere(shares > 0):
        share = float(shares[y, x])
        shade = colours(norm(share))
        dark = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 0.5
        style = {"ha": "center", "va": "center", "fontsize": 7.5}
        axis.text(x, y, percent(share), color="white" if dark else "black", **style)


def _hatched(x: float, y: float) -> Rectangle:
    return Rectangle((x, y), 1, 1, facecolor=_UNKNOWN, edgecolor="0.7", hatch="////", lw=0)


def _label_grid(axis: Axes, modes: Sequence[str], operations: Sequence[str]) -> None:
    axis.xaxis.tick_top()
    axis.set_xticks(range(len(modes)), modes, rotation=40, ha="left", rotation_mode="anchor")
    axis.set_yticks(range(len(operations)), operations)
    axis.tick_params(length=0, labelsize=8.5)
    axis.spines[:].set_visible(False)
    axis.set_xticks(np.arange(len(modes) - 1) + 0.5, minor=True)
    axis.set_yticks(np.arange(axis.get_images()[0].get_size()[0] - 1) + 0.5, minor=True)
    axis.grid(which="minor", color="white", lw=0.8)
    axis.tick_params(which="minor", length=0)


def _separate(axis: Axes, operations: Sequence[str], *, named: bool) -> None:
    """Draw a line between families; name them on the right."""
    start = 0
    for name, members in itertools.groupby(operations, family):
        stop = start + len(list(members))
        if start:
            axis.axhline(start - 0.5, color=_LINE, lw=0.9)
        if named:
            middle = (start + stop - 1) / 2
            style = {"va": "center", "fontsize": 8.5, "color": _LINE}
            axis.text(1.02, middle, name, transform=axis.get_yaxis_transform(), **style)
        start = stop


def _explain_colours(figure: Figure, axis: Axes, norm: LogNorm, colours: Colormap) -> None:
    across, down = figure.get_size_inches()
    handles = [
        axis.get_lines()[0],
        Patch(facecolor=_UNKNOWN, edgecolor="0.7", hatch="////", lw=0),
    ]
    figure.legend(
        handles,
        ["exact: not one differs", "not compared"],
        loc="lower left",
        bbox_to_anchor=(0.1 / across, 0.12 / down),
        fontsize=8.5,
        frameon=False,
    )
    box = (3.0 / across, 0.55 / down, min(4.2, across - 4) / across, 0.16 / down)
    bar = figure.colorbar(
        ScalarMappable(norm, colours), cax=figure.add_axes(box), orientation="horizontal"
    )
    bar.set_label("share of results that differ", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    bar.ax.xaxis.set_minor_locator(NullLocator())


# The number line.


def _draw_line(axis: Axes, dataset: xr.Dataset, key: tuple[str, str, str]) -> None:
    """Draw the share of each binade as a bar that ends at the bottom, on a logarithmic axis."""
    operation, mode, reference = key
    at = {"operation": operation, "mode": mode, "reference": reference}
    differing = dataset.differing_by_binade.sel(at).values
    compared = dataset.compared_by_binade.sel(operation=operation).values
    binades = dataset.binade.values
    share = np.divide(differing, compared, where=compared > 0, out=np.zeros(len(binades)))
    low = _bottom(share)
    for (first, last), colour in zip(SUBNORMAL.values(), _SHADES, strict=True):
        axis.axvspan(first - 0.5, last + 0.5, color=colour, alpha=0.25, lw=0, zorder=0)
    for first, last in _runs(binades, compared == 0):
        axis.axvspan(first - 0.5, last + 0.5, facecolor="white", edgecolor="0.6", hatch="////", lw=0, zorder=1)  # fmt: skip
    there = share > 0
    axis.bar(binades[there], share[there] - low, 1, low, color=_BAR, lw=0, zorder=2)
    axis.set_yscale("log")
    axis.set_ylim(low, 1.6)
    axis.set_xlim(binades[0] - 2.5, binades[-1] + 2.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.yaxis.set_major_locator(LogLocator(numticks=5))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y", alpha=0.3, lw=0.5)


def _bottom(share: np.ndarray) -> float:
    """End a logarithmic axis half a decade below the smallest share, and two decades below 1 at least."""
    smallest = min(share[share > 0], default=1.0)
    return max(min(10 ** (np.floor(np.log10(smallest)) - 0.5), 10**-2.5), _SMALLEST)


def _runs(binades: np.ndarray, chosen: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield first and last binade of each unbroken run of chosen ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(int)))
    for start, stop in edges.reshape(-1, 2):
        yield int(binades[start]), int(binades[stop - 1])


def _line_title(key: tuple[str, str, str], cell: Cell) -> str:
    operation, mode, reference = key
    what = f"{operation}, {mode} against {REFERENCES.get(reference, reference)}"
    how = f"{percent(cell.share)} differ, by up to {ulp(cell.max_ulp)} ulp"
    causes = "; ".join(cause for cause, _ in cell.explanations)
    shown = textwrap.shorten(causes, _TITLE, placeholder=" ...", break_on_hyphens=False)
    return f"{what}: {how}\n{shown}"


def _label_binades(axis: Axes) -> None:
    ticks = {-150: "0", 128: "inf, NaN"} | {
        k: f"$2^{{{k}}}$" for k in (-126, -100, -75, -50, -24, 0, 25, 50, 75, 100)
    }
    axis.set_xticks([*ticks], [*ticks.values()], fontsize=8.5)
    axis.set_xlabel("size of the IEEE 754 result", fontsize=9.5)
