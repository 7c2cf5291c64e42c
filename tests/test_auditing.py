"""The audit from file to dataset: on real optimizer runs, and on runs with planted faults."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import xarray as xr
from recordings import f64, write

import jaxaudit
from jaxaudit import (
    auditing,
    comparison,
    conformance,
    operations,
    provenance,
    replay,
    results,
    strips,
    workbench,
)
from jaxaudit.devices import BackendError
from jaxaudit.floats import BFLOAT16, decode, encode
from jaxaudit.ledger import courses
from jaxaudit.recorders import RecordingWriter, RowLayout
from jaxaudit.recording import TokenGroups
from jaxaudit.safetensors_file import SafetensorsFile

torch = pytest.importorskip("torch")
from jaxaudit.recorders.pytorch import Recorder  # noqa: E402  (needs torch)

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
STEPS = 9


def record(path, shape=(12, 16), dtype="BF16", steps=STEPS, seed=0, adamw=True, **options):
    """Record a run of torch's own optimizer over random gradients."""
    moments = options.pop("moments", "native")
    scale = options.pop("scale", 1e-3)
    rates = options.pop("rates", None)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda size: torch.randn(shape, generator=generator) * size  # noqa: E731
    parameter = torch.nn.Parameter(draw(0.02).to(TORCH[dtype]))
    kind = torch.optim.AdamW if adamw else torch.optim.Adam
    optimizer = kind([parameter], **({"lr": 1e-3, "weight_decay": 0.0, "foreach": False} | options))
    with Recorder(path, parameter, optimizer, moments=moments) as recorder:
        for k in range(steps):
            if rates is not None:
                optimizer.param_groups[0]["lr"] = rates[k]
            parameter.grad = draw(scale).to(TORCH[dtype])
            optimizer.step()
            recorder(float(k))
    return path


