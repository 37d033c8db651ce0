"""A broken sensor: its client's inputs are noisy, a sample's always in the same way; nothing else is."""

import numpy as np
import pytest
import torch
from inprocess import InProcessFederation

from clients.edge import edge_of
from fedkit.data.corruption import corrupted, read_noise
from fedkit.data.samples import Samples
from fedkit.data.splits import ClientData
from fedkit.engine.plan import make_plan
from fedkit.errors import UsageError

SMALL = {
    "strategy": "fedavg",
    "model": "logistic",
    "clients": 3,
    "rounds": 1,
    "public": "digits:30",
    "num_shards": 6,
    "partition": "iid",
    "val_fraction": 0.2,
    "corrupt": "none,noise:1.5",
}


def ran(**settings):
    run = InProcessFederation(**SMALL | settings)
    run.summary = run.run()
    return run


def parts(data):
    return data.train, data.val, data.test


def test_the_noise_has_its_sigma_on_what_the_network_reads_and_is_gaussian():
    run = ran(num_shards=3)
    clean, noisy = run.view.data.shard(1), edge_of(run.context(1)).private
    whole = slice(None)
    pairs = zip(parts(clean), parts(noisy), strict=True)
    noise = torch.cat([(b.inputs(whole) - a.inputs(whole)).flatten() for a, b in pairs]).double()
    count = len(noise)
    assert count > 20_000
    assert abs(float(noise.mean())) < 5 * 1.5 / count**0.5
    assert float(noise.std()) == pytest.approx(1.5, rel=5 / (2 * count) ** 0.5)
    within = [float((noise.abs() < k * 1.5).double().mean()) for k in (1, 2, 3)]
    assert within == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.015)


def test_labels_the_public_set_the_common_test_and_the_others_are_clean():
    run = ran()
    for client in range(3):
        clean, held = run.view.data.shard(client), edge_of(run.context(client))
        for a, b in zip(parts(clean), parts(held.private), strict=True):
            assert a.labels.equal(b.labels) and a.shape == b.shape
            assert a.data.equal(b.data) == (client != 1)
        assert held.public.data.equal(run.view.data.public.data)
        assert held.global_test.data.equal(run.view.data.dataset.test.all().data)


def test_a_sample_is_the_same_in_every_epoch_and_after_a_restart():
    run = ran()
    context = run.context(1)
    before = edge_of(context).private
    at = torch.tensor([3, 1])
    assert before.train.training_inputs(at).equal(before.train.training_inputs(at))
    del context._fedkit_edge
    after = edge_of(context).private
    assert all(a.data.equal(b.data) for a, b in zip(parts(before), parts(after), strict=True))
    other = edge_of(ran(seed=2).context(1)).private
    assert not before.train.data[:2].equal(other.train.data[:2])


def test_the_noise_of_two_clients_and_of_a_clients_parts_is_not_the_same():
    flat = Samples(
        torch.zeros(9, 4), torch.zeros(9, dtype=torch.int64), torch.zeros(4), torch.ones(4)
    )
    held = ClientData(flat, flat, flat)
    one, two = corrupted(held, "noise:1", 1, 0), corrupted(held, "noise:1", 1, 1)
    assert not one.train.data.equal(two.train.data)
    assert not one.train.data.equal(one.test.data)


def test_sigma_counts_in_each_features_own_deviation():
    std = torch.tensor([0.1, 10.0])
    flat = Samples(torch.zeros(4000, 2), torch.zeros(4000, dtype=torch.int64), torch.zeros(2), std)
    noisy = corrupted(ClientData(flat, flat, flat), "noise:2", 1, 0).train.data
    np.testing.assert_allclose(noisy.std(dim=0).numpy(), [0.2, 20.0], rtol=0.06)


def test_nothing_is_changed_where_nothing_is_broken():
    run = ran(corrupt="none")
    assert run.summary["digest"] == ran(corrupt="").summary["digest"]
    assert run.summary["digest"] == ran(corrupt="noise:0").summary["digest"]
    held = run.view.data.shard(0)
    assert corrupted(held, "none", 1, 0) is held


def test_the_run_tells_who_is_broken():
    run = ran()
    joined = {e.client: e.name for e in run.events if e.event == "join"}
    assert "corrupted by noise:1.5" in joined[1]
    assert not any("corrupted" in joined[client] for client in (0, 2))
    assert {m.client: m.corrupt for m in run.driver.roster.members.values()}[1] == "noise:1.5"


def test_a_broken_sensor_costs_accuracy():
    settings = {"rounds": 3, "learning_rate": 0.1, "num_shards": 3, "eval_every": 3}
    clean = ran(**settings, corrupt="").summary["mean_global_accuracy"]
    broken = ran(**settings, corrupt="noise:5").summary["mean_global_accuracy"]
    assert clean > 0.85 and broken < clean - 0.2


@pytest.mark.parametrize(
    "text", ["noise", "noise:", "noise:-1", "noise:inf", "noise:x", "blur:1", "1.0"]
)
def test_what_can_not_be_is_refused_before_anything_starts(text):
    for call in (
        lambda: read_noise(text),
        lambda: make_plan(SMALL | {"corrupt": f"none,{text}"}, local=True),
    ):
        with pytest.raises(UsageError, match="noise:SIGMA"):
            call()


def test_tokens_are_refused():
    tokens = Samples(
        torch.zeros(3, 5, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.int64),
        torch.empty(0),
        torch.empty(0),
    )
    with pytest.raises(UsageError, match="tokens"):
        corrupted(ClientData(tokens, tokens, tokens), "noise:1", 1, 0)


def test_time_budgets_that_nothing_asks_for_are_refused():
    for settings in (
        {"strategy": "fedavg"},
        {"strategy": "fedprox"},
        {"strategy": "heterofl", "model": "lenet", "widths": "1,0.5"},
    ):
        with pytest.raises(UsageError, match="Nothing in this run asks for --time-budgets"):
            make_plan({**settings, "time_budgets": "5,0"}, local=True)
    for settings in (
        {"strategy": "fedprox", "work": "budget"},
        {"strategy": "heterofl", "model": "lenet", "widths": "1, auto"},
        {"strategy": "depthfl", "model": "lenet", "depths": "auto"},
    ):
        assert make_plan({**settings, "time_budgets": "5,0"}, local=True).local.time_budgets


def test_time_budgets_are_numbers_of_seconds():
    for text in ("x", "3,-1", "nan", "inf"):
        with pytest.raises(UsageError, match="number of seconds"):
            make_plan(SMALL | {"time_budgets": text}, local=True)
