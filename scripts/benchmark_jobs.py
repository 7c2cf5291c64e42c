"""The jobs of `benchmark.py`; each does its work in a process of its own and returns the seconds of its parts.

Parts: `preparation` (compilation, self-test, identification), `loading` (reading into memory, where a job works
on data in memory), `work` (what grows with the recording), and `extra` (what was done for measuring alone).
"""

import dataclasses
import functools
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import benchmark_replays as replays
import numpy as np
from reporting import available_memory, cores, peak_resident_bytes

from jaxaudit.recording import (
    Recording,
    TokenGroups,
    open_recording,
    open_token_groups,
    token_groups_of,
)

#: Bytes that each reading thread holds at a time: they stay in its core's cache.
CHUNK = 1 << 20

#: Bytes of NumPy's triad at a time, of one array: all three stay in a core's cache.
TRIAD_CHUNK = 1 << 18

#: An audit's streaming is timed over at least so many windows.
WINDOWS = 10

#: Passes over the arrays for one bandwidth.
PASSES = 7

#: Probes of a file for its share in the page cache.
PROBES = 1024

#: Seconds of one process by part, its peaks in bytes, and what else it tells.
Measured = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Input:
    """What a job works on, and how.

    Attributes:
        recording: the file.
        token_groups: their file; None for those in the recording.
        torch_threads: None for PyTorch's own choice.
        backend: where JAX runs.
        arithmetics: of the job `audit`, with commas.
        window_steps: of the same; None for the project's own choice.
        devices: of the same; None to leave it unsaid.
        array_bytes: of each array whose copying is timed; None for a size that fits the device.
        replay_elements: elements of which NumPy's replay does no more.
    """

    recording: Path
    token_groups: Path | None = None
    torch_threads: int | None = None
    backend: str = "auto"
    arithmetics: str = "torch-cpu-loop"
    window_steps: int | None = None
    devices: int | None = None
    array_bytes: int | None = None
    replay_elements: int = 1 << 27

    def groups(self, recording: Recording) -> TokenGroups:
        """Read the token groups from their own file, else from the recording."""
        if self.token_groups:
            return open_token_groups(self.token_groups)
        return token_groups_of(recording)

    def as_json(self) -> str:
        """Write it down for another process."""
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "Input":
        """Read what `as_json` wrote."""
        given = json.loads(text)
        groups = given["token_groups"]
        paths = {"recording": Path(given["recording"]), "token_groups": groups and Path(groups)}
        return cls(**given | paths)


