"""Requests with a grammar, which each side compiles for itself: computed when it is ready, ended cleanly before."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from baton.base.clock import ManualClock
from baton.base.errors import BadRequest
from baton.base.messages import Abort, Generate, Grammar
from baton.engine.smith import ManualSmith
from tests.disagg.pair import Pair, undivided
from tests.disagg.test_equal import prompt

MakePair = Callable[..., Pair]
BAD = BadRequest("the regex cannot be used: unclosed group")


class Forge:
    """A pair whose grammars are ready when a test says so; the clock stands still."""

    def __init__(self, make_pair: MakePair, transport: str = "loopback") -> None:
        self.clock = ManualClock(1000.0)
        self.p, self.d = ManualSmith(), ManualSmith()
        options = {"clock": self.clock, "chunk": 8, "preparation": self.d, "prefill": {"preparation": self.p}}
        self.pair = make_pair(transport, **options)

    def ask(self, id: str = "r", room: int = 1) -> Generate:
        request = self.pair.request(id, prompt(40), room, grammar=Grammar("regex", "[0-9]+"))
        self.pair.prefill.send(request)
        self.pair.decode.send(request)
        return request

    def begun(self, id: str = "r") -> bool:
        return bool(self.pair.decode.heard.get(id))

    def some_turns(self) -> None:
        for _ in range(5):
            self.pair.prefill.turn()
            self.pair.decode.turn()

    def serves(self) -> None:
        """Another one in the same room, and nothing is left of either."""
        request = self.ask("after")
        for smith in (self.p, self.d):
            smith.finish(smith.orders[-1])
        self.pair.finish("after")
        assert self.pair.decode.answer("after") == undivided([request])["after"]
        self.pair.settle()
        for one in (self.pair.prefill, self.pair.decode):
            assert not one.engine._held


@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_each_side_waits_for_its_own(make_pair: MakePair, transport: str, first: str) -> None:
    forge = Forge(make_pair, transport)
    request = forge.ask()
    forge.some_turns()
    assert not forge.begun()
    if first == "decode":
        forge.d.finish(forge.d.orders[0])
        forge.some_turns()
        assert not forge.begun()
    forge.p.finish(forge.p.orders[0])
    forge.pair.pump(forge.begun)
    if first == "prefill":
        forge.some_turns()
        assert len(forge.pair.decode.answer("r")) == 1  # P's token; the next one needs D's grammar
        assert not forge.pair.decode.engine.busy
        forge.d.finish(forge.d.orders[0])
    forge.pair.finish("r")
    assert forge.pair.decode.answer("r") == undivided([request])["r"]
    forge.pair.settle()
    forge.serves()


def test_a_grammar_that_takes_longer_than_any_patience(make_pair: MakePair) -> None:
    forge = Forge(make_pair)
    request = forge.ask()
    forge.pair.pump(lambda: forge.pair.prefill.role._by_id["r"].offer is not None)  # type: ignore[attr-defined]
    for _ in range(20):
        forge.clock.advance(10)
        forge.pair.prefill.turn()
        seen = forge.clock.now()
        forge.pair.pump(lambda: forge.pair.decode.role._by_id["r"].handoff.seen == seen, forge.pair.decode)  # type: ignore[attr-defined]  # noqa: B023
    for smith in (forge.p, forge.d):
        smith.finish(smith.orders[0])
    forge.pair.finish("r")
    assert forge.pair.decode.answer("r") == undivided([request])["r"]
    forge.pair.settle()


@pytest.mark.parametrize("side", ["prefill", "decode", "both"])
def test_a_bad_grammar_is_a_400_on_the_side_that_answers(make_pair: MakePair, side: str) -> None:
    """Whichever side finds out first: the client hears what is wrong, and not that somebody has gone."""
    forge = Forge(make_pair)
    forge.ask()
    forge.pair.pump(lambda: forge.pair.prefill.role._by_id["r"].offer is not None)  # type: ignore[attr-defined]
    for name, smith in (("prefill", forge.p), ("decode", forge.d)):
        if side in (name, "both"):
            smith.finish(smith.orders[0], BAD)
    forge.pair.finish("r", limit=2.0)
    assert forge.pair.decode.failure("r").status == 400
    assert "unclosed group" in forge.pair.decode.failure("r").message
    assert "unclosed group" in forge.pair.prefill.failure("r").message
    for smith in (forge.p, forge.d):
        for order in list(smith.orders):
            assert not order.held  # a smith passes it over
            smith.finish(order, BAD)
    forge.some_turns()  # a word too late
    forge.pair.settle()
    forge.serves()


def test_p_refuses_before_d_has_come(make_pair: MakePair) -> None:
    forge = Forge(make_pair)
    request = forge.pair.request("r", prompt(40), 1, grammar=Grammar("regex", "("))
    forge.pair.prefill.send(request)
    forge.p.finish(forge.p.orders[0], BAD)
    forge.pair.pump(lambda: forge.pair.prefill.ended("r"), forge.pair.prefill)
    forge.pair.decode.send(request)
    forge.pair.pump(lambda: forge.pair.decode.ended("r"), limit=2.0)
    assert forge.pair.decode.failure("r").status == 400
    forge.pair.settle()
    forge.serves()


@pytest.mark.parametrize("how", ["abort", "bad", "deadline"])
def test_an_end_between_the_first_token_and_the_second(make_pair: MakePair, how: str) -> None:
    forge = Forge(make_pair)
    request = forge.pair.request("r", prompt(40), 1, grammar=Grammar("regex", "[0-9]+"))
    timed = Generate(request.id, request.tokens, request.sampling, request.ticket, deadline=1010.0)
    forge.pair.prefill.send(timed)
    forge.pair.decode.send(timed)
    forge.p.finish(forge.p.orders[0])
    forge.pair.pump(forge.begun)
    if how == "abort":
        forge.pair.decode.send(Abort("r"))
    elif how == "bad":
        forge.d.finish(forge.d.orders[0], BAD)
    else:
        forge.clock.advance(11)
    forge.pair.pump(lambda: forge.pair.decode.ended("r"))
    assert forge.pair.decode.failure("r").status == {"abort": 499, "bad": 400, "deadline": 504}[how]
    forge.pair.settle()
    forge.serves()


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_an_abort_while_both_compile(make_pair: MakePair, side: str) -> None:
    forge = Forge(make_pair)
    forge.ask()
    forge.pair.pump(lambda: forge.pair.prefill.role._by_id["r"].offer is not None)  # type: ignore[attr-defined]
    getattr(forge.pair, side).send(Abort("r"))
    forge.pair.finish("r", limit=2.0)
    assert not any(order.held for smith in (forge.p, forge.d) for order in smith.orders)
    forge.pair.settle()
    forge.serves()


def test_p_dies_while_d_compiles(make_pair: MakePair) -> None:
    forge = Forge(make_pair)
    forge.ask()
    forge.pair.pump(lambda: forge.pair.prefill.role._by_id["r"].offer is not None)  # type: ignore[attr-defined]
    forge.pair.prefill.engine.close()
    assert forge.p.closed
    forge.pair.pump(lambda: forge.pair.decode.ended("r"), forge.pair.decode, limit=2.0)
    assert not forge.d.orders[0].held
    forge.pair.pump(forge.pair.decode.idle_and_whole, forge.pair.decode)
