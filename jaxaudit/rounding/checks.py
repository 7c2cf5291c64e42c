"""The operations of a rounding certificate, each written four times over.

Every operation is a `Check`: how a user writes it in JAX and in PyTorch, what it is to compute to the bit, in
terms of `operations.Operations` (this is what jaxaudit runs), and, where it is a single operation of IEEE 754,
its name in `exact.EXACT`. Formulas of composed operations are PyTorch's on the platform, with its roundings: R
rounds to the format of the operation, f to float32; everything else is float32, and rounds once per operation.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np

from jaxaudit.arithmetics import CATALOGUE, Options, make_step
from jaxaudit.floats import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    Format,
    round_scalar,
)
from jaxaudit.hyperparameters import Hyperparameters, StepCount
from jaxaudit.operations import Operations, Value
from jaxaudit.rounding import operands
from jaxaudit.rounding.operands import BLOCK, Kind, Operands
from jaxaudit.scalars import scalars_of
from jaxaudit.steps import STAGES, Stage, Step

#: Where an operation runs: PyTorch's kernels differ between the two.
Platform = Literal["cpu", "cuda"]

Family = Literal["casts", "unary", "binary", "optimizer parts", "foreach forms", "Adam steps"]

#: Scalars by name, as float32; programs get them at run time, so that no compiler sees their values.
ScalarsOf = Mapping[str, np.float32]


class Notation(Protocol):
    """What JAX calls by name; + - * / are operators on its arrays."""

    def cast(self, x: Value, fmt: Format) -> Value: ...
    def sqrt(self, x: Value) -> Value: ...
    def rsqrt(self, x: Value) -> Value: ...
    def reciprocal(self, x: Value) -> Value: ...
    def square(self, x: Value) -> Value: ...
    def negate(self, x: Value) -> Value: ...
    def absolute(self, x: Value) -> Value: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One operation of a certificate.

    Attributes:
        name: of the operation, with its format.
        family: which kind of operation it is.
        formats: of its operands.
        result: format of its result.
        natural: the operation in JAX, of a notation and arrays.
        jax_expression: the same for people.
        torch: the operation in PyTorch, of the module and tensors.
        torch_expression: the same for people.
        formula: what it is to compute, of operations, scalars and float32 values (float64 where the operand is);
            rounded to `result` after it.
        formula_text: the same for people.
        scalars: of the formula.
        exact: name in `exact.EXACT` of a single operation; "" for composed ones.
        through: format that a result has been rounded to on its way.
        neutral: operands whose result is zero.
        quick: draws operands for a quick certificate.
        full: draws operands for a full one.
    """

    name: str
    family: Family
    formats: tuple[Format, ...]
    result: Format
    natural: Callable[..., Value] = dataclasses.field(compare=False)
    jax_expression: str
    torch: Callable[..., Any] = dataclasses.field(compare=False)
    torch_expression: str
    formula: Callable[..., Value] = dataclasses.field(compare=False)
    formula_text: str
    scalars: ScalarsOf = dataclasses.field(default_factory=dict, compare=False)
    exact: str = ""
    through: Format | None = None
    neutral: tuple[float, ...]
    quick: Callable[[], Operands] = dataclasses.field(compare=False)
    full: Callable[[], Operands] = dataclasses.field(compare=False)


#: Elements of the random part of a certificate, quick and full, where not all patterns can be tried.
QUICK, FULL, FULL_PAIRS = 2 * BLOCK, 64 * BLOCK, 1 << 30


def all_checks(platform: Platform) -> list[Check]:
    """List every operation of a certificate, in its order.

    Args:
        platform: whose PyTorch kernels the composed operations follow.
    """
    found = [*_casts(), *_unary(), *_binary()]
    for fmt in (BFLOAT16, FLOAT16, FLOAT32):
        found += _parts(fmt, platform)
        found += [_scalar_loop(fmt)] if platform == "cpu" and fmt is not FLOAT32 else []
    for fmt in (BFLOAT16, FLOAT16, FLOAT32):
        found += _foreach_forms(fmt, platform)
    for fmt in (BFLOAT16, FLOAT16, FLOAT32):
        found += _adam_steps(fmt, platform)
    return found


