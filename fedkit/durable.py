"""Files that are whole or not there: write, fsync, rename, fsync the folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedkit.errors import FedkitError


def write_whole(path: Path, buffers: Iterable[bytes], *, mode: int = 0o666) -> None:
    """Replace ``path`` with these bytes so that a crash leaves the old file or the new one.

    ``mode`` holds from the first byte on, less the umask.

    Raises:
        FedkitError: the disk is full, or the folder can't be written; the old file is untouched.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(handle, "wb") as file:
            for buffer in buffers:
                file.write(buffer)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise FedkitError(f"{path} can't be written: {error.strerror or error}.") from error


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` with ``value`` as JSON."""
    write_whole(path, [json.dumps(value, indent=2).encode(), b"\n"])


def checksum_of(value: Any) -> str:
    """SHA-256 (hex) of a value as JSON, by which a file that holds it can check itself."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; ``FedkitError`` if that can't be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FedkitError(f"The folder {folder} can't be made: {error.strerror}.") from error
