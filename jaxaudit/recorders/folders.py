"""Recordings of whole models: a folder with one file for each parameter, written as the run goes on.

While the run goes on, each parameter grows in a file of its own, one record for each timestep, and
one line of `steps.jsonl` follows the records of a timestep: a killed process loses the timestep it
was writing and nothing else. `FolderWriter.close`, or `finish` after a crash, turns every growing
file into an ordinary recording of one parameter.

    recording.json      what is recorded, and how
    steps.jsonl         one line for each complete timestep
    NAME.growing        records of a parameter, while the run goes on
    NAME.safetensors    the same as a recording of its own, when finished
"""

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

import numpy as np

from jaxaudit.recorders.writing import (
    Finishing,
    RowLayout,
    aligned,
    bytes_of,
    check_strings,
    copy_bytes,
    dtype_of,
    file_order,
    header_of,
    lock,
    open_temporary,
    padded,
    sync_folder,
    write_at,
)
from jaxaudit.safetensors_file import FileError

FORMAT = "jaxaudit model recording 1"
INDEX, STEPS = "recording.json", "steps.jsonl"
#: Key in a line of `steps.jsonl` -> key of the array in a finished recording.
HYPERPARAMETERS = {
    "learning_rate": "learning_rate",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "epsilon": "adam_epsilon",
    "weight_decay": "weight_decay",
}
_PLAIN = frozenset((string.ascii_letters + string.digits + "._-").encode())
_LONGEST_NAME = 180
#: Growing files that stay open; those of further parameters are opened for each write.
_OPEN_FILES = 60
#: Memory of `finish`: records are reordered in blocks of this size.
_BLOCK_BYTES = 1 << 25


def encoded_name(name: str) -> str:
    """Return the file name, without suffix, of the parameter `name`.

    Every UTF-8 byte outside [A-Za-z0-9._-] becomes %XX, a leading "." becomes %2E. Of a result of
    more than 180 characters the first 150 stay, with "~" and 16 hexadecimal digits of the SHA-256
    of the name behind them.
    """
    data = name.encode("utf-8", "surrogateescape")
    encoded = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in data)
    if encoded.startswith("."):
        encoded = "%2E" + encoded[1:]
    if len(encoded) > _LONGEST_NAME:
        encoded = f"{encoded[:150]}~{hashlib.sha256(data).hexdigest()[:16]}"
    return encoded


@dataclass(frozen=True, kw_only=True)
class ParameterLayout:
    """One parameter of a model recording, and what a timestep of it looks like.

    Attributes:
        name: its name in the model.
        tensors: for each recorded tensor (`W`, `grad_W`, ...), what one timestep of it looks like.
        shape: full shape of the parameter.
        rows: the recorded rows of axis 0; None for all.
        group: number of its group of hyperparameters.
        first_step: the step count of Adam that its first recorded step has.
    """

    name: str
    tensors: Mapping[str, RowLayout]
    shape: tuple[int, ...]
    rows: tuple[int, ...] | None = None
    group: int = 0
    first_step: int = 1

    @property
    def file(self) -> str:
        """Name of its file, without suffix."""
        return encoded_name(self.name)

    @property
    def record_bytes(self) -> int:
        """Bytes of one timestep."""
        return sum(layout.nbytes for layout in self.tensors.values())

    def offsets(self) -> dict[str, int]:
        """Return where each tensor starts within a record; wide formats come first."""
        offsets, end = {}, 0
        for name in sorted(self.tensors, key=lambda name: file_order(self.tensors[name])):
            offsets[name] = end
            end += self.tensors[name].nbytes
        return offsets

    def as_json(self) -> dict[str, object]:
        """Return its entry of the index."""
        offsets = self.offsets()
        return {
            "name": self.name,
            "file": self.file,
            "group": self.group,
            "shape": list(self.shape),
            "rows": None if self.rows is None else list(self.rows),
            "first_step": self.first_step,
            "tensors": {
                name: {
                    "dtype": self.tensors[name].dtype,
                    "shape": list(self.tensors[name].shape),
                    "offset": offset,
                }
                for name, offset in offsets.items()
            },
            "record_bytes": self.record_bytes,
        }

    @classmethod
    def from_json(cls, entry: Any) -> Self:
        """Read an entry of the index back.

        Raises:
            KeyError, TypeError, ValueError: it is not what `as_json` makes.
        """
        layout = cls(
            name=entry["name"],
            tensors={
                name: RowLayout(tensor["dtype"], tuple(tensor["shape"]))
                for name, tensor in entry["tensors"].items()
            },
            shape=tuple(entry["shape"]),
            rows=None if entry["rows"] is None else tuple(entry["rows"]),
            group=entry["group"],
            first_step=entry["first_step"],
        )
        if layout.as_json() != entry:
            raise ValueError(f"the entry of {layout.name!r} contradicts itself")
        return layout


