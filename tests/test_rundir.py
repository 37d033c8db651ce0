"""The run directory and the history: what a run that was broken off and goes on says of itself."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedkit.engine.events import REWIND, Event
from fedkit.engine.history import History
from fedkit.errors import FedkitError, UsageError
from fedkit.rundir import RunDirectory, read_events

ACCURACY = "own_model/own_test/accuracy"


def of_round(at: int, value: float) -> list[Event]:
    """All that is told of a round."""
    return [
        Event("round_start", at, n=2),
        Event("bytes", at, "local", 0, "bytes_down", 10 * at),
        Event("bytes", at, "local", 0, "bytes_up", 20 * at),
        Event("timing", at, "local", 0, "seconds", value),
        Event("metric", at, "evaluate", 0, ACCURACY, value, 9),
        Event("round", at, None, None, "seconds_server", 0.1),
        Event("round", at, None, None, "seconds", value, 2),
    ]


def told(*events: Event) -> History:
    history = History()
    for event in events:
        history.take(event)
    return history


def written(path: Path, *events: Event, resume: bool = False) -> None:
    directory = RunDirectory(path, resume=resume)
    for event in events:
        directory.record(event)
    directory.close()


def of(records: list[dict[str, Any]]) -> list[Event]:
    return [Event(**{k: v for k, v in record.items() if k != "time"}) for record in records]


START, JOIN = Event("start", name="fedmd"), Event("join", client=0, name="lenet", value=9)
REWOUND = [START, JOIN, *of_round(1, 0.1), *of_round(2, 0.2), *of_round(3, 0.3)]
AGAIN = [Event(REWIND, 2, name="the run goes on with round 2"), *of_round(2, 0.25)]


# The history.


def test_a_rewind_forgets_that_round_and_those_after_it():
    """Numbers, bytes and times are as if the rounds had never been run before."""
    history = told(*REWOUND, *AGAIN)
    plain = told(START, JOIN, *of_round(1, 0.1), *of_round(2, 0.25))
    assert history.digest() == plain.digest()
    assert history.rounds() == plain.rounds()
    assert [row["round"] for row in history.rounds()] == [1, 2]
    assert history.last_round() == history.rounds()[-1]


def test_a_rewind_to_what_is_yet_to_come_forgets_nothing():
    assert told(*REWOUND, Event(REWIND, 4)).digest() == told(*REWOUND).digest()
    assert len(told(*REWOUND, Event(REWIND, 4)).rounds()) == 3


def test_a_rewind_to_the_first_round_forgets_all():
    assert told(*REWOUND, Event(REWIND, 1)).digest() == told(START, JOIN).digest()


def test_a_digest_until_a_round_is_that_of_a_run_that_ended_there():
    history = told(*REWOUND)
    for until in (1, 2, 3):
        events = [event for event in REWOUND if (event.round or 0) <= until]
        assert history.digest(until) == told(*events).digest()
    assert len({history.digest(until) for until in range(4)}) == 4


def test_times_are_no_part_of_the_digest():
    slow = [
        Event(e.event, e.round, e.exchange, e.client, e.name, 99.0, e.n)
        if e.event in ("timing", "round")
        else e
        for e in REWOUND
    ]
    assert told(*slow).digest() == told(*REWOUND).digest()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.1 + 0.2, 1e-310, None])
def test_a_history_read_back_from_the_file_is_the_same(tmp_path, value):
    events = [START, Event("metric", 1, "evaluate", 0, ACCURACY, value, 9)]
    written(tmp_path / "run", *events)
    read = of(read_events(tmp_path / "run", everything=True))
    assert told(*read).digest() == told(*events).digest()


# The records.


def test_records_that_were_superseded_are_left_out_unless_asked_for(tmp_path):
    written(tmp_path / "run", *REWOUND)
    written(tmp_path / "run", *AGAIN, resume=True)
    counting = of(read_events(tmp_path / "run"))
    assert counting == [START, JOIN, *of_round(1, 0.1), *AGAIN]
    assert of(read_events(tmp_path / "run", everything=True)) == [*REWOUND, *AGAIN]
    assert told(*counting).digest() == told(*REWOUND, *AGAIN).digest()


def test_a_run_may_be_rewound_more_than_once(tmp_path):
    back = Event(REWIND, 2, name="again")
    written(tmp_path / "run", *REWOUND, *AGAIN, back, *of_round(2, 0.4), *of_round(3, 0.5))
    counting = of(read_events(tmp_path / "run"))
    assert counting == [START, JOIN, *of_round(1, 0.1), back, *of_round(2, 0.4), *of_round(3, 0.5)]


@pytest.mark.parametrize("torn", ['{"time": 1, "event": "met', "{", '{"event": "x"}', "\x00" * 40])
def test_a_torn_last_line_is_dropped_at_resume(tmp_path, torn):
    """A line counts once its end is there: what is written next must not be glued to it."""
    run = tmp_path / "run"
    written(run, *REWOUND)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert of(read_events(run)) == REWOUND
    written(run, *AGAIN, resume=True)
    assert of(read_events(run, everything=True)) == [*REWOUND, *AGAIN]


def test_a_file_of_one_torn_line_is_begun_anew(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"eve')
    written(run, START, resume=True)
    assert of(read_events(run)) == [START]


def test_texts_of_any_kind_are_one_line_each(tmp_path):
    events = [Event("warning", name=text) for text in ("two\nlines", "\u2028", "ü", "\x0b\x1c")]
    written(tmp_path / "run", *events)
    assert of(read_events(tmp_path / "run")) == events


# Who may write there.


def test_a_folder_with_a_run_is_not_begun_again(tmp_path):
    written(tmp_path / "run", START)
    with pytest.raises(UsageError, match=r"holds a run already.*--resume"):
        RunDirectory(tmp_path / "run")


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_without_a_run_is_not_resumed(tmp_path, made):
    if made:
        (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match="no run that could be resumed"):
        RunDirectory(tmp_path / "run", resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_two_servers_in_one_run_directory_are_refused(tmp_path, resume):
    path = tmp_path / "run"
    if resume:
        written(path, START)
    first = RunDirectory(path, resume=resume)
    with pytest.raises(FedkitError, match="Another server is at work"):
        RunDirectory(path, resume=resume)
    first.record(JOIN)
    first.close()
    written(path, START, resume=True)
    assert of(read_events(path)) == [*([START] if resume else []), JOIN, START]


HOLD = """
import sys
from pathlib import Path
from fedkit.engine.events import Event
from fedkit.rundir import RunDirectory
held = RunDirectory(Path(sys.argv[1]))
held.record(Event("start", name="of the other"))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_killed_server_lets_go_of_its_directory(tmp_path):
    path = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(FedkitError, match="Another server is at work"):
            RunDirectory(path, resume=True)
        other.send_signal(signal.SIGKILL)
        other.wait(30)
    written(path, JOIN, resume=True)
    assert of(read_events(path)) == [Event("start", name="of the other"), JOIN]


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FedkitError, match="can't be made"):
        RunDirectory(tmp_path / "file" / "run")
