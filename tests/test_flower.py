"""Messages and records as bytes: nothing lost, nothing copied, nothing trusted."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedkit.flower import (
    decode_message,
    decode_records,
    encode_message,
    encode_records,
    error_reply,
    payload_bytes,
    set_message_id,
    take_identity,
    unavailable_reply,
)
from fedkit.knowledge.arrays import read_array

names = st.text(max_size=6)
arrays = st.sampled_from(["float32", "float64", "int64", "float16", "uint8"]).flatmap(
    lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_dims=3, min_side=0))
)
whole = st.integers(-(2**63), 2**63 - 1)
real = st.floats(width=64)
array_records = st.dictionaries(names, arrays.map(Array), max_size=3).map(
    lambda named: ArrayRecord(named)
)
metric_records = st.dictionaries(
    names, whole | real | st.lists(whole, min_size=1) | st.lists(real, min_size=1), max_size=4
).map(lambda values: MetricRecord(values))
config_records = st.dictionaries(
    names,
    whole
    | real
    | st.booleans()
    | st.text()
    | st.binary()
    | st.lists(st.text(), min_size=1)
    | st.lists(st.booleans(), min_size=1),
    max_size=4,
).map(lambda values: ConfigRecord(values))
record_dicts = st.dictionaries(names, array_records | metric_records | config_records, max_size=4)


@pytest.fixture(scope="module", autouse=True)
def identity():
    take_identity()


def instruction(content: RecordDict) -> Message:
    message = Message(content, 7, "train.digest", group_id="3")
    set_message_id(message, "federation/3/train.digest/7/1")
    return message


def described(records: RecordDict) -> list[tuple[str, type, object]]:
    """Records as something that compares, nan and order included."""
    return [
        (
            name,
            type(record),
            [
                (key, (v.dtype, tuple(v.shape), v.stype, v.data) if isinstance(v, Array) else _v(v))
                for key, v in record.items()
            ],
        )
        for name, record in records.items()
    ]


def _v(value: object) -> object:
    # repr tells -0.0, nan, True and 1 apart.
    return repr(list(value)) if isinstance(value, list | tuple) else repr(value)


@settings(deadline=None)
@given(record_dicts)
def test_records_come_back_equal(records):
    records = RecordDict(records)
    assert described(decode_records(b"".join(encode_records(records)))) == described(records)


@settings(deadline=None)
@given(record_dicts)
def test_a_message_comes_back_equal(records):
    message = instruction(RecordDict(records))
    back = decode_message(b"".join(encode_message(message)))
    assert described(back.content) == described(message.content)
    assert vars(back.metadata) == vars(message.metadata)


@settings(deadline=None)
@given(arrays)
def test_an_array_comes_back_with_type_shape_and_bits(values):
    records = RecordDict({"r": ArrayRecord({"a": Array(values)})})
    back = decode_records(b"".join(encode_records(records))).array_records["r"]["a"].numpy()
    assert (back.dtype, back.shape) == (values.dtype, values.shape)
    assert back.tobytes() == values.tobytes()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_decoded(kind):
    data = b"".join(encode_records(RecordDict({"m": MetricRecord({"a": 1})})))
    assert decode_records(kind(data)).metric_records["m"]["a"] == 1


def test_the_order_of_records_and_arrays_is_kept():
    content = RecordDict({"z": MetricRecord({"b": 1, "a": 2})})
    content["y"] = ArrayRecord({"second": Array(np.zeros(2)), "first": Array(np.ones(1))})
    content["a"] = ConfigRecord({"x": "1"})
    back = decode_records(b"".join(encode_records(content)))
    assert list(back) == ["z", "y", "a"]
    assert list(back["y"]) == ["second", "first"]


@pytest.mark.parametrize("reply", [error_reply, unavailable_reply])
def test_an_error_message_comes_back_with_its_reason(reply):
    message = reply(instruction(RecordDict()), "the disk is full: ü")
    back = decode_message(b"".join(encode_message(message)))
    assert back.has_error() and not back.has_content()
    assert (back.error.code, back.error.reason) == (message.error.code, "the disk is full: ü")
    assert back.metadata.reply_to_message_id == "federation/3/train.digest/7/1"


@pytest.mark.parametrize("encode", ["message", "records"])
def test_array_data_are_not_copied_by_encoding(encode):
    record = ArrayRecord({"a": Array(np.arange(1000.0)), "b": Array(np.array(3))})
    content = RecordDict({"r": record, "m": MetricRecord({"x": 1})})
    buffers = (
        encode_message(instruction(content)) if encode == "message" else encode_records(content)
    )
    assert any(buffer is record["a"].data for buffer in buffers)
    assert any(buffer is record["b"].data for buffer in buffers)
    assert len(buffers) == 3
    assert len(buffers[0]) < 1000


def test_encoding_leaves_the_message_as_it_was():
    content = RecordDict({"r": ArrayRecord({"a": Array(np.arange(5.0))})})
    message = instruction(content)
    before = described(content)
    encode_message(message)
    assert message.content is content
    assert described(message.content) == before


def test_a_record_sent_to_many_is_never_changed_by_what_they_decode():
    record = ArrayRecord({"a": Array(np.zeros(3))})
    buffers = encode_message(instruction(RecordDict({"r": record})))
    back = decode_message(b"".join(buffers)).content.array_records["r"]
    back["a"] = Array(np.ones(3))
    assert not record["a"].numpy().any()


@given(st.binary(max_size=200))
def test_garbage_gives_only_value_errors(data):
    for decode in (decode_message, decode_records):
        for start in (b"", b"\x00\x00\x00\x05\x00\x00\x00\x01"):
            with contextlib.suppress(ValueError):
                decode(start + data)


def sample() -> bytes:
    content = RecordDict({"r": ArrayRecord({"a": Array(np.zeros(3)), "b": Array(np.ones(2))})})
    content["m"] = MetricRecord({"x": 1, "y": [1.0, 2.0]})
    content["c"] = ConfigRecord({"s": "text", "b": b"\x00"})
    return b"".join(encode_message(instruction(content)))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_damaged_message_gives_a_message_or_a_value_error(draw):
    data = bytearray(sample())
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        decode_message(data)


def test_a_message_cut_anywhere_is_refused():
    data = sample()
    for end in range(len(data)):
        with pytest.raises(ValueError):
            decode_message(data[:end])


def test_bytes_after_a_message_are_refused():
    with pytest.raises(ValueError):
        decode_message(sample() + b"x")


def test_more_arrays_than_described_are_refused():
    with_arrays = encode_records(RecordDict({"r": ArrayRecord({"a": Array(np.zeros(3))})}))
    two = encode_records(
        RecordDict({"r": ArrayRecord({"a": Array(np.zeros(3)), "b": Array(np.zeros(3))})})
    )
    # The head of one array with the count and lengths of two.
    head = with_arrays[0][16:]
    frame = len(head).to_bytes(4, "big") + two[0][4:24] + head
    with pytest.raises(ValueError, match="arrays"):
        decode_records(frame + two[1] + two[2])


def test_payload_bytes_counts_the_tensors_alone():
    content = RecordDict(
        {
            "model": ArrayRecord(
                {"w": Array(np.zeros((3, 5), np.float32)), "n": Array(np.array(7))}
            ),
            "more": ArrayRecord(
                {"h": Array(np.zeros(4, np.float16)), "e": Array(np.zeros((0, 9)))}
            ),
            "metrics": MetricRecord({"x": 1.0}),
            "config": ConfigRecord({"text": "x" * 1000}),
        }
    )
    message = instruction(content)
    assert payload_bytes(message) == 60 + 8 + 8 + 0
    assert payload_bytes(decode_message(b"".join(encode_message(message)))) == 76


def test_payload_bytes_of_messages_without_tensors_is_zero():
    assert payload_bytes(instruction(RecordDict())) == 0
    assert payload_bytes(error_reply(instruction(RecordDict()), "no")) == 0


GOOD = Array(np.zeros(3, np.float32)).data


def huge_header() -> bytes:
    """A NumPy header that announces far more than follows."""
    file = io.BytesIO()
    description = {"descr": "<f4", "fortran_order": False, "shape": (10**14,)}
    np.lib.format.write_array_header_1_0(file, description)
    return file.getvalue()


@pytest.mark.parametrize(
    ("dtype", "shape", "stype", "data"),
    [
        ("nonsense", (3,), "numpy.ndarray", GOOD),
        ("float32", (-3,), "numpy.ndarray", GOOD),
        ("float32", (3,), "nonsense", GOOD),
        ("float32", (3,), "numpy.ndarray", b""),
        ("float32", (3,), "numpy.ndarray", b"nonsense"),
        ("float32", (3,), "numpy.ndarray", b"PK\x03\x04nonsense"),
        ("float32", (3,), "numpy.ndarray", b"\x80\x04nonsense"),
        ("float32", (3,), "numpy.ndarray", huge_header()),
        ("float32", (3,), "numpy.ndarray", GOOD[:-1]),
        ("float32", (4,), "numpy.ndarray", GOOD),
        ("float64", (3,), "numpy.ndarray", GOOD),
    ],
    ids=[
        "dtype",
        "shape",
        "stype",
        "empty",
        "text",
        "zip",
        "pickle",
        "huge",
        "short",
        "other-shape",
        "other-dtype",
    ],
)
def test_nothing_in_a_reply_can_end_the_run(dtype, shape, stype, data):
    """The server counts the bytes of every reply, whatever it holds, then reads it with care."""
    record = ArrayRecord({"a": Array(dtype, shape, stype, data)})
    sent = b"".join(encode_message(instruction(RecordDict({"r": record}))))
    try:
        back = decode_message(sent)
    except ValueError:
        return
    assert payload_bytes(back) >= 0
    with pytest.raises(ValueError):
        read_array("a", back.content.array_records["r"]["a"])
