"""The ledger of lost updates against slow computations from its definitions, one element at a time."""

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import xarray as xr
from ledgers import observe
from recordings import Tensor, write

import jaxaudit
from jaxaudit import strips, workbench
from jaxaudit.arithmetics import VARIANTS, Options, make_step
from jaxaudit.devices import find_device
from jaxaudit.floats import BFLOAT16
from jaxaudit.hyperparameters import Hyperparameters
from jaxaudit.ledger import updates
from jaxaudit.ledger.subject import Subject
from jaxaudit.ledger.updates import Updates
from jaxaudit.ledger.variables import UPDATES
from jaxaudit.operations import ExactOperations, compile_exactly, numpy_operations
from jaxaudit.recording import TokenGroups
from jaxaudit.scalars import scalars_of

DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
KEYS = {
    "W": "param",
    "grad_W": "grad",
    "momentum_W": "exp_avg",
    "variance_W": "exp_avg_sq",
    "max_variance_W": "max_exp_avg_sq",
    "compensation_W": "compensation",
}
#: What is counted of an element that was to change.
KINDS = ("wanted", "lost", "one_ulp", "more_ulp", "against")

#: Elements of most recordings here: a shape that programs are compiled for once.
TOKENS = 107

USUAL = {"rate": 1e-3, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}


