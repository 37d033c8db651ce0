"""What a network with several exits is trained by: all exits on the labels, and on each other.

BranchyNet (Teerapittayanon et al. 2016) minimises a weighted sum of the exits' cross-entropies. DepthFL
(Kim et al. 2023) lets each exit learn from the others' predictions beside that.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from fedkit.errors import UsageError
from fedkit.models.losses import Loss


def joint_loss(
    weights: Sequence[float] = (1.0,), distillation: float = 0.0, temperature: float = 1.0
) -> Loss:
    """sum_i w_i CE(z_i, y) + d / (D-1) sum_i sum_{j != i} tau^2 KL(p_j || p_i), p = softmax(z / tau).

    A teacher z_j gets no gradient from what its pupil z_i learns. With d = 0, or a single exit, it is
    BranchyNet's loss; with all w_i = 1 and tau = 1 DepthFL's.

    Args:
        weights: w_i, the first exit's first; the last one holds for all exits after it.
        distillation: d.
        temperature: tau.

    Returns:
        ``(logits D x B x C, labels int64 B) -> mean over the batch``.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        exits = len(logits)
        each = for_exits(weights, exits)
        value = sum(
            (
                weight * functional.cross_entropy(one, labels)
                for weight, one in zip(each, logits, strict=True)
            ),
            start=logits.new_zeros(()),
        )
        if not distillation or exits == 1:
            return value
        pairs = temperature**2 * _between_exits(logits / temperature)
        return value + distillation / (exits - 1) * pairs

    return loss


def for_exits(weights: Sequence[float], exits: int) -> list[float]:
    """w_1 to w_D for D exits, the last weight for all that follow."""
    return [*weights, *[weights[-1]] * exits][:exits]


def read_weights(text: str) -> list[float]:
    """The weights w_i in ``1,0.5,0.3``.

    Raises:
        UsageError: one is no number from 0 to 1000, or all are 0.
    """
    try:
        weights = [float(word) for word in text.split(",")]
    except ValueError:
        weights = []
    if not any(weights) or not all(0 <= weight <= 1000 for weight in weights):
        raise UsageError(
            "exit-weights takes a number from 0 to 1000 for each exit, the last for all that follow, "
            f"as in 1 or 0.3,0.3,1, not {text!r}."
        )
    return weights


def _between_exits(logits: Tensor) -> Tensor:
    """sum_i sum_{j != i} KL(softmax(z_j) || softmax(z_i)) of D x B x C logits, as a mean over B.

    Summed over the teachers first, which makes D terms of D (D-1).
    """
    exits, batch, _ = logits.shape
    pupils = functional.log_softmax(logits, dim=2)
    teachers = pupils.detach()
    said = teachers.exp()
    heard = said.sum(dim=0) - said
    return ((exits - 1) * (said * teachers).sum() - (heard * pupils).sum()) / batch