# Casts.


def _casts() -> list[Check]:
    narrow = [(FLOAT32, BFLOAT16), (FLOAT32, FLOAT16), (FLOAT64, FLOAT32), (FLOAT64, BFLOAT16)]
    wide = [(BFLOAT16, FLOAT32), (FLOAT16, FLOAT32), (BFLOAT16, FLOAT64), (FLOAT32, FLOAT64)]
    there_and_back = [(FLOAT32, BFLOAT16), (FLOAT32, FLOAT16), (FLOAT64, FLOAT32)]
    return [
        *(_cast(a, b) for a, b in narrow),
        *(_cast(a, b) for a, b in wide),
        *(_round_trip(a, b) for a, b in there_and_back),
    ]


def _cast(source: Format, target: Format) -> Check:
    quick, full = _cast_operands(source, (target,))
    return Check(
        name=f"{source.name} to {target.name}",
        family="casts",
        formats=(source,),
        result=target,
        natural=lambda n, x: n.cast(x, target),
        jax_expression=f"x.astype(jnp.{target.name})",
        torch=lambda t, x: x.to(getattr(t, target.name)),
        torch_expression=f"x.to(torch.{target.name})",
        formula=lambda ops, s, x: ops.narrow(x, target) if source is FLOAT64 else x,
        formula_text="R(x)",
        exact="same",
        neutral=(0.0,),
        quick=quick,
        full=full,
    )


def _round_trip(source: Format, target: Format) -> Check:
    quick, full = _cast_operands(source, (target,))
    there, back = f"jnp.{target.name}", f"jnp.{source.name}"

    def formula(ops: Operations, s: ScalarsOf, x: Value) -> Value:
        return ops.narrow(x, target) if source is FLOAT64 else ops.round_to(x, target)

    return Check(
        name=f"{source.name} to {target.name} and back",
        family="casts",
        formats=(source,),
        result=source,
        natural=lambda n, x: n.cast(n.cast(x, target), source),
        jax_expression=f"x.astype({there}).astype({back})",
        torch=lambda t, x: x.to(getattr(t, target.name)).to(getattr(t, source.name)),
        torch_expression=f"x.to(torch.{target.name}).to(torch.{source.name})",
        formula=formula,
        formula_text=f"x rounded to {target.name}",
        exact="same",
        through=target,
        neutral=(0.0,),
        quick=quick,
        full=full,
    )


def _cast_operands(source: Format, targets: tuple[Format, ...]) -> tuple[Any, Any]:
    """Draw operands of a cast: all patterns where that can be done, midpoints and random ones elsewhere."""
    if source.width == 16:
        return _everything(source), _everything(source)
    aims = tuple(t for t in (*targets, FLOAT32) if t.width < source.width)

    def some(count: int) -> Callable[[], Operands]:
        return lambda: operands.hard_and_random((source,), count, _SEED, targets=aims)

    if source is FLOAT64:
        return some(QUICK), some(16 * FULL)
    return some(QUICK), _everything(source)


_SEED = 1


# Operations of one operand.


@dataclasses.dataclass(frozen=True)
class _Unary:
    """How an operation of one operand is written; `neutral` is an operand whose result is zero."""

    jax: str
    torch: str
    formula: Callable[[Operations, Value], Value]
    text: str
    neutral: float = 0.0


_ONE = np.float32(1)

