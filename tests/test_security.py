"""TLS for real: who is let in, who is told what, and what a renewal changes."""

from __future__ import annotations

import asyncio
import logging
import queue
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import timedelta

import grpc
import pytest
from processes import Process, fedkit, until

from fedkit.engine.plan import make_plan
from fedkit.errors import FedkitError, UsageError
from fedkit.security import certs, pem
from fedkit.security.credentials import (
    channel_credentials,
    explain_tls,
    peer_name,
    peer_warning,
    server_credentials,
)
from fedkit.security.settings import (
    ClientSecurity,
    ServerSecurity,
    check_client,
    check_server,
    is_loopback,
    uses_tls,
)
from fedkit.security.tokens import new_token, revoke

LONG = 30


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two authorities, each with a server on this machine and a device; one with ended ones, too."""
    home = tmp_path_factory.mktemp("certs")
    for name in ("ours", "theirs"):
        certs.make_authority(home / name, name, ["127.0.0.1"])
        certs.make_request(home / name, "drone-1")
        certs.sign(home / name, home / name / "drone-1.csr", home / name / "drone-1.pem")
    certs.make_request(home / "ours", "elsewhere")
    certs.sign(
        home / "ours",
        home / "ours" / "elsewhere.csr",
        home / "ours" / "elsewhere.pem",
        hosts=["fl.example.org", "127.0.0.2"],
    )
    ended = home / "ended"
    ended.mkdir()
    backdated, certs.BACKDATED = certs.BACKDATED, timedelta(days=9)
    try:
        for name in ("server", "drone-1"):
            shutil.copy(home / "ours" / f"{name}.key", ended)
            certs.renew(
                home / "ours", home / "ours" / f"{name}.pem", ended / f"{name}.pem", days=-2
            )
    finally:
        certs.BACKDATED = backdated
    return home


def server_security(folder, *, authority=None, name="server"):
    return ServerSecurity(
        ssl_ca_certfile=str(authority / "ca.pem") if authority else "",
        ssl_certfile=str(folder / f"{name}.pem"),
        ssl_keyfile=str(folder / f"{name}.key"),
    )


def client_security(authority=None, folder=None, name="drone-1"):
    return ClientSecurity(
        root_certificates=str(authority / "ca.pem") if authority else "",
        ssl_certfile=str(folder / f"{name}.pem") if folder else "",
        ssl_keyfile=str(folder / f"{name}.key") if folder else "",
    )


class Echo:
    """A real gRPC server on a loop of its own, as the link's is."""

    def __init__(self, security):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.context = {}
        self._on_loop(self._start(server_credentials(security)))

    def _on_loop(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(LONG)

    async def _start(self, credentials):
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        handler = grpc.stream_stream_rpc_method_handler(self._echo)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("test.Echo", {"Echo": handler}),)
        )
        self.port = (
            self._server.add_insecure_port("127.0.0.1:0")
            if credentials is None
            else self._server.add_secure_port("127.0.0.1:0", credentials)
        )
        await self._server.start()

    async def _echo(self, requests, context):
        self.context = dict(context.auth_context())
        async for request in requests:
            await context.write(request)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._on_loop(self._server.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LONG)
        self._loop.close()


class Stream:
    """A held stream of a client."""

    def __init__(self, port, security):
        # Not localhost: that may have two addresses, and gRPC tells the last one's error only.
        self.address = f"127.0.0.1:{port}"
        credentials = channel_credentials(self.address, security)
        options = [("grpc.enable_http_proxy", 0)]
        self._channel = (
            grpc.insecure_channel(self.address, options)
            if credentials is None
            else grpc.secure_channel(self.address, credentials, options)
        )
        self._outbox = queue.SimpleQueue()
        self._call = self._channel.stream_stream("/test.Echo/Echo")(
            iter(self._outbox.get, None), timeout=LONG
        )

    def echo(self):
        self._outbox.put(b"x")
        return next(self._call)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._outbox.put(None)
        self._call.cancel()
        self._channel.close()


