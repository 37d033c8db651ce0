"""The link over real gRPC on one machine: payloads are bytes, neither Flower nor torch takes part."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import pytest
from processes import until

from fedkit.errors import FedkitError, UsageError
from fedkit.link import server as link_server
from fedkit.link.client import Answer, LinkClient
from fedkit.link.frames import METHOD, PROTOCOL, Assembler, Kind, frame, message_frames, parse
from fedkit.link.server import LinkServer, Lost, Refusal

# Guards against hanging, not measurements.
LONG = 30.0
Work = Callable[[str, bytearray], Answer]


def echo(key: str, data: bytearray) -> Answer:
    return Answer([bytes(data)])


class Served:
    """A listening server, and what its two callbacks were told."""

    def __init__(self) -> None:
        self.greeted: list[dict[str, Any]] = []
        self.parted: list[int] = []
        self.refusal: Refusal | None = None
        self.link = LinkServer(self.greet, self.parted.append)
        self.address = self.link.listen("127.0.0.1:0")

    def greet(self, hello: dict[str, Any], node_id: int) -> dict[str, Any]:
        if self.refusal is not None:
            raise self.refusal
        self.greeted.append(hello)
        return {"federation": "f", "for": hello.get("name")}

    def nodes(self, count: int) -> list[int]:
        """The node ids, once there are so many."""
        until(lambda: len(self.link.node_ids()) == count, LONG)
        return self.link.node_ids()

    def take(self, *keys: str, wait: float = LONG) -> dict[str, Any]:
        """Replies to all keys, or to those that are answered in time."""
        found: dict[str, Any] = {}
        deadline = time.monotonic() + wait
        while len(found) < len(keys) and time.monotonic() < deadline:
            found |= self.link.take(set(keys) - found.keys(), deadline)
        return found

    def ask(self, node_id: int, key: str, *buffers: bytes) -> Any:
        """Send one instruction and wait for its reply."""
        self.link.send(node_id, key, buffers)
        return self.take(key).get(key)


class Raw:
    """A client that sends what it likes; every wait of its ends by itself."""

    def __init__(self, address: str) -> None:
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        stream: Any = self._channel.stream_stream(METHOD)
        self._call = stream(iter(self._outbox.get, None), timeout=10.0)

    def send(self, *data: bytes) -> Raw:
        for one in data:
            self._outbox.put(one)
        return self

    def hello(self, identity: str = "raw", **more: Any) -> Raw:
        head = {"identity": identity, "secret": "s", "protocol": PROTOCOL, **more}
        return self.send(frame(Kind.HELLO, head))

    def joined(self, identity: str = "raw", **more: Any) -> Raw:
        """This client, let in."""
        assert self.hello(identity, **more).receive()[0] is Kind.WELCOME
        return self

    def receive(self) -> tuple[Kind, dict[str, Any], bytes]:
        kind, head, body = parse(next(self._call))
        return kind, head, bytes(body)

    def instruction(self) -> tuple[str, bytes]:
        """The next instruction, whole."""
        assembler = Assembler()
        kind, head, _ = self.receive()
        assert kind is Kind.MESSAGE
        done = assembler.begin(head)
        while done is None:
            done = assembler.add(memoryview(self.receive()[2]))
        return done[0], bytes(done[1])

    def answer(self, key: str, data: bytes) -> Raw:
        return self.send(*message_frames(key, [data]))

    def end(self) -> tuple[grpc.StatusCode, str]:
        """How the server ends the session."""
        with suppress(grpc.RpcError):
            for _ in self._call:
                continue
        return self._call.code(), self._call.details()

    def vanish(self) -> None:
        self._call.cancel()
        self._channel.close()
        self._outbox.put(None)


@pytest.fixture
def served() -> Iterator[Served]:
    one = Served()
    yield one
    one.link.close("The test is over.")


@pytest.fixture
def raw(served: Served) -> Iterator[Callable[[], Raw]]:
    """Makes raw clients of the server, and takes them away before it closes."""
    made: list[Raw] = []

    def make() -> Raw:
        made.append(Raw(served.address))
        return made[-1]

    yield make
    for one in made:
        one.vanish()


def client(address: str, identity: str = "a", max_wait: float = 5.0, **hello: Any) -> LinkClient:
    head = {"identity": identity, "secret": "s", "name": f"client {identity}", **hello}
    return LinkClient(address, head, max_wait=max_wait, on_welcome=lambda welcome: None)


def background(what: Callable[[], Any]) -> Future[Any]:
    """Do it on a thread that never keeps the tests from ending."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(what())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


