"""Compare `float32-then-bfloat16` with the formulas of the old notebook, run in PyTorch at every timestep.

    python scripts/check_against_notebook.py
    python scripts/check_against_notebook.py results/run.safetensors --output results/run-check.json

The notebook computed m_hat = m / (1 - beta1^t), v_hat = v / (1 - beta2^t) and
W - (lr * m_hat) / (sqrt(v_hat) + eps) in float32, from left to right, and rounded the weight at the end.
PyTorch's float32 square root is off by one ulp in a fifth of all results on some CPUs (it is MKL's), so its
weights are made twice: with `torch.sqrt` and with NumPy's root, which is the CPU's own and correctly rounded.
The norms of the changes, by token group, must agree with those of the audit's dataset:

    notebook   the change in the recording's dtype, its norm in float32      within 1e-3
    exact      the same weights, differenced in float32, summed in float64   within 1e-9

The bounds hold for the correctly rounded root; what `torch.sqrt` gives is reported.

Exit status: 0 within the bounds; 1 not; 2 wrong usage, or an output that cannot be written; 3 input
missing, unreadable or unsuitable; 130 interrupted.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmark import files_of
from benchmark_jobs import Input
from benchmark_replays import adam_weight, notebook_figures
from numpy.typing import NDArray
from reporting import (
    Failure,
    add_files,
    check_output,
    facts_of,
    guarded,
    machine_facts,
    notify,
    write_json,
)

from jaxaudit.recording import Recording, TokenGroups, Window, open_recording

try:
    import torch
except ImportError:
    sys.exit('check_against_notebook.py: error: torch is missing; pip install "jaxaudit[torch]"')

ARITHMETIC = "float32-then-bfloat16"

#: Largest relative difference of a norm.
BOUNDS = {"notebook": 1e-3, "exact": 1e-9}

#: Bytes of a window, about; memory stays a few times that.
WINDOW_BYTES = 1 << 25

#: What the notebook called accounted for.
RATIO_BAND, LEAST_COSINE = (0.99, 1.01), 0.99

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def rounded_root(values: torch.Tensor) -> torch.Tensor:
    """Return the square root, correctly rounded (in float64, torch's is off by an ulp as well)."""
    return torch.from_numpy(np.sqrt(values.numpy()))


#: Square roots by name; the bounds hold for the first.
ROOTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ieee": rounded_root,
    "torch.sqrt": torch.sqrt,
}


@dataclasses.dataclass(frozen=True)
class Figures:
    """Figures of one root's replayed changes and of the recorded ones.

    Attributes:
        notebook: predicted and observed norm and cosine, as the notebook took them; (T, group, 3).
        exact: predicted and observed norm in float64; (T, group, 2).
        different: elements of each timestep whose replayed weight differs in bits from the library's.
    """

    notebook: NDArray[np.float64]
    exact: NDArray[np.float64]
    different: NDArray[np.int64]


class Library:
    """The library's own replayed weights, window by window."""

    def __init__(self, recording: Recording, length: int):
        import jax

        from jaxaudit import strips
        from jaxaudit.arithmetics import CATALOGUE, Options
        from jaxaudit.workbench import Candidate, Workbench

        strips.STRIP_ELEMENTS = recording.step_elements  # whole steps are compared
        whole = (1, recording.steps + 1)
        self._bench = Workbench(recording, (jax.devices("cpu")[0],), whole, length)
        given = recording.hyperparameters
        if given is None:
            raise Failure(f"{recording.path}: no hyperparameters; there is nothing to replay.", 3)
        self._candidate = Candidate(CATALOGUE[ARITHMETIC], Options(), given)

    def windows(self) -> Iterator[tuple[Window, NDArray[Any]]]:
        """Read each window and replay its weights, as patterns of shape (steps, tokens, width)."""
        import jax

        with jax.enable_x64(True), jax.default_device(self._bench.device):
            for window in self._bench.windows(self._bench.steps):
                arrays = self._bench.put(window)
                asked = (self._candidate, "param", window, arrays)
                _, formulation = self._bench.flags(*asked)
                weights = np.asarray(self._bench.results(*asked, formulation))
                shape = window.tensors["param"].shape[1:]
                yield window, weights[: window.steps].reshape(-1, *shape)


