"""One run of a federation, whatever carries its messages: from loading to the summary."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fedkit.engine.events import REWIND, Event, Listener
from fedkit.engine.history import ALL_DONE, History
from fedkit.engine.known import Known
from fedkit.engine.metrics import Metrics, metrics_address
from fedkit.engine.plan import Plan
from fedkit.errors import FedkitError
from fedkit.rundir import RunDirectory

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, ConfigRecord
    from flwr.serverapp import Grid

    from fedkit.engine.checkpoint import Progress
    from fedkit.engine.driver import Driver
    from fedkit.engine.facts import ServerView

_log = logging.getLogger(__name__)


class Carried(NamedTuple):
    """Bytes that an engine has moved for training, up and down, over all processes of a run."""

    up: int
    down: int


class Run:
    """A run; an engine says what its grid is, and adds what it has to."""

    # As the summary names it.
    engine: str
    # Where clients find it, if anywhere.
    address: str | None = None
    # Whether what clients remember outlives this process, so that a checkpoint is of use.
    resumable = True

    def __init__(self, plan: Plan, rundir: RunDirectory, listeners: Sequence[Listener]) -> None:
        """A run of ``plan`` that writes to ``rundir``; ``listeners`` take every event beside it."""
        self.plan = plan
        self.driver: Driver | None = None
        self._rundir = rundir
        self._known = Known(plan.federation)
        self._history = History(self._known.seen)
        self._metrics = Metrics(plan.federation)
        self._listeners = [
            rundir.record,
            self._known.take,
            self._history.take,
            self._metrics.take,
            *listeners,
        ]
        self._started = time.monotonic()
        # Of the processes before this one.
        self._seconds = 0.0

    def identify(self) -> None:
        """Tell Flower who this process is, where its own engine has not done so."""
        from fedkit.flower import take_identity

        take_identity()

    def grid(self, view: ServerView) -> Grid:
        """Where the clients are; the data are loaded by now."""
        raise NotImplementedError("an engine has a grid")

    def why_not(self, node_id: int, facts: ConfigRecord) -> str | None:
        """Why the engine does not let this client join, or None."""
        return None

    def carried(self) -> Carried | None:
        """What the engine has moved for training; None where nothing is moved."""
        return None

    def go_on(self, progress: Progress) -> set[int]:
        """Take up what an earlier process had; gives the nodes to be awaited."""
        raise NotImplementedError("this engine's runs can't be resumed")

    def watch(self, metrics: Metrics) -> None:
        """Let the engine's own figures be served beside the run's."""

    def emit(self, event: Event) -> None:
        """Tell everybody."""
        for listener in self._listeners:
            listener(event)

    def elapsed(self) -> float:
        """Seconds that the run has taken, over all its processes."""
        return self._seconds + time.monotonic() - self._started

    def to_the_end(self, *, resume: bool = False) -> dict[str, Any]:
        """All rounds, then the summary; on the way out of an error the summary says which."""
        plan = self.plan
        status, reason = "failed", "the server's own code failed"
        try:
            where = metrics_address(plan.server.metrics_port)
            if where is not None:
                self.watch(self._metrics)
                _log.info("Metrics at %s.", self._metrics.serve(*where))
            reason = self._run_all(resume) or ALL_DONE
            status = "completed"
        except KeyboardInterrupt:
            status, reason = "stopped", "it was asked to stop"
            raise
        except FedkitError as error:
            reason = str(error)
            raise
        finally:
            carried = self.carried()
            summary = self._history.summary(
                plan.federation,
                plan.hyper.preset,
                self.driver.roster.members.values() if self.driver else (),
                status=status,
                stop_reason=reason,
                engine=self.engine,
                seconds=self.elapsed(),
                sent_up=carried.up if carried is not None else None,
                sent_down=carried.down if carried is not None else None,
            )
            try:
                self._rundir.write("summary.json", summary)
                self.emit(Event("stop", name=status, value=reason))
            finally:
                self._rundir.close()
                self._metrics.close()
        return summary

    def _run_all(self, resume: bool) -> str | None:
        """Run it; gives the rule that ended it before its last round, if one did."""
        from fedkit.engine.checkpoint import Checkpoints
        from fedkit.engine.driver import Driver
        from fedkit.engine.facts import ServerView
        from fedkit.engine.resume import last_good

        checkpoint = None
        if resume:
            checkpoint = last_good(self._rundir.path, self._history, self._known.take)
        if self.address is not None:
            self.emit(Event("listen", name=self.address))
        self.identify()
        view = ServerView(self.plan)
        self._rundir.write("partition.json", view.partition())
        strategy = self.plan.strategy(self.plan.hyper, view.facts(), self.emit)
        checkpoints = Checkpoints(self._rundir.path, self.plan.server.keep_checkpoints)
        arrays, first_round, done = strategy.initial_arrays(), 1, 0
        back: set[int] = set()

        def round_over(server_round: int, new: ArrayRecord) -> None:
            nonlocal arrays, done
            arrays, done = new, server_round
            self._rundir.sync()
            if not self.resumable:
                return
            selector = driver.chooser.remembered(server_round)
            checkpoints.save(self._progress(server_round), strategy.state, new, selector)

        def why_not(node_id: int, facts: ConfigRecord) -> str | None:
            strange = self.why_not(node_id, facts)
            return strange or view.why_not(facts) or strategy.why_not(facts)

        self.driver = driver = Driver(
            strategy,
            self.grid(view),
            self.plan.federation,
            self.emit,
            check=why_not,
            offer=view.offer,
            evaluate_fn=lambda round, arrays: view.measure(
                strategy.server_models(arrays), strategy.measured
            ),
            round_over=round_over,
            known=self._known,
            elapsed=self.elapsed,
        )
        if checkpoint is not None:
            arrays, done = checkpoint.arrays, checkpoint.progress.round
            first_round = done + 1
            if strategy.state is not None:
                strategy.state = checkpoint.strategy_state(type(strategy.state))
            driver.chooser.recall(checkpoint)
            progress = checkpoint.progress
            driver.roster.members = {member.node_id: member for member in progress.members}
            self._seconds = progress.seconds
            back = self.go_on(progress)
        if resume:
            self.emit(Event(REWIND, first_round, name=f"the run goes on with round {first_round}"))
        self.emit(Event("start", name=self.plan.federation.strategy))
        try:
            arrays = driver.run(arrays, first_round, back).arrays
        finally:
            strategy.close()
            view.save(strategy.server_models(arrays), self._rundir.path / "models", done)
        return driver.stop_reason

    def _progress(self, server_round: int) -> Progress:
        from fedkit.engine.checkpoint import Progress

        assert self.driver is not None
        carried = self.carried() or Carried(0, 0)
        return Progress(
            round=server_round,
            digest=self._history.digest(until=server_round),
            seconds=self.elapsed(),
            sent_up=carried.up,
            sent_down=carried.down,
            members=tuple(self.driver.roster.members.values()),
            present=tuple(member.node_id for member in self.driver.roster.connected()),
        )
