"""FedMARL's hyper-parameters."""

from __future__ import annotations

from dataclasses import dataclass

from fedkit.settings import setting

CODE = "public code (braiton1277)"
OURS = "ours"


@dataclass(frozen=True)
class FedMARLSettings:
    """How the agents are made and learn (algorithms.md 8)."""

    hidden: int = setting(128, "hidden units of the agents' network", minimum=1, source=CODE)
    history: int = setting(
        3,
        "how many of a client's last latencies an agent sees",
        unit="rounds",
        minimum=1,
        source=OURS,
    )
    mixing: str = setting(
        "vdn",
        "how the team's value is made of the agents': their sum, or QMIX",
        choices=("vdn", "qmix"),
        source="Sunehag et al. 2018; QMIX: Rashid et al. 2018",
    )
    min_keep: int = setting(
        1, "clients that go on at least", unit="clients", minimum=1, source=OURS
    )
    min_share: float = setting(
        0.0,
        "share of those probed that go on at least, for who wants no more dropped than that",
        minimum=0,
        maximum=1,
        source=OURS,
    )
    discount: float = setting(0.99, "gamma", minimum=0, maximum=1, source=CODE)
    agent_rate: float = setting(3e-4, "rate of Adam", above=0, source=CODE)
    loss: str = setting(
        "huber", "of the temporal difference", choices=("huber", "squared"), source=CODE
    )
    clip: float = setting(10.0, "bound of the gradient's norm", above=0, source=CODE)
    capacity: int = setting(
        50_000, "rounds that the replay buffer holds", unit="rounds", minimum=1, source=CODE
    )
    agent_batch: int = setting(32, "rounds a step", unit="rounds", minimum=1, source=CODE)
    updates: int = setting(16, "steps after each round", unit="steps", minimum=0, source=CODE)
    target: str = setting(
        "polyak",
        "how the target network follows: a little after each step, or whole once a period",
        choices=("polyak", "periodic"),
        source=CODE,
    )
    polyak: float = setting(
        0.01, "how far the target goes in a step", above=0, maximum=1, source=CODE
    )
    period: int = setting(200, "of a periodic target", unit="steps", minimum=1, source=OURS)
    smoothing: float = setting(
        0.0,
        "how much of the accuracy that a round is paid for is that of the rounds before: single rounds "
        "fluctuate by more than who takes part changes",
        minimum=0,
        maximum=0.99,
        source=OURS,
    )
    fading: float = setting(
        1.0,
        "share of the accuracy that a round won or lost which is left a round later: in simulation a round "
        "is paid for what is left at the run's end",
        minimum=0,
        maximum=1,
        source=OURS,
    )
    cost_episodes: int = setting(
        0,
        "federations before all others in which nobody trains and only seconds and bytes are paid for, "
        "so that accuracy's noise does not hide what a client costs",
        unit="episodes",
        minimum=0,
        source=OURS,
    )
    epsilon: float = setting(
        0.05,
        "how often an agent acts at random, after it fell from 1 in the first half of the cost episodes, "
        "or of training where there are none",
        minimum=0,
        maximum=1,
        source=OURS,
    )
