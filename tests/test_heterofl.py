"""HeteroFL's invariants (algorithms.md 7, a to g) and what a round of it carries."""

import json
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord
from inprocess import InProcessFederation
from processes import LONG, Process, free_port, until
from torch.nn import functional

from clients.edge import edge_of
from fedkit.engine.dryrun import dry_run
from fedkit.engine.plan import make_plan
from fedkit.engine.strategy_state import load_state, save_state
from fedkit.errors import UsageError
from fedkit.knowledge.held import open_mesh, pack_classes, unpack_classes
from fedkit.models.build import build_model
from fedkit.models.files import load_model, network
from fedkit.models.levels import levels_of, read_levels
from fedkit.models.losses import cross_entropy, masked_cross_entropy
from fedkit.models.narrow import at_width
from strategies.heterofl import HeteroFLState, holding

SMALL = {
    "strategy": "heterofl",
    "model": "lenet:batch",
    "levels": "1,0.5,0.25",
    "clients": 3,
    "rounds": 2,
    "local_epochs": 1,
    "batch_size": 16,
    "learning_rate": 0.05,
    "public": "digits:30",
    "partition": "iid",
    "num_shards": 12,
    "alone": False,
    "eval_samples": 20,
}
WIDE = (1.0, 1.0, 1.0)
MIXED = (1.0, 0.5, 0.25)
SHAPE = (1, 8, 8)


def run_of(widths=MIXED, tamper=None, **settings):
    """A run in which the clients have these widths; None: they don't say."""
    run = InProcessFederation(tamper, **{**SMALL, **settings})
    for client, width in enumerate(widths):
        if width is not None:
            run.context(client).node_config["width"] = str(width)
    run.summary = run.run()
    return run


def arrays_of(run):
    return {name: array.numpy() for name, array in run.result.arrays.items()}


def uploads(run_settings, round=1, widths=MIXED):
    """What each client sent up, and the global network before and after that round."""
    sent = {}

    def look(instruction, reply):
        meta = instruction.metadata
        if (meta.message_type, meta.group_id) == ("train", str(round)):
            record = reply.content.array_records["arrays"]
            sent[meta.dst_node_id - 2] = {name: a.numpy() for name, a in record.items()}
        return reply

    run = run_of(widths, look, **{**run_settings, "rounds": round})
    return run, sent


# (a) all wide is FedAvg


ALIKE = {
    "model": "lenet",
    "weighting": "equal",
    "momentum": 0.9,
    "weight_decay": 0.0005,
    "clip_norm": 1.0,
    "eval_samples": 0,
}


@pytest.mark.parametrize(
    "more",
    [{}, {"update_codec": "float16"}, {"update_codec": "topk:0.2"}, {"outer": "momentum:0.5"}],
    ids=str,
)
def test_where_all_are_wide_it_is_fedavg_to_the_bit(more):
    settings = {**SMALL, **ALIKE, **more}
    settings.pop("levels")
    avg = InProcessFederation(**{**settings, "strategy": "fedavg"})
    summary = avg.run()
    run = run_of(WIDE, **ALIKE, **more)
    assert run.summary["digest"] == summary["digest"]
    assert all(a.data == avg.result.arrays[n].data for n, a in run.result.arrays.items())
    assert not run.warnings()


@pytest.mark.parametrize("buffers", ["average", "static"])
def test_with_normalisation_too_where_statistics_are_treated_alike(buffers):
    settings = {**SMALL, **ALIKE, "model": "lenet:batch", "buffers": buffers}
    settings.pop("levels")
    avg = InProcessFederation(**{**settings, "strategy": "fedavg"})
    avg.run()
    run = run_of(WIDE, **{**ALIKE, "model": "lenet:batch"}, buffers=buffers)
    spec, model = run.strategy.server_models(run.result.arrays)["global"]
    _, wanted = avg.strategy.server_models(avg.result.arrays)["global"]
    assert spec == "lenet:batch" and list(model) == list(wanted)
    assert all(array.data == wanted[name].data for name, array in model.items())


