"""A series of checkpoints as a recording of one parameter: a state per file or folder, named by its number.

Only the step between two consecutive states can be audited, so a series falls into runs of consecutive steps, of which
a recording takes one. Weights come from safetensors (sharded too) or torch files, the optimizer's state from torch
files or from safetensors with names like `exp_avg.NAME` or `optimizer.state.NAME.exp_avg`.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np

from jaxaudit.byte_files import ByteFile, FileError, short
from jaxaudit.safetensors_file import SafetensorsFile
from jaxaudit.sources.model_folder import choices
from jaxaudit.sources.sharded import SUFFIX, check_listed, read_index
from jaxaudit.sources.source import (
    TENSOR_KEYS,
    Opened,
    Placed,
    PlacedSource,
    file_within,
    parsed,
)
from jaxaudit.sources.worker import Worker

_TORCH = (".pt", ".pth", ".bin", ".ckpt")
#: Files of trainers that hold no weights and no optimizer state.
_OTHERS = (
    "rng",
    "random",
    "scaler",
    "training_args",
    "trainer",
    "tokenizer",
    "scheduler",
    "lr_scheduler",
)
_STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "grad", "step")
_MODELS = ("model", "model_state_dict", "state_dict", "module", "model_state", "weights", "params")
_OPTIMIZERS = (
    "optimizer",
    "optimizer_state_dict",
    "optimizer_states",
    "optim",
    "optimizer_state",
    "opt",
)
_SCHEDULERS = (
    "scheduler",
    "lr_scheduler",
    "scheduler_state_dict",
    "lr_schedulers",
    "lr_scheduler_state_dict",
)
_PREFIXES = ("optimizer.state.", "optimizer.", "optim.state.", "optim.", "state.")
_CONSTANT = {
    "beta1": "beta1",
    "beta2": "beta2",
    "epsilon": "epsilon",
    "weight_decay": "weight_decay",
}
_MOST_FILES = 100_000


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor in a file: where it lies, and its value if it is a single number that is known."""

    path: Path
    identity: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]
    offset: int | None
    value: float | None = None


@dataclasses.dataclass
class Contents:
    """What the files of one checkpoint hold.

    Attributes:
        weights: tensors of the model, by name.
        state: tensors of the optimizer's state by the parameter's name, then by what they are.
        numbered: the same by the parameter's number, where the optimizer has no names.
        groups: the optimizer's groups.
        epoch: how often the scheduler has stepped; None if it is not known.
        metadata: texts of the safetensors files.
        ordered: the model's tensors are in the model's order.
    """

    weights: dict[str, Piece] = dataclasses.field(default_factory=dict)
    state: dict[str, dict[str, Piece]] = dataclasses.field(default_factory=dict)
    numbered: dict[int, dict[str, Piece]] = dataclasses.field(default_factory=dict)
    groups: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    epoch: int | None = None
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    ordered: bool = True


@dataclasses.dataclass
class State:
    """One parameter at one checkpoint.

    Attributes:
        number: the checkpoint's.
        place: the file or folder, for messages.
        tensors: by our names (`param`, `exp_avg`, ...).
        step: the optimizer's count, None if it is not known.
        given: its hyperparameters, empty if there are none.
        flags: facts of its group for the metadata.
        epoch: see `Contents`.
    """

    number: int
    place: Path
    tensors: dict[str, Piece]
    step: int | None
    given: dict[str, float]
    flags: dict[str, str]
    epoch: int | None


