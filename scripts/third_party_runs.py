"""Runs of Adam in other packages on CPU, for `random_runs`: optax, torch-optimi, torchao and AnyPrecisionAdamW.

The packages are optional: `MAKERS` has those that are installed, `MISSING` names the others.
"""

import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_runs
from numpy.typing import NDArray
from random_runs import LARGE, Maker, Run, Setting

from jaxaudit.arithmetics import Arithmetic, Options
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, Format, encode
from jaxaudit.hyperparameters import Hyperparameters

#: What a package holds, by our names.
Tensors = Mapping[str, Any]


def _take(
    setting: Setting,
    formats: Mapping[str, Format],
    patterns: Callable[[], dict[str, NDArray[np.unsignedinteger]]],
    step: Callable[[NDArray[np.float32], float], None],
) -> Run:
    """Take the steps of a setting, and note the bits of every tensor before them and after each.

    Args:
        setting: what to compute.
        formats: of the tensors.
        patterns: gives the present bits of the state.
        step: takes a gradient, not yet rounded, and a learning rate.
    """
    gradients, rates = setting.values["grad"], setting.hyperparameters.learning_rate.tolist()
    seen = [patterns()]
    for gradient, rate in zip(gradients, rates, strict=True):
        step(gradient, rate)
        seen.append(patterns())
    found = {name: np.stack([each[name] for each in seen]) for name in seen[0]}
    found["grad"] = encode(gradients, setting.storage)
    return Run(setting=setting, formats=formats, patterns=found)


def _formats(
    setting: Setting, first: Format | None = None, second: Format | None = None
) -> dict[str, Format]:
    """Name the formats of all tensors: the weight's where no other is given."""
    storage = setting.storage
    names = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "compensation")
    other = {"exp_avg": first or storage, "exp_avg_sq": second or storage}
    return dict.fromkeys(names, storage) | other


def _with_program(setting: Setting) -> Setting:
    """Give a setting the numbers that the compiled step for its size has as constants."""
    numbers, options = PROGRAMS[setting.size]
    rates = setting.hyperparameters.learning_rate
    given = dataclasses.replace(setting.hyperparameters, **numbers)
    threads = setting.options.threads
    return dataclasses.replace(
        setting,
        hyperparameters=dataclasses.replace(given, learning_rate=rates),
        options=dataclasses.replace(options, threads=threads),
    )


#: What steps that are compiled have as constants, by the size of the parameter, which is another. Not among them
#: are betas of 0.5, for which XLA adds before it multiplies, and a float32 epsilon of 0: the catalogue does not
#: state these.
PROGRAMS: dict[int, tuple[dict[str, float], Options]] = {
    97: (
        {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-5, "weight_decay": 0.1},
        Options(),
    ),
    31: (
        {"beta1": 0.3, "beta2": 0.45, "epsilon": 2.0**-20, "weight_decay": 0.5},
        Options(decoupled=False),
    ),
    1003: (
        {"beta1": 0.95, "beta2": 0.95, "epsilon": 1e-5, "weight_decay": 0.037},
        Options(decoupled=False, amsgrad=True),
    ),
    40009: (
        {"beta1": 0.8, "beta2": 0.99, "epsilon": 2.0**-20, "weight_decay": 0.0},
        Options(),
    ),
    64: (
        {"beta1": 0.6, "beta2": 0.9, "epsilon": 1e-5, "weight_decay": 3.0},
        Options(amsgrad=True),
    ),
}

# optax


