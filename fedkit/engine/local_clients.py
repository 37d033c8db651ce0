"""The clients of a run on one machine: what each is told of itself, one after the other in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedkit.data.corruption import NONE
from fedkit.engine.by_rule import ByRule
from fedkit.engine.plan import Plan, model_cycle
from fedkit.settings import Value


@dataclass(frozen=True)
class LocalClient:
    """One of them; texts are what `fedkit client` takes, empty where nothing is said.

    Attributes:
        number: which one, counted from 0; its shard.
        model: its architecture.
        width, depth: which part of the network it trains.
        time_budget: seconds.
        corrupt: what its sensor suffers from.
        emulate: the kind of device that it behaves like.
    """

    number: int
    model: str
    width: str
    depth: str
    time_budget: str
    corrupt: str
    emulate: str

    def node_config(self, plan: Plan, public_sets: Path) -> dict[str, Value]:
        """What a client that is no process of its own is told, as Flower's context holds it.

        Args:
            plan: the run's.
            public_sets: a folder for public sets that servers send.
        """
        assert plan.local is not None
        return {
            "partition-id": self.number,
            "num-partitions": plan.federation.num_shards,
            "model": self.model,
            "device": plan.local.device,
            "width": self.width,
            "depth": self.depth,
            "time-budget": float(self.time_budget or 0),
            "corrupt": "" if self.corrupt == NONE else self.corrupt,
            "public-sets": str(public_sets),
            "data-root": plan.data.data_root,
            "allow-checksum-mismatch": plan.data.allow_checksum_mismatch,
        }


def local_clients(plan: Plan) -> Sequence[LocalClient]:
    """The clients of a local plan, in order; each is made when somebody looks at it."""
    local = plan.local
    assert local is not None
    texts = (local.widths, local.depths, local.time_budgets, local.corrupt, local.emulate)
    told = [[word.strip() for word in text.split(",")] for text in texts]
    return ByRule(local.clients, partial(_client, [model_cycle(plan), *told]))


def node_configs(plan: Plan, public_sets: Path) -> Sequence[dict[str, Value]]:
    """What each client of a local plan is told (see ``LocalClient.node_config``), in order."""
    clients = local_clients(plan)
    return ByRule(len(clients), partial(_node_config, clients, plan, public_sets))


def _client(told: Sequence[Sequence[str]], number: int) -> LocalClient:
    return LocalClient(number, *(words[number % len(words)] for words in told))


def _node_config(
    clients: Sequence[LocalClient], plan: Plan, public_sets: Path, number: int
) -> dict[str, Value]:
    return clients[number].node_config(plan, public_sets)
