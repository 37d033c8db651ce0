"""Frames: every message comes out as it went in, and nothing that is none gets through."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedkit.link import frames
from fedkit.link.frames import (
    CHUNK_BYTES,
    MAX_BUFFERS,
    MAX_FRAME_BYTES,
    MAX_MESSAGE_BYTES,
    Assembler,
    FrameError,
    Kind,
    Parcel,
    frame,
    message_frames,
    parse,
)

SMALL_CHUNK = 8
heads = st.dictionaries(
    st.text(max_size=8), st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text()
)
keys = st.text(max_size=300).filter(str.isprintable)
buffer_lists = st.lists(st.binary(max_size=3 * SMALL_CHUNK), max_size=6)
Messages = list[tuple[str, list[bytes] | None]]


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """Chunks of 8 bytes, so that borders are met often; the real size has a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "CHUNK_BYTES", SMALL_CHUNK)
        yield


def made_of(key: str, buffers: Sequence[bytes]) -> list[bytes]:
    """All frames of a message."""
    return list(message_frames(key, Parcel.of(buffers)))


def feed(assembler: Assembler, data: Iterable[bytes], *, keep: bool = True) -> Messages:
    """What a receiver makes of frames."""
    complete = []
    for one in data:
        kind, head, body = parse(one)
        begins = kind is Kind.MESSAGE
        done = assembler.begin(head, body, keep=keep) if begins else assembler.add(body)
        if done is not None:
            complete.append(done)
    return complete


def assemble(data: Iterable[bytes]) -> Messages:
    return feed(Assembler(), data)


def begun(head: dict[str, Any], body: bytes = b"") -> Any:
    """What a receiver makes of the first frame of a message."""
    return Assembler().begin(head, memoryview(body))


def sizes(data: Iterable[bytes]) -> list[int]:
    """The body sizes of frames."""
    return [len(parse(one)[2]) for one in data]


@given(st.sampled_from(Kind), heads, st.binary())
def test_a_frame_is_parsed_as_it_was_made(kind, head, body):
    assert parse(frame(kind, head, body)) == (kind, head, body)


@given(keys, buffer_lists)
def test_a_message_of_any_buffers_comes_out_whole(key, buffers):
    assert assemble(made_of(key, buffers)) == [(key, buffers)]


@pytest.mark.parametrize("chunks", [0, 1, 2, 3])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_sizes_around_chunk_borders_use_full_chunks_and_one_rest(chunks, offset):
    size = max(0, chunks * SMALL_CHUNK + offset)
    data = bytes(range(size))
    made = made_of("k", [data])
    full, rest = divmod(size, SMALL_CHUNK)
    assert sizes(made) == [SMALL_CHUNK] * full + ([rest] if rest or not full else [])
    assert assemble(made) == [("k", [data])]


@given(buffer_lists.filter(lambda buffers: sum(map(len, buffers)) <= SMALL_CHUNK))
def test_what_is_small_is_one_frame(buffers):
    assert len(made_of("k", buffers)) == 1


