"""Ditto (Li et al., ICML 2021, arXiv 2012.04221, algorithm 1): a personal model beside FedAvg's global one.

The global model w is FedAvg's, to the bit. Each client k also keeps a model v_k that never travels and
minimises F_k(v) + lambda/2 ||v - w^t||^2, w^t being the global model that it was sent. With lambda = 0
v_k is what the client would have learned alone; the larger lambda, the nearer to w it stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedkit.errors import UsageError
from fedkit.settings import FederationSettings, Value, setting
from strategies.fedavg import FedAvg, FedAvgHyperparameters


@dataclass(frozen=True)
class DittoHyperparameters(FedAvgHyperparameters):
    """Ditto's hyper-parameters: FedAvg's, and how far a personal model may go its own way."""

    preset: str = setting("default", "default: everybody takes part", choices=("default",))
    lam: float = setting(
        0.1,
        "lambda, weight of a personal model's distance to the global one; 0: it learns alone",
        minimum=0,
        source="ours; the paper tunes it for each data set",
    )


class Ditto(FedAvg):
    """Ditto: FedAvg, and a personal model on each device that is held near it (Li 2021)."""

    Hyperparameters = DittoHyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Value]]] = {"default": {}}

    @classmethod
    def check(cls, settings: FederationSettings, hyper: Any) -> None:
        """A client has one personal model."""
        super().check(settings, hyper)
        if hyper.finetune_epochs:
            raise UsageError(
                "Ditto measures its own personal models: leave finetune-epochs at 0, or take "
                "--strategy fedavg."
            )
