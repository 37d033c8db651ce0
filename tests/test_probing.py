"""Probe and finish: for every strategy what a client does in two parts is what it does in one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from inprocess import InProcessFederation, RepeatingGrid

from clients.edge import edge_of
from fedkit.engine.roster import Member
from fedkit.flower import unavailable_reply
from fedkit.models.training import batches_of, one_epoch
from fedkit.seeds import torch_generator

SMALL = {
    "clients": 3,
    "models": "lenet,logistic",
    "rounds": 2,
    "public": "digits:30",
    "partition": "iid",
    "num_shards": 60,
    "eval_samples": 20,
}
WEIGHTS = {"strategy": "fedavg", "model": "lenet", "local_epochs": 3}
FEDMD = {"strategy": "fedmd", "init_epochs": 1, "revisit_epochs": 3, "digest_epochs": 1}
LOGITS = {"strategy": "ktpfl", "local_epochs": 3, "distill_epochs": 1}
# So few that floor(F N) is none: everybody is probed, and everybody goes on.
NOBODY = "drop:0.01"


class Only:
    """A selector of this file's: probes all, lets some go on."""

    probes = True

    def __init__(self, *clients: int) -> None:
        self.clients, self.probed, self.outcomes = clients, {}, []

    def choose(self, view):
        return view.members

    def keep(self, view, probes):
        self.probed[view.round] = dict(probes)
        return [member for member in view.members if member.client in self.clients]

    def learn(self, outcome):
        self.outcomes.append(outcome)


def probed(*kept, tamper=None, grid=None, **settings):
    """A run in which of the probed clients those go on."""
    kinds = {} if grid is None else {"grid": grid}
    run = InProcessFederation(tamper, **kinds, **SMALL | settings, select=NOBODY)
    run.driver.chooser.selector = Only(*kept)
    run.summary = run.run()
    return run


def measured(run):
    """Everything that was measured, but for the probes'."""
    return [
        (e.round, e.exchange, e.client, e.name, e.value)
        for e in run.events
        if e.event == "metric" and e.exchange != "probe"
    ]


def state(run, client):
    """A client's durable records of arrays, as bytes."""
    return {
        name: [array.data for array in record.values()]
        for name, record in run.context(client).state.array_records.items()
    }


