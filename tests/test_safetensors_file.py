"""Safetensors files: what the format allows is read to the bit, anything else is refused in one line."""

import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recordings import KINDS, Tensor, header_of, serialize, write, write_afresh

from jaxaudit.safetensors_file import FileError, SafetensorsFile, aligned, prefetched

FUZZ = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "file.safetensors"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "file.safetensors"


def random_tensor(random: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Tensor:
    kind = np.dtype(KINDS[dtype])
    if kind == np.bool_:
        return dtype, random.integers(0, 2, shape).astype(bool)
    raw = random.integers(0, 256, (*shape, kind.itemsize), np.uint8)
    return dtype, raw.view(kind).reshape(shape)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refusal(path: Path, content: bytes | None = None) -> str:
    """Return what is said of a file that cannot be opened: one line that names it."""
    if content is not None:
        write_afresh(path, content)
    with pytest.raises(FileError) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 600
    return message


# --- valid files ---


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,), (3, 0, 2), (2, 3, 1, 2)], ids=str)
def test_every_dtype_is_read_to_the_bit(path, dtype, shape):
    tensor = random_tensor(np.random.default_rng(0), dtype, shape)
    write(path, {"before": ("U8", np.ones(3, np.uint8)), "x": tensor})
    with SafetensorsFile(path) as file:
        found = file.read("x")
        assert file.tensors["x"].bytes == tensor[1].nbytes
    assert found.shape == shape and found.dtype == np.dtype(KINDS[dtype])
    assert found.tobytes() == tensor[1].tobytes()


@settings(FUZZ, max_examples=300)
@given(st.data())
def test_agrees_with_the_safetensors_package(scratch, data):
    """Of every valid file, both read the same bits and the same metadata; odd padding included."""
    shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    names = data.draw(st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True))
    tensors = {
        name: random_tensor(random, data.draw(st.sampled_from(list(KINDS))), data.draw(shapes))
        for name in names
        if name != "__metadata__"
    }
    text = st.text(st.characters(exclude_categories=["Cs"]))
    metadata = data.draw(st.none() | st.dictionaries(text, text))
    content = serialize(*header_of(tensors, metadata), padding=data.draw(st.integers(0, 9)))
    write_afresh(scratch, content)
    expected = dict(safetensors.deserialize(content))
    with safetensors.safe_open(scratch, "np") as reference, SafetensorsFile(scratch) as file:
        assert dict(file.metadata) == (reference.metadata() or {})
        assert set(file.tensors) == set(expected) == set(tensors)
        for name, reference_entry in expected.items():
            assert file.tensors[name].shape == tuple(reference_entry["shape"])
            assert file.tensors[name].dtype == reference_entry["dtype"]
            assert file.read(name).tobytes() == bytes(reference_entry["data"])


def test_tensors_may_lie_in_another_order_than_the_header(path):
    header = {"b": entry(offsets=(8, 16)), "empty": entry(shape=(0,), offsets=(8, 8)), "a": entry()}
    path.write_bytes(serialize(header, np.arange(4, dtype="<u4").tobytes()))
    with SafetensorsFile(path) as file:
        assert file.read("a").tolist() == [0, 1] and file.read("b").tolist() == [2, 3]
        assert file.read("empty").shape == (0,)


@pytest.mark.parametrize("dtype", ["F32", "F64", "U8", "I8", "U16", "I32", "U64", "I64"])
def test_read_floats(path, dtype):
    kind = {"F32": "<f4", "F64": "<f8"}.get(dtype, KINDS[dtype])
    values = np.asarray([0, 1, 100], kind)
    write(path, {"x": (dtype, values)})
    with SafetensorsFile(path) as file:
        found = file.read_floats("x")
    assert found.dtype == np.float64 and found.tolist() == [0, 1, 100]


def test_booleans_that_are_neither_0_nor_1_count_as_true(path):
    path.write_bytes(serialize({"m": entry("BOOL", (4,), (0, 4))}, bytes([0, 1, 2, 255])))
    with SafetensorsFile(path) as file:
        mask = file.read("m")
    assert mask.view(np.uint8).tolist() == [0, 1, 1, 1]
    assert np.flatnonzero(mask).tolist() == [1, 2, 3] and np.flatnonzero(~mask).tolist() == [0]


