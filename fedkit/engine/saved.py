"""Where models lie: the server's in a run directory, a client's own in its state directory.

A client's state is read as it is at that moment, also while its client lives or after that was killed;
nothing is locked or written.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedkit.engine.state import FederationState
from fedkit.errors import FedkitError, UsageError
from fedkit.registry import suggest
from fedkit.settings import DataSettings, Value, build, read_toml

if TYPE_CHECKING:
    from fedkit.models.files import SavedModel

_log = logging.getLogger(__name__)
OWN = "own"
# What a client's state calls its models, and the record that says what they are.
_MODEL, _ABOUT = "-model", "about"
OWN_MODEL = OWN + _MODEL


@dataclass(frozen=True)
class Found:
    """A model that lies somewhere.

    Attributes:
        label: what it is asked for by.
        read: gives it; ``FedkitError`` if it is damaged.
    """

    label: str
    read: Callable[[], SavedModel]


def models_of(path: Path, federation: str | None = None) -> list[Found]:
    """All models in a run directory, a client's state directory, or a model file.

    Labels are the server's (``global``, ``student-cnn``) and ``client-K`` in a run directory, where
    ``client-K/alone`` is the reference that never exchanged; ``own`` and ``alone`` in a client's
    state directory; the file's name for a file.

    Args:
        path: where to look.
        federation: which federation's, if a client has taken part in several; None: the newest.

    Raises:
        UsageError: it is nothing of that kind, or the client knows no such federation.
        FedkitError: there is no model in it yet, or what lists them is damaged.
    """
    try:
        if not path.exists():
            raise UsageError(f"There is no run or state directory {path}.")
        if path.is_file():
            return [Found(path.stem, partial(_read_file, path))]
        if (path / "config.toml").exists() or (path / "metrics.jsonl").exists():
            return _of_run(path, federation)
        if _is_state(path):
            return _of_client(path, federation)
    except OSError as error:
        raise FedkitError(f"{error.filename or path} can't be read: {error.strerror}.") from error
    raise UsageError(
        f"{path} is neither a run directory (it has no config.toml) nor a client's state directory "
        "(it has no identity.json)."
    )


def chosen(found: Sequence[Found], label: str | None, path: Path) -> Found:
    """The model of that label; without one a client's own, or the only one.

    Raises:
        UsageError: there is no such label, or which of several is meant; it lists them.
    """
    labels = [model.label for model in found]
    if label is not None:
        if label not in labels:
            raise UsageError(f"{path} has no model {label!r}{suggest(label, labels)}.")
        return found[labels.index(label)]
    if OWN in labels:
        return found[labels.index(OWN)]
    if len(found) > 1:
        raise UsageError(f"Which model of {path}? Give --model, one of {', '.join(labels)}.")
    return found[0]


def at_width(found: Sequence[Found], label: str | None, width: float) -> str | None:
    """The label of the model that a run keeps for a width, with statistics of its own, if it does.

    Else the label of the wider one that can be cut: ``label``, or the global model where there is one.
    """
    labels = [model.label for model in found]
    wider = label or ("global" if "global" in labels else None)
    kept = [f"{wider}-{width:g}"]
    level = re.fullmatch(r"(.+)-(\d+(?:\.\d+)?(?:e-\d+)?)", wider or "")
    if level and level[1] in labels and width < float(level[2]):
        # A level of the run itself, of which the narrower ones are levels of the whole network.
        kept.append(f"{level[1]}-{width:g}")
    return next((one for one in kept if one in labels), wider)


def data_of(path: Path) -> dict[str, Value]:
    """The setting ``data-root``, if ``path`` is a run directory that has it; by outside name."""
    file = path / "config.toml"
    values = read_toml(str(file)) if file.is_file() else {}
    return {name: value for name, value in values.items() if name == "data-root"}


def _of_run(run: Path, federation: str | None) -> list[Found]:
    found = [*_at_server(run), *_at_local_clients(run, federation)]
    if not found:
        raise FedkitError(
            f"{run} holds no model: the server's are written when its run ends, and each client's "
            "own is in that client's --state-dir."
        )
    return found


def _at_server(run: Path) -> list[Found]:
    files = sorted((run / "models").glob("*.safetensors"))
    written = max((file.stat().st_mtime_ns for file in files), default=0)
    checkpoints = (run / "checkpoints").glob("[0-9]*")
    # A run that ends writes its models after its last checkpoint; one that is killed does not.
    if any(folder.stat().st_mtime_ns > written for folder in checkpoints):
        from fedkit.engine.at_checkpoint import models_at_checkpoint

        try:
            return models_at_checkpoint(run, build(DataSettings, data_of(run)))
        except FedkitError as error:
            _log.warning("The server's models of %s are left out: %s", run, error)
    return [Found(file.stem, partial(_read_file, file)) for file in files]


def _at_local_clients(run: Path, federation: str | None) -> Iterator[Found]:
    folders = [folder for folder in (run / "clients").glob("client-*") if _is_state(folder)]
    for folder in sorted(folders, key=lambda folder: (len(folder.name), folder.name)):
        if federation is None and not _federations(folder):
            continue  # it was stopped before it was told anything
        for model in _of_client(folder, federation):
            label = folder.name if model.label == OWN else f"{folder.name}/{model.label}"
            yield replace(model, label=label)


def _of_client(directory: Path, federation: str | None) -> list[Found]:
    folder = _federation(directory, federation)
    if not (folder / "manifest.json").exists():
        return [Found(OWN, partial(_read_file, folder / "model.safetensors"))]
    found = [
        Found(name.removesuffix(_MODEL), partial(kept_model, folder, name))
        for name in FederationState(folder, None).files
        if name.endswith(_MODEL)
    ]
    if not found:
        raise FedkitError(
            f"{folder} holds no model yet: its client has not trained, or it runs a Flower App, which "
            "keeps models in a way of its own."
        )
    return sorted(found, key=lambda model: (model.label != OWN, model.label))


def _is_state(path: Path) -> bool:
    return (path / "identity.json").exists() or bool(_federations(path))


def _federations(directory: Path) -> list[Path]:
    """The folders of a client's federations, the newest first; the directory itself may be one."""
    when = {
        folder: max(file.stat().st_mtime_ns for file in files)
        for folder in (directory, *(each for each in directory.iterdir() if each.is_dir()))
        if (files := _marks(folder))
    }
    return sorted(when, key=lambda folder: when[folder], reverse=True)


