"""Simulated federations: real training, a virtual clock, and what selectors are told."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import typer
from fedmarl_toys import policy_of
from typer.testing import CliRunner

from fedkit.cli import selector
from fedkit.devices.settings import ObjectiveSettings, SimulationSettings
from fedkit.errors import FedkitError, UsageError
from fedkit.settings import DataSettings
from strategies.selectors import perceptrons, samples
from strategies.selectors.comparison import AsMany, simulate
from strategies.selectors.fedmarl import FedMARL
from strategies.selectors.plain import Everyone, Uniform
from strategies.selectors.policy import load_policy
from strategies.selectors.samples import read_samples
from strategies.selectors.simulator import CostsOnly, Simulation
from strategies.selectors.training import FedMARLTrainer, varied

SMALL = SimulationSettings(clients=8, rounds=3, epochs=3, samples=400, hidden=8)


@pytest.fixture(scope="module")
def digits():
    return read_samples("digits", DataSettings())


class Probing(Everyone):
    """Probes all, keeps those that a function names, and remembers what it saw."""

    probes = True

    def __init__(self, pick):
        self.pick = pick
        self.views, self.probed, self.outcomes = [], [], []

    def keep(self, view, probes):
        self.views.append(view)
        self.probed.append(dict(probes))
        return [member for member in view.members if self.pick(member.client)]

    def learn(self, outcome):
        self.outcomes.append(outcome)


def test_keeping_all_after_a_probe_trains_the_same_networks(digits):
    plain = Simulation(SMALL, digits).run(Everyone(None))
    probed = Simulation(SMALL, digits).run(FedMARL(policy_of()))
    assert [each.test_accuracy for each in plain] == [each.test_accuracy for each in probed]
    assert [each.outcome.accuracy for each in plain] == [e.outcome.accuracy for e in probed]


def test_a_round_is_compared_with_itself_if_everybody_had_gone_on(digits):
    """The first round's comparison is that of a federation that keeps all; who decides changes nothing."""
    compared = []
    few = Simulation(SMALL, digits, compared.append)
    rounds = few.run(Probing(lambda client: client < 3))
    alone = Simulation(SMALL, digits).run(Probing(lambda client: client < 3))
    assert [each.outcome for each in rounds] == [each.outcome for each in alone]
    everybody = Simulation(SMALL, digits).run(Probing(lambda client: True))
    assert compared[0] == everybody[0].outcome
    assert [each.round for each in compared] == [1, 2, 3]
    assert all(len(each.kept) + len(each.lost) > 3 for each in compared)
    of_all = []
    Simulation(SMALL, digits, of_all.append).run(probing := Probing(lambda client: True))
    assert of_all == probing.outcomes


def test_seeds_reproduce_and_differ(digits):
    def outcomes(seed):
        return [
            r.outcome for r in Simulation(replace(SMALL, seed=seed), digits).run(Uniform("0.5"))
        ]

    assert outcomes(1) == outcomes(1) != outcomes(2)


def test_a_round_s_latency_is_the_slowest_probe_and_the_slowest_of_those_that_go_on(digits):
    """H_t = max_n H^p_n + max_{n kept}(H^rest_n + H^u_n), by hand; the way down counts with the probe."""
    settings = replace(SMALL, profiles="pi4,laptop", rounds=1)
    simulation = Simulation(settings, digits)
    probing = Probing(lambda client: client % 2 == 0)
    (only,) = simulation.run(probing)
    devices = simulation.devices
    counts = [member.examples for member in simulation.members]
    size = 45_000_000
    work = [n * 0.01 * device.slowdown(0.0) for n, device in zip(counts, devices, strict=True)]
    first = [w + device.down_seconds(size, 0.0) for w, device in zip(work, devices, strict=True)]
    rest = [
        2 * n * 0.01 * devices[at].slowdown(max(first)) + devices[at].up_seconds(size, max(first))
        for at, n in enumerate(counts)
        if at % 2 == 0
    ]
    assert only.outcome.seconds == pytest.approx(max(first) + max(rest))
    assert only.outcome.kept == (0, 2, 4, 6) and only.outcome.bytes_up == 4 * size
    assert [probing.probed[0][at].seconds for at in range(8)] == pytest.approx(work)


def test_what_is_seen_of_a_client_is_what_it_did(digits):
    probing = Probing(lambda client: client < 3)
    simulation = Simulation(replace(SMALL, profiles="pi4", rounds=3), digits)
    rounds = simulation.run(probing)
    last = probing.views[-1].seen
    for client in range(8):
        worked = [r.outcome.round for r in rounds[:2] if client in r.outcome.kept]
        assert list(last[client].rounds) == worked
        assert len(last[client].transfer_seconds) == len(last[client].losses) == len(worked)
    assert list(last[7].rejected) == [1, 2] and last[0].rejected == ()
    assert all(math.isfinite(loss) for loss in last[0].losses)


