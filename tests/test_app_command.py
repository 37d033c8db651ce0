"""`--app` of the commands: what goes with it, and what is a sentence."""

from __future__ import annotations

import re

import pytest
import typer
from flower_apps import APPS
from typer.testing import CliRunner

from fedkit.cli import client, run, server
from fedkit.errors import UsageError

QUICKSTART = str(APPS / "quickstart")


@pytest.mark.parametrize(
    ("command", "typed", "sentence"),
    [
        (run, "--strategy ktpfl", "strategy is a setting of fedkit's own strategies"),
        (run, "-o rounds=3", "rounds is a setting"),
        (run, "--dry-run", "dry-run is a setting"),
        (run, "--run-config rounds=3", "no 'rounds'"),
        (run, "--clients 1 --min-clients 2", "min-clients is 2, but only 1 clients"),
        (run, "--listen 0.0.0.0:9000", "stays on this machine"),
        (server, "--resume auto", "resume is a setting"),
        (server, "--rounds 3", "rounds is a setting"),
        (server, "--listen 0.0.0.0:9000", "needs TLS"),
        (client, "--model lenet", "model is a setting"),
        (client, "--data-shard 0", "data-shard is a setting"),
        (client, "--emulate pi4", "emulate is a setting"),
        (client, "--data-root /data", "data-root is a setting"),
        (client, "--device cpu", "device is a setting"),
        (client, "--node-config partition-id", "--node-config takes"),
    ],
)
def test_what_an_app_has_no_use_for_is_refused(tmp_path, monkeypatch, command, typed, sentence):
    monkeypatch.chdir(tmp_path)
    assert_refused(command, ["--app", QUICKSTART, *typed.split()], sentence)
    assert not list(tmp_path.iterdir())  # nothing was started


@pytest.mark.parametrize(
    ("command", "option"), [(run, "run-config"), (server, "run-config"), (client, "node-config")]
)
def test_what_goes_with_an_app_only_is_refused_without(command, option):
    assert_refused(command, [f"--{option}", "a=1"], f"--{option} is for a Flower App")


@pytest.mark.parametrize("command", [run, server, client])
def test_a_folder_that_is_not_there_is_refused(tmp_path, command):
    assert_refused(command, ["--app", str(tmp_path / "no")], "There is no folder .*no")


def test_an_app_may_stand_in_a_settings_file(tmp_path):
    """As `fedkit run` writes it, to run the same again."""
    file = tmp_path / "config.toml"
    file.write_text(f'app = "{QUICKSTART}"\nrun-config = "gone.toml"\nclients = 2\n')
    assert_refused(run, ["--config", str(file)], "no file gone.toml")
    # What is typed is added, and does not stand for it.
    typed = ["--run-config", "batch-size=8"]
    assert_refused(run, ["--config", str(file), *typed], "no file gone.toml")


def assert_refused(command, words, sentence):
    typed = typer.Typer()
    command.register(typed)
    done = CliRunner().invoke(typed, words)
    assert isinstance(done.exception, UsageError), done.exception or done.output
    assert re.search(sentence, str(done.exception))
