"""Where JAX runs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

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
    return find_devices(backend, 1)[0]


def find_devices(backend: Backend = "auto", count: int | None = None) -> tuple[Device, ...]:
    """Return devices of this host.

    Args:
        backend: of which kind; `auto` is the fastest one that JAX finds.
        count: how many; by default one CPU, or all there are of any other kind.

    Raises:
        BackendError: the backend is absent, or has fewer devices. There is no silent fall-back.
    """
    try:
        found = jax.local_devices(backend=None if backend == "auto" else backend)
    except (RuntimeError, AssertionError) as error:  # JAX raises either, by how it was set up
        try:
            present = ", ".join(sorted({device.platform for device in jax.devices()}))
            remedy = "Install jax for that device, or use --backend auto."
        except (RuntimeError, AssertionError):
            present, remedy = "none", "Check JAX_PLATFORMS in the environment."
        raise BackendError(
            f"backend {backend!r} is not available (present: {present}). {remedy}"
        ) from error
    if count is None:
        count = 1 if on_host(found[0]) else len(found)
    if not 1 <= count <= len(found):
        more = (
            f" Set XLA_FLAGS=--xla_force_host_platform_device_count={count} to have that many."
            if on_host(found[0]) and count > 1
            else ""
        )
        alone = len(found) == 1
        are, most = ("is 1", "1") if alone else (f"are {len(found)}", f"1 to {len(found)}")
        raise BackendError(
            f"{count} devices were asked for, but there {are} ({found[0].platform}). Ask for {most}.{more}"
        )
    return tuple(found[:count])


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where windows lie: on one device, or the rows of each timestep spread evenly over several.

    Rows never meet each other in a step, and each row's sums are added up on one device: what is computed is
    what one device computes, to the bit, without a word between them. Timesteps, spread, would need the one
    before each part as well, and could not be run freely.

    Attributes:
        devices: which.
        width: elements of a row.
    """

    devices: tuple[Device, ...]
    width: int

    @property
    def first(self) -> Device:
        """The device of everything that is not spread."""
        return self.devices[0]

    def padded(self, elements: int) -> int:
        """Return the elements of a timestep when all devices get as many rows."""
        share = self.width * len(self.devices)
        return -(-elements // share) * share

    def put(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, jax.Array]:
        """Hand patterns over, elements on the last axis: without a copy where that is one CPU.

        Where rows do not come out even, the first of them fills up the last device's.
        """
        return {name: self.put_one(array) for name, array in arrays.items()}

    def put_one(self, array: NDArray[Any]) -> jax.Array:
        """Hand over patterns; see `put`."""
        if len(self.devices) == 1:
            return jax.device_put(array, self.first)
        missing = self.padded(array.shape[-1]) - array.shape[-1]
        if missing:
            fill = np.concatenate([array[..., : self.width]] * (missing // self.width), axis=-1)
            array = np.concatenate([array, fill], axis=-1)
        mesh = Mesh(np.array(self.devices), ("row",))
        parts = PartitionSpec(*[None] * (array.ndim - 1), "row")
        return jax.device_put(array, NamedSharding(mesh, parts))


def memory_of(devices: tuple[Device, ...]) -> int | None:
    """Return how many bytes programs may take on devices of their own memory together; None where that is unknown."""
    if on_host(devices[0]):
        return None
    # Not every backend has these numbers.
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
    return len(limits) * min(limits) or None


def on_host(device: Device) -> bool:
    """Tell whether a device's memory is the host's, so that its results are read without a transfer."""
    return device.platform == "cpu"
