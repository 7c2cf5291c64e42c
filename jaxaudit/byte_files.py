"""Files read by offset, and what every reader of files shares: the error, dtypes, JSON that is taken strictly."""

import abc
import dataclasses
import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

#: NumPy dtypes of the arrays that are handed out, by safetensors' names; floats come as bit patterns.
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

READERS = 2  # threads: two saturate the page cache, more do not help


class FileError(ValueError):
    """A file that is missing, unreadable, incomplete or inconsistent."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor as it is stored: its dtype by safetensors' name, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the first axis."""
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def as_floats(dtype: str, data: NDArray[Any]) -> NDArray[np.float64]:
    """Turn an array of `DTYPES` (F32, F64 or an integer type) into doubles."""
    kind = {"F32": np.float32, "F64": np.float64}.get(dtype)
    return (data if kind is None else data.view(kind)).astype(np.float64)


class Closing(abc.ABC):
    """Context that closes what is open at its end; a base class."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give everything back that is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ByteFile(Closing):
    """A regular file, open for reading by offset.

    Attributes:
        path: the file.
        size: its bytes when it was opened.
        identity: what changes when the file is written anew: its device, inode, size and time of change.

    Raises:
        FileError: it is missing, cannot be opened, or is not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._descriptor = _open(self.path)
        found = os.fstat(self._descriptor)
        self.size = found.st_size
        self.identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def close(self) -> None:
        """Close the file; reading from it afterwards fails."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def fill(self, buffer: NDArray[np.uint8], offset: int, name: str) -> None:
        """Fill a buffer from an offset on; `name` is the tensor's, for messages.

        Raises:
            FileError: the file ends before, or cannot be read.
        """
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

    def pread(self, length: int, offset: int) -> bytes:
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

    def fingerprint(self, length: int) -> str:
        """Return the SHA-256 of the file's size and of its first `length` bytes."""
        digest = hashlib.sha256(f"{self.size}:".encode())
        digest.update(self.pread(length, 0))
        return digest.hexdigest()


def _open(path: Path) -> int:
    try:
        mode = os.stat(path).st_mode
        regular = stat.S_ISREG(mode)  # asked before opening: a named pipe would block
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)) if regular else -1
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(
            f"{path}:{_linked(path)} cannot be opened ({reason}). Check the path."
        ) from error
    if not regular:
        what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise FileError(f"{path}:{_linked(path)} {what}. Give the .safetensors file itself.")
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return descriptor


def _linked(path: Path) -> str:
    """Say where a link leads; nothing of what is none."""
    try:
        return f" a link to {short(os.readlink(path))}:"
    except (OSError, ValueError):
        return ""


def halves(offset: int, buffer: NDArray[np.uint8]) -> list[tuple[int, NDArray[np.uint8]]]:
    """Cut a buffer to fill from an offset on into one part per reading thread, each with its offset."""
    share = -(-len(buffer) // READERS)
    parts = [(k, buffer[k : k + share]) for k in range(0, len(buffer), max(share, 1))]
    return [(offset + k, part) for k, part in parts]


def block_spans(
    tensor: Stored,
    offset: int,
    steps: tuple[int, int],
    rows: tuple[int, int],
    buffer: NDArray[np.uint8],
) -> list[tuple[int, NDArray[np.uint8]]]:
    """Say which part of a buffer to fill from which offset, for entries of a tensor that lies in one block.

    Args:
        tensor: dtype and shape, of two axes at least.
        offset: its first byte in the file.
        steps: range on the first axis.
        rows: range on the second axis.
        buffer: the bytes to fill, of that many entries.
    """
    if rows == (0, tensor.shape[1]):
        return halves(offset + steps[0] * tensor.row_bytes, buffer)
    width = tensor.row_bytes // tensor.shape[1]
    each = (rows[1] - rows[0]) * width
    return [
        (offset + step * tensor.row_bytes + rows[0] * width, buffer[k * each : (k + 1) * each])
        for k, step in enumerate(range(*steps))
    ]


def json_of(text: bytes) -> Any:
    """Parse JSON strictly: UTF-8, no key twice in an object, no NaN or infinity.

    Raises:
        ValueError, RecursionError: it is not that; nested too deep.
    """
    return json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def is_count(value: object) -> bool:
    """Tell whether a value from JSON is a whole number from 0 to 2^62."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def short(value: object) -> str:
    """Show a value that came from a file in at most 80 printable characters."""
    text = printable(str(value))
    return text if len(text) <= 80 else text[:77] + "..."


def printable(text: str) -> str:
    """Put a question mark for every line break, control character and lone surrogate."""
    return "".join(c if c.isprintable() else "?" for c in text)
