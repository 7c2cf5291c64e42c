"""Recordings hold what the trainer held, bit for bit, however the run ends."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from jaxaudit.recorders import writing
from jaxaudit.recorders.writing import RecordingWriter, RowLayout, write_tensors

REPOSITORY = Path(__file__).parents[1]
TINY = ["--batch-size", "2", "--sequence-length", "16", "--rows", "dead:3,live:2", "--quiet"]


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, str]]:
    """Read arrays (BF16 as uint16), dtypes and metadata, with no library; the file has no holes."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    kinds = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "u1"}
    arrays, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, last = entry["data_offsets"]
        assert begin == end, f"hole or overlap before {name}"
        array = np.frombuffer(data[start + begin : start + last], kinds[entry["dtype"]])
        arrays[name], end = array.reshape(entry["shape"]), last
    assert start % 64 == 0 and start + end == len(data)
    return arrays, {name: entry["dtype"] for name, entry in header.items()}, metadata


def rows_of(count: int, shape: tuple[int, ...] = (3, 2)) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [
        {
            "W": random.integers(0, 1 << 16, shape, np.uint16),
            "momentum_W": random.standard_normal(shape, np.float32),
        }
        for _ in range(count)
    ]


def layouts_of(shape: tuple[int, ...] = (3, 2)) -> dict[str, RowLayout]:
    return {"W": RowLayout("BF16", shape), "momentum_W": RowLayout("F32", shape)}


def assert_holds(path: Path, rows: list[dict[str, np.ndarray]]) -> None:
    arrays, _, _ = load(path)
    for name in rows[0]:
        np.testing.assert_array_equal(arrays[name], np.stack([row[name] for row in rows]))
    assert arrays["num_steps"] == len(rows) - 1


# --- the writer ---


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 1, 5, 7)], ids=str)
def test_writer_round_trip(tmp_path, shape):
    path, rows = tmp_path / "run.safetensors", rows_of(4, shape)
    with RecordingWriter(path, layouts_of(shape), metadata={"optimizer": "adamw"}) as writer:
        for row in rows:
            writer.append(row)
        writer.small["losses"] = np.arange(4, dtype=np.float32)
        writer.metadata["later"] = "é"
    assert_holds(path, rows)
    arrays, dtypes, metadata = load(path)
    assert dtypes == {"W": "BF16", "momentum_W": "F32", "losses": "F32", "num_steps": "I64"}
    assert metadata == {"optimizer": "adamw", "later": "é"}
    np.testing.assert_array_equal(arrays["losses"], [0, 1, 2, 3])
    assert os.listdir(tmp_path) == ["run.safetensors"]


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_safetensors_reads_it_where_sizes_are_odd(tmp_path, framework):
    """Rows of 3 bfloat16 leave the float64 behind them unaligned."""
    pytest.importorskip("torch")
    pytest.importorskip("ml_dtypes")
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "run.safetensors"
    with RecordingWriter(path, {"W": RowLayout("BF16", (3, 1))}) as writer:
        writer.small["learning_rate"] = np.asarray([0.1, 0.2, 0.3])
        for _ in range(3):
            writer.append({"W": np.full((3, 1), 0x3F80, np.uint16)})
    with safetensors.safe_open(path, framework) as file:
        assert list(file.get_tensor("learning_rate")) == [0.1, 0.2, 0.3]
        assert float(file.get_tensor("W").sum()) == 9
        assert int(file.get_tensor("num_steps")) == 2


def test_header_larger_than_its_room(tmp_path):
    path, rows = tmp_path / "run.safetensors", rows_of(4)
    with RecordingWriter(path, layouts_of(), header_bytes=64) as writer:
        writer.metadata["long"] = "x" * 5000
        for row in rows:
            writer.append(row)
    assert_holds(path, rows)
    assert os.listdir(tmp_path) == ["run.safetensors"]


