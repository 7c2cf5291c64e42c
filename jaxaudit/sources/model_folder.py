"""The folder of a whole-model recording: its index, its steps, and the tensors of each parameter.

`recording.json` lists the parameters, `steps.jsonl` has a line for each complete timestep. A parameter's tensors lie
in `NAME.safetensors` when the run has ended, and in `NAME.growing` before: records of fixed size, one per timestep,
of which those beyond the last complete line are torn.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from jaxaudit.byte_files import DTYPES, ByteFile, FileError, is_count, short
from jaxaudit.safetensors_file import SafetensorsFile
from jaxaudit.sources.source import (
    TENSOR_KEYS,
    PlacedSource,
    Source,
    as_strings,
    evenly,
    parsed,
    read_json,
)

FORMAT = "jaxaudit model recording 1"
INDEX, STEPS = "recording.json", "steps.jsonl"
_NUMBERS = ("learning_rate", "beta1", "beta2", "epsilon", "weight_decay")
_LONGEST_LINE = 1 << 24


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a model, as the index describes it.

    Attributes:
        number: place in the index.
        name: in the model.
        group: which of the optimizer's groups.
        shape: of the whole parameter.
        rows: which rows of axis 0 were recorded; None for all.
        first_step: count of its first recorded step.
        tensors: dtype, shape of one timestep, and offset within a record, of each tensor by key.
        record_bytes: bytes of one record.
    """

    number: int
    name: str
    group: int
    shape: tuple[int, ...]
    rows: tuple[int, ...] | None
    first_step: int
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]
    record_bytes: int


