"""What the link costs: rounds beside the floor of the same run, memory, an idle client.

    python benchmarks/link.py [--quick] [--clients 2,8,64,256,1000] [--json FILE] [--without flwr,...]

Every round sends a payload to each client and takes it back from each. Beside each other, in turns:
the floor (a bare gRPC stream with the same bytes, chunks, checksums and client processes; the better of
an asyncio server and a synchronous one), fedkit's link with bytes, and the whole way of a Flower message
with float32 arrays through fedkit's Grid. Up to 8 clients each is a process of its own and uses fedkit's
`LinkClient`; more share 8 processes, where fedkit's frames are spoken on an event loop, as the floor's are.
44.8 MB are ResNet-18, in its arrays; "in one array" is the hardest case for memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import link_extra

HERE = Path(__file__).resolve().parent
SMALL, LARGE = 100_000, 44_764_968  # ResNet-18
KINDS = ("floor-aio", "floor-sync", "link", "grid")
OWN_PROCESS, PROCESSES = 8, 8
HEAD = (
    "| payload each way | clients | floor | link | to floor | Flower messages | to floor |\n"
    "|---|---|---|---|---|---|---|"
)


class Peer:
    """A process of ``link_peers.py``."""

    def __init__(self, *words: object) -> None:
        # A file, not a pipe: nobody reads it unless the process fails.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "link_peers.py"), *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.first = self._read()

    def ask(self, **what: int) -> dict[str, Any]:
        """Its answer to one line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise SystemExit(f"A process of the benchmark failed: {self._errors.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class Measured:
    """One kind of server with its clients, at one size.

    Attributes:
        seconds: of every round.
        server: peak memory of the server beyond its memory before the first round, in payloads.
        client: the same of one client process, in payloads times clients in it.
        cpu_server: seconds of CPU a round.
        cpu_clients: the same of all clients.
    """

    kind: str
    seconds: list[float] = field(default_factory=list)
    server: float = 0.0
    client: float = 0.0
    cpu_server: float = 0.0
    cpu_clients: float = 0.0

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.seconds)

    def text(self) -> str:
        """Median and spread, in milliseconds."""
        tenths = statistics.quantiles(self.seconds, n=10, method="inclusive")
        low, middle, high = (1000 * value for value in (tenths[0], self.median, tenths[-1]))
        digits = 2 if middle < 10 else 0
        return f"{middle:.{digits}f} ms ({low:.{digits}f} to {high:.{digits}f})"


class Setup:
    """A server and its clients, connected."""

    def __init__(self, kind: str, clients: int, size: int, words: list[str]) -> None:
        """Start them; ``words`` go to both sides."""
        self.result = Measured(kind)
        self._size = size
        self.server = Peer("server", kind, size, *words)
        address = self.server.first["address"]
        loop = ["--loop"] if clients > OWN_PROCESS else []
        processes = min(clients, PROCESSES)
        shares = [len(range(at, clients, processes)) for at in range(processes)]
        side = kind.partition("-")[0]
        self._share = shares[0]
        self.clients = [
            Peer("clients", side, address, share, size, *loop, *words) for share in shares
        ]
        self._before = self.server.ask(wait_for=clients)["VmRSS"]
        self._client_before = self.clients[0].ask()["VmRSS"]
        warm = self.server.ask(rounds=2)["seconds"]
        self.fastest = min(warm)

    def burst(self, rounds: int) -> None:
        """Some rounds."""
        used = self.server.ask()["cpu"], sum(client.ask()["cpu"] for client in self.clients)
        state = self.server.ask(rounds=rounds)
        others = [client.ask() for client in self.clients]
        result = self.result
        result.seconds += state["seconds"]
        result.server = (state["VmHWM"] - self._before) / self._size
        result.client = (others[0]["VmHWM"] - self._client_before) / self._size / self._share
        result.cpu_server = (state["cpu"] - used[0]) / rounds
        result.cpu_clients = (sum(other["cpu"] for other in others) - used[1]) / rounds

    def close(self) -> None:
        """End all processes."""
        for peer in (*self.clients, self.server):
            peer.close()


def compare(
    clients: int, size: int, kinds: list[str], words: list[str], turns: int, seconds: float
) -> dict[str, Measured]:
    """All kinds at one size, in turns, so that a noisy machine hits them alike."""
    setups: list[Setup] = []
    try:
        setups += [Setup(kind, clients, size, words) for kind in kinds]
        rounds = [max(3, min(200, int(seconds / setup.fastest))) for setup in setups]
        pairs = list(zip(setups, rounds, strict=True))
        for _ in range(turns):
            for setup, count in pairs:
                setup.burst(count)
            pairs = pairs[1:] + pairs[:1]
        return {setup.result.kind: setup.result for setup in setups}
    finally:
        for setup in setups:
            setup.close()


def floor_of(results: dict[str, Measured]) -> Measured:
    """The better of the floors."""
    return min(
        (one for kind, one in results.items() if kind.startswith("floor")),
        key=lambda one: one.median,
    )


