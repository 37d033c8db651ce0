"""FedMD's promises: fused rounds, consensus, masks, weights that the server trained, what is recorded."""

import weakref
from collections import Counter

import numpy as np
import pytest
import test_strategies
import torch
from flwr.app import Array, ArrayRecord
from scipy.special import softmax
from test_strategies import (
    assert_same_bits,
    differs,
    examples_of,
    federation,
    initial_model,
    kept_model,
    lose,
    numpy_of,
    ran,
    replace_array,
)

import strategies.pretraining
from fedkit.engine.facts import ServerView
from fedkit.engine.plan import make_plan
from fedkit.engine.workers import Workers
from fedkit.errors import FedkitError, UsageError
from fedkit.knowledge import rows
from fedkit.knowledge.consensus import Upload
from fedkit.models.build import build_model
from fedkit.models.measure import measure
from strategies.fedmd import FedMDHyperparameters
from strategies.pretraining import pretrained
from strategies.public_round import PublicRound
from strategies.reducer import Reducer

# Few private samples, so that training takes little time.
LITTLE = {"public": "digits:1000", "public_samples": 60}
FEDMD = test_strategies.FEDMD | LITTLE
KTPFL = test_strategies.KTPFL | LITTLE
FEDDF = LITTLE | {
    "strategy": "feddf",
    "local_epochs": 1,
    "steps": 4,
    "check_every": 2,
    "workers": 1,
}
FEDDISTILL = FEDDF | {"strategy": "feddistill"}
# Nothing is trained: every client tells what its own initial network says.
UNTRAINED = FEDMD | {"init_epochs": 0, "digest_epochs": 0, "revisit_epochs": 0}
KNOWLEDGE = ("query.logits", "train.digest")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKIT_CACHE", str(tmp_path / "cache"))


def measurements(run):
    """All that was measured, whichever exchange it came with."""
    return sorted(
        (e.round, -1 if e.client is None else e.client, e.name, e.value, e.n)
        for e in run.events
        if e.event == "metric"
    )


def metric(run, name):
    """A metric's values by (round, client)."""
    return {
        (e.round, e.client): e.value for e in run.events if (e.event, e.name) == ("metric", name)
    }


def asked(wire, kind, round):
    return sorted(client for of, at, client in wire.sent if (of, at) == (kind, round))


def assert_same_run(one, other, clients):
    for client in range(clients):
        assert_same_bits(kept_model(one, client), kept_model(other, client))
    assert measurements(one) == measurements(other)


# Fused rounds

SEVERAL = FEDMD | {"models": "lenet,cnn", "partition": "dirichlet:0.5", "rounds": 3, "clients": 3}


@pytest.mark.parametrize(
    "more",
    [{}, {"space": "prob", "temperature": 2.0, "alone": True}, {"codec": "int8"}],
    ids=["logit", "prob", "int8"],
)
def test_fusing_changes_no_model_no_metric_and_no_byte(more):
    fused, _ = ran(**SEVERAL | more | {"fuse": True})
    usual, _ = ran(**SEVERAL | more)
    assert_same_run(fused, usual, 3)
    for direction in ("bytes_up", "bytes_down"):
        assert fused.summary[direction] == usual.summary[direction] > 0
        for one, other in zip(fused.summary["clients"], usual.summary["clients"], strict=True):
            assert one[direction] == other[direction]


@pytest.mark.parametrize(("fuse", "exchanges"), [(True, 4), (False, 6)])
def test_fusing_makes_one_more_exchange_than_rounds_instead_of_two_a_round(fuse, exchanges):
    _, wire = ran(**UNTRAINED | {"fuse": fuse}, clients=2, rounds=3)
    messages = Counter((kind, round) for kind, round, _ in wire.sent if kind in KNOWLEDGE)
    assert len(messages) == exchanges
    assert set(messages.values()) == {2}
    assert ("query.logits", 1) in messages
    assert {round for kind, round in messages if kind == "train.digest"} == {1, 2, 3}


def test_the_last_digest_asks_for_nothing():
    _, wire = ran(**UNTRAINED | {"fuse": True}, clients=2, rounds=2)
    assert "subset" in wire.sent["train.digest", 1, 0]
    assert "subset" not in wire.sent["train.digest", 2, 0]
    assert "logits" not in wire.received["train.digest", 2, 0]


