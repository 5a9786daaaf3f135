"""What Prometheus sees. Counting is plain arithmetic on the hot path; families are built when somebody scrapes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.gateway.stages import Stage
from baton.gateway.timeline import Timeline
from baton.router import health
from baton.router.registry import ROLES, Registry
from baton.router.target import Target

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 1.6)
BREAKER_STATES = {"closed": 0, "open": 1, "half_open": 2}


def nothing() -> None:
    """Nobody has anything to add."""


def nobody() -> int:
    """Nobody waits."""
    return 0


class Histogram:
    """Seconds in buckets."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def family(self) -> tuple[list[tuple[str, float]], float]:
        """(bucket bound, requests up to it), sum."""
        bounds = [*(str(s) for s in self._bounds), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True)), self._sum


class Metrics(Collector):
    """One per gateway. `in_flight` is also what the concurrency limit looks at."""

    def __init__(self, registry: Registry) -> None:
        self.in_flight = 0
        self.cancelled = 0
        self.leg_errors: dict[tuple[str, str], int] = {}
        """(role, kind)"""
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.queued: Callable[[], int] = nobody
        """How many requests wait for a place."""
        self.settle: Callable[[], None] = nothing
        """Called before somebody scrapes: what has been put off is counted."""
        self._requests: dict[tuple[str, int], int] = {}
        self._durations: dict[str, Histogram] = {}
        self._first_bytes: dict[str, Histogram] = {}
        self._token_times: dict[str, Histogram] = {}
        self._stages: dict[str, Histogram] = {}
        self._routed: dict[str, int] = {}
        self._retries: dict[str, int] = {}
        self._resumes: dict[str, int] = {}
        self._registry = registry

    @property
    def retries(self) -> int:
        return sum(self._retries.values())

    @property
    def resumes(self) -> int:
        return sum(self._resumes.values())

    def finished(self, timeline: Timeline) -> None:
        route = timeline.route
        key = (route, timeline.status)
        self._requests[key] = self._requests.get(key, 0) + 1
        self.cancelled += timeline.status == 499
        self.prompt_tokens += timeline.prompt_tokens
        self.output_tokens += timeline.output_tokens
        _of(self._durations, route).observe(timeline.finished - timeline.received)
        if timeline.first:
            _of(self._first_bytes, route).observe(timeline.first - timeline.received)
        attempts = timeline.attempts
        if attempts:
            _count(self._routed, way(attempts[-1].target))
            if len(attempts) > 1:
                for before, after in pairwise(attempts):
                    _count(self._resumes if after.resumed else self._retries, before.lost)

    def staged(self, timeline: Timeline, stages: Sequence[Stage]) -> None:
        """One of the sample that is looked at closely."""
        for stage in stages:
            _of(self._stages, stage.name).observe(stage.seconds)
        between = timeline.token_seconds()
        if between:
            self._token_times.setdefault(timeline.route, Histogram(TOKEN_SECONDS)).observe(between)

    def leg_error(self, role: str, kind: str) -> None:
        self.leg_errors[role, kind] = self.leg_errors.get((role, kind), 0) + 1

    def exposition(self, now: float) -> bytes:
        """Prometheus text format; `now` is loop time, for the breakers' states."""
        self.settle()
        registry = CollectorRegistry()
        registry.register(_At(self, now))
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("baton_gateway_requests", "Requests answered", labels=["route", "status"])
        for (route, status), count in self._requests.items():
            requests.add_metric([route, str(status)], count)
        yield requests
        yield _histogram("baton_gateway_request_seconds", "Seconds from request to end of answer", self._durations)
        yield _histogram("baton_gateway_ttft_seconds", "Seconds to the first byte of a stream", self._first_bytes)
        yield GaugeMetricFamily("baton_gateway_in_flight", "Requests in progress", value=self.in_flight)
        yield GaugeMetricFamily("baton_gateway_queued", "Requests that wait for a place", value=self.queued())
        yield CounterMetricFamily("baton_gateway_cancelled", "Requests whose client left", value=self.cancelled)
        yield _histogram("baton_gateway_itl_seconds", "Mean seconds per token of a stream, sampled", self._token_times)
        yield _histogram("baton_gateway_stage_seconds", "Where the time went, sampled", self._stages, "stage")
        yield _counter("baton_gateway_routed", "Split between P and D, or whole, and why", self._routed, "way")
        yield _counter("baton_gateway_retries", "Attempts repeated before the answer began", self._retries, "reason")
        yield _counter("baton_gateway_resumes", "Streams continued on another worker", self._resumes, "reason")
        yield CounterMetricFamily("baton_gateway_prompt_tokens", "Prompt tokens, estimated", value=self.prompt_tokens)
        yield CounterMetricFamily("baton_gateway_output_tokens", "Tokens of answers", value=self.output_tokens)
        errors = CounterMetricFamily("baton_gateway_leg_errors", "Lost legs of attempts", labels=["role", "kind"])
        for (role, kind), count in self.leg_errors.items():
            errors.add_metric([role, kind], count)
        yield errors

    def workers(self, now: float) -> Iterator[Metric]:
        labels = ["worker", "role"]
        healthy = GaugeMetricFamily("baton_worker_healthy", "1: answers its health check", labels=labels)
        breaker = GaugeMetricFamily("baton_worker_breaker", "0 closed, 1 open, 2 half open", labels=labels)
        load = GaugeMetricFamily("baton_worker_load_tokens", "Tokens in flight, estimated at dispatch", labels=labels)
        running = GaugeMetricFamily("baton_worker_in_flight", "Requests in flight", labels=labels)
        connections = GaugeMetricFamily("baton_worker_connections", "Open connections", labels=labels)
        errors = CounterMetricFamily("baton_worker_errors", "Failures blamed on a worker", labels=[*labels, "kind"])
        opened = CounterMetricFamily("baton_worker_breaker_opened", "How often its breaker opened", labels=labels)
        for worker in self._registry.workers:
            names = [worker.url, worker.role]
            healthy.add_metric(names, float(worker.healthy))
            breaker.add_metric(names, BREAKER_STATES[health.state(worker.breaker, now)])
            opened.add_metric(names, worker.trips)
            load.add_metric(names, worker.load)
            running.add_metric(names, worker.in_flight)
            connections.add_metric(names, worker.pool.open_connections)
            for kind, count in worker.errors.items():
                errors.add_metric([*names, kind], count)
        usable = GaugeMetricFamily("baton_gateway_usable_workers", "Workers that get requests", labels=["role"])
        for role in ROLES:
            usable.add_metric([role], len(self._registry.snapshot.of(role)))
        yield from (healthy, breaker, opened, load, running, connections, errors, usable)


