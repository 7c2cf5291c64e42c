"""The catalogue: how PyTorch, optax and the low-precision optimizers round an Adam step.

An Adam step is three formulas (Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2014,
algorithm 1). What a run's bits depend on is where an implementation rounds, in which format its scalars are,
which products are fused with which sums, and in which order it divides. An `Arithmetic` states that.
`make_step` fills in what a run adds to it: storage format, kind of weight decay, and the like.

`CATALOGUE` is the one place where they are listed. Some names stand for several values, `VARIANTS`, since
something else than the implementation's name decides between them: an instruction set, the version.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from jaxaudit import formulas, scalars
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, Format
from jaxaudit.hyperparameters import Hyperparameters
from jaxaudit.scalars import Nudge, Rule
from jaxaudit.steps import Decay, Formula, Interpolation, Step


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


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Arithmetic:
    """Where an implementation of Adam rounds.

    Attributes:
        name: as on the command line and in the dataset.
        variant: what tells it from others of its name; "" for the usual one.
        summary: one line for people.
        formula: every rounding point in words, R() being the rounding to the storage format.
        source: where that was read, and what it was compared with.
        gradient: formula of the gradient that the moments see.
        exp_avg: formula of the first moment.
        exp_avg_sq: formula of the second moment.
        max_exp_avg_sq: formula of the largest second moment so far.
        param: formula of the weight.
        compensation: formula of Kahan's buffer, where there is one.
        rule: how the scalars are computed.
        operators: "storage" where each operator rounds its result, "float32" where only what is stored is.
        reads_stored: the update reads the moments back as they were stored.
        moments: format in which moments are kept: that of the weight; that of the weight for the first and
            whatever the recording shows for the second; whatever it shows for both; float32.
        weight: format in which the weight is kept: that of the recording; "float32" for weights that are
            not rounded at all; "master" for float32 weights of which the recording holds a rounded copy.
        storages: formats of recorded weights for which this differs from all other arithmetics.
        fuses: see `Step`.
        square_root: see `Step`.
        tail: which elements a vectorised kernel leaves to its scalar loop: none that matter, those at the
            end of each thread's chunk (L2 decay), or those at the end of the tensor.
        decays: kinds of weight decay that it has.
        amsgrad: whether it has this option; `maximize`: likewise.
        device_power: beta^t is computed by a device whose powf is not correctly rounded.
        flushes: see `Step`; `stochastic`: likewise.
        always_decays: weight decay of zero is computed like any other (it turns -0 into +0).
        float32_roots: it takes square roots in float32 whatever the format of the weights.
        altered: points of the formulas that are the other way round in this variant.
        confirmed: against what it was compared, bit for bit; "" for nothing yet.
    """

    name: str
    variant: str = ""
    summary: str
    formula: str
    source: str
    gradient: Formula
    exp_avg: Formula
    exp_avg_sq: Formula
    max_exp_avg_sq: Formula = formulas.largest
    param: Formula
    compensation: Formula | None = None
    rule: Rule
    operators: Literal["storage", "float32"] = "storage"
    reads_stored: bool = True
    moments: Literal["storage", "second recorded", "recorded", "float32"] = "storage"
    weight: Literal["storage", "float32", "master"] = "storage"
    storages: tuple[Format, ...] = (BFLOAT16, FLOAT16, FLOAT32)
    fuses: bool = True
    square_root: str = "ieee"
    tail: Literal["none", "chunks", "tensor"] = "none"
    decays: tuple[Decay, ...] = ("decoupled", "l2")
    amsgrad: bool = True
    maximize: bool = True
    device_power: bool = False
    flushes: bool = False
    stochastic: bool = False
    always_decays: bool = False
    float32_roots: bool = False
    altered: frozenset[str] = frozenset()
    confirmed: str = ""

    @property
    def label(self) -> str:
        """Return the name, with the variant where it is not the usual one."""
        return f"{self.name} ({self.variant})" if self.variant else self.name

    def nudges(self, given: Hyperparameters) -> tuple[Nudge, ...]:
        """List where scalars can lie that are not known exactly, the likeliest first."""
        rates = (
            (0.0,) if given.exact_rate else (0.0, -1.0, 1.0, -0.5, 0.5, -0.75, 0.75, -0.25, 0.25)
        )
        powers = range(-2, 3) if self.device_power else (0,)
        roots = (0, -1, 1) if self.device_power else (0,)
        found = [Nudge(*each) for each in itertools.product(rates, powers, powers, roots)]
        return tuple(sorted(found, key=lambda n: abs(n.power1) + abs(n.power2) + abs(n.root)))


def _variants(
    base: Arithmetic, *choices: Mapping[str, Mapping[str, Any]]
) -> tuple[Arithmetic, ...]:
    """Combine one of each choice; a variant's name is made of the names of what was chosen."""
    found = []
    for combined in itertools.product(*(choice.items() for choice in choices)):
        label = ", ".join(name for name, _ in combined if name)
        storages = set(base.storages)
        changes: dict[str, Any] = {}
        for _, change in combined:
            storages &= set(change.get("storages", base.storages))
            changes |= change
        if storages:
            changes["storages"] = tuple(f for f in base.storages if f in storages)
            found.append(dataclasses.replace(base, variant=label, **changes))
    return tuple(found)


