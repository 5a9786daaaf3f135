"""Aborts, deaths, time-outs and damage at every stage: a clear end for the request, whole pools, no later harm."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from baton.base.clock import ManualClock
from baton.base.errors import BadRequest, ConfigError
from baton.base.messages import Abort, Codec, CodecError, Generate
from baton.disagg.wire import DECODE_HEARS, PROTOCOL, Accepted, Refused
from baton.transports.base import Capabilities, Grant, Peer, Transport, Write, WriteState
from baton.transports.kernels import Pieces
from baton.transports.loopback import LoopbackTransport, Network
from baton.transports.region import Region
from tests.disagg.pair import LAYOUT, Pair, Worker, undivided, worker
from tests.disagg.test_equal import prompt

MakePair = Callable[..., Pair]
STAGES = ("p first", "d first", "met", "moving", "parked", "done")
"""How far things are when something happens."""


def reach(pair: Pair, stage: str, request: Generate) -> None:
    """Bring a request of several chunks to a stage, with nothing decided by chance."""
    p, d = pair.prefill, pair.decode
    if stage != "d first":
        p.send(request)
    if stage not in ("p first", "parked"):
        d.send(request)
    if stage == "d first":
        pair.pump(lambda: bool(d.role.handoffs.open) and d.pool.free < d.pool.total, d)
    elif stage == "met":
        pair.pump(lambda: d.pool.free < d.pool.total, d)  # offered; the offer is on its way
    elif stage == "moving":
        pair.pump(lambda: d.pool.free < d.pool.total, d)
        pair.pump(lambda: bool(p.engine.scheduler.running), p)
        p.turn()
    elif stage == "parked":
        pair.pump(lambda: not p.engine.scheduler.running and p.pool.free < p.pool.total, p)
    elif stage == "done":
        pair.pump(lambda: d.ended(request.id) or bool(d.heard.get(request.id)))


def serves(pair: Pair, room: int = 99) -> None:
    """The pair does its work as if nothing had happened, in pages that are all its own again."""
    requests = [pair.request(f"after {room + i}", prompt(40, i), room + i) for i in range(3)]
    for request in requests:
        pair.prefill.send(request)
        pair.decode.send(request)
    pair.finish(*(r.id for r in requests))
    assert {r.id: pair.decode.answer(r.id) for r in requests} == undivided(requests)
    pair.settle()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("side", ["prefill", "decode", "both"])
def test_abort_at_every_stage(make_pair: MakePair, transport: str, stage: str, side: str) -> None:
    pair = make_pair(transport, chunk=8)
    request = pair.request("r", prompt(40), 1, max_tokens=200)
    reach(pair, stage, request)
    for name, one in (("prefill", pair.prefill), ("decode", pair.decode)):
        if side in (name, "both"):
            one.send(Abort("r"))
            one.send(Abort("r"))  # idempotent
    if stage in ("p first", "d first", "parked"):  # one side alone has the request: it waits until its user is gone too
        pair.prefill.send(Abort("r"))
        pair.decode.send(Abort("r"))
    pair.pump(lambda: pair.prefill.role.handoffs.open == 0)
    if not (stage == "done" and side == "prefill"):  # else P is done with it, and D goes on
        pair.pump(lambda: pair.decode.ended("r") or not pair.decode.heard)
        pair.settle()
    serves(pair)


def test_an_abort_reaches_the_other_side(make_pair: MakePair, transport: str) -> None:
    pair = make_pair(transport, chunk=8)
    for room, (first, other) in enumerate(((pair.prefill, pair.decode), (pair.decode, pair.prefill))):
        request = pair.request(f"r{room}", prompt(40), room)
        reach(pair, "moving", request)
        first.send(Abort(request.id))
        assert first.failure(request.id).status == 499
        pair.finish(request.id)
        assert (other.failure(request.id).status, other.failure(request.id).code) == (502, "handoff_lost")
        assert "cancelled" in other.failure(request.id).message
        pair.settle()


def test_p_need_not_wait_for_an_offer_that_never_comes(make_pair: MakePair) -> None:
    pair = make_pair(pages=12)
    pair.ask("first", prompt(40), 1, max_tokens=8)
    pair.pump(lambda: bool(pair.decode.heard.get("first")), pair.decode, pair.prefill)
    pair.ask("second", prompt(40, 2), 2)  # no pages for it on D
    pair.decode.turn()
    pair.decode.send(Abort("second"))
    pair.pump(lambda: pair.prefill.ended("second"), limit=2.0)
    assert "gave up" in pair.prefill.failure("second").message
    pair.finish("first")
    pair.settle()


def test_a_late_offer_hears_why_its_room_failed(make_pair: MakePair) -> None:
    pair = make_pair(pages=64, prefill={"pages": 8})
    request = pair.request("long", prompt(50), 5)
    pair.prefill.send(request)
    assert pair.prefill.failure("long").status == 400
    pair.decode.send(request)
    pair.pump(lambda: pair.decode.ended("long"))
    assert pair.decode.failure("long").status == 400
    assert "50 tokens" in pair.decode.failure("long").message
    pair.decode.send(pair.request("early", prompt(50), 6))  # the offer is there before the request
    pair.pump(lambda: pair.decode.pool.free < 64)
    pair.prefill.turn()
    pair.prefill.send(pair.request("early", prompt(50), 6))
    pair.pump(lambda: pair.decode.ended("early"))
    assert pair.decode.failure("early").status == 400
    pair.settle()


def test_overload_of_p_reaches_d_at_once(make_pair: MakePair) -> None:
    pair = make_pair(prefill={"max_waiting": 1})
    for i in range(3):
        pair.ask(f"r{i}", prompt(8), i)
    assert pair.prefill.failure("r2").status == 503
    pair.finish("r0", "r2")
    assert pair.decode.failure("r2").status == 503
    assert pair.decode.failure("r2").retry_after == 1.0
    pair.finish("r1") if not pair.prefill.ended("r1") else None
    pair.settle()


def test_requests_that_break_the_contract(make_pair: MakePair) -> None:
    pair = make_pair(max_waiting=2)
    pair.prefill.send(pair.request("no ticket", prompt(8), 1, ticket=False))
    assert pair.prefill.failure("no ticket").status == 400
    assert "prefill worker" in pair.prefill.failure("no ticket").message
    for one in (pair.prefill, pair.decode):
        one.send(pair.request("a", prompt(8), 0))
        one.send(pair.request("b", prompt(8), 0))
        assert one.failure("b").status == BadRequest.status
        assert "bootstrap_room 0 is in use" in one.failure("b").message
    pair.finish("a")  # the first in the room is not disturbed
    pair.decode.send(pair.request("x", prompt(8), 3))
    pair.decode.send(pair.request("y", prompt(8), 4))
    pair.decode.send(pair.request("z", prompt(8), 5))
    assert pair.decode.failure("z").status == 503
    pair.decode.send(Abort("x"))
    pair.decode.send(Abort("y"))
    pair.settle()


def test_different_prompts_in_one_room(make_pair: MakePair) -> None:
    pair = make_pair()
    pair.prefill.send(pair.request("r", prompt(20, 1), 1))
    pair.decode.send(pair.request("r", prompt(20, 2), 1))
    pair.finish("r")
    assert "tokenizer" in pair.decode.failure("r").message
    assert "tokenizer" in pair.prefill.failure("r").message
    pair.settle()


def test_different_layouts_say_what_differs(make_pair: MakePair, transport: str) -> None:
    other = msgspec.structs.replace(LAYOUT, dtype="bfloat16", fingerprint="another")
    pair = make_pair(transport, prefill={"layout": other})
    pair.decode.send(pair.request("r", prompt(20), 1))
    pair.pump(lambda: pair.decode.ended("r"))
    assert "dtype bfloat16 here, float32 there" in pair.decode.failure("r").message
    assert "fingerprint another here, pages-1 there" in pair.decode.failure("r").message
    assert pair.decode.pool.free == pair.decode.pool.total


def test_no_common_transport(make_pair: MakePair) -> None:
    pair = make_pair(
        "shm", prefill={"transports": lambda region: {"loopback": LoopbackTransport(region, print, Network())}}
    )
    pair.decode.send(pair.request("r", prompt(20), 1))
    pair.pump(lambda: pair.decode.ended("r"))
    assert "no common transport: shm: not offered here" in pair.decode.failure("r").message


def test_nobody_at_the_address(make_pair: MakePair) -> None:
    pair = make_pair()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        pair.decode.send(pair.request("r", prompt(20), 1, port=closed.getsockname()[1]))
        pair.pump(lambda: pair.decode.ended("r"), pair.decode, limit=2.0)
    assert "cannot reach the prefill worker at 127.0.0.1:" in pair.decode.failure("r").message
    assert pair.decode.failure("r").retryable
    serves(pair)  # other routes are not concerned


@pytest.mark.parametrize("stage", STAGES)
def test_p_dies(make_pair: MakePair, transport: str, stage: str) -> None:
    pair = make_pair(transport, chunk=8)
    request = pair.request("r", prompt(40), 1, max_tokens=200)
    reach(pair, stage, request)
    pair.prefill.engine.close()
    pair.decode.send(request) if stage in ("p first", "parked") else None
    if stage != "done":
        pair.pump(lambda: pair.decode.ended("r"), pair.decode, limit=2.0)
        assert pair.decode.failure("r").code == "handoff_lost"
    else:
        pair.decode.send(Abort("r"))
    pair.pump(pair.decode.idle_and_whole, pair.decode)


@pytest.mark.parametrize("stage", STAGES)
def test_d_dies(make_pair: MakePair, transport: str, stage: str) -> None:
    pair = make_pair(transport, chunk=8)
    request = pair.request("r", prompt(40), 1, max_tokens=200)
    reach(pair, stage, request)
    pair.prefill.send(request) if stage == "d first" else None
    pair.decode.engine.close()
    if stage in ("p first", "d first", "parked"):  # P may never have heard of this D: the gateway tells it
        pair.prefill.send(Abort("r"))
    pair.pump(lambda: pair.prefill.ended("r"), pair.prefill, limit=3.0)
    pair.pump(pair.prefill.idle_and_whole, pair.prefill)


def test_p_comes_back_as_another(make_pair: MakePair, transport: str) -> None:
    pair = make_pair(transport, chunk=8)
    port = pair.prefill.role.bootstrap_port
    request = pair.request("r", prompt(40), 1)
    reach(pair, "moving", request)
    pair.prefill.engine.close()
    pair.pump(lambda: pair.decode.ended("r"), pair.decode)
    again = make_pair(transport, prefill={"bootstrap_port": port})
    assert again.prefill.role.bootstrap_port == port
    reborn = Pair(again.prefill, pair.decode, pair._woken)
    if transport != "loopback":  # whose network ends with its pair
        serves(reborn, room=1)  # the same room, another epoch


def test_pages_that_come_free_are_offered_at_once(make_pair: MakePair) -> None:
    """An engine that has nothing to compute sleeps until somebody wakes it: the step that frees pages must use them."""
    pair = make_pair(pages=12)
    pair.ask("first", prompt(40), 1)
    pair.pump(lambda: bool(pair.decode.heard.get("first")))
    pair.decode.send(pair.request("second", prompt(40, 2), 2))
    pair.pump(lambda: pair.decode.ended("first"), pair.decode)
    assert pair.decode.pool.free == 2  # no further turn was needed
    pair.decode.send(pair.request("third", prompt(40, 3), 3))
    pair.decode.turn()
    pair.decode.send(Abort("second"))
    pair.pump(lambda: pair.decode.pool.free == 2, pair.decode)
    pair.decode.send(Abort("third"))
    pair.settle()


# --- a transport that fails on purpose -----------------------------------------------------------------------------


class FlakyPeer:
    """Does to writes what a test says."""

    def __init__(self, peer: Peer, source: Region, plan: Flaky) -> None:
        self._peer = peer
        self._source = source
        self._plan = plan
        self.held: list[tuple[Pieces, int, Write]] = []
        plan.peers.append(self)

    @property
    def alive(self) -> bool:
        return self._peer.alive

    def write(self, pieces: Pieces, tag: int) -> Write:
        match self._plan.todo.pop(0) if self._plan.todo else "pass":
            case "drop":
                return Write(tag, 0, self._peer.write(pieces[:0], tag).digests, WriteState.FAILED_SETTLED, "dropped")
            case "hold":
                write = Write(tag, int(pieces[:, 2].sum()))
                self.held.append((pieces, tag, write))
                return write
            case "unsettled":
                write = Write(tag, 0, state=WriteState.FAILED_UNSETTLED, error="no word of it")
                self.held.append((pieces, tag, write))
                return write
            case "twice":
                self._peer.write(pieces, tag)
                return self._peer.write(pieces, tag)
            case "corrupt":
                write = self._peer.write(pieces, tag)
                write.digests = write.digests ^ np.uint64(1)
                return write
        return self._peer.write(pieces, tag)

    def release(self) -> list[WriteState]:
        """What was held up arrives after all."""
        states = []
        for pieces, tag, write in self.held:
            done = self._peer.write(pieces, tag)
            write.digests = done.digests
            write.end(done.state, done.error)
            states.append(done.state)
        self.held.clear()
        return states

    def poll(self, timeout: float) -> None:
        if self._plan.let_go.wait(timeout):
            self.release()

    def quiesce(self, timeout: float) -> bool:
        if self._plan.let_go.wait(timeout):
            self.release()
        return not self.held

    def close(self) -> None:
        if not self.held:  # else the region stays ours: bytes are under way
            self._peer.close()


class Flaky:
    """A loopback whose peers follow `todo`, one entry per write."""

    capabilities = Capabilities("loopback", same_host=True, fenced_by_receiver=False)

    def __init__(self, region: Region, network: Network, wake: Callable[[], None]) -> None:
        self.todo: list[str] = []
        self.peers: list[FlakyPeer] = []
        self.let_go = threading.Event()
        self._region = region
        self._inner = LoopbackTransport(region, wake, network)

    def grant(self, near: str) -> Grant:
        return Unfenced(self._inner.grant(near))

    def connect(self, description: bytes) -> Peer:
        return FlakyPeer(self._inner.connect(description), self._region, self)

    def close(self) -> None:
        self._inner.close()


class Unfenced:
    """A grant whose receiver cannot keep bytes out, like shared memory."""

    def __init__(self, inner: Grant) -> None:
        self._inner = inner
        self.description = inner.description

    def admit(self, tag: int, ranges: list[tuple[int, int]]) -> None:
        self._inner.admit(tag, ranges)

    def shut(self, tag: int) -> bool:
        return self.settled

    def revoke(self) -> None:
        pass  # P's side alone ends it

    @property
    def settled(self) -> bool:
        return self._inner.settled


@pytest.fixture
def flaky_pair(make_pair: MakePair) -> tuple[Pair, Flaky, ManualClock]:
    made: list[Flaky] = []
    network, clock, woken = Network(), ManualClock(1000.0), threading.Event()

    def transports(region: Region) -> dict[str, Transport]:
        made.append(Flaky(region, network, woken.set))
        return {"loopback": made[-1]}

    pair = make_pair(transports=transports, chunk=8, clock=clock)
    return pair, made[0], clock


@pytest.mark.parametrize("page", [0, 3, 9])
def test_a_damaged_page_is_found(flaky_pair: tuple[Pair, Flaky, ManualClock], page: int) -> None:
    pair, flaky, _ = flaky_pair
    flaky.todo = ["pass"] * (page // 2) + ["corrupt"]
    pair.ask_decode_first("r", prompt(40), 1)
    pair.finish("r")
    assert pair.decode.failure("r").code == "handoff_lost"
    assert "damaged" in pair.decode.failure("r").message
    assert "damaged" in pair.prefill.failure("r").message
    pair.settle()
    serves(pair)


def test_damage_passes_when_nobody_looks(make_pair: MakePair) -> None:
    """`verify` off is really off (and on by default, see above): digests are not compared."""
    made: list[Flaky] = []
    network = Network()

    def transports(region: Region) -> dict[str, Transport]:
        made.append(Flaky(region, network, lambda: None))
        return {"loopback": made[-1]}

    pair = make_pair(transports=transports, verify=False)
    made[0].todo = ["corrupt"]
    pair.ask("r", prompt(20), 1)
    pair.finish("r")
    assert len(pair.decode.answer("r")) == 6
    pair.settle()


def test_a_failed_write(flaky_pair: tuple[Pair, Flaky, ManualClock]) -> None:
    pair, flaky, _ = flaky_pair
    flaky.todo = ["pass", "drop"]
    pair.ask_decode_first("r", prompt(40), 1)
    pair.finish("r")
    assert "dropped" in pair.prefill.failure("r").message
    assert "dropped" in pair.decode.failure("r").message
    pair.settle()
    serves(pair)


def test_a_write_that_happens_twice(flaky_pair: tuple[Pair, Flaky, ManualClock]) -> None:
    pair, flaky, _ = flaky_pair
    flaky.todo = ["twice"] * 5
    request = pair.ask_decode_first("r", prompt(40), 1)
    pair.finish("r")
    assert pair.decode.answer("r") == undivided([request])["r"]
    pair.settle()


@pytest.mark.parametrize("held", ["hold", "unsettled"])
def test_pages_stay_quarantined_while_bytes_may_come(flaky_pair: tuple[Pair, Flaky, ManualClock], held: str) -> None:
    """D gives up while a write is under way: its pages are nobody's until P says that nothing moves any more."""
    pair, flaky, clock = flaky_pair
    flaky.todo = ["pass", held]
    pair.ask_decode_first("r", prompt(40), 1)
    pair.prefill.turn()
    pair.prefill.turn()
    pair.pump(lambda: bool(flaky.peers[0].held), pair.decode)
    pair.decode.send(Abort("r"))
    pair.pump(lambda: pair.prefill.ended("r"))
    for _ in range(5):
        pair.prefill.turn()
        pair.decode.turn()
    load, pool = pair.decode.role.handoffs, pair.decode.pool
    assert (load.open, load.quarantined_pages, pool.free) == (1, 10, pool.total - 10)
    assert pair.prefill.role.handoffs.quarantined_pages >= 2  # P's own, being read or in line behind
    serves_beside(pair)
    clock.advance(60)  # longer than drain-timeout: D cuts P off, and still does not touch the pages
    for _ in range(5):
        pair.decode.turn()
    pair.pump(lambda: pair.prefill.role.handoffs.open == 0)  # P has heard that it was cut off
    assert pair.decode.role.handoffs.quarantined_pages == 10
    peer = flaky.peers[0]
    assert peer.release() == [WriteState.DONE]  # it comes after all, into pages that are nobody's
    peer.close()
    pair.settle()


