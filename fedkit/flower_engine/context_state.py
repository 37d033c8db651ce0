"""A client's memory where it has no folder: Flower's ``Context.state``, with replies where needed."""

from __future__ import annotations

from collections.abc import Sequence

from flwr.app import ConfigRecord, RecordDict

from fedkit.engine.state import ROUNDS_KEPT
from fedkit.flower import as_file, from_file

_REPLIES = "replies"


class ContextState:
    """Keeps what was answered beside what the client remembers.

    Flower keeps both or neither: it takes the context back when the work is done.
    """

    # Nothing outlives the run, so no round can be asked for that is long past.
    last_round: int | None = None

    def __init__(self, state: RecordDict, *, repeats: bool) -> None:
        """Over a context's ``state``; ``repeats``: whether a round may be repeated (``quorum``)."""
        self._state = state
        self._repeats = repeats

    def reply_to(self, key: str) -> list[bytes] | None:
        """What was answered to instruction ``key``, if that is kept."""
        record = self._state.config_records.get(_REPLIES, ConfigRecord())
        kept = record.get(key)
        if not isinstance(kept, bytes):
            return None
        return from_file(kept[8:])

    def commit(self, key: str, reply: Sequence[bytes], state: RecordDict, round: int = 0) -> None:
        """Keep the reply to instruction ``key``; the state is in its place already."""
        if not self._repeats or not round:
            return
        before = self._state.config_records.get(_REPLIES, ConfigRecord())
        kept = {
            old: data
            for old, data in before.items()
            if isinstance(data, bytes) and int.from_bytes(data[:8]) > round - ROUNDS_KEPT
        }
        kept[key] = round.to_bytes(8) + b"".join(as_file(reply))
        self._state[_REPLIES] = ConfigRecord({**kept})
