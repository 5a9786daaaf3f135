"""Histories of the whole loop: arrivals, aborts, flushes and time, over pools too small for them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.base.clock import ManualClock
from baton.base.errors import BadRequest, Internal
from baton.base.messages import Abort, Failed, Flush, Flushed, Generate, Load, Probe, Sampling, ToFront, Tokens
from baton.engine.blocks import PagePool
from baton.engine.engine import Engine
from baton.engine.roles import Committer, Unified
from baton.engine.scheduler import Scheduler
from baton.engine.sockets import EchoRunner, Sampled, Slice

from .kv_memory import MemoryRunner

EOS = 7


@dataclass
class World:
    """An engine, what was asked of it and what it said."""

    pages: int = 6
    page_size: int = 2
    chunk: int = 4
    max_running: int = 3
    max_waiting: int = 8
    prefix_caching: bool = True
    asked: dict[str, Generate] = field(default_factory=dict)
    heard: dict[str, list[Tokens]] = field(default_factory=dict)
    failed: dict[str, Failed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock = ManualClock()
        self.pool = PagePool(self.pages)
        self.scheduler = Scheduler(
            self.pool,
            page_size=self.page_size,
            max_running=self.max_running,
            max_waiting=self.max_waiting,
            chunk=self.chunk,
            max_model_len=64,
            prefix_caching=self.prefix_caching,
        )
        self.runner = MemoryRunner(self.scheduler)
        self.committer = Committer(self.scheduler, self.runner, [EOS], self.clock)
        self.engine = Engine(self.scheduler, self.runner, Unified(self.scheduler, self.committer), self.clock)

    def ask(self, tokens: list[int], max_tokens: int, priority: int = 0, deadline: float | None = None) -> str:
        id = f"r{len(self.asked)}"
        request = Generate(id, tuple(tokens), Sampling(max_tokens), priority=priority, deadline=deadline)
        self.asked[id], self.heard[id] = request, []
        self.listen(self.engine.handle(request))
        return id

    def listen(self, messages: list[ToFront]) -> None:
        for message in messages:
            if isinstance(message, Tokens):
                assert message.id not in self.failed
                assert not self.finished(message.id), "a word after the last one"
                self.heard[message.id].append(message)
            elif isinstance(message, Failed):
                assert message.id not in self.failed
                assert not self.finished(message.id)
                self.failed[message.id] = message

    def finished(self, id: str) -> bool:
        return bool(self.heard[id]) and self.heard[id][-1].finish is not None

    def alive(self) -> set[str]:
        return {id for id in self.asked if id not in self.failed and not self.finished(id)}

    def step(self) -> None:
        """One turn of the worker's loop; with work there, an undivided engine always does some of it."""
        self.listen(self.engine.expire())
        alive, steps = self.alive(), self.runner.steps
        assert {sequence.id for sequence in self.scheduler} == alive
        self.listen(self.engine.step())
        assert (self.runner.steps > steps) == bool(alive), "a stall, or work out of nothing"
        assert self.engine.busy or not self.alive()
        self.scheduler.check()

    def run_out(self) -> None:
        """To the end, in a bounded number of steps: the oldest of the first in rank always moves on."""
        alone = [-(-len(r.tokens) // self.chunk) + r.sampling.max_tokens for r in self.asked.values()]
        longest = max((len(r.tokens) + r.sampling.max_tokens for r in self.asked.values()), default=0)
        bound = sum(alone) + len(self.asked) * (longest // self.chunk + 2)
        while self.engine.busy:
            self.step()
            bound -= 1
            assert bound >= 0, "somebody starves"
        assert not self.alive()
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert self.pool.free == self.pool.total
        self.engine.audit()

    def check_answers(self) -> None:
        for id, request in self.asked.items():
            said = [token for message in self.heard[id] for token in message.tokens]
            wanted = echo(request)
            if id in self.failed:
                assert said == wanted[: len(said)]
                continue
            assert said == wanted
            last = self.heard[id][-1]
            assert last.finish is not None
            assert last.finish.reason == ("stop" if EOS in wanted else "length")
            assert last.usage is not None
            assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(request.tokens), len(wanted))
            assert 0 <= last.usage.cached_tokens < len(request.tokens)
            assert self.runner.forgotten.count(id) == 1


def echo(request: Generate) -> list[int]:
    words = [request.tokens[index % len(request.tokens)] for index in range(request.sampling.max_tokens)]
    return words[: words.index(EOS) + 1] if EOS in words else words


# Prompts of few different tokens have prefixes in common; 7 ends an output early.
prompts = st.lists(st.sampled_from([1, 1, 1, 2, EOS]), min_size=1, max_size=9)
arrivals = st.tuples(st.just("ask"), prompts, st.integers(1, 8), st.sampled_from([0, 0, 0, 1, -1]))
operations = st.one_of(
    arrivals,
    arrivals,
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("late"), prompts, st.integers(1, 3)),
    st.tuples(st.just("flush")),
    st.tuples(st.just("tick")),
)
worlds = st.builds(
    World,
    pages=st.integers(2, 12),
    page_size=st.integers(1, 4),
    chunk=st.integers(1, 8),
    max_running=st.integers(1, 5),
    max_waiting=st.integers(1, 8),
    prefix_caching=st.booleans(),
)


def play(world: World, history: list[tuple]) -> None:  # type: ignore[type-arg]
    for operation in history:
        match operation:
            case ("ask", tokens, max_tokens, priority):
                world.ask(tokens, max_tokens, priority)
            case ("late", tokens, seconds):
                world.ask(tokens, 6, deadline=world.clock.now() + seconds)
            case ("step", count):
                for _ in range(count):
                    world.step()
            case ("abort", index):
                id = f"r{index}"
                was_alive = id in world.alive()
                world.listen(world.engine.handle(Abort(id)))
                assert not was_alive or world.failed[id].code == "cancelled"
            case ("flush",):
                (answer,) = world.engine.handle(Flush("f"))
                assert isinstance(answer, Flushed)
                assert world.pool.cached == 0
            case ("tick",):
                world.clock.advance(1.0)


@settings(max_examples=400, deadline=None)
@given(worlds, st.lists(operations, max_size=30))
def test_every_history_ends_well(world: World, history: list[tuple]) -> None:  # type: ignore[type-arg]
    play(world, history)
    world.run_out()
    world.check_answers()


@settings(max_examples=100, deadline=None)
@given(worlds, st.lists(st.tuples(prompts, st.integers(1, 8), st.integers(0, 3)), min_size=1, max_size=8))
def test_the_oldest_is_never_overtaken(world: World, arrivals: list[tuple[list[int], int, int]]) -> None:
    """Among equals in priority, whoever came first is in every batch, first, until it is done."""
    for tokens, max_tokens, steps in arrivals:
        world.ask(tokens, max_tokens)
        for _ in range(steps):
            watch_oldest(world)
    while world.engine.busy:
        watch_oldest(world)
    world.run_out()
    world.check_answers()


def watch_oldest(world: World) -> None:
    alive = sorted(world.alive(), key=lambda id: int(id[1:]))
    before = [sequence for sequence in world.scheduler if sequence.id in alive[:1]]
    progress = [(s.computed_len, s.total_len, s.retractions) for s in before]
    world.step()
    for sequence, (computed, total, retractions) in zip(before, progress, strict=True):
        assert sequence.retractions == retractions
        assert (sequence.computed_len, sequence.total_len) > (computed, total)


def test_higher_priority_first_then_the_older() -> None:
    world = World(max_running=1, pages=20)
    for priority in (0, 2, 1, 2):
        world.ask([1, 2], 1, priority)
    ended = []
    while world.engine.busy:
        world.step()
        ended += [id for id in world.asked if world.finished(id) and id not in ended]
    assert ended == ["r1", "r3", "r2", "r0"]


def test_pages_are_taken_from_the_lowest_priority() -> None:
    """Of three that outgrow the pool, the one that matters least is recomputed, though it is the oldest."""
    world = World(pages=9, page_size=2, chunk=16)
    low = world.ask([1, 2, 3, 4], 10, -1)
    world.step()
    world.ask([2, 2, 3, 4], 10)
    world.ask([3, 2, 3, 4], 10)
    world.run_out()
    world.check_answers()
    retracted = {id: messages[-1].usage.retractions for id, messages in world.heard.items() if messages[-1].usage}
    assert retracted[low] > 0
    assert retracted["r1"] == 0


def test_prompt_logprobs_are_told_once_after_a_preemption_in_the_middle_of_the_prompt() -> None:
    class Logprobs(MemoryRunner):
        def run(self, batch: list[Slice]) -> list[Sampled]:  # type: ignore[override]
            results = super().run(batch)
            return [
                Sampled(r.token, None, tuple(logprob(p.sequence.tokens[i]) for i in positions(p)))
                for p, r in zip(batch, results, strict=True)
            ]

    world = World(pages=6, page_size=2, chunk=4)
    world.engine.runner = world.committer.runner = Logprobs(world.scheduler)
    world.ask([1, 2], 8)
    sampling = Sampling(1, prompt_logprobs=0)
    world.asked["p"], world.heard["p"] = Generate("p", tuple(range(20, 30)), sampling), []
    world.listen(world.engine.handle(world.asked["p"]))
    while world.engine.busy:
        world.listen(world.engine.step())
    (only,) = world.heard["p"]
    assert only.usage is not None
    assert only.usage.retractions > 0
    assert [logprob.token for logprob in only.prompt_logprobs] == list(range(21, 30))


def logprob(token: int):  # type: ignore[no-untyped-def]
    from baton.base.messages import TokenLogprob

    return TokenLogprob(-1.0, token)


def positions(piece: Slice) -> range:
    end = piece.start + piece.count
    return range(piece.start + 1, min(end + 1, piece.sequence.prompt_len))


def test_kv_of_old_weights_is_not_found_after_a_flush() -> None:
    """A sequence that runs through a flush goes on, but nobody else gets what it computes."""
    world = World(pages=20, page_size=2, chunk=3, max_running=1)
    world.ask([1, 2, 3, 4, 5, 6], 8)
    world.step()  # three tokens: a full page, and half of one
    world.engine.handle(Flush("f"))
    while world.engine.busy:
        world.listen(world.engine.step())
    world.runner.weights, world.runner.memory = "2", {}
    for _ in range(3):
        world.ask([1, 2, 3, 4, 5, 6], 8)
        world.run_out()
    world.check_answers()
    cached = [messages[-1].cached_tokens for messages in world.heard.values()]
    assert cached == [0, 0, 4, 4]


class Blaming(EchoRunner):
    """Blames whom it is told to, once."""

    def __init__(self, error: Exception) -> None:
        self.error: Exception | None = error

    def run(self, batch: list[Slice]) -> list[Sampled]:  # type: ignore[override]
        error, self.error = self.error, None
        if error is not None and len(batch) > 1:
            raise error
        self.error = error
        return super().run(batch)


@pytest.mark.parametrize(
    ("error", "victims"),
    [(BadRequest("no such grammar", param="r1"), {"r1"}), (Internal("out of memory"), {"r0", "r1", "r2"})],
)
def test_an_error_of_the_runner_hurts_whom_it_names(error: Exception, victims: set[str]) -> None:
    world = World(pages=20, chunk=20)
    world.engine.runner = Blaming(error)
    for first in (1, 2, 3):
        world.ask([first, 2, 3], 4)
    while world.engine.busy:
        world.listen(world.engine.step())
    assert set(world.failed) == victims
    assert {failed.param for failed in world.failed.values()} == {None}  # ids of ours are no fields of the client's
    assert all(world.finished(id) for id in {"r0", "r1", "r2"} - victims)
    world.engine.audit()
    assert world.pool.free == world.pool.total


def test_a_full_queue_refuses_at_once() -> None:
    world = World(max_waiting=2)
    for _ in range(3):
        world.ask([1], 2)
    assert {id: failed.status for id, failed in world.failed.items()} == {"r2": 503}
    assert world.failed["r2"].retryable
    world.run_out()


@pytest.mark.parametrize(("prompt", "max_tokens", "param"), [(64, 1, "prompt"), (30, 40, "max_tokens")])
def test_what_can_never_fit_is_refused_at_once(prompt: int, max_tokens: int, param: str) -> None:
    world = World(pages=64)
    id = world.ask([1] * prompt, max_tokens)
    assert (world.failed[id].status, world.failed[id].param) == (400, param)
    assert not world.engine.busy or not world.engine.step()


def test_load_counts() -> None:
    world = World(pages=20, chunk=3)
    for _ in range(2):
        world.ask([1, 2, 3, 4, 5], 2)
        world.run_out()
    world.ask([9, 9, 9], 1)
    (load,) = world.engine.handle(Probe("p"))
    assert isinstance(load, Load)
    assert (load.id, load.running, load.waiting, load.waiting_tokens) == ("p", 0, 1, 3)
    assert (load.prompt_tokens, load.cached_tokens, load.generated_tokens) == (5 + 1, 4, 4)
    assert (load.total_pages, load.free_pages, load.cached_pages) == (20, 20, 3)
    world.run_out()


def test_deadlines_are_what_the_loop_may_sleep_until() -> None:
    world = World()
    assert world.engine.next_deadline() is None
    world.ask([1], 2, deadline=5.0)
    world.ask([1], 2, deadline=3.0)
    assert world.engine.next_deadline() == 3.0
    world.clock.advance(4.0)
    world.listen(world.engine.expire())
    assert {id: failed.code for id, failed in world.failed.items()} == {"r1": "timeout"}
    assert world.engine.next_deadline() == 5.0
    world.run_out()