_BUILDS = {"": {}, "no fused multiply-add": {"fuses": False}}
_FUSED_BUILDS = {"": {}, "no fused multiply-add": {"fuses": False, "rule": scalars.torch}}
_ROOTS = {"": {}, "square root of MKL on AMD": {"square_root": "mkl-amd"}}

_TORCH_CPU_TEXT = """\
AdamW: p = R(p * {decay}). Adam: g = R(g + R(weight_decay)*p), see `formulas.gradient_cpu`.
m = R(fma(1 - beta1, g - m, m));  v = R(v * {beta2});  v = R(fma((1 - beta2)*g, g, v))
amsgrad: v_max = max(v_max, v), from which d is then made
d = R(sqrt(v));  d = R(d / sqrt(1 - beta2^t));  d = R(d + R(eps));  p = R(p + (-lr/(1 - beta1^t) * m) / d)
Scalars are computed in double and rounded to float32 once; operators compute in float32."""

_TORCH_CPU_LOOP = Arithmetic(
    name="torch-cpu-loop",
    summary="torch.optim.Adam and AdamW on CPU, one operator at a time (foreach=False, the default there)",
    formula=_TORCH_CPU_TEXT.format(decay="(1 - lr*weight_decay)", beta2="beta2"),
    source="torch/optim/adam.py `_single_tensor_adam`; ATen CPU kernels lerp, mul, addcmul, sqrt, div, add, "
    "addcdiv",
    confirmed="torch 2.13.0",
    gradient=formulas.gradient_cpu,
    exp_avg=formulas.exp_avg_lerp,
    exp_avg_sq=formulas.exp_avg_sq_cpu,
    param=formulas.param_cpu,
    rule=scalars.storage_rounded(scalars.torch, "l2", "epsilon"),
    moments="second recorded",
    tail="chunks",
)

_TENSOR_RATE = {
    "": {},
    "learning rate a tensor": {
        "rule": scalars.storage_rounded(scalars.tensor_rate(scalars.torch), "l2", "epsilon")
    },
}

_TORCH_CPU_FOREACH = dataclasses.replace(
    _TORCH_CPU_LOOP,
    name="torch-cpu-foreach",
    summary="torch.optim.Adam and AdamW on CPU over lists of tensors (foreach=True)",
    formula=_TORCH_CPU_TEXT.format(decay="R(1 - lr*weight_decay)", beta2="R(beta2)"),
    source="torch/optim/adam.py `_multi_tensor_adam`; its in-place multiplications round their scalars to the "
    "storage format",
    rule=scalars.storage_rounded(scalars.torch, "l2", "epsilon", "decay", "beta2"),
)

