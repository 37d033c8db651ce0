"""What a server goes on with, and what it refuses to go on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord

from fedkit.engine.checkpoint import Checkpoints, Progress
from fedkit.engine.events import REWIND, Event
from fedkit.engine.history import History
from fedkit.engine.nodes import NodeFile
from fedkit.engine.plan import make_plan
from fedkit.engine.resume import can_resume, is_over, last_good, resumed_plan
from fedkit.errors import FedkitError, UsageError
from fedkit.rundir import RunDirectory


def run_of(path: Path, rounds: int, checkpoints: tuple[int, ...] = ()) -> Path:
    """A run that was killed in round ``rounds``, with checkpoints after some of those before."""
    rundir, history = RunDirectory(path), History()
    rundir.write_config(make_plan({"strategy": "fedmd", "seed": 3, "num-shards": 2}).values())
    rundir.write_text("address", "127.0.0.1:4321")
    NodeFile(path, "f00d").keep((), {})
    for round in range(1, rounds + 1):
        for event in (
            Event("round_start", round, n=2),
            Event("metric", round, "evaluate", 0, "own_model/own_test/accuracy", round / 10, 5),
            Event("round", round, name="seconds", value=0.1),
        ):
            rundir.record(event)
            history.take(event)
        if round in checkpoints:
            progress = Progress(round, history.digest(until=round), 1.0, 2, 3, (), ())
            Checkpoints(path, 9).save(progress, None, ArrayRecord())
    rundir.close()
    return path


def test_the_newest_checkpoint_that_is_whole_is_taken(tmp_path):
    run = run_of(tmp_path / "run", 4, (1, 2, 3))
    assert last_good(run, History()).progress.round == 3
    (run / "checkpoints" / "000003" / "arrays.safetensors").write_bytes(b"torn")
    assert last_good(run, History()).progress.round == 2


def test_a_checkpoint_that_does_not_fit_the_events_is_passed_over(tmp_path, caplog):
    run = run_of(tmp_path / "run", 4, (2, 3))
    with (run / "metrics.jsonl").open("a") as more:
        more.write(
            json.dumps({"time": 0, "event": "metric", "round": 3, "name": "x", "value": 1}) + "\n"
        )
    assert last_good(run, History()).progress.round == 2
    assert "passed over" in caplog.text


def test_what_was_run_again_before_counts_once(tmp_path):
    run = run_of(tmp_path / "run", 3, (2,))
    once = History()
    last_good(run, once)
    rundir = RunDirectory(run, resume=True)
    rundir.record(Event(REWIND, 3))
    rundir.record(Event("metric", 3, "evaluate", 0, "own_model/own_test/accuracy", 0.3, 5))
    rundir.close()
    again = History()
    last_good(run, again)
    assert again.digest() == once.digest()


@pytest.mark.parametrize("checkpoints", [(), (1,)])
def test_checkpoints_too_old_for_the_clients_are_refused(tmp_path, checkpoints):
    """They would train again on models that have gone on, and nobody would notice."""
    run = run_of(tmp_path / "run", 4, checkpoints)
    with pytest.raises(FedkitError, match="was in round 4"):
        last_good(run, History())


def test_a_run_killed_in_its_first_round_begins_again(tmp_path):
    assert last_good(run_of(tmp_path / "run", 1), History()) is None


def test_a_diverged_measurement_fits_its_checkpoint(tmp_path):
    run = tmp_path / "run"
    rundir, history = RunDirectory(run), History()
    for value in (float("nan"), float("inf"), 0.5):
        event = Event("metric", 1, "evaluate", 0, "own_model/own_test/loss", value, 5)
        rundir.record(event)
        history.take(event)
    rundir.close()
    Checkpoints(run).save(Progress(1, history.digest(), 1.0, 2, 3, (), ()), None, ArrayRecord())
    assert last_good(run, History()).progress.round == 1


def test_a_damaged_line_is_a_sentence(tmp_path):
    run = run_of(tmp_path / "run", 2, (1,))
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], '{"time": 1, "ev\n', *lines[1:]]))
    with pytest.raises(FedkitError, match=r"Line 2 of .* is damaged"):
        last_good(run, History())


def test_the_run_keeps_its_settings_and_its_address(tmp_path):
    run = run_of(tmp_path / "run", 1)
    plan = resumed_plan(run, {})
    assert (plan.federation.strategy, plan.federation.seed) == ("fedmd", 3)
    assert plan.server.listen == "127.0.0.1:4321"
    assert Path(plan.server.run_dir) == run


FREE: dict[str, Any] = {"rounds": 30, "round-timeout": 5.0, "quorum": 0.5, "listen": "127.0.0.1:9"}


@pytest.mark.parametrize("name", FREE)
def test_settings_on_which_no_number_hangs_may_change(tmp_path, name):
    plan = resumed_plan(run_of(tmp_path / "run", 1), {name: FREE[name]})
    assert plan.values()[name] == FREE[name]


@pytest.mark.parametrize(
    "typed", [{"seed": 4}, {"strategy": "ktpfl"}, {"digest-epochs": 7}, {"num-shards": 5}]
)
def test_settings_on_which_numbers_hang_may_not(tmp_path, typed):
    with pytest.raises(UsageError, match=f"--{next(iter(typed))}"):
        resumed_plan(run_of(tmp_path / "run", 1), typed)


def test_what_was_typed_again_as_it_was_is_no_change(tmp_path):
    resumed_plan(run_of(tmp_path / "run", 1), {"seed": "3", "strategy": "fedmd"})


@pytest.mark.parametrize("missing", ["metrics.jsonl", "config.toml", "nodes.json"])
def test_a_folder_without_a_run_cannot_be_resumed(tmp_path, missing):
    run = run_of(tmp_path / "run", 1)
    assert can_resume(run)
    (run / missing).unlink()
    assert not can_resume(run)
    with pytest.raises(UsageError, match="no run that could be resumed"):
        resumed_plan(run, {})


@pytest.mark.parametrize(
    ("summary", "over"),
    [
        ({"status": "completed", "rounds": 20}, True),
        ({"status": "completed", "rounds": 5}, False),
        ({"status": "stopped", "rounds": 20}, False),
        ({}, False),
    ],
)
def test_a_run_is_over_when_all_its_rounds_are_done(tmp_path, summary, over):
    run = run_of(tmp_path / "run", 1)
    (run / "summary.json").write_text(json.dumps(summary))
    assert is_over(resumed_plan(run, {})) is over