def explained(port, security):
    """The sentence of a connection that must fail."""
    with Stream(port, security) as stream, pytest.raises(grpc.RpcError) as raised:
        stream.echo()
    sentence = explain_tls(raised.value.details(), stream.address, security)
    assert sentence is not None, raised.value.details()
    assert sentence.endswith(".") and sentence.isprintable()
    return sentence


# On loopback a client without a word speaks plaintext; one that dials elsewhere speaks TLS.
PLAIN = ClientSecurity()


def test_tls_and_mtls_work_and_the_server_knows_the_name(home):
    ours = home / "ours"
    with Echo(server_security(ours)) as server:
        for security in (client_security(ours), client_security(ours, ours)):
            with Stream(server.port, security) as stream:
                assert stream.echo() == b"x"
            assert peer_name(server.context) is None and peer_warning(server.context) is None
    with (
        Echo(server_security(ours, authority=ours)) as server,
        Stream(server.port, client_security(ours, ours)) as stream,
    ):
        assert stream.echo() == b"x"
        assert peer_name(server.context) == "drone-1" and peer_warning(server.context) is None
    with Echo(ServerSecurity()) as server, Stream(server.port, PLAIN) as stream:
        assert stream.echo() == b"x"
        assert peer_name(server.context) is None


def test_each_failure_of_the_servers_certificate_has_its_sentence(home):
    ours, theirs = home / "ours", home / "theirs"
    with Echo(server_security(ours)) as server:
        wrong_authority = explained(server.port, client_security(theirs))
        # A loopback address with a client's certificate only: TLS against everybody's authorities.
        nobody = explained(server.port, client_security(None, ours))
    with Echo(server_security(ours, name="elsewhere")) as server:
        wrong_host = explained(server.port, client_security(ours))
    with Echo(server_security(home / "ended")) as server:
        ended = explained(server.port, client_security(ours))
    with Echo(server_security(ours, name="drone-1")) as server:
        impostor = explained(server.port, client_security(ours))
    assert f"not signed by the authority in {theirs / 'ca.pem'}" in wrong_authority
    assert "does not hold for 127.0.0.1" in wrong_host
    assert "with --root-certificates" in nobody
    assert "has expired" in ended and "clock" in ended
    assert "no server's" in impostor
    assert len({wrong_authority, wrong_host, nobody, ended, impostor}) == 5


def test_each_failure_of_the_clients_certificate_has_its_sentence(home):
    ours, theirs = home / "ours", home / "theirs"
    with Echo(server_security(ours, authority=ours)) as server:
        none = explained(server.port, client_security(ours))
        other = explained(server.port, client_security(ours, theirs))
        ended = explained(server.port, client_security(ours, home / "ended"))
        servers = explained(server.port, client_security(ours, ours, name="server"))
    assert "gave none" in none and "fedkit certs request" in none
    assert "signed by another authority" in other
    assert "ended on" in ended and "fedkit certs renew" in ended
    assert "is no client's certificate" in servers
    assert server.context == {}, "nobody of them may reach the handler"


def test_plaintext_and_tls_against_each_other_have_their_sentences(home):
    with Echo(server_security(home / "ours")) as server:
        plain_to_tls = explained(server.port, PLAIN)
    with Echo(ServerSecurity()) as server:
        tls_to_plain = explained(server.port, client_security(home / "ours"))
    assert "hung up on a client without encryption" in plain_to_tls
    assert "--root-certificates" in plain_to_tls
    assert "does not speak TLS" in tls_to_plain and "--insecure" in tls_to_plain


def test_a_key_that_is_not_the_certificates_is_explained(home):
    security = replace(
        client_security(home / "ours", home / "ours"),
        ssl_keyfile=str(home / "theirs" / "drone-1.key"),
    )
    with Echo(server_security(home / "ours", authority=home / "ours")) as server:
        assert "do not belong together" in explained(server.port, security)


