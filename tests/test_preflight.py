"""The pre-flight against PyTorch itself: every positive value of a 16-bit format, and both sides of every threshold."""

import functools
import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from jaxaudit.preflight import ARITHMETICS, Preflight, preflight

torch = pytest.importorskip("torch")

SCRIPTS = Path(__file__).parents[1] / "scripts"
USUAL = {
    "learning_rate": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "epsilon": 1e-8,
    "weight_decay": 0.1,
}
#: The issue's numbers, and some with which the decays change some values and not others.
CASES = [
    {},
    {"beta1": 0.9975, "beta2": 0.998, "weight_decay": 2.5, "learning_rate": 1e-3},
    {"beta1": 0.5, "beta2": 0.95, "weight_decay": 4.5, "epsilon": 1e-3, "learning_rate": 0.03},
]
DTYPES = ["bfloat16", "float16"]
LATE = 1e9  # steps after which beta^t is 0


@functools.cache
def _found(items: tuple[tuple[str, Any], ...]) -> Preflight:
    return preflight(**dict(items))


def found(**changes: Any) -> Preflight:
    return _found(tuple(sorted((USUAL | {"dtype": "bfloat16"} | changes).items())))


def positive(dtype: str) -> Any:
    """Return every positive finite value."""
    infinity = {"bfloat16": 0x7F80, "float16": 0x7C00}[dtype]
    return torch.arange(1, infinity, dtype=torch.int16).view(getattr(torch, dtype))


def binade(exponent: int) -> Any:
    """Return the 2^23 float32 values from 2^exponent on, ascending."""
    first = (exponent + 127) << 23
    return torch.arange(first, first + (1 << 23), dtype=torch.int32).view(torch.float32)


def is_normal(values: Any) -> Any:
    return values >= torch.finfo(values.dtype).tiny


def step(weight: Any, grad: Any, first: Any, second: Any, **numbers: Any) -> tuple[Any, Any, Any]:
    """Take a late step of torch.optim's AdamW or Adam; return weight, exp_avg and exp_avg_sq after it."""
    numbers = {"lr": 1e-3, "weight_decay": 0.0, "foreach": False} | numbers
    kind = torch.optim.Adam if numbers.pop("l2", False) else torch.optim.AdamW
    param = weight.clone().requires_grad_()
    param.grad = torch.zeros_like(weight) + grad
    optimizer = kind([param], **numbers)
    optimizer.state[param] = {
        "step": torch.tensor(LATE),
        "exp_avg": torch.zeros_like(weight) + first,
        "exp_avg_sq": torch.zeros_like(weight) + second,
    }
    optimizer.step()
    state = optimizer.state[param]
    return param.detach(), state["exp_avg"], state["exp_avg_sq"]


IMPLEMENTATIONS = {
    "torch-cpu-loop": {"foreach": False},
    "torch-cpu-foreach": {"foreach": True},
    "torch-cpu-fused": {"foreach": False, "fused": True},
}


def decayed(part: str, values: Any, arithmetic: str, **numbers: Any) -> Any:
    """Return what one step without a gradient makes of every weight, exp_avg or exp_avg_sq."""
    numbers |= IMPLEMENTATIONS[arithmetic]
    if part == "weight_decay":
        return step(values, 0, 0, 1, **numbers)[0]
    if part == "exp_avg_decay":
        return step(torch.ones_like(values), 0, values, 1, **numbers)[1]
    return step(torch.ones_like(values), 0, 0, values, **numbers)[2]


def numbers_of(case: dict[str, float]) -> dict[str, Any]:
    given = USUAL | case
    return {
        "lr": given["learning_rate"],
        "betas": (given["beta1"], given["beta2"]),
        "eps": given["epsilon"],
        "weight_decay": given["weight_decay"],
    }


def assert_counts(finding: Any, same: Any, normal: Any) -> None:
    assert dict(finding.counts) == {
        "normal": int(normal.sum()),
        "normal_unchanged": int((same & normal).sum()),
        "subnormal": int((~normal).sum()),
        "subnormal_unchanged": int((same & ~normal).sum()),
    }
    verdict = (
        "never" if same[normal].all() else "for some values" if same[normal].any() else "always"
    )
    assert finding.acts == verdict


