"""The ledger of clients: what it makes of events, that a replay gives the same, and fairness."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inprocess import InProcessFederation

from fedkit.engine.events import REWIND, Event
from fedkit.engine.history import History
from fedkit.engine.seen import Ledger, jain
from fedkit.engine.selection import Seen
from fedkit.rundir import RunDirectory, read_events


def ledger(*events):
    book = Ledger()
    for event in events:
        book.take(event)
    return book


def answered(round, client, exchange="train", seconds=2.0, transfer=0.5, size=100, loss=None):
    yield Event("bytes", round, exchange, client, "bytes_up", size)
    yield Event("timing", round, exchange, client, "seconds", seconds)
    yield Event("timing", round, exchange, client, "transfer-seconds", transfer)
    if loss is not None:
        name = "probe_loss" if exchange == "probe" else "train_loss"
        yield Event("metric", round, exchange, client, name, loss)


PROBED = (
    Event("round_start", 1, value=[0, 1, 2, 3], n=4),
    *answered(1, 0, "probe", 1.0, 0.25, 0, 2.5),
    *answered(1, 1, "probe", 4.0, 0.25, 0, 1.5),
    *answered(1, 3, "probe", 1.0, 0.25, 0, 1.0),
    Event("missed", 1, "probe", 2, "seconds", 30.0),
    Event("kept", 1, "train", value=[0, 3], n=3),
    *answered(1, 0, "train", 2.0, 0.5, 100, 0.7),
    *answered(1, 1, "train", 0.01, 0.01, 0),
    Event("missed", 1, "train", 3, "seconds", 20.0),
    *answered(1, 0, "evaluate", 9.0, 9.0, 999),
)


def test_a_probed_round_is_told_client_by_client():
    book = ledger(*PROBED)
    seen = book.before(2)
    assert seen[0] == Seen(
        (1,), (0.7,), (3.0,), (0.5,), (100,), probed=(1,), probe_seconds=(1.0,), probe_losses=(2.5,)
    )
    assert seen[1] == Seen(probed=(1,), rejected=(1,), probe_seconds=(4.0,), probe_losses=(1.5,))
    # A lost probe has taken as long as it was given.
    assert (seen[2].probe_seconds, seen[2].missed, seen[2].rejected) == ((30.0,), (1,), ())
    assert (seen[3].missed, seen[3].rounds) == ((1,), ())
    assert sorted(seen) == [0, 1, 2, 3] and len(seen) == 4 and 9 not in seen
    assert list(book.before(1)) == []
    assert book.took_part() == {0: 1, 1: 0, 2: 0, 3: 0}
    # The slowest probe, then the slowest of those that went on, as long as the lost one was given.
    assert book.latency(1) == 30.0 + 20.0
    assert book.bytes_up(1) == 100


def test_a_round_that_is_run_again_counts_once():
    again = Event(REWIND, 1), Event("round_start", 1, value=[1]), *answered(1, 1, loss=0.4)
    book = ledger(*PROBED, *again)
    assert dict(book.before(2)) == {1: Seen((1,), (0.4,), (2.0,), (0.5,), (100,))}
    assert book.took_part() == {1: 1}


def test_a_loss_that_was_not_told_is_nan():
    book = ledger(Event("round_start", 1, value=[0]), *answered(1, 0))
    assert math.isnan(book.before(2)[0].losses[0])


def test_a_client_that_says_odd_times_spoils_nothing():
    book = ledger(Event("round_start", 1, value=[0]), *answered(1, 0, seconds=-5.0, transfer=-1.0))
    assert (book.before(2)[0].seconds, book.before(2)[0].transfer_seconds) == ((0.0,), (0.0,))
    assert book.latency(1) == 0.0


def test_a_replay_from_the_file_knows_the_same(tmp_path):
    run = InProcessFederation(
        strategy="fedavg", model="lenet", clients=3, rounds=2, local_epochs=2, num_shards=40,
        partition="iid", select="drop:0.4", eval_samples=20,
    )  # fmt: skip
    run.run()
    directory = RunDirectory(tmp_path / "out")
    for event in run.events:
        directory.record(event)
    replayed = ledger(
        *(
            Event(**{k: v for k, v in r.items() if k != "time"})
            for r in read_events(tmp_path / "out")
        )
    )
    before = run.driver._known.seen.before(3)
    assert {c: asdict(before[c]) for c in before} == {
        c: asdict(replayed.before(3)[c]) for c in replayed.before(3)
    }
    assert sum(len(before[c].rejected) for c in before) == 2
    assert all(len(before[c].probed) == 2 for c in before)


def oracle(rounds, before, client):
    """What was seen of a client, from its parts in all rounds before one."""
    parts = {at: part[client] for at, part in rounds.items() if at < before and client in part}
    done = {at: loss for at, (what, loss) in parts.items() if what == "done"}
    return Seen(
        rounds=tuple(done),
        losses=tuple(done.values()),
        seconds=tuple(3.0 for _ in done),
        transfer_seconds=tuple(0.5 for _ in done),
        bytes_up=tuple(100 for _ in done),
        probed=tuple(parts),
        rejected=tuple(at for at, (what, _) in parts.items() if what == "stopped"),
        probe_seconds=tuple(1.0 for _ in parts),
        probe_losses=tuple(loss for _, loss in parts.values()),
    )


def play(book, at, part):
    """One probed round, in which each client is done, or stopped after the probe."""
    book.take(Event("round_start", at, value=sorted(part)))
    for client, (_, loss) in part.items():
        for event in answered(at, client, "probe", 1.0, 0.25, 0, loss):
            book.take(event)
    kept = [client for client, (what, _) in part.items() if what == "done"]
    book.take(Event("kept", at, "train", value=kept))
    for client in kept:
        for event in answered(at, client, loss=part[client][1]):
            book.take(event)


PARTS = st.dictionaries(
    st.integers(0, 3), st.tuples(st.sampled_from(["done", "stopped"]), st.floats(0, 9)), min_size=1
)


@given(st.lists(PARTS, min_size=1, max_size=8), st.data())
def test_what_is_seen_is_what_happened_whenever_it_is_asked_and_however_far_it_goes_back(
    rounds, data
):
    book, happened = Ledger(), {}
    for at, part in enumerate(rounds, 1):
        play(book, at, part)
        happened[at] = part
    back = data.draw(st.integers(1, len(rounds) + 1))
    book.take(Event(REWIND, back))
    happened = {at: part for at, part in happened.items() if at < back}
    again = data.draw(st.lists(PARTS, max_size=3))
    views = {}
    for at, part in enumerate(again, back):
        views[at] = book.before(at)
        play(book, at, part)
        happened[at] = part
    for before in (*range(1, back + len(again) + 2),):
        wanted = {
            client: oracle(happened, before, client)
            for client in range(4)
            if oracle(happened, before, client) != Seen()
        }
        assert dict(book.before(before)) == wanted
        # What a selector was given does not change behind its back.
        assert before not in views or dict(views[before]) == wanted
    counts = book.took_part()
    for client in range(4):
        assert counts.get(client, 0) == len(oracle(happened, 99, client).rounds)


def test_what_a_selector_is_shown_can_not_be_changed():
    with pytest.raises(TypeError):
        ledger(*PROBED).before(2)[0] = Seen()


def test_a_history_takes_its_counts_from_the_ledger_that_it_is_given():
    book = ledger(*PROBED)
    history = History(book)
    for event in PROBED:
        history.take(event)
    assert history._seen is book and book.took_part() == {0: 1, 1: 0, 2: 0, 3: 0}


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any))
def test_jains_index_lies_between_one_over_n_and_one(counts):
    assert 1 / len(counts) - 1e-12 <= jain(counts) <= 1 + 1e-12
    assert jain([3 * count for count in counts]) == pytest.approx(jain(counts))


def test_jains_index_by_hand():
    assert jain([4, 4, 4]) == 1
    assert jain([7, 0, 0, 0]) == 0.25
    assert jain([1, 2, 3]) == pytest.approx(36 / (3 * 14))
    assert jain([0, 0]) is None and jain([]) is None


def test_who_took_part_is_in_the_summary():
    run = InProcessFederation(
        strategy="fedavg", model="lenet", clients=4, rounds=3, local_epochs=1, num_shards=40,
        partition="iid", select="round-robin:1", eval_samples=20,
    )  # fmt: skip
    summary = run.run()
    assert [client["rounds"] for client in summary["clients"]] == [1, 1, 1, 0]
    assert summary["fairness"] == pytest.approx(jain([1, 1, 1, 0]))
    json.dumps(summary)


def test_who_did_not_answer_stays_known_when_the_round_is_skipped():
    missed = Event("missed", 1, "train", 0, "seconds", 5.0)
    start = Event("round_start", 1, value=[0, 1])
    book = ledger(start, *answered(1, 1), missed, Event(REWIND, 1, name="below the quorum"))
    assert book.before(2)[0].missed == (1,)
    assert book.took_part() == {0: 0}
    again = ledger(start, missed, Event(REWIND, 1), start, *answered(1, 0), *answered(1, 1))
    assert again.before(2)[0].missed == () and again.took_part() == {0: 1, 1: 1}


@pytest.mark.parametrize("seconds", [-1.0, 1e300, math.inf, math.nan])
def test_a_time_that_can_not_be_is_not_believed(seconds):
    book = ledger(Event("round_start", 1, value=[0]), *answered(1, 0, seconds=seconds))
    assert book.before(2)[0].seconds == (0.0,)


def test_who_only_says_that_it_heard_has_not_taken_part():
    book = ledger(Event("round_start", 1, value=[0]), *answered(1, 0, size=0))
    assert book.took_part() == {0: 0}
    # FedMD's last round sends nothing up, and is trained all the same.
    book = ledger(Event("round_start", 1, value=[0]), *answered(1, 0, size=0, loss=0.5))
    assert book.took_part() == {0: 1}
