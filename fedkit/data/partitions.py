"""Partitions: how private samples are dealt into shards.

A partition is a function ``(labels, shards, argument, generator) -> list of index arrays``: sorted,
disjoint, together every index, the same for the same generator. ``labels`` is int64, n; the result
has one int64 array a shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedkit.errors import UsageError
from fedkit.registry import load, split

Indices: TypeAlias = NDArray[np.int64]
Partition: TypeAlias = Callable[[Indices, int, str | None, np.random.Generator], list[Indices]]

MIN_SHARD = 10
DIRICHLET_DRAWS = 1000


def deal(spec: str, labels: Indices, shards: int, generator: np.random.Generator) -> list[Indices]:
    """Deal samples into shards as ``spec`` says, e.g. ``dirichlet:0.5``.

    Raises:
        UsageError: no such partition, a bad argument, or no way to deal so few samples so.
    """
    name, argument = split(spec)
    partition: Partition = load("partitions", name)
    if shards > len(labels):
        raise UsageError(f"{len(labels)} private samples can't be dealt into {shards} shards.")
    return partition(labels, shards, argument, generator)


def digest(parts: list[Indices]) -> str:
    """SHA-256 (hex) of who holds what; both sides compare it at join."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "big"))
        sha.update(part.astype(">i8").tobytes())
    return sha.hexdigest()


def iid(
    labels: Indices, shards: int, argument: str | None, generator: np.random.Generator
) -> list[Indices]:
    """iid: shuffled and cut into equal parts (sizes differ by one at most)."""
    if argument is not None:
        raise UsageError("iid takes no argument.")
    return [np.sort(part) for part in np.array_split(generator.permutation(len(labels)), shards)]


def dirichlet(
    labels: Indices, shards: int, argument: str | None, generator: np.random.Generator
) -> list[Indices]:
    """dirichlet:ALPHA: each class is dealt by shares drawn from Dir(ALPHA); small ALPHA is skewed.

    The class-wise law of PFNM, FedDF and PFLlib (algorithms.md 9.2): a shard that has its n/N samples
    gets no more, and draws are repeated until the smallest shard has ten samples. Not the indices of
    flwr-datasets' ``DirichletPartitioner``, which draws in another order.
    """
    alpha = _positive("dirichlet", argument)
    if len(labels) < MIN_SHARD * shards:
        raise UsageError(
            f"{len(labels)} private samples make no {shards} shards of {MIN_SHARD} samples or more: "
            "take fewer shards."
        )
    best = 0
    for _ in range(DIRICHLET_DRAWS):
        parts = _draw_dirichlet(labels, shards, alpha, generator)
        smallest = min(len(part) for part in parts)
        if smallest >= MIN_SHARD:
            return parts
        best = max(best, smallest)
    raise UsageError(
        f"dirichlet:{alpha:g} gave no {shards} shards of {MIN_SHARD} samples or more in "
        f"{DIRICHLET_DRAWS} draws (the best had {best} in its smallest): "
        "take a larger alpha or fewer shards."
    )


def classes(
    labels: Indices, shards: int, argument: str | None, generator: np.random.Generator
) -> list[Indices]:
    """classes:K: every shard holds exactly K classes, every class is held by about equally many.

    Classes are dealt like cards, the least-dealt first and ties at random; a class's samples are then
    cut equally among its holders (algorithms.md 9.4c).
    """
    kinds = np.unique(labels)
    per_shard = _whole("classes", argument)
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


def _draw_dirichlet(
    labels: Indices, shards: int, alpha: float, generator: np.random.Generator
) -> list[Indices]:
    parts: list[list[Indices]] = [[] for _ in range(shards)]
    sizes = np.zeros(shards, dtype=np.int64)
    for kind in np.unique(labels):
        mine = generator.permutation(np.flatnonzero(labels == kind))
        shares = generator.dirichlet(np.full(shards, alpha))
        shares = np.where(sizes < len(labels) / shards, shares, 0.0)
        total = shares.sum()
        # With a tiny alpha every share that is left may underflow to zero.
        shares = shares / total if total > 0 else np.full(shards, 1 / shards)
        # Rounded, not floored as in the papers' code: that gives the last shard a stray sample
        # of nearly every class.
        cuts = np.rint(np.cumsum(shares)[:-1] * len(mine)).astype(np.int64)
        for shard, piece in enumerate(np.split(mine, cuts)):
            parts[shard].append(piece)
            sizes[shard] += len(piece)
    return [np.sort(np.concatenate(pieces)) for pieces in parts]


def _positive(name: str, argument: str | None) -> float:
    try:
        value = float(argument or "")
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"{name} takes a positive number, as in {name}:0.5, not {argument!r}.")
    return value


def _whole(name: str, argument: str | None) -> int:
    try:
        return int(argument or "")
    except ValueError:
        raise UsageError(
            f"{name} takes a whole number, as in {name}:2, not {argument!r}."
        ) from None
