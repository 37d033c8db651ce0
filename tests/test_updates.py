"""Updates in fewer bytes: what comes back, what stays behind, what it costs, and what is refused."""

import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from inprocess import InProcessFederation

import clients.fedavg
from clients.edge import edge_of
from clients.updates import upload_bytes
from fedkit.engine.dryrun import dry_run
from fedkit.engine.plan import make_plan
from fedkit.errors import UsageError
from fedkit.flower import decode_records, encode_records
from fedkit.knowledge.arrays import as_record
from fedkit.knowledge.sparse import decode_numbers, encode_numbers, largest
from fedkit.knowledge.updates import compressed, make_update_codec, sent_bytes

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

CODECS = ["float16", "int8", "topk:0.001", "topk:0.1", "topk:0.5", "topk:1"]
SHAPES = [(), (0,), (1,), (5,), (3, 0), (4, 3), (2, 3, 2, 2), (300,)]
FINITE = st.floats(-1e4, 1e4, width=32)
TENSOR = st.sampled_from(SHAPES).flatmap(lambda shape: arrays(np.float32, shape, elements=FINITE))
UPDATE = st.lists(TENSOR, min_size=1, max_size=5)
every_codec = pytest.mark.parametrize("codec", CODECS)

SMALL = {
    "strategy": "fedavg",
    "model": "lenet:batch",
    "partition": "iid",
    "public": "digits:60",
    "clients": 3,
    "rounds": 3,
    "num_shards": 30,
    "local_epochs": 2,
    "batch_size": 16,
    "learning_rate": 0.05,
}


def shapes_of(update):
    return [tensor.shape for tensor in update]


def there_and_back(codec, update):
    """What comes back of an update, through messages' bytes."""
    coder = make_update_codec(codec)
    record = as_record(coder.encode([tensor.copy() for tensor in update]).arrays)
    passed = decode_records(b"".join(encode_records(RecordDict({"update": record}))))
    return coder.decode(passed["update"], shapes_of(update))


def bound(codec, tensor):
    """The error that a codec states for each entry, with what float32 rounds on the way back."""
    exact = tensor.astype(np.float64)
    if codec == "float16":
        return np.maximum(2.0**-11 * np.abs(exact), 2.0**-25)
    rows = exact.reshape(tensor.shape[0] if tensor.ndim > 1 else 1, -1)
    span = (rows.max(axis=1) - rows.min(axis=1)) / 510
    slack = 2.0**-23 * np.abs(rows).max(axis=1) + 2.0**-149
    return np.broadcast_to((span + slack)[:, None], rows.shape).reshape(tensor.shape)


@settings(max_examples=60)
@given(UPDATE, st.sampled_from(["float16", "int8"]))
def test_half_precision_and_int8_keep_the_bounds_that_they_state(update, codec):
    for tensor, back in zip(update, there_and_back(codec, update), strict=True):
        assert (back.shape, back.dtype) == (tensor.shape, np.float32)
        if tensor.size:
            error = np.abs(back.astype(np.float64) - tensor)
            assert (error <= bound(codec, tensor)).all()


@settings(max_examples=60)
@given(UPDATE, st.sampled_from(["topk:0.001", "topk:0.3", "topk:1"]))
def test_what_topk_sends_and_what_stays_are_the_update_to_the_bit(update, codec):
    coder = make_update_codec(codec)
    encoded = coder.encode([tensor.copy() for tensor in update])
    sent = coder.decode(as_record(encoded.arrays), shapes_of(update))
    for tensor, came, rest in zip(update, sent, encoded.rest, strict=True):
        kept = came != 0
        assert not rest[kept].any()
        np.testing.assert_array_equal(np.where(kept, came, rest), tensor)
        if tensor.size:
            count = min(tensor.size, max(1, round(coder.share * tensor.size)))
            assert np.count_nonzero(came) <= count
            ordered = np.sort(np.abs(tensor).ravel())[::-1]
            # Nothing that stays is larger than what is sent.
            assert np.abs(rest).max(initial=0) <= ordered[count - 1]
            largest_sent = np.sort(np.abs(came).ravel())[::-1][:count]
            np.testing.assert_array_equal(largest_sent, ordered[:count])


@settings(max_examples=40)
@given(UPDATE)
def test_topk_of_all_is_the_identity(update):
    for tensor, back in zip(update, there_and_back("topk:1", update), strict=True):
        np.testing.assert_array_equal(back, tensor)


