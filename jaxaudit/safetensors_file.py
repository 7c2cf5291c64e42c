"""Safetensors files, opened without loading: the checked header, and rows read on demand.

The `safetensors` package's NumPy interface reads slices six times slower than the page cache delivers them,
and holds the interpreter lock meanwhile; its header is simple enough to read and check here.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
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
    is_count,
    json_of,
    printable,
    short,
)

__all__ = [
    "DTYPES",
    "FileError",
    "SafetensorsFile",
    "Tensor",
    "aligned",
    "prefetched",
    "printable",
    "short",
]

_LARGEST_HEADER = 100_000_000  # the limit of the format's own reader


@dataclasses.dataclass(frozen=True)
class Tensor(Stored):
    """Where a tensor lies: its dtype string, its shape, and its first byte's offset in the file."""

    offset: int


class SafetensorsFile(Closing):
    """A safetensors file whose header has been read and checked; a context manager.

    Attributes:
        path: the file.
        size: its bytes.
        identity: see `ByteFile`.
        tensors: where each tensor lies, by name.
        metadata: the header's strings.

    Raises:
        FileError: the file is missing, is not safetensors, or its header and length disagree.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._bytes, self._pool = ByteFile(path), ThreadPoolExecutor(READERS)
        self.path, self.size = self._bytes.path, self._bytes.size
        self.identity = self._bytes.identity
        try:
            header, self._start = self._read_header()
            self.metadata = _metadata(self.path, header.pop("__metadata__", {}))
            self.tensors = {name: self._tensor(name, entry) for name, entry in header.items()}
            self._check_layout()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; reading from it afterwards fails."""
        self._pool.shutdown()
        self._bytes.close()

    def read(self, name: str) -> NDArray[Any]:
        """Read a whole (small) tensor."""
        tensor = self.tensors[name]
        out = np.empty(tensor.shape, DTYPES[tensor.dtype])
        raw = out.reshape(-1).view(np.uint8)
        if out.nbytes:
            self._bytes.fill(raw, tensor.offset, name)
        if tensor.dtype == "BOOL":  # NumPy's booleans must be 0 or 1
            raw[:] = raw != 0
        return out

    def read_floats(self, name: str) -> NDArray[np.float64]:
        """Read a small tensor of real numbers (F32, F64 or an integer type) as doubles."""
        return as_floats(self.tensors[name].dtype, self.read(name))

    def read_rows(
        self, name: str, steps: tuple[int, int], rows: tuple[int, int], out: NDArray[Any]
    ) -> None:
        """Read entries steps[0]..steps[1]-1 of axis 0, and of each rows[0]..rows[1]-1 of axis 1.

        Args:
            name: which tensor.
            steps: range on the first axis.
            rows: range on the second axis.
            out: C-contiguous array of the tensor's NumPy dtype to fill, of that many entries.

        Raises:
            FileError: the file has become shorter, or cannot be read.
        """
        tensor = self.tensors[name]
        buffer = out.reshape(-1).view(np.uint8)
        spans = block_spans(tensor, tensor.offset, steps, rows, buffer)
        for done in [self._pool.submit(self._bytes.fill, part, at, name) for at, part in spans]:
            done.result()

    def fingerprint(self) -> str:
        """Return the SHA-256 of the file's length and of its first MiB beyond the header."""
        return self._bytes.fingerprint(self._start + (1 << 20))

    def _read_header(self) -> tuple[dict[str, Any], int]:
        lead = self._bytes.pread(8, 0)
        length = int.from_bytes(lead, "little")
        if len(lead) < 8 or length < 2 or length > _LARGEST_HEADER:
            raise FileError(
                f"{self.path}: not a safetensors file ({self.size} bytes, header length "
                f"{length if len(lead) == 8 else 'absent'}). Give a .safetensors recording."
            )
        if 8 + length > self.size:
            raise FileError(
                f"{self.path}: truncated within the header ({self.size} bytes, the header alone needs "
                f"{8 + length}). Copy or record the file again."
            )
        text = self._bytes.pread(length, 8)
        if len(text) < length:
            raise FileError(f"{self.path}: truncated within the header. Copy the file again.")
        try:
            header = json_of(text)
        except (ValueError, RecursionError) as error:
            raise FileError(
                f"{self.path}: the safetensors header is not valid JSON ({short(error)}). "
                "Record or copy the file again."
            ) from error
        if not isinstance(header, dict):
            raise FileError(
                f"{self.path}: the safetensors header is a JSON {type(header).__name__}, not an object."
            )
        return header, 8 + length

    def _tensor(self, name: str, entry: Any) -> Tensor:
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise FileError(
                f"{self.path}: the header's entry for `{short(name)}` lacks dtype, shape or data_offsets."
            ) from None
        whole = isinstance(shape, list) and all(map(is_count, [*shape, begin, end]))
        if not whole or not isinstance(dtype, str) or len(shape) > 32:
            raise FileError(
                f"{self.path}: the header's entry for `{short(name)}` has no valid dtype, shape and "
                "data_offsets."
            )
        if dtype not in DTYPES:
            raise FileError(
                f"{self.path}: `{short(name)}` has dtype {short(dtype)}; supported are {', '.join(DTYPES)}."
            )
        tensor = Tensor(dtype, tuple(shape), self._start + begin)
        if end - begin != tensor.bytes:
            raise FileError(
                f"{self.path}: `{short(name)}` takes {short(end - begin)} bytes by its offsets, but {dtype} of shape "
                f"{short(shape)} needs {short(tensor.bytes)}. The header is wrong; record the file again."
            )
        if self._start + end > self.size:
            raise FileError(
                f"{self.path}: truncated; `{short(name)}` ends at byte {self._start + end}, the file at "
                f"{self.size}. Copy or record the file again."
            )
        return tensor

    def _check_layout(self) -> None:
        position = self._start
        for name, tensor in sorted(self.tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset != position and tensor.bytes:
                raise FileError(
                    f"{self.path}: `{short(name)}` starts at byte {tensor.offset}, expected {position}; "
                    "tensors overlap or leave a gap. Record the file again."
                )
            position = max(position, tensor.offset + tensor.bytes)
        if position != self.size:
            raise FileError(
                f"{self.path}: {self.size} bytes, but the header describes {position}. "
                "Copy or record the file again."
            )


@contextlib.contextmanager
def prefetched(jobs: Sequence[Any]) -> Iterator[Iterator[Any]]:
    """Iterate over the results of `job()` for each job, always one job ahead, in a thread."""
    pool = ThreadPoolExecutor(1)

    def results() -> Iterator[Any]:
        ahead = pool.submit(jobs[0]) if jobs else None
        for job in [*jobs[1:], None]:
            if ahead is None:
                return
            current = ahead.result()
            ahead = pool.submit(job) if job is not None else None
            yield current

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> NDArray[Any]:
    """Allocate an array that starts at a multiple of 64 bytes, which JAX on CPU takes without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _metadata(path: Path, found: Any) -> Mapping[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise FileError(f"{path}: the header's `__metadata__` must map strings to strings.")
    return found
