"""The server process: listen, load, let clients in, drive the rounds, write the result."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedkit.engine.events import Event, Listener
from fedkit.engine.history import History
from fedkit.engine.lobby import Lobby
from fedkit.engine.plan import Plan
from fedkit.errors import FedkitError
from fedkit.link.server import LinkServer
from fedkit.rundir import RunDirectory, default_path

_log = logging.getLogger(__name__)
APART = frozenset({"query.join", "evaluate", "train.alone"})


class Stopped(Exception):
    """Somebody asked the server to stop before its last round."""


def serve(plan: Plan, listeners: Sequence[Listener] = ()) -> tuple[Path, dict[str, Any]]:
    """Run a federation as its server; returns the run directory and the summary.

    Args:
        plan: what to run.
        listeners: take every event, beside the run directory.

    Raises:
        FedkitError: the port is in use, files are missing, too few clients are left, ...
        Stopped, KeyboardInterrupt: it was asked to stop; the summary is written nevertheless.
    """
    federation = secrets.token_hex(8)
    lobby = Lobby(plan.federation, federation, one_model=plan.strategy.one_model)
    link = LinkServer(lobby.greet, lobby.part)
    address = link.listen(plan.server.listen)
    goodbye = "The server ended without a result."
    try:
        rundir = RunDirectory(Path(plan.server.run_dir or default_path(plan.federation.strategy)))
        rundir.write_config(plan.values())
        rundir.write_text("address", address)
        _log.info("Listening on %s, writing to %s.", address, rundir.path)
        summary = _Run(plan, link, federation, rundir, address, listeners).to_the_end()
        goodbye = f"The run is over: {summary['stop_reason']}."
    except FedkitError as error:
        goodbye = f"The server ended: {error}"
        raise
    except (Stopped, KeyboardInterrupt):
        goodbye = "The server was stopped."
        raise
    finally:
        link.close(goodbye)
    return rundir.path, summary


class _Run:
    """One run of a server, from loading to the summary."""

    def __init__(
        self,
        plan: Plan,
        link: LinkServer,
        federation: str,
        rundir: RunDirectory,
        address: str,
        listeners: Sequence[Listener],
    ) -> None:
        self._plan = plan
        self._link = link
        self._federation = federation
        self._rundir = rundir
        self._history = History()
        self._listeners = [rundir.record, self._history.take, *listeners]
        self._started = time.monotonic()
        self._emit(Event("listen", name=address))

    def to_the_end(self) -> dict[str, Any]:
        """All rounds, then the summary; on the way out of an error the summary says which."""
        from fedkit.engine.driver import Driver
        from fedkit.engine.facts import ServerView
        from fedkit.flower import take_identity
        from fedkit.link.grid import LinkGrid

        take_identity()
        view = ServerView(self._plan)
        self._rundir.write("partition.json", view.partition())
        strategy = self._plan.strategy(self._plan.hyper, view.facts(), self._emit)
        driver = Driver(
            strategy,
            LinkGrid(self._link, self._federation),
            self._plan.federation,
            self._emit,
            check=view.why_not,
            evaluate_fn=view.measure_global if strategy.one_model else None,
        )
        self._emit(Event("start", name=self._plan.federation.strategy))
        status, reason = "failed", "the server's own code failed"
        try:
            result = driver.run(strategy.initial_arrays())
            status, reason = "completed", "all rounds are done"
            if strategy.one_model:
                view.save_global(result.arrays, self._rundir.path / "models")
        except (Stopped, KeyboardInterrupt):
            status, reason = "stopped", "it was asked to stop"
            raise
        except FedkitError as error:
            reason = str(error)
            raise
        finally:
            members = list(driver.roster.members.values())
            summary = self._history.summary(
                self._plan.federation,
                self._plan.hyper.preset,
                members,
                status=status,
                stop_reason=reason,
                engine="grpc",
                seconds=time.monotonic() - self._started,
                sent_up=_training(self._link.bytes_received),
                sent_down=_training(self._link.bytes_sent),
            )
            self._emit(Event("stop", name=status, value=reason))
            self._rundir.write("summary.json", summary)
            self._rundir.close()
        return summary

    def _emit(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)


def _training(carried: Mapping[str, int]) -> int:
    """Bytes of what the algorithm sends: joining, measuring and the reference are apart."""
    return sum(size for kind, size in carried.items() if kind not in APART)
