"""Label skew by Dirichlet's distribution: class by class, or shard by shard. Two laws: never mix them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedkit.data.partitions import arguments
from fedkit.data.partitions.dealing import MIN_SHARD, Indices, Labelled, hand_out
from fedkit.data.partitions.quantity import DRAWS, check_least
from fedkit.errors import UsageError

Shares = NDArray[np.float64]


def dirichlet(
    samples: Labelled, shards: int, argument: str | None, generator: np.random.Generator
) -> list[Indices]:
    """dirichlet:ALPHA[,min=N][,recut]: each class is dealt by shares from Dir(ALPHA); small is skewed.

    The class-wise law of PFNM, FedDF and PFLlib (algorithms.md 9.2): a shard that has its n/N samples
    gets no more, and draws are repeated until the smallest shard has N samples (10 if not given).
    ``recut`` lays all shards end to end and cuts equal ones, as FedDF and FedLess do: neighbours share a
    boundary class, which softens the skew. Not the indices of flwr-datasets' ``DirichletPartitioner``,
    which draws in another order.
    """
    text, given = arguments.options("dirichlet", argument, "min=", "recut")
    alpha = arguments.positive("dirichlet", text)
    least = arguments.least("dirichlet", given.get("min"), MIN_SHARD)
    check_least(samples, shards, least)
    of_class = [np.flatnonzero(samples.labels == kind) for kind in np.unique(samples.labels)]
    best = 0
    for _ in range(DRAWS):
        orders, cuts, smallest = _draw(of_class, shards, alpha, generator)
        if smallest >= least:
            parts = _dealt(orders, cuts)
            if "recut" in given:
                parts = np.array_split(np.concatenate(parts), shards)
            return [np.sort(part) for part in parts]
        best = max(best, smallest)
    raise UsageError(
        f"dirichlet:{alpha:g} gave no {shards} shards of {least} samples or more in {DRAWS} draws (the "
        f"best had {best} in its smallest): take a larger alpha or fewer shards, or "
        f"dirichlet-min:{alpha:g}, which deals those {least} first."
    )


def dirichlet_min(
    samples: Labelled, shards: int, argument: str | None, generator: np.random.Generator
) -> list[Indices]:
    """dirichlet-min:ALPHA[,min=N]: as dirichlet, but N samples a shard (10) first, then the fill.

    It ends whatever ALPHA is: nothing is drawn again. Shares are drawn for all classes; every shard then
    draws N samples from the classes by its own shares, and what is left of a class is dealt by its
    shares, with the cap of n/N. With a large ALPHA it deals as ``dirichlet`` does.
    """
    text, given = arguments.options("dirichlet-min", argument, "min=")
    alpha = arguments.positive("dirichlet-min", text)
    least = arguments.least("dirichlet-min", given.get("min"), MIN_SHARD)
    check_least(samples, shards, least)
    _, left = np.unique(samples.labels, return_counts=True)
    shares = generator.dirichlet(np.full(shards, alpha), size=len(left))
    wanted = shares * left[:, np.newaxis]
    counts = np.zeros((shards, len(left)), dtype=np.int64)
    for shard in generator.permutation(shards):
        counts[shard] = _draw_counts(left, wanted[:, shard], least, generator)
        left = left - counts[shard]
    for kind, rest in enumerate(left):
        capped = _capped(shares[kind], counts.sum(axis=1), len(samples))
        counts[:, kind] += np.diff(_cuts(capped, rest), prepend=0, append=rest)
    return hand_out(samples.labels, counts, generator)


def dirichlet_client(
    samples: Labelled, shards: int, argument: str | None, generator: np.random.Generator
) -> list[Indices]:
    """dirichlet-client:ALPHA: equal shards, each with class shares of its own from Dir(ALPHA x prior).

    The shard-wise law (algorithms.md 9.3): a shard draws its n/N samples one by one without
    replacement, by its shares of the classes that are not used up; the last ones take what is left. The
    prior is the label distribution of the whole, so that ALPHA is comparable to ALPHA/C of
    ``dirichlet`` with C classes, not to ALPHA.
    """
    text, _ = arguments.options("dirichlet-client", argument)
    alpha = arguments.positive("dirichlet-client", text)
    _, left = np.unique(samples.labels, return_counts=True)
    concentration = alpha * left / len(samples)
    counts = np.zeros((shards, len(left)), dtype=np.int64)
    for shard, part in enumerate(np.array_split(np.arange(len(samples)), shards)):
        shares = generator.dirichlet(concentration)
        counts[shard] = _draw_counts(left, shares, len(part), generator)
        left = left - counts[shard]
    return hand_out(samples.labels, counts, generator)


def _draw(
    of_class: list[Indices], shards: int, alpha: float, generator: np.random.Generator
) -> tuple[list[Indices], list[Indices], int]:
    """Each class's samples in a random order, where they are cut, and the smallest shard's size."""
    count = sum(len(mine) for mine in of_class)
    sizes = np.zeros(shards, dtype=np.int64)
    orders, cuts = [], []
    for mine in of_class:
        orders.append(generator.permutation(mine))
        shares = _capped(generator.dirichlet(np.full(shards, alpha)), sizes, count)
        cuts.append(_cuts(shares, len(mine)))
        sizes += np.diff(cuts[-1], prepend=0, append=len(mine))
    return orders, cuts, int(sizes.min())


def _dealt(orders: list[Indices], cuts: list[Indices]) -> list[Indices]:
    # Only of the draw that counts: a thousand that do not would take minutes.
    pieces = [np.split(mine, at) for mine, at in zip(orders, cuts, strict=True)]
    return [np.concatenate(of_shard) for of_shard in zip(*pieces, strict=True)]


def _capped(shares: Shares, sizes: Indices, count: int) -> Shares:
    """A class's shares, without the shards that have their n/N samples."""
    shares = np.where(sizes < count / len(sizes), shares, 0.0)
    total = shares.sum()
    # With a tiny alpha every share that is left may underflow to zero.
    return shares / total if total > 0 else np.full(len(sizes), 1 / len(sizes))


def _cuts(shares: Shares, count: int) -> Indices:
    # Rounded, not floored as in the papers' code: that gives the last shard a stray sample
    # of nearly every class.
    return np.rint(np.cumsum(shares)[:-1] * count).astype(np.int64)


def _draw_counts(
    left: Indices, weights: Shares, count: int, generator: np.random.Generator
) -> Indices:
    """``count`` draws without replacement, a class by its weight among those that are not used up.

    All that are missing are drawn at once; what a class no longer has is drawn again from the others,
    which is the same law. Each turn ends it or uses a class up.
    """
    taken = np.zeros_like(left)
    while missing := count - int(taken.sum()):
        odds = np.where(taken < left, weights, 0.0)
        if not odds.sum() > 0:  # a tiny alpha: all that is left has underflowed to zero
            odds = (left - taken).astype(np.float64)
        taken += np.minimum(generator.multinomial(missing, odds / odds.sum()), left - taken)
    return taken
