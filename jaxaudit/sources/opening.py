"""Decides by content what a path holds, and opens it."""

import os
from pathlib import Path
from typing import Literal

from jaxaudit.byte_files import ByteFile, FileError, short
from jaxaudit.safetensors_file import SafetensorsFile
from jaxaudit.sources.checkpoints import Series
from jaxaudit.sources.hdf5 import SIGNATURE, Hdf5Source
from jaxaudit.sources.model_folder import INDEX, ModelFolder, choices
from jaxaudit.sources.sharded import SUFFIX, ShardedSource, read_index
from jaxaudit.sources.source import Opened, Source

#: Which step the learning rate in a checkpoint belongs to.
RateOf = Literal["this", "next"]

#: Where HDF5's signature may stand; more are possible behind larger user blocks.
_SIGNATURES = (0, *(512 << k for k in range(12)))


def open_source(
    path: str | os.PathLike[str],
    parameter: str | None = None,
    *,
    run: int | None = None,
    rate_of: RateOf | None = None,
    state_index: int | None = None,
) -> Opened:
    """Open what a path holds; see `recording.open_recording`."""
    path = Path(path)
    series = {"run": run, "rate_of": rate_of, "state_index": state_index}
    given = [name for name, value in series.items() if value is not None]
    try:
        folder = path.is_dir()
    except (OSError, ValueError):
        folder = False  # the file's own opening says what is wrong
    index = _recording_index(path) if folder and not (path / INDEX).exists() else None
    if folder and index is None and not (path / INDEX).exists():
        return Series(path, parameter, rate_of=rate_of, state_index=state_index).open(run)
    if given:
        raise FileError(
            f"{path}: {', '.join(given)} {'are' if len(given) > 1 else 'is'} for a series of checkpoints, which "
            "this is not. Leave it out."
        )
    if index is not None:
        return Opened(_whole(ShardedSource(index), parameter))
    if folder:
        return Opened(_model(path, parameter))
    kind = kind_of(path)
    if kind == "hdf5":
        return Opened(Hdf5Source(path, parameter))
    if kind == "torch":
        if path.suffix == ".npz":
            raise FileError(
                f"{path}: an archive of NumPy, which is no recording. Write its arrays with "
                "safetensors.numpy.save_file."
            )
        raise FileError(
            f"{path}: a file of torch.save, which holds one state at most. Give the folder with a series of "
            "checkpoints, consecutive steps among them."
        )
    if kind == "json" and path.name == INDEX:
        return Opened(_model(path.parent, parameter))
    opened = ShardedSource(path) if kind == "json" else SafetensorsFile(path)
    return Opened(_whole(opened, parameter))


def kind_of(path: Path) -> Literal["hdf5", "json", "torch", "safetensors"]:
    """Tell by its first bytes what a file is; what is nothing else counts as safetensors.

    Raises:
        FileError: it cannot be opened.
    """
    with ByteFile(path) as file:
        head = file.pread(16, 0)
        if head[:2] == b"PK" or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
            # A pickle's first bytes, read as the length of a safetensors header, are beyond its limit.
            if head[:2] == b"PK" or int.from_bytes(head[:8], "little") > 1 << 30:
                return "torch"
        if head.lstrip()[:1] == b"{" and int.from_bytes(head[:8], "little") > 1 << 30:
            return "json"
        if any(file.pread(8, offset) == SIGNATURE for offset in _SIGNATURES):
            return "hdf5"
    return "safetensors"


def _recording_index(path: Path) -> Path | None:
    """Find the only index in a folder if it lists a recording's `W`."""
    try:
        names = [e.name for e in os.scandir(path) if e.name.endswith(SUFFIX)]
    except OSError as error:
        raise FileError(f"{path}: cannot be listed ({error.strerror}). Check the path.") from error
    if len(names) != 1:
        return None
    _, homes = read_index(path / names[0])
    return path / names[0] if "W" in homes else None


def _model(path: Path, parameter: str | None) -> Source:
    folder = ModelFolder(path)
    if parameter is None and len(folder.parameters) > 1:
        raise FileError(
            f"{path}: {len(folder.parameters)} parameters; name one with parameter=. {choices(folder.parameters)}"
        )
    return folder.source(parameter or next(iter(folder.parameters)))


def _whole(source: Source, parameter: str | None) -> Source:
    """Return a source of one parameter, which may be named but must then be the right one."""
    stated = source.metadata.get("parameter_name") or source.metadata.get("parameter")
    if parameter is not None and parameter != stated:
        source.close()
        of = f"of {short(repr(stated))}" if stated else "of one parameter, without its name"
        raise FileError(
            f"{source.path}: a recording {of}; asked for {short(repr(parameter))}. Leave parameter= out."
        )
    return source
