"""A client's part in one federation: its context, its app, and what it keeps of both.

Nothing of Flower or torch is imported until the first instruction comes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkit.devices.device import Device
from fedkit.devices.emulation import Emulation
from fedkit.devices.profiles import Profile
from fedkit.engine.state import ROUNDS_KEPT, FederationState, StateDirectory
from fedkit.errors import FedkitError, is_out_of_memory, out_of_memory, where_raised
from fedkit.link.client import Answer
from fedkit.registry import load, split
from fedkit.settings import Value

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp

_log = logging.getLogger(__name__)


class Membership:
    """Works on the instructions of one federation, each of them once."""

    def __init__(
        self,
        directory: StateDirectory,
        welcome: dict[str, Any],
        model: str | None,
        node_config: dict[str, Value],
        emulate: Profile | None = None,
    ) -> None:
        """The part that the server's welcome gives this device.

        Args:
            directory: the device's state directory.
            welcome: the server's.
            model: the device's architecture; None takes the federation's.
            node_config: what this machine adds to what the server says of the node.
            emulate: the kind of device that it is to behave like.
        """
        self.federation = safe_name(welcome["federation"])
        self._directory = directory
        self._welcome = welcome
        self._model = model
        self._node_config = node_config
        self._state: FederationState | None = None
        self._context: Context | None = None
        self._app: ClientApp | None = None
        self._emulation: Emulation | None = None
        if emulate is not None:
            seed, client = welcome["run_config"]["seed"], welcome["node_config"]["partition-id"]
            self._emulation = Emulation(Device(emulate, int(seed), int(client)))

    def fits(self, welcome: dict[str, Any]) -> bool:
        """Whether the server still says the same of the federation and of this device's part in it.

        One that was resumed may have other settings (``--rounds``); one that was killed before it had
        written the device down may give it another shard.
        """
        said = "node_id", "node_config", "run_config"
        return all(welcome[name] == self._welcome[name] for name in said)

    @property
    def model_path(self) -> Path | None:
        """Where the client's own model is, once it was exported."""
        path = self._state.folder / "model.safetensors" if self._state else None
        return path if path is not None and path.exists() else None

    def work(self, key: str, buffers: list[bytes]) -> Answer:
        """Answer an instruction: from what is kept, if it was done before, else by doing it.

        State and answer are kept together before the answer is given.
        """
        from fedkit.flower import decode_message, encode_message

        message = None
        try:
            context, app, state = self._prepared()
            kept = state.reply_to(key)
            if kept is not None:
                _log.info("Instruction %s was done before: answered again.", key)
                return Answer(kept)
            message = decode_message(buffers)
            buffers.clear()
            round = round_of(message, state.last_round)
            _log.info("Instruction %s", key)
            answer = (
                app(message, context)
                if self._emulation is None
                else self._emulation.work(app, message, context)
            )
            reply = encode_message(answer)
            state.commit(key, reply, context.state, round)
            return Answer(reply)
        except Exception as error:  # whatever the app raised, the server hears of it first
            return failed(error, message, buffers)

    def export(self) -> None:
        """Write the own model as a file that anybody can read."""
        from fedkit.engine.saved import OWN_MODEL, kept_model
        from fedkit.models.files import save_model

        if self._context is None or self._state is None or OWN_MODEL not in self._context.state:
            return
        own = kept_model(self._state.folder)
        path = self._state.folder / "model.safetensors"
        save_model(path, own.arrays, own.about)
        _log.info("The model is in %s.", path)

    def _prepared(self) -> tuple[Context, ClientApp, FederationState]:
        if self._context is None or self._app is None or self._state is None:
            self._prepare()
        assert self._context is not None and self._app is not None and self._state is not None
        return self._context, self._app, self._state

    def _prepare(self) -> None:
        from fedkit.flower import new_context, take_identity

        welcome, run_config = self._welcome, self._welcome["run_config"]
        shard = welcome["node_config"]["partition-id"]
        model = self._model or run_config["model"]
        folder = self._directory.path / self.federation
        self._state = FederationState(folder, {"model": model, "shard": shard})
        node_id = int(welcome["node_id"])
        take_identity(node_id)
        context = new_context(
            node_id, {**welcome["node_config"], "model": model, **self._node_config}
        )
        context.run_config = run_config
        if self._state.begun:
            self._state.restore(context.state)
            _log.warning("Going on from %s (%s).", folder, self._state.last_key)
        # The name came over the network: it is looked up in this machine's registry only. Which of a
        # family of strategies the server runs is its own business.
        self._app = load("clients", split(str(run_config["strategy"]))[0])
        self._context = context


def round_of(message: Message, last_round: int | None) -> int:
    """The round of an instruction, 0 if it belongs to none.

    Raises:
        FedkitError: it is so long before ``last_round`` that what was answered is not kept any more.
    """
    group = message.metadata.group_id
    round, done = int(group) if group.isdigit() else 0, last_round or 0
    if 0 < round <= done - ROUNDS_KEPT:
        raise FedkitError(
            f"This client has been in round {done}, and its answers of round {round} are gone: "
            "doing that again would train the model twice. Restore the server's newer "
            "checkpoints, or start a new run."
        )
    return round


def failed(
    error: Exception, message: Message | None, buffers: list[bytes], *, described: bool = True
) -> Answer:
    """The answer that tells the server why this client ends.

    Args:
        error: what was raised.
        message: the instruction; None, if it was not read yet.
        buffers: as which it came, in that case.
        described: see ``decode_message``.

    Raises:
        FedkitError: the instruction can't be read, so there is no answering it.
    """
    from fedkit.flower import decode_message, encode_message, error_reply

    fatal = explain(error)
    try:
        message = message or decode_message(buffers, described=described)
    except ValueError:
        raise fatal from error
    return Answer(encode_message(error_reply(message, str(fatal))), fatal)


def explain(error: BaseException) -> FedkitError:
    """The sentence for whatever a client's own code raised."""
    if isinstance(error, FedkitError):
        return error
    _log.debug("The client's own code failed.", exc_info=error)
    if is_out_of_memory(error):
        return out_of_memory(error)
    fatal = FedkitError(
        f"The client's own code failed with {type(error).__name__}: {error} "
        f"({where_raised(error)}); --debug shows where."
    )
    fatal.__cause__ = error
    return fatal


def safe_name(name: object) -> str:
    """The federation's id, which came over the network and becomes a folder's name.

    Raises:
        FedkitError: it is no plain word.
    """
    text = str(name)
    if not text.isalnum() or not text.isascii() or len(text) > 64:
        raise FedkitError("The server's federation id is no plain word.")
    return text
