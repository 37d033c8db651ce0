"""Running statistics where weights are shared: averaged, local, static; and FedBN, which shares less."""

import copy

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from inprocess import InProcessFederation
from torch import nn

from clients import shared
from clients.edge import edge_of
from fedkit.data.samples import Samples
from fedkit.errors import UsageError
from fedkit.models.build import build_model
from fedkit.models.normalisation import (
    batch_moments,
    normalisation_of,
    statistics_of,
    untracked,
)

SMALL = {
    "strategy": "fedavg",
    "model": "lenet:batch",
    "clients": 3,
    "rounds": 2,
    "local_epochs": 1,
    "batch_size": 16,
    "learning_rate": 0.05,
    "public": "digits:30",
    "partition": "iid",
    "num_shards": 12,
    "alone": False,
}
STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


def run_of(**settings):
    run = InProcessFederation(**{**SMALL, **settings})
    run.summary = run.run()
    return run


def own_state(run, client):
    record = run.context(client).state["own-model"]
    return {name: array.numpy() for name, array in record.items()}


def last(run, name):
    """A measurement of the last round, by client (None: the server's)."""
    rounds = run.plan.federation.rounds
    return {e.client: e.value for e in run.events if e.round == rounds and e.name == name}


# Which tensors are which


class Odd(nn.Module):
    """Normalisation layers under names that say nothing, and another under one that lies."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
        self.bn = nn.Linear(4, 4)
        self.last = nn.LayerNorm(4)
        self.twice = self.first[1]
        self.bare = nn.BatchNorm1d(4, affine=False, track_running_stats=False)


def test_normalisation_layers_are_known_by_type_and_not_by_name():
    model = Odd()
    of_batch = {f"{at}.{name}" for at in ("first.1", "twice") for name in STATISTICS}
    assert statistics_of(model) == of_batch
    scales = {
        f"{at}.{n}" for at in ("first.1", "twice", "first.2", "last") for n in ("weight", "bias")
    }
    assert normalisation_of(model) == of_batch | scales
    assert statistics_of(build_model("lenet:group", (1, 8, 8), 10, 1)) == set()


def test_untracked_training_moves_no_statistics_and_uses_the_batch():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    other, inputs = copy.deepcopy(model), torch.randn(8, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with untracked(model):
        model.train()
        quiet = model(inputs)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert quiet.equal(other.train()(inputs))
    model(inputs)
    assert model[1].num_batches_tracked == 1, "afterwards it tracks again"


# Static statistics


def samples_of(data):
    data = torch.as_tensor(data)
    return Samples(data, torch.zeros(len(data), dtype=torch.int64), torch.zeros(1), torch.ones(1))


def test_moments_are_the_mean_over_batches_of_means_and_unbiased_variances():
    torch.manual_seed(2)
    first, second = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3)
    model = nn.Sequential(
        *(first, nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), second, nn.BatchNorm2d(2))
    )
    data = torch.randn(11, 1, 8, 8)
    moments, batches = batch_moments(copy.deepcopy(model), samples_of(data), 5)
    assert batches == 2  # the eleventh sample would be a batch of its own
    wide, means, variances = model.double(), [], []
    for at in (0, 5):
        hidden = wide[0](data[at : at + 5].double()).detach().numpy()
        mean, variance = hidden.mean((0, 2, 3)), hidden.var((0, 2, 3))
        normal = (hidden - mean[:, None, None]) / np.sqrt(variance + 1e-5)[:, None, None]
        after = wide[4](torch.relu(torch.from_numpy(normal))).detach().numpy()
        means.append((hidden.mean((0, 2, 3)), after.mean((0, 2, 3))))
        count = hidden[:, 0].size, after[:, 0].size
        variances.append(
            (
                hidden.var((0, 2, 3)) * count[0] / (count[0] - 1),
                after.var((0, 2, 3)) * count[1] / (count[1] - 1),
            )
        )
    for place, layer in enumerate(("1", "5")):
        wanted = np.mean([pair[place] for pair in means], axis=0)
        np.testing.assert_allclose(moments[f"{layer}.running_mean"], wanted, atol=1e-5)
        wanted = np.mean([pair[place] for pair in variances], axis=0)
        np.testing.assert_allclose(moments[f"{layer}.running_var"], wanted, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_samples_have_no_moments(count):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    assert batch_moments(model, samples_of(torch.randn(count, 1, 8, 8)), 5)[1] == 0


def test_static_statistics_are_those_of_all_clients_batches():
    run = run_of(buffers="static")
    arrays = {name: array.numpy() for name, array in run.result.arrays.items()}
    wanted, total = {}, 0
    for client in range(3):
        edge = edge_of(run.context(client))
        model = build_model("lenet:batch", edge.data.shape, edge.outputs, 0)
        model.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in arrays.items()})
        moments, batches = batch_moments(model, edge.private.train, 16)
        total += batches
        for name, value in moments.items():
            wanted[name] = wanted.get(name, 0) + batches * value.double().numpy()
    assert total > 3 and len(wanted) == 4
    for name, value in wanted.items():
        np.testing.assert_array_equal(arrays[name], (value / total).astype(np.float32))


def test_static_statistics_go_down_and_do_not_come_up():
    run = run_of(buffers="static")
    model = edge_of(run.context(0)).own
    whole = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    names = statistics_of(model)
    of_norms = sum(
        t.numel() * t.element_size() for n, t in model.state_dict().items() if n in names
    )
    moved = {
        (e.exchange, e.name): e.value for e in run.events if e.event == "bytes" and e.round == 2
    }
    assert moved["train", "bytes_down"] == whole
    assert moved["train", "bytes_up"] == whole - of_norms
    counters = 8 * sum(name.endswith("tracked") for name in names)
    assert moved["statistics", "bytes_up"] == of_norms - counters
    # Measuring is no part of what a round costs.
    assert run.summary["bytes_up"] == 3 * 2 * (whole - of_norms)


def test_statistics_are_gathered_only_when_something_is_measured():
    run = run_of(buffers="static", eval_every=2, rounds=3)
    asked = {e.round for e in run.events if e.exchange == "statistics" and e.event == "bytes"}
    assert asked == {2, 3}


def test_telling_statistics_changes_nothing_at_the_client():
    plain, measured = run_of(buffers="static", eval_every=2), run_of(buffers="static")
    for client in range(3):
        mine, theirs = own_state(measured, client), own_state(plain, client)
        assert all(
            (mine[n] == theirs[n]).all() for n in mine if n.rpartition(".")[2] not in STATISTICS
        )


def tampered(change):
    def tamper(instruction, reply):
        meta = instruction.metadata
        if meta.message_type == "query.statistics" and meta.dst_node_id == 3:
            change(reply.content)
        return reply

    return tamper


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c.metric_records["metrics"].update({"batches": 10**9}), "batches"),
        (lambda c: c.metric_records["metrics"].update({"batches": -1}), "batches"),
        (lambda c: c.metric_records["metrics"].update({"batches": 0.5}), "batches"),
        (lambda c: c.pop("lenet:batch"), "does not tell"),
        (lambda c: c["lenet:batch"].popitem(), "does not tell"),
        (lambda c: _spoil(c, np.nan), "not finite"),
        (lambda c: _spoil(c, -1), "negative"),
        (lambda c: _spoil(c, 1, shape=(2,)), "running_var is float32"),
    ],
    ids=["many", "negative", "fraction", "nothing", "layers", "nan", "variance", "shape"],
)
def test_statistics_that_make_no_sense_are_left_out(change, why):
    run = InProcessFederation(tampered(change), **SMALL | {"rounds": 1}, buffers="static")
    run.run()
    (warning,) = run.warnings()
    assert "client 1" in warning and why in warning
    honest = run_of(buffers="static", rounds=1)
    assert any(
        run.result.arrays[name].data != array.data for name, array in honest.result.arrays.items()
    )


def _spoil(content, value, shape=None):
    told = content["lenet:batch"]
    name = next(name for name in told if name.endswith("running_var"))
    old = told[name].numpy()
    told[name] = Array(np.full(shape or old.shape, value, np.float32))


def test_where_nobody_can_tell_statistics_it_is_said():
    def empty(instruction, reply):
        if instruction.metadata.message_type == "query.statistics":
            reply.content.metric_records["metrics"]["batches"] = 0
        return reply

    run = InProcessFederation(empty, **SMALL | {"rounds": 1}, buffers="static")
    run.run()
    assert any("no client told the statistics" in text for text in run.warnings())


# Each choice learns, and none by accident


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"buffers": "average"}, "global_model/global_test/accuracy"),
        ({"buffers": "local"}, "own_model/global_test/accuracy"),
        ({"buffers": "static"}, "global_model/global_test/accuracy"),
        ({"strategy": "fedbn"}, "own_model/global_test/accuracy"),
    ],
    ids=["average", "local", "static", "fedbn"],
)
def test_a_network_with_batch_normalisation_learns(settings, where):
    run = run_of(rounds=4, local_epochs=2, num_shards=6, learning_rate=0.1, **settings)
    accuracies = last(run, where)
    assert accuracies and min(accuracies.values()) > 0.75
    if where.startswith("global"):
        # The same weights with the statistics that a network starts with: they do matter.
        spec, arrays = run.strategy.server_models(run.result.arrays)["global"]
        begun = {n: a.numpy() for n, a in run.strategy.initial_arrays().items()}
        broken = {
            name: Array(begun[name]) if name.rpartition(".")[2] in STATISTICS else array
            for name, array in arrays.items()
        }
        told = run.view.measure({"global": (spec, ArrayRecord(broken))})
        assert told["global_model/global_test/accuracy"] < min(accuracies.values()) - 0.05


@pytest.mark.parametrize("buffers", ["average", "local", "static"])
def test_without_batch_normalisation_the_choice_changes_nothing(buffers):
    plain = run_of(model="lenet:group")
    assert run_of(model="lenet:group", buffers=buffers).summary["digest"] == plain.summary["digest"]


def test_average_takes_the_mean_of_statistics_and_the_largest_counter():
    run = run_of(rounds=1)
    arrays = {name: array.numpy() for name, array in run.result.arrays.items()}
    weights = [member.examples for member in run.driver.roster.connected()]
    for name in statistics_of(edge_of(run.context(0)).own):
        told = [own_state(run, client)[name] for client in range(3)]
        wanted = (
            max(told)
            if name.endswith("tracked")
            else np.average(np.array(told, dtype=np.float64), axis=0, weights=weights)
        )
        np.testing.assert_allclose(arrays[name], wanted, rtol=1e-6)


# What stays


@pytest.mark.parametrize(
    ("settings", "stays"),
    [({"buffers": "local"}, statistics_of), ({"strategy": "fedbn"}, normalisation_of)],
    ids=["local", "fedbn"],
)
def test_what_stays_never_travels_and_is_each_clients_own(settings, stays):
    seen = set()

    def look(instruction, reply):
        for content in (instruction.content, reply.content):
            for record in content.array_records.values():
                seen.update(record)
        return reply

    run = InProcessFederation(look, **{**SMALL, **settings})
    summary = run.run()
    names = stays(edge_of(run.context(0)).own)
    assert names and seen and not seen & names
    assert seen | names == set(own_state(run, 0))
    for name in names:
        mine, theirs = own_state(run, 0)[name], own_state(run, 1)[name]
        assert name.endswith("tracked") or (mine != theirs).any()
    # The server has no network that is whole, and measures and saves none.
    assert summary["server_models"] == {} and not run.strategy.server_models(run.result.arrays)
    assert last(run, "own_model/own_test/accuracy").keys() == {0, 1, 2}
    assert summary["mean_global_accuracy"] is not None


@pytest.mark.parametrize("settings", [{"buffers": "local"}, {"strategy": "fedbn"}])
def test_a_client_that_is_started_anew_has_what_stayed(settings):
    plain = run_of(**settings)

    def restart(instruction, reply):
        if instruction.metadata.message_type == "evaluate":
            run.start_anew(instruction.metadata.dst_node_id)
        return reply

    run = InProcessFederation(restart, **{**SMALL, **settings})
    assert run.run()["digest"] == plain.summary["digest"]


def test_fedbn_measures_the_shared_weights_with_ones_own_layers():
    run = run_of(strategy="fedbn")
    edge = edge_of(run.context(2))
    mine = build_model("lenet:batch", edge.data.shape, edge.outputs, 0)
    arrays = {n: torch.from_numpy(a.numpy().copy()) for n, a in run.result.arrays.items()}
    own = {n: torch.from_numpy(a.copy()) for n, a in own_state(run, 2).items()}
    mine.load_state_dict(arrays | {n: own[n] for n in normalisation_of(mine)})
    with torch.inference_mode():
        logits = mine.eval()(edge.private.test.inputs(slice(None)))
    wanted = (logits.argmax(1) == edge.private.test.labels).double().mean()
    assert last(run, "own_model/own_test/accuracy")[2] == pytest.approx(float(wanted))


def test_a_network_without_normalisation_is_fedavg_under_fedbn():
    bn, avg = run_of(strategy="fedbn", model="lenet"), run_of(model="lenet")
    assert all(a.data == avg.result.arrays[n].data for n, a in bn.result.arrays.items())
    assert bn.summary["digest"] == avg.summary["digest"]


def test_fedbn_keeps_statistics_with_their_layers():
    with pytest.raises(UsageError, match="buffers must be one of local"):
        InProcessFederation(**{**SMALL, "strategy": "fedbn", "buffers": "average"})


def test_a_client_refuses_a_network_of_which_more_than_that_is_missing():
    model = build_model("lenet:batch", (1, 8, 8), 10, 1)
    came = {name: value for name, value in model.state_dict().items() if "num" not in name}
    assert shared.staying(model, came).keys() == {
        name for name in model.state_dict() if name.endswith("tracked")
    }
    came.popitem()
    with pytest.raises(ValueError, match="no normalisation layer"):
        shared.load(model, came)


def test_a_client_keeps_its_network_when_a_message_lacks_part_of_it():
    run = run_of()
    before = own_state(run, 0)
    app, context = run.grid.apps[2]
    lost = min(before.keys() - normalisation_of(edge_of(context).own))
    arrays = ArrayRecord({n: Array(a) for n, a in before.items() if n != lost})
    config = ConfigRecord({**run.strategy.config(3)})
    message = Message(RecordDict({"arrays": arrays, "config": config}), 2, "train", group_id="3")
    with pytest.raises(ValueError):
        app(message, context)
    assert all((own_state(run, 0)[n] == a).all() for n, a in before.items())