def test_where_not_everybody_takes_part_nothing_is_fused():
    some = SEVERAL | {"clients": 4, "select": "uniform:0.5"}
    fused, wire = ran(**some | {"fuse": True})
    usual, _ = ran(**some)
    for round in (1, 2, 3):
        assert len(asked(wire, "query.logits", round)) == 2
        for client in asked(wire, "train.digest", round):
            assert "subset" not in wire.sent["train.digest", round, client]
    assert fused.summary["digest"] == usual.summary["digest"]


def test_after_a_lost_fused_reply_everybody_is_asked_again():
    fused, wire = ran(lose("train.digest", 1), **SEVERAL | {"fuse": True})
    usual, _ = ran(lose("train.digest", 1), **SEVERAL)
    assert asked(wire, "query.logits", 2) == [0, 1, 2]
    assert asked(wire, "query.logits", 3) == []
    assert_same_run(fused, usual, 3)


def test_after_a_client_has_joined_everybody_is_asked_again():
    runs = []
    for fuse in (True, False):

        def change(kind, round, client, reply):
            if (kind, round) == ("train.digest", 1):
                runs[-1].grid.absent.clear()
            return reply

        run, wire = federation(change, **SEVERAL | {"fuse": fuse, "min_clients": 2})
        run.grid.absent.add(3)  # client 1
        runs.append(run)
        run.run()
        assert asked(wire, "query.logits", 1) == [0, 2]
        assert asked(wire, "query.logits", 2) == [0, 1, 2]
        assert asked(wire, "train.digest", 2) == [0, 1, 2]
    assert_same_run(*runs, 3)


def test_after_a_client_has_left_the_others_are_asked_again():
    runs = []
    for fuse in (True, False):

        def change(kind, round, client, reply):
            if (kind, round, client) == ("evaluate", 1, 2):
                runs[-1].grid.absent.add(3)
            return reply

        run, wire = federation(change, **SEVERAL | {"fuse": fuse, "min_clients": 2})
        runs.append(run)
        run.run()
        assert asked(wire, "query.logits", 2) == asked(wire, "train.digest", 2) == [0, 2]
    assert_same_run(*runs, 3)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda content: content["logits"].update(values=nans(content)), "not all finite"),
        (lambda content: content["answer"].update({"subset-digest": "0" * 16}), "another public"),
        (lambda content: content.pop("logits"), "no logits"),
    ],
    ids=["nan", "subset", "none"],
)
def test_a_bad_fused_answer_is_refused_by_name_and_asked_for_again(spoil, reason):
    def change(kind, round, client, reply):
        if (kind, round, client) == ("train.digest", 1, 1):
            spoil(reply.content)
        return reply

    run, wire = ran(change, **SEVERAL | {"fuse": True})
    usual, _ = ran(**SEVERAL)
    (warning,) = [text for text in run.warnings() if "left out" in text]
    assert "client 1 (cnn)" in warning
    assert reason in warning
    assert asked(wire, "query.logits", 2) == [0, 1, 2]
    assert run.summary["rounds"] == 3
    for client in range(3):
        assert_same_bits(kept_model(run, client), kept_model(usual, client))


def nans(content):
    return Array(np.full_like(content["logits"]["values"].numpy(), np.nan))


# One upload at a time


def alive_at_each(count, make, take):
    """How many arrays live each time another is made for ``take``, which reads them all."""
    refs, alive = [], []

    def arrays():
        for _ in range(count):
            array = make()
            refs.append(weakref.ref(array))
            alive.append(sum(ref() is not None for ref in refs))
            yield array
            del array

    take(arrays())
    assert len(alive) == count
    return alive


@pytest.mark.parametrize(
    "hyper",
    [
        FedMDHyperparameters(),
        FedMDHyperparameters(space="prob", aggregate="era", weighting="examples", ambiguity=1.0),
    ],
    ids=["mean", "era"],
)
def test_the_reducer_holds_one_upload_at_a_time(hyper):
    run, _ = ran(**UNTRAINED, clients=2, rounds=1)
    member = next(iter(run.driver.roster.members.values()))
    reduce = Reducer(hyper)
    alive = alive_at_each(
        30,
        lambda: np.full((40, 10), 0.1, np.float32),
        lambda arrays: reduce((member, Upload(1.0, array)) for array in arrays),
    )
    assert max(alive) <= 3


