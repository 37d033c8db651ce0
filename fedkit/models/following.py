"""Follows the channels of a network through every operation, by running it once.

While the network runs on torch's meta device, which knows shapes and has no numbers, each activation
carries *marks*: integer tensors of its own shape that say which node (``channels``) each of its elements
comes from. A convolution ties the marks of its input to the nodes of its weight's input dimension and marks
its output with those of the other; a sum ties the marks of both sides; what moves elements about (views,
chunks, concatenations) moves the marks in the same way.

An activation has one mark for each of its axes that parameters know (of a transformer's states: position
and channel). Which marks of two operands belong to each other is told by their patterns; a narrow network,
in which patterns may be degenerate (layers of one channel), repeats what was decided for the wide one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedkit.models.channels import Channels, Nodes
from fedkit.models.marks import Marks, along, axes_of, first_of, matches, varies

T = TypeVar("T")

# Operations by torch's name for them (aten): not every version has each.

# What moves elements and is no view by torch's own account.
MOVES = {
    "_unsafe_view.default",
    "unsafe_split.Tensor",
    "unsafe_split_with_sizes.default",
    "constant_pad_nd.default",
    "native_channel_shuffle.default",
    "pixel_shuffle.default",
    "repeat.default",
    "roll.default",
    "flip.default",
}
JOINS = {"cat.default", "stack.default"}
# What takes a shape only.
BLANKS = {
    "empty_like.default",
    "zeros_like.default",
    "ones_like.default",
    "full_like.default",
    "rand_like.default",
    "randn_like.default",
    "new_empty.default",
    "new_zeros.default",
}
# What leaves every element in its place and is not pointwise by torch's own account.
IN_PLACE = {
    "hardswish_.default",
    "hardswish.default",
    "_softmax.default",
    "_safe_softmax.default",
    "_log_softmax.default",
    "native_dropout.default",
    "native_layer_norm.default",
}
# What has a weight, a bias, ... for each channel (axis 1), at these places of its arguments.
BY_CHANNEL = {
    "native_batch_norm.default": (1, 2, 3, 4),
    "_native_batch_norm_legit.default": (1, 2, 3, 4),
    "_native_batch_norm_legit_functional.default": (1, 2, 3, 4),
    "_native_batch_norm_legit.no_stats": (1, 2),
    "native_group_norm.default": (1, 2),
    "_prelu_kernel.default": (1,),
}
POOLS = {
    "max_pool2d_with_indices.default",
    "max_pool3d_with_indices.default",
    "avg_pool2d.default",
    "avg_pool3d.default",
    "_adaptive_avg_pool2d.default",
    "_adaptive_avg_pool3d.default",
    "adaptive_max_pool2d.default",
    "upsample_nearest2d.default",
    "upsample_bilinear2d.default",
}
REDUCTIONS = {"mean.dim", "sum.dim_IntList", "amax.default", "amin.default"}
# Places of the two factors among the arguments, and of a bias where there is one.
PRODUCTS = {
    "mm.default": (0, 1, None),
    "bmm.default": (0, 1, None),
    "addmm.default": (1, 2, 0),
    "baddbmm.default": (1, 2, 0),
}


class NotFollowed(Exception):
    """An operation through which channels can't be followed; ``layer`` is the module that uses it."""

    def __init__(self, reason: str, layer: str) -> None:
        super().__init__(reason)
        self.layer = layer


def follow(model: nn.Module, inputs: Tensor, repeated: Sequence[object] | None = None) -> Channels:
    """Run a network, as it trains, and follow its channels.

    Args:
        model: on the meta device.
        inputs: a batch of two there.
        repeated: the decisions of the wide network that this one is a slice of.

    Raises:
        NotFollowed: there is an operation that is not known here.
        Exception: whatever the network's own code raises.
    """
    nodes = Nodes(model)
    follower = _Follower(nodes, repeated)
    if inputs.is_floating_point():
        follower.mark(inputs, [nodes.input(inputs)])
    with naming_layers(model) as path, sdpa_kernel(SDPBackend.MATH), follower:
        follower.path = path
        logits = model.train()(inputs)
    outputs = [mark for mark in follower.marks(logits) if varies(mark, mark.ndim - 1)]
    if not outputs:
        raise NotFollowed("logits that come from no weights", "")
    return nodes.channels(outputs, follower.decisions)


@contextmanager
def naming_layers(model: nn.Module) -> Iterator[list[str]]:
    """The paths of the modules that are being run, the innermost last; it stays as it is on an error."""
    path: list[str] = []
    hooks = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, inputs: object, name: str = name) -> None:
            path.append(name)

        def leave(module: nn.Module, inputs: object, outputs: object) -> None:
            path.pop()

        hooks += [
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave),
        ]
    try:
        yield path
    finally:
        for hook in hooks:
            hook.remove()


