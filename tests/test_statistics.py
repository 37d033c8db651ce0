"""Running statistics in every strategy that shares weights: each choice of ``buffers`` means something."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array
from inprocess import InProcessFederation, bits, ran

from clients.edge import edge_of
from fedkit.engine.dryrun import dry_run
from fedkit.engine.plan import make_plan
from fedkit.engine.strategy_state import load_state, save_state
from fedkit.errors import UsageError
from fedkit.models.build import build_model, restored
from fedkit.models.levels import levels_of
from fedkit.models.normalisation import batch_moments, statistics_of
from strategies.depthfl import DepthFLState
from strategies.students import answers

SMALL = {
    "model": "lenet:batch",
    "clients": 3,
    "rounds": 1,
    "local_epochs": 1,
    "batch_size": 16,
    "learning_rate": 0.05,
    "public": "digits:60",
    "partition": "iid",
    "num_shards": 12,
    "alone": False,
}
FEDDF = {"strategy": "feddf", "exchange": "weights", "steps": 4, "check_every": 2, "workers": 1}
COPIES = {"strategy": "feddistill", "exchange": "weights", "teacher_first": 0, "teacher_epochs": 0}
STRATEGIES = {
    "fedavg": {"strategy": "fedavg"},
    "fedprox": {"strategy": "fedprox"},
    "ditto": {"strategy": "ditto"},
    "fedseq": {"strategy": "fedseq", "probe_epochs": 1},
    "flwr": {"strategy": "flwr:FedAvgM", "server_momentum": 0.5},
    "heterofl": {"strategy": "heterofl", "levels": "1,0.5", "widths": "1,1,0.5"},
    "heterofl-dynamic": {"strategy": "heterofl", "levels": "1,0.5", "assignment": "dynamic"},
    "depthfl": {"strategy": "depthfl", "depths": "2,4,4", "widths": "1,1,0.5"},
    "feddf": FEDDF | {"models": "lenet:batch", "optimiser": "sgd", "temperature": 1.0, "steps": 20},
    "feddistill": COPIES
    | {"models": "lenet:batch,cnn", "optimiser": "sgd", "teacher_first": 1, "teacher_epochs": 1},
}
BUFFERS = ("average", "local", "static")
SHAPE = (1, 8, 8)


def run_of(tamper=None, **settings):
    run = InProcessFederation(tamper, **{**SMALL, **settings})
    run.summary = run.run()
    return run


def arrays_of(record):
    return {name: array.numpy() for name, array in record.items()}


def own_state(run, client, slot="own-model"):
    return arrays_of(run.context(client).state[slot])


def last(run, end):
    """What was measured last under names that end so, by client and name."""
    rounds = run.plan.federation.rounds
    told = [e for e in run.events if e.round == rounds and str(e.name).endswith(end)]
    return {(event.client, event.name): event.value for event in told}


def pooled(runs):
    """The mean over all batches of what networks see of data: ``(network, samples)`` pairs, by hand."""
    sums, counts = {}, {}
    for network, samples in runs:
        moments, batches = batch_moments(network, samples, SMALL["batch_size"])
        for name, values in moments.items():
            sums[name] = sums.get(name, 0) + batches * values.double().numpy()
            counts[name] = counts.get(name, 0) + batches
    return {name: (sums[name] / counts[name]).astype(np.float32) for name in sums}


def tensors(arrays):
    return {name: torch.from_numpy(np.array(values)) for name, values in arrays.items()}


# Every choice learns


@pytest.mark.slow
@pytest.mark.parametrize("buffers", BUFFERS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_with_every_choice_every_strategy_learns(name, buffers):
    learning = {"rounds": 4, "local_epochs": 2, "num_shards": 6, "learning_rate": 0.1}
    run = run_of(**STRATEGIES[name], **learning, eval_every=4, buffers=buffers)
    told = last(run, "_model/global_test/accuracy")
    learned = {who: value for who, value in told.items() if "teacher" not in who[1]}
    assert learned and min(learned.values()) > 0.5, learned
    assert max(learned.values()) > 0.7, learned
    # Where statistics stay with the clients only they have whole networks; else only the server has.
    measured_by = {client for client, metric in learned if "own_model" in metric}
    if name != "ditto":
        assert measured_by == ({0, 1, 2} if buffers == "local" else set())
    assert bool(run.summary["server_models"]) == (buffers != "local")
    assert not run.warnings()


# What travels, and what it is said to weigh


# What fedseq weighs hangs on who walks through whom, which is not known before.
TRAVEL = [(name, buffers) for name in STRATEGIES if name != "fedseq" for buffers in BUFFERS]
QUICK = ("depthfl", "static"), ("feddf", "static"), ("feddistill", "local")


@pytest.mark.parametrize(
    ("name", "buffers"),
    [one if one in QUICK else pytest.param(*one, marks=pytest.mark.slow) for one in TRAVEL],
)
def test_statistics_travel_as_the_choice_says_and_a_dry_run_knows_it(name, buffers):
    seen = {}

    def look(instruction, reply):
        kind = instruction.metadata.message_type
        for way, content in (("down", instruction.content), ("up", reply.content)):
            for record in content.array_records.values():
                seen.setdefault((kind, way), set()).update(record)
        return reply

    settings = {**SMALL, **STRATEGIES[name], "local_epochs": 0, "buffers": buffers}
    settings |= {"steps": 0} if name == "feddf" else {}
    run = run_of(look, **settings)
    spec = "exits:lenet:batch" if name == "depthfl" else "lenet:batch"
    own = statistics_of(build_model(spec, SHAPE, 10, 0))
    travel = {
        "average": {"down": own, "up": own},
        "local": {"down": set(), "up": set()},
        "static": {"down": own, "up": set()},
    }
    for way in ("down", "up"):
        assert seen["train", way] & own == travel[buffers][way]
    if buffers == "static":
        told = {name for name in own if not name.endswith("tracked")}
        assert seen["query.statistics", "up"] == told
    planned = dry_run(make_plan(settings, local=True))["clients"]
    for row, client in zip(planned, run.summary["clients"], strict=True):
        found = client["bytes_up"], client["bytes_down"]
        if name == "heterofl-dynamic":  # the most that it can be
            assert found[0] <= row["bytes_up"] and found[1] <= row["bytes_down"]
        else:
            assert found == (row["bytes_up"], row["bytes_down"])


def test_a_dry_run_leaves_out_the_layers_that_fedbn_keeps():
    settings = {**SMALL, "strategy": "fedbn", "local_epochs": 0, "update_codec": "float16"}
    run = run_of(**settings)
    (row, *_) = dry_run(make_plan(settings, local=True))["clients"]
    client = run.summary["clients"][0]
    assert (client["bytes_up"], client["bytes_down"]) == (row["bytes_up"], row["bytes_down"])


# DepthFL: statistics of parts


def test_static_statistics_of_a_stage_are_those_of_all_who_hold_it_at_every_width():
    depths, widths = (2, 4, 4), (1.0, 0.5, 1.0)
    run = run_of(
        strategy="depthfl",
        depths=",".join(map(str, depths)),
        widths=",".join(f"{width:g}" for width in widths),
        buffers="static",
    )
    whole = arrays_of(run.result.arrays)
    for width in (1.0, 0.5):
        runs = []
        for client, depth in enumerate(depths):
            if widths[client] < width:
                continue
            edge, spec = edge_of(run.context(client)), f"exits:{depth}:lenet:batch"
            held = restored(spec, SHAPE, 10, tensors(_held(whole, spec)))
            if width < 1:
                kept = levels_of(spec, SHAPE, 10, 1.0).take(_held(whole, spec), width)
                held = restored(f"width:{width:g}:{spec}", SHAPE, 10, tensors(kept))
            runs.append((held, edge.private.train))
        wanted, found = pooled(runs), run.strategy.state.statistics[f"{width:g}"]
        assert found.keys() == wanted.keys() and len(found) == 4
        for name, values in wanted.items():
            np.testing.assert_array_equal(found[name], values, err_msg=name)
    # Where the shallow client is left out of the deep ones' statistics these are others.
    spec, model = run.strategy.server_models(run.result.arrays)["global"]
    assert spec == "exits:lenet:batch"
    for name, values in run.strategy.state.statistics["1"].items():
        assert model[name].numpy().tobytes() == values.tobytes()


def _held(arrays, spec):
    names = build_model(spec, SHAPE, 10, 0).state_dict()
    return {name: arrays[name] for name in names}


def test_layers_behind_an_exit_have_statistics_too():
    run = run_of(strategy="depthfl", model="preresnet18:0.0625", buffers="static", num_shards=40)
    statistics = run.strategy.state.statistics["1"]
    names = statistics_of(build_model("exits:preresnet18:0.0625", SHAPE, 10, 0))
    assert statistics.keys() == {name for name in names if not name.endswith("tracked")}
    early = [name for name in statistics if name.startswith("exits.1.") and name.endswith("var")]
    assert early and all((statistics[name] != 1).all() for name in early)


def test_a_width_whose_statistics_nobody_can_tell_is_not_measured():
    run = run_of(strategy="depthfl", widths="0.5", buffers="static")
    assert run.summary["server_models"] == {}
    assert all(client["personal_accuracy"] is not None for client in run.summary["clients"])


def test_the_state_of_widths_survives_on_disk(tmp_path):
    run = run_of(strategy="depthfl", depths="2,4,4", widths="1,0.5,1", buffers="static", rounds=1)
    save_state(tmp_path / "state", run.strategy.state)
    again = load_state(tmp_path / "state", DepthFLState)
    assert again.used == [1.0, 0.5]
    for width, layers in run.strategy.state.statistics.items():
        for name, values in layers.items():
            np.testing.assert_array_equal(again.statistics[width][name], values)


# HeteroFL and DepthFL: statistics of one's own, at some width


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "heterofl", "levels": "1,0.5"},
        {"strategy": "depthfl"},
    ],
    ids=lambda s: s["strategy"],
)
def test_a_narrow_clients_own_statistics_are_of_the_network_without_the_scaler(settings):
    run = run_of(**settings, widths="1,1,0.5", buffers="local", alone=True)
    for slot in ("own-model", "alone-model"):
        edge, mine = edge_of(run.context(2)), own_state(run, 2, slot)
        assert edge.architecture("own").startswith("width:0.5:")
        network = restored(edge.architecture("own"), SHAPE, 10, tensors(mine))
        for name, values in pooled([(network, edge.private.train)]).items():
            np.testing.assert_allclose(mine[name], values, rtol=1e-6, err_msg=name)
    # A wide client's are tracked as torch does it.
    edge, mine = edge_of(run.context(0)), own_state(run, 0)
    network = restored(edge.architecture("own"), SHAPE, 10, tensors(mine))
    tracked = pooled([(network, edge.private.train)])
    assert all(not np.allclose(mine[name], values, rtol=1e-3) for name, values in tracked.items())


DYNAMIC = {
    "strategy": "heterofl",
    "levels": "1,0.5,0.25",
    "assignment": "dynamic",
    "buffers": "local",
    "rounds": 5,
    "num_shards": 40,
}


def test_with_widths_drawn_anew_each_has_statistics_of_its_own():
    trained, measured = {}, {}

    def look(instruction, reply):
        kind, client = instruction.metadata.message_type, instruction.metadata.dst_node_id - 2
        told = instruction.content.config_records
        if kind == "train":
            trained.setdefault(client, []).append(told["config"]["width"])
        if kind == "evaluate":
            measured.setdefault(client, []).append(told["config"]["model"])
        return reply

    run = run_of(look, **DYNAMIC)
    assert any(len(set(widths)) > 1 for widths in trained.values())
    for client, widths in trained.items():
        kept = {name for name in run.context(client).state if "statistics/" in name}
        specs = {1.0: "lenet:batch", 0.5: "width:0.5:lenet:batch", 0.25: "width:0.25:lenet:batch"}
        assert kept == {f"own-statistics/{specs[width]}" for width in widths}
        # It is measured where it has statistics, and at the widest of these.
        so_far = [max(widths[: at + 1]) for at in range(len(widths))]
        assert measured[client] == [specs[width] for width in so_far]
        counters = [
            values
            for name in kept
            for tensor, values in own_state(run, client, name).items()
            if tensor.endswith("tracked")
        ]
        assert all(counter > 0 for counter in counters)


@pytest.mark.slow
def test_statistics_of_every_width_outlive_a_restart():
    settings = DYNAMIC | {"rounds": 3, "eval_every": 3}
    plain = run_of(**settings)

    def restart(instruction, reply):
        run.start_anew(instruction.metadata.dst_node_id)
        return reply

    run = InProcessFederation(restart, **{**SMALL, **settings})
    assert run.run()["digest"] == plain.summary["digest"]


# FedDF: the server runs clients' networks


@pytest.mark.parametrize("buffers", ["local", "static"])
def test_a_network_without_statistics_answers_the_public_set_as_it_was_trained(buffers):
    run = run_of(**FEDDF, models="lenet:batch", buffers=buffers)
    weights = dict(run.strategy.state.models["lenet:batch"])
    weights |= {n: a * np.float32(20) for n, a in weights.items() if n == list(weights)[-2]}
    indices = run.strategy.draw(1)
    told = answers(run.strategy.facts, "lenet:batch", weights, indices, moments_of=len(indices))
    network = restored("lenet:batch", SHAPE, 10, tensors(weights)).train()
    inputs = run.strategy.facts.public.take(torch.from_numpy(indices)).inputs(slice(None))
    with torch.inference_mode():
        wanted = network(inputs).numpy()  # by the batch's own moments, of which one is biased
    np.testing.assert_allclose(told, wanted, rtol=0.05, atol=0.05)
    begun = arrays_of(run.strategy.facts.initial_weights("lenet:batch"))
    weights |= {name: begun[name] for name in statistics_of(network)}
    unsettled = answers(run.strategy.facts, "lenet:batch", weights, indices)
    assert np.abs(unsettled - wanted).max() > 0.5


@pytest.mark.parametrize("buffers", ["local", "static"])
def test_without_distillation_feddf_is_fedavg_to_the_bit(buffers):
    settings = {"rounds": 2, "buffers": buffers, "optimiser": "sgd"}
    settings |= {"momentum": 0.5, "keep_optimiser": False}
    df = run_of(**FEDDF | {"steps": 0}, models="lenet:batch", **settings)
    avg = run_of(strategy="fedavg", **settings)
    ours = df.strategy.state.models["lenet:batch"]
    for name, values in arrays_of(avg.result.arrays).items():
        assert ours[name].tobytes() == values.tobytes(), name
    if buffers == "local":
        assert last(df, "own_model/own_test/accuracy") == last(avg, "own_model/own_test/accuracy")


def test_every_group_of_feddf_has_the_statistics_of_its_own_clients():
    run = run_of(**FEDDF, models="lenet:batch,cnn,preresnet18:0.0625", clients=4, buffers="static")
    assert not run.warnings()
    for spec, clients in (("lenet:batch", (0, 3)), ("preresnet18:0.0625", (2,))):
        model = run.strategy.state.models[spec]
        runs = [
            (restored(spec, SHAPE, 10, tensors(model)), edge_of(run.context(one)).private.train)
            for one in clients
        ]
        for name, values in pooled(runs).items():
            np.testing.assert_array_equal(model[name], values, err_msg=name)
    asked = {e.client for e in run.events if e.exchange == "statistics" and e.event == "bytes"}
    assert asked == {0, 2, 3}, "a network without batch normalisation has none to tell"


def test_with_statistics_of_their_own_feddfs_server_has_only_whole_networks():
    run = run_of(**FEDDF, models="lenet:batch,lenet", buffers="local")
    assert run.summary["server_models"].keys() == {"global-lenet"}
    mine, theirs = own_state(run, 0), own_state(run, 2)
    names = [n for n in statistics_of(edge_of(run.context(0)).own) if "num" not in n]
    assert names and all((mine[name] != theirs[name]).any() for name in names)


@pytest.mark.parametrize("buffers", ["local", "static"])
def test_a_student_learns_with_the_moments_of_what_it_learns_from(buffers):
    more = {"steps": 60, "check_every": 10, "public": "digits:200", "num_shards": 40, "rounds": 2}
    run = run_of(**FEDDF | more, models="lenet:batch", buffers=buffers, temperature=1.0)
    scores = {
        name: [e.value for e in run.events if e.name == f"student/lenet:batch/{name}"]
        for name in ("score_before", "score")
    }
    assert len(scores["score"]) == 2
    assert all(a > b for a, b in zip(scores["score"], scores["score_before"], strict=True))
    assert not run.warnings()


# FedDistill: the copy of the global model has them, not the teacher


def test_without_a_teachers_share_the_copies_are_fedavg_to_the_bit():
    settings = {"rounds": 2, "buffers": "local", "optimiser": "sgd", "keep_optimiser": False}
    copies = run_of(**COPIES, models="lenet:batch,cnn", distill_weight=0.0, **settings)
    avg = run_of(strategy="fedavg", **settings)
    assert bits(copies.result.arrays) == bits(avg.result.arrays)
    for end in ("own_model/own_test/accuracy", "own_model/global_test/loss"):
        assert last(copies, end) == last(avg, end)
    kept = own_state(copies, 0, "copy-statistics/lenet:batch")
    mine = own_state(avg, 0)
    assert all(values.tobytes() == mine[name].tobytes() for name, values in kept.items())


def test_a_copys_statistics_outlive_a_restart():
    settings = {**COPIES, "models": "lenet:batch,cnn", "buffers": "local", "rounds": 2}
    plain = run_of(**settings)

    def restart(instruction, reply):
        run.start_anew(instruction.metadata.dst_node_id)
        return reply

    run = InProcessFederation(restart, **{**SMALL, **settings})
    assert run.run()["digest"] == plain.summary["digest"]


def test_where_no_weights_travel_the_choice_is_refused():
    for strategy in ("feddf", "feddistill"):
        with pytest.raises(UsageError, match="buffers=static is about weights"):
            ran(strategy=strategy, buffers="static")


# What clients tell is checked


def _last_of(record, values):
    name = list(record)[-1]
    record[name] = Array(values(record[name].numpy()))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c.pop("0.5"), "does not tell"),
        (lambda c: _last_of(c["1"], lambda a: a * np.float32(np.nan)), "not finite"),
        (lambda c: c["1"].update({"more": Array(np.zeros(1, np.float32))}), "does not tell"),
    ],
    ids=["width", "nan", "more"],
)
def test_statistics_of_parts_that_make_no_sense_are_left_out(change, why):
    settings = {"strategy": "depthfl", "widths": "1,1,0.5", "buffers": "static"}

    def tamper(instruction, reply):
        meta = instruction.metadata
        if meta.message_type == "query.statistics" and meta.dst_node_id == 3:
            change(reply.content)
        return reply

    run = run_of(tamper, **settings)
    (warning,) = run.warnings()
    assert "client 1" in warning and why in warning
