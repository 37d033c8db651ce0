"""Federations of real processes on bad networks: nothing is lost, and nothing hangs."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, contextmanager

import pytest
from inprocess import InProcessFederation
from processes import fedkit, until

from network.namespaces import GOOD, SILENT, Conditions, Network, NetworkProcess

pytestmark = pytest.mark.network
ROUNDS = 4
SMALL = {"local_epochs": 1, "distill_epochs": 1}
MODELS = ("lenet", "cnn")
# Shorter than the grace (8 s) in which a client may come back, longer than any exchange takes.
SECONDS_CUT = 4.0


@pytest.fixture(scope="module")
def undisturbed():
    """The digest of the same federation without any network."""
    alike = InProcessFederation(
        clients=2, models=",".join(MODELS), rounds=ROUNDS, num_shards=8, alone=False, **SMALL
    )
    return alike.run()["digest"]


@pytest.fixture(scope="module")
def in_the_open(tmp_path_factory):
    """What each command has to be told to speak plaintext on an address that is not loopback."""
    folder = tmp_path_factory.mktemp("help")
    shown = {name: fedkit(name, "--help", folder=folder).stdout for name in ("server", "client")}
    return {name: ["--insecure"] if "--insecure" in text else [] for name, text in shown.items()}


@pytest.fixture
def federation(tmp_path, in_the_open):
    """Starts a server and clients, each on a host of its own."""

    @contextmanager
    def start(clients=2, rounds=ROUNDS, conditions=GOOD, options=()):
        names = [f"client-{number}" for number in range(clients)]
        with Network("server", *names) as network, ExitStack() as stack:
            for host in network.hosts[1:]:
                network.shape(host, conditions)
            address = f"{network.hosts[0].address}:8090"
            settings = [f"-o{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
            server = NetworkProcess(
                network.hosts[0],
                *("server", "--strategy", "ktpfl", "--listen", address, "--run-dir", "out"),
                *("--num-shards", "8", "--rounds", str(rounds), *settings, *options),
                *in_the_open["server"],
                folder=tmp_path,
            )
            stack.enter_context(server)
            processes = [
                stack.enter_context(
                    NetworkProcess(
                        host,
                        *("client", "--server", address, "--data-shard", str(number)),
                        *("--model", MODELS[number % 2], *in_the_open["client"]),
                        folder=tmp_path,
                    )
                )
                for number, host in enumerate(network.hosts[1:])
            ]
            yield network, server, processes

    return start


def ended_well(server, clients):
    assert server.wait() == 0, server.text
    for client in clients:
        assert client.wait() == 0, client.text


def summary(tmp_path):
    return json.loads((tmp_path / "out" / "summary.json").read_text())


@pytest.mark.parametrize(
    "conditions",
    [
        Conditions(delay_ms=200, jitter_ms=20),
        Conditions(loss_percent=5),
        Conditions(rate_mbit=4),
        Conditions(delay_ms=50, jitter_ms=10, loss_percent=1, rate_mbit=4),
    ],
    ids=["200 ms", "5 percent lost", "4 Mbit/s", "all at once"],
)
def test_a_run_completes_with_the_same_numbers(federation, conditions, undisturbed, tmp_path):
    with federation(conditions=conditions) as (_, server, clients):
        ended_well(server, clients)
    assert "did not answer" not in server.text
    assert summary(tmp_path)["digest"] == undisturbed


@pytest.mark.parametrize("how", ["silent", "pulled"])
@pytest.mark.parametrize("whose", [slice(0, 1), slice(0, 2)], ids=["one", "all"])
def test_a_cut_that_heals_costs_no_answer(federation, how, whose, undisturbed, tmp_path):
    with federation() as (network, server, clients):
        until(lambda: f"round 1/{ROUNDS}" in server.text)
        cut = network.hosts[1:][whose]
        for host in cut:
            network.shape(host, SILENT) if how == "silent" else network.cut(host)
        # Not a wait for something: the cut itself has to last.
        time.sleep(SECONDS_CUT)
        # Nobody can have finished a run without the clients that were cut off.
        assert server.process.poll() is None
        assert f"round {ROUNDS}/{ROUNDS}" not in server.text
        for host in cut:
            network.shape(host, GOOD) if how == "silent" else network.heal(host)
        ended_well(server, clients)
    assert "did not answer" not in server.text
    assert summary(tmp_path)["digest"] == undisturbed


def test_a_client_cut_for_good_does_not_hang_the_round(federation, tmp_path):
    rounds = 8
    options = ("--min-clients", "2", "--round-timeout", "3000")
    with federation(clients=3, rounds=rounds, options=options) as (network, server, clients):
        until(lambda: all(f"client {number} joined" in server.text for number in range(3)))
        doomed = network.hosts[3]
        network.shape(doomed, SILENT)
        ended_well(server, clients[:2])
        # Far below the round's deadline, so it was the liveness rule that noticed.
        assert summary(tmp_path)["seconds"] < 300
        assert clients[2].process.poll() is None
    assert "client 2 did not answer: it vanished" in server.text
    assert summary(tmp_path)["rounds"] == rounds
