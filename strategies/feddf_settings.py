"""FedDF's hyper-parameters and presets; the algorithm is in ``feddf``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedkit.settings import Value, setting
from strategies.buffers import BufferHyperparameters
from strategies.distillation import DistilHyperparameters
from strategies.rates import OptimiserHyperparameters
from strategies.reducer import ConsensusHyperparameters
from strategies.updates import UpdateHyperparameters


@dataclass(frozen=True)
class FedDFHyperparameters(
    OptimiserHyperparameters,
    DistilHyperparameters,
    ConsensusHyperparameters,
    BufferHyperparameters,
    UpdateHyperparameters,
):
    """FedDF's hyper-parameters; [P] paper, [C] the authors' code."""

    preset: str = setting(
        "default",
        "paper: the paper's algorithm and values (weights travel); default: logits travel",
        choices=("default", "paper"),
    )
    exchange: str = setting(
        "logits",
        "what travels: answers on the public set, or (paper) weights",
        choices=("logits", "weights"),
        source="[P] weights",
    )
    students: str = setting(
        "auto",
        "exchange=logits: the server's architectures, comma-separated; auto: those of the clients",
    )
    digest_target: str = setting(
        "mean",
        "exchange=logits: what a client digests: the students' mean, or the one of its own "
        "architecture",
        choices=("mean", "own"),
        source="ours",
    )
    space: str = setting(
        "logit",
        "what is averaged: class scores and then softmax, or probabilities",
        choices=("logit", "prob"),
        source="[P] logit (AVGLOGITS)",
    )
    temperature: float = setting(
        3.0, "tau of the softmax", above=0, source="[P][C] 1; default: ours"
    )
    model_weighting: str = setting(
        "examples",
        "exchange=weights: weight of a client's model in its group's mean: its samples, or 1",
        choices=("examples", "equal"),
        source="[P] examples, [C] equal",
    )
    buffers: str = setting(
        "average",
        "exchange=weights: running statistics of batch normalisation: averaged as weights are, and the "
        "server runs the clients' networks with theirs; local: each client keeps its own; static: none in "
        "training, gathered from all clients before each measuring; of these two the server runs every "
        "network with the moments of the public subset",
        choices=("average", "local", "static"),
        source="[P] average",
    )
    drop_worst: bool = setting(
        False,
        "exchange=weights: leave models out of the ensemble that are right on less than 1.2 times "
        "chance (needs public-labels)",
        source="[C] an option",
    )
    local_epochs: int = setting(
        2,
        "epochs on private data before the answer (weights: in all)",
        unit="epochs",
        minimum=0,
        source="[P] 20, 40",
    )
    batch_size: int = setting(
        16, "batch size on private data", unit="samples", minimum=1, source="[P] 64; default: ours"
    )
    keep_optimiser: bool = setting(
        True,
        "the state of a client's optimiser lives as long as the model; false: made anew in each phase",
        source="[P] false; default: ours, as in FedMD",
    )
    digest_loss: str = setting(
        "kl",
        "exchange=logits: distance to the students' answers: KL divergence times temperature^2, mean "
        "squared or absolute error",
        choices=("kl", "mse", "l1"),
        source="ours",
    )
    digest_epochs: int = setting(
        5,
        "exchange=logits: epochs on the students' answers",
        unit="epochs",
        minimum=0,
        source="ours",
    )
    revisit_epochs: int = setting(
        2,
        "exchange=logits: epochs on private data after the digest",
        unit="epochs",
        minimum=0,
        source="ours, as in FedMD",
    )
    digest_batch: int = setting(
        64, "exchange=logits: batch size of that", unit="samples", minimum=1, source="ours"
    )


PRESETS: Mapping[str, Mapping[str, Value]] = {
    "default": {},
    "paper": {
        "exchange": "weights",
        "temperature": 1.0,
        "keep-optimiser": False,
        "local-epochs": 20,
        "batch-size": 64,
        "optimiser": "sgd",
        "learning-rate": 0.1,
        "steps": 10000,
        "steps-patience": 1000,
        "check-every": 100,
        "server-batch": 128,
        "score": "val_acc",
        "public-labels": True,
        "select": "uniform:0.4",
    },
}
