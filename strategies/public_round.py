"""What every strategy that exchanges logits on a public subset does alike: draw it, ask, read, answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedkit.data.partitions import Indices
from fedkit.engine.events import Event
from fedkit.engine.roster import Member
from fedkit.engine.strategy import FederatedStrategy, Sizes, Traffic
from fedkit.errors import FedkitError, UsageError
from fedkit.flower_records import record_in
from fedkit.knowledge import codecs, rows, subset
from fedkit.knowledge.codecs import Logits
from fedkit.knowledge.consensus import Consensus, Upload
from fedkit.knowledge.quality import accuracy, mean_entropy
from fedkit.registry import split
from fedkit.seeds import numpy_generator
from fedkit.settings import FederationSettings, setting
from strategies.digest_watch import DigestWatch


@dataclass(frozen=True)
class PublicHyperparameters:
    """The public subset of a round, and what an answer on it must be."""

    public_samples: int = setting(
        5000,
        "size M of a round's public subset (all, if there are fewer)",
        unit="samples",
        minimum=1,
        source="FedMD, KT-pFL code: 5000",
    )
    stratified: bool = setting(
        False,
        "draw the subset by public label (needs public-labels)",
        source="FedMD code: true, paper: uniform",
    )
    replacement: bool = setting(
        False, "draw the subset with replacement", source="KT-pFL code: true"
    )
    on_bad: str = setting(
        "drop_client",
        "an upload with values that are not finite: leave out the client, or those rows, or end "
        "the run",
        choices=("drop_client", "drop_row", "error"),
        source="ours",
    )


class PublicRound(FederatedStrategy):
    """A strategy whose rounds rest on a public subset U_t, named by explicit indices."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.watch = DigestWatch(self.emit, self.hyper, self.facts.outputs)
        self._preferred = [spec.strip() for spec in self.facts.settings.codec.split(",")]

    @classmethod
    def check(cls, settings: FederationSettings, hyper: Any) -> None:
        """Drawing by label needs labels; a codec must be able to carry what travels."""
        if hyper.stratified and not settings.public_labels:
            raise UsageError(
                "stratified draws the subset by public label: set public-labels=true as well, or "
                "stratified=false."
            )
        if hyper.stratified and hyper.replacement:
            raise UsageError("stratified and replacement exclude each other: choose one.")
        for codec in settings.codec.split(","):
            codecs.check_codec(codec.strip(), cls.space_of(hyper))

    def config(self, server_round: int) -> ConfigRecord:
        """The hyper-parameters, and in which space answers and targets are."""
        config = super().config(server_round)
        config["space"] = self.space_of(self.hyper)
        return config

    @staticmethod
    def space_of(hyper: Any) -> str:
        """What travels: ``logit`` (raw class scores) or ``prob`` (rows on the simplex)."""
        space: str = hyper.space
        return space

    @staticmethod
    def traffic(hyper: Any, sizes: Sizes) -> Traffic:
        """M x C logits up; as many targets and M indices down: whatever the models are."""
        samples = min(hyper.public_samples, sizes.public)
        logits = codecs.payload_bytes(sizes.codec, samples, sizes.outputs)
        return logits, logits + 4 * samples

    def draw(self, server_round: int) -> Indices:
        """U_t, from (seed, round) alone (int64, M)."""
        return subset.draw(
            numpy_generator(self.facts.settings.seed, "public subset", round=server_round),
            len(self.facts.public),
            self.hyper.public_samples,
            replacement=self.hyper.replacement,
            strata=self.facts.public_labels if self.hyper.stratified else None,
        )

    def ask(
        self, members: Sequence[Member], kind: str, server_round: int, indices: Indices
    ) -> Iterator[Message]:
        """Ask members for logits on a subset."""

        @cache
        def question(codec: str) -> RecordDict:
            config = self.config(server_round)
            config["codec"] = codec
            return RecordDict({"subset": subset.record(indices), "config": config})

        return self.instruct(members, kind, server_round, lambda m: question(self.codec_of(m)))

    def codec_of(self, member: Member) -> str:
        """The first of the wanted codecs that this client knows (agreed when it joined)."""
        known = (spec for spec in self._preferred if split(spec)[0] in member.codecs)
        return next(known, self._preferred[0])

    def uploads(
        self, server_round: int, exchange: str, replies: Iterable[Message], indices: Indices
    ) -> Iterator[tuple[Member, Upload]]:
        """Valid uploads in client order; others are left out and named.

        An upload is refused whole if its subset, shape or type differ; values that are not finite
        cost the client or its rows (``on_bad``, algorithms.md 0.3.5).

        Raises:
            FedkitError: an upload is bad, and ``on_bad=error``.
        """
        for member, content in self.answers(replies):
            if record_in(content, "answer", ConfigRecord).get("silent") is True:
                continue  # it has nothing to say about any row of this subset
            try:
                yield member, self._upload(member, content, indices)
            except ValueError as reason:
                if self.hyper.on_bad == "error":
                    raise FedkitError(
                        f"The reply of {member.name} in round {server_round} is bad: {reason}."
                    ) from reason
                self.reject(server_round, exchange, member, reason)

    def tell(
        self,
        members: Sequence[Member],
        kind: str,
        server_round: int,
        indices: Indices,
        target: Consensus,
        extra: Mapping[str, Any] | None = None,
    ) -> Iterator[Message]:
        """Send one target to all members."""

        @cache
        def content(codec: str) -> RecordDict:
            return self.target(server_round, indices, target, codec, extra)

        return self.instruct(members, kind, server_round, lambda m: content(self.codec_of(m)))

    def target(
        self,
        server_round: int,
        indices: Indices,
        target: Consensus,
        codec: str,
        extra: Mapping[str, Any] | None = None,
    ) -> RecordDict:
        """Content that carries targets for the valid rows of the subset named by its digest."""
        config = self.config(server_round)
        config["codec"], config["subset-digest"] = codec, subset.digest(indices)
        content = RecordDict({"config": config, **(extra or {})})
        content["target"] = codecs.pack(codec, target.targets[target.valid])
        if not target.valid.all():
            content["rows"] = rows.record(target.valid)
        return content

    def tell_quality(
        self, server_round: int, exchange: str, target: Consensus, indices: Indices
    ) -> None:
        """Record how good a consensus is: its accuracy, where public labels are used."""
        if self.facts.public_labels is not None:
            right = accuracy(target.targets, self.facts.public_labels[indices], target.valid)
            self.emit(
                Event("metric", server_round, exchange, None, "consensus/accuracy", right,
                      int(target.valid.sum()))
            )  # fmt: skip
        if not target.valid.all():
            self.emit(
                Event("metric", server_round, exchange, None, "consensus/rows",
                      int(target.valid.sum()), len(target.valid))
            )  # fmt: skip

    def watch_digest(
        self, server_round: int, exchange: str, replies: Iterable[Message], target: Consensus | None
    ) -> Iterator[Message]:
        """Pass replies on; then look at what digesting did, and warn where nothing was gained.

        ``target``: what was digested, where all had the same.
        """
        told = []
        for reply in replies:
            if reply.has_content():
                told.append(record_in(reply.content, "metrics", MetricRecord))
            yield reply
        entropy = None
        if target is not None and self.space_of(self.hyper) == "prob":
            entropy = mean_entropy(target.targets, target.valid)
        self.watch.look(server_round, exchange, told, entropy)

    def _upload(self, member: Member, content: RecordDict, indices: Indices) -> Upload:
        answer = record_in(content, "answer", ConfigRecord)
        if answer.get("subset-digest") != subset.digest(indices):
            raise ValueError("it answers another public subset")
        record = content.array_records.get("logits")
        if record is None:
            raise ValueError("it carries no logits")
        valid = rows.read(content.array_records.get("rows"), len(indices))
        told = codecs.unpack(
            self.codec_of(member),
            record,
            int(valid.sum()),
            self.facts.outputs,
            space=self.space_of(self.hyper),
            finite=self.hyper.on_bad != "drop_row",
        )
        logits: Logits = np.zeros((len(indices), self.facts.outputs), dtype=np.float32)
        logits[valid] = told
        valid &= np.isfinite(logits).all(axis=1)
        logits[~valid] = 0
        if not valid.any():
            raise ValueError("its logits are not finite in any row")
        return Upload(1.0, logits, None if valid.all() else valid)
