"""Every form of recorder on a whole small model, audited to the bit; optax's own rules; the docs page."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
optax = pytest.importorskip("optax")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import jaxaudit  # noqa: E402
from jaxaudit.safetensors_file import SafetensorsFile  # noqa: E402

ROOT = Path(__file__).parents[1]
NUMBERS = {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture
def proof(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("prove_recorders")


@pytest.mark.long
@pytest.mark.parametrize("form", ["loop", "fused", "optax"])
def test_a_whole_model_replays_bit_for_bit(tmp_path, proof, form):
    """Some steps and some of the tensors; 200 steps of all of them in scripts/prove_recorders.py."""
    arithmetic, make = proof.FORMS[form]
    make(tmp_path / "run", 50)
    assert len(list((tmp_path / "run").glob("*.safetensors"))) >= 20
    found = proof.audit_folder(tmp_path / "run", arithmetic, every=12)
    assert len(found) >= 2 and set(found.values()) == {0}


#: What is run in a process of its own: transformers takes long to import, and brings warnings that are not ours.
PROGRAMS = {
    "page": "\n".join(
        re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "recording.md").read_text(), re.DOTALL)
    ),
    "trainer": """
import json, pathlib, prove_recorders as proof, jaxaudit
out = {}
for form in ("trainer-autocast", "trainer-bfloat16"):
    folder = pathlib.Path(form)
    proof.FORMS[form][1](folder, 5)
    with jaxaudit.open_recording(folder / "transformer.ln_f.weight.safetensors") as r:
        found = jaxaudit.identify(r, confirm=False)  # by all its elements, which are few
        ds = jaxaudit.audit(r, arithmetics="torch-cpu-fused")
        out[form] = [r.storage.name, found.arithmetic.values[found.fits.values == 1].tolist(),
            ds.attrs["state_precision"], bool((r.losses > 0).all()),
            proof.audit_folder(folder, "torch-cpu-fused", every=14) | {"ln_f": int(ds.mismatch_count.sum())}]
print(json.dumps(out))
""",
}
RUNNER = """
import contextlib, io, json, os, sys, traceback
told = {}
for name, program in json.load(sys.stdin).items():
    os.mkdir(os.path.join(sys.argv[1], name))
    os.chdir(os.path.join(sys.argv[1], name))
    printed, failed = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(program, name, "exec"), {"__name__": "__main__"})
    except BaseException:
        failed = traceback.format_exc()
    told[name] = printed.getvalue(), failed
print("RESULT" + json.dumps(told))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Run each program in a folder of its own; returns these, what was printed, and what was raised."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("programs")
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    run = subprocess.run(
        [sys.executable, "-c", RUNNER, str(folder)],
        input=json.dumps(PROGRAMS),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.split("RESULT")[1])
    return {name: (folder / name, *each) for name, each in told.items()}


@pytest.mark.long
def test_the_trainer_s_two_ways_to_bfloat16_are_told_apart(done):
    _, printed, failed = done["trainer"]
    assert not failed, failed
    found = json.loads(printed.splitlines()[-1])
    for form, storage in (("trainer-autocast", "float32"), ("trainer-bfloat16", "bfloat16")):
        stored, names, precision, losses, mismatches = found[form]
        assert stored == storage and f"exp_avg: {storage} as stored" in precision and losses
        assert "torch-cpu-fused" in names
        assert len(mismatches) == 3 and set(mismatches.values()) == {0}


def params_of(dtype="float32"):
    return {"a": [{"kernel": jnp.ones((3, 2), dtype)}], "b": jnp.zeros((2,), dtype)}


def train(transformation, params, steps: int, *, jitted: bool = False):
    """Take steps; returns the weights before and after each."""
    state, seen = transformation.init(params), [params]

    def step(params, state, grads):
        changes, state = transformation.update(grads, state, params)
        return optax.apply_updates(params, changes), state

    step = jax.jit(step) if jitted else step
    for number in range(steps):
        rng = np.random.default_rng(number)
        grads = jax.tree.map(
            lambda x, rng=rng: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params
        )
        params, state = step(params, state, grads)
        seen.append(params)
    return seen, state


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_optax_records_the_run_that_it_is_in(tmp_path, jitted):
    """The weights are those of the run, and the run is the one without a recorder."""
    recorded = jaxaudit.record_optax(
        optax.adamw(**NUMBERS), tmp_path / "run", hyperparameters=NUMBERS
    )
    seen, _ = train(recorded, params_of(), 4, jitted=jitted)
    assert recorded.steps == 3  # the last one waits for its weights
    recorded.close(seen[-1])
    assert recorded.steps == 4 and recorded.finished
    plain, _ = train(optax.adamw(**NUMBERS), params_of(), 4, jitted=jitted)
    with SafetensorsFile(tmp_path / "run" / "a.0.kernel.safetensors") as file:
        weights = file.read("W").view(np.float32)
        assert json.loads(file.metadata["hyperparameters"])["beta1"] == 0.9
        assert file.metadata["compiled"] == ("true" if jitted else "false")
    for tree in (seen, plain):
        np.testing.assert_array_equal(weights, np.stack([x["a"][0]["kernel"] for x in tree]))


