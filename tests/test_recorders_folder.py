"""Whole-model recordings: the folder, its crashes, and the recorder that hooks torch's optimizers."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxaudit.recorders import folders
from jaxaudit.recorders.folders import FolderWriter, ParameterLayout, encoded_name, finish
from jaxaudit.recorders.writing import RowLayout
from jaxaudit.safetensors_file import FileError, SafetensorsFile

torch = pytest.importorskip("torch")

import jaxaudit  # noqa: E402
from jaxaudit.recorders.hooks import record  # noqa: E402

GROUPS = [{"optimizer": "adamw"}]
NUMBERS = {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.0}


# --- the folder ---


def layouts_of(count: int = 2) -> list[ParameterLayout]:
    tensors = {"W": RowLayout("BF16", (3,)), "momentum_W": RowLayout("F32", (3,))}
    return [ParameterLayout(name=f"p.{i}", tensors=tensors, shape=(3,)) for i in range(count)]


def record_of(timestep: int, number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([timestep, number])
    return {
        "W": rng.integers(0, 1 << 16, 3).astype(np.uint16),
        "momentum_W": rng.standard_normal(3, np.float32),
    }


def append(writer: FolderWriter, **given) -> None:
    t = writer.timesteps
    numbers = [NUMBERS] if t else None
    records = (record_of(t, i) for i in range(len(writer.layouts)))
    writer.append(records, hyperparameters=numbers, **given)


def assert_holds(folder: Path, timesteps: int, count: int = 2) -> None:
    for number in range(count):
        with SafetensorsFile(folder / f"p.{number}.safetensors") as file:
            for name, dtype in (("W", np.uint16), ("momentum_W", np.uint32)):
                expected = [record_of(t, number)[name].view(dtype) for t in range(timesteps)]
                np.testing.assert_array_equal(file.read(name), np.stack(expected))
            assert int(file.read_floats("num_steps")) == timesteps - 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer.wte.weight", "transformer.wte.weight"),
        (".a/b é", "%2Ea%2Fb%20%C3%A9"),
        ("..", "%2E."),
        ("x" * 181, "x" * 150 + "~" + hashlib.sha256(b"x" * 181).hexdigest()[:16]),
    ],
)
def test_encoded_names(name, expected):
    assert encoded_name(name) == expected


@pytest.mark.parametrize("block", [1, 30, 1 << 25], ids=["huge records", "blocks", "all at once"])
def test_folder_round_trip(tmp_path, monkeypatch, block):
    monkeypatch.setattr(folders, "_BLOCK_BYTES", block)
    monkeypatch.setattr(folders, "_OPEN_FILES", 1)
    with FolderWriter(tmp_path / "run", layouts_of(3), groups=GROUPS) as writer:
        for _ in range(7):
            append(writer, loss=0.5)
        writer.note_loss(6, 0.25)
    assert_holds(tmp_path / "run", 7, 3)
    assert sorted(os.listdir(tmp_path / "run")) == sorted(
        ["recording.json", "steps.jsonl", *(f"p.{i}.safetensors" for i in range(3))]
    )
    index = json.loads((tmp_path / "run" / "recording.json").read_text())
    assert index["finished"] is True and index["parameters"][0]["record_bytes"] == 18
    with jaxaudit.open_recording(tmp_path / "run" / "p.0.safetensors") as recording:
        assert recording.losses is not None and list(recording.losses) == [0.5] * 5 + [0.25]
    assert finish(tmp_path / "run") == 6


@pytest.mark.parametrize("replaced", range(4))
def test_interrupted_finish_is_resumed(tmp_path, monkeypatch, replaced):
    writer = FolderWriter(tmp_path / "run", layouts_of(), groups=GROUPS)
    for _ in range(4):
        append(writer)
    calls, original = [], folders._assemble

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == replaced % 2 + 1:
            if replaced > 1:
                original(*arguments)  # renamed, but the growing file is still there
            raise KeyboardInterrupt
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "_assemble", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.close()
    assert not writer.finished
    assert finish(tmp_path / "run") == 3
    assert_holds(tmp_path / "run", 4)
    assert not list((tmp_path / "run").glob("*.growing"))


def test_torn_ends_are_left_out(tmp_path):
    writer = FolderWriter(tmp_path / "run", layouts_of(), groups=GROUPS)
    for _ in range(4):
        append(writer)
    writer.release()
    with open(tmp_path / "run" / "p.0.growing", "ab") as file:
        file.write(b"torn")
    with open(tmp_path / "run" / "steps.jsonl", "ab") as file:
        file.write(b'{"timestep":4,"hyperp')
    assert finish(tmp_path / "run") == 3
    assert_holds(tmp_path / "run", 4)


def test_a_live_folder_is_left_alone(tmp_path):
    writer = FolderWriter(tmp_path / "run", layouts_of(), groups=GROUPS)
    for _ in range(2):
        append(writer)
    with pytest.raises(BlockingIOError, match="still being written"):
        finish(tmp_path / "run")
    with pytest.raises(BlockingIOError, match="still being written"):
        FolderWriter(tmp_path / "run", layouts_of(), groups=GROUPS, overwrite=True)
    append(writer)
    writer.close()
    assert_holds(tmp_path / "run", 3)


def test_overwrite_rules(tmp_path):
    def make(path, **given):
        return FolderWriter(path, layouts_of(), groups=GROUPS, **given)

    (tmp_path / "file").write_text("precious")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "other"):
        for overwrite in (False, True):
            with pytest.raises(FileExistsError):
                make(path, overwrite=overwrite)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        make(tmp_path / "absent" / "run")
    with make(tmp_path / "run") as writer:
        append(writer), append(writer)
    (tmp_path / "run" / "notes").write_text("precious")
    with pytest.raises(FileExistsError, match="replace it with overwrite=True"):
        make(tmp_path / "run")
    with make(tmp_path / "run", overwrite=True) as writer:
        append(writer), append(writer), append(writer)
    assert_holds(tmp_path / "run", 3)
    assert (tmp_path / "run" / "notes").read_text() == "precious"


def test_nothing_is_left_without_a_step(tmp_path):
    with pytest.raises(RuntimeError), FolderWriter(tmp_path / "r", layouts_of(), groups=GROUPS):
        raise RuntimeError
    writer = FolderWriter(tmp_path / "r", layouts_of(), groups=GROUPS)
    append(writer)
    with pytest.raises(ValueError, match="no optimizer step"):
        writer.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda x: x.update(format="other"), "not of the format"),
        (lambda x: x["parameters"][0].update(file="../p"), "damaged"),
        (lambda x: x["parameters"][0].update(group=7), "damaged"),
        (lambda x: x["parameters"][0]["tensors"]["W"].update(offset=1), "damaged"),
        (lambda x: x.pop("parameters"), "damaged"),
    ],
)
def test_damaged_index(tmp_path, damage, message):
    writer = FolderWriter(tmp_path / "run", layouts_of(), groups=GROUPS)
    append(writer), append(writer)
    writer.release()
    path = tmp_path / "run" / "recording.json"
    index = json.loads(path.read_text())
    damage(index)
    path.write_text(json.dumps(index))
    with pytest.raises(FileError, match=message):
        finish(tmp_path / "run")
    with pytest.raises(FileError, match="no model recording"):
        finish(tmp_path)


# --- the hooks ---


def model_of(dtype=torch.float32, width=8):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(width, 2 * width), torch.nn.GELU(), torch.nn.Linear(2 * width, 4)]
    return torch.nn.Sequential(*layers).to(dtype)


def backward(model, seed: int, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    weight = next(model.parameters())
    x = torch.randn(5, weight.shape[1], generator=generator).to(weight.dtype)
    model.zero_grad()
    loss = ((model(x) - 1) ** 2).mean()
    (loss * scale).backward()
    return loss.detach()


def mismatches(path: Path, arithmetic: str) -> int:
    with jaxaudit.open_recording(path) as recording:
        found = jaxaudit.audit(recording, arithmetics=[arithmetic])
    assert int(found.audited.min()) == 1
    return int(found.mismatch_count.sum())


def stored(path: Path, name: str) -> np.ndarray:
    with SafetensorsFile(path) as file:
        return file.read(name)


def test_clipping_schedules_and_groups(tmp_path):
    """The recorder sees the clipped gradient, and the learning rate and decay of each group."""
    model = model_of(torch.bfloat16)
    optimizer = torch.optim.AdamW(
        [
            {"params": model[0].parameters(), "lr": 1e-2},
            {"params": model[2].parameters(), "weight_decay": 0.3, "lr": 3e-3},
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    with record(optimizer, tmp_path / "run", model=model) as recorder:
        for step in range(6):
            recorder.note_loss(backward(model, step))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            schedule.step()
    weights = {name: x.detach().clone() for name, x in model.named_parameters()}
    backward(model, 9), optimizer.step()  # the hooks are gone
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert recorder.steps == 6 and recorder.finished
    for name, decay, rate in (("0.weight", 0.01, 1e-2), ("2.bias", 0.3, 3e-3)):
        path = tmp_path / "run" / f"{name}.safetensors"
        assert mismatches(path, "torch-cpu-loop") == 0
        last = weights[name].view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(stored(path, "W")[-1], last)
        with jaxaudit.open_recording(path) as recording:
            given = recording.hyperparameters
            assert given is not None and given.weight_decay == decay
            np.testing.assert_array_equal(
                given.learning_rate, [rate * (1 / (1 + t)) for t in range(6)]
            )
            assert recording.losses is not None and np.isfinite(recording.losses).all()


@pytest.mark.parametrize("found_inf", [False, True])
def test_fused_under_a_gradient_scaler(tmp_path, found_inf):
    """The unscaled gradient is recorded, and a step that the scaler skipped is none."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
    with record(optimizer, tmp_path / "run", model=model, parameters=["0.weight"]) as recorder:
        for step in range(5):
            backward(model, step, scale=float(scaler.get_scale()))
            scaler.scale(torch.ones(()))
            if found_inf and step in (0, 3):
                model[0].weight.grad[0, 0] = np.inf
            scaler.step(optimizer)
            scaler.update()
    assert recorder.steps == (3 if found_inf else 5)
    assert mismatches(tmp_path / "run" / "0.weight.safetensors", "torch-cpu-fused") == 0


