"""Recordings and token groups: what is right is read to the bit, what is wrong is named."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recordings import (
    BIG,
    KINDS,
    SCALARS,
    Tensor,
    f32,
    f64,
    header_of,
    serialize,
    short_run,
    small_run,
    write,
    write_afresh,
)

from jaxaudit.floats import FORMATS
from jaxaudit.hyperparameters import double_of_float32
from jaxaudit.recording import (
    TENSOR_KEYS,
    Recording,
    TokenGroups,
    open_recording,
    open_token_groups,
    token_groups_of,
)
from jaxaudit.safetensors_file import FileError

FUZZ = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
HYPERPARAMETERS = {
    "learning_rate": 0.001,
    "beta1": 0.9,
    "beta2": 0.999,
    "epsilon": 1e-08,
    "weight_decay": 0.1,
}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.safetensors"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "run.safetensors"


def without(tensors: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def stated(**changes: Any) -> dict[str, str]:
    return {"hyperparameters": json.dumps(HYPERPARAMETERS | changes)}


def refusal(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    write(path, tensors, metadata)
    with pytest.raises(FileError) as caught:
        open_recording(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600
    return message


def values_of(recording: Recording) -> dict[str, float]:
    given = recording.hyperparameters
    assert given is not None and np.ptp(given.learning_rate) == 0
    assert given.learning_rate.shape == (recording.steps,)
    names = ("beta1", "beta2", "epsilon", "weight_decay")
    return {"learning_rate": given.learning_rate[0]} | {
        name: getattr(given, name) for name in names
    }


# --- shapes and formats ---


@pytest.mark.parametrize(
    "shape", [(2, 1), (5, 3), (3, 2, 4), (2, 3, 1, 2), (3, 2, 2, 1, 3)], ids=str
)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("moments", ["F32", "BF16"])
def test_parameters_of_any_rank(path, shape, dtype, moments):
    with open_recording(write(path, small_run(shape, dtype, moments))) as recording:
        assert recording.steps == shape[0] - 1
        assert recording.tokens == shape[1]
        assert recording.row_shape == shape[2:]
        assert recording.width == math.prod(shape[2:])
        assert recording.step_elements == math.prod(shape[1:])
        assert recording.storage is FORMATS[dtype] is recording.formats["grad"]
        assert recording.formats["exp_avg"] is FORMATS[moments] is recording.formats["exp_avg_sq"]
        sizes = 2 * FORMATS[dtype].bytes + 2 * FORMATS[moments].bytes
        assert recording.bytes == math.prod(shape) * sizes
        assert recording.losses is None


@pytest.mark.parametrize("missing", [["grad_W"], BIG[2:], BIG[1:], ["variance_W"], ["num_steps"]])
def test_what_a_recording_may_lack(path, missing):
    with open_recording(write(path, without(small_run(), *missing))) as recording:
        expected = {name for name, key in TENSOR_KEYS.items() if key in small_run()}
        expected -= {name for name, key in TENSOR_KEYS.items() if key in missing}
        assert set(recording.formats) == expected
        assert recording.hyperparameters is not None


def test_weights_alone_need_no_hyperparameters(path):
    with open_recording(write(path, {"W": small_run()["W"]})) as recording:
        assert recording.hyperparameters is None and recording.steps == 3


def test_optional_tensors(path):
    tensors = small_run()
    losses = f32([math.nan, 3.0, 2.0, math.inf])
    tensors |= {"max_variance_W": tensors["variance_W"], "losses": losses}
    tensors |= {"compensation_W": tensors["W"], "unrelated": ("I64", np.zeros((0, 3), "<i8"))}
    with open_recording(write(path, tensors)) as recording:
        assert "max_exp_avg_sq" in recording.formats
        assert recording.losses is not None
        np.testing.assert_array_equal(recording.losses, [3, 2, math.inf])


def test_the_sample(path):
    tensors, metadata = short_run()
    with open_recording(write(path, tensors, metadata)) as recording:
        assert (recording.steps, recording.tokens, recording.row_shape) == (12, 10, (64,))
        assert recording.first_step == 1 and recording.flag("amsgrad") is False
        assert recording.number("num_threads") == 2 and recording.number("absent") is None
        elements, size = recording.parameter_elements()
        rows = json.loads(metadata["rows"])
        assert size == 640_000
        np.testing.assert_array_equal(elements.reshape(10, 64)[:, 0], np.array(rows) * 64)


def test_missing_parameter(path):
    message = refusal(path, without(small_run(), "W"))
    assert (
        "no `W`" in message and "grad_W, momentum_W" in message and "(T+1, token, ...)" in message
    )
    assert "no tensor at all" in refusal(path, {})
    many = {f"layer\n{k}": ("U8", np.zeros(1, np.uint8)) for k in range(1000)}
    assert "layer?0" in refusal(path, many)


@pytest.mark.parametrize("shape", [(), (4,), (4, 0), (4, 0, 2), (4, 3, 0), (0, 0)], ids=str)
def test_parameter_of_a_shape_that_cannot_be(path, shape):
    tensors = {"W": ("BF16", np.zeros(shape, "<u2"))}
    assert f"`W` has shape {list(shape)}" in refusal(path, tensors)


@pytest.mark.parametrize("rows", [0, 1])
def test_no_step(path, rows):
    tensors = {
        key: (dtype, array[:rows]) for key, (dtype, array) in small_run().items() if array.ndim > 1
    }
    message = refusal(path, tensors)
    assert f"T = {rows - 1}" in message and "at least one step" in message


@pytest.mark.parametrize("key", [*BIG[1:], "max_variance_W"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3), (3, 3, 2), (4, 3, 2, 1), (24,)], ids=str)
def test_shapes_that_differ(path, key, shape):
    message = refusal(path, small_run() | {key: ("BF16", np.zeros(shape, "<u2"))})
    assert f"`{key}` has shape {list(shape)}" in message and "[4, 3, 2]" in message


@pytest.mark.parametrize("key", [*BIG, "max_variance_W"])
@pytest.mark.parametrize("dtype", ["F64", "U16", "I32", "BOOL", "U8"])
def test_unsupported_dtype(path, key, dtype):
    message = refusal(path, small_run() | {key: (dtype, np.zeros((4, 3, 2), KINDS[dtype]))})
    assert f"`{key}` has dtype {dtype}" in message and "BF16, F16, F32" in message


@pytest.mark.parametrize("steps", [2, 4, 0, -3, 3.5, math.nan, math.inf])
def test_num_steps_that_disagrees(path, steps):
    message = refusal(path, small_run() | {"num_steps": f64(steps)})
    assert f"`num_steps` says {steps:g}, but `W` holds 3 steps" in message


@pytest.mark.parametrize(
    "dtype", ["U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F32", "F64"]
)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_num_steps_of_any_number_type(path, dtype, shape):
    kind = {"F32": "<f4", "F64": "<f8"}.get(dtype, KINDS[dtype])
    tensors = small_run() | {"num_steps": (dtype, np.full(shape, 3, kind))}
    with open_recording(write(path, tensors)) as recording:
        assert recording.steps == 3


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("num_steps", f32([3, 3])),
        ("num_steps", f32([[3]])),
        ("num_steps", f32([])),
        ("num_steps", ("BOOL", np.ones(1, bool))),
        ("losses", f32([1, 2, 3])),
        ("losses", f32(1)),
        ("losses", ("BF16", np.zeros(4, "<u2"))),
        ("learning_rate", f32([0.1] * 3)),
        ("learning_rate", f32([[0.1]])),
        ("learning_rate", ("BF16", np.zeros(4, "<u2"))),
        ("adam_beta1", f32([0.9] * 4)),
        ("adam_epsilon", ("F16", np.zeros((), "<u2"))),
        ("weight_decay", f32([])),
    ],
    ids=str,
)
def test_small_tensors_that_do_not_fit(path, key, tensor):
    message = refusal(path, small_run() | {key: tensor})
    assert f"`{key}` has " in message and "needed" in message


# --- hyperparameters ---


@pytest.mark.parametrize("name", SCALARS)
def test_missing_hyperparameter(path, name):
    assert f"missing hyperparameters: {name}." in refusal(path, without(small_run(), name))


def test_every_hyperparameter_missing(path):
    message = refusal(path, without(small_run(), *SCALARS))
    assert f"missing hyperparameters: {', '.join(SCALARS[:1])}" in message
    assert all(name in message for name in SCALARS)


BAD_VALUES = {
    "learning_rate": [-1e-3, math.nan, math.inf],
    "weight_decay": [-0.1, math.nan, -math.inf],
    "adam_beta1": [1.0, 1.5, -0.1, math.nan],
    "adam_beta2": [1.0, 2.0, -1.0, math.inf],
    "adam_epsilon": [-1e-8, math.nan, math.inf],
}
BAD_PAIRS = [(name, value) for name, values in BAD_VALUES.items() for value in values]


@pytest.mark.parametrize("kind", [f32, f64])
@pytest.mark.parametrize(("name", "value"), BAD_PAIRS)
def test_absurd_scalars(path, kind, name, value):
    message = refusal(path, small_run() | {name: kind(value)})
    assert name.removeprefix("adam_") in message
    assert f"is {float(kind(value)[1]):g}; needed" in message


@pytest.mark.parametrize(("name", "value"), BAD_PAIRS)
def test_absurd_values_in_json(path, name, value):
    name = name.removeprefix("adam_")
    message = refusal(path, small_run(), stated(**{name: value}))
    assert f"{name} is {value:g}; needed" in message


@pytest.mark.parametrize(
    "value", [None, "0.1", True, {}, [], [0.1, 0.2], [None], "NaN"], ids=json.dumps
)
@pytest.mark.parametrize("name", ["weight_decay", "beta1", "epsilon"])
def test_json_values_that_are_no_numbers(path, name, value):
    message = refusal(path, small_run(), stated(**{name: value}))
    assert f"gives no usable number for {name}" in message


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "0.001", '"text"', "{", "[" * 9999, '{"lr": ' + "9" * 5000 + "}"]
)
def test_json_that_is_no_object(path, text):
    message = refusal(path, small_run(), {"hyperparameters": text})
    assert "`hyperparameters` is not a JSON object" in message


def test_json_numbers_beyond_double_precision(path):
    text = json.dumps(HYPERPARAMETERS)[:-1] + ', "epsilon": 1e400}'
    assert "epsilon is inf" in refusal(path, small_run(), {"hyperparameters": text})
    message = refusal(path, small_run(), stated(epsilon=10**400))
    assert "epsilon in the metadata `hyperparameters` is too large" in message


def test_json_wins_over_scalars(path):
    metadata = stated(learning_rate=0.25, epsilon=0.0, weight_decay=0)
    with open_recording(write(path, small_run(), metadata)) as recording:
        expected = HYPERPARAMETERS | {"learning_rate": 0.25, "epsilon": 0.0, "weight_decay": 0.0}
        assert values_of(recording) == expected
        assert recording.hyperparameters is not None
        assert set(recording.hyperparameters.origin.values()) == {"metadata `hyperparameters`"}


def test_json_fills_in_what_the_scalars_lack(path):
    tensors = without(small_run(), "adam_beta2") | {"adam_beta1": f64(0.8)}
    metadata = {"hyperparameters": json.dumps({"beta2": 0.98, "other": [None]})}
    with open_recording(write(path, tensors, metadata)) as recording:
        assert values_of(recording) == HYPERPARAMETERS | {"beta1": 0.8, "beta2": 0.98}
        assert recording.hyperparameters is not None
        origin = recording.hyperparameters.origin
        assert origin["beta2"] == "metadata `hyperparameters`" and origin["beta1"] == "`adam_beta1`"
        assert origin["epsilon"] == "`adam_epsilon` (float32; the shortest decimal)"
        assert recording.hyperparameters.as_json()["beta2"]["value"] == 0.98


@pytest.mark.parametrize(
    "spelled",
    [
        {"lr": 0.5, "betas": [0.7, 0.8], "eps": 1e-6, "weight_decay": 0},
        {"lr": 0.5, "beta1": 0.7, "beta2": 0.8, "epsilon": 1e-6, "weight_decay": 0},
        {"lr": 0.5, "adam_beta1": 0.7, "adam_beta2": 0.8, "adam_epsilon": 1e-6, "weight_decay": 0},
    ],
    ids=["torch", "ours", "the recording's keys"],
)
def test_spellings_in_json(path, spelled):
    metadata = {"hyperparameters": json.dumps(spelled)}
    with open_recording(write(path, without(small_run(), *SCALARS), metadata)) as recording:
        assert list(values_of(recording).values()) == [0.5, 0.7, 0.8, 1e-6, 0]


@settings(FUZZ, max_examples=500)
@given(st.integers(1, 999_999), st.integers(-14, 3))
def test_float32_turns_back_into_the_double_it_came_from(digits, exponent):
    """Every decimal of at most six significant digits survives the way through float32."""
    value = float(f"{digits}e{exponent - 6}")
    assert double_of_float32(np.float32(value)) == (value, True)


@pytest.mark.parametrize("value", [0.001, 3e-4, 0.9, 0.999, 0.95, 1e-8, 1e-15, 0.1, 0.0, 1.0, 6e-4])
def test_float32_scalars_become_doubles(path, value):
    assert double_of_float32(np.float32(value)) == (value, True)
    with open_recording(write(path, small_run() | {"adam_epsilon": f32(value)})) as recording:
        assert values_of(recording) == HYPERPARAMETERS | {"epsilon": value}


def test_float32_that_is_no_short_decimal_stays_as_stored(path):
    value = np.float32(1) / np.float32(3)
    assert double_of_float32(value) == (float(value), False)
    with open_recording(write(path, small_run() | {"learning_rate": f32([value])})) as recording:
        assert values_of(recording)["learning_rate"] == float(value)
        assert recording.hyperparameters is not None
        assert "float32 as stored" in recording.hyperparameters.origin["learning_rate"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_float32_that_is_not_finite(value):
    found, _ = double_of_float32(np.float32(value))
    np.testing.assert_equal(found, value)


def test_float64_scalars_are_taken_as_they_are(path):
    value = np.nextafter(0.001, 1)
    with open_recording(write(path, small_run() | {"learning_rate": f64(value)})) as recording:
        assert values_of(recording)["learning_rate"] == value


@pytest.mark.parametrize("first", [0.0, math.nan, -1.0])
def test_schedule(path, first):
    """Row t is step t's; row 0 is unused, whatever it holds."""
    rates = [first, 0.1, 0.002, 1 / 3]
    with open_recording(write(path, small_run() | {"learning_rate": f64(rates)})) as recording:
        assert recording.hyperparameters is not None
        assert recording.hyperparameters.learning_rate.tolist() == rates[1:]
        assert recording.hyperparameters.as_json()["learning_rate"]["value"] == rates[1:]
    with open_recording(write(path, small_run() | {"learning_rate": f32(rates)})) as recording:
        assert recording.hyperparameters is not None
        expected = [0.1, 0.002, float(np.float32(1 / 3))]
        assert recording.hyperparameters.learning_rate.tolist() == expected
        assert "of 4 values" in recording.hyperparameters.origin["learning_rate"]
    with open_recording(write(path, small_run(), stated(learning_rate=rates))) as recording:
        assert recording.hyperparameters is not None
        assert recording.hyperparameters.learning_rate.tolist() == rates[1:]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_schedule_of_the_wrong_length(path, count):
    message = refusal(path, small_run(), stated(learning_rate=[0.1] * count))
    assert f"learning_rate has {count} values, needed 1 or 4" in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-3])
