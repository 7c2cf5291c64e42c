"""Strips of rows: what an audit is cut into, and how their numbers become those of the whole recording.

Rows never meet in an optimizer step, whereas what runs freely needs every timestep before. So a strip of rows is what can be
audited by itself, over all timesteps: by another process, on another machine, before or after any other. The cut depends
on the recording alone, and the strips' numbers are added up in their order, so that the result does too.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from jaxaudit import results
from jaxaudit.recording import TokenGroups, Window

#: Elements of a timestep in a strip, at most (but for a single row that has more).
STRIP_ELEMENTS = 1 << 18

#: How a number of all rows is made of those of the strips: their sum (`NOT_AUDITED` and NaN stay), the largest, the
#: earliest of several first places, or, for an array whose last axis are the tokens, each row's from its own strip.
Rule: TypeAlias = Literal["sum", "max", "first", "rows"]

#: Numbers by name, as files of parts hold them.
Numbers: TypeAlias = dict[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Strip:
    """A range of rows.

    Attributes:
        number: from 0, in the order of rows.
        rows: range that is read: every strip has as many rows, so that no program is compiled twice.
        own: range that is counted; the last strip reads some rows of the one before it.
    """

    number: int
    rows: tuple[int, int]
    own: tuple[int, int]

    @property
    def overlap(self) -> int:
        """Rows at the start that belong to the strip before."""
        return self.own[0] - self.rows[0]


def strips_of(tokens: int, width: int) -> list[Strip]:
    """Cut a parameter of so many rows, of so many elements each, into strips of one size."""
    most = max(1, STRIP_ELEMENTS // max(1, width))
    size = -(-tokens // -(-tokens // most))
    ends = [min(start + size, tokens) for start in range(0, tokens, size)]
    return [Strip(k, (end - size, end), (k * size, end)) for k, end in enumerate(ends)]


def members_within(groups: TokenGroups, window: Window) -> list[NDArray[np.int64]]:
    """Return each group's tokens among a window's own rows, counted from the window's first row."""
    begin, end = window.own
    found = []
    for tokens in groups.members.values():
        first, last = np.searchsorted(tokens, (begin, end))
        found.append(tokens[first:last] - window.rows[0])
    return found


class Countable:
    """Numbers that are gathered strip by strip.

    A subclass names its arrays in `MERGED` (an attribute is an array, or a dict of arrays, whose rule may
    be given for each as `attribute.key`), and further `Countable` objects that it is made of in `MADE_OF`.
    """

    MERGED: ClassVar[Mapping[str, Rule]] = {}
    MADE_OF: ClassVar[Sequence[str]] = ()

    _blank: Numbers | None = None

    def forget(self) -> None:
        """Forget what is carried from timestep to timestep of a strip: the next one begins. The numbers stay."""
        for _, part in self._named():
            part.forget()

    def clear(self) -> None:
        """Set the numbers to what they are before the first strip; to be called once before it, too."""
        if self._blank is None:
            self._blank = {name: array.copy() for name, _, array in self._own_numbers()}
        for name, _, array in self._own_numbers():
            array[...] = self._blank[name]
        for _, part in self._named():
            part.clear()

    def numbers(self, strip: Strip, prefix: str = "") -> Numbers:
        """Return copies of the numbers by name, where one strip was gathered since `clear`.

        Integers are of any type that holds them.
        """
        found = {}
        for name, rule, array in self._own_numbers():
            mine = array[..., slice(*strip.own)] if rule == "rows" else array
            found[prefix + name] = _short(mine)
        for name, part in self._named():
            found |= part.numbers(strip, f"{prefix}{name}.")
        return found

    def merge(self, numbers: Mapping[str, NDArray[Any]], strip: Strip, prefix: str = "") -> None:
        """Add a strip's numbers; those of all strips, in their order, after `clear`.

        A strip that is gathered without `clear` before it adds to the numbers just so.
        """
        for name, rule, array in self._own_numbers():
            _merge(rule, array, numbers[prefix + name], strip)
        for name, part in self._named():
            part.merge(numbers, strip, f"{prefix}{name}.")

    def _own_numbers(self) -> Iterator[tuple[str, Rule, NDArray[Any]]]:
        for name, rule in self.MERGED.items():
            attribute, _, key = name.partition(".")
            found = getattr(self, attribute)
            if not isinstance(found, dict):
                yield name, rule, found
                continue
            for k, array in found.items():
                if k == key or (not key and f"{name}.{k}" not in self.MERGED):
                    yield f"{attribute}.{k}", rule, array

    def _named(self) -> Iterator[tuple[str, "Countable"]]:
        for name in self.MADE_OF:
            part = getattr(self, name)
            if part is not None:
                yield name, part


