"""Audits of whole models: every parameter, the overview of all, and the command."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from test_report import Page, cells

import jaxaudit
from jaxaudit import auditing, identification, results
from jaxaudit.ledger.subject import LedgerOptions
from jaxaudit.models import account, figures, page, variables
from jaxaudit.models.audits import ModelAudit, selected
from jaxaudit.recording import TokenGroups
from jaxaudit.safetensors_file import FileError

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]
STEPS = 6

#: Of as many elements each, so that they share compiled programs; the name with odd characters needs encoding.
SHAPES = {
    "0.weight": (12, 64),
    "conv.kernel": (12, 4, 4, 4),
    "wrong.weight": (12, 64),
    ".odd/näme": (12, 8, 8),
    "0.bias": (768,),
    "norm.bias": (768,),
    "idle": (768,),
}
DAMAGED, IDLE = "wrong.weight", "idle"
FUSED = ("0.bias", "norm.bias", "idle")
COUNT, LIVE = len(SHAPES), len(SHAPES) - 1


def encoded(name: str) -> str:
    return {".odd/näme": "_%2Eodd%2Fn%C3%A4me"}.get(name, name)


def path_of(name: str) -> str:
    return f"parameters/{encoded(name)}"


def record_model(folder: Path, *, close: bool = True) -> Path:
    """Record a model of two groups of the optimizer, a loop and a fused one, in bfloat16."""
    torch.manual_seed(3)
    named = {
        name: torch.nn.Parameter((0.05 * torch.randn(shape)).to(torch.bfloat16))
        for name, shape in SHAPES.items()
    }
    groups = [
        {
            "params": [x for n, x in named.items() if n not in FUSED],
            "weight_decay": 0.1,
            "foreach": False,
        },
        {"params": [named[n] for n in FUSED], "weight_decay": 0.0, "lr": 2.5e-3, "fused": True},
    ]
    optimizer = torch.optim.AdamW(groups, lr=7e-3, betas=(0.9, 0.95))
    recorder = jaxaudit.record(optimizer, folder, named_parameters=named.items())
    for step in range(STEPS):
        for name, x in named.items():
            left_out = name == IDLE or (name == "norm.bias" and step == 2)
            x.grad = None if left_out else (0.02 * torch.randn(x.shape)).to(torch.bfloat16)
        recorder.note_loss(1 / (step + 1))
        optimizer.step()
    if close:
        recorder.close()
    return folder


def flip(path: Path, key: str, element: int) -> None:
    """Flip the lowest bit of an element of a tensor in a safetensors file."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        start, _ = json.loads(file.read(length))[key]["data_offsets"]
        file.seek(8 + length + start + 2 * element)
        low = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([low ^ 1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The model, with one bit of one weight flipped, after the last step."""
    path = record_model(tmp_path_factory.mktemp("recorded") / "model")
    flip(path / f"{DAMAGED}.safetensors", "W", STEPS * 768 + 50)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return jaxaudit.open_model(folder)


@pytest.fixture(scope="module")
def searched() -> list[Path]:
    """List the recordings for which `found` searched the catalogue."""
    return []


@pytest.fixture(scope="module")
def found(model, searched):
    rank = identification.Identifier.rank

    def counted(self):
        searched.append(self._recording.path)
        return rank(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identification.Identifier, "rank", counted)
        return jaxaudit.audit_model(model, backend="cpu", ledger=LedgerOptions(beta2=()))


@pytest.fixture(scope="module")
def overview(found):
    return found[""]


@pytest.fixture
def command(script, capsys, monkeypatch, tmp_path):
    """Run the command in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    main = script("run_audit").main

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main([str(a) for a in (*arguments, "--backend", "cpu", "--quiet")])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def assert_same_bits(one: xr.Dataset, other: xr.Dataset) -> None:
    assert set(one.variables) == set(other.variables)
    for name in one.variables:
        a, b = one[name].values, other[name].values
        assert (a.dtype.kind, a.shape) == (b.dtype.kind, b.shape), name
        if a.dtype.kind == "f":
            a, b = a.view(np.uint64), b.view(np.uint64)
        np.testing.assert_array_equal(a, b, err_msg=str(name))


# --- what replays ---


def test_every_parameter_but_the_damaged_one_replays(overview):
    totals = overview.mismatch_total.sum("stage")
    for name in SHAPES:
        one = overview.sel(parameter=name)
        if name == DAMAGED:
            assert one.mismatch_total.values.tolist() == [0, 0, 1]
            assert int(one.first_mismatch_timestep) == STEPS and not int(one.replays_exactly)
        elif name == IDLE:
            assert int(one.timestep_count) == 0 and int(one.skipped_count) == STEPS
            assert (one.mismatch_total.values == -1).all() and not one.audited.values.any()
        else:
            assert int(totals.sel(parameter=name)) == 0 and int(one.first_mismatch_timestep) == 0
            assert int(one.replays_exactly) and one.audited.values.all()
    assert int(overview.rank_by_mismatches.sel(parameter=DAMAGED)) == 1
    assert int(overview.rank_by_mismatches.sel(parameter=IDLE)) == COUNT
    assert sorted(overview.rank_by_mismatches.values) == list(range(1, COUNT + 1))
    assert sorted(overview.rank_by_lost_share.values) == list(range(1, COUNT + 1))
    shares = overview.lost_share.values[np.argsort(overview.rank_by_lost_share.values)]
    known = shares[np.isfinite(shares)]
    assert known.size == LIVE and (np.diff(known) <= 0).all()


def test_groups_have_arithmetics_of_their_own(overview):
    for name in set(SHAPES) - {IDLE, DAMAGED}:
        fitting = str(overview.identified_arithmetic.sel(parameter=name).values).split(",")
        assert ("torch-cpu-fused" if name in FUSED else "torch-cpu-loop") in fitting
        assert str(overview.identified_by.sel(parameter=name).values) == "group"
    assert str(overview.identified_by.sel(parameter=DAMAGED).values) == "parameter"
    assert overview.optimizer_group.values.tolist() == [int(name in FUSED) for name in SHAPES]


@pytest.mark.parametrize("name", ["conv.kernel", "norm.bias", DAMAGED])
def test_overview_is_what_separate_audits_give(model, found, overview, name):
    with model.open(name) as recording:
        timesteps = recording.timesteps
        alone = auditing.audit_groups(
            recording,
            arithmetics=[*found[path_of(name)].arithmetic.values],
            backend="cpu",
            ledger=LedgerOptions(beta2=()),
        )
    for group, dataset in alone.items():
        assert_same_bits(dataset, found[f"{path_of(name)}/{group}" if group else path_of(name)])
    one, root = overview.sel(parameter=name), alone[""].sel(token_group="all")
    root = root.sel(arithmetic=str(one.arithmetic.values))
    np.testing.assert_array_equal(one.mismatch_total, root.mismatch_count.sum("timestep"))
    at = timesteps[1:]
    rows = one.sel(run_timestep=at)
    np.testing.assert_array_equal(rows.mismatch_count, root.mismatch_count.sum("stage"))
    np.testing.assert_array_equal(
        rows.norm_observed.values.view(np.uint64), root.norm_observed.values.view(np.uint64)
    )
    updates = alone["updates"].sel(token_group="all")
    for count, total in (("wanted_count", "wanted_total"), ("lost_count", "lost_total")):
        np.testing.assert_array_equal(rows[count], updates[count])
        assert int(one[total]) == int(updates[count].sum())
    assert float(one.lost_share) == int(one.lost_total) / int(one.wanted_total)
    moments = alone["moments"].sel(token_group="all")
    assert int(one.exp_avg_sq_fall_total) == int(moments.exp_avg_sq_fall_count.sum())
    assert int(one.exp_avg_sq_stuck_total) == int(moments.exp_avg_sq_stuck_count.sum())
    frozen = alone["tokens"].freeze_onset.values >= 0
    assert int(one.frozen_token_count) == int(frozen.sum())


def test_timesteps_that_did_not_step_a_parameter(overview):
    one = overview.sel(parameter="norm.bias")
    assert int(one.timestep_count) == STEPS - 1 and int(one.skipped_count) == 1
    left_out = one.sel(run_timestep=3)
    assert int(left_out.mismatch_count) == int(left_out.lost_count) == -1
    assert np.isnan(left_out.norm_observed)
    assert (one.mismatch_count.sel(run_timestep=[1, 2, 4, 5, 6]) == 0).all()


def test_everything_is_labelled(found):
    for dataset in found.values():
        for name, array in dataset.variables.items():
            assert array.attrs.get("long_name") and array.attrs.get("units"), name
    assert set(found[""].data_vars) == set(variables.OVERVIEW)


def test_the_verdict_says_what_the_data_support(overview):
    told = json.loads(overview.attrs["verdict"])
    assert 2 <= len(told) <= 5
    texts = [each["sentence"] for each in told]
    assert texts[0].startswith(f"{LIVE - 1} of {LIVE} parameters replay bit for bit under ")
    assert f"{DAMAGED} (1 mismatch under torch-cpu-loop, the first at timestep {STEPS})" in texts[1]
    worst = overview.parameter.values[overview.rank_by_lost_share.values == 1][0]
    lost = next(text for text in texts if "left their weight as it was" in text)
    wanted = int(overview.wanted_total.where(overview.wanted_total >= 0, 0).sum())
    assert f"of {wanted:,} updates" in lost and f"those of {worst} (" in lost
    assert texts[-1] == f"{IDLE} was not stepped, and not audited."
    for each in told:
        assert set(each["variables"]) <= set(overview.variables)


def test_nothing_is_identified_twice(model, found, searched):
    """Only the representatives of both groups, and the damaged parameter, search the whole catalogue."""
    assert len(searched) == 3 and searched.count(model.path / f"{DAMAGED}.safetensors") >= 1


# --- the tree and the file ---


def test_the_file_holds_what_the_library_returns(command, folder, found, tmp_path):
    some = [name for name in SHAPES if name not in ("0.weight", "0.bias", "conv.kernel")]
    status, out, err = command(
        folder,
        "--plots",
        "figures",
        "--report",
        "page.html",
        "--counterfactual-beta2",
        "",
        "--parameters",
        "wrong|odd|norm|idle",
    )
    assert status == 0, err
    path = tmp_path / "results" / "model.nc"
    told = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert told.words("main", "h1") == ["jaxaudit of the model recording model"]
    rows = told.words("tbody", "tr", "th")[2:6]
    assert rows[0] == DAMAGED and rows[-1] == IDLE and {*rows} == {*some}
    assert sorted(os.listdir(tmp_path / "results")) == ["model.nc"]
    with xr.open_datatree(path) as tree:
        for name in some:
            assert (path_of(name) in [node.lstrip("/") for node in tree.groups]) == (name != IDLE)
        assert tree[path_of(".odd/näme")].attrs["parameter"] == ".odd/näme"
    for name, dataset in found.items():
        if not name or not any(name.startswith(path_of(one)) for one in some):
            continue
        loaded = xr.load_dataset(path, group=name)
        assert_same_bits(loaded, dataset)
        assert all(loaded[v].attrs == dataset[v].attrs for v in dataset.variables)
    root, whole = xr.load_dataset(path), found[""].sel(parameter=some)
    changed = [
        "rank_by_mismatches",
        "rank_by_lost_share",
        "identified_by",
    ]  # they depend on the others
    assert_same_bits(root.drop_vars(changed), whole.drop_vars(changed))
    assert (tmp_path / "figures" / "parameters.png").read_bytes()[:4] == b"\x89PNG"
    lines = out.splitlines()
    assert f"Identified on its own, not with the group: {DAMAGED}" in lines
    assert lines[5].startswith(DAMAGED) and lines[-1] == "Written to results/model.nc"
    assert lines[4].split() == (
        "parameter, the worst first group shape replayed as exp_avg differs exp_avg_sq differs param differs lost "
        "updates exp_avg_sq stuck"
    ).split()  # fmt: skip


def test_a_tree_of_it(model, found):
    tree = jaxaudit.audit_model_tree(
        model, parameters=["0.weight", "norm.bias"], ledger=None, backend="cpu",
        arithmetics=["torch-cpu-fused"],
    )  # fmt: skip
    assert list(tree.children) == ["parameters"]
    assert list(tree["parameters"].children) == ["0.weight", "norm.bias"]
    assert set(tree["parameters/norm.bias"].children) == {"free_run"}
    assert tree.identified_by.values.tolist() == ["request", "request"]
    assert (tree.ledger_exact == -1).all() and (tree.wanted_total == -1).all()


def test_growing_file_holds_what_write_does(tmp_path, found):
    datasets = {name: found[name] for name in found if name.startswith(path_of("0.weight"))}
    datasets |= {"": found[""]}
    with results.GrowingFile(tmp_path / "a.nc") as file:
        for name, dataset in datasets.items():
            file.add({name: dataset})
    further = {name: each for name, each in datasets.items() if name}
    results.write(found[""], tmp_path / "b.nc", further)
    for name in datasets:
        one, other = (xr.load_dataset(tmp_path / f, group=name or None) for f in ("a.nc", "b.nc"))
        xr.testing.assert_identical(one, other)


# --- unfinished, selected, refused ---


def test_unfinished_folder(tmp_path, folder):
    growing = record_model(tmp_path / "growing", close=False)
    with open(growing / "steps.jsonl", "rb+") as file:  # the trainer is killed within its last step
        lines = file.read().splitlines(keepends=True)
        file.truncate(sum(map(len, lines[:-1])) + 5)
    model = jaxaudit.open_model(growing)
    assert not model.finished and model.steps == STEPS - 1
    found = jaxaudit.audit_model(
        model, parameters=r"^0\.", backend="cpu", ledger=None, arithmetics=["torch-cpu-loop"]
    )[""]
    assert found.parameter.values.tolist() == ["0.weight", "0.bias"]
    assert int(found.mismatch_total.sel(parameter="0.weight").sum()) == 0
    assert found.sizes["run_timestep"] == STEPS - 1
    told = json.loads(found.attrs["verdict"])
    assert f"was not finished; it was read up to timestep {STEPS - 1}" in told[-1]["sentence"]


def test_selection(model):
    assert selected(model, None) == [*SHAPES]
    assert (
        selected(model, "bias$") == selected(model, re.compile("bias$")) == ["0.bias", "norm.bias"]
    )
    assert selected(model, ["norm.bias", "0.weight"]) == ["0.weight", "norm.bias"]
    for wrong in ("nothing", "(", [], ["0.weight", "absent"]):
        with pytest.raises(ValueError, match="parameters: "):
            selected(model, wrong)


FEW = {"backend": "cpu", "ledger": None, "arithmetics": ["torch-cpu-loop"]}


def test_steps_are_those_of_the_run(model):
    found = jaxaudit.audit_model(model, parameters=["0.weight", "norm.bias"], steps=(3, 5), **FEW)
    overview = found[""]
    assert overview.run_timestep.values.tolist() == [3, 4]
    assert overview.timestep_count.values.tolist() == [2, 1]
    assert overview.mismatch_count.sel(parameter="norm.bias").values[0] == -1
    assert found[path_of("norm.bias")].timestep.values.tolist() == [3]  # of its own steps
    with pytest.raises(ValueError, match="steps 5:9 are outside"):
        ModelAudit(model, steps=(5, 9))
    with pytest.raises(FileError, match="none of the 1 parameters was stepped"):
        ModelAudit(model, parameters=["norm.bias"], steps=(3, 4))


def test_token_groups_apply_where_they_fit(model):
    groups = TokenGroups(12, {"all": np.arange(12), "few": np.array([1, 5])})
    audit = ModelAudit(model, groups, parameters=["0.weight", "0.bias"], **FEW)
    assert audit.ungrouped == ["0.bias"]
    found = {name: each for tree in audit for name, each in tree.items()}
    assert found[path_of("0.weight")].token_group.values.tolist() == ["all", "few"]
    assert found[path_of("0.bias")].token_group.values.tolist() == ["all"]
    with pytest.raises(FileError, match="no parameter has so many rows"):
        ModelAudit(model, groups, parameters=["0.bias"])


def test_progress_runs_over_all(model):
    seen: list[tuple[int, int]] = []
    jaxaudit.audit_model(
        model,
        parameters="weight$",
        progress=lambda done, total, _: seen.append((done, total)),
        **FEW,
    )
    done = [each for each, _ in seen]
    assert done == sorted(done) and len({total for _, total in seen}) == 1
    assert done[0] == 0 and done[-1] == seen[-1][1]


def test_expectation(command, folder):
    loop = ("--only", "accounting", "--arithmetic", "torch-cpu-loop", "--overwrite")
    given = (*loop, "--expect", "torch-cpu-loop")
    status, out, _ = command(folder, *given, "--parameters", r"0\.weight|conv")
    assert status == 0 and "Expected" not in out and "look at" not in out
    status, out, _ = command(folder, *given, "--parameters", "weight$")
    assert status == 1 and f"`--parameter {DAMAGED}` says what to look at." in out
    assert f"Expected torch-cpu-loop, but {DAMAGED} does not replay bit for bit under it." in out
    status, out, _ = command(folder, *given, "--parameters", "weight$", "--json")
    told = json.loads(out)
    assert status == 1 and not told["expectation_met"] and told["not_as_expected"] == [DAMAGED]
    assert told["worst_first"][0] == DAMAGED
    assert told["parameters"][DAMAGED]["mismatch_total"] == {
        "exp_avg": 0, "exp_avg_sq": 0, "param": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("status", "said", "arguments"),
    [
        (2, "--parameters: 'nothing' matches none", ["MODEL", "--parameters", "nothing"]),
        (2, "no regular expression", ["MODEL", "--parameters", "("]),
        (2, "parameters: the name is empty", ["MODEL", "--parameters", ""]),
        (2, "--parameters chooses several", ["FILE", "--parameters", "a"]),
        (2, "--parameters chooses several", ["--parameters", "a"]),
        (2, "Leave --parameter out", ["MODEL", "--parameters", "a", "--parameter", "0.bias"]),
        (2, "--csv is for one parameter", ["MODEL", "--csv", "a.csv"]),
        (2, "a.html would be written twice", ["MODEL", "--report", "a.html", "--output", "a.html"]),
        (2, "--steps: steps 1:99 are outside", ["MODEL", "--steps", "1:99"]),
        (2, "is what this command reads", ["MODEL", "--output", "FILE", "--overwrite"]),
        (3, "no parameter 'absent'", ["MODEL", "--parameter", "absent"]),
        (3, "no parameter has so many rows", ["MODEL", "--token-groups", "GROUPS"]),
        (3, "recording.json", ["BROKEN"]),
    ],
)
def test_wrong_inputs(command, folder, tmp_path, status, said, arguments, monkeypatch):
    def audit(*_: object, **__: object) -> None:
        raise AssertionError("the audit was started")

    monkeypatch.setattr(auditing, "audit_groups", audit)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "recording.json").write_text("{}")
    places = {
        "MODEL": folder,
        "FILE": folder / "0.weight.safetensors",
        "GROUPS": jaxaudit.sample_paths()[1],
        "BROKEN": broken,
    }
    before = sorted(tmp_path.rglob("*"))
    found, out, err = command(*(places.get(word, word) for word in arguments))
    assert (found, out) == (status, ""), err
    assert said in err and 1 <= err.count("\n") <= 2 and err.startswith("run_audit.py: error: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_midway_leaves_nothing(command, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    whole = (copy / "norm.bias.safetensors").stat().st_size
    os.truncate(copy / "norm.bias.safetensors", whole - 3)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = command(copy, "--only", "accounting", "--arithmetic", "torch-cpu-loop")
    assert status == 3 and not out and "norm.bias.safetensors" in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("moment", ["audit", "write"])
def test_interrupted_midway_goes_on(command, folder, tmp_path, monkeypatch, moment):
    where, name = (auditing, "audit_groups") if moment == "audit" else (results.GrowingFile, "add")
    original, calls = getattr(where, name), []

    def interrupt(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    arguments = ("--only", "accounting", "--arithmetic", "torch-cpu-loop")
    with monkeypatch.context() as patch:
        patch.setattr(where, name, interrupt)
        status, out, err = command(folder, *arguments)
    assert (status, out) == (130, "") and len(calls) == 2
    assert "kept in results/model.nc.parts: the same command goes on" in err
    parts = tmp_path / "results" / "model.nc.parts"
    assert [path.name for path in (tmp_path / "results").iterdir()] == [parts.name]
    done = sorted(str(path.relative_to(parts)) for path in parts.rglob("*.npz"))
    assert done[0] == "000000/strip-000000.npz" and len(done) == (1 if moment == "audit" else 2)
    tried, do = [], auditing.Audit._do
    monkeypatch.setattr(auditing.Audit, "_do", lambda *a: (tried.append(a[1]), do(*a)))
    status, out, err = command(folder, *arguments)
    assert status == 0 and len(tried) > len(done)
    model = jaxaudit.open_model(folder)
    audited = sum(len(model.skipped_steps(name)) < model.steps for name in model)
    # One parameter is identified for itself once more; what was done before is not done again.
    assert len(tried) + len(done) <= audited + 1
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["model.nc"]


def test_full_disk_midway(command, folder, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("NetCDF: HDF error")

    monkeypatch.setattr(xr.Dataset, "dump_to_store", full)
    arguments = ("--only", "accounting", "--arithmetic", "torch-cpu-loop")
    status, out, err = command(folder, *arguments)
    assert (status, out) == (2, "") and "results/model.nc" in err
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["model.nc.parts"]


def test_one_parameter_as_a_recording(command, folder, tmp_path):
    arguments = ("--only", "accounting", "--arithmetic", "torch-cpu-loop", "--csv", "t.csv")
    status, out, _ = command(folder, "--parameter", "0.weight", *arguments)
    assert status == 0 and "Replays bit for bit under torch-cpu-loop" in out
    assert "Covered" not in out  # nothing is missing
    assert (tmp_path / "results" / "0.weight.nc").exists()
    assert (tmp_path / "t-all-torch-cpu-loop.csv").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h.0.attn.weight", "h.0.attn.weight"),
        ("-x", "_%2Dx"),
        ("_-x", "_-x"),
        ("_%2Dx", "_%252Dx"),
        (".a/b c", "_%2Ea%2Fb%20c"),
        ("0", "0"),
    ],
)
def test_names_of_groups(tmp_path, name, expected):
    path = variables.group_path(name)
    assert path == f"parameters/{expected}"
    with results.GrowingFile(tmp_path / "a.nc") as file:
        file.add({path: xr.Dataset(), f"{path}/updates": xr.Dataset({"x": 1})})
    with xr.open_datatree(tmp_path / "a.nc") as tree:
        assert path in [node.lstrip("/") for node in tree.groups]


def test_one_parameter_of_a_series_of_checkpoints(command, tmp_path):
    torch.manual_seed(1)
    layer = torch.nn.Linear(64, 12).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, foreach=False)
    series = tmp_path / "run.v2"
    series.mkdir()
    for step in range(1, 5):
        layer(torch.randn(3, 64, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        state = {"model": layer.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, series / f"ckpt_{step}.pt")
    arguments = ("--only", "accounting", "--arithmetic", "torch-cpu-loop")
    status, out, err = command(series, *arguments)
    assert (status, out) == (3, "") and "name one with --parameter." in err
    status, out, err = command(series, *arguments, "--parameter", "weight")
    assert status == 0, err
    assert "Replays bit for bit under torch-cpu-loop" in out
    gone = "exp_avg, exp_avg_sq, free_run, updates, moments, counterfactual"
    assert f"Not covered: {gone} (no `grad_W`)" in out
    assert out.endswith("Written to results/run.v2-weight.nc\n")
    status, out, _ = command(series, *arguments, "--parameter", "weight", "--json", "--overwrite")
    assert json.loads(out)["coverage"]["exp_avg"] == "no: no `grad_W`"


# --- text and figures of large models ---


def test_page(overview):
    text = page.html(overview, ["A note."])
    found = Page(text)
    assert not {tag for tag, _, _ in found.tags} & {"script", "iframe", "object", "form", "a"}
    assert all(each["src"].startswith("data:image/png") for each in found.all("img"))
    assert found.words("section", "h2") == ["Verdict", "Figures", "Tables", "Provenance"]
    assert found.words("main", "p")[:2] == [
        f"{LIVE - 1} of {LIVE} audited parameters replay bit for bit.",
        "A note.",
    ]
    assert found.words("ol", "li") == [
        each["sentence"] for each in json.loads(overview.attrs["verdict"])
    ]
    groups, rows = found.words("tbody", "tr", "th")[:2], found.words("tbody", "tr", "th")[2:]
    assert groups == ["0", "1"] and rows[0] == DAMAGED and {*rows[:COUNT]} == {*SHAPES}
    (row,) = cells(found, DAMAGED)
    one = overview.sel(parameter=DAMAGED)
    assert row[:3] == ["0", "12x64", str(one.arithmetic.values)]
    assert row[3:7] == ["0", "0", "1", str(STEPS)]
    (row,) = cells(found, IDLE)
    assert row[2] == "no step" and row[3:6] == ["not audited"] * 3
    assert len(found.all("figure")) == 1 and "mismatches" in found.all("img")[0]["alt"]


def test_page_of_many_parameters_and_of_hostile_ones(overview):
    found = Page(page.html(many(overview, page.MOST + 7)))
    assert any(text.startswith("and 7 more: ") for text, _ in found.texts)
    evil = '<script>alert(1)</script>" onload="x\u202e\udcff'
    names = [f"{evil}{k}" for k in range(COUNT)]
    text = page.html(
        overview.assign_coords(parameter=names).assign_attrs(title=evil, source=evil), [evil]
    )
    found = Page(text)
    assert "<script" not in text and "onload" not in {k for _, each, _ in found.tags for k in each}
    assert "\u202e" not in text and "\udcff" not in text


def many(overview: xr.Dataset, count: int) -> xr.Dataset:
    """Repeat the rows of an overview under names of their own."""
    found = overview.isel(parameter=np.arange(count) % overview.sizes["parameter"])
    names = [f"transformer.h.{k}.attention.projection.weight" for k in range(count)]
    order = np.arange(1, count + 1)
    found = found.assign_coords(parameter=("parameter", names))
    return found.assign(
        rank_by_mismatches=("parameter", order), rank_by_lost_share=("parameter", order)
    ).assign_attrs(parameter_count_of_recording=count)


@pytest.mark.parametrize(("count", "lines"), [(4, 4), (40, 40), (41, 40), (150, 40)])
def test_text_of_many_parameters(overview, count, lines):
    text = account.describe(many(overview, count)).splitlines()
    *shown, own = text[5 : text.index("", 5)]
    assert own.startswith("Identified on ") and len(shown) == lines
    if count > lines:
        assert shown[-1].startswith(f"and {count - lines + 1} more: ")


@pytest.mark.parametrize("count", [1, 4, 150])
def test_figure_of_many_parameters(overview, count):
    figure = figures.parameters(many(overview, count))
    axes = figure.get_axes()
    assert len(axes) == 2
    for axis in axes:
        assert len(axis.patches) == min(count, figures.SHOWN)
        assert ("more" in axis.get_title(loc="left")) == (count > figures.SHOWN)
    figure.canvas.draw()
    for axis in axes:
        boxes = [tick.get_window_extent() for tick in axis.get_yticklabels()]
        heights = sorted((box.y0, box.y1) for box in boxes)
        assert all(a[1] <= b[0] + 1 for a, b in zip(heights, heights[1:], strict=False))
