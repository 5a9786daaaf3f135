"""What `/metrics` tells: histograms of the front, everything else derived from `Timeline` and `Load`.

Observing costs a bisection and two additions (this happens for every token), the text is made when it is asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.base.messages import Load, Ready, Timeline, Usage

LATENCY = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
BETWEEN = (0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
STAGES = {
    "queue": ("received", "scheduled"),
    "prefill": ("scheduled", "prefilled"),
    "handoff_offer": ("received", "offered"),
    "handoff_deliver": ("offered", "delivered"),
    "handoff_tail": ("prefilled", "delivered"),
    "handoff_to_first_token": ("delivered", "first_token"),
    "decode": ("first_token", "finished"),
}
"""A stage is the time between two marks; on P and D other marks exist, so each role has its own stages."""
GAUGES: dict[str, tuple[str, Callable[[Load], float]]] = {
    "num_requests_running": ("sequences in the running batch", lambda load: load.running),
    "num_requests_waiting": ("sequences that wait for pages or a place", lambda load: load.waiting),
    "num_tokens_waiting": ("tokens of prompts that have no KV here yet", lambda load: load.waiting_tokens),
    "num_handoffs_open": ("sequences between prefill and decode", lambda load: load.handoffs),
    "kv_usage_ratio": ("share of the KV pages in use", lambda load: 1 - load.free_pages / max(load.total_pages, 1)),
}
PAGES: dict[str, Callable[[Load], int]] = {
    "free": lambda load: load.free_pages - load.cached_pages,
    "cached": lambda load: load.cached_pages,
    "used": lambda load: load.total_pages - load.free_pages - load.quarantined_pages,
    "quarantined": lambda load: load.quarantined_pages,
}
COUNTERS: dict[str, tuple[str, Callable[[Load], float]]] = {
    "engine_steps": ("forward steps", lambda load: load.steps),
    "engine_busy_seconds": ("time in forward steps", lambda load: load.busy_seconds),
    "engine_prompt_tokens": ("prompt tokens computed", lambda load: load.prompt_tokens),
    "engine_generated_tokens": ("tokens handed out", lambda load: load.generated_tokens),
    "retractions": ("sequences preempted for want of pages", lambda load: load.retractions),
    "handoff_bytes": ("bytes of KV moved", lambda load: load.handoff_bytes),
    "handoff_seconds": ("time spent moving KV", lambda load: load.handoff_seconds),
}


class Histogram:
    """Counts per bucket, and the sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        edges = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        rows, running = [], 0
        for edge, count in zip(edges, self.counts, strict=True):
            running += count
            rows.append((edge, float(running)))
        return rows


class Metrics:
    """Told by the request handlers, read by the collector."""

    def __init__(self) -> None:
        self.first_token = Histogram(LATENCY)
        self.between_tokens = Histogram(BETWEEN)
        self.end_to_end = Histogram(LATENCY)
        self.stages = {name: Histogram(LATENCY) for name in STAGES}
        self.requests: Counter[tuple[str, str]] = Counter()
        """By (route, outcome)."""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.open_requests = 0

    def finished(self, usage: Usage, timeline: Timeline | None) -> None:
        """A sequence ended, in whatever way."""
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens
        if timeline is None:
            return
        for name, (begin, end) in STAGES.items():
            start, stop = getattr(timeline, begin), getattr(timeline, end)
            if start and stop >= start:
                self.stages[name].observe(stop - start)


class FrontCollector(Collector):
    """Everything under the prefix `baton_`, with the model and the role as labels."""

    def __init__(self, metrics: Metrics, model: str, role: str, engine: Callable[[], tuple[Ready | None, Load | None]]):
        self._metrics = metrics
        self._names = ["model_name", "role"]
        self._labels = [model, role]
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        yield from self._front()
        ready, load = self._engine()
        up = GaugeMetricFamily("baton_engine_up", "1 while an engine is connected", labels=self._names)
        up.add_metric(self._labels, float(load is not None))
        yield up
        if ready is not None and load is not None:
            yield from self._of_load(load, ready)

    def _front(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield self._histogram("time_to_first_token_seconds", "from the request to its first token", metrics.first_token)
        yield self._histogram("inter_token_latency_seconds", "between tokens", metrics.between_tokens)
        yield self._histogram("e2e_request_latency_seconds", "from the request to its end", metrics.end_to_end)
        stages = HistogramMetricFamily(
            "baton_stage_seconds", "stages of a sequence's life in the engine", labels=[*self._names, "stage"]
        )
        for name, histogram in metrics.stages.items():
            if any(histogram.counts):
                stages.add_metric([*self._labels, name], histogram.cumulative(), histogram.total)
        yield stages
        requests = CounterMetricFamily(
            "baton_requests", "requests by outcome", labels=[*self._names, "route", "outcome"]
        )
        for (route, outcome), count in metrics.requests.items():
            requests.add_metric([*self._labels, route, outcome], count)
        yield requests
        yield self._counter("prompt_tokens", "tokens of the prompts of finished sequences", metrics.prompt_tokens)
        yield self._counter("cached_prompt_tokens", "of these, found in the prefix cache", metrics.cached_tokens)
        yield self._counter("generation_tokens", "tokens generated for finished sequences", metrics.completion_tokens)
        yield self._gauge("num_http_requests", "generation requests the front works on", metrics.open_requests)

    def _of_load(self, load: Load, ready: Ready) -> Iterator[Metric]:
        for name, (help, read) in GAUGES.items():
            yield self._gauge(name, help, read(load))
        pages = GaugeMetricFamily("baton_kv_pages", "KV pages by state", labels=[*self._names, "state"])
        for state, read in PAGES.items():
            pages.add_metric([*self._labels, state], read(load))
        yield pages
        yield self._gauge("kv_tokens_total", "tokens the KV pool holds", load.total_pages * ready.page_size)
        for name, (help, count) in COUNTERS.items():
            yield self._counter(name, help, count(load))
        handoffs = CounterMetricFamily("baton_handoffs", "hand-offs by outcome", labels=[*self._names, "outcome"])
        handoffs.add_metric([*self._labels, "done"], load.handoffs_done)
        handoffs.add_metric([*self._labels, "failed"], load.handoffs_failed)
        yield handoffs

    def _histogram(self, name: str, help: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(f"baton_{name}", help, labels=self._names)
        family.add_metric(self._labels, histogram.cumulative(), histogram.total)
        return family

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"baton_{name}", help, labels=self._names)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(f"baton_{name}", help, labels=self._names)
        family.add_metric(self._labels, value)
        return family


def render(collector: FrontCollector) -> bytes:
    """Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry)