_UNARY = {
    "sqrt": _Unary("jnp.sqrt(x)", "x.sqrt()", lambda ops, x: ops.sqrt(x), "R(sqrt(x))"),
    "rsqrt": _Unary(
        "lax.rsqrt(x)",
        "x.rsqrt()",
        lambda ops, x: ops.divide(_ONE, ops.sqrt(x)),
        "R(1 / sqrt(x)), rounded once",
        math.inf,
    ),
    "reciprocal": _Unary(
        "1 / x", "x.reciprocal()", lambda ops, x: ops.divide(_ONE, x), "R(1 / x)", math.inf
    ),
    "square": _Unary("jnp.square(x)", "x.square()", lambda ops, x: ops.multiply(x, x), "R(x * x)"),
    "negate": _Unary("-x", "x.neg()", lambda ops, x: ops.negate(x), "-x"),
    "absolute": _Unary("jnp.abs(x)", "x.abs()", lambda ops, x: _absolute(ops, x), "|x|"),
}


def _absolute(ops: Operations, x: Value) -> Value:
    return ops.decode(ops.patterns32(x) & np.uint32(0x7FFFFFFF), FLOAT32)


def _unary() -> list[Check]:
    found = []
    for fmt in (BFLOAT16, FLOAT16):
        everything = _everything(fmt)
        found += [_unary_check(name, fmt, everything, everything) for name in _UNARY]

    def some() -> Operands:
        return operands.hard_and_random((FLOAT32,), QUICK, _SEED)

    return [*found, _unary_check("sqrt", FLOAT32, some, _everything(FLOAT32))]


def _everything(fmt: Format) -> Callable[[], Operands]:
    return lambda: operands.everything(fmt)


def _unary_check(name: str, fmt: Format, quick: Any, full: Any) -> Check:
    how = _UNARY[name]
    method = how.torch.removeprefix("x.").removesuffix("()")
    return Check(
        name=f"{fmt.name} {name}",
        family="unary",
        formats=(fmt,),
        result=fmt,
        natural=lambda n, x: getattr(n, name)(x),
        jax_expression=how.jax,
        torch=lambda t, x: getattr(x, method)(),
        torch_expression=how.torch,
        formula=lambda ops, s, x: how.formula(ops, x),
        formula_text=how.text,
        exact=name,
        neutral=(how.neutral,),
        quick=quick,
        full=full,
    )


# Operations of two operands.

_BINARY: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "add": ("+", lambda a, b: a + b),
    "subtract": ("-", lambda a, b: a - b),
    "multiply": ("*", lambda a, b: a * b),
    "divide": ("/", lambda a, b: a / b),
}


def _binary() -> list[Check]:
    def of_bfloat16() -> Operands:
        return operands.pairs_of_hard(BFLOAT16, 1 << 10)

    def of_float32(count: int) -> Callable[[], Operands]:
        return lambda: operands.hard_and_random((FLOAT32, FLOAT32), count, _SEED)

    return [
        *(
            _binary_check(name, BFLOAT16, of_bfloat16, lambda: operands.all_pairs(BFLOAT16))
            for name in _BINARY
        ),
        *(
            _binary_check(name, FLOAT32, of_float32(2 * QUICK), of_float32(FULL_PAIRS))
            for name in _BINARY
        ),
    ]


def _binary_check(name: str, fmt: Format, quick: Any, full: Any) -> Check:
    sign, apply = _BINARY[name]
    return Check(
        name=f"{fmt.name} {name}",
        family="binary",
        formats=(fmt, fmt),
        result=fmt,
        natural=lambda n, a, b: apply(a, b),
        jax_expression=f"a {sign} b",
        torch=lambda t, a, b: apply(a, b),
        torch_expression=f"a {sign} b",
        formula=lambda ops, s, a, b: getattr(ops, name)(a, b),
        formula_text=f"R(a {sign} b)",
        exact=name,
        neutral=(0.0, 1.0 if name == "divide" else 0.0),
        quick=quick,
        full=full,
    )


# What optimizers are made of. Numbers are those of an everyday Adam step.

_WEIGHT = 1 - 0.9
_BETA2, _SQUARE_WEIGHT = 0.999, 1 - 0.999
_ROOT = math.sqrt(1 - 0.999**10)
_STEP_SIZE = -1e-3 / (1 - 0.9**10)
#: float16 would make 1e-8 zero, and every quotient infinite.
_EPSILON = {BFLOAT16: 1e-8, FLOAT16: 1e-4, FLOAT32: 1e-8}
_DECAY = 0.01