def test_an_element_that_nobody_holds_in_a_round_moves_by_its_momentum_alone():
    """u <- beta u, and theta <- theta - u, for what the client that is away held alone."""
    after = {}

    def away(instruction, reply):
        meta = instruction.metadata
        lost = (meta.message_type, meta.group_id, meta.dst_node_id) == ("train", "2", 2)
        return None if lost else reply

    def keep(round, arrays):
        after[round] = {name: array.numpy() for name, array in arrays.items()}

    settings = {**SMALL, "widths": "1,0.5,0.5", "levels": "1,0.5", "rounds": 2, "min_clients": 2}
    run = InProcessFederation(away, **settings, masked=False, outer="momentum:0.5")
    run.round_over = keep
    run.run()
    indices = run.strategy.sliced.indices(0.5)
    for name, values in after[2].items():
        alone = np.ones(values.shape, dtype=bool)
        alone[open_mesh(indices[name], values.shape)] = False
        if name in run.strategy.parameters and alone.any():
            first = after[1][name].astype(np.float64) - after[0][name]
            wanted = after[1][name] + 0.5 * first
            np.testing.assert_allclose(values[alone], wanted[alone], rtol=1e-5, atol=1e-7)
            assert np.abs(first[alone]).max() > 0


def test_all_narrow_is_fedavg_on_the_narrow_network():
    narrow = (0.25, 0.25, 0.25)
    run = run_of(narrow, **ALIKE, levels="0.25")
    settings = {**SMALL, **ALIKE, "strategy": "fedavg", "model": "width:0.25:lenet"}
    settings.pop("levels")
    avg = InProcessFederation(**settings)
    avg.run()
    assert all(a.data == avg.result.arrays[n].data for n, a in run.result.arrays.items())


# (c), (e) who holds an element decides it, and nobody else


@pytest.mark.parametrize("weighting", ["equal", "examples"])
def test_each_element_is_the_mean_of_exactly_its_holders(weighting):
    settings = {"weighting": weighting, "masked": False, "levels": "1,0.5,0.25"}
    run, sent = uploads(settings, widths=(0.5, 0.5, 0.25))
    before = {name: array.numpy() for name, array in run.strategy.initial_arrays().items()}
    levels = levels_of("lenet:batch", SHAPE, 10, 1.0)
    examples = [member.examples for member in run.driver.roster.connected()]
    weights = examples if weighting == "examples" else [1, 1, 1]
    untouched = 0
    for name, array in arrays_of(run).items():
        total, held = np.zeros(array.shape), np.zeros(array.shape)
        for client, width in enumerate((0.5, 0.5, 0.25)):
            if name not in sent[client]:
                continue  # static statistics
            at = np.ix_(*(
                np.arange(n)[rows] if isinstance(rows, slice) else rows
                for rows, n in zip(levels.indices(width)[name], array.shape, strict=True)
            ))  # fmt: skip
            total[at] += weights[client] * sent[client][name].astype(np.float64)
            held[at] += weights[client]
        with np.errstate(invalid="ignore"):
            wanted = np.where(held > 0, (total / held).astype(np.float32), before[name])
        np.testing.assert_array_equal(array, wanted)
        untouched += int((held == 0).sum())
    assert untouched > 1000, "nobody is at width 1"


def test_a_narrow_clients_upload_reaches_nothing_outside_its_slice():
    def change(instruction, reply):
        if (instruction.metadata.message_type, instruction.metadata.dst_node_id) == ("train", 4):
            record = reply.content.array_records["arrays"]
            for name, array in record.items():
                record[name] = Array(array.numpy() + np.float32(3))
        return reply

    plain, changed = run_of(rounds=1), run_of(rounds=1, tamper=change)
    levels = levels_of("lenet:batch", SHAPE, 10, 1.0)
    moved = 0
    for name, array in arrays_of(plain).items():
        other = arrays_of(changed)[name]
        inside = np.zeros(array.shape, bool)
        if array.ndim:
            rows = [
                np.arange(n)[i] if isinstance(i, slice) else i
                for i, n in zip(levels.indices(0.25)[name], array.shape, strict=True)
            ]
            inside[np.ix_(*rows)] = True
        assert (array[~inside] == other[~inside]).all()
        moved += int((array != other).sum())
    assert moved > 100


def test_untouched_networks_combine_to_what_they_were():
    run = run_of(local_epochs=0)
    before = {name: array.numpy() for name, array in run.strategy.initial_arrays().items()}
    statistics = run.strategy.travelling.down_only
    for name, array in arrays_of(run).items():
        assert name in statistics or (array == before[name]).all()


# (d), (f) what travels


