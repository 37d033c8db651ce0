"""Clients whose networks train as one: each gets what it would have got alone; who can't, is told why."""

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from inprocess import InProcessFederation, InProcessGrid
from torch import nn

from fedkit.data.samples import Samples
from fedkit.flower import decode_message, encode_message, set_message_id
from fedkit.models.batched import Failed, examine, structure, train_batched
from fedkit.models.build import build_model
from fedkit.models.exit_loss import joint_loss
from fedkit.models.losses import cross_entropy
from fedkit.models.training import (
    Pull,
    Steps,
    make_optimiser,
    one_by_one,
    one_epoch,
    take_steps,
)
from fedkit.seeds import torch_generator
from fedkit.simulation import rendezvous
from fedkit.simulation.rendezvous import Rendezvous

SHAPE, CLASSES = (1, 8, 8), 5
# Of 30 samples in batches of 8 the last has 6; one client ends before the others.
COUNTS = (30, 30, 17, 9)


class Double(nn.Module):
    """A network in float64 for inputs in float32."""

    def __init__(self, network):
        super().__init__()
        self.network = network.double()

    def forward(self, inputs):
        return self.network(inputs.double())


def samples_of(count, client):
    draw = torch_generator(5, "samples", client)
    data = torch.randint(256, (count, *SHAPE), generator=draw, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    return Samples(data, labels, torch.full((1,), 127.0), torch.full((1,), 74.0))


def asked(client, network, optimiser="sgd", **change):
    """What a client asks for: an epoch in its own order, from its own weights."""
    samples = samples_of(COUNTS[client], client)
    options = {"momentum": 0.9, "decay": 0.01} if optimiser == "sgd" else {"decay": 0.01}
    steps = Steps(
        network,
        samples,
        (samples.labels,),
        cross_entropy,
        make_optimiser(optimiser, network, 0.05, **options),
        one_epoch(len(samples), 8, torch_generator(6, "order", client)),
    )
    return replace(steps, **change)


def double(spec, client):
    return Double(build_model(spec, SHAPE, CLASSES, seed=client))


def clients_of(spec, optimiser="sgd", **change):
    return [asked(at, double(spec, at), optimiser, **change) for at in range(len(COUNTS))]


def assert_same(together, alone):
    for one, other in zip(together, alone, strict=True):
        theirs = other.model.state_dict()
        for name, tensor in one.model.state_dict().items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-10, atol=1e-12, msg=name)
        kept, wanted = (call.optimiser.state_dict()["state"] for call in (one, other))
        assert kept.keys() == wanted.keys()
        for at, state in wanted.items():
            for name, value in state.items():
                torch.testing.assert_close(kept[at][name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("spec", "optimiser"),
    [
        ("logistic", "sgd"),
        ("mlp:12", "adam"),
        ("mlp:12", "lars"),
        ("lenet", "adamw"),
        ("lenet:batch", "sgd"),
        ("lenet:group", "lamb"),
        ("cnn", "sgd"),
    ],
)
def test_in_float64_it_is_what_each_gets_alone(spec, optimiser):
    """Weights, running statistics, what optimisers remember, and the losses; for a second epoch, too."""
    together, alone = clients_of(spec, optimiser), clients_of(spec, optimiser)
    assert len({structure(call) for call in together}) == 1
    verdict = examine(together[0])
    assert verdict.why_not == "" and verdict.mixes == (spec == "lenet:batch")
    for epoch in range(2):
        losses = train_batched(together, mixes=verdict.mixes)
        assert losses == pytest.approx([one_by_one(call) for call in alone], rel=1e-6)
        assert_same(together, alone)
        orders = [
            list(one_epoch(count, 8, torch_generator(7, "order", at, epoch)))
            for at, count in enumerate(COUNTS)
        ]
        together, alone = (
            [replace(call, batches=order) for call, order in zip(calls, orders, strict=True)]
            for calls in (together, alone)
        )


def test_each_has_its_own_rate_schedule_bound_pull_and_targets():
    def calls():
        made = []
        for at, call in enumerate(clients_of("mlp:12")):
            draw = torch_generator(8, "targets", at)
            soft = torch.rand(len(call.samples), CLASSES, generator=draw).softmax(1)
            optimiser = make_optimiser("sgd", call.model, 0.01 * (at + 1), momentum=0.5)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.8) if at % 2 else None
            pull = Pull(0.3 * at, [torch.ones_like(one) for one in call.model.parameters()])
            change = {"targets": (soft,), "optimiser": optimiser, "schedule": schedule}
            made.append(replace(call, **change, clip=0.1 * at, pull=pull))
        return made

    together, alone = calls(), calls()
    losses = train_batched(together, mixes=False)
    assert losses == pytest.approx([one_by_one(call) for call in alone], rel=1e-6)
    assert_same(together, alone)
    rates = [
        [call.optimiser.param_groups[0]["lr"] for call in calls] for calls in (together, alone)
    ]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("spec", ["exits:cnn", "exits:heterofl-cnn:0.1"])
