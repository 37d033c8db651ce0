"""What a simulation has beside a local run: its workers."""

from __future__ import annotations

from dataclasses import dataclass

from fedkit.settings import setting


@dataclass(frozen=True)
class WorkerSettings:
    """Who does the work of simulated clients."""

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
