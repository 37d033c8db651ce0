"""Who is picked: each selector's rule, its draws, and that nothing it does stalls a round."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from flwr.app import ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import InProcessFederation
from scipy import stats

from fedkit.engine.checkpoint import Checkpoints, Progress
from fedkit.engine.choosing import Chooser
from fedkit.engine.roster import Member
from fedkit.engine.seen import Ledger
from fedkit.engine.selection import Outcome, Probe, Seen, Selector, View
from fedkit.errors import FedkitError, UsageError
from fedkit.registry import load, names, split
from fedkit.seeds import numpy_generator
from fedkit.settings import FederationSettings

OURS = ["all", "deadline:5", "drop:0.5", "oort", "oort:2", "power:4,2", "round-robin:2"]
OURS += ["uniform:0.5", "weighted", "weighted:0.5,0=3"]


def member(client, examples=10, tags=()):
    return Member(client + 2, client, f"client {client}", "lenet", examples, 1, "cpu", (), tags)


def members(count, **fields):
    return [member(client, **fields) for client in range(count)]


def view(people, seen=None, round=1, seed=1, warn=lambda text: None):
    generator = numpy_generator(seed, "clients", round=round)
    return View(round, people, seen or {}, generator, warn=warn)


def make(spec):
    name, argument = split(spec)
    return load("selectors", name)(argument)


def picked(spec, *arguments, **named):
    selector = make(spec)
    return sorted(one.client for one in selector.choose(view(*arguments, **named)))


def frequencies(spec, people, draws=4000):
    """How often each client is picked, over as many rounds."""
    selector, counts = make(spec), Counter()
    for round in range(draws):
        counts.update(one.client for one in selector.choose(view(people, round=round + 1)))
    return np.array([counts[one.client] for one in people], dtype=np.float64)


def told(loss, seconds=1.0, transfer=0.1, round=1):
    return Seen((round,), (loss,), (seconds,), (transfer,), (100,))


@pytest.mark.parametrize("spec", OURS)
def test_every_selector_has_the_interface(spec):
    assert isinstance(make(spec), Selector)
    assert make(spec).learn(Outcome(1, 0.5, 1.0, 10, (0,))) is None


def test_every_registered_selector_explains_itself():
    for name in names("selectors"):
        assert load("selectors", name).__doc__.startswith(name), name


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(OURS),
    sizes=st.lists(st.integers(0, 500), min_size=1, max_size=12),
    known=st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9), st.booleans()), max_size=12),
    seed=st.integers(0, 1000),
    round=st.integers(1, 300),
)
def test_picks_are_members_once_each_and_the_same_for_a_seed(spec, sizes, known, seed, round):
    people = [member(client, size) for client, size in enumerate(sizes)]
    seen = {
        client: told(math.nan if unknown else loss, seconds, 0.1, 1)
        for client, (loss, seconds, unknown) in enumerate(known[: len(people)])
    }
    chosen = make(spec).choose(view(people, seen, round, seed))
    clients = [one.client for one in chosen]
    assert len(set(clients)) == len(clients) and set(clients) <= set(range(len(people)))
    again = make(spec).choose(view(people, seen, round, seed))
    assert [one.client for one in again] == clients
    if sum(sizes) and not spec.startswith("deadline"):
        assert clients


@pytest.mark.parametrize(
    "spec",
    ["all:3", "uniform", "uniform:0", "uniform:1.5", "uniform:x", "round-robin", "round-robin:0",
     "round-robin:1.5", "power", "power:0", "power:2,3", "power:4,x", "oort:0", "oort:x",
     "deadline", "deadline:0", "deadline:inf", "deadline:soon", "drop", "drop:2", "tag", "tag:,",
     "weighted:2", "weighted:0.5,x", "weighted:0.5,0=-1", "weighted:0=nan", "weighted:a=1"],
)  # fmt: skip
def test_an_argument_without_sense_is_refused_with_the_name(spec):
    with pytest.raises(UsageError, match=split(spec)[0]):
        make(spec)


def test_uniform_draws_as_it_always_has():
    """FedAvg's runs of before this file hang on these draws."""
    people = members(20)
    for round in (1, 2, 7):
        generator = numpy_generator(3, "clients", round=round)
        wanted = sorted(generator.choice(20, size=6, replace=False))
        assert picked("uniform:0.3", people, round=round, seed=3) == wanted