def test_of_equal_entries_the_first_are_sent():
    values = np.array([1, -2, 2, 1, 2, 0], dtype=np.float32)
    assert largest(values, 2).tolist() == [1, 2]
    assert largest(values, 4).tolist() == [0, 1, 2, 4]


def test_with_a_constant_gradient_every_entry_is_sent_in_the_end_and_nothing_is_lost():
    gradient = [np.linspace(-1, 1, 40, dtype=np.float32), np.full((3, 3), 0.01, dtype=np.float32)]
    coder, rounds = make_update_codec("topk:0.1"), 400
    rest = [np.zeros_like(tensor) for tensor in gradient]
    arrived = [np.zeros(tensor.shape) for tensor in gradient]
    for _ in range(rounds):
        encoded = coder.encode([g + r for g, r in zip(gradient, rest, strict=True)])
        rest = encoded.rest
        sent = coder.decode(as_record(encoded.arrays), shapes_of(gradient))
        for total, part in zip(arrived, sent, strict=True):
            total += part
    for total, left, one in zip(arrived, rest, gradient, strict=True):
        assert ((total != 0) | (one == 0)).all()
        np.testing.assert_allclose(total + left, rounds * one.astype(np.float64), rtol=1e-5)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 2**35 - 1), max_size=20))
def test_numbers_come_back_as_leb128_writes_them(numbers):
    def by_hand(number):
        low, rest = number & 127, number >> 7
        return bytes([low | 128]) + by_hand(rest) if rest else bytes([low])

    coded = encode_numbers(np.array(numbers, dtype=np.int64))
    assert coded.tobytes() == b"".join(map(by_hand, numbers))
    assert decode_numbers(coded, len(numbers)).tolist() == numbers


@settings(max_examples=200)
@given(st.binary(max_size=40), st.integers(0, 12))
def test_foreign_bytes_are_numbers_or_a_sentence(data, count):
    coded = np.frombuffer(data, dtype=np.uint8)
    try:
        numbers = decode_numbers(coded, count)
    except ValueError as error:
        assert "gaps" in str(error)
    else:
        assert len(numbers) == count
        assert ((numbers >= 0) & (numbers < 2**35)).all()


@settings(max_examples=100)
@given(st.binary(min_size=4, max_size=9))
def test_foreign_gaps_lead_to_the_right_entries_or_to_a_sentence(data):
    shapes = [(6, 6), (4,), (0,)]
    coder = make_update_codec("topk:0.1")
    gaps = np.frombuffer(data, dtype=np.uint8)
    record = as_record({"values": np.ones(5, dtype=np.float32), "gaps": gaps})
    try:
        update = coder.decode(record, shapes)
    except ValueError:
        return
    assert [int(np.count_nonzero(tensor)) for tensor in update] == [4, 1, 0]


@every_codec
def test_what_is_not_an_update_is_refused_with_a_sentence(codec):
    rng = np.random.default_rng(1)
    update = [rng.standard_normal((4, 30)).astype(np.float32), np.ones(3, dtype=np.float32)]
    coder = make_update_codec(codec)
    good = dict(coder.encode([tensor.copy() for tensor in update]).arrays)
    first = next(iter(good))
    for name, values in good.items():
        if values.dtype == np.float32 or values.dtype == np.float16:
            with pytest.raises(ValueError, match=f"{name} is not finite"):
                coder.decode(
                    as_record({**good, name: np.full_like(values, np.nan)}), shapes_of(update)
                )
        with pytest.raises(ValueError, match=f"{name} is float64"):
            coder.decode(as_record({**good, name: values.astype(np.float64)}), shapes_of(update))
        with pytest.raises(ValueError, match=name):
            coder.decode(as_record({**good, name: values.reshape(1, -1)}), shapes_of(update))
        with pytest.raises(ValueError, match=name):
            coder.decode(as_record({**good, name: np.repeat(values, 40)}), shapes_of(update))
        with pytest.raises(ValueError, match=name):
            coder.decode(as_record({**good, name: values[:0]}), shapes_of(update))
    with pytest.raises(ValueError, match="the arrays in it"):
        coder.decode(as_record({**good, "more": good[first]}), shapes_of(update))
    with pytest.raises(ValueError, match="the arrays in it"):
        coder.decode(ArrayRecord(), shapes_of(update))
    # What says that it is large is not even read.
    record = as_record(good)
    record[first] = Array(good[first].dtype.name, (10**12,), "numpy.ndarray", b"")
    with pytest.raises(ValueError, match=first):
        coder.decode(record, shapes_of(update))


