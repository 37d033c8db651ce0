"""Events: algorithms and driver tell what happens; files, terminals and summaries listen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

# A round is run again: what was told of it, and of those after it, does not count.
REWIND = "rewind"
# Exchanges whose cost is no part of what the algorithm costs.
APART = frozenset({"alone", "statistics", "evaluate"})
# The types of their messages, and of joining.
APART_TYPES = frozenset({"query.join", "query.statistics", "evaluate", "train.alone"})


@dataclass(frozen=True)
class Event:
    """One measurement or occurrence; the fields of a line in ``metrics.jsonl`` but for the time.

    Attributes:
        event: what happened, e.g. ``metric``, ``exchange``, ``round``, ``join``, ``warning``.
        round: the round it belongs to, counted from 1.
        exchange: the exchange of that round, e.g. ``local``.
        client: the client's index.
        name: what was measured, e.g. ``own_model/own_test/accuracy``, or a text.
        value: the measurement.
        n: how many samples (or replies) it rests on.
    """

    event: str
    round: int | None = None
    exchange: str | None = None
    client: int | None = None
    name: str | None = None
    value: Any = None
    n: int | None = None


Listener: TypeAlias = Callable[[Event], None]
