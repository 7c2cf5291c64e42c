"""Causes of differing results: real programs, planted traits, and whether the remedies help."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxaudit import floats
from jaxaudit.devices import find_device
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from jaxaudit.operations import (
    FlushingNumpyOperations,
    NumpyOperations,
    compile_exactly,
    operations_of,
)
from jaxaudit.rounding import causes, certificate
from jaxaudit.rounding.causes import Samples, explain
from jaxaudit.rounding.checks import all_checks
from jaxaudit.rounding.modes import COMPILED, PYTORCH, REDUCED, JaxNotation, observed_format

CHECKS = {check.name: check for check in all_checks("cpu")}
CUDA_CHECKS = {check.name: check for check in all_checks("cuda")}
WITHOUT_ALGSIMP = {"xla_disable_hlo_passes": "algsimp"}
NOTATION = JaxNotation()


# Running a program, and comparing.


@functools.cache
def operands_of(name):
    """Return hard operands: all patterns where there are 2^16, else a part of a quick certificate's."""
    check = CHECKS[name]
    block = check.quick().block(0)
    step = 1 if len(block) == 1 and check.formats[0].width == 16 else 13
    even = len(block[0][::step]) // 2 * 2  # some operations in PyTorch are run on pairs
    return tuple(np.ascontiguousarray(patterns[::step][:even]) for patterns in block)


@functools.cache
def ieee_of(name):
    return certificate.ieee(CHECKS[name], operands_of(name)).patterns


def run(check, mode, function, operands, options=None):
    """Return the patterns that a function of JAX arrays gives in a mode."""
    wide = observed_format(check, mode)
    formats = check.formats
    if mode == REDUCED:
        neutral = [np.array(x).astype(f.value_dtype).view(f.pattern_dtype) for x, f in zip(check.neutral, formats, strict=True)]  # fmt: skip
        operands = [np.stack([p, np.full_like(p, z)], -1) for p, z in zip(operands, neutral, strict=True)]  # fmt: skip
    with jax.enable_x64(True):
        arrays = [jnp.asarray(p.view(f.value_dtype)) for p, f in zip(operands, formats, strict=True)]  # fmt: skip

        def whole(*values):
            result = function(*values).astype(wide.value_dtype)
            return result.sum(-1) if mode == REDUCED else result

        if mode != "eager":
            whole = jax.jit(whole, compiler_options=options or COMPILED[mode])
        return np.asarray(whole(*arrays)).view(wide.pattern_dtype)


@functools.cache
def natural(name, mode):
    check = CHECKS[name]
    return run(check, mode, functools.partial(check.natural, NOTATION), operands_of(name))


def run_torch(name):
    torch = pytest.importorskip("torch")
    check = CHECKS[name]
    tensors = [
        torch.from_numpy(p.view(f"int{f.width}")).view(getattr(torch, f.name))
        for p, f in zip(operands_of(name), check.formats, strict=True)
    ]
    torch.sqrt(torch.ones(64))  # MKL's first call must not be one of many threads
    result = check.torch(torch, *tensors).detach().view(getattr(torch, f"int{check.result.width}"))
    return result.numpy().view(check.result.pattern_dtype)


def unlike(a, b, fmt):
    return (a != b) & ~(floats.is_nan(a, fmt) & floats.is_nan(b, fmt))


def differing(check, mode, found, wanted):
    fmt = observed_format(check, mode)
    if mode == REDUCED:
        wanted = floats.decode(wanted, check.result)
        wanted = (wanted.astype(fmt.value_dtype) + 0).view(fmt.pattern_dtype)  # -0 + 0 is +0
    return unlike(found, wanted, fmt)


