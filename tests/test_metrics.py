"""Prometheus metrics, read as Prometheus reads them: over HTTP."""

from __future__ import annotations

import urllib.request
from collections import Counter
from collections.abc import Iterator

import pytest
from processes import LONG, Process, fedkit, free_port, until
from prometheus_client.parser import text_string_to_metric_families

from fedkit.engine.events import REWIND, Event
from fedkit.engine.metrics import Metrics, metrics_address
from fedkit.errors import FedkitError, UsageError
from fedkit.link.server import LinkServer
from fedkit.settings import FederationSettings

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


class FakeLink:
    """What the metrics read of a link."""

    def __init__(self) -> None:
        self.bytes_sent = Counter({"train.local": 700})
        self.bytes_received = Counter({"train.local": 300, "query.join": 5})
        self.outcomes = Counter({"answered": 4, "late": 1})
        self.connected = [2, 3]

    def node_ids(self) -> list[int]:
        return self.connected


def scrape(address: str) -> Series:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=LONG) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(series: Series, name: str, **labels: str) -> float | None:
    return series.get((name, frozenset(labels.items())))


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    made = Metrics(FederationSettings(codec="int8", rounds=3))
    yield made
    made.close()


def test_events_become_series(metrics):
    for event in (
        Event("join", client=0, name="lenet", value=10),
        Event("join", client=1, name="cnn", value=10),
        Event("round_start", 1, n=2),
        Event("bytes", 1, "local", 0, "bytes_down", 100),
        Event("bytes", 1, "local", 1, "bytes_down", 50),
        Event("bytes", 1, "local", 0, "bytes_up", 30),
        Event("exchange", 1, "local", None, "seconds", 0.02, 2),
        Event("exchange", 1, "digest", None, "seconds", 5.0, 2),
        Event("warning", 1, "local", 1, "it said nothing"),
        Event("warning", 1, "local", 1, "NaN came", "rejected"),
        Event("warning", 1, "local", 1, "its code failed", "error"),
        Event("metric", 1, "evaluate", 0, "own_model/own_test/accuracy", 0.5, 10),
        Event("metric", 1, "evaluate", 1, "own_model/own_test/accuracy", 0.9, 10),
        Event("metric", 1, "evaluate", 0, "own_model/global_test/accuracy", 0.2, 10),
        Event("round", 1, None, None, "seconds_server", 0.5),
        Event("round", 1, None, None, "seconds", 6.0, 2),
        # A round that is not measured leaves the last accuracies standing.
        Event("round_start", 2, n=2),
        Event("round", 2, None, None, "seconds", 7.0, 2),
        Event("round_start", 3, n=2),
        Event(REWIND, 3, name="1 of 2 clients were there"),
    ):
        metrics.take(event)
    series = scrape(metrics.serve("127.0.0.1", 0))
    assert value(series, "fedkit_round") == 3
    assert value(series, "fedkit_rounds_planned") == 3
    assert value(series, "fedkit_joins_total") == 2
    assert value(series, "fedkit_warnings_total") == 3
    assert value(series, "fedkit_replies_left_out_total", reason="rejected") == 1
    assert value(series, "fedkit_replies_left_out_total", reason="error") == 1
    assert value(series, "fedkit_rewinds_total") == 1
    assert value(series, "fedkit_round_seconds_count") == 2
    assert value(series, "fedkit_round_seconds_sum") == 13
    assert value(series, "fedkit_phase_seconds_sum", exchange="digest") == 5
    assert value(series, "fedkit_phase_seconds_bucket", exchange="local", le="0.03") == 1
    carried = {"exchange": "local", "codec": "int8"}
    assert value(series, "fedkit_payload_bytes_total", direction="down", **carried) == 150
    assert value(series, "fedkit_payload_bytes_total", direction="up", **carried) == 30
    assert value(series, "fedkit_accuracy", mean="personal") == pytest.approx(0.7)
    assert value(series, "fedkit_accuracy", mean="global") == pytest.approx(0.2)


