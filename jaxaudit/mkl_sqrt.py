"""The float32 square root of Intel's MKL on AMD processors, which is not the correctly rounded one.

PyTorch's `sqrt` of float32 tensors on x86 CPUs is MKL's `vmsSqrt` in its high-accuracy mode. On AMD
processors that picks a kernel (`sSqrt_EXHAynn` in MKL 2024.2) which refines the processor's own estimate
of 1 / sqrt(x), the instruction `rsqrtps`; `operations` states the refinement. About 17 % of its results
are one ulp away from those of IEEE 754. This module holds what is no arithmetic: the estimate, and the
recognition of the root in a recording's metadata.

Neither is documented. The estimate was read off an AMD EPYC (family 26, model 2); the whole was compared
with PyTorch for every float32 pattern (`scripts/prove_square_root.py`, results/square-root.json).
"""

import functools
from typing import Literal

import numpy as np
from numpy.typing import NDArray

#: Which square root made a recording: the correctly rounded one, or MKL's on AMD processors.
RootName = Literal["ieee", "mkl-amd"]

#: SHA-256 of the little-endian float32 roots of the recorder's probe vector: element i of 4096 has the
#: bits 0x3F800000 + 4096 * i + (1103 * i mod 4096).
_PROBES: dict[str, RootName] = {
    "54dd2579d1441a726a9cbc27a7eac08cd189f151663f72024e8bafba5d307dda": "ieee",
    "cbd0f5e7977630b6b70a1587ea4f1435b558232afd6d7dee93417b906aafcfbc": "mkl-amd",
}

#: Of each 32nd part of [1, 4): bit j tells whether the estimate falls between cells j and j + 1 of 16.
_FALLS = (
    *(0x7F7F, 0x77F7, 0x5F7B, 0x5DDB, 0x5B76, 0x6D6D, 0x5B56, 0x356A),
    *(0x5555, 0x2AAA, 0x552A, 0x4AA5, 0x2A52, 0x494A, 0x4A52, 0x24A4),
    *(0x5B6D, 0x36D6, 0x2B56, 0x5556, 0x2AAA, 0x4AA9, 0x254A, 0x294A),
    *(0x1494, 0x2492, 0x2492, 0x2249, 0x1224, 0x1224, 0x2222, 0x2222),
)

#: Where the formula of `_anchors` gives one less, or one more, than the processor; 16 * part + block.
_TOO_LOW = (133, 135, 157, 162, 230, 245, 250, 266)
_TOO_HIGH = (5, 14, 259, 406, 411, 454, 458, 477, 496, 503)


def root_of_probe(sha256: str) -> RootName | None:
    """Tell which square root a recording's `sqrt_probe` was taken with; None if neither.

    Args:
        sha256: the field of that name, in hexadecimal.
    """
    return _PROBES.get(sha256.lower())


@functools.cache
def reciprocal_root_steps() -> NDArray[np.uint16]:
    """Return what `rsqrtps` gives on [1, 4), as steps k of 2^-13 above 1/2: 1/2 + k / 8192.

    Element i, uint16 of shape (8192,), holds for all float32 numbers whose bits, less those of 1, are i
    in their upper 13 of 24 places: 2^12 cells in either binade. A factor of 4 in the operand halves the
    estimate, exactly.

    The processor looks up two tables and subtracts: the upper 5 and middle 4 bits of i choose an anchor,
    the upper 5 and lower 4 bits a fall from it. (Compare Das Sarma and Matula, "Faithful bipartite ROM
    reciprocal tables", ARITH 1995.)
    """
    falls = _falls()
    steps = _anchors(falls)[:, :, None] - falls[:, None, :]
    result = steps.reshape(-1).astype(np.uint16)
    result.flags.writeable = False  # the cache hands out one array to all
    return result


def _falls() -> NDArray[np.int64]:
    """Count the falls up to each cell of a block; (part, cell)."""
    fallen = np.array(_FALLS)[:, None] >> np.arange(15) & 1
    return np.pad(np.cumsum(fallen, axis=1), ((0, 0), (1, 0)))


def _anchors(falls: NDArray[np.int64]) -> NDArray[np.int64]:
    """Compute the step of each block's first cell; (part, block).

    It is such that the block's mean error is small: the mean over the block's cells of what
    1/2 + k / 8192 = 1 / sqrt(middle of the cell) asks for, plus the cell's fall, plus 5/8, rounded down.
    The 5/8 was fitted, and 18 of 512 anchors are one off. No mean comes nearer than 0.001 to an integer,
    so that the order of its summation is without effect.
    """
    middles = (np.arange(4096) + 0.5) / 4096 + 1
    cells = np.concatenate([middles, 2 * middles])
    wanted = (2 / np.sqrt(cells) - 1) * 4096
    means = (wanted.reshape(32, 16, 16) + falls[:, None, :]).mean(axis=2)
    anchors = np.floor(means + 0.625).astype(np.int64).reshape(-1)
    anchors[list(_TOO_LOW)] += 1
    anchors[list(_TOO_HIGH)] -= 1
    return anchors.reshape(32, 16)
