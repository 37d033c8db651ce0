"""FedDF: networks at the server learn what all clients' networks say, in logits or in weights."""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from processes import ENVIRONMENT, LONG
from test_feddistill import arrays_of, descended, distilled, labelled, network
from test_strategies import (
    assert_close,
    assert_same_bits,
    differs,
    examples_of,
    federation,
    global_model,
    kept_model,
    lose,
    mean_by_hand,
    numpy_of,
    ran,
    replace_array,
)

from fedkit.engine.plan import make_plan
from fedkit.engine.roster import Member
from fedkit.engine.strategy import NetworkSize, Sizes
from fedkit.errors import FedkitError, UsageError
from fedkit.knowledge.consensus import Upload
from fedkit.knowledge.softening import softened
from fedkit.models.build import build_model
from fedkit.models.measure import predict
from strategies.distillation import distil
from strategies.feddf import FedDFHyperparameters
from strategies.reducer import Reducer
from strategies.students import answers

# The machine may be busy: no example is too slow.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Little private data: what is tested here takes place on the public set.
LOCAL = {
    "public": "digits:1300",
    "local_epochs": 2,
    "batch_size": 16,
    "optimiser": "sgd",
    "learning_rate": 0.05,
    "keep_optimiser": False,
}
LESSON = {
    "public_samples": 60,
    "steps": 10,
    "steps_patience": 0,
    "check_every": 5,
    "server_batch": 16,
    "workers": 1,
}
LOGITS = {
    "strategy": "feddf",
    "exchange": "logits",
    "temperature": 1.0,
    "digest_epochs": 1,
    "digest_batch": 32,
    "revisit_epochs": 0,
    **LOCAL,
    **LESSON,
}
WEIGHTS = {"strategy": "feddf", "exchange": "weights", "temperature": 1.0, **LOCAL, **LESSON}
# What clients take from round to round besides their models.
KEPT = {"optimiser": "adam", "learning_rate": 0.003, "keep_optimiser": True}
BOTH = pytest.mark.parametrize("settings", [LOGITS, WEIGHTS], ids=lambda s: s["exchange"])


@pytest.fixture
def lessons(monkeypatch):
    """Every lesson that a student of this test had: what went in."""
    jobs = []

    def watched(job):
        jobs.append(job)
        return distil(job)

    monkeypatch.setattr("strategies.students.distil", watched)
    return jobs


def softmax(scores, temperature=1.0):
    """In plain float64."""
    scores = np.asarray(scores, dtype=np.float64) / temperature
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def mean(scores):
    return np.mean(np.array(list(scores), dtype=np.float64), axis=0)


def says(run, spec, weights, indices):
    """A network's class scores on some public samples."""
    model = build_model(spec, run.view.data.shape, run.view.data.outputs, 99)
    model.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in weights.items()})
    return predict(model, run.view.data.public.take(torch.from_numpy(indices))).numpy()


def subset_of(wire, round=1):
    return next(iter(wire.down("train.local", "subset", round).values()))["indices"].astype(int)


def uploads(wire, round=1):
    return {c: r["values"] for c, r in wire.up("train.local", "logits", round).items()}


def targets(wire, round=1):
    return {c: r["values"] for c, r in wire.down("train.digest", "target", round).items()}


def metrics(run):
    return {
        (event.round, event.client, event.name): event.value
        for event in run.events
        if event.event == "metric"
    }


def initial(run, spec):
    return numpy_of(run.strategy.facts.initial_weights(spec))


def bits(values):
    return {name: array.copy() for name, array in values.items()}


# Logits travel


