"""A small transformer for next-character prediction, whose width can be sliced.

torch's own attention keeps query, key and value of all heads in one matrix, a prefix of which is fewer
heads instead of thinner ones. Here a head is a dimension of its own, so that a prefix of every tensor of a
wide network is a narrow one (HeteroFL slices inside every head).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkit.errors import UsageError
from fedkit.models.arguments import split_width
from fedkit.models.narrowing import Hidden
from fedkit.models.reads import check_tokens, sequence_length
from fedkit.models.stages import Stages, named

LAYERS, HEADS = 4, 4
WIDTH, HEAD, HIDDEN = 128, 32, 512


def transformer(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """A transformer encoder, 4 layers of 128 with 4 heads; transformer:width=0.5 slices every layer.

    About as many parameters as LEAF's LSTM (822,096 for 80 characters). Every character sees all others,
    since only what follows the last one is asked for. Normalised before each part, no dropout. Widths W
    in (0, 1]: ceil(128 W), inside a head ceil(32 W), ceil(512 W) hidden units; characters and positions
    are never sliced.
    """
    length = sequence_length("transformer", shape)
    width, others = split_width("transformer", argument)
    if others:
        raise UsageError(f"The model transformer takes a width after it, not {others[0]!r}.")
    return _Transformer(length, classes, width)


class _Transformer(nn.Module):
    """Logits (n, C) from the last position, given tokens (int64, n x length)."""

    # Which dimensions of its own tensors follow a width (fedkit.models.narrowing).
    sliced: ClassVar = {"positions": (1,)}

    def __init__(self, length: int, classes: int, width: float) -> None:
        super().__init__()
        size = math.ceil(width * WIDTH)
        self.embedding = nn.Embedding(classes, size)
        self.positions = nn.Parameter(torch.empty(length, size).normal_(std=0.02))
        self.layers = nn.Sequential(*(_Layer(size, width) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, classes)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        check_tokens("transformer", tokens)
        states = self.layers(self.embedding(tokens) + self.positions)
        logits: Tensor = self.head(self.norm(states[:, -1]))
        return logits

    def stages(self) -> Stages:
        """A layer each; an exit reads the last position, as the head does."""
        return Stages(_Embedded(self.embedding, self.positions), list(self.layers), _exit)


class _Embedded(nn.Module):
    """Tokens as states (n x length x width)."""

    sliced: ClassVar = {"positions": (1,)}

    def __init__(self, embedding: nn.Embedding, positions: nn.Parameter) -> None:
        super().__init__()
        self.embedding, self.positions = embedding, positions

    def forward(self, tokens: Tensor) -> Tensor:
        check_tokens("transformer", tokens)
        states: Tensor = self.embedding(tokens) + self.positions
        return states


class _Last(nn.Module):
    """The state at the last position (n x width)."""

    def forward(self, states: Tensor) -> Tensor:
        return states[:, -1]


def _exit(features: torch.Size, outputs: int) -> nn.Module:
    size = features[-1]
    return named(last=_Last(), norm=nn.LayerNorm(size), linear=nn.Linear(size, outputs))


class _Layer(nn.Module):
    def __init__(self, size: int, width: float) -> None:
        super().__init__()
        hidden = math.ceil(width * HIDDEN)
        self.norm1 = nn.LayerNorm(size)
        self.attention = _Attention(size, math.ceil(width * HEAD))
        self.norm2 = nn.LayerNorm(size)
        self.linear1 = nn.Linear(size, hidden)
        self.linear2 = nn.Linear(hidden, size)

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.attention(self.norm1(states))
        changed: Tensor = self.linear2(functional.gelu(self.linear1(self.norm2(states))))
        return states + changed


class _Attention(nn.Module):
    """Self-attention; ``query``, ``key``, ``value`` and ``output`` are heads x head's width x width."""

    # Heads stay: a width slices inside of every one.
    sliced: ClassVar = dict.fromkeys(("query", "key", "value", "output"), (1, 2))

    def __init__(self, size: int, head: int) -> None:
        super().__init__()
        # As nn.Linear draws them, for as many inputs as each has.
        self.query = _uniform(HEADS, head, size, inputs=size)
        self.key = _uniform(HEADS, head, size, inputs=size)
        self.value = _uniform(HEADS, head, size, inputs=size)
        self.output = _uniform(HEADS, head, size, inputs=HEADS * head)
        self.projected = Hidden()

    def forward(self, states: Tensor) -> Tensor:
        query, key, value = (
            self.projected(torch.einsum("nls,hds->nhld", states, weight))
            for weight in (self.query, self.key, self.value)
        )
        seen = functional.scaled_dot_product_attention(query, key, value)
        changed: Tensor = self.projected(torch.einsum("nhld,hds->nls", seen, self.output))
        return changed


def _uniform(*shape: int, inputs: int) -> nn.Parameter:
    bound = 1 / math.sqrt(inputs)
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))
