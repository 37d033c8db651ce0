"""The server's end of the link: one held bidirectional stream per client, served by one event loop.

The loop runs in a thread of its own; the thread that drives the rounds calls the methods of
``LinkServer``. An instruction stays pending until it is answered: a client that reconnects is sent it
again and answers from memory if it has done it already (at-least-once, with idempotent replies).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grpc
import grpc.aio

from fedkit.errors import FedkitError
from fedkit.link.channel import SERVER_OPTIONS
from fedkit.link.frames import METHOD, PROTOCOL, Assembler, FrameError, Kind, frame, message_frames
from fedkit.link.frames import parse as parse_frame
from fedkit.link.node import Instruction, Lost, Node, Refusal

_log = logging.getLogger(__name__)
RECONNECT_GRACE_S = 8.0
HELLO_WAIT_S = 10.0
TRANSFERS_IN_FLIGHT = 64


Greet = Callable[[dict[str, Any], int], dict[str, Any]]
Part = Callable[[int], None]


class LinkServer:
    """Listens, holds the clients' streams, and carries keyed messages to and fro."""

    def __init__(self, greet: Greet, part: Part) -> None:
        """A server that is not listening yet.

        Args:
            greet: ``(hello, node_id) -> welcome``, or raises ``Refusal``; called on the loop.
            part: told when a node is gone for good (it left, or did not come back in time).
        """
        self._greet = greet
        self._part = part
        self._lock = threading.Condition()
        self._nodes: dict[int, Node] = {}
        self._by_identity: dict[str, Node] = {}
        self._results: dict[str, bytearray | Lost] = {}
        self._transfers = threading.BoundedSemaphore(TRANSFERS_IN_FLIGHT)
        self._holding: set[str] = set()
        self._ended_well = True
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="link", daemon=True)
        self._server: grpc.aio.Server | None = None
        # What the link really carried, by the account that ``send`` named.
        self.bytes_received: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()

    def listen(self, address: str) -> str:
        """Bind and serve; returns the address with the port that was taken.

        Raises:
            FedkitError: the port is in use, or the address is not this machine's.
        """
        self._thread.start()
        return asyncio.run_coroutine_threadsafe(self._listen(address), self._loop).result()

    def node_ids(self) -> list[int]:
        """The nodes that are connected now or may still come back, in order of their first join."""
        with self._lock:
            return [node.node_id for node in self._nodes.values() if node.here]

    def send(self, node_id: int, key: str, buffers: Sequence[bytes], account: str = "") -> None:
        """Queue an instruction; waits while too many transfers are under way (back-pressure).

        Args:
            node_id: who gets it.
            key: what it and its reply are known by.
            buffers: its bytes.
            account: on which its bytes and its reply's are counted.
        """
        self._transfers.acquire()
        with self._lock:
            node = self._nodes.get(node_id)
            if node is None or not node.here:
                self._transfers.release()
                self._settle(key, Lost("it is not connected"))
                return
            self._holding.add(key)
            node.pending[key] = Instruction(buffers, account)
            node.unsent.append(key)
        self._loop.call_soon_threadsafe(node.wake.set)

    def take(self, keys: Iterable[str], deadline: float | None) -> dict[str, bytearray | Lost]:
        """Replies to some of ``keys``: at least one, unless the monotonic ``deadline`` has passed."""
        keys = list(keys)
        with self._lock:
            while True:
                found = {k: self._results.pop(k) for k in keys if k in self._results}
                left = None if deadline is None else deadline - time.monotonic()
                if found or (left is not None and left <= 0):
                    return found
                self._lock.wait(left)

    def withdraw(self, keys: Iterable[str]) -> None:
        """Expect no more replies to ``keys``; one that comes later is dropped."""
        with self._lock:
            gone = set(keys)
            for node in self._nodes.values():
                for key in gone & node.pending.keys():
                    self._forget(node, key)
            for key in gone:
                self._results.pop(key, None)

    def dismiss(self, node_id: int, sentence: str) -> None:
        """End a client's session with a sentence; its process ends, too."""
        refusal = Refusal(grpc.StatusCode.FAILED_PRECONDITION, sentence)
        with self._lock:
            node = self._nodes.get(node_id)
            if node is None:
                return
            node.refusal = refusal
        self._loop.call_soon_threadsafe(node.wake.set)

    def close(self, sentence: str, *, ok: bool = True) -> None:
        """Tell every client that the run is over (``ok``: as it should), and stop listening."""
        self._ended_well = ok
        asyncio.run_coroutine_threadsafe(self._close(sentence), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self, address: str) -> str:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        handler: Any = grpc.stream_stream_rpc_method_handler(self._session)
        _, service, method = METHOD.split("/")
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: handler}),)
        )
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise FedkitError(
                f"The server can't listen on {address}: another program uses that port, or the "
                "address is not this machine's; choose another with --listen."
            ) from error
        await self._server.start()
        return f"{address.rpartition(':')[0]}:{port}"

    async def _close(self, sentence: str) -> None:
        with self._lock:
            nodes = list(self._nodes.values())
        for node in nodes:
            node.goodbye = sentence
            node.wake.set()
        assert self._server is not None
        # The streams end by themselves once the goodbye is read.
        await self._server.stop(grace=3.0)

    async def _session(self, requests: Any, context: Any) -> None:
        try:
            node, welcome = await self._receive_hello(context)
        except Refusal as refusal:
            await context.abort(refusal.status, _details(refusal))
        try:
            await context.write(frame(Kind.WELCOME, welcome))
            await self._converse(node, context)
        finally:
            self._disconnect(node)
        if node.refusal is not None:
            await context.abort(node.refusal.status, _details(node.refusal))

    async def _receive_hello(self, context: Any) -> tuple[Node, dict[str, Any]]:
        bad = grpc.StatusCode.INVALID_ARGUMENT
        try:
            first = await asyncio.wait_for(context.read(), HELLO_WAIT_S)
            if first is grpc.aio.EOF:
                raise FrameError("the stream ended")
            kind, hello, _ = parse_frame(first)
        except TimeoutError:
            raise Refusal(bad, "No greeting came within 10 seconds.") from None
        except FrameError as error:
            raise Refusal(bad, f"The greeting is not fedkit's: {error}.") from None
        if kind is not Kind.HELLO or not isinstance(hello.get("identity"), str):
            raise Refusal(bad, "A session begins with a greeting.")
        if hello.get("protocol") != PROTOCOL:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"This server speaks protocol {PROTOCOL} of fedkit's link, the client "
                f"{hello.get('protocol')}: install the same version of fedkit on both.",
            )
        return self._connect(hello)

    def _connect(self, hello: dict[str, Any]) -> tuple[Node, dict[str, Any]]:
        identity, name = hello["identity"], str(hello.get("name", "a client"))
        secret, session = str(hello.get("secret", "")), str(hello.get("session", ""))
        with self._lock:
            node = self._by_identity.get(identity)
            if node is not None and not hmac.compare_digest(*map(_bytes, (node.secret, secret))):
                raise Refusal(
                    grpc.StatusCode.PERMISSION_DENIED,
                    "Another device is in this federation under this identity.",
                )
            if node is not None and node.connected and session == node.session != "":
                # The same process: its old connection broke, and this side has not noticed yet.
                assert node.task is not None
                node.task.cancel()
            elif node is not None and node.connected:
                raise Refusal(
                    grpc.StatusCode.ALREADY_EXISTS,
                    f"{node.name} is connected already: two processes use one state directory.",
                )
            node_id = node.node_id if node else len(self._by_identity) + 2  # 1 is the server
            welcome = self._greet(hello, node_id)
            if node is None:
                node = Node(node_id, identity, secret, name)
                self._nodes[node_id] = node
                self._by_identity[identity] = node
            node.connected, node.left, node.lost_at = True, False, None
            node.session, node.task = session, asyncio.current_task()
            # Sent away before: it may have been mended since, and is judged anew.
            node.refusal = None
            node.wake = asyncio.Event()
            node.unsent = list(node.pending)
            node.wake.set()
        return node, {**welcome, "node_id": node_id}

    def _disconnect(self, node: Node) -> None:
        with self._lock:
            if node.task is not asyncio.current_task():
                return  # another connection has taken over
            node.connected = False
            if node.left or node.goodbye is not None or node.refusal is not None:
                self._drop(node, "it left" if node.left else "it was sent away")
                self._part(node.node_id)
            else:
                node.lost_at = time.monotonic()
                self._loop.call_later(RECONNECT_GRACE_S, self._give_up, node, node.lost_at)
            self._lock.notify_all()

    def _give_up(self, node: Node, lost_at: float) -> None:
        with self._lock:
            if node.lost_at != lost_at:
                return
            node.lost_at = None
            self._drop(
                node, f"it vanished and did not come back in {RECONNECT_GRACE_S:.0f} seconds"
            )
        self._part(node.node_id)

    def _drop(self, node: Node, reason: str) -> None:
        for key in list(node.pending):
            self._forget(node, key)
            self._settle(key, Lost(reason))

    def _forget(self, node: Node, key: str) -> None:
        node.pending.pop(key, None)
        if key in node.unsent:
            node.unsent.remove(key)
        self._release(key)

    def _release(self, key: str) -> None:
        # A message that is sent again after a reconnect took its slot only once.
        if key in self._holding:
            self._holding.remove(key)
            self._transfers.release()

    def _settle(self, key: str, result: bytearray | Lost) -> None:
        with self._lock:
            self._results[key] = result
            self._lock.notify_all()

    async def _converse(self, node: Node, context: Any) -> None:
        reader = asyncio.create_task(self._read(node, context))
        writer = asyncio.create_task(self._write(node, context))
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            for task in (reader, writer):
                fault = task.exception() if task.done() and not task.cancelled() else None
                if isinstance(fault, FrameError):
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{fault}.")
                if fault is not None and not isinstance(fault, grpc.RpcError):
                    sentence = f"The server's own code failed with {type(fault).__name__}: {fault}."
                    _log.error("The session of %s ended: %s", node.name, sentence)
                    _log.debug("This is where.", exc_info=fault)
                    await context.abort(grpc.StatusCode.ABORTED, sentence)
        finally:
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(self, node: Node, context: Any) -> None:
        assembler, carried = Assembler(), 0
        while True:
            data = await context.read()
            if data is grpc.aio.EOF:
                return
            carried += len(data)
            kind, head, body = parse_frame(data)
            if kind is Kind.MESSAGE:
                # A late or unasked-for reply is not held in memory, whatever its size.
                key = head.get("key")
                wanted = isinstance(key, str) and key in node.pending
                complete = assembler.begin(head, keep=wanted)
            elif kind is Kind.CHUNK:
                complete = assembler.add(body)
            elif kind is Kind.LEAVE:
                node.left = True
                return
            else:
                raise FrameError(f"a client does not send {kind.name}")
            if complete is not None:
                self._receive(node, *complete, carried)
                carried = 0

    def _receive(self, node: Node, key: str, data: bytearray, carried: int) -> None:
        with self._lock:
            # Not pending: late, a duplicate, or somebody else's; none may count.
            if key in node.pending:
                self.bytes_received[node.pending[key].account] += carried
                self._forget(node, key)
                self._settle(key, data)

    async def _write(self, node: Node, context: Any) -> None:
        session = node.task
        while True:
            await node.wake.wait()
            node.wake.clear()
            while node.unsent and node.refusal is None and node.goodbye is None:
                with self._lock:
                    # Another connection may have taken over between two messages.
                    if not node.unsent or node.task is not session:
                        break
                    key = node.unsent.pop(0)
                    instruction = node.pending[key]
                try:
                    for data in message_frames(key, instruction.buffers):
                        self.bytes_sent[instruction.account] += len(data)
                        await context.write(data)
                finally:
                    with self._lock:
                        self._release(key)
            if node.refusal is not None:
                return
            if node.goodbye is not None:
                head = {"reason": node.goodbye, "ok": self._ended_well}
                await context.write(frame(Kind.BYE, head))
                return


def _details(refusal: Refusal) -> str:
    # It may quote what a stranger sent, and travels in an HTTP/2 header.
    return _bytes(str(refusal)[:1000]).decode("utf-8", errors="replace")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")
