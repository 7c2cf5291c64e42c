"""The rounding certificate: every operation, run in every mode, held against IEEE 754 and PyTorch."""

import contextlib
import dataclasses
import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from jaxaudit import results
from jaxaudit.devices import Backend, Device, find_device
from jaxaudit.floats import Patterns
from jaxaudit.provenance import cpu_flags, cpu_name, provenance, version_of
from jaxaudit.rounding import causes, exact
from jaxaudit.rounding.checks import Check, Platform, all_checks
from jaxaudit.rounding.exact import INPUT_CLASSES
from jaxaudit.rounding.modes import (
    MODES,
    PYTORCH,
    REDUCED,
    Runner,
    formula_in_numpy,
    observed_format,
    platform_of,
)
from jaxaudit.rounding.operands import Operands
from jaxaudit.rounding.tally import (
    BINADES,
    DIFFERENCE_FIELDS,
    SAMPLED,
    SPREAD,
    Block,
    Tally,
    compare,
    joined,
)

IEEE = "ieee"

#: What every mode is compared with.
REFERENCES: dict[str, str] = {
    IEEE: "the stated formula, each of its operations rounded correctly by IEEE 754",
    PYTORCH: "PyTorch's kernels on the device",
}

#: Told after each block: elements done, and elements in all.
Progress = Callable[[int, int], None]

#: Blocks that are compared at the same time: each takes some 100 MB.
_MOST_WORKERS = 4

#: Sum over blocks of every comparison, by mode and reference.
Tallies = dict[tuple[str, str], Tally]


def cross_check(
    backend: Backend = "auto",
    *,
    full: bool = False,
    operations: Sequence[str] | None = None,
    progress: Progress | None = None,
    unfinished: str | os.PathLike[str] | None = None,
) -> xr.Dataset:
    """Run every operation in every mode and compare it, bit for bit, with IEEE 754 and with PyTorch.

    Args:
        backend: where JAX runs; PyTorch runs on the same kind of device, where it can.
        full: try all operands where that is possible (2^32 of them), and many more elsewhere.
        operations: names of those to check; by default all.
        progress: told how many operands are done, of how many.
        unfinished: file that keeps the operations that are done, after each. If it is there and was written by
            the same call with the same versions on the same machine, its operations are not run again. It is left
            in place.

    Returns:
        Dataset over (operation, mode, reference, input_class); see `results.ROUNDING_VARIABLES`.

    Raises:
        BackendError: the backend is absent.
        ValueError: an operation is unknown.
        UnfinishedError: `unfinished` keeps operations of another call, or is something else.
        OSError: `unfinished` cannot be written.
    """
    device = find_device(backend)
    checks = _chosen(all_checks(platform_of(device)), operations)
    torch, notices = _pytorch(device)
    attributes = _attributes(device, torch, full)
    attributes["operations"] = "all" if operations is None else ", ".join(c.name for c in checks)
    kept = _Kept(Path(unfinished) if unfinished is not None else None, attributes)
    rows = kept.load()
    if rows:
        notices.append(f"{len(rows)} operations were done already, in {kept.path}")
    counts = {c.name: _operands(c, full) for c in checks}
    meter = _Meter(progress, sum(o.count for o in counts.values()))
    meter.add(sum(counts[name].count for name in rows))
    with _one_torch_thread(torch):
        for check in checks:
            if check.name not in rows:
                rows[check.name] = _row(check, counts[check.name], device, torch, meter)
                kept.save(rows)
                gc.collect()  # compiled programs and what they compute refer to each other
    found = xr.concat(
        [rows[c.name] for c in checks], "operation", coords="minimal", compat="override"
    )
    return found.assign_attrs(attributes | {"notices": notices})


def _chosen(checks: list[Check], names: Sequence[str] | None) -> list[Check]:
    if names is None:
        return checks
    known = [check.name for check in checks]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown operation {name!r}; there are {', '.join(known)}.")
    return [check for check in checks if check.name in names]


def _operands(check: Check, full: bool) -> Operands:
    return check.full() if full else check.quick()


def _pytorch(device: Device) -> tuple[Any, list[str]]:
    """Return the module, or None and why not."""
    try:
        import torch
    except ImportError:
        return None, ["PyTorch is not installed: compared with IEEE 754 only"]
    if device.platform in ("gpu", "cuda") and not torch.cuda.is_available():
        return None, ["PyTorch has no CUDA here: compared with IEEE 754 only"]
    if device.platform not in ("cpu", "gpu", "cuda"):
        return None, [f"PyTorch does not run on {device.platform}: compared with IEEE 754 only"]
    return torch, []


