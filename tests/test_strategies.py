"""The three algorithms, each with its own client half, over a grid within this process."""

import numpy as np
import pytest
import torch
from flwr.app import Array, MetricRecord
from inprocess import InProcessFederation

from fedkit.engine.plan import make_plan
from fedkit.engine.strategy import NetworkSize, Sizes
from fedkit.errors import UsageError
from fedkit.knowledge.consensus import Mean, Upload
from fedkit.models.build import build_model

SMALL = {"partition": "iid", "models": "lenet", "alone": False, "public": "digits:60"}
FEDAVG = {"strategy": "fedavg", "local_epochs": 1, "batch_size": 32, "learning_rate": 0.05}
FEDMD = {
    "strategy": "fedmd",
    "fuse": False,
    "init_epochs": 1,
    "digest_epochs": 1,
    "revisit_epochs": 1,
    "revisit_batch": 32,
}
KTPFL = {
    "strategy": "ktpfl",
    "local_epochs": 1,
    "distill_epochs": 1,
    "batch_size": 32,
    "learning_rate": 0.003,
    "temperature": 3.0,
}
ALL = pytest.mark.parametrize("settings", [FEDAVG, FEDMD, KTPFL], ids=lambda s: s["strategy"])


class Wire:
    """Sees every message, and changes or loses the replies that a test says.

    ``sent`` and ``received`` hold contents by (type, round, client); ``answered`` the arrays of the
    replies that were not lost, as the client sent them.
    """

    def __init__(self, change=None):
        self.change = change
        self.sent = {}
        self.received = {}
        self.answered = {}

    def __call__(self, instruction, reply):
        kind = instruction.metadata.message_type
        at = kind, int(instruction.metadata.group_id), instruction.metadata.dst_node_id - 2
        self.sent[at] = instruction.content
        assert reply.has_content(), reply.error.reason
        arrays = {name: numpy_of(record) for name, record in reply.content.array_records.items()}
        if self.change is not None:
            reply = self.change(*at, reply)
        if reply is not None:
            self.received[at], self.answered[at] = reply.content, arrays
        return reply

    def down(self, kind, record, round=1):
        """What each client was sent, by client."""
        return {
            client: numpy_of(content[record])
            for (of, at, client), content in self.sent.items()
            if (of, at) == (kind, round)
        }

    def up(self, kind, record, round=1):
        """What each client answered, by client."""
        return {
            client: arrays[record]
            for (of, at, client), arrays in self.answered.items()
            if (of, at) == (kind, round)
        }


def numpy_of(record):
    return {name: array.numpy() for name, array in record.items()}


def consensus(uploads):
    """Zbar of pairs of weight and scores."""
    return Mean()(Upload(weight, scores) for weight, scores in uploads).targets


def federation(change=None, **settings):
    wire = Wire(change)
    return InProcessFederation(wire, **{**SMALL, **settings}), wire


def ran(change=None, **settings):
    run, wire = federation(change, **settings)
    run.summary = run.run()
    return run, wire


def lose(kind, client, round=1):
    """A change that loses one reply."""

    def change(of, at, who, reply):
        return None if (of, at, who) == (kind, round, client) else reply

    return change


def replace_array(kind, client, record, name, make):
    """A change that puts another array (or ``Array``) into one client's replies."""

    def change(of, at, who, reply):
        if (of, who) == (kind, client):
            old = reply.content[record][name]
            new = make(old.numpy())
            reply.content[record][name] = new if isinstance(new, Array) else Array(new)
        return reply

    return change


def kept_model(run, client, slot="own"):
    return numpy_of(run.context(client).state[f"{slot}-model"])


def initial_model(run):
    return numpy_of(run.strategy.initial_arrays())


def global_model(run):
    return numpy_of(run.result.arrays)


def assert_same_bits(actual, wanted):
    assert list(actual) == list(wanted)
    for name in wanted:
        assert actual[name].dtype == wanted[name].dtype
        np.testing.assert_array_equal(actual[name], wanted[name], err_msg=name)


def differs(first, second):
    return any((first[name] != second[name]).any() for name in first)


def mean_by_hand(models, weights):
    """FedAvg's mean in plain float64; the maximum of integers."""
    total = float(sum(weights))
    return {
        name: max(model[name] for model in models)
        if np.issubdtype(models[0][name].dtype, np.integer)
        else sum(
            a / total * m[name].astype(np.float64) for a, m in zip(weights, models, strict=True)
        )
        for name in models[0]
    }


def assert_close(actual, wanted, tolerance=1e-6):
    for name in wanted:
        np.testing.assert_allclose(
            actual[name], wanted[name], rtol=tolerance, atol=tolerance, err_msg=name
        )


def examples_of(run):
    members = sorted(run.driver.roster.members.values(), key=lambda member: member.client)
    return [member.examples for member in members]


