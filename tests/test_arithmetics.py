"""The formulas against torch itself, in NumPy: over seeds, sizes, threads, formats, options and scales."""

import itertools
import math

import numpy as np
import pytest

from jaxaudit.arithmetics import (
    CATALOGUE,
    STAGES,
    Options,
    make_step,
    ordinary,
    scalar_rule_elements,
    scalars_of,
)
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, FORMATS, decode, encode, is_nan
from jaxaudit.hyperparameters import Hyperparameters
from jaxaudit.operations import NumpyOperations

torch = pytest.importorskip("torch")

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OPS = NumpyOperations()


def float32_sqrt_is_ieee():
    """On AMD processors MKL's float32 square root is not correctly rounded; see docs of torch.sqrt."""
    x = np.linspace(1, 4, 4096, dtype=np.float32)
    return np.array_equal(torch.sqrt(torch.from_numpy(x)).numpy(), np.sqrt(x))


def patterns(tensor):
    kind = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    unsigned = np.uint32 if tensor.dtype == torch.float32 else np.uint16
    return tensor.detach().reshape(-1).contiguous().view(kind).numpy().copy().view(unsigned)


def tensor_of(values, fmt):
    return torch.from_numpy(np.asarray(values, np.float32)).to(TORCH[fmt.name])


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def run(fmt, size, steps, given, options, gradients, weights, amsgrad=False):
    """Take torch's steps; yield (t, state before, gradient, state after) as decoded values."""
    parameter = torch.nn.Parameter(tensor_of(weights, fmt))
    kind = torch.optim.AdamW if options.decoupled else torch.optim.Adam
    optimizer = kind(
        [parameter],
        lr=1.0,
        betas=(given.beta1, given.beta2),
        eps=given.epsilon,
        weight_decay=given.weight_decay,
        amsgrad=amsgrad,
        maximize=options.maximize,
        foreach=False,
    )
    zero = np.zeros(size, fmt.pattern_dtype)
    before = {"param": patterns(parameter), "exp_avg": zero, "exp_avg_sq": zero}
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = float(given.learning_rate[k])
        parameter.grad = tensor_of(gradients[k], fmt)
        gradient = patterns(parameter.grad)
        optimizer.step()
        state = optimizer.state[parameter]
        after = {name: patterns(state[name]) for name in ("exp_avg", "exp_avg_sq")}
        after["param"] = patterns(parameter)
        after["root of"] = patterns(state["max_exp_avg_sq"]) if amsgrad else after["exp_avg_sq"]
        yield k + 1, before, gradient, after
        before = after


def replay(step, stage, scalars, k, fmt, before, gradient, after, rule):
    values = {name: decode(before[name], fmt) for name in STAGES} | {
        "grad": decode(gradient, fmt),
        "new_exp_avg": decode(after["exp_avg"], fmt),
        "new_exp_avg_sq": decode(after["root of"], fmt),
        "scalar_rule": rule,
    }
    at = {name: value[k] for name, value in scalars.items()}
    with np.errstate(all="ignore"):
        return encode(step.replay(stage, OPS, at, values), fmt)


def differing(fmt, found, expected):
    return int(((found != expected) & ~(is_nan(found, fmt) & is_nan(expected, fmt))).sum())


def count(fmt, size, seed, *, steps=6, threads=1, scale=1e-3, amsgrad=False, **how):
    """Return the mismatches of each stage, teacher-forced against torch."""
    rng = np.random.default_rng(seed)
    given = Hyperparameters(
        learning_rate=how.get("rates", np.full(steps, how.get("lr", 1e-3))),
        beta1=how.get("beta1", 0.9),
        beta2=how.get("beta2", 0.999),
        epsilon=how.get("epsilon", 1e-8),
        weight_decay=how.get("weight_decay", 0.0),
    )
    options = Options(
        decoupled=how.get("decoupled", True), maximize=how.get("maximize", False), threads=threads
    )
    step = make_step(CATALOGUE["torch-cpu-loop"], fmt, given, options)
    scalars = scalars_of(step, given, range(1, steps + 1))
    rule = scalar_rule_elements(np.arange(size), size, threads)
    weights = rng.normal(size=size) * how.get("weight_scale", 0.02)
    gradients = rng.normal(size=(steps, size)) * scale * 10.0 ** rng.uniform(-3, 0, size)
    gradients[:, rng.random(size) < 0.05] = 0
    found = dict.fromkeys(STAGES, 0)
    for t, before, gradient, after in run(
        fmt, size, steps, given, options, gradients, weights, amsgrad
    ):
        for stage in STAGES:
            if stage == "param" and fmt is FLOAT32 and not float32_sqrt_is_ieee():
                continue
            got = replay(step, stage, scalars, t - 1, fmt, before, gradient, after, rule)
            found[stage] += differing(fmt, got, after[stage])
    return found


