"""Clients in worker processes: the numbers of the other engines, and an end for whatever goes wrong."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import InProcessFederation

from fedkit import Federation
from fedkit.engine.driver import Driver
from fedkit.engine.events import Event
from fedkit.errors import FedkitError, UsageError
from fedkit.models.batched import Verdict
from fedkit.registry import split
from fedkit.settings import as_config
from fedkit.simulation import rendezvous, sharing
from fedkit.simulation.grid import SimulationGrid
from fedkit.simulation.progress import SimulationBar
from fedkit.simulation.sharing import SMALL, bundle, discard, shared_folder, unbundle
from fedkit.simulation.store import Store
from fedkit.simulation.worker import Equipment

TINY = {"clients": 4, "rounds": 2, "models": "logistic", "model": "logistic", "local_epochs": 1}
FEDAVG = TINY | {"strategy": "fedavg"}
KTPFL = TINY | {"strategy": "ktpfl", "public": "digits:64"}
HETEROFL = TINY | {"strategy": "heterofl", "model": "mlp:16", "widths": "1,0.5", "levels": "1,0.5"}


@contextmanager
def simulation(tmp_path, federation, workers=2, live=100, batched=1, warn=print, **change):
    """The federation's clients, in worker processes."""
    for name in ("shared", "states"):
        (tmp_path / name).mkdir(exist_ok=True)
    nodes = [dict(context.node_config) for _, context in federation.grid.apps.values()]
    equipment = Equipment(
        strategy=split(federation.plan.federation.strategy)[0],
        run_config=as_config(federation.plan.federation),
        nodes=nodes,
        first_node=2,
        shared=tmp_path / "shared",
        store=tmp_path / "states",
        live=live,
    )
    for name, value in change.items():
        object.__setattr__(equipment, name, value)
    names = "client {}".format
    grid = SimulationGrid(equipment, workers, names, batched=batched, warn=warn)
    try:
        yield grid
    finally:
        grid.close()


def digest_of(federation, grid):
    """Run the federation over another grid."""
    driver = Driver(
        federation.strategy,
        grid,
        federation.plan.federation,
        federation.emit,
        check=lambda node_id, facts: (
            federation.view.why_not(facts) or federation.strategy.why_not(facts)
        ),
        offer=federation.view.offer,
        evaluate_fn=lambda round, arrays: federation.view.measure(
            federation.strategy.server_models(arrays), federation.strategy.measured
        ),
    )
    driver.run(federation.strategy.initial_arrays())
    return federation.history.digest()


@pytest.mark.parametrize(
    ("case", "workers", "live"),
    [(FEDAVG, 1, 100), (FEDAVG, 2, 100), (KTPFL, 2, 100), (KTPFL, 3, 1), (HETEROFL, 2, 100)],
    ids=["fedavg-1", "fedavg-2", "ktpfl-2", "ktpfl-3", "heterofl-2"],
)
def test_the_numbers_are_those_of_the_other_engines(tmp_path, case, workers, live):
    usual = InProcessFederation(**case).run()["digest"]
    federation = InProcessFederation(**case)
    with simulation(tmp_path, federation, workers, live) as grid:
        assert digest_of(federation, grid) == usual


def test_a_client_of_which_no_worker_holds_anything_goes_on_from_the_store(tmp_path):
    """Three clients to each worker that holds one of them: every state is read again."""
    federation = InProcessFederation(**KTPFL | {"clients": 6})
    usual = InProcessFederation(**KTPFL | {"clients": 6}).run()["digest"]
    with simulation(tmp_path, federation, 2, live=1) as grid:
        assert digest_of(federation, grid) == usual
    assert sorted(file.name for file in (tmp_path / "states").iterdir()) == [
        f"{client}.records" for client in range(6)
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="a spawned worker knows nothing of the patch")
def test_a_network_is_tried_before_its_clients_first_work_and_not_when_it_is_made_again(
    tmp_path, monkeypatch
):
    tried = tmp_path / "tried"

    def note(*words):
        with tried.open("ab", buffering=0) as file:
            file.write(b".")

    monkeypatch.setattr("clients.edge.try_one_batch", note)
    federation = InProcessFederation(**FEDAVG | {"clients": 6})
    with simulation(tmp_path, federation, 2, live=1) as grid:
        digest_of(federation, grid)
    assert tried.read_bytes() == b"." * 6