@pytest.mark.parametrize("fuse", [False, True])
def test_the_strategy_holds_one_upload_at_a_time(monkeypatch, fuse):
    refs, alive = [], []
    read = PublicRound._upload

    def counted(*args):
        upload = read(*args)
        refs.append(weakref.ref(upload.logits))
        alive.append(sum(ref() is not None for ref in refs))
        return upload

    monkeypatch.setattr(PublicRound, "_upload", counted)
    ran(**UNTRAINED | {"fuse": fuse}, clients=8, rounds=2)
    assert len(alive) == 16
    assert max(alive) <= 3


# The consensus


def trimmed_by_one(told):
    return np.sort(told, axis=0)[1:-1].mean(axis=0)


def on_simplex(values):
    return values / values.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("more", "oracle"),
    [
        ({"client_weights": "0:0,1:2"}, lambda z, n: np.average(z, 0, [0, 2, 1, 1])),
        ({"weighting": "examples"}, lambda z, n: np.average(z, 0, n)),
        (
            {"weighting": "examples", "client_weights": "3:0.5"},
            lambda z, n: np.average(z, 0, np.array(n) * [1, 1, 1, 0.5]),
        ),
        ({"aggregate": "median"}, lambda z, n: np.median(z, 0)),
        ({"aggregate": "trimmed:0.25"}, lambda z, n: trimmed_by_one(z)),
        (
            {"aggregate": "median", "space": "prob"},
            lambda p, n: on_simplex(np.median(p, 0)),
        ),
        (
            {"aggregate": "era:0.2", "space": "prob", "weighting": "examples"},
            lambda p, n: softmax(np.average(p, 0, n) / 0.2, axis=1),
        ),
        (
            {"aggregate": "power:3", "space": "prob"},
            lambda p, n: on_simplex(p.mean(axis=0) ** 3),
        ),
        ({"preset": "dsfl"}, lambda p, n: softmax(p.mean(axis=0) / 0.1, axis=1)),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_the_target_is_what_the_settings_make_of_the_uploads(more, oracle):
    run, wire = ran(**UNTRAINED | more, clients=4, rounds=1, partition="dirichlet:0.3")
    told = wire.up("query.logits", "logits")
    uploads = np.array([told[client]["values"] for client in range(4)], dtype=np.float64)
    examples = examples_of(run)
    assert len(set(examples)) > 1
    wanted = oracle(uploads, examples)
    assert np.abs(wanted - uploads.mean(axis=0)).max() > 1e-4
    for record in wire.down("train.digest", "target").values():
        np.testing.assert_allclose(record["values"], wanted, rtol=1e-5, atol=1e-6)


def test_weight_zero_for_everybody_is_no_consensus():
    run, wire = ran(**UNTRAINED | {"client_weights": "0:0,1:0"}, clients=2, rounds=2)
    assert not [at for at in wire.sent if at[0] == "train.digest"]
    assert run.summary["rounds"] == 2


def test_dsfl_sharpens_probabilities():
    plan = make_plan({"strategy": "fedmd", "preset": "dsfl"}, local=True)
    assert (plan.hyper.space, plan.hyper.aggregate) == ("prob", "era:0.1")
    _, wire = ran(**FEDMD, preset="dsfl", clients=2, rounds=1)
    for record in wire.up("query.logits", "logits").values():
        np.testing.assert_allclose(record["values"].sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"aggregate": "era"}, "space=prob"),
        ({"aggregate": "power"}, "space=prob"),
        ({"ambiguity": 1.0}, "space=prob"),
        ({"client_weights": "0"}, "pairs"),
        ({"aggregate": "mode"}, "mode"),
    ],
    ids=lambda value: "=".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_consensus_are_refused_at_the_door(more, sentence):
    with pytest.raises(UsageError, match=sentence):
        make_plan({"strategy": "fedmd", **more}, local=True)


# Masks

SELECTIVE = FEDMD | {
    "preset": "selective",
    "public": "digits:60",
    "partition": "classes:2",
    "clients": 5,
    "init_epochs": 6,
    "rounds": 2,
}


@pytest.fixture(scope="module")
def selective():
    return ran(**SELECTIVE)


def told_rows(content, count=60):
    return rows.read(content.array_records.get("rows"), count)


