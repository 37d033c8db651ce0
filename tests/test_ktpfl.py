"""KT-pFL's promises (algorithms.md 6): its matrix, what travels, and who learns from whom."""

from itertools import pairwise

import numpy as np
import pytest
import test_strategies
from flwr.app import Array
from scipy.special import softmax
from test_strategies import (
    assert_same_bits,
    consensus,
    differs,
    federation,
    kept_model,
    ran,
    replace_array,
)

from fedkit.engine.plan import make_plan
from fedkit.errors import UsageError
from fedkit.knowledge import rows
from strategies.ktpfl import KTpFL

LITTLE = {"public": "digits:1000", "public_samples": 60}
KTPFL = test_strategies.KTPFL | LITTLE
# Nothing is trained: every client tells what its own initial network says.
UNTRAINED = KTPFL | {"local_epochs": 0, "distill_epochs": 0}
UPDATES = pytest.mark.parametrize("update", ["projection", "softmax", "clusters"])
LEARNED = pytest.mark.parametrize("update", ["projection", "softmax"])


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKIT_CACHE", str(tmp_path / "cache"))


def predictions(seed, count, sharpness=3.0):
    """Soft predictions that differ from client to client."""
    scores = np.random.default_rng(seed).standard_normal((count, 60, 10)) * sharpness
    return list(softmax(scores, axis=2).astype(np.float32))


def say(told):
    """A change that lets each client say given numbers, by client."""

    def change(kind, round, client, reply):
        if kind == "train.local":
            reply.content["logits"]["values"] = Array(told[client])
        return reply

    return change


def then(*changes):
    """Changes one after the other; a lost reply stays lost."""

    def change(kind, round, client, reply):
        for each in changes:
            reply = each(kind, round, client, reply) if reply is not None else None
        return reply

    return change


def starting_from(matrix, change, **settings):
    """A run of one round whose matrix is ``matrix`` before it."""
    run, wire = federation(change, **UNTRAINED | settings, clients=len(matrix), rounds=1)
    run.strategy.state.coefficients = np.array(matrix, dtype=np.float64)
    run.strategy.state.rows = {client: client for client in range(len(matrix))}
    run.run()
    return run, wire


def updated(told, matrix, **settings):
    """The matrix after one round in which clients said this, and the messages."""
    run, wire = starting_from(matrix, say(told), **settings)
    return run.strategy.state.coefficients, wire


def skewed(count, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(count, 2.0), size=count)


def logged(run, round):
    return {e.client: e.value for e in run.events if (e.event, e.round) == ("coefficients", round)}


def targets(wire, round=1):
    return {
        client: record["values"]
        for client, record in wire.down("train.distill", "target", round).items()
    }


def told(wire, round=1):
    return {
        client: record["values"]
        for client, record in wire.up("train.local", "logits", round).items()
    }


# The invariants of algorithms.md 6, through whole rounds; the functions' own are in test_coefficients


def test_invariant_a_the_frozen_uniform_mixture_is_no_mean_of_logits():
    """softmax(mean of scores) is not the mean of softmaxes: the two spaces are two methods."""
    frozen = UNTRAINED | {"update": "none"}
    _, soft = ran(**frozen, clients=3, rounds=1)
    _, raw = ran(**frozen | {"space": "logit"}, clients=3, rounds=1)
    for client in range(3):
        scores, mixture = told(raw), targets(raw)[client]
        np.testing.assert_array_max_ulp(mixture, consensus((1.0, scores[k]) for k in range(3)))
        gap = np.abs(softmax(mixture / 3, axis=1) - targets(soft)[client]).max()
        assert 1e-6 < gap < 0.1


@UPDATES
@pytest.mark.parametrize("space", ["prob", "logit"])
def test_invariant_b_rows_stay_on_the_simplex(update, space):
    settings = KTPFL | {"update": update, "space": space, "matrix_rate": 0.5}
    run, _ = ran(**settings, clients=4, rounds=3, partition="dirichlet:0.3")
    for round in (1, 2, 3):
        matrix = np.array([logged(run, round)[client] for client in range(4)])
        assert (matrix >= 0).all()
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)


