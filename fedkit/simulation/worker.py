"""A worker process: does the work of one client after the other, and holds some of them in memory."""

from __future__ import annotations

import signal
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedkit.devices.clock import VirtualClock
from fedkit.devices.device import Device
from fedkit.devices.emulation import Emulation
from fedkit.devices.profiles import Profile
from fedkit.engine.membership import explain
from fedkit.engine.state import mark
from fedkit.engine.workers import end_with_parent
from fedkit.flower import (
    decode_content,
    decode_envelope,
    encode_content,
    new_context,
    take_identity,
)
from fedkit.flower_records import copied
from fedkit.registry import load
from fedkit.settings import Value
from fedkit.simulation.rendezvous import Rendezvous
from fedkit.simulation.sharing import Bundle, bundle, unbundle
from fedkit.simulation.store import Store


class Task(NamedTuple):
    """An instruction for a client.

    Attributes:
        client: its index.
        version: how often it has been at work; a worker that holds it as it was then need not read.
        head: the message without its content.
        description: the content without its arrays.
        arrays: these.
        at: the simulated time at which it is sent, in seconds.
    """

    client: int
    version: int
    head: bytes
    description: bytes
    arrays: Bundle
    at: float


class Done(NamedTuple):
    """What came of a task: a reply, or why there is none.

    Attributes:
        client: whose.
        description, arrays: the content of the reply.
        at: the simulated time at which that has come.
        failed: the sentence of an error of the client's own code; empty if there was none.
        trace: its traceback.
        apart: why its network was not trained together with others, where it was to be.
    """

    client: int
    description: bytes
    arrays: Bundle
    at: float
    failed: str = ""
    trace: str = ""
    apart: str = ""


@dataclass(frozen=True)
class Equipment:
    """What a worker is given.

    Attributes:
        strategy: whose client half does the work.
        run_config: the federation's settings.
        nodes: each client's node config, in client order.
        first_node: the node id of client 0; the others follow.
        shared: the folder of bundles.
        store: the folder of states.
        live: how many clients this worker keeps in memory.
        profiles: the kinds of devices that clients behave like, cycled over them; their waiting only
            moves a clock.
    """

    strategy: str
    run_config: dict[str, Value]
    nodes: Sequence[dict[str, Value]]
    first_node: int
    shared: Path
    store: Path
    live: int
    profiles: tuple[Profile, ...] = ()


@dataclass
class _Live:
    context: Context
    version: int
    marks: dict[str, Any]


def work(pipe: Connection, equipment: Equipment) -> None:
    """Answer tasks until the pipe is closed; the whole life of a worker process."""
    from fedkit.models.device import compute_with

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    compute_with(int(equipment.run_config["threads"]))
    take_identity(equipment.first_node)
    worker = _Worker(equipment)
    while True:
        try:
            tasks: list[Task] = pipe.recv()
        except EOFError:
            return
        for done in worker.do(tasks):
            pipe.send(done)


class _Worker:
    def __init__(self, equipment: Equipment) -> None:
        self._equipment = equipment
        self._app: ClientApp = load("clients", equipment.strategy)
        self._store = Store(equipment.store)
        self._live: OrderedDict[int, _Live] = OrderedDict()
        self._last: tuple[bytes, Bundle, RecordDict] | None = None

    def do(self, tasks: list[Task]) -> Iterator[Done]:
        """Work on them, of one client each; what is done is given at once."""
        if len(tasks) == 1:
            yield self._do(tasks[0])
            return
        first = self._equipment.first_node
        works = [partial(self._do, task) for task in tasks]
        meeting = Rendezvous(works, lambda number: take_identity(first + tasks[number].client))
        for number, done in meeting.results():
            yield done._replace(apart=meeting.apart.get(number, ""))

    def _do(self, task: Task) -> Done:
        """Work on it; whatever the client's code raises is told and not raised."""
        try:
            live = self._take(task)
            message = decode_envelope(task.head, self._content(task))
            take_identity(live.context.node_id)
            answer, at = self._answer(task, message, live.context)
            if answer.has_error():
                return _failed(task, answer.error.reason or "it gave no reason")
            description, *blobs = encode_content(answer.content)
            self._give_back(task.client, live)
            return Done(task.client, description, bundle(blobs, self._equipment.shared), at)
        except Exception as error:  # whatever somebody's code raises, the run shall say whose
            return _failed(task, str(explain(error)), "".join(traceback.format_exception(error)))

    def _answer(self, task: Task, message: Message, context: Context) -> tuple[Message, float]:
        kinds = self._equipment.profiles
        if not kinds:
            return self._app(message, context), task.at
        seed, clock = int(self._equipment.run_config["seed"]), VirtualClock()
        device = Device(kinds[task.client % len(kinds)], seed, task.client)
        emulation = Emulation(device, now=clock, sleep=clock.advance)
        clock.advance(task.at)
        return emulation.work(self._app, message, context), clock.now

    def _content(self, task: Task) -> RecordDict:
        # The same goes to many: it is read once.
        if self._last is None or self._last[:2] != (task.description, task.arrays):
            content = decode_content([task.description, *unbundle(task.arrays)])
            self._last = task.description, task.arrays, content
        return copied(self._last[2])

    def _take(self, task: Task) -> _Live:
        live = self._live.pop(task.client, None)
        if live is None or live.version != task.version:
            context = new_context(
                self._equipment.first_node + task.client, dict(self._equipment.nodes[task.client])
            )
            context.run_config = dict(self._equipment.run_config)
            context._fedkit_tried = task.version > 0  # type: ignore[attr-defined]
            for name, record in self._store.recall(task.client).items():
                context.state[name] = record
            live = _Live(context, task.version, _marks(context.state))
        self._live[task.client] = live
        while len(self._live) > self._equipment.live:
            self._live.popitem(last=False)  # the store has what it knew
        return live

    def _give_back(self, client: int, live: _Live) -> None:
        now = _marks(live.context.state)
        if now != live.marks:
            self._store.keep(client, live.context.state)
            live.marks = now
        live.version += 1


def _failed(task: Task, sentence: str, trace: str = "") -> Done:
    return Done(task.client, b"", Bundle("", (), ()), task.at, sentence, trace)


def _marks(state: RecordDict) -> dict[str, Any]:
    return {name: mark(state, name) for name in state}
