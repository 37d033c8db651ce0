"""One trial: a federation of real processes, its faults, and how it ended."""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import time
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from .checks import Outcome, StateWatch, bad_endings, differences, read_outcome
from .kinds import DISKS, SCRIPTS, Fault, draw, mount, unmount
from .proxy import Proxy
from .services import Service, Start, left_over

LOOK_S = 0.02
_TAKEN: set[int] = set()
# Guards against hanging, not measurements.
LONGEST_S, GOODBYE_S = 400.0, 20.0
# A killed client is waited for, or its round repeated: nobody's answer is left out.
PATIENT = (
    *("--reconnect-grace", "60", "--rejoin-wait", "60", "--round-timeout", "200"),
    *("--quorum", "1.0", "--below-quorum", "repeat"),
)


@dataclass(frozen=True)
class Case:
    """Settings of a federation.

    Attributes:
        strategy: the algorithm.
        models: the clients' networks.
        options: hyper-parameters, such that a round takes part of a second.
        rounds: how many.
    """

    strategy: str
    models: tuple[str, ...]
    options: tuple[str, ...] = ()
    rounds: int = 5


CASES = (
    Case("fedmd", ("lenet", "cnn"), ("init-epochs=2", "digest-epochs=2", "revisit-epochs=2")),
    Case("ktpfl", ("lenet", "cnn", "lenet"), ("local-epochs=1", "distill-epochs=1")),
    Case("fedavg", ("cnn", "cnn"), ("local-epochs=1",)),
    Case(
        "feddf",
        ("lenet", "cnn"),
        ("local-epochs=1", "digest-epochs=1", "revisit-epochs=1", "steps=20", "workers=1"),
    ),
)


@dataclass
class Report:
    """What became of a trial.

    Attributes:
        seed: what repeats it.
        case: its settings.
        faults: those that were drawn.
        done: how many of them came before the run was over.
        seconds: how long it took.
        starts: starts of the server, and of all clients together.
        equal: whether the digest was that of the undisturbed run.
        failures: what should not be; empty if all is well.
        folder: where it is, if it failed.
        outcome: what the run gave.
    """

    seed: int
    case: Case
    faults: list[Fault]
    done: int = 0
    seconds: float = 0.0
    starts: tuple[int, int] = (0, 0)
    equal: bool = False
    failures: list[str] = field(default_factory=list)
    folder: Path | None = None
    outcome: Outcome | None = None


def run_trial(
    seed: int,
    kind: str,
    case: Case,
    undisturbed: Outcome,
    folder: Path,
    start: Start,
    *,
    keep: bool = False,
) -> Report:
    """The trial of that seed, whose first fault is of ``kind``; its folder stays only if it failed."""
    rng = random.Random(f"{seed}/{kind}/{case.strategy}")
    faults = draw(kind, rng, len(case.models), case.rounds, undisturbed.pace)
    report = Report(seed, case, faults)
    with _Trial(folder, report, rng, start) as trial:
        trial.to_the_end()
    if report.outcome is not None:
        report.equal = report.outcome.digest == undisturbed.digest
        report.failures += differences(report.outcome, undisturbed)
    _tidy(report, folder, keep)
    return report


def run_undisturbed(case: Case, folder: Path, start: Start) -> Outcome:
    """What a case gives when nothing befalls it."""
    report = Report(0, case, [])
    with _Trial(folder, report, random.Random(0), start) as trial:
        trial.to_the_end()
    if report.starts != (1, len(case.models)):
        report.failures.append(f"undisturbed, there were {report.starts} starts")
    assert report.outcome is not None and not report.failures, (report.failures, folder)
    _tidy(report, folder, keep=False)
    return report.outcome


