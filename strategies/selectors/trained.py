"""Selectors that were trained, by name. torch is loaded when one is made, not when it is listed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedkit.errors import UsageError

if TYPE_CHECKING:
    from strategies.selectors.fedmarl import FedMARL


def fedmarl(argument: str | None) -> FedMARL:
    """fedmarl[:POLICY][,learn]: trained agents keep or stop each client after a probing epoch.

    POLICY is a file of `fedkit selector train`; without it, or named default, the policy that ships with
    fedkit. With learn the agents go on learning from the rounds of this run, which must be measured on
    validation data.
    """
    name, comma, word = (argument or "default").partition(",")
    if (comma and word != "learn") or not name:
        raise UsageError(
            f"fedmarl takes a policy's file, as in fedmarl:mine.safetensors or fedmarl:default,learn, "
            f"not {argument!r}."
        )
    from strategies.selectors.fedmarl import FedMARL, Learning
    from strategies.selectors.policy import SHIPPED, load_policy

    policy = load_policy(SHIPPED if name == "default" else Path(name))
    return FedMARL(policy, Learning(policy) if comma else None)