def sampled(check, mode, operands, found, wanted):
    """Choose as a certificate does: at most 2,048 elements, most of which differ."""
    differs = differing(check, mode, found, wanted)
    chosen = []
    for part, count in ((np.flatnonzero(differs), 1792), (np.flatnonzero(~differs), 256)):
        chosen.append(part[:: max(1, part.size // count)][:count])
    at = np.sort(np.concatenate(chosen))
    return Samples(tuple(p[at] for p in operands), wanted[at], found[at])


def explain_natural(name, mode):
    check, wanted = CHECKS[name], ieee_of(name)
    samples = sampled(check, mode, operands_of(name), natural(name, mode), wanted)
    return explain(check, mode, "ieee", "cpu", samples)


# Causes in real programs.

FLUSHED = "XLA:CPU takes subnormal numbers for zero"
CONTRACTED = "XLA's compiler (LLVM) contracts the product and the sum to a fused multiply-add"
LEFT = "XLA's compiler (LLVM) contracts a product on the left of a sum, PyTorch's kernels only those on the right"
FUSED = "PyTorch's kernel contracts the product and the sum to a fused multiply-add, JAX rounds both here"
RECIPROCAL = "XLA divides by a Python number by multiplying with its reciprocal"
DROPPED = "XLA drops the rounding to {} before the sum"
STEPWISE = "JAX rounds to {} after every operation, PyTorch's kernels compute in float32 and round once each"
NUMBER = "JAX rounds the Python number to {} before it uses it, PyTorch keeps it in float32"
TWICE = "XLA rounds float64 to float32 first and that to bfloat16"
MKL = "PyTorch takes float32 square roots with Intel's MKL, which does not round them correctly on AMD processors"


@pytest.mark.parametrize(
    "name, mode, clauses",
    [
        ("float32 multiply", "jit", [FLUSHED]),
        ("float32 sqrt", "eager", [FLUSHED]),
        ("bfloat16 to float64", "jit", [FLUSHED]),
        ("bfloat16 negate", REDUCED, [FLUSHED]),
        ("float32 divide by a scalar", "jit", [FLUSHED, RECIPROCAL]),
        ("float32 divide by a scalar", "eager", [FLUSHED, RECIPROCAL]),
        ("float32 divide by a scalar", "jit-algsimp-off", [FLUSHED]),
        ("float32 to bfloat16 and back", REDUCED, [FLUSHED, DROPPED.format("bfloat16")]),
        ("float64 to float32 and back", REDUCED, [FLUSHED, DROPPED.format("float32")]),
        ("bfloat16 add", REDUCED, [FLUSHED, DROPPED.format("bfloat16")]),
        ("float16 multiply by a scalar", "jit", [NUMBER.format("float16")]),
        ("bfloat16 divide by a scalar", "jit", [FLUSHED, NUMBER.format("bfloat16")]),
        ("bfloat16 add a multiple", "jit", [FLUSHED, STEPWISE.format("bfloat16")]),
        ("float64 to bfloat16", "eager", [FLUSHED, TWICE]),
        ("float32 lerp", "eager", [FLUSHED, FUSED]),
        ("float32 lerp", "jit", [FLUSHED]),
        ("float32 Adam: exp_avg_sq", "jit", [LEFT, FLUSHED]),
        ("float32 Adam: param", "jit", [LEFT, FLUSHED, RECIPROCAL]),
    ],
)
def test_cause_of_a_real_program(name, mode, clauses):
    assert explain_natural(name, mode).cause == "; ".join(clauses) + "."


@pytest.mark.parametrize("mode", ["eager", "jit", REDUCED, "jit-algsimp-off"])
@pytest.mark.parametrize(
    "name",
    [
        "float64 to bfloat16", "bfloat16 lerp", "float16 divide by a scalar", "bfloat16 addcdiv",
        "float32 add a multiple", "float32 addcmul", "float32 addcdiv", "bfloat16 Adam: param",
        "float16 Adam: param", "bfloat16 Adam: exp_avg_sq", "float32 Adam: param", "bfloat16 rsqrt",
    ],
)  # fmt: skip
def test_nothing_stays_unexplained(name, mode):
    explanation = explain_natural(name, mode)
    assert explanation.cause
    assert explanation.remedy
    assert "xplain" not in explanation.cause


def unfused(name):
    """Return a check that asks for a product and a sum that are rounded each, and its operands' results."""
    check = dataclasses.replace(
        CHECKS[name],
        formula=lambda ops, s, x, y: ops.add(x, ops.multiply(s["c"], y)),
    )
    ops, values = NumpyOperations(), decoded(check, operands_of(name))
    return check, floats.encode(check.formula(ops, check.scalars, *values), check.result)


def decoded(check, operands):
    return [floats.decode(p, fmt) for p, fmt in zip(operands, check.formats, strict=True)]


def test_contraction_is_named_where_none_is_wanted():
    name = "float32 add a multiple"
    check, wanted = unfused(name)
    samples = sampled(check, "jit", operands_of(name), natural(name, "jit"), wanted)
    explanation = explain(check, "jit", "ieee", "cpu", samples)
    assert explanation.cause == f"{FLUSHED}; {CONTRACTED}."
    assert "exclusive or" in explanation.remedy


def test_nothing_differs():
    check = CHECKS["float32 add"]
    patterns = np.arange(5, dtype=np.uint32)
    samples = Samples((patterns, patterns), patterns, patterns.copy())
    assert explain(check, "jit", "ieee", "cpu", samples) == causes.Explanation("", "")


def test_nans_are_alike_and_a_sum_forgets_the_sign_of_zero():
    check = CHECKS["bfloat16 negate"]
    operands = np.array([0, 0x7FC0], np.uint16)
    wanted = np.array([0x8000, 0xFFC0], np.uint16)
    samples = Samples((operands,), wanted, np.array([0, 0x7FC00001], np.uint32))
    assert not explain(check, REDUCED, "ieee", "cpu", samples).cause


# PyTorch.


def test_pytorch_is_the_one_that_differs():
    name = "float64 to bfloat16"
    check, found, wanted = CHECKS[name], run_torch(name), ieee_of(name)
    samples = sampled(check, PYTORCH, operands_of(name), found, wanted)
    cause = explain(check, PYTORCH, "ieee", "cpu", samples).cause
    assert cause == "PyTorch rounds float64 to float32 first and that to bfloat16."
    samples = sampled(check, "jaxaudit", operands_of(name), wanted, found)
    assert explain(check, "jaxaudit", "pytorch", "cpu", samples).cause == cause
    samples = sampled(check, "jit", operands_of(name), natural(name, "jit"), found)
    assert explain(check, "jit", "pytorch", "cpu", samples).cause == f"{FLUSHED}."


@pytest.mark.parametrize("name", ["float32 sqrt", "float32 Adam: param"])
def test_roots_of_mkl(name):
    check, found, wanted = CHECKS[name], run_torch(name), ieee_of(name)
    if not unlike(found, wanted, FLOAT32).any():
        pytest.skip("PyTorch rounds roots correctly here")
    samples = sampled(check, PYTORCH, operands_of(name), found, wanted)
    assert explain(check, PYTORCH, "ieee", "cpu", samples).cause == f"{MKL}."
    samples = sampled(check, "jit", operands_of(name), natural(name, "jit"), found)
    cause = explain(check, "jit", "pytorch", "cpu", samples).cause
    assert MKL in cause and FLUSHED in cause and "xplain" not in cause


@pytest.mark.parametrize(
    "name, trait, text",
    [
        ("float32 lerp", "uncontracted", "This build of PyTorch rounds products before it adds them."),
        ("bfloat16 add a multiple", "product rounded", "This build of PyTorch rounds products before it adds them."),
        ("float32 multiply", "flushed", "PyTorch takes subnormal numbers for zero."),
    ],
)  # fmt: skip
def test_traits_of_a_build_of_pytorch(name, trait, text):
    check, operands = CHECKS[name], operands_of(name)
    context = causes._Context(check, PYTORCH, "ieee", "cpu")
    hypotheses = causes._FormulaHypotheses(context, decoded(check, operands))
    found = hypotheses.simulate(frozenset({trait}))
    samples = sampled(check, PYTORCH, operands, found, ieee_of(name))
    assert explain(check, PYTORCH, "ieee", "cpu", samples).cause == text


# Planted traits.


def planted(check, mode, platform, operands, traits, moved=(0, 0)):
    """Simulate what one writes in JAX with more traits of the compiler."""
    context = causes._Context(check, mode, "ieee", platform)
    hypotheses = causes._NaturalHypotheses(context, decoded(check, operands))
    with np.errstate(all="ignore"):
        return hypotheses.simulate(hypotheses._meaning() | frozenset(traits), moved)


@pytest.mark.parametrize(
    "name, mode, traits, clauses",
    [
        ("float32 Adam: param", "jit", ["contracted"], [LEFT]),
        ("float32 Adam: param", "jit", ["reciprocal", "flushed"], [FLUSHED, RECIPROCAL, FUSED]),
        ("float32 addcdiv", "jit", ["flushed"], [FLUSHED]),
        ("bfloat16 sqrt", REDUCED, ["last dropped"], [DROPPED.format("bfloat16")]),
        # Once the number is kept and the result rounded, a reciprocal does no harm: it is not named.
        (
            "bfloat16 divide by a scalar", REDUCED, ["last dropped", "reciprocal"],
            [DROPPED.format("bfloat16"), NUMBER.format("bfloat16")],
        ),
        ("float16 addcdiv", "jit", ["dropped"], [NUMBER.format("float16")]),
    ],
)  # fmt: skip
def test_planted_traits_are_found(name, mode, traits, clauses):
    check, operands = CHECKS[name], operands_of(name)
    found = planted(check, mode, "cpu", operands, traits)
    samples = sampled(check, mode, operands, found, ieee_of(name))
    assert explain(check, mode, "ieee", "cpu", samples).cause == "; ".join(clauses) + "."


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, check in CUDA_CHECKS.items()
        if name in CHECKS and check.family in ("optimizer parts", "Adam steps")
    ],
)
def test_formulas_of_cuda_are_reached(name):
    check = CUDA_CHECKS[name]
    operands = tuple(p[::16] for p in operands_of(name))
    wanted = certificate.ieee(check, operands).patterns
    found = planted(check, "eager", "cuda", operands, [])
    samples = sampled(check, "eager", operands, found, wanted)
    assert "xplain" not in explain(check, "eager", "ieee", "cuda", samples).cause


@pytest.mark.parametrize(
    "moved, text",
    [
        ((1, 0), "XLA divides approximately on this device: up to 1 float32 ulp"),
        ((-2, 0), "XLA divides approximately on this device: up to 2 float32 ulp"),
        ((1, -1), "XLA divides and takes square roots approximately on this device: up to 1"),
    ],
)
def test_approximate_divisions(moved, text):
    check, operands = CUDA_CHECKS["float32 Adam: param"], operands_of("float32 Adam: param")
    found = planted(check, "jit", "cuda", operands, ["contracted"])
    approximate = planted(check, "jit", "cuda", operands, ["contracted"], moved)
    found = np.where(np.arange(found.size) % 3 == 0, approximate, found)
    wanted = certificate.ieee(check, operands).patterns
    samples = sampled(check, "jit", operands, found, wanted)
    explanation = explain(check, "jit", "ieee", "cuda", samples)
    assert explanation.cause.startswith(text)
    assert "explains" not in explanation.cause
    assert "Float64Operations" in explanation.remedy


def test_what_is_not_explained_is_counted():
    name = "float32 multiply"
    check, operands, wanted = CHECKS[name], operands_of(name), ieee_of(name)
    samples = sampled(check, "jit", operands, natural(name, "jit"), wanted)
    differs = np.flatnonzero(unlike(samples.found, samples.wanted, FLOAT32))
    found = samples.found.copy()
    found[differs[:7]] = 0x3F800000 + np.arange(7, dtype=np.uint32)
    tampered = Samples(samples.operands, samples.wanted, found)
    cause = explain(check, "jit", "ieee", "cpu", tampered).cause
    total = f"{differs.size:,}"
    assert cause.startswith(FLUSHED)
    assert f"explains {differs.size - 7:,} of {total} differing samples; the rest is not" in cause


def test_nothing_explains_chance():
    check, operands = CHECKS["float32 add"], operands_of("float32 add")
    found = np.random.default_rng(1).integers(0, 1 << 31, operands[0].size, dtype=np.uint32)
    samples = sampled(check, "jit", operands, found, ieee_of("float32 add"))
    explanation = explain(check, "jit", "ieee", "cpu", samples)
    assert explanation.cause.startswith("Not explained")


# Remedies. Subnormal numbers are left out where a remedy is about something else.


def settled(name):
    return without_subnormals(CHECKS[name], operands_of(name), ieee_of(name))


def without_subnormals(check, operands, wanted):
    """Tell where no subnormal number of float32 is met."""
    values = decoded(check, operands)
    with np.errstate(all="ignore"):
        if check.formats[0] is FLOAT64:
            normal = np.abs(floats.decode(wanted, check.result)) >= 2.0**-126
            return normal & (np.abs(values[0]) > 2.0**-125)
        result = check.formula(FlushingNumpyOperations(), check.scalars, *values)
        normal = ~unlike(floats.encode(result, check.result), wanted, check.result)
        for value in values:
            normal &= (value == 0) | ~(np.abs(value) < 2.0**-126)
    return normal


def to_bfloat16(x):
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def to_float16(x):
    return x.astype(jnp.float16)


def to_float32(x):
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=23)