def take_optax(
    setting: Setting,
    *,
    first: Format | None = None,
    compiled: bool = False,
    without_epsilon: bool = False,
    over_tree: bool = False,
) -> Run:
    """Take the steps of a setting with optax.

    Args:
        setting: what to compute.
        first: format of the first moment (`mu_dtype`), instead of that of the weights.
        compiled: the whole step is one program of `jax.jit`; numbers and options are those of `PROGRAMS`, and
            all steps have the learning rate of `RATE`.
        without_epsilon: it is one that rounds to zero in the format of the weights.
        over_tree: the weights are a tree of two arrays, the same twice.
    """
    if compiled:
        setting = _with_program(setting)
        rates = np.full(setting.steps, RATE)
        epsilon = setting.hyperparameters.epsilon
        if without_epsilon:
            epsilon = 1e-8 if setting.storage is FLOAT16 else 0.0
        given = dataclasses.replace(
            setting.hyperparameters, learning_rate=rates, epsilon=float(epsilon)
        )
        setting = dataclasses.replace(setting, hyperparameters=given)
    given, options = setting.hyperparameters, setting.options
    formats = _formats(setting, first)
    numbers = (given.beta1, given.beta2, given.epsilon, given.weight_decay)
    names = {"exp_avg": "mu", "exp_avg_sq": "nu"}
    names |= {"max_exp_avg_sq": "nu_max"} if options.amsgrad else {}

    def array(name: str) -> jax.Array:
        fmt = formats[name]
        return jnp.asarray(encode(setting.values[name], fmt).view(fmt.value_dtype))

    def tree(leaf: jax.Array) -> Any:
        return [leaf, leaf] if over_tree else leaf

    def moments(state: Any) -> Any:
        return next(x for x in jax.tree.leaves(state, is_leaf=_has_moments) if _has_moments(x))

    def started(part: Any) -> Any:
        if not _has_moments(part):
            return part
        count = jnp.asarray(setting.earlier, part.count.dtype)
        return part._replace(
            count=count, **{name: tree(array(ours)) for ours, name in names.items()}
        )

    def step_of(rate: float) -> Any:
        make = _compiled_optax if compiled else _optax
        return make(rate, *numbers, options.decoupled, options.amsgrad, first)

    def patterns() -> dict[str, NDArray[np.unsignedinteger]]:
        held = moments(now["state"])
        tensors = {ours: getattr(held, name) for ours, name in names.items()}
        tensors["param"] = now["param"]
        return {
            name: np.asarray(jax.tree.leaves(x)[0]).view(formats[name].pattern_dtype)
            for name, x in tensors.items()
        }

    def step(gradient: NDArray[np.float32], rate: float) -> None:
        narrow = encode(gradient, setting.storage).view(setting.storage.value_dtype)
        advance = step_of(rate)[1]
        now["param"], now["state"] = advance(now["param"], now["state"], tree(jnp.asarray(narrow)))

    with jax.default_device(jax.devices("cpu")[0]):
        weights = tree(array("param"))
        empty = step_of(float(given.learning_rate[0]))[0](weights)
        now = {"param": weights, "state": jax.tree.map(started, empty, is_leaf=_has_moments)}
        return _take(setting, formats, patterns, step)


#: Learning rate of all steps that optax compiles.
RATE = 3.3e-4


def _has_moments(part: Any) -> bool:
    return hasattr(part, "mu")


def _optax(
    rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    first: Format | None,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Make an optimizer's functions: one makes the state for weights, one takes a step."""
    import optax

    numbers = {"b1": beta1, "b2": beta2, "eps": epsilon, "mu_dtype": first and first.value_dtype}
    if weight_decay and decoupled and amsgrad:
        # There is no such optimizer; this is `adamw` with another first part.
        optimizer = optax.chain(
            optax.scale_by_amsgrad(**numbers),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(rate),
        )
    elif weight_decay and decoupled:
        optimizer = optax.adamw(rate, weight_decay=weight_decay, **numbers)
    else:
        optimizer = (optax.amsgrad if amsgrad else optax.adam)(rate, **numbers)
        if weight_decay:
            optimizer = optax.chain(optax.add_decayed_weights(weight_decay), optimizer)

    def advance(weights: Any, state: Any, gradients: Any) -> Any:
        change, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, change), state

    return optimizer.init, advance


@functools.cache
def _compiled_optax(*numbers: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    init, advance = _optax(*numbers)
    return init, jax.jit(advance)


# Optimizers on tensors of PyTorch


def _moments(setting: Setting, formats: Mapping[str, Format]) -> dict[str, Any]:
    """Make the moments before the first step."""
    names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if setting.options.amsgrad else ()))
    return {name: torch_runs._tensor(setting.values[name], formats[name]) for name in names}


