"""FedProto: prototypes and their mean against oracles, and rounds over a grid within this process."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fd import FD, by_hand, told_of, uploads
from test_strategies import (
    assert_same_bits,
    differs,
    federation,
    kept_model,
    lose,
    ran,
    replace_array,
)
from torch import nn

from clients.fedproto import features, pooling
from fedkit.engine.strategy import NetworkSize, Sizes
from fedkit.engine.strategy_state import load_state, save_state
from fedkit.errors import UsageError
from fedkit.knowledge import by_class
from fedkit.knowledge.by_class import ByClass
from fedkit.models.build import build_model
from strategies.fedproto import FedProtoState

FEDPROTO = FD | {"strategy": "fedproto"}
# Two of five shards: six classes are nobody's.
FEW_CLASSES = {"partition": "classes:2", "num_shards": 5}


def target_of(wire, client, round, width=64):
    """The global prototypes as they were sent."""
    record = wire.sent["train", round, client].array_records.get("target")
    return by_class.unpack_mean(record, 10, width)


# The server's mean


@given(uploads(width=5), st.sampled_from(["equal", "examples"]))
def test_global_prototypes_are_the_mean_over_those_who_hold_the_class(told, weighting):
    means, valid = by_class.mean(told, weighting=weighting)
    wanted, holders = by_hand(told, examples=weighting == "examples")
    np.testing.assert_array_equal(valid, holders)
    np.testing.assert_array_equal(means, wanted)


@given(uploads(width=5, least=2, held=1.0), st.sampled_from(["equal", "examples"]))
def test_identical_prototypes_are_a_fixed_point(told, weighting):
    told = [one._replace(means=told[0].means) for one in told]
    means, valid = by_class.mean(told, weighting=weighting)
    assert valid.all()
    np.testing.assert_array_equal(means, told[0].means)


def test_examples_weigh():
    one = ByClass(np.zeros((1, 2), np.float32), np.array([1], np.int32))
    other = ByClass(np.ones((1, 2), np.float32), np.array([3], np.int32))
    assert by_class.mean([one, other], weighting="examples").targets.tolist() == [[0.75, 0.75]]
    assert by_class.mean([one, other]).targets.tolist() == [[0.5, 0.5]]


# The client's features


@pytest.mark.parametrize(("count", "width"), [(84, 64), (128, 64), (1024, 64), (10, 64), (64, 64)])
def test_pooling_is_torchs_adaptive_average(count, width):
    rows = torch.randn(3, count, generator=torch.Generator().manual_seed(1))
    wanted = nn.functional.adaptive_avg_pool1d(rows, width)
    torch.testing.assert_close(rows @ pooling(count, width, torch.device("cpu")), wanted)


def test_as_many_numbers_as_wanted_stay_as_they_are():
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert (rows @ pooling(64, 64, torch.device("cpu"))).equal(rows)


def test_a_model_without_a_linear_layer_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    edge = SimpleNamespace(own=model, model_name="all-conv")
    with pytest.raises(UsageError, match="all-conv has no linear layer"), features(edge, 64):
        pass


def test_prototypes_are_mean_features_of_the_trained_model():
    width = 20
    run, wire = ran(**FEDPROTO, prototype_dim=width, clients=2, rounds=1, models="lenet:batch,cnn")
    for client, (spec, told) in enumerate(
        zip(["lenet:batch", "cnn"], told_of(wire, 1), strict=True)
    ):
        data = run.view.data
        model = build_model(spec, data.shape, data.outputs, 0)
        trained = kept_model(run, client)
        model.load_state_dict({name: torch.tensor(values) for name, values in trained.items()})
        model.eval()
        shard = data.shard(client).train
        inside = model[:-1](shard.inputs(slice(None)))
        rows = nn.functional.adaptive_avg_pool1d(inside, width).detach().numpy()
        labels = shard.labels.numpy()
        assert told.counts.tolist() == np.bincount(labels, minlength=10).tolist()
        assert told.means.shape == (10, width)
        for label in set(labels.tolist()):
            wanted = rows[labels == label].astype(np.float64).mean(axis=0)
            np.testing.assert_allclose(told.means[label], wanted, rtol=1e-4, atol=1e-6)


# Rounds


@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_the_next_round_brings_the_mean_to_everybody(weighting):
    settings = FEDPROTO | {"weighting": weighting}
    _, wire = ran(**settings, clients=3, rounds=2, partition="dirichlet:0.1", models="lenet,cnn")
    wanted, valid = by_hand(told_of(wire, 1), examples=weighting == "examples")
    for client in range(3):
        assert not target_of(wire, client, 1).valid.any()
        target = target_of(wire, client, 2)
        np.testing.assert_array_equal(target.valid, valid)
        np.testing.assert_array_equal(target.targets, wanted)


def test_any_networks_take_part():
    models = ["lenet", "cnn", "lenet:batch", "shufflenet:0.5"]
    run, wire = ran(**FEDPROTO, clients=4, rounds=2, models=",".join(models))
    for round in (1, 2):
        assert [one.means.shape for one in told_of(wire, round)] == [(10, 64)] * 4
        assert all(np.isfinite(one.means).all() for one in told_of(wire, round))
    assert not run.warnings()
    assert run.summary["rounds"] == 2


def test_without_lambda_everybody_is_alone():
    run, _ = ran(**FEDPROTO, lam=0, clients=2, rounds=3, models="lenet,cnn", alone=True)
    for client in (0, 1):
        assert_same_bits(kept_model(run, client), kept_model(run, client, "alone"))


def test_the_first_round_is_alone_and_the_second_is_not():
    one, _ = ran(**FEDPROTO, clients=2, rounds=1, alone=True)
    two, _ = ran(**FEDPROTO, clients=2, rounds=2, alone=True)
    assert_same_bits(kept_model(one, 0), kept_model(one, 0, "alone"))
    assert differs(kept_model(two, 0), kept_model(two, 0, "alone"))


def test_prototypes_of_classes_that_a_client_has_no_samples_of_add_no_loss():
    """Made up for all classes that nobody has: the round is as if alone, the last layer watched."""

    def change(kind, round, client, reply):
        if kind == "train":
            shards = [run.view.data.shard(number).train.labels.numpy() for number in (0, 1)]
            nobodys = np.bincount(np.concatenate(shards), minlength=10) == 0
            assert nobodys.any()
            told = by_class.pack(ByClass(np.ones((10, 64), np.float32), nobodys.astype(np.int32)))
            reply.content["by-class"] = told
        return reply

    settings = FEDPROTO | FEW_CLASSES | {"alone": True}
    run, wire = federation(change, **settings, clients=2, rounds=2)
    run.run()
    assert 0 < target_of(wire, 0, 2).valid.sum() < 10
    for client in (0, 1):
        assert_same_bits(kept_model(run, client), kept_model(run, client, "alone"))


def test_what_nobody_held_is_not_valid():
    run, wire = ran(**FEDPROTO | FEW_CLASSES, clients=2, rounds=2)
    held = sum(one.counts for one in told_of(wire, 1)) > 0
    assert held.sum() <= 4
    assert target_of(wire, 0, 2).valid.tolist() == held.tolist()
    assert run.strategy.state.valid.sum() == held.sum()


def test_the_regulariser_brings_the_clients_prototypes_together():
    def apart(lam):
        _, wire = ran(**FEDPROTO, lam=lam, clients=2, rounds=4)
        one, other = told_of(wire, 4)
        both = (one.counts > 0) & (other.counts > 0)
        return np.square(one.means[both] - other.means[both]).mean()

    assert apart(10.0) < apart(0.0) / 2


def test_measured_bytes_are_those_that_the_strategy_tells():
    run, _ = ran(**FEDPROTO, prototype_dim=50, clients=2, rounds=3)
    sizes = Sizes(own=NetworkSize(1), common=NetworkSize(1), outputs=10, public=1, codec="float32")
    up, down = run.strategy.traffic(run.plan.hyper, sizes)
    assert (up, down) == (2040, 2002)
    for client in run.summary["clients"]:
        assert (client["bytes_up"], client["bytes_down"]) == (3 * up, 2 * down)


def test_the_order_of_replies_does_not_matter():
    usual, _ = ran(**FEDPROTO, clients=3, rounds=2)
    run, _ = federation(**FEDPROTO, clients=3, rounds=2)
    pull = run.grid.pull_messages
    run.grid.pull_messages = lambda ids: pull(ids)[::-1]
    run.run()
    for client in range(3):
        assert_same_bits(kept_model(run, client), kept_model(usual, client))


def test_a_lost_reply_is_not_in_the_mean():
    _, wire = ran(lose("train", 0), **FEDPROTO, clients=3, rounds=2)
    wanted, _ = by_hand(told_of(wire, 1), examples=True)
    assert len(told_of(wire, 1)) == 2
    for client in range(3):
        np.testing.assert_array_equal(target_of(wire, client, 2).targets, wanted)


def test_clients_without_samples_tell_nothing():
    run, wire = ran(**FEDPROTO | {"public": "digits:1396"}, clients=4, rounds=2)
    assert all(not one.counts.any() for one in told_of(wire, 1))
    assert not target_of(wire, 0, 2).valid.any()
    assert not run.warnings()


def nan_in_class_4(means):
    means = means.copy()
    means[4, 0] = np.nan
    return means


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("means", lambda values: values[:, :-1], "(10, 63)"),
        ("means", lambda values: values.astype(np.float64), "float64"),
        ("means", nan_in_class_4, "classes [4]"),
        ("counts", lambda values: values - 1000, "negative"),
        ("counts", lambda values: values.astype(np.int64), "int64"),
    ],
)
def test_what_is_bad_in_a_reply_is_left_out_by_name(name, make, reason):
    change = replace_array("train", 1, "by-class", name, make)
    run, wire = ran(change, **FEDPROTO, clients=3, rounds=2)
    assert any("client 1 (lenet)" in text and reason in text for text in run.warnings())
    told = told_of(wire, 1)
    if make is nan_in_class_4:
        told[1].counts[4] = 0
    else:
        del told[1]
    wanted, _ = by_hand(told, examples=True)
    np.testing.assert_array_equal(target_of(wire, 0, 2).targets, wanted)


def test_the_state_survives_a_restart(tmp_path):
    run, _ = ran(**FEDPROTO, clients=2, rounds=1)
    for state in (FedProtoState(), run.strategy.state):
        save_state(tmp_path / "state", state)
        loaded = load_state(tmp_path / "state", FedProtoState)
        np.testing.assert_array_equal(loaded.prototypes, state.prototypes)
        np.testing.assert_array_equal(loaded.valid, state.valid)
    assert loaded.valid.all()