def test_selective_clients_tell_masked_rows_only_and_send_less(selective):
    run, wire = selective
    whole, _ = ran(**SELECTIVE | {"speak_about": "all", "init_epochs": 0})
    for round in (1, 2):
        for client, record in wire.up("query.logits", "logits", round).items():
            mine = told_rows(wire.received["query.logits", round, client])
            assert 0 < mine.sum() < 60
            assert record["values"].shape == (mine.sum(), 10)
    for client in range(5):
        masks = [told_rows(wire.received["query.logits", round, client]) for round in (1, 2)]
        size = sum(40 * int(mine.sum()) + 8 for mine in masks)
        assert run.summary["clients"][client]["bytes_up"] == size
        assert size < whole.summary["clients"][client]["bytes_up"]


def test_a_mask_belongs_to_the_sample_wherever_the_subset_has_it():
    settings = {"init_epochs": 0, "public": "digits:200", "public_samples": 120}
    _, wire = ran(**SELECTIVE | settings)
    seen = {}
    for round in (1, 2):
        indices = wire.down("query.logits", "subset", round)[0]["indices"]
        for client in range(5):
            mine = told_rows(wire.received["query.logits", round, client], 120)
            for index, said in zip(indices, mine, strict=True):
                assert seen.setdefault((client, index), said) == said
    assert len(seen) < 5 * 240


def test_selective_targets_are_the_confident_means_of_those_who_speak(selective):
    _, wire = selective
    for round in (1, 2):
        sums, counts = np.zeros((60, 10)), np.zeros(60)
        for client, record in wire.up("query.logits", "logits", round).items():
            mine = told_rows(wire.received["query.logits", round, client])
            sums[mine] += record["values"]
            counts += mine
        means = sums / np.maximum(counts, 1)[:, None]
        wanted = (counts > 0) & (2 * (1 - means.max(axis=1)) <= 1.0)
        assert 0 < wanted.sum() < 60
        for client, record in wire.down("train.digest", "target", round).items():
            valid = told_rows(wire.sent["train.digest", round, client])
            np.testing.assert_array_equal(valid, wanted)
            np.testing.assert_allclose(record["values"], means[valid], atol=1e-6)


def say(client_rows):
    """A change that lets each client say given labels surely: {client: {row: label}}."""

    def change(kind, round, client, reply):
        if kind == "query.logits":
            mine = np.zeros(60, dtype=np.bool_)
            told = np.zeros((60, 10), dtype=np.float32)
            for row, label in client_rows[client].items():
                mine[row], told[row, label] = True, 1
            reply.content["rows"] = rows.record(mine)
            reply.content["logits"] = ArrayRecord({"values": Array(told[mine])})
        return reply

    return change


def test_ambiguous_and_unprovided_rows_are_nobodys_target():
    first = dict.fromkeys(range(30), 1)
    second = dict.fromkeys(range(20, 25), 2) | dict.fromkeys(range(25, 50), 1)
    # They agree from 25 on, contradict each other from 20 to 24, and say nothing from 50 on.
    settings = FEDMD | {"space": "prob", "ambiguity": 0.9}
    run, wire = ran(say({0: first, 1: second}), **settings, clients=2, rounds=1)
    wanted = [*range(20), *range(25, 50)]
    for client in (0, 1):
        valid = told_rows(wire.sent["train.digest", 1, client])
        assert np.flatnonzero(valid).tolist() == wanted
        target = wire.down("train.digest", "target")[client]["values"]
        np.testing.assert_array_equal(target, np.eye(10, dtype=np.float32)[[1] * 45])
    assert metric(run, "consensus/rows") == {(1, None): 45}


def test_a_client_digests_the_valid_rows_only(monkeypatch):
    import clients.public

    learned, train = [], clients.public.train

    def spy(model, samples, *args, **kwargs):
        learned.append(samples.data)
        return train(model, samples, *args, **kwargs)

    monkeypatch.setattr(clients.public, "train", spy)
    change = say({0: {3: 1, 8: 2, 40: 0}, 1: {8: 2, 9: 4}})
    run, wire = ran(change, **FEDMD | {"space": "prob"}, clients=2, rounds=1)
    indices = wire.down("query.logits", "subset")[0]["indices"]
    wanted = run.view.data.public.data[torch.from_numpy(indices[[3, 8, 9, 40]]).long()]
    assert len(learned) == 2
    for images in learned:
        assert torch.equal(images, wanted)


