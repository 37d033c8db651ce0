"""Emulated devices: their formula, their traces, and profiles from files."""

import itertools
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkit.devices import traces
from fedkit.devices.clock import VirtualClock
from fedkit.devices.device import Device
from fedkit.devices.profiles import KNOWN, Profile, profile, profiles
from fedkit.errors import UsageError

STEADY = Profile("steady", slowdown=4.0, up_mbit=8.0, down_mbit=16.0, latency=0.5)
TIMES = st.floats(0, 10 * 24 * 3600)


def test_without_variation_a_device_is_its_factors():
    device = Device(STEADY, seed=1, client=0)
    assert device.work_seconds(100, 5, 0.01, at=77.0) == pytest.approx(100 * 5 * 0.01 * 4)
    assert device.up_seconds(3_000_000, at=77.0) == pytest.approx(0.5 + 3.0)
    assert device.down_seconds(3_000_000, at=77.0) == pytest.approx(0.5 + 1.5)
    assert device.available(0.0) and device.available(1e6)


@given(TIMES, st.integers(0, 2**62), st.integers(0, 1000))
def test_a_varying_device_follows_the_formula(at, seed, client):
    kind = Profile(
        "p", 3.0, 10.0, 20.0, 0.1, spread=0.4, jitter=0.3, line_jitter=0.5, evening_dip=0.6
    )
    device, minute = Device(kind, seed, client), int(at // 60)
    z = traces.normal(seed, "device", client)
    z_c, z_b = (traces.normal(seed, what, client, minute) for what in ("compute", "line"))
    assert device.slowdown(at) == pytest.approx(3.0 * math.exp(0.4 * z + 0.3 * z_c))
    hour = (24 * traces.uniform(seed, "day", client) + at / 3600) % 24
    busy = (1 + math.cos(2 * math.pi * (hour - 21) / 24)) / 2
    rate = 10.0 * math.exp(0.5 * z_b) * (1 - 0.6 * busy)
    assert device.up_seconds(10**6, at) == pytest.approx(0.1 + 8 / rate, rel=1e-9)


@given(st.lists(TIMES, min_size=1, max_size=5), st.sampled_from(sorted(KNOWN)))
def test_a_trace_is_the_same_in_whatever_order_it_is_asked(times, name):
    def ask(order):
        device = Device(profile(name), seed=3, client=2)
        return {
            at: (device.slowdown(at), device.up_seconds(1000, at), device.available(at))
            for at in order
        }

    assert ask(times) == ask(times[::-1])


def test_devices_of_one_kind_differ_and_seeds_reproduce_them():
    ways = [Device(profile("phone-mid"), 1, client).slowdown(0.0) for client in range(20)]
    assert len(set(ways)) == 20
    assert ways == [Device(profile("phone-mid"), 1, client).slowdown(0.0) for client in range(20)]
    assert ways != [Device(profile("phone-mid"), 2, client).slowdown(0.0) for client in range(20)]


def test_normal_draws_are_standard_normal():
    drawn = [traces.normal(1, "compute", 0, number) for number in range(4000)]
    mean = sum(drawn) / 4000
    assert abs(mean) < 0.08
    assert abs(sum((x - mean) ** 2 for x in drawn) / 4000 - 1) < 0.12


def test_a_markov_chain_switches_as_often_as_it_says():
    drop, back = 0.1, 0.3
    states = [traces.switched_on(5, 0, 60.0 * number, drop, back) for number in range(6000)]
    pairs = list(itertools.pairwise(states))
    leaving = [after for before, after in pairs if before]
    returning = [after for before, after in pairs if not before]
    assert leaving.count(False) / len(leaving) == pytest.approx(drop, abs=0.02)
    assert returning.count(True) / len(returning) == pytest.approx(back, abs=0.04)
    assert states[0]


def chain(seed, client, number, drop, back):
    """The state is that of the last slot that decided: u < drop switches off, u >= 1 - back on."""
    for at in range(number, 0, -1):
        drawn = traces.uniform(seed, "dropout", client, at)
        if drawn < drop or drawn >= 1 - back:
            return drawn >= drop
    return True


@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=8),
    st.sampled_from([(0.1, 0.3), (0.004, 0.001), (1.0, 0.0), (0.5, 0.5), (0.01, 0.0)]),
    st.integers(0, 2**40),
)
def test_a_chain_is_its_last_deciding_slot_in_whatever_order_it_is_asked(numbers, odds, seed):
    found = [traces.switched_on(seed, 3, 60.0 * number, *odds) for number in numbers]
    assert found == [chain(seed, 3, number, *odds) for number in numbers]


