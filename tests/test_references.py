"""The two reference lines: everybody alone, and everybody's data in one place."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from inprocess import bits, ran
from resuming import measured, resumed

from fedkit.engine.plan import client_models, make_plan
from fedkit.errors import UsageError

SMALL = {"clients": 3, "public": "digits:30", "num_shards": 12, "eval_samples": 30}
LOCAL = SMALL | {"strategy": "local", "models": "mlp:16,logistic", "local_epochs": 2}
CENTRAL = SMALL | {"strategy": "central", "model": "logistic", "local_epochs": 2}


def pooled(run, shards):
    """Inputs (float64, n x d) and labels of the shards' training data."""
    parts = [run.view.data.shard(number).train for number in shards]
    inputs = torch.cat([part.inputs(slice(None)).flatten(1) for part in parts])
    return inputs.double().numpy(), torch.cat([part.labels for part in parts]).numpy()


def step_by_hand(weights, inputs, labels, rate):
    """A step of gradient descent on softmax regression, in float64."""
    w, b = (array.numpy().astype(np.float64) for array in weights.values())
    scores = inputs @ w.T + b
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(labels)), labels] -= 1
    return [w - rate * p.T @ inputs / len(labels), b - rate * p.mean(axis=0)]


# Beside any comparison


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    return importlib.import_module("compare")


@pytest.mark.parametrize("strategy", ["local", "central"])
def test_a_reference_trains_as_the_first_rows_clients_do(compare, strategy):
    rows = [
        {"strategy": "fedavg", "model": "cnn", "preset": "paper"},
        {"strategy": "ktpfl", "models": "cnn,lenet", "optimiser": "lamb", "run_dir": "here"},
        {"strategy": "heterofl", "model": "cnn", "widths": "1,0.5", "clients": 3},
        {"strategy": "depthfl", "model": "cnn", "depths": "1,2", "local_steps": 7},
        {"strategy": "fedmd", "models": "cnn", "corrupt": "noise:1"},
    ]
    for row in rows:
        first = make_plan(row, local=True)
        other = make_plan(compare.reference(strategy, row), local=True)
        models = [row["model"] if "model" in row else row["models"].split(",")[0]] * 4
        if strategy == "local":
            models = client_models(first)
        assert client_models(other) == models[: first.local.clients]
        assert other.federation.select == first.federation.select
        for name in ("optimiser", "learning_rate", "batch_size", "local_epochs", "local_steps"):
            if hasattr(first.hyper, name):
                assert getattr(other.hyper, name) == getattr(first.hyper, name), name
        assert other.hyper.keep_optimiser == (strategy == "central")


def test_a_reference_goes_on_with_its_optimiser_as_it_is_told(compare):
    for keep in (True, False):
        row = {"strategy": "fedavg", "keep_optimiser": keep}
        for strategy in ("local", "central"):
            plan = make_plan(compare.reference(strategy, row), local=True)
            assert plan.hyper.keep_optimiser == keep


# Local


def test_alone_is_what_alone_is_beside_others():
    run = ran(**LOCAL, rounds=3, alone=True)
    for client in range(3):
        state = run.context(client).state
        assert bits(state["own-model"]) == bits(state["alone-model"])
    for client in run.summary["clients"]:
        assert client["personal_accuracy"] == client["alone_personal_accuracy"] is not None


def test_nothing_travels_and_models_differ():
    run = ran(**LOCAL, rounds=2)
    assert (run.summary["bytes_up"], run.summary["bytes_down"]) == (0, 0)
    assert run.plan.strategy.traffic(run.plan.hyper, None) == (0, 0)
    assert run.summary["server_models"] == {} and not run.warnings()
    assert [client["model"] for client in run.summary["clients"]] == [
        "mlp:16",
        "logistic",
        "mlp:16",
    ]
    losses = [e.value for e in run.events if e.name == "train_loss" and e.client == 0]
    assert len(losses) == 2 and losses[1] < losses[0]


@pytest.mark.parametrize("strategy", ["local", "central"])
def test_a_reference_trains_no_reference_beside_unless_asked(strategy):
    assert not make_plan({"strategy": strategy}, local=True).federation.alone
    assert make_plan({"strategy": strategy, "alone": True}, local=True).federation.alone
    assert make_plan({"strategy": "fedavg"}, local=True).federation.alone


# Central


def test_a_full_batch_is_one_step_on_everybodys_data():
    settings = {"optimiser": "sgd", "learning_rate": 0.1, "local_epochs": 1, "batch_size": 10**6}
    run = ran(**CENTRAL | settings, rounds=1)
    wanted = step_by_hand(run.strategy.initial_arrays(), *pooled(run, range(3)), 0.1)
    for array, values in zip(run.result.arrays.values(), wanted, strict=True):
        np.testing.assert_allclose(array.numpy(), values, atol=1e-6)
    # algorithms: FedAvg with one local step of the full batch is this step.
    others = ran(**CENTRAL | settings | {"strategy": "fedavg", "alone": False}, rounds=1)
    for array, values in zip(others.result.arrays.values(), wanted, strict=True):
        np.testing.assert_allclose(array.numpy(), values, atol=1e-6)


def test_clients_only_measure():
    run = ran(**CENTRAL, rounds=3, learning_rate=0.02)
    assert (run.summary["bytes_up"], run.summary["bytes_down"]) == (0, 0)
    told = [e for e in run.events if e.name == "train_loss"]
    assert {e.client for e in told} == {None} and told[-1].value < told[0].value
    assert told[0].n == sum(member.examples for member in run.driver.roster.members.values())
    assert all(client["personal_accuracy"] > 0 for client in run.summary["clients"])
    assert run.summary["server_models"]["global"] > 0.6
    assert all("own-model" not in run.context(client).state for client in range(3))


def test_only_the_data_of_those_who_have_taken_part_are_pooled():
    run = ran(**CENTRAL, rounds=4, select="uniform:0.34")
    sizes = {m.client: m.examples for m in run.driver.roster.members.values()}
    pool, wanted = set(), []
    for event in run.events:
        if event.event == "round_start":
            pool |= set(event.value)
            wanted.append(sum(sizes[client] for client in pool))
    assert [e.n for e in run.events if e.name == "train_loss"] == wanted
    assert len(set(wanted)) > 1 and run.strategy.state.shards == sorted(pool)


def test_steps_take_the_place_of_epochs():
    one = ran(**CENTRAL | {"local_steps": 1, "optimiser": "sgd"}, rounds=1)
    none = ran(**CENTRAL | {"local_epochs": 0}, rounds=1)
    assert bits(none.result.arrays) == bits(none.strategy.initial_arrays())
    assert bits(one.result.arrays) != bits(one.strategy.initial_arrays())


@pytest.mark.parametrize(
    ("name", "value"), [("schedule", "plateau"), ("schedule_by", "step"), ("dataset", "own:a,b")]
)
def test_central_refuses_what_it_can_not_do(name, value):
    with pytest.raises(UsageError, match="central"):
        make_plan({"strategy": "central", name: value, "public": "digits:10"})


@pytest.mark.parametrize(
    "settings",
    [
        LOCAL | {"keep_optimiser": True},
        CENTRAL,
        CENTRAL | {"model": "lenet:batch", "local_steps": 5},
    ],
    ids=["local", "central", "central-batch-norm"],
)
def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not(tmp_path, settings):
    whole, half = ran(**settings, rounds=3), resumed(tmp_path, 1, **settings, rounds=3)
    assert measured(half, 2) == measured(whole, 2) != []
    assert bits(half.result.arrays) == bits(whole.result.arrays)
