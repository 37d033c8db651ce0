"""Any partitioner of flwr-datasets, where that package is installed. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import warnings
from typing import Any

import numpy as np

from fedkit.data.partitions.dealing import Indices, Labelled
from fedkit.errors import UsageError
from fedkit.registry import suggest

BY_OWNER = ("NaturalIdPartitioner", "GroupedNaturalIdPartitioner")


def flwr(
    samples: Labelled, shards: int, argument: str | None, generator: np.random.Generator
) -> list[Indices]:
    """flwr:PARTITIONER[,KEY=VALUE...]: any partitioner of flwr-datasets, by the name of its class.

    As in flwr:DirichletPartitioner,alpha=0.5,min_partition_size=10. The number of partitions, the label
    or owner column and the seed are filled in where it takes them; lists are written [1,2]. Samples are
    shuffled first, as ``FederatedDataset`` does.
    """
    name, _, text = (argument or "").partition(",")
    kind = _partitioner(name)
    given = _arguments(name, text)
    if name in BY_OWNER and samples.owners is None:
        raise UsageError(
            f"flwr:{name} deals by speaker, writer or device, and this data set does not know them: "
            "take another partition."
        )
    filled = {
        "num_partitions": shards,
        "partition_by": "owner" if name in BY_OWNER else "label",
        "seed": int(generator.integers(2**32)),
    }
    takes = inspect.signature(kind).parameters
    for key in given:
        if key not in takes:
            raise UsageError(f"flwr:{name} takes no {key!r}{suggest(key, takes)}.")
    settings = {key: value for key, value in filled.items() if key in takes} | given
    order = generator.permutation(len(samples))
    columns = {"index": order, "label": samples.labels[order]}
    if samples.owners is not None:
        columns["owner"] = samples.owners[order]
    try:
        count, parts = _load(kind, settings, columns, shards)
    except Exception as error:  # whatever somebody's partitioner raises at what it can't do
        raise UsageError(
            f"flwr:{argument} can't deal {len(samples)} samples into {shards} shards ({error})."
        ) from error
    if count != shards:
        raise UsageError(f"flwr:{name} makes {count} shards here: take --num-shards {count}.")
    return parts


def _partitioner(name: str) -> Any:
    try:
        from flwr_datasets import partitioner
    except ImportError as error:
        raise UsageError(
            "flwr:PARTITIONER needs the package flwr-datasets: `pip install flwr-datasets`."
        ) from error
    # A vertical one deals columns, not samples.
    known = [
        one
        for one in partitioner.__all__
        if one != "Partitioner" and not one.startswith("Vertical")
    ]
    if name not in known:
        raise UsageError(f"flwr-datasets has no partitioner {name!r}{suggest(name, known)}.")
    return getattr(partitioner, name)


def _arguments(name: str, text: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    # A comma ends an argument unless a bracket is open.
    for pair in re.findall(r"(?:[^,\[]|\[(?:[^\[\]]|\[[^\[\]]*\])*\])+", text):
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"flwr:{name} takes KEY=VALUE, as in alpha=0.5, not {pair!r}.")
        try:
            read = json.loads(value)
        except ValueError:
            read = value
        is_table = isinstance(read, list) and bool(read) and isinstance(read[0], list)
        given[key] = np.array(read) if is_table else read
    return given


def _load(
    kind: Any, settings: dict[str, Any], columns: dict[str, Indices], shards: int
) -> tuple[int, list[Indices]]:
    from datasets import Dataset

    # Its warnings say how often it drew, and a progress bar goes to stderr.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        partitioner = kind(**settings)
        partitioner.dataset = Dataset.from_dict(columns)
        count = int(partitioner.num_partitions)
        found = [partitioner.load_partition(number) for number in range(min(count, shards))]
    return count, [np.sort(np.array(part["index"], dtype=np.int64)) for part in found]
