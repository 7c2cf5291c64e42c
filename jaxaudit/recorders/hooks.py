"""Recorder for PyTorch that hooks the optimizer: nothing in the training loop changes.

Example:
    ::

        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        with record(optimizer, "run", model=model, parameters=r"mlp.*weight"):
            train(model, optimizer)  # every optimizer.step() is recorded
"""

import atexit
import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from jaxaudit.recorders.folders import FolderWriter, ParameterLayout
from jaxaudit.recorders.pytorch import (
    AMSGRAD_MOMENT,
    DTYPES,
    MOMENTS,
    bits_of,
    check_parameter,
    constants_of,
    device_metadata,
    number_of,
    optimizer_metadata,
    row_index,
    step_count,
)
from jaxaudit.recorders.writing import Finishing, RowLayout, run_metadata

_HALF = (torch.bfloat16, torch.float16)


def record(
    optimizer: Any,
    path: str | os.PathLike[str],
    *,
    parameters: str | re.Pattern[str] | Sequence[str] | Sequence[torch.Tensor] | None = None,
    model: torch.nn.Module | None = None,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    rows: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    every: int = 1,
    metadata: Mapping[str, str] | None = None,
    on_failure: Literal["raise", "warn"] = "raise",
    overwrite: bool = False,
) -> "OptimizerRecorder":
    """Record an Adam or AdamW run from now on: every step of the optimizer, in a folder.

    Args:
        optimizer: torch.optim.Adam or AdamW of any implementation, or a wrapper that holds one as
            `.optimizer` (as accelerate's does).
        path: the folder to make, with a file for each parameter.
        parameters: what to record: a regular expression that is searched in the names, names, or the
            tensors themselves; everything that the optimizer holds by default.
        model: where the parameters' names are from.
        named_parameters: the same as (name, tensor) pairs, instead of `model`. Without either, the
            names are those that the optimizer was given, else `group0.0`, `group0.1`, ...
        rows: the rows of axis 0 to record, for all parameters or by name; all by default.
        every: record the first step and then one step of every so many, each with the state before
            it. The recordings then have gaps (`Recording.gaps`): each recorded step is audited on its
            own.
        metadata: strings of your own for all files.
        on_failure: where a step cannot be recorded, `raise` lets the error through to the training
            loop; `warn` gives a RuntimeWarning, stops recording and lets the training go on.
        overwrite: replace a recording that is at `path`.

    Returns:
        The recorder. It finishes by `close()`, at the end of its `with` block, or at the exit of
        the process; after a kill, `jaxaudit.finish(path)` completes the folder.

    Raises:
        FileExistsError: something is at `path`.
        OSError: the folder cannot be written.
        TypeError: the optimizer is no Adam, or a parameter's dtype or layout is not held.
        ValueError: `parameters` or `rows` name what is not there.
    """
    optimizer = _unwrapped(optimizer)
    chosen = _choose(optimizer, parameters, _names(optimizer, model, named_parameters))
    _check_one_device(chosen)
    tracks = [_track(name, x, optimizer, _rows_for(name, rows)) for name, x in chosen.items()]
    if isinstance(rows, Mapping) and rows.keys() - chosen.keys():
        raise ValueError(f"`rows` names {_some(rows.keys() - chosen.keys())}, not recorded here.")
    if type(every) is not int or every < 1:
        raise ValueError(f"`every` is {every!r}; use a whole number from 1.")
    if on_failure not in ("raise", "warn"):
        raise ValueError(f"`on_failure` is {on_failure!r}; use 'raise' or 'warn'.")
    strings = {**(metadata or {}), **run_metadata(), **device_metadata(tracks[0].tensor.device)}
    if every > 1:
        strings["every"] = str(every)
    writer = FolderWriter(
        path,
        [track.layout for track in tracks],
        groups=[optimizer_metadata(optimizer, group) for group in optimizer.param_groups],
        metadata=strings,
        overwrite=overwrite,
    )
    return OptimizerRecorder(optimizer, writer, tracks, every, on_failure)


