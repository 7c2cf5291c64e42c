"""How far two arrays of patterns are apart, token by token.

Every number is a sum or a maximum over one token's row, made in an order that depends on the row's width alone, so
that neither the cut into windows nor the number of threads can change a bit of it. Differences are those of the exact
values, in float64. An element that does not differ is at distance 0 whatever it is; one that does carries its infinities and NaNs through.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxaudit.floats import BFLOAT16, FLOAT32, Format, Patterns, encode, is_nan

#: Elements that are worked on at a time, in the processor's cache.
PIECE_ELEMENTS = 1 << 16

#: Bins of ulp distances: 0, 1, 2, 3 to 4, 5 to 8, ... up to 2^32.
ULP_BINS = 34

#: Largest distance of each bin.
ULP_BIN_ENDS = np.concatenate([[0], 1 << np.arange(ULP_BINS - 1, dtype=np.int64)])

#: What `Rows.sums` and `Rows.peaks` hold, in order.
SUMS = ("squares_a", "squares_b", "squared_distance", "ulps", "squared_ulps")
MOVES = ("squared_moves_a", "squared_moves_b", "products_of_moves")
PEAKS = ("distance", "ulps")

_SHORT = 8  # elements of a row below which NumPy sums them one after the other

_OFFSET = 1021  # the exponent field of 1/4, and so of the distance 0


class Tokens(NamedTuple):
    """What came of one tensor at one timestep, for the tokens of a block.

    Attributes:
        counts: int64 (2, tokens): elements that differ, and that differ after rounding to the ulp's format.
        sums: float64 (SUMS and MOVES, tokens).
        peaks: float64 (PEAKS, tokens).
        histogram: int64 (kinds, ULP_BINS).
    """

    counts: NDArray[np.int64]
    sums: NDArray[np.float64]
    peaks: NDArray[np.float64]
    histogram: NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Formats:
    """How both are stored, and in which ulp their distance is.

    Attributes:
        a: of one.
        b: of the other.
        ulp: the coarser one, or the format in which both were computed before a recorder widened them.
    """

    a: Format
    b: Format
    ulp: Format

    @property
    def plain(self) -> bool:
        """Whether patterns can be compared as they are."""
        return self.a is self.b


def coarser(a: Format, b: Format) -> Format:
    """Return the format with the shorter significand."""
    return min(a, b, key=lambda fmt: fmt.significand_bits)


def compare_tokens(
    a: Patterns,
    b: Patterns,
    formats: Formats,
    kinds: NDArray[np.int64],
    kind_count: int,
    start: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
) -> Tokens:
    """Compare one tensor at one timestep.

    Args:
        a: patterns of one, (tokens, width).
        b: patterns of the other.
        formats: theirs.
        kinds: kind of each token, which histograms are made by.
        kind_count: how many kinds there are.
        start: values of both that displacements are counted from, (tokens, width); None for no displacements.
    """
    tokens = len(a)
    found = Tokens(
        np.zeros((2, tokens), np.int64),
        np.zeros((len(SUMS) + (len(MOVES) if start else 0), tokens)),
        np.zeros((len(PEAKS), tokens)),
        np.zeros((kind_count, ULP_BINS), np.int64),
    )
    with np.errstate(all="ignore"):  # infinities and NaNs carry through
        for rows, columns in _pieces(*a.shape):
            at = (slice(*rows), slice(*columns))
            _add_piece(found, slice(*rows), a[at], b[at], formats, kinds[at[0]])
            if start:
                _add_moves(found.sums[len(SUMS) :, at[0]], a[at], b[at], formats, start, at)
    return found


def differing(
    a: Patterns, b: Patterns, formats: Formats, *, nans: bool = True
) -> NDArray[np.bool_]:
    """Tell which elements differ: in their bits, or, stored differently, in the bits of both as float32.

    All NaNs are alike; both zeros differ.

    Args:
        a: patterns of one.
        b: patterns of the other.
        formats: theirs.
        nans: whether there may be NaNs in both.
    """
    if not formats.plain:
        a, b = widened(a, formats.a).view(np.uint32), widened(b, formats.b).view(np.uint32)
    fmt = formats.a if formats.plain else FLOAT32
    unlike = a != b
    if nans and unlike.any():
        unlike &= ~(is_nan(a, fmt) & is_nan(b, fmt))
    return unlike


def widened(patterns: Patterns, fmt: Format) -> NDArray[np.float32]:
    """Return the float32 values of patterns, of the same shape; exact."""
    if fmt is FLOAT32:
        return patterns.view(np.float32)
    if fmt is BFLOAT16:
        wide = patterns.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return patterns.view(np.float16).astype(np.float32)


def narrowed(patterns: Patterns, fmt: Format, target: Format) -> Patterns:
    """Round patterns to another format, to nearest with ties to even."""
    if fmt is target:
        return patterns
    if fmt is FLOAT32 and target is BFLOAT16 and not (patterns & 0xFFFF).any():
        return (patterns >> 16).astype(np.uint16)
    return encode(widened(patterns, fmt), target)


def line(patterns: Patterns, fmt: Format, *, nans: bool = True) -> NDArray[np.int32]:
    """Place patterns on the ordered line of integers, as `floats.ordered` does.

    Args:
        patterns: of any shape.
        fmt: their format.
        nans: whether there may be NaNs.
    """
    signed = patterns.view(np.int32) if fmt is FLOAT32 else patterns.view(np.int16).astype(np.int32)
    negative = signed >> 31
    signed = signed & (fmt.sign_bit - 1)
    nan = signed > fmt.infinity if nans else None
    signed ^= negative
    signed -= negative
    if nan is not None:
        signed[nan] = fmt.infinity + 1
    return signed


def _pieces(tokens: int, width: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Cut (tokens, width) into pieces of whole rows, or wide rows into parts."""
    rows = max(1, PIECE_ELEMENTS // width)
    columns = width if width <= PIECE_ELEMENTS else PIECE_ELEMENTS
    for row in range(0, tokens, rows):
        for column in range(0, width, columns):
            yield (row, min(row + rows, tokens)), (column, min(column + columns, width))


def _add_piece(
    found: Tokens,
    rows: slice,
    a: Patterns,
    b: Patterns,
    formats: Formats,
    kinds: NDArray[np.int64],
) -> None:
    values_a = widened(a, formats.a).astype(np.float64)
    values_b = widened(b, formats.b).astype(np.float64)
    sums, peaks = found.sums[:, rows], found.peaks[:, rows]
    sums[0] += _row_sums(np.square(values_a))
    sums[1] += _row_sums(np.square(values_b))
    # A sum of squares is NaN where there is a NaN, and only there.
    nan_a, nan_b = np.isnan(sums[0]).any(), np.isnan(sums[1]).any()
    unlike = differing(a, b, formats, nans=bool(nan_a and nan_b))
    if not unlike.any():
        _count_zeros(found.histogram, a.shape, kinds)
        return
    found.counts[0, rows] += _count_rows(unlike)
    distance = np.abs(np.subtract(values_a, values_b, out=values_a), out=values_a)
    peak = _peaks(distance)
    if np.isnan(peak).any():  # NaNs, or infinities of one sign: 0 where they are on both sides
        distance[~unlike] = 0
        peak = _peaks(distance)
    peaks[0] = np.maximum(peaks[0], peak)
    sums[2] += _row_sums(np.square(distance, out=distance))
    ulp = formats.ulp
    a, b = narrowed(a, formats.a, ulp), narrowed(b, formats.b, ulp)
    if not (formats.plain and ulp is formats.a):
        unlike = differing(a, b, Formats(ulp, ulp, ulp), nans=bool(nan_a and nan_b))
    found.counts[1, rows] += _count_rows(unlike)
    places_a, places_b = line(a, ulp, nans=bool(nan_a)), line(b, ulp, nans=bool(nan_b))
    ulps = np.subtract(places_a, places_b, out=values_b, dtype=np.float64)
    np.abs(ulps, out=ulps)
    sums[3] += _row_sums(ulps)
    peaks[1] = np.maximum(peaks[1], _peaks(ulps))
    sums[4] += _row_sums(np.square(ulps, out=values_a))
    _count_ulps(found.histogram, ulps, kinds)


def _row_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum each row; short ones column by column, which is the order of NumPy's own sum and much faster there."""
    if values.shape[1] >= _SHORT:
        return values.sum(axis=1)
    total = values[:, 0].copy()
    for column in values.T[1:]:
        total += column
    return total


def _peaks(sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the largest of each row of numbers without sign, NaN where there is one: as integers, twice as fast."""
    bits = sizes.view(np.int64)
    if bits.shape[1] >= _SHORT:
        return bits.max(axis=1).view(np.float64)
    return functools.reduce(np.maximum, bits.T).view(np.float64)


def _count_rows(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Count the flags of each row; where their bytes fit, eight are added at a time."""
    tokens, width = flags.shape
    if width < _SHORT:
        return functools.reduce(np.add, flags.T.astype(np.int64))
    if width % 8 or width > 8 * 255:
        return np.count_nonzero(flags, axis=1)
    lanes = np.add.reduce(flags.view(np.uint64), axis=1)
    return lanes.view(np.uint8).reshape(tokens, 8).sum(axis=1, dtype=np.int64)


def _add_moves(
    sums: NDArray[np.float64],
    a: Patterns,
    b: Patterns,
    formats: Formats,
    start: tuple[NDArray[np.float32], NDArray[np.float32]],
    at: tuple[slice, slice],
) -> None:
    moves_a = np.subtract(widened(a, formats.a), start[0][at], dtype=np.float64)
    moves_b = np.subtract(widened(b, formats.b), start[1][at], dtype=np.float64)
    sums[2] += _row_sums(moves_a * moves_b)
    sums[0] += _row_sums(np.square(moves_a, out=moves_a))
    sums[1] += _row_sums(np.square(moves_b, out=moves_b))


def _count_zeros(
    histogram: NDArray[np.int64], shape: tuple[int, ...], kinds: NDArray[np.int64]
) -> None:
    """Count a piece in which nothing differs."""
    histogram[:, 0] += np.bincount(kinds, minlength=len(histogram)) * shape[1]


def _count_ulps(
    histogram: NDArray[np.int64], ulps: NDArray[np.float64], kinds: NDArray[np.int64]
) -> None:
    """Count distances by bin: the exponent of the distance less a quarter tells it."""
    ulps -= 0.25
    codes = ulps.view(np.int64)
    codes >>= 52
    codes &= 0x7FF
    codes += (kinds * ULP_BINS - _OFFSET)[:, None]
    histogram += np.bincount(codes.reshape(-1), minlength=histogram.size).reshape(histogram.shape)
