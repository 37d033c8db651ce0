"""FD: the mean by class against an oracle of plain loops, and rounds over a grid within this process."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from test_strategies import (
    assert_same_bits,
    differs,
    federation,
    kept_model,
    lose,
    numpy_of,
    ran,
    replace_array,
)

from clients.fd import LabelMeans, Lesson
from fedkit.engine.driver import Driver
from fedkit.engine.strategy import NetworkSize, Sizes
from fedkit.engine.strategy_state import load_state, save_state
from fedkit.knowledge import by_class
from fedkit.knowledge.by_class import ByClass
from fedkit.knowledge.consensus import Consensus
from fedkit.models.build import build_model
from strategies.fd import FDState

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Two hundred private samples: enough to see what travels.
FD = {
    "strategy": "fd",
    "local_epochs": 1,
    "batch_size": 32,
    "learning_rate": 0.003,
    "public": "digits:1200",
}
GARBAGE = np.array([np.nan, np.inf, -np.inf, 3e38, 0.5], dtype=np.float32)


@st.composite
def uploads(draw, least=1, most=8, width=None, held=None):
    """What some clients tell; rows that do not count hold anything."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, classes = draw(st.integers(least, most)), draw(st.integers(2, 12))
    share = held or draw(st.sampled_from([0.2, 0.6, 1.0]))
    told = []
    for _ in range(count):
        means = generator.standard_normal((classes, width or classes))
        means *= generator.choice([1e-30, 1.0, 1.0, 1e30])
        counts = generator.integers(1, 10**6, classes) * (generator.random(classes) < share)
        means[counts == 0] = generator.choice(GARBAGE)
        told.append(ByClass(means.astype(np.float32), counts.astype(np.int32)))
    return told


def probabilities(seed, count, classes):
    """Rows on the simplex, told by ``count`` clients that hold every class."""
    scores = np.random.default_rng(seed).standard_normal((count, classes, classes)) * 3
    rows = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    return [ByClass(row.astype(np.float32), np.full(classes, 7, np.int32)) for row in rows]


def by_hand(told, leave_out=None, examples=False):
    """The mean by class in plain float64, entry by entry."""
    classes, width = told[0].means.shape
    wanted, valid = np.zeros((classes, width), np.float32), np.zeros(classes, bool)
    for label in range(classes):
        holders = [
            one for k, one in enumerate(told) if k != leave_out and one.counts[label] > 0
        ]  # fmt: skip
        valid[label] = bool(holders)
        for column in range(width if holders else 0):
            total, weights = 0.0, 0.0
            for one in holders:
                weight = float(one.counts[label]) if examples else 1.0
                total += weight * float(one.means[label, column])
                weights += weight
            wanted[label, column] = np.float32(total / weights)
    return wanted, valid


@given(uploads())
def test_leave_one_out_is_the_mean_of_the_others_that_hold_the_class(told):
    for k, (means, valid) in enumerate(by_class.leave_one_out(told)):
        wanted, holders = by_hand(told, leave_out=k)
        np.testing.assert_array_equal(valid, holders)
        np.testing.assert_array_equal(means, wanted)
        assert means.dtype == np.float32


@given(uploads(), st.sampled_from(["equal", "examples"]))
def test_mean_is_over_all_who_hold_the_class(told, weighting):
    means, valid = by_class.mean(told, weighting=weighting)
    wanted, holders = by_hand(told, examples=weighting == "examples")
    np.testing.assert_array_equal(valid, holders)
    np.testing.assert_array_equal(means, wanted)


@given(uploads(least=1, most=1, held=1.0), st.integers(2, 8))
def test_equal_means_come_back_to_the_bit(one, count):
    for means, valid in by_class.leave_one_out(one * count):
        assert valid.all()
        np.testing.assert_array_equal(means, one[0].means)


@given(uploads(least=2, most=2))
def test_of_two_clients_each_gets_the_others_means_to_the_bit(told):
    for target, other in zip(by_class.leave_one_out(told), told[::-1], strict=True):
        np.testing.assert_array_equal(target.valid, other.counts > 0)
        held = other.counts > 0
        assert target.targets[held].tobytes() == other.means[held].tobytes()


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.integers(2, 12))
def test_rows_of_probabilities_sum_to_1(seed, count, classes):
    for means, _ in by_class.leave_one_out(probabilities(seed, count, classes)):
        np.testing.assert_allclose(means.sum(axis=1), 1, atol=1e-6)
        assert means.min() >= 0