@dataclasses.dataclass(frozen=True)
class _Part:
    """How an operation of optimizers is written.

    Attributes:
        operands: how many.
        natural: in JAX, of arrays and Python numbers alone.
        jax: the same for people.
        torch: in PyTorch; `foreach` is the form over lists.
        torch_text: the same for people.
        foreach: in PyTorch over lists of tensors, in place.
        foreach_text: the same for people.
        formula: what PyTorch computes.
        text: the same for people.
        foreach_scalar: formats of the scalar, where the form over lists rounds it.
        kind: of operands, as `operands.hard_and_random` calls it.
        neutral: operands whose result is zero.
    """

    operands: int
    natural: Callable[..., Any]
    jax: str
    torch: Callable[..., Any]
    torch_text: str
    formula: Callable[..., Value]
    text: str
    scalar: float
    foreach: Callable[..., Any] | None = None
    foreach_text: str = ""
    foreach_scalar: str = "float32"
    kind: Kind = "any"
    neutral: tuple[float, ...] = (0.0,)


def _of_parts(fmt: Format, platform: Platform) -> dict[str, _Part]:
    """List the operations with the rounding points that PyTorch gives them on a platform."""
    epsilon = _EPSILON[fmt]
    own = {"cpu": fmt.name, "cuda": "float32"}[platform]
    return {
        "multiply by a scalar": _Part(
            operands=1,
            natural=lambda x: x * _BETA2,
            jax="x * 0.999",
            torch=lambda t, x: x * _BETA2,
            torch_text="x * 0.999",
            formula=lambda ops, s, x: ops.multiply(x, s["c"]),
            text="R(x * c)",
            scalar=_BETA2,
            foreach=lambda t, x: t._foreach_mul_([x], _BETA2),
            foreach_text="torch._foreach_mul_([x], 0.999)",
            foreach_scalar=own,
        ),
        "divide by a scalar": _Part(
            operands=1,
            natural=lambda x: x / _ROOT,
            jax=f"x / {_ROOT:.6g}",
            torch=lambda t, x: x / _ROOT,
            torch_text=f"x / {_ROOT:.6g}",
            formula=_divided_by_scalar(platform),
            text="R(x / c)" if platform == "cpu" else "R(x * f(1 / c))",
            scalar=_ROOT if platform == "cpu" else 1 / _ROOT,
            foreach=lambda t, x: t._foreach_div_([x], _ROOT),
            foreach_text=f"torch._foreach_div_([x], {_ROOT:.6g})",
        ),
        "add a scalar": _Part(
            operands=1,
            natural=lambda x: x + epsilon,
            jax=f"x + {epsilon:g}",
            torch=lambda t, x: x + epsilon,
            torch_text=f"x + {epsilon:g}",
            formula=lambda ops, s, x: ops.add(x, s["c"]),
            text="R(x + c)",
            scalar=float(round_scalar(epsilon, fmt)) if platform == "cpu" else epsilon,
            foreach=lambda t, x: t._foreach_add_([x], epsilon),
            foreach_text=f"torch._foreach_add_([x], {epsilon:g})",
            foreach_scalar=own,
            neutral=(-float(round_scalar(epsilon, fmt)),),
        ),
        "add a multiple": _Part(
            operands=2,
            natural=lambda x, y: x + _DECAY * y,
            jax="x + 0.01 * y",
            torch=lambda t, x, y: x.add(y, alpha=_DECAY),
            torch_text="x.add(y, alpha=0.01)",
            formula=lambda ops, s, x, y: ops.fma(s["c"], y, x),
            text="R(fma(c, y, x))",
            scalar=float(round_scalar(_DECAY, fmt)) if platform == "cpu" else _DECAY,
            kind="interpolation",
            neutral=(0.0, 0.0),
        ),
        "lerp": _Part(
            operands=2,
            natural=lambda m, g: m + _WEIGHT * (g - m),
            jax="m + 0.1 * (g - m)",
            torch=lambda t, m, g: m.lerp(g, _WEIGHT),
            torch_text="m.lerp(g, 0.1)",
            formula=lambda ops, s, m, g: ops.fma(s["c"], ops.subtract(g, m), m),
            text="R(fma(c, g - m, m))",
            scalar=_WEIGHT,
            foreach=lambda t, m, g: t._foreach_lerp_([m], [g], _WEIGHT),
            foreach_text="torch._foreach_lerp_([m], [g], 0.1)",
            kind="interpolation",
            neutral=(0.0, 0.0),
        ),
        "addcmul": _Part(
            operands=3,
            natural=lambda v, a, b: v + _SQUARE_WEIGHT * a * b,
            jax="v + 0.001 * a * b",
            torch=lambda t, v, a, b: v.addcmul(a, b, value=_SQUARE_WEIGHT),
            torch_text="v.addcmul(a, b, value=0.001)",
            formula=_addcmul(platform),
            text="R(fma(c * a, b, v))" if platform == "cpu" else "R(fma(c, a * b, v))",
            scalar=_SQUARE_WEIGHT,
            foreach=lambda t, v, a, b: t._foreach_addcmul_([v], [a], [b], _SQUARE_WEIGHT),
            foreach_text="torch._foreach_addcmul_([v], [a], [b], 0.001)",
            kind="product sum",
            neutral=(0.0, 0.0, 0.0),
        ),
        "addcdiv": _Part(
            operands=3,
            natural=lambda p, a, b: p + _STEP_SIZE * a / b,
            jax=f"p + {_STEP_SIZE:.6g} * a / b",
            torch=lambda t, p, a, b: p.addcdiv(a, b, value=_STEP_SIZE),
            torch_text=f"p.addcdiv(a, b, value={_STEP_SIZE:.6g})",
            formula=_addcdiv(platform),
            text="R(p + (c * a) / b)" if platform == "cpu" else "R(fma(c, a / b, p))",
            scalar=_STEP_SIZE,
            foreach=lambda t, p, a, b: t._foreach_addcdiv_([p], [a], [b], _STEP_SIZE),
            foreach_text=f"torch._foreach_addcdiv_([p], [a], [b], {_STEP_SIZE:.6g})",
            kind="quotient sum",
            neutral=(0.0, 0.0, 1.0),
        ),
    }


