"""One step of an optimizer: what it reads, in which order it computes, and where it rounds.

A `Step` is an arithmetic with the facts of a run filled in. It computes the tensors of the optimizer's state
after a timestep from those before it, each by a formula (see `formulas`), under any class of
`operations.Operations`: unchanged in NumPy, in XLA's float32 and in exact float64 emulation.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from jaxaudit import floats, stochastic
from jaxaudit.floats import FLOAT32, Format
from jaxaudit.operations import Mask, NumpyOperations, Operations, Value

Stage = Literal["exp_avg", "exp_avg_sq", "param"]

#: The tensors that the audit compares with the recording, in the order of a step.
STAGES: tuple[Stage, ...] = ("exp_avg", "exp_avg_sq", "param")

#: Everything that a step leaves behind, in its order. `compensation` is Kahan's buffer.
STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "compensation", "param")

Decay = Literal["none", "decoupled", "l2"]

#: Where lerp starts: from the old value, from the new one, or from either, by timestep.
Interpolation = Literal["start", "end", "mixed"]

#: Scalars of each step, by name; each of shape (T,): float32, or float64 where the formula asks for doubles.
Scalars = Mapping[str, NDArray[np.floating]]

#: What a step reads, by name: the tensors of `STATE` before it, `grad`, and, where it reads back what it
#: has stored, `new_exp_avg`, ... after it. `tail` marks the elements that a vectorised kernel leaves to its
#: scalar loop.
Tensors = Mapping[str, Value]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One step under an arithmetic, with everything filled in that its program depends on.

    Attributes:
        gradient: formula of the gradient that the moments see.
        exp_avg: formula of the first moment, before it is stored.
        exp_avg_sq: formula of the second moment, before it is stored.
        max_exp_avg_sq: formula of the largest second moment so far, for amsgrad.
        param: formula of the new weight, before it is stored.
        compensation: formula of Kahan's buffer, where there is one.
        storage: format that operators round to.
        exp_avg_format: format of the first moment.
        exp_avg_sq_format: format of the second moment.
        param_format: format that the step keeps its weight in.
        recorded_format: format of the recorded weight, which may be a rounded copy of the step's own.
        rounds_operators: each operator's result is rounded, not only what is stored.
        reads_stored: the update reads the moments as they were stored, not as they were computed.
        fuses: a multiplication followed by an addition is one operation, where the implementation lets the
            compiler or the instruction set decide.
        square_root: how float32 roots round: by IEEE 754, or as Intel's library does on AMD processors.
        decay: how weight decay enters; "none" where its factor is zero.
        amsgrad: the denominator is made of the largest second moment so far.
        maximize: the gradient is negated first.
        flushes: the implementation's device takes subnormal numbers for zero.
        stochastic: the weight is stored as one of its two neighbours, by chance.
        interpolation: lerp's first moment starts from the old moment, from the gradient (weight >= 0.5),
            or from either, by timestep.
        altered: points of the formulas that do the opposite of what the implementation does.
    """

    gradient: "Formula"
    exp_avg: "Formula"
    exp_avg_sq: "Formula"
    max_exp_avg_sq: "Formula"
    param: "Formula"
    compensation: "Formula | None" = None
    storage: Format
    exp_avg_format: Format
    exp_avg_sq_format: Format
    param_format: Format
    recorded_format: Format
    rounds_operators: bool
    reads_stored: bool
    fuses: bool = True
    square_root: str = "ieee"
    decay: Decay = "none"
    amsgrad: bool = False
    maximize: bool = False
    flushes: bool = False
    stochastic: bool = False
    interpolation: Interpolation = "start"
    altered: frozenset[str] = frozenset()

    def format_of(self, name: str) -> Format:
        """Tell the format in which a tensor of the state is kept."""
        return {
            "exp_avg": self.exp_avg_format,
            "exp_avg_sq": self.exp_avg_sq_format,
            "max_exp_avg_sq": self.exp_avg_sq_format,
            "compensation": self.storage,
            "param": self.param_format,
        }[name]

    def result_format(self, stage: str) -> Format:
        """Tell the format that holds every result of a stage, as it was recorded, exactly."""
        return self.recorded_format if stage == "param" else self.format_of(stage)

    def reads(self, name: str) -> tuple[str, ...]:
        """Name the tensors that the formula of a tensor of the state reads (see `Tensors`), but for `tail`."""
        return tuple(x for x in _trial(self, name)[0] if x != "tail")

    def reads_tail(self, name: str) -> bool:
        """Tell whether the formula of a tensor of the state asks which elements are in the scalar loop."""
        return "tail" in _trial(self, name)[0]

    def reads_scalars(self, name: str) -> tuple[str, ...]:
        """Name the scalars that the formula of a tensor of the state reads."""
        return _trial(self, name)[1]

    @property
    def state(self) -> tuple[str, ...]:
        """Name the tensors of the state, in the order in which a step computes them."""
        absent = {"max_exp_avg_sq": not self.amsgrad, "compensation": not self.compensation}
        return tuple(name for name in STATE if not absent.get(name))

    @property
    def keeps_more(self) -> bool:
        """Tell whether the step's own weight has more bits than the recorded one, which is a copy of it."""
        return self.param_format is not self.recorded_format

    def replay(self, name: str, ops: Operations, scalars: Mapping[str, Value], x: Tensors) -> Value:
        """Compute a tensor of the state, rounded to the format in which the step keeps it."""
        kernel = Kernel(self, ops, scalars, x)
        return ops.round_to(_FORMULAS[name](kernel), self.format_of(name))

    def replay_recorded(
        self, stage: str, ops: Operations, scalars: Mapping[str, Value], x: Tensors
    ) -> Value:
        """Compute a stage's values as they were recorded: a kept weight may be recorded as a copy."""
        return ops.round_to(self.replay(stage, ops, scalars, x), self.result_format(stage))

    def differs(self, stage: str, replayed: Value, recorded: Value) -> Mask:
        """Mark where a recorded value is not what was replayed, or, rounded by chance, cannot come of it.

        Args:
            stage: which tensor.
            replayed: float32 patterns, uint32.
            recorded: likewise.
        """
        differs = floats.differ(replayed, recorded)
        if not (self.stochastic and stage == "param"):
            return differs
        return differs & ~stochastic.possible(replayed, recorded)

    def advance(
        self,
        ops: Operations,
        scalars: Mapping[str, Value],
        x: Tensors,
        recorded: Mapping[str, Value],
    ) -> dict[str, Value]:
        """Compute the state after a timestep.

        Args:
            ops: the operations.
            scalars: those of the timestep.
            x: every tensor before it, and the gradient.
            recorded: tensors after it that are known, and taken as they are.
        """
        after: dict[str, Value] = {}
        for name in self.state:
            known = {**x, **{f"new_{key}": value for key, value in after.items()}}
            found = recorded.get(name)
            after[name] = self.replay(name, ops, scalars, known) if found is None else found
        return after

    def stripped(self, stage: str) -> "Step":
        """Forget what a stage does not depend on, so that programs that are alike are equal."""
        unused: dict[str, object] = {}
        if stage in ("exp_avg", "exp_avg_sq"):
            unused |= {"param": _nothing, "compensation": None, "square_root": "ieee"}
            unused |= {"amsgrad": False, "reads_stored": True, "recorded_format": self.param_format}
            unused |= {"max_exp_avg_sq": _nothing}
            unused |= {"exp_avg_sq" if stage == "exp_avg" else "exp_avg": _nothing}
            unused |= {"interpolation": "start"} if stage == "exp_avg_sq" else {}
            unused |= {"decay": "none"} if self.decay == "decoupled" else {}
        elif self.reads_stored:
            unused |= dict.fromkeys(("gradient", "exp_avg", "exp_avg_sq"), _nothing)
            unused |= {} if stage == "max_exp_avg_sq" else {"max_exp_avg_sq": _nothing}
            unused |= {"interpolation": "start", "maximize": False}
            unused |= {"decay": "none"} if self.decay == "l2" else {}
        return dataclasses.replace(self, **unused)

    def points(self, name: str) -> tuple[str, ...]:
        """Name the points at which a tensor's formula rounds or fuses; each can be altered."""
        return _trial(self, name)[2]


