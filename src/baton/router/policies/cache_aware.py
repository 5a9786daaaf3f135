"""To where most of the prompt is cached, unless the way past the queue there is longer than computing it elsewhere."""

from __future__ import annotations

from baton.router.ask import Ask
from baton.router.policies.base import Slots, View, first_with, lightest_because
from baton.router.policies.prefix_index import PrefixIndex


class CacheAware:
    """The lowest cost: tokens in flight there, and the tokens of the prompt it would have to compute.

    Every candidate is weighed by itself: a hot worker loses its own followers to others, and nobody else's. At equal
    cost the cache decides.
    """

    __slots__ = ("_index", "_slots")

    def __init__(self, index: PrefixIndex | None = None) -> None:
        self._index = PrefixIndex() if index is None else index
        self._slots = Slots()

    def choose(self, ask: Ask, view: View, turn: int, draw: float) -> int:
        cached, gain = self._cached(ask, view, turn)
        if cached is not None and gain >= view.loads[cached]:
            return cached  # nobody can be cheaper: loads are not negative
        lowest = min(view.loads)
        if cached is not None and view.loads[cached] - gain <= lowest:
            return cached
        return first_with(lowest, view.loads, turn)

    def explain(self, ask: Ask, view: View, turn: int, draw: float) -> str:
        cached, gain = self._cached(ask, view, turn)
        if cached is None:
            return lightest_because(view, turn, "nobody has a beginning of this prompt: ")
        where = (
            f"{view.ids[cached]} has about {gain} of {ask.prompt_tokens} prompt tokens cached "
            f"and {view.loads[cached]} in flight"
        )
        if self.choose(ask, view, turn, draw) == cached:
            return where
        return lightest_because(view, turn, f"{where}, too many: ")

    def matched(self, ask: Ask, id: str) -> int:
        return self._index.holders(ask).get(id, 0)

    def sent(self, ask: Ask, id: str) -> None:
        self._index.add(ask, id)

    def forget(self, id: str) -> None:
        self._index.forget(id)

    def _cached(self, ask: Ask, view: View, turn: int) -> tuple[int | None, int]:
        """The cheapest of those that have something cached, and how many tokens; among equals, whose turn it is."""
        costs: list[tuple[int, int, int]] = []
        slots = self._slots.of(view)
        for id, tokens in self._index.holders(ask).items():
            index = slots.get(id)
            if index is not None and tokens > 0:
                costs.append((view.loads[index] - tokens, index, tokens))
        if not costs:
            return None, 0
        lowest = min(costs)[0]
        equals = [(index, tokens) for cost, index, tokens in costs if cost == lowest]
        return equals[turn % len(equals)]
