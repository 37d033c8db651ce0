"""Flower's own engine for tests: a SuperLink and SuperNodes in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from processes import ENVIRONMENT, free_port, until

# Where its commands are: beside Python, or wherever else they are found.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# Each of its processes imports a web server.
VERY_LONG = 600


class FlowerEngine:
    """A SuperLink with SuperNodes that hold partitions 0, 1, ... of as many."""

    def __init__(self, folder: Path, stack: ExitStack, nodes: int) -> None:
        self._folder = folder
        ports = [free_port() for _ in range(nodes + 1)]
        address = f"127.0.0.1:{ports[0]}"
        self._environment = {
            **ENVIRONMENT,
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            # A SuperLink starts its ServerApp's process by name.
            "PATH": PATH,
        }
        (folder / "flwr").mkdir(parents=True)
        (folder / "flwr" / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n\n[superlink.here]\n'
            f'address = "{address}"\ninsecure = true\n'
        )
        installs = "--disable-runtime-dependency-installation"
        words = ["--insecure", installs, "--port", str(ports[0])]
        link = stack.enter_context(self._background("flower-superlink", *words, name="superlink"))
        until(lambda: "Uvicorn running" in link.read_text(), VERY_LONG)
        logs = []
        for number, port in enumerate(ports[1:]):
            config = f"partition-id={number} num-partitions={nodes}"
            words = ["--insecure", "--superlink", address, "--port", str(port)]
            words += ["--node-config", config]
            node = self._background("flower-supernode", *words, name=f"node-{number}")
            logs.append(stack.enter_context(node))
        until(lambda: all("SuperNode ID" in log.read_text() for log in logs), VERY_LONG)

    def run(self, app: Path, run_config: str) -> str:
        """Run an app to its end; gives what its ServerApp has logged."""
        words = [_command("flwr"), "run", str(app), "here", "--stream", "--run-config", run_config]
        done = subprocess.run(
            words,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=VERY_LONG,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    @contextmanager
    def _background(self, program: str, *arguments: str, name: str) -> Iterator[Path]:
        log = self._folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [_command(program), *arguments],
                cwd=self._folder,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield log
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _command(name: str) -> str:
    found = shutil.which(name, path=PATH)
    assert found is not None, f"{name} is installed with flwr"
    return found


@contextmanager
def flower_engine(folder: Path, nodes: int) -> Iterator[FlowerEngine]:
    """Flower's engine with so many nodes."""
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        yield FlowerEngine(folder, stack, nodes)
