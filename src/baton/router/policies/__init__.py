"""How one of several workers is chosen: pure objects, fed with what is known and with turns and draws made elsewhere.

    policy = build("cache_aware")                 # one per role: each learns from what its role was sent
    index = policy.choose(ask, view, turn, draw)
    policy.sent(ask, view.ids[index])

A new policy is a class and a line in `BUILDERS`.
"""

from __future__ import annotations

from collections.abc import Callable

from baton.base.errors import ConfigError, unknown
from baton.router.ask import Ask
from baton.router.policies.base import Policy, View
from baton.router.policies.bucket import Bucket
from baton.router.policies.cache_aware import CacheAware
from baton.router.policies.consistent_hash import ConsistentHash
from baton.router.policies.pairs import decode_turn
from baton.router.policies.simple import LeastLoaded, PowerOfTwo, Random, RoundRobin
from baton.router.policies.sticky import Sticky

__all__ = [
    "BUILDERS",
    "Ask",
    "Policy",
    "View",
    "build",
    "decode_turn",
]

BUILDERS: dict[str, Callable[[], Policy]] = {
    "random": Random,
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "power_of_two": PowerOfTwo,
    "cache_aware": CacheAware,
    "consistent_hash": ConsistentHash,
    "sticky": Sticky,
    "bucket": Bucket,
}


def build(name: str) -> Policy:
    """A policy that has seen nothing yet. Raises `ConfigError` that lists what there is."""
    try:
        builder = BUILDERS[name]
    except KeyError:
        raise ConfigError(unknown("policy", name, BUILDERS)) from None
    return builder()
