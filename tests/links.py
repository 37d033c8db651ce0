"""A link for tests: a real server, real clients, and clients that send what they like."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import pytest
from processes import until

from fedkit.link.client import Answer, LinkClient
from fedkit.link.frames import (
    METHOD,
    PROTOCOL,
    Assembler,
    Kind,
    Parcel,
    frame,
    message_frames,
    parse,
)
from fedkit.link.node import Lost, Refusal
from fedkit.link.server import LinkServer
from fedkit.link.spool import Reply

# Guards against hanging, not measurements.
LONG = 30.0
Work = Callable[[str, list[bytes]], Answer]


def serving(**options: Any) -> pytest.MarkDecorator:
    """A mark: the test's ``served`` has these options."""
    return pytest.mark.parametrize("served", [options], indirect=True, ids=[""])


class Served:
    """A listening server, what its two callbacks were told, and raw clients of it."""

    def __init__(self, **options: Any) -> None:
        self.greeted: list[dict[str, Any]] = []
        self.parted: list[int] = []
        self.refusal: Refusal | None = None
        self.link = LinkServer(self.greet, self.parted.append, **options)
        self.address = self.link.listen("127.0.0.1:0")
        self._raw: list[Raw] = []
        self._closed = False

    def greet(self, hello: dict[str, Any], node_id: int) -> dict[str, Any]:
        if self.refusal is not None:
            raise self.refusal
        self.greeted.append(hello)
        return {"federation": "f", "for": hello.get("name")}

    def nodes(self, count: int) -> list[int]:
        """The node ids, once there are so many."""
        until(lambda: len(self.link.node_ids()) == count, LONG)
        return self.link.node_ids()

    def connected(self, node_id: int) -> bool:
        node = self.link._ledger.node(node_id)
        return node is not None and node.session is not None

    def take(self, *keys: str, wait: float = LONG) -> dict[str, Any]:
        """Replies (as lists of bytes) to all keys, or to those that are answered in time."""
        found: dict[str, Any] = {}
        deadline = time.monotonic() + wait
        while len(found) < len(keys) and time.monotonic() < deadline:
            found |= self.link.take(set(keys) - found.keys(), deadline)
        return {k: v.take() if isinstance(v, Reply) else v for k, v in found.items()}

    def ask(self, node_id: int, key: str, *buffers: bytes) -> Any:
        """Send one instruction and wait for its reply."""
        self.link.send(node_id, key, buffers)
        return self.take(key).get(key)

    def lost(self, key: str) -> str:
        """Why there is no reply."""
        reply = self.take(key)[key]
        assert isinstance(reply, Lost)
        return reply.reason

    def raw(self) -> Raw:
        """A raw client, which is taken away before the server closes."""
        self._raw.append(Raw(self.address))
        return self._raw[-1]

    def close(self, sentence: str = "The test is over.", *, ok: bool = True) -> None:
        if not self._closed:
            self._closed = True
            for one in self._raw:
                one.vanish()
            self.link.close(sentence, ok=ok)


