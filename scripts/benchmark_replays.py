"""The same work without the project: exact replays in eager PyTorch and in NumPy, and the old notebook's formulas.

`replay` computes all three stages of a step of `torch.optim.Adam`'s loop from the recorded tensors, compares them
bit for bit, and takes norms and cosine of the change per token group in float64. What an audit learns from
agreement is taken from agreement here as well: where no weight differs, the replayed change is the recorded one.
Unlike an audit it counts neither infinite nor unrepresentable values.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jaxaudit.floats import FLOAT32, Format, decode, differ, encode, round_scalar, ulp_distance
from jaxaudit.hyperparameters import Hyperparameters
from jaxaudit.recording import TENSOR_KEYS, Recording
from jaxaudit.safetensors_file import SafetensorsFile

if TYPE_CHECKING:  # NumPy's processes must not hold torch
    import torch

#: What is compared, in the order of a step.
STAGES = ("exp_avg", "exp_avg_sq", "param")

#: What is read.
NAMES = ("param", "grad", "exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What came of a replay, by timestep and token group.

    Attributes:
        mismatches: elements whose bits differ, (stage, T, group).
        distances: largest ulp distance, likewise.
        squares: sums of squares of the recorded change, of the replayed one and of their difference, and the
            product of both, (4, T, group).
    """

    mismatches: NDArray[np.int64]
    distances: NDArray[np.int64]
    squares: NDArray[np.float64]

    @classmethod
    def empty(cls, steps: int, groups: int) -> "Statistics":
        """Make room for some timesteps."""
        counts = np.zeros((len(STAGES), steps, groups), np.int64)
        return cls(counts, counts.copy(), np.zeros((4, steps, groups)))

    def enter(self, k: int, one: "OneStep") -> None:
        """Enter the numbers of timestep k."""
        for s, stage in enumerate(STAGES):
            if stage in one.differing:
                self.mismatches[s, k], self.distances[s, k] = one.differing[stage]
        self.squares[:, k] = one.squares

    def norms(self) -> dict[str, NDArray[np.float64]]:
        """Return norms and cosine by the names of the audit's variables, (T, group)."""
        observed, predicted, difference = np.sqrt(self.squares[:3])
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = self.squares[3] / (predicted * observed)
        return {
            "norm_observed": observed,
            "norm_predicted": predicted,
            "norm_difference": difference,
            "cosine_similarity": cosine,
        }


@dataclasses.dataclass(frozen=True)
class OneStep:
    """The numbers of one timestep: see `Statistics`; stages without a difference are not in `differing`."""

    differing: Mapping[str, tuple[Any, Any]]
    squares: Any


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A range of timesteps in memory.

    Attributes:
        first: the first timestep, from 1.
        tensors: patterns; `grad` (n, tokens, width), all others (n + 1, tokens, width), from the state before.
        formats: recorded formats.
        given: hyperparameters.
        decoupled: weight decay acts on the weight.
    """

    first: int
    tensors: Mapping[str, NDArray[np.unsignedinteger]]
    formats: Mapping[str, Format]
    given: Hyperparameters
    decoupled: bool

    @property
    def steps(self) -> int:
        """How many."""
        return len(self.tensors["grad"])

    def scalars(self, k: int) -> dict[str, float]:
        """Return the numbers of timestep first + k as Adam computes them: in Python's doubles."""
        given, t = self.given, self.given.count.at(self.first + k)
        rate = float(given.learning_rate[self.first + k - 1])
        return {
            "lerp": 1 - given.beta1,
            "beta2": given.beta2,
            "addcmul": 1 - given.beta2,
            "decay": 1 - rate * given.weight_decay,
            "root": (1 - given.beta2**t) ** 0.5,
            "epsilon": given.epsilon,
            "minus_step_size": -rate / (1 - given.beta1**t),
        }


