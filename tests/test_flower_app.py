"""Somebody's Flower App on the link, unchanged: what Flower tells it is told, what it keeps is kept."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flower_apps import APPS, AppFederation, quickstart
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.common.constant import ErrorCode
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg as OlderFedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import ServerApp
from inprocess import InProcessGrid
from links import LONG
from processes import events, until

from fedkit.apps.bundle import read_app, read_pairs
from fedkit.apps.membership import AppMembership
from fedkit.engine.state import FederationState, StateDirectory
from fedkit.errors import FedkitError, UsageError
from fedkit.flower import decode_message, encode_message, new_context, take_identity


@pytest.fixture(autouse=True)
def identity():
    yield
    take_identity()


# What is read.


def test_an_app_is_read_without_being_run():
    app = quickstart()
    assert (app.name, app.version) == ("fedkit-tests/quickstart", "1.0.0")
    assert str(app) == "fedkit-tests/quickstart 1.0.0"
    assert read_app(APPS / "numpyclient").run_config([])["penalty.l2"] == 0.0001


def test_the_run_config_is_the_app_s_own_with_what_is_typed(tmp_path):
    app = quickstart()
    assert app.run_config([])["learning-rate"] == 0.1
    typed = app.run_config(["learning-rate=0.5 strategy='Fed Adam'", 'final-model="a b"'])
    assert typed == {
        **app.run_config([]),
        "learning-rate": 0.5,
        "strategy": "Fed Adam",
        "final-model": "a b",
    }
    file = tmp_path / "config.toml"
    file.write_text("batch-size = 8\n")
    assert app.run_config([str(file)])["batch-size"] == 8
    assert read_app(APPS / "numpyclient").run_config(["penalty.l2=1.0"])["penalty.l2"] == 1.0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning-rat=1", r"no 'learning-rat' \(did you mean learning-rate"),
        ("learning-rate", "takes \"key=1 other='word'\""),
        ("learning-rate=[", "takes \"key=1 other='word'\""),
        ("nowhere.toml", "There is no file nowhere.toml"),
    ],
)
def test_a_run_config_that_can_t_be_meant_is_a_sentence(text, sentence):
    with pytest.raises(UsageError, match=sentence):
        quickstart().run_config([text])


def test_a_node_config_is_read_as_a_supernode_reads_it():
    assert read_pairs("--node-config", ["partition-id=0 path='/my data' fast=true x=1.5"]) == {
        "partition-id": 0,
        "path": "/my data",
        "fast": True,
        "x": 1.5,
    }


MINIMAL = """
[project]
name = "app"
version = "1"
[tool.flwr.app]
publisher = "me"
[tool.flwr.app.components]
serverapp = "one_app:server"
clientapp = "one_app:client"
"""


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        (None, "holds no pyproject.toml"),
        ("[project", "is no Flower App"),
        (MINIMAL.partition("[tool.flwr.app]")[0], r"Missing \[tool.flwr.app\] section"),
        (MINIMAL.partition("[tool.flwr.app.comp")[0], "components"),
        (MINIMAL.replace('version = "1"\n', ""), '"version" missing'),
        (MINIMAL.replace('serverapp = "one_app:server"', 'agentapp = "a:b"'), "AgentApp"),
        ("project = 3\n", "is no Flower App"),
    ],
)
def test_a_folder_without_an_app_is_a_sentence(tmp_path, toml, sentence):
    if toml is not None:
        (tmp_path / "pyproject.toml").write_text(toml)
    with pytest.raises(UsageError, match=sentence):
        read_app(tmp_path)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (None, "holds no module one_app"),
        ("", "one_app:client, the clientapp of me/app in .* is not there"),
        ("client = 3", "is a int, not a ClientApp"),
        ("import no_such_package", "needs the package no_such_package, which is not installed"),
        ("import no_such_package.inner", "needs the package no_such_package"),
        ("client = 1 / 0", r"ZeroDivisionError: division by zero \(one_app.py:1\)"),
        ("raise SystemExit('go away')", "SystemExit: go away"),
    ],
)
def test_a_component_that_can_t_be_loaded_is_a_sentence(tmp_path, monkeypatch, code, sentence):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "one_app", raising=False)
    (tmp_path / "pyproject.toml").write_text(MINIMAL)
    if code is not None:
        (tmp_path / "one_app.py").write_text(code)
    with pytest.raises(UsageError, match=sentence):
        read_app(tmp_path).client_app()


# A whole run.


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


def test_an_older_app_runs_as_it_is(tmp_path):
    app, result = read_app(APPS / "numpyclient"), tmp_path / "result.json"
    summary = AppFederation(tmp_path, app, f'result="{result}" num-server-rounds=2').run(2)
    assert summary["messages"] == {"sent": 8, "answered": 8}
    found = json.loads(result.read_text())
    assert found["results"] == 2 and found["accuracy"] > 0.8


# Both halves by themselves.


def asking(what) -> ServerApp:
    """A ServerApp whose main is ``what``."""
    app = ServerApp()
    app.main()(what)
    return app


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


def counting() -> ClientApp:
    """Counts, and fails when it is told to; whatever it does, it has counted before."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        count = context.state.metric_records.get("count", MetricRecord({"n": 0}))["n"] + 1
        context.state["count"] = MetricRecord({"n": count})
        how = message.content["config"].get("fail", "")
        if how == "raise":
            raise ZeroDivisionError("division by zero")
        if how == "exit":
            sys.exit("enough")
        if how == "state":
            context.state = {}
        if how == "reply":
            return None
        content = RecordDict({"metrics": MetricRecord({"n": count})})
        return Message(content, reply_to=message)

    return app


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


