"""FedDistill (Jiang 2020): personal teachers of any architecture, and what they give to a student."""

import numpy as np
import pytest
import torch
from flwr.app import Array
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_strategies import (
    FEDAVG,
    assert_close,
    assert_same_bits,
    differs,
    examples_of,
    federation,
    global_model,
    initial_model,
    kept_model,
    lose,
    numpy_of,
    ran,
    replace_array,
)

from fedkit.engine.plan import make_plan
from fedkit.engine.strategy import NetworkSize, Sizes
from fedkit.models.build import build_model
from fedkit.models.losses import kl_divergence, soften
from fedkit.models.measure import predict
from strategies.distillation import distil

# The machine may be busy: no example is too slow.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Little private data, so that runs are short.
LOCAL = {
    "public": "digits:1300",
    "local_epochs": 2,
    "batch_size": 16,
    "optimiser": "sgd",
    "learning_rate": 0.05,
    "keep_optimiser": False,
}
LOGITS = {
    "strategy": "feddistill",
    "exchange": "logits",
    "public_samples": 60,
    "temperature": 3.0,
    "distill_weight": 0.5,
    "digest_epochs": 1,
    "revisit_epochs": 0,
    "digest_batch": 32,
    "steps": 10,
    "steps_patience": 0,
    "check_every": 5,
    "server_batch": 16,
    "workers": 1,
    **LOCAL,
}
WEIGHTS = {
    "strategy": "feddistill",
    "exchange": "weights",
    "temperature": 3.0,
    "distill_weight": 0.5,
    "teacher_first": 2,
    "teacher_epochs": 1,
    "workers": 1,
    **LOCAL,
}
# What clients take from round to round besides their models.
KEPT = {"optimiser": "adam", "learning_rate": 0.003, "keep_optimiser": True}
BOTH = pytest.mark.parametrize("settings", [LOGITS, WEIGHTS], ids=lambda s: s["exchange"])
# One batch: an epoch is then a step of gradient descent, whatever the order.
WHOLE = {"batch_size": 10_000, "digest_batch": 10_000}


@pytest.fixture
def lessons(monkeypatch):
    """Every lesson that the student of this test had: what went in."""
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


def mean(values):
    return np.mean(np.array(list(values), dtype=np.float64), axis=0)


def divergence(targets, told):
    """KL(targets || told), summed over classes, averaged over rows."""
    wanted = np.maximum(np.asarray(targets, dtype=np.float64), 1e-30)
    return float((wanted * (np.log(wanted) - np.log(told))).sum(axis=1).mean())


def network(run, spec, weights=None, client=-1):
    data = run.view.data
    model = build_model(spec, data.shape, data.outputs, run.plan.federation.seed, client)
    if weights is not None:
        model.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in weights.items()})
    return model


def own_start(run, spec, client):
    """What a client's own model starts from."""
    return arrays_of(network(run, spec, client=client))


def arrays_of(model):
    return {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}


def says(run, spec, weights, indices):
    return predict(
        network(run, spec, weights), run.view.data.public.take(torch.from_numpy(indices))
    ).numpy()


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


def labelled(model, samples):
    """Mean negative log-likelihood, in float64 by its definition."""
    scores = model(samples.inputs(slice(None)).double())
    logs = scores - scores.logsumexp(dim=1, keepdim=True)
    return -logs[torch.arange(len(samples)), samples.labels].mean()


def distilled(model, samples, teacher, temperature):
    """tau^2 KL(teacher || softmax(z / tau)), in float64 by its definition."""
    scores = model(samples.inputs(slice(None)).double()) / temperature
    logs = scores - scores.logsumexp(dim=1, keepdim=True)
    wanted = torch.as_tensor(teacher, dtype=torch.float64)
    return temperature**2 * (wanted * (wanted.log() - logs)).sum(dim=1).mean()


def descended(model, loss, rate, steps=1):
    """A network after steps of gradient descent in float64."""
    model = model.double()
    for _ in range(steps):
        model.zero_grad()
        loss(model).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
    return arrays_of(model)


# Weights travel


