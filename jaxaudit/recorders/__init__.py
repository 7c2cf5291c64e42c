"""What writes recordings: streaming file writers, and recorders for trainers.

Nothing here imports the audit, and this module itself needs numpy alone; the recorders come with
what they record:

    Recorder            one parameter of a PyTorch loop, one call after each step
    record              all parameters of a PyTorch optimizer, by its hooks
    RecordingCallback   the same in the Trainer of Hugging Face transformers
    record_optax        a gradient transformation around an Adam of optax
    finish              completes the folder of a run that was killed
"""

import importlib
from typing import Any

from jaxaudit.recorders.folders import FolderWriter, ParameterLayout, finish
from jaxaudit.recorders.writing import RecordingWriter, RowLayout, write_tensors

_HOME = {
    "Recorder": "pytorch",
    "record": "hooks",
    "RecordingCallback": "callbacks",
    "record_optax": "transformations",
}

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "FolderWriter",
    "ParameterLayout",
    "RecordingWriter",
    "RowLayout",
    "finish",
    "write_tensors",
    *_HOME,
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