class Series:
    """The checkpoints of a folder, looked into for one parameter.

    Args:
        path: the folder.
        parameter: its name; may be left out if there is one only.
        rate_of: see `recording.open_recording`.
        state_index: see there.

    Raises:
        FileError: there are no checkpoints, they are unreadable or inconsistent, or something must be chosen.
    """

    def __init__(
        self,
        path: Path,
        parameter: str | None,
        *,
        rate_of: Literal["this", "next"] | None = None,
        state_index: int | None = None,
    ):
        if rate_of not in (None, "this", "next"):
            raise FileError(f"{path}: rate_of is {rate_of!r}; needed 'this' or 'next'.")
        self._path, self._rate_of, self._index = path, rate_of, state_index
        found = _checkpoints(path)
        if len(found) < 2:
            raise FileError(
                f"{path}: {len(found)} checkpoints found; needed two at least, in files or folders named by their "
                "number (step_000100, checkpoint-100, ckpt_5.pt, ...). Of a recording in one file, give the file."
            )
        reader, self._parameter = _Reader(), parameter
        self._states = [self._state(reader, *checkpoint) for checkpoint in found]

    def open(self, run: int | None) -> Opened:
        """Open a run of consecutive steps, by default the longest.

        Raises:
            FileError: there is no such run, or none at all, or its states do not fit together.
        """
        runs = self._runs()
        bounds = tuple((states[0].number, states[-1].number) for states in runs)
        if not runs:
            numbers = short(", ".join(str(state.number) for state in self._states))
            raise FileError(
                f"{self._path}: no two of the {len(self._states)} checkpoints are consecutive steps (they are {numbers}). "
                "An audit needs the states before and after the same step."
            )
        if run is not None and not 0 <= run < len(runs):
            raise FileError(f"{self._path}: no run {run}; there are {len(runs)}: {_spans(bounds)}.")
        chosen = max(runs, key=len) if run is None else runs[run]
        numbers = np.array([state.number for state in chosen], np.int64)
        return Opened(self._source(chosen), numbers, bounds if len(bounds) > 1 else ())

    def _state(self, reader: "_Reader", number: int, place: Path, files: list[Path]) -> State:
        contents = reader.read(place, files)
        name = self._name(place, contents)
        piece = contents.weights.get(name)
        if piece is None:
            raise FileError(
                f"{place}: no parameter {short(repr(name))}. {choices(contents.weights)}"
            )
        state, group = self._optimizer(place, contents, name, piece)
        tensors = {key: value for key, value in state.items() if key != "step"} | {"param": piece}
        step = state.get("step")
        count = None if step is None else _count(place, step)
        given, flags = _hyperparameters(place, group, contents.metadata)
        return State(number, place, tensors, count, given, flags, contents.epoch)

    def _name(self, place: Path, contents: Contents) -> str:
        if self._parameter is None:
            if place.is_file() and {"W", "grad_W"} <= {*contents.weights}:
                raise FileError(
                    f"{self._path}: {place.name} in it is a recording of its own. Give that file, or a folder of "
                    "checkpoints or of jaxaudit.record."
                )
            if len(contents.weights) != 1:
                raise FileError(
                    f"{self._path}: {len(contents.weights)} parameters in {place.name}; name one with parameter=. "
                    f"{choices(contents.weights)}"
                )
            self._parameter = next(iter(contents.weights))
        return self._parameter

    def _optimizer(
        self, place: Path, contents: Contents, name: str, piece: Piece
    ) -> tuple[dict[str, Piece], dict[str, Any]]:
        """Find the optimizer's state and group of a parameter; empty where there is none."""
        if name in contents.state:
            group = [g for g in contents.groups if name in g["params"]] or contents.groups[:1]
            return contents.state[name], group[0] if group else {}
        if not contents.groups:
            return {}, {}
        number = self._number(place, contents, name, piece)
        groups = [g for g in contents.groups if number in g["params"]]
        state = contents.numbered.get(number, {}) if number is not None else {}
        return state, groups[0] if groups else {}

    def _number(self, place: Path, contents: Contents, name: str, piece: Piece) -> int | None:
        """Find the parameter's number in the optimizer: by name, by order, else by a shape that only it has."""
        if self._index is not None:
            return self._index
        for group in contents.groups:
            names = group.get("param_names")
            if isinstance(names, list) and len(names) == len(group["params"]) and name in names:
                return group["params"][names.index(name)]
        params = [number for group in contents.groups for number in group["params"]]
        shapes = {
            n: state["exp_avg"].shape
            for n, state in contents.numbered.items()
            if "exp_avg" in state
        }
        names = list(contents.weights)
        if len(contents.groups) == 1 and contents.ordered and len(params) == len(names):
            fits = all(
                shapes.get(n, contents.weights[x].shape) == contents.weights[x].shape
                for n, x in zip(params, names, strict=True)
            )
            if fits:
                return params[names.index(name)]
        if not contents.numbered:  # before the first step
            return params[0] if len(params) == 1 or len(contents.groups) == 1 else None
        numbers = [n for n, shape in shapes.items() if shape == piece.shape]
        alike = [x for x in names if contents.weights[x].shape == piece.shape]
        if not numbers:
            return None
        if len(numbers) == len(alike) == 1:
            return numbers[0]
        raise FileError(
            f"{place}: cannot tell which state of the optimizer belongs to {short(name)}: numbers "
            f"{short(', '.join(map(str, numbers)))} have its shape {list(piece.shape)}, and so have {len(alike)} "
            "parameters. Name the number with state_index= (its place in the order of the optimizer's parameters)."
        )

    def _runs(self) -> list[list[State]]:
        """Cut the series into runs of consecutive steps; states after a skipped step are left out."""
        states = self._states
        first, second = states[0], states[1]
        if first.step is None and second.step is not None:
            starts = second.step == 1 and (first.number == 0 or second.number - first.number == 1)
            first.step = 0 if starts else None
        counted = any(state.step is not None for state in states)
        runs: list[list[State]] = []
        for state in states:
            now = state.step if counted else state.number
            if now is None:  # a state without the optimizer's, among others with it
                continue
            if not runs:
                runs.append([state])
                continue
            last = runs[-1][-1]
            before = last.step if counted else last.number
            assert before is not None
            if now < before:
                raise FileError(
                    f"{state.place}: the optimizer's step count is {now}, after {before} in {last.place.name}. Keep the "
                    "checkpoints of one run in a folder."
                )
            if now == before:
                continue  # no step of the optimizer in between
            if now == before + 1:
                runs[-1].append(state)
            else:
                runs.append([state])
        return [run for run in runs if len(run) > 1]

    def _source(self, run: Sequence[State]) -> PlacedSource:
        files: dict[Path, int] = {}
        kinds: list[tuple[Path, tuple[int, ...]]] = []
        tensors = {}
        for name in self._recorded(run):
            like = run[-1].tensors[name]
            shape = like.shape or (1,)
            places, offsets = [], []
            for state in run:
                piece = state.tensors.get(name)
                if piece is None:  # zeros, before the first step
                    places.append(-1)
                    offsets.append(0)
                    continue
                if (piece.dtype, piece.shape) != (like.dtype, like.shape) or piece.offset is None:
                    self._refuse(name, state, piece, run[-1].place, like)
                if piece.path not in files:
                    files[piece.path] = len(kinds)
                    kinds.append((piece.path, piece.identity))
                places.append(files[piece.path])
                offsets.append(piece.offset)
            arrays = (np.array(places, np.int64), np.array(offsets, np.int64))
            tensors[TENSOR_KEYS[name]] = Placed(like.dtype, (len(run), *shape), *arrays)
        metadata = {"parameter_name": str(self._parameter)} | self._metadata(run)
        return PlacedSource(self._path, kinds, tensors, {}, metadata)

    def _recorded(self, run: Sequence[State]) -> list[str]:
        """Name the tensors that every state of a run has; the first may lack all but the weights."""
        fresh = run[0].step == 0
        names = []
        for name in TENSOR_KEYS:
            found = [name in state.tensors for state in run]
            if all(found[1:]) and (found[0] or name == "grad" or (fresh and name != "param")):
                names.append(name)
        if run[0].step is None and any("exp_avg" in state.tensors for state in run):
            raise FileError(
                f"{run[-1].place}: moments without the optimizer's step count (`step`), which bias corrections need. "
                "Save the optimizer's whole state."
            )
        return names

    def _refuse(self, name: str, state: State, piece: Piece, last: Path, like: Piece) -> None:
        if piece.offset is None:
            raise FileError(
                f"{state.place}: {short(self._parameter)} ({name}) is not contiguous. Save it after .contiguous()."
            )
        raise FileError(
            f"{state.place}: {short(self._parameter)} ({name}) is {piece.dtype} of shape {list(piece.shape)}, in "
            f"{last.name} {like.dtype} of {list(like.shape)}. Keep the checkpoints of one run in a folder."
        )

    def _metadata(self, run: Sequence[State]) -> dict[str, str]:
        """Return the hyperparameters and facts of a run, as a recording's metadata."""
        count = run[0].step
        found = dict(run[-1].flags)
        if count is not None:
            found["first_step"] = str(count + 1)
        moments = any("exp_avg" in state.tensors for state in run)
        if not moments and not run[-1].given:
            return found
        lacking = [state.place for state in run[1:] if not state.given]
        if lacking:
            raise FileError(
                f"{lacking[0]}: moments without hyperparameters. Save the optimizer's param_groups, or give the metadata "
                "`hyperparameters` (JSON) to the safetensors file."
            )
        for name in _CONSTANT:
            for state in run[1:]:
                if state.given[name] != run[-1].given[name]:
                    raise FileError(
                        f"{state.place}: {name} is {state.given[name]:g}, but {run[-1].given[name]:g} in "
                        f"{run[-1].place.name}; the replay needs it to be constant. Take the checkpoints in between away."
                    )
        rates = self._rates(run)
        stated = {name: run[-1].given[name] for name in _CONSTANT}
        return found | {"hyperparameters": json.dumps({"learning_rate": rates, **stated})}

    def _rates(self, run: Sequence[State]) -> list[float]:
        """Return the learning rate of each step, behind one for the first state."""
        rates = [state.given.get("learning_rate") for state in run]
        known = {rate for rate in rates if rate is not None}
        if len(known) == 1:
            return [*known] * len(run)
        of = self._rate_of or _rate_by_scheduler(run)
        if of is None:
            raise FileError(
                f"{self._path}: the learning rate changes, and the checkpoints do not tell whether the scheduler stepped "
                "before they were written. Say rate_of='next' if it did (as the trainers of Hugging Face and Lightning "
                "do), or rate_of='this'."
            )
        shifted = rates[1:] if of == "this" else rates[:-1]
        if None in shifted:
            raise FileError(
                f"{run[0].place}: no learning rate, which the step after it used. Save the optimizer's param_groups."
            )
        return [float(rate or 0) for rate in (shifted[0], *shifted)]


