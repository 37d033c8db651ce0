"""A busy processor is no dead client: five times more training clients than cores, for longer than it
takes to give up one that is silent. Slow by its nature, so it has a command of its own: `make slow`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from links import LONG, Served
from processes import until

from fedkit.link.node import Lost

BUSY_S = 45.0  # keepalive gives up after 30
CLIENT = """
import sys, time
from fedkit.link.client import Answer, LinkClient

def work(key, buffers):
    end = time.monotonic() + float(sys.argv[3])
    while time.monotonic() < end:
        sum(range(200_000))  # as training does, it leaves no core alone
    return Answer(buffers)

hello = {"identity": sys.argv[2], "secret": "s"}
LinkClient(sys.argv[1], hello, max_wait=30, on_welcome=lambda welcome: None).run(work)
"""


@pytest.mark.slow
def test_clients_that_use_up_every_core_are_not_taken_for_dead():
    served = Served()
    many = 5 * (os.cpu_count() or 1)
    clients = [
        subprocess.Popen([sys.executable, "-c", CLIENT, served.address, f"c{n}", str(BUSY_S)])
        for n in range(many)
    ]
    try:
        until(lambda: len(served.link.node_ids()) == many, LONG)
        sent = {str(node): node for node in served.link.node_ids()}
        for key, node in sent.items():
            served.link.send(node, key, [key.encode()])
        found: dict[str, object] = {}
        deadline = time.monotonic() + 4 * BUSY_S
        while len(found) < many and time.monotonic() < deadline:
            found |= served.link.take(sent.keys() - found.keys(), deadline)
        assert len(found) == many
        assert not [result for result in found.values() if isinstance(result, Lost)]
        # Nobody had to come back, either.
        assert len(served.greeted) == many
    finally:
        served.close()
        for client in clients:
            client.wait(LONG)
