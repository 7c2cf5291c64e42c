import numpy as np
import pytest

from jaxaudit import floats
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from jaxaudit.rounding import exact
from jaxaudit.rounding.tally import (
    BINADES,
    DIFFERENCE_FIELDS,
    SAMPLED,
    Block,
    Tally,
    compare,
    joined,
    position,
)

NORMAL, SUBNORMAL = (exact.INPUT_CLASSES.index(name) for name in ("normal", "subnormal"))


def block_of(patterns, fmt):
    """Let the operation be the one that changes nothing."""
    rounded = exact.rounded(exact.decode64(patterns, fmt), fmt)
    classes = exact.class_of((patterns,), (fmt,), rounded)
    return Block((patterns,), patterns, classes, exact.binade_of(patterns, fmt))


def every(fmt):
    return np.arange(1 << 16, dtype=np.uint32).astype(fmt.pattern_dtype)


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16])
def test_the_position_of_a_formats_own_numbers_is_their_place_on_the_ordered_line(fmt):
    patterns = every(fmt)
    found = position(exact.decode64(patterns, fmt), fmt)
    np.testing.assert_array_equal(found, floats.ordered(patterns, fmt))


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16, FLOAT32])
def test_the_position_between_neighbours_is_linear(fmt):
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, fmt.infinity - 1, 4096).astype(fmt.pattern_dtype)
    low, high = (exact.decode64(p, fmt) for p in (patterns, patterns + fmt.pattern_dtype.type(1)))
    for fraction in (0.25, 0.5, 0.75):
        # A quarter of the spacing is a float64 number throughout.
        found = position(low + (high - low) * fraction, fmt)
        np.testing.assert_array_equal(found, patterns + fraction)


def test_what_is_beyond_the_largest_number_is_at_infinity():
    values = np.array([65520.0, 65536.0, 1e30, np.inf, -1e30, np.nan])
    found = position(values, FLOAT16)
    infinity = FLOAT16.infinity
    expected = [infinity - 0.5, infinity, infinity, infinity, -infinity, infinity + 1]
    np.testing.assert_array_equal(found, expected)


def test_equal_results_are_no_differences():
    patterns = every(BFLOAT16)
    tally = compare(block_of(patterns, BFLOAT16), patterns.copy(), patterns, BFLOAT16)
    assert tally.compared.sum() == 1 << 16
    assert not tally.differing.any() and not tally.binades.any() and not tally.samples


def test_all_nans_are_alike_but_zeros_are_not():
    wanted = np.array([0x7FC0, 0xFFFF, 0x7F81, 0x0000, 0x8000], np.uint16)
    found = np.array([0xFFC1, 0x7FC0, 0x7FC0, 0x8000, 0x8000], np.uint16)
    tally = compare(block_of(wanted, BFLOAT16), found, wanted, BFLOAT16)
    assert tally.differing.sum() == 1 and tally.farthest.max() == 0
    assert tally.first[exact.INPUT_CLASSES.index("zero"), -2:].tolist() == [0, 0x8000]


def test_one_flipped_bit_is_one_difference_in_its_class_and_binade():
    patterns = every(BFLOAT16)
    found = patterns.copy()
    found[0x3F80] ^= 4
    found[0x0003] ^= 1
    tally = compare(block_of(patterns, BFLOAT16), found, patterns, BFLOAT16)
    assert tally.differing[NORMAL] == 1 and tally.farthest[NORMAL] == 4
    assert tally.differing[SUBNORMAL] == 1 and tally.farthest[SUBNORMAL] == 1
    assert tally.differing.sum() == 2
    fields = dict(zip(DIFFERENCE_FIELDS, tally.first[NORMAL].tolist(), strict=True))
    assert fields == {
        "operand_1": 0x3F80, "operand_2": 0, "operand_3": 0, "operand_4": 0,
        "wanted": 0x3F80, "found": 0x3F84,
    }  # fmt: skip
    assert BINADES[np.flatnonzero(tally.binades)].tolist() == [-132, 0]


def test_a_sum_forgets_the_sign_of_zero_and_shows_fractions_of_an_ulp():
    patterns = np.array([0x8000, 0x0000, 0x3F80, 0x3F80], np.uint16)
    sums = np.array([0.0, -0.0, 1.0, 1.0 + 3 * 2.0**-9], np.float32).view(np.uint32)
    tally = compare(block_of(patterns, BFLOAT16), sums, patterns, BFLOAT16, summed=FLOAT32)
    assert tally.differing.tolist() == [1, 0, 0, 0, 0, 0]
    assert tally.farthest[NORMAL] == 0.75
    assert tally.first[NORMAL, -1] == sums[3]


def test_a_sum_that_is_no_number_is_one_step_beyond_infinity():
    sums = np.array([np.nan], np.float32).view(np.uint32)
    for fmt in (BFLOAT16, FLOAT16):
        given = np.array([fmt.infinity - 1], np.uint16)
        tally = compare(block_of(given, fmt), sums, given, fmt, summed=FLOAT32)
        assert tally.farthest.max() == 2, fmt


def test_float64_distances_do_not_overflow():
    patterns = np.array([1.7e308, 1.0], np.float64).view(np.uint64)
    found = np.array([-1.7e308, 1.0 + 2.0**-52], np.float64).view(np.uint64)
    tally = compare(block_of(patterns, FLOAT64), found, patterns, FLOAT64)
    assert tally.farthest.max() == pytest.approx(2 * 0x7FEE0000_00000000, rel=1e-2)
    tally = compare(block_of(patterns[1:], FLOAT64), found[1:], patterns[1:], FLOAT64)
    assert tally.farthest.max() == 1


def test_what_is_left_out_is_neither_compared_nor_differs():
    patterns = every(FLOAT16)
    left_out = np.zeros(patterns.size, bool)
    left_out[: 1 << 15] = True
    found = patterns ^ 1
    tally = compare(block_of(patterns, FLOAT16), found, patterns, FLOAT16, left_out=left_out)
    assert tally.compared.sum() == 1 << 15
    nans = 2 * 1023 // 2  # those of negative sign, all alike; infinity and the first NaN are not
    assert tally.differing.sum() == (1 << 15) - nans + 1


def test_the_sum_of_blocks_is_the_whole():
    patterns = every(BFLOAT16)
    found = np.where(patterns % 7 == 0, patterns ^ 1, patterns).astype(np.uint16)
    whole = compare(block_of(patterns, BFLOAT16), found, patterns, BFLOAT16)
    parts = Tally.empty()
    for k in range(8):
        cut = slice(k << 13, (k + 1) << 13)
        block = block_of(patterns[cut], BFLOAT16)
        part = compare(block, found[cut], patterns[cut], BFLOAT16, quota=100)
        parts.add(part, spread=True)
    for name in ("compared", "differing", "farthest", "first", "binades"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name), name)
    operand, wanted, seen = joined(parts.samples, SAMPLED)
    np.testing.assert_array_equal(operand, wanted)
    assert 300 < (wanted != seen).sum() <= 8 * 100


def test_samples_come_from_all_over_a_block():
    patterns = every(BFLOAT16)
    tally = compare(block_of(patterns, BFLOAT16), patterns ^ 1, patterns, BFLOAT16)
    operand = tally.samples[0][0]
    assert operand.size <= SAMPLED * 1.2
    assert np.diff(np.sort(operand).astype(int)).max() < 1024
