"""What simulated clients remember while no worker holds them: one file for each client.

Nothing here outlives the run, so nothing is synced: it is memory that happens to be a disk's.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import RecordDict

from fedkit.flower import decode_records, encode_records


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
        # A new file, not the old one anew or renamed over: ext4 would write that to the disk at once.
        self._file(client).unlink(missing_ok=True)
        with self._file(client).open("xb", buffering=0) as file:
            for part in encode_records(state):
                view = memoryview(part)
                while view:
                    view = view[file.write(view) :]

    def recall(self, client: int) -> RecordDict:
        """A client's state; empty before its first instruction."""
        file = self._file(client)
        return decode_records(file.read_bytes()) if file.exists() else RecordDict()

    def known(self) -> list[int]:
        """The clients that have been at work, in order."""
        return sorted(int(file.stem) for file in self._folder.glob("*.records"))

    def _file(self, client: int) -> Path:
        return self._folder / f"{client}.records"
