"""The server's end of the link: one held bidirectional stream per client, served by one event loop.

The loop runs in a thread of its own; the thread that drives the rounds calls the methods of
``LinkServer``. An instruction stays pending until it is answered: a client that reconnects is sent it
again and answers from memory if it has done it already (at-least-once, with idempotent replies).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from fedkit.errors import FedkitError
from fedkit.link.channel import SERVER_OPTIONS
from fedkit.link.frames import MAX_MESSAGE_BYTES, METHOD, PROTOCOL, FrameError, Kind, Parcel
from fedkit.link.frames import parse as parse_frame
from fedkit.link.ledger import Ledger
from fedkit.link.node import Guard, Lost, Node, Refusal, hashed
from fedkit.link.session import Session
from fedkit.link.spool import Reply
from fedkit.security.credentials import peer_name, peer_warning

_log = logging.getLogger(__name__)
# Longer than a client needs to notice a silent break by itself and come back: keepalive and a pause.
RECONNECT_GRACE_S = 15.0
HELLO_WAIT_S = 10.0
PROBE_WAIT_S = 5.0
LOOK_AROUND_S = 2.0
CLOSE_WAIT_S = 2.0
WORDS, LONGEST_WORD = ("identity", "secret", "session", "name"), 200
# Streams that have not greeted yet.
GREETING_AT_ONCE, GREETING_PER_PEER = 1024, 256

Greet = Callable[[dict[str, Any], int], dict[str, Any]]
Part = Callable[[int], None]
Register = Callable[[grpc.aio.Server], None]


class LinkServer:
    """Listens, holds the clients' streams, and carries keyed messages to and fro."""

    def __init__(
        self,
        greet: Greet,
        part: Part,
        *,
        credentials: grpc.ServerCredentials | None = None,
        guard: Guard | None = None,
        nodes: Iterable[Node] = (),
        services: Sequence[Register] = (),
        grace: float = RECONNECT_GRACE_S,
        limit: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """A server that is not listening yet.

        Args:
            greet: ``(hello, node_id) -> welcome``, or raises ``Refusal``; called on the loop.
            part: told when a node is gone for good (it left, or did not come back in time).
            credentials: for TLS; without, everything travels in the clear.
            guard: who may come in at all; without, everybody.
            nodes: those of a federation that goes on, by their identity the same again.
            services: further gRPC services to serve on the same port.
            grace: seconds that a client whose connection ended has to come back.
            limit: the largest message that is taken, in bytes.
        """
        self._greet = greet
        self._part = part
        self._credentials = credentials
        self._guard = guard
        self._services = services
        self._grace = grace
        self._limit = limit
        self._ledger = Ledger(nodes)
        self._greeting: Counter[str] = Counter()
        self._to_wake: deque[Node] = deque()
        self._waking = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="link", daemon=True)
        self._server: grpc.aio.Server | None = None

    @property
    def bytes_sent(self) -> Counter[str]:
        """What the link really carried to clients, by the account that ``send`` named."""
        return self._ledger.bytes_sent

    @property
    def bytes_received(self) -> Counter[str]:
        """What it really carried from clients, for replies that counted."""
        return self._ledger.bytes_received

    @property
    def outcomes(self) -> Counter[str]:
        """How many replies were answered, lost, late, duplicate or unasked; greetings refused."""
        return self._ledger.outcomes

    def spool_in(self, folder: Path) -> None:
        """Let early replies that are too much for memory wait in ``folder``."""
        self._ledger.spool.folder = folder

    def listen(self, address: str) -> str:
        """Bind and serve; returns the address with the port that was taken.

        Raises:
            FedkitError: the port is in use, or the address is not this machine's.
        """
        self._thread.start()
        return asyncio.run_coroutine_threadsafe(self._listen(address), self._loop).result()

    def nodes(self) -> list[Node]:
        """All nodes that ever joined, in order of their first join."""
        return self._ledger.nodes()

    def node_ids(self) -> list[int]:
        """The nodes that are connected now or may still come back, in order of their first join."""
        return self._ledger.present()

    def processes(self) -> dict[int, str]:
        """The processes that are connected now, by node: another word means that it was restarted."""
        sessions = {node.node_id: node.session for node in self._ledger.nodes()}
        return {node_id: s.token for node_id, s in sessions.items() if s is not None}

    def send(
        self,
        node_id: int,
        key: str,
        parcel: Parcel | Sequence[bytes],
        account: str = "",
        deadline: float | None = None,
    ) -> None:
        """Queue an instruction; waits while too many transfers are under way (back-pressure).

        Args:
            node_id: who gets it.
            key: what it and its reply are known by.
            parcel: its bytes.
            account: on which its bytes and its reply's are counted.
            deadline: on the monotonic clock; if there is no room by then the client counts as lost.
        """
        parcel = parcel if isinstance(parcel, Parcel) else Parcel.of(parcel)
        node = self._ledger.ask(node_id, key, parcel, account, deadline)
        if node is not None:
            self._to_wake.append(node)
            # One call into the loop for all that is sent in one go.
            if not self._waking:
                self._waking = True
                self._loop.call_soon_threadsafe(self._wake_all)

    def take(self, keys: Iterable[str], deadline: float | None) -> dict[str, Reply | Lost]:
        """Results for some of ``keys``: at least one, unless the monotonic deadline has passed."""
        return self._ledger.take(set(keys), deadline)

    def withdraw(self, keys: Iterable[str]) -> None:
        """Expect no more replies to ``keys``; the clients are told, a late reply is dropped."""
        for session, key in self._ledger.withdraw(set(keys)):
            self._loop.call_soon_threadsafe(session.withdraw, key)

    def dismiss(self, node_id: int, sentence: str) -> None:
        """End a client's session with a sentence; its process ends, too."""
        node = self._ledger.node(node_id)
        if node is not None:
            node.refusal = Refusal(grpc.StatusCode.FAILED_PRECONDITION, sentence)
            self._loop.call_soon_threadsafe(_wake, node)

    def close(self, sentence: str, *, ok: bool = True) -> None:
        """Tell every client that the run is over (``ok``: as it should), and stop listening."""
        asyncio.run_coroutine_threadsafe(self._close(sentence, ok), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wake_all(self) -> None:
        self._waking = False
        while self._to_wake:
            _wake(self._to_wake.popleft())

    async def _listen(self, address: str) -> str:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        handler: Any = grpc.stream_stream_rpc_method_handler(self._serve)
        _, service, method = METHOD.split("/")
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: handler}),)
        )
        for register in self._services:
            register(self._server)
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise FedkitError(
                f"The server can't listen on {address}: another program uses that port, or the "
                "address is not this machine's; choose another with --listen."
            ) from error
        await self._server.start()
        self._loop.call_later(LOOK_AROUND_S, self._look_around)
        return f"{address.rpartition(':')[0]}:{port}"

    async def _close(self, sentence: str, ok: bool) -> None:
        for node in self._ledger.nodes():
            node.goodbye = {"reason": sentence, "ok": ok}
            _wake(node)
            if node.lost_at is not None:
                # Nobody comes back any more, and a thread may wait for its answer.
                self._ledger.give_up(node, node.lost_at, "the run ended before it came back")
        assert self._server is not None
        # The streams end by themselves once the goodbye is read.
        await self._server.stop(grace=3.0)
        # gRPC's own tasks end a little later, and complain aloud if the loop stops under them.
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        if rest:
            await asyncio.wait(rest, timeout=CLOSE_WAIT_S)

    async def _serve(self, requests: Any, context: Any) -> None:
        try:
            hello = await self._receive_hello(context)
            node, session, welcome = await self._let_in(hello, context)
        except Refusal as refusal:
            self._ledger.outcomes["refused"] += 1
            await context.abort(refusal.status, _details(refusal))
        try:
            await session.run(welcome)
        finally:
            if self._ledger.leave(node, session):
                self._part(node.node_id)
            elif node.lost_at is not None:
                self._loop.call_later(self._grace, self._give_up, node, node.lost_at)
        if node.refusal is not None:
            await context.abort(node.refusal.status, _details(node.refusal))

    async def _receive_hello(self, context: Any) -> dict[str, Any]:
        """The greeting of a stream, which must come soon and be ours; else ``Refusal``."""
        bad, peer = grpc.StatusCode.INVALID_ARGUMENT, str(context.peer()).rpartition(":")[0]
        self._check_crowd(peer)
        self._greeting[peer] += 1
        try:
            async with asyncio.timeout(HELLO_WAIT_S):
                first = await context.read()
            if first is grpc.aio.EOF:
                raise FrameError("the stream ended")
            kind, hello, _ = parse_frame(first)
        except TimeoutError:
            # An honest client on a bad line: it shall try again.
            sentence = f"No greeting came within {HELLO_WAIT_S:.0f} seconds."
            raise Refusal(grpc.StatusCode.ABORTED, sentence) from None
        except FrameError as error:
            raise Refusal(bad, f"The greeting is not fedkit's: {error}.") from None
        finally:
            self._greeting[peer] -= 1
            if not self._greeting[peer]:
                del self._greeting[peer]
        if kind is not Kind.HELLO or not all(_is_word(hello, name) for name in WORDS):
            raise Refusal(bad, "A session begins with a greeting: who it is, in plain words.")
        if hello.get("protocol") != PROTOCOL:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"This server speaks protocol {PROTOCOL} of fedkit's link, the client "
                f"{hello.get('protocol')}: install the same version of fedkit on both.",
            )
        return hello

    def _check_crowd(self, peer: str) -> None:
        crowded = (
            self._greeting.total() >= GREETING_AT_ONCE
            or self._greeting[peer] >= GREETING_PER_PEER
            or (self._guard is not None and not self._guard.allows(peer))
        )
        if crowded:
            sentence = "Too many devices knock at the same time: try again in a few seconds."
            raise Refusal(grpc.StatusCode.ABORTED, sentence)

    async def _let_in(
        self, hello: dict[str, Any], context: Any
    ) -> tuple[Node, Session, dict[str, Any]]:
        identity, name = hello["identity"], hello.get("name", "a client")
        secret, process = hello.get("secret", ""), hello.get("session", "")
        certificate = peer_name(context.auth_context())
        token = self._guard(hello, certificate) if self._guard is not None else None
        node = self._ledger.find(identity)
        if node is not None:
            node.check_owner(secret, certificate)
            await self._make_way(node, process)
        # From here on nothing else runs on the loop until the node is entered.
        node = self._ledger.find(identity)
        node_id = node.node_id if node is not None else self._ledger.next_id()
        welcome = self._greet(hello, node_id)
        if node is None:
            node = Node(node_id, identity, hashed(secret), name, certificate)
        node.name, node.token = name, token
        session = Session(self._ledger, node, context, process, self._limit)
        if node.session is not None:
            node.session.end()
        self._ledger.enter(node, session)
        # A device that nobody can reach should say by itself that its certificate will end.
        notice = peer_warning(context.auth_context()) if certificate is not None else None
        if notice is not None:
            _log.warning("%s: %s", name, notice)
        return node, session, {**welcome, "node_id": node_id, "notice": notice}

    async def _make_way(self, node: Node, process: str) -> None:
        """Let the same process come back at once; another one only where the first is dead."""
        # Another connection may come in while this one waits.
        while (session := node.session) is not None and not process == session.token != "":
            if await session.answers(PROBE_WAIT_S):
                raise Refusal(
                    grpc.StatusCode.ALREADY_EXISTS,
                    f"{node.name} is connected already: two processes use one state directory.",
                )
            if node.session is session:
                return  # it broke without a word, and bars nobody

    def _give_up(self, node: Node, lost_at: float) -> None:
        reason = f"it vanished and did not come back in {self._grace:g} seconds"
        if self._ledger.give_up(node, lost_at, reason):
            self._part(node.node_id)

    def _look_around(self) -> None:
        for node in self._ledger.nodes():
            if node.session is None:
                continue
            node.session.check()
            if self._guard and node.token is not None and self._guard.revoked(node.token):
                self.dismiss(node.node_id, "This device's join token was revoked.")
        self._loop.call_later(LOOK_AROUND_S, self._look_around)


def _wake(node: Node) -> None:
    if node.session is not None:
        node.session.wake()


def _is_word(hello: dict[str, Any], name: str) -> bool:
    """Whether that part of a greeting, which ends up in logs and files, is a short plain text."""
    text = hello.get(name, None if name == "identity" else "")
    return isinstance(text, str) and text.isprintable() and len(text) <= LONGEST_WORD


def _details(refusal: Refusal) -> str:
    # It may quote what a stranger sent, and travels in an HTTP/2 header.
    text = str(refusal)[:1000].encode("utf-8", errors="surrogatepass")
    return text.decode("utf-8", errors="replace")