@pytest.mark.parametrize("size", [CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 3])
def test_real_chunks_stay_within_the_frame_limit(monkeypatch, size):
    monkeypatch.setattr(frames, "CHUNK_BYTES", CHUNK_BYTES)
    data = bytes(range(256)) * (size // 256 + 1)
    buffers = [data[:7], data[7:size], b""]
    made = made_of("k" * 200, buffers)
    assert max(map(len, made)) <= MAX_FRAME_BYTES
    assert assemble(made) == [("k" * 200, buffers)]


def test_as_many_buffers_as_are_taken_fit_into_a_frame():
    buffers = [b""] * MAX_BUFFERS
    made = made_of("k", buffers)
    assert max(map(len, made)) <= MAX_FRAME_BYTES
    assert assemble(made) == [("k", buffers)]


@given(st.lists(st.tuples(keys, buffer_lists), max_size=4))
def test_messages_follow_each_other_in_one_direction(messages):
    assembler = Assembler()
    data = [one for key, buffers in messages for one in made_of(key, buffers)]
    assert feed(assembler, data) == messages


def test_frames_are_made_one_at_a_time():
    made = message_frames("k", Parcel.of([bytes(100)]))
    assert iter(made) is made
    assert parse(next(made))[0] is Kind.MESSAGE


def test_a_parcel_holds_the_buffers_that_it_was_given():
    buffers = [b"one", b"", b"two"]
    parcel = Parcel.of(buffers)
    assert all(kept is given for kept, given in zip(parcel.buffers, buffers, strict=True))
    assert parcel.sums == tuple(map(zlib.crc32, buffers))
    assert parcel.size == 6


def test_another_head_sums_nothing_but_itself(monkeypatch):
    shared = Parcel.of([bytes(1000), b"abc"])
    summed: list[bytes] = []
    crc = zlib.crc32
    monkeypatch.setattr(frames.zlib, "crc32", lambda data: summed.append(data) or crc(data))
    parcel = shared.with_head(b"head")
    assert summed == [b"head"]
    assert parcel == Parcel.of([b"head", *shared.buffers])
    assert parcel.buffers[1] is shared.buffers[0]


# What is no message.


@given(st.binary())
def test_garbage_gives_only_frame_errors(data):
    with contextlib.suppress(FrameError):
        assemble([data])


@given(st.sampled_from(Kind), st.binary(), st.integers(0, 2**32 - 1))
def test_a_garbage_head_gives_only_frame_errors(kind, text, length):
    for announced in (len(text), length):
        with contextlib.suppress(FrameError):
            assemble([struct.pack(">BI", kind, announced) + text])


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
        begun(head)


@pytest.mark.parametrize(
    "changes",
    [
        {"key": 3},
        {"key": None},
        {"key": ["k"]},
        {"sizes": 3},
        {"sizes": None},
        {"sizes": "3"},
        {"sizes": {"0": 3}},
        {"sizes": [1.5]},
        {"sizes": ["3"]},
        {"sizes": [True]},
        {"sizes": [-1]},
        {"sizes": [-1, 4], "sums": [0, 0]},
        {"sizes": [float("nan")]},
        {"sizes": [[3]]},
        {"sums": 0},
        {"sums": [None]},
        {"sums": [-1]},
        {"sums": [1.0]},
    ],
    ids=repr,
)
def test_a_message_head_of_wrong_types_is_refused(changes):
    with pytest.raises(FrameError, match="without key, sizes and checksums"):
        begun({"key": "k", "sizes": [3], "sums": [0], **changes})


@pytest.mark.parametrize(
    ("sizes", "sums"),
    [([3], []), ([], [0]), ([0] * (MAX_BUFFERS + 1), [0] * (MAX_BUFFERS + 1)), ([3, 3], [0])],
    ids=["no sum", "no size", "too many", "fewer sums"],
)
def test_as_many_sums_as_buffers_and_not_too_many(sizes, sums):
    with pytest.raises(FrameError, match="buffers and"):
        begun({"key": "k", "sizes": sizes, "sums": sums})


@pytest.mark.parametrize(
    "sizes", [[MAX_MESSAGE_BYTES + 1], [10**100], [MAX_MESSAGE_BYTES, 1], [1 << 33] * 3], ids=str
)
def test_an_impossible_size_is_refused(sizes):
    with pytest.raises(FrameError, match="limit"):
        begun({"key": "k", "sizes": sizes, "sums": [0] * len(sizes)})


def test_the_limit_is_the_receivers():
    for size, limit in ((10, 10), (11, 10)):
        with contextlib.nullcontext() if size <= limit else pytest.raises(FrameError, match="10"):
            feed(Assembler(limit), made_of("k", [bytes(size // 2), bytes(size - size // 2)]))


CUT = {"key": "k", "sizes": [30], "sums": [zlib.crc32(bytes(30))]}
WHOLE = {"key": "k", "sizes": [3], "sums": [zlib.crc32(b"abc")]}
NASTY: dict[str, tuple[str, list[bytes]]] = {
    "a chunk alone": ("without a message", [frame(Kind.CHUNK, body=b"x")]),
    "an empty chunk": ("empty", [frame(Kind.MESSAGE, CUT), frame(Kind.CHUNK)]),
    "more than it said": ("longer", [frame(Kind.MESSAGE, WHOLE, b"abcd")]),
    "more in a chunk": ("longer", [frame(Kind.MESSAGE, WHOLE), frame(Kind.CHUNK, body=b"abcd")]),
    "more of no buffers": ("longer", [frame(Kind.MESSAGE, {**WHOLE, "sizes": [], "sums": []}, b"a")]),
    "another byte": ("checksum", [frame(Kind.MESSAGE, WHOLE, b"abd")]),
    "another sum": ("checksum", [frame(Kind.MESSAGE, {**WHOLE, "sums": [2**40]}, b"abc")]),
    "a sum of nothing": ("checksum", [frame(Kind.MESSAGE, {**WHOLE, "sizes": [0]})]),
    "sums of each other": (
        "checksum",
        [frame(Kind.MESSAGE, {"key": "k", "sizes": [1, 1],
                              "sums": [zlib.crc32(b"b"), zlib.crc32(b"a")]}, b"ab")],
    ),
    "sizes of each other": (
        "checksum",
        [frame(Kind.MESSAGE, {"key": "k", "sizes": [2, 1],
                              "sums": [zlib.crc32(b"a"), zlib.crc32(b"bc")]}, b"abc")],
    ),
    "begun twice": ("before", [frame(Kind.MESSAGE, CUT), frame(Kind.MESSAGE, CUT)]),
    "a chunk after the end": (
        "without a message", [frame(Kind.MESSAGE, WHOLE, b"abc"), frame(Kind.CHUNK, body=b"x")],
    ),
    "huge": ("limit", [frame(Kind.MESSAGE, {**CUT, "sizes": [1 << 60]})]),
}  # fmt: skip


@pytest.mark.parametrize(("words", "nasty"), NASTY.values(), ids=NASTY)
def test_nasty_frames_are_refused_for_what_they_are(words, nasty):
    with pytest.raises(FrameError, match=words):
        assemble(nasty)


def test_a_truncated_message_is_never_complete():
    made = made_of("k", [bytes(30), bytes(5)])
    for end in range(len(made)):
        assert assemble(made[:end]) == []


def test_a_message_that_begins_within_another_is_refused():
    first, second = (made_of(key, [bytes(30)]) for key in "ab")
    with pytest.raises(FrameError, match="before"):
        assemble([*first[:2], *second])


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_frame_that_comes_twice_is_refused(at):
    made = made_of("k", [bytes(range(30))])
    with pytest.raises(FrameError):
        assemble([*made[: at + 1], *made[at:]])


def test_swapped_chunks_are_refused():
    made = made_of("k", [bytes(range(24))])
    with pytest.raises(FrameError, match="checksum"):
        assemble([made[0], made[2], made[1]])


@pytest.mark.parametrize("lie", [-1, 1])
def test_a_lying_size_never_gives_the_message(lie):
    first, *rest = made_of("k", [bytes(20)])
    _, head, body = parse(first)
    head["sizes"][0] += lie
    with contextlib.suppress(FrameError):
        assert assemble([frame(Kind.MESSAGE, head, bytes(body)), *rest]) == []


@given(buffer_lists.filter(any), st.data())
def test_any_flipped_bit_is_noticed(buffers, draw):
    whole = b"".join(buffers)
    at = draw.draw(st.integers(0, len(whole) - 1))
    made, before = made_of("k", buffers), 0
    for number, one in enumerate(made):
        length = len(parse(one)[2])
        if at < before + length:
            changed = bytearray(one)
            changed[len(one) - length + at - before] ^= 1 << draw.draw(st.integers(0, 7))
            made[number] = bytes(changed)
            break
        before += length
    with pytest.raises(FrameError, match="checksum"):
        assemble(made)


# Any frames in any order.

numbers = st.integers(0, 20) | st.integers(0, 2**70)
some_frames = st.one_of(
    st.binary(max_size=30),
    st.builds(frame, st.sampled_from(Kind), heads, st.binary(max_size=20)),
    st.builds(lambda body: frame(Kind.CHUNK, body=body), st.binary(max_size=20)),
    st.builds(
        lambda sizes, sums, body: frame(
            Kind.MESSAGE, {"key": "k", "sizes": sizes, "sums": sums}, body
        ),
        st.lists(numbers, max_size=4),
        st.lists(numbers, max_size=4),
        st.binary(max_size=20),
    ),
    st.sampled_from([one for _, nasty in NASTY.values() for one in nasty]),
)


def held(assembler: Assembler) -> int:
    """Bytes of messages that it keeps."""
    return sum(map(len, assembler._parts)) + assembler._open.getbuffer().nbytes


@given(st.lists(st.tuples(some_frames, st.booleans()), max_size=12), st.sampled_from(["k", "x"]))
@example(
    [
        (frame(Kind.MESSAGE, {"key": "k", "sizes": [3], "sums": [891568578]}), True),
        (frame(Kind.CHUNK, body=b"abc"), False),
        (frame(Kind.MESSAGE, {"key": "k", "sizes": [3], "sums": [891568578]}, b"abc"), False),
    ],
    "k",
)
def test_no_frames_in_any_order_do_more_than_be_refused(data, dropped):
    """Nothing but ``FrameError``, and never more is held than came."""
    assembler, came, gone = Assembler(1 << 40), 0, False
    for one, drop in data:
        came += len(one)
        with contextlib.suppress(FrameError):
            for key, buffers in feed(assembler, [one]):
                # What was dropped while it was under way ends without buffers, and nothing else does.
                assert isinstance(key, str) and (buffers is None) == gone
                gone = False
        assert held(assembler) <= came
        if drop:
            gone = gone or assembler._key == dropped
            assembler.drop(dropped)
            assert dropped == "x" or not held(assembler) or assembler._key is None


@given(st.lists(st.sampled_from(range(8)), max_size=12), st.data())
def test_frames_of_real_messages_mixed_up_never_give_another_message(order, draw):
    """Lost, repeated, swapped and cut: what comes out is what went in, or nothing."""
    real = {"a": [b"0123456789", b"", b"abcdefghijk"], "b": [bytes(range(30))]}
    made = [one for key, buffers in real.items() for one in made_of(key, buffers)]
    assembler = Assembler()
    for number in order:
        one = made[number % len(made)]
        if draw.draw(st.booleans()):
            one = one[: draw.draw(st.integers(0, len(one)))]
        try:
            for key, buffers in feed(assembler, [one]):
                assert buffers == real[key]
        except FrameError:
            return  # the session ends here


def test_memory_grows_with_what_comes_not_with_what_was_announced():
    assembler = Assembler()
    head = {"key": "k", "sizes": [MAX_MESSAGE_BYTES - 5, 5], "sums": [0, 0]}
    tracemalloc.start()
    try:
        assert assembler.begin(head, memoryview(b"")) is None
        for _ in range(10):
            assert assembler.add(memoryview(bytes(1000))) is None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize("how", ["not kept", "dropped"])
def test_a_message_that_nobody_waits_for_is_counted_and_not_held(how):
    buffers = [bytes(range(30)), b"", bytes(range(50))]
    assembler = Assembler()
    first, *rest = made_of("k", buffers)
    assert feed(assembler, [first], keep=how == "dropped") == []
    for one in rest[:-1]:
        if how == "dropped":
            assembler.drop("k")
        assert feed(assembler, [one]) == []
        assert how == "dropped" or held(assembler) == 0
    assembler.drop("k")
    assert held(assembler) == 0
    assert feed(assembler, rest[-1:]) == [("k", None)]
    # The next one is held again, and counts.
    assert feed(assembler, made_of("k", buffers)) == [("k", buffers)]


def test_a_dropped_message_must_still_be_as_long_as_it_said():
    assembler = Assembler()
    made = made_of("k", [bytes(30)])
    feed(assembler, made[:2])
    assembler.drop("k")
    with pytest.raises(FrameError, match="longer"):
        feed(assembler, [*made[2:-1], frame(Kind.CHUNK, body=bytes(9))])


def test_dropping_another_message_changes_nothing():
    assembler = Assembler()
    made = made_of("k", [bytes(range(30))])
    feed(assembler, made[:2])
    assembler.drop("other")
    assert feed(assembler, made[2:]) == [("k", [bytes(range(30))])]
    assembler.drop("k")
    assert feed(assembler, made) == [("k", [bytes(range(30))])]


def test_heads_are_json_that_others_can_read():
    made = frame(Kind.HELLO, {"name": "Zoë"})
    kind, length = struct.unpack_from(">BI", made)
    assert kind == 1
    assert json.loads(made[5 : 5 + length]) == {"name": "Zoë"}
