"""What gRPC's own tools ask of any server: health checking, and which services there are."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc.aio

from fedkit.link.frames import METHOD

if TYPE_CHECKING:
    from grpc_health.v1.health import aio

SERVICE = METHOD.split("/")[1]


class Services:
    """The health and reflection services of one server; answered without a token."""

    def __init__(self) -> None:
        """Services of a server that does not listen yet."""
        self._health: aio.HealthServicer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begun: asyncio.Task[None] | None = None

    def register(self, server: grpc.aio.Server) -> None:
        """Add both to ``server`` before it starts; called on its loop. SERVING from here on."""
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection

        self._loop = asyncio.get_running_loop()
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        serving = health_pb2.HealthCheckResponse.SERVING
        self._begun = self._loop.create_task(self._health.set(SERVICE, serving))

    def closing(self) -> None:
        """Say NOT_SERVING from now on, so that nobody new is sent here; from any thread."""
        if self._health is None or self._loop is None:
            return
        shutdown = self._health.enter_graceful_shutdown()
        asyncio.run_coroutine_threadsafe(shutdown, self._loop).result()
