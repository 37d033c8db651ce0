"""A client as the server's end of the link sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc


class Refusal(Exception):
    """Why a client may not come in, as a gRPC status and a sentence."""

    def __init__(self, status: grpc.StatusCode, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Lost:
    """Stands for the reply of a client that is gone."""

    reason: str


@dataclass(frozen=True)
class Instruction:
    """What a client has been sent and has not answered yet."""

    buffers: Sequence[bytes]
    account: str


@dataclass(eq=False)
class Node:
    """One client as the link sees it; survives its connection."""

    node_id: int
    identity: str
    secret: str
    name: str
    pending: dict[str, Instruction] = field(default_factory=dict)
    unsent: list[str] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    session: str = ""
    task: asyncio.Task[Any] | None = None
    connected: bool = False
    left: bool = False
    lost_at: float | None = None
    goodbye: str | None = None
    refusal: Refusal | None = None

    @property
    def here(self) -> bool:
        """Connected, or gone so shortly that it may come back."""
        return self.connected or self.lost_at is not None