def test_a_class_that_one_client_holds_teaches_the_others_only():
    told = probabilities(1, 3, 4)
    for one in told[1:]:
        one.counts[2] = 0
    targets = by_class.leave_one_out(told)
    assert [target.valid[2] for target in targets] == [False, True, True]
    np.testing.assert_array_equal(targets[1].targets[2], told[0].means[2])


def test_a_client_alone_learns_from_nobody():
    ((means, valid),) = by_class.leave_one_out(probabilities(1, 1, 3))
    assert not valid.any()
    assert not means.any()


@given(uploads(most=1))
def test_what_travels_comes_back(told):
    (one,) = told
    classes = len(one.counts)
    means, counts = by_class.unpack(by_class.pack(one), classes, classes)
    np.testing.assert_array_equal(means, one.means)
    np.testing.assert_array_equal(counts, one.counts)
    mean = by_class.mean(told)
    if mean.valid.any():
        back = by_class.unpack_mean(by_class.pack_mean(mean), classes, classes)
        np.testing.assert_array_equal(back.targets, mean.targets)
        np.testing.assert_array_equal(back.valid, mean.valid)


# The client's lesson


def lesson(classes, others, **config):
    edge = SimpleNamespace(outputs=classes, device=torch.device("cpu"))
    config = {"gamma": 1.0, "answers": "prob", "include-self": False, **config}
    return Lesson(edge, ConfigRecord(config), others)


def softmax(scores):
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


@pytest.mark.parametrize("answers", ["prob", "softmax", "raw"])
@pytest.mark.parametrize("own", [False, True])
def test_the_second_term_is_the_cross_entropy_with_the_others_means(answers, own):
    generator = np.random.default_rng(3)
    means = generator.standard_normal((4, 4)).astype(np.float32)
    others = Consensus(means, np.array([True, True, False, True]))
    logits, labels = generator.standard_normal((6, 4)).astype(np.float32), [0, 1, 2, 3, 3, 2]
    wanted = 0.0
    for z, label in zip(logits.astype(np.float64), labels, strict=True):
        target = means[label].astype(np.float64)
        if not others.valid[label]:
            if not own:
                continue
            target = softmax(z) if answers == "prob" else z
        if answers == "softmax":
            target = softmax(target)
        wanted -= 0.5 * (target * np.log(softmax(z))).sum() / len(labels)
    loss = lesson(4, others, gamma=0.5, **{"answers": answers, "include-self": own})
    assert float(loss(torch.tensor(logits), torch.tensor(labels))) == pytest.approx(
        wanted, rel=1e-5
    )


def test_what_a_client_tells_is_the_mean_of_its_moving_answers():
    generator = np.random.default_rng(4)
    said, seen = [[] for _ in range(3)], lesson(3, Consensus(np.zeros((3, 3)), np.zeros(3, bool)))
    for _ in range(5):
        logits, labels = generator.standard_normal((7, 3)), generator.integers(0, 2, 7)
        for z, label in zip(logits, labels, strict=True):
            said[label].append(softmax(z))
        assert float(seen(torch.tensor(logits), torch.tensor(labels))) == 0
    means, counts = seen.told.result()
    assert counts.tolist() == [len(rows) for rows in said]
    assert counts.dtype == np.int32
    for label in (0, 1):
        np.testing.assert_allclose(means[label], np.mean(said[label], axis=0), rtol=1e-6)
    assert not means[2].any()


def test_many_equal_answers_have_that_answer_as_their_mean():
    row = torch.softmax(torch.tensor([[0.3, -1.0, 2.0]]), dim=1)
    means = LabelMeans(3, 3, torch.device("cpu"))
    for _ in range(200):
        means.add(row.expand(64, 3), torch.ones(64, dtype=torch.int64))
    told = means.result()
    np.testing.assert_array_equal(told.means[1], row[0].numpy())
    assert told.counts.tolist() == [0, 12800, 0]


# Rounds


def target_of(wire, client, round):
    """F_hat^(k) as it was sent."""
    record = wire.sent["train", round, client].array_records.get("target")
    return by_class.unpack_mean(record, 10, 10)


def told_of(wire, round):
    return [ByClass(**record) for _, record in sorted(wire.up("train", "by-class", round).items())]


