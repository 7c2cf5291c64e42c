"""Each arithmetic left to itself: against loops in NumPy, over windows, ranges of steps and partial recordings."""

import importlib
import json

import numpy as np
import pytest
import xarray as xr

torch = pytest.importorskip("torch")

import runs  # noqa: E402  (needs torch)

import jaxaudit  # noqa: E402
from jaxaudit import auditing, results  # noqa: E402
from jaxaudit.arithmetics import CATALOGUE, Options  # noqa: E402
from jaxaudit.floats import BFLOAT16, FLOAT32, decode, encode, ordered  # noqa: E402

STEPS, ROWS, WIDTH = 12, 20, 15
DEAD = np.arange(ROWS) < 6
MOMENTS = ("momentum_W", "variance_W")
OTHERS = ["float32-then-bfloat16", "torch-cuda-fused", "torch-cpu-foreach", "float32", "float32-master"]  # fmt: skip


def shaped(run):
    """Return a run's tensors with rows of several values, and groups of rows."""
    shape = (run.setting.steps + 1, ROWS, WIDTH)
    arrays = runs.prove.arrays_of(run)
    return {k: x.reshape(shape) for k, x in arrays.items() if k.endswith("W")} | {"dead_mask": DEAD}


@pytest.fixture(scope="module")
def run():
    """Torch's own run, whose gradients vary enough for other arithmetics to part from it."""
    options = Options(amsgrad=False)
    given = runs.setting(BFLOAT16, ROWS * WIDTH, STEPS, options, weight_decay=0.1, rate=3e-3)
    return runs.MAKERS["loop"].make(given)


