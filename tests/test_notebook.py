"""The documents that hold code: the old notebook taken up again, and the worked analyses."""

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOK, PAGE = DOCS / "old-notebook.ipynb", DOCS / "analyses.md"
RESULT = "../results/full.nc"


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full() -> xr.DataTree:
    with xr.open_datatree(DOCS / RESULT) as file:
        return file.load()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Figures are counted instead of shown; settings are as before afterwards."""
    matplotlib.use("agg")
    shown: list[int] = []
    monkeypatch.setattr(plt, "show", lambda: (shown.append(len(plt.get_fignums())), plt.close("all")))  # fmt: skip
    with matplotlib.rc_context():
        yield shown
    plt.close("all")


def code_of(notebook: dict[str, Any]) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(cells: list[str], drawn: list[int]) -> list[tuple[str, int]]:
    """Run cells as plain Python; return what each prints, and how many figures it shows."""
    found, names = [], {}
    with contextlib.chdir(DOCS):
        for number, cell in enumerate(cells, 1):
            drawn.clear()
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(cell, f"cell {number}", "exec"), names)
            found.append((printed.getvalue(), sum(drawn)))
    return found


def test_the_notebook_holds_what_its_cells_print(notebook, drawn, script):
    held = script("execute_docs").outputs(notebook)
    assert run(code_of(notebook), drawn) == held
    assert sum(figures for _, figures in held) == 5 and sum(bool(text) for text, _ in held) > 10


def test_every_statement_of_the_notebook_is_held_by_an_assert(notebook):
    cells = notebook["cells"]
    texts = [k for k, cell in enumerate(cells) if cell["cell_type"] == "markdown"]
    for text, end in zip(texts, [*texts[1:], len(cells)], strict=True):
        code = "\n".join("".join(cell["source"]) for cell in cells[text + 1 : end])
        assert re.search(r"^assert ", code, re.MULTILINE), cells[text]["source"]


def test_the_notebook_is_small_and_stands_alone(notebook):
    assert NOTEBOOK.stat().st_size < 600_000
    code = "\n".join(code_of(notebook))
    imported = {*re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)}
    assert imported == {"json", "pathlib", "matplotlib", "numpy", "xarray"}
    for cell in notebook["cells"]:
        outputs = cell.get("outputs", [])
        assert all(output.get("name", "stdout") == "stdout" for output in outputs)
        # Whoever does not see a figure is told what it shows.
        if any("data" in output for output in outputs):
            assert len(cell["metadata"]["mystnb"]["image"]["alt"]) > 40


# A result of which a statement is not true.


def change(group: str, name: str, value: Any, **at: Any) -> Callable[[xr.DataTree], None]:
    """Change part of a variable: to a value, or by one as a string `+1` or `-1`."""

    def apply(tree: xr.DataTree) -> None:
        array = tree[group][name]
        array.loc[at] = array.loc[at] + int(value) if isinstance(value, str) else value

    return apply


def change_attribute(name: str, old: str, new: str) -> Callable[[xr.DataTree], None]:
    def apply(tree: xr.DataTree) -> None:
        assert old in tree.attrs[name]
        tree.attrs[name] = tree.attrs[name].replace(old, new)

    return apply


EXACT, OLD = "torch-cpu-loop", "float32-then-bfloat16"
ONE = {"timestep": 500, "token_group": "all"}
END = {"timestep": 1000, "token_group": "dead"}

#: By the heading under which the notebook must stop, with words for what is changed.
UNTRUE = {
    ("The old notebook", "format"): change_attribute("storage_format", "bfloat16", "float16"),
    ("Its prediction", "decay"): change_attribute("hyperparameters", '"value": 0.0}', '"value": 0.1}'),
    ("Its checks", "a ratio of 0"): change("/", "norm_predicted", 0.0, arithmetic=OLD, timestep=5, token_group="dead"),
    ("What the checks cannot", "few bits"): change("/", "mismatch_count", 9, arithmetic=OLD, timestep=5, token_group="dead"),
    ("Zero over zero", "undefined"): change("/", "ratio", np.nan, arithmetic=OLD, timestep=7, token_group="dead"),
    ("Zero over zero", "no rest"): change("lattice", "regime_count", 0, regime="frozen"),
    ("What it believed", "low bits"): change("moments", "exp_avg_low_bits_zero_count", "-1", **ONE),
    ("The real arithmetic", "another"): change_attribute("identified_arithmetic", EXACT, "torch-cpu-fused"),
    ("The real arithmetic", "a bit"): change("/", "mismatch_count", "+1", arithmetic=EXACT, stage="exp_avg", **ONE),
    ("The real arithmetic", "not audited"): change("/", "audited", 0, arithmetic=EXACT, stage="exp_avg"),
    ("The real arithmetic", "left to itself"): change("free_run", "mismatch_count", "+1", arithmetic=EXACT, **ONE),
    ("The real arithmetic", "ratio"): change("/", "ratio", 1.0001, arithmetic=EXACT, timestep=7, token_group="all"),
    ("Why the tokens froze, first", "a fall"): change("moments", "exp_avg_sq_stuck_count", "-1", **ONE),
    ("Why the tokens froze, first", "root"): change("moments", "root_ratio_quantile", 1.0, token_group="dead"),
    ("Why the tokens froze, second", "landed"): change("updates", "lost_count", 0, **END),
    ("Why the tokens froze, second", "lost early"): change("updates", "lost_count", 10**6, timestep=50, token_group="dead"),
    ("Why the tokens froze, second", "wrong way"): change("updates", "against_count", "+1", **ONE),
    ("Why the tokens froze, second", "unasked"): change("updates", "unwanted_count", "+1", **ONE),
    ("Why the tokens froze, second", "taken"): change("updates", "descent_quality", 0.5, **END),
    ("One after the other", "moving"): change("tokens", "freeze_onset", -1),
    ("One after the other", "too early"): change("tokens", "freeze_onset", 600),
    ("One after the other", "regime"): change("lattice", "regime_count", 0, regime="early", timestep=100),
    ("Which half", "masters"): change("counterfactual", "recovered_count", 0.0, remedy="float32-master"),
    ("Which half", "all move"): change("counterfactual", "free_moving_tokens", 10_000, remedy="recorded"),
    ("Which half", "far"): change("counterfactual", "free_distance", 1e3, remedy="kahan"),
    ("And weight decay", "rate"): change_attribute("hyperparameters", '"value": 0.001}', '"value": 0.1}'),
}  # fmt: skip


@pytest.mark.parametrize("untrue", UNTRUE, ids=": ".join)
def test_the_notebook_stops_where_a_statement_is_not_true(
    notebook, full, drawn, monkeypatch, untrue
):
    tree = full.copy(deep=True)
    UNTRUE[untrue](tree)

    @contextlib.contextmanager
    def opened(path: str) -> Any:
        assert path == RESULT
        yield tree

    monkeypatch.setattr(xr, "open_datatree", opened)
    heading, parts = "", []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = source.splitlines()[0].strip("# ")
        elif "plt.show()" not in source:  # figures take long
            parts.append((heading, source))
    with pytest.raises(AssertionError) as stopped:
        run([source for _, source in parts], drawn)
    places = [Path(str(entry.path)).name for entry in stopped.traceback]
    number = next(int(name[5:]) for name in places if name.startswith("cell "))
    assert parts[number - 1][0].startswith(untrue[0])


# The worked analyses, and the notebook on the result that they begin with.


@pytest.mark.long
def test_the_analyses_run_and_so_does_the_notebook_on_the_sample(notebook, drawn, script, tmp_path):
    pytest.importorskip("torch")
    documents = script("execute_docs")
    names = documents.run_page(PAGE, tmp_path)
    documents.check_figures(documents.figures_of(PAGE, tmp_path))
    for file in tmp_path.glob("*.png"):
        pixels = plt.imread(file)[..., :3]
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20 and pixels.std() > 0.05

    # What the page says beside its figures.
    margin = names["margin"].sel(timestep=slice(400, None))
    assert (margin.sel(token_group="dead") < -1).all()
    assert abs(margin.sel(token_group="live").mean()) < 0.5
    lost = names["model"].lost_share
    assert lost.sel(parameter="norm.weight") == 1 and list(names["worst"].parameter)[0] == "norm.weight"  # fmt: skip
    assert names["both"].lost_share.sel(parameter="norm.weight", learning_rate="0.004") < 1
    assert (names["model"].replays_exactly == 1).all()

    # The map of tokens counts what the audit counts.
    lattice = xr.open_datatree(tmp_path / "results" / "full.nc")["lattice"].to_dataset()
    tokens = names["tokens"]
    last = names["dead"].freeze_onset
    assert int((last == 842).sum()) == 461 and int((last == 843).sum()) == 204
    for group in ("dead", "live"):
        members = np.flatnonzero(tokens.in_group.sel(token_group=group))
        within = names["regime"].isel(token=members)
        for k, name in enumerate(("early", "midlife", "late", "frozen")):
            counted = lattice.settled_regime_count.sel(regime=name, token_group=group)
            assert np.array_equal((within == k).sum("token"), counted)

    sample = tmp_path / "sample.nc"
    other = {RESULT: str(tmp_path / "missing.nc"), "../results/sample.nc": str(sample)}
    cells = code_of(notebook)
    for old, new in other.items():
        assert old in cells[0]
        cells = [cell.replace(old, new) for cell in cells]
    assert "all of it holds for sample.safetensors" in run(cells, drawn)[-1][0]


def test_blocks_keep_their_lines_and_figures_are_those_shown(script, tmp_path):
    documents = script("execute_docs")
    page = tmp_path / "page.md"
    begin = "import matplotlib.pyplot as plt\nplt.figure().savefig('{}.png')\n"
    page.write_text(f"# Page\n\n```python\n{begin.format('a')}```\n\n![what](figures/a.png)\n")
    (tmp_path / "run").mkdir()
    assert documents.run_page(page, tmp_path / "run")["__name__"] == "page"
    found = documents.figures_of(page, tmp_path / "run")
    assert {*found} == {tmp_path / "figures/a.png"}
    with pytest.raises(documents.Failure, match=r"a\.png is missing"):
        documents.check_figures(found)
    documents.write(tmp_path / "figures/a.png", found[tmp_path / "figures/a.png"][:12] + bytes(40))
    with pytest.raises(documents.Failure, match="another size"):
        documents.check_figures(found)

    (tmp_path / "run/b.png").write_bytes(b"")
    with pytest.raises(documents.Failure, match=r"shown but not drawn: b\.png"):
        documents.figures_of(page, tmp_path / "run")

    page.write_text("# Page\n\n```python\nx = 1\n\nassert x == 2\n```\n")
    (tmp_path / "again").mkdir()
    with pytest.raises(documents.Failure, match=r"page\.md: line 6: AssertionError: assert x == 2"):
        documents.run_page(page, tmp_path / "again")


def test_what_cannot_be_run_is_refused_in_a_line(script, tmp_path, capsys, monkeypatch):
    documents = script("execute_docs")
    monkeypatch.setitem(sys.modules, "nbclient", None)  # as if it were not installed
    assert documents.main([str(NOTEBOOK)]) == 1
    assert capsys.readouterr().err.endswith('pip install "jaxaudit[docs]" to run notebooks.\n')
    (tmp_path / "a.txt").touch()
    for path, status, said in (
        (tmp_path / "a.txt", 2, "needed a notebook"),
        (tmp_path / "a.md", 3, "no such file"),
    ):
        assert documents.main([str(path)]) == status
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


def test_a_kernel_runs_a_notebook_in_place(script, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    v4, path = nbformat.v4, tmp_path / "small.ipynb"
    draw = "import matplotlib.pyplot as plt\nplt.figure(figsize=(1, 1)).add_subplot()\nplt.show()"
    look = "import sys\nfrom pathlib import Path\n"
    look += f"assert sys.executable == {sys.executable!r}\nprint(Path('there').exists())"
    sources = (look, draw)
    (tmp_path / "there").touch()

    # Another `python3` among the kernels of this machine is none of ours.
    other = tmp_path / "share" / "kernels" / "python3"
    other.mkdir(parents=True)
    (other / "kernel.json").write_text('{"argv": ["false"], "display_name": "", "language": ""}')
    environment = os.environ | {"JUPYTER_PATH": str(tmp_path / "share")}

    def executed(*options: str) -> tuple[int, str]:
        script = DOCS.parent / "scripts" / "execute_docs.py"
        found = subprocess.run(
            [sys.executable, str(script), str(path), *options],
            capture_output=True,
            text=True,
            env=environment,
        )
        return found.returncode, found.stderr

    def store(*sources: str) -> bytes:
        cells = [v4.new_code_cell(source) for source in sources]
        path.write_text(nbformat.writes(v4.new_notebook(cells=cells)))
        return path.read_bytes()

    store(*sources)
    assert executed() == (0, f"Running {path}\n")
    held = json.loads(path.read_bytes())
    documents = script("execute_docs")
    assert documents.outputs(held) == [("True\n", 0), ("", 1)]
    documents.check_notebook(path, held)
    path.write_text(json.dumps(held).replace("True", "False"))
    with pytest.raises(documents.Failure, match="code cells 1 give something else"):
        documents.check_notebook(path, held)

    held = store("print(1)", "one = 1\nassert one == 2")
    status, told = executed()
    assert status == 1 and told.endswith("small.ipynb: cell 2: AssertionError: assert one == 2\n")
    assert path.read_bytes() == held
    assert {*tmp_path.iterdir()} == {path, tmp_path / "there", tmp_path / "share"}

    path.write_text("{}")
    with pytest.raises(documents.Failure, match="not a Jupyter notebook") as refused:
        documents.run_notebook(path)
    assert refused.value.status == 3


def test_a_notebook_has_so_much_time_in_all(script, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    documents, path = script("execute_docs"), tmp_path / "endless.ipynb"
    cell = nbformat.v4.new_code_cell("while True: pass")
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=[cell])))
    monkeypatch.setattr(documents, "_SECONDS", 1)
    with pytest.raises(documents.Failure, match=r"endless\.ipynb: not done after 1 s"):
        documents.run_notebook(path)


def test_the_old_notebook_is_compared_with_what_it_holds_where_the_full_result_is(
    script, notebook, tmp_path, monkeypatch
):
    """Elsewhere its statements are checked on the sample, and nothing is stored."""
    pytest.importorskip("nbformat")
    documents = script("execute_docs")
    new = json.loads(json.dumps(notebook).replace("of these dead 3,691", "of these dead 6"))
    monkeypatch.setattr(documents, "run_notebook", lambda path: new)
    assert documents.OLD_NOTEBOOK == NOTEBOOK and documents.FULL.exists()
    with pytest.raises(documents.Failure, match="code cells 1 give something else"):
        documents.checked(NOTEBOOK)

    monkeypatch.setattr(documents, "FULL", tmp_path / "full.nc")
    monkeypatch.setattr(documents, "SAMPLE", tmp_path / "sample.nc")
    asked = []
    monkeypatch.setattr(
        documents.subprocess,
        "run",
        lambda words, **_: asked.append(words) or SimpleNamespace(returncode=len(asked) - 1, stderr="no room"),
    )  # fmt: skip
    assert documents.checked(NOTEBOOK) is new
    assert asked[0][1:4] == ["-m", "jaxaudit", "audit"] and str(documents.SAMPLE) in asked[0]
    with pytest.raises(documents.Failure, match="no room"):
        documents.checked(NOTEBOOK)
    with pytest.raises(documents.Failure, match="is missing, of which") as refused:
        documents.made(NOTEBOOK, check=False)
    assert refused.value.status == 3


def test_the_build_of_the_pages_shows_what_came_out(script, monkeypatch, caplog):
    """A notebook that fails is a warning, which the build takes for an error; what it held is shown then."""
    pytest.importorskip("sphinx")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("conf", DOCS / "conf.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(conf := importlib.util.module_from_spec(spec))
    read: list[str] = []
    env = SimpleNamespace(doc2path=lambda name: DOCS / name, note_dependency=read.append)

    def shown(name: str, checked: Callable[[Path], Any]) -> str:
        monkeypatch.setattr(conf.execute_docs, "checked", checked)
        conf._execute(SimpleNamespace(env=env), name, source := ["as stored"])
        return source[0]

    def failed(path: Path) -> Any:
        raise conf.execute_docs.Failure("cell 2: AssertionError", 1)

    new = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    assert nbformat.reads(shown("old-notebook.ipynb", lambda path: new), 4) == new
    assert read == [str(DOCS.parent / "results" / "full.nc")] and not caplog.records
    assert shown("index.md", failed) == "as stored" and not caplog.records
    assert shown("old-notebook.ipynb", failed) == "as stored"
    assert [(x.levelname, x.getMessage()) for x in caplog.records] == [("WARNING", "cell 2: AssertionError")]  # fmt: skip
