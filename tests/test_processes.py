"""Servers and clients in processes of their own: started, refused, killed and started again."""

from __future__ import annotations

import json
import signal
import sys

import pytest
from inprocess import InProcessFederation
from processes import ENVIRONMENT, Process, alive, children_of, fedkit, free_port, until

from fedkit import Federation, FedkitError

SMALL = ("--models", "lenet,cnn", "-o", "local-epochs=1", "-o", "distill-epochs=1")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_the_two_commands_work_verbatim(tmp_path):
    """As the README has them; the server is stopped after two rounds to save time."""
    with Process("server", "--strategy", "ktpfl", folder=tmp_path, name="server") as server:
        until(lambda: server.process.poll() is not None or "waiting for" in server.text)
        if server.process.poll() is not None and "uses that port" in server.text:
            pytest.skip("port 8090 is in use on this machine")
        with (
            Process(
                *("client", "--model", "resnet18", "--data-shard", "3"), folder=tmp_path, name="a"
            ) as first,
            Process(
                *("client", "--model", "lenet", "--data-shard", "0"), folder=tmp_path, name="b"
            ) as second,
        ):
            until(lambda: "round  2/20" in server.text or server.process.poll() is not None)
            server.stop()
            assert server.wait() == 130
            # It was no end of the run: a service manager shall start them again.
            assert first.wait() == 1 and second.wait() == 1, first.text + second.text
    assert "client 3 joined: resnet18" in server.text
    assert "stopped before the run was over" in first.text and "model is in" in first.text
    (summary,) = tmp_path.glob("runs/*/summary.json")
    assert json.loads(summary.read_text())["status"] == "stopped"


def start_server(folder, *options):
    port = free_port()
    server = Process(
        *("server", "--listen", f"127.0.0.1:{port}", "--run-dir", "out", *options),
        folder=folder,
        name="server",
    )
    return server, f"127.0.0.1:{port}"


def start_client(folder, address, shard, *options, name=None):
    return Process(
        *("client", "--server", address, "--data-shard", str(shard), *options),
        folder=folder,
        name=name or f"client-{shard}",
    )


LONG_RUN = ("--rounds", "8", "-o", "local-epochs=2", "--num-shards", "8")


def test_a_dead_client_does_not_hang_the_round(tmp_path):
    quick = "-o", "local-epochs=1", "-o", "distill-epochs=1", "-o", "alone=false"
    server, address = start_server(tmp_path, "--rounds", "60", "--num-shards", "8", *quick)
    with (
        server,
        start_client(tmp_path, address, 0) as first,
        start_client(tmp_path, address, 1, "--model", "cnn") as doomed,
    ):
        until(lambda: "client 0 joined" in server.text and "client 1 joined" in server.text)
        with start_client(tmp_path, address, 2) as late:
            until(lambda: "client 2 joined" in server.text)
            doomed.kill()
            assert server.wait() == 0, server.text
            assert first.wait() == 0 and late.wait() == 0
    assert "client 1 did not answer: it vanished" in server.text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rounds"] == 60
    assert [client["id"] for client in summary["clients"]] == [0, 1, 2]


def test_a_restarted_client_goes_on_where_it_was(tmp_path):
    server, address = start_server(tmp_path, *LONG_RUN)
    with server, start_client(tmp_path, address, 0) as lasting:
        with start_client(tmp_path, address, 1, "--model", "cnn") as first:
            until(lambda: "round 2/8" in server.text)
            first.kill()
        with start_client(tmp_path, address, 1, "--model", "cnn", name="again") as second:
            assert server.wait() == 0, server.text
            assert second.wait() == 0 and lasting.wait() == 0
    assert "Going on from" in second.text
    assert "did not answer" not in server.text
    # Had it started afresh, its numbers would be others than those of an undisturbed run.
    alike = InProcessFederation(
        clients=2, models="lenet,cnn", rounds=8, num_shards=8, local_epochs=2, alone=False
    )
    assert (
        alike.run()["digest"]
        == json.loads((tmp_path / "out" / "summary.json").read_text())["digest"]
    )


@pytest.mark.slow
def test_a_client_takes_the_next_free_shard(tmp_path):
    server, address = start_server(tmp_path, "--rounds", "1", "--num-shards", "8")
    with server, start_client(tmp_path, address, "0") as fixed:
        until(lambda: "client 0 joined" in server.text)
        with start_client(tmp_path, address, "auto") as free:
            assert server.wait() == 0 and fixed.wait() == 0 and free.wait() == 0
    assert "client 1 joined" in server.text


