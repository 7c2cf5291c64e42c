"""The documentation: every Python block of every page runs, and every command and link on it is one that there is.

The site itself is built by `.ci/run`, where a warning is an error; here its generated parts are looked at.
"""

import dataclasses
import gc
import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot
from PIL import Image
from test_command_line import SCRIPTS

import jaxaudit
from jaxaudit import floats, steps
from jaxaudit.arithmetics import CATALOGUE
from jaxaudit.operations import NumpyOperations

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}

sys.path[:0] = [str(DOCS), str(ROOT / "scripts")]
draw_docs, generated_text, step_diagrams = (
    importlib.import_module(name) for name in ("draw_docs", "generated_text", "step_diagrams")
)


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", TEXTS[page], re.DOTALL | re.MULTILINE)


# Blocks of Python.


class Setting(NamedTuple):
    """What a page takes for granted, and what it must come to.

    Attributes:
        prepare: makes the files that it reads, and returns the names that its blocks use.
        says: texts that its blocks print.
        check: looks at the names that its blocks leave, in the folder in which they ran.
        modules: what it needs to be installed.
    """

    prepare: Callable[[Path], dict[str, Any]] = lambda folder: {}
    says: tuple[str, ...] = ()
    check: Callable[[Mapping[str, Any]], object] = lambda names: None
    modules: tuple[str, ...] = ()