def test_schedule_with_a_bad_value(path, value):
    for tensors, metadata in (
        (small_run() | {"learning_rate": f64([0, 0.1, value, 0.1])}, None),
        (small_run(), stated(learning_rate=[0, 0.1, value, 0.1])),
    ):
        assert f"learning_rate is {value:g}; needed" in refusal(path, tensors, metadata)


# --- claims of the metadata ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [("true", True), (" True ", True), ("1", True), ("false", False), ("0", False)]
    + [("", None), ("yes", None), ("null", None)],
)
def test_flags(path, text, expected):
    with open_recording(write(path, small_run(), {"amsgrad": text})) as recording:
        assert recording.flag("amsgrad") is expected
        assert recording.flag("maximize") is None


@pytest.mark.parametrize("text", ["", "-1", "0", "1.5", "x", "9" * 5000, "²", "1e3", "None"])
def test_numbers_that_make_no_sense_count_as_absent(path, text):
    metadata = {"num_threads": text, "first_step": text}
    with open_recording(write(path, small_run(), metadata)) as recording:
        assert recording.number("num_threads") is None and recording.first_step == 1


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        (None, None),
        ("[0, 1, 2]", None),
        ("[0, 1]", "[9, 2]"),
        ("[0, 1, 9]", "[9, 2]"),
        ("[0, 1, 2]", "[9, 3]"),
        ("[0, 1, -2]", "[9, 2]"),
        ("[0, 1, true]", "[9, 2]"),
        ("[0, 1, 2.0]", "[9, 2]"),
        (f"[0, 1, {10**30}]", f"[{10**40}, 2]"),
        ("{}", "[9, 2]"),
        ("[" * 9999, "x"),
        ("9" * 5000, "[9, 2]"),
    ],
)
def test_rows_that_make_no_sense_count_as_absent(path, rows, shape):
    claims = {"rows": rows, "parameter_shape": shape}
    metadata = {name: text for name, text in claims.items() if text is not None}
    with open_recording(write(path, small_run(), metadata)) as recording:
        elements, size = recording.parameter_elements()
    assert size == 6 and elements.tolist() == [0, 1, 2, 3, 4, 5]