@pytest.mark.parametrize(
    ("model", "how"),
    [
        ("lenet", {"momentum": 0.5}),
        ("lenet:batch", {"schedule": "step", "schedule_patience": 0}),
        ("lenet:batch", {"buffers": "static"}),
        # A rate at which the loss rises at times, so that plateau has something to do.
        ("lenet", {"schedule": "plateau", "schedule_patience": 0, "learning_rate": 0.5}),
        ("lenet", KEPT),
    ],
    ids=["momentum", "step", "static", "plateau", "kept"],
)
def test_without_distillation_it_is_fedavg_to_the_bit(model, how):
    shared = LOCAL | {"model": model, "clients": 3, "rounds": 3, "partition": "dirichlet:0.3"} | how
    fedavg, _ = ran(strategy="fedavg", **shared, weighting="examples")
    run, _ = ran(**WEIGHTS | shared | {"distill_weight": 0.0}, models="cnn,lenet")
    assert_same_bits(global_model(run), global_model(fedavg))
    wanted, found = metrics(fedavg), metrics(run)
    assert len(wanted) > 10
    assert {at: found.get(at) for at in wanted} == wanted
    assert run.summary["mean_global_accuracy"] == fedavg.summary["mean_global_accuracy"]
    guided, _ = ran(**WEIGHTS | shared, models="cnn,lenet")
    assert differs(global_model(guided), global_model(fedavg))


def test_no_teacher_ever_reaches_the_server():
    run, wire = ran(**WEIGHTS, clients=3, rounds=2, models="cnn,lenet:batch", model="lenet")
    wanted = {name: array.shape for name, array in initial_model(run).items()}
    seen = 0
    for contents in (wire.sent, wire.received):
        for content in contents.values():
            assert set(content.array_records) <= {"arrays"}
            for record in content.array_records.values():
                assert {name: a.shape for name, a in numpy_of(record).items()} == wanted
                seen += 1
    # Two ways in two rounds of training, and down once more to be measured.
    assert seen == 3 * 2 * 3


def test_it_costs_the_bytes_of_fedavg():
    shared = {"clients": 2, "rounds": 2, "model": "lenet"}
    fedavg, _ = ran(**FEDAVG | LOCAL, **shared)
    run, _ = ran(**WEIGHTS, **shared, models="cnn,lenet")
    for way in ("bytes_up", "bytes_down"):
        assert run.summary[way] == fedavg.summary[way] > 0
        for mine, theirs in zip(run.summary["clients"], fedavg.summary["clients"], strict=True):
            assert mine[way] == theirs[way]


def test_a_teacher_that_says_what_the_copy_says_teaches_nothing():
    """lambda = 1: there is nothing else to learn from."""
    settings = WEIGHTS | {"teacher_first": 0, "teacher_epochs": 0, "distill_weight": 1.0}
    run, _ = federation(**settings, clients=1, rounds=1, models="lenet", model="lenet")
    run.context(0).state["own-model"] = run.strategy.initial_arrays()
    run.run()
    assert abs(metrics(run)[1, 0, "train_loss"]) < 1e-6
    assert_close(global_model(run), initial_model(run), 1e-6)
    # Its own network would have taught something.
    usual, _ = ran(**settings, clients=1, rounds=1, models="lenet", model="lenet")
    assert (
        max(np.abs(w - initial_model(run)[n]).max() for n, w in global_model(usual).items()) > 1e-4
    )


@given(
    st.tuples(st.integers(1, 64), st.integers(2, 12)).flatmap(
        lambda shape: arrays(np.float32, shape, elements=st.floats(-20, 20, width=32))
    ),
    st.sampled_from([0.5, 1.0, 3.0]),
)
def test_there_is_no_divergence_from_equal_scores(scores, temperature):
    logits = torch.from_numpy(scores)
    loss = kl_divergence(temperature, reduction="batchmean")
    assert abs(float(loss(logits, soften(logits, temperature)))) < 1e-6


