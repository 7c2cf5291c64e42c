"""Series of checkpoints as trainers write them: the same bits and audit as a recording; what is ambiguous is asked."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import xarray as xr
from recordings import parse, short_run, write
from test_sources import NAME, bits, refusal, same_but_where_it_came_from

import jaxaudit
from jaxaudit.recorders.pytorch import Recorder

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import source_writers as writers  # noqa: E402

STEPS = 5


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = torch.nn.Embedding(20, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, 20, bias=False)


@dataclasses.dataclass
class Saved:
    """A run's states: of the model, the optimizer and the scheduler, and a recording of its embedding."""

    models: list[dict[str, Any]]
    optimizers: list[dict[str, Any]]
    schedulers: list[dict[str, Any]]
    recording: Path


def train(folder: Path, *, schedule: bool = False, groups: int = 1, named: bool = False) -> Saved:
    torch.manual_seed(0)
    model = Model().bfloat16()
    params: Any = model.parameters()
    if named:
        params = model.named_parameters()
    if groups == 2:
        wide = [p for p in model.parameters() if p.ndim > 1]
        params = [
            {"params": wide, "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
    optimizer = torch.optim.AdamW(params, lr=0.01, betas=(0.9, 0.95), foreach=False)
    rate = (lambda t: 1 / (1 + t)) if schedule else lambda t: 1.0
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "reference.safetensors"
    saved = Saved([], [], [], path)

    def keep() -> None:
        saved.models.append({k: v.clone() for k, v in model.state_dict().items()})
        found = optimizer.state_dict()
        state = {k: {n: x.clone() for n, x in v.items()} for k, v in found["state"].items()}
        saved.optimizers.append({**found, "state": state})
        saved.optimizers[-1]["param_groups"] = [dict(g) for g in found["param_groups"]]
        saved.schedulers.append(dict(scheduler.state_dict(), lr_lambdas=[None]))

    with Recorder(path, model.wte.weight, optimizer) as recorder:
        keep()
        for _ in range(STEPS):
            optimizer.zero_grad()
            tokens = torch.randint(0, 20, (16,))
            out = model.head(model.norm(model.wte(tokens)))
            torch.nn.functional.cross_entropy(out.float(), tokens).backward()
            optimizer.step()
            recorder()
            scheduler.step()
            keep()
    return saved


def combined(
    folder: Path, saved: Saved, numbers: Sequence[int] | None = None, **extra: Any
) -> Path:
    """Write ckpt_N.pt, as a hand-written loop does."""
    folder.mkdir(parents=True)
    for t in range(STEPS + 1) if numbers is None else numbers:
        state = {"model": saved.models[t], "optimizer": saved.optimizers[t], "step": t, **extra}
        torch.save(state, folder / f"ckpt_{t}.pt")
    return folder


def hugging_face(folder: Path, saved: Saved, *, sharded: bool = False) -> Path:
    """Write what the Trainer writes, the files that are no business of ours included."""
    for t in range(STEPS + 1):
        place = folder / f"checkpoint-{t}"
        place.mkdir(parents=True)
        if sharded:
            halves = [dict(list(saved.models[t].items())[k::2]) for k in range(2)]
            names = [f"model-{k + 1:05}-of-00002.safetensors" for k in range(2)]
            for name, half in zip(names, halves, strict=True):
                safetensors.torch.save_file(half, place / name, metadata={"format": "pt"})
            homes = {key: name for name, half in zip(names, halves, strict=True) for key in half}
            index = {"metadata": {"total_size": 0}, "weight_map": homes}
            (place / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            safetensors.torch.save_file(saved.models[t], place / "model.safetensors")
        torch.save(saved.optimizers[t], place / "optimizer.pt")
        torch.save(saved.schedulers[t], place / "scheduler.pt")
        torch.save({"python": (3, tuple(range(625)), None)}, place / "rng_state.pth")
        (place / "training_args.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
        (place / "trainer_state.json").write_text("{}")
    (folder / "runs").mkdir()
    (folder / "README.md").write_text("")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Saved:
    return train(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def reference(saved) -> Path:
    """The recording that was made beside the checkpoints, without its gradients."""
    tensors, metadata = parse(saved.recording.read_bytes())
    del tensors["grad_W"]
    return write(saved.recording.with_name("no-gradients.safetensors"), tensors, metadata)


FORMS: dict[str, Any] = {
    "one file a step": combined,
    "Hugging Face": hugging_face,
    "Hugging Face, sharded": lambda folder, saved: hugging_face(folder, saved, sharded=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits(form, tmp_path, saved, reference):
    folder = FORMS[form](tmp_path / "run", saved)
    options = {} if form == "one file a step" else {"state_index": 0}
    with (
        jaxaudit.open_recording(folder, "wte.weight", **options) as found,
        jaxaudit.open_recording(reference) as expected,
    ):
        assert set(found.formats) == {"param", "exp_avg", "exp_avg_sq"}
        assert found.storage.name == found.formats["exp_avg"].name == "bfloat16"
        for length, rows in ((4, 20), (1, 7)):
            assert bits(found, length, rows) == bits(expected, length, rows)
        ours, theirs = found.hyperparameters, expected.hyperparameters
        assert ours is not None and theirs is not None and ours.count == theirs.count
        for name in ("beta1", "beta2", "epsilon", "weight_decay"):
            assert getattr(ours, name) == getattr(theirs, name)
        np.testing.assert_array_equal(ours.learning_rate, theirs.learning_rate)
        assert found.timesteps.tolist() == list(range(STEPS + 1)) and found.runs == ()
        assert found.metadata["implementation"] == "loop" and found.metadata["optimizer"] == "adamw"
        assert found.flag("amsgrad") is False
        assert found.coverage()["exp_avg"] == "no: no `grad_W`"
        assert found.coverage()["param"].startswith("yes, under")


def audit(path: Path, *arguments: Any, **options: Any) -> xr.Dataset:
    with jaxaudit.open_recording(path, *arguments, **options) as recording:
        return jaxaudit.audit(recording, arithmetics=["torch-cpu-loop"], backend="cpu")


def test_the_same_audit(tmp_path, saved, reference):
    found = audit(combined(tmp_path / "run", saved), "wte.weight")
    expected = audit(reference).drop_vars("loss", errors="ignore")
    assert found.audited.sel(arithmetic="torch-cpu-loop").values.tolist() == [0, 0, 1]
    assert int(found.mismatch_count.sel(stage="param").sum()) == 0
    assert int((found.norm_observed > 0).sum()) == STEPS
    for name in expected.attrs:
        if name in ("recording_metadata", "arithmetics"):
            found.attrs[name] = expected.attrs[name]
    same_but_where_it_came_from(found, expected)


@pytest.mark.parametrize("form", ["exp_avg.{name}", "optimizer.state.{name}.exp_avg", "state.{name}.exp_avg", "{name}.exp_avg", "optimizer.exp_avg.{name}"])  # fmt: skip
def test_states_in_safetensors(tmp_path, form):
    tensors, metadata = short_run(STEPS)
    folder = writers.write_safetensors_series(tmp_path / "run", NAME, tensors, metadata, form=form)
    path = write(tmp_path / "a.safetensors", {k: v for k, v in tensors.items() if k != "grad_W"}, metadata)  # fmt: skip
    with (
        jaxaudit.open_recording(folder) as found,
        jaxaudit.open_recording(path) as expected,
    ):
        assert bits(found, 2, 3) == bits(expected, 2, 3)
        assert found.hyperparameters is not None
        assert found.hyperparameters.learning_rate.tolist() == [0.001] * STEPS
        assert found.metadata["parameter_name"] == NAME and found.first_step == 1


def test_many_checkpoints_leave_no_file_open(tmp_path):
    import os

    tensors, metadata = short_run(30)
    folder = writers.write_safetensors_series(tmp_path / "run", NAME, tensors, metadata)
    before = len(os.listdir("/proc/self/fd"))
    with jaxaudit.open_recording(folder) as recording:
        assert len(os.listdir("/proc/self/fd")) == before
        assert bits(recording, 7, 4)["param"] == tensors["W"][1].tobytes()
        path = folder / "checkpoint-9" / "model.safetensors"
        path.write_bytes(path.read_bytes())
        with pytest.raises(jaxaudit.FileError, match="changed since"):
            bits(recording, 7, 4)
        path.unlink()
        with pytest.raises(jaxaudit.FileError, match="cannot be opened"):
            bits(recording, 7, 4)


# --- gaps ---


def test_gaps(tmp_path):
    tensors, metadata = short_run(12)
    numbers = [0, 1, 4, 5, 6, 9, 11, 12]
    folder = writers.write_safetensors_series(
        tmp_path / "run", NAME, tensors, metadata, numbers=numbers
    )
    bounds = ((0, 1), (4, 6), (11, 12))
    for run, (first, last) in ((None, bounds[1]), *enumerate(bounds)):
        with jaxaudit.open_recording(folder, run=run) as recording:
            assert recording.runs == bounds
            assert recording.timesteps.tolist() == list(range(first, last + 1))
            assert recording.first_step == first + 1 and recording.steps == last - first
            param = tensors["W"][1][first : last + 1]
            assert bits(recording, 1, 10)["param"] == param.tobytes()
    for run in (3, -1):
        message = refusal(folder, run=run)
        assert f"no run {run}; there are 3: 0: 0 to 1, 1: 4 to 6" in message


def test_each_run_replays_exactly(tmp_path, saved):
    folder = combined(tmp_path / "run", saved, [0, 1, 3, 4, 5])
    for run, steps in ((0, 1), (1, 2)):
        found = audit(folder, "wte.weight", run=run)
        assert found.sizes["timestep"] == steps
        assert int(found.mismatch_count.sel(stage="param").sum()) == 0


def test_nothing_consecutive(tmp_path):
    tensors, metadata = short_run(12)
    numbers = [0, 4, 8]
    folder = writers.write_safetensors_series(
        tmp_path / "run", NAME, tensors, metadata, numbers=numbers
    )
    assert "no two of the 3 checkpoints are consecutive steps (they are 0, 4, 8)" in refusal(folder)
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "checkpoint-8")
    assert "1 checkpoints found" in refusal(folder)


def test_the_optimizer_counts_not_the_names(tmp_path, saved):
    """Checkpoints named by tokens or seconds are consecutive if the optimizer's count says so."""
    folder = tmp_path / "run"
    folder.mkdir()
    for t in range(STEPS + 1):
        state = {"model": saved.models[t], "optimizer": saved.optimizers[t]}
        torch.save(state, folder / f"tokens={1000 * t + 7}.ckpt")
    with jaxaudit.open_recording(folder, "wte.weight") as recording:
        assert recording.steps == STEPS - 1  # the first has no count, and its number tells nothing
        assert recording.timesteps.tolist()[:2] == [1007, 2007] and recording.first_step == 2


def test_steps_that_did_not_count(tmp_path, saved):
    """A loss scaler that skips a step leaves two equal states, of which one is left out."""
    order = [0, 1, 2, 2, 3, 4, 5]
    again = Saved(*([x[k] for k in order] for x in (saved.models, saved.optimizers, saved.schedulers)), saved.recording)  # fmt: skip
    folder = tmp_path / "run"
    folder.mkdir()
    for t in range(len(order)):
        state = {"model": again.models[t], "optimizer": again.optimizers[t]}
        torch.save(state, folder / f"step_{t:06}.pt")
    with jaxaudit.open_recording(folder, "wte.weight") as recording:
        assert recording.timesteps.tolist() == [0, 1, 2, 4, 5, 6]
    found = audit(folder, "wte.weight")
    assert int(found.mismatch_count.sel(stage="param").sum()) == 0


def test_count_that_goes_back(tmp_path, saved):
    folder = combined(tmp_path / "run", saved)
    (folder / "ckpt_4.pt").rename(folder / "ckpt_9.pt")
    assert "step count is 4, after 5 in ckpt_5.pt" in refusal(folder, "wte.weight")


# --- learning rates ---


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory) -> Saved:
    return train(tmp_path_factory.mktemp("scheduled"), schedule=True)


def test_rates_of_a_scheduler(tmp_path, scheduled):
    """The rate in a checkpoint that was written after the scheduler stepped belongs to the next step."""
    folder = hugging_face(tmp_path / "hf", scheduled)
    with jaxaudit.open_recording(folder, "wte.weight", state_index=0) as recording:
        assert recording.hyperparameters is not None
        rates = recording.hyperparameters.learning_rate
    assert rates.tolist() == [0.01 * (1 / (1 + t)) for t in range(STEPS)]
    found = audit(folder, "wte.weight", state_index=0)
    assert int(found.mismatch_count.sel(stage="param").sum()) == 0


def test_rates_that_must_be_said(tmp_path, scheduled):
    folder = combined(tmp_path / "run", scheduled)
    message = refusal(folder, "wte.weight")
    assert "the learning rate changes" in message and "rate_of='next'" in message
    wrong = {}
    for rate_of in ("next", "this"):
        found = audit(folder, "wte.weight", rate_of=rate_of)
        wrong[rate_of] = int(found.mismatch_count.sel(stage="param").sum())
    assert wrong["next"] == 0 < wrong["this"]
    assert "needed 'this' or 'next'" in refusal(folder, "wte.weight", rate_of="last")
    # a scheduler that has not stepped yet when the state is written
    for t in range(STEPS + 1):
        state = {"model": scheduled.models[t], "optimizer": scheduled.optimizers[t]}
        state["scheduler"] = {"last_epoch": t - 1}
        torch.save(state, folder / f"ckpt_{t}.pt")
    with jaxaudit.open_recording(folder, "wte.weight") as recording:
        assert recording.hyperparameters is not None
        rates = recording.hyperparameters.learning_rate.tolist()
        assert rates == [0.01 * (1 / (1 + t)) for t in range(1, STEPS + 1)]


# --- which state belongs to which parameter ---


def test_which_parameter(tmp_path, saved):
    folder = combined(tmp_path / "run", saved)
    message = refusal(folder)
    assert "4 parameters in ckpt_0.pt; name one" in message and "wte.weight, norm.weight" in message
    assert "no parameter 'lm'" in refusal(folder, "lm")
    for name in saved.models[0]:
        with jaxaudit.open_recording(folder, name) as recording:
            exp_avg = dict(zip(saved.models[0], range(4), strict=True))[name]
            last = saved.optimizers[-1]["state"][exp_avg]["exp_avg"]
            width = recording.width * recording.tokens * 2
            assert bits(recording, 2, 20)["exp_avg"][-width:] == last.view(torch.uint8).numpy().tobytes()  # fmt: skip


def test_ambiguous_states(tmp_path, saved):
    """Safetensors are sorted, so that only a shape that nothing else has tells."""
    folder = hugging_face(tmp_path / "run", saved)
    message = refusal(folder, "wte.weight")
    assert "numbers 0, 3 have its shape [20, 8]" in message and "state_index=" in message
    wrong = audit(folder, "wte.weight", state_index=3)
    assert int(wrong.mismatch_count.sel(stage="param").sum()) > 0


def test_groups_by_decay(tmp_path):
    saved = train(tmp_path / "train", groups=2)
    folder = combined(tmp_path / "run", saved)
    message = refusal(folder, "wte.weight")
    assert "numbers 0, 1 have its shape" in message
    with jaxaudit.open_recording(folder, "wte.weight", state_index=0) as recording:
        assert recording.hyperparameters is not None
        assert recording.hyperparameters.weight_decay == 0.1
    found = audit(folder, "wte.weight", state_index=0)
    assert int(found.mismatch_count.sel(stage="param").sum()) == 0


def test_names_in_the_optimizer(tmp_path):
    saved = train(tmp_path / "train", named=True)
    folder = hugging_face(tmp_path / "run", saved)
    for name in ("wte.weight", "head.weight"):
        found = audit(folder, name)
        assert int(found.mismatch_count.sel(stage="param").sum()) == 0


def test_a_shape_of_its_own_tells(tmp_path):
    tensors = [torch.zeros(3, 4), torch.zeros(5), torch.zeros(5, 4)]
    names = ["c", "b", "a"]
    params = [torch.nn.Parameter(x.bfloat16()) for x in tensors]
    optimizer = torch.optim.Adam(params)
    for t in (1, 2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        place = tmp_path / "run" / f"step_{t}"
        place.mkdir(parents=True)
        states = dict(zip(names, (p.detach() for p in params), strict=True))
        safetensors.torch.save_file(states, place / "model.safetensors")
        torch.save(optimizer.state_dict(), place / "optimizer.bin")
    for name, tensor in zip(names, tensors, strict=True):
        with jaxaudit.open_recording(tmp_path / "run", name) as recording:
            assert (recording.tokens, *recording.row_shape) == tensor.shape
            assert recording.first_step == 2


def test_weights_alone(tmp_path, saved):
    folder = tmp_path / "run"
    folder.mkdir()
    for t, state in enumerate(saved.models):
        torch.save(state, folder / f"model_step{t}.pt")
    with jaxaudit.open_recording(folder, "norm.weight") as recording:
        assert recording.hyperparameters is None and set(recording.formats) == {"param"}
        assert recording.row_shape == () and recording.tokens == 8


# --- what is wrong ---


def test_two_folders_of_one_number(tmp_path, saved):
    folder = hugging_face(tmp_path / "run", saved)
    shutil.copytree(folder / "checkpoint-2", folder / "global_step2")
    assert "checkpoint-2 and global_step2 are both number 2" in refusal(folder, "wte.weight")


def test_states_that_do_not_fit(tmp_path, saved):
    folder = combined(tmp_path / "run", saved)
    state = {"model": dict(saved.models[3]), "optimizer": saved.optimizers[3]}
    state["model"]["wte.weight"] = state["model"]["wte.weight"].float()
    torch.save(state, folder / "ckpt_3.pt")
    assert "is F32 of shape [20, 8], in ckpt_5.pt BF16" in refusal(folder, "wte.weight")
    state["model"]["wte.weight"] = saved.models[3]["wte.weight"].t().contiguous().t()
    torch.save(state, folder / "ckpt_3.pt")
    assert "not contiguous" in refusal(folder, "wte.weight")
    del state["model"]["wte.weight"]
    torch.save(state, folder / "ckpt_3.pt")
    assert "ckpt_3.pt: no parameter 'wte.weight'" in refusal(folder, "wte.weight")
    torch.save([1, 2], folder / "ckpt_3.pt")
    assert "holds no dict" in refusal(folder, "wte.weight")
    torch.save({"model": {}}, folder / "ckpt_3.pt")
    assert "no weights found" in refusal(folder, "wte.weight")


def test_numbers_that_change(tmp_path, saved):
    folder = combined(tmp_path / "run", saved)
    optimizer = dict(saved.optimizers[4])
    optimizer["param_groups"] = [dict(optimizer["param_groups"][0], betas=(0.9, 0.99))]
    torch.save({"model": saved.models[4], "optimizer": optimizer}, folder / "ckpt_4.pt")
    assert "beta2 is 0.99, but 0.95 in ckpt_5.pt" in refusal(folder, "wte.weight")
    optimizer["param_groups"] = [{"params": [0, 1, 2, 3], "lr": 0.1, "momentum": 0.9}]
    torch.save({"model": saved.models[4], "optimizer": optimizer}, folder / "ckpt_4.pt")
    assert "Only Adam and AdamW" in refusal(folder, "wte.weight")


def test_moments_without_numbers(tmp_path):
    tensors, _ = short_run(3)
    folder = writers.write_safetensors_series(tmp_path / "run", NAME, tensors, {})
    assert "moments without hyperparameters" in refusal(folder)


@pytest.mark.parametrize("text", ["\ud800", "[", '{"learning_rate": %s}' % ("9" * 400), "3", "{}"])
def test_numbers_that_are_none(tmp_path, text):
    """The first was found by fuzzing (kind checkpoints, number 4167): a lone surrogate in a text of JSON."""
    tensors, _ = short_run(3)
    folder = writers.write_safetensors_series(
        tmp_path / "run", NAME, tensors, {"hyperparameters": text}
    )
    refusal(folder)


def test_torch_that_is_missing(tmp_path, saved, monkeypatch):
    import importlib.util

    folder = combined(tmp_path / "run", saved)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'jaxaudit[torch]'" in refusal(folder, "wte.weight")


class Evil:
    """What a hostile pickle would run."""

    def __reduce__(self) -> Any:
        return exec, ("open('/tmp/jaxaudit-was-here', 'w')",)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Evil(), "objects of"),
        (np.float64(3), "objects of"),
        (bytearray(5), "objects of"),
        (torch.nn.Linear(2, 2), "objects of"),
        (torch.eye(3).to_sparse(), "objects of"),
    ],
    ids=["code", "numpy", "bytearray", "module", "sparse"],
)
def test_pickles_that_hold_more(tmp_path, saved, value, expected):
    folder = combined(tmp_path / "run", saved, extra=value)
    assert expected in refusal(folder, "wte.weight")
    assert not Path("/tmp/jaxaudit-was-here").exists()


def test_torch_files_that_are_wrong(tmp_path, saved):
    import zipfile

    folder = combined(tmp_path / "run", saved)
    path = folder / "ckpt_0.pt"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    assert "not in torch's zip format" in refusal(folder, "wte.weight")
    torch.save({"model": saved.models[0]}, path, _use_new_zipfile_serialization=False)
    assert "not in torch's zip format" in refusal(folder, "wte.weight")
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}

    def rewritten(compression: int, **changes: bytes) -> str:
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in records.items():
                archive.writestr(name, changes.get(name.split("/")[-1].replace(".", "_"), data))
        return refusal(folder, "wte.weight")

    bomb = bytes(1 << 26)
    assert "compressed" in rewritten(zipfile.ZIP_DEFLATED, data_pkl=bomb)
    assert "pickle is damaged" in rewritten(zipfile.ZIP_STORED, data_pkl=b"\x80\x02(((((")
    assert "its pickle uses" in rewritten(zipfile.ZIP_STORED, data_pkl=b"\x80\x02I1\n.")
    assert "big-endian" in rewritten(zipfile.ZIP_STORED, byteorder=b"big")
    hostile = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R."
    assert "objects of 'builtins bytearray'" in rewritten(zipfile.ZIP_STORED, data_pkl=hostile)
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    assert "too deep" in rewritten(zipfile.ZIP_STORED, data_pkl=deep)
    # ten lists of ten of the list before: ten to the tenth nodes
    laughs = b"\x80\x02]q\x00"
    for k in range(10):  # a list of ten times the list before
        laughs += b"]q" + bytes([k + 1]) + b"(" + (b"h" + bytes([k])) * 10 + b"e"
    assert "holds too much" in rewritten(zipfile.ZIP_STORED, data_pkl=laughs + b".")
    large = records[next(n for n in records if n.endswith("data.pkl"))].replace(
        b"K\x14K\x08\x86", b"M\xff\xffM\xff\xff\x86"
    )
    assert "reaches beyond its data" in rewritten(zipfile.ZIP_STORED, data_pkl=large)


def test_names_that_are_no_checkpoints(tmp_path, saved):
    folder = combined(tmp_path / "run", saved)
    (folder / "events.out.tfevents.123").write_text("")
    (folder / "checkpoint-999").mkdir()
    (folder / ".ckpt_77.pt").write_text("")
    (folder / "latest-88.pt").symlink_to(folder / "ckpt_5.pt")
    with jaxaudit.open_recording(folder, "wte.weight") as recording:
        assert recording.steps == STEPS
