"""Identification from bits alone: real runs of torch without metadata, unknown options, effective hyperparameters."""

import dataclasses
import json
import re
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import runs  # noqa: E402  (needs torch)

import jaxaudit  # noqa: E402
from jaxaudit.accounting import Accountant  # noqa: E402
from jaxaudit.arithmetics import CATALOGUE, VARIANTS, Options, make_step  # noqa: E402
from jaxaudit.auditing import audit_groups  # noqa: E402
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, FORMATS, round_scalar  # noqa: E402
from jaxaudit.hyperparameters import StepCount  # noqa: E402
from jaxaudit.ledger.counterfactual import Counterfactual  # noqa: E402
from jaxaudit.safetensors_file import FileError  # noqa: E402
from jaxaudit.steps import STAGES  # noqa: E402

MOMENTS = ("momentum_W", "variance_W")
LOOP = CATALOGUE["torch-cpu-loop"]

#: Every way in which torch takes a step on CPU, with each format that the catalogue has it for.
MADE = [
    (name, fmt)
    for name, maker in runs.MAKERS.items()
    for fmt in FORMATS.values()
    if maker.arithmetic(fmt) is not None
]


def made(name, fmt, *arguments, **given):
    return runs.MAKERS[name].make(runs.setting(fmt, *arguments, **given))


@pytest.fixture
def identify(tmp_path):
    """Save a run and identify it."""

    def found(run, **how):
        return runs.identify(runs.save(tmp_path / "run.safetensors", run, **how))

    return found


def options_of(found, name):
    return json.loads(str(found.options.sel(arithmetic=name).values))


def used(found, name):
    return json.loads(str(found.hyperparameters.sel(arithmetic=name).values))


@pytest.mark.parametrize(("name", "fmt"), MADE, ids=lambda x: getattr(x, "name", x))
def test_every_arithmetic_of_torch_on_cpu(name, fmt, identify):
    number = MADE.index((name, fmt))
    options = Options(decoupled=number % 2 == 0, amsgrad=number % 3 == 0, maximize=number % 5 == 0)
    run = made(name, fmt, 300, 3, options, weight_decay=0.1)
    found = identify(run)
    truth = runs.MAKERS[name].arithmetic(fmt)
    assert truth.name in runs.named(found)
    chosen = options_of(found, truth.name)
    assert chosen["decoupled"] == options.decoupled and chosen["maximize"] == options.maximize
    assert chosen["amsgrad"] == options.amsgrad and used(found, truth.name) == {}
    best = found.sel(arithmetic=truth.name)
    assert (best.mismatch_count == 0).all() and (best.mismatch_share == 0).all()
    assert best.compared_count == 900 and best.confirmed == 0 and best.diagnosis == ""


@pytest.mark.parametrize(("name", "fmt"), [("loop", BFLOAT16), ("fused", FLOAT32)])
@pytest.mark.parametrize("recorded", [True, False])
def test_amsgrad_is_found_with_and_without_its_maxima(name, fmt, recorded, identify):
    """Gradients that fade make the largest second moment another one than the last."""
    setting = runs.setting(fmt, 300, 6, Options(amsgrad=True))
    faded = setting.values["grad"] * np.geomspace(1, 1e-2, 6)[:, None].astype(np.float32)
    setting = dataclasses.replace(setting, values=dict(setting.values) | {"grad": faded})
    found = identify(runs.MAKERS[name].make(setting), drop=() if recorded else ("max_variance_W",))
    truth = runs.MAKERS[name].arithmetic(fmt).name
    assert truth in runs.named(found) and options_of(found, truth)["amsgrad"]


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_threads_are_found_where_they_matter(threads, identify):
    """L2 decay in bfloat16 on more than 32,768 elements: each thread's chunk has a tail of its own."""
    options = Options(decoupled=False, threads=min(threads, 2))
    setting = runs.setting(BFLOAT16, 40_009, 2, options, weight_decay=0.3)
    found = identify(runs.MAKERS["loop"].make(setting))
    assert "torch-cpu-loop" in runs.named(found)
    assert options_of(found, "torch-cpu-loop")["threads"] == min(threads, 2)
    claim = {"num_threads": str(threads)}
    found = identify(runs.MAKERS["loop"].make(setting), metadata=claim)
    assert "torch-cpu-loop" in runs.named(found)  # 64 threads split 40,009 elements as 2 do


@pytest.mark.parametrize("name", ["loop", "foreach", "fused", "capturable loop"])
def test_weights_and_gradients_are_enough(name, identify):
    found = identify(made(name, BFLOAT16, 300, 4), drop=MOMENTS)
    truth = runs.MAKERS[name].arithmetic(BFLOAT16).name
    assert truth in runs.named(found)
    counts = found.mismatch_count.sel(arithmetic=truth)
    assert counts.values.tolist() == [-1, -1, 0]
    shares = found.mismatch_share.sel(arithmetic=truth, stage=["exp_avg", "exp_avg_sq"])
    assert shares.isnull().all()


