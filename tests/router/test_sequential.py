"""The decode leg of an attempt that nobody wants any more: closed when its worker must have noticed it, not before."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from baton.router.call import Failure, Fault
from baton.router.health import Limits
from baton.router.legs import Leg, Pulse
from baton.router.origin import Origin
from baton.router.registry import Description, Registry, Worker
from baton.router.sequential import LINGER_SECONDS, Sequential
from baton.router.upstream import Pool
from tests.router.mocks import run, until


@dataclass
class Wire:
    """The connection of a call."""

    drops: int = 0

    def drop(self) -> None:
        self.drops += 1

    def pause(self) -> None: ...

    def resume(self) -> None: ...


@dataclass
class Attempt:
    legs: Sequential
    prefill: Leg
    decode: Leg
    said: list[bytes] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def prefilled(self) -> None:
        self.prefill.call.status = 200
        self.prefill.call.add(b"{}")
        self.prefill.call.end(None)
        self.legs.on_receipt(self.prefill.call)


def attempt() -> Attempt:
    """Both legs are charged; nothing is connected to anything. `proceed` leaves decode's request unsent, as if the
    connection were still being made."""
    loop = asyncio.get_running_loop()
    registry = Registry(Limits(), lambda worker: None)

    def worker(url: str) -> Worker:
        origin = Origin.parse(url)
        return registry.add(origin, Description(), Pool(origin, connect_timeout=1.0), 0.0)

    decode = Leg("decode", worker("http://d"), 10, registry, 0.0)
    prefill = Leg("prefill", worker("http://p"), 10, registry, 0.0)
    failed: list[str] = []
    legs = Sequential(Pulse(loop), loop, decode, prefill, failed=lambda: failed.append("failed"))
    one = Attempt(legs, prefill, decode, failed=failed)

    def proceed(said: bytes) -> None:
        one.said.append(said)
        decode.call.request = b"POST"

    legs.proceed = proceed
    decode.call.notify, prefill.call.notify = legs.on_answer, legs.on_receipt
    return one


def test_a_request_that_is_still_waiting_for_its_connection_is_sent_and_then_closed() -> None:
    async def check() -> None:
        loop = asyncio.get_running_loop()
        one, wire = attempt(), Wire()
        one.prefilled()
        assert one.said == [b"{}"]
        began = loop.time()
        one.legs.cancel()
        await asyncio.sleep(LINGER_SECONDS * 1.3)  # (what must not happen has no event to wait for)
        assert not one.decode.call.done, "it was never sent"
        assert one.decode.worker.in_flight == 1
        one.decode.call.request = b""  # now the connection stands
        one.decode.call.bind(wire)
        await until(lambda: wire.drops == 1)
        assert loop.time() - began < 2 * LINGER_SECONDS
        assert one.decode.worker.in_flight == one.decode.worker.load == 0

    run(check())


def test_the_first_byte_of_an_answer_ends_the_wait() -> None:
    async def check() -> None:
        one, wire = attempt(), Wire()
        one.prefilled()
        one.decode.call.request = b""
        one.decode.call.bind(wire)
        one.legs.cancel()
        one.legs.cancel()
        call = one.decode.call
        call.status = 200
        call.notify(call)
        assert wire.drops == 0, "a head is sent before the request has reached the engine"
        call.add(b"data: ")
        call.notify(call)
        assert wire.drops == 1
        assert one.decode.worker.in_flight == 0

    run(check())


def test_a_leg_that_has_waited_long_enough_is_closed_at_once() -> None:
    async def check() -> None:
        one, wire = attempt(), Wire()
        one.prefilled()
        one.decode.call.request = b""
        one.decode.call.bind(wire)
        await asyncio.sleep(LINGER_SECONDS * 1.05)
        one.legs.cancel()
        assert wire.drops == 1

    run(check())


def test_before_prefill_has_answered_both_are_closed_at_once() -> None:
    async def check() -> None:
        one, wire = attempt(), Wire()
        one.prefill.call.bind(wire)
        one.legs.cancel()
        assert wire.drops == 1
        assert one.said == []
        assert one.decode.worker.in_flight == one.prefill.worker.in_flight == 0
        one.legs.on_receipt(one.prefill.call)
        assert one.said == [], "decode is not asked for an attempt that is over"

    run(check())


def test_only_prefill_is_late_before_decode_is_asked() -> None:
    async def check() -> None:
        one = attempt()
        one.legs.give_up(Failure(Fault.LATE, "late"))
        assert one.legs.lost is one.prefill
        assert one.decode.fault is Fault.CANCELLED
        assert one.failed == ["failed"]
        other = attempt()
        other.prefilled()
        other.legs.give_up(Failure(Fault.LATE, "late"))
        assert other.legs.lost is other.decode
        assert other.prefill.fault is None

    run(check())


def test_a_prefill_that_cannot_even_be_asked() -> None:
    async def check() -> None:
        one = attempt()
        one.legs.refuse(Failure(Fault.REFUSED, "nobody there"))
        one.legs.refuse(Failure(Fault.REFUSED, "once more"))
        assert one.legs.lost is one.prefill
        assert (one.said, one.failed) == ([], ["failed"])
        assert one.prefill.worker.errors == {"refused": 1}

    run(check())
