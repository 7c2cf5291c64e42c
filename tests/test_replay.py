"""The compiled programs against the host, on whatever a recording may hold; and the self-test itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxaudit import operations, replay
from jaxaudit.arithmetics import CATALOGUE, STAGES, Options, make_step, ordinary, scalars_of
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, decode, encode, is_nan
from jaxaudit.hyperparameters import Hyperparameters
from jaxaudit.operations import NumpyOperations
from jaxaudit.replay import DIFFERS, STRAY, FreeRun, Replayer, SelfTestError

DEVICE = jax.devices("cpu")[0]
STEPS, ELEMENTS = 4, 20_000


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def fresh_programs():
    """Compile anew, and forget afterwards what was compiled from tampered operations."""
    caches = (replay._flags_program, replay._results_program, replay._free_run_program)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def hyperparameters(**changes):
    usual = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.01}
    rates = np.full(STEPS, changes.pop("lr", 1e-3))
    return Hyperparameters(learning_rate=rates, **(usual | changes))


def wild_window(rng, storage, moments):
    """Uniform patterns, realistic values and tiny ones, mixed; new moments unrelated to the old."""

    def draw(fmt, scale):
        rows = STEPS + 1
        wild = rng.integers(0, 1 << fmt.width, (rows, ELEMENTS)).astype(fmt.pattern_dtype)
        exponents = rng.choice([0, 0, 0, -20, -35, -40], (rows, ELEMENTS)).astype(np.float64)
        with np.errstate(all="ignore"):
            real = rng.normal(size=(rows, ELEMENTS)) * scale * 10.0**exponents
            real = real.astype(np.float32)
            if scale < 1e-5:
                real = np.abs(real)
        return np.where(rng.random((rows, ELEMENTS)) < 0.1, wild, encode(real, fmt))

    return {
        "param": draw(storage, 0.02),
        "grad": draw(storage, 1e-3)[1:],
        "exp_avg": draw(moments, 1e-3),
        "exp_avg_sq": draw(moments, 1e-6),
    }


def oracle(program, scalars, window, rule):
    ops = NumpyOperations()
    values = program.values(ops, window, STEPS, rule)
    columns = {name: value[:, None] for name, value in scalars.items()}
    return ops.encode(program.step.replay(program.stage, ops, columns, values), program.result)


def differ(found, expected, fmt):
    return (found != expected) & ~(is_nan(found, fmt) & is_nan(expected, fmt))


CASES = [
    (storage, moments, name, decoupled, beta1)
    for storage, moments in [
        (BFLOAT16, FLOAT32),
        (FLOAT16, FLOAT16),
        (FLOAT32, FLOAT32),
    ]
    for name, decoupled, beta1 in [
        ("torch-cpu-loop", True, 0.9),
        ("torch-cpu-loop", False, 0.3),
        ("float32-then-bfloat16", True, 0.9),
    ]
    if storage is BFLOAT16 or name == "torch-cpu-loop"
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].name}-{c[1].name}-{c[2]}-{c[3]}")
def test_programs_are_exact_on_whatever_a_recording_may_hold(case):
    """Float64 on every element; float32 on every element that it does not mark as stray."""
    storage, moments, name, decoupled, beta1 = case
    given = hyperparameters(beta1=beta1)
    step = make_step(CATALOGUE[name], storage, given, Options(decoupled=decoupled))
    formats = {"param": storage, "grad": storage, "exp_avg": moments, "exp_avg_sq": moments}
    replayer = Replayer(DEVICE, formats, (STEPS, ELEMENTS))
    rule = (np.arange(ELEMENTS) % 3 == 0).astype(np.uint8)
    scalars = scalars_of(step, given, [1, 2, 50, 9000])
    assert ordinary(scalars)
    window = wild_window(np.random.default_rng(5), storage, moments)
    for stage in STAGES:
        program = replayer.program(step, stage)
        expected = oracle(program, scalars, window, rule)
        exact = np.asarray(replayer.results(program, scalars, window, rule, "float64"))
        assert not differ(exact, expected, program.result).any()
        flags = replayer._flags(program, "float32", scalars, window, rule)
        fast = np.asarray(replayer.results(program, scalars, window, rule, "float32"))
        kept = flags & STRAY == 0
        assert 0.02 < kept.mean() < 1  # both kinds are there
        assert not (differ(fast, expected, program.result) & kept).any()
        wide = decode(expected, program.result).view(np.uint32)
        recorded = decode(window[stage][1:], formats[stage]).view(np.uint32)
        assert np.array_equal((flags & DIFFERS != 0)[kept], differ(wide, recorded, FLOAT32)[kept])
        found, formulation = replayer.flags(program, scalars, window, rule)
        assert formulation == "float64"  # one stray is enough
        assert np.array_equal(found != 0, differ(wide, recorded, FLOAT32))


@pytest.mark.parametrize("seed", range(3))
def test_stray_marks_are_sound_at_their_edges(seed):
    """Exponents drawn around every bound of `Step.strays`, full significands, zeros in between."""
    rng = np.random.default_rng(seed)

    def draw(low, high, positive=False):
        shape = (STEPS + 1, ELEMENTS)
        edges = [low - 2, low - 1, low, low + 1, high - 1, high, (low + high) // 2]
        values = np.ldexp(1 + rng.random(shape), rng.choice(edges, shape))
        values *= rng.random(shape) > 0.15
        sign = 1 if positive else rng.choice([-1, 1], shape)
        return encode((values * sign).astype(np.float32), FLOAT32)

    window = {
        "param": draw(-34, 4),
        "grad": draw(-54, 10)[1:],
        "exp_avg": draw(-100, -50),
        "exp_avg_sq": draw(-100, 19, positive=True),
    }
    window["exp_avg"][:, ::2] = draw(-64, 10)[:, ::2]
    formats = dict.fromkeys(window, FLOAT32)
    rule = np.zeros(ELEMENTS, np.uint8)
    for name in CATALOGUE:
        given = hyperparameters(weight_decay=[0.0, 0.1, 0.1][seed], lr=[1e-3, 1.0, 1e-10][seed])
        step = make_step(CATALOGUE[name], FLOAT32, given, Options(decoupled=seed != 1))
        scalars = scalars_of(step, given, [1, 2, 50, 9000])
        assert ordinary(scalars)
        replayer = Replayer(DEVICE, formats, (STEPS, ELEMENTS))
        for stage in STAGES:
            program = replayer.program(step, stage)
            flags = replayer._flags(program, "float32", scalars, window, rule)
            fast = np.asarray(replayer.results(program, scalars, window, rule, "float32"))
            wrong = differ(fast, oracle(program, scalars, window, rule), program.result)
            assert not (wrong & (flags & STRAY == 0)).any(), (name, stage)
            assert (flags & STRAY == 0).any()


def ordinary_replayer(storage=BFLOAT16, moments=BFLOAT16):
    formats = {"param": storage, "grad": storage, "exp_avg": moments, "exp_avg_sq": moments}
    given = hyperparameters()
    step = make_step(CATALOGUE["torch-cpu-loop"], storage, given, Options())
    return Replayer(DEVICE, formats, (STEPS, ELEMENTS)), step


def unguarded(self, a, b):
    return a * b


def by_reciprocal(self, a, b):
    return a * (np.float32(1) / b)


def roughly(self, a):
    return _next_up(jnp.sqrt(a))


def _next_up(x):
    return lax.bitcast_convert_type(
        lax.bitcast_convert_type(x, jnp.uint32) + np.uint32(1), jnp.float32
    )


def unfused(self, a, b, c):
    return self.add(self.multiply(a, b), c)


def by_truncation(self, value, fmt):
    bits = lax.bitcast_convert_type(value, jnp.uint32)
    return lax.bitcast_convert_type(bits & np.uint32(0xFFFF0000), jnp.float32)


BROKEN = [
    ("multiply", unguarded, FLOAT32, "exp_avg_sq"),  # contracted with the sum after it
    ("multiply", unguarded, FLOAT32, "param"),
    ("divide", by_reciprocal, FLOAT32, "param"),
    ("sqrt", roughly, FLOAT32, "param"),
    ("fma", unfused, BFLOAT16, "exp_avg"),
    ("fma", unfused, BFLOAT16, "exp_avg_sq"),
    ("round_to", by_truncation, BFLOAT16, "exp_avg"),
    ("round_to", by_truncation, BFLOAT16, "param"),
    ("round_to", lambda self, value, fmt: value, BFLOAT16, "param"),  # a dropped cast
]


@pytest.mark.usefixtures("fresh_programs")
@pytest.mark.parametrize(
    "name,broken,storage,stage", BROKEN, ids=lambda x: getattr(x, "__name__", str(x))[:20]
)
def test_the_self_test_catches_a_broken_operation(monkeypatch, name, broken, storage, stage):
    monkeypatch.setattr(operations.Float32Operations, name, broken)
    replayer, step = ordinary_replayer(storage, FLOAT32)
    program = replayer.program(step, stage)
    assert "expected" in replayer._verdict(program, "float32")
    # The audit goes on in float64, which is sound.
    replayer.require(program, "float64")


@pytest.mark.usefixtures("fresh_programs")
def test_a_device_that_flushes_subnormals_in_float64_emulation_is_refused(monkeypatch):
    def flushing(value):
        rounded = value.astype(jnp.float32)
        return lax.bitcast_convert_type(rounded, jnp.uint32)

    monkeypatch.setattr(operations, "_bits_of_float64", flushing)
    replayer, step = ordinary_replayer()
    with pytest.raises(SelfTestError, match=r"exp_avg of torch-cpu-loop in float64: .* expected"):
        replayer.require(replayer.program(step, "exp_avg"), "float64")


@pytest.mark.usefixtures("fresh_programs")
def test_a_device_without_float64_is_refused(monkeypatch):
    def absent(value):
        raise TypeError("no float64 here")

    monkeypatch.setattr(operations, "_bits_of_float64", absent)
    replayer, step = ordinary_replayer()
    with pytest.raises(SelfTestError, match="does not run .no float64 here"):
        replayer.require(replayer.program(step, "param"), "float64")


@pytest.mark.parametrize("name", ["torch-cpu-loop", "float32-then-bfloat16"])
@pytest.mark.parametrize("decoupled", [True, False])
def test_free_running_moments_are_those_of_the_step_repeated(name, decoupled):
    given = hyperparameters()
    step = make_step(CATALOGUE[name], BFLOAT16, given, Options(decoupled=decoupled))
    rng = np.random.default_rng(2)
    window = wild_window(rng, BFLOAT16, BFLOAT16)
    formats = {"param": BFLOAT16, "grad": BFLOAT16}
    formats |= dict.fromkeys(("exp_avg", "exp_avg_sq"), step.operator_format)
    replayer = Replayer(DEVICE, formats, (STEPS, ELEMENTS))
    rule = np.zeros(ELEMENTS, np.uint8)
    scalars = scalars_of(step, given, range(1, STEPS + 1))
    read = {name: window[name] for name in ("param", "grad")}
    run = FreeRun(replayer, step, ELEMENTS)
    found = run.advance(scalars, read, rule, STEPS)
    ops, fmt = NumpyOperations(), step.operator_format
    zero = np.zeros(ELEMENTS, fmt.pattern_dtype)
    state = {"exp_avg": zero, "exp_avg_sq": zero}
    for k in range(STEPS):
        values = {
            "param": ops.decode(window["param"][k], BFLOAT16),
            "grad": ops.decode(window["grad"][k], BFLOAT16),
            "scalar_rule": rule,
        } | {stage: ops.decode(state[stage], fmt) for stage in state}
        at = {key: value[k] for key, value in scalars.items()}
        state = {stage: ops.encode(step.replay(stage, ops, at, values), fmt) for stage in state}
        for stage, expected in state.items():
            assert not differ(np.asarray(found[stage])[k + 1], expected, fmt).any()


def test_padding_does_not_reach_the_free_running_state():
    """A short last window advances by its valid steps only."""
    given = hyperparameters()
    replayer, step = ordinary_replayer()
    rule = np.zeros(ELEMENTS, np.uint8)
    scalars = scalars_of(step, given, range(1, STEPS + 1))
    window = wild_window(np.random.default_rng(3), BFLOAT16, BFLOAT16)
    read = {name: window[name] for name in ("param", "grad")}
    run = FreeRun(replayer, step, ELEMENTS)
    found = run.advance(scalars, read, rule, 2)
    again = run.advance(scalars, read, rule, 1)
    assert np.array_equal(np.asarray(again["exp_avg"])[0], np.asarray(found["exp_avg"])[2])


def test_a_step_without_decay_does_not_depend_on_the_rule():
    step = ordinary_replayer()[1]
    assert "scalar_rule" not in step.reads("exp_avg")
    assert "scalar_rule" in dataclasses.replace(step, decay="l2").reads("exp_avg")
