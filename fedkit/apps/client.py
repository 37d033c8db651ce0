"""A device that takes part in the runs of one Flower App."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedkit.apps.bundle import FlowerApp
from fedkit.apps.membership import AppMembership
from fedkit.engine.linked import DEFAULT_STATE, Connection, LinkedClient
from fedkit.engine.state import StateDirectory, first_free
from fedkit.settings import Value

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AppClientPlan(Connection):
    """What was typed at `fedkit client --app`, beside how it connects.

    Attributes:
        app: the app in its folder.
        client_app: its ``ClientApp``, loaded.
        node_config: what the app is told of this device.
    """

    app: FlowerApp
    client_app: ClientApp
    node_config: Mapping[str, Value]


class AppClient(LinkedClient):
    """Gives what the server sends to the app, for as long as runs last."""

    def __init__(self, plan: AppClientPlan) -> None:
        """Take the state directory; ``FedkitError`` if another process has it."""
        super().__init__(plan, _open_state(plan))
        self._plan = plan

    def name(self) -> str:
        """By its partition, where it has one."""
        partition = self._plan.node_config.get("partition-id")
        return "a client" if partition is None else f"the client of partition {partition}"

    def config(self) -> dict[str, Any]:
        """Which app it runs."""
        return {"app": self._plan.app.name, "app-version": self._plan.app.version}

    def part(self, welcome: dict[str, Any]) -> AppMembership:
        """Works with the server's run config and its own node config."""
        plan = self._plan
        _log.info("Connected to %s, node %s.", plan.server, welcome["node_id"])
        return AppMembership(self._directory, welcome, plan.app, plan.client_app, plan.node_config)


def _open_state(plan: AppClientPlan) -> StateDirectory:
    partition = plan.node_config.get("partition-id")
    if plan.state_dir is not None:
        return StateDirectory(plan.state_dir)
    if isinstance(partition, int):
        return StateDirectory(DEFAULT_STATE / f"partition-{partition}")
    return first_free(DEFAULT_STATE, "client")