def test_the_link_is_read_at_each_scrape(metrics):
    link = FakeLink()
    metrics.watch(link)
    address = metrics.serve("127.0.0.1", 0)
    series = scrape(address)
    assert value(series, "fedkit_connected_clients") == 2
    assert value(series, "fedkit_link_bytes_total", direction="down", kind="train.local") == 700
    assert value(series, "fedkit_link_bytes_total", direction="up", kind="query.join") == 5
    assert value(series, "fedkit_replies_total", outcome="answered") == 4
    assert value(series, "fedkit_replies_total", outcome="lost") == 0
    link.connected, link.outcomes["lost"] = [], 2
    series = scrape(address)
    assert value(series, "fedkit_connected_clients") == 0
    assert value(series, "fedkit_replies_total", outcome="lost") == 2


def test_a_real_link_can_be_watched(metrics):
    link = LinkServer(lambda hello, node: {}, lambda node: None)
    link.listen("127.0.0.1:0")
    try:
        metrics.watch(link)
        assert value(scrape(metrics.serve("127.0.0.1", 0)), "fedkit_connected_clients") == 0
    finally:
        link.close("")


def test_two_servers_in_one_process_do_not_meet(metrics):
    other = Metrics(FederationSettings())
    other.take(Event("join"))
    assert value(scrape(metrics.serve("127.0.0.1", 0)), "fedkit_joins_total") == 0


def test_a_port_that_is_taken_is_a_sentence(metrics):
    other = Metrics(FederationSettings())
    address = metrics.serve("127.0.0.1", 0)
    with pytest.raises(FedkitError, match=r"can't be served on .*another --metrics-port"):
        other.serve("127.0.0.1", int(address.rpartition(":")[2]))
    other.close()


def test_closed_is_closed(metrics):
    address = metrics.serve("127.0.0.1", 0)
    metrics.close()
    with pytest.raises(OSError):
        scrape(address)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("", None),
        ("0", None),
        ("9090", ("127.0.0.1", 9090)),
        ("0.0.0.0:9090", ("0.0.0.0", 9090)),
        ("[::1]:9090", ("::1", 9090)),
    ],
)
def test_where_metrics_are_served(text, address):
    assert metrics_address(text) == address


@pytest.mark.parametrize("text", ["x", ":9090", "99999", "host:", "host:0", "-1", "٣"])
def test_where_metrics_are_not_served(text):
    with pytest.raises(UsageError, match="PORT or HOST:PORT"):
        metrics_address(text)


def test_a_wrong_port_is_refused_before_anything_starts(tmp_path):
    ran = fedkit("server", "--listen", "127.0.0.1:0", "--metrics-port", "many", folder=tmp_path)
    assert ran.returncode == 2
    assert "metrics-port takes PORT" in ran.stderr
    assert not (tmp_path / "runs").exists()


def test_a_real_server_is_scraped(tmp_path):
    port = str(free_port())
    typed = ("server", "--strategy", "fedavg", "--rounds", "500", "--min-clients", "1")
    typed += ("--listen", "127.0.0.1:0", "--run-dir", "run", "--metrics-port", port)
    with Process(*typed, "-o", "local-epochs=1", folder=tmp_path, name="server") as server:
        series = until(lambda: scraped(port) or server.process.poll() is not None)
        file = tmp_path / "run" / "address"
        assert value(series, "fedkit_connected_clients") == 0
        assert value(series, "fedkit_rounds_planned") == 500
        typed = ("client", "--data-shard", "0", "--server", file.read_text(), "--device", "cpu")
        with Process(*typed, folder=tmp_path, name="client"):
            seen = until(lambda: joined(port) or server.process.poll() is not None)
            assert value(seen, "fedkit_joins_total") == 1
            assert value(seen, "fedkit_connected_clients") == 1
        server.stop()
        server.wait()


def scraped(port: str) -> Series | None:
    try:
        return scrape(f"127.0.0.1:{port}")
    except OSError:
        return None


def joined(port: str) -> Series | None:
    series = scraped(port)
    return series if series and value(series, "fedkit_joins_total") else None
