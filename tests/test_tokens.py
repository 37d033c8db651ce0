"""Join tokens: kept as hashes, compared in constant time, revoked while the server runs."""

from __future__ import annotations

import hmac
import json
import logging
import stat

import grpc
import pytest
from processes import fedkit

from fedkit.errors import FedkitError, UsageError
from fedkit.link.node import Refusal
from fedkit.security.guard import Guard, JoinRate, address_of
from fedkit.security.settings import ClientSecurity, resolve_token
from fedkit.security.tokens import TokenStore, new_token, revoke


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tokens.json"


def id_of(token):
    return token.split("_")[1]


def secret_of(token):
    return token.split("_")[2]


def test_a_token_is_known_again_and_others_are_not(file):
    first, second = new_token(file, "drone-1"), new_token(file)
    store = TokenStore(file)
    assert store.check(first) == id_of(first) != id_of(second) == store.check(second)
    crossed = f"fk_{id_of(first)}_{secret_of(second)}"
    for wrong in (
        crossed,
        first[:-1],
        first + "0",
        first.upper(),
        "",
        "fk_",
        "x" * 10**6,
        "\ud800",
    ):
        assert store.check(wrong) is None


def test_the_server_keeps_no_secret(file):
    token = new_token(file, "drone-1")
    text = file.read_text()
    assert secret_of(token) not in text
    assert len(bytes.fromhex(secret_of(token))) == 24
    entry = json.loads(text)["tokens"][0]
    assert (entry["id"], entry["name"]) == (id_of(token), "drone-1")
    assert set(entry) == {"id", "name", "sha256", "created", "revoked"}


def test_the_file_is_the_servers_alone(file):
    token = new_token(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    revoke(file, id_of(token))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_every_comparison_takes_the_same_time(file, monkeypatch):
    """Known id, unknown id or nonsense: one comparison of two digests of equal length."""
    token = new_token(file)
    store, compared, real = TokenStore(file), [], hmac.compare_digest

    def watched(left, right):
        compared.append((len(left), len(right)))
        return real(left, right)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    wrong = f"fk_{id_of(token)}_{'0' * 48}"
    for shown in (token, wrong, f"fk_00000000_{'0' * 48}", "nonsense", ""):
        store.check(shown)
    assert compared == [(64, 64)] * 5


def test_a_revocation_needs_no_restart(file):
    kept, lost = new_token(file), new_token(file)
    store = TokenStore(file)
    assert store.check(lost) and not store.revoked(id_of(lost))
    revoke(file, id_of(lost))
    assert store.check(lost) is None and store.revoked(id_of(lost))
    assert store.check(kept) and not store.revoked(id_of(kept))
    late = new_token(file)
    assert store.check(late) == id_of(late)
    assert store.revoked("00000000")


def test_revoking_twice_keeps_the_first_date(file):
    token = new_token(file)
    first = revoke(file, id_of(token))
    assert first.revoked and revoke(file, id_of(token)) == first


DAMAGED = [
    b"",
    b"{",
    b"[]",
    b"\xff\xfe",
    b'{"version": 2, "tokens": []}',
    b'{"version": 1, "tokens": [{"id": "a"}]}',
    b'{"version": 1, "tokens": [{"id":"a","name":"","sha256":"x","created":"","revoked":""}]}',
    b'{"version": 1, "tokens": [{"id":"a","name":"","sha256":7,"created":"","revoked":""}]}',
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_one_sentence_and_lets_nobody_in(content, file):
    token = new_token(file)
    store = TokenStore(file)
    file.write_bytes(content)
    for act in (lambda: TokenStore(file), lambda: store.check(token), lambda: new_token(file)):
        with pytest.raises(FedkitError, match=r"tokens\.json is damaged: "):
            act()
    assert file.read_bytes() == content


def test_a_missing_file_says_how_to_make_it(file):
    with pytest.raises(UsageError, match="fedkit token new --file"):
        TokenStore(file)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "a" * 65, "ä"])
