"""One door for everything that is found by name: Python entry points, ours and anybody's.

A name that arrives over the network is looked up here and nowhere else. A user's own code is named as
``package.module:attribute``; it is imported only if this process's own command line named it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from fedkit.errors import FedkitError, UsageError

KINDS = {
    "strategies": "strategy",
    "clients": "client half",
    "selectors": "selector",
    "trainers": "trainer of selectors",
    "models": "model",
    "datasets": "data set",
    "partitions": "partition",
    "codecs": "codec",
    "aggregators": "aggregator",
}
# What may be a user's own code; the rest comes from installed packages.
OWN_CODE = ("models", "datasets", "partitions")
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_allowed: set[str] = set()


@cache
def names(kind: str) -> tuple[str, ...]:
    """The names of one kind (a key of ``KINDS``), plug-ins included, in alphabetical order."""
    return tuple(sorted({point.name for point in entry_points(group=f"fedkit.{kind}")}))


def all_names(kind: str) -> list[str]:
    """As ``names``, with the members of families (``flwr:FedAdam``), which are loaded for that."""
    found: list[str] = []
    for name in names(kind):
        thing = _loaded(kind, name)
        found += [f"{name}:{member}" for member in thing] if isinstance(thing, Mapping) else [name]
    return found


def split(spec: str) -> tuple[str, str | None]:
    """``"dirichlet:0.5"`` is the name ``dirichlet`` with the argument ``0.5``."""
    name, colon, argument = spec.partition(":")
    return name, argument if colon else None


def allow(*specs: str) -> None:
    """Take note that this process's own command line named ``specs``: code to import, files to read."""
    for spec in specs:
        codes = {code_of(kind, spec) for kind in OWN_CODE}
        # Of a path no part: folder:pictures/cats allows nobody to read folder:pictures.
        _allowed.update({spec} | {code for code in codes if code is not None})


def listed(text: str) -> list[str]:
    """The names in ``--allow``: several with ; between."""
    return [spec for spec in (part.strip() for part in text.split(";")) if spec]


def is_allowed(spec: str) -> bool:
    """Whether this process's own command line named ``spec``."""
    return spec in _allowed


def code_of(kind: str, spec: str) -> str | None:
    """``package.module:attribute``, if that is what ``spec`` names (an argument may follow)."""
    taken = any(split(spec)[0] in names(other) for other in OWN_CODE)
    path = _PATH.match(spec) if kind in OWN_CODE and not taken else None
    return path.group() if path and spec[path.end() : path.end() + 1] in ("", ":") else None


def check(kind: str, spec: str) -> None:
    """Raise ``UsageError`` with the nearest names unless ``spec`` names something of this kind."""
    path = code_of(kind, spec)
    if path is None:
        _entry(kind, split(spec)[0])
    else:
        _check_code(kind, path)


def find(kind: str, spec: str) -> tuple[Any, str | None]:
    """What ``spec`` names, ours or the user's own, and the argument after it.

    Raises:
        UsageError: nothing of this kind has that name, or it is code that may not be imported.
        FedkitError: the user's own code can't be imported.
    """
    path = code_of(kind, spec)
    if path is None:
        name, argument = split(spec)
        return load(kind, name), argument
    _check_code(kind, path)
    return _import(kind, path), split(spec[len(path) :])[1]


def load(kind: str, name: str) -> Any:
    """The object registered under ``name``; of a family (a mapping of names) the member after a colon.

    Raises:
        UsageError: nothing of this kind has that name; the nearest names are in the message.
        FedkitError: a folder of the user's own hides fedkit's packages.
    """
    first, member = split(name)
    thing = _loaded(kind, first)
    if not isinstance(thing, Mapping):
        if member is not None:
            raise UsageError(
                f"The {KINDS[kind]} {first} takes nothing after a colon, as in {name!r}."
            )
        return thing
    if member not in thing:
        known = [f"{first}:{one}" for one in thing]
        raise UsageError(f"There is no {KINDS[kind]} {name!r}{suggest(name, known)}.")
    return thing[member]


def _loaded(kind: str, name: str) -> Any:
    point = _entry(kind, name)
    if point.module.partition(".")[0] in ("strategies", "clients"):
        _refuse_shadow(point.module.partition(".")[0])
    return point.load()


def suggest(word: str, known: Iterable[str]) -> str:
    """ " (did you mean a or b?)" for the nearest known words, else the list of what there is."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=2, cutoff=0.5)
    if near:
        return f" (did you mean {' or '.join(near)}?)"
    return f" (there is: {', '.join(known)})" if known else ""


def _check_code(kind: str, path: str) -> None:
    module, _, _ = path.partition(":")
    if path not in _allowed:
        raise UsageError(
            f"There is no {KINDS[kind]} {module!r}{suggest(module, names(kind))}; if {path} is code of "
            f"your own, give --allow {path} to let this process import it."
        )
    _find_in_current_folder()
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None  # the package that it should be in is not there, or is no package
    if spec is None:
        raise UsageError(
            f"There is no {KINDS[kind]} {module!r}{suggest(module, names(kind))}, and no Python module "
            f"{module} in this folder, on PYTHONPATH or installed."
        )


def _import(kind: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # whatever somebody's module raises while it is imported
        raise FedkitError(
            f"The {KINDS[kind]} {path} can't be imported: {type(error).__name__}: {error}."
        ) from error
    thing = getattr(loaded, attribute, None)
    if not callable(thing):
        found = [name for name, value in vars(loaded).items() if callable(value)]
        raise UsageError(f"{module} has no function {attribute!r}{suggest(attribute, found)}.")
    return thing


def _find_in_current_folder() -> None:
    # Last, so that a folder of the user's own can't hide anybody's package.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


@cache
def _entry(kind: str, name: str) -> EntryPoint:
    found = list(entry_points(group=f"fedkit.{kind}", name=name))
    if not found:
        raise UsageError(f"There is no {KINDS[kind]} {name!r}{suggest(name, names(kind))}.")
    return found[0]


def _refuse_shadow(package: str) -> None:
    # `strategies` and `clients` are common names, and Python takes the first folder on its path.
    home = Path(__file__).resolve().parent.parent
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places or Path(places[0]).resolve().parent != home:
        where = places[0] if places else (spec.origin if spec else "nowhere")
        raise FedkitError(
            f"Python finds the package {package!r} in {where}, which hides fedkit's own: "
            "start fedkit from another folder, or rename that one."
        )
