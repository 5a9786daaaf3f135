"""One worker does everything: a regular one, or a decode worker that also prefills."""

from __future__ import annotations

import asyncio

from baton.router import splice
from baton.router.legs import Leg, Legs, Pulse
from baton.router.registry import Registry
from baton.router.target import Parcel, Target, dispatch


class Whole:
    def __init__(self, registry: Registry, loop: asyncio.AbstractEventLoop) -> None:
        self._registry, self._loop = registry, loop

    def send(self, target: Target, parcel: Parcel, pulse: Pulse) -> Legs:
        body, worker = parcel.body, target.answering
        answer = Leg(worker.role, worker, body.prompt_tokens + body.max_tokens, self._registry, self._loop.time())
        legs = Legs(pulse, self._loop, answer, None)
        answer.call.notify = legs.on_answer
        dispatch(answer, parcel, splice.single(body))
        return legs
