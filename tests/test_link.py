"""The link over real gRPC on one machine: what is sent arrives, once, whatever happens on the way.

Payloads are bytes: neither Flower nor torch takes part.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import grpc
import pytest
from links import LONG, Held, Served, background, client, echo, serving, start, still_serves
from processes import until

from fedkit.errors import FedkitError
from fedkit.link import ledger as link_ledger
from fedkit.link import server as link_server
from fedkit.link import session as link_session
from fedkit.link.client import Answer, LinkClient
from fedkit.link.frames import Kind, Parcel, frame
from fedkit.link.node import REMEMBERED, Lost


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, (5 << 20) + 3])
def test_a_payload_comes_back_as_it_went(served, size):
    start(client(served.address))
    (node,) = served.nodes(1)
    data = bytes(range(251)) * (size // 251 + 1)
    buffers = [data[: size // 3], b"", data[size // 3 : size]]
    assert served.ask(node, "k", *buffers) == buffers


def test_a_reply_may_have_other_buffers_than_its_instruction(served):
    start(client(served.address), lambda key, buffers: Answer([b"one ", b"", b"two"]))
    (node,) = served.nodes(1)
    assert served.ask(node, "k", b"x") == [b"one ", b"", b"two"]
    start(client(served.address, "b"), lambda key, buffers: Answer([]))
    assert served.ask(served.nodes(2)[1], "k2", b"x") == []


def test_several_clients_get_their_own_instructions(served):
    for name in "abcd":
        start(
            client(served.address, name),
            lambda key, buffers, name=name: Answer([name.encode(), *buffers]),
        )
    nodes = served.nodes(4)
    keys = [f"{node}/{number}" for number in range(5) for node in nodes]
    for key in keys:
        served.link.send(int(key.partition("/")[0]), key, [key.encode()])
    replies = served.take(*keys)
    assert {key: data[1].decode() for key, data in replies.items()} == {key: key for key in keys}
    answered_by = {(key.partition("/")[0], data[0]) for key, data in replies.items()}
    assert len(answered_by) == 4


def test_instructions_are_worked_on_in_the_order_of_sending(served):
    seen: list[str] = []

    def work(key: str, buffers: list[bytes]) -> Answer:
        seen.append(key)
        return Answer([])

    start(client(served.address), work)
    (node,) = served.nodes(1)
    keys = [str(number) for number in range(30)]
    for key in keys:
        served.link.send(node, key, [b"x"])
    served.take(*keys)
    assert seen == keys


def test_one_parcel_reaches_many(served):
    """A broadcast is one object in memory, however many get it."""
    shared = Parcel.of([b"weights" * 1000])
    for name in "abc":
        start(client(served.address, name))
    nodes = served.nodes(3)
    for node in nodes:
        served.link.send(node, str(node), shared.with_head(b"to %d" % node))
    replies = served.take(*map(str, nodes))
    assert replies == {str(node): [b"to %d" % node, b"weights" * 1000] for node in nodes}


def test_the_link_counts_what_it_carries_by_account(served):
    start(client(served.address))
    (node,) = served.nodes(1)
    served.link.send(node, "k", [bytes(3000)], account="train")
    served.take("k")
    assert 3000 < served.link.bytes_sent["train"] < 3200
    assert 3000 < served.link.bytes_received["train"] < 3200
    assert served.link.outcomes == {"answered": 1}


def test_take_gives_up_at_its_deadline(served):
    served.raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    assert served.link.take(["k"], time.monotonic() + 0.1) == {}
    assert served.link.take(["k"], 0.0) == {}


def test_sending_to_who_is_not_there_gives_lost_at_once(served):
    served.link.send(77, "k", [b"x"])
    assert "not connected" in served.lost("k")


# Transfers under way.


@pytest.fixture
def one_slot(monkeypatch) -> None:
    monkeypatch.setattr(link_ledger, "TRANSFERS_IN_FLIGHT", 1)


def test_sending_waits_for_room_and_then_goes_on(one_slot, served):
    start(client(served.address))
    (node,) = served.nodes(1)
    keys = [str(number) for number in range(40)]
    background(lambda: [served.link.send(node, key, [bytes(50_000)]) for key in keys])
    assert len(served.take(*keys)) == len(keys)


@serving(grace=0.3)
def test_room_taken_by_a_vanished_client_is_given_back(one_slot, served):
    vanished = served.raw().joined()
    (gone,) = served.nodes(1)
    vanished.vanish()
    background(lambda: [served.link.send(gone, str(n), [b"x"]) for n in range(6)])
    replies = served.take(*map(str, range(6)))
    assert len(replies) == 6 and all(isinstance(reply, Lost) for reply in replies.values())
    assert still_serves(served)


def test_who_finds_no_room_before_the_deadline_is_lost(one_slot, served):
    """One client takes nothing any more; the round's deadline holds for those behind it, too."""
    stuck, other = served.raw().joined("stuck"), served.raw().joined("other")
    first, second = served.nodes(2)
    served.link.send(first, "big", [bytes(20 << 20)])
    served.link.send(second, "small", [b"x"], deadline=time.monotonic() + 0.1)
    assert "time was up" in served.lost("small")
    stuck.vanish()
    served.link.send(second, "again", [b"y"], deadline=time.monotonic() + LONG)
    assert other.instruction() == ("again", [b"y"])