class _Reader:
    """Looks into the files of checkpoints; starts torch's process when it is needed."""

    def __init__(self):
        self._worker: Worker | None = None

    def read(self, place: Path, files: Sequence[Path]) -> Contents:
        """Collect what the files of one checkpoint hold."""
        contents = Contents()
        tensors, weights_are_safe = {}, False
        for path in sorted(_resolved(files)):
            if path.name.endswith(".safetensors"):
                pieces, metadata = _safetensors(path)
                contents.metadata |= metadata
                tensors |= pieces
        for key, piece in tensors.items():
            what, name = _state_of(key)
            if what:
                contents.state.setdefault(name, {})[what] = piece
            else:
                contents.weights[name] = piece
                weights_are_safe = True
        contents.ordered = not weights_are_safe  # safetensors files are sorted
        contents.weights = {k: p for k, p in contents.weights.items() if p.dtype in ("BF16", "F16", "F32", "F64")}  # fmt: skip
        for path in sorted(files):
            if path.suffix in _TORCH:
                self._torch(path, contents, with_weights=not weights_are_safe)
        _read_steps(contents)
        if not contents.weights:
            raise FileError(
                f"{place}: no weights found; needed safetensors or torch files with the model's state dict."
            )
        return contents

    def _torch(self, path: Path, contents: Contents, *, with_weights: bool) -> None:
        scheduler = "scheduler" in path.name
        if path.name.startswith(_OTHERS) and not scheduler:
            return
        if self._worker is None:
            _require_torch(path)
            self._worker = Worker.shared("torch_process.py")
        with ByteFile(path) as file:
            identity = file.identity
        try:
            tree = self._worker.ask(path.absolute())
        except FileError:
            if scheduler:  # its state may hold functions; it is only needed where rates change
                return
            raise
        if scheduler:
            contents.epoch = _epoch(tree)
            return
        _take_tree(path, identity, tree, contents, with_weights=with_weights)


