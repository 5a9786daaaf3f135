"""What a timeline means: its stages, which add up to the whole, and its spans, which may overlap. Pure.

    queue ─ route ─ retry ─ transit ─ [offer ─ prefill_queue ─ prefill ─ transfer ─ decode_queue] ─ decode ─ reply
    gateway          └ lost attempts     └ the workers' own marks, from `Server-Timing`

Workers measure durations, not times: their clocks are theirs. What they say is laid back from the moment when their
first token came to the gateway; what is left between sending and that is `transit` (network, front, tokenizer).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from baton.gateway.timeline import Attempt, Timeline
from baton.router.call import Header
from baton.router.registry import Worker

STAGES = (
    "queue",
    "route",
    "retry",
    "transit",
    "offer",
    "prefill_queue",
    "prefill",
    "transfer",
    "decode_queue",
    "worker",
    "decode",
    "resume",
    "reply",
)
"""All that there are, in the order in which they come."""
SERVER_TIMING = b"server-timing"
GATEWAY = "gateway"
MARK = re.compile(rb"([A-Za-z_-]{1,32})[ \t]*;[ \t]*dur=([0-9]{1,9}(?:\.[0-9]{1,9})?)")
MAX_MARKS = 16


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time in one place."""

    name: str
    lane: str
    """`gateway`, or a worker's name."""
    attempt: int
    """Counts from 1; 0: before any."""
    start: float
    end: float
    """Loop time, in seconds."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Marks:
    """What one worker says it did, in seconds; 0.0: it did not say."""

    queue: float = 0.0
    prefill: float = 0.0
    transfer: float = 0.0
    offer: float = 0.0
    handoff: float = 0.0
    first_token: float = 0.0
    decode: float = 0.0

    @property
    def head(self) -> float:
        """From when the engine had it until its answer's head could go out."""
        return self.first_token + self.decode


NONE = Marks()


def marks(headers: Sequence[Header]) -> Marks:
    """From a worker's headers; what is not understood is left out."""
    found: dict[str, float] = {}
    for name, value in headers:
        if name == SERVER_TIMING:
            for key, milliseconds in MARK.findall(value[:1024])[:MAX_MARKS]:
                found.setdefault(key.decode("ascii"), float(milliseconds) / 1e3)
    return Marks(**{name: found[name] for name in Marks.__slots__ if name in found})


def name(worker: Worker) -> str:
    """Short, stable, and without its address."""
    return f"{worker.role}-{worker.id[:4]}"


def stages(timeline: Timeline, now: float) -> list[Stage]:
    """Where the time went, one after the other; they add up to `finished - received` (`now` if it is not over)."""
    walk = _Walk(timeline.received)
    end = timeline.finished or now
    if timeline.admitted:
        walk.upto("queue", timeline.admitted)
    attempts = timeline.attempts
    if not attempts:
        walk.upto("route" if timeline.admitted else "queue", end)
        return walk.stages
    walk.upto("route", attempts[0].sent)
    started = False
    for index, attempt in enumerate(attempts):
        last = index + 1 == len(attempts)
        over = attempt.ended or end
        if attempt.begun and not started:
            started = True
            _begin(walk, timeline, attempt)
        elif attempt.begun:
            walk.upto("resume", attempt.begun)
        elif not started:
            walk.upto("worker" if last else "retry", over if last else attempts[index + 1].sent)
            continue
        else:
            walk.upto("resume", over)
            continue
        if timeline.stream:
            walk.upto("decode", over)
    walk.upto("resume" if started and attempts[-1].lost else "reply", end)
    return walk.stages