def start(one: LinkClient, work: Work = echo) -> Future[str]:
    """Run a client beside the test."""
    return background(lambda: one.run(work))


def run(one: LinkClient, work: Work = echo) -> str:
    return start(one, work).result(LONG)


def still_serves(served: Served) -> bool:
    """Whether a well-behaved newcomer is let in and answered."""
    there = set(served.link.node_ids())
    start(client(served.address, identity=f"newcomer to {len(there)}"))
    (node,) = until(lambda: set(served.link.node_ids()) - there, LONG)
    return bytes(served.ask(node, f"still/{node}", b"there?")) == b"there?"


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, (5 << 20) + 3])
def test_a_payload_comes_back_as_it_went(served, size):
    start(client(served.address))
    (node,) = served.nodes(1)
    data = bytes(range(251)) * (size // 251 + 1)
    assert served.ask(node, "k", data[: size // 3], data[size // 3 : size]) == data[:size]


def test_buffers_of_a_reply_are_joined(served):
    start(client(served.address), lambda key, data: Answer([b"one ", b"", b"two"]))
    (node,) = served.nodes(1)
    assert served.ask(node, "k", b"x") == b"one two"


def test_several_clients_get_their_own_instructions(served):
    for name in "abcd":
        start(
            client(served.address, name),
            lambda key, data, name=name: Answer([name.encode(), bytes(data)]),
        )
    nodes = served.nodes(4)
    keys = [f"{node}/{number}" for number in range(5) for node in nodes]
    for key in keys:
        served.link.send(int(key.partition("/")[0]), key, [key.encode()])
    replies = served.take(*keys)
    assert {key: bytes(data[1:]).decode() for key, data in replies.items()} == {k: k for k in keys}
    answered_by = {(key.partition("/")[0], bytes(data[:1])) for key, data in replies.items()}
    assert len(answered_by) == 4


def test_instructions_are_worked_on_in_the_order_of_sending(served):
    seen: list[str] = []

    def work(key: str, data: bytearray) -> Answer:
        seen.append(key)
        return Answer([])

    start(client(served.address), work)
    (node,) = served.nodes(1)
    keys = [str(number) for number in range(30)]
    for key in keys:
        served.link.send(node, key, [b"x"])
    served.take(*keys)
    assert seen == keys


def test_the_welcome_says_what_greet_returned_and_the_node_id(served):
    welcomes: list[dict[str, Any]] = []
    hello = {"identity": "a", "secret": "s", "name": "Zoë", "config": {"shard": 3}}
    start(LinkClient(served.address, hello, max_wait=5, on_welcome=welcomes.append))
    (node,) = served.nodes(1)
    until(lambda: welcomes, LONG)
    assert welcomes == [{"federation": "f", "for": "Zoë", "node_id": node}]
    assert served.greeted[0]["config"] == {"shard": 3}


def test_the_link_counts_what_it_carries_by_account(served):
    start(client(served.address))
    (node,) = served.nodes(1)
    served.link.send(node, "k", [bytes(3000)], account="train")
    served.take("k")
    assert 3000 < served.link.bytes_sent["train"] < 3200
    assert 3000 < served.link.bytes_received["train"] < 3200


def test_sending_waits_for_room_and_then_goes_on(monkeypatch):
    monkeypatch.setattr(link_server, "TRANSFERS_IN_FLIGHT", 2)
    served = Served()
    try:
        start(client(served.address))
        (node,) = served.nodes(1)
        keys = [str(number) for number in range(40)]
        background(lambda: [served.link.send(node, key, [bytes(50_000)]) for key in keys])
        assert len(served.take(*keys)) == len(keys)
    finally:
        served.link.close("over")


def test_room_taken_by_a_vanished_client_is_given_back(monkeypatch):
    monkeypatch.setattr(link_server, "TRANSFERS_IN_FLIGHT", 2)
    monkeypatch.setattr(link_server, "RECONNECT_GRACE_S", 0.3)
    served = Served()
    raw = Raw(served.address).joined()
    try:
        (gone,) = served.nodes(1)
        raw.vanish()
        background(lambda: [served.link.send(gone, str(n), [b"x"]) for n in range(6)])
        replies = served.take(*map(str, range(6)))
        assert len(replies) == 6 and all(isinstance(reply, Lost) for reply in replies.values())
        assert still_serves(served)
    finally:
        raw.vanish()
        served.link.close("over")


# Who is not let in.


def test_two_servers_on_one_port_give_a_sentence(served):
    second = LinkServer(lambda hello, node_id: {}, lambda node_id: None)
    try:
        with pytest.raises(FedkitError, match=r"can't listen on .*--listen"):
            second.listen(served.address)
    finally:
        second.close("over")
    assert still_serves(served)


def test_another_protocol_is_refused_by_both_numbers(served, raw):
    code, details = raw().hello(protocol=99).end()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert f"protocol {PROTOCOL}" in details and "99" in details and "same version" in details
    assert still_serves(served)


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
def test_a_first_frame_that_is_no_greeting_is_refused(served, raw, first):
    code, details = raw().send(first).end()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "greeting" in details
    assert served.link.node_ids() == []
    assert still_serves(served)


def test_a_stream_that_ends_before_its_greeting_is_refused(served, raw):
    silent = raw()
    silent._outbox.put(None)
    assert silent.end()[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_who_never_greets_is_sent_away(monkeypatch, served, raw):
    monkeypatch.setattr(link_server, "HELLO_WAIT_S", 0.2)
    code, details = raw().end()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "No greeting" in details
    assert still_serves(served)


@pytest.mark.parametrize(
    "nonsense",
    [
        [b"\xff" * 50],
        [frame(Kind.CHUNK, body=b"x")],
        [frame(Kind.HELLO, {"identity": "raw"})],
        [frame(Kind.BYE)],
        [frame(Kind.MESSAGE, {"key": "k", "size": 1 << 60, "crc": 0})],
        [frame(Kind.MESSAGE, {"key": ["k"], "size": 1, "crc": 0})],
        [frame(Kind.MESSAGE, {"key": {}, "size": 0, "crc": 0})],
        [next(message_frames("k", [b"abc"])), frame(Kind.CHUNK, body=b"abd")],
    ],
    ids=["noise", "chunk", "hello again", "bye", "huge", "list", "object", "checksum"],
)
def test_nonsense_within_a_session_ends_that_session_alone(served, raw, nonsense):
    other = raw().joined("other")
    code, details = raw().joined().send(*nonsense).end()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details
    other_node = served.nodes(2)[0]
    served.link.send(other_node, "k", [b"still there"])
    assert other.instruction() == ("k", b"still there")


def test_a_nonsense_greeting_never_stops_the_server(served, raw):
    raw().hello(name="\ud800", config=[1], secret=None).receive()
    raw().hello(identity="", name={"a": 1}, config={"shard": "x" * 100_000}).receive()
    assert still_serves(served)


def test_what_greet_refuses_reaches_the_client_with_status_and_sentence(served, raw):
    served.refusal = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "This federation is füll.")
    assert raw().hello().end() == (served.refusal.status, "This federation is füll.")
    with pytest.raises(FedkitError, match="This federation is füll") as caught:
        run(client(served.address))
    assert caught.value.exit_code == 1
    assert served.link.node_ids() == []


def test_a_refused_argument_is_a_usage_error_at_the_client(served):
    served.refusal = Refusal(grpc.StatusCode.INVALID_ARGUMENT, "There is no shard 7.")
    with pytest.raises(UsageError, match="There is no shard 7"):
        run(client(served.address))


@pytest.mark.parametrize("sentence", ["x" * 200_000, "odd \ud800 text"], ids=["long", "surrogate"])
def test_a_refusal_that_quotes_nonsense_still_reaches_the_client(served, raw, sentence):
    served.refusal = Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"You say {sentence}.")
    code, details = raw().hello().end()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("You say")


def test_one_identity_connected_twice_is_refused(served, raw):
    raw().joined("one")
    code, details = raw().hello("one").end()
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert "connected already" in details
    assert len(served.nodes(1)) == 1


@pytest.mark.parametrize("secret", ["wrong", "", "s\u00e9cret", "\ud800", 5])
@pytest.mark.parametrize("connected", [True, False])
def test_an_identity_with_a_wrong_secret_is_refused(served, raw, secret, connected):
    owner = raw().joined("one")
    if not connected:
        owner.vanish()
    code, details = raw().hello("one", secret=secret).end()
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "Another device" in details


# Clients that go, and clients that come back.


def test_a_vanished_clients_instruction_is_answered_by_lost(monkeypatch, served, raw):
    monkeypatch.setattr(link_server, "RECONNECT_GRACE_S", 0.2)
    gone = raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    assert gone.instruction() == ("k", b"x")
    gone.vanish()
    reply = served.take("k")["k"]
    assert isinstance(reply, Lost) and "vanished" in reply.reason
    until(lambda: served.parted == [node], LONG)
    assert served.link.node_ids() == []


def test_a_stream_half_closed_without_leave_counts_as_vanished(monkeypatch, served, raw):
    monkeypatch.setattr(link_server, "RECONNECT_GRACE_S", 0.2)
    half = raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    half.instruction()
    half._outbox.put(None)
    assert isinstance(served.take("k")["k"], Lost)


def test_sending_to_who_is_not_there_gives_lost_at_once(served):
    assert isinstance(served.ask(77, "k", b"x"), Lost)


def test_take_gives_up_at_its_deadline(served, raw):
    raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    assert served.link.take(["k"], time.monotonic() + 0.1) == {}
    assert served.link.take(["k"], 0.0) == {}


def test_who_reconnects_in_time_gets_the_pending_instruction_again_and_counts_once(served, raw):
    first = raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"work"])
    assert first.instruction() == ("k", b"work")
    first.vanish()
    until(lambda: not served.link._nodes[node].connected, LONG)
    assert served.link.node_ids() == [node]
    served.link.send(node, "later", [b"more"])
    second = raw().joined()
    assert second.instruction() == ("k", b"work")
    assert second.instruction() == ("later", b"more")
    second.answer("k", b"first").answer("k", b"second").answer("later", b"done")
    assert served.take("later") == {"later": b"done"}
    assert served.take("k") == {"k": b"first"}
    assert served.take("k", wait=0.05) == {}
    assert served.parted == []


