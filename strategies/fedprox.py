"""FedProx (Li et al., MLSys 2020, arXiv 1812.06127, algorithm 2): FedAvg, pulled, with partial work.

Client k minimises F_k(w) + mu/2 ||w - w^t||^2 from w^t, for as many of the E epochs as it can; who does
less is averaged like the others, where FedAvg drops them (``stragglers=drop``). With ``mu=0`` and
``work=full`` this is FedAvg to the bit.

The paper draws clients with probability n_k/n and takes the plain mean of their models; its code draws
them uniformly and weights by n_k. Both are presets: one half of each would count n_k twice or not at all.
(Where the paper draws with replacement, ``weighted`` draws without.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedkit.engine.events import Event
from fedkit.engine.roster import Member
from fedkit.errors import UsageError
from fedkit.flower_records import record_in
from fedkit.seeds import numpy_generator
from fedkit.settings import FederationSettings, Value, setting
from strategies.fedavg import FedAvg, FedAvgHyperparameters, FedAvgState
from strategies.robust import LARGEST

STEP, FALLS = 0.1, 5


@dataclass(frozen=True)
class FedProxHyperparameters(FedAvgHyperparameters):
    """FedAvg's hyper-parameters, the pull, and who does how much; [P] paper, [C] its code."""

    preset: str = setting(
        "default",
        "paper: clients drawn by their samples, plain mean; code: drawn uniformly, weighted by samples; "
        "both a tenth of them and 20 epochs; default: all of them, as FedAvg's",
        choices=("default", "paper", "code"),
    )
    mu: float = setting(
        0.1,
        "mu, weight of the distance to the global model; 0: FedAvg",
        minimum=0,
        source="[P] the best of 0.001, 0.01, 0.1, 1 for each data set",
    )
    adaptive_mu: bool = setting(
        False,
        "begin with mu; add 0.1 when the global model's training loss has risen, take 0.1 off when it has "
        "fallen 5 times in a row",
        source="[P] off",
    )
    work: str = setting(
        "full",
        "how many of the E epochs a client does: full; fixed:0.5,1: such shares of them, cycled over "
        "clients; stragglers:0.9: in each round that share of the clients draws 1 to E; budget: what fits "
        "into a client's own --time-budget",
        source="[P] stragglers:0, 0.5, 0.9; [C] these draw 1 to E - 1",
    )
    stragglers: str = setting(
        "keep",
        "models of clients that did less than E epochs are averaged, or dropped as FedAvg drops them",
        choices=("keep", "drop"),
        source="[P] keep",
    )


@dataclass
class FedProxState(FedAvgState):
    """What FedProx remembers with ``adaptive-mu``.

    Attributes:
        mu: that of the next round.
        loss: the global model's training loss, as last told.
        falls: how many times in a row it has fallen.
    """

    mu: float = 0.0
    loss: float = math.nan
    falls: int = 0


_PAPER: Mapping[str, Value] = {
    "local-epochs": 20,
    "batch-size": 10,
    "mu": 1.0,
    "learning-rate": 0.03,
    "rounds": 200,
}


