"""Where data sets are looked up on this machine, and which paths may be read at all.

The name of a data set may have come from a server over the network. It shall not make a device read
whatever a stranger names, so paths are confined to the data root unless this process's own command line
named them.
"""

from __future__ import annotations

import os
from pathlib import Path

from fedkit.errors import FedkitError, UsageError
from fedkit.registry import is_allowed
from fedkit.settings import DataSettings


def data_root(kind: str, sources: DataSettings) -> Path:
    """The folder of data sets.

    Raises:
        FedkitError: none is given, or it is not there.
    """
    root = _root(sources)
    if root is None:
        raise FedkitError(
            f"{kind} needs a folder of data sets: give --data-root FOLDER or set FEDKIT_DATA_ROOT."
        )
    if not root.is_dir():
        raise FedkitError(f"The data root {root} is not a folder.")
    return root


def own_path(spec: str, path: str, sources: DataSettings) -> Path:
    """The file or folder ``path`` of the data set ``spec``, under the data root or in this folder.

    Raises:
        UsageError: it is empty, or may not be read.
        FedkitError: it is not there.
    """
    if not path or "\0" in path:
        raise UsageError(
            f"{spec!r} names no path: it takes one, as in {spec.partition(':')[0]}:PATH."
        )
    root = _root(sources)
    try:
        places = _places(path, root) if is_allowed(spec) else [_inside(spec, path, root)]
        for place in places:
            if place.exists():
                return place
    except (OSError, RuntimeError) as error:  # too long, a circle of links, nobody's home
        raise FedkitError(f"{spec} can't be looked up: {error}.") from error
    raise FedkitError(f"{spec}: there is no {' or '.join(str(place) for place in places)}.")


def _root(sources: DataSettings) -> Path | None:
    root = sources.data_root or os.environ.get("FEDKIT_DATA_ROOT", "")
    return Path(root) if root else None


def _places(path: str, root: Path | None) -> list[Path]:
    asked = Path(path).expanduser()
    return [asked] if root is None or asked.is_absolute() else [root / asked, asked]


def _inside(spec: str, path: str, root: Path | None) -> Path:
    asked = Path(path)
    if (
        root is None
        or asked.is_absolute()
        or ".." in asked.parts
        or path.startswith("~")
        or not (root / asked).resolve().is_relative_to(root.resolve())
    ):
        raise UsageError(
            f"{path} is no path inside this device's data root, and only its own command line may name "
            f"others: --dataset {spec} or --allow {spec} lets this process read it."
        )
    return root / asked
