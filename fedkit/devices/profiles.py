"""Kinds of devices: factors of compute, of the line and of availability, by name or from a TOML file.

A profile is a kind; ``fedkit.devices.device.Device`` is one of that kind, with its seed and number.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedkit.errors import UsageError
from fedkit.registry import suggest

LARGEST = 1e6
# Where a kind has no such trouble.
ALWAYS = (0.0, 24.0)


@dataclass(frozen=True)
class Profile:
    """What one kind of device is like, as factors of this formula.

    With z, z_c(t), z_b(t) standard normal, from (seed, client) and the slot of a minute that t is in, and
    h(t) the hour of the device's own day, which begins at an hour drawn from (seed, client):

        slowdown(t) = slowdown * exp(spread * z + jitter * z_c(t))
        work(n, E, c, t) = n * E * c * slowdown(t)
        share(t) = exp(line_jitter * z_b(t)) * (1 - evening_dip * (1 + cos(2 pi (h(t) - 21) / 24)) / 2)
        up(b, t) = latency + 8 b / (10^6 * up_mbit * share(t)), and down(b, t) alike
        available(t) = on(t) and h(t) in window

    where n samples, E epochs, c seconds a sample on the machine that emulates, b bytes, and on(t) is a
    Markov chain in slots of a minute: on -> off with probability drop, off -> on with ``back``.

    Attributes:
        name: of the kind.
        slowdown: how many times as long as the emulating machine it trains; above 0.
        up_mbit, down_mbit: the line's rate, megabits a second.
        latency: seconds that a message takes beside its bytes.
        spread: how far devices of this kind lie apart (standard deviation of the logarithm).
        jitter, line_jitter: how far compute and line vary over time (the same measure).
        evening_dip: share of the line that is missing at 21 h, when all are at home; 0 to below 1.
        drop: probability in a minute that it drops out.
        back: probability in a minute that it returns; drop + back <= 1.
        window: hours of its own day, from and until, in which it has the power to take part (plugged in,
            or a charged battery); it may run over midnight. (0, 24) is always, and two equal hours are
            no window.
    """

    name: str
    slowdown: float
    up_mbit: float
    down_mbit: float
    latency: float
    spread: float = 0.0
    jitter: float = 0.0
    line_jitter: float = 0.0
    evening_dip: float = 0.0
    drop: float = 0.0
    back: float = 1.0
    window: tuple[float, float] = ALWAYS


# Lines: global medians of the Speedtest Global Index for the first quarter of 2023, as reported in the
# press (fixed: 79 Mbit/s down, 35 up, 9 ms; mobile: 41.5 down, 10.4 up, 28 ms). Slowdown against one core
# of a server, spreads and probabilities are ours: orders of magnitude, not measurements. A Raspberry Pi 4
# has four slow cores without wide vectors, a Jetson Nano a GPU of 0.24 TFLOPS (float32).
KNOWN = {
    profile.name: profile
    for profile in (
        Profile("pi4", 12.0, 35.0, 79.0, 0.009, 0.1, 0.1, 0.2, 0.2, 0.001, 0.1),
        Profile("jetson-nano", 5.0, 35.0, 79.0, 0.009, 0.1, 0.05, 0.2, 0.2, 0.001, 0.1),
        Profile("phone-mid", 8.0, 10.4, 41.5, 0.028, 0.4, 0.2, 0.3, 0.3, 0.005, 0.2),
        Profile("laptop", 2.0, 35.0, 79.0, 0.009, 0.3, 0.2, 0.3, 0.2, 0.002, 0.1),
    )
}
_NEEDED = ("slowdown", "up_mbit", "down_mbit", "latency")
_POSITIVE = ("slowdown", "up_mbit", "down_mbit")
_SHARES = ("drop", "back", "evening_dip")


def profile(spec: str) -> Profile:
    """The profile of that name, or in that TOML file (a ``.toml`` name or a path).

    Raises:
        UsageError: there is neither, or the file does not describe a device.
    """
    if spec in KNOWN:
        return KNOWN[spec]
    if not spec.endswith(".toml") and "/" not in spec:
        raise UsageError(
            f"There is no device profile {spec!r}{suggest(spec, KNOWN)}; one of your own is a file, as "
            "in mine.toml."
        )
    return _read(Path(spec))


def profiles(specs: str) -> list[Profile]:
    """The profiles of a list, as in ``pi4,laptop``; what many clients cycle over."""
    return [profile(spec.strip()) for spec in specs.split(",")]


def _read(path: Path) -> Profile:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"The device profile {path} can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"The device profile {path} is no TOML: {error}.") from error
    values = {name.replace("-", "_"): value for name, value in values.items()}
    known = [item.name for item in fields(Profile)]
    for name in values:
        if name not in known:
            raise UsageError(f"A device has no {name!r} (in {path}){suggest(name, known)}.")
    missing = [name for name in _NEEDED if name not in values]
    if missing:
        raise UsageError(f"The device profile {path} does not say {' and '.join(missing)}.")
    name = values.pop("name", path.stem)
    if not isinstance(name, str) or not name.isprintable():
        raise UsageError(f"The name of the device in {path} is no text.")
    window = _window(values.pop("window", list(ALWAYS)), path)
    numbers = {name: _number(name, value, path) for name, value in values.items()}
    made = Profile(name, **numbers, window=window)
    if made.drop + made.back > 1:
        raise UsageError(
            f"drop + back is {made.drop + made.back:g} in {path}: in a minute a device does one of the "
            "two, so take 1 at most."
        )
    return made


def _number(name: str, value: Any, path: Path) -> float:
    least = "above 0" if name in _POSITIVE else "0 or more"
    # A line that is gone altogether would never send anything.
    most = 1.0 if name in _SHARES else LARGEST
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most
    if not good or (name in _POSITIVE and value == 0) or (name == "evening_dip" and value == 1):
        end = f", below {most:g}" if name == "evening_dip" else f", {most:g} at most"
        raise UsageError(f"{name} is {value!r} in {path}: it is a number, {least}{end}.")
    return float(value)


def _window(value: Any, path: Path) -> tuple[float, float]:
    hours = value if isinstance(value, list) and len(value) == 2 else [math.nan]
    if not all(isinstance(hour, int | float) and 0 <= hour <= 24 for hour in hours):
        raise UsageError(f"window is {value!r} in {path}: it is two hours, as in [22, 6].")
    first, last = map(float, hours)
    if first % 24 == last % 24 and (first, last) != ALWAYS:
        raise UsageError(
            f"window is {value!r} in {path}: it ends when it begins, which may mean always or never. For "
            "always leave it out."
        )
    return first, last
