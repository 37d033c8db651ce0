"""Model files that say what they hold: a plain state dict as safetensors, with an ``about`` in its header.

Whoever needs the weights alone reads them with any safetensors library. ``about`` (JSON) says which
network they fit, what it reads and answers, and of which federation it is. Nothing is unpickled; what
a file says of sizes is held against the arrays that it has before anything of that size is made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fedkit import __version__
from fedkit.durable import write_whole
from fedkit.errors import FedkitError, UsageError
from fedkit.settings import FederationSettings, Value, as_config, build

if TYPE_CHECKING:
    from torch import nn

    from fedkit.data.samples import Form, Shape
    from fedkit.data.splits import FederatedData

SCHEMA = 1
Arrays: TypeAlias = Mapping[str, NDArray[np.generic]]
# Whatever a file that is not ours, or no longer whole, may lead to.
_DAMAGED = (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError)


@dataclass(frozen=True)
class About:
    """What a model file says of its model.

    Attributes:
        architecture: the network's name as `fedkit list models` has it, with its argument.
        shape: of one sample that it reads: channels, height and width of images; the number of
            features; the length of sequences.
        outputs: number of logits.
        classes: names of the outputs.
        columns: names of the features, where they have any.
        mean, std: how its inputs were normalised, one number a channel (for pixels from 0 to 255) or
            feature; empty for sequences of tokens.
        settings: the federation's settings by outside name (data set, seed, partition, ...).
        partition: SHA-256 (hex) of who holds what.
        client: whose own model it is; None: it lives at the server.
        round: after which round, if that is known.
        fedkit: the version that wrote it.
    """

    architecture: str
    shape: Shape
    outputs: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    settings: Mapping[str, Value]
    partition: str
    columns: tuple[str, ...] = ()
    client: int | None = None
    round: int | None = None
    fedkit: str = __version__

    @property
    def form(self) -> Form:
        """How the samples look that it reads."""
        from fedkit.data.samples import Form

        return Form(self.shape, self.columns, not self.mean)

    @property
    def federation(self) -> FederationSettings:
        """The federation's settings."""
        return build(FederationSettings, self.settings)


@dataclass(frozen=True)
class SavedModel:
    """A model as a file holds it.

    Attributes:
        arrays: its state dict.
        about: what it is; None where the file does not say.
        source: the file, for what is told to people.
    """

    arrays: Arrays
    about: About | None
    source: Path


def about_of(
    data: FederatedData, architecture: str, *, client: int | None = None, round: int | None = None
) -> About:
    """What there is to say of a network in the federation that cuts its data as ``data``."""
    train = data.dataset.train
    return About(
        architecture=architecture,
        shape=data.shape,
        outputs=data.outputs,
        classes=data.classes,
        columns=data.dataset.columns,
        mean=tuple(train.mean.tolist()),
        std=tuple(train.std.tolist()),
        settings=as_config(data.settings),
        partition=data.partition_digest,
        client=client,
        round=round,
    )


def save_model(path: Path, arrays: Arrays, about: About | None) -> None:
    """Replace ``path`` by a model, so that a crash leaves the old file or the new one.

    Raises:
        FedkitError: it can't be written.
    """
    # Not ascontiguousarray, which gives one dimension to what has none.
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    header = {"schema": SCHEMA, "sha256": _checksum(whole)}
    if about is not None:
        header |= asdict(about)
    write_whole(path, [safetensors.numpy.save(whole, {"about": json.dumps(header)})])


