"""`fedkit doctor` against real servers: what it finds, and what the server lets it do."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from processes import free_port, until
from typer.testing import CliRunner

from fedkit import __version__
from fedkit.cli import doctor as command
from fedkit.data.splits import cut
from fedkit.engine import examine
from fedkit.link import doctor
from fedkit.link.doctor import DOCTOR_METHOD, Visit, doctor_handler
from fedkit.link.frames import CHUNK_BYTES, PROTOCOL, FrameError, Kind, frame, parse
from fedkit.link.node import Refusal
from fedkit.link.reach import FAIL, OK, WARNING, Finding, find_tls
from fedkit.link.server import LinkServer
from fedkit.security.certs import make_authority, make_request, sign
from fedkit.security.credentials import server_credentials
from fedkit.security.settings import ServerSecurity
from fedkit.settings import DataSettings, FederationSettings, as_config

SETTINGS = FederationSettings(public="digits:400", num_shards=4)
TOKEN = "fk_0123abcd_" + 48 * "e"


class NeedsToken:
    """Lets in who shows TOKEN; the same door as the link's."""

    def __call__(self, hello: dict[str, Any], certificate: str | None) -> str | None:
        if hello.get("token") != TOKEN:
            raise Refusal(grpc.StatusCode.UNAUTHENTICATED, "This server asks for a join token.")
        return "0123abcd"

    def allows(self, peer: str) -> bool:
        return True

    def revoked(self, token: str) -> bool:
        return False


@pytest.fixture(scope="module")
def digest() -> str:
    return cut(SETTINGS, DataSettings()).public_digest


@contextmanager
def serving(
    report: Callable[[dict[str, Any]], dict[str, Any]] = lambda hello: {},
    guard: Any = None,
    security: ServerSecurity | None = None,
) -> Iterator[str]:
    link = LinkServer(
        lambda hello, node: {},
        lambda node: None,
        credentials=server_credentials(security) if security else None,
        services=[doctor_handler(report, guard)],
    )
    address = link.listen("127.0.0.1:0")
    try:
        yield address
    finally:
        link.close("The test is over.")


@contextmanager
def visiting(address: str) -> Iterator[Visit]:
    with grpc.insecure_channel(address) as channel:
        visit = Visit(channel)
        try:
            yield visit
        finally:
            visit.close()


def send(address: str, *frames: bytes) -> list[bytes]:
    """Send frames as they are; gives the answers, or raises with the server's status."""
    with grpc.insecure_channel(address) as channel:
        method: Any = channel.stream_stream(DOCTOR_METHOD)
        return list(method(iter(frames), timeout=30.0))


def examined(*arguments: str, folder: Path) -> tuple[int, dict[str, Finding]]:
    """Run the command; gives its exit code and its findings by name."""
    app = typer.Typer()
    command.register(app)
    state = str(folder / "state")
    typed = ["--format", "json", "--device", "cpu", "--state-dir", state, *arguments]
    ran = CliRunner().invoke(app, typed)
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    told = json.loads(ran.stdout)
    assert told["ok"] == (ran.exit_code == 0)
    names = ("check", "status", "text")
    found = {
        line["check"]: Finding(
            *(line[name] for name in names), {k: v for k, v in line.items() if k not in names}
        )
        for line in told["findings"]
    }
    return ran.exit_code, found


HELLO = frame(Kind.HELLO, {"protocol": PROTOCOL, "version": __version__})


# What the server lets a visitor do.


def test_a_visit_is_welcomed_and_measures():
    def report(hello: dict[str, Any]) -> dict[str, Any]:
        return {"federation": "f", "who": hello["name"]}

    with serving(report) as address, visiting(address) as visit:
        welcome = visit.hello({"name": "n"})
        assert welcome == {
            "version": __version__,
            "protocol": PROTOCOL,
            "federation": "f",
            "who": "n",
        }
        round_trip, ahead = visit.pings()
        assert 0 < round_trip < 30
        # One machine has one clock: they differ by no more than a ping may be lopsided.
        assert abs(ahead) < round_trip + 1
        assert visit.bandwidth(up=True) > 0
        assert visit.bandwidth(up=False) > 0


