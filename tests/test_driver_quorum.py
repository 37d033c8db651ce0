"""Rounds that too few answer: repeated, skipped or given up, and none of it shows in the numbers.

The strategy is a small one of this file's own, which remembers; the clients train so that doing
something twice would show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from inprocess import InProcessGrid, RepeatingGrid

from fedkit.engine.driver import Driver
from fedkit.engine.events import Event
from fedkit.engine.history import History
from fedkit.engine.strategy import Exchange, FederatedStrategy
from fedkit.errors import FedkitError
from fedkit.flower import take_identity
from fedkit.settings import FederationSettings

TRAIN, SHARE = "train.local", "train.share"
# Node ids of the clients 0, 1 and 2.
NODES = (2, 3, 4)


@dataclass
class Memory:
    """What the strategy remembers from round to round."""

    total: float = 0.0
    seen: dict[int, list[float]] = field(default_factory=dict)


class Adding(FederatedStrategy):
    """Adds up what clients say, tells them the sum, and adds that up to the global model."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        super().__init__(None, SimpleNamespace(), emit)  # type: ignore[arg-type]
        self.state = Memory()

    def exchanges(self) -> list[Exchange]:
        return [
            Exchange("local", self.configure_train, self.aggregate_train),
            Exchange("share", self._tell, self._aggregate),
        ]

    def initial_arrays(self) -> ArrayRecord:
        return ArrayRecord({"w": Array(np.zeros(2))})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        content = RecordDict({"arrays": arrays})
        return self.instruct(self.members(grid), TRAIN, server_round, lambda member: content)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[None, None]:
        for member, content in self.answers(replies):
            said = float(content.metric_records["metrics"]["said"])  # type: ignore[arg-type]
            self.state.total += said
            self.state.seen.setdefault(member.client, []).append(said)
        return None, None

    def _tell(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        content = RecordDict({"config": ConfigRecord({"total": self.state.total})})
        return self.instruct(self.members(grid), SHARE, server_round, lambda member: content)

    def _aggregate(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, None]:
        said = [c.metric_records["metrics"]["said"] for _, c in self.answers(replies)]
        return ArrayRecord({"w": Array(np.full(2, sum(said)))}), None  # type: ignore[arg-type]


@dataclass
class Device:
    """A client: what it says hangs on all that it was asked before."""

    client: int
    value: float = 1.0

    def __call__(self, told: Message, context: Any) -> Message:
        kind, content = told.metadata.message_type, RecordDict()
        if kind == "query.join":
            facts = {"client": self.client, "model": "m", "device": "cpu", "codecs": ["float32"]}
            content["join"] = ConfigRecord(facts)  # type: ignore[arg-type]
            content["metrics"] = MetricRecord({"num-examples": 10, "parameters": 2})
            return Message(content, reply_to=told)
        if kind == TRAIN:
            drift = told.content.array_records["arrays"]["w"].numpy().sum()
            self.value = 1.1 * self.value + self.client + float(drift) / 100
        elif kind == SHARE:
            self.value += float(told.content.config_records["config"]["total"]) / 10  # type: ignore[arg-type]
        name = "own_model/own_test/accuracy" if kind == "evaluate" else "said"
        content["metrics"] = MetricRecord({name: self.value, "num-examples": 10})
        return Message(content, reply_to=told)


class Losing:
    """Loses the replies of client 1 to one exchange of round 2, the first so many times."""

    def __init__(self, kind: str = "", times: int = 1) -> None:
        self.kind, self.left = kind, times

    def __call__(self, sent: Message, reply: Message) -> Message | None:
        meta = sent.metadata
        hit = (meta.group_id, meta.message_type, meta.dst_node_id) == ("2", self.kind, NODES[1])
        if hit and self.left:
            self.left -= 1
            return None
        return reply


class Federation:
    """A driver with three clients."""

    def __init__(
        self,
        tamper: Losing | None = None,
        grid: type[InProcessGrid] = RepeatingGrid,
        **settings: Any,
    ) -> None:
        take_identity()
        self.events: list[Event] = []
        self.history = History()
        self.over: list[int] = []
        self.arrays: list[ArrayRecord] = []
        self.states: list[str] = []
        self.leaves_after: dict[int, int] = {}
        self.grid = grid(
            {node: (Device(client), None) for client, node in enumerate(NODES)}, tamper
        )  # type: ignore[misc]
        self.strategy = Adding(self.emit)
        chosen = FederationSettings(**{"rounds": 3, "min_clients": 3, **settings})
        self.driver = Driver(
            self.strategy, self.grid, chosen, self.emit, round_over=self.round_over
        )

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self.history.take(event)

    def round_over(self, server_round: int, arrays: ArrayRecord) -> None:
        self.over.append(server_round)
        self.arrays.append(arrays)
        self.states.append(repr(self.strategy.state))
        if server_round in self.leaves_after:
            self.grid.absent.add(self.leaves_after[server_round])

    def run(self, first_round: int = 1, awaited: Iterable[int] = ()) -> Federation:
        self.driver.run(self.strategy.initial_arrays(), first_round, list(awaited))
        return self

    def rounds(self) -> list[int]:
        return [row["round"] for row in self.history.rounds()]

    def warnings(self) -> list[str]:
        return [str(event.name) for event in self.events if event.event == "warning"]


def test_round_over_is_called_with_nought_first_and_then_with_each_round():
    assert Federation().run().over == [0, 1, 2, 3]


def test_a_run_that_goes_on_has_begun_already():
    assert Federation().run(first_round=3).over == [3]


def test_runs_in_which_nothing_happens_are_equal():
    one, other = Federation().run(), Federation(quorum=1.0).run()
    assert one.history.digest() == other.history.digest()
    assert one.warnings() == other.warnings() == []


@pytest.mark.parametrize("kind", [TRAIN, SHARE])
@pytest.mark.parametrize("times", [1, 2])
def test_a_repeated_round_leaves_the_history_as_if_nothing_had_happened(kind, times):
    """The strategy forgets the attempt, and the clients answer from memory what they have done."""
    undisturbed, losing = Federation(quorum=1.0).run(), Losing(kind, times)
    run = Federation(losing, quorum=1.0).run()
    assert losing.left == 0
    assert run.history.digest() == undisturbed.history.digest()
    assert run.states == undisturbed.states
    assert run.over == [0, 1, 2, 3] and run.rounds() == [1, 2, 3]
    assert run.history._bytes == undisturbed.history._bytes
    told = [text for text in run.warnings() if "quorum" in text]
    assert len(told) == times
    assert all("2 of 3" in text and "the quorum is 3" in text for text in told)
    assert [event.round for event in run.events if event.event == "rewind"] == [2] * times


def test_without_a_memory_of_the_attempt_it_would_show():
    """What the test above rests on: doing it again, or adding it up twice, gives other numbers."""
    losing = Losing(TRAIN)
    run = Federation(losing, InProcessGrid, quorum=1.0).run()
    assert run.history.digest() != Federation().run().history.digest()


def test_a_round_that_never_reaches_its_quorum_is_given_up_after_three_tries():
    run = Federation(Losing(TRAIN, 10**6), quorum=1.0)
    with pytest.raises(FedkitError, match=r"Round 2 was tried 3 times.*quorum.*the run ends"):
        run.run()
    assert run.over == [0, 1] and run.rounds() == [1]
    assert repr(run.strategy.state) == run.states[-1]
    assert "given up" in run.warnings()[-1]


@pytest.mark.parametrize(("quorum", "repeats"), [(0.6, 0), (2 / 3, 0), (0.67, 1), (1.0, 1)])
def test_the_quorum_is_a_share_of_those_who_were_selected(quorum, repeats):
    losing = Losing(TRAIN)
    run = Federation(losing, quorum=quorum).run()
    assert losing.left == 0
    assert len([event for event in run.events if event.event == "rewind"]) == repeats
    assert run.rounds() == [1, 2, 3]


def test_each_exchange_must_reach_the_quorum():
    """One is lost in the first exchange, which may be; another in the second is one too many."""

    class LosingTwo(Losing):
        def __call__(self, sent: Message, reply: Message) -> Message | None:
            kind, node = sent.metadata.message_type, sent.metadata.dst_node_id
            if sent.metadata.group_id == "2" and (kind, node) in ((TRAIN, 3), (SHARE, 4)):
                return None
            return reply

    with pytest.raises(FedkitError, match=r"1 of 3 clients were there after share"):
        Federation(LosingTwo(), quorum=0.5).run()


@pytest.mark.parametrize("below_quorum", ["repeat", "skip"])
def test_without_a_quorum_any_number_will_do(below_quorum):
    run = Federation(Losing(TRAIN, 10**6), below_quorum=below_quorum).run()
    assert run.rounds() == [1, 2, 3]
    assert not [event for event in run.events if event.event == "rewind"]


@pytest.mark.parametrize("kind", [TRAIN, SHARE])
def test_a_skipped_round_changes_nothing_at_the_server_and_the_next_goes_on(kind):
    run = Federation(Losing(kind, 10**6), quorum=1.0, below_quorum="skip").run()
    assert run.over == [0, 1, 2, 3] and run.rounds() == [1, 3]
    assert run.arrays[2] is run.arrays[1] and run.arrays[3] is not run.arrays[2]
    assert run.states[2] == run.states[1] != run.states[3]
    assert sum("2 of 3" in text and "skip" in text for text in run.warnings()) == 1


# Clients that go, and come back or not.


def test_a_run_ends_with_a_sentence_when_too_few_clients_are_left():
    run = Federation(rejoin_wait=0.05)
    run.leaves_after = {1: 3}
    with pytest.raises(FedkitError, match=r"Only 2 of the 3 clients.*min-clients.*the run ends"):
        run.run()
    assert run.over == [0, 1]


def test_a_run_goes_on_with_fewer_clients_where_they_suffice():
    run = Federation(min_clients=2, rejoin_wait=1e6)
    run.leaves_after = {1: 3}
    run.run()
    assert run.over == [0, 1, 2, 3]
    assert [event.n for event in run.events if event.event == "round_start"] == [3, 2, 2]


class Returning(RepeatingGrid):
    """Who is away comes back once it has been looked for so many times."""

    looks = 0

    def get_node_ids(self) -> list[int]:
        if self.absent:
            self.looks += 1
            if self.looks > 10:
                self.absent.clear()
        return super().get_node_ids()


def test_a_client_that_comes_back_in_time_takes_part_again():
    run = Federation(grid=Returning, rejoin_wait=1e6)
    run.leaves_after = {1: 3}
    assert run.run().history.digest() == Federation().run().history.digest()


@pytest.mark.parametrize(
    ("grid", "patience", "there"), [(Returning, 1e6, 3), (InProcessGrid, 0.05, 2)]
)
def test_a_resumed_run_waits_for_those_who_were_in_it(grid, patience, there):
    """The numbers hang on who takes part; but nobody is waited for longer than that."""
    run = Federation(grid=grid, min_clients=2, rounds=2, rejoin_wait=patience)
    run.grid.absent.add(3)
    run.run(first_round=2, awaited=NODES)
    assert [event.n for event in run.events if event.event == "round_start"] == [there]


def test_a_new_run_waits_for_nobody_in_particular():
    run = Federation(min_clients=2, rounds=1, rejoin_wait=1e6)
    run.grid.absent.add(3)
    run.run()
    assert run.over == [0, 1]