def test_rows_of_a_larger_parameter(path):
    metadata = {"rows": "[4, 0, 8]", "parameter_shape": "[9, 2]"}
    with open_recording(write(path, small_run(), metadata)) as recording:
        elements, size = recording.parameter_elements()
    assert size == 18 and elements.tolist() == [8, 9, 0, 1, 16, 17]


# --- token groups ---


def mask(*values: int) -> Tensor:
    return "BOOL", np.asarray(values, bool)


def labels(*values: int, dtype: str = "I64") -> Tensor:
    return dtype, np.asarray(values, KINDS[dtype])


def groups_in(
    path: Path, tensors: Mapping[str, Tensor], names: Any = None
) -> tuple[TokenGroups, dict[str, list[int]]]:
    metadata = None if names is None else {"group_names": json.dumps(names)}
    groups = open_token_groups(write(path, tensors, metadata))
    assert groups.names == list(groups.members) and groups.names[0] == "all"
    assert groups.members["all"].tolist() == list(range(groups.tokens))
    for indices in groups.members.values():
        assert indices.dtype == np.int64 and (np.diff(indices) > 0).all()
    return groups, {name: m.tolist() for name, m in groups.members.items() if name != "all"}


def groups_refusal(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    write(path, tensors, metadata)
    with pytest.raises(FileError) as caught:
        open_token_groups(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("dtype", ["BOOL", "U8"])
def test_dead_mask(path, dtype):
    tensor = (dtype, np.asarray([1, 0, 0, 1], KINDS[dtype]))
    groups, members = groups_in(path, {"dead_mask": tensor})
    assert groups.tokens == 4 and members == {"dead": [0, 3], "live": [1, 2]}


def test_mask_of_bytes_other_than_1(path):
    _, members = groups_in(path, {"dead_mask": ("U8", np.asarray([0, 2, 255], np.uint8))})
    assert members == {"dead": [1, 2], "live": [0]}
    header, _ = header_of({"rare_mask": mask(1, 1, 1)})
    write_afresh(path, serialize(header, bytes([0, 2, 255])))
    assert open_token_groups(path).members["rare"].tolist() == [1, 2]


def test_masks_may_overlap(path):
    tensors = {"a_mask": mask(1, 1, 0), "b_mask": mask(0, 1, 1), "c d_mask": mask(1, 1, 1)}
    _, members = groups_in(path, tensors)
    assert members == {"a": [0, 1], "b": [1, 2], "c d": [0, 1, 2]}


def test_labels(path):
    _, members = groups_in(path, {"token_group": labels(2, 0, 2, -1)})
    assert members == {"group_-1": [3], "group_0": [1], "group_2": [0, 2]}


@pytest.mark.parametrize("dtype", ["U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"])
@pytest.mark.parametrize("names", [["x", "y", "z"], {"0": "x", "2": "z"}], ids=["list", "object"])
def test_named_labels(path, dtype, names):
    tensors = {"token_group": labels(2, 0, 5, 2, dtype=dtype), "dead_mask": mask(0, 0, 0, 1)}
    _, members = groups_in(path, tensors, names)
    expected = {"x": [1], "z": [0, 3], "group_5": [2], "dead": [3], "live": [0, 1, 2]}
    assert members == expected


def test_ten_thousand_labels_cost_little(path):
    random = np.random.default_rng(0)
    values = random.permutation(np.arange(60_000) % 10_000)
    start = time.monotonic()
    groups, _ = groups_in(path, {"token_group": labels(*values)})
    assert len(groups.members) == 10_001 and time.monotonic() - start < 20
    message = groups_refusal(path, {"token_group": labels(*range(10_001))})
    assert "10001 labels" in message


def test_one_name_for_the_same_tokens_twice(path):
    _, members = groups_in(path, {"live_mask": mask(0, 1), "dead_mask": mask(1, 0)})
    assert members == {"live": [1], "dead": [0]}
    _, members = groups_in(path, {"all_mask": mask(1, 1), "a_mask": mask(1, 0)})
    assert members == {"a": [0]}


@pytest.mark.parametrize(
    ("tensors", "names"),
    [
        ({"live_mask": mask(1, 1), "dead_mask": mask(1, 0)}, None),
        ({"all_mask": mask(1, 0)}, None),
        ({"token_group": labels(0, 1)}, ["x", "x"]),
        ({"token_group": labels(0, 1), "x_mask": mask(1, 1)}, ["x"]),
        ({"token_group": labels(0, 7)}, ["group_7"]),
    ],
)
def test_one_name_for_different_tokens(path, tensors, names):
    metadata = None if names is None else {"group_names": json.dumps(names)}
    assert "with different tokens are called" in groups_refusal(path, tensors, metadata)


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "\ud800", "\x1b[31m"], ids=ascii)
def test_names_that_cannot_be_shown(path, name):
    assert "cannot name a token group" in groups_refusal(path, {f"{name}_mask": mask(1, 0)})
    metadata = {"group_names": json.dumps([name])}
    assert "cannot name" in groups_refusal(path, {"token_group": labels(0, 1)}, metadata)


