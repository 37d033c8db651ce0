"""Compare strategies over several seeds, each run a federation of real processes, or simulated.

    python examples/compare.py examples/*.toml                       # Fashion-MNIST, or digits without it
    python examples/compare.py --strategies fedmd,ktpfl --seeds 1,2,3  # the defaults of `fedkit run`
    python examples/compare.py --simulate clients=20       # without a network, as `fedkit simulate`

prints mean and spread (standard deviation over seeds) of the clients' mean accuracy, alone and together,
as rows of a Markdown table. Any setting of `fedkit run` may follow, as KEY=VALUE. Two reference lines come
with every table, unless they are among the rows or --no-references is given: `local`, where nothing is
exchanged, and `central`, one model on everybody's data; they train as the first row's clients do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from fedkit import Federation
from fedkit.engine.plan import client_models, make_plan
from fedkit.errors import FedkitError
from fedkit.registry import load
from fedkit.settings import DataSettings, FederationSettings, RunSettings, ServerSettings, key

# Printed beside any strategies, and the groups of settings that they share with these.
REFERENCES = ("local", "central")
SHARED = (FederationSettings, ServerSettings, DataSettings, RunSettings)
LEFT_OUT = {"preset", "alone", "run-dir", "widths", "depths"}
# What takes the place of Fashion-MNIST where its files are not at hand.
DIGITS = {"dataset": "digits", "public": "digits:400", "num-shards": 4}
COLUMNS = {
    "own data, alone": "alone_personal_accuracy",
    "own data, together": "personal_accuracy",
    "common test, alone": "alone_global_accuracy",
    "common test, together": "global_accuracy",
}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--strategies", default="", help="comma-separated, with fedkit's defaults")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--no-references", action="store_true", help="without local and central")
    parser.add_argument(
        "--simulate", action="store_true", help="in worker processes: the same numbers, sooner"
    )
    parser.add_argument("what", nargs="*", metavar="FILE.toml or KEY=VALUE")
    arguments = parser.parse_args()
    files = [Path(word) for word in arguments.what if "=" not in word]
    extra = dict(word.split("=", 1) for word in arguments.what if "=" in word)
    runs = {file.stem: read(file) for file in files}
    named = arguments.strategies or ("" if files else "fedmd,ktpfl")
    runs |= {name: {"strategy": name} for name in named.split(",") if name}
    runs = {name: {**settings, **extra} for name, settings in runs.items()}
    if not arguments.no_references:
        first = next(iter(runs.values()))
        there = {settings["strategy"] for settings in runs.values()}
        missing = [name for name in REFERENCES if name not in there]
        try:
            runs |= {name: reference(name, first) for name in missing}
        except FedkitError as error:
            parser.error(str(error))
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    print("| | " + " | ".join(COLUMNS) + " | server's model | up, down a round | seconds |")
    print("|---" * (len(COLUMNS) + 4) + "|")
    for name, settings in runs.items():
        print(row(name, settings, seeds, simulated=arguments.simulate), flush=True)


def read(file: Path) -> dict[str, Any]:
    """The settings in a TOML file, on digits if Fashion-MNIST's files are missing."""
    settings = tomllib.loads(file.read_text())
    root = settings.get("data-root") or os.environ.get("FEDKIT_DATA_ROOT", "")
    if settings.get("dataset") == "fashion-mnist" and not (Path(root) / "FashionMNIST").is_dir():
        print(f"{file.name}: no Fashion-MNIST under FEDKIT_DATA_ROOT, so on digits.")
        settings |= DIGITS
    return settings


def reference(strategy: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a reference line beside a run: those of the run that it has too, whole networks."""
    own = load("strategies", strategy).Hyperparameters
    known = {key(f.name) for kind in (own, *SHARED) for f in fields(kind)}
    plan = make_plan(settings, local=True)
    # Written out: what the run has by default or by its preset is not what the reference would have.
    mine = {name: value for name, value in plan.values().items() if name in known - LEFT_OUT}
    if strategy == "central" and key("keep_optimiser") not in map(key, settings):
        mine.pop("keep-optimiser", None)  # in one place there is no end of a round to let go at
    # Where clients have networks of their own, the one model is the first client's.
    models = client_models(plan)
    return {**mine, "strategy": strategy, "model": models[0], "models": ",".join(models)}


def row(name: str, settings: dict[str, Any], seeds: list[int], *, simulated: bool) -> str:
    """One row of the table: a federation run once for each seed."""
    run = Federation.simulate if simulated else Federation.run
    try:
        results = [run(Federation(**{**settings, "seed": seed})) for seed in seeds]
    except FedkitError as error:
        return f"| {name} | {error} |"
    runs = [result.summary for result in results]
    cells = [spread([mean_of_clients(s, name) for s in runs]) for name in COLUMNS.values()]
    cells.append(spread([server_accuracy(s) for s in runs]))
    rounds = [max(s["rounds"], 1) * len(s["clients"]) for s in runs]
    up, down = (
        statistics.fmean(s[way] / n for s, n in zip(runs, rounds, strict=True)) / 1000
        for way in ("bytes_up", "bytes_down")
    )
    cells.append(f"{up:.1f} kB, {down:.1f} kB")
    cells.append(f"{statistics.fmean(s['seconds'] for s in runs):.0f}")
    return f"| {name} | " + " | ".join(cells) + " |"


def mean_of_clients(summary: dict[str, Any], name: str) -> float | None:
    """Mean over clients; None where a run has no such number."""
    values = [client[name] for client in summary["clients"] if client[name] is not None]
    return statistics.fmean(values) if values else None


def server_accuracy(summary: dict[str, Any]) -> float | None:
    """Mean accuracy of the networks that live at the server, if any."""
    accuracies = summary["server_models"].values()
    return statistics.fmean(accuracies) if accuracies else None


def spread(numbers: list[float | None]) -> str:
    """Mean and standard deviation; nothing where there are no numbers."""
    values = [number for number in numbers if number is not None]
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    main()
