"""The client's side of a link that breaks, that was never there, or that is no link at all."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from links import LONG, Held, client, proxied, run, serving, start
from processes import free_port, until

from fedkit.errors import FedkitError
from fedkit.link import client as link_client
from fedkit.link.client import FIRST_PAUSE_S, LONGEST_PAUSE_S, TRIES, Answer, LinkClient, _Broken
from fedkit.link.frames import METHOD, Kind, Parcel, frame, message_frames
from fedkit.link.server import LinkServer

# A link that breaks.


def test_a_client_connects_again_when_the_link_breaks(served):
    with proxied(served) as proxy:
        start(client(proxy.address))
        (node,) = served.nodes(1)
        for number in range(3):
            assert served.ask(node, f"before {number}", b"x") == [b"x"]
            proxy.cut()
            assert served.ask(node, f"after {number}", b"y") == [b"y"]
        assert served.link.node_ids() == [node]
        assert served.parted == []


def test_a_client_whose_break_the_server_has_not_noticed_is_let_in_again(served):
    """Its own process it is that comes back: not two that use one state directory."""
    with proxied(served) as proxy:
        start(client(proxy.address))
        (node,) = served.nodes(1)
        assert served.ask(node, "before", b"x") == [b"x"]
        proxy.cut(server_notices=False)
        served.link.send(node, "after", [b"y"])
        assert served.take("after") == {"after": [b"y"]}


@serving(grace=LONG)
def test_a_broken_link_is_mended_while_the_client_works(served):
    """However long the work takes: the server must not take the client for dead meanwhile."""
    work = Held()
    with proxied(served) as proxy:
        start(client(proxy.address), work)
        (node,) = served.nodes(1)
        served.link.send(node, "k", [b"x"])
        assert work.began.wait(LONG)
        for times in (2, 3):
            proxy.cut()
            until(lambda times=times: len(served.greeted) == times, LONG)
        work.may_end.set()
        assert served.take("k") == {"k": [b"X"]}
        assert work.done == ["k"]
        assert served.parted == []


def test_an_instruction_that_comes_again_is_answered_without_doing_it_again(served):
    done: list[str] = []

    def work(key: str, buffers: list[bytes]) -> Answer:
        done.append(key)
        proxy.cut()  # before the answer can be sent
        until(lambda: len(served.greeted) == 2, LONG)
        return Answer([buffers[0].upper()])

    with proxied(served) as proxy:
        start(client(proxy.address), work)
        (node,) = served.nodes(1)
        served.link.send(node, "k", [b"x"])
        assert served.take("k") == {"k": [b"X"]}
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
            assert served.take(key) == {key: [data]}
        assert served.link.outcomes["answered"] == 3


# A server that is not there (yet, or any more).


@pytest.mark.parametrize("max_wait", [0, 0.5])
def test_an_unreachable_server_is_a_sentence_after_max_wait(max_wait):
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(FedkitError, match="No fedkit server answers") as caught:
        run(client(address, max_wait=max_wait))
    assert address in str(caught.value) and "--server" in str(caught.value)
    assert caught.value.exit_code == 1


def test_nobody_is_served_after_close(served):
    served.close("bye")
    with pytest.raises(FedkitError, match="No fedkit server answers"):
        run(client(served.address, max_wait=0.1))


def test_a_server_that_comes_up_in_time_is_found():
    port = free_port()
    done = start(client(f"127.0.0.1:{port}", max_wait=20))
    time.sleep(0.3)
    link = LinkServer(lambda hello, node_id: {}, lambda node_id: None)
    link.listen(f"127.0.0.1:{port}")
    until(link.node_ids, LONG)
    link.close("bye")
    assert done.result(LONG) == "bye"


class Clock:
    """Time that passes only when somebody waits; stands for ``time`` and for the end of the link."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def wait(self, pause: float) -> bool:
        self.pauses.append(pause)
        self.now += pause
        return False

    def is_set(self) -> bool:
        return False

    def set(self) -> None:
        """Nothing ends early."""


REACHED, REFUSED = _Broken("Connection reset", True), _Broken("TLS handshake failed", False)


@pytest.fixture
def scripted(monkeypatch):
    """Runs a client whose connections end as told; gives the clock and the last word."""

    def play(
        connections: Iterator[_Broken], seed: int = 1, **options: Any
    ) -> tuple[Clock, FedkitError]:
        clock = Clock()
        monkeypatch.setattr(link_client, "time", clock)
        draw = random.Random(seed)
        monkeypatch.setattr(link_client, "random", SimpleNamespace(uniform=draw.uniform))

        def session(self: LinkClient) -> None:
            raise next(connections)

        monkeypatch.setattr(LinkClient, "_session", session)
        hello = {"identity": "a", "secret": "s"}
        one = LinkClient("host:1", hello, on_welcome=lambda welcome: None, **options)
        monkeypatch.setattr(one, "_over", clock)
        with pytest.raises(FedkitError) as caught:
            one.run(lambda key, buffers: Answer([]))
        return clock, caught.value

    return play