#: Computes a tensor of the state, before it is rounded to the format in which it is kept.
Formula = Callable[["Kernel"], Value]


@dataclasses.dataclass
class Kernel:
    """One step at work: arithmetic on float32 values, with every rounding and fusion a named point.

    A point that is in `step.altered` does the opposite of what the implementation does: this is how
    identification finds the operation at which a recording parts from an implementation.

    Attributes:
        step: the settings.
        ops: the operations.
        s: scalars that broadcast to the tensors.
        x: the tensors.
        points: the points met, in order.
    """

    step: Step
    ops: Operations
    s: Mapping[str, Value]
    x: Tensors
    points: list[str] = dataclasses.field(default_factory=list)

    def meets(self, point: str) -> bool:
        """Note a point, and tell whether it is altered."""
        if point not in self.points:
            self.points.append(point)
        return point in self.step.altered

    def rounded(self, value: Value, what: str, fmt: Format | None = None) -> Value:
        """Round what an operator returns, where operators round."""
        fmt = fmt or self.step.storage
        if fmt is FLOAT32:
            return value
        altered = self.meets(f"rounding of {what}")
        return self.ops.round_to(value, fmt) if self.step.rounds_operators ^ altered else value

    def fused(self, a: Value, b: Value, c: Value, where: str) -> Value:
        """Compute a * b + c with one rounding, or with two in a build without fused multiply-add."""
        if self.step.fuses ^ self.meets(f"fusion in {where}"):
            return self.ops.fma(a, b, c)
        return self.ops.add(self.ops.multiply(a, b), c)

    def sqrt(self, value: Value) -> Value:
        """Take the float32 root that the implementation's library takes."""
        if self.step.square_root == "mkl-amd":
            return self.ops.mkl_amd_sqrt(value)
        return self.ops.sqrt(value)

    def gradient(self) -> Value:
        """Return the gradient that the moments see."""
        return self.step.gradient(self)

    def plain_gradient(self) -> Value:
        """Return the recorded gradient, negated for `maximize`."""
        return self.ops.negate(self.x["grad"]) if self.step.maximize else self.x["grad"]

    def new_exp_avg(self) -> Value:
        """Return the first moment that the update reads."""
        return self.x["new_exp_avg"] if self.step.reads_stored else self.step.exp_avg(self)

    def new_exp_avg_sq(self) -> Value:
        """Return the second moment that the largest one is taken from."""
        return self.x["new_exp_avg_sq"] if self.step.reads_stored else self.step.exp_avg_sq(self)

    def new_second_moment(self) -> Value:
        """Return the second moment that the denominator is made of."""
        name = "max_exp_avg_sq" if self.step.amsgrad else "exp_avg_sq"
        if self.step.reads_stored:
            return self.x[f"new_{name}"]
        return _FORMULAS[name](self)

    def tail(self) -> Mask:
        """Mark the elements of the scalar loop."""
        return self.x["tail"] != 0