@dataclasses.dataclass
class Track:
    """A recorded parameter and what is known of it between the hooks.

    Attributes:
        tensor: the parameter.
        layout: how it is recorded.
        index: rows of axis 0, or None.
        keys: recorded tensor -> key in the optimizer's state.
        count: steps that Adam has counted for it.
        grad: the gradient of the step in flight.
        version: of that gradient when the step began; None where it cannot be told.
        scaled: copy of that gradient, where a scale that the kernel divides by might not be exact.
    """

    tensor: torch.Tensor
    layout: ParameterLayout
    index: torch.Tensor | None
    keys: Mapping[str, str]
    count: int
    grad: torch.Tensor | None = None
    version: int | None = None
    scaled: torch.Tensor | None = None

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Select the recorded rows of a tensor like the parameter."""
        tensor = tensor.detach()
        if self.index is not None:
            return tensor.index_select(0, self.index)
        return tensor if tensor.ndim else tensor.reshape(1)

    def record(self, state: Mapping[str, Any], grad: torch.Tensor | None) -> dict[str, np.ndarray]:
        """Return the bits of the present state, with a zero gradient where there is none."""
        weight = self.rows(self.tensor)
        tensors = {"W": weight, "grad_W": self.rows(grad) if grad is not None else None}
        tensors |= {k: self.rows(state[x]) if x in state else None for k, x in self.keys.items()}
        record = {}
        for name, tensor in tensors.items():
            layout = self.layout.tensors[name]
            if tensor is None:
                record[name] = np.zeros(layout.shape, f"u{layout.nbytes // weight.numel()}")
                continue
            if DTYPES.get(tensor.dtype) != layout.dtype:
                raise ValueError(
                    f"{self.layout.name}: {name} is {tensor.dtype}, but was {layout.dtype} when the "
                    "recording began. Close this recording and open another one."
                )
            record[name] = bits_of(tensor)
        return record


class OptimizerRecorder(Finishing):
    """Records an optimizer through its step hooks, as `record` describes; made by `record`.

    The gradient is held when a step begins and read when it ends: no implementation of torch.optim
    writes to it, but the fused one under a gradient scaler, which then stores the unscaled gradient
    that it computes with. A step that the scaler skips is no step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        writer: FolderWriter,
        tracks: list[Track],
        every: int,
        on_failure: Literal["raise", "warn"],
    ) -> None:
        """Write the initial state and set the hooks."""
        self._optimizer, self._writer, self._tracks = optimizer, writer, tracks
        self._every, self._on_failure = every, on_failure
        self._taken = 0  # steps of the optimizer since the recording began
        self._last = -1  # steps taken at the last recorded state
        self._loss: float | None = None
        self._in_flight = False
        self._recording = False  # whether the step in flight is recorded
        self._hyperparameters: list[dict[str, float]] = []
        self._groups = len(optimizer.param_groups)
        self._process = os.getpid()
        try:
            self._append_state()
        except BaseException:
            writer.abort()
            raise
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        atexit.register(self._close_at_exit)

    @property
    def path(self) -> os.PathLike[str]:
        """The folder."""
        return self._writer.path

    @property
    def steps(self) -> int:
        """Complete optimizer steps recorded so far."""
        return self._writer.steps

    @property
    def finished(self) -> bool:
        """Whether the folder is complete."""
        return self._writer.finished

    def note_loss(self, loss: float | torch.Tensor, timestep: int | None = None) -> None:
        """Note a loss; a recording has losses only where it was told them, or where there is a closure.

        Args:
            loss: a number, or a tensor of one element.
            timestep: the step that used its gradient; the one that comes next by default.
        """
        if timestep is None:
            self._loss = number_of(loss)
        elif self._every == 1:
            self._writer.note_loss(timestep, number_of(loss))

    def close(self) -> None:
        """Remove the hooks and finish the folder; a closed recorder stays as it is.

        Raises:
            ValueError: no step was recorded. The folder is removed then.
            OSError: the disk is full or fails; `jaxaudit.finish` can complete the folder later.
        """
        self._detach()
        self._writer.close()

    def abort(self) -> None:
        """Give up: remove the hooks and the folder. A closed recording stays as it is."""
        self._detach()
        self._writer.abort()

    def _close_at_exit(self) -> None:
        if os.getpid() == self._process:  # a forked child must leave the parent's files alone
            self._end()

    def _detach(self) -> None:
        atexit.unregister(self._close_at_exit)
        for handle in self._handles:
            handle.remove()
        for track in self._tracks:
            track.grad = track.scaled = None

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hold what the step will use: a hook before each step."""
        if os.getpid() != self._process:
            return None
        with self._stopping_on_failure():
            self._recording = self._taken % self._every == 0
            self._in_flight = True
            if not self._recording:
                return None
            if self._last != self._taken:
                self._append_state()
            self._hyperparameters = [
                {"learning_rate": float(group["lr"]), **constants_of(group)}
                for group in optimizer.param_groups[: self._groups]
            ]
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
            for track in self._tracks:
                self._hold(track, closure is not None)
            if closure is not None:
                watched = self._watching(closure)
                named = {**kwargs, "closure": watched} if "closure" in kwargs else kwargs
                return (args if "closure" in kwargs else (*args[:1], watched, *args[2:])), named
        return None

    def _watching(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure, with a note of the loss that it returns."""

        @functools.wraps(closure)
        def watched() -> Any:
            loss = closure()
            if loss is not None:
                self._loss = number_of(loss)
            return loss

        return watched

    def _hold(self, track: Track, later: bool) -> None:
        """Hold a parameter's gradient; one that a closure makes comes later, within the step."""
        track.grad = None if later else track.tensor.grad
        track.version, track.scaled = None, None
        if track.grad is None:
            return
        if track.grad.layout is not torch.strided:
            raise ValueError(
                f"{track.layout.name}: the gradient has layout {track.grad.layout}, but Adam needs a "
                "dense one. Train with dense gradients (for an embedding: sparse=False)."
            )
        if not track.grad.is_inference():
            track.version = track.grad._version
        if self._scale() is not None and track.grad.dtype in _HALF:
            track.scaled = track.rows(track.grad).clone()

    def _scale(self) -> torch.Tensor | None:
        return getattr(self._optimizer, "grad_scale", None)

    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the step that was taken: a hook after each step."""
        if os.getpid() != self._process or not self._in_flight:
            return
        self._in_flight = False
        found = getattr(optimizer, "found_inf", None)
        if found is not None and float(found):
            self._loss = None  # skipped by the gradient scaler
            return
        self._taken += 1
        if not self._recording:
            self._loss = None
            return
        with self._stopping_on_failure():
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
            if closure is not None:
                for track in self._tracks:
                    self._hold(track, later=False)
            skipped = [i for i, track in enumerate(self._tracks) if track.grad is None]
            self._check_counts()
            self._writer.append(
                self._records(optimizer, closure is not None),
                hyperparameters=self._hyperparameters,
                loss=self._loss,
                skipped=skipped,
                **self._place(),
            )
            self._last = self._taken
            self._loss = None
            for track in self._tracks:
                track.grad = track.scaled = None

    def _records(self, optimizer: Any, by_closure: bool) -> Iterator[dict[str, np.ndarray]]:
        fused = any(group.get("fused") for group in optimizer.param_groups)
        for track in self._tracks:
            if not by_closure:
                self._check_gradient(track, 1 if fused else 0)
            yield track.record(optimizer.state.get(track.tensor, {}), track.grad)

    def _check_gradient(self, track: Track, writes: int) -> None:
        """Raise unless the gradient that was held is still what the step used."""
        if track.grad is None:
            return
        if track.version is not None and track.grad._version > track.version + writes:
            raise ValueError(
                f"{track.layout.name}: the gradient was changed while timestep "
                f"{self._writer.timesteps} was on its way. Change gradients before optimizer.step(), "
                "and set no step hook that changes them before the recorder's."
            )
        scale = self._scale()
        if track.scaled is not None and scale is not None:
            unscaled = track.rows(track.grad).double() * float(scale)
            if not torch.equal(unscaled.nan_to_num(), track.scaled.double().nan_to_num()):
                raise ValueError(
                    f"{track.layout.name}: the fused step divides its {track.grad.dtype} gradient by "
                    f"the scale {float(scale):g} with digits that no recording has. Call "
                    "scaler.unscale_(optimizer) before scaler.step(optimizer)."
                )

    def _check_counts(self) -> None:
        """Raise unless Adam has counted one step for each parameter that had a gradient."""
        counts = _step_counts([self._optimizer.state.get(x.tensor, {}) for x in self._tracks])
        for track, count in zip(self._tracks, counts, strict=True):
            needed = track.count + (track.grad is not None)
            if count != needed:
                raise ValueError(
                    f"{track.layout.name}: the optimizer counts {count} steps where {needed} were "
                    "expected. A step broke off, or a state was loaded, while it was recorded. "
                    "Open another recording from here."
                )
            track.count = count

    def _append_state(self) -> None:
        """Append a state that no recorded step led to."""
        states = [self._optimizer.state.get(track.tensor, {}) for track in self._tracks]
        for track, count in zip(self._tracks, _step_counts(states), strict=True):
            track.count = count
        self._writer.append(
            (track.record(state, None) for track, state in zip(self._tracks, states, strict=True)),
            **self._place(),
        )
        self._last = self._taken

    def _place(self) -> dict[str, Any]:
        """Say where in the run the present state is, if steps are left out.

        A parameter may have had no gradient in some of those, so that its own count is behind.
        """
        if self._every == 1:
            return {}
        usual = [track.layout.first_step - 1 + self._taken for track in self._tracks]
        counts = [track.count for track in self._tracks]
        return {
            "optimizer_step": self._taken,
            "step_counts": None if counts == usual else counts,
        }

    def _stopping_on_failure(self) -> "_Stopping":
        return _Stopping(self)

    def _stop(self, failure: Exception) -> bool:
        """Stop recording for good; return whether the training goes on."""
        self._detach()
        if not self._writer.closed:
            self._writer.release() if self.steps else self._writer.abort()
        if self._on_failure == "raise":
            return False
        text = f"recording stopped after {self.steps} steps: {failure}"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
        return True


class _Stopping:
    """Context in which an error ends the recording, and the training only if it is to."""

    def __init__(self, recorder: OptimizerRecorder):
        self._recorder = recorder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, failure: BaseException | None, traceback: object) -> bool:
        if isinstance(failure, Exception):
            return self._recorder._stop(failure)
        if failure is not None:  # interrupted: what was complete before is kept and can be closed
            self._recorder._detach()
        return False


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch.optim.Adam within the wrappers that hold one as `.optimizer`."""
    inner = optimizer
    while not isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)):
        if not hasattr(inner, "optimizer"):
            raise TypeError(
                f"the optimizer is {type(optimizer).__name__}, but only torch.optim.Adam and AdamW "
                "are recorded. For another optimizer write the rows yourself with RecordingWriter."
            )
        inner = inner.optimizer
    return inner