@UPDATES
def test_invariant_c_identical_predictions_leave_the_matrix_and_themselves(update):
    (same,) = predictions(1, 1)
    run, wire = ran(say([same] * 4), **UNTRAINED | {"update": update}, clients=4, rounds=2)
    np.testing.assert_allclose(run.strategy.state.coefficients, np.full((4, 4), 0.25), atol=1e-12)
    for round in (1, 2):
        for target in targets(wire, round).values():
            np.testing.assert_array_max_ulp(target, same, maxulp=1)


def test_invariant_d_a_large_penalty_leads_to_the_uniform_matrix():
    start = skewed(4)
    near, _ = updated(predictions(2, 4), start, update="projection", penalty=0.0)
    far, _ = updated(predictions(2, 4), start, update="projection", penalty=1e6, matrix_rate=0.5e-6)
    np.testing.assert_allclose(far, np.full((4, 4), 0.25), atol=1e-5)
    assert np.abs(near - 0.25).max() > 0.05


@LEARNED
def test_invariant_f_identical_clients_keep_equal_columns(update):
    first, second, third = predictions(3, 3)
    start = skewed(4)
    start[:, 3] = start[:, 1] = (start[:, 1] + start[:, 3]) / 2
    matrix, wire = updated([first, second, third, second], start, update=update, matrix_rate=0.3)
    assert np.abs(matrix - start).max() > 1e-3
    np.testing.assert_allclose(matrix[:, 1], matrix[:, 3], atol=1e-12)
    # The other way round they need not be equal: what each learns depends on its own row.
    assert np.abs(targets(wire)[1] - targets(wire)[3]).max() > 1e-4


@LEARNED
def test_invariant_h_a_row_does_not_depend_on_other_rows(update):
    soft, start = predictions(4, 4), skewed(4)
    other = skewed(4, seed=9)
    other[2] = start[2]
    one, first = updated(soft, start, update=update, matrix_rate=0.3)
    two, second = updated(soft, other, update=update, matrix_rate=0.3)
    np.testing.assert_allclose(one[2], two[2], rtol=1e-12)
    np.testing.assert_allclose(targets(first)[2], targets(second)[2], rtol=1e-6)
    assert np.abs(one[1] - two[1]).max() > 1e-3


# What travels


def test_in_logit_space_raw_scores_travel_and_are_mixed():
    settings = UNTRAINED | {"space": "logit", "matrix_rate": 0.5}
    run, wire = ran(**settings, clients=3, rounds=1)
    _, soft = ran(**UNTRAINED | {"matrix_rate": 0.5}, clients=3, rounds=1)
    scores = told(wire)
    assert min(record.min() for record in scores.values()) < 0
    for client in range(3):
        np.testing.assert_allclose(
            softmax(scores[client].astype(np.float64) / 3, axis=1), told(soft)[client], atol=1e-6
        )
        row = logged(run, 1)[client]
        wanted = np.tensordot(row, [scores[k].astype(np.float64) for k in range(3)], axes=1)
        np.testing.assert_allclose(targets(wire)[client], wanted, rtol=1e-6, atol=1e-6)


@UPDATES
def test_in_logit_space_the_matrix_steps_as_in_probability_space(update):
    """On softmax(z / tau): the same clients get the same matrix, whatever travels."""
    rng = np.random.default_rng(6)
    scores = [(rng.standard_normal((60, 10)) * 6).astype(np.float32) for _ in range(4)]
    # Two that agree, so that clusters are clear.
    scores[3] = scores[0] + np.float32(0.01)
    soft = [softmax(z.astype(np.float64) / 3, axis=1).astype(np.float32) for z in scores]
    start = skewed(4)
    settings = {"update": update, "matrix_rate": 0.5, "clusters": 3, "temperature": 3.0}
    raw, _ = updated(scores, start, **settings, space="logit")
    prob, _ = updated(soft, start, **settings)
    np.testing.assert_allclose(raw, prob, rtol=1e-4, atol=1e-6)
    assert np.abs(raw - start).max() > 1e-3
    if update != "clusters":
        other, _ = updated(scores, start, **settings | {"temperature": 1.0}, space="logit")
        assert np.abs(raw - other).max() > 1e-4


