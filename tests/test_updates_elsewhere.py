"""Updates in fewer bytes, or none, where feddf's groups and feddistill's copies share weights."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import RecordDict
from inprocess import InProcessFederation

import strategies.feddf
from clients.edge import edge_of
from clients.feddistill import COPY
from clients.updates import upload_bytes
from fedkit.engine.dryrun import dry_run
from fedkit.engine.plan import make_plan
from fedkit.errors import UsageError
from fedkit.knowledge.updates import make_update_codec
from fedkit.models.build import build_model, parameters_of

SMALL = {
    "model": "lenet:batch",
    "clients": 3,
    "rounds": 3,
    "local_epochs": 1,
    "batch_size": 16,
    "learning_rate": 0.05,
    "optimiser": "sgd",
    "momentum": 0.5,
    "keep_optimiser": False,
    "public": "digits:60",
    "partition": "iid",
    "num_shards": 30,
    "alone": False,
    "eval_every": 3,
}
FEDDF = {"strategy": "feddf", "exchange": "weights", "models": "lenet:batch", "workers": 1}
COPIES = {
    "strategy": "feddistill",
    "exchange": "weights",
    "models": "lenet:batch,cnn",
    "teacher_first": 0,
    "teacher_epochs": 0,
}
# As FedAvg: what else the server and the teacher do is left out.
PLAIN = {"feddf": FEDDF | {"steps": 0}, "feddistill": COPIES | {"distill_weight": 0.0}}
WAYS = [
    *(
        pytest.param(way, marks=pytest.mark.slow)
        for way in ({"update_codec": "float16"}, {"update_codec": "topk:0.1"}, {"relevance": "0.7"})
    ),
    {"update_codec": "topk:0.3", "relevance": "0.55", "buffers": "static"},
]
both = pytest.mark.parametrize("name", PLAIN)


def ran(tamper=None, **more):
    run = InProcessFederation(tamper, **{**SMALL, **more})
    run.summary = run.run()
    return run


def model_of(run):
    """The one model that is shared."""
    if run.plan.federation.strategy == "feddf":
        return run.strategy.state.models["lenet:batch"]
    return {name: array.numpy() for name, array in run.result.arrays.items()}


def told(run, name):
    return [(e.round, e.client, e.value) for e in run.events if e.name == name]


@pytest.fixture(scope="module")
def averaged():
    """FedAvg, once for each way."""
    runs = {}

    def of(way):
        key = str(way)
        if key not in runs:
            runs[key] = ran(strategy="fedavg", **way)
        return runs[key]

    return of


@both
@pytest.mark.parametrize("way", WAYS, ids=lambda way: ",".join(way.values()))
def test_updates_travel_and_are_averaged_as_fedavgs_to_the_bit(name, way, averaged):
    run, avg = ran(**PLAIN[name], **way), averaged(way)
    theirs = model_of(avg)
    for tensor, values in model_of(run).items():
        assert values.tobytes() == theirs[tensor].tobytes(), tensor
    for measure in ("bytes_up", "bytes_down", "skipped", "skipped_share", "bytes_saved"):
        assert told(run, measure) == told(avg, measure)
    if "relevance" in way:
        assert 0 < sum(value for *_, value in told(run, "skipped")) < 9, "else it filters nothing"
    assert not run.warnings()


@both
@pytest.mark.parametrize("codec", ["int8", "topk:0.1"])
def test_bytes_on_the_wire_are_the_declared_ones(name, codec):
    settings = SMALL | PLAIN[name] | {"rounds": 1, "update_codec": codec}
    run = ran(**settings)
    # Of each a client: a personal teacher of another architecture is no part of what travels.
    for client, row in enumerate(dry_run(make_plan(settings, local=True))["clients"]):
        (up,) = {value for _, one, value in told(run, "bytes_up") if one == client and value}
        network = build_model("lenet:batch", run.view.data.shape, 10, 0)
        parameters = sum(tensor.numel() for tensor in network.parameters())
        assert 0 <= row["bytes_up"] - up <= (0.9 * parameters / 128 if "topk" in codec else 0)
        edge, slot = edge_of(run.context(client)), COPY if name == "feddistill" else "own"
        whole = run.strategy.facts.initial_weights("lenet:batch")
        instruction = RecordDict({"arrays": whole, "config": run.strategy.config(1)})
        assert upload_bytes(edge, instruction, slot) == row["bytes_up"]


def test_each_group_is_the_mean_of_what_its_own_clients_updates_make():
    sent = {}

    def look(instruction, reply):
        if instruction.metadata.message_type == "train":
            came = {n: a.numpy() for n, a in instruction.content["arrays"].items()}
            sent[instruction.metadata.dst_node_id - 2] = came, reply.content
        return reply

    specs = {0: "lenet:batch", 1: "cnn", 2: "lenet:batch"}
    settings = PLAIN["feddf"] | {"models": "lenet:batch,cnn", "rounds": 1}
    run = ran(look, **settings, update_codec="int8")
    coder, models = make_update_codec("int8"), {}
    for client, (came, content) in sent.items():
        network = build_model(specs[client], run.view.data.shape, 10, 0)
        names = [name for name in came if name in parameters_of(network)]
        assert set(content["arrays"]) == set(came) - set(names)
        shapes = [came[name].shape for name in names]
        changes = coder.decode(content["update"], shapes)
        models[client] = {
            name: came[name] + change for name, change in zip(names, changes, strict=True)
        }
    for spec, clients in (("lenet:batch", (0, 2)), ("cnn", (1,))):
        counts = [sent[client][1]["metrics"]["num-examples"] for client in clients]
        for name in models[clients[0]]:
            pairs = zip(counts, (models[client][name] for client in clients), strict=True)
            mean = sum(n * values.astype(np.float64) for n, values in pairs) / sum(counts)
            found = run.strategy.state.models[spec][name]
            np.testing.assert_allclose(found, mean, rtol=1e-6, atol=1e-8, err_msg=name)


def test_a_client_teaches_what_its_update_makes_of_the_model_and_who_skips_teaches_nothing(
    monkeypatch,
):
    taught, sent, rounds = [], {}, []
    answers = strategies.feddf.answers

    def watch(facts, spec, weights, indices, **more):
        taught.append({name: values.copy() for name, values in weights.items()})
        return answers(facts, spec, weights, indices, **more)

    def look(instruction, reply):
        if instruction.metadata.message_type == "train":
            at = instruction.content["config"]["server-round"]
            came = {n: a.numpy() for n, a in instruction.content["arrays"].items()}
            sent.setdefault(at, []).append((came, reply.content))
        return reply

    monkeypatch.setattr(strategies.feddf, "answers", watch)
    run = InProcessFederation(
        look, **SMALL | FEDDF, steps=2, update_codec="topk:0.3", relevance="0.55"
    )
    run.round_over = lambda round, arrays: rounds.append(len(taught))
    run.run()
    coder, names = make_update_codec("topk:0.3"), run.strategy.parameters
    wanted, skips, until = [], 0, []
    for replies in sent.values():
        for came, content in replies:
            if content["metrics"]["skipped"]:
                skips += 1
                continue
            moved = [name for name in came if name in names]
            changes = coder.decode(content["update"], [came[name].shape for name in moved])
            wanted.append(
                {name: came[name] + change for name, change in zip(moved, changes, strict=True)}
            )
        until.append(len(wanted))
    assert skips > 0 and rounds[1:] == until
    for ours, theirs in zip(taught, wanted, strict=True):
        for name, values in theirs.items():
            np.testing.assert_array_equal(ours[name], values, err_msg=name)


@both
def test_what_is_left_over_and_seen_outlives_a_restart(name):
    way = {"update_codec": "topk:0.05", "relevance": "0.5"}

    def restart(instruction, reply):
        run.start_anew(instruction.metadata.dst_node_id)
        return reply

    whole = ran(**PLAIN[name], **way)
    run = InProcessFederation(restart, **SMALL | PLAIN[name] | way)
    assert run.run()["digest"] == whole.summary["digest"]
    for client in range(3):
        assert {"residual", "seen"} <= run.context(client).state.keys()


@both
def test_an_update_in_another_codec_is_left_out_by_name(name):
    def other(instruction, reply):
        if instruction.metadata.message_type == "train" and instruction.metadata.dst_node_id == 3:
            del reply.content["update"]
        return reply

    run = ran(other, **PLAIN[name], update_codec="int8", rounds=1)
    (warning,) = run.warnings()
    assert "client 1 (" in warning
    assert "was left out: its update is not in the codec int8" in warning


@both
@pytest.mark.parametrize("way", [{"update_codec": "int8"}, {"relevance": "0.6"}], ids=str)
def test_where_no_weights_travel_it_is_refused(name, way):
    with pytest.raises(UsageError, match="is about weights, and with exchange=logits none travel"):
        make_plan({"strategy": name, **way}, local=True)
