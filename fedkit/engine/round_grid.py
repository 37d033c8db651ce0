"""The grid that a strategy sees in one round."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedkit.engine.roster import Member


class RoundGrid(Grid):
    """Any engine's grid, with who takes part in the round and what time is left of it."""

    def __init__(self, grid: Grid, members: Sequence[Member], deadline: float) -> None:
        """``members`` in client order; ``deadline`` on the monotonic clock."""
        self._grid = grid
        self.members = members
        self.deadline = deadline
        # Whether a selector decides in the round, after a probe.
        self.probed = False
        # Whose answers the round rests on: all, until a selector stops some of them early.
        self.counted = frozenset(member.client for member in members)
        self.stopped: frozenset[int] = frozenset()
        # How much of the time that is left one sending may take.
        self.share = 1.0
        self.waited = 0.0
        # Seconds that the last sending was given.
        self.allowed = 0.0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Replies in client order; ``timeout`` can only shorten what is left of the round."""
        left = max(0.0, self.deadline - time.monotonic()) * self.share
        wait = self.allowed = left if timeout is None else min(left, timeout)
        started = time.monotonic()
        replies = self._grid.send_and_receive(messages, timeout=wait)
        order = {member.node_id: at for at, member in enumerate(self.members)}
        unknown = len(order)
        # An engine may answer lazily; fedkit's own grid does, in the order of sending.
        if not isinstance(replies, list):
            return self._timed(iter(replies))
        replies.sort(key=lambda reply: order.get(reply.metadata.src_node_id, unknown))
        self.waited += time.monotonic() - started
        return iter(replies)

    def _timed(self, replies: Iterator[Message]) -> Iterator[Message]:
        while True:
            started = time.monotonic()
            reply = next(replies, None)
            self.waited += time.monotonic() - started
            if reply is None:
                return
            yield reply

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that take part in this round."""
        return [member.node_id for member in self.members]

    def set_run(self, run: Run) -> None:
        """As the engine's grid does."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """As the engine's grid says."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """As the engine's grid does."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the engine's grid does."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the engine's grid does."""
        return self._grid.pull_messages(message_ids)
