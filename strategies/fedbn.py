"""FedBN (Li et al. 2021, arXiv 2102.07623, algorithm 1): FedAvg without the normalisation layers.

Every client keeps the scales, shifts and statistics of its normalisation layers, which are told by their
type; all other tensors are FedAvg's. The paper is about batch normalisation; group and layer normalisation
stay as well. What a client then has is a network of its own, and is measured so; the server, which has no
normalisation layers, measures and saves none. For a network without them this is FedAvg.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedkit.engine.strategy import Sizes, Traffic
from fedkit.settings import setting
from strategies.buffers import Travelling, all_but_normalisation
from strategies.fedavg import FedAvg, FedAvgHyperparameters
from strategies.updates import weights_traffic


@dataclass(frozen=True)
class FedBNHyperparameters(FedAvgHyperparameters):
    """FedAvg's, but for the statistics, which are each client's own."""

    buffers: str = setting(
        "local",
        "normalisation layers stay with their clients, statistics and all",
        choices=("local",),
        source="paper",
    )


class FedBN(FedAvg):
    """FedBN: FedAvg, with each client's normalisation layers its own (Li 2021)."""

    Hyperparameters = FedBNHyperparameters

    @cached_property
    def travelling(self) -> Travelling:
        """All but the normalisation layers."""
        return all_but_normalisation(self.facts, self.facts.settings.model)

    @staticmethod
    def traffic(hyper: Any, sizes: Sizes) -> Traffic:
        """FedAvg's, of a network without normalisation layers."""
        left = sizes.own.bytes - 4 * sum(map(math.prod, sizes.own.normalisation))
        return weights_traffic(hyper, sizes.own._replace(bytes=left, normalisation=()))
