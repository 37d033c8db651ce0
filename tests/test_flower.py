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
    as_file,
    decode_content,
    decode_envelope,
    decode_message,
    decode_records,
    encode_content,
    encode_envelope,
    encode_message,
    encode_records,
    error_reply,
    from_file,
    payload_bytes,
    set_message_id,
    take_identity,
    unavailable_reply,
)
from fedkit.flower_records import copied, record_in
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
    back = decode_message(encode_message(message))
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
    back = decode_message(encode_message(message))
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
    assert sum(map(len, buffers)) < 1000 + len(record["a"].data) + len(record["b"].data)


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
    back = decode_message(buffers).content.array_records["r"]
    back["a"] = Array(np.ones(3))
    assert not record["a"].numpy().any()


@settings(deadline=None)
@given(record_dicts)
def test_envelope_and_content_made_apart_are_the_message(records):
    """What a broadcast makes once for all, with what it makes for each, is what it would send to one."""
    message = instruction(RecordDict(records))
    description, *blobs = encode_content(message.content)
    assert encode_message(message) == [encode_envelope(message) + description, *blobs]


@settings(deadline=None)
@given(record_dicts)
def test_envelope_and_content_read_apart_are_the_message(records):
    message = instruction(RecordDict(records))
    content = decode_content(encode_content(message.content))
    back = decode_envelope(encode_envelope(message), content)
    assert described(back.content) == described(message.content)
    assert vars(back.metadata) == vars(message.metadata)


@settings(deadline=None)
@given(record_dicts)
def test_what_is_done_to_copied_records_is_not_seen_in_the_others(records):
    records = RecordDict(records)
    before = described(records)
    other = copied(records)
    assert described(other) == before
    for record in other.values():
        for value in record.values():
            if isinstance(value, Array):
                value.data, value.shape = b"", (9,)
            elif isinstance(value, list):
                value.clear()
        record.clear()
    other["new"] = MetricRecord({"x": 1})
    assert described(records) == before


@settings(deadline=None)
@given(record_dicts, names)
def test_a_record_is_found_by_name_and_kind_as_in_flowers_views(records, name):
    records = RecordDict(records)
    for kind, view in (
        (ArrayRecord, records.array_records),
        (ConfigRecord, records.config_records),
        (MetricRecord, records.metric_records),
    ):
        for one in (name, *records):
            assert record_in(records, one, kind) == view.get(one, kind())


def test_a_content_behind_two_envelopes_is_two_messages():
    content = RecordDict({"r": ArrayRecord({"a": Array(np.arange(3.0))})})
    description, *blobs = encode_content(content)
    for node_id in (2, 3):
        message = Message(content, node_id, "train", group_id="1")
        set_message_id(message, f"key of {node_id}")
        back = decode_message([encode_envelope(message) + description, *blobs])
        assert (back.metadata.dst_node_id, back.metadata.message_id) == (
            node_id,
            f"key of {node_id}",
        )
        assert back.content.array_records["r"]["a"].numpy().tolist() == [0, 1, 2]


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=5))
def test_buffers_come_back_from_a_file(buffers):
    assert from_file(b"".join(as_file(buffers))) == buffers


@given(st.binary(max_size=200))
def test_garbage_gives_only_value_errors(data):
    for start in (b"", b"\x00\x00\x00\x01", b"\xff\xff\xff\xff", b"\0\0\0\1" + b"\0" * 7 + b"\5"):
        with contextlib.suppress(ValueError):
            decode_records(start + data)
        with contextlib.suppress(ValueError):
            from_file(start + data)


@given(st.lists(st.binary(max_size=50), max_size=4))
def test_garbage_buffers_give_only_value_errors(buffers):
    with contextlib.suppress(ValueError):
        decode_message(buffers)


def test_a_message_of_no_buffers_is_refused():
    with pytest.raises(ValueError):
        decode_message([])


def sample() -> list[bytes]:
    content = RecordDict({"r": ArrayRecord({"a": Array(np.zeros(3)), "b": Array(np.ones(2))})})
    content["m"] = MetricRecord({"x": 1, "y": [1.0, 2.0]})
    content["c"] = ConfigRecord({"s": "text", "b": b"\x00"})
    return encode_message(instruction(content))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_damaged_message_gives_a_message_or_a_value_error(draw):
    buffers = [bytearray(buffer) for buffer in sample()]
    for _ in range(draw.draw(st.integers(1, 4))):
        damaged = buffers[draw.draw(st.integers(0, 2))]
        damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        decode_message([bytes(buffer) for buffer in buffers])


def test_a_file_cut_anywhere_is_refused():
    data = b"".join(as_file(sample()))
    for end in range(len(data)):
        with pytest.raises(ValueError):
            from_file(data[:end])


def test_bytes_after_the_end_of_a_file_are_refused():
    with pytest.raises(ValueError):
        from_file(b"".join(as_file(sample())) + b"x")


@pytest.mark.parametrize("lie", [0, 2**32 - 1, 2**62])
def test_a_file_that_lies_about_a_length_is_refused(lie):
    head, *blobs = as_file([b"abc", b"de"])
    lying = head[:4] + lie.to_bytes(8, "big") + head[12:]
    with pytest.raises(ValueError, match="lengths"):
        from_file(b"".join([lying, *blobs]))


def test_other_arrays_than_described_are_refused():
    for buffers, came in ((sample()[:-1], 1), ([*sample(), b"one more"], 3)):
        with pytest.raises(ValueError, match=f"2 arrays are described, {came} came"):
            decode_message(buffers)


def test_an_error_that_carries_arrays_is_refused():
    (description,) = encode_message(error_reply(instruction(RecordDict()), "no"))
    with pytest.raises(ValueError, match="carries arrays"):
        decode_message([description, b"x"])


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
    assert payload_bytes(decode_message(encode_message(message))) == 76


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
    sent = encode_message(instruction(RecordDict({"r": record})))
    try:
        back = decode_message(sent)
    except ValueError:
        return
    assert payload_bytes(back) >= 0
    with pytest.raises(ValueError):
        read_array("a", back.content.array_records["r"]["a"])


@pytest.mark.parametrize(
    "shape",
    [(1 << 30,) * 64, (2,) * 65, (1 << 30,), (3, 1 << 20)],
    ids=["vast", "deep", "long", "wide"],
)
def test_an_array_described_as_larger_than_its_bytes_is_refused(shape):
    """Its size would be counted, summed and written down before anybody looked into the bytes."""
    lying = Array("float32", shape, "numpy.ndarray", b"\x00\x00")
    sent = encode_message(instruction(RecordDict({"r": ArrayRecord({"a": lying})})))
    with pytest.raises(ValueError, match=r"larger than its 2 bytes|dimensions"):
        decode_message(sent)
