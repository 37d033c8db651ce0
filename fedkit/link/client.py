"""The client's end of the link: it only dials out, works on what it is sent, and answers.

Nothing of Flower or torch is imported here: a client that waits for its first instruction stays small.
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
from typing import Any, TypeAlias

import grpc

from fedkit.errors import FedkitError, error_of
from fedkit.link.channel import client_options
from fedkit.link.frames import (
    METHOD,
    PROTOCOL,
    Assembler,
    FrameError,
    Garbled,
    Kind,
    Parcel,
    frame,
    message_frames,
)
from fedkit.link.frames import parse as parse_frame

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
GOODBYE_WAIT_S = 3.0
TRIES = 4
_log = logging.getLogger(__name__)

Buffers = Sequence[bytes]
Outbox: TypeAlias = "queue.SimpleQueue[tuple[str, Parcel] | bytes | None]"
Credentials = Callable[[], "grpc.ChannelCredentials | None"]


@dataclass(frozen=True)
class Answer:
    """What a piece of work gives: the reply, and the error that ends this client after it."""

    buffers: Buffers
    fatal: FedkitError | None = None


Work = Callable[[str, list[bytes]], Answer]
Welcomed = Callable[[dict[str, Any]], None]


class LinkClient:
    """Keeps a session with the server until the run is over.

    A thread of its own holds the connection and makes it again when it breaks, so that the server
    hears of this client however long a piece of work takes. The work is done on the calling thread,
    one instruction after the other; an instruction that comes again is not done again.
    """

    def __init__(
        self,
        address: str,
        hello: dict[str, Any],
        *,
        max_wait: float,
        on_welcome: Welcomed,
        patience: float | None = None,
        credentials: Credentials = lambda: None,
        explain: Callable[[str], str | None] = lambda details: None,
    ) -> None:
        """A client that is not connected yet.

        Args:
            address: the server's HOST:PORT.
            hello: who this client is: identity, secret, name, config.
            max_wait: seconds to go on trying while the server can't be reached.
            on_welcome: takes the server's welcome, at each connection.
            patience: the same once it has been welcomed; None takes ``max_wait``.
            credentials: gives those for TLS, anew at each connection; None for plaintext.
            explain: says in a sentence what gRPC's details of a failed connection mean, if it knows.
        """
        self._address = address
        # The session tells this process, coming back, from another one with the same identity.
        self._hello = {**hello, "protocol": PROTOCOL, "session": secrets.token_hex(8)}
        self._max_wait = max_wait
        self._patience = max_wait if patience is None else patience
        self._on_welcome = on_welcome
        self._credentials = credentials
        self._explain_details = explain
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._outbox: Outbox = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self._withdrawn: set[str] = set()
        self._last: tuple[str, Parcel] | None = None
        self._over = threading.Event()
        self._came_in = False

    def run(self, work: Work) -> str:
        """Work until the server says that the run is over; returns what it said.

        Raises:
            FedkitError: refused, unreachable for too long, the server failed, or the work did.
        """
        link = threading.Thread(target=self._stay_connected, name="link", daemon=True)
        link.start()
        try:
            return self._serve(work)
        finally:
            with self._lock:
                self._over.set()
                self._outbox.put(None)
            link.join(GOODBYE_WAIT_S)

    def _serve(self, work: Work) -> str:
        goodbye: dict[str, Any] | None = None
        while goodbye is None:
            what, value = self._inbox.get()
            if what == "welcome":
                self._on_welcome(value)
            elif what == "bye":
                goodbye = value
            elif what == "error":
                raise value
            elif not self._over.is_set():  # nobody waits for an answer after the goodbye
                self._work(work, *value)
            # Not held while waiting for the next: it may be a model.
            del value
        if not goodbye.get("ok", True):
            raise FedkitError(str(goodbye.get("reason", "")))
        return str(goodbye.get("reason", ""))

    def _work(self, work: Work, key: str, buffers: list[bytes]) -> None:
        with self._lock:
            if key in self._withdrawn:
                # Its time was up before it began: what comes next is worth more.
                self._withdrawn.discard(key)
                self._known.discard(key)
                return
            self._last = None
        answer = work(key, buffers)
        parcel = Parcel.of(answer.buffers)
        with self._lock:
            self._last = key, parcel
            self._known.discard(key)
            if key in self._withdrawn:
                self._withdrawn.discard(key)
                _log.warning("The answer to %s was not ready in time and does not count.", key)
            else:
                self._outbox.put((key, parcel))
        if answer.fatal is not None:
            raise answer.fatal

    def _instructed(self, key: str, buffers: list[bytes] | None) -> None:
        assert buffers is not None, "a client holds all that it is sent"
        with self._lock:
            self._withdrawn.discard(key)
            if self._last is not None and self._last[0] == key:
                self._outbox.put(self._last)
            elif key not in self._known:
                self._known.add(key)
                self._inbox.put(("instruction", (key, buffers)))

    def _withdraw(self, key: str) -> None:
        with self._lock:
            if key in self._known:
                self._withdrawn.add(key)
            else:
                _log.warning("The answer to %s came too late, and does not count.", key)

    def _stay_connected(self) -> None:
        pause, unreachable_since = FIRST_PAUSE_S, time.monotonic()
        patience, failures = self._max_wait, 0
        while not self._over.is_set():
            try:
                self._session()
                return
            except _Broken as broken:
                if self._over.is_set():
                    return
                if broken.welcomed:
                    pause, unreachable_since = FIRST_PAUSE_S, time.monotonic()
                    patience, failures, self._came_in = self._patience, 0, True
                    _log.warning("The link to %s broke: connecting again.", self._address)
                else:
                    failures += 1
                    explained = broken.told or self._explain_details(broken.details)
                    # What is wrong from the start, and again and again, is wrong for good; unless it
                    # is what anything between here and a server that is not up yet says, too.
                    passing = broken.told or "Socket closed" in broken.details
                    hopeless = explained and not passing and not self._came_in and failures >= TRIES
                    if hopeless or time.monotonic() - unreachable_since + pause > patience:
                        word = explained or self._final_word(broken.details, patience)
                        self._inbox.put(("error", FedkitError(word)))
                        return
                    _log.info("No answer from %s, trying again: %s", self._address, broken.details)
                # With jitter, so that a thousand clients do not come back at the same instant.
                self._over.wait(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, LONGEST_PAUSE_S)
            except FedkitError as error:
                self._inbox.put(("error", error))
                return
            except Exception as error:  # the calling thread must hear of whatever it was
                _log.debug("The link failed.", exc_info=error)
                text = f"The link failed with {type(error).__name__}: {error}."
                self._inbox.put(("error", FedkitError(text)))
                return

    def _session(self) -> None:
        """One connection, until the goodbye; raises ``_Broken`` if it ends without one."""
        with self._lock:
            outbox: Outbox = queue.SimpleQueue()
            self._outbox = outbox
            if self._over.is_set():
                return
        with self._channel() as channel:
            open_stream: Any = channel.stream_stream(METHOD)
            call = open_stream(self._requests(outbox))
            try:
                self._read(call)
            finally:
                outbox.put(None)
                call.cancel()

    def _channel(self) -> grpc.Channel:
        # Read anew each time: a renewed certificate is used without a restart.
        try:
            credentials, options = self._credentials(), client_options(self._address)
        except (FedkitError, OSError) as error:
            if not self._came_in:
                raise
            raise _Broken(str(error), False, str(error)) from error  # it may be being renewed
        if credentials is None:
            return grpc.insecure_channel(self._address, options=options)
        return grpc.secure_channel(self._address, credentials, options=options)

    def _requests(self, outbox: Outbox) -> Iterator[bytes]:
        yield frame(Kind.HELLO, self._hello)
        while (item := outbox.get()) is not None:
            if isinstance(item, bytes):
                yield item
            else:
                yield from message_frames(*item)
        yield frame(Kind.LEAVE)

    def _read(self, call: Any) -> None:
        assembler, welcomed = Assembler(), False
        try:
            for data in call:
                kind, head, body = parse_frame(data)
                complete = None
                if kind is Kind.WELCOME:
                    welcomed = True
                    self._inbox.put(("welcome", head))
                elif kind is Kind.MESSAGE:
                    complete = assembler.begin(head, body)
                elif kind is Kind.CHUNK:
                    complete = assembler.add(body)
                elif kind is Kind.PROBE:
                    self._outbox.put(frame(Kind.HERE))
                elif kind is Kind.WITHDRAW:
                    self._withdraw(str(head.get("key")))
                elif kind is Kind.BYE:
                    self._over.set()
                    self._inbox.put(("bye", head))
                    return
                else:
                    raise FrameError(f"a server does not send {kind.name}")
                if complete is not None:
                    self._instructed(*complete)
                    complete = None
        except Garbled as error:
            told = f"What comes from {self._address} is garbled on the way: {error}."
            raise _Broken(str(error), welcomed, told) from None
        except FrameError as error:
            raise FedkitError(f"{self._address} answered nonsense: {error}.") from error
        except grpc.RpcError as error:
            raise self._explain(error, welcomed) from None
        if not self._over.is_set():
            raise _Broken("the server ended the session", welcomed)

    def _explain(self, error: Any, welcomed: bool) -> Exception:
        code, details = error.code(), error.details() or ""
        passing = (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.CANCELLED,
            grpc.StatusCode.UNKNOWN,
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.DATA_LOSS,
            grpc.StatusCode.ABORTED,
        )
        if code is grpc.StatusCode.UNIMPLEMENTED:
            sentence = f"What answers at {self._address} is no fedkit server: check --server."
            return FedkitError(sentence)
        if code in passing:
            told = details if code is grpc.StatusCode.ABORTED else ""
            return _Broken(details, welcomed, told)
        # A refusal is the server's own sentence; what was typed is an argument to it.
        exit_code = 2 if code is grpc.StatusCode.INVALID_ARGUMENT else 1
        return error_of(exit_code, details)

    def _final_word(self, details: str, patience: float) -> str:
        where, tried = self._address, f"tried for {patience:g} seconds"
        if any(word in details for word in ("http1", "Socket closed", "HTTP", "preface", "frame")):
            return f"What listens at {where} does not speak gRPC ({tried}): check --server."
        if "DNS" in details or "resol" in details:
            return f"The address {where} can't be found ({tried}): check --server."
        return (
            f"No fedkit server answers at {where} ({tried}): check --server, and that "
            "`fedkit server` runs there."
        )


class _Broken(Exception):
    """A connection ended, or never came up; ``told`` is the server's own sentence about it."""

    def __init__(self, details: str, welcomed: bool, told: str = "") -> None:
        super().__init__(details)
        self.details = details
        self.welcomed = welcomed
        self.told = told
