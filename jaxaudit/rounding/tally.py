"""Counting what differs: one block of results against a reference, and the sum over blocks."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from jaxaudit import floats
from jaxaudit.floats import FLOAT64, Format, Patterns
from jaxaudit.rounding.exact import HIGHEST_BINADE, INPUT_CLASSES, LOWEST_BINADE, decode64

#: Binades of IEEE results, with what lies beyond either end.
BINADES = np.arange(LOWEST_BINADE, HIGHEST_BINADE + 1)

#: What is told of a first difference.
DIFFERENCE_FIELDS = ("operand_1", "operand_2", "operand_3", "operand_4", "wanted", "found")

_CLASSES = len(INPUT_CLASSES)

#: Elements that are kept of every comparison at most, to find out why they differ; of that many blocks, spread over
#: all; and as many as this of any block.
SAMPLED, SPREAD, _LEAST = 2048, 64, 256


@dataclasses.dataclass(frozen=True)
class Block:
    """Operands with what is known about them.

    Attributes:
        operands: patterns, one array each.
        wanted: IEEE results, patterns.
        classes: index into `INPUT_CLASSES` of every element.
        binades: floor of log2 of every IEEE result (see `exact.binade_of`).
    """

    operands: tuple[Patterns, ...]
    wanted: Patterns
    classes: NDArray[np.uint8]
    binades: NDArray[np.int16]

    @functools.cached_property
    def counts(self) -> NDArray[np.int64]:
        """Elements of each class."""
        return np.bincount(self.classes, minlength=_CLASSES)

    @functools.cached_property
    def binade_counts(self) -> NDArray[np.int64]:
        """Elements of each binade."""
        return _count_binades(self.binades)


@dataclasses.dataclass
class Tally:
    """Counts of one comparison, by class of input; see `results.ROUNDING_VARIABLES`.

    Attributes:
        compared: results compared.
        differing: of these, those whose bits differ.
        farthest: largest distance, in ulp.
        first: patterns of the first that differs, (class, field).
        binades: differing results by binade.
        samples: some elements, most of which differ; operands, wanted, found.
    """

    compared: NDArray[np.int64]
    differing: NDArray[np.int64]
    farthest: NDArray[np.float64]
    first: NDArray[np.uint64]
    binades: NDArray[np.int64]
    samples: list[tuple[Patterns, ...]]

    @classmethod
    def empty(cls) -> "Tally":
        """Return the counts of nothing."""
        return cls(
            np.zeros(_CLASSES, np.int64),
            np.zeros(_CLASSES, np.int64),
            np.zeros(_CLASSES, np.float64),
            np.zeros((_CLASSES, len(DIFFERENCE_FIELDS)), np.uint64),
            np.zeros(BINADES.size, np.int64),
            [],
        )

    @property
    def sampled(self) -> int:
        """Count the samples."""
        return sum(sample[0].size for sample in self.samples)

    def add(self, later: "Tally", *, spread: bool) -> None:
        """Add the counts of a block that comes after all that were added before.

        Args:
            later: the counts.
            spread: the block is one of those from which samples are taken in any case.
        """
        new = (self.differing == 0) & (later.differing > 0)
        self.first[new] = later.first[new]
        self.compared += later.compared
        self.differing += later.differing
        self.binades += later.binades
        np.maximum(self.farthest, later.farthest, out=self.farthest)
        if self.sampled < (SAMPLED if spread else _LEAST):
            self.samples += later.samples


def compare(
    block: Block,
    found: Patterns,
    wanted: Patterns,
    result: Format,
    *,
    summed: Format | None = None,
    left_out: NDArray[np.bool_] | None = None,
    quota: int = SAMPLED,
) -> Tally:
    """Count what differs in a block.

    Args:
        block: the operands.
        found: results as patterns of `result`, or of `summed`.
        wanted: those of the reference, as patterns of `result`.
        result: format of the operation.
        summed: format in which results were seen after a sum, which forgets the sign of zero and need not be a
            number of `result`.
        left_out: elements that are not compared.
        quota: elements to sample.
    """
    tally = Tally.empty()
    tally.compared += block.counts
    if left_out is not None:
        tally.compared -= np.bincount(block.classes[left_out], minlength=_CLASSES)
    seen, expected, given = result, wanted, found
    if summed is not None:
        seen, expected = summed, _widened(wanted, result, summed)
        given = _without_sign_of_zero(found, summed)
    where = _differing(given, expected, seen, left_out)
    if where.size:
        distances = _distances(found[where], wanted[where], result, seen)
        _note(tally, block, where, distances, (*block.operands, wanted, found))
        chosen = _chosen(block, where, left_out, quota)
        tally.samples = [tuple(p[chosen] for p in (*block.operands, wanted, found))]
    return tally


def _differing(
    found: Patterns, wanted: Patterns, fmt: Format, left_out: NDArray[np.bool_] | None
) -> NDArray[np.integer]:
    """Find the elements whose bits differ, all NaNs being alike."""
    unequal = found != wanted
    if left_out is not None:
        unequal &= ~left_out
    where = np.flatnonzero(unequal)
    return where[floats.differ(found[where], wanted[where], fmt)]


def _widened(patterns: Patterns, fmt: Format, wide: Format) -> Patterns:
    values = floats.decode(patterns, fmt).astype(wide.value_dtype, copy=False)
    return _without_sign_of_zero(values.view(wide.pattern_dtype), wide)


def _without_sign_of_zero(patterns: Patterns, fmt: Format) -> Patterns:
    return np.where(patterns == fmt.sign_bit, fmt.pattern_dtype.type(0), patterns)


def _note(
    tally: Tally,
    block: Block,
    where: NDArray[np.integer],
    distances: NDArray[np.float64],
    columns: tuple[Patterns, ...],
) -> None:
    """Fill in what is known of the elements that differ."""
    classes = block.classes[where]
    tally.differing += np.bincount(classes, minlength=_CLASSES)
    tally.binades += _count_binades(block.binades[where])
    *operands, wanted, found = columns
    for k in np.flatnonzero(tally.differing):
        of_class = np.flatnonzero(classes == k)
        tally.farthest[k] = distances[of_class].max()
        at = where[of_class[0]]
        tally.first[k, : len(operands)] = [int(p[at]) for p in operands]
        tally.first[k, -2:] = int(wanted[at]), int(found[at])


def _chosen(
    block: Block,
    where: NDArray[np.integer],
    left_out: NDArray[np.bool_] | None,
    quota: int,
) -> NDArray[np.integer]:
    """Choose elements that differ, as many of each class and from all over the block, and an eighth of others."""
    classes = block.classes[where]
    present = np.flatnonzero(np.bincount(classes))
    share = max(1, quota * 7 // 8 // present.size)
    of_classes = [_spread(where[classes == k], share) for k in present]
    every = np.arange(block.wanted.size) if left_out is None else np.flatnonzero(~left_out)
    others = _spread(every, max(1, quota // 8))
    return np.unique(np.concatenate([*of_classes, others]))


def _spread(places: NDArray[np.integer], count: int) -> NDArray[np.integer]:
    """Choose places at equal distances."""
    return places[np.linspace(0, places.size - 1, min(count, places.size)).astype(np.int64)]


def _count_binades(binades: NDArray[np.int16]) -> NDArray[np.int64]:
    return np.bincount(binades - BINADES[0], minlength=BINADES.size)


def _distances(
    found: Patterns, wanted: Patterns, result: Format, seen: Format
) -> NDArray[np.float64]:
    """Count the steps between results on the line of `result`, also from between its numbers."""
    if seen is result:
        return _ulp_distance(found, wanted, result)
    if seen.exponent_bits == result.exponent_bits:  # one line is the other, with finer steps
        wide = _ulp_distance(found, _widened(wanted, result, seen), seen)
        steps = np.ldexp(wide, result.significand_bits - seen.significand_bits)
        return np.where(
            floats.is_nan(found, seen) != floats.is_nan(wanted, result), np.ceil(steps), steps
        )
    line = position(decode64(found, seen), result)
    return np.abs(line - position(decode64(wanted, result), result))


def _ulp_distance(a: Patterns, b: Patterns, fmt: Format) -> NDArray[np.float64]:
    if fmt is FLOAT64:  # distances of opposite signs can be beyond 2^63
        x, y = floats.ordered(a, fmt), floats.ordered(b, fmt)
        with np.errstate(over="ignore"):
            near = np.abs(x - y).astype(np.float64)
        return np.where((x < 0) == (y < 0), near, np.abs(x.astype(np.float64) - y))
    return floats.ulp_distance(a, b, fmt).astype(np.float64)


def position(values: NDArray[np.float64], fmt: Format) -> NDArray[np.float64]:
    """Place values on the ordered line of a format, linearly between its neighbouring numbers.

    For the format's own numbers it is `floats.ordered`: both zeros are 0, neighbours are 1 apart, whatever is as
    large as infinity or beyond the largest number's upper neighbour is infinity, and NaN lies one step beyond.
    """
    least = 1 - fmt.bias
    with np.errstate(all="ignore"):
        size = np.abs(values)
        exponent = np.maximum(np.frexp(size)[1] - 1, least)
        within = np.ldexp(size, fmt.significand_bits - exponent)
        steps = within + (exponent - least) * 2.0**fmt.significand_bits
    steps = np.where(size == 0, 0.0, np.minimum(steps, float(fmt.infinity)))
    steps = np.where(np.isinf(values), float(fmt.infinity), steps)
    line = np.where(np.signbit(values), -steps, steps)
    return np.where(np.isnan(values), float(fmt.infinity + 1), line)


def joined(samples: Sequence[tuple[Patterns, ...]], count: int) -> tuple[Patterns, ...]:
    """Put samples of several blocks together; (operands..., wanted, found), at most `count` elements each."""
    return tuple(np.concatenate(parts)[:count] for parts in zip(*samples, strict=True))
