"""Measure: seconds a round on bad networks, beside what the bytes alone would need.

    PYTHONPATH=tests python -m network.measure      (as root; `make network-table`)

Two clients, each on a link of its own; a round sends a payload to each and the same bytes back. Beside
fedkit's link: the arithmetic (bytes / rate + one round trip), and the same bytes over bare TCP
connections on the same network, which is what TCP itself makes of delay and loss.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from processes import ENVIRONMENT

from network.namespaces import Conditions, Host, Network, why_not

CLIENTS = 2
PORT = 8090
# All rows but one: an office's or a home's uplink, and within what the user-space switch carries.
RATE_MBIT = 40.0
USUAL = Conditions(rate_mbit=RATE_MBIT)
ROWS = {
    "no delay, no loss": USUAL,
    "10 ms": replace(USUAL, delay_ms=10),
    "50 ms": replace(USUAL, delay_ms=50),
    "200 ms": replace(USUAL, delay_ms=200),
    "1% loss": replace(USUAL, loss_percent=1),
    "5% loss": replace(USUAL, loss_percent=5),
    "50 ms, 1% loss": replace(USUAL, delay_ms=50, loss_percent=1),
    "4 Mbit/s": Conditions(rate_mbit=4),
}
PAYLOADS = {"100 kB": (100_000, 10), "4 MB": (4_000_000, 3)}


def needed(size: int, conditions: Conditions) -> float:
    """Seconds that the bytes alone need there and back: bytes / rate each way, and one round trip."""
    return 2 * size * 8 / (conditions.rate_mbit * 1e6) + 2 * conditions.delay_ms / 1000


def measured(network: Network, over: str, size: int, rounds: int) -> list[float]:
    """Seconds of each round, over ``link`` or ``tcp``."""
    server, *clients = network.hosts
    address = f"{server.address}:{PORT}"
    answering = [_start(host, over, "answer", address, host.name) for host in clients]
    serving = _start(server, over, "serve", address, str(CLIENTS), str(size), str(rounds))
    try:
        said, _ = serving.communicate(timeout=600)
        seconds: list[float] = json.loads(said)
        return seconds
    finally:
        for process in (serving, *answering):
            process.kill()
            process.communicate()


def main() -> None:
    """Print the table."""
    reason = why_not()
    if reason is not None:
        raise SystemExit(reason)
    cli = argparse.ArgumentParser(description="seconds a round on bad networks")
    cli.add_argument("--only", choices=ROWS, help="one row")
    only = cli.parse_args().only
    with Network("server", *(f"client-{number}" for number in range(CLIENTS))) as network:
        shaped = "tc netem" if network.has_netem else "tests/network/delay.py"
        print(f"Delay and loss by {shaped}, rate by tc tbf; median (slowest) of the rounds.\n")
        print("| each link, each way | payload | bytes alone | bare TCP | fedkit's link | rounds |")
        print("|---|---|---|---|---|---|")
        for name in [only] if only else ROWS:
            for host in network.hosts[1:]:
                network.shape(host, ROWS[name])
            for payload, (size, rounds) in PAYLOADS.items():
                cells = [_cell(measured(network, over, size, rounds)) for over in ("tcp", "link")]
                floor = f"{needed(size, ROWS[name]):.3f} s"
                print("|", " | ".join((name, payload, floor, *cells, str(rounds))), "|", flush=True)


def _cell(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} s ({max(seconds):.3f})"


def _start(host: Host, *arguments: str) -> subprocess.Popen[str]:
    program = str(Path(__file__).with_name("echo.py"))
    return subprocess.Popen(
        # -P: this folder's own names stay out of the way of the libraries'.
        [*host.inside, sys.executable, "-P", program, *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )


if __name__ == "__main__":
    main()
