"""Displacements, regimes, lives and clusters of tokens, against exact rational numbers and plain loops."""

import functools
import itertools
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
import xarray as xr
from ledgers import observe
from recordings import small_run, write

import jaxaudit
from jaxaudit import strips
from jaxaudit.devices import find_device
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, Format, decode, encode
from jaxaudit.ledger import clusters
from jaxaudit.ledger import lattice as lattice_module
from jaxaudit.ledger.lattice import Lattice
from jaxaudit.ledger.subject import Aside, Errands, Seen, Subject
from jaxaudit.ledger.variables import LATTICE
from jaxaudit.ledger.variables import TOKENS as LIVES
from jaxaudit.recording import TokenGroups, token_groups_of
from jaxaudit.results import write as write_netcdf
from jaxaudit.strips import members_within
from jaxaudit.workbench import Candidate, Workbench, check_steps

MASKS = {
    "dead_mask": [1, 1, 0, 0, 1, 0, 0, 1, 0],
    "ends_mask": [1, 0, 0, 0, 0, 0, 0, 0, 1],
    "one_mask": [0, 0, 0, 0, 0, 1, 0, 0, 0],
}
TOKENS = 9


def record(path: Path, weights: np.ndarray, fmt: Format) -> Path:
    masks = {name: ("BOOL", np.array(mask, bool)) for name, mask in MASKS.items()}
    own = masks if weights.shape[1] == TOKENS else {}
    return write(path, {"W": (fmt.safetensors, weights), **own})


def run(
    path: Path,
    *,
    steps: tuple[int, int] | None = None,
    window_steps: int | None = None,
    per_token: bool | None = None,
    groups: TokenGroups | None = None,
) -> tuple[xr.Dataset, xr.Dataset]:
    """Observe a recording that may hold the weights alone, for which there is no arithmetic."""
    device = find_device("cpu")
    with (
        jaxaudit.open_recording(path) as recording,
        jax.enable_x64(True),
        jax.default_device(device),
        Aside(device) as aside,
    ):
        groups, steps = groups or token_groups_of(recording), check_steps(recording, steps)
        bench = Workbench(recording, (device,), steps, window_steps)
        subject = Subject(bench, cast(Candidate, None), groups, steps)
        lattice, alike = Lattice(subject, per_token=per_token), clusters.Clusters(subject)
        for strip in bench.strips:
            lattice.forget()
            for window in bench.windows(steps, [strip]):
                errands = Errands()
                later = functools.partial(errands.later, aside)
                seen = Seen(window, bench.put(window), members_within(groups, window), later)
                lattice.take(seen)
                errands.finish()
                for buffer in window.tensors.values():  # the reader fills it anew
                    buffer.view(np.uint8)[:] = 0xA5
        alike.follow(lambda window: None)
    return lattice.lattice(), lattice.tokens(alike)


