"""HeteroFL's hyper-parameters and presets; [P] the paper's table, [C] the authors' code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedkit.settings import Value, setting
from strategies.buffers import BufferHyperparameters
from strategies.outer import OuterHyperparameters
from strategies.rates import OPTIMISERS, OptimiserHyperparameters
from strategies.updates import UpdateHyperparameters


@dataclass(frozen=True)
class HeteroFLHyperparameters(
    OptimiserHyperparameters, BufferHyperparameters, OuterHyperparameters, UpdateHyperparameters
):
    """HeteroFL's hyper-parameters."""

    preset: str = setting(
        "default",
        "code: widths drawn anew in each round for a tenth of the clients, rate 0.1; default: everybody, "
        "each at a width of its own, rate 0.01",
        choices=("default", "code"),
    )
    levels: str = setting(
        "1,0.5,0.25,0.125,0.0625",
        "the widths that there are, of --model; the global network has the widest",
        source="[P] a to e",
    )
    assignment: str = setting(
        "fix",
        "a client's width: fix: its own --width, else dealt once in equal shares; dynamic: drawn anew "
        "for each round, never wider than its own --width",
        choices=("fix", "dynamic"),
        source="[C] both",
    )
    scaler: bool = setting(
        True,
        "narrow clients divide what hidden layers give by their share of the widest, while they train",
        source="[P]",
    )
    masked: bool = setting(
        True,
        "logits of classes that a client does not hold count as 0 in its loss, and the server takes "
        "the output layer's rows from holders of the class only: it is told which classes each holds",
        source="[P]",
    )
    local_epochs: int = setting(
        5, "epochs E on private data", unit="epochs", minimum=0, source="[C] 5"
    )
    batch_size: int = setting(10, "batch size B", unit="samples", minimum=1, source="[C] 10")
    learning_rate: float = setting(
        0.01, "learning rate", above=0, source="[C] 0.01 for MNIST, 0.1 for CIFAR-10"
    )
    optimiser: str = setting("sgd", "a client's optimiser", choices=OPTIMISERS, source="[C] sgd")
    momentum: float = setting(
        0.9, "momentum of SGD and LARS", minimum=0, maximum=0.999, source="[C] 0.9"
    )
    weight_decay: float = setting(0.0005, "weight decay", minimum=0, source="[C] 0.0005")
    clip_norm: float = setting(
        1.0,
        "bound on the norm of the gradient in private training (0: none)",
        minimum=0,
        source="[C] 1",
    )
    weighting: str = setting(
        "equal",
        "weight of a client: 1, or its samples",
        choices=("equal", "examples"),
        source="[P] equal",
    )
    buffers: str = setting(
        "static",
        "running statistics of batch normalisation: none in training, gathered from all clients for "
        "each level before each measuring; average: averaged as weights are; local: each keeps its own",
        choices=("static", "average", "local"),
        source="[P] static",
    )


PRESETS: Mapping[str, Mapping[str, Value]] = {
    "default": {},
    "code": {"select": "uniform:0.1", "assignment": "dynamic", "learning-rate": 0.1},
}
