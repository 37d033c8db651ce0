"""Devices with pictures and networks of their own, in processes as their owners start them."""

from __future__ import annotations

import json
import signal
import textwrap

import numpy as np
import pytest
from PIL import Image
from processes import Process, events, fedkit, free_port, until
from sklearn.datasets import load_digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def pictures(folder, indices, *, labelled=True, size=8):
    bunch = load_digits()
    for at in indices:
        place = folder / WORDS[bunch.target[at]] if labelled else folder
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((bunch.images[at] * 15).astype(np.uint8)).resize((size, size))
        image.save(place / f"{at:04d}.png")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three devices' pictures, and the server's public ones, which no device has."""
    home = tmp_path_factory.mktemp("pictures")
    pictures(home / "server" / "public", range(0, 200), labelled=False)
    pictures(home / "one" / "mine", range(200, 500))
    without_three = [at for at in range(500, 800) if load_digits().target[at] != 3]
    pictures(home / "two" / "mine", without_three, size=20)
    (home / "two" / "my_nets.py").write_text(
        textwrap.dedent("""
            from torch import nn

            def tiny(shape, classes):
                channels, height, width = shape
                return nn.Sequential(
                    nn.Conv2d(channels, 8, 3, padding=1),
                    nn.ReLU(),
                    nn.Flatten(),
                    nn.Linear(8 * height * width, classes),
                )
        """)
    )
    return home


def server(folders, port, *more, name="server"):
    return Process(
        "server",
        *("--strategy", "ktpfl", "--dataset", f"own:{','.join(WORDS)}"),
        *("--public", "folder:public,grey", "--run-dir", str(folders / name)),
        *("--listen", f"127.0.0.1:{port}", "-o", "local-epochs=1", *more),
        folder=folders / "server",
        name=name,
    )


def client(folders, who, port, *more):
    return Process(
        "client",
        *(
            "--dataset",
            "folder:mine",
            "--server",
            f"127.0.0.1:{port}",
            "--state-dir",
            "state",
            *more,
        ),
        folder=folders / who,
        name="client",
    )


@pytest.mark.slow
def test_devices_with_their_own_pictures_and_networks_learn_together_through_a_kill(folders):
    """One lacks a class and has its network in a file of its own; it is killed in mid-run."""
    port = free_port()
    with (
        server(folders, port, "--rounds", "6", "--min-clients", "2", name="run") as serving,
        client(folders, "one", port, "--model", "lenet"),
    ):
        two = client(folders, "two", port, "--model", "my_nets:tiny")
        until(
            lambda: any(
                e["event"] == "round_start" and e["round"] == 3 for e in events(folders / "run")
            )
        )
        two.process.send_signal(signal.SIGKILL)
        with client(folders, "two", port, "--model", "my_nets:tiny") as again:
            assert serving.wait() == 0, serving.text
            assert again.wait() == 0, again.text
            assert "Going on from" in again.text
    summary = json.loads((folders / "run" / "summary.json").read_text())
    models = {entry["model"]: entry for entry in summary["clients"]}
    assert set(models) == {"lenet", "my_nets:tiny"} and summary["rounds"] == 6
    assert summary["mean_personal_accuracy"] > 0.6 and summary["mean_global_accuracy"] is None
    for who in ("one", "two"):
        (sent,) = (folders / who / "state" / "public-sets").iterdir()
        assert len(sent.stem) == 64
    refused = fedkit("evaluate", "state", folder=folders / "two")
    assert refused.returncode == 1 and "--allow my_nets:tiny" in refused.stderr
    allowed = ("--allow", "my_nets:tiny")
    refused = fedkit("evaluate", "state", *allowed, folder=folders / "two")
    assert refused.returncode == 2 and "--dataset folder:PATH" in refused.stderr
    data = ("--dataset", "folder:mine,grey", "--format", "json")
    measured = fedkit("evaluate", "state", *allowed, *data, folder=folders / "two")
    assert measured.returncode == 0, measured.stderr
    (row,) = json.loads(measured.stdout)
    assert row["accuracy"] == pytest.approx(models["my_nets:tiny"]["personal_accuracy"], abs=1e-12)


def test_a_stranger_among_the_classes_is_told_and_the_server_goes_on_waiting(folders):
    port = free_port()
    pictures(folders / "three" / "mine", range(800, 850))
    (folders / "three" / "mine" / "seven").rename(folders / "three" / "mine" / "Seven")
    with server(folders, port, "--rounds", "1", name="waits") as serving:
        until((folders / "waits" / "address").exists)
        with client(folders, "three", port, "--model", "lenet") as refused:
            assert refused.wait() == 1
            assert "'Seven', which this federation does not know" in refused.text
            assert "Traceback" not in refused.text
        assert serving.process.poll() is None


def test_a_server_reads_no_path_on_a_device_that_its_owner_did_not_name(folders, tmp_path):
    """The server says folder:/...: a client that was told nothing of it refuses."""
    port = free_port()
    own = folders / "one" / "mine"
    with Process(
        "server",
        *("--strategy", "fedavg", "--dataset", f"folder:{own},grey", "--num-shards", "2"),
        *("--public", f"folder:{own},grey:40", "--rounds", "1", "--run-dir", str(tmp_path / "run")),
        *("--listen", f"127.0.0.1:{port}", "--partition", "iid"),
        folder=tmp_path,
        name="server",
    ):
        shard = ("client", "--data-shard", "0", "--server", f"127.0.0.1:{port}")
        refused = fedkit(*shard, folder=tmp_path)
        assert refused.returncode == 2, refused.stdout
        assert "only its own command line may name" in refused.stderr
        told = Process(*shard, "--dataset", f"folder:{own},grey", folder=tmp_path, name="told")
        with told:
            until(lambda: any(e["event"] == "join" for e in events(tmp_path / "run")))
