"""Flower's own strategies by name: what they make of fedkit's clients, held against NumPy."""

from __future__ import annotations

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from flwr.app import Array
from inprocess import InProcessFederation
from resuming import measured, resumed

from fedkit.engine.plan import make_plan
from fedkit.errors import UsageError
from fedkit.registry import all_names, load

SMALL = {"clients": 4, "public": "digits:30", "num_shards": 16, "eval_samples": 30, "alone": False}
TRAIN = SMALL | {"model": "mlp:16", "local_epochs": 1, "learning_rate": 0.05}
TRAIN |= {"batch_size": 32, "eval_every": 9}
NORMED = {"model": "lenet:batch", "clients": 3, "num_shards": 40}


class Wire:
    """The weights that went down and came up, by round and client; may change what comes up."""

    def __init__(self, change=None):
        self.change, self.down, self.up = change, {}, {}

    def __call__(self, instruction, reply):
        meta = instruction.metadata
        if meta.message_type == "train":
            at = int(meta.group_id), meta.dst_node_id - 2
            self.down[at] = numpy_of(instruction.content["arrays"])
            if self.change is not None:
                self.change(*at, reply.content)
            self.up[at] = numpy_of(reply.content["arrays"])
        return reply

    def of(self, round):
        return [arrays for (at, _), arrays in sorted(self.up.items()) if at == round]


def numpy_of(record):
    return {name: array.numpy() for name, array in record.items()}


def ran(name, change=None, **settings):
    run = InProcessFederation(
        wire := Wire(change), **{**TRAIN, "strategy": name, "rounds": 1, **settings}
    )
    run.summary, run.wire = run.run(), wire
    return run


def examples(run):
    members = sorted(run.driver.roster.members.values(), key=lambda member: member.client)
    return [member.examples for member in members]


def assert_close(actual, wanted, tolerance=1e-6):
    assert list(actual) == list(wanted)
    for name, values in wanted.items():
        assert actual[name].shape == np.shape(values), name
        np.testing.assert_allclose(actual[name], values, rtol=tolerance, atol=tolerance)


def stacked(run, name, round=1):
    return np.stack([arrays[name] for arrays in run.wire.of(round)]).astype(np.float64)


# Names


def test_all_that_average_models_are_there_by_name():
    there = {name.removeprefix("flwr:") for name in all_names("strategies") if ":" in name}
    wanted = {
        name
        for name in flower.__all__
        if issubclass(kind := getattr(flower, name), flower.FedAvg) and "Xgb" not in kind.__name__
    }
    assert there == wanted > {"FedAdam", "FedYogi", "FedMedian", "Krum", "QFedAvg"}
    assert load("strategies", "flwr:FedAdam") is load("strategies", "flwr:FedAdam")