def empty_array(values):
    return Array(str(values.dtype), tuple(values.shape), "numpy.ndarray", b"")


# FedAvg


@pytest.mark.parametrize(
    ("clients", "model"), [(1, "lenet"), (1, "lenet:batch"), (3, "lenet:batch"), (7, "lenet")]
)
def test_fedavg_without_local_epochs_changes_no_bit(clients, model):
    run, _ = ran(**FEDAVG | {"local_epochs": 0}, clients=clients, model=model, rounds=2)
    assert_same_bits(global_model(run), initial_model(run))


@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_fedavg_is_the_weighted_mean(weighting):
    run, wire = ran(
        **FEDAVG,
        clients=3,
        rounds=1,
        weighting=weighting,
        model="lenet:batch",
        partition="dirichlet:0.3",
    )
    models, examples = list(wire.up("train", "arrays").values()), examples_of(run)
    assert len(set(examples)) > 1
    weights = examples if weighting == "examples" else [1, 1, 1]
    assert_close(global_model(run), mean_by_hand(models, weights))
    counters = [model["1.num_batches_tracked"] for model in models]
    assert len(set(map(int, counters))) > 1
    assert global_model(run)["1.num_batches_tracked"] == max(counters)


def test_fedavg_with_equal_examples_is_the_equal_mean():
    one, _ = ran(**FEDAVG, clients=4, rounds=1, weighting="examples")
    other, _ = ran(**FEDAVG, clients=4, rounds=1, weighting="equal")
    assert len(set(examples_of(one))) == 1
    assert_close(global_model(one), global_model(other), 1e-7)


def test_fedavg_goes_on_from_the_mean():
    run, wire = ran(**FEDAVG, clients=2, rounds=2)
    first = mean_by_hand(list(wire.up("train", "arrays").values()), examples_of(run))
    sent = wire.down("train", "arrays", round=2)
    assert_close(sent[0], first)
    assert_same_bits(sent[0], sent[1])


def test_fedavg_without_a_reply_is_the_mean_of_the_others():
    run, wire = ran(lose("train", 1), **FEDAVG, clients=3, rounds=1)
    models = wire.up("train", "arrays")
    assert sorted(models) == [0, 2]
    weights = [examples_of(run)[client] for client in models]
    assert_close(global_model(run), mean_by_hand(list(models.values()), weights))
    assert any("client 1" in text for text in run.warnings())


def test_fedavg_keeps_the_model_when_nobody_answers():
    def change(kind, round, client, reply):
        return None if kind == "train" else reply

    run, _ = ran(change, **FEDAVG, clients=2, rounds=2)
    assert_same_bits(global_model(run), initial_model(run))
    assert run.summary["rounds"] == 2


def test_fedavg_does_not_depend_on_the_order_of_replies():
    usual, _ = ran(**FEDAVG, clients=3, rounds=2)
    run, _ = federation(**FEDAVG, clients=3, rounds=2)
    pull = run.grid.pull_messages
    run.grid.pull_messages = lambda ids: pull(ids)[::-1]
    run.run()
    assert_same_bits(global_model(run), global_model(usual))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda values: np.where(values > 0, np.nan, values).astype(np.float32), "not finite"),
        (lambda values: np.full_like(values, np.inf), "not finite"),
        (lambda values: values[:-1], "(5,)"),
        (lambda values: values[:, None], "(6, 1)"),
        (lambda values: values.astype(np.float64), "float64"),
        (lambda values: values.astype(np.int32), "int32"),
        (empty_array, "0.bias"),
        (lambda values: Array("float32", (6,), "torch.tensor", b""), "0.bias"),
        (lambda values: Array("float32", (6,), "numpy.ndarray", b"PK\3\4 no zip"), "0.bias"),
    ],
    ids=["nan", "inf", "short", "wide", "float64", "int32", "empty", "stype", "zip"],
)
def test_fedavg_refuses_bad_weights_by_name_and_goes_on(make, reason):
    change = replace_array("train", 1, "arrays", "0.bias", make)
    run, wire = ran(change, **FEDAVG, clients=2, rounds=1)
    assert any("client 1 (lenet)" in text and reason in text for text in run.warnings())
    assert_same_bits(global_model(run), wire.up("train", "arrays")[0])
    assert run.summary["mean_global_accuracy"] is not None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.pop("arrays"),
        lambda content: content["arrays"].pop("0.bias"),
        lambda content: content["arrays"].update({"more": Array(np.zeros(1))}),
        lambda content: content.pop("metrics"),
        lambda content: content.update({"metrics": MetricRecord({"num-examples": -5})}),
        lambda content: content.update({"metrics": MetricRecord({"num-examples": float("nan")})}),
        lambda content: content["metrics"].update({"num-examples": 2**62}),
    ],
    ids=[
        "no arrays",
        "one missing",
        "one more",
        "no metrics",
        "negative",
        "nan",
        "too many",
    ],
)
def test_fedavg_refuses_a_reply_that_is_no_model(spoil):
    def change(kind, round, client, reply):
        if kind == "train" and client == 0:
            spoil(reply.content)
        return reply

    run, wire = ran(change, **FEDAVG, clients=2, rounds=1)
    assert_same_bits(global_model(run), wire.up("train", "arrays")[1])
    assert any("client 0 (lenet)" in text for text in run.warnings())