def test_local_plus_mix_is_the_own_answer_plus_the_mixture():
    settings = UNTRAINED | {"space": "logit", "digest_target": "local+mix", "matrix_rate": 0.5}
    run, wire = ran(**settings, clients=3, rounds=1)
    scores = {client: values.astype(np.float64) for client, values in told(wire).items()}
    for client, target in targets(wire).items():
        row = logged(run, 1)[client]
        mixture = sum(row[k] * scores[k] for k in range(3))
        np.testing.assert_allclose(target, scores[client] + mixture, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("preset", ["default", "paper", "code", "comet"])
def test_local_plus_mix_of_probabilities_is_refused_at_the_door(preset):
    settings = {"strategy": "ktpfl", "preset": preset, "digest_target": "local+mix"}
    with pytest.raises(UsageError, match="space=logit"):
        make_plan(settings, local=True)
    assert make_plan({**settings, "space": "logit"}, local=True).hyper.digest_target == "local+mix"


# Clusters


@pytest.mark.parametrize("space", ["prob", "logit"])
def test_clustered_clients_learn_from_the_mean_of_their_cluster(space):
    one, other = predictions(7, 2)
    rng = np.random.default_rng(8)
    base = [one, other, one, other, one]
    if space == "logit":
        base = [np.log(p) * 3 for p in base]
    noise = [0.02 * rng.random((60, 10)) for _ in base]
    told = [(p + n) for p, n in zip(base, noise, strict=True)]
    if space == "prob":
        told = [p / p.sum(axis=1, keepdims=True) for p in told]
    told = [p.astype(np.float32) for p in told]
    settings = {"update": "clusters", "clusters": 2, "space": space}
    run, wire = ran(say(told), **UNTRAINED | settings, clients=5, rounds=1)
    groups = {0: [0, 2, 4], 1: [1, 3], 2: [0, 2, 4], 3: [1, 3], 4: [0, 2, 4]}
    for client, group in groups.items():
        row = np.isin(range(5), group) / len(group)
        np.testing.assert_allclose(logged(run, 1)[client], row, rtol=1e-12)
        wanted = np.mean([told[k].astype(np.float64) for k in group], axis=0)
        np.testing.assert_allclose(targets(wire)[client], wanted, rtol=1e-6, atol=1e-6)


def test_comet_is_two_clusters():
    hyper = make_plan({"strategy": "ktpfl", "preset": "comet"}, local=True).hyper
    assert (hyper.update, hyper.clusters) == ("clusters", 2)
    settings = {name: value for name, value in KTPFL.items() if name != "temperature"}
    run, wire = ran(**settings, preset="comet", clients=4, rounds=2, models="lenet,cnn")
    for round in (1, 2):
        matrix = np.array([logged(run, round)[client] for client in range(4)])
        for row in matrix:
            assert len({value for value in row if value}) == 1
        assert len(np.unique(matrix, axis=0)) <= 2
        assert sorted(targets(wire, round)) == [0, 1, 2, 3]


def test_one_cluster_is_fedmds_consensus_and_many_are_everyone_alone():
    soft = predictions(9, 3)
    for count, matrix in ((1, np.full((3, 3), 1 / 3)), (3, np.eye(3)), (9, np.eye(3))):
        settings = UNTRAINED | {"update": "clusters", "clusters": count}
        run, _ = ran(say(soft), **settings, clients=3, rounds=1)
        np.testing.assert_allclose(run.strategy.state.coefficients, matrix, rtol=1e-12)


# The public set's labels

LABELLED = UNTRAINED | {
    "public": "digits:60",
    "public_labels": True,
    "public_pretrain": True,
    "pretrain_epochs": 2,
    "workers": 1,
}


def inits(wire, round=1):
    return sorted(client for kind, at, client in wire.sent if (kind, at) == ("train.init", round))


def test_public_pretraining_happens_once_before_the_first_round():
    run, wire = ran(**LABELLED, clients=2, rounds=2)
    assert inits(wire) == [0, 1]
    assert inits(wire, 2) == []
    losses = {e.client for e in run.events if e.name == "pretrain_loss"}
    assert losses == {0, 1}
    plain, _ = ran(**LABELLED | {"public_pretrain": False}, clients=2, rounds=2)
    for client in (0, 1):
        assert differs(kept_model(run, client), kept_model(plain, client))


@pytest.mark.parametrize("preset", ["default", "paper", "code", "comet"])
def test_without_public_pretraining_labels_change_nothing(preset):
    settings = {"strategy": "ktpfl", "preset": preset, "public": "digits:60", "local_epochs": 1}
    assert make_plan(settings, local=True).hyper.public_pretrain is False
    runs = [
        ran(**settings, public_labels=labels, clients=2, rounds=1)[0] for labels in (False, True)
    ]
    assert_same_bits(kept_model(runs[0], 0), kept_model(runs[1], 0))
    assert not any(e.exchange == "init" for run in runs for e in run.events)


@pytest.mark.parametrize("preset", ["default", "paper", "code", "comet"])
def test_public_pretraining_without_labels_is_refused_at_the_door(preset):
    with pytest.raises(UsageError, match="public-labels=true"):
        make_plan({"strategy": "ktpfl", "preset": preset, "public_pretrain": True}, local=True)


def test_the_server_pretrains_once_for_each_architecture():
    settings = LABELLED | {"pretrain": "server", "models": "lenet,cnn"}
    run, wire = ran(**settings, clients=3, rounds=1)
    weights = wire.down("train.init", "pretrained")
    assert_same_bits(weights[0], weights[2])
    for client in range(3):
        mine = kept_model(run, client)
        assert_same_bits({name: weights[client][name] for name in mine}, mine)


def test_who_missed_the_pretraining_is_asked_again():
    def change(kind, round, client, reply):
        return None if (kind, round, client) == ("train.init", 1, 1) else reply

    run, wire = ran(change, **LABELLED, clients=2, rounds=2)
    assert inits(wire, 2) == [1]
    assert run.strategy.state.initialised == [0, 1]


# Who takes part


@UPDATES
def test_rows_and_columns_of_those_not_chosen_stay_to_the_bit(update):
    before = {}

    def change(kind, round, client, reply):
        if kind == "train.local":
            before[round] = run.strategy.state.coefficients.copy(), dict(run.strategy.state.rows)
        return reply

    settings = KTPFL | {"update": update, "matrix_rate": 0.5, "select": "uniform:0.5"}
    run, wire = federation(
        change, **settings, clients=4, rounds=6, partition="dirichlet:0.3", eval_every=100
    )
    run.run()
    kept, moved = 0, 0
    last = run.strategy.state.coefficients, run.strategy.state.rows
    states = [before[round] for round in sorted(before)] + [last]
    for round, ((old, places), (new, _)) in enumerate(pairwise(states), 1):
        chosen = sorted(told(wire, round))
        assert len(chosen) == 2
        assert sorted(targets(wire, round)) == chosen
        np.testing.assert_allclose(new.sum(axis=1), 1, atol=1e-12)
        if len(new) != len(old):
            continue
        away = [place for client, place in places.items() if client not in chosen]
        np.testing.assert_array_equal(new[away], old[away])
        np.testing.assert_array_equal(new[:, away], old[:, away])
        kept += len(away)
        moved += int((new != old).any())
    assert kept
    assert moved


@UPDATES
def test_who_is_present_shares_out_what_it_puts_on_those_present(update):
    def lose(kind, round, client, reply):
        return None if (kind, client) == ("train.local", 1) else reply

    soft, start = predictions(10, 3), skewed(3)
    run, wire = starting_from(start, then(say(soft), lose), update=update, matrix_rate=0.5)
    matrix = run.strategy.state.coefficients
    np.testing.assert_array_equal(matrix[1], start[1])
    np.testing.assert_array_equal(matrix[:, 1], start[:, 1])
    assert sorted(targets(wire)) == [0, 2]
    for row in (0, 2):
        assert matrix[row].sum() == pytest.approx(1, abs=1e-12)
        assert np.abs(matrix[row] - start[row]).max() > 1e-4
        share = matrix[row, [0, 2]] / matrix[row, [0, 2]].sum()
        wanted = share[0] * soft[0].astype(np.float64) + share[1] * soft[2]
        np.testing.assert_allclose(targets(wire)[row], wanted, rtol=1e-6, atol=1e-7)


@UPDATES
def test_who_is_taken_out_leaves_a_smaller_matrix_and_comes_back_with_a_new_row(update):
    seen = {}

    def change(kind, round, client, reply):
        state = run.strategy.state
        if (kind, client) == ("evaluate", 0):
            seen[round] = state.coefficients.copy(), dict(state.rows)
            # Client 1 is taken out after the first round and comes back for the third.
            run.grid.absent = {3} if round == 1 else set()
            if round == 1:
                run.strategy.remove_client(1)
                seen["taken out"] = state.coefficients.copy(), dict(state.rows)
        return reply

    settings = UNTRAINED | {"update": update, "matrix_rate": 0.5, "min_clients": 1}
    run, wire = federation(change, **settings, clients=3, rounds=3)
    run.run()
    assert [seen[at][0].shape for at in (1, "taken out", 2, 3)] == [(3, 3), (2, 2), (2, 2), (3, 3)]
    first, smaller = seen[1][0], seen["taken out"][0]
    part = first[np.ix_([0, 2], [0, 2])]
    np.testing.assert_allclose(smaller, part / part.sum(axis=1, keepdims=True), rtol=1e-12)
    assert seen["taken out"][1] == {0: 0, 2: 1}
    assert seen[3][1] == {0: 0, 2: 1, 1: 2}
    for matrix, places in seen.values():
        assert sorted(places.values()) == list(range(len(matrix)))
        assert (matrix >= 0).all()
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    assert [sorted(targets(wire, round)) for round in (1, 2, 3)] == [[0, 1, 2], [0, 2], [0, 1, 2]]
    # Each row goes with its client, not with its place.
    for client, target in targets(wire, 3).items():
        row, places = logged(run, 3)[client], seen[3][1]
        wanted = sum(row[places[k]] * told(wire, 3)[k].astype(np.float64) for k in range(3))
        np.testing.assert_allclose(target, wanted, rtol=1e-6, atol=1e-7)


def test_everybody_may_be_taken_out():
    run, _ = ran(**UNTRAINED, clients=2, rounds=1)
    run.strategy.remove_client(0)
    assert run.strategy.state.coefficients.tolist() == [[1.0]]
    run.strategy.remove_client(1)
    assert run.strategy.state.coefficients.shape == (0, 0)


def spoil_rows(client, at):
    def make(values):
        values = values.copy()
        values[at, 4] = np.nan
        return values

    return replace_array("train.local", client, "logits", "values", make)


@UPDATES
@pytest.mark.parametrize("space", ["prob", "logit"])
def test_a_row_that_one_client_cannot_tell_is_nobodys_target(update, space):
    settings = UNTRAINED | {"update": update, "space": space, "on_bad": "drop_row"}
    settings |= {"matrix_rate": 0.5}
    change = then(spoil_rows(1, [3, 7]), spoil_rows(2, [7, 30]))
    run, wire = ran(change, **settings, clients=3, rounds=1)
    kept = [row for row in range(60) if row not in (3, 7, 30)]
    assert not run.warnings()
    for client, target in targets(wire).items():
        valid = rows.read(wire.sent["train.distill", 1, client]["rows"], 60)
        assert np.flatnonzero(valid).tolist() == kept
        row = logged(run, 1)[client]
        wanted = sum(row[k] * told(wire)[k][kept].astype(np.float64) for k in range(3))
        np.testing.assert_allclose(target, wanted, rtol=1e-6, atol=1e-6)
    # The matrix steps on the rows that are left.
    matrix = run.strategy.state.coefficients
    assert np.isfinite(matrix).all()
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-9)


