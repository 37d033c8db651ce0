"""``fedkit certs``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedkit.cli import terminal
from fedkit.errors import UsageError

if TYPE_CHECKING:
    from cryptography import x509

INIT = """\b
Examples:
  fedkit certs init --host fl.example.org --host 10.0.0.5
  fedkit certs init --host localhost --dir /etc/fedkit/certs
"""
REQUEST = """\b
Examples:
  fedkit certs request --name drone-1
"""
SIGN = """\b
Examples:
  fedkit certs sign drone-1.csr
  fedkit certs sign inbox/drone-1.csr --dir /etc/fedkit/certs --out drone-1.pem --days 90
  fedkit certs sign backup.csr --host backup.example.org
"""
RENEW = """\b
Examples:
  fedkit certs renew certs/server.pem
  fedkit certs renew drone-1.pem --days 90
"""
SHOW = """\b
Examples:
  fedkit certs show certs/server.pem
  fedkit certs show drone-1.csr
"""
Folder = Annotated[
    Path,
    typer.Option(
        "--dir", metavar="FOLDER", help="The folder.  [default: certs]", show_default=False
    ),
]
Days = Annotated[
    int | None,
    typer.Option(min=1, max=3650, metavar="DAYS", help="How long it holds.  [default: 365 days]"),
]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Where the certificate goes, if not beside.")
]
CERTS = Path("certs")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    group.command(epilog=INIT, short_help="Make an authority and the server's certificate.")(init)
    group.command(epilog=REQUEST, short_help="On a device: draw its key, write a request.")(request)
    group.command(epilog=SIGN, short_help="Sign a device's request.")(sign)
    group.command(epilog=RENEW, short_help="Give a certificate new dates.")(renew)
    group.command(epilog=SHOW, short_help="Tell what a certificate or request holds.")(show)
    about = "Make, sign and renew the certificates of a private authority."
    app.add_typer(group, name="certs", help=about)


def init(
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="DNS name or IP address that clients dial; may be repeated."
        ),
    ] = None,
    dir: Folder = CERTS,
    name: Annotated[
        str,
        typer.Option(help="What the authority is called.  [default: fedkit]", show_default=False),
    ] = "fedkit",
    days: Days = None,
) -> None:
    """Make an authority, and a key and certificate for the server."""
    from fedkit.security.certs import DAYS, make_authority
    from fedkit.security.pem import expiry, hosts_of

    server = make_authority(dir, name, host or (), days or DAYS)
    _tell(
        f"The authority is in {dir}. ca.key signs for it: keep it, show it to nobody.",
        f"The server's certificate holds for {', '.join(hosts_of(server))}, "
        f"until {expiry(server):%Y-%m-%d}.",
        "",
        "Start the server with:",
        f"  fedkit server --listen 0.0.0.0:8090 {_flags('--ssl-ca-certfile', dir / 'ca.pem')} "
        f"{_flags('--ssl-certfile', dir / 'server.pem', '--ssl-keyfile', dir / 'server.key')}",
        "On each device:",
        "  fedkit certs request --name DEVICE",
    )


def request(
    name: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="What this device is called.")
    ] = None,
    dir: Folder = CERTS,
) -> None:
    """Draw this device's key, which never leaves it, and write a request for a certificate."""
    from fedkit.security.certs import make_request
    from fedkit.security.pem import fingerprint, read_request

    if name is None:
        raise UsageError("What is this device called? Give --name DEVICE, as in --name drone-1.")
    file = make_request(dir, name)
    _tell(
        f"This device's key is {dir / f'{name}.key'}: it stays here.",
        f"Send {file} to whoever keeps the authority. Its key's fingerprint, to compare:",
        f"  {fingerprint(read_request(file).public_key())}",
        "There:",
        f"  fedkit certs sign {_quote(file.name)}",
        f"Put the answer, {name}.pem and ca.pem, into {dir}, then:",
        f"  {_client(dir, name)}",
    )


def sign(
    file: Annotated[Path, typer.Argument(metavar="FILE.csr", help="The request.")],
    dir: Folder = CERTS,
    out: Out = None,
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Sign it as a server's, for these names."),
    ] = None,
    days: Days = None,
) -> None:
    """Sign a device's request with the authority in --dir."""
    from fedkit.security.certs import DAYS
    from fedkit.security.certs import sign as sign_request
    from fedkit.security.pem import name_of

    out = out or file.with_suffix(".pem")
    certificate = sign_request(dir, file, out, days or DAYS, host or ())
    _describe(certificate)
    _tell("", f"Send {out} and {dir / 'ca.pem'} back to it; neither is secret.")
    if not host:
        _tell("It joins with:", f"  {_client(CERTS, name_of(certificate))}")


def renew(
    file: Annotated[Path, typer.Argument(metavar="FILE.pem", help="The certificate.")],
    dir: Folder = CERTS,
    out: Out = None,
    days: Days = None,
) -> None:
    """Give a certificate of the authority in --dir new dates: same key, same names."""
    from fedkit.security.certs import renew as renew_certificate

    _describe(renew_certificate(dir, file, out or file, days))
    _tell(
        "",
        f"{out or file} is the new one. Move it over the old one where that is used (mv, not cp: it "
        "must never be there by half); nothing needs to be restarted.",
    )


def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A certificate or a request.")],
) -> None:
    """Tell a certificate's name, purpose, fingerprint and end."""
    from fedkit.security.pem import (
        fingerprint,
        name_of,
        read_certificate,
        read_file,
        read_request,
        warning,
    )

    if b"CERTIFICATE REQUEST" in read_file(file, "certificate"):
        asked = read_request(file)
        _tell(
            f"name         {name_of(asked)}",
            "for          nothing yet: it is a request",
            f"key          {fingerprint(asked.public_key())}",
        )
        return
    certificate = read_certificate(file)
    _describe(certificate)
    sentence = warning(certificate, file)
    if sentence:
        _tell("", sentence)


def _describe(certificate: x509.Certificate) -> None:
    from cryptography.hazmat.primitives import hashes

    from fedkit.security.pem import expiry, fingerprint, name_of, purpose

    _tell(
        f"name         {_printable(name_of(certificate))}",
        f"for          {_printable(purpose(certificate))}",
        f"until        {expiry(certificate):%Y-%m-%d %H:%M} UTC",
        f"key          {fingerprint(certificate.public_key())}",
        f"fingerprint  {certificate.fingerprint(hashes.SHA256()).hex()}",
    )


def _client(folder: Path, name: str) -> str:
    return (
        f"fedkit client --data-shard auto --server HOST:8090 "
        f"{_flags('--root-certificates', folder / 'ca.pem')} "
        f"{_flags('--ssl-certfile', folder / f'{name}.pem', '--ssl-keyfile', folder / f'{name}.key')}"
    )


def _flags(*words: str | Path) -> str:
    return " ".join(_quote(word) for word in words)


def _quote(word: str | Path) -> str:
    return shlex.quote(str(word))


def _printable(text: str) -> str:
    # A certificate may be anybody's.
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _tell(*lines: str) -> None:
    if not terminal.quiet:
        print("\n".join(lines))
