"""Start Flower's own engine as people do: a SuperLink, SuperNodes, `flwr run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import ENVIRONMENT, alive, children_of, free_port, until

# Where Flower's commands are: beside Python, or wherever else they are found.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# An interpreter for each message, and perhaps others at work on the same cores.
VERY_LONG = 1800


class FlowerProcess:
    """A SuperLink or a SuperNode in the background, with all that it starts; its output in a file."""

    def __init__(self, *command: str, folder: Path, name: str) -> None:
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment(folder),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def until_it_says(self, words: str) -> None:
        """Wait for that in its output."""
        until(lambda: words in self.log.read_text(), VERY_LONG)

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
        home.mkdir(parents=True)
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n'
            f'[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )

    def listen(self) -> None:
        """Start the SuperLink, and wait until it serves."""
        link = self.start(
            "flower-superlink",
            *("--host", "127.0.0.1", "--port", str(self.port)),
            "--disable-runtime-dependency-installation",
            name="superlink",
        )
        link.until_it_says("Uvicorn running")

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

    def nodes(self, count: int) -> None:
        """SuperNodes that hold partitions 0, 1, ... of as many, once they are known."""
        found = [
            self.node(f"node-{at}", partition_id=at, num_partitions=count) for at in range(count)
        ]
        for one in found:
            one.until_it_says("SuperNode ID")

    def run(self, app: Path, run_config: str) -> subprocess.Popen[bytes]:
        """Begin `flwr run` of an app; its log is in ``run.log``."""
        with (self.folder / "run.log").open("wb") as output:
            return subprocess.Popen(
                ["flwr", "run", app, "here", "--stream", "--run-config", run_config],
                cwd=self.folder,
                env=environment(self.folder),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def run_to_the_end(self, app: Path, run_config: str) -> str:
        """`flwr run` of an app; gives what its ServerApp has logged."""
        self.ended(self.run(app, run_config))
        return (self.folder / "run.log").read_text()

    def ended(self, run: subprocess.Popen[bytes]) -> None:
        """Wait for the end of a run, which has to be a good one."""
        assert run.wait(VERY_LONG) == 0, self.logs()

    def logs(self) -> str:
        """What everybody has said."""
        files = [self.folder / "run.log", *(one.log for one in self.processes)]
        return "\n".join(f"== {file.name}\n{file.read_text()}" for file in files if file.exists())


@contextmanager
def superlink(folder: Path) -> Iterator[SuperLink]:
    """A SuperLink; it and its SuperNodes are gone afterwards."""
    link = SuperLink(folder)
    try:
        link.listen()
        yield link
    finally:
        for one in reversed(link.processes):
            one.kill()


def environment(folder: Path) -> dict[str, str]:
    """Flower's commands find each other, and keep what they keep in ``folder``."""
    return {
        **ENVIRONMENT,
        "PATH": PATH,
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
    }


def toml(config: dict[str, int | float | str]) -> str:
    """Key-value pairs as Flower's command line takes them."""
    return " ".join(
        f"{name.replace('_', '-')}={json.dumps(value)}" for name, value in config.items()
    )