def test_what_has_nothing_to_do_with_tls_is_not_explained():
    refused = "failed to connect to all addresses; last error: Connection refused"
    assert explain_tls(refused, "localhost:1", PLAIN) is None
    assert explain_tls(refused, "fl.example.org:1", ClientSecurity()) is None


@pytest.fixture
def live(home, tmp_path):
    """A copy of our server's files that a test may change."""
    return shutil.copytree(home / "ours", tmp_path / "live")


def test_a_renewed_certificate_is_used_without_a_restart(home, live, caplog):
    trusting = client_security(home / "ours")
    with Echo(server_security(live)) as server:
        with Stream(server.port, trusting) as held:
            assert held.echo() == b"x"
            # As if it had ended, to see the difference from outside; then renewed.
            shutil.copy(home / "ended" / "server.pem", live / "new")
            (live / "new").replace(live / "server.pem")
            assert "has expired" in explained(server.port, trusting)
            assert held.echo() == b"x", "who is connected stays connected"
        certs.renew(live, live / "server.pem", live / "server.pem")
        with Stream(server.port, trusting) as stream:
            assert stream.echo() == b"x"
    assert caplog.text.count("was renewed and is in use") == 2


def test_another_key_and_authority_are_taken_over_too(home, live):
    theirs = home / "theirs"
    with Echo(server_security(live, authority=live)) as server:
        for name in ("server.key", "server.pem", "ca.pem"):
            shutil.copy(theirs / name, live / name)
        with Stream(server.port, client_security(theirs, theirs)) as stream:
            assert stream.echo() == b"x"
        assert "refuses" in explained(server.port, client_security(theirs, home / "ours"))


