"""Command-line options made from the settings dataclasses, so that nothing is typed twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from fedkit.errors import UsageError
from fedkit.settings import Value, default_of, key, merge, read_overrides, read_toml

F = TypeVar("F", bound=Callable[..., Any])

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        help="Any setting or hyper-parameter, as in -o temperature=5; may be repeated. "
        "`fedkit list settings STRATEGY` shows them all.",
    ),
]
ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config", metavar="FILE", help="Take settings from a TOML file.  [default: none]"
    ),
]


Format = Annotated[
    str,
    typer.Option(
        metavar="text|json",
        help="How to print the answer.  [default: text]",
        show_default=False,
    ),
]


Server = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT",
        help="Where the server listens.  [default: 127.0.0.1:8090]",
        show_default=False,
    ),
]
LOCAL_SERVER = "127.0.0.1:8090"


def checked_address(text: str) -> str:
    """``--server`` as it was typed; ``UsageError`` if it is no HOST:PORT."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"--server takes HOST:PORT, as in {LOCAL_SERVER}, not {text!r}.")
    return text


def wants_json(format: str) -> bool:
    """Whether ``--format`` asks for JSON; ``UsageError`` if it asks for something unknown."""
    if format not in ("text", "json"):
        raise UsageError(f"--format takes text or json, not {format!r}.")
    return format == "json"


def layered(
    config: str | None,
    overrides: list[str] | None,
    typed: dict[str, Value],
    *,
    not_in_file: type | None = None,
) -> dict[str, Value]:
    """Settings from all places where they may stand: options win over -o, that over the file.

    Those of ``not_in_file`` are passed over in the file: a server may be given a local run's.
    """
    passed_over = {key(item.name) for item in fields(not_in_file)} if not_in_file else set()
    file = merge(read_toml(config)) if config else {}
    kept = {name: value for name, value in file.items() if name not in passed_over}
    return merge(kept, read_overrides(overrides or []), typed)


def with_settings(*kinds: type, defaults: Mapping[str, str] | None = None) -> Callable[[F], F]:
    """Give a command one option for each setting of ``kinds``; it gets those typed as ``settings``.

    The command's own parameters stay; its parameter ``settings`` takes a dict by outside name.
    ``defaults`` are shown instead of the declared ones where a command has its own.
    """

    def decorate(command: F) -> F:
        own = inspect.signature(command, eval_str=True).parameters
        kept = [parameter for name, parameter in own.items() if name != "settings"]
        made = [
            _parameter(item, get_type_hints(kind)[item.name], (defaults or {}).get(key(item.name)))
            for kind in kinds
            for item in fields(kind)
        ]
        names = {parameter.name for parameter in made}

        def call(**arguments: Any) -> Any:
            values = {key(name): arguments.pop(name, None) for name in names}
            typed = {name: value for name, value in values.items() if value is not None}
            return command(settings=typed, **arguments)

        call.__name__ = command.__name__
        call.__doc__ = command.__doc__
        call.__signature__ = inspect.Signature([*kept, *made])  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in [*kept, *made]}
        return call  # type: ignore[return-value]

    return decorate


def describe(item: Field[Any], shown: str | None = None) -> str:
    """A setting's help with its unit and default (or what is ``shown`` instead), as one line."""
    if shown is not None:
        return f"{_sentence(item.metadata['help'])}  [default: {shown}]"
    unit, default = item.metadata["unit"], default_of(item)
    shown = _shown(default)
    many = unit.removesuffix("s") if default == 1 else unit
    unit_text = f" {many}" if unit and not isinstance(default, bool | str) else ""
    tail = f"  [default: {shown}{unit_text}]" if shown else ""
    return f"{_sentence(item.metadata['help'])}{tail}"


def _parameter(item: Field[Any], kind: type, shown: str | None) -> inspect.Parameter:
    name = f"--{key(item.name)}"
    flags = (f"{name}/--no-{key(item.name)}",) if kind is bool else (name,)
    choices = item.metadata["choices"]
    metavar = None if kind is bool else ("|".join(choices) if choices else _metavar(kind, item))
    option = typer.Option(*flags, help=describe(item, shown), show_default=False, metavar=metavar)
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _metavar(kind: type, item: Field[Any]) -> str:
    unit = item.metadata["unit"]
    if kind is str:
        return str(unit).upper() if unit else "TEXT"
    return str(unit).upper() if unit else ("INTEGER" if kind is int else "NUMBER")


def _shown(default: Value) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
