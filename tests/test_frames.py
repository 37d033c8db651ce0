"""Frames: every message comes out as it went in, and nothing that is none gets through."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkit.link import frames
from fedkit.link.frames import (
    CHUNK_BYTES,
    MAX_FRAME_BYTES,
    MAX_MESSAGE_BYTES,
    Assembler,
    FrameError,
    Kind,
    frame,
    message_frames,
    parse,
)

SMALL_CHUNK = 8
heads = st.dictionaries(
    st.text(max_size=8), st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text()
)


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """Chunks of 8 bytes, so that borders are met often; the real size has a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "CHUNK_BYTES", SMALL_CHUNK)
        yield


def assemble(data: Iterable[bytes], assembler: Assembler | None = None) -> list[tuple[str, bytes]]:
    """What a receiver makes of frames."""
    assembler = assembler or Assembler()
    complete = []
    for one in data:
        kind, head, body = parse(one)
        done = assembler.begin(head) if kind is Kind.MESSAGE else assembler.add(body)
        if done is not None:
            complete.append((done[0], bytes(done[1])))
    return complete


def sizes(data: Iterable[bytes]) -> list[int]:
    """The body sizes of frames."""
    return [len(parse(one)[2]) for one in data]


@given(st.sampled_from(Kind), heads, st.binary())
def test_a_frame_is_parsed_as_it_was_made(kind, head, body):
    assert parse(frame(kind, head, body)) == (kind, head, body)


@given(st.text(), st.lists(st.binary(max_size=3 * SMALL_CHUNK), max_size=6))
def test_a_message_of_any_buffers_comes_out_whole(key, buffers):
    assert assemble(message_frames(key, buffers)) == [(key, b"".join(buffers))]


@pytest.mark.parametrize("chunks", [0, 1, 2, 3])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_sizes_around_chunk_borders_use_full_chunks_and_one_rest(chunks, offset):
    size = max(0, chunks * SMALL_CHUNK + offset)
    data = bytes(range(size))
    made = list(message_frames("k", [data]))
    full, rest = divmod(size, SMALL_CHUNK)
    assert sizes(made) == [0] + [SMALL_CHUNK] * full + ([rest] if rest else [])
    assert assemble(made) == [("k", data)]


@pytest.mark.parametrize("size", [CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 3])
def test_real_chunks_stay_within_the_frame_limit(monkeypatch, size):
    monkeypatch.setattr(frames, "CHUNK_BYTES", CHUNK_BYTES)
    data = bytes(size)
    made = list(message_frames("k" * 200, [data[:7], data[7:]]))
    assert max(map(len, made)) <= MAX_FRAME_BYTES
    assert assemble(made) == [("k" * 200, data)]


@given(st.lists(st.tuples(st.text(), st.lists(st.binary(max_size=20), max_size=3)), max_size=4))
def test_messages_follow_each_other_in_one_direction(messages):
    data = [one for key, buffers in messages for one in message_frames(key, buffers)]
    assert assemble(data) == [(key, b"".join(buffers)) for key, buffers in messages]


def test_buffers_may_be_bytearrays_and_views():
    buffers = [bytearray(b"abc"), memoryview(b"0123456789")]
    assert assemble(message_frames("k", buffers)) == [("k", b"abc0123456789")]


def test_frames_are_made_one_at_a_time():
    made = message_frames("k", [bytes(100)])
    assert iter(made) is made
    assert parse(next(made))[0] is Kind.MESSAGE


@given(st.binary())
def test_garbage_gives_only_frame_errors(data):
    with contextlib.suppress(FrameError):
        assemble([data])


@given(st.sampled_from(Kind), st.binary(), st.integers(0, 2**32 - 1))
def test_a_garbage_head_gives_only_frame_errors(kind, text, length):
    for announced in (len(text), length):
        try:
            _, head, _ = parse(struct.pack(">BI", kind, announced) + text)
            Assembler().begin(head)
        except FrameError:
            pass


@pytest.mark.parametrize(
    "text",
    [b"[1]", b"null", b"3", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000],
    ids=["list", "null", "number", "string", "cut", "no UTF-8", "deep", "huge number"],
)
def test_a_head_that_is_no_json_object_is_refused(text):
    with pytest.raises(FrameError, match="no fedkit frame"):
        parse(struct.pack(">BI", Kind.HELLO, len(text)) + text)


