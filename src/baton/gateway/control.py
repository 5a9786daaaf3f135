"""Everything that is not inference: health, workers, models, metrics, fan-outs. Starlette; not the hot path."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from baton.base.errors import BadRequest, BatonError
from baton.gateway.metrics import Metrics
from baton.gateway.models import passed_on
from baton.gateway.replies import error_body, error_headers
from baton.router.registry import ROLES, Worker
from baton.router.router import Router

OPEN_PATHS = frozenset({"/health", "/liveness", "/readiness", "/metrics", "/dashboard"})
"""Need no API key."""
PROXIED = ("/model_info", "/server_info", "/get_model_info", "/get_server_info")


class Part(Protocol):
    def routes(self) -> list[Route]: ...


class Control:
    """The handlers; all state but one bit is the router's."""

    def __init__(self, router: Router, metrics: Metrics, parts: Sequence[Part]) -> None:
        """`parts`: routes that live in files of their own."""
        self._router = router
        self._metrics = metrics
        self._parts = parts
        self._was_ready = False
        self.exposed: Callable[[], Awaitable[bytes]] = self._exposed
        """What `/metrics` says; with several processes, that of all of them."""

    def app(self) -> Starlette:
        routes = [
            Route("/health", self.alive, methods=["GET"]),
            Route("/liveness", self.alive, methods=["GET"]),
            Route("/readiness", self.readiness, methods=["GET"]),
            Route("/metrics", self.exposition, methods=["GET"]),
            Route("/flush_cache", self.flush_cache, methods=["GET", "POST"]),
            Route("/abort_request", self.abort_request, methods=["POST"]),
            Route("/loads", self.loads, methods=["GET"]),
            Route("/get_loads", self.loads, methods=["GET"]),
            *(Route(path, self.proxy, methods=["GET"]) for path in PROXIED),
            *(route for part in self._parts for route in part.routes()),
        ]
        return Starlette(
            routes=routes, exception_handlers={BatonError: self._error, 404: self._missing, 405: self._missing}
        )

    async def alive(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readiness(self, request: Request) -> Response:
        """200 "ready" if every role that is registered has a usable worker; once that was so, 200 "degraded" as long
        as anybody can serve; else 503."""
        registry = self._router.registry
        registry.refresh(asyncio.get_running_loop().time())
        staying = [worker for worker in registry.workers if not worker.draining]
        total = {role: sum(w.role == role for w in staying) for role in ROLES}
        usable = {role: len(registry.snapshot.of(role)) for role in ROLES}
        serves = any(fleet.answering.workers for fleet in registry.snapshot.fleets.values())
        whole = serves and all(usable[role] for role in ROLES if total[role])
        self._was_ready |= whole
        ready = whole or (serves and self._was_ready)
        body: dict[str, Any] = {
            "status": "ready" if whole else "degraded" if ready else "not_ready",
            **{role: {"healthy": usable[role], "total": total[role]} for role in ROLES},
            "healthy_workers": sum(usable.values()),
            "total_workers": sum(total.values()),
        }
        if not whole:
            body["reason"] = self._router.missing(addresses=True)
        return JSONResponse(body, 200 if ready else 503, headers=None if ready else {"retry-after": "1"})

    async def exposition(self, request: Request) -> Response:
        return Response(await self.exposed(), media_type="text/plain; version=0.0.4")

    async def _exposed(self) -> bytes:
        return self._metrics.exposition(asyncio.get_running_loop().time())

    async def loads(self, request: Request) -> Response:
        """What was sent and is not answered, as this gateway knows it; no worker is asked."""
        loads = [
            {"worker": w.url, "worker_type": w.role, "load": w.load, "in_flight": w.in_flight}
            for w in self._router.registry.workers
        ]
        return JSONResponse({"workers": loads, "load": sum(w.load for w in self._router.registry.workers)})

    async def flush_cache(self, request: Request) -> Response:
        return await self._fan_out("POST", "/flush_cache", b"", lambda worker: worker.url)

    async def abort_request(self, request: Request) -> Response:
        return await self._fan_out("POST", "/abort_request", await request.body(), lambda worker: worker.id)

    async def proxy(self, request: Request) -> Response:
        """The answer of one worker."""
        return await passed_on(self._router, self._router.plan_one().answering, request)

    async def _fan_out(self, method: str, path: str, body: bytes, named: Callable[[Worker], str]) -> Response:
        """200 if every worker agrees; each one's answer is in the body. A body that they all refuse is the client's."""
        replies = await self._router.ask_all(method, path, body)
        refusals = [reply for reply in replies.values() if not isinstance(reply, str) and reply.status in (400, 413)]
        if refusals and len(refusals) == len(replies):
            return Response(refusals[0].body, refusals[0].status, media_type="application/json")
        results = {
            named(worker): {"status": 0, "message": reply}
            if isinstance(reply, str)
            else {"status": reply.status, "message": reply.body.decode("utf-8", "replace")[:500]}
            for worker, reply in replies.items()
        }
        good = all(not isinstance(reply, str) and reply.ok for reply in replies.values())
        return JSONResponse({"success": good, "workers": results}, 200 if good else 502)

    async def _error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, BatonError)
        headers = {name.decode(): value.decode() for name, value in error_headers(error)}
        return Response(error_body(request.url.path, error), error.status, headers)

    async def _missing(self, request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        wrong = BadRequest(f"{request.method} {request.url.path}: no such route here")
        wrong.status, wrong.code = status, "not_found_error" if status == 404 else "method_not_allowed"
        return Response(error_body(request.url.path, wrong), status, media_type="application/json")


def new_request_id() -> bytes:
    return b"%032x" % random.getrandbits(128)
