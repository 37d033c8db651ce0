"""What ``fedkit server --resume`` goes on with: the run's own settings, its events, its checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from fedkit.engine.checkpoint import Checkpoint, Checkpoints
from fedkit.engine.events import Event, Listener
from fedkit.engine.history import History
from fedkit.engine.plan import Plan, make_plan
from fedkit.engine.state import ROUNDS_KEPT
from fedkit.errors import FedkitError, UsageError
from fedkit.rundir import has_begun, read_events
from fedkit.security.settings import ServerSecurity
from fedkit.settings import (
    DataSettings,
    RunSettings,
    ServerSettings,
    Value,
    key,
    merge,
    read_toml,
)

_log = logging.getLogger(__name__)
# What may differ from process to process: nothing that a number hangs on.
_FREE = frozenset(
    {
        *(
            key(f.name)
            for kind in (ServerSettings, ServerSecurity, DataSettings)
            for f in fields(kind)
        ),
        *("rounds", "min-clients", "round-timeout", "quorum", "below-quorum", "rejoin-wait"),
        *("until", "patience", "max-seconds", "max-bytes", "target"),
    }
)


def can_resume(run: Path) -> bool:
    """Whether a run was begun in that folder."""
    return has_begun(run) and all((run / name).exists() for name in ("config.toml", "nodes.json"))


def run_to_resume(resume: str | None, typed: Mapping[str, Value]) -> Path | None:
    """The folder of the run that ``--resume`` names; None where a new one begins.

    Raises:
        UsageError: ``auto`` without the folder in which the run is or will be.
    """
    if resume != "auto":
        return Path(resume) if resume is not None else None
    if not typed.get("run-dir"):
        raise UsageError(
            "--resume auto needs --run-dir, the folder in which the run is or will be."
        )
    run = Path(str(typed["run-dir"]))
    return run if can_resume(run) else None


def is_over(plan: Plan) -> bool:
    """Whether all rounds of the run are done already."""
    try:
        summary = json.loads((Path(plan.server.run_dir) / "summary.json").read_text())
        return bool(
            summary["status"] == "completed" and summary["rounds"] >= plan.federation.rounds
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def resumed_plan(run: Path, typed: Mapping[str, Value]) -> Plan:
    """The plan of a run that goes on: its own settings, with what was typed where that may change.

    Raises:
        UsageError: there is no such run, or a setting that may not change was given.
    """
    if not can_resume(run):
        raise UsageError(f"{run} holds no run that could be resumed.")
    elsewhere = merge(typed).get("run-dir")
    if elsewhere and Path(str(elsewhere)) != run:
        raise UsageError(f"A resumed run stays in its folder {run}: leave --run-dir out.")
    stored = read_toml(str(run / "config.toml"))
    for item in fields(RunSettings):
        stored.pop(key(item.name), None)
    # Clients know the address; a free port would be another one now.
    listen = (run / "address").read_text().strip() if (run / "address").exists() else None
    stored = merge(stored, {"run-dir": str(run)}, {"listen": listen} if listen else {})
    # First of all, since the other settings hang on it.
    _compare(run, "strategy", stored["strategy"], merge(typed).get("strategy", stored["strategy"]))
    # Files that were given anew may be gone where they were.
    free = {name: value for name, value in merge(typed).items() if name in _FREE - {"rounds"}}
    was = make_plan(merge(stored, free)).values()
    now = make_plan(merge(stored, typed, {"run-dir": str(run)}))
    if getattr(now.hyper, "schedule", "") == "cosine":
        # Which counts them.
        _compare(run, "rounds", was["rounds"], now.federation.rounds)
    for name, value in now.values().items():
        if name not in _FREE:
            _compare(run, name, was[name], value)
    return now


def _compare(run: Path, name: str, was: Value, now: Value) -> None:
    if was != now:
        raise UsageError(
            f"The run in {run} has --{name} {was}, and goes on with that, not with {now}: leave "
            f"--{name} out."
        )


def last_good(run: Path, history: History, *listeners: Listener) -> Checkpoint | None:
    """The newest checkpoint that is whole and fits the recorded events.

    ``history`` takes these in, and so do the other ``listeners``. None if the run was stopped before its
    first.

    Raises:
        FedkitError: the checkpoints that are left are too old: clients would train again on models that
            have gone on since.
    """
    begun = 0
    for record in read_events(run, everything=True):
        event = Event(**{name: value for name, value in record.items() if name != "time"})
        for take in (history.take, *listeners):
            take(event)
        begun = max(begun, record["round"] or 0)
    found = None
    for checkpoint in Checkpoints(run).newest():
        if history.digest(until=checkpoint.progress.round) == checkpoint.progress.digest:
            found = checkpoint
            break
        _log.warning("%s does not fit what metrics.jsonl holds: passed over.", checkpoint.folder)
    done = found.progress.round if found is not None else 0
    if begun - done > ROUNDS_KEPT:
        raise FedkitError(
            f"{run} was in round {begun}, and no checkpoint after round {done} is whole: clients can "
            f"repeat {ROUNDS_KEPT} rounds and no more. Restore {run / 'checkpoints'}, or start a new run."
        )
    return found
