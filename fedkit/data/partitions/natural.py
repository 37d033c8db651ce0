"""The partition that the data come with: by speaker, writer or device."""

from __future__ import annotations

import heapq

import numpy as np

from fedkit.data.partitions.dealing import Indices, Labelled
from fedkit.errors import UsageError


def natural(
    samples: Labelled, shards: int, argument: str | None, generator: np.random.Generator
) -> list[Indices]:
    """natural[:1]: whole owners (speakers, writers, devices); with 1 exactly one a shard, the largest.

    Without argument everybody's samples are dealt: owners from the largest to the smallest, each to the
    shard that has least so far. With ``1`` the samples of the smaller owners are dropped. Shards come in
    the order of their first owner's number. Nothing is drawn: it is the same for every seed. With as
    many shards as owners both are the indices of flwr-datasets' ``NaturalIdPartitioner``.
    """
    if argument not in (None, "1"):
        raise UsageError(f"natural takes 1 or nothing, not {argument!r}.")
    if samples.owners is None:
        raise UsageError(
            "natural deals by speaker, writer or device, and this data set does not know them: "
            "take another partition."
        )
    _, owner, sizes = np.unique(samples.owners, return_inverse=True, return_counts=True)
    if shards > len(sizes):
        raise UsageError(
            f"natural has {len(sizes)} owners for {shards} shards: take --num-shards {len(sizes)} or less."
        )
    largest_first = np.lexsort((np.arange(len(sizes)), -sizes))
    shard_of = np.full(len(sizes), -1)
    if argument == "1":
        shard_of[largest_first[:shards]] = np.arange(shards)
    else:
        heap = [(0, shard) for shard in range(shards)]
        for one in largest_first:
            size, shard = heapq.heappop(heap)
            shard_of[one] = shard
            heapq.heappush(heap, (size + int(sizes[one]), shard))
    first_come = list(dict.fromkeys(shard_of[shard_of >= 0].tolist()))
    return [np.flatnonzero(shard_of[owner] == shard) for shard in first_come]