def test_the_matrix_does_not_see_rows_that_are_left_out():
    soft, start = predictions(11, 3), skewed(3)
    spoiled = [values.copy() for values in soft]
    spoiled[1][:30] = np.nan
    run, _ = starting_from(start, say(spoiled), on_bad="drop_row", matrix_rate=0.5)
    part, _ = updated([values[30:] for values in soft], start, matrix_rate=0.5, public_samples=30)
    np.testing.assert_allclose(run.strategy.state.coefficients, part, rtol=1e-12)


def test_without_a_row_that_all_can_tell_nobody_learns_and_the_matrix_stays():
    def change(kind, round, client, reply):
        spoil = then(spoil_rows(0, slice(0, 30)), spoil_rows(1, slice(30, 60)))
        return spoil(kind, round, client, reply) if round == 2 else reply

    matrices = {}

    def watch(kind, round, client, reply):
        matrices[round] = run.strategy.state.coefficients.copy()
        return reply

    settings = UNTRAINED | {"on_bad": "drop_row", "matrix_rate": 0.5}
    run, wire = federation(then(change, watch), **settings, clients=2, rounds=3)
    run.run()
    assert targets(wire, 2) == {}
    assert sorted(targets(wire, 3)) == [0, 1]
    np.testing.assert_array_equal(matrices[2], matrices[1])