def test_nothing_shared_is_left(tmp_path):
    federation = InProcessFederation(**FEDAVG | {"model": "mlp", "models": "mlp"})
    with simulation(tmp_path, federation) as grid:
        digest_of(federation, grid)
        # What went out last may be wanted again.
        assert len(list((tmp_path / "shared").iterdir())) <= 1


def ask(grid, node_ids, kind="query.join"):
    return list(
        grid.send_and_receive(
            Message(RecordDict(), node_id, kind, group_id="0") for node_id in node_ids
        )
    )


def test_replies_come_in_the_order_of_sending(tmp_path):
    federation = InProcessFederation(**FEDAVG)
    with simulation(tmp_path, federation) as grid:
        nodes = [5, 2, 4, 3, 2]
        assert [reply.metadata.src_node_id for reply in ask(grid, nodes)] == nodes


def test_the_first_client_that_fails_ends_the_run_with_its_name_and_traceback(tmp_path):
    federation = InProcessFederation(**FEDAVG)
    told = pytest.raises(FedkitError, match=r"client 1 failed: .*KeyError")
    with simulation(tmp_path, federation) as grid, told as failed:
        ask(grid, [3], "train")  # without the config that it needs
    (trace,) = failed.value.__notes__
    assert "Traceback" in trace and "fedavg.py" in trace


@pytest.mark.parametrize(("batched", "bad"), [(1, 0), (8, 2)])
def test_a_client_that_fails_ends_the_run_whatever_fifty_others_are_busy_with(
    tmp_path, batched, bad
):
    """They would train for hours."""
    federation = InProcessFederation(**FEDAVG | {"clients": 50, "num_shards": 50})
    config = federation.strategy.config(1)
    config["local-epochs"] = 1_000_000
    work = RecordDict({"arrays": federation.strategy.initial_arrays(), "config": config})
    told = pytest.raises(FedkitError, match=rf"client {bad} failed: .*KeyError")
    with simulation(tmp_path, federation, batched=batched) as grid, told as failed:
        list(
            grid.send_and_receive(
                Message(RecordDict() if at == bad else work, at + 2, "train", group_id="1")
                for at in range(50)
            )
        )
    (trace,) = failed.value.__notes__
    assert "Traceback" in trace and "fedavg.py" in trace


@pytest.mark.skipif(sys.platform != "linux", reason="workers are not forked")
def test_clients_that_can_t_be_batched_have_the_usual_numbers_and_why_is_told_once(
    tmp_path, monkeypatch
):
    usual = InProcessFederation(**FEDAVG).run()["digest"]
    monkeypatch.setattr(rendezvous, "_verdicts", {})
    monkeypatch.setattr(rendezvous, "examine", lambda steps: Verdict("it is shy"))
    federation, told = InProcessFederation(**FEDAVG), []
    with simulation(tmp_path, federation, batched=2, warn=told.append) as grid:
        assert digest_of(federation, grid) == usual
    sentence = "since it is shy: its clients train one after the other."
    assert told == [f"logistic can't be batched, {sentence}"]


def test_a_worker_that_is_killed_ends_the_run(tmp_path):
    federation = InProcessFederation(**FEDAVG)
    with simulation(tmp_path, federation, workers=1) as grid:
        (child,) = workers_now()
        os.kill(child, signal.SIGKILL)
        with pytest.raises(FedkitError, match=r"client 0 was killed by SIGKILL: .*--workers"):
            ask(grid, [2])


def test_closing_leaves_no_process(tmp_path):
    federation = InProcessFederation(**FEDAVG)
    with simulation(tmp_path, federation) as grid:
        assert len(workers_now()) == 2
        ask(grid, [2])
    assert not workers_now()


