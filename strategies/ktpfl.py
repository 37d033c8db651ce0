"""KT-pFL (Zhang et al., NeurIPS 2021, arXiv 2111.02862): a personal mixture of everybody's knowledge.

Each round every client trains on its own data and tells its soft predictions S_k = softmax(Z_k / tau) on
a public subset. The server takes a step on the knowledge coefficient matrix c (row n: the weights that
client n puts on everyone) and sends client n its own target T_n = sum_l c_nl S_l, from which it learns.
With c frozen at 1/N every T_n is FedMD's consensus in probability space.

``update=projection`` (paper): gradient of sum_n (n_n/n) lambda KL(T_n || S_n) + rho ||c - 1/N||^2, then
projection onto the simplex. ``update=softmax`` (code): gradient of the squared error, an adaptive step,
then softmax(5 c).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedkit.engine.events import Event
from fedkit.engine.roster import Member
from fedkit.engine.strategy import Aggregated, Exchange
from fedkit.knowledge.codecs import Logits
from fedkit.settings import Value, setting
from strategies.coefficients import Matrix, grow, mix, projection_step, softmax_step
from strategies.public_round import PublicRound


@dataclass(frozen=True)
class KTpFLHyperparameters:
    """KT-pFL's hyper-parameters; [P] paper, [C] the authors' code, [D] ours."""

    preset: str = setting(
        "default",
        "paper: the paper's objective with the code's values where it is silent; code: the "
        "authors' code; default: the paper's objective with our local training",
        choices=("default", "paper", "code"),
    )
    public_samples: int = setting(
        5000,
        "size M of a round's public subset (all, if there are fewer)",
        unit="samples",
        minimum=1,
        source="[C] 5000",
    )
    replacement: bool = setting(False, "draw the subset with replacement", source="[C] true")
    temperature: float = setting(
        3.0, "tau of the soft predictions", above=0, source="[C] 10; default [D]"
    )
    update: str = setting(
        "projection",
        "step on the matrix: projection (paper) or softmax (code)",
        choices=("projection", "softmax", "none"),
    )
    matrix_rate: float = setting(
        0.01, "step size eta3 of update=projection", minimum=0, source="[D] 0.01"
    )
    penalty: float = setting(
        0.7, "rho, the pull of the matrix towards 1/N", minimum=0, source="[C] 0.7"
    )
    divergence_weight: float = setting(
        1.0, "lambda in the matrix's objective", minimum=0, source="[D] 1"
    )
    local_epochs: int = setting(
        3,
        "epochs on private data (the ramp's top, with epoch-ramp)",
        unit="epochs",
        minimum=0,
        source="[C] ramp to 10",
    )
    epoch_ramp: bool = setting(
        False, "local epochs 1, 1, 2, 3, ... up to local-epochs", source="[C] true"
    )
    batch_size: int = setting(
        16, "batch size on private data", unit="samples", minimum=1, source="[C] 16"
    )
    distill_epochs: int = setting(
        3, "epochs on the personal target", unit="epochs", minimum=0, source="[C] 1; default [D]"
    )
    distill_batch: int = setting(
        64,
        "batch size on the personal target",
        unit="samples",
        minimum=1,
        source="[C] 256; default [D]",
    )
    distill_weight: float = setting(
        9.0,
        "factor of KL(T_k || S_k) in the client's loss",
        minimum=0,
        source="[D] temperature^2 by default; [C] 1",
    )
    reduction: str = setting(
        "batchmean",
        "KL summed over classes, or (mean) divided by C as well",
        choices=("batchmean", "mean"),
        source="[C] mean",
    )
    optimiser: str = setting(
        "adam",
        "optimiser of both phases, made anew in each",
        choices=("sgd", "adam"),
        source="[C] sgd; default [D]",
    )
    learning_rate: float = setting(
        0.001, "its learning rate", above=0, source="[C] 0.02 (sgd); default [D]"
    )


_CODE: Mapping[str, Value] = {
    "replacement": True,
    "temperature": 10.0,
    "local-epochs": 10,
    "epoch-ramp": True,
    "distill-epochs": 1,
    "distill-batch": 256,
    "distill-weight": 1.0,
    "optimiser": "sgd",
    "learning-rate": 0.02,
}


class KTpFL(PublicRound):
    """KT-pFL: each client learns from its own mixture of all soft predictions (Zhang 2021)."""

    Hyperparameters = KTpFLHyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "default": {},
        "paper": {**_CODE, "replacement": False},
        "code": {**_CODE, "update": "softmax", "reduction": "mean"},
    }

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.coefficients: Matrix = np.empty((0, 0))
        self._rows: dict[int, int] = {}
        self._soft: dict[int, Logits] = {}

    def exchanges(self) -> Sequence[Exchange]:
        """Local training and soft predictions, then distillation from the personal target."""
        return [
            Exchange("local", self.configure_train, self.aggregate_train),
            Exchange("distill", self.configure_distill, self.aggregate_distill),
        ]

    def config(self, server_round: int) -> ConfigRecord:
        """The hyper-parameters, with this round's number of local epochs."""
        config = super().config(server_round)
        top = self.hyper.local_epochs
        ramp = min(max(1, server_round - 1), top)
        config["round-epochs"] = ramp if self.hyper.epoch_ramp else top
        return config

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the public subset; ask for local training and soft predictions."""
        drawn = self.draw_subset(server_round, replacement=self.hyper.replacement)
        content = RecordDict({"subset": drawn, "config": self.config(server_round)})
        members = self.members(grid)
        return self.instruct(members, "train.local", server_round, lambda member: content)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Update the rows and columns of those who answered; all others keep theirs to the bit."""
        uploads = list(self.uploads(server_round, "local", replies))
        self._soft = {member.client: soft for member, soft in uploads}
        if uploads:
            self._make_room([member.client for member, _ in uploads])
            self._update([member for member, _ in uploads])
        for client in self._soft:
            row = self.coefficients[self._rows[client]].tolist()
            self.emit(
                Event("coefficients", server_round, "local", client, "knowledge_coefficients", row)
            )
        return None, None

    def configure_distill(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send T_k to each client that answered; made one at a time, as they are sent."""
        clients = list(self._soft)
        rows = self._present_rows(clients)
        soft = list(self._soft.values())

        def personal(member: Member) -> RecordDict:
            (target,) = mix(rows[clients.index(member.client)][None, :], soft)
            return self.target("target", server_round, target)

        present = [m for m in self.members(grid) if m.client in self._soft]
        return self.instruct(present, "train.distill", server_round, personal)

    def aggregate_distill(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Nothing to combine: models stay on their devices."""
        return None, None

    def _make_room(self, clients: list[int]) -> None:
        new = [client for client in clients if client not in self._rows]
        if not new:
            return
        for client in new:
            self._rows[client] = len(self._rows)
        if not len(self.coefficients):
            self.coefficients = np.full((len(new), len(new)), 1 / len(new))
        else:
            self.coefficients = grow(self.coefficients, len(new))

    def _present_rows(self, clients: list[int]) -> Matrix:
        """Rows and columns of ``clients``, each row rescaled to sum to 1 (1/|S| if it holds nothing)."""
        at = [self._rows[client] for client in clients]
        part = self.coefficients[np.ix_(at, at)]
        mass = part.sum(axis=1, keepdims=True)
        return np.where(mass > 0, part / np.where(mass > 0, mass, 1.0), 1 / max(len(at), 1))

    def _update(self, members: list[Member]) -> None:
        if self.hyper.update == "none":
            return
        clients = [member.client for member in members]
        at = [self._rows[client] for client in clients]
        mass = self.coefficients[np.ix_(at, at)].sum(axis=1, keepdims=True)
        rows, soft = self._present_rows(clients), list(self._soft.values())
        if self.hyper.update == "softmax":
            stepped = softmax_step(rows, soft, penalty=self.hyper.penalty)
        else:
            examples = np.array([member.examples for member in members], dtype=np.float64)
            stepped = projection_step(
                rows,
                soft,
                examples / max(examples.sum(), 1.0),
                rate=self.hyper.matrix_rate,
                penalty=self.hyper.penalty,
                divergence_weight=self.hyper.divergence_weight,
            )
        # What a row puts on absent clients stays as it is.
        self.coefficients[np.ix_(at, at)] = stepped * mass
