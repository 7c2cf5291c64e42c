"""Recordings of every k-th step: the recorded steps audit as in the full recording, and nothing crosses a gap."""

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from recordings import parse, write

import jaxaudit
from jaxaudit import gaps, history
from jaxaudit.auditing import audit_groups
from jaxaudit.byte_files import FileError
from jaxaudit.models.audits import audit_model
from jaxaudit.results import NOT_AUDITED

STEPS = 12

#: What looks at all later or earlier steps, and is told of the recorded ones alone.
_OF_RECORDED_STEPS = {("lattice", "settled_regime_count")}


def train(path: Path, every: int = 1, *, finish: bool = True, steps: int = STEPS) -> Path:
    """Train the same model; `odd` has a gradient in two of three steps, and is stepped in these alone."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"even": torch.nn.Linear(16, 12, bias=False), "odd": torch.nn.Linear(16, 12, bias=False)}
    ).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), foreach=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    recorder = jaxaudit.record(optimizer, path, model=model, every=every)
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 16, dtype=torch.bfloat16)
        loss = model["even"](x).square().mean()
        if step % 3 != 2:
            loss = loss + model["odd"](x).square().mean()
        loss.backward()
        recorder.note_loss(loss.item())
        optimizer.step()
        scheduler.step()
    if finish:
        recorder.close()
    else:
        recorder._detach()
        recorder._writer.release()
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("full") / "run")


@pytest.fixture(scope="module")
def third(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("third") / "run", 3)


@pytest.fixture(scope="module")
def growing(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("growing") / "run", 3, finish=False)


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("second") / "run", 2)


Audit = Callable[[Path, str], Mapping[str, xr.Dataset]]


@pytest.fixture(scope="module")
def audited() -> Audit:
    @functools.cache
    def audit(path: Path, name: str) -> Mapping[str, xr.Dataset]:
        with jaxaudit.open_recording(path, name) as recording:
            return audit_groups(  # windows of one step, so that programs are compiled once
                recording, arithmetics="torch-cpu-loop", backend="cpu", window_steps=1
            )

    return audit


# What is read.


@pytest.mark.parametrize("name", ["even", "odd"])
@pytest.mark.parametrize("folder", ["third", "growing", "second"])
def test_the_states_around_each_step(request, full, folder, name):
    """The states before and after a step, and its gradient, are those of the full recording."""
    path = request.getfixturevalue(folder)
    with (
        jaxaudit.open_recording(path, f"{name}.weight") as some,
        jaxaudit.open_recording(full, f"{name}.weight") as whole,
    ):
        assert some.gaps is not None and whole.gaps is None and 1 < some.steps < whole.steps
        span, names = (0, some.tokens), tuple(some.formats)
        windows = list(some.windows((1, some.steps + 1), 4, 3, names, held=some.steps * 4))
        assert sum(w.steps for w in windows if w.rows[0] == 0) == some.steps
        for k in range(1, some.steps + 1):
            own, theirs = some.at(k, span), whole.at(some.number_of(k), span)
            assert {*own.tensors} == {*theirs.tensors}
            for key, array in own.tensors.items():
                np.testing.assert_array_equal(array, theirs.tensors[key])
                parts = [w.tensors[key][: len(array)] for w in windows if w.first == k]
                np.testing.assert_array_equal(np.concatenate(parts, axis=1), array)
        numbers = [some.number_of(k + 1) for k in range(some.steps)]
        assert some.hyperparameters and whole.hyperparameters
        assert some.losses is not None and whole.losses is not None
        for own, theirs in (
            (some.hyperparameters.learning_rate, whole.hyperparameters.learning_rate),
            (some.losses, whole.losses.astype(np.float32)),
        ):
            np.testing.assert_array_equal(own, theirs[np.array(numbers) - 1])
        for k, number in enumerate(numbers, 1):
            assert some.hyperparameters.count.at(k) == whole.hyperparameters.count.at(number)
            assert some.timesteps[k] == whole.timesteps[number]


def test_own_count_of_a_parameter_that_was_left_alone_in_a_gap(third):
    with jaxaudit.open_recording(third, "odd.weight") as recording:
        assert recording.gaps is not None
        assert recording.timesteps[1:].tolist() == [1, 4, 7, 10]
        assert recording.gaps.numbers.tolist() == [1, 3, 5, 7]
    with jaxaudit.open_recording(third / "even.weight.safetensors") as recording:
        assert recording.gaps is not None and recording.gaps.numbers.tolist() == [1, 4, 7, 10]


def test_finished_and_growing_say_the_same(third, growing):
    for name in ("even.weight", "odd.weight"):
        with (
            jaxaudit.open_recording(third, name) as one,
            jaxaudit.open_recording(growing, name) as other,
        ):
            for field in ("before", "after", "numbers", "timesteps"):
                np.testing.assert_array_equal(getattr(one.gaps, field), getattr(other.gaps, field))
            assert one.coverage() == other.coverage()
            assert one.hyperparameters and other.hyperparameters
            rates = one.hyperparameters.learning_rate, other.hyperparameters.learning_rate
            np.testing.assert_array_equal(*rates)


def test_gap_after_a_single_step(tmp_path):
    """A recording of which only the first step is there has no gap yet, though a state after one may follow."""
    path = train(tmp_path / "run", 100)
    with jaxaudit.open_recording(path, "even.weight") as recording:
        assert recording.gaps is None and recording.steps == 1


# What is audited.


@pytest.mark.parametrize("name", ["even.weight", "odd.weight"])
@pytest.mark.parametrize("folder", ["third", "second"])
def test_same_numbers_as_the_full_recording(request, full, folder, name, audited):
    found, whole = audited(request.getfixturevalue(folder), name), audited(full, name)
    assert {*whole} - {*found} == {"counterfactual"}
    assert found[""].attrs["identified_arithmetic"] == whole[""].attrs["identified_arithmetic"]
    assert "torch-cpu-loop" in found[""].attrs["identified_arithmetic"]
    compared = 0
    for group, dataset in found.items():
        if group == "free_run":
            continue
        theirs = whole[group].sel(timestep=dataset.timestep.values)
        for variable, array in dataset.data_vars.items():
            if "timestep" not in array.dims or variable in history.HISTORY.get(group, ()):
                continue
            if (group, variable) in _OF_RECORDED_STEPS:
                continue
            assert array.dims == theirs[variable].dims
            np.testing.assert_array_equal(array.values, theirs[variable].values, str(variable))
            compared += 1
    assert compared > 40


def test_what_crosses_gaps_is_not_told(third, audited):
    found = audited(third, "even.weight")
    for group, names in history.HISTORY.items():
        for name in names:
            values = found[group][name].values
            none = np.isnan(values) if values.dtype.kind == "f" else values == NOT_AUDITED
            assert none.all(), name
    for name in ("mismatch_count", "max_ulp_distance", "first_divergence"):
        assert (found["free_run"][name] == NOT_AUDITED).all()
    assert np.isnan(found["free_run"].norm_divergence).all()
    assert found[""].attrs["gaps"].startswith("4 of 10 steps were recorded")
    assert "float32" not in found[""].attrs["verdict"]


def test_timesteps_are_those_of_the_run(third, full, tmp_path, audited):
    """A mismatch, and the last move of a row, are told at the timestep at which they were."""
    assert audited(third, "even.weight")["updates"].timestep.values.tolist() == [1, 4, 7, 10]
    path = shutil.copytree(third, tmp_path / "run") / "even.weight.safetensors"
    tensors, metadata = parse(path.read_bytes())
    tensors["W"][1][5, 3, 7] ^= 1  # after timestep 7
    write(path, tensors, metadata)
    with jaxaudit.open_recording(path) as recording:
        dataset = jaxaudit.audit(recording, arithmetics="torch-cpu-loop", backend="cpu")
    first = dataset.first_mismatch.sel(stage="param").isel(arithmetic=0)
    assert first.values[:3].tolist() == [7, 3, 7]
    assert dataset.audited.all() and int(dataset.mismatch_count.sel(token_group="all").sum()) == 1
    tokens = audited(third, "even.weight")["tokens"]
    assert set(tokens.last_early.values.tolist()) <= {0, 1, 4, 7, 10}
    assert (tokens.last_early > 0).any()
    with jaxaudit.open_recording(third, "odd.weight") as recording:
        part = jaxaudit.audit(recording, steps=(2, 6), arithmetics="torch-cpu-loop", backend="cpu")
        assert part.timestep.values.tolist() == [3, 5]
        with pytest.raises(ValueError, match="none of them was recorded"):
            jaxaudit.audit(recording, steps=(2, 3), backend="cpu")
        with pytest.raises(ValueError, match="which holds 1:8"):
            jaxaudit.audit(recording, steps=(2, 9), backend="cpu")


def test_step_counts_that_are_not_stated_are_found(third, tmp_path):
    """A resumed run that counts on where it was, as for recordings without gaps."""
    path = tmp_path / "run.safetensors"
    tensors, metadata = parse((third / "even.weight.safetensors").read_bytes())
    later = {k: (d, a[2:] if a.ndim > 1 else a) for k, (d, a) in tensors.items()}
    for name, (dtype, array) in later.items():
        if array.shape == tensors["W"][1].shape[:1]:
            later[name] = dtype, array[2:]
    later["num_steps"] = "I64", np.asarray(len(later["W"][1]) - 1, "<i8")
    given = json.loads(metadata["hyperparameters"])
    given["learning_rate"] = given["learning_rate"][2:]
    taken = [n - 3 for n in json.loads(metadata["timesteps"])[2:]]
    metadata = metadata | {"hyperparameters": json.dumps(given), "timesteps": json.dumps(taken)}
    del metadata["step_counts"]
    write(path, later, metadata)
    with jaxaudit.open_recording(path) as recording:
        assert recording.gaps is not None and recording.gaps.numbers.tolist() == [1, 4, 7]
        found = jaxaudit.identify(recording, backend="cpu")
    fitting = found.sel(arithmetic="torch-cpu-loop")
    assert fitting.fits and "counted from 4" in str(fitting.hyperparameters.values)


def test_wrong_weight_of_a_resumed_run_is_found(full, tmp_path):
    """No option is put forward of which the recording lacks the tensor, if the weights could not be looked at then."""
    tensors, metadata = parse((full / "even.weight.safetensors").read_bytes())
    later = {k: (d, a[1:] if a.ndim > 1 else a) for k, (d, a) in tensors.items() if a.ndim > 1}
    later["W"][1][4, 3, 7] ^= 1
    given = json.loads(metadata["hyperparameters"])
    given["learning_rate"] = given["learning_rate"][1:]
    metadata = metadata | {"hyperparameters": json.dumps(given), "first_step": "2"}
    with jaxaudit.open_recording(write(tmp_path / "run.safetensors", later, metadata)) as recording:
        dataset = jaxaudit.audit(recording, arithmetics="torch-cpu-loop", backend="cpu")
    assert dataset.audited.all() and (dataset.mismatch_count.sum("timestep") > 0).any()
    assert not dataset.attrs["identified_arithmetic"]


def test_clusters_are_looked_at_anew_after_a_gap(tmp_path):
    """Rows that became alike in a gap are counted though the step after it changed nothing."""
    rng = np.random.default_rng(3)
    start = rng.integers(0x3C00, 0x3F00, (12, 16), np.uint16)
    later = start.copy()
    later[1:] = start[0]
    w = np.stack([start, start, later, later])
    nothing = np.zeros_like(w)
    tensors = {"W": ("BF16", w), "grad_W": ("BF16", nothing)}
    tensors |= {key: ("BF16", nothing) for key in ("momentum_W", "variance_W")}
    given = {"learning_rate": 0.0, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0}
    metadata = {"hyperparameters": json.dumps(given), "timesteps": json.dumps([0, 1, 4, 5])}
    with jaxaudit.open_recording(write(tmp_path / "run", tensors, metadata)) as recording:
        found = audit_groups(recording, arithmetics="torch-cpu-loop", backend="cpu")
    assert found["tokens"].distinct_row_count.sel(token_group="all").values.tolist() == [12, 1]


# What is said.


def test_coverage(script, third, tmp_path, monkeypatch, capsys):
    run_audit = script("run_audit")
    with jaxaudit.open_recording(third, "even.weight") as recording:
        covered = recording.coverage()
    assert covered["param"] == "yes, at the recorded steps (4 of 10 steps were recorded)"
    assert covered["tokens"] == covered["exp_avg"] == covered["param"]
    for name in ("free_run", "counterfactual"):
        assert covered[name].startswith("no: 4 of 10 steps were recorded")
    monkeypatch.chdir(tmp_path)
    one = str(third / "even.weight.safetensors")
    arguments = ["--arithmetic", "torch-cpu-loop", "--quiet", "--report", "page.html"]
    assert run_audit.main([one, *arguments, "--plots", "figures", "--steps", "4:"]) == 0
    text = capsys.readouterr().out
    assert "Not covered: free_run, counterfactual (4 of 10 steps were recorded" in text
    assert "Covered in part: exp_avg, exp_avg_sq, param, updates, moments, lattice, tokens" in text
    assert "4 of 10 steps were recorded" in Path("page.html").read_text()
    with xr.open_dataset("results/even.weight.nc") as dataset:
        assert dataset.timestep.values.tolist() == [4, 7, 10]


def test_whole_model(script, third, full, tmp_path, monkeypatch, capsys):
    run_audit = script("run_audit")
    monkeypatch.chdir(tmp_path)
    model = jaxaudit.open_model(third)
    assert model.steps == 4 and model.timesteps.tolist() == [0, 1, 4, 7, 10]
    assert model.skipped_steps("odd.weight") == []
    arguments: Any = {"arithmetics": "torch-cpu-loop", "backend": "cpu", "ledger": None}
    whole = audit_model(jaxaudit.open_model(full), **arguments)[""]
    found = audit_model(model, **arguments)
    overview = found[""]
    assert overview.run_timestep.values.tolist() == [1, 4, 7, 10]
    assert overview.replays_exactly.values.tolist() == [1, 1]
    for name in ("mismatch_count", "norm_observed"):
        theirs = whole[name].sel(run_timestep=overview.run_timestep)
        np.testing.assert_array_equal(overview[name], theirs)
    assert found["parameters/odd.weight"].timestep.values.tolist() == [1, 3, 5, 7]
    command = [str(third), "--only", "accounting", "--arithmetic", "torch-cpu-loop", "--quiet"]
    assert run_audit.main([*command, "--steps", "2:8"]) == 0
    text = capsys.readouterr().out
    assert "timesteps 4 to 7" in text and "2 of the 4 timesteps were recorded" in text
    assert run_audit.main([*command, "--steps", "2:4", "--output", "none.nc"]) == 2
    assert "none of them was recorded" in capsys.readouterr().err


def test_compare_with_the_full_recording(third, second, full):
    """The common timesteps are laid upon each other, those of the gaps left out."""
    for name in ("even.weight", "odd.weight"):
        with (
            jaxaudit.open_recording(third, name) as a,
            jaxaudit.open_recording(full, name) as b,
            jaxaudit.open_recording(second, name) as c,
        ):
            dataset = jaxaudit.compare(a, b)
            np.testing.assert_array_equal(dataset.timestep, a.gaps.numbers if a.gaps else [])
            assert (
                not dataset.differing_count.any()
                and not (dataset.differing_count_at_start > 0).any()
            )
            both = jaxaudit.compare(c, a)
            common = np.intersect1d(c.gaps.numbers if c.gaps else [], dataset.timestep)
            np.testing.assert_array_equal(both.timestep, common)
            assert not both.differing_count.any()
            np.testing.assert_array_equal(
                both.norm, dataset.norm.sel(timestep=both.timestep, run=["a", "b"])
            )


# What is refused.


def refusal(path: Path, tensors: Any, metadata: Mapping[str, str]) -> str:
    with pytest.raises(FileError) as caught:
        jaxaudit.open_recording(write(path, tensors, metadata))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


def test_metadata_that_contradict_themselves(third, tmp_path):
    tensors, metadata = parse((third / "odd.weight.safetensors").read_bytes())
    path = tmp_path / "run.safetensors"
    taken = json.loads(metadata["timesteps"])
    counts = json.loads(metadata["step_counts"])

    def said(**changes: Any) -> str:
        return refusal(path, tensors, metadata | {k: json.dumps(v) for k, v in changes.items()})

    assert "needed 8 numbers that do not fall" in said(timesteps=taken[:-1])
    assert "needed 8 numbers that do not fall" in said(timesteps=taken[::-1])
    assert "row 3 of `W` has a learning rate" in said(timesteps=[0, 1, 3, 5, 6, 7, 9, 10])
    assert "has 7 numbers, needed 8" in said(step_counts=counts[:-1])
    assert "does not rise" in said(step_counts=[0, *counts[:-1]])
    assert "nothing to audit" in said(skipped_steps=[1, 3, 5, 7])


@pytest.mark.parametrize(
    ("line", "changes", "text"),
    [
        (3, {"optimizer_step": None}, "line 4 has `optimizer_step` None"),
        (2, {"optimizer_step": None}, "line 3 needs the numbers"),
        (2, {"optimizer_step": 0}, "line 3 has `optimizer_step` 0, after 1"),
        (3, {"optimizer_step": 9}, "line 4 has `optimizer_step` 9, after 3"),
        (3, {"optimizer_step": "4"}, "unusable `optimizer_step`"),
        (3, {"step_counts": [1]}, "unusable `optimizer_step` or `step_counts`"),
        (3, {"hyperparameters": 7}, "needs the numbers learning_rate"),
    ],
)
def test_lines_that_contradict_themselves(growing, tmp_path, line, changes, text):
    folder = shutil.copytree(growing, tmp_path / "run")
    lines = [json.loads(each) for each in (folder / "steps.jsonl").read_text().splitlines()]
    lines[line] = {k: v for k, v in (lines[line] | changes).items() if v is not None}
    (folder / "steps.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    with pytest.raises(FileError, match=text):
        jaxaudit.open_model(folder)


def test_a_state_without_a_step_needs_a_place(full, tmp_path):
    """Without `optimizer_step` every line is a step, as before."""
    folder = shutil.copytree(full, tmp_path / "run")
    lines = (folder / "steps.jsonl").read_text().splitlines()
    lines[4] = json.dumps(json.loads(lines[4]) | {"hyperparameters": None})
    (folder / "steps.jsonl").write_text("\n".join([*lines, ""]))
    with pytest.raises(FileError, match="line 5 needs the numbers"):
        jaxaudit.open_model(folder)


def test_metadata_of_ones_own_are_left_alone(full, tmp_path):
    """`timesteps` may be anybody's word: what is no list of counts says nothing of gaps."""
    tensors, metadata = parse((full / "even.weight.safetensors").read_bytes())
    for text in ("300", "[0.5]", "many", '["a"]'):
        path = write(tmp_path / "run.safetensors", tensors, metadata | {"timesteps": text})
        with jaxaudit.open_recording(path) as recording:
            assert recording.gaps is None and recording.steps == STEPS


def test_consecutive_steps_have_no_gaps():
    metadata = {"timesteps": "[3, 4, 5, 6]"}
    assert gaps.find(Path("run"), metadata, 4, 1) is None