class FolderWriter(Finishing):
    """Streaming writer of a model recording; memory use does not grow with the run.

    A timestep counts once its line is in `steps.jsonl`; whatever was torn is written over or
    ignored. The folder is locked while the writer lives. As a context manager it finishes the
    folder on any exception if at least one step is complete, else removes it.

    Attributes:
        path: the folder.
        layouts: the parameters, in the order of the records.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layouts: Sequence[ParameterLayout],
        *,
        groups: Sequence[Mapping[str, str]],
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Make the folder with its index.

        Args:
            path: the folder to make; it may exist if it is empty.
            layouts: the parameters.
            groups: for each group of hyperparameters, strings that go into the files of its
                parameters (`optimizer`, `amsgrad`, `implementation`, ...).
            metadata: strings that go into all files.
            overwrite: remove the recording that is in the folder. Other folders are never touched.

        Raises:
            FileExistsError: something else than an empty folder is at `path`.
            BlockingIOError: the recording there is still being written.
            OSError: the folder cannot be written.
            TypeError: the metadata hold something else than strings.
            ValueError: there is no parameter, two have one name, or a group is missing.
        """
        self.path, self.layouts = Path(path), tuple(layouts)
        _check_layouts(self.layouts, len(groups))
        for strings in (metadata or {}, *groups):
            check_strings(strings)
        self._index = {
            "format": FORMAT,
            "finished": False,
            "metadata": dict(metadata or {}),
            "groups": [{"metadata": dict(group)} for group in groups],
            "parameters": [layout.as_json() for layout in self.layouts],
        }
        self._timesteps = self._line_bytes = 0
        self._steps_taken = 0
        self._losses: dict[int, float] = {}
        self._closed = self._finished = False
        self._files: dict[int, BinaryIO] = {}
        self._made = _make_folder(self.path, overwrite)
        try:
            self._lines = cast(BinaryIO, open(self.path / STEPS, "xb", buffering=0))
            lock(self._lines)
            for layout in self.layouts:
                open(self._growing(layout), "xb").close()
            _write_index(self.path, self._index)
        except BaseException:
            self._remove()
            raise

    @property
    def timesteps(self) -> int:
        """Complete timesteps so far, the initial state included."""
        return self._timesteps

    @property
    def steps(self) -> int:
        """Complete optimizer steps so far."""
        return self._steps_taken

    @property
    def closed(self) -> bool:
        """Whether the writer was closed, gave up or failed."""
        return self._closed

    @property
    def finished(self) -> bool:
        """Whether all parameters are complete recordings of their own."""
        return self._finished

    def append(
        self,
        records: Iterable[Mapping[str, np.ndarray]],
        *,
        hyperparameters: Sequence[Mapping[str, float]] | None = None,
        loss: float | None = None,
        skipped: Sequence[int] = (),
        optimizer_step: int | None = None,
        step_counts: Sequence[int] | None = None,
    ) -> None:
        """Append one timestep of all parameters.

        Args:
            records: for each parameter, an array for each of its tensors, of the layout's shape and
                dtype, or of integers of the same width that hold the bits. They are taken one after
                the other, each written before the next.
            hyperparameters: for each group, the doubles of the step that led here, by the names of
                `HYPERPARAMETERS`; None for a state that no recorded step led to, as the first one.
            loss: the loss whose gradient the step used.
            skipped: numbers of the parameters that the step left alone.
            optimizer_step: where steps are left out, how many the optimizer has taken since the
                beginning.
            step_counts: where steps are left out, each parameter's own step count, if one of them is
                not what `optimizer_step` makes of its first.

        Raises:
            ValueError: a record does not fit its layout, or the writer is closed.
            OSError: the disk is full or fails. The writer is closed then; the folder keeps all
                complete timesteps and can be finished later, or is removed if it holds no step.
        """
        if self._closed:
            raise ValueError(f"{self.path} is closed; open a new recording to record more.")
        with self._stopping_on_failure():
            for number, (layout, record) in enumerate(zip(self.layouts, records, strict=True)):
                self._write_record(number, layout, record)
            line: dict[str, object] = {
                "timestep": self._timesteps,
                "hyperparameters": None if hyperparameters is None else list(hyperparameters),
                "loss": loss if loss is not None and math.isfinite(loss) else None,
            }
            if skipped:
                line["skipped"] = list(skipped)
            if optimizer_step is not None:
                line["optimizer_step"] = optimizer_step
            if step_counts is not None:
                line["step_counts"] = list(step_counts)
            self._write_line(line)
        self._timesteps += 1
        self._steps_taken += hyperparameters is not None

    def note_loss(self, timestep: int, loss: float) -> None:
        """Note the loss of a timestep whose line is written; it gets there when the folder is closed."""
        if 0 < timestep < self._timesteps and math.isfinite(loss):
            self._losses[timestep] = float(loss)

    def close(self) -> None:
        """Finish the folder; a closed writer stays as it is.

        Raises:
            ValueError: no step is complete. The folder is removed then.
            OSError: the disk is full or fails. `finish` can complete the folder later.
        """
        if self._closed:
            return
        if not self.steps:
            self.abort()
            raise ValueError(
                f"{self.path}: no optimizer step was recorded, so the folder was removed."
            )
        self._closed = True
        try:
            lines = self._late_losses()
            self._close_files()
            _finish(self.path)
            self._finished = True
            lines.close()
        finally:
            self._close_files()
            self._lines.close()

    def abort(self) -> None:
        """Give up: remove the folder. A closed recording stays as it is."""
        if not self._closed:
            self._remove()

    def release(self) -> None:
        """Stop without finishing: the folder stays as it is, for `finish` or a reader."""
        self._closed = True
        self._close_files()
        self._lines.close()

    def _growing(self, layout: ParameterLayout) -> Path:
        return self.path / f"{layout.file}.growing"

    def _write_record(
        self, number: int, layout: ParameterLayout, record: Mapping[str, np.ndarray]
    ) -> None:
        if record.keys() != layout.tensors.keys():
            raise ValueError(
                f"{layout.name} came with {sorted(record)}, but {self.path} was opened with "
                f"{sorted(layout.tensors)}."
            )
        parts = [layout.tensors[name].data_of(name, record[name]) for name in layout.offsets()]
        with self._file(number, layout) as file:
            _write_parts(file, self._timesteps * layout.record_bytes, parts)

    @contextlib.contextmanager
    def _file(self, number: int, layout: ParameterLayout) -> Iterator[BinaryIO]:
        """Lend a parameter's growing file: the first ones stay open, others are opened each time."""
        if number in self._files:
            yield self._files[number]
            return
        file = cast(BinaryIO, open(self._growing(layout), "rb+", buffering=0))
        if number < _OPEN_FILES:
            self._files[number] = file
            yield file
            return
        with file:
            yield file

    def _write_line(self, line: Mapping[str, object]) -> None:
        data = _encoded_line(line)
        try:
            write_at(self._lines, self._line_bytes, memoryview(data))
        except BaseException:
            self._lines.truncate(self._line_bytes)
            raise
        self._line_bytes += len(data)

    @contextlib.contextmanager
    def _stopping_on_failure(self) -> Iterator[None]:
        """Turn a failure of the disk into one clear message; complete timesteps stay."""
        try:
            yield
        except OSError as failure:
            if self.steps:
                self.release()
                left = (
                    f"The folder keeps {self.steps} complete steps and can be read as it is. Free "
                    "space and complete it with jaxaudit.finish(folder), or record fewer parameters "
                    "or rows."
                )
            else:
                self._remove()
                left = "Nothing was left. Free space, or record fewer parameters or rows."
            size = sum(layout.record_bytes for layout in self.layouts)
            raise OSError(
                failure.errno or errno.EIO,
                f"{self.path}: {failure.strerror or failure} at timestep {self.timesteps} of "
                f"{size:,} bytes. {left}",
            ) from failure

    def _late_losses(self) -> BinaryIO:
        """Bring losses that came late into their lines; return a file that holds the lock."""
        if not self._losses:
            return self._lines
        temporary, file = open_temporary(self.path / STEPS)
        try:
            with open(self.path / STEPS, "rb") as old:
                for data in old:
                    line = json.loads(data)
                    late = self._losses.get(line["timestep"])
                    line["loss"] = line["loss"] if late is None else late
                    write_at(file, file.tell(), memoryview(_encoded_line(line)))
            os.fsync(file.fileno())
            os.replace(temporary, self.path / STEPS)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        return file

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _remove(self) -> None:
        """Close everything and remove what this writer made."""
        self._closed = True
        self._close_files()
        remove_recording(self.path, self.layouts)
        if hasattr(self, "_lines"):
            self._lines.close()
        if self._made:
            with contextlib.suppress(OSError):
                self.path.rmdir()