def test_fedavg_gives_no_weight_to_clients_without_samples():
    """Four private samples for four clients: each keeps its only one for measuring."""
    run, _ = ran(**FEDAVG, clients=4, rounds=1, public="digits:1396")
    assert examples_of(run) == [0, 0, 0, 0]
    assert_same_bits(global_model(run), initial_model(run))


def test_fedavg_with_one_full_batch_is_a_step_of_central_sgd():
    rate = 0.1
    run, _ = ran(**FEDAVG | {"batch_size": 10_000, "learning_rate": rate}, clients=4, rounds=1)
    shards = [run.view.data.shard(number).train for number in range(4)]
    assert len({len(shard) for shard in shards}) == 1
    settings, data = run.plan.federation, run.view.data
    central = build_model("lenet", data.shape, data.outputs, settings.seed)
    assert_same_bits(
        {name: tensor.numpy() for name, tensor in central.state_dict().items()},
        initial_model(run),
    )
    inputs = torch.cat([shard.inputs(slice(None)) for shard in shards])
    labels = torch.cat([shard.labels for shard in shards])
    torch.nn.functional.cross_entropy(central(inputs), labels).backward()
    stepped = {name: (p - rate * p.grad).detach() for name, p in central.named_parameters()}
    assert differs({name: p.numpy() for name, p in stepped.items()}, initial_model(run))
    assert_close(global_model(run), stepped, 1e-5)


def test_fedavg_of_a_share_asks_that_many_clients():
    _, wire = ran(**FEDAVG | {"local_epochs": 0}, clients=4, rounds=4, select="uniform:0.5")
    asked = [sorted(wire.down("train", "arrays", round)) for round in range(1, 5)]
    assert [len(clients) for clients in asked] == [2, 2, 2, 2]
    assert len({tuple(clients) for clients in asked}) > 1


# FedMD


@pytest.mark.parametrize("clients", [1, 3, 7])
def test_consensus_of_identical_scores_is_those_scores(clients):
    scores = np.random.default_rng(1).standard_normal((60, 10)).astype(np.float32)

    def change(kind, round, client, reply):
        if kind == "query.logits":
            reply.content["logits"]["values"] = Array(scores)
        return reply

    _, wire = ran(change, **FEDMD | {"digest_epochs": 0}, clients=clients, rounds=1)
    sent = wire.down("train.digest", "target")
    assert len(sent) == clients
    for record in sent.values():
        np.testing.assert_array_equal(record["values"], scores)


@pytest.mark.parametrize(("model", "digest_batch"), [("lenet", 60), ("lenet", 16), ("cnn", 16)])
def test_one_client_digests_its_own_scores_without_moving(model, digest_batch):
    """The L1 gradient is exactly 0 there, so that not even Adam takes a step."""
    settings = FEDMD | {"revisit_epochs": 0, "digest_batch": digest_batch}
    settings |= {"clients": 1, "rounds": 1, "models": model}
    still, _ = ran(**settings | {"digest_epochs": 0})
    run, _ = ran(**settings | {"digest_epochs": 5})
    assert_same_bits(kept_model(run, 0), kept_model(still, 0))


@pytest.mark.parametrize("weighting", ["equal", "examples"])
def test_consensus_is_the_mean_of_the_uploads(weighting):
    run, wire = ran(**FEDMD, clients=3, rounds=2, weighting=weighting, partition="dirichlet:0.3")
    weights = examples_of(run) if weighting == "examples" else [1, 1, 1]
    for round in (1, 2):
        uploads = [record["values"] for record in wire.up("query.logits", "logits", round).values()]
        wanted = np.average(np.array(uploads, dtype=np.float64), axis=0, weights=weights)
        for record in wire.down("train.digest", "target", round).values():
            np.testing.assert_allclose(record["values"], wanted, rtol=1e-6, atol=1e-6)