def copy(source, target, change=None, drop=(), metadata=None):
    """Write a recording again with some tensors changed or left out."""
    with SafetensorsFile(source) as file:
        tensors = {name: file.read(name) for name in file.tensors}
        dtypes = {name: tensor.dtype for name, tensor in file.tensors.items()}
        strings = dict(file.metadata) if metadata is None else metadata
    if change:
        change(tensors)
    header, offset = {"__metadata__": strings}, 0
    kept = {name: array for name, array in tensors.items() if name not in drop}
    for name, array in kept.items():
        end = offset + array.nbytes
        header[name] = {
            "dtype": dtypes[name],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    with open(target, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in kept.values():
            file.write(np.ascontiguousarray(array).tobytes())
    return target


def audit(path, groups=None, **options):
    with jaxaudit.open_recording(path) as recording:
        return jaxaudit.audit(recording, groups, **({"backend": "cpu"} | options))


def mismatches(dataset, arithmetic="torch-cpu-loop"):
    counts = dataset.mismatch_count.sel(arithmetic=arithmetic, token_group="all").sum("timestep")
    return {str(stage): int(counts.sel(stage=stage)) for stage in counts.stage.values}


USUAL = "float32-then-bfloat16"
FEW = ["torch-cpu-loop", USUAL, "float32"]
EXACT = {"exp_avg": 0, "exp_avg_sq": 0, "param": 0}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return record(tmp_path_factory.mktemp("run") / "run.safetensors", moments="float32")


@pytest.fixture(scope="module")
def audited(recorded):
    return audit(recorded, arithmetics=FEW)


RUNS = [
    {"shape": (7, 5)},
    {"shape": (41,)},
    {"shape": (3, 2, 5, 3), "dtype": "F16", "eps": 1e-6},
    {"shape": (12, 16), "moments": "float32", "weight_decay": 0.1, "lr": 0.02},
    {"shape": (33, 31), "adamw": False, "weight_decay": 0.1},
    {"shape": (300, 137), "adamw": False, "weight_decay": 0.1},
    {"shape": (5, 300), "amsgrad": True, "maximize": True},
    {"shape": (12, 16), "rates": [1e-3 * 0.77**k for k in range(STEPS)]},
    {"shape": (12, 16), "scale": 1e-20},
    {"shape": (12, 16), "betas": (0.2, 0.9), "dtype": "F16", "scale": 10.0},
]


@pytest.mark.parametrize("options", RUNS, ids=lambda o: ",".join(f"{k}" for k in o))
def test_real_runs_replay_exactly(tmp_path, options):
    dataset = audit(record(tmp_path / "run.safetensors", **options), arithmetics=["torch-cpu-loop"])
    assert mismatches(dataset) == EXACT
    assert (dataset.audited == 1).all()
    assert dataset.attrs["identified_arithmetic"] == "torch-cpu-loop"


FLOAT32_RUNS = [
    {"weight_decay": 0.1},
    {"adamw": False, "weight_decay": 0.1, "amsgrad": True, "shape": (41, 7)},
    {"foreach": True},
]


@pytest.mark.parametrize("options", FLOAT32_RUNS, ids=lambda o: ",".join(f"{k}" for k in o))
def test_float32_runs_replay_exactly_whatever_the_processor_s_square_root(tmp_path, options):
    """Intel's library takes another root on AMD processors; over lists, float32 is as one by one."""
    path = record(tmp_path / "run.safetensors", dtype="F32", **options)
    dataset = audit(path, arithmetics="torch-cpu-loop")
    assert mismatches(dataset) == EXACT and (dataset.audited == 1).all()
    probe = np.linspace(1, 4, 4096, dtype=np.float32)
    ieee = np.array_equal(torch.sqrt(torch.from_numpy(probe)).numpy(), np.sqrt(probe))
    found = json.loads(dataset.attrs["arithmetics"])["torch-cpu-loop"]["variant"]
    assert found == ("" if ieee else "square root of MKL on AMD")


def run_fused(path):
    """Record torch's fused kernel."""
    return record(path, shape=(13, 17), foreach=None, fused=True, weight_decay=0.1, adamw=False)


def test_each_implementation_is_told_from_the_others_by_the_bits_alone(tmp_path):
    """Without metadata: runs that the loop does not explain, found among all of the catalogue."""
    runs = {
        "torch-cpu-fused": run_fused(tmp_path / "fused.safetensors"),
        "torch-cpu-foreach": record(
            tmp_path / "foreach.safetensors",
            foreach=True,
            weight_decay=0.1,
            lr=0.05,
            betas=(0.9, 0.99),
            shape=(30, 50),
        ),
    }
    for name, path in runs.items():
        bare = copy(path, tmp_path / "bare.safetensors", metadata={})
        dataset = audit(bare)
        identified = dataset.attrs["identified_arithmetic"].split(",")
        assert name in identified and "torch-cpu-loop" not in identified
        assert all(mismatches(dataset, each) == EXACT for each in identified)
        assert USUAL in dataset.arithmetic.values and mismatches(dataset, USUAL)["param"] > 0


def test_master_weights_are_found_behind_their_copies(tmp_path):
    """Float32 Adam, of whose weights the recording holds bfloat16 copies; with and without its moments."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.nn.Parameter((torch.randn(8, 40, generator=draw) * 0.02).bfloat16().float())
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.1, foreach=False)
    rows = {"W": [weight.detach().bfloat16()], "grad_W": [torch.zeros(8, 40).bfloat16()]}
    rows |= {"momentum_W": [torch.zeros(8, 40)], "variance_W": [torch.zeros(8, 40)]}
    for _ in range(12):
        gradient = (torch.randn(8, 40, generator=draw) * 1e-3).bfloat16()
        weight.grad = gradient.float()
        optimizer.step()
        state = optimizer.state[weight]
        new = (weight.detach().bfloat16(), gradient, state["exp_avg"], state["exp_avg_sq"])
        for key, value in zip(rows, new, strict=True):
            rows[key].append(value.clone())
    tensors = {}
    for key, values in rows.items():
        whole = torch.stack(values)
        kind = (
            (torch.int16, "<u2", "BF16") if key in ("W", "grad_W") else (torch.int32, "<u4", "F32")
        )
        tensors[key] = kind[2], whole.view(kind[0]).numpy().view(kind[1])
    given = {"learning_rate": 1e-3, "weight_decay": 0.1}
    given |= {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    tensors |= {key: f64(value) for key, value in given.items()}
    path = write(tmp_path / "master.safetensors", tensors)
    names = ["float32-master", "torch-cpu-loop"]
    # Windows that come out even make fewer programs; where the moments are there too, the last one is shorter.
    for lacking, length in (([], 5), (["momentum_W", "variance_W"], 6)):
        part = {key: value for key, value in tensors.items() if key not in lacking}
        dataset = audit(write(path, part), arithmetics=names, window_steps=length)
        assert dataset.attrs["identified_arithmetic"] == "float32-master"
        assert all(mismatches(dataset, "float32-master")[s] in (0, -12) for s in EXACT)
        assert mismatches(dataset, "float32-master")["param"] == 0
        assert mismatches(dataset)["param"] > 0
    # The run's own weight is what the bits of the copies and their start give: a later part needs the start.
    later = audit(write(path, tensors), arithmetics=names, steps=(6, 11), window_steps=5)
    assert mismatches(later, "float32-master") == EXACT


def test_the_dataset_is_the_one_of_the_contract(audited):
    usual = set(results.VARIABLES) - (results.OPTIONAL - {"loss"})
    assert usual == set(audited.data_vars)
    assert audited.timestep.values.tolist() == list(range(1, STEPS + 1))
    for name in usual:
        field = results.VARIABLES[name]
        assert audited[name].dims == field.dims, name
        assert audited[name].dtype == field.dtype, name
        assert audited[name].attrs["units"] and audited[name].attrs["long_name"]
    wanted = (
        "identified_arithmetic hyperparameters source source_sha256_head state_precision backend device "
        "jax_version jaxlib_version xla_flags jaxaudit_version created_at command schema_version Conventions"
    )
    assert set(wanted.split()) <= set(audited.attrs)
    assert all(isinstance(value, str | int) for value in audited.attrs.values())
    assert audited.attrs["state_precision"].count("bfloat16 (stored as float32") == 2
    assert audited.loss.values.tolist() == [float(k) for k in range(STEPS)]


def test_norms_and_counts_agree_with_numpy(recorded, audited):
    """The other arithmetic's numbers, from NumPy alone and the replay's own published formula."""
    with SafetensorsFile(recorded) as file:
        w = decode(file.read("W"), BFLOAT16).reshape(STEPS + 1, -1)
        m, v = (file.read(k).view(np.float32).reshape(STEPS + 1, -1) for k in ("momentum_W", "variance_W"))  # fmt: skip
    one = audited.sel(arithmetic="float32-then-bfloat16", token_group="all")
    observed = w[1:].astype(np.float64) - w[:-1]
    # Sums of positive terms along chains of at most 90 additions (slices and lanes here, vector lanes in
    # NumPy): 90 * 2^-53 relative, of which the root keeps half.
    np.testing.assert_allclose(one.norm_observed, np.linalg.norm(observed, axis=1), rtol=1e-14)
    for k in range(STEPS):
        f = np.float32
        first = f(1e-3) * (m[k + 1] / f(1 - 0.9 ** (k + 1)))
        update = first / (np.sqrt(v[k + 1] / f(1 - 0.999 ** (k + 1))) + f(1e-8))
        patterns = encode(w[k] - update, BFLOAT16)
        p = decode(patterns, BFLOAT16)
        part = one.isel(timestep=k)
        differ = patterns != encode(w[k + 1], BFLOAT16)
        assert int(part.mismatch_count.sel(stage="param")) == differ.sum()
        change = p.astype(np.float64) - w[k]
        # Sums of 192 products in float64, in another order: 192 roundings of half an ulp at most.
        close = {"rtol": 192 * 2.0**-53, "atol": 0}
        np.testing.assert_allclose(part.norm_predicted, np.linalg.norm(change), **close)
        np.testing.assert_allclose(
            part.norm_difference, np.linalg.norm(p.astype(np.float64) - w[k + 1]), **close
        )
        cosine = change @ observed[k] / np.linalg.norm(change) / np.linalg.norm(observed[k])
        # Three sums on either side, each within 192 * 2^-53, the two norms' halved by the root, and nearly
        # parallel changes, whose products hardly cancel: 4 * 192 * 2^-53 < 1e-13.
        np.testing.assert_allclose(part.cosine_similarity, cosine, rtol=1e-13)


def test_an_exact_replay_has_a_cosine_of_one(audited):
    exact = audited.sel(arithmetic="torch-cpu-loop")
    # a / (sqrt(a) * sqrt(a)): two roots, a product and a quotient, half an ulp each.
    assert (abs(exact.cosine_similarity - 1) <= 4 * 2.0**-53).all()
    assert (exact.ratio == 1).all() and (exact.norm_difference == 0).all()


def test_unrounded_weights_are_compared_as_float32(audited):
    at = {"token_group": "all", "stage": "param"}
    unrounded = audited.sel(arithmetic="float32", **at)
    assert (unrounded.mismatch_count > 150).all()  # hardly ever a bfloat16 number
    # Their distance is taken after rounding, which is all that the other arithmetic adds.
    rounded = audited.sel(arithmetic="float32-then-bfloat16", **at)
    assert np.array_equal(unrounded.max_ulp_distance, rounded.max_ulp_distance)


FLIPS = [
    ("W", 4, 5, 3, "param", 0x0001),
    ("W", 9, 11, 15, "param", 0x8000),
    ("momentum_W", 3, 0, 0, "exp_avg", 0x00010000),
    ("momentum_W", 1, 7, 9, "exp_avg", 0x00000001),
    ("variance_W", 6, 2, 14, "exp_avg_sq", 0x00400000),
]


@pytest.mark.parametrize("key,t,token,position,stage,bit", FLIPS)
def test_one_flipped_bit_is_found_and_named(
    recorded, tmp_path, key, t, token, position, stage, bit
):
    seen = {}

    def flip(tensors):
        seen["before"] = int(tensors[key][t, token, position])
        tensors[key][t, token, position] ^= tensors[key].dtype.type(bit)

    path = copy(recorded, tmp_path / "flipped.safetensors", flip)
    dataset = audit(path, arithmetics=["torch-cpu-loop"])
    first = dataset.first_mismatch.sel(arithmetic="torch-cpu-loop", stage=stage)
    assert dict(zip(results.MISMATCH_FIELDS[:4], first.values[:4].tolist(), strict=True)) == {
        "timestep": t,
        "token": token,
        "position": position,
        "recorded_bits": seen["before"] ^ bit,
    }
    # float32 copies of bfloat16 moments are replayed as bfloat16: the upper half of the pattern.
    assert int(first.sel(mismatch_field="replayed_bits")) == seen["before"] >> (
        0 if key == "W" else 16
    )
    at = dataset.mismatch_count.sel(stage=stage, timestep=t, token_group="all")
    assert int(at.sum()) == 1
    ulp = int(dataset.max_ulp_distance.sel(stage=stage, timestep=t, token_group="all").sum())
    assert ulp == bit if bit != 0x8000 else ulp > 1
    assert dataset.attrs["identified_arithmetic"] == ""


def test_windows_do_not_change_a_bit(tmp_path):
    path = record(tmp_path / "run.safetensors", shape=(50, 24), steps=70, moments="float32")
    groups = TokenGroups(50, {"all": np.arange(50), "odd": np.arange(1, 50, 2)})
    names = ["torch-cpu-loop", "float32-then-bfloat16"]
    whole = audit(path, groups, arithmetics=names, window_steps=64)
    for length in (1, 7):
        other = audit(path, groups, arithmetics=names, window_steps=length)
        assert_same_bits(whole, other)


def test_strips_change_no_count(tmp_path, monkeypatch):
    """Rows are cut into strips; groups' sums add up strip by strip."""
    path = record(
        tmp_path / "run.safetensors", shape=(50, 24), steps=5, adamw=False, weight_decay=0.1
    )
    groups = TokenGroups(50, {"all": np.arange(50), "few": np.array([0, 1, 49])})
    whole = audit(path, groups, arithmetics=USUAL)
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 24 * 13)
    cut = audit(path, groups, arithmetics=USUAL)
    for name in ("mismatch_count", "max_ulp_distance", "first_mismatch", "nonfinite_count"):
        assert np.array_equal(whole[name], cut[name]), name
    # Positive terms, added in another order along chains of at most 90 additions, and a root.
    np.testing.assert_allclose(whole.norm_predicted, cut.norm_predicted, rtol=1e-14)


@pytest.mark.parametrize(
    ("memory", "elements"),
    [({}, 1 << 22), (None, 1 << 22), (2 << 30, 1 << 22), (6 << 30, 12 << 20), (80 << 30, 1 << 25)],
)
def test_windows_are_as_large_as_the_device_allows(memory, elements):
    class Fake:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": memory} if isinstance(memory, int) else memory

    assert workbench.window_elements((Fake(),)) == elements
    assert workbench.window_elements(tuple(jax.devices("cpu"))) == workbench.WINDOW_ELEMENTS


def assert_same_bits(a, b):
    for name in a.data_vars:
        assert a[name].values.tobytes() == b[name].values.tobytes(), name


CHILD = """
import sys, os
os.sched_setaffinity(0, set(map(int, sys.argv[3].split(","))))
import jaxaudit
with jaxaudit.open_recording(sys.argv[1]) as recording:
    jaxaudit.save(jaxaudit.audit(recording, arithmetics="float32-then-bfloat16", backend="cpu"), sys.argv[2])
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_cores_do_not_change_a_bit(tmp_path):
    path = record(tmp_path / "run.safetensors", shape=(500, 64), steps=12, moments="float32")
    cores = sorted(map(str, os.sched_getaffinity(0)))
    found = []
    for count in (1, 2):
        target = tmp_path / f"{count}.nc"
        command = [sys.executable, "-c", CHILD, str(path), str(target), ",".join(cores[:count])]
        subprocess.run(command, check=True, capture_output=True, timeout=200)
        found.append(xr.load_dataset(target))
    assert_same_bits(*found)


SEVERAL = """
import sys, jax, jaxaudit, xarray as xr
assert len(jax.devices()) == 8
with jaxaudit.open_recording(sys.argv[1]) as recording:
    for count in map(int, sys.argv[4:]):
        # Of 12 steps; the last window is shorter than the others in one case, which is a program more for each.
        options = dict(arithmetics=sys.argv[3].split(","), backend="cpu", devices=count)
        options |= {"window_steps": 5} if "ledger" in sys.argv[2] else {"window_steps": 4, "ledger": None}
        tree = jaxaudit.audit_tree(recording, **options)
        assert tree.attrs["device_count"] == count
        tree.to_netcdf(f"{sys.argv[2]}-{count}.nc")
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "case",
    [  # rows that come out even, and rows that do not, without recorded moments
        ("even-with-ledger", (16, 24), [], {}, "12"),
        ("odd", (13, 33), ["momentum_W", "variance_W"], {"weight_decay": 0.1}, "18"),
    ],
    ids=lambda case: case[0],
)
def test_devices_do_not_change_a_bit(tmp_path, case):
    name, shape, drop, options, counts = case
    path = record(tmp_path / "run.safetensors", shape=shape, steps=12, **options)
    path = copy(path, tmp_path / "kept.safetensors", drop=drop) if drop else path
    script = [sys.executable, "-c", SEVERAL, str(path), str(tmp_path / name)]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run(
        [*script, "torch-cpu-loop,float32-then-bfloat16", *counts],
        check=True,
        timeout=300,
        env=environment,
    )
    trees = [xr.load_datatree(tmp_path / f"{name}-{count}.nc") for count in counts]
    assert (trees[0].mismatch_count.sel(arithmetic="torch-cpu-loop", stage="param") == 0).all()
    assert (trees[0].mismatch_count.sel(arithmetic=USUAL, stage="param").sum() > 0).all()
    for other in trees[1:]:
        for group, node in trees[0].subtree_with_keys:
            assert_same_bits(node.to_dataset(inherit=False), other[group].to_dataset(inherit=False))


