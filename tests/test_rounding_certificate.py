"""The rounding certificate as a whole; PyTorch and JAX are run for what they are."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import xarray as xr

import jaxaudit
from jaxaudit import results
from jaxaudit.floats import BFLOAT16, FLOAT32, decode
from jaxaudit.mkl_sqrt import root_of_probe
from jaxaudit.operations import Float32Operations, Float64Operations
from jaxaudit.rounding import certificate
from jaxaudit.rounding.checks import all_checks
from jaxaudit.rounding.modes import JAXAUDIT, JAXAUDIT32, JAXAUDIT64, MODES

torch = pytest.importorskip("torch")

from jaxaudit.recorders.pytorch import probe_sqrt  # noqa: E402  (needs torch)

OWN = [JAXAUDIT, JAXAUDIT32, JAXAUDIT64]


def differing(ds, mode, reference="ieee"):
    """Name the operations that differ, with counts."""
    counts = ds.differing_count.sum("input_class").sel(mode=mode, reference=reference)
    found = zip(ds.operation.values.tolist(), counts.values.tolist(), strict=True)
    return {name: count for name, count in found if count}


def not_ieee_in_pytorch():
    """Name the operations of PyTorch on this machine's CPU that are not IEEE 754's."""
    names = {"float64 to bfloat16"}
    if root_of_probe(str(probe_sqrt(torch.device("cpu"))["sha256"])) == "mkl-amd":
        names |= {"float32 sqrt", "float32 foreach sqrt", "float32 Adam: param"}
    return names


@pytest.mark.long
def test_a_quick_certificate_holds_for_every_operation():
    ds = jaxaudit.cross_check("cpu")
    assert ds.operation.values.tolist() == [check.name for check in all_checks("cpu")]
    for mode in OWN:
        assert differing(ds, mode) == {}
    for mode in (JAXAUDIT, JAXAUDIT64):
        assert differing(ds, mode, "pytorch") == differing(ds, "pytorch"), mode
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert set(differing(ds, "pytorch")) == not_ieee_in_pytorch()
    check_counts(ds)
    check_explanations(ds)


#: Operations some of whose exact results lie midway between two numbers; quotients do only where they are subnormal.
TIES = [
    "float32 to bfloat16", "float64 to float32", "float64 to bfloat16", "bfloat16 square",
    *(f"{fmt} {name}" for fmt in ("bfloat16", "float32") for name in ("add", "subtract", "multiply")),
    *(f"{fmt} {part}" for fmt in ("bfloat16", "float16") for part in ("lerp", "addcmul", "addcdiv", "add a multiple")),
]  # fmt: skip


def check_counts(ds):
    compared = ds.compared_count.sum("input_class")
    assert (
        compared.sel(reference="ieee", mode=[m for m in MODES if m != JAXAUDIT32]) > 60_000
    ).all()
    assert (compared.sel(reference="ieee", mode=JAXAUDIT32) > 20_000).all()
    assert (compared.sel(reference="pytorch", mode="pytorch") == 0).all()
    assert (ds.differing_count <= ds.compared_count).all()
    by_binade = ds.differing_by_binade.sum("binade")
    assert (by_binade == ds.differing_count.sum("input_class")).all()
    assert (
        ds.compared_by_binade.sum("binade") == compared.sel(reference="ieee", mode=JAXAUDIT)
    ).all()
    for name in ("normal", "subnormal", "infinity", "nan"):
        tried = ds.compared_count.sel(reference="ieee", mode=JAXAUDIT, input_class=name)
        assert (tried > 0).all(), tried.where(tried == 0, drop=True).operation.values
    ties = ds.compared_count.sel(reference="ieee", mode=JAXAUDIT, input_class="tie")
    for name in TIES:
        assert ties.sel(operation=name) > 5, name


def check_explanations(ds):
    differs = ds.differing_count.sum("input_class") > 0
    assert ((ds.cause != "") == differs).all()
    assert ((ds.remedy != "") == differs).all()
    unexplained = [str(c) for c in np.unique(ds.cause.values) if "not explained" in str(c)]
    assert unexplained == []


def test_a_first_difference_can_be_run_again():
    ds = jaxaudit.cross_check("cpu", operations=["float32 lerp"])
    told = ds.first_difference.sel(mode="jit", reference="ieee").isel(operation=0)
    for name in told.input_class.values[
        ds.differing_count.sel(mode="jit", reference="ieee")[0] > 0
    ]:
        fields = told.sel(input_class=name)
        m, g = (
            jax.numpy.asarray(
                decode(np.array([int(fields.sel(difference_field=f))], np.uint32), FLOAT32)
            )
            for f in ("operand_1", "operand_2")
        )
        again = np.asarray(jax.jit(lambda m, g: m + (1 - 0.9) * (g - m))(m, g)).view(np.uint32)[0]
        nan = np.isnan(again.view(np.float32))
        assert nan or again == int(fields.sel(difference_field="found"))
        assert again != int(fields.sel(difference_field="wanted"))


def without_rounding_to_odd(self, a, b, c):
    """A fused multiply-add that rounds twice."""
    return self._rounded(a * b + c)


#: A formulation with one rounding removed, or one too many: what to change, where it shows.
FAULTS = {
    "a sum that is not rounded to float32": (
        Float64Operations, "subtract", lambda self, a, b: a - b, "float32 lerp", JAXAUDIT64,
    ),
    "a quotient that is not rounded to float32": (
        Float64Operations, "divide", lambda self, a, b: a / b, "float32 addcdiv", JAXAUDIT64,
    ),
    "no rounding to bfloat16": (
        Float64Operations, "round_to", lambda self, value, fmt: value,
        "bfloat16 add a multiple in the scalar loop", JAXAUDIT64,
    ),
    "no rounding to bfloat16, in float32": (
        Float32Operations, "round_to", lambda self, value, fmt: value,
        "bfloat16 add a multiple in the scalar loop", JAXAUDIT32,
    ),
    "a product that the compiler may fuse": (
        Float32Operations, "multiply", lambda self, a, b: a * b,
        "bfloat16 Adam: exp_avg_sq", JAXAUDIT32,
    ),
    "a multiply-add of two roundings": (
        Float32Operations, "fma", lambda self, a, b, c: self.add(self.multiply(a, b), c),
        "float32 lerp", JAXAUDIT32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch, fresh_programs):
    operations, name, faulty, operation, mode = FAULTS[fault]
    monkeypatch.setattr(operations, name, faulty)
    ds = jaxaudit.cross_check("cpu", operations=[operation])
    assert list(differing(ds, mode)) == [operation]
    # Where the float32 formulation fails its trial, the audit takes the other one, which is right.
    assert bool(differing(ds, JAXAUDIT)) == (mode == JAXAUDIT64)


def test_a_fault_of_pytorch_is_found(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "lerp", lambda m, g, w: m + w * (g - m))
    ds = jaxaudit.cross_check("cpu", operations=["bfloat16 lerp"])
    assert differing(ds, "pytorch") and not differing(ds, JAXAUDIT)
    assert differing(ds, JAXAUDIT, "pytorch") == differing(ds, "pytorch")


OPERATIONS = ["bfloat16 sqrt", "bfloat16 multiply by a scalar", "float16 square"]


class Stopped(Exception):
    pass


def test_an_interrupted_check_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path = tmp_path / "unfinished.nc"
    whole = jaxaudit.cross_check("cpu", operations=OPERATIONS)
    began = []
    row = certificate._row

    def counted(check, *rest):
        began.append(check.name)
        if len(began) == 3:
            raise Stopped
        return row(check, *rest)

    monkeypatch.setattr(certificate, "_row", counted)
    with pytest.raises(Stopped):
        jaxaudit.cross_check("cpu", operations=OPERATIONS, unfinished=path)
    assert xr.load_dataset(path).sizes["operation"] == 2
    resumed = jaxaudit.cross_check("cpu", operations=OPERATIONS, unfinished=path)
    assert sorted(began) == sorted([*OPERATIONS, began[2]])
    assert "2 operations were done already" in resumed.attrs["notices"][0]
    xr.testing.assert_equal(whole, resumed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["unfinished.nc"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"jax_version": "0.0.1"}, "jax_version is '0.0.1' there and"),
        ({"extent": "full"}, "extent is 'full' there and 'quick' here"),
        ({"operations": "all"}, "operations is 'all' there and 'bfloat16 sqrt' here"),
        ({"device": ""}, "keeps 1 finished operation of another check: device is ''"),
    ],
)
def test_what_was_kept_under_other_circumstances_is_neither_taken_nor_lost(tmp_path, change, told):
    path = tmp_path / "unfinished.nc"
    jaxaudit.cross_check("cpu", operations=OPERATIONS[:1], unfinished=path)
    kept = xr.load_dataset(path)
    results.save(kept.assign_attrs(change), path, overwrite=True)
    before = path.read_bytes()
    with pytest.raises(certificate.UnfinishedError, match=told):
        jaxaudit.cross_check("cpu", operations=OPERATIONS[:1], unfinished=path)
    assert path.read_bytes() == before


def test_a_file_of_something_else_is_not_lost(tmp_path):
    path = tmp_path / "unfinished.nc"
    path.write_bytes(b"no NetCDF file")
    with pytest.raises(certificate.UnfinishedError, match="is not a file of finished operations"):
        jaxaudit.cross_check("cpu", operations=OPERATIONS[:1], unfinished=path)
    assert path.read_bytes() == b"no NetCDF file"
    xr.Dataset({"x": 1}).to_netcdf(path)
    with pytest.raises(certificate.UnfinishedError, match="is not a file of finished operations"):
        jaxaudit.cross_check("cpu", operations=OPERATIONS[:1], unfinished=path)


def test_an_interruption_comes_through(monkeypatch):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jaxaudit.cross_check("cpu", operations=["float32 add"], progress=stop)


def test_progress_rises_to_the_whole():
    told = []
    jaxaudit.cross_check(
        "cpu", operations=OPERATIONS, progress=lambda done, total: told.append((done, total))
    )
    assert [total for _, total in told] == [3 << 16] * len(told)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == 3 << 16


def test_results_are_the_same_on_any_number_of_threads(monkeypatch):
    one = ["float32 add"]
    first = jaxaudit.cross_check("cpu", operations=one)
    monkeypatch.setattr(certificate.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    xr.testing.assert_equal(first, jaxaudit.cross_check("cpu", operations=one))


def test_torch_threads_are_left_as_they_were():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        jaxaudit.cross_check("cpu", operations=OPERATIONS[:1])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_without_torch_ieee_alone_is_compared_with():
    program = """
