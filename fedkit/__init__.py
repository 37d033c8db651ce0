"""fedkit: federated learning between devices with different neural networks.

>>> from fedkit import Federation
>>> result = Federation(strategy="ktpfl", clients=4).run()  # doctest: +SKIP
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedkit.engine.local import Federation, Result
    from fedkit.errors import FedkitError, UsageError

__version__ = version("fedkit")
__all__ = ["Federation", "FedkitError", "Result", "UsageError", "__version__"]

_HOMES = {
    "Federation": "fedkit.engine.local",
    "Result": "fedkit.engine.local",
    "FedkitError": "fedkit.errors",
    "UsageError": "fedkit.errors",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: `fedkit --help` must not pay for what it does not need.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
