"""The run directory: the contract by which other tools read a run.

``config.toml``     every setting; ``fedkit run --config`` runs it again
``metrics.jsonl``   one record per measurement or event, flushed as it happens; where a round was run
                    again, a ``rewind`` says that what stood before for it does not count
``summary.json``    the result, written once at the end
``partition.json``  who holds what
``address``         where the server listens
``checkpoints/``    what ``fedkit server --resume`` goes on from
``nodes.json``      which device is which client (with hashes of their secrets: mode 600)
``models/``         the global model, where the strategy has one
``clients/``, ``logs/``   under `fedkit run`: each client's state (with its model) and output
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import tomli_w

from fedkit.durable import make_folder, write_json, write_whole
from fedkit.engine.events import REWIND, Event
from fedkit.errors import FedkitError, UsageError
from fedkit.settings import Value, read_toml

SCHEMA = 1
# `json.dumps` makes an encoder for each line where one is not its default.
_as_json = json.JSONEncoder(allow_nan=False).encode


def default_path(strategy: str) -> Path:
    """``runs/2026-11-21T17-45-03-ktpfl``, or that with a number if it is taken."""
    stem = datetime.now().strftime("%Y-%m-%dT%H-%M-%S") + f"-{strategy.replace(':', '-')}"
    path, number = Path("runs") / stem, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{stem}-{number}"
    return path


class RunDirectory:
    """Writes a run down as it happens."""

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        """Make the folder, or with ``resume`` go on in it; no other process may write there.

        Raises:
            UsageError: a run is in it already, or none to go on with.
            FedkitError: it can't be written, or another server is at work in it.
        """
        if has_begun(path) != resume:
            raise UsageError(
                f"{path} holds no run that could be resumed."
                if resume
                else f"{path} holds a run already: choose another --run-dir, or --resume {path}."
            )
        make_folder(path)
        self.path = path
        try:
            self._lock = (path / "lock").open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FedkitError(f"Another server is at work in {path}.") from error
        except OSError as error:
            raise FedkitError(f"{path} can't be written: {error.strerror}.") from error
        self._metrics = _open_whole(path / "metrics.jsonl")

    def record(self, event: Event) -> None:
        """Append one event to ``metrics.jsonl``."""
        fields = {"time": round(time.time(), 3), **vars(event)}
        # JSON has no word for what a diverging model gives.
        if isinstance(event.value, float) and not math.isfinite(event.value):
            fields["value"] = None
        line = _as_json(fields)
        try:
            self._metrics.write(line + "\n")
            self._metrics.flush()
        except OSError as error:
            where = self.path / "metrics.jsonl"
            raise FedkitError(f"{where} can't be written: {error.strerror}.") from error

    def sync(self) -> None:
        """Let everything recorded so far survive a power cut.

        Raises:
            FedkitError: the disk is full.
        """
        try:
            os.fsync(self._metrics.fileno())
        except OSError as error:
            where = self.path / "metrics.jsonl"
            raise FedkitError(f"{where} can't be written: {error.strerror}.") from error

    def read_config(self) -> dict[str, Value]:
        """The settings that ``write_config`` wrote."""
        return read_toml(str(self.path / "config.toml"))

    def write_config(self, values: Mapping[str, Value], *, resume: bool = False) -> None:
        """Write every setting that is given, but for the folder: the next run has another.

        With ``resume`` those change that were written before, and what else was stays.
        """
        before = self.read_config() if resume else {}
        if resume:
            values = before | {
                name: v for name, v in values.items() if name in before or name != "listen"
            }
        given = {name: v for name, v in values.items() if v != "" and name != "run-dir"}
        write_whole(self.path / "config.toml", [tomli_w.dumps(given).encode()])

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        write_json(self.path / name, value)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        write_whole(self.path / name, [text.encode()])

    def close(self) -> None:
        """No more events."""
        self._metrics.close()
        self._lock.close()


def has_begun(path: Path) -> bool:
    """Whether a run has recorded anything there; one that was killed before that never was."""
    file = path / "metrics.jsonl"
    return file.exists() and file.stat().st_size > 0


def read_events(path: Path, *, everything: bool = False) -> list[dict[str, Any]]:
    """The records in a run's ``metrics.jsonl`` that count; a line still being written is left out.

    With ``everything``, also those of rounds that were run again.

    Raises:
        FedkitError: a line is damaged.
    """
    file = path / "metrics.jsonl"
    text = file.read_text(encoding="utf-8")
    records = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise FedkitError(f"Line {number} of {file} is damaged: {error}.") from error
    if everything:
        return records
    counting: list[dict[str, Any]] = []
    for record in records:
        if record["event"] == REWIND:
            counting = [r for r in counting if (r["round"] or 0) < record["round"]]
        counting.append(record)
    return counting


def _open_whole(file: Path) -> IO[str]:
    """The file, to be written on at its end, without the half line that a killed process left."""
    try:
        opened = file.open("a+", encoding="utf-8")
        opened.seek(0)
        whole = opened.read().rpartition("\n")
        if whole[2]:
            opened.truncate(len((whole[0] + whole[1]).encode()))
        return opened
    except (OSError, UnicodeDecodeError) as error:
        raise FedkitError(f"{file} can't be read: {error}.") from error