def _scalar_loop(fmt: Format) -> Check:
    """`add(alpha=)` of a 16-bit format as PyTorch's scalar loop on CPU computes it: the product is rounded first.

    The loop is that of a chunk's last elements, and of all elements where the memory layouts differ, as here.
    """
    c = np.float32(round_scalar(_DECAY, fmt))

    def formula(ops: Operations, s: ScalarsOf, x: Value, y: Value) -> Value:
        return ops.add(x, ops.round_to(ops.multiply(s["c"], y), fmt))

    def torch(t: Any, x: Any, y: Any) -> Any:
        transposed = y.view(-1, 2).t().contiguous().t()
        return x.view(-1, 2).add(transposed, alpha=_DECAY).reshape(-1)

    def draw(count: int) -> Callable[[], Operands]:
        return lambda: operands.hard_and_random((fmt,) * 2, count, _SEED, kind="interpolation")

    return Check(
        name=f"{fmt.name} add a multiple in the scalar loop",
        family="optimizer parts",
        formats=(fmt, fmt),
        result=fmt,
        natural=lambda n, x, y: x + _DECAY * y,
        jax_expression="x + 0.01 * y",
        torch=torch,
        torch_expression="x.add(y, alpha=0.01), x and y of different strides",
        formula=formula,
        formula_text=f"R(x + R(c * y)), c = {float(c)!r}",
        scalars={"c": c},
        neutral=(0.0, 0.0),
        quick=draw(QUICK),
        full=draw(FULL),
    )


