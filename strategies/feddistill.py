"""FedDistill (Jiang, Shan & Zhang 2020): every client has a personal teacher of any architecture.

Not to be mistaken for the exchange of mean outputs by class that others call so (Jeong et al. 2018): that
is ``fd``.

``exchange=logits`` (default): soft labels on the public set replace averaging altogether. Clients train
their networks and tell S_k = softmax(z / tau); a global student at the server (the federation's
``model``) learns their mean, and tells Q; clients digest (1 - lambda) CE on their own data +
lambda tau^2 KL(Q || softmax(z / tau)) on the public subset. With ``rounds=1`` this is the one-shot form.

``exchange=weights`` (the paper): the client's copy of the global model learns from labels and from its
personal teacher, (1 - lambda) CE + lambda tau^2 KL(teacher || copy); the copies are averaged, weighted by
samples. With lambda = 0 this is FedAvg to the bit. The source gives neither tau and lambda nor the
teacher's training: those are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedkit.engine.roster import Member
from fedkit.engine.strategy import Aggregated, Exchange, ServerModels, Sizes, Traffic
from fedkit.knowledge.arrays import as_arrays, as_record
from fedkit.knowledge.consensus import Consensus, Upload
from fedkit.knowledge.reduction import Arrays, NothingToAverage
from fedkit.knowledge.softening import softened
from fedkit.settings import FederationSettings, Value, setting
from strategies.averaging import average, received_models
from strategies.buffers import BufferHyperparameters, Travelling, travelling
from strategies.distillation import DistilHyperparameters
from strategies.public_round import PublicRound
from strategies.rates import OptimiserHyperparameters
from strategies.reducer import ConsensusHyperparameters, Reducer, check_reducer
from strategies.static_norm import of_one
from strategies.students import Students, check_students
from strategies.updates import UpdateHyperparameters, check_weights, weights_traffic


@dataclass(frozen=True)
class FedDistillHyperparameters(
    OptimiserHyperparameters,
    DistilHyperparameters,
    ConsensusHyperparameters,
    BufferHyperparameters,
    UpdateHyperparameters,
):
    """FedDistill's hyper-parameters; [S] the source."""

    preset: str = setting(
        "default",
        "paper: weights travel, with the source's values; default: logits travel",
        choices=("default", "paper"),
    )
    exchange: str = setting(
        "logits",
        "what travels: answers on the public set, or the weights of copies of one model",
        choices=("logits", "weights"),
        source="[S] weights; its margin note: logits",
    )
    temperature: float = setting(
        3.0, "tau on both sides of the distillation", above=0, source="ours; [S] does not say"
    )
    distill_weight: float = setting(
        0.5,
        "lambda, the share of the distillation in the loss",
        minimum=0,
        maximum=1,
        source="ours; [S] does not say",
    )
    local_epochs: int = setting(
        5, "epochs E on private data", unit="epochs", minimum=0, source="[S] 1, 5 (MNIST)"
    )
    batch_size: int = setting(
        16, "batch size on private data", unit="samples", minimum=1, source="[S] 128; default: ours"
    )
    digest_epochs: int = setting(
        3,
        "exchange=logits: epochs on the student's answers (0 with rounds=1: query only)",
        unit="epochs",
        minimum=0,
        source="ours",
    )
    digest_batch: int = setting(
        64, "exchange=logits: batch size of that", unit="samples", minimum=1, source="ours"
    )
    revisit_epochs: int = setting(
        0,
        "exchange=logits: epochs on private data after the digest",
        unit="epochs",
        minimum=0,
        source="ours; FedMD has 4",
    )
    teacher_first: int = setting(
        10,
        "exchange=weights: epochs of the personal teacher before its first round",
        unit="epochs",
        minimum=0,
        source="ours; [S] does not say",
    )
    teacher_epochs: int = setting(
        1,
        "exchange=weights: epochs of the personal teacher in each round",
        unit="epochs",
        minimum=0,
        source="ours; [S] does not say",
    )
    model_weighting: str = setting(
        "examples",
        "exchange=weights: weight of a copy in the mean: the client's samples, or 1",
        choices=("examples", "equal"),
        source="[S] examples",
    )
    buffers: str = setting(
        "average",
        "exchange=weights: running statistics of batch normalisation in the copies: averaged as weights "
        "are; local: each client keeps its copy's; static: none in training, gathered from all clients "
        "before each measuring",
        choices=("average", "local", "static"),
        source="ours; [S] does not say",
    )


@dataclass
class FedDistillState:
    """What FedDistill remembers: the global student's weights (``exchange=logits``)."""

    student: Arrays = field(default_factory=dict)