def test_more_devices_than_there_are(recorded):
    with pytest.raises(BackendError, match="3 devices were asked for, but there is 1"):
        audit(recorded, devices=3)
    with pytest.raises(BackendError, match=r"there is 1 \(cpu\). Ask for 1\."):
        audit(recorded, devices=0)


def test_a_device_with_memory_of_its_own_finds_the_same(
    recorded, audited, monkeypatch, fresh_programs
):
    """Flags are combined where they are made, and fetched only where there are some."""
    for module in (replay, comparison):
        monkeypatch.setattr(module, "on_host", lambda device: False)
    comparison._inspect_program.cache_clear()
    try:
        found = audit(recorded, arithmetics=FEW)
    finally:
        comparison._inspect_program.cache_clear()
    assert_same_bits(found, audited)
    assert json.loads(found.attrs["self_test"]) == json.loads(audited.attrs["self_test"])


def test_quotients_and_roots_through_float64_are_the_same(
    recorded, audited, monkeypatch, fresh_programs
):
    """What NVIDIA's GPUs need: XLA's float32 quotients and roots are approximations there."""
    monkeypatch.setattr(operations, "approximates", lambda device: True)
    with jax.enable_x64(True):
        assert conformance.inexact_operations(jax.devices("cpu")[0], "float32") == ()
    found = audit(recorded, arithmetics=FEW)
    assert_same_bits(found, audited)
    assert json.loads(found.attrs["self_test"]) == json.loads(audited.attrs["self_test"])


