"""Certificates and keys as gRPC takes them, and what its errors mean.

Nothing here loads `cryptography` on a client: one that waits for its first instruction stays small.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import grpc

from fedkit.errors import FedkitError, UsageError
from fedkit.security.settings import ClientSecurity, ServerSecurity, uses_tls, warn_if_open

_log = logging.getLogger(__name__)


def server_credentials(security: ServerSecurity) -> grpc.ServerCredentials | None:
    """What the server's port is opened with; None: plaintext.

    The files are looked at again at each new connection, so that renewed ones need no restart. Ones
    that can't be used are warned of, and those before stay in force.

    Raises:
        UsageError: the files can't be used.
    """
    if not security.ssl_certfile:
        return None
    files = _ServerFiles(security)
    # Its annotations forget that None is no change.
    fetch: Any = files.changed
    return grpc.dynamic_ssl_server_credentials(
        files.configuration, fetch, bool(security.ssl_ca_certfile)
    )


def channel_credentials(server: str, security: ClientSecurity) -> grpc.ChannelCredentials | None:
    """What a connection to ``server`` is opened with, read anew at each call; None: plaintext.

    Raises:
        FedkitError: a file can't be read.
    """
    if not uses_tls(server, security):
        return None
    if security.ssl_keyfile:
        warn_if_open(Path(security.ssl_keyfile))
    return grpc.ssl_channel_credentials(
        root_certificates=_read(security.root_certificates),
        private_key=_read(security.ssl_keyfile),
        certificate_chain=_read(security.ssl_certfile),
    )


def explain_tls(details: str, server: str, security: ClientSecurity) -> str | None:
    """One sentence for gRPC's details of a connection that never came up, if TLS is why.

    Args:
        details: what gRPC said.
        server: the HOST:PORT that was dialled.
        security: with what.
    """
    if not uses_tls(server, security):
        if "Socket closed" in details:
            return (
                f"What listens at {server} hung up on a client without encryption: if it is a fedkit "
                "server with TLS, give its authority with --root-certificates."
            )
        return None
    if "WRONG_VERSION_NUMBER" in details:
        return (
            f"What listens at {server} does not speak TLS: if it is a fedkit server without "
            "encryption, start that with --ssl-certfile, or this client with --insecure."
        )
    if "Hostname Verification" in details:
        return (
            f"The server's certificate does not hold for {_host(server)}: dial it by a name in the "
            "certificate (`fedkit certs show server.pem`), or make one for that name."
        )
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return _explain_certificate(details, server, security)
    if "Failed to create security handshaker" in details:
        return (
            "The files of --root-certificates, --ssl-certfile and --ssl-keyfile can't be used: they "
            "are damaged, or key and certificate do not belong together."
        )
    if "Handshake read failed" in details:
        return (
            f"What listens at {server} hung up in the middle of the TLS handshake: check --server."
        )
    if "Socket closed" in details:
        # With TLS 1.3 that is all that a client hears when its certificate is refused.
        return _explain_refused(server, security)
    return None


def peer_name(auth_context: Mapping[str, Iterable[bytes]]) -> str | None:
    """The common name of the certificate that the client proved to hold; None without mTLS."""
    names = list(auth_context.get("x509_common_name", ()))
    return names[0].decode("utf-8", errors="replace") if len(names) == 1 else None


def peer_warning(auth_context: Mapping[str, Iterable[bytes]]) -> str | None:
    """The sentence for a client's certificate that ends within 30 days; for the server to say."""
    from fedkit.security.pem import parse_certificate, warning

    found = list(auth_context.get("x509_pem_cert", ()))
    if not found:
        return None
    file = Path(f"{peer_name(auth_context)}.pem")
    try:
        return warning(parse_certificate(found[0], file), file)
    except FedkitError:
        return None  # gRPC takes it, another library does not: no reason to keep a device out


