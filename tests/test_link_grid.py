"""Flower's grid over the link: keys that mean the same instruction again, and one encoding for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from links import LONG, client, serving, start
from processes import until

from fedkit import flower
from fedkit.flower import decode_message, encode_message, error_reply, take_identity
from fedkit.link import contents as link_contents
from fedkit.link.client import Answer
from fedkit.link.frames import Parcel
from fedkit.link.grid import LinkGrid


@pytest.fixture(scope="module", autouse=True)
def identity() -> None:
    take_identity()


class Sent:
    """Stands for the server: keeps what it is given, and answers nothing."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.parcels: list[Parcel] = []

    def send(self, node_id: int, key: str, parcel: Parcel, account: str, deadline: Any) -> None:
        self.keys.append(key)
        self.parcels.append(parcel)

    def contents(self) -> list[RecordDict]:
        return [decode_message(parcel.buffers).content for parcel in self.parcels]


@pytest.fixture
def link() -> Sent:
    return Sent()


@pytest.fixture
def grid(link) -> LinkGrid:
    return LinkGrid(link, "f00d")


def model(value: float, size: int = 3) -> ArrayRecord:
    return ArrayRecord({"w": Array(np.full(size, value, np.float32)), "n": Array(np.array(7))})


def message(content: RecordDict, node_id: int = 2, kind: str = "train", round: int = 1) -> Message:
    return Message(content, node_id, kind, group_id=str(round))


def ask(content: RecordDict, *node_ids: int, kind: str = "train") -> list[Message]:
    return [message(content, node_id, kind) for node_id in node_ids]


# Keys.


def play_round(grid: LinkGrid, round: int) -> None:
    grid.begin_round()
    for kind in ("train.local", "train.digest", "evaluate"):
        for _ in range(2 if kind == "train.digest" else 1):
            grid.push_messages([message(RecordDict(), node, kind, round) for node in (2, 3)])


def test_a_round_that_begins_again_gives_the_same_keys(grid, link):
    play_round(grid, 3)
    first, link.keys = link.keys, []
    play_round(grid, 3)
    assert link.keys == first
    assert len(set(first)) == len(first) == 8


def test_a_process_that_goes_on_gives_the_same_keys(grid, link):
    play_round(grid, 3)
    first, link.keys = link.keys, []
    play_round(LinkGrid(link, "f00d"), 3)
    assert link.keys == first


def test_other_rounds_kinds_clients_and_federations_have_other_keys(grid, link):
    for round in (1, 2, 12):
        play_round(grid, round)
    play_round(LinkGrid(link, "beef"), 1)
    assert len(set(link.keys)) == len(link.keys) == 32


def test_what_belongs_to_no_round_is_asked_anew_by_each_process(grid, link):
    for one in (grid, grid, LinkGrid(link, "f00d")):
        one.begin_round()
        one.push_messages([message(RecordDict(), 2, "query.join", round=0)])
    assert len(set(link.keys)) == 3


def test_the_client_reads_the_key_in_its_instruction(grid, link):
    keys = grid.push_messages(ask(RecordDict(), 2, 3))
    read = [decode_message(parcel.buffers).metadata for parcel in link.parcels]
    assert [meta.message_id for meta in read] == keys == link.keys
    assert [meta.dst_node_id for meta in read] == [2, 3]


# One encoding.


@pytest.fixture
def encodings(monkeypatch) -> list[RecordDict]:
    """Every content that is encoded."""
    encoded: list[RecordDict] = []

    def watched(content: RecordDict) -> list[bytes]:
        encoded.append(content)
        return flower.encode_content(content)

    monkeypatch.setattr(link_contents, "encode_content", watched)
    return encoded