@pytest.mark.parametrize(
    "settings",
    [
        WEIGHTS | {"optimiser": "adam", "alone": False},
        {"strategy": "fedavg", "model": "lenet", "local_epochs": 1, "augment": "flip,crop"},
        LOGITS | {"keep_optimiser": True, "schedule": "plateau", "alone": False},
        {"strategy": "feddf", "local_epochs": 2, "steps": 2, "digest_epochs": 1, "workers": 1},
        {"strategy": "feddistill", "local_epochs": 2, "steps": 2, "digest_epochs": 1, "workers": 1},
        {"strategy": "feddistill", "exchange": "weights", "model": "lenet", "teacher_first": 2,
         "teacher_epochs": 1, "local_epochs": 2, "alone": False},
        {"strategy": "local", "local_epochs": 2, "keep_optimiser": True, "alone": False},
        {"strategy": "ditto", "model": "lenet", "local_epochs": 2, "keep_optimiser": True,
         "momentum": 0.9},
        {"strategy": "flwr:FedAdam", "model": "lenet", "local_epochs": 2, "finetune_epochs": 1,
         "alone": False},
        {"strategy": "fedseq", "model": "lenet", "local_epochs": 2, "group_clients": 1, "alone": False},
        WEIGHTS | {"model": "lenet:batch", "buffers": "static", "alone": False},
        WEIGHTS | {"strategy": "fedbn", "model": "lenet:batch", "alone": False},
        {"strategy": "heterofl", "model": "lenet:batch", "levels": "1,0.5,0.25", "local_epochs": 2,
         "assignment": "dynamic"},
        {"strategy": "fd", "local_epochs": 3, "alone": False},
        {"strategy": "fd", "local_epochs": 1, "local_steps": 7, "batch_size": 8, "alone": False},
        {"strategy": "fedproto", "local_epochs": 3, "alone": False},
        {"strategy": "fedmd", "init_epochs": 1, "revisit_epochs": 3, "digest_epochs": 1,
         "schedule": "plateau"},
        {"strategy": "fedmd", "init_epochs": 1, "revisit_epochs": 1, "fuse": False, "rounds": 3},
        {"strategy": "fedprox", "model": "lenet", "local_epochs": 3, "mu": 1.0, "optimiser": "lamb",
         "adaptive_mu": True, "work": "fixed:1,0.34,0.67", "stragglers": "drop"},
        {"strategy": "fedavg", "model": "lenet", "local_steps": 7, "batch_size": 8, "warmup": 9,
         "optimiser": "lars", "momentum": 0.9, "schedule": "cosine", "schedule_by": "step"},
        {"strategy": "depthfl", "model": "lenet", "local_epochs": 2, "depths": "1,4,2",
         "widths": "1,1,0.5"},
        {"strategy": "ktpfl", "local_steps": 7, "batch_size": 8, "distill_epochs": 1, "alone": False,
         "keep_optimiser": True, "schedule": "inverse", "schedule_by": "step", "optimiser": "adamw"},
        {"strategy": "fedavg", "model": "lenet", "local_epochs": 2, "update_codec": "topk:0.1",
         "relevance": "0.6,decay", "outer": "momentum:0.5", "robust": True, "alone": False},
    ],
    ids=["fedavg", "one-epoch", "ktpfl", "feddf", "feddistill", "teacher", "local", "ditto",
         "flower", "fedseq", "static", "fedbn", "heterofl", "fd", "fd-steps", "fedproto", "fedmd",
         "fedmd-apart", "fedprox", "fedavg-steps", "depthfl", "ktpfl-steps", "updates"],
)  # fmt: skip
def test_a_probed_run_in_which_all_go_on_is_the_run_without_a_probe(settings):
    settings = SMALL | settings
    plain = InProcessFederation(**settings)
    summary = plain.run()
    in_two = InProcessFederation(**settings, select=NOBODY)
    again = in_two.run()
    assert measured(in_two) == measured(plain)
    assert (again["bytes_up"], again["bytes_down"]) == (summary["bytes_up"], summary["bytes_down"])
    assert len({e.client for e in in_two.events if e.name == "probe_loss"}) == 3
    assert not in_two.warnings()
    for client in range(3):
        assert state(in_two, client) == state(plain, client)


@pytest.mark.parametrize("settings", [WEIGHTS, LOGITS], ids=["weights", "logits"])
def test_a_client_that_is_started_anew_between_probe_and_finish_goes_on(settings):
    restarts = 0

    def restart(instruction, reply):
        nonlocal restarts
        if instruction.metadata.message_type == "train.probe":
            run.start_anew(instruction.metadata.dst_node_id)
            restarts += 1
        return reply

    plain = InProcessFederation(**SMALL, **settings, alone=False)
    plain.run()
    run = InProcessFederation(restart, **SMALL, **settings, alone=False, select=NOBODY)
    run.run()
    assert restarts == 6
    assert measured(run) == measured(plain)
    assert [state(run, client) for client in range(3)] == [state(plain, c) for c in range(3)]


def test_only_those_who_go_on_send_and_the_probe_is_all_that_comes_down():
    run = probed(0, 2, **WEIGHTS)
    down = {(e.round, e.exchange, e.client): e.value for e in run.events if e.name == "bytes_down"}
    up = {(e.round, e.exchange, e.client): e.value for e in run.events if e.name == "bytes_up"}
    model = up[1, "train", 0]
    for round in (1, 2):
        for client in range(3):
            assert down[round, "probe", client] == model and up[round, "probe", client] == 0
            # Who is stopped hears nothing more of it.
            assert down.get((round, "train", client)) == (None if client == 1 else 0)
            assert up.get((round, "train", client)) == (None if client == 1 else model)
    told = {e.value for e in run.events if e.name == "upload-bytes"}
    assert told == {model}
    assert [client["rounds"] for client in run.summary["clients"]] == [2, 0, 2]
    assert not run.warnings()


