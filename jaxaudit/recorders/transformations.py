"""Recorder for optax: a gradient transformation around Adam that records every update.

Example:
    ::

        adamw = record_optax(
            optax.adamw(1e-3, weight_decay=0.01),
            "run",
            hyperparameters={
                "learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01
            },
        )
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
        ...  # train with optimizer.init, optimizer.update, optax.apply_updates
        adamw.close(params)

An update returns the change and not the new weights: the weights after a step are seen when the next
update begins, and those after the last one by `close`.
"""

import atexit
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.experimental import io_callback

from jaxaudit.recorders.folders import FolderWriter, ParameterLayout, check_path
from jaxaudit.recorders.writing import DTYPES, RowLayout, run_metadata

_SPELLINGS = {"b1": "beta1", "b2": "beta2", "eps": "epsilon", "lr": "learning_rate"}
_NEEDED = ("learning_rate", "beta1", "beta2", "epsilon", "weight_decay")
_MOMENTS = {"momentum_W": "mu", "variance_W": "nu", "max_variance_W": "nu_max"}
_DTYPE_NAMES = {name: dtype for dtype, name in DTYPES.items() if dtype in ("BF16", "F16", "F32")}
#: Elements on which the first moments are checked against what the hyperparameters say.
_CHECKED = 4096
#: Largest relative deviation there: bfloat16 rounds by 2^-9 at each of a few operations.
_TOLERANCE = 2.0**-5


def record_optax(
    transformation: optax.GradientTransformation,
    path: str | os.PathLike[str],
    *,
    hyperparameters: Mapping[str, float | Callable[[Any], Any]] | None = None,
    optimizer: Literal["adam", "adamw"] = "adamw",
    parameters: str | re.Pattern[str] | Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> "RecordedTransformation":
    """Wrap an Adam of optax so that its updates are recorded in a folder.

    Recorded are the gradients as they come to the wrapper, so wrap the Adam alone and put what
    changes gradients before it: `optax.chain(optax.clip(1.0), record_optax(optax.adamw(...), ...))`.
    For several Adams (`optax.multi_transform`, `optax.partition`) wrap each of them, with a folder
    of its own.

    It works eagerly and within `jax.jit`. A jitted step hands the arrays to the host by
    `jax.experimental.io_callback` with `ordered=True`, which keeps the updates in their order, and
    which JAX neither drops nor repeats; JAX has it on one device, and not under `vmap`. The moments
    are outputs of the jitted step either way, but what XLA fuses can change with them: a recording
    shows the bits of the run that was recorded. What cannot be recorded raises from the update, or from
    a jitted step as jax.errors.JaxRuntimeError with the same message.

    Args:
        transformation: holds exactly one state of `optax.scale_by_adam` or `scale_by_amsgrad`.
        path: the folder to make, with a file for each parameter.
        hyperparameters: `learning_rate`, `b1`, `b2`, `eps` and `weight_decay`, which optax hides in
            closures: numbers, or schedules as optax calls them. What `optax.inject_hyperparams`
            keeps in its state is read there instead.
        optimizer: `adamw` where weight decay is added to the update, `adam` where it is added to the
            gradient.
        parameters: what to record: a regular expression that is searched in the names, or names; all
            by default. A name is the path in the tree, with dots: `encoder.layers.0.kernel`.
        metadata: strings of your own for all files.
        overwrite: replace a recording that is at `path`.

    Returns:
        The transformation that records, with a method `close(params)`.

    Raises:
        FileExistsError: something is at `path`.
        FileNotFoundError: the folder of `path` does not exist.
        ValueError: `hyperparameters` or `optimizer` are of another form.
    """
    if optimizer not in ("adam", "adamw"):
        raise ValueError(f"`optimizer` is {optimizer!r}; use 'adam' or 'adamw'.")
    check_path(Path(path), overwrite)
    given = {_SPELLINGS.get(name, name): value for name, value in (hyperparameters or {}).items()}
    unknown = given.keys() - {*_NEEDED}
    if unknown:
        raise ValueError(f"hyperparameters {sorted(unknown)} are unknown; give {list(_NEEDED)}.")
    numbers = {name: float(value) for name, value in given.items() if not callable(value)}
    session = _Session(Path(path), parameters, optimizer, numbers, dict(metadata or {}), overwrite)
    return RecordedTransformation(transformation, given, session)


class RecordedTransformation(optax.GradientTransformationExtraArgs):
    """A gradient transformation that records its updates; made by `record_optax`."""

    _session: "_Session"

    def __new__(
        cls,
        transformation: optax.GradientTransformation,
        given: Mapping[str, float | Callable[[Any], Any]],
        session: "_Session",
    ) -> "RecordedTransformation":
        """Wrap init and update."""
        inner = optax.with_extra_args_support(transformation)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            if params is None:
                raise ValueError(
                    "the update came without params, but a recording holds the weights. Call "
                    "update(gradients, state, params)."
                )
            changes, after = inner.update(updates, state, params, **extra)
            payload = _payload(updates, params, after, given, session.pattern)
            if "value" in extra and extra["value"] is not None:
                payload["loss"] = jnp.asarray(extra["value"])
            if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(payload)):
                session.compiled = True
                io_callback(session.receive, None, payload, ordered=True)
            else:
                session.receive(payload)
            return changes, after

        self = super().__new__(cls, inner.init, cast(Any, update))
        self._session = session
        return self

    @property
    def path(self) -> Path:
        """The folder."""
        return self._session.path

    @property
    def steps(self) -> int:
        """Complete optimizer steps recorded so far; the last update's waits for its weights."""
        jax.effects_barrier()
        return self._session.steps

    @property
    def finished(self) -> bool:
        """Whether the folder is complete."""
        return self._session.writer is not None and self._session.writer.finished

    def close(self, params: Any = None) -> None:
        """Finish the folder; a closed one stays as it is.

        Args:
            params: the weights after the last update; without them the last step is left out.

        Raises:
            ValueError: no step is complete, or `params` are other ones. No folder is left in the
                first case.
            OSError: the disk is full or fails; `jaxaudit.finish` can complete the folder later.
        """
        jax.effects_barrier()
        self._session.close(params)

    def abort(self) -> None:
        """Give up: remove the folder. A closed recording stays as it is."""
        jax.effects_barrier()
        self._session.abort()


