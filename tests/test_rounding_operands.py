import itertools
import pickle
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest

from jaxaudit import floats
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Format
from jaxaudit.rounding import operands
from jaxaudit.rounding.operands import BLOCK, all_pairs, everything, hard_and_random, pairs_of_hard

KINDS = {
    "any": (FLOAT32, FLOAT32),
    "interpolation": (BFLOAT16, FLOAT32),
    "quotient sum": (FLOAT32, FLOAT32, FLOAT32),
    "product sum": (FLOAT16, FLOAT32, BFLOAT16),
    "adam": (BFLOAT16, FLOAT32, FLOAT16, FLOAT64),
}
QUARTER = BLOCK // 4


def finite32(drawn: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Decode float32 operands to float64, without the elements that are not all finite."""
    finite = ~np.any([floats.is_nonfinite(patterns, FLOAT32) for patterns in drawn], axis=0)
    return [patterns[finite].view(np.float32).astype(np.float64) for patterns in drawn]


def ties(exact: np.ndarray) -> np.ndarray:
    """Tell which float64 values are midway between two float32 numbers: both neighbours as near."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = exact.astype(np.float32)
    toward = np.where(exact > rounded, np.inf, -np.inf).astype(np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        other = np.nextafter(rounded, toward).astype(np.float64)
        return (exact != rounded) & (np.abs(exact - rounded) == np.abs(exact - other))


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16], ids=lambda fmt: fmt.name)
def test_everything_lists_all_patterns_of_16_bits_once(fmt):
    listed = everything(fmt)
    assert (listed.count, listed.blocks) == (65_536, 1)
    assert listed.coverage == "all 65,536 patterns"
    (block,) = listed.block(0)
    np.testing.assert_array_equal(block, np.arange(65_536, dtype=np.uint16), strict=True)


@pytest.mark.parametrize("number", [0, 1, 8191, 8192, 16_383])
def test_everything_lists_all_patterns_of_32_bits_in_order(number):
    listed = everything(FLOAT32)
    assert (listed.count, listed.blocks) == (1 << 32, 1 << 14)
    assert listed.coverage == "all 4,294,967,296 patterns"
    (block,) = listed.block(number)
    expected = np.arange(number * BLOCK, (number + 1) * BLOCK).astype(np.uint32)
    np.testing.assert_array_equal(block, expected, strict=True)


@pytest.mark.parametrize("number", [0, 1, 8191, 16_383])
def test_all_pairs_are_numbered_by_both_patterns(number):
    listed = all_pairs(BFLOAT16)
    assert (listed.count, listed.blocks) == (1 << 32, 1 << 14)
    assert listed.coverage == "all 4,294,967,296 pairs"
    first, second = listed.block(number)
    assert first.dtype == second.dtype == np.uint16
    numbers = first.astype(np.int64) << 16 | second
    np.testing.assert_array_equal(numbers, np.arange(number * BLOCK, (number + 1) * BLOCK))


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16], ids=lambda fmt: fmt.name)
def test_pairs_of_hard_are_all_pairs_of_distinct_patterns(fmt):
    listed = pairs_of_hard(fmt, 2048)
    assert (listed.count, listed.blocks) == (1 << 22, 16)
    assert listed.coverage == "all pairs of 2,048 hard patterns (4,194,304)"
    pairs = [listed.block(number) for number in range(listed.blocks)]
    assert {(a.size, b.size, a.dtype, b.dtype) for a, b in pairs} == {
        (BLOCK, BLOCK, np.dtype(np.uint16), np.dtype(np.uint16))
    }
    chosen = pairs[0][1][:2048]
    assert np.unique(chosen).size == 2048
    first, second = (np.concatenate(part).reshape(2048, 2048) for part in zip(*pairs, strict=True))
    np.testing.assert_array_equal(first, np.broadcast_to(chosen[:, None], first.shape))
    np.testing.assert_array_equal(second, np.broadcast_to(chosen, second.shape))


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16], ids=lambda fmt: fmt.name)
def test_hard_patterns_have_what_ends_and_begins(fmt):
    bits, infinity = fmt.significand_bits, fmt.infinity
    one = 0x3F80 if fmt is BFLOAT16 else 0x3C00
    ends = [0, 1, (1 << bits) - 1, 1 << bits, one - 1, one, one + 1, infinity - 1, infinity]
    nans = [infinity + 1, infinity | 1 << (bits - 1), 0x7FFF]
    powers = np.arange(1, infinity >> bits) << bits
    wanted = np.concatenate([ends, nans, powers, powers - 1, powers + 1])
    chosen = operands.hard_patterns(fmt, 2048)
    assert np.isin(wanted, chosen).all()
    assert np.isin(wanted | fmt.sign_bit, chosen).all()
    assert np.isin((chosen & (fmt.sign_bit - 1)) >> bits, np.arange(256)).all()
    few = operands.hard_patterns(fmt, 64)
    assert np.isin(np.array(ends + nans), few).all()


