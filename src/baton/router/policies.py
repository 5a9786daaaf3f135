"""How one of several workers is chosen: pure functions of what is known, no clock, no dice of their own.

    policy(loads, turn, draw) -> index

`loads`: tokens in flight per candidate (never empty). `turn`: a counter that grows by one per choice.
`draw`: uniform in [0, 1). A new policy is a function and a line in `POLICIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from baton.base.errors import ConfigError, unknown

Policy = Callable[[Sequence[int], int, float], int]


def random(loads: Sequence[int], turn: int, draw: float) -> int:
    return int(draw * len(loads))


def round_robin(loads: Sequence[int], turn: int, draw: float) -> int:
    return turn % len(loads)


def least_loaded(loads: Sequence[int], turn: int, draw: float) -> int:
    """The candidate with the fewest tokens in flight; among equals, whose turn it is."""
    lowest, start = min(loads), turn % len(loads)
    try:
        return loads.index(lowest, start)
    except ValueError:
        return loads.index(lowest)


POLICIES: dict[str, Policy] = {"random": random, "round_robin": round_robin, "least_loaded": least_loaded}


def policy(name: str) -> Policy:
    """Raises `ConfigError` that lists what there is."""
    try:
        return POLICIES[name]
    except KeyError:
        raise ConfigError(unknown("policy", name, POLICIES)) from None


def decode_turn(turn: int, prefills: int, decodes: int) -> int:
    """The turn of the decode side of a pair: shifted by one after every full cycle, so that equal or related numbers
    of workers do not lock step (2 x 2 uses all four pairs, not two)."""
    return turn + turn // math.lcm(prefills, decodes)
