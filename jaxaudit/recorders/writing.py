"""Recordings written as they grow: one timestep at a time, in memory that stays flat.

The file is an ordinary safetensors file, in which every tensor is one contiguous block. The number
of timesteps is not known while a run goes on, so each tensor grows in a file of its own: the
largest one behind room kept for the header in what becomes the recording, the others in nameless
files of the same folder, which vanish with the process. `RecordingWriter.close` puts them together.
"""

import abc
import contextlib
import datetime
import errno
import glob
import importlib.metadata
import json
import math
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, cast

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: without locks, an abandoned file cannot be told from a live one
    fcntl = None

#: Safetensors dtype -> NumPy dtype name (bfloat16 is the name that ml_dtypes gives its dtype).
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
#: Tensor data starts at a multiple of this many bytes, so that memory maps are aligned.
_ALIGNMENT = 64
_COPY_BYTES = 1 << 26


@dataclass(frozen=True)
class RowLayout:
    """What one timestep of a tensor looks like.

    Attributes:
        dtype: safetensors dtype, one of `DTYPES`.
        shape: shape of one timestep; the tensor in the file has (T+1, *shape).
    """

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the dtype."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}.")

    @property
    def nbytes(self) -> int:
        """Bytes of one timestep."""
        return _ITEM_BYTES[self.dtype] * math.prod(self.shape)

    def data_of(self, name: str, row: np.ndarray) -> memoryview:
        """Return the bytes of `row`, without a copy where it is contiguous.

        Args:
            name: tensor name, for messages.
            row: shape `shape`; dtype as named, or integers of the same width holding its bits.

        Raises:
            ValueError: the shape or the dtype is another.
        """
        is_bits = row.dtype.kind in "iu" and row.dtype.itemsize == _ITEM_BYTES[self.dtype]
        if row.shape != self.shape or not (is_bits or row.dtype.name == DTYPES[self.dtype]):
            raise ValueError(
                f"`{name}` got a timestep of shape {row.shape} and dtype {row.dtype}, but was "
                f"opened with shape {self.shape} and {self.dtype} ({DTYPES[self.dtype]})."
            )
        return bytes_of(row)


@dataclass
class _Stream:
    """One tensor on its way to disk: its bytes start at `start` in `file`."""

    name: str
    layout: RowLayout
    file: BinaryIO
    start: int

    def write(self, timestep: int, data: memoryview) -> None:
        """Write one timestep where it belongs, over whatever a torn write left there."""
        write_at(self.file, self.start + timestep * self.layout.nbytes, data)


class Finishing(abc.ABC):
    """Context that closes a recording at its end; a base class of writers and recorders.

    Where an exception comes before the first step is complete, the recording is given up instead.
    """

    @property
    @abc.abstractmethod
    def steps(self) -> int:
        """Complete steps so far."""

    @abc.abstractmethod
    def close(self) -> None:
        """Complete the recording."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Leave nothing behind."""

    def __enter__(self) -> Self:
        """Return the recorder."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close; or leave nothing where an exception came before the first step was complete."""
        if exception is None:
            self.close()
        else:
            self._end()

    def _end(self) -> None:
        """Close, or give up a recording that has no step."""
        if self.steps < 1:
            self.abort()
        else:
            self.close()


