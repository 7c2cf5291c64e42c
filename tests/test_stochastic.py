"""Stochastic rounding: its statistics, and recordings that were rounded by chance or only look so."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import runs  # noqa: E402  (needs torch)

import jaxaudit  # noqa: E402
from jaxaudit import stochastic  # noqa: E402
from jaxaudit.arithmetics import CATALOGUE, make_step  # noqa: E402
from jaxaudit.floats import BFLOAT16, round_to  # noqa: E402

STOCHASTIC = CATALOGUE["stochastic-rounding"]

#: A positive and a negative weight, one whose neighbour away from zero is in the next binade, tiny, huge.
TOPS = (0x3F80, 0xBF9A, 0x3FFF, 0x0000, 0x8001, 0x7F7F)

#: Upper critical values of the chi-square distribution: freedom, 0.05, 0.01, 0.001 (NIST handbook, 1.3.6.7.4).
CRITICAL = {
    1: (3.841, 6.635, 10.828),
    2: (5.991, 9.210, 13.816),
    3: (7.815, 11.345, 16.266),
    4: (9.488, 13.277, 18.467),
    5: (11.070, 15.086, 20.515),
    6: (12.592, 16.812, 22.458),
    7: (14.067, 18.475, 24.322),
    8: (15.507, 20.090, 26.125),
}


@pytest.mark.parametrize("freedom", CRITICAL)
def test_p_value_is_the_tail_of_chi_square(freedom):
    for value, tail in zip(CRITICAL[freedom], (0.05, 0.01, 0.001), strict=True):
        # All of it in one bin; the others agree with their expectation.
        variance = np.where(np.arange(stochastic.BINS) < freedom, 100.0, 0.0)
        away = np.zeros(stochastic.BINS)
        away[0] = np.sqrt(value * 100)
        found = stochastic.p_value(away, np.zeros(stochastic.BINS), variance)
        assert found == pytest.approx(tail, rel=2e-3)


def test_p_value_needs_enough_trials():
    few, many = np.full(stochastic.BINS, 4.9), np.full(stochastic.BINS, 5.0)
    zero = np.zeros(stochastic.BINS)
    assert np.isnan(stochastic.p_value(zero, zero, few))
    assert stochastic.p_value(zero, zero, many) == 1
    assert stochastic.p_value(zero + 1e4, zero, many) == 0
    both = stochastic.p_value(*(np.stack([x, x]) for x in (zero, zero, many)))
    assert both.tolist() == [1, 1]


@pytest.mark.parametrize("top", TOPS)
def test_neighbours_of_every_fraction(top):
    low = np.arange(1 << 16, dtype=np.uint32)
    replayed = np.uint32(top) << np.uint32(16) | low
    for other in range(max(top - 2, 0), top + 3):
        recorded = np.full(1 << 16, other << 16, np.uint32)
        away = (other == top + 1) & (low != 0)
        assert np.array_equal(stochastic.away(replayed, recorded), away)
        assert np.array_equal(stochastic.possible(replayed, recorded), away | (other == top))
    assert np.array_equal(stochastic.bin_of(replayed), low >> 13)


@pytest.mark.parametrize("top", TOPS)
def test_tally_sums_up_what_is_possible(top):
    low = np.arange(1 << 16, dtype=np.uint32)
    replayed = np.uint32(top) << np.uint32(16) | low
    recorded = np.where(low % 2 == 1, np.uint32(top + 1), np.uint32(top)) << np.uint32(16)
    away, expected, variance = stochastic.tally(replayed, recorded)
    assert away.tolist() == [4096] * 8
    fraction = (low / 65536).reshape(8, -1)
    assert np.array_equal(expected, fraction.sum(axis=1))
    assert np.allclose(variance, (fraction * (1 - fraction)).sum(axis=1), rtol=1e-12)
    # What is neither neighbour does not count.
    assert not stochastic.tally(replayed, np.full_like(replayed, (top ^ 64) << 16)).any()


def weights_of(seed, size=4096):
    return np.random.default_rng(seed).normal(0, 0.02, size).astype(np.float32)


def p_of(values, rounded):
    return stochastic.p_value(*stochastic.tally(values.view(np.uint32), rounded.view(np.uint32)))


def test_p_values_of_chance_are_uniform():
    found = []
    for seed in range(400):
        values = weights_of(seed)
        rounded = runs.by_chance(values, np.random.default_rng([seed, 1]))
        assert stochastic.possible(values.view(np.uint32), rounded.view(np.uint32)).all()
        found.append(p_of(values, rounded))
    counts = np.histogram(found, 10, (0, 1))[0]
    # Chi-square over ten bins of 40 each: 27.9 is its 0.1 % point with 9 degrees of freedom.
    assert ((counts - 40) ** 2 / 40).sum() < 27.9
    assert min(found) > 1e-5


def test_other_roundings_are_not_chance():
    values = weights_of(1)
    bits = values.view(np.uint32)
    nearest = round_to(values, BFLOAT16)
    truncated = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    assert p_of(values, nearest) < 1e-9
    assert p_of(values, truncated) < 1e-9


@pytest.mark.parametrize("extra", [3000, -3000])
def test_biased_chance_is_found(extra):
    """Adding numbers that are too large or too small by a twentieth of a step shows in 65,536 weights."""
    values = weights_of(2, 1 << 16)
    random = np.random.default_rng(3)
    added = np.clip(random.integers(0, 1 << 16, values.size) + extra, 0, (1 << 16) - 1)
    bits = values.view(np.uint32) + added.astype(np.uint32)
    assert p_of(values, (bits & np.uint32(0xFFFF0000)).view(np.float32)) < 1e-9


@pytest.fixture(scope="module")
def by_chance():
    """Torchao's steps, rounded by chance: 40 rows of 50."""
    given = runs.setting(BFLOAT16, size=2000, steps=5, weight_decay=0.1)
    return runs.take(given, STOCHASTIC, random=np.random.default_rng(4))


