"""What a composition needs before its server starts: settings that can be meant, a place for the run,
certificates.

The one-shot service `setup` of docker-compose.yml runs this. A wrong setting ends it with a sentence and
exit code 2, and nothing else is started. What is there already is left as it is.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkit.durable import write_whole
from fedkit.errors import FedkitError, UsageError
from fedkit.security.certs import make_authority, make_request, sign
from fedkit.settings import read_toml

CERTS = Path("/certs")
RUN = Path("/runs/latest")
HOSTS = ("server", "localhost")
# `health` is the server's own, for its health check.
HEALTH = "health"


def main() -> None:
    """Prepare everything; exit code 1 or 2 with a sentence if that can't be."""
    settings, models, widths = read_environment(os.environ)
    try:
        check_settings(settings, models, widths, os.environ.get("FEDKIT_OPTIONS", ""))
        make_certificates(CERTS, list(models))
        put_aside(RUN, settings)
    except FedkitError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def read_environment(
    environment: Mapping[str, str],
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """The federation's settings by outside name, and each client service's model and width.

    ``SETTING_NUM_SHARDS=12`` is num-shards, ``MODEL_PHONE=lenet`` the model of the service `phone`,
    ``WIDTH_PHONE=0.5`` its width; an empty one leaves it to the federation.
    """
    settings, models, widths = dict[str, str](), dict[str, str](), dict[str, str]()
    for name, value in sorted(environment.items()):
        kind, _, word = name.partition("_")
        if kind == "SETTING":
            settings[word.lower().replace("_", "-")] = value
        elif kind == "MODEL":
            models[word.lower()] = value
        elif kind == "WIDTH" and value:
            widths[word.lower()] = value
    return settings, models, widths


def check_settings(
    settings: Mapping[str, str], models: Mapping[str, str], widths: Mapping[str, str], options: str
) -> None:
    """Try the settings, without starting anything: data are read and networks built.

    Raises:
        FedkitError: `fedkit run --dry-run` refused them; it has said why.
        UsageError: the strategy trains one network, and a service is to have another.
    """
    wanted = [model or settings["model"] for model in models.values()]
    typed = {**settings, "clients": str(len(wanted)), "models": ",".join(wanted)}
    if widths:
        # A service without one takes what the server deals it, which is the whole network at most.
        typed["widths"] = ",".join(widths.get(service, "1") for service in models)
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise UsageError(f"FEDKIT_OPTIONS={options!r} in .env can't be read: {error}.") from None
    planned = _dry_run([*(f"--{name}={value}" for name, value in typed.items()), *words])
    for service, asked, got in zip(models, wanted, planned["clients"], strict=True):
        # What is trained may be a part of it: width:0.5:cnn.
        if not f":{got['model']}".endswith(f":{asked}"):
            raise UsageError(
                f"With {planned['strategy']} all clients train one network, and the service {service} "
                f"has {asked}: set FEDKIT_MODEL in .env, as in FEDKIT_MODEL={settings['model']}."
            )
    print(
        f"{planned['strategy']} (preset {planned['preset']}), {planned['rounds']} rounds on "
        f"{planned['dataset']}, {planned['partition']}: {', '.join(wanted)}"
    )


def _dry_run(words: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "fedkit", "run", "--dry-run", "--format=json", *words]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        # It has written its own sentence.
        sys.exit(ran.returncode)
    planned: dict[str, Any] = json.loads(ran.stdout)
    return planned


def put_aside(run: Path, settings: Mapping[str, str]) -> None:
    """Give a run that is over, or that other settings were made for, a name of its own.

    One that was stopped or killed stays where it is: the server goes on with it.
    """
    if not (run / "config.toml").exists():
        return
    config = read_toml(str(run / "config.toml"))
    same = all(str(config.get(name, value)) == value for name, value in settings.items())
    if same and _status(run) != "completed":
        print(f"Going on with the run in {run}.")
        return
    begun = time.strftime("%Y-%m-%dT%H-%M-%S", time.gmtime((run / "config.toml").stat().st_mtime))
    name = run.with_name(f"{begun}-{config['strategy']}")
    try:
        run.rename(name)
    except OSError as error:
        raise FedkitError(f"{run} can't be renamed to {name}: {error.strerror}.") from error
    print(f"The run before is in {name}.")


def _status(run: Path) -> str | None:
    try:
        status: str = json.loads((run / "summary.json").read_text())["status"]
    except FileNotFoundError:
        return None
    return status


def make_certificates(folder: Path, clients: list[str]) -> None:
    """An authority, and a certificate for the server and for each client service, where missing.

    ``authority`` keeps what signs, ``server`` what the server needs, ``clients`` what clients do.
    """
    authority, server, devices = (folder / name for name in ("authority", "server", "clients"))
    key = authority / "ca.key"
    if key.exists() and not os.access(key, os.R_OK):
        raise FedkitError(
            f"{key} belongs to another user: where FEDKIT_UID was changed in .env, begin with new volumes "
            "(docker compose down -v)."
        )
    if not (authority / "server.pem").exists():
        make_authority(authority, "fedkit", HOSTS)
    for name in ("ca.pem", "server.key", "server.pem"):
        _copy(authority / name, server / name)
    _copy(authority / "ca.pem", devices / "ca.pem")
    _make_device(authority, server, HEALTH)
    for name in [*clients, "client", "gpu"]:
        _make_device(authority, devices, name)


def _make_device(authority: Path, folder: Path, name: str) -> None:
    if not (folder / f"{name}.pem").exists():
        # What an interrupted start left by half.
        for half in ("key", "csr"):
            (folder / f"{name}.{half}").unlink(missing_ok=True)
        sign(authority, make_request(folder, name), folder / f"{name}.pem")


def _copy(source: Path, target: Path) -> None:
    write_whole(target, [source.read_bytes()], mode=source.stat().st_mode & 0o777)


if __name__ == "__main__":
    main()
