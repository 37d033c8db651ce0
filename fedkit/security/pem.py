"""Certificates, requests and keys in PEM files: read with suspicion, told in words."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import (
    PrivateKeyTypes,
    PublicKeyTypes,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedkit.errors import UsageError

WARN_DAYS = 30
MAX_FILE_BYTES = 1 << 16
E = TypeVar("E", bound=x509.ExtensionType)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def read_certificate(file: Path) -> x509.Certificate:
    """The first certificate of a PEM file; ``UsageError`` if there is none."""
    return parse_certificate(read_file(file, "certificate"), file)


def parse_certificate(data: bytes, file: Path) -> x509.Certificate:
    """The first certificate in ``data``, read from ``file``; ``UsageError`` if there is none."""
    try:
        return x509.load_pem_x509_certificates(data)[0]
    except (ValueError, x509.InvalidVersion):
        raise UsageError(f"{file} is no certificate in PEM form.") from None


def read_request(file: Path) -> x509.CertificateSigningRequest:
    """A request whose signature, key and name are as `fedkit certs request` makes them.

    Raises:
        UsageError: they are not; the sentence says what is wrong.
    """
    try:
        request = x509.load_pem_x509_csr(read_file(file, "request"))
        valid, public = request.is_signature_valid, request.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise UsageError(f"{file} is no certificate request in PEM form.") from None
    if not valid:
        raise UsageError(f"{file} is damaged or forged: its signature is wrong.")
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp256r1":
        raise UsageError(f"The key of {file} is not EC P-256: use `fedkit certs request`.")
    check_name(name_of(request), f"the name in {file}")
    return request


def name_of(signed: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The common name, or nothing; as it stands there, so not to be trusted in a request."""
    found = signed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else ""


def purpose(certificate: x509.Certificate) -> str:
    """What a certificate is for, in words."""
    basic = _extension(certificate, x509.BasicConstraints)
    if basic is not None and basic.ca:
        return "an authority: signs certificates"
    uses = _extension(certificate, x509.ExtendedKeyUsage)
    if uses is None:
        return "anything: it does not say"
    if ExtendedKeyUsageOID.SERVER_AUTH in uses:
        return f"a server: {', '.join(hosts_of(certificate)) or 'under no name'}"
    return "a client" if ExtendedKeyUsageOID.CLIENT_AUTH in uses else "something else"


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The DNS names and IP addresses that a server's certificate holds for."""
    names = _extension(certificate, x509.SubjectAlternativeName)
    return [] if names is None else [str(name.value) for name in names]


def fingerprint(key: PublicKeyTypes) -> str:
    """SHA-256 of a public key: what two people compare to know that they mean the same one."""
    data = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(data).hexdigest()


def expiry(certificate: x509.Certificate) -> datetime:
    """When it ends (UTC)."""
    return certificate.not_valid_after_utc


def warning(certificate: x509.Certificate, file: Path, now: datetime | None = None) -> str | None:
    """A sentence if it has ended or ends within 30 days, else None."""
    ends = expiry(certificate)
    left = ends - (now or datetime.now(UTC))
    renewing = f"renew it with `fedkit certs renew {file.name}` where it was signed"
    if left <= timedelta(0):
        return f"The certificate {file} ended on {ends:%Y-%m-%d}: {renewing}."
    if left <= timedelta(days=WARN_DAYS):
        days = "1 day" if left.days == 1 else f"{left.days} days"
        return f"The certificate {file} ends in {days}, on {ends:%Y-%m-%d}: {renewing}."
    return None


def check_name(name: str, what: str = "a name") -> None:
    """Raise ``UsageError`` unless it is a plain word: it becomes a file's name and is printed."""
    if not _NAME.fullmatch(name) or name == "ca":
        raise UsageError(
            f"{what[0].upper()}{what[1:]} must be up to 64 letters, digits, dots, dashes and "
            f"underscores that begin with a letter or digit, and not ca: {name[:64]!a} is not."
        )


def parse_key(data: bytes, file: Path) -> PrivateKeyTypes:
    """The private key in ``data``, read from ``file``; ``UsageError`` if there is none."""
    try:
        return serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UsageError(
            f"{file} is no private key in PEM form that opens without a password."
        ) from None


def read_file(file: Path, what: str) -> bytes:
    """A small file; ``UsageError`` if it is not there, can't be read, or is no small one."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"There is no {what} {file}.") from None
    except OSError as error:
        raise UsageError(f"{file} can't be read: {error.strerror}.") from error
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{file} is too large for a {what}.")
    return data


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise UsageError(f"The certificate's extensions can't be read: {error}.") from None
