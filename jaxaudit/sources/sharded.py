"""Safetensors in several files, with the index that names the file of each tensor, as Hugging Face writes it."""

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxaudit.byte_files import Closing, FileError, Stored, short
from jaxaudit.safetensors_file import SafetensorsFile
from jaxaudit.sources.source import as_strings, file_within, read_json

#: How an index ends, beside `model.safetensors` and the like.
SUFFIX = ".safetensors.index.json"


class ShardedSource(Closing):
    """The tensors that an index lists, read from the files it names; see `source.Source`.

    Attributes:
        path: the index.
        size: bytes of the files.
        tensors: by name, of all files.
        metadata: the index's, and what the files say beyond it.

    Raises:
        FileError: the index or a file is missing, unreadable, or they disagree.
    """

    def __init__(self, path: Path):
        self.path = path
        stated, homes = read_index(path)
        with contextlib.ExitStack() as opened:
            names = dict.fromkeys(homes.values())
            self._files = {
                name: opened.enter_context(SafetensorsFile(file_within(path.parent, name, path)))
                for name in names
            }
            self._home = {key: self._files[name] for key, name in homes.items()}
            for key, file in self._home.items():
                check_listed(path, key, file)
            self.tensors: Mapping[str, Stored] = {k: f.tensors[k] for k, f in self._home.items()}
            self.metadata = self._metadata() | as_strings(stated)
            opened.pop_all()
        self.size = sum(file.size for file in self._files.values())

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def read(self, name: str) -> NDArray[Any]:
        """Read a whole small tensor."""
        return self._home[name].read(name)

    def read_floats(self, name: str) -> NDArray[np.float64]:
        """Read a small tensor as doubles."""
        return self._home[name].read_floats(name)

    def read_rows(
        self, name: str, steps: tuple[int, int], rows: tuple[int, int], out: NDArray[Any]
    ) -> None:
        """Read entries of a tensor from the file that holds it, at the speed of a single file."""
        self._home[name].read_rows(name, steps, rows, out)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the files' fingerprints, in the order of their names."""
        digest = hashlib.sha256()
        for _, file in sorted(self._files.items()):
            digest.update(file.fingerprint().encode())
        return digest.hexdigest()

    def _metadata(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for file in self._files.values():
            for key, value in file.metadata.items():
                if found.setdefault(key, value) != value:
                    raise FileError(
                        f"{file.path}: the metadata `{short(key)}` says {short(repr(value))}, another file "
                        f"of {self.path.name} {short(repr(found[key]))}. Put the files of one recording together."
                    )
        return found


def check_listed(path: Path, key: str, file: SafetensorsFile) -> None:
    """Raise FileError unless a file holds the tensor that the index looks for in it."""
    if key not in file.tensors:
        raise FileError(
            f"{file.path}: no `{short(key)}`, which {path.name} looks for here. Copy the files again."
        )


def read_index(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read an index: its metadata, and the file name of each tensor (not yet checked).

    Raises:
        FileError: it is unreadable, or has no usable `weight_map`.
    """
    found = read_json(path, "the index")
    homes = found.get("weight_map") if isinstance(found, dict) else None
    metadata = found.get("metadata") if isinstance(found, dict) else None
    if not isinstance(homes, dict) or not homes:
        raise FileError(
            f"{path}: no `weight_map` from tensor to file. Give an index that belongs to .safetensors files."
        )
    wrong = [key for key, name in homes.items() if not isinstance(name, str)]
    if wrong or not isinstance(metadata, dict | None):
        what = (
            f"`weight_map` gives no file name for `{short(wrong[0])}`"
            if wrong
            else "`metadata` is no object"
        )
        raise FileError(f"{path}: {what}. Write the index again.")
    return metadata or {}, homes