def test_a_broadcast_is_encoded_and_summed_once(grid, link, encodings):
    content = RecordDict({"arrays": model(1.0), "config": ConfigRecord({"lr": 0.1})})
    grid.push_messages(ask(content, *range(2, 12)))
    assert len(encodings) == 1
    first, *others = link.parcels
    for other in others:
        assert other.sums[1:] == first.sums[1:]
        pairs = zip(other.buffers[1:], first.buffers[1:], strict=True)
        assert all(one is same for one, same in pairs)
    assert first.buffers[1] is content.array_records["arrays"]["w"].data


def test_a_content_that_comes_between_others_is_still_encoded_once(grid, encodings):
    """Clients that know different codecs get one of a few contents each."""
    contents = [RecordDict({"arrays": model(float(n))}) for n in range(link_contents.CONTENTS_KEPT)]
    for node_id in range(2, 42):
        grid.push_messages([message(contents[node_id % len(contents)], node_id)])
    assert len(encodings) == len(contents)


def test_what_was_sent_is_not_kept_for_ever(grid, encodings):
    for number in range(50):
        grid.push_messages(ask(RecordDict({"arrays": model(float(number))}), 2))
    assert len(grid._contents) <= link_contents.CONTENTS_KEPT
    grid.begin_round()
    assert not grid._contents


def edit_config(content: RecordDict, value: float) -> None:
    content.config_records["config"]["lr"] = value


def replace_config(content: RecordDict, value: float) -> None:
    content["config"] = ConfigRecord({"lr": value})


def replace_arrays(content: RecordDict, value: float) -> None:
    content["arrays"] = model(value)


def edit_arrays(content: RecordDict, value: float) -> None:
    content.array_records["arrays"]["w"] = Array(np.full(3, value, np.float32))


def add_record(content: RecordDict, value: float) -> None:
    content[f"more {value}"] = MetricRecord({"x": value})


@pytest.mark.parametrize(
    "change", [edit_config, replace_config, replace_arrays, edit_arrays, add_record]
)
def test_a_content_that_is_changed_between_two_sendings_is_sent_as_it_is(
    grid, link, change: Callable[[RecordDict, float], None]
):
    content = RecordDict({"arrays": model(0.0), "config": ConfigRecord({"lr": 0.0})})
    for number in range(1, 40):
        change(content, float(number))
        grid.push_messages(ask(content, 2))
        sent = link.contents()[-1]
        assert encode_message(message(sent))[1:] == encode_message(message(content))[1:]
        assert sent.config_records["config"]["lr"] == content.config_records["config"]["lr"]
        assert list(sent) == list(content)


def test_contents_that_come_and_go_are_never_confused(grid, link):
    """Python gives a new object the id of one that is gone."""
    for number in range(200):
        grid.push_messages(ask(RecordDict({"arrays": model(float(number))}), 2))
    found = [content.array_records["arrays"]["w"].numpy()[0] for content in link.contents()]
    assert found == list(range(200))


# Over the wire.


