"""A client as the server's end of the link sees it."""

from __future__ import annotations

import hashlib
import hmac
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from fedkit.link.frames import Parcel

if TYPE_CHECKING:
    from fedkit.link.session import Session

# How many of a client's latest instructions are remembered, to say why a reply does not count.
REMEMBERED = 64


class Refusal(Exception):
    """Why a client may not come in, as a gRPC status and a sentence."""

    def __init__(self, status: grpc.StatusCode, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Guard(Protocol):
    """Who may come in at all, whatever the federation says."""

    def __call__(self, hello: dict[str, Any], certificate: str | None) -> str | None:
        """The id of the token that the greeting shows, if one is needed; raises ``Refusal``."""
        ...

    def allows(self, peer: str) -> bool:
        """Whether this network address may try again now."""
        ...

    def revoked(self, token: str) -> bool:
        """Whether the token with that id has been taken back since."""
        ...


@dataclass(frozen=True)
class Lost:
    """Stands for the reply of a client that is gone."""

    reason: str


@dataclass
class Instruction:
    """What a client has been sent and has not answered yet.

    Attributes:
        parcel: its bytes; kept, to be sent again after a reconnect.
        account: on which its bytes and its reply's are counted.
        has_slot: whether it holds one of the slots for transfers under way.
        sent: whether the client has been sent (some of) it.
    """

    parcel: Parcel
    account: str
    has_slot: bool = True
    sent: bool = False


@dataclass(eq=False)
class Node:
    """One client as the link sees it; survives its connections, and the server's process.

    Attributes:
        secret: SHA-256 (hex) of the secret by which the device proves that it is the same one.
        certificate: common name of its certificate, where the server demands one.
        token: id of the token with which it came in.
        lost_at: when its connection ended without a word, while it may still come back (monotonic).
        left_at: when its last connection ended.
        settled: its latest instructions that are over, and how they ended.
    """

    node_id: int
    identity: str
    secret: str
    name: str
    certificate: str | None = None
    token: str | None = None
    pending: dict[str, Instruction] = field(default_factory=dict)
    unsent: deque[str] = field(default_factory=deque)
    settled: dict[str, str] = field(default_factory=dict)
    session: Session | None = None
    left: bool = False
    lost_at: float | None = None
    left_at: float = 0.0
    goodbye: dict[str, Any] | None = None
    refusal: Refusal | None = None

    @property
    def here(self) -> bool:
        """Connected, or gone so shortly that it may come back."""
        return self.session is not None or self.lost_at is not None

    def remember(self, key: str, outcome: str) -> None:
        """Note how an instruction ended."""
        self.settled[key] = outcome
        while len(self.settled) > REMEMBERED:
            del self.settled[next(iter(self.settled))]

    def check_owner(self, secret: str, certificate: str | None) -> None:
        """Raise ``Refusal`` unless this is the device that came first under this identity."""
        if not hmac.compare_digest(self.secret, hashed(secret)):
            raise Refusal(
                grpc.StatusCode.PERMISSION_DENIED,
                "Another device is in this federation under this identity.",
            )
        if self.certificate is not None and certificate != self.certificate:
            raise Refusal(
                grpc.StatusCode.PERMISSION_DENIED,
                f"This identity belongs to the device with the certificate {self.certificate!r}, "
                f"not {certificate!r}: a state directory can't move to another device's certificate.",
            )


def hashed(secret: str) -> str:
    """SHA-256 (hex) of a secret, which is all that the server keeps of it."""
    return hashlib.sha256(secret.encode("utf-8", errors="surrogatepass")).hexdigest()
