"""fedkit's side of ``link.py``: its server, driven as a round drives it, and clients that echo."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from link_floor import channel_credentials, server_credentials

from fedkit.link.channel import client_options
from fedkit.link.client import Answer, LinkClient
from fedkit.link.frames import METHOD, PROTOCOL, Assembler, Kind, Parcel, frame, message_frames
from fedkit.link.frames import parse as parse_frame
from fedkit.link.node import Lost
from fedkit.link.server import LinkServer

# What `fedkit client` must be told before it waits for its first instruction.
WELCOME = {"federation": "benchmark", "node_config": {"partition-id": 0}, "run_config": {}}


def resnet18() -> list[int]:
    """Bytes of the arrays of torchvision's ResNet-18 with 10 classes, as float32."""
    floats = [64 * 3 * 49, *[64] * 4]
    before = 64
    for width in (64, 128, 256, 512):
        for block in (0, 1):
            floats += [width * before * 9, *[width] * 4, width * width * 9, *[width] * 4]
            if before != width and block == 0:
                floats += [width * before, *[width] * 4]
            before = width
    return [4 * count for count in (*floats, 512 * 10, 10)]


def sizes_of(payload: int, whole: bool) -> list[int]:
    """The arrays in which a payload travels: a model's, if it has that size."""
    model = resnet18()
    return model if payload == sum(model) and not whole else [payload]


class Link:
    """A ``LinkServer``, with bytes for messages."""

    def __init__(self, size: int, tls: Path | None, whole: bool) -> None:
        self._size = size
        self._sizes = sizes_of(size, whole)
        self._payload: list[bytes] = []
        credentials = None if tls is None else server_credentials(tls)
        self.link = LinkServer(
            lambda hello, node_id: WELCOME, lambda node_id: None, credentials=credentials
        )
        self._counter = itertools.count()

    def listen(self) -> str:
        """Serve on a free port."""
        return self.link.listen("127.0.0.1:0")

    def count(self) -> int:
        """How many clients are connected."""
        return len(self.link.node_ids())

    def rounds(self, count: int) -> list[float]:
        """The seconds of some rounds."""
        self._prepare()
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            kept = self._round()
            seconds.append(time.perf_counter() - started)
            del kept
        return seconds

    def _prepare(self) -> None:
        self._payload = self._payload or [os.urandom(size) for size in self._sizes]

    def _round(self) -> Any:
        number = next(self._counter)
        parcel = Parcel.of(self._payload)
        waiting = set()
        for node_id in self.link.node_ids():
            key = f"{number}/{node_id}"
            waiting.add(key)
            self.link.send(node_id, key, parcel)
        kept = []
        while waiting:
            came = self.link.take(waiting, None)
            for reply in came.values():
                assert not isinstance(reply, Lost), reply.reason
                kept.append(reply.take())
            waiting -= came.keys()
        assert all(sum(map(len, buffers)) == self._size for buffers in kept)
        return kept


class WholeGrid(Link):
    """Flower messages with float32 arrays through ``LinkGrid.send_and_receive``."""

    def __init__(self, size: int, tls: Path | None, whole: bool) -> None:
        super().__init__(size, tls, whole)
        # Flower is not imported where bytes alone are measured.
        import flwr.app
        import numpy as np

        from fedkit.flower import take_identity
        from fedkit.link.grid import LinkGrid

        take_identity()
        self._app, self._random = flwr.app, np.random.default_rng()
        self._grid = LinkGrid(self.link, "benchmark")
        self._arrays: flwr.app.ArrayRecord | None = None

    def _prepare(self) -> None:
        if self._arrays is None:
            draw = self._random.random
            arrays = [draw(size // 4, dtype="float32") for size in self._sizes]
            self._arrays = self._app.ArrayRecord(arrays)

    def _round(self) -> Any:
        number = str(next(self._counter))
        assert self._arrays is not None
        content = self._app.RecordDict({"arrays": self._arrays})
        messages = [
            self._app.Message(content, node_id, "train", group_id=number)
            for node_id in self.link.node_ids()
        ]
        replies = list(self._grid.send_and_receive(messages))
        assert not any(reply.has_error() for reply in replies)
        return replies


Work = Callable[[str, list[bytes]], Answer]


def echo(key: str, buffers: list[bytes]) -> Answer:
    """The bytes that came."""
    return Answer(buffers)


def echo_message(key: str, buffers: list[bytes]) -> Answer:
    """The content of the Flower message that came, in a reply."""
    from flwr.app import Message

    from fedkit.flower import decode_message, encode_message

    message = decode_message(buffers)
    return Answer(encode_message(Message(message.content, reply_to=message)))


def hello() -> dict[str, Any]:
    """Somebody new."""
    identity = os.urandom(8).hex()
    return {"identity": identity, "secret": identity, "name": identity}


def client(address: str, work: Work, tls: Path | None) -> None:
    """fedkit's own client, until the server goes."""
    link = LinkClient(
        address,
        hello(),
        max_wait=60,
        on_welcome=lambda welcome: None,
        credentials=lambda: None if tls is None else channel_credentials(tls),
    )
    link.run(work)


async def aio_client(address: str, work: Work, tls: Path | None) -> None:
    """The same frames on an event loop, for hundreds in one process."""
    options = client_options(address)
    if tls is None:
        channel = grpc.aio.insecure_channel(address, options=options)
    else:
        channel = grpc.aio.secure_channel(address, channel_credentials(tls), options=options)
    call: Any = channel.stream_stream(METHOD)()
    greeting = {**hello(), "protocol": PROTOCOL, "session": os.urandom(8).hex()}
    await call.write(frame(Kind.HELLO, greeting))
    assembler = Assembler()
    while (data := await call.read()) is not grpc.aio.EOF:
        kind, head, body = parse_frame(data)
        complete = None
        if kind is Kind.MESSAGE:
            complete = assembler.begin(head, body)
        elif kind is Kind.CHUNK:
            complete = assembler.add(body)
        if complete is not None:
            key, buffers = complete
            assert buffers is not None
            for piece in message_frames(key, Parcel.of(work(key, buffers).buffers)):
                await call.write(piece)
