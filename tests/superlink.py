"""Start Flower's own engine as people do: a SuperLink, SuperNodes, `flwr run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import alive, children_of, free_port, until

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


class FlowerProcess:
    """A SuperLink or a SuperNode in the background, with all that it starts; its output in a file."""

    def __init__(self, *command: str, folder: Path, name: str) -> None:
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [BIN / command[0], *command[1:]],
                cwd=folder,
                env=environment(folder),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def kill(self) -> None:
        """End it and its descendants at once, as when the power fails."""
        found, at = [self.process.pid], 0
        while at < len(found):
            found += children_of(found[at])
            at += 1
        for pid in found:
            if alive(pid):
                os.kill(pid, 9)
        self.process.wait()


class SuperLink:
    """A SuperLink and its SuperNodes, each with ports of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.processes: list[FlowerProcess] = []
        home = folder / "home"
        home.mkdir()
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n'
            f'[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        link = self.start(
            "flower-superlink",
            *("--host", "127.0.0.1", "--port", str(self.port)),
            "--disable-runtime-dependency-installation",
            name="superlink",
        )
        until(lambda: "startup complete" in link.log.read_text())

    def start(self, *command: str, name: str) -> FlowerProcess:
        """One of Flower's long-lived commands."""
        one = FlowerProcess(command[0], "--insecure", *command[1:], folder=self.folder, name=name)
        self.processes.append(one)
        return one

    def node(self, name: str, **config: int | float | str) -> FlowerProcess:
        """A SuperNode with this node config."""
        return self.start(
            "flower-supernode",
            *("--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port())),
            *("--node-config", toml(config)),
            name=name,
        )

    def run(self, **config: int | float | str) -> subprocess.Popen[bytes]:
        """`flwr run .` with this run config, to its end; its log in ``run.log``."""
        with (self.folder / "run.log").open("wb") as output:
            return subprocess.Popen(
                [BIN / "flwr", "run", ROOT, "here", "--stream", "--run-config", toml(config)],
                cwd=self.folder,
                env=environment(self.folder),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def logs(self) -> str:
        """What everybody has said."""
        files = [self.folder / "run.log", *(one.log for one in self.processes)]
        return "\n".join(f"== {file.name}\n{file.read_text()}" for file in files if file.exists())


@contextmanager
def superlink(folder: Path) -> Iterator[SuperLink]:
    """A SuperLink; it and its SuperNodes are gone afterwards."""
    link = SuperLink(folder)
    try:
        yield link
    finally:
        for one in reversed(link.processes):
            one.kill()


def environment(folder: Path) -> dict[str, str]:
    """Flower's commands find each other, and keep what they keep in ``folder``."""
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
    }


def toml(config: dict[str, int | float | str]) -> str:
    """Key-value pairs as Flower's command line takes them."""
    return " ".join(
        f"{name.replace('_', '-')}={json.dumps(value)}" for name, value in config.items()
    )