def test_an_answered_instruction_is_not_sent_again(served, raw):
    first = raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "old", [b"x"])
    first.instruction()
    first.answer("old", b"y")
    served.take("old")
    first.vanish()
    until(lambda: not served.link._nodes[node].connected, LONG)
    second = raw().joined()
    served.link.send(node, "new", [b"z"])
    assert second.instruction() == ("new", b"z")


def test_who_comes_back_after_the_grace_is_the_same_node(monkeypatch, served, raw):
    monkeypatch.setattr(link_server, "RECONNECT_GRACE_S", 0.1)
    raw().joined().vanish()
    until(lambda: served.parted, LONG)
    (node,) = served.parted
    again = raw().joined()
    assert served.nodes(1) == [node]
    served.link.send(node, "k", [b"x"])
    assert again.instruction() == ("k", b"x")


def test_an_old_grace_does_not_end_a_new_session(monkeypatch, served, raw):
    monkeypatch.setattr(link_server, "RECONNECT_GRACE_S", 0.4)
    raw().joined().vanish()
    (node,) = until(served.link.node_ids, LONG)
    until(lambda: not served.link._nodes[node].connected, LONG)
    again = raw().joined()
    time.sleep(0.6)
    assert served.parted == []
    served.link.send(node, "k", [b"x"])
    assert again.instruction() == ("k", b"x")