def rows_of_fifty(run):
    """Return a run's tensors with 40 tokens of 50 values."""
    arrays = runs.prove.arrays_of(run)
    shape = (run.setting.steps + 1, 40, 50)
    return {k: x.reshape(shape) if k.endswith("W") else x for k, x in arrays.items()}


def audit(path, **how):
    with jaxaudit.open_recording(path) as recording:
        return jaxaudit.audit(recording, **({"backend": "cpu"} | how))


def test_audit_of_weights_rounded_by_chance(by_chance, tmp_path):
    mask = np.arange(40) < 10
    change = rows_of_fifty(by_chance) | {"dead_mask": mask}
    path = runs.save(tmp_path / "run.safetensors", by_chance, change=change)
    found = audit(path, arithmetics=["stochastic-rounding", "torchao"])
    assert found.attrs["identified_arithmetic"] == "stochastic-rounding"
    one = found.sel(arithmetic="stochastic-rounding")
    assert (one.mismatch_count == 0).all() and (one.max_ulp_distance == 0).all()
    assert one.rounding_p_value.shape == (5, 3)
    assert (one.rounding_p_value > 1e-6).all()
    assert (one.rounding_p_value_of_all_timesteps > 1e-6).all()
    # Each weight counts once: in dead or live, and in all.
    for name in ("rounded_away_count", "rounded_away_expected"):
        groups = one[name].sel(token_group=["dead", "live"]).sum("token_group")
        assert np.allclose(groups, one[name].sel(token_group="all"))
    by_bin = one.rounded_away_count_by_fraction.sum("fraction_bin")
    assert (by_bin == one.rounded_away_count.sum("timestep")).all()
    assert found.fraction_bin.values.tolist() == [(k + 0.5) / 8 for k in range(8)]
    # Expected as computed apart from the audit.
    step = make_step(STOCHASTIC, BFLOAT16, by_chance.setting.hyperparameters, by_chance.setting.options)  # fmt: skip
    exact = runs.replay(by_chance, STOCHASTIC, step).view(np.uint32)
    written = runs.weights(by_chance)[1:].view(np.uint32)
    assert stochastic.possible(exact, written).all()
    where = one.rounded_away_expected.sel(token_group="all")
    assert np.allclose(where, ((exact & 0xFFFF) / 65536).sum(axis=1))
    count = one.rounded_away_count.sel(token_group="all")
    assert np.array_equal(count, stochastic.away(exact, written).sum(axis=1))
    other = found.sel(arithmetic="torchao")
    assert (other.mismatch_count.sel(stage="param", token_group="all") > 0).all()
    assert other.rounding_p_value.isnull().all()