def test_copy_without_copy_file_range(tmp_path, monkeypatch):
    def missing(*_: int) -> int:
        raise OSError("not supported here")

    monkeypatch.setattr(os, "copy_file_range", missing, raising=False)
    monkeypatch.setattr(writing, "_COPY_BYTES", 7)
    path, rows = tmp_path / "run.safetensors", rows_of(5)
    with RecordingWriter(path, layouts_of()) as writer:
        for row in rows:
            writer.append(row)
    assert_holds(path, rows)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_exception_leaves_a_shorter_recording(tmp_path, kind):
    path, rows = tmp_path / "run.safetensors", rows_of(3)
    with pytest.raises(kind), RecordingWriter(path, layouts_of()) as writer:
        for row in rows:
            writer.append(row)
        raise kind
    assert_holds(path, rows)


@pytest.mark.parametrize("complete", [0, 1])
def test_exception_before_the_first_step_leaves_nothing(tmp_path, complete):
    with pytest.raises(KeyboardInterrupt):
        with RecordingWriter(tmp_path / "run.safetensors", layouts_of()) as writer:
            for row in rows_of(complete):
                writer.append(row)
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_close_without_a_step(tmp_path):
    writer = RecordingWriter(tmp_path / "run.safetensors", layouts_of())
    writer.append(rows_of(1)[0])
    with pytest.raises(ValueError, match="no optimizer step was recorded"):
        writer.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("goes_on", [False, True])
