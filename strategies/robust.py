"""Noise-robust weights: clients whose data look like a broken sensor's count less.

In the place of FedGW, of which our source gives no formula: this one is ours. After its local training each
client tells u_k = loss / H, the last epoch's mean loss over the entropy of its labels: how much of its
labels its own model could not explain, 1 - McFadden's pseudo-R^2. Noise can't be explained; data of few or
rare classes can, and H puts them on one scale. In each round r_k = u_k / median over the clients, which is
averaged over rounds, and a_k is multiplied by min(1, (1.2 / r_k)^4).

Only numbers are held, not models: a round is weighted by what was told in the rounds before it, so that a
client's first round counts whole. Where all explain their labels alike every factor is 1, exactly.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import MetricRecord, RecordDict

from fedkit.engine.events import Event
from fedkit.engine.roster import Member
from fedkit.engine.strategy import FederatedStrategy
from fedkit.flower_records import record_in
from fedkit.settings import setting

# How far above the median is usual, and how fast the weight falls beyond.
USUAL, POWER = 1.2, 4
# Fewer have no median to speak of.
FEWEST = 3
# What a client says is bounded: the median must not hang on what one can't mean.
LARGEST = 1e6


@dataclass(frozen=True)
class RobustHyperparameters:
    """Whether clients with noisy data count less."""

    robust: bool = setting(
        False,
        "weight less, beside weighting, those clients whose labels their own models explain worse than "
        "the others' do: noisy data, as a broken sensor's",
        source="ours, in FedGW's place",
    )


class NoiseWeights:
    """The factors of one round, and what it tells of the clients; always 1 if they are not wanted."""

    def __init__(self, strategy: FederatedStrategy) -> None:
        """Reads and writes ``strategy.state.noise``: by client the mean of r_k over rounds."""
        self._strategy = strategy
        hyper = strategy.hyper
        self._wanted = isinstance(hyper, RobustHyperparameters) and hyper.robust
        self._told: dict[int, float] = {}

    def factor(self, member: Member) -> float:
        """What a client's weight is multiplied by in this round."""
        return factor(self._strategy.state.noise.get(member.client, 1.0)) if self._wanted else 1.0

    def take(self, member: Member, content: RecordDict) -> None:
        """Note what a client told; who has one class only tells nothing, and is not judged."""
        told = record_in(content, "metrics", MetricRecord).get("unexplained")
        if isinstance(told, float) and 0 <= told <= LARGEST:
            self._told[member.client] = told

    def settle(self, server_round: int) -> None:
        """The round is read: remember its ratios, and tell each client's factor from now on."""
        if not self._wanted:
            return
        noise = self._strategy.state.noise
        for client, ratio in ratios(self._told).items():
            noise[client] = (noise[client] + ratio) / 2 if client in noise else ratio
            event = Event(
                "metric", server_round, "train", client, "weight_factor", factor(noise[client])
            )
            self._strategy.emit(event)


def ratios(told: Mapping[int, float]) -> dict[int, float]:
    """r_k = u_k / median of u, by client; empty where too few tell, or half of them explain everything."""
    if len(told) < FEWEST:
        return {}
    median = statistics.median(told.values())
    return {client: value / median for client, value in told.items()} if median else {}


def factor(ratio: float) -> float:
    """min(1, (1.2 / r)^4)."""
    return 1.0 if ratio <= USUAL else math.pow(USUAL / ratio, POWER)
