"""A client's private training: how much of it, with which optimiser, and how the learning rate falls."""

from __future__ import annotations

from dataclasses import dataclass

from fedkit.models.schedules import largest_batch
from fedkit.settings import setting

OPTIMISERS = ("sgd", "adam", "adamw", "lars", "lamb")


@dataclass(frozen=True)
class WorkHyperparameters:
    """How much a client trains on its own data in a round."""

    local_steps: int = setting(
        0,
        "steps on private data in a round instead of epochs (0: epochs); they go through the data in a "
        "new order each round, more than once where they are more than an epoch's",
        unit="steps",
        minimum=0,
        source="local SGD: J steps",
    )
    batch_schedule: str = setting(
        "",
        "how the batch size on private data grows: double:ROUNDS (twice as large every so many rounds) "
        "or ROUND:SIZE,... as in 1:16,10:32 (default: it does not)",
        source="Smith et al. 2018",
    )

    def __post_init__(self) -> None:
        largest_batch(self.batch_schedule, 1, 1)  # refuses what can't be read


@dataclass(frozen=True)
class RateHyperparameters(WorkHyperparameters):
    """A client's learning rate; its schedule survives restarts."""

    learning_rate: float = setting(
        0.001, "learning rate of a client", above=0, source="Adam: 0.001 in FedMD"
    )
    schedule: str = setting(
        "constant",
        "how the learning rate falls; plateau: when a client's validation (else training) loss stalls; "
        "inverse: as 1 / (1 + schedule-factor t)",
        choices=("constant", "plateau", "cosine", "step", "inverse"),
        source="ours; plateau stops a late decline",
    )
    schedule_by: str = setting(
        "round",
        "what t counts: rounds, or the steps of private training that this client's model has taken "
        "(plateau goes by rounds in any case; cosine ends with the run)",
        choices=("round", "step"),
        source="ours",
    )
    schedule_factor: float = setting(
        0.5, "plateau, step and inverse fall by this", above=0, maximum=1, source="ours"
    )
    schedule_patience: int = setting(
        2,
        "plateau waits so many rounds without progress; step takes one each so many rounds or steps",
        minimum=0,
        source="ours",
    )
    warmup: int = setting(
        0,
        "the learning rate first rises linearly over so many rounds, or steps with schedule-by=step",
        minimum=0,
        source="Goyal et al. 2017: 5 epochs",
    )
    scale_rate_to: int = setting(
        0,
        "the learning rate is meant for batches of this size, and in private training is multiplied by "
        "batch size / this (0: it is meant for any)",
        unit="samples",
        minimum=0,
        source="Goyal et al. 2017: 256",
    )


@dataclass(frozen=True)
class OptimiserHyperparameters(RateHyperparameters):
    """A client's optimiser: one state for private training, one for learning from others."""

    optimiser: str = setting(
        "adam",
        "a client's optimiser",
        choices=OPTIMISERS,
        source="sgd: FedAvg, KT-pFL code (0.02), FedDF (0.1), FedProto; adam: ours",
    )
    momentum: float = setting(
        0.0,
        "momentum of SGD and LARS",
        minimum=0,
        maximum=0.999,
        source="FedProto: 0.5, others: 0",
    )
    weight_decay: float = setting(
        0.0,
        "weight decay: added to the gradient (sgd, adam), apart from it (adamw), or within a layer's "
        "rate (lars, lamb: not for biases and norms)",
        minimum=0,
        source="HeteroFL: 0.0005",
    )
    trust_coefficient: float = setting(
        0.001, "eta of LARS, how far a layer trusts its gradient", above=0, source="LARS: 0.001"
    )
    clip_norm: float = setting(
        0.0,
        "bound on the norm of the gradient in private training (0: none)",
        minimum=0,
        source="HeteroFL: 1",
    )
    keep_optimiser: bool = setting(
        False,
        "its state lives as long as the model, as FedMD's does; false: made anew in each phase",
        source="KT-pFL code, FedAvg: false",
    )
