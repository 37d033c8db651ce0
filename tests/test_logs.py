"""`--log-format json`: everything on stderr is one JSON object a line, wherever the option stands."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

import pytest
from processes import Process, fedkit, until

from fedkit.cli.app import _global_first
from fedkit.cli.logs import EventLog, JsonFormatter
from fedkit.engine.events import Event
from fedkit.settings import FederationSettings


def parsed(text: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert {"time", "level", "logger", "message"} <= line.keys(), line
        assert line["time"].endswith("Z")
        assert datetime.fromisoformat(line["time"]).tzinfo == UTC
    return lines


@pytest.fixture
def told(caplog):
    """Logs some events; gives what the lines hold."""

    def log(*events: Event, level: int = logging.INFO) -> list[dict[str, Any]]:
        caplog.clear()
        with caplog.at_level(level, logger="fedkit.run"):
            listener = EventLog(FederationSettings(rounds=3))
            for event in events:
                listener.take(event)
            listener.close()
        return parsed("\n".join(map(JsonFormatter().format, caplog.records)))

    return log


def test_an_event_is_a_line_with_its_fields(told):
    (line,) = told(Event("join", client=1, name="lenet (61,706 parameters) on cpu", value=195))
    assert (line["level"], line["event"], line["client"], line["value"]) == ("info", "join", 1, 195)
    assert line["message"] == "client 1 joined: lenet (61,706 parameters) on cpu, 195 samples"
    assert "round" not in line and "exchange" not in line


def test_a_warning_is_one(told):
    (line,) = told(Event("warning", 2, "local", 3, 'it said "no"\nand went'))
    assert (line["level"], line["round"], line["client"]) == ("warning", 2, 3)
    assert line["message"] == 'it said "no"\nand went'


def test_a_round_tells_its_means_and_details_are_for_debugging(told):
    events = (
        Event("round_start", 1, n=1),
        Event("bytes", 1, "local", 0, "bytes_up", 30),
        Event("metric", 1, "evaluate", 0, "own_model/own_test/accuracy", 0.5, 10),
        Event("round", 1, None, None, "seconds_server", float("nan")),
        Event("round", 1, None, None, "seconds", 6.0, 1),
    )
    start, end = told(*events)
    assert start["event"] == "round_start"
    assert end["message"] == "round 1/3" and end["event"] == "round"
    assert (end["seconds"], end["bytes_up"], end["mean_personal_accuracy"]) == (6.0, 30, 0.5)
    # JSON has no NaN.
    assert end["seconds_server"] is None
    assert [line["event"] for line in told(*events, level=logging.DEBUG)] == [
        "round_start",
        "bytes",
        "metric",
        "round",
    ]


def test_an_exception_is_within_the_line():
    try:
        raise ValueError("this one")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "", 0, "%s", ("b",), sys.exc_info())
    (line,) = parsed(JsonFormatter().format(record))
    assert line["message"] == "b" and "ValueError: this one" in line["exception"]


@pytest.mark.parametrize(
    ("words", "sorted_words"),
    [
        (["run", "-q", "--rounds", "2"], ["-q", "run", "--rounds", "2"]),
        (["server", "--log-format", "json"], ["--log-format", "json", "server"]),
        (["server", "--log-format=json", "-v"], ["--log-format=json", "-v", "server"]),
        (["--log-format", "json", "server"], ["--log-format", "json", "server"]),
        (["server", "--log-format"], ["--log-format", "server"]),
    ],
)
def test_global_options_stand_anywhere(words, sorted_words):
    assert _global_first(words) == sorted_words


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["list", "modelz"], "did you mean models"),
        (["list", "models", "--nonsense"], "--nonsense"),
        (["nonsense"], "nonsense"),
        (["client", "--data-shard", "x"], "--data-shard takes a number"),
    ],
)
def test_an_error_is_a_line_too(tmp_path, typed, words):
    ran = fedkit(*typed, "--log-format", "json", folder=tmp_path)
    assert ran.returncode == 2 and ran.stdout == ""
    (line,) = parsed(ran.stderr)
    assert line["level"] == "error" and words in line["message"]


def test_an_unknown_format(tmp_path):
    ran = fedkit("list", "models", "--log-format=xml", folder=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr == "Error: --log-format takes text or json, not 'xml'.\n"


def test_a_whole_run_of_server_and_client(tmp_path):
    typed = ("server", "--strategy", "fedavg", "--rounds", "1", "--min-clients", "1")
    typed += ("--listen", "127.0.0.1:0", "--run-dir", "run", "--log-format", "json")
    with Process(*typed, "--format", "json", folder=tmp_path, name="server") as server:
        file = tmp_path / "run" / "address"
        until(lambda: file.exists() or server.process.poll() is not None)
        typed = ("client", "--data-shard", "0", "--server", file.read_text(), "--device", "cpu")
        client = fedkit(*typed, "--log-format", "json", folder=tmp_path)
        assert server.wait() == 0, server.text
    assert client.returncode == 0, client.stderr
    messages = [line["message"] for line in parsed(client.stderr)]
    assert any(message.startswith("Connected to ") for message in messages)
    log, brace, result = server.text.partition("\n{\n")
    assert json.loads(brace + result)["status"] == "completed"
    lines = parsed(log)
    seen = [line["event"] for line in lines if "event" in line]
    assert seen[0] == "listen" and seen[-1] == "stop"
    assert {"join", "round_start", "exchange", "round"} <= set(seen)
