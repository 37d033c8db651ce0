"""A strategy's state on disk: one dataclass, one safetensors file, nothing pickled.

A state may hold numbers, texts, NumPy arrays, and lists and dictionaries of these (keys: whole numbers
or texts). Arrays become tensors of the file; everything else is JSON in its header.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fedkit.durable import write_whole
from fedkit.errors import FedkitError

T = TypeVar("T")
SCHEMA = 1
# Whatever a file that is not ours, or no longer whole, may lead to.
_DAMAGED = (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError)


def save_state(path: Path, state: Any) -> None:
    """Replace ``path`` by a state, so that a crash leaves the old file or the new one.

    Raises:
        FedkitError: the file can't be written.
        TypeError: the state holds something that can't be saved.
    """
    arrays: dict[str, NDArray[np.generic]] = {}
    tree = {item.name: _take_apart(getattr(state, item.name), arrays) for item in fields(state)}
    header = {"schema": SCHEMA, "kind": type(state).__name__, "tree": tree}
    write_whole(path, [safetensors.numpy.save(arrays, {"fedkit": json.dumps(header)})])


def check_state(state: Any) -> None:
    """Raise ``TypeError`` for a state that can't be saved."""
    for item in fields(state):
        json.dumps(_take_apart(getattr(state, item.name), {}))


def load_state(path: Path, kind: type[T]) -> T:
    """The state of that kind in a file.

    Raises:
        FedkitError: there is no such file, it is damaged, or holds another strategy's state.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})["fedkit"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = header["schema"], header["kind"]
        if found == (SCHEMA, kind.__name__):
            tree = header["tree"]
            return kind(**{name: _put_together(part, arrays) for name, part in tree.items()})
    except _DAMAGED as error:
        raise FedkitError(f"The strategy's state in {path} can't be read: {error}.") from error
    raise FedkitError(
        f"{path} holds {found[1]} (schema {found[0]}), not {kind.__name__} (schema {SCHEMA})."
    )


def _take_apart(value: Any, arrays: dict[str, NDArray[np.generic]]) -> Any:
    """JSON that stands for ``value``; its arrays go to ``arrays``, named by their number."""
    if isinstance(value, np.ndarray):
        name = str(len(arrays))
        # Not ascontiguousarray, which gives one dimension to what has none.
        arrays[name] = np.asarray(value, order="C")
        return {"array": name}
    if isinstance(value, dict):
        # As pairs: JSON would turn keys that are numbers into texts.
        return {"pairs": [[key, _take_apart(entry, arrays)] for key, entry in value.items()]}
    if isinstance(value, list):
        return [_take_apart(entry, arrays) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a state can't hold {type(value).__name__}")


def _put_together(part: Any, arrays: dict[str, NDArray[np.generic]]) -> Any:
    if isinstance(part, list):
        return [_put_together(entry, arrays) for entry in part]
    if not isinstance(part, dict):
        return part
    if "array" in part:
        return arrays[part["array"]]
    return {key: _put_together(entry, arrays) for key, entry in part["pairs"]}
