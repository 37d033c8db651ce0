"""The learning rate of a client falls as its schedule says, round by round, through restarts."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import test_strategies
from flwr.app import ConfigRecord
from test_strategies import assert_same_bits, differs, federation, kept_model, ran

import clients.fedmd
import clients.private
from clients import schedule
from fedkit.flower import decode_records, encode_records, new_context
from fedkit.models.build import build_model
from fedkit.models.measure import measure

LITTLE = {"public": "digits:1000", "public_samples": 60}
KTPFL = test_strategies.KTPFL | LITTLE | {"distill_epochs": 0, "learning_rate": 0.01}
FEDMD = test_strategies.FEDMD | LITTLE
BASE = 0.08


class Client:
    """A schedule with nothing but what it reads: no data, no validation."""

    def __init__(self, kind, slot="own", rounds=10, factor=0.5, patience=2, by="round", warmup=0):
        self.edge = SimpleNamespace(
            settings=SimpleNamespace(rounds=rounds), private=SimpleNamespace(val=[]), models={}
        )
        self.context = new_context(2, {})
        self.slot, self.kind, self.factor, self.patience = slot, kind, factor, patience
        self.by, self.warmup = by, warmup

    def config(self, round):
        return ConfigRecord(
            {
                "learning-rate": BASE,
                "schedule": self.kind,
                "schedule-factor": self.factor,
                "schedule-patience": self.patience,
                "schedule-by": self.by,
                "warmup": self.warmup,
                "server-round": round,
            }
        )

    def rate(self, round):
        return schedule.rate(self.edge, self.context, self.slot, self.config(round))

    def rates(self, losses):
        """The rate of each round, when its training ends with that loss."""
        found = []
        for round, loss in enumerate(losses, 1):
            found.append(self.rate(round))
            schedule.observe(self.edge, self.context, self.slot, self.config(round), loss)
        return found


def test_plateau_halves_the_rate_every_third_round_of_a_constant_loss():
    """The first round sets the mark; three more without a better one, and three again."""
    rates = Client("plateau").rates([1.0] * 13)
    halvings = [BASE] * 4 + [BASE / 2] * 3 + [BASE / 4] * 3 + [BASE / 8] * 3
    assert rates == pytest.approx(halvings)


@pytest.mark.parametrize(("factor", "patience"), [(0.25, 0), (0.5, 1), (0.9, 3)])
def test_plateau_takes_the_factor_after_more_than_its_patience(factor, patience):
    rates = Client("plateau", factor=factor, patience=patience).rates([1.0] * 12)
    steps = [max(at - 1, 0) // (patience + 1) for at in range(12)]
    assert rates == pytest.approx([BASE * factor**step for step in steps])
    assert steps[-1] >= 2


def test_plateau_leaves_the_rate_while_the_loss_improves():
    assert Client("plateau").rates([1.0 - 0.05 * at for at in range(15)]) == [BASE] * 15


def test_plateau_waits_anew_after_each_better_loss():
    client = Client("plateau")
    assert client.rates([1.0, 1.0, 1.0, 0.9, 0.9, 0.9, 0.8, 0.8, 0.8]) == [BASE] * 9
    assert client.rate(10) == BASE
    assert client.rates([0.8]) == [BASE]
    assert client.rate(11) == BASE / 2


def test_plateau_takes_a_worse_loss_for_no_progress():
    assert Client("plateau").rates([1.0, 2.0, 3.0, 4.0, 5.0]) == [BASE] * 4 + [BASE / 2]


def test_plateau_takes_what_is_no_number_for_no_progress():
    nan = float("nan")
    assert Client("plateau").rates([1.0, nan, nan, nan, nan]) == [BASE] * 4 + [BASE / 2]


def test_plateau_goes_on_from_a_saved_state():
    losses = [1.0] * 9
    usual, client = Client("plateau"), Client("plateau")
    restarted = []
    for round, loss in enumerate(losses, 1):
        restarted.append(client.rate(round))
        schedule.observe(client.edge, client.context, "own", client.config(round), loss)
        saved = b"".join(encode_records(client.context.state))
        client.context = new_context(2, {})
        client.context.state = decode_records(saved)
    assert restarted == usual.rates(losses)
    assert restarted[-1] < BASE


def test_each_slot_has_a_schedule_of_its_own():
    own = Client("plateau")
    alone = Client("plateau", slot="alone")
    alone.context = own.context
    for round in range(1, 8):
        schedule.observe(own.edge, own.context, "own", own.config(round), 1.0)
        schedule.observe(alone.edge, own.context, "alone", own.config(round), 1.0 / round)
    assert own.rate(8) == BASE / 4
    assert alone.rate(8) == BASE


def test_cosine_starts_at_the_base_rate_and_falls_towards_nothing():
    rates = Client("cosine", rounds=20).rates([1.0] * 20)
    assert rates[0] == BASE
    assert rates[10] == pytest.approx(BASE / 2)
    assert all(later < earlier for earlier, later in pairwise(rates))
    assert 0 < rates[-1] < 0.01 * BASE


def test_cosine_of_one_round_is_the_base_rate():
    assert Client("cosine", rounds=1).rate(1) == BASE


def test_cosine_follows_the_round_and_not_how_often_a_client_took_part():
    client = Client("cosine", rounds=20)
    wanted = client.rate(15)
    client.rates([1.0] * 3)
    assert client.rate(15) == wanted


@pytest.mark.parametrize(
    ("patience", "steps"),
    [(2, [0, 0, 1, 1, 2, 2, 3]), (1, [0, 1, 2, 3, 4, 5, 6]), (0, [0, 1, 2, 3, 4, 5, 6])],
)
def test_step_multiplies_every_so_many_rounds(patience, steps):
    rates = Client("step", factor=0.3, patience=patience).rates([1.0 / at for at in range(1, 8)])
    assert rates == pytest.approx([BASE * 0.3**step for step in steps])


def test_constant_stays():
    client = Client("constant")
    assert client.rates([1.0] * 10) == [BASE] * 10
    assert not client.context.state


# In whole runs


@pytest.fixture
def used(monkeypatch):
    """The learning rates of the optimisers that clients make, as (slot, rate)."""
    made = []
    for module in (clients.private, clients.fedmd):
        make = module.make_optimiser

        def spy(name, model, rate, make=make, **more):
            made.append((model, rate))
            return make(name, model, rate, **more)

        monkeypatch.setattr(module, "make_optimiser", spy)
    return made


def rates_of(used, run, client, slot):
    model = run.context(client)._fedkit_edge.models[slot]
    return [rate for one, rate in used if one is model]


@pytest.fixture
def stuck(monkeypatch):
    """Training goes on as ever, and reports the same loss."""
    take_steps = clients.private.take_steps

    def stall(*args, **kwargs):
        take_steps(*args, **kwargs)
        return 1.0

    monkeypatch.setattr(clients.private, "take_steps", stall)


def test_plateau_halves_the_rate_of_a_run_that_makes_no_progress(used, stuck):
    settings = KTPFL | {"schedule": "plateau", "batch_size": 512}
    run, _ = ran(**settings, clients=2, rounds=7, eval_every=100)
    for client in (0, 1):
        # Two optimisers a round: one to train and one to distil.
        training = rates_of(used, run, client, "own")[0::2]
        assert training == pytest.approx([0.01] * 4 + [0.005] * 3)


def test_plateau_of_the_reference_is_its_own(used, stuck):
    settings = KTPFL | {"schedule": "plateau", "alone": True, "batch_size": 512}
    run, _ = ran(**settings, clients=2, rounds=6, eval_every=100)
    assert rates_of(used, run, 0, "alone") == pytest.approx([0.01] * 4 + [0.005] * 2)
    state = run.context(0).state
    assert {"own-schedule", "alone-schedule"} <= set(state)


@pytest.mark.parametrize("settings", [KTPFL, FEDMD], ids=lambda s: s["strategy"])
def test_a_client_rebuilt_from_its_state_keeps_its_place_in_the_schedule(settings, stuck):
    def change(kind, round, client, reply):
        del run.context(client)._fedkit_edge
        return reply

    settings = settings | {
        "schedule": "plateau",
        "schedule_patience": 0,
        "alone": True,
        "eval_every": 100,
    }
    usual, _ = ran(**settings, clients=2, rounds=4)
    run, _ = federation(change, **settings, clients=2, rounds=4)
    assert run.run()["digest"] == usual.summary["digest"]
    for slot in ("own", "alone"):
        rate = usual.strategy.hyper.learning_rate / 8
        assert usual.context(0).state[f"{slot}-schedule"]["rate"] == pytest.approx(rate)
        assert run.context(0).state[f"{slot}-schedule"]["rate"] == pytest.approx(rate)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("constant", [0.01] * 3), ("cosine", [0.01, 0.0075, 0.0025]), ("step", [0.01, 0.001, 0.0001])],
)
@pytest.mark.parametrize("settings", [KTPFL, FEDMD], ids=lambda s: s["strategy"])
def test_runs_follow_the_schedule(settings, kind, wanted, used):
    more = {"schedule": kind, "schedule_factor": 0.1, "schedule_patience": 1}
    more |= {"learning_rate": 0.01, "alone": True, "eval_every": 100}
    run, _ = ran(**settings | more, clients=1, min_clients=1, rounds=3)
    rates = rates_of(used, run, 0, "own")
    if settings is FEDMD:
        first, *rates = rates  # the initial training is at the first round's rate
        assert first == wanted[0]
    assert rates == pytest.approx([rate for rate in wanted for _ in range(2)])
    assert rates_of(used, run, 0, "alone") == pytest.approx(wanted)


def test_a_schedule_changes_what_is_learned():
    """An optimiser that goes on from its moments takes the new rate, not the one it had."""
    settings = FEDMD | {"schedule_patience": 1, "schedule_factor": 1e-6, "eval_every": 100}
    one, _ = ran(**settings, clients=1, min_clients=1, rounds=1)
    still, _ = ran(**settings, clients=1, min_clients=1, rounds=2, schedule="step")
    moved, _ = ran(**settings, clients=1, min_clients=1, rounds=2)
    before, after = kept_model(one, 0), kept_model(still, 0)
    assert max(abs(after[name] - before[name]).max() for name in before) < 1e-7
    other = kept_model(moved, 0)
    assert max(abs(other[name] - before[name]).max() for name in before) > 1e-4


def test_where_there_are_validation_data_plateau_follows_their_loss():
    """Not the training loss, which goes on falling: validation loss is best after the first round."""
    settings = KTPFL | {"val_fraction": 0.3, "schedule": "plateau", "schedule_patience": 0}
    settings |= {"learning_rate": 0.05, "optimiser": "adam", "eval_every": 100}
    seen = []

    def change(kind, round, client, reply):
        if kind == "train.local":
            edge = run.context(0)._fedkit_edge
            assert len(edge.private.val)
            data = run.view.data
            model = build_model("lenet", data.shape, data.outputs, 1)
            model.load_state_dict(run.context(0).state["own-model"].to_torch_state_dict())
            loss = measure(model, edge.private.val)[1]
            kept = run.context(0).state["own-schedule"]
            seen.append((loss, kept["best"], kept["rate"], reply.content["metrics"]["train_loss"]))
        return reply

    run, _ = federation(change, **settings, clients=1, min_clients=1, rounds=4)
    run.run()
    best, rate = float("inf"), 0.05
    for loss, told, now, trained in seen:
        assert told != pytest.approx(trained, rel=1e-3)
        # torch's ReduceLROnPlateau wants at least a ten-thousandth of progress.
        rate = rate if loss < best * (1 - 1e-4) else rate / 2
        best = loss if loss < best * (1 - 1e-4) else best
        assert told == pytest.approx(best)
        assert now == pytest.approx(rate)
    assert len(seen) == 4


def test_the_default_is_the_constant_rate():
    settings = KTPFL | {"eval_every": 100, "clients": 1, "min_clients": 1, "rounds": 2}
    one, _ = ran(**settings)
    other, _ = ran(**settings, schedule="constant")
    assert_same_bits(kept_model(one, 0), kept_model(other, 0))
    faster, _ = ran(**settings | {"schedule": "step", "schedule_patience": 1})
    assert differs(kept_model(one, 0), kept_model(faster, 0))
