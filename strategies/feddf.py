"""FedDF (Lin et al., NeurIPS 2020, arXiv 2006.07242): networks at the server distil the clients' ensemble.

``exchange=logits`` (default, ours): clients train privately and tell their class scores Z_k on a public
subset; the server forms the ensemble Zbar = mean_k Z_k, lets its own students (one for each architecture)
learn softmax(Zbar), and sends the students' mean scores, or those of the client's own architecture, back
for the clients to digest. No weights travel, whatever the networks.

``exchange=weights`` (the paper, algorithm 3): clients of one architecture share a model. Each round they
train it, the server averages their weights, group by group, and lets every group's mean learn the ensemble
of *all* clients' networks on the unlabelled public set. With ``steps=0`` this is FedAvg to the bit. Where
running statistics don't come with the weights (``buffers``) the server runs clients' networks and students
with the moments of the public subset: all of them learned with those of their batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
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
from fedkit.models.build import parameter_names
from fedkit.registry import check as check_name
from fedkit.settings import FederationSettings
from strategies.averaging import received_models
from strategies.buffers import travelling
from strategies.distillation import Distilled
from strategies.feddf_settings import PRESETS, FedDFHyperparameters
from strategies.public_round import PublicRound
from strategies.reducer import Reducer, check_reducer
from strategies.static_norm import StaticNorm, Wanted, moments
from strategies.students import Students, answers, architectures, as_models, check_students
from strategies.updates import check_weights, weights_traffic


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
        facts, buffers = self.facts, self.hyper.buffers
        self._parameters = cache(
            lambda spec: parameter_names(spec, facts.public.shape, facts.outputs)
        )
        # Which tensors of a group's model go to clients and come back.
        self._travelling = cache(lambda spec: travelling(facts, spec, buffers))
        # Whether the server has statistics of no client's network.
        self._by_moments = buffers != "average"

    @classmethod
    def check(cls, settings: FederationSettings, hyper: Any) -> None:
        """Labels where they are needed, architectures that exist, a fitting aggregator."""
        super().check(settings, hyper)
        check_reducer(hyper, hyper.space)
        check_students(settings, hyper)
        check_weights(hyper)
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
        """Logits, or the client's model down and its update up."""
        if hyper.exchange == "weights":
            return weights_traffic(hyper, sizes.own)
        return PublicRound.traffic(hyper, sizes)

    def close(self) -> None:
        """End the worker processes."""
        self._students.close()

    def server_models(self, arrays: ArrayRecord) -> ServerModels:
        """Students, or the groups' models; of these only such as are whole here."""
        models = self.state.models
        if self.hyper.exchange == "logits":
            return as_models(models, "student")
        whole = {spec: one for spec, one in models.items() if not self._travelling(spec).never}
        return as_models(whole, "global")

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

    def parameters_of(self, member: Member) -> frozenset[str]:
        """Names of the tensors of its group's model that training moves."""
        return self._parameters(member.model)

    def before_evaluate(self) -> Sequence[Exchange]:
        """With static statistics, gather those of every group."""
        if self.hyper.exchange == "logits" or self.hyper.buffers != "static":
            return []

        def question(
            server_round: int, arrays: ArrayRecord, members: Sequence[Member]
        ) -> Callable[[Member], RecordDict]:
            models, config = self._models_of(members), self.config(server_round)
            return lambda one: RecordDict({"arrays": models[one.model], "config": config})

        def wanted(arrays: ArrayRecord, member: Member) -> Wanted:
            model = self.state.models.get(member.model, {})
            layers = moments(model, self._travelling(member.model))
            return {member.model: layers} if layers else {}

        def take(arrays: ArrayRecord, means: Mapping[str, Arrays]) -> None:
            for spec, layers in means.items():
                self.state.models[spec] = {**self.state.models[spec], **layers}

        return [StaticNorm(self, question, wanted, take).exchange()]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send each client its group's model."""
        members, settings = self.members(grid), self.config(server_round)
        sent = {
            spec: self._travelling(spec).down(model)
            for spec, model in self._models_of(members).items()
        }
        self._returned = {spec: self._travelling(spec).up(model) for spec, model in sent.items()}

        def content(member: Member) -> RecordDict:
            return RecordDict({"arrays": sent[member.model], "config": settings})

        return self.instruct(members, "train", server_round, content)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Average each group; then every group's mean learns the ensemble of all clients' networks."""
        means: dict[str, WeightedMean] = defaultdict(WeightedMean)
        self._indices = self.draw(server_round)
        received = received_models(
            self,
            server_round,
            replies,
            lambda member: self._returned[member.model],
            self.hyper.model_weighting,
        )

        def teachers() -> Iterable[tuple[Member, Upload]]:
            for member, weight, model in received:
                logits = None
                if self.hyper.steps:
                    logits = self._logits(member.model, model)
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
                self.state.models[spec] = {**self.state.models[spec], **mean.result()}
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
            sent = self._travelling(member.model).down(model)
            return RecordDict({"arrays": sent, "config": config})

        return self.instruct(self.members(grid), "evaluate", server_round, content)

    def _models_of(self, members: Sequence[Member]) -> dict[str, ArrayRecord]:
        """The groups' models, new ones for architectures that have not been here before."""
        for spec in architectures("auto", [member.model for member in members]):
            if spec not in self.state.models:
                self.state.models[spec] = as_arrays(self.facts.initial_weights(spec))
        return {spec: as_record(model) for spec, model in self.state.models.items()}

    def _logits(self, spec: str, model: Arrays) -> Logits:
        """What a client's network says on the public subset of the round."""
        whole = {**self.state.models[spec], **model}
        batch = self.hyper.server_batch if self._by_moments else 0
        return answers(self.facts, spec, whole, self._indices, moments_of=batch)

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
        learned = self._students.learn(
            server_round, exchange, students, indices, ensemble, tau, by_moments=self._by_moments
        )
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
