"""Runs of torch.optim.Adam and AdamW on CPU, for `random_runs`."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from random_runs import Maker, Run, Setting

from jaxaudit.arithmetics import VARIANTS, Arithmetic
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, Format
from jaxaudit.mkl_sqrt import root_of_probe
from jaxaudit.recorders.pytorch import probe_sqrt

AGAINST = f"torch {torch.__version__}"

#: Names that the catalogue gives to what differs between machines and builds.
UNFUSED, MKL_ROOT, TENSOR = (
    "no fused multiply-add",
    "square root of MKL on AMD",
    "learning rate a tensor",
)

DTYPES = {BFLOAT16: torch.bfloat16, FLOAT16: torch.float16, FLOAT32: torch.float32}

_KINDS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@functools.cache
def fuses() -> bool:
    """Tell whether torch runs its kernels with fused multiply-add here."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX")


@functools.cache
def root() -> str:
    """Name the float32 square root that torch takes here: "ieee" or "mkl-amd"."""
    found = root_of_probe(str(probe_sqrt(torch.device("cpu"))["sha256"]))
    assert found is not None, "torch's float32 square root is neither IEEE 754's nor MKL's on AMD"
    return found


def take(
    setting: Setting,
    kind: str,
    *,
    capturable: bool = False,
    tensor_rate: bool = False,
    master: bool = False,
    second: Format | None = None,
) -> Run:
    """Take the steps of a setting.

    Args:
        setting: what to compute.
        kind: "loop", "foreach" or "fused".
        capturable: pass that on; torch takes it on CPU after its check of the device is set aside.
        tensor_rate: the learning rate is a float32 tensor; the run's hyperparameters then hold its values.
        master: weights and moments are float32, whatever the format of the recorded weights is, and the
            gradients are values of that format.
        second: format of the second moment, instead of that of the weights.
    """
    if tensor_rate:
        setting = _single_rates(setting)
    storage = setting.storage
    kept = FLOAT32 if master else storage
    parameter = torch.nn.Parameter(_tensor(setting.values["param"], kept))
    formats = {"exp_avg": kept, "exp_avg_sq": second or kept, "max_exp_avg_sq": second or kept}
    optimizer = _optimizer(setting, parameter, formats, kind=kind, capturable=capturable)
    names = [name for name in optimizer.state[parameter] if name != "step"]
    rows: dict[str, list[Any]] = {name: [] for name in ("param", "grad", *names)}

    def note() -> None:
        for name in names:
            rows[name].append(_patterns(optimizer.state[parameter][name]))
        rows["param"].append(_patterns(parameter))

    note()
    with _threads(setting.options.threads), _capturable_on_cpu():
        for k, rate in enumerate(setting.hyperparameters.learning_rate.tolist()):
            optimizer.param_groups[0]["lr"] = torch.tensor(rate) if tensor_rate else rate
            gradient = _tensor(setting.values["grad"][k], storage)
            rows["grad"].append(_patterns(gradient))
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
            note()
    patterns = {name: np.stack(values) for name, values in rows.items()}
    return Run(
        setting=setting,
        formats=formats | {"param": kept, "grad": storage},
        patterns=patterns,
    )


def _single_rates(setting: Setting) -> Setting:
    rates = setting.hyperparameters.learning_rate.astype(np.float32).astype(np.float64)
    given = dataclasses.replace(setting.hyperparameters, learning_rate=rates)
    return dataclasses.replace(setting, hyperparameters=given)


def _optimizer(
    setting: Setting,
    parameter: torch.nn.Parameter,
    formats: Mapping[str, Format],
    *,
    kind: str,
    capturable: bool,
) -> torch.optim.Optimizer:
    """Make an optimizer that has already taken the setting's earlier steps."""
    given, options = setting.hyperparameters, setting.options
    optimizer = (torch.optim.AdamW if options.decoupled else torch.optim.Adam)(
        [parameter],
        betas=(given.beta1, given.beta2),
        eps=given.epsilon,
        weight_decay=given.weight_decay,
        amsgrad=options.amsgrad,
        maximize=options.maximize,
        capturable=capturable,
        **_KINDS[kind],
    )
    state = {"step": torch.tensor(float(setting.earlier), dtype=torch.float32)}
    for name in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if options.amsgrad else ())):
        state[name] = _tensor(setting.values[name], formats[name])
    optimizer.state[parameter] = state
    return optimizer


def _tensor(values: NDArray[np.float32], fmt: Format) -> torch.Tensor:
    return torch.from_numpy(values).to(DTYPES[fmt], copy=True)


