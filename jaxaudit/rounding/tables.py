"""A rounding certificate in words: plain numbers, text for a terminal, Markdown for a page.

Everything here takes the dataset of `cross_check`, as it is or as read back from its file.
"""

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr

#: How the names of the modes begin in which jaxaudit computes; they are to differ from IEEE 754 nowhere.
OWN = "jaxaudit"

REFERENCES = {"ieee": "IEEE 754", "pytorch": "PyTorch"}

#: Modes of the short table.
SHORT_MODES = ("pytorch", "jit", "jit-reduced", "jaxaudit")

_LINE = 110  # characters
_HEADER = 12  # characters of a column's header


#: A cause and its remedy.
Explanation = tuple[str, str]

UNEXPLAINED: Explanation = ("Not explained by any known cause", "")

# As `causes.explain` writes them: clauses with semicolons between, and how much they explain.
_PARTLY = re.compile(r" \(this explains [^()]*\)")
_UNKNOWN = re.compile("not explained", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One operation in one mode against one reference, over all classes of input.

    Attributes:
        compared: results; 0 where there was nothing to compare with.
        differing: those whose bits differ.
        max_ulp: the largest distance.
        cause: why they differ; "" where none does.
        remedy: what to write instead.
    """

    compared: int
    differing: int
    max_ulp: float
    cause: str
    remedy: str

    @property
    def share(self) -> float:
        """Return the share of results that differ; NaN where none was compared."""
        return self.differing / self.compared if self.compared else np.nan

    @property
    def explanations(self) -> tuple[Explanation, ...]:
        """Return the single causes with their remedies; `UNEXPLAINED` is the last where some are not known."""
        if not self.differing:
            return ()
        cause, partly = _PARTLY.subn("", self.cause)
        if not cause or _UNKNOWN.match(cause):
            return (UNEXPLAINED,)
        causes, remedies = _clauses(cause), _clauses(self.remedy)
        if len(causes) != len(remedies):  # some have one in common
            causes, remedies = [cause], [self.remedy]
        return (*zip(causes, remedies, strict=True), *[UNEXPLAINED] * partly)


def _clauses(text: str) -> list[str]:
    return [part.strip().removesuffix(".") for part in text.split("; ")]


#: Cells by operation, mode and reference, in the dataset's order.
Cells = Mapping[tuple[str, str, str], Cell]


def names(dataset: xr.Dataset, dimension: str) -> list[str]:
    """List the labels of a dimension."""
    return [str(name) for name in dataset[dimension].values]


def cells(dataset: xr.Dataset) -> Cells:
    """Sum a certificate over its classes of input."""
    compared = dataset.compared_count.sum("input_class").values
    differing = dataset.differing_count.sum("input_class").values
    farthest = dataset.max_ulp_distance.max("input_class").values
    causes, remedies = dataset.cause.values, dataset.remedy.values
    operations, modes, references = (names(dataset, dim) for dim in ("operation", "mode", "reference"))  # fmt: skip
    keys = itertools.product(operations, modes, references)
    places = np.ndindex(compared.shape)
    return {
        key: Cell(
            compared=int(compared[at]),
            differing=int(differing[at]),
            max_ulp=float(farthest[at]),
            cause=str(causes[at]),
            remedy=str(remedies[at]),
        )
        for key, at in zip(keys, places, strict=True)
    }


def differs_from_ieee(dataset: xr.Dataset) -> bool:
    """Tell whether anything that jaxaudit computes differs from IEEE 754."""
    found = cells(dataset)
    return any(_differing(found, mode) for mode in own_modes(dataset))


def own_modes(dataset: xr.Dataset) -> list[str]:
    """List the modes in which jaxaudit computes."""
    return [mode for mode in names(dataset, "mode") if mode.startswith(OWN)]


def notices(dataset: xr.Dataset) -> list[str]:
    """List the notices; a file gives a list of one back as a string, and of none as ""."""
    found = dataset.attrs.get("notices", "")
    return [str(one) for one in np.atleast_1d(found) if str(one)]


# Plain numbers.


def summarize(dataset: xr.Dataset) -> dict[str, Any]:
    """Return a certificate as values that JSON can hold; null where nothing was compared."""
    found, operations = cells(dataset), names(dataset, "operation")
    return {
        "extent": str(dataset.attrs["extent"]),
        "backend": str(dataset.attrs["backend"]),
        "device": str(dataset.attrs["device"]),
        "exact": not differs_from_ieee(dataset),
        "jaxaudit_against_ieee": {mode: _plain(_total(found, mode)) for mode in own_modes(dataset)},
        "differing_from_ieee": {
            mode: _differing(found, mode) for mode in names(dataset, "mode")
        },
        "operations": {
            name: {
                mode: {
                    reference: _explained(found[name, mode, reference])
                    for reference in names(dataset, "reference")
                }
                for mode in names(dataset, "mode")
            }
            for name in operations
        },
        "notices": notices(dataset),
    }  # fmt: skip


def _plain(cell: Cell) -> dict[str, Any]:
    known = cell.compared > 0
    return {
        "compared": cell.compared,
        "differing": cell.differing if known else None,
        "max_ulp": cell.max_ulp if known else None,
    }


def _explained(cell: Cell) -> dict[str, Any]:
    return _plain(cell) | {"cause": cell.cause, "remedy": cell.remedy}


def _total(found: Cells, mode: str, reference: str = "ieee") -> Cell:
    """Sum all operations of a mode."""
    of_mode = [cell for (_, m, r), cell in found.items() if (m, r) == (mode, reference)]
    return Cell(
        compared=sum(cell.compared for cell in of_mode),
        differing=sum(cell.differing for cell in of_mode),
        max_ulp=max((cell.max_ulp for cell in of_mode), default=0.0),
        cause="",
        remedy="",
    )


def _differing(found: Cells, mode: str, reference: str = "ieee") -> list[str]:
    """List the operations that differ in a mode."""
    return [n for (n, m, r), c in found.items() if (m, r) == (mode, reference) and c.differing]


def _compared(found: Cells, mode: str, reference: str = "ieee") -> list[str]:
    """List the operations that were compared in a mode."""
    return [n for (n, m, r), c in found.items() if (m, r) == (mode, reference) and c.compared]


# Text.


def describe(dataset: xr.Dataset) -> str:
    """Say in plain text which operations differ from IEEE 754 in which mode, and what follows."""
    found, modes = cells(dataset), names(dataset, "mode")
    rows = [
        [name, *(_short(found[name, mode, "ieee"]) for mode in modes)]
        for name in names(dataset, "operation")
    ]
    header = [["share that differs from IEEE 754"], *(_broken(mode) for mode in modes)]
    height = max(map(len, header))
    titles = [[""] * (height - len(lines)) + lines for lines in header]
    table = _aligned([*map(list, zip(*titles, strict=True)), *rows])
    verdict = [line for sentence in _verdict(dataset) for line in _wrapped(sentence)]
    return "\n".join([*_origin(dataset), "", *table, "", *verdict])


def _origin(dataset: xr.Dataset) -> list[str]:
    attributes = dataset.attrs
    torch = attributes.get("torch_version")
    total = int(dataset.compared_count.sum())
    return [
        f"Backend     {attributes['backend']} ({attributes['device']}), jax {attributes['jax_version']}, "
        + (f"PyTorch {torch}" if torch else "PyTorch not installed"),
        f"Extent      {attributes['extent']}: {dataset.sizes['operation']} operations, "
        f"{total:,} comparisons of bits",
    ]


def _short(cell: Cell) -> str:
    return percent(cell.share) if cell.compared else "-"


def percent(share: float) -> str:
    """Write a share with one or two digits: 0, 2e-6, 0.3 %, 17 %, 99.9 %, 100 %."""
    if share in (0, 1):
        return "100 %" if share else "0"
    if share < 0.000_95:
        return re.sub(r"e-0*", "e-", f"{share:.0e}")
    if share < 0.0995 or share > 0.995:
        shown = min(float(f"{100 * share:.1f}"), 99.9)
        return f"{shown:g} %"
    return f"{100 * share:.0f} %"


def _broken(mode: str) -> list[str]:
    """Break a long name at its hyphens."""
    lines = [""]
    for part in re.findall(r"[^-]+-?", mode):
        if lines[-1] and len(lines[-1]) + len(part) > _HEADER:
            lines.append("")
        lines[-1] += part
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]  # fmt: skip


def _verdict(dataset: xr.Dataset) -> list[str]:
    found, own = cells(dataset), own_modes(dataset)
    others = [mode for mode in names(dataset, "mode") if mode not in ("pytorch", *own)]
    return [_own_verdict(found, own), _torch_verdict(found), *_xla_verdict(found, others)]


def _own_verdict(found: Cells, modes: Iterable[str]) -> str:
    totals = {mode: _total(found, mode) for mode in modes}
    known = {mode: total for mode, total in totals.items() if total.compared}
    if not known:
        return "jaxaudit computes none of these operations here."
    counts = ", ".join(
        f"{total.differing:,} of {total.compared:,}"
        + (" results differ from IEEE 754" if number == 0 else f" in mode {mode}")
        for number, (mode, total) in enumerate(known.items())
    )
    wrong = together(dict.fromkeys(name for mode in known for name in _differing(found, mode)))
    return f"As jaxaudit computes it: {counts}" + (f"; they differ in {wrong}." if wrong else ".")


def _torch_verdict(found: Cells) -> str:
    compared, differing = _compared(found, "pytorch"), _differing(found, "pytorch")
    if not compared:
        return "PyTorch was not compared."
    if not differing:
        return f"PyTorch differs from IEEE 754 in none of {_operations(len(compared))}."
    shown = ", ".join(
        f"{name} ({cell.differing:,} of {cell.compared:,})"
        for name, cell in ((name, found[name, "pytorch", "ieee"]) for name in differing)
    )
    return f"PyTorch differs from IEEE 754 in {len(differing)} of {_operations(len(compared))}: {shown}."


def _xla_verdict(found: Cells, modes: Iterable[str]) -> Iterator[str]:
    counts = ", ".join(
        f"{mode} {len(_differing(found, mode))} of {len(_compared(found, mode))}"
        for mode in modes
        if _compared(found, mode)
    )
    if counts:
        yield f"JAX as one writes it, operations that differ from IEEE 754: {counts}."


def _operations(count: int) -> str:
    return f"{count} operation" + "s" * (count != 1)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _LINE, break_long_words=False, break_on_hyphens=False)


def together(operations: Iterable[str]) -> str:
    """Name many operations in few words: those of the same formats, and casts from the same format."""
    formats: dict[str, list[str]] = {}
    casts: dict[str, list[str]] = {}
    for name in operations:
        head, _, rest = name.partition(" ")
        if not re.fullmatch(r"b?float\d+", head) or not rest:
            formats.setdefault(name, [])
        elif rest.startswith("to "):
            casts.setdefault(head, []).append(rest.removeprefix("to "))
        else:
            formats.setdefault(rest, []).append(head)
    alike: dict[tuple[str, ...], list[str]] = {}
    for rest, found in formats.items():
        alike.setdefault(tuple(found), []).append(rest)
    return "; ".join(
        [f"{source} to {', '.join(targets)}" for source, targets in casts.items()]
        + [_of_formats(found, rests) for found, rests in alike.items()]
    )


def _of_formats(formats: Sequence[str], rests: Sequence[str]) -> str:
    if len(formats) == len(rests) == 1:
        return f"{formats[0]} {rests[0]}"
    return ", ".join(rests) + (f" ({', '.join(formats)})" if formats else "")


# Markdown.


def markdown(
    dataset: xr.Dataset,
    rows: Literal["groups", "operations"] = "groups",
    reference: str = "ieee",
    modes: Sequence[str] | None = None,
) -> str:
    """Lay out the share that differs and the largest distance, operations by modes.

    Each cell reads `0` where nothing differs, `–` where nothing was compared, otherwise for example
    `17 %, 1 ulp [2]`, with the numbers that `explanations` gives to its causes.

    Args:
        dataset: of `cross_check`.
        rows: one for each operation, or one for those that differ in the same modes for the same causes;
            its cells then hold the smallest and the largest share.
        reference: which the results are compared with.
        modes: the columns; by default all but the reference.
    """
    found, numbers = cells(dataset), _numbers(dataset)
    modes = modes or [mode for mode in names(dataset, "mode") if mode != reference]
    operations = names(dataset, "operation")
    groups = _alike(found, operations, modes, reference) if rows == "groups" else [[n] for n in operations]  # fmt: skip
    lines = [
        [together(group) if rows == "groups" else group[0]]
        + [_cell([found[name, mode, reference] for name in group], numbers) for mode in modes]
        for group in groups
    ]
    title = f"differs from {REFERENCES[reference]}"
    rule = ["---", *["---:"] * len(modes)]
    return "\n".join(_row(line) for line in [[title, *modes], rule, *lines]) + "\n"


def short(dataset: xr.Dataset) -> str:
    """Lay out what differs from IEEE 754 in the modes that most people use, operations that are alike in one row."""
    modes = [mode for mode in SHORT_MODES if mode in names(dataset, "mode")]
    return markdown(dataset, modes=modes)


def explanations(dataset: xr.Dataset) -> str:
    """List each distinct cause with its remedy, and where it applies; numbered as in `markdown`."""
    found = cells(dataset)
    lines = []
    for (cause, remedy), number in _numbers(dataset).items():
        places = "; ".join(_places(found, (cause, remedy)))
        where = places[0].upper() + places[1:]
        lines.append(f"{number}. {_sentence(cause)} {_sentence(remedy)} {where}.")
    return "\n".join(map(_one_line, lines)) + "\n" if lines else "Nothing differs.\n"


def report(dataset: xr.Dataset) -> str:
    """Return a page: where it was computed, every operation against each reference, what explains it."""
    found = cells(dataset)
    parts = ["# Rounding certificate", "\n".join(f"- {line}" for line in _provenance(dataset))]
    parts += ["## In short", short(dataset).rstrip()]
    for reference in names(dataset, "reference"):
        if any(c.compared for (_, _, r), c in found.items() if r == reference):
            parts += [
                f"## Against {REFERENCES[reference]}",
                markdown(dataset, "operations", reference).rstrip(),
            ]
    parts += ["## Explanations", explanations(dataset).rstrip()]
    return "\n\n".join(parts) + "\n"


def _provenance(dataset: xr.Dataset) -> Iterator[str]:
    for key in (
        *("extent", "backend", "device", "platform", "cpu_model", "xla_flags", "jaxaudit_version"),
        *("jax_version", "jaxlib_version", "torch_version", "numpy_version", "created_at"),
    ):
        value = str(dataset.attrs.get(key, ""))
        if value:
            yield _one_line(f"{key.replace('_', ' ')}: {value}")
    yield from map(_one_line, _verdict(dataset))


def _numbers(dataset: xr.Dataset) -> dict[Explanation, int]:
    """Number the distinct explanations, in the order in which the tables show them first."""
    found = cells(dataset)
    shown = [
        one
        for reference in names(dataset, "reference")
        for (_, _, r), cell in found.items()
        if r == reference
        for one in cell.explanations
    ]
    return {one: number for number, one in enumerate(dict.fromkeys(shown), 1)}


def _alike(
    found: Cells, operations: Sequence[str], modes: Sequence[str], reference: str
) -> list[list[str]]:
    """Group the operations that differ in the same modes for the same causes, in order of the first."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in operations:
        of_name = [found[name, mode, reference] for mode in modes]
        key = tuple((cell.compared > 0, frozenset(cell.explanations)) for cell in of_name)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _cell(of_group: Sequence[Cell], numbers: Mapping[Explanation, int]) -> str:
    """Write what operations have in common that differ alike."""
    if not of_group[0].compared:
        return "–"
    if not of_group[0].differing:
        return "0"
    shares = [percent(share) for share in sorted(cell.share for cell in of_group)]
    shown = shares[0] if shares[0] == shares[-1] else f"{shares[0]} to {shares[-1]}"
    farthest = ulp(max(cell.max_ulp for cell in of_group))
    why = sorted(numbers[one] for one in of_group[0].explanations)
    return f"{shown}, {farthest} ulp [{', '.join(map(str, why))}]"


def ulp(distance: float) -> str:
    """Write a distance in ulp: whole below a million, in powers of ten from there."""
    if distance >= 1e6:
        return re.sub(r"e\+0*", "e", f"{distance:.0e}")
    return f"{distance:,.0f}" if distance == int(distance) else f"{distance:.2g}"


def _places(found: Cells, explanation: Explanation) -> Iterator[str]:
    """Name operations and modes to which an explanation applies; modes with the same ones together."""
    of_mode: dict[tuple[str, str], list[str]] = {(r, mode): [] for _, mode, r in found}
    for (name, mode, reference), cell in found.items():
        if explanation in cell.explanations:
            of_mode[reference, mode].append(name)
    modes: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (reference, mode), operations in sorted(of_mode.items(), key=lambda item: item[0][0]):
        if operations:
            modes.setdefault((reference, tuple(operations)), []).append(mode)
    for (reference, operations), alike in modes.items():
        yield f"against {REFERENCES[reference]} in {', '.join(alike)}: {together(operations)}"


def _sentence(text: str) -> str:
    text = text.strip()
    return text if not text or text[-1] in ".!?" else f"{text}."


def _row(values: Iterable[str]) -> str:
    escaped = (_one_line(value).replace("|", r"\|") for value in values)
    return f"| {' | '.join(escaped)} |"


def _one_line(text: str) -> str:
    return " ".join(text.split())
