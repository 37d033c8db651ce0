"""What people see: progress while a run goes on, and its result as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from fedkit.data.names import OWN
from fedkit.engine.events import Event
from fedkit.engine.history import ALL_DONE, History
from fedkit.registry import split
from fedkit.settings import FederationSettings


class Progress:
    """Prints a line a round, and in a terminal what is going on meanwhile."""

    def __init__(
        self,
        settings: FederationSettings,
        *,
        quiet: bool = False,
        beside: Console | None = None,
    ) -> None:
        """Progress of a run with these settings.

        Args:
            settings: of the federation.
            quiet: nothing but warnings.
            beside: where somebody else shows what is going on meanwhile.
        """
        self._rounds = settings.rounds
        self._wanted = settings.min_clients
        self._quiet = quiet
        self._console = beside or Console(stderr=True, highlight=False)
        self._silent = quiet or beside is not None
        self._history = History()
        self._status: Status | None = None

    def take(self, event: Event) -> None:
        """Show one event."""
        self._history.take(event)
        if event.event == "warning":
            self._print(f"[yellow]Warning:[/yellow] {escape(str(event.name))}", always=True)
        elif event.event == "listen":
            many = "s" if self._wanted > 1 else ""
            self._now(f"waiting for {self._wanted} client{many} at {event.name}")
        elif event.event == "join":
            self._print(
                f"client {event.client} joined: {escape(str(event.name))}, {event.value} samples"
            )
        elif event.event == "round_start":
            self._now(f"round {event.round}/{self._rounds}: {event.n} clients at work")
        elif event.event == "exchange":
            self._now(f"round {event.round}/{self._rounds}: {event.exchange} done")
        elif event.event == "round" and event.name == "seconds":
            self._print(self._round_line())
        elif event.event == "stop":
            self.close()

    def close(self) -> None:
        """Take the status line off the terminal."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _round_line(self) -> str:
        row = self._history.last_round()
        accuracies = "".join(
            f"  {name} {row[f'mean_{name}_accuracy']:.3f}"
            for name in ("personal", "global")
            if row[f"mean_{name}_accuracy"] is not None
        )
        return (
            f"round {row['round']:>{len(str(self._rounds))}}/{self._rounds}{accuracies}  "
            f"{row['seconds']:.1f} s  up {size(row['bytes_up'])}  down {size(row['bytes_down'])}"
        )

    def _print(self, text: str, *, always: bool = False) -> None:
        if always or not self._quiet:
            self._console.print(text, soft_wrap=True)

    def _now(self, text: str) -> None:
        if self._silent:
            return
        if not self._console.is_terminal:
            if text.startswith("waiting"):
                self._print(text)
        elif self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._status.update(text)


def print_result(summary: dict[str, Any], path: Path, *, as_json: bool = False) -> None:
    """The result of a run: a table of its clients, and where everything is."""
    if as_json:
        print(json.dumps({"run_dir": str(path), **summary}, indent=2))
        return
    console = wide_console()
    console.print(client_table(summary))
    # Where every client brings its own nothing was dealt.
    dealt = "" if split(summary["dataset"])[0] == OWN else f", {summary['partition']}"
    console.print(
        f"{summary['strategy']} (preset {summary['preset']}) on {summary['dataset']}{dealt}, "
        f"public set {summary['public']}, seed {summary['seed']}: "
        f"{summary['rounds']} rounds in {summary['seconds']:.1f} s",
        soft_wrap=True,
    )
    console.print(f"Digest {summary['digest'][:16]}; everything is in {path}", soft_wrap=True)
    for text in _told(summary):
        console.print(text, soft_wrap=True)
    at_server = summary["server_models"]
    if at_server:
        told = ", ".join(f"{label} {accuracy:.3f}" for label, accuracy in at_server.items())
        console.print(f"The server's own on the common test set: {told}", soft_wrap=True)
    for models, folder in (
        ("clients/client-*/*/model.safetensors", "clients"),
        ("models/*.safetensors", "models"),
    ):
        if (path / folder).is_dir():
            console.print(f"Models: {path / models}", soft_wrap=True)


def _told(summary: dict[str, Any]) -> list[str]:
    """Why it ended early, when its target was reached, and how evenly clients took part."""
    texts = []
    if summary["status"] == "completed" and summary["stop_reason"] != ALL_DONE:
        texts.append(f"It ended before its last round: {summary['stop_reason']}")
    target = summary["target"]
    if target is not None:
        wanted = f"{target['name']} {target['value']:g}"
        texts.append(
            f"{wanted} was not reached"
            if target["round"] is None
            else f"{wanted} was first reached in round {target['round']}, after "
            f"{target['seconds']:.1f} s and {size(target['bytes'])}"
        )
    if _unequal(summary):
        texts.append(f"Jain's index of how often each took part: {summary['fairness']:.3f}")
    return texts


def _unequal(summary: dict[str, Any]) -> bool:
    """Whether some clients took part more often than others."""
    return summary["fairness"] is not None and summary["fairness"] < 1


def client_table(summary: dict[str, Any]) -> Table:
    """Each client's model, shard and samples, its accuracy alone and together, its bytes."""
    clients = summary["clients"]
    alone = any(client["alone_global_accuracy"] is not None for client in clients)
    table = Table(
        title="Accuracy on the client's own test data, and on the common test set",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # so that it fits into 80 columns
        pad_edge=False,
    )
    # Where a client's number is its shard's, one column says both and 80 columns are enough.
    numbered = any(client["shard"] != client["id"] for client in clients)
    for name in (*(["client"] if numbered else []), "shard", "model", "samples"):
        table.add_column(name, justify="left" if name == "model" else "right")
    columns = ["personal_accuracy", "global_accuracy"]
    if alone:
        columns = ["alone_personal_accuracy", *columns[:1], "alone_global_accuracy", *columns[1:]]
    for name in columns:
        whose = "own" if "personal" in name else "common"
        how = "alone" if name.startswith("alone") else "together"
        table.add_column(f"{whose}\n{how}", justify="right")
    unequal = _unequal(summary)
    for name in (*(["rounds"] if unequal else []), "up", "down"):
        table.add_column(name, justify="right")
    for client in clients:
        table.add_row(
            *([str(client["id"])] if numbered else []),
            "-" if client["shard"] is None else str(client["shard"]),
            _model(client),
            str(client["examples"]),
            *(_accuracy(client[name]) for name in columns),
            *([str(client["rounds"])] if unequal else []),
            size(client["bytes_up"]),
            size(client["bytes_down"]),
        )
    if clients:
        table.add_section()
        means = [_mean([client[name] for client in clients]) for name in columns]
        table.add_row(
            "mean",
            *[""] * (3 if numbered else 2),
            *(_accuracy(mean) for mean in means),
            *(
                [f"{sum(client['rounds'] for client in clients) / len(clients):.1f}"]
                if unequal
                else []
            ),
            size(summary["bytes_up"] / len(clients)),
            size(summary["bytes_down"] / len(clients)),
        )
    return table


def _model(client: dict[str, Any]) -> str:
    """A client's network, and which share of its channels where that is not all."""
    spec, width = client["model"], client.get("width")
    named = width is None or spec.startswith("width:")
    return spec if named else f"{spec} at {width:g}"


def wide_console() -> Console:
    """The terminal; wide enough for a table where the output goes to a file."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110
    return console


def size(count: float) -> str:
    """Bytes for people: 1.3 MB is 1.3 million bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _accuracy(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
