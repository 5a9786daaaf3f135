"""Requests with one key stay with one worker, the one that had the least to do when the key was first seen."""

from __future__ import annotations

from collections import OrderedDict

from baton.router.ask import Ask
from baton.router.policies.base import Memoryless, Slots, View, lightest, lightest_because


class Sticky(Memoryless):
    """A key whose worker is not in the view moves to another and stays there. No key: the least loaded.

    `keys`: how many are remembered, the latest. `idle`: a key is forgotten when that many other requests with keys came
    after its last one.
    """

    __slots__ = ("_assigned", "_idle", "_keys", "_seen", "_slots")

    def __init__(self, keys: int = 1 << 16, idle: int = 1 << 20) -> None:
        self._keys, self._idle = keys, idle
        self._seen = 0
        """Requests with keys, so far."""
        self._assigned: OrderedDict[bytes, tuple[str, int]] = OrderedDict()
        """Key to its worker and the value of `_seen` at its last request; the longest unused first."""
        self._slots = Slots()

    def __len__(self) -> int:
        return len(self._assigned)

    def choose(self, ask: Ask, view: View, turn: int, draw: float) -> int:
        assigned = self._assigned.get(ask.key)
        if assigned is not None:
            index = self._slots.of(view).get(assigned[0])
            if index is not None:
                return index
        return lightest(view.loads, turn)

    def explain(self, ask: Ask, view: View, turn: int, draw: float) -> str:
        if not ask.key:
            return lightest_because(view, turn, "no key: ")
        assigned = self._assigned.get(ask.key)
        if assigned is None:
            return lightest_because(view, turn, "a new key: ")
        if assigned[0] in self._slots.of(view):
            return f"{assigned[0]} had the earlier requests with this key"
        return lightest_because(view, turn, f"{assigned[0]} had this key and cannot be used now: ")

    def sent(self, ask: Ask, id: str) -> None:
        if not ask.key:
            return
        self._seen += 1
        assigned = self._assigned
        assigned[ask.key] = (id, self._seen)
        assigned.move_to_end(ask.key)
        if len(assigned) > self._keys:
            assigned.popitem(last=False)
        while self._seen - next(iter(assigned.values()))[1] > self._idle:
            assigned.popitem(last=False)

    def forget(self, id: str) -> None:
        for key in [key for key, (worker, _) in self._assigned.items() if worker == id]:
            del self._assigned[key]
