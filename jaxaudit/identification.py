"""Which arithmetic a recording was made with, from its bits alone.

Every arithmetic of the catalogue, under every option that the metadata leave open, is tried on a few elements of
early, middle and late timesteps (`probing`). A candidate that gets one bit wrong is out; the others must replay
the whole recording. Where nothing fits with the stored hyperparameters, those are tried that users are known to
end up with unknowingly: rounded betas, step counts that are stuck or go on from an earlier run, no bias
correction, learning rates of the neighbouring row.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from jaxaudit import floats, results
from jaxaudit.arithmetics import (
    CATALOGUE,
    VARIANTS,
    Arithmetic,
    Options,
    depends_on_tail,
)
from jaxaudit.devices import Backend, find_device
from jaxaudit.floats import BFLOAT16, FLOAT16, FLOAT32, round_scalar
from jaxaudit.hyperparameters import Hyperparameters, StepCount
from jaxaudit.probing import Probe, probe, scattered
from jaxaudit.recording import Recording
from jaxaudit.safetensors_file import FileError
from jaxaudit.scalars import EXACT, Nudge, scalars_of
from jaxaudit.steps import STAGES, Stage
from jaxaudit.workbench import Candidate, Workbench, check_steps

#: Replayed beside the identified arithmetic: what the first analyses of such runs assumed.
USUAL_ASSUMPTION = "float32-then-bfloat16"

#: Elements of each timestep of a probe: of the first one, and of the one that survivors are tried on.
_ELEMENTS, _MORE_ELEMENTS = 1 << 12, 1 << 16

#: Timesteps of the probe from the start, for what was not recorded.
_RUN = 24

#: Elements that are computed in a longer one at most, and elements that are read for it.
_RUN_ELEMENTS, _RUN_READ = 24 << 13, 1 << 26

#: Largest step count that is tried for a resumed run, and elements that it is sought with.
_COUNTS, _SOUGHT = 200_000, 1 << 12

#: Variants of a name that fit the probes and are replayed in full, at most.
_VARIANTS_KEPT = 4

#: How often recorded values are combined anew to find an element that tells two candidates apart.
_COMBINED, _LEAST_COMBINED = 8, 1 << 9


@dataclasses.dataclass(frozen=True)
class Finding:
    """How well a candidate does.

    Attributes:
        candidate: the best of its name.
        mismatches: by stage; None where the stage cannot be audited.
        compared: elements of each audited stage.
    """

    candidate: Candidate
    mismatches: dict[Stage, int | None]
    compared: int

    @property
    def fits(self) -> bool:
        """Tell whether something was audited, and nothing differs."""
        audited = [count for count in self.mismatches.values() if count is not None]
        return bool(audited) and not any(audited)

    @property
    def share(self) -> float:
        """Return the share of mismatches among all compared values; 1 where nothing was."""
        audited = [count for count in self.mismatches.values() if count is not None]
        return sum(audited) / max(1, len(audited) * self.compared) if audited else 1.0


@dataclasses.dataclass(frozen=True)
class Known:
    """An arithmetic that fits another recording of the same optimizer.

    Attributes:
        candidate: the arithmetic, as it was found there.
        stored: the hyperparameters that that recording states.
    """

    candidate: Candidate
    stored: Hyperparameters

    def here(self, recording: Recording) -> Candidate | None:
        """Return it with a recording's own hyperparameters, changed as they were found changed there.

        None where the recording differs in a number that was found to be another than the stored one.
        """
        own, there, found = recording.hyperparameters, self.stored, self.candidate.given
        changes: dict[str, Any] = {}
        for name in ("learning_rate", "beta1", "beta2", "corrected_beta2", "count"):
            if _same(getattr(found, name), getattr(there, name)):
                continue
            if own is None or not _same(getattr(own, name), getattr(there, name)):
                return None
            changes[name] = getattr(found, name)
        if own is None:
            return None
        return dataclasses.replace(self.candidate, given=dataclasses.replace(own, **changes))


def _same(one: Any, other: Any) -> bool:
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


class Identifier:
    """Tries candidates on probes of one recording."""

    def __init__(self, bench: Workbench):
        self._bench, self._recording = bench, bench.recording
        self._probes: dict[tuple[bool, int], Probe] = {}

    def rank(self) -> list[Finding]:
        """Find the best candidates of every name, in the order of `sort`.

        A name has several where some of its variants fit the probes; the whole recording may tell them apart.
        """
        found = [f for name in _conceivable(self._recording) for f in self.best(name)]
        if not any(finding.fits for finding in found):
            found = self.repair(found)
        if not any(finding.fits for finding in found):
            found = [f for g in found for f in self._or_with_unrecorded(g)]
        return self.sort(found)

    def repair(self, findings: Sequence[Finding]) -> list[Finding]:
        """Look for hyperparameters other than the stored ones under which a name fits."""
        return [self._repaired(finding) for finding in findings]

    def sort(self, findings: Sequence[Finding]) -> list[Finding]:
        """Put those that fit first, what the metadata claim before others, then by the share of mismatches."""
        claimed = _claimed_name(self._recording)
        return sorted(
            findings, key=lambda f: (not f.fits, f.share, f.candidate.arithmetic.name != claimed)
        )

    def _or_with_unrecorded(self, finding: Finding) -> list[Finding]:
        """Return what fits of a name with an option of which the recording lacks the tensor, else the finding.

        Run from the start, such a tensor can be looked at for a while only, in which much may fit by chance. Where it
        cannot be run, its stage cannot be looked at, and what is left fits without saying anything.
        """
        stages = {*self._bench.stages(finding.candidate)}
        found = self.best(finding.candidate.arithmetic.name, unrecorded=True)
        fitting = [f for f in found if f.fits and stages <= {*self._bench.stages(f.candidate)}]
        return fitting or [finding]

    def known(self, known: Sequence[Known]) -> list[Finding]:
        """Return those of some known arithmetics that fit, and the usual assumption; nothing where none fits."""
        fitting: list[Finding] = []
        for candidate in filter(None, (one.here(self._recording) for one in known)):
            finding = self.judge(candidate)
            if finding and finding.fits:
                finding = self.judge(candidate, elements=_MORE_ELEMENTS)
            if finding and finding.fits:
                fitting.append(finding)
        usual = fitting and USUAL_ASSUMPTION in _conceivable(self._recording)
        return fitting + self.best(USUAL_ASSUMPTION) if usual else fitting

    def named(self, name: str) -> list[Finding]:
        """Find the best of a name that was asked for."""
        found = self.best(name)
        return found if found[0].fits else self._or_with_unrecorded(found[0])

    def best(self, name: str, *, unrecorded: bool = False) -> list[Finding]:
        """Find the variants and options of a name that fit, else the nearest one.

        Args:
            name: of the arithmetic.
            unrecorded: try amsgrad even where neither metadata nor tensors speak of it.
        """
        best: Finding | None = None
        fitting: list[Finding] = []
        for candidate in self._candidates(name, unrecorded=unrecorded):
            if any(f.candidate.arithmetic is candidate.arithmetic for f in fitting):
                continue  # other options of a variant that fits
            finding = self.judge(candidate, best)
            if finding and finding.fits:
                finding = self.judge(candidate, elements=_MORE_ELEMENTS)
            if finding and finding.fits:
                fitting.append(finding)
            # What the metadata state, which comes first, gives way to what does much better only.
            elif finding and (best is None or finding.share < best.share / 2):
                best = finding
            if len(fitting) == _VARIANTS_KEPT:
                break
        if not fitting:
            assert best is not None  # a name has at least one candidate
            fitting = [best]
        return fitting

    def judge(
        self,
        candidate: Candidate,
        best: Finding | None = None,
        elements: int = _ELEMENTS,
        *,
        settle: bool = True,
    ) -> Finding | None:
        """Count a candidate's mismatches; None as soon as they are more than another's.

        Args:
            candidate: what to try.
            best: the other.
            elements: how many of each timestep.
            settle: see `Probe.mismatches`.
        """
        stages, probe = self._bench.stages(candidate), self._probe(candidate, elements)
        counts: dict[Stage, int | None] = dict.fromkeys(STAGES)
        for stage in stages:
            hopeful = settle and not any(counts.values())
            counts[stage] = probe.mismatches(candidate, stage, settle=hopeful)
            partly = sum(count or 0 for count in counts.values()) / (len(stages) * probe.size)
            if best and partly > best.share:
                return None
        return Finding(candidate, counts, probe.size) if stages or best is None else None

    def diagnose(self, finding: Finding) -> str:
        """Say at which stage and operation the bits first part, by altering one point at a time."""
        candidate, probe = finding.candidate, self._probe(finding.candidate)
        found: list[Stage] = [stage for stage in STAGES if finding.mismatches[stage]]
        if not found:
            return ""
        stage, step = found[0], self._bench.step(candidate)
        start = f"{stage} differs in {finding.mismatches[stage]:,} of {finding.compared:,} values"
        wrong = probe.mismatches(candidate, stage)
        if not wrong:
            return f"{start}, too few to say why"
        tried: dict[str, int] = {}
        for point in step.points(stage):
            arithmetic = dataclasses.replace(
                candidate.arithmetic, altered=candidate.arithmetic.altered ^ {point}
            )
            altered = dataclasses.replace(candidate, arithmetic=arithmetic)
            tried[point] = probe.mismatches(altered, stage)
        point = min(tried, key=lambda p: tried[p], default="")
        if not point or tried[point] >= wrong:
            return f"{start}; no single rounding or fusion accounts for it"
        verb = "accounts for all of it" if not tried[point] else f"leaves {tried[point]:,}"
        return f"{start}; the other way round, the {point} {verb}"

    def tell_apart(self, one: Finding, other: Finding) -> str:
        """Describe an element that would come out differently under two candidates that both fit."""
        a, b = one.candidate, other.candidate
        probe = self._probe(a)
        for stage in STAGES:
            if finding := _separating(probe, a, b, stage, self._bench):
                return finding
        return "no element was found that tells them apart"

    def _probe(self, candidate: Candidate, elements: int = _ELEMENTS) -> Probe:
        free = bool(self._bench.hidden(candidate))
        key = (free, elements)
        if key not in self._probes:
            steps, each = self._recording.steps, self._recording.step_elements
            # What is wrong early is out; what is not, may be wrong later only, where counts are stuck, say.
            most = _RUN if elements == _ELEMENTS else max(_RUN, _RUN_READ // each)
            last = min(most, steps)
            timesteps = tuple(range(1, last + 1)) if free else scattered(self._bench, elements)
            # A run takes as many times longer as it has timesteps.
            count = min(elements, max(64, _RUN_ELEMENTS // last)) if free else elements
            self._probes[key] = probe(self._bench, timesteps, count)
        return self._probes[key]

    def _candidates(self, name: str, *, unrecorded: bool = False) -> Iterator[Candidate]:
        given = self._recording.hyperparameters
        assert given is not None
        for arithmetic in VARIANTS[name]:
            if arithmetic.variant and not self._concerns(arithmetic):
                continue
            for options in _possible_options(self._recording, arithmetic, unrecorded=unrecorded):
                candidate = Candidate(arithmetic, options, given)
                yield candidate
                step = self._bench.step(candidate)
                if arithmetic.tail == "chunks" and depends_on_tail(arithmetic, step):
                    for threads in _thread_counts(self._recording):
                        other = dataclasses.replace(options, threads=threads)
                        yield dataclasses.replace(candidate, options=other)

    def _concerns(self, arithmetic: Arithmetic) -> bool:
        """Tell whether a variant can differ from the usual one of its name on this recording."""
        storage, second = self._recording.storage, self._bench.moment_formats[1]
        roots = arithmetic.float32_roots or FLOAT32 in (storage, second)
        master = arithmetic.weight == "master"
        return storage in arithmetic.storages and (
            roots or master or arithmetic.square_root == "ieee"
        )

    def _repaired(self, finding: Finding) -> Finding:
        """Look for hyperparameters other than the stored ones under which a candidate's name fits."""
        best = finding
        near: list[Finding] = []
        for candidate in self._candidates(finding.candidate.arithmetic.name):
            for repaired in self._repairs(candidate):
                judged = self.judge(repaired, best, settle=False)
                if judged and judged.fits:
                    judged = self.judge(repaired, elements=_MORE_ELEMENTS)
                if judged and judged.share < best.share:
                    near, best = [best, *near][:3], judged
                if best.fits:
                    return best
        # Scalars that are not known exactly are settled for the best few only: it takes its time.
        for close in (best, *near):
            judged = self.judge(close.candidate, elements=_MORE_ELEMENTS)
            if judged and judged.fits:
                return judged
        # What does little better says nothing, and would be taken for what the run had done.
        return best if best.share < finding.share / 2 else finding

    def _repairs(self, candidate: Candidate) -> Iterator[Candidate]:
        """Change the hyperparameters stage by stage: each decides for itself which of them fit."""
        stages, probe = self._bench.stages(candidate), self._probe(candidate)
        given, name = candidate.given, candidate.arithmetic.name
        firsts = [candidate, *_with(candidate, beta1=_roundings(given.beta1, name))]
        if "exp_avg" in stages:
            firsts = [c for c in firsts if not probe.mismatches(c, "exp_avg")][:1]
        for first in firsts:
            seconds = [first, *_with(first, beta2=_roundings(given.beta2, name))]
            if "exp_avg_sq" in stages:
                seconds = [c for c in seconds if not probe.mismatches(c, "exp_avg_sq")][:1]
            for second in seconds:
                if "param" in stages:
                    yield from self._param_repairs(second, probe)
                else:
                    yield second

    def _param_repairs(self, candidate: Candidate, probe: Probe) -> Iterator[Candidate]:
        stored, given = self._recording.hyperparameters, candidate.given
        assert stored is not None
        betas = [None] if given.beta2 == stored.beta2 else [None, stored.beta2]
        betas += [x for x in _roundings(given.beta2, candidate.arithmetic.name) if x not in betas]
        limits = [None, 256, 2048]
        counts = [dataclasses.replace(given.count, limit=limit) for limit in limits]
        counts += [StepCount(corrects=False)]
        rates = [given.learning_rate]
        if np.unique(rates[0]).size > 1:
            rates += [
                np.append(rates[0][:1], rates[0][:-1]),
                np.append(rates[0][1:], rates[0][-1:]),
            ]
        together = itertools.product(betas, counts, rates)
        if self._bench.hidden(candidate):  # each is a run of its own: one change at a time
            others = ((beta, given.count, given.learning_rate) for beta in betas[1:])
            others = (*others, *((None, count, given.learning_rate) for count in counts[1:]))
            others = (*others, *((None, given.count, rate) for rate in rates[1:]))
            same = (given.beta1, given.beta2) == (stored.beta1, stored.beta2)
            together = ((None, given.count, given.learning_rate), *(others if same else ()))
        for beta, count, rate in together:
            changed = dataclasses.replace(
                given, corrected_beta2=beta, count=count, learning_rate=rate
            )
            yield dataclasses.replace(candidate, given=changed)
        if not self._bench.hidden(candidate):
            for count in _fitting_counts(candidate, probe, self._bench):
                yield dataclasses.replace(candidate, given=_counted_from(given, count))


