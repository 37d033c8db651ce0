"""What a federation's networks read and answer, and how data of a device's own are made to mean the same.

Two devices whose folders are sorted differently, or of which one lacks a class, must still mean the
same by column 3 of their logits. So the server tells the names of the classes in order, and a device
numbers its own labels by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fedkit.data.samples import DataSet, Form, Pool, Shape
from fedkit.errors import FedkitError

# Numbers in one: what comes over the network shall not make a device ask for more.
LARGEST_SAMPLE = 1 << 24


@dataclass(frozen=True)
class Agreement:
    """What all clients of a federation have in common, whatever data and network they have.

    Attributes:
        shape: of one sample.
        classes: the names of the networks' outputs, in order: the public set's own classes, where its
            labels are used and it is another data set, then the private ones.
        first_private: how many classes of the public set come first.
        columns: the features' names, where they have any.
        mean, std: how private data are normalised; one number a channel or feature, or none.
        public_digest: SHA-256 (hex) of the public set.
    """

    shape: Shape
    classes: tuple[str, ...]
    first_private: int
    columns: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    public_digest: str

    @property
    def private_classes(self) -> tuple[str, ...]:
        """The names of the classes that clients' data may have."""
        return self.classes[self.first_private :]

    @property
    def form(self) -> Form:
        """How samples look."""
        return Form(self.shape, self.columns, not self.mean)

    def as_json(self) -> str:
        """For a message."""
        return json.dumps(asdict(self))


def read_agreement(text: str) -> Agreement:
    """What ``as_json`` wrote.

    Raises:
        ValueError: it is something else.
    """
    try:
        fields: Mapping[str, Any] = json.loads(text)
        agreement = Agreement(
            shape=tuple(int(length) for length in fields["shape"]),
            classes=tuple(str(name) for name in fields["classes"]),
            first_private=int(fields["first_private"]),
            columns=tuple(str(name) for name in fields["columns"]),
            mean=tuple(float(number) for number in fields["mean"]),
            std=tuple(float(number) for number in fields["std"]),
            public_digest=str(fields["public_digest"]),
        )
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"what the federation has agreed on can't be read: {error}") from error
    private = agreement.private_classes
    if not 0 <= agreement.first_private < len(agreement.classes) or len(set(private)) < len(
        private
    ):
        raise ValueError("the federation's classes can't be read")
    shape, scale = agreement.shape, {len(agreement.mean), len(agreement.std)}
    if len(shape) not in (1, 3) or min(shape) < 1 or math.prod(shape) > LARGEST_SAMPLE:
        raise ValueError(f"samples of the federation have the shape {shape}")
    numbers = all(math.isfinite(number) for number in (*agreement.mean, *agreement.std))
    if not (scale == {shape[0]} or (len(shape) == 1 and scale == {0})) or not numbers:
        raise ValueError("how the federation normalises samples can't be read")
    if any(deviation <= 0 for deviation in agreement.std):
        raise ValueError("the federation normalises by a deviation that is not positive")
    return agreement


def fitted(dataset: DataSet, agreement: Agreement) -> DataSet:
    """A device's own data set as the federation counts its classes and normalises its inputs.

    Raises:
        FedkitError: samples of another shape, other columns, or a class that the federation does not
            know; the sentence names what differs.
    """
    if replace(dataset.form, columns=agreement.columns) != agreement.form:
        raise FedkitError(
            f"The samples of {dataset.name} are {described(dataset.form)}, this federation's "
            f"{described(agreement.form)}: one network can't read both."
        )
    if dataset.columns != agreement.columns:
        raise FedkitError(
            f"{dataset.name} has the columns {_listed(dataset.columns)}; this federation's data have "
            f"{_listed(agreement.columns)}, in that order."
        )
    known = {name: at for at, name in enumerate(agreement.private_classes)}
    strange = [name for name in dataset.classes if name not in known]
    if strange or not dataset.classes:
        missing = [name for name in known if name not in dataset.classes]
        lacks = f" (and {dataset.name} has none of {_listed(missing)})" if missing else ""
        has = f"the classes {_listed(strange)}" if strange else "no classes"
        raise FedkitError(
            f"{dataset.name} has {has}, which this federation does not know: its classes are "
            f"{_listed(agreement.private_classes)}{lacks}. Rename them alike on all devices, or leave "
            "them out."
        )
    columns = torch.tensor([known[name] + agreement.first_private for name in dataset.classes])
    mean, std = torch.tensor(agreement.mean), torch.tensor(agreement.std)

    def renumbered(pool: Pool) -> Pool:
        return replace(pool, labels=columns[pool.labels], mean=mean, std=std)

    return replace(
        dataset,
        train=renumbered(dataset.train),
        test=renumbered(dataset.test),
        classes=agreement.private_classes,
    )


def described(form: Form) -> str:
    """What samples look like, in words."""
    if form.tokens:
        return f"sequences of {form.shape[0]} characters"
    if len(form.shape) == 1:
        return f"rows of {form.shape[0]} numbers"
    channels, height, width = form.shape
    return f"images of {height}x{width} with {channels} channel{'s' if channels > 1 else ''}"


def _listed(names: tuple[str, ...] | list[str], most: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "none"
