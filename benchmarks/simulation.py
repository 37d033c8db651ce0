"""Simulated client updates a second, beside bare PyTorch loops and Flower's Ray simulation, in one run.

    python benchmarks/simulation.py --dataset fashion-mnist --data-root ~/data [--clients 20,100,1000]
    python benchmarks/simulation.py --quick                   # digits, 20 clients, one turn
    python benchmarks/simulation.py --only memory

*updates*: clients train (``--steps`` steps of a batch). The floor is one process of one thread for each
core, which trains its share of the clients in memory and sends nothing. *engine*: they train nothing, so
that what is left is the engine's. *start*: seconds from the call, with everything imported, to the end of
the first round. All sides do the same with the same samples, LeNet and batch; they take turns, each in a
process of its own, and the figures are medians (of all rounds but the first). Ray's row needs ray.
*memory*: the largest memory of all processes of a run together (PSS, read from /proc), of 1,000 clients
with KT-pFL and of 50 out of as many and out of a million with FedAvg.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PARTS = ("updates", "start", "engine", "memory")
SIMULATE = (sys.executable, "-P", "-m", "fedkit", "--quiet", "simulate", "--no-keep-models")
KTPFL = "--strategy ktpfl --clients 1000 --rounds 3 --models lenet -o local-epochs=1 -o public-samples=1000"
FEDAVG = (
    "--strategy fedavg --select uniform:50 --num-shards 50 --partition iid --rounds 3 --no-alone"
)
RUNS = {
    "KT-pFL, 1,000 clients": KTPFL,
    "FedAvg, 50 clients": f"{FEDAVG} --clients 50 --model lenet --eval-every 3",
    "FedAvg, 50 of 1,000,000": f"{FEDAVG} --clients 1000000 --model lenet --eval-every 3",
}


def main() -> None:
    """Measure and print."""
    options = _options()
    print(f"{_about()}\n")
    results: dict[str, Any] = {"settings": vars(options), "machine": _about()}
    steps = {"updates": options.steps, "engine": 0}
    sides = [side for side in ("bare", "fedkit", "ray") if _reason(side) is None]
    for part, count in steps.items():
        if part not in options.only:
            continue
        taken = {
            n: _turns(sides, {**_work(options, n), "steps": count}, options)
            for n in options.clients
        }
        results[part] = taken
        (_print_updates if part == "updates" else _print_engine)(taken)
        if part == "updates" and "start" in options.only:
            _print_start(taken)
    if reason := _reason("ray"):
        print(reason)
    if "memory" in options.only:
        results["memory"] = {name: _memory(name, line, options) for name, line in RUNS.items()}
    if options.json:
        options.json.write_text(json.dumps(results, indent=2, default=str) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="digits, 20 clients, one turn")
    parser.add_argument("--clients", default="20,100,1000")
    parser.add_argument("--steps", type=int, default=50, help="of SGD, in a client update")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="beside the first, in each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dataset", default="digits", help="1,000 clients want more samples")
    parser.add_argument("--data-root", default="")
    parser.add_argument("--json", type=Path, help="write everything there")
    options = parser.parse_args()
    if options.quick:
        options.clients, options.turns, options.rounds = "20", 1, 2
    options.clients = [int(number) for number in options.clients.split(",")]
    options.only = options.only.split(",")
    if strange := set(options.only) - set(PARTS):
        parser.error(f"--only knows {', '.join(PARTS)}, not {min(strange)}")
    return options


def _work(options: argparse.Namespace, clients: int) -> dict[str, Any]:
    return {
        "clients": clients,
        "rounds": options.rounds,
        "batch": options.batch,
        "dataset": options.dataset,
        "data_root": options.data_root,
        "cores": options.cores,
    }


def _reason(side: str) -> str | None:
    """Why a side can't be measured, if it can't."""
    if side == "ray" and importlib.util.find_spec("ray") is None:
        return "Flower on Ray was left out: ray is not installed (pip install 'flwr[simulation]')."
    return None


def _turns(
    sides: Sequence[str], work: dict[str, Any], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Medians over the turns of each side: ``round`` and ``first``, in seconds."""
    rounds: dict[str, list[float]] = {side: [] for side in sides}
    firsts: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(options.turns):
        for side in sides:
            command = [sys.executable, str(HERE / "simulation_peers.py"), side, json.dumps(work)]
            ran = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)},
                check=False,
            )
            if ran.returncode:
                raise SystemExit(f"{ran.stderr}{' '.join(command)} ended with {ran.returncode}.")
            came = json.loads(ran.stdout.splitlines()[-1])
            rounds[side] += came["rounds"]
            firsts[side].append(came["first"])
    median = statistics.median
    return {side: {"round": median(rounds[side]), "first": median(firsts[side])} for side in sides}


