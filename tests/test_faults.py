"""A few of the fault-injection trials; `make faults` runs many (docs/reliability.md)."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")

# The kind of the first fault, and the seed that draws the rest.
TRIALS = {"server-kill": 10, "client-kill": 11, "torn": 1}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    from faults.nursery import Nursery
    from faults.trial import CASES, run_trial, run_undisturbed

    folder, case, nursery = tmp_path_factory.mktemp("faults"), CASES[0], Nursery()
    try:
        undisturbed = run_undisturbed(case, folder / "undisturbed", nursery.start)
        with ThreadPoolExecutor(len(TRIALS)) as pool:
            running = {
                kind: pool.submit(
                    run_trial, seed, kind, case, undisturbed, folder / kind, nursery.start
                )
                for kind, seed in TRIALS.items()
            }
            return {kind: report.result() for kind, report in running.items()}
    finally:
        nursery.close()


@pytest.mark.parametrize("kind", TRIALS)
def test_a_run_that_was_disturbed_ends_as_one_that_was_not(reports, kind):
    report = reports[kind]
    assert not report.failures, (report.faults, report.folder)
    assert report.done, "the run was over before anything happened"
    assert report.equal or report.outcome.unmeasured, report.folder


def test_faults_are_drawn_alike_from_equal_seeds():
    import random

    from faults.kinds import KINDS, draw

    for kind in KINDS:
        first, again = (draw(kind, random.Random(7), 3, 5, 0.4) for _ in range(2))
        assert first == again
        assert kind in {fault.kind for fault in first}
