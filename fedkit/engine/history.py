"""The history of a run: it listens to events and ends as ``summary.json``."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from fedkit import __version__
from fedkit.engine.events import APART, REWIND, Event
from fedkit.engine.roster import Member
from fedkit.engine.seen import Ledger, jain
from fedkit.engine.stopping import reached
from fedkit.rundir import SCHEMA
from fedkit.settings import FederationSettings

# Why a run ended that no rule ended.
ALL_DONE = "all rounds are done"
# What is measured, not when: equal seeds give equal digests.
IN_DIGEST = frozenset({"metric", "bytes", "coefficients"})
PERSONAL = ("own_model/own_test/accuracy", "global_model/own_test/accuracy")
GLOBAL = ("own_model/global_test/accuracy", "global_model/global_test/accuracy")
ALONE_PERSONAL = ("alone_model/own_test/accuracy",)
ALONE_GLOBAL = ("alone_model/global_test/accuracy",)


class History:
    """What the rounds have brought so far."""

    def __init__(self, seen: Ledger | None = None) -> None:
        """A history of which nothing has happened yet.

        Args:
            seen: a ledger that somebody else lets take the same events; None: one of its own.
        """
        self._metrics: dict[int, dict[int | None, dict[str, float]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        # By round: what a round costs does not hang on how many there were.
        self._bytes: dict[str, dict[int, dict[int | None, int]]] = {
            name: defaultdict(lambda: defaultdict(int)) for name in ("bytes_up", "bytes_down")
        }
        self._slowest: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._cpu: dict[int | None, float] = defaultdict(float)
        self._seconds: dict[str, dict[int, float]] = defaultdict(dict)
        self._lines: dict[tuple[int, str], list[bytes]] = defaultdict(list)
        # At which share of their channels clients train that do not train all.
        self._widths: dict[int, float] = {}
        self._seen, self._seen_elsewhere = seen or Ledger(), seen is not None

    def take(self, event: Event) -> None:
        """Take one event in."""
        round, client, name = event.round or 0, event.client, event.name or ""
        if not self._seen_elsewhere:
            self._seen.take(event)
        # A diverged model's measurement is null in the file from which a resumed run reads it back.
        broken = isinstance(event.value, float) and not math.isfinite(event.value)
        value = None if broken else event.value
        if event.event == REWIND:
            self._forget(round)
        if event.event in IN_DIGEST:
            fields = [event.event, round, event.exchange, client, name, value, event.n]
            self._lines[round, event.event].append(json.dumps(fields).encode() + b"\n")
        if event.event == "metric":
            self._metrics[round][client][name] = math.nan if value is None else float(value)
        elif event.event == "bytes" and event.exchange not in APART:
            self._bytes[name][round][client] += event.value
        elif event.event == "timing" and name == "cpu-seconds":
            self._cpu[client] = max(self._cpu[client], event.value)
        elif event.event == "timing" and name == "seconds" and event.exchange not in APART:
            slowest, exchange = self._slowest[round], event.exchange or ""
            slowest[exchange] = max(slowest[exchange], event.value)
        elif event.event == "width" and client is not None:
            self._widths[client] = float(event.value)
        elif event.event == "round":
            self._seconds[name][round] = float(event.value)

    def rounds(self) -> list[dict[str, Any]]:
        """One row for each round that has ended."""
        return [self._row(round) for round in sorted(self._seconds["seconds"])]

    def last_round(self) -> dict[str, Any]:
        """The row of the last round that has ended; there must be one."""
        return self._row(max(self._seconds["seconds"]))

    def _row(self, round: int) -> dict[str, Any]:
        return {
            "round": round,
            "seconds": self._seconds["seconds"][round],
            "seconds_slowest_client": sum(self._slowest.get(round, {}).values()),
            "seconds_server": self._seconds["seconds_server"].get(round),
            "bytes_up": sum(self._bytes["bytes_up"].get(round, {}).values()),
            "bytes_down": sum(self._bytes["bytes_down"].get(round, {}).values()),
            "mean_personal_accuracy": _mean(self._of_clients(round, PERSONAL).values()),
            "mean_global_accuracy": _mean(self._of_clients(round, GLOBAL).values()),
        }

    def digest(self, until: int | None = None) -> str:
        """SHA-256 (hex) of all measurements and bytes, times left out, in a fixed order.

        Args:
            until: leave out what came after this round.
        """
        sha = hashlib.sha256()
        # The lines of all rounds in the order of their text, in which round 10 comes before round 2.
        for round, event in sorted(self._lines, key=lambda key: f'"{key[1]}", {key[0]},'):
            if until is None or round <= until:
                lines = self._lines[round, event]
                lines.sort()  # those of former rounds are in order already
                sha.update(b"".join(lines))
        return sha.hexdigest()

    def _forget(self, round: int) -> None:
        """That round, and what came after it, will be run again."""
        by_rounds: list[dict[int, Any]] = [self._metrics, self._slowest]
        by_rounds += [*self._seconds.values(), *self._bytes.values()]
        for by_round in by_rounds:
            for at in [at for at in by_round if at >= round]:
                del by_round[at]
        for pair in [pair for pair in self._lines if pair[0] >= round]:
            del self._lines[pair]

    def summary(
        self,
        settings: FederationSettings,
        preset: str,
        members: Iterable[Member],
        *,
        status: str,
        stop_reason: str,
        engine: str,
        seconds: float,
        sent_up: int | None,
        sent_down: int | None,
    ) -> dict[str, Any]:
        """The whole of ``summary.json``; what does not apply is null."""
        rows = self.rounds()
        rounds = rows[-1]["round"] if rows else 0
        # A run that was stopped may have gone on for some rounds after it was last measured.
        measured = [row["round"] for row in rows if row["mean_personal_accuracy"] is not None]
        last = measured[-1] if measured else 0
        spread = list(self._of_clients(last, GLOBAL).values())
        members = sorted(members, key=lambda member: member.client)
        took_part = self._seen.took_part()
        return {
            "schema": SCHEMA,
            "fedkit": __version__,
            "status": status,
            "stop_reason": stop_reason,
            "strategy": settings.strategy,
            "preset": preset,
            "dataset": settings.dataset,
            "public": settings.public,
            "partition": settings.partition,
            "engine": engine,
            "rounds": rounds,
            "seed": settings.seed,
            "digest": self.digest(),
            "seconds": seconds,
            "bytes_up": sum(row["bytes_up"] for row in rows),
            "bytes_down": sum(row["bytes_down"] for row in rows),
            "sent_up": sent_up,
            "sent_down": sent_down,
            "mean_personal_accuracy": _mean(self._of_clients(last, PERSONAL).values()),
            "mean_global_accuracy": _mean(spread),
            "worst_global_accuracy": min(spread, default=None),
            "std_global_accuracy": statistics.pstdev(spread) if spread else None,
            "best_round": _best(rows),
            "target": reached(settings.target, rows),
            "fairness": jain(took_part.get(member.client, 0) for member in members),
            "server_models": self._server_models(last),
            "clients": self._clients(members, last, took_part),
            "history": rows,
        }

    def _server_models(self, round: int) -> dict[str, float]:
        """Accuracy on the common test set of each network that lives at the server, by its label."""
        end = "_model/global_test/accuracy"
        measured = self._metrics.get(round, {}).get(None, {})
        return {
            name.removesuffix(end): value for name, value in measured.items() if name.endswith(end)
        }

    def _clients(
        self, members: Iterable[Member], last: int, took_part: Mapping[int, int]
    ) -> list[dict[str, Any]]:
        accuracies = {
            f"{name}_accuracy": self._of_clients(last, names)
            for name, names in (
                ("alone_personal", ALONE_PERSONAL),
                ("alone_global", ALONE_GLOBAL),
                ("personal", PERSONAL),
                ("global", GLOBAL),
            )
        }
        bytes_by_client = {name: _by_client(sizes) for name, sizes in self._bytes.items()}
        return [
            {
                "id": member.client,
                "model": member.model,
                "width": self._widths.get(member.client, member.width),
                "depth": member.depth,
                "shard": member.client,
                "examples": member.examples,
                **{name: by_client.get(member.client) for name, by_client in accuracies.items()},
                "cpu_seconds": self._cpu.get(member.client),
                **{name: sizes.get(member.client, 0) for name, sizes in bytes_by_client.items()},
                "rounds": took_part.get(member.client, 0),
            }
            for member in members
        ]

    def _of_clients(self, round: int, names: tuple[str, ...]) -> dict[int, float]:
        """The first of ``names`` that each client has; a model of the server's counts for all."""
        found: dict[int, float] = {}
        by_client = self._metrics.get(round, {})
        shared = by_client.get(None, {})
        measured = [
            client
            for client, values in by_client.items()
            if client is not None and any(name in values for name in PERSONAL)
        ]
        for client in measured:
            values = {**shared, **by_client[client]}
            for name in names:
                if name in values:
                    found[client] = values[name]
                    break
        return found


def _by_client(sizes: Mapping[int, Mapping[int | None, int]]) -> dict[int | None, int]:
    totals: dict[int | None, int] = defaultdict(int)
    for of_round in sizes.values():
        for client, size in of_round.items():
            totals[client] += size
    return totals


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None


def _best(rows: list[dict[str, Any]]) -> int | None:
    measured = [row for row in rows if row["mean_global_accuracy"] is not None]
    if not measured:
        return None
    best: int = max(measured, key=lambda row: (row["mean_global_accuracy"], -row["round"]))["round"]
    return best