_TORCH_CPU_FUSED = Arithmetic(
    name="torch-cpu-fused",
    summary="torch.optim.Adam and AdamW on CPU in one kernel (fused=True)",
    formula="""\
AdamW: p = p * fma(-lr, weight_decay, 1), the factor in double. Adam: g = fma(p, weight_decay, g).
m = fma(1 - beta1, g - m, m);  v = fma((1 - beta2)*g, g, v*beta2), at the tensor's end fma(v, beta2, ((1 - beta2)*g)*g)
d = sqrt(v)/sqrt(1 - beta2^t) + eps;  p = p + (-lr/(1 - beta1^t) * m) / d
All in float32; p, m and v are rounded once, when they are stored, and the update reads them unrounded.""",
    source="ATen/native/cpu/FusedAdamKernel.cpp",
    confirmed="torch 2.13.0",
    gradient=formulas.gradient_cpu,
    exp_avg=formulas.exp_avg_lerp,
    exp_avg_sq=formulas.exp_avg_sq_fused_cpu,
    max_exp_avg_sq=formulas.largest_fused_cpu,
    param=formulas.param_cpu,
    rule=scalars.torch_fused_cpu,
    operators="float32",
    reads_stored=False,
    tail="tensor",
)

_TORCH_CUDA_TEXT = """\
As torch-cpu-loop, with v = R(fma(1 - beta2, g*g, v)), eps not rounded, g = R(fma(weight_decay, p, g)),
d = R({root}) and p = R(fma(-lr/(1 - beta1^t), m/d, p))"""

_TORCH_CUDA_LOOP = Arithmetic(
    name="torch-cuda-loop",
    summary="torch.optim.Adam and AdamW on CUDA, one operator at a time (foreach=False)",
    formula=_TORCH_CUDA_TEXT.format(root="d * (1/sqrt(1 - beta2^t))"),
    source="torch/optim/adam.py `_single_tensor_adam`; ATen CUDA kernels, whose expressions were compiled and "
    "disassembled",
    gradient=formulas.gradient_cuda,
    exp_avg=formulas.exp_avg_lerp_cuda,
    exp_avg_sq=formulas.exp_avg_sq_cuda,
    param=formulas.param_cuda_reciprocal,
    rule=scalars.torch,
)

_RECIPROCALS = {
    "": {},
    "reciprocal in float32": {"rule": scalars.single_reciprocal(scalars.torch)},
}

_TORCH_CUDA_FOREACH = dataclasses.replace(
    _TORCH_CUDA_LOOP,
    name="torch-cuda-foreach",
    summary="torch.optim.Adam and AdamW on CUDA over lists of tensors (the default there)",
    formula=_TORCH_CUDA_TEXT.format(root="d / sqrt(1 - beta2^t)"),
    source="torch/optim/adam.py `_multi_tensor_adam`; ATen CUDA foreach functors, compiled and disassembled",
    param=formulas.param_cuda,
)

_TORCH_CUDA_FUSED = Arithmetic(
    name="torch-cuda-fused",
    summary="torch.optim.Adam and AdamW on CUDA in one kernel (fused=True), torch 2.11 and later",
    formula="""\
Every hyperparameter is a float32. AdamW: p = fma(-(lr*weight_decay), p, p). Adam: g = fma(p, weight_decay, g).
m = fma(beta1, m, fma(-beta1, g, g));  v = fma(beta2, v, fma(-beta2, g*g, g*g))
d = sqrt(v)/sqrt(1 - beta2^t) + eps;  p = p - ((lr/(1 - beta1^t)) * m) / d
p, m and v are rounded once, when they are stored; beta^t is the device's powf.""",
    source="ATen/native/cuda/fused_adam_utils.cuh since pull requests 172505 and 173224, compiled and "
    "disassembled",
    gradient=formulas.gradient_cuda,
    exp_avg=formulas.exp_avg_fused_cuda,
    exp_avg_sq=formulas.exp_avg_sq_fused_cuda,
    param=formulas.param_fused_cuda,
    rule=scalars.fused_cuda,
    operators="float32",
    reads_stored=False,
    device_power=True,
)