def test_leave_answers_what_is_pending_at_once(served, raw):
    leaving = raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    leaving.instruction()
    leaving.send(frame(Kind.LEAVE))
    reply = served.take("k")["k"]
    assert isinstance(reply, Lost) and "left" in reply.reason
    assert served.parted == [node]
    assert leaving.end()[0] is grpc.StatusCode.OK
    assert served.link.node_ids() == []


def test_a_reply_sent_before_leave_counts(served, raw):
    leaving = raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    leaving.instruction()
    leaving.answer("k", b"done").send(frame(Kind.LEAVE))
    assert served.take("k") == {"k": b"done"}


def test_a_late_reply_to_a_withdrawn_instruction_is_dropped(served, raw):
    slow = raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "late", [b"x"])
    slow.instruction()
    served.link.withdraw(["late"])
    served.link.send(node, "next", [b"y"])
    slow.instruction()
    slow.answer("late", b"too late").answer("next", b"in time")
    assert served.take("next") == {"next": b"in time"}
    assert served.take("late", wait=0.05) == {}


def test_a_withdrawn_instruction_is_not_sent_to_who_reconnects(served, raw):
    first = raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "old", [b"x"])
    first.instruction()
    first.vanish()
    until(lambda: not served.link._nodes[node].connected, LONG)
    served.link.withdraw(["old"])
    second = raw().joined()
    served.link.send(node, "new", [b"y"])
    assert second.instruction() == ("new", b"y")


