"""Probe and finish, as a client does them for any strategy: an instruction begun, and ended or let go.

``train.probe`` carries an instruction and the type that it has. The strategy's own handler works on it
until the first epoch of its local work is done; there it is left, with everything that the rest hangs on
in ``Context.state``: weights, optimiser, the order of the data, the random numbers, sums. ``train.finish``
calls the handler again, which comes to the same place and goes on from there: what comes of it is, to the
bit, what comes of the instruction given whole.

A client that is not to go on is told nothing. When other work comes it lets go of the weights that came
with its instruction; a model of its own keeps the epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias, cast

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from clients import memory
from clients.edge import Edge, Work, edge_of
from fedkit.flower_records import record_in
from fedkit.knowledge import codecs
from fedkit.models.device import random_states, set_random_states
from fedkit.models.measure import measure

PROBE, FINISH = "train.probe", "train.finish"
# How its records begin in Context.state.
KEPT = "probe/"
WEIGHTS, MOMENTS, PLACE, SUMS = "probed", "probed", "probe-place", "probe-sums"
Upload: TypeAlias = Callable[[Edge, RecordDict], int]
Keep: TypeAlias = Callable[[Edge, Context, str], None]


@dataclass(frozen=True)
class Place:
    """A place in a round's local work that can be left and come back to.

    Attributes:
        slot: whose model trains.
        optimiser: that trains it.
        order: of the data.
        kept: the name under which the optimiser's state outlives the round; empty: it does not.
        sums: tensors that the work adds to as it goes, in place.
    """

    slot: str
    optimiser: torch.optim.Optimizer
    order: torch.Generator
    kept: str = ""
    sums: dict[str, Tensor] = field(default_factory=dict)


class Left(Exception):
    """The first epoch of a probed instruction is done."""

    def __init__(self, loss: float) -> None:
        super().__init__("left after the first epoch")
        self.loss = loss


def epochs(
    edge: Edge,
    context: Context,
    place: Place,
    count: int,
    epoch: Callable[[int], float],
    goes_on: Callable[[int], bool] = lambda at: True,
) -> float:
    """``epoch(0)`` to ``epoch(count - 1)``; gives the last one's loss (0 where there is none).

    In a probe the first is the only one. When a probe is finished it is not done again. ``goes_on(at)``
    is asked before every epoch but the first.

    Raises:
        Left: this is a probe.
    """
    done, loss = (1, _take_up(edge, context, place)) if edge.work is Work.REST else (0, 0.0)
    for at in range(done, count):
        if at and not goes_on(at):
            break
        loss = epoch(at)
        if edge.work is Work.FIRST_EPOCH:
            break
    if edge.work is Work.FIRST_EPOCH:
        loss = loss if count else _measured(edge, edge.models[place.slot])
        _leave(edge, context, place, loss)
        raise Left(loss)
    return loss


def add_probing(app: ClientApp, upload: Upload, keep: Keep) -> None:
    """Give a client app the handlers ``train.probe`` and ``train.finish``.

    Args:
        app: whose other handlers do the work.
        upload: tensor bytes of the reply to an instruction with that content.
        keep: puts a model into the state that survives.
    """

    @app.train("probe")
    def probe(message: Message, context: Context) -> Message:
        """Begin the instruction; tell how its first epoch went, and what the answer would weigh."""
        edge, content = edge_of(context), message.content
        told = instruction_type(message)
        del content["probe"]
        for name, record in content.items():
            context.state[KEPT + name] = record
        begun = ConfigRecord(
            {"type": told, "round": message.metadata.group_id, "slot": "", "kept": ""}
        )
        context.state["probe"] = begun
        loss = _begin(app, _again(message, told, content), context, edge)
        size = upload(edge, content)
        metrics = MetricRecord(
            {"num-examples": len(edge.private.train), "probe_loss": loss, "upload-bytes": size}
        )
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @app.train("finish")
    def finish(message: Message, context: Context) -> Message:
        """End the instruction that was begun."""
        edge, begun = edge_of(context), context.state.config_records.get("probe")
        if begun is None or begun["round"] != message.metadata.group_id:
            # A server that was restarted in this round may decide otherwise than it had before.
            silent = ConfigRecord({"silent": True})
            return Message(RecordDict({"answer": silent}), reply_to=message)
        content = _instruction(context)
        answer = _answer(context)
        if answer is None:
            edge.work = Work.REST
            try:
                inner = _again(message, str(begun["type"]), content)
                answer = app(inner, context).content
            finally:
                edge.work = Work.WHOLE
        _forget(context)
        return Message(answer, reply_to=message)


def unfinished(keep: Keep) -> Callable[[Message, Context, ClientAppCallable], Message]:
    """A Flower mod: a probe that was not told to go on ends once other work comes."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        kind = message.metadata.message_type
        within = getattr(getattr(context, "_fedkit_edge", None), "work", Work.WHOLE)
        if "probe" in context.state and within is Work.WHOLE and kind not in (FINISH, "query.join"):
            _stop(edge_of(context), context, keep)
        return call_next(message, context)

    return mod