_TORCH_CUDA_FUSED_LEGACY = dataclasses.replace(
    _TORCH_CUDA_FUSED,
    name="torch-cuda-fused-legacy",
    summary="torch.optim.Adam and AdamW on CUDA in one kernel (fused=True), torch up to 2.10",
    formula="""\
Expressions with hyperparameters are evaluated in double and rounded to float32 once:
AdamW: p = p - (lr*weight_decay)*p. Adam: g = g + p*weight_decay.
m = beta1*m + (1 - beta1)*g;  v = beta2*v + ((1 - beta2)*g)*g;  d = float32(sqrt(v)/sqrt(1 - beta2^t)) + eps
p = p - (lr/(1 - beta1^t) * m) / d in float32; p, m and v are rounded once, when they are stored.""",
    source="ATen/native/cuda/fused_adam_utils.cuh before these pull requests, compiled and disassembled",
    gradient=formulas.gradient_fused_cuda_legacy,
    exp_avg=formulas.exp_avg_fused_cuda_legacy,
    exp_avg_sq=formulas.exp_avg_sq_fused_cuda_legacy,
    param=formulas.param_fused_cuda_legacy,
    rule=scalars.fused_cuda_legacy,
    device_power=False,
)

_OTHER_PRODUCTS = {
    "": {},
    "other product fused": {
        "altered": frozenset(
            {
                "fusion in exp_avg, of the other product",
                "fusion in exp_avg_sq, of the other product",
            }
        )
    },
}

_TORCH_CAPTURABLE = dataclasses.replace(
    _TORCH_CUDA_LOOP,
    name="torch-capturable",
    summary="torch.optim.Adam and AdamW with capturable=True, whose step count is a float32 tensor",
    formula="""\
As torch-cuda-loop up to the moments; 1 - beta^t and all that is made of it is float32, and on CUDA rounded to
the storage format before it meets a tensor. With -s = -lr/(1 - beta1^t):
one tensor at a time: d = R(R(sqrt(v)) / (sqrt(1 - beta2^t) * -s));  d = R(d + eps/-s);  p = R(p + m/d)
over lists: d = R(R(sqrt(v)) / sqrt(1 - beta2^t));  d = R(d + eps);  d = R(d / -s);  p = R(p + m/d)""",
    source="torch/optim/adam.py, the branches of `capturable`",
    confirmed="torch 2.13.0 with CPU kernels, not on CUDA",
    param=formulas.param_capturable_loop,
    rule=scalars.storage_rounded(
        scalars.capturable_loop, "capturable_divisor", "capturable_epsilon"
    ),
    device_power=True,
)

_OVER_LISTS = {"param": formulas.param_capturable_foreach}
_CPU_KERNELS = {
    "gradient": formulas.gradient_cpu,
    "exp_avg": formulas.exp_avg_lerp,
    "exp_avg_sq": formulas.exp_avg_sq_cpu,
    "tail": "chunks",
    "float32_roots": True,
}


def _capturable(rule: Rule, *rounded: str) -> dict[str, Rule]:
    return {"rule": scalars.storage_rounded(rule, *rounded)}


#: On CUDA the scalars are tensors that are cast to the storage format; on CPU kernels only some are.
_CAPTURABLE = {
    "": {},
    "learning rate a tensor": _capturable(
        scalars.capturable_loop_tensor_rate, "capturable_divisor", "capturable_epsilon"
    ),
    "over lists": _OVER_LISTS
    | _capturable(scalars.capturable_foreach, "bias_correction2_sqrt", "capturable_divisor"),
    "over lists, learning rate a tensor": _OVER_LISTS
    | _capturable(
        scalars.tensor_decay(scalars.capturable_foreach),
        "bias_correction2_sqrt",
        "capturable_divisor",
    ),
}
_CAPTURABLE_CPU = {
    "CPU kernels": _CPU_KERNELS | _capturable(scalars.capturable_loop, "capturable_epsilon", "l2"),
    "CPU kernels, learning rate a tensor": _CPU_KERNELS
    | _capturable(scalars.capturable_loop_tensor_rate, "capturable_epsilon", "l2"),
    "CPU kernels over lists": _CPU_KERNELS
    | _OVER_LISTS
    | _capturable(scalars.capturable_foreach, "epsilon", "l2", "decay", "beta2"),
    "CPU kernels over lists, learning rate a tensor": _CPU_KERNELS
    | _OVER_LISTS
    | _capturable(scalars.tensor_decay(scalars.capturable_foreach), "epsilon", "l2", "beta2"),
}

