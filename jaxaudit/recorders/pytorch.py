"""Recorder for PyTorch training loops: three lines turn a run into a recording.

Example:
    ::

        recorder = Recorder("run.safetensors", model.embedding.weight, optimizer)
        for batch in batches:
            optimizer.zero_grad()
            loss = model(batch)
            loss.backward()
            optimizer.step()
            recorder(loss)  # after the step; before zero_grad() and scheduler.step()
        recorder.close()
"""

import atexit
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from jaxaudit.recorders.writing import Finishing, RecordingWriter, RowLayout, run_metadata

#: Storage formats that a recording can hold, by torch dtype.
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
#: Key in the recording -> key in the optimizer's state.
MOMENTS = {"momentum_W": "exp_avg", "variance_W": "exp_avg_sq"}
AMSGRAD_MOMENT = {"max_variance_W": "max_exp_avg_sq"}
#: Where torch.optim falls back to its loop unless told otherwise (`_default_to_fused_or_foreach`).
_LOOP_BY_DEFAULT = ("cpu", "mps")
_PROBE_COUNT = 4096


class Recorder(Finishing):
    """Records one parameter of an Adam or AdamW run: weight, gradient, moments, after every step.

    Timestep 0 is the state at construction, with a zero gradient, and zero moments unless the
    optimizer already has some. Each call appends the state after one step. A process that ends
    without `close` (an exception, a normal exit) closes the recording on its way out; a killed one
    leaves none. As a context manager it closes at the end of the block or on any exception; where
    an exception comes before the first step is complete, nothing is left.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        parameter: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        *,
        rows: Sequence[int] | None = None,
        moments: Literal["native", "float32"] = "native",
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write timestep 0.

        Args:
            path: the recording to write.
            parameter: bfloat16, float16 or float32, of any rank from 1; axis 0 is the row axis.
            optimizer: torch.optim.Adam or AdamW, of any implementation, that holds `parameter`.
            rows: the rows of axis 0 to record, in this order; all by default.
            moments: `native` stores the moments in the optimizer's dtype, `float32` widens them,
                which changes no value.
            metadata: strings of your own for the header; the recorder's own keys win.
            overwrite: replace an existing recording.

        Raises:
            FileExistsError: `path` exists and `overwrite` is false.
            OSError: the recording cannot be written.
            TypeError: the optimizer is no Adam, or the parameter's dtype or layout is not held.
            ValueError: the optimizer does not hold the parameter, or `rows` do not fit it.
        """
        check_parameter(parameter)
        self._parameter = parameter
        self._optimizer = optimizer
        self._group = _group_of(parameter, optimizer)
        self._rows = row_index(rows, parameter)
        self._widen = _check_moments(moments) == "float32"
        self._keys = MOMENTS | (AMSGRAD_MOMENT if self._group["amsgrad"] else {})
        self._first_step = step_count(self._state()) + 1
        self._losses: list[float] = []
        self._learning_rates: list[float] = []
        self._constants = constants_of(self._group)
        initial = self._initial_tensors()
        layouts = {name: RowLayout(DTYPES[x.dtype], tuple(x.shape)) for name, x in initial.items()}
        self._writer = RecordingWriter(
            path,
            layouts,
            metadata={**(metadata or {}), **self._metadata(rows)},
            overwrite=overwrite,
        )
        self._process = os.getpid()
        atexit.register(self._close_at_exit)
        self._writer.append({name: bits_of(x) for name, x in initial.items()})

    @property
    def steps(self) -> int:
        """Complete optimizer steps recorded so far."""
        return self._writer.steps

    @property
    def finished(self) -> bool:
        """Whether the recording is complete under its final name."""
        return self._writer.finished

    def __call__(self, loss: float | torch.Tensor | None = None) -> None:
        """Append the state after a step; call it right after each `optimizer.step()`.

        Args:
            loss: the loss whose gradient the step used, a number or a tensor of one element.

        Raises:
            ValueError: the optimizer did not take exactly one step since the last call, the
                gradient is gone or sparse, or a hyperparameter other than the learning rate
                changed.
            OSError: the disk is full or fails. Nothing is left then.
        """
        timestep = self._writer.timesteps
        self._check_step(timestep)
        tensors = self._current_tensors()
        del self._losses[timestep - 1 :], self._learning_rates[timestep - 1 :]  # of a torn call
        self._losses.append(number_of(loss))
        self._learning_rates.append(float(self._group["lr"]))
        self._writer.append({name: bits_of(x) for name, x in tensors.items()})

    def close(self) -> None:
        """Finish the recording; a closed one stays as it is.

        Raises:
            ValueError: no step was recorded. No file is written then.
            OSError: the disk is full or fails. Nothing is left then.
        """
        atexit.unregister(self._close_at_exit)
        if self._writer.closed:
            return
        rates, losses = self._learning_rates[: self.steps], self._losses[: self.steps]
        if rates:  # timestep 0 had no step: the first step's learning rate stands in
            rates = [rates[0], *rates]
            self._writer.metadata["hyperparameters"] = _hyperparameters(rates, self._constants)
            self._writer.small = _small_arrays(rates, losses, self._constants)
        self._writer.close()

    def abort(self) -> None:
        """Give up: leave no file. A closed recording stays as it is."""
        atexit.unregister(self._close_at_exit)
        self._writer.abort()

    def _close_at_exit(self) -> None:
        if os.getpid() == self._process:  # a forked child must leave the parent's files alone
            self._end()

    def _state(self) -> dict[str, Any]:
        return self._optimizer.state.get(self._parameter, {})

    def _select(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        return tensor if self._rows is None else tensor.index_select(0, self._rows)

    def _select_moment(self, moment: torch.Tensor) -> torch.Tensor:
        return self._select(moment).to(torch.float32 if self._widen else moment.dtype)

    def _initial_tensors(self) -> dict[str, torch.Tensor]:
        state, zeros = self._state(), torch.zeros_like(self._parameter.detach())
        moments = {k: self._select_moment(state.get(x, zeros)) for k, x in self._keys.items()}
        return {"W": self._select(self._parameter), "grad_W": self._select(zeros), **moments}

    def _current_tensors(self) -> dict[str, torch.Tensor]:
        state = self._state()
        gradient = _checked_gradient(self._parameter, self._writer.timesteps)
        moments = {k: self._select_moment(state[x]) for k, x in self._keys.items()}
        return {"W": self._select(self._parameter), "grad_W": self._select(gradient), **moments}

    def _check_step(self, timestep: int) -> None:
        """Raise unless the optimizer took exactly one step since the last call."""
        needed, taken = self._first_step + timestep - 1, step_count(self._state())
        if self._writer.closed:
            raise ValueError(f"{self._writer.path} is closed; open a new Recorder to record more.")
        if taken != needed:
            raise ValueError(
                f"the optimizer has taken {taken} steps, but timestep {timestep} must follow step "
                f"{needed}. Call the recorder once after every optimizer.step(), and not where a "
                "gradient scaler skipped the step."
            )
        if constants_of(self._group) != self._constants:
            raise ValueError(
                f"hyperparameters changed from {self._constants} to {constants_of(self._group)} "
                f"at step {needed}, but a recording holds one value of each (the learning rate "
                "alone may vary). Close this recording and open another one."
            )

    def _metadata(self, rows: Sequence[int] | None) -> dict[str, str]:
        metadata = {"format": "jaxaudit recording 1", **run_metadata()}
        metadata |= optimizer_metadata(self._optimizer, self._group)
        metadata |= device_metadata(self._parameter.device)
        metadata["parameter_shape"] = json.dumps(list(self._parameter.shape))
        metadata["first_step"] = json.dumps(self._first_step)
        if rows is not None:
            metadata["rows"] = json.dumps([int(row) for row in rows])
        return metadata


def device_metadata(device: torch.device) -> dict[str, str]:
    """Describe what computes on `device`, as far as the bits of a training run depend on it."""
    metadata = {
        "torch_version": torch.__version__,
        "device": device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": str(torch.get_num_threads()),
        "sqrt_probe": json.dumps(probe_sqrt(device)),
    }
    if device.type == "cuda":
        metadata["device_name"] = torch.cuda.get_device_name(device)
    return metadata


def probe_sqrt(device: torch.device) -> dict[str, int | str]:
    """Take the float32 square root of `probe_vector` on `device`, to show how it rounds.

    IEEE 754 asks for the correctly rounded root, which NumPy gives; torch on CPU calls a library
    whose answer depends on the vendor of the processor.

    Returns:
        `count`, the length of the vector; `differ_from_ieee`, how many roots are not the correctly
        rounded ones; `sha256` of the roots as little-endian float32, in hexadecimal.
    """
    vector = probe_vector()
    # MKL's first multi-threaded call in a process has been seen to go wrong; a short one is not.
    torch.sqrt(torch.ones(1, device=device))
    roots = torch.sqrt(torch.from_numpy(vector).to(device)).cpu().numpy().astype("<f4")
    differing = np.count_nonzero(roots.view("<u4") != np.sqrt(vector).astype("<f4").view("<u4"))
    digest = hashlib.sha256(roots.tobytes()).hexdigest()
    return {"count": len(vector), "differ_from_ieee": int(differing), "sha256": digest}


def probe_vector() -> np.ndarray:
    """Return the fixed vector of `probe_sqrt`: float32 (4096,), ascending, all over [1, 4).

    Element i has the bits 0x3F800000 + 4096 * i + (1103 * i mod 4096): one in each 4096th part of
    the two binades, with all low bits in use.
    """
    i = np.arange(_PROBE_COUNT, dtype=np.uint32)
    return (0x3F800000 + 4096 * i + 1103 * i % 4096).astype(np.uint32).view(np.float32)


def check_parameter(parameter: torch.Tensor) -> None:
    """Raise unless a recording can hold the parameter."""
    if parameter.dtype not in DTYPES or parameter.layout is not torch.strided:
        raise TypeError(
            f"the parameter is {parameter.dtype} with layout {parameter.layout}, but a recording "
            f"holds dense {', '.join(str(dtype) for dtype in DTYPES)}. Record another parameter."
        )
    if parameter.ndim < 1:
        raise ValueError(
            "the parameter has no axis; recordings need a row axis, axis 0. jaxaudit.record takes it as one row."
        )


def _check_moments(moments: str) -> str:
    if moments not in ("native", "float32"):
        raise ValueError(f"`moments` is {moments!r}; use 'native' or 'float32'.")
    return moments


def _group_of(parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the parameter group that holds the parameter."""
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        raise TypeError(
            f"the optimizer is {type(optimizer).__name__}, but only torch.optim.Adam and AdamW "
            "are recorded. For another optimizer write the rows yourself with RecordingWriter."
        )
    for group in optimizer.param_groups:
        if any(member is parameter for member in group["params"]):
            return group
    raise ValueError(
        f"no parameter group of the optimizer holds the parameter of shape "
        f"{tuple(parameter.shape)}. Pass the very tensor that the optimizer was given."
    )


def row_index(rows: Sequence[int] | None, parameter: torch.Tensor) -> torch.Tensor | None:
    """Check the rows and return them as an index on the parameter's device, int64 (rows,)."""
    if rows is None:
        return None
    index = [int(row) for row in rows]
    if not index or min(index) < 0 or max(index) >= len(parameter) or len({*index}) < len(index):
        raise ValueError(
            f"`rows` must be different row numbers from 0 to {len(parameter) - 1}, at least one; "
            f"got {len(index)} of them"
            + (f", from {min(index)} to {max(index)}." if index else ".")
        )
    return torch.tensor(index, device=parameter.device)


def step_count(state: dict[str, Any]) -> int:
    """Return how many steps Adam has counted in a parameter's state."""
    return int(state["step"]) if "step" in state else 0


def _checked_gradient(parameter: torch.Tensor, timestep: int) -> torch.Tensor:
    gradient = parameter.grad
    if gradient is None:
        raise ValueError(
            f"the parameter's gradient is None at timestep {timestep}. Call the recorder after "
            "optimizer.step() and before zero_grad()."
        )
    if gradient.layout is not torch.strided:
        raise ValueError(
            f"the gradient has layout {gradient.layout}, but Adam needs a dense one. Train with "
            "dense gradients (for an embedding: sparse=False)."
        )
    return gradient


def number_of(loss: float | torch.Tensor | None) -> float:
    """Return a loss as a number; NaN where there is none."""
    if isinstance(loss, torch.Tensor):
        loss = loss.detach()
    return float("nan") if loss is None else float(loss)


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """Return the tensor's bits on the host, without a copy where it is there and contiguous."""
    tensor = tensor.cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def constants_of(group: dict[str, Any]) -> dict[str, float]:
    """Return the hyperparameters that must not change during a recording, as doubles."""
    beta1, beta2 = group["betas"]
    values = {"beta1": beta1, "beta2": beta2, "epsilon": group["eps"]}
    values["weight_decay"] = group["weight_decay"]
    return {name: float(value) for name, value in values.items()}


def _hyperparameters(learning_rates: list[float], constants: dict[str, float]) -> str:
    """Return all hyperparameters as JSON; `learning_rates` holds T+1 doubles."""
    varied = len(set(learning_rates)) > 1
    learning_rate = learning_rates if varied else learning_rates[0]
    return json.dumps({"learning_rate": learning_rate, **constants})


def _small_arrays(
    learning_rates: list[float], losses: list[float], constants: dict[str, float]
) -> dict[str, np.ndarray]:
    """Return what is written beside the streamed tensors; a run without losses has no `losses`."""
    keys = {"beta1": "adam_beta1", "beta2": "adam_beta2", "epsilon": "adam_epsilon"}
    arrays: dict[str, np.ndarray] = {
        keys.get(name, name): np.asarray(value, np.float64) for name, value in constants.items()
    }
    arrays["learning_rate"] = np.asarray(learning_rates, np.float64)
    if not np.isnan(losses).all():  # timestep 0 has no loss
        arrays["losses"] = np.asarray([np.nan, *losses], np.float32)
    return arrays


def optimizer_metadata(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, str]:
    """Return the options that decide which arithmetic the optimizer runs for a group."""
    # AdamW was a class of its own before it became Adam with this flag.
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
    metadata = {
        "optimizer": "adamw" if decoupled else "adam",
        "amsgrad": _json_bool(group["amsgrad"]),
        "maximize": _json_bool(group["maximize"]),
        "capturable": _json_bool(group.get("capturable", False)),
        "implementation": _implementation(group),
    }
    if isinstance(group["lr"], torch.Tensor):  # computed with in float32, unlike a Python float
        metadata["tensor_learning_rate"] = "true"
    return metadata


def _implementation(group: dict[str, Any]) -> str:
    """Name the implementation that torch.optim picks for a group, by its own rule.

    `fused` and `foreach` count where either was set; otherwise foreach is taken where all tensors
    are plain ones on a device that has it, unless the learning rate is a tensor that is not
    capturable (`torch.optim.adam.adam`, 2.13).
    """
    if group.get("fused"):
        return "fused"
    if group.get("fused") is None and group.get("foreach") is None:
        plain = all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in group["params"])
        on_device = all(x.device.type not in _LOOP_BY_DEFAULT for x in group["params"])
        scalar = not isinstance(group["lr"], torch.Tensor) or bool(group.get("capturable"))
        loop = group.get("differentiable") or not (plain and on_device and scalar)
        return "loop" if loop else "foreach"
    return "foreach" if group.get("foreach") else "loop"


def _json_bool(value: bool) -> str:
    return json.dumps(bool(value))
