"""What a strategy remembers: on disk and back, and all that a run needs to go on after a restart."""

import json
import os
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from inprocess import InProcessFederation
from test_strategies import (
    FEDAVG,
    FEDMD,
    KTPFL,
    SMALL,
    assert_same_bits,
    kept_model,
    numpy_of,
)

from fedkit.engine.driver import Driver
from fedkit.engine.strategy_state import load_state, save_state
from fedkit.errors import FedkitError
from fedkit.models.build import build_model

# The machine may be busy: no example is too slow.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@dataclass
class State:
    """Some strategy's state."""

    kept: Any = None
    more: dict[int, Any] = field(default_factory=dict)


@dataclass
class Other:
    """Another strategy's."""

    kept: Any = None
    more: dict[int, Any] = field(default_factory=dict)


def assert_equal(found, wanted):
    """The same things of the same kinds, arrays to the bit."""
    assert type(found) is type(wanted)
    if isinstance(wanted, np.ndarray):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found.tobytes() == wanted.tobytes()
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        assert [type(key) for key in found] == [type(key) for key in wanted]
        for key in wanted:
            assert_equal(found[key], wanted[key])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_equal(one, other)
    else:
        assert found == wanted or (found != found and wanted != wanted)


def back(folder, state):
    save_state(folder / "state", state)
    return load_state(folder / "state", type(state))


# On disk and back

ARRAYS = st.sampled_from(["float32", "float64", "int64", "bool"]).flatmap(
    lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats()
    | st.text(max_size=20)
    | ARRAYS
)
KEYS = st.integers(-5, 10**12) | st.text(max_size=10)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150)
@given(kept=TREES, more=st.dictionaries(st.integers(0, 100), TREES, max_size=3))
def test_a_state_comes_back_as_it_was(tmp_path_factory, kept, more):
    state = State(kept, more)
    assert_equal(vars(back(tmp_path_factory.mktemp("state"), state)), vars(state))


@pytest.mark.parametrize(
    "kept",
    [
        None,
        {},
        [],
        {"a": {}, "b": [], "c": [[], {}]},
        {0: 1, "0": 2},
        {3: {10: np.float32([1, 2]), 2: np.zeros(0)}, 1: None},
        np.zeros((0, 0)),
        np.zeros((3, 0), dtype=np.float32),
        np.array([[True, False]]),
        np.arange(6).reshape(2, 3),
        np.arange(6.0).reshape(2, 3).T,
        np.arange(10)[::-3],
        [np.float64([1e-320, -0.0, np.inf, np.nan])],
        1e-320,
        float("inf"),
        2**53 + 1,
        'an umlaut: ä, a quote: ", a zero: \0',
    ],
    ids=repr,
)
def test_what_a_state_may_hold(tmp_path, kept):
    assert_equal(back(tmp_path, State(kept)).kept, kept)


@pytest.mark.parametrize("value", [np.int64(7), np.float32(0.5), np.array(True), 3.0], ids=repr)
def test_an_array_without_dimensions_comes_back_without_any(tmp_path, value):
    """Normalisation layers count their batches in such."""
    array = np.asarray(value)
    assert_equal(back(tmp_path, State({"count": array})).kept["count"], array)


def test_a_loaded_network_fits_its_architecture(tmp_path):
    import torch

    model = build_model("lenet:batch", (1, 8, 8), 10, 1)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = back(tmp_path, State({"lenet:batch": weights})).kept["lenet:batch"]
    model.load_state_dict({name: torch.from_numpy(array) for name, array in found.items()})
    assert_same_bits(found, weights)


def test_a_saved_state_is_the_senders_no_more(tmp_path):
    array = np.ones(3)
    save_state(tmp_path / "state", State(array))
    array[:] = 2
    assert load_state(tmp_path / "state", State).kept.tolist() == [1, 1, 1]


def test_the_file_is_plain_safetensors(tmp_path):
    """Nothing is pickled: any reader of the format reads numbers and JSON."""
    save_state(tmp_path / "state", State([np.float32([1, 2]), {7: "seven"}], {3: np.arange(4)}))
    content = (tmp_path / "state").read_bytes()
    found = [array.tolist() for array in safetensors.numpy.load(content).values()]
    assert sorted(found, key=len) == [[1, 2], [0, 1, 2, 3]]
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert "seven" in json.loads(header["__metadata__"]["fedkit"])["tree"]["kept"][1]["pairs"][0]
    # And nothing else is in there: 2 x 4 and 4 x 8 bytes.
    assert len(content) == 8 + length + 40


