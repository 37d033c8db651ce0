"""A client of the link, whatever it works on: it joins, comes back, keeps its state, and may stay."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedkit import __version__
from fedkit.allocator import give_back_freed
from fedkit.engine.state import StateDirectory
from fedkit.errors import FedkitError, UsageError, error_of
from fedkit.link.client import Answer, LinkClient
from fedkit.security.credentials import channel_credentials, explain_tls
from fedkit.security.settings import ClientSecurity

_log = logging.getLogger(__name__)
DEFAULT_STATE = Path("fedkit-state")
# A server that was in the federation is waited for longer: it may be restarted.
FIRST_WAIT_S, AGAIN_WAIT_S = 30.0, 600.0
STAY_PAUSE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Where a client's server is, how to get there, and what to do while that is impossible.

    Attributes:
        server: HOST:PORT.
        state_dir: where it keeps its identity and state; None takes one under ``fedkit-state``.
        max_wait: seconds to go on trying while the server can't be reached; None takes 30 seconds,
            and 10 minutes once it has been in the federation.
        stay: wait for the next run when one is over, and for a server for as long as it takes.
        reset_state: move what is kept for federations aside first.
        security: TLS.
        token: the join token, if any.
    """

    server: str
    state_dir: Path | None
    max_wait: float | None = None
    stay: bool = False
    reset_state: bool = False
    security: ClientSecurity = field(default_factory=ClientSecurity)
    token: str | None = field(default=None, repr=False)


class Part(Protocol):
    """A client's part in one federation."""

    federation: str

    def fits(self, welcome: dict[str, Any]) -> bool:
        """Whether the server still says the same of the federation and of this client's part in it."""
        ...

    def work(self, key: str, buffers: list[bytes]) -> Answer:
        """Answer an instruction: from what is kept, if it was done before, else by doing it."""
        ...

    def export(self) -> None:
        """Write the own model, if there is one, as a file that anybody can read."""
        ...

    @property
    def model_path(self) -> Path | None:
        """Where the client's own model is, once it was exported."""
        ...


class _AnotherFederation(FedkitError):
    """The server that came back runs another federation than the one that this client was in."""


class LinkedClient:
    """A device, in one federation after the other; what its part in one is, a subclass says."""

    def __init__(self, connection: Connection, directory: StateDirectory) -> None:
        """A client that is not connected yet, and has ``directory`` for as long as it lives."""
        self._connection = connection
        self._directory = directory
        self._membership: Part | None = None
        self._failed = False
        if connection.reset_state:
            aside = directory.set_aside()
            if aside is not None:
                _log.warning("What was kept before is in %s.", aside)

    def name(self) -> str:
        """What the server calls it."""
        raise NotImplementedError("a client has a name")

    def config(self) -> dict[str, Any]:
        """What it expects of the federation, in its greeting."""
        raise NotImplementedError("a client says what it expects")

    def part(self, welcome: dict[str, Any]) -> Part:
        """Its part in the federation that the welcome tells of."""
        raise NotImplementedError("a client has a part")

    def run(self) -> str:
        """Take part until the run is over, or with ``stay`` until stopped; returns the last goodbye.

        Raises:
            FedkitError: refused, unreachable, or its own code failed.
        """
        try:
            identity = self._directory.identity()
            while True:
                try:
                    goodbye = self._take_part(identity)
                    if not self._connection.stay:
                        return goodbye
                    _log.warning("%s Waiting for the next.", goodbye)
                except FedkitError as error:
                    # What was typed, or this device's own failure, does not mend itself.
                    hopeless = self._failed or isinstance(error, UsageError)
                    if not self._connection.stay or hopeless:
                        raise
                    _log.warning("%s Trying again.", error)
                self._membership = None
                time.sleep(STAY_PAUSE_S * random.uniform(0.5, 1.5))
        finally:
            self._directory.close()

    @property
    def state_path(self) -> Path:
        """Where everything is kept."""
        return self._directory.path

    @property
    def model_path(self) -> Path | None:
        """Where the client's own model is, once the run is over."""
        return self._membership.model_path if self._membership else None

    def _take_part(self, identity: Mapping[str, str]) -> str:
        connection = self._connection
        hello = {
            "identity": identity["identity"],
            "secret": identity["secret"],
            "name": self.name(),
            "version": __version__,
            "config": self.config(),
            **({"token": connection.token} if connection.token else {}),
        }
        first, again = FIRST_WAIT_S, AGAIN_WAIT_S
        if connection.stay:
            first = again = math.inf
        elif connection.max_wait is not None:
            first = again = connection.max_wait
        server, security = connection.server, connection.security
        link = LinkClient(
            server,
            hello,
            max_wait=first,
            patience=again,
            on_welcome=self._take_welcome,
            credentials=lambda: channel_credentials(server, security),
            explain=lambda details: explain_tls(details, server, security),
        )
        try:
            goodbye = link.run(self._work)
        except FedkitError as error:
            raise error_of(error.exit_code, f"{error}{self._whereabouts()}") from error
        if self._membership is not None:
            self._membership.export()
        return goodbye

    def _whereabouts(self) -> str:
        """Where the model of a client is that ends before its run does."""
        try:
            if self._membership is not None:
                self._membership.export()
        except FedkitError as error:
            _log.warning("The model could not be written as a plain file: %s", error)
        return f" Its model is in {self.model_path}." if self.model_path else ""

    def _take_welcome(self, welcome: dict[str, Any]) -> None:
        before = self._membership
        if before is not None and before.federation != welcome.get("federation"):
            self._membership = None
            raise _AnotherFederation(
                "The server was started anew, with another federation: start this client again to "
                "take part in that (--stay does so by itself)."
            )
        if welcome.get("notice"):
            _log.warning("%s", str(welcome["notice"])[:500])
        try:
            if before is None or not before.fits(welcome):
                self._membership = self.part(welcome)
        except (LookupError, TypeError, ValueError) as error:
            raise FedkitError(
                f"What {self._connection.server} says of the federation makes no sense "
                f"({type(error).__name__}: {error}): is another program at that address?"
            ) from error

    def _work(self, key: str, buffers: list[bytes]) -> Answer:
        assert self._membership is not None, "instructions come after the welcome"
        answer = self._membership.work(key, buffers)
        self._failed = answer.fatal is not None
        give_back_freed()
        return answer
