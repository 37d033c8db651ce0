"""Makes a network narrow: every layer at a fraction of its width, as what comes into it demands.

The network runs once on torch's meta device, and each of torch's layers is given a new shape just before it
is used: as many inputs as come, ceil(p W) outputs instead of W. A layer with tensors of its own says which
of their dimensions follow the width, in an attribute ``sliced``: {"query": (1, 2)}.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fedkit.models.following import naming_layers

# (name of a tensor, its dimension) -> whether a width leaves it as it is.
Whole: TypeAlias = Callable[[str, int], bool]


class Hidden(nn.Identity):
    """Gives what it gets: stands where a layer multiplies by tensors of its own, for HeteroFL's scaler."""


class CannotNarrow(Exception):
    """A layer can't have the width; ``layer`` is its path."""

    def __init__(self, reason: str, layer: str) -> None:
        super().__init__(reason)
        self.layer = layer


def narrow(model: nn.Module, inputs: Tensor, width: float, whole: Whole) -> None:
    """Give the layers of a network on the meta device their shapes at ``width``, in place.

    Args:
        model: on the meta device.
        inputs: a batch of two there.
        width: p in (0, 1].
        whole: what a width leaves as it is: what is tied to the input's channels or to the logits.

    Raises:
        CannotNarrow: it does not work with such layers; the reason is the beginning of a sentence.
    """
    fitted: set[int] = set()
    hooks = []
    for path, layer in model.named_modules():

        def fit(
            layer: nn.Module,
            args: tuple[Any, ...],
            kwargs: Mapping[str, Any],
            path: str = path,
        ) -> None:
            if id(layer) in fitted:
                return
            fitted.add(id(layer))
            first = next((each for each in (*args, *kwargs.values())), None)
            _fit(layer, path, first, width, whole)

        hooks.append(layer.register_forward_pre_hook(fit, with_kwargs=True))
    with naming_layers(model) as running:
        try:
            model.train()(inputs)
        except CannotNarrow:
            raise
        except Exception as error:  # whatever a layer says of shapes that do not fit
            reason = f"fails ({type(error).__name__}: {str(error).splitlines()[0]})"
            raise CannotNarrow(reason, running[-1] if running else "") from error
        finally:
            for hook in hooks:
                hook.remove()


def hidden_layers(model: nn.Module, whole: Whole) -> list[nn.Module]:
    """The convolutions, linear layers, attentions and ``Hidden`` whose outputs a width slices.

    torch's attention runs its own layers' weights and not the layers: it is scaled by what it gives.
    """
    found: list[nn.Module] = []
    for path, layer in model.named_modules():
        sliced = isinstance(layer, _ConvNd | nn.Linear) and not whole(
            _name(path, "weight"), int(isinstance(layer, _ConvTransposeNd))
        )
        if sliced or isinstance(layer, Hidden | nn.MultiheadAttention):
            found.append(layer)
    return found


def _fit(layer: nn.Module, path: str, first: Any, width: float, whole: Whole) -> None:
    def kept(size: int, tensor: str, axis: int) -> int:
        return size if whole(_name(path, tensor), axis) else math.ceil(width * size)

    if isinstance(layer, _ConvNd):
        _fit_convolution(layer, path, first.shape[1], kept)
    elif isinstance(layer, nn.Linear):
        layer.in_features = first.shape[-1]
        layer.out_features = kept(layer.out_features, "weight", 0)
        _resize(layer, weight=(layer.out_features, layer.in_features), bias=(layer.out_features,))
    elif isinstance(layer, _NormBase):
        layer.num_features = first.shape[1]
        for name in ("weight", "bias", "running_mean", "running_var"):
            _resize(layer, **{name: (layer.num_features,)})
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = first.shape[1]
        if layer.num_channels % layer.num_groups:
            raise CannotNarrow(
                f"has {layer.num_channels} channels, which {layer.num_groups} groups don't divide",
                path,
            )
        _resize(layer, weight=(layer.num_channels,), bias=(layer.num_channels,))
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(first.shape[-len(layer.normalized_shape) :])
        _resize(layer, weight=layer.normalized_shape, bias=layer.normalized_shape)
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = kept(layer.embedding_dim, "weight", 1)
        _resize(layer, weight=(layer.num_embeddings, layer.embedding_dim))
    elif isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
        layer.num_parameters = first.shape[1]
        _resize(layer, weight=(layer.num_parameters,))
    elif isinstance(layer, nn.RNNBase):
        _fit_recurrent(layer, path, first.shape[-1], kept)
    elif isinstance(layer, nn.MultiheadAttention):
        _fit_attention(layer, path, first.shape[-1])
    sliced: Mapping[str, tuple[int, ...]] = getattr(layer, "sliced", {})
    for name, axes in sliced.items():
        shape = list(getattr(layer, name).shape)
        for axis in axes:
            shape[axis] = kept(shape[axis], name, axis)
        _resize(layer, **{name: tuple(shape)})