def test_a_selector_that_picks_nobody_gets_everybody(digits):
    (first, *_) = Simulation(SMALL, digits).run(Probing(lambda client: False))
    assert len(first.outcome.kept) + len(first.outcome.lost) >= 7


def test_the_lost_are_waited_for_and_charged_no_bytes(digits, tmp_path):
    """Devices that drop out in every other minute, and rounds of many minutes."""
    kind = tmp_path / "flaky.toml"
    kind.write_text("slowdown=40\nup-mbit=9\ndown-mbit=9\nlatency=0.1\ndrop=0.3\nback=0.5\n")
    settings = replace(SMALL, profiles=f"laptop,{kind}", rounds=4)
    simulation = Simulation(settings, digits)
    outcomes = [each.outcome for each in simulation.run(Everyone(None))]
    assert any(outcome.lost for outcome in outcomes)
    for outcome in outcomes:
        assert outcome.bytes_up == len(outcome.kept) * 45_000_000
        assert not outcome.lost or outcome.seconds == simulation.timeout
        assert not set(outcome.lost) & set(outcome.kept)


def test_dropping_saves_bytes_and_the_accuracy_is_measured(digits):
    few, all_ = (
        simulate(AsMany([count] * 12), replace(SMALL, rounds=12), digits, ObjectiveSettings())
        for count in (1, 8)
    )
    assert few.bytes_up < all_.bytes_up / 4
    assert few.accuracy < all_.accuracy
    assert 0.5 < all_.accuracy <= 1


def test_perceptrons_take_the_steps_of_autograd():
    """Two networks of different sizes of data beside each other, against torch in float64, one by one."""
    import torch

    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((30, 5)).astype(np.float32)
    labels = generator.integers(3, size=30)
    orders = [generator.permutation(30)[:20], generator.permutation(30)[:7]]
    start = perceptrons.initial(5, 4, 3, generator)
    start = (*start[:2], generator.standard_normal((4, 3)).astype(np.float32), start[3])
    stack = perceptrons.copies(start, 2)
    losses = perceptrons.train_epoch(stack, inputs, labels, orders, rate=0.3, batch=8)
    for at, order in enumerate(orders):
        weights = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in start]
        total = 0.0
        for first in range(0, len(order), 8):
            batch = order[first : first + 8]
            x, y = torch.tensor(inputs[batch], dtype=torch.float64), torch.tensor(labels[batch])
            scores = torch.relu(x @ weights[0] + weights[1]) @ weights[2] + weights[3]
            loss = torch.nn.functional.cross_entropy(scores, y)
            gradients = torch.autograd.grad(loss, weights)
            total += float(loss.detach()) * len(batch)
            weights = [
                (w - 0.3 * g).detach().requires_grad_()
                for w, g in zip(weights, gradients, strict=True)
            ]
        assert losses[at] == pytest.approx(total / len(order), rel=1e-4)
        for found, wanted in zip(stack, weights, strict=True):
            np.testing.assert_allclose(found[at], wanted.detach().numpy(), atol=1e-5)


def test_a_network_does_not_depend_on_who_trains_beside_it():
    generator = np.random.default_rng(1)
    inputs = generator.standard_normal((40, 6)).astype(np.float32)
    labels = generator.integers(3, size=40)
    orders = [generator.permutation(40)[:count] for count in (30, 20, 10)]
    start = perceptrons.initial(6, 5, 3, generator)

    def trained(who):
        stack = perceptrons.copies(start, len(who))
        perceptrons.train_epoch(stack, inputs, labels, [orders[n] for n in who], rate=0.1, batch=8)
        return perceptrons.some(stack, [len(who) - 1])

    for together, alone in zip(trained([0, 1, 2]), trained([2]), strict=True):
        assert (together == alone).all()


def test_where_nobody_trains_a_round_costs_the_same(digits):
    """Seconds, bytes and who is lost are those of the federation that trains; accuracy stays 0."""
    trained, costed = (
        [each.outcome for each in kind(SMALL, digits).run(Probing(lambda client: client % 3))]
        for kind in (Simulation, CostsOnly)
    )
    assert costed == [replace(outcome, accuracy=0.0) for outcome in trained]
    first, second = (CostsOnly(SMALL, digits), CostsOnly(SMALL, digits))
    seen = [Probing(lambda client: True) for _ in range(3)]
    other = CostsOnly(replace(SMALL, seed=2), digits)
    for probing, federation in zip(seen, (first, second, other), strict=True):
        federation.run(probing)
    assert seen[0].probed == seen[1].probed != seen[2].probed


