"""The contract of partitions: what they see, what they give back, and that this holds.

A partition is a function ``(samples, shards, argument, generator) -> list of index arrays``, one int64
array a shard: sorted, disjoint, none empty, the same for the same generator. What it leaves out of the
samples is dropped. One that wraps another (``share``) gives a ``Dealt`` back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedkit.errors import FedkitError, UsageError
from fedkit.registry import find

Indices: TypeAlias = NDArray[np.int64]
# Fewer samples make no shard that could be cut into training and test data.
MIN_SHARD = 10


@dataclass(frozen=True)
class Labelled:
    """What a partition sees of the private samples.

    Attributes:
        labels: int64, n.
        owners: int64, n: the speaker, writer or device of each sample, where the data set knows.
    """

    labels: Indices
    owners: Indices | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dealt:
    """Who holds what.

    Attributes:
        parts: the samples of each shard: sorted, disjoint, never empty.
        shared: what each shard gets of a shared pool, for training only: sorted, no part has any of it;
            empty where nothing is shared.
        dropped: how many samples nobody holds, where the original drops some.
    """

    parts: list[Indices]
    shared: list[Indices]
    dropped: int


Partition: TypeAlias = Callable[
    [Labelled, int, str | None, np.random.Generator], list[Indices] | Dealt
]


def deal(spec: str, samples: Labelled, shards: int, generator: np.random.Generator) -> Dealt:
    """Deal samples into shards as ``spec`` says, e.g. ``dirichlet:0.5``.

    Raises:
        UsageError: no such partition, a bad argument, no way to deal so few samples so, or a plug-in
            whose result is no partition.
        FedkitError: a plug-in that fails.
    """
    partition: Partition
    partition, argument = find("partitions", spec)
    if shards > len(samples):
        raise UsageError(f"{len(samples)} private samples can't be dealt into {shards} shards.")
    try:
        result = partition(samples, shards, argument, generator)
    except FedkitError:
        raise
    except Exception as error:  # whatever somebody's own code raises
        raise FedkitError(
            f"The partition {spec} failed with {type(error).__name__}: {error}."
        ) from error
    nothing = [np.empty(0, dtype=np.int64) for _ in range(shards)]
    whole = result if isinstance(result, Dealt) else Dealt(result, nothing, 0)
    broken = _broken(whole, shards, len(samples))
    if broken:
        raise UsageError(f"The partition {spec} is none: {broken}.")
    held = np.unique(np.concatenate([*whole.parts, *whole.shared]))
    return Dealt(whole.parts, whole.shared, len(samples) - len(held))


def digest(dealt: Dealt) -> str:
    """SHA-256 (hex) of who holds what; both sides compare it at join."""
    sha = hashlib.sha256()
    _add(sha, dealt.parts)
    if any(len(part) for part in dealt.shared):
        sha.update(b"shared")
        _add(sha, dealt.shared)
    return sha.hexdigest()


def hand_out(labels: Indices, counts: Indices, generator: np.random.Generator) -> list[Indices]:
    """Parts with ``counts`` (shards x classes, in the order of ``np.unique(labels)``) random samples."""
    parts: list[list[Indices]] = [[] for _ in counts]
    for column, kind in enumerate(np.unique(labels)):
        mine = generator.permutation(np.flatnonzero(labels == kind))
        pieces = np.split(mine, np.cumsum(counts[:, column]))
        for part, piece in zip(parts, pieces[:-1], strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(pieces)) for pieces in parts]


def _broken(dealt: Dealt, shards: int, count: int) -> str | None:
    for name, arrays in (("parts", dealt.parts), ("shared samples", dealt.shared)):
        if not isinstance(arrays, list) or len(arrays) != shards:
            many = f"{len(arrays)} {name}" if isinstance(arrays, list) else f"no list of {name}"
            return f"it makes {many} for {shards} shards"
        for shard, array in enumerate(arrays):
            if not isinstance(array, np.ndarray) or array.dtype != np.int64 or array.ndim != 1:
                return f"the {name} of shard {shard} are no array of int64"
            if len(array) and not (
                array[0] >= 0 and array[-1] < count and (np.diff(array) > 0).all()
            ):
                return f"the {name} of shard {shard} are not sorted indices below {count}"
    for shard, part in enumerate(dealt.parts):
        if not len(part):
            return f"shard {shard} is empty"
    times = np.bincount(np.concatenate(dealt.parts), minlength=count)
    times[np.unique(np.concatenate(dealt.shared))] += 1
    twice = np.flatnonzero(times > 1)
    return f"sample {twice[0]} is dealt twice" if len(twice) else None


def _add(sha: hashlib._Hash, arrays: list[Indices]) -> None:
    for array in arrays:
        sha.update(len(array).to_bytes(8, "big"))
        sha.update(array.astype(">i8").tobytes())
