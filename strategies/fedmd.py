"""FedMD (Li & Wang 2019, arXiv 1910.03581, algorithm 1): a consensus of class scores on public data.

Once: every client trains on the public set (where its labels are used) and on its own data. Each round:
clients tell their raw class scores Z_k on a public subset (*communicate*); the server forms the consensus
Zbar = sum_k c_k Z_k / sum_k c_k; clients approach it (*digest*) and train privately (*revisit*).
With all Z_k equal the consensus equals them to the bit; with one client and L1 digest nothing moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedkit.engine.strategy import Aggregated, Exchange
from fedkit.errors import UsageError
from fedkit.knowledge.codecs import Logits
from fedkit.knowledge.reduction import NothingToAverage, weighted_mean
from fedkit.settings import FederationSettings, Value, setting
from strategies.public_round import PublicRound


@dataclass(frozen=True)
class FedMDHyperparameters:
    """FedMD's hyper-parameters; [P] paper, [C] the authors' code."""

    preset: str = setting(
        "default",
        "paper: the paper's values; code: the authors' code's; default: ours, for small "
        "unlabelled public sets",
        choices=("default", "paper", "code"),
    )
    public_samples: int = setting(
        5000,
        "size M of a round's public subset (all, if there are fewer)",
        unit="samples",
        minimum=1,
        source="[P][C] 5000",
    )
    stratified: bool = setting(
        False,
        "draw the subset by public label (needs public-labels)",
        source="[C] true, [P] uniform",
    )
    weighting: str = setting(
        "equal",
        "weight c_k of a client: 1, or its samples",
        choices=("equal", "examples"),
        source="[P] 1/N",
    )
    space: str = setting(
        "logit",
        "what is averaged: raw class scores, or probabilities",
        choices=("logit", "prob"),
        source="[P][C] logit",
    )
    temperature: float = setting(
        1.0,
        "softens probabilities when space=prob",
        above=0,
        source="[P] possible, little effect expected",
    )
    digest_epochs: int = setting(
        5, "epochs on the consensus", unit="epochs", minimum=0, source="[C] 1; default: ours"
    )
    digest_batch: int = setting(
        64, "batch size of digest", unit="samples", minimum=1, source="[C] 256; default: ours"
    )
    revisit_epochs: int = setting(
        4, "epochs on private data", unit="epochs", minimum=0, source="[C] 4"
    )
    revisit_batch: int = setting(
        16, "batch size of revisit", unit="samples", minimum=1, source="[C] 5; default: ours"
    )
    learning_rate: float = setting(0.001, "learning rate of Adam", above=0, source="[P][C] 0.001")
    pretrain_epochs: int = setting(
        20,
        "epochs on the public set before the first round (needs public-labels)",
        unit="epochs",
        minimum=0,
        source="[C] at most 20",
    )
    pretrain_batch: int = setting(
        128, "batch size of that", unit="samples", minimum=1, source="[C] 128"
    )
    init_epochs: int = setting(
        25,
        "epochs on private data before the first round",
        unit="epochs",
        minimum=0,
        source="[C] at most 25",
    )
    init_batch: int = setting(32, "batch size of that", unit="samples", minimum=1, source="[C] 32")
    init_patience: int = setting(
        10,
        "stop that after so many epochs without a better validation "
        "accuracy (needs val-fraction; 0: never)",
        unit="epochs",
        minimum=0,
        source="[C] 10",
    )


_PAPER: Mapping[str, Value] = {
    "digest-epochs": 1,
    "digest-batch": 256,
    "revisit-batch": 5,
    "public-labels": True,
}


def consensus(uploads: Iterable[tuple[float, Logits]]) -> Logits:
    """Zbar = sum_k c_k Z_k / sum_k c_k (float32, M x C), folded in float64.

    Args:
        uploads: weight c_k and scores Z_k (float32, M x C) of each client, in client order.

    Raises:
        NothingToAverage: nobody answered.
    """
    mean = weighted_mean((weight, {"scores": scores}) for weight, scores in uploads)
    return mean["scores"].astype(np.float32)


class FedMD(PublicRound):
    """FedMD: clients approach a consensus of class scores on a public set (Li & Wang 2019)."""

    Hyperparameters = FedMDHyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "default": {},
        "paper": _PAPER,
        "code": {**_PAPER, "stratified": True},
    }

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._initialised: set[int] = set()
        self._consensus: Logits | None = None
        self._answered: set[int] = set()

    @classmethod
    def check(cls, settings: FederationSettings, hyper: Any) -> None:
        """Drawing by public label needs public labels."""
        if hyper.stratified and not settings.public_labels:
            raise UsageError(
                "stratified draws the subset by public label: set public-labels=true as well, or "
                "stratified=false."
            )

    def exchanges(self) -> Sequence[Exchange]:
        """Initial training for those who had none, then communicate, then digest and revisit."""
        return [
            Exchange("init", self.configure_init, self.aggregate_init),
            Exchange("logits", self.configure_train, self.aggregate_train),
            Exchange("digest", self.configure_digest, self.aggregate_digest),
        ]

    def configure_init(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients that are new for their initial training."""
        new = [m for m in self.members(grid) if m.client not in self._initialised]
        content = RecordDict({"config": self.config(server_round)})
        return self.instruct(new, "train.init", server_round, lambda member: content)

    def aggregate_init(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Remember who is ready."""
        self._initialised |= {member.client for member, _ in self.answers(replies)}
        return None, None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the public subset and ask for class scores on it."""
        strata = self.facts.public_labels if self.hyper.stratified else None
        drawn = self.draw_subset(server_round, strata=strata)
        content = RecordDict({"subset": drawn, "config": self.config(server_round)})
        ready = [m for m in self.members(grid) if m.client in self._initialised]
        return self.instruct(ready, "query.logits", server_round, lambda member: content)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Form the consensus; without a valid upload there is none this round."""
        self._answered = set()
        try:
            self._consensus = consensus(self._weighted(server_round, replies))
        except NothingToAverage:
            self._consensus = None
        return None, None

    def configure_digest(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the consensus to those who took part in it."""
        if self._consensus is None:
            return []
        content = self.target("consensus", server_round, self._consensus)
        present = [m for m in self.members(grid) if m.client in self._answered]
        return self.instruct(present, "train.digest", server_round, lambda member: content)

    def aggregate_digest(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Nothing to combine: models stay on their devices."""
        return None, None

    def _weighted(
        self, server_round: int, replies: Iterable[Message]
    ) -> Iterable[tuple[float, Logits]]:
        for member, scores in self.uploads(server_round, "logits", replies):
            self._answered.add(member.client)
            yield (1.0 if self.hyper.weighting == "equal" else float(member.examples)), scores