def test_only_the_slice_travels_both_ways():
    run = run_of()
    for client, width in enumerate(MIXED):
        parameters = lenet_parameters(width)
        sizes = {
            e.name: e.value
            for e in run.events
            if e.event == "bytes" and (e.round, e.exchange, e.client) == (2, "train", client)
        }
        channels = math.ceil(6 * width) + math.ceil(16 * width)
        assert sizes["bytes_up"] == 4 * parameters
        # Its level's statistics come with it, and both counters.
        assert sizes["bytes_down"] == 4 * parameters + 2 * 4 * channels + 2 * 8
        assert edge_of(run.context(client)).architecture("own") == (
            "lenet:batch" if width == 1 else f"width:{width:g}:lenet:batch"
        )


def lenet_parameters(width):
    """Weights, biases, scales and shifts of LeNet with batch normalisation, of images of 8 x 8."""
    one, two, three, four = (math.ceil(width * n) for n in (6, 16, 120, 84))
    whole = build_model("lenet:batch", SHAPE, 10, 0).state_dict()
    pixels = next(t.shape[1] for t in whole.values() if t.dim() == 2) // 16
    first, second = (25 + 1) * one + 2 * one, (25 * one + 1) * two + 2 * two
    return first + second + (pixels * two + 1) * three + (three + 1) * four + (four + 1) * 10


def test_narrower_levels_are_parts_of_wider_ones():
    levels = levels_of("lenet:batch", SHAPE, 10, 1.0)
    whole = {
        name: np.arange(tensor.numel()).reshape(tuple(tensor.shape))
        for name, tensor in levels.slicing.network(1.0).state_dict().items()
    }
    wide, narrow = levels.take(whole, 0.5), levels.take(whole, 0.25)
    half = levels_of("lenet:batch", SHAPE, 10, 0.5)
    for name, array in half.take(wide, 0.25).items():
        assert (array == narrow[name]).all()


# The classes that a client holds


def test_rows_of_the_output_layer_come_from_holders_of_the_class():
    run, sent = uploads({"partition": "classes:4", "model": "lenet", "num_shards": 3}, widths=WIDE)
    held = [
        edge_of(run.context(client)).private.train.labels.unique().tolist() for client in range(3)
    ]
    before = run.strategy.initial_arrays()
    name = next(name for name, array in before.items() if array.shape == (10, 84))
    after, old = arrays_of(run)[name], before[name].numpy()
    seen = set()
    for label in range(10):
        holders = [
            sent[client][name][label].astype(float) for client in range(3) if label in held[client]
        ]
        seen.add(len(holders))
        wanted = np.mean(holders, axis=0).astype(np.float32) if holders else old[label]
        np.testing.assert_array_equal(after[label], wanted)
    assert len(seen) > 1


def test_the_loss_counts_logits_of_other_classes_as_zero():
    torch.manual_seed(1)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, 2, 0, 0])
    held = torch.tensor([True, False, True, False])
    loss = masked_cross_entropy(held)(logits, labels)
    numbers = logits.detach().numpy() * held.numpy()
    wanted = np.log(np.exp(numbers).sum(1)) - numbers[np.arange(5), labels]
    assert loss.item() == pytest.approx(wanted.mean())
    loss.backward()
    assert (logits.grad[:, ~held] == 0).all() and (logits.grad[:, held] != 0).all()
    assert masked_cross_entropy(torch.ones(4, dtype=torch.bool)) is cross_entropy
    everything = functional.cross_entropy(
        logits.masked_fill(torch.zeros(4, dtype=torch.bool), 0), labels
    )
    assert everything.item() == functional.cross_entropy(logits, labels).item()


@pytest.mark.parametrize("outputs", [1, 7, 8, 9, 80])
def test_classes_travel_as_one_bit_each(outputs):
    classes = np.flatnonzero(np.random.default_rng(outputs).random(outputs) < 0.5)
    told = pack_classes(classes, outputs)
    assert len(told) == math.ceil(outputs / 8)
    assert unpack_classes(told, outputs).tolist() == classes.tolist()


@pytest.mark.parametrize("told", [None, b"", b"\xff\xff\xff", "\xff\xff", b"\xff\xe0"])
def test_what_is_no_set_of_classes_is_refused(told):
    with pytest.raises(ValueError):
        unpack_classes(told, 10)


def test_unmasked_tells_no_classes_and_takes_every_row():
    told = []

    def look(instruction, reply):
        told.append("held" in reply.content)
        return reply

    run_of(tamper=look, masked=False)
    assert told and not any(told)