def test_a_chunk_is_echoed_or_answered_by_as_many_bytes_as_it_asks_for():
    ask = frame(Kind.CHUNK, {"back": CHUNK_BYTES})
    with serving() as address:
        answers = send(address, HELLO, frame(Kind.CHUNK, None, b"abc"), ask, frame(Kind.LEAVE))
    bodies = [parse(answer)[2] for answer in answers]
    assert bytes(bodies[1]) == b"abc"
    assert len(bodies[2]) == CHUNK_BYTES


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([], "ended before a greeting"),
        ([b"\x00nonsense"], "no fedkit frame"),
        ([frame(Kind.CHUNK)], "begins with a greeting"),
        ([HELLO, frame(Kind.BYE)], "no BYE belongs"),
        ([HELLO, frame(Kind.CHUNK, {"back": -1})], "asks for -1"),
        ([HELLO, frame(Kind.CHUNK, {"back": True})], "asks for True"),
        ([HELLO, frame(Kind.CHUNK, {"back": CHUNK_BYTES + 1})], "asks for"),
        ([HELLO, frame(Kind.CHUNK, {"back": "1\r\n\ud800"})], "asks for"),
    ],
)
def test_nonsense_gets_a_sentence_and_the_server_stays(frames, words):
    with serving() as address:
        with pytest.raises(grpc.RpcError, match=words) as caught:
            send(address, *frames)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert len(send(address, HELLO)) == 1


def test_a_visit_carries_no_more_than_its_share(monkeypatch):
    monkeypatch.setattr(doctor, "MOST_BYTES", 3 * CHUNK_BYTES)
    ask = frame(Kind.CHUNK, {"back": CHUNK_BYTES})
    with serving() as address:
        assert len(send(address, HELLO, ask, ask)) == 3
        with pytest.raises(grpc.RpcError) as caught:
            send(address, HELLO, ask, ask, ask)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_only_so_many_visits_at_once(monkeypatch):
    monkeypatch.setattr(doctor, "MOST_CALLS", 1)
    with serving() as address:
        with visiting(address) as visit:
            visit.hello({})
            with pytest.raises(grpc.RpcError) as caught:
                send(address, HELLO)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert visit.pings()

        def is_welcome() -> bool:
            try:
                return len(send(address, HELLO)) == 1
            except grpc.RpcError:
                return False

        # One that has ended makes room.
        assert until(is_welcome, 30.0)


def test_a_visit_may_not_last(monkeypatch):
    monkeypatch.setattr(doctor, "CALL_S", 0.2)
    with serving() as address, grpc.insecure_channel(address) as channel:
        method: Any = channel.stream_stream(DOCTOR_METHOD)
        held = threading.Event()

        def frames() -> Iterator[bytes]:
            yield HELLO
            held.wait(30)

        with pytest.raises(grpc.RpcError, match="may take") as caught:
            list(method(frames(), timeout=30.0))
        held.set()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_server_that_answers_out_of_turn_is_noticed():
    with serving() as address, visiting(address) as visit:
        visit._outbox.put(HELLO)
        with pytest.raises(FrameError, match="WELCOME came instead of CHUNK"):
            visit.pings()


# What the command finds.


def test_all_is_well(tmp_path, digest):
    report = {"run_config": as_config(SETTINGS), "public_digest": digest, "federation": "f"}
    with serving(lambda hello: report) as address:
        code, found = examined("--server", address, folder=tmp_path)
    assert {name for name, one in found.items() if one.status != OK} <= {"memory", "state"}
    assert code == 0
    order = ["name", "port", "tls", "server", "token", "version", "clock", "round trip"]
    assert list(found) == [*order, "bandwidth", "state", "memory", "device", "data"]
    assert "ktpfl on digits, 20 rounds" in found["server"].text
    assert found["bandwidth"].values["up_bytes_per_s"] > 0
    assert found["data"].values["sha256"] == digest
    assert not (tmp_path / "state").exists(), "an examination leaves nothing behind"


def test_as_text_it_is_a_line_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    command.register(app)
    report = {"version": "0.0.1\x1b[31m", "federation": "f"}
    with serving(lambda hello: report) as address:
        ran = CliRunner().invoke(app, ["--server", address, "--device", "cpu"])
    lines = ran.stdout.splitlines()
    assert ran.exit_code == 1
    assert lines[0] == "ok      name       127.0.0.1 is an address"
    failed = [line for line in lines if line.startswith("FAIL")]
    assert len(failed) == 1 and f"fedkit 0.0.1?[31m (protocol {PROTOCOL})" in failed[0]


