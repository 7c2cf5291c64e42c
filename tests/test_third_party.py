"""The catalogue's low-precision optimizers against the packages that they restate, bit for bit."""

import dataclasses
import functools
import importlib
import os
import shutil

import numpy as np
import pytest

import jaxaudit
from jaxaudit.arithmetics import VARIANTS, Options, make_step
from jaxaudit.floats import BFLOAT16, FLOAT32, FORMATS

pytest.importorskip("torch")

import runs  # after that, since it imports what imports torch  # noqa: E402
from runs import random_runs, torch_runs  # noqa: E402

third_party_runs = importlib.import_module("third_party_runs")

ALL_FORMATS = tuple(FORMATS.values())
MAKERS = {name: maker for each in third_party_runs.MAKERS.values() for name, maker in each.items()}
COMPILED = "torchao compiled"

#: Random runs of each kind; torchao compiles for seconds.
RECORDINGS = 30
RECORDINGS_COMPILED = 2

MADE = [
    (name, fmt)
    for name, maker in MAKERS.items()
    for fmt in ALL_FORMATS
    if maker.arithmetic(fmt) is not None
]


def name_of(value):
    return getattr(value, "name", None) or str(value)


def needs(*packages):
    missing = [name for name in packages if name in third_party_runs.MISSING]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="torch.compile needs a C++ compiler",
)


def variant(name, fmt, *parts):
    """Find a variant by the parts of its name, with the float32 square roots that torch takes here."""
    roots = torch_runs.MKL_ROOT if torch_runs.root() == "mkl-amd" else ""
    found = torch_runs.variant(name, fmt, *parts, roots) or torch_runs.variant(name, fmt, *parts)
    assert found is not None
    return found


def mismatches(run, arithmetic):
    """Count the elements of all tensors that come out differently."""
    return sum(random_runs.compare(run, arithmetic).different.values())


@pytest.mark.parametrize(
    ("name", "fmt"),
    [pytest.param(*each, marks=needs_compiler if each[0] == COMPILED else ()) for each in MADE],
    ids=name_of,
)
def test_random_runs_agree_with_the_package(name, fmt):
    maker, sizes = MAKERS[name], third_party_runs.SIZES.get(name)
    arithmetic = maker.arithmetic(fmt)
    for number in range(RECORDINGS_COMPILED if name == COMPILED else RECORDINGS):
        rng = np.random.default_rng([number, *name.encode()])
        size = sizes[number % len(sizes)] if sizes else None
        given = random_runs.draw(rng, fmt, number, arithmetic, size=size)
        run = maker.make(given)
        found = random_runs.compare(run, arithmetic)
        assert found.agrees, (number, found, run.setting.hyperparameters, run.setting.options)


def without_root(arithmetic):
    parts = {part for part in arithmetic.variant.split(", ") if part}
    return arithmetic.name, frozenset(parts - {torch_runs.MKL_ROOT})


@needs(*third_party_runs.PACKAGES)
def test_every_arithmetic_of_the_packages_is_run():
    """What the catalogue has for them is what the makers replay, up to the square root."""
    run = {without_root(MAKERS[name].arithmetic(fmt)) for name, fmt in MADE}
    for name in ("optax", "torchao", "optimi-kahan", "anyprecision"):
        for arithmetic in VARIANTS[name]:
            other = "with subnormal numbers" in arithmetic.variant  # of other devices
            assert other or without_root(arithmetic) in run, arithmetic.label


# optax


@needs("optax")
def test_a_compiled_step_of_optax_is_not_operator_by_operator():
    run = third_party_runs.take_optax(runs.setting(FLOAT32, 97), compiled=True)
    assert mismatches(run, variant("optax", FLOAT32, "compiled")) == 0
    assert mismatches(run, variant("optax", FLOAT32)) > 0


@needs("optax")
def test_xla_takes_subnormal_numbers_for_zero():
    given = runs.setting(BFLOAT16, 97)
    gradients = np.full_like(given.values["grad"], 3e-38)  # (1 - beta1) of it is subnormal
    given = dataclasses.replace(given, values=dict(given.values) | {"grad": gradients})
    run = third_party_runs.take_optax(given)
    assert mismatches(run, variant("optax", BFLOAT16)) == 0
    assert mismatches(run, variant("optax", BFLOAT16, "with subnormal numbers")) > 0


# On tensors of PyTorch


@needs("torch-optimi")
def test_optimi_in_chunks_of_several_threads():
    options = Options(decoupled=False, threads=2)
    given = runs.setting(BFLOAT16, 70_001, options=options, weight_decay=0.1)
    run = MAKERS["optimi"].make(given)
    arithmetic = MAKERS["optimi"].arithmetic(BFLOAT16)
    assert random_runs.compare(run, arithmetic).agrees
    assert not random_runs.compare(run, arithmetic, threads=1).agrees


