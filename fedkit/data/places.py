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
    root, asked = _root(sources), Path(path).expanduser()
    under = root / asked if root is not None else None
    if not is_allowed(spec):
        _check_inside(spec, path, root)
        places = [under] if under else []
    else:
        places = [under, asked] if under and not asked.is_absolute() else [asked]
    for place in places:
        if place.exists():
            return place
    raise FedkitError(f"{spec}: there is no {' or '.join(str(place) for place in places)}.")


def _root(sources: DataSettings) -> Path | None:
    root = sources.data_root or os.environ.get("FEDKIT_DATA_ROOT", "")
    return Path(root).expanduser() if root else None


def _check_inside(spec: str, path: str, root: Path | None) -> None:
    asked = Path(path)
    inside = (
        root is not None
        and not asked.is_absolute()
        and ".." not in asked.parts
        and not path.startswith("~")
        and (root / asked).resolve().is_relative_to(root.resolve())
    )
    if not inside:
        raise UsageError(
            f"{path} is no path inside this device's data root, and only its own command line may name "
            f"others: --dataset {spec} or --allow {spec} lets this process read it."
        )