def test_consensus_has_no_favourites_and_no_origin():
    generator = np.random.default_rng(2)
    uploads = [
        (float(generator.integers(1, 100)), generator.standard_normal((20, 5)).astype(np.float32))
        for _ in range(4)
    ]
    mean = consensus(uploads)
    np.testing.assert_array_max_ulp(consensus(uploads[::-1]), mean, maxulp=1)
    shifted = consensus((weight, scores + np.float32(2)) for weight, scores in uploads)
    np.testing.assert_allclose(shifted, mean + 2, atol=1e-6)
    without = consensus([(0.0, np.full((20, 5), 1e30, np.float32)), *uploads])
    np.testing.assert_array_equal(without, mean)


def test_fedmd_in_probability_space_agrees_on_distributions():
    _, wire = ran(**FEDMD, clients=3, rounds=1, space="prob", temperature=2.0)
    uploads = wire.up("query.logits", "logits")
    for record in [*uploads.values(), *wire.down("train.digest", "target").values()]:
        assert (record["values"] >= 0).all()
        np.testing.assert_allclose(record["values"].sum(axis=1), 1, atol=1e-6)


def test_fedmd_without_a_client_is_the_consensus_of_the_others():
    run, wire = ran(lose("query.logits", 1), **FEDMD, clients=3, rounds=1)
    uploads = wire.up("query.logits", "logits")
    sent = wire.down("train.digest", "target")
    assert sorted(uploads) == sorted(sent) == [0, 2]
    wanted = (uploads[0]["values"].astype(np.float64) + uploads[2]["values"]) / 2
    np.testing.assert_allclose(sent[0]["values"], wanted, rtol=1e-6, atol=1e-6)
    # The others answer what they would have answered anyway; the absent one stays where it was.
    whole, usual = ran(**FEDMD, clients=3, rounds=1)
    for client in (0, 2):
        np.testing.assert_array_equal(
            uploads[client]["values"], usual.up("query.logits", "logits")[client]["values"]
        )
        assert differs(kept_model(run, client), kept_model(whole, client))
    trained, _ = ran(**FEDMD | {"digest_epochs": 0, "revisit_epochs": 0}, clients=3, rounds=1)
    assert_same_bits(kept_model(run, 1), kept_model(trained, 1))


def test_fedmd_takes_the_absent_back_in_the_next_round():
    _, wire = ran(lose("query.logits", 1), **FEDMD, clients=3, rounds=2)
    assert sorted(wire.down("train.digest", "target", round=2)) == [0, 1, 2]
    assert not [at for at in wire.sent if at[:2] == ("train.init", 2)]


def test_fedmd_asks_for_no_scores_before_the_initial_training():
    _, wire = ran(lose("train.init", 0), **FEDMD, clients=2, rounds=2)
    assert sorted(wire.up("query.logits", "logits", round=1)) == [1]
    assert [at for at in wire.sent if at[:2] == ("train.init", 2)] == [("train.init", 2, 0)]
    assert sorted(wire.up("query.logits", "logits", round=2)) == [0, 1]


def test_fedmd_without_any_scores_digests_nothing():
    def change(kind, round, client, reply):
        return None if kind == "query.logits" else reply

    run, wire = ran(change, **FEDMD, clients=2, rounds=2)
    assert not [at for at in wire.sent if at[0] == "train.digest"]
    assert run.summary["rounds"] == 2


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda values: np.where(values > 0, np.nan, values).astype(np.float32), "not all finite"),
        (lambda values: np.full_like(values, -np.inf), "not all finite"),
        (lambda values: values[:-1], "(59, 10)"),
        (lambda values: values[:, :-1], "(60, 9)"),
        (lambda values: values.astype(np.float16), "float16"),
        (empty_array, "codec float32"),
        (lambda values: Array("float32", (60, 10), "numpy.ndarray", b"PK\3\4 no zip"), "codec"),
    ],
    ids=["nan", "inf", "rows", "classes", "float16", "empty", "zip"],
)
def test_fedmd_refuses_bad_scores_by_name_and_goes_on(make, reason):
    change = replace_array("query.logits", 1, "logits", "values", make)
    run, wire = ran(change, **FEDMD, clients=2, rounds=1, models="lenet,cnn")
    assert any("client 1 (cnn)" in text and reason in text for text in run.warnings())
    sent = wire.down("train.digest", "target")
    assert sorted(sent) == [0]
    np.testing.assert_array_equal(sent[0]["values"], wire.up("query.logits", "logits")[0]["values"])


def test_ktpfl_goes_on_without_predictions_that_are_not_finite():
    reason = "not all finite"
    change = replace_array("train.local", 1, "logits", "values", lambda v: np.full_like(v, np.nan))
    run, wire = ran(change, **KTPFL, clients=2, rounds=1, models="lenet,cnn")
    assert any("client 1 (cnn)" in text and reason in text for text in run.warnings())
    assert sorted(wire.down("train.distill", "target")) == [0]
    assert run.strategy.state.coefficients.tolist() == [[1.0]]