def halved(live, theirs):
    text = (live / "server.pem").read_bytes()
    (live / "server.pem").write_bytes(text[: len(text) // 2])


def empty(live, theirs):
    (live / "server.key").write_bytes(b"")


def half_a_pair(live, theirs):
    shutil.copy(theirs / "server.pem", live / "server.pem")


def gone(live, theirs):
    (live / "server.pem").unlink()


def no_authority(live, theirs):
    (live / "ca.pem").write_bytes(b"nonsense")


@pytest.mark.parametrize("damage", [halved, empty, half_a_pair, gone, no_authority])
def test_a_renewal_that_failed_leaves_the_old_one_in_force(damage, home, live, caplog):
    ours = home / "ours"
    with Echo(server_security(live, authority=live)) as server:
        damage(live, home / "theirs")
        for _ in range(2):
            with Stream(server.port, client_security(ours, ours)) as stream:
                assert stream.echo() == b"x"
        assert "the old ones stay in force" in caplog.text
        secret = (home / "theirs" / "server.key").read_text().splitlines()[1]
        assert secret not in caplog.text
        caplog.clear()
        # Mended, it is taken up: only their authority's clients come in now.
        for name in ("server.key", "server.pem", "ca.pem"):
            shutil.copy(home / "theirs" / name, live / name)
        theirs = client_security(home / "theirs", home / "theirs")
        with Stream(server.port, theirs) as stream:
            assert stream.echo() == b"x"
        assert "was renewed" in caplog.text


def test_a_client_reads_its_files_anew_at_each_connection(home, tmp_path):
    own = shutil.copytree(home / "ours", tmp_path / "own")
    security = client_security(own, own)
    with Echo(server_security(home / "ours", authority=home / "ours")) as server:
        shutil.copy(home / "ended" / "drone-1.pem", own / "drone-1.pem")
        assert "ended on" in explained(server.port, security)
        certs.renew(own, own / "drone-1.pem", own / "drone-1.pem")
        with Stream(server.port, security) as stream:
            assert stream.echo() == b"x"
    (own / "drone-1.pem").unlink()
    with pytest.raises(FedkitError, match=r"drone-1\.pem can't be read"):
        channel_credentials("localhost:1", security)


def test_both_sides_warn_a_month_before_the_end(home, live, caplog):
    for name in ("server", "drone-1"):
        certs.renew(live, live / f"{name}.pem", live / f"{name}.pem", days=20)
    with Echo(server_security(live, authority=live)) as server:
        assert "server.pem ends in 19 days" in caplog.text
        with Stream(server.port, client_security(live, live)) as stream:
            assert stream.echo() == b"x"
        assert "drone-1.pem ends in 19 days" in peer_warning(server.context)
    assert caplog.text.count("ends in 19 days") == 1, "once a day is enough"


def test_a_server_does_not_start_with_files_that_are_none(home, live):
    (live / "server.key").write_bytes((home / "theirs" / "server.key").read_bytes())
    with pytest.raises(UsageError, match="is not the key of the certificate"):
        server_credentials(server_security(live))
    (live / "server.pem").write_bytes(b"hello")
    with pytest.raises(UsageError, match="no certificate in PEM form"):
        server_credentials(server_security(live))


LOOPBACK = ["127.0.0.1:80", "127.8.9.1:80", "localhost:80", "LOCALHOST:0", "[::1]:80", "::1:80"]
ELSEWHERE = [
    "0.0.0.0:80",
    "[::]:80",
    ":80",
    "10.0.0.1:80",
    "fl.example.org:80",
    "127.0.0.1.example.org:80",
    "localhost.example.org:80",
    "1270.0.0.1:80",
    "dns:///localhost:80",
    "ipv4:127.0.0.1:80,10.0.0.1:80",
    "[::ffff:10.0.0.1]:80",
    "localhost",
    "",
]


@pytest.mark.parametrize("address", LOOPBACK)
def test_loopback_needs_no_word(address, caplog):
    assert is_loopback(address)
    check_server(address, ServerSecurity())
    check_client(address, ClientSecurity())
    assert not uses_tls(address, ClientSecurity())
    assert not caplog.text


@pytest.mark.parametrize("address", ELSEWHERE)
def test_elsewhere_needs_tls_or_a_word_and_warns(address, caplog):
    assert not is_loopback(address)
    with pytest.raises(UsageError, match="fedkit certs init"):
        check_server(address, ServerSecurity())
    assert uses_tls(address, ClientSecurity())
    check_client(address, ClientSecurity())
    assert not caplog.text
    check_server(address, ServerSecurity(insecure=True))
    check_client(address, ClientSecurity(insecure=True))
    assert not uses_tls(address, ClientSecurity(insecure=True))
    assert caplog.text.count("without encryption") == 2


def test_settings_that_contradict_each_other_are_refused(home):
    good = server_security(home / "ours")
    for security, words in (
        (replace(good, insecure=True), "contradict"),
        (replace(good, ssl_keyfile=""), "--ssl-certfile needs --ssl-keyfile"),
        (replace(good, ssl_certfile=""), "--ssl-keyfile needs --ssl-certfile"),
        (ServerSecurity(ssl_ca_certfile=good.ssl_certfile), "which needs TLS"),
        (replace(good, ssl_certfile="nowhere.pem"), r"no file nowhere.pem \(--ssl-certfile\)"),
        (replace(good, tokens="nowhere.json"), r"--tokens"),
    ):
        with pytest.raises(UsageError, match=words):
            check_server("127.0.0.1:0", security)
    good = client_security(home / "ours", home / "ours")
    for security, words in (
        (replace(good, insecure=True), "contradicts"),
        (replace(good, ssl_keyfile=""), "--ssl-certfile needs --ssl-keyfile"),
        (replace(good, root_certificates="nowhere.pem"), "--root-certificates"),
        (replace(good, token_file="nowhere"), "--token-file"),
    ):
        with pytest.raises(UsageError, match=words):
            check_client("127.0.0.1:1", security)
    check_server("0.0.0.0:0", server_security(home / "ours"))


def test_a_secret_that_others_can_read_is_warned_of(home, live, caplog):
    (live / "server.key").chmod(0o644)
    check_server("0.0.0.0:0", server_security(live))
    assert f"chmod 600 {live / 'server.key'}" in caplog.text


def test_a_run_stays_on_loopback_whatever_a_servers_file_says(home):
    good = server_security(home / "ours")
    values = {"ssl-certfile": good.ssl_certfile, "ssl-keyfile": good.ssl_keyfile}
    assert make_plan({**values, "listen": "0.0.0.0:0"}).security == good
    assert make_plan(values, local=True).security == ServerSecurity()
    with pytest.raises(UsageError, match="stays on this machine"):
        make_plan({"listen": "0.0.0.0:0"}, local=True)
    with pytest.raises(UsageError, match="fedkit certs init"):
        make_plan({"listen": "0.0.0.0:0"})


def test_a_plan_holds_paths_and_no_secrets(tmp_path):
    token = new_token(tmp_path / "tokens.json")
    values = make_plan({"tokens": str(tmp_path / "tokens.json")}).values()
    assert values["tokens"] == str(tmp_path / "tokens.json")
    assert token.split("_")[2] not in str(values)


def test_the_command_checks_what_was_typed(tmp_path):
    client = fedkit(
        "client", "--data-shard", "0", "--insecure", "--root-certificates", "x", folder=tmp_path
    )
    assert client.returncode == 2 and "contradicts" in client.stderr


def test_nothing_is_logged_of_keys(home, live, caplog):
    caplog.set_level(logging.DEBUG)
    with Echo(server_security(live, authority=live)) as server:
        certs.renew(live, live / "server.pem", live / "server.pem")
        with Stream(server.port, client_security(live, live)) as stream:
            assert stream.echo() == b"x"
    for key in live.glob("*.key"):
        assert key.read_text().splitlines()[1] not in caplog.text
    assert pem.read_certificate(live / "server.pem")


def test_a_real_server_lets_in_who_has_both_and_sends_away_whom_it_revokes(home, tmp_path):
    ours = home / "ours"
    tokens, shown = tmp_path / "tokens.json", tmp_path / "drone-1.token"
    token = new_token(tokens, "drone-1")
    shown.write_text(token)
    shown.chmod(0o600)
    demands = ("--ssl-ca-certfile", ours / "ca.pem", "--tokens", tokens)
    own = ("--ssl-certfile", ours / "server.pem", "--ssl-keyfile", ours / "server.key")
    quick = ("--strategy", "fd", "--listen", "127.0.0.1:0", "--run-dir", "run")
    with Process(
        "-v", "server", *quick, *map(str, (*demands, *own)), folder=tmp_path, name="server"
    ) as server:
        address = (
            until((tmp_path / "run" / "address").exists)
            and (tmp_path / "run" / "address").read_text()
        )
        trusting = ("--root-certificates", ours / "ca.pem", "--server", address)
        device = ("--ssl-certfile", ours / "drone-1.pem", "--ssl-keyfile", ours / "drone-1.key")
        joining = ("client", "--data-shard", "0", *map(str, (*trusting, *device)))
        without = fedkit(*joining, folder=tmp_path)
        assert without.returncode == 1 and "asks for a join token" in without.stderr
        with Process(
            "-v", *joining, "--token-file", str(shown), folder=tmp_path, name="client"
        ) as client:
            until(lambda: "Connected to" in client.text)
            revoke(tokens, token.split("_")[1])
            assert client.wait() == 1
        assert "was revoked" in client.text
        server.stop()
        server.wait()
    written = [file for file in tmp_path.rglob("*") if file.is_file() and file != shown]
    assert {tmp_path / "run" / "config.toml", client.log, server.log, tokens} <= set(written)
    for secret in (token.split("_")[2], (ours / "server.key").read_text().splitlines()[1]):
        assert not [file for file in written if secret.encode() in file.read_bytes()]


def test_a_client_that_waits_does_not_load_cryptography(home):
    code = (
        "import sys, fedkit.cli.client, fedkit.engine.client\n"
        "from fedkit.security.credentials import channel_credentials, ClientSecurity\n"
        f"ca = ClientSecurity(root_certificates={str(home / 'ours' / 'ca.pem')!r})\n"
        "assert channel_credentials('localhost:1', ca) is not None\n"
        "print(sorted({'cryptography', 'torch', 'flwr'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
