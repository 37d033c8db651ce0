"""A real client that behaves like another device: slower, on a thinner line, now and then away.

What the algorithm asks for is emulated; joining, measuring and the reference, which cost the algorithm
nothing, are as fast as this machine can.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedkit.devices.device import Device
from fedkit.engine.events import APART_TYPES
from fedkit.errors import FedkitError

if TYPE_CHECKING:
    from flwr.app import Context, Message

_log = logging.getLogger(__name__)
App = Callable[["Message", "Context"], "Message"]


class Emulation:
    """Works as one device does, and tells the times that this device takes.

    An instruction waits until the device is there and has taken it down, is worked on with this
    machine's speed, and its answer then waits for what is missing of the device's work, until the device
    is there, and for the way up. ``timing`` of the answer tells ``seconds`` (of work) and
    ``transfer-seconds`` (both ways, and being away), as emulated.
    """

    def __init__(
        self,
        device: Device,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        """A device whose run begins now.

        Args:
            device: what it is like, and which one of its kind.
            now, sleep: a clock and its waiting; with a ``VirtualClock``'s nothing waits, and the answer
                still tells the times.
        """
        self._device, self._now, self._sleep, self._timer = device, now, sleep, timer
        self._start = now()

    def work(self, app: App, message: Message, context: Context) -> Message:
        """What ``app`` answers, as late as the device would.

        Raises:
            FedkitError: the device would not be there for a week.
        """
        from fedkit.flower import payload_bytes

        if message.metadata.message_type in APART_TYPES:
            return app(message, context)
        came = self._at()
        down = payload_bytes(message)
        self._wait_until(self._there(came) + self._device.down_seconds(down, came))
        began, real = self._at(), self._timer()
        slowdown = self._device.slowdown(began)
        # Who has a time budget must know how fast this device is.
        context.node_config["slowdown"] = slowdown
        answer = app(message, context)
        work = (self._timer() - real) * slowdown
        self._wait_until(began + work)
        done = self._at()
        up = self._device.up_seconds(payload_bytes(answer), done)
        self._wait_until(self._there(done) + up)
        timing = answer.content.config_records.get("timing") if answer.has_content() else None
        if timing is not None:
            timing["seconds"] = work
            timing["transfer-seconds"] = (began - came) + (self._at() - done)
        return answer

    def _at(self) -> float:
        return self._now() - self._start

    def _there(self, at: float) -> float:
        back = self._device.available_from(at)
        if math.isinf(back):
            raise FedkitError(
                f"The emulated device {self._device.profile.name} is not there for a week: look at window "
                "and back in its profile."
            )
        if back > at:
            _log.info("The emulated device is away for %.0f seconds.", back - at)
        return back

    def _wait_until(self, at: float) -> None:
        left = at - self._at()
        if left > 0:
            self._sleep(left)
