"""Our own workers and SGLang's: prefill and decode get the request at the same time and meet in a fresh room."""

from __future__ import annotations

import asyncio
from random import Random

from baton.router import splice
from baton.router.legs import Leg, Legs, Pulse
from baton.router.registry import Registry
from baton.router.splice import Body
from baton.router.target import Parcel, Target, dispatch


class Native:
    def __init__(self, registry: Registry, loop: asyncio.AbstractEventLoop, random: Random) -> None:
        self._registry, self._loop, self._random = registry, loop, random

    def send(self, target: Target, parcel: Parcel, pulse: Pulse) -> Legs:
        body, prefill, decode = parcel.body, target.prefill, target.answering
        assert prefill is not None
        to_prefill, to_decode = splice.pair(body, prefill.origin.host, prefill.bootstrap_port, self._rooms(body))
        now = self._loop.time()
        answer = Leg("decode", decode, body.prompt_tokens + body.max_tokens, self._registry, now)
        receipt = Leg("prefill", prefill, target.uncached, self._registry, now)
        legs = Legs(pulse, self._loop, answer, receipt)
        answer.call.notify = legs.on_answer
        receipt.call.notify = legs.on_receipt
        dispatch(answer, parcel, to_decode)
        dispatch(receipt, parcel, to_prefill)
        return legs

    def _rooms(self, body: Body) -> list[int]:
        """Fresh for every attempt; never 0, which SGLang's workers take for "no room"."""
        return [self._random.getrandbits(63) or 1 for _ in range(body.samples or 1)]