def test_fingerprint_tells_files_apart(path):
    seen = set()
    for content in (b"\0" * 8, b"\0" * 7 + b"\1", b"\0" * 12):
        tensor = np.frombuffer(content, np.uint8)
        with SafetensorsFile(write(path, {"x": ("U8", tensor)})) as file:
            seen |= {file.fingerprint()}
        with SafetensorsFile(path) as file:
            assert file.fingerprint() in seen
    assert len(seen) == 3


# --- rows ---


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shape", [(5, 1), (5, 7), (6, 4, 3), (3, 2, 2, 5)], ids=str)
def test_read_rows(path, dtype, shape):
    """Every range of steps and of rows holds what NumPy's slice holds."""
    _, array = tensor = random_tensor(np.random.default_rng(1), dtype, shape)
    write(path, {"lead": ("U8", np.zeros(3, np.uint8)), "x": tensor})
    with SafetensorsFile(path) as file:
        for first in range(shape[0]):
            for last in range(first + 1, shape[0] + 1):
                for row in range(shape[1]):
                    for end in range(row + 1, shape[1] + 1):
                        expected = array[first:last, row:end]
                        out = aligned(expected.shape, expected.dtype)
                        file.read_rows("x", (first, last), (row, end), out)
                        np.testing.assert_array_equal(out, expected)


def test_read_rows_of_many_bytes(path):
    _, array = tensor = random_tensor(np.random.default_rng(2), "BF16", (9, 1000, 333))
    write(path, {"x": tensor})
    with SafetensorsFile(path) as file:
        whole = aligned(array[2:].shape, array.dtype)
        file.read_rows("x", (2, 9), (0, 1000), whole)
        np.testing.assert_array_equal(whole, array[2:])
        some = aligned(array[:, 7:500].shape, array.dtype)
        file.read_rows("x", (0, 9), (7, 500), some)
        np.testing.assert_array_equal(some, array[:, 7:500])


@pytest.mark.parametrize("rows", [(0, 50), (10, 30)], ids=["all rows", "some rows"])
def test_file_that_shrinks_after_opening(path, rows):
    write(path, {"x": random_tensor(np.random.default_rng(3), "BF16", (40, 50, 60))})
    with SafetensorsFile(path) as file:
        os.truncate(path, os.path.getsize(path) - 3000)
        out = np.zeros((10, rows[1] - rows[0], 60), np.uint16)
        file.read_rows("x", (0, 10), rows, out)  # this part is still there
        with pytest.raises(FileError, match="`x` ends at byte .* became shorter"):
            file.read_rows("x", (30, 40), rows, out)
        with pytest.raises(FileError, match="early"):
            file.read("x")


def test_read_error_names_the_file(path, monkeypatch):
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    write(path, {"x": ("U8", np.zeros(3, np.uint8))})
    with SafetensorsFile(path) as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", broken)
            with pytest.raises(FileError, match="`x` cannot be read at byte .*Input/output error"):
                file.read("x")
    monkeypatch.setattr(os, "pread", broken)
    assert "Input/output error" in refusal(path)


def test_closing_twice_and_reading_afterwards(path):
    write(path, {"x": ("U8", np.zeros(3, np.uint8))})
    file = SafetensorsFile(path)
    file.close()
    file.close()
    with pytest.raises(FileError, match="Bad file descriptor"):
        file.read("x")


def test_no_descriptor_is_left_open(path):
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    write(path, {"x": ("U8", np.zeros(3, np.uint8))})
    before = descriptors()
    for _ in range(20):
        with SafetensorsFile(path):
            pass
    path.write_bytes(b"not a recording")
    for _ in range(20):
        refusal(path)
    assert descriptors() == before


# --- what is no safetensors file ---


def test_missing_file(path):
    assert "No such file" in refusal(path)


def test_folder(tmp_path):
    assert "a folder" in refusal(tmp_path)


def test_file_within_a_file(path):
    path.write_bytes(b"x")
    assert "Not a directory" in refusal(path / "inner.safetensors")


def test_named_pipe_does_not_block(path):
    os.mkfifo(path)
    start = time.monotonic()
    assert "not a regular file" in refusal(path)
    assert time.monotonic() - start < 1


def test_device():
    assert "not a regular file" in refusal(Path("/dev/null"))


