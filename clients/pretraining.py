"""What a client does before its first round, where a strategy wants it: learn from the public set."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, cast

from flwr.app import ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp

from clients.common import keep, reply
from clients.edge import OWN, Edge, edge_of
from fedkit.models.losses import cross_entropy
from fedkit.models.training import make_optimiser, train

ThenPrivately: TypeAlias = Callable[[Edge, Context, ConfigRecord], dict[str, float]]


def add_init(app: ClientApp, then: ThenPrivately = lambda edge, context, config: {}) -> None:
    """Give a client app the handler ``train.init``.

    The server sends weights that learned from the public set already (``pretrain=server``), or the
    client learns from it now, if its labels are used; ``then`` follows, once in the client's life.
    The reference starts from where the own model is afterwards.
    """

    @app.train("init")
    def init(message: Message, context: Context) -> Message:
        edge = edge_of(context)
        config = message.content.config_records["config"]
        done = context.state.metric_records.get("init")
        if done is not None:
            # The reply was lost, not the training.
            return reply(message, edge, cast(dict[str, float], dict(done)))
        metrics: dict[str, float] = {}
        pretrained = message.content.array_records.get("pretrained")
        if pretrained is not None:
            edge.own.load_state_dict(pretrained.to_torch_state_dict())
        elif edge.settings.public_labels:
            metrics["pretrain_loss"] = _pretrain(edge, config)
        metrics |= then(edge, context, config)
        keep(edge, context, OWN)
        edge.start_alone(context)
        context.state["init"] = MetricRecord({**metrics})
        return reply(message, edge, metrics)


def _pretrain(edge: Edge, config: ConfigRecord) -> float:
    return train(
        edge.own,
        edge.public,
        edge.public.labels,
        cross_entropy,
        make_optimiser("adam", edge.own, cast(float, config["pretrain-rate"])),
        epochs=cast(int, config["pretrain-epochs"]),
        batch_size=cast(int, config["pretrain-batch"]),
        generator=edge.generator("pretrain", 0),
    )