@pytest.mark.parametrize(
    ("arithmetic", "case"),
    [("torch-cpu-loop", case) for case in CASES]
    + [("torch-cpu-foreach", CASES[1]), ("torch-cpu-fused", CASES[1])],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["weight_decay", "exp_avg_decay", "exp_avg_sq_decay"])
def test_decays_change_what_torch_changes(
    part: str, dtype: str, case: dict[str, float], arithmetic: str
):
    finding = found(**case, dtype=dtype, arithmetic=arithmetic).finding(part)
    values = positive(dtype)
    same = decayed(part, values, arithmetic, **numbers_of(case)) == values
    assert_counts(finding, same, is_normal(values))
    if part != "weight_decay":
        largest = finding.threshold("largest_unchanged").value
        assert largest == (values[same].max().item() if same.any() else None)
        smallest = finding.threshold("smallest_falling").value
        assert smallest == (values[~same].min().item() if not same.all() else None)


@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_what_is_said_of_other_arithmetics_is_what_they_are_said_to_do(dtype: str):
    given = {"beta2": 0.998, "weight_decay": 1.9, "dtype": dtype}
    for name in ("torch-cpu-foreach", "optax"):
        own = found(**given, arithmetic=name)
        for finding in found(**given).findings[:3]:
            other = own.finding(finding.name)
            said = dict(finding.elsewhere[name])
            factor = said.pop("factor")
            assert said == {"acts": other.acts} | dict(other.counts)
            if name == "torch-cpu-foreach" and finding.name == "exp_avg_sq_decay":
                rounded = torch.tensor(0.998, dtype=getattr(torch, dtype)).item()
                assert factor == rounded
    assert set(finding.elsewhere) == set(ARITHMETICS) - {"torch-cpu-loop"}


@pytest.mark.parametrize("arithmetic", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("part", "name"), [("exp_avg_decay", "beta1"), ("exp_avg_sq_decay", "beta2")]
)
def test_moments_fall_up_to_the_largest_beta(part: str, name: str, dtype: str, arithmetic: str):
    finding, values = found(dtype=dtype, arithmetic=arithmetic).finding(part), positive(dtype)

    def falls(beta: float) -> Any:
        betas = (beta, 0.5) if name == "beta1" else (0.5, beta)
        return decayed(part, values, arithmetic, betas=betas) < values

    some, every = (finding.threshold(f"{name}_{which}").value for which in ("some", "every"))
    assert falls(some).any() and not falls(math.nextafter(some, 1)).any()
    normal = is_normal(values)
    assert falls(every)[normal].all() and not falls(math.nextafter(every, 1))[normal].all()


