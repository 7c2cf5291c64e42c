"""Comparisons of whole models: recordings and audits, parameter by parameter, and the overview of all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.image import imread

import jaxaudit
from jaxaudit.divergence import model_account, model_figures
from jaxaudit.divergence.overview import parting, worst_first
from jaxaudit.divergence.variables import MODEL_AUDIT_VARIABLES, MODEL_VARIABLES, NEVER
from jaxaudit.recording import TokenGroups
from jaxaudit.safetensors_file import FileError

torch = pytest.importorskip("torch")

STEPS = 8
SHAPES = {"wte.weight": (20, 8), "0.weight": (8, 8), ".odd/näme": (8,), "idle": (8,), "norm": (8,)}
PARTS = "0.weight"  # of which a gradient is another at timestep 4, in one of the runs


def train(
    path: Path,
    *,
    names: Any = tuple(SHAPES),
    other: bool = False,
    idle: float = 0.0,
    steps: int = STEPS,
    every: int = 1,
    wide: bool = False,
    **how: Any,
) -> Path:
    torch.manual_seed(0)
    shapes = SHAPES | ({"norm": (9,)} if wide else {})
    named = {n: torch.nn.Parameter((0.1 * torch.randn(s)).to(torch.bfloat16)) for n, s in shapes.items()}  # fmt: skip
    named = {name: named[name] for name in names}
    if "idle" in named:
        with torch.no_grad():
            named["idle"][5] += idle
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2, **({"foreach": False} | how))
    generator = torch.Generator().manual_seed(1)
    with jaxaudit.record(optimizer, path, named_parameters=named.items(), every=every):
        for step in range(steps):
            for name, shape in SHAPES.items():
                grad = (0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16)
                if name not in named or name == "idle":
                    continue
                if wide and name == "norm":
                    grad = torch.nn.functional.pad(grad, (0, 1))
                named[name].grad = grad + 0.01 * named[name].detach()
                if other and name == PARTS and step == 3:
                    named[name].grad[2, 5] += 1
            optimizer.step()
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "a": train(folder / "a"),
        "same": train(folder / "same"),
        "other": train(folder / "other", other=True),
        "fused": train(folder / "fused", foreach=None, fused=True),
        "fewer": train(folder / "fewer", names=[*SHAPES][1:]),
        "idle": train(folder / "idle", idle=1.0),
        "longer": train(folder / "longer", steps=STEPS + 3),
        "third": train(folder / "third", every=3),
        "wide": train(folder / "wide", wide=True),
    }


def compared(runs: dict[str, Path], other: str, **how: Any) -> dict[str, xr.Dataset]:
    models = (jaxaudit.open_model(runs[name]) for name in ("a", other))
    return jaxaudit.compare_models(*models, **how)


@pytest.fixture(scope="module")
def parted(runs) -> dict[str, xr.Dataset]:
    return compared(runs, "other")


@pytest.fixture
def command(script, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    main = script("compare_runs").main

    def run(*words: object) -> tuple[int, str, str]:
        status = main([str(word) for word in (*words, "--quiet")])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_each_parameter_is_compared_as_by_itself(runs, parted):
    assert [*parted] == [
        "",
        *(f"parameters/{n}" for n in ("wte.weight", "0.weight", "_%2Eodd%2Fn%C3%A4me", "norm")),
    ]
    for path, found in parted.items():
        if not path:
            continue
        name = found.attrs["parameter"]
        with (
            jaxaudit.open_recording(runs["a"], name) as a,
            jaxaudit.open_recording(runs["other"], name) as b,
        ):
            xr.testing.assert_identical(
                found.drop_attrs(deep=False), jaxaudit.compare(a, b).drop_attrs(deep=False)
            )


def test_where_they_part(parted):
    overview = parted[""]
    timestep, tensor, places = parting(overview) or (0, "", [])
    assert (timestep, tensor) == (4, "grad")
    assert [str(overview.parameter.values[k]) for k in places] == [PARTS]
    one = overview.sel(parameter=PARTS)
    assert one.first_difference.values[:3].tolist() == [4, 2, 5]
    assert one.first_differing_timestep.sel(compared_tensor="exp_avg").item() == 4
    assert one.is_identical == 0 and str(one.first_tensor.values) == "grad"
    rest = overview.drop_sel(parameter=PARTS)
    assert (rest.is_identical == 1).all() and not (rest.differing_total > 0).any()
    assert (rest.first_difference == NEVER).all()
    assert overview.rank_by_distance.sel(parameter=PARTS) == 1
    assert overview.rank_by_first_difference.sel(parameter=PARTS) == 1
    assert sorted(overview.rank_by_distance.values) == [1, 2, 3, 4, 5]


def test_courses_are_those_of_the_parameters(parted):
    overview = parted[""]
    assert {*overview.data_vars} == {*MODEL_VARIABLES}
    assert overview.compared_timestep.values.tolist() == [*range(1, STEPS + 1)]
    squares, counts = np.zeros(STEPS), np.zeros(STEPS, np.int64)
    for path, found in parted.items():
        if not path:
            continue
        one = overview.sel(parameter=found.attrs["parameter"])
        weights = found.sel(tensor="param", token_group="all")
        for name in ("differing_count", "max_ulp_distance", "distance"):
            np.testing.assert_array_equal(one[name], weights[name])
        moved = found.displacement_norm.sel(token_group="all")
        np.testing.assert_array_equal(one.displacement_norm, moved)
        np.testing.assert_array_equal(one.relative_distance, weights.distance / moved.sel(run="a"))
        squares += np.square(weights.distance.values)
        counts += weights.differing_count.values
    np.testing.assert_array_equal(overview.total_distance, np.sqrt(squares))
    np.testing.assert_array_equal(overview.total_differing_count, counts)
    apart = overview.distance.sel(parameter=PARTS).values
    assert overview.distance_growth.sel(parameter=PARTS) == apart[-1] / apart[apart > 0][0]
    idle = overview.sel(parameter="idle")
    assert idle.timestep_count == 0 and idle.element_count == 8 and idle.is_identical == 1
    assert (idle.differing_count == -1).all() and np.isnan(idle.distance).all()


def test_a_model_and_itself(runs):
    overview = compared(runs, "same")[""]
    assert parting(overview) is None and model_account.identical(overview)
    assert model_account.sentences(overview)[0] == (
        "Bit-identical: every element of all 5 parameters that are compared, 248 per timestep, in all 8 timesteps and "
        "at the start."
    )
    model_figures.parameters(overview)


def test_weights_that_were_never_stepped(runs):
    """Frozen weights of another start are found, though no step of theirs was recorded."""
    overview = compared(runs, "idle")[""]
    one = overview.sel(parameter="idle")
    assert one.is_identical == 0 and one.differing_count_at_start == 1
    assert one.first_difference.values[:3].tolist() == [0, 5, 0]
    assert not model_account.identical(overview)
    text = model_account.sentences(overview)[0]
    assert text.startswith("They are apart at the start already, in 1 of 5 parameters")


def test_what_only_one_holds(runs):
    found = compared(runs, "fewer")[""]
    assert json.loads(found.attrs["only_in_a"]) == ["wte.weight"]
    assert json.loads(found.attrs["only_in_b"]) == []
    assert "wte.weight" not in found.parameter.values and model_account.identical(found)
    assert "Only a holds wte.weight, which is not compared." in model_account.sentences(found)


def test_other_lengths_and_gaps(runs):
    longer, third = compared(runs, "longer")[""], compared(runs, "third")[""]
    assert longer.compared_timestep.values.tolist() == [*range(1, STEPS + 1)]
    assert third.compared_timestep.values.tolist() == [1, 4, 7]
    assert model_account.identical(longer) and model_account.identical(third)


def test_other_shapes_are_told_and_not_identical(runs):
    overview = compared(runs, "wide")[""]
    assert str(overview.reason.sel(parameter="norm").values) == "the shapes are [8] and [9]"
    assert not model_account.identical(overview)
    assert "Not compared: norm (the shapes are [8] and [9])." in model_account.sentences(overview)
    assert "not compared" in model_account.describe(overview)
    with pytest.raises(FileError, match="none of the 1 common parameters can be compared"):
        compared(runs, "wide", parameters=["norm"])


def test_order_of_the_worst(runs):
    overview = compared(runs, "fused")[""]
    ends = overview.relative_distance.values[:, -1]
    found = np.nan_to_num(ends[worst_first(overview)])
    assert (np.diff(found) <= 0).all() and found[0] > 0
    timestep, tensor, places = parting(overview) or (0, "", [])
    assert (timestep, tensor) == (1, "param") and len(places) > 1
    assert "optimizer's arithmetic" in model_account.sentences(overview)[1]


def test_parameters_steps_and_groups(runs):
    found = compared(runs, "other", parameters="weight$", steps=(3, 6))
    assert [*found] == ["", "parameters/wte.weight", "parameters/0.weight"]
    assert found[""].compared_timestep.values.tolist() == [3, 4, 5]
    groups = TokenGroups(20, {"all": np.arange(20), "few": np.array([1, 4])})
    found = compared(runs, "other", groups=groups, parameters="weight$")
    assert found["parameters/wte.weight"].token_group.values.tolist() == ["all", "few"]
    assert found["parameters/0.weight"].token_group.values.tolist() == ["all"]
    for text, how in (
        ("matches none", {"parameters": "zzz"}),
        ("no regular expression", {"parameters": "("}),
        ("not in the recording", {"parameters": ["zzz"]}),
        ("no parameter of both", {"steps": (20, 30)}),
    ):
        with pytest.raises(ValueError, match=text):
            compared(runs, "other", **how)
    with pytest.raises(FileError, match="no parameter has so many rows"):
        compared(runs, "other", groups=TokenGroups(3, {"all": np.arange(3)}))


def test_progress_runs_over_all(runs):
    seen: list[tuple[int, int]] = []
    compared(runs, "other", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] and len({total for _, total in seen}) == 1


# The command.


def test_command(command, runs, parted, tmp_path):
    status, out, err = command(runs["a"], runs["other"], "--plots", "figures")
    assert status == 0, err
    assert "They part at timestep 4: the gradient of 1 of 5 parameters differs first" in out
    lines = out.splitlines()
    head = next(k for k, line in enumerate(lines) if line.startswith("parameter, the worst first"))
    assert lines[head + 1].split()[:4] == [PARTS, "8x8", "4", "grad"]
    assert os.listdir("figures") == ["parameters.png"]
    assert imread("figures/parameters.png").std() > 0.01
    with xr.open_datatree("results/a-against-other.nc") as tree:
        xr.testing.assert_equal(tree.to_dataset(), parted[""])
        for name, dataset in parted.items():
            if name:
                kept = tree[name].to_dataset()[[*dataset.data_vars]]
                xr.testing.assert_equal(kept, dataset)
                assert tree[name].attrs["parameter"] == dataset.attrs["parameter"]
    tree = jaxaudit.compare_models_tree(*(jaxaudit.open_model(runs[n]) for n in ("a", "other")))
    tree.to_netcdf(tmp_path / "tree.nc")


def test_command_expects_identity(command, runs):
    given = ("--expect", "identical", "--overwrite")
    assert command(runs["a"], runs["same"], *given)[0] == 0
    status, out, _ = command(runs["a"], runs["other"], *given)
    assert status == 1 and "Expected identical" in out
    assert command(runs["a"], runs["other"], *given, "--parameters", "wte|norm")[0] == 0
    status, out, _ = command(runs["a"] / "recording.json", runs["other"], *given, "--json")
    told = json.loads(out)
    assert status == 1 and not told["identical"] and not told["expectation_met"]
    assert told["first_timestep"] == 4 and told["first_parameters"] == [PARTS]
    assert told["worst_first"][0] == PARTS and told["output"] == "results/a-against-other.nc"
    assert told["parameters"][PARTS]["first_difference"]["token"] == 2


@pytest.mark.parametrize(
    ("status", "said", "words"),
    [
        (2, "--parameters: 'zzz' matches none", ["A", "B", "--parameters", "zzz"]),
        (2, "parameters: the name is empty", ["A", "B", "--parameters", ""]),
        (2, "--steps: steps 20:30", ["A", "B", "--steps", "20:30"]),
        (2, "--parameters chooses among", ["FILE", "FILE", "--parameters", "x"]),
        (2, "is what this command reads", ["A", "B", "--output", "FILE", "--overwrite"]),
        (3, "Give two of one kind", ["A", "FILE"]),
        (3, "recording.json", ["A", "BROKEN"]),
        (3, "no parameter in common", ["A", "NOTHING"]),
        (3, "no complete step was recorded", ["EARLY", "A"]),
    ],
)
def test_wrong_inputs(command, runs, tmp_path, status, said, words):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "recording.json").write_text("{}")
    nothing = shutil.copytree(runs["a"], tmp_path / "nothing")
    index = json.loads((nothing / "recording.json").read_text())
    for k, entry in enumerate(index["parameters"]):
        entry["name"] = entry["file"] = f"x{k}"
    (nothing / "recording.json").write_text(json.dumps(index))
    early = shutil.copytree(runs["a"], tmp_path / "early")
    (early / "steps.jsonl").write_text("")
    places = {
        "A": runs["a"],
        "B": runs["other"],
        "FILE": runs["a"] / "wte.weight.safetensors",
        "BROKEN": broken,
        "NOTHING": nothing,
        "EARLY": early,
    }
    found, out, err = command(*(places.get(word, word) for word in words))
    assert (found, out) == (status, "") and said in err and err.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_damaged_file_leaves_nothing(command, runs, tmp_path):
    copy = shutil.copytree(runs["a"], tmp_path / "copy")
    os.truncate(copy / "norm.safetensors", 500)
    status, out, err = command(runs["a"], copy)
    assert status == 3 and not out and "norm.safetensors" in err
    assert sorted(os.listdir(tmp_path)) == ["copy"]


# Audits.


def audited(path: Path, folder: Path, **how: Any) -> Path:
    tree = jaxaudit.audit_model_tree(
        jaxaudit.open_model(path), arithmetics=["torch-cpu-loop"], backend="cpu", ledger=None, **how
    )
    tree.to_netcdf(folder / f"{path.name}.nc")
    return folder / f"{path.name}.nc"


@pytest.fixture(scope="module")
def audits(runs, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("audits")
    return {name: audited(runs[name], folder) for name in ("a", "other", "fewer")}


def test_two_audits_of_models(command, audits):
    status, out, err = command(audits["a"], audits["other"], "--plots", "figures")
    assert status == 0, err
    assert "The audits of 1 of 4 common parameters differ, from timestep 4 on." in out
    assert "4 parameters in a, 4 in b; mismatches in all: 0 in a, 0 in b" in out
    assert os.listdir("figures") == ["lost_updates.png"]
    with xr.open_datatree("results/a-against-other.nc") as tree:
        overview = tree.to_dataset()
        assert {*overview.data_vars} == {*MODEL_AUDIT_VARIABLES}
        assert overview.rank_by_differing_variables.sel(parameter=PARTS) == 1
        assert overview.first_differing_timestep.sel(parameter=PARTS) == 4
        assert overview.is_identical.values.tolist() == [1, 0, 1, -1, 1]
        one = tree[f"parameters/{PARTS}"].to_dataset()
        assert int(one.differing_entry_count.sel(variable="norm_observed")) > 0
        assert "overview" in tree.children


def test_two_audits_that_are_identical(command, audits):
    given = ("--expect", "identical", "--overwrite")
    assert command(audits["a"], audits["a"], *given)[0] == 0
    assert command(audits["a"], audits["other"], *given)[0] == 1
    given = (*given, "--parameters", "norm")
    status, out, _ = command(audits["a"], audits["fewer"], *given, "--json")
    assert status == 0 and [*json.loads(out)["parameters"]] == ["norm"]
    status, out, _ = command(audits["a"], audits["fewer"], "--overwrite")
    assert status == 0 and "Only a holds wte.weight" in out
    status, _, err = command(audits["a"], audits["fewer"], "--parameters", "zzz", "--overwrite")
    assert status == 2 and "--parameters: 'zzz' matches none" in err


def test_audits_of_a_model_and_of_one_parameter(command, audits, runs, tmp_path):
    with jaxaudit.open_recording(runs["a"], "norm") as recording:
        dataset = jaxaudit.audit(recording, arithmetics=["torch-cpu-loop"], backend="cpu")
    jaxaudit.save(dataset, tmp_path / "one.nc")
    status, _, err = command(audits["a"], "one.nc")
    assert status == 3 and "Give two of one kind" in err
    status, _, err = command(audits["a"], runs["a"])
    assert status == 3 and "is a NetCDF file" in err
