"""Outer optimisers: the server's step against a float64 oracle, its limits, and a restart."""

import numpy as np
import pytest
from flwr.app import Array
from inprocess import InProcessFederation

from fedkit.engine.plan import make_plan
from fedkit.engine.strategy_state import load_state, save_state
from fedkit.errors import UsageError
from fedkit.models.schedules import decay, warmed
from strategies.fedavg import FedAvgState
from strategies.outer import clients_rate, read_outer

SMALL = {
    "strategy": "fedavg",
    "model": "logistic",
    "partition": "iid",
    "public": "digits:60",
    "clients": 3,
    "rounds": 4,
    "num_shards": 10,
    "local_epochs": 1,
    "batch_size": 16,
    "learning_rate": 0.1,
}


def ran(**more):
    run = InProcessFederation(**{**SMALL, **more})
    models = [as_numpy(run.strategy.initial_arrays())]
    run.round_over = lambda round, arrays: models.append(as_numpy(arrays)) if round else None
    run.summary, run.models = run.run(), models
    return run


def as_numpy(record):
    return {name: array.numpy() for name, array in record.items()}


def assert_same_bits(first, second):
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


@pytest.mark.parametrize(
    ("spec", "beta", "rate", "unit"),
    [("momentum:0.9", 0.9, 1.0, 1.0), ("momentum:0.5,0.7", 0.5, 0.7, 1.0),
     ("slowmo:0.8", 0.8, 1.0, 0.05), ("slowmo:0.4,0.5", 0.4, 0.5, 0.05)],
)  # fmt: skip
def test_steps_are_those_of_the_formula(spec, beta, rate, unit):
    rng = np.random.default_rng(3)
    outer, momentum = read_outer(spec), {}
    weights = {"w": rng.standard_normal((3, 2)).astype(np.float32), "mean": np.float32([1.0])}
    exact, u = weights["w"].astype(np.float64), np.zeros((3, 2))
    for _ in range(5):
        mean = {
            "w": (weights["w"] - rng.standard_normal((3, 2)) / 10).astype(np.float32),
            "mean": np.float32([rng.random()]),
        }
        u = beta * u + (exact - mean["w"]) / unit
        exact = (exact - rate * unit * u).astype(np.float32).astype(np.float64)
        after, momentum = outer.step(weights, mean, momentum, 0.05, {"w"})
        np.testing.assert_allclose(after["w"], exact, rtol=1e-6)
        np.testing.assert_allclose(momentum["w"], u, rtol=1e-5)
        assert after["w"].dtype == np.float32
        # What training does not move is taken as it was averaged.
        assert_same_bits({"mean": after["mean"]}, {"mean": mean["mean"]})
        assert set(momentum) == {"w"}
        weights, exact = after, after["w"].astype(np.float64)


def test_slowmo_counts_a_step_in_units_of_the_rate_that_made_it():
    weights = {"w": np.ones(1, dtype=np.float32)}
    outer, momentum, u = read_outer("slowmo:0.5"), {}, 0.0
    for gamma in (0.1, 0.1, 0.001):
        mean = {"w": weights["w"] - np.float32(gamma)}
        u = 0.5 * u + 1.0
        wanted = weights["w"].astype(np.float64) - gamma * u
        weights, momentum = outer.step(weights, mean, momentum, gamma, {"w"})
        np.testing.assert_allclose(weights["w"], wanted, rtol=1e-6)
        np.testing.assert_allclose(momentum["w"], u, rtol=1e-4)


def test_at_a_rate_of_zero_nothing_is_divided_by_it():
    weights = {"w": np.ones(1, dtype=np.float32)}
    after, momentum = read_outer("slowmo:0.5").step(weights, weights, {}, 0.0, {"w"})
    assert after["w"] == 1 and momentum["w"] == 0


@pytest.mark.parametrize("outer", ["momentum:0", "momentum:0,1", "slowmo:0", "slowmo:0,1"])
def test_without_momentum_it_is_fedavg_to_the_bit(outer):
    run, plain = ran(outer=outer), ran()
    assert run.summary["digest"] == plain.summary["digest"]
    assert_same_bits(run.models[-1], plain.models[-1])