_OPTIMI = Arithmetic(
    name="optimi-kahan",
    summary="optimi's Adam and AdamW on CPU with Kahan summation (its default for 16-bit weights)",
    formula="""\
h1, h2 = (beta^t - beta)/(beta^t - 1) in double instead of bias corrections
p = R(p * (1 - lr*weight_decay)) or g = R(g + R(weight_decay)*p), see `formulas.gradient_cpu`
m = R(lerp(m, g, 1 - h1));  v = R(v * h2);  v = R(fma((1 - h2)*g, g, v));  d = R(R(sqrt(v)) + R(eps))
c = R(c + (-lr*m)/d);  p' = R(p + c);  c = R(c + R(p - p'))""",
    source="optimi/adamw.py of torch-optimi 0.3.3",
    confirmed="torch-optimi 0.3.3",
    gradient=formulas.gradient_cpu,
    exp_avg=formulas.exp_avg_lerp,
    exp_avg_sq=formulas.exp_avg_sq_cpu,
    param=formulas.param_kahan_optimi,
    compensation=formulas.compensation_kahan_optimi,
    rule=scalars.storage_rounded(scalars.optimi, "l2", "epsilon"),
    tail="chunks",
    amsgrad=False,
    maximize=False,
)

_OVER_LISTS_OPTIMI = {
    "": {},
    "over lists": {
        "rule": scalars.storage_rounded(scalars.optimi, "l2", "epsilon", "decay", "beta2")
    },
}
_WITHOUT_KAHAN_OPTIMI = {
    "": {"storages": (BFLOAT16, FLOAT16)},
    "without Kahan summation": {"param": formulas.param_optimi, "compensation": None},
}
_DEBIASED = tuple(each["rule"] if each else _OPTIMI.rule for each in _OVER_LISTS_OPTIMI.values())

_ANYPRECISION = Arithmetic(
    name="anyprecision",
    summary="torchdistx's AnyPrecisionAdamW",
    formula="""\
p = R(p * (1 - lr*weight_decay));  m = fma(1 - beta1, g, m * beta1) in float32, or R(R(m * beta1) + R(1 - beta1)*g)
v = R(v * beta2);  v = R(fma((1 - beta2)*g, g, v));  d = R(R(R(sqrt(v)) / sqrt(1 - beta2^t)) + R(eps))
p = R(p + (-(1/(1 - beta1^t))*lr * m) / d), or with Kahan summation
c = R(c + (...*m)/d);  p' = R(p + c);  c = R(c + R(p - p')); bias corrections are float32.""",
    source="torchdistx/optimizers/anyprecision_optimizer.py",
    confirmed="torchdistx at commit 9c1b9f5c, restated in torch 2.13.0",
    gradient=formulas.gradient_cpu,
    exp_avg=formulas.exp_avg_anyprecision,
    exp_avg_sq=formulas.exp_avg_sq_cpu,
    param=formulas.param_cpu,
    rule=scalars.anyprecision,
    moments="recorded",
    tail="chunks",
    decays=("decoupled",),
    amsgrad=False,
    maximize=False,
    device_power=True,
    float32_roots=True,
)

_KAHAN_ANYPRECISION = {
    "": {},
    "Kahan summation": {
        "param": formulas.param_kahan,
        "compensation": formulas.compensation_kahan,
        "storages": (BFLOAT16, FLOAT16),
    },
}

_TORCHAO = Arithmetic(
    name="torchao",
    summary="torchao's AdamW, compiled as it always is",
    formula="""\
p = p - (lr*weight_decay)*p (decoupled, also for a decay of 0) or g = g + weight_decay*p (L2)
m = m + (1 - beta1)*(g - m);  v = v + (1 - beta2)*(g*g - v)
p = R(p - (lr * (m / (1 - beta1^t))) / (sqrt(v)/sqrt(1 - beta2^t) + eps))
All in float32 and nothing fused; m and v are rounded when they are stored, and the update reads them unrounded.""",
    source="torchao/optim/adam.py `single_param_adam` of torchao 0.18.0, under torch.compile",
    confirmed="torchao 0.18.0",
    gradient=formulas.gradient_torchao,
    exp_avg=formulas.exp_avg_torchao,
    exp_avg_sq=formulas.exp_avg_sq_torchao,
    param=formulas.param_torchao,
    rule=scalars.torchao,
    operators="float32",
    reads_stored=False,
    fuses=False,
    always_decays=True,
    maximize=False,
    device_power=True,
)