def test_a_reply_that_came_before_the_withdrawal_is_forgotten(served, raw):
    quick = raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    served.link.send(node, "next", [b"x"])
    quick.answer("k", b"y").answer("next", b"z")
    served.take("next")
    served.link.withdraw(["k"])
    assert served.take("k", wait=0.05) == {}


def test_a_reply_to_somebody_elses_instruction_is_not_counted(served, raw):
    honest, thief = raw().joined("honest"), raw().joined("thief")
    one, other = served.nodes(2)
    served.link.send(one, "k", [b"x"])
    served.link.send(other, "own", [b"x"])
    thief.answer("k", b"forged").answer("own", b"mine").answer("never asked", b"?")
    assert served.take("own") == {"own": b"mine"}
    assert served.take("k", "never asked", wait=0.05) == {}
    honest.answer("k", b"true")
    assert served.take("k") == {"k": b"true"}


# How sessions end.


def test_dismiss_ends_the_session_with_its_sentence(served):
    done = start(client(served.address))
    (node,) = served.nodes(1)
    served.link.dismiss(node, "Its public set differs.")
    with pytest.raises(FedkitError, match="Its public set differs"):
        done.result(LONG)
    until(lambda: not served.link.node_ids(), LONG)
    assert still_serves(served)


def test_what_a_dismissed_client_had_to_do_is_lost(served, raw):
    raw().joined()
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    served.link.dismiss(node, "Go.")
    assert isinstance(served.take("k")["k"], Lost)
    assert isinstance(served.ask(node, "later", b"x"), Lost)


def test_dismissing_who_was_never_there_does_nothing(served):
    served.link.dismiss(77, "Go.")
    assert still_serves(served)


def test_a_dismissed_client_has_parted(served, raw):
    """It is gone for good: its shard must not stay taken."""
    dismissed = raw().joined()
    (node,) = served.nodes(1)
    served.link.dismiss(node, "Go.")
    assert dismissed.end() == (grpc.StatusCode.FAILED_PRECONDITION, "Go.")
    until(lambda: not served.link.node_ids(), LONG)
    until(lambda: served.parted == [node], 3)


def test_a_dismissed_client_that_is_started_again_is_asked_again(served, raw):
    """Somebody mended it meanwhile; the roster asks it anew, the link must let it in."""
    dismissed = raw().joined()
    (node,) = served.nodes(1)
    served.link.dismiss(node, "Go.")
    dismissed.end()
    until(lambda: not served.link.node_ids(), LONG)
    again = raw().joined()
    assert served.nodes(1) == [node]
    served.link.send(node, "k", [b"x"])
    assert again.instruction() == ("k", b"x")


def test_close_says_goodbye_and_run_returns_it():
    served = Served()
    done = [start(client(served.address, name)) for name in "abc"]
    served.nodes(3)
    served.link.close("The run is over: all rounds are done.")
    assert [one.result(LONG) for one in done] == ["The run is over: all rounds are done."] * 3


def test_the_goodbye_comes_through_when_instructions_are_queued():
    served = Served()
    done = start(client(served.address))
    (node,) = served.nodes(1)
    for key in "abc":
        served.link.send(node, key, [bytes(3 << 20)])
    served.link.close("bye")
    assert done.result(LONG) == "bye"


def test_a_goodbye_of_a_server_that_failed_is_an_error_at_the_client():
    served = Served()
    done = start(client(served.address))
    served.nodes(1)
    served.link.close("The server ended: the disk is full.", ok=False)
    with pytest.raises(FedkitError, match="The server ended: the disk is full"):
        done.result(LONG)


def test_a_goodbye_reaches_a_client_that_is_still_at_work():
    served = Served()
    began, go_on = threading.Event(), threading.Event()

    def work(key: str, data: bytearray) -> Answer:
        began.set()
        assert go_on.wait(LONG)
        return Answer([b"too late"])

    done = start(client(served.address), work)
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    assert began.wait(LONG)
    served.link.close("bye")
    go_on.set()
    assert done.result(LONG) == "bye"


