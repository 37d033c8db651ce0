"""Prometheus metrics of a server: a listener of events, and a look at the link at each scrape.

No label's value is a peer's: exchanges, message types and codecs are the server's own words, so that
nobody can make the number of series grow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedkit import __version__
from fedkit.engine.events import REWIND, Event
from fedkit.engine.history import History
from fedkit.errors import FedkitError, UsageError
from fedkit.settings import FederationSettings

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3600.0)
OUTCOMES = ("answered", "lost", "late", "duplicate", "unasked", "refused")
LEFT_OUT = ("error", "rejected")
LOOPBACK = "127.0.0.1"


class Link(Protocol):
    """What is read of the link: who is connected, what it carried, what came of instructions."""

    @property
    def bytes_sent(self) -> Mapping[str, int]:
        """Bytes carried to clients, by kind of instruction."""
        ...

    @property
    def bytes_received(self) -> Mapping[str, int]:
        """Bytes carried from clients, by kind of instruction."""
        ...

    @property
    def outcomes(self) -> Mapping[str, int]:
        """What came of instructions and greetings."""
        ...

    def node_ids(self) -> list[int]:
        """The nodes that are connected now."""
        ...


def metrics_address(text: str) -> tuple[str, int] | None:
    """Where ``--metrics-port`` says that metrics are served; None if they are not.

    Raises:
        UsageError: it is neither PORT nor HOST:PORT.
    """
    host, colon, port = text.rpartition(":")
    if not text or text == "0":
        return None
    if (colon and not host) or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise UsageError(
            f"metrics-port takes PORT or HOST:PORT, as in 9090 or 0.0.0.0:9090, not {text!r}."
        )
    return host.strip("[]") or LOOPBACK, int(port)


class Metrics:
    """The series of one server, in a registry of their own."""

    def __init__(self, settings: FederationSettings) -> None:
        """Series of a run with these settings; nothing is served yet."""
        self._codec = settings.codec
        self._round_history = History()
        self._server: WSGIServer | None = None
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("fedkit", "What runs here", registry=registry).info(
            {
                "version": __version__,
                "strategy": settings.strategy,
                "dataset": settings.dataset,
                "codec": settings.codec,
            }
        )
        self._planned = Gauge("fedkit_rounds_planned", "Rounds of the run", registry=registry)
        self._planned.set(settings.rounds)
        self._round = Gauge("fedkit_round", "The round under way", registry=registry)
        self._phases = Histogram(
            "fedkit_phase_seconds",
            "Wall time of an exchange with all clients",
            ["exchange"],
            buckets=SECONDS,
            registry=registry,
        )
        self._rounds = Histogram(
            "fedkit_round_seconds",
            "Wall time of a round, measuring left out",
            buckets=SECONDS,
            registry=registry,
        )
        self._payload = Counter(
            "fedkit_payload_bytes_total",
            "Bytes of the tensors sent to clients (down) and received from them (up)",
            ["direction", "exchange", "codec"],
            registry=registry,
        )
        self._left_out = Counter(
            "fedkit_replies_left_out_total",
            "Replies that came and did not count: the client's error, or rejected here",
            ["reason"],
            registry=registry,
        )
        for reason in LEFT_OUT:
            self._left_out.labels(reason)
        self._joins = Counter("fedkit_joins_total", "Clients let in", registry=registry)
        self._warnings = Counter("fedkit_warnings_total", "Warnings given", registry=registry)
        self._rewinds = Counter(
            "fedkit_rewinds_total",
            "Rounds that were begun again or skipped: below quorum, or after a restart",
            registry=registry,
        )
        self._accuracy = Gauge(
            "fedkit_accuracy",
            "Mean accuracy of the last measured round, on the clients' own test data (personal) "
            "and the common test set (global)",
            ["mean"],
            registry=registry,
        )

    def take(self, event: Event) -> None:
        """Count one event in."""
        if event.event == "round_start":
            self._round.set(event.round or 0)
            self._round_history = History()
        elif event.event == "exchange":
            self._phases.labels(event.exchange).observe(event.value)
        elif event.event == "bytes":
            direction = "up" if event.name == "bytes_up" else "down"
            self._payload.labels(direction, event.exchange, self._codec).inc(event.value)
        elif event.event == "join":
            self._joins.inc()
        elif event.event == "warning":
            self._warnings.inc()
            if event.value in LEFT_OUT:
                self._left_out.labels(event.value).inc()
        elif event.event == REWIND:
            self._rewinds.inc()
        self._round_history.take(event)
        if event.event == "round" and event.name == "seconds":
            self._rounds.observe(event.value)
            self._tell_accuracy()

    def watch(self, link: Link) -> None:
        """Read ``link`` whenever somebody scrapes."""
        self.registry.register(_LinkCollector(link))

    def serve(self, host: str, port: int) -> str:
        """Answer scrapes on a thread of their own; returns the address.

        Raises:
            FedkitError: the port is in use, or the address is not this machine's.
        """
        try:
            self._server, _ = start_http_server(port, host, self.registry)
        except OSError as error:
            raise FedkitError(
                f"Metrics can't be served on {host}:{port} ({error.strerror or error}): choose "
                "another --metrics-port."
            ) from error
        return f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Stop answering."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _tell_accuracy(self) -> None:
        row = self._round_history.last_round()
        for mean in ("personal", "global"):
            accuracy = row[f"mean_{mean}_accuracy"]
            if accuracy is not None:
                self._accuracy.labels(mean).set(accuracy)


class _LinkCollector(Collector):
    def __init__(self, link: Link) -> None:
        self._link = link

    def collect(self) -> Iterator[Metric]:
        connected = len(self._link.node_ids())
        yield GaugeMetricFamily(
            "fedkit_connected_clients", "Clients that are connected now", value=connected
        )
        carried = CounterMetricFamily(
            "fedkit_link_bytes",
            "Bytes of frames that the link carried, by type of message",
            labels=("direction", "kind"),
        )
        ways = ("down", self._link.bytes_sent), ("up", self._link.bytes_received)
        for direction, counter in ways:
            for kind, size in dict(counter).items():
                carried.add_metric((direction, kind), size)
        yield carried
        replies = CounterMetricFamily(
            "fedkit_replies",
            "What came of instructions, replies and greetings",
            labels=("outcome",),
        )
        outcomes = dict(self._link.outcomes)
        for outcome in OUTCOMES:
            replies.add_metric((outcome,), outcomes.get(outcome, 0))
        yield replies