def _fit_convolution(
    layer: _ConvNd, path: str, inputs: int, kept: Callable[[int, str, int], int]
) -> None:
    transposed = isinstance(layer, _ConvTransposeNd)
    outputs = kept(layer.out_channels, "weight", int(transposed))
    if 1 < layer.groups == layer.in_channels:
        # Each channel by itself: as many as come.
        outputs = inputs * (layer.out_channels // layer.in_channels)
        layer.groups = inputs
    elif inputs % layer.groups or outputs % layer.groups:
        raise CannotNarrow(
            f"has {inputs} channels in and {outputs} out, which {layer.groups} groups don't divide",
            path,
        )
    layer.in_channels, layer.out_channels = inputs, outputs
    kernel = layer.weight.shape[2:]
    if transposed:
        _resize(layer, weight=(inputs, outputs // layer.groups, *kernel), bias=(outputs,))
    else:
        _resize(layer, weight=(outputs, inputs // layer.groups, *kernel), bias=(outputs,))


def _fit_recurrent(
    layer: nn.RNNBase, path: str, inputs: int, kept: Callable[[int, str, int], int]
) -> None:
    if layer.proj_size:
        raise CannotNarrow("projects its states", path)
    before, hidden = layer.hidden_size, kept(layer.hidden_size, "weight_hh_l0", 1)
    sizes = {before: hidden, before * (1 + layer.bidirectional): hidden * (1 + layer.bidirectional)}
    for name, tensor in list(layer.named_parameters(recurse=False)):
        shape = [tensor.shape[0] // before * hidden, *map(sizes.get, tensor.shape[1:])]
        if name.startswith("weight_ih_l0"):
            shape[1] = inputs
        _resize(layer, **{name: shape})
    layer.input_size, layer.hidden_size = inputs, hidden


def _fit_attention(layer: nn.MultiheadAttention, path: str, inputs: int) -> None:
    if layer.in_proj_weight is None or layer.bias_k is not None:
        raise CannotNarrow("reads keys or values of another width, or adds some of its own", path)
    if inputs % layer.num_heads:
        raise CannotNarrow(f"has {inputs} channels for {layer.num_heads} heads", path)
    layer.embed_dim = layer.kdim = layer.vdim = inputs
    layer.head_dim = inputs // layer.num_heads
    _resize(layer, in_proj_weight=(3 * inputs, inputs), in_proj_bias=(3 * inputs,))
    layer.out_proj.in_features = layer.out_proj.out_features = inputs
    _resize(layer.out_proj, weight=(inputs, inputs), bias=(inputs,))


def _resize(layer: nn.Module, **shapes: Any) -> None:
    """Tensors of a layer without numbers, in other shapes; what it has none of is passed over."""
    for name, shape in shapes.items():
        tensor = getattr(layer, name)
        if tensor is None or tuple(tensor.shape) == tuple(shape):
            continue
        empty = torch.empty(shape, dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        setattr(layer, name, empty)


def _name(path: str, tensor: str) -> str:
    return f"{path}.{tensor}" if path else tensor
