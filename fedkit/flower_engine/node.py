"""What a SuperNode's owner says of it: the keys of ``--node-config``, as `fedkit client` has them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedkit.data.corruption import NONE, read_noise
from fedkit.data.names import check_dataset
from fedkit.engine.client import PUBLIC_SETS
from fedkit.engine.linked import DEFAULT_STATE
from fedkit.errors import UsageError
from fedkit.flower_engine.told import NO_SHARD, Told
from fedkit.models.budget import read_bytes, read_depth, read_seconds, read_width
from fedkit.registry import allow, check
from fedkit.settings import DataSettings, Value, build, merge, refuse_unknown, setting

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeSettings:
    """A node of Flower's engine, as a device of a federation."""

    partition_id: int = setting(
        NO_SHARD,
        "which shard of the federation's data set it holds, counted from 0 (default: the next free one)",
        minimum=NO_SHARD,
    )
    num_partitions: int = setting(
        0, "refuse a federation with another number of shards (default: any)", minimum=0
    )
    num_shards: int = setting(0, "the same, as `fedkit client` calls it", minimum=0)
    model: str = setting("", "its network (default: the federation's)")
    dataset: str = setting(
        "",
        "without partition-id: its own data, all of it, as in folder:PATH; with: refuse a federation on "
        "another data set",
    )
    partition: str = setting("", "refuse a federation that deals data otherwise")
    device: str = setting("auto", "where it computes: auto, cpu, cuda, cuda:I or mps")
    tag: str = setting("", "words by which the server may choose it, with commas between")
    state_dir: str = setting(
        "",
        "folder in which it keeps its models and its latest replies (default: Flower's memory, for as long "
        "as the SuperNode lives)",
        unit="folder",
    )
    memory_budget: str = setting("", "refuse to train a network that needs more, as in 512MB")
    width: str = setting("", "the share of every layer's channels that it trains, or auto")
    depth: str = setting("", "how many stages of the network it trains, or auto")
    time_budget: float = setting(
        0.0, "so long may a round's local training take; 0: no limit", unit="seconds", minimum=0
    )
    corrupt: str = setting("", "a broken sensor, as in noise:1.0")

    @property
    def own_dataset(self) -> str:
        """The data set of its own, if it has one."""
        return self.dataset if self.partition_id == NO_SHARD else ""


def read_node(config: Mapping[str, Value]) -> tuple[NodeSettings, DataSettings]:
    """What a node config says of a node, checked.

    Raises:
        UsageError: a value can't be meant. A name that nobody knows is told and passed over, since a
            SuperNode may serve other apps, too.
    """
    values = merge(config)
    try:
        refuse_unknown(values, [NodeSettings, DataSettings])
    except UsageError as unknown:
        _log.warning("In this SuperNode's --node-config: %s It is passed over.", unknown)
    node, data = build(NodeSettings, values), build(DataSettings, values)
    allow(*(spec for spec in (node.model, node.dataset, node.partition) if spec))
    if node.model:
        check("models", node.model)
    if node.dataset:
        check_dataset(node.dataset)
    return node, data


def compare(node: NodeSettings, told: Told) -> None:
    """Raise ``UsageError`` if the node's owner expects another federation than this."""
    for name, expected, setting_name in (
        ("num-partitions", node.num_partitions, "num-shards"),
        ("num-shards", node.num_shards, "num-shards"),
        ("dataset", "" if node.own_dataset else node.dataset, "dataset"),
        ("partition", node.partition, "partition"),
    ):
        if expected and expected != told.settings[setting_name]:
            raise UsageError(
                f"This federation has {setting_name}={told.settings[setting_name]}, and the node's "
                f"--node-config says {name}={expected}: change one of them."
            )


def for_client_app(
    node: NodeSettings, data: DataSettings, shard: int, told: Told
) -> dict[str, Value]:
    """The node config that fedkit's client apps read, as the link's client gives it to them.

    Raises:
        UsageError: a size, a share or a number can't be read.
    """
    broken = "" if node.corrupt == NONE else node.corrupt
    read_noise(broken)
    return {
        "partition-id": shard,
        "num-partitions": told.settings["num-shards"],
        "model": node.model or told.settings["model"],
        "device": node.device,
        "tags": ",".join(word.strip() for word in node.tag.split(",") if word.strip()),
        "data-root": data.data_root,
        "allow-checksum-mismatch": data.allow_checksum_mismatch,
        "own-dataset": node.own_dataset,
        "memory-budget": read_bytes(node.memory_budget) if node.memory_budget else 0,
        "width": read_width(node.width) if node.width else "",
        "depth": read_depth(node.depth) if node.depth else "",
        "time-budget": read_seconds(str(node.time_budget)),
        "corrupt": broken,
        "public-sets": str(
            (Path(node.state_dir) if node.state_dir else DEFAULT_STATE) / PUBLIC_SETS
        ),
    }
