"""Contents of messages as the link carries them: encoded and summed once for all who get the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict

from fedkit.flower import encode_content, encode_envelope, parts_of
from fedkit.link.frames import Parcel

# Contents that may be sent to further clients: one for each codec that they know.
CONTENTS_KEPT = 4


@dataclass(frozen=True)
class _Encoded:
    """A content, kept so that its id passes to no other; what was in it; and how it travels."""

    content: RecordDict
    values: dict[str, Any]
    description: bytes
    arrays: Parcel


class Contents:
    """Encodes messages, and remembers the latest contents."""

    def __init__(self) -> None:
        """Nothing is remembered yet."""
        self._encoded: dict[int, _Encoded] = {}

    def __len__(self) -> int:
        """How many are remembered."""
        return len(self._encoded)

    def clear(self) -> None:
        """Nobody else will get what was sent so far."""
        self._encoded.clear()

    def parcel(self, message: Message) -> Parcel:
        """A message with content as it travels."""
        description, arrays = self._encode(message.content)
        return arrays.with_head(encode_envelope(message) + description)

    def _encode(self, content: RecordDict) -> tuple[bytes, Parcel]:
        """Description and arrays, made and summed once where several clients get the same."""
        values = parts_of(content)
        known = self._encoded.pop(id(content), None)
        if known is None or known.values != values:
            description, *arrays = encode_content(content)
            known = _Encoded(content, values, description, Parcel.of(arrays))
        self._encoded[id(content)] = known
        while len(self._encoded) > CONTENTS_KEPT:
            del self._encoded[next(iter(self._encoded))]
        return known.description, known.arrays
