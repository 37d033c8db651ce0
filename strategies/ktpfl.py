"""KT-pFL (Zhang et al., NeurIPS 2021, arXiv 2111.02862): a personal mixture of everybody's knowledge.

Each round every client trains on its own data and tells its soft predictions S_k = softmax(Z_k / tau) on
a public subset. The server takes a step on the knowledge coefficient matrix c (row n: the weights that
client n puts on everyone) and sends client n its own target T_n = sum_l c_nl S_l, from which it learns.
With c frozen at 1/N every T_n is FedMD's consensus in probability space.

``update=projection`` (paper): gradient of sum_n (n_n/n) lambda KL(T_n || S_n) + rho ||c - 1/N||^2, then
projection onto the simplex. ``update=softmax`` (code): gradient of the squared error, an adaptive step,
then softmax(5 c). ``update=clusters``: k-means of the soft predictions, each client learns from the mean
of its cluster (COMET's clustered co-distillation): a matrix of zeros and equal shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedkit.engine.events import Event
from fedkit.engine.roster import Member
from fedkit.engine.strategy import Aggregated, Exchange
from fedkit.errors import UsageError
from fedkit.knowledge.codecs import Logits
from fedkit.knowledge.consensus import Consensus
from fedkit.knowledge.rows import Mask
from fedkit.knowledge.softening import softened
from fedkit.settings import FederationSettings
from strategies.coefficients import (
    Matrix,
    cluster_rows,
    grow,
    mix,
    projection_step,
    restrict,
    shrink,
    softmax_step,
)
from strategies.initial import InitialTraining
from strategies.ktpfl_settings import PRESETS, KTpFLHyperparameters
from strategies.public_round import PublicRound

# Personal targets are mixed for so many clients at a time: one matrix product, and little memory.
SLICE = 128


@dataclass
class KTpFLState:
    """What KT-pFL remembers from round to round.

    Attributes:
        coefficients: the knowledge coefficient matrix c (float64, N x N).
        rows: each client's row (and column) in it.
        initialised: clients that learned from the public set (``public_pretrain``).
    """

    coefficients: Matrix = field(default_factory=lambda: np.empty((0, 0)))
    rows: dict[int, int] = field(default_factory=dict)
    initialised: list[int] = field(default_factory=list)


class KTpFL(PublicRound):
    """KT-pFL: each client learns from its own mixture of all soft predictions (Zhang 2021)."""

    Hyperparameters = KTpFLHyperparameters
    PRESETS = PRESETS

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.state = KTpFLState()
        self._initial = InitialTraining(self)
        self._soft: dict[int, Logits] = {}
        self._valid: Mask = np.ones(0, dtype=np.bool_)
        self._example: Consensus | None = None

    @classmethod
    def check(cls, settings: FederationSettings, hyper: Any) -> None:
        """Adding logits to logits makes sense; adding probabilities does not."""
        super().check(settings, hyper)
        if hyper.digest_target == "local+mix" and hyper.space != "logit":
            raise UsageError("digest-target=local+mix adds class scores: set space=logit as well.")
        if hyper.public_pretrain and not settings.public_labels:
            raise UsageError("public-pretrain learns from labels: set public-labels=true as well.")

    def close(self) -> None:
        """End the worker processes."""
        self._initial.close()

    def exchanges(self) -> Sequence[Exchange]:
        """Local training and soft predictions, then distillation from the personal target."""
        first = [self._initial.exchange] if self.hyper.public_pretrain else []
        return [
            *first,
            Exchange("local", self.configure_train, self.aggregate_train),
            Exchange("distill", self.configure_distill, self.aggregate_distill),
        ]

    def config(self, server_round: int) -> ConfigRecord:
        """The hyper-parameters, with this round's number of local epochs."""
        config = super().config(server_round)
        if self.hyper.epoch_ramp:
            config["local-epochs"] = min(max(1, server_round - 1), self.hyper.local_epochs)
        return config

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the public subset; ask for local training and soft predictions."""
        self._indices = self.draw(server_round)
        return self.ask(self.members(grid), "train.local", server_round, self._indices)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Update the rows and columns of those who answered; all others keep theirs to the bit."""
        uploads = list(self.uploads(server_round, "local", replies, self._indices))
        members = [member for member, _ in uploads]
        self._soft = {member.client: upload.logits for member, upload in uploads}
        masks = [upload.valid for _, upload in uploads if upload.valid is not None]
        # A row that one of them could not tell is nobody's teacher this round.
        self._valid = np.logical_and.reduce([np.ones(len(self._indices), dtype=np.bool_), *masks])
        if uploads and self._valid.any():
            self._make_room([member.client for member in members])
            self._update(server_round, members)
        state = self.state
        for client in self._soft:
            row = state.coefficients[state.rows[client]].tolist() if client in state.rows else []
            self.emit(
                Event("coefficients", server_round, "local", client, "knowledge_coefficients", row)
            )
        return None, None

    def configure_distill(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send T_k to each client that answered; made a few at a time, as they are sent.

        One that a selector stopped early gets the mixture of the others' that its row asks for.
        """
        present = self.learners(grid, self._soft) if self._soft and self._valid.any() else []
        if self.hyper.digest_target == "local+mix":  # which adds what the client told itself
            present = [member for member in present if member.client in self._soft]
        self._example = None
        wanted = self._personal(present)
        return self.instruct(
            present,
            "train.distill",
            server_round,
            lambda member: self.target(
                server_round, self._indices, next(wanted), self.codec_of(member)
            ),
        )

    def aggregate_distill(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Nothing to combine: models stay on their devices."""
        # A grid may send while it is read: only then have targets been made.
        answered = list(replies)
        for _ in self.watch_digest(server_round, "distill", answered, self._example):
            continue
        return None, None

    def remove_client(self, client: int) -> None:
        """Take a client's row and column out of the matrix; nothing else ever shrinks it."""
        at = self.state.rows.pop(client)
        self.state.coefficients = shrink(self.state.coefficients, at)
        self.state.rows = {c: row - (row > at) for c, row in self.state.rows.items()}

    def _personal(self, members: Sequence[Member]) -> Iterator[Consensus]:
        """T_k of each member in turn (or its own answer plus T_k)."""
        clients, soft = list(self._soft), list(self._soft.values())
        for start in range(0, len(members), SLICE):
            some = [member.client for member in members[start : start + SLICE]]
            mixtures = mix(self._rows_over(some, clients), soft)
            for client, mixture in zip(some, mixtures, strict=True):
                own = self._soft[client] if self.hyper.digest_target == "local+mix" else 0
                target = Consensus(np.asarray(mixture + own, dtype=np.float32), self._valid)
                # One stands for all where it is asked how undecided they are.
                self._example = target
                yield target

    def _make_room(self, clients: list[int]) -> None:
        state = self.state
        new = [client for client in clients if client not in state.rows]
        for client in new:
            state.rows[client] = len(state.rows)
        if not len(state.coefficients):
            state.coefficients = np.full((len(new), len(new)), 1 / max(len(new), 1))
        elif new:
            state.coefficients = grow(state.coefficients, len(new))

    def _present_rows(self, clients: list[int]) -> Matrix:
        """Rows and columns of ``clients``, each row rescaled to sum to 1."""
        return self._rows_over(clients, clients)

    def _rows_over(self, clients: list[int], columns: list[int]) -> Matrix:
        """Rows of ``clients``, over the columns of others; a client that never told anything has 1/N."""
        rows, among = self.state.rows, [self.state.rows[client] for client in columns]
        known = [client for client in clients if client in rows]
        over = np.full((len(clients), len(columns)), 1 / max(len(columns), 1))
        places = [at for at, client in enumerate(clients) if client in rows]
        over[places] = restrict(self.state.coefficients, [rows[c] for c in known], among)
        return over

    def _update(self, server_round: int, members: list[Member]) -> None:
        if self.hyper.update == "none":
            return
        clients = [member.client for member in members]
        at = [self.state.rows[client] for client in clients]
        mass = self.state.coefficients[np.ix_(at, at)].sum(axis=1, keepdims=True)
        examples = np.array([member.examples for member in members], dtype=np.float64)
        stepped = self._step(self._present_rows(clients), self._predictions(), examples)
        # What a row puts on absent clients stays as it is.
        self.state.coefficients[np.ix_(at, at)] = stepped * mass

    def _step(self, rows: Matrix, soft: list[Logits], examples: NDArray[np.float64]) -> Matrix:
        hyper = self.hyper
        if hyper.update == "softmax":
            return softmax_step(rows, soft, penalty=hyper.penalty)
        if hyper.update == "clusters":
            return cluster_rows(soft, hyper.clusters, self.facts.settings.seed)
        return projection_step(
            rows,
            soft,
            examples / max(examples.sum(), 1.0),
            rate=hyper.matrix_rate,
            penalty=hyper.penalty,
            divergence_weight=hyper.divergence_weight,
        )

    def _predictions(self) -> list[Logits]:
        """S_k on the rows that everybody told, as probabilities whatever travels."""
        told = [
            logits if self._valid.all() else logits[self._valid] for logits in self._soft.values()
        ]
        if self.hyper.space == "prob":
            return told
        return [softened(logits, self.hyper.temperature) for logits in told]