ROUND = {"bfloat16": to_bfloat16, "float16": to_float16}


def widened(function):
    return lambda *values: function(*(x.astype(jnp.float32) for x in values))


def remedied_part(name):
    """Write an operation in float32 with Python numbers as float32, rounded once, as the remedy says."""
    fmt, kind = name.split(" ", 1)
    rounded, f = ROUND[fmt], np.float32
    narrow = {"bfloat16": BFLOAT16, "float16": FLOAT16}[fmt].value_dtype
    root, step_size = np.sqrt(1 - 0.999**10), -1e-3 / (1 - 0.9**10)
    written = {
        "multiply by a scalar": lambda x: rounded(x * f(0.999)),
        "divide by a scalar": lambda x: rounded(x / f(root)),
        "add a multiple": lambda x, y: rounded(x + f(np.array(0.01).astype(narrow)) * y),
        "lerp": lambda m, g: rounded(m + f(1 - 0.9) * (g - m)),
        "addcmul": lambda v, a, b: rounded(v + f(1 - 0.999) * a * b),
        "addcdiv": lambda p, a, b: rounded(p + f(step_size) * a / b),
    }
    return widened(written[kind])


def assert_right(name, mode, function, options=None):
    check = CHECKS[name]
    found = run(check, mode, function, operands_of(name), options)
    wrong = differing(check, mode, found, ieee_of(name)) & settled(name)
    assert settled(name).mean() > 0.5
    assert wrong.sum() == 0


