"""Stages that are measured in one pass: the same numbers, to the bit, as compared one by one."""

import json

import jax
import numpy as np
import pytest
from recordings import short_run, write

import jaxaudit
from jaxaudit import auditing, joint_replay, workbench
from jaxaudit.identification import USUAL_ASSUMPTION
from jaxaudit.joint_replay import JointReplayer, Started, chunk_of
from jaxaudit.operations import Float32Operations
from jaxaudit.steps import STAGES

NAMES = ("torch-cpu-loop", "torch-cpu-foreach", "float32-then-bfloat16")
STEPS, TOKENS = 10, 10


@pytest.fixture(scope="module")
def run():
    """Return the first steps of a few tokens of the sample."""
    tensors, metadata = short_run(STEPS)
    for name, (dtype, array) in tensors.items():
        if array.ndim == 3:
            tensors[name] = dtype, array[:, :TOKENS]
    return tensors, metadata


def planted(run, width=64, **changes):
    """Return the run with patterns put in: lists of (entry, token, column, pattern) by tensor."""
    tensors, metadata = run
    found = {}
    for name, (dtype, array) in tensors.items():
        array = array[..., :width].copy() if array.ndim == 3 else array
        for t, token, column, pattern in changes.get(name, []):
            array[t, token, column] = pattern
        found[name] = dtype, array
    return found, metadata


@pytest.fixture
def finished(monkeypatch):
    """Count what teams came to: measured, or to be done one by one."""
    found = {True: 0, False: 0}
    real = Started.finish

    def finish(self, steps):
        measured = real(self, steps)
        found[measured is not None] += 1
        return measured

    monkeypatch.setattr(Started, "finish", finish)
    return found


def both_ways(path, monkeypatch):
    """Audit with and without teams; so few elements are all looked at beforehand, which is forgotten again."""
    datasets, begin = [], workbench.Workbench.begin

    def surprised(self):
        begin(self)
        known = [d for d in self.differing if d[0].arithmetic.name == USUAL_ASSUMPTION]
        self.differing = set(known)

    monkeypatch.setattr(workbench.Workbench, "begin", surprised)
    for least in (1 << 62, 1):
        monkeypatch.setattr(workbench, "JOINT_ELEMENTS", least)
        with jaxaudit.open_recording(path) as recording:
            datasets.append(auditing.audit(recording, arithmetics=NAMES, window_steps=2))
    return datasets


def self_tests(dataset, stage):
    """Return the verdicts on the teams of a stage."""
    found = json.loads(dataset.attrs["self_test"])
    start = f"float32-then-bfloat16 {stage} beside torch-cpu-loop"
    return [verdict for name, verdict in found.items() if name.startswith(start)]


def assert_same(one, other):
    assert one.variables.keys() == other.variables.keys()
    for name, variable in one.variables.items():
        a, b = variable.values, other[name].values
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a == b).all() if a.dtype.kind in "OUT" else a.tobytes() == b.tobytes(), name


@pytest.mark.parametrize("width", [64, 20])
def test_teams_find_the_same_numbers(run, tmp_path, monkeypatch, finished, width):
    path = write(tmp_path / "run.safetensors", *planted(run, width))
    alone, together = both_ways(path, monkeypatch)
    assert_same(alone, together)
    assert finished[True] and not finished[False]
    wrong = together.mismatch_count.sel(token_group="all").sum("timestep")
    assert (wrong.sel(arithmetic="float32-then-bfloat16") > 0).all()
    assert (wrong.sel(arithmetic="torch-cpu-loop") == 0).all()
    for stage in STAGES:
        measured = stage == "param" or chunk_of(width)
        assert set(self_tests(together, stage)) == ({"passed"} if measured else set())
        assert not self_tests(alone, stage)