def _divided_by_scalar(platform: Platform) -> Callable[..., Value]:
    """`x / c`; CUDA kernels multiply by the reciprocal, taken in double."""
    if platform == "cpu":
        return lambda ops, s, x: ops.divide(x, s["c"])
    return lambda ops, s, x: ops.multiply(x, s["c"])


def _addcmul(platform: Platform) -> Callable[..., Value]:
    if platform == "cpu":
        return lambda ops, s, v, a, b: ops.fma(ops.multiply(s["c"], a), b, v)
    return lambda ops, s, v, a, b: ops.fma(s["c"], ops.multiply(a, b), v)


def _addcdiv(platform: Platform) -> Callable[..., Value]:
    if platform == "cpu":
        return lambda ops, s, p, a, b: ops.add(p, ops.divide(ops.multiply(s["c"], a), b))
    return lambda ops, s, p, a, b: ops.fma(s["c"], ops.divide(a, b), p)


def _parts(fmt: Format, platform: Platform) -> list[Check]:
    return [
        _part_check(f"{fmt.name} {name}", "optimizer parts", fmt, part, part.torch, part.torch_text)
        for name, part in _of_parts(fmt, platform).items()
    ]


def _foreach_forms(fmt: Format, platform: Platform) -> list[Check]:
    """List the forms over lists of tensors; in place, which rounds some scalars first on CPU."""
    found = [_foreach_sqrt(fmt)]
    for name, part in _of_parts(fmt, platform).items():
        if part.foreach is None:
            continue
        scalar = round_scalar(part.scalar, fmt) if part.foreach_scalar != "float32" else part.scalar
        rounded = dataclasses.replace(part, scalar=float(scalar))
        form = _in_place(part.foreach)
        full_name = f"{fmt.name} foreach {name}"
        found.append(_part_check(full_name, "foreach forms", fmt, rounded, form, part.foreach_text))
    return found


def _foreach_sqrt(fmt: Format) -> Check:
    def some() -> Operands:
        return operands.hard_and_random((fmt,), QUICK, _SEED)

    draw = _everything(fmt) if fmt.width == 16 else some
    return dataclasses.replace(
        _unary_check("sqrt", fmt, draw, draw),
        name=f"{fmt.name} foreach sqrt",
        family="foreach forms",
        torch=_in_place(lambda t, x: t._foreach_sqrt_([x])),
        torch_expression="torch._foreach_sqrt_([x])",
    )