@pytest.fixture
def looks_around_often(monkeypatch) -> None:
    monkeypatch.setattr(link_server, "LOOK_AROUND_S", 0.05)


def test_a_peer_that_takes_nothing_more_is_cut_and_makes_room(
    monkeypatch, looks_around_often, one_slot, served
):
    monkeypatch.setattr(link_session, "STALL_S", 0.3)
    stuck, other = served.raw().joined("stuck"), served.raw().joined("other")
    first, second = served.nodes(2)
    data = bytes(range(256)) * (20 << 12)
    served.link.send(first, "big", [data])
    served.link.send(second, "small", [b"x"])  # waits for the only slot
    assert other.instruction() == ("small", [b"x"])
    code, sentence = stuck.end()
    assert code is grpc.StatusCode.ABORTED and "stands still" in sentence
    monkeypatch.setattr(link_session, "STALL_S", LONG)
    # What was cut comes whole to who comes back.
    assert served.raw().joined("stuck").instruction() == ("big", [data])


def test_a_peer_that_vanishes_in_a_transfer_is_no_fault_of_the_server(served, caplog):
    vanishing = served.raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "big", [bytes(20 << 20)])
    vanishing.receive()
    vanishing.vanish()
    until(lambda: not served.connected(node), LONG)
    assert still_serves(served)
    assert "own code" not in caplog.text


# Who goes, and who comes back.


@serving(grace=0.2)
def test_a_vanished_clients_instruction_is_answered_by_lost(served):
    gone = served.raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    assert gone.instruction() == ("k", [b"x"])
    gone.vanish()
    assert "vanished" in served.lost("k")
    until(lambda: served.parted == [node], LONG)
    assert served.link.node_ids() == []
    assert served.link.outcomes == {"lost": 1}


@serving(grace=0.2)
def test_a_stream_half_closed_without_leave_counts_as_vanished(served):
    half = served.raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    half.instruction()
    half.half_close()
    assert "vanished" in served.lost("k")


def test_who_reconnects_in_time_gets_the_pending_instruction_again_and_counts_once(served):
    first = served.raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"work"])
    assert first.instruction() == ("k", [b"work"])
    first.vanish()
    until(lambda: not served.connected(node), LONG)
    assert served.link.node_ids() == [node]
    served.link.send(node, "later", [b"more"])
    second = served.raw().joined()
    assert second.instruction() == ("k", [b"work"])
    assert second.instruction() == ("later", [b"more"])
    second.answer("k", b"first").answer("k", b"second").answer("later", b"done")
    assert served.take("later") == {"later": [b"done"]}
    assert served.take("k") == {"k": [b"first"]}
    assert served.take("k", wait=0.05) == {}
    assert served.parted == []
    assert served.link.outcomes == {"answered": 2, "duplicate": 1}


def test_an_answered_instruction_is_not_sent_again(served):
    first = served.raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "old", [b"x"])
    first.instruction()
    first.answer("old", b"y")
    served.take("old")
    first.vanish()
    until(lambda: not served.connected(node), LONG)
    second = served.raw().joined()
    served.link.send(node, "new", [b"z"])
    assert second.instruction() == ("new", [b"z"])


@serving(grace=0.1)
def test_who_comes_back_after_the_grace_is_the_same_node(served):
    served.raw().joined().vanish()
    until(lambda: served.parted, LONG)
    (node,) = served.parted
    again = served.raw().joined()
    assert served.nodes(1) == [node]
    served.link.send(node, "k", [b"x"])
    assert again.instruction() == ("k", [b"x"])


@serving(grace=0.4)
def test_an_old_grace_does_not_end_a_new_session(served):
    served.raw().joined().vanish()
    (node,) = until(served.link.node_ids, LONG)
    until(lambda: not served.connected(node), LONG)
    again = served.raw().joined()
    time.sleep(0.6)
    assert served.parted == []
    served.link.send(node, "k", [b"x"])
    assert again.instruction() == ("k", [b"x"])


def test_leave_answers_what_is_pending_at_once(served):
    leaving = served.raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    leaving.instruction()
    leaving.send(frame(Kind.LEAVE))
    assert "left" in served.lost("k")
    assert leaving.end()[0] is grpc.StatusCode.OK
    until(lambda: served.parted == [node], LONG)
    assert served.link.node_ids() == []


