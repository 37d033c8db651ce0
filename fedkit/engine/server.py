"""The server process: listen, load, let clients in, drive the rounds, write the result."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkit import __version__
from fedkit.engine.events import APART_TYPES, REWIND, Event, Listener
from fedkit.engine.history import ALL_DONE, History
from fedkit.engine.known import Known as Rounds
from fedkit.engine.lobby import Lobby
from fedkit.engine.metrics import Metrics, metrics_address
from fedkit.engine.nodes import Known, NodeFile, read_nodes
from fedkit.engine.plan import Plan
from fedkit.errors import FedkitError
from fedkit.link.doctor import doctor_handler
from fedkit.link.frames import PROTOCOL
from fedkit.link.server import LinkServer
from fedkit.link.services import Services
from fedkit.rundir import RunDirectory, default_path
from fedkit.security.credentials import server_credentials
from fedkit.security.guard import Guard
from fedkit.security.tokens import TokenStore
from fedkit.settings import as_config

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, ConfigRecord

    from fedkit.engine.checkpoint import Checkpoint
    from fedkit.engine.driver import Driver

_log = logging.getLogger(__name__)


def serve(
    plan: Plan, listeners: Sequence[Listener] = (), *, resume: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Run a federation as its server; returns the run directory and the summary.

    Args:
        plan: what to run.
        listeners: take every event, beside the run directory.
        resume: go on with the run in the plan's run directory.

    Raises:
        FedkitError: the port is in use, files are missing, too few clients are left, ...
        KeyboardInterrupt: it was asked to stop; the summary is written nevertheless.
    """
    metrics_address(plan.server.metrics_port)  # refused before anything is written
    path = Path(plan.server.run_dir or default_path(plan.federation.strategy))
    # Locked before anything else is touched where a run is; made only once the port is ours.
    rundir = RunDirectory(path, resume=True) if resume else None
    known = read_nodes(path) if resume else Known()
    lobby = Lobby(
        plan.federation,
        known.federation,
        one_model=plan.strategy.one_model,
        shards=known.shards,
        patience=plan.federation.rejoin_wait,
    )
    door = _Door(plan, lobby, known)
    address = door.link.listen(plan.server.listen)
    goodbye, ok = "The server ended: its own code failed.", False
    try:
        rundir = rundir or RunDirectory(path)
        rundir.write_config(plan.values(), resume=resume)
        rundir.write_text("address", address)
        door.link.spool_in(rundir.path)
        _log.info("Listening on %s, writing to %s.", address, rundir.path)
        run = _Run(plan, door, lobby, known, rundir, address, listeners)
        summary = run.to_the_end(resume=resume)
        goodbye, ok = f"The run is over: {summary['stop_reason']}.", True
    except FedkitError as error:
        goodbye = f"The server ended: {error}"
        raise
    except KeyboardInterrupt:
        # No end of the run: a service manager shall start the devices again, as it will the server.
        goodbye = "The server was stopped before the run was over."
        raise
    finally:
        door.close(goodbye, ok=ok)
    return path, summary


class _Door:
    """The port: the link, and what else is served on it."""

    def __init__(self, plan: Plan, lobby: Lobby, known: Known) -> None:
        tokens = TokenStore(Path(plan.security.tokens)) if plan.security.tokens else None
        guard = Guard(tokens)
        self._settings = as_config(plan.federation)
        self._federation = known.federation
        self.public_digest: str | None = None
        self._services = Services()
        self.link = LinkServer(
            lobby.greet,
            lobby.part,
            credentials=server_credentials(plan.security),
            guard=guard,
            nodes=known.nodes,
            services=[self._services.register, doctor_handler(self._report, guard)],
            grace=plan.server.reconnect_grace,
            limit=plan.server.max_message,
        )

    def close(self, goodbye: str, *, ok: bool) -> None:
        """Say goodbye to everybody, and free the port."""
        self._services.closing()
        self.link.close(goodbye, ok=ok)

    def _report(self, hello: dict[str, Any]) -> dict[str, Any]:
        return {
            "version": __version__,
            "protocol": PROTOCOL,
            "time": time.time(),
            "federation": self._federation,
            "run_config": self._settings,
            "public_digest": self.public_digest,
        }


