"""Safetensors files, opened without loading: the checked header, and rows read on demand.

The `safetensors` package's NumPy interface reads slices six times slower than the page cache delivers them,
and holds the interpreter lock meanwhile; its header is simple enough to read and check here.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: NumPy dtypes of the arrays that are handed out; 16-bit floats come as bit patterns.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<u2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<u8"),
}

_LARGEST_HEADER = 100_000_000  # the limit of the format's own reader
_READERS = 2  # threads: two saturate the page cache, more do not help


class FileError(ValueError):
    """A file that is missing, unreadable, incomplete or inconsistent."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: its dtype string, its shape, and its first byte's offset in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the first axis."""
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class SafetensorsFile:
    """A safetensors file whose header has been read and checked; a context manager.

    Attributes:
        path: the file.
        size: its bytes.
        tensors: where each tensor lies, by name.
        metadata: the header's strings.

    Raises:
        FileError: the file is missing, is not safetensors, or its header and length disagree.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._descriptor = _open(self.path)
        try:
            self.size = os.fstat(self._descriptor).st_size
            header, self._start = self._read_header()
            self.metadata = _metadata(self.path, header.pop("__metadata__", {}))
            self.tensors = {name: self._tensor(name, entry) for name, entry in header.items()}
            self._check_layout()
        except BaseException:
            self.close()
            raise
        self._pool = ThreadPoolExecutor(_READERS)

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; reading from it afterwards fails."""
        if hasattr(self, "_pool"):
            self._pool.shutdown()
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def read(self, name: str) -> NDArray[Any]:
        """Read a whole (small) tensor."""
        tensor = self.tensors[name]
        out = np.empty(tensor.shape, DTYPES[tensor.dtype])
        raw = out.reshape(-1).view(np.uint8)
        if out.nbytes:
            self._fill(raw, tensor.offset, name)
        if tensor.dtype == "BOOL":  # NumPy's booleans must be 0 or 1
            raw[:] = raw != 0
        return out

    def read_floats(self, name: str) -> NDArray[np.float64]:
        """Read a small tensor of real numbers (F32, F64 or an integer type) as doubles."""
        kind = {"F32": np.float32, "F64": np.float64}.get(self.tensors[name].dtype)
        data = self.read(name)
        return (data if kind is None else data.view(kind)).astype(np.float64)

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
        width = tensor.row_bytes // tensor.shape[1]
        buffer = out.reshape(-1).view(np.uint8)
        if rows == (0, tensor.shape[1]):
            spans = _halves(tensor.offset + steps[0] * tensor.row_bytes, buffer)
        else:
            each = (rows[1] - rows[0]) * width
            spans = [
                (
                    tensor.offset + step * tensor.row_bytes + rows[0] * width,
                    buffer[k * each : (k + 1) * each],
                )
                for k, step in enumerate(range(*steps))
            ]
        for done in [self._pool.submit(self._fill, part, at, name) for at, part in spans]:
            done.result()

    def fingerprint(self) -> str:
        """Return the SHA-256 of the file's length and of its first MiB beyond the header."""
        digest = hashlib.sha256(f"{self.size}:".encode())
        digest.update(self._pread(self._start + (1 << 20), 0))
        return digest.hexdigest()

    def _fill(self, buffer: NDArray[np.uint8], offset: int, name: str) -> None:
        view, done = buffer.data, 0
        try:
            while done < len(view):
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
                if count == 0:
                    raise FileError(
                        f"{self.path}: `{short(name)}` ends at byte {offset + done}, {len(view) - done} bytes "
                        "early; the file became shorter while it was read. Start again once it is complete."
                    )
                done += count
        except OSError as error:
            raise FileError(
                f"{self.path}: `{short(name)}` cannot be read at byte {offset + done} "
                f"({error.strerror}). Check the disk or copy the file."
            ) from error

    def _pread(self, length: int, offset: int) -> bytes:
        """Read that many bytes, or fewer where the file ends."""
        found = bytearray()
        try:
            while chunk := os.pread(self._descriptor, length - len(found), offset + len(found)):
                found += chunk
            return bytes(found)
        except OSError as error:
            raise FileError(
                f"{self.path}: cannot be read ({error.strerror}). Check the disk or copy the file."
            ) from error

    def _read_header(self) -> tuple[dict[str, Any], int]:
        lead = self._pread(8, 0)
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
        text = self._pread(length, 8)
        if len(text) < length:
            raise FileError(f"{self.path}: truncated within the header. Copy the file again.")
        try:
            header = json.loads(
                text.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant
            )
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
        whole = isinstance(shape, list) and all(map(_is_count, [*shape, begin, end]))
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


def _open(path: Path) -> int:
    try:
        mode = os.stat(path).st_mode
        regular = stat.S_ISREG(mode)  # asked before opening: a named pipe would block
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)) if regular else -1
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"{path}: cannot be opened ({reason}). Check the path.") from error
    if not regular:
        what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise FileError(f"{path}: {what}. Give the .safetensors file itself.")
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return descriptor


def _halves(offset: int, buffer: NDArray[np.uint8]) -> list[tuple[int, NDArray[np.uint8]]]:
    share = -(-len(buffer) // _READERS)
    parts = [(k, buffer[k : k + share]) for k in range(0, len(buffer), max(share, 1))]
    return [(offset + k, part) for k, part in parts]


def _metadata(path: Path, found: Any) -> Mapping[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise FileError(f"{path}: the header's `__metadata__` must map strings to strings.")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def short(value: object) -> str:
    """Show a value that came from a file in at most 80 printable characters."""
    text = printable(str(value))
    return text if len(text) <= 80 else text[:77] + "..."


def printable(text: str) -> str:
    """Put a question mark for every line break, control character and lone surrogate."""
    return "".join(c if c.isprintable() else "?" for c in text)