NOTHING = dict.fromkeys(STAGES, 0)
DECAYS = [
    {"weight_decay": 0.0},
    {"weight_decay": 0.1, "lr": 1e-2},
    {"weight_decay": 0.1, "decoupled": False},
]
SETTINGS = [
    {},
    {"lr": 0.1, "beta1": 0.8, "beta2": 0.95},
    {"beta1": 0.3, "epsilon": 1e-5},
    {"maximize": True, "amsgrad": True},
    {"rates": np.array([0.0, 1e-5, 3.3e-4, 1e-3, 7.1e-4, 1e-9])},
    {"beta2": 0.99, "epsilon": 1e-15, "weight_scale": 0.0},
]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("decay", DECAYS, ids=["none", "decoupled", "l2"])
def test_every_size_agrees_with_torch(fmt, decay):
    """Sizes that leave every length of vector tail, and both sides of the usual block lengths."""
    for size in [*range(1, 70), *range(121, 136), 255, 256, 257, 1025, 4999]:
        assert count(fmt, size, seed=size, steps=3, **decay) == NOTHING, size


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("decay", DECAYS, ids=["none", "decoupled", "l2"])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: ",".join(s) or "defaults")
def test_every_option_agrees_with_torch(fmt, decay, setting):
    for seed in range(5):
        assert count(fmt, 2003, seed, **(decay | setting)) == NOTHING, seed


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16, FLOAT32], ids=lambda f: f.name)
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-18, 1e-12, 1.0, 1e4])
def test_every_gradient_scale_agrees_with_torch(fmt, scale):
    """Down to subnormal second moments and products, up to overflow of float16."""
    for decay in DECAYS:
        assert count(fmt, 3001, seed=7, scale=scale, **decay) == NOTHING
        small = {"weight_scale": 1e-36, "epsilon": 0.0}
        assert count(fmt, 3001, seed=8, scale=scale, **(decay | small)) == NOTHING


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16], ids=lambda f: f.name)
@pytest.mark.parametrize("size", [32767, 32768, 40009, 100_003])
def test_threads_agree_with_torch(threads, fmt, size):
    """L2 decay in 16-bit formats depends on how a tensor is split between threads."""
    found = count(fmt, size, seed=3, steps=2, threads=threads, weight_decay=0.1, decoupled=False)
    assert found == NOTHING


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_the_thread_count_can_be_told(threads):
    """The rule is no decoration: with the wrong count some elements differ."""
    options = {"seed": 3, "steps": 2, "weight_decay": 0.1, "decoupled": False}
    assert count(BFLOAT16, 100_003, threads=1, **options) != NOTHING


def test_infinities_and_nans_agree_with_torch():
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38, 1.0], np.float32)
    grid = np.array(list(itertools.product(special, repeat=2)), np.float32)
    given = Hyperparameters(
        learning_rate=np.full(3, 1e-3), beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.1
    )
    for fmt, decoupled in itertools.product((BFLOAT16, FLOAT16), (True, False)):
        options = Options(decoupled=decoupled)
        step = make_step(CATALOGUE["torch-cpu-loop"], fmt, given, options)
        scalars = scalars_of(step, given, range(1, 4))
        rule = scalar_rule_elements(np.arange(len(grid)), len(grid), 1)
        gradients = np.stack([grid[:, 1], grid[:, 1], grid[::-1, 1]])
        for t, *state in run(fmt, len(grid), 3, given, options, gradients, grid[:, 0]):
            for stage in STAGES:
                got = replay(step, stage, scalars, t - 1, fmt, *state, rule)
                assert differing(fmt, got, state[2][stage]) == 0, (fmt.name, t, stage)


def test_textbook_update_is_the_published_formula():
    """Algorithm 1 of Kingma and Ba in float32, from left to right, written out again with torch."""
    rng = np.random.default_rng(0)
    weight, first = (torch.from_numpy(rng.normal(size=999).astype(np.float32)) for _ in range(2))
    second = torch.from_numpy(rng.random(999).astype(np.float32))
    given = Hyperparameters(
        learning_rate=np.array([1e-3]), beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0
    )
    corrected = second / (1 - 0.999**5)
    # torch's own float32 root is not IEEE on every processor; float64 rounded to float32 is.
    root = corrected.double().sqrt().float()
    expected = weight - (1e-3 * (first / (1 - 0.9**5))) / (root + 1e-8)
    values = {
        "param": weight.numpy(),
        "new_exp_avg": first.numpy(),
        "new_exp_avg_sq": second.numpy(),
    }
    for name, wanted in {
        "float32": expected,
        "float32-then-bfloat16": expected.to(torch.bfloat16).float(),
    }.items():
        step = make_step(CATALOGUE[name], BFLOAT16, given, Options())
        scalars = {k: v[0] for k, v in scalars_of(step, given, [5]).items()}
        assert np.array_equal(step.replay("param", OPS, scalars, values), wanted.numpy()), name


def test_scalars_follow_python_doubles():
    given = Hyperparameters(
        learning_rate=np.array([3e-4, 1e-3]), beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1
    )
    step = make_step(CATALOGUE["torch-cpu-loop"], BFLOAT16, given, Options())
    scalars = scalars_of(step, given, [7, 8])
    assert scalars["step_size"][1] == np.float32(-(1e-3 / (1 - 0.9**8.0)))
    assert scalars["bias_correction2_sqrt"][0] == np.float32(math.sqrt(1 - 0.95**7.0))
    assert scalars["decay"][0] == np.float32(1 - 3e-4 * 0.1)
    assert scalars["epsilon"][0] == decode(encode(np.float32([1e-8]), BFLOAT16), BFLOAT16)[0]
    assert ordinary(scalars)


@pytest.mark.parametrize(
    "change",
    [{"epsilon": 1e-15}, {"beta1": 0.0}, {"beta2": 0.0}, {"weight_decay": 1000.0}, {"lr": 1e-14}],
    ids=lambda c: next(iter(c)),
)
def test_extreme_scalars_are_not_ordinary(change):
    base = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.0, "lr": 1e-3}
    chosen = base | change
    rate = np.array([chosen.pop("lr")])
    given = Hyperparameters(learning_rate=rate, **chosen)
    step = make_step(CATALOGUE["torch-cpu-loop"], FLOAT32, given, Options())
    assert not ordinary(scalars_of(step, given, [3]))