def test_no_weights_travel_in_either_direction():
    _, wire = ran(**LOGITS, clients=2, rounds=2, models="lenet,cnn")
    seen = {
        (way, kind, name, entry, array.shape)
        for way, contents in (("down", wire.sent), ("up", wire.received))
        for (kind, _, _), content in contents.items()
        for name, record in content.array_records.items()
        for entry, array in numpy_of(record).items()
    }
    assert seen == {
        ("down", "train.local", "subset", "indices", (60,)),
        ("up", "train.local", "logits", "values", (60, 10)),
        ("down", "train.digest", "target", "values", (60, 10)),
    }


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_students_learn_the_softmax_of_the_mean_scores(lessons, temperature):
    settings = LOGITS | {"optimiser": "adam", "learning_rate": 0.003, "temperature": temperature}
    _, wire = ran(**settings, clients=3, rounds=2, models="lenet,cnn")
    assert [job.spec for job in lessons] == ["cnn", "lenet"] * 2
    for at, job in enumerate(lessons):
        told = uploads(wire, 1 + at // 2)
        assert len(told) == 3
        wanted = softmax(mean(told.values()), temperature)
        np.testing.assert_allclose(job.targets, wanted, rtol=1e-5, atol=1e-7)
        assert job.temperature == temperature
    # The mean of softmaxes would be something else.
    assert np.abs(mean(softmax(z, temperature) for z in told.values()) - wanted).max() > 1e-3


def test_students_learn_on_the_samples_that_were_answered(lessons):
    run, wire = ran(**LOGITS, clients=2, rounds=2)
    for round, job in enumerate(lessons, 1):
        images = run.view.data.public.data[torch.from_numpy(subset_of(wire, round))]
        assert torch.equal(job.samples.data, images)
    assert not torch.equal(lessons[0].samples.data, lessons[1].samples.data)


@pytest.mark.parametrize("weighting", ["equal", "examples"])
def test_in_probability_space_students_learn_the_mean_of_the_softmaxes(lessons, weighting):
    settings = LOGITS | {"space": "prob", "temperature": 2.0, "weighting": weighting}
    run, wire = ran(**settings, clients=3, rounds=1, partition="dirichlet:0.3")
    told = uploads(wire)
    for soft in told.values():
        np.testing.assert_allclose(soft.sum(axis=1), 1, atol=1e-6)
    weights = examples_of(run) if weighting == "examples" else [1, 1, 1]
    wanted = np.average(np.array(list(told.values()), dtype=np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(lessons[0].targets, wanted, rtol=1e-6, atol=1e-7)
    student = says(run, "lenet", run.strategy.state.models["lenet"], subset_of(wire))
    for target in targets(wire).values():
        np.testing.assert_allclose(target, softmax(student, 2.0), rtol=1e-5, atol=1e-7)


def test_clients_are_told_the_mean_of_the_students():
    run, wire = ran(**LOGITS, clients=3, rounds=1, models="lenet,cnn")
    students = {
        spec: says(run, spec, weights, subset_of(wire))
        for spec, weights in run.strategy.state.models.items()
    }
    assert sorted(students) == ["cnn", "lenet"]
    assert sorted(targets(wire)) == [0, 1, 2]
    for target in targets(wire).values():
        np.testing.assert_allclose(target, mean(students.values()), rtol=1e-5, atol=1e-5)
    assert np.abs(students["cnn"] - students["lenet"]).max() > 1e-2


def test_clients_are_told_what_the_student_of_their_own_architecture_says():
    run, wire = ran(**LOGITS, clients=3, rounds=1, models="lenet,cnn", digest_target="own")
    told = targets(wire)
    for client, spec in enumerate(["lenet", "cnn", "lenet"]):
        own = says(run, spec, run.strategy.state.models[spec], subset_of(wire))
        np.testing.assert_allclose(told[client], own, rtol=1e-5, atol=1e-5)
    assert np.abs(told[0] - told[1]).max() > 1e-2


@pytest.mark.parametrize("target", ["mean", "own"])
def test_students_may_have_an_architecture_that_no_client_has(target):
    run, wire = ran(
        **LOGITS, clients=2, rounds=1, models="lenet", students="cnn", digest_target=target
    )
    assert list(run.strategy.state.models) == ["cnn"]
    student = says(run, "cnn", run.strategy.state.models["cnn"], subset_of(wire))
    assert sorted(targets(wire)) == [0, 1]
    for told in targets(wire).values():
        np.testing.assert_allclose(told, student, rtol=1e-5, atol=1e-5)
    assert (1, None, "student-cnn_model/global_test/accuracy") in metrics(run)


@pytest.mark.parametrize("students", ["lenat", "cnn,lenat", "", " , "])
def test_students_that_cannot_be_are_refused_before_anything_starts(students):
    with pytest.raises(UsageError, match=r"students|model"):
        make_plan({**LOGITS, "students": students}, local=True)


def test_without_steps_students_stay_where_they_started():
    run, wire = ran(**LOGITS | {"steps": 0}, clients=2, rounds=2, models="lenet,cnn")
    for spec, weights in run.strategy.state.models.items():
        assert_same_bits(weights, initial(run, spec))
    start = mean(says(run, spec, initial(run, spec), subset_of(wire)) for spec in ("cnn", "lenet"))
    np.testing.assert_allclose(targets(wire)[0], start, rtol=1e-5, atol=1e-5)


def test_students_go_on_from_where_they_were(lessons):
    run, _ = federation(**LOGITS | {"score": "last"}, clients=2, rounds=2, models="lenet,cnn")
    after = {}

    def change(instruction, reply):
        if instruction.metadata.message_type == "train.digest":
            round = int(instruction.metadata.group_id)
            after[round] = {s: bits(w) for s, w in run.strategy.state.models.items()}
        return reply

    run.grid.tamper = change
    run.run()
    for at, spec in enumerate(["cnn", "lenet"]):
        assert_same_bits(lessons[at].weights, initial(run, spec))
        assert_same_bits(lessons[2 + at].weights, after[1][spec])
        assert differs(after[1][spec], initial(run, spec))
        assert differs(after[2][spec], after[1][spec])


def test_a_lost_answer_leaves_out_that_client_alone(lessons):
    settings = LOGITS | {"clients": 3, "models": "lenet,cnn"}
    run, wire = ran(lose("train.local", 1), **settings, rounds=2)
    assert any("client 1" in text for text in run.warnings())
    told = uploads(wire)
    assert sorted(told) == sorted(targets(wire)) == [0, 2]
    np.testing.assert_allclose(lessons[0].targets, softmax(mean(told.values())), rtol=1e-5)
    # In the next round it is back.
    assert sorted(targets(wire, 2)) == [0, 1, 2]


def test_a_lost_answer_leaves_the_client_with_what_it_trained():
    settings = LOGITS | {"clients": 2, "rounds": 1}
    lost, _ = ran(lose("train.local", 1), **settings)
    still, _ = ran(**settings | {"digest_epochs": 0})
    assert_same_bits(kept_model(lost, 1), kept_model(still, 1))
    assert differs(kept_model(lost, 0), kept_model(still, 0))


def test_an_answer_that_is_not_finite_is_refused_by_name_and_the_round_goes_on(lessons):
    spoil = replace_array("train.local", 1, "logits", "values", lambda v: np.full_like(v, np.nan))
    run, wire = ran(spoil, **LOGITS, clients=2, rounds=1, models="lenet,cnn")
    assert any("client 1 (cnn)" in text and "finite" in text for text in run.warnings())
    assert sorted(targets(wire)) == [0]
    np.testing.assert_allclose(lessons[0].targets, softmax(uploads(wire)[0]), rtol=1e-5)


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "nan"])
def test_where_nobody_can_be_heard_nothing_is_sent_and_no_student_changes(lost):
    before = {}

    def change(kind, round, client, reply):
        if kind == "train.local" and round == 2:
            before.update({s: bits(w) for s, w in run.strategy.state.models.items()})
            reply.content["logits"]["values"] = Array(np.full((60, 10), np.nan, dtype=np.float32))
            return None if lost else reply
        return reply

    run, wire = federation(change, **LOGITS, clients=2, rounds=2, models="lenet,cnn")
    summary = run.run()
    assert summary["rounds"] == 2
    assert [at for at in wire.sent if at[:2] == ("train.digest", 1)]
    assert not [at for at in wire.sent if at[:2] == ("train.digest", 2)]
    for spec, weights in run.strategy.state.models.items():
        assert_same_bits(weights, before[spec])


def spoil_rows(*where):
    """A change that makes rows (client, row) not finite."""

    def change(kind, round, client, reply):
        rows = [row for who, row in where if who == client]
        if kind == "train.local" and rows:
            values = reply.content["logits"]["values"].numpy().copy()
            values[rows, 3] = np.nan
            reply.content["logits"]["values"] = Array(values)
        return reply

    return change


def test_rows_that_are_not_finite_cost_only_those_rows(lessons):
    change = spoil_rows((1, 0), (1, 7))
    run, wire = ran(change, **LOGITS, clients=3, rounds=1, on_bad="drop_row")
    told = uploads(wire)
    wanted = mean(told.values())
    for row in (0, 7):
        wanted[row] = mean([told[0][row], told[2][row]])
    np.testing.assert_allclose(lessons[0].targets, softmax(wanted), rtol=1e-5, atol=1e-7)
    assert {client: len(target) for client, target in targets(wire).items()} == {
        0: 60,
        1: 60,
        2: 60,
    }
    assert not run.warnings()


def test_a_row_that_nobody_provides_is_neither_learned_nor_digested(lessons):
    change = spoil_rows((0, 5), (1, 5), (1, 6))
    run, wire = ran(change, **LOGITS, clients=2, rounds=1, on_bad="drop_row")
    told, kept = uploads(wire), np.arange(60) != 5
    wanted = mean(told.values())
    wanted[6] = told[0][6]
    np.testing.assert_allclose(lessons[0].targets, softmax(wanted[kept]), rtol=1e-5, atol=1e-7)
    images = run.view.data.public.data[torch.from_numpy(subset_of(wire)[kept])]
    assert torch.equal(lessons[0].samples.data, images)
    student = says(run, "lenet", run.strategy.state.models["lenet"], subset_of(wire)[kept])
    for client, target in targets(wire).items():
        np.testing.assert_allclose(target, student, rtol=1e-5, atol=1e-5)
        bitmap = wire.down("train.digest", "rows")[client]["bits"]
        np.testing.assert_array_equal(np.unpackbits(bitmap, count=60).astype(bool), kept)


def test_an_answer_that_is_not_finite_ends_a_strict_run_with_a_sentence():
    change = spoil_rows((1, 5))
    run, _ = federation(change, **LOGITS, clients=2, rounds=1, models="lenet,cnn", on_bad="error")
    with pytest.raises(FedkitError, match=r"client 1 \(cnn\) in round 1 .*finite.*\.$"):
        run.run()


def test_clients_come_closer_to_what_they_are_told():
    settings = LOGITS | {"digest_epochs": 5, "optimiser": "adam", "learning_rate": 0.003}
    run, _ = ran(**settings | {"steps": 40}, clients=2, rounds=1, models="lenet,cnn")
    told = metrics(run)
    for client in (0, 1):
        before, after = (told[1, client, f"digest/{name}"] for name in ("loss_before", "loss"))
        assert after < before


@pytest.mark.parametrize("revisits", [0, 2])
@pytest.mark.parametrize(("space", "temperature"), [("logit", 1.0), ("logit", 3.0), ("prob", 2.0)])
def test_a_client_digests_what_it_is_told_and_revisits_its_own_data(space, temperature, revisits):
    """In whole batches, as gradient descent by the definition of the losses."""
    settings = LOGITS | {"local_epochs": 0, "batch_size": 10_000, "digest_batch": 10_000}
    settings |= {"learning_rate": 0.2, "space": space, "temperature": temperature}
    settings |= {"revisit_epochs": revisits, "digest_epochs": 2}
    run, wire = ran(**settings, clients=2, rounds=1, models="cnn,lenet")
    public = run.view.data.public.take(torch.from_numpy(subset_of(wire)))
    for client, spec in enumerate(["cnn", "lenet"]):
        samples, told = run.view.data.shard(client).train, targets(wire)[client]
        wanted = softmax(told, temperature) if space == "logit" else told

        def loss(model, wanted=wanted):
            return distilled(model, public, wanted, temperature)

        model = network(run, spec, client=client)
        descended(model, loss, 0.2, 2)
        after = descended(model, lambda m, own=samples: labelled(m, own), 0.2, revisits)
        assert_close(kept_model(run, client), after, 1e-5)
        start = arrays_of(network(run, spec, client=client))
        assert max(np.abs(after[name] - start[name]).max() for name in start) > 1e-4


def test_without_digest_everyone_is_alone():
    settings = LOGITS | {"digest_epochs": 0, "revisit_epochs": 1, "alone": True} | KEPT
    run, _ = ran(**settings, clients=2, rounds=2)
    for client in (0, 1):
        assert_same_bits(kept_model(run, client), kept_model(run, client, "alone"))


# Weights travel


@pytest.mark.parametrize(
    ("model", "weighting", "optimiser"),
    [
        ("lenet", "examples", {"momentum": 0.5}),
        ("lenet:batch", "examples", {"optimiser": "adam", "keep_optimiser": False}),
        ("cnn", "equal", KEPT),
    ],
)
def test_without_steps_it_is_fedavg_to_the_bit(model, weighting, optimiser):
    shared = LOCAL | {"clients": 3, "rounds": 2, "partition": "dirichlet:0.3"} | optimiser
    fedavg, _ = ran(strategy="fedavg", **shared, model=model, weighting=weighting)
    run, _ = ran(
        **WEIGHTS | shared | {"steps": 0},
        models=model,
        model_weighting=weighting,
        weighting="equal",
    )
    assert_same_bits(run.strategy.state.models[model], global_model(fedavg))
    label = f"global-{model.replace(':', '-')}_model"
    found = metrics(run)
    wanted = {
        (round, client, name.replace("global_model", label) if client is None else name): value
        for (round, client, name), value in metrics(fedavg).items()
    }
    assert len(wanted) > 10
    assert {at: found.get(at) for at in wanted} == wanted
    assert run.summary["mean_global_accuracy"] == fedavg.summary["mean_global_accuracy"]


def test_without_steps_each_group_is_its_members_mean():
    run, wire = ran(
        **WEIGHTS | {"steps": 0},
        clients=5,
        rounds=1,
        models="lenet:batch,cnn",
        partition="dirichlet:0.3",
    )
    models, examples = wire.up("train", "arrays"), examples_of(run)
    assert len(set(examples)) > 1
    for spec, members in (("lenet:batch", [0, 2, 4]), ("cnn", [1, 3])):
        wanted = mean_by_hand([models[c] for c in members], [examples[c] for c in members])
        assert_close(run.strategy.state.models[spec], wanted)


def test_each_client_gets_its_own_groups_model():
    run, wire = federation(**WEIGHTS, clients=3, rounds=2, models="lenet,cnn")
    first = {}

    def change(instruction, reply):
        kind, round = instruction.metadata.message_type, instruction.metadata.group_id
        if (kind, round) == ("evaluate", "1"):
            first.update({s: bits(w) for s, w in run.strategy.state.models.items()})
        return wire(instruction, reply)

    run.grid.tamper = change
    run.run()
    for client, spec in enumerate(["lenet", "cnn", "lenet"]):
        assert_same_bits(wire.down("train", "arrays")[client], initial(run, spec))
        assert_same_bits(wire.down("train", "arrays", 2)[client], first[spec])
        assert_same_bits(
            wire.down("evaluate", "arrays", 2)[client], run.strategy.state.models[spec]
        )


def test_a_single_client_is_its_own_teacher_and_stays():
    """There is nothing to learn but rounding noise, which is worse than staying."""
    settings = WEIGHTS | {"clients": 1, "rounds": 1}
    run, _ = ran(**settings | {"steps": 1})
    assert abs(metrics(run)[1, None, "student/lenet/loss"]) < 1e-6
    run, wire = ran(**settings | {"steps": 50})
    (returned,) = wire.up("train", "arrays").values()
    for name, weights in run.strategy.state.models["lenet"].items():
        assert np.abs(weights - returned[name]).max() < 1e-3


def test_a_single_client_that_learns_from_itself_goes_on_saying_the_same():
    """Adam makes steps of rounding noise, too (algorithms.md 0.3.12): weights drift, answers stay."""
    settings = WEIGHTS | {"clients": 1, "rounds": 1, "steps": 50, "score": "last"}
    run, wire = ran(**settings)
    (returned,) = wire.up("train", "arrays").values()
    indices = run.strategy.draw(1)
    before = softmax(says(run, "lenet", returned, indices))
    after = softmax(says(run, "lenet", run.strategy.state.models["lenet"], indices))
    assert np.abs(after - before).max() < 5e-3
    assert abs(metrics(run)[1, None, "student/lenet/loss"]) < 1e-4


@BOTH
def test_the_order_of_replies_does_not_matter(settings):
    settings = settings | {"clients": 4, "rounds": 2, "models": "lenet,cnn"}
    usual, _ = ran(**settings, partition="dirichlet:0.3")
    run, _ = federation(**settings, partition="dirichlet:0.3")
    pull = run.grid.pull_messages
    run.grid.pull_messages = lambda ids: pull(ids)[::-1]
    assert run.run()["digest"] == usual.summary["digest"]
    for spec, weights in usual.strategy.state.models.items():
        assert_same_bits(run.strategy.state.models[spec], weights)


@BOTH
@pytest.mark.parametrize("score", ["heldout_kl", "val_acc"])
def test_a_students_score_never_falls_below_its_start(settings, score):
    # A rate at which most lessons end worse than they began.
    settings = settings | {"score": score, "public_labels": True, "server_rate": 0.1}
    run, _ = ran(**settings, clients=3, rounds=3, models="lenet,cnn", partition="dirichlet:0.3")
    told = metrics(run)
    lessons = [(round, spec) for round in (1, 2, 3) for spec in ("lenet", "cnn")]
    for round, spec in lessons:
        name = f"student/{spec}/score"
        assert told[round, None, name] >= told[round, None, f"{name}_before"]


def test_no_message_contains_logits():
    run, wire = ran(**WEIGHTS, clients=2, rounds=2, models="lenet,cnn")
    for contents in (wire.sent, wire.received):
        for (_, _, client), content in contents.items():
            assert set(content.array_records) <= {"arrays"}
            wanted = initial(run, ["lenet", "cnn"][client])
            for record in content.array_records.values():
                sent = numpy_of(record)
                assert {n: a.shape for n, a in sent.items()} == {
                    n: a.shape for n, a in wanted.items()
                }


@pytest.mark.parametrize("spec", ["lenet", "lenet:batch", "cnn"])
def test_a_teacher_says_what_its_returned_weights_say(spec):
    run, wire = ran(**WEIGHTS, clients=1, rounds=1, models=spec)
    indices = np.arange(5, 40)
    returned = wire.up("train", "arrays")[0]
    told = answers(run.strategy.facts, spec, returned, indices)
    np.testing.assert_array_equal(told, says(run, spec, returned, indices))
    assert told.shape == (35, 10)
    assert told.dtype == np.float32


@pytest.mark.parametrize(("space", "temperature"), [("logit", 1.0), ("prob", 2.0)])
def test_every_group_learns_from_all_networks_and_starts_at_its_mean(lessons, space, temperature):
    settings = WEIGHTS | {"space": space, "temperature": temperature}
    run, wire = ran(**settings, clients=3, rounds=1, models="lenet:batch,cnn")
    models, examples = wire.up("train", "arrays"), examples_of(run)
    specs, indices = ["lenet:batch", "cnn", "lenet:batch"], run.strategy.draw(1)
    scores = [says(run, spec, models[client], indices) for client, spec in enumerate(specs)]
    wanted = softmax(mean(scores)) if space == "logit" else mean(softmax(z, 2.0) for z in scores)
    assert [job.spec for job in lessons] == ["cnn", "lenet:batch"]
    for job, members in zip(lessons, ([1], [0, 2]), strict=True):
        np.testing.assert_allclose(job.targets, wanted, rtol=1e-4, atol=1e-6)
        start = mean_by_hand([models[c] for c in members], [examples[c] for c in members])
        assert_close(job.weights, start)
        assert differs(run.strategy.state.models[job.spec], job.weights)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_is_not_finite_is_refused_by_name(lessons, value):
    spoil = replace_array("train", 2, "arrays", "0.bias", lambda v: np.full_like(v, value))
    run, wire = ran(spoil, **WEIGHTS, clients=4, rounds=1, models="lenet,cnn")
    assert any("client 2 (lenet)" in text and "0.bias" in text for text in run.warnings())
    models, examples, indices = wire.up("train", "arrays"), examples_of(run), run.strategy.draw(1)
    cnn, lenet = lessons
    assert_close(lenet.weights, mean_by_hand([models[0]], [1]))
    assert_close(cnn.weights, mean_by_hand([models[1], models[3]], [examples[1], examples[3]]))
    heard = [says(run, s, models[c], indices) for c, s in ((0, "lenet"), (1, "cnn"), (3, "cnn"))]
    for job in lessons:
        np.testing.assert_allclose(job.targets, softmax(mean(heard)), rtol=1e-4, atol=1e-6)


def test_a_model_whose_scores_are_not_finite_is_refused_by_name(lessons):
    """Weights may be finite and yet too large to say anything: neither a teacher nor in the mean."""

    def change(kind, round, client, reply):
        if (kind, client) == ("train", 1):
            for name, array in reply.content["arrays"].items():
                reply.content["arrays"][name] = Array(np.full_like(array.numpy(), 1e30))
        return reply

    run, wire = ran(change, **WEIGHTS, clients=3, rounds=1)
    assert any("client 1 (lenet)" in text and "scores" in text for text in run.warnings())
    models, examples = wire.up("train", "arrays"), examples_of(run)
    (job,) = lessons
    assert_close(job.weights, mean_by_hand([models[0], models[2]], [examples[0], examples[2]]))
    heard = [says(run, "lenet", models[c], run.strategy.draw(1)) for c in (0, 2)]
    np.testing.assert_allclose(job.targets, softmax(mean(heard)), rtol=1e-4, atol=1e-6)
    assert all(np.isfinite(w).all() for w in run.strategy.state.models["lenet"].values())


def test_a_group_without_members_in_a_round_keeps_its_model():
    after = {}

    def change(kind, round, client, reply):
        if (kind, client) == ("evaluate", 0):
            run.grid.absent = {3} if round == 1 else set()
            after[round] = {s: bits(w) for s, w in run.strategy.state.models.items()}
        return reply

    settings = WEIGHTS | {"clients": 2, "models": "lenet,cnn", "score": "last"}
    run, wire = federation(change, **settings, rounds=3, min_clients=1)
    run.run()
    assert [sorted(wire.up("train", "arrays", round)) for round in (1, 2, 3)] == [
        [0, 1],
        [0],
        [0, 1],
    ]
    assert_same_bits(after[2]["cnn"], after[1]["cnn"])
    assert differs(after[2]["lenet"], after[1]["lenet"])
    assert_same_bits(wire.down("train", "arrays", 3)[1], after[1]["cnn"])
    assert differs(after[3]["cnn"], after[2]["cnn"])


@pytest.mark.parametrize("steps", [0, 10])
def test_a_group_whose_replies_are_lost_keeps_its_model(steps):
    settings = WEIGHTS | {"steps": steps, "models": "lenet,cnn"}
    run, _ = ran(lose("train", 1), **settings, clients=3, rounds=1)
    assert_same_bits(run.strategy.state.models["cnn"], initial(run, "cnn"))
    assert differs(run.strategy.state.models["lenet"], initial(run, "lenet"))


def test_where_nobody_answers_all_groups_keep_their_models():
    def change(kind, round, client, reply):
        return None if kind == "train" else reply

    run, _ = ran(change, **WEIGHTS, clients=2, rounds=2, models="lenet,cnn")
    assert run.summary["rounds"] == 2
    for spec, weights in run.strategy.state.models.items():
        assert_same_bits(weights, initial(run, spec))


def as_one_class(run):
    """A change after which client 1 calls every image by the rarest label of the subset."""
    labels = run.view.data.public.labels.numpy()[run.strategy.draw(1)]
    rarest = int(np.bincount(labels, minlength=10).argmin())

    def change(kind, round, client, reply):
        if (kind, client) == ("train", 1):
            record = reply.content["arrays"]
            made = {name: np.zeros_like(array.numpy()) for name, array in record.items()}
            made[list(made)[-1]][rarest] = 5
            reply.content["arrays"] = ArrayRecord({n: Array(a) for n, a in made.items()})
        return reply

    return change


@pytest.mark.parametrize("drop_worst", [True, False])
def test_drop_worst_leaves_a_teacher_at_chance_out_of_the_ensemble(lessons, drop_worst):
    settings = WEIGHTS | {"drop_worst": drop_worst, "public_labels": True, "public": "digits:1000"}
    settings |= {"local_epochs": 30, "optimiser": "adam", "learning_rate": 0.003}
    run, wire = federation(**settings, clients=3, rounds=1)
    wire.change = as_one_class(run)
    run.run()
    indices = run.strategy.draw(1)
    labels = run.view.data.public.labels.numpy()[indices]
    received = [numpy_of(wire.received["train", 1, c]["arrays"]) for c in range(3)]
    scores = [says(run, "lenet", model, indices) for model in received]
    right = [float((z.argmax(axis=1) == labels).mean()) for z in scores]
    assert right[1] < 0.12 < min(right[0], right[2])
    # Averaged in any case.
    assert_close(lessons[0].weights, mean_by_hand(received, examples_of(run)))
    teachers = [0, 2] if drop_worst else [0, 1, 2]
    wanted = softmax(mean(scores[c] for c in teachers))
    np.testing.assert_allclose(lessons[0].targets, wanted, rtol=1e-4, atol=1e-6)
    said = [text for text in run.warnings() if "client 1 (lenet)" in text and "chance" in text]
    assert len(said) == drop_worst
    told = metrics(run)[1, None, "consensus/accuracy"]
    assert told == pytest.approx((wanted.argmax(axis=1) == labels).mean())


def test_drop_worst_needs_labels():
    with pytest.raises(UsageError, match="public-labels=true"):
        make_plan({**WEIGHTS, "drop_worst": True}, local=True)


def test_val_acc_needs_labels():
    with pytest.raises(UsageError, match="public-labels=true"):
        make_plan({**LOGITS, "score": "val_acc"}, local=True)


@BOTH
def test_where_no_row_is_certain_enough_nothing_is_learned(settings):
    """All rows are ambiguous: groups are their means, students stay, and nobody digests."""
    unsure = {"space": "prob", "ambiguity": 1e-6}
    run, wire = ran(**settings | unsure, clients=2, rounds=1)
    assert run.summary["rounds"] == 1
    assert not [at for at in wire.sent if at[0] == "train.digest"]
    if settings["exchange"] == "weights":
        wanted = mean_by_hand(list(wire.up("train", "arrays").values()), examples_of(run))
        assert_close(run.strategy.state.models["lenet"], wanted)


# The ensemble as a function

HYPER = FedDFHyperparameters(temperature=1.0)


@st.composite
def scores(draw):
    count, rows, classes = (
        draw(st.integers(1, 8)),
        draw(st.integers(1, 64)),
        draw(st.integers(2, 12)),
    )
    seed = draw(st.integers(0, 2**32 - 1))
    scale = draw(st.sampled_from([0.1, 1.0, 10.0]))
    drawn = np.random.default_rng(seed).standard_normal((count, rows, classes))
    return (scale * drawn).astype(np.float32)


def ensemble(told, clients=None, hyper=HYPER):
    """What students learn from the clients' scores."""
    members = [
        Member(c + 2, c, f"client {c}", "lenet", 10 * c + 1, 1, "cpu", ())
        for c in (range(len(told)) if clients is None else clients)
    ]
    reduce = Reducer(hyper)
    found = reduce((m, Upload(1.0, z)) for m, z in zip(members, told, strict=True))
    return softened(found.targets, hyper.temperature)


@given(scores(), st.sampled_from([0.5, 1.0, 3.0]))
def test_the_ensemble_is_the_softmax_of_the_mean(told, temperature):
    found = ensemble(told, hyper=replace(HYPER, temperature=temperature))
    wanted = softmax(told.astype(np.float64).mean(axis=0), temperature)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)