class Doing:
    """A client that answers with what it got, and remembers what it was asked."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def __call__(self, key: str, buffers: list[bytes]) -> Answer:
        self.done.append(key)
        told = decode_message(buffers)
        return Answer(encode_message(Message(told.content, reply_to=told)))


def exchange(grid: LinkGrid, *messages: Message, timeout: float = LONG) -> list[Message]:
    return list(grid.send_and_receive(messages, timeout=timeout))


def test_messages_go_to_clients_and_replies_come_back_in_order(served):
    for name in "abc":
        start(client(served.address, name), Doing())
    nodes = served.nodes(3)
    grid = LinkGrid(served.link, "f")
    content = RecordDict({"arrays": model(1.5, 500_000)})
    replies = exchange(grid, *ask(content, *reversed(nodes)))
    assert [reply.metadata.src_node_id for reply in replies] == list(reversed(nodes))
    for reply in replies:
        assert (reply.content.array_records["arrays"]["w"].numpy() == 1.5).all()


def test_a_round_that_begins_again_is_answered_from_memory(served):
    """The client is asked again for what it did, does not do it again, and counts once."""
    doing = Doing()
    start(client(served.address), doing)
    (node,) = served.nodes(1)
    grid = LinkGrid(served.link, "f")
    content = RecordDict({"arrays": model(2.5)})
    for _ in range(3):
        grid.begin_round()
        (reply,) = exchange(grid, message(content, node))
        assert reply.content.array_records["arrays"]["w"].numpy()[0] == 2.5
    assert doing.done == [f"f/1/train/{node}/1"]
    assert served.link.outcomes == {"answered": 3}


@serving(grace=0.1)
def test_who_is_gone_is_answered_for_by_an_error(served):
    grid = LinkGrid(served.link, "f")
    served.raw().joined().vanish()
    (node,) = until(lambda: served.parted, LONG)
    (reply,) = exchange(grid, message(RecordDict(), node))
    assert reply.has_error() and "not connected" in reply.error.reason
    assert reply.metadata.src_node_id == node


def test_who_is_late_is_answered_for_by_an_error_and_told(served):
    raw = served.raw().joined()
    (node,) = served.nodes(1)
    grid = LinkGrid(served.link, "f")
    (reply,) = exchange(grid, message(RecordDict(), node), timeout=0.1)
    assert reply.has_error() and "time was up" in reply.error.reason
    key, _ = raw.instruction()
    assert raw.told()[1] == {"key": key}
    assert not grid._sent


def test_replies_are_given_as_they_come_and_waited_for_together(served):
    """One who never answers holds up those behind it until the deadline, and costs them nothing."""
    served.raw().joined("silent")
    start(client(served.address), Doing())
    silent, quick = served.nodes(2)
    grid = LinkGrid(served.link, "f")
    replies = grid.send_and_receive(ask(RecordDict(), quick, silent), timeout=0.3)
    assert isinstance(replies, Iterator)
    assert not next(replies).has_error()
    assert next(replies).has_error()


def test_an_error_of_the_client_is_one_at_the_server(served):
    def work(key: str, buffers: list[bytes]) -> Answer:
        return Answer(encode_message(error_reply(decode_message(buffers), "no data")))

    start(client(served.address), work)
    (node,) = served.nodes(1)
    (reply,) = exchange(LinkGrid(served.link, "f"), message(RecordDict(), node))
    assert reply.has_error() and reply.error.reason == "no data"


@pytest.mark.parametrize("buffers", [[], [b"\xff" * 50], [b"", b"an array of nothing"]], ids=str)
def test_a_reply_that_is_no_message_is_an_error(served, buffers):
    start(client(served.address), lambda key, told: Answer(buffers))
    (node,) = served.nodes(1)
    (reply,) = exchange(LinkGrid(served.link, "f"), message(RecordDict(), node))
    assert reply.has_error() and "can't be read" in reply.error.reason


def test_who_answered_is_what_the_link_knows(served):
    """Whatever a reply says of its sender and of what it replies to."""

    def work(key: str, buffers: list[bytes]) -> Answer:
        told = decode_message(buffers)
        reply = Message(RecordDict(), reply_to=told)
        reply.metadata.__dict__["_src_node_id"] = 77
        reply.metadata.__dict__["_reply_to_message_id"] = "another"
        return Answer(encode_message(reply))

    start(client(served.address), work)
    (node,) = served.nodes(1)
    grid = LinkGrid(served.link, "f")
    (key,) = grid.push_messages([message(RecordDict(), node)])
    (reply,) = until(lambda: list(grid.pull_messages([key])), LONG)
    assert reply.metadata.src_node_id == node
    assert reply.metadata.reply_to_message_id == key


def test_pulling_does_not_wait(served):
    served.raw().joined()
    (node,) = served.nodes(1)
    grid = LinkGrid(served.link, "f")
    keys = grid.push_messages([message(RecordDict(), node)])
    assert list(grid.pull_messages(keys)) == []