@pytest.mark.parametrize(
    "changes",
    [
        {"grad_W": [(5, 3, 2, 0x7FC0)]},
        {"W": [(6, 1, 2, 0x7F80), (9, 0, 0, 0xFFC1)]},
        {"momentum_W": [(4, 2, 2, 0x00010000)], "variance_W": [(7, 9, 63, 0x7F800000)]},
        {"W": [(0, 5, 6, 0x0001), (3, 2, 1, 0x0001)], "grad_W": [(1, 1, 1, 0x8001)]},
        {"momentum_W": [(t, 1, t, 0x7FC00001) for t in range(STEPS)]},
        {"W": [(8, 7, 6, 0x3C01)], "momentum_W": [(10, 0, 1, 0x3F800000)]},
        {"variance_W": [(2, 0, 63, 0x3F800001)], "W": [(10, TOKENS - 1, 63, 0)]},
    ],
    ids=["nan", "inf", "moments", "subnormal", "always", "exact no more", "first and last"],
)
def test_what_is_not_ordinary_is_done_one_by_one(run, tmp_path, monkeypatch, finished, changes):
    path = write(tmp_path / "run.safetensors", *planted(run, **changes))
    assert_same(*both_ways(path, monkeypatch))
    assert finished[True] and finished[False]


def test_a_program_that_is_wrong_is_not_used(run, tmp_path, monkeypatch, fresh_programs):
    """Members that share a product have it computed once, and not fused with the sum of any."""
    init = Float32Operations.__init__
    monkeypatch.setattr(
        Float32Operations,
        "__init__",
        lambda self, zero, wide=False, **_: init(self, zero, wide=wide),
    )
    path = write(tmp_path / "run.safetensors", *planted(run))
    alone, together = both_ways(path, monkeypatch)
    assert_same(alone, together)
    assert all(" gave 0x" in verdict for verdict in self_tests(together, "exp_avg_sq"))
    assert set(self_tests(together, "exp_avg")) == {"passed"}


@pytest.mark.parametrize("altered,stage", [("distance", "exp_avg"), ("_narrow", "param")])
def test_wrong_numbers_do_not_pass_the_self_test(
    run, tmp_path, monkeypatch, fresh_programs, altered, stage
):
    real = getattr(joint_replay, altered)
    monkeypatch.setattr(joint_replay, altered, lambda *given: real(*given) ^ np.uint8(1))
    path = write(tmp_path / "run.safetensors", *planted(run))
    alone, together = both_ways(path, monkeypatch)
    assert_same(alone, together)
    verdicts = self_tests(together, stage)
    assert verdicts and all(" gave 0x" in verdict for verdict in verdicts)


def test_rows_are_cut_into_chunks_that_fill_registers():
    widths = [1, 15, 16, 20, 32, 48, 64, 80, 96, 300, 768, 4096]
    assert [chunk_of(width) for width in widths] == [0, 0, 16, 0, 32, 48, 64, 16, 48, 0, 64, 64]


def test_scalars_that_part_make_another_team(run, tmp_path):
    path = write(tmp_path / "run.safetensors", *planted(run))
    with jaxaudit.open_recording(path) as recording, jax.enable_x64(True):
        bench = workbench.Workbench(recording, (jax.devices("cpu")[0],), (1, STEPS + 1), 4)
        chosen = auditing.choose(bench, ("float32-then-bfloat16", "torch-cpu-loop")).candidates[:2]
        programs = [bench.program(candidate, "exp_avg") for candidate in chosen]
        window = next(bench.windows((1, 5)))
        scalars = [dict(bench.scalars(candidate, window)) for candidate in chosen]
        replayer = JointReplayer(bench.replayer, bench.comparison, recording.width)
        team, arrays = replayer._team(list(zip(programs, scalars, strict=True)))
        assert len(arrays) == 1 and team.places == ((0,), (0,))
        scalars[1]["exp_avg_weight"] = scalars[1]["exp_avg_weight"] * np.float32(2)
        apart, arrays = replayer._team(list(zip(programs, scalars, strict=True)))
        assert apart.places == ((0,), (1,)) and len(arrays) == 2
        assert np.array_equal(arrays[1], scalars[1]["exp_avg_weight"])
        scalars[1]["exp_avg_weight"] = scalars[0]["exp_avg_weight"]
        assert replayer._team(list(zip(programs, scalars, strict=True)))[0] == apart
