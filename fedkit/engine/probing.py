"""Probe and finish: how the driver plans a round for a selector that wants to see before it decides.

The first exchange's instructions go out as ``train.probe``: the same content, and the type of message
that it stands for. A client does the first epoch of that work, keeps the rest for later, and tells how
it went. ``train.finish`` then goes to those that were kept; they answer as they would have answered the
instruction itself. The others are told nothing, and nobody waits for them: whatever comes next ends what
they began. Strategies do not notice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedkit.engine.choosing import Chooser
from fedkit.engine.events import Event, Listener
from fedkit.engine.round_grid import RoundGrid
from fedkit.engine.seen import LONGEST_S, PROBE
from fedkit.engine.selection import Probe
from fedkit.engine.strategy import Aggregated, Exchange
from fedkit.flower_records import record_in

# What a client says of itself is bounded: what selectors compute of all must not hang on one.
LARGEST_LOSS, LARGEST_BYTES = 1e6, 1 << 48


class Probing:
    """The probe of one round, and what follows from it."""

    def __init__(self, chooser: Chooser, grid: RoundGrid, emit: Listener) -> None:
        """``grid``: the round's; it is told who was stopped early."""
        self._chooser, self._grid, self._emit = chooser, grid, emit
        grid.probed = True
        self._probed: dict[int, Probe] = {}

    def planned(self, exchanges: Sequence[Exchange]) -> list[Exchange]:
        """The exchanges of the round, the first in which every round trains in two steps."""
        training = (at for at, each in enumerate(exchanges) if each.trains and not each.once)
        at = next(training, None)
        if at is None:
            return list(exchanges)
        first = exchanges[at]

        def probe(
            server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
        ) -> Iterable[Message]:
            return as_probes(first.configure(server_round, arrays, config, grid))

        def finish(
            server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
        ) -> Iterable[Message]:
            return self._decide(server_round, first.name)

        two = [
            Exchange(PROBE, probe, self._collect),
            Exchange(first.name, finish, first.aggregate),
        ]
        return [*exchanges[:at], *two, *exchanges[at + 1 :]]

    def _collect(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        clients = {member.node_id: member.client for member in self._grid.members}
        for reply in replies:
            client = clients.get(reply.metadata.src_node_id)
            if client is None or not reply.has_content():
                continue
            self._probed[client] = read_probe(reply.content)
        return None, None

    def _decide(self, server_round: int, exchange: str) -> Iterator[Message]:
        asked = [member for member in self._grid.members if member.client in self._probed]
        kept = self._chooser.keep(server_round, asked, self._probed) if asked else []
        clients = [member.client for member in kept]
        self._grid.counted = frozenset(clients)
        self._grid.stopped = frozenset(m.client for m in asked) - self._grid.counted
        self._emit(Event("kept", server_round, exchange, value=clients, n=len(asked)))
        # One content for all, so that it is encoded once.
        content = RecordDict()
        return (
            Message(content, member.node_id, "train.finish", group_id=str(server_round))
            for member in kept
        )


def as_probes(messages: Iterable[Message]) -> Iterator[Message]:
    """Instructions as probes: what they carry, and the type of message that each stands for."""
    last, content = RecordDict(), RecordDict()
    for message in messages:
        meta = message.metadata
        # One content for all stays one, so that it is encoded once.
        if not _alike(last, message.content) or content[PROBE]["kind"] != meta.message_type:
            last = RecordDict({**message.content})
            content = RecordDict({**last, PROBE: ConfigRecord({"kind": meta.message_type})})
        yield Message(content, meta.dst_node_id, "train.probe", group_id=meta.group_id)


def read_probe(content: RecordDict) -> Probe:
    """What a client told of its probe; NaN and 0 stand for what it did not tell, or can't be meant."""
    told = record_in(content, "metrics", MetricRecord)
    timing = record_in(content, "timing", ConfigRecord)
    size = told.get("upload-bytes")
    return Probe(
        loss=_number(told.get("probe_loss"), -LARGEST_LOSS, LARGEST_LOSS),
        seconds=_number(timing.get("seconds"), 0.0, LONGEST_S),
        upload_bytes=size if isinstance(size, int) and 0 <= size <= LARGEST_BYTES else 0,
    )


def _alike(some: RecordDict, others: RecordDict) -> bool:
    """Whether two contents hold the very same records (and any at all)."""
    return (
        bool(some)
        and list(some) == list(others)
        and all(some[name] is others[name] for name in some)
    )


def _number(value: object, least: float, most: float) -> float:
    fits = isinstance(value, int | float) and least <= value <= most
    return float(value) if fits else math.nan  # type: ignore[arg-type]
