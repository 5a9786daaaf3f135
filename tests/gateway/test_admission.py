"""Admission against a model of it: what is in flight, who waits, who is told what."""

from __future__ import annotations

import dataclasses
import heapq
import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from baton.base.errors import ConfigError
from baton.gateway.admission import (
    ADMITTED,
    LONGEST_RETRY,
    QUEUED,
    Admission,
    AdmissionLimits,
    Claim,
    InFlight,
    Refused,
    Verdict,
)

LIMITS = AdmissionLimits(
    prefill_tokens=100, prefill_requests=4, decode_sequences=6, queue_size=5, queue_timeout=10.0, ageing=2.0
)


def opened(limits: AdmissionLimits = LIMITS) -> Admission:
    admission = Admission(limits)
    admission.resize(1, 1, 0.0)
    return admission


def one_at_a_time(**limits: float) -> Admission:
    """One request runs, others wait."""
    chosen = {"queue_size": 1000, "queue_timeout": 1000.0, "ageing": math.inf, **limits}
    return opened(AdmissionLimits(prefill_tokens=0, prefill_requests=0, decode_sequences=1, **chosen))  # type: ignore[arg-type]


def verdict_of(claim: Claim) -> Verdict | None:
    return claim.verdict  # a call: mypy does not remember what it was before


class Machine(RuleBasedStateMachine):
    """Requests come, go on, end and leave; workers come and go; time passes."""

    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.workers = (1, 1)
        self.admission = opened()
        self.all: list[Claim] = []
        self.told: dict[Claim, int] = {}
        self.left: set[Claim] = set()
        self.hasty: set[Claim] = set()

    @rule(
        target=claims,
        tokens=st.sampled_from([0, 1, 30, 50, 100, 130, 1000]),
        sequences=st.sampled_from([1, 1, 2, 6, 9]),
        key=st.sampled_from("abc"),
        priority=st.integers(-1, 1),
        patience=st.sampled_from([1.0, 5.0, math.inf]),
        hasty=st.booleans(),
    )
    def ask(self, tokens: int, sequences: int, key: str, priority: int, patience: float, hasty: bool) -> Claim:
        weight = {"a": 1.0, "b": 2.0, "c": 0.5}[key]
        claim = Claim(tokens, sequences, 0, key, weight, priority, self.now + patience)
        claim.notify = self.listener(claim)
        self.all.append(claim)
        self.told[claim] = 0
        if hasty:
            self.hasty.add(claim)  # it is over at the moment it may start
        verdict = self.admission.ask(claim, self.now)
        assert claim.verdict is verdict
        assert not self.told[claim], "who asks reads the answer"
        if verdict is ADMITTED:
            self.within_limits(claim)
            if hasty:
                self.admission.done(claim, self.now)
        elif isinstance(verdict, Refused):
            assert verdict.status == (429 if all(self.workers) else 503)
            assert 1 <= verdict.retry_after <= LONGEST_RETRY
        return claim

    def listener(self, claim: Claim) -> Callable[[], None]:
        def told() -> None:
            self.told[claim] += 1
            assert claim.verdict not in (None, QUEUED)
            if claim.verdict is ADMITTED:
                self.within_limits(claim)
                if claim in self.hasty:
                    self.admission.done(claim, self.now)

        return told

    def within_limits(self, claim: Claim) -> None:
        """At the moment a claim starts: no limit is broken, or it is alone on the side where it is too large."""
        used, (prefill, decode) = self.admission.used, self.workers
        assert prefill
        assert decode
        assert used.prefill_requests == 1 or (
            used.prefill_tokens <= LIMITS.prefill_tokens * prefill
            and used.prefill_requests <= LIMITS.prefill_requests * prefill
        )
        assert used.decode_sequences in (claim.sequences, min(used.decode_sequences, LIMITS.decode_sequences * decode))

    @rule(claim=claims)
    def prefilled(self, claim: Claim) -> None:
        self.admission.prefilled(claim, self.now)

    @rule(claim=consumes(claims))
    def done(self, claim: Claim) -> None:
        if claim.verdict is QUEUED:
            self.left.add(claim)
        self.admission.done(claim, self.now)
        self.admission.done(claim, self.now)

    @rule(claim=claims)
    def withdraw(self, claim: Claim) -> None:
        if claim.verdict is QUEUED:
            self.left.add(claim)
        self.admission.withdraw(claim, self.now)

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0, 20.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.admission.tick(self.now)
        due = self.admission.next_deadline()
        assert due is None or due > self.now

    @rule(prefill=st.integers(0, 3), decode=st.integers(0, 3))
    def resize(self, prefill: int, decode: int) -> None:
        self.workers = (prefill, decode)
        self.admission.resize(prefill, decode, self.now)

    @invariant()
    def books_balance(self) -> None:
        prefill = [claim for claim in self.all if claim.stage == "prefill"]
        decode = [claim for claim in self.all if claim.stage in ("prefill", "decode")]
        assert self.admission.used == InFlight(
            sum(claim.prompt_tokens for claim in prefill), len(prefill), sum(claim.sequences for claim in decode)
        )
        waiting = [claim for claim in self.all if claim.verdict is QUEUED and claim not in self.left]
        assert self.admission.waiting == len(waiting) <= LIMITS.queue_size
        assert not waiting or decode or not all(self.workers), "somebody waits for nothing"

    @invariant()
    def everybody_is_told_once(self) -> None:
        for claim in self.all:
            assert self.told[claim] <= 1
            if claim in self.left or claim.verdict is QUEUED:
                assert self.told[claim] == 0

    @invariant()
    def whoever_waits_is_due(self) -> None:
        waits = self.admission.waiting > 0
        due = self.admission.next_deadline()
        assert (due is not None) == waits
        assert due is None or due <= self.now + LIMITS.queue_timeout

    def teardown(self) -> None:
        self.resize(1, 1)
        for _ in self.all:
            for claim in self.all:
                if claim.stage in ("prefill", "decode"):
                    self.admission.done(claim, self.now)
        assert self.admission.used == InFlight()
        assert self.admission.waiting == 0
        assert self.admission.next_deadline() is None
        assert all(claim.verdict is not QUEUED or claim in self.left for claim in self.all)
        self.everybody_is_told_once()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_room_and_nobody_waiting_admits_at_once() -> None:
    admission = opened()
    claim = Claim(60)
    assert admission.ask(claim, 0.0) is ADMITTED
    assert admission.used == InFlight(60, 1, 1)
    admission.prefilled(claim, 1.0)
    assert admission.used == InFlight(0, 0, 1)
    admission.done(claim, 2.0)
    assert admission.used == InFlight()


