"""What writes recordings: the streaming file writer, and recorders for trainers.

Nothing here imports the audit, and this module itself needs numpy alone; the recorder for PyTorch
is `jaxaudit.recorders.pytorch.Recorder`.
"""

from jaxaudit.recorders.writing import RecordingWriter, RowLayout, write_tensors

__all__ = ["RecordingWriter", "RowLayout", "write_tensors"]
