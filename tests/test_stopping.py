"""When a run stops before its last round: by validation, time or bytes, never by test data."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inprocess import InProcessFederation

from fedkit.engine.events import REWIND, Event
from fedkit.engine.plan import make_plan
from fedkit.engine.stopping import Stopping, reached
from fedkit.errors import UsageError
from fedkit.settings import FederationSettings

SMALL = {
    "strategy": "fedavg",
    "model": "lenet",
    "clients": 3,
    "rounds": 4,
    "local_epochs": 1,
    "num_shards": 40,
    "partition": "iid",
    "val_fraction": 0.3,
    "alone": False,
}
OWN, GLOBAL = "own_model/own_val/accuracy", "global_model/own_val/accuracy"


def rules(*accuracies, name=OWN, **settings):
    """Rules that have seen mean validation accuracies, round by round; None: not measured."""
    stopping = Stopping(FederationSettings(val_fraction=0.1, **settings))
    for round, accuracy in enumerate(accuracies, 1):
        if accuracy is not None:
            # Two clients, of which one is a little better and one a little worse.
            for client, offset in enumerate((0.01, -0.01)):
                event = Event("metric", round, "evaluate", client, name, accuracy + offset)
                stopping.take(event)
    return stopping


def test_until_asks_for_the_mean_over_clients():
    assert rules(0.5, 0.79, until="val_accuracy=0.8").good_enough() is None
    reason = rules(0.5, 0.81, until="val_accuracy=0.8").good_enough()
    assert "0.8100 after round 2" in reason and "0.8 was wanted" in reason
    # That it was worse again afterwards changes nothing, also for a run that is resumed.
    assert rules(0.5, 0.81, 0.6, until="val_accuracy=0.8").good_enough() == reason


def test_the_own_model_counts_where_a_client_measures_two():
    stopping = rules(0.9, name=GLOBAL, until="val_accuracy=0.8")
    assert stopping.accuracy(1) == pytest.approx(0.9)
    stopping.take(Event("metric", 1, "evaluate", 0, OWN, 0.1))
    assert stopping.accuracy(1) == pytest.approx((0.1 + 0.89) / 2)
    assert stopping.good_enough() is None


@given(
    curve=st.lists(st.none() | st.floats(0.1, 0.9), min_size=1, max_size=15),
    patience=st.integers(1, 5),
)
def test_patience_is_the_rounds_since_the_best_measured_one(curve, patience):
    measured = {at: value for at, value in enumerate(curve, 1) if value is not None}
    reason = rules(*curve, patience=patience).good_enough()
    if not measured:
        assert reason is None
        return
    means = {at: ((value + 0.01) + (value - 0.01)) / 2 for at, value in measured.items()}
    best = next(at for at, value in means.items() if value == max(means.values()))
    assert (reason is not None) == (max(measured) - best >= patience)


@given(
    curve=st.lists(st.none() | st.floats(0.1, 0.9), min_size=1, max_size=12),
    back=st.integers(1, 12),
    again=st.lists(st.none() | st.floats(0.1, 0.9), max_size=6),
    patience=st.integers(0, 4),
    until=st.none() | st.floats(0.1, 0.9),
)
def test_rounds_that_are_run_again_are_judged_as_if_they_had_been_the_only_ones(
    curve, back, again, patience, until
):
    goal = "" if until is None else f"val_accuracy={until}"
    stopping = Stopping(FederationSettings(val_fraction=0.1, patience=patience, until=goal))

    def tell(curve, first):
        for round, accuracy in enumerate(curve, first):
            for client in range(2):
                stopping.take(Event("bytes", round, "train", client, "bytes_up", 10 * round))
                if accuracy is not None:
                    stopping.take(Event("metric", round, "evaluate", client, OWN, accuracy))
            stopping.good_enough()

    tell(curve, 1)
    stopping.take(Event(REWIND, back))
    tell(again, back)
    whole = [*curve[: back - 1], *[None] * (back - 1 - len(curve)), *again]
    for round, accuracy in enumerate([*whole, None], 1):
        found = stopping.accuracy(round)
        assert math.isnan(found) if accuracy is None else found == accuracy
    assert stopping._total() == sum(20 * at for at, _ in enumerate(whole, 1) if at < back + len(again)
                                    and (at >= back or at <= len(curve)))  # fmt: skip
    measured = {at: value for at, value in enumerate(whole, 1) if value is not None}
    reason = stopping.good_enough()
    good = [at for at, value in measured.items() if until is not None and value >= until]
    if good:
        assert f"after round {good[0]}," in reason
    elif measured:
        best = max(measured, key=lambda at: (measured[at], -at))
        assert (reason is not None) == (0 < patience <= max(measured) - best)
    else:
        assert reason is None


def test_a_model_that_diverged_is_no_better():
    stopping = rules(0.5, patience=2)
    for round in (2, 3):
        stopping.take(Event("metric", round, "evaluate", 0, OWN, math.nan))
    assert math.isnan(stopping.accuracy(2)) and stopping.good_enough() is None


def test_bytes_of_training_count_and_those_of_measuring_do_not():
    stopping = Stopping(FederationSettings(max_bytes=1000))
    for exchange, size in (("train", 400), ("probe", 500), ("evaluate", 9000), ("alone", 9000)):
        stopping.take(Event("bytes", 1, exchange, 0, "bytes_up", size))
    assert stopping.used_up(1e9) is None
    stopping.take(Event("bytes", 2, "train", 0, "bytes_down", 100))
    assert "1,000 bytes" in stopping.used_up(0.0)
    stopping.take(Event(REWIND, 2))
    assert stopping.used_up(0.0) is None


def test_seconds_are_the_runs():
    stopping = Stopping(FederationSettings(max_seconds=30.0))
    assert stopping.used_up(29.9) is None and "max-seconds is 30" in stopping.used_up(30.0)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"until": "mean_global_accuracy=0.8", "val_fraction": 0.1}, "only validation data"),
        ({"until": "val_accuracy=0.8"}, "set val-fraction"),
        ({"patience": 3}, "set val-fraction"),
        ({"until": "val_accuracy=80", "val_fraction": 0.1}, "from 0 to 1"),
        ({"until": "val_accuracy", "val_fraction": 0.1}, "NAME=NUMBER"),
        ({"until": "val_accuracy=nan", "val_fraction": 0.1}, "NAME=NUMBER"),
        ({"target": "mean_accuracy=0.8"}, "mean_global_accuracy"),
        ({"target": "mean_global_accuracy=high"}, "NAME=NUMBER"),
        ({"max_bytes": -1}, "at least 0"),
    ],
)
def test_rules_without_sense_are_refused_before_anything_starts(settings, why):
    with pytest.raises(UsageError, match=why):
        make_plan(settings)


ROWS = [
    {"round": 1, "seconds": 2.0, "bytes_up": 10, "bytes_down": 5, "mean_global_accuracy": 0.4},
    {"round": 2, "seconds": 3.0, "bytes_up": 10, "bytes_down": 5, "mean_global_accuracy": None},
    {"round": 3, "seconds": 4.0, "bytes_up": 10, "bytes_down": 5, "mean_global_accuracy": 0.8},
]


def test_a_target_is_recorded_with_what_it_took():
    assert reached("", ROWS) is None
    named = {"name": "mean_global_accuracy", "value": 0.8}
    assert reached("mean_global_accuracy=0.8", ROWS) == {
        **named, "round": 3, "seconds": 9.0, "bytes": 45,
    }  # fmt: skip
    missed = {"round": None, "seconds": None, "bytes": None}
    assert reached("mean_global_accuracy=0.81", ROWS) == {**named, "value": 0.81, **missed}


def test_a_run_ends_with_the_round_that_is_good_enough_and_says_why():
    run = InProcessFederation(**SMALL, until="val_accuracy=0.0", target="mean_global_accuracy=0.0")
    summary = run.run()
    assert summary["rounds"] == 1 and "0 was wanted" in run.driver.stop_reason
    assert summary["target"]["round"] == 1
    assert summary["target"]["bytes"] == summary["bytes_up"] + summary["bytes_down"]


def test_a_run_that_is_used_up_is_measured_whole_at_its_end():
    run = InProcessFederation(**SMALL, max_bytes=1, eval_every=3, eval_samples=2)
    run.run()
    assert run.over == [0, 1] and "max-bytes is 1" in run.driver.stop_reason
    measured = [e for e in run.events if e.name == "global_model/own_test/accuracy"]
    assert len(measured) == 3 and all(e.n > 2 for e in measured)


def test_a_run_that_goes_on_knows_that_it_had_enough():
    # With such a rate nothing is ever better than after the first round.
    settings = {**SMALL, "patience": 1, "learning_rate": 1e-12}
    run = InProcessFederation(**settings)
    run.run()
    assert run.over == [0, 1, 2] and "(patience)" in run.driver.stop_reason
    again = InProcessFederation(**settings)
    for event in run.events:
        again.driver._known.take(event)
    again.driver.run(run.result.arrays, 3)
    assert again.over == [] and again.driver.stop_reason == run.driver.stop_reason


def test_the_model_of_a_run_that_ended_early_is_its_last_rounds():
    run = InProcessFederation(**SMALL, max_seconds=1e-9)
    run.run()
    short = InProcessFederation(**{**SMALL, "rounds": 1})
    short.run()
    assert run.over == [0, 1]
    assert [a.data for a in run.result.arrays.values()] == [
        a.data for a in short.result.arrays.values()
    ]


@pytest.mark.parametrize("lie", [1e9, -1e9, math.nan, math.inf, None])
def test_one_client_that_tells_nonsense_neither_ends_the_run_nor_keeps_it_from_ending(lie):
    honest = (0.5, 0.6, 0.7)
    told = rules(*honest, until="val_accuracy=0.65")
    lied = Stopping(FederationSettings(val_fraction=0.1, until="val_accuracy=0.65"))
    for round, accuracy in enumerate(honest, 1):
        lied.take(Event("metric", round, "evaluate", 9, OWN, lie))
        for client, offset in enumerate((0.01, -0.01)):
            lied.take(Event("metric", round, "evaluate", client, OWN, accuracy + offset))
    assert lied.good_enough() == told.good_enough()
    assert "after round 3" in lied.good_enough()


def test_only_what_is_measured_after_a_round_counts():
    stopping = rules(0.5, until="val_accuracy=0.8")
    stopping.take(Event("metric", 1, "train", 0, OWN, 1.0))
    assert stopping.accuracy(1) == pytest.approx(0.5)
