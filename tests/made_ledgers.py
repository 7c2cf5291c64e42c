"""Ledgers of a run that never was: datasets by the tables of `ledger.variables`, consistent with each other.

Tokens cool from early to frozen at random timesteps, dead ones sooner; everything that is counted of them follows
from these timesteps, everything counted of their elements from random shares of what there is.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from jaxaudit import results
from jaxaudit.ledger import variables
from jaxaudit.ledger.counting import QUANTILES
from jaxaudit.steps import STAGES

ARITHMETICS = ("torch-cpu-loop", "float32-then-bfloat16")
REMEDIES = ("recorded", "float32-moments", "float32-master", "stochastic-rounding")
REMEDIES += ("stochastic-rounding-expected", "kahan", "beta2-0.95")
MARGINS = np.arange(-24, 9)
LEDGER = ("updates", "moments", "lattice", "tokens", "counterfactual")

ATTRIBUTES = {
    "title": "jaxaudit of made-up.safetensors",
    "identified_arithmetic": "torch-cpu-loop",
    "hyperparameters": json.dumps({"beta1": {"origin": "metadata", "value": 0.9}}),
    "arithmetics": json.dumps({name: {"formula": "p = p - u\nu = lr"} for name in ARITHMETICS}),
    "source": "/runs/made-up.safetensors",
    "source_bytes": 7_687_680,
    "storage_format": "bfloat16",
    "state_precision": "exp_avg: bfloat16; exp_avg_sq: bfloat16",
    "self_test": "{}",
    "jax_version": "0.10.2",
    "xla_flags": "",
    "created_at": "2026-01-01T00:00:00+00:00",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """What kind of ledger to make.

    Attributes:
        groups: how many tokens each has, beside `all`; they follow each other, and may be empty.
        steps: timesteps.
        first: the first of them.
        width: elements of a token.
        lost: share of the wanted updates of each group that is lost; by default most of the first, some of others.
        stuck: share of the second moment's falls that do not happen.
        decay: there is weight decay, all of it lost.
        freezes: tokens freeze.
        nan: every floating-point number is NaN.
        gradients: the recording holds gradients; without there are `lattice` and `tokens` only.
        remedies: of the counterfactuals.
        attributes: of the audit, instead of usual ones.
        seed: of everything random.
    """

    groups: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"dead": 60, "live": 40})
    steps: int = 300
    first: int = 1
    width: int = 64
    lost: Sequence[float] = ()
    stuck: float = 1.0
    decay: bool = False
    freezes: bool = True
    nan: bool = False
    gradients: bool = True
    remedies: Sequence[str] = REMEDIES
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def tree(self) -> dict[str, xr.Dataset]:
        """Make the datasets by the names of their groups."""
        return _Maker(self).tree()


class _Maker:
    def __init__(self, made: Made):
        self.made = made
        self.random = np.random.default_rng(made.seed)
        self.names = ["all", *made.groups]
        self.tokens = max(sum(made.groups.values()), 1)
        ends = np.cumsum([0, *made.groups.values()])
        spans = [(0, self.tokens), *zip(ends[:-1], ends[1:], strict=True)]
        self.member = np.zeros((self.tokens, len(self.names)), np.int64)
        for k, (begin, end) in enumerate(spans):
            self.member[begin:end, k] = 1
        self.t = np.arange(made.first, made.first + made.steps)
        self.shape = (made.steps, len(self.names))
        self.elements = self.member.sum(axis=0) * made.width
        self._live()

    def _live(self) -> None:
        """Draw each token's last early step, last midlife step and last move, counted from `first`."""
        steps, index = self.made.steps, np.arange(self.tokens)
        dead = index < next(iter(self.made.groups.values()), self.tokens)
        speed = np.where(dead, 0.35, 0.9) * self.random.uniform(0.5, 1.15, self.tokens)
        onset = np.minimum((steps**speed).astype(np.int64), steps)
        onset[index % 17 == 5] = 0  # these never move
        if not self.made.freezes:
            onset[:] = steps
        self.onset, self.midlife, self.early = onset, onset * 2 // 3, onset // 4

    def tree(self) -> dict[str, xr.Dataset]:
        found = {"": self.root(), "free_run": self.free_run()}
        if self.made.gradients:
            found |= {"updates": self.updates(), "moments": self.moments()}
        found |= {"lattice": self.lattice(), "tokens": self.life()}
        if self.made.gradients:
            found["counterfactual"] = self.counterfactual(found["updates"])
        return found

    def label(self, arrays: Mapping[str, Any], table: Any, **coordinates: Any) -> xr.Dataset:
        common = {"timestep": self.t, "token_group": self.names}
        made = {name: np.asarray(array, table[name].dtype) for name, array in arrays.items()}
        if self.made.nan:
            made = {n: np.full_like(a, np.nan) if a.dtype.kind == "f" else a for n, a in made.items()}  # fmt: skip
        return results.label(made, common | coordinates, {}, table)

    def root(self) -> xr.Dataset:
        a, (t, g) = len(ARITHMETICS), self.shape
        mismatches = np.zeros((a, 3, t, g), np.int64)
        mismatches[1:] = self.elements // 10
        norms = np.abs(self.random.normal(1, 0.1, (t, g))) * np.sqrt(self.elements)
        arrays = {
            "element_count": self.elements,
            "mismatch_count": mismatches,
            "max_ulp_distance": mismatches * 3,
            "audited": np.ones((a, 3)),
            "first_mismatch": np.full((a, 3, 5), -1),
            "norm_observed": norms,
            "norm_predicted": np.stack([norms, norms * 0.99]),
            "norm_difference": np.stack([norms * 0, norms * 0.1]),
            "cosine_similarity": np.stack([norms * 0 + 1, norms * 0 + 0.99]),
            "ratio": np.stack([norms * 0 + 1, norms * 0 + 0.99]),
            "nonfinite_count": np.zeros((1, t, g)),
            "unrepresentable_count": np.zeros((1, t, g)),
            "learning_rate": np.full(t, 1e-3),
        }
        coordinates = {"arithmetic": list(ARITHMETICS), "stage": list(STAGES), "tensor": ["W"]}
        coordinates["mismatch_field"] = list(results.MISMATCH_FIELDS)
        found = self.label(arrays, results.VARIABLES, **coordinates)
        return found.assign_attrs(ATTRIBUTES | dict(self.made.attributes))

    def free_run(self) -> xr.Dataset:
        shape = (len(ARITHMETICS), *self.shape)
        arrays = {
            "mismatch_count": np.zeros(shape),
            "max_ulp_distance": np.zeros(shape),
            "norm_divergence": np.zeros(shape),
            "first_divergence": np.zeros((len(ARITHMETICS), len(self.names))),
        }
        return self.label(arrays, results.FREE_RUN_VARIABLES, arithmetic=list(ARITHMETICS))

    def share(self, of: np.ndarray, share: Any) -> np.ndarray:
        """Take about a share of each count, all for 1 and nothing for 0."""
        exact = (np.asarray(share) == 0) | (np.asarray(share) == 1)
        rough = np.asarray(share) * self.random.uniform(0.9, 1, of.shape)
        return np.floor(of * np.where(exact, share, rough)).astype(np.int64)

    def summed(self, parts: np.ndarray) -> np.ndarray:
        """Make the group `all` the sum of the others, which do not overlap; along the axis of groups."""
        if parts.shape[1] > 1:
            parts[:, 0] = parts[:, 1:].sum(axis=1)
        return parts

    def shares(self) -> np.ndarray:
        usual = [0.97, *np.linspace(0.7, 0.4, max(len(self.names) - 2, 1))]
        given = list(self.made.lost) or usual[: len(self.names) - 1] or usual[:1]
        return np.array([given[0], *given][: len(self.names)])

    def updates(self) -> xr.Dataset:
        wanted = self.summed(self.share(np.broadcast_to(self.elements, self.shape), 0.99))
        lost = self.summed(self.share(wanted, self.shares()))
        one = self.summed(self.share(wanted - lost, 0.7))
        nothing = np.zeros(self.shape)
        decay = wanted if self.made.decay else nothing
        chances = np.exp(-0.5 * ((MARGINS + 5) / 3.0) ** 2)
        margins = np.floor(wanted[..., None] * chances / chances.sum()).astype(np.int64)
        margins[..., 0] += wanted - margins.sum(axis=-1)
        middle = -4 - 2 * self.t[:, None] / self.t[-1] + np.zeros(self.shape)
        norm = np.sqrt(wanted) * 1e-3
        arrays = {
            "wanted_count": wanted,
            "lost_count": lost,
            "one_ulp_count": one,
            "more_ulp_count": wanted - lost - one,
            "against_count": nothing,
            "unwanted_count": nothing,
            "undefined_count": nothing,
            "decay_wanted_count": decay,
            "decay_lost_count": decay,
            "decay_one_ulp_count": nothing,
            "decay_more_ulp_count": nothing,
            "decay_against_count": nothing,
            "wanted_sum": norm,
            "realised_sum": norm,
            "wanted_absolute_sum": norm,
            "realised_absolute_sum": norm,
            "wanted_norm": norm,
            "realised_norm": norm,
            "inner_product": norm**2 * 0.5,
            "descent_quality": nothing + 0.5,
            "signed_bias": nothing,
            "margin_quantile": middle[..., None] + np.array([-4, -1.5, 0, 1.5, 4]),
            "margin_histogram": margins,
        }
        return self.label(arrays, variables.UPDATES, quantile=QUANTILES, margin=MARGINS)

    def moments(self) -> xr.Dataset:
        should = self.summed(self.share(np.broadcast_to(self.elements, self.shape), 0.9))
        stuck = self.summed(self.share(should, self.made.stuck))
        grown = (np.arange(self.made.steps) + 1.0)[:, None] ** (0.4 if self.made.stuck else 0)
        ratio = np.round(grown * np.linspace(1, 1.4, len(self.names)) * 8) / 8
        nothing = np.zeros(self.shape)
        traced = np.unique(np.linspace(0, self.tokens - 1, 4).astype(int))
        base = 1e-4 * (1 + traced)[None, :] * np.ones((self.made.steps, 1))
        spread = np.array([0.7, 0.9, 1, 1.2, 1.5])
        counts = {f"{m}_{w}_count": nothing for m in ("exp_avg", "exp_avg_sq") for w in ("underflow", "low_bits_zero")}  # fmt: skip
        arrays = counts | {
            "exp_avg_sq_fall_count": should,
            "exp_avg_sq_stuck_count": stuck,
            "exp_avg_sq_stuck_steps_max": np.minimum(stuck, 1) * self.t[:, None],
            "exp_avg_sq_stuck_steps_mean": nothing,
            "exp_avg_fall_count": should,
            "exp_avg_stuck_count": nothing,
            "exp_avg_stuck_steps_max": nothing,
            "exp_avg_stuck_steps_mean": nothing,
            "root_ratio_count": should,
            "root_ratio_quantile": ratio[..., None] * spread,
            "step_size_ratio_quantile": spread / ratio[..., None],
            "epsilon_dominates_count": nothing,
            "stored_root": base,
            "float32_root": base / grown,
            "traced_group": [self.names[int(np.flatnonzero(self.member[k])[-1])] for k in traced],
        }
        return self.label(arrays, variables.MOMENTS, quantile=QUANTILES, traced_token=traced)

    def by_group(self, there: np.ndarray) -> np.ndarray:
        """Count tokens (timestep, token) by group."""
        return there.astype(np.int64) @ self.member

    def settled(self) -> np.ndarray:
        """Count tokens by the regimes that they have not left for good."""
        k = np.arange(1, self.made.steps + 1)[:, None]
        ends = [self.early, self.midlife, self.onset]
        past = [np.ones((len(k), self.tokens), bool), *(k > end for end in ends)]
        regimes = [a & ~b for a, b in zip(past, [*past[1:], past[0] & False], strict=True)]
        return np.stack([self.by_group(there) for there in regimes])

    def lattice(self) -> xr.Dataset:
        counts, (t, g) = self.settled(), self.shape
        arrays = {
            "displacement_mean": np.ones((2, 3, t, g)),
            "displacement_max": np.ones((2, 3, t, g)),
            "signed_displacement": np.zeros((2, t, g)),
            "edge_crossing_count": np.zeros((t, g)),
            "regime_count": counts,
            "settled_regime_count": counts,
        }
        coordinates = {"regime": variables.REGIMES, "measure": variables.MEASURES}
        return self.label(arrays, variables.LATTICE, norm=variables.NORMS, **coordinates)

    def life(self) -> xr.Dataset:
        offset, ones = self.made.first - 1, np.ones(self.tokens)
        onset = np.where(self.onset == self.made.steps, -1, self.onset + offset)
        clustered = np.zeros(self.shape)
        clustered[-1] = np.minimum(2, self.member.sum(axis=0)) // 2 * 2
        arrays = {
            "in_group": self.member,
            "last_early": self.early + offset * (self.early > 0),
            "last_midlife": self.midlife + offset * (self.midlife > 0),
            "freeze_onset": np.where(self.onset == 0, 0, onset),
            "thaw_count": ones,
            "weight_path": ones,
            "weight_displacement": ones / 2,
            "lattice_path": ones * 100,
            "lattice_displacement": ones * 50,
            "norm_at_start": ones,
            "norm_at_end": ones,
            "cluster": np.arange(self.tokens),
            "distinct_row_count": self.member.sum(axis=0) - clustered // 2,
            "cluster_count": clustered // 2,
            "clustered_token_count": clustered,
        }
        return self.label(arrays, variables.TOKENS, token=np.arange(self.tokens))

    def counterfactual(self, updates: xr.Dataset) -> xr.Dataset:
        names = list(self.made.remedies)
        usual = {"recorded": 0, "float32-moments": 0.34, "float32-master": 1, "kahan": 0.02}
        shares = [usual.get(name, 0.1) for name in names]
        distances = {"recorded": 9.5, "float32-master": 0, "kahan": 1.25}
        wanted, lost = updates.wanted_count.values, updates.lost_count.values
        moving = self.by_group(np.arange(1, self.made.steps + 1)[:, None] <= self.onset)
        shape = (len(names), *self.shape)
        landed = np.stack([wanted - lost + share * lost for share in shares])
        apart = np.array([distances.get(name, 6.0) for name in names])[:, None, None]
        free = np.broadcast_to(moving, shape).copy()
        free[[k for k, name in enumerate(names) if name == "kahan"]] = self.member.sum(axis=0)
        last = np.broadcast_to(self.onset, (len(names), self.tokens))
        arrays = {
            "landed_count": landed,
            "recovered_count": np.stack([share * lost for share in shares]),
            "free_landed_count": np.floor(landed),
            "free_distance": apart
            * (self.t / self.t[-1])[:, None]
            * np.sqrt(self.elements / self.elements[0]),  # fmt: skip
            "free_moving_tokens": free,
            "last_move": last,
        }
        coordinates = {"remedy": names, "token": np.arange(self.tokens)}
        return self.label(arrays, variables.COUNTERFACTUAL, **coordinates)
