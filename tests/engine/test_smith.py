"""Grammars beside the engine's thread: nobody waits for them but their own requests, and every end is clean."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.base.clock import ManualClock, MonotonicClock
from baton.base.errors import BadRequest, BatonError
from baton.base.messages import Abort, Failed, Generate, Grammar, Sampling, ToFront, Tokens
from baton.engine.blocks import PagePool
from baton.engine.engine import Engine
from baton.engine.grammar import COMPILED, Grammars, NoGrammars
from baton.engine.roles import Committer, Unified
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import Sequence
from baton.engine.smith import ManualSmith, Smith
from baton.engine.sockets import EchoRunner, Preparation, Sampled, Slice

from .test_grammar import EOS, VOCAB, directory

__all__ = ["directory"]

DIGITS = Grammar("regex", "[0-9]+")


def bound(id: str = "s", grammar: Grammar | None = DIGITS) -> Sequence:
    return Sequence(id, [1, 2], 2, Sampling(9, grammar=grammar))


@dataclass
class Slow:
    """A compiler that takes as long as a test wants; grammars of "bad" and "broken" sources fail."""

    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    made: list[str] = field(default_factory=list)
    warm: bool = False

    def warm_up(self) -> None:
        self.warm = True
        if not self.gate:
            raise RuntimeError

    def compiled(self, grammar: Grammar) -> object | None:
        return "known" if grammar.source == "known" else None

    def compile(self, grammar: Grammar) -> object:
        self.entered.set()
        assert self.gate.wait(10)
        self.made.append(grammar.source)
        if grammar.source == "bad":
            raise BadRequest("bad grammar")
        if grammar.source == "broken":
            raise ZeroDivisionError
        return grammar.source.upper()


def finished(smith: Smith, woken: threading.Event) -> list[tuple[Sequence, BatonError | None]]:
    assert woken.wait(10)
    woken.clear()
    return smith.done()


def test_one_after_the_other_with_a_word_for_each() -> None:
    compiler, woken = Slow(), threading.Event()
    smith = Smith(compiler, woken.set)
    free, known = bound("free", None), bound("known", Grammar("regex", "known"))
    orders = [bound(source, Grammar("regex", source)) for source in ("a", "bad", "broken", "b")]
    for sequence in (free, known, *orders):
        smith.begin(sequence)
    assert [s.held for s in (free, known, *orders)] == [False, False, True, True, True, True]
    assert (free.prepared, known.prepared) == (None, "known")
    assert not smith.done()
    compiler.gate.set()
    done: list[tuple[Sequence, BatonError | None]] = []
    while len(done) < 4:
        done += finished(smith, woken)
    assert compiler.warm
    assert [sequence for sequence, _ in done] == orders
    assert [error.status if error else None for _, error in done] == [None, 400, 500, None]
    assert [sequence.prepared for sequence in orders] == ["A", None, None, "B"]
    assert all(sequence.held for sequence in orders)  # the engine lets them go, in its own thread
    smith.close()


def test_what_has_ended_is_passed_over() -> None:
    compiler, woken = Slow(), threading.Event()
    smith = Smith(compiler, woken.set)
    first, dropped, last = (bound(source, Grammar("regex", source)) for source in "abc")
    for sequence in (first, dropped, last):
        smith.begin(sequence)
    dropped.held = False
    compiler.gate.set()
    done: list[tuple[Sequence, BatonError | None]] = []
    while len(done) < 2:
        done += finished(smith, woken)
    assert compiler.made == ["a", "c"]
    assert [sequence for sequence, _ in done] == [first, last]
    smith.close()


def test_closing_waits_for_the_grammar_in_hand_only() -> None:
    compiler = Slow()
    smith = Smith(compiler, lambda: None)
    for source in "abc":
        smith.begin(bound(source, Grammar("regex", source)))
    assert compiler.entered.wait(10)
    threading.Timer(0.1, compiler.gate.set).start()
    smith.close()
    assert compiler.made == ["a"]
    assert "baton-smith" not in {thread.name for thread in threading.enumerate()}


def test_a_compiler_that_cannot_warm_up_fails_requests_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    compiler, woken = Slow(), threading.Event()
    compiler.warm_up = lambda: 1 / 0  # type: ignore[assignment, method-assign, return-value]
    compiler.gate.set()
    smith = Smith(compiler, woken.set)
    smith.begin(bound("a", Grammar("regex", "a")))
    assert finished(smith, woken)[0][1] is None
    smith.close()
    assert "structured output cannot be served" in caplog.text


# --- in an engine --------------------------------------------------------------------------------------------------


class Watchful(EchoRunner):
    """Nothing that is held is ever computed."""

    def __init__(self) -> None:
        self.steps = 0

    def run(self, batch: list[Slice]) -> list[Sampled]:  # type: ignore[override]
        self.steps += 1
        assert not any(piece.sequence.held for piece in batch)
        return super().run(batch)


class World:
    """An undivided engine with a preparation, and what it said."""

    def __init__(self, preparation: Preparation, *, clock: ManualClock | None = None, max_waiting: int = 16) -> None:
        self.clock = clock or MonotonicClock()
        self.scheduler = Scheduler(
            PagePool(8), page_size=4, max_running=3, max_waiting=max_waiting, chunk=8, max_model_len=32
        )
        self.runner = Watchful()
        committer = Committer(self.scheduler, self.runner, [], self.clock)
        role = Unified(self.scheduler, committer)
        self.engine = Engine(self.scheduler, self.runner, role, self.clock, preparation)
        self.heard: dict[str, list[ToFront]] = {}

    def ask(self, id: str, grammar: Grammar | None = DIGITS, deadline: float | None = None) -> None:
        self.heard[id] = []
        self.listen(self.engine.handle(Generate(id, (1, 2, 3), Sampling(4, grammar=grammar), deadline=deadline)))

    def listen(self, messages: list[ToFront]) -> None:
        for message in messages:
            assert isinstance(message, Tokens | Failed)
            assert not self.ended(message.id), "a word after the last one"
            self.heard[message.id].append(message)

    def ended(self, id: str) -> bool:
        last = self.heard[id][-1] if self.heard[id] else None
        return isinstance(last, Failed) or (isinstance(last, Tokens) and last.finish is not None)

    def status(self, id: str) -> int:
        last = self.heard[id][-1]
        return last.status if isinstance(last, Failed) else 200

    def step(self) -> None:
        self.listen(self.engine.expire())
        self.listen(self.engine.step())
        self.scheduler.check()

    def run(self) -> None:
        while self.engine.busy:
            self.step()


def test_others_overtake_who_waits_for_a_grammar() -> None:
    smith = ManualSmith()
    world = World(smith)
    world.ask("bound")
    for id in ("a", "b", "c", "d"):
        world.ask(id, None)
    world.run()
    assert [id for id in world.heard if world.ended(id)] == ["a", "b", "c", "d"]
    assert not world.engine.busy  # it sleeps until it is woken
    load = world.engine.load()
    assert (load.waiting, load.waiting_tokens) == (1, 3)
    smith.finish(smith.orders[0])
    world.step()
    assert world.heard["bound"]
    world.run()
    assert world.status("bound") == 200
    world.engine.close()
    assert smith.closed


def test_a_bad_grammar_fails_its_own_request() -> None:
    smith = ManualSmith()
    world = World(smith)
    for id in ("good", "bad"):
        world.ask(id)
    good, bad = smith.orders
    smith.finish(bad, BadRequest("the regex cannot be used"))
    smith.finish(good)
    world.step()
    world.run()
    assert (world.status("good"), world.status("bad")) == (200, 400)


def test_who_waits_for_a_grammar_fills_the_queue() -> None:
    world = World(ManualSmith(), max_waiting=2)
    for id in ("a", "b", "c"):
        world.ask(id)
    assert world.status("c") == 503


def test_a_verdict_on_an_earlier_bearer_of_the_name() -> None:
    """Ids may be used again: what is said of the one that was aborted is not said of the new one."""
    smith = ManualSmith()
    world = World(smith)
    world.ask("r")
    world.listen(world.engine.handle(Abort("r")))
    (old,) = smith.orders
    assert not old.held
    world.ask("r", None)
    smith.finish(old, BadRequest("bad"))
    world.step()
    world.run()
    assert world.status("r") == 200


operations = st.one_of(
    st.tuples(st.just("ask"), st.booleans(), st.sampled_from([None, 1.0, 3.0])),
    st.tuples(st.just("ask"), st.booleans(), st.none()),
    st.tuples(st.just("abort"), st.integers(0, 9)),
    st.tuples(st.just("finish"), st.integers(0, 9), st.booleans()),
    st.tuples(st.just("step")),
    st.tuples(st.just("tick")),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(operations, max_size=40))
def test_every_history_ends_well(history: list[tuple]) -> None:  # type: ignore[type-arg]
    smith, clock = ManualSmith(), ManualClock(100.0)
    world, failing = World(smith, clock=clock), set()

    def finish(sequence: Sequence, fails: bool) -> None:
        if fails and sequence.held:
            failing.add(sequence.id)
        smith.finish(sequence, BadRequest("bad") if fails else None)

    for operation in history:
        match operation:
            case ("ask", structured, patience):
                deadline = None if patience is None else clock.now() + patience
                world.ask(f"r{len(world.heard)}", DIGITS if structured else None, deadline)
            case ("abort", index):
                world.listen(world.engine.handle(Abort(f"r{index}")))
            case ("finish", index, fails) if smith.orders:
                finish(smith.orders[index % len(smith.orders)], fails)
            case ("step",):
                world.step()
            case ("tick",):
                clock.advance(1.0)
    world.step()
    for sequence in list(smith.orders):
        finish(sequence, False)
    world.step()
    world.run()
    assert all(world.ended(id) for id in world.heard)
    assert all(world.status(id) in ((400, 499, 504) if id in failing else (200, 499, 503, 504)) for id in world.heard)
    assert not world.engine._held
    assert world.scheduler.pool.free == world.scheduler.pool.total


# --- with the real library -----------------------------------------------------------------------------------------

LARGE = Grammar(
    "json_schema",
    json.dumps({"properties": {f"k{i}": {"enum": [f"{i} {j}" for j in range(100)]} for i in range(400)}}),
)
"""Takes a good part of a second."""


def test_streams_go_on_while_a_large_schema_is_compiled(directory: Path) -> None:
    woken = threading.Event()
    grammars = Grammars(directory)
    grammars.bind(VOCAB, [EOS])
    world = World(Smith(grammars, woken.set))
    started = time.monotonic()
    world.ask("large", LARGE)
    count, longest, before = 0, 0.0, started
    while not world.heard["large"]:
        assert time.monotonic() < started + 60
        world.ask(f"r{count}", None)
        world.run()
        assert world.status(f"r{count}") == 200
        now = time.monotonic()
        count, longest, before = count + 1, max(longest, now - before), now
    took = time.monotonic() - started
    world.run()
    world.engine.close()
    assert world.status("large") == 200
    assert count > 10
    assert longest < max(took / 2, 0.05), "somebody waited for the compiler"


def test_a_known_grammar_holds_nobody(directory: Path) -> None:
    woken = threading.Event()
    grammars = Grammars(directory)
    grammars.bind(VOCAB, [EOS])
    smith = Smith(grammars, woken.set)
    first, second = bound("first"), bound("second")
    smith.begin(first)
    assert finished(smith, woken) == [(first, None)]
    smith.begin(second)
    assert not second.held
    assert second.prepared is first.prepared
    smith.close()


def test_what_is_prepared_is_never_compiled_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if so many other grammars came meanwhile that it is forgotten."""
    woken = threading.Event()
    grammars = Grammars(directory)
    grammars.bind(VOCAB, [EOS])
    smith = Smith(grammars, woken.set)
    one = bound()
    smith.begin(one)
    finished(smith, woken)
    for number in range(COMPILED):
        grammars.compile(Grammar("regex", f"x{number}"))
    assert grammars.compiled(DIGITS) is None
    monkeypatch.setattr(grammars, "compile", lambda grammar: pytest.fail("compiled in the engine's thread"))
    assert 0 < grammars.allowed(one).sum() <= 10
    smith.close()


@pytest.mark.parametrize("source", ["(a", "[" * 1000])
def test_a_bad_grammar_is_refused_with_what_the_library_says(directory: Path, source: str) -> None:
    woken = threading.Event()
    grammars = Grammars(directory)
    grammars.bind(VOCAB, [EOS])
    smith = Smith(grammars, woken.set)
    smith.begin(bound(grammar=Grammar("regex", source)))
    ((_, error),) = finished(smith, woken)
    assert isinstance(error, BadRequest)
    assert "the regex cannot be used" in error.message
    assert error.param is None
    smith.close()


def test_an_engine_without_a_tokenizer_says_so_before_it_computes_anything() -> None:
    woken = threading.Event()
    world = World(Smith(NoGrammars(), woken.set))
    world.ask("r")
    assert woken.wait(10)
    world.step()
    assert world.status("r") == 400
    assert world.runner.steps == 0
    world.engine.close()
