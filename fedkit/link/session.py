"""One connection of one client, from its welcome to its end."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from fedkit.link.frames import (
    MAX_MESSAGE_BYTES,
    Assembler,
    FrameError,
    Garbled,
    Kind,
    frame,
    message_frames,
)
from fedkit.link.frames import parse as parse_frame
from fedkit.link.node import Node

if TYPE_CHECKING:
    from fedkit.link.ledger import Ledger

_log = logging.getLogger(__name__)
# A connection that takes not even one more chunk in this time holds up others.
STALL_S = 180.0
# Replies that come too late happen; ever more of them on one connection are an attack.
UNCALLED_FOR = 100


class Session:
    """Reads replies and writes instructions until one side ends it; lives on the event loop."""

    def __init__(self, ledger: Ledger, node: Node, context: Any, token: str, limit: int) -> None:
        """A connection that was let in.

        Args:
            ledger: whose instructions it carries.
            node: whose connection it is.
            context: gRPC's.
            token: tells one process of the device from another.
            limit: the largest message that is taken, in bytes.
        """
        self.token = token
        self._ledger = ledger
        self._node = node
        self._context = context
        self._assembler = Assembler(limit)
        self._wake = asyncio.Event()
        self._heard = asyncio.Event()
        self._ended = asyncio.Event()
        self._verdict: tuple[grpc.StatusCode, str] | None = None
        self._writing_since = math.inf
        self._urgent: deque[bytes] = deque()
        self._uncalled = 0
        self._leaving = False
        self._carried = 0
        self._wake.set()

    def wake(self) -> None:
        """There may be something to send."""
        self._wake.set()

    def end(self) -> None:
        """Another connection of the same device takes over."""
        sentence = "Another process of this device has taken over."
        self._cut(grpc.StatusCode.ALREADY_EXISTS, sentence)

    def check(self) -> None:
        """Cut it if the client takes nothing any more; called now and then."""
        if time.monotonic() - self._writing_since > STALL_S:
            _log.warning("%s takes nothing any more: its connection is cut.", self._node.name)
            self._cut(grpc.StatusCode.ABORTED, "The connection stands still.")

    def _cut(self, status: grpc.StatusCode, sentence: str) -> None:
        self._verdict = status, sentence
        self._ended.set()

    def withdraw(self, key: str) -> None:
        """Tell the client that nobody waits for that reply, and hold no more of it."""
        self._assembler.drop(key)
        self._say(Kind.WITHDRAW, {"key": key})

    async def answers(self, seconds: float) -> bool:
        """Whether the other end is alive: it is asked, and whatever it sends is a yes."""
        self._heard.clear()
        self._say(Kind.PROBE)
        try:
            await asyncio.wait_for(self._heard.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def run(self, welcome: dict[str, Any]) -> None:
        """Carry messages until the client leaves, vanishes, is sent away, or the run is over."""
        self._urgent.appendleft(frame(Kind.WELCOME, welcome))
        tasks = [
            asyncio.create_task(part) for part in (self._read(), self._write(), self._ended.wait())
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # First of all: gRPC takes no verdict while something is being written.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._verdict is not None:
            await self._context.abort(*self._verdict)
        for task in tasks:
            fault = None if task.cancelled() else task.exception()
            if fault is not None and not isinstance(fault, grpc.RpcError | grpc.aio.BaseError):
                await self._fail(fault)

    async def _fail(self, fault: BaseException) -> None:
        name = self._node.name
        if isinstance(fault, Garbled):
            _log.warning("A reply of %s came garbled: it is sent again.", name)
            await self._context.abort(grpc.StatusCode.DATA_LOSS, f"{fault}.")
        if isinstance(fault, FrameError):
            _log.warning("%s sent nonsense: %s.", name, fault)
            await self._context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{fault}.")
        sentence = f"The server's own code failed with {type(fault).__name__}: {fault}."
        _log.error("The session of %s ended: %s", name, sentence)
        _log.debug("This is where.", exc_info=fault)
        await self._context.abort(grpc.StatusCode.ABORTED, sentence)

    def _say(self, kind: Kind, head: dict[str, Any] | None = None) -> None:
        self._urgent.append(frame(kind, head))
        self._wake.set()

    async def _read(self) -> None:
        while not self._leaving:
            data = await self._context.read()
            if data is grpc.aio.EOF:
                return
            self._heard.set()
            await self._take(data)

    async def _take(self, data: bytes) -> None:
        """One frame; in a call of its own, which lets go of the reply that it may have completed."""
        self._carried += len(data)
        kind, head, body = parse_frame(data)
        complete = None
        if kind is Kind.MESSAGE:
            # A late or unasked-for reply is not held in memory, whatever its size.
            limit = self._ledger.limit_of(self._node, str(head.get("key")))
            keep = limit is not None
            complete = self._assembler.begin(
                head, body, keep=keep, limit=MAX_MESSAGE_BYTES if limit is None else limit
            )
        elif kind is Kind.CHUNK:
            complete = self._assembler.add(body)
        elif kind is Kind.LEAVE:
            self._leaving = True
            self._ledger.leaving(self._node, self)
        elif kind is not Kind.HERE:
            raise FrameError(f"a client does not send {kind.name}")
        if complete is not None:
            carried, self._carried = self._carried, 0
            await self._receive(*complete, carried)

    async def _receive(self, key: str, buffers: list[bytes] | None, carried: int) -> None:
        reply = None if buffers is None else self._ledger.spool.keep(buffers)
        del buffers
        if reply is not None and reply.is_too_much:
            # The thread goes on where this connection is cut, and then counts what it moved.
            await asyncio.shield(asyncio.to_thread(reply.write_out))
        outcome = self._ledger.answer(self._node, key, reply, carried)
        if outcome in ("late", "unasked"):
            self._uncalled += 1
            if self._uncalled > UNCALLED_FOR:
                raise FrameError(f"it sent {self._uncalled} replies that nobody waits for")
            _log.warning("A reply of %s to %s does not count: %s.", self._node.name, key, outcome)
            # Asked again while it came, it is awaited once more.
            if self._ledger.limit_of(self._node, key) is None:
                self._say(Kind.WITHDRAW, {"key": key})

    async def _write(self) -> None:
        node = self._node
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._speak()
            while node.refusal is None and node.goodbye is None and await self._send_next():
                continue
            if node.goodbye is not None:
                await self._put(frame(Kind.BYE, node.goodbye))
            if node.refusal is not None or node.goodbye is not None:
                return

    async def _send_next(self) -> bool:
        """One instruction, if there is one."""
        following = self._ledger.next_unsent(self._node, self)
        if following is None:
            return False
        key, instruction = following
        try:
            for data in message_frames(key, instruction.parcel):
                if self._node.goodbye is not None or self._node.refusal is not None:
                    break  # a slow line must hear of it before the rest of a message that is void
                self._ledger.bytes_sent[instruction.account] += len(data)
                await self._put(data)
                await self._speak()
        finally:
            self._ledger.free_slot(instruction)
        return True

    async def _speak(self) -> None:
        while self._urgent:
            await self._put(self._urgent.popleft())

    async def _put(self, data: bytes) -> None:
        self._writing_since = time.monotonic()
        await self._context.write(data)
        self._writing_since = math.inf
