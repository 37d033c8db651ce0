"""What lies below the link, one finding each: the name, the port, and what is spoken there."""

from __future__ import annotations

import os
import socket
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK, WARNING, FAIL = "ok", "warning", "FAIL"
CONNECT_S = 5.0
WARN_DAYS = 30
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
# OpenSSL's numbers for why a certificate is not believed.
EXPIRED, NOT_YET, OTHER_HOSTS = {10}, {9}, {62, 64}


class _HungUp(OSError):
    """The handshake was done, and the other side wants no more of it."""


@dataclass(frozen=True)
class Finding:
    """One line of an examination.

    Attributes:
        check: what was looked at.
        status: ``ok``, ``warning`` or ``FAIL``.
        text: what was found, and what to do.
        values: the same for programs.
    """

    check: str
    status: str
    text: str
    values: dict[str, Any] = field(default_factory=dict)


def find_name(host: str, port: int) -> tuple[Finding, list[str]]:
    """Look the name up; gives its addresses."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        text = (
            f"The name {host} can't be found ({reason}): check --server, and this device's name "
            "server."
        )
        return Finding("name", FAIL, text), []
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    text = f"{host} is {', '.join(addresses)}" if [host] != addresses else f"{host} is an address"
    return Finding("name", OK, text, {"addresses": addresses}), addresses


def find_port(addresses: list[str], port: int) -> tuple[Finding, str | None]:
    """Connect to the first address that answers; gives that address."""
    reasons = []
    for address in addresses:
        at = time.monotonic()
        try:
            socket.create_connection((address, port), CONNECT_S).close()
        except OSError as error:
            reasons.append(_why_no_connection(error, address, port))
            continue
        seconds = time.monotonic() - at
        text = f"{address} answers at port {port} in {1000 * seconds:.1f} ms"
        return Finding("port", OK, text, {"address": address, "seconds": seconds}), address
    proxy = next((name for name in PROXIES if os.environ.get(name)), None)
    hint = f" (tried directly; `fedkit client` takes the proxy that {proxy} names)" if proxy else ""
    return Finding("port", FAIL, f"{'; '.join(reasons)}{hint}."), None


def _why_no_connection(error: OSError, address: str, port: int) -> str:
    if isinstance(error, ConnectionRefusedError):
        local = _is_local(address)
        how = "" if local else ", and with a --listen that other machines reach"
        return f"{address} refuses port {port}: check that `fedkit server` runs there{how}"
    if isinstance(error, TimeoutError):
        return (
            f"{address} does not answer at port {port} in {CONNECT_S:.0f} seconds: a firewall may "
            "be between, or the machine is off"
        )
    return f"{address} can't be reached at port {port}: {error.strerror or error}"


def find_plaintext(host: str, address: str, port: int) -> Finding:
    """That a server which is to be spoken to without TLS does not demand it."""
    try:
        _shake_hands(host, address, port, _believing(), hear=False)
    except OSError:
        local = _is_local(address)
        text = "no TLS: what travels can be read" + (" by this machine only" if local else "")
        return Finding("tls", OK if local else WARNING, text, {"tls": False})
    text = (
        f"{host}:{port} speaks TLS: give the federation's CA certificate with --root-certificates, and "
        "no --insecure."
    )
    return Finding("tls", FAIL, text, {"tls": True})


def find_tls(
    host: str,
    address: str,
    port: int,
    *,
    authority: Path | None,
    certificate: Path | None = None,
    key: Path | None = None,
) -> Finding:
    """Shake hands as the link does: the server's certificate, and whether it believes ours.

    Args:
        host: the name that the certificate must bear.
        address: where to connect.
        port: likewise.
        authority: the PEM file of the CA that is trusted; None trusts this machine's.
        certificate: this device's own, where the server wants one.
        key: its private key.
    """
    try:
        context = _context(authority, certificate, key)
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(str(path) for path in (authority, certificate, key) if path)
        text = f"The certificates in {files} can't be used: {error.strerror or error}."
        return Finding("tls", FAIL, text)
    try:
        version, presented = _shake_hands(host, address, port, context)
    except ssl.SSLCertVerificationError as error:
        return Finding("tls", FAIL, _why_not_believed(error, host, address, port, authority))
    except OSError as error:
        return Finding("tls", FAIL, _why_no_tls(error, host, port, certificate))
    return _judge(presented, version)


def _context(authority: Path | None, certificate: Path | None, key: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority) if authority else None)
    # gRPC judges by RFC 5280 without OpenSSL's stricter reading of it.
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(str(certificate), str(key) if key else None)
    return context


def _believing() -> ssl.SSLContext:
    """For looking only: nothing is said over such a connection."""
    context = _context(None, None, None)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _shake_hands(
    host: str, address: str, port: int, context: ssl.SSLContext, *, hear: bool = True
) -> tuple[str, bytes | None]:
    with (
        socket.create_connection((address, port), CONNECT_S) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        # In TLS 1.3 a server judges our certificate after the handshake: its first bytes tell.
        if hear and not secure.recv(1):
            raise _HungUp("it hung up after the handshake")
        return secure.version() or "TLS", secure.getpeercert(binary_form=True)


def _judge(presented: bytes | None, version: str) -> Finding:
    from cryptography import x509

    assert presented is not None
    found = x509.load_der_x509_certificate(presented)
    until = found.not_valid_after_utc
    days = int((until.timestamp() - time.time()) // 86400)
    issuer, name = found.issuer.rfc4514_string(), found.subject.rfc4514_string()
    text = f"{version}, certificate of {name or 'no name'} from {issuer}, until {until:%Y-%m-%d}"
    values = {"tls": True, "issuer": issuer, "subject": name, "until": until.isoformat()}
    if days < WARN_DAYS:
        return Finding("tls", WARNING, f"{text}: renew it, {days} days are left.", values)
    return Finding("tls", OK, text, values)


def _why_not_believed(
    error: ssl.SSLCertVerificationError, host: str, address: str, port: int, authority: Path | None
) -> str:
    found = _look(host, address, port)
    if error.verify_code in OTHER_HOSTS:
        return (
            f"The server's certificate is not for {host}{_names(found)}: reach it by such a name, or "
            "let the server's certificate be signed for this one too."
        )
    if error.verify_code in EXPIRED:
        until = f" since {found.not_valid_after_utc:%Y-%m-%d}" if found else ""
        return (
            f"The server's certificate is out of date{until}: it must be renewed (or this device's "
            "clock is wrong)."
        )
    if error.verify_code in NOT_YET:
        return "The server's certificate is not valid yet: this device's clock may be wrong."
    issuer = f" (by {found.issuer.rfc4514_string()})" if found else ""
    trusted = f"the CA in {authority}" if authority else "a CA that this machine trusts"
    return (
        f"The server's certificate{issuer} was not signed by {trusted}: give the federation's own "
        "CA certificate with --root-certificates."
    )


def _look(host: str, address: str, port: int) -> Any:
    """The certificate that is presented, believed or not; None if there is none to be had."""
    from cryptography import x509

    try:
        _, presented = _shake_hands(host, address, port, _believing(), hear=False)
    except OSError:
        return None
    return x509.load_der_x509_certificate(presented) if presented else None


def _names(certificate: Any) -> str:
    from cryptography import x509

    if certificate is None:
        return ""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        return ""
    names = [str(name.value) for name in extension.value]
    return f", but for {', '.join(names[:5])}"


def _why_no_tls(error: OSError, host: str, port: int, certificate: Path | None) -> str:
    reason = str(getattr(error, "reason", "") or "")
    # A refused certificate is an alert, or with gRPC's servers no more than a closed connection.
    if isinstance(error, _HungUp) or ("CERTIFICATE" in reason and "ALERT" in reason):
        if certificate is None:
            return (
                "The server hangs up: it wants a certificate of this device's own, so give "
                "--ssl-certfile and --ssl-keyfile."
            )
        return (
            f"The server hangs up on this device's certificate {certificate}: it is out of date, or "
            "not signed by the CA that the server trusts."
        )
    if isinstance(error, ssl.SSLError | ConnectionError):
        return (
            f"What listens at {host}:{port} does not speak TLS ({reason or error}): it is no fedkit "
            "server, or one that was started with --insecure."
        )
    return f"The TLS handshake with {host}:{port} failed: {error.strerror or error}."


def _is_local(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