def test_hard_patterns_are_spread_over_all_exponents():
    chosen = operands.hard_patterns(FLOAT16, 2048)
    counts = np.bincount(chosen >> FLOAT16.significand_bits, minlength=64)
    assert counts.min() >= 20 and counts.max() <= 60


def test_few_pairs_make_one_block():
    listed = pairs_of_hard(FLOAT16, 64)
    assert (listed.count, listed.blocks) == (4096, 1)
    assert [patterns.size for patterns in listed.block(0)] == [4096, 4096]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_same_in_any_order_and_alike_in_shape(kind):
    formats = KINDS[kind]
    drawn, again = (hard_and_random(formats, 300 * BLOCK, seed=7, kind=kind) for _ in range(2))
    assert (drawn.count, drawn.blocks) == (300 * BLOCK, 300)
    again.block(299)
    for number in (1, 0, 299):
        block = drawn.block(number)
        assert [p.dtype for p in block] == [fmt.pattern_dtype for fmt in formats]
        assert all(p.shape == (BLOCK,) and p.flags.c_contiguous for p in block)
        for one, other in zip(block, pickle.loads(pickle.dumps(again)).block(number), strict=True):
            np.testing.assert_array_equal(one, other)


def test_blocks_and_seeds_differ():
    drawn = hard_and_random((FLOAT32,), 2 * BLOCK, seed=7)
    other = hard_and_random((FLOAT32,), 2 * BLOCK, seed=8)
    blocks = [drawn.block(0)[0], drawn.block(1)[0], other.block(0)[0]]
    for a, b in itertools.combinations(blocks, 2):
        assert (a == b).mean() < 0.01


@pytest.mark.parametrize(
    "count, coverage",
    [
        (1, "1 hard, 0 realistic and 0 random"),
        (1000, "250 hard, 500 realistic and 250 random"),
        (BLOCK, "65,536 hard, 131,072 realistic and 65,536 random"),
        (4096 * BLOCK, "16,777,216 hard, 788,529,152 realistic and 268,435,456 random"),
    ],
)
def test_coverage_tells_the_parts(count, coverage):
    drawn = hard_and_random((FLOAT32, FLOAT32), count, seed=1)
    assert drawn.coverage == coverage
    assert drawn.count == count
    assert [p.size for p in drawn.block(drawn.blocks - 1)] == [min(count, BLOCK)] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16, FLOAT32, FLOAT64], ids=lambda fmt: fmt.name)
def test_every_kind_has_special_operands_in_every_format(kind, fmt):
    drawn = hard_and_random((fmt,) * len(KINDS[kind]), BLOCK, seed=2, kind=kind)
    for place, patterns in enumerate(drawn.block(0)):
        fewest = 1 if (kind, place) == ("adam", 2) else 10  # few second moments are negative
        magnitude = patterns & fmt.pattern_dtype.type(fmt.sign_bit - 1)
        for special in (0, fmt.sign_bit, fmt.infinity, fmt.infinity | fmt.sign_bit):
            assert (patterns == special).sum() >= fewest
        assert (magnitude > fmt.infinity).sum() >= 100
        assert ((magnitude > 0) & (magnitude < 1 << fmt.significand_bits)).sum() >= 1000
        assert (magnitude == fmt.infinity - 1).sum() >= 10


