"""Checkpoints: everything that a server needs to go on after it was killed at any instant.

``RUN/checkpoints/000003/`` holds the state after round 3: the strategy's own (``strategy.safetensors``),
a learning selector's (``selector.safetensors``), the global model (``arrays.safetensors``), and
``checkpoint.json`` with their SHA-256. A folder is written
beside, synced, and renamed, which is the moment at which it counts; one that is damaged nevertheless is
passed over for the one before it. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.numpy
from flwr.app import ArrayRecord
from safetensors import SafetensorError

from fedkit.durable import checksum_of, make_folder, sync_folder, write_json, write_whole
from fedkit.engine.roster import Member
from fedkit.engine.strategy_state import load_state, save_state
from fedkit.errors import FedkitError
from fedkit.knowledge.arrays import as_record

SCHEMA = 2
STRATEGY, ARRAYS, ABOUT = "strategy.safetensors", "arrays.safetensors", "checkpoint.json"
SELECTOR = "selector.safetensors"
# Whatever a file that is no longer whole may lead to.
_DAMAGED = (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        round: the last round that is over; 0 before the first.
        digest: the history's digest up to there.
        seconds: how long the server has run, over all its processes.
        sent_up, sent_down: bytes that the link carried for training.
        members: the clients, as they joined.
        present: node ids of those that were connected.
    """

    round: int
    digest: str
    seconds: float
    sent_up: int
    sent_down: int
    members: tuple[Member, ...]
    present: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole."""

    folder: Path
    progress: Progress
    arrays: ArrayRecord

    def strategy_state(self, kind: type[Any]) -> Any:
        """The strategy's state; ``FedkitError`` if it is another strategy's."""
        return load_state(self.folder / STRATEGY, kind)

    def selector_state(self, kind: type[Any]) -> Any:
        """The selector's state; ``FedkitError`` if it is another selector's."""
        return load_state(self.folder / SELECTOR, kind)


class Checkpoints:
    """Those of one run, the newest last."""

    def __init__(self, run: Path, keep: int = 1) -> None:
        """``keep``: how many stay when another is written."""
        self.folder = run / "checkpoints"
        self._keep = keep

    def save(
        self, progress: Progress, state: Any, arrays: ArrayRecord, selector: Any = None
    ) -> None:
        """Write one; the oldest beyond ``keep`` go once it counts.

        Args:
            progress: how far the run has come.
            state: the strategy's state, a dataclass; None where it has none.
            arrays: the global model, empty where there is none.
            selector: the selector's state, a dataclass; None where it has none.

        Raises:
            FedkitError: the disk is full, or can't be written; the checkpoints before still count.
        """
        final = self.folder / f"{progress.round:06d}"
        unfinished = self.folder / f".{final.name}.unfinished"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            make_folder(unfinished)
            if state is not None:
                save_state(unfinished / STRATEGY, state)
            if selector is not None:
                save_state(unfinished / SELECTOR, selector)
            named = {name: array.numpy() for name, array in arrays.items()}
            write_whole(unfinished / ARRAYS, [safetensors.numpy.save(named)])
            about = {
                "schema": SCHEMA,
                **asdict(progress),
                "names": list(arrays),
                "sha256": {file.name: _sha256(file) for file in sorted(unfinished.iterdir())},
            }
            write_json(unfinished / ABOUT, {**about, "checksum": checksum_of(about)})
            if final.exists():  # a damaged one that was passed over
                shutil.rmtree(final)
            unfinished.rename(final)
            sync_folder(self.folder)
        except OSError as error:
            raise FedkitError(f"{final} can't be written: {error.strerror or error}.") from error
        for old in self._rounds()[: -self._keep]:
            shutil.rmtree(self.folder / f"{old:06d}", ignore_errors=True)

    def newest(self) -> Iterator[Checkpoint]:
        """Those that can be read, the newest first; what is damaged is warned of and passed over."""
        for round in reversed(self._rounds()):
            folder = self.folder / f"{round:06d}"
            try:
                checkpoint = _read(folder)
            except _DAMAGED as error:
                _log.warning("The checkpoint %s is damaged (%s): passed over.", folder, error)
                continue
            yield checkpoint

    def _rounds(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.folder.iterdir() if entry.name.isdigit())


def _read(folder: Path) -> Checkpoint:
    about = json.loads((folder / ABOUT).read_text())
    if about.pop("checksum") != checksum_of(about):
        raise ValueError(f"the checksum of {ABOUT} is wrong")
    if about["schema"] != SCHEMA:
        raise ValueError(f"schema {about['schema']} is not {SCHEMA}")
    for name, sha in about["sha256"].items():
        if name not in (STRATEGY, SELECTOR, ARRAYS) or _sha256(folder / name) != sha:
            raise ValueError(f"the checksum of {name} is wrong")
    named = safetensors.numpy.load_file(folder / ARRAYS)
    members = [
        Member(**{**fields, "codecs": tuple(fields["codecs"]), "tags": tuple(fields["tags"])})
        for fields in about["members"]
    ]
    progress = Progress(
        round=int(about["round"]),
        digest=str(about["digest"]),
        seconds=float(about["seconds"]),
        sent_up=int(about["sent_up"]),
        sent_down=int(about["sent_down"]),
        members=tuple(members),
        present=tuple(map(int, about["present"])),
    )
    # In the order in which the network has them, which safetensors does not keep.
    arrays = as_record({name: named[name] for name in about["names"]})
    return Checkpoint(folder, progress, arrays)


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
