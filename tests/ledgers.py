"""Runs one part of the ledger over a recording, as the audit does."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import jaxaudit
from jaxaudit.arithmetics import VARIANTS, Options
from jaxaudit.devices import find_device
from jaxaudit.ledger.subject import Aside, Errands, Seen, Subject
from jaxaudit.recording import Recording, TokenGroups, token_groups_of
from jaxaudit.strips import members_within
from jaxaudit.workbench import Candidate, Workbench, check_steps


def observe(
    path: Path,
    observers: Callable[[Subject], list[Callable[[Seen], Any]]],
    *,
    arithmetic: str = "torch-cpu-loop",
    variant: int = 0,
    options: Options | None = None,
    groups: TokenGroups | None = None,
    steps: tuple[int, int] | None = None,
    window_steps: int | None = None,
) -> None:
    """Hand every window of a recording to observers.

    Args:
        path: the recording.
        observers: makes the functions that take a window, each called in order.
        arithmetic: name in the catalogue.
        variant: which of its variants.
        options: kind of weight decay, and the like.
        groups: of tokens.
        steps: range of steps.
        window_steps: steps of a window.
    """
    with jaxaudit.open_recording(path) as recording:
        _observe(
            recording,
            observers,
            Candidate(VARIANTS[arithmetic][variant], options or Options(), given_by(recording)),
            groups or token_groups_of(recording),
            check_steps(recording, steps),
            window_steps,
        )


def given_by(recording: Recording) -> Any:
    assert recording.hyperparameters is not None
    return recording.hyperparameters


def _observe(
    recording: Recording,
    observers: Callable[[Subject], list[Callable[[Seen], Any]]],
    candidate: Candidate,
    groups: TokenGroups,
    steps: tuple[int, int],
    window_steps: int | None,
) -> None:
    device = find_device("cpu")
    with jax.enable_x64(True), jax.default_device(device), Aside(device) as aside:
        bench = Workbench(recording, (device,), steps, window_steps)
        takers = observers(Subject(bench, candidate, groups, steps))
        for strip in bench.strips:
            for window in bench.windows(steps, [strip]):
                arrays = bench.with_hidden(candidate, window, bench.put(window))
                errands = Errands()
                later = functools.partial(errands.later, aside)
                seen = Seen(window, arrays, members_within(groups, window), later)
                for take in takers:
                    take(seen)
                errands.finish()
