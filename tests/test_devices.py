"""Backends that are there, and those that are not."""

import subprocess
import sys

import pytest

from jaxaudit.devices import BackendError, find_device


def test_the_cpu_is_always_there():
    assert find_device("cpu").platform == "cpu"


def test_an_absent_backend_is_an_error_and_not_another_backend():
    with pytest.raises(BackendError, match="'tpu' is not available .present: .*use --backend auto"):
        find_device("tpu")


@pytest.mark.parametrize("platforms", ["cuda", "bogus"])
def test_an_impossible_environment_is_one_message(platforms):
    script = (
        "from jaxaudit.devices import BackendError, find_device\n"
        "try:\n    find_device('auto')\nexcept BackendError as error:\n    print(error)\n"
    )
    environment = {"JAX_PLATFORMS": platforms, "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "not available (present: none). Check JAX_PLATFORMS" in done.stdout