def serves_beside(pair: Pair) -> None:
    """While pages are quarantined: a request that needs all the others."""
    whole = pair.request("whole", prompt(40, 9), 0, ticket=False)
    pair.decode.send(whole)
    pair.pump(lambda: pair.decode.ended("whole"), pair.decode)
    assert pair.decode.answer("whole") == undivided([whole])["whole"]


def test_p_falls_silent(flaky_pair: tuple[Pair, Flaky, ManualClock]) -> None:
    """A long queue at P is no fault, as long as P gives signs of life; a P that hangs is one."""
    pair, _, clock = flaky_pair
    request = pair.ask_decode_first("r", prompt(40), 1)

    def sign_of_life() -> None:
        clock.advance(20)
        pair.prefill.role.poll()  # alive, but something else is computed
        pair.pump(lambda: pair.decode.role.next_deadline() == clock.now() + 30, pair.decode)

    for _ in range(8):
        sign_of_life()
    pair.finish("r")
    assert pair.decode.answer("r") == undivided([request])["r"]
    pair.ask_decode_first("s", prompt(40, 2), 2)
    sign_of_life()
    clock.advance(31)
    pair.pump(lambda: pair.decode.ended("s"), pair.decode)
    assert pair.decode.failure("s").status == 504
    assert "no sign of life" in pair.decode.failure("s").message
    pair.settle()