def load(recording: Recording, first: int, steps: int) -> Loaded:
    """Read a range of timesteps into memory."""
    given = recording.hyperparameters
    assert given is not None  # see `reason_against`
    tensors, whole = {}, (0, recording.tokens)
    with SafetensorsFile(recording.path) as file:
        for name in NAMES:
            start = first if name == "grad" else first - 1
            shape = (first + steps - start, recording.tokens, recording.width)
            tensors[name] = np.empty(shape, recording.formats[name].pattern_dtype)
            file.read_rows(TENSOR_KEYS[name], (start, first + steps), whole, tensors[name])
    decoupled = recording.metadata.get("optimizer", "").lower() != "adam"
    return Loaded(first, tensors, recording.formats, given, decoupled)


def reason_against(recording: Recording) -> str:
    """Say why the exact replays cannot run; "" where they can."""
    given, formats = recording.hyperparameters, recording.formats
    if given is None or not {*NAMES} <= {*formats}:
        return "the recording lacks gradients, moments or hyperparameters."
    if recording.flag("amsgrad") or recording.flag("maximize") or "compensation" in formats:
        return "this baseline is plain Adam, without amsgrad, maximize and Kahan sums."
    last = recording.at(recording.steps, (0, min(recording.tokens, 64)))
    for name in ("exp_avg", "exp_avg_sq"):
        values = decode(last.tensors[name][1], formats[name])
        if not np.array_equal(round_as(values, recording.storage), values, equal_nan=True):
            return f"{name} has more bits than the weights, which this baseline does not replay."
    return ""


def reason_against_numpy(recording: Recording) -> str:
    """Say why NumPy's replay cannot run; "" where it can."""
    given, storage = recording.hyperparameters, recording.storage
    if reason := reason_against(recording):
        return reason
    assert given is not None
    if storage is FLOAT32:
        return "PyTorch's float32 square root is not IEEE 754's on every processor."
    if given.beta1 <= 0.5 or (
        given.weight_decay and recording.metadata.get("optimizer", "").lower() == "adam"
    ):
        return "this baseline has no scalar loops, which beta1 <= 0.5 and L2 decay need."
    return ""


def replay_in_torch(loaded: Loaded, members: Sequence[NDArray[np.int64]]) -> Statistics:
    """Replay and compare in eager PyTorch, one operation of the optimizer's loop after the other.

    PyTorch keeps moments in the dtype of the weights: a recorded float32 moment that is no such value is rounded
    first, where the audit and NumPy's replay take it as it is.
    """
    import torch

    found = Statistics.empty(loaded.steps, len(members))
    rows = [torch.from_numpy(group) for group in members]
    dtypes = {n: getattr(torch, loaded.formats[n].name) for n in NAMES}
    tensors = {n: torch.from_numpy(loaded.tensors[n]).view(dtypes[n]) for n in NAMES}
    for k in range(loaded.steps):
        after = {name: tensors[name][k + 1] for name in STAGES}
        replayed = step_in_torch(loaded, tensors, k)
        found.enter(k, compared_in_torch(replayed, tensors["param"][k], after, rows))
    return found


def step_in_torch(
    loaded: Loaded, tensors: Mapping[str, "torch.Tensor"], k: int
) -> dict[str, "torch.Tensor"]:
    """Compute each stage from the recorded tensors, as `torch.optim.adam._single_tensor_adam` does."""
    s, dtype = loaded.scalars(k), tensors["param"].dtype
    grad, param = tensors["grad"][k], tensors["param"][k].clone()
    if loaded.given.weight_decay and loaded.decoupled:
        param.mul_(s["decay"])
    elif loaded.given.weight_decay:
        grad = grad.add(param, alpha=loaded.given.weight_decay)
    exp_avg = tensors["exp_avg"][k].to(dtype, copy=True).lerp_(grad, s["lerp"])
    exp_avg_sq = tensors["exp_avg_sq"][k].to(dtype, copy=True).mul_(s["beta2"])
    exp_avg_sq.addcmul_(grad, grad, value=s["addcmul"])
    first, second = (tensors[name][k + 1].to(dtype) for name in ("exp_avg", "exp_avg_sq"))
    denominator = (second.sqrt() / s["root"]).add_(s["epsilon"])
    param.addcdiv_(first, denominator, value=s["minus_step_size"])
    return {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "param": param}