@contextlib.contextmanager
def _one_torch_thread(torch: Any) -> Iterator[None]:
    """Let each block be one thread's: blocks run side by side, and chunks of threads have tails of their own."""
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.sqrt(torch.ones(64))  # MKL's first call in a process must not be one of many threads
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _attributes(device: Device, torch: Any, full: bool) -> dict[str, Any]:
    found = provenance(device) | {
        "title": "jaxaudit: rounding of PyTorch, JAX and jaxaudit, operation by operation",
        "extent": "full" if full else "quick",
        "numpy_version": np.__version__,
        "torch_version": str(torch.__version__) if torch is not None else "",
        "cpu_model": cpu_name(),
        "cpu_flags": cpu_flags(),
        "modes": json.dumps(MODES),
        "references": json.dumps(REFERENCES),
        "ml_dtypes_version": version_of("ml_dtypes") or "unknown",
    }
    if torch is not None and device.platform == "cpu":
        found["torch_cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    elif torch is not None:
        found["torch_device"] = torch.cuda.get_device_name()
    return found


class _Meter:
    """Adds up operands done."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress:
            self._progress(self._done, self._total)


class UnfinishedError(ValueError):
    """The file that is to keep finished operations holds something else, which is not to be lost."""


class _Kept:
    """The file of operations that are done."""

    _PASSING = ("created_at", "command")

    def __init__(self, path: Path | None, attributes: dict[str, Any]):
        self.path = path
        self._attributes = attributes

    def load(self) -> dict[str, xr.Dataset]:
        """Return the operations that were done under the same circumstances.

        Raises:
            UnfinishedError: they were done under others, or the file is something else.
        """
        if self.path is None or not self.path.is_file():
            return {}
        try:
            found = xr.load_dataset(self.path, engine="netcdf4")
            names = [str(name) for name in found.operation.values]
        except (OSError, ValueError, AttributeError) as error:
            raise UnfinishedError(
                f"{self.path} is not a file of finished operations. Remove it, or choose another name."
            ) from error
        for key, value in self._attributes.items():
            if key not in self._PASSING and found.attrs.get(key) != value:
                raise UnfinishedError(
                    f"{self.path} keeps {len(names)} finished {'operation' if len(names) == 1 else 'operations'} of "
                    f"another check: {key} is "
                    f"{str(found.attrs.get(key))[:60]!r} there and {str(value)[:60]!r} here. Finish that check, "
                    "remove the file to give it up, or choose another output."
                )
        return {
            name: found.isel(operation=[k]).drop_attrs(deep=False) for k, name in enumerate(names)
        }

    def save(self, rows: dict[str, xr.Dataset]) -> None:
        """Write all operations that are done; the file is replaced as a whole."""
        if self.path is None:
            return
        done = xr.concat(list(rows.values()), "operation", coords="minimal", compat="override")
        results.save(done.assign_attrs(self._attributes), self.path, overwrite=True)


def _row(check: Check, operands: Operands, device: Device, torch: Any, meter: _Meter) -> xr.Dataset:
    """Run one operation over all its operands, and label what was found."""
    runner = Runner(check, device, torch, check.quick().block(0))
    tallies, compared = _sweep(check, operands, runner, meter)
    return _labelled(check, operands, tallies, compared, platform_of(device))


def _sweep(
    check: Check, operands: Operands, runner: Runner, meter: _Meter
) -> tuple[Tallies, np.ndarray]:
    """Compare all blocks, several at a time; add up in the order of the blocks."""
    tallies: Tallies = {}
    compared = np.zeros(BINADES.size, np.int64)
    blocks = operands.blocks
    quota, stride = SAMPLED // min(blocks, SPREAD), max(1, blocks // SPREAD)

    def work(k: int) -> tuple[Tallies, np.ndarray]:
        return _compare_block(check, operands.block(k), runner, quota)

    for k, (found, binades) in enumerate(_in_order(work, blocks)):
        for key, tally in found.items():
            tallies.setdefault(key, Tally.empty()).add(tally, spread=k % stride == 0)
        compared += binades
        meter.add(operands.count // blocks)
    return tallies, compared


def _in_order(work: Callable[[int], Any], count: int) -> Iterator[Any]:
    """Yield the results of work(0), work(1), ..., some of which is done ahead on other threads.

    An interruption waits for what has been begun, which is one block per thread.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cores or 1, _MOST_WORKERS)
    begun: list[Future[Any]] = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            for k in range(count):
                begun.append(pool.submit(work, k))
                if len(begun) > 2 * workers:
                    yield begun.pop(0).result()
            while begun:
                yield begun.pop(0).result()
        finally:
            for future in begun:
                future.cancel()


