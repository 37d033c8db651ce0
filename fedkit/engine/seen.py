"""The ledger: what the server has seen of each client, from the driver's events alone.

A resumed run replays its events, and so knows the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

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
    """Who was chosen in which round, and what came of it."""

    def __init__(self) -> None:
        self._rounds: dict[int, dict[int, _Part]] = {}

    def take(self, event: Event) -> None:
        """Take one event in."""
        round = event.round or 0
        if event.event == REWIND:
            # Of a round that is skipped it stays known who did not answer; one that is run again
            # begins anew.
            missed = {c: part for c, part in self._rounds.get(round, {}).items() if part.missed}
            self._rounds = {at: parts for at, parts in self._rounds.items() if at < round}
            self._rounds |= {round: missed} if missed else {}
        elif event.event == "round_start":
            self._rounds[round] = {client: _Part() for client in event.value or ()}
        elif event.event == "kept":
            for client, part in self._rounds.get(round, {}).items():
                part.stopped = not part.missed and client not in event.value
        elif event.client is not None and event.exchange not in APART:
            part = self._rounds.get(round, {}).get(event.client, _Part())
            _note(part, event)

    def before(self, round: int) -> Mapping[int, Seen]:
        """What was seen of each client in the rounds before that one."""
        return _Before(self._rounds, round)

    def took_part(self) -> dict[int, int]:
        """In how many rounds each client's work counted."""
        counts: dict[int, int] = {}
        for part_of in self._rounds.values():
            for client, part in part_of.items():
                counts[client] = counts.get(client, 0) + _counts(part)
        return counts

    def bytes_up(self, round: int) -> int:
        """Tensor bytes that came up in a round."""
        return sum(part.bytes_up for part in self._rounds.get(round, {}).values())

    def latency(self, round: int) -> float:
        """Seconds of a round by the clients' clocks: the slowest probe, then the slowest that went on.

        One that did not answer took as long as it was given.
        """
        parts = self._rounds.get(round, {}).values()
        probing = max(
            ((part.probe_seconds or 0) + part.probe_transfer for part in parts), default=0.0
        )
        going_on = (part.seconds + part.transfer for part in parts if not part.stopped)
        return probing + max(going_on, default=0.0)


class _Before(Mapping[int, Seen]):
    """Made when it is read: most selectors ask of few clients, or of none."""

    def __init__(self, rounds: Mapping[int, Mapping[int, _Part]], round: int) -> None:
        self._rounds = {at: parts for at, parts in sorted(rounds.items()) if at < round}

    def __getitem__(self, client: int) -> Seen:
        parts = {at: parts[client] for at, parts in self._rounds.items() if client in parts}
        if not parts:
            raise KeyError(client)
        done = {at: part for at, part in parts.items() if _counts(part)}
        probed = {at: part for at, part in parts.items() if part.probe_seconds is not None}
        return Seen(
            rounds=tuple(done),
            losses=tuple(part.loss for part in done.values()),
            seconds=tuple(part.seconds + (part.probe_seconds or 0.0) for part in done.values()),
            transfer_seconds=tuple(part.transfer for part in done.values()),
            bytes_up=tuple(part.bytes_up for part in done.values()),
            probed=tuple(probed),
            rejected=tuple(at for at, part in parts.items() if part.stopped),
            probe_seconds=tuple(part.probe_seconds or 0.0 for part in probed.values()),
            probe_losses=tuple(part.probe_loss for part in probed.values()),
            missed=tuple(at for at, part in parts.items() if part.missed),
        )

    def __iter__(self) -> Iterator[int]:
        return iter(sorted({client for parts in self._rounds.values() for client in parts}))

    def __len__(self) -> int:
        return sum(1 for _ in self)


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
        # Who only says that it has heard has not taken part.
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
            part.loss = value
        elif event.name == "probe_loss":
            part.probe_loss = value