def test_another_public_set_is_a_failure_and_an_unknown_one_a_warning(tmp_path, digest):
    def report(public_digest: Any) -> dict[str, Any]:
        return {"run_config": as_config(SETTINGS), "public_digest": public_digest}

    for told, status in (("0" * 64, FAIL), (None, WARNING), (17, WARNING)):
        with serving(lambda hello, told=told: report(told)) as address:
            code, found = examined("--server", address, folder=tmp_path)
        assert found["data"].status == status
        assert code == (1 if status == FAIL else 0)


def test_data_that_are_not_here(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDKIT_DATA_ROOT", raising=False)
    config = as_config(FederationSettings(dataset="mnist"))
    found = examine.find_data(config, None, DataSettings())
    assert found.status == FAIL and "--data-root" in found.text
    assert examine.find_data({"rounds": "many"}, None, DataSettings()).status == FAIL


def test_a_token(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDKIT_TOKEN", raising=False)
    with serving(guard=NeedsToken()) as address:
        code, found = examined("--server", address, folder=tmp_path)
        assert code == 1
        assert found["token"].status == FAIL and "asks for a join token" in found["token"].text
        monkeypatch.setenv("FEDKIT_TOKEN", TOKEN)
        code, found = examined("--server", address, folder=tmp_path)
    assert code == 0 and found["token"].status == OK
    assert TOKEN not in str(found)


def test_nobody_there(tmp_path):
    code, found = examined("--server", f"127.0.0.1:{free_port()}", folder=tmp_path)
    assert code == 1
    assert found["port"].status == FAIL and "refuses" in found["port"].text
    # What this device brings is looked at all the same.
    assert {"state", "device"} <= found.keys() and "tls" not in found


def test_a_name_that_nobody_knows(tmp_path, monkeypatch):
    def unknown(*arguments: Any, **named: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    code, found = examined("--server", "fl.invalid:8090", folder=tmp_path)
    assert code == 1
    assert found["name"].status == FAIL and "fl.invalid" in found["name"].text


def test_a_grpc_server_that_is_not_ours(tmp_path):
    link = LinkServer(lambda hello, node: {}, lambda node: None)
    address = link.listen("127.0.0.1:0")
    try:
        code, found = examined("--server", address, folder=tmp_path)
    finally:
        link.close("")
    assert code == 1
    assert "no fedkit server" in found["server"].text


def test_something_that_speaks_no_grpc(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                client.close()

        threading.Thread(target=answer, daemon=True).start()
        code, found = examined("--server", f"127.0.0.1:{port}", folder=tmp_path)
        listener.shutdown(socket.SHUT_RDWR)
    assert code == 1 and found["server"].status == FAIL


def test_a_clock_that_is_wrong_is_a_warning(tmp_path, monkeypatch):
    real = doctor.frame

    def an_hour_ahead(kind: Kind, head: Any = None, body: bytes = b"") -> bytes:
        if head and "time" in head:
            head = {"time": head["time"] + 3600}
        return real(kind, head, body)

    monkeypatch.setattr(doctor, "frame", an_hour_ahead)
    with serving() as address:
        code, found = examined("--server", address, folder=tmp_path)
    assert code == 0
    assert found["clock"].status == WARNING and "behind the server's" in found["clock"].text
    assert 3500 < found["clock"].values["server_ahead_s"] < 3700


def test_a_state_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    found = examine.find_state(tmp_path / "file")
    assert found.status == FAIL and "--state-dir" in found.text


def test_a_device_that_is_not_here():
    assert examine.find_device("cuda:99").status == FAIL
    assert examine.find_device("cpu").status == OK


def test_a_wrong_server_is_a_wrong_word(tmp_path):
    app = typer.Typer()
    command.register(app)
    for typed in ("nowhere", "host:0", "host:99999", ":80"):
        ran = CliRunner().invoke(app, ["--server", typed])
        assert "HOST:PORT" in str(ran.exception)


# TLS.


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_authority(folder / "ours", "ours", ["localhost", "127.0.0.1"])
    make_authority(folder / "short", "short", ["127.0.0.1"], days=7)
    make_authority(folder / "named", "named", ["fl.example.org"])
    request = make_request(folder / "device", "device")
    sign(folder / "ours", request, folder / "device" / "device.pem")
    return folder


def tls(folder: Path, *, mutual: bool = False) -> ServerSecurity:
    return ServerSecurity(
        ssl_certfile=str(folder / "server.pem"),
        ssl_keyfile=str(folder / "server.key"),
        ssl_ca_certfile=str(folder / "ca.pem") if mutual else "",
    )


def test_tls_with_the_right_authority(tmp_path, certificates):
    with serving(security=tls(certificates / "ours")) as address:
        authority = str(certificates / "ours" / "ca.pem")
        code, found = examined(
            "--server", address, "--root-certificates", authority, folder=tmp_path
        )
    assert code == 0, found
    assert found["tls"].status == OK
    assert "CN=ours" in found["tls"].values["issuer"]
    assert found["version"].status == OK


@pytest.mark.parametrize(
    ("server", "authority", "status", "words"),
    [
        ("ours", "named", FAIL, "was not signed by the CA in"),
        ("ours", None, FAIL, "was not signed by a CA that this machine trusts"),
        ("named", "named", FAIL, "not for 127.0.0.1, but for fl.example.org"),
        ("short", "short", WARNING, "days are left"),
    ],
)
def test_what_tls_may_be_wrong_with(certificates, server, authority, status, words):
    trusted = certificates / authority / "ca.pem" if authority else None
    with serving(security=tls(certificates / server)) as address:
        port = int(address.rpartition(":")[2])
        found = find_tls("127.0.0.1", "127.0.0.1", port, authority=trusted)
    assert (found.status, words in found.text) == (status, True), found.text


def test_tls_where_the_server_wants_a_certificate_too(tmp_path, certificates):
    authority = str(certificates / "ours" / "ca.pem")
    with serving(security=tls(certificates / "ours", mutual=True)) as address:
        typed = ("--server", address, "--root-certificates", authority)
        code, found = examined(*typed, folder=tmp_path)
        assert code == 1
        assert found["tls"].status == FAIL and "--ssl-certfile" in found["tls"].text
        own = [certificates / "device" / name for name in ("device.pem", "device.key")]
        typed += ("--ssl-certfile", str(own[0]), "--ssl-keyfile", str(own[1]))
        code, found = examined(*typed, folder=tmp_path)
    assert code == 0, found


def test_plaintext_against_tls_and_the_other_way_round(tmp_path, certificates):
    with serving(security=tls(certificates / "ours", mutual=True)) as address:
        code, found = examined("--server", address, folder=tmp_path)
    assert code == 1 and "speaks TLS" in found["tls"].text
    with serving() as address:
        port = int(address.rpartition(":")[2])
        found_tls = find_tls("127.0.0.1", "127.0.0.1", port, authority=None)
    assert found_tls.status == FAIL and "does not speak TLS" in found_tls.text


def test_certificates_that_are_none(tmp_path):
    (tmp_path / "ca.pem").write_text("nonsense")
    found = find_tls("127.0.0.1", "127.0.0.1", free_port(), authority=tmp_path / "ca.pem")
    assert found.status == FAIL and "can't be used" in found.text


def test_data_of_a_devices_own_are_not_looked_for_at_the_servers_place(monkeypatch):
    monkeypatch.delenv("FEDKIT_DATA_ROOT", raising=False)
    config = {"dataset": "own:cat,dog", "public": "folder:/srv/public:50"}
    found = examine.find_data(config, "ab", DataSettings())
    assert found.status == OK and "brings its own data" in found.text


def test_a_public_set_that_is_not_here_is_a_warning_since_it_is_sent(monkeypatch):
    monkeypatch.delenv("FEDKIT_DATA_ROOT", raising=False)
    found = examine.find_data({"public": "mnist:50"}, "ab", DataSettings())
    assert found.status == WARNING and "the server sends its own" in found.text
    lacking = examine.find_data({"dataset": "mnist"}, "ab", DataSettings())
    assert lacking.status == FAIL and "--data-root" in lacking.text