def test_sums_of_float32_tie_cancel_and_overflow():
    a, b = finite32([p[:QUARTER] for p in hard_and_random((FLOAT32,) * 2, BLOCK, seed=3).block(0)])
    near = np.abs(np.frexp(a)[1] - np.frexp(b)[1]) < 29  # where the sum is exact in float64
    exact = (a + b)[near]
    assert ties(exact).sum() > 2500
    assert (exact == 0).sum() > 500
    overflow = 2.0**128 - 2.0**103  # midway from the largest finite number on
    assert (np.abs(exact) == overflow).sum() > 100
    assert (np.abs(exact) > overflow).sum() > 1000
    close = (exact != 0) & (np.abs(exact) < np.abs(a[near]) * 2.0**-20)
    assert close.sum() > 1000


def test_products_of_float32_tie_and_end_in_the_subnormals():
    a, b = finite32([p[:QUARTER] for p in hard_and_random((FLOAT32,) * 2, BLOCK, seed=3).block(0)])
    exact = a * b  # of at most 48 bits, and within float64's range
    tied = ties(exact)
    subnormal = (exact != 0) & (np.abs(exact) < 2.0**-126)
    assert tied.sum() > 1500
    assert (tied & subnormal).sum() > 400
    assert (np.abs(exact) > 2.0**128).sum() > 500
    assert (np.abs(exact) == 2.0**-150).sum() > 10
    significand = exact.view(np.int64) >> 5  # 48 bits, of which 24 are rounded away
    away = (significand & 0xFFFFFF) - (1 << 23)
    normal = (np.abs(exact) > 2.0**-126) & (np.abs(exact) < 2.0**127)
    assert (normal & (away != 0) & (np.abs(away) < 40)).sum() > 1000  # by chance, below 1


def test_quotients_of_float32_tie_as_subnormals_and_nearly_tie_elsewhere():
    a, b = finite32([p[:QUARTER] for p in hard_and_random((FLOAT32,) * 2, BLOCK, seed=3).block(0)])
    a, b = a[b != 0], b[b != 0]
    quotient = a / b
    subnormal = (quotient != 0) & (np.abs(quotient) < 2.0**-126)
    # Ties of quotients are short, so that float64 has them exactly.
    assert (ties(quotient) & subnormal).sum() > 800
    assert (np.abs(quotient) >= 2.0**128).sum() > 500
    # An ulp of float32 is 2^29 of float64; a quotient b * t + r is r / b from the tie t.
    away = (quotient.view(np.int64) & ((1 << 29) - 1)) - (1 << 28)
    normal = (np.abs(quotient) > 2.0**-126) & (np.abs(quotient) < 2.0**127)
    assert (normal & (away != 0) & (np.abs(away) < 1 << 9)).sum() > 500  # by chance, about 0.1


@pytest.mark.parametrize(
    "source, target",
    [(s, t) for s in (FLOAT32, FLOAT64) for t in (BFLOAT16, FLOAT16, FLOAT32) if t is not s],
    ids=lambda fmt: fmt.name,
)
def test_casts_tie_at_every_end_of_the_target(source: Format, target: Format):
    drawn = hard_and_random((source,), BLOCK, seed=4, targets=(target,))
    value = drawn.block(0)[0][:QUARTER].view(source.value_dtype)
    magnitude = np.abs(value[np.isfinite(value)].astype(np.float64))
    smallest = float(ml_dtypes.finfo(target.value_dtype).smallest_subnormal)
    largest = float(ml_dtypes.finfo(target.value_dtype).max)
    below = magnitude[magnitude < largest]
    midpoint = np.remainder(below, spacing(below, target)) == spacing(below, target) / 2
    assert midpoint.sum() > 10_000
    assert (midpoint & (below < smallest * 2**target.significand_bits)).sum() > 1000
    assert (magnitude == smallest / 2).sum() > 100
    threshold = largest + float(spacing(np.array([largest]), target)[0]) / 2
    assert (magnitude == threshold).sum() > 100
    near = np.abs(magnitude - threshold) < (threshold - largest) / 2
    assert ((magnitude != threshold) & near).sum() > 100


def spacing(magnitude: np.ndarray, fmt: Format) -> np.ndarray:
    """Tell the distance of a format's numbers around a magnitude."""
    lowest = 2 - (1 << (fmt.exponent_bits - 1))
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, lowest)
    return np.ldexp(1.0, exponent - fmt.significand_bits)


