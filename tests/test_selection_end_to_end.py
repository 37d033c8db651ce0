"""Choosing, probing, stopping and emulating, with real processes over real gRPC."""

from __future__ import annotations

import json

import pytest
from inprocess import InProcessFederation
from processes import Process, events, fedkit, free_port, until

QUICK = ("--num-shards", "8", "--partition", "iid", "--public", "digits:40")


def start_server(folder, *options):
    address = f"127.0.0.1:{free_port()}"
    arguments = ("server", "--listen", address, "--run-dir", "out", *options)
    return Process(*arguments, folder=folder, name="server"), address


def start_client(folder, address, shard, *options, name=None):
    arguments = ("client", "--server", address, "--data-shard", str(shard), *options)
    return Process(*arguments, folder=folder, name=name or f"client-{shard}")


def summary_of(folder):
    return json.loads((folder / "out" / "summary.json").read_text())


@pytest.mark.slow
def test_a_tag_chooses_and_an_unknown_one_is_named(tmp_path):
    server, address = start_server(
        tmp_path, "--select", "tag:lab,moon", "--rounds", "2", "--strategy", "fd", *QUICK
    )
    with (
        server,
        start_client(tmp_path, address, 0, "--tag", "field"),
        start_client(tmp_path, address, 1, "--tag", "lab", "--tag", "fast"),
    ):
        assert server.wait() == 0, server.text
    assert (
        "no client has the tag moon (the tags of those that are connected: fast, field, lab)"
        in (server.text)
    )
    summary = summary_of(tmp_path)
    assert [client["rounds"] for client in summary["clients"]] == [0, 2]
    assert summary["fairness"] == 0.5 and "Jain's index" in server.text


def test_a_client_killed_between_probe_and_finish_neither_loses_nor_repeats_its_epoch(tmp_path):
    """Client 0 is slow, so that client 1 has answered its probe long before the decision comes."""
    settings = ("--select", "drop:0.1", "--rounds", "2", "-o", "local-epochs=3", *QUICK)
    slow = tmp_path / "slow.toml"
    slow.write_text("slowdown = 1\nup-mbit = 1000\ndown-mbit = 1000\nlatency = 3\n")
    server, address = start_server(tmp_path, "--strategy", "ktpfl", *settings)

    def probed():
        return [
            e for e in events(tmp_path / "out")
            if (e["event"], e["exchange"], e["name"]) == ("bytes", "probe", "bytes_down")
        ]  # fmt: skip

    def kept(client):
        """Whether the client's state holds a probe, and no decision has come."""
        files = tmp_path.glob(f"fedkit-state/shard-{client}/*/manifest.json")
        return any("probe-place" in file.read_text() for file in files)

    with server, start_client(tmp_path, address, 0, "--emulate", str(slow)) as lasting:
        with start_client(tmp_path, address, 1) as doomed:
            until(lambda: kept(1))
            doomed.kill()
        assert len(probed()) == 2
        with start_client(tmp_path, address, 1, name="again") as again:
            assert server.wait() == 0, server.text
            assert lasting.wait() == 0 and again.wait() == 0
    assert "Going on from" in again.text and "did not answer" not in server.text
    alike = InProcessFederation(
        strategy="ktpfl", select="drop:0.1", clients=2, models="lenet", rounds=2, num_shards=8,
        local_epochs=3, partition="iid", public="digits:40", alone=False,
    )  # fmt: skip
    assert summary_of(tmp_path)["digest"] == alike.run()["digest"]


@pytest.mark.slow
def test_an_emulated_run_stops_when_validation_says_so_and_exits_well(tmp_path):
    own = tmp_path / "slow.toml"
    own.write_text("slowdown = 4\nup-mbit = 10\ndown-mbit = 20\nlatency = 0.2\n")
    done = fedkit(
        *("run", "--clients", "2", "--rounds", "30", "--strategy", "fd", "--no-alone", *QUICK),
        *("--until", "val_accuracy=0.05", "--val-fraction", "0.2", "--run-dir", "out"),
        *("--target", "mean_global_accuracy=0.05", "--emulate", "slow.toml,laptop"),
        *("--select", "fedmarl"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    summary = summary_of(tmp_path)
    assert summary["status"] == "completed" and summary["rounds"] < 30
    assert "0.05 was wanted" in summary["stop_reason"]
    assert "ended before its last round" in done.stdout and "first reached in round" in done.stdout
    times = {
        (e["client"], e["exchange"], e["name"]): e["value"]
        for e in events(tmp_path / "out")
        if e["event"] == "timing" and e["exchange"] in ("train", "probe")
    }
    # Twice the latency at least, and for the other one of a laptop's line.
    assert times[0, "train", "transfer-seconds"] >= 0.4
    assert 0.018 <= times[1, "train", "transfer-seconds"] < 0.4
    row = summary["history"][-1]
    assert row["seconds"] >= times[0, "train", "seconds"] + times[0, "train", "transfer-seconds"]
    # Resumed, it has had enough still.
    again = fedkit("server", "--resume", "out", "--min-clients", "1", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert summary_of(tmp_path)["rounds"] == summary["rounds"]
    assert summary_of(tmp_path)["stop_reason"] == summary["stop_reason"]


@pytest.mark.slow
def test_a_client_may_leave_while_its_device_is_away(tmp_path):
    """Its battery window is hours off, so that it would answer nothing before."""
    from fedkit.devices import traces

    hour = traces.hour(1, 1, 0.0)
    away = tmp_path / "away.toml"
    away.write_text(
        "slowdown = 1\nup-mbit = 1000\ndown-mbit = 1000\nlatency = 0.01\n"
        f"window = [{(hour + 6) % 24:.3f}, {(hour + 7) % 24:.3f}]\n"
    )
    server, address = start_server(
        tmp_path, "--strategy", "fd", "--rounds", "1", "--min-clients", "2", "--seed", "1",
        *QUICK, "--no-alone",
    )  # fmt: skip
    with server, start_client(tmp_path, address, 0) as lasting:
        with start_client(tmp_path, address, 1, "--emulate", str(away), "--verbose") as leaving:
            until(lambda: "The emulated device is away" in leaving.text)
            leaving.stop()
            leaving.wait()
        assert server.wait() == 0, server.text
        assert lasting.wait() == 0
    assert "client 1 did not answer" in server.text
    assert [client["rounds"] for client in summary_of(tmp_path)["clients"]] == [1, 0]
