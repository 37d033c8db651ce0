"""``fedkit token``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedkit.cli import terminal
from fedkit.cli.options import Format, wants_json
from fedkit.errors import FedkitError

NEW = """\b
Examples:
  fedkit token new --name drone-1
  fedkit token new --name drone-1 --out drone-1.token
  fedkit token new --name drone-1 --file /etc/fedkit/tokens.json
"""
LIST = """\b
Examples:
  fedkit token list
  fedkit token list --file /etc/fedkit/tokens.json --format json
"""
REVOKE = """\b
Examples:
  fedkit token revoke 5be1a0f3
"""
File = Annotated[
    Path,
    typer.Option(
        "--file",
        metavar="FILE",
        help="The server's file of tokens.  [default: tokens.json]",
        show_default=False,
    ),
]
TOKENS = Path("tokens.json")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    group.command(epilog=NEW, short_help="Make a token.")(new)
    group.command("list", epilog=LIST, short_help="Tell which tokens there are.")(list_tokens)
    group.command(epilog=REVOKE, short_help="Make a token hold no more.")(revoke)
    app.add_typer(group, name="token", help="Make and revoke the tokens with which clients join.")


def new(
    name: Annotated[
        str,
        typer.Option(help="Who it is for, to know it again.  [default: none]", show_default=False),
    ] = "",
    file: File = TOKENS,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write it there, for this user only, and do not print it."
        ),
    ] = None,
) -> None:
    """Make a token. It is shown this once; the server's file keeps only a hash of it."""
    from fedkit.durable import write_whole
    from fedkit.security.tokens import new_token

    if out is not None and (out.exists() or out.is_symlink()):
        raise FedkitError(f"{out} exists already and is not overwritten: choose another --out.")
    token = new_token(file, name)
    if out is None:
        print(token)
    else:
        write_whole(out, [f"{token}\n".encode()], mode=0o600)
    if not terminal.quiet:
        where = out or "FILE"
        # Beside the token, so that `fedkit token new > FILE` writes nothing else.
        print(
            f"The server takes it with:  fedkit server --tokens {file}\n"
            f"A client shows it with:    fedkit client --token-file {where}\n"
            "or in the variable FEDKIT_TOKEN. It is a secret: let nobody else read it.",
            file=sys.stderr,
        )


def list_tokens(file: File = TOKENS, format: Format = "text") -> None:
    """Tell which tokens there are: id, when it was made, whether it holds, for whom."""
    from fedkit.security.tokens import TokenStore

    as_json = wants_json(format)
    tokens = TokenStore(file).all()
    if as_json:
        rows = [{k: v for k, v in asdict(token).items() if k != "sha256"} for token in tokens]
        print(json.dumps(rows, indent=2))
        return
    for token in tokens:
        state = f"revoked {token.revoked}" if token.revoked else "holds"
        print(f"{token.id}  {token.created}  {state:<33}  {token.name}".rstrip())


def revoke(
    id: Annotated[str, typer.Argument(metavar="ID", help="The 8 characters after fk_.")],
    file: File = TOKENS,
) -> None:
    """Make a token hold no more; a running server needs no restart."""
    from fedkit.security.tokens import revoke as revoke_token

    gone = revoke_token(file, id)
    if not terminal.quiet:
        print(f"The token {gone.id}{f' of {gone.name}' if gone.name else ''} is revoked.")