def test_a_single_step_tells_what_the_initial_model_says():
    run, wire = ran(**FD | {"batch_size": 10_000}, clients=2, rounds=1)
    for client, told in enumerate(told_of(wire, 1)):
        data = run.view.data
        model = build_model("lenet", data.shape, data.outputs, run.plan.federation.seed, client)
        shard = data.shard(client).train
        said = torch.softmax(model(shard.inputs(slice(None))), dim=1).detach().numpy()
        labels = shard.labels.numpy()
        assert told.counts.tolist() == np.bincount(labels, minlength=10).tolist()
        for label in set(labels.tolist()):
            wanted = said[labels == label].mean(axis=0)
            np.testing.assert_allclose(told.means[label], wanted, rtol=1e-4, atol=1e-6)


def test_the_next_round_brings_the_mean_of_the_others():
    _, wire = ran(**FD, clients=3, rounds=2, partition="dirichlet:0.1", models="lenet,cnn")
    told = told_of(wire, 1)
    assert any((one.counts == 0).any() for one in told)
    for client in range(3):
        assert not target_of(wire, client, 1).valid.any()
        wanted, valid = by_hand(told, leave_out=client)
        target = target_of(wire, client, 2)
        np.testing.assert_array_equal(target.valid, valid)
        np.testing.assert_array_equal(target.targets, wanted)


@pytest.mark.parametrize("more", [{}, {"schedule": "plateau", "schedule_patience": 0}])
def test_without_gamma_everybody_is_alone(more):
    alone, _ = ran(**FD | more, gamma=0, clients=2, rounds=3, models="lenet,cnn", alone=True)
    proto = FD | more | {"strategy": "fedproto", "lam": 0}
    other, _ = ran(**proto, clients=2, rounds=3, models="lenet,cnn")
    for client in (0, 1):
        assert_same_bits(kept_model(alone, client), kept_model(alone, client, "alone"))
        assert_same_bits(kept_model(alone, client), kept_model(other, client))


def test_the_first_round_is_alone_and_the_second_is_not():
    one, _ = ran(**FD, clients=2, rounds=1, alone=True)
    two, _ = ran(**FD, clients=2, rounds=2, alone=True)
    assert_same_bits(kept_model(one, 0), kept_model(one, 0, "alone"))
    assert differs(kept_model(two, 0), kept_model(two, 0, "alone"))


def test_the_loss_that_steers_the_learning_rate_is_that_of_the_labels():
    """Both have the same models before the only step of the second round."""
    single = FD | {"batch_size": 10_000}
    losses = [
        ran(**single, gamma=gamma, clients=2, rounds=2)[1].received["train", 2, 0]["metrics"]
        for gamma in (0, 5)
    ]
    assert losses[0]["train_loss"] == losses[1]["train_loss"]


def test_measured_bytes_are_those_that_the_strategy_tells():
    run, _ = ran(**FD, clients=2, rounds=3)
    sizes = Sizes(own=NetworkSize(1), common=NetworkSize(1), outputs=10, public=1, codec="float32")
    up, down = run.strategy.traffic(run.plan.hyper, sizes)
    assert (up, down) == (440, 402)
    for client in run.summary["clients"]:
        assert (client["bytes_up"], client["bytes_down"]) == (3 * up, 2 * down)


def test_the_order_of_replies_does_not_matter():
    usual, _ = ran(**FD, clients=3, rounds=2)
    run, _ = federation(**FD, clients=3, rounds=2)
    pull = run.grid.pull_messages
    run.grid.pull_messages = lambda ids: pull(ids)[::-1]
    run.run()
    for client in range(3):
        assert_same_bits(kept_model(run, client), kept_model(usual, client))


def test_steps_instead_of_epochs():
    _, wire = ran(**FD | {"batch_size": 8}, local_steps=3, clients=2, rounds=1)
    assert [int(one.counts.sum()) for one in told_of(wire, 1)] == [24, 24]


def test_clients_without_samples_or_epochs_tell_nothing():
    run, wire = ran(**FD | {"public": "digits:1396"}, local_steps=2, clients=4, rounds=2)
    assert all(not one.counts.any() for one in told_of(wire, 1))
    assert not target_of(wire, 0, 2).valid.any()
    assert not run.warnings()


@pytest.mark.parametrize("lost", [1, 2])
def test_a_lost_reply_is_in_nobodys_mean_and_its_client_learns_from_all(lost):
    """What the client told in an earlier round is not taken in its place."""
    _, wire = ran(lose("train", 0, lost), **FD, clients=3, rounds=lost + 1)
    told, others = told_of(wire, lost), by_hand(told_of(wire, lost))
    assert len(told) == 2
    np.testing.assert_array_equal(target_of(wire, 0, lost + 1).targets, others[0])
    for client, other in ((1, 1), (2, 0)):
        target = target_of(wire, client, lost + 1)
        np.testing.assert_array_equal(target.targets, told[other].means)


