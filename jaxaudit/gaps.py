"""Recordings with gaps: which of their steps can be audited, and what the missing ones leave untold.

A recorder that keeps every k-th step stores the state before and after each of them. Every such step can be replayed on
its own; nothing is ever replayed, run or counted across a gap.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxaudit.byte_files import FileError, short


@dataclasses.dataclass(frozen=True)
class Gaps:
    """The recorded steps of a parameter, T of them, among the entries of its tensors.

    Attributes:
        before: entry with the state before each step, (T,).
        after: entry with the state after it, and its gradient, (T,).
        numbers: number of each step among the parameter's own, from 1, (T,). It is the timestep of the run, unless
            the parameter was left out of some.
        timesteps: number in the run of the state before the first step, and of the state after each, (T+1,).
    """

    before: NDArray[np.int64]
    after: NDArray[np.int64]
    numbers: NDArray[np.int64]
    timesteps: NDArray[np.int64]

    @property
    def states(self) -> NDArray[np.int64]:
        """Entries of the state before the first step, and of the state after each, (T+1,)."""
        return np.append(self.before[:1], self.after)

    @property
    def resumed(self) -> NDArray[np.int64]:
        """Steps, counted from 1 as recorded, that do not follow on the one before."""
        return np.flatnonzero(self.before[1:] != self.after[:-1]) + 2

    def resumes(self, step: int) -> bool:
        """Tell whether a step, counted from 1 as recorded, does not follow on the one before."""
        return step > 1 and bool(self.before[step - 1] != self.after[step - 2])

    def text(self) -> str:
        """Say in words what is there."""
        return f"{self.numbers.size:,} of {int(self.numbers[-1]):,} steps were recorded"


def find(path: Path, metadata: Mapping[str, str], entries: int, first_step: int) -> Gaps | None:
    """Find the recorded steps by what a recording's metadata say; None where nothing is missing in between.

    `timesteps` counts the optimizer's steps at each entry, `step_counts` those of the parameter itself where these are
    others, `skipped_steps` names entries of steps that left the parameter alone. An entry that no recorded step led to
    has no learning rate, or one that was not counted on from the entry before.

    Args:
        path: for messages.
        metadata: of the recording.
        entries: of the tensors' first axis.
        first_step: the parameter's count at its first own step.

    Raises:
        FileError: the metadata contradict themselves.
    """
    taken = _counts(metadata.get("timesteps"))
    if taken is None:
        return None
    if len(taken) != entries or np.any(np.diff(taken) < 0):
        raise FileError(
            f"{path}: the metadata `timesteps` is {short(metadata['timesteps'])}; needed {entries} numbers that do not "
            "fall, one for each row of `W`. Record the run again."
        )
    stepped = np.append(False, np.diff(taken) == 1)
    rates = _rates(metadata, entries)
    if rates is not None:
        wrong = np.flatnonzero(rates[1:] & ~stepped[1:]) + 1
        if wrong.size:
            t = int(wrong[0])
            raise FileError(
                f"{path}: row {t} of `W` has a learning rate, but the metadata `timesteps` goes from {taken[t - 1]} to "
                f"{taken[t]} there; needed the state before that step. Record the run again."
            )
        stepped &= rates
    skipped = _counts(metadata.get("skipped_steps"))
    if stepped[1:].all():
        return None
    idle = np.zeros(entries, bool) if skipped is None else np.isin(np.arange(entries), skipped)
    idle &= stepped
    after = np.flatnonzero(stepped & ~idle)
    if not after.size:
        raise FileError(
            f"{path}: none of its {entries} states follows a step of the parameter; there is nothing to audit."
        )
    own = _counts(metadata.get("step_counts"))
    if own is None:  # as far as it is known: it may have been left alone in a gap, too
        count = taken - np.cumsum(idle)
    elif len(own) == entries:
        count = own - (first_step - 1)
    else:
        raise FileError(
            f"{path}: the metadata `step_counts` has {len(own)} numbers, needed {entries}. Record the run again."
        )
    numbers = count[after]
    if numbers[0] < 1 or np.any(np.diff(numbers) < 1):
        raise FileError(
            f"{path}: the metadata `step_counts` does not rise with every step. Record the run again."
        )
    timesteps = np.append(taken[after[0] - 1], taken[after])
    return Gaps(after - 1, after, numbers, timesteps)


def _rates(metadata: Mapping[str, str], entries: int) -> NDArray[np.bool_] | None:
    """Tell at which entries the metadata give a learning rate; None where they give one for all."""
    try:
        stated: Any = json.loads(metadata.get("hyperparameters", "{}"))
    except (ValueError, RecursionError):
        return None  # whoever reads the hyperparameters will say so
    rates = stated.get("learning_rate") if isinstance(stated, dict) else None
    if not isinstance(rates, list) or len(rates) != entries:
        return None
    return np.array([rate is not None for rate in rates])


def _counts(text: str | None) -> NDArray[np.int64] | None:
    """Read a JSON list of counts; None where it is none."""
    try:
        found = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        return None
    good = isinstance(found, list) and all(type(n) is int and 0 <= n < 1 << 53 for n in found)
    return np.array(found, np.int64) if good else None