class RecordingWriter(Finishing):
    """Streaming writer of a recording; memory use does not grow with the run.

    Every timestep is appended whole; one that was torn (by an exception in the middle of `append`)
    is cut off. Nothing appears under the final name before `close`, so a killed process leaves no
    recording, and an interrupted one that still closes leaves a valid, shorter one. As a context
    manager it closes on any exception if at least one step is complete, else leaves nothing.

        layouts = {"W": RowLayout("BF16", (10000, 64)), "grad_W": RowLayout("BF16", (10000, 64))}
        with RecordingWriter("run.safetensors", layouts) as writer:
            for weight, gradient in rows:  # the first is the initial state
                writer.append({"W": weight, "grad_W": gradient})

    Attributes:
        path: where the recording will be.
        metadata: strings for the header; may change until `close`.
        small: arrays kept in memory and written by `close` (losses, hyperparameters), by name;
            `num_steps` is added.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layouts: Mapping[str, RowLayout],
        *,
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
        header_bytes: int = 1 << 16,
    ) -> None:
        """Open the temporary files next to `path`.

        Args:
            path: the recording to write.
            layouts: for each streamed tensor, what one timestep of it looks like.
            metadata: see the attribute.
            overwrite: replace an existing file at `close`.
            header_bytes: room kept for the header. A larger header is fine, but costs one more
                copy of the largest tensor.

        Raises:
            FileExistsError: `path` exists and `overwrite` is false.
            OSError: the folder is missing or cannot be written to.
            TypeError: `metadata` holds something else than strings.
            ValueError: `layouts` is empty.
        """
        if not layouts:
            raise ValueError("`layouts` names no tensor; a recording needs at least `W`.")
        check_strings(metadata or {})
        self.path = Path(path)
        self.metadata = dict(metadata or {})
        self.small: dict[str, np.ndarray] = {}
        self._timesteps = 0
        self._closed = False
        self._finished = False
        check_free(self.path, overwrite)
        remove_abandoned(self.path)
        self._temporary, file = open_temporary(self.path)
        self._streams: list[_Stream] = []
        try:
            self._open_streams(layouts, file, aligned(header_bytes))
        except BaseException:
            file.close()
            self.abort()
            raise

    @property
    def timesteps(self) -> int:
        """Complete timesteps so far, the initial state included."""
        return self._timesteps

    @property
    def steps(self) -> int:
        """Complete optimizer steps so far: one less than `timesteps`."""
        return max(self._timesteps - 1, 0)

    @property
    def closed(self) -> bool:
        """Whether the recording was closed or given up."""
        return self._closed

    @property
    def finished(self) -> bool:
        """Whether the recording is complete under its final name."""
        return self._finished

    def append(self, rows: Mapping[str, np.ndarray]) -> None:
        """Append one timestep of every streamed tensor.

        Args:
            rows: an array for each tensor the writer was opened with, of its shape and dtype, or
                of integers of the same width that hold the bits.

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape or dtype; or the writer
                is closed.
            OSError: the disk is full or fails. Nothing is left then.
        """
        if self._closed:
            raise ValueError(f"{self.path} is closed; open a new writer to record more.")
        if rows.keys() != {stream.name for stream in self._streams}:
            raise ValueError(
                f"a timestep came with {sorted(rows)}, but {self.path} was opened with "
                f"{sorted(stream.name for stream in self._streams)}."
            )
        data = [stream.layout.data_of(stream.name, rows[stream.name]) for stream in self._streams]
        with self._giving_up_on_failure():
            for stream, row in zip(self._streams, data, strict=True):
                stream.write(self._timesteps, row)
        self._timesteps += 1

    def close(self) -> None:
        """Put the recording together under its final name; a closed writer stays as it is.

        One KeyboardInterrupt on the way is held back until the file is complete; a second one
        gives the recording up.

        Raises:
            ValueError: no step is complete, and nothing is left then; or `small` holds a dtype
                that the format does not know.
            TypeError: `metadata` holds something else than strings.
            OSError: the disk is full or fails. Nothing is left then.
        """
        if self._closed:
            return
        if self.steps < 1:
            self.abort()
            raise ValueError(
                f"{self.path}: no optimizer step was recorded, so no file was written. "
                "Append the initial state and then one timestep after each step."
            )
        # What the caller may have got wrong comes first: it can be mended, and closed again.
        small = {**self.small, "num_steps": np.asarray(self.steps, np.int64)}
        check_strings(self.metadata)
        header = header_of(self._entries(small), self.metadata)
        try:
            self._assemble_twice_if_interrupted(small, header)
        finally:
            self.abort()

    def abort(self) -> None:
        """Give up: remove the temporary files. A closed writer stays as it is."""
        self._closed = True
        for stream in self._streams:
            with contextlib.suppress(OSError):
                stream.file.close()
        self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _giving_up_on_failure(self) -> Iterator[None]:
        """Turn a failure of the disk into one clear message, with nothing left behind."""
        try:
            yield
        except OSError as failure:
            self.abort()
            per_timestep = sum(stream.layout.nbytes for stream in self._streams)
            raise OSError(
                failure.errno or errno.EIO,
                f"{self.path}: {failure.strerror or failure} after {self.timesteps} timesteps of "
                f"{per_timestep:,} bytes each. Nothing was left. Free space, write to another "
                "folder, or record fewer rows.",
            ) from failure

    def _open_streams(self, layouts: Mapping[str, RowLayout], file: BinaryIO, start: int) -> None:
        """Open a stream for each tensor, the first of them in `file` from byte `start`."""
        # Wide formats first, which keeps all aligned; then the largest, as the first is not copied.
        first, *others = sorted(layouts, key=lambda name: file_order(layouts[name]))
        self._streams.append(_Stream(first, layouts[first], file, start))
        for name in others:
            part = tempfile.TemporaryFile(dir=self.path.parent, buffering=0)
            self._streams.append(_Stream(name, layouts[name], cast(BinaryIO, part), 0))

    def _assemble_twice_if_interrupted(
        self, small: Mapping[str, np.ndarray], header: bytes
    ) -> None:
        """Assemble; an interruption starts it again, and is raised when the file is there."""
        with self._giving_up_on_failure():
            try:
                self._assemble(small, header)
            except KeyboardInterrupt:
                if self._temporary.exists():  # else it already has its final name
                    self._assemble(small, header)
                self._finished = True
                raise

    def _assemble(self, small: Mapping[str, np.ndarray], header: bytes) -> None:
        """Bring all tensors into the first one's file and give it its name; may be repeated."""
        if 8 + len(header) > self._streams[0].start:
            self._move_first(aligned(8 + len(header)))
        first, *parts = self._streams
        end = first.start + self._timesteps * first.layout.nbytes
        for part in parts:
            if not part.file.closed:  # closed: copied before an interruption
                copy_bytes(part.file, 0, first.file, end, self._timesteps * part.layout.nbytes)
                part.file.close()
            end += self._timesteps * part.layout.nbytes
        for array in small.values():
            write_at(first.file, end, bytes_of(array))
            end += array.nbytes
        first.file.truncate(end)  # a torn last timestep may reach beyond
        write_at(first.file, 0, memoryview(padded(header, first.start)))
        self._publish(first.file)

    def _entries(self, small: Mapping[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """List (dtype, shape) of every tensor in the order of the file."""
        streamed = {
            stream.name: (stream.layout.dtype, (self._timesteps, *stream.layout.shape))
            for stream in self._streams
        }
        return streamed | {name: (dtype_of(name, x), x.shape) for name, x in small.items()}

    def _move_first(self, start: int) -> None:
        """Copy the first tensor behind a larger header, into a new temporary file."""
        first = self._streams[0]
        temporary, file = open_temporary(self.path)
        try:
            size = self._timesteps * first.layout.nbytes
            copy_bytes(first.file, first.start, file, start, size)
        except BaseException:
            file.close()
            temporary.unlink()
            raise
        self._streams[0] = _Stream(first.name, first.layout, file, start)
        self._temporary, old = temporary, self._temporary
        first.file.close()
        old.unlink(missing_ok=True)

    def _publish(self, file: BinaryIO) -> None:
        """Make the finished file durable and rename it to its final name."""
        os.fsync(file.fileno())
        os.replace(self._temporary, self.path)
        self._closed = self._finished = True
        file.close()
        sync_folder(self.path.parent)


def write_tensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write arrays that fit in memory as a safetensors file, all at once or not at all.

    Args:
        path: the file to write.
        arrays: any shapes, of the NumPy dtypes that `DTYPES` names.
        metadata: strings for the header.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: `path` exists and `overwrite` is false.
        OSError: the file cannot be written. Nothing is left then.
    """
    path = Path(path)
    check_free(path, overwrite)
    ordered = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))
    header = header_of({k: (dtype_of(k, x), x.shape) for k, x in ordered.items()}, metadata or {})
    temporary, file = open_temporary(path)
    try:
        with file:
            write_at(file, 0, memoryview(padded(header, aligned(8 + len(header)))))
            for array in ordered.values():
                write_at(file, file.tell(), bytes_of(array))
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def check_free(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError or FileNotFoundError unless a file can be put at `path`."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"the folder of {path} does not exist. Create it, or choose another path"
        )
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileExistsError(
            errno.EEXIST,
            f"{path} exists. Choose another path, or replace it with overwrite=True (--overwrite)",
        )


def run_metadata() -> dict[str, str]:
    """Say when a recording was begun, and with which version of this package."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return {"created_at": now, "jaxaudit_version": importlib.metadata.version("jaxaudit")}
    return {"created_at": now}


def check_strings(metadata: Mapping[str, str]) -> None:
    """Raise TypeError unless all metadata are strings."""
    for name, value in metadata.items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise TypeError(
                f"metadata {name!r} is {type(value).__name__}, but the file holds strings alone. "
                "Pass json.dumps(value)."
            )


def header_of(
    entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """Return the JSON header of tensors that follow each other without gaps."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + _ITEM_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return json.dumps(header, separators=(",", ":")).encode()


def padded(header: bytes, start: int) -> bytes:
    """Return length and header, padded with spaces so that data begins at byte `start`."""
    return (start - 8).to_bytes(8, "little") + header.ljust(start - 8)


def file_order(layout: RowLayout) -> tuple[int, int]:
    """Return a key that sorts wide formats first, then large tensors."""
    return -_ITEM_BYTES[layout.dtype], -layout.nbytes


def aligned(size: int) -> int:
    """Round a size up to where tensor data may start."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def dtype_of(name: str, array: np.ndarray) -> str:
    """Return the safetensors dtype of an array; ValueError where the format has none."""
    for dtype, numpy_name in DTYPES.items():
        if array.dtype.name == numpy_name:
            return dtype
    raise ValueError(
        f"`{name}` has dtype {array.dtype}; convert it to one of {set(DTYPES.values())}."
    )


def bytes_of(array: np.ndarray) -> memoryview:
    """Return the bytes of an array, without a copy where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def write_at(file: BinaryIO, offset: int, data: memoryview) -> None:
    """Write all of `data` at an offset."""
    file.seek(offset)
    while data:
        data = data[file.write(data) :]


def copy_bytes(source: BinaryIO, begin: int, target: BinaryIO, offset: int, size: int) -> None:
    """Copy `size` bytes between files, inside the kernel where it can."""
    done = 0
    with contextlib.suppress(OSError, AttributeError):  # not on this system, or these file systems
        while done < size:
            count = min(size - done, _COPY_BYTES)
            step = os.copy_file_range(
                source.fileno(), target.fileno(), count, begin + done, offset + done
            )
            if not step:
                break
            done += step
    while done < size:  # a full disk raises here, not mistaken for a missing call
        source.seek(begin + done)
        chunk = source.read(min(size - done, _COPY_BYTES))
        if not chunk:
            raise OSError(errno.EIO, "a temporary file is shorter than what was written to it")
        write_at(target, offset + done, memoryview(chunk))
        done += len(chunk)


def open_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """Create a hidden file beside `path`, locked for as long as it is open."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    file = open(temporary, "xb+", buffering=0)
    lock(file)
    return temporary, cast(BinaryIO, file)


def lock(file: BinaryIO) -> bool:
    """Lock the file if nobody else has; False where that fails or locks do not exist."""
    if fcntl is None:
        return False
    with contextlib.suppress(OSError):
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def remove_abandoned(path: Path) -> None:
    """Remove temporary files of `path` whose writer was killed: nobody holds their lock."""
    for name in glob.glob(f".{glob.escape(path.name)}.*.tmp", root_dir=path.parent):
        with contextlib.suppress(OSError), open(path.with_name(name), "rb+") as file:
            if lock(file):
                os.unlink(path.with_name(name))


def sync_folder(folder: Path) -> None:
    """Make a rename durable; systems that cannot open folders need no such thing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
