"""Who may start now, who waits, who is refused: bounded work in flight, a fair queue, early refusal. docs/overload.md

    claim = Claim(prompt_tokens=900, key="alice", notify=wake)
    verdict = admission.ask(claim, now)    ADMITTED, QUEUED (`notify` is called when the verdict changes) or Refused
    admission.prefilled(claim, now)        its prompt is computed: the prefill side has room again
    admission.done(claim, now)             it is over, however it went: in a `finally`

No clock and no I/O: time is a parameter, and somebody calls `tick` at `next_deadline`.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from baton.base.errors import ConfigError
from baton.gateway.fairqueue import FairQueue

Stage = Literal["new", "waiting", "prefill", "decode", "over"]

UNBOUNDED = sys.maxsize
NO_WORKERS = "no worker is usable"
RETRY_WITHOUT_WORKERS = 5
"""Seconds: one comes back within a few health checks, or not soon."""
LONGEST_RETRY = 60
HORIZON = 30.0
"""Seconds over which throughput is averaged."""
EVIDENCE = 1.0
"""Seconds of waiting that must have been seen before throughput is believed."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What is in flight at most, per usable worker (0: unbounded), and how long others may wait for it."""

    prefill_tokens: int = 131_072
    """Prompt tokens."""
    prefill_requests: int = 256
    decode_sequences: int = 256
    queue_size: int = 1024
    """Requests that wait, in the whole gateway."""
    queue_timeout: float = 30.0
    """Seconds one may wait."""
    ttft_objective: float = math.inf
    """Seconds; who would wait longer is refused at once."""
    ageing: float = 5.0
    """Seconds without a turn after which a lower priority has one."""

    def __post_init__(self) -> None:
        for limit in dataclasses.fields(self):
            if not getattr(self, limit.name) >= 0:
                raise ConfigError(f"{limit.name} is {getattr(self, limit.name)}; it must not be negative")


@dataclass(frozen=True, slots=True)
class Admitted:
    """Go on; `done` gives back."""


@dataclass(frozen=True, slots=True)
class Queued:
    """Wait for `notify`."""


@dataclass(frozen=True, slots=True)
class Refused:
    status: Literal[429, 503]
    """429: too much is asked for; 503: nobody is there to serve it."""
    retry_after: int
    """Seconds, at least 1."""
    reason: str


Verdict = Admitted | Queued | Refused
ADMITTED = Admitted()
QUEUED = Queued()


@dataclass(slots=True, eq=False)
class Claim:
    """What one request asks for. Made for one `ask`; only `Admission` changes it."""

    prompt_tokens: int
    sequences: int = 1
    """Decoded at once: prompts x n."""
    output_tokens: int = 0
    """At most, over all sequences, if known. Counts for fair sharing and the estimate, not for the limits."""
    key: str = ""
    """Whose it is: what is shared is shared between keys."""
    weight: float = 1.0
    priority: int = 0
    """Higher goes first."""
    deadline: float = math.inf
    """When its client gives up, on the same clock as `now`."""
    notify: Callable[[], None] | None = None
    """Called once after `QUEUED`, when `verdict` has become `ADMITTED` or `Refused`. Must not raise."""
    verdict: Verdict | None = None
    """None before it is asked for."""
    tokens: int = field(init=False)
    """What it costs in the queue."""
    stage: Stage = field(init=False, default="new")

    def __post_init__(self) -> None:
        self.tokens = max(1, self.prompt_tokens + self.output_tokens)


@dataclass(slots=True)
class InFlight:
    """What has been admitted and is not over."""

    prefill_tokens: int = 0
    prefill_requests: int = 0
    """Whose prompts are not computed yet."""
    decode_sequences: int = 0