def test_kahan_summation_matters():
    # Less than half of the distance to the neighbouring weight: one step alone is lost.
    given = runs.setting(BFLOAT16, 97, rate=5e-4)
    values = {"param": np.full(97, 0.3), "grad": np.ones((4, 97))}
    values = {name: value.astype(np.float32) for name, value in values.items()}
    given = dataclasses.replace(given, values=dict(given.values) | values)
    run = third_party_runs.take_anyprecision(given, kahan=True)
    with_it = variant("anyprecision", BFLOAT16, "Kahan summation")
    assert mismatches(run, with_it) == 0
    assert mismatches(run, variant("anyprecision", BFLOAT16)) > 0


@needs("torchao")
def test_torchao_rounds_up_or_down_by_chance():
    import torch

    torch.manual_seed(0)
    arithmetic = variant("stochastic-rounding", BFLOAT16, "not compiled")
    away, expected, variance = 0, 0.0, 0.0
    for size in range(3000, 3005):
        given = runs.setting(BFLOAT16, size, weight_decay=0.1)
        run = third_party_runs.take_torchao(given, stochastic=True)
        step = make_step(arithmetic, BFLOAT16, given.hyperparameters, given.options)
        exact = runs.replay(run, arithmetic, step).view(np.uint32)
        recorded = run.patterns["param"][1:]
        low, inner = exact & 0xFFFF, (exact >> 16).astype(np.uint16)
        outer = (recorded == inner + np.uint16(1)) & (low > 0)
        assert ((recorded == inner) | outer).all()
        share = low / 65536
        away += int(outer.sum())
        expected, variance = expected + share.sum(), variance + (share * (1 - share)).sum()
        different = random_runs.compare(run, arithmetic).different
        assert not different["exp_avg"] and not different["exp_avg_sq"]
    assert abs(away - expected) < 4 * variance**0.5


@needs("torchao")
@needs_compiler
def test_a_compiled_step_of_torchao_fuses_nothing():
    run = third_party_runs.take_torchao(runs.setting(FLOAT32, 97), compiled=True)
    assert mismatches(run, variant("torchao", FLOAT32)) == 0
    assert mismatches(run, variant("torchao", FLOAT32, "not compiled")) > 0


# All of them

SMALL = {
    "optax": ("optax", third_party_runs.take_optax, ()),
    "optimi-kahan": (
        "torch-optimi",
        functools.partial(third_party_runs.take_optimi, kahan=True, foreach=False),
        (),
    ),
    "anyprecision": (
        "",
        functools.partial(third_party_runs.take_anyprecision, first=FLOAT32, second=BFLOAT16),
        (),
    ),
    "torchao": ("torchao", third_party_runs.take_torchao, ("not compiled",)),
}


@pytest.fixture(params=[pytest.param(name, marks=needs(SMALL[name][0])) for name in SMALL])
def small(request):
    """A short run of each, of ordinary numbers."""
    _, take, parts = SMALL[request.param]
    rng = np.random.default_rng(12)
    given = runs.setting(BFLOAT16, 97, rates=np.linspace(1e-3, 3e-3, 4), weight_decay=0.1)
    values = {name: rng.normal(size=given.values[name].shape) for name in ("param", "grad")}
    values = {name: value.astype(np.float32) for name, value in values.items()}
    given = dataclasses.replace(given, values=dict(given.values) | values)
    found = variant(request.param, BFLOAT16, *parts)
    return take(given), found


def test_one_flipped_bit_is_one_mismatch(small):
    run, arithmetic = small
    assert mismatches(run, arithmetic) == 0
    flipped = run.patterns["param"].copy()
    flipped[-1, -1] ^= 1
    patterns = dict(run.patterns) | {"param": flipped}
    assert mismatches(dataclasses.replace(run, patterns=patterns), arithmetic) == 1


def test_identification_names_it_without_metadata(small, tmp_path):
    run, arithmetic = small
    fitting = runs.named(runs.identify(runs.save(tmp_path / "run.safetensors", run)))
    assert arithmetic.name in fitting
    assert "float32-then-bfloat16" not in fitting


def test_an_audit_on_the_device_finds_no_mismatch(small, tmp_path):
    run, arithmetic = small
    with jaxaudit.open_recording(runs.save(tmp_path / "run.safetensors", run)) as recording:
        dataset = jaxaudit.audit(recording, arithmetics=[arithmetic.name], backend="cpu")
    assert dataset.audited.values.all()
    assert not dataset.mismatch_count.values.any()
