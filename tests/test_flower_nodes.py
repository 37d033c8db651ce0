"""fedkit's apps for Flower's engine, over a grid and nodes in this process."""

import json
import re
import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from inprocess import InProcessFederation, InProcessGrid

from fedkit.engine.driver import Driver
from fedkit.engine.state import StateDirectory
from fedkit.errors import FedkitError, UsageError
from fedkit.flower import (
    check_arrays,
    decode_message,
    encode_message,
    error_reply,
    new_context,
    take_identity,
)
from fedkit.flower_engine.client import NodeApp
from fedkit.flower_engine.grid import FlowerGrid
from fedkit.flower_engine.node import read_node
from fedkit.flower_engine.server import app as server_app
from fedkit.flower_engine.settings import given, keys
from fedkit.flower_engine.shards import Shards
from fedkit.flower_engine.told import NO_SHARD, RECORD, Told, take_told
from fedkit.settings import FederationSettings, as_config

ROOT = Path(__file__).resolve().parent.parent
TINY = {"clients": 2, "rounds": 2, "models": "logistic", "model": "logistic", "local_epochs": 1}
FEDAVG = TINY | {"strategy": "fedavg"}
KTPFL = TINY | {"strategy": "ktpfl", "public": "digits:64", "models": "logistic,mlp:8"}


@pytest.fixture(autouse=True)
def _identity():
    """As Flower gives to its processes, without which there are no messages."""
    take_identity()


class FlowersOwn(InProcessGrid):
    """Stands for Flower's grid and its nodes: a process for each message, a context for each node."""

    def __init__(self, configs):
        apps = {
            node_id: (NodeApp(), new_context(node_id, dict(config)))
            for node_id, config in configs.items()
        }
        super().__init__(apps)
        self.sent = []

    def answer(self, sent):
        self.sent.append(sent)
        app, context = self.apps[sent.metadata.dst_node_id]
        process = Context(1, context.node_id, context.node_config, context.state, {})
        return decode_message(encode_message(app(decode_message(encode_message(sent)), process)))

    def get_nodes(self):
        return []


def nodes(federation, **change):
    """Node configs as two SuperNodes' owners would write them, by node id."""
    contexts = [context for _, context in federation.grid.apps.values()]
    return {
        7 - at: {
            "partition-id": at,
            "num-partitions": len(contexts),
            "model": context.node_config["model"],
            "device": "cpu",
            **{name.replace("_", "-"): value(at) for name, value in change.items()},
        }
        for at, context in enumerate(contexts)
    }


def driven(federation, flowers, monkeypatch, federation_id="abc"):
    """The federation's driver over fedkit's apps; Flower's waiting takes no time here."""
    monkeypatch.setattr(FlowerGrid, "poll_s", 0.0)
    settings = federation.plan.federation
    shards = Shards(settings.num_shards, {})
    grid = FlowerGrid(flowers, federation_id, as_config(settings), shards.offer)

    def why_not(node_id, facts):
        taken = shards.take(facts["client"], node_id, flowers.get_node_ids())
        return taken or federation.view.why_not(facts) or federation.strategy.why_not(facts)

    return Driver(
        federation.strategy,
        grid,
        settings,
        federation.emit,
        check=why_not,
        offer=federation.view.offer,
        evaluate_fn=lambda round, arrays: federation.view.measure(
            federation.strategy.server_models(arrays), federation.strategy.measured
        ),
    )


def digest(federation, flowers, monkeypatch):
    driven(federation, flowers, monkeypatch).run(federation.strategy.initial_arrays())
    return federation.history.digest()


