"""FedAvg's client half (McMahan et al. 2017, algorithm 1, ClientUpdate): E epochs of SGD."""

from __future__ import annotations

from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message

from clients.common import client_app, keep, reply
from clients.edge import OWN, Edge, edge_of
from clients.training import cross_entropy, make_optimiser, train


def local_work(edge: Edge, context: Context, slot: str, config: ConfigRecord) -> float:
    """E epochs of cross-entropy on the private data; the optimiser starts afresh each round."""
    model = edge.models[slot]
    round = cast(int, config["server-round"])
    optimiser = make_optimiser(
        "sgd", model, cast(float, config["learning-rate"]), cast(float, config["momentum"])
    )
    data = edge.private.train
    loss = train(
        model,
        data,
        data.labels,
        cross_entropy,
        optimiser,
        epochs=cast(int, config["local-epochs"]),
        batch_size=cast(int, config["batch-size"]),
        generator=edge.generator("local", round),
    )
    keep(edge, context, slot)
    return loss


app = client_app(local_work)


@app.train()
def train_global(message: Message, context: Context) -> Message:
    """Load the global weights w, train, return w_k and n_k."""
    edge = edge_of(context)
    config = message.content.config_records["config"]
    edge.own.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    if "reference" not in context.state:
        # The reference starts where the client first met the federation.
        edge.start_alone(context)
        context.state["reference"] = ConfigRecord({"since": config["server-round"]})
    loss = local_work(edge, context, OWN, config)
    arrays = ArrayRecord(edge.own.state_dict())
    return reply(message, edge, {"train_loss": loss}, {"arrays": arrays})