@pytest.mark.parametrize("name", ["loop on a master", "fused on a master"])
@pytest.mark.parametrize("drop", [(), MOMENTS])
def test_master_of_which_the_copy_was_recorded(name, drop, identify):
    found = identify(made(name, BFLOAT16, 300, 5, weight_decay=0.1), drop=drop)
    assert "float32-master" in runs.named(found)
    assert used(found, "float32-master") == {}


def test_wrong_claims_are_not_believed(identify):
    run = made("foreach", BFLOAT16, 600, 4, Options(decoupled=False), weight_decay=0.1)
    claims = {
        "optimizer": "adamw",
        "implementation": "fused",
        "device": "cuda",
        "amsgrad": "true",
        "maximize": "true",
        "capturable": "true",
        "num_threads": "8",
    }
    for metadata in (claims, {**claims, "capturable": "false"}, None):
        found = identify(run, metadata=metadata)
        assert runs.named(found)[0] == "torch-cpu-foreach"
        chosen = options_of(found, "torch-cpu-foreach")
        assert not (chosen["decoupled"] or chosen["amsgrad"] or chosen["maximize"])


def test_claims_decide_between_what_fits(identify):
    """Where weights and gradients are zero all fit; the one that was claimed comes first."""
    setting = runs.setting(BFLOAT16, 40, 2)
    zeros = {name: 0 * value for name, value in setting.values.items()}
    run = runs.MAKERS["fused"].make(dataclasses.replace(setting, values=zeros))
    for implementation in ("fused", "foreach", "loop"):
        claims = {"device": "cuda", "implementation": implementation, "torch_version": "2.13.0"}
        found = identify(run, metadata=claims)
        assert len(runs.named(found)) > 3
        assert runs.named(found)[0] == f"torch-cuda-{implementation}"


def test_scalars_of_float32_become_doubles_again(tmp_path):
    """0.001, 0.95 and 1e-8 as float32 are other doubles; the step size shows which were used."""
    run = made("loop", FLOAT32, 300, 4, weight_decay=0.1, rate=1e-3)
    arrays = runs.prove.arrays_of(run)
    narrow = {k: x.astype(np.float32) for k, x in arrays.items() if not k.endswith("W")}
    path = runs.save(tmp_path / "run.safetensors", run, change=narrow)
    assert runs.MAKERS["loop"].arithmetic(FLOAT32).name in runs.named(runs.identify(path))


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT32])
def test_schedule_known_as_float32_only(fmt, tmp_path):
    rates = 3e-3 * (1 + np.cos(np.arange(6) / 7)) / 2
    assert (rates.astype(np.float32) != rates).all()
    run = made("loop", fmt, 400, 6, rates=rates, weight_decay=0.1)
    path = runs.save(tmp_path / "run.safetensors", run, rates=np.float32)
    assert "torch-cpu-loop" in runs.named(runs.identify(path))
    with jaxaudit.open_recording(path) as recording:
        found = jaxaudit.audit(recording, arithmetics="torch-cpu-loop", backend="cpu")
    assert (found.mismatch_count == 0).all()
    told = json.loads(found.attrs["arithmetics"])["torch-cpu-loop"]
    assert (told["uncertain_scalars_settled"] > 0) == (fmt is FLOAT32)


def test_the_ledger_takes_scalars_as_they_were_settled(tmp_path, monkeypatch):
    """Whichever thread is slower: the accounting, which settles them window by window, or the remedies."""
    rates = 3e-3 * (1 + np.cos(np.arange(6) / 7)) / 2
    run = made("loop", FLOAT32, 400, 6, rates=rates, weight_decay=0.1)
    path = runs.save(tmp_path / "run.safetensors", run, rates=np.float32)

    def taken(slow):
        with monkeypatch.context() as patch, jaxaudit.open_recording(path) as recording:
            work = getattr(*slow)
            patch.setattr(
                *slow, lambda *given, **named: (time.sleep(0.2), work(*given, **named))[1]
            )
            options = {"arithmetics": "torch-cpu-loop", "backend": "cpu", "window_steps": 3}
            return audit_groups(recording, **options)

    a, b = taken((Accountant, "account")), taken((Counterfactual, "take"))
    assert json.loads(a[""].attrs["arithmetics"])["torch-cpu-loop"]["uncertain_scalars_settled"]
    for group in ("updates", "moments", "counterfactual"):
        for name, variable in a[group].data_vars.items():
            assert variable.values.tobytes() == b[group][name].values.tobytes(), (group, name)


