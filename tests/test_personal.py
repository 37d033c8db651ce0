"""Personal models beside a global one: Ditto's, and FedAvg's after fine-tuning."""

from __future__ import annotations

import numpy as np
import pytest
from inprocess import InProcessFederation, bits, ran
from resuming import measured, resumed

from fedkit.engine.plan import make_plan
from fedkit.errors import UsageError

SMALL = {"clients": 3, "public": "digits:30", "num_shards": 12, "partition": "dirichlet:0.3"}
FEDAVG = SMALL | {
    "strategy": "fedavg",
    "model": "mlp:16",
    "local_epochs": 2,
    "learning_rate": 0.05,
    "batch_size": 20,
}
DITTO = FEDAVG | {"strategy": "ditto", "lam": 0.5}
FULL_BATCH = {"model": "logistic", "local_epochs": 1, "batch_size": 10**6, "learning_rate": 0.2}


def own(run, client, slot="own"):
    return run.context(client).state[f"{slot}-model"]


def values(run, client, name):
    return [e.value for e in run.events if e.name == name and e.client == client]


def distance(some, others):
    return sum(float(np.square(a.numpy() - b.numpy()).sum())
               for a, b in zip(some.values(), others.values(), strict=True))  # fmt: skip


def gradient(weights, samples):
    """Of softmax regression's mean loss, in float64."""
    w, b = weights
    inputs = samples.inputs(slice(None)).flatten(1).double().numpy()
    scores = inputs @ w.T + b
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(samples)), samples.labels.numpy()] -= 1
    return [p.T @ inputs / len(samples), p.mean(axis=0)]


# Ditto


@pytest.mark.parametrize("keep", [False, True], ids=["sgd", "momentum-kept"])
def test_without_lambda_the_personal_model_is_alone(keep):
    more = {"keep_optimiser": keep, "momentum": 0.9 if keep else 0.0}
    run = ran(**DITTO | {"lam": 0.0} | more, rounds=3)
    for client in range(3):
        assert bits(own(run, client)) == bits(own(run, client, "alone"))


@pytest.mark.parametrize(
    "more", [{}, {"model": "lenet:batch", "buffers": "static", "num_shards": 40}], ids=str
)
def test_the_global_model_is_fedavgs(more):
    fedavg, ditto = ran(**FEDAVG | more, rounds=2), ran(**DITTO | more, rounds=2)
    assert bits(ditto.result.arrays) == bits(fedavg.result.arrays)
    for name in ("bytes_up", "bytes_down", "server_models"):
        assert ditto.summary[name] == fedavg.summary[name]
    assert any(bits(own(ditto, client)) != bits(ditto.result.arrays) for client in range(3))


def test_a_personal_step_is_held_near_the_global_model():
    """v <- v - eta (grad F_k(v) + lambda (v - w^t)), for two rounds of a full batch, in float64."""
    sent = {}

    def note(instruction, reply):
        if instruction.metadata.message_type == "train":
            at = int(instruction.metadata.group_id), instruction.metadata.dst_node_id - 2
            sent[at] = instruction.content.array_records["arrays"]
        return reply

    run = InProcessFederation(note, **DITTO | FULL_BATCH, rounds=2)
    run.run()
    for client in range(3):
        data = run.view.data.shard(client).train
        v = [array.numpy().astype(np.float64) for array in sent[1, client].values()]
        for round in (1, 2):
            w = [array.numpy().astype(np.float64) for array in sent[round, client].values()]
            steps = zip(v, gradient(v, data), w, strict=True)
            v = [v_ - 0.2 * (g + 0.5 * (v_ - w_)) for v_, g, w_ in steps]
        for array, wanted in zip(own(run, client).values(), v, strict=True):
            np.testing.assert_allclose(array.numpy(), wanted, atol=1e-6)


def test_a_larger_lambda_holds_it_nearer():
    far, near, very = (
        ran(**DITTO | {"lam": lam, "learning_rate": 0.01, "eval_every": 9}, rounds=3)
        for lam in (0.0, 1.0, 20.0)
    )
    apart = [
        sum(distance(own(run, client), run.result.arrays) for client in range(3))
        for run in (far, near, very)
    ]
    assert apart[0] > apart[1] > apart[2]


def test_what_is_compared_is_the_personal_model():
    run = ran(**DITTO, rounds=2)
    for client in range(3):
        told = run.summary["clients"][client]
        assert told["personal_accuracy"] == values(run, client, "own_model/own_test/accuracy")[-1]
        assert told["global_accuracy"] == values(run, client, "own_model/global_test/accuracy")[-1]
        assert len(values(run, client, "global_model/own_test/accuracy")) == 2
        assert len(values(run, client, "personal_loss")) == 2


def test_ditto_measures_no_other_personal_model():
    with pytest.raises(UsageError, match="finetune-epochs"):
        make_plan({"strategy": "ditto", "finetune_epochs": 1})


# Fine-tuning


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "flwr:FedMedian"])
def test_fine_tuning_is_measured_and_forgotten(strategy):
    settings = FEDAVG | {"strategy": strategy, "eval_samples": 0, "keep_optimiser": True}
    plain, tuned = ran(**settings, rounds=2), ran(**settings, finetune_epochs=3, rounds=2)
    assert bits(tuned.result.arrays) == bits(plain.result.arrays)
    for client in range(3):
        assert list(tuned.context(client).state) == list(plain.context(client).state)
        before = values(tuned, client, "global_model/own_train/loss")
        after = values(tuned, client, "own_model/own_train/loss")
        assert before == values(plain, client, "global_model/own_train/loss")
        assert len(after) == 2 and all(a < b for a, b in zip(after, before, strict=True))
        assert values(plain, client, "own_model/own_train/loss") == []
        told = tuned.summary["clients"][client]["personal_accuracy"]
        assert told == values(tuned, client, "own_model/own_test/accuracy")[-1]


def test_a_fine_tuned_model_is_the_global_one_after_some_steps():
    run = ran(**FEDAVG | FULL_BATCH, finetune_epochs=2, rounds=1)
    for client in range(3):
        data = run.view.data.shard(client)
        w = [array.numpy().astype(np.float64) for array in run.result.arrays.values()]
        for _ in range(2):
            w = [w_ - 0.2 * g for w_, g in zip(w, gradient(w, data.train), strict=True)]
        inputs = data.test.inputs(slice(None)).flatten(1).double().numpy()
        right = (inputs @ w[0].T + w[1]).argmax(axis=1) == data.test.labels.numpy()
        (told,) = values(run, client, "own_model/own_test/accuracy")
        assert told == pytest.approx(right.mean())


@pytest.mark.parametrize(
    "settings", [DITTO | {"keep_optimiser": True, "momentum": 0.5}, FEDAVG | {"finetune_epochs": 1}],
    ids=["ditto", "finetune"],
)  # fmt: skip
def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not(tmp_path, settings):
    whole, half = ran(**settings, rounds=3), resumed(tmp_path, 1, **settings, rounds=3)
    assert measured(half, 2) == measured(whole, 2) != []
    assert bits(half.result.arrays) == bits(whole.result.arrays)
