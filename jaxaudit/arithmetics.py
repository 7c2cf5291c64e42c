"""How an Adam step rounds: the catalogue of arithmetics, and one step under each of them.

An Adam step is three formulas (Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2014,
algorithm 1). What a run's bits depend on is where each implementation of them rounds, in which format its
scalars are, which products are fused with which sums, and in which order it divides. An `Arithmetic` states
that; `Step` is the same once the run's own facts (storage format, kind of weight decay) are filled in.

Every formula is written once, against `operations.Operations`, and runs unchanged in NumPy, in XLA's float32
and in exact float64 emulation.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from jaxaudit.floats import FLOAT32, Format, round_scalar
from jaxaudit.hyperparameters import Hyperparameters
from jaxaudit.operations import Mask, Operations, Value

Stage = Literal["exp_avg", "exp_avg_sq", "param"]

#: The tensors that a step computes, in its order; the audit compares each of them with the recording.
STAGES: tuple[Stage, ...] = ("exp_avg", "exp_avg_sq", "param")

Decay = Literal["none", "decoupled", "l2"]

#: Float32 scalars of each step, by name; each of shape (T,).
Scalars = Mapping[str, NDArray[np.float32]]

#: What a step reads, by name: `param`, `exp_avg`, `exp_avg_sq` before it, `grad`, and, for the stage
#: `param`, `new_exp_avg` and `new_exp_avg_sq` after it. `scalar_rule` marks elements (see `_l2_gradient`).
Tensors = Mapping[str, Value]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What an optimizer can be told beside its numbers; part of a run, not of an arithmetic's name.

    Attributes:
        decoupled: weight decay acts on the weight (AdamW) instead of on the gradient (L2).
        amsgrad: the denominator is made of the largest second moment so far.
        maximize: the gradient is negated first.
        threads: threads that PyTorch computed with; matters for L2 decay in 16-bit formats only.
    """

    decoupled: bool = True
    amsgrad: bool = False
    maximize: bool = False
    threads: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Where an Adam step rounds.

    Attributes:
        name: as on the command line and in the dataset.
        summary: one line for people.
        formula: every rounding point, R() being the rounding to `operator_format`.
        source: where the formula was read, and how it was confirmed.
        operator_format: what the result of each operator on moments and denominator is rounded to.
        param_format: what the new weight is rounded to.
        update: the order of operations of the weight's update.
    """

    name: str
    summary: str
    formula: str
    source: str
    operator_format: Literal["storage", "float32"]
    param_format: Literal["storage", "float32"]
    update: Literal["bias-corrected denominator", "bias-corrected moments"]


TORCH_CPU_LOOP = Arithmetic(
    name="torch-cpu-loop",
    summary="torch.optim.Adam and AdamW on CPU, one operator at a time (foreach=False, the default there)",
    formula="""\
AdamW: p = R(p * (1 - lr*weight_decay)). Adam: g = R(g + weight_decay*p), see `_l2_gradient`.
m = R(fma(1 - beta1, g - m, m));  v = R(v * beta2);  v = R(fma((1 - beta2)*g, g, v))
d = R(sqrt(v));  d = R(d / sqrt(1 - beta2^t));  d = R(d + R(eps));  p = R(p + (-lr/(1 - beta1^t) * m) / d)
Scalars are computed in double and rounded to float32 once; operators compute in float32.""",
    source="torch/optim/adam.py `_single_tensor_adam`, ATen CPU kernels lerp, mul, addcmul, sqrt, div, add, "
    "addcdiv; bit for bit against torch 2.13.0 (tests/test_arithmetics.py)",
    operator_format="storage",
    param_format="storage",
    update="bias-corrected denominator",
)

FLOAT32_UPDATE = Arithmetic(
    name="float32",
    summary="textbook Adam in float32 from the recorded moments, the weight not rounded",
    formula="""\