class _At(Collector):
    """All families at one moment."""

    def __init__(self, metrics: Metrics, now: float) -> None:
        self._metrics, self._now = metrics, now

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics.collect()
        yield from self._metrics.workers(self._now)


def _of(histograms: dict[str, Histogram], route: str) -> Histogram:
    histogram = histograms.get(route)
    if histogram is None:
        histogram = histograms[route] = Histogram()
    return histogram


def way(target: Target) -> str:
    """How a request was served, and why so: one of a few words, for a label."""
    decision, split = target.decision, target.prefill is not None
    if decision is None:
        return "split" if split else "whole"
    if split:
        return "split_faster"
    if decision.threshold:
        return "whole_short"
    return "whole_faster" if decision.split_seconds is not None else "whole_no_prefill"


def _count(counts: dict[str, int], what: str) -> None:
    counts[what] = counts.get(what, 0) + 1


def _counter(name: str, help: str, counts: Mapping[str, int], label: str) -> Metric:
    family = CounterMetricFamily(name, help, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family


def _histogram(name: str, help: str, histograms: Mapping[str, Histogram], label: str = "route") -> Metric:
    family = HistogramMetricFamily(name, help, labels=[label])
    for value, histogram in histograms.items():
        buckets, total = histogram.family()
        family.add_metric([value], buckets, total)
    return family
