"""What is asked for of each side's security, and whether it is enough for the address.

TLS by default: only on loopback, where nobody else listens, plaintext needs no word.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from fedkit.errors import UsageError
from fedkit.settings import setting

TOKEN_VARIABLE = "FEDKIT_TOKEN"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerSecurity:
    """How the server is secured: TLS, whose certificates it demands, which tokens."""

    insecure: bool = setting(
        False, "listen without encryption on an address that other machines can reach"
    )
    ssl_ca_certfile: str = setting(
        "", "demand of each client a certificate that this authority signed (mTLS)", unit="file"
    )
    ssl_certfile: str = setting("", "the server's certificate, in PEM form", unit="file")
    ssl_keyfile: str = setting("", "the key of the server's certificate", unit="file")
    tokens: str = setting(
        "", "let in only clients with a token of this file: see `fedkit token`", unit="file"
    )


@dataclass(frozen=True)
class ClientSecurity:
    """How a client is secured: whom it believes, and how it shows who it is."""

    insecure: bool = setting(False, "talk without encryption to a server on another machine")
    root_certificates: str = setting(
        "",
        "the authority that signed the server's certificate (default: those that everybody trusts)",
        unit="file",
    )
    ssl_certfile: str = setting(
        "", "this device's certificate, where the server asks for one", unit="file"
    )
    ssl_keyfile: str = setting("", "the key of this device's certificate", unit="file")
    token_file: str = setting(
        "", "the file that holds the join token (or: the variable FEDKIT_TOKEN)", unit="file"
    )


def check_server(listen: str, security: ServerSecurity) -> None:
    """Whether a server may listen so; warns of what is open.

    Raises:
        UsageError: no TLS where it is needed, settings that contradict each other, or no such file.
    """
    _check_pair(security.ssl_certfile, security.ssl_keyfile)
    if security.ssl_ca_certfile and not security.ssl_certfile:
        raise UsageError(
            "--ssl-ca-certfile asks clients for certificates, which needs TLS: give the server's own "
            "with --ssl-certfile and --ssl-keyfile."
        )
    if security.insecure and security.ssl_certfile:
        raise UsageError("--insecure and --ssl-certfile contradict each other: give one of them.")
    _check_files(security, ("ssl_ca_certfile", "ssl_certfile", "ssl_keyfile", "tokens"))
    if security.ssl_certfile or is_loopback(listen):
        return
    if not security.insecure:
        raise UsageError(
            f"Other machines can reach {listen}, so it needs TLS: make certificates with `fedkit "
            "certs init --host NAME`, which says how to go on, or give --insecure to do without "
            "encryption."
        )
    _log.warning(
        "Warning: listening on %s without encryption: whoever is on the way can read and change what "
        "travels%s.",
        listen,
        ", tokens included" if security.tokens else "",
    )


def check_client(server: str, security: ClientSecurity) -> None:
    """Whether a client may talk to ``server`` so; warns of what is open.

    Raises:
        UsageError: settings that contradict each other, or no such file.
    """
    _check_pair(security.ssl_certfile, security.ssl_keyfile)
    wants_tls = bool(security.root_certificates or security.ssl_certfile)
    if security.insecure and wants_tls:
        raise UsageError(
            "--insecure contradicts --root-certificates and --ssl-certfile: give one or the other."
        )
    _check_files(security, ("root_certificates", "ssl_certfile", "ssl_keyfile", "token_file"))
    if security.insecure and not is_loopback(server):
        _log.warning(
            "Warning: talking to %s without encryption: whoever is on the way can read and change "
            "what travels, the device's secret and its token included.",
            server,
        )


def uses_tls(server: str, security: ClientSecurity) -> bool:
    """Whether a client dials ``server`` with TLS: always, but for loopback and ``--insecure``."""
    if security.root_certificates or security.ssl_certfile:
        return True
    return not (security.insecure or is_loopback(server))


def resolve_token(security: ClientSecurity) -> str | None:
    """The join token, from its file or else the environment; None if there is none.

    Raises:
        UsageError: the file can't be read, or what is there is no token.
    """
    from fedkit.security.tokens import check_shape

    if security.token_file:
        file = Path(security.token_file)
        try:
            with file.open("rb") as opened:
                text = opened.read(4096).decode()
        except (OSError, UnicodeDecodeError):
            raise UsageError(f"The token file {file} can't be read.") from None
        warn_if_open(file)
        return check_shape(text, f"The token file {file}")
    text = os.environ.get(TOKEN_VARIABLE, "")
    return check_shape(text, f"The variable {TOKEN_VARIABLE}") if text.strip() else None


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT is this machine's own 127.0.0.0/8, ::1 or localhost, and nothing else."""
    host = address.rpartition(":")[0]
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def warn_if_open(file: Path) -> None:
    """Warn if others on this machine can read a secret's file."""
    if file.stat().st_mode & 0o077:
        _log.warning("Warning: others on this machine can read %s: `chmod 600 %s`.", file, file)


def _check_pair(certfile: str, keyfile: str) -> None:
    if bool(certfile) != bool(keyfile):
        given, missing = (
            ("--ssl-certfile", "--ssl-keyfile") if certfile else ("--ssl-keyfile", "--ssl-certfile")
        )
        raise UsageError(f"{given} needs {missing} beside it.")


def _check_files(security: ServerSecurity | ClientSecurity, names: tuple[str, ...]) -> None:
    for name in names:
        file = getattr(security, name)
        if not file:
            continue
        flag = f"--{name.replace('_', '-')}"
        if not Path(file).is_file():
            raise UsageError(f"There is no file {file} ({flag}).")
        if not os.access(file, os.R_OK):
            raise UsageError(f"The file {file} ({flag}) can't be read by this user.")
        if name in ("ssl_keyfile", "tokens"):
            warn_if_open(Path(file))