@pytest.mark.parametrize(("first", "each"), [(0, 0), (3, 0), (0, 2), (2, 1)])
def test_a_teacher_is_trained_before_its_first_round_and_in_each(first, each):
    settings = WEIGHTS | WHOLE | {"teacher_first": first, "teacher_epochs": each, "alone": True}
    run, _ = ran(**settings, clients=2, rounds=2, models="cnn,lenet")
    for client, spec in enumerate(["cnn", "lenet"]):
        samples = run.view.data.shard(client).train
        start = network(run, spec, client=client)
        wanted = descended(start, lambda m, s=samples: labelled(m, s), 0.05, first + 2 * each)
        assert_close(kept_model(run, client), wanted, 1e-5)
        assert differs(kept_model(run, client), own_start(run, spec, client)) == bool(first + each)
        # It learns from nobody, so it is the reference.
        assert_same_bits(kept_model(run, client), kept_model(run, client, "alone"))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step", "plateau"])
def test_no_schedule_of_the_rounds_changes_the_first_lesson(schedule):
    settings = WEIGHTS | {"teacher_epochs": 0, "schedule": schedule, "schedule_patience": 0}
    run, _ = ran(**settings, clients=1, rounds=3)
    usual, _ = ran(**WEIGHTS | {"teacher_epochs": 0}, clients=1, rounds=3)
    assert_same_bits(kept_model(run, 0), kept_model(usual, 0))
    assert differs(kept_model(run, 0), own_start(run, "lenet", 0))


@pytest.mark.parametrize(("share", "temperature"), [(0.3, 2.0), (1.0, 1.0), (0.5, 3.0)])
def test_a_copy_learns_from_labels_and_from_the_teacher(share, temperature):
    settings = WEIGHTS | WHOLE | {"local_epochs": 1, "teacher_first": 5, "learning_rate": 0.1}
    settings |= {"distill_weight": share, "temperature": temperature}
    run, wire = ran(**settings, clients=2, rounds=1, models="cnn,lenet", model="lenet")
    for client, spec in enumerate(["cnn", "lenet"]):
        samples = run.view.data.shard(client).train
        teacher = network(run, spec, kept_model(run, client))
        wanted = softmax(predict(teacher, samples).numpy(), temperature)

        def loss(model, samples=samples, wanted=wanted):
            guided = distilled(model, samples, wanted, temperature)
            return (1 - share) * labelled(model, samples) + share * guided

        stepped = descended(network(run, "lenet"), loss, 0.1)
        assert differs(stepped, initial_model(run))
        assert_close(wire.up("train", "arrays")[client], stepped, 1e-5)


def test_the_copies_are_averaged_by_samples():
    run, wire = ran(**WEIGHTS, clients=3, rounds=1, models="cnn,lenet", partition="dirichlet:0.3")
    copies, examples = wire.up("train", "arrays"), examples_of(run)
    assert len(set(examples)) > 1
    wanted = {
        name: np.average(
            np.array([copies[c][name] for c in range(3)], dtype=np.float64),
            axis=0,
            weights=examples,
        )
        for name in copies[0]
    }
    assert_close(global_model(run), wanted)


def test_a_copy_that_is_not_finite_is_refused_by_name():
    spoil = replace_array("train", 1, "arrays", "0.bias", lambda v: np.full_like(v, np.nan))
    run, wire = ran(spoil, **WEIGHTS, clients=2, rounds=1, models="lenet,cnn", model="lenet")
    assert any("client 1 (cnn)" in text and "0.bias" in text for text in run.warnings())
    assert_same_bits(global_model(run), wire.up("train", "arrays")[0])


def test_a_client_measures_the_global_model_and_its_teacher():
    run, _ = ran(**WEIGHTS, clients=2, rounds=1, models="cnn,lenet", model="lenet")
    told = metrics(run)
    for client in (0, 1):
        for name in (
            "global_model/own_test",
            "teacher_model/own_test",
            "teacher_model/global_test",
        ):
            assert 0 <= told[1, client, f"{name}/accuracy"] <= 1
    assert 0 <= told[1, None, "global_model/global_test/accuracy"] <= 1


# Logits travel