def test_torn_timestep_is_cut_off(tmp_path, monkeypatch, goes_on):
    """An interruption between two tensors of a timestep leaves only complete timesteps."""
    path, rows = tmp_path / "run.safetensors", rows_of(5)
    writer = RecordingWriter(path, layouts_of())
    for row in rows[:3]:
        writer.append(row)
    write, calls = writing.write_at, []

    def torn(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_at", torn)
        with pytest.raises(KeyboardInterrupt):
            writer.append(rows_of(1, (3, 2))[0])
    for row in rows[3:] if goes_on else []:
        writer.append(row)
    writer.close()
    assert_holds(path, rows if goes_on else rows[:3])


@pytest.mark.parametrize("call", ["copy_bytes", "write_at", "sync_folder"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("room", [64, 4096], ids=["small header", "large header"])
def test_interruption_of_close_waits_for_the_file(tmp_path, monkeypatch, call, when, room):
    path, rows = tmp_path / "run.safetensors", rows_of(4)
    writer = RecordingWriter(path, layouts_of(), header_bytes=room)
    for row in rows:
        writer.append(row)
    original, calls = getattr(writing, call), []

    def interrupted(*arguments: object) -> None:
        calls.append(arguments)
        if when == "after" or len(calls) > 1:
            original(*arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(writing, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    assert writer.finished
    assert_holds(path, rows)
    assert os.listdir(tmp_path) == ["run.safetensors"]


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    writer = RecordingWriter(tmp_path / "run.safetensors", layouts_of())
    writer.append(rows_of(1)[0])
    monkeypatch.setattr(writing, "write_at", full)
    with pytest.raises(OSError, match="No space left on device after 1 timesteps of 36 bytes"):
        writer.append(rows_of(1)[0])
    assert writer.closed and os.listdir(tmp_path) == []


def test_existing_output_is_kept_unless_told_otherwise(tmp_path):
    path, rows = tmp_path / "run.safetensors", rows_of(2)
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="exists"):
        RecordingWriter(path, layouts_of())
    with pytest.raises(KeyboardInterrupt), RecordingWriter(path, layouts_of(), overwrite=True):
        raise KeyboardInterrupt
    assert path.read_text() == "precious"
    with RecordingWriter(path, layouts_of(), overwrite=True) as writer:
        for row in rows:
            writer.append(row)
    assert_holds(path, rows)


def test_what_close_refuses_can_be_mended(tmp_path):
    path, rows = tmp_path / "run.safetensors", rows_of(2)
    with pytest.raises(TypeError, match="json.dumps"):
        RecordingWriter(path, layouts_of(), metadata={"seed": 5})  # pyright: ignore
    writer = RecordingWriter(path, layouts_of())
    for row in rows:
        writer.append(row)
    writer.small["losses"] = np.zeros(2, np.complex64)
    with pytest.raises(ValueError, match="complex64"):
        writer.close()
    del writer.small["losses"]
    writer.close()
    assert_holds(path, rows)


@pytest.mark.parametrize("room", [64, 4096], ids=["small header", "large header"])
def test_disk_that_fills_up_at_close_leaves_nothing(tmp_path, monkeypatch, room):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    writer = RecordingWriter(tmp_path / "run.safetensors", layouts_of(), header_bytes=room)
    for row in rows_of(2):
        writer.append(row)
    monkeypatch.setattr(writing, "copy_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert os.listdir(tmp_path) == []


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder of .* does not exist"):
        RecordingWriter(tmp_path / "absent" / "run.safetensors", layouts_of())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W": np.zeros((2, 3), np.uint16)}, "shape"),
        ({"W": np.zeros((3, 2), np.float16)}, "dtype float16"),
        ({"V": np.zeros((3, 2), np.uint16)}, "came with"),
    ],
)
def test_rows_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        with RecordingWriter(tmp_path / "run.safetensors", layouts_of()) as writer:
            writer.append(rows_of(1)[0] | change)


def test_killed_process_leaves_no_recording(tmp_path):
    """SIGKILL leaves a hidden file at most, and the next writer of that name removes it."""
    program = (
        "import sys, time, numpy as np\n"
        "from jaxaudit.recorders.writing import RecordingWriter, RowLayout\n"
        "layouts = {'W': RowLayout('F32', (3,)), 'grad_W': RowLayout('F32', (3,))}\n"
        "writer = RecordingWriter(sys.argv[1], layouts)\n"
        "row = np.ones(3, np.float32)\n"
        "for _ in range(9): writer.append({'W': row, 'grad_W': row})\n"
        "print('written', flush=True)\n"
        "time.sleep(60)\n"
    )
    path = tmp_path / "run.safetensors"
    process = start([sys.executable, "-c", program, str(path)])
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    living = RecordingWriter(path, layouts_of())  # must not take the other's files away
    assert len(os.listdir(tmp_path)) == 2
    living.abort()
    process.kill()
    process.communicate()
    assert not path.exists() and len(os.listdir(tmp_path)) == 1
    with RecordingWriter(path, layouts_of()) as writer:
        for row in rows_of(2):
            writer.append(row)
    assert os.listdir(tmp_path) == ["run.safetensors"]


def test_write_tensors(tmp_path):
    path = tmp_path / "groups.safetensors"
    arrays = {"dead_mask": np.asarray([1, 0, 1], np.uint8), "x": np.asarray(0.1)}
    write_tensors(path, arrays, metadata={"rows": "[5, 6, 7]"})
    loaded, dtypes, metadata = load(path)
    assert dtypes == {"dead_mask": "U8", "x": "F64"} and metadata == {"rows": "[5, 6, 7]"}
    np.testing.assert_array_equal(loaded["dead_mask"], [1, 0, 1])
    assert loaded["x"] == 0.1
    with pytest.raises(FileExistsError):
        write_tensors(path, arrays)
    assert os.listdir(tmp_path) == ["groups.safetensors"]


# --- the recorder for PyTorch ---


@pytest.fixture
def torch() -> ModuleType:
    return pytest.importorskip("torch")


@pytest.fixture
def recorders(torch) -> ModuleType:
    from jaxaudit.recorders import pytorch

    return pytorch


def quadratic_step(torch, parameter, optimizer, seed: int) -> float:
    """Take one step towards a random target; returns the loss."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.zero_grad()
    loss = ((parameter - target).float() ** 2).sum()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def bits_of(torch, tensor) -> np.ndarray:
    tensor = tensor.detach().clone()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def live_tensors(torch, parameter, optimizer) -> dict[str, np.ndarray]:
    state = optimizer.state[parameter]
    keys = {"momentum_W": "exp_avg", "variance_W": "exp_avg_sq", "max_variance_W": "max_exp_avg_sq"}
    tensors = {"W": parameter, "grad_W": parameter.grad}
    tensors |= {name: state[key] for name, key in keys.items() if key in state}
    return {name: bits_of(torch, tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
def test_recorded_rows_are_the_live_ones(tmp_path, torch, recorders, shape, dtype, amsgrad):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape).to(getattr(torch, dtype)))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, eps=1e-4, amsgrad=amsgrad)
    recorder = recorders.Recorder(tmp_path / "run.safetensors", parameter, optimizer)
    initial = bits_of(torch, parameter)
    losses, live = [], []
    for step in range(4):
        losses.append(quadratic_step(torch, parameter, optimizer, step))
        recorder(losses[-1])
        live.append(live_tensors(torch, parameter, optimizer))
    recorder.close()
    arrays, dtypes, metadata = load(tmp_path / "run.safetensors")
    assert ("max_variance_W" in arrays) == amsgrad
    assert metadata["amsgrad"] == json.dumps(amsgrad)
    for name in live[0]:
        assert dtypes[name] == {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
        np.testing.assert_array_equal(arrays[name][1:], np.stack([row[name] for row in live]))
        assert name == "W" or not arrays[name][0].any()
    np.testing.assert_array_equal(arrays["W"][0], initial)
    np.testing.assert_array_equal(arrays["losses"], np.asarray([np.nan, *losses], np.float32))
    assert arrays["num_steps"] == 4


def test_float32_moments_and_rows(tmp_path, torch, recorders):
    """Widened moments are the bfloat16 ones with 16 zero bits; a subset keeps its order."""
    parameter = torch.nn.Parameter(torch.ones(6, 3).to(torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter], lr=0.01)
    path = tmp_path / "run.safetensors"
    with recorders.Recorder(path, parameter, optimizer, rows=[4, 1], moments="float32") as recorder:
        quadratic_step(torch, parameter, optimizer, 0)
        recorder()
    arrays, dtypes, metadata = load(path)
    live = live_tensors(torch, parameter, optimizer)
    assert dtypes["momentum_W"] == dtypes["variance_W"] == "F32" and dtypes["grad_W"] == "BF16"
    for name in ("momentum_W", "variance_W"):
        expected = live[name][[4, 1]].astype(np.uint32) << 16
        np.testing.assert_array_equal(arrays[name][1].view(np.uint32), expected)
    np.testing.assert_array_equal(arrays["W"][1], live["W"][[4, 1]])
    assert metadata["rows"] == "[4, 1]" and metadata["parameter_shape"] == "[6, 3]"
    assert "losses" not in arrays


def test_recording_starts_in_the_middle_of_a_run(tmp_path, torch, recorders):
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.AdamW([parameter], lr=0.01)
    for step in range(3):
        quadratic_step(torch, parameter, optimizer, step)
    before = live_tensors(torch, parameter, optimizer)
    with recorders.Recorder(tmp_path / "run.safetensors", parameter, optimizer) as recorder:
        quadratic_step(torch, parameter, optimizer, 3)
        recorder()
    arrays, _, metadata = load(tmp_path / "run.safetensors")
    assert metadata["first_step"] == "4"
    np.testing.assert_array_equal(arrays["momentum_W"][0], before["momentum_W"])
    assert not arrays["grad_W"][0].any()


@pytest.mark.parametrize("scheduled", [False, True])
def test_learning_rates(tmp_path, torch, recorders, scheduled):
    """Doubles, timestep t being step t's; a list in the metadata only where it varied."""
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.8, 0.95), weight_decay=0.3)
    rates = [0.1 * 0.7**step for step in range(3)] if scheduled else [0.1] * 3
    factor = (lambda step: rates[step] / 0.1 if step < 3 else 0) if scheduled else (lambda _: 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    used = []
    with recorders.Recorder(tmp_path / "run.safetensors", parameter, optimizer) as recorder:
        for step in range(3):
            used.append(optimizer.param_groups[0]["lr"])
            quadratic_step(torch, parameter, optimizer, step)
            recorder()
            scheduler.step()
    arrays, _, metadata = load(tmp_path / "run.safetensors")
    hyperparameters = json.loads(metadata["hyperparameters"])
    assert arrays["learning_rate"].dtype == np.float64
    assert arrays["learning_rate"].tolist() == [used[0], *used]
    assert hyperparameters["learning_rate"] == ([used[0], *used] if scheduled else 0.1)
    assert (len(set(used)) > 1) == scheduled
    del hyperparameters["learning_rate"]
    assert hyperparameters == {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.3}
    scalars = [arrays[name][()] for name in ("adam_beta1", "adam_beta2", "adam_epsilon")]
    assert [*scalars, arrays["weight_decay"]] == [0.8, 0.95, 1e-8, 0.3]


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("Adam", {}, ("adam", "loop", "false", "false")),
        ("AdamW", {}, ("adamw", "loop", "false", "false")),
        ("Adam", {"decoupled_weight_decay": True}, ("adamw", "loop", "false", "false")),
        ("AdamW", {"foreach": True, "maximize": True}, ("adamw", "foreach", "false", "true")),
        ("Adam", {"fused": True}, ("adam", "fused", "false", "false")),
        ("AdamW", {"foreach": False}, ("adamw", "loop", "false", "false")),
    ],
)
def test_optimizer_metadata(tmp_path, torch, recorders, kind, options, expected):
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = getattr(torch.optim, kind)([parameter], **options)
    with recorders.Recorder(tmp_path / "run.safetensors", parameter, optimizer) as recorder:
        quadratic_step(torch, parameter, optimizer, 0)
        recorder()
    _, _, metadata = load(tmp_path / "run.safetensors")
    keys = ("optimizer", "implementation", "capturable", "maximize")
    assert tuple(metadata[key] for key in keys) == expected
    assert metadata["format"] == "jaxaudit recording 1" and metadata["first_step"] == "1"
    assert metadata["torch_version"] == torch.__version__ and metadata["device"] == "cpu"
    assert metadata["num_threads"] == str(torch.get_num_threads())
    assert metadata["cpu_capability"] and metadata["created_at"].endswith("+00:00")
    assert json.loads(metadata["sqrt_probe"]) == recorders.probe_sqrt(parameter.device)


