"""Flower's ``Grid`` over the gRPC link: what a strategy sends reaches a client at once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedkit.flower import (
    decode_message,
    encode_message,
    error_reply,
    set_message_id,
    unavailable_reply,
)
from fedkit.link.node import Lost
from fedkit.link.server import LinkServer


class LinkGrid(Grid):
    """Messages by key over a ``LinkServer``.

    A key names an instruction for good: federation, round, exchange, client, and a counter.
    """

    def __init__(self, link: LinkServer, federation: str) -> None:
        """A grid over ``link``, in the federation of that id."""
        self._link = link
        self._federation = federation
        self._counter = itertools.count(1)
        self._sent: dict[str, Message] = {}

    @property
    def run(self) -> Run:
        """Flower's description of a run; fedkit's own lies in the run directory."""
        return Run.create_empty(run_id=1)

    def set_run(self, run: Run) -> None:
        """A link serves one run; there is nothing to set."""

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A new message; the same as calling ``Message`` itself."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The clients that are connected now, or may still come back."""
        return self._link.node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, taking them from the iterable one at a time; gives their keys."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have come to some keys; does not wait."""
        results = self._link.take(message_ids, deadline=0.0)
        return [self._reply(key, data) for key, data in results.items()]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send all messages now; give replies in the order of sending, each as soon as it may.

        A client that is gone is answered for by an error. At the timeout the rest is given up.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        keys = list(self.push_messages(messages))
        return self._in_order(keys, deadline)

    def dismiss(self, node_id: int, sentence: str) -> None:
        """Send a client away with a sentence."""
        self._link.dismiss(node_id, sentence)

    def _in_order(self, keys: list[str], deadline: float | None) -> Iterator[Message]:
        waiting, early = set(keys), dict[str, bytearray | Lost]()
        for key in keys:
            while key in waiting:
                came = self._link.take(waiting, deadline)
                if not came:
                    self._link.withdraw(waiting)
                    came = {
                        late: Lost("it had not answered when the time was up") for late in waiting
                    }
                waiting -= came.keys()
                early |= came
            yield self._reply(key, early.pop(key))

    def _push(self, message: Message) -> str:
        meta = message.metadata
        name = f"{meta.group_id}/{meta.message_type}/{meta.dst_node_id}"
        key = f"{self._federation}/{name}/{next(self._counter)}"
        set_message_id(message, key)
        buffers = encode_message(message)
        message.content = RecordDict()  # only the envelope is needed from here on
        self._sent[key] = message
        self._link.send(meta.dst_node_id, key, buffers, account=meta.message_type)
        return key

    def _reply(self, key: str, data: bytearray | Lost) -> Message:
        sent = self._sent.pop(key)
        if isinstance(data, Lost):
            return unavailable_reply(sent, data.reason)
        try:
            reply = decode_message(data)
        except ValueError as error:
            return error_reply(sent, f"its reply can't be read: {error}")
        if reply.has_error():
            return error_reply(sent, reply.error.reason or "no reason given")
        # Who answered is what the link knows, not what the reply says of itself.
        return Message(reply.content, reply_to=sent)
