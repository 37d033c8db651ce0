"""Devices with data of their own: no shard, the same meaning by every column, the public set sent once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from inprocess import InProcessFederation
from PIL import Image

from clients.edge import edge_of
from fedkit import registry
from fedkit.data.names import OWN
from fedkit.engine.plan import make_plan
from fedkit.errors import FedkitError, UsageError

NAMES = ("ant", "bee", "cow")


@pytest.fixture(autouse=True)
def _nothing_allowed(monkeypatch):
    monkeypatch.setattr(registry, "_allowed", set())


def pictures(folder: Path, names=NAMES, count=16, size=8, seed=0):
    """A folder of pictures, a class a folder, that a network can tell apart."""
    draw = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        level = 40 + 80 * NAMES.index(name) if name in NAMES else 200
        for number in range(count):
            pixels = np.clip(level + draw.normal(0, 12, (size, size)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")
    return f"folder:{folder},grey"


def federation(tmp_path, owns, *, send=True, **settings):
    """Clients with ``owns[k]`` of their own; the server has nothing but the public set."""
    public = pictures(tmp_path / "public", count=20, seed=99)
    run = InProcessFederation(
        dataset=f"own:{','.join(NAMES)}",
        public=f"{public}:40",
        clients=len(owns),
        models="lenet",
        local_epochs=4,
        send_public=send,
        seed=3,
        **settings,
    )
    registry._allowed.clear()  # what a client on another machine was not told
    for client, own in enumerate(owns):
        registry.allow(own)
        context = run.context(client)
        context.node_config["own-dataset"] = own
        context.node_config["public-sets"] = str(tmp_path / f"state-{client}" / "public-sets")
    return run


@pytest.fixture
def local(monkeypatch):
    """Let a local plan have clients with own data, which `fedkit run` refuses."""
    from fedkit.engine import plan

    monkeypatch.setattr(plan, "_check_local", lambda federation, run: None)


@pytest.mark.parametrize(
    ("strategy", "hyper"), [("ktpfl", {}), ("fedavg", {"learning_rate": 0.1}), ("fd", {})]
)
def test_devices_with_own_folders_learn_together(tmp_path, local, strategy, hyper):
    owns = [
        pictures(tmp_path / "a", ("cow", "bee", "ant"), seed=1),
        pictures(tmp_path / "b", ("bee", "cow"), count=9, seed=2),
        pictures(tmp_path / "c", seed=3, size=11),
    ]
    run = federation(tmp_path, owns, strategy=strategy, rounds=4, model="lenet", **hyper)
    summary = run.run()
    assert summary["status"] == "completed" and not run.warnings()
    assert [client["examples"] for client in summary["clients"]] == [39, 14, 39]
    assert summary["mean_personal_accuracy"] > 0.4
    # There is no common test set, and nobody claims that there is.
    assert summary["mean_global_accuracy"] is None
    for client in range(3):
        edge = edge_of(run.context(client))
        for samples in (edge.private.train, edge.private.test):
            # Which class a picture is of shows in its brightness.
            level = samples.data.double().mean(dim=(1, 2, 3))
            assert ((level - (40 + 80 * samples.labels)).abs() < 20).all()


def test_the_public_set_is_sent_once_and_kept_by_its_digest(tmp_path, local):
    owns = [pictures(tmp_path / "a", seed=1), pictures(tmp_path / "b", seed=2)]
    sent = []

    def watch(instruction, reply):
        if "public" in instruction.content.array_records:
            sent.append(instruction.metadata.dst_node_id)
        return reply

    first = federation(tmp_path, owns, strategy="ktpfl", rounds=1, tamper=watch)
    first.run()
    assert sorted(sent) == [2, 3]
    digest = first.view.data.public_digest
    files = [tmp_path / f"state-{client}" / "public-sets" for client in (0, 1)]
    assert all(
        [file.name for file in folder.iterdir()] == [f"{digest}.safetensors"] for folder in files
    )
    for client in (0, 1):
        edge = edge_of(first.context(client))
        assert edge.data.public_digest == digest and edge.data.partition_digest == OWN
    again = federation(tmp_path, owns, strategy="ktpfl", rounds=1, tamper=watch)
    again.run()
    assert sorted(sent) == [2, 3]


def test_a_server_that_sends_no_public_set_says_so(tmp_path, local):
    owns = [pictures(tmp_path / "a", seed=1), pictures(tmp_path / "b", seed=2)]
    run = federation(tmp_path, owns, send=False, strategy="ktpfl", rounds=1, rejoin_wait=0.0)
    run.driver.roster.admit()
    assert not run.driver.roster.members
    assert any("this server sends none (--no-send-public)" in text for text in run.warnings())


def test_a_class_that_the_federation_does_not_know_is_named(tmp_path, local):
    owns = [
        pictures(tmp_path / "a", ("ant", "wolf", "bee"), seed=1),
        pictures(tmp_path / "b", seed=2),
    ]
    run = federation(tmp_path, owns, strategy="ktpfl", rounds=1)
    with pytest.raises(FedkitError, match=r"'wolf'.*'ant', 'bee', 'cow'.*none of 'cow'"):
        run.driver.roster.admit()


def test_a_shard_in_a_federation_of_own_data_is_told_what_to_give(tmp_path, local):
    run = federation(tmp_path, [pictures(tmp_path / "a"), ""], strategy="ktpfl", rounds=1)
    with pytest.raises(FedkitError, match="give --dataset"):
        run.driver.roster.admit()


def test_own_data_beside_shards_of_a_common_set(tmp_path):
    """A device of its own among clients of digits: it means the same by each digit."""
    folder = tmp_path / "mine"
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for at in range(120):
        name = str(bunch.target[at])
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = bunch.images[at].astype(np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{at:04d}.png")
    run = InProcessFederation(strategy="ktpfl", clients=3, models="lenet", rounds=1, local_epochs=1)
    own = f"folder:{folder}"
    registry.allow(own)
    run.context(2).node_config["own-dataset"] = own
    summary = run.run()
    edge = edge_of(run.context(2))
    assert edge.private.train.shape == (1, 8, 8) and not len(edge.global_test)
    assert edge.data.classes == tuple(str(digit) for digit in range(10))
    by_client = {client["id"]: client for client in summary["clients"]}
    assert by_client[2]["global_accuracy"] is None
    assert by_client[0]["global_accuracy"] is not None


def test_a_labelled_public_set_of_the_same_names_shares_the_columns(tmp_path, local):
    """Whatever the order in which its folders are sorted."""
    public = pictures(tmp_path / "public", ("cow", "ant"), count=20, seed=99)
    run = InProcessFederation(
        dataset=f"own:{','.join(NAMES)}",
        public=public,
        public_labels=True,
        clients=1,
        models="lenet",
        strategy="fedmd",
        rounds=1,
        min_clients=1,
    )
    own = pictures(tmp_path / "a", seed=1)
    registry.allow(own)
    run.context(0).node_config["own-dataset"] = own
    run.context(0).node_config["public-sets"] = str(tmp_path / "sets")
    for known in (True, False):
        if not known:
            registry._allowed -= {public}
        run.driver.roster.members.clear()
        context = run.context(0)
        context.__dict__.pop("_fedkit_edge", None)
        run.driver.roster.admit()
        edge = edge_of(context)
        assert edge.data.classes == NAMES and edge.data.public_digest == run.view.data.public_digest
        level = edge.public.data.double().mean(dim=(1, 2, 3))
        assert ((level - (40 + 80 * edge.public.labels)).abs() < 20).all()
        assert set(edge.public.labels.tolist()) == {0, 2}


def test_a_device_with_hardly_any_data_is_told(tmp_path, local):
    run = federation(tmp_path, [pictures(tmp_path / "a", ("ant",), count=3)], strategy="ktpfl")
    with pytest.raises(FedkitError, match="2 training samples: a device needs 4"):
        run.driver.roster.admit()


def test_a_local_run_deals_one_data_set():
    with pytest.raises(UsageError, match="start `fedkit server`"):
        make_plan({"dataset": "own:a,b", "public": "digits:100", "clients": 2}, local=True)


def test_own_data_need_a_public_set_that_is_named():
    with pytest.raises(UsageError, match="give --public DATASET"):
        make_plan({"dataset": "own:a,b"})


def test_the_server_tells_the_largest_batch_that_clients_train_with():
    run = InProcessFederation(strategy="fedmd", clients=2, models="lenet", rounds=1)
    offer = run.view.offer(False).config_records["offer"]
    assert offer["batch-size"] == 64  # FedMD's digest; its revisit takes 16
    assert json.loads(str(offer["agreement"]))["shape"] == [1, 8, 8]


@pytest.mark.parametrize(("budget", "fits"), [(10**9, True), (10**6, False)])
def test_a_network_beyond_the_memory_budget_is_refused_before_it_is_made(budget, fits):
    run = InProcessFederation(strategy="ktpfl", clients=2, models="resnet18", rounds=1)
    run.context(0).node_config["memory-budget"] = budget
    if fits:
        run.driver.roster.admit()
        return
    with pytest.raises(FedkitError, match=r"needs \d+ MB of memory and the budget is 1.0 MB"):
        run.driver.roster.admit()
