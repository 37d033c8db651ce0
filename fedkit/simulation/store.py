"""What simulated clients remember while no worker holds them: one file for each client.

Nothing here outlives the run, so nothing is synced: it is memory that happens to be a disk's.
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import RecordDict

from fedkit.flower import decode_records, encode_records
from fedkit.simulation.sharing import write_all


class Store:
    """The states of clients, by index."""

    def __init__(self, folder: Path) -> None:
        """A store in ``folder``, which is there."""
        self._folder = folder

    def keep(self, client: int, state: RecordDict) -> None:
        """Write a client's state.

        Raises:
            OSError: the disk is full.
        """
        parts = encode_records(state)
        # Over what is there: a file that was cut to nothing first, or another that took its name, ext4
        # would write to the disk at once.
        descriptor = os.open(self._file(client), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            write_all(descriptor, parts)
            os.ftruncate(descriptor, sum(map(len, parts)))
        finally:
            os.close(descriptor)

    def recall(self, client: int) -> RecordDict:
        """A client's state; empty before its first instruction."""
        file = self._file(client)
        return decode_records(file.read_bytes()) if file.exists() else RecordDict()

    def known(self) -> list[int]:
        """The clients that have been at work, in order."""
        return sorted(int(file.stem) for file in self._folder.glob("*.records"))

    def _file(self, client: int) -> Path:
        return self._folder / f"{client}.records"
