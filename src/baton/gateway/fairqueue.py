"""Who is next among those who wait: priorities first, weighted fair sharing between keys inside one priority.

A level per priority; inside it a flow per key, served by start-time fair queueing: a flow's next claim has a virtual
start, which moves on by tokens / weight with every claim served; the smallest is next. A key that comes new starts at
the level's virtual time, so it waits for nobody's backlog. Inside a flow: first come, first served.

Ageing: a level that got nothing for `ageing` seconds has the next turn, the longest waiting first, but never two such
turns in a row. So every level is served, however high the others are, and the highest keeps every second turn.

No clock in here. Costs: O(log keys) to push and serve, O(1) to remove, O(levels) to choose.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from typing import Any, Generic, Protocol, TypeVar


class Waiter(Protocol):
    """What the queue asks of its items. They must be hashable, and must not change while they wait."""

    @property
    def key(self) -> str: ...
    @property
    def weight(self) -> float:
        """Share of the key relative to the others', > 0."""
        ...

    @property
    def priority(self) -> int:
        """Higher goes first."""
        ...

    @property
    def tokens(self) -> int:
        """What it costs, at least 1."""
        ...


W = TypeVar("W", bound=Waiter)


class _Flow(Generic[W]):
    """One key's claims of one priority."""

    __slots__ = ("queued", "start", "tokens", "waiting", "weight")

    def __init__(self) -> None:
        self.waiting: OrderedDict[W, None] = OrderedDict()
        self.tokens = 0
        """Of those waiting."""
        self.weight = 1.0
        self.start = 0.0
        """Virtual start of its next claim."""
        self.queued = False
        """It stands in its level's heap."""


class _Level(Generic[W]):
    """The claims of one priority. Exists only while somebody waits in it."""

    __slots__ = ("_flows", "_heap", "_order", "_sweep_at", "since", "tokens", "virtual", "waiting", "weight")

    def __init__(self, now: float) -> None:
        self.since = now
        """When it was served last, or began to wait."""
        self.virtual = 0.0
        self.waiting = 0
        self.tokens = 0
        self.weight = 0.0
        """Sum over the flows that wait."""
        self._flows: dict[str, _Flow[W]] = {}
        self._heap: list[tuple[float, int, _Flow[W]]] = []
        """(start, order of coming, flow); flows that no longer wait are dropped when they come up."""
        self._order = itertools.count()
        self._sweep_at = 16

    def push(self, item: W) -> None:
        flow = self._flows.get(item.key)
        if flow is None:
            if len(self._flows) >= self._sweep_at:
                self._sweep()
            flow = self._flows[item.key] = _Flow()
        if not flow.waiting:
            flow.weight = item.weight
            self.weight += flow.weight
            if not flow.queued:
                self._queue(flow)
        flow.waiting[item] = None
        flow.tokens += item.tokens
        self.tokens += item.tokens
        self.waiting += 1

    def remove(self, item: W) -> None:
        flow = self._flows[item.key]
        del flow.waiting[item]
        flow.tokens -= item.tokens
        self.tokens -= item.tokens
        self.waiting -= 1
        if not flow.waiting:
            self.weight -= flow.weight

    def head(self) -> W:
        """Virtual time moves on to it, so that nobody who comes later overtakes it while it waits for room."""
        while not self._heap[0][2].waiting:
            heapq.heappop(self._heap)[2].queued = False
        self.virtual, _, flow = self._heap[0]
        return next(iter(flow.waiting))

    def serve(self, item: W, now: float) -> None:
        """`item` is the head and leaves."""
        self.since = now
        flow = heapq.heappop(self._heap)[2]
        flow.queued = False
        self.remove(item)
        flow.start += item.tokens / flow.weight
        if flow.waiting:
            self._queue(flow)

    def before(self, item: W) -> float:
        """Tokens of this level that go first, with `item`'s own: at most as much for each other key as for its key."""
        flow = self._flows[item.key]
        return min(float(self.tokens), flow.tokens * self.weight / flow.weight)

    def last(self, favoured: W) -> W:
        """The newest of the key with the most claims for its weight; of `favoured`'s key if that is one of them."""
        own = self._flows.get(favoured.key)
        flow = max(self._flows.values(), key=lambda flow: (len(flow.waiting) / flow.weight, flow is own))
        return next(reversed(flow.waiting))

    def _queue(self, flow: _Flow[W]) -> None:
        flow.start = max(flow.start, self.virtual)
        flow.queued = True
        heapq.heappush(self._heap, (flow.start, next(self._order), flow))

    def _sweep(self) -> None:
        """Forget keys that wait for nothing and were not served more than others."""
        self._flows = {k: flow for k, flow in self._flows.items() if flow.waiting or flow.start > self.virtual}
        self._sweep_at = 2 * len(self._flows) + 16


class FairQueue(Generic[W]):
    """Those who wait, in the order in which they are to be served."""

    __slots__ = ("_aged_last", "_ageing", "_levels", "waiting")

    def __init__(self, ageing: float = math.inf) -> None:
        """`ageing`: seconds without a turn after which a lower priority has one."""
        self._ageing = ageing
        self._aged_last = False
        """The last turn was such a one."""
        self._levels: dict[int, _Level[W]] = {}
        self.waiting = 0
        """How many."""

    def push(self, item: W, now: float) -> None:
        level = self._levels.get(item.priority)
        if level is None:
            level = self._levels[item.priority] = _Level(now)
        level.push(item)
        self.waiting += 1

    def remove(self, item: W) -> None:
        """`item` waits no longer. Raises `KeyError` if it did not wait."""
        level = self._levels[item.priority]
        level.remove(item)
        self._left(item.priority, level)

    def head(self, now: float) -> W | None:
        """Who is next; the same one until it is served or removed, or a higher priority comes or a lower one is of
        age."""
        if not self.waiting:
            return None
        levels = self._levels
        level = levels[max(levels)]
        if len(levels) > 1 and not self._aged_last:
            oldest = min(levels.values(), key=_since)
            if now - oldest.since >= self._ageing:
                level = oldest
        return level.head()

    def serve(self, item: W, now: float) -> None:
        """`item`, which is the head, leaves."""
        self._aged_last = item.priority != max(self._levels)
        level = self._levels[item.priority]
        level.serve(item, now)
        self._left(item.priority, level)

    def before(self, item: W) -> float:
        """Tokens that are served until `item` is, its own included: an estimate from above, as long as nobody of a
        higher priority comes."""
        higher = sum(level.tokens for priority, level in self._levels.items() if priority > item.priority)
        return higher + self._levels[item.priority].before(item)

    def victim(self, item: W) -> W:
        """Who has to go if the queue is too long with `item` in it: the newest of the key with the most claims for its
        weight, in the lowest priority. That may be `item`."""
        return self._levels[min(self._levels)].last(item)

    def _left(self, priority: int, level: _Level[W]) -> None:
        self.waiting -= 1
        if not level.waiting:
            del self._levels[priority]


def _since(level: _Level[Any]) -> float:
    return level.since
