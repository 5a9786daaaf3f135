"""Workers by length of the prompt: the short ones do not wait behind the long ones."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from itertools import accumulate

from baton.router.ask import Ask
from baton.router.policies.base import Memoryless, View, ceiling, count, lightest, lightest_because

WINDOW = 2048
"""Requests the boundaries are made from."""
PERIOD = 256
"""Requests until they are made anew."""


class Bucket(Memoryless):
    """The first worker of the view gets the shortest prompts, the last one the longest. Boundaries lie so that each
    would have had the same number of prompt tokens lately; before that is known, and if the chosen one is overloaded,
    it is the least loaded. A length at which buckets meet belongs to all of them, and load decides."""

    __slots__ = ("_boundaries", "_lengths", "_unused")

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=WINDOW)
        self._unused = 0
        """Lengths learned since the boundaries were made."""
        self._boundaries: dict[int, list[int]] = {}
        """By number of buckets."""

    def choose(self, ask: Ask, view: View, turn: int, draw: float) -> int:
        first, last = self._range(ask, len(view.ids))
        if last - first == len(view.ids) - 1:
            return lightest(view.loads, turn)
        index = first if first == last else first + lightest(view.loads[first : last + 1], turn)
        return index if view.loads[index] <= ceiling(ask, view.loads) else lightest(view.loads, turn)

    def explain(self, ask: Ask, view: View, turn: int, draw: float) -> str:
        first, last = self._range(ask, len(view.ids))
        chosen = self.choose(ask, view, turn, draw)
        bucket = f"buckets {first + 1} to {last + 1}" if first < last else f"bucket {first + 1}"
        where = f"prompts of about {ask.prompt_tokens} tokens belong to {bucket} of {count(view)}"
        if first <= chosen <= last:
            return f"{where}: {view.ids[chosen]}"
        return lightest_because(view, turn, f"{where}, which is overloaded: ")

    def sent(self, ask: Ask, id: str) -> None:
        self._lengths.append(ask.prompt_tokens)
        self._unused += 1
        if self._unused >= PERIOD:
            self._boundaries.clear()
            self._unused = 0

    def _range(self, ask: Ask, buckets: int) -> tuple[int, int]:
        """First and last bucket for this length."""
        if len(self._lengths) < PERIOD:
            return 0, buckets - 1
        boundaries = self._boundaries.get(buckets)
        if boundaries is None:
            boundaries = self._boundaries[buckets] = self._made(buckets)
        return bisect_left(boundaries, ask.prompt_tokens), bisect_right(boundaries, ask.prompt_tokens)

    def _made(self, buckets: int) -> list[int]:
        """`buckets - 1` lengths, ascending: where one bucket ends and the next begins."""
        lengths = sorted(self._lengths)
        sums = list(accumulate(lengths))
        return [lengths[bisect_left(sums, sums[-1] * bucket / buckets)] for bucket in range(1, buckets)]