def identify(
    recording: Recording,
    *,
    backend: Backend = "auto",
    steps: tuple[int, int] | None = None,
    confirm: bool = True,
) -> xr.Dataset:
    """Rank the arithmetics by how few bits they get wrong.

    Every arithmetic is tried on a few thousand elements of early, middle and late timesteps, under the
    options that the metadata state and then under all others (kind of weight decay, amsgrad, maximize, 1 to 64
    threads). Where none fits, other hyperparameters than the stored ones are tried as well. Those that get every
    bit right must then replay the whole recording.

    Args:
        recording: the run.
        backend: where JAX runs.
        steps: range of steps, 1-based, the end not included; by default all.
        confirm: replay the whole recording under those that fit; else only the few elements count.

    Returns:
        Dataset over `arithmetic`, best first: `mismatch_count` and `mismatch_share` (arithmetic, stage), -1
        and NaN where a stage cannot be audited; `compared_count`, elements per stage; `fits`, 1 where nothing
        differs; `confirmed`, 1 where the whole recording was replayed; `options` and `hyperparameters` (JSON;
        the latter what was used instead of what was stored); `diagnosis`, where the bits first part.
        `told_apart_by` (arithmetic, other), for each two that fit: an element that would tell.

    Raises:
        FileError: there is nothing that could be replayed.
    """
    steps = check_steps(recording, steps)
    device = find_device(backend)
    with jax.enable_x64(True), jax.default_device(device):
        bench = Workbench(recording, (device,), steps, None)
        if recording.hyperparameters is None:
            raise FileError(
                f"{recording.path}: the weights alone tell nothing of the arithmetic; identification needs "
                "gradients or moments, and the hyperparameters."
            )
        identifier = Identifier(bench)
        ranked = identifier.rank()
        if not any(count is not None for f in ranked for count in f.mismatches.values()):
            raise FileError(
                f"{recording.path}: nothing can be replayed. Identification needs gradients, and the moments "
                "where the recording does not start with the run."
            )
        if confirm:
            ranked = _confirmed(bench, ranked)
            if not any(f.fits for f in ranked):
                # What fits a few elements only may be right but for a hyperparameter.
                ranked = _confirmed(bench, identifier.repair(_unique(identifier.sort(ranked))))
        ranked = _unique(identifier.sort(ranked))
        return _label(identifier, ranked, recording.hyperparameters, confirm)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What an audit replays.

    Attributes:
        candidates: arithmetics with options. A name can come several times, with different variants; the one to
            keep is that with the fewest mismatches.
        nearest: the first of them that fits the probes, else the first; None where there is none.
        known: arithmetics that were known beforehand fit, so the catalogue was not searched.
    """

    candidates: list[Candidate]
    nearest: Candidate | None
    known: bool = False


def fitting(
    recording: Recording,
    *,
    backend: Backend = "auto",
    steps: tuple[int, int] | None = None,
) -> tuple[Known, ...]:
    """Find the arithmetics that fit a few elements of a recording, for `choose` to try first on others like it.

    Args:
        recording: the run.
        backend: where JAX runs.
        steps: range of steps.

    Returns:
        What fits, what the metadata claim first; empty where nothing does or nothing can be replayed.
    """
    given, device = recording.hyperparameters, find_device(backend)
    if given is None:
        return ()
    with jax.enable_x64(True), jax.default_device(device):
        bench = Workbench(recording, (device,), check_steps(recording, steps), None)
        return tuple(Known(f.candidate, given) for f in Identifier(bench).rank() if f.fits)


def choose(bench: Workbench, wanted: str | Sequence[str], known: Sequence[Known] = ()) -> Choice:
    """Turn what was asked for into arithmetics with options.

    Args:
        bench: of the recording.
        wanted: names, "auto" or "all".
        known: for "auto", what is tried before the whole catalogue; if one fits the probes, no other is sought.
    """
    if bench.recording.hyperparameters is None:
        return Choice([], None)
    chosen: list[Finding] = []
    was_known = False
    identifier = Identifier(bench)
    for name in _listed(wanted):
        if name == "auto":
            found = identifier.known(known)
            was_known = bool(found)
            chosen += found or _identified(identifier)
        elif name == "all":
            chosen += [f for each in CATALOGUE for f in identifier.named(each)]
        else:
            chosen += identifier.named(name)
    fits = [f.candidate for f in chosen if f.fits]
    every = [f.candidate for f in chosen]
    unlike = [c for k, c in enumerate(every) if not any(_alike(c, d) for d in every[:k])]
    bench.differing |= {(f.candidate, s) for f in chosen for s, n in f.mismatches.items() if n}
    return Choice(unlike, next(iter(fits + unlike), None), was_known)


def _alike(one: Candidate, other: Candidate) -> bool:
    return one.arithmetic is other.arithmetic and one.options == other.options


def _unique(findings: Sequence[Finding]) -> list[Finding]:
    """Keep the first of each name."""
    names = [f.candidate.arithmetic.name for f in findings]
    return [f for k, f in enumerate(findings) if names.index(names[k]) == k]


def _identified(identifier: Identifier) -> list[Finding]:
    """Return the arithmetics that fit the probes, else the nearest one, and the usual assumption."""
    ranked = identifier.rank()
    fitting = [f for f in ranked if f.fits]
    usual = [f for f in ranked if f.candidate.arithmetic.name == USUAL_ASSUMPTION]
    return (fitting or [ranked[0]]) + usual


def check_names(wanted: str | Sequence[str]) -> None:
    """Raise unless everything named is an arithmetic, "auto" or "all".

    Raises:
        ValueError: with the names that there are.
    """
    names = _listed(wanted)
    unknown = [name for name in names if name not in {*CATALOGUE, "auto", "all"}]
    if unknown or not names:
        raise ValueError(
            f"unknown arithmetic {', '.join(map(repr, unknown)) or '(none)'}; there are "
            f"{', '.join(CATALOGUE)}, and `auto` and `all`."
        )


def _listed(wanted: str | Sequence[str]) -> list[str]:
    return [wanted] if isinstance(wanted, str) else list(wanted)


def _claimed_name(recording: Recording) -> str:
    """Name the arithmetic that the metadata say the trainer ran; a claim, good for an order at most."""
    stated = recording.metadata
    name = f"torch-{stated.get('device', '')}-{stated.get('implementation', '')}"
    if recording.flag("capturable"):
        return "torch-capturable"
    version = re.match(r"(\d+)\.(\d+)", stated.get("torch_version", ""))
    old = version is not None and (int(version[1]), int(version[2])) < (2, 11)
    return f"{name}-legacy" if old and name == "torch-cuda-fused" else name


def _conceivable(recording: Recording) -> Iterator[str]:
    """Name the arithmetics whose weights the recording's format can hold and that it tells from others."""
    for name, variants in VARIANTS.items():
        possible = [v for v in variants if recording.storage in v.storages]
        usual = variants[0]
        rounded = usual.weight != "float32" or usual.stochastic or recording.storage is FLOAT32
        if possible and rounded:
            yield name


