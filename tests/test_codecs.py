"""Codecs: what comes back, what it costs, and what is refused."""

import io

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedkit.knowledge.codecs import pack, payload_bytes, unpack
from fedkit.registry import names

# The machine may be busy: no example is too slow.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

SHAPES = array_shapes(min_dims=2, max_dims=2, max_side=8)
HALF_MAX = float(np.finfo(np.float16).max)
CODECS = ["float16", "float32"]
BYTES = {"float32": 4, "float16": 2}


def matrices(largest):
    entries = st.floats(-largest, largest, width=32)
    return SHAPES.flatmap(lambda shape: arrays(np.float32, shape, elements=entries))


def there_and_back(codec, logits):
    return unpack(codec, pack(codec, logits), *logits.shape)


def record_of(values):
    return ArrayRecord({"values": Array(np.ascontiguousarray(values))})


def zipped(values):
    buffer = io.BytesIO()
    np.savez(buffer, values=values)
    return buffer.getvalue()


def test_these_are_all_codecs():
    assert names("codecs") == CODECS


@given(matrices(float(np.finfo(np.float32).max)))
def test_float32_is_exact(logits):
    np.testing.assert_array_equal(there_and_back("float32", logits), logits)


@given(matrices(HALF_MAX))
def test_float16_keeps_its_error_bound(logits):
    back = there_and_back("float16", logits).astype(np.float64)
    # 2^-11 of the value; below 2^-14, where half precision has no more digits to give, 2^-25.
    bound = np.maximum(2.0**-11 * np.abs(logits.astype(np.float64)), 2.0**-25)
    assert (np.abs(back - logits) <= bound).all()


@given(matrices(float(np.finfo(np.float32).max)))
def test_float16_clips_to_its_range(logits):
    back = there_and_back("float16", logits)
    assert (np.abs(back) <= HALF_MAX).all()
    beyond = np.abs(logits) > HALF_MAX
    np.testing.assert_array_equal(back[beyond], np.sign(logits[beyond]) * HALF_MAX)


@given(matrices(HALF_MAX), st.sampled_from(CODECS))
def test_a_second_trip_changes_nothing(logits, codec):
    once = there_and_back(codec, logits)
    np.testing.assert_array_equal(there_and_back(codec, once), once)


@pytest.mark.parametrize("codec", CODECS)
def test_logits_come_back_as_float32(codec):
    back = there_and_back(codec, np.ones((3, 2), np.float32))
    assert back.dtype == np.float32
    assert back.flags.writeable


@given(matrices(1.0), st.sampled_from(CODECS))
def test_costs_what_its_docstring_says(logits, codec):
    record = pack(codec, logits)
    payload = sum(array.numpy().nbytes for array in record.values())
    assert payload == payload_bytes(codec, *logits.shape) == BYTES[codec] * logits.size
    serialised = sum(len(array.data) for array in record.values())
    assert serialised == payload + 128


@pytest.mark.parametrize("codec", CODECS)
def test_slices_and_transposes_travel(codec):
    logits = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (logits[::2], logits[:, 1::2], logits.T):
        np.testing.assert_array_equal(there_and_back(codec, view), view)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(2, 3), (4, 2), (3, 3), (3,), (6,), (3, 2, 1), (), (0, 2)])
def test_another_shape_is_refused(codec, shape):
    dtype = np.dtype(codec)
    with pytest.raises(ValueError, match="shape") as refusal:
        unpack(codec, record_of(np.zeros(shape, dtype)), 3, 2)
    assert "(3, 2)" in str(refusal.value)


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [
        *[("float32", dtype) for dtype in ("float16", "float64", "int32", "bool", "complex64")],
        *[("float16", dtype) for dtype in ("float32", "float64", "int16", "bool", "complex64")],
    ],
)
def test_another_type_is_refused(codec, dtype):
    with pytest.raises(ValueError, match=dtype):
        unpack(codec, record_of(np.zeros((3, 2), dtype)), 3, 2)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(codec, value):
    logits = np.zeros((3, 2), np.dtype(codec))
    logits[1, 1] = value
    with pytest.raises(ValueError, match="not all finite"):
        unpack(codec, record_of(logits), 3, 2)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("record", [ArrayRecord(), ArrayRecord({"scores": Array(np.zeros(2))})])
def test_missing_values_are_refused(codec, record):
    with pytest.raises(ValueError, match=f"codec {codec}"):
        unpack(codec, record, 3, 2)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        pack("float32", np.zeros((3, 2), np.float32))["values"].data[:-1],
        b"\x80\x04not numpy",
        b"PK\x03\x04not a zip",
        zipped(np.zeros((3, 2), np.float32)),
    ],
    ids=["nothing", "head only", "cut short", "pickle", "broken zip", "zip"],
)
def test_bytes_that_are_no_array_are_refused(codec, data):
    record = ArrayRecord({"values": Array("float32", (3, 2), "numpy.ndarray", data)})
    with pytest.raises(ValueError, match=f"codec {codec}"):
        unpack(codec, record, 3, 2)


@pytest.mark.parametrize("codec", CODECS)
def test_another_serialisation_is_refused(codec):
    record = ArrayRecord({"values": Array("float32", (3, 2), "torch.tensor", b"")})
    with pytest.raises(ValueError, match=f"codec {codec}"):
        unpack(codec, record, 3, 2)