class ModelFolder:
    """A whole-model recording, its index and steps read and checked; holds nothing open.

    Attributes:
        path: the folder.
        finished: whether its writer says that the run has ended.
        metadata: facts of the whole run, as strings.
        groups: facts of each of the optimizer's groups, as strings.
        parameters: by name, in the model's order.
        timesteps: complete timesteps, the initial state included.
        taken: steps that the optimizer had taken at each timestep, int64 (timesteps,): these numbers are the
            timesteps of the run. It is 0, 1, 2, ... unless the recorder left steps out (`every=`).
        stepped: at which timesteps a recorded step led there, (timesteps,).
        losses: of each timestep, float64 (timesteps,), NaN where there is none; None where there is none at all.
        skipped: for each parameter number, the timesteps that did not step it.

    Raises:
        FileError: the index or the steps are missing, unreadable or inconsistent.
    """

    def __init__(self, path: Path):
        self.path = path
        self._index = path / INDEX
        found = read_json(self._index, "the index")
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            stated = found.get("format") if isinstance(found, dict) else None
            raise FileError(
                f"{self._index}: the format is {short(repr(stated))}, needed {FORMAT!r}. Give the folder of a "
                "whole-model recording."
            )
        self.finished = found.get("finished") is True
        self.metadata = self._strings(found.get("metadata"), "metadata")
        groups = found.get("groups")
        self.groups = [
            self._strings(g.get("metadata") if isinstance(g, dict) else None, "groups")
            for g in self._list(groups, "groups")
        ]
        described = self._list(found.get("parameters"), "parameters")
        listed = [self._parameter(k, entry) for k, entry in enumerate(described)]
        self.parameters = {parameter.name: parameter for parameter in listed}
        if len(self.parameters) != len(listed):
            raise FileError(
                f"{self._index}: two parameters have the same name. Record the run again."
            )
        self._read_steps()

    def source(self, name: str) -> Source:
        """Open the tensors of a parameter.

        Raises:
            FileError: there is no such parameter, or its file is missing or inconsistent.
        """
        if name not in self.parameters:
            raise FileError(
                f"{self.path}: no parameter {short(repr(name))}. {choices(self.parameters)}"
            )
        parameter = self.parameters[name]
        whole = self.path / f"{file_name(name)}.safetensors"
        growing = self.path / f"{file_name(name)}.growing"
        if os.path.lexists(whole) or not os.path.lexists(growing):
            return self._whole(parameter, whole)
        if growing.is_symlink():
            # Its bytes are numbers whatever they are: those of any file of the reader's would be.
            raise FileError(f"{growing}: a link. Put the file itself there.")
        return self._growing(parameter, growing)

    def _whole(self, parameter: Parameter, path: Path) -> Source:
        file = SafetensorsFile(path)
        for key, (dtype, shape, _) in parameter.tensors.items():
            found = file.tensors.get(key)
            if found is None or (found.dtype, found.shape[1:]) != (dtype, shape):
                file.close()
                what = f"{found.dtype} of shape {list(found.shape)}" if found else "absent"
                raise FileError(
                    f"{path}: `{short(key)}` is {what}, but {INDEX} says {dtype} of shape "
                    f"[T+1, {', '.join(map(str, shape))}]. The files belong to different runs."
                )
        return file

    def _growing(self, parameter: Parameter, path: Path) -> Source:
        with ByteFile(path) as file:
            identity = file.identity[:2]  # it may grow while it is read
            needed = self.timesteps * parameter.record_bytes
            if file.size < needed:
                raise FileError(
                    f"{path}: {file.size} bytes, but the {self.timesteps} timesteps of {STEPS} need {needed}. "
                    "Copy the folder again."
                )
        tensors = {
            key: evenly(dtype, (self.timesteps, *shape), offset, parameter.record_bytes)
            for key, (dtype, shape, offset) in parameter.tensors.items()
        }
        small: dict[str, Any] = {"num_steps": np.array(self.timesteps - 1, np.int64)}
        if self.losses is not None:
            small["losses"] = self.losses
        return PlacedSource(path, [(path, identity)], tensors, small, self._facts(parameter))

    def _facts(self, parameter: Parameter) -> dict[str, str]:
        """Return the metadata that the parameter's own file would have."""
        facts = self.metadata | self.groups[parameter.group]
        facts["parameter_shape"] = json.dumps(parameter.shape)
        facts["first_step"] = str(parameter.first_step)
        facts.pop("rows", None)
        if parameter.rows is not None:
            facts["rows"] = json.dumps(parameter.rows)
        if parameter.number in self.skipped:
            facts["skipped_steps"] = json.dumps(self.skipped[parameter.number])
        if self._gapped:
            facts["timesteps"] = json.dumps(self.taken.tolist())
            if self._counts:
                facts["step_counts"] = json.dumps(self._own_counts(parameter))
        values = self._given[parameter.group]
        for name in _NUMBERS[1:]:
            known = np.flatnonzero(self.stepped[1:])
            other = known[values[name][known] != values[name][known[:1]]]
            if other.size:
                raise FileError(
                    f"{self.path}: {name} of {short(parameter.name)} changes at timestep {self.taken[other[0] + 1]}; "
                    "the replay needs it to be constant. Cut the run there."
                )
        rates = [
            float(x) if known else None
            for x, known in zip(values["learning_rate"], self.stepped[1:], strict=True)
        ]
        if self.stepped.any():
            first = int(np.argmax(self.stepped[1:]))
            constant = {name: float(values[name][first]) for name in _NUMBERS[1:]}
            stated = {"learning_rate": [rates[first], *rates], **constant}
            facts["hyperparameters"] = json.dumps(stated)
        return facts

    def _own_counts(self, parameter: Parameter) -> list[int]:
        """Return how many steps a parameter's own count had come to at each timestep."""
        usual = (self.taken + parameter.first_step - 1).tolist()
        return [
            self._counts[t][parameter.number] if t in self._counts else n
            for t, n in enumerate(usual)
        ]

    def _read_steps(self) -> None:
        path = self.path / STEPS
        losses: list[float] = []
        given: list[list[list[float]]] = [[] for _ in self.groups]
        taken: list[int | None] = []
        stepped: list[bool] = []
        self._counts: dict[int, list[int]] = {}
        self.skipped: dict[int, list[int]] = {}
        for t, line in enumerate(_lines(path)):
            step = self._step(path, t, line)
            losses.append(math.nan if step["loss"] is None else float(step["loss"]))
            if t:
                for values, numbers in zip(given, step["hyperparameters"], strict=True):
                    values.append(numbers)
            taken.append(step["taken"])
            stepped.append(step["stepped"])
            if step["counts"]:
                self._counts[t] = step["counts"]
            for number in step["skipped"]:
                self.skipped.setdefault(number, []).append(t)
        self.timesteps, self.stepped = len(losses), np.array(stepped, bool)
        self._gapped = any(number is not None for number in taken)
        self.taken = self._taken(path, taken)
        self.losses = None if np.isnan(losses).all() else np.array(losses, np.float64)
        columns = [np.array(v, np.float64).reshape(-1, len(_NUMBERS)).T for v in given]
        self._given = [dict(zip(_NUMBERS, column, strict=True)) for column in columns]

    def _taken(self, path: Path, given: list[int | None]) -> NDArray[np.int64]:
        """Return the optimizer's steps at each timestep, checked: a recorded step follows on the state before it."""
        if not self._gapped:
            return np.arange(self.timesteps)
        found = np.array([-1 if number is None else number for number in given], np.int64)
        rises = np.diff(found, prepend=found[:1])
        wrong = (found < 0) | (rises < 0) | (self.stepped & (rises != 1))
        if wrong.any():
            t = int(np.argmax(wrong))
            raise FileError(
                f"{path}: line {t + 1} has `optimizer_step` {given[t]}, after {given[t - 1] if t else 'nothing'}; needed "
                "one more at a recorded step, and none less elsewhere. Record the run again."
            )
        return found

    def _step(self, path: Path, t: int, line: bytes) -> dict[str, Any]:
        found = parsed(path, line, f"line {t + 1}")
        if not isinstance(found, dict) or found.get("timestep") != t:
            stated = found.get("timestep") if isinstance(found, dict) else None
            raise FileError(
                f"{path}: line {t + 1} is of timestep {short(repr(stated))}, expected {t}. Copy the folder again."
            )
        numbers: list[list[float]] = []
        taken: Any = found.get("optimizer_step")
        counts: Any = found.get("step_counts", [])
        count = len(self.parameters)
        good = isinstance(counts, list) and all(map(is_count, counts)) and len(counts) in (0, count)
        if not good or not (taken is None or is_count(taken)):
            raise FileError(
                f"{path}: line {t + 1} has an unusable `optimizer_step` or `step_counts`. Record the run again."
            )
        # Where steps were left out, a state may be one that no recorded step led to.
        stepped = t > 0 and (taken is None or found.get("hyperparameters") is not None)
        if t and not stepped:
            numbers = [[math.nan] * len(_NUMBERS)] * len(self.groups)
        elif t:
            groups = found.get("hyperparameters")
            good = isinstance(groups, list) and len(groups) == len(self.groups)
            for group in groups if good else [None]:  # pyright: ignore[reportOptionalIterable]
                values = [group.get(n) for n in _NUMBERS] if isinstance(group, dict) else [None]
                if not all(map(_is_number, values)):
                    raise FileError(
                        f"{path}: line {t + 1} needs the numbers {', '.join(_NUMBERS)} for each of the "
                        f"{len(self.groups)} groups. Record the run again."
                    )
                numbers.append([float(v) for v in values if _is_number(v)])
        loss: Any = found.get("loss")
        skipped: Any = found.get("skipped", [])
        right = isinstance(skipped, list) and all(is_count(k) and 0 <= k < count for k in skipped)
        if not right or not (loss is None or _is_number(loss)):
            raise FileError(
                f"{path}: line {t + 1} has an unusable loss or `skipped`. Record the run again."
            )
        return {
            "hyperparameters": numbers,
            "loss": loss,
            "skipped": sorted(set(skipped)) if stepped else [],
            "taken": taken,
            "stepped": stepped,
            "counts": counts,
        }

    def _parameter(self, number: int, entry: Any) -> Parameter:
        where = f"{self._index}: parameter {number}"
        if not isinstance(entry, dict):
            raise FileError(f"{where} is no JSON object. Record the run again.")
        name: Any = entry.get("name")
        group: Any = entry.get("group")
        tensors: Any = entry.get("tensors")
        if not isinstance(name, str) or not name or not _encodable(name):
            raise FileError(f"{where} has no name. Record the run again.")
        if entry.get("file") != file_name(name):
            raise FileError(
                f"{where}: the file of {short(repr(name))} is called {short(repr(entry.get('file')))}, needed "
                f"{short(repr(file_name(name)))}. Record the run again."
            )
        where = f"{where} ({short(name)})"
        shape: Any = entry.get("shape")
        rows: Any = entry.get("rows")
        first: Any = entry.get("first_step", 1)
        good = _is_shape(shape) and is_count(group) and is_count(entry.get("record_bytes"))
        if not good or not is_count(first) or not (rows is None or _is_counts(rows)):
            raise FileError(
                f"{where} has no usable shape, rows, group, first_step or record_bytes."
            )
        if group >= len(self.groups) or first < 1:
            raise FileError(
                f"{where} has group {short(group)} of {len(self.groups)}, and first_step {short(first)}; needed "
                "a group that there is, and at least 1."
            )
        if not isinstance(tensors, dict) or "W" not in tensors:
            raise FileError(f"{where} has no tensor `W`. Record the run again.")
        placed = {
            key: self._tensor(where, key, x, entry["record_bytes"]) for key, x in tensors.items()
        }
        self._check_overlaps(where, placed)
        return Parameter(
            number, name, group, tuple(shape), None if rows is None else tuple(rows), first, placed, entry["record_bytes"]
        )  # fmt: skip

    def _tensor(
        self, where: str, key: str, entry: Any, room: int
    ) -> tuple[str, tuple[int, ...], int]:
        parts: dict[str, Any] = entry if isinstance(entry, dict) else {}
        dtype: Any = parts.get("dtype")
        shape: Any = parts.get("shape")
        offset: Any = parts.get("offset")
        if key not in TENSOR_KEYS.values() or dtype not in ("BF16", "F16", "F32"):
            raise FileError(
                f"{where}: `{short(key)}` of dtype {short(dtype)} is no tensor of a recording."
            )
        if not _is_shape(shape) or not shape or 0 in shape or not is_count(offset):
            raise FileError(
                f"{where}: `{key}` has no usable shape and offset. Record the run again."
            )
        if offset + math.prod(shape) * DTYPES[dtype].itemsize > room:
            raise FileError(
                f"{where}: `{key}` of shape {short(shape)} reaches beyond the record's {short(room)} bytes. "
                "Record the run again."
            )
        return dtype, tuple(shape), offset

    def _check_overlaps(
        self, where: str, tensors: Mapping[str, tuple[str, tuple[int, ...], int]]
    ) -> None:
        end = 0
        for key, (dtype, shape, offset) in sorted(tensors.items(), key=lambda item: item[1][2]):
            if offset < end:
                raise FileError(f"{where}: `{key}` overlaps another tensor. Record the run again.")
            end = offset + math.prod(shape) * DTYPES[dtype].itemsize

    def _strings(self, found: Any, what: str) -> dict[str, str]:
        if not isinstance(found, dict):
            raise FileError(
                f"{self._index}: `{what}` has no object of strings. Record the run again."
            )
        return as_strings(found)

    def _list(self, found: Any, what: str) -> list[Any]:
        if not isinstance(found, list) or not found:
            raise FileError(
                f"{self._index}: `{what}` is no list with entries. Record the run again."
            )
        return found


