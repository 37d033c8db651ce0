"""The public set: samples that everybody has, named by a digest of what they are.

A device that lacks it gets it from the server, once: it is kept under the state directory as
``DIGEST.safetensors``, and is read again only if it still has that digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from fedkit.data.agreement import Agreement
from fedkit.data.samples import Form, Samples
from fedkit.durable import make_folder, write_whole
from fedkit.errors import FedkitError

Arrays = Mapping[str, NDArray[np.generic]]
# For a device that stays and goes from federation to federation.
MOST_KEPT = 8
_NAMES = {"data", "labels", "indices", "mean", "std"}


@dataclass(frozen=True)
class PublicSet:
    """A public set.

    Attributes:
        name: the data set that it comes from.
        indices: which of its training samples, sorted (int64, M0).
        samples: these.
        classes: the names of its classes, if it has labels.
        columns: the features' names, where they have any.
    """

    name: str
    indices: NDArray[np.int64]
    samples: Samples
    classes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @property
    def form(self) -> Form:
        """How its samples look."""
        return Form(self.samples.shape, self.columns, not len(self.samples.mean))

    def digest(self, *, labels: bool = False) -> str:
        """SHA-256 (hex) of name, indices, transform and content, in that order.

        ``labels``: they are a part of it only where the federation uses them.
        """
        samples = self.samples
        sha = hashlib.sha256(f"{self.name}/{len(self.indices)}/".encode())
        sha.update(self.indices.astype(">i8").tobytes())
        sha.update(f"{samples.mean.tolist()}/{samples.std.tolist()}".encode())
        sha.update(samples.data.contiguous().numpy().tobytes())
        if labels:
            sha.update(samples.labels.numpy().tobytes())
        return sha.hexdigest()

    def arrays(self, *, labels: bool) -> Arrays:
        """What travels: data, labels (zeros unless the federation uses them), indices, mean and std."""
        samples = self.samples
        told = samples.labels if labels else torch.zeros_like(samples.labels)
        return {
            "data": samples.data.contiguous().numpy(),
            "labels": told.numpy(),
            "indices": self.indices,
            "mean": samples.mean.numpy(),
            "std": samples.std.numpy(),
        }


def renumbered(public: PublicSet, classes: tuple[str, ...]) -> PublicSet:
    """The same set, its labels counting ``classes``, which have all its names (or it has no labels)."""
    if not public.classes or public.classes == classes:
        return public
    at = {name: number for number, name in enumerate(classes)}
    if not set(public.classes) <= set(at):
        return public  # it is unlabelled to this federation
    columns = torch.tensor([at[name] for name in public.classes])
    samples = replace(public.samples, labels=columns[public.samples.labels])
    return replace(public, samples=samples, classes=classes)


def received(name: str, arrays: Arrays, agreement: Agreement, *, labels: bool) -> PublicSet:
    """The public set in ``arrays``, held against what the federation has agreed on.

    Args:
        name: of the data set that it comes from.
        arrays: as ``PublicSet.arrays`` gives them.
        agreement: has its digest.
        labels: whether the federation uses them.

    Raises:
        ValueError: it is no public set, or not the federation's.
    """
    if set(arrays) != _NAMES:
        raise ValueError(f"a public set has {', '.join(sorted(_NAMES))}, not {sorted(arrays)}")
    data, numbers = arrays["data"], arrays["labels"]
    count = len(data) if data.ndim else 0
    if data.shape[1:] != agreement.shape or data.dtype not in (np.uint8, np.float32):
        raise ValueError(f"its samples are {data.dtype} {data.shape[1:]}")
    for what in ("labels", "indices"):
        if arrays[what].shape != (count,) or arrays[what].dtype != np.int64:
            raise ValueError(f"its {what} are {arrays[what].dtype} {arrays[what].shape}")
    for what in ("mean", "std"):
        if arrays[what].ndim != 1 or arrays[what].dtype != np.float32:
            raise ValueError(f"its {what} is {arrays[what].dtype} {arrays[what].shape}")
    if count == 0 or numbers.min() < 0 or numbers.max() >= len(agreement.classes):
        raise ValueError("its labels are none of the federation's classes")
    tensors = {what: torch.from_numpy(np.array(arrays[what])) for what in _NAMES}
    samples = Samples(tensors["data"], tensors["labels"], tensors["mean"], tensors["std"])
    public = PublicSet(
        name,
        tensors["indices"].numpy(),
        samples,
        (agreement.classes[: agreement.first_private] or agreement.classes) if labels else (),
        agreement.columns,
    )
    if public.digest(labels=labels) != agreement.public_digest:
        raise ValueError("its digest is not the one that the server told")
    return public


def keep(arrays: Arrays, folder: Path, agreement: Agreement) -> None:
    """Keep a public set for later, and the newest others; ``FedkitError`` if it can't be written."""
    make_folder(folder)
    for old in sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)[
        : -(MOST_KEPT - 1)
    ]:
        old.unlink(missing_ok=True)
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    write_whole(_file(folder, agreement), [safetensors.numpy.save(whole)])


def kept(name: str, folder: Path, agreement: Agreement, *, labels: bool) -> PublicSet | None:
    """The public set that is kept under that digest, if it is still what it was."""
    file = _file(folder, agreement)
    if not file.is_file():
        return None
    try:
        return received(name, safetensors.numpy.load_file(file), agreement, labels=labels)
    except (OSError, SafetensorError, ValueError):
        # Damaged: the server sends it again.
        file.unlink(missing_ok=True)
        return None


def _file(folder: Path, agreement: Agreement) -> Path:
    digest = agreement.public_digest
    if not digest.isalnum() or len(digest) > 64:  # it came over the network and becomes a name
        raise FedkitError("The server's public digest is no plain word.")
    return folder / f"{digest}.safetensors"
