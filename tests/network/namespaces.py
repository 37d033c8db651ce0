"""Hosts in network namespaces of their own, and a network between them that can be made bad.

Each host is a namespace with one interface, ``eth0``; the network is one more namespace that holds the
other ends. Nothing of the machine's own network is touched, and nothing stays: a namespace lives as
long as the process that holds it, which ends with ours, however that ends.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from processes import ENVIRONMENT, FEDKIT, Process

TOOLS = ("ip", "tc", "unshare", "nsenter")
# Deep enough that only tbf, never netem's own queue, drops for lack of room.
NETEM_QUEUE = "20000"
# A small bucket, so that the rate is kept also in bursts; half a second of queue, as in home routers.
BURST, LONGEST_QUEUE = "4kb", "500ms"


@dataclass(frozen=True)
class Conditions:
    """What a host's link to the network does to packets, each way."""

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss_percent: float = 0.0
    rate_mbit: float = 0.0  # 0: as fast as it goes


GOOD = Conditions()
# Not one packet passes and nobody is told: no FIN, no RST, no link that is down.
SILENT = Conditions(loss_percent=100.0)


@dataclass(frozen=True)
class Host:
    """A machine on the network."""

    name: str
    address: str
    pid: int

    @property
    def inside(self) -> list[str]:
        """What stands before a command that runs there."""
        return ["nsenter", "--target", str(self.pid), "--net", "--"]


class NetworkProcess(Process):
    """A fedkit command in the background, on one of the hosts."""

    def __init__(self, host: Host, *arguments: str, folder: Path) -> None:
        self.log = folder / f"{host.name}.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*host.inside, *FEDKIT, *arguments],
                cwd=folder,
                env=ENVIRONMENT,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )


class Network:
    """Hosts on one network; used with ``with``, which takes it all away again."""

    def __init__(self, *names: str) -> None:
        """A network of hosts with these names, not built yet."""
        self._names = names
        self._stack = ExitStack()
        self._switch: subprocess.Popen[str] | None = None
        self._port: dict[str, str] = {}
        self.hosts: list[Host] = []
        self.has_netem = False

    def __enter__(self) -> Network:
        with self._stack:
            self._wire = self._namespace()
            self.has_netem = _works(self._in_wire, "tc qdisc add dev lo root netem delay 1ms")
            for number, name in enumerate(self._names, start=1):
                self.hosts.append(self._add(name, number))
            for host in self.hosts:
                self._introduce(host)
            if self.has_netem:
                self._bridge()
            else:
                self._switch = self._start_switch()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def shape(self, host: Host, conditions: Conditions) -> None:
        """Give a host's link these conditions, from now on."""
        rate = conditions.rate_mbit
        ends = (host.inside, "eth0"), (self._in_wire, self._port[host.name])
        for inside, interface in ends:
            _run(inside, f"tc qdisc replace dev {interface} root pfifo limit 20000")
            where = "root"
            if self.has_netem:
                _run(
                    inside,
                    f"tc qdisc replace dev {interface} root handle 1: netem "
                    f"delay {conditions.delay_ms}ms {conditions.jitter_ms}ms "
                    f"loss {conditions.loss_percent}% limit {NETEM_QUEUE}",
                )
                where = "parent 1:"
            if rate:
                _run(
                    inside,
                    f"tc qdisc add dev {interface} {where} tbf rate {rate}mbit "
                    f"burst {BURST} latency {LONGEST_QUEUE}",
                )
        if self._switch is not None:
            self._tell_switch(host, conditions)

    def cut(self, host: Host) -> None:
        """Take a host's interface down, as a pulled plug does."""
        _run(host.inside, "ip link set eth0 down")

    def heal(self, host: Host) -> None:
        """Plug it in again."""
        _run(host.inside, "ip link set eth0 up")
        self._introduce(host)

    @property
    def _in_wire(self) -> list[str]:
        return Host("wire", "", self._wire).inside

    def _namespace(self) -> int:
        # It waits for its standard input, which ends with this process, even if that is killed.
        holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo here; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._stack.callback(_end, holder)
        assert holder.stdout is not None
        said = holder.stdout.readline().strip()
        if said != "here":
            raise OSError(f"a network namespace can't be made: {said or 'no reason given'}")
        _run(Host("", "", holder.pid).inside, "ip link set lo up")
        return holder.pid

    def _add(self, name: str, number: int) -> Host:
        host = Host(name, f"10.77.0.{number}", self._namespace())
        port = self._port[name] = f"p{number}"
        _run(
            self._in_wire,
            f"ip link add {port} type veth peer name eth0 address {_mac(number)} netns {host.pid}",
        )
        _quiet(self._in_wire, port)
        _quiet(host.inside, "eth0")
        # Packets as they are on a cable, not bundles of forty that are lost as one.
        _run(host.inside, "ip link set eth0 gso_max_segs 1")
        _run(self._in_wire, f"ip link set {port} up")
        _run(host.inside, f"ip address add {host.address}/24 dev eth0")
        _run(host.inside, "ip link set eth0 up")
        return host

    def _introduce(self, host: Host) -> None:
        # A neighbour who does not answer ARP would be reported, and a silent cut were none.
        for number, other in enumerate(self.hosts, start=1):
            if other is not host:
                _run(
                    host.inside,
                    f"ip neighbour replace {other.address} lladdr {_mac(number)} "
                    "dev eth0 nud permanent",
                )

    def _bridge(self) -> None:
        _run(self._in_wire, "ip link add bridge type bridge")
        _quiet(self._in_wire, "bridge")
        for port in self._port.values():
            _run(self._in_wire, f"ip link set {port} master bridge")
        _run(self._in_wire, "ip link set bridge up")

    def _start_switch(self) -> subprocess.Popen[str]:
        program = str(Path(__file__).with_name("delay.py"))
        switch = subprocess.Popen(
            [*self._in_wire, "nice", "-n", "-10", sys.executable, program, *self._port.values()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._stack.callback(_end, switch)
        return switch

    def _tell_switch(self, host: Host, conditions: Conditions) -> None:
        assert self._switch is not None
        assert self._switch.stdin is not None and self._switch.stdout is not None
        command = {
            "port": self._port[host.name],
            "delay_ms": conditions.delay_ms,
            "jitter_ms": conditions.jitter_ms,
            "loss_percent": conditions.loss_percent,
        }
        self._switch.stdin.write(json.dumps(command) + "\n")
        self._switch.stdin.flush()
        answer = self._switch.stdout.readline().strip()
        assert answer == "done", f"the switch ended: {answer}"


def why_not() -> str | None:
    """Why this machine can't make such a network, or None."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "a network of namespaces needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: iproute2, util-linux)"
    try:
        with Network("probe") as network:
            network.shape(network.hosts[0], Conditions(rate_mbit=1))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        return f"a network of namespaces can't be made: {said}".strip()
    return None


def _mac(number: int) -> str:
    return f"02:00:00:00:00:{number:02x}"


def _run(inside: Sequence[str], command: str) -> None:
    subprocess.run([*inside, *command.split()], check=True, capture_output=True, text=True)


def _works(inside: Sequence[str], command: str) -> bool:
    done = subprocess.run([*inside, *command.split()], check=False, capture_output=True)
    return done.returncode == 0


def _quiet(inside: Sequence[str], interface: str) -> None:
    # No router solicitations and the like between the packets that are counted.
    _works(inside, f"sysctl -q -w net.ipv6.conf.{interface}.disable_ipv6=1")


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
