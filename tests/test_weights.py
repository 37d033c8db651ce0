"""Noise-robust weights: their formula, what they leave alone, and what a broken sensor comes to weigh."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inprocess import InProcessFederation

from clients.edge import edge_of
from fedkit.engine.strategy_state import load_state, save_state
from strategies.fedavg import FedAvgState
from strategies.robust import factor, ratios

SMALL = {
    "strategy": "fedavg",
    "model": "logistic",
    "partition": "iid",
    "public": "digits:60",
    "clients": 5,
    "rounds": 4,
    "num_shards": 10,
    "local_epochs": 1,
    "batch_size": 16,
    "learning_rate": 0.1,
    "eval_every": 4,
}


def ran(tamper=None, **more):
    run = InProcessFederation(tamper, **{**SMALL, **more})
    run.summary = run.run()
    return run


def bits(run):
    return [(name, array.numpy().tobytes()) for name, array in run.result.arrays.items()]


def factors(run, round):
    told = [e for e in run.events if e.name == "weight_factor" and e.round == round]
    return {e.client: e.value for e in told}


def telling(*values):
    """A change that lets each client tell such a part of unexplained labels."""

    def change(instruction, reply):
        if instruction.metadata.message_type == "train":
            client = instruction.metadata.dst_node_id - 2
            reply.content["metrics"]["unexplained"] = values[client]
        return reply

    return change


@given(st.floats(0, 1e6))
def test_a_weight_falls_only_beyond_what_is_usual(ratio):
    assert factor(ratio) == (1.0 if ratio <= 1.2 else (1.2 / ratio) ** 4)
    assert 0 < factor(ratio) <= 1


def test_ratios_are_to_the_median_and_need_three_clients():
    assert ratios({0: 1.0, 3: 2.0, 5: 8.0}) == {0: 0.5, 3: 1.0, 5: 4.0}
    assert ratios({0: 1.0, 3: 2.0}) == {}
    assert ratios({0: 0.0, 1: 0.0, 2: 5.0}) == {}


@pytest.mark.parametrize("weighting", ["equal", "examples"])
def test_where_all_explain_their_labels_alike_it_is_the_plain_mean_to_the_bit(weighting):
    same = telling(*[0.37] * 5)
    assert bits(ran(same, robust=True, weighting=weighting)) == bits(ran(weighting=weighting))


def test_a_round_is_weighted_by_what_was_told_before():
    """Round 1 counts whole; then by the mean, in which the last round has half the weight."""
    wire, after = {}, {}

    def look(instruction, reply):
        told = telling(1.0, 1.0, 1.0, 1.0, 2.0)(instruction, reply)
        if instruction.metadata.message_type == "train":
            at = int(instruction.metadata.group_id), instruction.metadata.dst_node_id - 2
            arrays = {name: a.numpy() for name, a in reply.content["arrays"].items()}
            wire[at] = reply.content["metrics"]["num-examples"], arrays
        return told

    run = InProcessFederation(look, **{**SMALL, "rounds": 2}, robust=True)
    run.round_over = lambda round, arrays: after.setdefault(
        round, {name: array.numpy() for name, array in arrays.items()}
    )
    run.run()
    assert factors(run, 1) == {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 0.6**4}
    for round, last in ((1, 1.0), (2, 0.6**4)):
        weights = [wire[round, c][0] * (last if c == 4 else 1.0) for c in range(5)]
        for name, values in after[round].items():
            models = (wire[round, c][1][name].astype(np.float64) for c in range(5))
            mean = sum(a * w for a, w in zip(weights, models, strict=True)) / sum(weights)
            np.testing.assert_allclose(values, mean, rtol=1e-6, atol=1e-9)


def test_what_a_client_tells_is_its_loss_over_the_entropy_of_its_labels():
    told = {}

    def look(instruction, reply):
        if instruction.metadata.message_type == "train":
            told[instruction.metadata.dst_node_id - 2] = reply.content["metrics"]
        return reply

    run = ran(look, robust=True, rounds=1, partition="dirichlet:0.5")
    for client in range(5):
        labels = edge_of(run.context(client)).private.train.labels.numpy()
        shares = np.bincount(labels) / len(labels)
        entropy = -sum(p * math.log(p) for p in shares if p)
        wanted = told[client]["train_loss"] / entropy
        assert told[client]["unexplained"] == pytest.approx(wanted)


def test_depth_costs_nobody_weight():
    """Exits that know nothing leave everything unexplained, however many of them a client has."""
    told = {}

    def look(instruction, reply):
        if instruction.metadata.message_type == "train":
            told[instruction.metadata.dst_node_id - 2] = reply.content["metrics"]
        return reply

    deep = {"strategy": "depthfl", "model": "lenet", "depths": "1,4,2,4,3", "partition": "iid"}
    run = ran(look, **deep, robust=True, rounds=1, exit_weights="1,0.5", learning_rate=1e-6)
    for client, depth in enumerate((1, 4, 2, 4, 3)):
        labels = edge_of(run.context(client)).private.train.labels.numpy()
        shares = np.bincount(labels) / len(labels)
        entropy = -sum(p * math.log(p) for p in shares if p)
        per_exit = told[client]["train_loss"] / (1 + 0.5 * (depth - 1))
        assert told[client]["unexplained"] == pytest.approx(per_exit / entropy)
        assert told[client]["unexplained"] == pytest.approx(1, abs=0.1)
    assert told[1]["train_loss"] > 2 * told[0]["train_loss"]


def test_who_did_no_epoch_tells_nothing():
    """Else what it leaves unexplained would be nothing, and everybody else's noise."""
    told = {}

    def look(instruction, reply):
        if instruction.metadata.message_type == "train":
            told[instruction.metadata.dst_node_id - 2] = "unexplained" in reply.content["metrics"]
        return reply

    ran(look, strategy="fedprox", work="fixed:0,1,1,1,1", robust=True, rounds=1)
    assert told == {0: False, 1: True, 2: True, 3: True, 4: True}


