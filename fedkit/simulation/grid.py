"""Flower's ``Grid`` over worker processes: an instruction goes to whichever is free."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from flwr.app import Message, RecordDict

from fedkit.engine.grid import EngineGrid
from fedkit.engine.roster import Member
from fedkit.errors import FedkitError
from fedkit.flower import (
    decode_content,
    encode_content,
    encode_envelope,
    parts_of,
    set_message_id,
)
from fedkit.registry import load
from fedkit.simulation.sharing import SMALL, Bundle, bundle, discard, unbundle
from fedkit.simulation.worker import Done, Equipment, Task, work

# How far ahead of the workers instructions are made, so that a client finds the worker that holds it.
AHEAD = 8
ENDING_S = 5.0


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    # What it was given, by client: it works on the first, and finds the next when that is done.
    given: list[dict[int, _Job]] = field(default_factory=list)


@dataclass
class _Job:
    key: str
    client: int
    sent: Message
    head: bytes
    content: _Shared


@dataclass
class _Shared:
    """A content that waits for clients; its file goes when the last of them has answered."""

    parts: dict[str, Any]
    description: bytes
    arrays: Bundle
    users: int = 0


class SimulationGrid(EngineGrid):
    """Clients without a network; a client's numbers do not hang on who works for it, nor on when."""

    def __init__(
        self,
        equipment: Equipment,
        workers: int,
        names: Callable[[int], str],
        worked: Callable[[str], None] = lambda kind: None,
        *,
        batched: int = 1,
        warn: Callable[[str], None] = lambda sentence: None,
        registered: Sequence[Member] | None = None,
    ) -> None:
        """Start the workers.

        Args:
            equipment: what each is given.
            workers: how many.
            names: what a client is called in an error, by its index.
            worked: called after each piece of work that is done, with its message type.
            batched: how many clients of one network a worker is given at a time, to train together.
            warn: told why a network can't be trained so, once.
            registered: what is known of clients that join when they are first chosen; None: all join first.
        """
        self.registered = registered
        self._first = equipment.first_node
        self._clients = range(len(equipment.nodes))
        self._nodes = equipment.nodes
        self._batched, self._warn = batched, warn
        self._warned: set[tuple[str, str]] = set()
        self._shared = equipment.shared
        self._names = names
        self._worked = worked
        self._count = 0
        # The simulated time, in seconds: of emulated devices; else it stands still.
        self.now = 0.0
        self._kept: dict[str, Message] = {}
        self._last: _Shared | None = None
        # Who holds which client's live objects, and how often each was at work.
        self._holder: dict[int, int] = {}
        self._version: dict[int, int] = {}
        self._workers: list[_Worker] = []
        # A forked process has everything that is imported and loaded here already. torch's own threads,
        # which it would not have, are waited for there for ever.
        fork = sys.platform == "linux" and int(equipment.run_config["threads"]) == 1
        if fork:
            load("clients", equipment.strategy)
            import_module("torch._dynamo")  # as the first optimiser would: seconds, in each worker
            gc.freeze()  # a worker's collector need not look at what was there before
        context: Any = multiprocessing.get_context("fork" if fork else "spawn")
        try:
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=work, args=(theirs, equipment), daemon=True)
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.pipe.close()
            worker.process.terminate()
        deadline = time.monotonic() + ENDING_S
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []

    def get_node_ids(self) -> Iterable[int]:
        """All clients."""
        return range(self._first, self._first + len(self._clients))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Do what the messages say, now; gives their keys."""
        replies = list(self.send_and_receive(messages))
        keys = [reply.metadata.reply_to_message_id for reply in replies]
        self._kept.update(zip(keys, replies, strict=True))
        return keys

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to some keys, each once."""
        return [self._kept.pop(key) for key in message_ids if key in self._kept]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Replies in the order of sending, each as soon as it may; a simulation knows no deadline.

        Raises:
            FedkitError: a client's own code failed (the first that does ends the run; its traceback is
                in the notes), or a worker process died.
        """
        instructions = iter(messages)
        waiting: deque[list[_Job]] = deque()
        order: deque[str] = deque()
        done: dict[str, Message] = {}
        more, until = True, self.now
        workers = len(self._workers)
        # Who trains with whom hangs on what was asked and not on who is free, for rounding hangs on it.
        block = 1 if self._batched == 1 else max(AHEAD, self._batched) * workers
        while True:
            while more and sum(map(len, waiting)) < AHEAD * workers:
                jobs = [self._job(message) for message in islice(instructions, block)]
                more = len(jobs) == block
                order.extend(job.key for job in jobs)
                waiting.extend(self._together(jobs))
            for number, worker in enumerate(self._workers):
                while self._has_room(worker, waiting) and (chosen := self._choose(number, waiting)):
                    self._give(worker, number, chosen)
            while order and order[0] in done:
                yield done.pop(order.popleft())
            if not order and not more:
                self.now = until
                return
            for worker in self._ready():
                came = self._receive(worker)
                job = worker.given[0].pop(came.client)
                if not worker.given[0]:
                    del worker.given[0]
                done[job.key] = self._reply(job, came)
                until = max(until, came.at)
                self._worked(job.sent.metadata.message_type)

    def _job(self, message: Message) -> _Job:
        self._count += 1
        key = str(self._count)
        set_message_id(message, key)
        shared = self._share(message.content)
        shared.users += 1
        head = encode_envelope(message)
        client = message.metadata.dst_node_id - self._first
        message.content = RecordDict()  # only the envelope is needed from here on
        return _Job(key, client, message, head, shared)

    def _share(self, content: RecordDict) -> _Shared:
        """The content where workers find it; what was sent last need not be written again."""
        parts = parts_of(content)
        if self._last is not None and self._last.parts == parts:
            return self._last
        if self._last is not None:
            self._let_go(self._last, last=True)
        description, *blobs = encode_content(content)
        self._last = _Shared(parts, description, bundle(blobs, self._shared))
        return self._last

    def _let_go(self, shared: _Shared, *, last: bool = False) -> None:
        if shared.users == 0 and (last or shared is not self._last):
            discard(shared.arrays)

    def _together(self, jobs: Sequence[_Job]) -> list[list[_Job]]:
        """Those of one network that are asked for the same, each once, and as many for each worker.

        By their numbers, so that whom a worker holds is asked together the next time, too.
        """
        workers, times = len(self._workers), Counter[int]()
        alike: defaultdict[tuple[object, ...], list[_Job]] = defaultdict(list)
        for job in jobs:
            kind = self._model(job.client), job.sent.metadata.message_type
            alike[*kind, job.client % workers, times[job.client]].append(job)
            times[job.client] += 1
        most = min(self._batched, -(-len(jobs) // workers))
        groups = []
        for group in alike.values():
            size = -(-len(group) // -(-len(group) // most))
            groups += [group[at : at + size] for at in range(0, len(group), size)]
        return groups

    def _has_room(self, worker: _Worker, waiting: Sequence[list[_Job]]) -> bool:
        """Whether it has nothing to do, or nothing to do next.

        A worker need not wait then until what it did is read. The last are given one at a time, so that
        all end together; and large ones, since two that write to each other what neither reads would
        wait for ever.
        """
        if not worker.given:
            return True
        plenty = len(waiting) >= 2 * len(self._workers)
        return (
            plenty
            and len(worker.given) == 1
            and max(sum(map(_piped, group)) for group in waiting) <= SMALL
        )

    def _choose(self, number: int, waiting: deque[list[_Job]]) -> list[_Job]:
        """Clients that this worker holds, or nobody; at the end anybody's, so that none is idle.

        Nobody, if all are at work: who is asked twice does one after the other.
        """
        free, taken = [], set[int]()
        for worker in self._workers:
            taken.update(*worker.given)
        for group in waiting:
            clients = {job.client for job in group}
            if taken.isdisjoint(clients):
                free.append(group)
            taken |= clients
        held = (group for group in free if self._holder.get(group[0].client, number) == number)
        chosen = next(held, free[0] if free else [])
        if chosen:
            waiting.remove(chosen)
        return chosen

    def _model(self, client: int) -> str:
        return str(self._nodes[client].get("model", ""))

    def _give(self, worker: _Worker, number: int, jobs: list[_Job]) -> None:
        tasks = []
        for job in jobs:
            version = self._version.get(job.client, 0)
            self._version[job.client] = version + 1
            self._holder[job.client] = number
            content = job.content
            tasks.append(
                Task(job.client, version, job.head, content.description, content.arrays, self.now)
            )
        worker.given.append({job.client: job for job in jobs})
        try:
            worker.pipe.send(tasks)
        except (BrokenPipeError, ConnectionResetError):
            raise self._died(worker) from None

    def _ready(self) -> list[_Worker]:
        by_pipe = {worker.pipe: worker for worker in self._workers if worker.given}
        return [by_pipe[pipe] for pipe in wait(list(by_pipe)) if isinstance(pipe, Connection)]

    def _receive(self, worker: _Worker) -> Done:
        try:
            came: Done = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._died(worker) from None
        if came.failed:
            failed = FedkitError(f"{self._names(came.client)} failed: {came.failed}")
            failed.add_note(came.trace)  # shown with --debug
            raise failed
        if came.apart and (refused := (self._model(came.client), came.apart)) not in self._warned:
            self._warned.add(refused)
            self._warn(
                f"{refused[0]} can't be batched, since {came.apart}: its clients train one after the other."
            )
        return came

    def _reply(self, job: _Job, came: Done) -> Message:
        job.content.users -= 1
        self._let_go(job.content)
        blobs = unbundle(came.arrays)
        discard(came.arrays)
        return Message(decode_content([came.description, *blobs]), reply_to=job.sent)

    def _died(self, worker: _Worker) -> FedkitError:
        worker.process.join(ENDING_S)
        status = worker.process.exitcode or 0
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
        whom = ", ".join(map(self._names, *worker.given[:1]))
        whom = f" at work for {whom}" if whom else ""
        return FedkitError(
            f"A worker process{whom} was {how}: if memory ran out, take fewer --workers or a smaller "
            "--live-clients."
        )


def _piped(job: _Job) -> int:
    content = job.content
    return len(job.head) + len(content.description) + sum(map(len, content.arrays.carried))