class Throughput:
    """Tokens per second that get through while somebody waits: an exponentially weighted mean over `HORIZON` seconds.

    Idle time says nothing of what the workers can do, so it counts neither way; it only makes what is known older.
    """

    __slots__ = ("_at", "_seconds", "_tokens")

    def __init__(self) -> None:
        self._at = -math.inf
        self._seconds = 0.0
        self._tokens = 0.0

    def elapse(self, now: float, *, busy: bool) -> None:
        """Time has passed; `busy`: somebody waited all the while."""
        kept = math.exp((self._at - now) / HORIZON)
        self._at = now
        self._tokens *= kept
        self._seconds *= kept
        if busy:
            self._seconds += HORIZON * (1.0 - kept)

    def passed(self, tokens: int) -> None:
        self._tokens += tokens

    def scale(self, factor: float) -> None:
        """There are `factor` times as many workers from now on."""
        self._tokens *= factor

    def seconds_for(self, tokens: float) -> float:
        """How long `tokens` will take; 0 while too little is known."""
        if self._seconds < EVIDENCE or self._tokens <= 0.0:
            return 0.0
        return tokens * self._seconds / self._tokens


class Admission:
    """The one door to the workers. Nobody is there before the first `resize`."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self.used = InFlight()
        self.room = InFlight()
        """What may be in flight. One claim that is larger than that may be, alone."""
        self._limits = limits
        self._workers = (0, 0)
        self._open = False
        self._queue: FairQueue[Claim] = FairQueue(limits.ageing)
        self._expiry: list[tuple[float, int, Claim]] = []
        """(when, order, claim); who no longer waits is dropped when it comes up."""
        self._order = itertools.count()
        self._throughput = Throughput()

    @property
    def waiting(self) -> int:
        return self._queue.waiting

    def ask(self, claim: Claim, now: float) -> Verdict:
        """May it start? The usual case, room and nobody waiting, takes a microsecond."""
        if not self._queue.waiting and self._fits(claim):
            self._start(claim)
            claim.verdict = ADMITTED
            return ADMITTED
        if not self._open:
            claim.stage = "over"
            claim.verdict = Refused(503, RETRY_WITHOUT_WORKERS, NO_WORKERS)
            return claim.verdict
        return self._line_up(claim, now)

    def prefilled(self, claim: Claim, now: float) -> None:
        """Its prompts are computed. Optional: without it the prefill side is taken until `done`."""
        if claim.stage == "prefill":
            claim.stage = "decode"
            self.used.prefill_tokens -= claim.prompt_tokens
            self.used.prefill_requests -= 1
            self._released(now)

    def done(self, claim: Claim, now: float) -> None:
        """It is over, or its client left while it waited. A second time, and after a refusal, it does nothing."""
        stage, used = claim.stage, self.used
        if stage == "waiting":
            self.withdraw(claim, now)
            return
        claim.stage = "over"
        if stage == "prefill":
            used.prefill_tokens -= claim.prompt_tokens
            used.prefill_requests -= 1
        elif stage != "decode":
            return
        used.decode_sequences -= claim.sequences
        self._released(now)

    def withdraw(self, claim: Claim, now: float) -> None:
        """It waits no longer; `notify` is not called. Does nothing if it does not wait."""
        if claim.stage == "waiting":
            self._observe(now)
            claim.stage = "over"
            self._queue.remove(claim)
            self._pump(now)

    def resize(self, prefill_workers: int, decode_workers: int, now: float) -> None:
        """So many are usable from now on; one that does both counts on both sides. What is in flight stays, and those
        who wait wait on, even if nobody is left."""
        if (prefill_workers, decode_workers) == self._workers:
            return
        self._observe(now)
        (prefill, decode), limits = self._workers, self._limits
        self._workers = (prefill_workers, decode_workers)
        self._open = prefill_workers > 0 and decode_workers > 0
        if prefill and decode and self._open:
            self._throughput.scale(min(prefill_workers / prefill, decode_workers / decode))
        self.room = InFlight(
            _times(limits.prefill_tokens, prefill_workers),
            _times(limits.prefill_requests, prefill_workers),
            _times(limits.decode_sequences, decode_workers),
        )
        self._pump(now)

    def next_deadline(self) -> float | None:
        """When `tick` is due; None: not before somebody waits."""
        heap = self._expiry
        while heap and heap[0][2].stage != "waiting":
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def tick(self, now: float) -> None:
        """Refuse those who have waited too long."""
        self._observe(now)
        while (due := self.next_deadline()) is not None and due <= now:
            claim = heapq.heappop(self._expiry)[2]
            self._refuse(claim, "its time in the queue was over before there was room for it")
        self._pump(now)

    def expected_wait(self, tokens: float) -> float:
        """Seconds until `tokens` tokens of claims have left the queue, as far as is known; 0 if nothing is."""
        return self._throughput.seconds_for(tokens)

    def _line_up(self, claim: Claim, now: float) -> Verdict:
        """Wait; unless it is its turn at once, it would wait too long, or the queue is full."""
        queue, limits = self._queue, self._limits
        self._observe(now)
        claim.stage = "waiting"
        queue.push(claim, now)
        self._pump(now)
        if claim.verdict is None and queue.waiting > 1:  # one may always try: it shows what gets through
            patience = min(limits.queue_timeout, limits.ttft_objective, claim.deadline - now)
            wait = self.expected_wait(queue.before(claim))
            if wait > patience:
                self._refuse(claim, f"it would wait about {wait:.1f} s for its turn, which is too long")
        if claim.verdict is None and queue.waiting > limits.queue_size:
            self._refuse(queue.victim(claim), f"more than {limits.queue_size} requests would wait, the limit here")
            self._pump(now)
        if claim.verdict is None:
            claim.verdict = QUEUED
            self._expire_at(min(now + limits.queue_timeout, claim.deadline), claim)
        return claim.verdict

    def _released(self, now: float) -> None:
        if self._queue.waiting:
            self._observe(now)
            self._pump(now)

    def _observe(self, now: float) -> None:
        self._throughput.elapse(now, busy=self._open and self._queue.waiting > 0)

    def _pump(self, now: float) -> None:
        """Let in those whose turn it is. Whoever is next waits until there is room for it; nobody overtakes it."""
        while (claim := self._queue.head(now)) is not None and self._fits(claim):
            self._queue.serve(claim, now)
            self._throughput.passed(claim.tokens)
            self._start(claim)
            _tell(claim, ADMITTED)

    def _fits(self, claim: Claim) -> bool:
        """Is there room, or would it be alone on the side where it is too large?"""
        if not self._open:
            return False
        used, room = self.used, self.room
        prefill = not used.prefill_requests or (
            used.prefill_requests < room.prefill_requests
            and used.prefill_tokens + claim.prompt_tokens <= room.prefill_tokens
        )
        return prefill and (
            not used.decode_sequences or used.decode_sequences + claim.sequences <= room.decode_sequences
        )

    def _start(self, claim: Claim) -> None:
        claim.stage, used = "prefill", self.used
        used.prefill_tokens += claim.prompt_tokens
        used.prefill_requests += 1
        used.decode_sequences += claim.sequences

    def _refuse(self, claim: Claim, reason: str) -> None:
        """Somebody who waits."""
        wait = self.expected_wait(self._queue.before(claim))
        self._queue.remove(claim)
        claim.stage = "over"
        if self._open:
            _tell(claim, Refused(429, min(LONGEST_RETRY, max(1, math.ceil(wait))), reason))
        else:
            _tell(claim, Refused(503, RETRY_WITHOUT_WORKERS, NO_WORKERS))

    def _expire_at(self, when: float, claim: Claim) -> None:
        heap = self._expiry
        if len(heap) > 2 * self._queue.waiting + 64:
            heap[:] = [entry for entry in heap if entry[2].stage == "waiting"]
            heapq.heapify(heap)
        heapq.heappush(heap, (when, next(self._order), claim))


def _tell(claim: Claim, verdict: Verdict) -> None:
    """Whoever is still inside `ask` reads the verdict there."""
    asleep, claim.verdict = claim.verdict is not None, verdict
    if asleep and claim.notify is not None:
        claim.notify()


def _times(limit: int, workers: int) -> int:
    return limit * workers if limit else UNBOUNDED