def readme_loop(folder: Path) -> dict[str, Any]:
    """Make what README's blocks call their own: a model, an optimizer, batches, a step and a loop."""
    import torch
    from safetensors.numpy import save_file

    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.embedding = torch.nn.Embedding(12, 8, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def training_step(batch: Any) -> float:
        optimizer.zero_grad()
        loss = model.embedding(batch).square().sum()
        loss.backward()
        optimizer.step()
        return loss.item()

    def train(model: Any, optimizer: Any) -> None:
        training_step(torch.arange(5))

    sample = folder / "results" / "sample.nc"
    if not sample.exists():  # nobody has audited it yet; variables are alike
        sample.symlink_to(ROOT / "results" / "full.nc")
    save_file({"dead_mask": np.arange(12) > 5}, folder / "run-token-groups.safetensors")
    given = {"model": model, "optimizer": optimizer, "training_step": training_step, "train": train}
    return given | {"batches": torch.randint(6, (5, 4)), "jaxaudit": jaxaudit}


def tutorial_came_out(names: Mapping[str, Any]) -> None:
    table = TEXTS["dataset.md"].split("### Attributes")[1].split("\n#")[0]
    told = {
        x for row in re.findall(r"^\| (`.*?) \|", table, re.M) for x in re.findall(r"`(\w+)`", row)
    }
    assert told - {"identified_by"} == set(names["tree"].attrs)
    assert names["tree"].attrs["identified_arithmetic"].split(",")[0] == "torch-cpu-loop"
    share = names["share"].sel(token_group="dead")
    assert share.sel(timestep=100) == 0 and share.sel(timestep=300) > 0.99
    assert (names["recovered"] / names["lost"]).sel(remedy="float32-master") == 1
    assert not names["updates"].lost_count.sel(token_group="dead").any()


def model_replays(names: Mapping[str, Any]) -> None:
    assert (names["overview"].mismatch_total <= 0).all()


def gate_holds(names: Mapping[str, Any]) -> None:
    """Run the page's own command on the page's own recording; another name must not pass."""
    run_audit = importlib.import_module("run_audit")
    (command,) = [x for x in commands("continuous-integration.md") if x[:2] == ["run_audit", "run"]]
    assert run_audit.main(command[1:]) == 0
    other = [word.replace("cpu", "cuda") for word in command[1:]]
    assert run_audit.main([*other, "--overwrite"]) == 1


SETTINGS = {
    "README.md": Setting(readme_loop, modules=("torch",)),
    "tutorial.md": Setting(
        says=("0 updates lost", "changed nothing"), check=tutorial_came_out, modules=("torch",)
    ),
    "continuous-integration.md": Setting(check=gate_holds, modules=("torch",)),
    "gpu.md": Setting(says=("'tpu' is not available", "cpu 1 {")),
    "own-data.md": Setting(
        says=(
            "exp_avg yes",
            "mine: torch-cpu-loop",
            "3 float16",
            "bfloat16 yes",
            "((1, 2), (4, 5)) [1 2] 2",
        )
        + ("torch-cpu-loop", " 3 True"),
        modules=("torch", "h5py"),
    ),
    "whole-models.md": Setting(check=model_replays, modules=("torch",)),
    "adam-arithmetics.md": Setting(modules=("torch",)),
}

#: Pages whose blocks another test runs, with what they need.
ELSEWHERE = {
    "analyses.md": "test_notebook.py",
    "benchmark.md": "test_benchmark.py",
    "recording.md": "test_recorders_forms.py",
}


#: Pages whose blocks take a quarter of a minute.
LONG = ("whole-models.md",)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(name, marks=pytest.mark.long if name in LONG else ())
        for name in PAGES
        if blocks(name) and name not in ELSEWHERE
    ],
)
def test_every_block_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    setting = SETTINGS.get(page, Setting())
    for name in setting.modules:
        pytest.importorskip(name)
    (tmp_path / "results").mkdir()
    for path in (ROOT / "results").iterdir():  # read, never written
        (tmp_path / "results" / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"} | setting.prepare(tmp_path)
    try:
        for block in blocks(page):
            exec(compile(block, page, "exec"), names)
        said = capsys.readouterr().out
        for text in setting.says:
            assert text in said
        setting.check(names)
    finally:
        close(names)


def close(names: dict[str, Any]) -> None:
    """Close what a page has left open: netCDF may crash where the collector closes a file while it opens another."""
    for value in names.values():
        if isinstance(value, xr.Dataset | xr.DataArray | xr.DataTree):
            value.close()
    names.clear()
    pyplot.close("all")
    gc.collect()


def test_pages_that_are_run_elsewhere_are_named_there():
    for page, test in ELSEWHERE.items():
        assert page in (Path(__file__).with_name(test)).read_text(encoding="utf-8")


# Commands.


def commands(page: str) -> list[list[str]]:
    """List the commands on a page that run a script, or the installed command: the script's name, then arguments."""
    found = re.findall(r"python scripts/(\w+)\.py\b *((?:\\\n|[^\n`#|>&;])*)", TEXTS[page])
    installed = r"(?:^    |`|python -m )jaxaudit ([a-z]+)\b *([^\n`#|>&;]*)"
    found += [(SCRIPTS[name], rest) for name, rest in re.findall(installed, TEXTS[page], re.M)]
    return [[name, *shlex.split(rest.replace("\\\n", " "))] for name, rest in found]


def parser_of(name: str) -> Any:
    return generated_text.parser_of(name)


@pytest.mark.parametrize("page", [name for name in PAGES if commands(name)])
def test_every_command_is_one_that_its_script_takes(page: str):
    for name, *arguments in commands(page):
        assert (ROOT / "scripts" / f"{name}.py").exists()
        if name.startswith("prove_"):
            pytest.importorskip("torch")
        if hasattr(importlib.import_module(name), "parser") and arguments:
            parser_of(name).parse_args([x for x in arguments if x != "--help"])


#: Options of other programs that pages name.
OTHERS = {"--quiet", "--keep-going", "--xla_force_host_platform_device_count"}


def test_every_option_that_a_page_names_is_there():
    pytest.importorskip("torch")  # some scripts do nothing without it
    scripts = [
        path.stem
        for path in (ROOT / "scripts").glob("*.py")
        if re.search(r"^(def parser\b|parser = )", path.read_text(), re.MULTILINE)
    ]
    known = {o for name in scripts for a in parser_of(name)._actions for o in a.option_strings}
    for page, text in TEXTS.items():
        text = re.sub(
            r"^.*(?:pip install|XLA_FLAGS|#SBATCH|srun |dask ).*$", "", text, flags=re.MULTILINE
        )
        named = set(re.findall(r"(?<=[`\s(])--[a-z][a-z0-9_-]+", text))
        assert named <= known | OTHERS, page


# Links: on GitHub as on the site.


def slug(heading: str) -> str:
    text = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", lambda m: m[1] or "", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = generated_text.fill_in(page.read_text(encoding="utf-8"))
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str):
    text = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (PAGES[page].parent / name).resolve() if name else PAGES[page]
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