def test_nobody_comes(flaky_pair: tuple[Pair, Flaky, ManualClock]) -> None:
    pair, _, clock = flaky_pair
    pair.prefill.send(pair.request("p", prompt(40), 1))
    pair.decode.send(pair.request("d", prompt(40), 2))
    pair.pump(lambda: pair.decode.pool.free < pair.decode.pool.total and not pair.prefill.engine.scheduler.running)
    clock.advance(29)
    pair.pump(lambda: True)
    assert not pair.prefill.ended("p")
    clock.advance(2)
    pair.pump(lambda: pair.prefill.ended("p") and pair.decode.ended("d"))
    assert pair.prefill.failure("p").status == pair.decode.failure("d").status == 504
    assert "room 1" in pair.prefill.failure("p").message
    assert "room 2" in pair.decode.failure("d").message
    pair.settle()


def test_the_requests_own_deadline(flaky_pair: tuple[Pair, Flaky, ManualClock]) -> None:
    pair, _, clock = flaky_pair
    request = msgspec.structs.replace(pair.request("r", prompt(40), 1), deadline=1010.0)
    pair.decode.send(request)
    other = msgspec.structs.replace(pair.request("s", prompt(40), 2), deadline=1010.0)
    pair.prefill.send(other)
    pair.pump(lambda: pair.decode.pool.free < pair.decode.pool.total and not pair.prefill.engine.scheduler.running)
    clock.advance(11)
    pair.pump(lambda: pair.decode.ended("r") and pair.prefill.ended("s"))
    assert "deadline" in pair.decode.failure("r").message
    assert "deadline" in pair.prefill.failure("s").message
    pair.settle()


