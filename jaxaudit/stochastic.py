"""Stochastic rounding to bfloat16: which weights it can give, and whether chance played as it should.

The weight before rounding lies between two bfloat16 neighbours. It goes to the one away from zero with a probability
of its low 16 bits over 65,536 (torchao adds 16 random bits and truncates), and to the other one else.

That each weight is one of the two is necessary, but rounding to nearest passes it as well. So the elements are
sorted by their fraction into `BINS` bins, and the number that went away from zero is compared with its
expectation in each: rounding to nearest never does in the lower bins and always in the upper ones.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Bins of the fraction between the neighbours, all of the same width.
BINS = 8

#: A recording whose test says less than this was not rounded by such chance.
LEAST_P_VALUE = 1e-9

_LOW = 0xFFFF


def away(replayed: Any, recorded: Any) -> Any:
    """Mark the weights that were rounded away from zero; NumPy or JAX.

    Args:
        replayed: float32 patterns (uint32) before rounding.
        recorded: float32 patterns of the recorded bfloat16 weights.
    """
    low = replayed & np.uint32(_LOW)
    return (low != 0) & (recorded == replayed - low + np.uint32(_LOW + 1))


def possible(replayed: Any, recorded: Any) -> Any:
    """Mark the weights that are one of the two neighbours; NumPy or JAX; arguments as for `away`."""
    towards = recorded == replayed & np.uint32(0xFFFFFFFF - _LOW)
    return towards | away(replayed, recorded)


def bin_of(replayed: Any) -> Any:
    """Return the bin of each fraction; NumPy or JAX."""
    return (replayed & np.uint32(_LOW)) // np.uint32((_LOW + 1) // BINS)


def tally(replayed: NDArray[np.uint32], recorded: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Count by bin what was rounded away from zero, with expectation and variance, (3, BINS).

    Weights that are neither neighbour do not count.
    """
    counted = possible(replayed, recorded)
    fraction = (replayed[counted] & _LOW) / (_LOW + 1)
    where = bin_of(replayed[counted])
    went = away(replayed[counted], recorded[counted]).astype(np.float64)
    terms = (went, fraction, fraction * (1 - fraction))
    return np.array([np.bincount(where, term, BINS) for term in terms], np.float64)


def p_value(
    away: NDArray[Any], expected: NDArray[Any], variance: NDArray[Any]
) -> NDArray[np.float64]:
    """Test counts against their expectation, by Pearson's chi-square over the bins, the last axis.

    Each bin's count is a sum of independent trials, about normal once the variance exceeds a few units; bins
    with less are left out. NaN where no bin is left.

    Source: Pearson (1900); the tail of the chi-square distribution in closed form.
    """
    enough = variance >= 5
    with np.errstate(invalid="ignore", divide="ignore"):
        terms = np.where(enough, (away - expected) ** 2 / variance, 0)
    tails = np.vectorize(_chi_square_tail, otypes=[float])
    return np.asarray(tails(terms.sum(axis=-1), enough.sum(axis=-1)))


def _chi_square_tail(x: float, freedom: int) -> float:
    """Return the probability that a chi-square variable exceeds x.

    Q(x; n+2) = Q(x; n) + (x/2)^(n/2) e^(-x/2) / Gamma(n/2 + 1), from Q(x; 1) = erfc(sqrt(x/2)), Q(x; 2) =
    e^(-x/2). Source: Abramowitz and Stegun, 26.4.8.
    """
    if freedom == 0:
        return math.nan
    half = x / 2
    tail = math.erfc(math.sqrt(half)) if freedom % 2 else math.exp(-half)
    for n in range(2 - freedom % 2, freedom, 2):
        tail += half ** (n / 2) * math.exp(-half) / math.gamma(n / 2 + 1)
    return min(tail, 1.0)
