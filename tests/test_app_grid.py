"""The grid that a Flower App's server half gets: what Flower's own promises, over the link."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAvg
from links import LONG, background, client, serving, start
from processes import until

from fedkit.apps import grid as app_grid
from fedkit.apps.grid import AppGrid, carried
from fedkit.engine.events import Event
from fedkit.flower import (
    app_error_reply,
    decode_message,
    describe_run,
    encode_message,
    take_identity,
)
from fedkit.link.client import Answer

RUN = 0xF00D


@pytest.fixture(scope="module", autouse=True)
def identity():
    take_identity(run_id=RUN)
    yield
    take_identity()


@pytest.fixture
def told():
    return []


@pytest.fixture
def grid(served, told):
    return AppGrid(served.link, describe_run(RUN, "me/app", "1.0"), told.append)


def echo(key, buffers):
    message = decode_message(buffers, described=False)
    return Answer(encode_message(Message(message.content, reply_to=message)))


def content(value=1.5, size=3):
    return RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(np.full(size, value, np.float32))}),
            "config": ConfigRecord({"server-round": 4}),
        }
    )


def message(node, kind="train", **more):
    return Message(content(), node, kind, **more)


def test_replies_come_in_the_order_of_sending_as_a_list(served, grid):
    for name in "abc":
        start(client(served.address, name), echo)
    nodes = served.nodes(3)
    assert grid.get_node_ids() == [info.node_id for info in grid.get_nodes()] == nodes
    replies = grid.send_and_receive([message(node) for node in reversed(nodes)])
    assert isinstance(replies, list)
    assert [reply.metadata.src_node_id for reply in replies] == nodes[::-1]
    for reply in replies:
        assert reply.metadata.run_id == RUN and reply.metadata.dst_node_id == 1
        assert (reply.content["arrays"]["w"].numpy() == np.float32(1.5)).all()


def test_a_message_keeps_its_content_and_may_be_sent_again(served, grid):
    start(client(served.address), echo)
    (node,) = served.nodes(1)
    one, ids = message(node), []
    for value in (1.5, 2.5):
        one.content["arrays"] = content(value)["arrays"]
        (reply,) = grid.send_and_receive([one])
        assert reply.content["arrays"]["w"].numpy()[0] == value
        assert reply.metadata.reply_to_message_id == one.metadata.message_id
        ids.append(one.metadata.message_id)
    assert len(set(ids)) == 2
    assert one.content["config"]["server-round"] == 4


def test_the_client_sees_what_flower_would_tell_it(served, grid):
    seen = []

    def work(key, buffers):
        seen.append(decode_message(list(buffers)))
        return echo(key, buffers)

    start(client(served.address), work)
    (node,) = served.nodes(1)
    sent = grid.create_message(content(), "query.anything", node, "a/group", ttl=60.0)
    grid.send_and_receive([sent])
    meta = seen[0].metadata
    assert (meta.run_id, meta.src_node_id, meta.dst_node_id) == (RUN, 1, node)
    assert (meta.message_type, meta.group_id, meta.ttl) == ("query.anything", "a/group", 60.0)
    assert meta.message_id == sent.metadata.message_id != ""
    assert seen[0].content["config"] == sent.content["config"]
    assert grid.run.fab_id == "me/app" and grid.run.run_id == RUN


def test_at_the_timeout_only_what_came_is_given_and_the_rest_may_be_pulled_later(served, grid):
    let_go = threading.Event()

    def slow(key, buffers):
        let_go.wait(LONG)
        return echo(key, buffers)

    start(client(served.address, "quick"), echo)
    (quick,) = served.nodes(1)
    start(client(served.address, "slow"), slow)
    _, late = served.nodes(2)
    messages = [message(late), message(quick)]
    (reply,) = grid.send_and_receive(messages, timeout=0.3)
    assert reply.metadata.src_node_id == quick
    key = messages[0].metadata.message_id
    assert grid.pull_messages([key]) == []
    let_go.set()
    (reply,) = until(lambda: grid.pull_messages([key]), LONG)
    assert not reply.has_error() and reply.metadata.src_node_id == late


def test_what_is_pushed_may_be_pulled_once(served, grid):
    start(client(served.address), echo)
    (node,) = served.nodes(1)
    keys = grid.push_messages(message(node) for _ in range(3))
    waiting, found = set(keys), []
    while waiting:
        came = grid.pull_messages(waiting)
        waiting -= {reply.metadata.reply_to_message_id for reply in came}
        found += came
    assert sorted(reply.metadata.reply_to_message_id for reply in found) == sorted(keys)
    for key in (keys[0], "nonsense"):
        (reply,) = grid.pull_messages([key])
        assert reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE
        assert reply.metadata.reply_to_message_id == key


def test_a_message_whose_time_to_live_is_over_is_answered_by_an_error(served, grid, told):
    raw = served.raw().joined()
    (node,) = served.nodes(1)
    (reply,) = grid.send_and_receive([message(node, ttl=0.2)])
    assert reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE
    key, _ = raw.instruction()
    assert raw.told()[1] == {"key": key}  # the client may stop
    assert [event.event for event in told] == ["sent", "expired"]


def test_what_nobody_pulls_is_forgotten_in_the_end(served, grid, monkeypatch):
    monkeypatch.setattr(app_grid, "FORGOTTEN_AFTER_S", 0.0)
    served.raw().joined()
    (node,) = served.nodes(1)
    (forgotten,) = grid.push_messages([message(node, ttl=0.05)])
    time.sleep(0.1)
    (kept,) = grid.push_messages([message(node)])
    assert list(grid._sent) == [kept] != [forgotten]


def test_two_threads_that_forget_the_same_message_tell_it_once(served, grid, told, monkeypatch):
    monkeypatch.setattr(app_grid, "FORGOTTEN_AFTER_S", 0.0)
    served.raw().joined()
    (node,) = served.nodes(1)
    grid.push_messages([message(node, ttl=0.05)])
    time.sleep(0.1)
    withdraw = served.link.withdraw

    def withdrawn(keys):
        # The other thread comes in between seeing what is late and settling it.
        monkeypatch.setattr(served.link, "withdraw", withdraw)
        grid.push_messages([])
        withdraw(keys)

    monkeypatch.setattr(served.link, "withdraw", withdrawn)
    assert grid.push_messages([]) == []
    assert [event.event for event in told] == ["sent", "expired"]


@serving(grace=0.1)
def test_who_is_gone_is_answered_for_by_an_error(served, grid, told):
    served.raw().joined().vanish()
    (node,) = until(lambda: served.parted, LONG)
    (reply,) = grid.send_and_receive([message(node)])
    assert reply.error.code == ErrorCode.NODE_UNAVAILABLE
    assert told[-1] == Event("lost", 4, "train", node, reply.error.reason, 0)


@pytest.mark.parametrize("code", [ErrorCode.MOD_FAILED_PRECONDITION, ErrorCode.UNKNOWN])
def test_an_error_of_the_client_keeps_its_code(served, grid, code):
    def work(key, buffers):
        error = Error(code, "no\x1b[2J good")
        return Answer(encode_message(Message(error, reply_to=decode_message(buffers))))

    start(client(served.address), work)
    (node,) = served.nodes(1)
    (reply,) = grid.send_and_receive([message(node)])
    assert (reply.error.code, reply.error.reason) == (code, "no [2J good")


@pytest.mark.parametrize("buffers", [[], [b"\xff" * 50], [b"", b"an array of nothing"], [b""]])
def test_a_reply_that_is_no_message_is_an_error(served, grid, buffers):
    start(client(served.address), lambda key, told: Answer(buffers))
    (node,) = served.nodes(1)
    (reply,) = grid.send_and_receive([message(node)])
    assert reply.has_error() and "can't be read" in reply.error.reason


def test_arrays_that_only_the_app_understands_pass_both_ways(served, grid):
    """As Flower's own older apps send them: without type and shape."""
    start(client(served.address), echo)
    (node,) = served.nodes(1)
    strange = ArrayRecord({"a": Array("", (), "own", b"123"), "b": Array("int4", (9,), "own", b"")})
    sent = Message(RecordDict({"r": strange}), node, "train")
    (reply,) = grid.send_and_receive([sent])
    assert dict(reply.content["r"]) == dict(strange)