@pytest.mark.parametrize("mode", ["jit", REDUCED])
@pytest.mark.parametrize("fmt", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "kind",
    ["multiply by a scalar", "divide by a scalar", "add a multiple", "lerp", "addcmul", "addcdiv"],
)
def test_widening_and_rounding_once_helps(fmt, kind, mode):
    name = f"{fmt} {kind}"
    assert_right(name, mode, remedied_part(name))
    if differing(CHECKS[name], mode, natural(name, mode), ieee_of(name))[settled(name)].any():
        assert "Widen the operands to float32" in explain_natural(name, mode).remedy


def remedied_adam(fmt, stage):
    """Write PyTorch's step as the remedies say, with a rounding where each of its kernels ends."""
    f = np.float32
    epsilon = np.array({"bfloat16": 1e-8, "float16": 1e-4}[fmt])
    addend = f(epsilon.astype({"bfloat16": BFLOAT16, "float16": FLOAT16}[fmt].value_dtype))

    def step(p, m, v, g):
        if fmt == "float16":
            r = lambda x: x.astype(jnp.float16).astype(jnp.float32)  # noqa: E731
        else:
            r = to_bfloat16
        p, m = r(p * f(1 - 1e-3 * 0.01)), r(m + f(1 - 0.9) * (g - m))
        v = r(v * f(0.999))
        v = r(v + f(1 - 0.999) * g * g)
        root = r(r(jnp.sqrt(v)) / f(np.sqrt(1 - 0.999**10)))
        p = r(p + f(-1e-3 / (1 - 0.9**10)) * m / r(root + addend))
        return {"exp_avg": m, "exp_avg_sq": v, "param": p}[stage]

    return widened(step)