def edges(fmt: Format, *, finite: bool) -> np.ndarray:
    """Return patterns at which something happens: both signs."""
    normal, one = 1 << fmt.significand_bits, fmt.bias << fmt.significand_bits
    powers = [one + k * normal for k in (-2, -1, 0, 1, 2, 5)]
    found = [0, *powers, *(p - 1 for p in powers), *(p + 1 for p in powers)]
    found += [fmt.infinity - 1, fmt.infinity - 2, normal, normal + 1, 2 * normal]
    if not finite:
        found += [1, 2, 3, normal - 1, normal - 2, fmt.infinity, fmt.infinity + 1]
        found += [fmt.infinity + normal // 2, fmt.sign_bit - 1]
    both = np.array([*found, *(fmt.sign_bit + p for p in found)])
    return both.astype(fmt.pattern_dtype)


def random_walk(fmt: Format, width: int, *, finite: bool, steps: int = 7) -> np.ndarray:
    """Return weights (steps + 1, TOKENS, width) that rest, creep, and jump among edges."""
    random = np.random.default_rng(width + fmt.width + fmt.exponent_bits)
    pool, shape = edges(fmt, finite=finite), (TOKENS, width)
    start = encode(random.normal(0, 1, (6, width)).astype(np.float32), fmt)
    rows = [np.concatenate([start, start[:2], random.choice(pool, (1, width))])]
    for t in range(steps):
        row = rows[-1].copy()
        kind = random.random(shape)
        some = random.random((TOKENS, 1)) < 0.5  # tokens that may jump
        creeps = (row + random.integers(-2, 3, shape)).astype(row.dtype)
        legal = (creeps & (fmt.sign_bit - 1)) < fmt.infinity
        legal &= (creeps & (fmt.sign_bit - 1)) >= 1 << fmt.significand_bits
        row = np.where((kind < 0.3) & legal, creeps, row)
        row = np.where((kind > 0.7) & some, random.choice(pool, shape), row)
        if not finite:
            anything = random.integers(0, 1 << fmt.width, shape, np.uint64).astype(row.dtype)
            row = np.where(kind > 0.95, anything, row)
        rest = random.random(TOKENS) < 0.4
        row[rest] = rows[-1][rest]
        row[2] = rows[-1][2] if t > 2 else row[2]  # freezes
        row[3] = rows[0][3]  # never moves
        row[4] = row[1] if t % 2 else row[4]  # the same bits now and then
        row[7] = row[0]
        row[8] = rows[-1][8] if t == 4 else row[8] ^ row.dtype.type(fmt.sign_bit)
        rows.append(row)
    rows[-1][5] = rows[-1][6]
    return np.stack(rows)


def value(pattern: int, fmt: Format) -> float:
    """Decode by the definition of the format."""
    sign = -1.0 if pattern & fmt.sign_bit else 1.0
    exponent, fraction = divmod(pattern & (fmt.sign_bit - 1), 1 << fmt.significand_bits)
    if exponent == (1 << fmt.exponent_bits) - 1:
        return math.nan if fraction else sign * math.inf
    hidden = 1 << fmt.significand_bits if exponent else 0
    return sign * math.ldexp(fraction + hidden, max(exponent, 1) - fmt.bias - fmt.significand_bits)


def line(pattern: int, fmt: Format) -> int:
    magnitude = pattern & (fmt.sign_bit - 1)
    if magnitude > fmt.infinity:
        return fmt.infinity + 1
    return -magnitude if pattern & fmt.sign_bit else magnitude


def ulp_of(number: float, fmt: Format) -> Fraction:
    """Return the distance to the next number away from zero."""
    exponent = math.frexp(number)[1] - 1 if number else -9999
    return Fraction(2) ** (max(exponent, 1 - fmt.bias) - fmt.significand_bits)


def displacement(before: int, after: int, fmt: Format) -> Fraction | float:
    a, b = value(before, fmt), value(after, fmt)
    if line(before, fmt) == line(after, fmt):
        return Fraction(0)
    if math.isfinite(a) and math.isfinite(b):
        return (Fraction(b) - Fraction(a)) / ulp_of(a, fmt)
    return b - a


def lengths(moves: list[Any], width: int) -> tuple[Any, Any, Any]:
    """Return L1, the sum of squares, and Linf; NaN and infinity carry through."""
    if any(isinstance(x, float) and math.isnan(x) for x in moves):
        return math.nan, math.nan, math.nan
    if any(isinstance(x, float) for x in moves):
        return math.inf, math.inf, math.inf
    sizes = [abs(x) for x in moves]
    return sum(sizes), sum(x * x for x in sizes), max(sizes)


def near(found: float, wanted: Any, width: int, power: int = 1) -> bool:
    """Tell whether a float64 sum of `width` non-negative terms, or its root, is what it must be."""
    if isinstance(wanted, float):
        return found == wanted or (math.isnan(found) and math.isnan(wanted))
    return abs(Fraction(found) ** power - wanted) <= wanted * Fraction(width + 5, 1 << 52)


def in_order(moves: list[Any]) -> tuple[float, float]:
    """Add up sizes and squares from left to right, each rounded to float64, as rows of less than 16 are."""
    first = second = 0.0
    for x in moves:
        size = abs(float(x))
        first, second = first + size, second + size * size
    return first, math.sqrt(second)


class Expected:
    """Everything of a recording, element by element."""

    def __init__(self, weights: np.ndarray, fmt: Format, first: int = 1):
        self.width, self.first, self.fmt = weights.shape[2], first, fmt
        self.steps, self.tokens = len(weights) - 1, weights.shape[1]
        w = weights.tolist()
        pairs = [[list(zip(*rows, strict=True)) for rows in zip(a, b, strict=True)] for a, b in itertools.pairwise(w)]  # fmt: skip
        self.ulp = [[[displacement(*x, fmt) for x in row] for row in step] for step in pairs]
        self.line = [[[line(b, fmt) - line(a, fmt) for a, b in row] for row in step] for step in pairs]  # fmt: skip
        self.lengths = [[lengths(row, self.width) for row in step] for step in self.ulp]
        self.weights = w

    def regime(self, t: int, token: int) -> str:
        l1, squares, linf = self.lengths[t][token]
        if l1 == 0:
            return "frozen"
        if math.isnan(l1) or squares > self.width:
            return "early"
        return "midlife" if linf > 1 else "late"

    def last(self, token: int, *regimes: str) -> int:
        """Return the last timestep in any of some regimes, 0 for none."""
        times = [t for t in range(self.steps) if self.regime(t, token) in regimes]
        return self.first + times[-1] if times else 0

    def settled(self, t: int, token: int) -> str:
        now = self.first + t
        if now <= self.last(token, "early"):
            return "early"
        if now <= self.last(token, "early", "midlife"):
            return "midlife"
        return "late" if now <= self.last(token, "early", "midlife", "late") else "frozen"

    def same_bits(self, t: int, members: list[int]) -> list[int]:
        """Return the sizes of the sets of members with the same bits after a step."""
        return list(Counter(tuple(self.weights[t + 1][n]) for n in members).values())


def check_displacements(found: xr.Dataset, want: Expected) -> None:
    for t, n in itertools.product(range(want.steps), range(want.tokens)):
        l1, squares, linf = want.lengths[t][n]
        moves = [abs(x) for x in want.line[t][n]]
        table = found.displacement[:, :, t, n].values
        assert near(table[0, 0], l1, want.width)
        assert near(table[0, 1], squares, want.width, power=2)
        assert table[0, 2] == float(linf) or math.isnan(table[0, 2]) and math.isnan(linf)
        assert table[1, 0] == sum(moves)
        assert table[1, 1] == pytest.approx(math.sqrt(sum(x * x for x in moves)), rel=1e-15)
        assert table[1, 2] == max(moves)
        if want.width < 16:
            np.testing.assert_array_equal(table[0, :2], in_order(want.ulp[t][n]))
            np.testing.assert_array_equal(table[1, :2], in_order(moves))


def check_groups(found: xr.Dataset, want: Expected, groups: dict[str, list[int]]) -> None:
    table = found.displacement.values
    assert found.token_group.values.tolist() == list(groups)
    for g, (name, members) in enumerate(groups.items()):
        here = found.isel(token_group=g)
        mine = table[..., members]
        np.testing.assert_allclose(here.displacement_mean, mine.mean(axis=-1), rtol=1e-14)
        np.testing.assert_array_equal(here.displacement_max, mine.max(axis=-1))
        for t in range(want.steps):
            ulp, steps = (
                [x for n in members for x in rows[t][n]] for rows in (want.ulp, want.line)
            )
            assert here.signed_displacement[1, t] == sum(steps)
            sizes = sum(abs(x) for x in ulp)
            if isinstance(sizes, Fraction):
                found_sum = Fraction(float(here.signed_displacement[0, t]))
                assert abs(found_sum - sum(ulp)) <= sizes * Fraction(len(ulp), 1 << 52), name
            else:
                assert not np.isfinite(here.signed_displacement[0, t])
            crossed = sum(abs(a) != abs(b) for a, b in zip(ulp, steps, strict=True))
            assert here.edge_crossing_count[t] == crossed
            for k, regime in enumerate(("early", "midlife", "late", "frozen")):
                assert here.regime.values[k] == regime
                assert here.regime_count[k, t] == sum(want.regime(t, n) == regime for n in members)
                settled = sum(want.settled(t, n) == regime for n in members)
                assert here.settled_regime_count[k, t] == settled


def check_lives(found: xr.Dataset, want: Expected) -> None:
    for n in range(want.tokens):
        mine = found.isel(token=n)
        assert mine.last_early == want.last(n, "early")
        assert mine.last_midlife == want.last(n, "early", "midlife")
        moved = [any(want.line[t][n]) for t in range(want.steps)]
        onset = max((want.first + t for t in range(want.steps) if moved[t]), default=0)
        assert mine.freeze_onset == (-1 if moved[-1] else onset)
        assert mine.thaw_count == sum(b and not a for a, b in itertools.pairwise(moved))
        assert mine.lattice_path == sum(abs(x) for step in want.line for x in step[n])
        rows = [[(value(p, want.fmt), line(p, want.fmt)) for p in w[n]] for w in want.weights]
        changes = [distance(a, b) for a, b in itertools.pairwise(rows)]
        assert mine.weight_path.values == pytest.approx(sum(changes), rel=1e-14, nan_ok=True)
        net = distance(rows[0], rows[-1])
        assert mine.weight_displacement.values == pytest.approx(net, rel=1e-14, nan_ok=True)
        net_steps = sum(abs(a[1] - b[1]) for a, b in zip(rows[0], rows[-1], strict=True))
        assert mine.lattice_displacement == net_steps
        for name, row in (("norm_at_start", rows[0]), ("norm_at_end", rows[-1])):
            norm = math.sqrt(sum(x * x for x, _ in row))
            assert mine[name].values == pytest.approx(norm, rel=1e-14, nan_ok=True)


def distance(a: list[tuple[float, int]], b: list[tuple[float, int]]) -> float:
    """Return the L2 norm of a difference of rows of values and places on the line."""
    pairs = zip(a, b, strict=True)
    terms = [0.0 if m == n else (y - x) * (y - x) for (x, m), (y, n) in pairs]
    return math.sqrt(sum(terms))


def check_clusters(found: xr.Dataset, want: Expected, groups: dict[str, list[int]]) -> None:
    seen: dict[tuple[int, ...], int] = {}
    numbers = [seen.setdefault(tuple(row), len(seen)) for row in want.weights[-1]]
    assert found.cluster.values.tolist() == numbers
    for (g, members), t in itertools.product(enumerate(groups.values()), range(want.steps)):
        sizes = want.same_bits(t, members)
        assert found.distinct_row_count[t, g] == len(sizes)
        assert found.cluster_count[t, g] == sum(size > 1 for size in sizes)
        assert found.clustered_token_count[t, g] == sum(size for size in sizes if size > 1)
        inside = [int(n in members) for n in range(want.tokens)]
        assert found.in_group[:, g].values.tolist() == inside


def groups_of() -> dict[str, list[int]]:
    dead = np.array(MASKS["dead_mask"], bool)
    named = {"all": np.ones(TOKENS, bool), "dead": dead, "live": ~dead}
    named |= {k.removesuffix("_mask"): np.array(v, bool) for k, v in MASKS.items()}
    return {name: np.flatnonzero(mask).tolist() for name, mask in named.items()}


def check(found: tuple[xr.Dataset, xr.Dataset], want: Expected) -> None:
    lattice, tokens = found
    timesteps = list(range(want.first, want.first + want.steps))
    assert lattice.timestep.values.tolist() == tokens.timestep.values.tolist() == timesteps
    check_displacements(lattice, want)
    check_groups(lattice, want, groups_of())
    check_lives(tokens, want)
    check_clusters(tokens, want, groups_of())


@pytest.mark.parametrize(
    ("fmt", "width", "finite"),
    [
        (BFLOAT16, 5, False),
        (BFLOAT16, 19, True),
        (BFLOAT16, 1, False),
        (FLOAT16, 5, False),
        (FLOAT32, 5, True),
        (FLOAT32, 17, False),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_everything_equals_plain_loops_over_exact_numbers(
    tmp_path: Path, fmt: Format, width: int, finite: bool
) -> None:
    weights = random_walk(fmt, width, finite=finite)
    want = Expected(weights, fmt)
    check(run(record(tmp_path / "w.safetensors", weights, fmt), window_steps=3), want)
    kinds = {want.regime(t, n) for t in range(want.steps) for n in range(want.tokens)}
    assert kinds >= {"early", "frozen"} | ({"late", "midlife"} if width == 5 else set())


def patterns(*rows: list[float]) -> np.ndarray:
    return encode(np.array(rows, np.float32), BFLOAT16)


def test_a_worked_example(tmp_path: Path) -> None:
    # ulp of 1 is 2^-7, of the numbers below 2^-8; D = 2.
    states = [
        patterns([1, 1], [2, 0.5], [0, -1e-39]),
        patterns([1 + 2**-7, 1 - 2**-8], [2 + 2**-6, 0.5 + 2**-8], [0, -1e-39]),
        patterns([1 - 2**-8, 1 - 2**-8], [2 - 2**-7, 0.5 + 2**-8], [-0.0, -1e-39]),
        patterns([1 - 2**-8, 1 - 2**-8], [2 - 2**-7, 0.5 + 2**-8], [-0.0, 2e-39]),
    ]
    path = write(tmp_path / "w.safetensors", {"W": ("BF16", np.stack(states))})
    lattice, tokens = run(path)
    table = lattice.displacement
    ulp, steps = table.sel(measure="ulp"), table.sel(measure="line")
    # 1 -> 1 + ulp, and 1 -> its lower neighbour, which is half an ulp away; then 1.5 of them down.
    assert ulp.sel(norm="l1", token=0).values.tolist() == [1.5, 1.5, 0]
    assert steps.sel(norm="l1", token=0).values.tolist() == [2, 2, 0]
    assert ulp.sel(norm="linf", token=0).values.tolist() == [1, 1.5, 0]
    # Each weight one ulp: L2 = sqrt(D), which is not yet more; then 1.5 ulp across the edge at 2.
    assert ulp.sel(norm="l2", token=1).values.tolist() == [math.sqrt(2), 1.5, 0]
    assert steps.sel(norm="l2", token=1).values.tolist() == [math.sqrt(2), 2, 0]
    regimes = lattice.regime_count.sel(token_group="all").transpose("timestep", "regime").values
    assert regimes.tolist() == [[0, 0, 2, 1], [2, 0, 0, 1], [1, 0, 0, 2]]
    settled = lattice.settled_regime_count.sel(token_group="all").transpose("timestep", "regime")
    assert settled.values.tolist() == [[3, 0, 0, 0], [3, 0, 0, 0], [1, 0, 0, 2]]
    # Across zero among subnormals, spaced evenly, both measures agree: no edge.
    assert lattice.edge_crossing_count.values.ravel().tolist() == [1, 2, 0]
    assert lattice.signed_displacement.sel(measure="ulp").values[:2, 0].tolist() == [2.5, -3]
    assert tokens.freeze_onset.values.tolist() == [2, 2, -1]
    assert tokens.thaw_count.values.tolist() == [0, 0, 1]
    assert tokens.lattice_path.values[:2].tolist() == [4, 4]
    assert tokens.lattice_displacement.values[:2].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("fmt", "width", "windows", "rows"), [(BFLOAT16, 5, (None, 1), 4), (FLOAT32, 17, (), 3)]
)
def test_nothing_depends_on_windows_or_row_ranges(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fmt: Format,
    width: int,
    windows: tuple[int | None, ...],
    rows: int,
) -> None:
    path = record(tmp_path / "w.safetensors", random_walk(fmt, width, finite=False), fmt)
    usual = run(path, window_steps=3)
    found = [run(path, window_steps=n) for n in windows]
    for other in found:
        for a, b in zip(usual, other, strict=True):
            xr.testing.assert_identical(a, b)
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", rows * width)
    lattice, tokens = run(path)
    xr.testing.assert_identical(tokens, usual[1])
    xr.testing.assert_identical(
        lattice.drop_vars("displacement_mean"), usual[0].drop_vars("displacement_mean")
    )
    # Sums are those of the strips, added up in their order.
    owns = [slice(*strip.own) for strip in strips.strips_of(TOKENS, width)]
    assert len(owns) > 1
    for name, inside in usual[1].in_group.groupby("token_group"):
        sums = 0.0
        for own in owns:
            mine = np.flatnonzero(inside.values.ravel()[own]) + own.start
            with np.errstate(all="ignore"):
                part = np.ascontiguousarray(lattice.displacement.values[..., mine])
                sums = sums + part.reshape(np.prod(part.shape[:-1]), mine.size).sum(axis=1)
        mean = (sums / inside.values.sum()).reshape(lattice.displacement_mean.shape[:-1])
        found = lattice.displacement_mean.sel(token_group=name).values
        np.testing.assert_array_equal(found, mean)


def test_a_range_of_steps_has_its_own_timesteps(tmp_path: Path) -> None:
    weights = random_walk(BFLOAT16, 5, finite=False)
    found = run(record(tmp_path / "w.safetensors", weights, BFLOAT16), steps=(3, 7), window_steps=3)
    check(found, Expected(weights[2:7], BFLOAT16, first=3))


@pytest.mark.parametrize("ranges", [False, True])
def test_a_collision_of_hashes_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    weights = random_walk(BFLOAT16, 5, finite=False)
    path = record(tmp_path / "w.safetensors", weights, BFLOAT16)
    factors = np.zeros((2, 5), np.uint32)
    factors[:, 0] = 1  # rows with the same first element collide
    factors[:, 0] *= 1 << 31  # and all that are even, or odd, there
    monkeypatch.setattr(clusters, "_factors", lambda width: factors)
    if ranges:
        monkeypatch.setattr(strips, "STRIP_ELEMENTS", 20)
    clusters._hash_program.cache_clear()
    try:
        found = run(path, window_steps=3)
    finally:
        lattice_module._rows_program.cache_clear()
    check_clusters(found[1], Expected(weights, BFLOAT16), groups_of())


def test_hashes_tell_rows_apart_that_differ_in_two_signs() -> None:
    device = find_device("cpu")
    for fmt in (BFLOAT16, FLOAT16, FLOAT32):
        rows = np.full((1, 3, 4), 1 << fmt.significand_bits, fmt.pattern_dtype)
        rows[0, 1, :2] |= fmt.sign_bit
        rows[0, 2, 2:] |= fmt.sign_bit
        states = jax.device_put(rows.reshape(-1), device)
        found = clusters.hashed(states, states, fmt, 4)
        for name in ("hash0", "hash1"):
            assert np.unique(np.asarray(found[name]).sum(axis=1, dtype=np.uint32)).size == 3


def test_a_zero_that_changes_its_sign_does_not_move_but_is_alike(tmp_path: Path) -> None:
    states = np.zeros((4, 2, 3), np.uint16)
    states[1:3, 1, 1] = BFLOAT16.sign_bit
    lattice, tokens = run(write(tmp_path / "w.safetensors", {"W": ("BF16", states)}))
    assert (lattice.regime_count.sel(regime="frozen") == 2).all()
    assert (lattice.displacement == 0).all() and (tokens.freeze_onset == 0).all()
    assert tokens.distinct_row_count.values.ravel().tolist() == [2, 2, 1]
    assert tokens.clustered_token_count.values.ravel().tolist() == [0, 0, 2]


def test_rows_are_read_only_where_hashes_are_equal() -> None:
    def never() -> Any:
        raise AssertionError("rows were read")

    different = np.array([7, 3, 5], np.uint64)
    assert clusters.first_alike(different, never).tolist() == [0, 1, 2]
    with pytest.raises(AssertionError, match="were read"):
        clusters.first_alike(np.array([7, 3, 7], np.uint64), never)
    followed = clusters.Sets(3, [np.arange(3)])
    assert followed.after(different, True, never).tolist() == [[3], [0], [0]]
    # Nothing changed: the hashes are not even looked at.
    assert followed.after(different * np.uint64(0), False, never).tolist() == [[3], [0], [0]]


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT32], ids=lambda fmt: fmt.name)
def test_both_formulations_round_each_square_and_sum_from_left_to_right(fmt: Format) -> None:
    random, key = np.random.default_rng(3), (fmt, 6, find_device("cpu"))
    magnitude = random.integers(1 << fmt.significand_bits, fmt.infinity, (3, 6000))
    magnitude[1, ::2] = magnitude[0, ::2] + random.integers(-3, 3, 3000)
    magnitude[:, ::7] = 0
    magnitude = np.clip(magnitude, 1 << fmt.significand_bits, fmt.infinity - 1)
    magnitude[:, ::7] = 0
    sign = random.integers(0, 2, magnitude.shape) * fmt.sign_bit
    states = (magnitude | sign).astype(fmt.pattern_dtype)
    values = decode(states, fmt).astype(np.float64)
    exponent = np.maximum(np.frexp(values[:-1])[1] - 1, 1 - fmt.bias)
    exponent[values[:-1] == 0] = 1 - fmt.bias
    change, steps = np.diff(values, axis=0), np.diff(np.where(sign, -magnitude, magnitude), axis=0)
    ulp = change / np.ldexp(1.0, exponent - fmt.significand_bits)
    terms = {
        "ulp_l1": abs(ulp),
        "ulp_squares": ulp**2,
        "ulp_signed": ulp,
        "line_l1": abs(steps),
        "line_squares": steps.astype(np.float64) ** 2,
        "line_signed": steps,
        "crossings": abs(ulp) != abs(steps),
        "change_squares": change**2,
    }
    with jax.enable_x64(True):
        assert not np.asarray(lattice_module._special_program(*key)(states)).any()
        for plain in (True, False):
            found = lattice_module._rows_program(*key, plain)(states)
            for name, term in terms.items():
                total = functools.reduce(np.add, np.moveaxis(term.reshape(2, -1, 6) * 1, -1, 0))
                unit = 2.0 ** (fmt.significand_bits - 1) if name.startswith("ulp") else 1
                power = 2 if name == "ulp_squares" else 1
                np.testing.assert_array_equal(found[name][..., 0] * unit**power, total, name)