def _compare_block(
    check: Check, operands: tuple[Patterns, ...], runner: Runner, quota: int
) -> tuple[Tallies, np.ndarray]:
    """Run one block in every mode and compare; return counts, and the number of elements in each binade."""
    found = runner(operands)
    block = _known(check, operands)
    references = {IEEE: block.wanted}
    if PYTORCH in found:
        references[PYTORCH] = found[PYTORCH].patterns
    tallies: Tallies = {}
    for mode, of_mode in found.items():
        for reference, wanted in references.items():
            if mode == reference:
                continue
            same = reference == PYTORCH and not tallies[PYTORCH, IEEE].differing.any()
            tallies[mode, reference] = (
                tallies[mode, IEEE]
                if same
                else compare(
                    block,
                    of_mode.patterns,
                    wanted,
                    check.result,
                    summed=observed_format(check, mode) if mode == REDUCED else None,
                    left_out=of_mode.left_out,
                    quota=quota,
                )
            )
    return tallies, block.binade_counts


def _known(check: Check, operands: tuple[Patterns, ...]) -> Block:
    """Compute the IEEE results of a block, and what class each element is of."""
    rounded = ieee(check, operands)
    classes = exact.class_of(operands, check.formats, rounded)
    return Block(
        operands, rounded.patterns, classes, exact.binade_of(rounded.patterns, check.result)
    )


def ieee(check: Check, operands: Sequence[Patterns]) -> exact.Rounded:
    """Compute what IEEE 754 asks for: single operations by `exact`, composed ones by NumPy's float32."""
    if not check.exact:
        value = formula_in_numpy(check, operands).astype(np.float64)
        return exact.rounded(value, check.result)
    values = [exact.decode64(p, fmt) for p, fmt in zip(operands, check.formats, strict=True)]
    value = exact.EXACT[check.exact](*values)
    if check.through is None:
        return exact.rounded(value, check.result)
    narrow = exact.rounded(value, check.through)
    wide = exact.decode64(narrow.patterns, check.through)
    return dataclasses.replace(narrow, patterns=exact.rounded(wide, check.result).patterns)


def _labelled(
    check: Check, operands: Operands, tallies: Tallies, compared: np.ndarray, platform: Platform
) -> xr.Dataset:
    """Put the counts of one operation into a dataset."""
    modes, references = list(MODES), list(REFERENCES)
    empty = Tally.empty()
    grid = [[tallies.get((mode, reference), empty) for reference in references] for mode in modes]

    def stacked(name: str) -> np.ndarray:
        return np.array([[[getattr(tally, name) for tally in row] for row in grid]])

    reasons = np.array(
        [[[_explained(check, m, r, tallies, platform) for r in references] for m in modes]], object
    )
    arrays = {
        "compared_count": stacked("compared"),
        "differing_count": stacked("differing"),
        "max_ulp_distance": stacked("farthest"),
        "first_difference": stacked("first"),
        "differing_by_binade": stacked("binades"),
        "compared_by_binade": compared[None],
        "cause": np.array(reasons[..., 0], str),
        "remedy": np.array(reasons[..., 1], str),
        "formula": [check.formula_text],
        "jax_expression": [check.jax_expression],
        "torch_expression": [check.torch_expression],
        "operand_formats": [", ".join(fmt.name for fmt in check.formats)],
        "result_format": [check.result.name],
        "coverage": [operands.coverage],
    }
    coordinates = {
        "operation": [check.name],
        "mode": modes,
        "reference": references,
        "input_class": list(INPUT_CLASSES),
        "binade": BINADES,
        "difference_field": list(DIFFERENCE_FIELDS),
    }
    return results.label(arrays, coordinates, {}, results.ROUNDING_VARIABLES)


def _explained(
    check: Check, mode: str, reference: str, tallies: Tallies, platform: Platform
) -> tuple[str, str]:
    """Say why a mode differs from a reference, and what to write instead."""
    tally = tallies.get((mode, reference))
    if tally is None or not tally.differing.any():
        return "", ""
    *operands, wanted, found = joined(tally.samples, SAMPLED)
    samples = causes.Samples(tuple(operands), wanted, found)
    explanation = causes.explain(check, mode, reference, platform, samples)
    return explanation.cause, explanation.remedy