class _Run:
    """One run of a server, from loading to the summary."""

    def __init__(
        self,
        plan: Plan,
        door: _Door,
        lobby: Lobby,
        known: Known,
        rundir: RunDirectory,
        address: str,
        listeners: Sequence[Listener],
    ) -> None:
        self._plan = plan
        self._door = door
        self._link = door.link
        self._lobby = lobby
        self._driver: Driver | None = None
        self._federation = known.federation
        self._nodes = NodeFile(rundir.path, known.federation)
        self._nodes.keep(known.nodes, known.shards)
        self._rundir = rundir
        self._rounds = Rounds(plan.federation)
        self._history = History(self._rounds.seen)
        self._metrics = Metrics(plan.federation)
        self._listeners = [
            rundir.record,
            self._rounds.take,
            self._history.take,
            self._metrics.take,
            *listeners,
        ]
        self._started = time.monotonic()
        # Of the processes before this one.
        self._seconds, self._sent_up, self._sent_down = 0.0, 0, 0
        self._address = address

    def to_the_end(self, *, resume: bool) -> dict[str, Any]:
        """All rounds, then the summary; on the way out of an error the summary says which."""
        status, reason = "failed", "the server's own code failed"
        try:
            where = metrics_address(self._plan.server.metrics_port)
            if where is not None:
                self._metrics.watch(self._link)
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
            summary = self._history.summary(
                self._plan.federation,
                self._plan.hyper.preset,
                self._driver.roster.members.values() if self._driver else (),
                status=status,
                stop_reason=reason,
                engine="grpc",
                seconds=self._elapsed(),
                sent_up=self._sent_up + _training(self._link.bytes_received),
                sent_down=self._sent_down + _training(self._link.bytes_sent),
            )
            try:
                self._rundir.write("summary.json", summary)
                self._emit(Event("stop", name=status, value=reason))
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
        from fedkit.flower import take_identity
        from fedkit.link.grid import LinkGrid

        rounds, checkpoint = self._rounds, None
        if resume:
            checkpoint = last_good(self._rundir.path, self._history, rounds.take)
        self._emit(Event("listen", name=self._address))
        take_identity()
        view = ServerView(self._plan)
        self._door.public_digest = view.data.public_digest
        self._rundir.write("partition.json", view.partition())
        strategy = self._plan.strategy(self._plan.hyper, view.facts(), self._emit)
        checkpoints = Checkpoints(self._rundir.path, self._plan.server.keep_checkpoints)
        arrays, first_round, done = strategy.initial_arrays(), 1, 0

        def round_over(server_round: int, new: ArrayRecord) -> None:
            nonlocal arrays, done
            arrays, done = new, server_round
            self._rundir.sync()
            selector = driver.chooser.remembered(server_round)
            checkpoints.save(self._progress(server_round), strategy.state, new, selector)

        def why_not(node_id: int, facts: ConfigRecord) -> str | None:
            strange = self._lobby.why_not(node_id, facts["client"])
            return strange or view.why_not(facts) or strategy.why_not(facts)

        self._driver = driver = Driver(
            strategy,
            LinkGrid(self._link, self._federation),
            self._plan.federation,
            self._emit,
            check=why_not,
            offer=view.offer,
            evaluate_fn=lambda round, arrays: view.measure(
                strategy.server_models(arrays), strategy.measured
            ),
            round_over=round_over,
            known=rounds,
            elapsed=self._elapsed,
        )
        if checkpoint is not None:
            arrays, done = checkpoint.arrays, checkpoint.progress.round
            first_round = done + 1
            if strategy.state is not None:
                strategy.state = checkpoint.strategy_state(type(strategy.state))
            driver.chooser.recall(checkpoint)
            self._go_on(checkpoint)
        if resume:
            self._emit(Event(REWIND, first_round, name=f"the run goes on with round {first_round}"))
        self._emit(Event("start", name=self._plan.federation.strategy))
        try:
            back = self._awaited(checkpoint) if checkpoint is not None else set()
            arrays = driver.run(arrays, first_round, back).arrays
        finally:
            strategy.close()
            view.save(strategy.server_models(arrays), self._rundir.path / "models", done)
        return driver.stop_reason

    def _awaited(self, checkpoint: Checkpoint) -> set[int]:
        """Who was there at the checkpoint, and who has come since; not who had gone before."""
        progress = checkpoint.progress
        known = {member.node_id for member in progress.members}
        return set(progress.present) | (set(self._lobby.shards().values()) - known)

    def _go_on(self, checkpoint: Checkpoint) -> None:
        assert self._driver is not None
        progress = checkpoint.progress
        self._driver.roster.members = {member.node_id: member for member in progress.members}
        self._seconds = progress.seconds
        self._sent_up, self._sent_down = progress.sent_up, progress.sent_down

    def _progress(self, server_round: int) -> Any:
        from fedkit.engine.checkpoint import Progress

        assert self._driver is not None
        return Progress(
            round=server_round,
            digest=self._history.digest(until=server_round),
            seconds=self._elapsed(),
            sent_up=self._sent_up + _training(self._link.bytes_received),
            sent_down=self._sent_down + _training(self._link.bytes_sent),
            members=tuple(self._driver.roster.members.values()),
            present=tuple(member.node_id for member in self._driver.roster.connected()),
        )

    def _elapsed(self) -> float:
        return self._seconds + time.monotonic() - self._started

    def _emit(self, event: Event) -> None:
        if event.event == "round_start":
            # Before any of them is given work: a server that is restarted must know them again.
            self._nodes.keep(self._link.nodes(), self._lobby.shards())
        for listener in self._listeners:
            listener(event)


def _training(carried: Mapping[str, int]) -> int:
    """Bytes of what the algorithm sends: joining, measuring and the reference are apart."""
    return sum(size for kind, size in carried.items() if kind not in APART_TYPES)
