"""Instructions that nobody waits for any more: late replies, and those who are still at work on one."""

from __future__ import annotations

import pytest
from links import LONG, Held, Raw, Served, client, proxied, start
from processes import until

from fedkit.link.client import LinkClient
from fedkit.link.frames import Kind, Parcel, message_frames
from fedkit.link.spool import Spool


@pytest.fixture
def kept(monkeypatch) -> list[int]:
    """The sizes of all replies that were held in memory."""
    sizes: list[int] = []
    keep = Spool.keep

    def watched(self: Spool, buffers: list[bytes]):
        sizes.append(sum(map(len, buffers)))
        return keep(self, buffers)

    monkeypatch.setattr(Spool, "keep", watched)
    return sizes


def asked(served: Served, key: str = "k") -> tuple[int, Raw]:
    """A raw client that has been sent an instruction."""
    one = served.raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, key, [b"x"])
    assert one.instruction() == (key, [b"x"])
    return node, one


def at_work(served: Served, *more: str, address: str | None = None) -> tuple[int, LinkClient, Held]:
    """A client at work on the instruction ``k``, with others behind it."""
    one, work = client(address or served.address), Held()
    start(one, work)
    (node,) = served.nodes(1)
    for key in ("k", *more):
        served.link.send(node, key, [key.encode()])
    assert work.began.wait(LONG)
    until(lambda: {"k", *more} <= one._known, LONG)
    return node, one, work


def withdraw(served: Served, one: LinkClient, key: str) -> None:
    """Withdraw an instruction, and wait until the client has been told."""
    served.link.withdraw([key])
    until(lambda: key in one._withdrawn, LONG)


# What the server says and counts.


def test_who_works_on_a_withdrawn_instruction_is_told(served):
    _, slow = asked(served)
    served.link.withdraw(["k"])
    assert slow.told() == (Kind.WITHDRAW, {"key": "k"})


def test_a_late_reply_is_counted_dropped_and_the_client_told(served, kept, caplog):
    node, slow = asked(served)
    served.link.withdraw(["k"])
    assert slow.told() == (Kind.WITHDRAW, {"key": "k"})
    slow.answer("k", bytes(3 << 20))
    assert slow.told() == (Kind.WITHDRAW, {"key": "k"})
    served.link.send(node, "next", [b"y"])
    assert slow.instruction() == ("next", [b"y"])
    slow.answer("next", b"in time")
    assert served.take("next") == {"next": [b"in time"]}
    assert served.take("k", wait=0.05) == {}
    assert served.link.outcomes == {"late": 1, "answered": 1}
    assert kept == [len(b"in time")]  # nothing of it was held, whatever its size
    assert "does not count: late" in caplog.text


def test_a_reply_that_is_half_there_when_it_is_withdrawn_is_not_held(served, kept):
    node, slow = asked(served)
    first, *rest = message_frames("k", Parcel.of([bytes(5 << 20)]))
    slow.send(first)
    session = served.link._ledger.node(node).session
    until(lambda: session._assembler._key == "k", LONG)
    served.link.withdraw(["k"])
    assert slow.told() == (Kind.WITHDRAW, {"key": "k"})
    assert session._assembler._open.getbuffer().nbytes == 0
    slow.send(*rest)
    assert slow.told() == (Kind.WITHDRAW, {"key": "k"})
    assert served.link.outcomes == {"late": 1}
    assert kept == []


def test_a_reply_that_came_before_the_withdrawal_is_forgotten(served):
    node, quick = asked(served)
    served.link.send(node, "next", [b"x"])
    quick.answer("k", b"y").answer("next", b"z")
    served.take("next")
    served.link.withdraw(["k"])
    assert served.take("k", wait=0.05) == {}
    assert served.link._ledger.spool.held == 0


def test_a_withdrawn_instruction_is_not_sent_to_who_reconnects(served):
    node, first = asked(served, "old")
    first.vanish()
    until(lambda: not served.connected(node), LONG)
    served.link.withdraw(["old"])
    second = served.raw().joined()
    served.link.send(node, "new", [b"y"])
    assert second.instruction() == ("new", [b"y"])


def test_one_that_was_never_sent_needs_no_word(served):
    """It waits behind a reconnect; when it is withdrawn, nothing was known of it."""
    node, first = asked(served, "old")
    first.answer("old", b"y")
    served.take("old")
    first.vanish()
    until(lambda: not served.connected(node), LONG)
    served.link.send(node, "unsent", [b"y"])
    served.link.withdraw(["unsent"])
    second = served.raw().joined()
    served.link.send(node, "new", [b"z"])
    assert second.instruction() == ("new", [b"z"])


