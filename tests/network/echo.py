"""The ends of an exchange of given bytes: over fedkit's link, and over a bare TCP connection.

    python echo.py tcp|link serve HOST:PORT CLIENTS BYTES ROUNDS
    python echo.py tcp|link answer HOST:PORT NAME

A round: the server sends so many bytes to each client, and each sends as many back. The server prints
the seconds of each round as JSON; the clients end with it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

PIECE = 1 << 16
# A first round that is not counted: connections open up, and code is loaded.
WARM_UP = 1


def serve_tcp(address: str, clients: int, size: int, rounds: int) -> list[float]:
    """Rounds over plain TCP: what this network lets through with nothing above it."""
    payload = os.urandom(size)

    def exchange(connection: socket.socket) -> None:
        connection.sendall(payload)
        _read(connection, size)

    with socket.create_server(_split(address)) as listener, ThreadPoolExecutor(clients) as pool:
        connections = []
        for _ in range(clients):
            connection, _peer = listener.accept()
            connection.sendall(size.to_bytes(8, "big"))
            connections.append(connection)
        return _timed(rounds, lambda: list(pool.map(exchange, connections)))


def answer_tcp(address: str, name: str) -> None:
    """Send back whatever comes, once it is whole."""
    connection = _patiently(lambda: socket.create_connection(_split(address)))
    size = int.from_bytes(_read(connection, 8), "big")
    while data := _read(connection, size):
        connection.sendall(data)


def serve_link(address: str, clients: int, size: int, rounds: int) -> list[float]:
    """Rounds over fedkit's link."""
    from fedkit.link.node import Lost
    from fedkit.link.server import LinkServer

    link = LinkServer(lambda hello, node_id: {}, lambda node_id: None)
    link.listen(address)
    payload, number = os.urandom(size), count()

    def exchange() -> None:
        keys = [f"{next(number)}" for _ in range(clients)]
        for node_id, key in zip(link.node_ids(), keys, strict=True):
            link.send(node_id, key, [payload])
        while keys:
            for key, reply in link.take(keys, None).items():
                if isinstance(reply, Lost):
                    raise SystemExit(f"an answer is lost: {reply.reason}")
                keys.remove(key)

    while len(link.node_ids()) < clients:
        time.sleep(0.05)
    seconds = _timed(rounds, exchange)
    link.close("The measurement is over.")
    return seconds


def answer_link(address: str, name: str) -> None:
    """A client of the link that sends back whatever comes."""
    from fedkit.link.client import Answer, LinkClient

    hello = {"identity": name, "secret": "", "name": name, "config": {}}
    one = LinkClient(address, hello, max_wait=120, on_welcome=lambda welcome: None)
    one.run(lambda key, data: Answer(data))


def _timed(rounds: int, exchange) -> list[float]:
    seconds = []
    for _ in range(WARM_UP + rounds):
        begin = time.perf_counter()
        exchange()
        seconds.append(time.perf_counter() - begin)
    return seconds[WARM_UP:]


def _read(connection: socket.socket, size: int) -> bytes:
    pieces, left = [], size
    while left and (data := connection.recv(min(left, PIECE))):
        pieces.append(data)
        left -= len(data)
    return b"".join(pieces)


def _patiently(connect):
    deadline = time.monotonic() + 60
    while True:
        try:
            return connect()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


if __name__ == "__main__":
    over, end, address, *rest = sys.argv[1:]
    if end == "serve":
        serve = {"tcp": serve_tcp, "link": serve_link}[over]
        print(json.dumps(serve(address, *map(int, rest))))
    else:
        {"tcp": answer_tcp, "link": answer_link}[over](address, *rest)