@pytest.mark.parametrize("mode", ["jit", REDUCED])
@pytest.mark.parametrize("fmt", ["bfloat16", "float16"])
@pytest.mark.parametrize("stage", ["exp_avg", "exp_avg_sq", "param"])
def test_widening_and_rounding_after_each_kernel_helps(stage, fmt, mode):
    assert_right(f"{fmt} Adam: {stage}", mode, remedied_adam(fmt, stage), WITHOUT_ALGSIMP)


@pytest.mark.parametrize(
    "name, rounded",
    [
        ("float32 to bfloat16", to_bfloat16),
        ("float32 to bfloat16 and back", to_bfloat16),
        ("float64 to float32 and back", to_float32),
    ],
)
def test_reduce_precision_survives_a_sum(name, rounded):
    assert_right(name, REDUCED, rounded)
    assert "lax.reduce_precision" in explain_natural(name, REDUCED).remedy


@pytest.mark.parametrize("name", ["bfloat16 sqrt", "bfloat16 rsqrt", "bfloat16 add", "bfloat16 divide"])  # fmt: skip
def test_reduce_precision_of_one_operation_survives_a_sum(name):
    function = functools.partial(CHECKS[name].natural, NOTATION)
    assert_right(name, REDUCED, lambda *values: to_bfloat16(widened(function)(*values)))


