"""FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm 1): one model by weighted averaging.

The global model w goes to every client of the round; each trains it on its own data and returns w_k;
w becomes sum_k a_k w_k / sum_k a_k with a_k = n_k (``weighting=examples``) or 1 (``equal``).
Normalisation statistics are averaged with the same weights, integer counters take their maximum, unless
``buffers`` says otherwise.
With one client and no local epochs w does not change by a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedkit.engine.roster import Member
from fedkit.engine.strategy import Exchange, FederatedStrategy, ServerModels, Sizes, Traffic
from fedkit.knowledge.reduction import Arrays
from fedkit.settings import FederationSettings, Value, setting
from strategies.averaging import average, received_models
from strategies.buffers import BufferHyperparameters, Travelling, travelling
from strategies.outer import OuterHyperparameters, check_outer, outer_step
from strategies.rates import OPTIMISERS, OptimiserHyperparameters
from strategies.robust import RobustHyperparameters
from strategies.static_norm import of_one
from strategies.updates import UpdateHyperparameters, check_updates, weights_traffic


@dataclass(frozen=True)
class FedAvgHyperparameters(
    OptimiserHyperparameters,
    BufferHyperparameters,
    OuterHyperparameters,
    UpdateHyperparameters,
    RobustHyperparameters,
):
    """FedAvg's hyper-parameters."""

    preset: str = setting(
        "default",
        "paper: a tenth of the clients in each round; default: all of them",
        choices=("default", "paper"),
    )
    local_epochs: int = setting(
        5, "epochs E on private data", unit="epochs", minimum=0, source="paper: 5 (also 1, 20)"
    )
    batch_size: int = setting(10, "batch size B", unit="samples", minimum=1, source="paper: 10")
    learning_rate: float = setting(
        0.01, "learning rate", above=0, source="ours; the paper searched a grid"
    )
    optimiser: str = setting("sgd", "a client's optimiser", choices=OPTIMISERS, source="paper: sgd")
    weighting: str = setting(
        "examples",
        "weight of a client: its samples, or 1",
        choices=("examples", "equal"),
        source="paper: examples",
    )
    finetune_epochs: int = setting(
        0,
        "epochs on private data, at the base learning rate, that a copy of the global model learns before "
        "each measuring as the client's own; nothing of it is sent or kept",
        unit="epochs",
        minimum=0,
        source="ours",
    )


@dataclass
class FedAvgState:
    """What FedAvg remembers.

    Attributes:
        momentum: the outer optimiser's u, by tensor (float64).
        noise: with ``robust``, by client how badly it explains its labels, beside the others.
    """

    momentum: Arrays = field(default_factory=dict)
    noise: dict[int, float] = field(default_factory=dict)


class FedAvg(FederatedStrategy):
    """FedAvg: one global model, averaged over clients weighted by samples (McMahan 2017)."""

    Hyperparameters = FedAvgHyperparameters
    one_model = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "default": {},
        "paper": {"select": "uniform:0.1"},
    }

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.state = FedAvgState()

    @classmethod
    def check(cls, settings: FederationSettings, hyper: Any) -> None:
        """An outer optimiser and a way for updates to travel that there are."""
        super().check(settings, hyper)
        check_outer(hyper)
        check_updates(hyper)

    @cached_property
    def travelling(self) -> Travelling:
        """Which tensors of the model go to clients and come back."""
        return travelling(self.facts, self.facts.settings.model, self.hyper.buffers)

    def initial_arrays(self) -> ArrayRecord:
        """The global model's initial weights, from the run's seed."""
        return self.facts.initial_weights(self.facts.settings.model)

    def server_models(self, arrays: ArrayRecord) -> ServerModels:
        """The global model; none where a part of it stays with the clients."""
        return {} if self.travelling.never else {"global": (self.facts.settings.model, arrays)}

    def before_evaluate(self) -> Sequence[Exchange]:
        """With static statistics, gather them."""
        return of_one(self, self.travelling)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send w."""
        self._global, sent = arrays, self.travelling.down(arrays)
        self._returned = self.travelling.up(sent)

        def content(member: Member) -> RecordDict:
            return RecordDict({"arrays": sent, "config": self.config_of(server_round, member)})

        return self.instruct(self.members(grid), "train", server_round, content)

    def config_of(self, server_round: int, member: Member) -> ConfigRecord:
        """What goes with a member's instruction."""
        return self.config(server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """w <- sum_k a_k w_k / sum_k a_k over the received replies, or as ``outer`` steps towards that.

        Nothing received: keep w.
        """
        received = received_models(
            self, server_round, replies, lambda member: self._returned, self.hyper.weighting
        )
        mean = average((weight, model) for _, weight, model in received)
        if mean is None:
            return None, None
        after = outer_step(self, server_round, self._global, mean)
        return self.travelling.merged(self._global, after), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every member to measure the global model, or what it is with its own part."""
        sent = self.travelling.down(arrays)
        config.update(self.config(server_round))
        return super().configure_evaluate(server_round, sent, config, grid)

    @staticmethod
    def traffic(hyper: Any, sizes: Sizes) -> Traffic:
        """The model down, its update up; of ``topk`` at most so much."""
        return weights_traffic(hyper, sizes.own)
