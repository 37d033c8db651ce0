"""The server's door: whose token is good, and how often one address may knock."""

from __future__ import annotations

import ipaddress
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import grpc

from fedkit.errors import FedkitError
from fedkit.link.node import Refusal
from fedkit.security.tokens import TokenStore

_log = logging.getLogger(__name__)
_PEER = re.compile(r"ipv4:([0-9.]+)(?::\d+)?|ipv6:\[([^\]]+)\](?::\d+)?")


class Guard:
    """Lets in who has a good token, or everybody where none is asked for, and no address too often."""

    def __init__(self, tokens: TokenStore | None, rate: JoinRate | None = None) -> None:
        """A guard that asks for a token of ``tokens``, or for none, and lets in at that ``rate``."""
        self._tokens = tokens
        self._rate = rate or JoinRate()
        self._told = ""

    def __call__(self, hello: dict[str, Any], certificate: str | None) -> str | None:
        """The id of the token in ``hello["token"]``, or None where none is asked for.

        Args:
            hello: a client's greeting, as it came over the network.
            certificate: the name in the client's verified certificate, if it has shown one.

        Raises:
            Refusal: UNAUTHENTICATED for a token that is missing, unknown or revoked; ABORTED
                while the file of tokens can't be read, so that the client tries again.
        """
        if self._tokens is None:
            return None
        token = hello.get("token")
        if not isinstance(token, str) or not token:
            raise _refused(
                certificate,
                "This server asks for a join token: get one from its operator (`fedkit token new`) "
                "and give it with --token-file or the variable FEDKIT_TOKEN.",
            )
        try:
            found = self._tokens.find(token)
        except FedkitError as error:
            self._complain(error)
            raise Refusal(
                grpc.StatusCode.ABORTED, "The server can't read its tokens: tell its operator."
            ) from None
        if found is None:
            raise _refused(
                certificate,
                "This server does not know the join token: check that it is one of this server's "
                "and whole, or get another from its operator.",
            )
        if found.revoked:
            raise _refused(
                certificate,
                f"The join token {found.id} was revoked: get another from the server's operator.",
            )
        return found.id

    def allows(self, peer: str) -> bool:
        """Whether this network address (gRPC's, or bare) may try to join now; counts it if so."""
        return self._rate.allow(address_of(peer))

    def revoked(self, token: str) -> bool:
        """Whether the token of this id holds no more; no, while the file can't be read."""
        try:
            return self._tokens is not None and self._tokens.revoked(token)
        except FedkitError as error:
            self._complain(error)
            return False

    def _complain(self, error: FedkitError) -> None:
        # Asked for every few seconds and at each join; once is enough.
        if str(error) != self._told:
            self._told = str(error)
            _log.error("Nobody can join, and no token can be revoked: %s", error)


class JoinRate:
    """How often each address may join: a bucket of tokens for each, refilled steadily.

    Not for several threads at once.
    """

    def __init__(
        self,
        per_second: float = 50.0,
        burst: float = 2000.0,
        peers: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nobody has joined yet.

        Args:
            per_second: joins that one address may make for ever.
            burst: joins that it may make at once.
            peers: how many addresses are remembered; the one that came longest ago is forgotten.
            clock: seconds that never go back.
        """
        self._per_second = per_second
        self._burst = burst
        self._most = peers
        self._clock = clock
        self._peers: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allow(self, peer_ip: str) -> bool:
        """Whether this address may join now; counts it if so."""
        peer, now = _network(peer_ip), self._clock()
        left, since = self._peers.pop(peer, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._per_second)
        allowed = left >= 1
        self._peers[peer] = (left - 1 if allowed else left, now)
        if len(self._peers) > self._most:
            self._peers.popitem(last=False)
        return allowed


def address_of(peer: str) -> str:
    """The IP address in gRPC's ``context.peer()``, as in ``ipv4:10.0.0.5:40312``; else all of it."""
    found = _PEER.fullmatch(unquote(peer))
    return next(filter(None, found.groups())) if found else peer


def _network(ip: str) -> str:
    # One IPv6 subscriber has 2^64 addresses.
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return ip
    if isinstance(address, ipaddress.IPv4Address):
        return ip
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address) & ~((1 << 64) - 1), 64)))


def _refused(certificate: str | None, sentence: str) -> Refusal:
    who = f" from the holder of the certificate {certificate!a}" if certificate is not None else ""
    _log.info("Refused a client%s: %s", who, sentence)
    return Refusal(grpc.StatusCode.UNAUTHENTICATED, sentence)