def test_remedies_through_float64_are_the_same(recorded, monkeypatch, fresh_programs):
    with jaxaudit.open_recording(recorded) as recording:
        options = {"arithmetics": "torch-cpu-loop", "backend": "cpu"}
        known = auditing.audit_groups(recording, **options)
        for module in (operations, courses):
            monkeypatch.setattr(module, "approximates", lambda device: True)
        courses.step_program.cache_clear()
        found = auditing.audit_groups(recording, **options)
    assert_same_bits(found["counterfactual"], known["counterfactual"])
    assert json.loads(found[""].attrs["self_test"])["remedies in float32"] == "passed"


@pytest.mark.parametrize("found", [0, 1])
def test_flags_that_are_combined_wrongly_are_noticed(recorded, monkeypatch, fresh_programs, found):
    monkeypatch.setattr(replay, "on_host", lambda device: False)
    monkeypatch.setattr(replay, "any_bits", lambda flags: flags[0, 0] * 0 + found)
    with pytest.raises(replay.SelfTestError, match="combined on the device are not those"):
        audit(recorded, arithmetics=FEW)


def test_a_range_of_steps_is_that_part_of_the_whole(recorded, audited):
    part = audit(recorded, arithmetics=FEW, steps=(4, 7))
    assert part.timestep.values.tolist() == [4, 5, 6]
    assert_same_bits(
        part.drop_vars("first_mismatch"),
        audited.drop_vars("first_mismatch").sel(timestep=[4, 5, 6]),
    )
    with pytest.raises(ValueError, match="outside the recording, which holds 1:10"):
        audit(recorded, steps=(4, 11))


