"""``nodes.json``: which device is which client of the federation, so that a restarted server knows them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedkit.durable import write_whole
from fedkit.errors import FedkitError
from fedkit.link.node import Node

SCHEMA = 1
_FIELDS = ("node_id", "identity", "secret", "name", "certificate")


@dataclass(frozen=True)
class Known:
    """A federation's id, its devices, and their shards.

    Attributes:
        federation: drawn once, when the run begins.
        nodes: devices by their first join.
        shards: each shard's holder, by node id.
    """

    federation: str = field(default_factory=lambda: secrets.token_hex(8))
    nodes: tuple[Node, ...] = ()
    shards: Mapping[int, int] = field(default_factory=dict)


class NodeFile:
    """Keeps what is known of the devices in a run directory; written when something changed."""

    def __init__(self, run: Path, federation: str) -> None:
        """``nodes.json`` in ``run``, for the federation of that id."""
        self._file = run / "nodes.json"
        self._federation = federation
        self._written = ""

    def keep(self, nodes: Iterable[Node], shards: Mapping[int, int]) -> None:
        """Write it down, if it is new.

        Raises:
            FedkitError: it can't be written.
        """
        # One without a shard is a stranger when it comes again.
        holders = set(shards.values())
        known = {
            "schema": SCHEMA,
            "federation": self._federation,
            "nodes": [
                {name: getattr(node, name) for name in _FIELDS}
                for node in nodes
                if node.node_id in holders
            ],
            "shards": sorted(shards.items()),
        }
        text = json.dumps(known, indent=1)
        if text != self._written:
            write_whole(self._file, [text.encode()], mode=0o600)
            self._written = text


def read_nodes(run: Path) -> Known:
    """What ``nodes.json`` of a run holds.

    Raises:
        FedkitError: it is not there, or damaged.
    """
    file = run / "nodes.json"
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']} is not {SCHEMA}")
        nodes = tuple(
            Node(
                int(entry["node_id"]),
                str(entry["identity"]),
                str(entry["secret"]),
                str(entry["name"]),
                entry["certificate"],
            )
            for entry in found["nodes"]
        )
        shards = {int(shard): int(holder) for shard, holder in found["shards"]}
        return Known(str(found["federation"]), nodes, shards)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedkitError(f"{file} can't be read: {error}.") from error