def test_probe_vector_is_the_documented_one(recorders):
    vector = recorders.probe_vector()
    assert vector.dtype == np.float32 and vector.shape == (4096,)
    assert (np.diff(vector) > 0).all() and vector[0] == 1 and vector[-1] < 4
    assert vector.view(np.uint32)[5] == 0x3F800000 + 4096 * 5 + 1103 * 5 % 4096


def test_interrupted_training_leaves_a_shorter_recording(tmp_path, torch, recorders):
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.Adam([parameter])
    with pytest.raises(KeyboardInterrupt):
        with recorders.Recorder(tmp_path / "run.safetensors", parameter, optimizer) as recorder:
            for step in range(5):
                quadratic_step(torch, parameter, optimizer, step)
                if step == 3:
                    raise KeyboardInterrupt
                recorder(step)
    arrays, _, _ = load(tmp_path / "run.safetensors")
    assert len(arrays["W"]) == len(arrays["losses"]) == len(arrays["learning_rate"]) == 4
    assert arrays["num_steps"] == 3


def test_training_that_fails_at_once_leaves_nothing(tmp_path, torch, recorders):
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.Adam([parameter])
    with pytest.raises(RuntimeError, match="early"):
        with recorders.Recorder(tmp_path / "run.safetensors", parameter, optimizer):
            raise RuntimeError("early")
    assert os.listdir(tmp_path) == []


