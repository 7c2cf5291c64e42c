"""Spreading the tasks of an audit over processes: by a share of a job array, or by dask.distributed.

Tasks are independent, and a task whose part is there is done, whoever did it. So nothing has to be agreed upon: a process that
is lost costs its unfinished task, and no result depends on who did what.
"""

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxaudit.parts import Parts

#: Seconds after which a scheduler that does not answer counts as lost, and between two looks at the tasks.
_LOST, _LOOK = 20.0, 0.2


class SpreadingError(Exception):
    """The tasks cannot be spread, or those who did them were lost."""


def share_of(text: str, names: Sequence[str]) -> list[str]:
    """Return every N-th task from the I-th on, for "I/N" with I from 1 to N.

    Raises:
        ValueError: the text is something else.
    """
    parts = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
    if not parts or not 1 <= int(parts[1]) <= int(parts[2]):
        raise ValueError(f"got {text!r}, needed I/N with I from 1 to N, for example 1/4.")
    return list(names[int(parts[1]) - 1 :: int(parts[2])])


def do_with_dask(
    task: Callable[[Any, str], None],
    request: Any,
    names: Sequence[str],
    parts: Parts,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Have the tasks done that are not done yet; return when all are.

    Args:
        task: does one, given the request and its name, and publishes its part; any process must be able to import it.
        request: what is asked for.
        names: of all tasks.
        parts: where the parts appear; all workers must see this folder.
        workers: processes to start on this machine.
        scheduler: address of a running scheduler, in place of these.
        progress: is told how many tasks are done, and how many there are.

    Raises:
        SpreadingError: dask.distributed is not installed, the scheduler cannot be reached or is lost, or a task
            lost one worker after the other.
        Exception: what a task raised.
    """
    missing = [name for name in names if not parts.has(name)]
    tell = progress or (lambda done, of: None)
    tell(len(names) - len(missing), len(names))
    if not missing:
        return
    with _client(workers, scheduler) as client:
        futures = [
            client.submit(task, request, name, key=f"jaxaudit-{name}-{time.time_ns()}", pure=False)
            for name in missing
        ]
        _wait(client, futures, lambda done: tell(len(names) - len(missing) + done, len(names)))
    left = [name for name in missing if not parts.has(name)]
    if left:
        raise SpreadingError(
            f"workers reported {len(left)} of {len(names)} tasks as done whose parts are not in {parts.path}. All "
            "of them must see this folder, under this name."
        )


@contextlib.contextmanager
def _client(workers: int | None, scheduler: str | None) -> Iterator[Any]:
    try:
        from dask import config
        from distributed import Client, LocalCluster
        from distributed.comm.addressing import get_address_host_port
    except ImportError as error:
        raise SpreadingError(
            'workers need dask.distributed, which is not installed: pip install "jaxaudit[distributed]".'
        ) from error
    with contextlib.ExitStack() as stack:
        where: Any = scheduler
        # A worker that was killed is replaced; its task is not to blame before it has cost several.
        stack.enter_context(config.set({"distributed.scheduler.allowed-failures": 10}))
        if scheduler is None:
            where = stack.enter_context(
                LocalCluster(
                    n_workers=workers or 1,
                    threads_per_worker=1,
                    memory_limit=0,
                    dashboard_address=None,  # type: ignore[arg-type]
                    silence_logs=logging.CRITICAL,
                )
            )
        try:
            if scheduler is not None:
                get_address_host_port(
                    scheduler
                )  # a client that fails at this hangs when it is deleted
            client = Client(where, timeout=_LOST, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise SpreadingError(
                f"the scheduler {scheduler} cannot be reached ({_first_line(error)}). "
                "Start one with `dask scheduler`, or give --workers N."
            ) from error
        try:
            yield client
        finally:
            with contextlib.suppress(Exception):  # one that is lost cannot be taken leave of
                client.close(timeout=2)


def _wait(client: Any, futures: Sequence[Any], tell: Callable[[int], None]) -> None:
    """Wait for all tasks; raise what one raised, or that the scheduler is gone."""
    from distributed import KilledWorker

    told, silent_since = -1, None
    while True:
        states = [future.status for future in futures]
        for future, state in zip(futures, states, strict=True):
            if state == "error":
                error = future.exception(timeout=_LOST)
                if isinstance(error, KilledWorker):
                    raise SpreadingError(
                        f"a task lost one worker after the other ({_first_line(error)}). Look whether "
                        "they run out of memory; what is done is kept."
                    )
                raise error
        # A task that is "lost" was done by a worker that died since: the scheduler has it done once more, which takes
        # no time, as its part is there.
        if "cancelled" in states:
            raise _lost()
        done = states.count("finished")
        if done != told:
            tell(done)
            told = done
        if done == len(states):
            return
        if client.status == "running":
            silent_since = None
        else:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > _LOST:
                raise _lost()
        time.sleep(_LOOK)


def _lost() -> SpreadingError:
    return SpreadingError(
        "the connection to the scheduler was lost. What is done is kept: start a scheduler, and the same command goes on."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
