"""A ring of hashed points: a key belongs to the next point's worker, so who comes or goes moves 1/n of the keys."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

import xxhash

from baton.router.ask import Ask
from baton.router.policies.base import Memoryless, Slots, View, ceiling, lightest, lightest_because

POINTS = 128
"""Per worker: shares differ by about a tenth."""
PREFIX = 1024
"""Bytes of the prompt that stand for it if there is no key."""


class Ring:
    """The points of all workers it was told of, in order."""

    __slots__ = ("_members", "_owners", "_points")

    def __init__(self) -> None:
        self._members: set[str] = set()
        self._owners: dict[int, str] = {}
        self._points: list[int] = []

    def add(self, ids: Iterable[str]) -> None:
        """Those that are there already stay where they are."""
        fresh = [id for id in ids if id not in self._members]
        for id in fresh:
            self._members.add(id)
            for point in _points(id):
                if self._owners.setdefault(point, id) is id:
                    self._points.append(point)
        if fresh:
            self._points.sort()  # sorted already but for the last few: linear

    def remove(self, id: str) -> None:
        if id not in self._members:
            return
        self._members.remove(id)
        for point in _points(id):
            if self._owners.get(point) == id:
                del self._owners[point]
        self._points = [point for point in self._points if point in self._owners]

    def walk(self, key: int) -> Iterator[str]:
        """The owners of the points from `key` on, once around."""
        points, owners = self._points, self._owners
        start = bisect_left(points, key)
        for index in range(start - len(points), start):
            yield owners[points[index]]


class ConsistentHash(Memoryless):
    """By the request's key, else by the beginning of its prompt. Who is overloaded is passed over for the next one.

    So is who is not in the view: a short absence moves nobody else's keys.
    """

    __slots__ = ("_ring", "_slots")

    def __init__(self) -> None:
        self._ring = Ring()
        self._slots = Slots(self._ring.add)

    def choose(self, ask: Ask, view: View, turn: int, draw: float) -> int:
        return self._choose(ask, view, turn)[0]

    def explain(self, ask: Ask, view: View, turn: int, draw: float) -> str:
        if not (ask.key or ask.prompt):
            return lightest_because(view, turn, "neither key nor prompt: ")
        index, passed = self._choose(ask, view, turn)
        what = "the key" if ask.key else "the beginning of the prompt"
        busy = f", after {', '.join(passed)}, overloaded" if passed else ""
        return f"{view.ids[index]} is next on the ring to the hash of {what}{busy}"

    def forget(self, id: str) -> None:
        self._ring.remove(id)
        self._slots.clear()  # if it is in the view all the same, it comes back at once

    def _choose(self, ask: Ask, view: View, turn: int) -> tuple[int, list[str]]:
        """The index, and who was passed over."""
        passed: list[str] = []
        if not (ask.key or ask.prompt):
            return lightest(view.loads, turn), passed
        slots, loads, limit = self._slots.of(view), view.loads, ceiling(ask, view.loads)
        for id in self._ring.walk(_hash(ask)):
            index = slots.get(id)
            if index is None:
                continue
            if loads[index] <= limit:
                return index, passed
            if id not in passed:
                passed.append(id)
        raise AssertionError("somebody is not above the mean")


def _hash(ask: Ask) -> int:
    seed = xxhash.xxh3_64_intdigest(ask.salt) if ask.salt else 0
    return xxhash.xxh3_64_intdigest(ask.key or ask.prompt[:PREFIX], seed)


def _points(id: str) -> list[int]:
    """Numbered in the text, not by seed: of short texts xxh3 makes the same hash with neighbouring seeds, so the points
    of "w1" and "w2" would meet."""
    return [xxhash.xxh3_64_intdigest(f"{id} {replica}".encode()) for replica in range(POINTS)]