def _in_place(change: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a function that changes its first tensor into one that returns a new one."""

    def changed(t: Any, x: Any, *rest: Any) -> Any:
        x = x.clone()
        change(t, x, *rest)
        return x

    return changed


def _part_check(
    name: str, family: Family, fmt: Format, part: _Part, torch: Any, torch_expression: str
) -> Check:
    formats = (fmt,) * part.operands
    everything = fmt.width == 16 and part.operands == 1

    def draw(count: int) -> Callable[[], Operands]:
        if everything:
            return _everything(fmt)
        return lambda: operands.hard_and_random(formats, count, _SEED, kind=part.kind)

    with np.errstate(under="ignore"):
        c = np.float32(part.scalar)
    return Check(
        name=name,
        family=family,
        formats=formats,
        result=fmt,
        natural=lambda n, *values: part.natural(*values),
        jax_expression=part.jax,
        torch=torch,
        torch_expression=torch_expression,
        formula=part.formula,
        formula_text=f"{part.text}, c = {float(c)!r}",
        scalars={"c": c},
        neutral=part.neutral,
        quick=draw(QUICK),
        full=draw(FULL),
    )


# The complete step.

_COUNT = 10


def _adam_steps(fmt: Format, platform: Platform) -> list[Check]:
    """Check each stage of torch.optim.AdamW's step, from the state before it."""
    arithmetic = CATALOGUE[{"cpu": "torch-cpu-loop", "cuda": "torch-cuda-foreach"}[platform]]
    given = Hyperparameters(
        learning_rate=np.array([1e-3]),
        beta1=0.9,
        beta2=0.999,
        epsilon=_EPSILON[fmt],
        weight_decay=0.01,
        count=StepCount(first=_COUNT),
    )
    step = make_step(arithmetic, fmt, given, Options())
    scalars = {k: v[0] for k, v in scalars_of(step, arithmetic.rule, given, [1]).items()}
    return [_adam_check(stage, fmt, step, given, scalars, platform) for stage in STAGES]


def _adam_check(
    stage: Stage,
    fmt: Format,
    step: Step,
    given: Hyperparameters,
    scalars: ScalarsOf,
    platform: Platform,
) -> Check:
    def draw(count: int) -> Callable[[], Operands]:
        return lambda: operands.hard_and_random((fmt,) * 4, count, _SEED, kind="adam")

    def formula(ops: Operations, s: ScalarsOf, *state: Value) -> Value:
        names = ("param", "exp_avg", "exp_avg_sq", "grad")
        return step.advance(ops, s, dict(zip(names, state, strict=True)), {})[stage]

    kind = {"cpu": "foreach=False", "cuda": "foreach=True"}[platform]
    return Check(
        name=f"{fmt.name} Adam: {stage}",
        family="Adam steps",
        formats=(fmt,) * 4,
        result=fmt,
        natural=_written_adam(stage, given),
        jax_expression=_ADAM_TEXT[stage],
        torch=_torch_adam(stage, given, foreach=platform == "cuda"),
        torch_expression=f"torch.optim.AdamW([p], weight_decay=0.01, {kind}).step()",
        formula=formula,
        formula_text={"cpu": "torch-cpu-loop", "cuda": "torch-cuda-foreach"}[platform],
        scalars=scalars,
        neutral=(0.0, 0.0, 0.0, 0.0),
        quick=draw(QUICK),
        full=draw(FULL),
    )


_ADAM_TEXT: dict[Stage, str] = {
    "exp_avg": "m = m + (1 - beta1) * (g - m)",
    "exp_avg_sq": "v = v * beta2 + (1 - beta2) * g * g",
    "param": "p = p * (1 - lr*wd) - lr/bc1 * m / (sqrt(v) / sqrt(bc2) + eps)",
}


def _written_adam(stage: Stage, given: Hyperparameters) -> Callable[..., Value]:
    """Write PyTorch's step the way one writes it in JAX."""
    rate, t = float(given.learning_rate[0]), _COUNT
    shrink = 1 - rate * given.weight_decay
    step_size = -rate / (1 - given.beta1**t)
    root = math.sqrt(1 - given.beta2**t)

    def natural(n: Notation, p: Value, m: Value, v: Value, g: Value) -> Value:
        p = p * shrink
        m = m + (1 - given.beta1) * (g - m)
        v = v * given.beta2 + (1 - given.beta2) * g * g
        p = p + step_size * m / (n.sqrt(v) / root + given.epsilon)
        return {"exp_avg": m, "exp_avg_sq": v, "param": p}[stage]

    return natural


def _torch_adam(stage: Stage, given: Hyperparameters, *, foreach: bool) -> Callable[..., Any]:
    """Take one step with torch.optim.AdamW, from a state that is put into it."""

    def stepped(t: Any, p: Any, m: Any, v: Any, g: Any) -> Any:
        parameter = t.nn.Parameter(p.clone())
        optimizer = t.optim.AdamW(
            [parameter],
            lr=float(given.learning_rate[0]),
            betas=(given.beta1, given.beta2),
            eps=given.epsilon,
            weight_decay=given.weight_decay,
            foreach=foreach,
        )
        state = {"exp_avg": m.clone(), "exp_avg_sq": v.clone()}
        optimizer.state[parameter] = {"step": t.tensor(float(_COUNT - 1)), **state}
        parameter.grad = g
        optimizer.step()
        return parameter.detach() if stage == "param" else state[stage]

    return stepped