def _names(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module | None,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None,
) -> dict[str, torch.Tensor]:
    """Name the parameters that the optimizer holds."""
    held = {id(x) for group in optimizer.param_groups for x in group["params"]}
    if named_parameters is None and model is not None:
        named_parameters = model.named_parameters()
    if named_parameters is not None:
        pairs = list(named_parameters)
        names = {name: tensor for name, tensor in pairs if id(tensor) in held}
        if pairs and not names:
            raise ValueError(
                "the optimizer holds none of the named parameters. Pass the model that the optimizer "
                "was made for, after it was moved and wrapped."
            )
        return names
    return {
        name: tensor
        for number, group in enumerate(optimizer.param_groups)
        for name, tensor in zip(
            group.get("param_names") or [f"group{number}.{i}" for i in range(len(group["params"]))],
            group["params"],
            strict=True,
        )
    }


def _choose(
    optimizer: torch.optim.Optimizer,
    parameters: str | re.Pattern[str] | Sequence[str] | Sequence[torch.Tensor] | None,
    names: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return the parameters to record, by name."""
    if parameters is None:
        chosen = dict(names)
    elif isinstance(parameters, (str, re.Pattern)):
        try:
            pattern = re.compile(parameters)
        except re.error as failure:
            raise ValueError(f"{parameters!r} is no regular expression: {failure}.") from None
        chosen = {name: tensor for name, tensor in names.items() if pattern.search(name)}
    elif isinstance(parameters, torch.Tensor):
        raise TypeError("`parameters` is one tensor; pass a list of them.")
    else:
        of_tensor = {id(tensor): name for name, tensor in names.items()}
        chosen = {}
        for given in parameters:
            name = of_tensor.get(id(given)) if isinstance(given, torch.Tensor) else given
            if name is None or name not in names:
                raise ValueError(
                    "the optimizer holds no "
                    + (
                        f"{given!r}"
                        if isinstance(given, str)
                        else "such tensor as one of those given"
                    )
                    + f"; it holds {_some(names)}."
                )
            chosen[name] = names[name]
    if not chosen:
        raise ValueError(f"`parameters` chooses nothing of {_some(names)}.")
    return chosen


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_one_device(chosen: Mapping[str, torch.Tensor]) -> None:
    devices = sorted({str(tensor.device) for tensor in chosen.values()})
    if len(devices) > 1:
        raise ValueError(
            f"the parameters are on {', '.join(devices)}, but a recording states one device. Record "
            "those of each device on their own."
        )


def _rows_for(
    name: str, rows: Sequence[int] | Mapping[str, Sequence[int]] | None
) -> Sequence[int] | None:
    return rows.get(name) if isinstance(rows, Mapping) else rows


def _track(
    name: str,
    tensor: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[int] | None,
) -> Track:
    try:
        if hasattr(tensor, "to_local"):
            raise TypeError("it is sharded over devices; record parameters that are whole.")
        check_parameter(tensor if tensor.ndim else tensor.reshape(1))
        if not tensor.numel():
            raise ValueError("it has no element.")
        index = row_index(rows, tensor if tensor.ndim else tensor.reshape(1))
    except (TypeError, ValueError) as failure:
        raise type(failure)(f"{name}: {failure}") from None
    number = next(
        i
        for i, group in enumerate(optimizer.param_groups)
        if any(member is tensor for member in group["params"])
    )
    amsgrad = optimizer.param_groups[number]["amsgrad"]
    keys = MOMENTS | (AMSGRAD_MOMENT if amsgrad else {})
    state = optimizer.state.get(tensor, {})
    shape = tuple(tensor.shape) or (1,)
    recorded = shape if rows is None else (len(rows), *shape[1:])
    dtypes = {"W": tensor.dtype, "grad_W": _grad_dtype(tensor)}
    dtypes |= {key: state[x].dtype if x in state else tensor.dtype for key, x in keys.items()}
    layout = ParameterLayout(
        name=name,
        tensors={key: RowLayout(DTYPES[dtype], recorded) for key, dtype in dtypes.items()},
        shape=tuple(tensor.shape),
        rows=None if rows is None else tuple(int(row) for row in rows),
        group=number,
        first_step=step_count(state) + 1,
    )
    return Track(tensor, layout, None if index is None else index, keys, step_count(state))


def _grad_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype of the gradients, which newer versions of torch let differ."""
    dtype = getattr(tensor, "grad_dtype", None) if tensor.is_leaf else None
    return dtype if dtype in DTYPES else tensor.dtype


def _step_counts(states: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the counted steps, in one transfer where they are on a device."""
    counts = [state.get("step", 0) for state in states]
    devices = [x for x in counts if isinstance(x, torch.Tensor) and x.device.type != "cpu"]
    if len(devices) == len(counts) and counts:
        return [int(x) for x in torch.stack(devices).tolist()]
    return [int(count) for count in counts]