def file_name(name: str) -> str:
    """Return the name, without suffix, of a parameter's file.

    Every UTF-8 byte outside [A-Za-z0-9._-] is written %XX, and a leading dot %2E. Of more than 180 characters: the
    first 150, `~`, and 16 hexadecimal digits of the name's SHA-256.
    """
    raw = name.encode()
    text = "".join(chr(b) if re.match(rb"[A-Za-z0-9._-]", bytes([b])) else f"%{b:02X}" for b in raw)
    text = "%2E" + text[1:] if text.startswith(".") else text
    return text if len(text) <= 180 else f"{text[:150]}~{hashlib.sha256(raw).hexdigest()[:16]}"


def choices(names: Any) -> str:
    """List names to choose from, shortened."""
    shown = [short(name) for _, name in zip(range(8), names, strict=False)]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"There are {', '.join(shown)}{more}." if shown else "There are none."


def _lines(path: Path) -> Any:
    """Yield the complete lines of a file; what follows the last line break is torn."""
    with ByteFile(path) as file:
        position, rest = 0, b""
        while chunk := file.pread(1 << 20, position):
            position += len(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
            if len(rest) > _LONGEST_LINE:
                raise FileError(
                    f"{path}: a line is longer than {_LONGEST_LINE} bytes. Copy the folder again."
                )


def _is_number(value: object) -> TypeGuard[int | float]:
    """Tell whether a value from JSON is a number that a finite double can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(map(is_count, value))


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) <= 32 and all(map(is_count, value))


def _encodable(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False