def _require_torch(path: Path) -> None:
    if importlib.util.find_spec("torch") is None:
        raise FileError(
            f"{path}: files of torch.save need torch, which is not installed. Install it with: pip install "
            "'jaxaudit[torch]'"
        )


def _checkpoints(folder: Path) -> list[tuple[int, Path, list[Path]]]:
    """Find the checkpoints of a folder: number, place for messages, and files."""
    found: dict[int, tuple[Path, list[Path]]] = {}
    folders: dict[int, Path] = {}
    try:
        with os.scandir(folder) as scan:
            entries = sorted(
                (e for _, e in zip(range(_MOST_FILES), scan, strict=False)), key=lambda e: e.name
            )
        for entry in entries:
            numbers = re.findall(r"\d+", _stem(entry.name))
            if entry.name.startswith(".") or not numbers or len(numbers[-1]) > 15:
                continue
            number, path = int(numbers[-1]), folder / entry.name
            if entry.is_symlink() and _within(folder, path):
                continue  # another name of a checkpoint that is here
            if os.path.isdir(path):  # of a link in a circle, `entry` would raise
                files = _files(path)
                if files and number in folders:
                    raise FileError(
                        f"{folder}: {short(folders[number].name)} and {short(entry.name)} are both number {number}. Keep "
                        "one of them."
                    )
                if files:
                    folders[number] = path
                    found[number] = path, files
            elif entry.name.endswith((".safetensors", *_TORCH)) and number not in folders:
                found.setdefault(number, (path, []))[1].append(path)
    except OSError as error:
        raise FileError(
            f"{folder}: cannot be listed ({error.strerror}). Check the path."
        ) from error
    return [(number, *found[number]) for number in sorted(found)]