class Raw:
    """A client that sends what it likes; every wait of its ends by itself."""

    def __init__(self, address: str) -> None:
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        stream: Any = self._channel.stream_stream(METHOD)
        self._call = stream(iter(self._outbox.get, None), timeout=LONG / 2)

    def send(self, *data: bytes) -> Raw:
        for one in data:
            self._outbox.put(one)
        return self

    def hello(self, identity: str = "raw", **more: Any) -> Raw:
        head = {"identity": identity, "secret": "s", "protocol": PROTOCOL, **more}
        return self.send(frame(Kind.HELLO, head))

    def joined(self, identity: str = "raw", **more: Any) -> Raw:
        """This client, let in."""
        kind, self.welcome, _ = self.hello(identity, **more).receive()
        assert kind is Kind.WELCOME
        return self

    def receive(self) -> tuple[Kind, dict[str, Any], bytes]:
        kind, head, body = parse(next(self._call))
        return kind, head, bytes(body)

    def told(self) -> tuple[Kind, dict[str, Any]]:
        """The next frame, which has no body."""
        return self.receive()[:2]

    def instruction(self) -> tuple[str, list[bytes]]:
        """The next instruction, whole."""
        assembler = Assembler()
        kind, head, body = self.receive()
        assert kind is Kind.MESSAGE
        done = assembler.begin(head, memoryview(body))
        while done is None:
            done = assembler.add(memoryview(self.receive()[2]))
        assert done[1] is not None
        return done[0], done[1]

    def answer(self, key: str, *buffers: bytes) -> Raw:
        return self.send(*message_frames(key, Parcel.of(buffers)))

    def half_close(self) -> Raw:
        """Send nothing more."""
        self._outbox.put(None)
        return self

    def end(self) -> tuple[grpc.StatusCode, str]:
        """How the server ends the session."""
        with suppress(grpc.RpcError):
            for _ in self._call:
                continue
        code, details = self._call.code(), self._call.details()
        assert code is not grpc.StatusCode.DEADLINE_EXCEEDED, "the server does not end it"
        return code, details

    def vanish(self) -> None:
        self._call.cancel()
        self._channel.close()
        self._outbox.put(None)


def echo(key: str, buffers: list[bytes]) -> Answer:
    return Answer(buffers)


class Held:
    """Work that begins, and ends only when it may."""

    def __init__(self) -> None:
        self.began, self.may_end = threading.Event(), threading.Event()
        self.done: list[str] = []

    def __call__(self, key: str, buffers: list[bytes]) -> Answer:
        self.began.set()
        assert self.may_end.wait(LONG)
        self.done.append(key)
        return Answer([b"".join(buffers).upper()])


def client(address: str, identity: str = "a", max_wait: float = 5.0, **hello: Any) -> LinkClient:
    head = {"identity": identity, "secret": "s", "name": f"client {identity}", **hello}
    return LinkClient(address, head, max_wait=max_wait, on_welcome=lambda welcome: None)


def background(what: Callable[[], Any]) -> Future[Any]:
    """Do it on a thread that never keeps the tests from ending."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(what())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


_started: list[LinkClient] = []


def start(one: LinkClient, work: Work = echo) -> Future[str]:
    """Run a client beside the test."""
    _started.append(one)
    return background(lambda: one.run(work))


def stop_clients() -> None:
    """End those that still look for a server that is gone."""
    while _started:
        one = _started.pop()
        one._over.set()
        one._inbox.put(("bye", {}))


def run(one: LinkClient, work: Work = echo) -> str:
    return start(one, work).result(LONG)


def still_serves(served: Served) -> bool:
    """Whether a well-behaved newcomer is let in and answered."""
    there = set(served.link.node_ids())
    start(client(served.address, identity=f"newcomer to {len(there)}"))
    (node,) = until(lambda: set(served.link.node_ids()) - there, LONG)
    return bool(served.ask(node, f"still/{node}", b"there?") == [b"there?"])


class Proxy:
    """A TCP relay whose connections can be cut, as a network does it."""

    def __init__(self, target: str, source: str) -> None:
        host, _, port = target.rpartition(":")
        self._target, self._source = (host, int(port)), source
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._near: list[socket.socket] = []
        self._far: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target, source_address=(self._source, 0))
                self._near.append(near)
                self._far.append(far)
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._relay, args=(one, other), daemon=True).start()

    @staticmethod
    def _relay(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)

    def cut(self, *, server_notices: bool = True) -> None:
        """End all connections; without a word to the server, as when a device changes networks."""
        broken, self._near = self._near, []
        if server_notices:
            broken, self._far = [*broken, *self._far], []
        for one in broken:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def close(self) -> None:
        self._listener.close()
        self.cut()


@contextmanager
def proxied(served: Served, source: str = "127.0.0.1") -> Iterator[Proxy]:
    """The way to the server through a proxy, which has the address ``source`` to the server."""
    proxy = Proxy(served.address, source)
    try:
        yield proxy
    finally:
        proxy.close()
