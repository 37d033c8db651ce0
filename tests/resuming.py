"""A run that is broken off between two rounds, everybody killed, and goes on from what is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, RecordDict
from inprocess import InProcessFederation

from fedkit.engine.strategy_state import load_state, save_state
from fedkit.flower import decode_records, encode_records


class Killed(Exception):
    pass


class Broken(InProcessFederation):
    """Ends abruptly after a round."""

    def __init__(self, last: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.last = last

    def round_over(self, round: int, arrays: ArrayRecord) -> None:
        self.arrays = arrays
        if round == self.last:
            raise Killed


def resumed(folder: Path, after: int, **settings: Any) -> InProcessFederation:
    """The run's second half, in new processes as it were; its events are those of that half."""
    first = Broken(after, **settings)
    try:
        first.run()
    except Killed:
        first.strategy.close()
    run = InProcessFederation(**settings)
    for node_id, (_, old) in first.grid.apps.items():
        run.start_anew(node_id, old)
    if first.strategy.state is not None:
        save_state(folder / "state", first.strategy.state)
        run.strategy.state = load_state(folder / "state", type(run.strategy.state))
    kept = b"".join(encode_records(RecordDict({"arrays": first.arrays})))
    arrays = decode_records(kept).array_records["arrays"]
    run.result = run.driver.run(arrays, after + 1)
    run.strategy.close()
    return run


def measured(run: InProcessFederation, since: int = 1) -> list[tuple[Any, ...]]:
    """Everything that was measured from a round on."""
    return [
        (e.round, e.exchange, e.client, e.name, e.value)
        for e in run.events
        if e.event == "metric" and (e.round or 0) >= since
    ]
