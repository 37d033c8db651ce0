"""How a device comes to its data: a shard of the federation's, or all of its own, and the public set."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message

from clients import memory
from fedkit.data import public as public_sets
from fedkit.data.agreement import Agreement, read_agreement
from fedkit.data.datasets import open_dataset
from fedkit.data.names import OWN, public_parts
from fedkit.data.public import PublicSet
from fedkit.data.splits import FederatedData, cut, cut_once, own_data, public_set
from fedkit.errors import FedkitError
from fedkit.knowledge.arrays import as_arrays
from fedkit.registry import split
from fedkit.settings import DataSettings, FederationSettings, build


class PublicMissing(FedkitError):
    """The public set is not on this device; the server may have it sent."""


def take_offer(message: Message, context: Context) -> None:
    """Keep what the server tells at join: what the federation has agreed on, and the public set.

    Raises:
        ValueError: it is none of these.
        FedkitError: there is no place to keep the public set, or the disk is full.
    """
    offer = message.content.config_records.get("offer")
    if offer is None:
        return
    agreement = read_agreement(str(offer["agreement"]))
    work = (int(str(offer[name])) for name in ("batch-size", "epochs", "steps"))
    memory.keep_agreement(context, agreement, *work)
    memory.keep_levels(context, str(offer["levels"]))
    sent = message.content.array_records.get("public")
    if isinstance(sent, ArrayRecord):
        arrays = as_arrays(sent)
        settings = build(FederationSettings, context.run_config)
        name, labels = public_parts(settings)[0], settings.public_labels
        # Nothing is written that is not what it should be.
        public_sets.received(name, arrays, agreement, labels=labels)
        public_sets.keep(arrays, _cache(context), agreement)


def federated_data(
    context: Context, settings: FederationSettings, sources: DataSettings
) -> FederatedData:
    """The federation's data as this device has them.

    Raises:
        PublicMissing: of all that it needs the public set alone is not here.
        FedkitError: data are missing, or do not fit the federation.
    """
    agreement = memory.recall_agreement(context)
    own = str(context.node_config.get("own-dataset", ""))
    if own:
        if agreement is None:
            raise FedkitError(
                "This server does not tell its classes: own data can't be used in it."
            )
        dataset = open_dataset(own, sources, agreement.form)
        public = _public_set(_cache(context), settings, sources, agreement)
        return own_data(settings, dataset, agreement, public)
    if split(settings.dataset)[0] == OWN:
        raise FedkitError(
            "In this federation every device brings its own data: give --dataset, as in --dataset "
            "folder:PATH, instead of --data-shard."
        )
    if agreement is None or public_parts(settings)[0] == settings.dataset:
        return cut_once(settings, sources)
    return _cut_with_public(_cache(context), settings, sources, agreement)


@lru_cache(maxsize=2)
def _cut_with_public(
    cache: Path, settings: FederationSettings, sources: DataSettings, agreement: Agreement
) -> FederatedData:
    # Simulated clients share a process, and then this.
    return cut(settings, sources, _public_set(cache, settings, sources, agreement))


def _public_set(
    cache: Path, settings: FederationSettings, sources: DataSettings, agreement: Agreement
) -> PublicSet:
    name, _ = public_parts(settings)
    kept = public_sets.kept(name, cache, agreement, labels=settings.public_labels)
    if kept is not None:
        return kept
    try:
        return public_set(settings, open_dataset(name, sources, agreement.form))
    except FedkitError as error:
        raise PublicMissing(str(error)) from error


def _cache(context: Context) -> Path:
    return Path(str(context.node_config["public-sets"]))
