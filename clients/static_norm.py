"""Static batch normalisation at a client: the moments of its batches, and nothing of its samples.

Nothing is changed by telling them: the client's own model stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias, cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from clients import shared
from clients.common import reply
from clients.edge import Edge, edge_of
from fedkit.knowledge.arrays import as_state_dict
from fedkit.models.normalisation import batch_moments

# (edge, message) -> the networks that the server's message is about, each with a label.
Networks: TypeAlias = Callable[[Edge, Message], Iterable[tuple[str, nn.Module]]]


def _global(edge: Edge, message: Message) -> Iterable[tuple[str, nn.Module]]:
    came = as_state_dict(message.content.array_records["arrays"])
    yield "global", shared.completed(edge.own, came)


def add_statistics(app: ClientApp, networks: Networks = _global) -> None:
    """Give a client app the handler ``query.statistics``.

    Args:
        app: whose other handlers train.
        networks: which networks the training data run through; the global one.
    """

    @app.query("statistics")
    def statistics(message: Message, context: Context) -> Message:
        """Of each network and layer the mean over this client's batches of their moments."""
        edge = edge_of(context)
        config = message.content.config_records["config"]
        records: dict[str, ArrayRecord | ConfigRecord] = {}
        batches = 0
        for label, network in networks(edge, message):
            size = cast(int, config["batch-size"])
            moments, batches = batch_moments(network, edge.private.train, size)
            records[label] = ArrayRecord(dict(moments))
        return reply(message, edge, {"batches": batches}, records)
