"""The same recording from every form that is read: the same bits, the same audit; wrong ones are refused in a line."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from recordings import BIG, Tensor, f32, parse, short_run, small_run, write

import jaxaudit
from jaxaudit.byte_files import FileError
from jaxaudit.recording import TENSOR_KEYS, Recording
from jaxaudit.sources import worker
from jaxaudit.sources.model_folder import file_name

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import source_writers as writers  # noqa: E402

STEPS = 6
NAME = "transformer.wte.weight"


@pytest.fixture(scope="module")
def run() -> tuple[dict[str, Tensor], dict[str, str]]:
    return short_run(STEPS)


@pytest.fixture(scope="module")
def reference(run, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("reference") / "run.safetensors", *run)


def given_steps(metadata: dict[str, str], steps: int = STEPS) -> list[dict[str, float]]:
    return [dict(json.loads(metadata["hyperparameters"])) for _ in range(steps)]


def big(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key in BIG}


def losses_of(tensors: dict[str, Tensor]) -> list[float | None]:
    return [None, *map(float, tensors["losses"][1].view("<f4")[1:])]


def model(folder: Path, run: Any, **how: Any) -> Path:
    tensors, metadata = run
    how = {"metadata": metadata, "losses": losses_of(tensors)} | how
    return writers.write_model(folder, {NAME: big(tensors)}, given_steps(metadata), **how)


FORMS: dict[str, Any] = {
    "shards": lambda folder, run: writers.write_shards(folder / "run", *run),
    "folder of shards": lambda folder, run: writers.write_shards(folder / "run", *run).parent,
    "one shard": lambda folder, run: writers.write_shards(folder, *run, count=1),
    "hdf5": lambda folder, run: writers.write_hdf5(folder / "run.h5", *run),
    "hdf5, gzip": lambda folder, run: writers.write_hdf5(
        folder / "run", *run, compression="gzip", shuffle=True, fletcher32=True
    ),
    "hdf5, lzf in chunks": lambda folder, run: writers.write_hdf5(
        folder / "run.hdf5", *run, compression="lzf", chunks=(2, 3, 64)
    ),
    "hdf5 group": lambda folder, run: writers.write_hdf5(folder / "run.h5", *run, group="a/wte"),
    "model": lambda folder, run: model(folder / "run", run),
    "model's index": lambda folder, run: model(folder / "run", run) / "recording.json",
    "unfinished model": lambda folder, run: model(
        folder / "run", run, finished=False, extra=b'{"torn'
    ),
}


def bits(recording: Recording, length: int, rows: int) -> dict[str, bytes]:
    """Read everything in windows, and put the windows together."""
    shape = (recording.tokens, recording.width)
    found = {
        name: np.zeros((recording.steps + 1, *shape), recording.formats[name].pattern_dtype)
        for name in recording.formats
    }
    span = (1, recording.steps + 1)
    for window in recording.windows(span, length, rows, tuple(recording.formats)):
        for name, array in window.tensors.items():
            start = window.first - (name != "grad")
            count = window.steps + (name != "grad")
            found[name][start : start + count, slice(*window.rows)] = array[:count]
    return {name: array.tobytes() for name, array in found.items()}


def assert_same_facts(found: Recording, expected: Recording) -> None:
    assert found.hyperparameters is not None and expected.hyperparameters is not None
    assert found.steps == expected.steps and found.formats == expected.formats
    assert found.row_shape == expected.row_shape and found.bytes == expected.bytes
    assert found.first_step == expected.first_step and found.coverage() == expected.coverage()
    for name in ("beta1", "beta2", "epsilon", "weight_decay", "count"):
        assert getattr(found.hyperparameters, name) == getattr(expected.hyperparameters, name)
    rates = (x.hyperparameters.learning_rate for x in (found, expected))
    np.testing.assert_array_equal(*rates)
    np.testing.assert_array_equal(found.timesteps, expected.timesteps)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits(form, tmp_path, run, reference):
    with (
        jaxaudit.open_recording(FORMS[form](tmp_path, run)) as found,
        jaxaudit.open_recording(reference) as expected,
    ):
        assert_same_facts(found, expected)
        assert found.losses is not None and expected.losses is not None
        np.testing.assert_array_equal(found.losses, expected.losses)
        positions, size = found.parameter_elements()
        wanted = expected.parameter_elements()
        assert size == wanted[1] and positions.tolist() == wanted[0].tolist()
        for length, rows in ((4, found.tokens), (1, 3), (100, 4)):
            assert bits(found, length, rows) == bits(expected, length, rows)
        digest = found.fingerprint()
        assert len(digest) == 64 and digest == found.fingerprint()


def same_but_where_it_came_from(found: xr.Dataset, expected: xr.Dataset) -> None:
    ignored = {"source", "source_sha256_head", "created_at", "title", "recording_metadata"}
    xr.testing.assert_identical(found.drop_attrs(), expected.drop_attrs())
    for name in {*found.attrs, *expected.attrs} - ignored:
        if name == "hyperparameters":
            ours, theirs = (json.loads(x.attrs[name]) for x in (found, expected))
            assert {k: v["value"] for k, v in ours.items()} == {
                k: v["value"] for k, v in theirs.items()
            }
        else:
            assert found.attrs[name] == expected.attrs[name]


@pytest.fixture(scope="module")
def audited(reference) -> xr.Dataset:
    with jaxaudit.open_recording(reference) as recording:
        return jaxaudit.audit(recording, arithmetics=["torch-cpu-loop"], backend="cpu")


@pytest.mark.parametrize("form", ["shards", "hdf5, gzip", "hdf5 group", "unfinished model"])
def test_the_same_audit(form, tmp_path, run, audited):
    assert int(audited.mismatch_count.sum()) == 0 and (audited.audited == 1).all()
    with jaxaudit.open_recording(FORMS[form](tmp_path, run)) as recording:
        found = jaxaudit.audit(recording, arithmetics=["torch-cpu-loop"], backend="cpu")
    same_but_where_it_came_from(found, audited)


def test_the_fault_is_found_from_every_source(tmp_path, run):
    """One flipped bit gives one mismatch, so what is compared above is really read."""
    tensors = {key: (dtype, array.copy()) for key, (dtype, array) in run[0].items()}
    tensors["W"][1][STEPS, 3, 5] ^= 1
    path = writers.write_hdf5(tmp_path / "run.h5", tensors, run[1])
    with jaxaudit.open_recording(path) as recording:
        found = jaxaudit.audit(recording, arithmetics=["torch-cpu-loop"], backend="cpu")
    assert int(found.mismatch_count.sum()) == 1


# --- coverage ---


def test_coverage(tmp_path):
    def covers(drop: tuple[str, ...] = (), **metadata: str) -> dict[str, str]:
        tensors = {k: v for k, v in small_run().items() if k not in drop}
        path = write(tmp_path / "run.safetensors", tensors, metadata)
        with jaxaudit.open_recording(path) as recording:
            return recording.coverage()

    assert set(covers().values()) == {"yes"}
    no_gradient = covers(("grad_W",))
    assert no_gradient["exp_avg"] == "no: no `grad_W`" == no_gradient["updates"]
    assert no_gradient["param"].startswith("yes, under") and no_gradient["lattice"] == "yes"
    no_moments = covers(("momentum_W", "variance_W"))
    assert no_moments["param"] == "yes" and no_moments["exp_avg"] == "no: no `momentum_W`"
    late = covers(("momentum_W", "variance_W"), first_step="7")
    assert late["param"] == "no: no `momentum_W` and no `variance_W`"
    assert late["free_run"].endswith("does not start at step 1")
    only = covers(tuple(k for k in small_run() if k != "W"))
    assert only["param"] == "no: no hyperparameters" and only["tokens"] == "yes"


# --- what already was decided by content ---


def refusal(path: Path, *arguments: Any, **options: Any) -> str:
    started = time.monotonic()
    with pytest.raises(FileError) as caught:
        jaxaudit.open_recording(path, *arguments, **options).close()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 800 and time.monotonic() - started < 20
    assert message.isprintable() and str(path.parent) in message
    return message


def test_content_decides(tmp_path, run):
    path = writers.write_hdf5(tmp_path / "run.safetensors", *run)
    with jaxaudit.open_recording(path) as recording:
        assert recording.steps == STEPS
    path = write(tmp_path / "run.h5", *run)
    with jaxaudit.open_recording(path) as recording:
        assert recording.steps == STEPS
    assert "cannot be opened" in refusal(tmp_path / "absent")
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04")
    assert "folder with a series" in refusal(tmp_path / "a.pt")
    (tmp_path / "old.pt").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    assert "folder with a series" in refusal(tmp_path / "old.pt")
    (tmp_path / "empty").mkdir()
    assert "0 checkpoints found" in refusal(tmp_path / "empty")
    (tmp_path / "text").write_text("loss 3.2\n")
    assert "not a safetensors file" in refusal(tmp_path / "text")


def test_one_parameter_may_be_named(tmp_path, run):
    tensors, metadata = run
    path = write(tmp_path / "run.safetensors", tensors, metadata | {"parameter_name": NAME})
    with jaxaudit.open_recording(path, NAME) as recording:
        assert recording.steps == STEPS
    assert f"of '{NAME}'; asked for 'other'" in refusal(path, "other")
    path = write(tmp_path / "run.safetensors", tensors, metadata)
    assert "without its name" in refusal(path, "other")
    assert "run is for a series" in refusal(path, run=1)
    assert "run, rate_of are for a series" in refusal(path, run=1, rate_of="this")


# --- shards ---


def test_index_that_leads_elsewhere(tmp_path, run):
    index = writers.write_shards(tmp_path / "run", *run)
    outside = write(tmp_path / "outside.safetensors", *run)
    found = json.loads(index.read_text())

    def named(name: Any) -> str:
        changed = {**found["weight_map"], "W": name}
        index.write_text(json.dumps({"weight_map": changed}))
        return refusal(index)

    for name in ("../outside.safetensors", str(outside), "..", ".", "", "a/b", "a\\b", "C:x", "a\n", "x" * 300):  # fmt: skip
        assert "plain name" in named(name)
    for name in (3, None, ["a"]):
        assert "no file name for `W`" in named(name)
    (index.parent / "loop.safetensors").symlink_to("loop.safetensors")
    assert "cannot be opened" in named("loop.safetensors")
    os.mkfifo(index.parent / "pipe.safetensors")
    assert "not a regular file" in named("pipe.safetensors")
    (index.parent / "dir.safetensors").mkdir()
    assert "a folder" in named("dir.safetensors")
    assert "cannot be opened" in named("absent.safetensors")


def test_link_within_the_folder(tmp_path, run):
    index = writers.write_shards(tmp_path / "run", *run, count=1)
    real = index.parent / "run-00001-of-00001.safetensors"
    real.rename(index.parent / "data")
    real.symlink_to("data")
    with jaxaudit.open_recording(index) as recording:
        assert recording.steps == STEPS


def test_index_that_disagrees(tmp_path, run):
    index = writers.write_shards(tmp_path / "run", *run)
    found = json.loads(index.read_text())
    names = found["weight_map"]
    other = next(name for name in names.values() if name != names["W"])
    index.write_text(json.dumps({"weight_map": names | {"W": other}}))
    assert "no `W`, which run.safetensors.index.json looks for" in refusal(index)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in names.items() if k != "W"}}))
    assert "no `W`" in refusal(index)
    tensors, _ = parse((index.parent / other).read_bytes())
    write(index.parent / other, tensors, {"optimizer": "sgd"})
    index.write_text(json.dumps(found))
    assert "the metadata `optimizer` says" in refusal(index)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"W": "a", "W": "b"}}',
        '{"weight_map": {"W": NaN}}',
        '{"metadata": 3, "weight_map": {"W": "a"}}',
        '{"weight_map": ' * 5000 + "1" + "}" * 5000,
        '{"weight_map": ' + "[" * 200_000 + "]" * 200_000 + "}",
        '{"n": ' + "9" * 10_000 + "}",
        '{"\ud800": 1}'.encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
    ids=range(12),
)
def test_index_that_is_none(tmp_path, text):
    path = tmp_path / "run.safetensors.index.json"
    path.write_text(text)
    refusal(path)


# --- HDF5 ---


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py")


def test_hdf5_of_weights_alone(tmp_path, run, h5py):
    path = writers.write_hdf5(tmp_path / "run.h5", {"W": run[0]["W"]})
    with jaxaudit.open_recording(path) as recording:
        assert recording.hyperparameters is None and set(recording.formats) == {"param"}
        assert recording.coverage()["lattice"] == "yes"
        found = jaxaudit.audit(recording, backend="cpu")
    with jaxaudit.open_recording(
        write(tmp_path / "a.safetensors", {"W": run[0]["W"]})
    ) as recording:
        same_but_where_it_came_from(found, jaxaudit.audit(recording, backend="cpu"))


@pytest.mark.parametrize(
    ("kind", "attribute", "expected"),
    [
        ("<u2", None, "BF16"),
        ("<i2", None, "BF16"),
        ("<u2", "bfloat16", "BF16"),
        ("<u2", "torch.bfloat16", "BF16"),
        ("<u2", "float16", "F16"),
        ("<i2", "F16", "F16"),
        ("<f2", None, "F16"),
        ("<f4", None, "F32"),
        (">f2", None, "F16"),
        (">f4", None, "F32"),
        (">u2", None, "BF16"),
    ],
)
@pytest.mark.parametrize("how", [{}, {"chunks": (2, 2, 1)}], ids=["one block", "chunks"])
def test_hdf5_formats(tmp_path, h5py, kind, attribute, expected, how):
    """Bits are taken as they are, whatever the order of their bytes."""
    width = np.dtype(kind).itemsize
    raw = np.random.default_rng(1).integers(0, 256, 4 * 3 * 2 * width, np.uint8)
    values = raw.view(f"<u{width}").reshape(4, 3, 2)
    stored = values.astype(values.dtype.newbyteorder(kind[0])).view(kind)
    with h5py.File(tmp_path / "run.h5", "w") as file:
        data = file.create_dataset("W", data=stored, **how)
        if attribute:
            data.attrs["dtype"] = attribute
    with jaxaudit.open_recording(tmp_path / "run.h5") as recording:
        assert recording.storage.name == {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[expected]  # fmt: skip
        assert bits(recording, 2, 2)["param"] == values.tobytes()


def test_hdf5_with_a_native_bfloat16(tmp_path, h5py):
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    values = np.random.default_rng(0).integers(0, 1 << 16, (4, 3, 2)).astype("<u2")
    with h5py.File(tmp_path / "run.h5", "w") as file:
        space = h5py.h5s.create_simple((4, 3, 2))
        data = h5py.h5d.create(file.id, b"W", kind, space)
        data.write(space, space, values.view("V2"), mtype=kind)
    with jaxaudit.open_recording(tmp_path / "run.h5") as recording:
        assert recording.storage.name == "bfloat16"
        assert bits(recording, 2, 2)["param"] == values.tobytes()


def test_hdf5_attributes_are_scalars_and_metadata(tmp_path, h5py):
    tensors = {k: v for k, v in small_run().items() if k in BIG}
    path = writers.write_hdf5(tmp_path / "run.h5", tensors)
    with h5py.File(path, "a") as file:
        attributes: dict[str, Any] = {"lr": np.float32(0.1), "betas": [0.9, 0.95], "eps": 1e-8}
        attributes |= {"weight_decay": 0.01, "amsgrad": True, "num_threads": 4, "note": "x"}
        for name, value in attributes.items():
            file.attrs[name] = value
    with jaxaudit.open_recording(path) as recording:
        given = recording.hyperparameters
        assert given is not None and given.learning_rate.tolist() == [0.1] * 3  # from a float32
        assert (given.beta1, given.beta2, given.epsilon) == (0.9, 0.95, 1e-8)
        assert given.weight_decay == 0.01 and recording.metadata["note"] == "x"
        assert recording.flag("amsgrad") is True and recording.number("num_threads") == 4


def test_hdf5_behind_a_user_block(tmp_path, run, h5py):
    path = tmp_path / "run.h5"
    with h5py.File(path, "w", userblock_size=1024) as file:
        file["W"] = run[0]["W"][1]
    with jaxaudit.open_recording(path) as recording:
        assert bits(recording, 3, 5)["param"] == run[0]["W"][1].tobytes()


def test_hdf5_groups(tmp_path, h5py):
    tensors = small_run()
    path = writers.write_hdf5(tmp_path / "run.h5", tensors, group="wte")
    with h5py.File(path, "a") as file:
        file["head/W"] = tensors["W"][1][:3]
    message = refusal(path)
    assert "2 groups hold a `W`" in message and "'wte'" in message and "parameter=" in message
    with jaxaudit.open_recording(path, "head") as recording:
        assert recording.steps == 2
    with jaxaudit.open_recording(path, "/wte") as recording:
        assert recording.steps == 3
    assert "no group 'lm'" in refusal(path, "lm")
    with h5py.File(path, "w") as file:
        file["weights"] = 1
    assert "no `W` (found: weights)" in refusal(path)


def test_hdf5_token_groups(tmp_path, run, h5py):
    tensors, metadata = run
    mask = np.arange(10) % 3 == 0
    path = writers.write_hdf5(tmp_path / "run.h5", tensors | {"dead_mask": ("BOOL", mask)})
    groups = jaxaudit.open_token_groups(path)
    assert groups.names == ["all", "dead", "live"]
    assert groups.members["dead"].tolist() == np.flatnonzero(mask).tolist()
    with jaxaudit.open_recording(path) as recording:
        own = jaxaudit.token_groups_of(recording)
        assert own.names == groups.names


def test_hdf5_without_h5py(tmp_path, run, monkeypatch):
    path = writers.write_hdf5(tmp_path / "run.h5", *run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'jaxaudit[hdf5]'" in refusal(path)


def hdf5_refusal(path: Path, h5py: Any, make: Any) -> str:
    with h5py.File(path, "w") as file:
        make(file)
    return refusal(path)


def test_hdf5_that_leads_elsewhere(tmp_path, h5py):
    values = np.zeros((4, 3, 2), "<u2")
    outside = tmp_path / "outside.h5"
    with h5py.File(outside, "w") as file:
        file["W"] = values
    (tmp_path / "raw").write_bytes(values.tobytes())

    def external_link(file):
        file["W"] = h5py.ExternalLink(str(outside), "/W")

    def soft_link(file):
        file["data"] = values
        file["W"] = h5py.SoftLink("/data")

    def external_storage(file):
        file.create_dataset("W", (4, 3, 2), "<u2", external=[(str(tmp_path / "raw"), 0, 48)])

    def virtual(file):
        layout = h5py.VirtualLayout((4, 3, 2), "<u2")
        layout[:] = h5py.VirtualSource(str(outside), "W", (4, 3, 2))
        file.create_virtual_dataset("W", layout)

    def references(file):
        file.create_dataset("W", (4, 3), h5py.ref_dtype)

    path = tmp_path / "run.h5"
    assert "link" in hdf5_refusal(path, h5py, external_link)
    assert "link" in hdf5_refusal(path, h5py, soft_link)
    assert "stored in another file" in hdf5_refusal(path, h5py, external_storage)
    assert "virtual dataset" in hdf5_refusal(path, h5py, virtual)
    assert "holds no numbers" in hdf5_refusal(path, h5py, references)


def test_hdf5_bombs(tmp_path, h5py):
    path = tmp_path / "run.h5"
    shape = (1 << 20, 1 << 20, 1 << 10)

    def never_written(file):
        file.create_dataset("W", shape, "<u2")

    def no_chunks(file):
        file.create_dataset("W", shape, "<u2", chunks=(1, 1024, 1024), compression="gzip")

    def some_chunks(file):
        data = file.create_dataset("W", (64, 64, 4), "<u2", chunks=(1, 64, 4), compression="gzip")
        data[3] = 1

    def twice(file):
        """One chunk of 512 MiB of zeros, deflated twice."""
        listed = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        listed.set_chunk((2, 1 << 14, 1 << 13))
        listed.set_deflate(9)
        listed.set_deflate(9)
        space = h5py.h5s.create_simple((2, 1 << 14, 1 << 13))
        data = h5py.h5d.create(file.id, b"W", h5py.h5t.STD_U16LE, space, listed)
        data.write(space, space, np.zeros((2, 1 << 14, 1 << 13), "<u2"))

    def large_chunk(file):
        file.create_dataset("W", (2, 1 << 15, 1 << 15), "<u2", chunks=(1, 1 << 15, 1 << 15))

    assert "was never written" in hdf5_refusal(path, h5py, never_written)
    assert "0 of" in hdf5_refusal(path, h5py, no_chunks)
    assert "1 of 64 chunks" in hdf5_refusal(path, h5py, some_chunks)
    assert "damaged or hostile" in hdf5_refusal(path, h5py, twice)
    assert "chunks of" in hdf5_refusal(path, h5py, large_chunk)


def test_hdf5_with_a_filter_of_a_library(tmp_path, h5py, run):
    path = tmp_path / "run.h5"
    listed = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    listed.set_chunk((1, 3, 2))
    listed.set_scaleoffset(h5py.h5z.SO_INT, 0)
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple((4, 3, 2))
        h5py.h5d.create(file.id, b"W", h5py.h5t.STD_U16LE, space, listed)
    assert "filter 6" in refusal(path) and "h5repack" in refusal(path)


def test_hdf5_that_goes_round_in_circles(tmp_path, h5py, run):
    path = writers.write_hdf5(tmp_path / "run.h5", *run, group="a")
    with h5py.File(path, "a") as file:
        file["a/b"] = file["a"]
        file["a/c"] = file["/"]
    with jaxaudit.open_recording(path) as recording:
        assert recording.steps == STEPS


@pytest.mark.parametrize("keep", [8, 100, 1000, 3000])
def test_hdf5_that_is_cut(tmp_path, run, keep, h5py):
    path = writers.write_hdf5(tmp_path / "run.h5", *run)
    path.write_bytes(path.read_bytes()[:keep])
    assert "HDF5 cannot read it" in refusal(path)


def test_a_process_that_fails(tmp_path, run, monkeypatch):
    """What crashes or hangs is a FileError here, not the end of the audit."""
    path = writers.write_hdf5(tmp_path / "run.h5", *run)
    for text, expected in (
        ("import os\nos.abort()", "died of signal 6"),
        ("import time\ntime.sleep(60)", "took longer than 1 seconds"),
        ("print('x' * (1 << 24))", "too much to say"),
        ("", "ended unexpectedly"),
        ("print('{\"answer\": 7}')\nimport time\ntime.sleep(60)", None),
    ):
        script = tmp_path / "process.py"
        script.write_text(text)
        monkeypatch.setattr(worker, "SECONDS", 1.0)
        monkeypatch.setattr(worker, "_LARGEST_ANSWER", 1 << 20)
        with worker.Worker(str(script)) as process:
            if expected is None:
                assert process.ask(path) == 7
                continue
            with pytest.raises(FileError, match=expected):
                process.ask(path)
            with pytest.raises(FileError):
                process.ask(path)


# --- the folder of a whole model ---


def test_model_of_several_parameters(tmp_path, run):
    tensors, metadata = run
    names = [NAME, "a/b\\c.weight", ".hidden", "ünicode 100%", "x" * 400]
    parameters = {name: big(tensors) for name in names}
    folder = writers.write_model(
        tmp_path / "run", parameters, given_steps(metadata), metadata=metadata, finished=False
    )
    model = jaxaudit.open_model(folder)
    assert list(model) == names and len(model) == 5 and not model.finished
    assert model.steps == STEPS and model.losses is None
    assert model.metadata["optimizer"] == metadata["optimizer"]
    before = len(os.listdir("/proc/self/fd"))
    for name in names:
        with model.open(name) as recording:
            assert bits(recording, 4, 10)["param"] == tensors["W"][1].tobytes()
    assert len(os.listdir("/proc/self/fd")) == before
    message = refusal(folder)
    assert "5 parameters; name one" in message and NAME in message
    assert "no parameter 'b'" in refusal(folder, "b")
    with jaxaudit.open_recording(folder, ".hidden") as recording:
        assert recording.steps == STEPS


def test_names_of_files():
    assert file_name("a.b_c-D9") == "a.b_c-D9" and file_name("..") == "%2E."
    assert file_name("a/b") == "a%2Fb" and file_name("é") == "%C3%A9"
    for name in ("a" * 180, "a" * 181, "é" * 100, ".", "a\0b", "..\\x"):
        assert file_name(name) == writers.file_name(name)
        assert len(file_name(name)) <= 180 and "/" not in file_name(name)


def test_model_that_is_half_finished(tmp_path, run):
    """A trainer killed while it closes leaves complete files beside growing ones."""
    tensors, metadata = run
    parameters = {"a": big(tensors), "b": big(tensors)}
    steps = given_steps(metadata)
    folder = writers.write_model(tmp_path / "run", parameters, steps, metadata=metadata)
    writers.write_model(folder, parameters, steps, metadata=metadata, finished=False)
    (folder / "a.growing").unlink()
    (folder / "b.safetensors").unlink()
    for name in ("a", "b"):
        with jaxaudit.open_recording(folder, name) as recording:
            assert bits(recording, 4, 10)["grad"] == tensors["grad_W"][1].tobytes()


def test_torn_steps_do_not_count(tmp_path, run):
    folder = model(tmp_path / "run", run, finished=False)
    lines = (folder / "steps.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "steps.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:-1])
    with jaxaudit.open_recording(folder) as recording:
        assert recording.steps == 3
    (folder / "steps.jsonl").write_bytes(b"".join(lines[:1]))
    assert "holds no step" in refusal(folder)
    (folder / "steps.jsonl").write_bytes(b"")
    assert "holds no step" in refusal(folder)


def changed_index(folder: Path, change: Any) -> str:
    index = json.loads((folder / "recording.json").read_text())
    change(index)
    (folder / "recording.json").write_text(json.dumps(index))
    return refusal(folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x.update(format="jaxaudit model recording 2"), "the format is"),
        (lambda x: x.update(parameters=[]), "`parameters` is no list"),
        (lambda x: x.update(groups=[]), "`groups` is no list"),
        (lambda x: x.update(metadata=None), "`metadata` has no object"),
        (lambda x: x.update(parameters=[3]), "no JSON object"),
        (lambda x: x["parameters"][0].update(name=3), "no name"),
        (lambda x: x["parameters"][0].update(name="\ud800"), "no name"),
        (lambda x: x["parameters"][0].update(file="../x"), "is called '../x'"),
        (lambda x: x["parameters"][0].update(group=7), "has group 7"),
        (lambda x: x["parameters"][0].update(first_step=0), "first_step 0"),
        (lambda x: x["parameters"][0].update(first_step=1.5), "no usable"),
        (lambda x: x["parameters"][0].update(shape="x"), "no usable"),
        (lambda x: x["parameters"][0].update(record_bytes=-1), "no usable"),
        (lambda x: x["parameters"][0].update(record_bytes=100), "reaches beyond"),
        (lambda x: x["parameters"][0].update(record_bytes=1 << 50), "need"),
        (lambda x: x["parameters"][0].update(tensors={}), "no tensor `W`"),
        (lambda x: x["parameters"][0]["tensors"]["W"].update(dtype="F64"), "of dtype F64"),
        (lambda x: x["parameters"][0]["tensors"]["W"].update(shape=[1 << 60, 1 << 60]), "beyond"),
        (lambda x: x["parameters"][0]["tensors"]["W"].update(shape=[0]), "no usable shape"),
        (lambda x: x["parameters"][0]["tensors"]["W"].update(offset=4), "overlaps"),
        (lambda x: x["parameters"][0]["tensors"].update(V={}), "no tensor of a recording"),
        (lambda x: x["parameters"].append(x["parameters"][0]), "the same name"),
    ],
    ids=range(22),
)
def test_model_index_that_is_wrong(tmp_path, run, change, expected):
    assert expected in changed_index(model(tmp_path / "run", run, finished=False), change)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{}", "of timestep None, expected 3"),
        ("[]", "of timestep None"),
        ('{"timestep": 4, "hyperparameters": [{}], "loss": null}', "of timestep 4"),
        ('{"timestep": 3, "hyperparameters": [{}], "loss": null}', "needs the numbers"),
        ('{"timestep": 3, "hyperparameters": [], "loss": null}', "needs the numbers"),
        ('{"timestep": 3, "hyperparameters": null, "loss": null}', "needs the numbers"),
        ("nonsense", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"timestep": NaN}', "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_model_steps_that_are_wrong(tmp_path, run, line, expected):
    folder = model(tmp_path / "run", run, finished=False)
    lines = (folder / "steps.jsonl").read_text().splitlines()
    lines[3] = line
    (folder / "steps.jsonl").write_text("\n".join(lines) + "\n")
    assert expected in refusal(folder)


def test_model_whose_numbers_change(tmp_path, run):
    tensors, metadata = run
    steps = given_steps(metadata)
    for t, step in enumerate(steps):
        step["learning_rate"] = 0.001 / (t + 1)
    folder = writers.write_model(tmp_path / "a", {NAME: big(tensors)}, steps, finished=False)
    with jaxaudit.open_recording(folder) as recording:
        assert recording.hyperparameters is not None
        rates = recording.hyperparameters.learning_rate
        assert rates.tolist() == [step["learning_rate"] for step in steps]
    steps[3]["beta2"] = 0.95
    folder = writers.write_model(tmp_path / "b", {NAME: big(tensors)}, steps, finished=False)
    assert "beta2 of" in refusal(folder) and "changes at timestep 4" in refusal(folder)


def test_model_files_that_are_wrong(tmp_path, run):
    folder = model(tmp_path / "run", run, finished=False)
    growing = folder / f"{NAME}.growing"
    content = growing.read_bytes()
    growing.write_bytes(content[:-1])
    assert "timesteps of steps.jsonl need" in refusal(folder)
    growing.unlink()
    assert "cannot be opened" in refusal(folder)
    (tmp_path / "elsewhere").write_bytes(content)
    growing.symlink_to(tmp_path / "elsewhere")
    assert "a link" in refusal(folder)
    growing.unlink()
    os.mkfifo(growing)
    assert "not a regular file" in refusal(folder)
    write(folder / f"{NAME}.safetensors", small_run())
    assert "belong to different runs" in refusal(folder)


def test_growing_file_that_shrinks(tmp_path, run):
    folder = model(tmp_path / "run", run, finished=False)
    with jaxaudit.open_recording(folder) as recording:
        os.truncate(folder / f"{NAME}.growing", 5000)
        with pytest.raises(FileError, match="became shorter"):
            bits(recording, 4, 10)


# --- steps without a gradient ---


def with_skipped(tensors: dict[str, Tensor], at: list[int]) -> dict[str, Tensor]:
    """Repeat states, as a run that left its parameter out of some steps records them."""
    rows = []
    for t in range(tensors["W"][1].shape[0] + len(at)):
        rows.append(rows[-1] if t in at else (rows[-1] + 1 if rows else 0))
    longer = {key: (dtype, array[rows].copy()) for key, (dtype, array) in big(tensors).items()}
    longer["grad_W"][1][at] = 0
    return longer


@pytest.mark.parametrize("at", [[3], [1], [1, 2, 5, 6, 9], [7, 8]], ids=str)
@pytest.mark.parametrize("finished", [True, False])
def test_skipped_steps_replay_exactly(tmp_path, run, reference, audited, at, finished):
    """States around a skipped step are consecutive ones of the optimizer, whose count did not move."""
    tensors, metadata = run
    longer = with_skipped(tensors, at)
    folder = writers.write_model(
        tmp_path / "run",
        {"other": longer, NAME: longer},
        given_steps(metadata, STEPS + len(at)),
        metadata=metadata,
        finished=finished,
        skipped={1: at},
    )
    assert jaxaudit.open_model(folder).skipped_steps(NAME) == at
    with (
        jaxaudit.open_recording(folder, NAME) as found,
        jaxaudit.open_recording(reference) as expected,
    ):
        assert found.steps == STEPS
        assert found.timesteps.tolist() == [t for t in range(STEPS + len(at) + 1) if t not in at]
        for length in (1, 4):
            ours, theirs = bits(found, length, 3), bits(expected, length, 3)
            assert ours == theirs
        audit = jaxaudit.audit(found, arithmetics=["torch-cpu-loop"], backend="cpu")
    xr.testing.assert_identical(
        audit.drop_vars("loss", errors="ignore").drop_attrs(),
        audited.drop_vars("loss").drop_attrs(),
    )
    with jaxaudit.open_recording(folder, "other") as found:
        assert found.steps == STEPS + len(at)


def test_skipped_steps_that_cannot_be(tmp_path, run):
    tensors, metadata = run

    def said(text: str) -> str:
        path = write(tmp_path / "run.safetensors", tensors, metadata | {"skipped_steps": text})
        return refusal(path)

    for text in ("x", "3", "[0]", "[7]", "[-1]", "[1.5]", "[true]", "{}", "[" * 10_000):
        assert "needed a JSON list of timesteps" in said(text)
    assert "never had a gradient" in said("[1, 2, 3, 4, 5, 6]")
    assert "`W` changes after timestep 5" in said("[6]")
    path = write(tmp_path / "run.safetensors", tensors, metadata | {"skipped_steps": "[]"})
    with jaxaudit.open_recording(path) as recording:
        assert recording.steps == STEPS


def test_rates_and_losses_of_skipped_steps(tmp_path):
    tensors = small_run((5, 3, 2))
    tensors |= {"losses": f32([0, 1, 2, 3, 4]), "learning_rate": f32([0, 0.1, 0.2, 0.3, 0.4])}
    path = write(tmp_path / "run.safetensors", tensors, {"skipped_steps": "[2]"})
    with jaxaudit.open_recording(path) as recording:
        assert recording.losses is not None and recording.hyperparameters is not None
        assert recording.losses.tolist() == [1, 3, 4] and recording.steps == 3
        assert recording.hyperparameters.learning_rate.tolist() == [0.1, 0.3, 0.4]
        window = recording.at(2, (0, 3))
        assert window.tensors["grad"].tobytes() == tensors["grad_W"][1][3].tobytes()
        assert window.tensors["param"].tobytes() == tensors["W"][1][[1, 3]].tobytes()


def test_keys_are_one_table():
    assert set(TENSOR_KEYS.values()) == {*BIG, "max_variance_W", "compensation_W"}


def test_nothing_heavy_is_imported(tmp_path, run):
    """Reading HDF5 and torch files loads neither h5py nor torch nor JAX into the process."""
    import subprocess

    path = writers.write_hdf5(tmp_path / "run.h5", *run)
    code = (
        f"import sys, jaxaudit; jaxaudit.open_recording({str(path)!r}).close();"
        "print({'h5py', 'torch', 'jax'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
