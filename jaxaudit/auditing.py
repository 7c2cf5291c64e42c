"""The audit: replay every recorded step, compare, label."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from jaxaudit import history
from jaxaudit.accounting import Accountant, Divergence, Tables
from jaxaudit.devices import Backend, find_devices
from jaxaudit.identification import Known, check_names, choose
from jaxaudit.labelling import Notes, label_audit, label_free_run
from jaxaudit.ledger import verdict
from jaxaudit.ledger.ledger import Ledger
from jaxaudit.ledger.subject import LedgerOptions, Subject
from jaxaudit.parts import Parts
from jaxaudit.recording import Recording, TokenGroups, Window, token_groups_of
from jaxaudit.safetensors_file import FileError
from jaxaudit.strips import Countable, Numbers, Strip, members_within, strips_of
from jaxaudit.workbench import WINDOWS_HELD, Candidate, Workbench, check_steps

#: Told at the start and after each window: bytes of the recording done, bytes in all, and the last of as many timesteps as
#: these bytes come to.
Progress = Callable[[int, int, int], None]

_USUAL = LedgerOptions()

#: A window, its recorded patterns on the devices, and each token group's rows in it.
_Started = tuple[Window, dict[str, jax.Array], list[NDArray[np.int64]]]


def audit(
    recording: Recording,
    groups: TokenGroups | None = None,
    *,
    arithmetics: str | Sequence[str] = "auto",
    backend: Backend = "auto",
    devices: int | None = None,
    steps: tuple[int, int] | None = None,
    window_steps: int | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Replay every recorded step and compare it, bit for bit, with the recording.

    Args:
        recording: the run.
        groups: sets of tokens to count by; by default those in the recording, else only `all`.
        arithmetics: "auto" (identify, then replay the identified one and `float32-then-bfloat16`), "all",
            or names of the catalogue.
        backend: where JAX runs.
        devices: how many of its devices; by default one CPU, or all there are of another kind. The result does
            not depend on it.
        steps: range of steps, 1-based, the end not included; by default all.
        window_steps: steps per window; the result does not depend on it.
        progress: called after each window.

    Returns:
        The dataset of `results.VARIABLES`.

    Raises:
        FileError: the recording cannot be read, or does not fit the groups.
        ValueError: an unknown arithmetic, or steps outside the recording.
        BackendError: the backend is absent, or has fewer devices.
        SelfTestError: the device cannot compute what the audit needs.
    """
    with Audit(
        recording, groups, arithmetics=arithmetics, backend=backend, devices=devices, steps=steps,
        window_steps=window_steps, progress=progress, run_freely=False,
    ) as audit:  # fmt: skip
        return audit.run()[""]


