"""Networks with an exit after each stage: ``exits:preresnet18``, or shallower, ``exits:2:preresnet18``.

A stage is a part of a network that can be left (``fedkit.models.stages``), an exit a small head behind it.
The tensors of stage and exit k are ``stages.K.*`` and ``exits.K.*`` at every depth, so that the state dict
of a shallow network is a part of the deep one's. ``exit:2:preresnet18`` is the plain network that goes
through two stages and leaves by the second exit, with those names again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedkit.errors import UsageError
from fedkit.models.build import drawn_now
from fedkit.models.stages import named, stages_of

DEFAULT = "cnn"


class MultiExit(nn.Module):
    """A network with an exit after each of its D stages.

    While it trains it gives the logits of all exits, stacked: D x n x C. Else those of the last, n x C.
    """

    def __init__(self, stem: nn.Module, stages: nn.Sequential, exits: nn.Sequential) -> None:
        super().__init__()
        self.stem, self.stages, self.exits = stem, stages, exits

    @property
    def depth(self) -> int:
        """D, how many stages and exits it has."""
        return len(self.stages)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits: D x n x C in training mode, n x C in evaluation mode."""
        if self.training:
            return self.every_exit(inputs)
        logits: Tensor = self.exits[-1](self.stages(self.stem(inputs)))
        return logits

    def every_exit(self, inputs: Tensor) -> Tensor:
        """The logits of all exits (D x n x C), in either mode."""
        features, every = self.stem(inputs), []
        for stage, leave in zip(self.stages, self.exits, strict=True):
            features = stage(features)
            every.append(leave(features))
        return torch.stack(every)


def exits(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """An exit after each stage of a network, exits:preresnet18, or of its first, exits:2:preresnet18.

    Small images: as the network that it is made of (cnn, if none is named).

    Its initial weights are the same at every depth, tensor by tensor.
    """
    depth, spec = split_depth("exits", argument)
    stem, stages, heads = _parts(spec, depth, shape, classes)
    return MultiExit(stem, _numbered(stages), _numbered(heads))


def exit_only(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """A network that ends after some stages, with the exit there as its head; exit:2:preresnet18:0.5.

    Small images: as the network that it is made of (cnn, if none is named).

    What `fedkit export --exit` cuts out of a network with several exits.
    """
    depth, spec = split_depth("exit", argument)
    stem, stages, heads = _parts(spec, depth, shape, classes)
    return named(stem=stem, stages=_numbered(stages), exits=named(**{str(len(heads)): heads[-1]}))


def split_depth(name: str, argument: str | None) -> tuple[int, str]:
    """The depth of ``2:preresnet18:0.5`` (0, the deepest, if none is given), and the network's name.

    Raises:
        UsageError: the depth is none.
    """
    depth, _, spec = (argument or DEFAULT).partition(":")
    if not depth.isdecimal():
        return 0, argument or DEFAULT
    if not int(depth) or not spec:
        raise UsageError(
            f"The model {name} takes a number of stages, from 1, and a network's name after it, as in "
            f"{name}:2:{DEFAULT}, not {argument!r}."
        )
    return int(depth), spec


def held_at(depth: int, names: Iterable[str]) -> list[str]:
    """Those of a network's tensors that it still has at a depth, in order."""
    return [name for name in names if _stage(name) <= depth]


def deepest(spec: str, shape: tuple[int, ...], classes: int) -> int:
    """How many stages the network ``spec`` has; nothing is allocated.

    Raises:
        UsageError: it has none, or can't read such samples.
    """
    with torch.device("meta"):
        return len(stages_of(spec, drawn_now(spec, shape, classes)).stages)


def _parts(
    spec: str, depth: int, shape: tuple[int, ...], classes: int
) -> tuple[nn.Module, list[nn.Module], list[nn.Module]]:
    """Stem, stages and exits up to a depth (0: all)."""
    network = drawn_now(spec, shape, classes).eval()
    parts = stages_of(spec, network)
    if depth > len(parts.stages):
        raise UsageError(f"The model {spec} has {len(parts.stages)} stages, not {depth}.")
    stages, heads = list(parts.stages)[: depth or None], []
    # Exits are drawn after the network and in order, so that a shallow one starts as the deep one does.
    with torch.no_grad():
        features = parts.stem(_first(network, shape))
        for stage in stages:
            features = stage(features)
            heads.append(parts.exit(features.shape, classes))
    network.train()
    return parts.stem, stages, heads


def _first(network: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """One sample of zeros, of tokens where the network embeds them."""
    tokens = any(isinstance(layer, nn.Embedding) for layer in network.modules())
    return torch.zeros(1, *shape, dtype=torch.int64 if tokens else torch.float32)


def _stage(name: str) -> int:
    """Of which stage or exit a tensor is; 0: of the stem."""
    part, number, *_ = name.split(".")
    return 0 if part == "stem" else int(number)


def _numbered(parts: list[nn.Module]) -> nn.Sequential:
    return named(**{str(number): part for number, part in enumerate(parts, start=1)})
