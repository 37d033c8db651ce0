"""A network at the server learns what an ensemble knows: the lesson alone, without any client."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_strategies import assert_close, assert_same_bits, differs, federation, numpy_of

from fedkit.data.samples import Samples
from fedkit.engine.roster import Member
from fedkit.engine.strategy import FederatedStrategy
from fedkit.errors import FedkitError
from fedkit.knowledge.consensus import Consensus
from fedkit.knowledge.reduction import WeightedMean
from fedkit.knowledge.softening import softened
from fedkit.models.build import build_model
from fedkit.models.losses import squared_error
from fedkit.models.measure import predict
from fedkit.models.training import endless, make_optimiser, take_steps
from fedkit.seeds import torch_generator
from strategies.averaging import received_models
from strategies.distillation import DistilHyperparameters, Job, distil
from strategies.students import Students

# The machine may be busy: no example is too slow.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# One thread: so a federation runs, and on a busy machine two are slower.
torch.set_num_threads(1)

SHAPE, CLASSES, SEED = (1, 8, 8), 4, 7
SHORT = DistilHyperparameters(
    steps=24,
    steps_patience=0,
    check_every=4,
    score="heldout_kl",
    heldout=0.25,
    server_batch=8,
    workers=1,
)


def weights_of(spec, client=-1):
    model = build_model(spec, SHAPE, CLASSES, SEED, client)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def images(count):
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (count, *SHAPE), generator=generator, dtype=torch.uint8)
    labels = torch.zeros(count, dtype=torch.int64)
    return Samples(pixels, labels, torch.tensor([128.0]), torch.tensor([64.0]))


def probabilities(count, seed=5, favour=3.0):
    """Rows that differ and favour class 2, which is what carries over to rows held out."""
    scores = np.random.default_rng(seed).standard_normal((count, CLASSES))
    scores[:, 2] += favour
    exponentials = np.exp(scores)
    return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)


def lesson(spec="lenet", count=20, labels=None, temperature=1.0, **changed):
    hyper = {name: changed.pop(name) for name in list(changed) if hasattr(SHORT, name)}
    return replace(
        Job(
            spec=spec,
            weights=weights_of(spec),
            samples=images(count),
            targets=probabilities(count),
            labels=labels,
            temperature=temperature,
            hyper=replace(SHORT, **hyper),
            outputs=CLASSES,
            seed=SEED,
            server_round=1,
        ),
        **changed,
    )


def says(spec, weights, samples, temperature=1.0):
    """softmax(z / temperature) of a network, in plain float64."""
    model = build_model(spec, SHAPE, CLASSES, SEED)
    model.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in weights.items()})
    scores = predict(model, samples).numpy().astype(np.float64) / temperature
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def divergence(targets, told):
    """KL(targets || told), summed over classes, averaged over rows."""
    wanted = targets.astype(np.float64)
    return float((wanted * (np.log(wanted) - np.log(told))).sum(axis=1).mean())


# The lesson


@pytest.mark.parametrize("score", ["heldout_kl", "val_acc", "last"])
@pytest.mark.parametrize("spec", ["lenet", "lenet:batch"])
def test_no_step_gives_the_weights_back_to_the_bit(spec, score):
    job = lesson(spec, steps=0, score=score, labels=np.zeros(20, dtype=np.int64))
    done = distil(job)
    assert_same_bits(done.weights, weights_of(spec))
    assert (done.steps, done.loss) == (0, 0.0)
    assert done.score == done.score_before


def test_a_lesson_brings_the_student_closer_to_the_ensemble():
    job = lesson(steps=100, score="last", server_rate=0.003)
    done = distil(job)
    before = divergence(job.targets, says("lenet", job.weights, job.samples))
    after = divergence(job.targets, says("lenet", done.weights, job.samples))
    assert after < before / 2


@pytest.mark.parametrize("spec", ["lenet", "lenet:batch"])
def test_logits_are_what_the_returned_weights_say(spec):
    job = lesson(spec)
    done = distil(job)
    assert done.logits.dtype == np.float32
    assert done.logits.shape == (20, CLASSES)
    assert_close(
        {"told": softened(done.logits, 1.0)}, {"told": says(spec, done.weights, job.samples)}
    )
    assert differs(done.weights, job.weights)


def test_a_lesson_changes_nothing_of_what_it_was_given():
    job, before = lesson("lenet:batch"), lesson("lenet:batch")
    distil(job)
    assert_same_bits(job.weights, before.weights)
    np.testing.assert_array_equal(job.targets, before.targets)
    assert torch.equal(job.samples.data, before.samples.data)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_scores_are_the_divergence_on_rows_held_out(temperature):
    """Half of the rows score: a student that says everywhere the same shows which by its score."""
    job = lesson(count=2, heldout=0.5, steps=0, temperature=temperature)
    told = says("lenet", job.weights, job.samples, temperature)
    each = [
        -(temperature**2) * divergence(job.targets[row : row + 1], told[row : row + 1])
        for row in (0, 1)
    ]
    assert min(abs(distil(job).score - score) for score in each) < 1e-5
    assert abs(each[0] - each[1]) > 1e-3


@settings(max_examples=25)
@given(
    count=st.integers(1, 24),
    steps=st.integers(0, 12),
    rate=st.sampled_from([1e-3, 0.1, 10.0]),
    score=st.sampled_from(["heldout_kl", "val_acc"]),
    heldout=st.sampled_from([0.01, 0.25, 0.5]),
    batch=st.integers(1, 9),
    every=st.integers(1, 5),
)
def test_the_score_never_falls_below_the_start(count, steps, rate, score, heldout, batch, every):
    labels = np.random.default_rng(count).integers(0, CLASSES, count)
    job = lesson(
        count=count,
        labels=labels,
        steps=steps,
        server_rate=rate,
        score=score,
        heldout=heldout,
        server_batch=batch,
        check_every=every,
    )
    done = distil(job)
    assert done.score >= done.score_before
    assert done.steps == steps
    if not differs(done.weights, job.weights):
        assert done.score == done.score_before
    # What is told is finite even where steps went astray.
    assert np.isfinite(done.logits).all()


def test_of_a_lesson_that_went_astray_the_start_is_left():
    job = lesson(server_rate=10.0)
    done = distil(job)
    assert_same_bits(done.weights, job.weights)
    assert distil(replace(job, hyper=replace(job.hyper, score="last"))).steps == 24
    last = distil(replace(job, hyper=replace(job.hyper, score="last")))
    assert differs(last.weights, job.weights)


def test_patience_ends_a_lesson_without_progress():
    job = lesson(server_rate=10.0, steps=1000, check_every=5, steps_patience=10)
    assert distil(job).steps == 10


def test_without_patience_every_step_is_taken():
    assert distil(lesson(server_rate=10.0, steps=30, check_every=4, steps_patience=0)).steps == 30


def test_accuracy_scores_by_labels():
    """Labels that the start has all right: whatever the ensemble says, nothing is better."""
    job = lesson(score="val_acc", server_rate=0.01)
    right = says("lenet", job.weights, job.samples).argmax(axis=1)
    wrong = (right + 1) % CLASSES
    kept = distil(replace(job, labels=right))
    assert (kept.score_before, kept.score) == (1, 1)
    assert_same_bits(kept.weights, job.weights)
    # With labels that it has all wrong, the ensemble being right, there is something to gain.
    towards = np.full((20, CLASSES), 0.01, dtype=np.float32)
    towards[np.arange(20), wrong] = 0.97
    learned = distil(replace(job, labels=wrong, targets=towards))
    assert learned.score_before == 0
    assert learned.score > 0
    assert differs(learned.weights, job.weights)


def test_rows_held_out_teach_nothing():
    """Scored by labels, a lesson does not even look at what the ensemble says of them."""
    labels = np.full(12, 2)
    job = lesson(count=12, labels=labels, steps=4, check_every=4, score="val_acc", server_rate=0.01)
    usual = distil(job)
    assert differs(usual.weights, job.weights), "the case needs a lesson that helps"
    silent = []
    for row in range(12):
        targets = job.targets.copy()
        targets[row] = targets[row, ::-1]
        if not differs(distil(replace(job, targets=targets)).weights, usual.weights):
            silent.append(row)
    assert len(silent) == 3  # a quarter


def test_without_a_score_every_row_teaches():
    job = lesson(count=6, steps=2, server_batch=6, score="last")
    usual = distil(job)
    for row in range(6):
        targets = job.targets.copy()
        targets[row] = targets[row, ::-1]
        assert differs(distil(replace(job, targets=targets)).weights, usual.weights)


def test_the_same_lesson_gives_the_same_bits():
    first, second = distil(lesson("lenet:batch")), distil(lesson("lenet:batch"))
    assert differs(first.weights, weights_of("lenet:batch"))
    assert_same_bits(first.weights, second.weights)
    np.testing.assert_array_equal(first.logits, second.logits)
    assert (first.loss, first.score) == (second.loss, second.score)


@pytest.mark.parametrize("change", [{"seed": SEED + 1}, {"server_round": 2}])
def test_seed_and_round_say_which_batches_come(change):
    # The seed gives no weights here: these are told.
    usual = distil(lesson(score="last"))
    other = distil(lesson(score="last", **change))
    assert differs(usual.weights, other.weights)


def test_a_lesson_neither_reads_nor_moves_torchs_own_random_numbers():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = distil(lesson())
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    torch.rand(3)
    second = distil(lesson())
    assert differs(first.weights, weights_of("lenet"))
    assert_same_bits(first.weights, second.weights)


@settings(max_examples=20)
@given(
    clip=st.sampled_from([1e-3, 0.1, 1.0, 1e9]),
    seed=st.integers(0, 100),
    scale=st.sampled_from([1.0, 100.0]),
)
def test_clipping_bounds_a_step_and_keeps_its_direction(clip, seed, scale):
    """SGD of rate 1 without momentum: a step is the gradient."""
    wanted = torch.from_numpy(scale * probabilities(8, seed))

    def moved(bound):
        model = build_model("lenet", SHAPE, CLASSES, SEED)
        old = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
        take_steps(
            model,
            images(8),
            wanted,
            squared_error,
            make_optimiser("sgd", model, 1.0),
            [torch.arange(8)],
            clip=bound,
        )
        new = torch.cat([p.detach().flatten() for p in model.parameters()])
        return (new - old).double()

    free, bounded = moved(0.0), moved(clip)
    length, most = float(free.norm()), float(bounded.norm())
    assert most <= clip * 1.001
    assert most == pytest.approx(min(length, clip), rel=1e-2)
    assert float(free @ bounded) == pytest.approx(length * most, rel=1e-2)


def test_a_gradient_clipped_to_nothing_teaches_nothing():
    """Below Adam's epsilon of 1e-7 a gradient no longer moves what it should."""
    moved = {}
    for clip in (0.0, 1e-12):
        job = lesson(clip=clip, score="last")
        done = distil(job)
        moved[clip] = max(
            np.abs(done.weights[name] - job.weights[name]).max() for name in done.weights
        )
    assert moved[1e-12] < 1e-5 < 1e-3 < moved[0.0]


