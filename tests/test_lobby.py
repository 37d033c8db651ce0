"""The lobby: who gets which shard, and who is not let in."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from fedkit import __version__
from fedkit.engine.lobby import Lobby
from fedkit.link.node import Refusal
from fedkit.settings import FederationSettings, as_config

SETTINGS = FederationSettings(num_shards=3, dataset="digits", partition="iid", model="lenet")


def lobby(
    *,
    one_model: bool = False,
    shards: dict[int, int] | None = None,
    patience: float = 0.0,
    **changes: Any,
) -> Lobby:
    settings = FederationSettings(**{**vars(SETTINGS), **changes})
    return Lobby(settings, "f00d", one_model=one_model, shards=shards, patience=patience)


def shard(where: Lobby, node_id: int, wanted: Any = None, **config: Any) -> int:
    """The shard that a client with this wish gets."""
    welcome = where.greet({"config": {"shard": wanted, **config}}, node_id)
    number: int = welcome["node_config"]["partition-id"]
    return number


def refused(where: Lobby, node_id: int, wanted: Any = None, **config: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        shard(where, node_id, wanted, **config)
    return caught.value


def test_the_welcome_carries_federation_shard_and_settings():
    welcome = lobby().greet({"config": {"shard": 1}}, 2)
    assert welcome["federation"] == "f00d"
    assert welcome["node_config"] == {"partition-id": 1, "num-partitions": 3}
    assert welcome["run_config"] == as_config(SETTINGS)


def test_auto_takes_the_lowest_free_shard():
    where = lobby()
    assert shard(where, 2, 1) == 1
    assert [shard(where, node) for node in (3, 4)] == [0, 2]


def test_a_wanted_shard_is_given():
    where = lobby()
    assert [shard(where, node, wanted) for node, wanted in ((2, 2), (3, 0), (4, 1))] == [2, 0, 1]


@pytest.mark.parametrize("config", [None, {}, [], "text", 3, {"shard": None}])
def test_a_greeting_without_wishes_takes_a_free_shard(config):
    welcome = lobby().greet({"config": config}, 2)
    assert welcome["node_config"]["partition-id"] == 0
    assert lobby().greet({}, 2)["node_config"]["partition-id"] == 0


@pytest.mark.parametrize("wanted", [3, -1, 10**30, "1", 1.5, True, False, [1], {}])
def test_a_shard_that_is_none_is_refused_as_an_argument(wanted):
    where = lobby()
    refusal = refused(where, 2, wanted)
    assert refusal.status is grpc.StatusCode.INVALID_ARGUMENT
    assert "no shard" in str(refusal) and "0 to 2" in str(refusal)
    assert shard(where, 2) == 0


def test_a_taken_shard_is_refused():
    where = lobby()
    shard(where, 2, 1)
    refusal = refused(where, 3, 1)
    assert refusal.status is grpc.StatusCode.ALREADY_EXISTS
    assert "Shard 1 is taken" in str(refusal) and "auto" in str(refusal)


def test_a_full_federation_is_refused():
    where = lobby()
    for node in (2, 3, 4):
        shard(where, node)
    refusal = refused(where, 5)
    assert refusal.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "full" in str(refusal) and "3" in str(refusal)


def test_who_is_refused_takes_nothing():
    where = lobby()
    shard(where, 2, 0)
    refused(where, 3, 0)
    refused(where, 3, 7)
    refused(where, 3, 1, dataset="mnist")
    assert [shard(where, node) for node in (4, 5)] == [1, 2]


@pytest.mark.parametrize("wanted", [None, 1])
def test_the_same_node_gets_its_shard_again(wanted):
    where = lobby()
    assert shard(where, 2, 1) == 1
    assert shard(where, 2, wanted) == 1
    where.part(2)
    assert shard(where, 2, wanted) == 1


def test_the_same_node_keeps_its_shard_in_a_full_federation():
    where = lobby()
    for node in (2, 3, 4):
        shard(where, node)
    assert shard(where, 3) == 1


def test_a_node_cannot_change_its_shard():
    where = lobby()
    shard(where, 2, 1)
    refusal = refused(where, 2, 0)
    assert refusal.status is grpc.StatusCode.INVALID_ARGUMENT
    assert "shard 1" in str(refusal) and "--state-dir" in str(refusal)


def test_a_gone_clients_shard_can_be_asked_for():
    where = lobby()
    shard(where, 2, 1)
    where.part(2)
    assert shard(where, 3, 1) == 1


def test_auto_prefers_a_fresh_shard_to_one_whose_holder_may_come_back():
    where = lobby()
    shard(where, 2, 0)
    where.part(2)
    assert [shard(where, node) for node in (3, 4)] == [1, 2]
    assert shard(where, 5) == 0


def test_a_holder_that_came_back_is_not_robbed():
    where = lobby()
    shard(where, 2, 0)
    where.part(2)
    assert shard(where, 2) == 0
    assert refused(where, 3, 0).status is grpc.StatusCode.ALREADY_EXISTS
    assert [shard(where, node) for node in (3, 4)] == [1, 2]
    refused(where, 5)


def test_a_holder_whose_shard_went_to_another_takes_what_is_left():
    where = lobby()
    shard(where, 2, 0)
    where.part(2)
    shard(where, 3, 0)
    assert refused(where, 2, 0).status is grpc.StatusCode.ALREADY_EXISTS
    assert shard(where, 2) == 1


def test_a_resumed_federation_knows_who_holds_what():
    where = lobby(shards={2: 5, 0: 7})
    assert where.shards() == {2: 5, 0: 7}
    assert shard(where, 7) == 0
    assert shard(where, 5, 2) == 2
    assert refused(where, 8, 2).status is grpc.StatusCode.ALREADY_EXISTS
    assert shard(where, 8) == 1
    assert where.shards() == {2: 5, 0: 7, 1: 8}


def test_a_newcomer_takes_no_shard_whose_holder_may_come_back_while_one_is_free():
    where = lobby(shards={0: 5, 1: 7})
    assert shard(where, 8) == 2
    assert shard(where, 7) == 1
    # All are taken or kept for somebody: the device that has not come back yields.
    assert shard(where, 9) == 0
    assert refused(where, 10).status is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_resumed_holder_cannot_change_its_shard():
    where = lobby(shards={1: 5})
    assert refused(where, 5, 0).status is grpc.StatusCode.INVALID_ARGUMENT


def test_each_shard_has_one_holder_whatever_happens():
    where = lobby(num_shards=4)
    held: dict[int, int] = {}
    for step in range(200):
        node = step * 7 % 6 + 2
        if node in held and step % 3 == 0:
            where.part(node)
            del held[node]
            continue
        try:
            held[node] = shard(where, node)
        except Refusal:
            assert len(held) == 4
        assert len(set(held.values())) == len(held)


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [("dataset", "mnist", "digits"), ("partition", "classes:2", "iid"), ("num-shards", 20, "3")],
)
def test_a_client_that_expects_something_else_is_told_what_there_is(name, theirs, ours):
    refusal = refused(lobby(), 2, **{name: theirs})
    assert refusal.status is grpc.StatusCode.INVALID_ARGUMENT
    for word in (f"--{name} {ours}", str(theirs), "leave"):
        assert word in str(refusal)


def test_a_client_that_expects_what_there_is_is_let_in():
    expected = {"dataset": "digits", "partition": "iid", "num-shards": 3}
    assert shard(lobby(), 2, 0, **expected) == 0
    assert shard(lobby(), 2, 0, **dict.fromkeys(expected)) == 0


def test_a_client_of_another_version_is_refused_with_both_versions():
    with pytest.raises(Refusal) as caught:
        lobby().greet({"version": "0.0.1", "config": {}}, 2)
    assert caught.value.status is grpc.StatusCode.FAILED_PRECONDITION
    assert "0.0.1" in str(caught.value) and __version__ in str(caught.value)
    assert lobby().greet({"version": __version__, "config": {}}, 2)
    assert lobby().greet({"config": {}}, 2)


@pytest.mark.parametrize("claimed", [0, 2, -1, "1", None, 1.5])
def test_only_the_shard_that_was_given_can_be_claimed(claimed):
    where = lobby()
    shard(where, 2, 1)
    assert where.why_not(2, 1) is None
    assert "shard" in str(where.why_not(2, claimed))
    assert "shard" in str(where.why_not(3, 1))


def test_only_a_federation_of_one_model_minds_the_model():
    assert shard(lobby(), 2, 0, model="resnet18") == 0
    refusal = refused(lobby(one_model=True), 2, 0, model="resnet18")
    assert refusal.status is grpc.StatusCode.INVALID_ARGUMENT
    assert "--model lenet" in str(refusal) and "resnet18" in str(refusal)
    assert shard(lobby(one_model=True), 2, 0, model="lenet") == 0
    assert shard(lobby(one_model=True), 2, 0, model=None) == 0


def test_shards_of_a_resumed_run_wait_for_their_holders():
    """Whoever knocks first after a restart gets nobody's place."""
    where = lobby(shards={0: 7, 1: 8}, patience=60)
    assert shard(where, 9) not in (0, 1)
    assert shard(where, 8) == 1 and shard(where, 7) == 0
    assert "taken" in str(refused(where, 10, 0))


def test_holders_that_do_not_come_back_in_time_lose_their_shard():
    where = lobby(shards={0: 7}, patience=-1)
    assert shard(where, 9, 0) == 0