def _print_updates(taken: dict[int, dict[str, dict[str, float]]]) -> None:
    print("Client updates a second\n")
    print("| clients | bare loops | fedkit | to the floor | Flower on Ray | to the floor |")
    print("|---|---|---|---|---|---|")
    for clients, sides in taken.items():
        rate = {side: clients / measured["round"] for side, measured in sides.items()}
        share = {side: f"{one / rate['bare']:.0%}" for side, one in rate.items()}
        print(
            f"| {clients:,} | {rate['bare']:.1f} | {rate['fedkit']:.1f} | {share['fedkit']} "
            f"| {_or(rate.get('ray'), '.1f')} | {share.get('ray', '–')} |"
        )
    print()


def _print_engine(taken: dict[int, dict[str, dict[str, float]]]) -> None:
    print("Milliseconds of the engine for a client update that trains nothing\n")
    print("| clients | bare loops | fedkit | Flower on Ray |\n|---|---|---|---|")
    for clients, sides in taken.items():
        each = {side: 1000 * measured["round"] / clients for side, measured in sides.items()}
        ray = _or(each.get("ray"), ".2f")
        print(f"| {clients:,} | {each['bare']:.2f} | {each['fedkit']:.2f} | {ray} |")
    print()


def _print_start(taken: dict[int, dict[str, dict[str, float]]]) -> None:
    print("Seconds until the first round is done\n")
    print("| clients | bare loops | fedkit | Flower on Ray |\n|---|---|---|---|")
    for clients, sides in taken.items():
        first = {side: measured["first"] for side, measured in sides.items()}
        ray = _or(first.get("ray"), ".1f")
        print(f"| {clients:,} | {first['bare']:.1f} | {first['fedkit']:.1f} | {ray} |")
    print()


def _or(number: float | None, form: str) -> str:
    return "–" if number is None else format(number, form)


def _memory(name: str, line: str, options: argparse.Namespace) -> dict[str, float]:
    """Largest PSS of a run's processes together, in bytes, and the seconds that it took."""
    sources = ["--dataset", options.dataset, "--data-root", options.data_root or "."]
    with tempfile.TemporaryDirectory() as folder:
        began, peak = time.perf_counter(), 0
        command = [*SIMULATE, *line.split(), *sources, "--run-dir", f"{folder}/run"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, sum(map(_pss, _tree(process.pid))))
            time.sleep(0.5)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}.")
        seconds = time.perf_counter() - began
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    rounds = [row["seconds"] for row in summary["history"]]
    print(
        f"{name}: {peak / 1e9:.2f} GB at most, {seconds:.0f} s, rounds of "
        f"{', '.join(f'{one:.1f}' for one in rounds)} s\n    fedkit simulate {line}"
    )
    return {"bytes": peak, "seconds": seconds}


def _tree(pid: int) -> list[int]:
    """A process and those that descend from it."""
    parents: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(file.read_text().rpartition(")")[2].split()[1]), []).append(
                int(file.parent.name)
            )
        except OSError:  # it ended meanwhile
            continue
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it ended meanwhile
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _about() -> str:
    return (
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, Python "
        f"{platform.python_version()}, torch {version('torch')}, flwr {version('flwr')}"
    )


if __name__ == "__main__":
    main()
