"""fedkit's side of Flower's own ``Grid``, whose way of waiting takes three seconds for each exchange."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedkit.engine.grid import EngineGrid
from fedkit.engine.keys import Keys
from fedkit.errors import plain
from fedkit.flower import (
    asking_superlink,
    check_arrays,
    error_reply,
    is_failure,
    set_message_id,
    unavailable_reply,
)
from fedkit.flower_engine.told import RECORD, Told

# (node id, who is there) -> the node's shard.
ShardOf = Callable[[int, Collection[int]], int]


class FlowerGrid(EngineGrid):
    """Instructions by key over Flower's grid; each message tells what the federation has agreed on.

    A message is sent as soon as the strategy has made it, and replies are fetched one after the other, in
    the order of sending: of all that clients send, one reply is in this process's memory.
    """

    # How often a SuperLink is asked: a request costs it some milliseconds.
    poll_s = 0.25

    def __init__(
        self,
        grid: Grid,
        federation: str,
        settings: dict[str, bool | int | float | str],
        shard_of: ShardOf,
    ) -> None:
        """A grid over Flower's.

        Args:
            grid: Flower's own, of this run.
            federation: the federation's id.
            settings: the federation's, by outside name.
            shard_of: gives the shard of a node that does not name one itself.
        """
        self._grid = grid
        self._federation, self._settings = federation, settings
        self._shard_of = shard_of
        # A node that was started anew may have another id, and is still the same client.
        self._keys = Keys(federation, nodes_last=False)
        self._sent: dict[str, Message] = {}
        self._lost = itertools.count(1)
        self._present: list[int] = []
        self._seen_at = self._pulled_at = -math.inf

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._grid.run

    def begin_round(self) -> None:
        """A round begins, or begins again."""
        self._keys.begin_round()

    def get_node_ids(self) -> Iterable[int]:
        """The nodes of which the SuperLink has heard in the last minute."""
        if time.monotonic() - self._seen_at >= self.poll_s:
            with asking_superlink():
                self._present = list(self._grid.get_node_ids())
            self._seen_at = time.monotonic()
        return list(self._present)

    def processes(self) -> dict[int, str]:
        """The same word for every node: a process that goes on with a run asks all of them anew."""
        return dict.fromkeys(self.get_node_ids(), self._keys.process)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, taking them from the iterable one at a time; gives their keys."""
        return [self._push(message, None) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have come to some keys; does not wait."""
        if time.monotonic() - self._pulled_at < self.poll_s:
            return []
        self._pulled_at = time.monotonic()
        return self._pull(list(message_ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send all messages now; give replies in the order of sending, each as soon as it may.

        A node that is gone is answered for by an error, and so is one that has not answered at the
        timeout; an instruction that has not begun by then is not delivered any more.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        keys = [self._push(message, timeout) for message in messages]
        return self._in_order(keys, deadline)

    def _in_order(self, keys: list[str], deadline: float | None) -> Iterator[Message]:
        for key in keys:
            while not (came := self._pull([key])):
                left = math.inf if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    sent = self._sent.pop(key)
                    came = [unavailable_reply(sent, "it had not answered when the time was up")]
                    break
                self._pause(min(self.poll_s, left))
            yield from came

    def _pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def _push(self, message: Message, ttl: float | None) -> str:
        meta = message.metadata
        shard = self._shard_of(meta.dst_node_id, self._present)
        told = Told(self._federation, self._keys.key(message), shard, self._settings)
        if ttl is not None:
            # Beyond it the SuperLink does not deliver it, and takes no answer.
            meta.ttl = max(ttl, 0.001)
        # A strategy may send the same content to many, and Flower's simulation keeps what it is given.
        outgoing = Message(
            RecordDict({**message.content, RECORD: told.record()}),
            meta.dst_node_id,
            meta.message_type,
            ttl=meta.ttl,
            group_id=meta.group_id,
        )
        message.content = RecordDict()  # only the envelope is needed from here on
        with asking_superlink():
            pushed = [key for key in self._grid.push_messages([outgoing]) if key]
        key = pushed[0] if pushed else f"lost-{next(self._lost)}"
        set_message_id(message, key)
        self._sent[key] = message
        return key

    def _pull(self, keys: list[str]) -> list[Message]:
        lost = [key for key in keys if key.startswith("lost-")]
        replies = [
            unavailable_reply(self._sent.pop(key), "the SuperLink did not take its instruction")
            for key in lost
        ]
        asked = [key for key in keys if key not in lost and key in self._sent]
        with asking_superlink():
            came = list(self._grid.pull_messages(asked)) if asked else []
        for reply in came:
            sent = self._sent.pop(reply.metadata.reply_to_message_id, None)
            if sent is not None:
                replies.append(self._checked(sent, reply))
        return replies

    def _checked(self, sent: Message, reply: Message) -> Message:
        """The reply as this process vouches for it: who answered is not what the reply says of itself."""
        if reply.has_error():
            reason = plain(reply.error.reason) or "no reason given"
            return (error_reply if is_failure(reply) else unavailable_reply)(sent, reason)
        try:
            check_arrays(reply.content)
        except ValueError as error:
            return error_reply(sent, f"its reply can't be read: {error}")
        answer = Message(reply.content, reply_to=sent)
        # When it was made, by the node's clock; a SuperLink does not tell when it came.
        earliest, latest = sent.metadata.created_at, answer.metadata.created_at
        made = reply.metadata.created_at
        if math.isfinite(made):
            answer.metadata.created_at = min(max(made, earliest), latest)
        return answer