@given(scores(), st.randoms(use_true_random=False), st.sampled_from(["equal", "examples"]))
def test_the_ensemble_has_no_favourites(told, random, weighting):
    hyper = replace(HYPER, weighting=weighting)
    order = list(range(len(told)))
    random.shuffle(order)
    found = ensemble(told[order], order, hyper)
    np.testing.assert_allclose(found, ensemble(told, hyper=hyper), rtol=1e-4, atol=1e-7)


@given(scores(), st.data())
def test_a_constant_on_one_clients_scores_changes_nothing(told, data):
    client = data.draw(st.integers(0, len(told) - 1))
    shifts = data.draw(
        arrays(np.float32, (told.shape[1], 1), elements=st.floats(-50, 50, width=32))
    )
    shifted = told.copy()
    shifted[client] += shifts
    np.testing.assert_allclose(ensemble(shifted), ensemble(told), rtol=1e-4, atol=1e-6)


# Both


@BOTH
@pytest.mark.parametrize("models", ["lenet", "cnn"])
def test_measured_bytes_are_those_that_the_strategy_tells(settings, models):
    run, _ = ran(**settings | {"steps": 0}, clients=2, rounds=2, models=models)
    size = sum(array.nbytes for array in initial(run, models).values())
    up, down = run.strategy.traffic(
        run.plan.hyper, Sizes(NetworkSize(size), NetworkSize(1), 10, 1300, "float32")
    )
    assert (run.summary["bytes_up"], run.summary["bytes_down"]) == (2 * 2 * up, 2 * 2 * down)
    logits = 4 * 60 * 10
    assert (up, down) == (
        (size, size) if settings["exchange"] == "weights" else (logits, logits + 4 * 60)
    )


