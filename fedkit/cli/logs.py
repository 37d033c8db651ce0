"""How logs and progress are written: as text for people, or one JSON object a line for machines."""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from fedkit.cli import terminal
from fedkit.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from fedkit.engine.events import Event
    from fedkit.settings import FederationSettings

FORMATS = ("text", "json")
# These come by the thousand; the run directory has them anyway.
DETAILS = frozenset({"metric", "bytes", "timing", "coefficients"})
_log = logging.getLogger("fedkit.run")
# Set once from the command line.
as_json = False


class Listening(Protocol):
    """What shows a run's progress."""

    def take(self, event: Event) -> None:
        """Show one event."""
        ...

    def close(self) -> None:
        """There is nothing more to show."""
        ...


def choose(format: str) -> str:
    """Write in that format from now on; ``UsageError`` if there is no such one."""
    global as_json
    if format not in FORMATS:
        raise UsageError(f"--log-format takes text or json, not {format!r}.")
    as_json = format == "json"
    return format


def set_up(*, debug: bool, verbose: bool, quiet: bool) -> None:
    """Send everything that is logged to stderr in the chosen format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # A program that reads the log wants to see joins and rounds, as people see them in the progress.
    told = verbose or (as_json and not quiet)
    level = logging.DEBUG if debug else logging.INFO if told else logging.WARNING
    logging.getLogger("fedkit").setLevel(level)
    logging.getLogger("flwr").setLevel(logging.DEBUG if debug else logging.ERROR)
    logging.captureWarnings(True)
    if not debug:
        warnings.formatwarning = lambda message, *where: f"Warning: {message}"


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time, level, logger, message, and what ``fields`` adds."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().strip().removeprefix("Warning: "),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class EventLog:
    """Writes a run's events to the log, in the place of the progress that people see."""

    def __init__(self, settings: FederationSettings) -> None:
        """The log of a run with these settings."""
        from fedkit.engine.history import History

        self._rounds = settings.rounds
        self._history = History()

    def take(self, event: Event) -> None:
        """Log one event: measurements one by one only with ``--debug``, rounds with their means."""
        self._history.take(event)
        if event.event == "round":
            if event.name == "seconds":
                row = self._history.last_round()
                self._write(logging.INFO, f"round {row['round']}/{self._rounds}", event, row)
            return
        level = logging.DEBUG if event.event in DETAILS else logging.INFO
        level = logging.WARNING if event.event == "warning" else level
        fields = {name: value for name, value in asdict(event).items() if value is not None}
        self._write(level, _sentence(event), event, fields)

    def close(self) -> None:
        """Nothing is held."""

    def _write(self, level: int, text: str, event: Event, fields: Mapping[str, Any]) -> None:
        told = {"event": event.event, **{name: _plain(value) for name, value in fields.items()}}
        _log.log(level, "%s", text, extra={"fields": told})


def progress(settings: FederationSettings, beside: Console | None = None) -> Listening:
    """What shows a run's progress, as the command line wants it; ``beside`` a bar on that console."""
    if as_json:
        return EventLog(settings)
    from fedkit.report import Progress

    return Progress(settings, quiet=terminal.quiet, beside=beside)


def write_error(sentence: str, error: Exception | None) -> None:
    """The last word of a command that failed, with the traceback of ``error`` if that is given."""
    if as_json:
        # Not through the logger: what was typed may be wrong before that is set up.
        trace = (type(error), error, error.__traceback__) if error is not None else None
        record = logging.LogRecord("fedkit", logging.ERROR, "", 0, "%s", (sentence,), trace)
        print(JsonFormatter().format(record), file=sys.stderr, flush=True)
        return
    if error is not None:
        import traceback

        traceback.print_exception(error)
    print(f"Error: {sentence}", file=sys.stderr, flush=True)


def _sentence(event: Event) -> str:
    if event.event == "warning":
        return str(event.name)
    if event.event == "listen":
        return f"listening at {event.name}"
    if event.event == "join":
        return f"client {event.client} joined: {event.name}, {event.value} samples"
    if event.event == "round_start":
        return f"round {event.round}: {event.n} clients at work"
    if event.event == "exchange":
        return f"round {event.round}: {event.exchange} done"
    if event.event == "stop":
        return f"the run ends: {event.value}"
    return " ".join(str(word) for word in (event.event, event.name) if word is not None)


def _plain(value: Any) -> Any:
    # JSON has no word for what a diverging model gives.
    return None if isinstance(value, float) and not math.isfinite(value) else value
