"""Strips of rows, and how their numbers become those of all."""

import numpy as np
import pytest

from jaxaudit import strips
from jaxaudit.results import NOT_AUDITED
from jaxaudit.strips import Countable, Histograms, Strip, strips_of


@pytest.mark.parametrize("most", [1, 7, 64, 1000])
def test_strips_cover_every_row_once_and_are_of_one_size(monkeypatch, most):
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", most)
    for tokens in (1, 2, 10, 29, 97):
        for width in (1, 3, 64, 5000):
            found = strips_of(tokens, width)
            owned = [row for strip in found for row in range(*strip.own)]
            assert owned == list(range(tokens))
            assert len({strip.rows[1] - strip.rows[0] for strip in found}) == 1
            assert [strip.number for strip in found] == list(range(len(found)))
            for strip in found:
                assert 0 <= strip.rows[0] <= strip.own[0] < strip.own[1] == strip.rows[1]
                rows = strip.rows[1] - strip.rows[0]
                assert rows == 1 or rows * width <= most


class Inner(Countable):
    MERGED = {"path": "rows"}

    def __init__(self):
        self.path = np.zeros(5)


class Everything(Countable):
    MERGED = {
        "counts": "sum",
        "sums": "sum",
        "largest": "max",
        "first": "first",
        "found": "sum",
        "found.table": "rows",
    }
    MADE_OF = ("inner", "absent")

    def __init__(self):
        self.counts = np.array([NOT_AUDITED, 0, 0], np.int64)
        self.sums = np.array([np.nan, 0.0])
        self.largest = np.array([NOT_AUDITED, 0])
        self.first = np.full((2, 4), NOT_AUDITED)
        self.found = {"table": np.zeros((2, 5)), "other": np.zeros(2, np.int64)}
        self.inner, self.absent = Inner(), None


def test_numbers_of_strips_merge_by_their_rules():
    one, strip, later = Everything(), Strip(0, (0, 3), (0, 3)), Strip(1, (2, 5), (3, 5))
    one.clear()
    one.counts += [0, 4, 5]
    one.sums[1] = 0.5
    one.largest[1] = 7
    one.first[0] = 9, 1, 2, 77
    one.found["table"][:, :3] = 1
    one.found["other"] += 2
    one.inner.path[:3] = 1, 2, 3
    first = one.numbers(strip)
    assert first["found.table"].shape == (2, 3) and first["inner.path"].tolist() == [1, 2, 3]
    one.clear()
    assert one.counts.tolist() == [NOT_AUDITED, 0, 0] and not one.inner.path.any()
    one.counts += [0, 10, 0]
    one.sums[1] = 0.25
    one.largest[1] = 3
    one.first[0] = 9, 0, 5, 78
    one.first[1] = 2, 4, 0, 79
    one.found["table"][:, 2:] = 2
    one.inner.path[2:] = 9, 4, 5
    second = one.numbers(later)
    one.clear()
    one.merge(first, strip)
    one.merge(second, later)
    assert one.counts.tolist() == [NOT_AUDITED, 14, 5]
    assert np.isnan(one.sums[0]) and one.sums[1] == 0.75
    assert one.largest.tolist() == [NOT_AUDITED, 7]
    assert one.first.tolist() == [[9, 0, 5, 78], [2, 4, 0, 79]]
    assert one.found["table"].tolist() == [[1, 1, 1, 2, 2]] * 2
    assert one.found["other"].tolist() == [2, 2]
    assert one.inner.path.tolist() == [1, 2, 3, 4, 5]


def test_histograms_keep_every_count():
    rng = np.random.default_rng(0)
    shape, blocks = (7, 2, 40), [(0, 3), (3, 6), (6, 7)]
    whole, parts = Histograms(*shape), []
    wanted = np.zeros(shape, np.int64)
    strip = Strip(0, (0, 1), (0, 1))
    for _ in range(3):
        counts = rng.integers(0, 9, shape) * (rng.random(shape) < 0.1)
        wanted += counts
        part = Histograms(*shape)
        for begin, end in blocks:
            part.add(begin, counts[begin:end])
            whole.add(begin, counts[begin:end])
        parts.append(part.numbers(strip, "x."))
    merged = Histograms(*shape)
    for numbers in parts:
        merged.merge(numbers, strip, "x.")
    for one in (whole, merged):
        found = np.zeros(shape, np.int64)
        for place, counts in one:
            found[place] = counts
        assert np.array_equal(found, wanted)
    merged.clear()
    assert list(merged) == []
    assert Histograms(*shape).numbers(strip)["counts"].size == 0
