"""D short of pages: nobody gives up on a queue, everybody hears of an end, and P and D never wait for each other."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.base.clock import ManualClock
from baton.base.messages import Abort, Generate
from baton.transports.base import Transport
from baton.transports.loopback import LoopbackTransport, Network
from baton.transports.region import Region
from tests.disagg.pair import Pair, undivided, worker
from tests.disagg.test_equal import prompt

MakePair = Callable[..., Pair]


class Short:
    """A pair on a clock that stands still, whose D has no pages until `relieve`; P has computed the prompt."""

    def __init__(self, make_pair: MakePair, **options: object) -> None:
        self.clock = ManualClock(1000.0)
        self.pair = make_pair(clock=self.clock, chunk=8, **options)
        pool = self.pair.decode.pool
        self._taken = pool.take(pool.free)

    def relieve(self) -> None:
        self.pair.decode.pool.give_back(self._taken)

    def queue(self, id: str = "r", room: int = 1, *, deadline: float | None = None) -> Generate:
        """To both; until P knows that D queues."""
        request = msgspec.structs.replace(self.pair.request(id, prompt(40, room), room), deadline=deadline)
        self.pair.prefill.send(request)
        self.pair.decode.send(request)
        self.pair.pump(lambda: self.known(id))
        return request

    def known(self, id: str) -> bool:
        outgoing = self.pair.prefill.role._by_id[id]  # type: ignore[attr-defined]
        return outgoing.first is not None and outgoing.handoff.state.value == "queued"

    def pass_time(self, seconds: float) -> None:
        """D says in good time that it is still there, and P hears it."""
        for _ in range(int(seconds / 5)):
            self.clock.advance(5)
            self.pair.pump(lambda: self._heard_since(self.clock.now() - 7.5))

    def _heard_since(self, time: float) -> bool:
        rooms = self.pair.prefill.role._rooms  # type: ignore[attr-defined]
        return all(outgoing.handoff.seen > time for outgoing in rooms.values())


def test_nobody_gives_up_on_a_queue(make_pair: MakePair, transport: str) -> None:
    short = Short(make_pair, transport=transport)
    request = short.queue()
    short.pass_time(300)  # ten times both time-outs
    assert not short.pair.prefill.heard
    assert not short.pair.decode.heard
    short.relieve()
    short.pair.finish("r")
    assert short.pair.decode.answer("r") == undivided([request])["r"]
    short.pair.settle()


def test_patience_begins_with_the_offer(make_pair: MakePair) -> None:
    """A P that never had the request is found out after the queueing, in `meet_timeout`."""
    short = Short(make_pair)
    short.pair.decode.send(short.pair.request("r", prompt(40), 1))
    short.pair.pump(lambda: short.pair.decode.role._by_id["r"].told > 0)  # type: ignore[attr-defined]
    for _ in range(20):
        short.clock.advance(20)
        short.pair.decode.turn()
    assert not short.pair.decode.heard
    short.relieve()
    short.pair.pump(lambda: short.pair.decode.pool.free < short.pair.decode.pool.total, short.pair.decode)
    short.clock.advance(29)
    short.pair.decode.turn()
    assert not short.pair.decode.heard
    short.clock.advance(2)
    short.pair.pump(lambda: short.pair.decode.ended("r"))
    assert "never had a request for room 1" in short.pair.decode.failure("r").message
    short.pair.settle()


def test_the_requests_own_deadline_ends_the_queueing(make_pair: MakePair) -> None:
    short = Short(make_pair)
    short.queue(deadline=1100.0)
    short.pass_time(95)
    assert not short.pair.decode.heard
    short.clock.advance(6)
    short.pair.pump(lambda: short.pair.decode.ended("r") and short.pair.prefill.ended("r"))
    assert short.pair.decode.failure("r").status == 504
    short.relieve()
    short.pair.settle()


def test_a_d_that_dies_while_it_queues(make_pair: MakePair, transport: str) -> None:
    short = Short(make_pair, transport=transport)
    short.queue()
    short.pair.decode.engine.close()
    short.pair.pump(lambda: short.pair.prefill.ended("r"), short.pair.prefill, limit=2.0)
    assert "decode worker is gone" in short.pair.prefill.failure("r").message
    short.pair.pump(short.pair.prefill.idle_and_whole, short.pair.prefill)


def test_a_d_that_hangs_while_it_queues(make_pair: MakePair) -> None:
    short = Short(make_pair)
    short.queue()
    short.clock.advance(31)
    short.pair.pump(lambda: short.pair.prefill.ended("r"), short.pair.prefill)
    assert short.pair.prefill.failure("r").status == 504
    assert "that waited for pages" in short.pair.prefill.failure("r").message
    short.pair.pump(short.pair.prefill.idle_and_whole, short.pair.prefill)
    short.pair.pump(lambda: short.pair.decode.ended("r"))  # it wakes, and hears of it
    assert short.pair.decode.failure("r").status == 504
    short.relieve()


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_an_abort_while_d_queues_ends_both_at_once(make_pair: MakePair, side: str) -> None:
    short = Short(make_pair)
    short.queue()
    getattr(short.pair, side).send(Abort("r"))
    short.pair.pump(lambda: short.pair.prefill.ended("r") and short.pair.decode.ended("r"), limit=2.0)
    other = short.pair.decode if side == "prefill" else short.pair.prefill
    assert other.failure("r").code == "handoff_lost"
    short.relieve()
    short.pair.settle()
    short.pair.ask("s", prompt(40), 1)  # the same room again: nothing of the old attempt disturbs it
    short.pair.finish("s")
    assert len(short.pair.decode.answer("s")) == 6
    short.pair.settle()


def test_a_failure_before_d_says_that_it_queues(make_pair: MakePair) -> None:
    short = Short(make_pair)
    request = short.pair.request("r", prompt(40), 1)
    short.pair.prefill.send(request)
    short.pair.prefill.send(Abort("r"))
    short.pair.decode.send(request)
    short.pair.pump(lambda: short.pair.decode.ended("r"), limit=2.0)
    assert "cancelled" in short.pair.decode.failure("r").message
    short.relieve()
    short.pair.settle()


def test_p_dies_while_d_queues(make_pair: MakePair, transport: str) -> None:
    short = Short(make_pair, transport=transport)
    short.queue()
    short.pair.prefill.engine.close()
    short.pair.pump(lambda: short.pair.decode.ended("r"), short.pair.decode, limit=2.0)
    assert short.pair.decode.failure("r").code == "handoff_lost"
    short.relieve()
    short.pair.pump(short.pair.decode.idle_and_whole, short.pair.decode)


@pytest.mark.parametrize("queues", [True, False])
def test_a_room_belongs_to_the_first_d(make_pair: MakePair, queues: bool) -> None:
    """Another D that comes to the room is sent away, whether it queues or offers."""
    short = Short(make_pair, transport="tcp")
    request = short.queue()
    other = Short(make_pair, transport="tcp")
    if not queues:
        other.relieve()
    stranger = msgspec.structs.replace(request, id="s")
    other.pair.decode.send(stranger)
    short.pair.pump(lambda: other.pair.decode.ended("s"), other.pair.decode, short.pair.prefill)
    assert "taken by another decode worker" in other.pair.decode.failure("s").message
    short.relieve()
    short.pair.finish("r")
    short.pair.settle()
    if queues:
        other.relieve()
    other.pair.pump(other.pair.decode.idle_and_whole, other.pair.decode, short.pair.prefill)


def test_what_waits_for_pages_is_waiting(make_pair: MakePair) -> None:
    """In `Load`, and so in /v1/loads and the metrics; not as a hand-off before it is one."""
    short = Short(make_pair, max_waiting=2)
    engine = short.pair.decode.engine

    def now() -> tuple[int, int, int, int]:
        load = engine.load()
        return load.waiting, load.waiting_tokens, load.handoffs_waiting, load.handoffs

    for room in (1, 2):
        short.pair.decode.send(short.pair.request(f"r{room}", prompt(40, room), room))
    assert now() == (2, 80, 2, 0)
    whole = short.pair.request("whole", prompt(20), 0, ticket=False)
    short.pair.decode.send(whole)
    assert now() == (3, 100, 2, 0)
    short.pair.decode.send(short.pair.request("one too many", prompt(40, 3), 3))
    assert short.pair.decode.failure("one too many").status == 503
    short.pair.decode.send(Abort("r2"))
    assert now() == (2, 60, 1, 0)
    short.relieve()
    short.pair.pump(lambda: now() == (0, 0, 0, 1), short.pair.decode)
    short.pair.decode.send(Abort("r1"))
    short.pair.settle()


# --- P full and D full --------------------------------------------------------------------------------------------


def test_p_and_d_full_of_each_others_prompts(make_pair: MakePair) -> None:
    """P holds two prompts that D has no pages for; D's pages wait for one that P has no pages for."""
    pair = make_pair(pages=12, chunk=8, clock=ManualClock(1000.0), prefill={"pages": 22})
    first, second, third = (pair.request(f"r{i}", prompt(40, i), i) for i in range(3))
    pair.prefill.send(first)
    pair.prefill.send(second)
    pair.pump(lambda: pair.prefill.pool.free == 2, pair.prefill)
    pair.decode.send(third)
    pair.pump(lambda: pair.decode.pool.free == 2, pair.decode)
    pair.decode.send(first)
    pair.decode.send(second)
    pair.prefill.send(third)
    pair.finish("r0", "r1", "r2", limit=5.0)  # the clock stands still: no time-out helps
    assert {r.id: pair.decode.answer(r.id) for r in (first, second, third)} == undivided([first, second, third])
    assert [pair.prefill.last(f"r{i}").usage.retractions for i in (0, 1)] == [0, 1]  # type: ignore[union-attr]
    pair.settle()