def test_each_sides_deadline_is_the_others_answer(flaky_pair: tuple[Pair, Flaky, ManualClock]) -> None:
    """Whoever has it first says why: a time-out, and not that somebody has gone. P's may pass in its scheduler."""
    pair, _, clock = flaky_pair
    request = pair.request("r", prompt(40), 1)
    pair.decode.send(request)
    pair.pump(lambda: pair.decode.pool.free < pair.decode.pool.total, pair.decode)
    pair.prefill.send(msgspec.structs.replace(request, deadline=1010.0))
    pair.pump(lambda: bool(pair.prefill.role.poll()) or pair.prefill.role._by_id["r"].offer is not None, pair.decode)  # type: ignore[attr-defined]
    clock.advance(11)
    pair.pump(lambda: pair.decode.ended("r") and pair.prefill.ended("r"), limit=2.0)
    assert (pair.decode.failure("r").status, pair.decode.failure("r").code) == (504, "timeout")
    assert pair.prefill.failure("r").status == 504
    pair.settle()


def test_a_deadline_while_the_first_token_waits_for_a_place(make_pair: MakePair) -> None:
    clock = ManualClock(1000.0)
    pair = make_pair(clock=clock, max_running=1, prefill={"max_running": 16})
    request = msgspec.structs.replace(pair.request("r", prompt(20), 1), deadline=1010.0)
    pair.decode.send(request)
    pair.pump(lambda: pair.decode.pool.free < pair.decode.pool.total, pair.decode)
    pair.decode.send(pair.request("whole", prompt(8), 0, ticket=False, max_tokens=200))  # takes the only place
    pair.decode.turn()
    pair.prefill.send(request)
    pair.pump(lambda: pair.decode.hear() and bool(pair.decode.heard.get("r")), pair.prefill)  # "whole" stays as it is
    assert not pair.decode.ended("r")
    assert pair.decode.role.next_deadline() == 1010.0
    clock.advance(11)
    pair.decode.turn()
    assert pair.decode.failure("r").status == 504
    assert not pair.decode.ended("whole")
    pair.decode.send(Abort("whole"))
    pair.settle()


