"""The life of every token: when it cooled, when it froze, and how far it came."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxaudit import floats
from jaxaudit.floats import Format
from jaxaudit.strips import Countable

_CHUNK = 1 << 20  # elements whose float64 values are held at once


class Lives(Countable):
    """Follows tokens from step to step.

    Args:
        tokens: how many there are.
        steps: range of steps.

    Attributes:
        last_early: last timestep with L2 > sqrt(D), 0 for none; this and the others int64 or float64, (tokens,).
        last_midlife: last timestep with Linf > 1.
        last_move: last timestep at which it moved.
        thaw_count: moves after a step without one.
        weight_path: sum of the L2 norms of its changes.
        lattice_path: sum of its steps on the ordered line.
    """

    MERGED = {
        "last_early": "rows",
        "last_midlife": "rows",
        "last_move": "rows",
        "thaw_count": "rows",
        "weight_path": "rows",
        "lattice_path": "rows",
    }

    def __init__(self, tokens: int, steps: tuple[int, int]):
        self._steps = steps
        self._moved: NDArray[np.bool_] | None = None
        self.last_early, self.last_midlife, self.last_move, self.thaw_count, self.lattice_path = (
            np.zeros(tokens, np.int64) for _ in range(5)
        )
        self.weight_path = np.zeros(tokens)

    def forget(self) -> None:
        """Forget which of a strip's tokens moved last."""
        self._moved = None

    def live(
        self,
        timestep: int,
        tokens: slice,
        *,
        early: NDArray[np.bool_],
        midlife: NDArray[np.bool_],
        moved: NDArray[np.bool_],
        change: NDArray[np.float64],
        line: NDArray[np.integer],
    ) -> None:
        """Take one step of a strip's tokens.

        Args:
            timestep: which one.
            tokens: which; the other arguments have a value for each.
            early: whether L2 > sqrt(D).
            midlife: whether Linf > 1.
            moved: whether it moved at all.
            change: L2 norm of the change of its weights.
            line: steps on the ordered line, summed over its elements.
        """
        self.last_early[tokens][early] = timestep
        self.last_midlife[tokens][midlife] = timestep
        self.last_move[tokens][moved] = timestep
        if self._moved is not None:  # a move in the first step is no thaw
            self.thaw_count[tokens] += moved & ~self._moved
        self._moved = moved.copy()
        with np.errstate(invalid="ignore", over="ignore"):
            self.weight_path[tokens] += change
        self.lattice_path[tokens] += line

    def freeze_onset(self) -> NDArray[np.int64]:
        """Return the timestep after which each token never moves: 0 where it never did, -1 where it still does."""
        return np.where(self.last_move == self._steps[1] - 1, -1, self.last_move)

    def settled(self, members: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Count tokens by the regime that they have not left for good; (4, timesteps, groups)."""
        # In order: an early step has Linf > 1, and a step with that moves.
        last = np.stack([self.last_early, self.last_midlife, self.last_move])
        length = self._steps[1] - self._steps[0]
        found = []
        for tokens in members:
            ends = np.maximum(last[:, tokens] - self._steps[0] + 1, 0)  # timesteps until then
            # How many have not ended at each timestep: those that end later than it begins.
            ended = [np.bincount(each, minlength=length + 1).cumsum()[:length] for each in ends]
            bounds = [np.zeros(length, np.int64), *(tokens.size - each for each in ended)]
            bounds.append(np.full(length, tokens.size))
            found.append(np.diff(bounds, axis=0))
        return np.stack(found, axis=-1)


def squared_norms(
    patterns: NDArray[np.unsignedinteger], fmt: Format, other: NDArray[Any] | None = None
) -> NDArray[np.float64]:
    """Sum the squares of each row, or of its difference to another, in float64; (rows,).

    Elements at the same point of the ordered line have no difference, be they infinite or NaN.

    Args:
        patterns: (rows, width).
        fmt: their format.
        other: what is subtracted.
    """
    found = np.zeros(len(patterns))
    for part in _parts(patterns.shape):
        with np.errstate(invalid="ignore"):
            values = floats.decode(patterns[part], fmt).astype(np.float64)
            if other is not None:
                values -= floats.decode(other[part], fmt).astype(np.float64)
                values[floats.ulp_distance(patterns[part], other[part], fmt) == 0] = 0
            found[part] = (values * values).sum(axis=1)
    return found


def line_distances(
    a: NDArray[np.unsignedinteger], b: NDArray[np.unsignedinteger], fmt: Format
) -> NDArray[np.int64]:
    """Sum the steps on the ordered line between the elements of two rows; (rows,), from (rows, width)."""
    found = np.zeros(len(a), np.int64)
    for part in _parts(a.shape):
        found[part] = floats.ulp_distance(a[part], b[part], fmt).sum(axis=1)
    return found


def _parts(shape: tuple[int, ...]) -> Iterable[slice]:
    rows = max(1, _CHUNK // shape[1])
    return (slice(k, k + rows) for k in range(0, shape[0], rows))
