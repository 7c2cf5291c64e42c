"""The arithmetics in NumPy, bit for bit: against torch on CPU, and those of CUDA against exact rational numbers."""

import dataclasses
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from jaxaudit.arithmetics import (
    CATALOGUE,
    VARIANTS,
    Options,
    chunk_tails,
    make_step,
    tail_elements,
)
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, FORMATS, decode, encode, round_to
from jaxaudit.hyperparameters import Hyperparameters, StepCount
from jaxaudit.operations import NumpyOperations, numpy_operations
from jaxaudit.scalars import scalars_of

torch = pytest.importorskip("torch")

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))  # from where Python imports them when they are run
random_runs, torch_runs = (importlib.import_module(name) for name in ("random_runs", "torch_runs"))

OPS = NumpyOperations()
ALL_FORMATS = tuple(FORMATS.values())
SIXTEEN_BITS = (BFLOAT16, FLOAT16)

#: Random runs of each kind; the two 16-bit formats share their arithmetics.
RECORDINGS = {BFLOAT16: 100, FLOAT16: 100, FLOAT32: 200}


def name_of(value):
    return getattr(value, "name", None) or str(value)


def hyperparameters(steps, **given):
    rates = np.full(steps, given.pop("lr", 1e-3)) if "rates" not in given else given.pop("rates")
    usual = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.0}
    return Hyperparameters(learning_rate=rates, **(usual | given))


def setting(fmt, size, steps, options=None, seed=0, **given):
    """A usual run: weights of 0.02, gradients of 1e-3, from the first step on."""
    rng = np.random.default_rng(seed)
    state = dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), np.zeros(size))
    values = state | {
        "param": 0.02 * rng.normal(size=size),
        "grad": 1e-3 * rng.normal(size=(steps, size)),
    }
    return random_runs.Setting(
        storage=fmt,
        hyperparameters=hyperparameters(steps, **given),
        options=options or Options(),
        values={name: value.astype(np.float32) for name, value in values.items()},
    )


# torch on CPU

MADE = [
    (name, fmt)
    for name, maker in torch_runs.MAKERS.items()
    for fmt in ALL_FORMATS
    if maker.arithmetic(fmt) is not None
]


@pytest.mark.parametrize(("name", "fmt"), MADE, ids=name_of)
def test_random_runs_agree_with_torch(name, fmt):
    """Every size up to 100 is among them, so every length of a vectorised loop's tail."""
    maker = torch_runs.MAKERS[name]
    arithmetic = maker.arithmetic(fmt)
    for number in range(RECORDINGS[fmt]):
        rng = np.random.default_rng([number, *name.encode()])
        given = random_runs.draw(rng, fmt, number, arithmetic)
        found = random_runs.compare(maker.make(given), arithmetic)
        assert found.agrees, (number, found, given.hyperparameters, given.options)


def test_every_cpu_arithmetic_of_torch_is_run():
    """What the catalogue has for kernels on CPU is what the makers replay, up to square root and build."""
    run = {torch_runs.MAKERS[name].arithmetic(fmt).label for name, fmt in MADE}
    other = (torch_runs.UNFUSED, torch_runs.MKL_ROOT)
    for name in ("torch-cpu-loop", "torch-cpu-foreach", "torch-cpu-fused", "torch-capturable"):
        for arithmetic in VARIANTS[name]:
            on_cpu = name != "torch-capturable" or "CPU kernels" in arithmetic.variant
            if on_cpu and not any(part in arithmetic.variant for part in other):
                mkl = dataclasses.replace(
                    arithmetic, variant=f"{arithmetic.variant}, {other[1]}".removeprefix(", ")
                )
                assert {arithmetic.label, mkl.label} & run