def test_only_answers_on_the_public_set_travel():
    _, wire = ran(**LOGITS, clients=2, rounds=2, models="lenet,cnn", model="lenet")
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


@pytest.mark.parametrize("weighting", ["equal", "examples"])
def test_the_student_learns_the_mean_of_the_soft_labels(lessons, weighting):
    settings = LOGITS | {"weighting": weighting, "models": "lenet,cnn", "model": "lenet"}
    run, wire = ran(**settings, clients=3, rounds=2, partition="dirichlet:0.3")
    weights = examples_of(run) if weighting == "examples" else [1, 1, 1]
    assert len(set(examples_of(run))) > 1
    for round, job in enumerate(lessons, 1):
        told = np.array(list(uploads(wire, round).values()), dtype=np.float64)
        np.testing.assert_allclose(told.sum(axis=2), 1, atol=1e-6)
        wanted = np.average(told, axis=0, weights=weights)
        np.testing.assert_allclose(job.targets, wanted, rtol=1e-5, atol=1e-7)
        images = run.view.data.public.data[torch.from_numpy(subset_of(wire, round))]
        assert torch.equal(job.samples.data, images)
    assert [job.spec for job in lessons] == ["lenet", "lenet"]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_labels_are_softened_by_the_temperature(temperature):
    settings = LOGITS | {"local_epochs": 0, "digest_epochs": 0, "temperature": temperature}
    run, wire = ran(**settings, clients=2, rounds=1, models="lenet,cnn")
    for client, spec in enumerate(["lenet", "cnn"]):
        own = says(run, spec, own_start(run, spec, client), subset_of(wire))
        np.testing.assert_allclose(uploads(wire)[client], softmax(own, temperature), rtol=1e-5)


@pytest.mark.parametrize(("model", "models"), [("lenet", "lenet,cnn"), ("cnn", "lenet")])
def test_clients_are_told_what_the_student_says(model, models):
    """Also where the student is larger than any client's network."""
    run, wire = ran(**LOGITS, clients=2, rounds=1, model=model, models=models)
    student = run.strategy.state.student
    wanted = softmax(says(run, model, student, subset_of(wire)), 3.0)
    assert sorted(targets(wire)) == [0, 1]
    for told in targets(wire).values():
        np.testing.assert_allclose(told, wanted, rtol=1e-5, atol=1e-7)
    assert (1, None, "global_model/global_test/accuracy") in metrics(run)


def test_without_steps_the_student_stays_and_tells_its_first_answers():
    run, wire = ran(**LOGITS | {"steps": 0}, clients=2, rounds=2)
    start = numpy_of(run.strategy.facts.initial_weights("lenet"))
    assert_same_bits(run.strategy.state.student, start)
    for round in (1, 2):
        wanted = softmax(says(run, "lenet", start, subset_of(wire, round)), 3.0)
        for told in targets(wire, round).values():
            np.testing.assert_allclose(told, wanted, rtol=1e-5, atol=1e-7)


def test_the_student_goes_on_from_where_it_was(lessons):
    after = {}

    def change(kind, round, client, reply):
        if kind == "train.digest":
            after[round] = {n: a.copy() for n, a in run.strategy.state.student.items()}
        return reply

    run, _ = federation(change, **LOGITS | {"score": "last"}, clients=2, rounds=2)
    run.run()
    assert_same_bits(lessons[0].weights, numpy_of(run.strategy.facts.initial_weights("lenet")))
    assert_same_bits(lessons[1].weights, after[1])
    assert differs(after[2], after[1])


def test_a_student_with_enough_steps_says_what_its_teachers_say_in_the_mean():
    told = {}
    for steps in (0, 40, 800):
        settings = LOGITS | {"public_samples": 8, "steps": steps, "score": "last"}
        settings |= {"local_epochs": 20, "optimiser": "adam", "learning_rate": 0.003}
        settings |= {"temperature": 1.0, "server_rate": 0.01}
        _, wire = ran(**settings, clients=2, rounds=1)
        told[steps] = divergence(mean(uploads(wire).values()), targets(wire)[0])
    assert told[0] > 0.1
    assert told[40] < told[0] / 2
    assert told[800] < 1e-3


