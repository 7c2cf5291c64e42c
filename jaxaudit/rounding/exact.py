"""Correctly rounded results by IEEE 754, in float64 and integers: the oracle of a rounding certificate.

An operation is taken in two steps. `EXACT` has, by the name of the operation, a function from float64
operands to a float64 stand-in: a number that every format of at most 24 significant bits rounds as it
would round the exact result. `rounded` takes a stand-in to a format and tells what is special about it.

No float32 instruction is used, nor a conversion from or to float32 (`floats.decode` has one): what the
certificate judges must not decide what is right. Of float64 it needs sums, products, quotients and square
roots, each rounded to nearest with ties to even, and subnormal numbers.

Why one more rounding does no harm: a number of such a format, or the midpoint of two neighbours, is
2^k M with an integer M < 2^25, whether subnormal or not. All of these are float64 numbers, and rounding to
float64 never carries a value past one of them. It could only land on one that the exact result misses;
each function below says why it does not.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from jaxaudit.floats import FLOAT64, Format, Patterns

Float64 = NDArray[np.float64]

#: What `class_of` tells apart, by index.
INPUT_CLASSES = ("normal", "subnormal", "zero", "infinity", "nan", "tie")

#: Above the index of a class, in a byte, stands its rank: the largest byte decides the class.
_RANKED = {
    name: rank << 4 | INPUT_CLASSES.index(name)
    for rank, name in enumerate(("normal", "tie", "zero", "subnormal", "infinity", "nan"))
}

#: Elements worked on at a time: what lies between two operations then stays in the cache, and in memory
#: that the allocator keeps (arrays of megabytes it returns and asks for anew, at several times the cost).
_BLOCK = 1 << 15

#: The binades that `binade_of` tells apart: of zero and below 2^-149, and of what is not finite.
LOWEST_BINADE, HIGHEST_BINADE = -150, 128


@dataclasses.dataclass(frozen=True)
class Rounded:
    """Correctly rounded results; the arrays have one shape.

    Attributes:
        patterns: in the result's format; every NaN is the canonical quiet one, of positive sign.
        tie: the exact result lies midway between two neighbouring numbers of the format, of which the
            lower may be zero and the upper the power of two that would overflow.
        tiny: the exact result is not zero, and smaller in size than the format's smallest normal number.
    """

    patterns: Patterns
    tie: NDArray[np.bool_]
    tiny: NDArray[np.bool_]


@np.errstate(all="ignore")
def rounded(value: Float64, fmt: Format) -> Rounded:
    """Round float64 values to `fmt` once, to nearest with ties to even and gradual underflow."""
    flat = np.ascontiguousarray(value, np.float64).reshape(-1)
    result = Rounded(
        np.empty(flat.size, fmt.pattern_dtype),
        np.empty(flat.size, np.bool_),
        np.empty(flat.size, np.bool_),
    )
    round_block = _kept if fmt == FLOAT64 else _rounded
    for block in _blocks(flat.size):
        _store(round_block(flat[block], fmt), result, block)
    shape = np.shape(value)
    return Rounded(
        result.patterns.reshape(shape), result.tie.reshape(shape), result.tiny.reshape(shape)
    )


@np.errstate(all="ignore")
def decode64(patterns: Patterns, fmt: Format) -> Float64:
    """Widen patterns of any format to the float64 values they stand for (exact for every pattern)."""
    flat = np.ascontiguousarray(patterns).reshape(-1)
    if fmt == FLOAT64:
        return flat.astype(np.uint64).view(np.float64).reshape(np.shape(patterns))
    value = np.empty(flat.size)
    for block in _blocks(flat.size):
        value[block] = _decoded(flat[block].astype(np.uint64), fmt)
    return value.reshape(np.shape(patterns))


@np.errstate(all="ignore")
def add(a: Float64, b: Float64) -> Float64:
    """Stand in for a + b: the sum rounded to odd.

    A sum that is no float64 number gets an odd last bit, of two neighbours the one that has it; numbers and
    midpoints of a narrower format have an even one. Source: Boldo and Melquiond, "Emulation of FMA and
    correctly rounded sums: proved algorithms using rounding to odd", IEEE Transactions on Computers 57 (2008).
    """
    a, b = np.broadcast_arrays(a, b)
    total, flat_a, flat_b = np.empty(a.size), a.reshape(-1), b.reshape(-1)
    for block in _blocks(a.size):
        total[block] = _sum_to_odd(flat_a[block], flat_b[block])
    return total.reshape(a.shape)


def subtract(a: Float64, b: Float64) -> Float64:
    """Stand in for a - b, as `add` does for a sum."""
    return add(a, np.negative(b))


@np.errstate(all="ignore")
def multiply(a: Float64, b: Float64) -> Float64:
    """Return a * b, which is exact: 48 significant bits, the last of which is 2^-298 or more."""
    return a * b


@np.errstate(all="ignore")
def divide(a: Float64, b: Float64) -> Float64:
    """Stand in for a / b: the float64 quotient.

    Take a = 2^i A, b = 2^j B and a midpoint or number 2^k M, scaled such that 2^23 <= A, B < 2^24 <= M < 2^25.
    Unless a / b is 2^k M, they are apart by |2^(i-j-k) A - B M| / (B M) of the latter. If i - j - k >= 0, the
    numerator is a positive integer, and the quotient exceeds 2^-49; if it is negative, 2^(i-j-k) A < 2^23,
    and they are far apart. Float64 rounds by at most 2^-53 of its result.
    """
    return a / b


@np.errstate(all="ignore")
def sqrt(a: Float64) -> Float64:
    """Stand in for the square root: the float64 root.

    As for `divide`: a = 2^i A differs from (2^k M)^2 by 2^-50 of it or more, or not at all, as both are
    integers times the smaller of two powers of two; their roots differ by more than 2^-52.
    """
    return np.sqrt(a)


def reciprocal(a: Float64) -> Float64:
    """Stand in for 1 / a, as `divide` does."""
    return divide(np.ones(()), a)


@np.errstate(all="ignore")
def rsqrt(a: Float64) -> Float64:
    """Stand in for 1 / sqrt(a), where a is a value of a 16-bit format: -0 gives -infinity.

    Rounded twice, it is within 2^-52 of itself. That of 4^n is exact; all others stay much farther from what
    float32 holds and its midpoints, as the tests see for every operand. Some float32 operands may not.
    """
    return 1 / np.sqrt(a)


def square(a: Float64) -> Float64:
    """Return a * a, which is exact."""
    return multiply(a, a)


def negate(a: Float64) -> Float64:
    """Return -a."""
    return np.negative(a)


def absolute(a: Float64) -> Float64:
    """Return |a|."""
    return np.abs(a)


def same(a: Float64) -> Float64:
    """Return a itself: the exact result of a cast, from float64 as well."""
    return a


#: Stand-ins for exact results, by the name of the operation.
EXACT: Mapping[str, Callable[..., Float64]] = {
    function.__name__: function
    for function in (
        add, subtract, multiply, divide, sqrt, rsqrt, reciprocal, square, negate, absolute, same,
    )
}  # fmt: skip


def class_of(
    operands: Sequence[Patterns], formats: Sequence[Format], result: Rounded
) -> NDArray[np.uint8]:
    """Say what is special about each operation, as an index into `INPUT_CLASSES`.

    Of several the first counts: an operand is NaN; is infinite; is subnormal in its format, or the exact
    result is tiny in its own; an operand is zero; the exact result is a tie; nothing.

    Args:
        operands: patterns, which may be of any shapes that broadcast to the result's.
        formats: of the operands.
        result: of the operation.
    """
    ranked = np.maximum(
        _marked(result.tiny, _RANKED["subnormal"]), _marked(result.tie, _RANKED["tie"])
    )
    for patterns, fmt in zip(operands, formats, strict=True):
        ranked = np.maximum(ranked, _operand_class(np.asarray(patterns), fmt))
    return ranked & np.uint8(0x0F)


def binade_of(patterns: Patterns, fmt: Format) -> NDArray[np.int16]:
    """Return floor(log2 |value|): -150 for zero and below 2^-149, 128 from 2^128 on and for NaN."""
    if fmt.width == 16:
        return _binade_table(fmt).take(patterns)
    flat = decode64(patterns, fmt).view(np.uint64).reshape(-1)
    binade = np.empty(flat.size, np.int16)
    for block in _blocks(flat.size):
        exponent = (flat[block] >> FLOAT64.significand_bits).astype(np.int16) & 0x7FF
        binade[block] = (exponent - FLOAT64.bias).clip(LOWEST_BINADE, HIGHEST_BINADE)
    return binade.reshape(np.shape(patterns))


def _blocks(size: int) -> Iterator[slice]:
    """Return slices that cover so many elements."""
    return (slice(start, start + _BLOCK) for start in range(0, size, _BLOCK))


def _store(part: Rounded, whole: Rounded, where: slice | NDArray[np.intp]) -> None:
    """Write results to their place among more of them."""
    whole.patterns[where] = part.patterns
    whole.tie[where] = part.tie
    whole.tiny[where] = part.tiny


def _decoded(wide: NDArray[np.uint64], fmt: Format) -> Float64:
    """Decode patterns of at most 32 bits.

    Magnitude bits are moved to their place in a float64, whose exponent is then off by the difference of
    the biases. The product by that power of two is exact, and makes subnormal numbers normal.
    """
    shift = FLOAT64.significand_bits - fmt.significand_bits
    magnitude = (wide & (fmt.sign_bit - 1)) << shift
    value = magnitude.view(np.float64) * _power(FLOAT64.bias - fmt.bias)
    bits = value.view(np.uint64)
    bits |= (wide & fmt.sign_bit) << (FLOAT64.width - fmt.width)
    special = magnitude >= fmt.infinity << shift
    if special.any():
        bits |= special * np.uint64(FLOAT64.infinity)  # the significand, of a NaN, stays
    return value


def _sum_to_odd(a: Float64, b: Float64) -> Float64:
    """Add, and give an inexact sum the one of its two float64 neighbours whose last bit is set."""
    total, remainder = _two_sum(a, b)
    # Neither over- nor underflows: a remainder is a multiple of 2^-149. It is NaN beside an infinity.
    side = total * remainder
    past, inexact = side < 0, np.abs(side) > 0
    if inexact.any():
        bits = total.view(np.uint64)
        bits -= past  # to the neighbour nearer to zero
        bits |= inexact
    return total


def _rounded(value: Float64, fmt: Format) -> Rounded:
    """Round to a format of at most 32 bits: most by integers alone, the others with more care."""
    words = _words(value, fmt)
    stored = words.itemsize * 8 - 1 - FLOAT64.exponent_bits
    dropped = stored - fmt.significand_bits
    least, beyond = ((FLOAT64.bias + 1 + e) << stored for e in (-fmt.bias, fmt.bias))
    magnitude = words & words.dtype.type((1 << (words.itemsize * 8 - 1)) - 1)
    ordinary = magnitude - least < beyond - least  # what is smaller than `least` wraps around
    patterns = _cut(magnitude, dropped, (FLOAT64.bias - fmt.bias) << fmt.significand_bits)
    patterns = patterns.astype(fmt.pattern_dtype)
    patterns |= (words >> (words.itemsize * 8 - fmt.width)).astype(patterns.dtype) & fmt.sign_bit
    tie = (magnitude & ((1 << dropped) - 1)) == 1 << (dropped - 1)
    result = Rounded(patterns, tie, np.zeros_like(tie))
    others = np.flatnonzero(~ordinary)
    if others.size:
        _store(_rounded_beyond(value[others], fmt), result, others)
    return result


def _words(value: Float64, fmt: Format) -> Patterns:
    """Return the bits of float64 values, for 16-bit formats only the upper half, rounded to odd.

    Half as long, they are worked on twice as fast; the last of 20 significand bits says whether any of
    the bits that went was set.
    """
    bits = value.view(np.uint64)
    if fmt.width > 16:
        return bits
    upper = (bits >> 32).astype(np.uint32)
    if np.bitwise_or.reduce(bits) & 0xFFFFFFFF:
        upper |= bits.astype(np.uint32) != 0
    return upper


def _cut(magnitude: Patterns, dropped: int, rebias: int) -> Patterns:
    """Round away the last bits, to nearest with ties to even, and take off a bias from the rest.

    A carry out of the significand makes the next power of two, or infinity.
    """
    kept = magnitude >> magnitude.dtype.type(dropped)
    kept &= 1
    kept += magnitude
    kept += (1 << (dropped - 1)) - 1
    kept >>= dropped
    kept -= rebias
    return kept


def _rounded_beyond(value: Float64, fmt: Format) -> Rounded:
    """Round what is NaN, zero, tiny, or at least the power of two that overflows.

    Below the smallest normal number the spacing is the same throughout: it is the ulp of float64 numbers
    from `offset` on, so that the sum with it is rounded there, and its remainder is exact.
    """
    size = np.abs(value)
    least = _power(1 - fmt.bias)
    spacing = least * _power(-fmt.significand_bits)
    offset = spacing * _power(FLOAT64.significand_bits)
    shifted = np.minimum(size, least) + offset
    steps = shifted.view(np.uint64) - offset.view(np.uint64)
    patterns = np.where(size < least, steps, np.uint64(fmt.infinity))
    patterns |= (value.view(np.uint64) >> (FLOAT64.width - 1)) << (fmt.width - 1)
    patterns[np.flatnonzero(np.isnan(value))] = _quiet_nan(fmt)  # faster than by the mask
    tie = np.abs(size - (shifted - offset)) == spacing / 2
    return Rounded(patterns.astype(fmt.pattern_dtype), tie, (size > 0) & (size < least))


def _kept(value: Float64, fmt: Format) -> Rounded:
    """Give float64 values as they are; `fmt` is their format."""
    patterns = np.where(np.isnan(value), np.uint64(_quiet_nan(fmt)), value.view(np.uint64))
    size = np.abs(value)
    tiny = (size > 0) & (size < _power(1 - fmt.bias))
    return Rounded(patterns, np.zeros(value.shape, np.bool_), tiny)


def _two_sum(a: Float64, b: Float64) -> tuple[Float64, Float64]:
    """Return the rounded sum and its exact remainder (Knuth)."""
    total = np.asarray(a + b)
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


def _operand_class(patterns: Patterns, fmt: Format) -> NDArray[np.uint8]:
    """Return the ranked class of an operand by itself."""
    magnitude = patterns & (fmt.sign_bit - 1)
    least = 1 << fmt.significand_bits
    masks = {
        "zero": magnitude == 0,
        "subnormal": magnitude - 1 < least - 1,  # zero wraps around
        "infinity": magnitude == fmt.infinity,
        "nan": magnitude > fmt.infinity,
    }
    # The classes exclude one another: the sum is the one that holds.
    return functools.reduce(np.bitwise_or, (_marked(m, _RANKED[name]) for name, m in masks.items()))


def _marked(mask: NDArray[np.bool_], code: int) -> NDArray[np.uint8]:
    """Return a code where a mask holds, and 0 elsewhere."""
    return np.asarray(mask).view(np.uint8) * np.uint8(code)


@functools.cache
def _binade_table(fmt: Format) -> NDArray[np.int16]:
    """Return the binade of every pattern of a 16-bit format."""
    value = decode64(np.arange(1 << fmt.width, dtype=fmt.pattern_dtype), fmt)
    return binade_of(value.view(np.uint64), FLOAT64)


def _power(exponent: int) -> np.float64:
    return np.float64(2.0**exponent)


def _quiet_nan(fmt: Format) -> int:
    """Return the canonical quiet NaN: infinity with the top bit of the significand set."""
    return fmt.infinity | 1 << (fmt.significand_bits - 1)