@pytest.fixture(scope="module")
def without_fma():
    """Compare the kernels that torch picks in a process of its own."""
    command = [sys.executable, str(SCRIPTS / "prove_arithmetics.py"), "--rows"]
    done = subprocess.run(
        [*command, "--recordings", "200", "--largest", "5000"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_builds_without_fused_multiply_add_agree_with_torch(without_fma):
    names = {"torch-cpu-loop", "torch-cpu-foreach", "torch-cpu-fused"}
    assert {row["arithmetic"] for row in without_fma} >= names
    for row in without_fma:
        assert torch_runs.UNFUSED in row["variant"] and row["recordings"] == 200
        assert not any(row["different"].values()), row
        assert set(row["different"]) == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "param"}
        assert all(n for name, n in row["recordings_with"].items() if "or more" not in name)


def test_the_proof_writes_what_it_found(tmp_path, monkeypatch, capsys):
    proof = importlib.import_module("prove_arithmetics")
    # The second process has its own test.
    monkeypatch.setattr(proof, "rows_without_fma", lambda arguments: [])
    output = tmp_path / "arithmetics.json"
    few = ["--recordings", "4", "--largest", "100", "--only", "fused on", "--output", str(output)]
    assert proof.main(few) == 0
    found = json.loads(output.read_text())
    assert found["agree"] and [row["format"] for row in found["compared"]] == [
        "bfloat16",
        "float16",
    ]
    for row in found["compared"]:
        assert row["arithmetic"] == "float32-master" and row["recordings"] == 4
        assert row["elements"] == sum(row["compared"].values()) > 0
    assert "fused on a master" in capsys.readouterr().out
    assert proof.main(few) == 2 and "exists already" in capsys.readouterr().err
    maker = torch_runs.MAKERS["fused on a master"]
    wrong = random_runs.Maker(maker.make, lambda fmt: CATALOGUE["float32-master"])
    monkeypatch.setattr(proof, "MAKERS", {"torch": {"fused on a master": wrong}})
    assert proof.main([*few, "--overwrite"]) == 1
    assert not json.loads(output.read_text())["agree"]


FMA = torch_runs.UNFUSED
WRONG = [
    ("loop", BFLOAT16, "torch-cpu-foreach", ""),
    ("loop", BFLOAT16, "torch-cpu-fused", ""),
    ("loop", FLOAT16, "torch-cuda-loop", ""),
    ("loop", FLOAT32, "torch-cuda-foreach", ""),
    ("loop", FLOAT32, "torch-cpu-loop", FMA),
    ("loop, tensor rate", FLOAT32, "torch-cpu-loop", ""),
    ("loop", FLOAT32, "torch-cpu-loop", torch_runs.TENSOR),
    ("foreach", BFLOAT16, "torch-cpu-loop", ""),
    ("fused", BFLOAT16, "torch-cpu-loop", ""),
    ("fused", FLOAT32, "torch-cpu-fused", FMA),
    ("fused", FLOAT32, "torch-cuda-fused", ""),
    ("capturable loop", FLOAT32, "torch-cpu-loop", ""),
    ("capturable loop", BFLOAT16, "torch-capturable", ""),
    ("capturable loop", FLOAT32, "torch-capturable", "CPU kernels over lists"),
    ("capturable foreach", FLOAT32, "torch-capturable", "CPU kernels"),
    ("loop on a master", BFLOAT16, "float32-master", "torch-cpu-fused"),
    ("fused on a master", BFLOAT16, "float32-master", ""),
]


@pytest.mark.parametrize(("name", "fmt", "other", "variant"), WRONG, ids=name_of)
def test_another_arithmetic_is_told_from_torch(name, fmt, other, variant):
    """The comparison is no formality: each of these is wrong in some bit of some usual run."""
    arithmetic = next(a for a in VARIANTS[other] if a.variant == variant)
    given = setting(fmt, 4007, 4, Options(decoupled=False), lr=0.1, beta2=0.95, weight_decay=0.1)
    run = torch_runs.MAKERS[name].make(given)
    assert random_runs.compare(run, torch_runs.MAKERS[name].arithmetic(fmt)).agrees
    assert not random_runs.compare(run, arithmetic).agrees


@pytest.mark.skipif(torch_runs.root() == "ieee", reason="torch's root is IEEE 754's here")
def test_the_square_root_can_be_told():
    given = setting(FLOAT32, 2003, 2)
    run = torch_runs.MAKERS["loop"].make(given)
    assert random_runs.compare(run, CATALOGUE["torch-cpu-loop"]).different["param"] > 0


THREADED = ["loop", "foreach", "capturable loop", "capturable foreach", "fused"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", THREADED)
@pytest.mark.parametrize("fmt", SIXTEEN_BITS, ids=name_of)
def test_threads_agree_with_torch(threads, name, fmt):
    """L2 decay in 16-bit formats depends on how a tensor is split between threads, except when fused."""
    maker = torch_runs.MAKERS[name]
    for size in (32767, 32768, 40009, 100_003):
        options = Options(decoupled=False, threads=threads)
        run = maker.make(setting(fmt, size, 1, options, weight_decay=0.1))
        arithmetic = maker.arithmetic(fmt)
        assert random_runs.compare(run, arithmetic).agrees, size
        other = random_runs.compare(run, arithmetic, threads=3 - threads)
        # 32,767 elements are not split, and both halves of 32,768 are whole vectors.
        assert other.agrees == (name == "fused" or size < 40_009), size


def test_chunk_tails_by_hand():
    def tails(size, threads, block=32):
        return np.flatnonzero(chunk_tails(np.arange(size), size, threads, block)).tolist()

    assert tails(31, 1) == list(range(31))
    assert tails(64, 2) == [] and tails(67, 2) == [64, 65, 66]
    # One element less than a grain is not split; from there on each thread has its own chunk and tail.
    assert tails(32767, 2) == list(range(32736, 32767))
    assert tails(32769, 2) == [*range(16384, 16385), *range(32769 - 16384 % 32, 32769)]
    assert tails(65_538, 8) == tails(65_538, 3)
    assert tails(35, 1, block=16) == [32, 33, 34]


def test_a_fused_kernel_leaves_the_end_of_the_tensor():
    fused = CATALOGUE["torch-cpu-fused"]
    for fmt, lanes in ((BFLOAT16, 16), (FLOAT16, 16), (FLOAT32, 8)):
        for size, threads in itertools.product((1, 7, 16, 77, 40_009), (1, 2)):
            found = tail_elements(fused, fmt, np.arange(size), size, threads)
            assert np.array_equal(np.flatnonzero(found), np.arange(size - size % lanes, size))


@pytest.mark.parametrize("decay", [0.2441704273224432, 1.9531548023224432])
def test_the_fused_kernel_fuses_the_factor_of_weight_decay(decay):
    """1 - lr*weight_decay is one operation in double: these products lie next to a midpoint of float32."""
    for name, seen in (("fused", True), ("loop", False)):
        parameter = torch.ones(64, requires_grad=True)
        parameter.grad = torch.zeros(64)
        how: dict[str, bool] = {"fused": True} if seen else {"foreach": False}
        torch.optim.AdamW([parameter], lr=1e-3, weight_decay=decay, **how).step()
        given = Hyperparameters(
            learning_rate=np.array([1e-3]),
            beta1=0.9,
            beta2=0.999,
            epsilon=1e-8,
            weight_decay=decay,
        )
        arithmetic = CATALOGUE[f"torch-cpu-{name}"]
        step = make_step(arithmetic, FLOAT32, given, Options())
        factor = scalars_of(step, arithmetic.rule, given, [1])["decay"]
        assert (parameter.detach().numpy() == factor).all()
        assert (factor == np.float32(1 - 1e-3 * decay)) != seen


@pytest.mark.parametrize("name", torch_runs.MAKERS)
def test_infinities_and_nans_agree_with_torch(name):
    """Every pair of weight and gradient, in whole vectors and in tails."""
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 3e38, 1.0]
    weight, gradient = np.array(list(itertools.product(special, repeat=2)) * 2, np.float32)[:-5].T
    maker = torch_runs.MAKERS[name]
    for fmt, decoupled, amsgrad in itertools.product(ALL_FORMATS, (True, False), (True, False)):
        if (arithmetic := maker.arithmetic(fmt)) is None:
            continue
        options = Options(decoupled=decoupled, amsgrad=amsgrad)
        given = setting(fmt, weight.size, 3, options, weight_decay=0.1)
        values = {"param": weight, "grad": np.stack([gradient, gradient, gradient[::-1]])}
        given = dataclasses.replace(given, values=dict(given.values) | values)
        found = random_runs.compare(maker.make(given), arithmetic)
        assert found.agrees, (fmt.name, options, found)


@pytest.mark.parametrize("name", ["loop on a master", "fused on a master"])
@pytest.mark.parametrize("fmt", SIXTEEN_BITS, ids=name_of)
def test_a_master_can_be_run_from_its_start(name, fmt):
    """What the recording does not hold is computed from its first weight on, and shows in its copies."""
    maker = torch_runs.MAKERS[name]
    given, arithmetic = setting(fmt, 333, 5, lr=0.01, weight_decay=0.1), maker.arithmetic(fmt)
    run = maker.make(given)
    step = make_step(arithmetic, fmt, given.hyperparameters, given.options)
    assert step.keeps_more
    scalars = scalars_of(step, arithmetic.rule, given.hyperparameters, range(1, 6))
    tail = tail_elements(arithmetic, FLOAT32, np.arange(333), 333, 1)
    recorded = run.inputs()
    state = {"param": recorded["param"][0]} | dict.fromkeys(
        ("exp_avg", "exp_avg_sq"), np.float32(0)
    )
    for k in range(5):
        at = {key: value[k] for key, value in scalars.items()}
        x = state | {"grad": recorded["grad"][k], "tail": tail}
        state = step.advance(OPS, at, x, {})
        copy = encode(recorded["new_param"][k], fmt)
        assert np.array_equal(encode(state["param"], fmt), copy)
    assert not np.array_equal(state["param"], round_to(state["param"], fmt))


# The formulas by themselves


def test_textbook_update_is_the_published_formula():
    """Algorithm 1 of Kingma and Ba in float32, from left to right, written out again with torch."""
    rng = np.random.default_rng(0)
    weight, first = (torch.from_numpy(rng.normal(size=999).astype(np.float32)) for _ in range(2))
    second = torch.from_numpy(rng.random(999).astype(np.float32))
    given = hyperparameters(1)
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
        arithmetic = CATALOGUE[name]
        step = make_step(arithmetic, BFLOAT16, given, Options())
        scalars = {k: v[0] for k, v in scalars_of(step, arithmetic.rule, given, [5]).items()}
        found = step.replay_recorded("param", OPS, scalars, values)
        assert np.array_equal(found, wanted.numpy()), name


def scalars_by_name(name, fmt, given, timesteps, variant=""):
    arithmetic = next(a for a in VARIANTS[name] if a.variant == variant)
    step = make_step(arithmetic, fmt, given, Options())
    return scalars_of(step, arithmetic.rule, given, timesteps)


def test_scalars_follow_python_doubles():
    given = hyperparameters(2, rates=np.array([3e-4, 1e-3]), beta2=0.95, weight_decay=0.1)
    scalars = scalars_by_name("torch-cpu-loop", BFLOAT16, given, [7, 8])
    assert scalars["step_size"][1] == np.float32(-(1e-3 / (1 - 0.9**8.0)))
    assert scalars["bias_correction2_sqrt"][0] == np.float32(math.sqrt(1 - 0.95**7.0))
    assert scalars["decay"][0] == np.float32(1 - 3e-4 * 0.1)
    assert scalars["exp_avg_weight"][0] == np.float32(1 - 0.9)
    assert scalars["epsilon"][0] == decode(encode(np.float32([1e-8]), BFLOAT16), BFLOAT16)[0]
    later = dataclasses.replace(given, count=StepCount(first=101))
    scalars = scalars_by_name("torch-cpu-loop", BFLOAT16, later, [1, 2])
    assert scalars["step_size"][1] == np.float32(-(1e-3 / (1 - 0.9**102.0)))


def test_scalars_over_lists_are_rounded_to_the_storage_format():
    given = hyperparameters(1, lr=0.1, weight_decay=0.1)
    scalars = scalars_by_name("torch-cpu-foreach", BFLOAT16, given, [1])
    assert scalars["beta2"][0] == 1.0 and scalars["decay"][0] == np.float32(0.98828125)
    assert scalars_by_name("torch-cpu-fused", BFLOAT16, given, [1])["epsilon"] == np.float32(1e-8)


def test_a_tensor_as_learning_rate_makes_float32_scalars():
    given = hyperparameters(1, lr=3.3e-4, weight_decay=0.037)
    found = scalars_by_name("torch-cpu-loop", FLOAT32, given, [3], torch_runs.TENSOR)
    rate = torch.tensor(3.3e-4)
    assert found["step_size"][0] == -(rate / (1 - 0.9**3.0)).numpy()
    assert found["decay"][0] == (1 - rate * 0.037).numpy()


EVERY = [arithmetic for variants in VARIANTS.values() for arithmetic in variants]


def cases(arithmetic):
    """Steps that options and formats make of an arithmetic, with their hyperparameters."""
    for fmt, decay in itertools.product(arithmetic.storages, ("none", *arithmetic.decays)):
        for beta1, amsgrad in ((0.9, False), (0.3, arithmetic.amsgrad)):
            weight_decay = 0.0 if decay == "none" else 0.37
            given = hyperparameters(
                3, lr=0.1, beta1=beta1, beta2=0.95, epsilon=1e-5, weight_decay=weight_decay
            )
            options = Options(decoupled=decay == "decoupled", amsgrad=amsgrad)
            yield make_step(arithmetic, fmt, given, options), given


def tensors_of(step, size=1000):
    """Random values of what any formula reads; half of the elements are in the tail."""
    rng = np.random.default_rng(5)
    scale = {"param": 0.1, "exp_avg": 1e-2, "compensation": 1e-5}
    found = {"tail": rng.integers(0, 2, size).astype(np.uint8)}
    found["grad"] = round_to((1e-2 * rng.normal(size=size)).astype(np.float32), step.storage)
    for name in step.state:
        for key in (name, f"new_{name}"):
            values = scale.get(name, 1) * rng.normal(size=size)
            values = 1e-4 * values**2 if name.endswith("_sq") else values
            found[key] = round_to(values.astype(np.float32), step.format_of(name))
    return found


def results(step, arithmetic, given, names=None, x=None, timestep=2):
    """Compute tensors of the state from random ones, as float32 patterns."""
    scalars = scalars_of(step, arithmetic.rule, given, [1, 2, 3])
    at = {name: value[timestep] for name, value in scalars.items()}
    ops = numpy_operations(flushes=step.flushes)
    x = tensors_of(step) if x is None else x
    with np.errstate(all="ignore"):
        found = {n: step.replay(n, ops, at, x) for n in names or step.state}
    return {name: value.view(np.uint32) for name, value in found.items()}


@pytest.mark.parametrize("arithmetic", EVERY, ids=lambda a: a.label)
def test_every_point_is_one(arithmetic):
    """To round or fuse otherwise at any of its points shows in a tensor's bits.

    A fusion shows in float32, where no rounding to 16 bits follows. Left out is which of two products in
    double is fused, which one float32 in 2^29 tells.
    """
    for step, given in cases(arithmetic):
        for name in step.state:
            usual = results(step, arithmetic, given, [name])[name]
            for point in step.points(name):
                fusion = point.startswith("fusion")
                if fusion != (step.format_of(name) is FLOAT32) or "other product" in point:
                    continue
                other = dataclasses.replace(step, altered=step.altered ^ {point})
                changed = results(other, arithmetic, given, [name])[name]
                shows = not np.array_equal(changed, usual)
                if "compiled, first moment in float32" in arithmetic.variant:
                    shows |= point in WITHOUT_EPSILON
                assert shows or (name, point) in ROUNDED_ANYWAY, (step.storage, step.decay, point)


#: Points at which what is returned is rounded: it is once more, when it is stored.
ROUNDED_ANYWAY = {
    ("param", "rounding of the new weight"),
    ("max_exp_avg_sq", "rounding of the corrected exp_avg_sq"),
}

#: Points of optax, compiled, that are for an epsilon of zero.
WITHOUT_EPSILON = {"rounding of the reciprocal root", "rounding of the quotient"}


@pytest.mark.parametrize("fmt", SIXTEEN_BITS, ids=name_of)
@pytest.mark.parametrize("decay", ["none", "decoupled", "l2"])
def test_the_loop_altered_everywhere_is_the_fused_kernel(fmt, decay):
    """They differ in where they round, and in nothing else: numbers are chosen that no format rounds."""
    weight_decay = 0.0 if decay == "none" else 0.125
    given = hyperparameters(3, lr=1e-2, beta2=0.95, epsilon=2.0**-12, weight_decay=weight_decay)
    options = Options(decoupled=decay == "decoupled")
    loop, fused = CATALOGUE["torch-cpu-loop"], CATALOGUE["torch-cpu-fused"]
    step = make_step(loop, fmt, given, options)
    rounded = {p for n in step.state for p in step.points(n) if p.startswith("rounding")}
    altered = dataclasses.replace(step, altered=frozenset(rounded), reads_stored=False)
    rest = make_step(fused, fmt, given, options)
    x = tensors_of(step) | {"tail": np.zeros(1000, np.uint8)}
    found, wanted = results(altered, loop, given, x=x), results(rest, fused, given, x=x)
    assert all(np.array_equal(found[name], wanted[name]) for name in step.state)
    usual = results(step, loop, given, x=x)
    assert not any(np.array_equal(usual[name], wanted[name]) for name in ("exp_avg_sq", "param"))


@pytest.mark.parametrize("arithmetic", EVERY, ids=lambda a: a.label)
def test_a_stripped_step_gives_the_same_results(arithmetic):
    for step, given in cases(arithmetic):
        whole = results(step, arithmetic, given)
        for name in step.state:
            stripped = step.stripped(name)
            part = results(stripped, arithmetic, given, [name], tensors_of(step))
            assert np.array_equal(part[name], whole[name])
            assert set(stripped.reads(name)) == set(step.reads(name))
            assert stripped.points(name) == step.points(name)


class Watched(dict):
    """Holds some tensors, notes which are read, and raises on any other."""

    def __init__(self, held):
        super().__init__(held)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("arithmetic", EVERY, ids=lambda a: a.label)
def test_a_step_reads_what_it_says(arithmetic):
    for step, given in cases(arithmetic):
        x = tensors_of(step)
        for name in step.state:
            names = {*step.reads(name), *(("tail",) if step.reads_tail(name) else ())}
            watched = Watched({key: x[key] for key in names})
            results(step, arithmetic, given, [name], watched)
            assert watched.read == names


# CUDA: what its kernels compute, stated once more in exact rational numbers

#: Bits of the significand, and exponent of the smallest normal number.
SHAPES = {BFLOAT16: (8, -126), FLOAT16: (11, -14), FLOAT32: (24, -126), float: (53, -1022)}


def rounded(value, fmt):
    """Round a rational number to nearest, ties to even; nothing here overflows."""
    if value == 0:
        return value
    digits, least = SHAPES[fmt]
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    spacing = Fraction(2) ** (max(exponent, least) - digits + 1)
    return round(value / spacing) * spacing


def single(value):
    return rounded(Fraction(value), FLOAT32)


def double(value):
    return rounded(Fraction(value), float)


def root(value):
    """Take the float32 root: 200 bits of it decide, with one more where something is left."""
    if value == 0:
        return value
    scaled = (value.numerator << 400) // value.denominator
    whole = math.isqrt(scaled)
    exact = whole * whole == scaled and (value.numerator << 400) % value.denominator == 0
    return single(Fraction(2 * whole + (not exact), 1 << 201))


def exact_operators(kind, x, t, given, options, store):
    """One element under kernels that round after each operator."""
    p, g, m, v, largest = (x[name] for name in ("param", "grad", *STATE))
    lr, wd = given.learning_rate[t - 1], given.weight_decay
    g = -g if options.maximize else g
    if wd and options.decoupled:
        p = store(single(p * single(1 - lr * wd)))
    elif wd:
        g = store(single(single(wd) * p + g))
    weight, change = single(1 - given.beta1), single(g - m)
    rest = single(1 - weight)
    m = store(single(weight * change + m if weight < 0.5 else -change * rest + g))
    v = store(single(v * single(given.beta2)))
    v = store(single(single(1 - given.beta2) * single(g * g) + v))
    largest = max(largest, v)
    divided = store(root(largest if options.amsgrad else v))
    p = store(EXACT_UPDATES[kind](p, m, divided, t, given, store))
    return dict(zip(("param", *STATE), (p, m, v, largest), strict=True))


def _update(p, m, divided, given, t, store):
    divisor = store(single(divided + single(given.epsilon)))
    size = single(-(given.learning_rate[t - 1] / (1 - given.beta1**t)))
    return single(size * single(m / divisor) + p)


def exact_loop(p, m, divided, t, given, store):
    inverse = single(1 / (1 - given.beta2**t) ** 0.5)
    return _update(p, m, store(single(divided * inverse)), given, t, store)


def exact_loop_single(p, m, divided, t, given, store):
    inverse = single(1 / single((1 - given.beta2**t) ** 0.5))
    return _update(p, m, store(single(divided * inverse)), given, t, store)


def exact_foreach(p, m, divided, t, given, store):
    correction = single((1 - given.beta2**t) ** 0.5)
    return _update(p, m, store(single(divided / correction)), given, t, store)


def _single_corrections(t, given):
    return (single(1 - single(single(beta) ** t)) for beta in (given.beta1, given.beta2))


def exact_capturable(p, m, divided, t, given, store):
    first, second = _single_corrections(t, given)
    size = -single(single(1 / first) * single(given.learning_rate[t - 1]))
    divisor = store(single(divided / store(single(root(second) * size))))
    epsilon = store(single(single(1 / size) * single(given.epsilon)))
    return single(p + single(m / store(single(divisor + epsilon))))


def exact_capturable_lists(p, m, divided, t, given, store):
    first, second = (-each for each in _single_corrections(t, given))
    size = single(1 / single(first / single(given.learning_rate[t - 1])))
    divisor = store(single(divided / store(root(-second))))
    divisor = store(single(divisor + single(given.epsilon)))
    return single(p + single(m / store(single(divisor / store(size)))))


STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
EXACT_UPDATES = {
    ("torch-cuda-loop", ""): exact_loop,
    ("torch-cuda-loop", "reciprocal in float32"): exact_loop_single,
    ("torch-cuda-foreach", ""): exact_foreach,
    ("torch-capturable", ""): exact_capturable,
    ("torch-capturable", "over lists"): exact_capturable_lists,
}


def exact_fused(kind, x, t, given, options, store):
    """One element under the fused kernel whose hyperparameters are float32."""
    p, g, m, v, largest = (x[name] for name in ("param", "grad", *STATE))
    numbers = (given.learning_rate[t - 1], given.beta1, given.beta2, given.weight_decay)
    lr, beta1, beta2, wd = (single(number) for number in numbers)
    g = -g if options.maximize else g
    if wd and options.decoupled:
        p = single(-single(lr * wd) * p + p)
    elif wd:
        g = single(p * wd + g)
    m = single(beta1 * m + single(-beta1 * g + g))
    square = single(g * g)
    v = single(beta2 * v + single(-beta2 * square + square))
    largest = max(largest, v)
    first, second = _single_corrections(t, given)
    divisor = single(root(largest if options.amsgrad else v) / root(second))
    divisor = single(divisor + single(given.epsilon))
    p = single(p - single(single(single(lr / first) * m) / divisor))
    after = (store(each) for each in (p, m, v, largest))
    return dict(zip(("param", *STATE), after, strict=True))


def exact_legacy(kind, x, t, given, options, store):
    """One element under the fused kernel that leaves hyperparameters in double."""
    p, g, m, v, largest = (x[name] for name in ("param", "grad", *STATE))
    lr, wd = given.learning_rate[t - 1], given.weight_decay
    beta1, beta2 = Fraction(given.beta1), Fraction(given.beta2)
    rest1, rest2 = Fraction(1 - given.beta1), Fraction(1 - given.beta2)
    g = -g if options.maximize else g
    if wd and options.decoupled:
        p = single(double(-Fraction(lr * wd) * p + p))
    elif wd:
        g = single(double(p * Fraction(wd) + g))
    scaled = double(rest2 * g)
    if kind[1]:
        m = single(double(beta1 * m + double(rest1 * g)))
        v = single(double(beta2 * v + double(scaled * g)))
    else:
        m = single(double(rest1 * g + double(beta1 * m)))
        v = single(double(scaled * g + double(beta2 * v)))
    largest = max(largest, v)
    correction = single((1 - given.beta2**t) ** 0.5)
    size = single(double(Fraction(lr) / single(1 - given.beta1**t)))
    divisor = single(root(largest if options.amsgrad else v) / correction)
    divisor = single(double(divisor + Fraction(given.epsilon)))
    p = single(p - single(single(size * m) / divisor))
    after = (store(each) for each in (p, m, v, largest))
    return dict(zip(("param", *STATE), after, strict=True))


EXACT_STEPS = dict.fromkeys(EXACT_UPDATES, exact_operators) | {
    ("torch-cuda-fused", ""): exact_fused,
    ("torch-cuda-fused-legacy", ""): exact_legacy,
    ("torch-cuda-fused-legacy", "other product fused"): exact_legacy,
}

EXACT_OPTIONS = {
    "no decay": (0.0, Options()),
    "decoupled": (0.037, Options(amsgrad=True)),
    "l2": (0.037, Options(decoupled=False, maximize=True)),
}


def free_run(arithmetic, fmt, given, options, values):
    """Run on its own results under the catalogue; yield the state after each step."""
    step = make_step(arithmetic, fmt, given, options)
    steps = len(values["grad"])
    scalars = scalars_of(step, arithmetic.rule, given, range(1, steps + 1))
    state = {"param": values["param"]} | dict.fromkeys(STATE, np.zeros_like(values["param"]))
    for k in range(steps):
        at = {name: value[k] for name, value in scalars.items()}
        x = state | {"grad": values["grad"][k], "tail": np.uint8(0)}
        state = step.advance(OPS, at, x, {})
        yield state


def exactly(kind, arithmetic, fmt, option):
    """Tell whether an arithmetic gives what is stated for a kind, over three steps on its own results.

    Gradients are of a scale at which float16 does not underflow, and steps are large, so that an ulp of the
    update shows in the weight.
    """
    weight_decay, options = EXACT_OPTIONS[option]
    given = hyperparameters(
        3,
        rates=np.array([0.5, 0.33, 0.07]),
        beta1=0.3 if option == "l2" else 0.9,
        beta2=0.95,
        epsilon=1e-5,
        weight_decay=weight_decay,
    )
    rng = np.random.default_rng(1)
    values = {"param": rng.normal(size=100), "grad": rng.normal(size=(3, 100))}
    values = {name: round_to(value.astype(np.float32), fmt) for name, value in values.items()}
    zero = dict.fromkeys(STATE, Fraction(0))
    state = [zero | {"param": Fraction(float(value))} for value in values["param"]]
    for t, found in enumerate(free_run(arithmetic, fmt, given, options, values), start=1):
        inputs = zip(state, values["grad"][t - 1].tolist(), strict=True)
        state = [
            EXACT_STEPS[kind](
                kind, x | {"grad": Fraction(g)}, t, given, options, lambda y: rounded(y, fmt)
            )
            for x, g in inputs
        ]
        for name, value in found.items():
            wanted = np.array([float(each[name]) for each in state], np.float32)
            if not np.array_equal(value, wanted):
                return False
    return True


def variant(name, called):
    return next(a for a in VARIANTS[name] if a.variant == called)


@pytest.mark.parametrize("kind", EXACT_STEPS, ids=", ".join)
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=name_of)
@pytest.mark.parametrize("option", EXACT_OPTIONS)
def test_cuda_arithmetics_are_what_they_say(kind, fmt, option):
    assert exactly(kind, variant(*kind), fmt, option)


def test_cuda_arithmetics_are_told_apart():
    """In float32; but which product in double is fused takes more than three hundred values to show."""
    kinds = [kind for kind in EXACT_STEPS if kind[1] != "other product fused"]
    for kind, other in itertools.pairwise([*kinds, kinds[0]]):
        assert not exactly(kind, variant(*other), FLOAT32, "no decay"), (kind, other)


def test_the_exact_statement_rounds_as_ieee_754():
    """Itself held against NumPy: conversion to each format, and roots."""
    rng = np.random.default_rng(2)
    values = rng.normal(size=500) * 10.0 ** rng.uniform(-45, 4, 500)
    for fmt in SHAPES:
        found = [float(rounded(Fraction(value), fmt)) for value in values.tolist()]
        if fmt is float:
            assert np.array_equal(found, values)
        elif fmt is FLOAT32:
            assert np.array_equal(found, values.astype(np.float32))
        else:
            narrow = values.astype(np.float32)
            found = [float(rounded(Fraction(float(value)), fmt)) for value in narrow]
            assert np.array_equal(found, round_to(narrow, fmt))
    positive = np.abs(values).astype(np.float32)
    assert np.array_equal([float(root(Fraction(float(v)))) for v in positive], np.sqrt(positive))
