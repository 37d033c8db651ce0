"""FedMARL as a selector: whom it keeps, what it learns on toys, and that it goes on where it was."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedmarl_toys import World, learned, policy_of, probes_of, view

from fedkit.devices.settings import ObjectiveSettings
from fedkit.engine.selection import Outcome, Probe, Selector
from fedkit.engine.strategy_state import load_state, save_state
from fedkit.errors import FedkitError, UsageError
from strategies.selectors.fedmarl import FedMARL, FedMARLState, Learning
from strategies.selectors.policy import SHIPPED, load_policy, save_policy
from strategies.selectors.reward import Units
from strategies.selectors.trained import fedmarl


def kept(selector, here, probes):
    return [member.client for member in selector.keep(here, probes)]


def preferring(policy, column, weight=1.0):
    """A team whose Q1 - Q0 is weight times one standardised feature."""
    with torch.no_grad():
        agent = policy.team.agent
        for parameter in agent.parameters():
            parameter.zero_()
        agent.first.weight[0, column], agent.first.weight[1, column] = 1.0, -1.0
        agent.last.weight[1, 0], agent.last.weight[1, 1] = weight, -weight
    return policy


def test_it_is_a_selector_that_probes_everybody():
    selector = FedMARL(policy_of())
    assert isinstance(selector, Selector) and selector.probes
    here = view(1, range(5))
    assert selector.choose(here) == here.members


@pytest.mark.parametrize("mixing", ["vdn", "qmix"])
def test_an_untrained_policy_keeps_everybody(mixing):
    selector = FedMARL(policy_of(mixing=mixing))
    for number in range(1, 4):
        assert kept(selector, view(number, range(7)), probes_of(range(7))) == list(range(7))


def test_a_team_that_likes_the_fast_stops_the_slow():
    selector = FedMARL(preferring(policy_of(), column=1, weight=-1.0))
    probes = {
        client: Probe(1.0, seconds, 10) for client, seconds in enumerate((1.0, 9.0, 2.0, 8.0))
    }
    assert kept(selector, view(1, range(4)), probes) == [0, 2]


@pytest.mark.parametrize("least", [1, 2, 3])
def test_where_all_would_stop_those_that_are_liked_best_go_on(least):
    policy = preferring(policy_of(min_keep=least), column=1, weight=-1.0)
    with torch.no_grad():
        policy.team.agent.last.bias[0] = 100.0
    probes = {
        client: Probe(1.0, seconds, 10) for client, seconds in enumerate((4.0, 3.0, 1.0, 2.0))
    }
    wanted = {1: [2], 2: [2, 3], 3: [1, 2, 3]}[least]
    assert kept(FedMARL(policy), view(1, range(4)), probes) == wanted


@pytest.mark.parametrize(("share", "wanted"), [(0.2, 1), (0.25, 1), (0.26, 2), (0.5, 2), (1.0, 4)])
def test_a_share_of_those_probed_goes_on_at_least(share, wanted):
    policy = preferring(policy_of(min_share=share), column=1, weight=-1.0)
    with torch.no_grad():
        policy.team.agent.last.bias[0] = 100.0
    probes = {c: Probe(1.0, seconds, 10) for c, seconds in enumerate((4.0, 3.0, 1.0, 2.0))}
    chosen = kept(FedMARL(policy), view(1, range(4)), probes)
    assert chosen == sorted([2, 3, 1, 0][:wanted])


def test_more_are_not_kept_than_there_are():
    assert kept(FedMARL(policy_of(min_keep=9)), view(1, range(3)), probes_of(range(3))) == [0, 1, 2]


def test_a_client_whose_probe_is_missing_does_not_go_on():
    assert kept(FedMARL(policy_of()), view(1, range(4)), probes_of([0, 2])) == [0, 2]
    assert kept(FedMARL(policy_of()), view(1, range(4)), {}) == []


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_client_whose_loss_is_no_number_stops(loss):
    probes = {**probes_of([0, 1, 2]), 1: Probe(loss, 1.0, 10)}
    assert kept(FedMARL(policy_of()), view(1, range(3)), probes) == [0, 2]


def test_min_keep_takes_a_loss_that_is_no_number_last():
    probes = {0: Probe(math.nan, 1.0, 10), 1: Probe(math.nan, 1.0, 10), 2: Probe(1.0, 1.0, 10)}
    assert kept(FedMARL(policy_of(min_keep=1)), view(1, range(3)), probes) == [2]
    assert len(kept(FedMARL(policy_of(min_keep=2)), view(1, range(3)), probes)) == 2
    nobody = {client: Probe(math.nan, 1.0, 10) for client in range(3)}
    assert len(kept(FedMARL(policy_of()), view(1, range(3)), nobody)) == 1


def test_the_number_of_clients_may_change_from_round_to_round():
    policy = policy_of()
    learning = Learning(policy, units=Units(1.0, 1))
    selector = FedMARL(policy, learning)
    for number, clients in enumerate((range(5), range(2), range(2, 30), [7]), start=1):
        chosen = kept(selector, view(number, clients), probes_of(clients))
        assert chosen and set(chosen) <= set(clients)
        selector.learn(Outcome(number, 0.1 * number, 1.0, 10, tuple(chosen)))


def test_learning_online_keeps_everybody_once_to_know_what_a_round_costs():
    policy = policy_of()
    learning = Learning(policy)
    selector = FedMARL(policy, learning)
    assert kept(selector, view(1, range(6)), probes_of(range(6))) == list(range(6))
    selector.learn(Outcome(1, 0.3, 12.0, 600, tuple(range(6))))
    assert learning.units == Units(12.0, 600)


def test_rounds_that_were_not_measured_teach_nothing():
    policy = policy_of()
    learning = Learning(policy, units=Units(1.0, 1))
    selector = FedMARL(policy, learning)
    for number, accuracy in enumerate((0.1, math.nan, 0.2, 0.3, 0.4), start=1):
        chosen = kept(selector, view(number, range(3)), probes_of(range(3)))
        selector.learn(Outcome(number, accuracy, 1.0, 10, tuple(chosen)))
    learning.end()
    # Only the last two have an accuracy before and after.
    assert len(learning.remembered()["learner"]["replay"]["rewards"]) == 2


def test_epsilon_falls_from_one_to_its_end():
    policy = policy_of()
    learning = Learning(policy, falling=4, units=Units(1.0, 1))
    seen = []
    for number in range(1, 7):
        seen.append(learning.epsilon)
        FedMARL(policy, learning).keep(view(number, range(2)), probes_of(range(2)))
    assert seen == pytest.approx([1.0, 0.7625, 0.525, 0.2875, 0.05, 0.05])


def test_nobody_is_dropped_where_nothing_but_accuracy_counts_and_it_rises_with_the_number_kept():
    policy, _ = learned(ObjectiveSettings(w1=1.0, w2=0.0, w3=0.0))
    assert World().play(FedMARL(policy), 300, 10).decisions == [list(range(6))] * 10


@pytest.mark.parametrize("least", [1, 2])
def test_all_but_min_keep_are_dropped_where_only_costs_count(least):
    policy, _ = learned(ObjectiveSettings(w1=0.0, w2=1.0, w3=1.0), min_keep=least)
    decisions = World().play(FedMARL(policy), 300, 10).decisions
    assert {len(chosen) for chosen in decisions} == {least}


def test_the_slowest_are_dropped_where_accuracy_is_worth_a_little():
    """Gain 0.5 of a point each; a second of the slowest costs 3/6: 0 and 1 are worth it, 5 is not."""
    policy, _ = learned(ObjectiveSettings(w1=1.0, w2=6.0, w3=0.0), rounds=400)
    decisions = World().play(FedMARL(policy), 500, 5).decisions
    assert all(0 in chosen and 5 not in chosen for chosen in decisions)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return a == b or (a != a and b != b)


def test_one_seed_gives_one_policy():
    first, second, other = (
        learned(ObjectiveSettings(), rounds=60, seed=seed)[0].team.arrays() for seed in (1, 1, 2)
    )
    assert same(first, second) and not same(first, other)


def test_what_is_drawn_for_learning_hangs_on_the_run_s_seed():
    def weights(seed):
        policy = policy_of(seed=5, updates=4, epsilon=0.0, agent_rate=1e-3, agent_batch=8)
        World().play(FedMARL(policy, Learning(policy)), 1, 30, seed)
        return policy.team.arrays()

    assert same(weights(1), weights(1)) and not same(weights(1), weights(2))


def test_a_round_that_is_compared_is_paid_for_what_lasts_and_what_it_saves():
    """Accuracy 2 points below all's with 3 rounds to go, 5 of 10 seconds and 400 of 1000 bytes saved."""
    policy = policy_of(objective=ObjectiveSettings(w1=1.0, w2=1.0, w3=1.0), fading=0.5)
    learning = Learning(policy, units=Units(10.0, 1000))
    selector = FedMARL(policy, learning)
    selector.keep(view(5, range(4), rounds=8), probes_of(range(4)))
    learning.compare(Outcome(5, 0.60, 12.0, 1000, (0, 1, 2, 3)))
    selector.learn(Outcome(5, 0.58, 7.0, 600, (0,)))
    assert learning._waiting[2] == pytest.approx(-2 * 0.5**3 + 0.5 + 0.4)