#: PyTorch's fused kernel is left out where a product is to be rounded: with fused multiply-add it rounds
#: 1 - lr*weight_decay once, which the catalogue does not yet. A learning rate of 1 makes no difference.
@pytest.mark.parametrize(
    ("by", "arithmetic"),
    [("product", name) for name in IMPLEMENTATIONS]
    + [("weight_decay", "torch-cpu-loop"), ("weight_decay", "torch-cpu-foreach")],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_decay_from_the_smallest_decay_on(by: str, dtype: str, arithmetic: str):
    finding = found(dtype=dtype, arithmetic=arithmetic).finding("weight_decay")
    values = positive(dtype)
    rate = USUAL["learning_rate"] if by == "weight_decay" else 1.0

    def changes(decay: float) -> Any:
        after = decayed("weight_decay", values, arithmetic, lr=rate, weight_decay=decay)
        return after != values

    some, every = (finding.threshold(f"{by}_{which}").value for which in ("some", "every"))
    assert changes(some).any() and not changes(math.nextafter(some, 0)).any()
    normal = is_normal(values)
    assert changes(every)[normal].all() and not changes(math.nextafter(every, 0))[normal].all()


def test_the_usual_numbers_of_bfloat16():
    """What is known from recordings: neither decay does anything; see also the README."""
    usual = found()
    verdicts = {each.name: each.acts for each in usual.findings}
    assert verdicts["weight_decay"] == verdicts["exp_avg_sq_decay"] == "never"
    assert verdicts["exp_avg_decay"] == "always"
    second = usual.finding("exp_avg_sq_decay")
    assert second.counts["normal_unchanged"] == second.counts["normal"] == 32512
    assert usual.finding("weight_decay").threshold("factor_in_format").value == 1
    assert "torch-cpu-foreach multiplies" in usual.finding("weight_decay").reason
    betas = usual.finding("betas")
    assert betas.acts == "never" and betas.threshold("beta2_in_format").bits == "0x3f80"
    assert "torch-cpu-foreach and optax multiply" in betas.reason


@pytest.mark.parametrize("case", CASES, ids=["usual", "some", "large"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_second_moments_rise_from_the_ratios_on(dtype: str, case: dict[str, float]):
    finding = found(**case, dtype=dtype).finding("exp_avg_sq_decay")
    values = positive(dtype)
    exact = values.double().numpy()
    # Gradients whose square is finite, and second moments that such a gradient can raise.
    gradients = exact[exact < 2.0 ** (64 if dtype == "bfloat16" else 8)]
    old = values[is_normal(values)]
    old = old[old < old.max() / 2**10]
    roots = np.sqrt(old.double().numpy())
    for name in ("rise_some", "rise_every"):
        limit, attained = finding.threshold(name).value, False
        near = np.searchsorted(gradients, limit * roots)
        before = None
        for offset in (-2, -1, 0, 1, 2):
            place = np.clip(near + offset, 0, gradients.size - 1)
            ratio = gradients[place] / roots
            grad = values[torch.from_numpy(place)]
            beta2 = (USUAL | case)["beta2"]
            risen = (step(torch.ones_like(old), grad, 0, old, betas=(0.9, beta2))[2] > old).numpy()
            if name == "rise_some":
                assert not risen[ratio < limit].any()
                attained |= bool((risen & (ratio == limit)).any())
            else:
                assert risen[ratio >= limit].all()
                if before is not None:
                    attained |= bool((risen & ~before & (ratio == limit)).any())
                before = risen
        assert attained


@pytest.mark.parametrize("dtype", DTYPES)
def test_l2_decay_reaches_gradients_from_the_ratios_on(dtype: str):
    finding = found(dtype=dtype, decoupled=False).finding("weight_decay")
    values = positive(dtype)
    exact, grads = values.double().numpy(), values[is_normal(values)]
    least, most = [], []
    for sign in (1, -1):
        for strided in (False, True):
            place = first_change(grads, values, 0.1 * sign, strided)
            ratios = exact[place] / grads.double().numpy()
            normal = is_normal(values)[torch.from_numpy(place)].numpy()
            changes = place < values.numel() - 1
            # Weights below the normal ones are not spoken of.
            first = np.maximum(exact[place], torch.finfo(values.dtype).tiny)
            least.append((first / grads.double().numpy())[changes].min())
            most.append(ratios[changes & normal].max())
    assert finding.threshold("ratio_some").value == min(least)
    assert finding.threshold("ratio_every").value == max(most)
    assert finding.acts == "for some values"


def first_change(grads: Any, values: Any, alpha: float, strided: bool) -> Any:
    """Return the place of the smallest weight that changes each gradient, the last where none does.

    Operands of different layouts go through the scalar loop, others of this size through the vectorised one.
    """
    low = torch.zeros(grads.numel(), dtype=torch.int64)
    high = torch.full_like(low, values.numel() - 1)
    while (low < high).any():
        middle = (low + high) // 2
        weight = values[middle]
        weight = weight.repeat_interleave(2)[::2] if strided else weight
        hit = grads.add(weight, alpha=alpha) != grads
        high = torch.where(hit, middle, high)
        low = torch.where(hit, low, torch.minimum(middle + 1, high))
    return low.numpy()


@pytest.mark.parametrize("dtype", DTYPES)
def test_smallest_visible_updates_of_every_binade(dtype: str):
    values, one = positive(dtype), torch.ones(1, dtype=getattr(torch, dtype))
    binades, seen = found(dtype=dtype).binades, 0
    for each in binades:
        within = values[(values >= each.smallest) & (values <= each.largest)]
        seen += within.numel()

        def changed(update: float, within: Any = within) -> Any:
            # (value * 1) / 1, added to the weight, as the last operator of the step does.
            return within.addcdiv(one, one, value=update) != within

        for way, sign in (("toward", -1), ("away", 1)):
            some, every = (getattr(each, f"{way}_{which}") for which in ("some", "every"))
            assert changed(sign * some).any() and not changed(sign * below(some)).any()
            assert changed(sign * every).all() and not changed(sign * below(every)).all()
    assert seen == values.numel() and len(binades) == {"bfloat16": 255, "float16": 31}[dtype]


def below(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(0)))


def unit_update(values: Any, sign: int, rate: float, arithmetic: str = "torch-cpu-loop") -> Any:
    """Tell which weights AdamW changes whose exp_avg, exp_avg_sq and denominator are all 1."""
    numbers = {"lr": rate, "betas": (0.0, 0.0), "eps": 0.0} | IMPLEMENTATIONS[arithmetic]
    return step(values, sign, 0, 1, **numbers)[0] != values


@pytest.mark.parametrize(
    ("rate", "arithmetic"),
    [(rate, "torch-cpu-loop") for rate in (1e-3, 2.0**-9)]
    + [(1e-3, "torch-cpu-foreach"), (1e-3, "torch-cpu-fused")],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_the_learning_rate_changes(dtype: str, rate: float, arithmetic: str):
    finding = found(learning_rate=rate, dtype=dtype, arithmetic=arithmetic).finding(
        "visible_update"
    )
    values = positive(dtype)
    toward, away = (unit_update(values, sign, rate, arithmetic) for sign in (1, -1))
    every = finding.threshold("weight_every").value
    assert (toward & away)[values <= every].all()
    assert not (toward & away)[values > every][0]
    some = finding.threshold("weight_some").value
    assert (toward | away)[values == some].all() and not (toward | away)[values > some].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_verdicts_of_binades(dtype: str):
    values = positive(dtype)
    both = unit_update(values, 1, 1e-3) & unit_update(values, -1, 1e-3)
    either = unit_update(values, 1, 1e-3) | unit_update(values, -1, 1e-3)
    for each in found(dtype=dtype).binades:
        within = (values >= each.smallest) & (values <= each.largest)
        verdict = "always" if both[within].all() else "for some values" if either[within].any() else "never"  # fmt: skip
        assert each.acts == verdict


@pytest.mark.parametrize("dtype", [*DTYPES, "float32"])
def test_learning_rates_that_move_a_weight_of_one(dtype: str):
    one = torch.ones(1, dtype=getattr(torch, dtype))
    finding = found(dtype=dtype).finding("visible_update")
    for way, sign in (("toward", 1), ("away", -1)):
        rate = finding.threshold(f"rate_at_one_{way}").value
        assert unit_update(one, sign, rate).all()
        assert not unit_update(one, sign, math.nextafter(rate, 0)).any()


def test_shares_of_normally_distributed_weights():
    """At 1e-3 bfloat16 weights above 0.5 stay; what rounds to more lies above the midpoint to the next one."""
    finding = found(weight_scale=0.3).finding("visible_update")
    neither = math.erfc((0.5 + 0.50390625) / 2 / 0.3 / math.sqrt(2))
    not_both = math.erfc((0.498046875 + 0.5) / 2 / 0.3 / math.sqrt(2))
    assert finding.threshold("share_neither").value == pytest.approx(neither, rel=1e-9)
    assert finding.threshold("share_not_both").value == pytest.approx(not_both, rel=1e-9)
    assert "9.43 % stay" in finding.reason and "9.62 %" in finding.reason


@pytest.mark.parametrize(("dtype", "scale"), [("bfloat16", 0.3), ("float16", 0.02)])
def test_learning_rate_that_changes_half_of_the_weights(dtype: str, scale: float):
    values = positive(dtype)
    exact = values.double().tolist()
    middles = [0.0, *((a + b) / 2 for a, b in zip(exact, exact[1:], strict=False)), math.inf]
    cumulative = [math.erf(x / scale / math.sqrt(2)) for x in middles]
    mass = np.diff([0.0, *cumulative[1:]])
    rate = (
        found(dtype=dtype, weight_scale=scale).finding("visible_update").threshold("rate_for_half")
    )

    def share(rate: float) -> float:
        both = unit_update(values, 1, rate) & unit_update(values, -1, rate)
        return float(mass[both.numpy()].sum())

    assert rate.value is not None
    assert share(rate.value) >= 0.5 > share(math.nextafter(rate.value, 0))


@pytest.mark.parametrize("epsilon", [1e-8, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_roots_that_epsilon_changes(dtype: str, epsilon: float):
    finding = found(epsilon=epsilon, dtype=dtype).finding("epsilon")
    roots = positive(dtype)
    lost = roots.add(epsilon) == roots
    first, last = (finding.threshold(name).value for name in ("first_lost", "last_kept"))
    assert first == roots[lost].min().item()
    assert last == (None if lost.all() else roots[~lost].max().item())
    assert finding.acts == ("never" if lost.all() else "for some values")
    zero = torch.zeros(1, dtype=roots.dtype)
    assert finding.threshold("epsilon_in_format").value == zero.add(epsilon).item()
    smallest = finding.threshold("epsilon_smallest").value
    assert zero.add(smallest) != 0 and zero.add(math.nextafter(smallest, 0)) == 0


def test_epsilon_of_a_fused_step_counts_up_to_float32_roots():
    finding = found(arithmetic="torch-cpu-fused").finding("epsilon")
    roots = torch.cat([binade(-3), binade(-2)])
    lost = roots.add(1e-8) == roots
    assert finding.threshold("first_lost").value == roots[lost].min().item()
    assert finding.threshold("last_kept").value == roots[~lost].max().item()


def test_epsilon_that_is_zero_in_float16_divides_by_zero():
    finding = found(dtype="float16").finding("epsilon")
    zero, one = (torch.full((1,), x, dtype=torch.float16) for x in (0, 1))
    assert finding.acts == "never" and step(one, zero, 0, 0, eps=1e-8)[0].isnan()
    assert "becomes NaN" in finding.reason and "becomes -inf" in finding.reason
    assert step(one, zero, 6e-8, 0, betas=(0.999, 0.999), eps=1e-8)[0].item() == -math.inf
    assert "NaN" not in found(dtype="float16", epsilon=1e-4).finding("epsilon").reason


@pytest.mark.parametrize("case", CASES, ids=["usual", "some", "large"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_the_moments_do_not_see(dtype: str, case: dict[str, float]):
    finding = found(**case, dtype=dtype).finding("small_gradients")
    grads = positive(dtype)
    _, first, second = step(torch.ones_like(grads), grads, 0, 0, **numbers_of(case))
    assert finding.threshold("exp_avg").value == grads[first != 0].min().item()
    assert finding.threshold("exp_avg_sq").value == grads[second != 0].min().item()


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 256), ("float16", 2048)])
def test_step_counters_stick(dtype: str, limit: int):
    count = torch.zeros(1, dtype=getattr(torch, dtype))
    steps = 0
    while count + 1 != count:
        count, steps = count + 1, steps + 1
    finding = found(dtype=dtype).finding("step_counter")
    assert steps == limit == finding.threshold("limit").value
    correction = finding.threshold("bias_correction2_sqrt").value
    assert correction == pytest.approx(math.sqrt(1 - 0.999**limit))
    assert finding.threshold("bias_correction1").value == pytest.approx(1 - 0.9**limit)


# float32: whole binades of PyTorch's results, the lowest one of normal numbers among them.


def test_float32_counts_are_those_of_whole_binades():
    """A first moment of which this beta takes off about half an ulp: most values stay, in each binade alike."""
    finding = found(dtype="float32", beta1=1 - 4.5e-8).finding("exp_avg_decay")
    unchanged = {}
    for exponent in (-126, -125, 0, 127):
        values = binade(exponent)
        unchanged[exponent] = int((values.lerp(torch.zeros(1), 4.5e-8) == values).sum())
        assert 0 < unchanged[exponent] < 1 << 23
    assert unchanged[-125] == unchanged[0] == unchanged[127]
    expected = unchanged[-126] + 253 * unchanged[0]
    assert finding.counts["normal_unchanged"] == expected
    assert finding.counts["subnormal_unchanged"] == (1 << 23) - 1
    assert finding.acts == "for some values"
    values = binade(127)
    same = values.lerp(torch.zeros(1), 4.5e-8) == values
    assert finding.threshold("largest_unchanged").value == values[same].max().item()
    lowest = binade(-126)
    same = lowest.lerp(torch.zeros(1), 4.5e-8) == lowest
    assert finding.threshold("smallest_falling").value == lowest[~same].min().item()


def test_float32_thresholds_hold_for_whole_binades():
    binades = [binade(-126), binade(0)]
    zero, usual = torch.zeros(1), found(dtype="float32")
    second = usual.finding("exp_avg_sq_decay")
    first, weight = usual.finding("exp_avg_decay"), usual.finding("weight_decay")
    for finding, name, after in (
        (second, "beta2", lambda values, beta: values.mul(beta)),
        (first, "beta1", lambda values, beta: values.lerp(zero, 1 - beta)),
        (weight, "product", lambda values, product: values.mul(1 - product)),
    ):
        other_side = 0.0 if name == "product" else 1.0
        for which, of in (("every", torch.all), ("some", torch.any)):
            number = finding.threshold(f"{name}_{which}").value
            here = [of(after(values, number) != values) for values in binades]
            beyond = math.nextafter(number, other_side)
            there = [of(after(values, beyond) != values) for values in binades]
            together = all if which == "every" else any
            assert together(here) and not together(there), (name, which)


def test_float32_updates_that_change_a_whole_binade():
    one = torch.ones(1)
    values = binade(0)
    (each,) = (x for x in found(dtype="float32").binades if x.smallest == 1)
    for way, sign in (("toward", -1), ("away", 1)):
        some, every = (getattr(each, f"{way}_{which}") for which in ("some", "every"))
        for update, of in ((some, torch.any), (every, torch.all)):
            assert of(values.addcdiv(one, one, value=sign * update) != values)
            assert not of(values.addcdiv(one, one, value=sign * below(update)) != values)


def test_float32_counter_and_small_numbers():
    usual = found(dtype="float32", weight_scale=1e5)
    limit = usual.finding("step_counter").threshold("limit").value
    assert limit == 2**24 and torch.tensor(limit) + 1 == limit
    assert torch.tensor(limit - 1) + 1 != limit - 1
    smallest = usual.finding("small_gradients").threshold("exp_avg_sq").value
    grads = torch.tensor([below(smallest), smallest])
    second = step(torch.ones(2), grads, 0, 0, betas=(0.9, 0.999))[2]
    assert second[0] == 0 and second[1] > 0
    # 1e-3 changes weights up to 2^15, where half an ulp is 2^-9 / 2.
    update = usual.finding("visible_update")
    assert update.threshold("weight_some").value == 2.0**15
    expected = math.erfc(2**15 / 1e5 / math.sqrt(2))
    assert update.threshold("share_neither").value == pytest.approx(expected, rel=1e-6)


# Numbers that switch something off, and wrong ones.


def test_numbers_that_switch_a_part_off():
    off = found(learning_rate=0.0, epsilon=0.0, dtype="float32")
    verdicts = {each.name: each.acts for each in off.findings}
    assert verdicts["weight_decay"] == verdicts["visible_update"] == verdicts["epsilon"] == "off"
    assert found(weight_decay=0.0, decoupled=False).finding("weight_decay").acts == "off"
    gone = found(weight_decay=1e-30, dtype="float16", decoupled=False).finding("weight_decay")
    assert gone.acts == "never" and gone.threshold("ratio_some").value is None


@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        ("float16", {"learning_rate": 3e38, "weight_decay": 3e38}),
        ("bfloat16", {"learning_rate": 5e-324, "weight_scale": 1e-300}),
        ("float16", {"beta1": 0.0, "beta2": 0.0, "epsilon": 1e38}),
        ("float32", {"beta1": 1 - 2**-53, "beta2": 1 - 2**-53, "weight_scale": 1e38}),
    ],
)
def test_extreme_numbers_leave_plain_numbers(dtype: str, change: dict[str, float]):
    extreme = found(**change, dtype=dtype)
    json.dumps(extreme.as_json(), allow_nan=False)
    assert max(map(len, extreme.describe().splitlines())) <= 100


@pytest.mark.parametrize("arithmetic", sorted(set(ARITHMETICS) - set(IMPLEMENTATIONS)))
def test_every_arithmetic_loses_the_usual_second_moment(arithmetic: str):
    finding = found(arithmetic=arithmetic).finding("exp_avg_sq_decay")
    assert finding.acts == "never" and arithmetic not in finding.elsewhere


WRONG = [
    ({"learning_rate": -1.0}, "learning rate is -1.0"),
    ({"learning_rate": math.inf}, "less than 2^128"),
    ({"beta1": 1.0}, "beta1 is 1.0"),
    ({"beta2": -0.1}, "beta2 is -0.1"),
    ({"epsilon": math.nan}, "epsilon is nan"),
    ({"weight_decay": -1e-9}, "weight decay is -1e-09"),
    ({"weight_scale": 0.0}, "weight scale is 0.0"),
    ({"dtype": "float8"}, "bfloat16, float16, float32"),
    ({"arithmetic": "sgd"}, "unknown"),
    ({"arithmetic": "optimi-kahan"}, "not looked at here"),
    ({"arithmetic": "anyprecision", "decoupled": False}, "no L2"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_numbers_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match="needed|name") as refused:
        preflight(**(USUAL | change))
    assert message in str(refused.value)


# The script.


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the script as Python does when it is run."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "argv", ["preflight.py"])
    return importlib.import_module("preflight")


ISSUE = (
    "--learning-rate 1e-3 --beta1 .9 --beta2 .999 --epsilon 1e-8 --weight-decay .1 --dtype bfloat16"
)


def test_script_answers_in_text(script: Any, capsys: pytest.CaptureFixture[str]):
    assert script.main([*ISSUE.split(), "--weight-scale", ".3", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out == found(weight_scale=0.3).describe() + "\n"
    lines = printed.out.splitlines()
    assert max(map(len, lines)) <= 100
    for part in ("decoupled weight decay", "decay of exp_avg_sq"):
        assert any(line.startswith(part) and line.endswith(" never") for line in lines)
    for text in ("0.0019531548023224436 ", "0.9980468451976775 ", "0.5 (0x3f00)", "256 + 1 rounds"):
        assert text in printed.out


def test_script_answers_in_json(script: Any, capsys: pytest.CaptureFixture[str]):
    assert script.main([*ISSUE.split(), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    expected = found()
    assert answer == json.loads(json.dumps(expected.as_json()))
    (second,) = (x for x in answer["findings"] if x["name"] == "exp_avg_sq_decay")
    (threshold,) = (x for x in second["thresholds"] if x["name"] == "beta2_some")
    assert threshold["value"] == expected.finding("exp_avg_sq_decay").threshold("beta2_some").value
    assert len(answer["smallest_visible_updates"]) == 255


def test_script_takes_adams_weight_decay(script: Any, capsys: pytest.CaptureFixture[str]):
    assert script.main(["--l2", "--weight-decay", "0.1"]) == 0
    assert capsys.readouterr().out == found(decoupled=False).describe() + "\n"


def test_script_says_its_version(script: Any, capsys: pytest.CaptureFixture[str]):
    assert script.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jaxaudit ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "-1"], "-1.0"),
        (["--beta2", "1"], "less than 1 is needed"),
        (["--epsilon", "nan"], "nan"),
        (["--weight-decay", "much"], "'much'"),
        (["--dtype", "float8"], "bfloat16, float16, float32"),
        (["--arithmetic", "sgd"], "torch-cpu-loop"),
        (["--overwrite"], "--overwrite"),
    ],
)
def test_script_refuses_in_one_line(
    script: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert script.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert printed.err.startswith("preflight.py: error: ") and message in printed.err
