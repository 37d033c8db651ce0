"""The client process: one long-lived process that joins, works on instructions, and keeps its state."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from fedkit.devices.profiles import Profile
from fedkit.engine.linked import DEFAULT_STATE, Connection, LinkedClient
from fedkit.engine.membership import Membership
from fedkit.engine.state import StateDirectory, first_free
from fedkit.settings import DataSettings, Value

_log = logging.getLogger(__name__)
# Folder in the state directory for what servers have sent; all federations share it.
PUBLIC_SETS = "public-sets"


@dataclass(frozen=True, kw_only=True)
class ClientPlan(Connection):
    """What was typed at `fedkit client`, beside how it connects.

    Attributes:
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
        expected: dataset, partition and num-shards as the user expects them, where given.
        data: where this machine keeps data sets.
    """

    shard: int | None
    own_dataset: str | None
    memory_budget: int
    model: str | None
    device: str
    expected: dict[str, Any]
    data: DataSettings
    tags: tuple[str, ...] = ()
    emulate: Profile | None = None
    width: str = ""
    depth: str = ""
    time_budget: float = 0.0
    corrupt: str = ""


class Client(LinkedClient):
    """A device of a federation of fedkit's own strategies."""

    def __init__(self, plan: ClientPlan) -> None:
        """Take the state directory; ``FedkitError`` if another process has it."""
        super().__init__(plan, _open_state(plan))
        self._plan = plan

    def name(self) -> str:
        """By its shard, where it asks for one."""
        if self._plan.own_dataset is not None:
            return "a client with data of its own"
        shard = self._plan.shard
        return "a client" if shard is None else f"the client of shard {shard}"

    def config(self) -> dict[str, Any]:
        """Its shard and model, and what it expects of the data."""
        plan = self._plan
        return {**plan.expected, "shard": plan.shard, "model": plan.model}

    def part(self, welcome: dict[str, Any]) -> Membership:
        """Works on the shard that it was given."""
        plan, shard = self._plan, welcome["node_config"]["partition-id"]
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
        return Membership(self._directory, welcome, plan.model, node_config, plan.emulate)


def _open_state(plan: ClientPlan) -> StateDirectory:
    if plan.state_dir is not None:
        return StateDirectory(plan.state_dir)
    if plan.shard is not None:
        return StateDirectory(DEFAULT_STATE / f"shard-{plan.shard}")
    return first_free(DEFAULT_STATE, "client")
