"""One model trained on everybody's private data in one place: the upper reference line.

No federation can do this, and this is why there are federations; it says what their data are worth
together. The pool is the private training data of all shards whose clients have taken part so far, cut by
the server itself; clients only measure. A round is E epochs (or so many steps) over the pool, with the
optimiser, learning rate and batches that a client of FedAvg would have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedkit.data.names import OWN
from fedkit.engine.events import Event
from fedkit.engine.strategy import Aggregated, FederatedStrategy, ServerModels, Sizes, Traffic
from fedkit.errors import UsageError
from fedkit.knowledge.arrays import from_state_dict
from fedkit.models.build import restored
from fedkit.models.losses import cross_entropy
from fedkit.models.moments import give_moments, moments_of
from fedkit.models.schedules import batch_size
from fedkit.models.training import batches_of, endless, make_optimiser, take_steps
from fedkit.registry import split
from fedkit.seeds import derive, torch_generator
from fedkit.settings import FederationSettings, Value, setting
from strategies.outer import clients_rate
from strategies.rates import OptimiserHyperparameters


@dataclass(frozen=True)
class CentralHyperparameters(OptimiserHyperparameters):
    """How the one model is trained."""

    preset: str = setting(
        "default", "default: without --alone, which trains at clients", choices=("default",)
    )
    local_epochs: int = setting(
        5, "epochs over the pooled data in a round", unit="epochs", minimum=0, source="ours"
    )
    batch_size: int = setting(16, "batch size", unit="samples", minimum=1, source="ours")
    keep_optimiser: bool = setting(
        True, "the optimiser's state goes on from round to round; false: made anew", source="ours"
    )


@dataclass
class CentralState:
    """What is remembered from round to round.

    Attributes:
        shards: those whose clients have taken part so far.
        moments: the optimiser's, by parameter and name.
    """

    shards: list[int] = field(default_factory=list)
    moments: dict[str, NDArray[Any]] = field(default_factory=dict)


class Central(FederatedStrategy):
    """Reference line: one model trained at the server on everybody's private data."""

    Hyperparameters = CentralHyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Value]]] = {"default": {"alone": False}}
    one_model = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.state = CentralState()

    @classmethod
    def check(cls, settings: FederationSettings, hyper: Any) -> None:
        """Data that the server has, and a rate that hangs on the round alone."""
        if split(settings.dataset)[0] == OWN:
            raise UsageError(
                "central trains on everybody's data at the server, which devices with data of their own "
                "keep: give a --dataset that the server has too, or take --strategy local."
            )
        if hyper.schedule == "plateau" or hyper.schedule_by == "step":
            raise UsageError(
                "central's learning rate goes by rounds: take schedule=constant, step, cosine or inverse "
                "with schedule-by=round."
            )

    @staticmethod
    def traffic(hyper: Any, sizes: Sizes) -> Traffic:
        """None."""
        return 0, 0

    def initial_arrays(self) -> ArrayRecord:
        """The model's initial weights, which FedAvg would start from too."""
        return self.facts.initial_weights(self.facts.settings.model)

    def server_models(self, arrays: ArrayRecord) -> ServerModels:
        """The model."""
        return {"global": (self.facts.settings.model, arrays)}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody; take note of whose data count."""
        here = {member.client for member in self.members(grid)}
        self.state.shards = sorted({*self.state.shards, *here})
        self._model = arrays
        return []

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Train on the pool."""
        hyper, settings = self.hyper, self.facts.settings
        pool = self.facts.pool(self.state.shards)
        size = batch_size(hyper.batch_schedule, hyper.batch_size, server_round)
        steps = hyper.local_steps or hyper.local_epochs * batches_of(len(pool), size)
        if not len(pool) or not steps:
            return None, None
        weights = self._model.to_torch_state_dict()
        model = restored(settings.model, pool.shape, self.facts.outputs, weights)
        optimiser = make_optimiser(
            hyper.optimiser,
            model,
            clients_rate(hyper, settings, server_round),
            momentum=hyper.momentum,
            decay=hyper.weight_decay,
            trust=hyper.trust_coefficient,
        )
        if hyper.keep_optimiser:
            give_moments(optimiser, self.state.moments)
        order = torch_generator(settings.seed, "central", round=server_round)
        batches = islice(endless(len(pool), size, order), steps)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(settings.seed, "central", round=server_round))
            loss = take_steps(
                model, pool, pool.labels, cross_entropy, optimiser, batches, clip=hyper.clip_norm
            )
        if hyper.keep_optimiser:
            self.state.moments = moments_of(optimiser)
        self.emit(Event("metric", server_round, "train", None, "train_loss", loss, len(pool)))
        return from_state_dict(model.state_dict()), None