@pytest.mark.parametrize("spec", ["uniform:0.25", "weighted:0.25,0=1", "weighted:0.25"])
def test_equal_weights_draw_as_uniform_does(spec):
    counts = frequencies(spec, members(8))
    assert counts.sum() == 2 * 4000
    # Two distinct clients a draw: cells are negatively correlated, so chi-square is conservative.
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize(
    ("spec", "sizes", "weights"),
    [
        ("weighted:0.1", [10, 20, 30, 40], [1, 2, 3, 4]),
        ("weighted:0.1,0=0.5,3=2", [10, 20, 30, 40], [0.5, 1, 1, 2]),
        ("weighted:0.1,1=0", [5, 5, 5], [1, 0, 1]),
    ],
)
def test_weighted_draws_by_samples_or_by_what_was_given(spec, sizes, weights):
    people = [member(client, size) for client, size in enumerate(sizes)]
    counts = frequencies(spec, people)
    wanted = 4000 * np.array(weights) / sum(weights)
    assert (counts[wanted == 0] == 0).all()
    assert stats.chisquare(counts[wanted > 0], wanted[wanted > 0]).pvalue > 1e-4


def test_candidates_of_power_of_choice_are_drawn_by_samples():
    people = [member(client, size) for client, size in enumerate([10, 20, 30, 40])]
    counts = frequencies("power:1", people)
    assert stats.chisquare(counts, 4000 * np.array([0.1, 0.2, 0.3, 0.4])).pvalue > 1e-4


def test_power_of_choice_takes_the_highest_losses_and_the_unknown_first():
    seen = {0: told(0.5), 1: told(2.0), 2: told(1.0), 3: told(math.nan)}
    assert picked("power:5,2", members(5), seen) == [3, 4]
    assert picked("power:4,2", members(4), seen) == [1, 3]
    assert picked("power:9,3", members(4), {**seen, 3: told(0.1)}) == [0, 1, 2]


@given(losses=st.lists(st.floats(0.01, 9), min_size=3, max_size=8, unique=True))
def test_power_of_choice_among_all_is_the_top_of_the_losses(losses):
    seen = {client: told(loss) for client, loss in enumerate(losses)}
    top = sorted(sorted(range(len(losses)), key=lambda client: -losses[client])[:2])
    assert picked(f"power:{len(losses)},2", members(len(losses)), seen) == top


def test_round_robin_gives_everybody_a_turn_also_beside_a_dead_client():
    people, turns = members(5), {}
    for round in range(1, 11):
        seen = {client: Seen(rounds=(at,)) for client, at in turns.items()}
        if 4 in turns:
            seen[4] = Seen(missed=(turns[4],))
        chosen = picked("round-robin:2", people, seen, round)
        turns |= dict.fromkeys(chosen, round)
        assert len(chosen) == 2
    assert min(turns.values()) > 10 - 3  # five clients in pairs: nobody waits for a fourth round


def utilities(people, seen, round):
    """Oort's formula once more, as written in the docstring."""
    gain = {c: people[c].examples * part.losses[-1] for c, part in seen.items()}
    span = max(gain.values()) - min(gain.values())
    times = {c: part.seconds[-1] + part.transfer_seconds[-1] for c, part in seen.items()}
    middle = np.median(list(times.values()))
    return {
        c: (gain[c] + span * np.sqrt(0.1 * np.log(round) / part.rounds[-1]))
        * min(1.0, (middle / times[c]) ** 2)
        for c, part in seen.items()
    }


@settings(deadline=None)
@given(
    known=st.lists(
        st.tuples(st.floats(0.1, 5), st.floats(0.1, 50), st.integers(1, 40)), min_size=4, max_size=9
    )
)
def test_oort_takes_the_highest_utilities_of_those_it_knows(known):
    people = members(len(known), examples=30)
    seen = {c: told(loss, time, 0.5, last) for c, (loss, time, last) in enumerate(known)}
    worth = utilities(people, seen, 50)
    chosen = picked("oort:2", people, seen, 50)
    least = min(worth[client] for client in chosen)
    assert all(worth[c] <= least + 1e-9 for c in worth if c not in chosen)


