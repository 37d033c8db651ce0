"""The client's end of the link: it only dials out, works on what it is sent, and answers.

Work is done on the calling thread; gRPC reads, writes and answers pings on threads of its own. Nothing
of Flower or torch is imported here: a client that waits for its first instruction stays small.
"""

from __future__ import annotations

import logging
import queue
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from fedkit.errors import FedkitError, error_of
from fedkit.link.channel import CLIENT_OPTIONS
from fedkit.link.frames import METHOD, PROTOCOL, Assembler, FrameError, Kind, frame, message_frames
from fedkit.link.frames import parse as parse_frame

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
GOODBYE_WAIT_S = 3.0
_log = logging.getLogger(__name__)

Buffers = Sequence[bytes]


@dataclass(frozen=True)
class Answer:
    """What a piece of work gives: the reply, and the error that ends this client after it."""

    buffers: Buffers
    fatal: FedkitError | None = None


Work = Callable[[str, bytearray], Answer]
Welcomed = Callable[[dict[str, Any]], None]


class LinkClient:
    """Keeps a session with the server until the run is over."""

    def __init__(
        self, address: str, hello: dict[str, Any], *, max_wait: float, on_welcome: Welcomed
    ) -> None:
        """A client that is not connected yet.

        Args:
            address: the server's HOST:PORT.
            hello: who this client is: identity, secret, name, config.
            max_wait: seconds to go on trying while the server can't be reached.
            on_welcome: takes the server's welcome, at each connection.
        """
        self._address = address
        # The session tells this process, coming back, from another one with the same identity.
        self._hello = {**hello, "protocol": PROTOCOL, "session": secrets.token_hex(8)}
        self._max_wait = max_wait
        self._on_welcome = on_welcome
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[tuple[str, Buffers] | None] = queue.SimpleQueue()

    def run(self, work: Work) -> str:
        """Work until the server says that the run is over; returns what it said.

        Raises:
            FedkitError: refused, unreachable for too long, or the work failed for good.
        """
        pause, unreachable_since = FIRST_PAUSE_S, time.monotonic()
        while True:
            started = time.monotonic()
            try:
                return self._session(work)
            except _Broken as broken:
                if broken.welcomed:
                    pause, unreachable_since = FIRST_PAUSE_S, time.monotonic()
                    _log.warning("The link to %s broke: connecting again.", self._address)
                elif started - unreachable_since + pause > self._max_wait:
                    raise FedkitError(self._final_word(broken.details)) from None
                else:
                    _log.info("No answer from %s, trying again: %s", self._address, broken.details)
                time.sleep(pause * random.uniform(0.8, 1.2))
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _session(self, work: Work) -> str:
        self._inbox = queue.SimpleQueue()
        self._outbox = queue.SimpleQueue()
        with grpc.insecure_channel(self._address, options=CLIENT_OPTIONS) as channel:
            open_stream: Any = channel.stream_stream(METHOD)
            call = open_stream(self._requests(self._outbox))
            reader = threading.Thread(
                target=self._read, args=(call, self._inbox), name="link", daemon=True
            )
            reader.start()
            try:
                return self._serve(work, reader)
            finally:
                self._outbox.put(None)
                reader.join(GOODBYE_WAIT_S)
                call.cancel()

    def _serve(self, work: Work, reader: threading.Thread) -> str:
        welcomed = False
        while True:
            what, value = self._inbox.get()
            if what == "welcome":
                welcomed = True
                self._on_welcome(value)
            elif what == "instruction":
                key, data = value
                answer = work(key, data)
                self._outbox.put((key, answer.buffers))
                if answer.fatal is not None:
                    raise answer.fatal
            elif what == "bye":
                return str(value)
            elif what == "broken":
                raise _Broken(value, welcomed)
            else:
                raise value

    def _requests(self, outbox: queue.SimpleQueue[tuple[str, Buffers] | None]) -> Iterator[bytes]:
        yield frame(Kind.HELLO, self._hello)
        while (item := outbox.get()) is not None:
            yield from message_frames(*item)
        yield frame(Kind.LEAVE)

    def _read(self, call: Any, inbox: queue.SimpleQueue[tuple[str, Any]]) -> None:
        assembler = Assembler()
        try:
            for data in call:
                kind, head, body = parse_frame(data)
                complete = None
                if kind is Kind.WELCOME:
                    inbox.put(("welcome", head))
                elif kind is Kind.MESSAGE:
                    complete = assembler.begin(head)
                elif kind is Kind.CHUNK:
                    complete = assembler.add(body)
                elif kind is Kind.BYE:
                    inbox.put(("bye", head.get("reason", "")))
                    return
                else:
                    raise FrameError(f"a server does not send {kind.name}")
                if complete is not None:
                    inbox.put(("instruction", complete))
            inbox.put(("broken", "the server ended the session"))
        except FrameError as error:
            inbox.put(("error", FedkitError(f"{self._address} answered nonsense: {error}.")))
        except grpc.RpcError as error:
            inbox.put(self._explain(error))

    def _explain(self, error: Any) -> tuple[str, Any]:
        code, details = error.code(), error.details() or ""
        passing = (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.CANCELLED,
            grpc.StatusCode.UNKNOWN,
            grpc.StatusCode.INTERNAL,
        )
        if code is grpc.StatusCode.UNIMPLEMENTED:
            sentence = f"What answers at {self._address} is no fedkit server: check --server."
            return "error", FedkitError(sentence)
        if code in passing:
            return "broken", details
        # A refusal is the server's own sentence; what was typed is an argument to it.
        exit_code = 2 if code is grpc.StatusCode.INVALID_ARGUMENT else 1
        return "error", error_of(exit_code, details)

    def _final_word(self, details: str) -> str:
        where, tried = self._address, f"tried for {self._max_wait:g} seconds"
        if any(word in details for word in ("http1", "Socket closed", "HTTP", "preface", "frame")):
            return f"What listens at {where} does not speak gRPC ({tried}): check --server."
        if "DNS" in details or "resol" in details:
            return f"The address {where} can't be found ({tried}): check --server."
        return (
            f"No fedkit server answers at {where} ({tried}): check --server, and that "
            "`fedkit server` runs there."
        )


class _Broken(Exception):
    def __init__(self, details: str, welcomed: bool) -> None:
        super().__init__(details)
        self.details = details
        self.welcomed = welcomed