@pytest.mark.parametrize("name", [name for name in all_names("strategies") if ":" in name])
def test_each_runs_and_keeps_the_models_types(name):
    run = ran(name, clients=3, rounds=2, model="lenet:batch", num_shards=60)
    initial, final = numpy_of(run.strategy.initial_arrays()), numpy_of(run.result.arrays)
    assert [v.dtype for v in final.values()] == [v.dtype for v in initial.values()]
    assert any((final[name] != initial[name]).any() for name in final)
    assert not run.warnings()
    assert final["1.num_batches_tracked"] == max(a["1.num_batches_tracked"] for a in run.wire.of(2))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"strategy": "flwr:FedAdm"}, "no strategy 'flwr:FedAdm' .did you mean flwr:FedAdam"),
        ({"strategy": "flwr"}, "no strategy 'flwr' .did you mean flwr:"),
        ({"strategy": "flwr:FedXgbBagging"}, "no strategy 'flwr:FedXgbBagging'"),
        ({"strategy": "flwr:os.system"}, "no strategy 'flwr:os.system'"),
        ({"strategy": "ktpfl:more"}, "ktpfl takes nothing after a colon"),
        ({"strategy": "flwr:FedAdam", "etta": 1}, "no setting 'etta' .did you mean eta"),
        ({"strategy": "flwr:FedAdam", "eta_l": 1}, "eta-l is not set here: .* learning-rate"),
        ({"strategy": "flwr:FedAdam", "fraction_train": 0.1}, "--select"),
        ({"strategy": "flwr:FedAvg", "min-available-nodes": 3}, "--min-clients"),
        ({"strategy": "flwr:FedAvg", "weighted_by_key": "x"}, "weighting"),
        ({"strategy": "flwr:FedAvg", "eta": 0.1}, "no setting 'eta'"),
        ({"strategy": "flwr:FedAdam", "eta": "fast"}, "eta must be a number"),
        ({"strategy": "flwr:FedTrimmedAvg", "beta": 0.6}, "FedTrimmedAvg refuses .*beta"),
        ({"strategy": "flwr:FedAdam", "outer": "momentum:0.9"}, "outer"),
        ({"strategy": "flwr:FedMedian", "robust": True}, "gives clients no weights"),
        ({"strategy": "flwr:Krum", "robust": True}, "gives clients no weights"),
        ({"strategy": "flwr:FedTrimmedAvg", "update_codec": "topk:0.1"}, "entry by entry"),
    ],
)
def test_what_is_refused_before_anything_starts(settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        make_plan(settings)


def test_its_numbers_are_settings_with_flowers_defaults():
    hyper = make_plan({"strategy": "flwr:FedAdam", "beta_1": "0.5"}).hyper
    assert (hyper.eta, hyper.beta_1, hyper.beta_2, hyper.tau) == (0.1, 0.5, 0.99, 0.001)


# What is done with models


@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_flowers_fedavg_is_fedavg_but_for_rounding(weighting):
    more = {"weighting": weighting, "rounds": 2, **NORMED}
    ours, flowers = ran("fedavg", **more), ran("flwr:FedAvg", **more)
    assert_close(numpy_of(flowers.result.arrays), numpy_of(ours.result.arrays), 1e-4)


def test_median_is_the_median():
    run = ran("flwr:FedMedian")
    final = numpy_of(run.result.arrays)
    assert_close(final, {name: np.median(stacked(run, name), axis=0) for name in final})


def test_trimmed_mean_leaves_out_the_extremes():
    run = ran("flwr:FedTrimmedAvg", beta=0.25)
    final = numpy_of(run.result.arrays)
    kept = {name: np.sort(stacked(run, name), axis=0)[1:-1].mean(axis=0) for name in final}
    assert_close(final, kept)


def test_krum_takes_the_model_that_is_nearest_to_the_others():
    def hostile(round, client, content):
        if client == 2:
            arrays = content["arrays"]
            for name, array in list(arrays.items()):
                arrays[name] = Array(array.numpy() + np.float32(3))

    run = ran("flwr:Krum", hostile, num_malicious_nodes=1)
    flat = np.stack([np.concatenate([v.ravel() for v in a.values()]) for a in run.wire.of(1)])
    apart = np.square(flat[:, None].astype(np.float64) - flat[None]).sum(axis=-1)
    nearest = np.sort(apart, axis=1)[:, 1:2].sum(axis=1)  # n - f - 2 = 1 of the others
    best = int(np.argmin(nearest))
    assert best != 2
    assert_close(numpy_of(run.result.arrays), run.wire.of(1)[best])


@pytest.mark.parametrize(
    ("name", "more"), [("flwr:FedMedian", {}), ("flwr:FedTrimmedAvg", {"beta": 0.25})]
)
def test_a_minority_of_ruinous_uploads_is_withstood_where_a_mean_is_not(name, more):
    def ruin(round, client, content):
        if client == 1:
            for tensor, array in list(content["arrays"].items()):
                content["arrays"][tensor] = Array(np.full(array.shape, 3e38, dtype=np.float32))

    largest = {}
    for strategy, settings in ((name, more), ("fedavg", {})):
        run = ran(strategy, ruin, **settings)
        assert not run.warnings(), "finite numbers of the right shapes are taken"
        largest[strategy] = max(np.abs(a).max() for a in numpy_of(run.result.arrays).values())
    assert largest[name] < 10
    assert 1e37 < largest["fedavg"] < np.inf


def test_adam_steps_as_in_the_paper():
    """Reddi et al. 2021, algorithm 2, with Flower's bias correction; two rounds, in float64."""
    eta, one, two, tau = 0.1, 0.9, 0.99, 0.001
    run = ran("flwr:FedAdam", rounds=2)
    w = {n: a.astype(np.float64) for n, a in numpy_of(run.strategy.initial_arrays()).items()}
    m, v = ({name: np.zeros_like(values) for name, values in w.items()} for _ in range(2))
    shares = np.array(examples(run)) / sum(examples(run))
    for round in (1, 2):
        rate = eta * np.sqrt(1 - two ** (round + 1)) / (1 - one ** (round + 1))
        for name in w:
            delta = np.tensordot(shares, stacked(run, name, round), axes=1) - w[name]
            m[name] = one * m[name] + (1 - one) * delta
            v[name] = two * v[name] + (1 - two) * delta**2
            w[name] = w[name] + rate * m[name] / (np.sqrt(v[name]) + tau)
    assert_close(numpy_of(run.result.arrays), w, 1e-4)


def test_a_server_optimiser_leaves_statistics_to_the_mean():
    run = ran("flwr:FedAdam", eta=1.0, **NORMED)
    shares, final = np.array(examples(run)) / sum(examples(run)), numpy_of(run.result.arrays)
    for name in ("1.running_mean", "1.running_var"):
        wanted = np.tensordot(shares, stacked(run, name), axes=1)
        np.testing.assert_allclose(final[name], wanted, rtol=1e-6)


def test_fedprox_pulls_as_ours_does():
    ours = ran("fedprox", mu=0.5, local_epochs=2)
    flowers = ran("flwr:FedProx", proximal_mu=0.5, local_epochs=2)
    plain = ran("fedavg", local_epochs=2)
    for mine, theirs, free in zip(*(run.wire.of(1) for run in (ours, flowers, plain)), strict=True):
        assert all(mine[name].tobytes() == theirs[name].tobytes() for name in mine)
        assert any(mine[name].tobytes() != free[name].tobytes() for name in mine)


def test_qfedavg_weighs_by_loss():
    """Li et al. 2020, algorithm 2, in float64, with q = 1."""
    rate = 0.05
    run = ran("flwr:QFedAvg", q=1.0, learning_rate=rate, model="logistic", clients=2)
    w = numpy_of(run.strategy.initial_arrays())
    losses = [e.value for e in run.events if e.name == "train_loss"]
    deltas, h = dict.fromkeys(w, 0.0), 0.0
    for loss, arrays in zip(losses, run.wire.of(1), strict=True):
        grads = {n: (w[n].astype(np.float64) - arrays[n]) / rate for n in w}
        deltas = {n: deltas[n] + loss * grads[n] for n in w}
        h += sum(np.square(grad).sum() for grad in grads.values()) + loss / rate
    assert_close(numpy_of(run.result.arrays), {n: w[n] - deltas[n] / h for n in w}, 1e-4)


def test_adam_learns():
    run = ran("flwr:FedAdam", eta=0.03, rounds=8, local_epochs=2, num_shards=4, learning_rate=0.1)
    assert run.summary["server_models"]["global"] > 0.8


# What comes from clients


def test_the_order_of_replies_does_not_matter():
    usual, run = ran("flwr:FedAvg"), InProcessFederation(**TRAIN, strategy="flwr:FedAvg", rounds=1)
    pull = run.grid.pull_messages
    run.grid.pull_messages = lambda ids: pull(ids)[::-1]
    run.run()
    for name, array in run.result.arrays.items():
        assert array.data == usual.result.arrays[name].data


@pytest.mark.parametrize("bad", [np.float32(np.nan), "shape"], ids=["nan", "shape"])
@pytest.mark.parametrize("name", ["flwr:FedAdam", "flwr:FedMedian"])
def test_a_bad_reply_is_left_out_by_name(name, bad):
    def change(round, client, content):
        if client == 1:
            values = content["arrays"]["1.weight"].numpy()
            spoilt = values[:-1] if isinstance(bad, str) else np.full_like(values, bad)
            content["arrays"]["1.weight"] = Array(spoilt)

    run = ran(name, change)
    assert any("client 1" in text and "1.weight" in text for text in run.warnings())
    assert all(np.isfinite(values).all() for values in numpy_of(run.result.arrays).values())


def test_where_flower_makes_no_model_the_old_one_stays():
    run = ran("flwr:Bulyan", num_malicious_nodes=1, rounds=2)
    final, initial = numpy_of(run.result.arrays), numpy_of(run.strategy.initial_arrays())
    assert all(final[name].tobytes() == initial[name].tobytes() for name in final)
    assert sum("Bulyan has no new model" in text for text in run.warnings()) == 2


def test_a_model_without_tensors_is_not_taken():
    run = ran("flwr:MultiKrum", num_nodes_to_select=0)
    assert any("the old one stays: it makes no 1.weight" in text for text in run.warnings())


def test_a_model_that_is_not_finite_is_not_taken():
    run = ran("flwr:FedAdam", eta=1e39, rounds=2)
    final, initial = numpy_of(run.result.arrays), numpy_of(run.strategy.initial_arrays())
    assert all(final[name].tobytes() == initial[name].tobytes() for name in final)
    assert sum("not finite" in text for text in run.warnings()) == 2
    assert run.strategy.state.kept == {}


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "flwr:FedAdam"},
        {"strategy": "flwr:FedYogi", "select": "uniform:0.5"},
        {"strategy": "flwr:FedAvgM", "server_momentum": 0.9},
    ],
    ids=lambda settings: settings["strategy"],
)
def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not(tmp_path, settings):
    settings = TRAIN | {"rounds": 3, "eval_every": 1} | settings
    whole = InProcessFederation(**settings)
    whole.run()
    assert whole.strategy.state.kept
    half = resumed(tmp_path, 1, **settings)
    assert measured(half, 2) == measured(whole, 2) != []
    for name, array in half.result.arrays.items():
        assert array.data == whole.result.arrays[name].data
