"""Counts, distances and norms per row against NumPy, for every shape of row."""

import math

import jax
import numpy as np
import pytest

from jaxaudit import floats
from jaxaudit.comparison import (
    NONFINITE,
    TINY,
    UNREPRESENTABLE,
    Comparison,
    distance,
    max_groups,
    sum_groups,
)
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, decode, encode
from jaxaudit.recording import TokenGroups, Window
from jaxaudit.strips import members_within

DEVICE = jax.devices("cpu")[0]
STEPS, ROWS = 3, 4
WIDTHS = [1, 7, 8, 9, 15, 16, 17, 64, 257, 300, 512, 5003]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def draw(rng, fmt, width, rows=STEPS):
    values = rng.normal(size=(rows, ROWS * width)) * 0.02
    return encode(values.astype(np.float32), fmt)


def by_row(values, width):
    return values.reshape(len(values), ROWS, width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "formats", [(BFLOAT16, BFLOAT16), (FLOAT32, BFLOAT16), (BFLOAT16, FLOAT32)]
)
def test_mismatches_agree_with_numpy(width, formats):
    rng = np.random.default_rng(width)
    recorded = draw(rng, formats[1], width, STEPS + 1)
    replayed = floats.encode(decode(recorded[1:], formats[1]), formats[0])
    touched = rng.random(replayed.shape) < 0.1
    replayed = replayed ^ (touched * rng.integers(1, 9, replayed.shape)).astype(replayed.dtype)
    counts, distances = Comparison(DEVICE, width).mismatches(
        replayed, formats[0], recorded, formats[1]
    )
    wide_a, wide_b = (decode(p, f) for p, f in ((replayed, formats[0]), (recorded[1:], formats[1])))
    differ = wide_a.view(np.uint32) != wide_b.view(np.uint32)
    assert np.array_equal(counts, by_row(differ, width).sum(-1))
    distance = floats.ulp_distance(encode(wide_a, formats[1]), recorded[1:], formats[1])
    assert np.array_equal(distances, by_row(distance, width).max(-1))


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16, FLOAT32], ids=lambda f: f.name)
def test_mismatches_of_special_values(fmt):
    nan, infinity, sign = fmt.infinity + 1, fmt.infinity, fmt.sign_bit
    pairs = [(0, sign, 1, 0), (nan, nan | sign, 0, 0), (infinity, nan, 1, 1), (0, 1, 1, 1)]
    pairs += [(sign | 1, 1, 1, 2), (infinity, sign | infinity, 1, 2 * infinity)]
    a, b, count, distance = (np.array(column) for column in zip(*pairs, strict=True))
    recorded = np.stack([b, b]).astype(fmt.pattern_dtype)
    counts, distances = Comparison(DEVICE, 1).mismatches(
        a[None].astype(fmt.pattern_dtype), fmt, recorded, fmt
    )
    assert counts[0].tolist() == count.tolist()
    assert distances[0].tolist() == distance.tolist()


@pytest.mark.parametrize("width", [1, 9, 16, 17, 64, 300, 5003])
@pytest.mark.parametrize("formulation", ["float32", "float64"])
def test_norms_agree_with_exact_sums(width, formulation):
    rng = np.random.default_rng(width)
    recorded, replayed = draw(rng, BFLOAT16, width, STEPS + 1), draw(rng, BFLOAT16, width)
    comparison = Comparison(DEVICE, width)
    observed = comparison.squared_norms(recorded, BFLOAT16, formulation)
    sums = comparison.inner_products(replayed, BFLOAT16, recorded, BFLOAT16, formulation)
    w, p = decode(recorded, BFLOAT16), decode(replayed, BFLOAT16)
    predicted, change, difference = p - w[:-1], w[1:] - w[:-1], p - w[1:]
    pairs = [
        (change, change),
        (predicted, predicted),
        (difference, difference),
        (predicted, change),
    ]
    for found, (x, y) in zip((observed, *sums), pairs, strict=True):
        products = by_row(x.astype(np.float64) * y.astype(np.float64), width)
        exact = np.array([[math.fsum(row) for row in step] for step in products])
        # `width` additions, each of at most half an ulp of the sum of magnitudes.
        bound = width * 2.0**-53 * np.abs(products).sum(-1)
        assert (np.abs(found - exact) <= bound).all()


