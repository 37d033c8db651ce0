"""Replies that wait for those before them: in memory, and beyond a bound on disk."""

from __future__ import annotations

import errno
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
from links import Held, Served, client, start
from processes import until

from fedkit.link import spool as link_spool
from fedkit.link.client import Answer
from fedkit.link.ledger import Ledger
from fedkit.link.node import Node
from fedkit.link.spool import Reply, Spool

BIG = [bytes(range(256)) * 4096, b"", b"tail"]
SIZE = sum(map(len, BIG))


@pytest.fixture
def spool(tmp_path, monkeypatch) -> Spool:
    """Where replies of this size go to disk once one of them is held."""
    monkeypatch.setattr(link_spool, "HELD_BYTES", SIZE + 100)
    monkeypatch.setattr(link_spool, "SMALL_BYTES", 100)
    one = Spool()
    one.folder = tmp_path
    return one


def test_what_fits_stays_in_memory(spool):
    reply = spool.keep(list(BIG))
    assert not reply.is_too_much and spool.held == SIZE
    taken = reply.take()
    assert all(one is other for one, other in zip(taken, BIG, strict=True))
    assert spool.held == 0


def test_what_is_too_much_goes_to_disk_and_comes_back_whole(spool):
    first, second = spool.keep(list(BIG)), spool.keep(list(BIG))
    assert second.is_too_much
    second.write_out()
    assert spool.held == SIZE
    assert (first.take(), second.take()) == (BIG, BIG)
    assert spool.held == 0


def test_what_is_small_stays_in_memory_whatever_else_is_held(spool):
    spool.keep(list(BIG))
    spool.keep(list(BIG))
    assert not spool.keep([bytes(100)]).is_too_much


def test_a_reply_of_no_buffers_is_one(spool):
    assert spool.keep([]).take() == []


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_reply_that_nobody_wants_takes_no_room(spool, on_disk):
    reply = spool.keep(list(BIG))
    if on_disk:
        reply.write_out()
    reply.discard()
    reply.discard()
    assert spool.held == 0


def test_a_file_has_no_name_and_ends_with_its_reply(spool, tmp_path, monkeypatch):
    """After kill -9 nothing is left behind, and nobody else can read what a client sent."""
    made: list[Any] = []
    temporary = tempfile.TemporaryFile

    def watched(**options: Any) -> Any:
        made.append(temporary(**options))
        return made[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", watched)
    reply, other = spool.keep(list(BIG)), spool.keep(list(BIG))
    reply.write_out()
    other.write_out()
    assert list(tmp_path.iterdir()) == [] and len(made) == 2
    reply.take()
    other.discard()
    assert all(file.closed for file in made)


@pytest.mark.parametrize("size", [len(BIG[0]), 50], ids=["large", "within a buffer"])
def test_a_full_disk_is_a_sentence_and_the_reply_stays_in_memory(spool, monkeypatch, caplog, size):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **where: open("/dev/full", "w+b"))  # noqa: PTH123, SIM115
    buffers = [bytes(size), b"tail"]
    reply = spool.keep(buffers)
    with caplog.at_level(logging.WARNING):
        reply.write_out()
    assert "can't be put aside on disk: No space left on device." in caplog.text
    assert reply.take() == buffers
    assert spool.held == 0


def test_a_folder_that_is_gone_is_a_sentence_and_the_reply_stays_in_memory(spool, caplog):
    spool.folder = Path("/nowhere")
    reply = spool.keep(list(BIG))
    reply.write_out()
    assert "No such file or directory" in caplog.text
    assert reply.take() == BIG and spool.held == 0


@pytest.fixture
def written(monkeypatch) -> list[Reply]:
    """The replies that went to disk."""
    replies: list[Reply] = []
    write_out = Reply.write_out

    def watched(self: Reply) -> None:
        write_out(self)
        replies.append(self)

    monkeypatch.setattr(Reply, "write_out", watched)
    return replies


def ledger(served: Served) -> Ledger:
    return served.link._ledger


def test_replies_that_come_early_wait_on_disk(served, spool, written):
    """The first client is slow: what the others send meanwhile is not held in memory."""
    slow = Held()
    start(client(served.address, "slow"), slow)
    for name in "abc":
        start(client(served.address, name), lambda key, buffers: Answer([key.encode(), *BIG]))
    nodes = served.nodes(4)
    keys = [f"{node}" for node in nodes]
    for node, key in zip(nodes, keys, strict=True):
        served.link.send(node, key, [b"x"])
    until(lambda: served.link.outcomes["answered"] == 3)
    assert len(written) == 2
    assert ledger(served).spool.held == SIZE + 1
    slow.may_end.set()
    replies = served.take(*keys)
    first = next(key for key, reply in replies.items() if reply == [b"X"])
    others = {key: reply for key, reply in replies.items() if key != first}
    assert others == {key: [key.encode(), *BIG] for key in keys if key != first}
    assert ledger(served).spool.held == 0


@pytest.mark.parametrize("room", [1, 10], ids=["on disk", "in memory"])
def test_the_counter_returns_to_nothing_whatever_becomes_of_replies(
    served, spool, monkeypatch, room
):
    """Taken, withdrawn, late, twice."""
    monkeypatch.setattr(link_spool, "HELD_BYTES", room * SIZE)
    one = served.raw().joined()
    (node,) = served.nodes(1)
    for key in ("taken", "withdrawn", "late", "twice"):
        served.link.send(node, key, [b"x"])
        one.instruction()
    served.link.withdraw(["late"])
    for key in ("taken", "withdrawn", "late", "twice", "twice"):
        one.answer(key, *BIG)
    until(lambda: served.link.outcomes == {"answered": 3, "late": 1, "duplicate": 1})
    served.link.withdraw(["withdrawn"])
    assert served.take("taken", "twice") == {"taken": BIG, "twice": BIG}
    assert ledger(served).spool.held == 0


@pytest.mark.parametrize("outcome", ["late", "unasked"])
def test_a_reply_that_is_withdrawn_at_the_last_instant_takes_no_room(spool, outcome):
    """It was awaited when it began to come, and no more when it was whole."""
    node = Node(2, "a", "", "client a")
    if outcome == "late":
        node.remember("k", "late")
    one = Ledger([node])
    assert one.answer(node, "k", one.spool.keep(list(BIG)), SIZE) == outcome
    assert one.spool.held == 0 and one.outcomes == {outcome: 1}


def test_a_full_disk_loses_no_reply(served, spool, monkeypatch, caplog):
    def full(**options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    start(client(served.address), lambda key, buffers: Answer(BIG))
    (node,) = served.nodes(1)
    for key in "abc":
        served.link.send(node, key, [b"x"])
    until(lambda: served.link.outcomes["answered"] == 3)
    assert "No space left" in caplog.text
    assert served.take("a", "b", "c") == dict.fromkeys("abc", BIG)
    assert ledger(served).spool.held == 0
    assert served.connected(node)