def test_close_does_not_wait_for_clients_that_are_gone(raw, served):
    other = Served()
    lost = Raw(other.address).joined()
    lost.vanish()
    background(lambda: other.link.close("bye")).result(LONG)


def test_nobody_is_served_after_close():
    served = Served()
    served.link.close("bye")
    with pytest.raises(FedkitError, match="No fedkit server answers"):
        run(client(served.address, max_wait=0.1))


def test_work_that_fails_for_good_sends_its_reply_and_leaves(monkeypatch, served):
    monkeypatch.setattr(link_server, "RECONNECT_GRACE_S", 1000.0)
    fatal = FedkitError("The client's own code failed.")
    done = start(client(served.address), lambda key, data: Answer([b"sorry"], fatal))
    (node,) = served.nodes(1)
    assert served.ask(node, "k", b"x") == b"sorry"
    with pytest.raises(FedkitError, match="own code failed"):
        done.result(LONG)
    until(lambda: served.parted == [node], LONG)


def test_a_client_that_cannot_take_its_welcome_leaves(monkeypatch, served):
    monkeypatch.setattr(link_server, "RECONNECT_GRACE_S", 1000.0)

    def on_welcome(welcome: dict[str, Any]) -> None:
        raise FedkitError("Another federation.")

    hello = {"identity": "a", "secret": "s"}
    one = LinkClient(served.address, hello, max_wait=5, on_welcome=on_welcome)
    with pytest.raises(FedkitError, match="Another federation"):
        run(one)
    until(lambda: len(served.parted) == 1, LONG)


# The client's side of a link that breaks, or was never there.


class Proxy:
    """A TCP relay whose connections can be cut, as a network does it."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._near: list[socket.socket] = []
        self._far: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._near.append(near)
                self._far.append(far)
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._relay, args=(one, other), daemon=True).start()

    @staticmethod
    def _relay(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)

    def cut(self, *, server_notices: bool = True) -> None:
        """End all connections; without a word to the server, as when a device changes networks."""
        broken, self._near = self._near, []
        if server_notices:
            broken, self._far = [*broken, *self._far], []
        for one in broken:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def close(self) -> None:
        self._listener.close()
        self.cut()


@contextmanager
def proxied(served: Served) -> Iterator[Proxy]:
    proxy = Proxy(served.address)
    try:
        yield proxy
    finally:
        proxy.close()


def test_a_client_connects_again_when_the_link_breaks(served):
    with proxied(served) as proxy:
        start(client(proxy.address))
        (node,) = served.nodes(1)
        for number in range(3):
            assert served.ask(node, f"before {number}", b"x") == b"x"
            proxy.cut()
            assert served.ask(node, f"after {number}", b"y") == b"y"
        assert served.link.node_ids() == [node]
        assert served.parted == []


def test_a_client_whose_break_the_server_has_not_noticed_is_let_in_again(served):
    """Its own process it is that comes back: not two that use one state directory."""
    with proxied(served) as proxy:
        done = start(client(proxy.address))
        (node,) = served.nodes(1)
        assert served.ask(node, "before", b"x") == b"x"
        proxy.cut(server_notices=False)
        served.link.send(node, "after", [b"y"])
        assert served.take("after", wait=5) == {"after": b"y"}, done.exception(0)


def test_a_link_that_breaks_while_the_client_works_costs_nothing(served):
    began, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def work(key: str, data: bytearray) -> Answer:
        began.set()
        assert go_on.wait(LONG)
        done.append(key)
        return Answer([data.upper()])

    with proxied(served) as proxy:
        start(client(proxy.address), work)
        (node,) = served.nodes(1)
        served.link.send(node, "k", [b"x"])
        assert began.wait(LONG)
        proxy.cut()
        until(lambda: not served.link._nodes[node].connected, LONG)
        go_on.set()
        assert served.take("k") == {"k": b"X"}
        assert served.parted == []


def test_a_broken_link_is_mended_while_the_client_works(monkeypatch, served):
    """However long the work takes: the server must not take the client for dead meanwhile."""
    monkeypatch.setattr(link_server, "RECONNECT_GRACE_S", 2.0)
    began, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def work(key: str, data: bytearray) -> Answer:
        began.set()
        assert go_on.wait(LONG)
        done.append(key)
        return Answer([data.upper()])

    with proxied(served) as proxy:
        start(client(proxy.address), work)
        (node,) = served.nodes(1)
        served.link.send(node, "k", [b"x"])
        assert began.wait(LONG)
        for _ in range(2):
            proxy.cut()
            until(lambda: not served.link._nodes[node].connected, LONG)
            until(lambda: served.link._nodes[node].connected, LONG)
        go_on.set()
        assert served.take("k") == {"k": b"X"}
        assert done == ["k"]
        assert served.parted == []


def test_an_instruction_that_comes_again_is_answered_without_doing_it_again(served):
    done: list[str] = []

    def work(key: str, data: bytearray) -> Answer:
        done.append(key)
        proxy.cut()  # before the answer can be sent
        until(lambda: not served.link._nodes[node].connected, LONG)
        return Answer([data.upper()])

    with proxied(served) as proxy:
        start(client(proxy.address), work)
        (node,) = served.nodes(1)
        served.link.send(node, "k", [b"x"])
        assert served.take("k") == {"k": b"X"}
        assert done == ["k"]


def test_a_message_that_breaks_off_half_way_comes_whole_after_all(served):
    data = bytes(range(256)) * (20 << 12)
    with proxied(served) as proxy:
        start(client(proxy.address))
        (node,) = served.nodes(1)
        for key in ("a", "b", "c"):
            served.link.send(node, key, [data])
            time.sleep(0.02)
            proxy.cut()
            assert served.take(key) == {key: data}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("max_wait", [0, 0.5])
def test_an_unreachable_server_is_a_sentence_after_max_wait(max_wait):
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(FedkitError, match="No fedkit server answers") as caught:
        run(client(address, max_wait=max_wait))
    assert address in str(caught.value) and "--server" in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_server_that_comes_up_in_time_is_found():
    port = free_port()
    done = start(client(f"127.0.0.1:{port}", max_wait=20))
    time.sleep(0.3)
    link = LinkServer(lambda hello, node_id: {}, lambda node_id: None)
    link.listen(f"127.0.0.1:{port}")
    until(link.node_ids, LONG)
    link.close("bye")
    assert done.result(LONG) == "bye"


@contextmanager
def listener(answer: bytes) -> Iterator[str]:
    """A program that is no gRPC server: it says ``answer`` and hangs up."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
                with connection:
                    if answer:
                        connection.recv(1000)
                        connection.sendall(answer)
                        connection.shutdown(socket.SHUT_WR)
                        while connection.recv(1000):
                            continue
            except OSError:
                if listening.fileno() < 0:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n"],
    ids=["http", "ssh"],
)
def test_a_program_that_is_no_grpc_server_is_told_apart(answer):
    with (
        listener(answer) as address,
        pytest.raises(FedkitError, match="does not speak gRPC") as caught,
    ):
        run(client(address, max_wait=0.3))
    assert address in str(caught.value)