def spans(timeline: Timeline, now: float) -> Iterator[Span]:
    """What happened where, for a picture: the gateway's part first, then each attempt's."""
    end = timeline.finished or now
    attempts = timeline.attempts
    admitted = timeline.admitted or (attempts[0].sent if attempts else end)
    yield Span("queue", GATEWAY, 0, timeline.received, admitted)
    if attempts:
        yield Span("route", GATEWAY, 0, admitted, attempts[0].sent)
    for number, attempt in enumerate(attempts, 1):
        over = attempt.ended or end
        if attempt.begun:
            yield Span("wait", GATEWAY, number, attempt.sent, attempt.begun, attempt.target.reason)
            yield Span("relay", GATEWAY, number, attempt.begun, over, attempt.lost)
        else:
            yield Span("wait", GATEWAY, number, attempt.sent, over, attempt.lost or attempt.target.reason)
        yield from _worker_spans(timeline, attempt, number, over)


class _Walk:
    """Goes forward only: a stage ends where it should, or where the last one did if that is later."""

    __slots__ = ("at", "stages")

    def __init__(self, at: float) -> None:
        self.at = at
        self.stages: list[Stage] = []

    def upto(self, name: str, end: float) -> None:
        if end <= self.at:
            return
        seconds, self.at = end - self.at, end
        if self.stages and self.stages[-1].name == name:
            seconds += self.stages.pop().seconds
        self.stages.append(Stage(name, seconds))


def _begin(walk: _Walk, timeline: Timeline, attempt: Attempt) -> None:
    """From sending until there was something to relay."""
    said, begun = marks(attempt.answer), attempt.begun
    if not said.head:
        walk.upto("worker", begun)
        return
    zero = _zero(attempt, said)
    walk.upto("transit", zero)
    computing = marks(attempt.receipt) if attempt.target.prefill is not None else said
    first = min(begun, zero + said.first_token)
    walk.upto("offer", min(first, zero + said.offer))
    if computing.prefill:
        walk.upto("prefill_queue", min(first, zero + computing.queue))
        walk.upto("prefill", min(first, zero + computing.queue + computing.prefill))
    walk.upto("transfer", min(first, zero + said.offer + said.handoff))
    walk.upto("decode_queue", first)
    if not timeline.stream:
        walk.upto("decode", min(begun, zero + said.head))
    walk.upto("reply", begun)


def _zero(attempt: Attempt, said: Marks) -> float:
    """When the engines had it."""
    return max(attempt.sent, attempt.begun - said.head)


def _worker_spans(timeline: Timeline, attempt: Attempt, number: int, over: float) -> Iterator[Span]:
    target, said = attempt.target, marks(attempt.answer)
    lane, begun = name(target.answering), attempt.begun or over
    zero = _zero(attempt, said) if attempt.begun and said.head else attempt.sent
    if target.prefill is not None:
        yield from _prefilling(name(target.prefill), number, attempt.sent, zero, marks(attempt.receipt), begun)
    if not said.head:
        yield Span("lost" if attempt.lost and not attempt.begun else "worker", lane, number, zero, begun, attempt.lost)
        first = begun
    else:
        first = zero + said.first_token
        steps = [("offer", said.offer), ("handoff", said.handoff), ("queue", said.queue), ("prefill", said.prefill)]
        at = zero
        for step, seconds in steps:
            if seconds:
                yield Span(step, lane, number, at, min(at + seconds, first))
                at = min(at + seconds, first)
        if first > at:
            yield Span("first token", lane, number, at, first)
    if attempt.begun:
        end = over if timeline.stream else max(first, begun)
        if end > first:
            yield Span("decode", lane, number, first, end, attempt.lost)


def _prefilling(lane: str, number: int, sent: float, zero: float, said: Marks, begun: float) -> Iterator[Span]:
    """P has the request about when D has it, and is done with it before D's first token."""
    if not said.prefill:
        yield Span("prefill", lane, number, zero, begun, "it has not said more")
        return
    at = max(sent, min(zero, begun - said.queue - said.prefill - said.transfer))
    for step, seconds in (("queue", said.queue), ("prefill", said.prefill), ("transfer", said.transfer)):
        if seconds:
            yield Span(step, lane, number, at, at + seconds)
            at += seconds
