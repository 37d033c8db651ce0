"""Who is let in over the link, and under which identity."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from links import LONG, Held, Raw, Served, client, run, serving, start, still_serves
from processes import until

from fedkit.errors import FedkitError, UsageError
from fedkit.link import server as link_server
from fedkit.link.client import LinkClient
from fedkit.link.frames import PROTOCOL, Kind, Parcel, frame, message_frames
from fedkit.link.node import Node, Refusal, hashed
from fedkit.link.server import LinkServer


@pytest.fixture
def probe_wait(monkeypatch):
    """Sets how long the first of two processes has for a sign of life."""
    return lambda seconds: monkeypatch.setattr(link_server, "PROBE_WAIT_S", seconds)


def test_the_welcome_says_what_greet_returned_and_the_node_id(served):
    welcomes: list[dict[str, Any]] = []
    hello = {"identity": "a", "secret": "s", "name": "Zoë", "config": {"shard": 3}}
    start(LinkClient(served.address, hello, max_wait=5, on_welcome=welcomes.append))
    (node,) = served.nodes(1)
    until(lambda: welcomes, LONG)
    assert len(welcomes) == 1
    assert welcomes[0].items() >= {"federation": "f", "for": "Zoë", "node_id": node}.items()
    assert served.greeted[0]["config"] == {"shard": 3}


def test_two_servers_on_one_port_give_a_sentence(served):
    second = LinkServer(lambda hello, node_id: {}, lambda node_id: None)
    try:
        with pytest.raises(FedkitError, match=r"can't listen on .*--listen"):
            second.listen(served.address)
    finally:
        second.close("over")
    assert still_serves(served)


def test_another_protocol_is_refused_by_both_numbers(served):
    code, details = served.raw().hello(protocol=99).end()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert f"protocol {PROTOCOL}" in details and "99" in details and "same version" in details
    assert still_serves(served)


def test_what_greet_refuses_reaches_the_client_with_status_and_sentence(served):
    served.refusal = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "This federation is füll.")
    assert served.raw().hello().end() == (served.refusal.status, "This federation is füll.")
    with pytest.raises(FedkitError, match="This federation is füll") as caught:
        run(client(served.address))
    assert caught.value.exit_code == 1
    assert served.link.node_ids() == []
    assert served.link.outcomes["refused"] == 2


def test_a_refused_argument_is_a_usage_error_at_the_client(served):
    served.refusal = Refusal(grpc.StatusCode.INVALID_ARGUMENT, "There is no shard 7.")
    with pytest.raises(UsageError, match="There is no shard 7"):
        run(client(served.address))


@pytest.mark.parametrize("sentence", ["x" * 200_000, "odd \ud800 text"], ids=["long", "surrogate"])
def test_a_refusal_that_quotes_nonsense_still_reaches_the_client(served, sentence):
    served.refusal = Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"You say {sentence}.")
    code, details = served.raw().hello().end()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("You say")


@pytest.mark.parametrize("secret", ["wrong", "", "s\u00e9cret"])
@pytest.mark.parametrize("connected", [True, False])
def test_an_identity_with_a_wrong_secret_is_refused(served, secret, connected):
    owner = served.raw().joined("one")
    if not connected:
        owner.vanish()
    code, details = served.raw().hello("one", secret=secret).end()
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "Another device" in details
    if connected:
        # Not even asked whether it lives: a stranger costs the owner nothing.
        served.link.send(served.nodes(1)[0], "k", [b"x"])
        assert owner.instruction() == ("k", [b"x"])


@pytest.mark.parametrize("word", ["identity", "secret", "session", "name"])
@pytest.mark.parametrize("value", ["\ud800", "two\nlines", "x" * 10_000, 5, ["a"], None], ids=repr)
def test_a_greeting_in_other_than_plain_words_is_refused(served, word, value):
    """They end up in logs, files and comparisons of secrets."""
    code, details = served.raw().hello(**{"identity": "raw", word: value}).end()
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "plain words" in details
    assert served.link.nodes() == []


# Two processes under one identity.


def test_the_same_process_that_comes_back_takes_over_at_once(served, probe_wait):
    probe_wait(LONG * 10)
    first = served.raw().joined("one", session="p1")
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    assert first.instruction() == ("k", [b"x"])
    second = served.raw().joined("one", session="p1")
    assert second.instruction() == ("k", [b"x"])
    second.answer("k", b"y")
    assert served.take("k") == {"k": [b"y"]}
    with pytest.raises(grpc.RpcError):
        first.receive()  # it was asked nothing, and knows that it is over
    assert first.end()[0] is not grpc.StatusCode.OK
    assert served.nodes(1) == [node] and served.parted == []


@pytest.mark.parametrize("sessions", [("p1", "p2"), ("", ""), ("p1", ""), ("", "p2")], ids=str)
def test_another_process_is_refused_while_the_first_answers(served, probe_wait, sessions):
    probe_wait(LONG)
    first = served.raw().joined("one", session=sessions[0])
    second = served.raw().hello("one", session=sessions[1])
    assert first.told() == (Kind.PROBE, {})
    first.send(frame(Kind.HERE))
    code, details = second.end()
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert "connected already" in details and "state directory" in details
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    assert first.instruction() == ("k", [b"x"])


def test_a_client_at_work_answers_for_itself(served, probe_wait):
    """However long it trains: that it lives is answered by another thread."""
    probe_wait(LONG)
    work = Held()
    start(client(served.address), work)
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    assert work.began.wait(LONG)
    with pytest.raises(FedkitError, match="connected already"):
        run(client(served.address))
    work.may_end.set()
    assert served.take("k") == {"k": [b"X"]}


def test_a_half_open_session_bars_nobody(served, probe_wait):
    """The device was switched off and on: its old connection has not noticed."""
    probe_wait(0.2)
    first = served.raw().joined("one", session="before")
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    assert first.instruction() == ("k", [b"x"])
    second = served.raw().joined("one", session="after")
    assert second.instruction() == ("k", [b"x"])
    second.answer("k", b"y")
    assert served.take("k") == {"k": [b"y"]}
    assert served.nodes(1) == [node] and served.parted == []


def test_what_comes_of_a_session_that_was_taken_over_counts_no_more(served, probe_wait):
    probe_wait(0.2)
    first = served.raw().joined("one", session="before")
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    second = served.raw().joined("one", session="after")
    first.answer("k", b"old")
    assert second.instruction() == ("k", [b"x"])
    code, details = first.end()
    assert code is not grpc.StatusCode.OK and details
    second.answer("k", b"new")
    assert served.take("k") == {"k": [b"new"]}


def uploading(served: Served, identity: str) -> tuple[Raw, list[bytes]]:
    """A client that has sent the first of several frames of a reply, and those that are left."""
    first = served.raw().joined(identity, session="before")
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    first.instruction()
    begin, *rest = message_frames("k", Parcel.of([bytes(3 << 20)]))
    first.send(begin)
    session = served.link.nodes()[0].session
    # Else the frame under way is an answer to the question whether it lives.
    until(lambda: session._carried >= len(begin), LONG)
    return first, rest


def test_another_process_is_refused_while_the_first_sends_a_large_message(served, probe_wait):
    """Its answer to the question waits behind the message; that the message goes on is one."""
    probe_wait(LONG)
    first, rest = uploading(served, "one")
    second = served.raw().hello("one", session="after")
    assert first.told() == (Kind.PROBE, {})
    first.send(rest[0])
    assert second.end()[0] is grpc.StatusCode.ALREADY_EXISTS
    first.send(*rest[1:])
    assert served.take("k") == {"k": [bytes(3 << 20)]}


def test_a_session_that_broke_off_within_a_message_bars_nobody(served, probe_wait):
    probe_wait(0.2)
    uploading(served, "one")
    second = served.raw().joined("one", session="after")
    assert second.instruction() == ("k", [b"x"])
    second.answer("k", bytes(3 << 20))
    assert served.take("k") == {"k": [bytes(3 << 20)]}


# The devices of a federation that goes on.

KNOWN = [Node(7, "one", hashed("s"), "client one"), Node(4, "two", hashed("t"), "client two")]


def restored() -> list[Node]:
    return [Node(n.node_id, n.identity, n.secret, n.name, n.certificate) for n in KNOWN]


@pytest.fixture
def resumed():
    one = Served(nodes=restored())
    yield one
    one.close()


def test_a_returning_device_has_its_old_node_id(resumed):
    assert resumed.link.node_ids() == []
    back = resumed.raw().joined("one")
    assert back.welcome["node_id"] == 7
    assert resumed.nodes(1) == [7]
    resumed.link.send(7, "k", [b"x"])
    assert back.instruction() == ("k", [b"x"])


def test_a_new_device_has_a_node_id_of_its_own(resumed):
    assert resumed.raw().joined("three").welcome["node_id"] == 8
    assert resumed.raw().joined("two", secret="t").welcome["node_id"] == 4
    assert sorted(resumed.nodes(2)) == [4, 8]


def test_a_wrong_secret_is_refused_before_anybody_came_back(resumed):
    code, details = resumed.raw().hello("one", secret="t").end()
    assert code is grpc.StatusCode.PERMISSION_DENIED and "Another device" in details
    assert resumed.raw().joined("one").welcome["node_id"] == 7


def test_who_has_not_come_back_is_lost_at_once(resumed):
    resumed.link.send(7, "k", [b"x"])
    assert "not connected" in resumed.lost("k")


@pytest.mark.parametrize(
    ("bound", "shown", "refused"),
    [
        (None, None, False),
        (None, "device-1", False),
        ("device-1", "device-1", False),
        ("device-1", "device-2", True),
        ("device-1", None, True),
    ],
)
def test_an_identity_belongs_to_the_certificate_it_came_with(bound, shown, refused):
    node = Node(2, "one", hashed("s"), "client one", certificate=bound)
    if not refused:
        return node.check_owner("s", shown)
    with pytest.raises(Refusal, match="'device-1'") as caught:
        node.check_owner("s", shown)
    assert caught.value.status is grpc.StatusCode.PERMISSION_DENIED


# The guard at the door.


class FakeGuard:
    """Lets in who shows a token that is not revoked."""

    def __init__(self) -> None:
        self.taken_back: set[str] = set()
        self.closed_to: set[str] = set()
        self.seen: list[tuple[str, str | None]] = []

    def __call__(self, hello: dict[str, Any], certificate: str | None) -> str | None:
        self.seen.append((hello["identity"], certificate))
        if hello.get("token") != "good":
            raise Refusal(grpc.StatusCode.UNAUTHENTICATED, "This server asks for a join token.")
        return "id of good"

    def allows(self, peer: str) -> bool:
        return peer not in self.closed_to

    def revoked(self, token: str) -> bool:
        return token in self.taken_back


@pytest.fixture
def guarded(monkeypatch):
    monkeypatch.setattr(link_server, "LOOK_AROUND_S", 0.05)
    guard = FakeGuard()
    one = Served(guard=guard)
    yield one, guard
    one.close()


def test_without_a_token_nobody_is_let_in(guarded):
    served, guard = guarded
    code, details = served.raw().hello("one").end()
    assert (code, details) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "This server asks for a join token.",
    )
    with pytest.raises(FedkitError, match="asks for a join token"):
        run(client(served.address, token="bad"))
    assert guard.seen == [("one", None), ("a", None)]
    assert served.greeted == [] and served.link.nodes() == []


def test_a_token_is_asked_for_again_at_each_connection(guarded):
    served, _ = guarded
    first = served.raw().joined("one", token="good")
    first.vanish()
    assert served.raw().hello("one").end()[0] is grpc.StatusCode.UNAUTHENTICATED
    served.raw().joined("one", token="good")
    assert [node.token for node in served.link.nodes()] == ["id of good"]


def test_a_revoked_token_ends_the_session(guarded):
    served, guard = guarded
    one = served.raw().joined("one", token="good")
    (node,) = served.nodes(1)
    served.link.send(node, "k", [b"x"])
    assert one.instruction() == ("k", [b"x"])
    guard.taken_back.add("id of good")
    code, details = one.end()
    assert code is grpc.StatusCode.FAILED_PRECONDITION and "token was revoked" in details
    assert "sent away" in served.lost("k")
    until(lambda: served.parted == [node], LONG)


def test_an_address_that_knocks_too_often_may_try_again_later(guarded):
    served, guard = guarded
    guard.closed_to.add("ipv4:127.0.0.1")
    code, details = served.raw().hello("one", token="good").end()
    assert code is grpc.StatusCode.ABORTED and "try again" in details
    assert guard.seen == []
    done = start(client(served.address, token="good", max_wait=LONG))
    until(lambda: served.link.outcomes["refused"] >= 2, LONG)
    guard.closed_to.clear()
    served.nodes(1)
    assert not done.done()


@serving(guard=FakeGuard())
def test_a_server_with_a_guard_serves(served):
    start(client(served.address, token="good"))
    (node,) = served.nodes(1)
    assert served.ask(node, "k", b"x") == [b"x"]
