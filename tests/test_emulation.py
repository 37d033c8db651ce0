"""A client that behaves like another device: what it takes and tells, on a clock that need not wait."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from inprocess import InProcessFederation

from fedkit.devices.clock import VirtualClock
from fedkit.devices.device import Device
from fedkit.devices.emulation import Emulation
from fedkit.devices.profiles import KNOWN, Profile, profile
from fedkit.engine.plan import make_plan
from fedkit.errors import FedkitError, UsageError
from fedkit.flower import new_context, take_identity

PLAIN = Profile("plain", slowdown=10.0, up_mbit=8.0, down_mbit=80.0, latency=0.5)
MILLION = 250_000  # of float32


def instruction(kind="train", floats=MILLION):
    import numpy as np

    take_identity()
    arrays = ArrayRecord({"w": Array(np.zeros(floats, dtype=np.float32))})
    return Message(RecordDict({"arrays": arrays}), 2, kind, group_id="1")


def busy(seconds):
    """An app that works so long, and sends back what it got."""

    def app(message, context):
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            continue
        timing = ConfigRecord({"seconds": seconds, "cpu-seconds": 1.0})
        content = RecordDict({"arrays": message.content["arrays"], "timing": timing})
        return Message(content, reply_to=message)

    return app


def emulated(profile, clock=None, seed=1, client=0):
    clock = clock or VirtualClock()
    return Emulation(Device(profile, seed, client), now=clock, sleep=clock.sleep), clock


def here():
    return new_context(2, {})


def told(answer):
    timing = answer.content.config_records["timing"]
    return timing["seconds"], timing["transfer-seconds"]


def test_times_are_the_profiles_formula_and_nothing_waits():
    emulation, clock = emulated(PLAIN)
    started = time.perf_counter()
    answer = emulation.work(busy(0.05), instruction(), here())
    real = time.perf_counter() - started
    work, transfer = told(answer)
    # A megabyte: 0.1 s down and 1 s up, and half a second each way.
    assert transfer == pytest.approx(0.5 + 0.1 + 0.5 + 1.0)
    assert 0.5 <= work <= 10 * real and real < 0.5
    assert clock() == pytest.approx(work + transfer)


def test_a_real_clock_sleeps_for_what_is_missing():
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        time.sleep(seconds)

    fast = replace(PLAIN, slowdown=3.0, latency=0.01, up_mbit=800.0, down_mbit=800.0)
    emulation = Emulation(Device(fast, 1, 0), sleep=sleep)
    started = time.perf_counter()
    answer = emulation.work(busy(0.1), instruction(), here())
    passed = time.perf_counter() - started
    work, transfer = told(answer)
    # Down, what is missing of the work, and up; never less in all than it tells.
    assert len(slept) == 3 and passed >= work + transfer - 0.01
    assert work >= 0.3


def test_what_costs_the_algorithm_nothing_is_not_slowed():
    emulation, clock = emulated(PLAIN)
    for kind in ("query.join", "evaluate", "train.alone"):
        answer = emulation.work(busy(0.0), instruction(kind), here())
        assert "transfer-seconds" not in answer.content.config_records["timing"]
    assert clock() == 0


def test_a_device_that_is_away_answers_when_it_is_back():
    away = replace(PLAIN, drop=0.5, back=0.05)
    device = Device(away, 4, 0)
    clock = VirtualClock()
    emulation, _ = emulated(away, clock, seed=4)
    gone = next(minute * 60.0 for minute in range(1000) if not device.available(minute * 60.0))
    clock.advance(gone)
    answer = emulation.work(busy(0.0), instruction(), here())
    back = device.available_from(gone)
    assert back > gone and clock() > back
    assert told(answer)[1] >= back - gone


def test_a_battery_window_is_waited_for():
    night = replace(PLAIN, window=(22.0, 6.0))
    emulation, clock = emulated(night, seed=2)
    device = Device(night, 2, 0)
    assert device.available_from(0.0) > 0  # its day begins outside
    emulation.work(busy(0.0), instruction(), here())
    assert device.available(clock()) and clock() >= device.available_from(0.0)


def test_a_device_that_is_never_there_is_told_so():
    never = replace(PLAIN, drop=1.0, back=0.0)
    clock = VirtualClock()
    emulation, _ = emulated(never, clock)
    clock.advance(3600)
    assert math.isinf(Device(never, 1, 0).available_from(3600))
    with pytest.raises(FedkitError, match="not there for a week"):
        emulation.work(busy(0.0), instruction(), here())


def test_the_same_seed_is_the_same_device_and_another_is_another():
    phone = KNOWN["phone-mid"]
    transfers = [
        told(
            emulated(phone, seed=seed, client=client)[0].work(
                busy(0), instruction(), new_context(2, {})
            )
        )[1]
        for seed, client in ((1, 0), (1, 0), (1, 1), (2, 0))
    ]
    assert transfers[0] == pytest.approx(transfers[1])
    assert len({round(seconds, 6) for seconds in transfers}) == 3


def test_the_server_is_told_the_emulated_times():
    """A federation of a phone and two laptops, without waiting for either."""
    run = InProcessFederation(
        strategy="fedavg", model="lenet", clients=3, rounds=1, num_shards=40, partition="iid",
        local_epochs=2, select="drop:0.1", alone=False, eval_samples=10,
    )  # fmt: skip
    kinds = [replace(PLAIN, slowdown=100.0), replace(PLAIN, slowdown=1.0), PLAIN]
    for client, kind in enumerate(kinds):
        app, context = run.grid.apps[client + 2]
        emulation, _ = emulated(kind, client=client)
        run.grid.apps[client + 2] = (
            lambda message, context, app=app, emulation=emulation: emulation.work(
                app, message, context
            ),
            context,
        )
    summary = run.run()
    seen = run.driver._known.seen.before(2)
    assert seen[0].probe_seconds > seen[2].probe_seconds
    # A finish carries nothing down but the latency, and the model up at 8 Mbit/s.
    size = seen[1].bytes_up[0]
    assert seen[1].transfer_seconds[0] == pytest.approx(2 * 0.5 + 8 * size / 8e6)
    assert summary["history"][0]["seconds_slowest_client"] > seen[0].probe_seconds[0]
    assert run.driver._known.seen.latency(1) > seen[0].seconds[0]


class Counted:
    """A timer of what was done: so long for each of the instructions worked on."""

    def __init__(self):
        self.done = 0.0

    def __call__(self):
        return self.done

    def app(self, app, seconds):
        def counted(message, context):
            answer = app(message, context)
            self.done += seconds
            return answer

        return counted


def emulated_run(seed, select, **settings):
    """Three emulated clients on virtual clocks, whose work is counted and not measured."""
    run = InProcessFederation(
        strategy="fedavg", model="logistic", clients=4, rounds=5, num_shards=40, partition="iid",
        val_fraction=0.3, alone=False, eval_samples=10, seed=seed, select=select, **settings,
    )  # fmt: skip
    for client in range(4):
        app, context = run.grid.apps[client + 2]
        timer, clock = Counted(), VirtualClock()
        device = Device(KNOWN["phone-mid"], seed, client)
        emulation = Emulation(device, now=clock, sleep=clock.sleep, timer=timer)
        worked = timer.app(app, 0.5 * (client + 1))
        run.grid.apps[client + 2] = (
            lambda message, context, app=worked, emulation=emulation: emulation.work(
                app, message, context
            ),
            context,
        )
    run.run()
    return run


@pytest.mark.parametrize("select", ["fedmarl:default,learn", "oort:2", "deadline:12", "drop:0.5"])
def test_where_clocks_are_virtual_a_seed_reproduces_who_takes_part_and_all_times(select):
    def told(run):
        kept = [(e.round, e.value) for e in run.events if e.event in ("round_start", "kept")]
        seen = run.driver._known.seen.before(6)
        return kept, {client: repr(seen[client]) for client in seen}, run.history.digest()

    first, again, other = (told(emulated_run(seed, select)) for seed in (1, 1, 2))
    assert first == again
    assert first[1] != other[1] and first[2] != other[2]


def test_profiles_are_checked_before_anything_starts(tmp_path):
    with pytest.raises(UsageError, match="pi4"):
        make_plan({"emulate": "pi5"}, local=True)
    own = tmp_path / "mine.toml"
    own.write_text("slowdown = 3\nup-mbit = 1\ndown-mbit = 2\nlatency = 0.1\n")
    assert profile(str(own)).slowdown == 3
    assert make_plan({"emulate": f"laptop,{own}"}, local=True).local.emulate


def test_who_works_on_an_instruction_can_tell_how_slow_the_device_is():
    emulation, _ = emulated(PLAIN)
    seen = []

    def app(message, context):
        seen.append(context.node_config["slowdown"])
        return busy(0.0)(message, context)

    emulation.work(app, instruction(), here())
    assert seen == [PLAIN.slowdown]
