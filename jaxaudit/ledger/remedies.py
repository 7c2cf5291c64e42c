"""What could be done against lost updates: which arithmetic each remedy is.

A remedy changes one thing about the arithmetic that made a recording, and keeps everything else: options,
hyperparameters, gradients. Its moments and its weight may come of different arithmetics: a weight that is rounded by
chance is computed in float32 from moments that are kept as they were.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

from jaxaudit import formulas
from jaxaudit.arithmetics import CATALOGUE, Arithmetic, make_step
from jaxaudit.floats import BFLOAT16, FLOAT32, Format
from jaxaudit.identification import describe_options
from jaxaudit.mkl_sqrt import root_of_probe
from jaxaudit.recording import Recording
from jaxaudit.steps import Step
from jaxaudit.workbench import Candidate

#: Arithmetics that remedies build upon; for any other one they build upon the first.
BASES = (
    "torch-cpu-loop",
    "torch-cpu-foreach",
    "torch-cpu-fused",
    "torch-cuda-loop",
    "torch-cuda-foreach",
    "torch-cuda-fused",
    "torch-cuda-fused-legacy",
)

#: Names of remedies that others are compared with, or that need a treatment of their own.
RECORDED, MASTER = "recorded", "float32-master"

_MKL = "square root of MKL on AMD"

#: How a new weight becomes a stored one: as its step says, or rounded by chance, drawn or expected.
Chance = Literal["none", "drawn", "expected"]


@dataclasses.dataclass(frozen=True)
class Remedy:
    """One change to the arithmetic of a recording.

    Attributes:
        name: as in the dataset.
        summary: one line for people.
        first: the arithmetic that its first moment follows, with options and numbers.
        second: the arithmetic that its second moment follows.
        weight: the arithmetic that its weight follows, reading these moments.
        keeps_moments: it keeps its moments as the recording does, so that one step ahead starts from the
            recorded ones; else from its own, accumulated from the recorded gradients.
        chance: whether its weight is rounded by chance.
        seed: of the draw.
        label: name of its arithmetic.
        formula: what is computed.
    """

    name: str
    summary: str
    first: Candidate
    second: Candidate
    weight: Candidate
    keeps_moments: bool
    label: str
    formula: str
    chance: Chance = "none"
    seed: int | None = None

    def describe(self, base: Candidate) -> dict[str, Any]:
        """Return what is to be said of it, ready for JSON.

        Args:
            base: what it is a change to.
        """
        found: dict[str, Any] = {
            "summary": self.summary,
            "arithmetic": self.label,
            "formula": self.formula,
            "options": json.loads(describe_options(self.weight)),
            "hyperparameters": self.weight.given.differences(base.given),
        }
        return found if self.seed is None else found | {"seed": self.seed}


def base_of(candidate: Candidate, recording: Recording) -> Candidate:
    """Return what the remedies of a recording change: the arithmetic that made it, or torch's loop on CPU.

    Args:
        candidate: the arithmetic that made the recording, or the nearest one.
        recording: tells which square root torch took in float32, by its metadata `sqrt_probe`.
    """
    if candidate.arithmetic.name in BASES:
        return candidate
    arithmetic = CATALOGUE[BASES[0]]
    if recording.storage is FLOAT32:
        arithmetic = _with_root(arithmetic, recording)
    return Candidate(arithmetic, candidate.options, candidate.given)


def remedies_of(
    candidate: Candidate, recording: Recording, beta2: Sequence[float], seed: int
) -> list[Remedy]:
    """List the remedies that make sense for a recording, in the dataset's order, after `recorded`.

    Args:
        candidate: the arithmetic that made it, or the nearest one.
        recording: its storage format decides.
        beta2: values to try.
        seed: of stochastic rounding.
    """
    base, storage = base_of(candidate, recording), recording.storage
    found: list[Remedy] = []
    if storage is not FLOAT32:
        master = _float32_master(base, recording)
        found = [_float32_moments(base, master, recording), _master(master)]
        if storage is BFLOAT16:
            found.append(_by_chance(base, master, "drawn", seed))
            found.append(_by_chance(base, master, "expected", None))
        found.append(_kahan(base, storage))
    return found + [_other_beta2(base, value) for value in dict.fromkeys(beta2)]


def _with_root(arithmetic: Arithmetic, recording: Recording) -> Arithmetic:
    """Give an arithmetic the float32 square root of the machine that made a recording; IEEE 754's by default.

    ATen's single operators take the root of a float32 tensor from MKL; its fused kernel, and CUDA, do not.
    """
    root = _root_of(recording)
    single = arithmetic.name in ("torch-cpu-loop", "torch-cpu-foreach")
    if root != "mkl-amd" or not single or arithmetic.square_root == root:
        return arithmetic
    called = ", ".join(part for part in (arithmetic.variant, _MKL) if part)
    return dataclasses.replace(arithmetic, square_root=root, variant=called)


def _root_of(recording: Recording) -> str | None:
    """Read the metadata `sqrt_probe`; None where the recorder was another, or the root is unknown."""
    try:
        probe = json.loads(recording.metadata.get("sqrt_probe", "null"))
    except (ValueError, RecursionError):
        return None
    digest = probe.get("sha256") if isinstance(probe, dict) else None
    return root_of_probe(digest) if isinstance(digest, str) else None


def _changed(base: Candidate, recording: Recording, **changes: Any) -> Candidate:
    """Change an arithmetic that then takes roots of float32 tensors."""
    arithmetic = dataclasses.replace(_with_root(base.arithmetic, recording), **changes)
    return dataclasses.replace(base, arithmetic=arithmetic)


def _float32_moments(base: Candidate, master: Candidate, recording: Recording) -> Remedy:
    changed = _changed(base, recording, moments="float32")
    arithmetic, step = changed.arithmetic, _step(changed, recording)
    # Where no operator rounds on the way to a moment, it is that of a float32 run.
    rounds = any(
        "rounding" in point for name in ("exp_avg", "exp_avg_sq") for point in step.points(name)
    )
    moments = changed if rounds or step.decay == "l2" else master
    return Remedy(
        name="float32-moments",
        summary="both moments kept in float32, the weight rounded as before",
        first=moments,
        second=moments,
        weight=changed,
        keeps_moments=False,
        label=f"{arithmetic.label}, moments in float32",
        formula=f"{arithmetic.formula}\nBoth moments, and what is made of the second up to the denominator, are "
        "float32: R() leaves them as they are.",
    )


def _step(candidate: Candidate, recording: Recording) -> Step:
    return make_step(candidate.arithmetic, recording.storage, candidate.given, candidate.options)


def _float32_master(base: Candidate, recording: Recording) -> Candidate:
    return _changed(base, recording, moments="float32", weight="master")


def _master(master: Candidate) -> Remedy:
    return Remedy(
        name=MASTER,
        summary="weights and moments in float32; the model sees a rounded copy",
        first=master,
        second=master,
        weight=master,
        keeps_moments=True,
        label=f"{master.arithmetic.label} on float32 tensors",
        formula=f"{master.arithmetic.formula}\nAll in float32: R() leaves everything as it is.",
    )


def _by_chance(base: Candidate, master: Candidate, chance: Chance, seed: int | None) -> Remedy:
    expected = chance == "expected"
    what = "what it does on average" if expected else "one draw"
    end = "; left to itself, the weight is not rounded at all." if expected else "."
    return Remedy(
        name="stochastic-rounding-expected" if expected else "stochastic-rounding",
        summary=f"the weight computed in float32 and rounded to bfloat16 by chance: {what}",
        first=base,
        second=base,
        weight=master,
        keeps_moments=True,
        label=f"{master.arithmetic.label} on float32 tensors, from stored moments",
        formula=f"Moments: {base.arithmetic.formula}\nThe weight in float32 from these: R() leaves what is made of "
        f"them as it is; then 16 random bits are added to its pattern and the lower 16 bits cleared{end}",
        chance=chance,
        seed=seed,
    )


def _kahan(base: Candidate, storage: Format) -> Remedy:
    rounds = base.arithmetic.operators == "storage"
    arithmetic = base.arithmetic if rounds else CATALOGUE[BASES[0]]
    summed = dataclasses.replace(
        arithmetic, param=formulas.param_kahan, compensation=formulas.compensation_kahan
    )
    changed = dataclasses.replace(base, arithmetic=summed)
    moments = base if rounds else changed
    return Remedy(
        name="kahan",
        summary=f"what the weight loses is kept in a {storage.name} buffer and added to the next update",
        first=moments,
        second=moments,
        weight=changed,
        keeps_moments=True,
        label=f"{arithmetic.label} with Kahan summation",
        formula=f"{arithmetic.formula}\nBut c = R(c + (-lr/(1 - beta1^t) * m) / d);  p' = R(p + c);  "
        "c = R(c + R(p - p')).",
    )


def _other_beta2(base: Candidate, beta2: float) -> Remedy:
    given = dataclasses.replace(base.given, beta2=beta2, corrected_beta2=None)
    changed = dataclasses.replace(base, given=given)
    return Remedy(
        name=f"beta2-{beta2:g}",
        summary=f"beta2 of {beta2:g} instead of {base.given.beta2:g}, everything else as it was",
        first=base,
        second=changed,
        weight=changed,
        keeps_moments=False,
        label=base.arithmetic.label,
        formula=base.arithmetic.formula,
    )
