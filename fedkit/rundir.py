"""The run directory: the contract by which other tools read a run.

``config.toml``     every setting; ``fedkit run --config`` runs it again
``metrics.jsonl``   one record per measurement or event, flushed as it happens
``summary.json``    the result, written once at the end
``partition.json``  who holds what
``address``         where the server listens
``models/``         the global model, where the strategy has one
``clients/``, ``logs/``   under `fedkit run`: each client's state (with its model) and output
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli_w

from fedkit.durable import make_folder, write_json, write_whole
from fedkit.engine.events import Event
from fedkit.errors import FedkitError, UsageError
from fedkit.settings import Value

SCHEMA = 1


def default_path(strategy: str) -> Path:
    """``runs/2026-11-21T17-45-03-ktpfl``, or that with a number if it is taken."""
    stem = datetime.now().strftime("%Y-%m-%dT%H-%M-%S") + f"-{strategy}"
    path, number = Path("runs") / stem, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{stem}-{number}"
    return path


class RunDirectory:
    """Writes a run down as it happens."""

    def __init__(self, path: Path) -> None:
        """Make the folder.

        Raises:
            UsageError: a run is in it already.
            FedkitError: it can't be written.
        """
        if (path / "metrics.jsonl").exists():
            raise UsageError(f"{path} holds a run already: choose another --run-dir.")
        make_folder(path)
        self.path = path
        try:
            self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise FedkitError(f"{path} can't be written: {error.strerror}.") from error

    def record(self, event: Event) -> None:
        """Append one event to ``metrics.jsonl``."""
        fields = {"time": round(time.time(), 3), **asdict(event)}
        # JSON has no word for what a diverging model gives.
        if isinstance(event.value, float) and not math.isfinite(event.value):
            fields["value"] = None
        line = json.dumps(fields, allow_nan=False)
        try:
            self._metrics.write(line + "\n")
            self._metrics.flush()
        except OSError as error:
            where = self.path / "metrics.jsonl"
            raise FedkitError(f"{where} can't be written: {error.strerror}.") from error

    def write_config(self, values: Mapping[str, Value]) -> None:
        """Write every setting that is given, but for the folder: the next run has another."""
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


def read_events(path: Path) -> list[dict[str, Any]]:
    """The records in a run's ``metrics.jsonl``; a line that is still being written is left out."""
    text = (path / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