@settings(max_examples=40)
@given(UPDATE, st.sampled_from(CODECS))
def test_an_update_takes_no_more_bytes_than_the_codec_says(update, codec):
    coder = make_update_codec(codec)
    size = sum(array.nbytes for array in coder.encode([t.copy() for t in update]).arrays.values())
    most = coder.most_bytes(shapes_of(update))
    assert size <= most
    if not codec.startswith("topk"):
        assert size == most


@given(array_shapes(max_dims=3, max_side=6))
def test_a_tensor_takes_the_bytes_that_the_codecs_state(shape):
    count = math.prod(shape)
    rows = shape[0] if len(shape) > 1 else 1
    assert make_update_codec("float16").most_bytes([shape]) == 2 * count
    assert make_update_codec("int8").most_bytes([shape]) == count + 8 * rows
    kept = min(count, max(1, round(0.1 * count)))
    assert make_update_codec("topk:0.1").most_bytes([shape]) == 5 * kept + (count - kept) // 128


def test_only_parameters_in_float32_are_compressed():
    record = as_record(
        {
            "w": np.zeros((4, 5), dtype=np.float32),
            "mean": np.zeros(4, dtype=np.float32),
            "double": np.zeros(2),
            "count": np.array(3),
        }
    )
    assert compressed(record, {"w", "double"}) == ["w"]
    assert sent_bytes("float32", record, {"w"}) == 80 + 16 + 16 + 8
    assert sent_bytes("float16", record, {"w", "double"}) == 40 + 16 + 16 + 8


@pytest.mark.parametrize(
    "spec", ["", "int4", "int8:2", "float32:1", "topk", "topk:", "topk:0", "topk:1.1", "topk:nan"]
)
def test_a_codec_that_there_is_not_is_refused_before_anything_starts(spec):
    with pytest.raises(UsageError, match="update"):
        make_plan({"strategy": "fedavg", "update_codec": spec}, local=True)


# In a federation


def ran(tamper=None, **more):
    run = InProcessFederation(tamper, **{**SMALL, **more})
    run.summary = run.run()
    return run


def result(run):
    return {name: array.numpy() for name, array in run.result.arrays.items()}


def sent_up(run):
    """By client the tensor bytes of its replies to ``train``."""
    told = [
        e for e in run.events if (e.event, e.name, e.exchange) == ("bytes", "bytes_up", "train")
    ]
    return {client: [e.value for e in told if e.client == client] for client in range(3)}


@pytest.fixture(scope="module")
def plain():
    return ran()


def test_float32_is_fedavg_to_the_bit(plain):
    assert ran(update_codec="float32").summary["digest"] == plain.summary["digest"]