@BOTH
def test_no_label_of_the_public_set_is_used(settings):
    digests = []
    for wrong in (False, True):
        run, _ = federation(**settings, clients=2, rounds=1)
        if wrong:
            run.view.data.public.labels.fill_(0)
        digests.append(run.run()["digest"])
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "settings",
    [LOGITS, LOGITS | {"revisit_epochs": 1}, WEIGHTS],
    ids=["logits", "logits, revisited", "weights"],
)
def test_a_client_rebuilt_from_its_state_goes_on_as_it_would_have(settings):
    def change(kind, round, client, reply):
        del run.context(client)._fedkit_edge
        return reply

    settings = settings | KEPT | {"alone": True, "clients": 2, "rounds": 2, "schedule": "plateau"}
    usual, _ = ran(**settings)
    run, _ = federation(change, **settings)
    assert run.run()["digest"] == usual.summary["digest"]


@pytest.mark.slow
def test_students_in_processes_of_their_own_learn_the_same_bits():
    settings = LOGITS | {"clients": 2, "rounds": 1, "models": "lenet,cnn", "score": "last"}
    one, _ = ran(**settings)
    two, _ = ran(**settings | {"workers": 2})
    assert one.summary["digest"] == two.summary["digest"]
    for spec, weights in one.strategy.state.models.items():
        assert_same_bits(two.strategy.state.models[spec], weights)
        assert differs(weights, initial(one, spec))


def test_a_worker_ends_when_the_server_is_killed(tmp_path):
    """Its output is the server's: that closes when the last of them has gone."""
    script = tmp_path / "server.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, time
            from fedkit.engine.workers import Workers

            def who(seconds):
                time.sleep(seconds)
                return os.getpid()

            if __name__ == "__main__":
                workers = Workers(2, 1)
                print(*workers.map(who, [1, 1, 1, 1]), os.getpid(), flush=True)
                time.sleep(3600)
            """
        )
    )
    server = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=ENVIRONMENT,
        text=True,
    )
    workers = []
    try:
        assert server.stdout is not None
        *workers, parent = map(int, server.stdout.readline().split())
        assert parent == server.pid
        assert parent not in workers
        server.kill()
        server.communicate(timeout=LONG)
    except subprocess.TimeoutExpired:
        for worker in set(workers):
            os.kill(worker, signal.SIGKILL)
        raise
    finally:
        server.kill()
        server.wait()
    assert server.returncode == -signal.SIGKILL