@pytest.mark.parametrize("mode", ["jit", REDUCED])
def test_division_without_the_algebraic_simplifier(mode):
    name = "float32 divide by a scalar"
    function = functools.partial(CHECKS[name].natural, NOTATION)
    assert_right(name, mode, function, WITHOUT_ALGSIMP)
    assert "algsimp" in explain_natural(name, mode).remedy


@pytest.mark.parametrize("mode", ["eager", "jit", REDUCED])
def test_division_by_an_array(mode):
    name = "float32 divide by a scalar"
    divide, check = CHECKS["float32 divide"], CHECKS[name]
    divisor = np.full_like(operands_of(name)[0], check.scalars["c"].view(np.uint32))
    found = run(divide, mode, lambda x, c: x / c, (*operands_of(name), divisor))
    assert not (differing(check, mode, found, ieee_of(name)) & settled(name)).any()
    assert "an array of the operand's shape" in explain_natural(name, mode).remedy


def guarded(value, zero):
    bits = lax.bitcast_convert_type(value, jnp.uint32) ^ zero
    return lax.bitcast_convert_type(bits, jnp.float32)


def test_guard_stops_contraction():
    name = "float32 add a multiple"
    check, wanted = unfused(name)
    c = check.scalars["c"]
    function = jax.jit(lambda x, y, zero: x + guarded(c * y, zero))
    x, y = decoded(check, operands_of(name))
    found = np.asarray(function(x, y, np.uint32(0))).view(np.uint32)
    normal = without_subnormals(check, operands_of(name), wanted)
    assert normal.mean() > 0.5
    assert not (unlike(found, wanted, FLOAT32) & normal).any()