def load_model(path: Path) -> SavedModel:
    """The model in a safetensors file; ``about`` is None where another program wrote it.

    Raises:
        FedkitError: there is no such file, or it is damaged; the sentence names it.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get("about")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if text is None:
            return SavedModel(arrays, None, path)
        header = json.loads(text)
        found, wanted = header.pop("schema"), header.pop("sha256")
        about = read_about(header) if found == SCHEMA and header else None
    except _DAMAGED as error:
        raise FedkitError(f"The model in {path} can't be read: {error}.") from error
    if found != SCHEMA:
        raise FedkitError(f"{path} was written by another version of fedkit (schema {found}).")
    if _checksum(arrays) != wanted:
        raise FedkitError(f"The model in {path} is damaged: its checksum is wrong.")
    return SavedModel(arrays, about, path)


def read_about(fields: Any) -> About:
    """``About`` from the JSON object that ``asdict`` gave.

    Raises:
        ValueError, TypeError, LookupError: it is none.
    """
    about = About(
        architecture=_text(fields["architecture"]),
        shape=_sizes(fields["shape"]),
        outputs=_size(fields["outputs"]),
        classes=tuple(_text(name) for name in fields["classes"]),
        mean=tuple(float(number) for number in fields["mean"]),
        std=tuple(float(number) for number in fields["std"]),
        settings=dict(fields["settings"]),
        partition=_text(fields["partition"]),
        columns=tuple(_text(name) for name in fields.get("columns", ())),
        client=_index(fields["client"]),
        round=_index(fields["round"]),
        fedkit=_text(fields["fedkit"]),
    )
    try:
        build(FederationSettings, about.settings)
    except UsageError as error:
        raise ValueError(f"its settings: {error}") from error
    numbers = {len(about.mean), len(about.std)}
    tokens = len(about.shape) == 1 and numbers == {0}
    if not tokens and (numbers != {about.shape[0]} or 0.0 in about.std):
        raise ValueError(f"it normalises {len(about.mean)} channels and reads {about.shape[0]}")
    if not 0 < len(about.classes) <= about.outputs:
        raise ValueError(f"it names {len(about.classes)} classes for {about.outputs} outputs")
    return about


def network(saved: SavedModel) -> nn.Module:
    """The network of a saved model with its weights, in evaluation mode, on the CPU.

    Raises:
        FedkitError: the file does not say which network it is, there is none of that name here, or
            it has other weights.
    """
    import torch

    from fedkit.models.build import restored

    about, source = of_known_network(saved), saved.source
    try:
        _check_fit(about, saved.arrays)
        weights = {n: torch.from_numpy(np.array(a)) for n, a in saved.arrays.items()}
        model = restored(about.architecture, about.shape, about.outputs, weights)
    except UsageError as error:
        raise FedkitError(f"The model in {source} can't be built here: {error}") from error
    except (RuntimeError, ValueError, TypeError) as error:
        raise FedkitError(
            f"The weights in {source} do not fit the network {about.architecture} here: {error}."
        ) from error
    return model.eval()


def of_known_network(saved: SavedModel) -> About:
    """What a saved model says of itself; ``FedkitError`` if it says nothing."""
    if saved.about is None:
        raise FedkitError(
            f"{saved.source} does not say which network its weights are of (an older fedkit or "
            "another program wrote it): only its state dict can be had, with `fedkit export "
            "--format safetensors` or pt."
        )
    return saved.about


def _check_fit(about: About, arrays: Arrays) -> None:
    import torch

    from fedkit.models.build import build_model

    try:
        # Without memory for the weights: a file must not make us ask for more than it has itself.
        with torch.device("meta"):
            model = build_model(about.architecture, about.shape, about.outputs, seed=0)
    except (RuntimeError, FedkitError) as error:
        if isinstance(error, UsageError):
            raise
        return  # a plug-in that can't be built in this way; or at all, as building it will tell
    plan = model.state_dict()
    for name in sorted(plan.keys() ^ arrays.keys()):
        raise ValueError(f"{name} is {'missing' if name in plan else 'unknown'}")
    for name, tensor in plan.items():
        if tuple(tensor.shape) != arrays[name].shape:
            shapes = f"{arrays[name].shape}, not {tuple(tensor.shape)}"
            raise ValueError(f"{name} has the shape {shapes}")


def _checksum(arrays: Arrays) -> str:
    sha = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        sha.update(f"{name}/{array.dtype}/{array.shape}/".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _index(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no number of a client or round")
    return value


def _size(value: object) -> int:
    number = _index(value)
    if not number:
        raise ValueError(f"{value!r} is no size")
    return number


def _sizes(values: Any) -> Shape:
    if len(values) not in (1, 3):
        raise ValueError(f"{values!r} is no shape of a sample")
    return tuple(_size(length) for length in values)
