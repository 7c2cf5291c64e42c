"""Settings that must be made before torch is imported, and fixtures of more than one file."""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# The suite runs on all cores at once; threads of torch that spin while they wait would fight over them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Programs are compiled anew: tests run side by side, and some tamper with what is compiled.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import pytest

from jaxaudit import conformance, free_running, replay

_CACHES = (
    replay._flags_program,
    replay._results_program,
    free_running._step_program,
    conformance.inexact_operations,
)


@pytest.fixture
def fresh_programs():
    """Compile anew, and forget afterwards what was compiled from tampered operations."""
    for cache in _CACHES:
        cache.cache_clear()
    yield
    for cache in _CACHES:
        cache.cache_clear()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import scripts as Python does when they are run: from their own folder."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")

    def load(name: str) -> ModuleType:
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        return importlib.import_module(name)

    return load
