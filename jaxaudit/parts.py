"""Parts of an unfinished result: a folder with a file for each task that is done.

A part appears whole or not at all: it is written under another name, brought to the disk, and renamed. That it is there means
that its task is done, whoever did it, so that an audit goes on where it was interrupted, and several processes or machines
may work on one. A manifest says what the parts are of; a folder of anything else is refused.
"""

import contextlib
import copy
import fcntl
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from jaxaudit.safetensors_file import FileError, short

#: Name of the manifest, and of the array in a part that holds what is said in words.
_MANIFEST, _WORDS = "manifest.json", "words"

#: Key of the manifest that two audits of the same may differ in: when the first of them began.
_STARTED = "started_at"


class OtherAudit(ValueError):
    """The parts that are there belong to an audit with other options."""


class InUse(OtherAudit):
    """Another process does all of this audit at present, or another one whose parts lie here."""


class Parts:
    """A folder of parts.

    Args:
        path: the folder; it is made where it is missing.
        manifest: what decides the result, as values that JSON can hold; `source` in it is what is read.
        renew: throw away parts of anything else, in place of refusing them.

    Attributes:
        path: the folder.
        started_at: when the audit began; as the manifest says, where there is one already.
        found: how many parts were there.

    Raises:
        OtherAudit: there are parts of an audit with other options.
        InUse: parts should be thrown away that somebody still makes.
        FileError: there are parts of another recording, or what is there is no folder of parts.
        OSError: the folder cannot be made.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], *, renew: bool = False):
        self._prefix = ""
        self._made = [folder for folder in path.parents if not os.path.lexists(folder)]
        self.path, wanted = path, json.loads(json.dumps(dict(manifest)))
        try:
            there = self._agreed(wanted)
        except (OtherAudit, FileError):
            if not renew or not (path / _MANIFEST).is_file():
                raise
            with self.sole() as mine:
                if not mine:
                    raise self.in_use() from None
                shutil.rmtree(path)
            there = None
        self.started_at = (there or self._declare(wanted))[_STARTED]
        self.found = sum(1 for _ in self.path.rglob("*.npz"))

    def has(self, name: str) -> bool:
        """Tell whether a task is done."""
        return self._file(name).exists()

    def write(self, name: str, numbers: Mapping[str, NDArray[Any]], words: str) -> None:
        """Keep the numbers of a task, and what is said of it in words.

        Raises:
            OSError: they cannot be written.
        """
        target = self._file(name)
        with _whole_file(target) as file:
            np.savez(
                file,
                allow_pickle=False,
                **{_WORDS: np.frombuffer(words.encode(), np.uint8), **numbers},
            )  # type: ignore[arg-type]

    def read(self, name: str) -> tuple[dict[str, NDArray[Any]], str]:
        """Return what `write` was given.

        Raises:
            FileError: it is not there, or damaged.
        """
        try:
            with open(self._file(name), "rb") as raw, np.load(raw, allow_pickle=False) as file:
                numbers = {key: file[key] for key in file.files}
            return numbers, numbers.pop(_WORDS).tobytes().decode()
        except (
            OSError,
            ValueError,
            KeyError,
            EOFError,
            AttributeError,
            TypeError,
            zipfile.BadZipFile,
        ) as error:
            raise self.damaged(name) from error

    def damaged(self, name: str) -> FileError:
        """Return the error for a part that cannot be used."""
        return FileError(
            f"{self._file(name)}: this part of the audit cannot be read. Delete it and start the same command again; "
            "only this part is done anew."
        )

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Tell whether this is the one process that puts the parts together; the lock ends with the process."""
        with self._locked(".lock") as got:
            yield got and (self.path / _MANIFEST).exists()

    @contextlib.contextmanager
    def sole(self) -> Iterator[bool]:
        """Tell whether no other process does everything that is left; the lock ends with the process.

        Those that do a share each need not ask.
        """
        with self._locked(".process") as got:
            yield got

    def in_use(self) -> InUse:
        """Return the error for parts that another process is making."""
        return InUse(
            f"{self.path} is in use: another process writes this output at present. Wait for it, stop it, or choose "
            "another --output."
        )

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[bool]:
        """Lock a file in the folder, unless another process has; tell whether that went well."""
        try:
            descriptor = os.open(self.path / name, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another has done it, and removed the folder
            yield False
            return
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError:  # a file system without locks
                pass
            yield True
        finally:
            os.close(descriptor)

    def within(self, folder: str) -> "Parts":
        """Return the same parts, named from a folder in it."""
        part = copy.copy(self)
        part._prefix = f"{self._prefix}{folder}/"
        return part

    def remove(self) -> None:
        """Delete the folder, once the result is written, and what it was made in, unless something else came there."""
        shutil.rmtree(self.path, ignore_errors=True)
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def remove_empty(self) -> None:
        """Delete the folder if no task was done."""
        if not any(True for _ in self.path.rglob("*.npz")):
            self.remove()

    def _file(self, name: str) -> Path:
        return self.path / f"{self._prefix}{name}.npz"

    def _agreed(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """Return the manifest that is there, if it is of the same audit; None where there is none."""
        file = self.path / _MANIFEST
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.glob("**/*.npz"))):
                raise self._foreign() from None
            return None
        except (ValueError, RecursionError, UnicodeError):
            raise self._foreign() from None
        if not isinstance(there, dict) or not isinstance(there.get(_STARTED), str):
            raise self._foreign()
        for key in sorted({*there, *wanted} - {_STARTED}, key=lambda key: key != "source"):
            if there.get(key) != wanted.get(key):
                raise self._differs(key, there.get(key), wanted.get(key))
        return there

    def _differs(self, key: str, there: Any, wanted: Any) -> ValueError:
        way_out = "Delete that folder, or pass --overwrite, to begin anew."
        if key in ("source", "source_state"):
            return FileError(
                f"{self.path} holds parts of the audit of another recording, or of this one before it was changed "
                f"({key} was {short(json.dumps(there))}, is {short(json.dumps(wanted))}). {way_out}"
            )
        return OtherAudit(
            f"{self.path} holds parts of an audit with another {key}: {short(json.dumps(there))} there, "
            f"{short(json.dumps(wanted))} here. Give the same options to go on with it. {way_out}"
        )

    def _foreign(self) -> FileError:
        return FileError(
            f"{self.path} is in the way: it is no folder of parts with a readable {_MANIFEST}. Delete it, or choose "
            "another output."
        )

    def _declare(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest, unless another process was faster."""
        self.path.mkdir(parents=True, exist_ok=True)
        target, text = self.path / _MANIFEST, json.dumps(wanted, indent=1, sort_keys=True)
        handle, temporary = tempfile.mkstemp(dir=self.path, prefix=".manifest-")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, target)
            except FileExistsError:
                return self._agreed(wanted) or wanted
            except OSError:  # a file system without links
                os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)
        _sync_folder(self.path)
        return wanted


@contextlib.contextmanager
def _whole_file(target: Path) -> Iterator[BinaryIO]:
    """Open a file under another name; it gets its own once everything is on the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".part-")
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk."""
    with contextlib.suppress(OSError):  # not every file system lets folders be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
