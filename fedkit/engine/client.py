"""The client process: one long-lived process that joins, works on instructions, and keeps its state."""

from __future__ import annotations

import logging
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedkit import __version__
from fedkit.devices.profiles import Profile
from fedkit.engine.membership import Membership
from fedkit.engine.state import StateDirectory, first_free
from fedkit.errors import FedkitError, UsageError, error_of
from fedkit.link.client import Answer, LinkClient
from fedkit.security.credentials import channel_credentials, explain_tls
from fedkit.security.settings import ClientSecurity
from fedkit.settings import DataSettings, Value

_log = logging.getLogger(__name__)
DEFAULT_STATE = Path("fedkit-state")
# Folder in the state directory for what servers have sent; all federations share it.
PUBLIC_SETS = "public-sets"
# A server that was in the federation is waited for longer: it may be restarted.
FIRST_WAIT_S, AGAIN_WAIT_S = 30.0, 600.0
STAY_PAUSE_S = 5.0


@dataclass(frozen=True)
class ClientPlan:
    """What was typed at `fedkit client`.

    Attributes:
        server: HOST:PORT.
        shard: which shard it holds; None takes the next free one.
        own_dataset: a data set of its own, of which it uses all, instead of a shard.
        memory_budget: bytes that training may take; 0: not limited.
        width: the share of the network's channels that it trains, ``auto``, or nothing for the server's.
        depth: how many stages of the network it trains, ``auto``, or nothing for all.
        time_budget: seconds that a round's local training may take; 0: not limited.
        corrupt: what its sensor suffers from, as ``fedkit.data.corruption`` reads it.
        model: its architecture; None takes the federation's.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:I`` or ``mps``.
        tags: words by which it wants to be found.
        emulate: the kind of device that it is to behave like.
        state_dir: where it keeps its identity and model; None takes one under ``fedkit-state``.
        expected: dataset, partition and num-shards as the user expects them, where given.
        data: where this machine keeps data sets.
        max_wait: seconds to go on trying while the server can't be reached; None takes 30 seconds,
            and 10 minutes once it has been in the federation.
        stay: wait for the next run when one is over, and for a server for as long as it takes.
        reset_state: move what is kept for federations aside first.
        security: TLS.
        token: the join token, if any.
    """

    server: str
    shard: int | None
    own_dataset: str | None
    memory_budget: int
    model: str | None
    device: str
    state_dir: Path | None
    expected: dict[str, Any]
    data: DataSettings
    tags: tuple[str, ...] = ()
    emulate: Profile | None = None
    width: str = ""
    depth: str = ""
    time_budget: float = 0.0
    corrupt: str = ""
    max_wait: float | None = None
    stay: bool = False
    reset_state: bool = False
    security: ClientSecurity = field(default_factory=ClientSecurity)
    token: str | None = field(default=None, repr=False)


class _AnotherFederation(FedkitError):
    """The server that came back runs another federation than the one that this client was in."""


class Client:
    """A device, in one federation after the other."""

    def __init__(self, plan: ClientPlan) -> None:
        """Take the state directory; ``FedkitError`` if another process has it."""
        self._plan = plan
        self._directory = _open_state(plan)
        self._membership: Membership | None = None
        self._failed = False
        if plan.reset_state:
            aside = self._directory.set_aside()
            if aside is not None:
                _log.warning("What was kept before is in %s.", aside)

    def run(self) -> str:
        """Take part until the run is over, or with ``stay`` until stopped; returns the last goodbye.

        Raises:
            FedkitError: refused, unreachable, or its own code failed.
        """
        try:
            while True:
                try:
                    goodbye = self._take_part()
                    if not self._plan.stay:
                        return goodbye
                    _log.warning("%s Waiting for the next.", goodbye)
                except FedkitError as error:
                    # What was typed, or this device's own failure, does not mend itself.
                    if not self._plan.stay or self._failed or isinstance(error, UsageError):
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

    def _take_part(self) -> str:
        plan, identity = self._plan, self._directory.identity()
        hello = {
            "identity": identity["identity"],
            "secret": identity["secret"],
            "name": _name(plan),
            "version": __version__,
            "config": {**plan.expected, "shard": plan.shard, "model": plan.model},
            **({"token": plan.token} if plan.token else {}),
        }
        first, again = FIRST_WAIT_S, AGAIN_WAIT_S
        if plan.stay:
            first = again = math.inf
        elif plan.max_wait is not None:
            first = again = plan.max_wait
        link = LinkClient(
            plan.server,
            hello,
            max_wait=first,
            patience=again,
            on_welcome=self._take_welcome,
            credentials=lambda: channel_credentials(plan.server, plan.security),
            explain=lambda details: explain_tls(details, plan.server, plan.security),
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
        plan, before = self._plan, self._membership
        if before is not None and before.federation != welcome.get("federation"):
            self._membership = None
            raise _AnotherFederation(
                "The server was started anew, with another federation: start this client again to "
                "take part in that (--stay does so by itself)."
            )
        if welcome.get("notice"):
            _log.warning("%s", str(welcome["notice"])[:500])
        if before is None or not before.fits(welcome):
            shard = welcome["node_config"]["partition-id"]
            _log.info("Connected to %s, shard %s.", plan.server, shard)
            node_config: dict[str, Value] = {
                "device": plan.device,
                "tags": ",".join(plan.tags),
                "data-root": plan.data.data_root,
                "allow-checksum-mismatch": plan.data.allow_checksum_mismatch,
                "own-dataset": plan.own_dataset or "",
                "memory-budget": plan.memory_budget,
                "width": plan.width,
                "depth": plan.depth,
                "time-budget": plan.time_budget,
                "corrupt": plan.corrupt,
                "public-sets": str(self._directory.path / PUBLIC_SETS),
            }
            self._membership = Membership(
                self._directory, welcome, plan.model, node_config, plan.emulate
            )

    def _work(self, key: str, buffers: list[bytes]) -> Answer:
        assert self._membership is not None, "instructions come after the welcome"
        answer = self._membership.work(key, buffers)
        self._failed = answer.fatal is not None
        return answer


def _name(plan: ClientPlan) -> str:
    if plan.own_dataset is not None:
        return "a client with data of its own"
    return "a client" if plan.shard is None else f"the client of shard {plan.shard}"


def _open_state(plan: ClientPlan) -> StateDirectory:
    if plan.state_dir is not None:
        return StateDirectory(plan.state_dir)
    if plan.shard is not None:
        return StateDirectory(DEFAULT_STATE / f"shard-{plan.shard}")
    return first_free(DEFAULT_STATE, "client")