@pytest.fixture(scope="module")
def path(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("free")
    return runs.save(folder / "run.safetensors", run, change=shaped(run))


def free_run(path, **how):
    with jaxaudit.open_recording(path) as recording:
        return jaxaudit.free_run(recording, **({"backend": "cpu"} | how))


def both(recording, **how):
    """Return the audit and the free run of one reading."""
    found = auditing.audit_groups(recording, ledger=None, **how)
    return found[""], found["free_run"]


def own_weights(run, name, start=0):
    """Leave an arithmetic to itself in NumPy, from a recorded state; return float32 values (T + 1 - start, n)."""
    tensors = {key: decode(run.patterns[key][start], run.formats[key]) for key in ("param", "exp_avg", "exp_avg_sq")}  # fmt: skip
    gradients = decode(run.patterns["grad"][start:], run.formats["grad"])
    given = run.setting
    count = runs.StepCount(first=start + 1)
    rates = given.hyperparameters.learning_rate[start:]
    numbers = runs.dataclasses.replace(given.hyperparameters, learning_rate=rates, count=count)
    changed = runs.dataclasses.replace(
        given, values=tensors | {"grad": gradients}, hyperparameters=numbers
    )
    own = runs.take(changed, CATALOGUE[name])
    return decode(own.patterns["param"], own.formats["param"])


def check(found, own, recorded, groups=None):
    """Hold the numbers of one arithmetic against its own weights and the recorded ones, (T, n) each."""
    groups = groups or {"all": np.ones(ROWS, bool), "dead": DEAD, "live": ~DEAD}
    fmt = BFLOAT16
    for group, rows in groups.items():
        inside = np.repeat(rows, WIDTH)
        one = found.sel(token_group=group)
        a, b = own[:, inside], recorded[:, inside]
        wrong = a.view(np.uint32) != b.view(np.uint32)
        assert np.array_equal(one.mismatch_count, wrong.sum(axis=1))
        distance = np.abs(ordered(encode(a, fmt), fmt) - ordered(encode(b, fmt), fmt))
        assert np.array_equal(one.max_ulp_distance, distance.max(axis=1))
        norm = np.sqrt(((a.astype(np.float64) - b) ** 2).sum(axis=1))
        assert np.allclose(one.norm_divergence, norm, rtol=1e-12, atol=0)
        apart = np.flatnonzero(wrong.any(axis=1))
        first = found.timestep.values[apart[0]] if apart.size else 0
        assert one.first_divergence == first


def test_exact_arithmetic_never_parts(path):
    found = free_run(path, arithmetics="torch-cpu-loop").squeeze("arithmetic")
    assert (found.first_divergence == 0).all()
    assert (found.mismatch_count == 0).all() and (found.max_ulp_distance == 0).all()
    assert (found.norm_divergence == 0).all()


def test_dataset_is_labelled(path):
    found = free_run(path, arithmetics="torch-cpu-loop")
    assert {*found.data_vars} == {*results.FREE_RUN_VARIABLES}
    for name, field in results.FREE_RUN_VARIABLES.items():
        variable = found[name]
        assert variable.dims == field.dims and variable.dtype == field.dtype
        assert variable.attrs["long_name"] == field.long_name and variable.attrs["units"]
    assert found.timestep.values.tolist() == [*range(1, STEPS + 1)]


@pytest.mark.parametrize("name", OTHERS)
def test_agrees_with_a_loop_in_numpy(name, run, path):
    found = free_run(path, arithmetics=name).squeeze("arithmetic")
    own = own_weights(run, name)
    if name == "float32-master":  # the recording holds a copy
        own = decode(encode(own, BFLOAT16), BFLOAT16)
    check(found, own[1:], runs.weights(run)[1:])
    assert found.first_divergence.sel(token_group="all") > 0


def test_usual_assumption_by_hand(run, path):
    """A loop that shares nothing with the library: fused products by way of float64, rounding by torch."""
    given, f = run.setting.hyperparameters, np.float32
    rounded = lambda x: torch.from_numpy(x).bfloat16().float().numpy()  # noqa: E731
    fma = lambda a, b, c: (np.float64(a) * np.float64(b) + np.float64(c)).astype(f)  # noqa: E731
    p = runs.weights(run)[0]
    m = v = np.zeros_like(p)
    found = []
    for t, bits in enumerate(run.patterns["grad"], 1):
        g = (bits.astype(np.uint32) << 16).view(f)
        p = p * f(1 - given.learning_rate[t - 1] * given.weight_decay)
        m = fma(f(1 - given.beta1), g - m, m)
        v = fma(f(1 - given.beta2) * g, g, v * f(given.beta2))
        mean, square = m / f(1 - given.beta1**t), v / f(1 - given.beta2**t)
        p = rounded(p - f(given.learning_rate[t - 1]) * mean / (np.sqrt(square) + f(given.epsilon)))
        found.append(p)
    own = np.stack(found)
    check(
        free_run(path, arithmetics="float32-then-bfloat16").squeeze("arithmetic"),
        own,
        runs.weights(run)[1:],
    )


def test_parts_when_the_audit_says_so(path, tmp_path):
    name = "torch-cuda-loop"
    given = runs.setting(BFLOAT16, 2000, STEPS, first=1, weight_decay=0.1)
    # Its moments are those of the loop; only the weights differ.
    run = runs.take(given, CATALOGUE["torch-capturable"])
    alike = runs.save(tmp_path / "run.safetensors", run)
    for file, names in ((alike, [name]), (path, ["torch-cpu-fused", "float32-then-bfloat16"])):
        with jaxaudit.open_recording(file) as recording:
            audited, found = both(recording, arithmetics=names, backend="cpu")
        wrong = audited.mismatch_count.sel(token_group="all") > 0
        earliest = found.timestep.where(wrong.any("stage")).min("timestep")
        # Moments that differ make a run part before the audit, which reads the recorded ones, sees it.
        first = found.first_divergence.sel(token_group="all")
        assert (first >= earliest).all()
        if file is alike:
            assert not wrong.sel(stage=["exp_avg", "exp_avg_sq"]).any()
            assert (first == earliest).all() and earliest > 0


def test_windows_do_not_matter(path):
    names = ["torch-cpu-loop", "float32-then-bfloat16"]
    whole = free_run(path, arithmetics=names, window_steps=64)
    for steps in (1, 3):
        xr.testing.assert_identical(free_run(path, arithmetics=names, window_steps=steps), whole)


@pytest.mark.parametrize("window", [1, 5])
def test_run_that_starts_late_is_one_from_the_start(window, run, tmp_path):
    """Up to the altered weight every step is exact, so the run need not be taken until there."""
    change = shaped(run)
    bits = change["W"].view(np.uint16).copy()
    bits[7:, 3, 4] ^= 1
    change["W"] = bits.view(change["W"].dtype)
    path = runs.save(tmp_path / "whole.safetensors", run, change=change)
    found = free_run(path, arithmetics="torch-cpu-loop", window_steps=window).squeeze("arithmetic")
    recorded = decode(bits.reshape(STEPS + 1, -1), BFLOAT16)
    check(found, runs.weights(run)[1:], recorded[1:])
    assert found.first_divergence.values.tolist() == [7, 7, 0]
    # Without moments there is nothing that proves a step exact: the run is taken from the start.
    path = runs.save(tmp_path / "bare.safetensors", run, change=change, drop=MOMENTS)
    bare = free_run(path, arithmetics="torch-cpu-loop", window_steps=window).squeeze("arithmetic")
    xr.testing.assert_identical(bare, found)


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT32])
@pytest.mark.parametrize(("name", "window"), [("fused", 4), ("loop", 3)])
def test_weights_and_gradients_alone(fmt, name, window, tmp_path):
    given = runs.setting(fmt, 200, 8, Options(decoupled=False, amsgrad=True), weight_decay=0.1)
    maker = runs.MAKERS[name]
    path = tmp_path / "run.safetensors"
    runs.save(path, maker.make(given), drop=(*MOMENTS, "max_variance_W"))
    with jaxaudit.open_recording(path) as recording:
        audited, found = both(
            recording, arithmetics=f"torch-cpu-{name}", backend="cpu", window_steps=window
        )
    assert audited.audited.values.tolist() == [[0, 0, 1]]
    assert (audited.mismatch_count.sel(stage="param") == 0).all()
    assert (found.first_divergence == 0).all() and (found.norm_divergence == 0).all()