@pytest.mark.parametrize(("count", "size"), [(1, 4), (2, 1), (3, 2), (5, 4), (8, 3)])
def test_batches_come_epoch_after_epoch(count, size):
    generator = torch_generator(SEED, "test")
    batches = endless(count, size, generator)
    whole = -(-count // size) - (count % size == 1 and count > 1 and size > 1)
    for _ in range(3):
        epoch = torch.cat([next(batches) for _ in range(whole)]).tolist()
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(count))
        assert len(epoch) >= count - 1


# Students, on some rows of a subset


class Stub(FederatedStrategy):
    """As much of a strategy as its helpers need."""

    def configure_train(self, *args):
        raise NotImplementedError

    def aggregate_train(self, *args):
        raise NotImplementedError


class Server(Stub):
    """A strategy with students."""

    def __init__(self, **changed):
        run, _ = federation(strategy="feddf", workers=1, clients=2, rounds=1)
        self.run = run
        self.told = []
        super().__init__(replace(SHORT, **changed), run.strategy.facts, self.told.append)

    def learn(self, indices, target, spec="lenet"):
        start = {spec: numpy_of(self.facts.initial_weights(spec))}
        return Students(self).learn(1, "local", start, indices, target, 1.0)[spec]


def consensus_on(count, valid, classes=10):
    generator = np.random.default_rng(6)
    targets = generator.dirichlet(np.ones(classes), count).astype(np.float32)
    return Consensus(targets, valid)


