"""Models that came back from clients: read with care, and averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fedkit.engine.roster import Member
from fedkit.engine.strategy import FederatedStrategy
from fedkit.flower_records import record_in
from fedkit.knowledge.arrays import as_record
from fedkit.knowledge.reduction import Arrays, NothingToAverage, weighted_mean
from strategies.robust import NoiseWeights
from strategies.updates import Reading


def received_models(
    strategy: FederatedStrategy,
    server_round: int,
    replies: Iterable[Message],
    sent: Callable[[Member], ArrayRecord],
    weighting: str,
) -> Iterator[tuple[Member, float, Arrays]]:
    """Who returned which weights, with a_k = n_k (``examples``) or 1 (``equal``); one at a time.

    They come as ``UpdateHyperparameters`` say, if the strategy has them, and a_k is multiplied by a factor
    where it is ``robust``. A reply that is not shaped like what was ``sent`` to the member, or not finite,
    or tells more samples than the member joined with, is left out and named; one that holds no update,
    since that is not relevant, is an answer all the same.
    """
    reading, noise = Reading(strategy), NoiseWeights(strategy)
    for member, content in strategy.answers(replies):
        if reading.skipped(member, content, sent(member)):
            continue
        try:
            examples = 1.0 if weighting == "equal" else _examples(content, member)
            model = reading.model(member, content, sent(member))
            noise.take(member, content)
            yield member, examples * noise.factor(member), model
        except ValueError as reason:
            strategy.reject(server_round, "train", member, reason)
    reading.tell_skips(server_round)
    noise.settle(server_round)


def average(models: Iterable[tuple[float, Arrays]]) -> ArrayRecord | None:
    """sum_k a_k w_k / sum_k a_k, or None if nothing came."""
    try:
        return as_record(weighted_mean(models))
    except NothingToAverage:
        return None


def _examples(content: RecordDict, member: Member) -> float:
    record = record_in(content, "metrics", MetricRecord)
    examples = record.get("num-examples")
    if not isinstance(examples, int) or not 0 <= examples <= member.examples:
        raise ValueError(
            f"it says that it has {examples!r} samples, and when it joined it had {member.examples}"
        )
    return float(examples)