# What a client keeps.


def welcome(federation="f00d", **more):
    return {"federation": federation, "node_id": 5, "run_config": {"lr": 0.1}, **more}


class Member:
    """A client of ``counting``, which is told messages by hand."""

    def __init__(self, folder, app=None, said=None):
        self.directory = StateDirectory(folder)
        one = app or counting()
        self.part = AppMembership(self.directory, said or welcome(), quickstart(), one, {})

    def ask(self, key, **config):
        sent = Message(RecordDict({"config": ConfigRecord(config)}), 5, "train")
        answer = self.part.work(key, encode_message(sent))
        assert answer.fatal is None
        return decode_message(answer.buffers)

    def die(self):
        """As ``kill -9`` does: nothing more is written."""
        self.directory.close()


@pytest.fixture
def folder(tmp_path):
    take_identity()
    return tmp_path / "state"


def test_the_state_outlives_the_process_and_an_answer_is_never_made_twice(folder):
    first = Member(folder)
    assert [first.ask(f"k{n}").content["metrics"]["n"] for n in (1, 2)] == [1, 2]
    failed = first.ask("k3", fail="raise")
    first.die()
    again = Member(folder)
    # The server asks for what it did not get.
    assert again.ask("k2").content["metrics"]["n"] == 2
    assert again.ask("k3").error.reason == failed.error.reason
    assert again.ask("k4").content["metrics"]["n"] == 4


def test_records_that_are_edited_in_place_are_kept(folder):
    app = ClientApp()

    @app.train()
    def train(message, context):
        state = context.state
        if "model" not in state:
            state["model"] = ArrayRecord({"w": Array("", (), "own", b"0")})
            state["told"] = ConfigRecord({"words": []})
        number = str(message.content["config"]["number"])
        state["model"]["w"] = Array("", (), "own", number.encode())
        state["told"]["words"].append(number)
        content = RecordDict({"told": ConfigRecord({"all": [*state["told"]["words"]]})})
        return Message(content, reply_to=message)

    for number in (1, 2, 3):
        member = Member(folder, app)
        told = member.ask(f"k{number}", number=number).content["told"]["all"]
        assert told == [str(n) for n in range(1, number + 1)]
        member.die()
    kept = FederationState(folder / "f00d", None)
    assert kept.record("model")["w"].data == b"3"
    assert list(kept.files) == ["model", "told"]


def test_each_run_has_a_state_of_its_own(folder):
    one = Member(folder)
    one.ask("k1")
    one.die()
    assert Member(folder, said=welcome("beef")).ask("k1").content["metrics"]["n"] == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"federation": "../up"}, "no plain word"),
        ({"federation": "xyz"}, "no hexadecimal number"),
        ({"run_config": None}, "no run config"),
        ({"run_config": {"a": [1]}}, "no plain value for 'a'"),
    ],
)
def test_a_welcome_that_makes_no_sense_is_refused(folder, change, sentence):
    with pytest.raises(FedkitError, match=sentence):
        Member(folder, said=welcome(**change))


# At the door.


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


# Flower's other machinery.


@pytest.mark.parametrize("kept", [3, 4])
def test_secure_aggregation_gives_the_mean(tmp_path, kept):
    """SecAgg+ in four stages a round, in which clients send each other shares of their keys."""
    plain = last_model(tmp_path / "plain", DefaultWorkflow(), [])
    secure = DefaultWorkflow(SecAggPlusWorkflow(num_shares=kept, reconstruction_threshold=2))
    masked = last_model(tmp_path / "masked", secure, [secaggplus_mod])
    assert plain.any()
    # Of 2**22 steps between -8 and 8, weighted.
    np.testing.assert_allclose(masked, plain, atol=1e-4)


def last_model(folder, workflow, mods):
    """Of two rounds of FedAvg with four clients of the older app."""
    app, found = read_app(APPS / "numpyclient"), []
    app.client_app()  # from here on its package can be imported
    from numpyclient.client_app import client_fn

    def main(grid, context):
        strategy = OlderFedAvg(
            min_available_clients=4,
            fraction_evaluate=0.0,
            initial_parameters=ndarrays_to_parameters([np.zeros((64, 10))]),
            on_fit_config_fn=lambda round: {"steps": 3},
            evaluate_fn=lambda round, arrays, config: found.append(arrays[0]),
        )
        workflow(grid, LegacyContext(context, ServerConfig(num_rounds=2), strategy=strategy))

    federation = AppFederation(folder, app, server_app=asking(main), min_clients=4)
    federation.run(4, ClientApp(client_fn, mods=mods))
    return found[-1]