def test_process_that_ends_without_close(tmp_path, torch):
    """An uncaught exception in a loop without a context manager does not lose the recording."""
    program = (
        "import sys, torch\n"
        "from jaxaudit.recorders.pytorch import Recorder\n"
        "parameter = torch.nn.Parameter(torch.ones(4, 3))\n"
        "optimizer = torch.optim.Adam([parameter])\n"
        "recorder = Recorder(sys.argv[1], parameter, optimizer)\n"
        "for step in range(2):\n"
        "    parameter.sum().backward()\n"
        "    optimizer.step()\n"
        "    recorder()\n"
        "raise RuntimeError('the training failed')\n"
    )
    path = tmp_path / "run.safetensors"
    _, notices = start([sys.executable, "-c", program, str(path)]).communicate(timeout=60)
    assert "the training failed" in notices
    assert load(path)[0]["num_steps"] == 2
    assert os.listdir(tmp_path) == ["run.safetensors"]


def test_gradient_that_is_gone(tmp_path, torch, recorders):
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.Adam([parameter])
    recorder = recorders.Recorder(tmp_path / "run.safetensors", parameter, optimizer)
    quadratic_step(torch, parameter, optimizer, 0)
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="before zero_grad"):
        recorder()
    recorder.abort()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("steps", [0, 2])
