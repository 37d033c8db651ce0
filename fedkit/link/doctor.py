"""An examination of the link: a greeting, then small and large frames to and fro, all bounded.

``/fedkit.Link/Doctor`` is a stream of its own, apart from the session: whoever calls it is no member of
the federation, and the round does not notice. A ``CHUNK`` is answered by one of as many bytes, or of as
many as its head says (``back``), so that each direction can be measured alone.
"""

from __future__ import annotations

import asyncio
import os
import queue
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import grpc
import grpc.aio

from fedkit import __version__
from fedkit.link.frames import (
    CHUNK_BYTES,
    METHOD,
    PROTOCOL,
    FrameError,
    Kind,
    frame,
    parse,
)
from fedkit.link.node import Guard, Refusal
from fedkit.security.credentials import peer_name

_SERVICE = METHOD.split("/")[1]
DOCTOR_METHOD = f"/{_SERVICE}/Doctor"
HELLO_WAIT_S = 10.0
CALL_S = 60.0
MOST_CALLS = 4
MOST_BYTES = 1 << 26
PINGS = 9
FIRST_BYTES = 1 << 14
LAST_BYTES = 1 << 22
PIECE_BYTES = 1 << 18
ENOUGH_S = 1.5

Hello = dict[str, Any]
Report = Callable[[Hello], dict[str, Any]]


def doctor_handler(report: Report, guard: Guard | None = None) -> Callable[[grpc.aio.Server], None]:
    """What adds the method to a server before it starts.

    Args:
        report: the federation's facts for the welcome; called on the loop, so it must not wait.
        guard: who may come in at all, as in a session; without, everybody.
    """
    return _Surgery(report, guard).register


class _Surgery:
    def __init__(self, report: Report, guard: Guard | None) -> None:
        self._report = report
        self._guard = guard
        self._calls = 0

    def register(self, server: grpc.aio.Server) -> None:
        handler: Any = grpc.stream_stream_rpc_method_handler(self._call)
        method = DOCTOR_METHOD.rpartition("/")[2]
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(_SERVICE, {method: handler}),)
        )

    async def _call(self, requests: Any, context: Any) -> None:
        peer = str(context.peer()).rpartition(":")[0]
        if self._calls >= MOST_CALLS or (self._guard is not None and not self._guard.allows(peer)):
            sentence = "The server is busy with other examinations: try again in a minute."
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, sentence)
        self._calls += 1
        refusal = None
        try:
            async with asyncio.timeout(CALL_S):
                await self._welcome(context)
                await self._echo(context)
        except TimeoutError:
            sentence = f"An examination may take {CALL_S:.0f} seconds."
            refusal = Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, sentence)
        except FrameError as error:
            refusal = Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"{error}.")
        except Refusal as raised:
            refusal = raised
        finally:
            self._calls -= 1
        if refusal is not None:
            # It may quote what a stranger sent, and travels in an HTTP/2 header.
            details = str(refusal)[:1000].encode("utf-8", errors="replace").decode()
            await context.abort(refusal.status, details)

    async def _welcome(self, context: Any) -> None:
        try:
            first = await asyncio.wait_for(context.read(), HELLO_WAIT_S)
        except TimeoutError:
            raise FrameError(f"no greeting came within {HELLO_WAIT_S:.0f} seconds") from None
        if first is grpc.aio.EOF:
            raise FrameError("the stream ended before a greeting")
        kind, hello, _ = parse(first)
        if kind is not Kind.HELLO:
            raise FrameError("an examination begins with a greeting")
        if self._guard is not None:
            self._guard(hello, peer_name(context.auth_context()))
        # Not compared: what differs is the other side's to find, and to explain.
        facts = {"version": __version__, "protocol": PROTOCOL, **self._report(hello)}
        await context.write(frame(Kind.WELCOME, facts))

    async def _echo(self, context: Any) -> None:
        carried = 0
        while (data := await context.read()) is not grpc.aio.EOF:
            kind, head, body = parse(data)
            if kind is Kind.LEAVE:
                return
            if kind is not Kind.CHUNK:
                raise FrameError(f"no {kind.name} belongs into an examination")
            back = head.get("back", len(body))
            if type(back) is not int or not 0 <= back <= CHUNK_BYTES:
                raise FrameError(f"a chunk asks for {back!r} bytes")
            carried += len(data) + back
            if carried > MOST_BYTES:
                sentence = f"An examination may carry {MOST_BYTES} bytes."
                raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, sentence)
            echoed = bytes(body) if "back" not in head else padding(back)
            await context.write(frame(Kind.CHUNK, {"time": time.time()}, echoed))


class Visit:
    """The client's end of one examination; every method raises ``grpc.RpcError`` or ``FrameError``."""

    def __init__(self, channel: grpc.Channel) -> None:
        """A call over ``channel``, begun at once."""
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method: Any = channel.stream_stream(DOCTOR_METHOD)
        self._call = method(iter(self._outbox.get, None), timeout=CALL_S)
        self._round_trip = 0.0

    def hello(self, hello: Hello) -> dict[str, Any]:
        """Greet; returns the server's welcome."""
        self._outbox.put(frame(Kind.HELLO, {"protocol": PROTOCOL, "version": __version__, **hello}))
        return self._next(Kind.WELCOME)

    def pings(self) -> tuple[float, float]:
        """Seconds there and back (median), and how far the server's clock is ahead of ours."""
        times, offsets = [], []
        for _ in range(PINGS):
            sent, at = time.time(), time.monotonic()
            head = self._ask([frame(Kind.CHUNK, {"back": 0})])
            took = time.monotonic() - at
            times.append(took)
            offsets.append(float(head.get("time", sent)) - (sent + took / 2))
        self._round_trip = statistics.median(times)
        # The quickest ping knows best at which moment the server looked at its clock.
        return self._round_trip, offsets[times.index(min(times))]

    def bandwidth(self, up: bool) -> float:
        """Bytes a second in one direction, from ever larger volleys until they take long enough."""
        size, begun = FIRST_BYTES, time.monotonic()
        while True:
            pieces = [min(PIECE_BYTES, size - at) for at in range(0, size, PIECE_BYTES)]
            volley = [
                frame(Kind.CHUNK, {"back": 0}, padding(piece))
                if up
                else frame(Kind.CHUNK, {"back": piece})
                for piece in pieces
            ]
            at = time.monotonic()
            self._ask(volley)
            now = time.monotonic()
            if size >= LAST_BYTES or now - begun > ENOUGH_S:
                # The way there and back is no transfer; it can't be all of it either.
                return size / max(now - at - self._round_trip, (now - at) / 4)
            size *= 2

    def close(self) -> None:
        """End the call."""
        self._outbox.put(frame(Kind.LEAVE))
        self._outbox.put(None)
        self._call.cancel()

    def _ask(self, frames: Sequence[bytes]) -> dict[str, Any]:
        for one in frames:
            self._outbox.put(one)
        head: dict[str, Any] = {}
        for _ in frames:
            head = self._next(Kind.CHUNK)
        return head

    def _next(self, wanted: Kind) -> dict[str, Any]:
        try:
            kind, head, _ = parse(next(self._call))
        except StopIteration:
            raise FrameError("the server ended the examination") from None
        if kind is not wanted:
            raise FrameError(f"{kind.name} came instead of {wanted.name}")
        return head


@cache
def _block() -> bytes:
    # Random, so that nothing on the way can compress it.
    return os.urandom(CHUNK_BYTES)


def padding(size: int) -> bytes:
    """Bytes that mean nothing, at most a chunk's worth."""
    return _block()[:size]