class _Session:
    """What the host side of a recorded transformation holds: one step, until its weights come."""

    def __init__(
        self,
        path: Path,
        pattern: str | re.Pattern[str] | Sequence[str] | None,
        optimizer: str,
        numbers: dict[str, float],
        metadata: dict[str, str],
        overwrite: bool,
    ):
        self.path, self.pattern, self.optimizer, self.numbers = path, pattern, optimizer, numbers
        self.metadata, self.overwrite = metadata, overwrite
        self.writer: FolderWriter | None = None
        self.compiled = False
        self._names: list[str] = []
        self._pending: Mapping[str, Any] | None = None
        self._count = 0
        self._closed = False
        self._lock = threading.Lock()
        self._process = os.getpid()

    @property
    def steps(self) -> int:
        return 0 if self.writer is None else self.writer.steps

    def receive(self, payload: Mapping[str, Any]) -> None:
        """Take the arrays of an update: the weights before it, all else after it."""
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.path} is closed; wrap the optimizer anew to record more.")
            payload = cast(dict, jax.tree.map(lambda x: np.array(x, copy=True), dict(payload)))
            # Numbers stay Python's doubles; JAX would have made them float32.
            payload["hyperparameters"] = self.numbers | {
                name: float(value) for name, value in payload["hyperparameters"].items()
            }
            count = int(payload["count"])
            if self.writer is None:
                self._open(payload, count)
            elif count != self._count + 1:
                raise ValueError(
                    f"optax counts step {count}, but step {self._count + 1} was to come. A state was "
                    "restored, or another run uses the same transformation: wrap the optimizer anew."
                )
            else:
                self._complete(payload["params"])
            self._count, self._pending = count, payload

    def _open(self, payload: Mapping[str, Any], count: int) -> None:
        """Open the folder; a run from zero moments begins with the state before this update."""
        fresh = count == 1
        if fresh:
            _check_first_moments(payload, self.optimizer)
        self._names = list(payload["params"])
        group = {
            "optimizer": self.optimizer,
            "amsgrad": "true" if "max_variance_W" in payload["moments"] else "false",
            "maximize": "false",
            "implementation": "optax",
            "compiled": "true" if self.compiled else "false",
        }
        self.writer = FolderWriter(
            self.path,
            [_layout(name, payload, first_step=1 if fresh else count + 1) for name in self._names],
            groups=[group],
            metadata={
                **self.metadata,
                **run_metadata(),
                "device": jax.default_backend(),
                "jax_version": jax.__version__,
                "optax_version": optax.__version__,
            },
            overwrite=self.overwrite,
        )
        atexit.register(self._close_at_exit)
        if fresh:
            moments = {k: jax.tree.map(np.zeros_like, v) for k, v in payload["moments"].items()}
            self._append(payload["params"], None, moments)

    def _complete(self, params: Mapping[str, np.ndarray]) -> None:
        """Append the step that waited for its weights; a resumed run's first one is its beginning."""
        pending, self._pending = self._pending, None
        if pending is None or self.writer is None:
            return
        if not self.writer.timesteps:
            self._append(params, None, pending["moments"])
            return
        loss = float(pending["loss"]) if "loss" in pending else None
        self._append(
            params, pending["grads"], pending["moments"], [pending["hyperparameters"]], loss
        )

    def _append(
        self,
        params: Mapping[str, np.ndarray],
        grads: Mapping[str, np.ndarray] | None,
        moments: Mapping[str, Mapping[str, np.ndarray]],
        hyperparameters: list[dict[str, float]] | None = None,
        loss: float | None = None,
    ) -> None:
        assert self.writer is not None
        layouts = {layout.name: layout.tensors for layout in self.writer.layouts}

        def record(name: str) -> dict[str, np.ndarray]:
            shape = layouts[name]["W"].shape
            tensors = {"W": params[name]}
            tensors |= {key: moment[name] for key, moment in moments.items()}
            found = {key: tensor.reshape(shape) for key, tensor in tensors.items()}
            item = layouts[name]["grad_W"].nbytes // max(params[name].size, 1)
            zero = np.zeros(shape, f"u{item}")
            return found | {"grad_W": zero if grads is None else grads[name].reshape(shape)}

        self.writer.append(
            (record(name) for name in self._names), hyperparameters=hyperparameters, loss=loss
        )

    def close(self, params: Any) -> None:
        with self._lock:
            if self._closed:
                return
            if self.writer is None:
                raise ValueError(f"{self.path}: no update was recorded, so no folder was made.")
            if params is not None and not self.writer.closed:
                leaves = _by_name(params)
                missing = [name for name in self._names if name not in leaves]
                if missing:
                    raise ValueError(
                        f"`params` has no {missing[0]!r}; pass those of the last update."
                    )
                self._complete({name: np.asarray(leaves[name]) for name in self._names})
            self._closed, self._pending = True, None
            atexit.unregister(self._close_at_exit)
            self.writer.close()

    def abort(self) -> None:
        with self._lock:
            self._closed, self._pending = True, None
            atexit.unregister(self._close_at_exit)
            if self.writer is not None:
                self.writer.abort()

    def _close_at_exit(self) -> None:
        if os.getpid() == self._process:
            self.close(None) if self.steps else self.abort()