def test_without_gradients_the_moments_are_not_audited(recorded, tmp_path):
    path = copy(recorded, tmp_path / "x.safetensors", drop=["grad_W"])
    dataset = audit(path, arithmetics=FEW)
    assert dataset.audited.sel(arithmetic="torch-cpu-loop").values.tolist() == [0, 0, 1]
    assert (dataset.mismatch_count.sel(stage=["exp_avg", "exp_avg_sq"]) == -1).all()
    assert mismatches(dataset)["param"] == 0
    assert "exp_avg, exp_avg_sq not audited" in jaxaudit.describe(dataset)


@pytest.mark.parametrize("drop", [["momentum_W", "variance_W"], ["variance_W"]])
@pytest.mark.parametrize("steps", [None, (4, 8)])
def test_without_moments_they_are_run_freely(recorded, tmp_path, drop, steps):
    path = copy(recorded, tmp_path / "x.safetensors", drop=drop)
    dataset = audit(path, steps=steps, window_steps=2, arithmetics=FEW[:2])
    assert dataset.audited.sel(arithmetic="torch-cpu-loop", stage="param") == 1
    assert dataset.audited.sel(arithmetic="torch-cpu-loop", stage="exp_avg_sq") == 0
    assert dataset.nonfinite_count.sizes["tensor"] == 4 - len(drop)
    assert mismatches(dataset)["param"] == 0
    assert mismatches(dataset, USUAL)["param"] > 0
    assert dataset.attrs["identified_arithmetic"] == "torch-cpu-loop"