def test_oort_explores_less_and_less():
    people = members(40)
    seen = {client: told(1.0) for client in range(20)}
    fresh = [sum(c >= 20 for c in picked("oort:10", people, seen, round)) for round in (1, 30, 200)]
    assert fresh == [9, 5, 2]


def test_oort_prefers_the_fast_of_equals():
    seen = {client: told(1.0, 1.0 if client < 3 else 60.0) for client in range(6)}
    assert picked("oort:3", members(6), seen, 5) == [0, 1, 2]


def test_deadline_fits_as_many_as_are_through_in_time():
    times = {0: (1, 2), 1: (2, 2), 2: (8, 1), 3: (1, 9), 4: (3, 3)}
    seen = {c: told(1.0, train, send) for c, (train, send) in times.items()}
    # 0 is through at 3, 1 at 5, 4 at 8, 2 at 9; 3 would end at 18.
    assert picked("deadline:9", members(5), seen) == [0, 1, 2, 4]
    assert picked("deadline:8.5", members(5), seen) == [0, 1, 4]
    assert picked("deadline:2", members(5), seen) == []


def test_deadline_takes_the_unknown_for_usual_and_all_at_first():
    assert picked("deadline:1", members(3)) == [0, 1, 2]
    seen = {0: told(1.0, 4.0, 1.0), 1: told(1.0, 4.0, 1.0)}
    assert picked("deadline:7", members(3), seen) == [0, 1, 2]
    seen[2] = Seen(missed=(1,))
    assert picked("deadline:7", members(3), seen) == [0, 1]


def test_drop_probes_all_and_stops_a_share_of_them_evenly():
    selector, people, counts = make("drop:0.5"), members(6), Counter()
    assert selector.probes and list(selector.choose(view(people))) == people
    probes = {one.client: Probe(1.0, 1.0, 10) for one in people}
    for round in range(1, 2001):
        kept = selector.keep(view(people, round=round), probes)
        assert len(kept) == 3
        counts.update(one.client for one in kept)
    assert stats.chisquare([counts[c] for c in range(6)]).pvalue > 1e-4
    assert len(make("drop:1").keep(view(people), probes)) == 1
    assert len(make("drop:0.1").keep(view(people), probes)) == 6


def test_tags_are_found_and_unknown_ones_are_named_with_those_there_are():
    people = [
        member(0, tags=("lab",)),
        member(1, tags=("lab", "fast")),
        member(2),
        member(3, 5, ("z",)),
    ]
    said = []
    assert picked("tag:lab", people) == [0, 1]
    assert picked("tag:fast,z", people, warn=said.append) == [1, 3] and not said
    assert picked("tag:fast,moon", people, warn=said.append) == [1]
    assert said == [
        "no client has the tag moon (the tags of those that are connected: fast, lab, z)"
    ]


class Broken:
    """A plug-in that does what it should not."""

    probes = True

    def __init__(self, answer):
        self.answer = answer

    def choose(self, view):
        return self.answer()

    def keep(self, view, probes):
        return self.answer()

    def learn(self, outcome):
        self.answer()


def fail():
    raise ValueError("no idea")


@pytest.mark.parametrize(
    ("spec", "answer", "why"),
    [("all", list, "picked nobody"), ("all", fail, "failed: ValueError: no idea"),
     ("all", lambda: [member(77)], "picked nobody"), ("all", lambda: None, "failed: TypeError"),
     ("tag:moon", None, "failed: no client has the tag moon")],
)  # fmt: skip
def test_a_selector_that_picks_nobody_or_raises_takes_everyone_with_a_warning(spec, answer, why):
    said, people = [], members(3)
    chooser = Chooser(FederationSettings(select=spec), Ledger(), said.append)
    if answer is not None:
        chooser.selector = Broken(answer)
    assert chooser.choose(1, people) == people
    if answer is not None:
        assert chooser.keep(1, people, {}) == people
        chooser.learn(Outcome(1, 0.5, 1.0, 10, (0,)))
    assert why in said[0].name and "everyone takes part" in said[0].name
    assert all(event.event == "warning" and event.round == 1 for event in said)


class Bare:
    """A plug-in that has nothing but a choice: no ``probes``, no ``keep``, no ``learn``, no ``state``."""

    def choose(self, view):
        return view.members[:1]


