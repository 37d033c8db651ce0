"""Broken sensors: FedAvg beside noise-robust weights, where three of ten clients see noise.

    python examples/noisy_sensors.py --seeds 2,3,4
    python examples/noisy_sensors.py rounds=4 dataset=digits num-shards=20     # any setting of `fedkit run`

prints for identically distributed and for skewed data the accuracy of the global model on the common test
set (which is clean), mean and standard deviation over seeds, and the factors by which the robust weights
of each client are multiplied in the end, averaged over seeds; * marks those whose sensor is broken.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

from fedkit import Federation, Result

SETTINGS: dict[str, Any] = {
    "strategy": "fedavg",
    "model": "lenet",
    "models": "lenet",
    "dataset": "fashion-mnist",
    "public": "fashion-mnist:100",
    "num-shards": 100,
    "clients": 10,
    "rounds": 8,
    "eval-every": 8,
    "local-epochs": 2,
    "batch-size": 32,
    "optimiser": "adam",
    "learning-rate": 0.001,
}
DIGITS = {"dataset": "digits", "public": "digits:100", "num-shards": 10}
BROKEN = (1, 4, 7)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", default="2,3,4")
    parser.add_argument(
        "--sigma", default="5", help="of the noise, in standard deviations of the data"
    )
    parser.add_argument("what", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    settings = {**SETTINGS, **dict(word.split("=", 1) for word in arguments.what)}
    root = settings.get("data-root") or os.environ.get("FEDKIT_DATA_ROOT", "")
    if settings["dataset"] == "fashion-mnist" and not (Path(root) / "FashionMNIST").is_dir():
        print("No Fashion-MNIST under FEDKIT_DATA_ROOT, so on digits.")
        settings |= DIGITS
    noisy = cycle(settings, f"noise:{arguments.sigma}")
    ways = {
        "everybody honest": {},
        "fedavg": {"corrupt": noisy},
        "robust": {"corrupt": noisy, "robust": True},
        "robust, everybody honest": {"robust": True},
    }
    print("| partition | weights | common test | factors |\n|---|---|---|---|")
    for partition in ("iid", "dirichlet:0.5"):
        for name, way in ways.items():
            broken = BROKEN if "corrupt" in way else ()
            runs = [
                Federation(**{**settings, **way, "partition": partition, "seed": seed}).run()
                for seed in map(int, arguments.seeds.split(","))
            ]
            print(
                f"| {partition} | {name} | {accuracy(runs)} | {factors(runs, broken)} |", flush=True
            )


def cycle(settings: dict[str, Any], noise: str) -> str:
    """The clients' sensors, one after the other."""
    return ",".join(noise if k in BROKEN else "none" for k in range(int(settings["clients"])))


def accuracy(runs: list[Result]) -> str:
    """Mean and standard deviation of the global model's accuracy."""
    values = [run.summary["server_models"]["global"] for run in runs]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


def factors(runs: list[Result], broken: tuple[int, ...]) -> str:
    """The last factor of each client's weight, averaged over runs; ``broken`` ones are marked."""
    last: dict[int, list[float]] = {}
    for run in runs:
        told = [event for event in run.events if event["name"] == "weight_factor"]
        for client, value in {event["client"]: event["value"] for event in told}.items():
            last.setdefault(client, []).append(value)
    return " ".join(
        f"{statistics.fmean(values):.2f}{'*' if client in broken else ''}"
        for client, values in sorted(last.items())
    )


if __name__ == "__main__":
    main()
