"""Recorder for the Trainer of Hugging Face transformers: one callback.

Example:
    ::

        trainer = Trainer(model, arguments, callbacks=[RecordingCallback("run")], ...)
        trainer.train()  # the folder is finished when it ends
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from jaxaudit.recorders.hooks import OptimizerRecorder, record


class RecordingCallback(TrainerCallback):
    """Records every optimizer step of a Trainer's run, from `on_train_begin` to `on_train_end`.

    The loss of a step is recorded where the Trainer logs every step (`logging_steps=1`); a logged
    mean over several steps is nobody's loss. Where several processes train, the first one records.
    A run that breaks off by an exception is finished when the process ends or trains again.

    Attributes:
        recorder: the recorder of the present or last run; None before.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        parameters: str | re.Pattern[str] | Sequence[str] | Sequence[torch.Tensor] | None = None,
        *,
        rows: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        every: int = 1,
        metadata: Mapping[str, str] | None = None,
        on_failure: Literal["raise", "warn"] = "raise",
        overwrite: bool = False,
    ) -> None:
        """Note what to record; all arguments are those of `jaxaudit.record`, which raises then."""
        self.recorder: OptimizerRecorder | None = None
        self._logged = 0
        self._arguments: dict[str, Any] = {
            "path": path,
            "parameters": parameters,
            "rows": rows,
            "every": every,
            "metadata": metadata,
            "on_failure": on_failure,
            "overwrite": overwrite,
        }

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Begin the recording; the optimizer exists by now, with the state of a checkpoint."""
        self._close()
        if state.is_world_process_zero:
            model, optimizer = kwargs.get("model"), kwargs.get("optimizer")
            self.recorder = record(optimizer, model=model, **self._arguments)
            self._logged = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Note the loss of the step that was just taken."""
        loss = (kwargs.get("logs") or {}).get("loss")
        if self.recorder is None or loss is None:
            return
        if self.recorder.steps == self._logged + 1:
            self.recorder.note_loss(loss, self.recorder.steps)
        self._logged = self.recorder.steps

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Finish the folder."""
        self._close()

    def _close(self) -> None:
        if self.recorder is not None:
            self.recorder.close() if self.recorder.steps else self.recorder.abort()
