"""Compare strategies over several seeds, each run a federation of real processes.

    python examples/compare.py --strategies fedmd,ktpfl --seeds 1,2,3

prints mean and spread (standard deviation over seeds) of the mean accuracy of four clients with four
different networks, alone and together. Any setting of `fedkit run` may follow, as KEY=VALUE.
"""

from __future__ import annotations

import argparse
import statistics

from fedkit import Federation

COLUMNS = {
    "own data, alone": "alone_personal_accuracy",
    "own data, together": "personal_accuracy",
    "common test, alone": "alone_global_accuracy",
    "common test, together": "global_accuracy",
}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--strategies", default="fedmd,ktpfl")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    extra = dict(pair.split("=", 1) for pair in arguments.settings)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    print(f"{'strategy':<10}", *(f"{name:>22}" for name in COLUMNS), "   seconds", sep="  ")
    for strategy in arguments.strategies.split(","):
        summaries = [Federation(strategy=strategy, seed=s, **extra).run().summary for s in seeds]
        cells = [_spread([_mean_of_clients(s, key) for s in summaries]) for key in COLUMNS.values()]
        seconds = statistics.fmean(summary["seconds"] for summary in summaries)
        print(
            f"{strategy:<10}", *(f"{cell:>22}" for cell in cells), f"{seconds:>10.0f}", sep="  ",
            flush=True,
        )  # fmt: skip


def _mean_of_clients(summary: dict, key: str) -> float:
    return statistics.fmean(client[key] for client in summary["clients"])


def _spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {spread:.3f}"


if __name__ == "__main__":
    main()
