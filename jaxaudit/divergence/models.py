"""Compare two recorded models, parameter by parameter."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from jaxaudit.byte_files import DTYPES
from jaxaudit.divergence.alignment import align
from jaxaudit.divergence.distances import Formats, differing
from jaxaudit.divergence.overview import Facts, Overview, as_names
from jaxaudit.divergence.runs import Progress, compare
from jaxaudit.divergence.variables import NEVER
from jaxaudit.floats import FORMATS, Patterns
from jaxaudit.model_recording import ModelRecording
from jaxaudit.models.audits import selected, tree_of
from jaxaudit.models.variables import group_path
from jaxaudit.provenance import origin
from jaxaudit.recording import Recording, TokenGroups, token_groups_of
from jaxaudit.safetensors_file import FileError
from jaxaudit.sources.model_folder import choices

#: Bytes of the weights that were never stepped which are compared at a time.
_PIECE = 1 << 24

#: What the metadata say that no two runs share, or that is told of each group of the optimizer.
_TOLD_ELSEWHERE = {"created_at", "timesteps"}


class ModelComparison:
    """The comparison of two models, to be taken parameter by parameter; see `compare_models` for the arguments.

    Every pair of recordings is opened once when this is made, so that what cannot be read is refused before any work.

    Attributes:
        names: the parameters that both hold and that were chosen, in the order of `a`.
        only: names that only `a`, and that only `b` holds, of those chosen.
        ungrouped: parameters that the token groups are not over; they have the group `all` only.
    """

    def __init__(
        self,
        a: ModelRecording,
        b: ModelRecording,
        groups: TokenGroups | None = None,
        *,
        parameters: str | re.Pattern[str] | Sequence[str] | None = None,
        steps: tuple[int | None, int | None] | None = None,
        window_steps: int | None = None,
        progress: Progress | None = None,
    ):
        self._models, self._groups, self._steps = (a, b), groups, steps
        self._window_steps, self._progress = window_steps, progress
        for model in (a, b):
            if not model.steps:
                raise FileError(
                    f"{model.path}: no complete step was recorded; there is nothing to compare. Record at least one."
                )
        union = dict.fromkeys([*a, *b])
        chosen = selected(union, parameters)
        self.names = [name for name in chosen if name in a and name in b]
        self.only = tuple(
            [name for name in chosen if name in one and name not in other]
            for one, other in ((a, b), (b, a))
        )
        if not self.names:
            raise FileError(
                f"{a.path} and {b.path} have no parameter in common. {choices(a)} {choices(b)} Give two recordings of "
                "one model."
            )
        self.ungrouped: list[str] = []
        self._bytes: dict[str, int] = {}
        self._ranges: dict[str, tuple[int, int]] = {}
        self._stepped_otherwise: list[str] = []
        self._facts = [self._plan(name) for name in self.names]
        self._check()
        self._overview = Overview()

    def __iter__(self) -> Iterator[dict[str, xr.Dataset]]:
        """Compare the parameters; yield the dataset of each by the name of its group in the file."""
        self._overview = Overview()
        done = 0
        for facts in self._facts:
            if not facts.group_path:
                self._overview.take(facts, None)
                continue
            with self._opened(facts.name) as (a, b):
                dataset = compare(
                    a,
                    b,
                    self._groups_for(facts.name, a),
                    steps=self._ranges[facts.name],
                    window_steps=self._window_steps,
                    progress=self._tell(done),
                )
            done += self._bytes[facts.name]
            dataset = dataset.assign_attrs(
                parameter=facts.name, parameter_shape=json.dumps(facts.shape)
            )
            self._overview.take(facts, dataset)
            yield {facts.group_path: dataset}

    def overview(self) -> xr.Dataset:
        """Return the overview of all parameters, once every one was taken."""
        a, b = self._models
        attributes = {
            "title": f"jaxaudit: the model {a.path.name} (a) against {b.path.name} (b)",
            "kind": "comparison of two models",
            "source_a": str(a.path),
            "source_b": str(b.path),
            "source_finished_a": int(a.finished),
            "source_finished_b": int(b.finished),
            "only_in_a": as_names(self.only[0]),
            "only_in_b": as_names(self.only[1]),
            "stepped_at_other_timesteps": as_names(self._stepped_otherwise),
            "differing_claims": json.dumps(_differing_claims(a, b)),
            **origin(),
        }
        return self._overview.dataset(attributes)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[tuple[Recording, Recording]]:
        a, b = self._models
        with a.open(name) as one, b.open(name) as other:
            yield one, other

    def _plan(self, name: str) -> Facts:
        a, b = self._models
        shape = a[name].shape
        if a[name].shape != b[name].shape:
            shapes = " and ".join(str(list(model[name].shape)) for model in self._models)
            return Facts(name=name, shape=shape, reason=f"the shapes are {shapes}")
        idle = [_never_stepped(model, name) for model in self._models]
        if all(idle):
            return self._compare_idle(name)
        if any(idle):
            return Facts(name=name, shape=shape, reason=f"only {'ba'[idle.index(False) == 0]} stepped it")  # fmt: skip
        with self._opened(name) as (one, other):
            try:
                alignment = align(one, other)
            except FileError as error:
                return Facts(name=name, shape=shape, reason=_without_paths(error, one, other))
            first, end = self._steps or (None, None)
            held = alignment.timesteps
            inside = held[(held >= (first or 0)) & (held < (held[-1] + 1 if end is None else end))]
            if not inside.size:
                reason = f"both hold it at timesteps {held[0]} to {held[-1]} only"
                return Facts(name=name, shape=shape, reason=reason)
            self._ranges[name] = int(inside[0]), int(inside[-1]) + 1
            self._bytes[name] = alignment.bytes * inside.size // held.size
            if self._groups is not None:
                sizes = (one.tokens, other.tokens, alignment.parameter_tokens)
                if self._groups.tokens not in sizes:
                    self.ungrouped.append(name)
            numbers = [r.timesteps[s] for r, s in zip((one, other), alignment.steps, strict=True)]
            # A recording that begins later counts from its own beginning.
            shifts = numbers[0] - numbers[1]
            if np.any(shifts != shifts[0]) or (one.first_step == other.first_step and shifts[0]):
                self._stepped_otherwise.append(name)
            return Facts(name=name, shape=shape, group_path=group_path(name))

    def _check(self) -> None:
        a, b = self._models
        if self._steps is not None and not self._ranges:
            first, end = ("" if each is None else each for each in self._steps)
            raise ValueError(
                f"steps {first}:{end}: no parameter of both {a.path.name} and {b.path.name} has them."
            )
        if not any(facts.group_path or not facts.reason for facts in self._facts):
            raise FileError(
                f"{a.path} and {b.path}: none of the {len(self._facts)} common parameters can be compared; of "
                f"{self._facts[0].name}, {self._facts[0].reason}. Give two recordings of one model."
            )
        if self._groups and len(self.ungrouped) == len(self._ranges):
            raise FileError(
                f"{a.path}: the token groups are over {self._groups.tokens} tokens, but no parameter has so many rows. "
                "Give the groups that belong to this recording."
            )

    def _groups_for(self, name: str, a: Recording) -> TokenGroups:
        if self._groups is None:
            return token_groups_of(a)
        if name in self.ungrouped:
            return TokenGroups(a.tokens, {"all": np.arange(a.tokens)})
        return self._groups

    def _compare_idle(self, name: str) -> Facts:
        """Compare weights that no step changed: one state of each says all."""
        a, b = (model.source(name) for model in self._models)
        with contextlib.closing(a), contextlib.closing(b):
            one, other = a.tensors["W"], b.tensors["W"]
            shape = self._models[0][name].shape
            if one.shape[1:] != other.shape[1:]:
                return Facts(name=name, shape=shape, reason="both hold other rows of it")
            formats = FORMATS[one.dtype], FORMATS[other.dtype]
            kinds, rows = Formats(*formats, formats[0]), one.shape[1]
            elements = int(np.prod(one.shape[1:]))
            width, step = elements // rows, max(1, _PIECE * rows // max(one.row_bytes, 1))
            count, first = 0, (NEVER, NEVER, NEVER, NEVER)
            for row in range(0, rows, step):
                span = (row, min(row + step, rows))
                states: list[Patterns] = [
                    np.empty((span[1] - span[0], width), DTYPES[x.dtype]) for x in (one, other)
                ]
                for source, state in zip((a, b), states, strict=True):
                    source.read_rows("W", (0, 1), span, state)
                unlike = differing(states[0], states[1], kinds)
                if unlike.any() and not count:
                    token, position = (int(x) for x in np.argwhere(unlike)[0])
                    bits = [int(state[token, position]) for state in states]
                    first = (row + token, position, bits[0], bits[1])
                count += int(np.count_nonzero(unlike))
        return Facts(name=name, shape=shape, elements=elements, differing=(count, *first))

    def _tell(self, done: int) -> Progress | None:
        """Return what turns the progress of one parameter into that of all."""
        progress, total = self._progress, sum(self._bytes.values())
        if progress is None:
            return None
        return lambda now, _: progress(min(done + now, total), total)


def compare_models(
    a: ModelRecording,
    b: ModelRecording,
    groups: TokenGroups | None = None,
    *,
    parameters: str | re.Pattern[str] | Sequence[str] | None = None,
    steps: tuple[int | None, int | None] | None = None,
    window_steps: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, xr.Dataset]:
    """Compare two recorded models: every parameter of one name, as `compare` does.

    Args:
        a: one model.
        b: the other.
        groups: sets of tokens to count by, for the parameters with so many rows; others have `all` only.
        parameters: which: a regular expression that is searched in the names, or names; by default all.
        steps: range of timesteps, its end not included; by default all common ones. Timesteps are those of the
            parameter's own step count.
        window_steps: timesteps that are read at a time.
        progress: called after each window, with bytes done and in all of all parameters.

    Returns:
        The dataset of each group of the file: under "" the overview (`divergence.variables.MODEL_VARIABLES`), under
        `parameters/NAME` what `compare` returns; NAME is encoded as by `audit_model`. Parameters that only one model
        holds are named in the attributes; one that both hold, but not alike, has a row that says why.

    Raises:
        FileError: a recording cannot be read, or there is nothing to compare.
        ValueError: parameters or steps that are not there.
    """
    comparison = ModelComparison(
        a, b, groups, parameters=parameters, steps=steps, window_steps=window_steps, progress=progress
    )  # fmt: skip
    found = {name: each for tree in comparison for name, each in tree.items()}
    return {"": comparison.overview(), **found}


def compare_models_tree(
    a: ModelRecording, b: ModelRecording, groups: TokenGroups | None = None, **options: Any
) -> xr.DataTree:
    """Return what `compare_models` does as a tree, as `xr.open_datatree` shows the file; arguments are the same."""
    return tree_of(compare_models(a, b, groups, **options))


def _never_stepped(model: ModelRecording, name: str) -> bool:
    return len(model.skipped_steps(name)) >= model.steps


def _without_paths(error: FileError, *recordings: Recording) -> str:
    """Return what an error says of two recordings, without their long paths and what to do about it."""
    text = str(error).split(". ")[0]
    for run, recording in zip("ab", recordings, strict=True):
        text = text.replace(str(Path(recording.path)), run)
    return text


def _differing_claims(a: ModelRecording, b: ModelRecording) -> dict[str, list[Any]]:
    """Return what the metadata of both models say differently, by name; None stands for nothing said."""
    names = dict.fromkeys([*a.metadata, *b.metadata])
    found = {name: [a.metadata.get(name), b.metadata.get(name)] for name in names}
    return {
        name: both
        for name, both in found.items()
        if both[0] != both[1] and name not in _TOLD_ELSEWHERE
    }