def test_fedmd_keeps_two_adam_states_as_long_as_the_model():
    """Digest has one; revisit goes on from the initial training."""
    settings = FEDMD | {"init_epochs": 3, "digest_epochs": 2, "digest_batch": 20}
    run, _ = ran(**settings, clients=2, rounds=2, init_batch=32)
    batches = -(-examples_of(run)[0] // 32)
    state = run.context(0).state
    assert state["own-digest-optimiser"]["0/step"].numpy() == 2 * 2 * 3
    assert state["own-private-optimiser"]["0/step"].numpy() == 3 * batches + 2 * batches


@pytest.mark.parametrize("settings", [FEDAVG, KTPFL], ids=lambda s: s["strategy"])
def test_other_optimisers_start_afresh(settings):
    run, _ = ran(**settings, clients=2, rounds=1)
    assert not [name for name in run.context(0).state if "optimiser" in name]


@pytest.mark.parametrize(
    ("settings", "kind", "target"),
    [(FEDMD, "query.logits", "train.digest"), (KTPFL, "train.local", "train.distill")],
    ids=["fedmd", "ktpfl"],
)
def test_an_answer_to_another_subset_is_refused(settings, kind, target):
    def change(of, round, client, reply):
        if of == kind and client == 0:
            reply.content["answer"]["subset-digest"] = "0" * 16
        return reply

    run, wire = ran(change, **settings, clients=2, rounds=1)
    assert any("client 0 (lenet)" in text and "subset" in text for text in run.warnings())
    assert [at[2] for at in wire.sent if at[0] == target] == [1]


@pytest.mark.parametrize(
    ("settings", "kind", "target"),
    [(FEDMD, "query.logits", "train.digest"), (KTPFL, "train.local", "train.distill")],
    ids=["fedmd", "ktpfl"],
)
def test_both_sides_mean_the_same_subset(settings, kind, target):
    _, wire = ran(**settings, clients=2, rounds=2, public_samples=20)
    subsets = []
    for round in (1, 2):
        first, second = (r["indices"] for r in wire.down(kind, "subset", round).values())
        np.testing.assert_array_equal(first, second)
        assert len(first) == 20
        assert (np.diff(first) > 0).all()
        subsets.append(first.tolist())
        digests = {
            content["config"]["subset-digest"]
            for at, content in wire.sent.items()
            if at[:2] == (target, round)
        }
        answers = {
            content["answer"]["subset-digest"]
            for at, content in wire.received.items()
            if at[:2] == (kind, round)
        }
        assert len(digests) == 1
        assert answers == digests
    assert subsets[0] != subsets[1]


def test_fedmd_draws_each_public_label_by_its_share():
    settings = FEDMD | {"pretrain_epochs": 0, "stratified": True, "public_labels": True}
    run, wire = ran(**settings, clients=2, rounds=1, public="digits:200", public_samples=50)
    labels = run.view.data.public.labels.numpy()
    indices = wire.down("query.logits", "subset")[0]["indices"]
    taken = np.bincount(labels[indices], minlength=10)
    assert (np.abs(taken - np.bincount(labels, minlength=10) / 4) < 1).all()


def test_drawing_by_label_needs_labels():
    with pytest.raises(UsageError, match="public-labels=true"):
        make_plan({**FEDMD, "stratified": True}, local=True)


# KT-pFL


@pytest.mark.parametrize("temperature", [1.0, 3.0, 10.0])
def test_frozen_uniform_matrix_is_fedmd(temperature):
    settings = KTPFL | {"update": "none", "temperature": temperature}
    run, wire = ran(**settings, clients=3, rounds=2, models="lenet,cnn", partition="dirichlet:0.3")
    np.testing.assert_allclose(run.strategy.state.coefficients, np.full((3, 3), 1 / 3), rtol=1e-15)
    for round in (1, 2):
        soft = [r["values"] for r in wire.up("train.local", "logits", round).values()]
        wanted = consensus((1.0, predictions) for predictions in soft)
        targets = wire.down("train.distill", "target", round)
        assert len(targets) == 3
        for record in targets.values():
            np.testing.assert_array_max_ulp(record["values"], wanted, maxulp=1)


def test_ktpfl_and_fedmd_tell_the_same_probabilities():
    """From equal models: space=prob at one temperature is KT-pFL's soft prediction."""
    fedmd = FEDMD | {"init_epochs": 0, "space": "prob", "temperature": 3.0}
    _, one = ran(**fedmd, clients=2, rounds=1)
    _, other = ran(**KTPFL | {"local_epochs": 0}, clients=2, rounds=1)
    first, second = one.up("query.logits", "logits"), other.up("train.local", "logits")
    for client in (0, 1):
        np.testing.assert_array_equal(first[client]["values"], second[client]["values"])


def test_unit_matrix_sends_everyone_their_own():
    def change(kind, round, client, reply):
        if (kind, round) == ("train.local", 2):
            run.strategy.state.coefficients = np.eye(3)
        return reply

    run, wire = federation(change, **KTPFL | {"update": "none"}, clients=3, rounds=2)
    run.run()
    soft, targets = wire.up("train.local", "logits", 2), wire.down("train.distill", "target", 2)
    for client in range(3):
        np.testing.assert_array_equal(targets[client]["values"], soft[client]["values"])


@pytest.mark.parametrize("update", ["projection", "softmax"])
def test_matrix_rows_stay_on_the_simplex(update):
    settings = KTPFL | {"update": update, "matrix_rate": 0.5, "distill_epochs": 0}
    run, wire = ran(**settings, clients=4, rounds=3, partition="dirichlet:0.3")
    rows = [event for event in run.events if event.event == "coefficients"]
    assert [(e.round, e.client) for e in rows] == [(r, c) for r in (1, 2, 3) for c in range(4)]
    for event in rows:
        assert min(event.value) >= 0
        assert sum(event.value) == pytest.approx(1, abs=1e-6)
    assert np.abs(run.strategy.state.coefficients - 0.25).max() > 1e-4
    # Everyone learns from its own row, as it is after the update.
    soft = [r["values"] for r in wire.up("train.local", "logits", 3).values()]
    for client, record in wire.down("train.distill", "target", 3).items():
        wanted = np.tensordot(rows[8 + client].value, np.array(soft, dtype=np.float64), axes=1)
        np.testing.assert_allclose(record["values"], wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("update", ["projection", "softmax"])
def test_an_absent_clients_row_and_column_stay_to_the_bit(update):
    before = []

    def change(kind, round, client, reply):
        if (kind, round) == ("train.local", 2) and client == 0:
            before.append(run.strategy.state.coefficients.copy())
        return None if (kind, round, client) == ("train.local", 2, 1) else reply

    settings = KTPFL | {"update": update, "matrix_rate": 0.5, "distill_epochs": 0}
    run, wire = federation(change, **settings, clients=3, rounds=2, partition="dirichlet:0.3")
    run.run()
    (old,), new = before, run.strategy.state.coefficients
    np.testing.assert_array_equal(new[1], old[1])
    np.testing.assert_array_equal(new[:, 1], old[:, 1])
    for row in (0, 2):
        assert (new[row, [0, 2]] != old[row, [0, 2]]).any()
        assert new[row].sum() == pytest.approx(1, abs=1e-12)
    # Those present share out what they put on each other.
    soft, targets = wire.up("train.local", "logits", 2), wire.down("train.distill", "target", 2)
    assert sorted(targets) == [0, 2]
    for row in (0, 2):
        share = new[row, 0] / (new[row, 0] + new[row, 2])
        wanted = share * soft[0]["values"].astype(float) + (1 - share) * soft[2]["values"]
        np.testing.assert_allclose(targets[row]["values"], wanted, rtol=1e-6, atol=1e-7)


def test_who_puts_nothing_on_those_present_learns_from_all_of_them_alike():
    def change(kind, round, client, reply):
        if (kind, round, client) == ("train.local", 2, 0):
            run.strategy.state.coefficients = np.array([[0.0, 1, 0], [0, 1, 0], [0, 0, 1]])
        return None if (kind, round, client) == ("train.local", 2, 1) else reply

    run, wire = federation(change, **KTPFL, clients=3, rounds=2)
    run.run()
    soft, targets = wire.up("train.local", "logits", 2), wire.down("train.distill", "target", 2)
    assert np.isfinite(run.strategy.state.coefficients).all()
    assert run.strategy.state.coefficients[0].tolist() == [0, 1, 0]
    assert sorted(targets) == [0, 2]
    assert (np.abs(targets[0]["values"] - soft[0]["values"]) > 1e-6).any()


@pytest.mark.parametrize("update", ["projection", "softmax", "none"])
def test_joining_later_grows_the_matrix(update):
    sizes = {}

    def change(kind, round, client, reply):
        if kind == "train.distill":
            sizes[round] = run.strategy.state.coefficients.shape
            run.grid.absent.clear()
        return reply

    settings = KTPFL | {"update": update, "distill_epochs": 0}
    run, wire = federation(change, **settings, clients=3, rounds=2, min_clients=2)
    run.grid.absent.add(2)  # client 0
    run.run()
    assert sizes == {1: (2, 2), 2: (3, 3)}
    assert sorted(wire.down("train.distill", "target", 1)) == [1, 2]
    assert sorted(wire.down("train.distill", "target", 2)) == [0, 1, 2]
    c = run.strategy.state.coefficients
    assert (c >= 0).all()
    np.testing.assert_allclose(c.sum(axis=1), 1, atol=1e-6)
    if update == "none":
        np.testing.assert_allclose(c, np.full((3, 3), 1 / 3), rtol=1e-12)


def test_a_lost_reply_of_everyone_leaves_the_matrix():
    before = []

    def change(kind, round, client, reply):
        if round == 2 and not before:
            before.append(run.strategy.state.coefficients.copy())
        return None if (kind, round) == ("train.local", 2) else reply

    run, wire = federation(change, **KTPFL | {"distill_epochs": 0}, clients=2, rounds=3)
    summary = run.run()
    assert not wire.down("train.distill", "target", 2)
    assert summary["rounds"] == 3
    assert before[0].shape == (2, 2)


@pytest.mark.parametrize("update", ["projection", "softmax"])
def test_clients_without_training_samples_do_not_spoil_the_matrix(update):
    """Each keeps its only sample for measuring: n_n / n is then 0 / 0."""
    settings = KTPFL | {"update": update}
    run, _ = ran(**settings, clients=2, rounds=1, public="digits:1398", public_samples=60)
    assert examples_of(run) == [0, 0]
    c = run.strategy.state.coefficients
    assert np.isfinite(c).all()
    np.testing.assert_allclose(c.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(("top", "epochs"), [(3, [1, 1, 2, 3]), (2, [1, 1, 2, 2]), (0, [0] * 4)])
def test_local_epochs_climb_a_ramp(top, epochs):
    settings = KTPFL | {"local_epochs": top, "epoch_ramp": True, "batch_size": 512}
    _, wire = ran(**settings, clients=1, rounds=4)
    told = [wire.sent["train.local", round, 0]["config"]["local-epochs"] for round in range(1, 5)]
    assert told == epochs


def test_local_epochs_without_a_ramp_are_the_same_in_each_round():
    settings = KTPFL | {"local_epochs": 2, "epoch_ramp": False, "batch_size": 512}
    _, wire = ran(**settings, clients=1, rounds=3)
    told = [wire.sent["train.local", round, 0]["config"]["local-epochs"] for round in range(1, 4)]
    assert told == [2, 2, 2]


# All three


@ALL
def test_the_same_seed_gives_the_same_digest(settings):
    digests = [
        ran(**settings, clients=2, rounds=1, models="lenet,cnn", seed=seed)[0].summary["digest"]
        for seed in (1, 1, 2)
    ]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


@ALL
@pytest.mark.parametrize("models", ["lenet", "cnn"])
def test_measured_bytes_are_those_that_the_strategy_tells(settings, models):
    if settings["strategy"] != "fedavg":
        settings = settings | {"public_samples": 50}
    run, _ = ran(**settings, clients=2, rounds=2, models=models, model=models)
    data = run.view.data
    model = build_model(models, data.shape, data.outputs, run.plan.federation.seed)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    up, down = run.strategy.traffic(
        run.plan.hyper,
        Sizes(NetworkSize(size), NetworkSize(size), data.outputs, len(data.public), "float32"),
    )
    assert run.summary["bytes_up"] == 2 * 2 * up
    assert run.summary["bytes_down"] == 2 * 2 * down
    for client in run.summary["clients"]:
        assert (client["bytes_up"], client["bytes_down"]) == (2 * up, 2 * down)
    if settings["strategy"] == "fedavg":
        assert (up, down) == (size, size)
    else:
        assert (up, down) == (4 * 50 * 10, 4 * 50 * 10 + 4 * 50)


@pytest.mark.parametrize("settings", [FEDMD, KTPFL], ids=lambda s: s["strategy"])
def test_half_precision_halves_the_logits(settings):
    run, _ = ran(**settings, clients=2, rounds=1, codec="float16")
    up, down = run.strategy.traffic(
        run.plan.hyper, Sizes(NetworkSize(0), NetworkSize(0), 10, 60, "float16")
    )
    assert (up, down) == (2 * 60 * 10, 2 * 60 * 10 + 4 * 60)
    assert (run.summary["bytes_up"], run.summary["bytes_down"]) == (2 * up, 2 * down)
    assert not run.warnings()


@pytest.mark.parametrize(
    "settings",
    [
        FEDAVG | {"clients": 1},
        FEDMD | {"clients": 2, "digest_epochs": 0},
        KTPFL | {"clients": 2, "distill_epochs": 0},
    ],
    ids=lambda s: s["strategy"],
)
def test_where_the_exchange_teaches_nothing_everyone_is_alone(settings):
    """The reference does the same local work from the same start, to the bit."""
    run, _ = ran(**settings | {"alone": True}, rounds=2, partition="dirichlet:0.3")
    for client in range(settings["clients"]):
        assert_same_bits(kept_model(run, client), kept_model(run, client, "alone"))


@ALL
def test_the_reference_does_not_change_the_run(settings):
    accuracies = [
        [
            client["global_accuracy"]
            for client in ran(**settings | {"alone": alone}, clients=2, rounds=1)[0].summary[
                "clients"
            ]
        ]
        for alone in (False, True)
    ]
    assert accuracies[0] == accuracies[1]


@ALL
def test_no_label_of_the_public_set_is_used(settings):
    """Unlabelled public data: other labels, the same run."""
    digests = []
    for wrong in (False, True):
        run, _ = federation(**settings, clients=2, rounds=1)
        labels = run.view.data.public.labels
        if wrong:
            labels.fill_(0)
        digests.append(run.run()["digest"])
    assert digests[0] == digests[1]


@ALL
def test_a_client_may_miss_a_whole_round(settings):
    models = {}

    def change(kind, round, client, reply):
        if (kind, client) == ("evaluate", 0):
            # The rounds without client 1 begin and end here.
            run.grid.absent = {3} if round == 1 else set()
            models[round] = kept_model(run, 1)
        return reply

    run, wire = federation(change, **settings, clients=2, rounds=3, min_clients=1)
    run.run()
    asked = [sorted({at[2] for at in wire.sent if at[1] == round}) for round in (1, 2, 3)]
    assert asked == [[0, 1], [0], [0, 1]]
    assert_same_bits(models[2], models[1])
    assert differs(models[3], models[2])
    # Whether so few steps of digesting show is a matter of rounding, and of the processor.
    assert not [text for text in run.warnings() if "digesting has stalled" not in text]


@ALL
def test_a_client_rebuilt_from_its_state_goes_on_as_it_would_have(settings):
    """``Context.state`` holds all that matters: here every instruction finds a new process."""

    def change(kind, round, client, reply):
        del run.context(client)._fedkit_edge
        return reply

    usual, _ = ran(**settings | {"alone": True}, clients=2, rounds=2)
    run, _ = federation(change, **settings | {"alone": True}, clients=2, rounds=2)
    assert run.run()["digest"] == usual.summary["digest"]


@ALL
def test_means_are_over_those_who_measured(settings):
    """Of two clients one has no validation data, because its shard is small."""

    def change(kind, round, client, reply):
        if (kind, client) == ("evaluate", 0):
            metrics = reply.content["metrics"]
            for name in [name for name in metrics if "/own_val/" in name]:
                del metrics[name]
        return reply

    run, wire = ran(change, **settings, clients=2, rounds=1, val_fraction=0.2)
    means = run.result.evaluate_metrics_clientapp[1]
    measured = wire.received["evaluate", 1, 1]["metrics"]
    (name,) = [name for name in means if name.endswith("/own_val/accuracy")]
    assert means[name] == pytest.approx(measured[name])


@ALL
def test_an_evaluation_without_metrics_does_not_end_the_run(settings):
    def change(kind, round, client, reply):
        if (kind, client) == ("evaluate", 0):
            del reply.content["metrics"]
        return reply

    run, _ = ran(change, **settings, clients=2, rounds=2)
    assert run.summary["rounds"] == 2
    assert run.summary["clients"][1]["personal_accuracy"] is not None


# Do they learn?

LEARNING = {
    "partition": "dirichlet:0.3",
    "models": "lenet,cnn",
    "alone": True,
    "eval_every": 100,
    "seed": 1,
}


def alone_accuracy(summary):
    return np.mean([client["alone_global_accuracy"] for client in summary["clients"]])


def test_fedavg_learns():
    settings = FEDAVG | {"local_epochs": 3, "batch_size": 10}
    run, _ = ran(**settings | LEARNING, clients=3, rounds=6)
    assert run.summary["mean_global_accuracy"] > 0.7
    assert run.summary["mean_global_accuracy"] > alone_accuracy(run.summary) + 0.1


@pytest.mark.slow
def test_fedmd_learns_more_than_alone():
    settings = FEDMD | {"init_epochs": 15, "init_batch": 16, "learning_rate": 0.003}
    settings |= {"digest_epochs": 5, "digest_batch": 32, "revisit_epochs": 4, "revisit_batch": 16}
    run, _ = ran(**settings | LEARNING | {"public": "digits:800"}, clients=4, rounds=5)
    assert run.summary["mean_global_accuracy"] > alone_accuracy(run.summary) + 0.04


def test_ktpfl_learns_more_than_alone():
    settings = KTPFL | {"local_epochs": 3, "distill_epochs": 6, "distill_batch": 64}
    settings |= {"distill_weight": 9.0, "optimiser": "adam", "update": "projection"}
    run, _ = ran(**settings | LEARNING | {"public": "digits:400"}, clients=3, rounds=5)
    assert run.summary["mean_global_accuracy"] > alone_accuracy(run.summary) + 0.1