def test_casts_of_float64_meet_double_rounding():
    drawn = hard_and_random((FLOAT64,), BLOCK, seed=5, targets=(BFLOAT16, FLOAT32))
    value = drawn.block(0)[0][:QUARTER].view(np.float64)
    value = np.abs(value[np.isfinite(value)])
    value = value[(value >= 2.0**-126) & (value < 2.0**127)]
    ulp = spacing(value, BFLOAT16)
    directly = np.rint(value / ulp) * ulp  # exact but for the rounding, which is to even
    by_float32 = value.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    assert (directly != by_float32).sum() > 1000


@pytest.mark.parametrize(
    "kind, term", [("quotient sum", np.divide), ("product sum", np.multiply)], ids=["/", "*"]
)
def test_terms_of_sums_reach_the_last_bits(kind, term):
    block = hard_and_random((FLOAT32,) * 3, BLOCK, seed=6, kind=kind).block(0)
    whole, a, b = finite32([patterns[QUARTER : 3 * QUARTER] for patterns in block])
    assert len(whole) == 2 * QUARTER
    ulps = np.abs(term(a, b)) / spacing(np.abs(whole), FLOAT32)
    assert ((ulps > 2.0**-14) & (ulps < 2.0**14)).all()
    whole, a, b = finite32([patterns[:QUARTER] for patterns in block])
    with np.errstate(all="ignore"):
        exact = term(a, b)
        small = np.abs(exact) < np.abs(whole)
        halves = exact / spacing(np.abs(whole), FLOAT32)
        assert (small & (np.remainder(halves, 1) == 0.5)).sum() > 1000


def test_adam_has_second_moments_of_the_size_of_squares():
    block = hard_and_random((FLOAT32,) * 4, BLOCK, seed=6, kind="adam").block(0)
    assert (block[2] < FLOAT32.sign_bit).mean() > 0.95
    assert (block[2] > FLOAT32.sign_bit).sum() > 100
    realistic = [patterns[QUARTER : 3 * QUARTER] for patterns in block]
    magnitude = [(p & 0x7FFFFFFF).astype(np.int64) for p in realistic]
    special = [(m < 1 << 23) | (m >= FLOAT32.infinity) for m in magnitude]
    assert 0.04 < np.mean(np.any(special, axis=0)) < 1 / 16  # some landmarks are ordinary
    assert (np.sum(special, axis=0) <= 1).all()
    field = [(m >> 23)[~np.any(special, axis=0)] - 127 for m in magnitude]
    exponents = [np.quantile(f, 0.02) for f in field], [np.quantile(f, 0.98) for f in field]
    assert exponents[0][0] == -12 and exponents[1][0] == 2
    assert (np.abs(field[1] - field[3]) <= 4).mean() > 0.99
    assert (np.abs(field[2] - 2 * field[3]) <= 6).mean() > 0.99


def test_later_blocks_are_realistic_and_random_alone():
    block = hard_and_random((FLOAT32,) * 2, 257 * BLOCK, seed=6).block(256)
    field = [(patterns[: 3 * QUARTER] >> 23 & 255).astype(int) - 127 for patterns in block]
    assert all((f.min(), f.max()) == (-12, 3) for f in field)
    random = block[0][3 * QUARTER :]
    assert np.abs(np.unpackbits(random.view(np.uint8)).mean() - 0.5) < 0.01
    assert np.unique(random >> 23).size == 512


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda: hard_and_random((FLOAT32,), BLOCK + 1, 0), "multiple of 262144"),
        (lambda: hard_and_random((FLOAT32,), 0, 0), "do not fill blocks"),
        (lambda: hard_and_random((FLOAT32,), BLOCK, 0, "adam"), "1 formats were given"),
        (lambda: hard_and_random((FLOAT32,), BLOCK, 0, "sum"), "No kind of operands"),  # pyright: ignore
        (lambda: hard_and_random((FLOAT32,) * 2, 8, 0, targets=(FLOAT16,)), "leave `targets` out"),
        (lambda: pairs_of_hard(BFLOAT16, 100), "power of two"),
    ],
)
def test_what_cannot_be_made_is_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()


@pytest.mark.parametrize("number", [-1, 1])
def test_blocks_that_are_not_there_are_refused(number):
    with pytest.raises(IndexError, match="there are 1"):
        everything(BFLOAT16).block(number)
