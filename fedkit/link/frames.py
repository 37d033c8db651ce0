"""Frames: what one gRPC message of a session holds.

A frame is a kind (1 byte), the length of a JSON head (4 bytes), the head, and a body. A Flower message
travels as one ``MESSAGE`` frame (its key, size and checksum) followed by ``CHUNK`` frames of at most
1 MiB, so that any size passes and neither side's gRPC limit is ever met.

    client -> server   HELLO, then MESSAGE + CHUNKs (replies), then LEAVE if it goes on purpose
    server -> client   WELCOME, then MESSAGE + CHUNKs (instructions), then BYE when the run is over
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any

PROTOCOL = 1
METHOD = "/fedkit.Link/Session"
CHUNK_BYTES = 1 << 20
MAX_HEAD_BYTES = 1 << 20
MAX_FRAME_BYTES = CHUNK_BYTES + MAX_HEAD_BYTES + 16
MAX_MESSAGE_BYTES = 1 << 34
_PREFIX = struct.Struct(">BI")


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1
    WELCOME = 2
    MESSAGE = 3
    CHUNK = 4
    LEAVE = 5
    BYE = 6


class FrameError(ValueError):
    """The other side sent something that is no part of a session."""


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


def message_frames(key: str, buffers: Sequence[bytes]) -> Iterator[bytes]:
    """A message, given as buffers, as frames made one at a time."""
    checksum = 0
    for buffer in buffers:
        checksum = zlib.crc32(buffer, checksum)
    size = sum(len(buffer) for buffer in buffers)
    yield frame(Kind.MESSAGE, {"key": key, "size": size, "crc": checksum})
    parts: list[memoryview] = []
    filled = 0
    for buffer in buffers:
        view = memoryview(buffer)
        while len(view):
            piece = view[: CHUNK_BYTES - filled]
            parts.append(piece)
            filled += len(piece)
            view = view[len(piece) :]
            if filled == CHUNK_BYTES:
                yield b"".join((_PREFIX.pack(Kind.CHUNK, 0), *parts))
                parts, filled = [], 0
    if filled:
        yield b"".join((_PREFIX.pack(Kind.CHUNK, 0), *parts))


class Assembler:
    """Puts the frames of one direction together again, one message at a time."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._keep = True
        self._size = 0
        self._came = 0
        self._checksum = 0
        self._sum = 0
        self._data = bytearray()

    def begin(self, head: dict[str, Any], *, keep: bool = True) -> tuple[str, bytearray] | None:
        """Take a MESSAGE frame; an empty message is complete at once.

        Without ``keep`` the message is counted and checked but not held: nobody waits for it.

        Raises:
            FrameError: a message is under way already, or the head says nonsense.
        """
        key, size, checksum = head.get("key"), head.get("size"), head.get("crc")
        if self._key is not None:
            raise FrameError("a message begins before the last one ended")
        if not (isinstance(key, str) and isinstance(size, int) and isinstance(checksum, int)):
            raise FrameError("a message begins without key, size and checksum")
        if not 0 <= size <= MAX_MESSAGE_BYTES:
            raise FrameError(f"a message of {size} bytes is beyond the limit")
        # Memory grows with what really comes, not with what was announced.
        self._key, self._size, self._checksum, self._data = key, size, checksum, bytearray()
        self._keep, self._came, self._sum = keep, 0, 0
        return self._finish() if size == 0 else None

    def add(self, body: memoryview) -> tuple[str, bytearray] | None:
        """Take a CHUNK frame; gives key and bytes when the message is complete.

        Raises:
            FrameError: nothing is under way, it is too long, or the checksum differs.
        """
        if self._key is None:
            raise FrameError("a chunk came without a message")
        if not len(body) or self._came + len(body) > self._size:
            raise FrameError("a message is longer than it said")
        self._came += len(body)
        self._sum = zlib.crc32(body, self._sum)
        if self._keep:
            self._data += body
        return self._finish() if self._came == self._size else None

    def _finish(self) -> tuple[str, bytearray]:
        key, data = self._key, self._data
        if self._sum != self._checksum:
            raise FrameError("a message's checksum is wrong")
        self._key, self._data = None, bytearray()
        assert key is not None
        return key, data
