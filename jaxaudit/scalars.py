"""Each step's scalars as implementations compute them: in Python doubles, in float32, or in the storage format.

A rule takes the hyperparameters of one step and returns its scalars by name, as Python floats that are rounded
to float32 at the end (names that begin with `WIDE` stay doubles):

* `exp_avg_weight`: of lerp, counted from the end where it is at least 0.5; `exp_avg_from_end` is then 1.
* `beta1`, `beta2`, `exp_avg_sq_weight` (1 - beta2): of the moments.
* `l2`: weight decay added to the gradient; `decay`: 1 - lr*weight_decay, by which the weight is multiplied.
* `bias_correction1`, `bias_correction2`, `bias_correction2_sqrt` and its reciprocal: 1 - beta^t and its root.
* `step_size`: -lr / bias_correction1. `epsilon`, `learning_rate`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from jaxaudit.floats import FLOAT16, FLOAT32, FLOAT64, Format, round_scalar
from jaxaudit.hyperparameters import Hyperparameters
from jaxaudit.operations import NumpyOperations
from jaxaudit.steps import Scalars, Step

F32 = np.float32


class Nudge(NamedTuple):
    """Where within its uncertainty a scalar lies that is not known exactly.

    Attributes:
        rate: place of the trainer's double between the midpoints around the stored float32 learning rate, -1
            to 1.
        power1: ulps by which the device's float32 beta1^t is off.
        power2: the same for beta2^t.
        root: ulps by which the float32 root of the second bias correction is off.
    """

    rate: float = 0.0
    power1: int = 0
    power2: int = 0
    root: int = 0


EXACT = Nudge()


@dataclasses.dataclass(frozen=True)
class Moment:
    """The hyperparameters of one step.

    Attributes:
        rate: learning rate.
        t: step count of the bias corrections; infinite where there are none.
        given: all others.
        first: format of the first moment.
        storage: format of the weights, and what scalars are rounded to where an implementation does so.
        second: format of the second moment; scalars that meet it are rounded to this one.
        square_root: see `steps.Step`.
        nudge: see `Nudge`.
    """

    rate: float
    t: float
    given: Hyperparameters
    first: Format
    storage: Format
    second: Format
    square_root: str
    nudge: Nudge = EXACT

    @property
    def single(self) -> type[np.floating]:
        """Return the type that implementations compute scalars in where they do so in float32; float64 in an exact step."""
        return np.float64 if self.storage is FLOAT64 else np.float32

    @property
    def corrected_beta2(self) -> float:
        """Return the beta2 of the bias correction."""
        given = self.given
        return given.beta2 if given.corrected_beta2 is None else given.corrected_beta2

    def powers(self) -> tuple[float, float]:
        """Return beta1^t and beta2^t as Python computes them; 0 without bias correction."""
        if math.isinf(self.t):
            return 0.0, 0.0
        return self.given.beta1**self.t, self.corrected_beta2**self.t

    def powers32(self) -> tuple[np.floating, np.floating]:
        """Return beta1^t and beta2^t of float32 betas, as powf of the C library does (NumPy's scalars call it)."""
        if self.single is not F32 or math.isinf(self.t):
            power1, power2 = self.powers()
            return self.single(power1), self.single(power2)
        betas = (F32(self.given.beta1), F32(self.corrected_beta2))
        ulps = (self.nudge.power1, self.nudge.power2)
        found = [_ulps_off(beta ** F32(self.t), k) for beta, k in zip(betas, ulps, strict=True)]
        return found[0], found[1]

    def root32(self, value: np.floating) -> np.floating:
        """Return the float32 square root."""
        if self.single is not F32:
            return np.sqrt(value)
        if self.square_root == "mkl-amd":
            return F32(NumpyOperations().mkl_amd_sqrt(np.array([value]))[0])
        return _ulps_off(np.sqrt(value), self.nudge.root)


Rule = Callable[[Moment], dict[str, float]]

#: Prefix of scalars that enter formulas as doubles.
WIDE = "wide "


def scalars_of(
    step: Step,
    rule: Rule,
    given: Hyperparameters,
    timesteps: Sequence[int],
    nudges: Sequence[Nudge] | None = None,
) -> Scalars:
    """Compute the scalars of some timesteps.

    Args:
        step: what to compute them for.
        rule: how.
        given: the hyperparameters; `learning_rate[k]` belongs to `timesteps[k]`.
        timesteps: of the recording, from 1; `given.count` turns them into step counts.
        nudges: one for each timestep, where scalars are not known exactly.

    Returns:
        Arrays of shape (T,): float32, or float64 where the formula asks for doubles. A step whose storage is
        float64 has all its scalars in double, unrounded.
    """
    rates = given.learning_rate.tolist()
    rows = [
        rule(
            Moment(
                _place(rate, nudge.rate),
                given.count.at(t),
                given,
                step.exp_avg_format,
                step.storage,
                step.exp_avg_sq_format,
                step.square_root,
                nudge,
            )
        )
        for t, rate, nudge in zip(timesteps, rates, nudges or [EXACT] * len(rates), strict=True)
    ]
    found = {}
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for name in rows[0]:
            values = np.array([row[name] for row in rows], np.float64)
            wide = name.startswith(WIDE) or step.storage is FLOAT64
            found[name.removeprefix(WIDE)] = values if wide else values.astype(F32)
    return found


def _ulps_off(value: np.float32, ulps: int) -> np.float32:
    return (value.view(np.int32) + np.int32(ulps)).view(F32)


def _place(rate: float, fraction: float) -> float:
    """Return a double that rounds to the float32 `rate`, at a fraction of the way to the next midpoint."""
    if not fraction:
        return rate
    # A whole half ulp would be the midpoint itself, which may round to the neighbour.
    return float(F32(rate)) + fraction * 0.4999 * float(np.spacing(F32(rate)))


def interpolates_from_end(given: Hyperparameters) -> bool:
    """Tell whether lerp starts from its end."""
    return bool(abs(F32(1 - given.beta1)) >= F32(0.5))


def torch(moment: Moment) -> dict[str, float]:
    """torch.optim.Adam with Python numbers: computed in double, rounded once."""
    given, rate = moment.given, moment.rate
    correction1, correction2 = (1 - power for power in moment.powers())
    return _moments(given, moment.single) | {
        "decay": 1 - rate * given.weight_decay,
        "l2": given.weight_decay,
        "learning_rate": rate,
        "bias_correction1": correction1,
        "bias_correction2": correction2,
        "bias_correction2_sqrt": correction2**0.5,
        "reciprocal_bias_correction2_sqrt": _divide(1, correction2**0.5),
        "step_size": -_divide(rate, correction1),
        "epsilon": given.epsilon,
    }


def torch_fused_cpu(moment: Moment) -> dict[str, float]:
    """As `torch`; the fused CPU kernel's compiler fuses lr*weight_decay with its difference from 1, in double."""
    product = Fraction(moment.rate) * Fraction(moment.given.weight_decay)
    return torch(moment) | {"decay": float(1 - product)}


def _moments(given: Hyperparameters, single: type[np.floating]) -> dict[str, float]:
    return _weights("exp_avg", 1 - given.beta1, single) | {
        "beta2": given.beta2,
        "exp_avg_sq_weight": 1 - given.beta2,
    }


def _divide(a: float, b: float) -> float:
    """Divide as IEEE 754 does."""
    with np.errstate(all="ignore"):
        return float(np.float64(a) / np.float64(b))


def storage_rounded(rule: Rule, *names: str) -> Rule:
    """Round some of a rule's scalars to the format of the tensor that they meet, by way of float32."""

    def rounded(moment: Moment) -> dict[str, float]:
        found = rule(moment)
        formats = {name: moment.second if name in _OF_SECOND else moment.storage for name in names}
        return found | {name: float(round_scalar(found[name], formats[name])) for name in names}

    return rounded


#: Scalars that meet the second moment, or what is made of it.
_OF_SECOND = {
    "beta2",
    "epsilon",
    "bias_correction2_sqrt",
    "capturable_divisor",
    "capturable_epsilon",
}


def single_reciprocal(rule: Rule) -> Rule:
    """Take the reciprocal of the corrected root in float32, as older versions of torch on CUDA do."""

    def single(moment: Moment) -> dict[str, float]:
        found = rule(moment)
        with np.errstate(divide="ignore"):
            single = moment.single
            reciprocal = single(1) / single(found["bias_correction2_sqrt"])
        return found | {"reciprocal_bias_correction2_sqrt": float(reciprocal)}

    return single


def tensor_decay(rule: Rule) -> Rule:
    """Compute the factor of decoupled decay with the learning rate as a float32 tensor."""

    def with_tensor(moment: Moment) -> dict[str, float]:
        with np.errstate(all="ignore"):
            single = moment.single
            decay = single(1) - single(moment.rate) * single(moment.given.weight_decay)
        return rule(moment) | {"decay": float(decay)}

    return with_tensor


def tensor_rate(rule: Rule) -> Rule:
    """Compute with the learning rate as a float32 tensor, as torch's loop does when it is given one."""

    def with_tensor(moment: Moment) -> dict[str, float]:
        found = tensor_decay(rule)(moment)
        with np.errstate(all="ignore"):
            step_size = -(moment.single(moment.rate) / moment.single(found["bias_correction1"]))
        return found | {"step_size": float(step_size)}

    return with_tensor


def fused_cuda(moment: Moment) -> dict[str, float]:
    """Torch's fused CUDA kernel since 2.11: every hyperparameter is a float32, and so is what is made of them."""
    given, single, rate = moment.given, moment.single, moment.single(moment.rate)
    with np.errstate(all="ignore"):
        correction1, correction2 = (single(1) - power for power in moment.powers32())
        return {
            "beta1": given.beta1,
            "beta2": given.beta2,
            "l2": given.weight_decay,
            "minus_rate_times_decay": float(-(rate * single(given.weight_decay))),
            "bias_correction2_sqrt": float(moment.root32(correction2)),
            "step_size": float(-(rate / correction1)),
            "epsilon": given.epsilon,
        }


def fused_cuda_legacy(moment: Moment) -> dict[str, float]:
    """Torch's fused CUDA kernel up to 2.10: hyperparameters stay doubles within expressions."""
    given = moment.given
    power1, power2 = moment.powers()
    return {
        WIDE + "beta1": given.beta1,
        WIDE + "one_minus_beta1": 1 - given.beta1,
        WIDE + "beta2": given.beta2,
        WIDE + "one_minus_beta2": 1 - given.beta2,
        WIDE + "l2": given.weight_decay,
        WIDE + "minus_rate_times_decay": -(moment.rate * given.weight_decay),
        "bias_correction2_sqrt": (1 - power2) ** 0.5,
        "step_size": -_divide(moment.rate, float(moment.single(1 - power1))),
        WIDE + "epsilon": given.epsilon,
    }


def capturable_loop(moment: Moment) -> dict[str, float]:
    """capturable=True, one tensor at a time; the learning rate is a Python number.

    A number divided by a tensor is the tensor's reciprocal times the number.
    """
    return _capturable_loop(moment, torch(moment), lambda rate, x: (moment.single(1) / x) * rate)


def capturable_loop_tensor_rate(moment: Moment) -> dict[str, float]:
    """As `capturable_loop`, with the learning rate a float32 tensor."""
    return _capturable_loop(moment, tensor_rate(torch)(moment), lambda rate, x: rate / x)


def _capturable_loop(
    moment: Moment, found: dict[str, float], divide: Callable[[Any, Any], Any]
) -> dict[str, float]:
    single = moment.single
    with np.errstate(all="ignore"):
        correction1, correction2 = (single(1) - power for power in moment.powers32())
        minus_size = -divide(single(moment.rate), correction1)
        divisor = moment.root32(correction2) * minus_size
        epsilon = (single(1) / minus_size) * single(moment.given.epsilon)
    return found | {
        "capturable_divisor": float(divisor),
        "capturable_epsilon": float(epsilon),
    }


def capturable_foreach(moment: Moment) -> dict[str, float]:
    """capturable=True over lists of tensors; a float32 tensor as learning rate changes the decay only."""
    single = moment.single
    with np.errstate(all="ignore"):
        correction1, correction2 = (power - single(1) for power in moment.powers32())
        divisor = single(1) / (correction1 / single(moment.rate))
        root = moment.root32(-correction2)
    return torch(moment) | {
        "bias_correction2_sqrt": float(root),
        "capturable_divisor": float(divisor),
    }


def torchao(moment: Moment) -> dict[str, float]:
    """Compute the scalars of torchao's `single_param_adam`: float32 scalars; the learning rate is a float32 tensor."""
    given, single, rate = moment.given, moment.single, moment.single(moment.rate)
    with np.errstate(all="ignore"):
        correction1, correction2 = (single(1) - power for power in moment.powers32())
        return {
            **_weights("exp_avg", 1 - given.beta1, single),
            **_weights("exp_avg_sq", 1 - given.beta2, single),
            "l2": given.weight_decay,
            "rate_times_decay": float(rate * single(given.weight_decay)),
            "learning_rate": float(rate),
            "bias_correction1": float(correction1),
            "bias_correction2_sqrt": float(moment.root32(correction2)),
            "epsilon": given.epsilon,
        }


def _weights(name: str, weight: float, single: type[np.floating]) -> dict[str, float]:
    """Return the weight of a lerp as ATen uses it, and as a compiler does that subtracts 1 in double."""
    from_end = bool(abs(single(weight)) >= single(0.5))
    return {
        f"{name}_weight": float(single(weight) - single(1)) if from_end else weight,
        f"{name}_weight_of_double": weight - 1 if abs(weight) >= 0.5 else weight,
        f"{name}_from_end": float(from_end),
        f"{name}_rest": float(single(1) - single(weight)),
    }


def optimi(moment: Moment) -> dict[str, float]:
    """Warner's optimi: betas without their bias, in double, instead of bias corrections."""
    given, rate = moment.given, moment.rate
    beta1, beta2 = (_debiased(b, moment.t) for b in (given.beta1, given.beta2))
    return _weights("exp_avg", 1 - beta1, moment.single) | {
        "beta2": beta2,
        "exp_avg_sq_weight": 1 - beta2,
        "decay": 1 - rate * given.weight_decay,
        "l2": given.weight_decay,
        "step_size": -rate,
        "epsilon": given.epsilon,
    }


def _debiased(beta: float, t: float) -> float:
    power = 0.0 if math.isinf(t) else beta**t
    return math.nan if power == 1 else (power - beta) / (power - 1)


def anyprecision(moment: Moment) -> dict[str, float]:
    """AnyPrecisionAdamW of torchdistx: bias corrections are float32 tensors."""
    given, single = moment.given, moment.single
    with np.errstate(all="ignore"):
        correction1, correction2 = (single(1) - power for power in moment.powers32())
        step_size = -((single(1) / correction1) * single(moment.rate))
        root = moment.root32(correction2)
    weight = 1 - given.beta1
    if moment.first is moment.storage:  # `add(alpha=)` rounds alpha to the format
        weight = float(round_scalar(weight, moment.first))
    return {
        "decay": 1 - moment.rate * given.weight_decay,
        "beta1": given.beta1,
        "exp_avg_weight": weight,
        "beta2": given.beta2,
        "exp_avg_sq_weight": 1 - given.beta2,
        "bias_correction2_sqrt": float(root),
        "step_size": float(step_size),
        "epsilon": float(round_scalar(given.epsilon, moment.second)),
    }


def optax(moment: Moment) -> dict[str, float]:
    """Optax: Python numbers take the format of the array that they meet; bias corrections are float32 before."""
    given, single, rounded = moment.given, moment.single, round_scalar
    storage, first = moment.storage, moment.first
    update = storage if storage is first else FLOAT32
    with np.errstate(all="ignore"):
        correction1, correction2 = (single(1) - power for power in moment.powers32())
    return {
        "exp_avg_weight": float(rounded(1 - given.beta1, storage)),
        "beta1": float(rounded(given.beta1, first)),
        "exp_avg_sq_weight": float(rounded(1 - given.beta2, storage)),
        "beta2": float(rounded(given.beta2, storage)),
        "l2": float(rounded(given.weight_decay, storage)),
        "epsilon": float(rounded(given.epsilon, storage)),
        "minus_rate": float(rounded(-moment.rate, update)),
        "bias_correction1": float(rounded(float(correction1), update)),
        "bias_correction2": float(rounded(float(correction2), storage)),
        "reciprocal_bias_correction1": _reciprocal(float(correction1), update, single),
        "reciprocal_bias_correction2": _reciprocal(float(correction2), storage, single),
    }


def _reciprocal(correction: float, fmt: Format, single: type[np.floating]) -> float:
    """Return what XLA multiplies by instead of dividing: in float16 it is rounded to float16."""
    with np.errstate(all="ignore"):
        reciprocal = single(1) / single(round_scalar(correction, fmt))
    return float(round_scalar(float(reciprocal), FLOAT16) if fmt is FLOAT16 else reciprocal)