def patterns_of(values: Any, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(DTYPES[dtype]).view(BITS[dtype])


def values_of(patterns: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return patterns.view(DTYPES[dtype]).astype(np.float64)


def drawn(steps: int, tokens: int, width: int, dtype: str, seed: int = 0) -> dict[str, Any]:
    """Draw a recording whose weights stay, move by an ulp, by a few, or anywhere; with all kinds of numbers."""
    rng, bits = np.random.default_rng(seed), BITS[dtype]
    shape = (steps + 1, tokens, width)
    info = ml_dtypes.finfo(DTYPES[dtype])
    sign, infinity = 1 << (info.bits - 1), int(patterns_of(np.inf, dtype))
    edges = np.arange(0, infinity, 1 << info.nmant)
    special = np.array(
        [0, sign, 1, sign | 3, edges[1], sign | edges[1], edges[1] - 1, infinity - 1]
    )
    weights = np.empty(shape, bits)
    usual = patterns_of(rng.normal(0, 0.02, shape[1:]), dtype)
    at_edge = rng.choice(edges, shape[1:]) | rng.choice([0, sign], shape[1:])
    kind = rng.random(shape[1:])
    weights[0] = np.select(
        [kind < 0.5, kind < 0.8], [usual, at_edge.astype(bits)], rng.choice(special, shape[1:])
    )
    for t in range(steps):
        moved = weights[t].astype(np.int64) + rng.choice([0, 0, 1, -1, 2, -5], shape[1:])
        moved = np.where((moved & (sign - 1)) < infinity, moved % (2 * sign), weights[t])
        flipped = np.where(weights[t] & (sign - 1), weights[t], weights[t] ^ sign)  # zeros only
        kind = rng.random(shape[1:])
        weights[t + 1] = np.select([kind < 0.9, kind < 0.95], [moved, flipped], usual)
    first = rng.normal(0, 1e-3, shape) * np.exp2(rng.integers(-20, 3, shape))
    first[rng.random(shape) < 0.2] = 0
    grad = np.where(rng.random(shape) < 0.3, 0, first * rng.choice([-1.0, 1, 7], shape))
    second = np.abs(rng.normal(0, 1e-3, shape) * np.exp2(rng.integers(-20, 3, shape))) ** 2
    found = {
        "W": weights,
        "grad_W": patterns_of(grad, dtype),
        "momentum_W": patterns_of(first, dtype),
        "variance_W": patterns_of(second, dtype),
        "max_variance_W": patterns_of(second * rng.choice([1, 4], shape), dtype),
    }
    for name, at in itertools.product(found, (infinity, sign | infinity, infinity + 1)):
        where = rng.random(shape) < 0.002
        found[name][where] = at
    return found


def record(path: Path, patterns: dict[str, Any], dtype: str, **given: Any) -> Path:
    """Write a recording whose hyperparameters are doubles; `rates` is one for each step."""
    given = USUAL | given
    steps = patterns["W"].shape[0] - 1
    rates = np.asarray(given.get("rates", np.full(steps, given["rate"])), np.float64)
    scalars = {
        "learning_rate": np.concatenate([rates[:1], rates]),
        "weight_decay": np.array(given["weight_decay"]),
        "adam_beta1": np.array(given["beta1"]),
        "adam_beta2": np.array(given["beta2"]),
        "adam_epsilon": np.array(given["epsilon"]),
    }
    kinds = {np.dtype(BITS[dtype]): dtype, np.dtype(np.uint32): "F32"}
    tensors: dict[str, Tensor] = {
        name: (kinds[array.dtype], np.ascontiguousarray(array)) for name, array in patterns.items()
    }
    tensors |= {name: ("F64", np.asarray(array, "<f8")) for name, array in scalars.items()}
    return write(path, tensors, {"first_step": str(given.get("first_step", 1))})


def ledger(path: Path, **how: Any) -> tuple[xr.Dataset, np.ndarray]:
    """Keep the ledger of a recording; its dataset, and what was lost, (steps, elements)."""
    made: list[Updates] = []
    lost: dict[tuple[int, int], np.ndarray] = {}

    def observers(subject: Subject) -> list[Any]:
        assert Updates.possible(subject)
        made.append(Updates(subject))

        def taken(seen: Any) -> None:
            found = np.asarray(made[0].take(seen))[: seen.window.steps]
            assert found.dtype == np.uint8
            width = subject.bench.recording.width
            for k, row in enumerate(found):
                own = row[seen.window.overlap * width :]
                lost[seen.window.first + k, seen.window.own[0]] = own

        return [taken]

    observe(path, observers, **how)
    order = sorted(lost)
    rows = [
        np.concatenate([lost[at] for at in order if at[0] == t])
        for t in sorted({t for t, _ in order})
    ]
    return made[0].dataset(), np.stack(rows)


def each_element(tokens: int) -> TokenGroups:
    """Make every token a group of its own, so that sums over a group are single numbers at width 1."""
    members = {"all": np.arange(tokens)} | {f"{k}": np.array([k]) for k in range(tokens)}
    return TokenGroups(tokens, members)


def some_groups(tokens: int) -> TokenGroups:
    """Return groups that overlap, one of the last tokens only, and integer labels."""
    rng, found = np.random.default_rng(5), {"all": np.arange(tokens)}
    found["dead"] = np.flatnonzero(rng.random(tokens) < 0.4)
    found["live"] = np.setdiff1d(found["all"], found["dead"])
    found["even"], found["last"] = np.arange(0, tokens, 2), np.array([tokens - 1])
    return TokenGroups(tokens, found)


def exact(patterns: dict[str, Any], dtype: str, options: Options, **given: Any) -> Any:
    """Compute exact updates in float64, in the order of operations of torch's loop and fused kernel.

    Returns:
        The update, and the part of weight decay: of it (decoupled), or of the gradient (L2).
    """
    given = USUAL | given
    v = {KEYS[name]: values_of(array, dtype) for name, array in patterns.items()}
    steps = v["param"].shape[0] - 1
    rates = np.asarray(given.get("rates", np.full(steps, given["rate"])), np.float64)
    beta1, beta2, decay = given["beta1"], given["beta2"], given["weight_decay"]
    wanted, part = [], []
    for k in range(steps):
        t, p, m, rate = k + given.get("first_step", 1), v["param"][k], v["exp_avg"][k], rates[k]
        with np.errstate(all="ignore"):
            g = -v["grad"][k + 1] if options.maximize else v["grad"][k + 1]
            if decay and not options.decoupled:
                g = decay * p + g
            if 1 - beta1 < 0.5:
                m = (1 - beta1) * (g - m) + m
            else:
                m = ((1 - beta1) - 1) * (g - m) + g
            second = ((1 - beta2) * g) * g + v["exp_avg_sq"][k] * beta2
            if options.amsgrad:
                second = np.maximum(v["max_exp_avg_sq"][k], second)
            divisor = np.sqrt(second) / (1 - beta2**t) ** 0.5 + given["epsilon"]
            update = (-(rate / (1 - beta1**t)) * m) / divisor
            own = -(rate * decay) * p if options.decoupled else decay * p
            update = np.where(np.isfinite(p), update, np.nan)  # part of a weight that is no number
            wanted.append(update + own if decay and options.decoupled else update)
            part.append(own if decay else np.zeros_like(p))
    return np.stack(wanted), np.stack(part)


def place(pattern: int, dtype: str) -> int:
    """Place a pattern on the ordered line."""
    bits = 8 * np.dtype(BITS[dtype]).itemsize
    magnitude = pattern & ((1 << (bits - 1)) - 1)
    return -magnitude if pattern >> (bits - 1) else magnitude


def value_at(place: int, dtype: str) -> float:
    bits = 8 * np.dtype(BITS[dtype]).itemsize
    pattern = -place | (1 << (bits - 1)) if place < 0 else place
    return float(values_of(np.array([pattern], BITS[dtype]), dtype)[0])


def margin_of(wanted: float, before: int, dtype: str) -> Fraction:
    """Divide the size of an update by half the gap to the weight's neighbour in its direction, exactly."""
    here = place(before, dtype)
    beyond = value_at(here + (1 if wanted > 0 else -1), dtype)
    if math.isinf(beyond):  # the largest number: its own ulp
        beyond = value_at(here + (-1 if wanted > 0 else 1), dtype)
    gap = abs(Fraction(beyond) - Fraction(value_at(here, dtype)))
    return abs(Fraction(wanted)) * 2 / gap


def bin_of(ratio: Fraction) -> int:
    """Number the thirty-second of a binade that a ratio lies in, from 2^-32."""
    k = math.floor(math.log2(ratio)) + 2  # may be one off at an edge
    while Fraction(2) ** k > ratio:
        k -= 1
    part = math.floor((ratio / Fraction(2) ** k - 1) * 32)
    return min(max(32 * (k + 32) + part, 0), 2047)


def fate(before: int, after: int, rises: bool, dtype: str) -> list[str]:
    """Name what is counted of a number that was to rise, or to fall."""
    distance = place(after, dtype) - place(before, dtype)
    if distance == 0:
        return ["lost"]
    found = ["one_ulp" if abs(distance) == 1 else "more_ulp"]
    return found + (["against"] if (distance > 0) != rises else [])


def expected_of(
    patterns: dict[str, Any], dtype: str, wanted: np.ndarray, groups: TokenGroups
) -> dict[str, np.ndarray]:
    """Count and sum one element after the other."""
    weights, steps = patterns["W"], wanted.shape[0]
    shape, width = (steps, len(groups.members)), wanted.shape[2]
    counts = ("wanted", "lost", "one_ulp", "more_ulp", "against", "unwanted", "undefined")
    found: dict[str, Any] = {f"{name}_count": np.zeros(shape, np.int64) for name in counts}
    found["margin_histogram"] = np.zeros((*shape, 64), np.int64)
    found["margin_quantile"] = np.full((*shape, 5), np.nan)
    values = values_of(weights, dtype)
    sums: dict[str, np.ndarray] = {}
    for t, (g, members) in itertools.product(range(steps), enumerate(groups.members.values())):
        kept, bins = [], []
        for token, k in itertools.product(members, range(width)):
            w, before, after = (
                float(wanted[t, token, k]),
                int(weights[t, token, k]),
                int(weights[t + 1, token, k]),
            )
            old, new = float(values[t, token, k]), float(values[t + 1, token, k])
            if not (math.isfinite(w) and math.isfinite(old) and math.isfinite(new)):
                found["undefined_count"][t, g] += 1
                continue
            kept.append((w, new - old))
            if w == 0:
                found["unwanted_count"][t, g] += place(before, dtype) != place(after, dtype)
                continue
            for name in ("wanted", *fate(before, after, w > 0, dtype)):
                found[f"{name}_count"][t, g] += 1
            bins.append(bin_of(margin_of(w, before, dtype)))
            found["margin_histogram"][t, g, bins[-1] // 32] += 1
        if bins:
            # The bins' edges, as numbers: 2^whole * (1 + part/32).
            ranks = [
                sorted(bins)[max(math.ceil(q * len(bins)), 1) - 1]
                for q in (0.05, 0.25, 0.5, 0.75, 0.95)
            ]
            found["margin_quantile"][t, g] = [
                np.log2(1 + b % 32 / 32) + b // 32 - 32 for b in ranks
            ]
        ws, rs = [w for w, _ in kept], [r for _, r in kept]
        totals = {
            "wanted_sum": math.fsum(ws),
            "realised_sum": math.fsum(rs),
            "wanted_absolute_sum": math.fsum(map(abs, ws)),
            "realised_absolute_sum": math.fsum(map(abs, rs)),
            "wanted_square": math.fsum(w * w for w in ws),
            "realised_square": math.fsum(r * r for r in rs),
            "inner_product": math.fsum(w * r for w, r in kept),
            "size_of_products": math.fsum(abs(w * r) for w, r in kept),
            "defined": len(kept),
        }
        for name, total in totals.items():
            sums.setdefault(name, np.zeros(shape))[t, g] = total
    return found | sums


def assert_counts(ds: xr.Dataset, expected: dict[str, np.ndarray]) -> None:
    for name in (n for n in expected if n.endswith("_count") or n.startswith("margin")):
        np.testing.assert_allclose(
            ds[name].values,
            expected[name],
            rtol=0,
            atol=1e-12 * (name == "margin_quantile"),
            err_msg=name,
        )
    total = ds.lost_count + ds.one_ulp_count + ds.more_ulp_count
    np.testing.assert_array_equal(total, ds.wanted_count)
    np.testing.assert_array_equal(ds.margin_histogram.sum("margin"), ds.wanted_count)


def assert_sums(ds: xr.Dataset, x: dict[str, np.ndarray], elements: int) -> None:
    """Compare sums; each of n terms is off by less than n roundings of the sum of sizes."""
    off = elements * 2.0**-53
    for name, size in (
        ("wanted_sum", "wanted_absolute_sum"),
        ("realised_sum", "realised_absolute_sum"),
        ("wanted_absolute_sum", "wanted_absolute_sum"),
        ("realised_absolute_sum", "realised_absolute_sum"),
        ("inner_product", "size_of_products"),
    ):
        assert np.all(np.abs(ds[name].values - x[name]) <= off * x[size]), name
    for name in ("wanted", "realised"):
        np.testing.assert_allclose(ds[f"{name}_norm"], np.sqrt(x[f"{name}_square"]), rtol=off)
    with np.errstate(all="ignore"):
        size = np.abs(x["inner_product"])
        share = np.where(x["wanted_square"] > 0, x["inner_product"] / x["wanted_square"], np.nan)
        slack = np.where(size > 0, x["size_of_products"] / size, 1)
    found = ds.descent_quality.values
    np.testing.assert_array_equal(np.isnan(found), np.isnan(share))
    assert np.all(np.isnan(found) | (np.abs(found - share) <= 4 * off * np.abs(share) * slack))
    with np.errstate(all="ignore"):
        bias = (x["realised_sum"] - x["wanted_sum"]) / x["defined"]
        sizes = (x["realised_absolute_sum"] + x["wanted_absolute_sum"]) / x["defined"]
    np.testing.assert_array_equal(np.isnan(ds.signed_bias), x["defined"] == 0)
    assert np.all(np.isnan(bias) | (np.abs(ds.signed_bias.values - bias) <= 2 * off * sizes))


CASES = {
    "bfloat16": ("BF16", 1, {}, Options()),
    "bfloat16, AdamW, amsgrad": ("BF16", 3, {"weight_decay": 0.1}, Options(amsgrad=True)),
    "bfloat16, L2, maximize": ("BF16", 5, {"weight_decay": 0.1}, Options(decoupled=False, maximize=True)),
    "float16": ("F16", 2, {"weight_decay": 3.0, "epsilon": 1e-4}, Options()),
    "float32": ("F32", 19, {"beta1": 0.3, "first_step": 7}, Options()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_every_number_equals_a_slow_one(tmp_path, case):
    dtype, width, given, options = CASES[case]
    steps, tokens = 2, max(6, 150 // width)
    patterns, groups = drawn(steps, tokens, width, dtype), some_groups(tokens)
    path = record(tmp_path / "run.safetensors", patterns, dtype, **given)
    ds, lost = ledger(path, options=options, groups=groups)
    wanted, _ = exact(patterns, dtype, options, **given)
    expected = expected_of(patterns, dtype, wanted, groups)
    for name in (*KINDS, *(["undefined"] if given else ["unwanted", "undefined"])):
        assert expected[f"{name}_count"].sum() > 0, f"the recording has none of {name}"
    assert_counts(ds, expected)
    assert_sums(ds, expected, tokens * width)
    single = expected_of(patterns, dtype, wanted, TokenGroups(tokens, {"all": np.arange(tokens)}))
    np.testing.assert_array_equal(lost.sum(axis=1), single["lost_count"][:, 0])
    assert ds.attrs["arithmetic"] == "torch-cpu-loop"


@pytest.mark.parametrize(
    ("arithmetic", "options", "given"),
    [
        ("torch-cpu-loop", Options(), {}),
        ("torch-cpu-loop", Options(), {"weight_decay": 0.1}),
        ("torch-cpu-fused", Options(decoupled=False), {"weight_decay": 0.1, "rate": 0.37}),
        ("torch-cpu-fused", Options(amsgrad=True), {"beta1": 0.4}),
        (
            "torch-cpu-loop",
            Options(maximize=True, decoupled=False),
            {"weight_decay": 3.0, "first_step": 12},
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_the_exact_update_is_numpys_float64_bit_for_bit(tmp_path, arithmetic, options, given):
    tokens = TOKENS
    patterns = drawn(2, tokens, 1, "BF16", seed=3)
    path = record(tmp_path / "run.safetensors", patterns, "BF16", **given)
    ds, lost = ledger(path, arithmetic=arithmetic, options=options, groups=each_element(tokens))
    wanted = exact(patterns, "BF16", options, **given)[0][..., 0]
    weights = values_of(patterns["W"], "BF16")[..., 0]
    with np.errstate(invalid="ignore"):
        realised = weights[1:] - weights[:-1]
    defined = np.isfinite(wanted) & np.isfinite(realised)
    assert 0.5 < defined.mean() < 1
    np.testing.assert_array_equal(ds.undefined_count[:, 1:], ~defined)
    np.testing.assert_array_equal(ds.wanted_sum[:, 1:], np.where(defined, wanted, 0))
    np.testing.assert_array_equal(ds.realised_sum[:, 1:], np.where(defined, realised, 0))
    np.testing.assert_array_equal(lost, defined & (wanted != 0) & (realised == 0))


#: Arithmetics that are compared more closely than with the textbook; masters have a test of their own.
BIT_FOR_BIT = ("torch-cpu-loop", "torch-cpu-foreach", "torch-cpu-fused", "float32-master")


def textbook(v: dict[str, np.ndarray], t: int, options: Options, **given: Any) -> np.ndarray:
    """Kingma and Ba's update in 80-bit numbers, with decoupled or L2 decay."""
    x = {name: np.asarray(value, np.longdouble) for name, value in v.items()}
    given = {name: np.longdouble(value) for name, value in given.items()}
    beta1, beta2, rate = given["beta1"], given["beta2"], given["rate"]
    g = x["grad"] + (0 if options.decoupled else given["weight_decay"] * x["param"])
    first = beta1 * x["exp_avg"] + (1 - beta1) * g
    second = beta2 * x["exp_avg_sq"] + (1 - beta2) * g * g
    first, second = first / (1 - beta1**t), second / (1 - beta2**t)
    found = -rate * first / (np.sqrt(second) + given["epsilon"])
    return found - (rate * given["weight_decay"] * x["param"] if options.decoupled else 0)


def optimi(v: dict[str, np.ndarray], t: int, options: Options, **given: Any) -> np.ndarray:
    """Warner's debiased betas instead of corrections."""
    x = {name: np.asarray(value, np.longdouble) for name, value in v.items()}
    given = {name: np.longdouble(value) for name, value in given.items()}
    beta1, beta2 = ((b**t - b) / (b**t - 1) for b in (given["beta1"], given["beta2"]))
    g = x["grad"] + (0 if options.decoupled else given["weight_decay"] * x["param"])
    first = beta1 * x["exp_avg"] + (1 - beta1) * g
    second = beta2 * x["exp_avg_sq"] + (1 - beta2) * g * g
    found = -given["rate"] * first / (np.sqrt(second) + given["epsilon"])
    return found - (given["rate"] * given["weight_decay"] * x["param"] if options.decoupled else 0)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in BIT_FOR_BIT])
def test_exact_updates_are_the_textbooks(tmp_path, name):
    """No two terms here cancel, so that each of some 40 roundings is 2^-53 of the result at most.

    But for 1 - beta2^t and (legacy kernels) g*g - beta2*g*g, which enlarge an error by 1/(1 - beta2) = 1000:
    together less than 1e-12.
    """
    rng, tokens, dtype = np.random.default_rng(1), TOKENS, "BF16"
    shape = (3, tokens, 1)
    patterns = {
        "W": patterns_of(rng.uniform(0.01, 0.1, shape), dtype),
        "grad_W": patterns_of(rng.uniform(1e-4, 1e-2, shape), dtype),
        "momentum_W": patterns_of(rng.uniform(1e-4, 1e-2, shape), dtype),
        "variance_W": patterns_of(rng.uniform(1e-3, 1e-2, shape) ** 2, dtype),
    }
    variants = VARIANTS[name]
    for k in sorted({0, len(variants) - 1}):
        arithmetic = variants[k]
        if BFLOAT16 not in arithmetic.storages:
            continue
        recorded = dict(patterns)
        if arithmetic.compensation:
            recorded["compensation_W"] = patterns_of(-rng.uniform(1e-6, 1e-5, shape), dtype)
        options = Options(
            decoupled=name not in ("torch-cuda-loop", "torch-cuda-fused-legacy", "torchao")
        )
        given = USUAL | {"weight_decay": 0.0 if k else 0.1}
        path = record(tmp_path / f"{k}.safetensors", recorded, dtype, **given)
        ds, _ = ledger(
            path, arithmetic=name, variant=k, options=options, groups=each_element(tokens)
        )
        v = {KEYS[key]: values_of(array, dtype)[..., 0] for key, array in recorded.items()}
        truth = optimi if name.startswith("optimi") else textbook
        for t in range(2):
            at = {key: value[t + (key == "grad")] for key, value in v.items()}
            want = truth(at, t + 1, options, **given) + at.get("compensation", 0)
            off = np.abs(ds.wanted_sum.values[t, 1:] / want - 1)
            assert off.max() < 1e-12, (k, t, off.max())


def test_exact_ties_and_edges(tmp_path):
    """With betas and eps of 0 the exact update is minus the sign of the gradient times the learning rate."""
    up, down = -1.0, 1.0  # gradients
    smallest, largest = 2.0**-133, 255 * 2.0**120
    cases = [  # weight, gradient, learning rate, log2 of the margin
        (1.0, up, 2.0**-8, 0),
        (1.0, down, 2.0**-9, 0),
        (1.0, down, 2.0**-8, 1),
        (-1.0, up, 2.0**-9, 0),
        (-1.0, down, 2.0**-9, -1),
        (1.0078125, down, 2.0**-8, 0),
        (2.0**-126, down, 2.0**-134, 0),
        (2.0**-126, up, 2.0**-134, 0),
        (2.0**-125, down, 2.0**-134, 0),
        (2.0**-125, up, 2.0**-134, -1),
        (-(2.0**-126), up, 2.0**-133, 1),
        (0.0, up, 2.0**-134, 0),
        (-0.0, up, 2.0**-134, 0),
        (-0.0, down, 2.0**-136, -2),
        (smallest, down, smallest, 1),
        (smallest, up, smallest, 1),
        (largest, up, 2.0**119, 0),
        (largest, down, 2.0**120, 1),
        (-largest, down, 2.0**118, -1),
        (2.0**127, down, 2.0**118, 0),
        (1.0, up, 2.0**-120, -32),
        (0.0, up, 2.0**100, 31),
    ]
    rates = sorted({rate for _, _, rate, _ in cases})
    steps, tokens = len(rates), len(cases)
    shape = (steps + 1, tokens, 1)
    weights = np.broadcast_to(np.array([w for w, *_ in cases])[:, None], shape)
    grads = np.broadcast_to(np.array([g for _, g, *_ in cases])[:, None], shape)
    patterns = {name: patterns_of(np.zeros(shape), "BF16") for name in ("momentum_W", "variance_W")}
    patterns |= {"W": patterns_of(weights, "BF16"), "grad_W": patterns_of(grads, "BF16")}
    given = {"beta1": 0.0, "beta2": 0.0, "epsilon": 0.0, "rates": rates}
    path = record(tmp_path / "run.safetensors", patterns, "BF16", **given)
    ds, lost = ledger(path, groups=each_element(tokens))
    assert lost.all()
    for k, (weight, grad, rate, margin) in enumerate(cases):
        one = ds.sel(token_group=str(k)).isel(timestep=rates.index(rate))
        assert one.wanted_sum == -grad * rate
        histogram = one.margin_histogram
        assert histogram.sel(margin=margin) == 1 and histogram.sum() == 1, (weight, grad, rate)
        if -32 < margin < 31:
            np.testing.assert_array_equal(one.margin_quantile, np.full(5, float(margin)))


def test_decay_that_cancels_the_update(tmp_path):
    """Minus lr times the gradient's sign plus lr for a weight of -1 is nothing at all."""
    weights = np.array(
        [[-1.0, -1.0, -1.0, -1.0, -2.0], [-1.0, -0.99609375, -1.0, -1.0078125, -2.0]]
    )
    grads = np.array([[0.0] * 5, [1.0, 1.0, -1.0, 1.0, 1.0]])
    patterns = {name: patterns_of(np.zeros((2, 5, 1)), "BF16") for name in ("momentum_W", "variance_W")}  # fmt: skip
    patterns |= {"W": patterns_of(weights[..., None], "BF16")}
    patterns |= {"grad_W": patterns_of(grads[..., None], "BF16")}
    rate = 2.0**-10
    given = {"beta1": 0.0, "beta2": 0.0, "epsilon": 0.0, "weight_decay": 1.0, "rate": rate}
    path = record(tmp_path / "run.safetensors", patterns, "BF16", **given)
    ds, lost = ledger(path, groups=each_element(5))
    row = ds.isel(timestep=0, token_group=slice(1, None))
    np.testing.assert_array_equal(row.wanted_sum, [0, 0, 2 * rate, 0, rate])
    np.testing.assert_array_equal(row.wanted_count, [0, 0, 1, 0, 1])
    np.testing.assert_array_equal(row.unwanted_count, [0, 1, 0, 1, 0])
    np.testing.assert_array_equal(lost, [[0, 0, 1, 0, 1]])
    np.testing.assert_array_equal(row.decay_wanted_count, np.ones(5))
    np.testing.assert_array_equal(row.decay_lost_count, np.ones(5))  # 1 - 2^-10 rounds back
    assert np.isnan(row.descent_quality[0]) and np.isnan(row.margin_quantile[0]).all()
    assert row.descent_quality[2] == 0


def rounded(value: Fraction, significand: int, least: int) -> Fraction:
    """Round to nearest, ties to even; numbers have `significand` bits, the smallest normal one is 2^least."""
    if value == 0:
        return value
    k = math.frexp(float(abs(value)))[1] - 1
    while abs(value) < Fraction(2) ** k:
        k -= 1
    while abs(value) >= Fraction(2) ** (k + 1):
        k += 1
    quantum = Fraction(2) ** (max(k, least) - significand + 1)
    return round(value / quantum) * quantum


def single(value: Fraction) -> Fraction:
    return rounded(value, 24, -126)


def bfloat(value: Fraction) -> Fraction:
    return rounded(value, 8, -126)


def decayed(name: str, p: Fraction, rate: float, decay: float) -> Fraction:
    """Decay a bfloat16 weight as an implementation does, rounded in float32 and to bfloat16 where that rounds."""
    both = Fraction(rate * decay)
    if name == "torch-cpu-loop":
        return bfloat(single(p * single(Fraction(1 - rate * decay))))
    if name == "torch-cpu-foreach":
        return bfloat(single(p * bfloat(single(Fraction(1 - rate * decay)))))
    if name == "torch-cuda-fused":  # -(lr * weight_decay) of two float32 numbers, then fma
        both = single(single(Fraction(rate)) * single(Fraction(decay)))
        return bfloat(single(p - both * p))
    if name == "torch-cuda-fused-legacy":  # in double, then float32
        exact = rounded(p - both * p, 53, -1022)
        return bfloat(single(exact))
    if name in ("torchao", "stochastic-rounding"):
        both = single(single(Fraction(rate)) * single(Fraction(decay)))
        return bfloat(single(p - single(both * p)))
    assert name == "optax"
    part = bfloat(single(bfloat(single(Fraction(decay))) * p))
    scaled = bfloat(single(bfloat(single(Fraction(-rate))) * part))
    return bfloat(single(p + scaled))


@pytest.mark.parametrize(
    "name",
    ["torch-cpu-loop", "torch-cpu-foreach", "torch-cuda-fused", "torch-cuda-fused-legacy", "torchao", "stochastic-rounding", "optax"],
)  # fmt: skip
@pytest.mark.parametrize(("rate", "decay"), [(1e-2, 0.3), (0.5, 3.0)])
def test_decoupled_decay_alone(tmp_path, name, rate, decay):
    rng, tokens = np.random.default_rng(7), TOKENS
    weights = rng.normal(0, 1, (3, tokens, 1))
    weights[:, :16] = [[[2.0**k], [-(2.0**k)]][k % 2] for k in range(-8, 8)]
    weights[0, 16:20, 0] = [0.0, -0.0, np.inf, np.nan]
    patterns = {"W": patterns_of(weights, "BF16")}
    for key in ("grad_W", "momentum_W", "variance_W"):
        patterns[key] = patterns_of(np.abs(rng.normal(0, 1e-3, weights.shape)), "BF16")
    given = {"weight_decay": decay, "rate": rate}
    path = record(tmp_path / "run.safetensors", patterns, "BF16", **given)
    ds, _ = ledger(path, arithmetic=name, groups=each_element(tokens))
    found, counted = {kind: ds[f"decay_{kind}_count"].values for kind in KINDS}, set()
    for t, k in itertools.product(range(2), range(tokens)):
        before = int(patterns["W"][t, k, 0])
        value = float(values_of(patterns["W"], "BF16")[t, k, 0])
        want = []
        if math.isfinite(value) and value != 0:
            after = float(decayed(name, Fraction(value), rate, decay))
            stored = int(patterns_of(np.array([after]), "BF16")[0])
            want = ["wanted", *fate(before, stored, value < 0, "BF16")]
        counted.update(want)
        assert [kind for kind in KINDS if found[kind][t, k + 1]] == [x for x in KINDS if x in want]
    # Rounded to bfloat16, 1 - 0.003 is 1 - 2^-8.
    moves = {"one_ulp"} if name == "torch-cpu-foreach" else {"one_ulp", "lost"}
    assert counted >= (moves if rate < 0.1 else {"more_ulp"})


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("name", ["torch-cpu-loop", "torch-cpu-fused", "float32"])
def test_l2_decay_alone(tmp_path, name, maximize):
    rng, tokens, decay = np.random.default_rng(8), TOKENS, 0.1
    shape = (3, tokens, 1)
    weights, grads = rng.normal(0, 0.02, shape), rng.normal(0, 0.02, shape)
    grads *= np.exp2(rng.integers(-20, 6, shape))
    weights[0, :4, 0], grads[1, 4:7, 0] = [0.0, -0.0, np.inf, np.nan], [0.0, np.inf, np.nan]
    patterns = {"W": patterns_of(weights, "BF16"), "grad_W": patterns_of(grads, "BF16")}
    for key in ("momentum_W", "variance_W"):
        patterns[key] = patterns_of(np.abs(rng.normal(0, 1e-3, shape)), "BF16")
    path = record(tmp_path / "run.safetensors", patterns, "BF16", weight_decay=decay)
    options = Options(decoupled=False, maximize=maximize)
    ds, _ = ledger(path, arithmetic=name, options=options, groups=each_element(tokens))
    kept, counted = "BF16" if name == "torch-cpu-loop" else "F32", set()
    found = {kind: ds[f"decay_{kind}_count"].values for kind in KINDS}
    for t, k in itertools.product(range(2), range(tokens)):
        p = float(values_of(patterns["W"], "BF16")[t, k, 0])
        g = float(values_of(patterns["grad_W"], "BF16")[t + 1, k, 0]) * (-1 if maximize else 1)
        want = []
        if math.isfinite(p) and math.isfinite(g) and p != 0:
            factor = single(Fraction(decay))
            if name != "torch-cpu-loop":
                new = single(factor * Fraction(p) + Fraction(g))
            elif k < 96:  # the rest are in a scalar loop
                new = bfloat(single(bfloat(factor) * Fraction(p) + Fraction(g)))
            else:
                new = bfloat(single(bfloat(single(bfloat(factor) * Fraction(p))) + Fraction(g)))
            stored = int(patterns_of(np.array([float(new)]), kept)[0])
            before = int(patterns_of(np.array([g]), kept)[0])
            want = ["wanted", *fate(before, stored, p > 0, kept)]
        counted.update(want)
        assert [kind for kind in KINDS if found[kind][t, k + 1]] == [x for x in KINDS if x in want]
    assert counted >= ({"lost", "one_ulp", "more_ulp"} if kept == "BF16" else {"more_ulp"})


@pytest.mark.filterwarnings("ignore:invalid value")
def test_nothing_depends_on_windows(tmp_path, monkeypatch):
    steps, tokens, width = 5, 16, 3
    patterns, groups = drawn(steps, tokens, width, "BF16", seed=9), some_groups(tokens)
    path = record(tmp_path / "run.safetensors", patterns, "BF16", weight_decay=0.1)
    how: dict[str, Any] = {"groups": groups}
    whole, lost = ledger(path, **how)
    assert whole.lost_count.sum() and whole.decay_lost_count.sum()
    for window_steps in (1, 3):
        other, found = ledger(path, **how, window_steps=window_steps)
        xr.testing.assert_identical(other, whole)
        np.testing.assert_array_equal(found, lost)
    with monkeypatch.context() as patch:
        patch.setattr(updates, "_BLOCK", 48)  # one step; the last of three is beyond the end
        other, found = ledger(path, **how, window_steps=3)
        xr.testing.assert_identical(other, whole)
        np.testing.assert_array_equal(found, lost)
    part, found = ledger(path, **how, steps=(3, 5), window_steps=1)
    xr.testing.assert_identical(part, whole.sel(timestep=slice(3, 4)))
    np.testing.assert_array_equal(found, lost[2:4])
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 21)  # 6 rows at a time, two of them twice
    cut, found = ledger(path, **how)
    np.testing.assert_array_equal(found, lost)
    for name, array in whole.items():
        if array.dtype.kind == "i" or name == "margin_quantile":
            xr.testing.assert_identical(cut[name], array)
        else:  # sums of other parts: a rounding for each row
            size = float(whole.wanted_absolute_sum.max() + whole.realised_absolute_sum.max())
            scale = size if name in ("wanted_sum", "realised_sum", "signed_bias") else 0
            np.testing.assert_allclose(cut[name], array, rtol=1e-9, atol=1e-14 * scale)


@pytest.mark.parametrize("width", [1, 16, 17, 33, 64, 300, 4400])
def test_sums_are_added_in_one_order(tmp_path, width):
    """Lanes of 16 columns (8 of narrow rows) in blocks of 256, from left to right, until one is left."""

    def folded(row: np.ndarray) -> float:
        while row.size > 1:
            parts, blocks, each = [], row.size // 256 * 256, 16 if row.size >= 32 else 8
            lanes = row.size // each * each
            if row.size <= 16:
                blocks, lanes = 0, 0
            for begin in range(0, blocks, 256):
                parts.append(from_left(row[begin : begin + 256].reshape(-1, each)))
            if lanes > blocks:
                parts.append(from_left(row[blocks:lanes].reshape(-1, each)))
            parts.append(row[lanes:] if lanes else from_left(row[:, None]))
            row = np.concatenate(parts)
        return float(row[0])

    def from_left(slices: np.ndarray) -> np.ndarray:
        total = slices[0]
        for each in slices[1:]:
            total = total + each
        return total

    rng, device = np.random.default_rng(width), find_device("cpu")
    shape = (2, 3 * width)
    wanted, realised = rng.normal(0, 1, (2, *shape)) * np.exp2(rng.integers(-30, 30, (2, *shape)))
    with jax.enable_x64(True):
        program = compile_exactly(
            lambda zero, *pair: updates._summed(ExactOperations(zero), *pair), device
        )
        found = program(np.uint32(0), wanted.reshape(-1, width), realised.reshape(-1, width))
    products = (wanted * wanted, realised * realised, wanted * realised)
    terms = (wanted, realised, np.abs(wanted), np.abs(realised), *products)
    for rows, values in zip(found, terms, strict=True):
        expected = [[folded(row) for row in step.reshape(3, width)] for step in values]
        np.testing.assert_array_equal(np.reshape(rows, (2, 3)), expected)


def masters(steps: int, size: int, given: Hyperparameters) -> dict[str, np.ndarray]:
    """Take the steps of float32 masters in NumPy; float32 values of the state, (steps + 1, size), and gradients."""
    arithmetic, rng = VARIANTS["float32-master"][0], np.random.default_rng(3)
    step = make_step(arithmetic, BFLOAT16, given, Options())
    scalars = scalars_of(step, arithmetic.rule, given, range(1, steps + 1))
    start = rng.normal(0, 0.02, size).astype(ml_dtypes.bfloat16).astype(np.float32)
    rows = {
        "param": [start],
        "exp_avg": [start * 0],
        "exp_avg_sq": [start * 0],
        "grad": [start * 0],
    }
    for k in range(steps):
        grad = rng.normal(0, 0.01, size).astype(ml_dtypes.bfloat16).astype(np.float32)
        before = {name: values[-1] for name, values in rows.items()}
        at = {name: value[k] for name, value in scalars.items()}
        after = step.advance(numpy_operations(), at, before | {"grad": grad}, {})
        for name, value in (after | {"grad": grad}).items():
            rows[name].append(np.asarray(value, np.float32))
    return {name: np.stack(values) for name, values in rows.items()}


def test_float32_masters_are_run_freely(tmp_path):
    """The exact update starts from the master, what was lost is told by its recorded bfloat16 copy.

    The first moment is not recorded, and run freely with it.
    """
    steps, rate, decay = 2, 6e-5, 50.0
    given = Hyperparameters(
        learning_rate=np.full(steps, rate), beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=decay
    )
    x = masters(steps, TOKENS, given)
    patterns = {"W": patterns_of(x["param"], "BF16"), "grad_W": patterns_of(x["grad"], "BF16")}
    patterns |= {"variance_W": patterns_of(x["exp_avg_sq"], "F32")}
    patterns = {name: array[..., None] for name, array in patterns.items()}
    used = {"rate": rate, "weight_decay": decay, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}
    path = record(tmp_path / "run.safetensors", patterns, "BF16", **used)
    ds, lost = ledger(path, arithmetic="float32-master", groups=each_element(TOKENS))
    own, copies = x["param"], patterns["W"][..., 0]
    kept = copies[1:] == copies[:-1]
    assert (own[1:] != own[:-1]).all() and 0.1 < kept.mean() < 0.9
    np.testing.assert_array_equal(lost, kept)
    factor = np.float32(1 - rate * decay)
    for t in range(steps):
        at = {name: values[t + (name == "grad")] for name, values in x.items()}
        want = textbook(at, t + 1, Options(), **used)
        # Terms may cancel here: roundings of the update's parts.
        assert np.all(
            np.abs(ds.wanted_sum[t, 1:] - want) < 1e-13 * rate * (10 + decay * np.abs(own[t]))
        )
        values = values_of(copies, "BF16")
        np.testing.assert_array_equal(ds.realised_sum[t, 1:], values[t + 1] - values[t])
        still = patterns_of(own[t] * factor, "BF16") == copies[t]
        assert 0 < still.mean() < 1
        np.testing.assert_array_equal(ds.decay_lost_count[t, 1:], still)
        np.testing.assert_array_equal(ds.decay_wanted_count[t, 1:], np.ones(TOKENS))


@pytest.mark.parametrize(
    ("drop", "first", "expected"),
    [
        ((), 1, True),
        (("grad_W",), 1, False),
        (("momentum_W",), 1, True),
        (("momentum_W",), 5, False),
    ],
)
def test_what_has_to_be_recorded(tmp_path, drop, first, expected):
    patterns = {name: x for name, x in drawn(2, 5, 2, "BF16").items() if name not in drop}
    path = record(tmp_path / "run.safetensors", patterns, "BF16", first_step=first)
    with jaxaudit.open_recording(path) as recording:
        given = recording.hyperparameters
        assert given is not None
        bench = workbench.Workbench(recording, (find_device("cpu"),), (1, 3), None)
        candidate = workbench.Candidate(VARIANTS["torch-cpu-loop"][0], Options(), given)
        subject = Subject(bench, candidate, some_groups(5), (1, 3))
        assert Updates.possible(subject) == expected


@pytest.mark.parametrize("name", ["torch-cpu-loop", "torchao"])
def test_no_decay_is_not_computed(tmp_path, monkeypatch, name):
    def never(*_: Any) -> Any:
        raise AssertionError("a program for a decay of 0")

    monkeypatch.setattr(updates, "_decay_program", never)
    path = record(tmp_path / "run.safetensors", drawn(2, TOKENS, 1, "BF16"), "BF16")
    ds, _ = ledger(path, arithmetic=name)
    for kind in KINDS:
        assert not ds[f"decay_{kind}_count"].any()


def test_the_dataset_says_what_it_holds(tmp_path):
    path = record(
        tmp_path / "run.safetensors", drawn(2, TOKENS, 1, "BF16"), "BF16", weight_decay=0.1
    )
    ds, _ = ledger(path, options=Options(decoupled=False))
    assert set(ds.data_vars) == set(UPDATES)
    for name, field in UPDATES.items():
        assert ds[name].dims == field.dims and ds[name].dtype == field.dtype
    assert ds.margin.values.tolist() == list(range(-32, 32))
    assert ds.attrs["title"] and "sqrt(v)" in ds.attrs["formula"]
    assert json.dumps(dict(ds.attrs))
