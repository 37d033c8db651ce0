"""The bad network is as bad as it says, and nothing of it stays."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import alive, until

from network.namespaces import GOOD, SILENT, Conditions, Network

PORT = 5000
LISTEN = """
import socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("here", flush=True)
while True:
    connection, _ = listener.accept()
    while data := connection.recv(1 << 16):
        connection.sendall(data)
"""
# Says how long one byte and back takes, then how long so many do.
ASK = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=30)
for count in (1, int(sys.argv[3])):
    begin, left = time.perf_counter(), count
    connection.sendall(bytes(count))
    while left:
        left -= len(connection.recv(1 << 16)) or exit("it hung up")
    print(time.perf_counter() - begin)
"""


@pytest.fixture(scope="module")
def network():
    with Network("server", "client") as built:
        server, _ = built.hosts
        listener = subprocess.Popen(
            [*server.inside, sys.executable, "-c", LISTEN, server.address, str(PORT)],
            stdout=subprocess.PIPE,
        )
        assert listener.stdout is not None and listener.stdout.readline() == b"here\n"
        try:
            yield built
        finally:
            listener.kill()
            listener.communicate()


@pytest.fixture(autouse=True)
def good(network):
    yield
    network.shape(network.hosts[1], GOOD)


def ask(network, count=1):
    server, client = network.hosts
    arguments = [sys.executable, "-c", ASK, server.address, str(PORT), str(count)]
    done = subprocess.run(
        [*client.inside, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return [float(line) for line in done.stdout.split()]


def test_delay_is_taken_each_way(network):
    network.shape(network.hosts[1], Conditions(delay_ms=30))
    assert ask(network)[0] >= 0.06


def test_a_rate_holds_each_way(network):
    network.shape(network.hosts[1], Conditions(rate_mbit=8))
    # 250 kB at 8 Mbit/s are 0.25 s less what a full bucket lets pass at once.
    assert ask(network, 250_000)[1] >= 0.22


def test_half_of_the_packets_are_lost(network):
    server, client = network.hosts
    network.shape(client, Conditions(loss_percent=50))
    receive = (
        "import socket, sys; s = socket.socket(type=socket.SOCK_DGRAM); s.bind((sys.argv[1], 6000));"
        # 33 is SO_RCVBUFFORCE: nothing is to be lost here for lack of room.
        "s.setsockopt(socket.SOL_SOCKET, 33, 1 << 22); s.settimeout(2); print(flush=True); n = 0\n"
        "try:\n while s.recv(1) != b'z': n += 1\nexcept TimeoutError: pass\nprint(n)"
    )
    send = (
        "import socket, sys; s = socket.socket(type=socket.SOCK_DGRAM);"
        "[s.sendto(b'x', (sys.argv[1], 6000)) for _ in range(1000)];"
        "[s.sendto(b'z', (sys.argv[1], 6000)) for _ in range(30)]"
    )
    with subprocess.Popen(
        [*server.inside, sys.executable, "-c", receive, server.address], stdout=subprocess.PIPE
    ) as receiver:
        assert receiver.stdout is not None and receiver.stdout.readline() == b"\n"
        subprocess.run([*client.inside, sys.executable, "-c", send, server.address], check=True)
        came = int(receiver.stdout.read())
    assert 400 < came < 600


@pytest.mark.parametrize("how", ["silent", "pulled"])
def test_a_cut_connection_is_the_same_one_after_it_heals(network, how):
    server, client = network.hosts
    program = (
        "import socket, sys; c = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        "print('here', flush=True); sys.stdin.readline(); c.sendall(b'x'); c.settimeout(0.5)\n"
        "try: c.recv(1); print('not cut', flush=True)\n"
        "except TimeoutError: print('silence', flush=True)\n"
        "sys.stdin.readline(); c.settimeout(30); print(c.recv(1), flush=True)"
    )
    with subprocess.Popen(
        [*client.inside, sys.executable, "-c", program, server.address, str(PORT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as talker:
        assert talker.stdin is not None and talker.stdout is not None
        assert talker.stdout.readline() == "here\n"
        network.shape(client, SILENT) if how == "silent" else network.cut(client)
        talker.stdin.write("\n")
        assert talker.stdout.readline() == "silence\n"
        network.shape(client, GOOD) if how == "silent" else network.heal(client)
        talker.stdin.write("\n")
        assert talker.stdout.readline() == "b'x'\n"


def test_the_machines_own_interfaces_are_not_touched(network):
    assert "eth0" in subprocess.check_output([*network.hosts[0].inside, "ip", "link"], text=True)
    names = {name for _, name in socket.if_nameindex()}
    assert not names & {"bridge", "p1", "p2"}


def test_nothing_stays_of_a_test_that_was_killed():
    program = (
        "import sys, time; from network.namespaces import Network\n"
        "with Network('a', 'b') as network:\n"
        "    print(*(host.pid for host in network.hosts), flush=True); time.sleep(60)"
    )
    tests = str(Path(__file__).parent.parent)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": tests},
        stdout=subprocess.PIPE,
        text=True,
    ) as doomed:
        assert doomed.stdout is not None
        holders = [int(pid) for pid in doomed.stdout.readline().split()]
        assert len(holders) == 2 and all(map(alive, holders))
        doomed.send_signal(signal.SIGKILL)
        doomed.wait()
    until(lambda: not any(map(alive, holders)))