def test_a_large_answer_to_a_query_is_none_of_a_stranger(served, grid):
    """What is asked of strangers who join is a query, too, and has to be answered in few words."""
    start(client(served.address), echo)
    (node,) = served.nodes(1)
    large = Message(content(size=600_000), node, "query.weights")
    (reply,) = grid.send_and_receive([large], timeout=LONG)
    assert reply.content["arrays"]["w"].numpy().size == 600_000
    assert carried(served.link.bytes_received)["query.weights"] > 2_400_000


def test_several_threads_use_it_at_once(served, grid):
    for name in "ab":
        start(client(served.address, name), echo)
    nodes, found = served.nodes(2), []

    def ask(value):
        node = nodes[value % 2]
        (reply,) = grid.send_and_receive([Message(content(value), node, "train")])
        found.append((value, reply.content["arrays"]["w"].numpy()[0], reply.metadata.src_node_id))

    threads = [threading.Thread(target=ask, args=(value,)) for value in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert sorted(found) == [(value, value, nodes[value % 2]) for value in range(24)]


def test_nobody_waits_any_longer_when_the_server_ends(served, grid):
    """As a thread of the app's own may, which then keeps the process from ending."""
    raw = served.raw().joined()
    (node,) = served.nodes(1)
    waiting = background(lambda: grid.send_and_receive([message(node)]))
    raw.instruction()
    raw.vanish()
    until(lambda: not served.connected(node))
    served.close()
    (reply,) = waiting.result(LONG)
    assert reply.error.code == ErrorCode.NODE_UNAVAILABLE


def test_what_can_t_be_sent_is_refused(grid):
    instruction = message(2)
    for wrong in (app_error_reply(instruction, ValueError("no")), message(2, ttl=-1.0)):
        with pytest.raises(ValueError, match="Invalid message"):
            grid.push_messages([wrong])


def test_each_message_is_an_event(served, grid, told):
    start(client(served.address), echo)
    (node,) = served.nodes(1)
    grid.send_and_receive([message(node), message(node, MessageType.EVALUATE, group_id="7")])
    told.sort(key=lambda event: (event.round, event.event != "sent"))
    assert [replace(event, value=None) for event in told] == [
        Event("sent", 4, "train", node),
        Event("answered", 4, "train", node),
        Event("sent", 7, "evaluate", node),
        Event("answered", 7, "evaluate", node),
    ]
    # In bytes, with all that describes them.
    one = message(node)
    grid.send_and_receive([one])
    assert told[-2].value == sum(map(len, encode_message(one)))
    assert told[-1].value > content()["arrays"].count_bytes()
    assert grid.outcomes == {"sent": 3, "answered": 3}


def test_flower_s_strategies_wait_for_their_minimum(served, grid):
    started = threading.Event()

    def come_later():
        started.wait(LONG)
        start(client(served.address, "late"), echo)

    start(client(served.address, "early"), echo)
    served.nodes(1)
    thread = threading.Thread(target=come_later)
    thread.start()
    started.set()
    strategy = FedAvg(fraction_evaluate=0.0)
    sent = list(strategy.configure_train(1, content()["arrays"], ConfigRecord(), grid))
    thread.join(LONG)
    assert sorted(one.metadata.dst_node_id for one in sent) == served.nodes(2)
