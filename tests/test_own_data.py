"""The page on one's own data: every snippet on it runs, in order."""

import re
import sys
from pathlib import Path

import pytest
from recordings import short_run
from test_sources import model

PAGE = Path(__file__).parents[1] / "docs" / "own-data.md"


def test_every_snippet_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("h5py")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    model(tmp_path / "RUN", short_run(6))
    names: dict[str, object] = {}
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert len(snippets) == 6 and "jax" in sys.modules
    for expected in (
        "exp_avg yes",
        "3 float16",
        "bfloat16 yes",
        "((1, 2), (4, 5)) [1 2] 2",
        "torch-cpu-loop",
        "transformer.wte.weight 6 True",
        "yes, at the recorded steps (3 of 7 steps were recorded) | no: 3 of 7",
        "[1 4 7] torch-cpu-",
    ):
        assert expected in said
