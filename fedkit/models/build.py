"""A network by name, for given data, with weights drawn from the run's seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fedkit.data.samples import Shape
from fedkit.errors import FedkitError, UsageError, where_raised
from fedkit.models.pretrained import from_scratch
from fedkit.registry import code_of, find
from fedkit.seeds import derive

Factory: TypeAlias = Callable[[Shape, int, str | None], nn.Module]


def build_model(spec: str, shape: Shape, classes: int, seed: int, client: int = -1) -> nn.Module:
    """Build the network ``spec`` names, e.g. ``lenet:group``.

    Args:
        spec: a registered name or a function of the user's own (``package.module:function``), with
            an argument after a colon where it takes one.
        shape: of one sample: channels, height and width of images; the number of features; the
            length of sequences.
        classes: number of logits.
        seed: the run's seed; the initial weights depend on it and on ``client`` alone.
        client: the client's index, or -1 for a global model.

    Raises:
        UsageError: there is no such model, or it can't read such samples.
        FedkitError: the user's own function failed.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: generators of GPUs would be seeded as well, and are not restored here.
        torch.default_generator.manual_seed(derive(seed, "model", client))
        return drawn_now(spec, shape, classes)


def drawn_now(spec: str, shape: Shape, classes: int) -> nn.Module:
    """As ``build_model``, weights from torch's own generator: for a network that another is made of."""
    factory, argument = find("models", spec)
    if code_of("models", spec) is not None:
        return _own(spec, factory, shape, classes, argument)
    model: nn.Module = factory(shape, classes, argument)
    return model


def restored(spec: str, shape: Shape, classes: int, weights: Mapping[str, Tensor]) -> nn.Module:
    """The network ``spec`` names with these weights (a state dict).

    Pre-trained weights that it would start from are not looked for.

    Raises:
        UsageError, FedkitError: as ``build_model``.
        RuntimeError: they are another network's.
    """
    model = build_model(from_scratch(spec), shape, classes, seed=0)
    model.load_state_dict(weights)
    return model


def parameter_names(spec: str, shape: Shape, classes: int) -> frozenset[str]:
    """The names of the tensors of a network that training moves; the others are buffers.

    Raises:
        UsageError, FedkitError: as ``build_model``.
    """
    return parameters_of(build_model(from_scratch(spec), shape, classes, seed=0))


def parameters_of(model: nn.Module) -> frozenset[str]:
    """Names of the tensors that training moves."""
    return frozenset(name for name, _ in model.named_parameters())


def _own(
    spec: str,
    factory: Callable[..., object],
    shape: Shape,
    classes: int,
    argument: str | None,
) -> nn.Module:
    more = [] if argument is None else [argument]
    try:
        model = factory(shape, classes, *more)
    except Exception as error:  # whatever somebody's function raises
        raise FedkitError(
            f"The model {spec}, called with the shape {shape} and {classes} classes, raised "
            f"{type(error).__name__}: {error} ({where_raised(error)})."
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec} gives a {type(model).__name__}, not a torch.nn.Module.")
    return model


def parameter_count(model: nn.Module) -> int:
    """Number of scalars in a model, buffers (running statistics) included."""
    return sum(tensor.numel() for tensor in model.state_dict().values())


def state_bytes(model: nn.Module) -> int:
    """Bytes of a model's state dict."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