def compared_in_torch(
    replayed: Mapping[str, "torch.Tensor"],
    before: "torch.Tensor",
    after: Mapping[str, "torch.Tensor"],
    members: Sequence["torch.Tensor"],
) -> OneStep:
    """Compare one timestep."""
    import torch

    differing = {}
    for stage in STAGES:
        mine, recorded = replayed[stage].to(after[stage].dtype), after[stage]
        wrong = bits(mine) != bits(recorded)
        if wrong.any():
            wrong &= ~(mine.isnan() & recorded.isnan())
            ulps = (on_line(mine) - on_line(recorded)).abs().amax(1)
            counts = wrong.sum(1)
            differing[stage] = (
                [int(counts[rows].sum()) for rows in members],
                [int(ulps[rows].max()) for rows in members],
            )
    observed = (after["param"].float() - before.float()).double()
    sums = [observed.square().sum(1)]
    if "param" in differing:
        mine = replayed["param"]
        predicted = (mine.float() - before.float()).double()
        difference = (mine.float() - after["param"].float()).double()
        sums += [
            predicted.square().sum(1),
            difference.square().sum(1),
            (predicted * observed).sum(1),
        ]
    else:
        sums += [sums[0], torch.zeros_like(sums[0]), sums[0]]
    by_row = torch.stack(sums)
    squares = torch.stack([by_row[:, rows].sum(1) for rows in members], 1).numpy()
    return OneStep(differing, squares)


def bits(values: "torch.Tensor") -> "torch.Tensor":
    """View a tensor as integers of its width."""
    import torch

    return values.view(torch.int32 if values.element_size() == 4 else torch.int16)


def on_line(values: "torch.Tensor") -> "torch.Tensor":
    """Place values on the line of integers on which neighbours are 1 apart (see `floats.ordered`)."""
    import torch

    top = 1 << (8 * values.element_size() - 1)
    patterns = bits(values).long()
    line = torch.where(patterns < 0, -(patterns + top), patterns)
    infinity = int(bits(torch.tensor(math.inf, dtype=values.dtype)))
    return torch.where(values.isnan(), infinity + 1, line)


def replay_in_numpy(
    loaded: Loaded, members: Sequence[NDArray[np.int64]], threads: int
) -> Statistics:
    """Replay and compare in NumPy with the 16-bit types of ml_dtypes, timesteps in parallel."""
    found = Statistics.empty(loaded.steps, len(members))

    def one(k: int) -> None:
        with np.errstate(all="ignore"):
            found.enter(k, compared_in_numpy(loaded, step_in_numpy(loaded, k), k, members))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(loaded.steps)))
    return found


def step_in_numpy(loaded: Loaded, k: int) -> dict[str, NDArray[np.float32]]:
    """Compute each stage from the recorded tensors in float32, rounded after each operator."""
    fmt, scalars = loaded.formats["param"], loaded.scalars(k)
    s = {name: np.float32(value) for name, value in scalars.items()}
    x = {n: decode(loaded.tensors[n][k], loaded.formats[n]) for n in NAMES}
    first, second = (
        decode(loaded.tensors[n][k + 1], loaded.formats[n]) for n in ("exp_avg", "exp_avg_sq")
    )
    exp_avg = fused(s["lerp"], x["grad"] - x["exp_avg"], x["exp_avg"])
    decayed = round_as(x["exp_avg_sq"] * s["beta2"], fmt)
    exp_avg_sq = fused(s["addcmul"] * x["grad"], x["grad"], decayed)
    denominator = round_as(round_as(np.sqrt(second), fmt) / s["root"], fmt)
    denominator = round_as(denominator + round_scalar(scalars["epsilon"], fmt), fmt)
    param = x["param"]
    if loaded.given.weight_decay:
        param = round_as(param * s["decay"], fmt)
    param = param + s["minus_step_size"] * first / denominator
    stages = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "param": param}
    return {name: round_as(value, fmt) for name, value in stages.items()}