class FedProx(FedAvg):
    """FedProx: FedAvg with a proximal term, for clients that do unequal work (Li 2020)."""

    Hyperparameters = FedProxHyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "default": {},
        "paper": {**_PAPER, "select": "weighted:0.1", "weighting": "equal"},
        "code": {**_PAPER, "select": "uniform:0.1", "weighting": "examples"},
    }

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.state = FedProxState(mu=self.hyper.mu)

    @classmethod
    def check(cls, settings: FederationSettings, hyper: Any) -> None:
        """Work that there is, counted in epochs."""
        super().check(settings, hyper)
        kind, _ = read_work(hyper.work)
        if kind != "full" and (hyper.local_steps or not hyper.local_epochs):
            raise UsageError(
                f"work={hyper.work} is counted in epochs: give local-epochs, and no local-steps."
            )

    def config(self, server_round: int) -> ConfigRecord:
        """With the present mu."""
        mu = self.state.mu if self.hyper.adaptive_mu else self.hyper.mu
        return ConfigRecord({**super().config(server_round), "mu": mu})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send w^t, mu, and to each how many epochs it is to do."""
        self._epochs = self._granted(server_round, [one.client for one in self.members(grid)])
        return super().configure_train(server_round, arrays, config, grid)

    def config_of(self, server_round: int, member: Member) -> ConfigRecord:
        """With the member's epochs."""
        epochs = self._epochs[member.client]
        return ConfigRecord({**self.config(server_round), "local-epochs": epochs})

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As FedAvg, with or without the stragglers."""
        self._losses: list[tuple[float, float]] = []
        aggregated = super().aggregate_train(server_round, self._counting(server_round, replies))
        weights = math.fsum(weight for weight, _ in self._losses)
        if weights:
            loss = math.fsum(weight * loss for weight, loss in self._losses) / weights
            self.state = adapted(self.state, loss)
            self.emit(Event("metric", server_round, "train", None, "mu", self.state.mu))
        return aggregated

    def _granted(self, server_round: int, clients: list[int]) -> dict[int, int]:
        """The epochs of each client of a round; with ``budget`` it takes of them what it can."""
        whole: int = self.hyper.local_epochs
        kind, shares = read_work(self.hyper.work)
        if kind == "fixed":
            return {k: epochs_of(shares[k % len(shares)], whole) for k in clients}
        epochs = dict.fromkeys(clients, whole)
        if kind == "stragglers":
            draw = numpy_generator(self.facts.settings.seed, "stragglers", round=server_round)
            late = len(clients) - round(len(clients) * (1 - shares[0]))
            for at in draw.choice(len(clients), size=late, replace=False):
                epochs[clients[at]] = int(draw.integers(1, whole, endpoint=True))
        return epochs

    def _counting(self, server_round: int, replies: Iterable[Message]) -> Iterator[Message]:
        """The replies that are to be averaged; on the way, what they tell of the loss."""
        for reply in replies:
            for member, content in self.answers([reply]):
                told = record_in(content, "metrics", MetricRecord)
                loss = told.get("loss_before")
                wanted = self.hyper.adaptive_mu
                if wanted and isinstance(loss, float) and 0 <= loss <= LARGEST:
                    weight = 1.0 if self.hyper.weighting == "equal" else member.examples
                    self._losses.append((weight, loss))
                done = told.get("local_epochs", self._epochs[member.client])
                late = isinstance(done, int | float) and done < self.hyper.local_epochs
                if late and self.hyper.stragglers == "drop":
                    self.emit(Event("metric", server_round, "train", member.client, "dropped", 1.0))
                    break
            else:
                yield reply


def read_work(text: str) -> tuple[str, list[float]]:
    """What ``work`` says: full, fixed, stragglers or budget, and its shares in [0, 1].

    Raises:
        UsageError: it says something else.
    """
    kind, colon, rest = text.partition(":")
    if kind in ("full", "budget") and not colon:
        return kind, []
    try:
        shares = [float(word) for word in rest.split(",")]
    except ValueError:
        shares = []
    several = kind == "fixed" or (kind == "stragglers" and len(shares) == 1)
    if several and shares and all(0 <= share <= 1 for share in shares):
        return kind, shares
    raise UsageError(
        "work is full, fixed:SHARE,... of the epochs by client, stragglers:SHARE of the clients, or "
        f"budget, as in fixed:0.5,1 or stragglers:0.9, not {text!r}."
    )


def epochs_of(share: float, whole: int) -> int:
    """So much of E epochs: the nearest number, and one at least unless the share is 0."""
    return max(round(share * whole), 1) if share else 0


def adapted(state: FedProxState, loss: float) -> FedProxState:
    """The paper's rule for mu, after a loss was told: 0.1 up when it rises, 0.1 down after 5 falls."""
    mu, falls = state.mu, state.falls + 1 if loss < state.loss else 0
    if loss > state.loss:
        mu += STEP
    elif falls == FALLS:
        mu, falls = max(mu - STEP, 0.0), 0
    return replace(state, mu=mu, loss=loss, falls=falls)