def workers_now():
    """The worker processes that live."""
    return [child.pid for child in multiprocessing.active_children() if child.is_alive()]


def test_a_content_that_was_edited_is_sent_as_it_is_then(tmp_path):
    federation = InProcessFederation(**FEDAVG)
    weights = federation.strategy.initial_arrays()
    content = RecordDict({"arrays": weights, "config": federation.strategy.config(1)})

    def messages():
        for node_id, epochs in ((2, 0), (3, 1)):
            content.config_records["config"]["local-epochs"] = epochs
            yield Message(content, node_id, "train", group_id="1")

    with simulation(tmp_path, federation) as grid:
        ask(grid, [2, 3])
        kept, trained = (reply.content["arrays"] for reply in grid.send_and_receive(messages()))
    assert all(np.array_equal(kept[name].numpy(), weights[name].numpy()) for name in weights)
    assert not all(np.array_equal(trained[name].numpy(), weights[name].numpy()) for name in weights)


@pytest.mark.slow
def test_the_command_runs_one_and_runs_it_again(tmp_path):
    values = {**KTPFL, "alone": "false", "emulate": "phone-mid"}
    settings = [f"-o{name.replace('_', '-')}={value}" for name, value in values.items()]
    first, again = tmp_path / "first", tmp_path / "again"
    told = fedkit("simulate", *settings, "--run-dir", first, "--format", "json")
    summary = json.loads(told)
    assert summary["engine"] == "simulation" and summary["sent_up"] is None
    # The emulated devices' seconds, which nobody has waited.
    slowest = sum(row["seconds_slowest_client"] for row in summary["history"])
    assert summary["seconds"] >= slowest > 0
    assert summary["digest"] == InProcessFederation(**{**KTPFL, "alone": False}).run()["digest"]
    assert not list(first.glob("states-*"))
    measured = json.loads(fedkit("evaluate", first, "--model", "client-2", "--format", "json"))
    assert measured
    fedkit("simulate", "--config", first / "config.toml", "--run-dir", again, "--no-keep-models")
    assert json.loads((again / "summary.json").read_text())["digest"] == summary["digest"]
    assert not (again / "clients").exists()


def test_python_simulates_what_it_would_run(tmp_path):
    """Own settings by name, the digest of the other engines, and as many threads as before."""
    federation = Federation(**KTPFL, run_dir=str(tmp_path / "alone"))
    threads = torch.get_num_threads()
    seen = []
    result = federation.simulate(seen.append, workers=2, keep_models=False)
    assert result.summary["digest"] == InProcessFederation(**KTPFL).run()["digest"]
    assert result.events and seen[-1].event == "stop" and torch.get_num_threads() == threads
    batched = Federation(**KTPFL, run_dir=str(tmp_path / "together")).simulate(batched=4)
    for mean in ("mean_personal_accuracy", "mean_global_accuracy"):
        assert batched.summary[mean] == pytest.approx(result.summary[mean], abs=0.02)
    with pytest.raises(UsageError, match=r"no setting 'worker'.*workers"):
        federation.simulate(worker=2)
    emulated = Federation(**KTPFL, run_dir=str(tmp_path / "emulated"), emulate="pi4")
    with pytest.raises(UsageError, match="--batched and --emulate don't go together"):
        emulated.simulate(batched=4)
    assert not (tmp_path / "emulated").exists()


