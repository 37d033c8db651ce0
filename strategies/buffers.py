"""Which tensors of a network travel, and what becomes of batch normalisation's running statistics.

``average``: they travel and are averaged as weights are. ``local``: they never travel; each client keeps
its own, and the server, which has none, can't measure the network. ``static`` (HeteroFL, Diao et al. 2021):
training tracks none; before each measuring the clients tell their batches' moments (``static_norm``).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord

from fedkit.engine.strategy import Facts
from fedkit.knowledge.arrays import as_record
from fedkit.knowledge.reduction import Arrays
from fedkit.models.build import build_model
from fedkit.models.normalisation import normalisation_of, statistics_of
from fedkit.models.pretrained import from_scratch
from fedkit.settings import setting

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class BufferHyperparameters:
    """What becomes of running statistics where weights are shared."""

    buffers: str = setting(
        "average",
        "running statistics of batch normalisation: averaged as weights are; local: each client keeps "
        "its own; static: none in training, gathered from all clients before each measuring",
        choices=("average", "local", "static"),
        source="FedAvg: average; HeteroFL: static",
    )


@dataclass(frozen=True)
class Travelling:
    """Which tensors of a network go down, and which come up.

    Attributes:
        never: names of those that stay on their devices.
        down_only: names of those that clients are told and do not return.
    """

    never: Collection[str] = ()
    down_only: Collection[str] = ()

    def down(self, arrays: ArrayRecord) -> ArrayRecord:
        """Of a whole network what a client is sent."""
        if not self.never:
            return arrays
        return ArrayRecord({name: a for name, a in arrays.items() if name not in self.never})

    def up(self, sent: ArrayRecord) -> ArrayRecord:
        """Of what a client was sent what it returns."""
        if not self.down_only:
            return sent
        return ArrayRecord({name: a for name, a in sent.items() if name not in self.down_only})

    def merged(self, arrays: ArrayRecord, mean: ArrayRecord | Arrays) -> ArrayRecord:
        """A whole network with what came of what travelled, in its own order."""
        new = mean if isinstance(mean, ArrayRecord) else as_record(mean)
        return ArrayRecord({name: new.get(name, old) for name, old in arrays.items()})


def travelling(facts: Facts, spec: str, buffers: str) -> Travelling:
    """What travels of the network ``spec`` with this setting of ``buffers``."""
    if buffers == "average":
        return Travelling()
    names = statistics_of(network_of(facts, spec))
    return Travelling(never=names) if buffers == "local" else Travelling(down_only=names)


def all_but_normalisation(facts: Facts, spec: str) -> Travelling:
    """What travels of the network ``spec`` where each client keeps its normalisation layers (FedBN)."""
    return Travelling(never=normalisation_of(network_of(facts, spec)))


def network_of(facts: Facts, spec: str) -> nn.Module:
    """The network ``spec`` as this federation's clients have it, with any weights."""
    return build_model(from_scratch(spec), facts.public.shape, facts.outputs, seed=0)
