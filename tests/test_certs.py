"""A private authority: what it signs, what it refuses, and what nobody else can read."""

from __future__ import annotations

import os
import shlex
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from processes import fedkit

from fedkit.errors import FedkitError, UsageError
from fedkit.security import certs, pem

CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


@pytest.fixture
def authority(tmp_path):
    certs.make_authority(tmp_path / "ca", "fed", ["fl.example.org", "10.0.0.5", "::1"])
    return tmp_path / "ca"


@pytest.fixture
def device(tmp_path, authority):
    """A device's folder, with its request signed."""
    request = certs.make_request(tmp_path / "device", "drone-1")
    certs.sign(authority, request, tmp_path / "device" / "drone-1.pem")
    return tmp_path / "device"


def extension(certificate, kind):
    return certificate.extensions.get_extension_for_class(kind).value


def days_left(certificate):
    return (pem.expiry(certificate) - datetime.now(UTC)) / timedelta(days=1)


def public(file):
    return pem.fingerprint(pem.read_certificate(file).public_key())


def request_of(tmp_path, name="drone-1", key=None, **extra):
    """A request that may hold anything."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    for value in extra.get("extensions", ()):
        builder = builder.add_extension(value, critical=True)
    file = tmp_path / "asked.csr"
    signed = builder.sign(key, hashes.SHA256())
    file.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    return file


def test_the_authority_signs_and_nothing_else(authority):
    certificate = pem.read_certificate(authority / "ca.pem")
    assert extension(certificate, x509.BasicConstraints) == x509.BasicConstraints(True, 0)
    assert extension(certificate, x509.KeyUsage).key_cert_sign
    assert not extension(certificate, x509.KeyUsage).digital_signature
    assert days_left(certificate) == pytest.approx(3650, abs=1)
    assert certificate.signature_hash_algorithm.name == "sha256"
    assert certificate.public_key().curve.name == "secp256r1"
    assert pem.purpose(certificate).startswith("an authority")


def test_the_server_has_its_names_and_a_year(authority):
    certificate = pem.read_certificate(authority / "server.pem")
    certificate.verify_directly_issued_by(pem.read_certificate(authority / "ca.pem"))
    assert list(extension(certificate, x509.ExtendedKeyUsage)) == [SERVER]
    assert pem.hosts_of(certificate) == ["fl.example.org", "10.0.0.5", "::1"]
    assert not extension(certificate, x509.BasicConstraints).ca
    assert days_left(certificate) == pytest.approx(365, abs=1)


def test_a_device_is_a_client_and_nothing_else(device, authority):
    certificate = pem.read_certificate(device / "drone-1.pem")
    certificate.verify_directly_issued_by(pem.read_certificate(authority / "ca.pem"))
    assert list(extension(certificate, x509.ExtendedKeyUsage)) == [CLIENT]
    assert pem.name_of(certificate) == "drone-1" and pem.hosts_of(certificate) == []
    assert not extension(certificate, x509.BasicConstraints).ca


def test_the_devices_key_fits_and_stays_on_the_device(device, authority):
    key = pem.parse_key((device / "drone-1.key").read_bytes(), device / "drone-1.key")
    assert pem.fingerprint(key.public_key()) == public(device / "drone-1.pem")
    secret = (device / "drone-1.key").read_text().splitlines()[1]
    for file in [*authority.iterdir(), device / "drone-1.csr", device / "drone-1.pem"]:
        assert secret not in file.read_text()


def test_what_a_request_asks_for_is_ignored(tmp_path, authority):
    asked = [
        x509.BasicConstraints(ca=True, path_length=None),
        x509.ExtendedKeyUsage([SERVER]),
        x509.SubjectAlternativeName([x509.DNSName("fl.example.org")]),
    ]
    file = request_of(tmp_path, extensions=asked)
    signed = certs.sign(authority, file, tmp_path / "out.pem")
    assert not extension(signed, x509.BasicConstraints).ca
    assert list(extension(signed, x509.ExtendedKeyUsage)) == [CLIENT]
    assert pem.hosts_of(signed) == []


def test_whoever_signs_may_make_it_a_servers(tmp_path, authority):
    signed = certs.sign(
        authority, request_of(tmp_path, "backup"), tmp_path / "out.pem", hosts=["b.example.org"]
    )
    assert list(extension(signed, x509.ExtendedKeyUsage)) == [SERVER]
    assert pem.hosts_of(signed) == ["b.example.org"]


NAMES = ["../../etc/passwd", "a b", "a\x1b[2J", "", "ä", ".hidden", "-rf", "a" * 65, "a\nb", "ca"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_plain_word_is_refused(name, tmp_path, authority):
    with pytest.raises(UsageError) as raised:
        certs.make_request(tmp_path / "new", name)
    assert str(raised.value).isprintable()
    if 0 < len(name) <= 64:
        with pytest.raises(UsageError) as raised:
            certs.sign(authority, request_of(tmp_path, name), tmp_path / "out.pem")
        assert str(raised.value).isprintable()
        assert not (tmp_path / "out.pem").exists()


@pytest.mark.parametrize("host", ["", "a:80", "a b", "*.example.org", "-a", "a..b/c", "x" * 300])
def test_a_host_that_is_none_is_refused(host, tmp_path):
    with pytest.raises(UsageError):
        certs.make_authority(tmp_path / "ca", "fed", [host])
    assert not (tmp_path / "ca").exists()


def test_a_forged_request_is_refused(tmp_path, authority):
    file = request_of(tmp_path)
    der = x509.load_pem_x509_csr(file.read_bytes()).public_bytes(serialization.Encoding.DER)
    forged = x509.load_der_x509_csr(der.replace(b"drone-1", b"drone-2"))
    file.write_bytes(forged.public_bytes(serialization.Encoding.PEM))
    with pytest.raises(UsageError, match="signature is wrong"):
        certs.sign(authority, file, tmp_path / "out.pem")


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100, b"A" * 100_000])
def test_a_request_that_is_none_is_refused(content, tmp_path, authority):
    (tmp_path / "x.csr").write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.csr"):
        certs.sign(authority, tmp_path / "x.csr", tmp_path / "out.pem")


def test_a_weak_key_is_refused(tmp_path, authority):
    weak = rsa.generate_private_key(65537, 1024)
    with pytest.raises(UsageError, match="P-256"):
        certs.sign(authority, request_of(tmp_path, key=weak), tmp_path / "out.pem")


def test_nothing_is_overwritten(tmp_path, authority, device):
    before = {file: file.read_bytes() for file in [*authority.iterdir(), *device.iterdir()]}
    with pytest.raises(FedkitError, match=r"ca\.key exists already"):
        certs.make_authority(authority, "fed", ["a"])
    with pytest.raises(FedkitError, match=r"drone-1\.key exists already"):
        certs.make_request(device, "drone-1")
    with pytest.raises(FedkitError, match=r"drone-1\.pem exists already"):
        certs.sign(authority, device / "drone-1.csr", device / "drone-1.pem")
    with pytest.raises(FedkitError, match="another key"):
        certs.renew(authority, device / "drone-1.pem", authority / "server.pem")
    with pytest.raises(UsageError, match="no certificate"):
        certs.renew(authority, device / "drone-1.pem", authority / "ca.key")
    assert {file: file.read_bytes() for file in before} == before


def test_keys_are_secret_from_the_first_byte(tmp_path, monkeypatch):
    modes, real = {}, os.open

    def watched(path, *arguments):
        handle = real(path, *arguments)
        modes[Path(path).name] = stat.S_IMODE(os.fstat(handle).st_mode)
        return handle

    monkeypatch.setattr(os, "open", watched)
    before = os.umask(0)
    try:
        certs.make_authority(tmp_path / "ca", "fed", ["a"])
        certs.make_request(tmp_path / "ca", "drone-1")
    finally:
        os.umask(before)
    written = {name: mode for name, mode in modes.items() if ".key" in name}
    assert set(written.values()) == {0o600} and len(written) == 3
    for name in ("ca", "server", "drone-1"):
        assert stat.S_IMODE((tmp_path / "ca" / f"{name}.key").stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["server", "drone-1", "ca"])
def test_renewing_changes_the_dates_only(name, tmp_path, authority, device):
    file = (device if name == "drone-1" else authority) / f"{name}.pem"
    old = pem.read_certificate(file)
    new = certs.renew(authority, file, tmp_path / "new.pem", days=20)
    assert days_left(new) == pytest.approx(20, abs=1)
    assert new.serial_number != old.serial_number
    assert (new.subject, new.issuer) == (old.subject, old.issuer)
    assert pem.fingerprint(new.public_key()) == pem.fingerprint(old.public_key())
    assert list(new.extensions) == list(old.extensions)
    new.verify_directly_issued_by(pem.read_certificate(authority / "ca.pem"))
    assert pem.read_certificate(file) == old


def test_without_days_an_authority_is_renewed_for_ten_years(authority):
    assert days_left(certs.renew(authority, authority / "ca.pem", authority / "ca.pem")) > 3649


def test_a_device_may_be_called_as_its_authority(tmp_path, authority):
    signed = certs.sign(authority, request_of(tmp_path, "fed"), tmp_path / "out.pem")
    assert signed.subject != signed.issuer
    assert days_left(certs.renew(authority, tmp_path / "out.pem", tmp_path / "out.pem")) < 366


def test_an_ended_certificate_can_be_renewed(tmp_path, authority, monkeypatch):
    monkeypatch.setattr(certs, "BACKDATED", timedelta(days=9))
    file = tmp_path / "out.pem"
    certs.sign(authority, request_of(tmp_path), file, days=-2)
    assert "ended on" in pem.warning(pem.read_certificate(file), file)
    assert days_left(certs.renew(authority, file, file)) > 364


def test_another_authoritys_certificate_is_not_renewed(tmp_path, authority, device):
    certs.make_authority(tmp_path / "other", "fed", ["a"])
    with pytest.raises(UsageError, match="not signed by the authority"):
        certs.renew(tmp_path / "other", device / "drone-1.pem", device / "drone-1.pem")
    with pytest.raises(InvalidSignature):
        pem.read_certificate(device / "drone-1.pem").verify_directly_issued_by(
            pem.read_certificate(tmp_path / "other" / "ca.pem")
        )


def test_nothing_outlives_its_authority(tmp_path, authority):
    certs.renew(authority, authority / "ca.pem", authority / "ca.pem", days=100)
    for act in (
        lambda: certs.sign(authority, request_of(tmp_path), tmp_path / "out.pem"),
        lambda: certs.renew(authority, authority / "server.pem", authority / "server.pem"),
    ):
        with pytest.raises(UsageError, match="authority itself ends"):
            act()


def test_a_folder_without_an_authority_says_so(tmp_path, device):
    with pytest.raises(UsageError, match="no authority in"):
        certs.sign(tmp_path, device / "drone-1.csr", tmp_path / "out.pem")


def test_a_warning_comes_thirty_days_before_the_end(authority):
    file = authority / "server.pem"
    certificate = pem.read_certificate(file)
    ends = pem.expiry(certificate)
    assert pem.warning(certificate, file, ends - timedelta(days=30, seconds=1)) is None
    assert "ends in 29 days" in pem.warning(certificate, file, ends - timedelta(days=29, hours=1))
    assert "ends in 1 day," in pem.warning(certificate, file, ends - timedelta(days=1, hours=1))
    assert "ended on" in pem.warning(certificate, file, ends)
    assert "certs renew server.pem" in pem.warning(certificate, file, ends)


def test_the_commands_lead_from_one_to_the_next(tmp_path):
    """What each prints is what is typed next."""

    def run(command, folder):
        done = fedkit(*shlex.split(command), folder=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    server, phone = tmp_path / "server", tmp_path / "phone"
    server.mkdir(), phone.mkdir()
    told = run("certs init --host fl.example.org", server)
    line = next(line for line in told.splitlines() if line.startswith("  fedkit server"))
    assert "--ssl-ca-certfile certs/ca.pem" in line
    words = shlex.split(line)
    for flag in ("--ssl-ca-certfile", "--ssl-certfile", "--ssl-keyfile"):
        assert (server / words[words.index(flag) + 1]).exists()
    told = run("certs request --name phone-1", phone)
    (server / "phone-1.csr").write_bytes((phone / "certs" / "phone-1.csr").read_bytes())
    key = pem.fingerprint(pem.read_request(server / "phone-1.csr").public_key())
    assert key in told
    line = next(line for line in told.splitlines() if line.startswith("  fedkit certs sign"))
    signed = run(line.strip().removeprefix("fedkit "), server)
    assert key in signed and "a client" in signed
    for file in (server / "phone-1.pem", server / "certs" / "ca.pem"):
        (phone / "certs" / file.name).write_bytes(file.read_bytes())
    joins = next(line for line in told.splitlines() if line.startswith("  fedkit client"))
    assert joins in signed
    words = shlex.split(joins)
    for flag in ("--root-certificates", "--ssl-certfile", "--ssl-keyfile"):
        assert (phone / words[words.index(flag) + 1]).exists()
    assert "ends in" not in run("certs show phone-1.pem", server)
    run("certs renew phone-1.pem --days 20", server)
    assert "ends in 19 days" in run("certs show phone-1.pem", server)
    again = fedkit("certs", "init", "--host", "a", folder=server)
    assert again.returncode == 1 and "not overwritten" in again.stderr