def _short(array: NDArray[Any]) -> NDArray[Any]:
    """Return a copy, of integers in the smallest type that holds them: most counts are small."""
    if array.dtype.kind != "i" or not array.size:
        return array.copy()
    least, most = int(array.min()), int(array.max())
    kinds = (np.uint8, np.uint16, np.uint32) if least >= 0 else (np.int8, np.int16, np.int32)
    for kind in kinds:
        if np.iinfo(kind).min <= least and most <= np.iinfo(kind).max:
            return array.astype(kind)
    return array.copy()


def _merge(rule: Rule, total: NDArray[Any], part: NDArray[Any], strip: Strip) -> None:
    if rule == "rows":
        total[..., slice(*strip.own)] = part
    elif rule == "max":
        np.maximum(total, part, out=total)
    elif rule == "first":
        for mine, other in zip(
            total.reshape(-1, total.shape[-1]), part.reshape(-1, part.shape[-1]), strict=True
        ):
            keep_first(mine, other)
    elif total.dtype.kind == "i":
        total += np.where(part == results.NOT_AUDITED, 0, part)
    else:
        with np.errstate(invalid="ignore"):  # infinities of both signs
            total += part


def keep_first(mine: NDArray[np.int64], other: NDArray[np.int64] | Sequence[int]) -> None:
    """Keep the earlier of two places: (timestep, row, column, ...), or `NOT_AUDITED` for none."""
    none = mine[0] == results.NOT_AUDITED
    if other[0] != results.NOT_AUDITED and (none or tuple(other[:3]) < tuple(mine[:3])):
        mine[:] = other


class Histograms(Countable):
    """Histograms of timesteps and token groups, kept until every strip has added to them.

    Most bins are empty: only the others are kept, block of timesteps by block.

    Args:
        steps: timesteps in all.
        groups: token groups.
        bins: how many a histogram has.
    """

    def __init__(self, steps: int, groups: int, bins: int):
        self._steps, self._groups, self._bins = steps, groups, bins
        #: By the place of the first timestep: how many there are, which bins are not empty, and what they hold.
        self._held: dict[int, tuple[int, NDArray[np.int64], NDArray[np.int64]]] = {}

    def add(self, first: int, histograms: NDArray[np.int64]) -> None:
        """Add histograms of consecutive timesteps.

        Args:
            first: place of the first one on the timestep axis; always the same blocks of timesteps.
            histograms: (timesteps, groups, bins).
        """
        if first in self._held:
            histograms = histograms + self._whole(first)
        flat = histograms.reshape(-1)
        full = np.flatnonzero(flat)
        self._held[first] = len(histograms), full, flat[full]

    def __iter__(self) -> Iterator[tuple[slice, NDArray[np.int64]]]:
        """Go through blocks of timesteps: their place, and their whole histograms."""
        for first in sorted(self._held):
            yield slice(first, first + self._held[first][0]), self._whole(first)

    def clear(self) -> None:
        """Forget all of them."""
        self._held = {}

    def numbers(self, strip: Strip, prefix: str = "") -> Numbers:
        """Return the bins that are not empty, block after block."""
        held = [(first, *self._held[first]) for first in sorted(self._held)]
        none = np.zeros(0, np.int64)
        return {
            f"{prefix}blocks": np.array(
                [(first, steps, full.size) for first, steps, full, _ in held], np.int64
            ).reshape(-1, 3),
            f"{prefix}bins": _short(np.concatenate([none, *(full for _, _, full, _ in held)])),
            f"{prefix}counts": _short(np.concatenate([none, *(counts for *_, counts in held)])),
        }

    def merge(self, numbers: Mapping[str, NDArray[Any]], strip: Strip, prefix: str = "") -> None:
        """Add a strip's histograms."""
        bins, counts, at = numbers[f"{prefix}bins"], numbers[f"{prefix}counts"], 0
        for first, steps, size in numbers[f"{prefix}blocks"].tolist():
            whole = np.zeros(steps * self._groups * self._bins, np.int64)
            whole[bins[at : at + size]] = counts[at : at + size]
            self.add(first, whole.reshape(steps, self._groups, self._bins))
            at += size

    def _whole(self, first: int) -> NDArray[np.int64]:
        steps, full, counts = self._held[first]
        whole = np.zeros(steps * self._groups * self._bins, np.int64)
        whole[full] = counts
        return whole.reshape(steps, self._groups, self._bins)
