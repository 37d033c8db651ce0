"""A Flower App in processes of its own: as people start it, killed, and beside Flower's own engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from flower_apps import APPS, with_client
from processes import Process, events, fedkit, free_port, until
from superlink import superlink

from fedkit.engine.state import FederationState
from fedkit.security import certs
from fedkit.security.tokens import new_token

QUICKSTART = APPS / "quickstart"
MINUTES = 600


def model(file: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(file))


def assert_equal_bit_for_bit(one: Path, other: Path) -> None:
    found, expected = model(one), model(other)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def run_on_the_link(app: Path, run_config: str, folder: Path, clients: int = 2) -> str:
    folder.mkdir(exist_ok=True)
    done = fedkit(
        *("run", "--app", str(app), "--clients", str(clients), "--run-dir", "run"),
        *("--run-config", run_config),
        folder=folder,
        timeout=MINUTES,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.mark.slow
def test_one_command_runs_it_and_its_files_are_where_it_puts_them(tmp_path):
    printed = run_on_the_link(QUICKSTART, "num-server-rounds=1", tmp_path)
    # What the strategy logs, what the app prints, and what travelled.
    for said in ("[ROUND 1/1]", "rounds per client:", "4 messages to 2 clients, 4 answered"):
        assert said in printed
    assert model(tmp_path / "final_model.pt")
    again = fedkit("run", "--config", "run/config.toml", "--run-dir", "run", folder=tmp_path)
    assert again.returncode == 2 and "holds a run already" in again.stderr


class Secured:
    """A server with TLS, client certificates and tokens, and two clients of it."""

    def __init__(self, folder: Path, run_config: str) -> None:
        self.folder, self.address = folder, f"127.0.0.1:{free_port()}"
        certs.make_authority(folder / "ca", "ours", ["127.0.0.1"])
        for number in range(2):
            request = folder / "ca" / f"client-{number}.csr"
            certs.make_request(folder / "ca", f"client-{number}")
            certs.sign(folder / "ca", request, request.with_suffix(".pem"))
            token = new_token(folder / "tokens.json", f"client-{number}")
            (folder / f"{number}.token").write_text(token)
            (folder / f"{number}.token").chmod(0o600)
        self.server = Process(
            *("server", "--app", str(QUICKSTART), "--run-config", run_config),
            *("--listen", self.address, "--run-dir", "run", "--tokens", "tokens.json"),
            *("--ssl-certfile", "ca/server.pem", "--ssl-keyfile", "ca/server.key"),
            *("--ssl-ca-certfile", "ca/ca.pem"),
            folder=folder,
            name="server",
        )

    def client(self, number: int, name: str) -> Process:
        return Process(
            *("client", "--app", str(QUICKSTART), "--server", self.address),
            *("--node-config", f"partition-id={number} num-partitions=2"),
            *("--state-dir", f"state-{number}", "--token-file", f"{number}.token"),
            *("--root-certificates", "ca/ca.pem"),
            *("--ssl-certfile", f"ca/client-{number}.pem"),
            *("--ssl-keyfile", f"ca/client-{number}.key"),
            folder=self.folder,
            name=name,
        )

    def trained(self, number: int) -> list[int]:
        """The rounds that a client has trained, as its context's state says."""
        (manifest,) = (self.folder / f"state-{number}").glob("*/manifest.json")
        record = FederationState(manifest.parent, None).record("trained")
        return [int(round) for round in record["rounds"]]


@pytest.mark.slow
def test_a_client_that_is_killed_goes_on_where_it_was(tmp_path):
    """With TLS both ways and tokens; the model is the one of a run in which nobody was killed."""
    config = "num-server-rounds=4 fraction-evaluate=0.0 pause=1.5"
    secured = Secured(tmp_path, config)
    run = tmp_path / "run"
    with secured.server as server, secured.client(0, "whole") as whole:
        with secured.client(1, "doomed") as doomed:
            until(lambda: begun(run, 2) or server.process.poll() is not None)
            doomed.kill()
        assert server.process.poll() is None, server.text
        before = secured.trained(1)
        assert before in ([1], [1, 2])  # killed in the second round's pause, or just behind it
        with secured.client(1, "again") as again:
            assert server.wait(MINUTES) == 0, server.text
            assert whole.wait() == 0 and again.wait() == 0, whole.text + again.text
    assert "Going on from" in again.text
    assert secured.trained(0) == secured.trained(1) == [1, 2, 3, 4]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "completed" and len(summary["clients"]) == 2
    run_on_the_link(QUICKSTART, config.replace("1.5", "0.0"), tmp_path / "undisturbed")
    undisturbed = tmp_path / "undisturbed" / "final_model.pt"
    assert_equal_bit_for_bit(tmp_path / "final_model.pt", undisturbed)


def begun(run: Path, round: int) -> bool:
    """Whether a round's messages are on their way."""
    return sum(e["event"] == "sent" and e["round"] == round for e in events(run)) == 2


@pytest.mark.slow
def test_two_clients_are_bit_equal_to_flower_s_own_engine(tmp_path):
    """A sum of two does not hang on their order. A SuperLink and two SuperNodes are the other side."""
    noisy = with_client(tmp_path / "noisy", "quickstart.private_app:app")
    clipping = with_client(tmp_path / "clipping", "quickstart.private_app:clipping_app")
    cases = [
        (QUICKSTART, "FedAvg"),
        (QUICKSTART, "FedProx"),
        (QUICKSTART, "FedAdam"),
        (noisy, "FedAvg"),
        (clipping, "ClippedFedAvg"),
    ]
    with superlink(tmp_path / "engine") as link:
        link.nodes(2)
        for number, (app, strategy) in enumerate(cases):
            ours, theirs = tmp_path / f"{number}-ours.pt", tmp_path / f"{number}-theirs.pt"
            config = f'strategy="{strategy}" num-server-rounds=2 fraction-evaluate=0.0'
            run_on_the_link(app, f'{config} final-model="{ours}"', tmp_path / f"{number}")
            link.run_to_the_end(app, f'{config} final-model="{theirs}"')
            assert_equal_bit_for_bit(ours, theirs)
        ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
        run_on_the_link(APPS / "numpyclient", f'result="{ours}"', tmp_path / "older")
        link.run_to_the_end(APPS / "numpyclient", f'result="{theirs}"')
        assert json.loads(ours.read_text()) == json.loads(theirs.read_text())


@pytest.mark.slow
def test_four_clients_are_equal_to_flower_s_own_engine_within_rounding(tmp_path):
    """There replies are summed as they arrive."""
    ours, theirs = tmp_path / "ours.pt", tmp_path / "theirs.pt"
    config = "num-server-rounds=2 fraction-evaluate=0.0"
    run_on_the_link(QUICKSTART, f'{config} final-model="{ours}"', tmp_path / "link", clients=4)
    with superlink(tmp_path / "engine") as link:
        link.nodes(4)
        link.run_to_the_end(QUICKSTART, f'{config} final-model="{theirs}"')
    found, expected = model(ours), model(theirs)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name] - array).abs().max() <= 1e-6 * array.abs().max(), name