@pytest.mark.parametrize(
    ("fmt", "special"),
    [
        (BFLOAT16, [1, 0x7F, 0x8001, 0x807F, 0x7F80, 0x7F81, 0xFF80, 0xFFFF]),
        (FLOAT16, [0x7C00, 0x7C01, 0xFC00, 0xFFFF]),
        (FLOAT32, [1, 0x7FFFFF, 0x80000001, 0x7F800000, 0x7F800001, 0xFFFFFFFF]),
    ],
)
def test_one_special_pattern_is_found(fmt: Format, special: list[int]) -> None:
    program = lattice_module._special_program(fmt, 3, find_device("cpu"))
    usual = [0, fmt.sign_bit, 1 << fmt.significand_bits, fmt.infinity - 1, fmt.sign_bit - 1]
    usual[-1] = fmt.sign_bit + fmt.infinity - 1
    states = np.resize(np.array(usual, fmt.pattern_dtype), (2, 6))
    assert not np.asarray(program(states)).any()
    for pattern in special:
        changed = states.copy()
        changed[1, 4] = pattern
        assert np.asarray(program(changed)).any()


def test_sums_of_long_rows_do_not_overflow() -> None:
    largest = BFLOAT16.infinity - 1
    before, after = (np.array([x], np.uint16) for x in (largest | BFLOAT16.sign_bit, largest))
    with jax.enable_x64(True):
        for width, dtype in ((32_895, np.int32), (32_896, np.int64)):
            steps, line = lattice_module._line_steps(before, after, BFLOAT16, width, True)
            assert steps.dtype == dtype and steps.item() == line.item() == 2 * largest
            # One more: infinity to the step beyond the other infinity, as which NaN counts.
            assert (width * (2 * BFLOAT16.infinity + 1) < 1 << 31) == (dtype is np.int32)


