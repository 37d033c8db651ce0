"""Partitions of one paper each: HeteroFL, KT-pFL and FedMarl. Most leave samples to nobody."""

from __future__ import annotations

from math import gcd

import numpy as np

from fedkit.data.partitions import arguments
from fedkit.data.partitions.dealing import MIN_SHARD, Indices, Labelled, hand_out
from fedkit.errors import UsageError

# KT-pFL's generator (cugzj/KT-pFL, as in pFedMe): its own constants.
FIRST = 10
MORE = (300, 600)
DOUBLED_UP_TO = 20
# FedMarl's sizes: the j-th largest is as j to this power (our choice; the paper's is not known).
SIZE_EXPONENT = -0.5


def heterofl(
    samples: Labelled, shards: int, argument: str | None, generator: np.random.Generator
) -> list[Indices]:
    """heterofl:K: HeteroFL's non-IID-K: up to K classes a shard; samples of repeated ones are dropped.

    Diao et al. 2021's code (algorithms.md 9.4b): every class is cut into K x shards / C pieces, the
    list of their labels is permuted and dealt, K a shard; a shard that gets a label twice takes one
    piece of it, and the other goes to nobody.
    """
    each = arguments.whole("heterofl", argument)
    labels = samples.labels
    kinds, sizes = np.unique(labels, return_counts=True)
    if not 1 <= each <= len(kinds):
        raise UsageError(f"heterofl:{each} is not possible with {len(kinds)} classes.")
    pieces, rest = divmod(each * shards, len(kinds))
    if rest:
        step = len(kinds) // gcd(each, len(kinds))
        raise UsageError(
            f"heterofl:{each} can't deal {each * shards} pieces of {len(kinds)} classes evenly: take a "
            f"multiple of {step} as --num-shards."
        )
    if sizes.min() < pieces:
        raise UsageError(
            f"class {kinds[sizes.argmin()]} has {sizes.min()} samples for {pieces} pieces: "
            "take fewer shards."
        )
    heaps = [
        np.array_split(generator.permutation(np.flatnonzero(labels == kind)), pieces)
        for kind in kinds
    ]
    dealt = generator.permutation(np.repeat(np.arange(len(kinds)), pieces)).reshape(shards, each)
    return [
        np.sort(np.concatenate([heaps[kind].pop() for kind in np.unique(row)])) for row in dealt
    ]


def ktpfl1(
    samples: Labelled, shards: int, argument: str | None, generator: np.random.Generator
) -> list[Indices]:
    """ktpfl1[:min=N]: KT-pFL's non-IID-1: every shard has every class, in counts that differ.

    algorithms.md 9.5: N samples of each class (10 if not given) for everybody, the rest of the class by
    shares from Dir(1).
    """
    word, _, text = ("min", "=", None) if argument is None else argument.partition("=")
    if word != "min":
        raise UsageError(f"ktpfl1 takes min=N or nothing, not {argument!r}.")
    least = arguments.least("ktpfl1", text, FIRST)
    kinds, sizes = np.unique(samples.labels, return_counts=True)
    _check_first(kinds, sizes, np.full(len(kinds), least * shards), "ktpfl1", "a smaller min")
    counts = np.full((shards, len(kinds)), least, dtype=np.int64)
    for column, rest in enumerate(sizes - least * shards):
        shares = generator.dirichlet(np.ones(shards))
        cuts = np.rint(np.cumsum(shares)[:-1] * rest).astype(np.int64)
        counts[:, column] += np.diff(cuts, prepend=0, append=rest)
    return hand_out(samples.labels, counts, generator)


