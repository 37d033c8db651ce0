"""A federation on Flower's Ray simulation: the same apps, on one machine or on a Ray cluster.

Flower carries the messages and what clients remember; nothing else is shared, so that it works across
machines, too.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedkit.engine.events import Listener
from fedkit.engine.local import Result, runnable
from fedkit.engine.local_clients import local_clients
from fedkit.engine.membership import explain
from fedkit.engine.nodes import Known
from fedkit.engine.plan import Plan, check_shards, named_here
from fedkit.engine.saved import ABOUT, OWN_MODEL
from fedkit.errors import FedkitError, UsageError
from fedkit.flower import error_reply, is_failure
from fedkit.flower_engine.client import answer
from fedkit.flower_engine.grid import FlowerGrid
from fedkit.flower_engine.server import FlowerRun
from fedkit.flower_engine.told import take_told
from fedkit.registry import allow, listed
from fedkit.rundir import RunDirectory, default_path
from fedkit.settings import Value, as_config
from fedkit.simulation.run import keep_model
from fedkit.simulation.settings import WorkerSettings, cores

if TYPE_CHECKING:
    from fedkit.engine.facts import ServerView

# Asks a client for what it remembers of its own model.
OWN = "query.own_model"
_KEPT = (OWN_MODEL, ABOUT)
Worked = Callable[[str], None]


def simulate(
    plan: Plan,
    workers: WorkerSettings,
    listeners: Sequence[Listener] = (),
    worked: Worked = lambda kind: None,
) -> Result:
    """Run a federation on Ray; its numbers are those of every other engine.

    Args:
        plan: a local run's.
        workers: who does the work.
        listeners: take every event, beside the run directory.
        worked: called after each piece of a client's work, with its message type.

    Raises:
        FedkitError: Ray is not installed or does not start, a client's own code failed, ...
        KeyboardInterrupt: it was asked to stop; the summary is written nevertheless.
    """
    local = plan.local
    assert local is not None
    if not _is_installed():
        raise FedkitError("--engine ray needs Ray: `pip install 'fedkit[ray]'`.")
    if local.emulate:
        raise UsageError(
            "--emulate goes with fedkit's own workers, which need not wait as long as the devices: leave "
            "it out, or --engine ray."
        )
    if workers.batched > 1:
        raise UsageError("--batched goes with fedkit's own workers: leave it out, or --engine ray.")
    check_shards(plan)
    rundir = RunDirectory(Path(plan.server.run_dir or default_path(plan.federation.strategy)))
    rundir.write_config({**runnable(plan), **as_config(workers)})
    public_sets = (rundir.path / "public-sets").resolve()
    nodes = [one.node_config(plan, public_sets) for one in local_clients(plan)]
    ending, outcome = _Ending(), Future[dict[str, Any]]()

    def server(grid: Grid, context: Context) -> None:
        """The rounds, on the thread that Flower gives to them."""
        if not outcome.set_running_or_notify_cancel():
            return
        try:
            run = _RayRun(plan, grid, rundir, listeners, worked, ending)
            summary = run.to_the_end()
            if workers.keep_models:
                run.keep_models()
            outcome.set_result(summary)
        except BaseException as error:  # the main thread raises it
            outcome.set_exception(error)

    server_app = ServerApp()
    server_app.main()(server)
    clients = _SimulatedClients(nodes, named_here(plan))
    resources = _resources(plan, workers, len(nodes))
    _quiet()
    try:
        with _interrupts(ending):
            run_simulation(server_app, clients, len(nodes), backend_config=resources)
    except BaseException as error:
        ending.tell(_sentence(error) if isinstance(error, RuntimeError) else error)
        if outcome.cancel():
            ending.wait(0.0)  # raises the same here, since nobody else will
    return Result(rundir.path, outcome.result())


def _is_installed() -> bool:
    return importlib.util.find_spec("ray") is not None


def _sentence(error: RuntimeError) -> FedkitError:
    """What Ray itself said, without what Flower wraps around it."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return FedkitError(f"Ray's simulation ended: {cause}.")


class _Ending:
    """Tells the server's thread that it must end, and why."""

    def __init__(self) -> None:
        self._told = threading.Event()
        self._why: BaseException | None = None

    def tell(self, why: BaseException) -> None:
        self._why = why
        self._told.set()

    def wait(self, seconds: float) -> None:
        """Wait so long; raise as soon as there is a reason to end."""
        self._told.wait(seconds)
        if self._why is not None:
            raise self._why


