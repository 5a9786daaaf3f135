"""What a run says, computed from what was recorded of each request. Pure: no clock, no I/O.

Definitions (t_0 = the client begins to send, a handshake included where a connection is new; chunk = a server-sent
event with new content, stamped when the socket was read):

====== ===========================================================================================================
TTFT   t(first chunk) - t_0. With prefill and decode apart it holds everything: both queues, prefill, hand-off,
       the first step.
TTST   t(second chunk) - t_0: time to the second token. A server that streams the first token early and then waits
       for its hand-off looks good in TTFT and shows here.
E2E    t(last chunk) - t_0; without streaming: until the whole answer is there.
TPOT   (E2E - TTFT) / (N - 1), one value per request with N > 1 output tokens.
ITL    every gap between two chunks of one request, all requests together. Chunks that arrive in one read have a gap
       of 0; text that the server holds back (half a character) lengthens a gap. Both are what the user sees.
late   t_0 - due, when requests have a due time (open loop): how late the generator sent, because the concurrency
       cap was full or it had no CPU. `ttft_due` is TTFT counted from the due time: waiting in front of the door
       is waiting too, and a generator that leaves it out flatters a slow server (coordinated omission).
====== ===========================================================================================================

Throughput divides by the time from the first send to the last arrival. Goodput is completed requests per second that
meet every given objective: TTFT from the due time, TPOT, and the longest gap. Attainment is their share of all
requests that were sent, the failed ones included. N is the server's `usage`; where it gives none, chunks are counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

INTERRUPTED = "interrupted"
"""The error of requests that we cancelled ourselves (Ctrl-C): neither completed nor failed."""


@dataclass(slots=True)
class Record:
    """One request. Times are seconds since the start of the run."""

    index: int
    due: float | None
    prompt_len: int
    """As sent (for text prompts: about)."""
    asked_len: int
    sent: float = 0.0
    chunks: list[float] = field(default_factory=list)
    """When each piece of content arrived."""
    finished: float = 0.0
    """The end of the answer."""
    status: int = 0
    error: str = ""
    """Kind of failure, one word; empty: completed."""
    detail: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    counted: bool = False
    """`output_tokens` was counted from chunks; the server did not say."""

    @property
    def completed(self) -> bool:
        return not self.error

    @property
    def late(self) -> float:
        return 0.0 if self.due is None else max(0.0, self.sent - self.due)

    @property
    def ttft(self) -> float | None:
        return self.chunks[0] - self.sent if self.chunks else None

    @property
    def ttft_due(self) -> float | None:
        return None if self.ttft is None else self.ttft + self.late

    @property
    def ttst(self) -> float | None:
        return self.chunks[1] - self.sent if len(self.chunks) > 1 else None

    @property
    def e2e(self) -> float:
        return (self.chunks[-1] if self.chunks else self.finished) - self.sent

    @property
    def tpot(self) -> float | None:
        if self.ttft is None or self.output_tokens < 2:
            return None
        return (self.e2e - self.ttft) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.chunks)]


@dataclass(frozen=True, slots=True)
class Stats:
    """A distribution, in milliseconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Iterable[float | None]) -> Stats | None:
        """None where there is nothing to measure; a missing value is not a zero."""
        values = sorted(value * 1000 for value in seconds if value is not None)
        if not values:
            return None
        mean = math.fsum(values) / len(values)
        p50, p90, p99 = (percentile(values, q) for q in (50, 90, 99))
        return cls(len(values), mean, p50, p90, p99, values[-1])


def percentile(ordered: Sequence[float], q: float) -> float:
    """Linear between the two nearest ranks, as NumPy does. `ordered` is sorted and not empty."""
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Objectives:
    """Service level, in milliseconds; 0: not judged."""

    ttft: float = 0.0
    tpot: float = 0.0
    itl: float = 0.0

    @property
    def given(self) -> bool:
        return bool(self.ttft or self.tpot or self.itl)

    def met(self, record: Record) -> bool:
        """A value that does not exist (no streaming, one token) cannot miss its objective, except TTFT."""
        if not record.completed:
            return False
        judged = (
            (self.ttft, record.ttft_due if record.ttft_due is not None else record.e2e + record.late),
            (self.tpot, record.tpot),
            (self.itl, max(record.gaps, default=None)),
        )
        return all(not limit or value is None or value * 1000 <= limit for limit, value in judged)


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in numbers. Times in ms unless the name says seconds."""

    sent: int
    completed: int
    failed: int
    interrupted: int
    errors: dict[str, int]
    seconds: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    counted: int
    """Requests whose output tokens are counted chunks."""
    requests_per_s: float
    input_tok_per_s: float
    output_tok_per_s: float
    ttft: Stats | None
    ttft_due: Stats | None
    """None in a closed loop, where nothing is due."""
    ttst: Stats | None
    tpot: Stats | None
    itl: Stats | None
    e2e: Stats | None
    late: Stats | None
    goodput_per_s: float | None
    """None without objectives."""
    attainment: float | None


def summarize(records: Sequence[Record], objectives: Objectives | None = None) -> Summary:
    """Latencies are those of completed requests; failed ones count as errors and against attainment."""
    objectives = objectives or Objectives()
    done = [record for record in records if record.completed]
    errors = Counter(record.error for record in records if record.error)
    interrupted = errors.pop(INTERRUPTED, 0)
    seconds = _span(records)
    output = sum(record.output_tokens for record in done)
    prompt = sum(record.prompt_tokens for record in done)
    open_loop = [record for record in done if record.due is not None]
    good = sum(map(objectives.met, records)) if objectives.given else None
    judged = len(records) - interrupted
    return Summary(
        sent=len(records),
        completed=len(done),
        failed=errors.total(),
        interrupted=interrupted,
        errors=dict(sorted(errors.items())),
        seconds=seconds,
        prompt_tokens=prompt,
        output_tokens=output,
        cached_tokens=sum(record.cached_tokens for record in done),
        counted=sum(record.counted for record in done),
        requests_per_s=_per_second(len(done), seconds),
        input_tok_per_s=_per_second(prompt, seconds),
        output_tok_per_s=_per_second(output, seconds),
        ttft=Stats.of(record.ttft for record in done),
        ttft_due=Stats.of(record.ttft_due for record in open_loop),
        ttst=Stats.of(record.ttst for record in done),
        tpot=Stats.of(record.tpot for record in done),
        itl=Stats.of(gap for record in done for gap in record.gaps),
        e2e=Stats.of(record.e2e for record in done),
        late=Stats.of(record.late for record in open_loop),
        goodput_per_s=None if good is None else _per_second(good, seconds),
        attainment=None if good is None or not judged else good / judged,
    )


def _span(records: Sequence[Record]) -> float:
    """From the first send to the last arrival, failed requests included: they took the server's time too."""
    if not records:
        return 0.0
    return max(record.finished for record in records) - min(record.sent for record in records)


def _per_second(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