def test_rows_that_a_client_does_not_hold_are_cut_from_what_it_returned():
    part = {"w": np.arange(12.0).reshape(4, 3), "b": np.arange(4.0)}
    indices = {"w": (slice(0, 4), slice(0, 3)), "b": (slice(0, 4),)}
    held, places = holding(part, indices, {"w": 0, "b": 0}, np.array([1, 3]))
    assert held["b"].tolist() == [1, 3] and held["w"].tolist() == [[3, 4, 5], [9, 10, 11]]
    assert places["w"][0].tolist() == [1, 3] and places["w"][1] == slice(0, 3)


# Replies that are late, lost or wrong


def spoiled(instruction, reply):
    meta = instruction.metadata
    if (meta.message_type, meta.dst_node_id, meta.group_id) == ("train", 3, "1"):
        record = reply.content.array_records["arrays"]
        values = record[next(iter(record))].numpy().copy()
        values.flat[0] = np.nan
        record[next(iter(record))] = Array(values)
    return reply


def untold(instruction, reply):
    meta = instruction.metadata
    if (meta.message_type, meta.dst_node_id, meta.group_id) == ("train", 3, "1"):
        reply.content["held"] = ConfigRecord({"classes": b"\x01"})
    return reply


def lost(instruction, reply):
    meta = instruction.metadata
    return (
        None if (meta.message_type, meta.dst_node_id, meta.group_id) == ("train", 3, "1") else reply
    )


@pytest.mark.parametrize(
    ("tamper", "why"),
    [(spoiled, "not finite"), (untold, "which classes"), (lost, "did not answer")],
)
def test_a_client_whose_answer_is_missing_or_wrong_is_left_out_whole(tamper, why):
    run = run_of(tamper=tamper, rounds=1)
    assert any("client 1" in text and why in text for text in run.warnings())
    _, sent = uploads({}, widths=MIXED)
    # Client 1 (width 0.5) left out: what only it and client 0 hold is client 0's alone.
    levels = levels_of("lenet:batch", SHAPE, 10, 1.0)
    bias = next(n for n, t in levels.slicing.network(1.0).state_dict().items() if t.shape == (120,))
    after = arrays_of(run)[bias]
    assert (after[30:] == sent[0][bias][30:]).all()
    assert (after[:30] != sent[0][bias][:30]).any()


def test_nobody_answers_and_the_network_stays_as_it_was():
    def silent(instruction, reply):
        return None if instruction.metadata.message_type == "train" else reply

    run = run_of(tamper=silent, rounds=1, masked=False)
    before = run.strategy.initial_arrays()
    statistics = run.strategy.travelling.down_only
    assert all(n in statistics or a.data == before[n].data for n, a in run.result.arrays.items())


# Widths


def test_widths_are_dealt_once_in_equal_shares_whoever_is_there():
    nothing = {"local_epochs": 0, "model": "lenet"}
    everybody = run_of((None,) * 12, clients=12, **nothing)
    dealt = [(e.client, e.value) for e in everybody.events if e.event == "width"]
    assert sorted(width for _, width in dealt) == [0.25] * 4 + [0.5] * 4 + [1.0] * 4
    half = run_of((None,) * 6, clients=6, **nothing)
    assert {(e.client, e.value) for e in half.events if e.event == "width"} <= set(dealt)


@pytest.mark.parametrize("widths", ["", "1,0.3,0.25"])
def test_a_dry_run_tells_the_parts_and_bytes_that_a_run_has(widths):
    told = [float(text) for text in widths.split(",")] if widths else [None] * 3
    run = run_of(told, rounds=1)
    planned = dry_run(make_plan({**SMALL, "rounds": 1, "widths": widths}, local=True))
    sent = {e.client: e.value for e in run.events if e.event == "width"}
    for row in planned["clients"]:
        assert row["model"] == at_width("lenet:batch", sent[row["client"]])
        (down,) = (
            e.value
            for e in run.events
            if (e.client, e.name, e.exchange) == (row["client"], "bytes_down", "train")
        )
        assert row["bytes_down"] == down


def test_dynamic_widths_are_drawn_from_the_seed_and_never_wider_than_a_client():
    settings = {"assignment": "dynamic", "rounds": 8, "local_epochs": 0, "model": "lenet"}
    run = run_of((None, 0.5, 0.25), **settings, eval_every=8)
    again = run_of((None, 0.5, 0.25), **{**settings, "rounds": 4}, eval_every=8)
    drawn = [[e for e in one.events if e.event == "width"] for one in (run, again)]
    assert drawn[1] == [e for e in drawn[0] if e.round <= 4]
    seen = {
        c: {e.value for e in run.events if e.event == "width" and e.client == c} for c in range(3)
    }
    assert seen[0] == {1.0, 0.5, 0.25} and seen[1] == {0.5, 0.25} and seen[2] == {0.25}


