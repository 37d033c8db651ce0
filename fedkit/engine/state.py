"""A client's state directory: who it is, and everything that exists nowhere else.

``identity.json`` is the device's name and secret. Each federation has a folder of its own, so that a
model is never overwritten by another run: ``manifest.json`` names, with their SHA-256, the files that
hold the records of ``Context.state`` and the replies of the last two rounds. A commit writes what
changed, then replaces the manifest, which is the moment at which it counts.

The replies are kept because a server that was killed repeats a round from its last checkpoint: what was
done is told again from here, and not done again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fedkit.durable import checksum_of, make_folder, write_json, write_whole
from fedkit.errors import FedkitError

if TYPE_CHECKING:
    from flwr.app import RecordDict

VERSION = 2
# The last checkpoint may be torn, and the one before it count: two rounds may be repeated.
ROUNDS_KEPT = 2
# How often a directory is looked at that another process has.
POLL_S = 0.2


class InUse(FedkitError):
    """Another living process has the state directory."""


class StateDirectory:
    """One device's directory, locked for as long as the process lives."""

    def __init__(self, path: Path, patience: float = 0.0) -> None:
        """Make and lock it, waiting for so many seconds until it is free.

        Raises:
            FedkitError: another process uses it, or it can't be written.
        """
        make_folder(path)
        self.path = path
        try:
            self._lock = (path / "lock").open("a")
        except OSError as error:
            raise FedkitError(f"{path} can't be written: {error.strerror}.") from error
        deadline = time.monotonic() + patience
        while not self._locked():
            if time.monotonic() >= deadline:
                self._lock.close()
                raise InUse(
                    f"Another client uses the state directory {path}: give each its own --state-dir."
                )
            time.sleep(POLL_S)

    def identity(self) -> dict[str, str]:
        """The device's lasting name and secret; drawn at the first call."""
        file = self.path / "identity.json"
        if not file.exists():
            fresh = {"identity": secrets.token_hex(8), "secret": secrets.token_hex(16)}
            write_whole(file, [json.dumps(fresh).encode()], mode=0o600)
        try:
            found = json.loads(file.read_text())
            identity = {name: found[name] for name in ("identity", "secret")}
            if not all(isinstance(word, str) and word for word in identity.values()):
                raise ValueError("it holds no identity")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FedkitError(
                f"{file} is damaged ({error}): restore it, or move the state directory aside."
            ) from error
        return identity

    def set_aside(self) -> Path | None:
        """Move everything kept for federations to a folder beside, and begin anew as the same device.

        Returns:
            where it is now; None if there was nothing.
        """
        kept = [entry for entry in self.path.iterdir() if (entry / "manifest.json").is_file()]
        if not kept:
            return None
        aside = self.path / f"aside-{time.strftime('%Y-%m-%dT%H-%M-%S')}-{secrets.token_hex(2)}"
        make_folder(aside)
        for entry in kept:
            entry.rename(aside / entry.name)
        return aside

    def close(self) -> None:
        """Let another process have it."""
        self._lock.close()

    def _locked(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def first_free(parent: Path, stem: str) -> StateDirectory:
    """``parent/stem-0``, or the first after it that no living process uses."""
    number = 0
    while True:
        try:
            return StateDirectory(parent / f"{stem}-{number}")
        except InUse:
            number += 1


class FederationState:
    """What one client keeps for one federation."""

    def __init__(self, folder: Path, owner: dict[str, Any] | None) -> None:
        """Open the folder, or begin it.

        Args:
            folder: ``STATE_DIR/FEDERATION``.
            owner: model and shard; a folder of another owner is refused. None: only to be read.

        Raises:
            FedkitError: it belongs to another model or shard, or is damaged.
        """
        make_folder(folder)
        self.folder = folder
        self._owner = owner
        self._kept: dict[str, Any] = {}
        self._files: dict[str, str] = {}
        self._commits = 0
        self._replies: dict[str, tuple[str, int]] = {}
        self.last_key: str | None = None
        self._manifest = self._read_manifest()

    @property
    def begun(self) -> bool:
        """Whether anything was kept before."""
        return self.last_key is not None

    @property
    def owner(self) -> Any:
        """Model and shard of whoever has begun the folder; None before."""
        return self._manifest.get("owner")

    @property
    def files(self) -> dict[str, str]:
        """The records that are kept, and the file that holds each."""
        return dict(self._files)

    @property
    def last_round(self) -> int | None:
        """The last round of which something is kept; None before the first."""
        return max((round for _, round in self._replies.values()), default=0) or None

    def restore(self, state: RecordDict) -> None:
        """Put what was kept back into a context's state."""
        for name in self._files:
            state[name] = self.record(name)
            self._kept[name] = mark(state, name)

    def record(self, name: str) -> Any:
        """One record as it was kept; ``FedkitError`` if its file is damaged."""
        from fedkit.flower import decode_records

        file = self._files[name]
        try:
            return decode_records(self._read(file))[name]
        except (ValueError, KeyError, TypeError) as error:
            raise FedkitError(f"{self.folder / file} is damaged: {error}.") from error

    def reply_to(self, key: str) -> list[bytes] | None:
        """What was answered to instruction ``key``, if that is kept.

        Raises:
            FedkitError: its file is damaged.
        """
        if key not in self._replies:
            return None
        from fedkit.flower import from_file

        file = self._replies[key][0]
        try:
            return from_file(self._read(file))
        except ValueError as error:
            raise FedkitError(f"{self.folder / file} is damaged: {error}.") from error

    def commit(self, key: str, reply: Sequence[bytes], state: RecordDict, round: int = 0) -> None:
        """Keep the state and the reply to instruction ``key``, both or neither.

        Joining (round 0) needs no commit where it changed nothing: doing it again gives the same.

        Raises:
            FedkitError: it can't be written; what was kept before still counts.
        """
        from flwr.app import RecordDict

        from fedkit.flower import as_file, encode_records

        marks = {name: mark(state, name) for name in state}
        changed = [name for name in state if self._kept.get(name) != marks[name]]
        if not round and not changed and marks.keys() == self._files.keys():
            return
        self._commits += 1
        files = {name: file for name, file in self._files.items() if name in marks}
        written: dict[str, str] = {}
        for name in changed:
            file = f"{self._commits:08d}-{quote(name, safe='')}.records"
            written[file] = self._write(file, encode_records(RecordDict({name: state[name]})))
            files[name] = file
        files = {name: files[name] for name in marks}  # in the order in which they are
        reply_file = f"{self._commits:08d}.reply"
        written[reply_file] = self._write(reply_file, as_file(reply))
        replies = {
            old: (file, at)
            for old, (file, at) in self._replies.items()
            if at > round - ROUNDS_KEPT and old != key
        }
        replies[key] = reply_file, round
        sums = {**self._manifest.get("sha256", {}), **written}
        used = {*files.values(), *(file for file, _ in replies.values())}
        manifest = {
            "version": VERSION,
            "owner": self._owner,
            "commit": self._commits,
            "key": key,
            "replies": replies,
            "records": files,
            "sha256": {file: sums[file] for file in sorted(used)},
        }
        write_json(self.folder / "manifest.json", {**manifest, "checksum": checksum_of(manifest)})
        self._manifest, self._files, self._kept = manifest, files, marks
        self._replies, self.last_key = replies, key
        self._sweep(used)

    def _read_manifest(self) -> dict[str, Any]:
        file = self.folder / "manifest.json"
        if not file.exists():
            return {}
        try:
            manifest: dict[str, Any] = json.loads(file.read_text())
            version, owner = manifest["version"], manifest["owner"]
            self._files, self._commits = dict(manifest["records"]), int(manifest["commit"])
            if version != VERSION:
                raise FedkitError(f"{file} was written by another version of fedkit.")
            if manifest.pop("checksum") != checksum_of(manifest):
                raise ValueError("its checksum is wrong")
            self.last_key = str(manifest["key"])
            self._replies = {key: (name, at) for key, (name, at) in manifest["replies"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FedkitError(f"{file} is damaged: {error}.") from error
        if self._owner is not None and owner != self._owner:
            raise FedkitError(
                f"{self.folder} holds the state of {_owner_text(owner)} in this federation, not of "
                f"{_owner_text(self._owner)}: start the client as before, give another --state-dir, "
                "or --reset-state, which moves it aside."
            )
        return manifest

    def _write(self, file: str, buffers: Sequence[bytes]) -> str:
        sha = hashlib.sha256()
        for buffer in buffers:
            sha.update(buffer)
        write_whole(self.folder / file, buffers)
        return sha.hexdigest()

    def _read(self, file: str) -> bytes:
        try:
            data = (self.folder / os.path.basename(file)).read_bytes()  # noqa: PTH119
        except OSError as error:
            raise FedkitError(f"{self.folder / file} can't be read: {error.strerror}.") from error
        if hashlib.sha256(data).hexdigest() != self._manifest["sha256"].get(file):
            raise FedkitError(f"{self.folder / file} is damaged: its checksum is wrong.")
        return data

    def _sweep(self, used: set[str]) -> None:
        for file in self.folder.iterdir():
            ours = file.suffix in (".records", ".reply", ".unfinished")
            if ours and file.name not in used:
                file.unlink(missing_ok=True)


class _Identity:
    """Equal only to itself: comparing models byte by byte would cost more than it saves."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.data is self.data

    __hash__ = None  # type: ignore[assignment]


def mark(state: RecordDict, name: str) -> Any:
    """What tells whether a record has changed: the bytes of an array can't, but may be replaced."""
    from flwr.app import ArrayRecord

    record = state[name]
    if isinstance(record, ArrayRecord):
        return [
            (key, array.dtype, tuple(array.shape), array.stype, _Identity(array.data))
            for key, array in record.items()
        ]
    return type(record).__name__, [(key, repr(value)) for key, value in record.items()]


def _owner_text(owner: Any) -> str:
    if isinstance(owner, dict) and {"model", "shard"} <= owner.keys():
        return f"a {owner['model']} on shard {owner['shard']}"
    return "another client"
