"""Settings that must be made before torch and JAX are imported, and fixtures of more than one file."""

import gc
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# The suite runs on all cores at once; threads of torch that spin while they wait would fight over them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_PROGRAMS = "JAX_COMPILATION_CACHE_DIR"
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Workers and the processes that tests start read the programs that one of them compiled: the folder is new,
    # and goes with the session, so that every program is compiled at least once by the code under test. JAX
    # finds them by the program itself, its options and XLA's flags: a tampered operation is another program.
    os.environ[_PROGRAMS] = tempfile.mkdtemp(prefix="jaxaudit-programs-")
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Tracing makes many objects, hardly any of them in cycles: the collector would look through them time and again.
gc.set_threshold(100_000, 50, 100)


#: Seconds of a core that the files of tests take which take most. Files stay on one worker, which compiles and
#: records for all of their tests; the longest come first, so that all workers end together.
_SECONDS = {
    "test_run_audit": 130,
    "test_auditing": 110,
    "test_docs": 75,
    "test_free_run": 60,
    "test_recorders_forms": 60,
    "test_models": 50,
    "test_identification": 45,
    "test_arithmetics": 40,
    "test_replay": 35,
    "test_benchmark": 30,
    "test_recorders": 30,
    "test_preflight": 25,
    "test_ledger_updates": 24,
    "test_ledger_moments": 20,
    "test_divergence": 20,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; one that is not listed is taken to be in between."""
    items.sort(key=lambda item: -_SECONDS.get(item.path.stem, 8))


def pytest_collection_finish() -> None:
    """Spare the collector the modules: they stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def spared_collector() -> Iterator[None]:
    """Spare the collector what a file leaves behind: traced programs, which are kept for the session."""
    yield
    gc.freeze()


def pytest_unconfigure() -> None:
    """Forget the programs; a worker leaves them to the others."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ[_PROGRAMS], ignore_errors=True)


@pytest.fixture
def fresh_programs():
    """Trace anew, and forget afterwards what was made of tampered operations."""
    from jaxaudit import (  # xdist's controller needs no JAX
        conformance,
        free_running,
        joint_replay,
        replay,
    )
    from jaxaudit.ledger import courses

    caches = (
        replay._flags_program,
        replay._results_program,
        free_running._step_program,
        joint_replay._tally_program,
        joint_replay._marked_program,
        conformance.inexact_operations,
        courses.step_program,
        courses.start_program,
    )
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import scripts as Python does when they are run: from their own folder."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")

    def load(name: str) -> ModuleType:
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        return importlib.import_module(name)

    return load
