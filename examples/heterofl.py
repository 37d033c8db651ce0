"""Mixes of widths: accuracy at every width, bytes and multiply-adds, over several seeds.

    python examples/heterofl.py
    python examples/heterofl.py --dataset fashion-mnist --rounds 20 --out widths.md --plot widths.png
    python examples/heterofl.py --dataset cifar10 --model preresnet-1112 --mixes 1 1,0.0625 --seeds 1

A mix is a list of levels that the clients are given in turn: ``1`` (all wide), ``0.25`` (all narrow, which
is FedAvg on the narrow network), ``1,0.0625`` (half and half), ``1,0.5,0.25,0.125,0.0625`` (a to e); or
``fedavg``, FedAvg on the whole network with the same settings. Every run leaves a run directory under
``--runs``; one that is there already is not run again, so that what was stopped goes on.

Written: a table (Markdown) of the last round's accuracy on the common test set, mean and standard deviation
over seeds, and with ``--plot`` a picture of accuracy over bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedkit.engine.plan import make_plan
from fedkit.models.cost import cost
from fedkit.models.narrow import at_width
from fedkit.report import size
from fedkit.settings import read_overrides

MIXES = ("1", "0.25", "1,0.0625", "1,0.5,0.25,0.125,0.0625", "fedavg")
# What FedAvg needs to be told to train as HeteroFL does.
ALIKE = {"weighting": "equal", "momentum": "0.9", "weight-decay": "0.0005", "clip-norm": "1"}


def main() -> None:
    """Run what is not there yet; write the table."""
    options = _options()
    rows = []
    for mix in options.mixes:
        summaries = [_summary(options, mix, seed) for seed in options.seeds]
        rows.append(_row(options, mix, summaries))
    text = _table(rows)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n")
    if options.plot:
        _plot(rows, options.plot)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), metavar="LEVELS")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="SEED")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-root", default="")
    parser.add_argument("--model", default="heterofl-cnn:0.25")
    parser.add_argument("--partition", default="iid")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runs", default="runs/heterofl", help="folder of the run directories")
    parser.add_argument("--out", default="", help="write the table there as well")
    parser.add_argument("--plot", default="", help="write a picture there (PNG)")
    parser.add_argument(
        "-o", dest="more", action="append", default=[], metavar="KEY=VALUE", help="any setting"
    )
    return parser.parse_args()


def _summary(options: argparse.Namespace, mix: str, seed: int) -> dict[str, Any]:
    folder = Path(options.runs) / f"{mix.replace(',', '-')}-seed-{seed}"
    file = folder / "summary.json"
    if not file.exists():
        settings = _settings(options, mix, seed)
        arguments = [f"-o{name}={value}" for name, value in settings.items()]
        print(f"{mix}, seed {seed} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "fedkit", "--quiet", "simulate", *arguments]
        command += ["--run-dir", str(folder)]
        status = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
        if status:
            sys.exit(f"The run for {folder} failed.")
    found: dict[str, Any] = json.loads(file.read_text())
    if found["status"] != "completed":
        sys.exit(f"{folder} holds a run that was stopped: remove it.")
    return found


def _settings(options: argparse.Namespace, mix: str, seed: int) -> dict[str, object]:
    common = {
        "dataset": options.dataset,
        "model": options.model,
        "partition": options.partition,
        "clients": options.clients,
        "rounds": options.rounds,
        "seed": seed,
        "alone": "false",
        "eval-every": options.rounds,
        "buffers": "static",
        **({"data-root": options.data_root} if options.data_root else {}),
    }
    own = (
        {"strategy": "fedavg", **ALIKE}
        if mix == "fedavg"
        else {"strategy": "heterofl", "levels": _sorted(mix), "widths": mix}
    )
    settings = {**common, **own, **read_overrides(options.more)}
    make_plan(settings, local=True)  # what is wrong is told before anything runs
    return settings


def _row(
    options: argparse.Namespace, mix: str, summaries: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    accuracies: dict[str, list[float]] = {}
    for summary in summaries:
        for label, accuracy in summary["server_models"].items():
            accuracies.setdefault(label, []).append(accuracy)
    widths = [1.0] if mix == "fedavg" else [float(width) for width in mix.split(",")]
    given = [widths[at % len(widths)] for at in range(options.clients)]
    return {
        "mix": mix,
        "accuracies": accuracies,
        "up": statistics.fmean(s["bytes_up"] / s["rounds"] / options.clients for s in summaries),
        "multiply_adds": statistics.fmean(_multiply_adds(options, width) for width in given),
    }


def _multiply_adds(options: argparse.Namespace, width: float) -> int:
    """Of one sample, forward."""
    plan = make_plan(_settings(options, "fedavg", options.seeds[0]), local=True)
    from fedkit.data.datasets import open_dataset

    dataset = open_dataset(options.dataset, plan.data)
    return cost(
        at_width(options.model, width), dataset.form.shape, len(dataset.classes)
    ).multiply_adds


def _table(rows: Iterable[dict[str, Any]]) -> str:
    lines = [
        "| widths | global | narrower levels | bytes up, client and round | multiply-adds, mean client |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        found = dict(row["accuracies"])
        whole = _spread(found.pop("global", []))
        narrow = ", ".join(
            f"{label.removeprefix('global-')}: {_spread(values)}" for label, values in found.items()
        )
        millions = f"{row['multiply_adds'] / 1e6:.2f} M"
        lines.append(
            f"| {row['mix']} | {whole} | {narrow or '-'} | {size(row['up'])} | {millions} |"
        )
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


def _sorted(mix: str) -> str:
    return ",".join(sorted(set(mix.split(",")), key=float, reverse=True))


def _plot(rows: Iterable[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for row in rows:
        values = row["accuracies"].get("global")
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            axes.errorbar(
                row["up"] / 1e3, statistics.fmean(values), spread, fmt="o", label=row["mix"]
            )
    axes.set_xlim(left=0)
    axes.set_xlabel("kB up, a client and round")
    axes.set_ylabel("accuracy on the common test set")
    axes.legend(title="widths")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
