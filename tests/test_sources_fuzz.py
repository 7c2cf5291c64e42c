"""A short fuzz of everything that reads files; the long one is scripts/fuzz_sources.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import fuzz_sources  # noqa: E402


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
@pytest.mark.parametrize(
    "kind", ["safetensors", "token groups", "index", "model folder", "checkpoints", "hdf5", "torch"]
)
def test_nothing_but_a_file_error(kind):
    pytest.importorskip("h5py")
    pytest.importorskip("torch")
    found = fuzz_sources.fuzz(2000, "test", [kind])[kind]
    assert found["first_findings"] == [] and found["inputs"] >= 100
    assert found["read"] > 0  # some changes are harmless, so the seeds are valid