def fused(a: Any, b: NDArray[np.float32], c: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round a * b + c once: the product is exact in float64, and the sum is rounded to odd there.

    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding
    to odd", IEEE Transactions on Computers 57 (2008).
    """
    product, addend = a * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    patterns = total.view(np.int64)
    even = ((patterns & 1) == 0) & (lost != 0)
    patterns += np.where(even, np.where((lost > 0) == (total > 0), 1, -1), 0)
    return total.astype(np.float32)


def round_as(values: NDArray[Any], fmt: Format) -> NDArray[np.float32]:
    """Round to a format by a cast of NumPy or ml_dtypes, and widen again."""
    return values if fmt is FLOAT32 else values.astype(fmt.value_dtype).astype(np.float32)


def compared_in_numpy(
    loaded: Loaded,
    replayed: Mapping[str, NDArray[np.float32]],
    k: int,
    members: Sequence[NDArray[np.int64]],
) -> OneStep:
    """Compare one timestep."""
    differing = {}
    for stage in STAGES:
        fmt, recorded = loaded.formats[stage], loaded.tensors[stage][k + 1]
        mine = encode(replayed[stage], fmt)
        if not np.array_equal(mine, recorded):
            counts = differ(mine, recorded, fmt).sum(1)
            ulps = ulp_distance(mine, recorded, fmt).max(1)
            differing[stage] = (
                [int(counts[rows].sum()) for rows in members],
                [int(ulps[rows].max()) for rows in members],
            )
    weights = loaded.tensors["param"][k : k + 2]
    before, after = decode(weights, loaded.formats["param"])
    observed = (after - before).astype(np.float64)
    sums = [np.square(observed).sum(1)]
    if "param" in differing:
        predicted = (replayed["param"] - before).astype(np.float64)
        difference = (replayed["param"] - after).astype(np.float64)
        sums += [
            np.square(predicted).sum(1),
            np.square(difference).sum(1),
            (predicted * observed).sum(1),
        ]
    else:
        sums += [sums[0], np.zeros_like(sums[0]), sums[0]]
    by_row = np.stack(sums)
    return OneStep(differing, np.stack([by_row[:, rows].sum(1) for rows in members], 1))


def notebook(path: Path, given: Hyperparameters, steps: int, rows: Any) -> None:
    """Load whole tensors and account for every step of some rows, as the old notebook did."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    weight, first, second = (tensors[key] for key in ("W", "momentum_W", "variance_W"))
    for t in range(1, steps + 1):
        after = adam_weight(weight[t - 1], first[t], second[t], given, t)
        changes = after - weight[t - 1], weight[t] - weight[t - 1]
        notebook_figures(*(change[rows] for change in changes))


def adam_weight(
    before: "torch.Tensor",
    first: "torch.Tensor",
    second: "torch.Tensor",
    given: Hyperparameters,
    t: int,
    root: "Callable[[torch.Tensor], torch.Tensor] | None" = None,
) -> "torch.Tensor":
    """Replay a step as the old notebook did: in float32, from left to right, rounded at the end.

    Args:
        before: weight before the step.
        first: first moment after the step.
        second: second moment after the step.
        given: hyperparameters; weight decay, which the notebook had none of, is left out.
        t: the step, from 1.
        root: square root in the place of PyTorch's own.
    """
    import torch

    rate = float(given.learning_rate[t - 1])
    m_hat = first.float() / (1 - given.beta1**t)
    v_hat = second.float() / (1 - given.beta2**t)
    denominator = (root or torch.sqrt)(v_hat) + given.epsilon
    return (before.float() - rate * m_hat / denominator).to(before.dtype)


def notebook_figures(
    predicted: "torch.Tensor", observed: "torch.Tensor"
) -> tuple[float, float, float]:
    """Return the norms of both changes and their cosine as the old notebook did, in float32."""
    p, o = predicted.float(), observed.float()
    norm_p, norm_o = p.norm(), o.norm()
    cosine = (p * o).sum() / (norm_p * norm_o + 1e-10)
    return norm_p.item(), norm_o.item(), cosine.item()