_EAGER_TORCHAO = {
    "": {},
    "not compiled": {"fuses": True, "tail": "chunks"},
    "not compiled, square root of MKL on AMD": {
        "fuses": True,
        "tail": "chunks",
        "square_root": "mkl-amd",
    },
}

_STOCHASTIC = dataclasses.replace(
    _TORCHAO,
    name="stochastic-rounding",
    summary="torchao's AdamW with bf16_stochastic_round: the weight is rounded up or down by chance",
    formula=_TORCHAO.formula
    + """
The new weight is one of the two bfloat16 neighbours of p, the one away from zero with a probability of
(the low 16 bits of p) / 65536; so mismatches are weights that are neither.""",
    weight="float32",
    storages=(BFLOAT16,),
    stochastic=True,
)

_OPTAX = Arithmetic(
    name="optax",
    summary="optax.adam and optax.adamw on CPU, operator by operator",
    formula="""\
Python numbers are rounded to the format of the array that they meet (bfloat16: beta2 of 0.999 becomes 1).
L2: g = R(g + R(weight_decay*p)).  m = R(R((1 - beta1)*g) + R(beta1*m));  v = R(R((1 - beta2)*R(g*g)) + R(beta2*v))
mh = R(m * (1/R(1 - beta1^t)));  vh = R(v * (1/R(1 - beta2^t)));  u = R(mh / R(R(sqrt(vh)) + eps))
decoupled: u = R(u + R(weight_decay*p));  p = R(p + R(-lr*u)); subnormal float32 numbers count as zero.""",
    source="optax 0.2.8 transform.scale_by_adam, under jax 0.10.2 on CPU",
    confirmed="optax 0.2.8, jax 0.10.2",
    gradient=formulas.gradient_optax,
    exp_avg=formulas.exp_avg_optax,
    exp_avg_sq=formulas.exp_avg_sq_optax,
    max_exp_avg_sq=formulas.largest_optax,
    param=formulas.param_optax,
    rule=scalars.optax,
    moments="recorded",
    maximize=False,
    device_power=True,
    flushes=True,
)

_OPTAX_COMPILED = {
    "gradient": formulas.gradient_optax_compiled,
    "exp_avg": formulas.exp_avg_optax_compiled,
    "exp_avg_sq": formulas.exp_avg_sq_optax_compiled,
    "param": formulas.param_optax_compiled,
    "storages": (FLOAT32,),
}
_OPTAX_FORMS = {
    "": {},
    # A bias correction that several arrays of a tree share is a divisor, not a factor.
    "over a tree": {
        "param": formulas.param_optax_over_trees,
        "max_exp_avg_sq": formulas.largest_optax_over_trees,
        "storages": (BFLOAT16, FLOAT32),
    },
    "compiled": _OPTAX_COMPILED,
    "compiled, epsilon of zero": {
        "param": formulas.param_optax_without_epsilon,
        "storages": (FLOAT16,),
    },
    # A moment narrower than the weights feeds the update before it is rounded.
    "first moment in bfloat16": {"reads_stored": False, "storages": (FLOAT16, FLOAT32)},
    "compiled, first moment in bfloat16": _OPTAX_COMPILED | {"reads_stored": False},
    "compiled, first moment in float32": {
        "exp_avg": formulas.exp_avg_optax_compiled_mixed,
        "param": formulas.param_optax_compiled,
        "storages": (BFLOAT16, FLOAT16),
    },
}
_SUBNORMALS = {"": {}, "with subnormal numbers": {"flushes": False}}

_TEXTBOOK_TEXT = """\
p = p * (1 - lr*weight_decay) (decoupled) or g = fma(weight_decay, p, g) (L2)
m = fma(1 - beta1, g - m, m);  v = fma((1 - beta2)*g, g, v * beta2)
p = {store}p - (lr * (m / (1 - beta1^t))) / (sqrt(v / (1 - beta2^t)) + eps){end}"""

