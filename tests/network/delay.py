"""A network switch in user space whose ports delay and lose frames, where the kernel has no netem.

    python delay.py PORT [PORT ...]

It carries Ethernet frames between the given interfaces. What a port does to the frames that pass it,
either way, is told on standard input, one JSON object a line, and answered with "done":

    {"port": "p1", "delay_ms": 50, "jitter_ms": 5, "loss_percent": 1}

It ends with its standard input. Linux and CAP_NET_RAW; nothing beyond the standard library.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import random
import select
import socket
import sys
import time
from collections import defaultdict
from dataclasses import dataclass

# From asm/socket.h, linux/if_packet.h and linux/if_ether.h.
SO_RCVBUFFORCE = 33
SOL_PACKET = 263
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
ETH_P_ALL = 3
# A virtio header of 10 bytes stands before each frame: it says which checksums are still to be made.
HEADER = 10
LARGEST = HEADER + (1 << 16)
BATCH = 64


@dataclass
class Port:
    """One interface, and what it does to frames."""

    socket: socket.socket
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss_percent: float = 0.0

    def shape(self, *, delay_ms: float, jitter_ms: float, loss_percent: float) -> None:
        """Treat frames so from now on; those under way are not touched."""
        self.delay_ms, self.jitter_ms, self.loss_percent = delay_ms, jitter_ms, loss_percent

    def loses(self, dice: random.Random) -> bool:
        """Whether the next frame is lost here."""
        return dice.uniform(0, 100) < self.loss_percent

    def seconds(self, dice: random.Random) -> float:
        """How long the next frame takes here."""
        return max(0.0, dice.gauss(self.delay_ms, self.jitter_ms)) / 1000


class Switch:
    """Carries frames between ports; frames from one port to another stay in order."""

    def __init__(self, names: list[str]) -> None:
        """A switch of these interfaces."""
        self._ports = {name: Port(_raw_socket(name)) for name in names}
        self._by_fd = {port.socket.fileno(): port for port in self._ports.values()}
        self._home: dict[bytes, Port] = {}
        self._under_way: list[tuple[float, int, Port, bytes]] = []
        self._last: defaultdict[tuple[int, int], float] = defaultdict(float)
        self._number = itertools.count()
        self._dice = random.Random(1)
        self._commands = b""

    def carry(self) -> None:
        """Until standard input ends."""
        sources = [0, *self._by_fd]
        while True:
            wait = max(0.0, self._under_way[0][0] - time.monotonic()) if self._under_way else None
            ready, _, _ = select.select(sources, [], [], wait)
            for source in ready:
                if source != 0:
                    self._take(self._by_fd[source])
                elif not self._obey():
                    return
            self._deliver()

    def _obey(self) -> bool:
        data = os.read(0, 1 << 16)
        *lines, self._commands = (self._commands + data).split(b"\n")
        for line in lines:
            command = json.loads(line)
            self._ports[command.pop("port")].shape(**command)
            os.write(1, b"done\n")
        return bool(data)

    def _take(self, port: Port) -> None:
        for _ in range(BATCH):
            try:
                frame = port.socket.recv(LARGEST)
            except BlockingIOError:
                return
            target, source = frame[HEADER : HEADER + 6], frame[HEADER + 6 : HEADER + 12]
            self._home[source] = port
            home = self._home.get(target)
            others = (other for other in self._ports.values() if other is not port)
            for other in others if home is None else (home,):
                self._send_off(frame, port, other)

    def _send_off(self, frame: bytes, source: Port, target: Port) -> None:
        if source.loses(self._dice) or target.loses(self._dice):
            return
        pair = source.socket.fileno(), target.socket.fileno()
        takes = source.seconds(self._dice) + target.seconds(self._dice)
        due = max(self._last[pair], time.monotonic() + takes)
        self._last[pair] = due
        heapq.heappush(self._under_way, (due, next(self._number), target, frame))

    def _deliver(self) -> None:
        while self._under_way and self._under_way[0][0] <= time.monotonic():
            _, _, port, frame = heapq.heappop(self._under_way)
            try:
                port.socket.send(frame)
            except OSError:
                # The interface is down, or its queue is full: such a frame is lost on a real network too.
                continue


def _raw_socket(name: str) -> socket.socket:
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    raw.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
    raw.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    raw.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    raw.bind((name, ETH_P_ALL))
    raw.setblocking(False)
    return raw


if __name__ == "__main__":
    Switch(sys.argv[1:]).carry()
