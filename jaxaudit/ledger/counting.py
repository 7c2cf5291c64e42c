"""Counts by timestep and token group: one integer code for each element says everything that is counted of it.

A histogram of the codes then holds every count, exactly and in any order. Sizes (ratios of float64 numbers) become
codes by their bits: `STEPS_PER_BINADE` bins to a factor of two, whose edges are float64 numbers without error.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from jaxaudit.devices import Device
from jaxaudit.recording import TokenGroups, Window

#: Bins to a factor of two; a power of two.
STEPS_PER_BINADE = 32

#: Exponents of the first bin and of the end of the last; these two hold everything beyond.
LOWEST, HIGHEST = -32, 32

#: Bins of a size.
SIZES = (HIGHEST - LOWEST) * STEPS_PER_BINADE

#: Probabilities of the quantiles that datasets hold.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

#: Numbers of the histograms that are made at once: they stay in the cache, and in memory that malloc keeps.
_AT_ONCE = 1 << 19

_SHIFT = 52 - STEPS_PER_BINADE.bit_length() + 1


def size_code(sizes: Any) -> Any:
    """Return the bin of each size: int32 of 0 to SIZES - 1.

    Args:
        sizes: positive float64 numbers (JAX or NumPy); what comes of zero, infinity and NaN means nothing.
    """
    if isinstance(sizes, np.ndarray):
        steps, clip = sizes.view(np.int64) >> _SHIFT, np.clip
    else:
        steps, clip = lax.bitcast_convert_type(sizes, jnp.int64) >> _SHIFT, jnp.clip
    origin = (1023 + LOWEST) * STEPS_PER_BINADE
    return clip(steps - origin, 0, SIZES - 1).astype(np.int32)


def steps_at_once(groups: int, bins: int) -> int:
    """Return of how many timesteps histograms are made at once."""
    return max(1, _AT_ONCE // (groups * bins))


def size_edges() -> NDArray[np.float64]:
    """Return the lower edge of each bin of a size."""
    exponent, part = np.divmod(np.arange(SIZES), STEPS_PER_BINADE)
    return np.ldexp(1 + part / STEPS_PER_BINADE, exponent + LOWEST)


def quantiles(histogram: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the lower edges of the bins that hold the quantiles, (..., len(QUANTILES)), from (..., SIZES).

    The quantile of probability q is the smallest size with at least a share q at or below it, as NumPy's
    "inverted_cdf"; the edge is less than 1/32 of itself below it. NaN where nothing was counted.
    """
    below = np.cumsum(histogram, axis=-1)
    total = below[..., -1:]
    found = [(below < np.ceil(q * total)).sum(axis=-1) for q in QUANTILES]
    values = size_edges()[np.minimum(np.stack(found, axis=-1), SIZES - 1)]
    return np.where(total > 0, values, np.nan)


class GroupCounter:
    """Counts the codes of a window's elements by timestep and token group.

    Tokens that are in the same groups are counted together and added up afterwards, so that the time does not
    depend on the number of overlapping groups.

    Args:
        groups: of tokens.
        width: elements of a token.
        device: where the codes are.
    """

    def __init__(self, groups: TokenGroups, width: int, device: Device):
        member = np.zeros((groups.tokens, len(groups.members)), bool)
        for k, tokens in enumerate(groups.members.values()):
            member[tokens, k] = True
        kinds, kind = np.unique(member, axis=0, return_inverse=True)
        #: How many kinds of tokens there are, that of tokens in no group as the last; and those of each group.
        self._count, self._kinds_of = len(kinds) + 1, [np.flatnonzero(inside) for inside in kinds.T]
        self._kind = kind.reshape(-1)
        self._width, self._device = width, device
        self._offsets: dict[tuple[tuple[int, int], int], jax.Array] = {}

    def forget(self) -> None:
        """Forget a strip's rows."""
        self._offsets.clear()

    def offsets(self, window: Window, bins: int) -> jax.Array:
        """Return what a program adds to the codes, int32 (elements,): it tells the kinds of tokens apart.

        Tokens that are not the window's own are of a kind that is in no group.

        Args:
            window: which tokens.
            bins: number of codes.
        """
        key = (window.own, bins)
        if key not in self._offsets:
            kind = self._kind[slice(*window.rows)].copy()
            kind[: window.overlap] = self._count - 1
            kind = np.repeat(kind * bins, self._width)
            self._offsets[key] = jax.device_put(kind.astype(np.int32), self._device)
        return self._offsets[key]

    def count(
        self, codes: jax.Array | NDArray[np.int32], steps: int, bins: int
    ) -> NDArray[np.int64]:
        """Count on the host: (steps, groups, bins) of the first `steps` rows of codes.

        Args:
            codes: int32 (length, elements), each of 0 to bins - 1 with the element's offset added.
            steps: how many rows count.
            bins: number of codes.
        """
        found = np.zeros((steps, len(self._kinds_of), bins), np.int64)
        for row, counts in zip(np.asarray(codes), found, strict=False):
            by_kind = np.bincount(row, minlength=self._count * bins).reshape(-1, bins)
            for mine, kinds in zip(counts, self._kinds_of, strict=True):
                for kind in kinds:
                    mine += by_kind[kind]
        return found