@pytest.mark.parametrize(("share", "alike"), [(0.0, True), (0.5, False)])
def test_without_distillation_clients_do_not_hear_the_server(share, alike):
    models = []
    for steps in (0, 30):
        settings = LOGITS | {"steps": steps, "distill_weight": share, "score": "last"}
        run, _ = ran(**settings, clients=2, rounds=2, models="lenet,cnn")
        models.append([kept_model(run, client) for client in (0, 1)])
    for first, second in zip(*models, strict=True):
        assert differs(first, second) != alike


@pytest.mark.parametrize(("share", "temperature"), [(0.3, 2.0), (1.0, 1.0), (0.5, 3.0)])
def test_a_client_digests_with_its_own_labels_beside(share, temperature):
    settings = LOGITS | WHOLE | {"local_epochs": 0, "learning_rate": 0.1}
    settings |= {"distill_weight": share, "temperature": temperature}
    run, wire = ran(**settings, clients=2, rounds=1, models="cnn,lenet")
    public = run.view.data.public.take(torch.from_numpy(subset_of(wire)))
    for client, spec in enumerate(["cnn", "lenet"]):
        samples, wanted = run.view.data.shard(client).train, targets(wire)[client]

        def loss(model, samples=samples, wanted=wanted):
            guided = distilled(model, public, wanted, temperature)
            return (1 - share) * labelled(model, samples) + share * guided

        stepped = descended(network(run, spec, client=client), loss, 0.1)
        assert differs(stepped, own_start(run, spec, client))
        assert_close(kept_model(run, client), stepped, 1e-5)


@pytest.mark.parametrize("digest_epochs", [0, 1])
def test_one_shot(digest_epochs):
    """One round: the student has all that it needs, and is sent down only to be digested."""
    run, wire = ran(**LOGITS | {"digest_epochs": digest_epochs}, clients=2, rounds=1)
    assert sorted(uploads(wire)) == [0, 1]
    assert sorted(targets(wire)) == ([0, 1] if digest_epochs else [])
    assert bool([at for at in wire.sent if at[0] == "train.digest"]) == bool(digest_epochs)
    assert differs(
        run.strategy.state.student, numpy_of(run.strategy.facts.initial_weights("lenet"))
    )


def test_a_lost_answer_leaves_out_that_client_alone(lessons):
    _, wire = ran(lose("train.local", 1), **LOGITS, clients=3, rounds=2, models="lenet,cnn")
    assert sorted(uploads(wire)) == sorted(targets(wire)) == [0, 2]
    np.testing.assert_allclose(lessons[0].targets, mean(uploads(wire).values()), rtol=1e-5)
    assert sorted(targets(wire, 2)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda values: np.full_like(values, np.nan), "finite"),
        (lambda values: values[:-1], "(59, 10)"),
    ],
    ids=["nan", "short"],
)
def test_an_answer_that_cannot_be_is_refused_by_name_and_the_round_goes_on(make, reason, lessons):
    spoil = replace_array("train.local", 1, "logits", "values", make)
    run, wire = ran(spoil, **LOGITS, clients=2, rounds=1, models="lenet,cnn")
    assert any("client 1 (cnn)" in text and reason in text for text in run.warnings())
    assert sorted(targets(wire)) == [0]
    np.testing.assert_allclose(lessons[0].targets, uploads(wire)[0], rtol=1e-5)


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "nan"])
def test_where_nobody_can_be_heard_nothing_is_sent_and_the_student_stays(lost):
    before = {}

    def change(kind, round, client, reply):
        if kind == "train.local" and round == 2:
            before.update({n: a.copy() for n, a in run.strategy.state.student.items()})
            reply.content["logits"]["values"] = Array(np.full((60, 10), np.nan, dtype=np.float32))
            return None if lost else reply
        return reply

    run, wire = federation(change, **LOGITS, clients=2, rounds=2)
    assert run.run()["rounds"] == 2
    assert sorted(targets(wire, 1)) == [0, 1]
    assert not [at for at in wire.sent if at[:2] == ("train.digest", 2)]
    assert before
    assert_same_bits(run.strategy.state.student, before)