@pytest.mark.parametrize("dtype", ["F32", "I64", "BF16"])
def test_mask_of_the_wrong_dtype(path, dtype):
    message = groups_refusal(path, {"dead_mask": (dtype, np.zeros(3, KINDS[dtype]))})
    assert f"`dead_mask` is {dtype} of shape [3]" in message and "BOOL or U8" in message


@pytest.mark.parametrize("dtype", ["F32", "BOOL", "F64"])
def test_labels_of_the_wrong_dtype(path, dtype):
    message = groups_refusal(path, {"token_group": (dtype, np.zeros(3, KINDS[dtype]))})
    assert f"`token_group` is {dtype}" in message


@pytest.mark.parametrize("shape", [(), (1, 3), (3, 1)], ids=str)
def test_mask_of_the_wrong_rank(path, shape):
    message = groups_refusal(path, {"dead_mask": ("BOOL", np.ones(shape, bool))})
    assert f"shape {list(shape)}" in message and "one axis over tokens" in message


@pytest.mark.parametrize(
    ("tensors", "group"),
    [
        ({"dead_mask": mask(0, 0)}, "dead"),
        ({"dead_mask": mask(1, 1)}, "live"),
        ({"rare_mask": mask(0, 0), "dead_mask": mask(0, 1)}, "rare"),
    ],
)
def test_group_without_a_token(path, tensors, group):
    assert f"the token group '{group}' has no token" in groups_refusal(path, tensors)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"mask": mask(1, 0)},
        {"my_token_group": labels(1, 0)},
        {"dead_mask": mask()},
        {"token_group": labels()},
        {"a_mask": mask(1, 0), "b_mask": mask(1, 0, 1)},
        {"a_mask": mask(1, 0), "token_group": labels(1, 0, 1)},
    ],
    ids=lambda tensors: ", ".join(tensors) or "nothing",
)
def test_no_usable_group(path, tensors):
    assert "no usable token group" in groups_refusal(path, tensors)


