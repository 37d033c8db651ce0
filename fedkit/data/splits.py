"""Who holds what: public set, common test set and private shards, cut from the seed alone.

The cut is the same whatever the strategy, so that a shard is the same for every method. Server and
clients make it for themselves and compare digests at join.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from fedkit.data import partitions
from fedkit.data.agreement import Agreement, described, fitted
from fedkit.data.augment import augmentation
from fedkit.data.datasets import open_dataset
from fedkit.data.names import OWN, public_parts, resolve_public
from fedkit.data.partitions import Dealt, Labelled
from fedkit.data.public import PublicSet, renumbered
from fedkit.data.samples import DataSet, Pool, Samples
from fedkit.errors import FedkitError, UsageError
from fedkit.registry import split
from fedkit.seeds import numpy_generator
from fedkit.settings import DataSettings, FederationSettings

OWN_TEST_SHARE = 0.25
# Of a device's own training samples; with less there is no batch to speak of.
FEWEST = 4


@dataclass(frozen=True)
class ClientData:
    """One client's data, cut into what trains, what validates and what only measures (25 %)."""

    train: Samples
    val: Samples
    test: Samples


@dataclass(frozen=True)
class FederatedData:
    """A data set as one federation uses it.

    Attributes:
        settings: the federation's.
        dataset: the private data and the common test set; labels count the networks' outputs.
        classes: the names of the networks' outputs: the public set's own classes, where its labels are
            used and it is another data set, then the private ones (as FedMD numbers them).
        public_set: the public set.
        dealt: who holds what, as indices into ``dataset.train``.
        own: whether ``dataset`` is a device's own and all of it is this client's.
    """

    settings: FederationSettings
    dataset: DataSet
    classes: tuple[str, ...]
    public_set: PublicSet
    dealt: Dealt
    own: bool = False

    @property
    def outputs(self) -> int:
        """Logits of every network."""
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return self.dataset.train.shape

    @property
    def public(self) -> Samples:
        """The public set's samples; labels count the networks' outputs."""
        return self.public_set.samples

    @cached_property
    def common_test(self) -> Samples:
        """The common test set, decoded; of a device's own data there is none to compare others on."""
        test = self.dataset.test
        return test.take(torch.arange(0)) if self.own else test.all()

    @cached_property
    def public_digest(self) -> str:
        """SHA-256 (hex) of the public set."""
        return self.public_set.digest(labels=self.settings.public_labels)

    @cached_property
    def partition_digest(self) -> str:
        """SHA-256 (hex) of the partition: which sample is in which shard; ``own`` for own data."""
        return OWN if self.own else partitions.digest(self.dealt)

    @property
    def agreement(self) -> Agreement:
        """What a client with data of its own must know of these."""
        train = self.dataset.train
        return Agreement(
            shape=self.shape,
            classes=self.classes,
            first_private=len(self.classes) - len(self.dataset.classes),
            columns=self.dataset.columns,
            mean=tuple(train.mean.tolist()),
            std=tuple(train.std.tolist()),
            public_digest=self.public_digest,
        )

    def shard(self, number: int) -> ClientData:
        """Shard ``number``, counted from 0, decoded; all that there is where the data are its own.

        Raises:
            UsageError: there is no such shard.
            FedkitError: a file of its samples is damaged.
        """
        shards, pool = self.dealt.parts, self.dataset.train
        if self.own:
            mine, shared = np.arange(len(pool)), np.empty(0, dtype=np.int64)
        elif 0 <= number < len(shards):
            mine, shared = shards[number], self.dealt.shared[number]
        else:
            raise UsageError(
                f"There is no shard {number}: this federation has {len(shards)}, "
                f"numbered 0 to {len(shards) - 1}."
            )
        order = numpy_generator(self.settings.seed, "own test split", client=number)
        mine = order.permutation(mine)
        with_test = self.own and len(self.dataset.test)
        test = 0 if with_test else max(1, round(len(mine) * OWN_TEST_SHARE))
        val = round((len(mine) - test) * self.settings.val_fraction)
        test_part, val_part, train_part = np.split(mine, [test, test + val])
        train = _taken(pool, np.union1d(train_part, shared))
        return ClientData(
            train=replace(train, augment=augmentation(self.settings.augment, train.shape)),
            val=_taken(pool, val_part),
            test=self.dataset.test.all() if with_test else _taken(pool, test_part),
        )

    def of_client(self, client: int) -> ClientData:
        """A client's shard, decoded; with more clients than shards they take these in turn.

        Raises:
            UsageError, FedkitError: as ``shard``.
        """
        return self.shard(client % self.settings.num_shards)

    def pooled(self, clients: Sequence[int]) -> Samples:
        """The training samples of some clients together; one that several hold counts as often.

        Raises:
            UsageError, FedkitError: as ``shard``.
        """
        parts = [self.of_client(client).train for client in clients]
        return replace(
            parts[0],
            data=torch.cat([part.data for part in parts]),
            labels=torch.cat([part.labels for part in parts]),
        )


