"""Measure saved models as their run measured them: the same data, threads and batches, the same bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from fedkit.data.agreement import described
from fedkit.data.datasets import open_dataset
from fedkit.data.names import OWN
from fedkit.data.samples import DataSet, Samples
from fedkit.data.splits import FederatedData, cut
from fedkit.errors import FedkitError, UsageError
from fedkit.models.device import compute_with, pick_device, repeatable
from fedkit.models.files import About, SavedModel, network, of_known_network
from fedkit.models.measure import measure
from fedkit.settings import DataSettings, FederationSettings


def evaluate(
    saved: SavedModel,
    sources: DataSettings,
    *,
    dataset: str | None = None,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Accuracy, loss and ``n`` of a saved model on each set of data, as rows for people or JSON.

    Args:
        saved: the model.
        sources: where this machine keeps data sets.
        dataset: measure on this data set's test set instead of the federation's data.
        device: where to compute; None: as its run did by default, so a model of the server's on the
            CPU, a client's on a GPU if there is one.

    Raises:
        UsageError: there is no such data set.
        FedkitError: the model's file or the data are damaged, missing, or do not fit each other.
    """
    about, model = of_known_network(saved), network(saved)
    compute_with(about.federation.threads)
    repeatable()
    where = pick_device(device or ("cpu" if about.client is None else "auto"))
    model = model.to(where)
    rows = []
    for name, samples in _data(saved, about, sources, dataset):
        accuracy, loss = measure(model, samples.to(where))
        rows.append(
            {
                "architecture": about.architecture,
                "client": about.client,
                "round": about.round,
                "dataset": dataset or about.federation.dataset,
                "data": name,
                "accuracy": accuracy,
                # JSON has no word for what a diverged model gives.
                "loss": loss if math.isfinite(loss) else None,
                "n": len(samples),
            }
        )
    return rows


def _data(
    saved: SavedModel, about: About, sources: DataSettings, dataset: str | None
) -> Iterator[tuple[str, Samples]]:
    settings = about.federation
    if dataset is not None and dataset != settings.dataset:
        yield "test", _test_set(saved, about, _open(dataset, sources, about.form))
        return
    if about.partition == OWN:
        raise UsageError(
            f"The model in {saved.source} learned from its device's own data: give --dataset, as in "
            "--dataset folder:PATH, to say what to measure it on."
        )
    data = _cut(settings, sources)
    if len(data.dataset.test):
        yield "global_test", _as_learned(about, data.dataset.test.all())
    if about.client is None:
        return
    if data.partition_digest != about.partition:
        raise FedkitError(
            f"This machine deals the data set {settings.dataset} into other shards than the "
            f"federation of {saved.source} (other files under its data root, or another version of "
            "NumPy): which were the client's own test data can't be told."
        )
    yield "own_test", _as_learned(about, data.shard(about.client).test)


def _test_set(saved: SavedModel, about: About, data: DataSet) -> Samples:
    columns = _columns(about, data)
    form = replace(data.form, shape=data.test.shape)
    if form.shape != about.shape or columns is None:
        raise FedkitError(
            f"The model in {saved.source} reads {described(about.form)} and tells "
            f"{len(about.classes)} classes apart; {data.name} has {described(form)} and "
            f"{len(data.classes)} classes."
        )
    if not len(data.test):
        raise FedkitError(f"{data.name} has no test set to measure on.")
    test = data.test.all()
    return _as_learned(about, replace(test, labels=columns[test.labels]))


def _columns(about: About, data: DataSet) -> torch.Tensor | None:
    """Which output of the network stands for each class of the data set: by name, else by number."""
    # Of a name that a labelled public set has too the later one is the private class's.
    known = {name: at for at, name in enumerate(about.classes)}
    if data.classes and all(name in known for name in data.classes):
        return torch.tensor([known[name] for name in data.classes])
    return torch.arange(about.outputs) if len(data.classes) == len(about.classes) else None


def _as_learned(about: About, samples: Samples) -> Samples:
    # Another data set's own scale would be another one than the network has learned on.
    return replace(samples, mean=torch.tensor(about.mean), std=torch.tensor(about.std))


# Several models of one run share their data.
_open = lru_cache(maxsize=1)(open_dataset)


@lru_cache(maxsize=1)
def _cut(settings: FederationSettings, sources: DataSettings) -> FederatedData:
    return cut(settings, sources)
