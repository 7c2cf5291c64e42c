"""Formats against ml_dtypes and NumPy, over every 16-bit pattern."""

import ml_dtypes
import numpy as np
import pytest

from jaxaudit import floats
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32

NARROW = [BFLOAT16, FLOAT16]
CODES = np.arange(1 << 16, dtype=np.uint16)


def values_of(fmt):
    return CODES.view({"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[fmt.name])


@pytest.mark.parametrize("fmt", NARROW, ids=lambda f: f.name)
def test_decode_is_exact_for_every_pattern(fmt):
    expected = values_of(fmt).astype(np.float32)
    np.testing.assert_array_equal(floats.decode(CODES, fmt), expected)
    # NaN compares equal above; zeros must keep their signs.
    assert np.array_equal(np.signbit(floats.decode(CODES, fmt)), np.signbit(expected))


@pytest.mark.parametrize("fmt", NARROW, ids=lambda f: f.name)
def test_encode_inverts_decode(fmt):
    back = floats.encode(floats.decode(CODES, fmt), fmt)
    numbers = ~floats.is_nan(CODES, fmt)
    np.testing.assert_array_equal(back[numbers], CODES[numbers])
    assert floats.is_nan(back[~numbers], fmt).all()


@pytest.mark.parametrize("fmt", NARROW, ids=lambda f: f.name)
def test_encode_rounds_to_nearest_even_between_all_neighbours(fmt):
    """Every midpoint of two finite neighbours goes to the even one; a hair beside it, to the nearer."""
    low = CODES[: fmt.infinity - 1]
    below, above = floats.decode(low, fmt), floats.decode(low + 1, fmt)
    middle = (below.astype(np.float64) + above.astype(np.float64)) / 2
    assert np.array_equal(middle, middle.astype(np.float32))  # a midpoint needs one bit more
    middle = middle.astype(np.float32)
    even = np.where(low % 2 == 0, low, low + 1)
    np.testing.assert_array_equal(floats.encode(middle, fmt), even)
    np.testing.assert_array_equal(floats.encode(np.nextafter(middle, above), fmt), low + 1)
    np.testing.assert_array_equal(floats.encode(np.nextafter(middle, below), fmt), low)


@pytest.mark.parametrize("fmt", NARROW, ids=lambda f: f.name)
def test_ordered_line_is_the_order_of_the_values(fmt):
    finite = CODES[~floats.is_nonfinite(CODES, fmt)]
    order = np.argsort(floats.ordered(finite, fmt), kind="stable")
    values = floats.decode(finite, fmt).astype(np.float64)[order]
    assert (np.diff(values) >= 0).all()
    steps = np.diff(floats.ordered(finite, fmt)[order])
    assert set(steps) == {0, 1} and (steps == 0).sum() == 1  # both zeros are one point


def test_ulp_distance_at_zero_at_a_binade_edge_and_at_nan():
    patterns = floats.encode(np.array([0.0, -0.0, 1.0, np.nan, np.inf], np.float32), BFLOAT16)
    zero, minus_zero, one, nan, infinity = patterns[:, None]
    distance = lambda a, b: int(floats.ulp_distance(a, b, BFLOAT16)[0])  # noqa: E731
    assert distance(zero, minus_zero) == 0
    assert distance(minus_zero, zero + 1) == 1
    assert distance(one, one - 1) == distance(one, one + 1) == 1
    assert distance(nan, nan | 0x8001) == 0
    assert distance(infinity, nan) == 1


def test_float32_passes_unchanged():
    patterns = np.array([0, 1, 0x7F800000, 0x80000000, 0x3F800001], np.uint32)
    assert np.array_equal(floats.encode(floats.decode(patterns, FLOAT32), FLOAT32), patterns)


def test_scalars_are_rounded_twice_as_pytorch_does():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    values = [*(rng.random(2000) * 10.0 ** rng.integers(-12, 3, 2000)), 1e-8, 0.1, 1.00390625000001]
    for value in values:
        x = torch.zeros(1, dtype=torch.bfloat16)
        assert float(x.add(float(value))) == float(floats.round_scalar(float(value), BFLOAT16))