@pytest.mark.parametrize("case", [FEDAVG, KTPFL], ids=["fedavg", "ktpfl"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["context", "state-dir"])
def test_the_numbers_are_those_of_the_other_engines(case, on_disk, tmp_path, monkeypatch):
    usual = InProcessFederation(**case).run()["digest"]
    federation = InProcessFederation(**case)
    change = {"state_dir": lambda at: str(tmp_path / f"device-{at}")} if on_disk else {}
    flowers = FlowersOwn(nodes(federation, **change))
    assert digest(federation, flowers, monkeypatch) == usual
    for _, context in flowers.apps.values():
        # With a folder there is nothing that Flower would have to carry to and fro.
        assert (not context.state) == on_disk


def test_nodes_that_name_no_shard_get_the_free_ones_in_order(monkeypatch):
    federation = InProcessFederation(**FEDAVG)
    configs = nodes(federation)
    for config in configs.values():
        del config["partition-id"]
    flowers = FlowersOwn(configs)
    driver = driven(federation, flowers, monkeypatch)
    driver.run(federation.strategy.initial_arrays())
    assert {m.node_id: m.client for m in driver.roster.members.values()} == {6: 0, 7: 1}


def test_a_node_with_a_folder_and_no_shard_keeps_the_one_that_it_had(tmp_path):
    federation = InProcessFederation(**FEDAVG | {"clients": 3})
    context = new_context(4, {"state-dir": str(tmp_path), "device": "cpu"})
    settings, offer = as_config(federation.plan.federation), federation.view.offer(False)
    for offered in (2, 0):
        reply = asked(context, Told("abc", "k", offered, settings), offer)
        assert reply.content["join"]["client"] == 2


def test_a_node_waits_until_its_process_before_is_done_with_the_folder(tmp_path):
    """As where a run was stopped while the node still trained: the next run's question comes early."""
    federation = InProcessFederation(**FEDAVG)
    context = new_context(4, {"state-dir": str(tmp_path), "device": "cpu"})
    told = Told("abc", "k", 1, as_config(federation.plan.federation))
    before = StateDirectory(tmp_path)
    threading.Timer(0.3, before.close).start()
    reply = asked(context, told, federation.view.offer(False))
    assert reply.content["join"]["client"] == 1
    # Where it takes too long nobody waits for the answer any more.
    busy = StateDirectory(tmp_path)
    message = message_with(settings=json.dumps(told.settings))
    message.metadata.ttl = 0.01
    reply = NodeApp()(message, context)
    busy.close()
    assert "Another client uses the state directory" in reply.error.reason


def test_who_was_barred_by_a_node_that_is_gone_is_asked_again(monkeypatch):
    """A SuperLink takes a node that was killed for there for a minute, and its shard for taken."""
    federation = InProcessFederation(**FEDAVG)
    flowers = FlowersOwn(nodes(federation))
    driver = driven(federation, flowers, monkeypatch)
    driver.roster.admit()
    while len(driver.roster.members) < 2:
        driver.roster.admit()
    app, context = flowers.apps[6]
    flowers.apps[9] = app, new_context(9, dict(context.node_config))
    for _ in range(3):
        driver.roster.admit()
    assert sorted(driver.roster.members) == [6, 7]
    del flowers.apps[6]
    for _ in range(3):
        driver.roster.admit()
    assert sorted(driver.roster.members) == [7, 9]


def asked(context, told, offer=None):
    """What a node answers to the question to join."""
    content = RecordDict({**(offer or {}), RECORD: told.record()})
    return NodeApp()(Message(content, context.node_id, "query.join", group_id="0"), context)


def test_a_repeated_instruction_is_answered_and_not_done_again(tmp_path, monkeypatch):
    """A round below the quorum is repeated; who has answered trains once, in either memory."""
    for change in ({}, {"state_dir": lambda at: str(tmp_path / f"device-{at}")}):
        case = FEDAVG | {"quorum": 1.0}
        usual = InProcessFederation(**FEDAVG).run()["digest"]
        federation = InProcessFederation(**case)
        flowers = FlowersOwn(nodes(federation, **change))
        lost = []

        def lose_once(sent, reply, lost=lost):
            once = sent.metadata.message_type == "train" and sent.metadata.dst_node_id == 6
            if once and not lost:
                lost.append(sent)
                return None
            return reply

        flowers.tamper = lose_once
        assert digest(federation, flowers, monkeypatch) == usual
        assert lost
        repeated = [sent for sent in flowers.sent if sent.metadata.message_type == "train"]
        assert len(repeated) == 6  # two rounds of two clients, one of them asked twice


def test_a_node_that_was_started_anew_goes_on_from_its_folder(tmp_path, monkeypatch):
    """With another node id, and nothing of it in Flower's memory."""
    usual = InProcessFederation(**KTPFL).run()["digest"]
    federation = InProcessFederation(**KTPFL)
    flowers = FlowersOwn(nodes(federation, state_dir=lambda at: str(tmp_path / f"device-{at}")))
    driver = driven(federation, flowers, monkeypatch)

    def start_anew(round, arrays):
        if round == 1:
            app, context = flowers.apps.pop(6)
            flowers.apps[9] = app, new_context(9, dict(context.node_config))

    driver._round_over = start_anew
    driver.run(federation.strategy.initial_arrays())
    assert sorted(driver.roster.members) == [7, 9]
    assert federation.history.digest() == usual


def test_what_fails_on_a_node_is_a_sentence_at_the_server(monkeypatch):
    federation = InProcessFederation(**FEDAVG | {"min_clients": 1})
    flowers = FlowersOwn(nodes(federation, model=lambda at: "logistic" if at else "lenett"))
    driven(federation, flowers, monkeypatch).run(federation.strategy.initial_arrays())
    (warning,) = {text for text in federation.warnings() if "lenett" in text}
    assert warning.startswith("a client could not join: There is no model 'lenett' (did you mean")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"num-partitions": 3}, "num-shards=2, .*--node-config says num-partitions=3: change one"),
        ({"dataset": "mnist", "partition-id": 0}, "dataset=digits, .* says dataset=mnist"),
        ({"width": 2}, "width"),
        ({"memory-budget": "much"}, "A size is a number with a unit"),
        ({"partition-id": "first"}, "partition-id must be a whole number"),
    ],
)
def test_a_node_config_that_can_not_be_meant_is_told_to_the_server(config, sentence):
    federation = InProcessFederation(**FEDAVG)
    told = Told("abc", "k", 0, as_config(federation.plan.federation))
    reply = asked(new_context(4, config), told, federation.view.offer(False))
    assert re.search(sentence, reply.error.reason)


