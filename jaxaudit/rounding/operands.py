"""Operands for comparing an operation's rounding, as bit patterns in blocks: all of them, or hard ones.

A block is made from its number alone, so that any thread may make any block, in any order, the same
each time. Where there are too many operands to try all, a part is hard (ties and what lies next to
them, cancellation, the ends of the range, special values), a part is realistic (exponents as the
kind of expression meets them, all significands), and a part is random bit patterns.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from jaxaudit.floats import Format, Patterns

#: Elements at a time, so that a handful of arrays stays in a core's cache.
BLOCK = 1 << 18

#: What the operands are for; see `hard_and_random`.
Kind = Literal["any", "interpolation", "quotient sum", "product sum", "adam"]

#: Hard operands take at least ten times as long to make as others do, so only so many blocks have them.
_BLOCKS_WITH_HARD = 256

#: Realistic and random elements made at a time.
_PIECE = 1 << 14

#: The most bits of operands whose quotient next to a tie is made within int64.
_QUOTIENT_BITS = 30

_Integers = NDArray[np.int64]
_Exponents = NDArray[np.int16]
_Formats = tuple[Format, ...]
_Case = Callable[[np.random.Generator, Sequence[Format], int], Sequence[Patterns]]
_Places = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
    """Operands of one operation, made block by block.

    Attributes:
        blocks: number of blocks.
        size: elements of every block.
        coverage: for people, what the operands are and how many.
        make: makes the block of a number; see `block`.
    """

    blocks: int
    size: int
    coverage: str
    make: Callable[[int], tuple[Patterns, ...]]

    @property
    def count(self) -> int:
        """Elements in all."""
        return self.blocks * self.size

    def block(self, number: int) -> tuple[Patterns, ...]:
        """Make the bit patterns of one block: a new, contiguous array for each operand."""
        if not 0 <= number < self.blocks:
            raise IndexError(f"Block {number} was asked for, but there are {self.blocks}.")
        return self.make(number)


def everything(fmt: Format) -> Operands:
    """List all patterns of a format of 16 or 32 bits, in order."""
    count = 1 << fmt.width
    size = min(count, BLOCK)
    return Operands(
        blocks=count // size,
        size=size,
        coverage=f"all {count:,} patterns",
        make=functools.partial(_consecutive, fmt, size),
    )


def all_pairs(fmt: Format) -> Operands:
    """List all pairs of patterns of a format of 16 bits, those of the second operand in order."""
    patterns = np.arange(1 << fmt.width, dtype=fmt.pattern_dtype)
    return _pairs(patterns, f"all {patterns.size**2:,} pairs")


def pairs_of_hard(fmt: Format, count: int) -> Operands:
    """List all pairs of the first hard patterns of a format of 16 bits; see `hard_patterns`."""
    if count & (count - 1) or not 0 < count <= 1 << fmt.width:
        raise ValueError(
            f"{count} hard patterns of {fmt.name} do not fill blocks: ask for a power of two, "
            f"at most {1 << fmt.width}."
        )
    named = f"all pairs of {count:,} hard patterns ({count**2:,})"
    return _pairs(hard_patterns(fmt, count), named)


def hard_patterns(fmt: Format, count: int) -> Patterns:
    """Choose patterns of a format of 16 bits at which rounding may go wrong, the most telling first.

    Zeros, infinities, NaNs and the ends of the ranges; then powers of two in every binade, both
    signs, and their neighbours; halfway significands; then others over all exponents and signs.
    """
    bits = fmt.significand_bits
    binades = _spread(np.arange(1, fmt.infinity >> bits))
    powers = binades << bits
    # Every second one is just below halfway, every second pair negative.
    half = powers + (1 << (bits - 1)) - (binades & 1) | (binades & 2) << (fmt.width - 2)
    edges = [_with_both_signs(p, fmt) for p in (_landmarks(fmt), powers, powers - 1, powers + 1)]
    candidates = np.concatenate([*edges, half, _spread(np.arange(1 << fmt.width))])
    first = np.sort(np.unique(candidates, return_index=True)[1])
    return candidates[first[:count]].astype(fmt.pattern_dtype)


def hard_and_random(
    formats: Sequence[Format],
    count: int,
    seed: int,
    kind: Kind = "any",
    targets: Sequence[Format] = (),
) -> Operands:
    """Draw operands of which a part is hard, a part realistic, and at least a quarter random bits.

    The first 256 blocks are hard in a quarter of their elements and realistic in half of them; from
    there on three quarters are realistic. Hard elements are ties of sums, products and quotients
    and what lies next to them, terms that meet or cancel, results at the ends of the range,
    subnormal numbers and special values, each for every pair of operands that the kind lets meet.

    Args:
        formats: of one to four operands, which may differ.
        count: elements in all: a multiple of `BLOCK`, or fewer than that, in one block.
        seed: of all blocks; block i is drawn from the generator seeded with (seed, i).
        kind: "any" expression; "interpolation" from m to g, of similar exponents; a "quotient sum"
            p + c * a / b or "product sum" p + c * a * b, whose second term is 2^-12 to 2^12 ulp of
            p; "adam" for param, exp_avg, exp_avg_sq and grad. exp_avg_sq is positive but for a
            sixteenth of the hard elements, so is b in realistic and most hard quotient sums.
        targets: formats to which a single operand is to be rounded; the hard elements are then
            midpoints of their neighbouring numbers, and what lies next to these.
            Targets as wide as the operand are passed over.
    """
    formats, size = tuple(formats), min(count, BLOCK)
    _check(formats, count, kind, targets)
    parts = [_parts(size, number) for number in range(count // size)]
    hard, realistic, random = np.sum(parts, axis=0)
    narrower = tuple(t for t in targets if t.width < formats[0].width)
    return Operands(
        blocks=len(parts),
        size=size,
        coverage=f"{hard:,} hard, {realistic:,} realistic and {random:,} random",
        make=functools.partial(_mixed, formats, size, seed, kind, narrower),
    )


def _check(formats: _Formats, count: int, kind: Kind, targets: Sequence[Format]) -> None:
    if count < 1 or (count > BLOCK and count % BLOCK):
        raise ValueError(
            f"{count} elements do not fill blocks: ask for a multiple of {BLOCK}, or for fewer."
        )
    if kind not in _KINDS:
        raise ValueError(f"No kind of operands is called {kind!r}; there are {', '.join(_KINDS)}.")
    needed = _KINDS[kind].operands
    if len(formats) not in needed:
        raise ValueError(
            f"{len(formats)} formats were given, but operands of the kind {kind!r} are "
            f"{' or '.join(map(str, needed))}."
        )
    if targets and len(formats) > 1:
        raise ValueError(
            f"Targets were given for {len(formats)} operands, but only a single one is rounded to "
            "them: leave `targets` out."
        )


def _consecutive(fmt: Format, size: int, number: int) -> tuple[Patterns]:
    return (np.arange(number * size, (number + 1) * size, dtype=fmt.pattern_dtype),)


def _pairs(patterns: Patterns, coverage: str) -> Operands:
    rows = min(patterns.size, BLOCK // patterns.size)
    return Operands(
        blocks=patterns.size // rows,
        size=rows * patterns.size,
        coverage=coverage,
        make=functools.partial(_rows_of_pairs, patterns, rows),
    )


def _rows_of_pairs(patterns: Patterns, rows: int, number: int) -> tuple[Patterns, Patterns]:
    first = patterns[number * rows : (number + 1) * rows]
    return np.repeat(first, patterns.size), np.tile(patterns, rows)


def _parts(size: int, number: int) -> tuple[int, int, int]:
    """Count the hard, realistic and random elements of a block."""
    quarter = -(-size // 4)
    hard = quarter if number < _BLOCKS_WITH_HARD else 0
    random = min(quarter, size - hard)
    return hard, size - hard - random, random


def _mixed(
    formats: _Formats, size: int, seed: int, kind: Kind, targets: _Formats, number: int
) -> tuple[Patterns, ...]:
    rng = np.random.default_rng([seed, number])
    hard, realistic, _ = _parts(size, number)
    operands = tuple(np.empty(size, fmt.pattern_dtype) for fmt in formats)
    _fill(operands, 0, _hard(rng, formats, hard, kind, targets))
    for start, count in _pieces(hard, hard + realistic):
        _fill(operands, start, _realistic(rng, formats, count, kind))
    for start, count in _pieces(hard + realistic, size):
        _fill(operands, start, [_random_bits(rng, fmt, count) for fmt in formats])
    for place in _KINDS[kind].positive:
        fmt = formats[place]
        operands[place][hard // 16 :] &= fmt.pattern_dtype.type(fmt.sign_bit - 1)
    return operands


def _fill(operands: Sequence[Patterns], start: int, parts: Sequence[Patterns]) -> None:
    for operand, part in zip(operands, parts, strict=True):
        operand[start : start + part.size] = part


def _pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut a range into starts and counts: memory for large intermediates costs more than their values."""
    for at in range(start, end, _PIECE):
        yield at, min(_PIECE, end - at)


