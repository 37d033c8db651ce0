"""Small worlds for FedMARL: members, views, and rounds whose outcome is known."""

import numpy as np

from fedkit.devices.settings import ObjectiveSettings
from fedkit.engine.roster import Member
from fedkit.engine.selection import Outcome, Probe, Seen, View
from strategies.selectors.fedmarl import FedMARL, Learning
from strategies.selectors.fedmarl_settings import FedMARLSettings
from strategies.selectors.policy import Policy
from strategies.selectors.reward import Units


def member(client, examples=100):
    return Member(
        node_id=client + 1,
        client=client,
        name=f"client {client}",
        model="cnn",
        examples=examples,
        parameters=10,
        device="cpu",
        codecs=(),
    )


def view(number, clients, seen=None, seed=0, rounds=0):
    generator = np.random.default_rng((seed, number))
    return View(number, [member(client) for client in clients], seen or {}, generator, rounds)


def probes_of(clients, loss=1.0, seconds=1.0, size=1000):
    return {client: Probe(loss, seconds * (1 + client), size) for client in clients}


def policy_of(seed=1, objective=None, **hyper):
    settings = FedMARLSettings(**{"hidden": 16, **hyper})
    return Policy.untrained(settings, objective or ObjectiveSettings(), seed)


class World:
    """Rounds in which accuracy rises with the number kept, and each kept costs its time and bytes."""

    def __init__(self, clients=6, gain=0.005):
        self.clients = list(range(clients))
        self.accuracy = 0.1
        self.gain = gain
        self.decisions = []

    def play(self, selector, first, rounds, seed=0):
        for number in range(first, first + rounds):
            seen = {client: Seen() for client in self.clients}
            probes = probes_of(self.clients)
            kept = selector.keep(view(number, self.clients, seen, seed), probes)
            kept = [m.client for m in kept]
            self.decisions.append(kept)
            self.accuracy += self.gain * len(kept)
            seconds = max(probes[client].seconds for client in kept)
            outcome = Outcome(number, self.accuracy, seconds, 1000 * len(kept), tuple(kept))
            selector.learn(outcome)
        return self


def learned(objective, rounds=250, seed=1, **hyper):
    """A policy that has played in a ``World``, and that world."""
    settings = {"agent_rate": 3e-3, "discount": 0.5, "updates": 4, "polyak": 0.05, **hyper}
    policy = policy_of(seed, objective, **settings)
    learning = Learning(policy, falling=rounds // 2, units=Units(6.0, 6000))
    world = World().play(FedMARL(policy, learning), 1, rounds, seed)
    return policy, world