import sys
sys.modules["torch"] = None
import jaxaudit
ds = jaxaudit.cross_check("cpu", operations=["bfloat16 sqrt"])
count = ds.compared_count.sum("input_class").isel(operation=0)
assert (count.sel(reference="pytorch") == 0).all() and count.sel(reference="ieee", mode="jit") == 65536
assert count.sel(reference="ieee", mode="pytorch") == 0
assert ds.attrs["torch_version"] == "" and "not installed" in ds.attrs["notices"][0]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="unknown operation 'bfloat17 sqrt'; there are float32 to"):
        jaxaudit.cross_check("cpu", operations=["bfloat17 sqrt"])


def test_the_dataset_is_labelled_and_can_be_stored(tmp_path):
    ds = jaxaudit.cross_check("cpu", operations=["bfloat16 sqrt", "float32 divide by a scalar"])
    assert set(ds.data_vars) == set(results.ROUNDING_VARIABLES)
    for name, field in results.ROUNDING_VARIABLES.items():
        assert ds[name].dims == field.dims, name
        assert ds[name].attrs["long_name"] == field.long_name
        assert ds[name].attrs["units"] == field.units
        if field.dtype != "str":
            assert ds[name].dtype == field.dtype
    for name in ("jax_version", "torch_version", "cpu_model", "cpu_flags", "xla_flags", "device"):
        assert name in ds.attrs
    results.save(ds, tmp_path / "rounding.nc")
    loaded = xr.load_dataset(tmp_path / "rounding.nc")
    xr.testing.assert_equal(loaded, ds)
    assert ds.coverage.values[0] == "all 65,536 patterns"
    assert BFLOAT16.name in str(ds.operand_formats.values[0])