def test_optax_without_the_last_weights_and_after_a_restart(tmp_path):
    recorded = jaxaudit.record_optax(
        optax.adam(1e-2), tmp_path / "1", hyperparameters=NUMBERS | {"weight_decay": 0.0}
    )
    seen, state = train(recorded, params_of(), 3)
    recorded.close()
    assert recorded.steps == 2
    with pytest.raises(ValueError, match="is closed"):
        recorded.update(seen[0], state, seen[0])
    resumed = jaxaudit.record_optax(
        optax.adam(1e-2), tmp_path / "2", hyperparameters=NUMBERS | {"weight_decay": 0.0}
    )
    for _ in range(3):
        changes, state = resumed.update(seen[0], state, seen[-1])
        seen.append(optax.apply_updates(seen[-1], changes))
    resumed.close(seen[-1])
    with SafetensorsFile(tmp_path / "2" / "b.safetensors") as file:
        assert file.metadata["first_step"] == "5" and int(file.read_floats("num_steps")) == 2


def test_optax_schedules_and_injected_numbers(tmp_path):
    schedule = optax.linear_schedule(1e-2, 0.0, 8)
    given = NUMBERS | {"learning_rate": schedule}
    runs = {
        "schedule": (optax.adamw(schedule, weight_decay=0.1), given),
        "injected": (optax.inject_hyperparams(optax.adamw)(**given), None),
    }
    for name, (inner, numbers) in runs.items():
        recorded = jaxaudit.record_optax(inner, tmp_path / name, hyperparameters=numbers)
        recorded.close(train(recorded, params_of(), 3)[0][-1])
        with jaxaudit.open_recording(tmp_path / name / "b.safetensors") as recording:
            assert recording.hyperparameters is not None
            rates = recording.hyperparameters.learning_rate
        expected = [float(np.asarray(schedule(jnp.asarray(t)))) for t in range(3)]
        np.testing.assert_array_equal(rates, expected)


def test_optax_refuses_what_it_cannot_record(tmp_path):
    def run(inner, **given):
        given = {"hyperparameters": NUMBERS} | given
        recorded = jaxaudit.record_optax(inner, tmp_path / "run", **given)
        train(recorded, params_of(), 1)

    clipped = optax.chain(optax.clip(1e-3), optax.adamw(**NUMBERS))
    two = optax.chain(optax.scale_by_adam(), optax.scale_by_adam())
    for inner, given, message in [
        (clipped, {}, "Wrap the Adam alone"),
        (optax.adamw(1e-2, b1=0.5), {}, "give the beta1 that it has"),
        (optax.sgd(1e-2), {}, "0 states of Adam"),
        (two, {}, "2 states of Adam"),
        (optax.adamw(1e-2), {"hyperparameters": None}, "optax hides them"),
        (optax.adamw(1e-2), {"hyperparameters": {"beta3": 1.0}}, "beta3"),
        (optax.adamw(1e-2), {"parameters": "nothing"}, "chooses nothing"),
        (optax.adamw(1e-2), {"parameters": ["c"]}, "no parameter is called 'c'"),
        (optax.adamw(1e-2), {"optimizer": "sgd"}, "'adamw'"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(inner, **given)
    recorded = jaxaudit.record_optax(optax.adam(1e-2), tmp_path / "run", hyperparameters=NUMBERS)
    with pytest.raises(ValueError, match="without params"):
        recorded.update(params_of(), recorded.init(params_of()))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError):
        jaxaudit.record_optax(optax.adam(1e-2), tmp_path / "file", hyperparameters=NUMBERS)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.long
def test_the_page_s_snippets_run(done):
    folder, printed, failed = done["page"]
    assert not failed, failed
    assert "torch-cpu-fused" in printed
    names = ["0.weight", "2.weight"]
    assert sorted(p.stem for p in (folder / "run").glob("*.safetensors")) == names
    assert len(list((folder / "trainer-run").glob("*.safetensors"))) == 3
    assert len(list((folder / "optax-run").glob("*.safetensors"))) == 2
