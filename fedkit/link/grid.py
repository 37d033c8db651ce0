"""Flower's ``Grid`` over the gRPC link: what a strategy sends reaches a client at once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message, RecordDict

from fedkit.engine.grid import EngineGrid
from fedkit.engine.keys import Keys
from fedkit.errors import plain
from fedkit.flower import (
    decode_message,
    error_reply,
    set_message_id,
    unavailable_reply,
)
from fedkit.link.contents import Contents
from fedkit.link.node import Lost
from fedkit.link.server import LinkServer
from fedkit.link.spool import Reply


class LinkGrid(EngineGrid):
    """Messages by key (see ``Keys``) over a ``LinkServer``."""

    def __init__(self, link: LinkServer, federation: str) -> None:
        """A grid over ``link``, in the federation of that id."""
        self._link = link
        self._keys = Keys(federation, nodes_last=True)
        self._contents = Contents()
        self._sent: dict[str, Message] = {}

    def begin_round(self) -> None:
        """A round begins, or begins again."""
        self._keys.begin_round()
        self._contents.clear()

    def get_node_ids(self) -> Iterable[int]:
        """The clients that are connected now, or may still come back."""
        return self._link.node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, taking them from the iterable one at a time; gives their keys."""
        return [self._push(message, None) for message in messages]

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
        keys = [self._push(message, deadline) for message in messages]
        return self._in_order(keys, deadline)

    def processes(self) -> dict[int, str]:
        """The client processes that are connected now, by node."""
        return self._link.processes()

    def dismiss(self, node_id: int, sentence: str) -> None:
        """Send a client away with a sentence."""
        self._link.dismiss(node_id, sentence)

    def _in_order(self, keys: list[str], deadline: float | None) -> Iterator[Message]:
        waiting, early = set(keys), dict[str, Reply | Lost]()
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

    def _push(self, message: Message, deadline: float | None) -> str:
        meta = message.metadata
        key = self._keys.key(message)
        set_message_id(message, key)
        parcel = self._contents.parcel(message)
        message.content = RecordDict()  # only the envelope is needed from here on
        self._sent[key] = message
        self._link.send(meta.dst_node_id, key, parcel, meta.message_type, deadline)
        return key

    def _reply(self, key: str, result: Reply | Lost) -> Message:
        sent = self._sent.pop(key)
        if isinstance(result, Lost):
            return unavailable_reply(sent, result.reason)
        try:
            reply = decode_message(result.take())
        except ValueError as error:
            return error_reply(sent, f"its reply can't be read: {error}")
        if reply.has_error():
            return error_reply(sent, plain(reply.error.reason) or "no reason given")
        # Who answered, and when that was here, is what the link knows, not what the reply says of itself.
        answer = Message(reply.content, reply_to=sent)
        answer.metadata.created_at = result.came_at
        return answer