def test_a_row_that_nobody_provides_is_neither_learned_nor_digested(lessons):
    def change(kind, round, client, reply):
        if kind == "train.local":
            values = reply.content["logits"]["values"].numpy().copy()
            values[5] = np.nan
            values[6 + client] = np.inf
            reply.content["logits"]["values"] = Array(values)
        return reply

    run, wire = ran(change, **LOGITS, clients=2, rounds=1, on_bad="drop_row")
    told, kept = uploads(wire), np.arange(60) != 5
    wanted = mean(told.values())
    wanted[6], wanted[7] = told[1][6], told[0][7]
    np.testing.assert_allclose(lessons[0].targets, wanted[kept], rtol=1e-5, atol=1e-7)
    student = says(run, "lenet", run.strategy.state.student, subset_of(wire)[kept])
    for target in targets(wire).values():
        np.testing.assert_allclose(target, softmax(student, 3.0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("revisits", [0, 1])
def test_without_digest_everyone_is_alone(revisits):
    settings = LOGITS | KEPT | {"digest_epochs": 0, "revisit_epochs": revisits, "alone": True}
    run, _ = ran(**settings, clients=2, rounds=2)
    for client in (0, 1):
        assert_same_bits(kept_model(run, client), kept_model(run, client, "alone"))


# Both


def test_the_paper_sends_weights():
    plan = make_plan({"strategy": "feddistill", "preset": "paper"}, local=True)
    assert plan.hyper.exchange == "weights"
    assert plan.federation.model == "cnn"


@BOTH
def test_clients_without_samples_of_their_own_take_part(settings):
    """Each keeps its only sample for measuring: there are no labels to learn from."""
    run, wire = ran(**settings | {"public": "digits:1398"}, clients=2, rounds=2)
    assert examples_of(run) == [0, 0]
    assert run.summary["rounds"] == 2
    assert not run.warnings()
    if settings["exchange"] == "logits":
        # There is still the student to learn from.
        assert sorted(targets(wire)) == [0, 1]
        assert differs(kept_model(run, 0), own_start(run, "lenet", 0))
    else:
        assert_same_bits(global_model(run), initial_model(run))


@BOTH
def test_measured_bytes_are_those_that_the_strategy_tells(settings):
    run, _ = ran(**settings, clients=2, rounds=2, models="cnn,lenet", model="lenet")
    weights = numpy_of(run.strategy.facts.initial_weights("lenet"))
    size = sum(array.nbytes for array in weights.values())
    up, down = run.strategy.traffic(
        run.plan.hyper, Sizes(NetworkSize(1), NetworkSize(size), 10, 1300, "float32")
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


@BOTH
def test_the_order_of_replies_does_not_matter(settings):
    settings = settings | {"clients": 3, "rounds": 2, "models": "lenet,cnn"}
    usual, _ = ran(**settings, partition="dirichlet:0.3")
    run, _ = federation(**settings, partition="dirichlet:0.3")
    pull = run.grid.pull_messages
    run.grid.pull_messages = lambda ids: pull(ids)[::-1]
    assert run.run()["digest"] == usual.summary["digest"]


@BOTH
@pytest.mark.parametrize(
    "how",
    [KEPT, {"schedule": "plateau", "schedule_patience": 0, "revisit_epochs": 1}],
    ids=["kept", "plateau, revisited"],
)
def test_a_client_rebuilt_from_its_state_goes_on_as_it_would_have(settings, how):
    """Its teacher, too: it is not taught its first lesson twice."""

    def change(kind, round, client, reply):
        del run.context(client)._fedkit_edge
        return reply

    settings = settings | {"alone": True, "clients": 2, "rounds": 3, "models": "cnn,lenet"} | how
    usual, _ = ran(**settings)
    run, _ = federation(change, **settings)
    assert run.run()["digest"] == usual.summary["digest"]
    for client in (0, 1):
        assert_same_bits(kept_model(run, client), kept_model(usual, client))