def _compensation(k: Kernel) -> Value:
    assert k.step.compensation is not None
    return k.step.compensation(k)


_FORMULAS: dict[str, Formula] = {
    "exp_avg": lambda k: k.step.exp_avg(k),
    "exp_avg_sq": lambda k: k.step.exp_avg_sq(k),
    "max_exp_avg_sq": lambda k: k.step.max_exp_avg_sq(k),
    "compensation": _compensation,
    "param": lambda k: k.step.param(k),
}


class _Anything(dict[str, Value]):
    """Answers every name with ones, and remembers the names."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __missing__(self, name: str) -> Value:
        if name not in self.asked:
            self.asked.append(name)
        return np.ones(1, np.float32)


@functools.lru_cache(maxsize=4096)
def _trial(step: Step, name: str) -> tuple[tuple[str, ...], ...]:
    """Run a formula to see which tensors and scalars it asks for, and which points it meets."""
    tensors, scalars = _Anything(), _Anything()
    kernel = Kernel(step, NumpyOperations(), scalars, tensors)
    _FORMULAS[name](kernel)
    return tuple(tensors.asked), tuple(scalars.asked), tuple(kernel.points)


def _nothing(k: Kernel) -> Value:
    raise AssertionError("a stage reads a formula that it was said not to depend on")