def _patterns(tensor: torch.Tensor) -> NDArray[np.unsignedinteger]:
    wide = tensor.dtype == torch.float32
    bits = tensor.detach().view(torch.int32 if wide else torch.int16).numpy().copy()
    return bits.view(np.uint32 if wide else np.uint16)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    # MKL's first call in a process must not be one of many threads; `root` makes it.
    root()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _capturable_on_cpu() -> Any:
    """Let `capturable=True` through on CPU, whose kernels compute the same branches."""
    name = "torch.optim.adam._get_capturable_supported_devices"
    return mock.patch(name, lambda *_, **__: ["cpu"])


def variant(name: str, fmt: Format, *parts: str) -> Arithmetic | None:
    """Find the variant that is called by these parts; None where the catalogue has none for the format."""
    wanted = {part for part in parts if part}
    for arithmetic in VARIANTS[name]:
        called = {part for part in arithmetic.variant.split(", ") if part}
        if called == wanted and fmt in arithmetic.storages:
            return arithmetic
    return None


def _of(
    name: str,
    *parts: str,
    of_float32: str | None = None,
    single_roots: Callable[[Format], bool] = lambda fmt: fmt is FLOAT32,
) -> Callable[[Format], Arithmetic | None]:
    """Tell how to find the arithmetic of this machine.

    Args:
        name: of the arithmetic.
        parts: of its variant's name.
        of_float32: name of the arithmetic to take for float32 instead, which rounds likewise there.
        single_roots: tells for a format whether square roots are those of float32 tensors.
    """

    def arithmetic(fmt: Format) -> Arithmetic | None:
        mkl = single_roots(fmt) and root() == "mkl-amd"
        called = of_float32 if of_float32 and fmt is FLOAT32 else name
        return variant(called, fmt, *parts, "" if fuses() else UNFUSED, MKL_ROOT if mkl else "")

    return arithmetic


def _never(fmt: Format) -> bool:
    return False


def _master(kind: str) -> Callable[[Format], Arithmetic | None]:
    """Tell how to find the arithmetic of float32 weights, which is called by that of the weights."""

    def arithmetic(fmt: Format) -> Arithmetic | None:
        if fmt is FLOAT32 or not fuses():
            return None
        mkl = kind == "loop" and root() == "mkl-amd"
        usual = "" if kind == "loop" else f"torch-cpu-{kind}"
        return variant("float32-master", fmt, f"torch-cpu-{kind} ({MKL_ROOT})" if mkl else usual)

    return arithmetic


def _other_second(kind: str) -> Maker:
    """Keep second moments in another format than the weights: float32, or bfloat16 for float32 weights."""

    def make(setting: Setting) -> Run:
        second = BFLOAT16 if setting.storage is FLOAT32 else FLOAT32
        return take(setting, kind, second=second)

    find = _of(f"torch-cpu-{kind}", single_roots=lambda fmt: fmt is not FLOAT32)
    return Maker(make, find)


def _maker(arithmetic: Callable[[Format], Arithmetic | None], kind: str, **how: bool) -> Maker:
    return Maker(functools.partial(take, kind=kind, **how), arithmetic)


_LOOP, _FOREACH, _FUSED = "torch-cpu-loop", "torch-cpu-foreach", "torch-cpu-fused"
_KERNELS, _LISTS = "CPU kernels", "CPU kernels over lists"

# Bias corrections are float32 tensors, whatever the format of the weights.
_capturable = functools.partial(_of, "torch-capturable", single_roots=lambda fmt: True)

#: Every way in which torch takes a step of Adam on CPU.
MAKERS: dict[str, Maker] = {
    "loop": _maker(_of(_LOOP), "loop"),
    "loop, tensor rate": _maker(_of(_LOOP, TENSOR), "loop", tensor_rate=True),
    "foreach": _maker(_of(_FOREACH, of_float32=_LOOP), "foreach"),
    "fused": _maker(_of(_FUSED, single_roots=_never), "fused"),
    # The fused kernel takes the tensor's value as a double.
    "fused, tensor rate": _maker(_of(_FUSED, single_roots=_never), "fused", tensor_rate=True),
    "loop, other second moment": _other_second("loop"),
    "foreach, other second moment": _other_second("foreach"),
    "capturable loop": _maker(_capturable(_KERNELS), "loop", capturable=True),
    "capturable loop, tensor rate": _maker(
        _capturable(_KERNELS, TENSOR), "loop", capturable=True, tensor_rate=True
    ),
    "capturable foreach": _maker(_capturable(_LISTS), "foreach", capturable=True),
    "capturable foreach, tensor rate": _maker(
        _capturable(_LISTS, TENSOR), "foreach", capturable=True, tensor_rate=True
    ),
    "loop on a master": _maker(_master("loop"), "loop", master=True),
    "fused on a master": _maker(_master("fused"), "fused", master=True),
}
