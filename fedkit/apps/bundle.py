"""A Flower App on this machine's own disk: what its ``pyproject.toml`` says, and its two components."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedkit.errors import UsageError, where_raised
from fedkit.registry import suggest
from fedkit.settings import Value

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

T = TypeVar("T")


@dataclass(frozen=True)
class FlowerApp:
    """An app as it lies on disk.

    Attributes:
        folder: where its ``pyproject.toml`` is; on Python's path once a component was loaded.
        name: ``publisher/name``, as Flower knows it.
        version: its version.
        project: its ``pyproject.toml``.
    """

    folder: Path
    name: str
    version: str
    project: Mapping[str, Any] = field(repr=False)

    def __str__(self) -> str:
        """As people and servers are told."""
        return f"{self.name} {self.version}"

    def server_app(self) -> ServerApp:
        """Its ``ServerApp``; ``UsageError`` if it can't be loaded."""
        from flwr.serverapp import ServerApp

        return self._component("serverapp", ServerApp)

    def client_app(self) -> ClientApp:
        """Its ``ClientApp``; ``UsageError`` if it can't be loaded."""
        from flwr.clientapp import ClientApp

        return self._component("clientapp", ClientApp)

    def run_config(self, texts: Sequence[str]) -> dict[str, Value]:
        """Its ``[tool.flwr.app.config]`` with what ``--run-config`` says instead.

        Raises:
            UsageError: it can't be read, or names what the app's configuration does not have.
        """
        from fedkit.flower import run_config_of

        try:
            own = run_config_of(self.project, {})
        except ValueError as error:
            raise UsageError(f"[tool.flwr.app.config] of {self.name} is wrong: {error}") from error
        overrides = read_pairs("--run-config", texts)
        for name in overrides:
            if name not in own:
                raise UsageError(
                    f"The run config of {self.name} has no {name!r}{suggest(name, own)}: only what "
                    "stands in [tool.flwr.app.config] can be set."
                )
        return run_config_of(self.project, overrides)

    def _component(self, name: str, kind: type[T]) -> T:
        from fedkit.flower import NoSuchAttribute, load_component

        reference = self.project["tool"]["flwr"]["app"]["components"].get(name)
        if not isinstance(reference, str):
            raise UsageError(f"{self.name} names no {name} in [tool.flwr.app.components].")
        where = f"{reference}, the {name} of {self.name} in {self.folder},"
        try:
            found = load_component(reference, self.folder)
        except NoSuchAttribute as error:
            raise UsageError(
                f"{where} is not there: the name must be MODULE:ATTRIBUTE of something in the module."
            ) from error
        except ModuleNotFoundError as error:
            raise UsageError(_missing(where, reference, self.folder, error)) from error
        except (Exception, SystemExit) as error:  # whatever somebody's module does when imported
            raise UsageError(
                f"{where} can't be loaded: {type(error).__name__}: {error} "
                f"({where_raised(error)}); --debug shows where."
            ) from error
        if not isinstance(found, kind):
            raise UsageError(f"{where} is a {type(found).__name__}, not a {kind.__name__}.")
        return found


def read_app(folder: Path) -> FlowerApp:
    """The app in a folder; none of its code is run.

    Raises:
        UsageError: there is none, or its ``pyproject.toml`` describes none.
    """
    from fedkit.flower import read_project

    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder} (--app).")
    try:
        project = read_project(folder)
        app = project["tool"]["flwr"]["app"]
        components = app["components"]
        name = f"{app['publisher']}/{project['project']['name']}"
        found = FlowerApp(folder, name, str(project["project"]["version"]), project)
    except FileNotFoundError:
        raise UsageError(
            f"{folder} holds no pyproject.toml, so it is no Flower App: give the folder that `flwr run` "
            "would take."
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"{folder} is no Flower App: {said}.") from error
    if "agentapp" in components:
        raise UsageError(f"{name} is an AgentApp, which needs Flower's own engine: `flwr run`.")
    return found


def read_pairs(option: str, texts: Sequence[str]) -> dict[str, Value]:
    """What ``--run-config`` or ``--node-config`` says, in Flower's syntax; the later text wins.

    Raises:
        UsageError: it can't be read.
    """
    from fedkit.flower import read_config

    values: dict[str, Value] = {}
    for text in texts:
        takes = f"{option} takes \"key=1 other='word'\", or the name of a TOML file, not {text!r}."
        try:
            read = read_config([text])
            words = 0 if text.endswith(".toml") else len(shlex.split(text))
        except FileNotFoundError as error:
            raise UsageError(f"There is no file {error.filename} ({option}).") from error
        except Exception as error:  # of Flower's parser: TOML's errors, Click's, its own
            raise UsageError(takes) from error
        if len(read) < words:  # what it does not understand, as in "key = 1", it passes over
            raise UsageError(takes)
        values |= read
    return values


def _missing(where: str, reference: str, folder: Path, error: ModuleNotFoundError) -> str:
    module, missing = reference.partition(":")[0], error.name or ""
    if module == missing or module.startswith(f"{missing}."):
        return f"{where} is not there: {folder} holds no module {missing}."
    return (
        f"{where} needs the package {missing}, which is not installed here: install what the app's "
        f"pyproject.toml lists, as with `pip install {folder}`."
    )
