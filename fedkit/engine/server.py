"""The server process: listen, load, let clients in, drive the rounds, write the result."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkit.engine.door import Door
from fedkit.engine.events import APART_TYPES, Event, Listener
from fedkit.engine.lobby import Lobby
from fedkit.engine.metrics import Metrics, metrics_address
from fedkit.engine.nodes import Known, NodeFile, read_nodes
from fedkit.engine.plan import Plan
from fedkit.engine.running import Carried, Run
from fedkit.rundir import RunDirectory, default_path
from fedkit.settings import as_config

if TYPE_CHECKING:
    from flwr.app import ConfigRecord
    from flwr.serverapp import Grid

    from fedkit.engine.checkpoint import Progress
    from fedkit.engine.facts import ServerView

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
    door = Door(
        plan.server,
        plan.security,
        lobby.greet,
        lobby.part,
        federation=known.federation,
        about={"run_config": as_config(plan.federation)},
        nodes=known.nodes,
    )
    address = door.link.listen(plan.server.listen)
    with door.until_over() as over:
        rundir = rundir or RunDirectory(path)
        rundir.write_config(plan.values(), resume=resume)
        rundir.write_text("address", address)
        door.link.spool_in(rundir.path)
        _log.info("Listening on %s, writing to %s.", address, rundir.path)
        run = _LinkRun(plan, door, lobby, known, rundir, address, listeners)
        summary = run.to_the_end(resume=resume)
        over(f"The run is over: {summary['stop_reason']}.")
    return path, summary


class _LinkRun(Run):
    """A run over the gRPC link, from loading to the summary."""

    engine = "grpc"

    def __init__(
        self,
        plan: Plan,
        door: Door,
        lobby: Lobby,
        known: Known,
        rundir: RunDirectory,
        address: str,
        listeners: Sequence[Listener],
    ) -> None:
        super().__init__(plan, rundir, listeners)
        self._door = door
        self._link = door.link
        self._lobby = lobby
        self._federation = known.federation
        self._nodes = NodeFile(rundir.path, known.federation)
        self._nodes.keep(known.nodes, known.shards)
        # By the processes before this one.
        self._sent = Carried(0, 0)
        self.address = address

    def grid(self, view: ServerView) -> Grid:
        """The link, with the federation's keys."""
        from fedkit.link.grid import LinkGrid

        self._door.public_digest = view.data.public_digest
        return LinkGrid(self._link, self._federation)

    def why_not(self, node_id: int, facts: ConfigRecord) -> str | None:
        """Whether it is the client that it was let in as."""
        return self._lobby.why_not(node_id, facts["client"])

    def carried(self) -> Carried:
        """What the link has carried for training."""
        up, down = _training(self._link.bytes_received), _training(self._link.bytes_sent)
        return Carried(self._sent.up + up, self._sent.down + down)

    def go_on(self, progress: Progress) -> set[int]:
        """Who was there at the checkpoint, and who has come since; not who had gone before."""
        self._sent = Carried(progress.sent_up, progress.sent_down)
        known = {member.node_id for member in progress.members}
        return set(progress.present) | (set(self._lobby.shards().values()) - known)

    def watch(self, metrics: Metrics) -> None:
        """Serve the link's own figures, too."""
        metrics.watch(self._link)

    def emit(self, event: Event) -> None:
        """Tell everybody, and write down first who is about to be given work."""
        if event.event == "round_start":
            # A server that is restarted must know them again.
            self._nodes.keep(self._link.nodes(), self._lobby.shards())
        super().emit(event)


def _training(carried: Mapping[str, int]) -> int:
    """Bytes of what the algorithm sends: joining, measuring and the reference are apart."""
    return sum(size for kind, size in carried.items() if kind not in APART_TYPES)