def test_a_name_that_could_fool_a_terminal_is_refused(name, file):
    with pytest.raises(UsageError) as raised:
        new_token(file, name)
    assert str(raised.value).isprintable() and not file.exists()


def refusal(guard, hello, certificate=None):
    with pytest.raises(Refusal) as raised:
        guard(hello, certificate)
    return raised.value


def test_the_guard_says_what_is_wrong_and_never_the_token(file, caplog):
    caplog.set_level(logging.DEBUG)
    token, old = new_token(file), new_token(file)
    guard = Guard(TokenStore(file))
    revoke(file, id_of(old))
    assert guard({"token": token}, None) == id_of(token)
    wrong = f"fk_{id_of(token)}_{'0' * 48}"
    told = {
        "asks for a join token": [{}, {"token": ""}, {"token": None}, {"token": [token]}],
        "does not know the join token": [{"token": wrong}, {"token": "\ud800\n"}],
        f"{id_of(old)} was revoked": [{"token": old}],
    }
    for words, hellos in told.items():
        for hello in hellos:
            refused = refusal(guard, hello, "drone-1")
            assert refused.status is grpc.StatusCode.UNAUTHENTICATED
            assert words in str(refused) and str(refused).isprintable()
    said = caplog.text + "".join(str(refusal(guard, {"token": t})) for t in (wrong, old))
    for shown in (token, old, wrong):
        assert secret_of(shown) not in said
    assert "drone-1" in caplog.text


def test_who_knows_only_an_id_does_not_learn_that_it_was_revoked(file):
    token = new_token(file)
    revoke(file, id_of(token))
    guessed = f"fk_{id_of(token)}_{'0' * 48}"
    assert "does not know" in str(refusal(Guard(TokenStore(file)), {"token": guessed}))


def test_without_tokens_everybody_comes_in():
    guard = Guard(None)
    assert guard({}, None) is None and guard({"token": "whatever"}, None) is None
    assert not guard.revoked("5be1a0f3")


def test_while_the_file_is_damaged_clients_are_told_to_come_again(file, caplog):
    token = new_token(file)
    guard = Guard(TokenStore(file))
    good = file.read_bytes()
    file.write_bytes(b"{")
    for _ in range(3):
        assert refusal(guard, {"token": token}).status is grpc.StatusCode.ABORTED
        assert not guard.revoked(id_of(token))
    assert caplog.text.count("is damaged") == 1
    file.write_bytes(good)
    assert guard({"token": token}, None) == id_of(token)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_join_rate_allows_a_burst_then_its_pace():
    clock = Clock()
    rate = JoinRate(per_second=2, burst=3, clock=clock)
    assert [rate.allow("10.0.0.1") for _ in range(5)] == [True, True, True, False, False]
    assert rate.allow("10.0.0.2")
    clock.now = 1.0
    assert [rate.allow("10.0.0.1") for _ in range(3)] == [True, True, False]
    clock.now = 1e6
    assert [rate.allow("10.0.0.1") for _ in range(4)] == [True, True, True, False]


def test_a_thousand_devices_behind_one_address_come_in_at_once():
    rate = JoinRate(clock=Clock())
    assert all(rate.allow("10.0.0.1") for _ in range(2000)) and not rate.allow("10.0.0.1")


def test_the_join_rate_remembers_a_bounded_number_of_peers():
    rate = JoinRate(burst=1, clock=Clock(), peers=100)
    for number in range(1000):
        assert rate.allow(f"10.0.{number // 250}.{number % 250}")
    assert len(rate._peers) == 100
    assert not rate.allow("10.0.3.249")