def test_students_learn_only_the_rows_that_have_a_target():
    indices = np.arange(3, 27)
    valid = np.arange(24) % 3 > 0
    server, target = Server(), consensus_on(24, valid)
    usual = server.learn(indices, target)
    # What stands in the other rows is never read.
    spoilt = np.where(valid[:, None], target.targets, np.float32(np.nan))
    assert_same_bits(server.learn(indices, Consensus(spoilt, valid)).weights, usual.weights)
    # As if the subset had never held them.
    part = server.learn(indices[valid], Consensus(target.targets[valid], np.ones(16, dtype=bool)))
    assert_same_bits(part.weights, usual.weights)
    # A row that counts does count.
    spoilt[1] = spoilt[1, ::-1]
    assert differs(server.learn(indices, Consensus(spoilt, valid)).weights, usual.weights)


def test_students_tell_about_the_rows_that_have_a_target():
    indices = np.arange(3, 27)
    valid = np.arange(24) % 3 > 0
    server = Server()
    done = server.learn(indices, consensus_on(24, valid))
    public = server.facts.public.take(torch.from_numpy(indices[valid]))
    model = build_model("lenet", public.shape, 10, server.facts.settings.seed)
    model.load_state_dict({name: torch.from_numpy(a) for name, a in done.weights.items()})
    assert done.logits.shape == (24, 10)
    np.testing.assert_array_equal(done.logits[valid], predict(model, public).numpy())
    assert not done.logits[~valid].any()


