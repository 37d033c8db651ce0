"""The client process: one long-lived process that joins, works on instructions, and keeps its state.

Nothing of Flower or torch is imported until the first instruction comes.
"""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkit import __version__
from fedkit.engine.state import FederationState, StateDirectory, first_free
from fedkit.errors import FedkitError
from fedkit.link.client import Answer, LinkClient
from fedkit.registry import load
from fedkit.settings import DataSettings

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.clientapp import ClientApp

_log = logging.getLogger(__name__)
DEFAULT_STATE = Path("fedkit-state")


@dataclass(frozen=True)
class ClientPlan:
    """What was typed at `fedkit client`.

    Attributes:
        server: HOST:PORT.
        shard: which shard it holds; None takes the next free one.
        model: its architecture; None takes the federation's.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:I`` or ``mps``.
        state_dir: where it keeps its identity and model; None takes one under ``fedkit-state``.
        expected: dataset, partition and num-shards as the user expects them, where given.
        data: where this machine keeps data sets.
        max_wait: seconds to go on trying while the server can't be reached.
    """

    server: str
    shard: int | None
    model: str | None
    device: str
    state_dir: Path | None
    expected: dict[str, Any]
    data: DataSettings
    max_wait: float


class Client:
    """A device in a federation."""

    def __init__(self, plan: ClientPlan) -> None:
        """Take the state directory; ``FedkitError`` if another process has it."""
        self._plan = plan
        self._directory = _open_state(plan)
        self._welcome: dict[str, Any] = {}
        self._state: FederationState | None = None
        self._context: Context | None = None
        self._app: ClientApp | None = None

    def run(self) -> str:
        """Take part until the run is over; returns what the server said at the end.

        Raises:
            FedkitError: refused, unreachable, or its own code failed.
        """
        identity = self._directory.identity()
        shard = self._plan.shard
        hello = {
            "identity": identity["identity"],
            "secret": identity["secret"],
            "name": f"the client of shard {shard}" if shard is not None else "a client",
            "version": __version__,
            "config": {**self._plan.expected, "shard": shard, "model": self._plan.model},
        }
        link = LinkClient(
            self._plan.server, hello, max_wait=self._plan.max_wait, on_welcome=self._take_welcome
        )
        try:
            goodbye = link.run(self._work)
            self._export()
            return goodbye
        finally:
            self._directory.close()

    @property
    def model_path(self) -> Path | None:
        """Where the client's own model is, once the run is over."""
        path = self._state.folder / "model.safetensors" if self._state else None
        return path if path is not None and path.exists() else None

    def _take_welcome(self, welcome: dict[str, Any]) -> None:
        shard = welcome["node_config"]["partition-id"]
        if self._welcome and self._welcome["federation"] != welcome["federation"]:
            raise FedkitError(
                "The server was started anew, with another federation: start this client again to "
                "take part in that."
            )
        if not self._welcome:
            _log.info("Connected to %s, shard %s.", self._plan.server, shard)
        self._welcome = welcome

    def _work(self, key: str, data: bytearray) -> Answer:
        from fedkit.flower import decode_message, encode_message, error_reply

        message = None
        try:
            self._prepare()
            assert self._context is not None and self._app is not None and self._state is not None
            if self._state.last_key == key and self._state.last_reply is not None:
                return Answer([self._state.last_reply])
            message = decode_message(data)
            _log.info("Instruction %s", key)
            reply = encode_message(self._app(message, self._context))
            self._state.commit(key, reply, self._context.state)
            return Answer(reply)
        except Exception as error:  # whatever the app raised, the server hears of it first
            fatal = _explain(error)
            message = message or decode_message(data)
            return Answer(encode_message(error_reply(message, str(fatal))), fatal)

    def _prepare(self) -> None:
        if self._context is not None:
            return
        from fedkit.flower import new_context, take_identity

        run_config = self._welcome["run_config"]
        shard = self._welcome["node_config"]["partition-id"]
        model = self._plan.model or run_config["model"]
        folder = self._directory.path / _safe_name(self._welcome["federation"])
        self._state = FederationState(folder, {"model": model, "shard": shard})
        node_id = int(self._welcome["node_id"])
        take_identity(node_id)
        node_config = {
            **self._welcome["node_config"],
            "model": model,
            "device": self._plan.device,
            "data-root": self._plan.data.data_root,
            "allow-checksum-mismatch": self._plan.data.allow_checksum_mismatch,
        }
        context = new_context(node_id, node_config)
        context.run_config = run_config
        if self._state.begun:
            self._state.restore(context.state)
            _log.warning("Going on from %s (%s).", folder, self._state.last_key)
        # The name came over the network: it is looked up in this machine's registry only.
        self._app = load("clients", str(run_config["strategy"]))
        self._context = context

    def _export(self) -> None:
        if self._context is None or self._state is None:
            return
        record = self._context.state.array_records.get("own-model")
        if record is None:
            return
        import safetensors.numpy

        from fedkit.durable import write_whole

        named = {name: array.numpy() for name, array in record.items()}
        path = self._state.folder / "model.safetensors"
        write_whole(path, [safetensors.numpy.save(named)])
        _log.info("The model is in %s.", path)


def _open_state(plan: ClientPlan) -> StateDirectory:
    if plan.state_dir is not None:
        return StateDirectory(plan.state_dir)
    if plan.shard is not None:
        return StateDirectory(DEFAULT_STATE / f"shard-{plan.shard}")
    return first_free(DEFAULT_STATE, "client")


def _explain(error: Exception) -> FedkitError:
    if isinstance(error, FedkitError):
        return error
    _log.debug("The client's own code failed.", exc_info=error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    fatal = FedkitError(
        f"The client's own code failed with {type(error).__name__}: {error} ({where}); "
        "--debug shows where."
    )
    fatal.__cause__ = error
    return fatal


def _safe_name(name: object) -> str:
    # It came over the network and becomes a folder's name.
    text = str(name)
    if not text.isalnum() or len(text) > 64:
        raise FedkitError("The server's federation id is no plain word.")
    return text