def test_the_table_of_every_token_and_step_can_be_left_out(tmp_path: Path) -> None:
    path = record(tmp_path / "w.safetensors", random_walk(BFLOAT16, 5, finite=False), BFLOAT16)
    small, _ = run(path, per_token=True)
    assert set(small.data_vars) == set(LATTICE) and not small.attrs
    large, tokens = run(path, per_token=False)
    assert set(large.data_vars) == set(LATTICE) - {"displacement"} and "token" not in large.coords
    assert "7 timesteps x 9 tokens" in large.attrs["displacement_left_out"]
    assert set(tokens.data_vars) == set(LIVES)
    groups = {"small": small, "large": large, "tokens": tokens}
    write_netcdf(xr.Dataset(), tmp_path / "all.nc", groups)
    with xr.open_datatree(tmp_path / "all.nc", engine="netcdf4") as tree:
        for name, dataset in groups.items():
            xr.testing.assert_identical(tree[name].to_dataset(), dataset)


def test_a_group_without_tokens_has_counts_of_zero_and_no_mean(tmp_path: Path) -> None:
    path = record(tmp_path / "w.safetensors", random_walk(BFLOAT16, 5, finite=True), BFLOAT16)
    none = {"all": np.arange(TOKENS), "none": np.arange(0)}
    lattice, tokens = run(path, groups=TokenGroups(TOKENS, none))
    here = lattice.sel(token_group="none")
    assert np.isnan(here.displacement_mean).all() and (here.displacement_max == 0).all()
    for name in ("regime_count", "settled_regime_count", "edge_crossing_count"):
        assert (here[name] == 0).all()
    for name in ("distinct_row_count", "cluster_count", "clustered_token_count"):
        assert (tokens[name].sel(token_group="none") == 0).all()


def test_it_takes_the_recorded_weights_of_a_whole_recording(tmp_path: Path) -> None:
    tensors = small_run((6, 3, 2))
    found: list[Lattice] = []

    def observers(subject: Subject) -> list[Any]:
        found.append(Lattice(subject))
        return [found[0].take]

    observe(write(tmp_path / "r.safetensors", tensors), observers, window_steps=2)
    want = Expected(tensors["W"][1], BFLOAT16)
    check_displacements(found[0].lattice(), want)
    alike = clusters.Clusters(found[0]._subject)
    check_lives(found[0].tokens(alike), want)