def _within(folder: Path, link: Path) -> bool:
    """Tell whether a link leads to an entry of the same folder, which may be a link in turn."""
    if not link.exists():
        return False  # opening it will say what is wrong
    here = os.path.realpath(folder)
    while link.is_symlink():
        link = link.parent / os.readlink(link)
        if os.path.realpath(link.parent) == here:
            return True
    return False


def _stem(name: str) -> str:
    for suffix in (".safetensors", *_TORCH):
        name = name.removesuffix(suffix)
    return name


def _files(folder: Path) -> list[Path]:
    with os.scandir(folder) as scan:
        names = [e.name for _, e in zip(range(_MOST_FILES), scan, strict=False)]
    wanted = (".safetensors", SUFFIX, *_TORCH)
    return [folder / n for n in sorted(names) if n.endswith(wanted) and not n.startswith(".")]


def _resolved(files: Sequence[Path]) -> Iterator[Path]:
    """Yield the safetensors files, those of an index checked against it."""
    for path in files:
        if path.name.endswith(SUFFIX):
            _, homes = read_index(path)
            opened: dict[str, SafetensorsFile] = {}
            with contextlib.ExitStack() as stack:
                for key, name in homes.items():
                    if name not in opened:
                        file = SafetensorsFile(file_within(path.parent, name, path))
                        opened[name] = stack.enter_context(file)
                    check_listed(path, key, opened[name])
        elif path.name.endswith(".safetensors"):
            yield file_within(path.parent, path.name, path)