def test_students_tell_how_well_they_learned():
    server = Server(server_rate=0.01)
    done = server.learn(np.arange(24), consensus_on(24, np.ones(24, dtype=bool)))
    told = {event.name: event for event in server.told}
    assert set(told) == {f"student/lenet/{name}" for name in ("loss", "score", "score_before")}
    assert told["student/lenet/score"].value == done.score
    assert told["student/lenet/score_before"].value == done.score_before
    assert {event.n for event in told.values()} == {24}
    assert {(event.round, event.exchange) for event in told.values()} == {(1, "local")}


def test_students_are_dealt_to_the_gpus_in_turn(monkeypatch):
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setattr("fedkit.models.device.pick_devices", lambda name: gpus)
    given = []

    def take(self, work, jobs):
        given.extend((job.spec, job.device) for job in jobs)
        return [distil(replace(job, device="cpu")) for job in jobs]

    monkeypatch.setattr("fedkit.engine.workers.Workers.map", take)
    server = Server(server_device="cuda")
    start = {
        spec: numpy_of(server.facts.initial_weights(spec)) for spec in ("lenet", "mlp:8", "mlp:9")
    }
    target = consensus_on(24, np.ones(24, dtype=bool))
    learned = Students(server).learn(1, "local", start, np.arange(24), target, 1.0)
    assert given == [("lenet", "cuda:0"), ("mlp:8", "cuda:1"), ("mlp:9", "cuda:0")]
    assert list(learned) == list(start)


def test_a_server_device_that_is_not_here_is_named():
    with pytest.raises(FedkitError, match="no device 'cuda:9'"):
        Students(Server(server_device="cuda:9"))


# Models that came back


def member(client):
    return Member(client + 2, client, f"client {client} (lenet)", "lenet", 10**6, 10, "cpu", ())


class Receiver(Stub):
    """A strategy that averages."""

    def __init__(self):
        self.told = []
        super().__init__(None, SimpleNamespace(), self.told.append)


GLOBAL = {
    "bias": np.zeros(3, dtype=np.float32),
    "count": np.array(4, dtype=np.int64),
    "weight": np.zeros((3, 2), dtype=np.float32),
}