@pytest.mark.parametrize("nonsense", [math.nan, -1.0, 1e300, math.inf])
def test_nonsense_is_not_judged_and_judges_nobody(nonsense):
    run = ran(telling(1.0, 1.0, nonsense, 1.0, 1.0), robust=True, rounds=2)
    assert factors(run, 2) == {0: 1.0, 1: 1.0, 3: 1.0, 4: 1.0}


def test_who_has_one_class_only_is_not_judged():
    run = ran(robust=True, partition="classes:1", num_shards=10, rounds=2)
    assert not [e for e in run.events if e.name in ("unexplained", "weight_factor")]


def test_a_broken_sensor_comes_to_weigh_less_and_an_honest_one_stays():
    run = ran(robust=True, corrupt="none,none,noise:3,none,none")
    last = factors(run, 4)
    assert last[2] < 0.3
    assert all(last[client] == 1.0 for client in (0, 1, 3, 4))


def test_honest_clients_with_skewed_labels_are_not_thrown_away():
    """Of ten honest clients under Dirichlet skew at least eight keep three quarters of their weight."""
    run = ran(robust=True, partition="dirichlet:0.5", clients=10, rounds=3)
    last = factors(run, 3)
    assert sum(value > 0.75 for value in last.values()) >= 8


def test_what_is_known_of_clients_outlives_the_server(tmp_path):
    state = FedAvgState(noise={0: 1.25, 7: 0.5})
    save_state(tmp_path / "state", state)
    assert load_state(tmp_path / "state", FedAvgState) == state


def test_without_it_nothing_is_told():
    run = ran(rounds=1)
    assert not [e for e in run.events if e.name in ("unexplained", "weight_factor")]
    assert run.strategy.state == FedAvgState()
