"""A network at a fraction of its width: what of each tensor stays (HeteroFL, Diao et al. 2021).

At width p a hidden layer of W channels keeps the first ceil(p W); the input's channels and the logits are
never sliced. What that is in each tensor is not written down layer by layer: ``following`` finds which
indices of which tensors are one channel, in the wide network and in the narrow one that ``narrowing``
makes, and a narrow channel is the first free one of the wide channels that go the same way. For most
networks that gives prefixes; a linear layer behind a flattened picture keeps a column for each pixel of a
kept channel, and where channels are shuffled between two ways (ShuffleNet) those that come out right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedkit.data.samples import Shape
from fedkit.errors import FedkitError, UsageError
from fedkit.knowledge.held import Indices, open_mesh
from fedkit.knowledge.reduction import Arrays
from fedkit.models.build import drawn_now
from fedkit.models.channels import Channels
from fedkit.models.following import NotFollowed, follow
from fedkit.models.narrowing import CannotNarrow, hidden_layers, narrow
from fedkit.models.pretrained import from_scratch


class Slicing:
    """What a network keeps at each width.

    Attributes:
        logits: tensors of the output layer by name -> the dimension that counts classes; never sliced.
    """

    def __init__(self, spec: str, shape: Shape, outputs: int) -> None:
        """Follow the channels of the network ``spec`` names; nothing of its size is allocated.

        Args:
            spec: a model's name, with its argument.
            shape: of one sample.
            outputs: number of logits, C.

        Raises:
            UsageError: it can't be sliced; the sentence names the layer.
            FedkitError: its own code does not run on the meta device.
        """
        self._spec, self._shape, self._outputs = from_scratch(spec), shape, outputs
        wide = self._wide()
        held = wide.state_dict().keys()
        for name, _ in wide.named_buffers():
            if name not in held:
                raise UsageError(
                    f"The model {spec} can't be sliced: it keeps the buffer {name} outside of its state "
                    "dict."
                )
        try:
            self._channels = follow(wide, self._batch(wide))
        except NotFollowed as error:
            raise UsageError(
                f"The model {spec} can't be sliced: channels can't be followed through {error} in "
                f"{_layer(wide, error.layer)}."
            ) from error
        except FedkitError:
            raise
        except Exception as error:  # whatever its own code raises where there are no numbers
            raise FedkitError(
                f"Whether the model {spec} can be sliced can't be told: on torch's meta device it "
                f"raises {type(error).__name__}: {error}."
            ) from error
        self.logits: Mapping[str, int] = self._channels.logits
        self._narrow = cache(self._made)

    def indices(self, width: float) -> Mapping[str, Indices]:
        """What ``width`` keeps of each tensor of the state dict: one index set for each dimension.

        A tensor without dimensions has (), and is held whole.

        Raises:
            UsageError: the width is not in (0, 1], or the network can't be so narrow; the sentence names
                the layer.
        """
        return self._narrow(width)

    def network(self, width: float, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The narrow network: the same layers under the same names, in training mode.

        Args:
            width: in (0, 1].
            weights: its state dict, copied; without one the network is on torch's meta device, which
                knows shapes and has no numbers.

        Raises:
            UsageError: as ``indices``.
            RuntimeError: they are another network's.
        """
        model = self._wide()
        self._fit(model, width)
        if weights is not None:
            model = model.to_empty(device="cpu")
            model.load_state_dict(weights)
        return model

    def take(self, arrays: Mapping[str, NDArray[np.generic]], width: float) -> Arrays:
        """What ``width`` keeps of a wide state dict, as contiguous copies; raises as ``indices``."""
        return {
            name: np.array(arrays[name][open_mesh(kept, arrays[name].shape)], order="C")
            for name, kept in self.indices(width).items()
        }

    @contextmanager
    def scaled(self, model: nn.Module, width: float) -> Iterator[None]:
        """Let hidden outputs of ``model`` (this network, at any width) be divided while it trains.

        HeteroFL's scaler: after each hidden convolution and linear layer, before normalisation. It does
        nothing in evaluation mode, and nothing at all at width 1.
        """

        def scale(layer: nn.Module, inputs: object, outputs: Any) -> Any:
            if not layer.training:
                return outputs
            if isinstance(layer, nn.MultiheadAttention):
                states, weights = outputs
                return states / width, weights
            return outputs / width

        layers = hidden_layers(model, self._is_whole) if width < 1 else []
        hooks = [layer.register_forward_hook(scale) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _made(self, width: float) -> Mapping[str, Indices]:
        model = self._wide()
        self._fit(model, width)
        try:
            channels = follow(model, self._batch(model), self._channels.decisions)
            return _indices(self._channels, channels)
        except (NotFollowed, _NoCounterpart) as error:
            what = f"channels go another way than in the whole network, in {_layer(model, error.layer)}"
            raise UsageError(
                f"The model {self._spec} can't be sliced to {width:g}: {what}."
            ) from error

    def _fit(self, model: nn.Module, width: float) -> None:
        if not 0 < width <= 1:
            raise UsageError(f"A width is above 0 and up to 1, not {width:g}.")
        try:
            narrow(model, self._batch(model), width, self._is_whole)
        except CannotNarrow as error:
            raise UsageError(
                f"The model {self._spec} can't be sliced to {width:g}: {_layer(model, error.layer)} "
                f"{error}."
            ) from error

    def _wide(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return drawn_now(self._spec, self._shape, self._outputs)

    def _batch(self, model: nn.Module) -> Tensor:
        tokens = any(isinstance(layer, nn.Embedding) for layer in model.modules())
        dtype = torch.int64 if tokens else torch.float32
        return torch.empty(2, *self._shape, dtype=dtype, device="meta")

    def _is_whole(self, name: str, axis: int) -> bool:
        lines = self._channels.numbers.get(name, ())
        return axis >= len(lines) or bool(self._channels.whole[lines[axis]].any())


@lru_cache(maxsize=8)
def slicing_of(spec: str, shape: Shape, outputs: int) -> Slicing:
    """``Slicing``, which takes a second or two to find out, kept for the next who asks."""
    return Slicing(spec, shape, outputs)


class _NoCounterpart(Exception):
    """A narrow channel goes a way that none of the wide ones goes; ``layer`` is where it was met."""

    def __init__(self, tensor: str) -> None:
        super().__init__(tensor)
        self.layer = tensor.rpartition(".")[0]


def _indices(wide: Channels, narrow: Channels) -> dict[str, Indices]:
    """Where a narrow network's tensors lie in the wide one's: channel by channel of the same kind."""
    free: dict[object, list[int]] = defaultdict(list)
    for channel in reversed(_in_order(wide)):
        free[wide.kinds[channel]].append(channel)
    counterpart: dict[int, int] = {}
    kept: dict[str, Indices] = {}
    for name, lines in narrow.numbers.items():
        for channel in (int(number) for line in lines for number in line):
            if channel not in counterpart:
                if not free[narrow.kinds[channel]]:
                    raise _NoCounterpart(name)
                counterpart[channel] = free[narrow.kinds[channel]].pop()
        pairs = zip(lines, wide.numbers[name], strict=True)
        kept[name] = tuple(_places([counterpart[int(n)] for n in line], own) for line, own in pairs)
    return kept


def _in_order(channels: Channels) -> list[int]:
    """Numbers of channels as they come first, tensor by tensor."""
    every = [line for lines in channels.numbers.values() for line in lines]
    return list(dict.fromkeys(np.concatenate(every).tolist()))


def _places(channels: list[int], line: NDArray[np.int64]) -> NDArray[np.int64] | slice:
    """Where along a dimension these channels lie; of one that lies there several times, in order."""
    lies: dict[int, list[int]] = defaultdict(list)
    for place, channel in reversed(list(enumerate(line.tolist()))):
        lies[channel].append(place)
    places = np.array([lies[channel].pop() for channel in channels], dtype=np.int64)
    return slice(0, len(places)) if (places == np.arange(len(places))).all() else places


def _layer(model: nn.Module, path: str) -> str:
    kind = type(model.get_submodule(path)).__name__
    return f"its layer {path} ({kind})" if path else f"the network itself ({kind})"
