"""The ``Grid`` that somebody's ServerApp gets: all that Flower's own promises, over the gRPC link.

Unlike the grid of fedkit's strategies it knows of no rounds and repeats nothing: a message is an
instruction of its own, its reply is there to be pulled until its time to live is over, and several
threads may use it at once, as Flower's workflow for older apps does.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flwr.app import Error, Message
from flwr.supercore.run import Run

from fedkit.engine.events import Event, Listener
from fedkit.engine.grid import EngineGrid
from fedkit.errors import plain
from fedkit.flower import (
    decode_message,
    envelope_of,
    error_reply,
    expired_reply,
    set_message_id,
    unavailable_reply,
    unknown_reply,
)
from fedkit.link.contents import Contents
from fedkit.link.node import Lost
from fedkit.link.server import LinkServer
from fedkit.link.spool import Reply

# Before the message type in the link's accounts, where `query.` alone is joining, with its small replies.
ACCOUNT = "app/"
# A thread that waits for a reply sees for itself that the time is up; nobody else takes it away before.
FORGOTTEN_AFTER_S = 60.0


@dataclass(frozen=True)
class _Sent:
    """A message without its content, the round that it belongs to, and when it is too late for a reply."""

    envelope: Message
    round: int | None
    expires: float


class AppGrid(EngineGrid):
    """Messages of an app over a ``LinkServer``; each sending and each reply is an event."""

    def __init__(self, link: LinkServer, run: Run, emit: Listener) -> None:
        """A grid over ``link`` for one run; ``emit`` is called by whichever thread uses the grid."""
        self._link = link
        self._run = run
        self._emit = emit
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._contents = Contents()
        # Messages whose reply was not pulled yet.
        self._sent: dict[str, _Sent] = {}
        # Messages, and what came of them.
        self.outcomes: Counter[str] = Counter()

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._run

    def get_node_ids(self) -> list[int]:
        """The clients that are connected now, or may still come back."""
        return self._link.node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages, taking them from the iterable one at a time; gives their ids.

        Raises:
            ValueError: a message without content, or with no time to live.
        """
        self._forget_expired()
        return list(self._push_all(messages, None))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that have come to some messages; does not wait.

        An id of no message, or of one whose time is over, or whose reply was pulled before, gives an
        error, as on Flower's own engine.
        """
        wanted = dict.fromkeys(message_ids)
        with self._lock:
            known = {key: self._sent[key] for key in wanted if key in self._sent}
        replies = self._take(known, time.monotonic())
        strange = [unknown_reply(key, self._run.run_id) for key in wanted if key not in known]
        return [*replies.values(), *strange]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send all messages and wait; gives the replies in the order of sending.

        A client that is gone is answered for by an error. At the timeout only what has come is given:
        the other messages live on, and their replies may be pulled by ``metadata.message_id``.
        """
        self._forget_expired()
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = self._push_all(messages, deadline)
        replies: dict[str, Message | None] = dict.fromkeys(waiting)
        while waiting:
            came = self._take(waiting, deadline)
            if not came:
                break
            replies |= came
            waiting = {key: sent for key, sent in waiting.items() if key not in came}
        return [reply for reply in replies.values() if reply is not None]

    def _push_all(self, messages: Iterable[Message], deadline: float | None) -> dict[str, _Sent]:
        pushed = dict(self._push(message, deadline) for message in messages)
        with self._lock:
            self._contents.clear()
        return pushed

    def _push(self, message: Message, deadline: float | None) -> tuple[str, _Sent]:
        meta = message.metadata
        if not message.has_content() or meta.ttl <= 0:
            raise ValueError(f"Invalid message: it has no content or no time to live: {message}")
        with self._lock:
            key = f"{self._run.run_id:016x}/{next(self._numbers)}"
            set_message_id(message, key)
            parcel = self._contents.parcel(message)
            expires = time.monotonic() + meta.created_at + meta.ttl - time.time()
            sent = _Sent(envelope_of(message), _round_of(message), expires)
            self._sent[key] = sent
            self._tell("sent", sent, None, parcel.size)
        room = expires if deadline is None else min(expires, deadline)
        self._link.send(meta.dst_node_id, key, parcel, ACCOUNT + meta.message_type, room)
        return key, sent

    def _take(self, waiting: Mapping[str, _Sent], deadline: float | None) -> dict[str, Message]:
        """Replies to some of what was pushed: at least one, unless the deadline passed."""
        while True:
            until = min((sent.expires for sent in waiting.values()), default=0.0)
            until = until if deadline is None else min(until, deadline)
            came = self._link.take(list(waiting), until)
            if came:
                return {key: self._reply(key, waiting[key], result) for key, result in came.items()}
            now = time.monotonic()
            late = {key: sent for key, sent in waiting.items() if sent.expires <= now}
            if late:
                return {key: self._expired(key, sent) for key, sent in late.items()}
            if deadline is not None and now >= deadline:
                return {}

    def _reply(self, key: str, sent: _Sent, result: Reply | Lost) -> Message:
        message = sent.envelope
        if isinstance(result, Lost):
            return self._settled(key, "lost", unavailable_reply(message, result.reason), sent, 0)
        try:
            reply = decode_message(result.take(), described=False)
            if reply.has_error():
                error = Error(reply.error.code, plain(reply.error.reason))
                failure = Message(error, reply_to=message)
                return self._settled(key, "failed", failure, sent, result.size)
            # Who answered, and when that was here, is what the link knows.
            answer = Message(reply.content, reply_to=message)
        except ValueError as error:
            unreadable = error_reply(message, f"its reply can't be read: {error}")
            return self._settled(key, "failed", unreadable, sent, result.size)
        answer.metadata.created_at = result.came_at
        return self._settled(key, "answered", answer, sent, result.size)

    def _expired(self, key: str, sent: _Sent) -> Message:
        self._link.withdraw([key])
        return self._settled(key, "expired", expired_reply(sent.envelope), sent, 0)

    def _forget_expired(self) -> None:
        """Replies that nobody pulls do not wait for ever."""
        now = time.monotonic()
        with self._lock:
            late = {
                key: sent
                for key, sent in self._sent.items()
                if sent.expires + FORGOTTEN_AFTER_S <= now
            }
        for key, sent in late.items():
            self._expired(key, sent)

    def _settled(self, key: str, outcome: str, reply: Message, sent: _Sent, size: int) -> Message:
        reason = reply.error.reason if reply.has_error() else None
        with self._lock:
            # Of several threads that find a message settled, one tells.
            if self._sent.pop(key, None) is not None:
                self._tell(outcome, sent, reason, size)
        return reply

    def _tell(self, outcome: str, sent: _Sent, reason: str | None, size: int) -> None:
        self.outcomes[outcome] += 1
        meta = sent.envelope.metadata
        self._emit(Event(outcome, sent.round, meta.message_type, meta.dst_node_id, reason, size))


def _round_of(message: Message) -> int | None:
    """The round, where the app says it: as the message's group, or as Flower's strategies tell clients."""
    if message.metadata.group_id.isdecimal():
        return int(message.metadata.group_id)
    told = [config.get("server-round") for config in message.content.config_records.values()]
    return next((round for round in told if isinstance(round, int)), None)


def carried(accounts: Mapping[str, int]) -> dict[str, int]:
    """What the link carried of an app's messages, by message type, in bytes."""
    return {
        account.removeprefix(ACCOUNT): size
        for account, size in accounts.items()
        if account.startswith(ACCOUNT)
    }