def numpy_run(count, steps=4, size=60, beta2=0.95, first=1, **given):
    """Take steps of torch's loop in NumPy with hyperparameters that torch's optimizers do not take."""
    setting = runs.setting(BFLOAT16, size, steps, first=first, **given)
    changed = dataclasses.replace(setting.hyperparameters, beta2=beta2, count=count)
    return runs.take(dataclasses.replace(setting, hyperparameters=changed), LOOP)


def test_stuck_step_counter(identify):
    found = identify(numpy_run(StepCount(limit=256), 300, 600, beta2=0.999))
    assert "torch-cpu-loop" in runs.named(found)
    assert used(found, "torch-cpu-loop") == {"step_count": "counted from 1, stuck at 256"}


def test_no_bias_correction(identify):
    found = identify(numpy_run(StepCount(corrects=False)))
    assert "torch-cpu-loop" in runs.named(found)
    assert used(found, "torch-cpu-loop") == {"step_count": "no bias correction"}


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT32])
def test_resumed_run(fmt, identify):
    """The recording starts anew at 1; the run was at 1,001."""
    run = made("loop", fmt, 600, 4, first=1001, beta2=0.999)
    found = identify(run)
    assert "torch-cpu-loop" in runs.named(found)
    told = used(found, "torch-cpu-loop")["step_count"]
    assert re.fullmatch(r"counted from [\d,]+", told)
    if fmt is FLOAT32:  # bfloat16's weights tell the count but roughly
        assert told == "counted from 1,001"
    assert used(identify(run, metadata={"first_step": "1001"}), "torch-cpu-loop") == {}


@pytest.mark.parametrize("beta2", [0.99, 0.996, 0.999])
def test_beta2_rounded_on_its_way(beta2, identify):
    rounded = float(round_scalar(beta2, BFLOAT16))
    assert rounded == {0.99: 0.98828125, 0.996: 0.99609375, 0.999: 1.0}[beta2]
    if rounded < 1:
        run = made("loop", BFLOAT16, 300, 4, beta2=rounded)
    else:  # torch refuses it; with a bias correction of zero the weights stay what they are
        setting = runs.setting(BFLOAT16, 300, 4)
        numbers = dataclasses.replace(setting.hyperparameters, beta2=rounded, corrected_beta2=beta2)
        run = runs.take(dataclasses.replace(setting, hyperparameters=numbers), LOOP)
    found = identify(run, beta2=beta2)
    assert "torch-cpu-loop" in runs.named(found)
    told = used(found, "torch-cpu-loop")
    assert told["beta2"] == rounded
    assert told.get("corrected_beta2") == (beta2 if rounded == 1 else None)


def test_audit_tells_what_was_stored_and_what_was_used(tmp_path):
    run = made("loop", BFLOAT16, 300, 4, beta2=0.98828125)
    path = runs.save(tmp_path / "run.safetensors", run, beta2=0.99)
    with jaxaudit.open_recording(path) as recording:
        found = jaxaudit.audit(recording, backend="cpu")
    assert "torch-cpu-loop" in found.attrs["identified_arithmetic"].split(",")
    assert json.loads(found.attrs["hyperparameters"])["beta2"]["value"] == 0.99
    told = json.loads(found.attrs["arithmetics"])["torch-cpu-loop"]
    assert told["hyperparameters"] == {"beta2": 0.98828125}
    said = "torch-cpu-loop is replayed with beta2 0.98828125 instead of the stored one."
    assert said in jaxaudit.describe(found)
    one = jaxaudit.summarize(found)["arithmetics"]["torch-cpu-loop"]
    assert one["hyperparameters"] == {"beta2": 0.98828125} and one["variant"] == ""


#: The others are in the sweep of `prove_identification.py`.
SPOILT = [(kind, BFLOAT16) for kind in runs.prove.SPOILT]
SPOILT += [("weights shuffled", FLOAT32), ("learning rate of 1.01 times", FLOAT16)]


@pytest.mark.parametrize(("kind", "fmt"), SPOILT, ids=lambda x: getattr(x, "name", x))
def test_nothing_is_named_where_no_adam_was(kind, fmt, identify):
    rng = np.random.default_rng(3)
    run = runs.MAKERS["loop"].make(runs.prove.usual(rng, fmt))
    arrays = runs.prove.arrays_of(run)
    spoilt = runs.prove.SPOILT[kind](dict(arrays), fmt, rng)
    found = identify(run, change=spoilt, drop=tuple(arrays.keys() - spoilt.keys()))
    assert runs.named(found) == []
    assert (found.confirmed == 0).all() and (found.diagnosis != "").all()
    share = found.mismatch_share.sum("stage") / found.mismatch_share.notnull().sum("stage")
    assert (share.diff("arithmetic") > -1e-12).all() and share[0] > 0


