"""A recording of a whole model: a folder with a recording for each parameter, finished or still growing."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxaudit.recording import Recording
from jaxaudit.sources.model_folder import INDEX, ModelFolder, Parameter
from jaxaudit.sources.source import Opened, Source


class ModelRecording(Mapping[str, Parameter]):
    """The parameters of a recorded model, by name and in the model's order; holds no file open.

        model = jaxaudit.open_model("run")
        for name in model:
            with model.open(name) as recording:
                print(jaxaudit.audit(recording))

    Args:
        path: the folder, or its recording.json.

    Attributes:
        path: the folder.
        finished: whether the run was closed; if not, it is readable up to the last complete timestep.
        metadata: facts of the whole run, as strings.
        steps: T, the number of complete recorded steps when the folder was opened.
        timesteps: number in the run of the state before the first step, and of those after each, int64 (T+1,). It is
            0..T unless the recorder left steps out (`every=`).
        losses: loss of each step, float64 of shape (T,), NaN where none was given; None where none was at all.

    Raises:
        FileError: the folder's index or steps are missing, unreadable or inconsistent.
    """

    def __init__(self, path: str | os.PathLike[str]):
        path = Path(path)
        self._folder = ModelFolder(path.parent if path.name == INDEX else path)
        self.path, self.finished = self._folder.path, self._folder.finished
        self.metadata = dict(self._folder.metadata)
        taken, stepped = self._folder.taken, self._folder.stepped
        self.steps = int(np.count_nonzero(stepped))
        self.timesteps: NDArray[np.int64] = np.append(taken[:1], taken[stepped])
        losses = self._folder.losses
        self.losses: NDArray[np.float64] | None = None if losses is None else losses[stepped]

    def __getitem__(self, name: str) -> Parameter:
        return self._folder.parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._folder.parameters)

    def __len__(self) -> int:
        return len(self._folder.parameters)

    def open(self, name: str) -> Recording:
        """Open one parameter's recording; close it when it is no longer needed.

        Raises:
            FileError: there is no such parameter, or its file is missing, unreadable or inconsistent.
        """
        return Recording(Opened(self._folder.source(name)))

    def source(self, name: str) -> Source:
        """Open the tensors of one parameter as they lie in the files; close them when they are no longer needed.

        Raises:
            FileError: there is no such parameter, or its file is missing, unreadable or inconsistent.
        """
        return self._folder.source(name)

    def skipped_steps(self, name: str) -> list[int]:
        """Return the timesteps in which a parameter had no gradient, and was not stepped."""
        found = self._folder.skipped.get(self[name].number, ())
        return [int(self._folder.taken[t]) for t in found]


def open_model(path: str | os.PathLike[str]) -> ModelRecording:
    """Open the folder of a whole-model recording; see `ModelRecording`.

    Raises:
        FileError: its index or steps are missing, unreadable or inconsistent.
    """
    return ModelRecording(path)