@pytest.mark.parametrize("outer", ["momentum:0.6", "slowmo:0.6,0.9"])
def test_a_run_takes_the_steps_of_the_formula(outer):
    """The clients' means are what FedAvg would make of the models that each round began with."""
    more = {"schedule": "step", "schedule_patience": 2} if outer.startswith("slow") else {}
    received = []

    def look(instruction, reply):
        if instruction.metadata.message_type == "train":
            content = reply.content
            received.append((int(instruction.metadata.group_id), content["metrics"]["num-examples"],
                             as_numpy(content["arrays"])))  # fmt: skip
        return reply

    run = InProcessFederation(look, **SMALL, outer=outer, **more)
    models = [as_numpy(run.strategy.initial_arrays())]
    run.round_over = lambda round, arrays: models.append(as_numpy(arrays)) if round else None
    run.run()
    beta, rate = (0.6, 1.0) if outer.startswith("momentum") else (0.6, 0.9)
    u = dict.fromkeys(models[0], 0.0)
    for round in range(1, SMALL["rounds"] + 1):
        gamma = 0.1 * 0.5 ** ((round - 1) // 2) if more else 1.0
        of_round = [(n, model) for at, n, model in received if at == round]
        total = sum(n for n, _ in of_round)
        for name, before in models[round - 1].items():
            mean = sum(n * model[name].astype(np.float64) for n, model in of_round) / total
            u[name] = beta * u[name] + (before - mean.astype(np.float32)) / gamma
            after = before - rate * gamma * u[name]
            np.testing.assert_allclose(models[round][name], after, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("outer", ["momentum:0.9", "slowmo:0.7,0.5"])
def test_a_run_that_goes_on_from_the_saved_momentum_is_the_unbroken_one(outer, tmp_path):
    whole = ran(outer=outer)
    first = InProcessFederation(**SMALL, outer=outer)
    kept = {}

    def stop_after_two(round, arrays):
        if round == 2:
            save_state(tmp_path / "state", first.strategy.state)
            kept["arrays"] = arrays
            raise KeyboardInterrupt

    first.round_over = stop_after_two
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = InProcessFederation(**SMALL, outer=outer)
    second.strategy.state = load_state(tmp_path / "state", FedAvgState)
    assert set(second.strategy.state.momentum) == set(kept["arrays"])
    result = second.driver.run(kept["arrays"], first_round=3)
    assert_same_bits(as_numpy(result.arrays), whole.models[-1])


def test_running_statistics_are_taken_as_averaged():
    run = ran(model="lenet:batch", num_shards=60, rounds=2, outer="momentum:0.9")
    parameters = run.strategy.parameters
    assert set(run.strategy.state.momentum) == parameters
    statistics = set(run.models[-1]) - parameters
    assert statistics
    # After one round w is the initial model, so both runs average the same replies.
    plain = ran(model="lenet:batch", num_shards=60, rounds=1)
    for name in statistics:
        assert run.models[1][name].tobytes() == plain.models[1][name].tobytes(), name


def test_the_servers_rate_is_the_one_at_which_clients_train():
    plan = make_plan(
        {**SMALL, "schedule": "cosine", "warmup": 2, "scale_rate_to": 8, "batch_schedule": "3:32",
         "outer": "slowmo:0.5"}, local=True,
    )  # fmt: skip
    for round, size in ((1, 16), (2, 16), (3, 32), (4, 32)):
        wanted = 0.1 * decay("cosine", round - 1, 4, 0.5, 2) * warmed(round - 1, 2) * size / 8
        assert clients_rate(plan.hyper, plan.federation, round) == pytest.approx(wanted)


def test_nobody_answers_and_the_momentum_waits():
    def lose(instruction, reply):
        lost = instruction.metadata.message_type == "train" and instruction.metadata.group_id == "2"
        return None if lost else reply

    run = InProcessFederation(lose, **{**SMALL, "rounds": 2}, outer="momentum:0.9")
    momenta = []
    run.round_over = lambda round, arrays: momenta.append(
        {name: u.copy() for name, u in run.strategy.state.momentum.items()}
    )
    run.run()
    assert_same_bits(momenta[1], momenta[2])


def test_a_step_that_leads_to_infinity_is_not_taken():
    def far(instruction, reply):
        if instruction.metadata.message_type == "train" and instruction.metadata.group_id == "2":
            arrays = reply.content["arrays"]
            for name in arrays:
                arrays[name] = Array(np.full(arrays[name].shape, 3e38, np.float32))
        return reply

    run = InProcessFederation(far, **{**SMALL, "rounds": 2}, outer="momentum:0.9,3")
    after, momenta = [], []
    run.round_over = lambda round, arrays: (
        after.append(as_numpy(arrays)), momenta.append(dict(run.strategy.state.momentum)),
    )  # fmt: skip
    run.run()
    assert_same_bits(after[1], after[2])
    assert_same_bits(momenta[1], momenta[2])
    assert any("outer=momentum:0.9,3 leads too far" in text for text in run.warnings())


@pytest.mark.parametrize(
    "spec",
    ["", "momentum", "momentum:", "momentum:1", "momentum:-0.1", "momentum:0.9,0", "slowmo:x",
     "slowmo:0.5,1,2", "slowmo:0.5,inf", "momentum:nan", "adam:0.9", "none:1"],
)  # fmt: skip
def test_an_outer_optimiser_that_there_is_not_is_refused(spec):
    with pytest.raises(UsageError, match="outer must be"):
        make_plan({"strategy": "fedavg", "outer": spec}, local=True)


@pytest.mark.parametrize("more", [{"schedule": "plateau"}, {"schedule_by": "step"}])
def test_slowmo_is_refused_where_the_server_does_not_know_the_rate(more):
    with pytest.raises(UsageError, match="SlowMo divides by"):
        make_plan({"strategy": "fedavg", "outer": "slowmo:0.5", **more}, local=True)
    make_plan({"strategy": "fedavg", "outer": "momentum:0.5", **more}, local=True)