@pytest.mark.parametrize("text", ["", "{", "3", '"x"', "null", "[1]", '{"0": null}', "[" * 9999])
def test_group_names_that_make_no_sense(path, text):
    message = groups_refusal(path, {"token_group": labels(0, 1)}, {"group_names": text})
    assert "`group_names`" in message


def test_groups_inside_the_recording(path):
    tensors = small_run() | {"dead_mask": mask(1, 0, 0)}
    with open_recording(write(path, tensors)) as recording:
        groups = token_groups_of(recording)
        assert groups.names == ["all", "dead", "live"]
        assert groups.members["live"].tolist() == [1, 2]


def test_recording_without_groups(path):
    tensors = small_run() | {"my_token_group": labels(1, 2), "mask": mask(1)}
    with open_recording(write(path, tensors)) as recording:
        groups = token_groups_of(recording)
        assert groups.tokens == 3 and groups.names == ["all"]


def test_bad_groups_inside_the_recording(path):
    with open_recording(write(path, small_run() | {"dead_mask": mask(0, 0, 0)})) as recording:
        with pytest.raises(FileError, match="has no token"):
            token_groups_of(recording)


# --- windows ---


def assert_windows(
    recording: Recording,
    tensors: Mapping[str, Tensor],
    steps: tuple[int, int],
    length: int,
    rows: int,
) -> None:
    """Compare every window with slices of the arrays that were written."""
    names = tuple(recording.formats)
    kept = []
    for window in recording.windows(steps, length, rows, names):
        copies = {name: array.copy() for name, array in window.tensors.items()}
        kept.append((window.range, window.rows, copies))
    expected = [
        ((first, min(first + length, steps[1])), (row, min(row + rows, recording.tokens)))
        for first in range(steps[0], steps[1], length)
        for row in range(0, recording.tokens, rows)
    ]
    assert [(steps, rows) for steps, rows, _ in kept] == expected
    for (first, last), (row, end), found in kept:
        assert set(found) == set(names)
        for name, array in found.items():
            start = first if name == "grad" else first - 1
            source = tensors[TENSOR_KEYS[name]][1].reshape(
                recording.steps + 1, recording.tokens, recording.width
            )
            part = source[start:last, row:end]
            assert array.shape == (length + (name != "grad"), end - row, recording.width)
            assert array.dtype == recording.formats[name].pattern_dtype
            np.testing.assert_array_equal(array[: len(part)], part)
            assert not array[len(part) :].any()


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3), (6, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_every_window_and_row_tiling(path, shape, dtype):
    tensors = small_run(shape, dtype)
    with open_recording(write(path, tensors)) as recording:
        for length in range(1, 8):
            for rows in range(1, shape[1] + 2):
                assert_windows(recording, tensors, (1, 6), length, rows)
        for first in range(1, 6):
            for last in range(first + 1, 7):
                assert_windows(recording, tensors, (first, last), 2, 2)


def test_windows_of_some_tensors(path):
    with open_recording(write(path, small_run())) as recording:
        (window,) = recording.windows((2, 4), 2, 3, ("grad",))
        assert set(window.tensors) == {"grad"} and window.steps == 2 and window.range == (2, 4)


def test_windows_that_are_larger_than_a_read(path):
    """Many windows, each of several pages, while the next one is being read."""
    tensors = small_run((40, 30, 700))
    with open_recording(write(path, tensors)) as recording:
        assert_windows(recording, tensors, (1, 40), 4, 30)
        assert_windows(recording, tensors, (3, 38), 5, 7)


def test_a_window_stays_as_it_is_until_the_next_is_asked_for(path):
    """The reader works ahead in other arrays than those that are being looked at."""
    tensors = small_run((9, 30, 700))
    with open_recording(write(path, tensors)) as recording:
        for window in recording.windows((1, 9), 1, 30, ("param",)):
            time.sleep(0.02)
            expected = tensors["W"][1][window.first - 1 : window.first + 1]
            np.testing.assert_array_equal(window.tensors["param"], expected)


def test_windows_given_up_halfway(path):
    with open_recording(write(path, small_run((30, 3, 2)))) as recording:
        windows = recording.windows((1, 30), 1, 3, ("param",))
        next(windows)
        windows.close()
        assert next(recording.windows((5, 30), 1, 3, ("param",))).first == 5


def test_file_that_shrinks_while_windows_are_read(path):
    tensors = small_run((30, 100, 50))
    with open_recording(write(path, tensors)) as recording:
        windows = recording.windows((1, 30), 4, 100, tuple(recording.formats))
        next(windows)
        with open(path, "r+b") as file:
            file.truncate(1_000_000)
        with pytest.raises(FileError, match="became shorter while it was read"):
            list(windows)


# --- fuzz ---


def opens(path: Path, content: bytes) -> bool:
    """Open a recording and its groups, and read all of it, or be told why not."""
    write_afresh(path, content)
    try:
        with open_recording(path) as recording:
            token_groups_of(recording)
            recording.parameter_elements()
            names = tuple(recording.formats)
            if recording.steps < 1000 and recording.tokens < 1000:
                span = (1, recording.steps + 1)
                count = sum(w.steps for w in recording.windows(span, 2, recording.tokens, names))
                assert count == recording.steps
            if recording.hyperparameters is not None:
                json.dumps(recording.hyperparameters.as_json(), allow_nan=False)
                assert np.isfinite(recording.hyperparameters.learning_rate).all()
    except FileError as error:
        message = str(error).replace(str(path), "")
        assert message.isprintable() and len(message) < 1000
        return False
    return True


RUN = small_run((3, 2, 2)) | {
    "losses": f32([0, 1, 2]),
    "dead_mask": mask(1, 0),
    "token_group": labels(0, 1, dtype="I8"),
}
CLAIMS = {
    "hyperparameters": json.dumps(HYPERPARAMETERS),
    "optimizer": "adamw",
    "amsgrad": "false",
    "num_threads": "2",
    "first_step": "1",
    "rows": "[1, 3]",
    "parameter_shape": "[5, 2]",
    "group_names": '["a", "b"]',
}
VALID = serialize(*header_of(RUN, CLAIMS))
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, 1, 10**400, -(10**30), 0.5]), st.booleans()
)
ODD_JSON = st.recursive(
    st.none() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
TEXTS = st.one_of(
    st.text(),
    ODD_JSON.map(json.dumps),
    st.lists(NUMBERS, max_size=4).map(json.dumps),
    st.sampled_from(["[" * 5000, "9" * 5000, "NaN", "1e999", "\ud800", "-1", "true"]),
)


@settings(FUZZ, max_examples=1000)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(max_size=3)), max_size=5))
def test_fuzz_bytes(scratch, edits):
    content = VALID
    for at, new in edits:
        content = content[:at] + new + content[at + len(new) :]
    assert opens(scratch, content) or edits


