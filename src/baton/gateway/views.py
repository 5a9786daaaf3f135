"""What is shown of requests and workers: typed, ready for JSON. Made from timelines when somebody looks; pure.

Times in requests are milliseconds since they were received, in statistics milliseconds too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec

from baton.gateway.metrics import way
from baton.gateway.stages import STAGES, Span, name, spans, stages
from baton.gateway.timeline import Attempt, Timeline
from baton.router import health
from baton.router.registry import ROLES, Registry, Role, Worker

WINDOW = 60.0
"""Seconds that statistics look back."""
POINTS = 30
"""Of a sparkline, over the window."""


class StageView(msgspec.Struct, frozen=True):
    name: str
    ms: float


class SpanView(msgspec.Struct, frozen=True):
    name: str
    lane: str
    attempt: int
    start: float
    end: float
    note: str = ""


class AttemptView(msgspec.Struct, frozen=True):
    answering: str
    prefill: str
    """Empty: whole."""
    reason: str
    sent: float
    begun: float | None
    ended: float | None
    lost: str
    resumed: bool


class RequestView(msgspec.Struct, frozen=True):
    """A row in a table."""

    id: str
    route: str
    status: int
    """0: in progress."""
    user: str
    model: str
    stream: bool
    received: float
    """Unix time."""
    prompt_tokens: int
    output_tokens: int
    total: float
    ttft: float | None
    itl: float | None
    way: str
    workers: list[str]
    attempts: int
    resumes: int
    error: str


class RequestDetail(RequestView, frozen=True):
    """And its picture."""

    stages: list[StageView] = []
    spans: list[SpanView] = []
    tries: list[AttemptView] = []


class Requests(msgspec.Struct, frozen=True):
    requests: list[RequestView]


class Percentiles(msgspec.Struct, frozen=True):
    count: int = 0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0


class Point(msgspec.Struct, frozen=True):
    """A part of the window."""

    requests: int = 0
    errors: int = 0
    ttft: float | None = None
    """Median."""
    itl: float | None = None
    total: float | None = None


class EngineView(msgspec.Struct, frozen=True):
    """What a worker's engine says of itself."""

    running: int = 0
    waiting: int = 0
    used_tokens: int = 0
    max_tokens: int = 0
    throughput: float = 0.0
    """Tokens a second."""
    cache_hit_rate: float = 0.0
    handoffs: int = 0
    """Between prefill and decode now."""


class WorkerView(msgspec.Struct, frozen=True):
    id: str
    name: str
    url: str
    role: Role
    runtime: str
    model: str
    state: str
    """ready, down, draining, open or half_open (its breaker)."""
    reason: str
    in_flight: int
    load_tokens: int
    served: int
    errors: int
    engine: EngineView | None


class RoleView(msgspec.Struct, frozen=True):
    role: Role
    workers: int
    usable: int
    in_flight: int


class Flow(msgspec.Struct, frozen=True):
    """Requests in the window, by what became of them."""

    split: int = 0
    whole: int = 0
    running_split: int = 0
    """In progress now."""
    running_whole: int = 0
    errors: int = 0
    retries: int = 0
    resumes: int = 0


class Stats(msgspec.Struct, frozen=True):
    now: float
    """Unix time."""
    seconds: float
    """What the figures cover: the last minute, less if that was too much to remember."""
    in_flight: int
    queued: int
    requests_per_second: float
    output_tokens_per_second: float
    prompt_tokens_per_second: float
    ttft: Percentiles
    itl: Percentiles
    total: Percentiles
    flow: Flow
    stages: list[StageView]
    """Means."""
    series: list[Point]
    """The oldest first."""
    roles: list[RoleView]
    workers: list[WorkerView]


# --- requests


def request_view(timeline: Timeline, now: float, unix: float) -> RequestView:
    """`unix`: what the clock on the wall says at loop time `now`."""
    return RequestView(**_row(timeline, now, unix))  # type: ignore[arg-type]


def request_detail(timeline: Timeline, now: float, unix: float) -> RequestDetail:
    return RequestDetail(
        **_row(timeline, now, unix),  # type: ignore[arg-type]
        stages=[StageView(stage.name, _ms(stage.seconds)) for stage in stages(timeline, now)],
        spans=[_span(span, timeline.received) for span in spans(timeline, now)],
        tries=[_try(attempt, timeline.received) for attempt in timeline.attempts],
    )


def _row(timeline: Timeline, now: float, unix: float) -> dict[str, object]:
    attempts = timeline.attempts
    return {
        "id": timeline.id,
        "route": timeline.route,
        "status": timeline.status if timeline.finished else 0,
        "user": timeline.user,
        "model": timeline.model,
        "stream": timeline.stream,
        "received": round(unix - (now - timeline.received), 3),
        "prompt_tokens": timeline.prompt_tokens,
        "output_tokens": timeline.output_tokens,
        "total": _ms((timeline.finished or now) - timeline.received),
        "ttft": _maybe_ms(ttft(timeline)),
        "itl": _maybe_ms(itl(timeline)),
        "way": way(attempts[-1].target) if attempts else "",
        "workers": _workers(attempts),
        "attempts": len(attempts),
        "resumes": sum(attempt.resumed for attempt in attempts),
        "error": timeline.error,
    }