def _take_torch(
    setting: Setting,
    formats: Mapping[str, Format],
    tensors: Callable[[], Tensors],
    step: Callable[[torch.Tensor, float], None],
) -> Run:
    """Take the steps of a setting.

    Args:
        setting: what to compute.
        formats: of the tensors.
        tensors: gives the present state.
        step: takes a gradient and a learning rate.
    """

    def patterns() -> dict[str, NDArray[np.unsignedinteger]]:
        found = {name: each for name, each in tensors().items() if isinstance(each, torch.Tensor)}
        return {name: torch_runs._patterns(tensor) for name, tensor in found.items()}

    def converted(gradient: NDArray[np.float32], rate: float) -> None:
        step(torch_runs._tensor(gradient, setting.storage), rate)

    with torch_runs._threads(setting.options.threads):
        return _take(setting, formats, patterns, converted)


def take_optimi(setting: Setting, *, kahan: bool, foreach: bool) -> Run:
    """Take the steps of a setting with torch-optimi.

    Args:
        setting: what to compute.
        kahan: sum with compensation, as it does by default where weights have 16 bits.
        foreach: over lists of tensors.
    """
    import optimi

    given, formats = setting.hyperparameters, _formats(setting)
    parameter = torch.nn.Parameter(torch_runs._tensor(setting.values["param"], setting.storage))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on options to come
        optimizer = (optimi.AdamW if setting.options.decoupled else optimi.Adam)(
            [parameter],
            lr=float(given.learning_rate[0]),
            betas=(given.beta1, given.beta2),
            eps=given.epsilon,
            weight_decay=given.weight_decay,
            kahan_sum=kahan,
            foreach=foreach,
            triton=False,
        )
    group = optimizer.param_groups[0]
    group |= {"setup": True, "step": torch.tensor(setting.earlier, dtype=torch.int32)}
    state = _moments(setting, formats)
    state["kahan_comp"] = torch.zeros_like(parameter.data) if kahan else None
    optimizer.state[parameter] = state

    def tensors() -> Tensors:
        found = {"compensation" if n == "kahan_comp" else n: x for n, x in state.items()}
        return found | {"param": parameter}

    def step(gradient: torch.Tensor, rate: float) -> None:
        parameter.grad, group["lr"] = gradient, rate
        optimizer.step()

    return _take_torch(setting, formats, tensors, step)


def take_torchao(setting: Setting, *, compiled: bool = False, stochastic: bool = False) -> Run:
    """Take the steps of a setting with torchao's optimizers, whose moments are not quantized here.

    Args:
        setting: what to compute.
        compiled: let it compile the step, as it does; numbers and options are then those of `PROGRAMS`.
        stochastic: round bfloat16 weights by chance (`bf16_stochastic_round`).
    """
    from torchao import optim

    if compiled:
        setting = _with_program(setting)
    given, formats = setting.hyperparameters, _formats(setting)
    parameter = torch.nn.Parameter(torch_runs._tensor(setting.values["param"], setting.storage))
    # Its 8-bit optimizers take moments as they find them.
    kind: Any = optim.AdamW8bit if setting.options.decoupled else optim.Adam8bit
    optimizer = kind(
        [parameter],
        lr=float(given.learning_rate[0]),
        betas=(given.beta1, given.beta2),
        eps=given.epsilon,
        weight_decay=given.weight_decay,
        amsgrad=setting.options.amsgrad,
        bf16_stochastic_round=stochastic,
    )
    state = _moments(setting, formats)
    optimizer.state[parameter] = state | {"step": torch.tensor(float(setting.earlier))}

    def tensors() -> Tensors:
        return state | {"param": parameter}

    def step(gradient: torch.Tensor, rate: float) -> None:
        parameter.grad = gradient
        optimizer.param_groups[0]["lr"].fill_(rate)
        optimizer.step()

    with (
        warnings.catch_warnings(),
        torch.compiler.set_stance("default" if compiled else "force_eager"),
    ):
        warnings.simplefilter("ignore")  # of the compiler's own making
        return _take_torch(setting, formats, tensors, step)