class Evil:
    """Would say so if it were unpickled."""

    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    "kept",
    [Evil(), (1, 2), {1, 2}, b"bytes", np.float32(1), 1j, {"deep": [{"er": Evil()}]}, State()],
    ids=lambda kept: type(kept).__name__,
)
def test_what_cannot_be_saved_leaves_the_old_file(tmp_path, kept):
    save_state(tmp_path / "state", State("old"))
    with pytest.raises(TypeError):
        save_state(tmp_path / "state", State(kept))
    assert load_state(tmp_path / "state", State).kept == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    save_state(tmp_path / "state", State("old"))

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            FedkitError, match=r"state can't be written: No space left on device\.$"
        ):
            save_state(tmp_path / "state", State("new"))
    assert load_state(tmp_path / "state", State).kept == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_a_state_replaces_the_one_before(tmp_path):
    for kept in ("old", [np.zeros(1000)], "new"):
        save_state(tmp_path / "state", State(kept))
    assert load_state(tmp_path / "state", State).kept == "new"


def refused(path, kind=State):
    with pytest.raises(FedkitError) as caught:
        load_state(path, kind)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def test_there_is_no_such_file(tmp_path):
    refused(tmp_path / "state")


def test_a_folder_is_no_state(tmp_path):
    refused(tmp_path)


def test_another_strategys_state_is_refused_by_name(tmp_path):
    save_state(tmp_path / "state", Other([np.zeros(3)]))
    sentence = refused(tmp_path / "state")
    assert "Other" in sentence
    assert "State" in sentence


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path):
    path = tmp_path / "state"
    save_state(path, State([np.arange(3), {1: "text"}]))
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 100, b"\xff" * 100, b"PK\3\4 no zip"])
def test_foreign_bytes_are_refused(tmp_path, content):
    (tmp_path / "state").write_bytes(content)
    refused(tmp_path / "state")


TREE = {"kept": None, "more": {"pairs": []}}


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"fedkit": "no JSON"},
        {"fedkit": "[]"},
        {"fedkit": "{}"},
        {"fedkit": json.dumps({"schema": 1, "kind": "State"})},
        {"fedkit": json.dumps({"schema": 2, "kind": "State", "tree": TREE})},
        {"fedkit": json.dumps({"schema": 1, "kind": "State", "tree": []})},
        {"fedkit": json.dumps({"schema": 1, "kind": "State", "tree": {**TREE, "extra": 1}})},
        {"fedkit": json.dumps({"schema": 1, "kind": "State", "tree": {"kept": {"array": "9"}}})},
        {"fedkit": json.dumps({"schema": 1, "kind": "State", "tree": {"kept": {"other": 1}}})},
        {"fedkit": json.dumps({"schema": 1, "kind": "State", "tree": {"kept": {"pairs": [1]}}})},
        {
            "fedkit": json.dumps(
                {"schema": 1, "kind": "State", "tree": {"kept": {"pairs": [[[], 1]]}}}
            )
        },
    ],
    ids=str,
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, metadata):
    content = safetensors.numpy.save({"0": np.zeros(3)}, metadata)
    (tmp_path / "state").write_bytes(content)
    refused(tmp_path / "state")


def test_a_flipped_bit_in_the_header_never_ends_in_a_traceback(tmp_path):
    path = tmp_path / "state"
    save_state(path, State([np.arange(3), {1: "text"}]))
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    for at in range(length):
        for bit in (1, 4, 32):
            path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
            try:
                load_state(path, State)
            except FedkitError:
                continue


# A run goes on

