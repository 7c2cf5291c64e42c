"""Where JAX runs."""

from typing import Any, Literal, TypeAlias

import jax

#: A `jax.Device`, which JAX exports as a variable that type checkers do not take.
Device: TypeAlias = Any

Backend = Literal["auto", "cpu", "gpu", "tpu"]

BACKENDS: tuple[Backend, ...] = ("auto", "cpu", "gpu", "tpu")


class BackendError(ValueError):
    """A backend was named that is not there."""


def find_device(backend: Backend = "auto") -> Device:
    """Return the first device of a backend; `auto` is the fastest one that JAX finds.

    Raises:
        BackendError: the backend is absent. There is no silent fall-back.
    """
    try:
        return jax.devices(None if backend == "auto" else backend)[0]
    except (RuntimeError, AssertionError) as error:  # JAX raises either, by how it was set up
        try:
            present = ", ".join(sorted({device.platform for device in jax.devices()}))
            remedy = "Install jax for that device, or use --backend auto."
        except (RuntimeError, AssertionError):
            present, remedy = "none", "Check JAX_PLATFORMS in the environment."
        raise BackendError(
            f"backend {backend!r} is not available (present: {present}). {remedy}"
        ) from error