def test_a_node_config_may_hold_what_other_apps_want(caplog):
    node, _ = read_node({"modle": "lenet", "partition-id": 1, "width": 0.5})
    assert (node.partition_id, node.width) == (1, "0.5")
    assert "did you mean model?" in caplog.text


def test_a_full_federation_says_so():
    told = Told("abc", "k", NO_SHARD, as_config(FederationSettings(num_shards=2)))
    reply = asked(new_context(4, {}), told)
    assert reply.error.reason == "This federation is full: all its 2 shards are taken."


def message_with(**change):
    record = {**Told("abc", "k", 0, as_config(FederationSettings())).record(), **change}
    content = RecordDict({RECORD: ConfigRecord(record)})
    return Message(content, 4, "train", group_id="1")


def test_what_a_server_tells_arrives():
    told = Told("abc", "abc/1/train/1", 3, as_config(FederationSettings(rounds=7)))
    message = Message(RecordDict({RECORD: told.record()}), 4, "train")
    assert take_told(message) == told
    assert RECORD not in message.content


@pytest.mark.parametrize(
    "change",
    [
        {"version": "0.0.1"},
        {"id": "../elsewhere"},
        {"shard": "first"},
        {"settings": "{"},
        {"settings": "[1]"},
        {"settings": '{"rounds": "many"}'},
    ],
)
def test_what_a_server_tells_is_checked(change):
    with pytest.raises(FedkitError):
        take_told(message_with(**change))