class _Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Moves marks along with the operations of a network."""

    def __init__(self, nodes: Nodes, repeated: Sequence[object] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.decisions: list[object] = []
        self.path: list[str] = []
        self._nodes = nodes
        self._repeated: Iterator[Any] | None = None if repeated is None else iter(repeated)
        self._marks: dict[int, tuple[Tensor, Marks]] = {}

    def mark(self, tensor: Tensor, marks: Marks) -> None:
        """Give a tensor its marks."""
        # The tensor is kept, lest another one gets its id.
        self._marks[id(tensor)] = tensor, marks

    def marks(self, tensor: object) -> Marks:
        """The marks of a tensor; none of anything else."""
        if not isinstance(tensor, Tensor):
            return []
        known = self._nodes.of(tensor)
        return known if known is not None else self._marks.get(id(tensor), (None, []))[1]

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if _name(func) in BLANKS or not any(self.marks(operand) for operand in operands):
            return results
        self._follow(func, args, kwargs, operands, results)
        return results

    def _follow(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: list[Tensor],
        results: Any,
    ) -> None:
        name = _name(func)
        first = results[0] if isinstance(results, tuple) else results
        if torch.Tag.pointwise in func.tags or name in IN_PLACE:
            marks = self._merged(first.shape, map(self.marks, operands))
            for result in results if isinstance(results, tuple) else [results]:
                if isinstance(result, Tensor) and result.shape == first.shape:
                    self._keep(result, marks)
        elif name in BY_CHANNEL:
            line = [1, -1] + [1] * (first.ndim - 2)
            vectors = [args[at] for at in BY_CHANNEL[name] if isinstance(args[at], Tensor)]
            lined = [[mark.reshape(line) for mark in self.marks(one)] for one in vectors]
            self._keep(first, self._merged(first.shape, [self.marks(args[0]), *lined]))
        elif name in JOINS:
            self._keep(results, self._joined(func, *args, **kwargs))
        elif func.is_view or name in MOVES:
            self._move(func, args, kwargs, results)
        elif name in PRODUCTS:
            self._keep(results, self._product(args, PRODUCTS[name], results.shape))
        elif name == "convolution.default":
            self._keep(results, self._convolution(args, results.shape))
        elif name == "embedding.default":
            rows = self._decide("embedding", lambda: [varies(m, 1) for m in self.marks(args[0])])
            kept = [m[0] for m, use in zip(self.marks(args[0]), rows, strict=True) if use]
            self._keep(results, [mark.expand(results.shape) for mark in kept])
        elif name in POOLS:
            spatial = list(range(2, first.ndim))
            pooled = [m.amax(spatial, keepdim=True) for m in self.marks(args[0])]
            self._keep(first, [mark.expand(first.shape) for mark in pooled])
        elif name in REDUCTIONS:
            axes = args[1] if len(args) > 1 and args[1] else list(range(args[0].ndim))
            keepdim = bool(args[2]) if len(args) > 2 else bool(kwargs.get("keepdim", False))
            self._keep(results, [m.amax(axes, keepdim=keepdim) for m in self.marks(args[0])])
        elif any(isinstance(result, Tensor) for result in tree_leaves(results)):
            raise NotFollowed(name, self._here)

    def _keep(self, result: Tensor, marks: Marks) -> None:
        """Marks that do not tell elements apart any more are of no use (a single position, say)."""
        useful = self._decide("keep", lambda: [bool(axes_of(mark)) for mark in marks])
        if len(useful) != len(marks):
            raise NotFollowed("another number of marks than before", self._here)
        self.mark(result, [mark for mark, use in zip(marks, useful, strict=True) if use])

    def _decide(self, what: str, compute: Callable[[], T]) -> T:
        """What the patterns say; of a narrow network what those of the wide one said."""
        known: tuple[str, Any] = (what, compute()) if self._repeated is None else self._next()
        if known[0] != what:
            raise NotFollowed("code that takes another way", self._here)
        self.decisions.append(known)
        decision: T = known[1]
        return decision

    def _next(self) -> tuple[str, Any]:
        assert self._repeated is not None
        return next(self._repeated, ("", None))

    @property
    def _here(self) -> str:
        return self.path[-1] if self.path else ""

    def _merged(self, shape: torch.Size, sides: Iterable[Marks]) -> Marks:
        """The marks of what is computed place by place: those that match are tied."""
        merged: Marks = []
        for side in sides:
            spread = [mark.expand(shape) for mark in side]
            fitting = self._decide("merge", partial(matches, list(merged), spread))
            for at, other in fitting:
                self._nodes.tie(merged[at], spread[other])
                merged[at] = first_of(merged[at], spread[other])
            matched = {other for _, other in fitting}
            merged += [mark for at, mark in enumerate(spread) if at not in matched]
        return merged

    def _move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: Any) -> None:
        moved = []
        for mark in self.marks(args[0]):
            if _name(func) in ("view.default", "_unsafe_view.default"):
                moved.append(mark.reshape(results.shape))
            else:
                moved.append(func(mark, *args[1:], **kwargs))
        if isinstance(results, Tensor):
            self._keep(results, moved)
            return
        for at, result in enumerate(results):
            self._keep(result, [parts[at] for parts in moved])

    def _joined(self, func: Any, tensors: list[Tensor], dim: int = 0) -> Marks:
        """Marks that lie along the same axes are joined as their tensors are."""
        sides = [self.marks(tensor) for tensor in tensors]
        along = self._decide("join", lambda: [[axes_of(m) for m in side] for side in sides])
        kinds = list(dict.fromkeys(axes for side in along for axes in side if axes))
        joined = []
        for kind in kinds:
            parts = []
            for tensor, side, lies in zip(tensors, sides, along, strict=True):
                found = [m for m, axes in zip(side, lies, strict=True) if axes == kind]
                none = torch.zeros((), dtype=torch.int64, device="cpu").expand(tensor.shape)
                parts.append(found[0] if found else none)
            joined.append(func(parts, dim))
        return joined

    def _product(
        self, args: tuple[Any, ...], places: tuple[int, int, int | None], shape: torch.Size
    ) -> Marks:
        """(batch x) n x k times (batch x) k x m: what lies along k is tied, the rest goes on."""
        left, right = (self.marks(args[at]) for at in places[:2])
        spent = self._decide(
            "product",
            lambda: ([varies(m, m.ndim - 1) for m in left], [varies(m, m.ndim - 2) for m in right]),
        )
        # Each as (batch x) k: the other axis of either has nothing to say, or is tied below.
        rows = [mark for mark, use in zip(left, spent[0], strict=True) if use]
        columns = [mark for mark, use in zip(right, spent[1], strict=True) if use]
        lines = [mark[..., 0, :] for mark in rows], [mark[..., :, 0] for mark in columns]
        for at, other in self._decide("contract", lambda: matches(*lines)):
            self._nodes.tie(rows[at], lines[1][other].unsqueeze(-2))
            self._nodes.tie(columns[other], lines[1][other].unsqueeze(-1))
        if len(shape) == 3:
            # Heads: what goes through one of them can't stand for what goes through another.
            for mark in (*left, *right):
                for head in mark:
                    self._nodes.place(head)
        result = [m[..., :, :1].expand(shape) for m, s in zip(left, spent[0], strict=True) if not s]
        others = [
            m[..., :1, :].expand(shape) for m, s in zip(right, spent[1], strict=True) if not s
        ]
        bias = self.marks(args[places[2]]) if places[2] is not None else []
        return self._merged(shape, [result, others, bias])

    def _convolution(self, args: tuple[Any, ...], shape: torch.Size) -> Marks:
        inputs, weight, bias = args[0], args[1], args[2]
        transposed, groups = bool(args[6]), int(args[8])
        outward, inward = (1, 0) if transposed else (0, 1)
        # Of a narrow network a single channel may be left.
        by_itself = self._decide("alone", lambda: groups > 1 and weight.shape[1] == 1)
        if transposed and groups > 1:
            raise NotFollowed("a transposed convolution in groups", self._here)
        kernels = self.marks(weight)
        lie = self._decide(
            "convolution",
            lambda: (
                [varies(mark, 1) for mark in self.marks(inputs)],
                [varies(mark, outward) for mark in kernels],
                [varies(mark, inward) for mark in kernels],
            ),
        )
        entering = [mark for mark, use in zip(self.marks(inputs), lie[0], strict=True) if use]
        around = [1] * (inputs.ndim - 2)
        out = [along(mark, outward) for mark, use in zip(kernels, lie[1], strict=True) if use]
        into = [along(mark, inward) for mark, use in zip(kernels, lie[2], strict=True) if use]
        if by_itself:
            into = [line.view(groups, -1)[:, :1].flatten() for line in out]
            for line in out:
                grouped = line.view(groups, -1)
                self._nodes.tie(grouped, grouped[:, :1])
        elif groups > 1:
            into = [line.repeat(groups) for line in into]
            for line in out:
                for group in line.view(groups, -1):
                    self._nodes.place(group)
        for mark in entering:
            for line in into:
                self._nodes.tie(mark, line.view(1, -1, *around))
        result = [line.view(1, -1, *around).expand(shape) for line in out]
        biases = [line.view(1, -1, *around).expand(shape) for line in self.marks(bias)]
        return self._merged(shape, [result, biases])


def _name(func: Any) -> str:
    return str(func).removeprefix("aten.")
