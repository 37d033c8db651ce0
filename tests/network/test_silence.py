"""A client whose link falls silent while it is sent something: it answers once the link heals."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ENVIRONMENT

from network.namespaces import GOOD, SILENT, Network

pytestmark = pytest.mark.network
ECHO = str(Path(__file__).with_name("echo.py"))
# The first exchange opens everything up; the second begins when a line comes.
SERVE = """
import json, sys, time
from fedkit.link.node import Lost
from fedkit.link.server import LinkServer

link = LinkServer(lambda hello, node_id: {}, lambda node_id: None)
link.listen(sys.argv[1])
while not link.node_ids():
    time.sleep(0.05)
(node_id,) = link.node_ids()
for key in ("first", "second"):
    print(json.dumps("ready"), flush=True)
    sys.stdin.readline()
    link.send(node_id, key, [b"x" * 1000])
    reply = link.take([key], None)[key]
    print(json.dumps(reply.reason if isinstance(reply, Lost) else ""), flush=True)
link.close("Over.")
"""


# 4: TCP repairs it. 7: healed before either end has given the connection up, and the server's gives
# up nevertheless (its next try comes too late). 15: both ends give it up.
@pytest.mark.parametrize("seconds", [4, 7, 15])
def test_an_instruction_sent_into_the_silence_is_answered(seconds):
    def start(host, *arguments):
        return subprocess.Popen(
            [*host.inside, sys.executable, "-P", *arguments],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def hear():
        return json.loads(serving.stdout.readline())

    with Network("server", "client") as network:
        server, client = network.hosts
        address = f"{server.address}:8090"
        serving = start(server, "-c", SERVE, address)
        answering = start(client, ECHO, "link", "answer", address, "one")
        try:
            assert hear() == "ready"
            serving.stdin.write("\n")
            assert hear() == ""
            assert hear() == "ready"
            network.shape(client, SILENT)
            serving.stdin.write("\n")
            # Not a wait for something: the silence itself has to last.
            time.sleep(seconds)
            network.shape(client, GOOD)
            assert hear() == ""
            assert answering.wait(30) == 0
        finally:
            for process in (serving, answering):
                process.kill()
                process.communicate()