class Crashing:
    """A plug-in that raises at whatever it is asked."""

    def __getattr__(self, name):
        raise RuntimeError(f"no {name} here")


class Odd:
    """A plug-in whose state is none that can be kept."""

    probes = False

    def __init__(self, state):
        self.state = state

    def choose(self, view):
        return view.members

    def keep(self, view, probes):
        return view.members

    def learn(self, outcome):
        pass


def run_with(selector):
    run = InProcessFederation(
        strategy="fedavg", model="logistic", clients=2, rounds=2, num_shards=40, partition="iid",
        alone=False, eval_samples=10,
    )  # fmt: skip
    run.driver.chooser.selector = selector
    return run, run.run()


def test_a_plug_in_that_lacks_what_a_selector_has_ends_no_run():
    run, summary = run_with(Bare())
    assert [client["rounds"] for client in summary["clients"]] == [2, 0]
    assert run.warnings()[0] == (
        "--select all failed: AttributeError: 'Bare' object has no attribute 'probes': nobody is probed"
    )
    assert run.driver.chooser.remembered(2) is None


def test_a_plug_in_that_always_crashes_ends_no_run():
    run, summary = run_with(Crashing())
    assert [client["rounds"] for client in summary["clients"]] == [2, 2]
    text = "\n".join(run.warnings())
    for part in ("nobody is probed", "everyone takes part", "did not learn"):
        assert part in text
    assert run.driver.chooser.remembered(2) is None
    assert "is not kept in the checkpoint: RuntimeError: no state here" in run.warnings()[-1]


@pytest.mark.parametrize("state", [{"a": 1}, 3, "text"])
def test_a_state_that_can_not_be_kept_is_told_of(state):
    said = []
    chooser = Chooser(FederationSettings(), Ledger(), said.append)
    chooser.selector = Odd(state)
    assert chooser.remembered(4) is None
    assert (said[0].event, said[0].round) == ("warning", 4)
    assert "a run that is resumed begins with it anew" in said[0].name


def test_a_state_comes_back_and_where_none_was_kept_the_selector_begins_anew(tmp_path):
    progress = Progress(4, "digest", 1.0, 2, 3, (member(0),), (2,))
    said = []
    chooser = Chooser(FederationSettings(), Ledger(), said.append)
    chooser.selector = Odd(Learned(np.ones(3), 4))
    Checkpoints(tmp_path / "with").save(progress, None, ArrayRecord(), chooser.remembered(4))
    Checkpoints(tmp_path / "without").save(progress, None, ArrayRecord(), None)
    for folder, rounds in (("with", 4), ("without", 0)):
        chooser.selector = Odd(Learned())
        (found,) = Checkpoints(tmp_path / folder).newest()
        chooser.recall(found)
        assert chooser.selector.state.rounds == rounds
    assert len(said) == 1 and "--select all begins anew" in said[0].name
    chooser.selector = Crashing()
    chooser.recall(found)
    assert "no state here" in said[1].name


def test_a_repeated_round_decides_nobodys_case_anew():
    chooser = Chooser(FederationSettings(select="drop:0.5"), Ledger(), lambda event: None)
    people = members(6)
    chooser.begin_round()
    first = chooser.keep(1, people[:4], {})
    again = chooser.keep(1, people, {})
    assert [one for one in again if one.client < 4] == first
    chooser.begin_round()
    assert len(chooser.keep(2, people, {})) == 3


@dataclass
class Learned:
    """What a selector of this file's remembers."""

    weights: np.ndarray = field(default_factory=lambda: np.zeros(3))
    rounds: int = 0


def test_what_a_selector_learned_is_in_the_checkpoint(tmp_path):
    progress = Progress(4, "digest", 1.0, 2, 3, (member(0, tags=("lab", "x")),), (2,))
    learned = Learned(np.array([0.1, -2.0, 3.0]), 4)
    Checkpoints(tmp_path).save(progress, None, ArrayRecord(), learned)
    (found,) = Checkpoints(tmp_path).newest()
    again = found.selector_state(Learned)
    assert again.rounds == 4 and (again.weights == learned.weights).all()
    assert found.progress.members == progress.members
    with pytest.raises(FedkitError, match="Learned"):
        found.selector_state(Progress)
