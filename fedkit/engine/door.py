"""The port of a server: the link, and what else is served on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedkit import __version__
from fedkit.errors import FedkitError
from fedkit.link.doctor import doctor_handler
from fedkit.link.frames import PROTOCOL
from fedkit.link.node import Node
from fedkit.link.server import Greet, LinkServer, Part
from fedkit.link.services import Services
from fedkit.security.credentials import server_credentials
from fedkit.security.guard import Guard
from fedkit.security.settings import ServerSecurity
from fedkit.security.tokens import TokenStore
from fedkit.settings import ServerSettings


class Door:
    """A link that does not listen yet, with health checks and what `fedkit doctor` asks."""

    def __init__(
        self,
        server: ServerSettings,
        security: ServerSecurity,
        greet: Greet,
        part: Part,
        *,
        federation: str,
        about: Mapping[str, Any],
        nodes: Iterable[Node] = (),
    ) -> None:
        """The door of a federation.

        Args:
            server: how long a client is waited for, and how much it may send.
            security: TLS, and whose tokens are taken.
            greet: ``(hello, node_id) -> welcome``, or raises ``Refusal``.
            part: told when a node is gone for good.
            federation: the federation's id.
            about: what runs here, as `fedkit doctor` is told.
            nodes: those of a federation that goes on.
        """
        tokens = TokenStore(Path(security.tokens)) if security.tokens else None
        guard = Guard(tokens)
        self._about = about
        self._federation = federation
        self.public_digest: str | None = None
        self._services = Services()
        self.link = LinkServer(
            greet,
            part,
            credentials=server_credentials(security),
            guard=guard,
            nodes=nodes,
            services=[self._services.register, doctor_handler(self._report, guard)],
            grace=server.reconnect_grace,
            limit=server.max_message,
        )

    @contextmanager
    def until_over(self) -> Iterator[Callable[[str], None]]:
        """Whichever way it is left: say goodbye to everybody, and free the port.

        Yields:
            What is called with the goodbye of a run that is over.
        """
        over: list[str] = []
        goodbye = "The server ended: its own code failed."
        try:
            yield over.append
        except FedkitError as error:
            goodbye = f"The server ended: {error}"
            raise
        except KeyboardInterrupt:
            # No end of the run: a service manager shall start the devices again, as it will the server.
            goodbye = "The server was stopped before the run was over."
            raise
        finally:
            self._services.closing()
            self.link.close(over[0] if over else goodbye, ok=bool(over))

    def _report(self, hello: dict[str, Any]) -> dict[str, Any]:
        return {
            "version": __version__,
            "protocol": PROTOCOL,
            "time": time.time(),
            "federation": self._federation,
            **self._about,
            "public_digest": self.public_digest,
        }
