"""A private authority and the certificates that it signs.

A device draws its key itself and sends only a request; signing and renewing need nothing secret of
the device's. What a request asks for beyond its name is ignored: whoever signs says what it is for.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedkit.durable import make_folder, write_whole
from fedkit.errors import FedkitError, UsageError
from fedkit.security.pem import (
    check_name,
    expiry,
    fingerprint,
    name_of,
    parse_key,
    read_certificate,
    read_file,
    read_request,
)

AUTHORITY_DAYS = 3650
DAYS = 365
# A device without a clock of its own may be behind.
BACKDATED = timedelta(days=1)
_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9-]+)*")


def make_authority(
    folder: Path, name: str, hosts: Sequence[str], days: int = DAYS
) -> x509.Certificate:
    """Make an authority (``ca.key``, ``ca.pem``) and the server's key and certificate beside it.

    Args:
        folder: where they go.
        name: what the authority is called.
        hosts: DNS names and IP addresses under which clients reach the server.
        days: how long the server's certificate holds; the authority's holds for ten years.

    Returns:
        The server's certificate.

    Raises:
        UsageError: a name that can't be one, or no host.
        FedkitError: there is an authority already, or the folder can't be written.
    """
    check_name(name)
    if not hosts:
        raise UsageError("A server's certificate needs the names that clients dial: give --host.")
    names = _host_names(hosts)
    make_folder(folder)
    for file in ("ca.key", "ca.pem", "server.key", "server.pem"):
        _refuse_existing(folder / file)
    key = _new_key(folder / "ca.key")
    # The organisation tells it from a device of the same name.
    organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "fedkit authority")
    subject = x509.Name([organisation, *_subject(name)])
    builder = _builder(subject, key.public_key(), subject, _days(AUTHORITY_DAYS))
    authority = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_certificate(folder / "ca.pem", authority)
    server_key = _new_key(folder / "server.key")
    server = _issue(authority, key, _subject("server"), server_key.public_key(), names, _days(days))
    write_certificate(folder / "server.pem", server)
    return server


def make_request(folder: Path, name: str) -> Path:
    """Draw a device's key (``NAME.key``) and write its request (``NAME.csr``); returns the request.

    Raises:
        UsageError: a name that can't be one.
        FedkitError: the device has a key already, or the folder can't be written.
    """
    check_name(name)
    make_folder(folder)
    request = folder / f"{name}.csr"
    _refuse_existing(folder / f"{name}.key")
    _refuse_existing(request)
    key = _new_key(folder / f"{name}.key")
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(name))
    signed = builder.sign(key, hashes.SHA256())
    write_whole(request, [signed.public_bytes(serialization.Encoding.PEM)])
    return request


def sign(
    authority: Path, request: Path, out: Path, days: int = DAYS, hosts: Sequence[str] = ()
) -> x509.Certificate:
    """Sign a request: for a client, or with ``hosts`` for a server under these names.

    Args:
        authority: the folder with ``ca.key`` and ``ca.pem``.
        request: the request's file; nothing in it is trusted but the key that signed it.
        out: where the certificate goes.
        days: how long it holds.
        hosts: DNS names and IP addresses, if it is a server's.

    Raises:
        UsageError: no such files, or the request is not to be signed.
        FedkitError: ``out`` exists, or can't be written.
    """
    names = _host_names(hosts) if hosts else None
    certificate, key = _load_authority(authority)
    asked = read_request(request)
    _refuse_existing(out, "renew that with `fedkit certs renew`, or choose another --out")
    public = asked.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    until = _days(days)
    signed = _issue(certificate, key, _subject(name_of(asked)), public, names, until)
    write_certificate(out, signed)
    return signed


def renew(authority: Path, file: Path, out: Path, days: int | None = None) -> x509.Certificate:
    """Sign a certificate of this authority again: the same key, names and purpose, new dates.

    Args:
        authority: the folder with ``ca.key`` and ``ca.pem``.
        file: the certificate; the authority's own can be renewed, too.
        out: where the new one goes; may be ``file``.
        days: how long it holds; None: a year, the authority's ten.

    Raises:
        UsageError: no such files, or another authority's certificate.
        FedkitError: ``out`` is something else, or can't be written.
    """
    certificate, key = _load_authority(authority)
    old = read_certificate(file)
    try:
        old.verify_directly_issued_by(certificate)
    except (ValueError, TypeError, InvalidSignature):
        raise UsageError(
            f"{file} was not signed by the authority in {authority}: renew it where it was signed."
        ) from None
    if out.exists() and fingerprint(read_certificate(out).public_key()) != fingerprint(
        old.public_key()
    ):
        raise FedkitError(f"{out} is another key's certificate: choose another --out.")
    own = fingerprint(old.public_key()) == fingerprint(certificate.public_key())
    until = _days(days if days is not None else AUTHORITY_DAYS if own else DAYS)
    if not own:
        _check_within(certificate, until)
    builder = _dated(old.subject, old.public_key(), certificate.subject, until)
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    renewed = builder.sign(key, hashes.SHA256())
    write_certificate(out, renewed)
    return renewed


def write_certificate(file: Path, certificate: x509.Certificate) -> None:
    """Write it whole, in PEM form."""
    write_whole(file, [certificate.public_bytes(serialization.Encoding.PEM)])


def _issue(
    authority: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    subject: x509.Name,
    public: ec.EllipticCurvePublicKey,
    hosts: list[x509.GeneralName] | None,
    until: datetime,
) -> x509.Certificate:
    _check_within(authority, until)
    use = ExtendedKeyUsageOID.CLIENT_AUTH if hosts is None else ExtendedKeyUsageOID.SERVER_AUTH
    issuer_key = key.public_key()
    builder = (
        _builder(subject, public, authority.subject, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False
        )
    )
    if hosts is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    return builder.sign(key, hashes.SHA256())


def _builder(
    subject: x509.Name, public: ec.EllipticCurvePublicKey, issuer: x509.Name, until: datetime
) -> x509.CertificateBuilder:
    identifier = x509.SubjectKeyIdentifier.from_public_key(public)
    return _dated(subject, public, issuer, until).add_extension(identifier, critical=False)


def _dated(
    subject: x509.Name, public: CertificatePublicKeyTypes, issuer: x509.Name, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - BACKDATED)
        .not_valid_after(until)
    )


def _days(days: int) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)


def _check_within(authority: x509.Certificate, until: datetime) -> None:
    if until > expiry(authority):
        raise UsageError(
            f"The authority itself ends on {expiry(authority):%Y-%m-%d}: choose fewer --days, or "
            "renew its ca.pem first."
        )


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            if not _HOST.fullmatch(host):
                raise UsageError(
                    "--host takes a DNS name or an IP address without a port, as in "
                    f"fl.example.org or 10.0.0.5, not {host!a}."
                ) from None
            names.append(x509.DNSName(host.lower()))
    return names


def _new_key(file: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write_whole(file, [pem], mode=0o600)
    return key


def _load_authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    missing = [file for file in ("ca.key", "ca.pem") if not (folder / file).exists()]
    if missing:
        raise UsageError(
            f"There is no authority in {folder} ({missing[0]} is missing): give its folder with "
            "--dir, or make one with `fedkit certs init`."
        )
    certificate = read_certificate(folder / "ca.pem")
    key = parse_key(read_file(folder / "ca.key", "key"), folder / "ca.key")
    if not isinstance(key, ec.EllipticCurvePrivateKey) or fingerprint(
        key.public_key()
    ) != fingerprint(certificate.public_key()):
        raise UsageError(f"ca.key and ca.pem in {folder} do not belong together.")
    return certificate, key


def _refuse_existing(file: Path, instead: str = "move it aside, or choose another --dir") -> None:
    # A link to nowhere is somebody's, too.
    if file.exists() or file.is_symlink():
        raise FedkitError(f"{file} exists already and is not overwritten: {instead}.")