def test_a_message_of_another_app_is_refused():
    with pytest.raises(FedkitError, match="no fedkit"):
        take_told(Message(RecordDict(), 4, "train"))


def test_the_numbers_of_a_reply_are_those_that_it_describes():
    check_arrays(RecordDict({"a": ArrayRecord({"w": Array(np.zeros((2, 3)))})}))
    for wrong in (
        Array("float64", (1 << 40,), "numpy.ndarray", b"few"),
        Array("object", (1,), "numpy.ndarray", b""),
        Array("no type", (1,), "numpy.ndarray", b"12345678"),
    ):
        with pytest.raises(ValueError):
            check_arrays(RecordDict({"a": ArrayRecord({"w": wrong})}))


class Answering(FlowersOwn):
    """A grid with what somebody answers; ``None``: nothing yet."""

    def __init__(self, replies):
        super().__init__({4: {}, 5: {}})
        self.replies = replies

    def answer(self, sent):
        reply = self.replies[sent.metadata.dst_node_id]
        return error_reply(sent, "not yet") if reply is None else reply(sent)

    def pull_messages(self, message_ids):
        found = super().pull_messages(message_ids)
        for reply in found:
            if reply.has_error() and reply.error.reason == "not yet":
                self._replies[reply.metadata.reply_to_message_id] = reply
        return [r for r in found if r.metadata.reply_to_message_id not in self._replies]


def flower_grid(flowers):
    settings = as_config(FederationSettings())
    return FlowerGrid(flowers, "abc", settings, Shards(20, {}).offer)


def instructions(*node_ids):
    return [Message(RecordDict(), node_id, "train", group_id="1") for node_id in node_ids]


def test_replies_come_in_the_order_of_sending_and_silence_ends_at_the_timeout():
    done = ConfigRecord({"done": True})
    flowers = Answering({4: None, 5: lambda m: Message(RecordDict({"c": done}), reply_to=m)})
    late, answered = flower_grid(flowers).send_and_receive(instructions(4, 5), timeout=0.3)
    assert late.metadata.src_node_id == 4
    assert late.error.reason == "it had not answered when the time was up"
    assert answered.metadata.src_node_id == 5 and answered.content["c"]["done"]


def test_an_instruction_is_not_delivered_after_the_round():
    (message,) = instructions(4)
    came = []

    def done(sent):
        came.append(sent.metadata.ttl)
        return Message(RecordDict(), reply_to=sent)

    list(flower_grid(Answering({4: done})).send_and_receive([message], timeout=12.0))
    assert came == [12.0]


def test_what_comes_from_a_node_is_checked_and_made_plain():
    huge = RecordDict({"a": ArrayRecord({"w": Array("float32", (1 << 50,), "numpy.ndarray", b"")})})
    flowers = Answering(
        {
            4: lambda m: Message(huge, reply_to=m),
            5: lambda m: Message(Error(2, "a\x1b[31m\nb" + "c" * 9999), reply_to=m),
        }
    )
    described, told = flower_grid(flowers).send_and_receive(instructions(4, 5), timeout=1.0)
    assert "described as larger" in described.error.reason
    assert told.error.reason.startswith("a [31m bccc") and len(told.error.reason) < 1000


def test_a_shard_is_a_node_s_own_word_or_the_next_free_one():
    shards = Shards(3, {})
    assert [shards.offer(node, [7, 8, 9]) for node in (7, 8, 9)] == [0, 1, 2]
    assert shards.offer(10, [7, 8, 9, 10]) == NO_SHARD
    # What was offered does not bind a node that knows better, and frees what it leaves.
    assert shards.take(1, 7, [7, 8, 9]) is None
    assert "taken by another node" in shards.take(1, 8, [7, 8, 9])
    assert shards.offer(8, [7, 8, 9]) == 0
    assert shards.take(0, 8, [7, 8, 9]) is None
    # A node that is gone leaves its shard to one that has none.
    assert shards.offer(10, [8, 9, 10]) == 1
    assert shards.take(1, 10, [8, 9, 10]) is None
    assert shards.holders() == {0: 8, 1: 10}
    for nonsense in (3, -1, "0", None):
        assert "There is no shard" in shards.take(nonsense, 9, [])


