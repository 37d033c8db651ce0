"""Optimisers for large batches, in which every layer has a rate of its own: LARS and LAMB.

Written from the papers: what timm has keeps LAMB's count of steps where a saved state does not hold it,
so that an optimiser that goes on from its state would correct its moments for the wrong step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    """SGD with momentum in which a layer steps in proportion to its weights (You et al. 2017).

    arXiv 1708.03888, algorithm 1: lambda = eta ||w|| / (||g|| + beta ||w||) for each layer, then
    v <- m v + gamma lambda (g + beta w) and w <- w - v. Biases and the parameters of normalisation (all
    that has one dimension) step with lambda = 1 and without decay; so does a layer whose weights or
    gradient are all 0, but for the decay.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        """gamma, m, beta and eta of the paper."""
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients; ``closure`` must be None."""
        assert closure is None, "the trainer computes gradients itself"
        for group in self.param_groups:
            parameters, updates = _with_gradients(group)
            layers = [at for at, one in enumerate(parameters) if one.dim() > 1]
            if layers:
                weights = [parameters[at] for at in layers]
                gradients = [updates[at] for at in layers]
                decay = group["weight_decay"]
                norms, slopes = _norms(weights), _norms(gradients)
                ratios = group["trust_coefficient"] * norms / (slopes + decay * norms)
                decayed = torch._foreach_add(gradients, weights, alpha=decay)
                torch._foreach_mul_(decayed, _where_both(norms, slopes, ratios))
                for at, update in zip(layers, decayed, strict=True):
                    updates[at] = update
            if not updates:
                continue
            scaled = torch._foreach_mul(updates, group["lr"])
            if group["momentum"]:
                velocities = [self._velocity(one) for one in parameters]
                torch._foreach_mul_(velocities, group["momentum"])
                torch._foreach_add_(velocities, scaled)
                scaled = tuple(velocities)
            torch._foreach_sub_(parameters, scaled)

    def _velocity(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        velocity: Tensor = state["momentum_buffer"]
        return velocity


class LAMB(Optimizer):
    """Adam in which a layer steps in proportion to its weights (You et al. 2020).

    arXiv 1904.00962, algorithm 2 with phi the identity: with Adam's update r (moments corrected for
    their start) w <- w - gamma ||w|| / ||r + lambda w|| (r + lambda w). Biases and the parameters of
    normalisation (all that has one dimension) take Adam's step, without decay.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        """gamma, beta1 and beta2, epsilon, lambda of the paper."""
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients; ``closure`` must be None."""
        assert closure is None, "the trainer computes gradients itself"
        for group in self.param_groups:
            parameters, gradients = _with_gradients(group)
            if not parameters:
                continue
            states = [self._moments(one) for one in parameters]
            first, second = group["betas"]
            means = [state["exp_avg"] for state in states]
            squares = [state["exp_avg_sq"] for state in states]
            taken = [float(state["step"]) for state in states]
            torch._foreach_lerp_(means, gradients, 1 - first)
            torch._foreach_mul_(squares, second)
            torch._foreach_addcmul_(squares, gradients, gradients, value=1 - second)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_div_(roots, [(1 - second**step) ** 0.5 for step in taken])
            torch._foreach_add_(roots, group["eps"])
            updates = list(torch._foreach_div(means, [1 - first**step for step in taken]))
            torch._foreach_div_(updates, roots)
            layers = [at for at, one in enumerate(parameters) if one.dim() > 1]
            if layers:
                weights, theirs = [parameters[at] for at in layers], [updates[at] for at in layers]
                torch._foreach_add_(theirs, weights, alpha=group["weight_decay"])
                norms, lengths = _norms(weights), _norms(theirs)
                torch._foreach_mul_(theirs, _where_both(norms, lengths, norms / lengths))
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        return state


def _with_gradients(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    parameters = [one for one in group["params"] if one.grad is not None]
    return parameters, [one.grad for one in parameters]


def _norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors))


def _where_both(one: Tensor, other: Tensor, ratios: Tensor) -> list[Tensor]:
    """The ratios, or 1 where one of the two is 0."""
    ones = torch.ones_like(ratios)
    return list(torch.where((one > 0) & (other > 0), ratios, ones).unbind())
