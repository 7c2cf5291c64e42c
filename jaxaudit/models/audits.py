"""The audit of a whole model: parameter by parameter, each arithmetic identified once per optimizer group."""

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from jaxaudit import auditing, identification
from jaxaudit.auditing import Progress
from jaxaudit.devices import Backend, find_devices
from jaxaudit.identification import Known, check_names
from jaxaudit.ledger.subject import LedgerOptions
from jaxaudit.ledger.verdict import as_json
from jaxaudit.model_recording import ModelRecording
from jaxaudit.models import account, variables
from jaxaudit.models.overview import Facts, Overview
from jaxaudit.parts import Parts
from jaxaudit.provenance import provenance
from jaxaudit.recording import Recording, TokenGroups, token_groups_of
from jaxaudit.safetensors_file import FileError, short
from jaxaudit.sources.model_folder import choices

#: Elements of a timestep beyond which a parameter is not chosen to be identified for its group.
_LARGE = 1 << 22

#: Parameters of a group that are tried until one tells an arithmetic.
_TRIES = 3

_USUAL = LedgerOptions()


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One parameter, looked at and closed again.

    Attributes:
        facts: what is known before its audit.
        steps: range of its own steps; None where it has none to audit.
        bytes: of its big tensors.
        kind: optimizer group and recorded formats; the same arithmetic is expected of all that agree in it.
        groups: whether the given token groups are over its rows.
        tasks: of its audit.
    """

    facts: Facts
    steps: tuple[int, int] | None
    bytes: int
    kind: tuple[Any, ...]
    groups: bool
    tasks: tuple[str, ...] = ()


class ModelAudit:
    """The audit of a model, to be taken parameter by parameter; see `audit_model` for the arguments.

    Every recording is opened once when this is made, so that what cannot be audited is refused before any work.

    Attributes:
        names: the parameters, in the model's order.
        ungrouped: those that the token groups are not over; they have the group `all` only.
        tasks: names of what can be done by itself: strips of the parameters' rows.
    """

    def __init__(
        self,
        model: ModelRecording,
        groups: TokenGroups | None = None,
        *,
        parameters: str | re.Pattern[str] | Sequence[str] | None = None,
        arithmetics: str | Sequence[str] = "auto",
        backend: Backend = "auto",
        devices: int | None = None,
        steps: tuple[int, int] | None = None,
        window_steps: int | None = None,
        progress: Progress | None = None,
        ledger: LedgerOptions | None = _USUAL,
    ):
        check_names(arithmetics)
        self._model, self._groups, self._progress = model, groups, progress
        self._steps = _checked(model, steps)
        self._options = {
            "arithmetics": arithmetics, "backend": backend, "devices": devices,
            "window_steps": window_steps, "ledger": ledger,
        }  # fmt: skip
        named = [arithmetics] if isinstance(arithmetics, str) else [*arithmetics]
        self._identifies = "auto" in named
        self._devices = find_devices(backend, devices)
        self.names = selected(model, parameters)
        self._plans = [self._plan(name) for name in self.names]
        self.ungrouped = [p.facts.name for p in self._plans if p.steps and groups and not p.groups]
        self._check_plans()
        self._known: dict[tuple[Any, ...], tuple[Known, ...]] = {}
        own = model.timesteps[1:]
        self._timesteps = own[(own >= self._steps[0]) & (own < self._steps[1])]
        self._overview = Overview(self._timesteps)
        self._done = self._told = 0
        self._parts: Parts | None = None
        self.tasks = [f"{k:06}/{task}" for k, p in enumerate(self._plans) for task in p.tasks]

    def publish(self, parts: Parts, names: Iterable[str]) -> None:
        """Do some of `tasks` and keep their numbers, as `auditing.Audit.publish` does for one parameter."""
        wanted: dict[int, list[str]] = {}
        for name in names:
            number, _, task = name.partition("/")
            wanted.setdefault(int(number), []).append(task)
        for k, tasks in wanted.items():
            plan, own = self._plans[k], parts.within(f"{k:06}")
            if all(map(own.has, tasks)):
                continue
            known = self._known_for(plan) if self._identifies else ()
            with self._model.open(plan.facts.name) as recording:
                options = self._options_of(recording, plan, known)
                with auditing.Audit(recording, **options) as audit:
                    audit.publish(own, tasks)

    def through(self, parts: Parts | None) -> Iterator[dict[str, xr.Dataset]]:
        """Go through the parameters as `__iter__` does, with a folder that keeps what is done."""
        self._parts = parts
        try:
            yield from self
        finally:
            self._parts = None

    def __iter__(self) -> Iterator[dict[str, xr.Dataset]]:
        """Audit the parameters; yield the datasets of each by the name of their group in the model's file."""
        self._known, self._overview = {}, Overview(self._timesteps)
        self._done = self._told = 0
        for plan in self._plans:
            tree: dict[str, xr.Dataset] = {}
            by = ""
            if plan.steps:
                tree, by = self._audit(plan)
            self._overview.take(plan.facts, tree, by)
            self._done += plan.bytes
            path = plan.facts.group_path
            if tree:
                yield {f"{path}/{name}" if name else path: each for name, each in tree.items()}

    def overview(self, started_at: str | None = None) -> xr.Dataset:
        """Return the overview of all parameters, once every one was taken.

        Args:
            started_at: when the audit began; by default now.
        """
        attributes = {
            "title": f"jaxaudit of the model recording {self._model.path.name}",
            "source": str(self._model.path),
            "source_finished": int(self._model.finished),
            "recording_metadata": json.dumps(self._model.metadata, sort_keys=True),
            "parameter_count_of_recording": len(self._model),
        }
        attributes |= provenance(self._devices[0], len(self._devices))
        if started_at:
            attributes["created_at"] = started_at
        dataset = self._overview.dataset(attributes)
        told = account.sentences(dataset)
        return dataset.assign_attrs(verdict=json.dumps(as_json(told), sort_keys=True))

    def _plan(self, name: str) -> _Plan:
        parameter, skipped = self._model[name], self._model.skipped_steps(name)
        path = variables.group_path(name)
        known = {"name": name, "optimizer_group": parameter.group, "shape": parameter.shape}
        if self._model.steps and len(skipped) >= self._model.steps:  # it never had a gradient
            dtype, shape, _ = parameter.tensors["W"]
            facts = Facts(
                **known, group_path="", storage_format=_FORMATS.get(dtype, dtype), tokens=shape[0],
                elements=int(np.prod(shape)), timesteps=np.zeros(1, np.int64), skipped=len(skipped),
            )  # fmt: skip
            return _Plan(facts, None, 0, (), groups=False)
        with self._model.open(name) as recording:
            own = recording.timesteps[1:]
            wanted = np.flatnonzero((own >= self._steps[0]) & (own < self._steps[1]))
            ends = [recording.number_of(int(k) + 1) for k in wanted[[0, -1]]] if wanted.size else []
            steps = (ends[0], ends[1] + 1) if ends else None
            facts = Facts(
                **known, group_path=path if steps else "", storage_format=recording.storage.name,
                tokens=recording.tokens, elements=recording.step_elements,
                timesteps=recording.timesteps, skipped=len(skipped),
                numbers=recording.gaps.numbers if recording.gaps else None,
            )  # fmt: skip
            formats = tuple(fmt.name for fmt in recording.formats.values())
            kind = (parameter.group, tuple(recording.formats), formats)
            fits = self._groups is not None and self._groups.tokens == recording.tokens
            ledger = self._options["ledger"] is not None
            tasks = tuple(auditing.task_names(recording, ledger=ledger)) if steps else ()
            size = recording.bytes if steps else 0
            return _Plan(facts, steps, size, kind, groups=fits, tasks=tasks)

    def _check_plans(self) -> None:
        path = self._model.path
        if not any(plan.steps for plan in self._plans):
            raise FileError(
                f"{path}: none of the {len(self._plans)} parameters was stepped in timesteps {self._steps[0]} to "
                f"{self._steps[1] - 1}; there is nothing to audit. Choose others."
            )
        if self._groups and not any(plan.groups for plan in self._plans):
            raise FileError(
                f"{path}: the token groups are over {self._groups.tokens} tokens, but no parameter has so many rows. "
                "Give the groups that belong to this recording."
            )

    def _audit(self, plan: _Plan) -> tuple[dict[str, xr.Dataset], str]:
        """Audit a parameter; return its datasets, and what its arithmetic was found by."""
        known = self._known_for(plan) if self._identifies else ()
        parts = self._parts and self._parts.within(f"{self._plans.index(plan):06}")
        with self._model.open(plan.facts.name) as recording:
            tree = self._audited(recording, plan, known, parts)
            by_group = tree[""].attrs.pop("identified_by", "") == "known"
            if by_group and not tree[""].attrs["identified_arithmetic"]:
                # Another one might replay what this one does not.
                parts = parts and parts.within("alone")
                tree, by_group = self._audited(recording, plan, (), parts), False
        by = ("group" if by_group else "parameter") if self._identifies else "request"
        parameter = plan.facts
        tree[""] = tree[""].assign_attrs(
            parameter=parameter.name,
            parameter_shape=json.dumps(parameter.shape),
            optimizer_group=parameter.optimizer_group,
            identified_by=by,
        )
        return tree, by

    def _audited(
        self, recording: Recording, plan: _Plan, known: tuple[Known, ...], parts: Parts | None
    ) -> dict[str, xr.Dataset]:
        options = self._options_of(recording, plan, known)
        return auditing.audit_groups(recording, parts=parts, **options)

    def _options_of(
        self, recording: Recording, plan: _Plan, known: tuple[Known, ...]
    ) -> dict[str, Any]:
        """Return the arguments of a parameter's audit."""
        groups = self._groups if plan.groups else None
        if self._groups and not plan.groups:
            groups = TokenGroups(recording.tokens, {"all": np.arange(recording.tokens)})
        return self._options | {
            "groups": groups or token_groups_of(recording),
            "steps": plan.steps,
            "progress": self._tell(plan),
            "known": known,
        }

    def _known_for(self, plan: _Plan) -> tuple[Known, ...]:
        """Return what fits a large parameter of the same kind; sought once."""
        if plan.kind not in self._known:
            alike = [p for p in self._plans if p.steps and p.kind == plan.kind]
            small = [p for p in alike if p.facts.elements <= _LARGE]
            alike.sort(key=lambda p: (p not in small, abs(p.facts.elements - _LARGE)))
            self._known[plan.kind] = self._sought(alike if len(alike) > 1 else [])
        return self._known[plan.kind]

    def _sought(self, plans: Sequence[_Plan]) -> tuple[Known, ...]:
        for plan in plans[:_TRIES]:
            with self._model.open(plan.facts.name) as recording:
                backend: Backend = self._options["backend"]
                found = identification.fitting(recording, backend=backend, steps=plan.steps)
            if found:
                return found
        return ()

    def _tell(self, plan: _Plan) -> Progress:
        """Return what turns the progress of one parameter into that of all; it never falls back."""
        total = sum(p.bytes for p in self._plans)

        def tell(done: int, of: int, timestep: int) -> None:
            self._told = max(self._told, self._done + plan.bytes * done // max(of, 1))
            if self._progress:
                self._progress(self._told, total, timestep)

        return tell


_FORMATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def audit_model(
    model: ModelRecording,
    groups: TokenGroups | None = None,
    *,
    parameters: str | re.Pattern[str] | Sequence[str] | None = None,
    arithmetics: str | Sequence[str] = "auto",
    backend: Backend = "auto",
    devices: int | None = None,
    steps: tuple[int, int] | None = None,
    window_steps: int | None = None,
    progress: Progress | None = None,
    ledger: LedgerOptions | None = _USUAL,
) -> dict[str, xr.Dataset]:
    """Audit every parameter of a model.

    With "auto", arithmetics are identified on a large parameter of each optimizer group (and set of formats), and
    tried first on the others. Every parameter is replayed whole all the same; one under which no known arithmetic
    comes out bit for bit is identified on its own.

    Args:
        model: the recording.
        groups: sets of tokens to count by, for the parameters with so many rows; others have `all` only.
        parameters: which: a regular expression that is searched in the names, or names; by default all.
        arithmetics: as for `audit`; so are all other arguments but those named here.
        backend: where JAX runs.
        devices: how many of its devices.
        steps: range of timesteps of the training run, 1-based, the end not included; by default all.
        window_steps: steps per window.
        progress: called after each window, with bytes done and in all of all parameters.
        ledger: what is asked of the ledger; None for no ledger.

    Returns:
        The dataset of each group of the file: under "" the overview (`models.variables.OVERVIEW`), under
        `parameters/NAME` the dataset that `audit` returns, under `parameters/NAME/updates` and the like what
        `audit_groups` returns. NAME is the parameter's with every byte outside [A-Za-z0-9._-] as %XX (see
        `models.variables.group_path`); the name itself is the attribute `parameter`.

    Raises:
        FileError: a recording cannot be read, or no parameter fits the groups.
        ValueError: parameters, an arithmetic or steps that are not there.
        BackendError, SelfTestError: as `audit`.
    """
    audit = ModelAudit(
        model, groups, parameters=parameters, arithmetics=arithmetics, backend=backend, devices=devices,
        steps=steps, window_steps=window_steps, progress=progress, ledger=ledger,
    )  # fmt: skip
    found = {name: each for tree in audit for name, each in tree.items()}
    return {"": audit.overview(), **found}


def audit_model_tree(
    model: ModelRecording, groups: TokenGroups | None = None, **options: Any
) -> xr.DataTree:
    """Return what `audit_model` does as a tree, as `xr.open_datatree` shows the file; arguments are the same."""
    return tree_of(audit_model(model, groups, **options))


def tree_of(found: Mapping[str, xr.Dataset]) -> xr.DataTree:
    """Put datasets by the name of their group into a tree."""
    return xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in found.items()})


