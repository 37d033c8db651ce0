"""What clients do in a simulated round: train perceptrons, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from fedkit.devices.settings import SimulationSettings
from fedkit.seeds import derive, numpy_generator
from strategies.selectors import perceptrons
from strategies.selectors.perceptrons import Floats, Indices, Weights

# How far losses lie apart where nobody trains (standard deviation of the logarithm).
LOSS_SPREAD = 0.5


class Training(Protocol):
    """The local training of a round."""

    clients: list[int]

    def losses(self, epochs: int, kept: Sequence[int] | None = None) -> Mapping[int, float]:
        """Each one's mean loss in the last of so many epochs; only those ``kept`` train on."""
        ...

    def average(self, came: Sequence[int]) -> Weights:
        """The mean of those that came, as far as they have trained."""
        ...


class Untrained:
    """Losses from nowhere, and the weights that there were."""

    def __init__(self, seed: int, number: int, clients: Sequence[int], weights: Weights) -> None:
        """Losses for these clients, drawn for the seed and the round."""
        self.clients = list(clients)
        generator = numpy_generator(seed, "losses of nothing", round=number)
        drawn = np.exp(LOSS_SPREAD * generator.standard_normal(len(self.clients)))
        self._losses = dict(zip(self.clients, drawn.tolist(), strict=True))
        self._weights = weights

    def losses(self, epochs: int, kept: Sequence[int] | None = None) -> Mapping[int, float]:
        """The same however long they would train."""
        return self._losses

    def average(self, came: Sequence[int]) -> Weights:
        """What was given."""
        return self._weights


class Local:
    """The local training of one round, done as far as somebody asks for it."""

    def __init__(
        self,
        settings: SimulationSettings,
        inputs: Floats,
        labels: Indices,
        shards: Sequence[Indices],
        weights: Weights,
        number: int,
        clients: Sequence[int],
    ) -> None:
        """A round before its first step.

        Args:
            settings: the federation's.
            inputs, labels: of the training set.
            shards: which samples each client has.
            weights: that all begin with.
            number: the round's.
            clients: who takes part.
        """
        self._settings, self._inputs, self._labels = settings, inputs, labels
        self._shards, self._number = shards, number
        # The most samples first, as perceptrons want it.
        self.clients = sorted(clients, key=lambda client: (-len(shards[client]), client))
        self._stack = perceptrons.copies(weights, len(self.clients))
        self._done = 0
        self._losses: dict[int, float] = {}

    def losses(self, epochs: int, kept: Sequence[int] | None = None) -> Mapping[int, float]:
        """Each one's mean loss in the last of so many epochs; only those ``kept`` train on."""
        if kept is not None and len(kept) < len(self.clients):
            at = [place for place, client in enumerate(self.clients) if client in set(kept)]
            self.clients = [self.clients[place] for place in at]
            self._stack = perceptrons.some(self._stack, at)
        while self.clients and self._done < epochs:
            trained = perceptrons.train_epoch(
                self._stack,
                self._inputs,
                self._labels,
                [self._order(client) for client in self.clients],
                rate=self._settings.learning_rate,
                batch=self._settings.batch_size,
            )
            self._losses.update(zip(self.clients, trained.tolist(), strict=True))
            self._done += 1
        return self._losses

    def average(self, came: Sequence[int]) -> Weights:
        """The mean of those that came, as far as they have trained."""
        at = [place for place, client in enumerate(self.clients) if client in set(came)]
        counts = [len(self._shards[self.clients[place]]) for place in at]
        return perceptrons.mean(perceptrons.some(self._stack, at), counts)

    def _order(self, client: int) -> Indices:
        seed = derive(self._settings.seed, f"epoch {self._done}", client, self._number)
        shard = self._shards[client]
        order: Indices = shard[np.random.default_rng(seed).permutation(len(shard))]
        return order
