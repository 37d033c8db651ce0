"""Seconds that a small Flower App takes on fedkit's link, and on Flower's own engine.

    PYTHONPATH=tests python benchmarks/flower_app.py
    PYTHONPATH=tests python benchmarks/flower_app.py --rounds 20 --clients 4

The app is the tests' quickstart (tests/apps/quickstart): FedAvg of a network of 2,410 parameters; a round
is training and evaluation on every client. Flower's SuperLink and SuperNodes are up before anything is
measured; `fedkit run` starts its server and clients within the time. What the strategy says of itself
("Strategy execution finished in") counts from the first message to the last.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from flower_apps import APPS
from processes import fedkit
from superlink import superlink

HOURS = 7200


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=2)
    options = parser.parse_args()
    app = APPS / "quickstart"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = f"num-server-rounds={options.rounds} final-model='{folder / 'model.pt'}'"
        words = ["run", "--app", str(app), "--clients", str(options.clients)]
        words += ["--run-config", config]
        print(f"{'engine':<8} {'command':>9} {'strategy':>9} {'a round':>9}")
        report(
            "fedkit", lambda: fedkit(*words, folder=folder, timeout=HOURS).stdout, options.rounds
        )
        with superlink(folder / "engine") as link:
            link.nodes(options.clients)
            report("flower", lambda: link.run_to_the_end(app, config), options.rounds)


def report(name: str, run: Callable[[], str], rounds: int) -> None:
    """One line: seconds of the whole command, of the strategy, of a round."""
    start = time.perf_counter()
    printed = run()
    seconds = time.perf_counter() - start
    said = re.search(r"Strategy execution finished in ([0-9.]+)s", printed)
    if said is None:
        raise SystemExit(f"the strategy on {name} did not finish:\n{printed}")
    strategy = float(said[1])
    print(f"{name:<8} {seconds:>7.1f} s {strategy:>7.2f} s {strategy / rounds:>7.2f} s", flush=True)


if __name__ == "__main__":
    main()