_FLOAT32_UPDATE = Arithmetic(
    name="float32",
    summary="textbook Adam in float32 from the recorded moments, the weight not rounded",
    formula=_TEXTBOOK_TEXT.format(store="", end=""),
    source="Kingma and Ba (2014), algorithm 1, evaluated in float32 from left to right",
    confirmed="the formula in PyTorch",
    gradient=formulas.gradient_cuda,
    exp_avg=formulas.exp_avg_lerp,
    exp_avg_sq=formulas.exp_avg_sq_cpu,
    param=formulas.param_textbook,
    rule=scalars.torch,
    operators="float32",
    moments="float32",
    weight="float32",
)

_FLOAT32_THEN_BFLOAT16 = dataclasses.replace(
    _FLOAT32_UPDATE,
    name="float32-then-bfloat16",
    summary="textbook Adam in float32 from the recorded moments, the weight rounded once at the end",
    formula=_TEXTBOOK_TEXT.format(store="R(", end=")"),
    weight="storage",
)


def _masters() -> tuple[Arithmetic, ...]:
    """List the float32 arithmetics whose weights may have been recorded as 16-bit copies."""
    found = []
    for base in (
        _TORCH_CPU_LOOP,
        dataclasses.replace(_TORCH_CPU_LOOP, variant=_MKL, square_root="mkl-amd"),
        _TORCH_CPU_FUSED,
        _TORCH_CUDA_FOREACH,
        _TORCH_CUDA_LOOP,
        _TORCH_CUDA_FUSED,
        _TORCH_CUDA_FUSED_LEGACY,
    ):
        found.append(
            dataclasses.replace(
                base,
                name="float32-master",
                variant=base.label if found else "",
                summary="float32 weights and moments, of whose weights the recording holds a rounded copy",
                formula=f"{base.name} in float32 throughout; the recorded weight is R(p).",
                source=base.source,
                moments="float32",
                weight="master",
                storages=(BFLOAT16, FLOAT16),
            )
        )
    return tuple(found)


_MKL = "square root of MKL on AMD"

#: Every arithmetic with its variants, by name: the one place where they are listed. The first is the usual one.
VARIANTS: dict[str, tuple[Arithmetic, ...]] = {
    variants[0].name: variants
    for variants in (
        _variants(_TORCH_CPU_LOOP, _BUILDS, _TENSOR_RATE, _ROOTS),
        _variants(_TORCH_CPU_FOREACH, _BUILDS, _ROOTS),
        _variants(_TORCH_CPU_FUSED, _FUSED_BUILDS),
        _variants(_TORCH_CUDA_FOREACH),
        _variants(_TORCH_CUDA_LOOP, _RECIPROCALS),
        _variants(_TORCH_CUDA_FUSED),
        _variants(_TORCH_CUDA_FUSED_LEGACY, _OTHER_PRODUCTS),
        _variants(_TORCH_CAPTURABLE, _CAPTURABLE)
        + _variants(_TORCH_CAPTURABLE, _CAPTURABLE_CPU, _ROOTS),
        _masters(),
        _variants(_OPTAX, _OPTAX_FORMS, _SUBNORMALS),
        _variants(_TORCHAO, _EAGER_TORCHAO),
        _variants(_OPTIMI, _OVER_LISTS_OPTIMI, _WITHOUT_KAHAN_OPTIMI, _ROOTS),
        _variants(_ANYPRECISION, _KAHAN_ANYPRECISION, _ROOTS),
        _variants(_STOCHASTIC, _EAGER_TORCHAO),
        (_FLOAT32_THEN_BFLOAT16,),
        (_FLOAT32_UPDATE,),
    )
}

#: The usual variant of every arithmetic, by name.
CATALOGUE: dict[str, Arithmetic] = {name: variants[0] for name, variants in VARIANTS.items()}


