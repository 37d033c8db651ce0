"""The driver: one function that takes any Flower ``Strategy`` through its rounds on any ``Grid``.

Flower's own ``start`` has no exchanges, no deadline for a whole round, no events and no joining; this
has, so that an algorithm file holds nothing but its algorithm.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Iterable
from typing import Protocol, runtime_checkable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedkit.engine.choosing import Chooser
from fedkit.engine.events import APART, REWIND, Event, Listener
from fedkit.engine.known import Known
from fedkit.engine.observing import Observed, emit_metrics
from fedkit.engine.probing import Probing
from fedkit.engine.registered import joined
from fedkit.engine.roster import Check, Offer, Roster
from fedkit.engine.round_grid import RoundGrid
from fedkit.engine.selection import Outcome
from fedkit.engine.strategy import Exchange, FederatedStrategy, exchanges_of
from fedkit.errors import FedkitError
from fedkit.settings import FederationSettings

JOIN_POLL_S = 0.02
# How often a round is tried that does not reach its quorum.
TRIES = 3
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
RoundOver = Callable[[int, ArrayRecord], None]


@runtime_checkable
class CanRepeat(Protocol):
    """A grid whose instructions are known again when a round is repeated."""

    def begin_round(self) -> None:
        """A round begins, or begins again."""
        ...


class _BelowQuorum(Exception):
    """Too few of the clients that were selected have answered."""


class Driver:
    """Takes a strategy through its rounds and tells what happens."""

    def __init__(
        self,
        strategy: Strategy,
        grid: Grid,
        settings: FederationSettings,
        emit: Listener,
        *,
        check: Check = lambda node_id, facts: None,
        offer: Offer = lambda lacks_public: RecordDict(),
        evaluate_fn: EvaluateFn | None = None,
        round_over: RoundOver = lambda server_round, arrays: None,
        known: Known | None = None,
        elapsed: Callable[[], float] | None = None,
    ) -> None:
        """A driver.

        Args:
            strategy: any Flower strategy, ours or another's.
            grid: any Flower grid.
            settings: the federation's settings.
            emit: takes every event.
            check: says why a client may not join, or None (see ``Roster``).
            offer: what a client is told when it is asked to join (see ``Roster``).
            evaluate_fn: measures the global model at the server.
            round_over: called with the global model after each round, and with round 0 when the
                clients are there and the first can begin.
            known: what is known of the run so far; whoever gives it lets it take all that is emitted.
            elapsed: seconds that the run has taken, over all its processes.
        """
        self._strategy = strategy
        self._grid = grid
        self._settings = settings
        self._known = known or Known(settings)
        self._emit = emit if known is not None else self._known.taking_also(emit)
        self._evaluate_fn = evaluate_fn
        self._round_over = round_over
        started = time.monotonic()
        self._elapsed = elapsed or (lambda: time.monotonic() - started)
        self.roster = Roster(grid, check, self._emit, settings.round_timeout, offer)
        self.chooser = Chooser(settings, self._known.seen, self._emit)
        self._result = Result()
        self._had_enough: str | None = None
        # The rule that ended the run before its last round.
        self.stop_reason: str | None = None

    def run(
        self, arrays: ArrayRecord, first_round: int = 1, awaited: Collection[int] = ()
    ) -> Result:
        """All rounds, from the global model ``arrays`` (empty where there is none).

        Args:
            arrays: where ``first_round`` starts.
            first_round: counted from 1; a later one goes on with a strategy whose state was loaded.
            awaited: nodes that were in the run when it was broken off; they may need ``rejoin_wait``
                to come back, and the numbers hang on who takes part.

        Raises:
            FedkitError: too few clients are left to go on.
        """
        self._result.arrays = arrays
        if first_round > self._settings.rounds:
            return self._result
        if first_round > 1:
            # A resumed run may have had enough already.
            self.stop_reason = self._used_up() or self._known.stopping.good_enough()
            if self.stop_reason is not None:
                return self._result
        self._wait_for_clients(None)
        patience = time.monotonic() + self._settings.rejoin_wait
        while not set(awaited) <= set(self._grid.get_node_ids()) and time.monotonic() < patience:
            time.sleep(JOIN_POLL_S)
        if first_round == 1:
            self._round_over(0, arrays)
        for server_round in range(first_round, self._settings.rounds + 1):
            arrays = self._result.arrays = self._settle(server_round, arrays)
            self._round_over(server_round, arrays)
            if server_round < self._settings.rounds:
                reason = self._had_enough or self._known.stopping.good_enough()
                if reason is not None:
                    self.stop_reason = reason
                    break
        return self._result

    def _used_up(self) -> str | None:
        return self._known.stopping.used_up(self._elapsed())

    def _settle(self, server_round: int, arrays: ArrayRecord) -> ArrayRecord:
        """A round, repeated or skipped where too few answer; gives the global model after it."""
        settings, strategy = self._settings, self._strategy
        state = getattr(strategy, "state", None) if settings.quorum else None
        before = copy.deepcopy(state)
        self.chooser.begin_round()
        for attempt in range(1, TRIES + 1):
            self._wait_for_clients(settings.rejoin_wait)
            if isinstance(self._grid, CanRepeat):
                self._grid.begin_round()
            try:
                return self._round(server_round, arrays)
            except _BelowQuorum as missed:
                if state is not None:
                    strategy.state = copy.deepcopy(before)  # type: ignore[attr-defined]
                skipped = settings.below_quorum == "skip"
                how = "skipped" if skipped else "repeated" if attempt < TRIES else "given up"
                self._emit(Event("warning", server_round, name=f"{missed}: the round is {how}"))
                self._emit(Event(REWIND, server_round, name=str(missed)))
                if skipped:
                    self._had_enough = self._used_up()
                    return arrays
                reason = missed
        raise FedkitError(
            f"Round {server_round} was tried {TRIES} times and did not reach the quorum ({reason}): "
            "the run ends here, and can be resumed."
        )

    def _round(self, server_round: int, arrays: ArrayRecord) -> ArrayRecord:
        settings = self._settings
        everybody = self.roster.connected()
        chosen = self.roster.with_all(self.chooser.choose(server_round, everybody))
        clients = [member.client for member in chosen]
        started = time.monotonic()
        grid = RoundGrid(self._grid, chosen, started + settings.round_timeout)
        config = ConfigRecord({"server-round": server_round})
        self._emit(Event("round_start", server_round, value=clients, n=len(chosen)))
        exchanges = exchanges_of(self._strategy)
        if self.chooser.probes(server_round):
            exchanges = Probing(self.chooser, grid, self._emit).planned(exchanges)
        for at, exchange in enumerate(exchanges):
            # A client that does not answer must not use up the time of what comes after.
            grid.share = 1 / (len(exchanges) - at)
            new_arrays = self._exchange(server_round, exchange, arrays, config, grid)
            arrays = arrays if new_arrays is None else new_arrays
            self._check_quorum(exchange, grid)
        # The reference and the measuring are no part of what the round costs, nor of its deadline.
        seconds = time.monotonic() - started
        server_seconds = seconds - grid.waited
        if settings.alone and isinstance(self._strategy, FederatedStrategy):
            apart = RoundGrid(self._grid, grid.members, time.monotonic() + settings.round_timeout)
            self._exchange(server_round, self._alone(self._strategy), arrays, config, apart)
        # Said before the measuring, which is whole in a run's last round.
        self._had_enough = self._used_up()
        last = server_round == settings.rounds or self._had_enough is not None
        if last or server_round % settings.eval_every == 0:
            silent = {member.client for member in chosen} - {m.client for m in grid.members}
            measured = [m for m in joined(everybody) if last or m.client not in silent]
            apart = RoundGrid(self._grid, measured, time.monotonic() + settings.round_timeout)
            arrays = self._measure(server_round, arrays, apart, last)
        self._emit(Event("round", server_round, None, None, "seconds_server", server_seconds))
        self._emit(Event("round", server_round, None, None, "seconds", seconds, len(chosen)))
        self._learn(server_round, grid)
        return arrays

    def _learn(self, server_round: int, grid: RoundGrid) -> None:
        answered = {member.client for member in grid.members}
        seen = self._known.seen
        self.chooser.learn(
            Outcome(
                round=server_round,
                accuracy=self._known.stopping.accuracy(server_round),
                seconds=seen.latency(server_round),
                bytes_up=seen.bytes_up(server_round),
                kept=tuple(sorted(grid.counted & answered)),
                lost=tuple(sorted(grid.counted - answered)),
            )
        )

    def _check_quorum(self, exchange: Exchange, grid: RoundGrid) -> None:
        """Of those whose answers the round rests on, enough must be there."""
        wanted = len(grid.counted)
        answered = sum(member.client in grid.counted for member in grid.members)
        needed = math.ceil(self._settings.quorum * wanted - 1e-9)
        if self._settings.quorum and grid.members and not wanted:
            # A repeated round keeps its decisions, and of those who were to go on nobody is left.
            raise _BelowQuorum(f"nobody who was to go on is there after {exchange.name}")
        if answered < needed:
            raise _BelowQuorum(
                f"{answered} of {wanted} clients were there after {exchange.name}, the quorum is {needed}"
            )

    def _exchange(
        self,
        server_round: int,
        exchange: Exchange,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: RoundGrid,
    ) -> ArrayRecord | None:
        started = time.monotonic()
        observed = Observed(server_round, exchange.name, self._client, self._emit)
        sent = observed.outgoing(exchange.configure(server_round, arrays, config, grid))
        replies = observed.incoming(grid.send_and_receive(sent), lambda: grid.allowed)
        new_arrays, metrics = exchange.aggregate(server_round, replies)
        for _ in replies:  # what the strategy did not read still belongs to the record
            continue
        grid.members = [m for m in grid.members if m.node_id not in observed.silent]
        if metrics is not None and exchange.name not in APART:
            self._result.train_metrics_clientapp[server_round] = metrics
        if observed.asked:
            seconds = time.monotonic() - started
            done = Event(
                "exchange", server_round, exchange.name, None, "seconds", seconds, observed.answered
            )
            self._emit(done)
        return new_arrays

    def _measure(
        self, server_round: int, arrays: ArrayRecord, grid: RoundGrid, whole: bool
    ) -> ArrayRecord:
        """Measure everywhere; gives the global model with what was found out about it for that."""
        strategy = self._strategy
        before = strategy.before_evaluate() if isinstance(strategy, FederatedStrategy) else []
        samples = 0 if whole else self._settings.eval_samples
        config = ConfigRecord({"server-round": server_round, "eval-samples": samples})

        def aggregate(server_round: int, replies: Iterable[Message]) -> tuple[None, None]:
            metrics = self._strategy.aggregate_evaluate(server_round, replies)
            if metrics is not None:
                self._result.evaluate_metrics_clientapp[server_round] = metrics
            return None, None

        evaluate = Exchange("evaluate", self._strategy.configure_evaluate, aggregate)
        exchanges = [*before, evaluate]
        for at, exchange in enumerate(exchanges):
            grid.share = 1 / (len(exchanges) - at)
            new = self._exchange(server_round, exchange, arrays, config, grid)
            arrays = arrays if new is None else new
        if self._evaluate_fn is None:
            return arrays
        metrics = self._evaluate_fn(server_round, arrays)
        if metrics is not None:
            self._result.evaluate_metrics_serverapp[server_round] = metrics
            emit_metrics(self._emit, server_round, "evaluate", None, metrics)
        return arrays

    def _alone(self, strategy: FederatedStrategy) -> Exchange:
        def configure(
            server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
        ) -> Iterable[Message]:
            content = RecordDict({"config": strategy.config(server_round)})
            members = strategy.members(grid)
            return strategy.instruct(members, "train.alone", server_round, lambda member: content)

        return Exchange("alone", configure, lambda server_round, replies: (None, None))

    def _wait_for_clients(self, patience: float | None) -> None:
        wanted = self._settings.min_clients
        started = time.monotonic()
        self.roster.ask_again()
        self.roster.admit()
        while len(self.roster.connected()) < wanted:
            if patience is not None and time.monotonic() - started > patience:
                here = len(self.roster.connected())
                raise FedkitError(
                    f"Only {here} of the {wanted} clients that a round needs (min-clients) are "
                    f"connected, for {patience:.0f} seconds now: the run ends here, and can be "
                    "resumed."
                )
            time.sleep(JOIN_POLL_S)
            self.roster.admit()

    def _client(self, node_id: int) -> int | None:
        member = self.roster.members.get(node_id)
        return member.client if member else None