def test_topk_of_all_differs_from_fedavg_by_rounding_alone(plain):
    run = ran(update_codec="topk:1", rounds=1)
    once = ran(rounds=1)
    for name, values in result(once).items():
        np.testing.assert_allclose(result(run)[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


@every_codec
def test_bytes_on_the_wire_are_the_declared_ones(codec, plain):
    run = ran(update_codec=codec, rounds=1)
    assert not run.warnings()
    planned = dry_run(make_plan({**SMALL, "update_codec": codec}, local=True))
    for client, row in enumerate(planned["clients"]):
        (size,) = sent_up(run)[client]
        assert size <= row["bytes_up"]
        if codec.startswith("topk"):
            share = float(codec.partition(":")[2])
            # Gaps below 128 take a byte; the bound takes one more for each 128 entries.
            assert row["bytes_up"] - size <= (1 - share) * row["parameters"] / 128
        else:
            assert size == row["bytes_up"]
        assert row["bytes_down"] == sent_up(plain)[client][0]
    instruction = {"arrays": run.strategy.initial_arrays(), "config": run.strategy.config(1)}
    edge = edge_of(run.context(0))
    assert upload_bytes(edge, RecordDict(instruction)) == planned["clients"][0]["bytes_up"]


def test_statistics_and_counters_travel_as_they_are():
    replies = []

    def look(instruction, reply):
        if instruction.metadata.message_type == "train":
            replies.append(reply.content)
        return reply

    run = ran(look, update_codec="topk:0.1", rounds=1)
    parameters = {name for name, _ in edge_of(run.context(0)).own.named_parameters()}
    state = edge_of(run.context(0)).own.state_dict()
    for content in replies:
        assert set(content["arrays"]) == set(state) - parameters
        assert set(content["update"]) == {"values", "gaps"}
    counters = [v for name, v in result(run).items() if name.endswith("num_batches_tracked")]
    assert counters and all(counter > 0 for counter in counters)


def test_the_residual_lives_in_the_durable_state_and_is_added_to_the_next_update():
    """A client that is started anew from its state after every round gives the same run to the bit."""

    def restart(instruction, reply):
        if instruction.metadata.message_type == "train":
            run.start_anew(instruction.metadata.dst_node_id)
        return reply

    def forget(instruction, reply):
        run.context(instruction.metadata.dst_node_id - 2).state.pop("residual", None)
        return reply

    kept = ran(update_codec="topk:0.05")
    run = InProcessFederation(restart, **SMALL, update_codec="topk:0.05")
    assert run.run()["digest"] == kept.summary["digest"]
    for client in range(3):
        residual = run.context(client).state["residual"]
        assert any(array.numpy().any() for array in residual.values())
    run = InProcessFederation(forget, **SMALL, update_codec="topk:0.05")
    assert run.run()["digest"] != kept.summary["digest"]


def test_a_client_sends_of_its_updates_and_residual_what_the_formula_says():
    """G <- G + (w_k - w), send the largest of G, keep the rest: by hand, from what travels both ways."""
    seen = []

    def look(instruction, reply):
        if instruction.metadata.message_type == "train" and instruction.metadata.dst_node_id == 2:
            seen.append((instruction.content["arrays"], reply.content["update"]))
            trained.append(
                {
                    name: t.numpy().copy()
                    for name, t in edge_of(run.context(0)).own.state_dict().items()
                }
            )
        return reply

    trained = []
    run = InProcessFederation(look, **SMALL, update_codec="topk:0.1")
    run.run()
    names = [name for name, _ in edge_of(run.context(0)).own.named_parameters()]
    coder = make_update_codec("topk:0.1")
    left = {name: np.float32(0) for name in names}
    for (came, update), weights in zip(seen, trained, strict=True):
        before = {name: came[name].numpy() for name in names}
        total = {name: left[name] + (weights[name] - before[name]) for name in names}
        sent = coder.decode(update, [before[name].shape for name in names])
        for name, part in zip(names, sent, strict=True):
            count = max(1, round(0.1 * part.size))
            threshold = np.sort(np.abs(total[name]).ravel())[-count]
            wanted = np.where(np.abs(total[name]) >= threshold, total[name], 0)
            np.testing.assert_array_equal(part, wanted, err_msg=name)
            left[name] = total[name] - part
    assert len(seen) == SMALL["rounds"]


@every_codec
def test_an_update_that_is_not_finite_costs_its_round_and_no_more(codec, monkeypatch):
    trained = clients.fedavg.local_epochs

    def diverging(edge, context, slot, config):
        loss = trained(edge, context, slot, config)
        if edge.client == 1 and config["server-round"] == 1:
            with torch.no_grad():
                next(edge.own.parameters()).view(-1)[3] = math.nan
        return loss

    monkeypatch.setattr(clients.fedavg, "local_epochs", diverging)
    run = ran(update_codec=codec, rounds=2)
    (warning,) = run.warnings()
    assert "client 1 (lenet:batch) was left out" in warning
    assert "finite" in warning
    assert all(np.isfinite(values).all() for values in result(run).values())


def test_a_reply_in_another_codec_is_left_out_by_name():
    def other(instruction, reply):
        if instruction.metadata.message_type == "train" and instruction.metadata.dst_node_id == 3:
            del reply.content["update"]
        return reply

    run = ran(other, update_codec="int8", rounds=1)
    (warning,) = run.warnings()
    assert "client 1 (lenet:batch) was left out: its update is not in the codec int8" in warning


def test_compressed_runs_learn_what_the_plain_one_does():
    many = {**SMALL, "model": "logistic", "num_shards": 6, "rounds": 6, "learning_rate": 0.5}
    accuracy = {
        codec: ran(**many, eval_every=6, update_codec=codec).summary["mean_global_accuracy"]
        for codec in ("float32", "float16", "int8", "topk:0.1")
    }
    assert accuracy["float32"] > 0.8
    assert abs(accuracy["float16"] - accuracy["float32"]) < 0.01
    assert abs(accuracy["int8"] - accuracy["float32"]) < 0.03
    assert accuracy["topk:0.1"] > accuracy["float32"] - 0.1
