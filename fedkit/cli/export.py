"""``fedkit export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedkit.cli import terminal
from fedkit.errors import UsageError
from fedkit.registry import allow, listed

EXAMPLES = """\b
Examples:
  fedkit export runs/2026-11-21T17-45-03-fedavg
  fedkit export runs/2026-11-21T17-45-03-ktpfl --model client-2 --out resnet.pt
  fedkit export /var/lib/fedkit --format onnx
  fedkit export runs/2026-11-21T17-45-03-heterofl --width 0.25 --format onnx
  fedkit export runs/2026-11-21T17-45-03-depthfl --model global --exit 2 --out shallow.onnx
"""
ModelPlace = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|STATE_DIR", help="A run directory, a client's --state-dir, or a model file."
    ),
]
ModelLabel = Annotated[
    str | None,
    typer.Option(
        metavar="LABEL|client-K",
        help="Which model: one of the server's, or a local client's own (client-K/alone: its "
        "reference).",
        show_default=False,
    ),
]
FederationId = Annotated[
    str | None,
    typer.Option(
        metavar="ID",
        help="Which federation's, where a client took part in several.  [default: the newest]",
        show_default=False,
    ),
]
SUFFIXES = {".safetensors": "safetensors", ".pt": "pt", ".pth": "pt", ".onnx": "onnx"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EXAMPLES, short_help="Write a model as a file for other programs.")(export)


def export(
    path: ModelPlace,
    model: ModelLabel = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where to write it; a file that is there is left alone.  "
            "[default: LABEL.FORMAT in this folder]",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="safetensors|pt|onnx",
            help="A state dict as safetensors or for torch.load, or the network as ONNX.  "
            "[default: as FILE ends, else safetensors]",
            show_default=False,
        ),
    ] = None,
    width: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Cut a network to this share of the channels of every layer, as in 0.25.  [default: the "
            "network as it is]",
            show_default=False,
        ),
    ] = None,
    at_exit: Annotated[
        int | None,
        typer.Option(
            "--exit",
            min=1,
            metavar="NUMBER",
            help="Cut a network with several exits at this one: what is written ends there.  "
            "[default: the network as it is]",
            show_default=False,
        ),
    ] = None,
    federation: FederationId = None,
    allowed: Annotated[
        str,
        typer.Option(
            "--allow",
            metavar="NAMES",
            help="Code of your own (package.module:function) that may be imported where the model's "
            "file names it; several with ; between.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Write a model as a file for other programs: the server's, or a client's own as it is now."""
    from fedkit.engine.saved import at_width, chosen, models_of

    allow(*listed(allowed))
    kind = _format(format, out)
    every = models_of(path, federation)
    found = chosen(every, model if width is None else at_width(every, model, width), path)
    file = out or Path(f"{found.label.replace('/', '-')}.{kind}")
    if file.exists():
        raise UsageError(f"{file} is there already: choose another --out.")
    from fedkit.models import export as files

    saved = found.read()
    if at_exit is not None:
        saved = files.cut(saved, at_exit)
    if width is not None:
        saved = files.narrowed(saved, width)
    files.export(saved, file, kind)
    if not terminal.quiet:
        part = "" if width is None else f" at width {width:g}"
        print(f"The model {found.label} of {path}{part} is in {file}.")


def _format(format: str | None, out: Path | None) -> str:
    if format is None:
        return SUFFIXES.get(out.suffix, "safetensors") if out is not None else "safetensors"
    if format not in SUFFIXES.values():
        raise UsageError(f"--format takes safetensors, pt or onnx, not {format!r}.")
    return format
