"""HDF5 files: datasets named like a recording's tensors, in the file's root or in one group.

bfloat16 is stored as uint16 (or int16, as torch views it). What lies in one uncompressed block is read by offset,
as fast as a safetensors file; everything else by a process of its own (`hdf5_process`).
"""

import importlib.util
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxaudit.byte_files import (
    DTYPES,
    READERS,
    ByteFile,
    Closing,
    FileError,
    Stored,
    as_floats,
    block_spans,
    short,
)
from jaxaudit.sources.source import TENSOR_KEYS
from jaxaudit.sources.worker import Worker

SIGNATURE = b"\x89HDF\r\n\x1a\n"

#: Bytes that are asked of the process at once.
_PART = 1 << 26
#: A dataset may be so many times larger than the file: deflate's most is 1032.
_MOST_COMPRESSED = 2000

#: Attributes that stand for a recording's scalars, and what those are called.
_SCALARS = {
    "lr": "learning_rate",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "beta1": "adam_beta1",
    "adam_beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "adam_beta2": "adam_beta2",
    "eps": "adam_epsilon",
    "epsilon": "adam_epsilon",
    "adam_epsilon": "adam_epsilon",
    "num_steps": "num_steps",
}


class Hdf5Source(Closing):
    """The datasets of an HDF5 file or of one group in it; see `source.Source`.

    Attributes:
        path: the file.
        size: its bytes.
        tensors: by name; of 16-bit integers under the names of big tensors, the floats that they stand for.
        metadata: the attributes, as strings.

    Raises:
        FileError: h5py is missing, the file is damaged, or holds what is not read.
    """

    def __init__(self, path: Path, group: str | None = None):
        if importlib.util.find_spec("h5py") is None:
            raise FileError(
                f"{path}: HDF5 needs h5py, which is not installed. Install it with: pip install 'jaxaudit[hdf5]'"
            )
        self._bytes, self._pool = ByteFile(path), ThreadPoolExecutor(READERS)
        self.path, self.size = self._bytes.path, self._bytes.size
        self._worker = Worker("hdf5_process.py")
        try:
            found = self._worker.ask(self.path.absolute(), group=group)
            self._group = found["group"]
            self._datasets: dict[str, Any] = found["datasets"]
            self._small, self.metadata = _attributes(found["attributes"])
            stored = {name: self._stored(name, x) for name, x in self._datasets.items()}
            self.tensors: Mapping[str, Stored] = {
                name: Stored(dtype, x.shape) for name, (dtype, x) in self._small.items()
            } | stored
            self._check_size(stored)
            self._direct = {
                n: x["offset"] for n, x in self._datasets.items() if self._is_direct(n, x)
            }
            if not set(self._datasets) - set(self._direct):
                self._worker.close()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file, and end the process that reads it."""
        self._pool.shutdown()
        self._worker.close()
        self._bytes.close()

    def read(self, name: str) -> NDArray[Any]:
        """Read a whole small dataset, or an attribute."""
        if name not in self._datasets:
            dtype, array = self._small[name]
            return array.view(DTYPES[dtype])
        tensor = self.tensors[name]
        if tensor.bytes > 1 << 30:
            raise FileError(
                f"{self.path}: `{short(name)}` of {tensor.bytes} bytes is too large to be read whole."
            )
        out = np.empty(tensor.shape, DTYPES[tensor.dtype])
        raw = out.reshape(-1).view(np.uint8)
        if out.size:
            if name in self._direct:
                self._bytes.fill(raw, self._direct[name], name)
            else:
                self._worker.fill(self.path.absolute(), raw, dataset=self._place(name))
        if tensor.dtype == "BOOL":  # NumPy's booleans must be 0 or 1
            raw[:] = raw != 0
        return out

    def read_floats(self, name: str) -> NDArray[np.float64]:
        """Read a small dataset or attribute as doubles."""
        return as_floats(self.tensors[name].dtype, self.read(name))

    def read_rows(
        self, name: str, steps: tuple[int, int], rows: tuple[int, int], out: NDArray[Any]
    ) -> None:
        """Read entries of a dataset.

        Raises:
            FileError: the file has become shorter, or cannot be read.
        """
        tensor, buffer = self.tensors[name], out.reshape(-1).view(np.uint8)
        if name in self._direct:
            spans = block_spans(tensor, self._direct[name], steps, rows, buffer)
            for done in [self._pool.submit(self._bytes.fill, part, at, name) for at, part in spans]:
                done.result()
            return
        if steps[0] == steps[1]:
            return
        each = len(buffer) // (steps[1] - steps[0])
        count = max(1, _PART // each)
        for first in range(*steps, count):
            last = min(first + count, steps[1])
            part = buffer[(first - steps[0]) * each : (last - steps[0]) * each]
            place = self._place(name)
            self._worker.fill(
                self.path.absolute(), part, dataset=place, steps=[first, last], rows=list(rows)
            )

    def fingerprint(self) -> str:
        """Return the SHA-256 of the file's length and of its first MiB."""
        return self._bytes.fingerprint(1 << 20)

    def _place(self, name: str) -> str:
        return f"/{self._group}/{name}" if self._group else f"/{name}"

    def _stored(self, name: str, found: Mapping[str, Any]) -> Stored:
        """Say what a dataset's patterns are: 16-bit integers are bfloat16, unless an attribute says float16."""
        dtype = found["dtype"]
        if name in TENSOR_KEYS.values() and dtype in ("U16", "I16"):
            stated = (found["stated"] or "bfloat16").lower()
            names = {
                "bfloat16": "BF16",
                "bf16": "BF16",
                "float16": "F16",
                "f16": "F16",
                "half": "F16",
            }
            dtype = names.get(stated.removeprefix("torch."), "BF16" if stated in ("uint16", "int16") else None)  # fmt: skip
            if dtype is None:
                raise FileError(
                    f"{self.path}: `{name}` holds 16-bit integers that its attribute `dtype` calls "
                    f"{short(repr(stated))}; needed 'bfloat16' or 'float16'."
                )
        return Stored(dtype, tuple(found["shape"]))

    def _check_size(self, stored: Mapping[str, Stored]) -> None:
        for name, tensor in stored.items():
            if tensor.bytes > _MOST_COMPRESSED * self.size:
                raise FileError(
                    f"{self.path}: `{short(name)}` of shape {short(list(tensor.shape))} would be {tensor.bytes} bytes, "
                    f"out of a file of {self.size}. Such a file is damaged or hostile."
                )

    def _is_direct(self, name: str, found: Mapping[str, Any]) -> bool:
        """Tell whether a dataset can be read by offset; the file and the library must show the same bits."""
        if found["layout"] != "contiguous" or found["swapped"] or not found.get("offset"):
            return False
        tensor = self.tensors[name]
        if len(tensor.shape) < 2 or not tensor.bytes or found["offset"] + tensor.bytes > self.size:
            return False
        for entry in {0, tensor.shape[0] - 1}:
            ours, theirs = (np.empty(tensor.row_bytes // tensor.shape[1], np.uint8) for _ in "ab")
            self._bytes.fill(ours, found["offset"] + entry * tensor.row_bytes, name)
            self._worker.fill(
                self.path.absolute(), theirs, dataset=self._place(name), steps=[entry, entry + 1], rows=[0, 1]
            )  # fmt: skip
            if ours.tobytes() != theirs.tobytes():
                return False
        return True


def _attributes(
    found: Mapping[str, Any],
) -> tuple[dict[str, tuple[str, NDArray[Any]]], dict[str, str]]:
    """Turn attributes into scalars of the recording, and metadata."""
    small: dict[str, tuple[str, NDArray[Any]]] = {}
    metadata: dict[str, str] = {}
    for name, value in found.items():
        if "text" in value:
            metadata[name] = value["text"]
            continue
        kind = np.dtype(value["dtype"])
        metadata[name] = json.dumps(value["values"])
        key = _SCALARS.get(name)
        if key and kind.kind in "fiu":
            stored = {"f4": "F32", "f8": "F64"}.get(value["dtype"], "F64")
            small[key] = stored, np.asarray(value["values"], "<f4" if stored == "F32" else "<f8")
        elif name == "betas" and np.shape(value["values"]) == (2,):
            for key, beta in zip(("adam_beta1", "adam_beta2"), value["values"], strict=True):
                stored = "F32" if value["dtype"] == "f4" else "F64"
                small[key] = stored, np.asarray(beta, "<f4" if stored == "F32" else "<f8")
    return small, metadata
