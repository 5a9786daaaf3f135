"""Policies without a memory."""

from __future__ import annotations

from baton.router.ask import Ask
from baton.router.policies.base import Memoryless, View, count, lightest, lightest_because


class Random(Memoryless):
    __slots__ = ()

    def choose(self, ask: Ask, view: View, turn: int, draw: float) -> int:
        return int(draw * len(view.ids))

    def explain(self, ask: Ask, view: View, turn: int, draw: float) -> str:
        return f"{view.ids[self.choose(ask, view, turn, draw)]} was drawn from {count(view)}"


class RoundRobin(Memoryless):
    __slots__ = ()

    def choose(self, ask: Ask, view: View, turn: int, draw: float) -> int:
        return turn % len(view.ids)

    def explain(self, ask: Ask, view: View, turn: int, draw: float) -> str:
        return f"it is the turn of {view.ids[self.choose(ask, view, turn, draw)]} among {count(view)}"


class LeastLoaded(Memoryless):
    """The fewest tokens in flight."""

    __slots__ = ()

    def choose(self, ask: Ask, view: View, turn: int, draw: float) -> int:
        return lightest(view.loads, turn)

    def explain(self, ask: Ask, view: View, turn: int, draw: float) -> str:
        return lightest_because(view, turn)


class PowerOfTwo(Memoryless):
    """The less loaded of two different workers drawn at random: does not depend on the number of workers."""

    __slots__ = ()

    def choose(self, ask: Ask, view: View, turn: int, draw: float) -> int:
        first, second = self._drawn(len(view.ids), draw)
        return second if view.loads[second] < view.loads[first] else first

    def explain(self, ask: Ask, view: View, turn: int, draw: float) -> str:
        chosen = self.choose(ask, view, turn, draw)
        other = sum(self._drawn(len(view.ids), draw)) - chosen
        loads = f"{view.loads[chosen]} and {view.loads[other]} tokens in flight"
        return f"{view.ids[chosen]} and {view.ids[other]} were drawn from {count(view)}: {loads}"

    @staticmethod
    def _drawn(n: int, draw: float) -> tuple[int, int]:
        """Every ordered pair of different indices is equally likely."""
        if n == 1:
            return 0, 0
        first, second = divmod(int(draw * n * (n - 1)), n - 1)
        return first, second + (second >= first)
