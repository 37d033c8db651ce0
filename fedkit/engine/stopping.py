"""When a run ends before its last round, and when it first was as good as wanted; outside all algorithms.

What stops a run rests on validation data, time or bytes. Test data stop nothing: a target on them is
only recorded.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fedkit.engine.events import APART, REWIND, Event
from fedkit.errors import UsageError
from fedkit.registry import suggest
from fedkit.settings import FederationSettings

T = TypeVar("T")
UNTIL = ("val_accuracy",)
TARGETS = ("mean_global_accuracy", "mean_personal_accuracy")
# Of a client that measures both, its own model's counts.
VALIDATION = ("own_model/own_val/accuracy", "global_model/own_val/accuracy")


@dataclass(frozen=True)
class _Standing:
    """How validation stands after a measured round: its accuracy, the best, and the first good enough."""

    round: int
    accuracy: float
    best: float
    best_round: int
    reached: float | None = None
    reached_round: int = 0


class Stopping:
    """The rules of one run, and what they look at; it listens to events.

    What was measured in earlier rounds is kept as one standing a round, and their bytes as one sum.
    """

    def __init__(self, settings: FederationSettings) -> None:
        self._settings = settings
        until = settings.until
        self._goal = parse_goal("until", until, UNTIL)[1] if until else math.inf
        # Of the newest measured round: by metric, by client.
        self._round = 0
        self._accuracies: dict[str, dict[int, float]] = {name: {} for name in VALIDATION}
        self._standings: dict[int, _Standing] = {}
        # All bytes up to and with each round.
        self._bytes: dict[int, int] = {}

    def take(self, event: Event) -> None:
        """Take one event in."""
        round = event.round or 0
        if event.event == REWIND:
            self._rewind(round)
        elif event.event == "bytes" and event.exchange not in APART:
            self._bytes[round] = self._bytes.get(round, self._total()) + event.value
        elif event.exchange == "evaluate" and event.client is not None and _is_measured(event):
            if round != self._round:
                self._settle()
                self._begin(round)
            self._accuracies[str(event.name)][event.client] = float(event.value)

    def accuracy(self, round: int) -> float:
        """Mean accuracy on the clients' validation data after that round; NaN if nobody measured."""
        if round != self._round:
            return self._standings[round].accuracy if round in self._standings else math.nan
        of_client = {
            client: value for name in reversed(VALIDATION) for client, value in
            self._accuracies[name].items()
        }  # fmt: skip
        return statistics.fmean(of_client.values()) if of_client else math.nan

    def used_up(self, seconds: float) -> str | None:
        """Why no more time or bytes are left, or None.

        Args:
            seconds: how long the run has taken, over all its processes.
        """
        settings, total = self._settings, self._total()
        if settings.max_seconds and seconds >= settings.max_seconds:
            return f"{seconds:.0f} seconds have passed, and max-seconds is {settings.max_seconds:g}"
        if settings.max_bytes and total >= settings.max_bytes:
            return f"{total:,} bytes have travelled, and max-bytes is {settings.max_bytes:,}"
        return None

    def good_enough(self) -> str | None:
        """Why validation accuracy asks for no more rounds, or None."""
        self._settle()
        now = _last(self._standings)
        if now is None:
            return None
        if now.reached is not None:
            return (
                f"{UNTIL[0]} is {now.reached:.4f} after round {now.reached_round}, and {self._goal:g} was "
                "wanted"
            )
        patience, waited = self._settings.patience, now.round - now.best_round
        if patience and waited >= patience:
            return (
                f"no validation accuracy in {waited} rounds was above the {now.best:.4f} of round "
                f"{now.best_round} (patience)"
            )
        return None

    def _total(self) -> int:
        return _last(self._bytes) or 0

    def _begin(self, round: int) -> None:
        self._round = round
        self._accuracies = {name: {} for name in VALIDATION}

    def _settle(self) -> None:
        """Take the newest measured round's accuracy into the standings."""
        round, accuracy = self._round, self.accuracy(self._round)
        if math.isnan(accuracy):
            return
        self._standings.pop(round, None)
        before = _last(self._standings)
        if before is None or accuracy > before.best:
            now = _Standing(round, accuracy, accuracy, round)
        else:
            now = replace(before, round=round, accuracy=accuracy)
        if before is not None and before.reached is not None:
            now = replace(now, reached=before.reached, reached_round=before.reached_round)
        elif accuracy >= self._goal:
            now = replace(now, reached=accuracy, reached_round=round)
        self._standings[round] = now

    def _rewind(self, round: int) -> None:
        for by_round in (self._standings, self._bytes):
            for at in [at for at in by_round if at >= round]:
                del by_round[at]
        if self._round >= round:
            self._begin(0)


def _last(by_round: dict[int, T]) -> T | None:
    """What belongs to the newest round; rounds come in order."""
    return by_round[next(reversed(by_round))] if by_round else None


def _is_measured(event: Event) -> bool:
    # One client that tells nonsense must not end the run of all, nor keep it from ending.
    return event.name in VALIDATION and event.value is not None and 0 <= event.value <= 1


def check_rules(settings: FederationSettings) -> None:
    """Raise ``UsageError`` for rules that could never be followed."""
    if settings.until:
        parse_goal("until", settings.until, UNTIL)
    if settings.target:
        parse_goal("target", settings.target, TARGETS)
    for name, given in (("until", settings.until), ("patience", settings.patience)):
        if given and not settings.val_fraction:
            raise UsageError(
                f"{name} looks at validation data, and there are none: set val-fraction as well, as in "
                "--val-fraction 0.1."
            )


def parse_goal(setting: str, text: str, known: Sequence[str]) -> tuple[str, float]:
    """``val_accuracy=0.8`` as its name and number.

    Raises:
        UsageError: another name, or no number from 0 to 1.
    """
    name, equals, number = text.partition("=")
    name = name.strip()
    if name not in known:
        why = ": only validation data may stop a run" if setting == "until" else ""
        raise UsageError(f"{setting} knows no {name!r}{suggest(name, known)}{why}.")
    try:
        goal = float(number) if equals else math.nan
    except ValueError:
        goal = math.nan
    if not 0 <= goal <= 1:
        raise UsageError(
            f"{setting} takes NAME=NUMBER with a number from 0 to 1, as in {known[0]}=0.8, not {text!r}."
        )
    return name, goal


def reached(target: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The first round whose mean accuracy was at the target, and what it had taken; None: no target.

    Args:
        target: as in ``mean_global_accuracy=0.8``, or empty.
        rows: the history, a row for each round.

    Returns:
        ``name``, ``value`` (wanted), then ``round``, ``seconds`` (of all rounds up to it) and ``bytes``
        (up and down), null where it was never reached.
    """
    if not target:
        return None
    name, goal = parse_goal("target", target, TARGETS)
    found: dict[str, Any] = {"round": None, "seconds": None, "bytes": None}
    seconds, size = 0.0, 0
    for row in rows:
        seconds, size = seconds + row["seconds"], size + row["bytes_up"] + row["bytes_down"]
        if row[name] is not None and row[name] >= goal:
            found = {"round": row["round"], "seconds": seconds, "bytes": size}
            break
    return {"name": name, "value": goal, **found}
