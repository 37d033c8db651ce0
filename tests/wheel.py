"""Build the wheel, install it in a clean environment, run two rounds outside the repository.

Not a test of pytest's: it installs torch anew, and `make wheel-test` (which CI runs) calls it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def run(*command: str | Path, folder: Path) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], cwd=folder, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, folder=REPOSITORY)
        (wheel,) = folder.glob("*.whl")
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", wheel, folder=folder)
        fedkit = folder / "venv" / "bin" / "fedkit"
        os.environ.pop("PYTHONPATH", None)
        run(
            *(fedkit, "run", "--strategy", "fedmd", "--clients", "2", "--rounds", "2"),
            *("--models", "lenet,cnn", "--run-dir", folder / "out"),
            folder=folder,
        )
        summary = json.loads((folder / "out" / "summary.json").read_text())
        assert summary["status"] == "completed" and summary["rounds"] == 2, summary
        where = subprocess.run(
            [str(python), "-c", "import fedkit; print(fedkit.__file__)"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert str(REPOSITORY) not in where, f"the repository's fedkit was used: {where}"
        print("The wheel works.")


if __name__ == "__main__":
    main()
