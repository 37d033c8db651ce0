"""Join tokens: who may come in, and who no more.

A token is ``fk_ID_SECRET``. The server's file keeps of the secret only its SHA-256, which needs no salt
and no slow hash, since the secret has 192 random bits.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from fedkit.durable import make_folder, write_whole
from fedkit.errors import FedkitError, UsageError

VERSION = 1
_TOKEN = re.compile(r"fk_([0-9a-f]{8})_([0-9a-f]{48})")
_NAME = re.compile(r"[A-Za-z0-9 ._-]{0,64}")
_NOBODY = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class Token:
    """What the server knows of a token.

    Attributes:
        id: its public part.
        name: who it was made for.
        sha256: of its secret part.
        created: when, in ISO form.
        revoked: when it was revoked; empty: it was not.
    """

    id: str
    name: str
    sha256: str
    created: str
    revoked: str = ""


class TokenStore:
    """The server's file of tokens, read again whenever it has changed on disk."""

    def __init__(self, path: Path) -> None:
        """Open and read it.

        Raises:
            UsageError: there is no such file.
            FedkitError: it is damaged or can't be read.
        """
        self.path = path
        self._tokens: dict[str, Token] = {}
        self._seen: tuple[int, ...] | None = None
        if not path.exists():
            raise UsageError(
                f"There is no file of tokens {path}: make it with `fedkit token new --file {path}`."
            )
        self.all()

    def all(self) -> list[Token]:
        """Every token, in the order in which they were made; ``FedkitError`` if it is damaged."""
        try:
            status = self.path.stat()
            signature = (status.st_ino, status.st_size, status.st_mtime_ns)
            if signature != self._seen:
                self._tokens = _parse(self.path.read_bytes())
                self._seen = signature
        except OSError as error:
            raise FedkitError(f"{self.path} can't be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise FedkitError(
                f"{self.path} is damaged: restore it, or move it aside and make new tokens with "
                "`fedkit token new`."
            ) from error
        return list(self._tokens.values())

    def find(self, token: str) -> Token | None:
        """The entry whose secret this token holds, revoked or not; in constant time.

        Raises:
            FedkitError: the file is damaged or gone.
        """
        self.all()
        parts = _TOKEN.fullmatch(token)
        number, secret = parts.groups() if parts else ("", "")
        entry = self._tokens.get(number)
        expected = entry.sha256 if entry else _NOBODY
        # Also for an id that nobody has: how long it takes tells nothing.
        same = hmac.compare_digest(_digest(secret), expected)
        return entry if parts is not None and same else None

    def check(self, token: str) -> str | None:
        """The id of a token that is good now, else None; ``FedkitError`` as for ``find``."""
        entry = self.find(token)
        return entry.id if entry is not None and not entry.revoked else None

    def revoked(self, id: str) -> bool:
        """Whether it holds no more: revoked, or gone from the file."""
        self.all()
        entry = self._tokens.get(id)
        return entry is None or bool(entry.revoked)


def new_token(path: Path, name: str = "") -> str:
    """Make a token and note it in ``path``, which is made if need be; returns the token.

    Raises:
        UsageError: a name that can't be one.
        FedkitError: the file is damaged or can't be written.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            "--name takes up to 64 letters, digits, spaces, dots, dashes and underscores, not "
            f"{name[:64]!a}."
        )
    secret = secrets.token_hex(24)
    make_folder(path.parent)
    with _locked(path.parent):
        known = TokenStore(path).all() if path.exists() else []
        taken = {token.id for token in known}
        number = next(n for n in iter(lambda: secrets.token_hex(4), "") if n not in taken)
        _write(path, [*known, Token(number, name, _digest(secret), _now())])
    return f"fk_{number}_{secret}"


def revoke(path: Path, id: str) -> Token:
    """Revoke a token by its id; a running server hears of it at the next join.

    Raises:
        UsageError: no such file, or no such token in it.
        FedkitError: the file is damaged or can't be written.
    """
    store = TokenStore(path)
    with _locked(path.parent):
        known = store.all()
        found = [token for token in known if token.id == id]
        if not found:
            # Not quoted: people paste the whole token here, and errors end up in logs.
            raise UsageError(
                f"{path} has no token of that id: `fedkit token list --file {path}` shows the ids, "
                "the 8 characters after fk_."
            )
        gone = found[0] if found[0].revoked else replace(found[0], revoked=_now())
        _write(path, [gone if token.id == id else token for token in known])
    return gone


def check_shape(token: str, where: str) -> str:
    """The token without white space around it; ``UsageError`` if it can't be one.

    The sentence names ``where`` it was found, never the token.
    """
    token = token.strip()
    if not _TOKEN.fullmatch(token):
        raise UsageError(
            f"{where} holds no token as `fedkit token new` makes them (fk_ID_SECRET): copy it again."
        )
    return token


def _parse(data: bytes) -> dict[str, Token]:
    value = json.loads(data)
    if value["version"] != VERSION:
        raise ValueError("another version")
    tokens = [Token(**entry) for entry in value["tokens"]]
    for token in tokens:
        if not all(isinstance(text, str) for text in asdict(token).values()):
            raise ValueError("an entry that is no text")
        if not re.fullmatch("[0-9a-f]{64}", token.sha256):
            raise ValueError("a digest that is none")
    return {token.id: token for token in tokens}


def _write(path: Path, tokens: list[Token]) -> None:
    value = {"version": VERSION, "tokens": [asdict(token) for token in tokens]}
    write_whole(path, [json.dumps(value, indent=2).encode(), b"\n"], mode=0o600)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # Two commands at once must not lose each other's change. The file itself is replaced, so the
    # folder is what stays.
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