DISTIL = {"steps": 8, "steps_patience": 0, "check_every": 4, "server_batch": 16, "workers": 1}
LOCAL = {
    "local_epochs": 1,
    "batch_size": 16,
    "optimiser": "sgd",
    "learning_rate": 0.05,
    "schedule": "cosine",
}
KEPT = LOCAL | {"optimiser": "adam", "learning_rate": 0.003, "keep_optimiser": True}
CASES = {
    "fedavg": FEDAVG | {"schedule": "cosine", "model": "lenet:batch"},
    "fedprox": FEDAVG
    | {"strategy": "fedprox", "adaptive_mu": True, "work": "stragglers:0.7", "local_epochs": 2},
    "fedmd": FEDMD | {"schedule": "plateau", "schedule_patience": 0},
    "fedmd fused": FEDMD | {"fuse": True},
    "ktpfl": KTPFL | {"matrix_rate": 0.5},
    "ktpfl pre-trained": KTPFL
    | {"public_pretrain": True, "public_labels": True, "pretrain_epochs": 1, "workers": 1},
    "feddf logits": {"strategy": "feddf", **KEPT, **DISTIL, "digest_epochs": 1},
    "feddf weights": {"strategy": "feddf", "exchange": "weights", **LOCAL, **DISTIL},
    "feddistill logits": {"strategy": "feddistill", **KEPT, **DISTIL, "digest_epochs": 1},
    "feddistill weights": {
        "strategy": "feddistill",
        "exchange": "weights",
        "teacher_first": 2,
        **LOCAL,
    },
    "fd": {"strategy": "fd", "local_epochs": 1},
    "fedproto": {"strategy": "fedproto", "local_epochs": 1},
}
# These send nothing about the public set.
APART = ("fedavg", "fedprox", "fd", "fedproto")


def federation_of(case):
    """Little private data, and two architectures, of which one has integer buffers."""
    shared = SMALL | {"public": "digits:1300", "models": "lenet:batch,cnn", "alone": True}
    shared |= {"partition": "dirichlet:0.5", "clients": 3, "rounds": 3}
    if case["strategy"] not in APART:
        shared["public_samples"] = 40
    return InProcessFederation(**shared | case)


def drive(run, arrays, first, last):
    """Rounds first to last of a federation that knows of three."""
    driver = Driver(
        run.strategy,
        run.grid,
        replace(run.plan.federation, rounds=last),
        run.emit,
        check=lambda node_id, facts: run.view.why_not(facts),
        evaluate_fn=lambda round, arrays: run.view.measure(run.strategy.server_models(arrays)),
    )
    return driver.run(arrays, first_round=first).arrays


def measured(run, round):
    """All that a round measured, and the bytes it took; what it took in time is another matter."""
    return sorted(
        str((event.event, event.exchange, event.client, event.name, event.value, event.n))
        for event in run.events
        if event.round == round and event.event in ("metric", "bytes", "coefficients")
    )


@pytest.mark.parametrize("name", CASES)
def test_a_strategy_that_was_saved_and_loaded_goes_on_to_the_bit(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKIT_CACHE", str(tmp_path / "cache"))
    whole = federation_of(CASES[name])
    wanted = drive(whole, whole.strategy.initial_arrays(), 1, 3)
    before = federation_of(CASES[name])
    arrays = drive(before, before.strategy.initial_arrays(), 1, 2)
    if before.strategy.state is not None:
        save_state(tmp_path / "state", before.strategy.state)
    # Another process of the server's; the clients' went on.
    after = federation_of(CASES[name])
    after.grid.apps = before.grid.apps
    if after.strategy.state is not None:
        after.strategy.state = load_state(tmp_path / "state", type(after.strategy.state))
    found = drive(after, arrays, 3, 3)
    assert_same_bits(numpy_of(found), numpy_of(wanted))
    assert measured(after, 3) == measured(whole, 3)
    if whole.strategy.state is not None:
        assert_equal(vars(after.strategy.state), vars(whole.strategy.state))
    for client in range(3):
        for slot in ("own", "alone"):
            assert_same_bits(kept_model(after, client, slot), kept_model(whole, client, slot))


@pytest.mark.parametrize(
    "name",
    [
        "fedmd",
        "ktpfl",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("fedmd fused", "feddf logits", "feddf weights", "feddistill logits")
        ),
    ],
)
def test_a_strategy_without_its_state_would_go_on_otherwise(name, tmp_path, monkeypatch):
    """So the test above tests something."""
    monkeypatch.setenv("FEDKIT_CACHE", str(tmp_path / "cache"))
    whole = federation_of(CASES[name])
    drive(whole, whole.strategy.initial_arrays(), 1, 3)
    before = federation_of(CASES[name])
    arrays = drive(before, before.strategy.initial_arrays(), 1, 2)
    after = federation_of(CASES[name])
    after.grid.apps = before.grid.apps
    drive(after, arrays, 3, 3)
    assert measured(after, 3) != measured(whole, 3)