# What is recorded


@pytest.mark.parametrize("update", ["projection", "softmax", "clusters", "none"])
def test_the_row_of_each_client_that_answered_is_logged_each_round(update):
    def change(kind, round, client, reply):
        return None if (kind, round, client) == ("train.local", 2, 1) else reply

    run, _ = ran(change, **UNTRAINED | {"update": update}, clients=3, rounds=3)
    assert [sorted(logged(run, round)) for round in (1, 2, 3)] == [[0, 1, 2], [0, 2], [0, 1, 2]]
    for client in range(3):
        assert logged(run, 3)[client] == run.strategy.state.coefficients[client].tolist()
    names = {(e.exchange, e.name) for e in run.events if e.event == "coefficients"}
    assert names == {("local", "knowledge_coefficients")}


def test_presets_are_those_of_the_document():
    code = make_plan({"strategy": "ktpfl", "preset": "code"}, local=True).hyper
    paper = make_plan({"strategy": "ktpfl", "preset": "paper"}, local=True).hyper
    assert set(KTpFL.PRESETS) == {"default", "paper", "code", "comet"}
    for hyper in (code, paper):
        assert (hyper.temperature, hyper.penalty, hyper.public_samples) == (10.0, 0.7, 5000)
        assert (hyper.optimiser, hyper.learning_rate) == ("sgd", 0.02)
        assert (hyper.batch_size, hyper.distill_batch, hyper.distill_epochs) == (16, 256, 1)
        assert (hyper.epoch_ramp, hyper.local_epochs, hyper.distill_weight) == (True, 10, 1.0)
    assert (code.update, code.reduction, code.replacement) == ("softmax", "mean", True)
    assert (paper.update, paper.reduction, paper.replacement) == ("projection", "batchmean", False)
