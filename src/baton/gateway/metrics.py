"""What Prometheus sees. Counting is plain arithmetic on the hot path; families are built when somebody scrapes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.gateway.timeline import Timeline
from baton.router import health
from baton.router.registry import ROLES, Registry

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
BREAKER_STATES = {"closed": 0, "open": 1, "half_open": 2}


class Histogram:
    """Seconds in buckets."""

    __slots__ = ("_counts", "_sum")

    def __init__(self) -> None:
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def family(self) -> tuple[list[tuple[str, float]], float]:
        """(bucket bound, requests up to it), sum."""
        bounds = [*(str(s) for s in SECONDS), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True)), self._sum


class Metrics(Collector):
    """One per gateway. `in_flight` is also what the concurrency limit looks at."""

    def __init__(self, registry: Registry) -> None:
        self.in_flight = 0
        self.cancelled = 0
        self.retries = 0
        self.resumes = 0
        self.leg_errors: dict[tuple[str, str], int] = {}
        """(role, kind)"""
        self._requests: dict[tuple[str, int], int] = {}
        self._durations: dict[str, Histogram] = {}
        self._first_bytes: dict[str, Histogram] = {}
        self._registry = registry

    def finished(self, timeline: Timeline) -> None:
        route = timeline.route
        key = (route, timeline.status)
        self._requests[key] = self._requests.get(key, 0) + 1
        self.cancelled += timeline.status == 499
        _of(self._durations, route).observe(timeline.finished - timeline.received)
        if timeline.first:
            _of(self._first_bytes, route).observe(timeline.first - timeline.received)

    def leg_error(self, role: str, kind: str) -> None:
        self.leg_errors[role, kind] = self.leg_errors.get((role, kind), 0) + 1

    def exposition(self, now: float) -> bytes:
        """Prometheus text format; `now` is loop time, for the breakers' states."""
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
        yield CounterMetricFamily("baton_gateway_cancelled", "Requests whose client left", value=self.cancelled)
        yield CounterMetricFamily("baton_gateway_retries", "Second attempts", value=self.retries)
        yield CounterMetricFamily("baton_gateway_resumes", "Streams continued on another worker", value=self.resumes)
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
        for worker in self._registry.workers:
            names = [worker.url, worker.role]
            healthy.add_metric(names, float(worker.healthy))
            breaker.add_metric(names, BREAKER_STATES[health.state(worker.breaker, now)])
            load.add_metric(names, worker.load)
            running.add_metric(names, worker.in_flight)
            connections.add_metric(names, worker.pool.open_connections)
            for kind, count in worker.errors.items():
                errors.add_metric([*names, kind], count)
        usable = GaugeMetricFamily("baton_gateway_usable_workers", "Workers that get requests", labels=["role"])
        for role in ROLES:
            usable.add_metric([role], len(self._registry.snapshot.of(role)))
        yield from (healthy, breaker, load, running, connections, errors, usable)


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


def _histogram(name: str, help: str, histograms: dict[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(name, help, labels=["route"])
    for route, histogram in histograms.items():
        buckets, total = histogram.family()
        family.add_metric([route], buckets, total)
    return family
