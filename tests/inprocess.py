"""A Flower grid whose clients live in this process: the same strategies and client apps, no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from flwr.app import ArrayRecord, Message
from flwr.clientapp import ClientApp

from fedkit.engine.driver import Driver
from fedkit.engine.events import Event
from fedkit.engine.facts import ServerView
from fedkit.engine.grid import EngineGrid
from fedkit.engine.history import History
from fedkit.engine.local_clients import local_clients
from fedkit.engine.plan import make_plan
from fedkit.flower import (
    decode_message,
    decode_records,
    encode_message,
    encode_records,
    error_reply,
    new_context,
    set_message_id,
    take_identity,
    unavailable_reply,
)
from fedkit.registry import load, split
from fedkit.settings import as_config

Tamper = Callable[[Message, Message], Message | None]


class InProcessGrid(EngineGrid):
    """Runs each instruction when it is sent; ``tamper(instruction, reply)`` may change or lose it."""

    def __init__(
        self, apps: dict[int, tuple[ClientApp, Any]], tamper: Tamper | None = None
    ) -> None:
        self.apps = apps
        self.tamper = tamper
        self.absent: set[int] = set()
        self._replies: dict[str, Message] = {}
        self._count = 0

    def get_node_ids(self) -> list[int]:
        return [node_id for node_id in self.apps if node_id not in self.absent]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        keys = []
        for message in messages:
            self._count += 1
            key = str(self._count)
            set_message_id(message, key)
            # Through the bytes and back, as on the wire.
            sent = decode_message(encode_message(message))
            reply = self.answer(sent)
            if self.tamper is not None:
                changed = self.tamper(sent, reply)
                reply = unavailable_reply(sent, "lost") if changed is None else changed
            self._replies[key] = reply
            keys.append(key)
        return keys

    def answer(self, sent: Message) -> Message:
        """What the client answers, as it comes over the wire."""
        app, context = self.apps[sent.metadata.dst_node_id]
        try:
            return decode_message(encode_message(app(sent, context)))
        except ValueError as error:
            return error_reply(sent, str(error))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(key) for key in list(message_ids) if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))


class RepeatingGrid(InProcessGrid):
    """Clients that answer from memory what they are asked again, as they do over the link."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.done: dict[tuple[str, str, int, int], list[bytes]] = {}
        self._asked: Counter[tuple[str, str, int]] = Counter()

    def begin_round(self) -> None:
        self._asked.clear()

    def answer(self, sent: Message) -> Message:
        meta = sent.metadata
        name = meta.group_id, meta.message_type, meta.dst_node_id
        self._asked[name] += 1
        key = (*name, self._asked[name])
        if key not in self.done:
            self.done[key] = encode_message(super().answer(sent))
        known = decode_message(self.done[key])
        return Message(known.content, reply_to=sent) if known.has_content() else known


class InProcessFederation:
    """A federation as `fedkit run` would make it, without processes."""

    def __init__(
        self,
        tamper: Tamper | None = None,
        *,
        grid: type[InProcessGrid] = InProcessGrid,
        **settings: Any,
    ) -> None:
        take_identity()
        self.plan = make_plan(settings, local=True)
        self.events: list[Event] = []
        self.history = History()
        self.view = ServerView(self.plan)
        self.strategy = self.plan.strategy(self.plan.hyper, self.view.facts(), self.emit)
        app = load("clients", split(self.plan.federation.strategy)[0])
        apps = {}
        public_sets = Path(gettempdir()) / "fedkit-test-public-sets"
        for one in local_clients(self.plan):
            client, config = (
                one.number,
                {**one.node_config(self.plan, public_sets), "device": "cpu"},
            )
            context = new_context(client + 2, config)
            context.run_config = as_config(self.plan.federation)
            apps[client + 2] = (app, context)
        self.grid = grid(apps, tamper)
        self.over: list[int] = []
        self.driver = Driver(
            self.strategy,
            self.grid,
            self.plan.federation,
            self.emit,
            check=lambda node_id, facts: self.view.why_not(facts) or self.strategy.why_not(facts),
            offer=self.view.offer,
            evaluate_fn=lambda round, arrays: self.view.measure(
                self.strategy.server_models(arrays), self.strategy.measured
            ),
            round_over=lambda round, arrays: self.round_over(round, arrays),
        )

    def round_over(self, round: int, arrays: ArrayRecord) -> None:
        self.over.append(round)

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self.history.take(event)

    def run(self) -> dict[str, Any]:
        self.result = self.driver.run(self.strategy.initial_arrays())
        self.strategy.close()
        return self.history.summary(
            replace(self.plan.federation),
            self.plan.hyper.preset,
            self.driver.roster.members.values(),
            status="completed",
            stop_reason="all rounds are done",
            engine="in-process",
            seconds=0.0,
            sent_up=None,
            sent_down=None,
        )

    def context(self, client: int) -> Any:
        return self.grid.apps[client + 2][1]

    def start_anew(self, node_id: int, old: Any = None) -> None:
        """Let a client be another process that has what was on disk (of the context ``old``: its own)."""
        app, mine = self.grid.apps[node_id]
        old = mine if old is None else old
        fresh = new_context(node_id, dict(old.node_config))
        fresh.run_config = old.run_config
        for name, record in decode_records(b"".join(encode_records(old.state))).items():
            fresh.state[name] = record
        self.grid.apps[node_id] = (app, fresh)

    def warnings(self) -> list[str]:
        return [str(event.name) for event in self.events if event.event == "warning"]


def ran(**settings: Any) -> Any:
    """A federation that was run, with its ``summary``."""
    run: Any = InProcessFederation(**settings)
    run.summary = run.run()
    return run


def bits(record: ArrayRecord) -> dict[str, bytes]:
    """The arrays of a record, to be compared to the bit."""
    return {name: array.numpy().tobytes() for name, array in record.items()}
