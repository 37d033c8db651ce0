"""Data sharing: a part of every class goes to everybody, the rest is dealt by another partition."""

from __future__ import annotations

import numpy as np

from fedkit.data.partitions import arguments
from fedkit.data.partitions.dealing import Dealt, Indices, Labelled, deal
from fedkit.errors import UsageError


def share(
    samples: Labelled, shards: int, argument: str | None, generator: np.random.Generator
) -> Dealt:
    """share:BETA[,A]+PARTITION: BETA of the samples, even over classes, shared; the rest by PARTITION.

    Zhao et al. 2018, section 4 (algorithms.md 10): the shared pool of BETA x n samples is taken out
    first, equally many of each class; each shard gets a random fraction A of it (all of it if not given),
    to train with. ``share:0+PARTITION`` is PARTITION, to the index.
    """
    numbers, plus, inner = (argument or "").partition("+")
    if not plus or not inner:
        raise UsageError(
            "share takes a share and a partition, as in share:0.05+dirichlet:0.5, not "
            f"{argument!r}."
        )
    beta_text, comma, fraction_text = numbers.partition(",")
    beta = arguments.share("share", beta_text, zero=True)
    fraction = arguments.share("share", fraction_text) if comma else 1.0
    if beta == 0:
        return deal(inner, samples, shards, generator)
    pool = _pool(samples.labels, beta, generator)
    rest = np.setdiff1d(np.arange(len(samples)), pool)
    owners = None if samples.owners is None else samples.owners[rest]
    dealt = deal(inner, Labelled(samples.labels[rest], owners), shards, generator)
    count = max(1, round(fraction * len(pool)))
    shared = [
        np.sort(np.concatenate([generator.choice(pool, count, replace=False), rest[more]]))
        for more in dealt.shared
    ]
    return Dealt([rest[part] for part in dealt.parts], shared, dealt.dropped)


def _pool(labels: Indices, beta: float, generator: np.random.Generator) -> Indices:
    kinds, sizes = np.unique(labels, return_counts=True)
    count = round(beta * len(labels))
    if count < len(kinds):
        raise UsageError(
            f"share:{beta:g} of {len(labels)} samples is {count}, fewer than the {len(kinds)} classes: "
            "share more."
        )
    each = np.full(len(kinds), count // len(kinds))
    each[generator.permutation(len(kinds))[: count % len(kinds)]] += 1
    short = np.flatnonzero(sizes < each)
    if len(short):
        raise UsageError(
            f"share:{beta:g} needs {each[short[0]]} samples of class {kinds[short[0]]}, which has "
            f"{sizes[short[0]]}: share less."
        )
    chosen = [
        generator.choice(np.flatnonzero(labels == kind), number, replace=False)
        for kind, number in zip(kinds, each, strict=True)
    ]
    return np.sort(np.concatenate(chosen))
