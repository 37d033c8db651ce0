"""The lobby: whom the server lets in over the link, and which shard each gets."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import grpc

from fedkit import __version__
from fedkit.link.node import Refusal
from fedkit.settings import FederationSettings, as_config

# A client may name these only to be sure that they are what it expects.
CHECKED = ("dataset", "partition", "num-shards")


class Lobby:
    """Shards by client; asked at every greeting."""

    def __init__(
        self,
        settings: FederationSettings,
        federation: str,
        *,
        one_model: bool,
        shards: Mapping[int, int] | None = None,
        patience: float = 0.0,
    ) -> None:
        """A lobby of the federation with that id.

        Args:
            settings: the federation's.
            federation: its id.
            one_model: whether all train the same network.
            shards: each shard's holder, by node id, in a federation that goes on.
            patience: seconds that these have to come back before others may take their shards.
        """
        self._settings = settings
        self._federation = federation
        self._one_model = one_model
        self._lock = threading.Lock()
        self._holder: dict[int, int] = dict(shards or {})
        self._gone: set[int] = set()
        self._awaited = set(self._holder.values())
        self._awaited_until = time.monotonic() + patience

    def greet(self, hello: dict[str, Any], node_id: int) -> dict[str, Any]:
        """The welcome for a client: the federation's settings and the client's shard.

        Raises:
            Refusal: it disagrees with the federation, or there is no shard for it.
        """
        config = hello.get("config")
        config = config if isinstance(config, dict) else {}
        compare_versions(hello.get("version"))
        if "app" in config:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"This server runs {self._settings.strategy}, no Flower App: start the client without "
                "--app.",
            )
        self._compare(config)
        with self._lock:
            shard = self._assign(config.get("shard"), node_id)
            self._holder[shard] = node_id
            self._gone.discard(node_id)
            self._awaited.discard(node_id)
        settings = self._settings
        return {
            "federation": self._federation,
            "node_config": {"partition-id": shard, "num-partitions": settings.num_shards},
            "run_config": as_config(settings),
        }

    def shards(self) -> dict[int, int]:
        """Each shard's holder, by node id."""
        with self._lock:
            return dict(self._holder)

    def why_not(self, node_id: int, client: object) -> str | None:
        """Why this node can't be client number ``client``, or None."""
        with self._lock:
            if isinstance(client, int) and self._holder.get(client) == node_id:
                return None
        return f"It says that it holds shard {client!r}, which is not the one that it was given."

    def part(self, node_id: int) -> None:
        """A client is gone; its shard may go to another if nobody else has a free one."""
        with self._lock:
            self._gone.add(node_id)

    def _compare(self, config: dict[str, Any]) -> None:
        ours = as_config(self._settings)
        wanted = {name: config[name] for name in CHECKED if config.get(name) is not None}
        if self._one_model and config.get("model"):
            wanted["model"] = config["model"]
        for name, theirs in wanted.items():
            if theirs != ours[name]:
                raise Refusal(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"This federation uses --{name} {ours[name]}, not {theirs}: "
                    f"leave --{name} out, or give that.",
                )

    def _assign(self, wanted: Any, node_id: int) -> int:
        count = self._settings.num_shards
        if time.monotonic() > self._awaited_until:
            self._gone |= self._awaited
            self._awaited.clear()
        mine = [shard for shard, holder in self._holder.items() if holder == node_id]
        if mine and wanted in (None, mine[0]):
            return mine[0]
        if wanted is None:
            free = [shard for shard in range(count) if shard not in self._holder]
            left = [shard for shard, holder in self._holder.items() if holder in self._gone]
            if not free and not left:
                raise Refusal(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"This federation is full: all its {count} shards are taken.",
                )
            return min(free or left)
        if isinstance(wanted, bool) or not isinstance(wanted, int) or not 0 <= wanted < count:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"There is no shard {wanted}: this federation has {count}, "
                f"numbered 0 to {count - 1}.",
            )
        if mine:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"This device holds shard {mine[0]} in this federation, not {wanted}: use another "
                "--state-dir for another shard.",
            )
        holder = self._holder.get(wanted)
        if holder is not None and holder not in self._gone:
            raise Refusal(
                grpc.StatusCode.ALREADY_EXISTS,
                f"Shard {wanted} is taken: choose another, or --data-shard auto for a free one.",
            )
        return wanted


def compare_versions(theirs: Any) -> None:
    """Raise ``Refusal`` for a client of another version of fedkit."""
    # Another version may train, draw or sum otherwise, and nobody would notice.
    if theirs is not None and theirs != __version__:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"This server runs fedkit {__version__}, the client {theirs}: install the same version "
            "on both.",
        )