def test_withdrawing_what_nobody_knows_does_nothing(served):
    _, one = asked(served)
    served.link.withdraw(["never asked"])
    one.answer("k", b"y")
    assert served.take("k") == {"k": [b"y"]}


def test_asked_again_after_a_withdrawal_the_answer_counts(served):
    node, slow = asked(served)
    served.link.withdraw(["k"])
    assert slow.told() == (Kind.WITHDRAW, {"key": "k"})
    served.link.send(node, "k", [b"x"])
    assert slow.instruction() == ("k", [b"x"])
    slow.answer("k", b"y")
    assert served.take("k") == {"k": [b"y"]}
    assert served.link.outcomes == {"answered": 1}


def test_asked_again_while_the_late_reply_still_comes(served):
    """The half of it that was let go of can't count; the client sends it once more."""
    node, slow = asked(served)
    data = bytes(range(256)) * (3 << 12)
    first, *rest = message_frames("k", Parcel.of([data]))
    slow.send(first)
    session = served.link._ledger.node(node).session
    until(lambda: session._assembler._key == "k", LONG)
    served.link.withdraw(["k"])
    assert slow.told() == (Kind.WITHDRAW, {"key": "k"})
    served.link.send(node, "k", [b"x"])
    assert slow.instruction() == ("k", [b"x"])
    slow.send(*rest).answer("k", data)
    assert served.take("k") == {"k": [data]}


# What the client does.


def test_the_answer_to_a_withdrawn_instruction_is_not_sent(served, caplog):
    node, one, work = at_work(served)
    withdraw(served, one, "k")
    work.may_end.set()
    assert served.ask(node, "next", b"y") == [b"Y"]
    assert work.done == ["k", "next"]
    assert served.link.outcomes == {"answered": 1}
    assert "not ready in time" in caplog.text


def test_a_withdrawn_instruction_that_is_still_queued_is_not_begun(served):
    _, one, work = at_work(served, "queued", "last")
    withdraw(served, one, "queued")
    work.may_end.set()
    assert served.take("k", "last") == {"k": [b"K"], "last": [b"LAST"]}
    assert work.done == ["k", "last"]


@pytest.mark.parametrize("key", ["k", "queued"])
def test_asked_again_before_it_is_done_it_is_done_once(served, key):
    node, one, work = at_work(served, "queued")
    withdraw(served, one, key)
    served.link.send(node, key, [key.encode()])
    until(lambda: key not in one._withdrawn, LONG)
    work.may_end.set()
    assert served.take("k", "queued") == {"k": [b"K"], "queued": [b"QUEUED"]}
    assert work.done == ["k", "queued"]


def test_asked_again_after_it_was_done_too_late_it_is_answered_from_memory(served):
    node, one, work = at_work(served)
    withdraw(served, one, "k")
    work.may_end.set()
    until(lambda: not one._known, LONG)
    served.link.send(node, "k", [b"k"])
    assert served.take("k") == {"k": [b"K"]}
    assert work.done == ["k"]


def test_one_that_was_skipped_is_begun_when_it_is_asked_again(served):
    node, one, work = at_work(served, "queued")
    withdraw(served, one, "queued")
    work.may_end.set()
    until(lambda: not one._known, LONG)
    assert work.done == ["k"]
    assert served.ask(node, "queued", b"now") == [b"NOW"]


def test_a_withdrawal_is_forgotten_with_its_instruction(served):
    """What a client remembers of a run of a thousand rounds does not grow."""
    _, one, work = at_work(served, "queued")
    withdraw(served, one, "k")
    withdraw(served, one, "queued")
    served.link.withdraw(["never asked"])
    work.may_end.set()
    until(lambda: not one._known, LONG)
    assert not one._withdrawn


def test_a_broken_link_brings_no_withdrawn_instruction_back(served):
    with proxied(served) as proxy:
        node, one, work = at_work(served, "queued", address=proxy.address)
        withdraw(served, one, "queued")
        proxy.cut()
        until(lambda: len(served.greeted) == 2, LONG)
        work.may_end.set()
        assert served.ask(node, "next", b"y") == [b"Y"]
        assert served.take("k") == {"k": [b"K"]}
        assert work.done == ["k", "next"]


def test_one_withdrawn_while_the_link_is_broken_is_answered_too_late(served):
    """Nobody could tell the client: it does its work, and is told then."""
    with proxied(served) as proxy:
        node, _, work = at_work(served, address=proxy.address)
        proxy.cut()
        until(lambda: not served.connected(node), LONG)
        served.link.withdraw(["k"])
        until(lambda: len(served.greeted) == 2, LONG)
        work.may_end.set()
        assert served.ask(node, "next", b"y") == [b"Y"]
        until(lambda: served.link.outcomes == {"late": 1, "answered": 1}, LONG)