def test_calls_that_do_not_follow_one_step(tmp_path, torch, recorders, steps):
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.Adam([parameter])
    recorder = recorders.Recorder(tmp_path / "run.safetensors", parameter, optimizer)
    for step in range(steps):
        quadratic_step(torch, parameter, optimizer, step)
    with pytest.raises(ValueError, match=f"has taken {steps} steps"):
        recorder()
    recorder.abort()


def test_hyperparameter_that_changes(tmp_path, torch, recorders):
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.Adam([parameter])
    recorder = recorders.Recorder(tmp_path / "run.safetensors", parameter, optimizer)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    quadratic_step(torch, parameter, optimizer, 0)
    with pytest.raises(ValueError, match="hyperparameters changed"):
        recorder()
    recorder.abort()


def test_what_cannot_be_recorded(tmp_path, torch, recorders):
    path = tmp_path / "run.safetensors"
    parameter, other = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    adam = torch.optim.Adam([parameter])
    with pytest.raises(ValueError, match="no parameter group"):
        recorders.Recorder(path, other, adam)
    with pytest.raises(TypeError, match="SGD"):
        recorders.Recorder(path, parameter, torch.optim.SGD([parameter]))
    wide = torch.nn.Parameter(torch.ones(4, dtype=torch.complex64))
    with pytest.raises(TypeError, match="complex64"):
        recorders.Recorder(path, wide, torch.optim.Adam([wide]))
    for rows in ([], [4], [-1], [1, 1]):
        with pytest.raises(ValueError, match="different row numbers from 0 to 3"):
            recorders.Recorder(path, parameter, adam, rows=rows)
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        recorders.Recorder(path, parameter, adam)
    assert os.listdir(tmp_path) == ["run.safetensors"]


# --- the script ---


