"""docker-compose.yml: what it says, and (`make compose-test`) that it does so in a real Docker engine.

The image is built as TORCH and TORCH_INDEX say; the networks are small ones that need no torchvision.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import events, until

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = ["workstation", "phone", "laptop", "board"]
SMALL = {"FEDKIT_MODEL_WORKSTATION": "mlp", "FEDKIT_MODEL_LAPTOP": "cnn2"}
QUICK = "-o local-epochs=1 -o distill-epochs=1"
# A build may have to fetch CUDA; a guard against hanging, not a measurement.
BUILD, LONG = 3600, 900


def answers(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=5, check=False).returncode == 0
    except (subprocess.SubprocessError, OSError):
        return False


needs_compose = pytest.mark.skipif(
    not answers("docker", "compose", "version"), reason="docker compose is not installed"
)


def compose(
    *words: str, project: str = "fedkit", timeout: float = LONG, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`docker compose` in the repository, without its user's .env."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FEDKIT_", "COMPOSE_"))}
    return subprocess.run(
        ["docker", "compose", "--env-file", os.devnull, "--project-name", project, *words],
        cwd=ROOT,
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def config(**variables: str) -> dict[str, Any]:
    ran = compose("--profile", "gpu", "config", "--format", "json", timeout=60, **variables)
    assert ran.returncode == 0, ran.stderr
    assert "not set" not in ran.stderr
    services: dict[str, Any] = json.loads(ran.stdout)["services"]
    return services


def option(service: dict[str, Any], name: str) -> str | None:
    command = service["command"]
    return command[command.index(name) + 1] if name in command else None


def test_env_example_names_each_variable_and_its_default():
    said = dict(re.findall(r"^#?(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.M))
    text = (ROOT / "docker-compose.yml").read_text()
    used = dict(re.findall(r"\$\{(\w+):-([^${}]*)\}", text))
    assert set(said) == set(used)
    # What has a default shows it; what has none, an example. The CPU index is an example, too.
    wrong = {name for name in used if used[name] and said[name] != used[name]} - {
        "FEDKIT_MODEL",
        "FEDKIT_DATA",
    }
    assert not wrong


@needs_compose
def test_nothing_is_root_but_the_one_that_changes_an_owner():
    for name, service in config().items():
        assert service["cap_drop"] == ["ALL"] and service["read_only"] and service["init"], name
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not service.get("privileged") and not service.get("ports")
        if name == "folder":
            assert service["cap_add"] == ["CHOWN"] and service["network_mode"] == "none"
        else:
            assert service["user"] == "1000:1000" and not service.get("cap_add"), name


@needs_compose
def test_clients_differ_in_network_shard_and_limits():
    services = config()
    for of in (
        lambda service: option(service, "--model"),
        lambda service: option(service, "--data-shard"),
        lambda service: tuple(service["deploy"]["resources"]["limits"].values()),
    ):
        assert len({of(services[name]) for name in CLIENTS}) == len(CLIENTS)
    shards = int(option(services["server"], "--num-shards") or 0)
    fixed = [int(option(services[name], "--data-shard") or 0) for name in CLIENTS]
    # Replicas take the first that is free: eight fit below.
    assert sorted(fixed) == list(range(8, shards))
    assert services["client"]["deploy"]["replicas"] == 0


@needs_compose
def test_one_model_and_widths_reach_whom_they_are_for():
    services = config(FEDKIT_MODEL="heterofl-cnn", FEDKIT_WIDTH_PHONE="0.25")
    for name in ("server", *CLIENTS, "client", "gpu"):
        assert option(services[name], "--model") == "heterofl-cnn"
    assert option(services["phone"], "--width") == "0.25"
    assert option(services["board"], "--width") is None


@needs_compose
def test_setup_tries_what_the_server_gets():
    said = {
        "FEDKIT_STRATEGY": "fedmd",
        "FEDKIT_ROUNDS": "3",
        "FEDKIT_DATASET": "mnist",
        "FEDKIT_PARTITION": "iid",
        "FEDKIT_SELECT": "uniform:0.5",
        "FEDKIT_SEED": "7",
    }
    services = config(**said)
    tried = services["setup"]["environment"]
    names = [name for name in tried if name.startswith("SETTING_")]
    assert len(names) == len(said) + 2  # model and num-shards
    for name in names:
        flag = f"--{name.removeprefix('SETTING_').lower().replace('_', '-')}"
        assert option(services["server"], flag) == tried[name]


@pytest.fixture
def project(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables of a composition of its own, which leaves nothing; skips where no engine answers."""
    if not answers("docker", "info"):
        pytest.skip("no Docker engine answers")
    runs = tmp_path / "runs"
    runs.mkdir()
    # Root's tests see to it that the containers are not root's.
    uid = str(os.getuid() or 1000)
    variables = {**SMALL, "FEDKIT_RUNS": str(runs), "FEDKIT_UID": uid, "FEDKIT_OPTIONS": QUICK}
    built = compose("build", "--quiet", project="fedkit-test", timeout=BUILD, **variables)
    assert built.returncode == 0, built.stderr
    try:
        yield variables
    finally:
        compose("--profile", "gpu", "down", "-v", "--remove-orphans", project="fedkit-test")


