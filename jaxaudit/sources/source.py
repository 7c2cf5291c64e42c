"""What a source of a recording's tensors offers, and one made of entries that lie anywhere in files."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

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
    json_of,
    short,
)

#: The recording's big tensors: our name for each, and its key in the source.
TENSOR_KEYS = {
    "param": "W",
    "grad": "grad_W",
    "exp_avg": "momentum_W",
    "exp_avg_sq": "variance_W",
    "max_exp_avg_sq": "max_variance_W",
    "compensation": "compensation_W",
}

#: The most bytes of JSON that are parsed: the limit that safetensors has for its header.
LARGEST_JSON = 100_000_000

_KEPT_OPEN = 16


class Source(Protocol):
    """The tensors of one recording, wherever they lie.

    Keys, dtypes and shapes are those of a recording in a safetensors file: `W` and the other big tensors of
    shape (T+1, row, ...), small arrays, strings as metadata.
    """

    @property
    def path(self) -> Path:
        """The file or folder, for messages."""
        ...

    @property
    def size(self) -> int:
        """Bytes of the files."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """The source's own claims."""
        ...

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Dtype and shape of each tensor, by key."""
        ...

    def read(self, name: str) -> NDArray[Any]:
        """Read a whole (small) tensor, as an array of `DTYPES`."""
        ...

    def read_floats(self, name: str) -> NDArray[np.float64]:
        """Read a small tensor of real numbers (F32, F64 or an integer type) as doubles."""
        ...

    def read_rows(
        self, name: str, steps: tuple[int, int], rows: tuple[int, int], out: NDArray[Any]
    ) -> None:
        """Read entries steps[0]..steps[1]-1 of axis 0, and of each rows[0]..rows[1]-1 of axis 1, into `out`."""
        ...

    def fingerprint(self) -> str:
        """Return a cheap digest of what the source holds."""
        ...

    def close(self) -> None:
        """Give everything back that is open."""
        ...


@dataclasses.dataclass(frozen=True)
class Opened:
    """A source, and what its entries stand for.

    Attributes:
        source: the tensors.
        timesteps: number of each entry of the first axis in the training run, int64 (T+1,); None for 0..T.
        runs: for a series with gaps, the first and last number of each run of consecutive steps.
    """

    source: Source
    timesteps: NDArray[np.int64] | None = None
    runs: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Placed(Stored):
    """A tensor of which every entry of the first axis lies somewhere of its own.

    Attributes:
        files: number of the file that holds each entry, (T+1,); -1 for an entry of zeros.
        offsets: its first byte there, (T+1,).
    """

    files: NDArray[np.int64]
    offsets: NDArray[np.int64]


class PlacedSource(Closing):
    """A source put together from entries in files, and arrays that are at hand.

    A few files are kept open; of many, each is opened for as long as it is read, and must be the same as it
    was.

    Attributes:
        path: what people know the source by.
        size: bytes of the files.
        tensors: dtype and shape of each tensor, by key.
        metadata: the source's claims.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[tuple[Path, tuple[int, ...]]],
        tensors: Mapping[str, Placed],
        small: Mapping[str, NDArray[Any]],
        metadata: Mapping[str, str],
    ):
        """Open what is kept open.

        Args:
            path: for messages.
            files: each file, and the beginning of its `ByteFile.identity` that it must still have.
            tensors: where the entries lie.
            small: arrays of float64 or int64, by key.
            metadata: strings.

        Raises:
            FileError: a file is missing or another than it was.
        """
        self.path, self.metadata = path, dict(metadata)
        self._files, self._placed = list(files), dict(tensors)
        kinds = {"f": "F64", "i": "I64"}
        self._small = {name: (kinds[x.dtype.kind], x) for name, x in small.items()}
        shapes = {name: Stored(dtype, x.shape) for name, (dtype, x) in self._small.items()}
        self.tensors: Mapping[str, Stored] = {**self._placed, **shapes}
        self.size = sum(tensor.bytes for tensor in tensors.values())
        self._open: list[ByteFile] = []
        self._pool = ThreadPoolExecutor(READERS)
        try:
            if len(self._files) <= _KEPT_OPEN:
                for k in range(len(self._files)):
                    self._open.append(self._opened(k))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files."""
        self._pool.shutdown()
        for file in self._open:
            file.close()

    def read(self, name: str) -> NDArray[Any]:
        """Read a whole small tensor; see `Source`."""
        if name in self._small:
            dtype, array = self._small[name]
            return np.ascontiguousarray(array).reshape(array.shape).view(DTYPES[dtype])
        tensor = self._placed[name]
        out = np.empty(tensor.shape, DTYPES[tensor.dtype])
        if out.size:
            self.read_rows(name, (0, tensor.shape[0]), (0, tensor.shape[1]), out)
        return out

    def read_floats(self, name: str) -> NDArray[np.float64]:
        """Read a small tensor as doubles; see `Source`."""
        return as_floats(self.tensors[name].dtype, self.read(name))

    def read_rows(
        self, name: str, steps: tuple[int, int], rows: tuple[int, int], out: NDArray[Any]
    ) -> None:
        """Read entries of a tensor; see `Source`.

        Raises:
            FileError: a file has changed, or cannot be read.
        """
        tensor = self._placed[name]
        width = tensor.row_bytes // tensor.shape[1]
        each, start = (rows[1] - rows[0]) * width, rows[0] * width
        buffer, jobs = out.reshape(-1).view(np.uint8), []
        for k, step in enumerate(range(*steps)):
            part, file = buffer[k * each : (k + 1) * each], int(tensor.files[step])
            if file < 0:
                part[:] = 0
            else:
                offset = int(tensor.offsets[step]) + start
                jobs.append(self._pool.submit(self._fill, file, part, offset, name))
        for job in jobs:
            job.result()

    def fingerprint(self) -> str:
        """Return the SHA-256 of where everything lies, and of the first and last entries' beginnings."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._placed.items()):
            digest.update(f"{name}:{tensor.dtype}:{tensor.shape}:".encode())
            for entry in (0, tensor.shape[0] - 1):
                head = np.empty(min(tensor.row_bytes, 1 << 18), np.uint8)
                if tensor.files[entry] >= 0:
                    self._fill(int(tensor.files[entry]), head, int(tensor.offsets[entry]), name)
                    digest.update(head.tobytes())
        return digest.hexdigest()

    def _fill(self, number: int, buffer: NDArray[np.uint8], offset: int, name: str) -> None:
        if self._open:
            self._open[number].fill(buffer, offset, name)
            return
        with self._opened(number) as file:
            file.fill(buffer, offset, name)

    def _opened(self, number: int) -> ByteFile:
        path, identity = self._files[number]
        file = ByteFile(path)
        if file.identity[: len(identity)] != identity:
            file.close()
            raise FileError(
                f"{path}: changed since the recording was opened. Start again once nothing writes to it."
            )
        return file