def replayed(recording: Recording, groups: TokenGroups) -> dict[str, Figures]:
    """Replay every step with each root, and measure the changes."""
    step_bytes = recording.bytes // (recording.steps + 1)
    library = Library(recording, min(recording.steps, max(1, WINDOW_BYTES // step_bytes)))
    members = [torch.from_numpy(rows) for rows in groups.members.values()]
    rows: dict[str, list[tuple]] = {name: [] for name in ROOTS}
    for window, weights in library.windows():
        for k in range(window.steps):
            for name, root in ROOTS.items():
                after = replayed_weight(recording, window, k, root)
                rows[name].append(measured(recording, window, k, after, weights[k], members))
        if window.first // 100 != (window.first + window.steps) // 100:
            notify(f"step {window.first + window.steps - 1} of {recording.steps}")
    return {
        name: Figures(*(np.array(column) for column in zip(*found, strict=True)))
        for name, found in rows.items()
    }


def replayed_weight(
    recording: Recording, window: Window, k: int, root: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Replay the window's step k as the notebook did."""
    assert recording.hyperparameters is not None  # see `check_suitable`
    return adam_weight(
        tensor(recording, window, "param", k),
        tensor(recording, window, "exp_avg", k + 1),
        tensor(recording, window, "exp_avg_sq", k + 1),
        recording.hyperparameters,
        window.first + k,
        root,
    )


def measured(
    recording: Recording,
    window: Window,
    k: int,
    after: torch.Tensor,
    library: NDArray[Any],
    members: Sequence[torch.Tensor],
) -> tuple[list[tuple[float, ...]], list[list[float]], int]:
    """Take the figures of one step (see `Figures`)."""
    before, recorded = (tensor(recording, window, "param", row) for row in (k, k + 1))
    changes = after - before, recorded - before
    notebook = [notebook_figures(*(change[rows] for change in changes)) for rows in members]
    squares = [(end.float() - before.float()).double().square().sum(1) for end in (after, recorded)]
    exact = [[by_row[rows].sum().sqrt().item() for by_row in squares] for rows in members]
    patterns = after.view(torch.int32 if library.itemsize == 4 else torch.int16).numpy()
    return notebook, exact, int(np.count_nonzero(patterns.view(library.dtype) != library))


def tensor(recording: Recording, window: Window, name: str, row: int) -> torch.Tensor:
    """View a row of a window as what it was recorded from."""
    dtype = TORCH_DTYPES[recording.formats[name].name]
    return torch.from_numpy(window.tensors[name][row]).view(dtype)


def compared(recording: Recording, groups: TokenGroups) -> dict[str, Any]:
    """Audit, replay, and gather everything that is reported."""
    from jaxaudit.auditing import audit

    dataset = audit(recording, groups, arithmetics=ARITHMETIC, backend="cpu")
    ours = np.stack(
        [dataset.norm_predicted.sel(arithmetic=ARITHMETIC).values, dataset.norm_observed.values], -1
    )
    figures = replayed(recording, groups)
    roots = {name: agreement(found, ours, groups.names) for name, found in figures.items()}
    within = [
        roots["ieee"][kind][norm]["max_relative_difference"] <= bound
        for kind, bound in BOUNDS.items()
        for norm in ("norm_predicted", "norm_observed")
    ]
    return {
        "recording": facts_of(recording),
        "machine": machine_facts() | {"torch_cpu_capability": torch.backends.cpu.get_cpu_capability()},
        "arithmetic": ARITHMETIC,
        "bounds": BOUNDS,
        "within_bounds": all(within),
        "roots": roots,
        "notebook_measure": {
            group: notebook_verdict(figures["torch.sqrt"].notebook[:, g])
            for g, group in enumerate(groups.names)
        },
    }  # fmt: skip


def agreement(found: Figures, ours: NDArray[np.float64], groups: Sequence[str]) -> dict[str, Any]:
    """Compare one root's norms with the dataset's, (T, group, 2)."""
    result: dict[str, Any] = {
        "different_elements": int(found.different.sum()),
        "different_timesteps": int(np.count_nonzero(found.different)),
    }
    for kind, norms in (("notebook", found.notebook[..., :2]), ("exact", found.exact)):
        largest = np.maximum(norms, ours)
        relative = np.abs(norms - ours) / np.where(largest > 0, largest, 1)
        result[kind] = {
            name: worst(relative[..., n], groups)
            for n, name in enumerate(("norm_predicted", "norm_observed"))
        }
    return result


def worst(relative: NDArray[np.float64], groups: Sequence[str]) -> dict[str, Any]:
    """Find the largest of (T, group)."""
    t, g = np.unravel_index(np.argmax(relative), relative.shape)
    return {
        "max_relative_difference": float(relative[t, g]),
        "timestep": int(t) + 1,
        "token_group": groups[int(g)],
    }


def notebook_verdict(figures: NDArray[np.float64]) -> dict[str, int]:
    """Count the timesteps that the notebook called accounted for, from (T, 3)."""
    predicted, observed, cosine = figures.astype(np.float32).T
    ratio = predicted / (observed + np.float32(1e-10))
    near = (ratio >= RATIO_BAND[0]) & (ratio <= RATIO_BAND[1])
    return {
        "timesteps": len(figures),
        "ratio_within_1_percent": int(near.sum()),
        "cosine_above_0.99": int((cosine > LEAST_COSINE).sum()),
        "both": int((near & (cosine > LEAST_COSINE)).sum()),
        "both_changes_zero": int(((predicted == 0) & (observed == 0)).sum()),
    }


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    add_files(p, Path("results/notebook-check.json"))
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and report; return the exit status."""
    return guarded(run, parser().parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Compare, write, print."""
    given = Input(*files_of(arguments))
    check_output(arguments)
    with open_recording(given.recording) as recording:
        check_suitable(recording)
        found = compared(recording, given.groups(recording))
    write_json(arguments.output, found)
    print(table(found))
    print(f"Written to {arguments.output}")
    return 0 if found["within_bounds"] else 1


def check_suitable(recording: Recording) -> None:
    """Refuse a recording that the notebook's formulas do not describe."""
    given, formats = recording.hyperparameters, recording.formats
    problems = {
        "lacks moments or hyperparameters": given is None
        or not {"exp_avg", "exp_avg_sq"} <= set(formats),
        "has weight decay": given is not None and given.weight_decay != 0,
        "was made with amsgrad": bool(recording.flag("amsgrad")),
        "does not start at step 1": recording.first_step != 1,
    }
    for problem, there in problems.items():
        if there:
            raise Failure(f"{recording.path} {problem}; the notebook's formulas need another.", 3)


def table(found: Mapping[str, Any]) -> str:
    """Lay the comparison out in columns."""
    recording, machine = found["recording"], found["machine"]
    lines = [
        f"{recording['name']}: {recording['steps']} steps, {recording['rows']} x "
        f"{recording['row_elements']}; torch {machine['packages']['torch']} "
        f"({machine['torch_cpu_capability']}), jax {machine['packages']['jax']}, {machine['cpu']}",
        "",
        f"{'largest relative difference':<30}{'bound':>9}" + "".join(f"{r:>13}" for r in ROOTS),
    ]
    for kind, bound in BOUNDS.items():
        for norm in ("norm_predicted", "norm_observed"):
            values = (found["roots"][root][kind][norm]["max_relative_difference"] for root in ROOTS)
            lines.append(
                f"{kind + ' ' + norm:<30}{bound:>9.0e}" + "".join(f"{v:>13.1e}" for v in values)
            )
    counts = (found["roots"][root]["different_elements"] for root in ROOTS)
    lines.append(f"{'elements that differ in bits':<39}" + "".join(f"{n:>13}" for n in counts))
    lines.append(f"{'within the bounds (ieee)':<39}{'yes' if found['within_bounds'] else 'NO':>13}")
    lines += ["", "as the notebook counted: timesteps"]
    lines += [
        f"  {group:<12}" + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in counts.items())
        for group, counts in found["notebook_measure"].items()
    ]
    return "\n".join(lines)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