def test_an_unknown_kind_is_refused():
    with pytest.raises(FrameError):
        parse(struct.pack(">BI", 99, 0))


def test_a_head_cut_short_is_refused():
    whole = frame(Kind.HELLO, {"identity": "a"})
    for end in range(len(whole)):
        with pytest.raises(FrameError):
            parse(whole[:end])


@given(heads)
def test_a_message_head_of_other_fields_is_refused(head):
    with pytest.raises(FrameError):
        Assembler().begin(head)


@pytest.mark.parametrize(
    "changes",
    [{"key": 3}, {"key": None}, {"size": "3"}, {"size": 1.5}, {"crc": None}, {"size": None}],
)
def test_a_message_head_of_wrong_types_is_refused(changes):
    with pytest.raises(FrameError, match="without key"):
        Assembler().begin({"key": "k", "size": 3, "crc": 0, **changes})


@pytest.mark.parametrize("size", [-1, MAX_MESSAGE_BYTES + 1, 10**100])
def test_an_impossible_size_is_refused(size):
    with pytest.raises(FrameError, match="limit"):
        Assembler().begin({"key": "k", "size": size, "crc": 0})


def test_a_chunk_without_a_message_is_refused():
    with pytest.raises(FrameError, match="without a message"):
        assemble([frame(Kind.CHUNK, body=b"x")])


def test_a_chunk_after_the_end_is_refused():
    made = list(message_frames("k", [b"0123456789"]))
    with pytest.raises(FrameError):
        assemble([*made, made[-1]])


def test_a_truncated_message_is_never_complete():
    made = list(message_frames("k", [bytes(30)]))
    for end in range(len(made)):
        assert assemble(made[:end]) == []


def test_a_message_that_begins_within_another_is_refused():
    first, second = (list(message_frames(key, [bytes(30)])) for key in "ab")
    with pytest.raises(FrameError, match="before"):
        assemble([*first[:2], *second])


def test_a_duplicated_chunk_is_refused():
    made = list(message_frames("k", [bytes(range(30))]))
    with pytest.raises(FrameError):
        assemble([*made[:2], *made[1:]])


def test_swapped_chunks_are_refused():
    made = list(message_frames("k", [bytes(range(16))]))
    with pytest.raises(FrameError, match="checksum"):
        assemble([made[0], made[2], made[1]])


def test_an_empty_chunk_is_refused():
    with pytest.raises(FrameError):
        assemble([next(message_frames("k", [b"abc"])), frame(Kind.CHUNK)])


@pytest.mark.parametrize("lie", [-1, 1])
def test_a_lying_size_never_gives_the_message(lie):
    first, *rest = message_frames("k", [bytes(20)])
    head = parse(first)[1]
    head["size"] += lie
    with contextlib.suppress(FrameError):
        assert assemble([frame(Kind.MESSAGE, head), *rest]) == []


@given(st.binary(min_size=1, max_size=30), st.data())
def test_any_flipped_bit_is_noticed(data, draw):
    first, *rest = message_frames("k", [data])
    at = draw.draw(st.integers(0, len(data) - 1))
    bit = draw.draw(st.integers(0, 7))
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    chunks = list(message_frames("k", [bytes(changed)]))[1:]
    assert len(chunks) == len(rest)
    with pytest.raises(FrameError, match="checksum"):
        assemble([first, *chunks])


def test_an_empty_message_with_a_wrong_checksum_is_refused():
    with pytest.raises(FrameError, match="checksum"):
        Assembler().begin({"key": "k", "size": 0, "crc": 5})


def test_memory_grows_with_what_comes_not_with_what_was_announced():
    assembler = Assembler()
    tracemalloc.start()
    try:
        assembler.begin({"key": "k", "size": MAX_MESSAGE_BYTES, "crc": 0})
        for _ in range(10):
            assert assembler.add(memoryview(bytes(1000))) is None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def test_heads_are_json_that_others_can_read():
    made = frame(Kind.HELLO, {"name": "Zoë"})
    kind, length = struct.unpack_from(">BI", made)
    assert kind == 1
    assert json.loads(made[5 : 5 + length]) == {"name": "Zoë"}