def ttft(timeline: Timeline) -> float | None:
    """Seconds until the first token of a stream."""
    return timeline.first - timeline.received if timeline.stream and timeline.first else None


def itl(timeline: Timeline) -> float | None:
    """Mean seconds between tokens of a stream that is over, if its worker counts them."""
    return timeline.token_seconds() or None


def _workers(attempts: Sequence[Attempt]) -> list[str]:
    """Who had to do with it, in order."""
    found: dict[str, None] = {}
    for attempt in attempts:
        for worker in (attempt.target.prefill, attempt.target.answering):
            if worker is not None:
                found[name(worker)] = None
    return list(found)


def _span(span: Span, zero: float) -> SpanView:
    return SpanView(span.name, span.lane, span.attempt, _ms(span.start - zero), _ms(span.end - zero), span.note)


def _try(attempt: Attempt, zero: float) -> AttemptView:
    prefill = attempt.target.prefill
    return AttemptView(
        answering=name(attempt.target.answering),
        prefill=name(prefill) if prefill is not None else "",
        reason=attempt.target.reason,
        sent=_ms(attempt.sent - zero),
        begun=_ms(attempt.begun - zero) if attempt.begun else None,
        ended=_ms(attempt.ended - zero) if attempt.ended else None,
        lost=attempt.lost,
        resumed=attempt.resumed,
    )


# --- statistics


def worker_view(worker: Worker, engine: EngineView | None, now: float) -> WorkerView:
    breaker = health.state(worker.breaker, now)
    state = "draining" if worker.draining else "down" if not worker.healthy else breaker
    return WorkerView(
        id=worker.id,
        name=name(worker),
        url=worker.url,
        role=worker.role,
        runtime=worker.runtime,
        model=worker.model,
        state="ready" if state == "closed" else state,
        reason=worker.reason,
        in_flight=worker.in_flight,
        load_tokens=worker.load,
        served=worker.served,
        errors=sum(worker.errors.values()),
        engine=engine,
    )


def role_views(registry: Registry) -> list[RoleView]:
    found = []
    for role in ROLES:
        mine = [worker for worker in registry.workers if worker.role == role]
        usable = len(registry.snapshot.of(role))
        found.append(RoleView(role, len(mine), usable, sum(worker.in_flight for worker in mine)))
    return found


def window(recent: Iterable[Timeline], now: float) -> list[Timeline]:
    """Those that finished lately; `recent`: the latest first."""
    found = []
    for timeline in recent:
        if timeline.finished < now - WINDOW:
            break
        found.append(timeline)
    return found


def percentiles(values: Iterable[float | None]) -> Percentiles:
    """Of seconds, in milliseconds."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return Percentiles()
    p50, p95, p99 = (_ms(known[min(len(known) - 1, math.ceil(q * len(known)) - 1)]) for q in (0.5, 0.95, 0.99))
    return Percentiles(len(known), p50, p95, p99)


def flow(finished: Sequence[Timeline], active: Iterable[Timeline]) -> Flow:
    running = [timeline.attempts[-1].target.prefill is not None for timeline in active if timeline.attempts]
    served = [timeline.attempts for timeline in finished if timeline.attempts]
    split = sum(attempts[-1].target.prefill is not None for attempts in served)
    again = [attempt.resumed for attempts in served for attempt in attempts[1:]]
    return Flow(
        split=split,
        whole=len(served) - split,
        running_split=sum(running),
        running_whole=len(running) - sum(running),
        errors=sum(map(failed, finished)),
        retries=len(again) - sum(again),
        resumes=sum(again),
    )


def failed(timeline: Timeline) -> bool:
    """Its client was told of an error that is not its own. A stream's status was sent before it broke."""
    return timeline.status >= 500 or (timeline.status == 200 and bool(timeline.error))


def series(finished: Sequence[Timeline], now: float) -> list[Point]:
    parts: list[list[Timeline]] = [[] for _ in range(POINTS)]
    for timeline in finished:
        ago = int((now - timeline.finished) / WINDOW * POINTS)
        parts[max(0, POINTS - 1 - ago)].append(timeline)
    return [_point(part) for part in parts]


def mean_stages(finished: Sequence[Timeline]) -> list[StageView]:
    """Of requests that went well."""
    sums: dict[str, float] = {}
    good = [timeline for timeline in finished if timeline.status == 200 and not timeline.error]
    for timeline in good:
        for stage in stages(timeline, timeline.finished):
            sums[stage.name] = sums.get(stage.name, 0.0) + stage.seconds
    return [StageView(stage, _ms(sums[stage] / len(good))) for stage in STAGES if stage in sums]


def _point(part: Sequence[Timeline]) -> Point:
    if not part:
        return Point()
    return Point(
        requests=len(part),
        errors=sum(map(failed, part)),
        ttft=_median(map(ttft, part)),
        itl=_median(map(itl, part)),
        total=_median(timeline.finished - timeline.received for timeline in part),
    )


def _median(values: Iterable[float | None]) -> float | None:
    found = percentiles(values)
    return found.p50 if found.count else None


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def _maybe_ms(seconds: float | None) -> float | None:
    return None if seconds is None else _ms(seconds)
