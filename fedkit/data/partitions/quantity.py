"""Partitions whose shards look alike: equally large (``iid``), or not (``quantity``)."""

from __future__ import annotations

import numpy as np

from fedkit.data.partitions import arguments
from fedkit.data.partitions.dealing import MIN_SHARD, Indices, Labelled
from fedkit.errors import UsageError

DRAWS = 1000


def iid(
    samples: Labelled, shards: int, argument: str | None, generator: np.random.Generator
) -> list[Indices]:
    """iid: shuffled and cut into equal parts (sizes differ by one at most).

    The same indices as flwr-datasets' ``IidPartitioner`` in a ``FederatedDataset`` that shuffles with
    the same generator; the partitioner alone cuts the samples in the order in which they lie.
    """
    arguments.nothing("iid", argument)
    return [np.sort(part) for part in np.array_split(generator.permutation(len(samples)), shards)]


def quantity(
    samples: Labelled, shards: int, argument: str | None, generator: np.random.Generator
) -> list[Indices]:
    """quantity:ALPHA[,min=N]: labels as in the whole, sizes by shares from Dir(ALPHA).

    Drawn again until the smallest shard has N samples (10 if not given); NIID-Bench
    (arXiv 2102.02079), algorithms.md 9.6. A large ALPHA is ``iid``.
    """
    text, given = arguments.options("quantity", argument, "min=")
    alpha = arguments.positive("quantity", text)
    least = arguments.least("quantity", given.get("min"), MIN_SHARD)
    check_least(samples, shards, least)
    best = 0
    for _ in range(DRAWS):
        shares = generator.dirichlet(np.full(shards, alpha))
        cuts = np.rint(np.cumsum(shares) * len(samples)).astype(np.int64)[:-1]
        smallest = int(np.diff(cuts, prepend=0, append=len(samples)).min())
        if smallest >= least:
            order = generator.permutation(len(samples))
            return [np.sort(part) for part in np.split(order, cuts)]
        best = max(best, smallest)
    raise UsageError(
        f"quantity:{alpha:g} gave no {shards} shards of {least} samples or more in {DRAWS} draws (the "
        f"best had {best} in its smallest): take a larger alpha, fewer shards or a smaller min."
    )


def check_least(samples: Labelled, shards: int, least: int) -> None:
    """Raise ``UsageError`` if there are not ``least`` samples for every shard."""
    if len(samples) < least * shards:
        raise UsageError(
            f"{len(samples)} private samples make no {shards} shards of {least} samples or more: "
            f"take {len(samples) // least or 'fewer'} shards or fewer, or a smaller min."
        )
