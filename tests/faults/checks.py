"""What must hold after a trial."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkit.engine.history import IN_DIGEST
from fedkit.engine.saved import OWN_MODEL, kept_model
from fedkit.engine.state import FederationState
from fedkit.errors import FedkitError
from fedkit.rundir import read_events

from .services import Ending


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        digest: the history's.
        lines: everything that is in it, counted.
        models: SHA-256 of each client's own model (empty where it has none) and the server's.
        unmeasured: what clients did not answer in the rounds that count.
        pace: seconds that a round took.
    """

    digest: str
    lines: Counter[str]
    models: dict[str, str]
    unmeasured: int
    pace: float


class StateWatch:
    """Sees that a client's state only ever goes forward."""

    def __init__(self, directories: list[Path]) -> None:
        self._directories = directories
        self._seen: dict[Path, int] = {}

    def look(self) -> list[str]:
        """What went wrong since the last look."""
        wrong = []
        for directory in self._directories:
            for file in directory.glob("*/manifest.json"):
                commit = int(json.loads(file.read_text())["commit"])
                if commit < self._seen.get(file, 0):
                    wrong.append(f"{file} went from commit {self._seen[file]} to {commit}")
                self._seen[file] = commit
        wrong += [f"{file} vanished" for file in self._seen if not file.exists()]
        return wrong

    def federations(self, directory: Path) -> list[Path]:
        """The folders of federations that were seen there."""
        return [file.parent for file in self._seen if file.parent.parent == directory]


def read_outcome(run: Path, directories: list[Path], watch: StateWatch, rounds: int) -> Outcome:
    """What a run gave; ``AssertionError`` if it is not whole."""
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "completed", f"summary.json says {summary['status']}"
    counted = [row["round"] for row in summary["history"]]
    assert counted == list(range(1, rounds + 1)), f"the history has the rounds {counted}"
    records = read_events(run)
    ended = [r["round"] for r in records if r["event"] == "round" and r["name"] == "seconds"]
    assert ended == counted, f"metrics.jsonl counts the rounds {ended}"
    models = {
        f"server/{f.name}": _sha256(f) for f in sorted((run / "models").glob("*.safetensors"))
    }
    for number, directory in enumerate(directories):
        models[f"client-{number}"] = _client_model(directory, watch, rounds)
    unanswered = [
        r for r in records if r["event"] == "warning" and "did not answer" in (r["name"] or "")
    ]
    wanted = ("event", "round", "exchange", "client", "name", "value", "n")
    lines = [json.dumps([r[k] for k in wanted]) for r in records if r["event"] in IN_DIGEST]
    seconds = [row["seconds"] for row in summary["history"]]
    return Outcome(
        digest=summary["digest"],
        lines=Counter(lines),
        models=models,
        unmeasured=len(unanswered),
        pace=sorted(seconds)[len(seconds) // 2],
    )


def differences(outcome: Outcome, undisturbed: Outcome) -> list[str]:
    """What is otherwise than in the undisturbed run, and should not be."""
    wrong = []
    if not outcome.unmeasured and outcome.digest != undisturbed.digest:
        wrong.append(f"the digest is {outcome.digest[:16]}, not {undisturbed.digest[:16]}")
    extra, missing = outcome.lines - undisturbed.lines, undisturbed.lines - outcome.lines
    if extra:
        wrong.append(f"{extra.total()} lines of the history are others, as {next(iter(extra))}")
    if missing and not outcome.unmeasured:
        wrong.append(f"{missing.total()} lines are missing, as {next(iter(missing))}")
    for name, sha in undisturbed.models.items():
        if outcome.models.get(name) != sha:
            wrong.append(f"the model {name} is another one")
    return wrong


def bad_endings(name: str, endings: list[Ending]) -> list[str]:
    """Processes that ended in another way than with a sentence of theirs."""
    wrong = []
    for ending in endings:
        if ending.code == 0 or (ending.ours and ending.code < 0):
            continue
        said = ending.sentence
        if ending.ours and ending.code == 130:
            continue
        if said is None or "own code failed" in said:
            wrong.append(f"{name} ended with {ending.code} and said {said!r} ({ending.log.name})")
    return wrong


def _client_model(directory: Path, watch: StateWatch, rounds: int) -> str:
    folders = watch.federations(directory)
    assert len(folders) == 1, f"{directory.name} keeps {len(folders)} federations"
    state = FederationState(folders[0], None)
    assert state.last_round == rounds, f"{directory.name} is in round {state.last_round}"
    if OWN_MODEL not in state.files:
        return ""  # a strategy whose clients keep none
    try:
        model = kept_model(folders[0])
    except FedkitError as error:
        raise AssertionError(f"{directory.name}'s model can't be loaded: {error}") from error
    sha = hashlib.sha256()
    for name, array in model.arrays.items():
        sha.update(name.encode() + str(array.dtype).encode() + array.tobytes())
    return sha.hexdigest()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
