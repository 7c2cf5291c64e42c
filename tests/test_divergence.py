"""Two runs, or two results, side by side: every number against a slow count, and the command as people use it."""

import importlib
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xarray as xr
from recordings import KINDS, Tensor, f32, short_run, small_run, write

import jaxaudit
from jaxaudit import results
from jaxaudit.divergence import account, alignment, distances, figures, runs
from jaxaudit.divergence.variables import AUDIT_VARIABLES, NEVER, VARIABLES

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "compare_runs.py"
KEYS = {"param": "W", "grad": "grad_W", "exp_avg": "momentum_W", "exp_avg_sq": "variance_W"}
NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
#: Zeros, subnormal numbers, infinities and NaNs of both signs, and neighbours at the edge of a binade.
SPECIAL = {
    "BF16": [0, 0x8000, 1, 0x8001, 0x7F, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x3F7F, 0x3F80, 0x7F7F],
    "F16": [0, 0x8000, 1, 0x8001, 0x3FF, 0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x3BFF, 0x3C00, 0x7BFF],
    "F32": [0, 1 << 31, 1, 0x80000001, 0x7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001, 0x3F7FFFFF, 0x3F808000, 0x7F7FFFFF],
}  # fmt: skip


def patterns(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Draw patterns, a third of them special ones."""
    random = np.random.default_rng(seed)
    width = np.dtype(KINDS[dtype]).itemsize
    raw = random.integers(0, 1 << 8 * width, shape, np.uint64).astype(KINDS[dtype])
    special = random.choice(np.array(SPECIAL[dtype], KINDS[dtype]), shape)
    return np.where(random.random(shape) < 0.33, special, raw)


def run_of(
    shape: tuple[int, ...], dtypes: Mapping[str, str], seed: int, near: Any = None
) -> dict[str, Tensor]:
    """Make a recording of random patterns, most of them those of another one if it has the dtype."""
    random = np.random.default_rng(seed + 100)
    tensors = small_run(shape)
    for k, (key, dtype) in enumerate(dtypes.items()):
        drawn = patterns(shape, dtype, 10 * seed + k)
        if near and near[key][0] == dtype:
            kept = random.random(shape) < 0.6
            close = near[key][1] + random.integers(0, 3, shape).astype(drawn.dtype)
            drawn = np.where(kept, near[key][1], np.where(random.random(shape) < 0.5, close, drawn))
        tensors[key] = dtype, drawn
    return tensors


def compared(a: Path, b: Path, groups: Any = None, **how: Any) -> xr.Dataset:
    with jaxaudit.open_recording(a) as one, jaxaudit.open_recording(b) as other:
        return jaxaudit.compare(one, other, groups, **how)


def pair(tmp_path: Path, a: Any, b: Any, /, **metadata: Any) -> tuple[Path, Path]:
    one = write(tmp_path / "a.safetensors", a, metadata.get("a"))
    return one, write(tmp_path / "b.safetensors", b, metadata.get("b"))


# A slow count, element by element, with nothing of the library.


def value(pattern: int, dtype: str) -> float:
    if dtype == "F16":
        return struct.unpack("<e", struct.pack("<H", pattern))[0]
    wide = pattern << 16 if dtype == "BF16" else pattern
    return struct.unpack("<f", struct.pack("<I", wide))[0]


def float32_bits(pattern: int, dtype: str) -> int:
    number = value(pattern, dtype)
    if math.isnan(number):
        return 0x7FC00000
    return struct.unpack("<I", struct.pack("<f", number))[0]


def rounded(pattern: int, dtype: str, target: str) -> int:
    """Round to nearest, ties to even; one pattern for all NaNs."""
    number = value(pattern, dtype)
    if math.isnan(number):
        return {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}[target]
    if dtype == target:
        return pattern
    if target == "F16":
        try:
            return struct.unpack("<H", struct.pack("<e", number))[0]
        except OverflowError:
            return 0x7C00 | (number < 0) << 15
    bits = float32_bits(pattern, dtype)
    return bits if target == "F32" else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def place(pattern: int, dtype: str) -> int:
    """Place a pattern on the line on which neighbours are 1 apart, NaN beyond infinity."""
    sign = 1 << (31 if dtype == "F32" else 15)
    if math.isnan(value(pattern, dtype)):
        return {"BF16": 0x7F81, "F16": 0x7C01, "F32": 0x7F800001}[dtype]
    return -(pattern - sign) if pattern >= sign else pattern


def bin_of(distance: int) -> int:
    ends = [0, *(1 << k for k in range(33))]
    return next(k for k, end in enumerate(ends) if distance <= end)


def added(numbers: Sequence[float]) -> float:
    total = 0.0
    for number in numbers:
        total += number
    return total


def root(number: float) -> float:
    return math.sqrt(number) if number == number else math.nan


class Slow:
    """One tensor at one timestep, of some tokens: sums first over each token, then over tokens."""

    def __init__(self, a: Tensor, b: Tensor, t: int, tokens: Sequence[int], ulp: str):
        (self.da, xa), (self.db, xb), self.ulp = a, b, ulp
        self.rows = [list(zip(xa[t, k].ravel().tolist(), xb[t, k].ravel().tolist(), strict=True)) for k in tokens]  # fmt: skip

    def differ(self, x: int, y: int) -> bool:
        if math.isnan(value(x, self.da)) and math.isnan(value(y, self.db)):
            return False
        if self.da == self.db:
            return x != y
        return float32_bits(x, self.da) != float32_bits(y, self.db)

    def distance(self, x: int, y: int) -> float:
        if not self.differ(x, y):
            return 0.0
        one, other = value(x, self.da), value(y, self.db)
        gap = one - other if not (math.isinf(one) and one == other) else 0.0
        return abs(gap)

    def both(self, x: int, y: int) -> tuple[int, int]:
        return rounded(x, self.da, self.ulp), rounded(y, self.db, self.ulp)

    def ulps(self, x: int, y: int) -> int:
        if not self.differ(x, y):
            return 0
        one, other = self.both(x, y)
        return abs(place(one, self.ulp) - place(other, self.ulp))

    def total(self, of: Any) -> float:
        return added([added([of(x, y) for x, y in row]) for row in self.rows])

    def largest(self, of: Any) -> float:
        found = [of(x, y) for row in self.rows for x, y in row]
        return math.nan if any(f != f for f in found) else max(found, default=0)

    def numbers(self) -> dict[str, Any]:
        histogram = [0] * 34
        for row in self.rows:
            for x, y in row:
                histogram[bin_of(self.ulps(x, y))] += 1
        return {
            "differing_count": self.total(self.differ),
            "rounded_differing_count": self.total(
                lambda x, y: self.differ(x, y) and len(set(self.both(x, y))) > 1
            ),
            "differing_token_count": sum(any(self.differ(x, y) for x, y in r) for r in self.rows),
            "max_ulp_distance": self.largest(self.ulps),
            "ulp_distance_sum": self.total(self.ulps),
            "ulp_distance_norm": root(self.total(lambda x, y: float(self.ulps(x, y)) ** 2)),
            "ulp_histogram": histogram,
            "distance": root(self.total(lambda x, y: self.distance(x, y) * self.distance(x, y))),
            "max_distance": self.largest(self.distance),
            "norm": [
                root(self.total(lambda x, y: value(x, self.da) * value(x, self.da))),
                root(self.total(lambda x, y: value(y, self.db) * value(y, self.db))),
            ],
        }


def displacement(a: Tensor, b: Tensor, t: int, tokens: Sequence[int]) -> tuple[list[float], float]:
    sums = []
    for i, j in ((0, 0), (1, 1), (0, 1)):
        rows = []
        for k in tokens:
            moves = [
                [value(p, d) - value(q, d) for p, q in zip(x[t, k].ravel().tolist(), x[0, k].ravel().tolist(), strict=True)]
                for d, x in (a, b)
            ]  # fmt: skip
            rows.append(added([m * n for m, n in zip(moves[i], moves[j], strict=True)]))
        sums.append(added(rows))
    one, other = root(sums[0]), root(sums[1])
    below = root(sums[0] * sums[1])
    cosine = sums[2] / below if below else math.nan
    return [one, other], max(-1.0, min(1.0, cosine)) if cosine == cosine else math.nan


def same(found: Any, expected: Any) -> None:
    """Compare bits; all NaNs are alike."""
    found = np.asarray(found)
    expected = np.asarray(expected, found.dtype)
    nan = np.isnan(found) & np.isnan(expected) if found.dtype.kind == "f" else False
    assert ((found == expected) | nan).all(), (found, expected)


def coarser(a: str, b: str) -> str:
    return min(a, b, key=["BF16", "F16", "F32"].index)


GROUPS = {"all": [0, 1, 2, 3, 4], "some": [1, 3], "none": [], "one": [3]}


@pytest.fixture
def groups() -> jaxaudit.TokenGroups:
    members = {name: np.array(tokens, np.int64) for name, tokens in GROUPS.items()}
    return jaxaudit.TokenGroups(5, members)


@pytest.mark.parametrize("window", [1, 3, None])
@pytest.mark.parametrize("of_a", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("of_b", ["BF16", "F16", "F32"])
def test_every_number_is_that_of_a_slow_count(
    tmp_path: Path, groups: jaxaudit.TokenGroups, of_a: str, of_b: str, window: int | None
) -> None:
    shape = (5, 5, 2, 3)
    a = run_of(shape, dict.fromkeys(KEYS.values(), of_a), 1)
    b = run_of(shape, dict.fromkeys(KEYS.values(), of_b), 2, near=a)
    ds = compared(*pair(tmp_path, a, b), groups, window_steps=window)
    ulp = coarser(of_a, of_b)
    assert set(ds.ulp_format.values) == {NAMES[ulp]}
    assert ds.element_count.values.tolist() == [30, 12, 0, 6]
    for name, key in KEYS.items():
        for g, tokens in enumerate(GROUPS.values()):
            for t in range(1, 5):
                expected = Slow(a[key], b[key], t, tokens, ulp).numbers()
                one = ds.sel(tensor=name, timestep=t).isel(token_group=g)
                for variable, number in expected.items():
                    same(one[variable].values, number)
            start = Slow(a[key], b[key], 0, tokens, ulp).numbers()
            one = ds.sel(tensor=name).isel(token_group=g)
            if name != "grad":
                same(one.differing_count_at_start, start["differing_count"])
                same(one.rounded_differing_count_at_start, start["rounded_differing_count"])
                same(one.distance_at_start, start["distance"])
        _check_first(ds.sel(tensor=name), a[key], b[key], name == "grad")
    assert (ds.differing_count_at_start.sel(tensor="grad") == NEVER).all()
    for g, tokens in enumerate(GROUPS.values()):
        for t in range(1, 5):
            norms, cosine = displacement(a["W"], b["W"], t, tokens)
            same(ds.displacement_norm.sel(timestep=t).isel(token_group=g).values, norms)
            same(ds.displacement_cosine.sel(timestep=t).isel(token_group=g).values, cosine)


def _check_first(one: xr.Dataset, a: Tensor, b: Tensor, is_gradient: bool) -> None:
    found = {}
    for t in range(int(is_gradient), a[1].shape[0]):
        for token in range(a[1].shape[1]):
            slow = Slow(a, b, t, [token], "F32")
            for position, (x, y) in enumerate(slow.rows[0]):
                if slow.differ(x, y):
                    found.setdefault(token, (t, token, position, x, y))
    first = min(found.values(), default=(NEVER,) * 5)
    assert tuple(one.first_difference.values.tolist()) == first
    assert one.first_divergence.values.tolist() == [
        found[token][0] if token in found else NEVER for token in range(a[1].shape[1])
    ]


def test_special_values_that_are_the_same_are_at_distance_zero(tmp_path: Path) -> None:
    shape = (3, 4, 3)
    a = run_of(shape, dict.fromkeys(KEYS.values(), "F32"), 3)
    a["W"][1][:] = np.resize(np.array(SPECIAL["F32"], "<u4"), shape)
    b = {name: (dtype, array.copy()) for name, (dtype, array) in a.items()}
    nan = np.isnan(a["W"][1].view("<f4"))
    b["W"][1][nan] = 0x7FC12345  # another payload
    b["W"][1][2, 0, 0] = 1 << 31  # -0 against +0
    ds = compared(*pair(tmp_path, a, b))
    weights = ds.sel(tensor="param", token_group="all")
    assert weights.differing_count.values.tolist() == [0, 1]
    assert not weights.distance.any() and not weights.max_ulp_distance.any()
    assert weights.ulp_histogram.sel(ulp_bin=0).values.tolist() == [12, 12]
    assert not account.identical(ds)
    assert ds.first_difference.sel(tensor="param").values.tolist() == [2, 0, 0, 0, 1 << 31]


# Cutting.


@pytest.fixture
def wide(tmp_path: Path) -> tuple[Path, Path]:
    shape = (7, 11, 40)
    dtypes = {"W": "BF16", "grad_W": "BF16", "momentum_W": "F32", "variance_W": "F32"}
    ordinary = {}
    for name, seed in (("a", 1), ("b", 2)):
        random = np.random.default_rng(seed)
        tensors = small_run(shape)
        for key, dtype in dtypes.items():
            drawn = random.normal(0, 0.02, shape).astype(np.float32)
            bits = drawn.astype(ml_dtypes.bfloat16).view("<u2") if dtype == "BF16" else drawn.view("<u4")  # fmt: skip
            tensors[key] = dtype, bits
        ordinary[name] = tensors
    return pair(tmp_path, ordinary["a"], ordinary["b"])


def test_no_bit_depends_on_windows_or_pieces(
    wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compared(*wide)
    assert (compared(wide[0], wide[0]).displacement_cosine == 1).all()
    found = [compared(*wide, window_steps=n) for n in (1, 2, 3, 100)]
    monkeypatch.setattr(distances, "PIECE_ELEMENTS", 100)
    monkeypatch.setattr(runs, "_THREADS", 1)
    for ds in [*found, compared(*wide)]:
        _assert_same(ds, expected)


@pytest.mark.parametrize("width", [1, 2, 7, 8, 15, 16, 64, 2040, 2048])
def test_rows_of_any_width_are_reduced_alike(width: int) -> None:
    random = np.random.default_rng(width)
    values = np.abs(random.normal(0, 1, (9, width))) ** 20
    values[3, width // 2], values[5, width // 2] = math.nan, math.inf
    flags = random.random((9, width)) < 0.9
    same(distances._row_sums(values), values.sum(axis=1))
    same(distances._peaks(values), values.max(axis=1))
    assert distances._count_rows(flags).tolist() == [sum(row) for row in flags.tolist()]
    assert distances._count_rows(np.ones((2, width), bool)).tolist() == [width, width]


def test_wide_rows_are_worked_on_in_parts(
    wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compared(*wide)
    monkeypatch.setattr(distances, "PIECE_ELEMENTS", 16)
    _assert_same(compared(*wide), expected, floats=False)


@pytest.mark.parametrize("elements", [1, 40, 120, 400])
def test_blocks_of_tokens_count_alike(
    wide: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    expected = compared(*wide)
    monkeypatch.setattr(alignment, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(runs, "_KEPT_ELEMENTS", 0)
    found = compared(*wide)
    _assert_same(found, expected, floats=False)
    _assert_same(compared(*wide, window_steps=3), found)


def _assert_same(found: xr.Dataset, expected: xr.Dataset, *, floats: bool = True) -> None:
    assert found.sizes == expected.sizes and list(found) == list(expected)
    for name in expected.data_vars:
        exact = expected[name].dtype.kind != "f" or name in ("ulp_distance_sum", "max_distance")
        if floats or exact:
            assert found[name].dtype == expected[name].dtype
            assert found[name].values.tobytes() == expected[name].values.tobytes(), name


def test_steps_cut_out_a_part_of_the_whole(wide: tuple[Path, Path]) -> None:
    whole = compared(*wide)
    part = compared(*wide, steps=(3, 6))
    assert part.timestep.values.tolist() == [3, 4, 5]
    for name in ("distance", "displacement_cosine", "norm", "differing_count", "ulp_histogram"):
        assert (part[name].values == whole[name].sel(timestep=part.timestep).values).all()
    before = whole.sel(timestep=2, tensor="param")
    assert (part.distance_at_start.sel(tensor="param") == before.distance).all()
    assert compared(*wide, steps=(None, 3)).sizes["timestep"] == 2


# Faults.


@pytest.mark.parametrize("key", list(KEYS.values()))
def test_one_flipped_bit_is_one_element_one_ulp_at_its_place(tmp_path: Path, key: str) -> None:
    a, _ = short_run()
    b = {name: (dtype, array.copy()) for name, (dtype, array) in a.items()}
    widened = a[key][0] == "F32"
    b[key][1][5, 3, 7] ^= 1 << 16 if widened else 1  # moments: float32 that hold bfloat16 values
    ds = compared(*pair(tmp_path, a, b))
    name = next(name for name, k in KEYS.items() if k == key)
    assert int(ds.differing_count.sum()) == int(ds.max_ulp_distance.sum()) == 1
    one = ds.sel(tensor=name, timestep=5, token_group="all")
    assert int(one.ulp_histogram.sel(ulp_bin=1)) == 1
    assert set(ds.ulp_format.values) == {"bfloat16"}
    token = int(ds.token[3])
    bits = [int(x[key][1][5, 3, 7]) for x in (a, b)]
    assert ds.first_difference.sel(tensor=name).values.tolist() == [5, token, 7, *bits]
    assert account.parting(ds) == (5, name)
    text = "\n".join(account.sentences(ds))
    assert "part at timestep 5" in text
    cause = "the passes through the model" if name == "grad" else "the optimizer's arithmetic"
    assert cause in text


def test_moments_that_do_not_fit_the_narrow_format_keep_their_own_ulp(tmp_path: Path) -> None:
    a, _ = short_run()
    b = {name: (dtype, array.copy()) for name, (dtype, array) in a.items()}
    b["momentum_W"][1][1:] |= 1
    ds = compared(*pair(tmp_path, a, b))
    assert ds.ulp_format.sel(tensor="exp_avg") == "bfloat16"  # the coarser of both
    assert not ds.rounded_differing_count.sel(tensor="exp_avg").any()
    assert int(ds.differing_count.sel(tensor="exp_avg").min()) > 0
    a["momentum_W"][1][1:] |= 2
    ds = compared(*pair(tmp_path, a, b))
    assert ds.ulp_format.sel(tensor="exp_avg") == "float32"


# Alignment.


def cut(tensors: Mapping[str, Tensor], rows: Sequence[int], states: slice) -> dict[str, Tensor]:
    found = {}
    for name, (dtype, array) in tensors.items():
        found[name] = (dtype, array[states][:, rows] if array.ndim > 1 else array)
    steps = found["W"][1].shape[0] - 1
    return found | {"num_steps": f32(steps)}


def test_recordings_of_other_rows_are_aligned_by_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small_run((4, 9, 5))
    whole["W"][1][2, 5, 3] = 0x3F80  # no NaN, which would be like any other
    rows_a, rows_b = [7, 2, 0, 5, 8], [1, 2, 8, 3, 5]
    a, b = (cut(whole, rows, slice(None)) for rows in (rows_a, rows_b))
    b["W"][1][2, 4, 3] ^= 1  # token 5
    told = [{"rows": json.dumps(r), "parameter_shape": "[9, 5]"} for r in (rows_a, rows_b)]
    one, other = pair(tmp_path, a, b, a=told[0], b=told[1])
    groups = jaxaudit.TokenGroups(9, {"all": np.arange(9), "low": np.arange(5)})
    for elements in (5, 15, 1 << 21):
        monkeypatch.setattr(alignment, "BLOCK_ELEMENTS", elements)
        ds = compared(one, other, groups)
        assert ds.token.values.tolist() == [2, 5, 8]
        assert ds.first_difference.sel(tensor="param").values.tolist()[:3] == [2, 5, 3]
        assert int(ds.differing_count.sum("timestep").sel(tensor="param", token_group="all")) == 1
        assert ds.element_count.values.tolist() == [15, 5]
        assert not ds.differing_count.sel(token_group="low").any()
    by_row = jaxaudit.TokenGroups(5, {"all": np.arange(5), "third": np.array([3])})  # token 5 of a
    found = compared(one, other, by_row).differing_count.sel(token_group="third")
    assert int(found.sum()) == 1
    assert "the 3 common ones are compared" in account.describe(ds)
    full = write(tmp_path / "whole.safetensors", whole)
    assert compared(full, one).token.values.tolist() == sorted(rows_a)
    assert account.identical(compared(full, one))


def test_unnamed_rows_are_taken_for_those_of_the_other(tmp_path: Path) -> None:
    a = small_run((4, 3, 2))
    b = {name: (dtype, array.copy()) for name, (dtype, array) in a.items()}
    a["W"][1][2, 1, 1], b["W"][1][2, 1, 1] = 0x3F80, 0x3F81
    told = {"rows": "[4, 0, 7]", "parameter_shape": "[9, 2]"}
    one, other = pair(tmp_path, a, b, a=told)
    for files, run in (((one, other), "b"), ((other, one), "a")):
        ds = compared(*files)
        assert ds.token.values.tolist() == [0, 4, 7]
        assert ds.first_difference.sel(tensor="param").values.tolist()[:3] == [2, 0, 1]
        assert f"{run} does not say which rows" in account.describe(ds)


def test_the_common_timesteps_are_compared(tmp_path: Path) -> None:
    whole = small_run((10, 3, 2))
    whole["W"][1][7, 1, 1] = 0x3F80
    short = cut(whole, range(3), slice(0, 6))
    ds = compared(*pair(tmp_path, whole, short))
    assert ds.timestep.values.tolist() == [1, 2, 3, 4, 5]
    assert account.identical(ds)
    assert "a holds the timesteps 1:10, b 1:6" in account.describe(ds)
    resumed = cut(whole, range(3), slice(4, 10))  # its first step is 5
    resumed["W"][1][3, 1, 1] ^= 1
    ds = compared(*pair(tmp_path, whole, resumed, b={"first_step": "5"}))
    assert ds.timestep.values.tolist() == [5, 6, 7, 8, 9]
    assert ds.first_difference.sel(tensor="param").values.tolist()[:3] == [7, 1, 1]
    assert int(ds.common_start) == 4
    late = cut(whole, range(3), slice(8, 10))
    early, late = pair(tmp_path, short, late, b={"first_step": "9"})
    with pytest.raises(jaxaudit.FileError, match="no timestep in common: 1:6 .* and 9:10"):
        compared(early, late)


def test_what_only_one_holds_is_named(tmp_path: Path) -> None:
    a = small_run()
    b = {name: tensor for name, tensor in a.items() if name not in ("grad_W", "variance_W")}
    b["W"] = "BF16", a["W"][1] ^ np.uint16(1)
    ds = compared(*pair(tmp_path, a, b))
    assert ds.tensor.values.tolist() == ["exp_avg", "param"]
    text = account.describe(ds)
    assert "Only a holds grad, exp_avg_sq, which are not compared." in text
    assert "Before timestep 1 they are apart already: param differs" in text


def test_vectors_and_long_runs_have_tables_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = small_run((4, 9))
    assert compared(*pair(tmp_path, a, a)).sizes["token"] == 9
    monkeypatch.setattr(runs, "_MOST_ENTRIES", 10)
    ds = compared(*pair(tmp_path, a, a))
    assert "ulp_histogram" not in ds and account.identical(ds)
    assert account.describe(ds)


@pytest.mark.parametrize(
    ("shape", "told", "match"),
    [
        ((4, 3, 5), {}, r"shape \[3, 2\], .* one of \[3, 5\]"),
        ((4, 4, 2), {}, r"shape \[3, 2\], .* one of \[4, 2\]"),
        ((4, 6), {}, r"one of \[6\]"),
    ],
)
def test_other_shapes_are_refused(tmp_path: Path, shape: Any, told: Any, match: str) -> None:
    files = pair(tmp_path, small_run(), small_run(shape))
    with pytest.raises(jaxaudit.FileError, match=match):
        compared(*files)


def test_other_rows_groups_and_steps_are_refused(tmp_path: Path) -> None:
    told = [{"rows": r, "parameter_shape": "[9, 2]"} for r in ("[0, 1, 2]", "[3, 4, 5]")]
    files = pair(tmp_path, small_run(), small_run(), a=told[0], b=told[1])
    with pytest.raises(jaxaudit.FileError, match="none in common"):
        compared(*files)
    files = pair(tmp_path, small_run(), small_run())
    with pytest.raises(jaxaudit.FileError, match="over 4 tokens, but the recordings hold 3"):
        compared(*files, jaxaudit.TokenGroups(4, {"all": np.arange(4)}))
    for steps in ((0, 2), (2, 2), (1, 5), (3, 2)):
        with pytest.raises(ValueError, match="outside what both recordings hold, 1:4"):
            compared(*files, steps=steps)


def test_differing_hyperparameters_and_claims_are_told(tmp_path: Path) -> None:
    a, b = small_run(), small_run() | {"adam_beta2": f32(0.99)}
    ds = compared(*pair(tmp_path, a, b, a={"device": "cpu"}, b={"device": "cuda"}))
    told = json.loads(ds.attrs["differing_claims"])
    assert told == {"beta2": [0.999, 0.99], "device": ["cpu", "cuda"]}
    assert "beta2 0.999 in a, 0.99 in b; device cpu in a, cuda in b" in account.describe(ds)


def test_the_dataset_is_labelled_saved_and_read(tmp_path: Path, wide: tuple[Path, Path]) -> None:
    ds = compared(*wide)
    assert set(ds.data_vars) == set(VARIABLES)
    for name in ds.variables:
        assert ds[name].attrs["long_name"] and ds[name].attrs["units"], name
    results.save(ds, tmp_path / "out.nc")
    back = xr.load_dataset(tmp_path / "out.nc", engine="netcdf4")
    for name, array in ds.variables.items():
        kind = array.dtype.kind
        assert kind == "U" or back[name].dtype == array.dtype
        assert back[name].values.tolist() == array.values.tolist() or kind == "f"
    assert account.describe(back) == account.describe(ds)
    assert account.summarize(back) == account.summarize(ds)


def test_progress_ends_with_everything(wide: tuple[Path, Path]) -> None:
    seen: list[tuple[int, int]] = []
    compared(*wide, window_steps=2, progress=lambda *at: seen.append(at))
    assert len(seen) == 3 and seen[-1] == (6 * 440 * 24, 6 * 440 * 24)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_torch_is_not_imported() -> None:
    code = (
        "import sys, jaxaudit; p = jaxaudit.sample_paths()[0]\n"
        "with jaxaudit.open_recording(p) as a, jaxaudit.open_recording(p) as b:\n"
        "    jaxaudit.compare(a, b, steps=(1, 3))\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert _python(["-c", code]).returncode == 0


# Real runs of torch.


@pytest.fixture(scope="module")
def torch_pairs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    pytest.importorskip("torch")
    import runs as made

    from jaxaudit.floats import BFLOAT16

    folder = tmp_path_factory.mktemp("torch")
    given = made.setting(BFLOAT16, size=600, steps=12, weight_decay=0.1)
    found = {}
    for name, how in {"loop": {}, "fused": {}, "master": {"master": True}}.items():
        run = made.torch_runs.take(given, "fused" if name == "fused" else "loop", **how)
        found[name] = run, made.save(folder / f"{name}.safetensors", run)
    return found


def test_loop_and_fused_part_where_their_patterns_do(torch_pairs: Mapping[str, Any]) -> None:
    (loop, a), (fused, b) = torch_pairs["loop"], torch_pairs["fused"]
    ds = compared(a, b)
    timestep, tensor = account.parting(ds) or (0, "")
    assert tensor in ("exp_avg", "exp_avg_sq", "param")
    for name in ("exp_avg", "exp_avg_sq", "param"):
        unlike = loop.patterns[name] != fused.patterns[name]
        assert ds.differing_count.sel(tensor=name, token_group="all").values.tolist() == unlike[1:].sum(axis=1).tolist()  # fmt: skip
    assert not ds.differing_count.sel(tensor="grad").any()
    first = np.flatnonzero((loop.patterns["param"] != fused.patterns["param"]).any(axis=1))[0]
    assert int(ds.first_difference.sel(tensor="param", divergence_field="timestep")) == first
    assert timestep <= first
    assert "The gradients up to there are identical" in account.describe(ds)


def test_bfloat16_against_float32_master(torch_pairs: Mapping[str, Any], tmp_path: Path) -> None:
    import runs as made

    (loop, a), (master, copied) = torch_pairs["loop"], torch_pairs["master"]
    exact = master.patterns["param"]
    path = tmp_path / "b.safetensors"
    b = made.save(path, master, change={"W": exact.view(np.float32).reshape(13, 600, 1)})
    wide = loop.patterns["param"].astype(np.uint32) << 16
    near = exact.view(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    apart = (loop.patterns["param"] != near)[1:].sum(axis=1).tolist()

    ds = compared(a, b)
    assert ds.storage_format.sel(tensor="param").values.tolist() == ["bfloat16", "float32"]
    assert ds.ulp_format.sel(tensor="param") == "bfloat16"
    weights = ds.sel(tensor="param", token_group="all")
    assert weights.differing_count.values.tolist() == (wide != exact)[1:].sum(axis=1).tolist()
    assert weights.rounded_differing_count.values.tolist() == apart
    gap = np.abs(wide.view(np.float32).astype(np.float64) - exact.view(np.float32))
    assert weights.max_distance.values.tolist() == gap[1:].max(axis=1).tolist()
    text = account.describe(ds)
    assert "param is bfloat16 in a and float32 in b: rounded to bfloat16" in text
    assert not account.identical(ds)

    ds = compared(a, copied)  # the recorded weight is the bfloat16 copy
    weights = ds.sel(tensor="param", token_group="all")
    assert set(ds.storage_format.sel(tensor="param").values) == {"bfloat16"}
    assert weights.differing_count.values.tolist() == apart
    assert ds.storage_format.sel(tensor="exp_avg").values.tolist() == ["bfloat16", "float32"]
    assert ds.ulp_format.sel(tensor="exp_avg") == "bfloat16"


# Results.


def made_result(beta2: float = 0.999, lost: int = 3, names: str = "torch-cpu-loop") -> Any:
    """Make a little audit's file: the root, and the group of updates."""
    counts = np.zeros((1, 3, 4, 2), np.int64)
    audited = np.array([[1, 1, 0]], np.int8)
    counts[:, 2] = -1
    root_arrays = {
        "mismatch_count": counts,
        "audited": audited,
        "norm_observed": np.ones((4, 2)),
        "learning_rate": np.full(4, 1e-3),
    }
    labels = {
        "timestep": np.arange(1, 5),
        "token_group": ["all", "dead"],
        "arithmetic": ["torch-cpu-loop"],
        "stage": ["exp_avg", "exp_avg_sq", "param"],
    }
    given = {"beta2": {"value": beta2, "origin": "metadata"}}
    told = [{"sentence": f"{lost} updates are lost.", "variables": []}]
    attributes = {
        "identified_arithmetic": names,
        "hyperparameters": json.dumps(given),
        "verdict": json.dumps(told),
        "device": "cpu",
    }
    root_dataset = results.label(root_arrays, labels, attributes)
    from jaxaudit.ledger.variables import UPDATES

    some = {
        "wanted_count": np.full((4, 2), 10),
        "lost_count": np.array([[3, 1], [3, 1], [lost, 1], [3, 1]]),
    }
    updates = results.label(some, {k: labels[k] for k in ("timestep", "token_group")}, {}, UPDATES)
    return root_dataset, {"updates": updates}


def saved(path: Path, made: Any) -> Path:
    path.unlink(missing_ok=True)
    results.write(made[0], path, made[1])
    return path


def test_two_results_are_compared_variable_by_variable(tmp_path: Path) -> None:
    a = saved(tmp_path / "a.nc", made_result())
    b = saved(tmp_path / "b.nc", made_result(0.99, 8, ""))
    ds = jaxaudit.compare_results(a, b)
    assert set(ds.data_vars) == set(AUDIT_VARIABLES)
    for name in ds.variables:
        assert ds[name].attrs["long_name"] and ds[name].attrs["units"], name
    one = ds.sel(variable="updates/lost_count")
    assert int(one.differing_entry_count) == 1 and int(one.entry_count) == 8
    assert int(one.first_differing_timestep) == 3 and float(one.max_difference) == 5
    assert int((ds.differing_entry_count != 0).sum()) == 1
    assert ds.mismatch_total.values.tolist() == [[[0, 0, -1]]] * 2
    text = account.describe(ds)
    for said in (
        "Replay bit for bit: a under torch-cpu-loop, b under none that was tried.",
        "Mismatches under torch-cpu-loop are as many in both, a | b: exp_avg 0 | 0, exp_avg_sq 0 | 0, param not audited | not audited.",
        "Wanted updates of all tokens that changed nothing: 30 % in a (12 of 40), 42 % in b (17 of 40).",
        "Wanted updates of dead tokens that changed nothing: 10 % (4 of 40) in both.",
        "Only a says: 3 updates are lost.",
        "Only b says: 8 updates are lost.",
        "1 of 6 common variables differ: updates/lost_count (1 of 8, from timestep 3, by up to 5).",
        "beta2 0.999 in a, 0.99 in b",
    ):
        assert said in text
    assert not account.identical(ds)
    assert account.identical(jaxaudit.compare_results(a, a))
    json.dumps(account.summarize(ds), allow_nan=False)


def test_results_of_other_extent_are_compared_where_both_have_labels(tmp_path: Path) -> None:
    made = made_result()
    a = saved(tmp_path / "a.nc", made)
    short = made[0].isel(timestep=slice(1, 3)).assign(extra=("timestep", [1, 2]))
    short["learning_rate"] = ("timestep", [math.nan, 1e-3])
    b = saved(tmp_path / "b.nc", (short, {}))
    ds = jaxaudit.compare_results(a, b)
    assert json.loads(ds.attrs["differing_labels"]) == {"timestep": [2, 2, 0]}
    one = ds.sel(variable="learning_rate")
    assert int(one.entry_count) == 2 and int(one.differing_entry_count) == 1
    assert math.isnan(float(one.max_difference)) and int(one.first_differing_timestep) == 2
    text = account.describe(ds)
    assert "Only b holds extra." in text
    assert "Only a holds updates/wanted_count, updates/lost_count." in text
    other = made[0].transpose("timestep", ...)
    ds = jaxaudit.compare_results(a, saved(tmp_path / "b.nc", (other, {})))
    assert int(ds.differing_entry_count.sel(variable="mismatch_count")) == NEVER
    assert "mismatch_count (other dimensions)" in account.describe(ds)
    assert not account.identical(ds)


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    a = saved(tmp_path / "a.nc", made_result())
    damaged = tmp_path / "damaged.nc"
    damaged.write_bytes(a.read_bytes()[:3000])
    with pytest.raises(jaxaudit.FileError, match="cannot be read as NetCDF"):
        jaxaudit.compare_results(a, damaged)
    with pytest.raises(jaxaudit.FileError, match="cannot be read as NetCDF"):
        jaxaudit.compare_results(a, tmp_path / "missing.nc")
    other = tmp_path / "other.nc"
    xr.Dataset({"x": ("y", [1.0])}).to_netcdf(other, engine="netcdf4")
    with pytest.raises(jaxaudit.FileError, match="no variable in common"):
        jaxaudit.compare_results(a, other)


# Figures.


def test_figures_are_drawn_from_any_comparison(
    tmp_path: Path, wide: tuple[Path, Path], groups: jaxaudit.TokenGroups
) -> None:
    nothing = compared(wide[0], wide[0])
    strange = pair(tmp_path, run_of((3, 5, 2), {"W": "F32"}, 1), run_of((3, 5, 2), {"W": "F32"}, 2))
    for ds in (compared(*wide), nothing, compared(*wide, steps=(2, 3)), compared(*strange, groups)):
        for needed, draw in figures.FIGURES.values():
            if needed in ds:
                draw(ds).savefig(tmp_path / "figure.png")
    a = saved(tmp_path / "a.nc", made_result())
    b = saved(tmp_path / "b.nc", made_result(lost=8))
    figure = figures.updates(jaxaudit.compare_results(a, b))
    figure.savefig(tmp_path / "figure.png")
    assert "30 % in a, 42 % in b" in " ".join(figure.get_suptitle().split())
    assert figures.differing(nothing).get_suptitle() == "Nothing differs"


# The command.


def _python(
    words: Sequence[str | Path], folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    given = [sys.executable, *map(str, words)]
    return subprocess.run(given, cwd=folder, env=environment, capture_output=True, text=True)


def command(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Run the command within this process."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        compare_runs = importlib.import_module("compare_runs")
    finally:
        sys.path.pop(0)
    status = compare_runs.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_compares_writes_and_prints(tmp_path: Path, wide: tuple[Path, Path]) -> None:
    done = _python([SCRIPT, *wide, "--plots", "figures", "--expect", "identical"], tmp_path)
    assert done.returncode == 1 and not done.stderr
    assert "Expected identical, but" in done.stdout
    output = tmp_path / "results" / "a-against-b.nc"
    assert f"Written to {output.relative_to(tmp_path)}" in done.stdout
    with xr.open_dataset(output, engine="netcdf4") as ds:
        assert ds.sizes["timestep"] == 6
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        name for name, (needed, _) in figures.FIGURES.items() if needed in VARIABLES
    } - {"updates.png"}


def test_expectation_steps_and_json(
    tmp_path: Path, wide: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.nc"
    words = (wide[0], wide[0], "--output", output, "--expect", "identical", "--json")
    status, out, err = command(capsys, *words)
    found = json.loads(out)
    assert status == 0 and not err
    assert found["identical"] and found["expectation_met"] and found["first_timestep"] is None
    status, _, err = command(capsys, *words)
    assert status == 2 and "exists already" in err
    status, out, _ = command(
        capsys, *wide, "--steps", "2:4", "--output", output, "--overwrite", "--json", "--quiet"
    )
    found = json.loads(out)
    assert status == 0 and found["timesteps"] == [2, 3] and not found["identical"]
    assert found["tensors"]["param"]["first_difference"]["timestep"] == 1


def test_results_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = saved(tmp_path / "a.nc", made_result())
    b = saved(tmp_path / "b.nc", made_result(lost=8))
    words = (a, b, "--output", tmp_path / "out.nc", "--plots", tmp_path / "figures")
    status, out, err = command(capsys, *words, "--expect", "identical")
    assert status == 1 and not err and "1 of 6 common variables differ" in out
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["updates.png"]
    status, out, _ = command(
        capsys, a, a, "--output", tmp_path / "same.nc", "--expect", "identical"
    )
    assert status == 0 and "All 6 common variables are identical." in out


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["A"], 2, "two files are needed"),
        ([], 2, "two files are needed"),
        (["A", ""], 2, "b: the name is empty"),
        (["A", "missing.safetensors"], 3, "cannot be opened"),
        (["A", "."], 3, "0 checkpoints found"),
        (["A", "N"], 3, "is a NetCDF file, "),
        (["N", "N", "--steps", "1:2"], 2, "--steps is for recordings"),
        (["N", "N", "--token-groups", "A"], 2, "--token-groups is for recordings"),
        (["A", "B", "--steps", "1-2"], 2, "needed START:STOP"),
        (["A", "B", "--steps", "5:99"], 2, "outside what both recordings hold, 1:7"),
        (["A", "B", "--token-groups", "A"], 3, "no usable token group"),
        (["A", "B", "--output", "a.safetensors", "--overwrite"], 2, "is what this command reads"),
        (["A", "B", "--output", "."], 2, "is a folder"),
        (["A", "B", "--expect", "nothing"], 2, "invalid choice"),
        (["A", "S"], 3, "both must be the same"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(
    tmp_path: Path,
    wide: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    status: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"A": wide[0], "B": wide[1], "N": tmp_path / "n.nc", "S": tmp_path / "s.safetensors"}
    saved(files["N"], made_result())
    write(files["S"], small_run())
    before = sorted(tmp_path.rglob("*"))
    found, out, err = command(capsys, *(files.get(word, word) for word in words))
    assert found == status and not out
    assert said in err and err.count("\n") == 1 and err.startswith("compare_runs.py: error: ")
    assert sorted(tmp_path.rglob("*")) == before
