"""Max pooling of 2x2 on a CPU, in less than half of torch's time and with its numbers.

torch compares one number after the other, and a processor can't guess which of four is the largest; here a
whole quarter of the image is compared with another at once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

# Below that many numbers calls cost more than they save.
LEAST = 16_384
# The pixels of a larger image have places that are no whole numbers in float32.
MOST_PIXELS = 2**24
_backward = torch.ops.aten.max_pool2d_with_indices_backward.default


class HalvingMaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d(2)``: its outputs and gradients, to the bit but for a zero's sign.

    Of several largest ones the first has the gradient, row by row. Where one of four is NaN, so is the
    output, and only which of them has the gradient may be another than torch's.
    """

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, input: Tensor) -> Tensor:
        """n x channels x height x width to half of both, rounded down."""
        if not _pays(input):
            return cast(Tensor, super().forward(input))
        if torch.is_grad_enabled() and input.requires_grad:
            return cast(Tensor, _Halved.apply(input))
        first, second, third, fourth = _quarters(input)
        return torch.maximum(torch.maximum(first, second), torch.maximum(third, fourth))


def _pays(images: Tensor) -> bool:
    return (
        type(images) is Tensor
        and images.device.type == "cpu"
        and images.dtype in (torch.float32, torch.float64)
        and images.dim() == 4
        and images.numel() >= LEAST
        and images.shape[-1] * images.shape[-2] <= MOST_PIXELS
        and images.is_contiguous()
        and not torch._C._are_functorch_transforms_active()  # vmap
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def _quarters(images: Tensor) -> list[Tensor]:
    """Of each square its upper left, upper right, lower left and lower right, as views."""
    height, width = images.shape[-2] // 2 * 2, images.shape[-1] // 2 * 2
    return [images[..., row:height:2, column:width:2] for row in (0, 1) for column in (0, 1)]


@lru_cache(maxsize=64)
def _corners(height: int, width: int, row: int, dtype: torch.dtype) -> Tensor:
    """Where the squares begin in an image whose rows have ``row`` pixels."""
    down, along = torch.arange(0, 2 * height, 2), torch.arange(0, 2 * width, 2)
    return (down[:, None] * row + along).to(dtype)


class _Halved(torch.autograd.Function):
    """The largest of each square."""

    # Not in the form that goes through vmap: torch would inspect its signature in every call, for 0.1 ms.
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        upper, right, lower, other = (
            quarter.clone(memory_format=torch.contiguous_format) for quarter in _quarters(images)
        )
        row = images.shape[-1]
        # Whether the second is larger, as 0 or 1 in the numbers' own type: booleans are slow to make.
        place = torch.gt(right, upper, out=torch.empty_like(upper))
        below = torch.gt(other, lower, out=torch.empty_like(upper))
        torch.maximum(upper, right, out=upper)
        torch.maximum(lower, other, out=lower)
        below.add_(row).sub_(place)
        place.addcmul_(torch.gt(lower, upper, out=right), below)
        place.add_(_corners(*upper.shape[-2:], row, images.dtype))
        # Where it was in the image, as torch's own way back wants to know.
        ctx.save_for_backward(images, place.long())
        return torch.maximum(upper, lower, out=upper)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        images, places = ctx.saved_tensors
        back: Tensor = _backward(gradient, images, [2, 2], [2, 2], [0, 0], [1, 1], False, places)
        return back