def test_weights_alone_are_observed_and_nothing_passes(recorded, tmp_path):
    path = copy(recorded, tmp_path / "x.safetensors", drop=["grad_W", "momentum_W", "variance_W"])
    dataset = audit(path)
    assert (dataset.audited == 0).all() and (dataset.mismatch_count == -1).all()
    assert (dataset.norm_observed > 0).all() and np.isnan(dataset.norm_predicted).all()
    assert dataset.attrs["identified_arithmetic"] == ""
    assert "not audited" in jaxaudit.describe(dataset)


def test_frozen_timesteps_agree(tmp_path):
    """A learning rate of zero freezes everything: NaN in the table, agreement in the summary."""
    path = record(tmp_path / "run.safetensors", rates=[0.0] * STEPS)
    dataset = audit(path, arithmetics=FEW)
    assert (dataset.norm_observed == 0).all() and np.isnan(dataset.ratio).all()
    found = jaxaudit.summarize(dataset)["arithmetics"]["float32-then-bfloat16"]
    assert found["timesteps_with_ratio_within_1_percent"]["all"] == STEPS
    assert found["timesteps_with_cosine_above_0.99"]["all"] == STEPS


def test_subnormal_weights_and_states_are_audited(tmp_path):
    def shrink(tensors):
        tensors["W"][:] = np.random.default_rng(0).integers(0, 3, tensors["W"].shape)

    source = record(tmp_path / "run.safetensors", scale=1e-25)
    with jax.enable_x64(True):
        dataset = audit(copy(source, tmp_path / "tiny.safetensors", shrink), arithmetics=FEW)
    assert mismatches(dataset)["exp_avg"] == mismatches(dataset)["exp_avg_sq"] == 0
    assert (dataset.norm_observed > 0).all() and (dataset.norm_observed < 1e-35).all()