p = p * (1 - lr*weight_decay) (decoupled) or g = fma(weight_decay, p, g) (L2)
m = fma(1 - beta1, g - m, m);  v = fma((1 - beta2)*g, g, v * beta2)
p = p - (lr * (m / (1 - beta1^t))) / (sqrt(v / (1 - beta2^t)) + eps)""",
    source="Kingma and Ba (2014), algorithm 1, evaluated in float32 from left to right",
    operator_format="float32",
    param_format="float32",
    update="bias-corrected moments",
)

FLOAT32_THEN_BFLOAT16 = dataclasses.replace(
    FLOAT32_UPDATE,
    name="float32-then-bfloat16",
    summary="textbook Adam in float32 from the recorded moments, the weight rounded once at the end",
    formula=FLOAT32_UPDATE.formula.replace("p = p - ", "p = R(p - ") + ")",
    param_format="storage",
)

#: Every arithmetic, by name: the one place where they are listed.
CATALOGUE: dict[str, Arithmetic] = {
    arithmetic.name: arithmetic
    for arithmetic in (TORCH_CPU_LOOP, FLOAT32_THEN_BFLOAT16, FLOAT32_UPDATE)
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One Adam step under an arithmetic, with everything filled in that its program depends on.

    Attributes:
        arithmetic: where it rounds.
        storage: format of the parameter.
        decay: how weight decay enters; "none" where its factor is zero.
        maximize: the gradient is negated first.
        lerp_from_end: the first moment's interpolation starts from the gradient (weight >= 0.5).
    """

    arithmetic: Arithmetic
    storage: Format
    decay: Decay
    maximize: bool
    lerp_from_end: bool

    @property
    def operator_format(self) -> Format:
        """What the result of each operator on moments and denominator is rounded to."""
        return self.storage if self.arithmetic.operator_format == "storage" else FLOAT32

    @property
    def param_format(self) -> Format:
        """What the new weight is rounded to."""
        return self.storage if self.arithmetic.param_format == "storage" else FLOAT32

    def result_format(self, stage: Stage) -> Format:
        """Tell the format that holds every result of a stage exactly."""
        return self.param_format if stage == "param" else self.operator_format

    def reads(self, stage: Stage) -> tuple[str, ...]:
        """Name the tensors that a stage reads (see `Tensors`)."""
        if stage == "param":
            return ("param", "new_exp_avg", "new_exp_avg_sq")
        decayed = ("param", "scalar_rule") if self.decay == "l2" else ()
        return ("grad", stage, *decayed)

    def replay(
        self, stage: Stage, ops: Operations, scalars: Mapping[str, Value], x: Tensors
    ) -> Value:
        """Compute one stage's new values from decoded tensors and scalars that broadcast to them."""
        formulas = {"exp_avg": _exp_avg, "exp_avg_sq": _exp_avg_sq, "param": _param}
        return formulas[stage](self, ops, scalars, x)

    def strays(
        self, stage: Stage, ops: Operations, scalars: Mapping[str, Value], x: Tensors
    ) -> Mask:
        """Mark the elements for which flushing subnormals could change this stage's result.

        Sound, not tight: where no element is marked and the scalars are `ordinary`, no operand and no result
        within any formula here is subnormal, infinite or NaN, unless it then vanishes against the weight:

        * exp_avg_sq: with |g| >= 2^-54 and 1-beta2 >= 2^-16, (1-beta2)*g*g is at least 2^-124.
        * exp_avg: |m| >= 2^-100 makes g-m a multiple of 2^-123. The interpolation cancels only where m is of
          the size of (1-beta1)*g >= 2^-74, and leaves zero or a multiple of 2^-120.
        * param: what is flushed on the way to the update makes it smaller than 2^-126 * 2^10 * 2^4 / 2^-50
          (tiny moment, bias correction, learning rate, smallest denominator), while a weight of at least
          2^-34 after a decay of at least 1/4 absorbs anything below 2^-61. Where the weight or the second
          moment is zero, the first moment must be ordinary as well: the update is then at least
          2^-64 * 2^-40 / 2^21.
        """
        if stage == "param":
            weight, first, second = (ops.patterns32(x[name]) for name in self.reads(stage))
            exposed = _outside(first, -64, 60) & ((weight << 1 == 0) | (second == 0))
            return (
                _outside(weight, -34, 60) | _outside_positive(second, -100, 20)
                | (_magnitude(first) > _pattern_of_power(60)) | exposed
            )  # fmt: skip
        gradient = ops.patterns32(_gradient(self, ops, scalars, x))
        if stage == "exp_avg":
            stray = _outside(gradient, -54, 60) | _outside(ops.patterns32(x["exp_avg"]), -100, 60)
        else:
            second = ops.patterns32(x["exp_avg_sq"])
            stray = _outside(gradient, -54, 30) | _outside_positive(second, -100, 60)
        if self.decay == "l2":
            stray |= _outside(ops.patterns32(x["grad"]), -54, 60)
            stray |= _outside(ops.patterns32(x["param"]), -34, 60)
        return stray


