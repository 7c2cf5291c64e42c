"""The scripts that measure end to end: they run, report what they promise, and refuse what they cannot do."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

SCRIPTS = Path(__file__).parents[1] / "scripts"
STEPS, TOKENS, WIDTH = 12, 6, 16


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import scripts as Python does when they are run: from their own folder."""
    monkeypatch.syspath_prepend(SCRIPTS)

    def load(name: str) -> ModuleType:
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        return importlib.import_module(name)

    return load


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Record a few steps of AdamW; tokens 0 and 1 are dead, and get no gradient after step 3."""
    return record(tmp_path / "run.safetensors", weight_decay=0.0)


def record(path: Path, weight_decay: float) -> Path:
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(0)
    weight = torch.randn(TOKENS, WIDTH, generator=random, dtype=torch.bfloat16).requires_grad_()
    optimizer = torch.optim.AdamW([weight], weight_decay=weight_decay, foreach=False)
    zero = torch.zeros(TOKENS, WIDTH, dtype=torch.bfloat16)
    rows = {
        "W": [weight.detach().clone()],
        "grad_W": [zero],
        "momentum_W": [zero.float()],
        "variance_W": [zero.float()],
    }
    for step in range(STEPS):
        gradient = torch.randn(TOKENS, WIDTH, generator=random).mul(1e-3).bfloat16()
        gradient[:2] *= step < 3
        weight.grad = gradient
        optimizer.step()
        state = optimizer.state[weight]
        for key, value in (("grad_W", gradient), ("momentum_W", state["exp_avg"]), ("variance_W", state["exp_avg_sq"]), ("W", weight.detach())):  # fmt: skip
            rows[key].append(value.to(rows[key][0].dtype, copy=True))
    scalars = {
        "learning_rate": 1e-3,
        "weight_decay": weight_decay,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
    }
    tensors = {key: torch.stack(value) for key, value in rows.items()}
    tensors |= {key: torch.tensor(value) for key, value in scalars.items()}
    tensors["dead_mask"] = torch.arange(TOKENS) < 2
    save_file(tensors, path)
    return path


def test_benchmark_times_every_job(
    script: Any, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out" / "benchmark.json"
    jobs = ["read", "audit", "accounting", "ledger", "notebook"]
    arguments = [str(recording), "--rounds", "1", "--output", str(output), "--jobs", ",".join(jobs)]
    assert script("benchmark").main(arguments) == 0
    printed = capsys.readouterr()
    assert "round 1 of 1: notebook" in printed.err
    found = json.loads(output.read_text())
    assert list(found["jobs"]) == jobs and {*jobs} < {*script("benchmark").JOBS}
    assert found["recording"]["elements"] == STEPS * TOKENS * WIDTH
    for job, figures in found["jobs"].items():
        assert f"\n{job} " in printed.out
        assert figures["work"]["median"] > 0 and figures["peak_resident_bytes"] > 1e6
        parts = sum(figures[part]["median"] for part in ("start-up", "preparation", "work"))
        assert parts == pytest.approx(figures["total"]["median"])
    assert found["jobs"]["read"]["work_relative_to_read"] == 1
    assert found["jobs"]["ledger"]["work_relative_to_accounting"] > 0
    # Of a run's processes only the notebook's hold torch, and only the audit's hold JAX.
    peaks = {job: figures["peak_resident_bytes"] for job, figures in found["jobs"].items()}
    assert peaks["read"] < peaks["audit"] and peaks["read"] < peaks["notebook"]


def test_benchmark_skips_what_does_not_fit_in_memory(
    script: Any, recording: Path, monkeypatch: pytest.MonkeyPatch
):
    from jaxaudit.recording import open_recording

    benchmark = script("benchmark")
    monkeypatch.setattr(benchmark, "available_memory", lambda: 1000)
    with open_recording(recording) as opened:
        assert "1000 are free" in benchmark.reason_to_skip("notebook", opened)
        assert benchmark.reason_to_skip("audit", opened) == ""


def test_benchmark_replays_as_torch_writes_it(script: Any):
    """One element by hand: m_hat = v_hat = 1 at step 1, so the weight moves by the learning rate."""
    from jaxaudit.hyperparameters import Hyperparameters

    given = Hyperparameters(
        learning_rate=torch.full((1,), 0.25, dtype=torch.float64).numpy(),
        beta1=0.5,
        beta2=0.75,
        epsilon=0.0,
        weight_decay=0.0,
    )
    before = torch.tensor([1.0], dtype=torch.bfloat16)
    after = script("benchmark").adam_weight(
        before, torch.tensor([0.5]), torch.tensor([0.25]), given, 1
    )
    assert after.dtype == torch.bfloat16 and after.item() == 0.75


@pytest.mark.parametrize("name", ["benchmark", "check_against_notebook"])
@pytest.mark.parametrize(("problem", "status"), [("output", 2), ("recording", 3)])
def test_scripts_refuse_in_one_line(
    script: Any, name: str, problem: str, status: int, recording: Path, tmp_path: Path, capsys: Any
):
    output = tmp_path / "there.json"
    if problem == "output":
        output.write_text("kept")
    else:
        recording = tmp_path / "absent.safetensors"
    assert script(name).main([str(recording), "--output", str(output)]) == status
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"{name}.py: error: ")
    assert len(printed.err.splitlines()) == 1
    assert not output.exists() or output.read_text() == "kept"


def test_notebook_agrees_with_the_audit(script: Any, recording: Path, tmp_path: Path, capsys: Any):
    output = tmp_path / "check.json"
    assert script("check_against_notebook").main([str(recording), "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["within_bounds"] and found["roots"]["ieee"]["different_elements"] == 0
    assert set(found["notebook_measure"]) == {"all", "dead", "live"}
    assert found["notebook_measure"]["all"]["timesteps"] == STEPS
    assert "within the bounds" in capsys.readouterr().out


def test_notebook_check_fails_on_another_arithmetic(
    script: Any, recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    check, output = script("check_against_notebook"), tmp_path / "check.json"
    monkeypatch.setitem(check.ROOTS, "ieee", lambda values: values.sqrt() * 1.5)
    assert check.main([str(recording), "--output", str(output)]) == 1
    found = json.loads(output.read_text())
    assert not found["within_bounds"] and found["roots"]["ieee"]["different_elements"] > 0


def test_notebook_check_needs_a_run_without_weight_decay(script: Any, tmp_path: Path, capsys: Any):
    decayed = record(tmp_path / "decayed.safetensors", weight_decay=0.125)
    output = tmp_path / "check.json"
    assert script("check_against_notebook").main([str(decayed), "--output", str(output)]) == 3
    assert "weight decay" in capsys.readouterr().err and not output.exists()
