"""The catalogue's low-precision optimizers against the packages that they restate, bit for bit.

Each case runs a package for a few steps on random tensors and replays every step in NumPy from the recorded state
before it. Gradients span many orders of magnitude, so that subnormal numbers, overflow and zeros occur.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import recordings

import jaxaudit
from jaxaudit import floats
from jaxaudit.arithmetics import (
    VARIANTS,
    Arithmetic,
    Options,
    depends_on_tail,
    make_step,
    tail_elements,
)
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, Format
from jaxaudit.hyperparameters import Hyperparameters
from jaxaudit.operations import numpy_operations
from jaxaudit.recording import TENSOR_KEYS
from jaxaudit.scalars import EXACT, Nudge, scalars_of
from jaxaudit.steps import Step

FORMATS = (BFLOAT16, FLOAT16, FLOAT32)
COUNT = 200
STEPS = 4

#: One, since XLA compiles for each; with elements beyond the last vector of ATen's loops.
SIZES = (97,)


@dataclasses.dataclass
class Run:
    """What a package computed: patterns (STEPS + 1, n) of each tensor, gradients (STEPS, n)."""

    given: Hyperparameters
    options: Options
    tensors: dict[str, np.ndarray]
    formats: dict[str, Format]

    @property
    def storage(self) -> Format:
        return self.formats["param"]


@dataclasses.dataclass(frozen=True)
class Draw:
    """A random run: numbers, weights before it, and gradients."""

    storage: Format
    given: Hyperparameters
    weights: np.ndarray
    gradients: np.ndarray
    random: np.random.Generator


def draws(seed: int, count: int = COUNT, sizes=SIZES, formats=FORMATS) -> Iterator[Draw]:
    random = np.random.default_rng(seed)
    for k in range(count):
        storage, size = formats[k % len(formats)], int(random.choice(sizes))
        rates = 10 ** random.uniform(-6, -1) * random.uniform(0.1, 1, STEPS)
        given = Hyperparameters(
            learning_rate=rates,
            beta1=float(random.choice([0.9, 0.3, 0.95])),
            beta2=float(random.choice([0.999, 0.95, 0.45])),
            epsilon=float(random.choice([1e-8, 1e-5, 1e-15])),
            weight_decay=float(random.choice([0.0, 0.1, 0.5])),
        )
        gradients = random.standard_normal((STEPS, size)) * 10 ** random.uniform(-30, 4, size)
        gradients[random.random(gradients.shape) < 0.05] = -0.0
        weights = random.standard_normal(size) * 10 ** random.uniform(-40, 0)
        with np.errstate(all="ignore"):
            kind = storage.value_dtype
            yield Draw(storage, given, weights.astype(kind), gradients.astype(kind), random)


def ordinary(draw: Draw) -> Draw:
    """Replace what was drawn by numbers of like sizes."""
    numbers = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
    given = dataclasses.replace(draw.given, learning_rate=np.linspace(1e-3, 3e-3, STEPS), **numbers)
    weights, gradients = (
        draw.random.standard_normal(values.shape).astype(values.dtype)
        for values in (draw.weights, draw.gradients)
    )
    return dataclasses.replace(draw, given=given, weights=weights, gradients=gradients)


def variant(name: str, *parts: str) -> Arithmetic:
    label = ", ".join(part for part in parts if part)
    return next(each for each in VARIANTS[name] if each.variant == label)


def step_of(run: Run, arithmetic: Arithmetic) -> Step:
    moments = run.formats["exp_avg"], run.formats["exp_avg_sq"]
    return make_step(arithmetic, run.storage, run.given, run.options, moments)


def replayed(run: Run, arithmetic: Arithmetic, name: str, nudge: Nudge = EXACT) -> np.ndarray:
    """Replay a tensor from the recorded state: float32 values (STEPS, n)."""
    step, x = step_of(run, arithmetic), {}
    for each, patterns in run.tensors.items():
        values = floats.decode(patterns, run.formats[each])
        x |= {"grad": values} if each == "grad" else {each: values[:-1], f"new_{each}": values[1:]}
    steps, size = x["grad"].shape
    x["tail"] = np.zeros(size, np.uint8)
    if depends_on_tail(arithmetic, step):
        within = np.arange(size)
        x["tail"] = tail_elements(arithmetic, run.storage, within, size, run.options.threads)
    scalars = scalars_of(step, arithmetic.rule, run.given, range(1, steps + 1), [nudge] * steps)
    columns = {key: value[:, None] for key, value in scalars.items()}
    with np.errstate(all="ignore"):
        ops = numpy_operations(flushes=step.flushes)
        return np.asarray(step.replay_recorded(name, ops, columns, x), np.float32)


def mismatches(run: Run, arithmetic: Arithmetic) -> int:
    """Count the elements of all tensors that come out differently."""
    return sum(_mismatches(run, arithmetic, name) for name in step_of(run, arithmetic).state)


def _mismatches(run: Run, arithmetic: Arithmetic, name: str) -> int:
    recorded = np.ascontiguousarray(floats.decode(run.tensors[name][1:], run.formats[name]))
    best = np.full(recorded.shape[0], recorded.shape[1])
    # Elsewhere the C library's powf may be another: each timestep counts under the best neighbour.
    for nudge in arithmetic.nudges(run.given):
        found = np.ascontiguousarray(replayed(run, arithmetic, name, nudge))
        wrong = floats.differ(found.view(np.uint32), recorded.view(np.uint32))
        best = np.minimum(best, wrong.sum(axis=1))
        if not best.any() or name in ("exp_avg", "exp_avg_sq"):
            break
    return int(best.sum())


def flipped(run: Run, name: str) -> Run:
    """Flip the lowest bit of the last value of a tensor."""
    tensors = {key: value.copy() for key, value in run.tensors.items()}
    tensors[name][-1, -1] ^= 1
    return dataclasses.replace(run, tensors=tensors)


def write(path, run: Run):
    """Write a run as a recording, without any claim in its metadata."""
    given, tensors = run.given, {}
    for name, patterns in run.tensors.items():
        if name == "grad":
            patterns = np.concatenate([np.zeros_like(patterns[:1]), patterns])
        tensors[TENSOR_KEYS[name]] = run.formats[name].safetensors, patterns
    rates = given.learning_rate
    tensors |= {
        "learning_rate": recordings.f64([rates[0], *rates]),
        "weight_decay": recordings.f64(given.weight_decay),
        "adam_beta1": recordings.f64(given.beta1),
        "adam_beta2": recordings.f64(given.beta2),
        "adam_epsilon": recordings.f64(given.epsilon),
        "num_steps": ("I64", np.asarray(rates.size, "<i8")),
    }
    return recordings.write(path, tensors)


# optax


def run_optax(
    draw: Draw, first: Format | None = None, decay: str = "decoupled", compiled: bool = False
) -> Run:
    import jax
    import jax.numpy as jnp

    optax = pytest.importorskip("optax")
    # A schedule of Python floats would be rounded to float16 once, a constant by way of float32.
    given = dataclasses.replace(
        draw.given, learning_rate=np.full(STEPS, draw.given.learning_rate[0])
    )
    if decay in ("none", "amsgrad"):
        given = dataclasses.replace(given, weight_decay=0.0)
    rate, kind = float(given.learning_rate[0]), first and first.value_dtype
    usual = {"b1": given.beta1, "b2": given.beta2, "eps": given.epsilon, "mu_dtype": kind}
    optimizer = {
        "none": lambda: optax.adam(rate, **usual),
        "decoupled": lambda: optax.adamw(rate, weight_decay=given.weight_decay, **usual),
        "l2": lambda: optax.chain(
            optax.add_decayed_weights(given.weight_decay), optax.adam(rate, **usual)
        ),
        "amsgrad": lambda: optax.amsgrad(rate, **usual),
    }[decay]()

    def advance(weights: Any, state: Any, gradients: Any) -> Any:
        change, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, change), state

    def moments(state: Any) -> Any:
        found = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu"))
        return next(x for x in found if hasattr(x, "mu"))

    advance = jax.jit(advance) if compiled else advance
    weights = jnp.asarray(draw.weights)
    state = optimizer.init(weights)
    rows: dict[str, list[Any]] = {"param": [], "exp_avg": [], "exp_avg_sq": []}
    if decay == "amsgrad":
        rows["max_exp_avg_sq"] = []
    for k in range(STEPS + 1):
        if k:
            weights, state = advance(weights, state, jnp.asarray(draw.gradients[k - 1]))
        held = moments(state)
        rows["param"].append(weights)
        rows["exp_avg"].append(held.mu)
        rows["exp_avg_sq"].append(held.nu)
        if decay == "amsgrad":
            rows["max_exp_avg_sq"].append(held.nu_max)
    tensors = {name: np.stack([np.asarray(x) for x in values]) for name, values in rows.items()}
    tensors["grad"] = draw.gradients
    options = Options(decoupled=decay != "l2", amsgrad=decay == "amsgrad")
    formats = dict.fromkeys(tensors, draw.storage) | {"exp_avg": first or draw.storage}
    patterns = {
        name: np.ascontiguousarray(x).view(formats[name].pattern_dtype)
        for name, x in tensors.items()
    }
    return Run(given, options, patterns, formats)


@pytest.fixture(autouse=True)
def on_the_cpu():
    import jax

    with jax.default_device(jax.devices("cpu")[0]):
        yield


DECAYS = ("none", "decoupled", "l2", "amsgrad")


def test_optax_operator_by_operator():
    wrong = 0
    for draw in draws(1):
        first = draw.random.choice([draw.storage.name, draw.storage.name, "float32", "bfloat16"])
        first = next(fmt for fmt in FORMATS if fmt.name == first)
        narrower = first is BFLOAT16 and draw.storage is not BFLOAT16
        run = run_optax(draw, first, str(draw.random.choice(DECAYS)))
        wrong += mismatches(run, variant("optax", "first moment in bfloat16" if narrower else ""))
    assert wrong == 0


def compiled_optax(storage: Format, first: Format, given: Hyperparameters) -> Arithmetic:
    """Say which variant a compiled step is."""
    if first is not storage:
        return variant("optax", "compiled", f"first moment in {first.name}")
    if storage is FLOAT32:
        return variant("optax", "compiled")
    vanishes = floats.round_scalar(given.epsilon, storage) == 0
    return variant("optax", *(("compiled", "epsilon of zero") if vanishes else ()))


@pytest.mark.parametrize(
    ("storage", "first"),
    [
        (BFLOAT16, BFLOAT16),
        (FLOAT16, FLOAT16),
        (FLOAT32, FLOAT32),
        (BFLOAT16, FLOAT32),
        (FLOAT32, BFLOAT16),
    ],
)
def test_optax_in_one_compiled_step(storage, first):
    for k, draw in enumerate(draws(2, 4, (97,), (storage,))):
        run = run_optax(draw, first, DECAYS[k], compiled=True)
        assert mismatches(run, compiled_optax(storage, first, run.given)) == 0


def test_a_compiled_step_of_optax_is_not_operator_by_operator():
    draw = next(draws(3, 1, (97,), (FLOAT32,)))
    draw = dataclasses.replace(
        draw, given=dataclasses.replace(draw.given, weight_decay=0.1, beta2=0.999)
    )
    run = run_optax(draw, compiled=True)
    assert mismatches(run, variant("optax", "compiled")) == 0
    assert mismatches(run, variant("optax")) > 0


def test_xla_takes_subnormal_numbers_for_zero():
    draw = next(draws(4, 1, (97,), (BFLOAT16,)))
    gradients = np.full_like(draw.gradients, 3e-38)  # (1 - beta1) of it is subnormal
    run = run_optax(dataclasses.replace(draw, gradients=gradients))
    assert mismatches(run, variant("optax")) == 0
    assert mismatches(run, variant("optax", "with subnormal numbers")) > 0


# PyTorch


@pytest.fixture
def library_root() -> str:
    """Name the variant whose square roots are those of the library that PyTorch calls here."""
    torch = pytest.importorskip("torch")
    x = torch.linspace(1, 4, 4096)
    exact = np.array_equal(torch.sqrt(x).numpy(), np.sqrt(x.numpy()))
    return "" if exact else "square root of MKL on AMD"


def run_torch(
    draw: Draw,
    options: Options,
    make: Callable[[Any], Any],
    names: Mapping[str, str],
    advance: Callable[[Any, Any, float], Any],
) -> Run:
    """Run an optimizer of PyTorch's kind.

    Args:
        draw: the run.
        options: the options.
        make: makes it for a parameter.
        names: of its state, by ours.
        advance: takes it, a gradient and a learning rate, and returns the state.
    """
    import torch

    parameter = torch.nn.Parameter(to_torch(draw.weights))
    optimizer = make(parameter)
    rows: dict[str, list[np.ndarray]] = {"param": [patterns(parameter)]}
    formats = {"param": draw.storage, "grad": draw.storage}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(options.threads)
        for gradient, rate in zip(draw.gradients, draw.given.learning_rate, strict=True):
            parameter.grad = to_torch(gradient)
            state = advance(optimizer, parameter, float(rate))
            rows["param"].append(patterns(parameter))
            for ours, theirs in names.items():
                if state.get(theirs) is None:
                    continue
                now = patterns(state[theirs])
                rows.setdefault(ours, [np.zeros_like(now)]).append(now)
                formats[ours] = format_of(state[theirs])
    finally:
        torch.set_num_threads(threads)
    tensors = {name: np.stack(values) for name, values in rows.items()}
    tensors["grad"] = draw.gradients.view(draw.storage.pattern_dtype)
    return Run(draw.given, options, tensors, formats)


def to_torch(values: np.ndarray) -> Any:
    import torch

    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(values.copy())


def format_of(tensor: Any) -> Format:
    return next(fmt for fmt in FORMATS if str(tensor.dtype) == f"torch.{fmt.name}")


def patterns(tensor: Any) -> np.ndarray:
    import torch

    fmt = format_of(tensor)
    raw = tensor.detach().view(torch.int16 if fmt.width == 16 else torch.int32)
    return raw.numpy().view(fmt.pattern_dtype).copy()


ADAM = {name: name for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}


def advance_optimizer(optimizer: Any, parameter: Any, rate: float) -> Any:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], float):
            group["lr"] = rate
        else:
            group["lr"].fill_(rate)
    optimizer.step()
    return optimizer.state[parameter]


# optimi


#: On sizes of weight decay, and on options to come.
IGNORED_ADVICE = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def run_optimi(draw: Draw, options: Options, kahan: bool | None, foreach: bool) -> Run:
    optimi = pytest.importorskip("optimi")
    given = draw.given
    kind = optimi.AdamW if options.decoupled else optimi.Adam

    def make(parameter: Any) -> Any:
        return kind(
            [parameter],
            lr=float(given.learning_rate[0]),
            betas=(given.beta1, given.beta2),
            eps=given.epsilon,
            weight_decay=given.weight_decay,
            kahan_sum=kahan,
            foreach=foreach,
            triton=False,
        )

    names = ADAM | {"compensation": "kahan_comp"}
    return run_torch(draw, options, make, names, advance_optimizer)


def optimi_variant(run: Run, foreach: bool, root: str) -> Arithmetic:
    return variant(
        "optimi-kahan",
        "over lists" if foreach else "",
        "" if "compensation" in run.tensors else "without Kahan summation",
        root if run.storage is FLOAT32 else "",
    )


@IGNORED_ADVICE
def test_optimi(library_root):
    wrong = 0
    for k, draw in enumerate(draws(5, sizes=(1, 31, 97, 500))):
        foreach, kahan = bool(k & 1), (None, False)[int(draw.random.integers(2))]
        options = Options(decoupled=bool(k & 2), threads=1 + (k >> 2 & 1))
        run = run_optimi(draw, options, kahan, foreach)
        wrong += mismatches(run, optimi_variant(run, foreach, library_root))
    assert wrong == 0


@IGNORED_ADVICE
def test_optimi_in_chunks_of_several_threads(library_root):
    draw = ordinary(next(draws(6, 1, (70_001,), (BFLOAT16,))))
    run = run_optimi(draw, Options(decoupled=False, threads=2), None, False)
    arithmetic = optimi_variant(run, False, library_root)
    assert mismatches(run, arithmetic) == 0
    other = dataclasses.replace(run, options=dataclasses.replace(run.options, threads=1))
    assert mismatches(other, arithmetic) > 0


# AnyPrecisionAdamW


def run_anyprecision(draw: Draw, first: Format, second: Format, kahan: bool) -> Run:
    torch = pytest.importorskip("torch")
    from anyprecision import AnyPrecisionAdamW

    given = draw.given

    def make(parameter: Any) -> AnyPrecisionAdamW:
        kinds = (getattr(torch, fmt.name) for fmt in (first, second))
        numbers = given.beta1, given.beta2, given.epsilon, given.weight_decay
        return AnyPrecisionAdamW(parameter.data, *numbers, *kinds, kahan)

    def advance(optimizer: AnyPrecisionAdamW, parameter: Any, rate: float) -> Any:
        optimizer.step(parameter.grad, rate)
        return optimizer.state

    names = ADAM | {"compensation": "compensation"}
    return run_torch(draw, Options(), make, names, advance)


def test_anyprecision(library_root):
    wrong = 0
    for k, draw in enumerate(draws(7, sizes=(1, 31, 97, 500))):
        kinds = [FORMATS[i] for i in draw.random.choice([0, 2], 2)]
        if k % 5 == 0:
            kinds = [draw.storage, draw.storage]
        kahan = draw.storage is not FLOAT32 and bool(draw.random.integers(2))
        run = run_anyprecision(draw, *kinds, kahan)
        parts = "Kahan summation" if kahan else "", library_root
        wrong += mismatches(run, variant("anyprecision", *parts))
    assert wrong == 0


def test_kahan_summation_matters(library_root):
    draw = next(draws(8, 1, (97,), (BFLOAT16,)))
    gradients = np.full_like(draw.gradients, 1.0)
    # Less than half of the distance to the neighbouring weight: one step alone is lost.
    given = dataclasses.replace(draw.given, learning_rate=np.full(STEPS, 5e-4), weight_decay=0.0)
    weights = np.full_like(draw.weights, 0.3)
    draw = dataclasses.replace(draw, given=given, gradients=gradients, weights=weights)
    run = run_anyprecision(draw, BFLOAT16, BFLOAT16, True)
    assert mismatches(run, variant("anyprecision", "Kahan summation", library_root)) == 0
    assert mismatches(run, variant("anyprecision", library_root)) > 0


# torchao


def run_torchao(
    draw: Draw, options: Options, stochastic: bool = False, compiled: bool = False
) -> Run:
    torch = pytest.importorskip("torch")
    optim = pytest.importorskip("torchao.optim")
    given = draw.given
    # Below 4096 elements its 8-bit optimizers keep ordinary moments.
    kind = optim.AdamW8bit if options.decoupled else optim.Adam8bit

    def make(parameter: Any) -> Any:
        return kind(
            [parameter],
            lr=float(given.learning_rate[0]),
            betas=(given.beta1, given.beta2),
            eps=given.epsilon,
            weight_decay=given.weight_decay,
            amsgrad=options.amsgrad,
            bf16_stochastic_round=stochastic,
        )

    with torch.compiler.set_stance("default" if compiled else "force_eager"):
        return run_torch(draw, options, make, ADAM, advance_optimizer)


def test_torchao_not_compiled(library_root):
    wrong, arithmetic = 0, variant("torchao", "not compiled", library_root)
    for k, draw in enumerate(draws(9, sizes=(1, 31, 97, 500))):
        options = Options(decoupled=bool(k & 1), amsgrad=k % 7 == 0)
        wrong += mismatches(run_torchao(draw, options), arithmetic)
    assert wrong == 0


def test_torchao_rounds_up_or_down_by_chance(library_root):
    import torch

    torch.manual_seed(0)
    arithmetic = variant("stochastic-rounding", "not compiled", library_root)
    away, expected, variance = 0, 0.0, 0.0
    for draw in draws(10, 5, (3000,), (BFLOAT16,)):
        run = run_torchao(draw, Options(), stochastic=True)
        exact = np.ascontiguousarray(replayed(run, arithmetic, "param")).view(np.uint32)
        recorded = run.tensors["param"][1:]
        low, inner = exact & 0xFFFF, (exact >> 16).astype(np.uint16)
        finite = (exact & 0x7FFFFFFF) < FLOAT32.infinity
        outer = (recorded == inner + np.uint16(1)) & (low > 0)
        assert ((recorded == inner) | outer)[finite].all()
        share = low[finite] / 65536
        away += int(outer[finite].sum())
        expected, variance = expected + share.sum(), variance + (share * (1 - share)).sum()
        moments = (_mismatches(run, arithmetic, name) for name in ("exp_avg", "exp_avg_sq"))
        assert sum(moments) == 0
    assert abs(away - expected) < 4 * variance**0.5


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="torch.compile needs a C++ compiler",
)
@pytest.mark.filterwarnings("ignore")  # of the compiler's own making
def test_torchao_compiled(library_root):
    first, *others = draws(11, 3, (97,), (FLOAT32,))
    # One set of numbers, since each is compiled into the program.
    same = [dataclasses.replace(draw, given=with_rates(first, draw)) for draw in (first, *others)]
    runs = [run_torchao(draw, Options(), compiled=True) for draw in same]
    assert sum(mismatches(run, variant("torchao")) for run in runs) == 0
    assert sum(mismatches(run, variant("torchao", "not compiled", library_root)) for run in runs)


def with_rates(first: Draw, draw: Draw) -> Hyperparameters:
    return dataclasses.replace(first.given, learning_rate=draw.given.learning_rate)


# All of them


@pytest.fixture(params=["optax", "optimi-kahan", "anyprecision", "torchao"])
def small(request, library_root) -> tuple[Run, Arithmetic]:
    """A short run of each, of ordinary numbers."""
    draw = ordinary(next(draws(12, 1, (97,), (BFLOAT16,))))
    return {
        "optax": lambda: (run_optax(draw), variant("optax")),
        "optimi-kahan": lambda: (
            run_optimi(draw, Options(), None, False),
            variant("optimi-kahan"),
        ),
        "anyprecision": lambda: (
            run_anyprecision(draw, FLOAT32, BFLOAT16, False),
            variant("anyprecision", library_root),
        ),
        "torchao": lambda: (
            run_torchao(draw, Options()),
            variant("torchao", "not compiled", library_root),
        ),
    }[request.param]()


@IGNORED_ADVICE
def test_one_flipped_bit_is_one_mismatch(small):
    run, arithmetic = small
    assert mismatches(run, arithmetic) == 0
    assert mismatches(flipped(run, "param"), arithmetic) == 1


@IGNORED_ADVICE
def test_identification_names_it_without_metadata(small, tmp_path):
    run, arithmetic = small
    with jaxaudit.open_recording(write(tmp_path / "run.safetensors", run)) as recording:
        ranked = jaxaudit.identify(recording, backend="cpu", confirm=False)
    fitting = ranked.arithmetic.values[ranked.fits.values == 1].tolist()
    assert arithmetic.name in fitting
    assert "float32-then-bfloat16" not in fitting


@IGNORED_ADVICE
def test_an_audit_on_the_device_finds_no_mismatch(small, tmp_path):
    run, arithmetic = small
    with jaxaudit.open_recording(write(tmp_path / "run.safetensors", run)) as recording:
        dataset = jaxaudit.audit(recording, arithmetics=[arithmetic.name], backend="cpu")
    assert dataset.audited.values.all()
    assert not dataset.mismatch_count.values.any()
