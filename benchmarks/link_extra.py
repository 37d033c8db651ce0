"""What ``link.py`` measures beside rounds: an idle client's memory, and Flower's own engine."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from link_peers import memory_of

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
FEDKIT = [sys.executable, "-P", "-m", "fedkit"]
ROUNDS = 5

APP_TOML = """\
[project]
name = "ping"
version = "1.0.0"
description = "Echo"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "benchmark"

[tool.flwr.app.components]
serverapp = "ping:server"
clientapp = "ping:client"

[tool.flwr.app.config]
bytes = 0
rounds = 0
result = ""
"""
APP = """\
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()


@client.train()
def train(message, context):
    return Message(message.content, reply_to=message)


@server.main()
def main(grid, context):
    given = context.run_config
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    array = np.random.default_rng(1).random(given["bytes"] // 4, dtype=np.float32)
    content = RecordDict({"arrays": ArrayRecord([array])})
    for number in range(given["rounds"]):
        started = time.perf_counter()
        messages = [Message(content, node, "train", group_id=str(number)) for node in nodes]
        replies = list(grid.send_and_receive(messages))
        assert len(replies) == 2 and not any(reply.has_error() for reply in replies)
        with Path(given["result"]).open("a") as file:
            file.write(f"{time.perf_counter() - started}\\n")
"""


def make_certificates(folder: Path) -> None:
    """A CA (``ca.pem``) and a server of 127.0.0.1 (``server.pem``, ``server.key``), for a day."""
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("ca", "server")
    ]
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    for key, name, is_ca, file in zip(keys, names, (True, False), ("ca", "server"), strict=True):
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(names[0])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        )
        if not is_ca:
            builder = builder.add_extension(alternative, critical=False)
        certificate = builder.sign(keys[0], hashes.SHA256())
        (folder / f"{file}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = keys[1].private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "server.key").write_bytes(private)


@contextmanager
def background(words: list[str], folder: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its output in a file, ended with the block."""
    environment = {**ENVIRONMENT, "FLWR_HOME": str(folder / "flwr")}
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def idle(start_peer: Callable[..., Any]) -> dict[str, int]:
    """Memory of a client's process: a bare interpreter, waiting, and in a whole small run."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [sys.executable, "-c", "import grpc, time; time.sleep(600)"]
        with background(words, folder, "bare") as process:
            time.sleep(1.5)
            found["a bare interpreter with grpc imported"] = memory_of(process.pid)["VmRSS"]
        server = start_peer("server", "link", 1000)
        try:
            words = [*FEDKIT, "client", "--server", server.first["address"], "--state-dir", "s"]
            words += ["--data-shard", "auto"]
            with background(words, folder, "idle") as process:
                server.ask(wait_for=1)
                time.sleep(0.5)
                found["`fedkit client`, connected, before the first instruction"] = memory_of(
                    process.pid
                )["VmRSS"]
        finally:
            server.close()
        found["`fedkit client` at most, in a round of FedMD on digits"] = _working(folder)
    return found


def _working(folder: Path) -> int:
    words = [*FEDKIT, "server", "--listen", "127.0.0.1:0", "--strategy", "fedmd", "--rounds", "1"]
    words += ["--dataset", "digits", "--min-clients", "2", "--num-shards", "2", "--run-dir", "run"]
    with background(words, folder, "server") as server:
        address = _wait_for(lambda: _read(folder / "run" / "address"))
        dial = [*FEDKIT, "client", "--server", address, "--data-shard"]
        with (
            background([*dial, "0"], folder, "client0") as first,
            background([*dial, "1"], folder, "client1"),
        ):
            peak = 0
            while first.poll() is None:
                try:
                    peak = max(peak, memory_of(first.pid)["VmHWM"])
                except (OSError, KeyError):  # it ended between two looks
                    break
                time.sleep(0.02)
            first.wait(60)
            server.wait(60)
    return peak


def flower_engine(size: int) -> str:
    """Seconds a round of Flower's SuperLink with two SuperNodes as they come, or why not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        app, result = folder / "app", folder / "seconds"
        app.mkdir()
        (app / "pyproject.toml").write_text(APP_TOML)
        (app / "ping.py").write_text(APP)
        ports = _free_ports(3)
        home = folder / "flwr"
        home.mkdir()
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n\n[superlink.here]\n'
            f'address = "127.0.0.1:{ports[0]}"\ninsecure = true\n'
        )
        bin_folder = Path(sys.executable).parent
        superlink = [str(bin_folder / "flower-superlink"), "--insecure"]
        superlink += ["--disable-runtime-dependency-installation", "--port", str(ports[0])]
        node = [str(bin_folder / "flower-supernode"), "--insecure", "--superlink"]
        node += [f"127.0.0.1:{ports[0]}", "--port"]
        config = f'bytes={size} rounds={ROUNDS} result="{result}"'
        run = [str(bin_folder / "flwr"), "run", str(app), "here", "--run-config", config]
        with background(superlink, folder, "superlink"):
            _wait_for(lambda: "Uvicorn running" in _read(folder / "superlink.log"))
            with (
                background([*node, str(ports[1])], folder, "node0"),
                background([*node, str(ports[2])], folder, "node1"),
            ):
                logs = [folder / "node0.log", folder / "node1.log"]
                _wait_for(lambda: all("SuperNode ID" in _read(log) for log in logs))
                with background(run, folder, "run"):
                    try:
                        seconds = _wait_for(lambda: _lines(result, ROUNDS), 120)
                    except TimeoutError:
                        return f"it did not finish: {_last_words(folder)}"
        middle = statistics.median(seconds)
        return f"{middle:.2f} s a round ({min(seconds):.2f} to {max(seconds):.2f}, {ROUNDS} rounds)"


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _lines(path: Path, count: int) -> list[float]:
    numbers = [float(line) for line in _read(path).split()]
    return numbers if len(numbers) == count else []


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _wait_for(look: Callable[[], Any], seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.05)
    return found


def _last_words(folder: Path) -> str:
    words = [
        f"{log.stem}: {line.strip()}"
        for log in sorted(folder.glob("*.log"))
        for line in log.read_text(errors="replace").splitlines()[-3:]
    ]
    return re.sub(r"\s+", " ", " | ".join(words))
