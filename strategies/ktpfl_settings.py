"""KT-pFL's hyper-parameters and presets; the algorithm is in ``ktpfl``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedkit.settings import Value, setting
from strategies.pretraining import PretrainHyperparameters
from strategies.public_round import PublicHyperparameters
from strategies.rates import OptimiserHyperparameters


@dataclass(frozen=True)
class KTpFLHyperparameters(
    OptimiserHyperparameters, PretrainHyperparameters, PublicHyperparameters
):
    """KT-pFL's hyper-parameters; [P] paper, [C] the authors' code, [D] ours."""

    preset: str = setting(
        "default",
        "paper: the paper's objective with the code's values where it is silent; code: the "
        "authors' code; default: the paper's objective with our local training; comet: clustered "
        "co-distillation",
        choices=("default", "paper", "code", "comet"),
    )
    public_pretrain: bool = setting(
        False,
        "learn from the labelled public set before the first round (needs public-labels)",
        source="[C] none that has an effect",
    )
    space: str = setting(
        "prob",
        "what travels and is mixed: soft predictions, or raw class scores",
        choices=("prob", "logit"),
        source="[P][C] prob; an improved version mixes logits",
    )
    digest_target: str = setting(
        "mix",
        "what a client learns from: the mixture, or its own answer plus the mixture",
        choices=("mix", "local+mix"),
        source="[P][C] mix; local+mix goes with space=logit",
    )
    temperature: float = setting(
        3.0, "tau of the soft predictions", above=0, source="[C] 10; default [D]"
    )
    update: str = setting(
        "projection",
        "step on the matrix: projection (paper), softmax (code), clusters, or none",
        choices=("projection", "softmax", "clusters", "none"),
    )
    matrix_rate: float = setting(
        0.01, "step size eta3 of update=projection", minimum=0, source="[D] 0.01"
    )
    penalty: float = setting(
        0.7, "rho, the pull of the matrix towards 1/N", minimum=0, source="[C] 0.7"
    )
    divergence_weight: float = setting(
        1.0, "lambda in the matrix's objective", minimum=0, source="[D] 1"
    )
    clusters: int = setting(
        2, "how many clusters update=clusters makes", minimum=1, source="COMET code: 2"
    )
    local_epochs: int = setting(
        3,
        "epochs on private data (the ramp's top, with epoch-ramp)",
        unit="epochs",
        minimum=0,
        source="[C] ramp to 10",
    )
    epoch_ramp: bool = setting(
        False, "local epochs 1, 1, 2, 3, ... up to local-epochs", source="[C] true"
    )
    batch_size: int = setting(
        16, "batch size on private data", unit="samples", minimum=1, source="[C] 16"
    )
    distill_loss: str = setting(
        "kl",
        "distance to the target: KL divergence, mean squared or absolute error",
        choices=("kl", "mse", "l1"),
        source="[P][C] kl",
    )
    distill_epochs: int = setting(
        3, "epochs on the personal target", unit="epochs", minimum=0, source="[C] 1; default [D]"
    )
    distill_batch: int = setting(
        64,
        "batch size on the personal target",
        unit="samples",
        minimum=1,
        source="[C] 256; default [D]",
    )
    distill_weight: float = setting(
        9.0,
        "factor of the distance to the target in the client's loss",
        minimum=0,
        source="[D] temperature^2 by default; [C] 1",
    )
    revisit_epochs: int = setting(
        0,
        "epochs on private data after the digest",
        unit="epochs",
        minimum=0,
        source="ours; FedMD has 4",
    )
    reduction: str = setting(
        "batchmean",
        "KL summed over classes, or (mean) divided by C as well",
        choices=("batchmean", "mean"),
        source="[C] mean",
    )


_CODE: Mapping[str, Value] = {
    "replacement": True,
    "temperature": 10.0,
    "local-epochs": 10,
    "epoch-ramp": True,
    "distill-epochs": 1,
    "distill-batch": 256,
    "distill-weight": 1.0,
    "optimiser": "sgd",
    "learning-rate": 0.02,
}
PRESETS: Mapping[str, Mapping[str, Value]] = {
    "default": {},
    "paper": {**_CODE, "replacement": False},
    "code": {**_CODE, "update": "softmax", "reduction": "mean"},
    "comet": {"update": "clusters"},
}