def _payload(
    updates: Any,
    params: Any,
    state: Any,
    given: Mapping[str, float | Callable[[Any], Any]],
    pattern: str | re.Pattern[str] | Sequence[str] | None,
) -> dict[str, Any]:
    """Collect the arrays of an update by name."""
    adam = _adam_state(state)
    moments = {
        key: _by_name(getattr(adam, field))
        for key, field in _MOMENTS.items()
        if hasattr(adam, field)
    }
    weights, grads = _by_name(params), _by_name(updates)
    held = [name for name in weights if name in moments["momentum_W"] and name in grads]
    names = _chosen(held, pattern)
    return {
        "count": adam.count,
        "params": {name: weights[name] for name in names},
        "grads": {name: grads[name] for name in names},
        "moments": {key: {name: x[name] for name in names} for key, x in moments.items()},
        "hyperparameters": _computed_hyperparameters(state, given, adam.count - 1),
    }


def _adam_state(state: Any) -> Any:
    """Find the one state with a count and both moments."""

    def is_adam(node: Any) -> bool:
        return all(hasattr(node, field) for field in ("count", "mu", "nu"))

    found = [node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node)]
    if len(found) != 1:
        raise ValueError(
            f"the transformation holds {len(found)} states of Adam, needed one. Wrap each "
            "optax.adam, adamw or scale_by_adam on its own."
        )
    return found[0]


