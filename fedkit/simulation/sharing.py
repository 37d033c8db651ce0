"""Messages between processes of one machine: arrays lie in files in memory, the rest goes through a pipe.

What goes to many clients is written once, and read once by each worker.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

# Where files are memory on Linux; elsewhere the system's cache of a temporary folder does.
MEMORY = Path("/dev/shm")
PREFIX = "fedkit-"
# Below this a pipe is as fast as a file.
SMALL = 32_768
# POSIX allows for no more than 16, Linux and macOS for 1,024.
MOST_AT_ONCE = os.sysconf("SC_IOV_MAX")
# Of the bundles that this process has written.
_NUMBERS = count()


class Bundle(NamedTuple):
    """Arrays' bytes on their way.

    Attributes:
        file: where they lie, one after the other; empty if they travel along.
        sizes: of each.
        carried: they themselves, if they are small.
    """

    file: str
    sizes: tuple[int, ...]
    carried: tuple[bytes, ...]


@contextmanager
def shared_folder(place: Path | None = None) -> Iterator[Path]:
    """A new folder for bundles, in memory where the machine has such, which goes at the end.

    A process that is killed leaves its own behind, in memory as well: the next one removes that.
    """
    if place is None:
        place = MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    _remove_left_behind(place)
    # Under its own name only once it is locked: an unlocked one is nobody's any more.
    made = Path(tempfile.mkdtemp(prefix=f"new-{PREFIX}", dir=place))
    with (made / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = made.rename(made.with_name(made.name.removeprefix("new-")))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_left_behind(place: Path) -> None:
    for folder in place.glob(f"{PREFIX}*"):
        try:
            with (folder / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # it is in use, or somebody else's
            continue


def bundle(blobs: Sequence[bytes], folder: Path) -> Bundle:
    """Put arrays' bytes where another process finds them.

    Raises:
        OSError: there is no room.
    """
    sizes = tuple(map(len, blobs))
    if sum(sizes) <= SMALL:
        return Bundle("", sizes, tuple(blobs))
    name = f"{folder}/{os.getpid()}-{next(_NUMBERS)}"
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        write_all(descriptor, blobs)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return Bundle(name, sizes, ())


def unbundle(bundle: Bundle) -> list[bytes]:
    """The arrays' bytes."""
    if not bundle.file:
        return list(bundle.carried)
    descriptor = os.open(bundle.file, os.O_RDONLY)
    try:
        # To map the file would cost a fault for each of its pages.
        return [_read(descriptor, size) for size in bundle.sizes]
    finally:
        os.close(descriptor)


def discard(bundle: Bundle) -> None:
    """Nobody will read it any more."""
    if bundle.file:
        Path(bundle.file).unlink(missing_ok=True)


def _read(descriptor: int, size: int) -> bytes:
    blob = os.read(descriptor, size)
    if len(blob) == size:
        return blob
    # A system call moves no more than 2 GB.
    parts, left = [blob], size - len(blob)
    while left:
        parts.append(os.read(descriptor, left))
        if not parts[-1]:
            raise OSError("a bundle ends before its arrays do")
        left -= len(parts[-1])
    return b"".join(parts)


def write_all(descriptor: int, blobs: Sequence[bytes]) -> None:
    """Write one behind the other, in as few calls as the system takes them.

    Raises:
        OSError: there is no room.
    """
    left = deque(memoryview(blob) for blob in blobs if blob)
    while left:
        written = os.writev(descriptor, list(islice(left, MOST_AT_ONCE)))
        while left and written >= len(left[0]):
            written -= len(left.popleft())
        if written:
            left[0] = left[0][written:]
