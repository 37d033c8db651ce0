"""The floor of ``link.py``: what any exchange over gRPC must do, and nothing more.

The same bytes in the same chunks over one held stream a client, on a connection of its own, and the same
checksums on both sides. No keys, no heads, no second chance; the chunks are never joined.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

METHOD = "/floor.Floor/Echo"
CHUNK = 1 << 20
OPTIONS = [
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.max_send_message_length", 4 << 20),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


def chunks_of(payload: bytes) -> list[bytes]:
    """The payload in pieces of one chunk."""
    return [payload[at : at + CHUNK] for at in range(0, len(payload), CHUNK)]


def server_credentials(folder: Path) -> grpc.ServerCredentials:
    """TLS with the certificate in a folder."""
    pair = (folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes()
    return grpc.ssl_server_credentials([pair])


def channel_credentials(folder: Path) -> grpc.ChannelCredentials:
    """Trust in the CA of a folder."""
    return grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes())


class Receipt:
    """Takes the chunks of one payload after the other."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._came = self._checksum = self.last_checksum = 0
        self._chunks: list[bytes] = []

    def add(self, data: bytes) -> list[bytes] | None:
        """All chunks, once the last one has come."""
        self._chunks.append(data)
        self._came += len(data)
        self._checksum = zlib.crc32(data, self._checksum)
        if self._came < self._size:
            return None
        whole = self._chunks
        self.last_checksum = self._checksum
        self._came, self._checksum, self._chunks = 0, 0, []
        return whole


def checksum_of(chunks: list[bytes]) -> int:
    """The CRC-32 of the chunks together."""
    total = 0
    for chunk in chunks:
        total = zlib.crc32(chunk, total)
    return total


def _serve(server: Any, session: Any, tls: Path | None) -> str:
    handler: Any = grpc.stream_stream_rpc_method_handler(session)
    _, service, method = METHOD.split("/")
    generic = grpc.method_handlers_generic_handler(service, {method: handler})
    server.add_generic_rpc_handlers((generic,))
    address = "127.0.0.1:0"
    if tls is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, server_credentials(tls))
    return f"127.0.0.1:{port}"


class AioServer:
    """On an event loop: a round sends to all at once, and reads until all have answered."""

    def __init__(self, size: int, tls: Path | None) -> None:
        self._size = size
        self._tls = tls
        self._payload = b""
        self._loop = asyncio.new_event_loop()
        self._streams: list[Any] = []
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def listen(self) -> str:
        """Serve on a free port."""
        return asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def count(self) -> int:
        """How many clients are connected."""
        return len(self._streams)

    def rounds(self, count: int) -> list[float]:
        """The seconds of some rounds."""
        self._payload = self._payload or os.urandom(self._size)
        return asyncio.run_coroutine_threadsafe(self._rounds(count), self._loop).result()

    async def _listen(self) -> str:
        self._server = grpc.aio.server(options=OPTIONS)
        address = _serve(self._server, self._session, self._tls)
        await self._server.start()
        return address

    async def _session(self, _: Any, context: Any) -> None:
        self._streams.append(context)
        await asyncio.Event().wait()

    async def _rounds(self, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            chunks = chunks_of(self._payload)
            checksum = checksum_of(chunks)
            exchanges = (self._exchange(stream, chunks, checksum) for stream in self._streams)
            kept = await asyncio.gather(*exchanges)
            seconds.append(time.perf_counter() - started)
            del kept
        return seconds

    async def _exchange(self, stream: Any, chunks: list[bytes], checksum: int) -> list[bytes]:
        for chunk in chunks:
            await stream.write(chunk)
        receipt = Receipt(self._size)
        whole = None
        while whole is None:
            whole = receipt.add(await stream.read())
        assert receipt.last_checksum == checksum
        return whole


class SyncServer:
    """On gRPC's synchronous server, with the threads that this takes."""

    def __init__(self, size: int, tls: Path | None) -> None:
        self._size = size
        self._tls = tls
        self._payload = b""
        self._streams: list[queue.SimpleQueue[list[bytes] | None]] = []
        self._done: queue.SimpleQueue[tuple[int, list[bytes]]] = queue.SimpleQueue()

    def listen(self) -> str:
        """Serve on a free port."""
        self._server = grpc.server(ThreadPoolExecutor(4000), options=OPTIONS)
        address = _serve(self._server, self._session, self._tls)
        self._server.start()
        return address

    def count(self) -> int:
        """How many clients are connected."""
        return len(self._streams)

    def rounds(self, count: int) -> list[float]:
        """The seconds of some rounds."""
        self._payload = self._payload or os.urandom(self._size)
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            chunks = chunks_of(self._payload)
            checksum = checksum_of(chunks)
            for outbox in self._streams:
                outbox.put(chunks)
            kept = [self._done.get() for _ in self._streams]
            assert all(came == checksum for came, _ in kept)
            seconds.append(time.perf_counter() - started)
            del kept
        return seconds

    def _session(self, requests: Iterator[bytes], _: Any) -> Iterator[bytes]:
        outbox: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
        self._streams.append(outbox)
        threading.Thread(target=self._read, args=(requests,), daemon=True).start()
        for chunks in iter(outbox.get, None):
            yield from chunks

    def _read(self, requests: Iterator[bytes]) -> None:
        receipt = Receipt(self._size)
        with contextlib.suppress(grpc.RpcError):  # the clients are gone: it is over
            for data in requests:
                if (whole := receipt.add(data)) is not None:
                    self._done.put((receipt.last_checksum, whole))


def client(address: str, size: int, tls: Path | None) -> None:
    """Echo for ever: this thread reads, gRPC's own sends."""
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    if tls is None:
        channel = grpc.insecure_channel(address, options=OPTIONS)
    else:
        channel = grpc.secure_channel(address, channel_credentials(tls), options=OPTIONS)
    receipt = Receipt(size)
    open_stream: Any = channel.stream_stream(METHOD)
    for data in open_stream(iter(outbox.get, None)):
        if (whole := receipt.add(data)) is not None:
            assert checksum_of(whole) == receipt.last_checksum
            for chunk in whole:
                outbox.put(chunk)
            del whole


async def aio_client(address: str, size: int, tls: Path | None) -> None:
    """The same on an event loop."""
    if tls is None:
        channel = grpc.aio.insecure_channel(address, options=OPTIONS)
    else:
        channel = grpc.aio.secure_channel(address, channel_credentials(tls), options=OPTIONS)
    call: Any = channel.stream_stream(METHOD)()
    receipt = Receipt(size)
    while (data := await call.read()) is not grpc.aio.EOF:
        if (whole := receipt.add(data)) is not None:
            assert checksum_of(whole) == receipt.last_checksum
            for chunk in whole:
                await call.write(chunk)
            del whole