def test_a_round_without_any_confident_row_digests_nothing():
    change = say({0: dict.fromkeys(range(60), 1), 1: dict.fromkeys(range(60), 2)})
    settings = FEDMD | {"space": "prob", "ambiguity": 0.9}
    run, wire = ran(change, **settings, clients=2, rounds=2)
    assert not [at for at in wire.sent if at[0] == "train.digest"]
    assert run.summary["rounds"] == 2


def spoil_rows(client, at, value=np.nan, kind="query.logits"):
    def make(values):
        values = values.copy()
        values[at, 4] = value
        return values

    return replace_array(kind, client, "logits", "values", make)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("space", ["logit", "prob"])
def test_drop_row_leaves_out_a_clients_bad_rows_only(value, space):
    settings = UNTRAINED | {"on_bad": "drop_row", "space": space}
    run, wire = ran(spoil_rows(1, [3, 7], value), **settings, clients=2, rounds=1)
    told = wire.up("query.logits", "logits")
    wanted = (told[0]["values"].astype(np.float64) + told[1]["values"]) / 2
    wanted[[3, 7]] = told[0]["values"][[3, 7]]
    sent = wire.down("train.digest", "target")
    assert sorted(sent) == [0, 1]
    for record in sent.values():
        np.testing.assert_allclose(record["values"], wanted, rtol=1e-6, atol=1e-6)
    assert not run.warnings()


def test_drop_row_leaves_a_row_without_any_good_answer_out_of_the_target():
    def change(*at):
        return spoil_rows(1, [3, 7])(*at[:3], spoil_rows(0, [7, 9])(*at))

    _, wire = ran(change, **UNTRAINED | {"on_bad": "drop_row"}, clients=2, rounds=1)
    for client, record in wire.down("train.digest", "target").items():
        valid = told_rows(wire.sent["train.digest", 1, client])
        assert np.flatnonzero(~valid).tolist() == [7]
        assert record["values"].shape == (59, 10)
        assert np.isfinite(record["values"]).all()


def test_drop_row_refuses_a_client_without_any_good_row_by_name():
    settings = UNTRAINED | {"on_bad": "drop_row"}
    run, wire = ran(spoil_rows(1, slice(None)), **settings, clients=2, rounds=1)
    assert any("client 1 (lenet)" in text and "any row" in text for text in run.warnings())
    assert asked(wire, "train.digest", 1) == [0]


@pytest.mark.parametrize("fuse", [False, True])
def test_on_bad_error_ends_the_run_with_the_clients_name(fuse):
    kind = "train.digest" if fuse else "query.logits"
    settings = UNTRAINED | {"on_bad": "error", "fuse": fuse, "models": "lenet,cnn"}
    with pytest.raises(FedkitError, match=r"client 1 \(cnn\) in round 1 is bad.*finite"):
        ran(spoil_rows(1, [3], kind=kind), **settings, clients=2, rounds=2)


# Weights that learned from the public set at the server

SERVER = UNTRAINED | {
    "pretrain": "server",
    "public_labels": True,
    "pretrain_epochs": 2,
    "pretrain_batch": 16,
    "workers": 1,
    "models": "lenet,cnn",
    "public": "digits:60",
}


@pytest.fixture
def trainings(monkeypatch):
    """Names the architectures that are trained, in order."""
    train, names = strategies.pretraining.train_on_public, []

    def spy(job):
        names.append(job[0])
        return train(job)

    monkeypatch.setattr(strategies.pretraining, "train_on_public", spy)
    return names


def sent_weights(wire, round=1):
    return wire.down("train.init", "pretrained", round)


def assert_same_weights(actual, wanted):
    assert_same_bits({name: actual[name] for name in wanted}, wanted)
    assert len(actual) == len(wanted)


def test_clients_of_one_architecture_start_from_the_same_trained_weights(trainings):
    run, wire = ran(**SERVER | {"pretrain_epochs": 60}, clients=3, rounds=1)
    weights = sent_weights(wire)
    assert trainings == ["cnn", "lenet"]
    for client in range(3):
        assert_same_weights(kept_model(run, client), weights[client])
    assert_same_weights(weights[0], weights[2])
    assert list(weights[0]) != list(weights[1])
    data = run.view.data
    for client, spec in ((0, "lenet"), (1, "cnn")):
        model = build_model(spec, data.shape, data.outputs, 1)
        model.load_state_dict(run.context(client).state["own-model"].to_torch_state_dict())
        accuracy, _ = measure(model, data.public)
        assert accuracy > 0.8