# Generated parts.


def test_every_public_name_is_in_the_reference():
    named = " ".join(re.findall(r"<!-- generated: members (.+) -->", TEXTS["api.md"])).split()
    assert sorted(x for x in named if "." not in x) == sorted(jaxaudit.__all__)


def test_every_table_of_variables_is_in_the_reference():
    text = generated_text.fill_in(TEXTS["dataset.md"])
    assert "<!-- generated" not in text
    tables = re.findall(r"<!-- generated: variables (\S+) -->", TEXTS["dataset.md"])
    found: set[str] = set()
    for path in sorted((ROOT / "jaxaudit").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        named = re.findall(r"^([A-Z_]+) = \{\n(?:    #.*\n)*    \"\w+\": (?:Field|_\w+)\(", path.read_text(), re.M)  # fmt: skip
        found |= {f"{module}:{name}" for name in named if name != "COORDINATES"}
    assert found - {name for name in found if not is_table(name)} == set(tables)


def is_table(name: str) -> bool:
    module, table = name.split(":")
    values = getattr(importlib.import_module(module), table).values()
    return all(type(each).__name__ == "Field" for each in values)


def test_the_command_s_every_option_is_in_the_reference():
    pytest.importorskip("torch")  # some scripts do nothing without it
    for name in re.findall(r"<!-- generated: options (\w+) -->", TEXTS["commands.md"]):
        text = generated_text.options(name)
        for action in parser_of(name)._actions:
            for option in set(action.option_strings) - {"-h", "--help"}:
                assert option in text or action.help == "==SUPPRESS=="


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_arithmetic_has_its_formula_diagram_source_and_evidence(name: str):
    sections = re.split(r"^### ", generated_text.catalogue(), flags=re.MULTILINE)
    (section,) = [one for one in sections if one.startswith(f"{name}\n")]
    assert re.search(r"```text\n[^`]{20,}", section) and f"](figures/{name}.svg)" in section
    assert re.search(r"^source\n: .{10}", section, re.MULTILINE)
    (compared,) = re.findall(r"^compared bit for bit with\n: (.+)$", section, re.MULTILINE)
    # What is said of an arithmetic is what its certificate holds.
    held = json.loads((ROOT / "results" / "arithmetics.json").read_text(encoding="utf-8"))
    proved = name in {each["arithmetic"] for each in held["compared"]}
    elsewhere = name in ("float32-then-bfloat16", "float32", "stochastic-rounding")
    assert compared.startswith("nothing yet") == (not proved and not elsewhere)


# Diagrams.


def test_the_kept_diagrams_are_what_the_catalogue_gives():
    assert draw_docs.main(["--check"]) == 0
    kept = {path.stem for path in draw_docs.FOLDER.glob("*.svg")}
    assert kept == set(CATALOGUE)


def test_a_diagram_that_is_out_of_date_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(draw_docs, "FOLDER", tmp_path)
    for path, text in draw_docs.diagrams().items():
        path.write_text(text, encoding="utf-8")
    assert draw_docs.main(["--check"]) == 0
    (tmp_path / "optax.svg").write_text("<svg/>")
    assert draw_docs.main(["--check"]) == 1
    assert capsys.readouterr().err.count("optax.svg") == 1


FORMATS = {fmt.name: fmt for fmt in floats.FORMATS.values()}


def evaluated(node: Any, numbers: Mapping[str, Any]) -> Any:
    """Compute a traced result in NumPy, rounding where its nodes say so."""
    ops = NumpyOperations()
    if not node.inputs:
        constant = node.operation == "constant"
        return np.float32(float(node.name)) if constant else numbers[node.name]
    a, *rest = (evaluated(each, numbers) for each in node.inputs)
    wide = node.formats[:1] == ("float64",)
    found = {
        "+": ops.wide_add if wide else ops.add,
        "−": ops.subtract,
        "×": ops.wide_multiply if wide else ops.multiply,
        "÷": ops.divide,
        "√": ops.sqrt,
        "a × b + c": ops.wide_fma if wide else ops.fma,
        "negated": ops.negate,
        "scalar loop, or not": lambda a, b: np.where(numbers["tail"] != 0, a, b),
    }[node.operation](a, *rest)
    for fmt in node.formats[wide:]:
        found = ops.narrow(found) if wide and fmt == "float32" else found
        found = ops.round_to(found, FORMATS[fmt])
    return found


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_diagram_computes_what_the_step_computes(name: str):
    """To the bit, on numbers of usual sizes: the diagram has every operation and every rounding."""
    traced = step_diagrams.trace(CATALOGUE[name])
    rng, ops = np.random.default_rng(5), NumpyOperations()
    sizes = {"exp_avg": 1e-3, "exp_avg_sq": 1e-6, "grad": 1e-3, "param": 0.02, "compensation": 1e-5}
    numbers: dict[str, Any] = {"tail": rng.integers(0, 2, 5000)}
    for key, size in sizes.items():
        values = rng.normal(0, size, 5000).astype(np.float32)
        values = np.abs(values) if key == "exp_avg_sq" else values
        fmt = traced.step.format_of(key) if key in steps.STATE else traced.step.storage
        numbers[key] = ops.round_to(values, fmt)
    scalars = {
        key: values[1]
        for key, values in step_diagrams.scalars_of(
            traced.step,
            traced.arithmetic.rule,
            step_diagrams._GIVEN,
            step_diagrams._TIMESTEPS,
        ).items()
    }
    state = traced.step.advance(ops, scalars, numbers, {})
    after = {f"new_{key}": values for key, values in state.items()}
    for key in ("exp_avg", "exp_avg_sq"):
        node = traced.results[key]
        formats = [f for f in node.formats if f not in ("bfloat16", "float16")]
        raw = dataclasses.replace(node, formats=tuple(formats))
        after[f"unrounded {key}"] = evaluated(raw, numbers | scalars)
    for key, node in traced.results.items():
        np.testing.assert_array_equal(evaluated(node, numbers | scalars | after), state[key])


def test_the_finding_is_that_of_the_sample():
    """Its numbers are those that the command prints on README, and the page below it says them."""
    with Image.open(draw_docs.FOLDER / "finding.png") as figure:
        said = json.loads(figure.info["Description"])
    counts = re.search(
        r"^float32-then-bfloat16 +([\d,]+) +([\d,]+) +([\d,]+)$", TEXTS["README.md"], re.M
    )
    assert counts is not None
    assert said["float32-then-bfloat16"] == sum(int(n.replace(",", "")) for n in counts.groups())
    lost = re.search(
        r"wanted updates of dead tokens \((\d+) %\) .* of live tokens, (\d+) %", TEXTS["README.md"]
    )
    assert lost is not None and [said["dead"], said["live"]] == [int(n) for n in lost.groups()]
    for name in ("values", "float32-then-bfloat16"):
        assert f"{said[name]:,}" in TEXTS["index.md"]
    assert f"{said['dead']} % of the updates" in TEXTS["index.md"]
