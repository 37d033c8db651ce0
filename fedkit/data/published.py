"""Files that somebody published: whether they are here, and whether they are the published ones."""

from __future__ import annotations

import hashlib
import mmap
import warnings
from pathlib import Path

from fedkit.errors import FedkitError
from fedkit.settings import DataSettings


def by_torchvision(kind: str, root: Path, argument: str = "") -> str:
    """How to get the files of torchvision's class ``kind``, for a sentence."""
    call = f"{kind}('{root}'{argument}, download=True)"
    return f'`python -c "from torchvision.datasets import {kind}; {call}"` gets them'


def missing(kind: str, path: Path, how: str) -> FedkitError:
    """The error that says which file is not there and how to get it."""
    return FedkitError(
        f"{kind} has no file {path.name}: its files are expected in {path.parent}; {how}."
    )


def map_file(path: Path) -> mmap.mmap | bytes:
    """A file's bytes, mapped into memory: what is not touched is not read.

    Raises:
        FedkitError: it can't be opened.
    """
    try:
        with path.open("rb") as file:
            # No system maps nothing.
            empty = path.stat().st_size == 0
            return b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise FedkitError(f"{path} can't be read: {error.strerror or error}.") from error


def verify(
    path: Path, content: mmap.mmap | bytes, md5: str, sources: DataSettings, risk: str = ""
) -> bool:
    """Whether a file is the published one; it costs about 2 ms a megabyte.

    Args:
        path: the file, for sentences.
        content: its bytes.
        md5: the published one.
        sources: whether another file may be used; then there is a warning.
        risk: what speaks against that.

    Raises:
        FedkitError: it is another file, and may not be used.
    """
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found == md5:
        return True
    if not sources.allow_checksum_mismatch:
        raise FedkitError(
            f"{path} has the md5 {found}, not the published {md5}: get the original, or "
            f"pass --allow-checksum-mismatch if you trust this file{risk}."
        )
    warnings.warn(f"{path} is not the published file (md5 {found}).", stacklevel=2)
    return False


def checksums(right: int, files: int) -> str:
    """What became of the comparison, for people."""
    if right == files:
        return f"md5 of all {files} files as published"
    return f"md5 of {files - right} of {files} files is NOT the published one"