class _Trial:
    """The stage on which a trial's faults are done."""

    def __init__(self, folder: Path, report: Report, rng: random.Random, start: Start) -> None:
        self.start = start
        self._report, self.folder = report, folder
        kinds = {fault.kind for fault in report.faults}
        self.disk = folder / "disk"
        self.run = (self.disk if "server-disk" in kinds else folder) / "run"
        on_disk = [f.victim for f in report.faults if f.kind == "client-disk"]
        self._states = [
            (self.disk if number in on_disk else folder) / f"client-{number}"
            for number in range(len(report.case.models))
        ]
        self._port = _free_port()
        self._with_disk, self._with_proxy = bool(kinds & {*DISKS}), "link" in kinds
        self._resume_auto = rng.random() < 0.5
        self._stay = [rng.random() < 0.5 for _ in self._states]
        self.proxy: Proxy | None = None
        self.server = Service("server", self._server_arguments, folder, 0.5, start)
        self.clients = [
            Service(f"client-{n}", lambda n=n: self.client_arguments(n), folder, 0.5, start)  # type: ignore[misc]
            for n in range(len(self._states))
        ]
        self._watch = StateWatch(self._states)
        self._stack = ExitStack()

    def __enter__(self) -> _Trial:
        self.folder.mkdir(parents=True)
        if self._with_disk:
            mount(self.disk)
            self._stack.callback(unmount, self.disk)
        if self._with_proxy:
            self.proxy = Proxy(self._port)
            self._stack.callback(self.proxy.close)
        for service in (self.server, *self.clients):
            self._stack.callback(service.end)
        return self

    def __exit__(self, *error: object) -> None:
        if self._report.failures and self._with_disk:
            # What is on the small disk goes with it.
            shutil.copytree(self.disk, self.folder / "disk-was", dirs_exist_ok=True)
        self._stack.close()

    def to_the_end(self) -> None:
        """Run it, do the faults, and look at what it gave."""
        started, report = time.monotonic(), self._report
        self.server.start()
        for client in self.clients:
            client.start()
        faults = self._do_faults(started)
        due: float | None = started
        while not self._is_over():
            if due is not None and time.monotonic() >= due:
                pause = next(faults, None)
                due = None if pause is None else time.monotonic() + pause
            self._look()
            if any(bad_endings(one.name, one.endings) for one in (self.server, *self.clients)):
                break  # it is told below
            if time.monotonic() - started > LONGEST_S:
                report.failures.append(f"it was not over after {LONGEST_S:.0f} seconds")
                break
            time.sleep(LOOK_S)
        else:
            self._say_goodbye()
            try:
                report.outcome = read_outcome(
                    self.run, self._states, self._watch, report.case.rounds
                )
            except AssertionError as error:
                report.failures.append(str(error))
        faults.close()
        report.seconds = time.monotonic() - started
        report.starts = self.server.starts, sum(client.starts for client in self.clients)
        for service in (self.server, *self.clients):
            service.end()
            report.failures += bad_endings(service.name, service.endings)
        left = left_over(self.folder)
        self.expect(not left, f"processes are left over: {left}")

    def client_arguments(self, number: int) -> list[str]:
        """The command of client ``number``."""
        port = self.proxy.port if self.proxy is not None else self._port
        return [
            *("client", "--server", f"127.0.0.1:{port}", "--data-shard", str(number)),
            *("--model", self._report.case.models[number], "--device", "cpu"),
            *("--state-dir", str(self._states[number])),
            *(("--stay",) if self._stay[number] else ("--max-wait-time", "120")),
        ]

    def expect(self, happened: bool, sentence: str) -> None:
        """Note the sentence as a failure unless ``happened``."""
        if not happened:
            self._report.failures.append(sentence)

    def _server_arguments(self) -> list[str]:
        if (self.run / "nodes.json").exists() and not self._resume_auto:
            return ["server", "--resume", str(self.run)]
        case, count = self._report.case, str(len(self._states))
        options = [word for option in case.options for word in ("-o", option)]
        return [
            *("server", "--strategy", case.strategy, "--model", case.models[0]),
            *("--rounds", str(case.rounds), "--min-clients", count, "--num-shards", count),
            *("--listen", f"127.0.0.1:{self._port}", "--run-dir", str(self.run)),
            *("--eval-samples", "64", *PATIENT, *options),
            *(("--resume", "auto") if self._resume_auto else ()),
        ]

    def _do_faults(self, started: float) -> Generator[float, None, None]:
        for fault in self._report.faults:
            while fault.round and not self._has_begun(fault.round):
                yield LOOK_S
            since = time.monotonic() - started
            yield fault.delay if fault.round else max(0.0, fault.delay - since)
            if self._has_completed():
                return
            self._report.done += 1
            yield from SCRIPTS[fault.kind](self, fault)

    def _has_begun(self, number: int) -> bool:
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return False
        return any(
            '"round_start"' in line and json.loads(line)["round"] >= number
            for line in lines
            if line.endswith("\n")
        )

    def _look(self) -> None:
        if self._has_completed():
            # A client that ends now has heard the goodbye.
            for client in self.clients:
                client.retire()
        for service in (self.server, *self.clients):
            service.watch()
        self._report.failures += [w for w in self._watch.look() if w not in self._report.failures]

    def _has_completed(self) -> bool:
        file = self.run / "summary.json"
        return file.exists() and json.loads(file.read_text())["status"] == "completed"

    def _is_over(self) -> bool:
        last = self.server.endings[-1] if self.server.endings else None
        return last is not None and last.code == 0 and not self.server.runs

    def _say_goodbye(self) -> None:
        """Let the clients end, or wait for the next run; then stop them, as an owner would."""
        for service in (self.server, *self.clients):
            service.retire()
        deadline = time.monotonic() + GOODBYE_S
        while time.monotonic() < deadline and not all(map(self._knows, self.clients)):
            self._look()
            time.sleep(LOOK_S)
        for client in self.clients:
            client.send(signal.SIGCONT)
            client.send(signal.SIGTERM)
        while any(client.runs for client in self.clients):
            self._look()
            self.expect(time.monotonic() < deadline + GOODBYE_S, "a client does not stop")
            if self._report.failures and time.monotonic() > deadline + GOODBYE_S:
                return
            time.sleep(LOOK_S)
        self._look()

    @staticmethod
    def _knows(client: Service) -> bool:
        return not client.runs or "Waiting for the next." in client.log.read_text()


def _tidy(report: Report, folder: Path, keep: bool) -> None:
    if report.failures or keep:
        report.folder = folder
    else:
        shutil.rmtree(folder)


def _free_port() -> int:
    # Below those that outgoing connections take: else one may have it while the server is away.
    while True:
        port = random.randint(20000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) and port not in _TAKEN:
                _TAKEN.add(port)
                return port