class FedDistill(PublicRound):
    """FedDistill: soft labels of personal teachers on a public set (Jiang 2020)."""

    Hyperparameters = FedDistillHyperparameters
    PRESETS: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "default": {},
        "paper": {
            "exchange": "weights",
            "batch-size": 128,
            "optimiser": "sgd",
            "learning-rate": 0.01,
            "model": "cnn",
        },
    }

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.state = FedDistillState()
        self._students = Students(self)
        self._reduce = Reducer(self.hyper)
        self._answered: set[int] = set()
        self._target: Consensus | None = None

    @classmethod
    def check(cls, settings: FederationSettings, hyper: Any) -> None:
        """Labels where they are needed, and an aggregator of probabilities."""
        super().check(settings, hyper)
        check_reducer(hyper, "prob")
        check_students(settings, hyper)
        check_weights(hyper)

    @staticmethod
    def space_of(hyper: Any) -> str:
        """Soft labels."""
        return "prob"

    @staticmethod
    def traffic(hyper: Any, sizes: Sizes) -> Traffic:
        """Logits, or the global model down and its update up."""
        if hyper.exchange == "weights":
            return weights_traffic(hyper, sizes.common)
        return PublicRound.traffic(hyper, sizes)

    def close(self) -> None:
        """End the worker processes."""
        self._students.close()

    def exchanges(self) -> Sequence[Exchange]:
        """Local training, the student's lesson, digest; or only train, with weights."""
        if self.hyper.exchange == "weights":
            return [Exchange("train", self.configure_train, self.aggregate_train)]
        return [
            Exchange("local", self.configure_local, self.aggregate_local),
            Exchange("digest", self.configure_digest, self.aggregate_digest),
        ]

    def initial_arrays(self) -> ArrayRecord:
        """The global model's initial weights, where weights travel."""
        if self.hyper.exchange == "logits":
            return ArrayRecord()
        return self.facts.initial_weights(self.facts.settings.model)

    def server_models(self, arrays: ArrayRecord) -> ServerModels:
        """The global model; none where a part of it stays with the clients."""
        if self.hyper.exchange == "logits":
            arrays = as_record(self.state.student)
        elif self.travelling.never:
            return {}
        return {"global": (self.facts.settings.model, arrays)} if arrays else {}

    # exchange=logits

    def configure_local(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the public subset; ask for local training and soft labels."""
        self._indices = self.draw(server_round)
        return self.ask(self.members(grid), "train.local", server_round, self._indices)

    def aggregate_local(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Pbar = sum_k a_k S_k / sum_k a_k; the student learns it; Q is what the student then says."""
        self._answered, self._target = set(), None
        uploads = self.uploads(server_round, "local", replies, self._indices)
        try:
            mean = self._reduce(self._noted(uploads))
        except NothingToAverage:
            return None, None
        if not mean.valid.any():
            return None, None
        self.tell_quality(server_round, "local", mean, self._indices)
        spec, tau = self.facts.settings.model, self.hyper.temperature
        start = self.state.student or as_arrays(self.facts.initial_weights(spec))
        learned = self._students.learn(
            server_round, "local", {spec: start}, self._indices, mean, tau
        )[spec]
        self.state.student = learned.weights
        self._target = Consensus(softened(learned.logits, tau), mean.valid)
        return None, None

    def configure_digest(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send Q to those whose soft labels are in the mean."""
        if self._target is None or not (self.hyper.digest_epochs or self.hyper.revisit_epochs):
            return []
        present = self.learners(grid, self._answered)
        return self.tell(present, "train.digest", server_round, self._indices, self._target)

    def aggregate_digest(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Nothing to combine: models stay on their devices."""
        for _ in self.watch_digest(server_round, "digest", replies, self._target):
            continue
        return None, None

    # exchange=weights

    @cached_property
    def travelling(self) -> Travelling:
        """Which tensors of the copies go to clients and come back."""
        return travelling(self.facts, self.facts.settings.model, self.hyper.buffers)

    def before_evaluate(self) -> Sequence[Exchange]:
        """With static statistics, gather them."""
        weights = self.hyper.exchange == "weights"
        return of_one(self, self.travelling) if weights else []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the global model theta."""
        self._global, sent = arrays, self.travelling.down(arrays)
        self._returned = self.travelling.up(sent)
        content = RecordDict({"arrays": sent, "config": self.config(server_round)})
        return self.instruct(self.members(grid), "train", server_round, lambda member: content)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """theta <- sum_k a_k theta_k / sum_k a_k over the received replies."""
        received = received_models(
            self, server_round, replies, lambda member: self._returned, self.hyper.model_weighting
        )
        mean = average((weight, model) for _, weight, model in received)
        return None if mean is None else self.travelling.merged(self._global, mean), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every member to measure its own model; where weights travel, the global one as well."""
        config["model"], config["teacher"] = self.facts.settings.model, bool(arrays)
        if arrays:
            config["own"], arrays = bool(self.travelling.never), self.travelling.down(arrays)
        return super().configure_evaluate(server_round, arrays, config, grid)

    def _noted(self, uploads: Iterable[tuple[Member, Upload]]) -> Iterable[tuple[Member, Upload]]:
        for member, upload in uploads:
            self._answered.add(member.client)
            yield member, upload