def free_run(
    recording: Recording,
    groups: TokenGroups | None = None,
    *,
    arithmetics: str | Sequence[str] = "auto",
    backend: Backend = "auto",
    devices: int | None = None,
    steps: tuple[int, int] | None = None,
    window_steps: int | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Leave each arithmetic to itself: from the first weights and moments and the gradients alone.

    The audit starts each step from the recorded state; here a step starts from where the one before it led. An
    arithmetic that replays the recording exactly never parts from it; of any other this shows when it does, and
    how fast the weights grow apart.

    Args:
        recording: the run; it needs gradients.
        groups: as for `audit`; so are all other arguments.
        arithmetics: which.
        backend: where JAX runs.
        devices: how many of them.
        steps: range of steps; the run starts from the recorded state before the first of them.
        window_steps: steps per window.
        progress: called after each window.

    Returns:
        The dataset of `results.FREE_RUN_VARIABLES`.

    Raises:
        FileError, ValueError, BackendError, SelfTestError: as `audit`.
    """
    with Audit(
        recording, groups, arithmetics=arithmetics, backend=backend, devices=devices, steps=steps,
        window_steps=window_steps, progress=progress,
    ) as audit:  # fmt: skip
        return audit.run()["free_run"]


def audit_groups(
    recording: Recording,
    groups: TokenGroups | None = None,
    *,
    arithmetics: str | Sequence[str] = "auto",
    backend: Backend = "auto",
    devices: int | None = None,
    steps: tuple[int, int] | None = None,
    window_steps: int | None = None,
    progress: Progress | None = None,
    ledger: LedgerOptions | None = _USUAL,
    known: Sequence[Known] = (),
    parts: Parts | None = None,
) -> dict[str, xr.Dataset]:
    """Do everything that there is to do with a recording.

    Args:
        recording: the run.
        groups: as for `audit`; so are all other arguments but the last two.
        arithmetics: which; the ledger follows the first that fits.
        backend: where JAX runs.
        devices: how many of them; the ledger uses the first.
        steps: range of steps.
        window_steps: steps per window.
        progress: called after each window.
        ledger: what is asked of the ledger; None for no ledger.
        known: arithmetics that "auto" tries before the whole catalogue (`identification.fitting`). The attribute
            `identified_by` at the root then says what the replayed ones were found by: `known` or `recording`.
        parts: a folder that keeps what is done, for an audit that is to go on where it was interrupted.

    Returns:
        The dataset of each group of the file: under "" what `audit` returns, under "free_run" what `free_run`
        does, and those of the ledger (`ledger.variables`), without those that the recording lacks tensors for.

    Raises:
        FileError, ValueError, BackendError, SelfTestError: as `audit`.
    """
    with Audit(
        recording, groups, arithmetics=arithmetics, backend=backend, devices=devices, steps=steps,
        window_steps=window_steps, progress=progress, ledger=ledger, known=known,
    ) as audit:  # fmt: skip
        return audit.run(parts)


def audit_tree(
    recording: Recording, groups: TokenGroups | None = None, **options: Any
) -> xr.DataTree:
    """Return what `audit_groups` does as a tree, as `xr.open_datatree` shows the file; arguments are the same."""
    found = audit_groups(recording, groups, **options)
    return xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in found.items()})


class Audit(contextlib.ExitStack):
    """An audit as a number of tasks, each of which can be done by itself; a context manager.

    Every strip of rows is a task, and what is told of all rows at once another. A task's numbers do not depend on what was
    done before; `merge` puts those of all tasks together, whoever did them.

    Args:
        recording: the run; it must stay open.
        groups, arithmetics, backend, devices, steps, window_steps, progress, ledger, known: as for `audit_groups`.
        run_freely: leave each arithmetic to itself as well.

    Attributes:
        tasks: their names, in the order in which their numbers are merged.

    Raises:
        FileError, ValueError, BackendError, SelfTestError: as `audit`.
    """

    def __init__(
        self,
        recording: Recording,
        groups: TokenGroups | None = None,
        *,
        arithmetics: str | Sequence[str] = "auto",
        backend: Backend = "auto",
        devices: int | None = None,
        steps: tuple[int, int] | None = None,
        window_steps: int | None = None,
        progress: Progress | None = None,
        ledger: LedgerOptions | None = None,
        known: Sequence[Known] = (),
        run_freely: bool = True,
    ):
        super().__init__()
        self._recording, self._groups = recording, groups or token_groups_of(recording)
        check_names(arithmetics)
        _check_groups(recording, self._groups)
        steps = check_steps(recording, steps)
        self._devices = find_devices(backend, devices)
        self._progress, self._known = progress or (lambda *_: None), tuple(known)
        self._notes, self._done = Notes(), 0
        with self._settings():
            self._bench = bench = Workbench(recording, self._devices, steps, window_steps)
            self._choice = choose(bench, arithmetics, self._known)
            candidates = self._choice.candidates
            self._tables = Tables(recording, self._groups, len(candidates), steps)
            self._divergence = Divergence(bench, self._tables, candidates) if run_freely else None
            self._accountant = Accountant(bench, self._tables, candidates, self._divergence)
            self._book: Ledger | None = None
            if ledger:
                subject = Subject(bench, self._choice.nearest, self._groups, steps)
                self._book = self.enter_context(Ledger(subject, ledger))
        self._strips = {strip_name(strip): strip for strip in bench.strips}
        self.tasks = task_names(recording, ledger=ledger is not None)

    def run(self, parts: Parts | None = None) -> dict[str, xr.Dataset]:
        """Do every task that is not done yet, in order; return the dataset of each group of the file.

        Args:
            parts: where the numbers of tasks are kept until the last is done.
        """
        if parts is None:
            self._tell()
            for name in self.tasks:
                self._do(name)
            return self.datasets()
        self.publish(parts, self.tasks)
        self.merge(parts)
        found = self.datasets()
        found[""].attrs["created_at"] = parts.started_at
        return found

    def publish(self, parts: Parts, names: Iterable[str]) -> None:
        """Do tasks and keep their numbers; those that are there already, whoever did them, count as done."""
        self._tell()
        for name in names:
            if parts.has(name):
                self._advance(name)
                continue
            self._clear()
            self._do(name)
            parts.write(name, self._numbers(name), self._notes.as_json())

    def merge(self, parts: Parts) -> None:
        """Put the numbers of all tasks together.

        Raises:
            FileError: one is not there, or damaged.
        """
        self._clear()
        for name in self.tasks:
            numbers, notes = parts.read(name)
            for prefix, each in self._countable(name):
                each.merge(numbers, self._strip_of(name), prefix)
            try:
                self._notes.take(Notes.of_json(notes))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise parts.damaged(name) from error

    def datasets(self) -> dict[str, xr.Dataset]:
        """Return the dataset of each group of the file, the root's under ""."""
        tables, divergence, choice = self._tables, self._divergence, self._choice
        kept = _kept(tables, choice.candidates)
        exact = choice.nearest is not None and _replays(
            tables, choice.candidates.index(choice.nearest)
        )
        tables.keep(kept)
        candidates = {k: choice.candidates[k] for k in kept}
        gaps = self._recording.gaps
        with self._settings():
            found = {"": label_audit(self._bench, tables, candidates, self._notes)}
            if self._known:
                found[""].attrs["identified_by"] = "known" if choice.known else "recording"
            if divergence:
                divergence.keep(kept)
                found["free_run"] = label_free_run(found[""], divergence)
            if self._book:
                found |= self._book.datasets()
            if gaps:
                found = history.told(found, gaps)
            if self._book:
                found[""] = _with_verdict(found, choice.nearest, exact=exact)
        return found

    def _do(self, name: str) -> None:
        """Do a task: its numbers are added to those that are there."""
        with self._settings():
            if name == CLUSTERS:
                assert self._book
                self._book.clusters.follow(self._advance_window)
                return
            self._bench.begin()
            for each in (self._tables, self._divergence, self._book):
                if each:
                    each.forget()
            self._read(self._strips[name])
            self._notes.take(self._noted())

    def _read(self, strip: Strip) -> None:
        """Take every window of a strip into the audit, and into the ledger."""
        bench, accountant, book = self._bench, self._accountant, self._book
        if bench.steps[0] > 1 and accountant.needs_run_up:
            for window in bench.windows((1, bench.steps[0]), [strip]):
                accountant.run_up(window)
        for window, arrays, members in self._one_ahead(strip):
            accountant.account(window, arrays, members)
            if book:
                if book.waits:
                    book.take(window, arrays, members)
                book.finish(behind=1)
            self._advance_window(window)
        if book:
            book.finish()

    def _one_ahead(self, strip: Strip) -> Iterator[_Started]:
        """Return each window after the next one was started, so that the device never waits for the host."""
        book, held = self._book, None
        # A ledger that waits for the accounting is behind by a window when that starts the next but one.
        kept = WINDOWS_HELD + bool(book and book.waits)
        for window in self._bench.windows(self._bench.steps, [strip], held=kept):
            started = window, self._bench.put(window), members_within(self._groups, window)
            if book and not book.waits:
                book.take(*started)
            self._accountant.start(*started[:2])
            if held:
                yield held
            held = started
        if held:
            yield held

    def _noted(self) -> Notes:
        """Return what is known after a strip."""
        settled = {
            k: {t: tuple(map(float, nudge)) for t, nudge in self._bench.nudges[c].items()}
            for k, c in enumerate(self._choice.candidates)
            if self._bench.nudges.get(c)
        }
        return Notes(self._bench.replayer.self_tests(), settled)

    def _numbers(self, name: str) -> Numbers:
        found: Numbers = {}
        for prefix, each in self._countable(name):
            found |= each.numbers(self._strip_of(name), prefix)
        return found

    def _clear(self) -> None:
        """Forget all numbers."""
        self._notes = Notes()
        for task in (self.tasks[0], CLUSTERS):
            for _, each in self._countable(task):
                each.clear()

    def _countable(self, name: str) -> Iterator[tuple[str, Countable]]:
        """Go through what the numbers of a task are in."""
        if name == CLUSTERS:
            if self._book:
                yield "clusters.", self._book.clusters
            return
        yield "tables.", self._tables
        if self._divergence:
            yield "free_run.", self._divergence
        if self._book:
            yield "ledger.", self._book

    def _strip_of(self, name: str) -> Strip:
        whole = (0, self._recording.tokens)
        return self._strips.get(name, Strip(0, whole, whole))

    def _advance(self, name: str) -> None:
        """Count a task as done."""
        strip, names = self._strip_of(name), ("param",) if name == CLUSTERS else self._bench.names
        steps = self._bench.steps[1] - self._bench.steps[0]
        self._done += self._bench.bytes(steps, strip.own[1] - strip.own[0], names)
        self._tell()

    def _advance_window(self, window: Window) -> None:
        rows = window.own[1] - window.own[0]
        self._done += self._bench.bytes(window.steps, rows, tuple(window.tensors))
        self._tell()

    def _tell(self) -> None:
        """Tell how many bytes are done, and as how many timesteps these count."""
        bench, tokens = self._bench, self._recording.tokens
        steps = bench.steps[1] - bench.steps[0]
        total = bench.bytes(steps, tokens)
        if self._book:
            total += bench.bytes(steps, tokens, ("param",))
        self._progress(self._done, total, bench.steps[0] - 1 + steps * self._done // total)

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        with jax.enable_x64(True), jax.default_device(self._devices[0]):
            yield


#: Name of the task that looks at all rows at once.
CLUSTERS = "clusters"


def strip_name(strip: Strip) -> str:
    """Name the task that takes a strip."""
    return f"strip-{strip.number:06}"


def task_names(recording: Recording, *, ledger: bool) -> list[str]:
    """Name the tasks of an audit, without starting it."""
    names = [strip_name(strip) for strip in strips_of(recording.tokens, recording.width)]
    return names + [CLUSTERS] * ledger


def _replays(tables: Tables, a: int) -> bool:
    """Tell whether every audited stage of a candidate came out without a mismatch."""
    return bool(tables.audited[a].any() and not np.maximum(tables.mismatches[a], 0).any())


def _with_verdict(
    found: Mapping[str, xr.Dataset], subject: Candidate | None, *, exact: bool
) -> xr.Dataset:
    """Say at the root what the ledger followed, and what it found."""
    followed = "" if subject is None else subject.arithmetic.label
    root = found[""].assign_attrs(
        ledger_arithmetic=followed, ledger_arithmetic_replays_exactly=int(exact)
    )
    told = verdict.sentences({**found, "": root})
    return root.assign_attrs(verdict=json.dumps(verdict.as_json(told), sort_keys=True))


def _kept(tables: Tables, candidates: Sequence[Candidate]) -> list[int]:
    """Choose among the variants of each name the one with the fewest mismatches, in any audited stage."""
    wrong = np.maximum(tables.mismatches, 0)[..., 0].sum(axis=(1, 2))
    best: dict[str, int] = {}
    for k, candidate in enumerate(candidates):
        name = candidate.arithmetic.name
        if name not in best or wrong[k] < wrong[best[name]]:
            best[name] = k
    return list(best.values())


def _check_groups(recording: Recording, groups: TokenGroups) -> None:
    if groups.tokens != recording.tokens:
        raise FileError(
            f"{recording.path}: the token groups are over {groups.tokens} tokens, but the recording has "
            f"{recording.tokens}. Give the groups that belong to this recording."
        )