@pytest.mark.parametrize("end", ["abort", "death"])
def test_a_shelved_prompt_ends_cleanly(make_pair: MakePair, end: str) -> None:
    pair = make_pair(pages=12, chunk=8, clock=ManualClock(1000.0))
    first, second = (pair.request(f"r{i}", prompt(40, i), i) for i in range(2))
    pair.prefill.send(first)
    pair.pump(lambda: pair.prefill.pool.free == 2, pair.prefill)
    pair.decode.send(second)
    pair.pump(lambda: pair.decode.pool.free == 2, pair.decode)
    pair.prefill.send(second)
    pair.pump(lambda: pair.prefill.role._by_id["r0"].shelved)  # type: ignore[attr-defined]
    if end == "abort":
        pair.prefill.send(Abort("r0"))
        assert pair.prefill.failure("r0").status == 499
        pair.finish("r1")
        pair.settle()
    else:
        pair.decode.engine.close()
        pair.pump(lambda: pair.prefill.ended("r1"), pair.prefill)
        pair.prefill.send(Abort("r0"))
        pair.pump(pair.prefill.idle_and_whole, pair.prefill)


def test_parked_and_shelved_prompts_are_bounded(make_pair: MakePair) -> None:
    pair = make_pair(pages=12, chunk=8, prefill={"max_handoffs": 1})
    for i in range(2):
        pair.prefill.send(pair.request(f"r{i}", prompt(40, i), i))
    pair.pump(lambda: pair.prefill.pool.free == 2, pair.prefill)
    pair.prefill.send(pair.request("one more", prompt(40, 2), 2))
    assert pair.prefill.failure("one more").status == 503
    pair.prefill.send(Abort("r0"))
    pair.prefill.send(Abort("r1"))
    pair.settle()


