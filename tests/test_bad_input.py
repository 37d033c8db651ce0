"""What is typed wrongly, or meets a world that answers otherwise: one sentence and an exit code.

2 is for what was typed, 1 for what the world answered.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from processes import ENVIRONMENT, fedkit, free_port

from fedkit import __version__
from fedkit.cli import app as app_module
from fedkit.cli.options import describe
from fedkit.cli.run import DEFAULTS
from fedkit.engine.plan import make_plan
from fedkit.engine.state import StateDirectory
from fedkit.rundir import RunDirectory
from fedkit.settings import DataSettings, FederationSettings, RunSettings, ServerSettings, key

TYPED, WORLD = 2, 1
CLIENT = ("client", "--data-shard", "0", "--state-dir", "state")


@dataclass
class Done:
    status: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The only thing on stderr."""
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("Error: ")
        assert lines[0].endswith((".", ")"))
        return lines[0].removeprefix("Error: ")


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd) -> Iterator[Callable[..., Done]]:
    """The command line in this process, in a folder of its own: a process of its own costs a second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDKIT_DATA_ROOT", raising=False)
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(app_module.app, "registered_commands", [])
        monkeypatch.setattr(sys, "argv", ["fedkit", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            app_module.main()
        out, err = capfd.readouterr()
        return Done(int(ended.value.code or 0), out, err)

    yield call
    signal.signal(signal.SIGTERM, handler)


def squeezed(text: str) -> str:
    """Without the line breaks of a help page."""
    return "".join(text.split())


# What was typed.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("run --strategy fedav", "strategy 'fedav' (did you mean fedavg"),
        ("run --strategy fedavg:3", "strategy"),
        ("run --models lenet,resnet", "model 'resnet' (did you mean resnet"),
        ("run --strategy fedavg --model lenett", "(did you mean lenet"),
        ("run --dataset digit", "data set 'digit' (did you mean digits"),
        ("run --partition dirichle:0.5", "partition 'dirichle' (did you mean dirichlet"),
        ("run --select unifrom:0.1", "selector 'unifrom' (did you mean uniform"),
        ("run --codec float", "codec 'float' (did you mean float"),
        ("run --public dgits:100", "data set 'dgits' (did you mean digits"),
        ("run --public digits", "NAME:COUNT"),
        ("server --strategy fedav", "(did you mean fedavg"),
        ("client --data-shard 0 --model lenett", "model 'lenett' (did you mean lenet"),
        ("client --data-shard 0 --dataset digit", "(did you mean digits"),
        ("client --data-shard 0 --partition iidd", "(did you mean iid"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(cli, arguments, words):
    done = cli(*arguments.split())
    assert done.status == TYPED
    assert words in done.sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "-o", "temprature=3"], "temperature"),
        (["server", "-o", "temprature=3"], "temperature"),
        (["run", "--strategy", "fedavg", "-o", "temperature=3"], "temperature"),
        (["run", "-o", "temperature"], "key=value"),
        (["run", "-o", "=3"], "key=value"),
        (["run", "-o", ""], "key=value"),
        (["run", "-o", "temperature=warm"], "temperature must be a number"),
        (["run", "-o", "temperature=0"], "above 0"),
        (["run", "-o", "temperature=nan"], "not nan"),
        (["run", "-o", "local-epochs=1.5"], "whole number"),
        (["run", "-o", "local-epochs="], "whole number"),
        (["run", "-o", "epoch-ramp=perhaps"], "true or false"),
        (["run", "-o", "optimiser=adm"], "sgd, adam"),
        (["run", "-o", "preset=papr"], "preset must be one of"),
        (["run", "--rounds", "0"], "rounds must be at least 1"),
        (["run", "--clients", "0"], "clients must be at least 1"),
        (["run", "--rounds", "ten"], "--rounds"),
        (["run", "--round", "3"], "--round"),
        (["run", "--val-fraction", "0.9"], "at most 0.5"),
        (["run", "--round-timeout", "nan"], "not nan"),
        (["run", "--seed", "-1"], "at least 0"),
        (["run", "--min-clients", "9"], "min-clients"),
        (["run", "--num-shards", "2"], "num-shards"),
        (["run", "--models", ","], "no model"),
        (["run", "--format", "xml"], "text or json"),
        (["run", "--config"], "--config"),
        (["server", "--listen", "8090"], "HOST:PORT"),
        (["server", "--listen", "localhost:99999"], "HOST:PORT"),
        (["client", "--data-shard"], "--data-shard"),
        (["client", "--nonsense"], "--nonsense"),
        (["list"], "KIND"),
        (["list", "nonsense"], "no list of 'nonsense'"),
        (["list", "modles"], "models"),
        (["list", "settings", "fedav"], "fedavg"),
        (["list", "models", "--format", "xml"], "text or json"),
        (["nonsense"], "nonsense"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_a_bad_option_is_a_usage_error(cli, arguments, words):
    done = cli(*arguments)
    assert done.status == TYPED
    assert words in done.sentence


def test_a_client_without_a_shard_is_told_what_to_give(cli):
    done = cli("client")
    assert done.status == TYPED
    assert "--data-shard NUMBER" in done.sentence and "auto" in done.sentence


@pytest.mark.parametrize(
    ("shard", "words"), [("three", "number or auto"), ("", "number or auto"), ("1.5", "number")]
)
def test_a_shard_is_a_number_or_auto(cli, shard, words):
    done = cli("client", "--data-shard", shard)
    assert done.status == TYPED
    assert words in done.sentence


def test_a_negative_shard_is_refused(cli):
    done = cli("client", "--data-shard", "-1")
    assert done.status == TYPED
    assert "count from 0" in done.sentence


@pytest.mark.parametrize("server", ["8090", "localhost", "localhost:", ":8090", "h:0", "h:99999"])
def test_an_address_is_host_and_port(cli, server):
    done = cli(*CLIENT, "--server", server)
    assert done.status == TYPED
    assert "HOST:PORT" in done.sentence and server in done.sentence
    assert not Path("state").exists()


@pytest.mark.parametrize("seconds", ["-1", "soon", "nan"])
def test_a_wait_is_a_number_of_seconds(tmp_path, seconds):
    """In a process of its own: a client that takes nan for a time tries for ever."""
    address = f"127.0.0.1:{free_port()}"
    waited = ("--max-wait-time", seconds)
    done = fedkit(*CLIENT, "--server", address, *waited, folder=tmp_path, timeout=5)
    assert done.returncode == TYPED
    assert "--max-wait-time" in Done(2, "", done.stderr).sentence


@pytest.mark.parametrize("command", ["run", "server"])
def test_a_missing_settings_file_is_named(cli, command):
    done = cli(command, "--config", "none.toml")
    assert done.status == TYPED
    assert "none.toml" in done.sentence


@pytest.mark.parametrize("text", ["rounds = ", "[table]\nrounds = 3", "rouns = 3", "rounds = 'x'"])
def test_a_wrong_settings_file_is_a_usage_error(cli, text):
    Path("wrong.toml").write_text(text)
    done = cli("run", "--config", "wrong.toml")
    assert done.status == TYPED
    assert done.sentence


def test_what_is_typed_beats_the_settings_file(cli):
    Path("c.toml").write_text("rounds = 0\n")
    assert "rounds" in cli("run", "--config", "c.toml", "--dry-run").sentence
    Path("c.toml").write_text('rounds = 3\nstrategy = "nonsense"\nmodels = "lenet"\n')
    done = cli("run", "--config", "c.toml", "--strategy", "ktpfl", "--dry-run")
    assert done.status == 0, done.err
    assert "3 rounds" in done.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--public digits:99999", "1400"),
        ("--public digits:0", "digits:0"),
        ("--public digits:-5", "digits:-5"),
        ("--partition dirichlet:0.001 --clients 50", "larger alpha or fewer shards"),
        ("--partition dirichlet:few", "dirichlet takes a positive number"),
        ("--partition dirichlet:inf", "dirichlet takes a positive number"),
        ("--partition dirichlet", "dirichlet takes a positive number"),
        ("--partition iid:3", "iid takes no argument"),
        ("--partition classes:11", "10 classes"),
        ("--partition classes:1 --clients 2", "more shards or more classes"),
        ("--partition classes:all", "classes takes a whole number"),
        ("--num-shards 5000", "5000 shards"),
        ("--models lenet:nonsense", "nonsense"),
        ("--models cnn:3", "cnn takes no argument"),
        ("--strategy fedmd -o stratified=true", "public-labels"),
    ],
)
def test_what_can_never_be_is_refused_before_anything_starts(cli, arguments, words):
    done = cli("run", "--dry-run", *arguments.split())
    assert done.status == TYPED
    assert words in done.sentence


def test_a_failing_process_of_a_run_gives_its_own_sentence_and_status(cli):
    done = cli("-q", "run", "--public", "digits:99999", "--models", "lenet", "--run-dir", "out")
    assert done.status == TYPED
    assert "The server failed" in done.sentence and "1400" in done.sentence
    assert "server.log" in done.sentence


@pytest.mark.parametrize(
    "arguments", [("run", "--models", "lenet"), ("server", "--listen", "127.0.0.1:0")]
)
def test_a_folder_that_holds_a_run_is_left_alone(cli, arguments):
    Path("old").mkdir()
    Path("old/metrics.jsonl").write_text("precious\n")
    done = cli(*arguments, "--run-dir", "old")
    assert done.status == TYPED
    assert "old holds a run already" in done.sentence and "--run-dir" in done.sentence
    assert Path("old/metrics.jsonl").read_text() == "precious\n"
    assert [path.name for path in Path("old").iterdir()] == ["metrics.jsonl"]


# What the world answered.


def test_a_port_in_use_is_a_sentence(cli):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        done = cli("server", "--listen", address, "--run-dir", "out")
    assert done.status == WORLD
    assert address in done.sentence and "--listen" in done.sentence
    assert not Path("out").exists()


def test_an_address_of_another_machine_is_a_sentence(cli):
    done = cli("server", "--listen", "192.0.2.1:8090", "--run-dir", "out", "--insecure")
    assert done.status == WORLD
    assert "can't listen on 192.0.2.1:8090" in done.err


def test_an_address_that_others_reach_needs_tls(cli):
    done = cli("server", "--listen", "0.0.0.0:8090", "--run-dir", "out")
    assert done.status == TYPED
    assert "TLS" in done.sentence and "fedkit certs init" in done.sentence
    assert not Path("out").exists()


def test_a_local_runs_config_starts_a_server_too(cli):
    """`fedkit server --help` gives that as an example; here it gets as far as the port."""
    plan = make_plan({"clients": 3}, local=True)
    RunDirectory(Path("old")).write_config(plan.values())
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        arguments = ("--config", "old/config.toml", "--run-dir", "again", "--listen", address)
        done = cli("server", *arguments)
    assert done.status == WORLD, done.err
    assert "can't listen" in done.err


def test_a_server_that_is_not_there_is_a_sentence(cli):
    address = f"127.0.0.1:{free_port()}"
    done = cli(*CLIENT, "--server", address, "--max-wait-time", "0.5")
    assert done.status == WORLD
    assert "No fedkit server answers" in done.sentence and address in done.sentence


def test_a_state_directory_in_use_is_a_sentence(cli):
    held = StateDirectory(Path("state"))
    done = cli(*CLIENT, "--server", "127.0.0.1:1")
    held.close()
    assert done.status == WORLD
    assert "--state-dir" in done.sentence


@pytest.mark.parametrize("command", ["client", "server", "run"])
def test_a_folder_that_cannot_be_made_is_a_sentence(cli, command):
    Path("file").write_text("a file")
    done = {
        "client": lambda: cli("client", "--data-shard", "0", "--state-dir", "file/state"),
        "server": lambda: cli("server", "--listen", "127.0.0.1:0", "--run-dir", "file/run"),
        "run": lambda: cli("run", "--models", "lenet", "--run-dir", "file/run"),
    }[command]()
    assert done.status == WORLD
    assert "file/" in done.sentence


def test_a_missing_data_root_says_what_to_give(cli):
    done = cli("run", "--dry-run", "--dataset", "mnist")
    assert done.status == WORLD
    assert "--data-root" in done.sentence and "FEDKIT_DATA_ROOT" in done.sentence


@pytest.mark.parametrize("given", ["option", "environment"])
def test_a_data_root_that_is_no_folder_is_named(cli, monkeypatch, given):
    monkeypatch.setenv("FEDKIT_DATA_ROOT", "nowhere")
    extra = ("--data-root", "nowhere") if given == "option" else ()
    done = cli("run", "--dry-run", "--dataset", "mnist", *extra)
    assert done.status == WORLD
    assert "nowhere" in done.sentence


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("cifar10", "cifar-10-batches-py"),
    ],
)
def test_missing_data_files_say_what_is_expected_and_how_to_get_it(cli, dataset, expected):
    Path("data").mkdir()
    done = cli("run", "--dry-run", "--dataset", dataset, "--data-root", "data")
    assert done.status == WORLD
    assert expected in done.sentence and "download=True" in done.sentence


# The command line as such, in processes of its own.


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("run", "--strategy", "fedav"), TYPED, "did you mean fedavg"),
        (("client", "--data-shard", "-1"), TYPED, "count from 0"),
        (("nonsense",), TYPED, "nonsense"),
    ],
)
def test_a_real_process_ends_with_the_status_and_the_sentence(tmp_path, arguments, status, words):
    done = fedkit(*arguments, folder=tmp_path, timeout=60)
    assert done.returncode == status
    assert words in Done(status, done.stdout, done.stderr).sentence
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_named_like_our_packages_is_told_apart(tmp_path):
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "fedkit", "run", "--dry-run"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == WORLD
    assert "strategies" in Done(WORLD, done.stdout, done.stderr).sentence


def test_debug_shows_where_an_error_came_from(cli):
    done = cli("--debug", "run", "--strategy", "fedav")
    assert done.status == TYPED
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("Error: There is no strategy")


def test_a_bug_is_one_sentence_too(cli, monkeypatch):
    def broken(*arguments: object, **more: object) -> None:
        raise RuntimeError("oops")

    monkeypatch.setattr("fedkit.engine.plan.make_plan", broken)
    done = cli("run")
    assert done.status == 1
    assert "RuntimeError: oops" in done.sentence and "--debug" in done.sentence


def test_version_is_printed(cli):
    done = cli("--version")
    assert (done.status, done.out, done.err) == (0, f"fedkit {__version__}\n", "")


def test_fedkit_alone_shows_its_help_and_no_error(cli):
    done = cli()
    assert "Commands" in done.out + done.err
    assert "Error" not in done.out + done.err


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", ["run", "server", "client", "list"])
def test_every_command_has_help_with_examples_and_defaults(cli, command, flag):
    done = cli(command, flag)
    assert (done.status, done.err) == (0, "")
    assert "Examples" in done.out and f"fedkit {command} " in done.out
    assert "default:" in done.out


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        ("run", (FederationSettings, RunSettings, ServerSettings, DataSettings)),
        ("server", (FederationSettings, ServerSettings, DataSettings)),
        ("client", (DataSettings,)),
    ],
)
def test_help_tells_every_setting_with_its_default(cli, command, groups):
    page = squeezed(cli(command, "--help").out)
    for group in groups:
        for item in fields(group):
            assert f"--{item.name.replace('_', '-')}" in page
            own = DEFAULTS.get(key(item.name)) if command == "run" else None
            assert squeezed(describe(item, own)) in page


def test_help_of_client_tells_its_own_defaults(cli):
    page = squeezed(cli("client", "--help").out)
    for words in (
        "default:127.0.0.1:8090",
        "default:30",
        "default:auto",
        "default:thefederation's",
    ):
        assert words in page


def test_help_lists_the_commands(cli):
    done = cli("--help")
    assert done.status == 0
    for command in ("run", "server", "client", "list"):
        assert f"\n  {command} " in done.out