def test_a_client_trains_at_the_widest_level_that_it_can():
    run = run_of((1.0, 0.6, 0.25), local_epochs=0)
    assert {e.client: e.value for e in run.events if e.event == "width"} == {
        0: 1.0,
        1: 0.5,
        2: 0.25,
    }
    members = {m.client: m.width for m in run.driver.roster.connected()}
    assert members == {0: 1.0, 1: 0.5, 2: 0.25}


def test_a_client_narrower_than_every_level_is_refused_whatever_it_says():
    run = InProcessFederation(**SMALL)
    why_not = run.strategy.why_not
    assert "less than the least" in why_not(ConfigRecord({"width": 0.1}))
    assert why_not(ConfigRecord({"width": 0.25})) is None and why_not(ConfigRecord()) is None
    with pytest.raises(UsageError, match="less than the least"):
        run_of((1.0, 0.5, 0.1))


@pytest.mark.parametrize("text", ["", "1,1", "0", "1.5", "a", "1,,0.5", "nan"])
def test_levels_that_are_none_are_refused(text):
    with pytest.raises(UsageError, match="levels takes"):
        read_levels(text)


def test_a_model_that_cannot_be_so_narrow_is_refused_before_anything_starts():
    with pytest.raises(UsageError, match=r"lenet:group can't be sliced to 0\.1"):
        InProcessFederation(**{**SMALL, "model": "lenet:group", "levels": "1,0.1"})


def test_a_model_that_is_narrow_already_is_whole_here():
    narrow = {**ALIKE, "model": "width:0.5:lenet", "rounds": 1}
    runs = [run_of(WIDE, **narrow, scaler=scaler) for scaler in (True, False)]
    assert runs[0].summary["digest"] == runs[1].summary["digest"]


def test_levels_are_taken_the_widest_first():
    assert read_levels("0.25, 1,0.5") == (1.0, 0.5, 0.25)


def test_an_optimisers_moments_need_one_width():
    """Moments of another width would be read beyond their end: torch checks no shapes."""
    with pytest.raises(UsageError, match="keep-optimiser=false"):
        InProcessFederation(**{**SMALL, "assignment": "dynamic", "keep_optimiser": True})
    summary = run_of((None, None, None), keep_optimiser=True).summary
    assert summary["status"] == "completed" and summary["mean_global_accuracy"] is not None


def test_a_client_that_has_trained_nothing_yet_measures_the_width_that_it_was_dealt():
    """With its own statistics as they start; and that changes nothing of what it trains later."""
    run = run_of((None, None, None), buffers="local", select="uniform:0.34", rounds=1)
    measured = {e.client for e in run.events if e.name == "own_model/own_test/accuracy"}
    assert measured == {0, 1, 2} and run.warnings() == []
    often, once = (
        run_of((None, None, None), buffers="local", select="uniform:0.34", eval_every=every)
        for every in (1, 2)
    )
    assert [a.data for a in often.result.arrays.values()] == [
        a.data for a in once.result.arrays.values()
    ]


def test_the_global_network_has_the_widest_level():
    run = run_of((0.5, 0.25, 0.25), levels="0.5,0.25")
    models = run.strategy.server_models(run.result.arrays)
    assert {label: spec for label, (spec, _) in models.items()} == {
        "global": "width:0.5:lenet:batch",
        "global-0.25": "width:0.25:lenet:batch",
    }
    assert run.summary["server_models"].keys() == models.keys()
    for _, arrays in models.values():
        assert all(np.isfinite(array.numpy()).all() for array in arrays.values())


# (g) the scaler


def test_the_scaler_is_relative_to_the_widest_level_and_only_for_training():
    levels = levels_of("lenet", SHAPE, 10, 1.0)
    torch.manual_seed(1)
    whole = {
        n: torch.randn(t.shape) / 10 for n, t in levels.slicing.network(1.0).state_dict().items()
    }
    arrays = levels.take({n: t.numpy() for n, t in whole.items()}, 0.25)
    model = levels.slicing.network(0.25, {n: torch.from_numpy(a) for n, a in arrays.items()})
    inputs = torch.randn(3, *SHAPE)
    plain = model.eval()(inputs)
    with levels.slicing.scaled(model, 0.25):
        assert model.eval()(inputs).equal(plain)
        assert not model.train()(inputs).allclose(plain)
    assert model.train()(inputs).equal(plain)


