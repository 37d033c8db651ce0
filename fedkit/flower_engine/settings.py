"""The run config: fedkit's settings under their usual names, as `flwr run --run-config` takes them.

Flower lets nobody give a key that the app's ``pyproject.toml`` does not declare. So all are declared there,
each with an empty text: not given. (A test holds that list against ``keys``.)
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields

from fedkit.errors import UsageError
from fedkit.registry import all_names, load
from fedkit.settings import (
    DataSettings,
    FederationSettings,
    ServerSettings,
    Value,
    key,
    merge,
    read_overrides,
    read_toml,
    setting,
)

# What a server of Flower's engine has no use for.
_OF_THE_LINK = frozenset({"listen", "reconnect-grace", "max-message"})


@dataclass(frozen=True)
class RunConfigSettings:
    """What a run config has beside a federation's settings."""

    config: str = setting("", "take settings from a TOML file on the SuperLink's machine")
    option: str = setting(
        "", "hyper-parameters of a plug-in's, as KEY=VALUE with spaces between (`fedkit run -o`)"
    )
    resume: str = setting(
        "", "go on with the run in that folder; auto: with the one in run-dir if it has begun"
    )


def keys() -> list[str]:
    """Every key of a run config, in order: ours, and the hyper-parameters of all our strategies."""
    kinds: list[type] = [RunConfigSettings, FederationSettings, ServerSettings, DataSettings]
    kinds += [load("strategies", name).Hyperparameters for name in all_names("strategies")]
    names = dict.fromkeys(key(item.name) for kind in kinds for item in fields(kind))
    return [name for name in names if name not in _OF_THE_LINK]


def given(run_config: Mapping[str, Value]) -> tuple[dict[str, Value], str | None]:
    """The settings that were given, by outside name, and the run to go on with, if any.

    A key on its own wins over ``option``, and that over the file ``config``.

    Raises:
        UsageError: the file can't be read, or ``option`` is no list of KEY=VALUE.
    """
    typed = {name: value for name, value in merge(run_config).items() if value != ""}
    own = {item.name: str(typed.pop(key(item.name), "")) for item in fields(RunConfigSettings)}
    file = read_toml(own["config"]) if own["config"] else {}
    try:
        words = shlex.split(own["option"])
    except ValueError as error:
        raise UsageError(f"option={own['option']!r} can't be read: {error}.") from error
    option = read_overrides(words)
    return merge(file, option, typed), own["resume"] or None