def test_every_exit_learns_from_every_sample_of_a_batch_that_is_smaller_than_there_are_exits(spec):
    """Batches of 8, and a last one of 2 or 3, of networks with 3 and 4 exits; padded where none sees it."""

    def calls():
        made = []
        for at, count in enumerate((10, 10, 11)):
            call, samples = asked(at, double(spec, at)), samples_of(count, at)
            order = list(one_epoch(count, 8, torch_generator(6, "order", at)))
            change = {"samples": samples, "targets": (samples.labels,), "batches": order}
            made.append(replace(call, loss=joint_loss(), **change))
        return made

    together, alone = calls(), calls()
    mixes = examine(together[0]).mixes
    assert mixes == ("heterofl" in spec)
    losses = train_batched(together, mixes=mixes)
    assert losses == pytest.approx([one_by_one(call) for call in alone], rel=1e-6)
    assert_same(together, alone)


def test_frozen_parameters_stay():
    together, alone = clients_of("mlp:12"), clients_of("mlp:12")
    for call in (*together, *alone):
        call.model.network[1].weight.requires_grad_(False)
    before = [call.model.network[1].weight.clone() for call in together]
    train_batched(together, mixes=False)
    for call in alone:
        one_by_one(call)
    assert_same(together, alone)
    assert all(c.model.network[1].weight.equal(w) for c, w in zip(together, before, strict=True))


def test_afterwards_no_client_s_tensors_are_parts_of_another_s():
    calls = clients_of("lenet:batch")
    train_batched(calls, mixes=True)
    tensors = [t for call in calls for t in (*call.model.parameters(), *call.model.buffers())]
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert len({t.data_ptr() for t in tensors}) == len(tensors)


# Who can't


class Branching(nn.Linear):
    """Another way for each half of the numbers."""

    def forward(self, inputs):
        out = super().forward(inputs.flatten(1))
        return out if out.sum() > 0 else -out


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, CLASSES)), "dropout"),
        (Branching(64, CLASSES), "data-dependent control flow"),
    ],
    ids=["dropout", "branching"],
)
def test_why_a_network_can_t_be_batched_is_told_and_nothing_is_changed(network, why):
    call = asked(0, network)
    before = [tensor.clone() for tensor in network.state_dict().values()]
    random = torch.get_rng_state()
    assert why in examine(call).why_not
    assert torch.get_rng_state().equal(random)
    after = network.state_dict().values()
    assert all(one.equal(was) for one, was in zip(after, before, strict=True))


def test_augmented_samples_can_t_though_the_same_network_on_others_can():
    call = asked(0, double("logistic", 0))
    augmented = replace(call, samples=replace(call.samples, augment=lambda inputs: inputs))
    assert "augmented" in examine(augmented).why_not
    assert structure(augmented) != structure(call)


class Complaining(nn.Linear):
    """Warns as libraries do, or raises what no layer of torch's does."""

    def forward(self, inputs):
        warnings.warn("soon to go", FutureWarning, stacklevel=2)
        if self.bias is None:
            raise ValueError
        return super().forward(inputs.flatten(1))


@pytest.mark.parametrize(("bias", "why"), [(True, ""), (False, "ValueError")])
@pytest.mark.filterwarnings("ignore:soon to go")
def test_whatever_a_network_s_own_code_does_there_is_a_verdict(bias, why):
    assert examine(asked(0, Complaining(64, CLASSES, bias=bias))).why_not == why


def test_unlike_networks_are_not_trained_as_one():
    kinds = [
        structure(asked(0, network))
        for network in (
            double("mlp:12", 0),
            double("mlp:13", 0),
            nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, CLASSES)),
            nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, CLASSES)),
            nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES), nn.Hardtanh(0, 1)),
            nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES), nn.Hardtanh(0, 2)),
        )
    ]
    assert len(set(kinds)) == len(kinds)


# Where they meet


def met(works):
    meeting = Rendezvous(works, lambda number: None)
    return dict(meeting.results()), meeting.apart


def test_clients_that_train_meet_and_others_pass():
    def trains(at):
        call = asked(at, double("mlp:12", at))
        found = [take_steps(call.model, call.samples, call.samples.labels, call.loss,
                            call.optimiser, call.batches)]  # fmt: skip
        return found, call

    results, apart = met([partial(trains, 0), lambda: "nothing", partial(trains, 2)])
    assert results[1] == "nothing" and apart == {}
    alone = [asked(at, double("mlp:12", at)) for at in (0, 2)]
    for at, call in zip((0, 2), alone, strict=True):
        assert results[at][0] == pytest.approx([one_by_one(call)], rel=1e-6)
    assert_same([results[0][1], results[2][1]], alone)


def test_random_numbers_are_those_that_each_would_have_drawn_alone():
    def draws(at):
        torch.manual_seed(at)
        call = asked(at, double("logistic", at))
        first = torch.rand(2)
        take_steps(
            call.model, call.samples, call.samples.labels, call.loss, call.optimiser, call.batches
        )
        return torch.cat([first, torch.rand(2)])

    results, _ = met([partial(draws, at) for at in range(3)])
    for at in range(3):
        torch.manual_seed(at)
        assert results[at].equal(torch.cat([torch.rand(2), torch.rand(2)]))


