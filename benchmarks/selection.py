"""What selection costs and saves: python benchmarks/selection.py [--dataset fashion-mnist] [--plot FILE]

Every selector takes the same simulated federations (data, devices, first network) through the same rounds:
small networks really train on non-IID data (80 % of a shard is one class, sizes follow a power law), and
time is that of emulated devices on a virtual clock (``strategies/selectors/simulator.py``). The seeds are
none that a policy was trained on. A line shows, as mean ± standard deviation over the seeds,

- accuracy of the global model on the test half, mean of the last three rounds, in percent;
- latency: the rounds' processing latency, summed, in seconds: the slowest probe, then the slowest of those
  that went on, the way down and up included; who is lost costs the timeout; and as a share of what it is
  with ``all`` in the same federation, since devices differ from seed to seed;
- up: bytes that came up; kept: clients a round whose work counted;
- objective: w1 * accuracy - w2 * latency - w3 * bytes, accuracy in points, latency and bytes in rounds of
  everybody, with the weights that the policy was trained for.

Those that are told how many to take are told FedMARL's number: ``as many`` drops at random, in each round
as many as FedMARL did, and probes nobody; ``drop`` does so after a probe, by the mean share. ``deadline``
gets FedMARL's mean latency of a round.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from fedkit.data.drawing import check_picture
from fedkit.devices.settings import ObjectiveSettings, SimulationSettings
from fedkit.engine.selection import Selector
from fedkit.registry import load, split
from fedkit.seeds import derive
from fedkit.settings import DataSettings
from strategies.selectors.comparison import AsMany, Result, simulate
from strategies.selectors.fedmarl import FedMARL
from strategies.selectors.policy import SHIPPED, load_policy
from strategies.selectors.samples import Samples, read_samples


def main() -> None:
    """Run all, print the table, write what was asked for."""
    options = _options()
    if options.plot:
        check_picture(options.plot)
    policy = load_policy(options.policy)
    settings = SimulationSettings(
        clients=options.clients,
        rounds=options.rounds,
        dataset=options.dataset,
        samples=options.samples,
        seed=options.seed,
    )
    samples = read_samples(options.dataset, DataSettings(data_root=options.data_root))
    results: dict[str, list[Result]] = {}
    for number in range(options.seeds):
        seeded = replace(settings, seed=derive(options.seed, "benchmark", round=number))
        for name, result in one_seed(FedMARL(policy), seeded, samples, policy.objective).items():
            results.setdefault(name, []).append(result)
            print(
                f"seed {number + 1} of {options.seeds}: {name:<12} {_line([result], results['all'][-1:])}",
                flush=True,
            )
    print(f"\n{settings}\n{policy.objective}\n")
    header = ("accuracy %", "latency s", "of all's", "up", "kept", "objective")
    print("".join([f"{'':<14}", *(f"{word:>18}" for word in header)]))
    for name, each in results.items():
        print(f"{name:<14}{_line(each, results['all'])}")
    if options.json:
        written = {name: [asdict(result) for result in each] for name, each in results.items()}
        options.json.write_text(json.dumps({"settings": asdict(settings), "results": written}))
    if options.plot:
        draw(results, options.plot)


def one_seed(
    fedmarl: FedMARL,
    settings: SimulationSettings,
    samples: Samples,
    objective: ObjectiveSettings,
) -> dict[str, Result]:
    """All selectors in one federation, by name."""

    def run(selector: Selector) -> Result:
        return simulate(selector, settings, samples, objective)

    def named(spec: str) -> Result:
        name, argument = split(spec)
        return run(load("selectors", name)(argument))

    ours = run(fedmarl)
    count = max(round(float(np.mean(ours.counts))), 1)
    dropped = 1 - count / settings.clients
    return {
        "all": named("all"),
        "fedmarl": ours,
        "as many": run(AsMany(ours.counts)),
        "drop": named(f"drop:{dropped:.3f}"),
        "uniform": named("uniform:0.5"),
        "power": named(f"power:{settings.clients},{count}"),
        "oort": named(f"oort:{count}"),
        "deadline": named(f"deadline:{ours.seconds / settings.rounds:.1f}"),
    }


def draw(results: Mapping[str, list[Result]], path: Path) -> None:
    """Accuracy against latency and against bytes, a point with its spread for each selector."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    axes = (("seconds", 1.0, "total latency, s"), ("bytes_up", 1e9, "bytes up, GB"))
    for panel, (field, unit, label) in zip(panels, axes, strict=True):
        for name, each in results.items():
            across = np.array([getattr(result, field) for result in each]) / unit
            up = 100 * np.array([result.accuracy for result in each])
            panel.errorbar(
                across.mean(), up.mean(), xerr=across.std(), yerr=up.std(), fmt="o", label=name
            )
            panel.annotate(name, (across.mean(), up.mean()), (5, 5), textcoords="offset points")
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy, %")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _line(each: list[Result], of_all: list[Result]) -> str:
    """Mean ± standard deviation of each column; ``of_all`` is what ``all`` came to, seed by seed."""

    def spread(values: list[float], digits: int) -> str:
        return f"{np.mean(values):,.{digits}f} ± {np.std(values):,.{digits}f}"

    pairs = zip(each, of_all, strict=True)
    sent = [result.bytes_up / 1e9 for result in each]
    cells = [
        spread([100 * result.accuracy for result in each], 1),
        spread([result.seconds for result in each], 0),
        spread([result.seconds / whole.seconds for result, whole in pairs], 2),
        f"{spread(sent, 1)} GB",
        spread([result.kept for result in each], 1),
        spread([result.objective for result in each], 1),
    ]
    return "".join(f"{cell:>18}" for cell in cells)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What selection costs and saves.")
    parser.add_argument("--dataset", default="digits", help="fashion-mnist needs its files")
    parser.add_argument("--data-root", default="", help="default: $FEDKIT_DATA_ROOT")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--policy", type=Path, default=SHIPPED)
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--plot", type=Path, help="draw them there (.png, .svg or .pdf)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