def cut(
    settings: FederationSettings, sources: DataSettings, public: PublicSet | None = None
) -> FederatedData:
    """Load the data set and cut it as ``settings`` say.

    Args:
        settings: the federation's.
        sources: where this machine keeps data sets.
        public: the public set, if it is another data set and here already.

    Raises:
        UsageError: a name, a count or a partition that can't be.
        FedkitError: files are missing or damaged.
    """
    settings = resolve_public(settings)
    name, _ = public_parts(settings)
    if split(settings.dataset)[0] == OWN:
        public = public or public_set(settings, open_dataset(name, sources))
        dataset = open_dataset(settings.dataset, sources, public.form)
        mean, std = public.samples.mean, public.samples.std
        nobodys = replace(dataset.train, mean=mean, std=std)
        dataset = replace(dataset, train=nobodys, test=nobodys)
    else:
        dataset = open_dataset(settings.dataset, sources)
    private = np.arange(len(dataset.train))
    if name == settings.dataset:
        public = public_set(settings, dataset)
        private = np.setdiff1d(private, public.indices, assume_unique=True)
    elif public is None:
        public = public_set(settings, open_dataset(name, sources, dataset.form))
    _check_public(settings, public, dataset)
    dealt = _deal(settings, dataset, private)
    if settings.public_labels and name != settings.dataset:
        return FederatedData(settings, *_numbered(dataset, public), dealt)
    return FederatedData(settings, dataset, dataset.classes, public, dealt)


@lru_cache(maxsize=2)
def cut_once(settings: FederationSettings, sources: DataSettings) -> FederatedData:
    """``cut``, kept: server and simulated clients of one process need no data of their own each."""
    return cut(settings, sources)


def public_set(settings: FederationSettings, lent: DataSet) -> PublicSet:
    """The seeded part of a data set that is public.

    Raises:
        UsageError: it has not that many training samples.
    """
    name, count = public_parts(settings)
    pool, whole = lent.train, name != settings.dataset
    count = len(pool) if count is None else count
    if not 0 < count < len(pool) + whole:
        raise UsageError(
            f"public {settings.public!r}: {lent.name} has {len(pool)} training samples."
        )
    order = numpy_generator(settings.seed, "public set").permutation(len(pool))
    chosen = np.sort(order[:count])
    samples = pool.take(torch.from_numpy(chosen))
    return PublicSet(name, chosen, samples, lent.classes, lent.columns)


def own_data(
    settings: FederationSettings, dataset: DataSet, agreement: Agreement, public: PublicSet
) -> FederatedData:
    """A device's own data set in a federation that it takes part in with all of it.

    Raises:
        FedkitError: it does not fit what the federation has agreed on.
    """
    if len(dataset.train) < FEWEST:
        raise FedkitError(
            f"{dataset.name} has {len(dataset.train)} training samples: a device needs {FEWEST} of its "
            "own to take part."
        )
    return FederatedData(
        settings=resolve_public(settings),
        dataset=fitted(dataset, agreement),
        classes=agreement.classes,
        public_set=public if agreement.first_private else renumbered(public, agreement.classes),
        dealt=Dealt([], [], 0),
        own=True,
    )


def _check_public(settings: FederationSettings, public: PublicSet, dataset: DataSet) -> None:
    if public.form != dataset.form:
        raise UsageError(
            f"The public set {public.name} has {described(public.form)}, {dataset.name} "
            f"{described(dataset.form)}: one network can't read both."
        )
    if settings.public_labels and not public.classes:
        raise UsageError(f"The public set {public.name} has no labels: leave --public-labels out.")


def _deal(settings: FederationSettings, dataset: DataSet, private: NDArray[np.int64]) -> Dealt:
    pool = dataset.train
    if not len(pool):  # every client brings its own
        nothing = [private] * settings.num_shards
        return Dealt(nothing, nothing, 0)
    owners = None if pool.owners is None else pool.owners.numpy()[private]
    dealt = partitions.deal(
        settings.partition,
        Labelled(pool.labels.numpy()[private], owners),
        settings.num_shards,
        numpy_generator(settings.seed, "partition"),
    )
    return Dealt(
        [private[part] for part in dealt.parts],
        [private[part] for part in dealt.shared],
        dealt.dropped,
    )


def _numbered(dataset: DataSet, public: PublicSet) -> tuple[DataSet, tuple[str, ...], PublicSet]:
    """Both with labels that count the networks' outputs, and the names of these.

    The public classes come first, then the private ones, as in FedMD; where the private ones have all
    their names, the public classes are these.
    """
    if set(public.classes) <= set(dataset.classes):
        return dataset, dataset.classes, renumbered(public, dataset.classes)
    first = len(public.classes)

    def later(pool: Pool) -> Pool:
        return replace(pool, labels=pool.labels + first)

    numbered = replace(dataset, train=later(dataset.train), test=later(dataset.test))
    return numbered, public.classes + dataset.classes, public


def _taken(pool: Pool, indices: NDArray[np.int64]) -> Samples:
    return pool.take(torch.from_numpy(np.sort(indices)))
