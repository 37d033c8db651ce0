"""FedDF (Lin et al., NeurIPS 2020, arXiv 2006.07242): networks at the server distil the clients' ensemble.

``exchange=logits`` (default, ours): clients train privately and tell their class scores Z_k on a public
subset; the server forms the ensemble Zbar = mean_k Z_k, lets its own students (one for each architecture)
learn softmax(Zbar), and sends the students' mean scores, or those of the client's own architecture, back
for the clients to digest. No weights travel, whatever the networks.

``exchange=weights`` (the paper, algorithm 3): clients of one architecture share a model. Each round they
train it, the server averages their weights, group by group, and lets every group's mean learn the ensemble
of *all* clients' networks on the unlabelled public set. With ``steps=0`` this is FedAvg to the bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedkit.data.partitions import Indices
from fedkit.engine.roster import Member
from fedkit.engine.strategy import Aggregated, Exchange, ServerModels, Sizes, Traffic
from fedkit.errors import UsageError
from fedkit.knowledge.arrays import as_arrays, as_record
from fedkit.knowledge.codecs import Logits
from fedkit.knowledge.consensus import Consensus, Upload
from fedkit.knowledge.quality import accuracy
from fedkit.knowledge.reduction import Arrays, NothingToAverage, WeightedMean
from fedkit.knowledge.softening import softened
from fedkit.registry import check as check_name
from fedkit.settings import FederationSettings
from strategies.averaging import received_models
from strategies.distillation import Distilled
from strategies.feddf_settings import PRESETS, FedDFHyperparameters
from strategies.public_round import PublicRound
from strategies.reducer import Reducer, check_reducer
from strategies.students import Students, answers, architectures, as_models, check_students


@dataclass
class FedDFState:
    """What FedDF remembers: the network of each architecture (its students, or its groups' models)."""

    models: dict[str, Arrays] = field(default_factory=dict)


class FedDF(PublicRound):
    """FedDF: networks at the server distil the ensemble of all clients (Lin 2020)."""

    Hyperparameters = FedDFHyperparameters
    PRESETS = PRESETS

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.state = FedDFState()
        self._students = Students(self)
        self._reduce = Reducer(self.hyper)
        self._targets: dict[str, Consensus] = {}
        self._answered: set[int] = set()

    @classmethod
    def check(cls, settings: FederationSettings, hyper: Any) -> None:
        """Labels where they are needed, architectures that exist, a fitting aggregator."""
        super().check(settings, hyper)
        check_reducer(hyper, hyper.space)
        check_students(settings, hyper)
        if hyper.drop_worst and not settings.public_labels:
            raise UsageError("drop-worst measures on labels: set public-labels=true as well.")
        if hyper.students != "auto":
            wanted = architectures(hyper.students, ())
            if not wanted:
                raise UsageError("students names no architecture: name one, or take auto.")
            for name in wanted:
                check_name("models", name)

    @staticmethod
    def traffic(hyper: Any, sizes: Sizes) -> Traffic:
        """Logits, or the client's model both ways."""
        if hyper.exchange == "weights":
            return sizes.own_model, sizes.own_model
        return PublicRound.traffic(hyper, sizes)

    def close(self) -> None:
        """End the worker processes."""
        self._students.close()

    def server_models(self, arrays: ArrayRecord) -> ServerModels:
        """Students, or the groups' models."""
        kind = "student" if self.hyper.exchange == "logits" else "global"
        return as_models(self.state.models, kind)

    def exchanges(self) -> Sequence[Exchange]:
        """Local training, distillation at the server, digest; or only train, with weights."""
        if self.hyper.exchange == "weights":
            return [Exchange("train", self.configure_train, self.aggregate_train)]
        return [
            Exchange("local", self.configure_local, self.aggregate_local),
            Exchange("digest", self.configure_digest, self.aggregate_digest),
        ]

    # exchange=logits

    def configure_local(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the public subset; ask for local training and class scores."""
        self._indices = self.draw(server_round)
        self._here = list(self.members(grid))
        return self.ask(self._here, "train.local", server_round, self._indices)

    def aggregate_local(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Ensemble, then students, then what they say."""
        self._answered, self._targets = set(), {}
        uploads = self.uploads(server_round, "local", replies, self._indices)
        try:
            ensemble = self._reduce(self._noted(uploads))
        except NothingToAverage:
            return None, None
        if not ensemble.valid.any():
            return None, None
        self.tell_quality(server_round, "local", ensemble, self._indices)
        here = [member.model for member in self._here]
        learned = self._learn(
            server_round, "local", architectures(self.hyper.students, here), self._indices, ensemble
        )
        for spec, logits in self._answers_of(learned).items():
            self._targets[spec] = Consensus(logits, ensemble.valid)
        return None, None

    def configure_digest(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the students' answers to those who took part in the ensemble, or were stopped early."""
        present = self.learners(grid, self._answered) if self._targets else []
        own = self.hyper.digest_target == "own"

        def content(member: Member) -> RecordDict:
            target = self._targets.get(member.model if own else "mean", self._targets["mean"])
            return self.target(server_round, self._indices, target, self.codec_of(member))

        return self.instruct(present, "train.digest", server_round, content)

    def aggregate_digest(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Nothing to combine: models stay on their devices."""
        for _ in self.watch_digest(server_round, "digest", replies, self._targets.get("mean")):
            continue
        return None, None

    # exchange=weights

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each client its group's model."""
        for spec in architectures("auto", [member.model for member in self.members(grid)]):
            if spec not in self.state.models:
                self.state.models[spec] = as_arrays(self.facts.initial_weights(spec))
        self._sent = {spec: as_record(model) for spec, model in self.state.models.items()}
        settings = self.config(server_round)

        def content(member: Member) -> RecordDict:
            return RecordDict({"arrays": self._sent[member.model], "config": settings})

        return self.instruct(self.members(grid), "train", server_round, content)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Average each group; then every group's mean learns the ensemble of all clients' networks."""
        means: dict[str, WeightedMean] = defaultdict(WeightedMean)
        self._indices = self.draw(server_round)
        received = received_models(
            self,
            server_round,
            replies,
            lambda member: self._sent[member.model],
            self.hyper.model_weighting,
        )

        def teachers() -> Iterable[tuple[Member, Upload]]:
            for member, weight, model in received:
                logits = None
                if self.hyper.steps:
                    logits = answers(self.facts, member.model, model, self._indices)
                    if not np.isfinite(logits).all():  # finite weights may still be too large
                        reason = "its model's class scores are not finite"
                        self.reject(server_round, "train", member, reason)
                        continue
                means[member.model].add(weight, model)
                if logits is not None and self._teaches(server_round, member, logits):
                    yield member, Upload(1.0, self._in_space(logits))

        try:
            ensemble: Consensus | None = self._reduce(teachers())
        except NothingToAverage:
            ensemble = None
        for spec, mean in means.items():
            try:
                self.state.models[spec] = mean.result()
            except NothingToAverage:  # nobody of this group has samples
                continue
        if ensemble is not None and ensemble.valid.any():
            self.tell_quality(server_round, "train", ensemble, self._indices)
            self._learn(server_round, "train", sorted(means), self._indices, ensemble)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every member to measure its own model, or its group's."""
        if self.hyper.exchange == "logits":
            return super().configure_evaluate(server_round, arrays, config, grid)
        config["common-test"] = True
        models = {spec: as_record(model) for spec, model in self.state.models.items()}

        def content(member: Member) -> RecordDict:
            model = models.get(member.model) or self.facts.initial_weights(member.model)
            return RecordDict({"arrays": model, "config": config})

        return self.instruct(self.members(grid), "evaluate", server_round, content)

    def _teaches(self, server_round: int, member: Member, logits: Logits) -> bool:
        """Whether a client's network is in the ensemble; not if it should be better than chance."""
        if not self.hyper.drop_worst:
            return True
        right = accuracy(logits, self.facts.public_labels[self._indices])
        if right >= 1.2 / self.facts.outputs:
            return True
        self.reject(
            server_round, "train", member, f"its model is right on {right:.3f} of the "
            "public set, less than 1.2 times chance (it is averaged, but teaches nobody)",
        )  # fmt: skip
        return False

    # both

    def _learn(
        self,
        server_round: int,
        exchange: str,
        specs: Iterable[str],
        indices: Indices,
        ensemble: Consensus,
    ) -> dict[str, Distilled]:
        tau = self.hyper.temperature
        if self.hyper.space == "logit":
            ensemble = ensemble._replace(targets=softened(ensemble.targets, tau))
        models = self.state.models
        students = {
            spec: models.get(spec) or as_arrays(self.facts.initial_weights(spec)) for spec in specs
        }
        learned = self._students.learn(server_round, exchange, students, indices, ensemble, tau)
        models |= {spec: done.weights for spec, done in learned.items()}
        return learned

    def _answers_of(self, learned: Mapping[str, Distilled]) -> dict[str, Logits]:
        """What clients digest, by architecture and in the mean, in the space that travels."""
        told = {spec: self._in_space(done.logits) for spec, done in learned.items()}
        mean = WeightedMean()
        for logits in told.values():
            mean.add(1.0, {"scores": logits})
        return {**told, "mean": mean.result()["scores"].astype(np.float32)}

    def _in_space(self, logits: Logits) -> Logits:
        """Class scores as they travel and are averaged."""
        prob = self.hyper.space == "prob"
        return softened(logits, self.hyper.temperature) if prob else logits

    def _noted(self, uploads: Iterable[tuple[Member, Upload]]) -> Iterable[tuple[Member, Upload]]:
        for member, upload in uploads:
            self._answered.add(member.client)
            yield member, upload
