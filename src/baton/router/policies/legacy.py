"""The functions the router calls until it uses `build`; then this file goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton.base.errors import ConfigError, unknown
from baton.router.policies.base import lightest

Choose = Callable[[Sequence[int], int, float], int]


def random(loads: Sequence[int], turn: int, draw: float) -> int:
    return int(draw * len(loads))


def round_robin(loads: Sequence[int], turn: int, draw: float) -> int:
    return turn % len(loads)


def least_loaded(loads: Sequence[int], turn: int, draw: float) -> int:
    return lightest(loads, turn)


POLICIES: dict[str, Choose] = {"random": random, "round_robin": round_robin, "least_loaded": least_loaded}


def policy(name: str) -> Choose:
    """Raises `ConfigError` that lists what there is."""
    try:
        return POLICIES[name]
    except KeyError:
        raise ConfigError(unknown("policy", name, POLICIES)) from None
