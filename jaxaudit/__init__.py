"""Replay a recorded low-precision training run, step by step and bit by bit.

    recording = jaxaudit.open_recording("run.safetensors")
    groups = jaxaudit.open_token_groups("groups.safetensors")
    dataset = jaxaudit.audit(recording, groups)

Names are imported when they are first used: opening a recording does not import JAX.
"""

import importlib
from typing import Any

_HOME = {
    "Arithmetic": "arithmetics",
    "CATALOGUE": "arithmetics",
    "VARIANTS": "arithmetics",
    "Options": "arithmetics",
    "audit": "auditing",
    "audit_model": "models.audits",
    "audit_model_tree": "models.audits",
    "audit_tree": "auditing",
    "LedgerOptions": "ledger.subject",
    "compare": "divergence.runs",
    "compare_models": "divergence.models",
    "compare_models_tree": "divergence.models",
    "compare_results": "divergence.audits",
    "cross_check": "rounding.certificate",
    "free_run": "auditing",
    "identify": "identification",
    "BackendError": "devices",
    "FileError": "safetensors_file",
    "ModelRecording": "model_recording",
    "Recorder": "recorders.pytorch",
    "RecordingCallback": "recorders.callbacks",
    "finish": "recorders.folders",
    "record": "recorders.hooks",
    "record_optax": "recorders.transformations",
    "Recording": "recording",
    "TokenGroups": "recording",
    "open_model": "model_recording",
    "open_recording": "recording",
    "open_token_groups": "recording",
    "sample_paths": "recording",
    "token_groups_of": "recording",
    "SelfTestError": "replay",
    "load": "results",
    "save": "results",
    "describe": "summary",
    "summarize": "summary",
}
_MODULES = ("ledger", "plots", "preflight", "recorders", "report", "results", "summary")

__all__ = [*_HOME, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