def read(given: Input) -> Measured:
    """Read the file with a thread for each core, and sum its bytes so that each is touched."""
    size, threads = given.recording.stat().st_size, cores()
    buffer = np.empty((threads, CHUNK // 8), np.uint64)
    descriptor = os.open(given.recording, os.O_RDONLY)

    def share(thread: int) -> int:
        part, total = buffer[thread], 0
        for offset in range(thread * CHUNK, size, threads * CHUNK):
            count = os.preadv(descriptor, [part], offset)
            total += int(np.add.reduce(part[: -(-count // 8)]))
        return total

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))
    seconds = time.perf_counter() - start
    os.close(descriptor)
    return {"work": seconds}


def read_cold(given: Input) -> Measured:
    """Ask for the file to be dropped from the page cache, look whether it was, and read it."""
    start = time.perf_counter()
    drop_from_cache(given.recording)
    left = cached_share(given.recording)
    extra = time.perf_counter() - start
    return read(given) | {"extra": extra, "cached_before": left}


def drop_from_cache(path: Path) -> None:
    """Ask the system to forget what it keeps of a file, where it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(path: Path) -> float | None:
    """Return the share of a file that lies in the page cache, from some probes; None if unknown."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    size, found = path.stat().st_size, 0
    with open(path, "rb") as file:
        # Backwards: the system takes probes that go forwards for a reader, and reads ahead of it.
        for k in reversed(range(PROBES)):
            try:
                found += os.preadv(file.fileno(), [bytearray(1)], k * size // PROBES, os.RWF_NOWAIT)
            except BlockingIOError:
                pass
            except OSError:  # the file system cannot tell
                return None
    return found / PROBES


def host_bandwidth(given: Input) -> Measured:
    """Time NumPy's copy (a = b) and triad (a = b + s*c) of float32 with a thread for each core."""
    count = (given.array_bytes or (1 << 28)) // 4
    start = time.perf_counter()
    a, b, c = (np.full(count, value, np.float32) for value in (0, 1, 2))
    size, scale = TRIAD_CHUNK // 4, np.float32(3)
    parts = [slice(at, min(at + size, count)) for at in range(0, count, size)]
    shares = [parts[k :: cores()] for k in range(cores())]

    def copy(share: list[slice]) -> None:
        for part in share:
            np.copyto(a[part], b[part])

    def triad(share: list[slice]) -> None:
        for part in share:
            np.multiply(c[part], scale, out=a[part])
            np.add(a[part], b[part], out=a[part])

    with ThreadPoolExecutor(cores()) as pool:
        rates = {
            "copy": 2 * a.nbytes / timed(lambda: list(pool.map(copy, shares))),
            "triad": 3 * a.nbytes / timed(lambda: list(pool.map(triad, shares))),
        }
    return {"work": time.perf_counter() - start, "rates": rates}


def device_bandwidth(given: Input) -> Measured:
    """Time the same on JAX's device, into memory that is given away for it, and copies from the host to it."""
    import jax
    import jax.numpy as jnp

    device = device_of(given)
    start = time.perf_counter()
    count = (given.array_bytes or (1 << 28 if device.platform == "cpu" else 1 << 30)) // 4
    with jax.default_device(device):
        a, b, c = (jnp.full(count, value, jnp.float32) for value in (0, 1, 2))
        # Exclusive or with a zero that the compiler does not know of: it cannot leave the copy out.
        bits = [jax.lax.bitcast_convert_type(x, jnp.uint32) for x in (a, b)]
        copy = donating(lambda _, x, zero: x ^ zero)
        triad = donating(lambda _, x, y, scale: x + scale * y)
        rates = {
            "copy": 2 * a.nbytes / chained(copy, bits[0], bits[1], jnp.uint32(0)),
            "triad": 3 * a.nbytes / chained(triad, a, b, c, jnp.float32(3)),
        }
        if device.platform != "cpu":
            host = np.ones(count, np.float32)
            seconds = timed(lambda: jax.device_put(host, device).block_until_ready())
            rates["host to device"] = host.nbytes / seconds
    return {"work": time.perf_counter() - start, "rates": rates} | facts_of_device(device)


def donating(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a formula that writes into its first argument's memory."""
    import jax

    return jax.jit(formula, donate_argnums=0, keep_unused=True)


def chained(program: Callable[..., Any], target: Any, *arguments: Any) -> float:
    """Return the seconds of one run, from several that each write into the last one's memory."""
    target = program(target, *arguments).block_until_ready()
    taken = []
    for _ in range(PASSES):
        start = time.perf_counter()
        for _ in range(4):  # one after the other on the device, without waiting for each
            target = program(target, *arguments)
        target.block_until_ready()
        taken.append((time.perf_counter() - start) / 4)
    return statistics.median(taken)


def timed(work: Callable[[], Any]) -> float:
    """Return the median seconds of several passes, after one that is not counted."""
    work()
    taken = []
    for _ in range(PASSES):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def audit(given: Input, arithmetics: str, parts: str = "audit") -> Measured:
    """Audit, and audit again to see what the streaming alone costs."""
    compiled = compilations()
    with open_recording(given.recording) as recording:
        task = Task(given, recording, given.groups(recording), arithmetics, parts)
        ends = task.window_ends(given.window_steps)
        told = {"peak": peak_resident_bytes(), "compile": sum(compiled)}
        told |= facts_of_device(device_of(given))
        short = len(ends) - 1 <= WINDOWS and not given.window_steps
        cut = -(-recording.steps // WINDOWS) if short else given.window_steps
        start = time.perf_counter()
        if short:  # compiles for the shorter windows
            task.window_ends(cut)
        again = task.window_ends(cut)
        extra = time.perf_counter() - start
    count = len(again) - 2
    work = (again[-1] - again[1]) * count / (count - 1) if count > 1 else again[-1]
    preparation = max(ends[-1] - work, 0.0)
    return {"preparation": preparation, "work": work, "extra": extra} | told


@dataclasses.dataclass(frozen=True)
class Task:
    """An audit to be done more than once."""

    given: Input
    recording: Recording
    groups: TokenGroups
    arithmetics: str
    parts: str

    def window_ends(self, window_steps: int | None) -> list[float]:
        """Audit and return the seconds from its start to its start (0), to the end of each window, and to its end."""
        from jaxaudit.auditing import audit, audit_groups
        from jaxaudit.ledger.subject import LedgerOptions

        start, ends = time.perf_counter(), [0.0]
        names = self.arithmetics.split(",")
        options: dict[str, Any] = {
            "arithmetics": names[0] if len(names) == 1 else names,
            "backend": self.given.backend,
            "window_steps": window_steps,
            "progress": lambda done, total, timestep: (
                ends.append(time.perf_counter() - start) if done else None
            ),
        }
        if self.given.devices:
            options["devices"] = self.given.devices
        if self.parts == "audit":
            audit(self.recording, self.groups, **options)
        else:
            ledger = LedgerOptions() if self.parts == "ledger" else None
            audit_groups(self.recording, self.groups, ledger=ledger, **options)
        return [*ends, time.perf_counter() - start]


def compilations() -> list[float]:
    """Return a list to which the seconds of each of XLA's compilations are added from now on."""
    import jax

    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    # The process ends with its job: nothing takes the listener away.
    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds


def device_of(given: Input) -> Any:
    """Find the device that JAX runs on."""
    from jaxaudit.devices import find_device

    return find_device(given.backend)  # pyright: ignore[reportArgumentType]


def facts_of_device(device: Any) -> Measured:
    """Name a device, and tell the most of its memory that was in use, where it tells."""
    memory = device.memory_stats() or {}
    peak = memory.get("peak_bytes_in_use")
    return {"device": f"{device.platform}: {device.device_kind}", "device_peak": peak}


def torch_exact(given: Input) -> Measured:
    """Replay exactly in eager PyTorch, in memory."""
    import torch

    if given.torch_threads:
        torch.set_num_threads(given.torch_threads)
    with open_recording(given.recording) as recording:
        # Half of the memory is left to the system, which keeps the file in it.
        most = available_memory() // 2 // (recording.bytes // (recording.steps + 1))
        return exact(given, recording, most, replays.replay_in_torch, torch.get_num_threads())


def numpy_exact(given: Input) -> Measured:
    """Replay exactly in NumPy, in memory."""
    with open_recording(given.recording) as recording:
        most = given.replay_elements // recording.step_elements
        replay = functools.partial(replays.replay_in_numpy, threads=cores())
        return exact(given, recording, most, replay, cores())


def exact(
    given: Input, recording: Recording, most: int, replay: Callable[..., Any], threads: int
) -> Measured:
    """Load as many timesteps as are allowed, from the middle, and replay them; scale to all of them."""
    steps = min(recording.steps, max(1, most))
    members = list(given.groups(recording).members.values())
    start = time.perf_counter()
    loaded = replays.load(recording, 1 + (recording.steps - steps) // 2, steps)
    read = time.perf_counter()
    found = replay(loaded, members)
    done = time.perf_counter()
    scale = recording.steps / steps
    whole = {"loading": (read - start) * scale, "work": (done - read) * scale}
    return whole | {
        "extra": (done - start) * (1 - scale),  # negative: what was not done
        "share": 1 / scale,
        "threads": threads,
        "mismatches": int(found.mismatches[..., 0].sum()),
    }


def notebook(given: Input, group: str) -> Measured:
    """Load whole tensors and account for every step of one token group, as the old notebook did."""
    import torch
    from safetensors import torch as _  # noqa: F401  (imported before the clock starts)

    with open_recording(given.recording) as recording:
        members = given.groups(recording).members
    if given.torch_threads:
        torch.set_num_threads(given.torch_threads)
    rows: Any = slice(None)
    if group in members:
        rows = torch.zeros(recording.tokens, dtype=torch.bool)
        rows[torch.from_numpy(members[group])] = True
    numbers = recording.hyperparameters
    assert numbers is not None  # see `reason_to_skip`
    start = time.perf_counter()
    replays.notebook(given.recording, numbers, recording.steps, rows)
    return {"work": time.perf_counter() - start, "threads": torch.get_num_threads()}


#: The jobs, in the order of a round.
JOBS: dict[str, Callable[[Input], Measured]] = {
    "host-bandwidth": host_bandwidth,
    "device-bandwidth": device_bandwidth,
    "read": read,
    "read-cold": read_cold,
    "audit": lambda given: audit(given, given.arithmetics),
    "audit-auto": lambda given: audit(given, "auto"),
    "accounting": lambda given: audit(given, "auto", "accounting"),
    "ledger": lambda given: audit(given, "auto", "ledger"),
    "torch-exact": torch_exact,
    "numpy-exact": numpy_exact,
    "notebook": lambda given: notebook(given, "dead"),
    "notebook-all": lambda given: notebook(given, "all rows"),
}

#: Jobs that do not touch the recording.
BANDWIDTHS = ("host-bandwidth", "device-bandwidth")


def reason_to_skip(job: str, recording: Recording) -> str:
    """Say why a job cannot run; "" where it can."""
    if job in ("torch-exact", "notebook", "notebook-all"):
        if importlib.util.find_spec("torch") is None:
            return 'torch is missing; pip install "jaxaudit[torch]".'
    if job == "torch-exact":
        return replays.reason_against(recording)
    if job == "numpy-exact":
        return replays.reason_against_numpy(recording)
    return reason_against_notebook(recording) if job.startswith("notebook") else ""


def reason_against_notebook(recording: Recording) -> str:
    """Say why the old notebook's formulas cannot run on a recording."""
    if recording.hyperparameters is None or not {"exp_avg", "exp_avg_sq"} <= set(recording.formats):
        return "the recording lacks moments or hyperparameters."
    available, needed = available_memory(), 2 * recording.path.stat().st_size
    if available < needed:
        return f"it loads whole tensors; {needed} bytes of memory are needed, {available} are free."
    return ""