def forever(*connections: _Broken) -> Iterator[_Broken]:
    """These, and then the last one again and again."""
    yield from connections
    while True:
        yield connections[-1]


def test_pauses_double_up_to_a_bound_with_jitter(scripted):
    clock, _ = scripted(forever(REFUSED), max_wait=300)
    middle = FIRST_PAUSE_S
    for pause in clock.pauses:
        assert 0.5 * middle <= pause <= 1.5 * middle
        middle = min(2 * middle, LONGEST_PAUSE_S)
    assert middle == LONGEST_PAUSE_S
    relative = {round(pause / LONGEST_PAUSE_S, 3) for pause in clock.pauses[-10:]}
    assert len(relative) > 5  # not all at the same beat


def test_two_clients_do_not_come_back_at_the_same_instants(scripted):
    one, other = (scripted(forever(REFUSED), seed, max_wait=60)[0].pauses for seed in (1, 2))
    assert all(abs(a - b) > 1e-6 for a, b in zip(one, other, strict=False))


def test_after_a_welcome_pauses_begin_anew(scripted):
    clock, _ = scripted(forever(*[REFUSED] * 6, REACHED, REFUSED), max_wait=1e4, patience=60)
    assert clock.pauses[5] > 3 * FIRST_PAUSE_S
    assert clock.pauses[6] <= 1.5 * FIRST_PAUSE_S


def test_who_was_never_in_gives_up_after_max_wait(scripted):
    clock, error = scripted(forever(REFUSED), max_wait=30, patience=600)
    assert 15 < clock.now - 1000 <= 30
    assert "tried for 30 seconds" in str(error)


def test_who_was_in_is_patient(scripted):
    """The server may be restarted, and the client holds a model that exists nowhere else."""
    clock, error = scripted(forever(REACHED, REFUSED), max_wait=30, patience=600)
    assert 580 < clock.now - 1000 <= 600
    assert "tried for 600 seconds" in str(error)


def test_patience_is_counted_from_the_last_time_that_it_was_in(scripted):
    broken = [*[REFUSED] * 3, REACHED, *[REFUSED] * 20, REACHED, REFUSED]
    clock, _ = scripted(forever(*broken), max_wait=30, patience=200)
    assert clock.now - 1000 > 210


def explain(details: str) -> str | None:
    return "The certificate is another server's." if "TLS" in details else None


def test_what_can_be_explained_is_final_after_several_failures(scripted):
    """One failed handshake may be a hiccup; the same again and again is not."""
    clock, error = scripted(forever(REFUSED), max_wait=1e6, explain=explain)
    assert str(error) == "The certificate is another server's."
    assert len(clock.pauses) == TRIES - 1 > 1


def test_what_cannot_be_explained_is_tried_until_the_time_is_up(scripted):
    unknown = _Broken("No route to host", False)
    clock, error = scripted(forever(unknown), max_wait=100, explain=explain)
    assert len(clock.pauses) > TRIES
    assert "No fedkit server answers" in str(error)


def test_an_explanation_ends_nobody_who_has_been_in(scripted):
    """Its certificate was right an hour ago: the server's may be renewed at this moment."""
    clock, error = scripted(forever(REACHED, REFUSED), max_wait=1, patience=300, explain=explain)
    assert clock.now - 1000 > 280
    assert str(error) == "The certificate is another server's."


# What listens is no fedkit server.


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


@contextmanager
def grpc_server(*answer: bytes) -> Iterator[str]:
    """A gRPC server whose method of our name, if it answers at all, answers that."""

    def session(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        yield from answer
        for _ in requests:
            continue

    _, service, method = METHOD.split("/")
    handler: Any = grpc.stream_stream_rpc_method_handler(session)
    with ThreadPoolExecutor(2) as pool:
        other = grpc.server(pool)
        if answer:
            other.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(service, {method: handler}),)
            )
        port = other.add_insecure_port("127.0.0.1:0")
        other.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            other.stop(None)


def test_a_grpc_server_of_another_kind_is_told_apart_at_once():
    with grpc_server() as address, pytest.raises(FedkitError, match="is no fedkit server"):
        run(client(address, max_wait=1000))


@pytest.mark.parametrize(
    "answer",
    [
        [b"\xff" * 20],
        [frame(Kind.HELLO, {"identity": "a"})],
        [frame(Kind.CHUNK, body=b"x")],
        [*list(message_frames("k", Parcel.of([bytes(3 << 20)])))[:2], frame(Kind.CHUNK)],
    ],
    ids=["noise", "hello", "chunk", "empty chunk"],
)
def test_a_server_that_answers_nonsense_ends_the_client(answer):
    with (
        grpc_server(*answer) as address,
        pytest.raises(FedkitError, match="answered nonsense"),
    ):
        run(client(address, max_wait=1000))


def test_what_comes_garbled_is_asked_for_again_and_then_said():
    garbled = frame(Kind.MESSAGE, {"key": "k", "sizes": [3], "sums": [0]}, b"abc")
    with (
        grpc_server(garbled) as address,
        pytest.raises(FedkitError, match="is garbled on the way"),
    ):
        run(client(address, max_wait=1))