def test_the_addresses_of_one_ipv6_network_are_one_peer():
    rate = JoinRate(burst=1, clock=Clock())
    assert rate.allow("2001:db8::1") and not rate.allow("2001:db8::ffff:2")
    assert rate.allow("2001:db8:0:1::1")
    assert rate.allow("::ffff:10.0.0.1") and not rate.allow("10.0.0.1")


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.5:40312", "10.0.0.5"),
        ("ipv4:10.0.0.5", "10.0.0.5"),
        ("ipv6:%5B::1%5D:40312", "::1"),
        ("ipv6:%5B2001:db8::1%5D", "2001:db8::1"),
        ("ipv6:[::1]:80", "::1"),
        ("unix:/tmp/x", "unix:/tmp/x"),
        ("10.0.0.5", "10.0.0.5"),
    ],
)
def test_grpcs_word_for_a_peer_becomes_its_address(peer, address):
    assert address_of(peer) == address


def test_a_guard_counts_joins_by_address_not_by_port():
    guard = Guard(None, JoinRate(burst=2, clock=Clock()))
    assert guard.allows("ipv4:10.0.0.5:1") and guard.allows("ipv4:10.0.0.5:2")
    assert not guard.allows("ipv4:10.0.0.5:3") and guard.allows("ipv4:10.0.0.6:3")


def test_a_client_takes_its_token_from_a_file_or_the_environment(tmp_path, monkeypatch, caplog):
    token, other = new_token(tmp_path / "t.json"), new_token(tmp_path / "t.json")
    monkeypatch.delenv("FEDKIT_TOKEN", raising=False)
    assert resolve_token(ClientSecurity()) is None
    monkeypatch.setenv("FEDKIT_TOKEN", other)
    assert resolve_token(ClientSecurity()) == other
    file = tmp_path / "token"
    file.write_text(f" {token}\n")
    file.chmod(0o600)
    assert resolve_token(ClientSecurity(token_file=str(file))) == token
    assert not caplog.text
    file.chmod(0o644)
    assert resolve_token(ClientSecurity(token_file=str(file))) == token
    assert "chmod 600" in caplog.text and secret_of(token) not in caplog.text
    for content in (b"", token[:-1].encode(), b"\xff\xff", b"x" * 10_000):
        file.write_bytes(content)
        with pytest.raises(UsageError, match="token file") as raised:
            resolve_token(ClientSecurity(token_file=str(file)))
        assert secret_of(token)[:20] not in str(raised.value)
    monkeypatch.setenv("FEDKIT_TOKEN", "nonsense")
    with pytest.raises(UsageError, match="FEDKIT_TOKEN") as raised:
        resolve_token(ClientSecurity())
    assert "nonsense" not in str(raised.value)


def test_the_commands_show_a_token_once(tmp_path):
    made = fedkit("token", "new", "--name", "drone-1", folder=tmp_path)
    token = made.stdout.strip()
    assert TokenStore(tmp_path / "tokens.json").check(token) == id_of(token)
    assert secret_of(token) not in made.stderr and "--token-file" in made.stderr
    written = fedkit("token", "new", "--out", "drone-2.token", folder=tmp_path)
    file = tmp_path / "drone-2.token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secret_of(file.read_text().strip()) not in written.stdout + written.stderr
    again = fedkit("token", "new", "--out", "drone-2.token", folder=tmp_path)
    assert again.returncode == 1 and "not overwritten" in again.stderr
    gone = fedkit("token", "revoke", id_of(token), folder=tmp_path)
    assert gone.returncode == 0 and "of drone-1 is revoked" in gone.stdout
    assert TokenStore(tmp_path / "tokens.json").check(token) is None
    listed = fedkit("token", "list", "--format", "json", folder=tmp_path)
    rows = json.loads(listed.stdout)
    assert [bool(row["revoked"]) for row in rows] == [True, False]
    assert "sha256" not in listed.stdout


def test_a_token_typed_as_an_argument_is_not_repeated(tmp_path):
    token = new_token(tmp_path / "tokens.json")
    for words in (
        ("token", "revoke", token),
        ("client", "--data-shard", "0", f"--token={token}"),
        ("client", "--data-shard", "0", "--token-file", "tokens.json"),
    ):
        done = fedkit(*words, folder=tmp_path)
        assert done.returncode == 2
        assert secret_of(token) not in done.stdout + done.stderr
