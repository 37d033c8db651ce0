"""FedSeq: how superclients are made, and how models walk through them."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import InProcessFederation
from resuming import measured, resumed

from fedkit.engine.plan import make_plan
from fedkit.errors import UsageError
from strategies.superclients import score, superclients

SMALL = {"clients": 4, "public": "digits:60", "num_shards": 16, "eval_samples": 30, "alone": False}
TRAIN = SMALL | {"model": "mlp:16", "local_epochs": 1, "learning_rate": 0.05}
# Shards of about 65 training samples: two to a superclient.
FEDSEQ = TRAIN | {"strategy": "fedseq", "group_samples": 100, "probe_epochs": 2, "partition": "iid"}


class Wire:
    """What went down and came up in walks, in the order of sending; may change or lose replies."""

    def __init__(self, change=lambda kind, round, client, reply: reply):
        self.change, self.down, self.up, self.order = change, {}, {}, []

    def __call__(self, instruction, reply):
        meta = instruction.metadata
        at = int(meta.group_id), meta.dst_node_id - 2
        if meta.message_type == "train":
            self.order.append(at)
            self.down[at] = bits(instruction.content["arrays"])
        reply = self.change(meta.message_type, *at, reply)
        if meta.message_type == "train" and reply is not None:
            self.up[at] = bits(reply.content["arrays"])
        return reply


def bits(record):
    return {name: array.numpy().tobytes() for name, array in record.items()}


def ran(change=None, **more):
    run = InProcessFederation(wire := Wire(*[change] if change else []), **{**FEDSEQ, **more})
    run.summary, run.wire = run.run(), wire
    return run


def lose(client, round=1, kind="train"):
    return lambda *at: None if at[:3] == (kind, round, client) else at[3]


def mean_of(models, weights):
    total = sum(weights)
    return {
        name: sum(w / total * np.frombuffer(model[name], np.float32).astype(np.float64)
                  for w, model in zip(weights, models, strict=True))
        for name in models[0]
    }  # fmt: skip


def examples(run):
    return {m.client: m.examples for m in run.driver.roster.members.values()}


# Superclients


def test_the_score_is_one_where_both_together_have_all_classes_alike():
    assert score(np.array([0.5, 0.5, 0, 0]), np.array([0, 0, 0.5, 0.5])) == pytest.approx(1)
    assert score(np.array([1.0, 0, 0, 0]), np.array([1.0, 0, 0, 0])) == pytest.approx(1 - np.log(4))


def test_complementary_clients_come_together():
    profiles = {k: np.eye(4)[k % 4] for k in range(8)}
    profiles |= {8: np.array([0.5, 0.5, 0, 0]), 9: np.array([0, 0, 0.5, 0.5])}
    groups = superclients(profiles, dict.fromkeys(profiles, 100), 200, 11)
    assert [8, 9] in groups and sorted(k for group in groups for k in group) == list(range(10))
    assert all(profiles[a] @ profiles[b] == 0 for a, b in groups)


def test_a_rest_with_too_few_samples_is_dealt_out_to_the_smallest():
    profiles = dict.fromkeys(range(5), np.full(2, 0.5))
    assert superclients(profiles, {0: 100, 1: 100, 2: 110, 3: 90, 4: 10}, 200, 11) == [
        [0, 1, 4], [2, 3]
    ]  # fmt: skip
    # Where nobody has room, the rest is a superclient of its own.
    assert superclients(profiles, dict.fromkeys(range(5), 100), 500, 2) == [[0, 1], [2, 3], [4]]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_client_is_in_one_superclient_of_bounded_size(data):
    count = data.draw(st.integers(1, 12))
    parts = st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any)
    profiles = {k: np.array(p := data.draw(parts), float) / sum(p) for k in range(count)}
    samples = {k: data.draw(st.integers(0, 300)) for k in range(count)}
    enough, most = data.draw(st.integers(1, 500)), data.draw(st.integers(1, 5))
    groups = superclients(profiles, samples, enough, most)
    assert sorted(k for group in groups for k in group) == list(range(count))
    assert all(1 <= len(group) <= most for group in groups)
    small = [g for g in groups if len(g) < most and sum(samples[k] for k in g) < enough]
    assert len(small) <= 1


# Walks


@pytest.mark.parametrize("more", [{}, {"model": "lenet:batch", "weighting": "equal"}], ids=str)
def test_superclients_of_one_are_fedavg(more):
    alone = ran(group_clients=1, rounds=2, **more)
    settings = {k: v for k, v in FEDSEQ.items() if k not in ("group_samples", "probe_epochs")}
    fedavg = InProcessFederation(**settings | {"strategy": "fedavg", "rounds": 2} | more)
    summary = fedavg.run()
    assert bits(alone.result.arrays) == bits(fedavg.result.arrays)
    assert alone.summary["bytes_up"] == summary["bytes_up"]


def test_a_model_walks_from_client_to_client_and_the_last_ones_are_averaged():
    run = ran(rounds=2)
    sizes, after = examples(run), bits(run.strategy.initial_arrays())
    for round in (1, 2):
        start = after
        order = [client for at, client in run.wire.order if at == round]
        first, second = order[:2], order[2:]
        assert all(run.wire.down[round, client] == start for client in first)
        walks = {}
        for client in second:  # it was sent what one of the first returned
            (before,) = (c for c in first if run.wire.up[round, c] == run.wire.down[round, client])
            walks[client] = before
        assert sorted([*walks, *walks.values()]) == [0, 1, 2, 3]
        last = [run.wire.up[round, client] for client in walks]
        weights = [sizes[client] + sizes[before] for client, before in walks.items()]
        wanted = mean_of(last, weights)
        after = run.wire.down[2, run.wire.order[4][1]] if round == 1 else bits(run.result.arrays)
        for name, values in wanted.items():
            np.testing.assert_allclose(np.frombuffer(after[name], np.float32), values, atol=1e-6)
    assert not run.warnings()


def test_groups_walk_side_by_side_in_as_many_exchanges_as_the_longest():
    run = ran(rounds=1, group_samples=190)  # three to a superclient; the fourth is dealt out
    names = [e.exchange for e in run.events if e.event == "exchange" and e.round == 1]
    assert names[:5] == ["profile", "train", "train-2", "train-3", "train-4"]
    assert names[5:] == ["evaluate"]
    told = [e for e in run.events if e.name == "superclients"]
    assert [(e.value, e.n) for e in told] == [(1, 4)]


def test_the_order_of_a_walk_is_drawn_anew_from_the_seed():
    quick = {"group_samples": 10**6, "local_epochs": 0, "probe_epochs": 0, "eval_every": 9}
    orders = [
        [[client for at, client in order if at == round] for round in (1, 2, 3, 4)]
        for order in (ran(rounds=4, seed=seed, **quick).wire.order for seed in (1, 1, 2))
    ]
    assert orders[0] == orders[1] != orders[2]
    assert len({tuple(order) for order in orders[0]}) > 1


def test_who_does_not_answer_is_passed_over_and_the_model_goes_on():
    whole = ran(rounds=1, group_samples=10**6)
    order = [client for _, client in whole.wire.order]
    run = ran(lose(order[1]), rounds=1, group_samples=10**6)
    assert [client for _, client in run.wire.order] == order
    assert run.wire.down[1, order[2]] == run.wire.up[1, order[0]] == run.wire.down[1, order[1]]
    assert bits(run.result.arrays) == run.wire.up[1, order[3]]


def test_a_bad_model_is_left_out_by_name_and_the_walk_goes_on():
    whole = ran(rounds=1, group_samples=10**6)
    order = [client for _, client in whole.wire.order]

    def spoil(kind, round, client, reply):
        if kind == "train" and client == order[3]:
            name = next(iter(reply.content["arrays"]))
            values = reply.content["arrays"][name].numpy()
            reply.content["arrays"][name] = Array(np.full_like(values, np.nan))
        return reply

    run = ran(spoil, rounds=1, group_samples=10**6)
    assert any(f"client {order[3]}" in text and "not finite" in text for text in run.warnings())
    assert bits(run.result.arrays) == run.wire.up[1, order[2]]


def test_nobody_answers_and_the_model_stays():
    run = ran(lambda kind, round, client, reply: None if kind == "train" else reply, rounds=1)
    assert bits(run.result.arrays) == bits(run.strategy.initial_arrays())


def test_only_who_takes_part_walks():
    run = ran(rounds=3, select="uniform:0.5", group_samples=10**6)
    for event in run.events:
        if event.event == "round_start":
            walked = {client for at, client in run.wire.order if at == event.round}
            assert walked == set(event.value) and len(walked) == 2
    profiled = [e.client for e in run.events if e.exchange == "profile" and e.name == "bytes_up"]
    assert len(profiled) == len(set(profiled)) == len(run.strategy.state.profiles)


def test_it_learns():
    run = ran(rounds=6, group_samples=10**6, num_shards=4, learning_rate=0.1, partition="classes:3")
    assert run.summary["server_models"]["global"] > 0.7


# Profiles


@pytest.mark.parametrize("labels", [False, True])
def test_a_profile_says_which_classes_a_client_has(labels):
    run = ran(rounds=1, partition="classes:3", num_shards=4, probe_epochs=20, public_labels=labels)
    for client, profile in run.strategy.state.profiles.items():
        counts = np.bincount(run.view.data.shard(client).train.labels.numpy(), minlength=10)
        assert profile.sum() == pytest.approx(1)
        assert profile[counts > 0].sum() > 0.8


def test_profiles_are_told_once_and_weigh_40_bytes():
    run = ran(rounds=2)
    told = [(e.round, e.client, e.value) for e in run.events
            if e.exchange == "profile" and e.name == "bytes_up"]  # fmt: skip
    assert told == [(1, client, 40) for client in range(4)]


@pytest.mark.parametrize(
    "bad",
    [
        np.full(10, 0.2, np.float32),
        np.full(9, 1 / 9, np.float32),
        np.full(10, 0.1),
        np.array([2, -1, *[0] * 8], np.float32),
        np.full(10, np.nan, np.float32),
    ],
    ids=["sum", "length", "float64", "negative", "nan"],
)
def test_a_bad_profile_is_refused_and_its_client_walks_alone(bad):
    def change(kind, round, client, reply):
        if (kind, round, client) == ("train.profile", 1, 2):
            reply.content["profile"]["profile"] = Array(bad)
        return reply

    run = ran(change, rounds=1, group_samples=10**6)
    assert any("client 2" in text and "profile" in text for text in run.warnings())
    assert run.wire.down[1, 2] == bits(run.strategy.initial_arrays())
    assert sorted(run.strategy.state.profiles) == [0, 1, 3]


@pytest.mark.parametrize("name, value", [("robust", True), ("relevance", "0.6")])
def test_what_makes_no_sense_in_a_walk_is_refused(name, value):
    with pytest.raises(UsageError, match=f"In fedseq .* leave {name} out"):
        make_plan({"strategy": "fedseq", name: value})


@pytest.mark.parametrize("more", [{}, {"select": "uniform:0.5", "outer": "momentum:0.5"}], ids=str)
def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not(tmp_path, more):
    settings = FEDSEQ | {"rounds": 3} | more
    whole = InProcessFederation(**settings)
    whole.run()
    half = resumed(tmp_path, 1, **settings)
    assert measured(half, 2) == measured(whole, 2) != []
    assert bits(half.result.arrays) == bits(whole.result.arrays)