def test_a_run_of_equal_narrow_clients_does_not_hang_on_the_scaler():
    narrow = (0.25, 0.25, 0.25)
    runs = [run_of(narrow, levels="0.25", scaler=scaler, rounds=1) for scaler in (True, False)]
    assert runs[0].summary["digest"] == runs[1].summary["digest"]
    mixed = [run_of((1.0, 0.5, None), scaler=scaler, rounds=1) for scaler in (True, False)]
    assert mixed[0].summary["digest"] != mixed[1].summary["digest"]


# Whole runs


def test_wide_and_narrow_clients_learn_one_network_at_every_width():
    run = run_of(
        (1.0, 0.5, 0.5), model="heterofl-cnn:0.125", rounds=4, local_epochs=2, num_shards=4,
        learning_rate=0.1, eval_every=4,
    )  # fmt: skip
    assert run.summary["server_models"].keys() == {"global", "global-0.5"}
    assert min(run.summary["server_models"].values()) > 0.75
    assert not run.warnings()
    assert [client["width"] for client in run.summary["clients"]] == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("assignment", ["fix", "dynamic"])
def test_a_client_that_is_started_anew_goes_on_at_its_width(assignment):
    settings = {"assignment": assignment, "alone": True}

    def restart(instruction, reply):
        meta = instruction.metadata
        if (meta.message_type, meta.group_id) == ("train", "1"):
            run.start_anew(instruction.metadata.dst_node_id)
        return reply

    plain = run_of((None, None, None), **settings)
    run = InProcessFederation(restart, **{**SMALL, **settings})
    assert run.run()["digest"] == plain.summary["digest"]


def test_what_the_server_remembers_survives_it(tmp_path):
    run = run_of()
    save_state(tmp_path / "state", run.strategy.state)
    kept = load_state(tmp_path / "state", HeteroFLState)
    assert kept.used == run.strategy.state.used == [1.0, 0.5, 0.25]
    assert kept.statistics.keys() == {"1", "0.5", "0.25"}
    models = run.strategy.server_models(run.result.arrays)
    run.strategy.state = kept
    again = run.strategy.server_models(run.result.arrays)
    for label, (spec, arrays) in models.items():
        assert again[label][0] == spec
        assert all(array.data == again[label][1][name].data for name, array in arrays.items())


@pytest.mark.slow
def test_over_processes_with_a_client_that_is_killed(tmp_path):
    """As `fedkit server` and `fedkit client` run it; the numbers are those of a run in one process."""
    settings = {"rounds": "6", "levels": "1,0.5,0.25", "local-epochs": "2", "num-shards": "8"}
    options = [f"-o{name}={value}" for name, value in settings.items()]
    address = f"127.0.0.1:{free_port()}"

    def client(shard, width, name):
        arguments = ("--data-shard", str(shard), "--width", width, "--server", address)
        return Process("client", *arguments, folder=tmp_path, name=name)

    with Process(
        *("server", "--strategy", "heterofl", "--model", "lenet:batch", "--min-clients", "3"),
        *("--listen", address, "--run-dir", "out", *options),
        folder=tmp_path,
        name="server",
    ) as server:
        until(lambda: "waiting for" in server.text, 4 * LONG)
        with client(0, "1", "wide") as wide, client(1, "0.5", "half") as half:
            with client(2, "0.25", "first") as first:
                until(lambda: "round 2/6" in server.text, 4 * LONG)
                first.kill()
            with client(2, "0.25", "again") as again:
                assert server.wait(4 * LONG) == 0, server.text
                assert [process.wait() for process in (wide, half, again)] == [0, 0, 0]
    assert "joined: width:0.25:lenet:batch" in server.text and "Going on from" in again.text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert sorted(summary["server_models"]) == ["global", "global-0.25", "global-0.5"]
    for label in summary["server_models"]:
        saved = load_model(tmp_path / "out" / "models" / f"{label}.safetensors")
        assert network(saved) is not None
    alike = InProcessFederation(
        strategy="heterofl", model="lenet:batch", clients=3, rounds=6, levels="1,0.5,0.25",
        local_epochs=2, num_shards=8, alone=False, widths="1,0.5,0.25",
    )  # fmt: skip
    assert alike.run()["digest"] == summary["digest"]