def _safetensors(path: Path) -> tuple[dict[str, Piece], Mapping[str, str]]:
    with SafetensorsFile(path) as file:
        pieces = {}
        for key, tensor in file.tensors.items():
            value = None
            if math.prod(tensor.shape) == 1 and tensor.dtype not in ("BF16", "F16", "BOOL"):
                value = float(file.read_floats(key).reshape(-1)[0])
            pieces[key] = Piece(
                path, file.identity, tensor.dtype, tensor.shape, tensor.offset, value
            )
        return pieces, file.metadata


def _state_of(key: str) -> tuple[str, str]:
    """Return what a tensor of the optimizer's state is, and of which parameter; ("", name) for a weight."""
    for what in _STATE:
        for prefix in ("", *_PREFIXES):
            rest = key.removeprefix(prefix)
            if prefix and rest == key:
                continue
            if (
                rest.startswith(f"{what}.")
                and what != "step"
                or rest.startswith("step.")
                and prefix
            ):
                return what, rest[len(what) + 1 :]
        if key.endswith(f".{what}") and (what != "step" or key.startswith(_PREFIXES)):
            rest = key[: -len(what) - 1]
            for prefix in _PREFIXES:
                if rest.startswith(prefix):
                    return what, rest.removeprefix(prefix)
            return what, rest
    if key.startswith("step."):
        return "step", key[5:]
    return "", key.removeprefix("model_state.").removeprefix("weights.")


def _read_steps(contents: Contents) -> None:
    """Give the state of every parameter a count that only the file has."""
    text = contents.metadata.get("optimizer_step", "")
    if text.isdecimal() and len(text) < 15:
        for state in contents.state.values():
            some = next(iter(state.values()))
            state.setdefault("step", dataclasses.replace(some, value=float(text)))


def _take_tree(
    path: Path, identity: tuple[int, ...], tree: Any, contents: Contents, *, with_weights: bool
) -> None:
    """Take weights, the optimizer's state and the scheduler's count from a torch file."""
    top = tree.get("dict")
    if top is None:
        raise FileError(f"{path}: holds no dict. Save state dicts.")
    optimizer = tree if {"state", "param_groups"} <= {*top} else _child(top, _OPTIMIZERS)
    if optimizer is not None:
        _take_optimizer(path, identity, optimizer, contents)
    scheduler = _child(top, _SCHEDULERS)
    if scheduler is not None:
        contents.epoch = _epoch(scheduler)
    model = _child(top, _MODELS)
    if model is None and optimizer is not tree:
        model = tree
    if with_weights and model is not None:
        for name, node in model.get("dict", {}).items():
            if node.get("tensor") in ("BF16", "F16", "F32", "F64"):
                contents.weights[name] = _piece(path, identity, node)