def make_step(
    arithmetic: Arithmetic, storage: Format, hyperparameters: Hyperparameters, options: Options
) -> Step:
    """Fill in what a run says about itself."""
    decay: Decay = "none"
    if hyperparameters.weight_decay != 0:
        decay = "decoupled" if options.decoupled else "l2"
    return Step(
        arithmetic=arithmetic,
        storage=storage,
        decay=decay,
        maximize=options.maximize,
        lerp_from_end=bool(abs(np.float32(1 - hyperparameters.beta1)) >= np.float32(0.5)),
    )


def scalars_of(step: Step, given: Hyperparameters, timesteps: Sequence[int]) -> Scalars:
    """Compute each step's scalars as PyTorch does: in Python doubles, rounded to float32 once.

    Args:
        step: what to compute them for.
        given: the hyperparameters; `learning_rate[k]` belongs to `timesteps[k]`.
        timesteps: 1-based step counts, as in the bias corrections.

    Returns:
        Float32 arrays of shape (T,).
    """
    weight = np.float32(1 - given.beta1)
    rows = [
        {
            "exp_avg_weight": weight - np.float32(1) if step.lerp_from_end else weight,
            "beta2": given.beta2,
            "exp_avg_sq_weight": 1 - given.beta2,
            "decay": 1 - rate * given.weight_decay,
            "l2": round_scalar(given.weight_decay, step.operator_format),
            "learning_rate": rate,
            "bias_correction1": 1 - given.beta1 ** float(t),
            "bias_correction2": 1 - given.beta2 ** float(t),
            "bias_correction2_sqrt": (1 - given.beta2 ** float(t)) ** 0.5,
            "step_size": -(rate / (1 - given.beta1 ** float(t))),
            "epsilon": round_scalar(given.epsilon, step.operator_format),
        }
        for t, rate in zip(timesteps, given.learning_rate.tolist(), strict=True)
    ]
    with np.errstate(over="ignore", under="ignore"):
        return {name: np.array([row[name] for row in rows]).astype(np.float32) for name in rows[0]}


#: Magnitudes of scalars for which `Step.strays` is sound, as powers of two, and whether zero is one of them.
_ORDINARY_SCALARS = {
    "exp_avg_weight": (-20, 0, False),
    "beta2": (-10, 0, False),
    "exp_avg_sq_weight": (-16, 0, False),
    "decay": (-2, 2, False),
    "l2": (-40, 4, True),
    "learning_rate": (-40, 4, True),
    "bias_correction1": (-10, 0, False),
    "bias_correction2": (-10, 0, False),
    "bias_correction2_sqrt": (-10, 0, False),
    "step_size": (-40, 4, True),
    "epsilon": (-40, 4, True),
}


def ordinary(scalars: Scalars) -> bool:
    """Tell whether all scalars are of the sizes that `Step.strays` counts on."""
    for name, (low, high, zero) in _ORDINARY_SCALARS.items():
        size = np.abs(scalars[name])
        within = (size >= np.float32(2.0**low)) & (size <= np.float32(2.0**high))
        if not np.all(within | ((size == 0) & zero)):
            return False
    return True


