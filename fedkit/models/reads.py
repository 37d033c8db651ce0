"""What a network reads, held against the shape of the data before it is built."""

from __future__ import annotations

from torch import Tensor

from fedkit.errors import UsageError


def image_shape(name: str, shape: tuple[int, ...], least: int = 1) -> tuple[int, int, int]:
    """Channels, height and width of the images that the network ``name`` is to read.

    Raises:
        UsageError: the data are no images, or smaller than ``least`` pixels a side.
    """
    if len(shape) != 3:
        raise UsageError(f"{name} reads images; these data are {kind_of(shape)}.")
    channels, height, width = shape
    if min(height, width) < least:
        raise UsageError(
            f"{name} reads images of at least {least}x{least} pixels; these have {height}x{width}."
        )
    return channels, height, width


def sequence_length(name: str, shape: tuple[int, ...]) -> int:
    """The length of the sequences of tokens that the network ``name`` is to read.

    Raises:
        UsageError: the data are no sequences.
    """
    if len(shape) != 1:
        raise UsageError(f"{name} reads sequences of tokens; these data are {kind_of(shape)}.")
    return shape[0]


def check_tokens(name: str, inputs: Tensor) -> None:
    """Raise ``UsageError`` unless a batch is of tokens: rows of features have the same shape."""
    if inputs.is_floating_point():
        raise UsageError(
            f"{name} reads sequences of tokens; these data are {inputs.shape[1]} features a sample."
        )


def check_numbers(name: str, inputs: Tensor) -> None:
    """Raise ``UsageError`` if a batch is of tokens, which are names and no quantities."""
    if not inputs.is_floating_point():
        raise UsageError(
            f"{name} reads images or features; these data are sequences of {inputs.shape[1]} tokens."
        )


def kind_of(shape: tuple[int, ...]) -> str:
    """What data of this shape are, in words."""
    if len(shape) == 3:
        return f"images of {shape[1]}x{shape[2]} pixels"
    if len(shape) == 1:
        return f"rows of {shape[0]} features or tokens"
    return f"arrays of {'x'.join(str(size) for size in shape) or 'no dimension'}"
