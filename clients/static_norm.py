"""Static batch normalisation at a client: the moments of its batches, and nothing of its samples.

Nothing is changed by telling them: the client's own model stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from clients import shared
from clients.common import global_model, reply
from clients.edge import OWN, Edge, edge_of
from fedkit.knowledge.arrays import as_arrays, from_state_dict
from fedkit.models.levels import label, levels_of, read_levels
from fedkit.models.narrow import at_width
from fedkit.models.normalisation import batch_moments

# (edge, message) -> the networks that the server's message is about, each with a label.
Networks: TypeAlias = Callable[[Edge, Message], Iterable[tuple[str, nn.Module]]]


def one(edge: Edge, message: Message) -> Iterable[tuple[str, nn.Module]]:
    """The network that came, which is like the own one."""
    came = message.content.array_records["arrays"].to_torch_state_dict()
    yield edge.architecture(OWN), shared.completed(edge.own, came)


def narrower(whole: Callable[[Edge], str]) -> Networks:
    """The network that came, and what it has at the narrower widths that the server names.

    Args:
        whole: the network, at its whole width, of which this device holds a part.
    """

    def networks(edge: Edge, message: Message) -> Iterable[tuple[str, nn.Module]]:
        came, config = (
            message.content.array_records["arrays"],
            message.content.config_records["config"],
        )
        own, spec = cast(float, config["width"]), whole(edge)
        for level in read_levels(cast(str, config["levels"])):
            if level == own:  # what can't be sliced has no other
                yield label(level), global_model(edge, came, at_width(spec, own))
                continue
            network = levels_of(spec, edge.data.shape, edge.outputs, own)
            kept = network.take(as_arrays(came), level)
            weights = {name: torch.from_numpy(array) for name, array in kept.items()}
            yield label(level), network.slicing.network(level, weights).to(edge.device)

    return networks


def add_statistics(app: ClientApp, networks: Networks = one) -> None:
    """Give a client app the handler ``query.statistics``.

    Args:
        app: whose other handlers train.
        networks: which networks the training data run through.
    """

    @app.query("statistics")
    def statistics(message: Message, context: Context) -> Message:
        """Of each network and layer the mean over this client's batches of their moments."""
        edge = edge_of(context)
        config = message.content.config_records["config"]
        records: dict[str, ArrayRecord | ConfigRecord] = {}
        batches = 0
        for name, network in networks(edge, message):
            size = cast(int, config["batch-size"])
            moments, batches = batch_moments(network, edge.private.train, size)
            records[name] = from_state_dict(moments)
        return reply(message, edge, {"batches": batches}, records)
