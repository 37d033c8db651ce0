"""Static batch normalisation at the server (HeteroFL, Diao et al. 2021; the federated form is ours).

Training tracks no running statistics. Before a network is measured, every client that will measure it
runs its training data through it and tells, for each layer, the mean over its batches of their means and
unbiased variances, and how many batches those are; the server takes the mean over all batches. The authors'
code does this in one place, with everybody's training data.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedkit.engine.events import Event
from fedkit.engine.roster import Member
from fedkit.engine.strategy import Aggregated, Exchange, FederatedStrategy
from fedkit.flower_records import record_in
from fedkit.knowledge.arrays import as_record, read_array
from fedkit.knowledge.reduction import Arrays, WeightedMean
from strategies.buffers import Travelling

NAME, KIND = "statistics", "query.statistics"
# Of each network that a client runs its data through, by a label, the statistics' names and shapes.
Wanted: TypeAlias = Mapping[str, Mapping[str, tuple[int, ...]]]
# (round, global model, who measures) -> what each of them is sent.
Question: TypeAlias = Callable[[int, ArrayRecord, Sequence[Member]], Callable[[Member], RecordDict]]
# The global model with what was told, by label; None where that is kept elsewhere.
Take: TypeAlias = Callable[[ArrayRecord, Mapping[str, Arrays]], ArrayRecord | None]


class StaticNorm:
    """The exchange in which a strategy gathers the statistics of its networks."""

    def __init__(
        self,
        strategy: FederatedStrategy,
        question: Question,
        wanted: Callable[[ArrayRecord, Member], Wanted],
        take: Take,
    ) -> None:
        """Nothing gathered yet.

        Args:
            strategy: whose members are asked.
            question: what each is sent.
            wanted: of the global model what each tells; who would tell nothing is not asked.
            take: where that goes.
        """
        self._strategy = strategy
        self._question = question
        self._wanted = wanted
        self._take = take

    def exchange(self) -> Exchange:
        """What comes before a measuring."""
        return Exchange(NAME, self._configure, self._aggregate)

    def _configure(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._arrays = arrays
        members = self._strategy.members(grid)
        question = self._question(server_round, arrays, members)
        self._asked = [member for member in members if self._wanted(arrays, member)]
        return self._strategy.instruct(self._asked, KIND, server_round, question)

    def _aggregate(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        wanted = partial(self._wanted, self._arrays)
        means = gathered(self._strategy, server_round, replies, wanted)
        if self._asked and not means:
            text = (
                "no client told the statistics of its batches (all have fewer than two samples, or "
                "failed): the networks are measured with those from before"
            )
            self._strategy.emit(Event("warning", server_round, NAME, None, text))
        return self._take(self._arrays, means), None


def of_one(strategy: FederatedStrategy, travelling: Travelling) -> Sequence[Exchange]:
    """What comes before a measuring, where there is one global network; nothing without statistics."""
    if not travelling.down_only:
        return []
    label = strategy.facts.settings.model

    def question(
        server_round: int, arrays: ArrayRecord, members: Sequence[Member]
    ) -> Callable[[Member], RecordDict]:
        content = RecordDict({"arrays": arrays, "config": strategy.config(server_round)})
        return lambda member: content

    def wanted(arrays: ArrayRecord, member: Member) -> Wanted:
        return {label: moments(arrays, travelling)}

    def take(arrays: ArrayRecord, means: Mapping[str, Arrays]) -> ArrayRecord | None:
        return travelling.merged(arrays, as_record(means[label])) if label in means else None

    return [StaticNorm(strategy, question, wanted, take).exchange()]


def moments(
    arrays: Mapping[str, Array | NDArray[Any]], travelling: Travelling
) -> dict[str, tuple[int, ...]]:
    """Of a network's running statistics the means and variances and their shapes, without counters."""
    return {
        name: tuple(array.shape)
        for name, array in arrays.items()
        if name in travelling.down_only and len(array.shape)
    }


def gathered(
    strategy: FederatedStrategy,
    server_round: int,
    replies: Iterable[Message],
    wanted: Callable[[Member], Wanted],
) -> dict[str, Arrays]:
    """The mean over all batches of what clients tell, for each network that some client has run.

    Of a layer that not all have, over the batches of those who do. A reply that is not what was wanted of
    the member, or makes no sense, is left out and named.
    """
    means: dict[str, dict[str, WeightedMean]] = defaultdict(lambda: defaultdict(WeightedMean))
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
            for name, values in arrays.items():
                means[label][name].add(batches, {name: values})
    return {
        label: {name: mean.result()[name] for name, mean in layers.items()}
        for label, layers in means.items()
    }


def _batches(content: RecordDict, member: Member) -> int:
    batches = record_in(content, "metrics", MetricRecord).get("batches")
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
