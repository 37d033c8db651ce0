"""``fedkit``: the commands, and how an error becomes one sentence and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer

from fedkit import __version__
from fedkit.cli import logs, terminal
from fedkit.errors import FedkitError, is_out_of_memory, out_of_memory

app = typer.Typer(
    name="fedkit",
    help="Federated learning between devices with different neural networks.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Start with: fedkit run --strategy ktpfl --clients 4",
)
_debug = False


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fedkit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and everything that is logged.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell what happens in more detail.")
    ] = False,
    silent: Annotated[
        bool, typer.Option("--quiet", "-q", help="Tell only results and what goes wrong.")
    ] = False,
    log_format: Annotated[
        str,
        typer.Option(
            metavar="text|json",
            help="How logs and progress are written to stderr.  [default: text]",
            show_default=False,
            callback=logs.choose,
            is_eager=True,
        ),
    ] = "text",
) -> None:
    """Federated learning between devices with different neural networks."""
    global _debug
    _debug = debug
    terminal.quiet = silent
    if not debug:
        # gRPC's own lines, one for each handshake that fails, are no sentences for people.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logs.set_up(debug=debug, verbose=verbose, quiet=silent)


def main() -> None:
    """Run the command line; every error is one sentence on stderr, unless ``--debug``."""
    from fedkit.cli import (
        certs,
        client,
        data,
        doctor,
        evaluate,
        export,
        health,
        listing,
        partition,
        run,
        selector,
        server,
        simulate,
        token,
    )

    for module in (
        run,
        simulate,
        server,
        client,
        certs,
        token,
        listing,
        data,
        partition,
        export,
        evaluate,
        doctor,
        health,
        selector,
    ):
        module.register(app)
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        status = _command().main(_global_first(sys.argv[1:]), standalone_mode=False)
    except FedkitError as error:
        _fail(str(error), error.exit_code, error)
    except KeyboardInterrupt:
        _fail("Stopped.", 130, None)
    except Exception as error:
        status = _other(error)
    sys.exit(status if isinstance(status, int) else 0)


def _global_first(words: list[str]) -> list[str]:
    """`fedkit run -q` means `fedkit -q run`: these options may stand anywhere."""
    anywhere = {"--debug", "--verbose", "-v", "--quiet", "-q"}
    first, rest = list[str](), list[str]()
    for at, word in enumerate(words):
        valued = "--log-format" in (word, *words[max(at - 1, 0) : at])
        is_global = word in anywhere or valued or word.startswith("--log-format=")
        (first if is_global else rest).append(word)
    return first + rest


def _command() -> Any:
    return typer.main.get_command(app)


def _on_sigterm(number: int, frame: object) -> None:
    # The same way out as Ctrl-C: everything is cleaned up, the result so far is written.
    raise KeyboardInterrupt


def _other(error: Exception) -> int:
    import click

    if isinstance(error, click.exceptions.Abort):
        _fail("Stopped.", 130, None)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        print(error.format_message())
        return error.exit_code
    if isinstance(error, click.ClickException):
        # Typer and Click may each add the same suggestion.
        text = error.message if "Did you mean" in error.message else error.format_message()
        _fail(text if text.endswith((".", "?")) else f"{text}.", error.exit_code, error)
    if is_out_of_memory(error):
        _fail(str(out_of_memory(error)), 1, error)
    _fail(
        f"fedkit's own code failed with {type(error).__name__}: {error}; --debug shows where.",
        1,
        error,
    )


def _fail(sentence: str, status: int, error: Exception | None) -> NoReturn:
    logs.write_error(sentence, error if _debug else None)
    sys.exit(status)
