"""Counts by code: bins of sizes, their quantiles, and the counts of overlapping groups."""

import math

import jax
import numpy as np
import pytest

from jaxaudit.devices import find_device
from jaxaudit.ledger import counting
from jaxaudit.ledger.counting import (
    QUANTILES,
    SIZES,
    GroupCounter,
    quantiles,
    size_code,
    size_edges,
)
from jaxaudit.recording import TokenGroups, Window


def on_device(sizes: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(jax.jit(size_code)(jax.device_put(sizes, find_device("cpu"))))


@pytest.mark.parametrize("code", [size_code, on_device], ids=["numpy", "jax"])
def test_a_bin_holds_its_lower_edge_and_all_below_the_next(code):
    edges = size_edges()
    assert edges.size == SIZES and np.all(np.diff(edges) > 0)
    np.testing.assert_array_equal(code(edges), np.arange(SIZES))
    below = np.nextafter(edges, 0)
    np.testing.assert_array_equal(code(below), np.maximum(np.arange(SIZES) - 1, 0))
    assert code(edges).dtype == np.int32


def test_edges_divide_each_binade_into_equal_parts_without_error():
    edges = size_edges()
    for k in (0, 1, 31, 32, 33, 511, 512, 513, SIZES - 1):
        whole, part = divmod(k, counting.STEPS_PER_BINADE)
        assert edges[k] == math.ldexp(32 + part, whole + counting.LOWEST - 5)


@pytest.mark.parametrize("code", [size_code, on_device], ids=["numpy", "jax"])
def test_what_lies_beyond_is_in_the_outermost_bins(code):
    sizes = np.array([2.0**-32 * 0.999, 1e-300, 2.0**32, 1e300, np.finfo(np.float64).max])
    np.testing.assert_array_equal(code(sizes), [0, 0, SIZES - 1, SIZES - 1, SIZES - 1])


@pytest.mark.parametrize("count", [1, 2, 3, 19, 20, 21, 100, 999])
def test_quantiles_are_the_bins_of_numpys_inverted_cdf(count):
    rng = np.random.default_rng(count)
    sizes = np.exp2(rng.normal(0, 3, count))
    sizes[rng.random(count) < 0.3] = 0.5  # a bin that holds many
    histogram = np.bincount(size_code(sizes), minlength=SIZES)
    found = quantiles(histogram[None])
    expected = np.quantile(sizes, QUANTILES, method="inverted_cdf")
    np.testing.assert_array_equal(found[0], size_edges()[size_code(expected)])
    assert np.all((found[0] <= expected) & (expected < found[0] * 33 / 32))


def test_nothing_has_no_quantiles():
    found = quantiles(np.zeros((2, 3, SIZES), np.int64))
    assert found.shape == (2, 3, len(QUANTILES)) and np.isnan(found).all()


@pytest.mark.parametrize(("width", "bins"), [(1, 3), (3, 7), (5, 1000)])
def test_group_counts_equal_a_loop(width, bins):
    rng = np.random.default_rng(width)
    tokens, length, steps = 23, 4, 3
    members = {"all": np.arange(tokens), "last": np.array([22])}
    for k in range(4):
        members[f"some {k}"] = np.flatnonzero(rng.random(tokens) < 0.4)
    members["none"] = np.array([], np.int64)
    groups, device = TokenGroups(tokens, members), find_device("cpu")
    with jax.enable_x64(True):
        counter = GroupCounter(groups, width, device)
        for rows, overlap in (((0, tokens), 0), ((0, 9), 0), ((9, 22), 3), ((22, 23), 0)):
            elements = (rows[1] - rows[0]) * width
            codes = rng.integers(0, bins, (length, elements)).astype(np.int32)
            given = jax.device_put(codes, device) + counter.offsets(
                Window(1, 1, rows, {}, overlap), bins
            )
            assert given.dtype == np.int32
            found = counter.count(given, steps, bins)
            expected = np.zeros((steps, len(members), bins), np.int64)
            for t in range(steps):
                for g, group in enumerate(members.values()):
                    for token in group:
                        if rows[0] + overlap <= token < rows[1]:
                            at = (token - rows[0]) * width
                            for code in codes[t, at : at + width]:
                                expected[t, g, code] += 1
            np.testing.assert_array_equal(found, expected)
