"""Memory that was freed stays with the process while it works, and goes back to others when it waits."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="there is no glibc here",
)
# Eight blocks of 16 MiB, written to, in the heap or mapped; then freed.
SCRIPT = """
import resource, sys, torch
from fedkit.allocator import give_back_freed
from fedkit.models.device import compute_with

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

if "keep" in sys.argv:
    compute_with(1)
before = resident()
blocks = [torch.ones(4 << 20) for _ in range(8)]
full = resident() - before
del blocks
freed = resident() - before
give_back_freed()
print(full, freed, resident() - before)
"""


def megabytes(*words: str, **environment: str) -> list[int]:
    """What the process held more than before: with the blocks, without them, after giving back."""
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return [int(word) for word in ran.stdout.split()]


def test_what_was_freed_is_kept_until_it_is_given_back():
    full, freed, left = megabytes("keep")
    assert full >= 120 and freed >= full - 20 and left <= 20


def test_glibc_alone_gives_it_back_at_once():
    full, freed, _ = megabytes()
    assert full >= 120 and freed <= 80


def test_who_has_set_the_thresholds_is_left_alone():
    full, freed, _ = megabytes("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert full >= 120 and freed <= 20