def test_a_stopped_client_counts_no_more_in_the_mean_than_one_that_is_not_there():
    run = probed(0, 2, **WEIGHTS)
    without = InProcessFederation(**SMALL, **WEIGHTS)
    without.driver.chooser.selector = Only(0, 2)
    without.driver.chooser.selector.probes = False
    without.driver.chooser.selector.choose = lambda view: [
        member for member in view.members if member.client in (0, 2)
    ]
    without.run()
    for name, array in run.result.arrays.items():
        assert array.data == without.result.arrays[name].data


def test_who_is_stopped_lets_go_of_weights_that_came_down():
    run = probed(0, **WEIGHTS, alone=False)
    assert "own-model" in state(run, 0)
    # Nothing is left of the probe, and the live model is what a client started anew would have.
    assert state(run, 1) == {} and "probe" not in run.context(1).state
    live = edge_of(run.context(1))
    weights = {name: value.clone() for name, value in live.own.state_dict().items()}
    live.remake(run.context(1), "own")
    assert all(value.equal(weights[name]) for name, value in live.own.state_dict().items())


def test_who_is_stopped_keeps_the_probed_epoch_and_still_digests():
    run = probed(0, 2, **LOGITS | {"distill_epochs": 0}, alone=False)
    # Without the digest its model is that of one epoch a round, which client 1 alone has done.
    short = InProcessFederation(
        **SMALL, **LOGITS | {"distill_epochs": 0, "local_epochs": 1}, alone=False
    )
    short.run()
    assert state(run, 1)["own-model"] == state(short, 1)["own-model"]
    assert state(run, 0)["own-model"] != state(short, 0)["own-model"]
    told = [e for e in run.events if e.name == "digest/loss" and e.client == 1]
    assert [e.round for e in told] == [1, 2]
    assert not run.warnings()


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "feddf", "local_epochs": 2, "steps": 2, "digest_epochs": 1, "workers": 1},
        {"strategy": "feddistill", "local_epochs": 2, "steps": 2, "digest_epochs": 1, "workers": 1},
    ],
    ids=["feddf", "feddistill"],
)
def test_who_is_stopped_learns_from_the_others_answers(settings):
    run = probed(0, 2, **settings, alone=False)
    digested = {(e.round, e.client) for e in run.events if e.name == "digest/loss"}
    assert digested == {(round, client) for round in (1, 2) for client in range(3)}
    assert all(
        e.value == 0
        for e in run.events
        if e.name == "bytes_up" and e.client == 1 and e.exchange in ("probe", "local")
    )
    assert not run.warnings()


def test_who_is_stopped_in_fedmd_has_digested_and_revisited_for_an_epoch():
    settings = FEDMD | {"rounds": 1, "alone": False}
    run = probed(0, 2, **settings)
    short = InProcessFederation(**SMALL | settings | {"revisit_epochs": 1})
    short.run()
    mine, wanted = state(run, 1), state(short, 1)
    for name in ("own-model", "own-private-optimiser", "own-digest-optimiser"):
        assert mine[name] == wanted[name]
    assert state(run, 0)["own-model"] != state(short, 0)["own-model"]


