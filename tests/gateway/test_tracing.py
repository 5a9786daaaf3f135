"""Traces: whose they are, how they go on to workers, and what a collector gets."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from random import Random

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from opentelemetry.trace.status import StatusCode

from baton.base.config import GatewayConfig
from baton.base.errors import ConfigError
from baton.gateway import trace, tracing
from baton.gateway.tracing import Tracer
from tests.gateway.stack import RECEIPT, Stack, stack
from tests.gateway.test_stages import D, P, attempt, timeline
from tests.router.mocks import Exchange, Mock, events, run, until, whole

PARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Iterator[Tracer]:
    tracer = Tracer(exporter, time.monotonic, Random(1))
    yield tracer
    tracer.close()


@pytest.mark.parametrize("header", [PARENT, b" " + PARENT + b" ", b"cc" + PARENT[2:] + b"-what-comes-later"])
def test_a_clients_trace_goes_on(header: bytes) -> None:
    own = trace.join(header, Random(1))
    assert own.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert own.parent_id == 0xB7AD6B7169203331
    assert own.sampled
    assert own.header.startswith(b"traceparent: " + PARENT[:35] + b"-")
    assert own.header[13:].strip() != PARENT


def test_who_does_not_sample_is_not_sampled() -> None:
    own = trace.join(PARENT[:-2] + b"00", Random(1))
    assert not own.sampled
    assert own.header.endswith(b"-00\r\n")


@pytest.mark.parametrize(
    "header",
    [None, b"", b"x", PARENT[:-1], PARENT.upper(), b"ff" + PARENT[2:], PARENT + b"-more", PARENT + b"\r\nx: y",
     b"00-" + b"0" * 32 + PARENT[35:], PARENT[:36] + b"0" * 16 + b"-01"],
)  # fmt: skip
def test_what_is_no_trace_begins_one(header: bytes | None) -> None:
    own = trace.join(header, Random(1))
    assert own.parent_id == 0
    assert own.sampled
    assert own.trace_id != 0x0AF7651916CD43DD8448EB211C80319C
    assert len(own.header) == len(b"traceparent: \r\n") + 55


def by_name(spans: tuple[ReadableSpan, ...]) -> dict[str, ReadableSpan]:
    return {span.name: span for span in spans}


def test_spans_hang_together(tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    lost = attempt(100.003, 0.0, 100.1, lost="prefill refused")
    one = timeline(lost, attempt(100.21, 100.26, 100.999))
    one.trace = tracer.join(PARENT)
    tracer(one)
    tracer.close()
    spans = exporter.get_finished_spans()
    named = by_name(spans)
    server = named["POST /generate"]
    assert server.kind is SpanKind.SERVER
    assert server.context is not None
    assert server.context.span_id == one.trace.span_id
    assert server.parent is not None
    assert server.parent.span_id == 0xB7AD6B7169203331
    assert {span.context.trace_id for span in spans if span.context} == {0x0AF7651916CD43DD8448EB211C80319C}
    attempts = [span for span in spans if span.name == "attempt"]
    assert [span.status.status_code for span in attempts] == [StatusCode.ERROR, StatusCode.UNSET]
    assert all(span.parent and span.parent.span_id == server.context.span_id for span in attempts)
    prefills = [span for span in spans if span.name == "prefill"]
    assert [span.parent.span_id for span in prefills if span.parent] == [
        a.context.span_id for a in attempts if a.context
    ]
    assert prefills[1].attributes is not None
    assert prefills[1].attributes["baton.lane"] == P.name
    assert prefills[1].start_time is not None
    assert prefills[1].end_time is not None
    assert (prefills[1].end_time - prefills[1].start_time) / 1e6 == pytest.approx(30, abs=0.01)
    assert named["decode"].attributes is not None
    assert named["decode"].attributes["baton.lane"] == D.name
    assert server.start_time is not None
    expected = time.time() - (time.monotonic() - one.received)
    assert server.start_time / 1e9 == pytest.approx(expected, abs=1.0)


def test_errors_are_marked(tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    for status, error in ((200, ""), (400, "your fault"), (502, "a worker's"), (200, "broke off")):
        one = timeline(status=status)
        one.error, one.trace = error, tracer.join(None)
        tracer(one)
    tracer.close()
    servers = [span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER]
    codes = [span.status.status_code for span in servers]
    assert codes == [StatusCode.UNSET, StatusCode.UNSET, StatusCode.ERROR, StatusCode.ERROR]


def test_what_nobody_exports_is_dropped(exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "WAITING", 3)
    monkeypatch.setattr(tracing, "ROUND", 60.0)
    tracer = Tracer(exporter, time.monotonic)
    for number in range(5):
        one = timeline()
        one.id, one.trace = str(number), tracer.join(None)
        tracer(one)
    unsampled = timeline()
    unsampled.trace = tracer.join(PARENT[:-2] + b"00")
    tracer(unsampled)
    tracer.close()
    assert tracer.dropped == 2
    servers = [span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert [span.attributes["baton.request_id"] for span in servers if span.attributes] == ["2", "3", "4"]


def test_a_collector_gets_the_trace_and_workers_its_parent() -> None:
    bodies: list[bytes] = []

    async def collect(exchange: Exchange) -> None:
        bodies.append(exchange.body)
        exchange.whole(b"")

    async def main() -> None:
        async with Mock(collect) as collector:
            async with stack(RECEIPT, events(b"data: 1\n\n"), split="always", otlp_endpoint=collector.url) as s:
                await ask(s)
                await s.settled()
                await until(lambda: bool(bodies))  # without waiting for the end
            assert collector.seen[0].path == "/v1/traces"

    async def ask(s: Stack) -> None:
        reply = await s.post(json={"stream": True}, headers={"traceparent": PARENT.decode(), "tracestate": "a=b"})
        assert reply.status_code == 200
        sent = [exchange.headers["traceparent"] for exchange in (*s.prefill.seen, *s.decode.seen)]
        assert len(sent) == 2
        assert len(set(sent)) == 1
        assert sent[0].split("-")[1] == PARENT.decode().split("-")[1]
        assert sent[0] != PARENT.decode()
        parents.append(bytes.fromhex(sent[0].split("-")[2]))
        assert s.decode.seen[0].headers["tracestate"] == "a=b"

    parents: list[bytes] = []
    run(main())
    request = ExportTraceServiceRequest()
    request.ParseFromString(bodies[0])
    spans = [span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans]
    server = next(span for span in spans if span.name == "POST /v1/chat/completions")
    assert [server.span_id] == parents
    assert server.parent_span_id.hex() == "b7ad6b7169203331"


def test_a_collector_that_is_not_there_harms_nobody() -> None:
    async def main() -> None:
        async with stack(RECEIPT, whole({}), otlp_endpoint="http://127.0.0.1:1") as s:
            for _ in range(3):
                assert (await s.post()).status_code == 200
            begun = asyncio.get_running_loop().time()
            await s.settled()
        assert asyncio.get_running_loop().time() - begun < 10

    run(main(), timeout=30)


def test_without_tracing_headers_pass_as_they_are_and_nothing_is_imported() -> None:
    async def main() -> None:
        async with stack(RECEIPT, whole({})) as s:
            await s.post(headers={"traceparent": PARENT.decode()})
            assert s.decode.seen[0].headers["traceparent"] == PARENT.decode()

    run(main())
    code = "import sys, baton.gateway.process; assert not any(name.startswith('opentelemetry') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_endpoint_is_a_url() -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        GatewayConfig(otlp_endpoint="localhost:4318")
