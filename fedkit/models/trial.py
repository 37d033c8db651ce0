"""One batch through a network before anybody relies on it: a user's own may do anything."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkit.errors import FedkitError, where_raised
from fedkit.models.exits import MultiExit


def try_one_batch(model: nn.Module, samples_inputs: Tensor, outputs: int, name: str) -> None:
    """See whether a network answers and can be trained, on two samples and in a copy.

    Weights, buffers, mode and torch's random numbers are as before.

    Args:
        model: the network, on the samples' device.
        samples_inputs: what it reads (n x ..., at least one sample), as ``Samples.inputs`` gives it.
        outputs: number of logits that it must give.
        name: the network's, for what is told to people.

    Raises:
        FedkitError: its code fails, has no parameters, or gives anything but (2, ``outputs``) finite
            logits that depend on its parameters, with finite gradients.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FedkitError(f"The model {name} has no parameters to train.")
    inputs = samples_inputs[[0, -1]]
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            tried = copy.deepcopy(model)
        except Exception as error:  # whatever somebody's own object holds
            raise FedkitError(
                f"The model {name} can't be copied ({_what(error)}): a network holds tensors, modules "
                "and plain values only."
            ) from error
        with torch.no_grad():
            _check(name, "evaluation", _logits(name, "evaluation", tried.eval(), inputs), outputs)
        logits = _logits(name, "training", tried.train(), inputs)
        exits = list(logits) if isinstance(tried, MultiExit) else [logits]
        for one in exits:
            _check(name, "training", one, outputs)
        if not logits.requires_grad:
            raise FedkitError(
                f"The model {name} gives logits that do not depend on its parameters: no detach(), "
                "no torch.no_grad() on the way."
            )
        targets = torch.zeros(2, dtype=torch.int64, device=inputs.device)
        try:
            torch.autograd.backward([functional.cross_entropy(one, targets) for one in exits])
        except Exception as error:  # from a backward pass of somebody's own
            raise FedkitError(
                f"The model {name} fails on the way back ({_what(error)}), at {where_raised(error)}."
            ) from error
    for path, parameter in tried.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            raise FedkitError(f"The model {name} has gradients of {path} that are not finite.")


def _logits(name: str, mode: str, model: nn.Module, inputs: Tensor) -> Tensor:
    try:
        logits: Tensor = model(inputs)
    except FedkitError:
        raise
    except Exception as error:  # whatever somebody's own code raises
        shape = "x".join(str(size) for size in inputs.shape)
        raise FedkitError(
            f"The model {name} fails in {mode} on two samples ({shape}, {_type(inputs)}) with "
            f"{_what(error)}, at {where_raised(error)}."
        ) from error
    return logits


def _check(name: str, mode: str, logits: object, outputs: int) -> None:
    if not isinstance(logits, Tensor):
        raise FedkitError(
            f"The model {name} gives a {type(logits).__name__} in {mode} instead of a tensor of logits."
        )
    if logits.shape != (2, outputs):
        raise FedkitError(
            f"The model {name} gives {tuple(logits.shape)} for two samples in {mode} instead of "
            f"(2, {outputs}) logits."
        )
    if not logits.is_floating_point():
        raise FedkitError(f"The model {name} gives {_type(logits)} in {mode} instead of float32.")
    if not logits.isfinite().all():
        raise FedkitError(f"The model {name} gives logits in {mode} that are not finite.")


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _what(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