def row(name: str, clients: int, results: dict[str, Measured]) -> str:
    """A line of the table."""
    floor = floor_of(results)
    cells = [name, f"{clients:,}", floor.text()]
    for kind in ("link", "grid"):
        one = results.get(kind)
        cells += [one.text(), f"{one.median / floor.median:.2f}"] if one else ["", ""]
    return f"| {' | '.join(cells)} |"


def memory_row(name: str, clients: int, results: dict[str, Measured]) -> str:
    """A line of the table of peak memory."""
    floor = floor_of(results)
    cells = [name, f"{clients:,}"]
    for one in (floor, results["link"], results.get("grid")):
        cells += [f"{one.server / clients:.2f}", f"{one.client:.2f}"] if one else ["", ""]
    return f"| {' | '.join(cells)} |"


def flat(rounds: int) -> list[tuple[int, int]]:
    """Resident bytes of a server with two clients, after a tenth of the rounds and after all."""
    setup = Setup("grid", 2, SMALL, [])
    try:
        seen = []
        for count in (rounds // 10, rounds - rounds // 10):
            seen.append(setup.server.ask(rounds=count)["VmRSS"])
        return list(zip((rounds // 10, rounds), seen, strict=True))
    finally:
        setup.close()


def settings(given: argparse.Namespace) -> str:
    """What was measured on, and how."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    names = ("grpcio", "flwr", "protobuf", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return (
        f"{os.cpu_count()} CPUs, load {load} at the start; Python {platform.python_version()}, "
        f"{versions}; {given.turns} turns of {given.seconds:g} s (at least 3 rounds) each; median "
        "(first to last tenth) of all rounds"
    )


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2 and 8 clients, short turns")
    parser.add_argument("--clients", default="", help="of the small payload")
    parser.add_argument("--json", type=Path, help="write all figures there, too")
    parser.add_argument("--turns", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0, help="of one turn")
    parser.add_argument("--without", default="", help="large, tls, memory, idle, flwr")
    given = parser.parse_args(words)
    given.turns = given.turns or (2 if given.quick else 6)
    given.seconds = given.seconds or (0.2 if given.quick else 1.0)
    given.clients = given.clients or ("2,8" if given.quick else "2,8,64,256,1000")
    given.without = given.without.split(",") + (["flwr"] if given.quick else [])
    return given


def cases(given: argparse.Namespace, tls: Path) -> list[tuple[str, int, int, list[str]]]:
    """Name, clients, bytes and further words of every line of the table."""
    found = [("100 KB", int(n), SMALL, list[str]()) for n in given.clients.split(",")]
    if "large" not in given.without:
        found += [("44.8 MB", n, LARGE, list[str]()) for n in (2, 8)]
        found += [("44.8 MB in one array", 2, LARGE, ["--whole"])]
    if "tls" not in given.without:
        link_extra.make_certificates(tls)
        words = ["--tls", str(tls)]
        found += [("100 KB, TLS", 8, SMALL, words)]
        if "large" not in given.without:
            found += [("44.8 MB, TLS", 2, LARGE, words)]
    return found


def main() -> None:
    """Measure and print."""
    given = parse()
    figures: dict[str, Any] = {"settings": settings(given), "rounds": []}
    print(f"{figures['settings']}\n\n{HEAD}", flush=True)
    remembered = []
    with tempfile.TemporaryDirectory() as folder:
        for name, clients, size, words in cases(given, Path(folder)):
            kinds = [k for k in KINDS if k != "floor-sync" or clients <= OWN_PROCESS]
            results = compare(clients, size, kinds, words, given.turns, given.seconds)
            print(row(name, clients, results), flush=True)
            # Of a few small payloads it would be the interpreter's own that is measured.
            if clients * size > 5_000_000:
                remembered.append(memory_row(name, clients, results))
            figures["rounds"] += [
                {"payload": name, "clients": clients, **asdict(one)} for one in results.values()
            ]
    print(
        "\nPeak memory beyond what was there before the first round, as multiples of clients x "
        "payload (of a client process: of its own clients x payload)\n\n"
        "| payload | clients | floor: server | client | link: server | client "
        "| Flower messages: server | client |\n|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(remembered), flush=True)
    if "memory" not in given.without:
        figures["flat"] = flat(200 if given.quick else 1000)
        text = ", ".join(
            f"{size / 1e6:.1f} MB after {rounds:,}" for rounds, size in figures["flat"]
        )
        print(f"\nServer, 2 clients, 100 KB, Flower messages, rounds: {text}", flush=True)
    if "idle" not in given.without:
        figures["idle"] = link_extra.idle(Peer)
        for name, size in figures["idle"].items():
            print(f"{name}: {size / 1e6:.1f} MB", flush=True)
    if "flwr" not in given.without:
        figures["flwr"] = link_extra.flower_engine(SMALL)
        print(f"flwr's SuperLink and 2 SuperNodes, 100 KB: {figures['flwr']}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
