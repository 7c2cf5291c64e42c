"""The ledger of the moments against slow computations from its definitions."""

import dataclasses
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xarray as xr
from ledgers import observe
from recordings import write
from runs import save, setting, torch_runs

from jaxaudit import strips
from jaxaudit.arithmetics import VARIANTS, Options, make_step
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32
from jaxaudit.ledger import counting, moments
from jaxaudit.ledger.moments import Moments, chosen_tokens, with_float32_moments
from jaxaudit.ledger.subject import Subject
from jaxaudit.operations import numpy_operations
from jaxaudit.recording import TokenGroups
from jaxaudit.scalars import scalars_of
from jaxaudit.workbench import Candidate

DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
EDGES = np.array([(1 + k / 32) * 2.0**e for e in range(-32, 32) for k in range(32)])
MOMENTS = ("exp_avg", "exp_avg_sq")


def patterns_of(values: Any, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(values).astype(DTYPES[dtype]).view(BITS[dtype])


def values_of(patterns: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.ascontiguousarray(patterns).view(DTYPES[dtype]).astype(np.float64)


@dataclasses.dataclass
class Drawn:
    """A recording, with what it was made of.

    Attributes:
        dtypes: of `W`, `grad_W`, `momentum_W`, `variance_W` and, with amsgrad, `max_variance_W`.
        patterns: of the same.
        given: hyperparameters.
        options: of the optimizer.
    """

    dtypes: dict[str, str]
    patterns: dict[str, np.ndarray]
    given: dict[str, float]
    options: Options

    def value(self, name: str, t: int) -> np.ndarray:
        return values_of(self.patterns[name][t], self.dtypes[name])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.patterns["W"].shape

    def write(self, path: Path) -> Path:
        steps = self.shape[0] - 1
        scalars = {
            "learning_rate": np.full(steps + 1, 1e-3),
            "weight_decay": np.array(self.given["weight_decay"]),
            "adam_beta1": np.array(self.given["beta1"]),
            "adam_beta2": np.array(self.given["beta2"]),
            "adam_epsilon": np.array(self.given["epsilon"]),
        }
        tensors = {name: (self.dtypes[name], array) for name, array in self.patterns.items()}
        tensors |= {name: ("F64", np.asarray(array, "<f8")) for name, array in scalars.items()}
        return write(path, tensors, {"first_step": str(self.given["first_step"])})


def drawn(
    storage: str = "BF16",
    kept: str = "",
    shape: tuple[int, int, int] = (5, 7, 6),
    *,
    seed: int = 0,
    narrow: str = "",
    options: Options | None = None,
    scale: float = 1e-3,
    specials: bool = True,
    **given: float,
) -> Drawn:
    """Draw moments that stay, move by an ulp, decay, underflow, or are anything at all.

    Args:
        storage: dtype of weights and gradients.
        kept: dtype of the moments; by default that of the weights.
        shape: steps, tokens, width.
        seed: of the random numbers.
        narrow: dtype whose values the moments have, whatever they are stored as.
        options: of the optimizer.
        scale: of the gradients.
        specials: with infinities, NaNs, subnormal numbers, zeros of both signs and the largest numbers.
        given: hyperparameters other than the usual.
    """
    rng, kept = np.random.default_rng(seed), kept or storage
    steps, full = shape[0], (shape[0] + 1, *shape[1:])
    bits, dtype = BITS[kept], DTYPES[kept]
    info = ml_dtypes.finfo(dtype)
    sign, infinity = 1 << (info.bits - 1), int(patterns_of(np.inf, kept))
    unit = 1 << (info.nmant - ml_dtypes.finfo(DTYPES[narrow]).nmant) if narrow else 1

    def kept_as(values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", under="ignore"):
            return patterns_of(values.astype(DTYPES[narrow]) if narrow else values, kept)

    def moment(power: int) -> np.ndarray:
        def fresh() -> np.ndarray:
            values = rng.normal(0, scale, shape[1:]) * np.exp2(rng.integers(-6, 3, shape[1:]))
            values = np.where(rng.random(shape[1:]) < 0.2, np.exp2(rng.integers(-14, -3, shape[1:])), values)  # fmt: skip
            return kept_as(values if power == 1 else values**2)

        rows = [fresh()]
        for _ in range(steps):
            old = rows[-1].astype(np.int64)
            moved = old + unit * rng.choice([0, 0, 0, 1, -1, -2], shape[1:])
            moved = np.where((moved & (sign - 1)) < infinity, moved % (2 * sign), old)
            kind = rng.random(shape[1:])
            new = np.select([kind < 0.75, kind < 0.8, kind < 0.85], [moved, old & sign, old ^ sign], fresh())  # fmt: skip
            rows.append(new.astype(bits))
        found = np.stack(rows)
        if specials and not narrow:
            odd = [0, sign, 1, sign | 3, infinity, sign | infinity, infinity + 1, infinity - 1]
            where = rng.random(found.shape) < 0.06
            found = np.where(where, rng.choice(np.array(odd), found.shape), found).astype(bits)
        return found

    grad = rng.normal(0, scale, full) * np.exp2(rng.integers(-8, 3, full))
    grad = np.where(rng.random(full) < 0.3, rng.choice([0.0, -0.0], full), grad)
    if specials:
        odd = [1e-40, -3e-39, 6e-8, 1e4, np.inf, np.nan, 1e-22]
        grad = np.where(rng.random(full) < 0.03, rng.choice(odd, full), grad)
    dtypes = {"W": storage, "grad_W": storage, "momentum_W": kept, "variance_W": kept}
    patterns = {
        "W": patterns_of(rng.normal(0, 0.02, full), storage),
        "grad_W": patterns_of(grad, storage),
        "momentum_W": moment(1),
        "variance_W": moment(2),
    }
    options = options or Options()
    if options.amsgrad:
        dtypes["max_variance_W"] = kept
        patterns["max_variance_W"] = moment(2)
    usual = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.0, "first_step": 1}
    return Drawn(dtypes, patterns, usual | given, options)


def rounded32(exact: Fraction) -> float:
    """Round an exact number to float32, to nearest with ties to even."""
    if not exact:
        return 0.0
    exponent = math.frexp(float(exact))[1] if abs(exact) > Fraction(2) ** -1000 else -1000
    unit = Fraction(2) ** (max(exponent - 1, -126) - 23)
    found = round(exact / unit) * unit
    # A carry into the next binade leaves a number of that binade.
    return math.copysign(math.inf, found) if abs(found) >= 2**128 else float(found)


def fused32(a: float, b: float, c: float) -> float:
    """Compute a * b + c, rounded to float32 once."""
    if all(map(math.isfinite, (a, b, c))):
        return rounded32(Fraction(a) * Fraction(b) + Fraction(c))
    return float(np.float64(a) * np.float64(b) + np.float64(c))


def product32(a: float, b: float) -> float:
    return fused32(a, b, 0.0)


def float32_moments(run: Drawn) -> np.ndarray:
    """Accumulate the second moment as torch's loop does, in float32; (steps + 1, tokens, width)."""
    beta2, weight = (float(np.float32(b)) for b in (run.given["beta2"], 1 - run.given["beta2"]))
    rows = [run.value("variance_W", 0).ravel().tolist()]
    storage, decay = DTYPES[run.dtypes["W"]], run.given["weight_decay"]
    rate = float(np.float32(np.asarray(decay, np.float32).astype(storage)))
    for t in range(1, run.shape[0]):
        grads = run.value("grad_W", t).ravel().tolist()
        if decay and not run.options.decoupled:
            with np.errstate(all="ignore"):
                before = run.value("W", t - 1).ravel().tolist()
                sums = [fused32(rate, p, g) for p, g in zip(before, grads, strict=True)]
                grads = np.array(sums, np.float32).astype(storage).astype(np.float64).tolist()
        with np.errstate(all="ignore"):
            rows.append(
                [
                    fused32(product32(weight, g), g, product32(beta2, v))
                    for g, v in zip(grads, rows[-1], strict=True)
                ]
            )
    return np.array(rows).reshape(run.shape)


def exact_moments(run: Drawn, t: int) -> dict[str, np.ndarray]:
    """Compute both moments after step t from what is stored before it, in float64."""
    g, given = run.value("grad_W", t), run.given
    m, v = run.value("momentum_W", t - 1), run.value("variance_W", t - 1)
    if given["weight_decay"] and not run.options.decoupled:
        g = given["weight_decay"] * run.value("W", t - 1) + g
    weight = 1 - given["beta1"]
    change = g - m
    first = weight * change + m if weight < 0.5 else (weight - 1) * change + g
    return {"exp_avg": first, "exp_avg_sq": ((1 - given["beta2"]) * g) * g + v * given["beta2"]}


def quantiles_of(sizes: np.ndarray) -> list[float]:
    """Return the lower edges of the bins of the quantiles."""
    ordered = np.sort(sizes)
    if not ordered.size:
        return [math.nan] * len(QUANTILES)
    found = ordered[[math.ceil(q * ordered.size) - 1 for q in QUANTILES]]
    return EDGES[np.clip(np.searchsorted(EDGES, found, "right") - 1, 0, EDGES.size - 1)].tolist()


def slow(run: Drawn, groups: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute every variable of a timestep and group from its definition."""
    steps, kept = run.shape[0] - 1, run.dtypes["variance_W"]
    counts = (steps, len(groups))
    found: dict[str, np.ndarray] = {}

    def note(name: str, t: int, g: int, value: Any) -> None:
        shape = counts + np.shape(value)
        found.setdefault(name, np.zeros(shape, np.asarray(value).dtype))[t - 1, g] = value

    own = float32_moments(run)
    largest = [run.value("max_variance_W", 0)] if run.options.amsgrad else []
    streaks = {name: np.zeros(run.shape[1:], int) for name in MOMENTS}
    keys = {"exp_avg": "momentum_W", "exp_avg_sq": "variance_W"}
    for t in range(1, steps + 1):
        correction = math.sqrt(1 - run.given["beta2"] ** (t + run.given["first_step"] - 1))
        facts: dict[str, np.ndarray] = {}
        exact = exact_moments(run, t)
        for name in MOMENTS:
            old, new = run.value(keys[name], t - 1), run.value(keys[name], t)
            size = np.abs if name == "exp_avg" else np.asarray
            fall = size(exact[name]) < size(old)
            stuck = fall & (size(new) >= size(old))
            streaks[name] = np.where(stuck, streaks[name] + 1, 0)
            facts[f"{name}_fall_count"], facts[f"{name}_stuck_count"] = fall, stuck
            facts[f"{name}_underflow_count"] = (new == 0) & (exact[name] != 0)
            if kept == "F32":
                low = run.patterns[keys[name]][t] % 65536 == 0
                facts[f"{name}_low_bits_zero_count"] = low
        v, v32 = run.value("variance_W", t), own[t]
        second, second32 = v, v32
        if run.options.amsgrad:
            second = run.value("max_variance_W", t)
            old, new = largest[-1], v32
            largest.append(np.where(np.isnan(old) | np.isnan(new), np.nan, np.maximum(old, new)))
            second32 = largest[-1]
        epsilon = run.given["epsilon"]
        facts["epsilon_dominates_count"] = np.sqrt(second) / correction < epsilon
        both = (v > 0) & (v32 > 0) & np.isfinite(v) & np.isfinite(v32)
        facts["root_ratio_count"] = both
        usable = both & (second > 0) & (second32 > 0) & np.isfinite(second) & np.isfinite(second32)
        sizes = (np.sqrt(second32) / correction + epsilon) / (
            np.sqrt(second) / correction + epsilon
        )
        for g, tokens in enumerate(groups.values()):
            for fact, where in facts.items():
                note(fact, t, g, int(np.count_nonzero(where[tokens])))
            for name in MOMENTS:
                streak = streaks[name][tokens]
                note(f"{name}_stuck_steps_max", t, g, int(streak.max()))
                mean = streak.sum() / (streak > 0).sum() if streak.any() else math.nan
                note(f"{name}_stuck_steps_mean", t, g, float(mean))
            ratios = (v / v32)[tokens][both[tokens]]
            note("root_ratio_quantile", t, g, np.sqrt(quantiles_of(ratios)))
            note("step_size_ratio_quantile", t, g, quantiles_of(sizes[tokens][usable[tokens]]))
    if kept != "F32":
        for name in MOMENTS:
            found[f"{name}_low_bits_zero_count"] = np.full(counts, -1)
    return found


def ledger(path: Path, run: Drawn | None = None, **how: Any) -> xr.Dataset:
    """Return the dataset of a recording."""
    made: list[Moments] = []

    def observers(subject: Subject) -> list[Any]:
        assert Moments.possible(subject)
        made.append(Moments(subject))
        return [made[0].take]

    if run:
        how |= {"options": run.options}
    observe(path, observers, **how)
    return made[0].dataset()


def grouped(tokens: int) -> TokenGroups:
    """Return groups that overlap, one of which has the last token only."""
    members = {"all": np.arange(tokens), "even": np.arange(0, tokens, 2)}
    members |= {"few": np.arange(tokens)[: max(1, tokens // 3)], "last": np.array([tokens - 1])}
    return TokenGroups(tokens, members)


L2 = Options(decoupled=False)

# Runs of 96 elements in windows of three steps have their programs in common.
RUNS = {
    "bfloat16": lambda: drawn(shape=(5, 96, 1), epsilon=3e-4),
    "float16": lambda: drawn("F16", shape=(5, 96, 1), seed=1, scale=0.5, beta2=0.5, epsilon=0.0),
    "float32, tiny": lambda: drawn("F32", shape=(5, 96, 1), seed=2, scale=1e-21, epsilon=1e-20),
    "amsgrad, wide rows, later": lambda: drawn(
        "BF16",
        "F32",
        (4, 3, 300),
        narrow="BF16",
        seed=3,
        options=Options(amsgrad=True),
        weight_decay=0.1,
        first_step=300,
    ),
    "L2, from the other end": lambda: drawn(
        seed=4, shape=(4, 8, 20), options=L2, weight_decay=0.1, beta1=0.3, specials=False
    ),
}


def check_traces(dataset: xr.Dataset, run: Drawn, groups: TokenGroups) -> None:
    chosen: dict[int, str] = {}
    for name in ("even", "few", "last"):
        members = groups.members[name].tolist()
        for place in (0.25, 0.5, 0.75):
            chosen.setdefault(members[math.floor(len(members) * place)], name)
    assert dict(zip(dataset.traced_token.values.tolist(), dataset.traced_group.values.tolist(), strict=True)) == chosen  # fmt: skip
    own = float32_moments(run)
    for k, token in enumerate(chosen):
        for t in range(1, run.shape[0]):
            for name, values in (("stored", run.value("variance_W", t)), ("float32", own[t])):
                mean = values[token].sum() / values[token].size
                root = math.sqrt(mean) if mean >= 0 else math.nan
                found = float(dataset[f"{name}_root"].values[t - 1, k])
                assert found == pytest.approx(root, rel=1e-14, nan_ok=True)


@pytest.mark.parametrize("name", RUNS)
def test_every_number_is_that_of_its_definition(name: str, tmp_path: Path):
    run = RUNS[name]()
    groups = grouped(run.shape[1])
    dataset = ledger(run.write(tmp_path / "run.safetensors"), run, groups=groups, window_steps=3)
    with np.errstate(all="ignore"):
        expected = slow(run, dict(groups.members))
    for variable, values in expected.items():
        np.testing.assert_array_equal(dataset[variable].values, values, variable)
    told = {n for n, v in dataset.variables.items() if v.dims[:2] == ("timestep", "token_group")}
    assert told == {*expected}
    check_traces(dataset, run, groups)
    assert dataset.exp_avg_sq_stuck_count.values.any() and dataset.root_ratio_count.values.any()


def test_no_number_depends_on_windows_or_ranges_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = drawn(shape=(3, 96, 1), seed=20)
    path, groups = run.write(tmp_path / "run.safetensors"), grouped(96)
    found = [ledger(path, run, groups=groups, window_steps=k) for k in (None, 2, 1)]
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 40)  # 32 rows at a time
    found.append(ledger(path, run, groups=groups))
    for other in found[1:]:
        xr.testing.assert_identical(found[0], other)


def test_ranges_start_from_what_was_recorded_before_them(tmp_path: Path):
    whole = drawn(shape=(6, 96, 1), seed=21)
    cut = {name: array[2:] for name, array in whole.patterns.items()}
    rest = dataclasses.replace(whole, patterns=cut, given=whole.given | {"first_step": 3})
    found = ledger(whole.write(tmp_path / "whole.safetensors"), whole, steps=(3, 7), window_steps=3)
    alone = ledger(rest.write(tmp_path / "rest.safetensors"), rest, window_steps=3)
    assert found.timestep.values.tolist() == [3, 4, 5, 6]
    xr.testing.assert_identical(found, alone.assign_coords(timestep=found.timestep))


def test_ratios_far_from_one_another_are_counted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ratios beyond what is counted in pairs, in every window, below and above."""
    monkeypatch.setattr(counting, "_AT_ONCE", 1)  # each step by itself
    run = drawn(shape=(4, 96, 1), seed=22, specials=False)
    run.patterns["variance_W"][1:] = patterns_of(
        np.exp2(np.random.default_rng(0).integers(-100, 90, (4, 96, 1)) / 1.5), "BF16"
    )
    groups = grouped(96)
    dataset = ledger(run.write(tmp_path / "run.safetensors"), run, groups=groups, window_steps=3)
    expected = slow(run, dict(groups.members))
    for variable in ("root_ratio_count", "root_ratio_quantile", "step_size_ratio_quantile"):
        np.testing.assert_array_equal(dataset[variable].values, expected[variable])
    spread = dataset.root_ratio_quantile.values[:, 0]
    assert (spread[:, -1] > 2.0**20 * spread[:, 0]).all()


def taken(fmt: Any, steps: int, size: int = 96, **given: Any) -> Any:
    """Return a run of torch's loop whose gradients fade."""
    made = setting(fmt, size=size, steps=steps, beta2=0.999, rate=1e-3, **given)
    fading = np.exp2(-np.arange(steps) / 4)[:, None].astype(np.float32)
    values = made.values | {"grad": made.values["grad"] * fading}
    return torch_runs.take(dataclasses.replace(made, values=values), "loop")


def test_the_second_moment_of_a_bfloat16_run_never_falls(tmp_path: Path):
    """Half an ulp is at least 2^-9 of a bfloat16 number, and 0.999 takes less off."""
    run = taken(BFLOAT16, 24)
    dataset = ledger(save(tmp_path / "run.safetensors", run), window_steps=3)
    second = values_of(run.patterns["exp_avg_sq"], "BF16")
    assert (second[1:] >= second[:-1]).all()
    fall, stuck = dataset.exp_avg_sq_fall_count.values, dataset.exp_avg_sq_stuck_count.values
    np.testing.assert_array_equal(fall, stuck)
    assert fall[0, 0] == 0 and fall[-1, 0] > 90
    longest = dataset.exp_avg_sq_stuck_steps_max.values[:, 0]
    assert longest[0] == 0 and longest[-1] > 10
    # The first moment loses a tenth at least, and stays only where the gradient brings that back.
    assert dataset.exp_avg_stuck_count.sum() < 0.02 * dataset.exp_avg_fall_count.sum()
    # Without a fall the stored root only grows beyond that of float32.
    medians = dataset.root_ratio_quantile.sel(quantile=0.5).values[:, 0]
    assert medians[-1] >= 1 and dataset.float32_root.values[-1, 0] < dataset.stored_root[-1, 0]
    assert dataset.attrs == dict.fromkeys(
        ("exp_avg_precision", "exp_avg_sq_precision"), "bfloat16 as stored"
    )


def test_a_float32_run_keeps_its_own_second_moment(tmp_path: Path):
    run = taken(FLOAT32, 6)
    dataset = ledger(save(tmp_path / "run.safetensors", run), window_steps=3)
    assert (dataset.root_ratio_quantile.values == 1).all()
    assert (dataset.step_size_ratio_quantile.values == 1).all()
    np.testing.assert_array_equal(dataset.exp_avg_sq_stuck_count.values, 0)
    np.testing.assert_array_equal(dataset.stored_root.values, dataset.float32_root.values)
    assert dataset.attrs["exp_avg_sq_precision"] == "float32"


def test_a_float16_run_loses_its_second_moment_to_underflow(tmp_path: Path):
    run = taken(FLOAT16, 12)
    dataset = ledger(save(tmp_path / "run.safetensors", run), window_steps=3)
    second = values_of(run.patterns["exp_avg_sq"], "F16")
    zeros = (second[1:] == 0).sum(axis=1)
    np.testing.assert_array_equal(dataset.exp_avg_sq_underflow_count.values[:, 0], zeros)
    assert zeros[0] > 40
    assert (dataset.exp_avg_sq_low_bits_zero_count.values == -1).all()


def test_moments_that_nobody_recorded_are_run_freely(tmp_path: Path):
    run = taken(BFLOAT16, 7)
    drop = ("momentum_W", "variance_W")
    whole = ledger(save(tmp_path / "whole.safetensors", run), window_steps=3)
    bare = save(tmp_path / "bare.safetensors", run, drop=drop)
    found = ledger(bare, window_steps=3)
    assert found.attrs == dict.fromkeys(
        ("exp_avg_precision", "exp_avg_sq_precision"), "not recorded"
    )
    xr.testing.assert_equal(whole, found)


def test_without_gradients_nothing_is_possible(tmp_path: Path):
    run = taken(BFLOAT16, 3)
    answers = []
    for drop in (("grad_W",), ()):
        path = save(tmp_path / f"{len(drop)}.safetensors", run, drop=drop)
        observe(path, lambda subject: [lambda _, s=subject: answers.append(Moments.possible(s))])
    assert answers == [False, True]


def test_precision_is_told_from_the_bits(tmp_path: Path):
    """One value with a low bit more, anywhere, makes them float32."""
    words = {"BF16": "bfloat16-valued (stored as float32)"}
    words["F16"] = "float16-valued (stored as float32)"
    usual = {"BF16": [1.0, -0.0, np.nan, np.inf], "F16": [65504.0, 2.0**-24, -(2.0**-14), np.inf]}
    beyond = {"BF16": [1 + 2.0**-8], "F16": [65536.0, 1 + 2.0**-11, 3 * 2.0**-25]}
    for storage in ("BF16", "F16"):
        for planted in (None, *beyond[storage]):
            run = drawn(storage, "F32", (3, 8, 20), narrow=storage, specials=False)
            values = np.resize(usual[storage], (3, 8, 20))
            run.patterns["momentum_W"][1:] = patterns_of(values, "F32")
            run.patterns["variance_W"][1:] = run.patterns["variance_W"][:1]
            if planted is not None:
                run.patterns["momentum_W"][2, 3, 1] = patterns_of(planted, "F32")
            dataset = ledger(run.write(tmp_path / "run.safetensors"), run)
            expected = words[storage] if planted is None else "float32"
            assert dataset.attrs["exp_avg_precision"] == expected
            assert dataset.attrs["exp_avg_sq_precision"] == words[storage]


def test_float16_values_are_told_from_all_others():
    """All float16 values, their float32 neighbours, and the midpoints between them."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    tried = np.concatenate([every ^ np.uint32(bit) for bit in (0, 1, 0x1000, 0x2000)])
    with np.errstate(all="ignore"):
        values = tried.view(np.float32)
        same = values.astype(np.float16).astype(np.float32) == values
    same |= np.isnan(values)
    np.testing.assert_array_equal(moments._float16_valued(tried), same)


def test_at_most_twelve_tokens_are_followed():
    many = {"all": np.arange(90)} | {f"g{k}": np.arange(10 * k, 10 * k + 10) for k in range(9)}
    chosen = chosen_tokens(TokenGroups(90, many))
    assert list(chosen) == [2, 5, 7, 12, 15, 17, 22, 25, 27, 32, 35, 37]
    assert list(chosen.values()) == [f"g{k}" for k in range(4) for _ in range(3)]
    assert chosen_tokens(TokenGroups(1, {"all": np.arange(1)})) == {0: "all"}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_float32_moment_is_one_under_every_arithmetic(name: str):
    """It stays within a few float32 roundings of the formula in float64, where 16 bits would be off by far more."""
    steps = 40
    for arithmetic in VARIANTS[name]:
        for storage in arithmetic.storages:
            made = setting(storage, size=50, steps=steps, beta2=0.999)
            given = made.hyperparameters
            candidate = with_float32_moments(Candidate(arithmetic, Options(), given))
            step = make_step(candidate.arithmetic, storage, given, candidate.options)
            scalars = scalars_of(step, candidate.arithmetic.rule, given, range(1, steps + 1))
            ops, own, exact = numpy_operations(flushes=step.flushes), np.zeros(50, np.float32), 0.0
            for k, grad in enumerate(made.values["grad"]):
                x = {"grad": grad, "exp_avg_sq": own, "tail": np.zeros(50, np.uint8)}
                own = step.replay("exp_avg_sq", ops, {n: s[k] for n, s in scalars.items()}, x)
                own = np.asarray(own, np.float32)
                exact = 0.999 * exact + 0.001 * grad.astype(np.float64) ** 2
            if name == "optimi-kahan":  # its betas are without bias
                exact /= 1 - 0.999**steps
            np.testing.assert_allclose(own, exact, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "amsgrad", "corrects"),
    [
        ("torch-cpu-loop", False, True),
        ("torch-capturable", True, True),
        ("optax", False, True),
        ("optax", True, False),  # it keeps the largest corrected one
        ("optimi-kahan", False, False),  # betas without bias
        ("float32", False, True),
    ],
)
def test_eps_meets_the_root_as_each_arithmetic_divides_it(
    name: str, amsgrad: bool, corrects: bool, tmp_path: Path
):
    options = Options(amsgrad=amsgrad)
    run = drawn(shape=(5, 96, 1), options=options, epsilon=2e-3, first_step=7)
    path, limits = run.write(tmp_path / "run.safetensors"), []

    def look(subject: Subject) -> list[Any]:
        rule = moments.ExactRule(subject)
        return [lambda seen: limits.append(moments._limits(subject, rule, seen.window))]

    observe(path, look, arithmetic=name, options=options, window_steps=2)
    for t in range(1, 6):
        correction = math.sqrt(1 - 0.999 ** (t + 6)) if corrects else 1.0
        found, k = limits[(t - 1) // 2], (t - 1) % 2
        assert found.added[k] == 2e-3 * correction
        edge = np.array([found.threshold[k] - 1, found.threshold[k]], np.uint32)
        roots = np.sqrt(edge.view(np.float32).astype(np.float64))
        assert (roots / correction < 2e-3).tolist() == [True, False]
