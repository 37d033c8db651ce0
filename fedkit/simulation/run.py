"""A federation simulated on this machine: the same strategies and client apps, without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from fedkit.devices.profiles import profiles
from fedkit.durable import make_folder
from fedkit.engine.by_rule import ByRule
from fedkit.engine.events import Event, Listener
from fedkit.engine.local import Result, runnable
from fedkit.engine.local_clients import node_configs
from fedkit.engine.plan import Plan
from fedkit.engine.running import Run
from fedkit.engine.saved import ABOUT, OWN_MODEL
from fedkit.errors import UsageError
from fedkit.registry import load, split
from fedkit.rundir import RunDirectory, default_path
from fedkit.settings import as_config
from fedkit.simulation.settings import WorkerSettings, cores

if TYPE_CHECKING:
    from flwr.app import RecordDict
    from flwr.serverapp import Grid

    from fedkit.engine.facts import ServerView
    from fedkit.engine.roster import Member
    from fedkit.simulation.grid import SimulationGrid

FIRST_NODE = 2


def simulate(
    plan: Plan,
    workers: WorkerSettings,
    listeners: Sequence[Listener] = (),
    worked: Callable[[str], None] = lambda kind: None,
) -> Result:
    """Run a federation in worker processes; its numbers are those of every other engine.

    Args:
        plan: a local run's.
        workers: who does the work.
        listeners: take every event, beside the run directory.
        worked: called after each piece of a client's work, with its message type.

    Raises:
        UsageError: clients whose time counts can't be batched.
        FedkitError: a client's own code failed, a worker died, the disk is full, ...
        KeyboardInterrupt: it was asked to stop; the summary is written nevertheless.
    """
    check_selector(plan)
    if workers.batched > 1:
        _check_batched(plan)
    rundir = RunDirectory(Path(plan.server.run_dir or default_path(plan.federation.strategy)))
    rundir.write_config({**runnable(plan), **as_config(workers)})
    with _places(rundir.path) as (shared, states):
        run = _SimulatedRun(plan, workers, rundir, listeners, worked, shared, states)
        try:
            summary = run.to_the_end()
        finally:
            run.close()
        if workers.keep_models:
            run.keep_models()
    return Result(rundir.path, summary)


def _check_batched(plan: Plan) -> None:
    assert plan.local is not None
    for name, used in (("emulate", plan.local.emulate), ("time-budgets", plan.local.time_budgets)):
        if used:
            raise UsageError(
                f"--batched and --{name} don't go together: of clients that train as one nobody knows "
                "how long each took; leave one of them out."
            )


@contextmanager
def _places(directory: Path) -> Iterator[tuple[Path, Path]]:
    """Where arrays are shared, and where clients' states lie meanwhile."""
    from fedkit.simulation.sharing import shared_folder

    with shared_folder() as shared:
        states = Path(mkdtemp(prefix="states-", dir=directory))
        try:
            yield shared, states
        finally:
            shutil.rmtree(states, ignore_errors=True)


class _SimulatedRun(Run):
    engine = "simulation"
    resumable = False

    def __init__(
        self,
        plan: Plan,
        workers: WorkerSettings,
        rundir: RunDirectory,
        listeners: Sequence[Listener],
        worked: Callable[[str], None],
        shared: Path,
        states: Path,
    ) -> None:
        super().__init__(plan, rundir, listeners)
        self._workers = workers
        self._worked = worked
        self._shared, self._states = shared, states
        self._directory = rundir.path
        # The server sends nothing here: its own data root is theirs.
        self._nodes = node_configs(plan, states / "public-sets")
        self._grid: SimulationGrid | None = None

    def grid(self, view: ServerView) -> Grid:
        """The workers, which are started now that there is something to share."""
        from fedkit.simulation.grid import SimulationGrid
        from fedkit.simulation.worker import Equipment

        plan, local = self.plan, self.plan.local
        assert local is not None
        count = self._workers.workers or max(1, cores() // plan.federation.threads)
        count = min(count, len(self._nodes))
        equipment = Equipment(
            strategy=split(plan.federation.strategy)[0],
            run_config=as_config(plan.federation),
            nodes=self._nodes,
            first_node=FIRST_NODE,
            shared=self._shared,
            store=self._states,
            live=max(1, self._workers.live_clients // count),
            profiles=tuple(profiles(local.emulate)) if local.emulate else (),
        )
        registered = ByRule(len(self._nodes), self._registered) if _share_shards(plan) else None
        self._grid = SimulationGrid(
            equipment,
            count,
            self._name,
            self._worked,
            registered=registered,
            batched=min(self._workers.batched, equipment.live),
            warn=lambda sentence: self.emit(Event("warning", name=sentence)),
        )
        return self._grid

    def elapsed(self) -> float:
        """Seconds that the run has taken; those of emulated devices, where there are any."""
        emulated = self._grid.now if self._grid is not None else 0.0
        return emulated or super().elapsed()

    def close(self) -> None:
        """End the workers."""
        if self._grid is not None:
            self._grid.close()

    def keep_models(self) -> None:
        """Write each client's own model where `fedkit run` would have it."""
        from fedkit.simulation.store import Store

        store = Store(self._states)
        for client in store.known():
            keep_model(
                self._directory / "clients" / f"client-{client}" / self.engine, store.recall(client)
            )

    def _registered(self, client: int) -> Member:
        """What is known of a client that has not joined."""
        from fedkit.engine.roster import Member

        model = str(self._nodes[client]["model"])
        name, device = f"client {client} ({model})", str(self._nodes[client]["device"])
        return Member(FIRST_NODE + client, client, name, model, 0, 0, device, ())

    def _name(self, client: int) -> str:
        return f"Client {client} ({self._nodes[client]['model']})"


def keep_model(folder: Path, state: RecordDict) -> None:
    """Write a client's own model into ``folder``, if what the client remembers holds one."""
    from fedkit.knowledge.arrays import as_arrays
    from fedkit.models.files import read_about, save_model

    if OWN_MODEL not in state:
        return
    make_folder(folder)
    named = as_arrays(state.array_records[OWN_MODEL])
    about = read_about(json.loads(str(state.config_records[ABOUT]["json"])))
    save_model(folder / "model.safetensors", named, about)


def _share_shards(plan: Plan) -> bool:
    """Whether there are more clients than shards: they are registered, and join when they are chosen."""
    assert plan.local is not None
    return plan.local.clients > plan.federation.num_shards


def check_selector(plan: Plan) -> None:
    """Raise ``UsageError`` for a selector that must know every client, where they join when chosen."""
    name, argument = split(plan.federation.select)
    if _share_shards(plan) and getattr(load("selectors", name)(argument), "needs_facts", True):
        raise UsageError(
            f"--select {plan.federation.select} goes by what every client told when it joined, and with "
            f"more --clients than --num-shards ({plan.federation.num_shards}) a client joins when it is "
            "first chosen: take uniform:50, or as many shards as clients."
        )