def test_who_was_absent_counts_again_in_the_round_after():
    _, wire = ran(lose("train", 0), **FD, clients=3, rounds=3)
    wanted, _ = by_hand(told_of(wire, 2), leave_out=1)
    np.testing.assert_array_equal(target_of(wire, 1, 3).targets, wanted)


def test_after_a_round_that_nobody_answered_there_is_no_second_term():
    def change(kind, round, client, reply):
        return None if (kind, round) == ("train", 1) else reply

    run, wire = ran(change, **FD, clients=2, rounds=2)
    assert not target_of(wire, 0, 2).valid.any()
    assert run.summary["rounds"] == 2


def test_a_row_that_is_not_finite_costs_its_class_only():
    def spoil(means):
        means = means.copy()
        means[4, 0] = np.nan
        return means

    change = replace_array("train", 1, "by-class", "means", spoil)
    run, wire = ran(change, **FD, clients=3, rounds=2)
    told = told_of(wire, 1)
    assert all(one.counts[4] for one in told)
    told[1].counts[4] = 0
    for client in range(3):
        wanted, _ = by_hand(told, leave_out=client)
        np.testing.assert_array_equal(target_of(wire, client, 2).targets, wanted)
    assert any("classes [4] of client 1 (lenet)" in text for text in run.warnings())


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("means", lambda values: values[:-1], "(9, 10)"),
        ("means", lambda values: values.astype(np.float64), "float64"),
        ("means", lambda values: -values, "no probabilities"),
        ("means", lambda values: 3 * values, "no probabilities"),
        ("means", lambda values: Array("float32", (10, 10), "numpy.ndarray", b""), "means"),
        ("counts", lambda values: values - 1000, "negative"),
        ("counts", lambda values: values.astype(np.int64), "int64"),
        ("counts", lambda values: values[:, None], "(10, 1)"),
    ],
)
def test_a_bad_reply_is_left_out_by_name(name, make, reason):
    change = replace_array("train", 1, "by-class", name, make)
    run, wire = ran(change, **FD, clients=3, rounds=2)
    assert any("client 1 (lenet)" in text and reason in text for text in run.warnings())
    told = told_of(wire, 1)
    np.testing.assert_array_equal(target_of(wire, 0, 2).targets, told[2].means)


@pytest.mark.parametrize("gone", ["record", "counts"])
def test_a_reply_that_carries_no_means_is_left_out(gone):
    def change(kind, round, client, reply):
        if (kind, client) == ("train", 0):
            del reply.content["by-class"]["counts"]
            if gone == "record":
                del reply.content["by-class"]
        return reply

    run, wire = ran(change, **FD, clients=2, rounds=2)
    assert any("client 0 (lenet)" in text and "by class" in text for text in run.warnings())
    assert not target_of(wire, 1, 2).valid.any()


def test_pfllib_averages_raw_class_scores_of_everybody():
    settings = {key: FD[key] for key in ("strategy", "public")}
    run, wire = ran(**settings, preset="pfllib", clients=3, rounds=2)
    told = told_of(wire, 1)
    assert min(one.means.min() for one in told) < 0
    wanted, _ = by_hand(told)
    for client in range(3):
        np.testing.assert_array_equal(target_of(wire, client, 2).targets, wanted)
    assert not run.warnings()


def test_a_loaded_state_goes_on_as_the_old_one_would_have(tmp_path):
    usual, _ = ran(**FD, clients=3, rounds=3)
    run, _ = federation(**FD, clients=3, rounds=3)
    Driver(run.strategy, run.grid, replace(run.plan.federation, rounds=2), run.emit).run(
        run.strategy.initial_arrays()
    )
    save_state(tmp_path / "state", run.strategy.state)
    again = run.plan.strategy(run.plan.hyper, run.view.facts(), run.emit)
    again.state = load_state(tmp_path / "state", FDState)
    result = Driver(again, run.grid, run.plan.federation, run.emit).run(
        again.initial_arrays(), first_round=3
    )
    assert not numpy_of(result.arrays)
    for client in range(3):
        assert_same_bits(kept_model(run, client), kept_model(usual, client))