@settings(FUZZ, max_examples=700)
@given(st.dictionaries(st.sampled_from(list(CLAIMS)), TEXTS, min_size=1, max_size=3))
def test_fuzz_metadata(scratch, claims):
    opens(scratch, serialize(*header_of(RUN, CLAIMS | claims)))


@settings(FUZZ, max_examples=700)
@given(st.dictionaries(st.sampled_from(list(HYPERPARAMETERS)), ODD_JSON | NUMBERS, min_size=1))
def test_fuzz_stated_hyperparameters(scratch, changes):
    opens(scratch, serialize(*header_of(RUN, CLAIMS | stated(**changes))))


@settings(FUZZ, max_examples=700)
@given(st.data())
def test_fuzz_tensors(scratch, data):
    """Leave tensors out, and put others of any dtype, shape and content in their places."""
    names = st.sampled_from([*RUN, "max_variance_W", "x_mask", "\ud800_mask"])
    tensors = without(RUN, *data.draw(st.lists(names, max_size=2)))
    for name in data.draw(st.lists(names, max_size=2)):
        dtype = data.draw(st.sampled_from(list(KINDS)))
        shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=4)))
        random = np.random.default_rng(data.draw(st.integers(0, 9)))
        size = math.prod(shape) * np.dtype(KINDS[dtype]).itemsize
        raw = random.integers(0, 256, size, np.uint8)
        tensors[name] = dtype, raw.view(KINDS[dtype]).reshape(shape)
    opens(scratch, serialize(*header_of(tensors, data.draw(st.none() | st.just(CLAIMS)))))


@settings(FUZZ, max_examples=300)
@given(st.sampled_from(SCALARS), st.floats(width=32), st.sampled_from([f32, f64]))
def test_fuzz_scalars(scratch, name, value, kind):
    good = opens(scratch, serialize(*header_of(RUN | {name: kind(value)})))
    limit = 1 if "beta" in name else math.inf
    assert good == (0 <= value < limit)


def test_shortest_decimals_of_bfloat16_schedules(path):
    """A schedule that was itself computed in bfloat16 is exact in float32, and stays so."""
    rates = np.asarray([0, 0.1, 0.05, 0.025], ml_dtypes.bfloat16).astype(np.float32)
    with open_recording(write(path, small_run() | {"learning_rate": f32(rates)})) as recording:
        assert recording.hyperparameters is not None
        found = recording.hyperparameters.learning_rate.astype(np.float32)
    np.testing.assert_array_equal(found, rates[1:])
