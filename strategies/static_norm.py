"""Static batch normalisation at the server (HeteroFL, Diao et al. 2021; the federated form is ours).

Training tracks no running statistics. Before a network is measured, every client that will measure it
runs its training data through it and tells, for each layer, the mean over its batches of their means and
unbiased variances, and how many batches those are; the server takes the mean over all batches. The authors'
code does this in one place, with everybody's training data.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedkit.engine.events import Event
from fedkit.engine.roster import Member
from fedkit.engine.strategy import Aggregated, Exchange, FederatedStrategy
from fedkit.knowledge.arrays import as_record, read_array
from fedkit.knowledge.reduction import Arrays, WeightedMean
from strategies.buffers import Travelling

NAME, KIND = "statistics", "query.statistics"
# The one network of a strategy that has no more.
WHOLE = "global"
# Of each network that a client runs its data through, by a label, the statistics' names and channels.
Wanted: TypeAlias = Mapping[str, Mapping[str, tuple[int, ...]]]


class StaticNorm:
    """The statistics of a strategy's one global network."""

    def __init__(self, strategy: FederatedStrategy, travelling: Travelling) -> None:
        self._strategy = strategy
        self._travelling = travelling

    def exchanges(self) -> Sequence[Exchange]:
        """What comes before a measuring; nothing where there are no statistics."""
        if not self._travelling.down_only:
            return []
        return [Exchange(NAME, self._configure, self._aggregate)]

    def _configure(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._arrays = arrays
        content = RecordDict({"arrays": arrays, "config": self._strategy.config(server_round)})
        members = self._strategy.members(grid)
        return self._strategy.instruct(members, KIND, server_round, lambda member: content)

    def _aggregate(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        names = self._travelling.down_only
        wanted = {WHOLE: moments({n: a.shape for n, a in self._arrays.items() if n in names})}
        means = gathered(self._strategy, server_round, replies, lambda member: wanted)
        if WHOLE not in means:
            return None, None
        return self._travelling.merged(self._arrays, as_record(means[WHOLE])), None


def moments(statistics: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Of running statistics (name -> shape) the means and variances, without the counters."""
    return {name: tuple(shape) for name, shape in statistics.items() if len(shape)}


def gathered(
    strategy: FederatedStrategy,
    server_round: int,
    replies: Iterable[Message],
    wanted: Callable[[Member], Wanted],
) -> dict[str, Arrays]:
    """The mean over all batches of what clients tell, for each network that some client has run.

    A reply that is not what was wanted of the member, or makes no sense, is left out and named.
    """
    means: dict[str, WeightedMean] = defaultdict(WeightedMean)
    told = False
    for member, content in strategy.answers(replies):
        try:
            batches = _batches(content, member)
            read = {
                label: _moments(content.array_records.get(label), shapes)
                for label, shapes in wanted(member).items()
                if batches
            }
        except ValueError as reason:
            strategy.reject(server_round, NAME, member, reason)
            continue
        for label, arrays in read.items():
            means[label].add(batches, arrays)
            told = True
    if not told:
        text = (
            "no client told the statistics of its batches (all have fewer than two samples, or failed): "
            "the networks are measured with those from before"
        )
        strategy.emit(Event("warning", server_round, NAME, None, text))
    return {label: mean.result() for label, mean in means.items()}


def _batches(content: RecordDict, member: Member) -> int:
    batches = content.metric_records.get("metrics", MetricRecord()).get("batches")
    if not isinstance(batches, int) or not 0 <= batches <= member.examples:
        raise ValueError(f"it says that it has {batches!r} batches of {member.examples} samples")
    return batches


def _moments(record: ArrayRecord | None, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    if record is None or record.keys() != shapes.keys():
        raise ValueError("it does not tell the statistics of these layers")
    arrays: Arrays = {}
    for name, shape in shapes.items():
        values = read_array(name, record[name])
        if values.shape != shape or values.dtype != np.float32:
            raise ValueError(f"{name} is {values.dtype} {values.shape}, not float32 {shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} is not finite")
        if name.endswith("running_var") and values.min(initial=0) < 0:
            raise ValueError(f"{name} is negative")
        arrays[name] = values
    return arrays