def _possible_options(
    recording: Recording, arithmetic: Arithmetic, *, unrecorded: bool
) -> list[Options]:
    """List the options, those that the metadata state first; `unrecorded` as for `Identifier.best`."""
    given, claimed = recording.hyperparameters, recording.metadata.get("optimizer", "").lower()
    has_max = "max_exp_avg_sq" in recording.formats
    stated = recording.flag("amsgrad")
    amsgrads = _stated_first(stated, has_max, arithmetic.amsgrad)
    if not has_max and stated is not True and not unrecorded:
        amsgrads = [False]
    maximizes = _stated_first(recording.flag("maximize"), False, arithmetic.maximize)
    decays = [kind == "decoupled" for kind in arithmetic.decays]
    if given is None or (given.weight_decay == 0 and not arithmetic.always_decays):
        decays = [True]
    elif claimed == "adam":
        decays.sort()
    threads = recording.number("num_threads") or 1
    return [
        Options(decoupled=decoupled, amsgrad=amsgrad, maximize=maximize, threads=threads)
        for amsgrad, maximize, decoupled in itertools.product(amsgrads, maximizes, decays)
    ]


def _thread_counts(recording: Recording) -> list[int]:
    """List the numbers of threads that split the parameter in different ways, but for the stated one."""
    _, size = recording.parameter_elements()
    stated = recording.number("num_threads") or 1
    most = min(64, -(-size // 32768))  # a tensor below 32,768 elements is not split
    return [count for count in range(1, most + 1) if count != stated]


def _stated_first(stated: bool | None, usual: bool, possible: bool) -> list[bool]:
    if not possible:
        return [False]
    first = usual if stated is None else stated
    return [first, not first]


def _roundings(beta: float, name: str) -> list[float]:
    """List what a beta may have been rounded to on its way to an arithmetic."""
    found = [float(round_scalar(beta, fmt)) for fmt in (FLOAT32, BFLOAT16, FLOAT16)]
    if name == "optimi-kahan":  # its debiased beta is 0/0 for a beta of 1
        found = [value for value in found if value < 1]
    return [value for k, value in enumerate(found) if value != beta and value not in found[:k]]


def _with(candidate: Candidate, **choices: Sequence[Any]) -> list[Candidate]:
    """Replace one hyperparameter by each of some values."""
    ((name, values),) = choices.items()
    return [
        dataclasses.replace(candidate, given=dataclasses.replace(candidate.given, **{name: value}))
        for value in values
    ]


def _fitting_counts(candidate: Candidate, probe: Probe, bench: Workbench) -> list[int]:
    """Find the counts that the recording's first step can have had, the roundest first.

    A resumed run goes on counting where it was; the recording starts anew at 1. The distance between replayed
    and recorded weights grows to either side of the right count, so the search narrows down to it.
    """
    timestep, step = probe.timesteps[0], bench.step(candidate)
    number = candidate.given.count.number(timestep)
    part = slice(0, _SOUGHT)
    x = {name: v[:1, part] for name, v in probe.inputs(candidate, "param").items()}
    x["tail"] = probe.tail(candidate, step)[part]
    wanted = probe.recorded("param")[:1, part]

    def replayed(counts: NDArray[np.int64], nudge: Nudge = EXACT) -> NDArray[np.float32]:
        rates = np.full(counts.size, candidate.given.learning_rate[timestep - 1])
        given = dataclasses.replace(candidate.given, count=StepCount(), learning_rate=rates)
        scalars = scalars_of(
            step, candidate.arithmetic.rule, given, counts.tolist(), [nudge] * counts.size
        )
        return probe.replay(step, "param", scalars, x)

    low, high, counts = 1, _COUNTS, np.unique(np.geomspace(1, _COUNTS, 64).astype(np.int64))
    for _ in range(6):
        with np.errstate(all="ignore"):
            apart = np.abs(replayed(counts).astype(np.float64) - wanted)
        distance = np.nan_to_num(apart, nan=0, posinf=1e38).sum(axis=1)
        best = np.flatnonzero(distance == distance.min())
        low, high = counts[max(best[0] - 1, 0)], counts[min(best[-1] + 1, counts.size - 1)]
        if high - low < 64:
            break
        counts = np.unique(np.linspace(low, high, 64).astype(np.int64))
    some = {*counts.tolist(), *range(low, min(high, low + 64) + 1)}
    for unit in (10_000, 1000, 100, 10):  # a run is resumed after a round number of steps
        before = range(-(-(low - number) // unit) * unit, high, unit)
        some |= {count + number for count in before[:64]}
    order = sorted(
        {c for c in some if low <= c <= high and c >= number},
        key=lambda c: _roundness(c - number),
    )
    differ = np.ones(len(order), bool)
    for nudge in candidate.arithmetic.nudges(candidate.given):
        if nudge == Nudge(rate=nudge.rate):  # powers are near enough
            got = replayed(np.array(order, np.int64), nudge)
            differ &= floats.differ(got.view(np.uint32), wanted.view(np.uint32)).any(axis=1)
    # Of counts with the same scalars at every timestep, the roundest stands for all.
    found: dict[bytes, int] = {}
    for first in (c - number + 1 for c, wrong in zip(order, differ, strict=True) if not wrong):
        given = _counted_from(candidate.given, first)
        scalars = probe.scalars(dataclasses.replace(candidate, given=given))
        found.setdefault(b"".join(scalars[name].tobytes() for name in sorted(scalars)), first)
    return list(found.values())[:32]


def _counted_from(given: Hyperparameters, first: int) -> Hyperparameters:
    """Let the step counts begin at another one, without a limit."""
    count = StepCount(first=first, numbers=given.count.numbers)
    return dataclasses.replace(given, count=count)


def _roundness(before: int) -> tuple[int, int]:
    """Order numbers of earlier steps by how round they are."""
    zeros = len(str(before)) - len(str(before).rstrip("0")) if before else 99
    return -zeros, before


def _separating(
    probe: Probe, a: Candidate, b: Candidate, stage: Stage, bench: Workbench
) -> str | None:
    """Look for inputs near the recorded ones that two candidates turn into different bits."""
    if stage not in bench.stages(a) or stage not in bench.stages(b):
        return None
    rng = np.random.default_rng(5)
    x, y = probe.inputs(a, stage), probe.inputs(b, stage)
    one, other = bench.step(a), bench.step(b)
    reads, count = one.reads(stage), max(_LEAST_COMBINED, probe.positions.size)

    def moved(
        name: str,
        values: NDArray[Any],
        order: Mapping[str, NDArray[np.int64]],
        factors: Mapping[str, NDArray[np.float64]],
    ) -> NDArray[np.float32]:
        tensor = name.removeprefix("new_")
        fmt = bench.recording.formats["grad"] if tensor == "grad" else one.format_of(tensor)
        with np.errstate(all="ignore"):
            found = values[:, order[name]] * factors[name].astype(np.float32)
        return floats.round_to(found, fmt)

    for k in range(_COMBINED):
        # Recorded values in new combinations: what another element, or another run, could have held.
        order = {
            name: rng.integers(0, probe.positions.size, count)
            for name in sorted({*reads, *other.reads(stage)})
        }
        # Then their neighbourhood too: few values have few combinations.
        factors = {name: rng.uniform(0.5, 2, count) if k else np.ones(count) for name in order}
        mixed, also = (
            {name: moved(name, values[name], order, factors) for name in order if name in values}
            for values in (x, y)
        )
        tails = {"tail": np.zeros(count, np.uint8)}
        found = probe.replay(one, stage, probe.scalars(a), mixed | tails)
        wanted = probe.replay(other, stage, probe.scalars(b), also | tails)
        differ = (found != wanted) & ~(np.isnan(found) & np.isnan(wanted))
        if differ.any():
            t, i = np.argwhere(differ)[0]
            inputs = ", ".join(f"{name} {mixed[name][t, i]:.9g}" for name in reads)
            return (
                f"{stage} at timestep {bench.recording.number_of(probe.timesteps[t])} of an element with {inputs}: "
                f"{found[t, i]:.9g} under {a.arithmetic.name}, {wanted[t, i]:.9g} under {b.arithmetic.name}"
            )
    return None


def _confirmed(bench: Workbench, findings: Sequence[Finding]) -> list[Finding]:
    """Count the mismatches of those that fit over the whole recording."""
    fitting = [f.candidate for f in findings if f.fits]
    if not fitting:
        return list(findings)
    counts: dict[Candidate, dict[Stage, int | None]] = {
        c: {stage: 0 if stage in bench.stages(c) else None for stage in STAGES} for c in fitting
    }
    start = 1 if any(bench.hidden(c) for c in fitting) else bench.steps[0]
    compared = 0
    for strip in bench.strips:
        bench.begin()
        for window in bench.windows((start, bench.steps[1]), [strip]):
            arrays, own = bench.put(window), strip.overlap * bench.recording.width
            for candidate in fitting:
                read = bench.with_hidden(candidate, window, arrays)
                for stage in bench.stages(candidate):
                    flags, _ = bench.flags(candidate, stage, window, read)
                    known = counts[candidate][stage] or 0
                    wrong = 0 if flags is None else int(np.count_nonzero(flags[:, own:]))
                    counts[candidate][stage] = known + wrong
            compared += window.steps * (window.own[1] - window.own[0]) * bench.recording.width
    return [Finding(f.candidate, counts[f.candidate], compared) if f.fits else f for f in findings]


def _label(
    identifier: Identifier, ranked: list[Finding], stored: Hyperparameters, confirm: bool
) -> xr.Dataset:
    counts = [[f.mismatches[stage] for stage in STAGES] for f in ranked]
    names = [f.candidate.arithmetic.name for f in ranked]
    numbers = np.array([[results.NOT_AUDITED if c is None else c for c in row] for row in counts])
    compared = np.array([f.compared for f in ranked], np.int64)
    share = np.where(numbers < 0, np.nan, numbers / np.maximum(compared, 1)[:, None])
    apart = np.full((len(ranked), len(ranked)), "", object)
    for (i, a), (k, b) in itertools.combinations(enumerate(ranked), 2):
        if a.fits and b.fits:
            apart[i, k] = apart[k, i] = identifier.tell_apart(a, b)
    over = "arithmetic"
    return xr.Dataset(
        {
            "mismatch_count": ((over, "stage"), numbers.astype(np.int64)),
            "mismatch_share": ((over, "stage"), share),
            "compared_count": (over, compared),
            "fits": (over, np.array([f.fits for f in ranked], np.int8)),
            "confirmed": (over, np.array([f.fits and confirm for f in ranked], np.int8)),
            "options": (over, [describe_options(f.candidate) for f in ranked]),
            "hyperparameters": (
                over,
                [json.dumps(f.candidate.given.differences(stored)) for f in ranked],
            ),
            "diagnosis": (over, [identifier.diagnose(f) for f in ranked]),
            "told_apart_by": ((over, "other"), apart.astype(str)),
        },
        {over: names, "stage": list(STAGES), "other": names},
    )


def describe_options(candidate: Candidate) -> str:
    """Return a candidate's options as JSON, with its variant."""
    return json.dumps(
        dataclasses.asdict(candidate.options) | {"variant": candidate.arithmetic.variant}
    )
