"""Everything that is not inference: health, workers, models, metrics, fan-outs. Starlette; not the hot path."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from baton.base.errors import BadRequest, BatonError, ConfigError, Unavailable
from baton.gateway.metrics import Metrics
from baton.gateway.replies import error_body, error_headers
from baton.router import health
from baton.router.fetch import FetchFailed
from baton.router.registry import ROLES, Connector, Description, Role, Runtime, Worker
from baton.router.router import Router

OPEN_PATHS = frozenset({"/health", "/liveness", "/readiness", "/metrics"})
"""Need no API key."""
PROXIED = ("/v1/models", "/model_info", "/server_info", "/get_model_info", "/get_server_info")


class NewWorker(msgspec.Struct):
    """`POST /workers`; more fields of sglang-router are accepted and not used."""

    url: str
    worker_type: Role = "regular"
    bootstrap_port: int | None = None
    runtime: Runtime = "auto"
    connector: Connector = ""
    ttl: float | None = None

    def description(self) -> Description:
        return Description(self.worker_type, self.bootstrap_port, self.runtime, self.connector, self.ttl)


class Control:
    """The handlers; all state is the router's."""

    def __init__(self, router: Router, metrics: Metrics) -> None:
        self._router = router
        self._metrics = metrics

    def app(self) -> Starlette:
        routes = [
            Route("/health", self.alive, methods=["GET"]),
            Route("/liveness", self.alive, methods=["GET"]),
            Route("/readiness", self.readiness, methods=["GET"]),
            Route("/metrics", self.exposition, methods=["GET"]),
            Route("/workers", self.list_workers, methods=["GET"]),
            Route("/workers", self.add_worker, methods=["POST"]),
            Route("/workers", self.remove_worker, methods=["DELETE"]),
            Route("/workers/{id:path}", self.show_worker, methods=["GET"]),
            Route("/workers/{id:path}", self.remove_worker, methods=["DELETE"]),
            Route("/flush_cache", self.flush_cache, methods=["GET", "POST"]),
            Route("/abort_request", self.abort_request, methods=["POST"]),
            Route("/v1/models/{id:path}", self.proxy, methods=["GET"]),
            *(Route(path, self.proxy, methods=["GET"]) for path in PROXIED),
        ]
        return Starlette(
            routes=routes, exception_handlers={BatonError: self._error, 404: self._missing, 405: self._missing}
        )

    async def alive(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readiness(self, request: Request) -> Response:
        """200 if a request could be served now."""
        registry = self._router.registry
        registry.refresh(asyncio.get_running_loop().time())
        total = {role: sum(w.role == role for w in registry.workers) for role in ROLES}
        usable = {role: len(registry.snapshot.of(role)) for role in ROLES}
        ready = bool(usable["regular"] or (usable["prefill"] and usable["decode"]))
        body: dict[str, Any] = {
            "status": "ready" if ready else "not_ready",
            **{role: {"healthy": usable[role], "total": total[role]} for role in ROLES},
            "healthy_workers": sum(usable.values()),
            "total_workers": sum(total.values()),
        }
        if not ready:
            body["reason"] = self._router.missing()
        return JSONResponse(body, 200 if ready else 503, headers=None if ready else {"retry-after": "1"})

    async def exposition(self, request: Request) -> Response:
        body = self._metrics.exposition(asyncio.get_running_loop().time())
        return Response(body, media_type="text/plain; version=0.0.4")

    async def list_workers(self, request: Request) -> Response:
        workers = self._router.registry.workers
        stats = {f"{role}_count": sum(w.role == role for w in workers) for role in ROLES}
        return JSONResponse({"workers": [_info(w) for w in workers], "total": len(workers), "stats": stats})

    async def show_worker(self, request: Request) -> Response:
        return JSONResponse(_info(self._router.registry.find(request.path_params["id"])))

    async def add_worker(self, request: Request) -> Response:
        try:
            new = msgspec.json.decode(await request.body(), type=NewWorker)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise BadRequest(f'a worker is {{"url", "worker_type", "bootstrap_port"}}: {error}') from error
        try:
            worker = self._router.add(new.url, new.description())
        except ConfigError as error:
            raise BadRequest(error.message, param="url") from error
        return JSONResponse(
            {
                "status": "accepted",
                "worker_id": worker.id,
                "url": worker.url,
                "location": f"/workers/{worker.id}",
                "message": "the worker is used as soon as it answers its health check",
            },
            202,
        )

    async def remove_worker(self, request: Request) -> Response:
        name = request.path_params.get("id") or request.query_params.get("url") or ""
        worker = self._router.registry.find(name)
        await self._router.remove(worker)
        return JSONResponse({"status": "accepted", "worker_id": worker.id, "message": "the worker is removed"}, 202)

    async def flush_cache(self, request: Request) -> Response:
        return await self._fan_out("POST", "/flush_cache", b"")

    async def abort_request(self, request: Request) -> Response:
        return await self._fan_out("POST", "/abort_request", await request.body())

    async def proxy(self, request: Request) -> Response:
        """The answer of one worker."""
        worker = self._router.plan_one().answering
        query = request.scope["query_string"].decode("ascii", "replace")
        target = request.scope["raw_path"].decode("ascii") + (f"?{query}" if query else "")
        try:
            reply = await self._router.ask(worker, "GET", target)
        except FetchFailed as error:
            raise Unavailable(str(error)) from error
        kind = next((value.decode("latin-1") for name, value in reply.headers if name == b"content-type"), None)
        return Response(reply.body, reply.status, media_type=kind)

    async def _fan_out(self, method: str, path: str, body: bytes) -> Response:
        """200 if every worker agrees; each one's answer is in the body. A body that they all refuse is the client's."""
        replies = await self._router.ask_all(method, path, body)
        refusals = [reply for reply in replies.values() if not isinstance(reply, str) and reply.status in (400, 413)]
        if refusals and len(refusals) == len(replies):
            return Response(refusals[0].body, refusals[0].status, media_type="application/json")
        results = {
            url: {"status": 0, "message": reply}
            if isinstance(reply, str)
            else {"status": reply.status, "message": reply.body.decode("utf-8", "replace")[:500]}
            for url, reply in replies.items()
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


def _info(worker: Worker) -> dict[str, Any]:
    return {
        "id": worker.id,
        "url": worker.url,
        "worker_type": worker.role,
        "bootstrap_port": worker.bootstrap_port,
        "model_id": worker.model,
        "instance": worker.instance,
        "revision": worker.revision,
        "is_healthy": worker.healthy,
        "reason": worker.reason,
        "breaker": health.state(worker.breaker, asyncio.get_running_loop().time()),
        "load": worker.load,
        "in_flight": worker.in_flight,
        "connections": worker.pool.open_connections,
    }


def new_request_id() -> bytes:
    return uuid.uuid4().hex.encode()