def evenly(dtype: str, shape: tuple[int, ...], offset: int, stride: int) -> Placed:
    """Place the entries of a tensor in file 0, one every `stride` bytes from an offset on."""
    files = np.zeros(shape[0], np.int64)
    return Placed(dtype, shape, files, offset + stride * np.arange(shape[0], dtype=np.int64))


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file strictly (see `json_of`).

    Raises:
        FileError: it cannot be read, is too large, or is not JSON.
    """
    with ByteFile(path) as file:
        if file.size > LARGEST_JSON:
            raise FileError(
                f"{path}: {file.size} bytes are too many for {what}; at most {LARGEST_JSON} are read."
            )
        return parsed(path, file.pread(file.size, 0), what)


def parsed(path: Path, text: bytes, what: str) -> Any:
    """Parse JSON strictly; raise FileError, with `what` it should have been."""
    try:
        return json_of(text)
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{path}: {what} is not valid JSON ({short(error)}). Write or copy the file again."
        ) from error


def file_within(folder: Path, name: object, where: Path) -> Path:
    """Return the path of a file that JSON names: an entry of the folder itself.

    The name can lead nowhere else, whoever wrote the JSON. The entry may be a link: that is made by whoever filled the
    folder, as the cache of the Hugging Face hub is filled with links.

    Args:
        folder: which.
        name: what the JSON says.
        where: the JSON file, for messages.

    Raises:
        FileError: it is no plain name.
    """
    plain = (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and name.isprintable()
        and name not in (".", "..")
        and not {"/", "\\", ":"} & set(name)
    )
    if not plain:
        raise FileError(
            f"{where}: {short(repr(name))} is not the plain name of a file in the same folder. Correct it."
        )
    return folder / str(name)


def as_strings(found: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata as strings: what is none as JSON."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in found.items()}