def test_pretraining_takes_nothing_from_the_private_training_that_follows():
    run, wire = ran(**SERVER | {"init_epochs": 1}, clients=3, rounds=1)
    assert differs(kept_model(run, 0), sent_weights(wire)[0])
    assert differs(kept_model(run, 0), kept_model(run, 2))


def test_the_reference_starts_from_the_same_weights():
    run, wire = ran(**SERVER | {"alone": True}, clients=2, rounds=1)
    for client in (0, 1):
        assert_same_weights(kept_model(run, client, "alone"), sent_weights(wire)[client])


def test_a_second_run_takes_the_weights_from_the_cache_bit_for_bit(trainings):
    first, one = ran(**SERVER, clients=2, rounds=1)
    assert trainings == ["cnn", "lenet"]
    second, other = ran(**SERVER, clients=2, rounds=1)
    assert trainings == ["cnn", "lenet"]
    assert second.summary["digest"] == first.summary["digest"]
    for client in (0, 1):
        assert_same_weights(sent_weights(other)[client], sent_weights(one)[client])


def test_an_architecture_that_is_new_is_the_only_one_trained(trainings):
    ran(**SERVER | {"models": "lenet"}, clients=2, rounds=1)
    ran(**SERVER, clients=2, rounds=1)
    assert trainings == ["lenet", "cnn"]


def test_uncached_weights_are_the_cached_ones(tmp_path, monkeypatch, trainings):
    _, one = ran(**SERVER, clients=2, rounds=1)
    monkeypatch.setenv("FEDKIT_CACHE", str(tmp_path / "another"))
    _, other = ran(**SERVER, clients=2, rounds=1)
    assert len(trainings) == 4
    for client in (0, 1):
        assert_same_weights(sent_weights(other)[client], sent_weights(one)[client])


def server_weights(*architectures, count=1, **settings):
    """What the server would send, trained by so many processes."""
    settings = {**SERVER, "partition": "iid", **settings}
    plan = make_plan({name: value for name, value in settings.items() if name != "models"})
    workers = Workers(count, 1)
    weights = pretrained(ServerView(plan).facts(), plan.hyper, architectures or ["lenet"], workers)
    workers.close()
    weights = {spec: numpy_of(record) for spec, record in weights.items()}
    return weights if architectures else weights["lenet"]


@pytest.mark.slow
def test_two_workers_train_what_one_does(tmp_path, monkeypatch):
    one = server_weights("lenet", "cnn")
    monkeypatch.setenv("FEDKIT_CACHE", str(tmp_path / "another"))
    other = server_weights("lenet", "cnn", count=2)
    for spec in ("lenet", "cnn"):
        assert_same_bits(other[spec], one[spec])


@pytest.mark.parametrize(
    "more",
    [
        {"seed": 2},
        {"pretrain_epochs": 3},
        {"pretrain_batch": 20},
        {"pretrain_rate": 0.002},
        {"public": "digits:61"},
    ],
    ids=lambda more: next(iter(more)),
)
def test_the_cache_is_for_the_same_training_only(more, trainings):
    first = server_weights()
    other = server_weights(**more)
    assert trainings == ["lenet", "lenet"]
    assert differs(first, other)
    assert_same_weights(server_weights(), first)
    assert trainings == ["lenet", "lenet"]


def test_the_cache_is_not_for_an_architecture_that_has_changed(trainings, monkeypatch):
    """A plug-in's network is another one tomorrow, under the same name."""
    import fedkit.models.build
    from fedkit.models.small import cnn, lenet

    server_weights()
    find = fedkit.models.build.find
    monkeypatch.setattr(
        fedkit.models.build,
        "find",
        lambda *at: (cnn, None) if find(*at)[0] is lenet else find(*at),
    )
    weights = server_weights()
    assert trainings == ["lenet", "lenet"]
    assert weights["0.weight"].shape == (32, 1, 3, 3)


