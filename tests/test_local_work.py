"""How much a client trains, how its learning rate rises and falls, and how its batch grows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inprocess import InProcessFederation

import clients.private
from fedkit.engine.plan import make_plan
from fedkit.errors import UsageError
from fedkit.flower import decode_records, encode_records
from fedkit.models.schedules import batch_size, decay, largest_batch, warmed
from fedkit.models.training import batches_of

SMALL = {
    "strategy": "fedavg",
    "model": "logistic",
    "clients": 1,
    "min_clients": 1,
    "public": "digits:30",
    "partition": "iid",
    "num_shards": 40,
    "alone": False,
    "eval_every": 100,
    "batch_size": 8,
    "local_epochs": 2,
    "learning_rate": 0.1,
}
KTPFL = SMALL | {"strategy": "ktpfl", "models": "logistic", "distill_epochs": 1}


@pytest.fixture
def steps(monkeypatch):
    """Of every step of private training its learning rate and the size of its batch, in order."""
    made, take_steps = [], clients.private.take_steps

    def spy(model, samples, targets, loss, optimiser, batches, **more):
        def noting():
            for batch in batches:
                sizes.append(len(batch))
                yield batch

        sizes, rates = [], []
        hook = optimiser.register_step_pre_hook(
            lambda one, args, kwargs: rates.append(one.param_groups[0]["lr"])
        )
        told = take_steps(model, samples, targets, loss, optimiser, noting(), **more)
        hook.remove()
        made.extend(zip(rates, sizes, strict=True))
        return told

    monkeypatch.setattr(clients.private, "take_steps", spy)
    return made


def ran(**settings):
    run = InProcessFederation(**SMALL | settings)
    run.summary = run.run()
    assert not run.warnings()
    return run


def samples_of(run, client=0):
    return len(run.view.data.shard(client).train)


# The functions


def test_decays_are_what_their_names_say():
    at = [0, 1, 2.5, 7]
    assert [decay("cosine", t, 10, 0.5, 2) for t in at] == pytest.approx(
        [0.5 + 0.5 * math.cos(math.pi * t / 10) for t in at]
    )
    assert [decay("step", t, 0, 0.5, 2) for t in at] == [1, 1, 0.5, 0.125]
    assert [decay("inverse", t, 0, 0.5, 2) for t in at] == pytest.approx(
        [1 / (1 + 0.5 * t) for t in at]
    )
    assert {decay(kind, 9, 10, 0.5, 2) for kind in ("constant", "plateau")} == {1}


def test_warming_up_is_a_line_that_ends_at_one():
    assert [warmed(t, 4) for t in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warmed(0, 0) == warmed(5, 0) == 1


@given(st.integers(1, 1000), st.integers(1, 200), st.integers(1, 400))
def test_doubling_doubles_every_so_many_rounds(first, every, round):
    wanted = first
    for at in range(2, round + 1):
        wanted *= 2 if (at - 1) % every == 0 else 1
    assert batch_size(f"double:{every}", first, round) == min(wanted, 2**31 - 1)


@given(st.dictionaries(st.integers(1, 50), st.integers(1, 900), min_size=1), st.integers(1, 60))
def test_sizes_hold_from_their_round_on_and_the_largest_is_the_largest(sizes, round):
    text = ",".join(f"{start}:{size}" for start, size in sorted(sizes.items()))
    wanted = 7
    seen = [wanted]
    for at in range(1, round + 1):
        wanted = sizes.get(at, wanted)
        seen.append(wanted)
    assert batch_size(text, 7, round) == wanted
    assert largest_batch(text, 7, round) == max(seen)


@pytest.mark.parametrize(
    "text",
    ["double", "double:0", "double:x", "1:2:3", "0:4", "3:0", "5:8,2:16", "2:8,2:9", "16", ":"],
)
def test_a_batch_schedule_that_can_not_be_read_is_refused_before_anything_starts(text):
    with pytest.raises(UsageError, match="batch-schedule"):
        make_plan(SMALL | {"batch_schedule": text}, local=True)


# Steps and batches


@pytest.mark.parametrize("wanted", [1, 3, 11])
def test_local_steps_are_taken_in_place_of_epochs(wanted, steps):
    run = ran(local_steps=wanted, rounds=2)
    assert len(steps) == 2 * wanted
    each = batches_of(samples_of(run), 8)
    assert 3 < each < 11  # less than an epoch, and more than one
    whole = [size for _, size in steps[: min(wanted, each)]]
    assert sum(whole) <= samples_of(run) and set(whole) <= {8, samples_of(run) % 8}


def test_so_many_steps_as_epochs_have_are_these_epochs():
    run = ran(rounds=2)
    in_steps = ran(rounds=2, local_steps=2 * batches_of(samples_of(run), 8))
    own = [in_steps.result.arrays[name].data for name in in_steps.result.arrays]
    assert own == [run.result.arrays[name].data for name in run.result.arrays]


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "ktpfl", "batch_size": 8, "distill_epochs": 0},
        {"strategy": "feddf", "batch_size": 8, "digest_epochs": 0, "steps": 0, "revisit_epochs": 0},
        {"strategy": "feddistill", "batch_size": 8, "digest_epochs": 0, "steps": 0},
        {"strategy": "feddistill", "batch_size": 8, "exchange": "weights", "teacher_first": 0,
         "teacher_epochs": 0},
        {"strategy": "fd", "batch_size": 8},
        {"strategy": "fedproto", "batch_size": 8},
        {"strategy": "fedmd", "revisit_batch": 8, "init_epochs": 0, "digest_epochs": 0},
        {"strategy": "fedprox", "batch_size": 8},
    ],
    ids=["ktpfl", "feddf", "feddistill", "feddistill-weights", "fd", "fedproto", "fedmd", "fedprox"],
)  # fmt: skip
def test_every_strategy_with_private_training_counts_in_steps_and_grows_its_batch(settings, steps):
    common = {k: v for k, v in SMALL.items() if k not in ("local_epochs", "batch_size", "strategy")}
    run = InProcessFederation(
        **common, **settings, models="logistic", local_steps=5, batch_schedule="2:4", rounds=2
    )
    run.run()
    sizes = [size for _, size in steps]
    assert len(sizes) == 10
    assert max(sizes[:5]) == 8 and max(sizes[5:]) == 4


def test_the_batch_grows_as_the_schedule_says_and_the_server_tells_the_largest(steps):
    run = ran(rounds=3, batch_schedule="double:1", batch_size=4, local_epochs=1)
    n, sizes = samples_of(run), [size for _, size in steps]
    wanted = []
    for size in (4, 8, 16):
        rest = n % size
        wanted += [size] * (n // size) + [rest] * (rest > 1)
    assert sizes == wanted
    offer = run.view.offer(False)
    assert offer.config_records["offer"]["batch-size"] == 16
    other = InProcessFederation(**SMALL | {"batch_schedule": "2:128", "rounds": 3})
    assert other.view.offer(False).config_records["offer"]["batch-size"] == 128


def test_a_batch_is_never_larger_than_what_a_device_has_to_fill_it_with():
    """A million samples would need more than 20 MB; this device has a few dozen."""
    run = InProcessFederation(**SMALL | {"batch_schedule": "2:1000000", "rounds": 2})
    run.context(0).node_config["memory-budget"] = 20_000_000
    run.run()
    assert not run.warnings()


# Rates by round and by step


def test_by_round_the_rate_warms_up_and_falls_from_round_to_round(steps):
    ran(rounds=5, warmup=3, schedule="inverse", schedule_factor=0.5, local_steps=2)
    wanted = [0.1 * min(1, (t + 1) / 3) / (1 + 0.5 * t) for t in range(5)]
    assert [rate for rate, _ in steps] == pytest.approx([rate for rate in wanted for _ in range(2)])


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"schedule": "step", "schedule_factor": 0.5, "schedule_patience": 4}, lambda s: 0.5 ** (s // 4)),
        ({"schedule": "inverse", "schedule_factor": 0.1}, lambda s: 1 / (1 + 0.1 * s)),
        ({"schedule": "constant", "warmup": 9}, lambda s: min(1, (s + 1) / 9)),
        ({"schedule": "cosine"}, lambda s: (1 + math.cos(math.pi * s / 15)) / 2),
        ({"schedule": "cosine", "warmup": 4},
         lambda s: min(1, (s + 1) / 4) * (1 + math.cos(math.pi * s / 15)) / 2),
    ],
    ids=["step", "inverse", "warmup", "cosine", "cosine-warmup"],
)  # fmt: skip
def test_by_step_the_rate_goes_on_through_rounds(settings, factor, steps):
    """Three rounds of five steps are fifteen steps, wherever an epoch ends."""
    ran(rounds=3, local_steps=5, schedule_by="step", **settings)
    assert [rate for rate, _ in steps] == pytest.approx([0.1 * factor(s) for s in range(15)])


def test_a_client_that_was_away_goes_on_where_its_own_steps_are(steps):
    settings = {"schedule": "inverse", "schedule_factor": 0.1, "schedule_by": "step"}
    run = InProcessFederation(**SMALL | settings | {"clients": 2, "rounds": 3, "local_steps": 4})
    choose = {1: (0, 1), 2: (1,), 3: (0,)}
    run.driver.chooser.selector.choose = lambda view: [
        member for member in view.members if member.client in choose[view.round]
    ]
    run.run()
    wanted = [*range(4), *range(4), *range(4, 8), *range(4, 8)]
    assert [rate for rate, _ in steps] == pytest.approx([0.1 / (1 + 0.1 * s) for s in wanted])


@pytest.mark.parametrize("kind", ["cosine", "inverse"])
def test_a_client_rebuilt_from_its_state_takes_the_same_steps(kind):
    settings = {"schedule": kind, "schedule_by": "step", "warmup": 7, "rounds": 3, "clients": 2}

    def forget(instruction, reply):
        context = run.grid.apps[instruction.metadata.dst_node_id][1]
        saved = b"".join(encode_records(context.state))
        context.state = decode_records(saved)
        del context._fedkit_edge
        return reply

    usual = ran(**settings)
    run = InProcessFederation(forget, **SMALL | settings)
    assert run.run()["digest"] == usual.summary["digest"]


def test_the_reference_and_the_own_model_count_their_own_steps():
    run = InProcessFederation(
        **KTPFL | {"alone": True, "rounds": 2, "schedule_by": "step", "local_steps": 3}
    )
    run.run()
    state = run.context(0).state
    assert state["own-steps"]["steps"] == state["alone-steps"]["steps"] == 6


def test_a_rate_meant_for_one_batch_size_grows_with_the_batch(steps):
    ran(rounds=2, local_steps=2, scale_rate_to=4, batch_schedule="2:16")
    assert [rate for rate, _ in steps] == pytest.approx([0.1 * 8 / 4] * 2 + [0.1 * 16 / 4] * 2)
    del steps[:]
    ran(rounds=2, local_steps=2, scale_rate_to=4, schedule_by="step", warmup=4)
    assert [rate for rate, _ in steps] == pytest.approx([0.2 * (s + 1) / 4 for s in range(4)])


def test_the_gradient_is_clipped_in_private_training():
    run = ran(rounds=1, local_steps=1, clip_norm=1e-3, learning_rate=1.0)
    before = run.strategy.initial_arrays().to_torch_state_dict()
    after = run.result.arrays.to_torch_state_dict()
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before]).norm()
    assert float(moved) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lars", "lamb"])
def test_every_optimiser_learns(name):
    rate = {"sgd": 0.1, "lars": 0.3}.get(name, 0.03)
    run = ran(
        optimiser=name, learning_rate=rate, trust_coefficient=0.1, momentum=0.5, rounds=3,
        clients=2, num_shards=8,
    )  # fmt: skip
    assert run.summary["mean_global_accuracy"] > 0.6