COUNT = 7


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.permutations(range(COUNT)),
    st.permutations(range(COUNT)),
    st.lists(st.integers(1, 40), min_size=COUNT, max_size=COUNT),
    st.integers(12, 24),
    st.integers(12, 24),
    st.integers(0, 2**32),
)
def test_no_order_of_arrival_blocks(
    to_prefill: list[int], to_decode: list[int], lengths: list[int], pages_p: int, pages_d: int, seed: int
) -> None:
    """Both sides get the same requests, each in an order of its own and at its own pace, with hardly any pages and on
    a clock that stands still: all are answered, and rightly."""
    woken, network, clock = threading.Event(), Network(), ManualClock(1000.0)

    def transports(region: Region) -> dict[str, Transport]:
        return {"loopback": LoopbackTransport(region, woken.set, network)}

    p = worker("prefill", woken.set, transports=transports, chunk=8, pages=pages_p, clock=clock)
    d = worker("decode", woken.set, transports=transports, chunk=8, pages=pages_d, clock=clock, max_running=3)
    pair, draw = Pair(p, d, woken), random.Random(seed)
    requests = [pair.request(f"r{i}", prompt(length, i % 2), i) for i, length in enumerate(lengths)]
    todo = [(p, [requests[i] for i in to_prefill]), (d, [requests[i] for i in to_decode])]
    try:
        while todo:
            one, left = draw.choice(todo)
            one.send(left.pop(0))
            todo = [entry for entry in todo if entry[1]]
            for _ in range(draw.randrange(4)):
                draw.choice((p, d)).turn()
        pair.finish(*(r.id for r in requests), limit=5.0)
        assert {r.id: d.answer(r.id) for r in requests} == undivided(requests)
        pair.settle()
    finally:
        pair.close()
