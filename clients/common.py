"""What every client does alike: join, be measured, and train the reference that never exchanges."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from clients import memory, probing, shared
from clients.edge import ALONE, OWN, Edge, edge_of, whole
from clients.joining import PublicMissing, take_offer
from fedkit.data.samples import Samples
from fedkit.knowledge.arrays import as_state_dict
from fedkit.models.build import parameter_count, restored
from fedkit.models.device import leave_to_others, seed_torch
from fedkit.models.measure import measure
from fedkit.registry import names
from fedkit.seeds import derive

LocalWork: TypeAlias = Callable[[Edge, Context, str, ConfigRecord], float]
# (edge, context, config, global model) -> what this client itself would use, where that is another.
Personal: TypeAlias = Callable[
    [Edge, Context, ConfigRecord, torch.nn.Module], torch.nn.Module | None
]
# (edge without its models, context) -> the name of the network that this device trains.
Fit: TypeAlias = Callable[[Edge, Context], str]


def client_app(
    local_work: LocalWork,
    upload: probing.Upload = probing.default_upload,
    personal: Personal = lambda edge, context, config, model: None,
    fit: Fit = whole,
    slot: str = OWN,
) -> ClientApp:
    """A Flower ``ClientApp`` with the handlers that all strategies share.

    Args:
        local_work: ``(edge, context, slot, config) -> loss``: the private training of one round on
            the model in ``slot``; the reference does this and nothing else.
        upload: what the reply to a round's first instruction weighs (see ``clients.probing``).
        personal: the client's own model beside a global one, measured as ``own_model``.
        fit: which network this device trains, by what it can.
        slot: where the network is that shares its weights, with whatever of it does not travel.
    """
    app = ClientApp(mods=[_timed, _seeded, _fitting(fit), probing.unfinished(keep)])
    probing.add_probing(app, upload, keep)

    @app.query("join")
    def join(message: Message, context: Context) -> Message:
        """Load everything, and tell what the federation must agree on."""
        take_offer(message, context)
        try:
            edge = edge_of(context)
        except PublicMissing as missing:
            lacking = ConfigRecord({"lacks-public": str(missing)})
            return Message(RecordDict({"join": lacking}), reply_to=message)
        facts = ConfigRecord(
            {
                "client": edge.client,
                "model": edge.model_name,
                "device": str(edge.device),
                "public-digest": edge.data.public_digest,
                "partition-digest": edge.data.partition_digest,
                "classes": list(edge.data.classes),
                "codecs": list(names("codecs")),
                "corrupt": str(context.node_config.get("corrupt", "")),
                "tags": [tag for tag in str(context.node_config.get("tags", "")).split(",") if tag],
            }
        )
        if edge.width is not None:
            facts["width"] = edge.width
        if edge.fit:
            facts["fit"] = edge.fit
        if edge.depth is not None:
            facts["depth"] = edge.depth
        sizes = MetricRecord(
            {
                "num-examples": len(edge.private.train),
                "parameters": parameter_count(edge.own),
            }
        )
        return Message(RecordDict({"join": facts, "metrics": sizes}), reply_to=message)

    @app.train("alone")
    def alone(message: Message, context: Context) -> Message:
        """One round of local work on the reference."""
        edge = edge_of(context)
        config = message.content.config_records["config"]
        loss = local_work(edge, context, ALONE, config)
        return reply(message, edge, {"alone_train_loss": loss})

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        """Accuracy and loss of each model that this client has on each data set."""
        edge = edge_of(context)
        config = message.content.config_records["config"]
        samples = int(str(config["eval-samples"]))
        arrays = message.content.array_records.get("arrays")
        metrics: dict[str, float] = {}
        if arrays is None:
            metrics |= _measures(edge, OWN, edge.own, samples, on_global_test=True)
        else:
            # Where all have one global model the server measures it on the common test set.
            came, common = as_state_dict(arrays), bool(config.get("common-test", False))
            spec = str(config.get("model", edge.model_name))
            if config.get("own", False):
                # Which network that is may be told only now, or have been another in between.
                edge.hold(context, slot, spec)
            mine = edge.models.get(slot)
            if mine is not None and spec == edge.architecture(slot) and shared.staying(mine, came):
                # With what stays here it is a network of this client's own, which nobody else has.
                model = shared.completed(mine, came)
                metrics |= _measures(edge, OWN, model, samples, on_global_test=True)
            else:
                model = global_model(edge, arrays, spec)
                metrics |= _measures(edge, "global", model, samples, on_global_test=common)
            tuned = personal(edge, context, config, model)
            if tuned is not None:
                metrics |= _measures(edge, OWN, tuned, samples, on_global_test=True)
            if config.get("teacher", False):
                metrics |= _measures(edge, "teacher", edge.own, samples, on_global_test=True)
        if ALONE in edge.models:
            metrics |= _measures(edge, ALONE, edge.models[ALONE], samples, on_global_test=True)
        return reply(message, edge, metrics)

    return app


def reply(
    message: Message,
    edge: Edge,
    metrics: dict[str, float],
    records: dict[str, ArrayRecord | ConfigRecord] | None = None,
) -> Message:
    """A reply with its metrics (one ``MetricRecord``, as Flower's strategies want it)."""
    content = RecordDict(dict(records or {}))
    content["metrics"] = MetricRecord({"num-examples": len(edge.private.train), **metrics})
    return Message(content, reply_to=message)


def global_model(edge: Edge, arrays: ArrayRecord, spec: str) -> torch.nn.Module:
    """A network of the federation's with the given weights, on this client's device."""
    weights = as_state_dict(arrays)
    return restored(spec, edge.data.shape, edge.outputs, weights).to(edge.device)


def keep(edge: Edge, context: Context, slot: str) -> None:
    """Put the model in ``slot`` into the state that survives."""
    edge.keep(context, slot)
    memory.keep_about(context, edge.about(edge.architecture(OWN)))


def _measures(
    edge: Edge, whose: str, model: torch.nn.Module, samples: int, *, on_global_test: bool
) -> dict[str, float]:
    sets = {
        "own_train": edge.private.train,
        "own_val": edge.private.val,
        "own_test": edge.private.test,
    }
    if on_global_test:
        sets["global_test"] = edge.global_test
    metrics: dict[str, float] = {}
    for name, data in sets.items():
        if not len(data):
            continue
        part = _bounded(edge, data, samples)
        accuracy, loss = measure(model, part)
        prefix = f"{whose}_model/{name}"
        metrics |= {
            f"{prefix}/accuracy": accuracy,
            f"{prefix}/loss": loss,
            f"{prefix}/n": len(part),
        }
    return metrics


def _bounded(edge: Edge, data: Samples, samples: int) -> Samples:
    if not 0 < samples < len(data):
        return data
    # The same samples in every round, so that the curve shows the model and not the draw.
    order = torch.randperm(len(data), generator=edge.generator("evaluation subset", -1))
    return data.take(order[:samples].sort().values)


def _timed(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A Flower mod: tell how long the work took, on the wall and in CPU time."""
    started = time.perf_counter()
    answer = call_next(message, context)
    edge = getattr(context, "_fedkit_edge", None)
    if edge is not None:
        leave_to_others(edge.device)
    if answer.has_content():
        answer.content["timing"] = ConfigRecord(
            {
                "seconds": time.perf_counter() - started,
                "cpu-seconds": time.process_time(),
            }
        )
    return answer


def _fitting(fit: Fit) -> Callable[[Message, Context, ClientAppCallable], Message]:
    """A Flower mod: whoever builds the edge knows how to fit its network to this device."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        context._fedkit_fit = fit  # type: ignore[attr-defined]
        return call_next(message, context)

    return mod


def _seeded(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A Flower mod: what draws from torch's own generator (dropout) repeats too."""
    seed = int(context.run_config["seed"])
    round = message.metadata.group_id or "0"
    # A probe begins what its instruction would, with the same numbers.
    purpose = f"{probing.instruction_type(message)}/{round}"
    seed_torch(derive(seed, purpose, int(context.node_config["partition-id"])))
    return call_next(message, context)