def _marks(folder: Path) -> list[Path]:
    names = ("manifest.json", "model.safetensors")
    return [folder / name for name in names if (folder / name).exists()]


def _federation(directory: Path, name: str | None) -> Path:
    folders = _federations(directory)
    if name is not None:
        for folder in folders:
            if folder.name == name:
                return folder
        known = [folder.name for folder in folders]
        raise UsageError(f"{directory} knows no federation {name!r}{suggest(name, known)}.")
    if not folders:
        raise FedkitError(f"{directory} holds no model yet: its client has not trained.")
    return folders[0]


def _read_file(file: Path) -> SavedModel:
    from fedkit.models.files import load_model

    return load_model(file)


def kept_model(folder: Path, name: str = OWN_MODEL) -> SavedModel:
    """The model that a client's state keeps under ``name``, as it is now in a federation's folder.

    Raises:
        FedkitError: it is not there, or damaged.
    """
    from fedkit.models.files import SavedModel, read_about

    state = FederationState(folder, None)
    while True:
        try:
            if name not in state.files:
                raise FedkitError(f"{folder} keeps no {name}.")
            arrays = state.record(name)
            described = state.record(_ABOUT) if _ABOUT in state.files else None
            break
        except FedkitError:
            before, state = state, FederationState(folder, None)
            if state.files == before.files:
                raise
            # Its client has gone on in the meantime.
    source = folder / state.files[name]
    about = None
    try:
        named = {key: array.numpy() for key, array in arrays.items()}
        if described is not None:
            about = read_about({**json.loads(described["json"]), "round": state.last_round})
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise FedkitError(f"{source} is damaged: {error}.") from error
    return SavedModel(named, about, source)