@pytest.mark.parametrize("large", [Claim(101), Claim(1, sequences=7)], ids=["prompt", "sequences"])
def test_what_is_larger_than_everything_waits_until_it_is_alone_and_is_not_overtaken(large: Claim) -> None:
    admission = opened()
    small = [Claim(10), Claim(10)]
    for claim in small:
        admission.ask(claim, 0.0)
    assert admission.ask(large, 0.0) is QUEUED
    later = Claim(10)
    assert admission.ask(later, 0.0) is QUEUED
    admission.done(small[0], 1.0)
    assert verdict_of(large) is QUEUED
    admission.done(small[1], 2.0)
    assert verdict_of(large) is ADMITTED
    assert verdict_of(later) is QUEUED
    admission.done(large, 3.0)
    assert verdict_of(later) is ADMITTED


def test_room_on_the_prefill_side_comes_back_before_the_end() -> None:
    admission = opened()
    first, second = Claim(80), Claim(80)
    admission.ask(first, 0.0)
    assert admission.ask(second, 0.0) is QUEUED
    admission.prefilled(first, 1.0)
    assert verdict_of(second) is ADMITTED


def test_limits_grow_and_shrink_with_the_workers() -> None:
    admission = opened()
    claims = [Claim(1, sequences=6) for _ in range(3)]
    assert [admission.ask(claim, 0.0) for claim in claims] == [ADMITTED, QUEUED, QUEUED]
    admission.resize(1, 2, 1.0)
    assert [claim.verdict for claim in claims] == [ADMITTED, ADMITTED, QUEUED]
    admission.resize(1, 1, 2.0)
    admission.done(claims[0], 3.0)
    assert verdict_of(claims[2]) is QUEUED, "six are still decoded"
    admission.done(claims[1], 4.0)
    assert verdict_of(claims[2]) is ADMITTED