def up(*words: str, **variables: str) -> tuple[int, str]:
    """Exit code, and all that `docker compose up` and the containers have said."""
    ran = compose("up", *words, project="fedkit-test", **variables)
    return ran.returncode, ran.stdout + ran.stderr


def summary(variables: dict[str, str]) -> dict[str, Any]:
    file = Path(variables["FEDKIT_RUNS"]) / "latest" / "summary.json"
    told: dict[str, Any] = json.loads(file.read_text())
    return told


def rounds_begun(variables: dict[str, str]) -> int:
    run = Path(variables["FEDKIT_RUNS"]) / "latest"
    return len([event for event in events(run) if event["event"] == "round_start"])


@pytest.mark.compose
def test_up_runs_to_its_end_also_scaled_and_again(project):
    status, said = up(FEDKIT_ROUNDS="2", **project)
    assert status == 0, said
    assert "round 2/2" in said and "Accuracy on the client's own test data" in said
    assert "server-1 exited with code 0" in said
    told = summary(project)
    assert told["status"] == "completed"
    assert {client["shard"] for client in told["clients"]} == {8, 9, 10, 11}
    # The next `up` is a new run, and the one before keeps a name of its own.
    scaled = {**project, "FEDKIT_MIN_CLIENTS": "7", "FEDKIT_ROUNDS": "1"}
    status, said = up("--scale", "client=3", **scaled)
    assert status == 0, said
    assert {client["shard"] for client in summary(project)["clients"]} == {0, 1, 2, 8, 9, 10, 11}
    names = {entry.name for entry in Path(project["FEDKIT_RUNS"]).iterdir()}
    assert "latest" in names and len(names) == 2


@pytest.mark.compose
def test_a_killed_client_and_a_killed_server_come_back_and_the_run_completes(project):
    variables = {**project, "FEDKIT_ROUNDS": "4"}
    assert up("--detach", **variables)[0] == 0
    until(lambda: rounds_begun(project) >= 2, LONG)
    compose("kill", "phone", "server", project="fedkit-test", **variables)
    begun = rounds_begun(project)
    assert up("--detach", **variables)[0] == 0
    waited = compose("wait", "server", project="fedkit-test", **variables)
    assert waited.returncode == 0, waited.stdout + waited.stderr
    told = summary(project)
    assert told["status"] == "completed" and told["rounds"] == 4
    assert begun < 4 and len(told["clients"]) == 4
    # One run: nothing was put aside.
    assert [entry.name for entry in Path(project["FEDKIT_RUNS"]).iterdir()] == ["latest"]


@pytest.mark.compose
@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("FEDKIT_STRATEGY", "ktpfll", "There is no strategy 'ktpfll' (did you mean ktpfl?)."),
        ("FEDKIT_STRATEGY", "fedavg", "set FEDKIT_MODEL in .env, as in FEDKIT_MODEL=lenet."),
        ("FEDKIT_DATASET", "mnist", "MNIST has no file train-images-idx3-ubyte"),
    ],
)
def test_a_wrong_setting_is_a_sentence_and_the_end(project, variable, value, sentence):
    status, said = up(**{**project, variable: value, "FEDKIT_OPTIONS": ""})
    assert status != 0
    assert said.count(sentence) == 1, said
    # Nothing but the two one-shot services was ever started.
    states = compose("ps", "--all", "--format", "{{.Service}} {{.State}}", project="fedkit-test")
    started = {line.split()[0] for line in states.stdout.splitlines() if "created" not in line}
    assert started == {"folder", "setup"}