def test_guard_of_products_on_the_left():
    name = "float32 Adam: exp_avg_sq"
    function = jax.jit(
        lambda v, g, zero: guarded(v * np.float32(0.999), zero) + np.float32(1 - 0.999) * g * g
    )
    _, _, v, g = decoded(CHECKS[name], operands_of(name))
    found = np.asarray(function(v, g, np.uint32(0))).view(np.uint32)
    assert not (unlike(found, ieee_of(name), FLOAT32) & settled(name)).any()


def test_guard_and_no_algebraic_simplifier_for_a_whole_step():
    name, f = "float32 Adam: param", np.float32

    def step(p, m, v, g, zero):
        m = m + f(1 - 0.9) * (g - m)
        v = guarded(v * f(0.999), zero) + f(1 - 0.999) * g * g
        divisor = jnp.sqrt(v) / f(np.sqrt(1 - 0.999**10)) + f(1e-8)
        return guarded(p * f(1 - 1e-3 * 0.01), zero) + f(-1e-3 / (1 - 0.9**10)) * m / divisor

    compiled = jax.jit(step, compiler_options=WITHOUT_ALGSIMP)
    values = decoded(CHECKS[name], operands_of(name))
    found = np.asarray(compiled(*values, np.uint32(0))).view(np.uint32)
    assert not (unlike(found, ieee_of(name), FLOAT32) & settled(name)).any()


def formulated(check, operands, formula):
    """Run a formula with `Float64Operations`, as the remedies say."""

    def program(zero, *patterns):
        ops = operations_of("float64", zero)
        values = [ops.decode(p, fmt) for p, fmt in zip(patterns, check.formats, strict=True)]
        value = formula(ops, *values)
        return ops.encode(
            value if check.result is FLOAT64 else ops.round_to(value, check.result), check.result
        )

    with jax.enable_x64(True):
        return np.asarray(
            compile_exactly(program, find_device("cpu"))(np.uint32(0), *map(jnp.asarray, operands))
        )


@pytest.mark.parametrize(
    "name",
    [
        "float32 multiply", "float32 sqrt", "float32 add", "bfloat16 divide", "float64 to float32",
        "float64 to bfloat16", "bfloat16 to float64", "float32 to float64", "float32 lerp",
    ],
)  # fmt: skip
def test_float64_operations_keep_subnormal_numbers_and_fuse(name):
    check, operands = CHECKS[name], operands_of(name)
    numbers = {key: np.float64(c) for key, c in check.scalars.items()}
    found = formulated(check, operands, lambda ops, *values: check.formula(ops, numbers, *values))
    assert not unlike(found, ieee_of(name), check.result).any()


def test_remedies_for_roots_of_mkl():
    torch = pytest.importorskip("torch")
    name = "float32 sqrt"
    check, found = CHECKS[name], run_torch(name)
    if not unlike(found, ieee_of(name), FLOAT32).any():
        pytest.skip("PyTorch rounds roots correctly here")
    same = formulated(check, operands_of(name), lambda ops, x: ops.mkl_amd_sqrt(x))
    assert not unlike(same, found, FLOAT32).any()
    x = torch.from_numpy(operands_of(name)[0].view(np.float32))
    right = x.double().sqrt().float().numpy().view(np.uint32)
    assert not unlike(right, ieee_of(name), FLOAT32).any()


def test_remedy_for_pytorchs_two_roundings():
    name = "float64 to bfloat16"
    wanted, check = run_torch(name), CHECKS[name]
    function = lambda x: x.astype(jnp.float32).astype(jnp.bfloat16)  # noqa: E731
    found = run(check, "jit", function, operands_of(name))
    assert not (unlike(found, wanted, BFLOAT16) & settled(name)).any()


@pytest.mark.parametrize("checks", [CHECKS, CUDA_CHECKS], ids=["cpu", "cuda"])
def test_every_check_can_be_simulated(checks):
    for check in checks.values():
        operands = tuple(np.zeros(3, fmt.pattern_dtype) for fmt in check.formats)
        for mode in ("eager", REDUCED):
            assert planted(check, mode, "cpu", operands, ["flushed"]).shape == (3,)
