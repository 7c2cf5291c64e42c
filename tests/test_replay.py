"""The compiled programs against the host, on whatever a recording may hold; and the self-test itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxaudit import operations, replay
from jaxaudit.arithmetics import CATALOGUE, VARIANTS, Options, make_step
from jaxaudit.devices import Placement
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, decode, encode, is_nan
from jaxaudit.free_running import FreeRun
from jaxaudit.hyperparameters import Hyperparameters
from jaxaudit.operations import NumpyOperations
from jaxaudit.replay import DIFFERS, OWN_PARAM, STRAY, Replayer, SelfTestError
from jaxaudit.scalars import scalars_of
from jaxaudit.steps import STAGES

DEVICE = jax.devices("cpu")[0]
PLACEMENT = Placement((DEVICE,), 1)
STEPS, ELEMENTS = 4, 20_000
MKL = "square root of MKL on AMD"


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def hyperparameters(steps=STEPS, **changes):
    usual = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.01}
    rates = np.full(steps, changes.pop("lr", 1e-3))
    return Hyperparameters(learning_rate=rates, **(usual | changes))


def variant(name, label=""):
    return next(a for a in VARIANTS[name] if a.variant == label)


@dataclasses.dataclass(frozen=True)
class Case:
    """An arithmetic under some options, and the formats of a recording."""

    name: str
    storage: object = BFLOAT16
    moments: object = BFLOAT16
    variant: str = ""
    options: Options = Options()
    beta1: float = 0.9
    kept: tuple | None = None

    def __str__(self):
        parts = (
            self.name,
            self.variant,
            self.storage.name,
            self.moments.name,
            self.options.decoupled,
        )
        return "-".join(str(part) for part in parts if part)

    @property
    def arithmetic(self):
        return variant(self.name, self.variant)

    def given(self, **changes):
        return hyperparameters(beta1=self.beta1, **changes)

    def step(self, given):
        return make_step(self.arithmetic, self.storage, given, self.options, self.kept)

    def formats(self, step):
        """Tell a recording's formats that holds every tensor of a step's state."""
        formats = {"grad": self.storage} | dict.fromkeys(step.state, self.moments)
        return formats | {"param": self.storage}

    def program(self, replayer, step, stage):
        return replayer.program(step, stage, self.arithmetic.rule, self.arithmetic.label)

    def scalars(self, step, given, timesteps):
        return scalars_of(step, self.arithmetic.rule, given, timesteps)


def draw_wild(rng, name, fmt, rows=STEPS + 1):
    """Draw uniform patterns, realistic values and tiny ones, mixed."""
    scale = {"param": 0.02, "grad": 1e-3, "exp_avg": 1e-3}.get(name, 1e-6)
    wild = rng.integers(0, 1 << fmt.width, (rows, ELEMENTS)).astype(fmt.pattern_dtype)
    exponents = rng.choice([0, 0, 0, -20, -35, -40], (rows, ELEMENTS)).astype(np.float64)
    with np.errstate(all="ignore"):
        real = rng.normal(size=(rows, ELEMENTS)) * scale * 10.0**exponents
        real = real.astype(np.float32)
        if scale < 1e-5:
            real = np.abs(real)
    return np.where(rng.random((rows, ELEMENTS)) < 0.1, wild, encode(real, fmt))


def wild_window(rng, formats):
    """Draw each tensor; new moments are unrelated to the old."""
    found = {name: draw_wild(rng, name, fmt) for name, fmt in formats.items()}
    return found | {"grad": found["grad"][1:]}


def oracle(program, scalars, window, tail):
    ops = NumpyOperations()
    values = program.values(ops, window, STEPS, tail)
    columns = {name: value[:, None] for name, value in scalars.items()}
    with np.errstate(all="ignore"):
        result = program.step.replay_recorded(program.stage, ops, columns, values)
    return ops.encode(result, program.result)


def differ(found, expected, fmt):
    return (found != expected) & ~(is_nan(found, fmt) & is_nan(expected, fmt))


L2 = Options(decoupled=False)
CASES = [
    Case("torch-cpu-loop", moments=FLOAT32),
    Case("torch-cpu-loop", moments=FLOAT32, kept=(BFLOAT16, FLOAT32)),
    Case("torch-cpu-loop", FLOAT16, FLOAT16, options=L2, beta1=0.3),
    Case("torch-cpu-loop", FLOAT32, FLOAT32, MKL),
    Case("torch-cpu-fused", options=Options(decoupled=False, amsgrad=True, maximize=True)),
    Case("torch-cuda-loop", FLOAT16, FLOAT16, options=Options(amsgrad=True)),
    Case("torch-cuda-fused", FLOAT32, FLOAT32),
    Case("torch-cuda-fused-legacy", options=L2),
    Case("torch-cuda-fused-legacy", FLOAT32, FLOAT32),
    Case("torch-capturable", variant="over lists"),
    Case("float32-master", moments=FLOAT32),
    Case("float32-then-bfloat16", moments=FLOAT32),
    Case("float32", moments=FLOAT32),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_programs_are_exact_on_whatever_a_recording_may_hold(case):
    """Float64 on every element; float32 on every element that it does not mark as stray."""
    given = case.given()
    step = case.step(given)
    formats = case.formats(step)
    replayer = Replayer(PLACEMENT, formats, (STEPS, ELEMENTS))
    tail = (np.arange(ELEMENTS) % 3 == 0).astype(np.uint8)
    scalars = case.scalars(step, given, [1, 2, 50, 9000])
    rng = np.random.default_rng(5)
    window = wild_window(rng, formats)
    if step.keeps_more:
        window[OWN_PARAM] = draw_wild(rng, "param", step.param_format)
    for stage in STAGES:
        program = case.program(replayer, step, stage)
        expected = oracle(program, scalars, window, tail)
        exact = np.asarray(replayer.results(program, scalars, window, tail, "float64"))
        assert not differ(exact, expected, program.result).any()
        flags = replayer._flags(program, "float32", scalars, window, tail)
        fast = np.asarray(replayer.results(program, scalars, window, tail, "float32"))
        kept = flags & STRAY == 0
        assert 0.02 < kept.mean() < 1  # both kinds are there
        assert not (differ(fast, expected, program.result) & kept).any()
        wide = decode(expected, program.result).view(np.uint32)
        recorded = decode(window[stage][1:], formats[stage]).view(np.uint32)
        assert np.array_equal((flags & DIFFERS != 0)[kept], differ(wide, recorded, FLOAT32)[kept])
        found, formulation = replayer.flags(program, scalars, window, tail)
        assert formulation == "float64"  # one stray is enough
        assert np.array_equal(found != 0, differ(wide, recorded, FLOAT32))
    # XLA:CPU has every instruction that float32 takes: ordinary recordings need no emulation.
    assert set(replayer.self_tests().values()) == {"passed"}


#: Around the smallest normal number, its root, its quotients by 1 - beta2 and lr, and the largest numbers.
EDGES = [-149, -140, -127, -126, -125, -123, -117, -116, -115, -106, -64, -63, -62, -58, -57, -53]
EDGES += [-30, -12, 0, 10, 60, 62, 63, 64, 120, 126, 127]


@pytest.mark.parametrize("k,name", list(enumerate(CATALOGUE)), ids=str)
def test_stray_marks_are_sound_at_their_edges(k, name):
    """Exponents drawn around every limit, full significands, zeros in between."""
    storage = FLOAT32 if FLOAT32 in CATALOGUE[name].storages else BFLOAT16
    amsgrad = CATALOGUE[name].amsgrad and k % 3 == 0
    decoupled = "decoupled" in CATALOGUE[name].decays and (k % 2 == 0 or name == "float32")
    case = Case(name, storage, FLOAT32, options=Options(decoupled=decoupled, amsgrad=amsgrad))
    rng = np.random.default_rng(k)
    for lr in (1e-3, 1e-10):
        given = case.given(weight_decay=0.1, lr=lr)
        step = case.step(given)
        if getattr(step, "flushes", False):
            pytest.skip("its implementation flushes subnormal numbers, which another test looks at")
        formats, window = case.formats(step), {}
        for tensor, fmt in (formats | {OWN_PARAM: step.param_format}).items():
            shape = (STEPS + (tensor != "grad"), ELEMENTS)
            values = np.ldexp(1 + rng.random(shape), rng.choice(EDGES, shape))
            values[:, ::2] = np.ldexp(1 + rng.random(shape), rng.integers(-70, 4, shape))[:, ::2]
            values *= (rng.random(shape) > 0.15) * rng.choice([-1, 1], shape)
            values = abs(values) if tensor.endswith("sq") else values
            window[tensor] = encode(values.astype(np.float32), fmt)
        scalars = case.scalars(step, given, [1, 2, 50, 9000])
        tail = (np.arange(ELEMENTS) % 5 == 0).astype(np.uint8)
        replayer = Replayer(PLACEMENT, formats, (STEPS, ELEMENTS))
        for stage in STAGES:
            program = case.program(replayer, step, stage)
            flags = replayer._flags(program, "float32", scalars, window, tail)
            fast = np.asarray(replayer.results(program, scalars, window, tail, "float32"))
            wrong = differ(fast, oracle(program, scalars, window, tail), program.result)
            if replayer._verdict(program, "float32"):
                continue  # it is not used
            assert not (wrong & (flags & STRAY == 0)).any(), (name, stage)
            assert (flags & STRAY == 0).mean() > 0.05


def ordinary_window(rng, formats):
    """Draw values such as a run has them."""
    scale = {"param": 0.02, "grad": 1e-3, "exp_avg": 1e-3}
    window = {}
    for name, fmt in formats.items():
        values = rng.uniform(0.1, 1, (STEPS + (name != "grad"), ELEMENTS)) * scale.get(name, 1e-6)
        window[name] = encode(values.astype(np.float32), fmt)
    return window


def usual(storage=BFLOAT16, moments=BFLOAT16, name="torch-cpu-loop", **options):
    """Return a case, its step and a replayer."""
    label = options.pop("variant", "")
    case = Case(name, storage, moments, label, Options(**options))
    step = case.step(case.given())
    return case, step, Replayer(PLACEMENT, case.formats(step), (STEPS, ELEMENTS))


@pytest.mark.parametrize(
    "name,stage",
    [
        ("torch-cpu-loop", "exp_avg"),
        ("torch-cpu-fused", "exp_avg"),
        ("torch-cpu-fused", "exp_avg_sq"),
        ("torch-cuda-fused", "exp_avg_sq"),
    ],
)
def test_fused_sums_are_fused_where_hardly_any_16_bit_result_tells(name, stage):
    """On the elements, one in 100,000, whose bfloat16 result a lost fusion changes."""
    case = Case(name)
    given = case.given()
    step = case.step(given)
    formats = case.formats(step)
    many = 1 << 20
    rng = np.random.default_rng(6)
    size = {"param": 0.02, "grad": 1e-3, "exp_avg": 1e-3, "exp_avg_sq": 1e-6}
    draws = {n: rng.normal(size=many).astype(np.float32) * np.float32(size[n]) for n in formats}
    draws["exp_avg_sq"] = abs(draws["exp_avg_sq"])
    patterns = {name: encode(values, formats[name]) for name, values in draws.items()}
    window = {n: np.tile(p, (STEPS + (n != "grad"), 1)) for n, p in patterns.items()}
    replayer = Replayer(PLACEMENT, formats, (STEPS, many))
    scalars = case.scalars(step, given, [1, 2, 50, 9000])
    program = case.program(replayer, step, stage)
    split = dataclasses.replace(program, step=dataclasses.replace(program.step, fuses=False))
    for bit in (0, 1):
        tail = np.full(many, bit, np.uint8)
        one = slice(0, 1)
        small = {n: v[: 1 + (n != "grad")] for n, v in window.items()}
        first = {n: v[one] for n, v in scalars.items()}
        ops = NumpyOperations()
        told = [
            ops.encode(p.step.replay(stage, ops, first, p.values(ops, small, 1, tail)), p.result)
            for p in (program, split)
        ]
        telling = np.flatnonzero((told[0] != told[1])[0])
        assert telling.size
        chosen = np.resize(telling, ELEMENTS)
        cut = {name: values[:, chosen] for name, values in window.items()}
        expected = oracle(program, scalars, cut, tail[chosen])
        tried = Replayer(PLACEMENT, formats, (STEPS, ELEMENTS))
        recorded = decode(cut[stage][1:], program.recorded).view(np.uint32)
        wanted = differ(decode(expected, program.result).view(np.uint32), recorded, FLOAT32)
        flags, formulation = tried.flags(program, scalars, cut, tail[chosen])
        found = np.asarray(tried.results(program, scalars, cut, tail[chosen], formulation))
        assert np.array_equal(found, expected)
        assert np.array_equal(flags != 0, wanted)


def test_subnormal_scalars_are_left_to_float64():
    """A device that takes subnormal numbers for zero would not see them; no element is marked."""
    case, step, replayer = usual(FLOAT32, FLOAT32)
    window = ordinary_window(np.random.default_rng(0), case.formats(step))
    tail = np.zeros(ELEMENTS, np.uint8)
    program = case.program(replayer, step, "param")
    for epsilon, wanted in [(1e-8, "float32"), (0.0, "float32"), (1e-40, "float64")]:
        given = case.given(epsilon=epsilon)
        scalars = case.scalars(step, given, range(1, STEPS + 1))
        flags, formulation = replayer.flags(program, scalars, window, tail)
        assert formulation == wanted
        expected = oracle(program, scalars, window, tail)
        assert np.array_equal(flags != 0, differ(expected, window["param"][1:], FLOAT32))


# --- the self-test ---


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


def ieee_root(self, a):
    return jnp.sqrt(a)


def unfused(self, a, b, c):
    return self.add(self.multiply(a, b), c)


def by_truncation(self, value, fmt):
    bits = lax.bitcast_convert_type(value, jnp.uint32)
    return lax.bitcast_convert_type(bits & np.uint32(0xFFFF0000), jnp.float32)


def ties_away(self, value, fmt):
    bits = lax.bitcast_convert_type(value, jnp.uint32) + np.uint32(0x8000)
    return lax.bitcast_convert_type(bits & np.uint32(0xFFFF0000), jnp.float32)


def dropped(self, value, fmt):
    return value


def dropped_double(self, a):
    bits = lax.bitcast_convert_type(a, jnp.uint64) & ~np.uint64((1 << 29) - 1)
    return lax.bitcast_convert_type(bits, jnp.float64).astype(jnp.float32)


def never(self, *values):
    return jnp.zeros(values[0].shape, bool)


def marks_everything(self, stray):
    self.strays = True | stray


BROKEN = [
    (
        "multiply",  # contracted with the sum after it
        unguarded,
        {"storage": FLOAT32, "variant": "no fused multiply-add"},
        "exp_avg_sq",
    ),
    ("multiply", unguarded, {"storage": FLOAT32}, "param"),
    ("divide", by_reciprocal, {"storage": FLOAT32}, "param"),
    ("divide", by_reciprocal, {"storage": FLOAT32, "name": "torch-cuda-foreach"}, "param"),
    ("sqrt", roughly, {"storage": FLOAT32}, "param"),
    ("mkl_amd_sqrt", ieee_root, {"storage": FLOAT32, "variant": MKL}, "param"),
    ("fma", unfused, {}, "exp_avg"),
    ("fma", unfused, {}, "exp_avg_sq"),
    ("fma", unfused, {"name": "torch-cuda-fused"}, "param"),
    ("round_to", by_truncation, {}, "exp_avg"),
    ("round_to", by_truncation, {}, "param"),
    ("round_to", ties_away, {}, "param"),
    ("round_to", dropped, {}, "param"),  # a cast that the compiler left out
    ("narrow", dropped_double, {"name": "torch-cuda-fused-legacy"}, "exp_avg"),
    ("less", never, {"name": "torch-cpu-fused", "amsgrad": True}, "param"),
]


@pytest.mark.usefixtures("fresh_programs")
@pytest.mark.parametrize(
    "name,broken,options,stage",
    BROKEN,
    ids=lambda x: getattr(x, "__name__", x.get("name", "") if isinstance(x, dict) else x),
)
def test_the_self_test_catches_a_broken_operation(monkeypatch, name, broken, options, stage):
    monkeypatch.setattr(operations.Float32Operations, name, broken)
    case, step, replayer = usual(**({"moments": FLOAT32} | options))
    program = case.program(replayer, step, stage)
    assert "expected" in replayer._verdict(program, "float32")
    # The audit goes on in float64, which is sound.
    replayer.require(program, "float64")


@pytest.mark.usefixtures("fresh_programs")
def test_the_self_test_catches_a_device_to_which_everything_is_subnormal(monkeypatch):
    monkeypatch.setattr(operations.Float32Operations, "_mark", marks_everything)
    case, step, replayer = usual()
    verdict = replayer._verdict(case.program(replayer, step, "param"), "float32")
    assert verdict == "it takes ordinary numbers for subnormal ones"


def rounded_twice(self, a, b, c):
    return operations._round64(a * b + c)


def flushed_operands(bits):
    tiny = bits & np.uint32(0x7F800000) == 0
    return exact_decoding(jnp.where(tiny, bits & np.uint32(1 << 31), bits))


def flushed_results(value):
    return lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32)


def without_nan(value):
    bits = exact_encoding(value)
    return jnp.where(bits << 1 > np.uint32(0xFF000000), np.uint32(0x7F800000), bits)


exact_decoding, exact_encoding = operations._float64_of_bits, operations._bits_of_float64

BROKEN_IN_FLOAT64 = [
    ("_float64_of_bits", flushed_operands, {}, "exp_avg"),
    ("_float64_of_bits", flushed_operands, {}, "param"),
    ("_bits_of_float64", flushed_results, {}, "exp_avg"),
    ("_bits_of_float64", flushed_results, {}, "exp_avg_sq"),
    ("_bits_of_float64", without_nan, {}, "exp_avg"),
    ("_bits_of_float64", without_nan, {}, "param"),
    ("divide", by_reciprocal, {"storage": FLOAT32}, "param"),
    ("multiply", unguarded, {"storage": FLOAT32}, "param"),  # not rounded to float32
    ("sqrt", ieee_root, {"storage": FLOAT32}, "param"),  # likewise
    ("fma", rounded_twice, {"storage": FLOAT32}, "exp_avg"),
    ("fma", unfused, {}, "exp_avg"),
    ("round_to", dropped, {}, "param"),
    ("is_nan", never, {"name": "torch-cpu-fused", "amsgrad": True}, "param"),
    ("less", never, {"name": "torch-cpu-fused", "amsgrad": True}, "param"),
]


@pytest.mark.usefixtures("fresh_programs")
@pytest.mark.parametrize("name,broken,options,stage", BROKEN_IN_FLOAT64)
def test_a_device_whose_float64_emulation_is_wrong_is_refused(
    monkeypatch, name, broken, options, stage
):
    where = operations if name.startswith("_") else operations.Float64Operations
    monkeypatch.setattr(where, name, broken)
    case, step, replayer = usual(**options)
    message = rf"self-test failed on cpu \(.*\): {stage} of {case.name} in float64: .* expected .*--backend"
    with pytest.raises(SelfTestError, match=message):
        replayer.require(case.program(replayer, step, stage), "float64")


@pytest.mark.usefixtures("fresh_programs")
def test_a_device_without_float64_is_refused(monkeypatch):
    def absent(value):
        raise TypeError("no float64 here")

    monkeypatch.setattr(operations, "_bits_of_float64", absent)
    case, step, replayer = usual()
    with pytest.raises(SelfTestError, match="does not run .no float64 here"):
        replayer.require(case.program(replayer, step, "param"), "float64")


@pytest.mark.usefixtures("fresh_programs")
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_broken_in_float32_is_done_in_float64_and_refused_where_that_is_broken_too(
    monkeypatch, stage
):
    """The same window, free of strays, on a sound device, on a broken one, and on a hopeless one."""
    case, step, replayer = usual(moments=FLOAT32)
    window = ordinary_window(np.random.default_rng(1), case.formats(step))
    tail = np.zeros(ELEMENTS, np.uint8)
    scalars = case.scalars(step, case.given(), range(1, STEPS + 1))
    program = case.program(replayer, step, stage)
    expected = decode(oracle(program, scalars, window, tail), program.result).view(np.uint32)
    recorded = decode(window[stage][1:], program.recorded).view(np.uint32)
    wanted = differ(expected, recorded, FLOAT32)
    for broken, formulation in [(False, "float32"), (True, "float64")]:
        if broken:
            replay._flags_program.cache_clear()
            replay._results_program.cache_clear()
            monkeypatch.setattr(operations.Float32Operations, "round_to", by_truncation)
        replayer = usual(moments=FLOAT32)[2]
        flags, found = replayer.flags(program, scalars, window, tail)
        assert found == formulation and np.array_equal(flags != 0, wanted)
        verdicts = replayer.self_tests()
        assert verdicts[f"torch-cpu-loop {stage} in {formulation}"] == "passed"
        assert all((v == "passed") != (broken and "float32" in k) for k, v in verdicts.items())
    replay._flags_program.cache_clear()
    replay._results_program.cache_clear()
    monkeypatch.setattr(operations.Float64Operations, "round_to", dropped)
    with pytest.raises(SelfTestError, match=f"{stage} of torch-cpu-loop in float64"):
        usual(moments=FLOAT32)[2].flags(program, scalars, window, tail)


# --- what was not recorded ---


FREE = [
    (Case("torch-cpu-loop"), ("exp_avg", "exp_avg_sq")),
    (Case("torch-cpu-loop", options=Options(amsgrad=True)), ("max_exp_avg_sq",)),
    (Case("torch-cpu-loop", moments=FLOAT32, options=L2), ("exp_avg_sq",)),
    (Case("torch-cpu-loop", FLOAT32, FLOAT32, MKL), ("exp_avg", "exp_avg_sq")),
    (
        Case("torch-cpu-fused", options=Options(decoupled=False, amsgrad=True)),
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    ),
    (Case("torch-cuda-fused-legacy"), ("exp_avg",)),
    (Case("float32-master"), ("exp_avg", "exp_avg_sq", "param")),
    (Case("float32-master", FLOAT16, FLOAT32, options=L2), ("param",)),
    (
        Case("float32-master", options=Options(amsgrad=True)),
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "param"),
    ),
    (Case("float32-then-bfloat16"), ("exp_avg", "exp_avg_sq")),
]


@pytest.mark.parametrize("case,hidden", FREE, ids=str)
def test_free_runs_are_the_step_repeated(case, hidden):
    """Over three windows, the last of them short, against a loop in NumPy, bit for bit."""
    total = 2 * STEPS + 2
    given = case.given(steps=total)
    step = case.step(given)
    formats = {k: v for k, v in case.formats(step).items() if k not in hidden or k == "param"}
    replayer = Replayer(PLACEMENT, formats, (STEPS, ELEMENTS))
    assert replayer.hidden(step) == hidden
    rng = np.random.default_rng(2)
    recorded = {name: draw_wild(rng, name, fmt, 3 * STEPS + 1) for name, fmt in formats.items()}
    tail = (np.arange(ELEMENTS) % 3 == 0).astype(np.uint8)
    run = FreeRun(replayer, step, case.arithmetic.rule, case.name, hidden)
    found = {name: [] for name in hidden}
    for first in (0, STEPS, 2 * STEPS):
        steps = min(STEPS, total - first)
        timesteps = [min(first + k, total - 1) + 1 for k in range(STEPS)]
        window = {n: v[first + (n == "grad") : first + STEPS + 1] for n, v in recorded.items()}
        part = run.advance(case.scalars(step, case.given(), timesteps), window, tail, steps)
        for name, patterns in part.items():
            patterns = np.asarray(patterns)
            assert patterns.shape == (STEPS + 1, ELEMENTS)
            assert patterns.dtype == step.format_of(name).pattern_dtype
            if found[name]:  # each window starts where the one before ended
                assert np.array_equal(patterns[0], found[name][-1])
            found[name] += list(patterns[(1 if found[name] else 0) : steps + 1])

    ops = NumpyOperations()
    values = {name: decode(patterns, formats[name]) for name, patterns in recorded.items()}
    zeros = np.zeros(ELEMENTS, np.float32)
    state = {name: values[name][0] if name == "param" else zeros for name in hidden}
    scalars = case.scalars(step, given, range(1, total + 1))
    for k in range(total + 1):
        for name in hidden:
            fmt = step.format_of(name)
            assert not differ(found[name][k], ops.encode(state[name], fmt), fmt).any(), (name, k)
        if k == total:
            break
        before = {n: v[k + (n == "grad")] for n, v in values.items() if n not in hidden}
        after = {n: v[k + 1] for n, v in values.items() if n not in (*hidden, "grad")}
        at = {key: value[k] for key, value in scalars.items()}
        with np.errstate(all="ignore"):
            new = step.advance(ops, at, before | state | {"tail": tail}, after)
        state = {name: new[name] for name in hidden}


def test_a_kept_weight_is_replayed_from_itself():
    """float32-master end to end: what runs freely gives the recorded 16-bit copies."""
    case = Case("float32-master", moments=FLOAT32)
    given = case.given()
    step = case.step(given)
    rng = np.random.default_rng(4)
    ops, tail = NumpyOperations(), np.zeros(ELEMENTS, np.uint8)
    grads = decode(
        encode(rng.normal(size=(STEPS, ELEMENTS)).astype(np.float32), BFLOAT16), BFLOAT16
    )
    start = encode(rng.normal(size=ELEMENTS).astype(np.float32), BFLOAT16)
    zeros = np.zeros(ELEMENTS, np.float32)
    states = [{"param": decode(start, BFLOAT16), "exp_avg": zeros, "exp_avg_sq": zeros}]
    scalars = case.scalars(step, given, range(1, STEPS + 1))
    for k in range(STEPS):
        at = {key: value[k] for key, value in scalars.items()}
        states.append(step.advance(ops, at, states[-1] | {"grad": grads[k], "tail": tail}, {}))
    window = {"grad": encode(grads, BFLOAT16)} | {
        name: np.stack([encode(s[name], BFLOAT16 if name == "param" else FLOAT32) for s in states])
        for name in states[0]
    }
    replayer = Replayer(PLACEMENT, case.formats(step), (STEPS, ELEMENTS))
    run = FreeRun(replayer, step, case.arithmetic.rule, case.name, ("param",))
    found = run.advance(scalars, window, tail, STEPS)
    whole = window | {OWN_PARAM: found["param"]}
    for stage in STAGES:
        program = case.program(replayer, step, stage)
        flags, _ = replayer.flags(program, scalars, whole, tail)
        assert flags is None, stage
    # The copies alone do not tell the next weight.
    careless = window | {OWN_PARAM: encode(decode(window["param"], BFLOAT16), FLOAT32)}
    assert replayer.flags(program, scalars, careless, tail)[0].mean() > 0.01


@pytest.mark.usefixtures("fresh_programs")
def test_a_free_run_on_a_device_that_cannot_is_refused(monkeypatch):
    """Each hidden tensor's own program is tried: here `torch.maximum`, that must keep a NaN."""
    monkeypatch.setattr(operations.Float64Operations, "is_nan", never)
    case = Case("torch-cpu-loop", options=Options(amsgrad=True))
    step = case.step(case.given())
    formats = case.formats(step)
    del formats["max_exp_avg_sq"]
    replayer = Replayer(PLACEMENT, formats, (STEPS, ELEMENTS))
    with pytest.raises(
        SelfTestError, match="free run of torch-cpu-loop in float64: max_exp_avg_sq"
    ):
        FreeRun(replayer, step, case.arithmetic.rule, case.name, ("max_exp_avg_sq",))


def test_stages_that_are_alike_are_one_program():
    """What a stage does not depend on is no part of its program, so that it is compiled once."""
    formats = dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq"), BFLOAT16)
    replayer = Replayer(PLACEMENT, formats, (STEPS, ELEMENTS))

    def program(name, stage, **options):
        case = Case(name, options=Options(**options))
        return case.program(replayer, case.step(case.given()), stage)

    assert program("torch-cuda-loop", "exp_avg") == program("torch-cuda-foreach", "exp_avg")
    assert program("torch-cpu-loop", "exp_avg") == program(
        "torch-cpu-loop", "exp_avg", amsgrad=True
    )
    assert program("torch-cpu-loop", "param") == program("torch-cpu-loop", "param", maximize=True)
    assert program("torch-cpu-loop", "param") != program("torch-cuda-foreach", "param")
    l2 = program("torch-cpu-loop", "exp_avg", decoupled=False)
    assert program("torch-cpu-loop", "exp_avg") != l2
    assert [i.name for i in l2.inputs] == ["grad", "param", "exp_avg"]
    assert "param" not in [i.name for i in program("torch-cpu-loop", "exp_avg").inputs]
