"""A TCP relay between clients and server whose connections can be cut, and healed."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Proxy:
    """Listens on a port of its own and relays to ``target``."""

    def __init__(self, target: int) -> None:
        """``target``: the server's port on this machine; it may come and go."""
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._near: list[socket.socket] = []
        self._far: list[socket.socket] = []
        self._is_cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *, server_notices: bool) -> None:
        """End all connections, and let no new one through; without a word to the server if asked."""
        with self._lock:
            self._is_cut = True
            broken, self._near = self._near, []
            if server_notices:
                broken, self._far = [*broken, *self._far], []
        for one in broken:
            _end(one)

    def heal(self) -> None:
        """Relay again."""
        with self._lock:
            self._is_cut = False

    def close(self) -> None:
        """End everything."""
        _end(self._listener)
        self.cut(server_notices=True)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            _end(near)
            return
        with self._lock:
            refused = self._is_cut
            if not refused:
                self._near.append(near)
                self._far.append(far)
        if refused:
            _end(near)
            _end(far)
            return
        threading.Thread(target=self._relay, args=(far, near), daemon=True).start()
        self._relay(near, far)

    def _relay(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        with self._lock:
            silent = one not in self._near and one not in self._far
        # A connection that was cut without a word stays open at the other end.
        if not silent:
            _end(one)
            _end(other)


def _end(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
