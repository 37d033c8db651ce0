"""How findings are told: a line each as it is made, or all as JSON; a failure is exit code 1."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import typer

from fedkit.link.reach import FAIL, Finding


def tell(findings: Iterable[Finding], about: dict[str, Any], *, width: int, as_json: bool) -> None:
    """Print findings as they come.

    Args:
        findings: made while this reads them.
        about: what JSON says of the whole, before ``ok`` and ``findings``.
        width: of the column with what was examined.
        as_json: whether to print JSON instead of lines.

    Raises:
        typer.Exit: with 1 if one of them is a failure.
    """
    told = []
    for finding in findings:
        told.append(finding)
        if not as_json:
            text = _printable(finding.text)
            print(f"{finding.status:<8}{finding.check:<{width}}{text}", flush=True)
    failed = any(finding.status == FAIL for finding in told)
    if as_json:
        listed = [{"check": f.check, "status": f.status, "text": f.text, **f.values} for f in told]
        print(json.dumps({**about, "ok": not failed, "findings": listed}, indent=2))
    if failed:
        raise typer.Exit(1)


def _printable(text: str) -> str:
    # Some of it is a stranger's: what was sent, names of files and classes.
    return "".join(letter if letter.isprintable() else "?" for letter in text)
