"""A client that trains its own model alone."""

from __future__ import annotations

from flwr.app import Context, Message

from clients.common import client_app, reply
from clients.edge import OWN, edge_of
from clients.private import local_epochs

app = client_app(local_epochs)


@app.train()
def train(message: Message, context: Context) -> Message:
    """A round's epochs on the private data."""
    edge = edge_of(context)
    loss = local_epochs(edge, context, OWN, message.content.config_records["config"])
    return reply(message, edge, {"train_loss": loss})
