"""Health checking and reflection, asked of a real server as any gRPC tool asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from fedkit.link.server import LinkServer
from fedkit.link.services import Services

LONG = 30.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@contextmanager
def serving(services: Services) -> Iterator[grpc.Channel]:
    link = LinkServer(lambda hello, node: {}, lambda node: None, services=[services.register])
    address = link.listen("127.0.0.1:0")
    try:
        with grpc.insecure_channel(address) as channel:
            yield channel
    finally:
        link.close("The test is over.")


def check(channel: grpc.Channel, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=LONG)
    return int(answer.status)


def test_a_server_is_healthy_until_it_closes():
    services = Services()
    with serving(services) as channel:
        assert [check(channel, name) for name in ("", "fedkit.Link")] == [SERVING, SERVING]
        services.closing()
        assert [check(channel, name) for name in ("", "fedkit.Link")] == [NOT_SERVING, NOT_SERVING]


def test_a_watcher_is_told_that_the_server_closes():
    services = Services()
    with serving(services) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watched = stub.Watch(health_pb2.HealthCheckRequest(service="fedkit.Link"), timeout=LONG)
        assert next(watched).status == SERVING
        services.closing()
        assert next(watched).status == NOT_SERVING
        watched.cancel()


def test_an_unknown_service_has_no_health():
    with serving(Services()) as channel, pytest.raises(grpc.RpcError) as caught:
        check(channel, "some.other.Service")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services():
    with serving(Services()) as channel:
        listed = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {"fedkit.Link", "grpc.health.v1.Health"} <= listed


def test_services_of_a_server_that_never_listened_can_be_closed():
    Services().closing()