def test_names_that_no_file_can_have(tmp_path):
    assert "too long" in refusal(tmp_path / ("x" * 300))
    with pytest.raises(FileError, match="null"):
        SafetensorsFile("a\0b")


def test_link_in_a_circle(path):
    path.symlink_to(path)
    assert "cannot be opened" in refusal(path)


def test_link_to_a_file(tmp_path, path):
    write(tmp_path / "real", {"x": ("U8", np.ones(1, np.uint8))})
    path.symlink_to("real")
    with SafetensorsFile(path) as file:
        assert file.read("x").tolist() == [1]


def test_unreadable_file(tmp_path, path):
    write(path, {"x": ("U8", np.ones(1, np.uint8))})
    path.chmod(0)
    if os.geteuid() != 0:
        assert "Permission denied" in refusal(path)
        return
    program = (  # root may read everything: ask as somebody else, of modules loaded before
        "import os, sys\n"
        "from jaxaudit.safetensors_file import FileError, SafetensorsFile\n"
        "os.seteuid(65534)\n"
        "try: SafetensorsFile(sys.argv[1])\n"
        "except FileError as error: print(error)\n"
    )
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        if folder.stat().st_uid == 0 and folder.name.startswith(("pytest", "test_")):
            folder.chmod(0o755)
    told = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True
    )
    assert "Permission denied" in told.stdout and told.stderr == ""


@pytest.mark.parametrize("size", range(10))
def test_file_of_a_few_bytes(path, size):
    refusal(path, b"\1\2\3\4\5\6\7\10\11"[:size])


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_absurd_header_length(path, length):
    message = refusal(path, length.to_bytes(8, "little") + b"{}" * 50)
    assert f"header length {length}" in message


def test_every_truncation_is_noticed(path):
    tensors = {"x": ("F32", np.asarray([1, 2], "<f4")), "y": ("U8", np.ones(3, np.uint8))}
    content = serialize(*header_of(tensors, {"a": "b"}))
    start = 8 + int.from_bytes(content[:8], "little")
    for size in range(len(content)):
        message = refusal(path, content[:size])
        if 8 <= size < start:
            assert "truncated within the header" in message
        elif size >= start:
            assert "truncated" in message and "ends at byte" in message
    assert "but the header describes" in refusal(path, content + b"\0")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "JSON list"),
        (b"3 ", "JSON int"),
        (b'"a"', "JSON str"),
        (b"null", "JSON NoneType"),
        (b"{]", "not valid JSON"),
        (b'{"x"}', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b"{}\0\0", "not valid JSON"),
        (b'{"x": NaN}', "NaN is not JSON"),
        (b'{"x": -Infinity}', "-Infinity is not JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "not valid JSON"),
        (b'{"x": {"a": ' * 5000, "not valid JSON"),
        (b'{"x": {}, "x": {}}', "a key occurs twice"),
        (b'{"__metadata__": {"a": "1", "a": "2"}}', "a key occurs twice"),
        ({"__metadata__": []}, "map strings to strings"),
        ({"__metadata__": None}, "map strings to strings"),
        ({"__metadata__": "text"}, "map strings to strings"),
        ({"__metadata__": {"a": 1}}, "map strings to strings"),
        ({"__metadata__": {"a": {"b": "c"}}}, "map strings to strings"),
        ({"x": []}, "lacks dtype"),
        ({"x": None}, "lacks dtype"),
        ({"x": "F32"}, "lacks dtype"),
        ({"x": 5}, "lacks dtype"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "lacks dtype"),
        ({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, "lacks dtype"),
        ({"x": {"shape": [2], "data_offsets": [0, 8]}}, "lacks dtype"),
        ({"x": entry(offsets=[0])}, "lacks dtype"),
        ({"x": entry(offsets=[0, 8, 8])}, "lacks dtype"),
        ({"x": entry(offsets=8)}, "lacks dtype"),
        ({"x": entry(offsets="08")}, "no valid dtype"),
        ({"x": entry(offsets=[0, 8.0])}, "no valid dtype"),
        ({"x": entry(offsets=[False, 8])}, "no valid dtype"),
        ({"x": entry(offsets=[-8, 0])}, "no valid dtype"),
        ({"x": entry(offsets=[0, 1 << 70])}, "no valid dtype"),
        ({"x": entry(offsets=[None, 8])}, "no valid dtype"),
        ({"x": entry(shape=2)}, "no valid dtype"),
        ({"x": entry(shape="2")}, "no valid dtype"),
        ({"x": entry(shape={"2": 2})}, "no valid dtype"),
        ({"x": entry(shape=[-2])}, "no valid dtype"),
        ({"x": entry(shape=[2.0])}, "no valid dtype"),
        ({"x": entry(shape=[2, True])}, "no valid dtype"),
        ({"x": entry(shape=[2] + [1] * 40)}, "no valid dtype"),
        (b'{"x": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 8]}}', "no valid dtype"),
        ({"x": entry(dtype=None)}, "no valid dtype"),
        ({"x": entry(dtype=["F32"])}, "no valid dtype"),
        ({"x": entry(dtype="f32")}, "has dtype f32"),
        ({"x": entry(dtype="F8_E4M3")}, "has dtype F8_E4M3"),
        ({"x": entry(dtype="\n\x1b[31m" * 99)}, r"has dtype \?\?\[31m"),
        ({"x": entry(shape=[1 << 61, 1 << 61])}, "takes 8 bytes by its offsets"),
        ({"x": entry(shape=[(1 << 62) - 1] * 32)}, "takes 8 bytes by its offsets"),
        ({"x": entry(shape=[3])}, "needs 12"),
        ({"x": entry(offsets=[8, 0])}, "takes -8 bytes"),
        ({"x": entry(offsets=[0, 1 << 60])}, "takes 1152921504606846976 bytes"),
        ({"x": entry(shape=[2**40], offsets=[0, 2**42])}, "truncated; `x` ends at byte"),
        ({"x": entry(offsets=[8, 16])}, "truncated"),
        ({"x": entry(shape=[1], offsets=[4, 8])}, "overlap or leave a gap"),
        ({"x": entry(), "y": entry()}, "overlap or leave a gap"),
        ({"x": entry(), "y": entry(shape=[1], offsets=[4, 8])}, "overlap or leave a gap"),
        ({"x": entry(shape=[1], offsets=[0, 4])}, "the header describes"),
        ({}, "the header describes"),
        ({"\ud800\n": entry(shape=[3])}, r"`\?\?` takes"),
    ],
)
def test_header_that_is_wrong(path, header, message):
    assert re.search(message, refusal(path, serialize(header, b"\0" * 8)))