def ktpfl2(
    samples: Labelled, shards: int, argument: str | None, generator: np.random.Generator
) -> list[Indices]:
    """ktpfl2: KT-pFL's non-IID-2: two classes a shard, k and k+1; what does not fit is dropped.

    The authors' generator with NUM_LABELS=2 (algorithms.md 9.5): 10 samples of each of the two, then a
    lognormal share and 300 to 600 more, doubled up to 20 shards; a piece that no longer fits into its
    class is skipped. The shares are normalised over all pairs of a shard and a label, of which a tenth
    is used: so about a third of 60,000 samples goes to nobody. Made for thousands of samples a class:
    with a few hundred every piece is skipped, and 20 samples a shard are left.
    """
    arguments.nothing("ktpfl2", argument)
    kinds, sizes = np.unique(samples.labels, return_counts=True)
    if len(kinds) < 2:
        raise UsageError("ktpfl2 deals two classes a shard, and the data have one.")
    pairs = [(shard, (shard + j) % len(kinds), j) for shard in range(shards) for j in range(2)]
    counts = np.zeros((shards, len(kinds)), dtype=np.int64)
    for shard, kind, _ in pairs:
        counts[shard, kind] += FIRST
    used = counts.sum(axis=0)
    _check_first(kinds, sizes, used, "ktpfl2", "a larger data set")
    spread = generator.lognormal(0.0, 2.0, (len(kinds), shards, 2))
    spread *= (np.maximum(sizes - shards, 0) / spread.sum(axis=(1, 2)))[:, np.newaxis, np.newaxis]
    row = max(1, shards // len(kinds))
    for shard, kind, j in pairs:
        more = int(spread[kind, shard // row, j]) + int(generator.integers(*MORE, endpoint=True))
        if shards <= DOUBLED_UP_TO:
            more *= 2
        if used[kind] + more < sizes[kind]:
            counts[shard, kind] += more
            used[kind] += more
    return hand_out(samples.labels, counts, generator)


def dominant(
    samples: Labelled, shards: int, argument: str | None, generator: np.random.Generator
) -> list[Indices]:
    """dominant:SHARE: FedMarl's: that share of each shard is one class, the rest even over all others.

    algorithms.md 9.8, with SHARE = 0.8. Sizes follow a power law, the j-th largest as 1/sqrt(j); the
    largest shards choose their class first, each the one that is asked for least. All sizes are as large
    as the class that ends first allows; what the others have left is dropped.
    """
    text, _ = arguments.options("dominant", argument)
    share = arguments.share("dominant", text)
    kinds, sizes = np.unique(samples.labels, return_counts=True)
    if len(kinds) < 2:
        raise UsageError("dominant needs two classes or more.")
    weights = generator.permutation(np.arange(1.0, shards + 1) ** SIZE_EXPONENT)
    mains = np.zeros(shards, dtype=np.int64)
    load = np.zeros(len(kinds))
    for shard in np.argsort(-weights):
        mains[shard] = np.lexsort((generator.random(len(kinds)), load / sizes))[0]
        load[mains[shard]] += weights[shard]
    others = (weights.sum() - load) * (1 - share) / (len(kinds) - 1)
    scale = 1 / ((share * load + others) / sizes).max()
    order = generator.random((shards, len(kinds)))
    # Rounding can ask for a sample more than a class has; then all sizes are a little smaller.
    for percent in range(100, 0, -1):
        counts = _dominated(np.floor(weights * scale * percent / 100), mains, share, order)
        if (counts.sum(axis=0) <= sizes).all():
            break
    smallest = int(counts.sum(axis=1).min())
    if smallest < MIN_SHARD or (counts.sum(axis=0) > sizes).any():
        raise UsageError(
            f"dominant:{share:g} leaves the smallest of {shards} shards {smallest} samples, fewer than "
            f"{MIN_SHARD}: take fewer shards."
        )
    return hand_out(samples.labels, counts, generator)


def _dominated(
    shard_sizes: np.ndarray[tuple[int], np.dtype[np.float64]],
    mains: Indices,
    share: float,
    order: np.ndarray[tuple[int, int], np.dtype[np.float64]],
) -> Indices:
    """Samples of each class (shards x classes); ``order`` says which others get the odd ones."""
    first = np.rint(share * shard_sizes).astype(np.int64)
    even, odd = np.divmod(shard_sizes.astype(np.int64) - first, order.shape[1] - 1)
    ranked = order.copy()
    ranked[np.arange(len(mains)), mains] = np.inf
    place = ranked.argsort(axis=1).argsort(axis=1)
    counts = even[:, np.newaxis] + (place < odd[:, np.newaxis])
    counts[np.arange(len(mains)), mains] = first
    return counts


def _check_first(kinds: Indices, sizes: Indices, needed: Indices, name: str, instead: str) -> None:
    short = np.flatnonzero(sizes < needed)
    if len(short):
        kind = short[0]
        raise UsageError(
            f"{name} needs {needed[kind]} samples of class {kinds[kind]}, which has {sizes[kind]}: take "
            f"fewer shards or {instead}."
        )
