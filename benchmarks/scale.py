"""The server's own work against clients N, public samples M and classes C, in seconds and memory.

    python benchmarks/scale.py [--quick] [--plot docs/scale.png] [--json FILE]

*mean*: FedMD's consensus over N replies of M x C; *matrix* and *targets*: KT-pFL's coefficients
(softmax) and everybody's personal target; *weights*: the mean of N LeNets; *students*: FedDF's LeNets that
learn from M samples, four of them, in one process and in one for each core. Each is the least of the
repeats; replies are made before and not counted. "above" is what the resident memory rose by while it ran.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coefficients import replies, targets
from threadpoolctl import threadpool_limits

from fedkit.data.datasets import open_dataset
from fedkit.engine.workers import Workers
from fedkit.knowledge.consensus import Mean, Upload
from fedkit.knowledge.reduction import weighted_mean
from fedkit.models.build import build_model
from fedkit.settings import DataSettings
from strategies.coefficients import softmax_step
from strategies.distillation import DistilHyperparameters, Job, distil

CLIENTS, ROWS, CLASSES, STUDENTS = 100, 1000, 10, 4
# What varies while the others stay.
AXES = {"N": (10, 100, 1000), "M": (250, 1000, 4000), "C": (10, 30, 100)}
WORKS = {"mean": "NMC", "matrix": "NMC", "targets": "NMC", "weights": "N"}


def main() -> None:
    """Measure and print."""
    options = _options()
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; seconds (MB above)\n"
    )
    print(f"| N | M | C | {' | '.join(WORKS)} |\n|{'---|' * (3 + len(WORKS))}")
    lines = []
    for at in _places():
        measured = {
            name: _apart(partial(_measure, name, *at.values(), options.repeats)) for name in WORKS
        }
        lines.append({**at, **measured})
        cells = [f"{one['seconds']:.3f} ({one['above'] / 1e6:.0f})" for one in measured.values()]
        print(f"| {' | '.join(map(str, [*at.values(), *cells]))} |", flush=True)
    print(f"\n| M | {STUDENTS} students, one process | one for each core |\n|---|---|---|")
    students = {}
    for rows in (250, 1000) if options.quick else (250, 500, 1000):
        one, many = (_students(rows, count) for count in (1, 0))
        students[rows] = one, many
        print(f"| {rows} | {one:.2f} | {many:.2f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"lines": lines, "students": students}, indent=2) + "\n")
    if options.plot:
        _plot(lines, options.plot)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--plot", type=Path, help="draw it there (needs matplotlib)")
    parser.add_argument("--json", type=Path, help="write everything there")
    options = parser.parse_args()
    if options.quick:
        options.repeats = 1
    return options


def _places() -> list[dict[str, int]]:
    """The middle of the axes, and each axis through it."""
    middle = {"N": CLIENTS, "M": ROWS, "C": CLASSES}
    along = [{**middle, axis: value} for axis, values in AXES.items() for value in values]
    return [place for at, place in enumerate(along) if place not in along[:at]]


def _measure(name: str, clients: int, rows: int, classes: int, repeats: int) -> dict[str, float]:
    with threadpool_limits(1):
        work = _work(name, clients, rows, classes)
        before, seconds = _peak(), []
        for _ in range(repeats):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
    return {"seconds": min(seconds), "above": _peak() - before}


def _work(name: str, clients: int, rows: int, classes: int) -> Callable[[], object]:
    if name == "weights":
        model = build_model("lenet", (1, 28, 28), classes, seed=1)
        arrays = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
        return lambda: weighted_mean((1.0, arrays) for _ in range(clients))
    soft = replies(clients, rows, classes, seed=1)
    even = np.full((clients, clients), 1 / clients)
    works: dict[str, Callable[[], object]] = {
        "mean": lambda: Mean()(Upload(1.0, one) for one in soft),
        "matrix": lambda: softmax_step(even, soft, penalty=0.7),
        "targets": lambda: targets(even, soft, 128),
    }
    return works[name]


def _students(rows: int, count: int) -> float:
    """Seconds of all lessons with ``count`` processes (0: one for each core), once these are up."""
    pool = open_dataset("digits", DataSettings("")).train
    samples = pool.take(torch.arange(rows))
    said = replies(1, rows, CLASSES, seed=1)[0]
    model = build_model("lenet", samples.shape, CLASSES, seed=1)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    hyper = DistilHyperparameters(steps=rows // 4)
    jobs = [
        Job("lenet", weights, samples, said, None, 1.0, hyper, CLASSES, 1, at)
        for at in range(STUDENTS)
    ]
    workers = Workers(count, 1)
    torch.set_num_threads(1)
    try:
        workers.map(distil, jobs)
        began = time.perf_counter()
        workers.map(distil, jobs)
        return time.perf_counter() - began
    finally:
        workers.close()


def _apart(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """In a process of its own: the largest resident memory never falls."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _plot(lines: list[dict[str, Any]], file: Path) -> None:
    import matplotlib.pyplot as plt

    middle = {"N": CLIENTS, "M": ROWS, "C": CLASSES}
    figure, panels = plt.subplots(1, len(AXES), figsize=(12, 3.5), sharey=True)
    for axis, panel in zip(AXES, panels, strict=True):
        others = {name: value for name, value in middle.items() if name != axis}
        along = [line for line in lines if others.items() <= line.items()]
        along.sort(key=lambda line: line[axis])
        for name, terms in WORKS.items():
            if axis in terms:
                seconds = [line[name]["seconds"] for line in along]
                panel.loglog([line[axis] for line in along], seconds, "o-", label=name)
        panel.set_xlabel(f"{axis} ({', '.join(f'{k}={v}' for k, v in others.items())})")
        panel.legend()
    panels[0].set_ylabel("seconds at the server")
    figure.tight_layout()
    figure.savefig(file)


if __name__ == "__main__":
    main()