def make_step(
    arithmetic: Arithmetic,
    storage: Format,
    hyperparameters: Hyperparameters,
    options: Options,
    moments: tuple[Format, Format] | None = None,
) -> Step:
    """Fill in what a run adds to an arithmetic.

    Args:
        arithmetic: where to round.
        storage: format of the recorded weights.
        hyperparameters: the numbers.
        options: kind of weight decay, and the like.
        moments: formats in which the recorded moments show themselves to be kept; by default `storage`.
    """
    decay: Decay = "none"
    if hyperparameters.weight_decay != 0 or arithmetic.always_decays:
        decay = "decoupled" if options.decoupled else "l2"
    shown = moments or (storage, storage)
    kept = {
        "storage": (storage, storage),
        "float32": (FLOAT32, FLOAT32),
        "recorded": shown,
        "second recorded": (storage, shown[1]),
    }[arithmetic.moments]
    master = arithmetic.weight == "master"
    return Step(
        gradient=arithmetic.gradient,
        exp_avg=arithmetic.exp_avg,
        exp_avg_sq=arithmetic.exp_avg_sq,
        max_exp_avg_sq=arithmetic.max_exp_avg_sq,
        param=arithmetic.param,
        compensation=arithmetic.compensation,
        storage=FLOAT32 if master else storage,
        exp_avg_format=kept[0],
        exp_avg_sq_format=kept[1],
        param_format=storage if arithmetic.weight == "storage" else FLOAT32,
        recorded_format=FLOAT32 if arithmetic.weight == "float32" else storage,
        rounds_operators=arithmetic.operators == "storage",
        reads_stored=arithmetic.reads_stored,
        fuses=arithmetic.fuses,
        square_root=arithmetic.square_root,
        decay=decay,
        amsgrad=options.amsgrad,
        maximize=options.maximize,
        interpolation=_interpolation(arithmetic, hyperparameters),
        flushes=arithmetic.flushes,
        stochastic=arithmetic.stochastic,
        altered=arithmetic.altered,
    )


def _interpolation(arithmetic: Arithmetic, given: Hyperparameters) -> Interpolation:
    """Tell where lerp starts: optimi's debiased beta1 grows from 0 at the first step."""
    if arithmetic.rule in _DEBIASED:
        return "mixed"
    return "end" if scalars.interpolates_from_end(given) else "start"


def depends_on_tail(arithmetic: Arithmetic, step: Step) -> bool:
    """Tell whether a step treats the elements of a vectorised kernel's scalar loop in their own way."""
    return arithmetic.tail != "none" and any(step.reads_tail(name) for name in step.state)


def tail_elements(
    arithmetic: Arithmetic,
    storage: Format,
    elements: NDArray[np.integer],
    parameter_size: int,
    threads: int,
) -> NDArray[np.uint8]:
    """Mark the elements that a vectorised kernel leaves to its scalar loop.

    A fused kernel of PyTorch leaves what is beyond the last whole vector of the tensor; its chunks for
    threads are multiples of a vector. For ATen's single operators see `chunk_tails`.

    Args:
        arithmetic: of which kind the kernel is.
        storage: format of the weights.
        elements: flat positions within the whole parameter.
        parameter_size: number of elements of the whole parameter.
        threads: `torch.get_num_threads()` of the run.
    """
    if arithmetic.tail == "tensor":
        lanes = 256 // storage.width  # the kernel has an AVX2 form only
        return (elements >= parameter_size - parameter_size % lanes).astype(np.uint8)
    block = 16 if storage is FLOAT32 or arithmetic.operators == "float32" else 32
    return chunk_tails(elements, parameter_size, threads, block)


def chunk_tails(
    elements: NDArray[np.integer], parameter_size: int, threads: int, block: int = 32
) -> NDArray[np.uint8]:
    """Mark the elements that PyTorch's CPU operators compute outside their vectorised loop.

    ATen gives each of k = min(threads, ceil(n / 32768)) threads a chunk of ceil(n / k) elements when the
    tensor has at least 32,768, and vectorises blocks of two AVX2 registers from each chunk's start (also on
    machines with AVX-512). The rest of each chunk goes
    through the scalar loop.

    Args:
        elements: flat positions within the whole parameter.
        parameter_size: number of elements of the whole parameter.
        threads: `torch.get_num_threads()` of the run.
        block: elements of two vectors: 32 of 16 bits, 16 of 32 bits.
    """
    grain = 32768
    chunks = min(threads, -(-parameter_size // grain)) if parameter_size >= grain else 1
    length = -(-parameter_size // chunks)
    start = elements // length * length
    own_length = np.minimum(length, parameter_size - start)
    return (elements - start >= own_length - own_length % block).astype(np.uint8)
