"""Static statistics of one network at several widths, gathered for each (HeteroFL, Diao et al. 2021).

A narrow network's channels see other sums than the wide one's, so that each width has statistics of its
own. A client gathers them for every width in use up to its own, of the layers that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedkit.engine.roster import Member
from fedkit.engine.strategy import Exchange, FederatedStrategy
from fedkit.knowledge.arrays import as_record
from fedkit.knowledge.reduction import Arrays
from fedkit.models.levels import label
from strategies.buffers import Travelling
from strategies.static_norm import StaticNorm, Wanted, moments


@dataclass
class LevelState:
    """What is remembered of widths.

    Attributes:
        used: those at which clients have been asked to train or measure, the widest first.
        statistics: the static statistics of each of them, by its width as text.
    """

    used: list[float] = field(default_factory=list)
    statistics: dict[str, Arrays] = field(default_factory=dict)


class LevelNorm:
    """The statistics of a strategy's one network at the widths in use."""

    def __init__(
        self,
        strategy: FederatedStrategy,
        travelling: Travelling,
        capacity: Callable[[Member], float],
        part: Callable[[ArrayRecord, int | None, float], ArrayRecord],
    ) -> None:
        """Nothing gathered yet.

        Args:
            strategy: whose ``state`` is a ``LevelState``.
            travelling: what clients are told and do not return.
            capacity: the widest part of the network that a member can run.
            part: what a depth (None: all stages) and a width keep of the global model.
        """
        self._strategy = strategy
        self._travelling = travelling
        self._capacity = capacity
        self._part = part
        self._layers: dict[tuple[int | None, float], Mapping[str, tuple[int, ...]]] = {}

    def exchanges(self) -> Sequence[Exchange]:
        """What comes before a measuring; nothing where there are no statistics."""
        if not self._travelling.down_only:
            return []
        return [StaticNorm(self._strategy, self._question, self._wanted, self._take).exchange()]

    def use(self, widths: Iterable[float]) -> None:
        """From now on statistics are gathered of these widths too."""
        state = self._strategy.state
        state.used = sorted({*state.used, *widths}, reverse=True)

    def known(self, width: float) -> bool:
        """Whether a network at that width has the statistics that it needs."""
        return not self._travelling.down_only or label(width) in self._strategy.state.statistics

    def told(self, part: ArrayRecord, width: float) -> ArrayRecord:
        """A part of the network with its width's own statistics, as far as they are known."""
        own = self._strategy.state.statistics.get(label(width), {})
        mine = as_record({name: own[name] for name in part if name in own})
        return self._travelling.merged(part, mine)

    def _question(
        self, server_round: int, arrays: ArrayRecord, members: Sequence[Member]
    ) -> Callable[[Member], RecordDict]:
        self.use(map(self._capacity, members))
        settings = self._strategy.config(server_round)

        @cache
        def part(depth: int | None, width: float) -> ArrayRecord:
            return self.told(self._part(arrays, depth, width), width)

        def content(member: Member) -> RecordDict:
            width, levels = self._capacity(member), map(label, self._levels(member))
            config = ConfigRecord({**settings, "width": width, "levels": ",".join(levels)})
            return RecordDict({"arrays": part(member.depth, width), "config": config})

        return content

    def _wanted(self, arrays: ArrayRecord, member: Member) -> Wanted:
        found = {}
        for level in self._levels(member):
            key = member.depth, level
            if key not in self._layers:
                self._layers[key] = moments(self._part(arrays, *key), self._travelling)
            found[label(level)] = self._layers[key]
        return {level: layers for level, layers in found.items() if layers}

    def _take(self, arrays: ArrayRecord, means: Mapping[str, Arrays]) -> None:
        known = self._strategy.state.statistics
        known |= {width: {**known.get(width, {}), **layers} for width, layers in means.items()}

    def _levels(self, member: Member) -> list[float]:
        """The widths in use that a client can run."""
        return [one for one in self._strategy.state.used if one <= self._capacity(member)]