def _stop(edge: Edge, context: Context, keep: Keep) -> None:
    """Let go of what a probe began; a model of one's own keeps the epoch."""
    begun, content = context.state.config_records["probe"], _instruction(context)
    slot, kept = str(begun["slot"]), str(begun["kept"])
    if slot and "arrays" in content:
        edge.remake(context, slot)
    elif slot:
        _recall(context, edge, slot)
        if kept:
            context.state[f"{slot}-{kept}-optimiser"] = context.state[f"{MOMENTS}-optimiser"]
        keep(edge, context, slot)
    if "subset" in content:
        # It may learn from the others' answers on it.
        context.state["subset"] = content["subset"]
    _forget(context)


def instruction_type(message: Message) -> str:
    """The type of the instruction that a message is, or that it begins."""
    begun = message.content.config_records.get("probe") if message.has_content() else None
    return message.metadata.message_type if begun is None else str(begun["kind"])


def default_upload(edge: Edge, content: RecordDict) -> int:
    """Weights come back as they came; of a public subset the class scores do, in the server's codec."""
    arrays, subset = (content.array_records.get(name) for name in ("arrays", "subset"))
    if arrays is not None:
        return sum(array.numpy().nbytes for array in arrays.values())
    if subset is None:
        return 0
    rows = sum(array.shape[0] for array in subset.values())
    codec = cast(str, content.config_records["config"]["codec"])
    return codecs.payload_bytes(codec, rows, edge.outputs)


def _begin(app: ClientApp, message: Message, context: Context, edge: Edge) -> float:
    edge.work = Work.FIRST_EPOCH
    try:
        answer = app(message, context).content
    except Left as left:
        return left.loss
    finally:
        edge.work = Work.WHOLE
    # A handler that can't be left in mid-work has done it all: its answer waits for the decision.
    for name, record in answer.items():
        context.state[f"{KEPT}answer/{name}"] = record
    metrics = record_in(answer, "metrics", MetricRecord)
    return cast(float, metrics.get("train_loss", _measured(edge, edge.own)))


def _leave(edge: Edge, context: Context, place: Place, loss: float) -> None:
    memory.keep_model(context, WEIGHTS, edge.models[place.slot])
    memory.keep_optimiser(context, MOMENTS, place.optimiser)
    # The reply is given after this place is left: the model is not touched in between.
    context.state[PLACE] = ArrayRecord(
        {
            "order": Array(place.order.get_state().numpy()),
            **{
                name: Array(state.cpu().numpy())
                for name, state in random_states(edge.device).items()
            },
        }
    )
    context.state[SUMS] = ArrayRecord(
        {name: Array(value.cpu().numpy()) for name, value in place.sums.items()}
    )
    context.state.config_records["probe"].update(
        {"slot": place.slot, "kept": place.kept, "loss": loss}
    )


def _recall(context: Context, edge: Edge, slot: str) -> None:
    weights = memory.recall_weights(context, WEIGHTS)
    assert weights is not None, "a probe that was left has kept its weights"
    edge.models[slot].load_state_dict(weights)


def _take_up(edge: Edge, context: Context, place: Place) -> float:
    begun, where = context.state.config_records["probe"], context.state.array_records[PLACE]
    # What comes after the first epochs, in the same instruction, is done whole.
    edge.work = Work.WHOLE
    _recall(context, edge, place.slot)
    memory.recall_optimiser(context, MOMENTS, place.optimiser)
    place.order.set_state(torch.from_numpy(where["order"].numpy()))
    set_random_states(edge.device, {name: torch.from_numpy(a.numpy()) for name, a in where.items()})
    for name, array in context.state.array_records[SUMS].items():
        place.sums[name].copy_(torch.from_numpy(array.numpy()))
    return cast(float, begun["loss"])


def _measured(edge: Edge, model: torch.nn.Module) -> float:
    data = edge.private.train
    return measure(model, data)[1] if len(data) else float("nan")


def _again(message: Message, kind: str, content: RecordDict) -> Message:
    """The instruction itself, for its own handler."""
    meta = message.metadata
    return Message(content, meta.dst_node_id, kind, group_id=meta.group_id)


def _instruction(context: Context) -> RecordDict:
    names = [name for name in context.state if name.startswith(KEPT)]
    parts = {name.removeprefix(KEPT): context.state[name] for name in names}
    return RecordDict(
        {name: part for name, part in parts.items() if not name.startswith("answer/")}
    )


def _answer(context: Context) -> RecordDict | None:
    start = f"{KEPT}answer/"
    parts = {n.removeprefix(start): context.state[n] for n in context.state if n.startswith(start)}
    return RecordDict(parts) if parts else None


def _forget(context: Context) -> None:
    for name in [*context.state]:
        if name.startswith(KEPT) or name in ("probe", PLACE, SUMS):
            del context.state[name]
    for name in (f"{WEIGHTS}-model", f"{MOMENTS}-optimiser"):
        context.state.pop(name, None)
