"""Recordings of any size that replay exactly under `torch-cpu-loop`, made in NumPy within seconds.

A block of tokens is trained step by step with the project's own NumPy step; a recording of more tokens holds
the block again and again, and one of fewer steps its first steps. No audit's time depends on whether tokens
repeat: every element is computed for itself.
"""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reporting import Failure

from jaxaudit.recorders.writing import RecordingWriter, RowLayout, write_tensors

ARITHMETIC = "torch-cpu-loop"

#: Elements that are computed; a quarter of the block's tokens are dead, and see no gradient after `LAST_GRADIENT`.
BLOCK_ELEMENTS, LAST_GRADIENT = 4096, 3

RATE, BETAS, EPSILON, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.1

#: Keys of the tensors in the file, and their dtypes.
LAYOUT = {"W": "BF16", "grad_W": "BF16", "momentum_W": "F32", "variance_W": "F32"}

#: Bytes of an element in one timestep.
ELEMENT_BYTES = 12

_KEYS = {"param": "W", "exp_avg": "momentum_W", "exp_avg_sq": "variance_W", "grad": "grad_W"}


def make(path: Path, steps: int, tokens: int, width: int = 64) -> Path:
    """Write a recording and return its path.

    Args:
        path: of the recording.
        steps: T.
        tokens: rows of the parameter.
        width: elements of a row.

    Raises:
        Failure: the disk has not the room.
    """
    # The writer keeps what it streams apart until it puts the file together.
    needed, free = 2 * ELEMENT_BYTES * (steps + 1) * tokens * width, shutil.disk_usage(path.parent)
    if free.free < needed:
        raise Failure(
            f"{path.parent}: a recording of {steps} x {tokens} x {width} needs {needed} bytes, {free.free} are "
            "free. Choose another --scratch.", 2,
        )  # fmt: skip
    block = course(steps, width)
    layouts = {key: RowLayout(dtype, (tokens, width)) for key, dtype in LAYOUT.items()}
    with RecordingWriter(path, layouts, metadata=_metadata()) as writer:
        for t in range(steps + 1):
            writer.append({key: np.resize(rows[t], (tokens, width)) for key, rows in block.items()})
    return path


def make_groups(path: Path, tokens: int, groups: int) -> Path:
    """Write token groups in which tokens take turns, and return the path."""
    write_tensors(path, {"token_group": (np.arange(tokens) % groups).astype(np.int32)})
    return path


def _metadata() -> dict[str, str]:
    given = dict(learning_rate=RATE, betas=BETAS, epsilon=EPSILON, weight_decay=WEIGHT_DECAY)
    return {"hyperparameters": json.dumps(given), "optimizer": "AdamW", "made_by": "benchmark"}


@functools.lru_cache(maxsize=2)
def course(steps: int, width: int) -> dict[str, NDArray[np.generic]]:
    """Train the block for some steps; each tensor as recorded, (steps + 1, tokens of the block, width)."""
    from jaxaudit.arithmetics import CATALOGUE, Options, make_step
    from jaxaudit.floats import BFLOAT16, round_to
    from jaxaudit.hyperparameters import Hyperparameters
    from jaxaudit.operations import numpy_operations
    from jaxaudit.scalars import scalars_of

    arithmetic, random = CATALOGUE[ARITHMETIC], np.random.default_rng(0)
    given = Hyperparameters(
        learning_rate=np.full(steps, RATE),
        beta1=BETAS[0],
        beta2=BETAS[1],
        epsilon=EPSILON,
        weight_decay=WEIGHT_DECAY,
    )
    step = make_step(arithmetic, BFLOAT16, given, Options())
    scalars = scalars_of(step, arithmetic.rule, given, range(1, steps + 1))
    size, ops = max(4, BLOCK_ELEMENTS // width) * width, numpy_operations(flushes=step.flushes)
    gradient = zero = np.zeros(size, np.float32)
    weight = round_to(random.normal(0, 0.02, size).astype(np.float32), BFLOAT16)
    state: dict[str, Any] = {"exp_avg": zero, "exp_avg_sq": zero, "param": weight}
    tail = np.zeros(size, np.uint8)
    rows = {name: [value] for name, value in {**state, "grad": gradient}.items()}
    for k in range(steps):
        gradient = random.normal(0, 1e-3, size).astype(np.float32)
        gradient[: size // 4] *= k < LAST_GRADIENT
        gradient = round_to(gradient, BFLOAT16)
        at = {name: value[k] for name, value in scalars.items()}
        state = step.advance(ops, at, state | {"grad": gradient, "tail": tail}, {})
        for name, value in {**state, "grad": gradient}.items():
            rows[name].append(np.asarray(value, np.float32))
    return {_KEYS[name]: _recorded(np.stack(rows[name]), name, width) for name in _KEYS}


def _recorded(values: NDArray[np.float32], name: str, width: int) -> NDArray[np.generic]:
    """Shape a tensor, and encode it where it is kept in 16 bits."""
    from jaxaudit.floats import BFLOAT16, encode

    shaped = values.reshape(len(values), -1, width)
    return encode(shaped, BFLOAT16) if LAYOUT[_KEYS[name]] == "BF16" else shaped