def test_who_is_stopped_in_fedmd_sends_no_class_scores_and_digests_those_of_the_others():
    begun, digested = [], []

    def watch(instruction, reply):
        meta = instruction.metadata
        if meta.message_type == "train.probe" and meta.dst_node_id == 3:
            begun.append((meta.group_id, reply.has_content()))
            digested.append(state(run, 1)["own-digest-optimiser"])
        return reply

    run = InProcessFederation(watch, **SMALL | FEDMD | {"rounds": 4, "alone": False}, select=NOBODY)
    run.driver.chooser.selector = Only(0, 2)
    summary = run.run()
    sent = {(e.round, e.exchange) for e in run.events
            if e.name == "bytes_up" and e.client == 1 and e.value and e.exchange != "evaluate"}  # fmt: skip
    # All that it ever tells is what it knows before the first decision.
    assert sent == {(1, "logits")}
    assert begun == [(str(round), True) for round in range(1, 5)]
    assert all(before != after for before, after in itertools.pairwise(digested))
    told = {e.value for e in run.events if e.name == "upload-bytes" and e.round < 4}
    assert told == {4 * 30 * 10}
    probes = [outcome.bytes_up for outcome in run.driver.chooser.selector.outcomes]
    assert probes == [5 * 4 * 30 * 10, 2 * 4 * 30 * 10, 2 * 4 * 30 * 10, 0]
    assert [client["rounds"] for client in summary["clients"]] == [4, 0, 4]
    assert all("digesting has stalled" in text for text in run.warnings())


def test_the_selector_hears_of_every_probe_and_how_the_round_went():
    run = probed(0, 2, **WEIGHTS, val_fraction=0.2)
    selector = run.driver.chooser.selector
    for round, outcome in enumerate(selector.outcomes, 1):
        probes = selector.probed[round]
        assert sorted(probes) == [0, 1, 2]
        assert all(probe.loss > 0 and probe.seconds > 0 for probe in probes.values())
        assert (outcome.round, outcome.kept, outcome.lost) == (round, (0, 2), ())
        accuracies = [
            e.value
            for e in run.events
            if e.name == "global_model/own_val/accuracy" and e.round == round
        ]
        assert outcome.accuracy == pytest.approx(np.mean(accuracies))
        assert outcome.bytes_up == run.summary["history"][round - 1]["bytes_up"]
        assert outcome.seconds >= max(probe.seconds for probe in probes.values())


def lose(kind, client, round="1"):
    def tamper(instruction, reply):
        meta = instruction.metadata
        hit = (meta.message_type, meta.dst_node_id, meta.group_id) == (kind, client + 2, round)
        return None if hit else reply

    return tamper


def test_a_lost_probe_is_not_kept_and_took_as_long_as_it_was_given():
    run = probed(0, 1, 2, tamper=lose("train.probe", 1), **WEIGHTS, round_timeout=50.0)
    assert sorted(run.driver.chooser.selector.probed[1]) == [0, 2]
    seen = run.driver._known.seen.before(2)[1]
    assert (seen.missed, seen.rounds) == ((1,), ())
    assert 20.0 < seen.probe_seconds[0] <= 25.0  # half of the round's time: one of two exchanges
    assert run.driver.chooser.selector.outcomes[0].seconds >= seen.probe_seconds[0]
    assert run.driver.chooser.selector.outcomes[0].kept == (0, 2)
    assert run.summary["rounds"] == 2 and run.driver.chooser.selector.outcomes[1].kept == (0, 1, 2)


def test_a_lost_finish_is_told_as_lost():
    run = probed(0, 1, tamper=lose("train.finish", 1), **WEIGHTS)
    assert run.driver.chooser.selector.outcomes[0].lost == (1,)
    assert run.driver.chooser.selector.outcomes[0].kept == (0,)


@pytest.mark.parametrize("settings", [WEIGHTS, LOGITS], ids=["weights", "logits"])
def test_a_client_that_never_heard_that_it_goes_on_counts_as_stopped(settings):
    stopped = probed(0, 2, **settings, alone=False)
    run = InProcessFederation(**SMALL, **settings, alone=False, select=NOBODY)
    answer = run.grid.answer

    def deaf(sent):
        """Client 1 never hears of a decision."""
        meta = sent.metadata
        if meta.message_type == "train.finish" and meta.dst_node_id == 3:
            return unavailable_reply(sent, "deaf")
        return answer(sent)

    run.grid.answer = deaf
    run.driver.chooser.selector = Only(0, 1, 2)
    run.run()
    assert "probe" not in run.context(1).state  # the last round's measuring settled it
    if settings is WEIGHTS:
        assert state(run, 1) == state(stopped, 1)
    else:
        assert state(run, 1)["own-model"] != state(stopped, 1)["own-model"]  # it has not digested