def test_zero_is_no_limit() -> None:
    admission = opened(AdmissionLimits(prefill_tokens=0, prefill_requests=0, decode_sequences=0))
    assert all(admission.ask(Claim(10**9, sequences=10**6), 0.0) is ADMITTED for _ in range(3))


def test_a_negative_limit_is_the_operators_fault() -> None:
    with pytest.raises(ConfigError, match="queue_size"):
        AdmissionLimits(queue_size=-1)


@pytest.mark.parametrize("workers", [(0, 0), (0, 1), (1, 0)])
def test_without_workers_all_are_refused_at_once(workers: tuple[int, int]) -> None:
    admission = Admission(LIMITS)
    admission.resize(*workers, 0.0)
    verdict = admission.ask(Claim(1), 0.0)
    assert isinstance(verdict, Refused)
    assert verdict.status == 503


def test_who_waits_outlives_the_loss_of_all_workers_up_to_the_queue_timeout() -> None:
    admission = one_at_a_time(queue_timeout=10.0)
    running, luckless, lucky = Claim(1), Claim(1), Claim(1)
    for claim, now in ((running, 0.0), (luckless, 0.0), (lucky, 5.0)):
        admission.ask(claim, now)
    admission.resize(0, 1, 6.0)
    admission.done(running, 7.0)
    assert verdict_of(luckless) is QUEUED
    admission.tick(10.0)
    assert isinstance(luckless.verdict, Refused)
    assert luckless.verdict.status == 503
    admission.resize(1, 1, 11.0)
    assert verdict_of(lucky) is ADMITTED


def test_time_in_the_queue_is_bounded_by_the_timeout_and_the_clients_deadline() -> None:
    admission = one_at_a_time(queue_timeout=10.0)
    patient, hasty = Claim(1), Claim(1, deadline=4.0)
    for claim in (Claim(1), patient, hasty):
        admission.ask(claim, 0.0)
    assert admission.next_deadline() == 4.0
    admission.tick(3.9)
    assert verdict_of(hasty) is QUEUED
    admission.tick(4.0)
    assert isinstance(hasty.verdict, Refused)
    assert hasty.verdict.status == 429
    assert admission.next_deadline() == 10.0
    admission.tick(10.0)
    assert isinstance(patient.verdict, Refused)
    assert admission.next_deadline() is None


@pytest.mark.parametrize("how", ["expires", "leaves"])
def test_when_the_large_one_gives_up_those_behind_it_go_on(how: str) -> None:
    admission = opened()
    admission.ask(Claim(50), 0.0)
    large, small = Claim(90), Claim(40)
    admission.ask(large, 0.0)
    admission.ask(small, 1.0)
    if how == "expires":
        admission.tick(10.0)
        assert isinstance(large.verdict, Refused)
    else:
        admission.withdraw(large, 2.0)
    assert verdict_of(small) is ADMITTED


def test_who_takes_the_place_of_a_large_one_need_not_wait() -> None:
    admission = opened(dataclasses.replace(LIMITS, queue_size=1))
    admission.ask(Claim(50), 0.0)
    large, small = Claim(90, key="light", weight=0.5), Claim(40, key="heavy")
    admission.ask(large, 0.0)
    assert admission.ask(small, 0.0) is ADMITTED
    assert isinstance(large.verdict, Refused)


def test_a_full_queue_refuses_the_newest_of_one_key() -> None:
    admission = one_at_a_time(queue_size=2)
    verdicts = [admission.ask(Claim(1), 0.0) for _ in range(4)]
    assert verdicts[:3] == [ADMITTED, QUEUED, QUEUED]
    assert isinstance(verdicts[3], Refused)
    assert verdicts[3].status == 429


def test_a_key_cannot_lock_others_out_by_filling_the_queue() -> None:
    admission, told = one_at_a_time(queue_size=50), []
    greedy = [Claim(1, key="greedy") for _ in range(51)]
    for claim in greedy:
        claim.notify = lambda claim=claim: told.append(claim)
        admission.ask(claim, 0.0)
    other = Claim(1, key="other")
    assert admission.ask(other, 0.0) is QUEUED
    assert told == [greedy[-1]]
    assert isinstance(greedy[-1].verdict, Refused)
    admission.done(greedy[0], 1.0)
    admission.done(greedy[1], 2.0)
    assert verdict_of(other) is ADMITTED


