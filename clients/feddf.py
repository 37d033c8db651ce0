"""FedDF's client half (Lin et al. 2020): train and return the model, or answer and digest in logits."""

from __future__ import annotations

from typing import cast

from flwr.app import ConfigRecord, Context, Message

from clients import public, updates
from clients.common import client_app
from clients.digesting import add_local, digested
from clients.edge import OWN, Edge, edge_of
from clients.fedavg import add_train
from clients.private import local_epochs, private_optimiser, with_revisit
from clients.static_norm import add_statistics
from fedkit.models.losses import towards


def local_work(edge: Edge, context: Context, slot: str, config: ConfigRecord) -> float:
    """A round's private training; only what exchanges logits revisits."""
    train = with_revisit if config["exchange"] == "logits" else local_epochs
    return train(edge, context, slot, config)


app = client_app(local_work, updates.upload_bytes)
add_train(app)
add_statistics(app)
add_local(app)


@app.train("digest")
def digest(message: Message, context: Context) -> Message:
    """Learn from what the server's students say on the subset just answered; revisit the own data."""
    edge = edge_of(context)
    config = message.content.config_records["config"]
    temperature = cast(float, config["temperature"])
    optimiser = private_optimiser(edge, context, OWN, config, "digest")
    told = public.digest(
        edge,
        public.targets(message, context, edge),
        towards(
            cast(str, config["digest-loss"]),
            space=cast(str, config["space"]),
            temperature=temperature,
            scale=temperature**2 if config["digest-loss"] == "kl" else 1.0,
        ),
        optimiser,
        epochs=cast(int, config["digest-epochs"]),
        batch_size=cast(int, config["digest-batch"]),
        generator=edge.generator("digest", cast(int, config["server-round"])),
    )
    return digested(message, context, edge, optimiser, told)
