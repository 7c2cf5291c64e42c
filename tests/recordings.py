"""Recordings for tests: small consistent ones, cut from the sample, and a writer that writes whatever it is told."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import jaxaudit

#: How NumPy holds each dtype's bits.
KINDS = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<u2",
    "BF16": "<u2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<u4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<u8",
}
BIG = ("W", "grad_W", "momentum_W", "variance_W")
SCALARS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")

#: A tensor: its safetensors dtype, and an array whose bits are taken as they are.
Tensor = tuple[str, np.ndarray]


def f32(values: Any) -> Tensor:
    return "F32", np.asarray(values, "<f4")


def f64(values: Any) -> Tensor:
    return "F64", np.asarray(values, "<f8")


def serialize(header: Any, data: bytes = b"", padding: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * padding
    return len(text).to_bytes(8, "little") + text + data


def header_of(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    data = b""
    for name, (dtype, array) in tensors.items():
        assert array.dtype.itemsize == np.dtype(KINDS[dtype]).itemsize
        raw = np.ascontiguousarray(array).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        data += raw
    return header, data


def write_afresh(path: Path, content: bytes) -> Path:
    """Write a new file; some file systems flush to the disk when an old one is written over."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    return write_afresh(path, serialize(*header_of(tensors, metadata)))


def parse(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file's tensors as bits, with nothing of the library."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(content[start + begin : start + end], KINDS[entry["dtype"]])
        tensors[name] = entry["dtype"], array.reshape(entry["shape"]).copy()
    return tensors, metadata


def short_run(steps: int = 12) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the sample's first steps; PyTorch wrote it, so it replays under `torch-cpu-loop`."""
    tensors, metadata = parse(jaxaudit.sample_paths()[0].read_bytes())
    length = tensors["W"][1].shape[0]
    cut = {
        name: (dtype, array[: steps + 1] if array.shape[:1] == (length,) else array)
        for name, (dtype, array) in tensors.items()
    }
    return cut | {"num_steps": ("I64", np.asarray(steps, "<i8"))}, metadata


def small_run(
    shape: tuple[int, ...] = (4, 3, 2), dtype: str = "BF16", moments: str = "F32"
) -> dict[str, Tensor]:
    """Return random patterns of the right shapes: everything fits, nothing replays."""
    random = np.random.default_rng(0)

    def patterns(dtype: str) -> Tensor:
        width = np.dtype(KINDS[dtype]).itemsize
        raw = random.integers(0, 256, math.prod(shape) * width, np.uint8)
        return dtype, raw.view(KINDS[dtype]).reshape(shape)

    return {
        "W": patterns(dtype),
        "grad_W": patterns(dtype),
        "momentum_W": patterns(moments),
        "variance_W": patterns(moments),
        "learning_rate": f32(0.001),
        "weight_decay": f32(0.1),
        "adam_beta1": f32(0.9),
        "adam_beta2": f32([0.999]),
        "adam_epsilon": f32(1e-8),
        "num_steps": f32(shape[0] - 1),
    }
