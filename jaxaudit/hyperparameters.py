"""The numbers that an optimizer was given, as the doubles that it computed with."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What Adam was given, in double precision.

    Attributes:
        learning_rate: one double for each step, in the order of the steps; shape (T,).
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled or coupled (L2), as the optimizer applies it.
        origin: for each name above, where its value came from.
    """

    learning_rate: NDArray[np.float64]
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
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