def test_hooks_keep_a_client_apart():
    def hooked(at):
        call = asked(at, double("logistic", at))
        call.model.register_forward_hook(lambda *what: None)
        return take_steps(
            call.model, call.samples, call.samples.labels, call.loss, call.optimiser, call.batches
        )

    results, apart = met([partial(hooked, at) for at in range(2)])
    assert apart.keys() == {0, 1} and "hooked" in apart[0]
    alone = [one_by_one(asked(at, double("logistic", at))) for at in range(2)]
    assert [results[at] for at in range(2)] == alone


def test_whose_loss_fails_is_told_first_and_with_the_trace_of_its_app():
    def bad(logits, labels):
        raise ValueError("no such class")

    def trains(at):
        call = asked(at, double("logistic", at))
        loss = bad if at == 2 else cross_entropy
        try:
            return take_steps(
                call.model, call.samples, call.samples.labels, loss, call.optimiser, call.batches
            )
        except ValueError as error:
            trace = error.__traceback__
            frames = []
            while trace is not None:
                frames.append(trace.tb_frame.f_code.co_name)
                trace = trace.tb_next
            return at, frames

    order = [result for _, result in Rendezvous(
        [partial(trains, at) for at in range(4)], lambda number: None).results()]  # fmt: skip
    at, frames = order[0]
    assert at == 2 and frames[0] == "trains" and frames[-1] == "bad"
    with pytest.raises(Failed) as failed:
        calls = clients_of("logistic")
        calls[3] = replace(calls[3], loss=bad)
        train_batched(calls, mixes=False)
    assert failed.value.number == 3 and isinstance(failed.value.__cause__, ValueError)


# Whole federations


class TogetherGrid(InProcessGrid):
    """All clients that are asked at a time work side by side."""

    def push_messages(self, messages):
        sent = []
        for message in messages:
            self._count += 1
            set_message_id(message, str(self._count))
            sent.append(decode_message(encode_message(message)))
        works = [partial(self.answer, one) for one in sent]
        replies, self.apart = met(works)
        keys = [one.metadata.message_id for one in sent]
        self._replies |= {key: replies[at] for at, key in enumerate(keys)}
        return keys


TINY = {"clients": 3, "rounds": 2, "models": "mlp:8", "model": "mlp:8", "local_epochs": 2}
PUBLIC = TINY | {"public": "digits:40"}
CASES = {
    "local": TINY,
    "fedavg": TINY | {"model": "lenet", "models": "lenet", "momentum": 0.9},
    "fedprox": TINY | {"mu": 0.1, "clip_norm": 1.0},
    "ditto": TINY,
    "fedbn": TINY | {"model": "lenet:batch", "models": "lenet:batch"},
    "fedseq": TINY | {"clients": 4, "group_samples": 300, "probe_epochs": 1, "public": "digits:40"},
    "fd": TINY,
    "fedproto": TINY,
    "fedmd": {k: v for k, v in PUBLIC.items() if k != "local_epochs"}
    | {"init_epochs": 1, "digest_epochs": 1, "pretrain_epochs": 1},
    "ktpfl": PUBLIC | {"distill_epochs": 1},
    "feddf": PUBLIC,
    "feddistill": PUBLIC,
    "heterofl": TINY | {"widths": "1,0.5,1", "levels": "1,0.5"},
    "depthfl": TINY | {"model": "cnn", "models": "cnn", "depths": "1,2,2"},
}


@pytest.fixture
def stacks(monkeypatch):
    """How many clients were trained as one, each time."""
    counts = []

    def counted(calls, *, mixes):
        counts.append(len(calls))
        return train_batched(calls, mixes=mixes)

    monkeypatch.setattr(rendezvous, "train_batched", counted)
    return counts


def measured(federation):
    federation.run()
    return {
        (event.round, event.client, event.exchange, event.name): event.value
        for event in federation.events
        if event.event == "metric"
    }


QUICK = ("fedprox", "fedbn", "fedmd", "ktpfl", "heterofl")


@pytest.mark.parametrize(
    "strategy",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_a_federation_of_batched_clients_measures_what_it_would(strategy, stacks):
    """Losses within a ten-thousandth; of accuracies, a sample in fifty may fall on the other side."""
    usual = measured(InProcessFederation(strategy=strategy, **CASES[strategy]))
    found = measured(InProcessFederation(grid=TogetherGrid, strategy=strategy, **CASES[strategy]))
    assert max(stacks) >= 2
    assert found.keys() == usual.keys() and len(found) > 10
    for key, value in usual.items():
        close = 0.02 if "accuracy" in key[-1] else 1e-4
        assert found[key] == pytest.approx(value, rel=close, abs=close, nan_ok=True), key


def test_equal_seeds_give_equal_digests_of_batched_runs():
    digests = [
        InProcessFederation(grid=TogetherGrid, strategy="ktpfl", **PUBLIC).run()["digest"]
        for _ in range(2)
    ]
    assert digests[0] == digests[1]