@dataclasses.dataclass
class AnyPrecisionAdamW:
    """AdamW whose moments and Kahan buffer have formats of their own, in PyTorch's operators.

    Written from the algorithm of torchdistx, which is not on a package index: moments and weights are each
    changed in place, in their own formats, and the bias corrections are float32 tensors.

    Attributes:
        weight: changed by every step.
        state: moments, and `compensation` for Kahan summation: what rounding the weight loses is kept, in the
            weight's dtype, and added to the next update.
        given: the numbers; not their learning rates.
        count: steps taken, a float32 tensor.
    """

    weight: torch.Tensor
    state: dict[str, torch.Tensor]
    given: Hyperparameters
    count: torch.Tensor

    @torch.no_grad()
    def step(self, gradient: torch.Tensor, rate: float) -> None:
        """Take a step."""
        given = self.given
        m, v, c = (self.state.get(name) for name in ("exp_avg", "exp_avg_sq", "compensation"))
        assert m is not None and v is not None
        self.count += 1
        if given.weight_decay:
            self.weight.mul_(1 - rate * given.weight_decay)
        m.mul_(given.beta1)
        m.add_(gradient, alpha=1 - given.beta1)
        v.mul_(given.beta2)
        v.addcmul_(gradient, gradient, value=1 - given.beta2)
        size: Any = rate / (1 - given.beta1**self.count)
        divisor = v.sqrt() / (1 - given.beta2**self.count) ** 0.5
        divisor.add_(given.epsilon)
        if c is None:
            self.weight.addcdiv_(m, divisor, value=-size)
            return
        c.addcdiv_(m, divisor, value=-size)
        before = self.weight.clone()
        self.weight.add_(c)
        c.add_(before - self.weight)


def take_anyprecision(
    setting: Setting,
    *,
    kahan: bool = False,
    first: Format | None = None,
    second: Format | None = None,
) -> Run:
    """Take the steps of a setting with our own `AnyPrecisionAdamW`.

    Args:
        setting: what to compute.
        kahan: sum with compensation.
        first: format of the first moment, instead of that of the weights.
        second: format of the second moment, likewise.
    """
    formats = _formats(setting, first, second)
    weight = torch_runs._tensor(setting.values["param"], setting.storage)
    state = _moments(setting, formats)
    if kahan:
        state["compensation"] = torch.zeros_like(weight)
    count = torch.tensor(float(setting.earlier))
    optimizer = AnyPrecisionAdamW(weight, state, setting.hyperparameters, count)
    return _take_torch(setting, formats, lambda: state | {"param": weight}, optimizer.step)


# Makers


def _always(fmt: Format) -> bool:
    return True


def _optax_maker(
    *parts: str,
    first: Format | None = None,
    compiled: bool = False,
    without_epsilon: bool = False,
    over_tree: bool = False,
) -> Maker:
    """Tell how optax is run, and which variant it is.

    Args:
        parts: of the variant's name, by the format of the first moment.
        first: format of the first moment.
        compiled: as one program.
        without_epsilon: it is zero.
        over_tree: the weights are a tree of two arrays.
    """

    def arithmetic(fmt: Format) -> Arithmetic | None:
        called = set(parts)
        if fmt is first:
            return None
        if compiled and (fmt is FLOAT32 or first):
            called |= {"compiled"}
        if (without_epsilon and fmt is FLOAT32) or (over_tree and fmt is FLOAT16):
            return None
        if without_epsilon and fmt is FLOAT16:
            # In bfloat16 it is like any other epsilon.
            called |= {"compiled", "epsilon of zero"}
        # What the processor's instructions are is no matter to XLA; once is enough.
        return torch_runs.variant("optax", fmt, *called) if torch_runs.fuses() else None

    how = {"first": first, "compiled": compiled, "without_epsilon": without_epsilon}
    how["over_tree"] = over_tree
    return Maker(functools.partial(take_optax, **how), arithmetic)


