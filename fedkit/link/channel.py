"""gRPC options of both sides: one liveness rule.

The link is alive while HTTP/2 pings are answered, which gRPC does on threads of its own: a client that
computes for an hour is not taken for dead, one that vanishes without a word is noticed in 30 seconds.
A ping every 10 seconds also keeps the mapping of a NAT or a mobile carrier's gateway open.
"""

from __future__ import annotations

from fedkit.link.frames import MAX_FRAME_BYTES

_COMMON = [
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    # On a line of 0.25 Mbit/s the answer to a ping waits longer than 10 seconds behind a model.
    ("grpc.keepalive_timeout_ms", 20_000),
    # Where a ping is answered late keepalive would otherwise wait a minute for it.
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # What a peer may send ahead of its reader. gRPC's own estimate grows to 16 MB a stream, most of the
    # memory that a server with large models needs; 2 MiB fill a line of 160 Mbit/s at 0.1 s round trip.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 2 << 20),
]
SERVER_OPTIONS = [
    *_COMMON,
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # Connections that never begin to speak, or have no stream, are not held for ever.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 60_000),
    # A client needs one stream; doctor and health checks a few more.
    ("grpc.max_concurrent_streams", 16),
    # Otherwise a second server on the same port starts too, and takes half of the clients.
    ("grpc.so_reuseport", 0),
]
LOOPBACK = ("127.", "localhost:", "[::1]:")


def client_options(address: str) -> list[tuple[str, int]]:
    """The options of a client that dials ``address``."""
    # gRPC would send loopback, too, through a proxy that the environment names.
    proxy = 0 if address.startswith(LOOPBACK) else 1
    return [
        *_COMMON,
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", proxy),
        # A connection of its own, also where one process holds several clients.
        ("grpc.use_local_subchannel_pool", 1),
        # How long a host that takes the call and says nothing is listened to: 20 s otherwise.
        ("grpc.min_reconnect_backoff_ms", 5_000),
    ]
