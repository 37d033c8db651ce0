"""FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm 1): one model by weighted averaging.

The global model w goes to every client of the round; each trains it on its own data and returns w_k;
w becomes sum_k a_k w_k / sum_k a_k with a_k = n_k (``weighting=examples``) or 1 (``equal``).
Normalisation statistics are averaged with the same weights, integer counters take their maximum.
With one client and no local epochs w does not change by a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedkit.engine.strategy import FederatedStrategy, Traffic
from fedkit.knowledge.arrays import read_array
from fedkit.knowledge.reduction import NothingToAverage, weighted_mean
from fedkit.settings import Value, setting


@dataclass(frozen=True)
class FedAvgHyperparameters:
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
        0.01, "learning rate of SGD", above=0, source="ours; the paper searched a grid"
    )
    momentum: float = setting(0.0, "momentum of SGD", minimum=0, maximum=0.999, source="paper: 0")
    weighting: str = setting(
        "examples",
        "weight of a client: its samples, or 1",
        choices=("examples", "equal"),
        source="paper: examples",
    )


class FedAvg(FederatedStrategy):
    """FedAvg: one global model, averaged over clients weighted by samples (McMahan 2017)."""

    Hyperparameters = FedAvgHyperparameters
    one_model = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "default": {},
        "paper": {"select": "uniform:0.1"},
    }

    def initial_arrays(self) -> ArrayRecord:
        """The global model's initial weights, from the run's seed."""
        return self.facts.initial_arrays()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send w."""
        content = RecordDict({"arrays": arrays, "config": self.config(server_round)})
        self._global = arrays
        return self.instruct(self.members(grid), "train", server_round, lambda member: content)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """w <- sum_k a_k w_k / sum_k a_k over the received replies; nothing received: keep w."""
        try:
            mean = weighted_mean(self._received(server_round, replies))
        except NothingToAverage:
            return None, None
        return ArrayRecord({name: Array(mean[name]) for name in self._global}), None

    @staticmethod
    def traffic(hyper: Any, model_bytes: int, outputs: int, public: int, codec: str) -> Traffic:
        """The model, both ways."""
        return model_bytes, model_bytes

    def _received(
        self, server_round: int, replies: Iterable[Message]
    ) -> Iterator[tuple[float, dict[str, NDArray[np.generic]]]]:
        for member, content in self.answers(replies):
            try:
                weight = 1.0 if self.hyper.weighting == "equal" else _examples(content)
                yield weight, _arrays(content, self._global)
            except ValueError as reason:
                self.reject(server_round, "train", member, reason)


def _examples(content: RecordDict) -> float:
    record = content.metric_records.get("metrics", MetricRecord())
    examples = record.get("num-examples")
    if not isinstance(examples, int) or examples < 0:
        raise ValueError(f"it says that it has {examples!r} samples")
    return float(examples)


def _arrays(content: RecordDict, wanted: ArrayRecord) -> dict[str, NDArray[np.generic]]:
    """The arrays of a reply; ``ValueError`` unless they are shaped like ``wanted`` and finite."""
    record = content.array_records.get("arrays")
    if record is None or list(record) != list(wanted):
        raise ValueError("it is not the global model's state dict")
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, array in record.items():
        values, model = read_array(name, array), wanted[name]
        if values.shape != tuple(model.shape) or str(values.dtype) != model.dtype:
            raise ValueError(
                f"{name} is {values.dtype} {values.shape}, not {model.dtype} {tuple(model.shape)}"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"{name} is not finite")
        arrays[name] = values
    return arrays
