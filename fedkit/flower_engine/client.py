"""The ``ClientApp`` of fedkit on Flower's engine: does what the run's strategy wants of a client.

Flower starts a process for each message. Where a node has a ``state-dir`` all that a client remembers is
read from there and written back before the reply is given, in the form in which `fedkit client` keeps
it; else it lies in Flower's ``Context.state``, which a SuperNode keeps in memory.
"""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedkit.engine.membership import explain, round_of
from fedkit.engine.state import FederationState, StateDirectory
from fedkit.errors import FedkitError
from fedkit.flower import decode_message, encode_message, error_reply, new_context
from fedkit.flower_engine.context_state import ContextState
from fedkit.flower_engine.node import NodeSettings, compare, for_client_app, read_node
from fedkit.flower_engine.told import NO_SHARD, Told, take_told
from fedkit.registry import load, split
from fedkit.settings import DataSettings, Value

_log = logging.getLogger(__name__)


class NodeApp(ClientApp):
    """Looks the strategy's client half up in this node's own registry, and lets it answer."""

    def __call__(self, message: Message, context: Context) -> Message:
        """The client half's answer; whatever that raises is told in a sentence."""
        try:
            told = take_told(message)
            node, data = read_node(context.node_config)
            compare(node, told)
            if node.state_dir:
                return _answer_on_disk(message, context, told, node, data)
            shard = _shard(node, told, None)
            config = for_client_app(node, data, shard, told)
            return answer(message, context, told, config)
        except Exception as error:  # whatever the client half raised, the server hears of it
            fatal = explain(error)
            _log.error("Error: %s", fatal)
            return error_reply(message, str(fatal))


app = NodeApp()


def answer(
    message: Message, context: Context, told: Told, node_config: dict[str, Value]
) -> Message:
    """What the client half answers, its memory being Flower's ``Context.state``."""
    state = ContextState(context.state, repeats=bool(told.settings["quorum"]))
    return _once(message, context.node_id, context.state, state, told, node_config)


def _answer_on_disk(
    message: Message, context: Context, told: Told, node: NodeSettings, data: DataSettings
) -> Message:
    # A SuperNode starts the next message's process while this one's still works, if that took too long.
    directory = StateDirectory(Path(node.state_dir), message.metadata.ttl)
    try:
        directory.identity()  # makes it a device's, that `fedkit export` and `fedkit client` know
        folder = directory.path / told.federation
        shard = _shard(node, told, FederationState(folder, None).owner)
        config = for_client_app(node, data, shard, told)
        kept = FederationState(folder, {"model": config["model"], "shard": shard})
        remembered = RecordDict()
        kept.restore(remembered)
        return _once(message, context.node_id, remembered, kept, told, config)
    finally:
        # Before Flower takes the reply, since the next message's process may begin before this ends.
        directory.close()


def _shard(node: NodeSettings, told: Told, owner: object) -> int:
    """The node's own word, else what it held before in this federation, else what the server gives."""
    if node.partition_id != NO_SHARD:
        return node.partition_id
    if isinstance(owner, dict) and isinstance(owner.get("shard"), int):
        return int(owner["shard"])
    if told.shard == NO_SHARD:
        raise FedkitError(
            f"This federation is full: all its {told.settings['num-shards']} shards are taken."
        )
    return told.shard


def _once(
    message: Message,
    node_id: int,
    remembered: RecordDict,
    kept: FederationState | ContextState,
    told: Told,
    node_config: dict[str, Value],
) -> Message:
    """Answer from what is kept, if it was done before, else by doing it; keeps state and answer."""
    from threadpoolctl import threadpool_limits

    known = kept.reply_to(told.key)
    if known is not None:
        _log.info("Instruction %s was done before: answered again.", told.key)
        return Message(decode_message(known).content, reply_to=message)
    round = round_of(message, kept.last_round)
    context = new_context(node_id, node_config)
    context.state, context.run_config = remembered, told.settings
    client_half: ClientApp = load("clients", split(str(told.settings["strategy"]))[0])
    # The numbers hang on it.
    with threadpool_limits(int(told.settings["threads"])):
        reply = client_half(message, context)
    kept.commit(told.key, encode_message(reply), remembered, round)
    return reply