@pytest.mark.parametrize("width", [7, 64, 257])
def test_both_formulations_and_every_window_give_the_same_bits(width):
    rng = np.random.default_rng(0)
    recorded, replayed = draw(rng, BFLOAT16, width, STEPS + 1), draw(rng, BFLOAT16, width)
    comparison = Comparison(DEVICE, width)
    whole = comparison.inner_products(replayed, BFLOAT16, recorded, BFLOAT16, "float32")
    exact = comparison.inner_products(replayed, BFLOAT16, recorded, BFLOAT16, "float64")
    for k in range(STEPS):
        single = comparison.inner_products(
            replayed[k : k + 1], BFLOAT16, recorded[k : k + 2], BFLOAT16, "float32"
        )
        for a, b, c in zip(whole, exact, single, strict=True):
            assert np.array_equal(a, b)
            assert np.array_equal(a[k : k + 1], c)


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16, FLOAT32], ids=lambda f: f.name)
def test_distances_of_all_but_nans(fmt):
    rng = np.random.default_rng(fmt.width)
    special = [0, fmt.sign_bit, 1, fmt.sign_bit | 1, fmt.infinity, fmt.sign_bit | fmt.infinity]
    drawn = rng.integers(0, 1 << fmt.width, 5000, np.uint64)
    drawn = drawn[(drawn & np.uint64(fmt.sign_bit - 1)) <= fmt.infinity]
    values = np.concatenate([np.array(special, np.uint64), drawn]).astype(fmt.pattern_dtype)
    a, b = (x.reshape(-1) for x in np.meshgrid(values[:80], values))
    found = np.asarray(jax.jit(lambda a, b: distance(a, b, fmt))(a, b))
    assert np.array_equal(found, floats.ulp_distance(a, b, fmt))


@pytest.mark.parametrize("width", [7, 64, 257])
@pytest.mark.parametrize("formats", [(BFLOAT16, BFLOAT16), (FLOAT32, BFLOAT16)])
def test_changes_are_counted_and_summed_up_as_one_by_one(width, formats):
    rng = np.random.default_rng(width)
    recorded, replayed = draw(rng, formats[1], width, STEPS + 1), draw(rng, formats[0], width)
    replayed[1, 0] = formats[0].infinity + 1
    comparison = Comparison(DEVICE, width)
    given = (replayed, formats[0], recorded, formats[1])
    found = [np.asarray(x) for x in comparison.start_changes(*given)]
    products = comparison.inner_products(*given, "float32")
    observed = comparison.squared_norms(recorded, formats[1], "float32")
    expected = (*comparison.mismatches(*given), *products, observed)
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b, equal_nan=True)
    assert np.isnan(found[3][1, 0]) and np.isnan(found[3]).sum() == 1


def test_subnormal_changes_are_not_lost():
    recorded = np.array([[1, 0x8002], [3, 0x8002]], np.uint16)  # multiples of 2^-133
    found = Comparison(DEVICE, 2).squared_norms(recorded, BFLOAT16, "float64")
    assert found[0, 0] == (2 * 2.0**-133) ** 2


def test_inspect_and_tally():
    comparison = Comparison(DEVICE, 2)
    values = np.array([[1.0, 1 + 2.0**-9], [np.inf, 2.0**-110], [np.nan, 0.0]], np.float32)
    patterns = values.view(np.uint32).reshape(1, -1)
    found = comparison.inspect(patterns, FLOAT32, BFLOAT16)
    assert found == TINY | NONFINITE | UNREPRESENTABLE
    tally = lambda bit: comparison.tally(patterns, FLOAT32, BFLOAT16, bit)[0].tolist()  # noqa: E731
    assert tally(NONFINITE) == [0, 1, 1]
    assert tally(UNREPRESENTABLE) == [1, 0, 0]
    assert tally(TINY) == [0, 1, 0]
    clean = np.array([[1.0, 0.0]], np.float32).view(np.uint32)
    assert comparison.inspect(clean, FLOAT32, BFLOAT16) == 0


def test_overlapping_and_partial_groups():
    groups = TokenGroups(
        6, {"all": np.arange(6), "some": np.array([1, 2, 5]), "two": np.array([2])}
    )
    rows = np.arange(12).reshape(2, 6)
    members = members_within(groups, Window(1, 1, (0, 6), {}))
    assert sum_groups(rows, members).tolist() == [[15, 8, 2], [51, 26, 8]]
    assert max_groups(rows, members).tolist() == [[5, 5, 2], [11, 11, 8]]
    upper = members_within(groups, Window(1, 1, (2, 6), {}, overlap=1))
    assert sum_groups(rows[:, 2:], upper).tolist() == [[12, 5, 0], [30, 11, 0]]
    assert max_groups(rows[:, 2:], upper).tolist() == [[5, 5, 0], [11, 11, 0]]
