"""Somebody's Flower App on the link, unchanged: its numbers, and what Flower promises its two halves."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flower_apps import APPS, AppFederation, asking, counting, quickstart
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from inprocess import InProcessGrid
from links import LONG
from processes import events, until

from fedkit.apps.bundle import read_app
from fedkit.errors import FedkitError, UsageError
from fedkit.flower import new_context, take_identity


@pytest.fixture(autouse=True)
def identity():
    yield
    take_identity()


def model(file: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(file))


def without_a_network(app, folder, clients, *run_config):
    """The same components on a grid that calls the ClientApp itself."""
    config = app.run_config([*run_config, f'final-model="{folder / "expected.pt"}"'])
    take_identity()
    nodes = {
        number + 2: (
            app.client_app(),
            new_context(number + 2, {"partition-id": number, "num-partitions": clients}, config),
        )
        for number in range(clients)
    }
    app.server_app()(InProcessGrid(nodes), new_context(1, {}, config))
    return model(folder / "expected.pt")


@pytest.mark.parametrize(
    ("strategy", "client_app", "clients"),
    [
        ("FedAvg", "client_app:app", 2),
        ("FedAvg", "client_app:app", 4),
        ("FedProx", "client_app:app", 2),
        ("FedAdam", "client_app:app", 2),
        ("FedAvg", "private_app:app", 2),
        ("ClippedFedAvg", "private_app:clipping_app", 2),
    ],
)
def test_the_numbers_are_those_of_the_same_app_without_a_network(
    tmp_path, strategy, client_app, clients
):
    app = quickstart(clientapp=f"quickstart.{client_app}")
    settings = f'strategy="{strategy}" num-server-rounds=2 fraction-evaluate=0.5'
    result = tmp_path / "final.pt"
    random.seed(3)  # from which Flower draws who takes part, and in which order
    federation = AppFederation(
        tmp_path, app, settings, f'final-model="{result}"', min_clients=clients
    )
    # Nodes are numbered as they come.
    for number in range(clients):
        federation.client(number, of=clients)
        if number < clients - 1:
            wait_for(federation, number + 1)
    federation.result()
    random.seed(3)
    expected = without_a_network(app, tmp_path, clients, settings)
    found = model(result)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def wait_for(federation, clients):
    until(lambda: sum(line.startswith("node ") for line in federation.lines) == clients)


def test_a_run_is_written_down(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    summary = AppFederation(tmp_path, quickstart(), "num-server-rounds=2").run(2)
    assert (tmp_path / "final_model.pt").exists()  # where the app's own code puts it
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text()) == summary
    assert summary["status"] == "completed" and summary["app"] == "fedkit-tests/quickstart"
    assert summary["messages"] == {"sent": 8, "answered": 8}
    assert summary["sent_down"] == sum(summary["sent_down_by_type"].values()) > 40_000
    assert set(summary["sent_up_by_type"]) == {"train", "evaluate"}
    told = events(run)
    rounds = [e["round"] for e in told if e["event"] == "answered" and e["exchange"] == "train"]
    assert sorted(rounds) == [1, 1, 2, 2]
    assert told[0]["event"] == "listen"
    assert told[-1]["event"] == "stop" and told[-1]["name"] == "completed"
    assert sum(e["event"] == "join" for e in told) == 2
    assert "num-server-rounds = 2\n" in (run / "run-config.toml").read_text()


def ask(grid, kind="train", **config) -> list[Message]:
    content = RecordDict({"config": ConfigRecord(config)})
    return list(grid.send_and_receive([Message(content, n, kind) for n in grid.get_node_ids()]))


def test_the_contexts_are_those_that_flower_gives(tmp_path):
    seen, app = {}, ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        seen["client"] = context
        context.run_config["batch-size"] = context.node_config["extra"] = 0  # its own business
        return Message(RecordDict(), reply_to=message)

    def main(grid, context):
        seen["server"], seen["run"] = context, grid.run
        for _ in range(2):
            ask(grid, "query")

    federation = AppFederation(
        tmp_path, quickstart(), "batch-size=5", server_app=asking(main), min_clients=1
    )
    federation.client(1, client_app=app, extra="word")
    run_id = federation.result()["run_id"]
    server, client = seen["server"], seen["client"]
    assert (server.run_id, server.node_id, server.node_config) == (run_id, 1, {})
    assert client.run_id == seen["run"].run_id == run_id
    assert server.run_config == {**client.run_config, "batch-size": 5}
    assert client.run_config["batch-size"] == 0
    assert client.node_config == {"partition-id": 1, "num-partitions": 2, "extra": 0}
    assert client.node_id == 2 and not client.state


def test_lifespans_and_mods_are_run(tmp_path):
    happened = []

    def mod(message, context, call_next):
        happened.append("mod")
        return call_next(message, context)

    client_app = ClientApp(mods=[mod])

    @client_app.lifespan()
    def around(context):
        happened.append("enter")
        yield
        happened.append("leave")

    @client_app.train()
    def train(message, context):
        happened.append("train")
        return Message(RecordDict(), reply_to=message)

    server_app = asking(lambda grid, context: ask(grid))

    @server_app.lifespan()
    def whole(context):
        happened.append("begin")
        yield
        happened.append("end")

    federation = AppFederation(tmp_path, quickstart(), server_app=server_app, min_clients=1)
    federation.client(0, client_app=client_app)
    federation.result()
    assert happened == ["begin", "enter", "mod", "train", "leave", "end"]


def test_what_the_client_app_raises_is_an_error_reply_and_the_client_lives_on(tmp_path):
    replies = {}

    def main(grid, context):
        for how in ("raise", "exit", "state", "reply", "nothing"):
            (replies[how],) = ask(grid, fail=how)
        (replies["evaluate"],) = ask(grid, "evaluate")

    federation = AppFederation(tmp_path, quickstart(), server_app=asking(main), min_clients=1)
    goodbye = federation.client(0, client_app=counting())
    summary = federation.result()
    assert "is over" in goodbye.result(LONG)
    # As Flower's own node words it.
    reason = "<class 'ZeroDivisionError'>:<'division by zero'>"
    assert replies["raise"].error.reason == reason
    for how in ("raise", "exit", "state", "reply", "evaluate"):
        assert replies[how].error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION, how
    assert "SystemExit" in replies["exit"].error.reason
    # What it did before it failed counts, as on Flower's own node.
    assert replies["nothing"].content["metrics"]["n"] == 5
    assert summary["messages"] == {"sent": 6, "answered": 1, "failed": 5}


@pytest.mark.parametrize(
    ("failing", "sentence"),
    [
        (lambda grid, context: 1 / 0, "ServerApp failed with ZeroDivisionError"),
        (lambda grid, context: sys.exit(3), "ServerApp failed with SystemExit: 3"),
    ],
)
def test_a_server_app_that_fails_ends_the_run_with_a_sentence(tmp_path, failing, sentence):
    federation = AppFederation(tmp_path, quickstart(), server_app=asking(failing), min_clients=1)
    client = federation.client(0)
    with pytest.raises(FedkitError, match=sentence):
        federation.result()
    with pytest.raises(FedkitError, match=f"The server ended: The {sentence}"):
        client.result(LONG)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and sentence in summary["stop_reason"]


def test_another_app_or_version_is_refused_at_the_door(tmp_path):
    federation = AppFederation(
        tmp_path, quickstart(), server_app=asking(lambda grid, context: None), min_clients=1
    )
    for other in (replace(quickstart(), version="2.0"), read_app(APPS / "numpyclient")):
        with pytest.raises(
            UsageError, match=r"runs the Flower App fedkit-tests/quickstart 1\.0\.0"
        ):
            federation.client(0, app=other).result(LONG)
    federation.run(1)