def finish(folder: str | os.PathLike[str]) -> int:
    """Complete a model recording whose trainer was killed; a finished one stays as it is.

    Every growing file becomes a safetensors recording, through a temporary file that is synchronized
    and renamed; it may be interrupted and repeated. Memory is bounded, and the disk needs room for
    one parameter beside the recording.

    Args:
        folder: the folder of the recording.

    Returns:
        How many optimizer steps the recording holds.

    Raises:
        BlockingIOError: the writer still lives, or somebody else is finishing the folder.
        FileError: it is no model recording, holds no complete step, or is damaged.
        OSError: the disk is full or fails; what is there stays, and `finish` can be repeated.
    """
    folder = Path(folder)
    index = read_index(folder)
    try:
        lines = open(folder / STEPS, "rb+", buffering=0)
    except FileNotFoundError:
        raise FileError(f"{folder}: no {STEPS}. The recording is damaged.") from None
    with lines:
        if not index["finished"] and not lock(cast(BinaryIO, lines)) and os.name == "posix":
            raise BlockingIOError(
                errno.EWOULDBLOCK,
                f"{folder} is still being written. Close its recorder, or wait for its process",
            )
        return _finish(folder)


def read_index(folder: Path) -> dict[str, Any]:
    """Read `recording.json` and check its outline.

    Raises:
        FileError: it is missing, or not of this format.
    """
    try:
        index = json.loads((folder / INDEX).read_bytes())
    except OSError as failure:
        raise FileError(
            f"{folder}: no model recording ({INDEX}: {failure.strerror}). Give its folder."
        ) from None
    except (ValueError, RecursionError):
        index = None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise FileError(f"{folder}/{INDEX} is not of the format {FORMAT!r}.")
    return index