def test_low_precision_state_is_told_from_float32_state(tmp_path):
    """True float32 moments under bfloat16 weights: the bits say so."""
    source = record(tmp_path / "run.safetensors", moments="float32")

    def widen(tensors):
        tensors["variance_W"][1:, 0, :3] |= np.uint32(1)

    dataset = audit(copy(source, tmp_path / "x.safetensors", widen), arithmetics=FEW)
    count = dataset.unrepresentable_count.sel(tensor="variance_W", token_group="all")
    assert (count == 3).all()
    assert (
        "exp_avg_sq: float32 (stored as float32; 1,701 of 1,728" in dataset.attrs["state_precision"]
    )
    assert (
        "exp_avg: bfloat16 (stored as float32; 1,728 of 1,728" in dataset.attrs["state_precision"]
    )


def test_groups_of_the_recording_itself(tmp_path):
    layouts = {"W": RowLayout("BF16", (4, 2))}
    path = tmp_path / "x.safetensors"
    with RecordingWriter(path, layouts) as writer:
        for k in range(3):
            writer.append({"W": np.full((4, 2), 0x3C00 + k, np.uint16)})
        writer.small["dead_mask"] = np.array([1, 0, 0, 1], np.uint8)
    dataset = audit(path)
    assert dataset.token_group.values.tolist() == ["all", "dead", "live"]
    assert dataset.element_count.values.tolist() == [8, 4, 4]


def test_errors_name_what_is_wrong(recorded):
    with pytest.raises(ValueError, match="unknown arithmetic 'adam'; there are torch-cpu-loop"):
        audit(recorded, arithmetics=["adam"])
    with pytest.raises(BackendError, match="'tpu' is not available .present: cpu"):
        audit(recorded, backend="tpu")
    with pytest.raises(jaxaudit.FileError, match="over 3 tokens, but the recording has 12"):
        audit(recorded, TokenGroups(3, {"all": np.arange(3)}))


def test_progress_is_what_was_done(recorded):
    seen = []
    audit(recorded, progress=lambda *told: seen.append(told), window_steps=4, arithmetics=USUAL)
    with jaxaudit.open_recording(recorded) as recording:
        whole = recording.bytes
    step = whole // (STEPS + 1)
    assert [timestep for *_, timestep in seen] == [0, 4, 8, STEPS]
    assert [done for done, *_ in seen] == [step * timestep for *_, timestep in seen]
    assert {total for _, total, _ in seen} == {step * STEPS}


def test_the_audit_runs_without_torch(recorded, tmp_path):
    """No import of torch on the way from file to NetCDF."""
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import jaxaudit\n"
        "with jaxaudit.open_recording(sys.argv[1]) as r:\n"
        "    jaxaudit.save(jaxaudit.audit(r, backend='cpu'), sys.argv[2])\n"
    )
    target = tmp_path / "x.nc"
    command = [sys.executable, "-c", script, str(recorded), str(target)]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    identified = results.load(target).attrs["identified_arithmetic"].split(",")
    assert identified[0] == "torch-cpu-loop"  # which the metadata claim


