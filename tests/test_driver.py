"""The driver and its listeners: nothing that one client does or says ends a round for the others."""

from __future__ import annotations

import json
import math
import time

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from inprocess import InProcessFederation

from fedkit.engine.events import Event
from fedkit.engine.observing import emit_metrics
from fedkit.engine.round_grid import RoundGrid
from fedkit.report import Progress
from fedkit.rundir import RunDirectory, read_events
from fedkit.settings import FederationSettings

SMALL = {
    "models": "lenet,cnn",
    "clients": 3,
    "rounds": 2,
    "local_epochs": 1,
    "distill_epochs": 1,
    "public": "digits:40",
    "partition": "iid",
}


def kind(message):
    return message.metadata.message_type


def from_client(message, client):
    return message.metadata.dst_node_id == client + 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.metric_records["metrics"].update({"train_loss": [1.0, 2.0]}),
        lambda content: content.metric_records["metrics"].update({"train_loss": math.nan}),
        lambda content: content.metric_records["metrics"].update({"num-examples": math.nan}),
        lambda content: content.metric_records["metrics"].update({"num-examples": math.inf}),
        lambda content: content.metric_records["metrics"].update(
            {f"\x1b[31m{n}": 1.0 for n in range(2000)}
        ),
        lambda content: content.config_records["timing"].update({"seconds": "soon"}),
        lambda content: content.config_records["timing"].update({"seconds": b"\x00"}),
        lambda content: content.config_records["timing"].update({"cpu-seconds": [1.0]}),
    ],
    ids=["list", "nan", "no count", "endless count", "many", "text", "bytes", "times"],
)
def test_odd_metrics_and_timings_do_not_end_the_run(spoil, tmp_path):
    def tamper(instruction, reply):
        if from_client(instruction, 1) and reply.has_content() and kind(reply) != "query.join":
            spoil(reply.content)
        return reply

    run = InProcessFederation(tamper, **SMALL)
    directory = RunDirectory(tmp_path / "out")
    summary = run.run()
    for event in run.events:
        directory.record(event)
    assert summary["rounds"] == 2 and summary["mean_global_accuracy"] is not None
    assert len(read_events(tmp_path / "out")) == len(run.events)


@pytest.mark.parametrize(
    "facts",
    [
        None,
        {"client": "zero"},
        {"client": -1},
        {"client": 0},
        {"model": b"lenet"},
        {"model": "a\nb"},
        {"classes": ["cat"]},
        {"public-digest": 5},
    ],
    ids=repr,
)
def test_a_client_that_joins_oddly_is_refused_and_the_others_go_on(facts):
    def tamper(instruction, reply):
        if kind(instruction) != "query.join" or not from_client(instruction, 2):
            return reply
        if facts is None:
            return Message(RecordDict({"other": ConfigRecord()}), reply_to=instruction)
        reply.content.config_records["join"].update(facts)
        return reply

    run = InProcessFederation(tamper, **SMALL, min_clients=2)
    summary = run.run()
    assert [client["id"] for client in summary["clients"]] == [0, 1]
    assert any("a client was refused" in text for text in run.warnings())


def test_who_does_not_answer_is_left_out_of_the_rest_of_the_round():
    def tamper(instruction, reply):
        late = kind(instruction) == "train.local" and instruction.metadata.group_id == "1"
        return None if late and from_client(instruction, 1) else reply

    run = InProcessFederation(tamper, **SMALL)
    run.run()
    asked = {
        (event.round, event.exchange)
        for event in run.events
        if event.name == "bytes_down" and event.client == 1
    }
    assert asked == {
        *[(1, "local")],
        *[(2, exchange) for exchange in ("local", "distill", "alone", "evaluate")],
    }


def test_a_slow_exchange_leaves_time_for_the_next():
    """Two exchanges to come: the first may take half of what is left, and no more."""
    asked = []

    class Slow:
        def send_and_receive(self, messages, *, timeout):
            asked.append(timeout)
            return []

    grid = RoundGrid(Slow(), [], time.monotonic() + 100)
    grid.share = 1 / 2
    grid.send_and_receive([])
    grid.share = 1.0
    grid.send_and_receive([])
    assert 49 < asked[0] <= 50 and 99 < asked[1] <= 100


def test_a_joining_that_failed_is_asked_for_again_in_the_next_round():
    failures = iter([True])

    def tamper(instruction, reply):
        join = kind(instruction) == "query.join" and from_client(instruction, 2)
        return None if join and next(failures, False) else reply

    run = InProcessFederation(tamper, **SMALL, min_clients=2)
    summary = run.run()
    assert [client["id"] for client in summary["clients"]] == [0, 1, 2]


def test_text_of_a_client_is_no_markup(capsys):
    progress = Progress(FederationSettings())
    progress.take(Event("warning", name="[/tmp/foo] and [enforce fail at alloc] [bold]"))
    progress.take(Event("join", client=1, name="[red]model[/red]", value=3))
    shown = capsys.readouterr().err
    assert "[/tmp/foo] and [enforce fail at alloc] [bold]" in shown and "[red]model[/red]" in shown


def test_metrics_are_json_also_when_a_model_diverges(tmp_path):
    directory = RunDirectory(tmp_path / "out")
    for value in (math.nan, math.inf, 0.5):
        directory.record(Event("metric", 1, "evaluate", 0, "own_model/own_test/loss", value, 9))
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert "NaN" not in "".join(lines) and "Infinity" not in "".join(lines)
    assert [json.loads(line)["value"] for line in lines] == [None, None, 0.5]


def test_the_summary_of_a_stopped_run_has_its_last_measured_accuracies():
    run = InProcessFederation(**{**SMALL, "rounds": 4}, eval_every=2)
    arrays = run.strategy.initial_arrays()
    run.driver._wait_for_clients(None)
    for server_round in (1, 2, 3):
        run.driver._round(server_round, arrays)
    summary = run.history.summary(
        run.plan.federation, "default", run.driver.roster.members.values(), status="stopped",
        stop_reason="test", engine="in-process", seconds=0.0, sent_up=None, sent_down=None,
    )  # fmt: skip
    assert summary["rounds"] == 3 and summary["mean_global_accuracy"] is not None


def test_metric_records_without_examples_are_recorded():
    run = InProcessFederation(**SMALL)
    emit_metrics(run.emit, 1, "x", 0, MetricRecord({"a": 1.5}))
    assert run.events[-1] == Event("metric", 1, "x", 0, "a", 1.5, None)
