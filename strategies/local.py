"""Every client alone: the lower reference line that any exchange has to beat.

Each client trains its own network, of any architecture, on its own data; nothing travels but what it
measured. With the same hyper-parameters it is, to the bit, the reference that ``--alone`` trains beside
the other strategies (but for what ``augment`` draws).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedkit.engine.strategy import Aggregated, FederatedStrategy, Sizes, Traffic
from fedkit.settings import Value, setting
from strategies.rates import OptimiserHyperparameters


@dataclass(frozen=True)
class LocalHyperparameters(OptimiserHyperparameters):
    """How a client trains alone."""

    preset: str = setting(
        "default", "default: without --alone, which would do the same again", choices=("default",)
    )
    local_epochs: int = setting(
        5, "epochs on private data in a round", unit="epochs", minimum=0, source="ours"
    )
    batch_size: int = setting(
        16, "batch size on private data", unit="samples", minimum=1, source="ours"
    )


class Local(FederatedStrategy):
    """Reference line: every client trains its own model alone, nothing is exchanged."""

    Hyperparameters = LocalHyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Value]]] = {"default": {"alone": False}}

    @staticmethod
    def traffic(hyper: Any, sizes: Sizes) -> Traffic:
        """None."""
        return 0, 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask for local training."""
        content = RecordDict({"config": self.config(server_round)})
        return self.instruct(self.members(grid), "train", server_round, lambda member: content)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Nothing to combine: models stay on their devices."""
        return None, None
