"""FedMARL's arithmetic: the team's value, its target, the reward and the features."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedmarl_toys import policy_of, probes_of, view
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkit.devices.settings import ObjectiveSettings
from fedkit.engine.selection import Outcome, Probe, Seen
from strategies.selectors.agents import Learner, Team, greedy
from strategies.selectors.features import LARGEST_RATIO, LEAST_DEVIATION, Standard, observe, width
from strategies.selectors.fedmarl_settings import FedMARLSettings
from strategies.selectors.replay import Replay, Transition
from strategies.selectors.reward import (
    Units,
    gained,
    saved,
    team_reward,
    total,
    utility,
    worth,
)

FEATURES = width(3)
SEEDS = st.integers(0, 2**32 - 1)


def random_team(seed, mixing="vdn", hidden=16):
    team = Team(FedMARLSettings(hidden=hidden, mixing=mixing), FEATURES, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        team.agent.last.weight.normal_(generator=generator)
        team.agent.last.bias.normal_(generator=generator)
    return team


def oracle_q(arrays, states):
    """The agents' network in float64."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    hidden = states @ w["agent.first.weight"].T + w["agent.first.bias"]
    return np.maximum(hidden, 0) @ w["agent.last.weight"].T + w["agent.last.bias"]


def random_transition(generator, clients, later, features=FEATURES):
    return Transition(
        generator.standard_normal((clients, features)).astype(np.float32),
        generator.integers(2, size=clients),
        float(generator.standard_normal()),
        generator.standard_normal((later, features)).astype(np.float32),
    )


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_the_target_is_double_q_learning_on_the_sum(seed):
    """y = r + gamma sum_n Q-(s'_n, argmax_a Q(s'_n, a)), with rounds of different sizes side by side."""
    generator = np.random.default_rng(seed)
    team, hyper = random_team(seed), FedMARLSettings(hidden=16, discount=0.9)
    standard = Standard.of_width(FEATURES)
    learner = Learner(team, standard, hyper)
    behind = random_team(seed + 1)
    learner._target.load_state_dict(behind.state_dict())
    rounds = [random_transition(generator, n, later) for n, later in ((3, 5), (1, 2), (4, 0))]
    replay = Replay(10)
    for each in rounds:
        replay.add(each)
    batch = replay.sample(12, np.random.default_rng(seed))
    drawn = np.random.default_rng(seed).integers(3, size=12)
    wanted = []
    for at in drawn:
        following = np.clip(rounds[at].following.astype(np.float64), -5, 5)
        best = oracle_q(team.arrays(), following).argmax(axis=1)
        valued = oracle_q(behind.arrays(), following)
        wanted.append(rounds[at].reward + 0.9 * sum(valued[n, a] for n, a in enumerate(best)))
    np.testing.assert_allclose(learner.goal(batch).numpy(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", ["huber", "squared"])
def test_a_step_s_loss_is_that_of_the_team_s_value(loss):
    generator = np.random.default_rng(0)
    team = random_team(0)
    hyper = FedMARLSettings(hidden=16, loss=loss, discount=0.0)
    learner = Learner(team, Standard.of_width(FEATURES), hyper)
    each = random_transition(generator, 4, 0)
    learner.replay.add(each)
    states = np.clip(each.states.astype(np.float64), -5, 5)
    q = oracle_q(team.arrays(), states)
    apart = abs(sum(q[n, a] for n, a in enumerate(each.actions)) - each.reward)
    wanted = apart**2 if loss == "squared" else (apart**2 / 2 if apart < 1 else apart - 0.5)
    assert learner.step(learner.replay.sample(8, generator)) == pytest.approx(wanted, rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 6), st.sampled_from(["vdn", "qmix"]))
def test_the_best_joint_action_is_what_each_agent_likes_best(seed, clients, mixing):
    team = random_team(seed, mixing)
    states = np.random.default_rng(seed).standard_normal((clients, FEATURES)).astype(np.float32)
    values = torch.from_numpy(team.values(states))

    def whole(actions):
        chosen = values.gather(1, torch.tensor(actions)[:, None])[:, 0]
        there = torch.ones(1, clients, dtype=torch.bool)
        return float(team.mixer(chosen[None], torch.from_numpy(states)[None], there).detach())

    best = max(whole(joint) for joint in itertools.product((0, 1), repeat=clients))
    assert whole(greedy(values.numpy()).tolist()) == pytest.approx(best, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("mixing", ["vdn", "qmix"])
def test_clients_that_are_not_there_change_nothing(mixing):
    team = random_team(3, mixing)
    generator = np.random.default_rng(3)
    states = torch.from_numpy(generator.standard_normal((1, 4, FEATURES)).astype(np.float32))
    chosen = torch.from_numpy(generator.standard_normal((1, 4)).astype(np.float32))
    some = torch.tensor([[True, True, True, False]])
    alone = team.mixer(chosen[:, :3], states[:, :3], some[:, :3])
    zeroed = states * some[..., None]
    torch.testing.assert_close(team.mixer(chosen, zeroed, some), alone)


def test_a_periodic_target_follows_whole_and_only_then():
    team = random_team(1)
    hyper = FedMARLSettings(hidden=16, target="periodic", period=3)
    learner = Learner(team, Standard.of_width(FEATURES), hyper)
    learner.replay.add(random_transition(np.random.default_rng(1), 3, 3))
    before = learner._target.arrays()
    for step in range(1, 4):
        learner.step(learner.replay.sample(4, np.random.default_rng(step)))
        now = learner._target.arrays()
        wanted = team.arrays() if step == 3 else before
        assert all((now[name] == wanted[name]).all() for name in now)


def test_a_polyak_target_goes_a_hundredth_of_the_way():
    team = random_team(1)
    learner = Learner(team, Standard.of_width(FEATURES), FedMARLSettings(hidden=16))
    learner.replay.add(random_transition(np.random.default_rng(1), 3, 3))
    before = learner._target.arrays()
    learner.step(learner.replay.sample(4, np.random.default_rng(0)))
    for name, now in learner._target.arrays().items():
        wanted = before[name] + 0.01 * (team.arrays()[name].astype(np.float64) - before[name])
        np.testing.assert_allclose(now, wanted, rtol=1e-5, atol=1e-7)


def test_the_replay_buffer_forgets_the_oldest():
    replay = Replay(3)
    for number in range(5):
        replay.add(
            Transition(
                np.zeros((1, 2), np.float32),
                np.zeros(1, np.int64),
                number,
                np.zeros((0, 2), np.float32),
            )
        )
    assert len(replay) == 3
    assert set(replay.sample(100, np.random.default_rng(0)).rewards.tolist()) == {2.0, 3.0, 4.0}
    again = Replay(3)
    again.recall(replay.remembered())
    assert again.remembered()["rewards"].tolist() == [2.0, 3.0, 4.0]


@given(st.floats(0, 100), st.floats(0, 100))
def test_the_utility_rises(a, b):
    low, high = sorted((a, b))
    assert utility(low) <= utility(high)
    assert utility(low) < utility(high) or high - low < 1e-3 or low > 60
    assert utility(low) == pytest.approx(10 - 20 / (1 + math.exp(0.35 * low)))


def outcome(accuracy=0.6, seconds=30.0, size=500):
    return Outcome(3, accuracy, seconds, size, (0, 1))


def test_the_reward_by_hand():
    objective = ObjectiveSettings(w1=2.0, w2=0.5, w3=0.25)
    units = Units(seconds=60.0, size=1000)
    # 2 * (60 - 58) - 0.5 * 30/60 - 0.25 * 500/1000
    assert team_reward(outcome(), 0.58, units, objective) == pytest.approx(4 - 0.25 - 0.125)
    bent = ObjectiveSettings(w1=2.0, w2=0.5, w3=0.25, utility="tanh")
    gain = 10 * math.tanh(0.175 * 3) - 10 * math.tanh(0.175 * 1)
    reward = team_reward(outcome(accuracy=0.03), 0.01, units, bent)
    assert reward == pytest.approx(2 * gain - 0.25 - 0.125)


@given(st.floats(0, 1e6), st.integers(0, 10**9), st.floats(0, 1), st.floats(0, 1))
def test_without_weights_neither_latency_nor_bytes_count(seconds, size, before, after):
    objective = ObjectiveSettings(w1=1.0, w2=0.0, w3=0.0)
    reward = team_reward(outcome(after, seconds, size), before, Units(1.0, 1), objective)
    assert reward == pytest.approx(100 * (after - before), abs=1e-9)


def test_a_round_beside_the_same_one_with_everybody_by_hand():
    objective, units = ObjectiveSettings(w1=2.0, w2=0.5, w3=0.25), Units(60.0, 1000)
    everybody = outcome(accuracy=0.62, seconds=54.0, size=900)
    assert gained(outcome(), everybody, objective) == pytest.approx(2 * -2.0)
    assert saved(outcome(), everybody, units, objective) == pytest.approx(
        0.5 * 24 / 60 + 0.25 * 400 / 1000
    )
    assert gained(everybody, everybody, objective) == 0
    assert saved(everybody, everybody, units, objective) == 0
    # What both began with is the same, so their difference is that of the rewards.
    apart = team_reward(outcome(), 0.5, units, objective)
    apart -= team_reward(everybody, 0.5, units, objective)
    beside = gained(outcome(), everybody, objective)
    assert apart == pytest.approx(beside + saved(outcome(), everybody, units, objective))


def test_the_rewards_of_a_run_add_up_to_the_objective():
    objective, units = ObjectiveSettings(), Units(10.0, 100)
    outcomes = [outcome(accuracy, 7.0 + accuracy, 50) for accuracy in (0.3, 0.5, 0.45)]
    before = [0.1, 0.3, 0.5]
    paid = sum(team_reward(o, b, units, objective) for o, b in zip(outcomes, before, strict=True))
    whole = total(0.45, outcomes, units, objective)
    assert paid + worth(0.1, objective) == pytest.approx(whole)


def test_features_are_what_they_are_said_to_be():
    """Two clients, h = 2: the newest first, the cohort's median where there is no history."""
    seen = {
        0: Seen((1,), probed=(1, 2), probe_seconds=(9.0, 4.0), transfer_seconds=(6.0, 2.0)),
        1: Seen(),
    }
    # A client that counted in round 1 only by its first probe's work: 9 seconds, once.
    seen[0] = replace(seen[0], seconds=(18.0,))
    here = view(3, [0, 1], seen, rounds=12)
    probes = {0: Probe(1.0, 2.0, 100), 1: Probe(3.0, 6.0, 300)}
    rows = observe(here, here.members, probes, 2, worst_loss=9.0)
    wanted = [
        [math.log(1 / 2), math.log(3 / 2)],
        [math.log(2 / 4), math.log(6 / 4)],
        [0.0, 0.0],
        [0.0, 0.0],
        [0.0, 0.0],
        [math.log(1 / 2), math.log(3 / 2)],
        [0.0, 0.0],
        [math.log(4 / 6), math.log(8 / 6)],
        [math.log(2), math.log(3)],
        [math.log(10)] * 2,
    ]
    assert rows.shape == (2, width(2)) and rows.dtype == np.float32
    np.testing.assert_allclose(rows.T, wanted, atol=1e-6)


def test_the_finish_that_is_expected_is_what_is_left_of_the_work_and_the_upload():
    """The whole took 3, 5 and 4 probes; 4 - 1 present probes are left. Who never sent takes the median."""
    seen = {
        0: Seen(
            rounds=(1, 3),
            seconds=(90.0, 6.0),
            transfer_seconds=(9.0, 7.0),
            probed=(1, 2, 3),
            probe_seconds=(5.0, 5.0, 2.0),
        ),
        1: Seen((2,), seconds=(50.0,), transfer_seconds=(1.0,), probed=(2,), probe_seconds=(10.0,)),
        2: Seen((2,), seconds=(4.0,), transfer_seconds=(4.0,), probed=(2,), probe_seconds=(1.0,)),
        3: Seen(probed=(3,), probe_seconds=(1.0,)),
    }
    here = view(4, range(4), seen)
    rows = observe(here, here.members, probes_of(range(4)), 1, 9.0)
    expected = np.array([3 * 1 + 7.0, 3 * 2 + 1.0, 3 * 3 + 4.0, 3 * 4 + 4.0])
    np.testing.assert_allclose(rows[:, 5], np.log(expected / np.median(expected)), rtol=1e-5)


def test_known_histories_come_newest_first():
    seen = {
        client: Seen(
            probed=(1, 2), probe_seconds=(1.0 + client, 5.0), transfer_seconds=(3.0, 1.0 + client)
        )
        for client in (0, 1)
    }
    here = view(3, [0, 1], seen)
    probes = {client: Probe(1.0, 1.0, 1) for client in (0, 1)}
    rows = observe(here, here.members, probes, 3, 9.0)
    first = [math.log(1 / 1.5), math.log(2 / 1.5)]
    np.testing.assert_allclose(rows[:, 1:4].T, [[0, 0], [0, 0], first], atol=1e-6)
    np.testing.assert_allclose(rows[:, 4:7].T, [first, [0, 0], [0, 0]], atol=1e-6)


@given(st.integers(3, 12), st.sampled_from([1e9, 1e-9, 0.0]), st.integers(0, 2))
def test_a_client_that_lies_moves_the_others_by_the_place_of_one(clients, lie, of):
    """Whatever it tells, the others' features lie between those with its neighbours of rank."""
    honest = {c: Probe(1.0 + c, 2.0 + c, 10 * (1 + c)) for c in range(clients)}
    told = [honest[0].loss, honest[0].seconds, honest[0].upload_bytes]
    told[of] = lie
    here = view(2, range(clients))
    rows, lied = (
        observe(here, here.members, probes, 1, 9.0)
        for probes in (honest, {**honest, 0: Probe(*told)})
    )
    column = [0, 1, 3][of]
    values = sorted(getattr(honest[c], ("loss", "seconds", "upload_bytes")[of]) for c in honest)
    middle = [values[max(clients // 2 - 2, 0)], values[min(clients // 2 + 1, clients - 1)]]
    most = math.log(middle[1] / middle[0])
    assert (abs(lied[1:, column] - rows[1:, column]) <= most + 1e-5).all()
    assert (abs(lied[:, column]) <= math.log(LARGEST_RATIO) + 1e-5).all()


@pytest.mark.parametrize("missing", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_taken_for_the_worst(missing):
    here = view(1, [0, 1])
    probes = {0: Probe(missing, 1.0, 1), 1: Probe(1.0, 1.0, 1)}
    rows = observe(here, here.members, probes, 3, worst_loss=3.0)
    assert rows[:, 0] == pytest.approx([math.log(3 / 2), math.log(1 / 2)])
    assert np.isfinite(rows).all()


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(1, 1000))
def test_features_do_not_depend_on_the_unit(loss, seconds, size):
    here = view(2, [0, 1, 2])
    plain = {client: Probe(1.0 + client, 2.0 + client, 10 * (1 + client)) for client in range(3)}
    scaled = {
        client: Probe(loss * p.loss, seconds * p.seconds, size * p.upload_bytes)
        for client, p in plain.items()
    }
    a, b = (observe(here, here.members, probes, 3, 9.0) for probes in (plain, scaled))
    np.testing.assert_allclose(a, b, atol=1e-5)


@given(SEEDS, st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_running_statistics_are_those_of_all_rows(seed, sizes):
    generator = np.random.default_rng(seed)
    rows = [generator.standard_normal((size, 4)).astype(np.float32) * 3 + 1 for size in sizes]
    standard = Standard.of_width(4)
    for part in rows:
        standard.take_in(part)
    every = np.concatenate(rows).astype(np.float64)
    deviation = np.maximum(every.std(axis=0), LEAST_DEVIATION)
    wanted = np.clip((every - every.mean(axis=0)) / deviation, -5, 5)
    np.testing.assert_allclose(standard(np.concatenate(rows)), wanted, atol=1e-4)


def test_an_untrained_team_values_everything_alike():
    policy = policy_of()
    states = np.random.default_rng(0).standard_normal((5, FEATURES)).astype(np.float32)
    assert (policy.team.values(states) == 0).all()
    assert greedy(policy.team.values(states)).tolist() == [1] * 5
