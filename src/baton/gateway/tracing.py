"""Spans for OpenTelemetry, made from timelines after the request, exported by a thread of its own.

    server span ── queue, route
               └── attempt (one for each) ── what its workers say they did

The gateway's span is named before the request goes out (`Trace`), so that workers' spans hang below it. Needs the extra
`otel`, which is imported here only, and only when tracing is on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from random import Random

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from baton import __version__
from baton.gateway import trace
from baton.gateway.metrics import way
from baton.gateway.stages import GATEWAY, Span, name, spans
from baton.gateway.timeline import Attempt, Timeline
from baton.gateway.trace import Trace

WAITING = 2048
"""Finished requests that may wait for export; more are dropped, the oldest first."""
ROUND = 1.0
"""Seconds between exports: time for a prefill worker's receipt, too."""
FLUSH = 2.0
"""Seconds for the last export."""
FLAGS = TraceFlags(TraceFlags.SAMPLED)
SCOPE = InstrumentationScope("baton.gateway", __version__)
Attributes = dict[str, str | bool | int | float | Sequence[str]]


class Tracer:
    """A sink of the recorder. `close` exports what is left and ends the thread."""

    def __init__(self, exporter: SpanExporter, clock: Callable[[], float], random: Random | None = None) -> None:
        """`clock`: of the timelines."""
        self.dropped = 0
        self._exporter = exporter
        self._random = random or Random()  # seeded by the system
        self._clock = clock
        self._resource = Resource.create({"service.name": "baton-gateway", "service.version": __version__})
        self._waiting: deque[Timeline] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="baton-traces", daemon=True)
        self._thread.start()

    def join(self, traceparent: bytes | None) -> Trace:
        return trace.join(traceparent, self._random)

    def __call__(self, timeline: Timeline) -> None:
        if timeline.trace is None or not timeline.trace.sampled:
            return
        if len(self._waiting) >= WAITING:
            self._waiting.popleft()
            self.dropped += 1
        self._waiting.append(timeline)

    def close(self) -> None:
        """Takes seconds if the collector does not answer."""
        self._stop.set()
        self._thread.join(FLUSH)
        self._exporter.shutdown()  # interrupts an export that is tried again and again
        self._thread.join(FLUSH)

    def _run(self) -> None:
        while not self._stop.wait(ROUND):
            self._export()
        self._export()

    def _export(self) -> None:
        zero = time.time() - self._clock()
        made: list[ReadableSpan] = []
        while self._waiting:
            made += Spans(self._waiting.popleft(), zero, self._resource, self._random).all()
        if made:
            self._exporter.export(made)  # reports its failures itself


class Spans:
    """Of one finished request. `zero`: Unix time at which the timeline's clock was 0."""

    def __init__(self, timeline: Timeline, zero: float, resource: Resource, random: Random) -> None:
        assert timeline.trace is not None
        self._timeline = timeline
        self._trace = timeline.trace
        self._zero = zero
        self._resource = resource
        self._random = random

    def all(self) -> list[ReadableSpan]:
        timeline, own = self._timeline, self._context(self._trace.span_id)
        parent = self._context(self._trace.parent_id, remote=True) if self._trace.parent_id else None
        attempts = [self._context() for _ in timeline.attempts]
        made = [self._server(own, parent)]
        made += [
            self._attempt(attempt, context, own, number)
            for number, (attempt, context) in enumerate(zip(timeline.attempts, attempts, strict=True), 1)
        ]
        for span in spans(timeline, timeline.finished):
            if span.lane != GATEWAY or span.attempt == 0:
                made.append(self._part(span, attempts[span.attempt - 1] if span.attempt else own))
        return made

    def _server(self, own: SpanContext, parent: SpanContext | None) -> ReadableSpan:
        timeline = self._timeline
        attributes: Attributes = {
            "http.request.method": "POST",
            "http.route": timeline.route,
            "http.response.status_code": timeline.status,
            "gen_ai.request.model": timeline.model,
            "gen_ai.usage.output_tokens": timeline.output_tokens,
            "baton.request_id": timeline.id,
            "baton.attempts": len(timeline.attempts),
        }
        if timeline.user:
            attributes["enduser.id"] = timeline.user
        if timeline.attempts:
            attributes["baton.way"] = way(timeline.attempts[-1].target)
        wrong = timeline.status >= 500 or (timeline.status < 400 and bool(timeline.error))
        status = Status(StatusCode.ERROR, timeline.error) if wrong else Status()
        title = f"POST {timeline.route}"
        return self._span(title, own, parent, timeline.received, timeline.finished, attributes, SpanKind.SERVER, status)

    def _attempt(self, attempt: Attempt, context: SpanContext, parent: SpanContext, number: int) -> ReadableSpan:
        target = attempt.target
        attributes: Attributes = {
            "baton.attempt": number,
            "baton.resumed": attempt.resumed,
            "baton.answering": name(target.answering),
            "baton.reason": target.reason,
        }
        if target.prefill is not None:
            attributes["baton.prefill"] = name(target.prefill)
        status = Status(StatusCode.ERROR, attempt.lost) if attempt.lost else Status()
        end = attempt.ended or self._timeline.finished
        return self._span("attempt", context, parent, attempt.sent, end, attributes, SpanKind.CLIENT, status)

    def _part(self, span: Span, parent: SpanContext) -> ReadableSpan:
        attributes: Attributes = {"baton.lane": span.lane}
        if span.note:
            attributes["baton.note"] = span.note
        return self._span(span.name, self._context(), parent, span.start, span.end, attributes)

    def _context(self, span_id: int = 0, *, remote: bool = False) -> SpanContext:
        return SpanContext(self._trace.trace_id, span_id or self._random.getrandbits(64) or 1, remote, FLAGS)

    def _span(
        self,
        title: str,
        context: SpanContext,
        parent: SpanContext | None,
        start: float,
        end: float,
        attributes: Attributes,
        kind: SpanKind = SpanKind.INTERNAL,
        status: Status | None = None,
    ) -> ReadableSpan:
        return ReadableSpan(
            title,
            context=context,
            parent=parent,
            resource=self._resource,
            attributes=attributes,
            kind=kind,
            status=status or Status(),
            start_time=self._nanoseconds(start),
            end_time=self._nanoseconds(max(start, end)),
            instrumentation_scope=SCOPE,
        )

    def _nanoseconds(self, at: float) -> int:
        return int((at + self._zero) * 1e9)


def tracer(endpoint: str, clock: Callable[[], float]) -> Tracer:
    """`endpoint`: of a collector that speaks OTLP over HTTP; without a path `/v1/traces` is meant."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    scheme, _, rest = endpoint.partition("://")
    address, _, path = rest.partition("/")
    url = endpoint if path else f"{scheme}://{address}/v1/traces"
    return Tracer(OTLPSpanExporter(endpoint=url, timeout=5), clock)
