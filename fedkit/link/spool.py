"""Replies that wait for those before them: in memory, and beyond a bound on disk."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import IO

_log = logging.getLogger(__name__)
HELD_BYTES = 256 << 20
SMALL_BYTES = 1 << 20


class Reply:
    """One reply's buffers, wherever they are."""

    def __init__(self, buffers: list[bytes], spool: Spool) -> None:
        self.size = sum(map(len, buffers))
        # By the clock on the wall, as Flower dates messages.
        self.came_at = time.time()
        self._buffers: list[bytes] | None = buffers
        self._lengths = list(map(len, buffers))
        self._file: IO[bytes] | None = None
        self._spool = spool

    def take(self) -> list[bytes]:
        """The buffers, once: they are let go of here."""
        buffers, file = self._buffers, self._file
        self._buffers = self._file = None
        if file is not None:
            with file:
                file.seek(0)
                return [file.read(length) for length in self._lengths]
        assert buffers is not None, "a reply is taken once"
        self._spool.held -= self.size
        return buffers

    def discard(self) -> None:
        """Nobody wants it."""
        if self._file is not None:
            self._file.close()
        elif self._buffers is not None:
            self._spool.held -= self.size
        self._buffers = self._file = None

    @property
    def is_too_much(self) -> bool:
        """Whether it should better wait on disk."""
        return self.size > SMALL_BYTES and self._spool.held > HELD_BYTES

    def write_out(self) -> None:
        """Move the buffers to a file without a name, which ends with the process.

        Where there is no room for it they stay in memory: the reply is whole, and was asked for.
        """
        try:
            file = tempfile.TemporaryFile(dir=self._spool.folder)  # noqa: SIM115
            file.writelines(self._buffers or [])
            file.flush()
        except OSError as error:
            _log.warning("A reply can't be put aside on disk: %s.", error.strerror)
            return
        self._file, self._buffers = file, None
        self._spool.held -= self.size


class Spool:
    """How much waits in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder``: where what is too much goes; None takes the system's for temporary files."""
        self.folder = folder
        self.held = 0

    def keep(self, buffers: list[bytes]) -> Reply:
        """A reply that was just received, in memory."""
        reply = Reply(buffers, self)
        self.held += reply.size
        return reply