def _optimi_maker(kahan: bool, foreach: bool) -> Maker:
    parts = ("over lists" if foreach else "", "" if kahan else "without Kahan summation")
    make = functools.partial(take_optimi, kahan=kahan, foreach=foreach)
    return Maker(make, torch_runs._of("optimi-kahan", *parts))


def _anyprecision_maker(kahan: bool, **formats: Format) -> Maker:
    find = torch_runs._of("anyprecision", "Kahan summation" if kahan else "", single_roots=_always)

    def arithmetic(fmt: Format) -> Arithmetic | None:
        return None if formats and set(formats.values()) == {fmt} else find(fmt)

    return Maker(functools.partial(take_anyprecision, kahan=kahan, **formats), arithmetic)


_NARROW, _WIDE = "first moment in bfloat16", "first moment in float32"

_OPTAX = {
    "optax": _optax_maker(),
    "optax over a tree": _optax_maker("over a tree", over_tree=True),
    f"optax, {_NARROW}": _optax_maker(_NARROW, first=BFLOAT16),
    # A moment of more bits than the weights is no other variant.
    f"optax, {_WIDE}": _optax_maker(first=FLOAT32),
    "optax compiled": _optax_maker(compiled=True),
    "optax compiled, epsilon of zero": _optax_maker(compiled=True, without_epsilon=True),
    f"optax compiled, {_NARROW}": _optax_maker(_NARROW, first=BFLOAT16, compiled=True),
    f"optax compiled, {_WIDE}": _optax_maker(_WIDE, first=FLOAT32, compiled=True),
}

_OPTIMI = {
    "optimi": _optimi_maker(kahan=True, foreach=False),
    "optimi over lists": _optimi_maker(kahan=True, foreach=True),
    "optimi without Kahan": _optimi_maker(kahan=False, foreach=False),
    "optimi over lists, without Kahan": _optimi_maker(kahan=False, foreach=True),
}

_TORCHAO = {
    "torchao not compiled": Maker(
        take_torchao, torch_runs._of("torchao", "not compiled", single_roots=_always)
    ),
    "torchao compiled": Maker(
        functools.partial(take_torchao, compiled=True),
        torch_runs._of("torchao", single_roots=torch_runs._never),
    ),
}

_ANYPRECISION = {
    "anyprecision": _anyprecision_maker(kahan=False),
    "anyprecision, Kahan": _anyprecision_maker(kahan=True),
    "anyprecision, bfloat16 moments": _anyprecision_maker(
        kahan=False, first=BFLOAT16, second=BFLOAT16
    ),
    "anyprecision, float32 moments": _anyprecision_maker(
        kahan=False, first=FLOAT32, second=FLOAT32
    ),
    "anyprecision, mixed moments": _anyprecision_maker(kahan=False, first=FLOAT32, second=BFLOAT16),
    "anyprecision, Kahan, mixed moments": _anyprecision_maker(
        kahan=True, first=FLOAT32, second=BFLOAT16
    ),
}

#: Modules and makers of the packages, by name.
PACKAGES = {
    "optax": ("optax", _OPTAX),
    "torch-optimi": ("optimi", _OPTIMI),
    "torchao": ("torchao", _TORCHAO),
}

#: Packages that are not installed.
MISSING = [name for name, (module, _) in PACKAGES.items() if not importlib.util.find_spec(module)]

#: Every way in which they take a step of Adam on CPU, by what is run.
MAKERS: dict[str, dict[str, Maker]] = {
    f"{name} {metadata.version(name)}": makers
    for name, (_, makers) in PACKAGES.items()
    if name not in MISSING
} | {f"AnyPrecisionAdamW restated from torchdistx in {torch_runs.AGAINST}": _ANYPRECISION}

#: Sizes to run a maker with where each is compiled anew; any others otherwise. Of one element XLA makes other
#: programs, which divide where it multiplies by a reciprocal otherwise; the catalogue does not state them.
SIZES: dict[str, tuple[int, ...]] = {
    name: tuple(PROGRAMS) if "compiled" in name.split(",")[0] else (2, 31, 64, 97, 1003, LARGE[3])
    for name in _OPTAX
} | {"torchao compiled": tuple(PROGRAMS)}
