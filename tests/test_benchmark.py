"""The benchmark: its jobs run and tell what they promise, and its baselines do the audit's work, to the bit."""

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recordings import parse, write
from test_scripts import STEPS, TOKENS, WIDTH, record

import jaxaudit

torch = pytest.importorskip("torch")

#: Relative error allowed for norms: sums of n non-negative float64 terms in any order are within (n - 1) 2^-53 of
#: each other's relative value, and roots of them within half of that: below 1e-12 for n up to 9,000 elements. For
#: cosines the same bounds the absolute error, by the inequality of Cauchy and Schwarz.
SUMS = 1e-12


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    return record(tmp_path / "run.safetensors", weight_decay=0.125)


@pytest.fixture
def damaged(recording: Path, tmp_path: Path) -> Path:
    """The same with some bits turned, among them signs, NaNs, and bits of all stages and many steps.

    Moments keep values of bfloat16: PyTorch's chain holds no others (see `replay_in_torch`).
    """
    tensors, metadata = parse(recording.read_bytes())
    random = np.random.default_rng(1)
    for key, bits in (("W", 16), ("grad_W", 16), ("momentum_W", 32), ("variance_W", 32)):
        flat = tensors[key][1].reshape(-1)
        for place in random.integers(TOKENS * WIDTH, flat.size, 6):
            flat[place] ^= flat.dtype.type(1 << random.integers(bits - 16, bits - 1))
    tensors["W"][1][5, 3, 2] = 0x7FC1  # a NaN
    tensors["W"][1][7, 0, 1] = 0x8000  # -0
    return write(tmp_path / "damaged.safetensors", tensors, metadata)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("which", ["recording", "damaged"])
def test_exact_baselines_find_what_the_audit_finds(
    script: Any,
    kind: str,
    which: str,
    request: pytest.FixtureRequest,
):
    path = request.getfixturevalue(which)
    replays = script("benchmark_replays")
    with jaxaudit.open_recording(path) as recording:
        groups = jaxaudit.token_groups_of(recording)
        audit = jaxaudit.audit(recording, groups, arithmetics="torch-cpu-loop", backend="cpu")
        loaded = replays.load(recording, 1, recording.steps)
    members = list(groups.members.values())
    if kind == "torch":
        found = replays.replay_in_torch(loaded, members)
    else:
        found = replays.replay_in_numpy(loaded, members, threads=2)
    assert bool(found.mismatches.any()) == (which == "damaged")
    np.testing.assert_array_equal(found.mismatches, audit.mismatch_count.values[0])
    np.testing.assert_array_equal(found.distances, audit.max_ulp_distance.values[0])
    for name, values in found.norms().items():
        theirs = audit[name].values.reshape(values.shape)
        absolute = SUMS if name == "cosine_similarity" else 0
        np.testing.assert_allclose(values, theirs, rtol=SUMS, atol=absolute, err_msg=name)


def test_exact_baselines_of_some_timesteps(script: Any, recording: Path):
    replays = script("benchmark_replays")
    with jaxaudit.open_recording(recording) as opened:
        members = list(jaxaudit.token_groups_of(opened).members.values())
        whole = replays.replay_in_numpy(replays.load(opened, 1, STEPS), members, 1)
        some = replays.replay_in_numpy(replays.load(opened, 5, 3), members, 1)
    np.testing.assert_array_equal(some.squares, whole.squares[:, 4:7])
    assert some.squares.any() and not some.mismatches.any()


