"""HeteroFL (Diao, Ding & Tarokh, ICLR 2021, arXiv 2010.01264): clients train narrow parts of one network.

Client k has a width p_k. It is sent the first ceil(p_k W) channels of every hidden layer of the global
network, trains that narrow network on its own data, and returns it; each element of the global network
becomes the mean over those who hold it, and stays where nobody does. Rows of the output layer are taken
only from clients that hold the class. With ``buffers=static`` no running statistics are trained: before a
measuring the clients gather them for every level (``static_norm``).

Where all train at width 1, ``weighting=equal``, with the same optimiser and all classes held by everybody,
this is FedAvg to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedkit.engine.events import Event
from fedkit.engine.roster import Member
from fedkit.engine.strategy import (
    Aggregated,
    Exchange,
    FederatedStrategy,
    ServerModels,
    Sizes,
    Traffic,
)
from fedkit.errors import UsageError
from fedkit.flower_records import record_in
from fedkit.knowledge.arrays import as_arrays, as_record
from fedkit.knowledge.held import HeldMean, Indices, unpack_classes
from fedkit.knowledge.reduction import Arrays
from fedkit.models.levels import Levels, label, levels_of, read_levels
from fedkit.models.narrow import at_width
from fedkit.seeds import numpy_generator
from fedkit.settings import FederationSettings
from strategies.averaging import received_models
from strategies.buffers import Travelling, travelling
from strategies.heterofl_settings import PRESETS, HeteroFLHyperparameters
from strategies.level_norm import LevelNorm, LevelState
from strategies.outer import check_outer, outer_step
from strategies.updates import check_updates, weights_traffic


@dataclass
class HeteroFLState(LevelState):
    """What HeteroFL remembers beside the levels in use.

    Attributes:
        momentum: the outer optimiser's u, by tensor (float64).
        trained: with ``buffers=local`` the widest level at which each client has trained, by client.
    """

    momentum: Arrays = field(default_factory=dict)
    trained: dict[int, float] = field(default_factory=dict)


class HeteroFL(FederatedStrategy):
    """HeteroFL: each client trains as many channels of one network as it can (Diao 2021)."""

    Hyperparameters = HeteroFLHyperparameters
    PRESETS = PRESETS
    one_model = True
    by_width = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.state = HeteroFLState()
        self._levels = read_levels(self.hyper.levels)
        self._widths: dict[int, float] = {}
        # A model that can't be so narrow is refused before anything starts.
        for level in self._levels:
            self.sliced.indices(level)
        # Which classes each client said that it holds, in its last answer.
        self._held: dict[int, object] = {}

    @classmethod
    def check(cls, settings: FederationSettings, hyper: Any) -> None:
        """Levels that are some, and settings that go together."""
        super().check(settings, hyper)
        check_outer(hyper)
        check_updates(hyper)
        read_levels(hyper.levels)
        if hyper.assignment == "dynamic" and hyper.keep_optimiser:
            raise UsageError(
                "An optimiser's moments are of one width, and assignment=dynamic gives a client others: "
                "take assignment=fix, or keep-optimiser=false."
            )

    @staticmethod
    def traffic(hyper: Any, sizes: Sizes) -> Traffic:
        """The client's part of the network, both ways; of ``topk`` at most so much up."""
        return weights_traffic(hyper, sizes.own)

    @staticmethod
    def width(hyper: Any, settings: FederationSettings, client: int, told: float | None) -> float:
        """The widest level that a client can be given; with ``fix`` dealt out where it does not say."""
        levels = read_levels(hyper.levels)
        if told is None and hyper.assignment == "fix":
            dealt = _dealt(settings.seed, settings.num_shards)
            return levels[int(dealt[client % len(dealt)]) % len(levels)]
        return max((level for level in levels if level <= (told or 1.0)), default=levels[-1])

    @cached_property
    def sliced(self) -> Levels:
        """The global network, and what each level keeps of it."""
        shape, model = self.facts.public.shape, self.facts.settings.model
        return levels_of(model, shape, self.facts.outputs, self._levels[0])

    @cached_property
    def travelling(self) -> Travelling:
        """Which tensors go to clients and come back, at any width."""
        return travelling(self.facts, self.facts.settings.model, self.hyper.buffers)

    @cached_property
    def _norm(self) -> LevelNorm:
        return LevelNorm(
            self,
            self.travelling,
            self._capacity,
            lambda arrays, depth, width: as_record(self.sliced.take(as_arrays(arrays), width)),
        )

    def initial_arrays(self) -> ArrayRecord:
        """The global network's initial weights, from the run's seed."""
        return self.facts.initial_weights(self._name(self._levels[0]))

    def server_models(self, arrays: ArrayRecord) -> ServerModels:
        """The global network, and what each narrower level in use keeps of it, with its own statistics.

        A level whose statistics nobody has told yet is left out.
        """
        if self.travelling.never:
            return {}
        widest, theta = self._levels[0], as_arrays(arrays)
        return {
            "global" if width == widest else f"global-{label(width)}": (
                self._name(width),
                self._part(theta, width),
            )
            for width in dict.fromkeys([widest, *self.state.used])
            if self._norm.known(width)
        }

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send every client its part of the global network theta."""
        self._global = as_arrays(arrays)
        members = self.members(grid)
        for member in members:
            self._tell_width(server_round, member)
        self._norm.use(self._widths[member.client] for member in members)
        parts = self._parts(self._global, (self._widths[member.client] for member in members))
        sent = {width: self.travelling.down(part) for width, part in parts.items()}
        self._returned = {width: self.travelling.up(part) for width, part in sent.items()}
        settings = self.config(server_round)

        def content(member: Member) -> RecordDict:
            width = self._widths[member.client]
            told = ConfigRecord({**settings, "width": width})
            return RecordDict({"arrays": sent[width], "config": told})

        return self.instruct(members, "train", server_round, content)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """theta <- for each element the mean over its holders, or as ``outer`` steps towards that.

        Without any holder an element stays as it was, but for momentum.
        """
        mean, any_came = HeldMean(self._global), False
        for member, weight, part in received_models(
            self,
            server_round,
            replies,
            lambda member: self._returned[self._widths[member.client]],
            self.hyper.weighting,
        ):
            indices = self.sliced.indices(self._widths[member.client])
            if self.hyper.masked:
                try:
                    classes = unpack_classes(self._held[member.client], self.facts.outputs)
                except ValueError as reason:
                    self.reject(server_round, "train", member, reason)
                    continue
                part, indices = holding(part, indices, self.sliced.slicing.logits, classes)
            mean.add(weight, part, indices)
            any_came = any_came or weight > 0
            self._note_trained(member)
        if not any_came:
            return None, None
        before, after = as_record(self._global), as_record(mean.result())
        return outer_step(self, server_round, before, after), None

    def before_evaluate(self) -> Sequence[Exchange]:
        """With static statistics, gather them for every level."""
        return self._norm.exchanges()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every member to measure the widest part of theta that it can hold.

        With statistics of its own, the widest that it has trained, since it has them of no other.
        """

        def measured(member: Member) -> float:
            most: float = self._capacity(member)
            trained: float = self.state.trained.get(member.client, most)
            return min(most, trained)

        def content(member: Member) -> RecordDict:
            width = measured(member)
            own = bool(self.travelling.never)
            told = ConfigRecord({**config, "model": self._name(width), "own": own})
            return RecordDict({"arrays": self.travelling.down(parts[width]), "config": told})

        parts = self._parts(as_arrays(arrays), map(measured, self.members(grid)))
        return self.instruct(self.members(grid), "evaluate", server_round, content)

    def answers(self, replies: Iterable[Message]) -> Iterator[tuple[Member, RecordDict]]:
        """The replies, noting which classes their clients hold."""
        for member, content in super().answers(replies):
            record = record_in(content, "held", ConfigRecord)
            self._held[member.client] = record.get("classes")
            yield member, content

    def why_not(self, facts: ConfigRecord) -> str | None:
        """A client that is narrower than every level can't take part."""
        width, least = facts.get("width"), self._levels[-1]
        if not isinstance(width, float) or width >= least:
            return None
        return (
            f"Its width {width:g} is less than the least of this run's levels ({self.hyper.levels}): "
            f"give --width {least:g}, or the server a narrower level (-o levels=...)."
        )

    def _width(self, server_round: int, member: Member) -> float:
        """Where the client trains in this round."""
        if self.hyper.assignment == "fix":
            return self._capacity(member)
        fitting = [level for level in self._levels if level <= (member.width or 1.0)]
        seed = self.facts.settings.seed
        draw = numpy_generator(seed, "heterofl width", member.client, server_round)
        return fitting[draw.integers(len(fitting))]

    def _capacity(self, member: Member) -> float:
        return self.width(self.hyper, self.facts.settings, member.client, member.width)

    def _name(self, width: float) -> str:
        return at_width(self.facts.settings.model, width)

    def _part(self, arrays: Arrays, width: float) -> ArrayRecord:
        """What a width keeps of the global network, with the statistics of its own level."""
        return self._norm.told(as_record(self.sliced.take(arrays, width)), width)

    def _parts(self, arrays: Arrays, widths: Iterable[float]) -> dict[float, ArrayRecord]:
        return {width: self._part(arrays, width) for width in dict.fromkeys(widths)}

    def _note_trained(self, member: Member) -> None:
        if self.travelling.never:
            trained, width = self.state.trained, self._widths[member.client]
            trained[member.client] = max(width, trained.get(member.client, 0.0))

    def _tell_width(self, server_round: int, member: Member) -> None:
        width = self._width(server_round, member)
        if self._widths.get(member.client) != width:
            self._widths[member.client] = width
            self.emit(Event("width", server_round, "train", member.client, None, width))


@cache
def _dealt(seed: int, shards: int) -> NDArray[np.int64]:
    """A random order of all shards: taken round and round, every level gets as many."""
    return numpy_generator(seed, "heterofl deal").permutation(shards)


def holding(
    part: Arrays,
    indices: Mapping[str, Indices],
    logits: Mapping[str, int],
    classes: NDArray[np.int64],
) -> tuple[Arrays, dict[str, Indices]]:
    """Of a client's part that in which its output layer knows the classes that the client holds.

    Args:
        part: the client's arrays.
        indices: where they lie in the global network.
        logits: which dimension of a tensor counts classes.
        classes: that it holds, in order.
    """
    held, places = dict(part), dict(indices)
    for name, axis in logits.items():
        held[name] = np.take(part[name], classes, axis)
        places[name] = (*indices[name][:axis], classes, *indices[name][axis + 1 :])
    return held, places