def test_shards_whose_holders_are_all_gone_go_to_one_node_each():
    """A run that goes on where every SuperNode was started anew, and none names a shard."""
    shards = Shards(2, {0: 4, 1: 5})
    assert [shards.offer(node, [8, 9]) for node in (8, 9, 8)] == [0, 1, 0]
    # Whoever held one before comes back to it.
    assert shards.offer(5, [5, 8, 9]) == 1
    assert shards.take(1, 5, [5, 8, 9]) is None
    assert shards.take(0, 8, [5, 8, 9]) is None
    assert shards.offer(9, [5, 8, 9]) == NO_SHARD


def test_every_setting_may_stand_in_a_run_config():
    """And nothing else: Flower takes no key that the app does not declare."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    wanted = keys()
    lines = "\n".join(f'{name} = ""' for name in wanted)
    assert list(declared["config"]) == wanted, f"[tool.flwr.app.config] should hold:\n{lines}"
    assert set(declared["config"].values()) == {""}


def test_settings_of_a_run_config_win_over_options_and_these_over_the_file(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('rounds = 2\nseed = 2\npatience = 2\nstrategy = "fedmd"\n')
    config = dict.fromkeys(keys(), "") | {
        "config": str(file),
        "option": "seed=3 patience=3 note='two words'",
        "patience": 4,
        "resume": "auto",
    }
    values, resume = given(config)
    assert values == {
        "rounds": 2,
        "seed": "3",
        "patience": 4,
        "strategy": "fedmd",
        "note": "two words",
    }
    assert resume == "auto"
    assert given(dict.fromkeys(keys(), "")) == ({}, None)
    with pytest.raises(UsageError, match="key=value"):
        given({"option": "seed"})
    with pytest.raises(UsageError, match="No closing quotation"):
        given({"option": "note='two words"})
    with pytest.raises(UsageError, match="no settings file"):
        given({"config": str(tmp_path / "none.toml")})


def test_the_server_app_writes_a_run_directory_and_goes_on_in_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FlowerGrid, "poll_s", 0.0)
    usual = InProcessFederation(**FEDAVG | {"alone": False}).run()["digest"]
    federation = InProcessFederation(**FEDAVG | {"alone": False})
    flowers = FlowersOwn(nodes(federation, state_dir=lambda at: str(tmp_path / f"device-{at}")))
    run_dir = tmp_path / "run"
    config = dict.fromkeys(keys(), "") | {
        "strategy": "fedavg",
        "model": "logistic",
        "local-epochs": 1,
        "num-shards": 2,
        "rounds": 1,
        "run-dir": str(run_dir),
    }
    serve(flowers, config)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["engine"], summary["status"], summary["rounds"]) == ("flower", "completed", 1)
    # Another SuperLink run, and other node ids: the same federation.
    flowers.apps = {node + 10: app for node, app in flowers.apps.items()}
    again = config | {"resume": str(run_dir), "run-dir": "", "rounds": 2, "rejoin-wait": 0.0}
    serve(flowers, again)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["rounds"], summary["digest"]) == (2, usual)
    assert (run_dir / "models" / "global.safetensors").exists()
    serve(flowers, again)
    assert "nothing to go on with" in capsys.readouterr().out


def serve(flowers, config):
    """What Flower does with the app."""
    server_app(flowers, Context(1, 1, {}, RecordDict(), config))


def test_the_server_app_tells_what_is_wrong_in_a_sentence(tmp_path, capsys):
    with pytest.raises(UsageError):
        serve(FlowersOwn({}), {"strategy": "ktplf", "run-dir": str(tmp_path / "run")})
    assert "Error: There is no strategy 'ktplf' (did you mean ktpfl" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