def test_no_slot_of_a_chain_is_drawn_twice(monkeypatch):
    """A device that hardly ever switches is asked through a week, minute by minute."""
    drawn = []
    uniform = traces.uniform

    def counted(seed, purpose, client, slot=-1):
        if purpose == "dropout":
            drawn.append(slot)
        return uniform(seed, purpose, client, slot)

    monkeypatch.setattr(traces, "uniform", counted)
    device = Device(Profile("rare", 1.0, 1.0, 1.0, 0.0, drop=1e-9, back=1e-9), 99, 0)
    assert device.available(8 * 24 * 3600.0)
    assert all(device.available(60.0 * number) for number in range(0, 11_520, 7))
    assert drawn == list(range(1, 11_521))


def test_a_device_returns_to_the_minute():
    kind = Profile("flaky", 1.0, 1.0, 1.0, 0.0, drop=0.2, back=0.2)
    device = Device(kind, 1, 0)
    gone = next(60.0 * n + 7 for n in range(1000) if not device.available(60.0 * n + 7))
    there = device.available_from(gone)
    assert device.available(there) and there % 60 == 0
    assert not any(device.available(at) for at in range(int(gone), int(there), 60))
    assert device.available_from(there) == there


def test_one_that_never_returns_is_not_waited_for():
    device = Device(Profile("lost", 1.0, 1.0, 1.0, 0.0, drop=1.0, back=0.0), 1, 0)
    assert device.available_from(60.0) == math.inf


@pytest.mark.parametrize(
    ("hour", "window", "inside"),
    [
        (23, (22, 6), True),
        (5.9, (22, 6), True),
        (6, (22, 6), False),
        (12, (22, 6), False),
        (9, (8, 10), True),
        (10, (8, 10), False),
        (0, (0, 24), True),
        (23.9, (0, 24), True),
    ],
)
def test_a_window_may_run_over_midnight(hour, window, inside):
    assert traces.within(hour, window) is inside


def test_a_battery_window_holds_in_the_device_s_own_day():
    device = Device(Profile("night", 1.0, 1.0, 1.0, 0.0, window=(22.0, 6.0)), 4, 9)
    for at in range(0, 2 * 24 * 3600, 1800):
        hour = traces.hour(4, 9, at)
        assert device.available(at) == (hour >= 22 or hour < 6)


def test_profiles_are_found_by_name_and_cycled_as_typed():
    assert [each.name for each in profiles("pi4, laptop")] == ["pi4", "laptop"]
    assert set(KNOWN) == {"pi4", "jetson-nano", "phone-mid", "laptop"}
    for each in KNOWN.values():
        assert each.drop + each.back <= 1 and each.slowdown > 0


def test_a_profile_of_one_s_own_is_a_file(tmp_path):
    file = tmp_path / "drone.toml"
    file.write_text("slowdown = 6\nup-mbit = 2.5\ndown_mbit = 5\nlatency = 0.2\nwindow = [22, 6]\n")
    found = profile(str(file))
    assert found == Profile("drone", 6.0, 2.5, 5.0, 0.2, window=(22.0, 6.0))


WHOLE = "slowdown = 6\nup-mbit = 2\ndown-mbit = 5\nlatency = 0.2\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slowdown = ", "no TOML"),
        ("slowdown = 6\nlatency = 1", "does not say up_mbit and down_mbit"),
        (WHOLE + "speed = 3", "has no 'speed'"),
        (WHOLE.replace("6", "0"), "slowdown is 0"),
        (WHOLE.replace("6", "'fast'"), "slowdown is 'fast'"),
        (WHOLE.replace("6", "nan"), "slowdown is nan"),
        (WHOLE.replace("6", "true"), "slowdown is True"),
        (WHOLE + "drop = 0.7\nback = 0.7", "drop + back is 1.4"),
        (WHOLE + "evening_dip = 1", "evening_dip is 1"),
        (WHOLE + "window = [3]", "window is [3]"),
        (WHOLE + "window = [3, 25]", "window is [3, 25]"),
        (WHOLE + "window = [5, 5]", "always or never"),
        (WHOLE + "window = [24, 0]", "always or never"),
        (WHOLE + "name = 3", "no text"),
    ],
)
def test_what_is_no_device_is_refused_in_a_sentence(tmp_path, text, said):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as refused:
        profile(str(file))
    assert said in str(refused.value) and "mine.toml" in str(refused.value)


def test_a_window_of_all_hours_may_be_said(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(WHOLE + "window = [0, 24]\n")
    assert profile(str(file)).window == (0.0, 24.0)


def test_unknown_names_and_missing_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="did you mean pi4"):
        profile("pi5")
    with pytest.raises(UsageError, match="can't be read"):
        profile(str(tmp_path / "none.toml"))


def test_a_virtual_clock_only_goes_on():
    clock = VirtualClock()
    clock.advance(3.5)
    clock.sleep(1.5)
    assert clock() == clock.now == 5.0
    for seconds in (-1.0, math.nan):
        with pytest.raises(ValueError, match="go back"):
            clock.advance(seconds)


def test_devices_load_neither_torch_nor_numpy():
    code = "import sys, fedkit.devices.device, fedkit.devices.settings, fedkit.devices.clock; "
    code += "print(sorted({'torch', 'numpy', 'flwr'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
