"""``fedkit health``."""

from __future__ import annotations

from typing import Any

import typer

from fedkit.cli import terminal
from fedkit.cli.options import LOCAL_SERVER, Server, checked_address, with_settings
from fedkit.errors import FedkitError
from fedkit.security.settings import ClientSecurity

WAIT_S = 5.0
EXAMPLES = """\b
Examples:
  fedkit health
  fedkit health --server localhost:8090 --root-certificates certs/ca.pem
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EXAMPLES, short_help="Tell whether a server serves.")(health)


@with_settings(ClientSecurity)
def health(server: Server = LOCAL_SERVER, *, settings: dict[str, Any]) -> None:
    """Ask a server, by gRPC's health checking protocol, whether it serves; exit code 1 if not."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from fedkit.link.channel import client_options
    from fedkit.link.services import SERVICE
    from fedkit.security.credentials import channel_credentials, explain_tls
    from fedkit.security.settings import check_client
    from fedkit.settings import build

    security = build(ClientSecurity, settings)
    check_client(checked_address(server), security)
    credentials, options = channel_credentials(server, security), client_options(server)
    with (
        grpc.insecure_channel(server, options=options)
        if credentials is None
        else grpc.secure_channel(server, credentials, options=options)
    ) as channel:
        # Its annotations do not know the methods that it makes itself.
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(
                health_pb2.HealthCheckRequest(service=SERVICE), timeout=WAIT_S, wait_for_ready=False
            )
        except grpc.RpcError as error:
            details = error.details() or ""
            raise FedkitError(
                explain_tls(details, server, security)
                or f"No server answers at {server}: {error.code().name}, {details}."
            ) from error
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise FedkitError(f"The server at {server} says {status}.")
    if not terminal.quiet:
        print(status)
