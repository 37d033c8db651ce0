"""Every random number in a run comes from (seed, purpose, client, round), never from global state.

Two runs with one seed then agree whatever the order in which clients join, train or answer, and a new
consumer of randomness cannot shift the numbers of an old one.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive(seed: int, purpose: str, client: int = -1, round: int = -1) -> int:
    """A 63-bit seed for one purpose; ``-1`` stands for "no particular client (round)"."""
    text = f"{seed}/{purpose}/{client}/{round}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def numpy_generator(
    seed: int, purpose: str, client: int = -1, round: int = -1
) -> np.random.Generator:
    """A NumPy generator for one purpose."""
    import numpy as np

    return np.random.default_rng(derive(seed, purpose, client, round))


def torch_generator(seed: int, purpose: str, client: int = -1, round: int = -1) -> torch.Generator:
    """A CPU torch generator for one purpose (CPU, so that every device draws the same order)."""
    import torch

    return torch.Generator().manual_seed(derive(seed, purpose, client, round))