def test_a_scale_that_half_precision_cannot_show_is_refused(tmp_path):
    model = model_of(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
    recorder = record(optimizer, tmp_path / "run", model=model)
    backward(model, 0, 1000.0)
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match="unscale_"):
        scaler.step(optimizer)
    assert not (tmp_path / "run").exists() and recorder.steps == 0


def test_selection_names_and_rows(tmp_path):
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    runs = [
        (dict(parameters=r"^2\."), {"2.weight", "2.bias"}),
        (dict(parameters=["0.bias"]), {"0.bias"}),
        (dict(parameters=[model[2].weight], rows=[3, 1]), {"2.weight"}),
        (dict(rows={"2.weight": [0]}), {"0.weight", "0.bias", "2.weight", "2.bias"}),
    ]
    for number, (given, names) in enumerate(runs):
        with record(optimizer, tmp_path / str(number), model=model, **given):
            backward(model, number), optimizer.step()
        files = {path.stem for path in (tmp_path / str(number)).glob("*.safetensors")}
        assert files == names
    path = tmp_path / "2" / "2.weight.safetensors"
    np.testing.assert_array_equal(stored(path, "W").shape, (2, 2, 16))
    assert mismatches(path, "torch-cpu-loop") == 0
    with SafetensorsFile(path) as file:
        assert file.metadata["rows"] == "[3, 1]" and file.metadata["first_step"] == "3"
    for given, message in [
        (dict(parameters="nothing"), "chooses nothing"),
        (dict(parameters="("), "no regular expression"),
        (dict(parameters=["0.bais"]), "no '0.bais'"),
        (dict(parameters=[torch.zeros(2)]), "no such tensor"),
        (dict(rows=[99]), "0.weight: `rows`"),
        (dict(rows={"9": [0]}), "`rows` names 9"),
        (dict(every=0), "`every`"),
    ]:
        with pytest.raises(ValueError, match=message):
            record(optimizer, tmp_path / "bad", model=model, **given)
    with pytest.raises(TypeError, match="SGD"):
        record(torch.optim.SGD(model.parameters()), tmp_path / "bad")
    with pytest.raises(TypeError, match="float64"):
        record(torch.optim.Adam(model_of(torch.float64).parameters()), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_names_without_a_model_and_a_scalar(tmp_path):
    scalar = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.AdamW([("scale", scalar)], amsgrad=True)
    with record(optimizer, tmp_path / "run"):
        for _ in range(3):
            scalar.grad = torch.full((), 0.3)
            optimizer.step()
    path = tmp_path / "run" / "scale.safetensors"
    assert stored(path, "max_variance_W").shape == (4, 1)
    assert mismatches(path, "torch-cpu-loop") == 0


def test_a_parameter_without_gradient_is_skipped(tmp_path):
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    with record(optimizer, tmp_path / "run", model=model):
        for step in range(4):
            backward(model, step)
            if step in (0, 2):
                model[2].bias.grad = None
            optimizer.step()
    path = tmp_path / "run" / "2.bias.safetensors"
    with SafetensorsFile(path) as file:
        assert json.loads(file.metadata["skipped_steps"]) == [1, 3]
    for name in ("W", "momentum_W", "variance_W"):
        tensor = stored(path, name)
        np.testing.assert_array_equal(tensor[[1, 3]], tensor[[0, 2]])
    assert not stored(path, "grad_W")[[1, 3]].any()
    assert mismatches(tmp_path / "run" / "0.bias.safetensors", "torch-cpu-loop") == 0


def test_a_closure_is_recorded_with_its_loss(tmp_path):
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    losses = []
    with record(optimizer, tmp_path / "run", model=model, parameters=["0.bias"]):
        for step in range(3):
            losses.append(float(optimizer.step(lambda s=step: backward(model, s))))
    path = tmp_path / "run" / "0.bias.safetensors"
    assert mismatches(path, "torch-cpu-loop") == 0
    with jaxaudit.open_recording(path) as recording:
        np.testing.assert_array_equal(recording.losses, np.asarray(losses, np.float32))


def test_every_records_pairs_and_says_where(tmp_path):
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    weights = [model[0].bias.detach().clone()]
    with record(optimizer, tmp_path / "run", model=model, every=3) as recorder:
        for step in range(8):
            backward(model, step), optimizer.step()
            weights.append(model[0].bias.detach().clone())
    path = tmp_path / "run" / "0.bias.safetensors"
    with SafetensorsFile(path) as file:
        timesteps = json.loads(file.metadata["timesteps"])
    assert timesteps == [0, 1, 3, 4, 6, 7] and recorder.steps == 3
    expected = np.stack([weights[t].numpy() for t in timesteps]).view(np.uint32)
    np.testing.assert_array_equal(stored(path, "W"), expected)
    with jaxaudit.open_recording(path) as recording:
        assert recording.gaps is not None and recording.timesteps.tolist() == [0, 1, 4, 7]


def test_exceptions_in_the_step(tmp_path):
    """One before anything happened is no step; one in the middle ends the recording."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())

    def fail(*_):
        raise RuntimeError("from the loop")

    recorder = record(optimizer, tmp_path / "run", model=model)
    backward(model, 0), optimizer.step()
    with pytest.raises(RuntimeError, match="from the loop"):
        optimizer.step(fail)
    backward(model, 1), optimizer.step()
    assert recorder.steps == 2
    backward(model, 2)
    optimizer.state[model[2].bias]["exp_avg"].resize_(1)  # breaks the last parameter's update
    with pytest.raises(RuntimeError):
        optimizer.step()
    optimizer.state[model[2].bias]["exp_avg"] = torch.zeros(4)
    with pytest.raises(ValueError, match="broke off"):
        optimizer.step()
    recorder.close()
    assert finish(tmp_path / "run") == 2
    assert mismatches(tmp_path / "run" / "0.bias.safetensors", "torch-cpu-loop") == 0


def test_a_gradient_changed_behind_the_recorder(tmp_path):
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.register_step_post_hook(lambda *_: model.zero_grad(set_to_none=True))  # harmless
    recorder = record(optimizer, tmp_path / "run", model=model, on_failure="warn")
    backward(model, 0), optimizer.step()
    assert recorder.steps == 1

    def clear(*_):
        for x in model.parameters():
            x.grad.zero_()

    backward(model, 1)
    optimizer._optimizer_step_post_hooks.clear()
    optimizer.register_step_post_hook(clear)
    optimizer.register_step_post_hook(recorder._after)
    with pytest.warns(RuntimeWarning, match="gradient was changed"):
        optimizer.step()
    recorder.close()
    assert finish(tmp_path / "run") == 1


def test_a_full_disk_keeps_the_complete_steps(tmp_path):
    program = (
        "import resource, sys, torch\n"
        "from jaxaudit.recorders.hooks import record\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))\n"
        "p = torch.nn.Parameter(torch.ones(100)); optimizer = torch.optim.Adam([p])\n"
        "record(optimizer, sys.argv[1])\n"
        "for _ in range(20):\n"
        "    p.grad = torch.ones(100); optimizer.step()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert "File too large at timestep 5" in run.stderr and "jaxaudit.finish" in run.stderr
    assert finish(tmp_path / "run") == 4
    assert resource.getrlimit(resource.RLIMIT_FSIZE)  # of this process, untouched
    assert mismatches(tmp_path / "run" / "group0.0.safetensors", "torch-cpu-loop") == 0


def test_killed_trainer_loses_the_step_in_flight_at_most(tmp_path):
    program = (
        "import sys, torch\n"
        "from jaxaudit.recorders.hooks import record\n"
        "torch.manual_seed(0); torch.set_num_threads(1)\n"
        "ps = [torch.nn.Parameter(torch.randn(40, 9)) for _ in range(70)]\n"
        "optimizer = torch.optim.AdamW(ps, fused=True)\n"
        "record(optimizer, sys.argv[1])\n"
        "for t in range(10 ** 6):\n"
        "    for p in ps: p.grad = torch.randn(40, 9)\n"
        "    optimizer.step()\n"
        "    sys.stdout.write(f'{t + 1}\\n'); sys.stdout.flush()\n"
    )
    rng = np.random.default_rng(0)
    for number in range(2):
        folder = tmp_path / str(number)
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
        )
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        reported = [int(line) for line in process.communicate()[0].split("\n")[:-1] if line]
        steps = finish(folder)
        last = reported[-1] if reported else 1
        assert last <= steps <= last + 1
        assert len(list(folder.glob("*.safetensors"))) == 70
        assert not list(folder.glob(".*"))
        assert finish(folder) == steps
    assert mismatches(folder / "group0.69.safetensors", "torch-cpu-fused") == 0