@pytest.mark.parametrize("mixing", ["vdn", "qmix"])
def test_a_resumed_server_goes_on_with_the_same_numbers(tmp_path, mixing):
    hyper = {"mixing": mixing, "updates": 2, "agent_rate": 1e-3}

    def fresh():
        policy = policy_of(**hyper)
        return FedMARL(policy, Learning(policy))

    whole, world = fresh(), World()
    world.play(whole, 1, 45)
    save_state(tmp_path / "state", whole.state)
    accuracy = world.accuracy
    world.play(whole, 46, 10)
    resumed, later = fresh(), World()
    later.accuracy = accuracy
    resumed.state = load_state(tmp_path / "state", FedMARLState)
    later.play(resumed, 46, 10)
    assert later.decisions == world.decisions[45:]
    assert same(whole.state.learning, resumed.state.learning)
    assert whole.state.learning["learner"]["steps"] > 0


def test_the_state_of_one_that_does_not_learn_is_small_and_comes_back(tmp_path):
    selector = FedMARL(policy_of())
    selector.keep(view(1, range(2)), {0: Probe(7.5, 1.0, 1), 1: Probe(2.0, 1.0, 1)})
    save_state(tmp_path / "state", selector.state)
    again = FedMARL(policy_of())
    again.state = load_state(tmp_path / "state", FedMARLState)
    assert again.state == FedMARLState(7.5, {})


