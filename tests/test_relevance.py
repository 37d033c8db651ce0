"""The relevance filter: agreement of signs, its threshold, and what a skipped update means to a round."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from inprocess import InProcessFederation

from clients.edge import edge_of
from fedkit.engine.plan import make_plan
from fedkit.errors import UsageError
from fedkit.knowledge.relevance import Threshold, agreement, read_threshold

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

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
VECTOR = arrays(np.float32, st.integers(1, 30), elements=st.floats(-1, 1, width=32))


class Wire:
    """Sees the exchange ``train``: what came, what was sent, and the model then, by round and client."""

    def __init__(self):
        self.seen = {}

    def __call__(self, instruction, reply):
        if instruction.metadata.message_type != "train":
            return reply
        round, client = int(instruction.metadata.group_id), instruction.metadata.dst_node_id - 2
        trained = edge_of(self.run.context(client)).own.state_dict()
        self.seen[round, client] = (
            {name: array.numpy() for name, array in instruction.content["arrays"].items()},
            {name: tensor.numpy().copy() for name, tensor in trained.items()},
            reply.content,
        )
        return reply


def ran(**more):
    run = InProcessFederation(**{**SMALL, **more})
    run.summary = run.run()
    return run


def told(run, name):
    """By round what the server said."""
    return {e.round: e.value for e in run.events if e.name == name and e.client is None}


def bits(run):
    return [(name, array.numpy().tobytes()) for name, array in run.result.arrays.items()]


@given(VECTOR)
def test_an_update_agrees_with_itself(u):
    assert agreement([(u, u)]) == 1


@given(VECTOR)
def test_an_update_agrees_with_its_opposite_in_its_zeros_alone(u):
    assert agreement([(u, -u)]) == np.count_nonzero(u == 0) / u.size


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from([-2.0, 0.0, 0.5]), st.sampled_from([-1.0, 0.0, 3.0])),
                min_size=1, max_size=12), st.integers(0, 12))  # fmt: skip
def test_the_share_is_over_all_coordinates_of_all_tensors(pairs, cut):
    ours, theirs = np.array(pairs).T
    parts = [(ours[:cut], theirs[:cut]), (ours[cut:], theirs[cut:])]
    same = sum(math.copysign(1, a) * (a != 0) == math.copysign(1, b) * (b != 0) for a, b in pairs)
    assert agreement(parts) == same / len(pairs)


def test_the_threshold_falls_with_the_root_of_the_round():
    assert read_threshold("") is None
    assert read_threshold("0.8") == Threshold(0.8)
    assert [read_threshold("0.8").at(t) for t in (1, 9)] == [0.8, 0.8]
    assert [read_threshold("0.9,decay").at(t) for t in (1, 4, 9)] == pytest.approx([0.9, 0.45, 0.3])


@pytest.mark.parametrize("spec", ["x", "-0.1", "1.1", "nan", "0.8,fall", "0.8,", ",decay"])
def test_a_threshold_that_there_is_not_is_refused(spec):
    with pytest.raises(UsageError, match="relevance must be"):
        make_plan({"strategy": "fedavg", "relevance": spec}, local=True)


def test_a_threshold_of_zero_is_fedavg_to_the_bit():
    run, plain = ran(relevance="0"), ran()
    assert bits(run) == bits(plain)
    assert run.summary["bytes_up"] == plain.summary["bytes_up"]
    assert set(told(run, "skipped_share").values()) == {0.0}
    assert not told(plain, "skipped_share")


def test_a_client_sends_if_enough_of_its_signs_agree_with_the_way_of_the_model_that_it_saw_last():
    wire = Wire()
    run = wire.run = InProcessFederation(
        wire, **{**SMALL, "rounds": 5}, min_clients=2, relevance="0.7"
    )
    # The node of client 1 is away in round 2.
    run.round_over = lambda round, arrays: setattr(run.grid, "absent", {3} if round == 1 else set())
    run.run()
    last, skips = {}, 0
    for (_, client), (came, trained, content) in sorted(wire.seen.items()):
        if client in last:
            moved = np.concatenate([(came[n] - last[client][n]).ravel() for n in came])
            update = np.concatenate([(trained[n] - came[n]).ravel() for n in came])
            wanted = float(np.mean(np.sign(moved) == np.sign(update))) if moved.any() else 1.0
        else:
            wanted = 1.0  # nothing to agree with yet
        metrics = content["metrics"]
        assert metrics["relevance"] == pytest.approx(wanted)
        assert metrics["skipped"] == float(wanted < 0.7)
        assert ("arrays" in content) == (wanted >= 0.7)
        skips += wanted < 0.7
        last[client] = came
    assert (2, 1) not in wire.seen
    assert 0 < skips < len(wire.seen)
    assert [e.value for e in run.events if e.name == "skipped"].count(1.0) == skips


def test_a_skipped_update_is_an_answer_of_no_bytes_and_the_others_are_averaged():
    wire, after = Wire(), {}
    run = wire.run = InProcessFederation(wire, **SMALL, relevance="0.7", eval_every=4)
    run.round_over = lambda round, arrays: after.setdefault(
        round, {name: array.numpy() for name, array in arrays.items()}
    )
    run.run()
    size = sum(array.numpy().nbytes for array in run.result.arrays.values())
    shares, saved = told(run, "skipped_share"), told(run, "bytes_saved")
    assert any(0 < share < 1 for share in shares.values())
    for round in range(1, 5):
        skipping = [c for c in range(3) if wire.seen[round, c][2]["metrics"]["skipped"]]
        assert shares[round] == len(skipping) / 3
        assert saved[round] == size * len(skipping)
        of_round = [e for e in run.events if (e.round, e.exchange) == (round, "train")]
        up = {e.client: e.value for e in of_round if e.name == "bytes_up"}
        assert up == {c: 0 if c in skipping else size for c in range(3)}
        sent = [wire.seen[round, c] for c in range(3) if c not in skipping]
        for name, values in after[round].items():
            pairs = [(c["metrics"]["num-examples"], t[name]) for _, t, c in sent]
            mean = wire.seen[round, 0][0][name]  # with nothing to average it stays
            if pairs:
                mean = sum(n * t.astype(np.float64) for n, t in pairs) / sum(n for n, _ in pairs)
            np.testing.assert_array_equal(values, mean.astype(np.float32))
    assert not run.warnings()
    assert not [e for e in run.events if e.event == "missed"]


def test_if_all_skip_the_model_stays_and_the_next_round_is_sent():
    run = ran(relevance="1", rounds=5)
    shares = told(run, "skipped_share")
    # Nobody agrees in all signs; a model that has not moved gives nothing to agree with.
    assert shares == {1: 0.0, 2: 1.0, 3: 0.0, 4: 1.0, 5: 0.0}
    assert not run.warnings()
    assert run.summary["status"] == "completed"


def test_the_last_model_seen_lives_in_the_durable_state():
    def restart(instruction, reply):
        if instruction.metadata.message_type == "train":
            run.start_anew(instruction.metadata.dst_node_id)
        return reply

    whole = ran(relevance="0.7", update_codec="topk:0.3")
    run = InProcessFederation(restart, **SMALL, relevance="0.7", update_codec="topk:0.3")
    assert run.run()["digest"] == whole.summary["digest"]
    assert any(told(whole, "skipped_share").values())


def test_a_skip_counts_only_where_there_is_a_filter():
    def claim(instruction, reply):
        if instruction.metadata.message_type == "train" and instruction.metadata.dst_node_id == 3:
            del reply.content["arrays"]
            reply.content["metrics"]["skipped"] = 1.0
        return reply

    run = InProcessFederation(claim, **{**SMALL, "rounds": 1})
    run.run()
    (warning,) = run.warnings()
    assert "client 1 (logistic) was left out: it is not the global model's state dict" in warning