@pytest.mark.parametrize("kind", ["cut", "garbage", "empty", "bit", "foreign"])
def test_a_damaged_cache_file_is_trained_again_and_said(kind, tmp_path, trainings, caplog):
    first = server_weights()
    (file,) = (tmp_path / "cache").rglob("*.*")
    blob = bytearray(file.read_bytes())
    if kind == "bit":
        blob[-3] ^= 1
    elif kind == "foreign":
        server_weights(seed=2)
        trainings.pop()
        (other,) = [path for path in file.parent.iterdir() if path != file]
        # Another training's weights behind this one's checksum.
        blob = blob[:32] + other.read_bytes()[32:]
    else:
        blob = {"cut": blob[:-1], "garbage": b"\xff" * len(blob), "empty": b""}[kind]
    file.write_bytes(blob)
    assert_same_weights(server_weights(), first)
    assert trainings == ["lenet", "lenet"]
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert file.name in record.getMessage()
    # Mended for good.
    assert_same_weights(server_weights(), first)
    assert trainings == ["lenet", "lenet"]
    assert len(caplog.records) == 1


def test_who_joins_later_gets_the_same_weights(trainings):
    def change(kind, round, client, reply):
        if kind == "evaluate":
            run.grid.absent.clear()
        return reply

    run, wire = federation(
        change, **SERVER | {"models": "lenet"}, clients=2, rounds=2, min_clients=1
    )
    run.grid.absent.add(3)
    run.run()
    assert sorted(sent_weights(wire, 1)) == [0]
    assert_same_weights(sent_weights(wire, 2)[1], sent_weights(wire, 1)[0])
    assert trainings == ["lenet"]


def test_clients_that_train_themselves_are_sent_no_weights(trainings, tmp_path):
    settings = SERVER | {"pretrain": "client", "models": "lenet"}
    run, wire = ran(**settings, clients=2, rounds=1)
    assert not any("pretrained" in content for content in wire.sent.values())
    assert differs(kept_model(run, 0), kept_model(run, 1))
    assert sorted(metric(run, "pretrain_loss")) == [(1, 0), (1, 1)]
    assert trainings == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("pretrain", ["client", "server"])
def test_without_public_labels_nobody_learns_from_the_public_set(pretrain, trainings, tmp_path):
    settings = SERVER | {"pretrain": pretrain, "public_labels": False}
    run, wire = ran(**settings, clients=2, rounds=1)
    assert not any("pretrained" in content for content in wire.sent.values())
    assert metric(run, "pretrain_loss") == {}
    assert trainings == []
    assert not (tmp_path / "cache").exists()
    data = run.view.data
    fresh = build_model("lenet", data.shape, data.outputs, 1, 0)
    assert_same_weights(
        kept_model(run, 0), {name: t.numpy() for name, t in fresh.state_dict().items()}
    )
    assert initial_model(run) == {}


# What is recorded


@pytest.mark.parametrize("more", [{"fuse": True}, {"fuse": False}, {"codec": "topk:3"}])
def test_consensus_accuracy_is_recorded_where_public_labels_are_used(more):
    settings = FEDMD | {"pretrain_epochs": 1, "public_labels": True, "public_samples": 40} | more
    run, wire = ran(**settings, clients=2, rounds=3)
    found = metric(run, "consensus/accuracy")
    assert sorted(found, key=str) == [(1, None), (2, None), (3, None)]
    assert all(
        e.n == 40 for e in run.events if (e.event, e.name) == ("metric", "consensus/accuracy")
    )
    for round in (1, 2, 3):
        indices = run.strategy.draw(round)
        right = run.view.data.public.labels.numpy()[indices]
        target = wire.down("train.digest", "target", round)[0]
        best = target["indices"][:, 0] if "indices" in target else target["values"].argmax(axis=1)
        assert found[round, None] == pytest.approx((best == right).mean())
    assert any(0 < value < 1 for value in found.values())


def test_consensus_accuracy_counts_the_valid_rows():
    def change(kind, round, client, reply):
        labels = run.view.data.public.labels.numpy()[run.strategy.draw(round)]
        told = {0: {row: int(labels[row]) for row in range(6)}, 1: {30: int(labels[30] + 1) % 10}}
        return say(told)(kind, round, client, reply)

    settings = UNTRAINED | {"space": "prob", "public_labels": True, "pretrain_epochs": 0}
    run, _ = federation(change, **settings, clients=2, rounds=1)
    run.run()
    assert metric(run, "consensus/accuracy") == {(1, None): pytest.approx(6 / 7)}


@pytest.mark.parametrize(
    "settings", [FEDMD, FEDDF, FEDDISTILL], ids=lambda settings: settings["strategy"]
)
def test_consensus_accuracy_is_not_recorded_without_labels(settings):
    run, _ = ran(**settings, clients=2, rounds=1)
    assert metric(run, "consensus/accuracy") == {}
    labelled, _ = ran(**settings | {"public_labels": True}, clients=2, rounds=1)
    assert list(metric(labelled, "consensus/accuracy")) == [(1, None)]


