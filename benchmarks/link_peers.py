"""The processes of ``link.py``: one server, or a few clients, each driven by lines of JSON.

python benchmarks/link_peers.py server floor-aio|floor-sync|link|grid SIZE [--whole] [--tls FOLDER]
python benchmarks/link_peers.py clients floor|link|grid ADDRESS COUNT SIZE [--loop] [--tls FOLDER]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def memory_of(pid: int) -> dict[str, int]:
    """Resident bytes of a process, now (``VmRSS``) and at most so far (``VmHWM``)."""
    lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def state() -> dict[str, Any]:
    """What this process has used."""
    return {"cpu": time.process_time(), **memory_of(os.getpid())}


def serve(given: argparse.Namespace) -> None:
    """Listen, then do what each line of standard input asks."""
    server = make_server(given)
    say({"address": server.listen()})
    for line in sys.stdin:
        asked = json.loads(line)
        seconds: list[float] = []
        if "wait_for" in asked:
            until = time.monotonic() + 120
            while server.count() < asked["wait_for"]:
                if time.monotonic() > until:
                    raise SystemExit(f"only {server.count()} clients came")
                time.sleep(0.02)
        elif "rounds" in asked:
            seconds = server.rounds(asked["rounds"])
        say({"seconds": seconds, **state()})


def make_server(given: argparse.Namespace) -> Any:
    """The server of that kind; only its own modules are imported."""
    if given.kind.startswith("floor"):
        import link_floor

        floor = link_floor.AioServer if given.kind == "floor-aio" else link_floor.SyncServer
        return floor(given.size, given.tls)
    import link_fedkit

    link = link_fedkit.Link if given.kind == "link" else link_fedkit.WholeGrid
    return link(given.size, given.tls, given.whole)


def dial(given: argparse.Namespace) -> None:
    """Some clients, on threads of their own or on one event loop, until standard input ends."""
    one = make_client(given)
    if given.loop:
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        for _ in range(given.count):
            asyncio.run_coroutine_threadsafe(one(), loop)
    else:
        for _ in range(given.count):
            threading.Thread(target=one, daemon=True).start()
    say(state())
    for _ in sys.stdin:
        say(state())


def make_client(given: argparse.Namespace) -> Callable[[], Any]:
    """What one client does."""
    if given.kind == "floor":
        import link_floor

        floor: Any = link_floor.aio_client if given.loop else link_floor.client
        return lambda: floor(given.address, given.size, given.tls)
    import link_fedkit

    work = link_fedkit.echo
    if given.kind == "grid":
        from fedkit.flower import take_identity

        take_identity(2)
        work = link_fedkit.echo_message
    link: Any = link_fedkit.aio_client if given.loop else link_fedkit.client
    return lambda: link(given.address, work, given.tls)


def say(what: dict[str, Any]) -> None:
    """One line to whoever started this process."""
    print(json.dumps(what), flush=True)


def main() -> None:
    """A server or some clients."""
    parser = argparse.ArgumentParser(description=__doc__)
    sides = parser.add_subparsers(dest="side", required=True)
    server = sides.add_parser("server")
    server.add_argument("kind", choices=("floor-aio", "floor-sync", "link", "grid"))
    clients = sides.add_parser("clients")
    clients.add_argument("kind", choices=("floor", "link", "grid"))
    clients.add_argument("address")
    clients.add_argument("count", type=int)
    clients.add_argument("--loop", action="store_true")
    for side in (server, clients):
        side.add_argument("size", type=int)
        side.add_argument("--tls", type=Path)
        side.add_argument("--whole", action="store_true", help="in one array, also a model's size")
    given = parser.parse_args()
    if given.side == "server":
        serve(given)
    else:
        dial(given)
    sys.stdout.flush()
    os._exit(0)  # streams are still open, and nobody waits for their ends


if __name__ == "__main__":
    main()