class _SimulatedClients(ClientApp):
    """All clients' app: what a device of a real federation knows of itself, they know by their number."""

    def __init__(self, nodes: Sequence[dict[str, Value]], named: str) -> None:
        super().__init__()
        self._nodes = nodes
        # Code of the user's own, which a worker process may import.
        self._named = named

    def __call__(self, message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        node = self._nodes[number]
        if message.metadata.message_type == OWN:
            state = context.state
            return Message(RecordDict({k: state[k] for k in _KEPT if k in state}), reply_to=message)
        allow(*listed(self._named))
        try:
            return answer(message, context, take_told(message), dict(node))
        except Exception as error:  # whatever somebody's code raises, the run shall say whose
            sentence = f"Client {number} ({node['model']}) failed: {explain(error)}"
            return error_reply(message, f"{sentence}\n{traceback.format_exc()}")


class _RayGrid(FlowerGrid):
    """Flower's grid in a simulation, where the first client that fails ends the run."""

    # Nobody is asked over a network.
    poll_s = 0.02

    def __init__(
        self,
        grid: Grid,
        federation: str,
        settings: dict[str, Value],
        names: Callable[[int], str],
        worked: Worked,
        ending: _Ending,
    ) -> None:
        # A client's shard is its number, whatever is told here.
        super().__init__(grid, federation, settings, lambda node_id, present: 0)
        self._names, self._worked, self._ending = names, worked, ending
        self._early: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        """All clients."""
        self._pause(0.0)
        return super().get_node_ids()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Replies in the order of sending; a simulation knows no deadline.

        Raises:
            FedkitError: a client's own code failed (its traceback is in the notes).
        """
        return super().send_and_receive(messages)

    def _pause(self, seconds: float) -> None:
        self._ending.wait(seconds)

    def _pull(self, keys: list[str]) -> list[Message]:
        # All that there are, so that a failure is not noticed only when its turn comes.
        for reply in super()._pull(list(self._sent)):
            self._early[reply.metadata.reply_to_message_id] = reply
        return [self._early.pop(key) for key in keys if key in self._early]

    def _checked(self, sent: Message, reply: Message) -> Message:
        if reply.has_error():
            sentence, _, trace = (reply.error.reason or "no reason given").partition("\n")
            if not is_failure(reply):
                sentence = f"{self._names(sent.metadata.dst_node_id)} failed: {sentence}"
            failed = FedkitError(sentence)
            failed.add_note(trace)  # shown with --debug
            raise failed
        self._worked(sent.metadata.message_type)
        return super()._checked(sent, reply)


class _RayRun(FlowerRun):
    engine = "ray"
    resumable = False

    def __init__(
        self,
        plan: Plan,
        grid: Grid,
        rundir: RunDirectory,
        listeners: Sequence[Listener],
        worked: Worked,
        ending: _Ending,
    ) -> None:
        super().__init__(plan, grid, Known(), rundir, listeners)
        self._worked, self._ending = worked, ending
        self._directory = rundir.path

    def grid(self, view: ServerView) -> Grid:
        """Flower's, with the federation's settings."""
        settings = as_config(self.plan.federation)
        self._grid = _RayGrid(
            self._flower, self.federation, settings, self._name, self._worked, self._ending
        )
        return self._grid

    def keep_models(self) -> None:
        """Ask each client for its own model, and write it where `fedkit run` would have it."""
        assert self.driver is not None and self._grid is not None
        members = sorted(self.driver.roster.members.values(), key=lambda member: member.client)
        questions = (Message(RecordDict(), member.node_id, OWN) for member in members)
        for member, reply in zip(members, self._grid.send_and_receive(questions), strict=True):
            folder = self._directory / "clients" / f"client-{member.client}" / self.engine
            keep_model(folder, reply.content)

    def _name(self, node_id: int) -> str:
        members = self.driver.roster.members if self.driver is not None else {}
        member = members.get(node_id)
        return f"Client {member.client} ({member.model})" if member is not None else "A client"


@contextmanager
def _interrupts(ending: _Ending) -> Iterator[None]:
    """Let Ctrl-C end the server first: where Ray ends before it, it ends this process, summary or not.

    A second one interrupts what goes on, as usual.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        ending.tell(KeyboardInterrupt())

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _quiet() -> None:
    """Of Flower, which tells of every step, nothing but errors; all of it with ``--debug``."""
    debug = logging.getLogger("fedkit").isEnabledFor(logging.DEBUG)
    logging.getLogger("flwr").setLevel(logging.DEBUG if debug else logging.ERROR)


def _resources(plan: Plan, workers: WorkerSettings, clients: int) -> dict[str, dict[str, Any]]:
    """What Ray has on this machine, and how much of it a client takes; a cluster has what it has."""
    threads = plan.federation.threads
    count = min(workers.workers or max(1, cores() // threads), clients)
    gpus = _gpus(plan)
    # Of one GPU: Ray takes no share that spans two, nor one and a half.
    share = 1 / math.ceil(count / gpus) if gpus else 0.0
    resources = {"num_cpus": threads, "num_gpus": share}
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if "RAY_ADDRESS" not in os.environ:
        quiet["num_cpus"] = count * threads
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Else Ray says on each start that it will not hide GPUs any more; who takes no share asks for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    return {"init_args": quiet, "client_resources": resources}


def _gpus(plan: Plan) -> int:
    import torch

    assert plan.local is not None
    wanted = plan.local.device == "auto" or plan.local.device.startswith("cuda")
    return torch.cuda.device_count() if wanted else 0