def test_the_bar_is_in_a_terminal_one_line_that_comes_to_its_end(monkeypatch):
    """Half of a round's work is half a round; updates are counted, and other work is not."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    bar = SimulationBar(rounds=4)
    (task,) = bar._bar.tasks
    done = []
    for round in (1, 2):
        bar.take(Event("round_start", round, n=2))
        for kind in ("train", "evaluate", "train", "evaluate"):
            bar.worked(kind)
            done.append(task.completed)
        bar.take(Event("exchange", round, exchange="train"))
        assert task.description == f"round {round}/4: train done"
        bar.take(Event("round", round, name="seconds", value=1.0))
        assert task.completed == round
    assert done == [0, 0, 0, 0, 1.25, 1.5, 1.75, 2.0]
    assert bar._updates == 4 and task.fields["rate"].endswith("updates/s")
    assert bar._bar.live.is_started
    bar.take(Event("stop", name="completed", value="all rounds are done"))
    assert not bar._bar.live.is_started


def test_what_is_typed_wrong_is_told_before_anything_is_written(tmp_path):
    command = [sys.executable, "-P", "-m", "fedkit", "simulate", "--workers", "-1"]
    ended = subprocess.run(
        [*command, "--run-dir", tmp_path / "run"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr == "Error: workers must be at least 0, not -1.\n"
    assert not (tmp_path / "run").exists()


def fedkit(*words):
    """What a command prints."""
    command = [sys.executable, "-P", "-m", "fedkit", "--quiet", *map(str, words)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 2 * SMALL), max_size=6), seed=st.integers(0, 9))
def test_arrays_come_out_of_a_bundle_as_they_went_in(tmp_path_factory, sizes, seed):
    folder = tmp_path_factory.mktemp("shared")
    blobs = [np.random.default_rng(seed).bytes(size) for size in sizes]
    one = bundle(blobs, folder)
    assert unbundle(one) == blobs
    assert bool(one.file) == (sum(sizes) > SMALL)
    discard(one)
    assert not list(folder.iterdir())


def test_a_system_that_moves_few_bytes_at_a_time_moves_all(tmp_path, monkeypatch):
    blobs = [b"", bytes(range(256)) * 200, b"x", b"", b"yz" * 17]
    write, read = os.writev, os.read
    monkeypatch.setattr(os, "writev", lambda to, some: write(to, [b"".join(some)[:1000]]))
    monkeypatch.setattr(os, "read", lambda of, size: read(of, min(size, 999)))
    monkeypatch.setattr(sharing, "MOST_AT_ONCE", 2)
    one = bundle(blobs, tmp_path)
    assert one.file
    assert unbundle(one) == blobs
    os.truncate(one.file, sum(map(len, blobs)) - 1)
    with pytest.raises(OSError, match="ends before"):
        unbundle(one)


def test_what_a_client_remembers_may_become_less(tmp_path):
    store = Store(tmp_path)
    large = RecordDict({"model": ArrayRecord({"w": Array(np.arange(9000.0))})})
    small = RecordDict({"model": ArrayRecord({"w": Array(np.arange(3.0))})})
    for state in (large, small, large):
        store.keep(7, state)
        (kept,) = store.recall(7).array_records["model"].values()
        (wanted,) = state.array_records["model"].values()
        assert np.array_equal(kept.numpy(), wanted.numpy())
    assert store.known() == [7]


def test_what_a_killed_process_shared_is_removed_by_the_next_and_what_is_in_use_is_not(tmp_path):
    code = (
        "import os, pathlib, sys; from fedkit.simulation.sharing import shared_folder\n"
        "with shared_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'bundle').write_bytes(b'arrays'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-P", "-c", code, tmp_path], check=False)
    (left,) = tmp_path.iterdir()
    assert (left / "bundle").exists()
    with shared_folder(tmp_path) as first, shared_folder(tmp_path) as second:
        assert sorted(tmp_path.iterdir()) == sorted([first, second])
    assert not list(tmp_path.iterdir())


def test_a_state_is_recalled_as_it_was_kept(tmp_path):
    store = Store(tmp_path)
    assert not store.recall(3)
    state = RecordDict(
        {
            "model": ArrayRecord({"w": Array(np.arange(6.0).reshape(2, 3))}),
            "told": ConfigRecord({"round": 4}),
        }
    )
    store.keep(3, state)
    again = store.recall(3)
    assert again.config_records["told"]["round"] == 4
    assert np.array_equal(again.array_records["model"]["w"].numpy(), np.arange(6.0).reshape(2, 3))