def _computed_hyperparameters(
    state: Any, given: Mapping[str, float | Callable[[Any], Any]], count: Any
) -> dict[str, Any]:
    """Return those values of an update that are computed on the way, and check that all are known."""

    def is_injected(node: Any) -> bool:
        return hasattr(node, "hyperparams")

    values = {name: jnp.asarray(value(count)) for name, value in given.items() if callable(value)}
    for node in jax.tree.leaves(state, is_leaf=is_injected):
        if is_injected(node):
            found = {_SPELLINGS.get(name, name): x for name, x in node.hyperparams.items()}
            values |= {name: x for name, x in found.items() if name in _NEEDED}
    missing = [name for name in _NEEDED if name not in values and name not in given]
    if missing:
        raise ValueError(
            f"hyperparameters {missing} are not known: optax hides them. Pass them to record_optax "
            "as `hyperparameters`, or wrap optax.inject_hyperparams."
        )
    return values


def _chosen(
    held: Sequence[str], pattern: str | re.Pattern[str] | Sequence[str] | None
) -> list[str]:
    if pattern is None:
        names = list(held)
    elif isinstance(pattern, (str, re.Pattern)):
        names = [name for name in held if re.search(pattern, name)]
    else:
        names = list(pattern)
        missing = [name for name in names if name not in held]
        if missing:
            raise ValueError(
                f"no parameter is called {missing[0]!r}; there are {', '.join(held[:9])}."
            )
    if not names:
        raise ValueError(
            f"`parameters` chooses nothing of {', '.join(held[:9]) or 'no parameter'}."
        )
    return names


def _by_name(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their dotted paths; a lone leaf is called `params`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {".".join(_part(key) for key in path) or "params": leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("two parameters have the same dotted path; rename one of them.")
    return named


def _part(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _layout(name: str, payload: Mapping[str, Any], first_step: int) -> ParameterLayout:
    tensors = {"W": payload["params"][name], "grad_W": payload["grads"][name]}
    tensors |= {key: moment[name] for key, moment in payload["moments"].items()}
    shape = tuple(payload["params"][name].shape)
    for key, tensor in tensors.items():
        if tensor.dtype.name not in _DTYPE_NAMES:
            raise TypeError(
                f"{name}: {key} is {tensor.dtype}, but a recording holds "
                f"{', '.join(_DTYPE_NAMES)}. Record other parameters."
            )
    return ParameterLayout(
        name=name,
        tensors={
            k: RowLayout(_DTYPE_NAMES[x.dtype.name], shape or (1,)) for k, x in tensors.items()
        },
        shape=shape,
        first_step=first_step,
    )


def _check_first_moments(payload: Mapping[str, Any], optimizer: str) -> None:
    """Raise where the first moments do not follow from gradient and hyperparameters at all.

    After one step from zero, exp_avg = (1 - beta1) g and exp_avg_sq = (1 - beta2) g^2. Something
    else says that the gradient was changed on its way to Adam, or that another beta was given.
    """
    values = payload["hyperparameters"]
    if optimizer == "adam" and values["weight_decay"]:
        return
    for name, grad in payload["grads"].items():
        g = grad.reshape(-1)[:_CHECKED].astype(np.float64)
        for key, beta, power in (("momentum_W", "beta1", 1), ("variance_W", "beta2", 2)):
            found = payload["moments"][key][name].reshape(-1)[:_CHECKED].astype(np.float64)
            expected = (1 - values[beta]) * g**power
            normal = np.isfinite(expected) & (np.abs(expected) > 1e-30) & np.isfinite(found)
            off = np.abs(found - expected)[normal] > _TOLERANCE * np.abs(expected)[normal]
            if off.mean() > 0.5 if off.size else False:
                raise ValueError(
                    f"{name}: after the first update {key} is not (1 - {beta}) * gradient"
                    f"{'^2' if power == 2 else ''}. Wrap the Adam alone, behind what changes the "
                    f"gradient, and give the {beta} that it has."
                )
