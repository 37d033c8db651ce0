"""Frames: what one gRPC message of a session holds.

A frame is a kind (1 byte), the length of a JSON head (4 bytes), the head, and a body. A Flower message
travels as a parcel: one ``MESSAGE`` frame (its key, and the size and checksum of each of its buffers)
that carries the first MiB, and as many ``CHUNK`` frames as the rest needs; so any size passes, and
neither side's gRPC limit is ever met.

    client -> server   HELLO, then parcels (replies), HERE when probed, LEAVE if it goes on purpose
    server -> client   WELCOME, then parcels (instructions), WITHDRAW for a reply that nobody waits for
                       any more, PROBE to learn whether it lives, BYE when the run is over
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from io import BytesIO
from typing import Any, TypeAlias

PROTOCOL = 2
METHOD = "/fedkit.Link/Session"
CHUNK_BYTES = 1 << 20
MAX_HEAD_BYTES = 1 << 20
MAX_FRAME_BYTES = CHUNK_BYTES + MAX_HEAD_BYTES + 16
MAX_MESSAGE_BYTES = 1 << 34
MAX_BUFFERS = 1 << 15
LONGEST_KEY = 300
_PREFIX = struct.Struct(">BI")
Complete: TypeAlias = tuple[str, list[bytes] | None]


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1
    WELCOME = 2
    MESSAGE = 3
    CHUNK = 4
    LEAVE = 5
    BYE = 6
    WITHDRAW = 7
    PROBE = 8
    HERE = 9


class FrameError(ValueError):
    """The other side sent something that is no part of a session."""


class Garbled(FrameError):
    """What came is not what was sent: sending it again will do."""


@dataclass(frozen=True)
class Parcel:
    """The buffers of one message, with a CRC-32 of each.

    What several messages share (the arrays of a broadcast) is summed once: ``with_head`` puts another
    first buffer in front.
    """

    buffers: tuple[bytes, ...]
    sums: tuple[int, ...]

    @classmethod
    def of(cls, buffers: Sequence[bytes]) -> Parcel:
        """A parcel of ``buffers``, which are not copied."""
        return cls(tuple(buffers), tuple(map(zlib.crc32, buffers)))

    def with_head(self, head: bytes) -> Parcel:
        """The same buffers behind one more."""
        return Parcel((head, *self.buffers), (zlib.crc32(head), *self.sums))

    @cached_property
    def size(self) -> int:
        """Bytes of all buffers."""
        return sum(map(len, self.buffers))


def frame(kind: Kind, head: dict[str, Any] | None = None, body: bytes = b"") -> bytes:
    """One frame."""
    text = json.dumps(head).encode() if head else b""
    return b"".join((_PREFIX.pack(kind, len(text)), text, body))


def parse(data: bytes) -> tuple[Kind, dict[str, Any], memoryview]:
    """The kind, head and body of a frame.

    Raises:
        FrameError: it is none.
    """
    try:
        number, length = _PREFIX.unpack_from(data)
        kind = Kind(number)
        if length > len(data) - _PREFIX.size:
            raise ValueError("its head is cut short")
        head = json.loads(data[_PREFIX.size : _PREFIX.size + length]) if length else {}
    except (struct.error, ValueError, RecursionError) as error:
        raise FrameError(f"this is no fedkit frame: {error}") from error
    if not isinstance(head, dict):
        raise FrameError("this is no fedkit frame: its head is no object")
    return kind, head, memoryview(data)[_PREFIX.size + length :]


def message_frames(key: str, parcel: Parcel) -> Iterator[bytes]:
    """A message as frames made one at a time."""
    head = {"key": key, "sizes": list(map(len, parcel.buffers)), "sums": parcel.sums}
    text = json.dumps(head).encode()
    parts: list[bytes | memoryview] = [_PREFIX.pack(Kind.MESSAGE, len(text)), text]
    room = CHUNK_BYTES
    for buffer in parcel.buffers:
        view = memoryview(buffer)
        while len(view):
            if not room:
                yield b"".join(parts)
                parts, room = [_PREFIX.pack(Kind.CHUNK, 0)], CHUNK_BYTES
            piece = view[:room]
            parts.append(piece)
            room -= len(piece)
            view = view[len(piece) :]
    yield b"".join(parts)


class Assembler:
    """Puts the parcels of one direction together again, one at a time."""

    def __init__(self, limit: int = MAX_MESSAGE_BYTES) -> None:
        """``limit``: the largest message that is taken, in bytes."""
        self._limit = limit
        self._key: str | None = None
        self._keep = True
        self._sizes: list[int] = []
        self._sums: list[int] = []
        self._parts: list[bytes] = []
        self._open = BytesIO()
        self._came = 0
        self._sum = 0

    def begin(
        self,
        head: dict[str, Any],
        body: memoryview,
        *,
        keep: bool = True,
        limit: int = MAX_MESSAGE_BYTES,
    ) -> Complete | None:
        """Take a MESSAGE frame; gives key and buffers if the message is complete with it.

        Without ``keep`` the message is counted but not held, since nobody waits for it: there are no
        buffers at its end. ``limit`` is the largest that this one may be.

        Raises:
            FrameError: a message is under way already, or the head says nonsense.
        """
        key, sizes, sums = head.get("key"), head.get("sizes"), head.get("sums")
        if self._key is not None:
            raise FrameError("a message begins before the last one ended")
        if not (_is_key(key) and _numbers(sizes) and _numbers(sums)):
            raise FrameError("a message begins without key, sizes and checksums")
        assert isinstance(key, str)
        assert isinstance(sizes, list) and isinstance(sums, list)
        if len(sizes) != len(sums) or len(sizes) > MAX_BUFFERS:
            raise FrameError(f"a message has {len(sizes)} buffers and {len(sums)} checksums")
        limit = min(limit, self._limit)
        if sum(sizes) > limit:
            raise FrameError(f"a message of {sum(sizes)} bytes is beyond the limit {limit}")
        # Memory grows with what really comes, not with what was announced.
        self._key, self._sizes, self._sums, self._keep = key, sizes, sums, keep
        self._parts, self._open, self._came, self._sum = [], BytesIO(), 0, 0
        return self._take(body)

    def add(self, body: memoryview) -> Complete | None:
        """Take a CHUNK frame; gives key and buffers when the message is complete.

        Raises:
            FrameError: nothing is under way, it is too long, or a checksum differs.
        """
        if self._key is None:
            raise FrameError("a chunk came without a message")
        if not len(body):
            raise FrameError("a chunk is empty")
        return self._take(body)

    def drop(self, key: str) -> None:
        """Hold no more of the message with that key, if it is under way: nobody waits for it now."""
        if self._key == key:
            self._keep = False
            self._parts = [b""] * len(self._parts)
            self._open = BytesIO()

    def _take(self, body: memoryview) -> Complete | None:
        while len(self._parts) < len(self._sizes):
            size = self._sizes[len(self._parts)]
            piece = body[: size - self._came]
            if not len(piece) and size:
                return None
            body = body[len(piece) :]
            self._came += len(piece)
            if self._keep:
                self._sum = zlib.crc32(piece, self._sum)
                self._open.write(piece)
            if self._came == size:
                self._end_buffer()
        if len(body):
            raise FrameError("a message is longer than it said")
        key, parts = self._key, self._parts
        assert key is not None
        self._key, self._parts = None, []
        return key, parts if self._keep else None

    def _end_buffer(self) -> None:
        if self._keep and self._sum != self._sums[len(self._parts)]:
            raise Garbled("a message's checksum is wrong")
        # BytesIO gives what it holds without copying it.
        self._parts.append(self._open.getvalue())
        self._open, self._came, self._sum = BytesIO(), 0, 0


def _is_key(key: Any) -> bool:
    # It ends up in logs.
    return isinstance(key, str) and key.isprintable() and len(key) <= LONGEST_KEY


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
