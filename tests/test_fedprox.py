"""FedProx: FedAvg without mu, held back with it, and with clients that do a part of the work."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inprocess import InProcessFederation, RepeatingGrid

import clients.private
from fedkit.engine.plan import make_plan
from fedkit.engine.strategy_state import load_state, save_state
from fedkit.errors import UsageError
from strategies.fedprox import FedProxState, adapted, epochs_of, read_work

SMALL = {
    "clients": 4,
    "model": "logistic",
    "rounds": 2,
    "public": "digits:30",
    "partition": "iid",
    "num_shards": 40,
    "alone": False,
    "local_epochs": 3,
    "learning_rate": 0.1,
}


def ran(strategy="fedprox", grid=None, **settings):
    kinds = {} if grid is None else {"grid": grid}
    run = InProcessFederation(**kinds, **{**SMALL, "strategy": strategy, **settings})
    run.summary = run.run()
    return run


def told(run, name):
    """By round and client, what was told under a name."""
    return {(e.round, e.client): e.value for e in run.events if e.name == name}


def weights(run):
    return {name: array.numpy() for name, array in run.result.arrays.items()}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"model": "lenet:batch", "val_fraction": 0.2, "schedule": "plateau"},
        {"optimiser": "adam", "weighting": "equal", "alone": True},
        {"select": "drop:0.01"},
    ],
    ids=["plain", "buffers", "adam", "probed"],
)
def test_without_mu_it_is_fedavg_to_the_bit(more):
    plain, prox = ran("fedavg", **more), ran(mu=0.0, **more)
    assert prox.summary["digest"] == plain.summary["digest"]
    assert all((weights(plain)[name] == array).all() for name, array in weights(prox).items())


def test_with_mu_it_is_not():
    assert ran("fedavg").summary["digest"] != ran(mu=0.5).summary["digest"]


@pytest.mark.parametrize("mu", [0.01, 1.0, 100.0])
def test_a_single_full_batch_is_fedavg_whatever_mu(mu):
    """Spec 2 (b): where training begins the term has no gradient."""
    one = {"local_epochs": 1, "batch_size": 10_000}
    plain, prox = ran("fedavg", **one), ran(mu=mu, **one)
    assert all((weights(plain)[name] == array).all() for name, array in weights(prox).items())


def test_the_larger_mu_the_less_the_global_model_moves():
    """Spec 2 (d): logistic regression is convex."""
    start = {n: a.numpy() for n, a in ran(rounds=1, mu=0.0).strategy.initial_arrays().items()}
    moved = []
    for mu in (0.0, 0.1, 1.0, 5.0):
        after = weights(ran(rounds=1, mu=mu, local_epochs=10))
        moved.append(sum(np.square(after[n] - start[n]).sum() for n in start))
    assert moved == sorted(moved, reverse=True) and moved[0] > 2 * moved[-1]


# Work


@pytest.mark.parametrize(
    "text",
    [
        "all",
        "full:1",
        "fixed",
        "fixed:",
        "fixed:2",
        "stragglers:0.5,0.6",
        "stragglers:-1",
        "budget:3",
    ],
)
def test_work_that_can_not_be_is_refused_before_anything_starts(text):
    with pytest.raises(UsageError, match=r"fixed:0\.5,1"):
        make_plan({"strategy": "fedprox", "work": text}, local=True)


def test_parts_of_steps_or_of_nothing_are_refused():
    for more in ({"local_steps": 5}, {"local_epochs": 0}):
        with pytest.raises(UsageError, match="counted in epochs"):
            make_plan({"strategy": "fedprox", "work": "stragglers:0.5", **more}, local=True)
    make_plan({"strategy": "fedprox", "local_steps": 5}, local=True)


@given(st.floats(0, 1), st.integers(1, 50))
def test_a_share_of_the_epochs_is_the_nearest_number(share, whole):
    done = epochs_of(share, whole)
    assert abs(done - share * whole) <= 0.5 or done == 1
    assert (done == 0) == (share == 0) and done <= whole


def test_fixed_shares_are_the_clients_own():
    run = ran(work="fixed:0.34,1,0")
    assert told(run, "local_epochs") == {
        (round, client): (1, 3, 0, 1)[client] for round in (1, 2) for client in range(4)
    }
    assert read_work("fixed:0.34,1,0") == ("fixed", [0.34, 1, 0])


def test_who_does_nothing_returns_the_model_that_came():
    run = ran(work="fixed:0", clients=2, rounds=2)
    start = {n: a.numpy() for n, a in run.strategy.initial_arrays().items()}
    assert all((weights(run)[name] == array).all() for name, array in start.items())


@pytest.mark.parametrize(("share", "late"), [(0.0, 0), (0.5, 2), (0.9, 4), (1.0, 4)])
def test_a_share_of_the_clients_draws_its_epochs_in_every_round(share, late):
    strategy = InProcessFederation(
        **SMALL | {"strategy": "fedprox", "work": f"stragglers:{share}", "local_epochs": 1000}
    ).strategy
    granted = strategy._granted(1, [0, 1, 2, 3])
    assert sum(epochs < 1000 for epochs in granted.values()) == late  # one in a thousand draws all
    assert all(1 <= epochs <= 1000 for epochs in granted.values())


def test_stragglers_are_drawn_from_the_seed_anew_in_each_round():
    def granted(**more):
        return told(ran(work="stragglers:0.75", local_epochs=6, rounds=4, **more), "local_epochs")

    one = granted()
    assert one == granted() and one != granted(seed=2)
    rounds = [[one[round, client] for client in range(4)] for round in range(1, 5)]
    assert len({tuple(epochs) for epochs in rounds}) > 1
    assert min(map(min, rounds)) >= 1 and max(map(max, rounds)) == 6


def test_all_of_e_epochs_are_drawn_with_equal_chance():
    settings = SMALL | {"strategy": "fedprox", "work": "stragglers:1", "local_epochs": 5}
    strategy = InProcessFederation(**settings).strategy
    drawn = [e for round in range(400) for e in strategy._granted(round, [0, 1, 2, 3]).values()]
    counts = np.bincount(drawn, minlength=6)[1:]
    assert counts.sum() == 1600 and len(counts) == 5
    assert (
        np.square(counts - 320) / 320
    ).sum() < 18.5  # chi-square of 4 degrees, one in a thousand


def test_kept_stragglers_are_averaged_and_dropped_ones_are_not():
    """A client that did half is worth its weight, or as if it had not been there."""
    half = {"work": "fixed:0.34,1", "clients": 2, "rounds": 1, "mu": 0.3}
    kept, dropped = ran(**half), ran(**half, stragglers="drop")
    models = {}

    def keep(instruction, reply):
        if instruction.metadata.message_type == "train":
            arrays = reply.content.array_records["arrays"]
            models[instruction.metadata.dst_node_id] = {n: a.numpy() for n, a in arrays.items()}
        return reply

    InProcessFederation(keep, **{**SMALL, "strategy": "fedprox", **half}).run()
    counts = [len(kept.view.data.shard(client).train) for client in (0, 1)]
    for name, array in weights(kept).items():
        mean = sum(
            n * models[k][name].astype(np.float64) for n, k in zip(counts, (2, 3), strict=True)
        )
        assert (array == (mean / sum(counts)).astype(np.float32)).all()
        assert (weights(dropped)[name] == models[3][name]).all()
    assert told(dropped, "dropped") == {(1, 0): 1.0} and not told(kept, "dropped")
    assert not dropped.warnings()


def test_where_all_are_late_and_dropped_the_model_stays():
    run = ran(work="fixed:0.34", stragglers="drop", rounds=1)
    start = {n: a.numpy() for n, a in run.strategy.initial_arrays().items()}
    assert all((weights(run)[name] == array).all() for name, array in start.items())


def test_a_budget_is_as_many_whole_epochs_as_fit_and_one_at_least(monkeypatch):
    """On a clock on which an epoch takes a second."""
    seconds = iter(range(1000))
    monkeypatch.setattr(clients.private.time, "perf_counter", lambda: float(next(seconds)))
    run = ran(work="budget", time_budgets="0,2.5,0.1,3", local_epochs=6)
    wanted = {0: 6, 1: 2, 2: 1, 3: 3}
    assert told(run, "local_epochs") == {(r, k): wanted[k] for r in (1, 2) for k in wanted}


def test_a_probe_counts_in_the_budget(monkeypatch):
    seconds = iter(range(10_000))
    monkeypatch.setattr(clients.private.time, "perf_counter", lambda: float(next(seconds)))
    settings = {"work": "budget", "time_budgets": "0,2.5,0.1,3", "local_epochs": 6}
    plain, probed = ran(**settings), ran(**settings, select="drop:0.01")
    assert told(plain, "local_epochs") == told(probed, "local_epochs")
    assert all((weights(plain)[name] == array).all() for name, array in weights(probed).items())


def test_a_round_that_is_repeated_grants_the_same_epochs():
    lost = []

    def once(instruction, reply):
        meta = instruction.metadata
        if (meta.message_type, meta.group_id, meta.dst_node_id) == ("train", "2", 3) and not lost:
            lost.append(1)
            return None
        return reply

    settings = {"work": "stragglers:0.75", "local_epochs": 6, "quorum": 1.0, "strategy": "fedprox"}
    calm = ran(**settings)
    run = InProcessFederation(once, grid=RepeatingGrid, **{**SMALL, **settings})
    assert run.run()["digest"] == calm.summary["digest"] and lost


# Adaptive mu


def test_mu_rises_with_the_loss_and_falls_after_five_falls():
    losses = [2.0, 2.5, 2.4, 2.3, 2.2, 2.1, 2.0, 1.9, 2.0, 2.0, 1.9, 1.8]
    wanted = [0.3, 0.4, 0.4, 0.4, 0.4, 0.4, 0.3, 0.3, 0.4, 0.4, 0.4, 0.4]
    state, seen = FedProxState(mu=0.3), []
    for loss in losses:
        state = adapted(state, loss)
        seen.append(state.mu)
    assert seen == pytest.approx(wanted)


def test_mu_does_not_fall_below_nothing():
    state = FedProxState(mu=0.05)
    for loss in range(30, 0, -1):
        state = adapted(state, float(loss))
    assert state.mu == 0.0


@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_the_loss_is_the_global_models_over_the_clients_and_mu_is_the_next_rounds(weighting):
    """With a rate that makes the loss rise at once."""
    sent = {}

    def note(instruction, reply):
        if instruction.metadata.message_type == "train":
            config = instruction.content.config_records["config"]
            sent.setdefault(int(instruction.metadata.group_id), set()).add(config["mu"])
        return reply

    settings = {
        "adaptive_mu": True,
        "mu": 0.2,
        "learning_rate": 30.0,
        "rounds": 3,
        "local_steps": 4,
    }
    settings |= {"weighting": weighting, "partition": "dirichlet:0.5", "strategy": "fedprox"}
    run = InProcessFederation(note, **{**SMALL, **settings})
    run.run()
    before = told(run, "loss_before")
    sizes = [len(run.view.data.shard(client).train) for client in range(4)]
    losses = [
        np.average(
            [before[round, client] for client in range(4)],
            weights=sizes if weighting == "examples" else None,
        )
        for round in (1, 2, 3)
    ]
    assert run.strategy.state.loss == pytest.approx(losses[-1])
    mu, expected = 0.2, [0.2]
    for last, now in pairwise(losses):
        mu += 0.1 * (now > last)
        expected.append(mu)
    assert losses[1] > losses[0]
    assert [told(run, "mu")[round, None] for round in (1, 2, 3)] == pytest.approx(expected)
    assert [min(sent[round]) for round in (1, 2, 3)] == pytest.approx([0.2, *expected[:2]])
    assert all(len(one) == 1 for one in sent.values())


@pytest.mark.parametrize("lies", [(math.inf, math.nan), (1.7e308, 1.7e308), (-1.0, 1e7)])
def test_a_loss_that_can_not_be_moves_nothing(lies):
    def lie(instruction, reply):
        metrics = reply.content.metric_records.get("metrics") if reply.has_content() else None
        if metrics is not None and "loss_before" in metrics:
            metrics["loss_before"] = lies[instruction.metadata.dst_node_id > 2]
        return reply

    settings = {**SMALL, "strategy": "fedprox", "adaptive_mu": True}
    run = InProcessFederation(lie, **settings)
    run.run()
    assert run.strategy.state.mu == run.strategy.hyper.mu and not told(run, "mu")


def test_what_is_remembered_survives(tmp_path):
    run = ran(adaptive_mu=True, rounds=2)
    save_state(tmp_path / "state", run.strategy.state)
    loaded = load_state(tmp_path / "state", FedProxState)
    assert (loaded.mu, loaded.loss, loaded.falls) == (
        run.strategy.state.mu, run.strategy.state.loss, run.strategy.state.falls,
    )  # fmt: skip
    assert math.isfinite(loaded.loss)


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [("paper", ("weighted:0.1", "equal", 20, 1.0)), ("code", ("uniform:0.1", "examples", 20, 1.0))],
)
def test_sampling_and_weighting_go_together(preset, wanted):
    plan = make_plan({"strategy": "fedprox", "preset": preset, "clients": 4}, local=True)
    hyper = plan.hyper
    assert (plan.federation.select, hyper.weighting, hyper.local_epochs, hyper.mu) == wanted
