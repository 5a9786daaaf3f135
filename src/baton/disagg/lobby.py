"""Rooms that P has no request for: offers that came before it, and failures that whoever asks later should hear of.

Pure: no I/O, time is a parameter.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from baton.base.errors import BatonError
from baton.disagg.bootstrap import Link
from baton.disagg.wire import Offer

REMEMBERED = 4096
"""Early offers and failed rooms: at most so many of each are kept."""


@dataclass(frozen=True, slots=True)
class Early:
    """An offer whose request has not come yet."""

    link: Link
    offer: Offer
    until: float


class Lobby:
    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._early: OrderedDict[int, Early] = OrderedDict()
        self._failed: OrderedDict[int, tuple[BatonError, float]] = OrderedDict()

    def wait(self, link: Link, offer: Offer, now: float) -> bool:
        """False: there is no place for it."""
        if offer.room in self._early or len(self._early) >= REMEMBERED:
            return False
        self._early[offer.room] = Early(link, offer, now + self._patience)
        return True

    def call(self, room: int) -> Early | None:
        """The request has come: the offer that waits for it, and no word of earlier failures any more."""
        self._failed.pop(room, None)
        return self._early.pop(room, None)

    def withdraw(self, link: Link, room: int, epoch: int) -> None:
        early = self._early.get(room)
        if early is not None and early.link is link and early.offer.epoch == epoch:
            del self._early[room]

    def desert(self, link: Link) -> None:
        """The D behind this link is gone."""
        for room in [room for room, early in self._early.items() if early.link is link]:
            del self._early[room]

    def fail(self, room: int, error: BatonError, now: float) -> None:
        self._failed[room] = (error, now + self._patience)
        self._failed.move_to_end(room)
        if len(self._failed) > REMEMBERED:
            self._failed.popitem(last=False)

    def failure(self, room: int) -> BatonError | None:
        failed = self._failed.get(room)
        return None if failed is None else failed[0]

    def expire(self, now: float) -> list[Early]:
        """Forget what is too old; offers that waited in vain are returned."""
        while self._failed and next(iter(self._failed.values()))[1] < now:
            self._failed.popitem(last=False)
        late = []
        while self._early and next(iter(self._early.values())).until < now:
            late.append(self._early.popitem(last=False)[1])
        return late
