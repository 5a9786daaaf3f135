"""What people look at: requests, statistics, the dashboard. Mounted beside the control routes; nothing is computed, and
no worker asked, before somebody looks."""

from __future__ import annotations

import asyncio
import time
from itertools import islice

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from baton.base.errors import BadRequest, NotFound
from baton.gateway import dashboard, views
from baton.gateway.recorder import Recorder
from baton.gateway.turnstile import Turnstile
from baton.gateway.views import EngineView, Requests, Stats
from baton.router.fetch import FetchFailed
from baton.router.registry import Worker
from baton.router.router import Router

LOADS_SECONDS = 1.0
"""How old what engines said may be."""
LOADS_PATIENCE = 0.5
"""Seconds an engine has to say how busy it is."""
STAGED = 256
"""Requests whose stages are averaged."""
LIMIT, MOST = 50, 1000
"""Requests in a list, if not told otherwise, and at most."""
HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
_encode = msgspec.json.Encoder().encode


class Disaggregation(msgspec.Struct, frozen=True):
    prefill_inflight_queue_reqs: int = 0
    decode_prealloc_queue_reqs: int = 0
    decode_transfer_queue_reqs: int = 0


class Load(msgspec.Struct, frozen=True):
    """What we read of a worker's `GET /v1/loads`, SGLang's or our own."""

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_used_tokens: int = 0
    max_total_num_tokens: int = 0
    gen_throughput: float = 0.0
    cache_hit_rate: float = 0.0
    disaggregation: Disaggregation | None = None


class Loads(msgspec.Struct, frozen=True):
    loads: list[Load] = []

    def view(self) -> EngineView:
        """All ranks together."""
        loads = self.loads
        handoffs = [load.disaggregation for load in loads if load.disaggregation is not None]
        return EngineView(
            running=sum(load.num_running_reqs for load in loads),
            waiting=sum(load.num_waiting_reqs for load in loads),
            used_tokens=sum(load.num_used_tokens for load in loads),
            max_tokens=sum(load.max_total_num_tokens for load in loads),
            throughput=round(sum(load.gen_throughput for load in loads), 1),
            cache_hit_rate=round(max((load.cache_hit_rate for load in loads), default=0.0), 4),
            handoffs=sum(h.prefill_inflight_queue_reqs + h.decode_transfer_queue_reqs for h in handoffs),
        )


class Watch:
    """The handlers."""

    def __init__(self, router: Router, recorder: Recorder, turnstile: Turnstile) -> None:
        self._router = router
        self._recorder = recorder
        self._turnstile = turnstile
        self._engines: dict[Worker, EngineView] = {}
        self._asked = -LOADS_SECONDS

    def routes(self) -> list[Route]:
        return [
            Route("/requests", self.requests, methods=["GET"]),
            Route("/requests/{id:path}", self.request, methods=["GET"]),
            Route("/stats", self.stats, methods=["GET"]),
            Route("/dashboard", self.dashboard, methods=["GET"]),
        ]

    async def requests(self, request: Request) -> Response:
        given = request.query_params.get("limit", str(LIMIT))
        if not given.isascii() or not given.isdecimal():
            raise BadRequest("limit is a number", param="limit")
        now, unix = self._now()
        latest = self._recorder.latest(min(int(given[:9]), MOST))
        return _json(Requests([views.request_view(timeline, now, unix) for timeline in latest]))

    async def request(self, request: Request) -> Response:
        id = request.path_params["id"]
        timeline = self._recorder.find(id)
        if timeline is None:
            raise NotFound(f"no request {id[:128]!r} is remembered; GET /requests lists the latest")
        return _json(views.request_detail(timeline, *self._now()))

    async def stats(self, request: Request) -> Response:
        engines = await self._loads()
        now, unix = self._now()
        recorder, registry = self._recorder, self._router.registry
        finished = views.window(reversed(recorder.recent), now)
        full = len(finished) == recorder.recent.maxlen
        seconds = max(0.001, now - finished[-1].finished) if full else views.WINDOW
        stats = Stats(
            now=round(unix, 3),
            seconds=round(seconds, 3),
            in_flight=len(recorder.active),
            queued=self._turnstile.admission.waiting,
            requests_per_second=round(len(finished) / seconds, 3),
            output_tokens_per_second=round(sum(t.output_tokens for t in finished) / seconds, 1),
            prompt_tokens_per_second=round(sum(t.prompt_tokens for t in finished) / seconds, 1),
            ttft=views.percentiles(map(views.ttft, finished)),
            itl=views.percentiles(map(views.itl, finished)),
            total=views.percentiles(t.finished - t.received for t in finished),
            flow=views.flow(finished, recorder.active),
            stages=views.mean_stages(list(islice(finished, STAGED))),
            series=views.series(finished, now),
            roles=views.role_views(registry),
            workers=[views.worker_view(worker, engines.get(worker), now) for worker in registry.workers],
        )
        return _json(stats)

    async def dashboard(self, request: Request) -> Response:
        page = dashboard.page()
        headers = {**HEADERS, "content-security-policy": page.policy}
        return Response(page.html, media_type="text/html", headers=headers)

    async def _loads(self) -> dict[Worker, EngineView]:
        """How busy engines are, asked at most once in `LOADS_SECONDS` however many look."""
        now, _ = self._now()
        if now - self._asked >= LOADS_SECONDS:
            self._asked = now
            workers = [worker for worker in self._router.registry.workers if worker.healthy]
            said = await asyncio.gather(*map(self._load, workers))
            self._engines = {worker: view for worker, view in zip(workers, said, strict=True) if view is not None}
        return self._engines

    async def _load(self, worker: Worker) -> EngineView | None:
        try:
            reply = await self._router.ask(worker, "GET", "/v1/loads", timeout=LOADS_PATIENCE)
            return msgspec.json.decode(reply.body, type=Loads).view() if reply.ok else None
        except (FetchFailed, msgspec.MsgspecError, UnicodeDecodeError):
            return None

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.monotonic(), time.time()


def _json(value: msgspec.Struct) -> Response:
    return Response(_encode(value), media_type="application/json", headers={"cache-control": "no-store"})