def test_cost_episodes_teach_to_drop_the_slowest(digits, tmp_path):
    """A device in four is thirty times as slow: dropped in training where nothing but seconds counts."""
    kinds = []
    for name, slowdown in (("slow", 60), ("fast", 2)):
        kinds.append(tmp_path / f"{name}.toml")
        kinds[-1].write_text(
            f"slowdown={slowdown}\nup-mbit=35\ndown-mbit=79\nlatency=0.01\nspread=0.1\n"
        )
    profiles = ",".join(map(str, (kinds[0], *[kinds[1]] * 3)))
    small = replace(SMALL, profiles=profiles, rounds=6, partition="iid")
    options = {"cost-episodes": 16, "min-share": 0.75, "history": 1, "discount": 0, "hidden": 16}
    options |= {"agent-rate": 0.003, "agent-batch": 16, "updates": 4, "epsilon": 0.1}
    told = []

    def trained(name):
        FedMARLTrainer.train(
            small,
            ObjectiveSettings(w1=0.0, w2=1.0, w3=0.0),
            options,
            1,
            DataSettings(),
            tmp_path / name,
            lambda done, of, result, epsilon: told.append((done, of, result.accuracy, epsilon)),
        )
        return load_policy(tmp_path / name)

    policy = trained("first")
    assert [(done, of) for done, of, *_ in told] == [(done, 17) for done in range(1, 18)]
    assert [accuracy > 0 for _, _, accuracy, _ in told] == [False] * 16 + [True]
    assert told[0][3] > told[8][3] == told[16][3] == 0.1
    federation = Simulation(replace(small, seed=99), digits)
    slow = {m.client for m in federation.members if "slow" in m.name}
    assert len(slow) == 2
    for each in federation.run(FedMARL(policy)):
        assert not slow & set(each.outcome.kept) and len(each.outcome.kept) == 6
    again = trained("again")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()
    assert again.settings.cost_episodes == 16


def test_federations_of_training_are_not_the_held_out_ones():
    seeds = {varied(SMALL, episode).seed for episode in range(50)}
    assert len(seeds) == 50 and SMALL.seed not in seeds
    assert varied(SMALL, 3) == varied(SMALL, 3) != varied(SMALL, 4)


def test_a_data_set_without_images_or_features_is_refused(monkeypatch):
    """Tokens have no mean."""
    digits = samples.open_dataset("digits", DataSettings())
    tokens = replace(digits, train=replace(digits.train, mean=digits.train.mean[:0]))
    monkeypatch.setattr(samples, "open_dataset", lambda spec, sources: tokens)
    with pytest.raises(UsageError, match="needs images or features"):
        read_samples("tokens", DataSettings())


def fedkit(*words):
    """What the command prints, and the error that ends it."""
    app = typer.Typer()
    selector.register(app)
    app.callback()(lambda: None)
    ran = CliRunner().invoke(app, ["selector", *words])
    return ran.stdout, ran.stderr, ran.exception


def test_a_policy_is_trained_shown_and_found_again(tmp_path):
    path = str(tmp_path / "p.safetensors")
    small = ("--clients", "4", "--rounds", "4", "--samples", "200", "--episodes", "2")
    printed, progress, error = fedkit("train", "--out", path, *small, "--w2", "0.5")
    assert error is None
    assert all(name in printed for name in ("fedmarl", "random", "everybody", path))
    assert "episode     2" in progress
    printed, _, error = fedkit("show", path, "--format", "json")
    about = json.loads(printed)
    assert error is None and about["episodes"] == 2 and about["objective"]["w2"] == 0.5
    assert about["simulation"]["clients"] == 4 and len(about["results"]["fedmarl"]) == 5
    printed, _, error = fedkit("show", path)
    assert error is None and "episodes: 2" in printed and "everybody" in printed


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (("train", "--out", "nowhere/p"), UsageError, "There is no folder nowhere"),
        (("train", "--out", "p", "--profiles", "pi5"), UsageError, "no device profile 'pi5'"),
        (("train", "--out", "p", "-o", "hiden=3"), UsageError, "no setting 'hiden'"),
        (("train", "--out", "p", "--w2", "-1"), UsageError, "w2 must be at least 0"),
        (("train", "--out", "p", "--trainer", "fedmral"), UsageError, "did you mean fedmarl"),
        (("show", "bad"), FedkitError, "bad can't be read"),
    ],
)
def test_bad_words_are_refused_in_a_sentence(tmp_path, monkeypatch, words, kind, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_bytes(b"junk")
    _, _, error = fedkit(*words)
    assert type(error) is kind and said in str(error)