def scalar_rule_elements(
    elements: NDArray[np.integer], parameter_size: int, threads: int
) -> NDArray[np.uint8]:
    """Mark the elements that PyTorch's CPU kernels compute outside their vectorised loop.

    ATen gives each of k = min(threads, ceil(n / 32768)) threads a chunk of ceil(n / k) elements when the
    tensor has at least 32,768, and vectorises blocks of 32 16-bit elements from each chunk's start (the
    kernel of `add` has an AVX2 form only, which AVX-512 machines run too). The rest of each chunk goes
    through the scalar loop.

    Args:
        elements: flat positions within the whole parameter.
        parameter_size: number of elements of the whole parameter.
        threads: `torch.get_num_threads()` of the run.
    """
    grain, block = 32768, 32
    chunks = min(threads, -(-parameter_size // grain)) if parameter_size >= grain else 1
    length = -(-parameter_size // chunks)
    start = elements // length * length
    own_length = np.minimum(length, parameter_size - start)
    return (elements - start >= own_length - own_length % block).astype(np.uint8)


def _gradient(step: Step, ops: Operations, s: Mapping[str, Value], x: Tensors) -> Value:
    """Return the gradient that the moments see: negated for `maximize`, with L2 decay added."""
    gradient = ops.negate(x["grad"]) if step.maximize else x["grad"]
    if step.decay != "l2":
        return gradient
    return _l2_gradient(step, ops, s, gradient, x)


def _l2_gradient(
    step: Step, ops: Operations, s: Mapping[str, Value], gradient: Value, x: Tensors
) -> Value:
    """Compute `grad.add(param, alpha=weight_decay)`.

    The vectorised loop rounds once (a product of two 16-bit values is exact in float32); the scalar loop
    of 16-bit formats rounds the product to the storage format first. In float32 both are fused.
    """
    fused = ops.fma(s["l2"], x["param"], gradient)
    if step.operator_format is FLOAT32:
        return fused
    product = ops.round_to(ops.multiply(s["l2"], x["param"]), step.operator_format)
    scalar = ops.round_to(ops.add(gradient, product), step.operator_format)
    return ops.where(x["scalar_rule"] != 0, scalar, ops.round_to(fused, step.operator_format))


def _exp_avg(step: Step, ops: Operations, s: Mapping[str, Value], x: Tensors) -> Value:
    """Interpolate, lerp(m, g, 1 - beta1): fma(w, g - m, m), or from the other end where w >= 0.5."""
    gradient = _gradient(step, ops, s, x)
    start = gradient if step.lerp_from_end else x["exp_avg"]
    change = ops.subtract(gradient, x["exp_avg"])
    return ops.round_to(ops.fma(s["exp_avg_weight"], change, start), step.operator_format)


def _exp_avg_sq(step: Step, ops: Operations, s: Mapping[str, Value], x: Tensors) -> Value:
    """Decay v by beta2, then addcmul(v, g, g, value=1 - beta2): fma(value * g, g, v)."""
    gradient = _gradient(step, ops, s, x)
    decayed = ops.round_to(ops.multiply(x["exp_avg_sq"], s["beta2"]), step.operator_format)
    scaled = ops.multiply(s["exp_avg_sq_weight"], gradient)
    return ops.round_to(ops.fma(scaled, gradient, decayed), step.operator_format)


def _param(step: Step, ops: Operations, s: Mapping[str, Value], x: Tensors) -> Value:
    """Compute the new weight from the old one and both new moments."""
    weight = x["param"]
    if step.decay == "decoupled":
        weight = ops.round_to(ops.multiply(weight, s["decay"]), step.operator_format)
    updates: dict[str, Callable] = {
        "bias-corrected denominator": _update_by_denominator,
        "bias-corrected moments": _update_by_moments,
    }
    change = updates[step.arithmetic.update](step, ops, s, x["new_exp_avg"], x["new_exp_avg_sq"])
    return ops.round_to(ops.add(weight, change), step.param_format)


def _update_by_denominator(
    step: Step, ops: Operations, s: Mapping[str, Value], first: Value, second: Value
) -> Value:
    """PyTorch's order: (step_size * m) / (sqrt(v) / sqrt(1 - beta2^t) + eps), `addcdiv` unfused."""
    root = ops.round_to(ops.sqrt(second), step.operator_format)
    root = ops.round_to(ops.divide(root, s["bias_correction2_sqrt"]), step.operator_format)
    denominator = ops.round_to(ops.add(root, s["epsilon"]), step.operator_format)
    return ops.divide(ops.multiply(s["step_size"], first), denominator)


def _update_by_moments(
    step: Step, ops: Operations, s: Mapping[str, Value], first: Value, second: Value
) -> Value:
    """The textbook's order: -(lr * m_hat) / (sqrt(v_hat) + eps)."""
    corrected = ops.multiply(s["learning_rate"], ops.divide(first, s["bias_correction1"]))
    root = ops.sqrt(ops.divide(second, s["bias_correction2"]))
    return ops.negate(ops.divide(corrected, ops.add(root, s["epsilon"])))


def _pattern_of_power(exponent: int) -> np.uint32:
    """Return the float32 pattern of 2^exponent."""
    return np.uint32((127 + exponent) << 23)


def _magnitude(patterns: Value) -> Value:
    return patterns & np.uint32(0x7FFFFFFF)


def _outside(patterns: Value, low: int, high: int) -> Mask:
    """Mark float32 patterns that are neither zero nor within 2^low..2^high in magnitude."""
    # Zero wraps around to the largest integer, and is not below the bound.
    magnitude = _magnitude(patterns)
    below = magnitude - np.uint32(1) < _pattern_of_power(low) - np.uint32(1)
    return below | (magnitude > _pattern_of_power(high))


def _outside_positive(patterns: Value, low: int, high: int) -> Mask:
    """As `_outside`, with every pattern of the negative side marked (-0 included)."""
    below = patterns - np.uint32(1) < _pattern_of_power(low) - np.uint32(1)
    return below | (patterns > _pattern_of_power(high))
