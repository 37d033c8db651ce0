"""FedAvg's client half (McMahan et al. 2017, algorithm 1, ClientUpdate): E epochs of SGD."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from clients import shared, updates
from clients.common import client_app
from clients.edge import OWN, Edge, edge_of
from clients.personal import fine_tuned
from clients.private import local_epochs
from clients.static_norm import add_statistics
from fedkit.knowledge.arrays import as_state_dict


def update(edge: Edge, context: Context, config: ConfigRecord) -> dict[str, float]:
    """The E epochs, and what they tell."""
    return {"train_loss": local_epochs(edge, context, OWN, config)}


def _as_it_is(edge: Edge, context: Context, config: ConfigRecord) -> None:
    """The own model is what the one that comes is loaded into."""


def _nothing(edge: Edge, config: ConfigRecord) -> Mapping[str, ConfigRecord]:
    return {}


def add_train(
    app: ClientApp,
    update: Callable[[Edge, Context, ConfigRecord], dict[str, float]] = update,
    *,
    prepare: Callable[[Edge, Context, ConfigRecord], None] = _as_it_is,
    beside: Callable[[Edge, ConfigRecord], Mapping[str, ConfigRecord]] = _nothing,
) -> None:
    """Give a client app the handler ``train``: load the model that came, train it, return it.

    Args:
        app: the client app.
        update: trains the own model and tells how it went.
        prepare: makes the own model one that fits what came.
        beside: records that the reply holds beside the model.
    """

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Load the global weights w, train, return w_k and n_k."""
        edge = edge_of(context)
        config = message.content.config_records["config"]
        came = message.content.array_records["arrays"]
        prepare(edge, context, config)
        shared.load(edge.own, as_state_dict(came))
        if "reference" not in context.state:
            # The reference starts where the client first met the federation.
            edge.start_alone(context)
            context.state["reference"] = ConfigRecord({"since": config["server-round"]})
        with shared.training(edge.own, config):
            told = update(edge, context, config)
        arrays = shared.back(edge.own, came, config)
        answer = updates.answer(message, context, edge, edge.own, arrays, told)
        for name, record in beside(edge, config).items():
            answer.content[name] = record
        return answer


app = client_app(local_epochs, updates.upload_bytes, fine_tuned)
add_train(app)
add_statistics(app)