def test_refusals_are_told_to_the_client(tmp_path):
    server, address = start_server(tmp_path, "--num-shards", "2", "--rounds", "200")
    with server, start_client(tmp_path, address, 0):
        until(lambda: "client 0 joined" in server.text)
        refused = {
            "out of range": (("--data-shard", "7"), 2, "There is no shard 7"),
            "taken": (("--data-shard", "0", "--state-dir", "other"), 1, "Shard 0 is taken"),
            "disagrees": (
                ("--data-shard", "1", "--dataset", "cifar10"),
                2,
                "This federation uses --dataset digits",
            ),
        }
        for why, (options, status, sentence) in refused.items():
            done = fedkit("client", "--server", address, *options, folder=tmp_path)
            assert done.returncode == status, why
            assert done.stderr.startswith("Error: ") and sentence in done.stderr, why
        with start_client(tmp_path, address, 1):
            until(lambda: "client 1 joined" in server.text)
            done = fedkit("client", "--server", address, "--data-shard", "auto", folder=tmp_path)
            assert done.returncode == 1 and "full" in done.stderr


def test_the_first_error_of_a_client_ends_the_run(tmp_path):
    done = fedkit("run", "--rounds", "2", "--device", "cuda:99", folder=tmp_path)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert "Client " in error and "There is no device 'cuda:99'" in error
    assert "Traceback" not in done.stderr


def test_the_first_error_of_the_server_ends_the_run(tmp_path):
    done = fedkit("run", "--dataset", "mnist", "--data-root", str(tmp_path), folder=tmp_path)
    assert done.returncode == 1
    assert "The server failed: MNIST has no file" in done.stderr


def test_a_public_set_that_differs_is_refused(tmp_path):
    for name, seed in (("here", 1), ("there", 2)):
        write_mnist(tmp_path / name, seed)
    server, address = start_server(
        tmp_path, "--dataset", "mnist", "--public", "mnist:50", "--num-shards", "2",
        "--partition", "iid", "--data-root", "here", "--allow-checksum-mismatch",
    )  # fmt: skip
    with server:
        forged = "--allow-checksum-mismatch"
        with start_client(tmp_path, address, 0, "--data-root", "there", forged) as other:
            assert other.wait() == 1
        assert "Its public set mnist:50 differs from the server's" in other.text
        assert "a client was refused" in server.text
        # The shard is free again for a client with the right data.
        with start_client(
            tmp_path, address, 0, "--data-root", "here", forged, "--state-dir", "s"
        ) as right:
            until(lambda: "client 0 joined" in server.text or right.process.poll() is not None)
            assert right.process.poll() is None, right.text


@on_linux
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        signal.SIGKILL,  # the one that leaves no time to tidy
    ],
)
def test_no_process_outlives_the_run(how, tmp_path):
    with Process("run", "--rounds", "50", *SMALL, folder=tmp_path, name="run") as run:
        until(lambda: "round  1/50" in run.text)
        pids = children_of(run.process.pid)
        assert len(pids) == 5  # one server, four clients
        run.process.send_signal(how)
        status = run.wait()
        assert status == (-9 if how is signal.SIGKILL else 130)
        until(lambda: not any(alive(pid) for pid in pids))


@on_linux
def test_a_killed_client_ends_the_run_with_its_name(tmp_path):
    two = ("--rounds", "50", "--clients", "2", *SMALL)
    with Process("run", *two, folder=tmp_path, name="run") as run:
        until(lambda: "round  1/50" in run.text)
        pids = children_of(run.process.pid)
        import os

        os.kill(max(pids), signal.SIGKILL)
        assert run.wait(timeout=30) == 1
        until(lambda: not any(alive(pid) for pid in pids))
    assert "Client 1 (cnn) failed: it was killed by SIGKILL." in run.text


def test_a_failed_run_raises_in_python(tmp_path):
    federation = Federation(dataset="mnist", data_root=str(tmp_path), run_dir=str(tmp_path / "out"))
    with pytest.raises(FedkitError, match="The server failed: MNIST"):
        federation.run()


def test_a_folder_that_hides_ours_is_told(tmp_path, monkeypatch):
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies" / "__init__.py").write_text("")
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(tmp_path))
    done = fedkit("run", "--dry-run", folder=tmp_path)
    assert done.returncode == 1
    assert f"finds the package 'strategies' in {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


def write_mnist(root, seed):
    """A tiny data set in MNIST's files."""
    import numpy as np

    generator = np.random.default_rng(seed)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 300), ("t10k", 50)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = generator.integers(0, 255, (count, 28, 28), dtype=np.uint8)
        head = count.to_bytes(4, "big")
        size = (28).to_bytes(4, "big")
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            (2049).to_bytes(4, "big") + head + labels.tobytes()
        )
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            (2051).to_bytes(4, "big") + head + size + size + images.tobytes()
        )