def test_large_nonsense_is_refused_soon_and_in_little_memory(path):
    """Neither the sizes that a header claims nor its nesting cost anything."""
    headers: list[Any] = [
        {"x": entry(shape=[1 << 50] * 30, offsets=[0, (1 << 62) - 1])},
        {"x": entry(shape=[0] + [1 << 61] * 31, offsets=[0, 0])},
        b"[" * 1_000_000,
        {"x": entry(shape=[1] * 100_000)},
        {str(k): entry(shape=[1 << 61], offsets=[k, k]) for k in range(5000)},
    ]
    for header in headers:
        path.write_bytes(serialize(header, b"\0" * 8))
        tracemalloc.start()
        start = time.monotonic()
        with pytest.raises(FileError):
            SafetensorsFile(path)
        assert time.monotonic() - start < 3
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
        tracemalloc.stop()


# --- fuzz: any bytes at all are either read or refused ---


def opens(path: Path, content: bytes) -> bool:
    write_afresh(path, content)
    try:
        file = SafetensorsFile(path)
    except FileError as error:
        assert "\n" not in str(error).replace(str(path), "") and len(str(error)) < 1000
        return False
    with file:
        for name, tensor in file.tensors.items():
            assert tensor.offset + tensor.bytes <= len(content)
            if tensor.bytes:
                assert file.read(name).nbytes == tensor.bytes
    return True