def _random_bits(rng: np.random.Generator, fmt: Format, count: int) -> Patterns:
    words = rng.integers(0, 1 << 64, -(-count * fmt.bytes // 8), dtype=np.uint64)
    return words.view(fmt.pattern_dtype)[:count]


def _realistic(
    rng: np.random.Generator, formats: _Formats, count: int, kind: Kind
) -> list[Patterns]:
    operands = [_random_bits(rng, fmt, count) for fmt in formats]
    exponents = _KINDS[kind].exponents(rng, formats, count)
    for operand, exponent, fmt in zip(operands, exponents, formats, strict=True):
        exponent += fmt.bias
        np.clip(exponent, 0, 2 * fmt.bias, out=exponent)
        field = exponent.astype(fmt.pattern_dtype)
        field <<= fmt.pattern_dtype.type(fmt.significand_bits)
        operand &= fmt.pattern_dtype.type(fmt.sign_bit | ((1 << fmt.significand_bits) - 1))
        operand |= field
    if _KINDS[kind].strewn:
        _strew_special(rng, formats, operands)
    return operands


def _strew_special(
    rng: np.random.Generator, formats: _Formats, operands: Sequence[Patterns]
) -> None:
    """Make one operand a small, infinite or other special number in every sixteen elements."""
    starts = np.arange(0, operands[0].size - 15, 16)
    places = starts + rng.integers(0, 16, starts.size)  # anywhere in a vector of the processor
    cases = list(itertools.product(enumerate(formats), (_small, _special)))
    for number, ((operand, fmt), case) in enumerate(cases):
        chosen = places[number :: len(cases)]
        operands[operand][chosen] = case(rng, [fmt], chosen.size)[0]


def _hard(
    rng: np.random.Generator, formats: _Formats, count: int, kind: Kind, targets: _Formats
) -> list[Patterns]:
    """Draw as many operands of each case as of every other, and shuffle them.

    Shuffled, since a processor's vectors that hold one kind of number only would leave out how it
    deals with several.
    """
    exponents = _KINDS[kind].exponents(rng, formats, count)
    operands = [_numbers(rng, e, f) for e, f in zip(exponents, formats, strict=True)]
    cases = list(_cases(len(formats), kind, targets))
    edges = np.linspace(0, count, len(cases) + 1).astype(int)
    for (case, places), start, end in zip(cases, edges, edges[1:], strict=False):
        drawn = case(rng, [formats[p] for p in places], int(end - start))
        for place, patterns in zip(places, drawn, strict=True):
            operands[place][start:end] = patterns
    order = rng.permutation(count)
    return [operand[order] for operand in operands]


def _cases(operands: int, kind: Kind, targets: _Formats) -> Iterator[tuple[_Case, _Places]]:
    """List what hard operands there are, with the places of the operands that each of them draws."""
    places = tuple(range(operands))
    for target in targets:
        for case in (_midpoints,) * 6 + (_midpoints_at_edges,) * 6:
            yield functools.partial(case, target=target), places
    yield from [(_ordinary, ()), (_small, places), (_special, places)]
    yield from itertools.product((_small, _special, _squares), [(place,) for place in places])
    pairs = _KINDS[kind].pairs or itertools.combinations(places, 2)
    yield from ((case, pair) for pair in pairs for case in _PAIR_CASES)
    yield from _KINDS[kind].cases


# The exponents of realistic operands, kind by kind.


def _any_exponents(rng: np.random.Generator, formats: _Formats, count: int) -> list[_Exponents]:
    return [_small_integers(rng, -12, 4, count) for _ in formats]


def _similar_exponents(rng: np.random.Generator, formats: _Formats, count: int) -> list[_Exponents]:
    common = _small_integers(rng, max(-30, *(2 - f.bias for f in formats)), 4, count)
    return [common + _small_integers(rng, -2, 3, count) for _ in formats]


def _quotient_exponents(
    rng: np.random.Generator, formats: _Formats, count: int
) -> list[_Exponents]:
    bits = formats[0].significand_bits
    whole = _small_integers(rng, -12, 4, count)
    # Divisors mostly above 1, so that dividends of a narrow range need not be subnormal.
    divisor = _small_integers(rng, -(bits // 2), bits + 1, count)
    return [whole, whole + divisor - bits + _small_integers(rng, -12, 13, count), divisor]


def _product_exponents(rng: np.random.Generator, formats: _Formats, count: int) -> list[_Exponents]:
    whole, factor = _small_integers(rng, -12, 4, count), _small_integers(rng, -12, 4, count)
    ulps = _small_integers(rng, -12, 13, count)
    return [whole, factor, whole - factor - formats[0].significand_bits + ulps]


def _adam_exponents(rng: np.random.Generator, formats: _Formats, count: int) -> list[_Exponents]:
    size = _small_integers(rng, max(-24, (1 - formats[2].bias) // 2), 4, count)
    exp_avg, squared, grad = (_small_integers(rng, -2, 3, count) for _ in range(3))
    return [_small_integers(rng, -12, 3, count), size + exp_avg, 2 * size + squared, size + grad]


# Hard operands, case by case: for `count` elements of the formats of the places that a case draws.


def _ordinary(
    rng: np.random.Generator, formats: Sequence[Format], count: int
) -> Sequence[Patterns]:
    """Draw nothing: leave operands with realistic exponents and short significands."""
    return []


def _midpoints(
    rng: np.random.Generator, formats: Sequence[Format], count: int, target: Format
) -> Sequence[Patterns]:
    """Draw midpoints of two neighbours in the target, and numbers next to these."""
    return [_next_to_midpoint(rng, formats[0], rng.integers(0, target.infinity, count), target)]


def _midpoints_at_edges(
    rng: np.random.Generator, formats: Sequence[Format], count: int, target: Format
) -> Sequence[Patterns]:
    """As above at the edges of binades, most often where subnormals end and numbers overflow."""
    binades = target.infinity >> target.significand_bits
    binade = rng.integers(-binades // 2, 3 * binades // 2, count).clip(0, binades)
    below = (binade << target.significand_bits) + rng.integers(-2, 2, count)
    return [_next_to_midpoint(rng, formats[0], below.clip(0, target.infinity - 1), target)]


def _next_to_midpoint(
    rng: np.random.Generator, fmt: Format, below: _Integers, target: Format
) -> Patterns:
    """Draw within the gap above a magnitude of the target; above its largest finite one, as if no end."""
    bits = target.significand_bits
    field = below >> bits
    integer = (below & ((1 << bits) - 1)) | (field > 0).astype(np.int64) << bits
    scale = np.maximum(field, 1) - target.bias - bits - 1
    # Next to the midpoint means less than an ulp of any format between the two, if there is one.
    distance = np.int64(1) << rng.integers(0, max(1, fmt.significand_bits - bits), below.size)
    nudge = _nudges(rng, below.size) * np.where(_flips(rng, below.size), distance, 1)
    return _patterns(2 * integer + 1, scale, fmt, nudge, _flips(rng, below.size))


def _small(rng: np.random.Generator, formats: Sequence[Format], count: int) -> Sequence[Patterns]:
    """Draw subnormals of every length, zeros, and numbers of the smallest normal binade."""
    operands = []
    for fmt in formats:
        length = rng.integers(0, fmt.significand_bits + 2, count)
        magnitude = rng.integers(0, np.int64(1) << length)
        operands.append(_signed(magnitude, fmt, _flips(rng, count)))
    return operands


def _special(rng: np.random.Generator, formats: Sequence[Format], count: int) -> Sequence[Patterns]:
    return [_signed(rng.choice(_landmarks(fmt), count), fmt, _flips(rng, count)) for fmt in formats]


def _squares(rng: np.random.Generator, formats: Sequence[Format], count: int) -> Sequence[Patterns]:
    """Draw squares of short numbers, and numbers next to these; before them their roots, if asked."""
    root = _odd(rng, rng.integers(1, formats[-1].significand_bits // 2 + 2, count))
    scale = rng.integers(-(formats[-1].bias // 2), 0, count)
    square = _patterns(root * root, 2 * scale, formats[-1], _nudges(rng, count), 0)
    return [_patterns(root, scale, f, 0, _flips(rng, count)) for f in formats[:-1]] + [square]


def _meetings(
    rng: np.random.Generator, formats: Sequence[Format], count: int
) -> Sequence[Patterns]:
    """Draw terms of which the smaller one still touches, or just misses, the last bits of the larger."""
    exponent = _common_exponents(rng, formats, count)
    exponent = np.where(
        rng.integers(0, 8, count) == 0, exponent.max(initial=0), exponent
    )  # overflow
    behind = rng.integers(0, max(f.significand_bits for f in formats) + 4, count)
    swapped = _flips(rng, count)
    behind = behind * swapped, behind * (1 - swapped)
    return [_numbers(rng, exponent - b, f) for b, f in zip(behind, formats, strict=True)]


def _sum_ties(
    rng: np.random.Generator, formats: Sequence[Format], count: int
) -> Sequence[Patterns]:
    """Draw a number and an odd number of halves of its ulp, or next to that.

    The ulp is that of either operand's format.
    """
    exponent = _common_exponents(rng, formats, count)
    bits = rng.choice([f.significand_bits for f in formats], count)
    halves = 2 * rng.integers(0, 8, count) * _flips(rng, count) + 1
    nudge, negative = _nudges(rng, count), _flips(rng, count)
    term = _patterns(halves, exponent - bits - 1, formats[1], nudge, negative)
    return [_numbers(rng, exponent, formats[0]), term]


def _overflowing_sums(
    rng: np.random.Generator, formats: Sequence[Format], count: int
) -> Sequence[Patterns]:
    """Draw one of the largest finite numbers and a few halves of its ulp, or next to that."""
    below, halves = rng.integers(1, 5, count), rng.integers(1, 12, count)
    negative = _flips(rng, count)
    scale = np.full(count, formats[0].bias - formats[0].significand_bits - 1)
    return [
        _signed(formats[0].infinity - below, formats[0], negative),
        _patterns(halves, scale, formats[1], _nudges(rng, count), negative),
    ]


def _cancellations(
    rng: np.random.Generator, formats: Sequence[Format], count: int
) -> Sequence[Patterns]:
    """Draw a number and its opposite, or a neighbour or near neighbour of that, in the other format."""
    bits = min(f.significand_bits for f in formats)
    number = _odd(rng, rng.integers(1, bits + 2, count))
    scale = _common_exponents(rng, formats, count) - bits
    negative = _flips(rng, count)
    nudge = _nudges(rng, count) << rng.integers(0, bits, count) * _flips(rng, count)
    return [
        _patterns(number, scale, formats[0], 0, negative),
        _patterns(number, scale, formats[1], nudge, 1 - negative),
    ]


def _product_ties(
    rng: np.random.Generator, formats: Sequence[Format], count: int
) -> Sequence[Patterns]:
    """Draw factors whose product has one bit too many, or next to that; in a third, a subnormal's."""
    bits = 1 + min(f.significand_bits for f in formats)
    length = rng.integers(1, bits + 1, count)
    other = bits + 1 - length
    lowest = rng.integers(0, 3, count) == 0
    scale = np.where(lowest, _half_smallest(formats), _common_exponents(rng, formats, count) - bits)
    short = lowest & (rng.integers(0, 8, count) == 0)  # half the smallest subnormal itself
    factors = [_odd(rng, np.where(short, 1, n)) for n in (length, other)]
    return _factors(rng, formats, factors, scale, _nudges(rng, count))


def _near_product_ties(
    rng: np.random.Generator, formats: Sequence[Format], count: int
) -> Sequence[Patterns]:
    """Draw long factors whose product is next to a tie: the bits to round away are 100...0 and 1 to 15.

    The second factor is that remainder divided by the first, modulo a power of two.
    """
    bits = 1 + min(f.significand_bits for f in formats)
    first = _odd(rng, np.full(count, bits))
    # The product may have one bit less, and then rounds one bit away less.
    remainder = (1 << (bits - 1) >> _flips(rng, count)) + 2 * rng.integers(-8, 8, count) + 1
    second = _quotient_modulo(remainder, first, bits)
    scale = _common_exponents(rng, formats, count) - 2 * bits
    return _factors(rng, formats, (first, second), scale, 0)


def _quotient_ties(
    rng: np.random.Generator, formats: Sequence[Format], count: int
) -> Sequence[Patterns]:
    """Draw short multiples of a divisor, or next to them; in half, the quotient is a subnormal tie."""
    bits = 1 + min(f.significand_bits for f in formats)
    length = rng.integers(1, bits, count)
    quotient, divisor = _odd(rng, length), _odd(rng, bits - length)
    ties = _flips(rng, count) == 1
    exponent = _common_exponents(rng, formats, count) // 2 - bits
    scale = np.where(ties, _half_smallest(formats), exponent)
    # Large divisors, so that the dividend is a normal number.
    divisor_scale = rng.integers(0, min(fmt.bias for fmt in formats) - bits, count)
    return [
        _patterns(quotient * divisor, scale + divisor_scale, formats[0], _nudges(rng, count), 0),
        _patterns(divisor, divisor_scale, formats[1], 0, _flips(rng, count)),
    ]


def _near_quotient_ties(
    rng: np.random.Generator, formats: Sequence[Format], count: int
) -> Sequence[Patterns]:
    """Draw operands whose quotient is as near to a tie as can be.

    An odd number t of one bit too many, 2^n + (-r / b mod 2^n) with a small odd r, makes b * t + r
    a multiple 2^n * a, so that a / b = (t + r / b) / 2^n.
    """
    bits = min(_QUOTIENT_BITS, *(1 + f.significand_bits for f in formats))
    divisor = _odd(rng, rng.integers(bits // 2, bits + 1, count))
    remainder = 2 * rng.integers(-8, 8, count) + 1
    quotient = (1 << bits) + _quotient_modulo(-remainder, divisor, bits)
    dividend = (divisor * quotient + remainder) >> bits
    exponent = _common_exponents(rng, formats, count) // 2
    divisor_exponent = _common_exponents(rng, formats, count) // 2
    return [
        _patterns(dividend, exponent + divisor_exponent - bits, formats[0], 0, _flips(rng, count)),
        _patterns(divisor, divisor_exponent - bits, formats[1], 0, _flips(rng, count)),
    ]


def _limits(rng: np.random.Generator, formats: Sequence[Format], count: int) -> Sequence[Patterns]:
    """Draw operands whose product or quotient is at an end of the normal or the subnormal numbers."""
    narrow = min(formats, key=lambda fmt: fmt.bias)
    lowest, highest = 1 - narrow.bias, narrow.bias
    edges = [highest, lowest, lowest - narrow.significand_bits]
    edge = rng.choice(edges, count) + rng.integers(-2, 3, count)
    first = rng.integers(lowest - narrow.significand_bits, highest + 1, count)
    second = np.where(_flips(rng, count), edge - first, first - edge)
    return [_numbers(rng, e, f) for e, f in zip((first, second), formats, strict=True)]


def _ties_with_quotient(
    rng: np.random.Generator, formats: Sequence[Format], count: int
) -> Sequence[Patterns]:
    """Draw p, a and b of which a / b is an odd number of halves of an ulp of p, or next to that."""
    bits = 1 + min(f.significand_bits for f in formats[1:])
    quotient = _odd(rng, rng.integers(1, 1 + bits // 2, count))
    divisor = _odd(rng, rng.integers(1, 1 + bits // 2, count))
    exponent, divisor_scale = rng.integers(-6, 5, count), rng.integers(-3, 4, count)
    scale = exponent - formats[0].significand_bits - 1 + divisor_scale
    nudge, negative = _nudges(rng, count), _flips(rng, count)
    return [
        _numbers(rng, exponent, formats[0]),
        _patterns(quotient * divisor, scale, formats[1], nudge, negative),
        _patterns(divisor, divisor_scale, formats[2], 0, 0),
    ]


def _ties_with_product(
    rng: np.random.Generator, formats: Sequence[Format], count: int
) -> Sequence[Patterns]:
    """Draw p, a and b of which a * b is an odd number of halves of an ulp of p, or next to that."""
    bits = 1 + min(f.significand_bits for f in formats[1:])
    factors = [_odd(rng, rng.integers(1, 1 + bits // 2, count)) for _ in range(2)]
    exponent = rng.integers(-6, 5, count)
    scale = exponent - formats[0].significand_bits - 1
    terms = _factors(rng, formats[1:], factors, scale, _nudges(rng, count))
    return [_numbers(rng, exponent, formats[0]), *terms]


def _near_ties_with_product(
    rng: np.random.Generator, formats: Sequence[Format], count: int
) -> Sequence[Patterns]:
    """Draw p, a and b whose product is so near to half an ulp of p that rounding it first makes a tie.

    a * b is (1 + e)(1 - e) = 1 - e^2 or (1 + e)^2 times half an ulp of p, with e an ulp of 1.
    """
    bits = min(f.significand_bits for f in formats[1:])
    one, exponent = np.full(count, 1 << bits), rng.integers(-6, 5, count)
    factors = one + 1, one + np.where(_flips(rng, count), 1, -1)
    scale = exponent - formats[0].significand_bits - 1 - 2 * bits
    return [
        _numbers(rng, exponent, formats[0]),
        *_factors(rng, formats[1:], factors, scale, 0),
    ]


# What the cases are made of.


def _factors(
    rng: np.random.Generator,
    formats: Sequence[Format],
    factors: Sequence[_Integers],
    scale: _Integers,
    nudge: _Integers | int,
) -> list[Patterns]:
    """Share the scale of a product out to its two factors, and nudge the second one."""
    count = scale.size
    share = scale // 2 + rng.integers(-4, 5, count)
    return [
        _patterns(factors[0], share, formats[0], 0, _flips(rng, count)),
        _patterns(factors[1], scale - share, formats[1], nudge, _flips(rng, count)),
    ]


def _numbers(rng: np.random.Generator, exponent: NDArray[Any], fmt: Format) -> Patterns:
    """Draw numbers of given exponents and significands of every length, a sixth with one of 1 bit.

    Half of them are moved on to a neighbour, so that there are also runs of 1s and of 0s before a 1.
    """
    bits, count = fmt.significand_bits, exponent.size
    dropped = np.minimum(rng.integers(0, bits + bits // 6 + 1, count), bits)
    integer = ((1 << bits) | rng.integers(0, 1 << bits, count)) >> dropped
    scale = exponent.astype(np.int64) - bits + dropped
    return _patterns(integer, scale, fmt, _nudges(rng, count), _flips(rng, count))


def _patterns(
    integer: _Integers,
    scale: _Integers,
    fmt: Format,
    nudge: _Integers | int,
    negative: _Integers | int,
) -> Patterns:
    """Encode integer * 2^scale, cut off where the format ends, and move on by `nudge` of its patterns.

    Args:
        integer: positive, and less than 2^53.
        scale: exponent of the integer's last bit.
        fmt: to encode in.
        nudge: patterns to move on, away from zero; those beyond zero or infinity stop there.
        negative: 1 for a negative number, 0 for a positive one.
    """
    bits = integer.astype(np.float64).view(np.int64)  # its exponent and significand, normalized
    top = fmt.infinity >> fmt.significand_bits
    field = np.minimum((bits >> 52) - 1023 + scale + fmt.bias, top)
    significand = ((bits & ((1 << 52) - 1)) | 1 << 52) >> (52 - fmt.significand_bits)
    # The hidden bit adds 1 to the exponent's field.
    above = (np.maximum(field, 1) - 1) << fmt.significand_bits
    magnitude = above + (significand >> np.clip(1 - field, 0, 63))
    return _signed(
        np.clip(np.minimum(magnitude, fmt.infinity) + nudge, 0, fmt.infinity), fmt, negative
    )


def _signed(magnitude: _Integers, fmt: Format, negative: _Integers | int) -> Patterns:
    sign = np.asarray(negative).astype(np.uint64) << np.uint64(fmt.width - 1)
    return (magnitude.astype(np.uint64) | sign).astype(fmt.pattern_dtype)


def _landmarks(fmt: Format) -> _Integers:
    """List magnitudes at which something begins or ends: of zeros, subnormals, 1, infinity, NaNs."""
    bits, infinity = fmt.significand_bits, fmt.infinity
    quiet, one = 1 << (bits - 1), fmt.bias << bits
    subnormal = [0, 1, 2, 3, quiet - 1, quiet, quiet + 1, (1 << bits) - 2, (1 << bits) - 1]
    normal = [1 << bits, (1 << bits) + 1, one - 1, one, one + 1, one + quiet, one + (1 << bits)]
    large = [infinity - (1 << bits), infinity - 2, infinity - 1, infinity]
    nans = [infinity + 1, infinity + quiet - 1, infinity + quiet, infinity + quiet + 1]
    return np.array(subnormal + normal + large + nans + [fmt.sign_bit - 1], np.int64)


def _with_both_signs(magnitudes: _Integers, fmt: Format) -> _Integers:
    """Follow every magnitude by its opposite."""
    return np.stack([magnitudes, magnitudes | fmt.sign_bit], axis=1).ravel()


def _spread(integers: _Integers) -> _Integers:
    """Reorder so that any first few are spread over the whole range: by multiples of the golden ratio."""
    return integers[np.argsort(np.arange(integers.size) * 0.6180339887498949 % 1, kind="stable")]


def _half_smallest(formats: Sequence[Format]) -> int:
    """Tell the exponent of half the smallest subnormal of the format of the narrower range."""
    fmt = min(formats, key=lambda fmt: fmt.bias)
    return -fmt.bias - fmt.significand_bits


def _common_exponents(rng: np.random.Generator, formats: Sequence[Format], count: int) -> _Integers:
    """Draw exponents of normal numbers of all the formats, but the lowest of them."""
    bias = min(fmt.bias for fmt in formats)
    return rng.integers(2 - bias, bias + 1, count)


def _odd(rng: np.random.Generator, length: _Integers) -> _Integers:
    """Draw odd integers of given numbers of bits."""
    top = np.int64(1) << (length - 1)
    return top | (rng.integers(0, 1 << 62, length.size) & (top - 1)) | 1


def _quotient_modulo(dividend: _Integers, divisor: _Integers, bits: int) -> _Integers:
    """Divide by an odd number modulo 2^bits."""
    odd = divisor.astype(np.uint64)
    inverse = odd.copy()  # right in 3 bits; each round doubles them
    for _ in range(5):
        inverse *= np.uint64(2) - odd * inverse
    product = dividend.astype(np.uint64) * inverse
    return (product & np.uint64((1 << bits) - 1)).astype(np.int64)


def _nudges(rng: np.random.Generator, count: int) -> _Integers:
    """Draw 0 half the time, else -1 or 1."""
    return rng.integers(0, 2, count) - rng.integers(0, 2, count)


def _flips(rng: np.random.Generator, count: int) -> _Integers:
    return rng.integers(0, 2, count)


def _small_integers(rng: np.random.Generator, low: int, high: int, count: int) -> _Exponents:
    return rng.integers(low, high, count, dtype=np.int16)


#: Cases of two operands that meet.
_PAIR_CASES: tuple[_Case, ...] = (
    _meetings,
    _sum_ties,
    _overflowing_sums,
    _cancellations,
    _product_ties,
    _near_product_ties,
    _quotient_ties,
    _near_quotient_ties,
    _limits,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What operands of one kind look like.

    Attributes:
        operands: how many there may be.
        exponents: draws the exponents of realistic ones.
        pairs: places of operands that meet in an operation; all pairs where none are named.
        cases: hard operands of this kind alone.
        positive: places of operands that are not negative, but for a sixteenth of the hard ones.
        strewn: whether a sixteenth of the realistic elements has a special number in one operand.
    """

    operands: _Places = (3,)
    exponents: Callable[[np.random.Generator, _Formats, int], list[_Exponents]]
    pairs: tuple[_Places, ...] = ()
    cases: tuple[tuple[_Case, _Places], ...] = ()
    positive: _Places = ()
    strewn: bool = False


_KINDS: dict[str, _Plan] = {
    "any": _Plan(operands=(1, 2, 3, 4), exponents=_any_exponents),
    "interpolation": _Plan(operands=(2,), exponents=_similar_exponents),
    "quotient sum": _Plan(
        exponents=_quotient_exponents,
        cases=((_ties_with_quotient, (0, 1, 2)),) * 4,
        positive=(2,),
    ),
    "product sum": _Plan(
        exponents=_product_exponents,
        cases=((_ties_with_product, (0, 1, 2)), (_near_ties_with_product, (0, 1, 2))) * 2,
    ),
    "adam": _Plan(
        operands=(4,),
        exponents=_adam_exponents,
        pairs=((1, 3), (0, 1)),
        cases=((_squares, (3, 2)), (_squares, (1, 2))) * 2,
        positive=(2,),
        strewn=True,
    ),
}