@pytest.mark.parametrize(("drop", "window"), [((), 3), (MOMENTS, 2), (MOMENTS, 64)])
def test_copies_of_a_master(drop, window, tmp_path):
    maker, given = runs.MAKERS["fused on a master"], runs.setting(BFLOAT16, 300, 9)
    path = runs.save(tmp_path / "run.safetensors", maker.make(given), drop=drop)
    with jaxaudit.open_recording(path) as recording:
        audited, found = both(
            recording, arithmetics="float32-master", backend="cpu", window_steps=window
        )
    assert (audited.mismatch_count.sel(stage="param") == 0).all()
    assert (found.first_divergence == 0).all()


def test_range_of_steps_starts_from_the_recorded_state(run, path):
    for name in ("float32-then-bfloat16", "torch-cuda-loop"):
        found = free_run(path, arithmetics=name, steps=(5, 10)).squeeze("arithmetic")
        assert found.timestep.values.tolist() == [*range(5, 10)]
        check(found, own_weights(run, name, start=4)[1:6], runs.weights(run)[5:10])


def test_range_of_steps_of_what_is_not_recorded(run, path, tmp_path):
    """A later state is known only where all of it was recorded."""
    bare = runs.save(tmp_path / "bare.safetensors", run, drop=MOMENTS)
    for file, name in ((bare, "torch-cpu-loop"), (path, "float32-master")):
        found = free_run(file, arithmetics=name, steps=(5, 10))
        assert (found.mismatch_count == -1).all() and (found.first_divergence == -1).all()
        assert (found.max_ulp_distance == -1).all() and found.norm_divergence.isnull().all()
        whole = free_run(file, arithmetics=name)
        assert (whole.mismatch_count >= 0).all()


def test_cannot_run_without_gradients_or_by_chance(run, path, tmp_path):
    bare = runs.save(tmp_path / "bare.safetensors", run, drop=("grad_W",))
    for file, name in ((bare, "torch-cpu-loop"), (path, "stochastic-rounding")):
        found = free_run(file, arithmetics=name)
        assert (found.mismatch_count == -1).all() and (found.max_ulp_distance == -1).all()
        assert (found.first_divergence == -1).all() and found.norm_divergence.isnull().all()


def test_resumed_run_starts_from_its_recorded_state(tmp_path):
    given = runs.setting(BFLOAT16, 200, 6, first=1001)
    run = runs.MAKERS["loop"].make(given)
    for drop, expected in (((), 0), (MOMENTS, -1)):
        path = runs.save(
            tmp_path / "run.safetensors", run, metadata={"first_step": "1001"}, drop=drop
        )
        found = free_run(path, arithmetics="torch-cpu-loop")
        assert (found.first_divergence == expected).all()


def test_command_writes_the_group(path, tmp_path, monkeypatch, capsys):
    command = importlib.import_module("run_audit")
    output = tmp_path / "run.nc"
    arithmetic = "torch-cpu-loop,float32-then-bfloat16"
    arguments = [str(path), "--arithmetic", arithmetic, "--output", str(output), "--backend", "cpu"]
    arguments += ["--only", "accounting"]  # which the free run is part of
    assert command.main([*arguments, "--json", "--quiet"]) == 0
    expected = free_run(path, arithmetics=arithmetic.split(","))
    with xr.open_datatree(output, engine="netcdf4") as tree:
        found = tree["free_run"].to_dataset().load()
        assert tree.to_dataset().arithmetic.values.tolist() == arithmetic.split(",")
    for name in results.FREE_RUN_VARIABLES:
        xr.testing.assert_equal(found[name], expected[name])
        assert found[name].attrs["long_name"]
    summary = json.loads(capsys.readouterr().out)["free_run"]
    assert summary["torch-cpu-loop"]["first_divergence"]["all"] == 0
    assert summary["float32-then-bfloat16"]["first_divergence"]["all"] > 0
