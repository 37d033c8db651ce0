"""A client's part in the run of a Flower App: its context, and what it keeps of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkit.apps.bundle import FlowerApp
from fedkit.engine.membership import explain, failed, safe_name
from fedkit.engine.state import FederationState, StateDirectory
from fedkit.errors import FedkitError
from fedkit.link.client import Answer
from fedkit.settings import Value

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict
    from flwr.clientapp import ClientApp

_log = logging.getLogger(__name__)


class AppMembership:
    """Gives the messages of one run to a ``ClientApp``, each of them once."""

    # The app's models are its own business.
    model_path: Path | None = None

    def __init__(
        self,
        directory: StateDirectory,
        welcome: dict[str, Any],
        app: FlowerApp,
        client_app: ClientApp,
        node_config: Mapping[str, Value],
    ) -> None:
        """The part that the server's welcome gives this device.

        Args:
            directory: the device's state directory.
            welcome: the server's.
            app: the app that both sides run.
            client_app: this side of it.
            node_config: what the app is told of this device.

        Raises:
            FedkitError: the welcome makes no sense.
        """
        from fedkit.flower import take_identity

        self.federation = safe_name(welcome["federation"])
        self._folder = directory.path / self.federation
        self._owner = {"app": app.name}
        self._app = client_app
        self._node_config = node_config
        self._welcome = welcome
        self._run_config = _plain_values(welcome.get("run_config"))
        self._run_id = run_id_of(self.federation)
        self._node_id = int(welcome["node_id"])
        take_identity(self._node_id, self._run_id)
        self._remembered: tuple[FederationState, RecordDict] | None = None

    def fits(self, welcome: dict[str, Any]) -> bool:
        """Whether the server still says the same of this client."""
        said = "node_id", "run_config"
        return all(welcome.get(name) == self._welcome.get(name) for name in said)

    def work(self, key: str, buffers: list[bytes]) -> Answer:
        """The app's reply to a message; state and reply are kept together before it is given.

        What the app raises goes to the server as Flower's own node would send it, and this client lives
        on; only when nothing can be kept any more the error ends it.
        """
        from fedkit.flower import decode_message

        message = None
        try:
            kept, state = self._remembered or self._recalled()
            known = kept.reply_to(key)
            if known is not None:
                _log.info("Message %s was answered before: answered again.", key)
                return Answer(known)
            message = decode_message(buffers, described=False)
            buffers.clear()
            _log.info("Message %s: %s", key, message.metadata.message_type)
            reply, state = self._reply(message, state)
            self._remembered = kept, state
            # The answers to the last two messages are kept: counted as rounds of the state directory.
            kept.commit(key, reply, state, (kept.last_round or 0) + 1)
            return Answer(reply)
        except Exception as error:  # whatever an app may have put into its state
            return failed(error, message, buffers, described=False)

    def export(self) -> None:
        """There is nothing of the app's that could be written for others."""

    def _recalled(self) -> tuple[FederationState, RecordDict]:
        from flwr.app import RecordDict

        kept, state = FederationState(self._folder, self._owner), RecordDict()
        if kept.begun:
            kept.restore(state)
            _log.warning("Going on from %s (%s).", kept.folder, kept.last_key)
        self._remembered = kept, state
        return kept, state

    def _reply(self, message: Message, state: RecordDict) -> tuple[list[bytes], RecordDict]:
        from flwr.app import Context, RecordDict

        from fedkit.flower import app_error_reply, encode_message

        # What an app writes into its configurations is not kept: only the state outlives a process.
        context = Context(
            self._run_id,
            self._node_id,
            dict(self._node_config),
            state,
            dict(self._run_config),
        )
        try:
            reply = encode_message(self._app(message, context))
            if not isinstance(context.state, RecordDict):
                raise TypeError(f"context.state is a {type(context.state).__name__}")
        except (Exception, SystemExit) as error:  # whatever somebody's app does
            _log.error("%s", explain(error))
            reply = encode_message(app_error_reply(message, error))
        # Also after an error, as Flower's own node has it.
        return reply, context.state if isinstance(context.state, RecordDict) else state


def run_id_of(federation: str) -> int:
    """Flower's number of a run, from the federation's id."""
    try:
        return int(federation, 16)
    except ValueError:
        raise FedkitError("The server's federation id is no hexadecimal number.") from None


def _plain_values(config: object) -> dict[str, Value]:
    # It came over the network, and the app relies on it.
    if not isinstance(config, dict):
        raise FedkitError("The server sent no run config.")
    for name, value in config.items():
        if not isinstance(value, bool | int | float | str):
            raise FedkitError(f"The server's run config holds no plain value for {name!r}.")
    return config
