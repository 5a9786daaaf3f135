"""What a policy is, and the few things that several of them need."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.router.ask import Ask

OVERLOAD = 1.25
"""A worker may have this many times the mean load before affinity gives way."""

VIEWS = 16
"""Sets of workers known at a time."""


@dataclass(frozen=True, slots=True)
class View:
    """The candidates of one role; index i is one worker. Never empty when a policy is asked."""

    ids: tuple[str, ...]
    """Stable identities; the same object as long as the set is unchanged, so caches may key on its identity."""
    loads: list[int]
    """Tokens in flight, live."""


class Policy(Protocol):
    """How one of several workers is chosen. No clock and no dice of its own: the same state and arguments, the same
    choice. Only `sent` and `forget` change what a policy knows. One object per role."""

    def choose(self, ask: Ask, view: View, turn: int, draw: float) -> int:
        """Index into `view`. `turn` grows by one per choice, `draw` is uniform in [0, 1)."""
        ...

    def explain(self, ask: Ask, view: View, turn: int, draw: float) -> str:
        """Which one `choose` takes and why, in a sentence for people."""
        ...

    def matched(self, ask: Ask, id: str) -> int:
        """Tokens of the prompt that `id` has cached, as far as this policy knows (0 if it keeps no track)."""
        ...

    def sent(self, ask: Ask, id: str) -> None:
        """The request was sent to `id`: learn from it."""
        ...

    def forget(self, id: str) -> None:
        """That worker is gone or was restarted: its cache is empty."""
        ...


class Memoryless:
    """The half of a policy that learns nothing."""

    __slots__ = ()

    def matched(self, ask: Ask, id: str) -> int:
        return 0

    def sent(self, ask: Ask, id: str) -> None:
        pass

    def forget(self, id: str) -> None:
        pass


class Slots:
    """Where an id stands in a view: made anew only when the set of workers has changed.

    `learn` is told the ids of a set that was not known. A few sets are known at a time (one for each model served)."""

    __slots__ = ("_known", "_learn")

    def __init__(self, learn: Callable[[Iterable[str]], None] | None = None) -> None:
        self._known: OrderedDict[int, tuple[tuple[str, ...], Mapping[str, int]]] = OrderedDict()
        """By the identity of `ids`, which is held so that nothing else can take its place."""
        self._learn = learn

    def of(self, view: View) -> Mapping[str, int]:
        known = self._known.get(id(view.ids))
        if known is None:
            known = self._known[id(view.ids)] = (view.ids, {name: index for index, name in enumerate(view.ids)})
            if len(self._known) > VIEWS:
                self._known.popitem(last=False)
            if self._learn is not None:
                self._learn(view.ids)
        return known[1]

    def clear(self) -> None:
        self._known.clear()


def lightest(loads: Sequence[int], turn: int) -> int:
    """The fewest tokens in flight; among equals, whose turn it is."""
    return first_with(min(loads), loads, turn)


def first_with(load: int, loads: Sequence[int], turn: int) -> int:
    """The first that has this load, from whose turn it is on."""
    try:
        return loads.index(load, turn % len(loads))
    except ValueError:
        return loads.index(load)


def ceiling(ask: Ask, loads: Sequence[int]) -> float:
    """A worker with more tokens in flight is overloaded. At least one worker is not: whoever is not above the mean."""
    return OVERLOAD * sum(loads) / len(loads) + ask.prompt_tokens


def lightest_because(view: View, turn: int, why: str = "") -> str:
    """The explanation of `lightest`; `why` says what led to it."""
    index = lightest(view.loads, turn)
    return f"{why}{view.ids[index]} has the fewest tokens in flight ({view.loads[index]}) of {count(view)}"


def count(view: View) -> str:
    """As in "1 worker", "8 workers"."""
    return "1 worker" if len(view.ids) == 1 else f"{len(view.ids)} workers"