def test_identify_ranks_and_finds_the_open_options(tmp_path):
    options = {"adamw": False, "weight_decay": 0.1, "shape": (300, 137)}
    path = record(tmp_path / "run.safetensors", **options)
    bare = copy(path, tmp_path / "bare.safetensors", metadata={})
    with jaxaudit.open_recording(bare) as recording:
        ranked = jaxaudit.identify(recording, backend="cpu")
    names, fits = ranked.arithmetic.values.tolist(), ranked.fits.values
    assert fits[0] == 1 and fits.tolist() == sorted(fits.tolist(), reverse=True)
    assert "torch-cpu-loop" in names[: fits.sum()] and USUAL not in names[: fits.sum()]
    assert np.array_equal(ranked.confirmed, fits)
    of = {name: ranked.sel(arithmetic=name) for name in names}
    found = json.loads(str(of["torch-cpu-loop"].options.values))
    assert found["decoupled"] is False
    # 41,100 elements are split between two threads at most.
    assert min(found["threads"], 2) == min(torch.get_num_threads(), 2)
    assert json.loads(str(of["torch-cpu-loop"].hyperparameters.values)) == {}
    assert (of["torch-cpu-loop"].mismatch_share == 0).all()
    # What fits was replayed whole, what does not on a few elements.
    assert int(of["torch-cpu-loop"].compared_count) == STEPS * 300 * 137
    assert 0 < int(of[USUAL].compared_count) < STEPS * 300 * 137
    assert float(of[USUAL].mismatch_share.max()) > 0 and str(of[USUAL].diagnosis.values)
    assert str(of["torch-cpu-loop"].diagnosis.values) == ""
    # All that fit are told apart by inputs that the recording does not have, or nobody knows any.
    apart = ranked.told_apart_by.values
    for i in range(len(names)):
        for j in range(len(names)):
            assert bool(apart[i, j]) == (i != j and fits[i] == fits[j] == 1)
    assert mismatches(audit(bare, arithmetics=["torch-cpu-loop"])) == EXACT


def test_the_claimed_arithmetic_is_the_first_of_those_that_cannot_be_told_apart(recorded):
    """And all of them are replayed in full: a claim is never a shortcut past the check."""
    dataset = audit(recorded)
    identified = dataset.attrs["identified_arithmetic"].split(",")
    assert identified[0] == "torch-cpu-loop" == dataset.arithmetic.values[0]
    assert USUAL not in identified and USUAL in dataset.arithmetic.values
    for name in identified:
        assert mismatches(dataset, name) == EXACT


def test_a_false_claim_does_not_make_an_arithmetic_fit(tmp_path):
    path = run_fused(tmp_path / "run.safetensors")
    with SafetensorsFile(path) as file:
        claims = dict(file.metadata) | {"implementation": "torch-cpu-loop"}
    dataset = audit(copy(path, tmp_path / "liar.safetensors", metadata=claims))
    identified = dataset.attrs["identified_arithmetic"].split(",")
    assert "torch-cpu-fused" in identified and "torch-cpu-loop" not in identified


def test_identification_without_moments_or_gradients(recorded, tmp_path):
    """Moments are run freely from zero; without gradients the weights and moments alone tell."""
    path = copy(recorded, tmp_path / "x.safetensors", drop=["momentum_W", "variance_W"])
    with jaxaudit.open_recording(path) as recording:
        ranked = jaxaudit.identify(recording, backend="cpu")
    fitting = ranked.arithmetic.values[ranked.fits.values == 1].tolist()
    assert "torch-cpu-loop" in fitting and USUAL not in fitting
    own = ranked.sel(arithmetic="torch-cpu-loop")
    assert own.mismatch_count.values.tolist() == [-1, -1, 0]
    assert np.isnan(own.mismatch_share.values[:2]).all()
    path = copy(recorded, tmp_path / "y.safetensors", drop=["grad_W"])
    with jaxaudit.open_recording(path) as recording:
        ranked = jaxaudit.identify(recording, backend="cpu")
    fitting = ranked.arithmetic.values[ranked.fits.values == 1].tolist()
    assert "torch-cpu-loop" in fitting and USUAL not in fitting
    assert (ranked.sel(arithmetic="torch-cpu-loop").mismatch_count == [-1, -1, 0]).all()


def test_identification_of_what_tells_nothing(recorded, tmp_path):
    path = copy(recorded, tmp_path / "x.safetensors", drop=["grad_W", "momentum_W", "variance_W"])
    with (
        jaxaudit.open_recording(path) as recording,
        pytest.raises(jaxaudit.FileError, match="nothing can be replayed|weights alone"),
    ):
        jaxaudit.identify(recording, backend="cpu")


def test_version_is_known():
    assert provenance.version_of("jaxaudit")