def test_a_program_that_hangs_up_at_once_is_a_sentence():
    with listener(b"") as address, pytest.raises(FedkitError, match="--server") as caught:
        run(client(address, max_wait=0.3))
    assert address in str(caught.value)


def test_a_grpc_server_of_another_kind_is_told_apart_at_once():
    with ThreadPoolExecutor(1) as pool:
        other = grpc.server(pool)
        port = other.add_insecure_port("127.0.0.1:0")
        other.start()
        try:
            with pytest.raises(FedkitError, match="is no fedkit server"):
                run(client(f"127.0.0.1:{port}", max_wait=1000))
        finally:
            other.stop(None)


@pytest.mark.parametrize(
    "answer",
    [
        [b"\xff" * 20],
        [frame(Kind.HELLO, {"identity": "a"})],
        [frame(Kind.CHUNK, body=b"x")],
        [next(message_frames("k", [b"abc"])), frame(Kind.CHUNK, body=b"abd")],
    ],
    ids=["noise", "hello", "chunk", "checksum"],
)
def test_a_server_that_answers_nonsense_ends_the_client(answer):
    def session(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        yield from answer
        for _ in requests:
            continue

    _, service, method = METHOD.split("/")
    handler: Any = grpc.stream_stream_rpc_method_handler(session)
    with ThreadPoolExecutor(2) as pool:
        other = grpc.server(pool)
        other.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: handler}),)
        )
        port = other.add_insecure_port("127.0.0.1:0")
        other.start()
        try:
            with pytest.raises(FedkitError, match="answered nonsense"):
                run(client(f"127.0.0.1:{port}", max_wait=1000))
        finally:
            other.stop(None)
