"""The scheduler with roles around it: pages that others hold, sequences that come with their prompt computed."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from baton.base.clock import ManualClock
from baton.base.errors import BadRequest, BatonError
from baton.base.messages import Generate, Sampling, ToFront
from baton.engine.blocks import PagePool
from baton.engine.engine import Engine
from baton.engine.roles import Committer, Unified
from baton.engine.scheduler import Scheduler, rank
from baton.engine.sequence import Sequence
from baton.engine.sockets import EchoRunner, HandoffLoad, Slice

from .kv_memory import MemoryRunner


def scheduler_of(pages: int, page_size: int = 2, chunk: int = 4, max_running: int = 8) -> Scheduler:
    return Scheduler(
        PagePool(pages), page_size=page_size, max_running=max_running, max_waiting=9, chunk=chunk, max_model_len=99
    )


def sequence_of(id: str, tokens: list[int], max_tokens: int = 4, priority: int = 0) -> Sequence:
    return Sequence(id, list(tokens), len(tokens), Sampling(max_tokens), priority=priority)


def step(scheduler: Scheduler, runner: EchoRunner) -> list[Sequence]:
    """Compute a batch and append its tokens; what is finished leaves. Returns whom the batch was for."""
    batch = scheduler.next_batch()
    results = runner.run(batch) if batch else []
    for piece, result in zip(batch, results, strict=True):
        scheduler.advance(piece)
        if result.token is not None:
            piece.sequence.tokens.append(result.token)
            if piece.sequence.output_len == piece.sequence.sampling.max_tokens:
                scheduler.remove(piece.sequence)
    return [piece.sequence for piece in batch]


tokens = st.lists(st.sampled_from([1, 1, 1, 2]), min_size=1, max_size=9)
priorities = st.sampled_from([0, 0, 0, 1, -1])


class RolesMachine(RuleBasedStateMachine):
    """A decode worker (reserve, adopt) and a prefill worker (detach, release) at once, in one tiny pool."""

    @initialize(pages=st.integers(3, 12), size=st.integers(1, 3), chunk=st.integers(1, 6))
    def start(self, pages: int, size: int, chunk: int) -> None:
        self.scheduler = scheduler_of(pages, size, chunk, max_running=4)
        self.runner = MemoryRunner(self.scheduler)
        self.reserved: list[Sequence] = []
        self.detached: list[Sequence] = []
        self.count = 0

    def sequence(self, tokens: list[int], priority: int) -> Sequence | None:
        self.count += 1
        sequence = sequence_of(f"s{self.count}", tokens, 5, priority)
        try:
            self.scheduler.admit(sequence)
        except BatonError:
            return None
        return sequence

    @rule(tokens=tokens, priority=priorities)
    def add(self, tokens: list[int], priority: int) -> None:
        sequence = self.sequence(tokens, priority)
        if sequence is not None and len(self.scheduler.waiting) < 9:
            self.scheduler.add(sequence)

    @rule(tokens=tokens, priority=priorities)
    def reserve(self, tokens: list[int], priority: int) -> None:
        sequence = self.sequence(tokens, priority)
        if sequence is None:
            return
        free, users = self.scheduler.pool.free, self.scheduler.pool.users
        if self.scheduler.reserve(sequence):
            assert len(sequence.pages) * self.scheduler.page_size >= sequence.prompt_len
            assert sequence.cached_len < sequence.prompt_len
            self.reserved.append(sequence)
        else:
            assert not sequence.pages
            assert (self.scheduler.pool.free, self.scheduler.pool.users) == (free, users)

    @rule(which=st.integers(0, 20), arrives=st.booleans())
    def the_prompt_arrives_or_is_lost(self, which: int, arrives: bool) -> None:
        if which >= len(self.reserved):
            return
        sequence = self.reserved.pop(which)
        if not arrives:
            self.scheduler.release(sequence)
            return
        self.runner.write(sequence, sequence.cached_len, sequence.prompt_len)
        sequence.computed_len = sequence.prompt_len
        sequence.tokens.append(sequence.tokens[0])
        self.scheduler.adopt(sequence)

    @rule(which=st.integers(0, 20))
    def hand_over(self, which: int) -> None:
        if which < len(self.scheduler.running):
            sequence = self.scheduler.running[which]
            self.scheduler.detach(sequence)
            self.detached.append(sequence)

    @rule(which=st.integers(0, 20))
    def handed_over(self, which: int) -> None:
        if which < len(self.detached):
            sequence = self.detached.pop(which)
            self.scheduler.release(sequence)
            self.scheduler.release(sequence)

    @rule(which=st.integers(0, 20))
    def abort(self, which: int) -> None:
        everybody = list(self.scheduler)
        if which < len(everybody):
            self.scheduler.remove(everybody[which])

    @rule()
    def flush(self) -> None:
        self.scheduler.flush()

    @rule(count=st.integers(1, 5))
    def steps(self, count: int) -> None:
        for _ in range(count):
            step(self.scheduler, self.runner)

    @invariant()
    def audit(self) -> None:
        scheduler = self.scheduler
        scheduler.pool.check()
        held = [*scheduler.running, *self.reserved, *self.detached]
        assert scheduler.pool.users == sum(len(sequence.pages) for sequence in held)
        scheduler.check(len(self.reserved) + len(self.detached))
        assert scheduler.running == sorted(scheduler.running, key=rank)
        assert scheduler.waiting == sorted(scheduler.waiting, key=rank)

    def teardown(self) -> None:
        """With everything given back that was elsewhere, the rest runs to its end."""
        if not hasattr(self, "scheduler"):
            return
        for sequence in [*self.reserved, *self.detached]:
            self.scheduler.release(sequence)
        bound = sum(s.total_len + s.sampling.max_tokens for s in self.scheduler) * (1 + len(list(self.scheduler)))
        for _ in range(bound):
            step(self.scheduler, self.runner)
        assert not list(self.scheduler)
        self.scheduler.check()
        assert self.scheduler.pool.free == self.scheduler.pool.total


TestRoles = RolesMachine.TestCase
TestRoles.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def adopted(scheduler: Scheduler, id: str, prompt: list[int], max_tokens: int = 4) -> Sequence:
    sequence = sequence_of(id, prompt, max_tokens)
    assert scheduler.reserve(sequence)
    sequence.computed_len = sequence.prompt_len
    sequence.tokens.append(0)
    scheduler.adopt(sequence)
    return sequence


def test_a_long_local_prompt_does_not_hold_up_those_that_decode() -> None:
    scheduler = scheduler_of(pages=50, chunk=4)
    long = sequence_of("long", list(range(20)))
    scheduler.add(long)
    step(scheduler, EchoRunner())
    decoding = adopted(scheduler, "decoding", [1, 2, 3])
    for _ in range(3):
        assert step(scheduler, EchoRunner()) == [long, decoding]


def test_a_prompt_is_computed_in_chunks_between_decodes() -> None:
    scheduler = scheduler_of(pages=50, chunk=4)
    adopted(scheduler, "decoding", [1, 2, 3], 9)
    scheduler.add(sequence_of("long", list(range(10))))
    sizes = []
    for _ in range(4):
        batch = scheduler.next_batch()
        sizes.append([(piece.start, piece.count, piece.sample) for piece in batch][1:])
        for piece in batch:
            scheduler.advance(piece)
            if piece.sample:
                piece.sequence.tokens.append(0)
    assert sizes == [[(0, 4, False)], [(4, 4, False)], [(8, 2, True)], [(10, 1, True)]]


def test_the_budget_is_shared_by_prompts_in_order() -> None:
    scheduler = scheduler_of(pages=50, chunk=8)
    for length in (3, 4, 6):
        scheduler.add(sequence_of(f"s{length}", list(range(length))))
    assert [(p.sequence.id, p.count) for p in scheduler.next_batch()] == [("s3", 3), ("s4", 4), ("s6", 1)]


def test_the_last_token_of_a_known_prompt_is_computed_again() -> None:
    scheduler = scheduler_of(pages=20, chunk=20)
    for expected in ((0, 4), (2, 2)):
        scheduler.add(sequence_of("same", [1, 2, 3, 4], 1))
        (piece,) = scheduler.next_batch()
        assert (piece.start, piece.count) == expected
        scheduler.advance(piece)
        scheduler.remove(piece.sequence)


def test_salt_and_prompt_logprobs_keep_to_themselves() -> None:
    scheduler = scheduler_of(pages=20, chunk=20)

    def cached(salt: str, prompt_logprobs: int | None = None) -> int:
        sequence = sequence_of("s", [1, 2, 3, 4, 5], 1)
        sequence.salt, sequence.sampling = salt, Sampling(1, prompt_logprobs=prompt_logprobs)
        scheduler.add(sequence)
        step(scheduler, EchoRunner())
        return sequence.usage_cached_len

    assert [cached("a"), cached("a"), cached("b"), cached("a", 0)] == [0, 4, 0, 0]


def test_an_admission_leaves_the_running_their_next_page() -> None:
    """Admitted with the last page, the newcomer would be preempted one step later, its work in vain."""
    scheduler = scheduler_of(pages=4, page_size=2, chunk=8)
    scheduler.add(sequence_of("old", [1, 2, 3, 4], 4))
    step(scheduler, EchoRunner())
    scheduler.add(sequence_of("new", [5, 6], 2))
    while list(scheduler):
        step(scheduler, EchoRunner())
    assert scheduler.retractions == 0


def test_what_was_preempted_comes_back_when_all_of_it_fits() -> None:
    """Else it would compute its first chunks again and again while somebody else holds the pages for the rest."""
    scheduler = scheduler_of(pages=6, page_size=1, chunk=2)
    scheduler.prefix_caching = False  # its own first pages, still cached, would hide the difference
    held = scheduler.pool.take(3)
    sequence = sequence_of("s", [1, 2, 3, 4, 5], 1)
    scheduler.add(sequence)
    assert step(scheduler, EchoRunner()) == [sequence]
    for _ in range(3):
        assert step(scheduler, EchoRunner()) == []
    assert scheduler.retractions == 1
    scheduler.pool.give_back(held)
    while list(scheduler):
        assert step(scheduler, EchoRunner()) == [sequence]
    assert scheduler.retractions == 1


def test_what_was_preempted_comes_back_before_new_reservations() -> None:
    scheduler = scheduler_of(pages=6, page_size=1, chunk=8)
    elder = adopted(scheduler, "elder", [1, 2], 4)
    younger = adopted(scheduler, "younger", [3], 5)
    while not scheduler.retractions:
        step(scheduler, EchoRunner())
    assert scheduler.waiting == [younger]
    scheduler.remove(elder)
    late = sequence_of("late", [5])
    assert not scheduler.reserve(late)
    assert step(scheduler, EchoRunner()) == [younger]
    scheduler.remove(younger)
    assert scheduler.reserve(late)


class Holding(Unified):
    """Some pages are with a hand-off until a peer says so."""

    held: list[int]

    def poll(self) -> list[ToFront]:
        if self.committer.clock.now() >= 1.0:
            self.scheduler.pool.give_back(self.held)
            self.held = []
            self.handoffs = HandoffLoad()
        return []


def test_waiting_for_a_hand_offs_pages_neither_spins_nor_stalls() -> None:
    clock, scheduler, runner = ManualClock(), scheduler_of(pages=4), EchoRunner()
    role = Holding(scheduler, Committer(scheduler, runner, (), clock))
    role.held, role.handoffs = scheduler.pool.take(3), HandoffLoad(open=1)
    engine = Engine(scheduler, runner, role, clock)
    engine.handle(Generate("r", (1, 2, 3, 4), Sampling(2)))
    assert engine.busy
    assert engine.step() == []
    assert not engine.busy  # the loop sleeps until the hand-off wakes it
    engine.audit()
    clock.advance(1.0)
    spoken = engine.step()
    assert engine.busy
    while engine.busy:
        spoken += engine.step()
    assert len(spoken) == 2
    engine.audit()


def test_the_audit_finds_a_leak() -> None:
    scheduler = scheduler_of(pages=4)
    lost = scheduler.pool.take(1)
    with pytest.raises(AssertionError, match="0 page uses in running sequences"):
        scheduler.check()
    scheduler.check(elsewhere=1)
    scheduler.pool.give_back(lost)
    scheduler.check()


def test_waiting_tokens_are_those_of_prompts() -> None:
    scheduler = scheduler_of(pages=50, chunk=4)
    adopted(scheduler, "decoding", [1, 2, 3])
    scheduler.add(sequence_of("long", list(range(10))))
    step(scheduler, EchoRunner())
    assert scheduler.waiting_tokens == 6


def test_output_that_comes_with_a_request_is_computed_and_counted_as_output() -> None:
    scheduler = scheduler_of(12)
    known, again = [1, 2, 3, 4, 5], [6, 7, 8]
    first = sequence_of("first", [*known, *again], max_tokens=1)
    scheduler.add(first)
    while not first.output_len:
        step(scheduler, EchoRunner())
    second = Sequence("second", [*known, *again], len(known), Sampling(4), resumed=len(again))
    scheduler.add(second)
    (piece,) = scheduler.next_batch()
    assert (second.cached_len, second.usage_cached_len) == (6, 5)  # never more than there is of the prompt
    assert (piece.start, piece.count, piece.sample) == (6, 2, True)
    assert [(part.start, part.count, part.sample, part.is_decode) for part in piece.apart()] == [
        (6, 1, False, True),
        (7, 1, True, True),
    ]
    scheduler.remove(second)
    scheduler.check()


def test_a_slice_over_the_prompts_end_comes_apart() -> None:
    sequence = Sequence("a", list(range(9)), 5, Sampling(9), resumed=4)

    def parts(start: int, count: int) -> list[tuple[int, int, bool]]:
        return [(part.start, part.count, part.sample) for part in Slice(sequence, start, count, True).apart()]

    assert parts(0, 5) == [(0, 5, True)]
    assert parts(2, 5) == [(2, 3, False), (5, 1, False), (6, 1, True)]
    assert parts(7, 2) == [(7, 1, False), (8, 1, True)]


def test_what_is_given_must_leave_room_for_more() -> None:
    scheduler = scheduler_of(60)
    with pytest.raises(BadRequest, match="has 99 tokens"):
        scheduler.add(Sequence("a", [1] * 99, 9, Sampling(95), resumed=90))