def test_gradient_descent_without_moments(identify):
    rng = np.random.default_rng(3)
    run = runs.MAKERS["loop"].make(runs.prove.usual(rng, BFLOAT16, 100, 2))
    spoilt = runs.prove.SPOILT["gradient descent with momentum"](runs.prove.arrays_of(run), BFLOAT16, rng)  # fmt: skip
    assert runs.named(identify(run, change=spoilt, drop=MOMENTS)) == []


def test_weights_alone_tell_nothing(tmp_path):
    run = made("loop", BFLOAT16, 20, 2)
    path = runs.save(tmp_path / "run.safetensors", run, drop=("grad_W", *MOMENTS))
    with pytest.raises(FileError, match="gradients"):
        runs.identify(path)


def test_what_tells_two_apart(identify):
    """The element that is named comes out differently when it is computed again."""
    run = made("loop", FLOAT16, 12, 2)
    found = identify(run)
    names = runs.named(found)
    assert len(names) > 1
    apart = found.told_apart_by.values
    assert (apart == apart.T).all() and all(apart[k, k] == "" for k in range(len(apart)))
    fits, told = found.fits.values == 1, 0
    assert all((apart[i, k] == "") == (i == k or not (fits[i] and fits[k])) for i in range(len(apart)) for k in range(len(apart)))  # fmt: skip
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            text = str(found.told_apart_by.sel(arithmetic=one, other=other).values)
            told += check_told(run, found, text, (one, other))
    assert told > 0


def check_told(run, found, text, names):
    """Parse an element that tells two arithmetics apart, and compute it under both."""
    if text == "no element was found that tells them apart":
        return 0
    pattern = (
        r"(\w+) at timestep (\d+) of an element with (.*): (\S+) under (\S+), (\S+) under (\S+)"
    )
    stage, timestep, inputs, a, one, b, other = re.fullmatch(pattern, text).groups()
    assert {one, other} == {*names}
    x = {k: np.float32(v) for k, v in (part.rsplit(" ", 1) for part in inputs.split(", "))}
    for name, value in ((one, np.float32(a)), (other, np.float32(b))):
        variant = options_of(found, name).pop("variant")
        arithmetic = next(v for v in VARIANTS[name] if v.variant == variant)
        options = Options(**{k: v for k, v in options_of(found, name).items() if k != "variant"})
        given = run.setting.hyperparameters
        step = make_step(arithmetic, run.setting.storage, given, options)
        if not {*step.reads(stage)} <= {*x}:
            continue  # the text tells what the first one reads
        assert runs.element(arithmetic, step, stage, given, int(timestep), x) == value
    assert np.float32(a) != np.float32(b)
    return 1


#: Each stage's points of torch's loop in bfloat16 with amsgrad and decoupled decay.
POINTS = [
    (stage, point)
    for stage in STAGES
    for point in make_step(LOOP, BFLOAT16, runs.numbers(3, weight_decay=0.1), Options()).points(
        stage
    )  # fmt: skip
]


@pytest.mark.parametrize(("stage", "point"), POINTS)
def test_diagnosis_names_what_was_altered(stage, point, identify):
    """One rounding or fusion the other way round, in NumPy; torch's CPU loop is the nearest arithmetic."""
    setting = runs.setting(BFLOAT16, 1000, 3, weight_decay=0.1, epsilon=1e-4, rate=0.02)
    step = make_step(LOOP, BFLOAT16, setting.hyperparameters, setting.options)
    altered = dataclasses.replace(step, altered=frozenset({point}))
    found = identify(runs.take(setting, LOOP, step=altered))
    ours = found.sel(arithmetic="torch-cpu-loop")
    if (
        ours.fits == 1
    ):  # an alteration that no element shows, or that a variant of the catalogue has
        assert options_of(found, "torch-cpu-loop")["variant"] or "fusion" in point
        return
    text = str(ours.diagnosis.values)
    start = rf"{stage} differs in [\d,]+ of 3,000 values; the other way round, the "
    assert re.match(start, text), text
    assert f"the {point} accounts for all of it" in text or not ours.mismatch_count.sum() > 20


def test_result_that_is_kept_has_no_miss():
    """What `prove_identification.py` found at length."""
    found = json.loads((runs.ROOT / "results/identification.json").read_text())
    assert found["agree"] and found["named"] == found["recordings"] > 100
    assert found["spoilt"] > 100 and found["spoilt_named"] == 0
    rows = {(row["made_by"], row["format"]) for row in found["identified"]}
    assert rows >= {(name, fmt.name) for name, fmt in MADE}
    assert {row["arithmetic"] for row in found["identified"]} >= {
        "torch-cpu-loop",
        "torch-cpu-foreach",
        "torch-cpu-fused",
        "torch-capturable",
        "float32-master",
    }
