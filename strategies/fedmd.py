"""FedMD (Li & Wang 2019, arXiv 1910.03581, algorithm 1): a consensus of class scores on public data.

Once: every client trains on the public set (where its labels are used) and on its own data. Each round:
clients tell their raw class scores Z_k on a public subset (*communicate*); the server forms the consensus
Zbar = sum_k c_k Z_k / sum_k c_k; clients approach it (*digest*) and train privately (*revisit*).
With all Z_k equal the consensus equals them to the bit; with one client and L1 digest nothing moves.

Other presets: ``dsfl`` (Itahara et al., arXiv 2008.06180) sharpens the averaged probabilities;
``selective`` (Shao et al., arXiv 2304.01731) lets clients keep silent about samples unlike their own and
leaves out what stays ambiguous.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedkit.data.partitions import Indices
from fedkit.engine.roster import Member
from fedkit.engine.strategy import Aggregated, Exchange
from fedkit.knowledge import subset
from fedkit.knowledge.consensus import Consensus, Upload
from fedkit.knowledge.reduction import NothingToAverage
from fedkit.settings import FederationSettings, Value, setting
from strategies.initial import InitialTraining
from strategies.pretraining import PretrainHyperparameters
from strategies.public_round import PublicRound
from strategies.rates import RateHyperparameters
from strategies.reducer import ConsensusHyperparameters, Reducer, check_reducer


@dataclass(frozen=True)
class FedMDHyperparameters(RateHyperparameters, PretrainHyperparameters, ConsensusHyperparameters):
    """FedMD's hyper-parameters; [P] paper, [C] the authors' code."""

    preset: str = setting(
        "default",
        "paper: the paper's values; code: the authors' code's; default: ours, for small "
        "unlabelled public sets; dsfl, selective: other methods of this shape",
        choices=("default", "paper", "code", "dsfl", "selective"),
    )
    space: str = setting(
        "logit",
        "what travels and is averaged: raw class scores, or probabilities",
        choices=("logit", "prob"),
        source="[P][C] logit",
    )
    temperature: float = setting(
        1.0,
        "softens probabilities (space=prob, digest-loss=kl)",
        above=0,
        source="[P] possible, little effect expected",
    )
    fuse: bool = setting(
        True,
        "with everybody taking part: answer the next round's subset together with the digest; "
        "the same mathematics in half the exchanges",
    )
    digest_loss: str = setting(
        "auto",
        "distance to the consensus: mean absolute or squared error, or KL divergence times "
        "temperature^2; auto: l1 for class scores, kl for probabilities",
        choices=("auto", "l1", "mse", "kl"),
        source="[C] l1",
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
    speak_about: str = setting(
        "all",
        "which public samples a client answers: all, or those resembling its own data",
        choices=("all", "resembling"),
        source="Selective-FD",
    )
    density_ratio: float = setting(
        0.5,
        "resembling: the least ratio of private to public density",
        minimum=0,
        source="ours; Selective-FD code: 0.125",
    )
    kernel_width: float = setting(
        0.3,
        "resembling: width of the kernel, in median distances between private and public samples",
        above=0,
        source="ours; Selective-FD code: 5 pixels",
    )


@dataclass
class FedMDState:
    """What FedMD remembers from round to round.

    Attributes:
        initialised: clients that had their initial training.
        ahead: the consensus of answers that came with the last digest (fused): targets (float32,
            M x C) and valid rows (bool, M); empty where there is none.
        ahead_round: the round that it is for.
        ahead_clients: those whose answers are in it.
        stopped: those that a selector stopped before they could answer; they still digest it.
    """

    initialised: list[int] = field(default_factory=list)
    ahead: list[Any] = field(default_factory=list)
    ahead_round: int = 0
    ahead_clients: list[int] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)


_PAPER: Mapping[str, Value] = {
    "digest-epochs": 1,
    "digest-batch": 256,
    "revisit-batch": 5,
    "public-labels": True,
}


class FedMD(PublicRound):
    """FedMD: clients approach a consensus of class scores on a public set (Li & Wang 2019)."""

    Hyperparameters = FedMDHyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "default": {},
        "paper": _PAPER,
        "code": {**_PAPER, "stratified": True},
        "dsfl": {"space": "prob", "aggregate": "era:0.1"},
        "selective": {"space": "prob", "speak-about": "resembling", "ambiguity": 1.0},
    }

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.state = FedMDState()
        self._initial = InitialTraining(self)
        self._reduce = Reducer(self.hyper)
        self._indices = self._next = np.empty(0, dtype=np.int64)
        self._consensus: Consensus | None = None
        self._answered: set[int] = set()
        self._told_ahead = self._fused = False

    @classmethod
    def check(cls, settings: FederationSettings, hyper: Any) -> None:
        """What travels must suit loss, aggregator and codec."""
        super().check(settings, hyper)
        check_reducer(hyper, hyper.space)

    def close(self) -> None:
        """End the worker processes."""
        self._initial.close()

    def exchanges(self) -> Sequence[Exchange]:
        """Initial training for those who had none, then communicate, then digest and revisit."""
        return [
            self._initial.exchange,
            Exchange("logits", self.configure_train, self.aggregate_train, trains=False),
            Exchange("digest", self.configure_digest, self.aggregate_digest),
        ]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the public subset and ask for class scores on it, unless all told them ahead."""
        self._indices = self.draw(server_round)
        ready = [m for m in self.members(grid) if m.client in self.state.initialised]
        state = self.state
        self._told_ahead = (
            bool(state.ahead)
            and state.ahead_round == server_round
            and state.ahead_clients == [m.client for m in ready if m.client not in state.stopped]
        )
        asked = [] if self._told_ahead else ready
        return self.ask(asked, "query.logits", server_round, self._indices)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Form the consensus; without a valid upload there is none this round."""
        if self._told_ahead:
            self._answered = set(self.state.ahead_clients)
            self._consensus = Consensus(*self.state.ahead)
        else:
            self._consensus = self._form(server_round, "logits", replies, self._indices)
        if self._consensus is not None:
            self.tell_quality(server_round, "logits", self._consensus, self._indices)
        return None, None

    def configure_digest(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the consensus to those who took part in it, and the next subset with it (fused).

        Those that a selector's probe stopped in the round before did not answer ahead, and digest it too.
        """
        settings, self._grid = self.facts.settings, grid
        last = server_round == settings.rounds
        everybody = settings.select == "all" or getattr(grid, "probed", False)
        self._fused = self.hyper.fuse and everybody and not last
        if self._consensus is None or not self._consensus.valid.any():
            self._consensus = None
            return []
        extra = {}
        if self._fused:
            self._next = self.draw(server_round + 1)
            extra["subset"] = subset.record(self._next)
        stopped = self.state.stopped if self._told_ahead else []
        present = self.learners(grid, {*self._answered, *stopped})
        return self.tell(
            present, "train.digest", server_round, self._indices, self._consensus, extra
        )

    def aggregate_digest(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Models stay on their devices; answers on the next subset make its consensus already."""
        self.state.ahead, self.state.stopped = [], []
        if self._consensus is None:
            return None, None
        watched = self.watch_digest(server_round, "digest", replies, self._consensus)
        if not self._fused:
            for _ in watched:
                continue
        else:
            ahead = self._form(server_round, "digest", watched, self._next)
            self.state.ahead = [] if ahead is None else list(ahead)
            self.state.ahead_round = server_round + 1
            self.state.ahead_clients = sorted(self._answered)
            self.state.stopped = sorted(getattr(self._grid, "stopped", ()))
        return None, None

    def _form(
        self, server_round: int, exchange: str, replies: Iterable[Message], indices: Indices
    ) -> Consensus | None:
        """The consensus of the valid uploads in some replies, folded as they come."""
        self._answered = set()

        def noted() -> Iterator[tuple[Member, Upload]]:
            for member, upload in self.uploads(server_round, exchange, replies, indices):
                self._answered.add(member.client)
                yield member, upload

        try:
            return self._reduce(noted())
        except NothingToAverage:
            return None