def test_a_higher_priority_takes_the_place_of_a_lower_one() -> None:
    admission = one_at_a_time(queue_size=1)
    low, high = Claim(1), Claim(1, priority=1)
    for claim in (Claim(1), low, high):
        admission.ask(claim, 0.0)
    assert isinstance(low.verdict, Refused)
    assert verdict_of(high) is QUEUED


def test_without_a_queue_nobody_waits() -> None:
    admission = one_at_a_time(queue_size=0)
    assert admission.ask(Claim(1), 0.0) is ADMITTED
    assert isinstance(admission.ask(Claim(1), 0.0), Refused)
    assert admission.waiting == 0


class Server:
    """Serves one claim per second, `tokens` each, while `backlog` others wait."""

    def __init__(self, admission: Admission, backlog: int, tokens: int = 100) -> None:
        self.admission, self.tokens, self.now = admission, tokens, 0.0
        self.claims = [Claim(tokens, key="backlog") for _ in range(backlog + 1)]
        for claim in self.claims:
            admission.ask(claim, self.now)

    def serve(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1.0
            running = next(claim for claim in self.claims if claim.stage == "prefill")
            self.admission.done(running, self.now)


def test_overload_is_refused_early_with_the_time_it_would_take() -> None:
    admission = one_at_a_time(queue_timeout=30.0)
    server = Server(admission, backlog=40)
    server.serve(20)
    assert admission.expected_wait(1000) == pytest.approx(10.0, rel=0.05)
    assert admission.ask(Claim(100, key="backlog", deadline=server.now + 25.0), server.now) is QUEUED
    verdict = admission.ask(Claim(100, key="backlog", deadline=server.now + 15.0), server.now)
    assert isinstance(verdict, Refused)
    assert verdict.status == 429
    assert verdict.retry_after == pytest.approx(22, abs=1)
    assert "21.6 s" in verdict.reason


def test_early_refusal_looks_at_the_keys_own_share() -> None:
    admission = one_at_a_time(queue_timeout=1000.0, ttft_objective=15.0)
    server = Server(admission, backlog=100)
    server.serve(20)
    assert isinstance(admission.ask(Claim(100, key="backlog"), server.now), Refused)
    assert admission.ask(Claim(100, key="another"), server.now) is QUEUED


def test_retry_after_is_a_minute_at_most() -> None:
    admission = one_at_a_time(ttft_objective=1.0)
    server = Server(admission, backlog=500)
    server.serve(5)
    verdict = admission.ask(Claim(100, key="backlog"), server.now)
    assert isinstance(verdict, Refused)
    assert verdict.retry_after == LONGEST_RETRY


def test_before_anything_is_known_one_may_wait() -> None:
    admission = one_at_a_time(ttft_objective=0.001)
    Server(admission, backlog=100)
    assert admission.waiting == 100


def test_idle_time_is_not_taken_for_slowness_and_old_knowledge_fades() -> None:
    admission = one_at_a_time(ttft_objective=5.0)
    server = Server(admission, backlog=20)
    server.serve(21)
    assert admission.waiting == 0
    assert admission.expected_wait(1000) == pytest.approx(10.0, rel=0.06)
    one = Claim(100)
    for now in (40.0, 60.0):  # seldom requests
        admission.ask(one := Claim(100), now)
        admission.done(one, now + 1.0)
    busy = [Claim(100) for _ in range(3)]
    for claim in busy:
        admission.ask(claim, 70.0)
    assert admission.expected_wait(1000) == pytest.approx(10.0, rel=0.06)
    for claim in busy:
        admission.done(claim, 70.0)
    admission.ask(Claim(100), 300.0)
    admission.ask(Claim(100), 300.0)
    assert admission.expected_wait(1000) == 0.0


def test_after_a_stall_somebody_may_try_again() -> None:
    """A pessimistic estimate cannot last: the first in the queue is not refused for it."""
    admission = one_at_a_time(queue_timeout=20.0)
    server = Server(admission, backlog=3)
    server.serve(2)
    admission.tick(server.now + 19.0)  # nothing moves, and those who wait give up
    assert admission.waiting == 0
    assert admission.expected_wait(1000) > 20.0
    assert admission.ask(Claim(1000), server.now + 19.0) is QUEUED
    assert isinstance(admission.ask(Claim(1000), server.now + 19.0), Refused)


def test_half_the_workers_take_twice_as_long() -> None:
    admission = one_at_a_time()
    admission.resize(2, 2, 0.0)
    server = Server(admission, backlog=30)
    server.serve(10)
    before = admission.expected_wait(1000)
    admission.resize(1, 2, server.now)
    assert admission.expected_wait(1000) == pytest.approx(2 * before)


def test_priority_counts_only_while_somebody_waits_and_low_ones_get_old() -> None:
    admission = one_at_a_time(ageing=5.0)
    running = Claim(1)
    admission.ask(running, 0.0)
    low = Claim(1, priority=-5)
    admission.ask(low, 0.0)
    now = 0.0
    while verdict_of(low) is QUEUED:
        now += 1.0
        high = Claim(1, priority=5)
        admission.ask(high, now)
        admission.done(running, now)
        if verdict_of(high) is ADMITTED:
            running = high
    assert now == 5.0


def test_a_thousand_who_leave_leave_nothing() -> None:
    admission = one_at_a_time(queue_size=10_000)
    admission.ask(Claim(1), 0.0)
    for n in range(1000):
        claim = Claim(1, key=str(n % 7))
        assert admission.ask(claim, float(n)) is QUEUED
        admission.done(claim, float(n))
    assert admission.waiting == 0
    assert len(admission._expiry) < 100
    assert admission.next_deadline() is None


class Simulation:
    """Random arrivals, at `load` times what eight slots serve, at one second each on average."""

    def __init__(self, load: float, limits: AdmissionLimits, seconds: float = 400.0) -> None:
        self.admission = opened(limits)
        self.random = random.Random(7)
        self.now = 0.0
        self.ends: list[tuple[float, int, Claim]] = []
        self.count: Counter[str] = Counter()
        self.waits: list[float] = []
        self.seconds = seconds
        arrival = 0.0
        while self.now < seconds:
            due = self.admission.next_deadline()
            end = self.ends[0][0] if self.ends else math.inf
            self.now = min(arrival, end, math.inf if due is None else due)
            if self.now == arrival:
                self.arrive()
                arrival += self.random.expovariate(8 * load)
            elif self.now == end:
                self.admission.done(heapq.heappop(self.ends)[2], self.now)
                self.count["served"] += 1
            else:
                self.admission.tick(self.now)

    def arrive(self) -> None:
        claim, came = Claim(self.random.randint(10, 2000)), self.now
        claim.notify = lambda: self.start(claim, came) if claim.verdict is ADMITTED else self.count.update(late=1)
        verdict = self.admission.ask(claim, came)
        if verdict is ADMITTED:
            self.start(claim, came)
        elif verdict is not QUEUED:
            self.count["early"] += 1

    def start(self, claim: Claim, came: float) -> None:
        self.waits.append(self.now - came)
        heapq.heappush(self.ends, (self.now + self.random.expovariate(1.0), len(self.waits), claim))


@pytest.mark.parametrize("load", [1.3, 2.0, 5.0])
def test_overload_keeps_the_workers_busy_and_is_mostly_refused_early(load: float) -> None:
    limits = AdmissionLimits(decode_sequences=8, queue_timeout=5.0)
    run = Simulation(load, limits)
    assert run.count["served"] > 0.93 * 8 * run.seconds
    assert run.count["early"] > 2 * run.count["late"]
    assert max(run.waits) <= 5.0


def test_an_objective_is_mostly_kept_under_overload() -> None:
    limits = AdmissionLimits(decode_sequences=8, queue_timeout=60.0, ttft_objective=2.0)
    run = Simulation(2.0, limits)
    assert run.count["served"] > 0.93 * 8 * run.seconds
    assert sorted(run.waits)[len(run.waits) // 2] < 2.0
    assert sorted(run.waits)[int(len(run.waits) * 0.99)] < 4.0


def test_little_load_is_never_refused() -> None:
    run = Simulation(0.7, AdmissionLimits(decode_sequences=8, queue_timeout=5.0))
    assert set(run.count) == {"served"}