def test_the_quorum_counts_those_that_were_kept():
    run = probed(0, **WEIGHTS, quorum=1.0)
    assert run.summary["rounds"] == 2 and not run.warnings()


def test_a_round_below_its_quorum_is_repeated_without_a_probe_being_done_twice():
    lost = []

    def once(instruction, reply):
        meta = instruction.metadata
        first = (meta.message_type, meta.dst_node_id, meta.group_id) == ("train.finish", 3, "2")
        if first and not lost:
            lost.append(1)
            return None
        return reply

    calm = probed(0, 1, grid=RepeatingGrid, quorum=1.0, **LOGITS, alone=False)
    run = probed(0, 1, tamper=once, grid=RepeatingGrid, quorum=1.0, **LOGITS, alone=False)
    assert lost and any("repeated" in text for text in run.warnings())
    assert run.summary["digest"] == calm.summary["digest"]
    assert [state(run, c) for c in range(3)] == [state(calm, c) for c in range(3)]


def test_no_selector_stalls_a_round():
    run = InProcessFederation(**SMALL, **WEIGHTS, select=NOBODY)
    run.driver.chooser.selector = Only()  # probes, and keeps nobody
    summary = run.run()
    assert [client["rounds"] for client in summary["clients"]] == [2, 2, 2]
    assert sum("picked nobody: everyone goes on" in text for text in run.warnings()) == 2


def test_what_a_client_tells_of_its_probe_may_be_anything():
    def odd(instruction, reply):
        if instruction.metadata.message_type == "train.probe":
            reply.content.metric_records["metrics"].update(
                {"probe_loss": math.nan, "upload-bytes": -5}
            )
            reply.content.config_records["timing"].update({"seconds": "soon"})
            if instruction.metadata.dst_node_id == 2:
                del reply.content["metrics"], reply.content["timing"]
        return reply

    run = probed(0, 1, 2, tamper=odd, **WEIGHTS)
    for probe in run.driver.chooser.selector.probed[1].values():
        assert math.isnan(probe.loss) and math.isnan(probe.seconds) and probe.upload_bytes == 0
    assert run.summary["rounds"] == 2


def test_a_decision_that_fits_no_probe_is_answered_and_harms_nothing():
    run = InProcessFederation(**SMALL, **LOGITS, alone=False)
    run.run()
    app, context = run.grid.apps[2]
    before = state(run, 0)
    reply = app(Message(RecordDict(), 2, "train.finish", group_id="2"), context)
    assert reply.content.config_records["answer"]["silent"] is True
    assert not reply.content.array_records
    assert state(run, 0) == before and edge_of(context) is not None


@pytest.mark.parametrize(
    ("count", "size"), [(0, 5), (1, 1), (1, 5), (5, 1), (6, 5), (10, 5), (11, 5)]
)
def test_batches_of_an_epoch_are_counted_as_they_are_drawn(count, size):
    assert batches_of(count, size) == len(list(one_epoch(count, size, torch_generator(1, "x"))))


def test_a_members_tags_are_told_at_join():
    run = InProcessFederation(**SMALL, **WEIGHTS)
    run.context(1).node_config["tags"] = "lab,fast"
    run.run()
    tags = {member.client: member.tags for member in run.driver.roster.members.values()}
    assert tags == {0: (), 1: ("lab", "fast"), 2: ()}
    assert Member(1, 0, "", "", 1, 1, "cpu", ()).tags == ()
