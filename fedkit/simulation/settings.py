"""What a simulation has beside a local run: its workers."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fedkit.settings import setting


@dataclass(frozen=True)
class WorkerSettings:
    """Who does the work of simulated clients."""

    engine: str = setting(
        "processes",
        "who runs the clients: processes of this machine that share arrays, or Flower's simulation on ray, "
        "which also works across machines",
        choices=("processes", "ray"),
    )
    workers: int = setting(
        0,
        "processes that do the clients' work, of so many --threads each; 0: as many as the cores "
        "allow. The numbers do not hang on it",
        unit="processes",
        minimum=0,
    )
    batched: int = setting(
        1,
        "how many clients of one network train together in a worker, as one batched model; faster for "
        "small networks and on a GPU, and equal to one after the other but for rounding",
        unit="clients",
        minimum=1,
    )
    live_clients: int = setting(
        256,
        "how many clients' networks and data are held in memory, by all workers together; the others "
        "wait on disk",
        unit="clients",
        minimum=1,
    )
    keep_models: bool = setting(
        True, "write each client's own model into the run directory at the end"
    )


def cores() -> int:
    """Those that this process may use."""
    available = getattr(os, "sched_getaffinity", None)
    return len(available(0)) if available is not None else os.cpu_count() or 1
