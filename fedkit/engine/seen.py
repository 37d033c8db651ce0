"""The ledger: what the server has seen of each client, from the driver's events alone.

A resumed run replays its events, and so knows the same.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from fedkit.engine.events import APART, REWIND, Event
from fedkit.engine.selection import Seen

PROBE = "probe"
LONGEST_S = 1e7


@dataclass
class _Part:
    """One client's part in one round; seconds of work and of transfer leave the probe's out."""

    answered: bool = False
    loss: float = math.nan
    seconds: float = 0.0
    transfer: float = 0.0
    bytes_up: int = 0
    probe_seconds: float | None = None
    probe_transfer: float = 0.0
    probe_loss: float = math.nan
    stopped: bool = False
    missed: bool = False


class Ledger:
    """Who was chosen in which round, and what came of it.

    A round is open until a later one starts; what came of it is then added to what was seen of its
    clients, so that a round costs the same however many there were before.
    """

    def __init__(self) -> None:
        self._open: dict[int, dict[int, _Part]] = {}
        self._seen: dict[int, Seen] = {}
        self._last = 0

    def take(self, event: Event) -> None:
        """Take one event in."""
        round = event.round or 0
        if event.event == REWIND:
            self._rewind(round)
        elif event.event == "round_start":
            self._close_before(round)
            self._open[round] = {client: _Part() for client in event.value or ()}
        elif event.event == "kept":
            for client, part in self._open.get(round, {}).items():
                part.stopped = not part.missed and client not in event.value
        elif event.client is not None and event.exchange not in APART:
            part = self._open.get(round, {}).get(event.client, _Part())
            _note(part, event)

    def before(self, round: int) -> Mapping[int, Seen]:
        """What was seen of each client in the rounds before that one."""
        seen = self._seen
        if round <= self._last:
            seen = {client: _until(each, round) for client, each in seen.items()}
            seen = {client: each for client, each in seen.items() if each != Seen()}
        for at in sorted(self._open):
            if at < round:
                seen = _added(seen, at, self._open[at])
        return MappingProxyType(seen)

    def took_part(self) -> dict[int, int]:
        """In how many rounds each client's work counted."""
        latest = max([self._last, *self._open]) + 1
        return {client: len(seen.rounds) for client, seen in self.before(latest).items()}

    def bytes_up(self, round: int) -> int:
        """Tensor bytes that came up in a round that is still open."""
        return sum(part.bytes_up for part in self._open.get(round, {}).values())

    def latency(self, round: int) -> float:
        """Seconds of an open round by the clients' clocks: the slowest probe, then the slowest to go on.

        One that did not answer took as long as it was given.
        """
        parts = self._open.get(round, {}).values()
        probing = max(
            ((part.probe_seconds or 0) + part.probe_transfer for part in parts), default=0.0
        )
        going_on = (part.seconds + part.transfer for part in parts if not part.stopped)
        return probing + max(going_on, default=0.0)

    def _close_before(self, round: int) -> None:
        for at in sorted(self._open):
            if at < round:
                self._seen = _added(self._seen, at, self._open.pop(at))
                self._last = at

    def _rewind(self, round: int) -> None:
        """It is run again, with all after it, or skipped: then it stays known who did not answer."""
        if round <= self._last:
            self._seen = dict(self.before(round))
            self._open.clear()
            self._last = round - 1
            return
        missed = {c: part for c, part in self._open.get(round, {}).items() if part.missed}
        self._open = {at: parts for at, parts in self._open.items() if at < round}
        if missed:
            self._open[round] = missed


def _added(seen: Mapping[int, Seen], at: int, parts: Mapping[int, _Part]) -> dict[int, Seen]:
    """What was seen of each client, with what came of one round more."""
    more = dict(seen)
    for client, part in parts.items():
        before = more.get(client, Seen())
        done: dict[str, Any] = {
            "rounds": at,
            "losses": part.loss,
            "seconds": part.seconds + (part.probe_seconds or 0.0),
            "transfer_seconds": part.transfer,
            "bytes_up": part.bytes_up,
        }
        new = done if _counts(part) else {}
        if part.probe_seconds is not None:
            new |= {"probed": at, "probe_seconds": part.probe_seconds}
            new |= {"probe_losses": part.probe_loss}
        new |= {"rejected": at} if part.stopped else {}
        new |= {"missed": at} if part.missed else {}
        longer = {name: (*getattr(before, name), value) for name, value in new.items()}
        more[client] = replace(before, **longer)
    return more


def _until(seen: Seen, round: int) -> Seen:
    """What was seen in the rounds before that one."""
    done, probed = bisect_left(seen.rounds, round), bisect_left(seen.probed, round)
    return Seen(
        seen.rounds[:done],
        seen.losses[:done],
        seen.seconds[:done],
        seen.transfer_seconds[:done],
        seen.bytes_up[:done],
        seen.probed[:probed],
        seen.rejected[: bisect_left(seen.rejected, round)],
        seen.probe_seconds[:probed],
        seen.probe_losses[:probed],
        seen.missed[: bisect_left(seen.missed, round)],
    )


def jain(counts: Iterable[float]) -> float | None:
    """Jain's fairness index (sum x)^2 / (n sum x^2): 1 where all are alike, 1/n where one has all.

    None where nobody has anything (Jain, Chiu & Hawe 1984).
    """
    values = list(counts)
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def _counts(part: _Part) -> bool:
    return part.answered and not part.missed and not part.stopped


def _note(part: _Part, event: Event) -> None:
    value, probing = event.value, event.exchange == PROBE
    if event.event == "missed":
        part.missed = True
        if probing:
            part.probe_seconds = value
        else:
            part.seconds += value
    elif event.event == "bytes" and event.name == "bytes_up":
        # Who only says that it has heard, and neither sends nor trained, has not taken part.
        part.answered = part.answered or value > 0
        part.bytes_up += value
    elif event.event == "timing" and not 0 <= value <= LONGEST_S:
        pass  # no time runs backwards, nor for months, whatever a client says
    elif event.event == "timing" and event.name == "seconds":
        if probing:
            part.probe_seconds = value
        else:
            part.seconds += value
    elif event.event == "timing" and event.name == "transfer-seconds":
        if probing:
            part.probe_transfer = value
        else:
            part.transfer += value
    elif event.event == "metric" and value is not None:
        if event.name == "train_loss":
            part.answered, part.loss = True, value
        elif event.name == "probe_loss":
            part.probe_loss = value
