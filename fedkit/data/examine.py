"""What a data set holds and whether all of it can be read, one finding each, for `fedkit data check`."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fedkit.data.agreement import described
from fedkit.data.datasets import open_dataset
from fedkit.data.found import Found
from fedkit.data.names import OWN, public_parts
from fedkit.data.samples import DataSet, Pool
from fedkit.errors import FedkitError
from fedkit.link.reach import FAIL, OK, WARNING, Finding
from fedkit.registry import split
from fedkit.settings import DataSettings, FederationSettings

AT_ONCE = 512  # samples that are decoded together
SHOWN = 10


def examine(spec: str, sources: DataSettings, public: str | None = None) -> Iterator[Finding]:
    """Everything that there is to say of a data set, and of a public set beside it.

    Args:
        spec: the data set, as for ``--dataset``.
        sources: where this machine keeps data sets.
        public: the public set, as for ``--public``.

    Raises:
        UsageError: what was typed can't be meant.
    """
    name, count = None, None
    if public is not None:
        name, count = public_parts(FederationSettings(dataset=spec, public=public))
    try:
        dataset, lent = _open(spec, name, sources)
    except FedkitError as error:
        if error.exit_code != FedkitError.exit_code:
            raise
        yield Finding("data set", FAIL, str(error))
        return
    yield from _describe(dataset)
    train = yield from _content("training", dataset.train)
    test = yield from _content("test", dataset.test)
    if len(dataset.test):
        yield _shared("duplicates", "test samples are in the training data too", test, train)
    if lent is not None:
        yield _fit(dataset, lent, count)
        if lent is not dataset:
            of_public = yield from _content("public", lent.train)
            if len(dataset.train):
                yield _shared("overlap", "public samples are private too", of_public, train)
            if len(dataset.test):
                yield _shared("overlap", "public samples are test samples too", of_public, test)


def _open(spec: str, public: str | None, sources: DataSettings) -> tuple[DataSet, DataSet | None]:
    with warnings.catch_warnings():
        # A checksum that is another is a finding here.
        warnings.simplefilter("ignore", UserWarning)
        if public is None:
            return open_dataset(spec, sources), None
        if split(spec)[0] == OWN:
            lent = open_dataset(public, sources)
            return open_dataset(spec, sources, lent.form), lent
        dataset = open_dataset(spec, sources)
        if public == spec:
            return dataset, dataset
        return dataset, open_dataset(public, sources, dataset.form)


def _describe(dataset: DataSet) -> Iterator[Finding]:
    train, test = dataset.train, dataset.test
    yield Finding(
        "data set",
        OK,
        f"{dataset.name}: {len(train):,} training samples, {len(test):,} test samples",
        {"dataset": dataset.name, "train": len(train), "test": len(test)},
    )
    if isinstance(dataset, Found):
        yield _files(dataset)
    yield _samples(dataset)
    yield _classes(dataset)
    if train.owners is not None:
        sizes = torch.bincount(train.owners)
        sizes = sizes[sizes > 0]
        text = f"{len(sizes):,}, each with {int(sizes.min()):,} to {int(sizes.max()):,} samples"
        yield Finding("owners", OK, text, {"owners": len(sizes)})
    if isinstance(dataset, Found):
        for note in dataset.notes:
            yield Finding("passed over", WARNING, note)


def _files(dataset: Found) -> Finding:
    files = [str(file) for file in dataset.files]
    where = files[0] if len(files) == 1 else f"{len(files)} in {os.path.commonpath(files)}"
    status = WARNING if "NOT" in dataset.checksums else OK
    values = {"files": files, "checksums": dataset.checksums}
    return Finding("files", status, f"{where}; checksums: {dataset.checksums}", values)


def _samples(dataset: DataSet) -> Finding:
    pool = dataset.train
    data = pool.read(torch.empty(0, dtype=torch.int64))
    size = (len(pool) + len(dataset.test)) * math.prod(pool.shape) * data.element_size()
    if split(dataset.name)[0] == OWN:
        text = f"{described(dataset.form)}, as the public set's, and normalised as these"
        return Finding("samples", OK, text, {"shape": list(pool.shape)})
    what = described(dataset.form)
    if dataset.form.tokens:
        told = "no normalisation"
    elif len(pool.mean) <= 3:
        told = f"normalised by mean {_numbers(pool.mean)}, standard deviation {_numbers(pool.std)}"
    else:
        told = f"normalised by a mean and standard deviation for each of {len(pool.mean)} features"
    values = {
        "shape": list(pool.shape),
        "bytes": size,
        "columns": list(dataset.columns),
        "mean": pool.mean.tolist(),
        "std": pool.std.tolist(),
    }
    return Finding("samples", OK, f"{what}, {size / 1e6:.1f} MB; {told}", values)


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.tolist())


def _classes(dataset: DataSet) -> Finding:
    names = dataset.classes
    if not names:
        return Finding("classes", OK, "none: it can be a public set, without --public-labels")
    if not len(dataset.train):
        text = f"{len(names)}: {', '.join(repr(name) for name in names)}"
        return Finding("classes", OK, text, {"classes": list(names)})
    counts = torch.bincount(dataset.train.labels, minlength=len(names)).tolist()
    shown = [f"{name!r} {count:,}" for name, count in zip(names, counts, strict=True)][:SHOWN]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    values = {"classes": list(names), "counts": counts}
    text = f"{len(names)}, with training samples: {', '.join(shown)}{more}"
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        text += f"; {len(empty)} without any, as {empty[0]!r}"
        return Finding("classes", WARNING, text, values)
    return Finding("classes", OK, text, values)


def _content(what: str, pool: Pool) -> Generator[Finding, None, Counter[bytes]]:
    """Decode all of a pool; returns how many samples have which content."""
    seen, broken = Counter[bytes](), list[str]()
    for start in range(0, len(pool), AT_ONCE):
        indices = torch.arange(start, min(start + AT_ONCE, len(pool)))
        for data in _readable(pool, indices, broken):
            seen.update(_digests(data))
    yield from (Finding("broken", FAIL, sentence) for sentence in broken[:SHOWN])
    values = {"part": what, "samples": len(pool), "broken": len(broken)}
    if broken:
        more = f", of which {SHOWN} are named above" if len(broken) > SHOWN else ""
        text = f"{len(broken):,} of {len(pool):,} {what} samples can't be read{more}"
        yield Finding("content", FAIL, text, values)
    elif len(pool):
        yield Finding("content", OK, f"all {len(pool):,} {what} samples can be read", values)
    return seen


def _readable(pool: Pool, indices: Tensor, broken: list[str]) -> Iterator[Tensor]:
    """What can be read of some samples; halves are tried where not all can be."""
    try:
        yield pool.read(indices)
    except FedkitError as error:
        if len(indices) == 1:
            broken.append(str(error))
            return
        for half in indices.tensor_split(2):
            yield from _readable(pool, half, broken)


def _digests(data: Tensor) -> Iterator[bytes]:
    for row in data.flatten(1).numpy():
        yield hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def _shared(check: str, what: str, some: Counter[bytes], others: Counter[bytes]) -> Finding:
    found = sum(count for content, count in some.items() if content in others)
    text = f"{found:,} of {some.total():,} {what}"
    return Finding(check, WARNING if found else OK, text, {"samples": found, "of": some.total()})


def _fit(dataset: DataSet, lent: DataSet, count: int | None) -> Finding:
    """Whether a federation on ``dataset`` can have its public set from ``lent``."""
    other = lent.train
    wanted = len(other) if count is None else count
    values = {"public": lent.name, "available": len(other), "samples": wanted}
    if replace(lent.form, columns=dataset.columns) != dataset.form:
        text = (
            f"{lent.name} has {described(lent.form)}, {dataset.name} {described(dataset.form)}: one "
            "network can't read both."
        )
        return Finding("public set", FAIL, text, values)
    if dataset.columns != lent.columns:
        text = f"{lent.name} and {dataset.name} have other columns: one network can't read both."
        return Finding("public set", FAIL, text, values)
    if not 0 < wanted <= len(other) - (lent is dataset):
        text = (
            f"{lent.name} has {len(other):,} training samples, too few for {wanted:,} public ones."
        )
        return Finding("public set", FAIL, text, values)
    labels = f"{len(lent.classes)} classes" if lent.classes else "no labels"
    text = f"{wanted:,} of {len(other):,} training samples of {lent.name}, {labels}; they fit"
    return Finding("public set", OK, text, values)