def start(command: list[str]) -> subprocess.Popen[str]:
    """Start a process that imports this checkout."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def import_script(name: str) -> ModuleType:
    path = REPOSITORY / "scripts" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def record_run() -> ModuleType:
    pytest.importorskip("torch")
    pytest.importorskip("tokenizers")
    return import_script("record_run")


@pytest.fixture(scope="session")
def tiny_run(record_run, tmp_path_factory) -> Path:
    """A run of five steps, as the script records it."""
    path = tmp_path_factory.mktemp("tiny") / "run.safetensors"
    assert record_run.main(["--output", str(path), "--steps", "5", *TINY]) == 0
    return path


def test_script_records_a_run(tiny_run):
    arrays, dtypes, metadata = load(tiny_run)
    assert arrays["W"].shape == (6, 5, 64) and dtypes["W"] == "BF16"
    assert dtypes["momentum_W"] == "F32" and not (arrays["momentum_W"].view("<u4") & 0xFFFF).any()
    assert metadata["optimizer"] == "adamw" and metadata["implementation"] == "loop"
    assert np.isfinite(arrays["losses"][1:]).all()
    groups, _, notes = load(tiny_run.with_name("run-token-groups.safetensors"))
    assert groups["dead_mask"].sum() == 3 and groups["dead_mask"].shape == (5,)
    assert notes["rows"] == metadata["rows"] and len(json.loads(notes["rows"])) == 5
    assert len(os.listdir(tiny_run.parent)) == 2


def test_script_refuses_existing_outputs(record_run, tiny_run, tmp_path, capsys):
    begun = time.monotonic()
    assert record_run.main(["--output", str(tiny_run), *TINY]) == 2
    other = ["--output", str(tmp_path / "new.safetensors"), "--token-groups", str(tiny_run)]
    assert record_run.main([*other, *TINY]) == 2
    assert time.monotonic() - begun < 1, "refused before any work"
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("exists") == 2
    assert os.listdir(tmp_path) == []


def test_script_without_torch(record_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert record_run.main(["--output", str(tmp_path / "run.safetensors")]) == 2
    assert 'pip install "jaxaudit[torch]"' in capsys.readouterr().err


def test_script_refuses_wrong_usage(record_run, tmp_path, capsys):
    output = ["--output", str(tmp_path / "run.safetensors")]
    for wrong in (["--steps", "0"], ["--dtype", "float8"]):
        assert record_run.main([*output, *wrong]) == 2
    absent = ["--output", str(tmp_path / "absent" / "run.safetensors")]
    assert record_run.main(absent) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("record_run.py: error: the folder of")
    )


def test_rows_are_chosen_evenly(record_run):
    from jaxaudit.recorders.small_language_model import choose_rows

    dead = np.arange(10) >= 6
    assert choose_rows("live:3,8,0:2", dead) == [0, 1, 2, 4, 8]
    assert choose_rows("dead:2", dead) == [6, 8]
    for wrong in ("", "dead", "dead:5", "dead:0", "3:2", "5:11", "odd:3", "-1"):
        with pytest.raises(ValueError, match="rows"):
            choose_rows(wrong, dead)


def test_sample_is_cut_bit_for_bit(tiny_run, tmp_path, capsys):
    """Rows at floor(k * length / count) of each group; metadata name the tokens they are."""
    make_sample = import_script("make_sample")
    command = ["--recording", str(tiny_run), "--output", str(tmp_path), "--steps", "3"]
    assert make_sample.main([*command, "--dead", "2", "--live", "1"]) == 0
    whole, _, before = load(tiny_run)
    mask = load(tiny_run.with_name("run-token-groups.safetensors"))[0]["dead_mask"]
    dead, live = np.flatnonzero(mask), np.flatnonzero(mask == 0)
    rows = sorted([dead[0], dead[1], live[0]])
    sample, dtypes, metadata = load(tmp_path / "sample.safetensors")
    for name in ("W", "grad_W", "momentum_W", "variance_W"):
        assert sample[name].tobytes() == whole[name][:4, rows].tobytes()
    np.testing.assert_array_equal(sample["losses"], whole["losses"][:4])
    assert sample["num_steps"] == 3 and sample["learning_rate"].shape == (4,)
    tokens = [json.loads(before["rows"])[row] for row in rows]
    assert metadata == before | {"rows": json.dumps(tokens)}
    groups = load(tmp_path / "sample-token-groups.safetensors")[0]
    np.testing.assert_array_equal(groups["dead_mask"], mask[rows])
    assert str(tokens[0]) in (tmp_path / "README.md").read_text()
    assert make_sample.main([*command, "--dead", "2", "--live", "1"]) == 2
    assert "exists" in capsys.readouterr().err


def handles(process: int, number: int) -> bool:
    """Tell whether a process has a handler for a signal, as the script has once it is at work."""
    table = Path(f"/proc/{process}/status")
    if not table.exists():
        time.sleep(1)
        return True
    caught = re.search(r"^SigCgt:\s*(\w+)", table.read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("started", [False, True], ids=["before training", "while training"])
def test_interrupted_script(record_run, tmp_path, started):
    """SIGINT: exit 130, and a valid shorter recording with its token groups, or nothing."""
    output = tmp_path / "run.safetensors"
    script = [sys.executable, str(REPOSITORY / "scripts" / "record_run.py")]
    process = start(
        [*script, "--output", str(output), "--steps", "1000000", "--threads", "1", *TINY]
    )
    deadline = time.monotonic() + 50
    while started and time.monotonic() < deadline:
        if any(path.stat().st_size > 1 << 18 for path in tmp_path.glob(".run*.tmp")):
            break
        time.sleep(0.02)
    while not started and not handles(process.pid, signal.SIGTERM):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, notices = process.communicate(timeout=30)
    assert process.returncode == 130, notices
    assert "Traceback" not in notices
    if started:
        arrays, _, _ = load(output)
        assert len(arrays["W"]) == len(arrays["losses"]) == arrays["num_steps"] + 1
        assert f"holds {arrays['num_steps']} steps" in notices
        assert len(os.listdir(tmp_path)) == 2
    else:
        assert "nothing was written" in notices and os.listdir(tmp_path) == []
