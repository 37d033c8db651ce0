"""Who sends nonsense, lies or never speaks is told so in a sentence; the others never notice."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import ExitStack

import grpc
import grpc.aio
import pytest
from links import LONG, Held, Raw, client, proxied, serving, start, still_serves
from processes import until

from fedkit.link import server as link_server
from fedkit.link import session as link_session
from fedkit.link.frames import (
    MAX_FRAME_BYTES,
    METHOD,
    PROTOCOL,
    Kind,
    Parcel,
    frame,
    message_frames,
)

# Who is no client at all.


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 100,
        frame(Kind.HELLO, {"identity": "a"})[:-3],
        frame(Kind.LEAVE),
        frame(Kind.CHUNK, body=b"x"),
        frame(Kind.HELLO),
        frame(Kind.HELLO, {"identity": 3, "protocol": PROTOCOL}),
        frame(Kind.WELCOME, {"identity": "a", "protocol": PROTOCOL}),
    ],
    ids=["empty", "http", "noise", "cut", "leave", "chunk", "no-head", "no-identity", "welcome"],
)
def test_a_first_frame_that_is_no_greeting_is_refused(served, first):
    code, details = served.raw().send(first).end()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "greeting" in details
    assert served.link.node_ids() == [] and served.link.outcomes == {"refused": 1}
    assert still_serves(served)


def test_a_stream_that_ends_before_its_greeting_is_refused(served):
    assert served.raw().half_close().end()[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_who_never_greets_is_sent_away(monkeypatch, served):
    monkeypatch.setattr(link_server, "HELLO_WAIT_S", 0.2)
    code, details = served.raw().end()
    assert code is grpc.StatusCode.ABORTED  # it may be an honest client on a bad line
    assert "No greeting" in details
    assert still_serves(served)


def test_odd_wishes_in_a_greeting_never_stop_the_server(served):
    served.raw().hello("1", config=[1], protocol=PROTOCOL, session="", token=5).receive()
    served.raw().hello("2", config={"shard": "x" * 100_000}, version={"a": [None]}).receive()
    assert still_serves(served)


# Nonsense within a session.

NONSENSE: dict[str, list[bytes]] = {
    "noise": [b"\xff" * 50],
    "nothing": [b""],
    "a cut frame": [frame(Kind.LEAVE, {"a": 1})[:-2]],
    "a chunk alone": [frame(Kind.CHUNK, body=b"x")],
    "hello again": [frame(Kind.HELLO, {"identity": "raw"})],
    "a server's frame": [frame(Kind.BYE)],
    "a message without sizes": [frame(Kind.MESSAGE, {"key": "k"})],
    "a lying size": [frame(Kind.MESSAGE, {"key": "k", "sizes": [2], "sums": [0]}, b"abc")],
    "a huge size": [frame(Kind.MESSAGE, {"key": "k", "sizes": [1 << 60], "sums": [0]})],
    "huge counts": [frame(Kind.MESSAGE, {"key": "k", "sizes": [0] * 40_000, "sums": [0] * 40_000})],
    "a key of many lines": [frame(Kind.MESSAGE, {"key": "k\n\x1b[31m", "sizes": [], "sums": []})],
    "an endless key": [frame(Kind.MESSAGE, {"key": "k" * 301, "sizes": [], "sums": []})],
    "a key that is none": [frame(Kind.MESSAGE, {"key": {}, "sizes": [], "sums": []})],
    "a wrong sum": [frame(Kind.MESSAGE, {"key": "k", "sizes": [3], "sums": [1]}, b"abc")],
}
BIG = list(message_frames("k", Parcel.of([bytes(5 << 19), bytes(range(256)) * (1 << 11)])))
NONSENSE |= {
    "a frame twice": [BIG[0], BIG[1], BIG[1], BIG[2]],
    "frames swapped": [BIG[0], BIG[2], BIG[1]],
    "a truncated frame": [BIG[0], BIG[1], BIG[2][:-1], frame(Kind.CHUNK, body=b"xx")],
    "two messages at once": [BIG[0], BIG[0]],
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_within_a_session_ends_that_session_alone(served, nonsense):
    other, culprit = served.raw().joined("other"), served.raw().joined()
    nodes = served.nodes(2)
    for node in nodes:
        served.link.send(node, "k" if node == nodes[1] else "own", [b"x"])
    assert culprit.instruction() == ("k", [b"x"])
    code, details = culprit.send(*nonsense).end()
    # What came garbled may have been sent well, and the client shall send it again.
    garbled = "checksum is wrong" in details
    assert code is grpc.StatusCode.DATA_LOSS if garbled else grpc.StatusCode.INVALID_ARGUMENT
    assert details.endswith(".") and "own code" not in details
    assert other.instruction() == ("own", [b"x"])
    # It is no reason to count what came, or to take the work from a device that was mended.
    assert served.take("k", wait=0.02) == {}
    again = served.raw().joined()
    assert again.instruction() == ("k", [b"x"])
    again.answer("k", b"y")
    assert served.take("k") == {"k": [b"y"]}


def test_a_frame_larger_than_any_of_ours_ends_that_session_alone(served):
    culprit = served.raw().joined()
    code, details = culprit.send(bytes(MAX_FRAME_BYTES + 1)).end()
    assert code is not grpc.StatusCode.OK and details
    assert still_serves(served)


@serving(limit=1000)
def test_a_message_beyond_the_limit_is_refused_before_it_comes(served):
    culprit = served.raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "k", [bytes(5000)])  # the limit is for what is taken
    assert culprit.instruction() == ("k", [bytes(5000)])
    code, details = culprit.send(next(message_frames("k", Parcel.of([bytes(1001)])))).end()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "1001 bytes" in details and "limit 1000" in details
    assert still_serves(served)


# Replies that nobody asked for.


def test_a_reply_to_somebody_elses_instruction_is_not_counted(served):
    honest, thief = served.raw().joined("honest"), served.raw().joined("thief")
    one, other = served.nodes(2)
    served.link.send(one, "k", [b"x"])
    served.link.send(other, "own", [b"x"])
    assert thief.instruction() == ("own", [b"x"])
    thief.answer("k", b"forged").answer("own", b"mine").answer("never asked", b"?")
    assert thief.told() == (Kind.WITHDRAW, {"key": "k"})
    assert thief.told() == (Kind.WITHDRAW, {"key": "never asked"})
    assert served.take("own") == {"own": [b"mine"]}
    assert served.take("k", "never asked", wait=0.05) == {}
    honest.answer("k", b"true")
    assert served.take("k") == {"k": [b"true"]}
    assert served.link.outcomes == {"answered": 2, "unasked": 2}


def test_a_large_reply_that_nobody_asked_for_is_not_held(served):
    culprit = served.raw().joined()
    (node,) = served.nodes(1)
    first, *rest = message_frames("k", Parcel.of([bytes(20 << 20)]))
    culprit.send(first, *rest[:-1])
    session = served.link._ledger.node(node).session
    until(lambda: session._assembler._came >= 19 << 20, LONG)
    assert session._assembler._open.getbuffer().nbytes == 0
    culprit.send(rest[-1])
    assert culprit.told() == (Kind.WITHDRAW, {"key": "k"})
    assert served.link.outcomes == {"unasked": 1}


def test_ever_more_uncalled_for_replies_end_the_session(monkeypatch, served):
    monkeypatch.setattr(link_session, "UNCALLED_FOR", 3)
    culprit = served.raw().joined()
    for number in range(4):
        culprit.answer(f"never asked {number}", b"?")
    code, details = culprit.end()
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "nobody waits for" in details
    assert still_serves(served)


# Crowds.


def test_no_more_than_so_many_of_one_address_may_stand_at_the_door(monkeypatch, served):
    monkeypatch.setattr(link_server, "GREETING_PER_PEER", 5)
    silent = [served.raw() for _ in range(5)]
    until(lambda: served.link._greeting.total() == 5, LONG)
    code, details = served.raw().hello().end()
    assert code is grpc.StatusCode.ABORTED and "try again" in details
    with proxied(served, source="127.0.0.2") as elsewhere:
        start(client(elsewhere.address))
        (node,) = served.nodes(1)
        assert served.ask(node, "k", b"x") == [b"x"]
    silent[0].vanish()
    until(lambda: served.link._greeting.total() == 4, LONG)
    served.raw().joined()


def test_no_more_than_so_many_of_all_addresses_may_stand_at_the_door(monkeypatch, served):
    monkeypatch.setattr(link_server, "GREETING_AT_ONCE", 3)
    with ExitStack() as stack:
        for last in (2, 3, 4):
            elsewhere = stack.enter_context(proxied(served, source=f"127.0.0.{last}"))
            stack.callback(Raw(elsewhere.address).vanish)
        until(lambda: served.link._greeting.total() == 3, LONG)
        assert served.raw().hello().end()[0] is grpc.StatusCode.ABORTED
    until(lambda: not served.link._greeting, LONG)
    assert still_serves(served)


def test_who_is_in_is_not_counted_among_those_at_the_door(monkeypatch, served):
    monkeypatch.setattr(link_server, "GREETING_PER_PEER", 1)
    inside = [served.raw().joined(str(number)) for number in range(3)]
    assert len(served.nodes(3)) == len(inside)


def test_a_client_at_a_crowded_door_comes_in_when_there_is_room(monkeypatch, served):
    monkeypatch.setattr(link_server, "GREETING_PER_PEER", 1)
    silent = served.raw()
    until(lambda: served.link._greeting.total() == 1, LONG)
    start(client(served.address, max_wait=LONG))
    until(lambda: served.link.outcomes["refused"] >= 1, LONG)
    silent.vanish()
    served.nodes(1)


async def knock(address: str, channels: int, streams: int) -> list[grpc.aio.Channel]:
    """Open streams that never say a word, and leave them open."""
    opened = []
    options = [("grpc.use_local_subchannel_pool", 1)]
    for _ in range(channels):
        channel = grpc.aio.insecure_channel(address, options=options)
        for _ in range(streams):
            channel.stream_stream(METHOD)()
        opened.append(channel)
    return opened


def test_a_thousand_half_open_joins_keep_nobody_out(served):
    """Beyond so many of one address they are turned away at once; a round goes on meanwhile."""
    inside, work = client(served.address, "inside"), Held()
    start(inside, work)
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    assert work.began.wait(LONG)

    async def attack() -> None:
        channels = await knock(served.address, channels=67, streams=15)
        deadline = time.monotonic() + LONG
        refused = 67 * 15 - link_server.GREETING_PER_PEER
        while served.link.outcomes["refused"] < refused and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        assert served.link.outcomes["refused"] == refused
        assert served.link._greeting.total() == link_server.GREETING_PER_PEER
        work.may_end.set()
        assert await asyncio.to_thread(served.take, "k") == {"k": [b"X"]}
        with proxied(served, source="127.0.0.2") as elsewhere:
            start(client(elsewhere.address, "newcomer", max_wait=LONG))
            await asyncio.to_thread(served.nodes, 2)
        for channel in channels:
            await channel.close()

    asyncio.run(attack())
    until(lambda: not served.link._greeting, LONG)
    assert still_serves(served)


def test_connections_that_never_speak_keep_nobody_out(served):
    host, _, port = served.address.rpartition(":")
    with ExitStack() as stack:
        for number in range(300):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            if number % 2:
                connection.sendall(b"PRI * HT"[: 1 + number % 8])  # the first bytes of HTTP/2
        assert still_serves(served)


def test_a_round_goes_on_through_all_of_it_at_once(served):
    start(client(served.address, "honest"))
    (node,) = served.nodes(1)
    data = bytes(range(256)) * (8 << 12)
    served.link.send(node, "k", [data])
    culprits = [
        served.raw().send(b"\xff" * 100),
        served.raw().half_close(),
        served.raw().hello("old", protocol=1),
        served.raw().hello("honest", secret="wrong"),
        served.raw().joined("noise").send(b"\xff" * 100),
        served.raw().joined("chunk").send(BIG[1]),
        served.raw().joined("big").send(bytes(MAX_FRAME_BYTES + 1)),
    ]
    for one in culprits:
        code, details = one.end()
        assert code is not grpc.StatusCode.OK and details
    assert served.take("k") == {"k": [data]}
    assert served.ask(node, "next", b"x") == [b"x"]