class _ServerFiles:
    """The server's certificate, key and authority, looked at again at each new connection."""

    def __init__(self, security: ServerSecurity) -> None:
        self._certificate = Path(security.ssl_certfile)
        self._key = Path(security.ssl_keyfile)
        self._authority = Path(security.ssl_ca_certfile) if security.ssl_ca_certfile else None
        self._lock = threading.Lock()
        self._told: date | None = None
        try:
            self._seen = self._signature()
            self.configuration = self._load()
        except OSError as error:
            raise UsageError(f"{error.filename} can't be read: {error.strerror}.") from error

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The files as gRPC takes them if they have changed, else None; called on its threads."""
        try:
            with self._lock:
                self._remind()
                now = self._signature()
                if now == self._seen:
                    return None
                # Also if they can't be used: what is half-written changes once more.
                self._seen = now
                self.configuration = self._load()
            _log.warning("The certificate in %s was renewed and is in use.", self._certificate)
            return self.configuration
        except Exception as error:  # whatever it was, the port stays open with what was good
            _log.warning(
                "The new certificate files can't be used, the old ones stay in force: %s", error
            )
            return None

    def _signature(self) -> list[tuple[int, ...]]:
        files = [self._certificate, self._key, *([self._authority] if self._authority else [])]
        found = [file.stat() for file in files]
        return [(status.st_ino, status.st_size, status.st_mtime_ns) for status in found]

    def _load(self) -> grpc.ServerCertificateConfiguration:
        from fedkit.security.pem import fingerprint, parse_certificate, parse_key, warning

        chain, key = self._certificate.read_bytes(), self._key.read_bytes()
        certificate = parse_certificate(chain, self._certificate)
        owner = parse_key(key, self._key).public_key()
        if fingerprint(owner) != fingerprint(certificate.public_key()):
            raise UsageError(f"{self._key} is not the key of the certificate {self._certificate}.")
        authority = self._authority.read_bytes() if self._authority else None
        if authority is not None and self._authority is not None:
            parse_certificate(authority, self._authority)
        self._warning = functools.partial(warning, certificate, self._certificate)
        self._told = None
        self._remind()
        return grpc.ssl_server_certificate_configuration([(key, chain)], authority)

    def _remind(self) -> None:
        today = datetime.now(UTC).date()
        if self._told != today:
            self._told = today
            sentence = self._warning()
            if sentence:
                _log.warning("Warning: %s", sentence)


def _explain_certificate(details: str, server: str, security: ClientSecurity) -> str:
    if "expired" in details:
        return (
            f"The certificate of the server at {server} has expired (or this machine's clock, "
            f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, is wrong): it is renewed there with `fedkit "
            "certs renew server.pem`."
        )
    if "not yet valid" in details:
        return (
            f"The certificate of the server at {server} is not valid yet: this machine's clock, "
            f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, is wrong."
        )
    if "purpose" in details:
        return (
            f"What listens at {server} shows a certificate that is no server's: somebody else may "
            "have put themselves there; `fedkit certs sign --host` makes one for a server."
        )
    if not security.root_certificates:
        return (
            f"The certificate of the server at {server} is signed by nobody that this machine knows: "
            "give the authority's ca.pem with --root-certificates."
        )
    return (
        f"The certificate of the server at {server} was not signed by the authority in "
        f"{security.root_certificates}: check --server, or get the right ca.pem."
    )


def _explain_refused(server: str, security: ClientSecurity) -> str:
    if not security.ssl_certfile:
        return (
            f"The server at {server} hung up: it asks each client for a certificate, and this one "
            "gave none; make one with `fedkit certs request` and give --ssl-certfile and "
            "--ssl-keyfile."
        )
    from fedkit.security.pem import purpose, read_certificate, warning

    try:
        own = read_certificate(Path(security.ssl_certfile))
        sentence = warning(own, Path(security.ssl_certfile)) or ""
        if "ended on" in sentence:
            return f"The server at {server} refuses this client: {sentence}"
        if purpose(own) != "a client":
            return (
                f"The server at {server} refuses this client: {security.ssl_certfile} is no "
                "client's certificate."
            )
    except FedkitError as error:
        return str(error)
    return (
        f"The server at {server} refuses this client's certificate {security.ssl_certfile}: it was "
        "signed by another authority than the one that the server knows."
    )


def _host(server: str) -> str:
    return server.rpartition(":")[0]


def _read(file: str) -> bytes | None:
    if not file:
        return None
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise FedkitError(f"{file} can't be read: {error.strerror}.") from error
