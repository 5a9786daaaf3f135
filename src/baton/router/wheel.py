"""Timers that are nearly always cancelled: set and cancelled by a dictionary, with one timer of the loop for all.

The loop's own timers cost a heap operation and a handle each, and a request has three. These go off up to `RESOLUTION`
late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

RESOLUTION = 0.05
"""Seconds."""


def _nothing() -> None:
    pass


class Timer:
    """`cancel` is idempotent, also after it went off."""

    __slots__ = ("_slot", "callback")

    def __init__(self, slot: dict[Timer, None], callback: Callable[[], None]) -> None:
        self._slot = slot
        self.callback = callback
        slot[self] = None

    def cancel(self) -> None:
        self._slot.pop(self, None)
        self.callback = _nothing  # it would hold its owner, which holds the timer: work for the collector


class Wheel:
    """One per loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._slots: dict[int, dict[Timer, None]] = {}
        self._turned = 0
        """The latest slot that has gone off."""
        self._next: asyncio.TimerHandle | None = None

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """`when` on the loop's clock; never earlier."""
        key = max(int(when / RESOLUTION) + 1, self._turned + 1)
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = {}
            if self._next is None:
                self._turned = min(key, int(self.loop.time() / RESOLUTION)) - 1
                self._next = self.loop.call_later(RESOLUTION, self._turn)
        return Timer(slot, callback)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        return self.call_at(self.loop.time() + seconds, callback)

    def close(self) -> None:
        if self._next is not None:
            self._next.cancel()
            self._next = None
        self._slots.clear()

    def _turn(self) -> None:
        self._next = None
        now = int(self.loop.time() / RESOLUTION)
        while self._turned < now:
            self._turned += 1
            slot = self._slots.pop(self._turned, None)
            while slot:
                timer = next(iter(slot))
                callback = timer.callback
                timer.cancel()
                callback()
        if self._slots and self._next is None:
            self._next = self.loop.call_later(RESOLUTION, self._turn)