FOUR = pytest.mark.parametrize(
    "settings",
    [FEDMD | {"fuse": True}, KTPFL, FEDDF, FEDDISTILL],
    ids=lambda settings: settings["strategy"],
)


@FOUR
def test_every_digest_tells_accuracy_and_loss_before_and_after(settings):
    run, _ = ran(**settings, clients=2, rounds=2, models="lenet,cnn")
    for what in ("accuracy_before", "accuracy_after", "loss_before", "loss"):
        found = metric(run, f"digest/{what}")
        assert sorted(found) == [(1, 0), (1, 1), (2, 0), (2, 1)]
        assert all(np.isfinite(value) for value in found.values())
        if what.startswith("accuracy"):
            assert all(0 <= value <= 1 for value in found.values())


def test_the_loss_before_is_the_distance_of_ones_own_answer_from_the_target():
    run, wire = ran(**FEDMD | {"fuse": True}, clients=3, rounds=2, models="lenet,cnn")
    found = metric(run, "digest/loss_before")
    for round in (1, 2):
        answers = {
            **wire.up("query.logits", "logits", 1),
            **(wire.up("train.digest", "logits", 1) if round == 2 else {}),
        }
        targets = wire.down("train.digest", "target", round)
        for client in range(3):
            wanted = np.abs(answers[client]["values"] - targets[client]["values"]).mean()
            assert found[round, client] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        FEDMD | {"digest_epochs": 0, "revisit_epochs": 0},
        KTPFL | {"distill_epochs": 0},
        FEDDF | {"digest_epochs": 0, "revisit_epochs": 0},
    ],
    ids=lambda settings: settings["strategy"],
)
def test_accuracies_are_those_on_the_own_test_data(settings):
    run, _ = ran(**settings, clients=2, rounds=1)
    measured = metric(run, "own_model/own_test/accuracy")
    assert metric(run, "digest/accuracy_before") == measured
    assert metric(run, "digest/accuracy_after") == measured


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [(FEDMD | {"revisit_epochs": 0}, "digest_epochs"), (KTPFL, "distill_epochs")],
    ids=["fedmd", "ktpfl"],
)
def test_the_accuracy_before_is_that_before_learning(settings, epochs):
    """The same as in a run that learns nothing; afterwards it is what the round ends with."""
    more = {"clients": 2, "rounds": 1, "learning_rate": 0.03}
    run, _ = ran(**settings | more | {epochs: 5})
    still, _ = ran(**settings | more | {epochs: 0})
    before, after = (metric(run, f"digest/accuracy_{when}") for when in ("before", "after"))
    assert before == metric(still, "own_model/own_test/accuracy")
    assert after == metric(run, "own_model/own_test/accuracy")
    assert before != after


def test_accuracies_are_those_on_validation_data_where_there_are_some():
    settings = FEDMD | {"digest_epochs": 0, "revisit_epochs": 0, "val_fraction": 0.3}
    run, _ = ran(**settings, clients=2, rounds=1)
    assert metric(run, "digest/accuracy_before") == metric(run, "own_model/own_val/accuracy")


@FOUR
def test_one_round_is_a_run(settings):
    """The one-shot form: answers once, targets once, no warning."""
    run, wire = ran(**settings, clients=2, rounds=1, models="lenet,cnn")
    counted = Counter(kind for kind, _, _ in wire.sent if kind != "query.join")
    local = {"train.init": 2, "query.logits": 2}
    if settings["strategy"] != "fedmd":
        local = {"train.local": 2}
    learn = "train.distill" if settings["strategy"] == "ktpfl" else "train.digest"
    assert counted == {**local, learn: 2, "evaluate": 2}
    assert run.summary["rounds"] == 1
    assert run.summary["mean_global_accuracy"] is not None
    assert not run.warnings()


def test_who_knows_nothing_of_a_subset_is_silent_and_nobody_is_warned():
    settings = SELECTIVE | {"density_ratio": 1e9, "rounds": 1, "init_epochs": 1}
    run, wire = ran(**settings)
    assert [at for at in wire.sent if at[0] == "query.logits"]
    assert all("logits" not in content.array_records for content in wire.received.values())
    assert not [at for at in wire.sent if at[0] == "train.digest"]
    assert not run.warnings()