def _layouts_of(folder: Path, index: Mapping[str, Any]) -> list[ParameterLayout]:
    try:
        layouts = [ParameterLayout.from_json(entry) for entry in index["parameters"]]
        _check_layouts(layouts, len(index["groups"]))
        for strings in (index["metadata"], *(group["metadata"] for group in index["groups"])):
            check_strings(strings)
    except (AttributeError, KeyError, TypeError, ValueError) as failure:
        raise FileError(f"{folder}/{INDEX} is damaged: {failure}.") from None
    return layouts


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """Read the complete lines of `steps.jsonl`, one for each timestep from 0; a torn end is left out.

    Raises:
        FileError: a line within is damaged.
    """
    data = (folder / STEPS).read_bytes().split(b"\n")
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(data[:-1]):  # what has no newline is torn
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or line.get("timestep") != number:
            if number == len(data) - 2:
                break
            raise FileError(
                f"{folder}/{STEPS}: line {number + 1} is not that of timestep {number}."
            )
        lines.append(line)
    return lines


def _finish(folder: Path) -> int:
    """Finish a folder that nobody else writes."""
    index = read_index(folder)
    layouts, lines = _layouts_of(folder, index), read_lines(folder)
    if not index["finished"]:
        lines = _complete(folder, layouts, lines)
        run = _Run(lines)
        for layout in layouts:
            growing = folder / f"{layout.file}.growing"
            recording = folder / f"{layout.file}.safetensors"
            if (
                not recording.exists()
            ):  # else finished before an interruption: renamed when complete
                _assemble(growing, recording, layout, run, index)
            growing.unlink(missing_ok=True)
        for abandoned in glob.glob(".*.tmp", root_dir=folder):
            if abandoned.startswith(
                (f".{INDEX}.", f".{STEPS}.", *(f".{x.file}.safetensors." for x in layouts))
            ):
                (folder / abandoned).unlink(missing_ok=True)
        timesteps = run.timesteps
        index["metadata"] |= {} if timesteps is None else {"timesteps": json.dumps(timesteps)}
        _write_index(folder, index | {"finished": True})
    return _Run(lines).steps


