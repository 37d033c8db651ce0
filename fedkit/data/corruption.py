"""A broken sensor: noise on a client's inputs, drawn once: a sample is the same whenever it is read."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from fedkit.errors import UsageError
from fedkit.seeds import torch_generator

if TYPE_CHECKING:
    from torch import Generator

    from fedkit.data.samples import Samples
    from fedkit.data.splits import ClientData

NONE = "none"


def read_noise(spec: str) -> float:
    """Sigma of ``noise:SIGMA``; 0 for ``none`` and for nothing at all.

    Raises:
        UsageError: it is something else.
    """
    if spec in ("", NONE):
        return 0.0
    kind, _, text = spec.partition(":")
    try:
        sigma = float(text)
    except ValueError:
        sigma = -1.0
    if kind != "noise" or not 0 <= sigma < math.inf:
        raise UsageError(f"corrupt takes none or noise:SIGMA, as in noise:1.0, not {spec!r}.")
    return sigma


def corrupted(data: ClientData, spec: str, seed: int, client: int) -> ClientData:
    """A client's data as its sensor gives them: training, validation and own test inputs; labels are right.

    Args:
        data: what there is to be seen.
        spec: as ``read_noise`` takes it; sigma counts in the data set's own standard deviations, so it is
            that of the noise on normalised inputs.
        seed, client: the noise hangs on them alone.

    Raises:
        UsageError: sigma can't be read, or the inputs are tokens.
    """
    sigma = read_noise(spec)
    if not sigma:
        return data
    noise = torch_generator(seed, "corrupt", client)
    return replace(
        data,
        train=_noisy(data.train, sigma, noise),
        val=_noisy(data.val, sigma, noise),
        test=_noisy(data.test, sigma, noise),
    )


def _noisy(samples: Samples, sigma: float, noise: Generator) -> Samples:
    import torch

    if not len(samples.mean):
        raise UsageError(
            "corrupt adds noise to numbers, and these samples are sequences of tokens: leave it out."
        )
    over = (1, -1) + (1,) * (samples.data.dim() - 2)
    # As numbers, and not rounded to what an image file could hold: else the noise were no longer Gaussian.
    drawn = torch.randn(samples.data.shape, generator=noise).mul_(sigma * samples.std.view(over))
    return replace(samples, data=drawn.add_(samples.data))