VALID = serialize(
    *header_of(
        {
            "W": ("BF16", np.arange(12, dtype="<u2").reshape(2, 3, 2)),
            "dead_mask": ("BOOL", np.asarray([1, 0, 1], bool)),
            "num_steps": ("F32", np.asarray(1, "<f4")),
            "empty": ("I64", np.zeros((0, 2), "<i8")),
        },
        {"optimizer": "adamw"},
    ),
    padding=3,
)
ODD_NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.integers(),
    st.sampled_from([1 << 31, 1 << 62, 1 << 64, 10**400, -1]),
    st.booleans(),
    st.floats(),
)
ODD_TEXT = st.one_of(
    st.sampled_from([*KINDS, "F8_E5M2", "", "__metadata__", "\ud800", "\0", "\n"]), st.text()
)
ODD_JSON = st.recursive(
    st.one_of(st.none(), ODD_NUMBERS, ODD_TEXT),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ODD_TEXT, inner, max_size=4),
    max_leaves=6,
)
SMALL = st.integers(0, 9)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(list(KINDS)) | ODD_JSON,
        "shape": st.lists(SMALL, max_size=4) | st.lists(ODD_NUMBERS, max_size=4) | ODD_JSON,
        "data_offsets": st.lists(SMALL, min_size=2, max_size=2)
        | st.lists(ODD_NUMBERS, min_size=1, max_size=3)
        | ODD_JSON,
        "extra": ODD_JSON,
    },
)


@settings(FUZZ, max_examples=1200)
@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(max_size=3), SMALL), max_size=5)
)
def test_fuzz_bytes(scratch, edits):
    """Splice anything in anywhere, for as many bytes as may be."""
    content = VALID
    for at, new, removed in edits:
        content = content[:at] + new + content[at + removed :]
    assert opens(scratch, content) or edits


@settings(FUZZ, max_examples=1000)
@given(st.dictionaries(ODD_TEXT, ENTRIES | ODD_JSON, max_size=4), st.integers(0, 40))
def test_fuzz_headers(scratch, header, size):
    """Headers of the right build, and of any other, over data of any length."""
    opens(scratch, serialize(header, b"\1" * size))


@settings(FUZZ, max_examples=1000)
@given(st.data())
def test_fuzz_values_of_a_valid_header(scratch, data):
    """Replace single values of a header that is otherwise right."""
    start = 8 + int.from_bytes(VALID[:8], "little")
    header = json.loads(VALID[8:start])
    name = data.draw(st.sampled_from(list(header)))
    place = data.draw(st.sampled_from([*header[name], None]))
    value = data.draw(ODD_JSON)
    if place is None:
        header[data.draw(st.just(name) | ODD_TEXT)] = value
    elif isinstance(header[name][place], list) and header[name][place]:
        header[name][place][data.draw(st.integers(0, len(header[name][place]) - 1))] = value
    else:
        header[name][place] = value
    opens(scratch, serialize(header, VALID[start:]))


@settings(FUZZ, max_examples=300)
@given(st.data())
def test_what_is_accepted_the_safetensors_package_accepts(scratch, data):
    """No file is read here that the format's own reader would refuse, zero-sized tensors aside."""
    bounds = sorted(data.draw(st.lists(SMALL, min_size=2, max_size=6)))
    spans = list(zip(bounds, bounds[1:], strict=False))
    header = {
        str(k): entry("U8", [end - begin], [begin, end])
        for k, (begin, end) in enumerate(spans)
        if end > begin and data.draw(st.booleans() | st.just(True))
    }
    content = serialize(header, b"\1" * data.draw(SMALL))
    try:
        safetensors.deserialize(content)
        valid = True
    except safetensors.SafetensorError:
        valid = False
    assert opens(scratch, content) == valid


# --- reading ahead ---


def test_prefetched_runs_one_job_ahead():
    running: list[int] = []

    def job(k: int) -> Any:
        return lambda: running.append(k) or k

    with prefetched([job(k) for k in range(5)]) as ready:
        first = next(ready)
        time.sleep(0.05)
        assert first == 0 and running == [0, 1]
        assert list(ready) == [1, 2, 3, 4]
    with prefetched([]) as ready:
        assert list(ready) == []


def test_prefetched_passes_exceptions_on():
    def broken() -> None:
        raise FileError("broken")

    with prefetched([lambda: 1, broken, lambda: 3]) as ready:
        assert next(ready) == 1
        with pytest.raises(FileError, match="broken"):
            next(ready)


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 0, 3), (1000, 7)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float64])
def test_aligned(shape, dtype):
    array = aligned(shape, np.dtype(dtype))
    assert array.shape == shape and array.dtype == dtype
    assert array.ctypes.data % 64 == 0 or not array.size
    assert array.flags.c_contiguous and array.flags.writeable
