"""What every strategy that exchanges logits on a public subset does alike: draw it, read replies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedkit.data.partitions import Indices
from fedkit.engine.roster import Member
from fedkit.engine.strategy import FederatedStrategy, Traffic
from fedkit.knowledge import codecs, subset
from fedkit.knowledge.codecs import Logits
from fedkit.seeds import numpy_generator


class PublicRound(FederatedStrategy):
    """A strategy whose rounds rest on a public subset U_t, named by explicit indices."""

    @staticmethod
    def traffic(hyper: Any, model_bytes: int, outputs: int, public: int, codec: str) -> Traffic:
        """M x C logits up; as many targets and M indices down: whatever the models are."""
        samples = min(hyper.public_samples, public)
        logits = codecs.payload_bytes(codec, samples, outputs)
        return logits, logits + 4 * samples

    def draw_subset(
        self,
        server_round: int,
        *,
        replacement: bool = False,
        strata: Indices | None = None,
    ) -> ArrayRecord:
        """Draw U_t from (seed, round), remember it, and give it as a record to be sent."""
        generator = numpy_generator(self.facts.settings.seed, "public subset", round=server_round)
        self.indices = subset.draw(
            generator,
            self.facts.public_samples,
            self.hyper.public_samples,
            replacement=replacement,
            strata=strata,
        )
        return subset.record(self.indices)

    def uploads(
        self, server_round: int, exchange: str, replies: Iterable[Message]
    ) -> Iterator[tuple[Member, Logits]]:
        """Valid uploads (float32, M x C) in client order; others are left out and named.

        An upload is refused whole if its subset, shape or type differ or anything in it is not
        finite (algorithms.md 0.3.5).
        """
        for member, content in self.answers(replies):
            try:
                yield member, self._upload(content)
            except ValueError as reason:
                self.reject(server_round, exchange, member, reason)

    def target(self, name: str, server_round: int, logits: Logits) -> RecordDict:
        """Content that carries targets for the round's subset, which it names by its digest."""
        config = self.config(server_round)
        config["subset-digest"] = subset.digest(self.indices)
        packed = codecs.pack(self.facts.settings.codec, logits.astype(np.float32))
        return RecordDict({name: packed, "config": config})

    def _upload(self, content: RecordDict) -> Logits:
        answer = content.config_records.get("answer", ConfigRecord())
        if answer.get("subset-digest") != subset.digest(self.indices):
            raise ValueError("it answers another public subset")
        record = content.array_records.get("logits")
        if record is None:
            raise ValueError("it carries no logits")
        settings = self.facts.settings
        return codecs.unpack(settings.codec, record, len(self.indices), self.facts.outputs)