# --- strangers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"\0",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 100,
        b"\4\0\0\0\1\xc1\xc1\xc1",
        b"\5\0\0\0\2abcd",
        b"\0\0\1\0" + b"x" * 70000,
        b"\0\0\0\0",
    ],
)
def test_strangers_at_the_door(make_pair: MakePair, noise: bytes) -> None:
    pair = make_pair("tcp")
    with socket.create_connection(("127.0.0.1", pair.prefill.role.bootstrap_port)) as stranger:
        stranger.sendall(noise)
        serves(pair, room=1)
    serves(pair, room=10)


def test_another_version_gets_a_clear_answer(make_pair: MakePair) -> None:
    pair = make_pair()
    future = Codec(Accepted, version=PROTOCOL + 1).encode(Accepted(1, 1))
    with socket.create_connection(("127.0.0.1", pair.prefill.role.bootstrap_port)) as stranger:
        stranger.sendall(len(future).to_bytes(4, "little") + future)
        stranger.settimeout(5)
        answer = stranger.makefile("rb").read()
    refused = DECODE_HEARS.decode(answer[4:])
    assert isinstance(refused, Refused)
    assert f"version {bytes([PROTOCOL + 1])!r}" in refused.message
    with pytest.raises(CodecError, match="version"):
        Codec(Refused, version=PROTOCOL + 1).decode(answer[4:])


def test_many_strangers(make_pair: MakePair) -> None:
    pair = make_pair()
    crowd = [socket.create_connection(("127.0.0.1", pair.prefill.role.bootstrap_port)) for _ in range(100)]
    serves(pair)
    for one in crowd:
        one.close()


def test_the_port_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1") as caught:
            worker_on(taken.getsockname()[1])
        del caught


def worker_on(port: int) -> Worker:
    return worker("prefill", print, bootstrap_port=port)