def _complete(
    folder: Path, layouts: Sequence[ParameterLayout], lines: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the lines of the timesteps that are complete in all growing files."""
    count = len(lines)
    for layout in layouts:
        growing = folder / f"{layout.file}.growing"
        if growing.exists():
            count = min(count, growing.stat().st_size // max(layout.record_bytes, 1))
        elif not growing.with_suffix(".safetensors").exists():
            raise FileError(f"{folder}: no {growing.name}. The recording is damaged.")
    if not any(line.get("hyperparameters") for line in lines[:count]):
        raise FileError(
            f"{folder}: no optimizer step is complete, so there is nothing to finish. Remove it."
        )
    return lines[:count]


class _Run:
    """What the lines of `steps.jsonl` say of a run of T steps."""

    def __init__(self, lines: Sequence[Mapping[str, Any]]):
        self.lines = lines
        self.steps = sum(line["hyperparameters"] is not None for line in lines)

    @property
    def timesteps(self) -> list[int] | None:
        """Steps that the optimizer had taken at each state, where some were left out; else None."""
        if not any("optimizer_step" in line for line in self.lines):
            return None
        return [line["optimizer_step"] for line in self.lines]

    def step_counts(self, parameter: int, first_step: int) -> list[int] | None:
        """Return a parameter's own step count at each state, where some were not recorded; else None."""
        if not any("step_counts" in line for line in self.lines):
            return None
        return [
            line["step_counts"][parameter]
            if "step_counts" in line
            else line["optimizer_step"] + first_step - 1
            for line in self.lines
        ]

    def hyperparameters(self, group: int) -> dict[str, list[float | None]]:
        """Return the values of a group at each timestep; None where no recorded step led there."""
        given = [line["hyperparameters"] for line in self.lines]
        values: dict[str, list[float | None]] = {
            name: [None if x is None else x[group][name] for x in given] for name in HYPERPARAMETERS
        }
        for name, value in values.items():
            value[0] = value[1]  # timestep 0 had no step: the first step's value stands in
            known = [x for x in value if x is not None]
            if name != "learning_rate" and len({*known}) == 1:
                values[name] = [known[0]] * len(value)
        return values

    def losses(self) -> np.ndarray | None:
        """Return the losses, float32 (T+1,), NaN where there is none; None if there are none."""
        losses = [line.get("loss") for line in self.lines]
        if all(loss is None for loss in losses):
            return None
        return np.asarray([np.nan if loss is None else loss for loss in losses], np.float32)

    def skipped(self, parameter: int) -> list[int]:
        """Return the timesteps in which a parameter was left alone."""
        return [x["timestep"] for x in self.lines if parameter in x.get("skipped", ())]


def _assemble(
    growing: Path,
    recording: Path,
    layout: ParameterLayout,
    run: _Run,
    index: Mapping[str, Any],
) -> None:
    """Write a parameter's recording of its own from its growing file, all at once or not at all."""
    timesteps = len(run.lines)
    number = [entry["name"] for entry in index["parameters"]].index(layout.name)
    small, metadata = _small_arrays(run, layout.group), _metadata(run, layout, number, index)
    entries = {
        name: (layout.tensors[name].dtype, (timesteps, *layout.tensors[name].shape))
        for name in layout.offsets()
    }
    entries |= {name: (dtype_of(name, array), array.shape) for name, array in small.items()}
    header = header_of(entries, metadata)
    end = start = aligned(8 + len(header))
    temporary, file = open_temporary(recording)
    try:
        with file, open(growing, "rb", buffering=0) as source:
            write_at(file, 0, memoryview(padded(header, start)))
            _reorder(cast(BinaryIO, source), file, start, layout, timesteps)
            end += timesteps * layout.record_bytes
            for array in small.values():
                write_at(file, end, bytes_of(array))
                end += array.nbytes
            os.fsync(file.fileno())
        os.replace(temporary, recording)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(recording.parent)


def _reorder(
    source: BinaryIO, target: BinaryIO, start: int, layout: ParameterLayout, timesteps: int
) -> None:
    """Bring records, one for each timestep, into the order of a recording: tensor after tensor."""
    size = layout.record_bytes
    block = max(_BLOCK_BYTES // size, 1)
    buffer = np.empty((block, size), np.uint8) if size <= _BLOCK_BYTES else None
    for first in range(0, timesteps, block):
        count = min(block, timesteps - first)
        if buffer is not None:
            _read_into(source, first * size, buffer[:count])
        for name, offset in layout.offsets().items():
            width = layout.tensors[name].nbytes
            place = start + timesteps * offset + first * width
            if buffer is None:
                copy_bytes(source, first * size + offset, target, place, width)
            else:
                write_at(target, place, bytes_of(buffer[:count, offset : offset + width]))


def _read_into(file: BinaryIO, offset: int, buffer: np.ndarray) -> None:
    data = buffer.reshape(-1).data
    file.seek(offset)
    while data:
        count = cast(Any, file).readinto(data)
        if not count:
            raise OSError(errno.EIO, "a growing file became shorter while it was read")
        data = data[count:]


def _small_arrays(run: _Run, group: int) -> dict[str, np.ndarray]:
    arrays = {}
    for name, values in run.hyperparameters(group).items():
        varied = name == "learning_rate" or len({*values}) > 1
        doubles = [np.nan if value is None else value for value in values]
        arrays[HYPERPARAMETERS[name]] = np.asarray(doubles if varied else doubles[0], np.float64)
    losses = run.losses()
    if losses is not None:
        arrays["losses"] = losses
    arrays["num_steps"] = np.asarray(len(run.lines) - 1, np.int64)
    return arrays


def _metadata(
    run: _Run, layout: ParameterLayout, number: int, index: Mapping[str, Any]
) -> dict[str, str]:
    """Return all that a recording of one parameter says of itself."""
    metadata = {**index["metadata"], **index["groups"][layout.group]["metadata"]}
    metadata |= {
        "format": "jaxaudit recording 1",
        "parameter": layout.name,
        "parameter_shape": json.dumps(list(layout.shape or (1,))),
        "first_step": json.dumps(layout.first_step),
    }
    values = {
        name: value if len({*value}) > 1 else value[0]
        for name, value in run.hyperparameters(layout.group).items()
    }
    metadata["hyperparameters"] = json.dumps(values)
    if layout.rows is not None:
        metadata["rows"] = json.dumps(list(layout.rows))
    skipped, timesteps = run.skipped(number), run.timesteps
    if skipped:
        metadata["skipped_steps"] = json.dumps(skipped)
    if timesteps is not None:
        metadata["timesteps"] = json.dumps(timesteps)
    counts = run.step_counts(number, layout.first_step)
    if counts is not None:
        metadata["step_counts"] = json.dumps(counts)
    return metadata


def _check_layouts(layouts: Sequence[ParameterLayout], groups: int) -> None:
    if not layouts:
        raise ValueError("there is no parameter to record.")
    names = [layout.name for layout in layouts]
    repeated = (
        {name for name in names if names.count(name) > 1} if len({*names}) < len(names) else ()
    )
    if repeated:
        raise ValueError(f"{sorted(repeated)[0]!r} names more than one parameter.")
    for layout in layouts:
        if not layout.name:
            raise ValueError("a parameter has an empty name.")
        if "W" not in layout.tensors or not layout.record_bytes:
            raise ValueError(f"{layout.name!r} has no tensor `W`, or an empty one.")
        if not 0 <= layout.group < groups:
            raise ValueError(f"{layout.name!r} is of group {layout.group}, but there are {groups}.")


def check_path(path: Path, overwrite: bool) -> None:
    """Raise unless a model recording can be put at `path`.

    Raises:
        FileExistsError: something else than an empty folder is there, or a recording and `overwrite`
            is false.
        FileNotFoundError: the folder of `path` does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"the folder of {path} does not exist. Create it, or choose another path"
        )
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir():
        raise FileExistsError(errno.EEXIST, f"{path} is a file. Choose another path")
    if not (path / INDEX).exists():
        raise FileExistsError(
            errno.EEXIST, f"{path} holds something else than a recording. Choose another path"
        )
    if not overwrite:
        raise FileExistsError(
            errno.EEXIST,
            f"{path} exists. Choose another path, or replace it with overwrite=True (--overwrite)",
        )


def _make_folder(path: Path, overwrite: bool) -> bool:
    """Make the folder, or clear it of an older recording; return whether it is a new one."""
    check_path(path, overwrite)
    if not path.exists():
        path.mkdir()
        return True
    if (path / INDEX).exists():
        _clear(path)
    return False


def _clear(path: Path) -> None:
    """Remove the recording in a folder, unless somebody still writes it."""
    layouts = _layouts_of(path, read_index(path))
    with contextlib.suppress(FileNotFoundError), open(path / STEPS, "rb+", buffering=0) as lines:
        if not lock(cast(BinaryIO, lines)) and os.name == "posix":
            raise BlockingIOError(
                errno.EWOULDBLOCK, f"{path} is still being written. Choose another path"
            )
    remove_recording(path, layouts)


def remove_recording(path: Path, layouts: Iterable[ParameterLayout]) -> None:
    """Remove the files of a model recording, and leave all others."""
    names = [
        f"{layout.file}{suffix}" for layout in layouts for suffix in (".growing", ".safetensors")
    ]
    for name in [*names, STEPS, INDEX]:
        with contextlib.suppress(FileNotFoundError):
            (path / name).unlink()
        for abandoned in glob.glob(f".{glob.escape(name)}.*.tmp", root_dir=path):
            (path / abandoned).unlink(missing_ok=True)


def _write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Replace the index, all at once."""
    temporary, file = open_temporary(folder / INDEX)
    try:
        with file:
            write_at(file, 0, memoryview(json.dumps(index).encode()))
            os.fsync(file.fileno())
        os.replace(temporary, folder / INDEX)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)


def _encoded_line(line: Mapping[str, object]) -> bytes:
    return json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _write_parts(file: BinaryIO, offset: int, parts: list[memoryview]) -> None:
    """Write the parts of a record one behind the other, with one system call where there is one."""
    if not hasattr(os, "pwritev"):
        for part in parts:
            write_at(file, offset, part)
            offset += len(part)
        return
    while parts:
        count = os.pwritev(file.fileno(), parts, offset)
        offset += count
        while parts and count >= len(parts[0]):
            count -= len(parts.pop(0))
        if count:
            parts[0] = parts[0][count:]