def test_fused_rounds_once(script: Any):
    """Against exact rational arithmetic, on operands of which a float64 sum alone would round twice."""
    from fractions import Fraction

    fused = script("benchmark_replays").fused
    random = np.random.default_rng(0)
    a, b, c = (random.normal(size=2000).astype(np.float32) for _ in range(3))
    c[:1000] *= np.float32(2.0) ** random.integers(-40, 40, 1000)
    # 1 + 2^-24 + 2^-60: half an ulp and a little that float64 does not hold.
    a[0], b[0], c[0] = 2.0**-24 + 2.0**-47, 1 + 2.0**-13, 1
    found = fused(a, b, c)
    for x, y, z, got in zip(a.tolist(), b.tolist(), c.tolist(), found, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        below, above = (np.nextafter(got, np.float32(end)) for end in (-np.inf, np.inf))
        assert all(abs(Fraction(float(got)) - exact) <= abs(Fraction(float(n)) - exact) for n in (below, above))  # fmt: skip
    twice = (np.float64(a[0]) * np.float64(b[0]) + np.float64(c[0])).astype(np.float32)
    assert found[0] == twice or found[0] > twice


def test_exact_baselines_refuse_what_they_do_not_do(script: Any, recording: Path, tmp_path: Path):
    replays = script("benchmark_replays")
    tensors, metadata = parse(recording.read_bytes())

    def reasons(changed: dict[str, Any], **told: str) -> tuple[str, str]:
        path = write(tmp_path / "other.safetensors", changed, metadata | told)
        with jaxaudit.open_recording(path) as opened:
            return replays.reason_against(opened), replays.reason_against_numpy(opened)

    assert reasons(tensors) == ("", "")
    assert "amsgrad" in reasons(tensors, amsgrad="true")[0]
    l2 = reasons(tensors, optimizer="Adam")
    assert not l2[0] and "scalar loops" in l2[1]
    without = {key: value for key, value in tensors.items() if key != "grad_W"}
    assert "lacks gradients" in reasons(without)[0]
    tensors["momentum_W"][1][-1, 0, 0] |= np.uint32(1)
    assert "more bits" in reasons(tensors)[0]


@pytest.mark.long
def test_jobs_are_timed_and_drawn(
    script: Any,
    recording: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    output, benchmark = tmp_path / "out" / "b.json", script("benchmark")
    jobs = ["host-bandwidth", "device-bandwidth", "read", "read-cold", "audit", "torch-exact", "numpy-exact"]  # fmt: skip
    arguments = [str(recording), "--rounds", "1", "--output", str(output), "--jobs", ",".join(jobs)]
    arguments += ["--backend", "cpu", "--array-bytes", "65536", "--torch-threads", "1"]
    assert benchmark.main(arguments) == 0
    printed = capsys.readouterr()
    assert (
        "round 1 of 1: numpy-exact" in printed.err
        and "bandwidth in GB/s: host copy " in printed.out
    )
    found = json.loads(output.read_text())
    assert list(found["jobs"]) == jobs[2:] and {*jobs} < {*benchmark.JOBS}
    rates = {
        "host copy",
        "host triad",
        "device copy",
        "device triad",
    }  # none from the host to itself
    assert {*found["bandwidth"]} == rates
    assert all(rate["median"] > 1e6 for rate in found["bandwidth"].values())
    assert found["recording"]["elements"] == STEPS * TOKENS * WIDTH
    for job, figures in found["jobs"].items():
        assert f"\n{job} " in printed.out
        assert figures["work"]["median"] > 0 and figures["peak_resident_bytes"] > 1e6
        parts = sum(figures[part]["median"] for part in ("start-up", "preparation", "loading", "work"))  # fmt: skip
        assert parts == pytest.approx(figures["total"]["median"])
        ratio = figures["work"]["median"] / found["jobs"]["read"]["work"]["median"]
        assert figures["share_of_floor"] == pytest.approx(1 / ratio)
        assert figures["peak_device_bytes"] is None  # a CPU does not tell
    exact = [found["jobs"][job] for job in ("torch-exact", "numpy-exact")]
    assert all(e["mismatches"] == 0 and e["loading"]["median"] > 0 for e in exact)
    assert exact[0]["share_of_timesteps"] == 1 and exact[0]["threads"] == 1
    assert found["jobs"]["audit"]["compile_seconds"] > 0
    # Only PyTorch's processes hold torch, and only the audit's hold JAX.
    peaks = {job: figures["peak_resident_bytes"] for job, figures in found["jobs"].items()}
    assert peaks["read"] < peaks["audit"] and peaks["numpy-exact"] < peaks["torch-exact"]
    assert found["cold"]["note"].split()[0] in ("at", "this")
    assert is_png(output.with_suffix(".png"))


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_a_recording_is_made_and_deleted(script: Any, tmp_path: Path):
    output, scratch = tmp_path / "b.json", tmp_path / "scratch"
    scratch.mkdir()
    arguments = ["--make", "12x64x16", "--scratch", str(scratch), "--rounds", "1"]
    assert script("benchmark").main([*arguments, "--output", str(output), "--jobs", "read"]) == 0
    found = json.loads(output.read_text())
    assert found["recording"]["rows"] == 64 and found["jobs"]["read"]["share_of_floor"] == 1
    assert not [*scratch.iterdir()]


@pytest.mark.parametrize(("job", "ledger"), [("accounting", False), ("ledger", True)])
def test_the_accounting_goes_without_the_ledger(
    script: Any, recording: Path, monkeypatch: pytest.MonkeyPatch, job: str, ledger: bool
):
    """What is asked of the audit; that it runs is the audit's own tests' matter."""
    jobs, asked = script("benchmark_jobs"), []

    def audit_groups(recording: Any, groups: Any, *, progress: Any, **options: Any) -> None:
        asked.append(options)
        for k in range(21):
            progress(k, 20, k)

    monkeypatch.setattr("jaxaudit.auditing.audit_groups", audit_groups)
    found = jobs.JOBS[job](jobs.Input(recording, backend="cpu"))
    assert len(asked) == 2 and asked[0] == asked[1] and found["work"] > 0
    assert (asked[0].pop("ledger") is not None) == ledger
    assert asked[0] == {"arithmetics": "auto", "backend": "cpu", "window_steps": None}


def test_made_recordings_replay_exactly(script: Any, tmp_path: Path):
    recordings = script("benchmark_recordings")
    path = recordings.make(tmp_path / "made.safetensors", 6, 150, 32)
    beside = recordings.make_groups(tmp_path / "groups.safetensors", 150, 5)
    groups = jaxaudit.open_token_groups(beside)
    with jaxaudit.open_recording(path) as recording:
        assert (recording.steps, recording.tokens, recording.width) == (6, 150, 32)
        found = jaxaudit.audit(recording, groups, arithmetics="torch-cpu-loop", backend="cpu")
    assert found.sizes["token_group"] == 6 and found.audited.values.all()
    assert not found.mismatch_count.values.any() and found.norm_observed.values.all()
    assert not found.unrepresentable_count.values.any()


def test_made_recordings_need_room(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recordings = script("benchmark_recordings")
    usage = lambda _: argparse.Namespace(free=1000)  # noqa: E731
    monkeypatch.setattr(recordings.shutil, "disk_usage", usage)
    with pytest.raises(recordings.Failure, match="1000 are free"):
        recordings.make(tmp_path / "made.safetensors", 2, 4, 8)
    assert not [*tmp_path.iterdir()]


@pytest.fixture
def timed(script: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Let a job's time be 2 ms and 3 us for each row of a timestep, without a process."""
    benchmark, seen = script("benchmark"), []

    def measured(job: str, given: Any, environment: Any) -> dict[str, Any]:
        with jaxaudit.open_recording(given.recording) as recording:
            work = 2e-3 + 3e-6 * recording.steps * recording.tokens
        seen.append((job, given, environment))
        return {"work": work, "preparation": 1.0, "peak": 1e6}

    monkeypatch.setattr(benchmark, "measured", measured)
    yield seen


def test_scaling_curves_are_fitted_and_drawn(
    script: Any,
    timed: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    output, names = tmp_path / "s.json", "timesteps,groups,arithmetics,windows"
    arguments = ["--scaling", names, "--scaling-elements", "500000", "--scratch", str(tmp_path)]
    arguments += ["--rounds", "2", "--output", str(output)]
    assert script("benchmark").main(arguments) == 0
    found = json.loads(output.read_text())
    assert list(found["curves"]) == names.split(",")
    steps = found["curves"]["timesteps"]
    tokens = steps["points"][0]["tokens"]
    assert [point["x"] for point in steps["points"]] == [100, 200, 400, 700, 1000]
    assert steps["fit"]["seconds_per_unit"] == pytest.approx(3e-6 * tokens)
    assert steps["fit"]["fixed_seconds"] == pytest.approx(2e-3)
    assert steps["fit"]["linear_residual_seconds"] == pytest.approx(0, abs=1e-9)
    assert found["curves"]["groups"]["fit"]["exponent"] == pytest.approx(0, abs=1e-9)
    assert len(steps["points"][0]["work"]["each"]) == 2
    asked = [given for _, given, _ in timed]
    assert len({given.token_groups.name for given in asked if "groups-" in given.recording.name}) == 6  # fmt: skip
    assert len({given.recording.name for given in asked}) == 5 + 1 + 1 + 1
    assert {len(given.arithmetics.split(",")) for given in asked} == {1, 2, 4, 8}
    assert {given.window_steps for given in asked} == {None, 1, 2, 4, 8, 16, 32}
    # In turn, not one point after the other.
    rounds = [given.recording.name for _, given, _ in timed[:10]]
    assert rounds[:5] == rounds[5:] and len({*rounds}) == 5
    assert "grows with the power" in capsys.readouterr().out
    assert is_png(output.with_suffix(".png"))
    assert {path.name for path in tmp_path.iterdir()} == {"s.json", "s.png"}


def test_powers_are_fitted_through_logarithms(script: Any):
    xs = [1, 2, 4, 8]
    exact = script("benchmark_scaling").fit(xs, [5 * x**1.5 for x in xs])
    assert exact["exponent"] == pytest.approx(1.5) and exact["factor"] == pytest.approx(5)
    assert exact["exponent_residual_factor"] == pytest.approx(1)
    # A factor of 2 up and down by turns is no slope, and all of the residual.
    scattered = script("benchmark_scaling").fit(xs, [2, 0.5, 0.5, 2])
    assert scattered["exponent"] == pytest.approx(0, abs=1e-12)
    assert scattered["exponent_residual_factor"] == pytest.approx(2)


def test_scaling_over_devices_waits_for_the_audit_to_take_them(
    script: Any,
    timed: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    scaling, output = script("benchmark_scaling"), tmp_path / "s.json"
    arguments = ["--scaling", "devices", "--rounds", "1", "--scaling-elements", "100000"]
    arguments += ["--scratch", str(tmp_path), "--output", str(output), "--overwrite"]
    monkeypatch.setattr("jaxaudit.auditing.audit", lambda recording: None)
    assert script("benchmark").main(arguments) == 0
    found = json.loads(output.read_text())
    assert not found["curves"] and "number of devices" in found["skipped"]["devices"]
    monkeypatch.setattr("jaxaudit.auditing.audit", lambda recording, *, devices=None: None)
    monkeypatch.setattr(scaling, "devices_of", lambda backend: ("gpu", 2))
    assert script("benchmark").main(arguments) == 0
    found = json.loads(output.read_text())
    assert [point["x"] for point in found["curves"]["devices"]["points"]] == [1, 2]
    assert "no more than 2 of gpu" in found["skipped"]["devices"]
    assert timed[1][1].devices == 2
    assert timed[1][2]["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=2")


def test_a_point_of_a_curve_is_a_real_audit(script: Any, tmp_path: Path):
    scaling, benchmark = script("benchmark_scaling"), script("benchmark")
    point = scaling.Point(2, 16, 64, groups=3, arithmetics=2, window_steps=2)
    files = scaling.recordings("windows", [point], tmp_path)
    given = scaling.input_of(point, files[point], "cpu")
    found = scaling.told_of(point, [benchmark.measured("audit", given, scaling.environment(point))])
    assert found["work"]["median"] > 0 and found["preparation"] > 0
    assert found["device"] == "cpu: cpu" and found["elements"] == 16 * 64 * scaling.WIDTH


def test_input_goes_through_json(script: Any):
    jobs = script("benchmark_jobs")
    given = jobs.Input(Path("a b.safetensors"), None, 3, devices=2, window_steps=4)
    assert jobs.Input.from_json(given.as_json()) == given
    other = dataclasses.replace(given, token_groups=Path("groups"))
    assert jobs.Input.from_json(other.as_json()) == other


@pytest.mark.parametrize(
    ("shares", "cold", "note"),
    [
        ([0.0, 0.01], True, "at most 1.0% of the file"),
        ([0.0, 0.5], False, "could not be dropped"),
        ([None], None, "does not tell"),
        ([], None, "not measured"),
    ],
)
def test_cold_is_said_only_where_it_was_seen(script: Any, shares: list, cold: Any, note: str):
    found = script("benchmark").coldness([{"cached_before": share} for share in shares])
    assert found["is_cold"] is cold and note in found["note"]


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system does not tell")
def test_cached_share_sees_a_dropped_file(script: Any, tmp_path: Path):
    jobs, path = script("benchmark_jobs"), tmp_path / "file"
    with open(path, "wb") as file:
        file.write(bytes(1 << 24))
        file.flush()
        os.fsync(file.fileno())  # what is not on the disk cannot be dropped
    jobs.read(jobs.Input(path))
    if jobs.cached_share(path) is None:
        pytest.skip("this file system does not tell")
    assert jobs.cached_share(path) == 1
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True
    )
    if kind.stdout.strip() not in ("ext2/ext3", "xfs", "btrfs"):
        pytest.skip(f"{kind.stdout.strip()} may keep its files in memory alone")
    jobs.drop_from_cache(path)
    assert jobs.cached_share(path) < 0.05


def test_what_does_not_fit_in_memory_is_skipped(
    script: Any,
    recording: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    jobs = script("benchmark_jobs")
    monkeypatch.setattr(jobs, "available_memory", lambda: 1000)
    with jaxaudit.open_recording(recording) as opened:
        assert "1000 are free" in jobs.reason_to_skip("notebook", opened)
        assert jobs.reason_to_skip("audit", opened) == ""
    # PyTorch's exact replay does as many timesteps as fit, and says so.
    told = jobs.torch_exact(jobs.Input(recording))
    assert told["share"] == 1 / STEPS and told["extra"] < 0


@pytest.mark.parametrize("job", ["notebook", "notebook-all"])
def test_notebook_is_timed(script: Any, recording: Path, job: str):
    jobs = script("benchmark_jobs")
    assert jobs.JOBS[job](jobs.Input(recording))["work"] > 0


def test_notebook_replays_as_torch_writes_it(script: Any):
    """One element by hand: m_hat = v_hat = 1 at step 1, so the weight moves by the learning rate."""
    from jaxaudit.hyperparameters import Hyperparameters

    given = Hyperparameters(
        learning_rate=np.full(1, 0.25), beta1=0.5, beta2=0.75, epsilon=0.0, weight_decay=0.0
    )
    before = torch.tensor([1.0], dtype=torch.bfloat16)
    moments = torch.tensor([0.5]), torch.tensor([0.25])
    after = script("benchmark_replays").adam_weight(before, *moments, given, 1)
    assert after.dtype == torch.bfloat16 and after.item() == 0.75


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--jobs", "read,nothing"], "unknown job 'nothing'"),
        (["--arithmetic", "exact"], "unknown arithmetic 'exact'"),
        (["--scaling", "sideways"], "unknown curve 'sideways'"),
        (["--make", "2x4x8", "RECORDING"], "not both"),
        (["--scaling", "windows", "RECORDING"], "give none"),
        (["--make", "2x4x8", "--scratch", "/no/such/folder"], "not a folder"),
        (["--output", "figure.png"], "name a .json file"),
    ],
)
def test_wrong_usage_is_refused_in_one_line(
    script: Any,
    arguments: list[str],
    words: str,
    recording: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    given = [str(recording) if word == "RECORDING" else word for word in arguments]
    assert script("benchmark").main([*given, "--rounds", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and words in printed.err and len(printed.err.splitlines()) == 1


def test_an_existing_figure_is_not_overwritten(
    script: Any, recording: Path, tmp_path: Path, capsys: Any
):
    (tmp_path / "b.png").write_text("kept")
    arguments = [str(recording), "--output", str(tmp_path / "b.json"), "--jobs", "read"]
    assert script("benchmark").main(arguments) == 2
    assert "b.png exists already" in capsys.readouterr().err
    assert (tmp_path / "b.png").read_text() == "kept" and not (tmp_path / "b.json").exists()


def test_the_page_of_the_benchmark_runs(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    page = (Path(__file__).parents[1] / "docs" / "benchmark.md").read_text()
    commands = re.findall(r"^python scripts/benchmark.py (.+)$", page, re.MULTILINE)
    benchmark = script("benchmark")
    for command in commands:
        benchmark.parser().parse_args(shlex.split(command))
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(shlex.split(commands[0])) == 0
    capsys.readouterr()
    (snippet,) = re.findall(r"```python\n(.+?)```", page, re.DOTALL)
    subprocess.run([sys.executable, "-c", snippet], check=True, cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"small.json", "small.png"}
