"""Pathological partitions: a shard holds few classes, and which ones is dealt like cards."""

from __future__ import annotations

import numpy as np

from fedkit.data.partitions import arguments
from fedkit.data.partitions.dealing import Indices, Labelled
from fedkit.errors import UsageError

PERMUTATIONS = 1000


def classes(
    samples: Labelled, shards: int, argument: str | None, generator: np.random.Generator
) -> list[Indices]:
    """classes:K: every shard holds exactly K classes, every class is held by about equally many.

    Classes are dealt like cards, the least-dealt first and ties at random; a class's samples are then
    cut equally among its holders (algorithms.md 9.4c). Not the indices of flwr-datasets'
    ``PathologicalPartitioner``, which may leave classes to nobody.
    """
    labels = samples.labels
    kinds = np.unique(labels)
    per_shard = arguments.whole("classes", argument)
    if not 1 <= per_shard <= len(kinds):
        raise UsageError(f"classes:{per_shard} is not possible with {len(kinds)} classes.")
    if shards * per_shard < len(kinds):
        raise UsageError(
            f"classes:{per_shard} with {shards} shards leaves some of the {len(kinds)} classes to "
            "nobody: take more shards or more classes a shard."
        )
    holders: list[list[int]] = [[] for _ in kinds]
    for shard in generator.permutation(shards):
        dealt = np.array([len(who) for who in holders])
        fewest_first = np.lexsort((generator.random(len(kinds)), dealt))
        for kind in fewest_first[:per_shard]:
            holders[kind].append(int(shard))
    parts: list[list[Indices]] = [[] for _ in range(shards)]
    for kind, who in zip(kinds, holders, strict=True):
        mine = generator.permutation(np.flatnonzero(labels == kind))
        if len(mine) < len(who):
            raise UsageError(
                f"class {kind} has {len(mine)} samples for its {len(who)} shards: take fewer shards."
            )
        for shard, piece in zip(who, np.array_split(mine, len(who)), strict=True):
            parts[shard].append(piece)
    return [np.sort(np.concatenate(pieces)) for pieces in parts]


def label_shards(
    samples: Labelled, shards: int, argument: str | None, generator: np.random.Generator
) -> list[Indices]:
    """shards:K: FedAvg's: sorted by label, cut into K pieces a shard, K random pieces for each.

    McMahan et al. 2017, section 3 (algorithms.md 9.4a): MNIST, 100 clients, K=2 are its 200 pieces of
    300. A shard may hold fewer than K classes, or more where a border falls inside a piece. Equal to the
    indices of flwr-datasets' ``ShardPartitioner`` with the same generator where K x shards divides the
    samples; else theirs drops the remainder.
    """
    each = arguments.whole("shards", argument)
    if not 1 <= each <= len(samples) // shards:
        raise UsageError(
            f"shards:{each} is not possible with {len(samples)} samples in {shards} shards: "
            f"take 1 to {len(samples) // shards}."
        )
    pieces = np.array_split(np.argsort(samples.labels, kind="stable"), each * shards)
    dealt = generator.permutation(each * shards).reshape(shards, each)
    return [np.sort(np.concatenate([pieces[number] for number in row])) for row in dealt]


def lecture(
    samples: Labelled, shards: int, argument: str | None, generator: np.random.Generator
) -> list[Indices]:
    """lecture:1|2: as many shards as classes; each a whole class, or halves of two classes.

    algorithms.md 9.7. In ``lecture:1`` shard k has all of the k-th class; in ``lecture:2`` every class
    is cut in halves, and a permutation of these is drawn until each shard's two differ in class.
    """
    if argument not in ("1", "2"):
        raise UsageError(f"lecture takes 1 or 2, as in lecture:2, not {argument!r}.")
    kinds, sizes = np.unique(samples.labels, return_counts=True)
    if shards != len(kinds):
        raise UsageError(
            f"lecture:{argument} with {len(kinds)} classes makes {len(kinds)} shards, not {shards}: "
            f"take --num-shards {len(kinds)}, or classes:{argument}."
        )
    if argument == "1":
        return [np.flatnonzero(samples.labels == kind) for kind in kinds]
    if sizes.min() < 2:
        raise UsageError(f"lecture:2 can't halve class {kinds[sizes.argmin()]}: it has one sample.")
    halves = [
        half
        for kind in kinds
        for half in np.array_split(generator.permutation(np.flatnonzero(samples.labels == kind)), 2)
    ]
    for _ in range(PERMUTATIONS):
        pairs = generator.permutation(len(halves)).reshape(shards, 2)
        if (pairs[:, 0] // 2 != pairs[:, 1] // 2).all():
            return [np.sort(np.concatenate([halves[one], halves[two]])) for one, two in pairs]
    raise UsageError("lecture:2 needs two classes or more.")