def selected(
    model: Collection[str], parameters: str | re.Pattern[str] | Sequence[str] | None
) -> list[str]:
    """Name the chosen parameters, in the model's order.

    Raises:
        ValueError: the expression is none, nothing matches, or a name is not there.
    """
    if parameters is None:
        return [*model]
    if isinstance(parameters, str | re.Pattern):
        try:
            pattern = re.compile(parameters)
        except re.error as error:
            raise ValueError(
                f"parameters: {parameters!r} is no regular expression ({error})."
            ) from error
        found = [name for name in model if pattern.search(name)]
        if not found:
            raise ValueError(f"parameters: {pattern.pattern!r} matches none. {choices(model)}")
        return found
    unknown = [name for name in parameters if name not in model]
    if unknown or not len(parameters):
        wrong = ", ".join(short(repr(name)) for name in unknown[:4]) or "an empty list"
        raise ValueError(f"parameters: {wrong}: not in the recording. {choices(model)}")
    return [name for name in model if name in {*parameters}]


def _checked(model: ModelRecording, steps: tuple[int, int] | None) -> tuple[int, int]:
    if not model.steps:
        raise FileError(
            f"{model.path}: no complete step was recorded; there is nothing to audit. Record at least one."
        )
    end = int(model.timesteps[-1]) + 1
    start, stop = steps or (1, end)
    if not 1 <= start < stop <= end:
        raise ValueError(
            f"steps {start}:{stop} are outside the recording, which holds 1:{end} (the end not included)."
        )
    if not np.any((model.timesteps[1:] >= start) & (model.timesteps[1:] < stop)):
        raise ValueError(f"steps {start}:{stop}: none of them was recorded.")
    return start, stop
