"""``fedkit doctor``."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from fedkit.cli.findings import tell
from fedkit.cli.options import (
    LOCAL_SERVER,
    Format,
    Server,
    checked_address,
    wants_json,
    with_settings,
)
from fedkit.errors import plain
from fedkit.link.reach import (
    FAIL,
    OK,
    WARNING,
    Finding,
    find_name,
    find_plaintext,
    find_port,
    find_tls,
)
from fedkit.security.settings import ClientSecurity
from fedkit.settings import DataSettings

CLOCK_S = 30.0
EXAMPLES = """\b
Examples:
  fedkit doctor
  fedkit doctor --server fl.example.org:8090 --root-certificates ca.pem --data-root ~/data
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EXAMPLES, short_help="Tell what keeps a device from taking part.")(doctor)


@with_settings(ClientSecurity, DataSettings)
def doctor(
    server: Server = LOCAL_SERVER,
    device: Annotated[
        str,
        typer.Option(
            help="Where it would compute: auto, cpu, cuda, cuda:I or mps.  [default: auto]",
            show_default=False,
        ),
    ] = "auto",
    state_dir: Annotated[
        Path,
        typer.Option(
            help="Where it would keep its model.  [default: fedkit-state]", show_default=False
        ),
    ] = Path("fedkit-state"),
    format: Format = "text",
    *,
    settings: dict[str, Any],
) -> None:
    """Examine the way to a server, and this device: one line each; exit code 1 if anything fails."""
    from fedkit.security.settings import check_client
    from fedkit.settings import build

    as_json = wants_json(format)
    host, port = _split(server)
    security = build(ClientSecurity, settings)
    check_client(server, security)
    sources = build(DataSettings, settings)
    found = _examine(server, host, port, security, device, state_dir, sources)
    tell(found, {"server": server}, width=11, as_json=as_json)


def _examine(
    server: str,
    host: str,
    port: int,
    security: ClientSecurity,
    device: str,
    state_dir: Path,
    sources: DataSettings,
) -> Iterator[Finding]:
    welcome = yield from _reach(server, host, port, security)
    from fedkit.engine.examine import find_data, find_device, find_memory, find_state

    yield find_state(state_dir)
    yield find_memory()
    yield find_device(device)
    run_config = (welcome or {}).get("run_config")
    if welcome is not None and isinstance(run_config, dict):
        digest = welcome.get("public_digest")
        yield find_data(run_config, digest if isinstance(digest, str) else None, sources)


def _reach(
    server: str, host: str, port: int, security: ClientSecurity
) -> Generator[Finding, None, dict[str, Any] | None]:
    """Everything up to the server's welcome, which is returned; None where the way ends before."""
    from fedkit.security.settings import uses_tls

    finding, addresses = find_name(host, port)
    yield finding
    if not addresses:
        return None
    finding, address = find_port(addresses, port)
    yield finding
    if address is None:
        return None
    if uses_tls(server, security):
        paths = (security.root_certificates, security.ssl_certfile, security.ssl_keyfile)
        authority, certificate, key = (Path(path) if path else None for path in paths)
        finding = find_tls(
            host, address, port, authority=authority, certificate=certificate, key=key
        )
    else:
        finding = find_plaintext(host, address, port)
    yield finding
    return None if finding.status == FAIL else (yield from _visit(server, security))


def _visit(
    server: str, security: ClientSecurity
) -> Generator[Finding, None, dict[str, Any] | None]:
    import grpc

    from fedkit.link.channel import client_options
    from fedkit.link.doctor import Visit
    from fedkit.link.frames import FrameError
    from fedkit.security.credentials import channel_credentials
    from fedkit.security.settings import resolve_token

    token, options = resolve_token(security), client_options(server)
    credentials = channel_credentials(server, security)
    with (
        grpc.insecure_channel(server, options=options)
        if credentials is None
        else grpc.secure_channel(server, credentials, options=options)
    ) as channel:
        visit = Visit(channel)
        try:
            welcome = visit.hello({"token": token} if token else {})
            yield Finding("server", OK, f"{server} is a fedkit server{_federation(welcome)}")
            yield _token(token)
            yield _version(welcome)
            yield from _measure(visit)
            return welcome
        except grpc.RpcError as error:
            yield _refusal(error, server, security)
        except FrameError as error:
            yield Finding("server", FAIL, f"{server} answered nonsense: {error}.")
        finally:
            visit.close()
    return None


def _measure(visit: Any) -> Iterator[Finding]:
    round_trip, ahead = visit.pings()
    yield _clock(ahead)
    milliseconds = 1000 * round_trip
    yield Finding("round trip", OK, f"{milliseconds:.1f} ms", {"seconds": round_trip})
    up, down = visit.bandwidth(up=True), visit.bandwidth(up=False)
    text = f"{8 * up / 1e6:.1f} Mbit/s up, {8 * down / 1e6:.1f} Mbit/s down"
    yield Finding("bandwidth", OK, text, {"up_bytes_per_s": up, "down_bytes_per_s": down})


def _clock(ahead: float) -> Finding:
    values = {"server_ahead_s": ahead}
    if abs(ahead) < 1:
        return Finding("clock", OK, "it agrees with the server's to the second", values)
    where = "behind" if ahead > 0 else "ahead of"
    text = f"this device's is {abs(ahead):.0f} s {where} the server's"
    if abs(ahead) <= CLOCK_S:
        return Finding("clock", OK, text, values)
    return Finding("clock", WARNING, f"{text}: set it, certificates are judged by it.", values)


def _token(token: str | None) -> Finding:
    if token is None:
        return Finding("token", OK, "none was asked for", {"token": False})
    return Finding("token", OK, "this device is let in with its token", {"token": True})


def _version(welcome: dict[str, Any]) -> Finding:
    from fedkit import __version__
    from fedkit.link.frames import PROTOCOL

    version, protocol = welcome.get("version"), welcome.get("protocol")
    values = {"server_version": version, "server_protocol": protocol}
    if (version, protocol) == (__version__, PROTOCOL):
        text = f"both run fedkit {version}, protocol {protocol}"
        return Finding("version", OK, text, values)
    text = (
        f"The server runs fedkit {version} (protocol {protocol}), this device {__version__} "
        f"({PROTOCOL}): install the same version on both."
    )
    return Finding("version", FAIL, text, values)


def _federation(welcome: dict[str, Any]) -> str:
    config = welcome.get("run_config")
    if isinstance(welcome.get("app"), str):
        return f": the Flower App {plain(welcome['app'])}"
    if not isinstance(config, dict):
        return ""
    return f": {config.get('strategy')} on {config.get('dataset')}, {config.get('rounds')} rounds"


def _refusal(error: Any, server: str, security: ClientSecurity) -> Finding:
    import grpc

    from fedkit.security.credentials import explain_tls

    code, details = error.code(), error.details() or ""
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return Finding("token", FAIL, details)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        text = (
            f"What answers at {server} speaks gRPC and is no fedkit server, or one of an older "
            "version: check --server."
        )
    elif code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL):
        text = explain_tls(details, server, security) or (
            f"What listens at {server} does not speak gRPC: check --server."
        )
    else:
        text = f"The server broke off the examination: {details}"
    return Finding("server", FAIL, text)


def _split(server: str) -> tuple[str, int]:
    host, _, port = checked_address(server).rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)
