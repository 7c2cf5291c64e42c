"""The numbers that an optimizer was given, as the doubles that it computed with."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCount:
    """Which count each recorded step has in the bias corrections.

    Attributes:
        first: count of the recording's first step; more than 1 where a run was resumed.
        limit: count that a step counter of low precision never exceeds (256 in bfloat16: 256 + 1 rounds
            back to 256); None where it counts on.
        corrects: whether moments are corrected for their bias at all.
        numbers: number of each recorded step, from 1, where steps in between are missing; () for 1, 2, 3, ...
    """

    first: int = 1
    limit: int | None = None
    corrects: bool = True
    numbers: tuple[int, ...] = ()

    def at(self, timestep: int) -> float:
        """Return the count at a timestep of the recording, from 1; infinite without bias correction."""
        if not self.corrects:
            return float("inf")
        count = self.number(timestep) + self.first - 1
        return float(count if self.limit is None else min(count, self.limit))

    def number(self, timestep: int) -> int:
        """Return the number of a recorded step among all, from 1."""
        return self.numbers[timestep - 1] if self.numbers else timestep

    def describe(self) -> str:
        """Say it in words."""
        if not self.corrects:
            return "no bias correction"
        limited = "" if self.limit is None else f", stuck at {self.limit:,}"
        return f"counted from {self.first:,}{limited}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Hyperparameters:
    """What Adam was given, in double precision.

    Attributes:
        learning_rate: one double for each step, in the order of the steps; shape (T,).
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled or coupled (L2), as the optimizer applies it.
        corrected_beta2: beta2 of the bias correction, where that is another number than the decay's (a
            beta2 that was rounded on its way to the second moment only); None for the same.
        count: the step counts of the bias corrections.
        exact_rate: the learning rate is the very double that the trainer used. Where only a float32 is
            known, and the trainer's double was no short decimal, what is computed from it can be an ulp off.
        origin: for each name above, where its value came from.
    """

    learning_rate: NDArray[np.float64]
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    corrected_beta2: float | None = None
    count: StepCount = StepCount()
    exact_rate: bool = True
    origin: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, dict[str, object]]:
        """Return each value with its origin; a constant learning rate as one number."""
        rates = np.unique(self.learning_rate)
        rate = float(rates[0]) if rates.size == 1 else self.learning_rate.tolist()
        values = {"learning_rate": rate} | {
            name: getattr(self, name) for name in ("beta1", "beta2", "epsilon", "weight_decay")
        }
        return {
            name: {"value": value, "origin": self.origin.get(name, "given")}
            for name, value in values.items()
        }

    def differences(self, stored: "Hyperparameters") -> dict[str, object]:
        """Name what is used here instead of what was stored, by name."""
        names = ("beta1", "beta2", "weight_decay", "corrected_beta2")
        found: dict[str, object] = {
            name: getattr(self, name)
            for name in names
            if getattr(self, name) != getattr(stored, name)
        }
        if self.count != stored.count:
            found["step_count"] = self.count.describe()
        return found


def double_of_float32(stored: np.float32) -> tuple[float, bool]:
    """Turn a float32 back into the double that it was rounded from, where that is a short decimal.

    The shortest decimal that rounds to the stored float32 recovers every constant of at most six
    significant digits. A computed value (a scheduled learning rate) has no short decimal; its own
    widening is then returned.

    Returns:
        The double, and whether a decimal of at most seven digits was found.
    """
    shortest = np.format_float_scientific(np.float32(stored), unique=True, trim="-")
    digits = len(shortest.split("e")[0].replace(".", "").replace("-", "").strip("0"))
    if digits <= 7 and np.float32(float(shortest)) == np.float32(stored):
        return float(shortest), True
    return float(stored), False