def test_a_reply_sent_before_leave_counts(served):
    leaving = served.raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    leaving.instruction()
    leaving.answer("k", b"done").send(frame(Kind.LEAVE))
    assert served.take("k") == {"k": [b"done"]}


# How sessions end.


def test_dismiss_ends_the_session_with_its_sentence(served):
    done = start(client(served.address))
    (node,) = served.nodes(1)
    served.link.dismiss(node, "Its public set differs.")
    with pytest.raises(FedkitError, match="Its public set differs"):
        done.result(LONG)
    until(lambda: not served.link.node_ids(), LONG)
    assert still_serves(served)


def test_what_a_dismissed_client_had_to_do_is_lost(served):
    served.raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    served.link.dismiss(node, "Go.")
    assert isinstance(served.take("k")["k"], Lost)
    assert isinstance(served.ask(node, "later", b"x"), Lost)


def test_dismissing_who_was_never_there_does_nothing(served):
    served.link.dismiss(77, "Go.")
    assert still_serves(served)


def test_a_dismissed_client_has_parted(served):
    """It is gone for good: its shard must not stay taken."""
    dismissed = served.raw().joined()
    (node,) = served.nodes(1)
    served.link.dismiss(node, "Go.")
    assert dismissed.end() == (grpc.StatusCode.FAILED_PRECONDITION, "Go.")
    until(lambda: not served.link.node_ids(), LONG)
    until(lambda: served.parted == [node], LONG)


def test_a_dismissed_client_that_is_started_again_is_asked_again(served):
    """Somebody mended it meanwhile; the roster asks it anew, the link must let it in."""
    dismissed = served.raw().joined()
    (node,) = served.nodes(1)
    served.link.dismiss(node, "Go.")
    dismissed.end()
    until(lambda: not served.link.node_ids(), LONG)
    again = served.raw().joined()
    assert served.nodes(1) == [node]
    served.link.send(node, "k", [b"x"])
    assert again.instruction() == ("k", [b"x"])


def test_close_says_goodbye_and_run_returns_it(served):
    done = [start(client(served.address, name)) for name in "abc"]
    served.nodes(3)
    served.close("The run is over: all rounds are done.")
    assert [one.result(LONG) for one in done] == ["The run is over: all rounds are done."] * 3


def test_the_goodbye_comes_through_when_instructions_are_queued(served):
    done = start(client(served.address))
    (node,) = served.nodes(1)
    for key in "abc":
        served.link.send(node, key, [bytes(3 << 20)])
    served.close("bye")
    assert done.result(LONG) == "bye"


def test_a_goodbye_of_a_server_that_failed_is_an_error_at_the_client(served):
    done = start(client(served.address))
    served.nodes(1)
    served.close("The server ended: the disk is full.", ok=False)
    with pytest.raises(FedkitError, match="The server ended: the disk is full"):
        done.result(LONG)


def test_a_goodbye_reaches_a_client_that_is_still_at_work(served):
    work = Held()
    done = start(client(served.address), work)
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    assert work.began.wait(LONG)
    served.close("bye")
    work.may_end.set()
    assert done.result(LONG) == "bye"


def test_close_does_not_wait_for_clients_that_are_gone(served):
    served.raw().joined().vanish()
    background(served.close).result(LONG)


def test_work_that_fails_for_good_sends_its_reply_and_leaves(served):
    fatal = FedkitError("The client's own code failed.")
    done = start(client(served.address), lambda key, buffers: Answer([b"sorry"], fatal))
    (node,) = served.nodes(1)
    assert served.ask(node, "k", b"x") == [b"sorry"]
    with pytest.raises(FedkitError, match="own code failed"):
        done.result(LONG)
    until(lambda: served.parted == [node], LONG)


def test_a_client_that_cannot_take_its_welcome_leaves(served):
    def on_welcome(welcome: dict[str, Any]) -> None:
        raise FedkitError("Another federation.")

    hello = {"identity": "a", "secret": "s"}
    one = LinkClient(served.address, hello, max_wait=5, on_welcome=on_welcome)
    with pytest.raises(FedkitError, match="Another federation"):
        start(one).result(LONG)
    until(lambda: len(served.parted) == 1, LONG)


def test_threads_end_with_their_link():
    def of_links() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "link"}

    before, served = of_links(), Served()
    done = start(client(served.address), echo)
    served.nodes(1)
    assert len(of_links() - before) == 2
    served.close("bye")
    done.result(LONG)
    until(lambda: not of_links() - before, LONG)


def test_what_is_remembered_of_old_instructions_is_bounded(served):
    start(client(served.address))
    (node,) = served.nodes(1)
    keys = [str(number) for number in range(REMEMBERED + 20)]
    for key in keys:
        served.link.send(node, key, [b"x"])
    served.take(*keys)
    found = served.link._ledger.node(node)
    assert found is not None and list(found.settled) == keys[-REMEMBERED:]
    assert not found.pending and not found.unsent
