"""Backends that are there, and those that are not."""

import os
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


KEEP = """
import jax, os, sys
from jaxaudit.process import keep_programs
keep_programs()
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize(
    "changes, kept",
    [
        ({}, "home/.cache/jaxaudit/programs-"),
        ({"XDG_CACHE_HOME": "given"}, "given/jaxaudit/programs-"),
        ({"JAX_COMPILATION_CACHE_DIR": "own"}, "own"),
        ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, "None"),
        ({"XDG_CACHE_HOME": "/proc/nowhere"}, "None"),
    ],
)
def test_programs_are_kept_where_jax_is_not_told_otherwise(tmp_path, changes, kept):
    environment = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    environment |= {"HOME": str(tmp_path / "home")}
    environment |= {
        k: v if "/" in v or v == "false" else str(tmp_path / v) for k, v in changes.items()
    }
    command = [sys.executable, "-c", KEEP]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert kept in found.stdout


LOWER = """
import sys
import jax
from jaxaudit import operations

counted, exactly = {"cuda": 0, "tpu": 0}, operations.compile_exactly

def compile_exactly(function, device):
    program, plain, lowered = exactly(function, device), jax.jit(function), set()

    def call(*given):
        shapes = str(jax.tree.map(lambda x: (jax.numpy.shape(x), jax.numpy.result_type(x)), given))
        if shapes not in lowered:
            lowered.add(shapes)
            for platform in counted:
                plain.trace(*given).lower(lowering_platforms=(platform,))
                counted[platform] += 1
        return program(*given)

    return call

operations.compile_exactly = compile_exactly
import jaxaudit
from jaxaudit.auditing import audit_groups

with jaxaudit.open_recording(jaxaudit.sample_paths()[0]) as recording:
    audit_groups(recording, arithmetics="all", backend="cpu", steps=(1, 20))
print(counted["cuda"], counted["tpu"])
"""


@pytest.mark.long
def test_every_program_can_be_put_to_other_devices():
    """No operation is one that XLA has for CPUs alone; no GPU and no TPU is needed to find out."""
    found = subprocess.run(
        [sys.executable, "-c", LOWER], capture_output=True, text=True, check=True
    )
    cuda, tpu = map(int, found.stdout.split())
    assert cuda == tpu > 100
