"""The ``ServerApp`` of fedkit on Flower's engine: the rounds of `fedkit server`, over Flower's grid."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedkit.cli import logs
from fedkit.engine.events import Listener
from fedkit.engine.nodes import Known, NodeFile, read_nodes
from fedkit.engine.plan import Plan, make_plan
from fedkit.engine.resume import is_over, resumed_plan, run_to_resume
from fedkit.engine.running import Run
from fedkit.errors import FedkitError
from fedkit.flower_engine.grid import FlowerGrid
from fedkit.flower_engine.settings import given
from fedkit.flower_engine.shards import Shards
from fedkit.report import print_result
from fedkit.rundir import RunDirectory, default_path
from fedkit.settings import Value, as_config

if TYPE_CHECKING:
    from flwr.app import ConfigRecord

    from fedkit.engine.checkpoint import Progress
    from fedkit.engine.events import Event
    from fedkit.engine.facts import ServerView

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes."""
    try:
        run(grid, context.run_config)
    except FedkitError as error:
        # Flower then writes a traceback of its own.
        print(f"Error: {error}", file=sys.stderr, flush=True)
        raise


def run(grid: Grid, run_config: Mapping[str, Value]) -> None:
    """Run a federation to its end over Flower's grid; its progress and table go to Flower's log.

    Raises:
        FedkitError: files are missing, too few clients are left, ...
    """
    typed, named = given(run_config)
    resumed = run_to_resume(named, typed)
    plan = make_plan(typed) if resumed is None else resumed_plan(resumed, typed)
    if resumed is not None and is_over(plan):
        print(f"The run in {resumed} is over: there is nothing to go on with.")
        return
    known = read_nodes(resumed) if resumed is not None else Known()
    path = Path(plan.server.run_dir or default_path(plan.federation.strategy))
    rundir = RunDirectory(path, resume=resumed is not None)
    rundir.write_config(plan.values(), resume=resumed is not None)
    progress = logs.progress(plan.federation)
    try:
        one = FlowerRun(plan, grid, known, rundir, [progress.take])
        summary = one.to_the_end(resume=resumed is not None)
    finally:
        progress.close()
    print_result(summary, path, as_json=False)


class FlowerRun(Run):
    """A run over Flower's grid, from loading to the summary."""

    engine = "flower"

    def __init__(
        self,
        plan: Plan,
        grid: Grid,
        known: Known,
        rundir: RunDirectory,
        listeners: Sequence[Listener],
    ) -> None:
        """A run of ``plan``; ``known`` is what an earlier process knew of the federation, if any."""
        super().__init__(plan, rundir, listeners)
        self._flower = grid
        self._grid: FlowerGrid | None = None
        self.federation = known.federation
        self._shards = Shards(plan.federation.num_shards, known.shards)
        self._nodes = NodeFile(rundir.path, known.federation)
        if self.resumable:
            self._nodes.keep((), known.shards)

    def identify(self) -> None:
        """Flower has told this process already who it is."""

    def grid(self, view: ServerView) -> Grid:
        """Flower's, with the federation's keys and settings."""
        settings = as_config(self.plan.federation)
        self._grid = FlowerGrid(self._flower, self.federation, settings, self._shards.offer)
        return self._grid

    def why_not(self, node_id: int, facts: ConfigRecord) -> str | None:
        """Whether it may have the shard that it says it holds."""
        present = self._grid.get_node_ids() if self._grid is not None else ()
        return self._shards.take(facts["client"], node_id, list(present))

    def go_on(self, progress: Progress) -> set[int]:
        """Who was there at the checkpoint."""
        return set(progress.present)

    def emit(self, event: Event) -> None:
        """Tell everybody, and write down first who is about to be given work."""
        if event.event == "round_start" and self.resumable:
            self._nodes.keep((), self._shards.holders())
        super().emit(event)
