"""How far shards are from the whole: measures of label skew, on counts (int64, shards x classes)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Counts: TypeAlias = NDArray[np.int64]
PerShard: TypeAlias = NDArray[np.float64]


def class_counts(labels: Counts, parts: Sequence[Counts], classes: int) -> Counts:
    """How many samples of each class a shard holds (int64, shards x classes).

    ``labels`` is int64, n, below ``classes``; ``parts`` are indices into it, one array a shard.
    """
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts])


def shares(counts: Counts) -> NDArray[np.float64]:
    """Each shard's label distribution (shards x classes, rows sum to 1)."""
    held: NDArray[np.float64] = counts / counts.sum(axis=1, keepdims=True)
    return held


def largest_share(counts: Counts) -> PerShard:
    """The share of a shard's largest class: 1/C where all are alike, 1 where it holds only one."""
    largest: PerShard = shares(counts).max(axis=1)
    return largest


def total_variation(counts: Counts, whole: Counts) -> PerShard:
    """Half the L1 distance of each shard's label distribution to that of ``whole`` (counts, C).

    The share of a shard's samples that would have to change their class: 0 is IID, and a shard of one
    class of ten equal ones has 0.9.
    """
    distance: PerShard = np.abs(shares(counts) - whole / whole.sum()).sum(axis=1) / 2
    return distance


def effective_classes(counts: Counts) -> PerShard:
    """exp(entropy) of each shard's label distribution: as diverse as so many equally large classes.

    1 for a single class, C for C equal ones.
    """
    held = shares(counts)
    logs = np.log(held, where=held > 0, out=np.zeros_like(held))
    effective: PerShard = np.exp(-(held * logs).sum(axis=1))
    return effective
