"""Fault-injection trials with real processes.

    python -m tests.faults.trials --trials 50 --seed 1

Trial T of seed S draws its faults from S + T - 1. Its first fault is of the next kind in the list, so
that all come equally often; up to two more of any kind follow. A trial that fails keeps its folder, and
prints the command that repeats it.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .checks import Outcome
from .kinds import DISKS, KINDS, why_no_disk
from .nursery import Nursery
from .services import Start, start_afresh
from .trial import CASES, Case, Report, run_trial, run_undisturbed


class Undisturbed:
    """What each case gives without faults; each is run once."""

    def __init__(self, folder: Path, start: Start) -> None:
        """``folder``: where they run; ``start`` starts a process."""
        self._start = start
        self._folder = folder
        self._outcomes: dict[Case, Outcome] = {}
        self._locks = {case: threading.Lock() for case in CASES}

    def __call__(self, case: Case) -> Outcome:
        """That of ``case``."""
        with self._locks[case]:
            if case not in self._outcomes:
                name = f"undisturbed-{case.strategy}"
                self._outcomes[case] = run_undisturbed(case, self._folder / name, self._start)
            return self._outcomes[case]


def main() -> int:
    """Run trials; the exit code is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=50, help="how many (default: 50)")
    parser.add_argument("--seed", type=int, default=1, help="of the first trial (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="trials side by side (default: 1)")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no trial after so long"
    )
    parser.add_argument("--kind", choices=KINDS, help="the first fault of every trial")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="keep the folders of all trials")
    parser.add_argument(
        "--fresh", action="store_true", help="start interpreters anew, and do not fork them"
    )
    typed = parser.parse_args()
    folder = typed.folder or Path(tempfile.mkdtemp(prefix="fedkit-faults-"))
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [typed.kind] if typed.kind else usable_kinds(folder)
    nursery = None if typed.fresh else Nursery()
    start = nursery.start if nursery is not None else start_afresh
    undisturbed, started = Undisturbed(folder, start), time.monotonic()

    def one(seed: int) -> Report | None:
        if time.monotonic() - started > 60 * typed.minutes:
            return None
        kind, case = kinds[seed % len(kinds)], CASES[seed % len(CASES)]
        outcome = undisturbed(case)
        where = folder / f"trial-{seed}"
        report = run_trial(seed, kind, case, outcome, where, start, keep=typed.keep)
        print(told(report, kind), flush=True)
        return report

    with ThreadPoolExecutor(typed.jobs) as pool:
        seeds = range(typed.seed, typed.seed + typed.trials)
        reports = [report for report in pool.map(one, seeds) if report is not None]
    if nursery is not None:
        nursery.close()
    print_table(reports)
    failed = sum(bool(report.failures) for report in reports)
    print(f"{len(reports)} trials, {failed} failed, {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


def usable_kinds(folder: Path) -> list[str]:
    """The kinds of fault that this machine allows."""
    reason = why_no_disk(folder)
    if reason is None:
        return list(KINDS)
    print(f"No full disks: {reason}")
    return [kind for kind in KINDS if kind not in DISKS]


def told(report: Report, kind: str) -> str:
    """One trial as text."""
    faults = "; ".join(map(str, report.faults))
    server, clients = report.starts
    how = f"{outcome_of(report)} in {report.seconds:.0f} s: {report.done} of {len(report.faults)} faults"
    starts = f"{server} of the server, {clients} of {len(report.case.models)} clients"
    lines = [f"seed {report.seed}: {report.case.strategy}: {faults}", f"  {how}; starts: {starts}"]
    lines += [f"  FAILED: {failure}" for failure in report.failures]
    if report.failures:
        repeat = f"python -m tests.faults.trials --trials 1 --seed {report.seed} --kind {kind}"
        lines += [f"  It is in {report.folder}; again: {repeat}"]
    return "\n".join(lines)


def outcome_of(report: Report) -> str:
    """How a trial ended, in two words."""
    if report.failures:
        return "failed"
    return "equal history" if report.equal else "equal but for measurements not made"


def print_table(reports: list[Report]) -> None:
    """Outcomes by kind of fault; a trial with several faults stands under each of them."""
    rows: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for report in reports:
        for number, fault in enumerate(report.faults):
            row = rows[fault.kind]
            row["drawn"] += 1
            row["done"] += number < report.done
        for kind in {fault.kind for fault in report.faults[: report.done]}:
            rows[kind]["trials"] += 1
            rows[kind][outcome_of(report)] += 1
    columns = ("done", "trials", "equal history", "equal but for measurements not made", "failed")
    print("\n| fault | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for kind, row in rows.items():
        if row["drawn"]:
            print(f"| {kind} | " + " | ".join(str(row[column]) for column in columns) + " |")
    print()


if __name__ == "__main__":
    sys.exit(main())