def received(*replies, weighting="examples"):
    """What ``received_models`` makes of the clients' (arrays, samples), and what it says."""
    receiver = Receiver()
    members = [member(client) for client in range(len(replies))]
    asked = list(receiver.instruct(members, "train", 1, lambda member: RecordDict()))
    messages = []
    for question, (model, samples) in zip(asked, replies, strict=True):
        content = RecordDict({"metrics": MetricRecord({"num-examples": samples})})
        content["arrays"] = ArrayRecord({name: Array(a) for name, a in model.items()})
        messages.append(Message(content, reply_to=question))
    sent = ArrayRecord({name: Array(a) for name, a in GLOBAL.items()})
    models = list(received_models(receiver, 1, messages, lambda member: sent, weighting))
    return models, receiver.told


def test_models_come_with_their_sender_and_weight():
    models, told = received((GLOBAL, 5), (GLOBAL, 0))
    assert [(member.client, weight) for member, weight, _ in models] == [(0, 5.0), (1, 0.0)]
    for _, _, model in models:
        assert_same_bits(model, GLOBAL)
    assert not told
    models, _ = received((GLOBAL, 5), (GLOBAL, 0), weighting="equal")
    assert [weight for _, weight, _ in models] == [1.0, 1.0]


@pytest.mark.parametrize("name", ["bias", "weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_model_that_is_not_finite_is_left_out_by_name(name, value):
    bad = {**GLOBAL, name: np.full_like(GLOBAL[name], value)}
    models, told = received((GLOBAL, 5), (bad, 5), (GLOBAL, 7))
    assert [member.client for member, _, _ in models] == [0, 2]
    (event,) = told
    assert event.client == 1
    assert "client 1 (lenet)" in event.name
    assert f"{name} is not finite" in event.name


@settings(max_examples=60)
@given(
    name=st.sampled_from(["bias", "count", "weight"]),
    shape=st.sampled_from([(), (1,), (2,), (3,), (3, 1), (2, 3), (3, 2), (3, 2, 1), (0,)]),
    dtype=st.sampled_from(["float16", "float32", "float64", "int32", "int64", "uint8", "bool"]),
)
def test_a_model_of_another_shape_or_type_is_left_out_by_name(name, shape, dtype):
    other = np.ones(shape, dtype=dtype)
    models, told = received((GLOBAL, 5), ({**GLOBAL, name: other}, 5))
    fits = other.shape == GLOBAL[name].shape and other.dtype == GLOBAL[name].dtype
    assert len(models) == 1 + fits
    assert len(told) == 1 - fits
    for event in told:
        assert "client 1 (lenet)" in event.name
        assert f"{name} is {dtype} {other.shape}" in event.name


@settings(max_examples=40)
@given(
    st.integers(1, 8).flatmap(
        lambda count: st.lists(
            st.tuples(
                arrays(np.float32, (3, 2), elements=st.floats(-1e3, 1e3, width=32)),
                st.integers(0, 100),
            ),
            min_size=count,
            max_size=count,
        )
    )
)
def test_received_models_average_as_by_hand(clients):
    replies = [({**GLOBAL, "weight": values}, samples) for values, samples in clients]
    models, told = received(*replies)
    assert not told
    mean = WeightedMean()
    for _, weight, model in models:
        mean.add(weight, model)
    total = sum(samples for _, samples in clients)
    if total:
        wanted = sum(samples * v.astype(np.float64) for v, samples in clients) / total
        result = mean.result()
        np.testing.assert_allclose(result["weight"], wanted, rtol=1e-6, atol=1e-6)
        assert result["count"] == 4
        assert result["count"].shape == ()
        assert result["count"].dtype == np.int64


@pytest.mark.parametrize(
    "other",
    [
        {"bias": np.zeros(3, dtype=np.float32)},
        {**GLOBAL, "more": np.zeros(1, dtype=np.float32)},
        {**GLOBAL, "weight": np.zeros((2, 3), dtype=np.float32)},
        {**GLOBAL, "bias": np.zeros(1, dtype=np.float32)},
    ],
    ids=["missing", "more", "turned", "broadcasts"],
)
def test_a_mean_takes_only_arrays_of_one_shape(other):
    mean = WeightedMean()
    mean.add(1.0, GLOBAL)
    with pytest.raises(ValueError, match=r"names|(weight|bias) has the shape"):
        mean.add(1.0, other)