def test_weight_that_is_neither_neighbour(by_chance, tmp_path):
    change = runs.prove.arrays_of(by_chance)
    bits = change["W"].view(np.uint16).copy()
    bits[3, 77] += 2
    change["W"] = bits.view(change["W"].dtype)
    path = runs.save(tmp_path / "run.safetensors", by_chance, change=change)
    found = audit(path, arithmetics="stochastic-rounding").squeeze("arithmetic")
    counts = found.mismatch_count.sel(stage="param", token_group="all")
    assert counts.sel(timestep=3) == 1
    assert found.first_mismatch.sel(stage="param").values[:3].tolist() == [3, 77, 0]
    assert found.attrs["identified_arithmetic"] == ""
    assert found.max_ulp_distance.sel(stage="param", token_group="all", timestep=3) in (1, 2)


def test_identification_names_chance(by_chance, tmp_path):
    found = runs.identify(runs.save(tmp_path / "run.safetensors", by_chance))
    assert runs.named(found) == ["stochastic-rounding"]


def test_identification_does_not_take_nearest_for_chance(tmp_path):
    given = runs.setting(BFLOAT16, size=2000, steps=5, weight_decay=0.1)
    run = runs.take(given, CATALOGUE["torchao"])
    found = runs.identify(runs.save(tmp_path / "run.safetensors", run))
    assert "torchao" in runs.named(found) and "stochastic-rounding" not in runs.named(found)


def test_audit_of_nearest_under_chance_is_no_fit(tmp_path):
    """Every weight is one of the neighbours, but chance does not play so."""
    run = runs.take(runs.setting(BFLOAT16, size=2000), CATALOGUE["torchao"])
    path = runs.save(tmp_path / "run.safetensors", run)
    found = audit(path, arithmetics="stochastic-rounding")
    assert (found.mismatch_count == 0).all()
    assert (found.rounding_p_value_of_all_timesteps < 1e-9).all()
    assert found.attrs["identified_arithmetic"] == ""


def test_torchao_itself_rounds_by_such_chance(tmp_path):
    optim = pytest.importorskip("torchao.optim.adam")
    given = runs.setting(BFLOAT16, size=3000, steps=4, weight_decay=0.1)
    numbers = given.hyperparameters
    generator = torch.Generator().manual_seed(0)
    as_tensor = lambda values: torch.from_numpy(values).bfloat16()  # noqa: E731
    weight = torch.nn.Parameter(as_tensor(given.values["param"]))
    optimizer = optim._AdamW(
        [weight],
        lr=float(numbers.learning_rate[0]),
        betas=(numbers.beta1, numbers.beta2),
        eps=numbers.epsilon,
        weight_decay=numbers.weight_decay,
        bf16_stochastic_round=True,
    )
    torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
    rows = {"param": [weight], "exp_avg": [0 * weight], "exp_avg_sq": [0 * weight], "grad": []}
    rows = {name: [x.detach().clone() for x in values] for name, values in rows.items()}
    with torch.compiler.set_stance("force_eager"):
        for k in range(given.steps):
            weight.grad = as_tensor(given.values["grad"][k])
            optimizer.step()
            rows["grad"].append(weight.grad)
            for name in ("exp_avg", "exp_avg_sq"):
                rows[name].append(optimizer.state[weight][name].clone())
            rows["param"].append(weight.detach().clone())
    patterns = {
        name: torch.stack(values).detach().view(torch.int16).numpy().view(np.uint16)
        for name, values in rows.items()
    }
    run = runs.Run(setting=given, formats=dict.fromkeys(patterns, BFLOAT16), patterns=patterns)
    found = runs.identify(runs.save(tmp_path / "run.safetensors", run))
    assert runs.named(found) == ["stochastic-rounding"]
