"""An optimiser's moments as named arrays, so that they can be kept without pickling anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def moments_of(optimiser: torch.optim.Optimizer) -> dict[str, NDArray[Any]]:
    """What an optimiser remembers of each parameter, by ``PARAMETER/MOMENT`` (parameters by number)."""
    state: dict[int, dict[str, Any]] = optimiser.state_dict()["state"]
    return {
        f"{index}/{moment}": torch.as_tensor(value).cpu().numpy()
        for index, moments in state.items()
        for moment, value in moments.items()
        if value is not None
    }


def give_moments(optimiser: torch.optim.Optimizer, moments: Mapping[str, NDArray[Any]]) -> None:
    """Let an optimiser go on from moments that another of its kind, on the same network, had."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, array in moments.items():
        index, _, moment = key.partition("/")
        state.setdefault(int(index), {})[moment] = torch.from_numpy(np.array(array))
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})