def test_a_policy_that_was_saved_decides_as_before(tmp_path):
    policy, _ = learned(ObjectiveSettings(), rounds=60)
    about = {"episodes": 3, "simulator": "abc"}
    save_policy(tmp_path / "p.safetensors", replace(policy, about=about))
    again = load_policy(tmp_path / "p.safetensors")
    assert again.settings == policy.settings and again.objective == policy.objective
    assert again.about["episodes"] == 3 and "fedkit" in again.about
    assert same(again.team.arrays(), policy.team.arrays())
    rows = (
        np.random.default_rng(0).standard_normal((9, len(policy.standard.mean))).astype(np.float32)
    )
    assert (again.standard(rows) == policy.standard(rows)).all()
    selector = fedmarl(str(tmp_path / "p.safetensors"))
    for number in range(1, 5):
        here, probes = view(number, range(9)), probes_of(range(9))
        assert kept(selector, here, probes) == kept(FedMARL(policy), here, probes)


def test_a_damaged_or_foreign_file_is_refused_in_a_sentence(tmp_path):
    good = tmp_path / "good.safetensors"
    save_policy(good, policy_of())
    whole = good.read_bytes()
    for name, content in {
        "empty": b"",
        "text": b"no policy at all",
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        "schema": whole.replace(b'schema\\": 3', b'schema\\": 7'),
        "hidden": whole.replace(b'hidden\\": 16', b'hidden\\": 61'),
        "word": whole.replace(b'mixing\\": \\"vdn', b'mixing\\": \\"xyz'),
    }.items():
        bad = tmp_path / name
        bad.write_bytes(content)
        with pytest.raises(FedkitError) as refused:
            load_policy(bad)
        assert str(bad) in str(refused.value) and str(refused.value).endswith("."), name
    foreign = tmp_path / "weights.safetensors"
    import safetensors.numpy

    safetensors.numpy.save_file({"w": np.zeros(3)}, foreign)
    with pytest.raises(FedkitError, match="no policy of FedMARL"):
        load_policy(foreign)


@pytest.mark.parametrize("argument", ["p.safetensors,teach", ",learn", "a,learn,more"])
def test_an_argument_that_means_nothing_is_refused(argument):
    with pytest.raises(UsageError, match="fedmarl takes a policy's file"):
        fedmarl(argument)


def test_a_policy_that_is_not_there_is_a_typing_error():
    with pytest.raises(UsageError, match="There is no policy"):
        fedmarl("nowhere.safetensors")


def test_the_policy_that_ships_works_at_once():
    shipped = fedmarl(None)
    probes = {c: Probe(1.0 + c % 3, 1.0 + (c % 5) ** 2, 45_000_000) for c in range(20)}
    decided = kept(shipped, view(5, range(20)), probes)
    assert 1 <= len(decided) < 20
    assert SHIPPED.stat().st_size < 300_000
    about = load_policy(SHIPPED).about
    assert {"simulation", "episodes", "simulator", "results", "fedkit"} <= set(about)