def _child(top: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the first of several dicts that there is; the only one in a list."""
    for name in names:
        node = top.get(name)
        if isinstance(node, dict) and len(node.get("list", [])) == 1:
            node = node["list"][0]
        if isinstance(node, dict) and "dict" in node:
            return node
    return None


def _take_optimizer(path: Path, identity: tuple[int, ...], tree: Any, contents: Contents) -> None:
    parts = tree["dict"]
    groups = [_plain(node) for node in parts.get("param_groups", {}).get("list", [])]
    if not groups or not all(
        isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups
    ):
        raise FileError(
            f"{path}: the optimizer's state has no usable param_groups. Save its state_dict()."
        )
    contents.groups = groups
    named = any(isinstance(number, str) for group in groups for number in group["params"])
    for key, node in parts.get("state", {}).get("dict", {}).items():
        values = {
            name: _piece(path, identity, value)
            for name, value in node.get("dict", {}).items()
            if name in _STATE and ("tensor" in value or _is_number(value.get("value")))
        }
        if named:
            contents.state[key] = values
        elif key.isdecimal():
            contents.numbered[int(key)] = values


def _piece(path: Path, identity: tuple[int, ...], node: Mapping[str, Any]) -> Piece:
    value = node.get("value")
    known = float(value) if _is_number(value) else None
    if "tensor" not in node:
        return Piece(path, identity, "F64", (), None, known)
    return Piece(path, identity, node["tensor"], tuple(node["shape"]), node["offset"], known)


def _plain(node: Any) -> Any:
    """Return a tree without its marks; tensors of one number as numbers."""
    if "dict" in node:
        return {k: _plain(x) for k, x in node["dict"].items()}
    return [_plain(x) for x in node["list"]] if "list" in node else node.get("value")


def _epoch(tree: Any) -> int | None:
    found = tree.get("dict", {}).get("last_epoch", {}).get("value")
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _count(place: Path, step: Piece) -> int:
    if step.value is None or not 0 <= step.value < 1 << 53 or step.value != int(step.value):
        raise FileError(
            f"{place}: the optimizer's step count is {short(step.value)}, needed a whole number."
        )
    return int(step.value)


def _hyperparameters(
    place: Path, group: Mapping[str, Any], metadata: Mapping[str, str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the numbers of an optimizer's group, else of the metadata, and its flags."""
    if not group:
        text = metadata.get("hyperparameters", "{}").encode(errors="surrogatepass")
        stated = parsed(place, text, "`hyperparameters`")
        group = stated if isinstance(stated, dict) else {}
    if not group:
        return {}, {}
    betas = group.get("betas")
    betas = (
        betas
        if isinstance(betas, list) and len(betas) == 2
        else (group.get("beta1"), group.get("beta2"))
    )
    values = {
        "learning_rate": group.get("lr", group.get("learning_rate")),
        "beta1": betas[0],
        "beta2": betas[1],
        "epsilon": group.get("eps", group.get("epsilon")),
        "weight_decay": group.get("weight_decay"),
    }
    wrong = [name for name, value in values.items() if not _is_number(value)]
    if wrong:
        raise FileError(
            f"{place}: the optimizer's group gives no number for {', '.join(wrong)}. Only Adam and AdamW can be audited."
        )
    flags = {k: str(group[k]).lower() for k in ("amsgrad", "maximize", "capturable") if isinstance(group.get(k), bool)}  # fmt: skip
    fused, foreach = group.get("fused"), group.get("foreach")
    if fused or foreach or foreach is False:
        flags["implementation"] = "fused" if fused else "foreach" if foreach else "loop"
    if isinstance(group.get("decoupled_weight_decay"), bool):
        flags["optimizer"] = "adamw" if group["decoupled_weight_decay"] else "adam"
    stated = {"torch_version", "device", "cpu_capability", "num_threads", "sqrt_probe", "optimizer"}
    numbers = {k: float(v) for k, v in values.items() if _is_number(v)}
    return numbers, {k: metadata[k] for k in stated if k in metadata} | flags  # fmt: skip


def _is_number(value: object) -> TypeGuard[int | float]:
    """Tell whether a value is a number that a finite double can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _rate_by_scheduler(run: Sequence[State]) -> Literal["this", "next"] | None:
    """Tell by the scheduler's count whether it had stepped when the checkpoints were written."""
    ahead = {
        state.epoch - state.step
        for state in run[1:]
        if state.epoch is not None and state.step is not None
    }
    return {frozenset({0}): "next", frozenset({-1}): "this"}.get(frozenset(ahead))  # pyright: ignore[reportReturnType]


def _spans(bounds: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(f"{k}: {first} to {last}" for k, (first, last) in enumerate(bounds[:8]))
    return f"{shown}, ..." if len(bounds) > 8 else shown
