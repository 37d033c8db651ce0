"""A policy: what a team of agents has learnt, as a safetensors file that says what it was trained on.

Nothing is unpickled; what the file says of sizes is held against the arrays that it has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fedkit import __version__
from fedkit.devices.settings import ObjectiveSettings
from fedkit.durable import write_whole
from fedkit.errors import FedkitError, UsageError
from fedkit.settings import as_config, build
from strategies.selectors.agents import Team
from strategies.selectors.features import Standard, width
from strategies.selectors.fedmarl_settings import FedMARLSettings

SCHEMA = 3
SHIPPED = Path(__file__).parent / "policies" / "default.safetensors"
LARGEST_BYTES = 64_000_000
# Whatever a file that is not ours, or no longer whole, may lead to.
_DAMAGED = (
    OSError,
    SafetensorError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    UsageError,
)


@dataclass(frozen=True)
class Policy:
    """What a file holds.

    Attributes:
        settings: hyper-parameters.
        objective: what it was paid for.
        team: the agents, and what makes a team of them.
        standard: the features' running statistics.
        about: what else the file says: ``simulation`` (settings by outside name), ``episodes``, ``seed``,
            ``simulator`` (SHA-256 of the code), ``fedkit`` (version), ``results``.
    """

    settings: FedMARLSettings
    objective: ObjectiveSettings
    team: Team
    standard: Standard
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def untrained(
        cls, settings: FedMARLSettings, objective: ObjectiveSettings, seed: int
    ) -> Policy:
        """One that keeps everybody."""
        features = width(settings.history)
        return cls(settings, objective, Team(settings, features, seed), Standard.of_width(features))


def save_policy(path: Path, policy: Policy) -> None:
    """Replace ``path`` by a policy, so that a crash leaves the old file or the new one.

    Raises:
        FedkitError: it can't be written.
    """
    arrays = {f"team.{name}": array for name, array in policy.team.arrays().items()}
    arrays["mean"], arrays["squares"] = policy.standard.mean, policy.standard.squares
    header = {
        "schema": SCHEMA,
        "sha256": _checksum(arrays),
        "settings": as_config(policy.settings),
        "objective": as_config(policy.objective),
        "count": policy.standard.count,
        "about": {"fedkit": __version__, **policy.about},
    }
    write_whole(path, [safetensors.numpy.save(arrays, {"fedmarl": json.dumps(header)})])


def load_policy(path: Path) -> Policy:
    """The policy in a file.

    Raises:
        UsageError: there is no such file.
        FedkitError: it is damaged, or no policy of FedMARL.
    """
    if not path.is_file():
        raise UsageError(
            f"There is no policy {path}: `fedkit selector train --out {path}` makes one."
        )
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ValueError("it is too large for one")
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get("fedmarl")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(text) if text is not None else {}
        if header.get("schema") == SCHEMA:
            return _read(header, arrays)
    except _DAMAGED as error:
        raise FedkitError(f"The policy in {path} can't be read: {error}.") from error
    if text is None:
        raise FedkitError(f"{path} is no policy of FedMARL, though it is a safetensors file.")
    raise FedkitError(
        f"{path} was written by another version of fedkit (schema {header.get('schema')})."
    )


def describe(policy: Policy) -> dict[str, Any]:
    """All that a policy says of itself, as JSON can hold it."""
    return {
        **policy.about,
        "objective": asdict(policy.objective),
        "settings": asdict(policy.settings),
        "parameters": sum(array.size for array in policy.team.arrays().values()),
    }


def _read(header: Mapping[str, Any], arrays: Mapping[str, NDArray[np.generic]]) -> Policy:
    if _checksum(arrays) != header["sha256"]:
        raise ValueError("its arrays are not those that were written")
    settings = build(FedMARLSettings, header["settings"])
    objective = build(ObjectiveSettings, header["objective"])
    policy = Policy.untrained(settings, objective, seed=0)
    team = {name.removeprefix("team."): array for name, array in arrays.items()}
    policy.team.take(team)
    features, count = width(settings.history), header["count"]
    mean, squares = arrays["mean"], arrays["squares"]
    for array in (mean, squares):
        if array.shape != (features,) or array.dtype != np.float64 or not np.isfinite(array).all():
            raise ValueError(f"its statistics are no {features} finite numbers")
    if not isinstance(count, int) or count < 0 or not isinstance(header["about"], dict):
        raise ValueError("its header is not whole")
    standard = Standard(count, mean.astype(np.float64), squares.astype(np.float64))
    return Policy(settings, objective, policy.team, standard, header["about"])


def _checksum(arrays: Mapping[str, NDArray[np.generic]]) -> str:
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        sha.update(f"{name} {array.dtype} {array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()
