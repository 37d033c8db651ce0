"""What goes out in an exchange and what comes back, told in events as it passes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator

from flwr.app import ConfigRecord, Message, MetricRecord

from fedkit.engine.events import APART, Event, Listener
from fedkit.engine.seen import LONGEST_S
from fedkit.flower import is_failure, payload_bytes
from fedkit.flower_records import record_in

METRICS_TAKEN, LONGEST_NAME = 500, 200
# By node id, the client's index.
ClientOf = Callable[[int], int | None]


class Observed:
    """One exchange of one round, as its messages pass through."""

    def __init__(self, server_round: int, name: str, client: ClientOf, emit: Listener) -> None:
        """An exchange of which nothing has passed yet."""
        self._round, self._name = server_round, name
        self._client, self._emit = client, emit
        self._sent_at: dict[int, float] = {}
        self.answered = 0
        self.silent: set[int] = set()

    @property
    def asked(self) -> int:
        """How many instructions went out."""
        return len(self._sent_at)

    def outgoing(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Instructions, passed on as they are made."""
        for message in messages:
            node, size = message.metadata.dst_node_id, payload_bytes(message)
            self._sent_at[node] = message.metadata.created_at
            self._tell("bytes", self._client(node), "bytes_down", size)
            yield message

    def incoming(
        self, replies: Iterable[Message], allowed: Callable[[], float]
    ) -> Iterator[Message]:
        """Replies, passed on as they come.

        Args:
            replies: in client order.
            allowed: how long, in seconds, a client that does not answer was given.
        """
        for reply in replies:
            node = reply.metadata.src_node_id
            client = self._client(node)
            if reply.has_error():
                self.silent.add(node)
                text = f"client {client} did not answer: {reply.error.reason}"
                self._tell("warning", client, text, "error" if is_failure(reply) else None)
                if self._name not in APART:
                    self._tell("missed", client, "seconds", allowed())
                yield reply
                continue
            self.answered += 1
            self._tell("bytes", client, "bytes_up", payload_bytes(reply))
            for record in reply.content.values():
                if isinstance(record, MetricRecord):
                    emit_metrics(self._emit, self._round, self._name, client, record)
            timing = record_in(reply.content, "timing", ConfigRecord)
            for name, value in self._times(node, reply, timing).items():
                self._tell("timing", client, name, value)
            yield reply

    def _times(self, node: int, reply: Message, timing: ConfigRecord) -> dict[str, float]:
        """What the client told, and what its reply took beside its work, if it does not tell that."""
        told = {
            name: value
            for name, value in timing.items()
            if isinstance(value, float) and 0 <= value <= LONGEST_S
        }
        worked = told.get("seconds", math.nan)
        passed = reply.metadata.created_at - self._sent_at.get(node, math.nan)
        if not math.isnan(passed - worked):
            # Both ends of it by the server's clock, where the grid notes when a reply has come.
            told.setdefault("transfer-seconds", max(0.0, passed - worked))
        return told

    def _tell(self, event: str, client: int | None, name: str, value: object) -> None:
        self._emit(Event(event, self._round, self._name, client, name, value))


def emit_metrics(
    emit: Listener, server_round: int, exchange: str, client: int | None, record: MetricRecord
) -> None:
    """Tell what a record measured; ``n`` from ``num-examples``, or from the metric's own ``/n``."""
    examples = record.get("num-examples")
    for name, value in itertools.islice(record.items(), METRICS_TAKEN):
        if name == "num-examples" or name.endswith("/n") or not isinstance(value, int | float):
            continue
        # A client may say what it likes, and it ends up in files and on screens.
        if not name.isprintable() or len(name) > LONGEST_NAME:
            continue
        n = record.get(f"{name.rpartition('/')[0]}/n", examples)
        count = int(n) if isinstance(n, int | float) and math.isfinite(n) else None
        emit(Event("metric", server_round, exchange, client, name, value, count))
