"""The scripts that measure end to end: they run, report what they promise, and refuse what they cannot do."""

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

STEPS, TOKENS, WIDTH = 12, 6, 16


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
