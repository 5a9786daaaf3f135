"""`/workers`, in sglang-router's shape: who serves here. Workers that register themselves use it, too."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from baton.base.errors import BadRequest, ConfigError
from baton.gateway.roster import Change, Entry, Port, Roster, Seconds
from baton.router import health
from baton.router.registry import ROLES, Connector, Registry, Role, Runtime, Worker

Body = TypeVar("Body", bound=msgspec.Struct)


class NewWorker(msgspec.Struct):
    """`POST /workers`; more fields of sglang-router are accepted and not used (priority, cost)."""

    url: str
    worker_type: Role = "regular"
    bootstrap_port: Port | None = None
    runtime: Runtime | None = None
    connector: Connector = ""
    ttl: Seconds | None = None
    model_id: str | None = None
    instance: str = ""
    labels: dict[str, str] | None = None
    api_key: str | None = None

    def entry(self) -> Entry:
        return Entry(
            url=self.url,
            worker_type=self.worker_type,
            bootstrap_port=self.bootstrap_port,
            runtime=self.runtime or "auto",
            connector=self.connector,
            ttl=self.ttl,
            model_id=self.model_id or "",
            instance=self.instance,
            labels=self.labels or {},
        )


class Amendment(msgspec.Struct):
    """`PUT /workers/{id}`. An empty one is a heartbeat."""

    worker_type: Role | None = None
    bootstrap_port: Port | None = None
    labels: dict[str, str] | None = None
    ttl: Seconds | None = None
    instance: str = ""


class WorkerRoutes:
    def __init__(self, registry: Registry, roster: Roster, worker_key: str, patience: float) -> None:
        """`worker_key`: the one that all workers are sent. `patience`: seconds that requests in flight have when their
        worker is removed."""
        self._registry = registry
        self._roster = roster
        self._worker_key = worker_key
        self._patience = patience

    def routes(self) -> list[Route]:
        return [
            Route("/workers", self.show_all, methods=["GET"]),
            Route("/workers", self.add, methods=["POST"]),
            Route("/workers", self.remove, methods=["DELETE"]),
            Route("/workers/{id:path}", self.show, methods=["GET"]),
            Route("/workers/{id:path}", self.change, methods=["PUT", "PATCH"]),
            Route("/workers/{id:path}", self.remove, methods=["DELETE"]),
        ]

    async def show_all(self, request: Request) -> Response:
        workers = self._registry.workers
        stats = {f"{role}_count": sum(w.role == role for w in workers) for role in ROLES}
        return JSONResponse({"workers": [info(w) for w in workers], "total": len(workers), "stats": stats})

    async def show(self, request: Request) -> Response:
        return JSONResponse(info(self._registry.find(request.path_params["id"])))

    async def add(self, request: Request) -> Response:
        """202 for a new one, 200 if it is known and stays."""
        new = _decode(await request.body(), NewWorker)
        if new.api_key and new.api_key != self._worker_key:
            raise BadRequest("all workers are sent one key here, --worker-api-key", param="api_key")
        try:
            worker, is_new = self._roster.add(new.entry())
        except ConfigError as error:
            raise BadRequest(error.message, param="url") from error
        message = "the worker is used as soon as it answers its health check" if is_new else "the worker is known"
        reply = {"url": worker.url, "location": f"/workers/{worker.id}", "ttl": worker.ttl}
        return _accepted(worker, message, 202 if is_new else 200, **reply)

    async def change(self, request: Request) -> Response:
        worker = self._registry.find(request.path_params["id"])
        wanted = _decode(await request.body() or b"{}", Amendment)
        if wanted.worker_type not in (None, worker.role):
            raise BadRequest("a worker's role does not change; remove it and add it anew", param="worker_type")
        change = Change(worker.url, wanted.bootstrap_port, wanted.labels, wanted.ttl, wanted.instance)
        self._roster.change(worker, change)
        return _accepted(worker, "the worker is changed", 202)

    async def remove(self, request: Request) -> Response:
        """It gets nothing new from now on; it is gone when its requests are over. `?force=true` breaks them off."""
        name = request.path_params.get("id") or request.query_params.get("url") or ""
        worker = self._registry.find(name)
        force = request.query_params.get("force", "").lower() in ("1", "true", "yes")
        self._roster.remove(worker, 0.0 if force else self._patience)
        return _accepted(worker, f"the worker is removed; {worker.in_flight} requests are in flight there", 202)


def info(worker: Worker) -> dict[str, Any]:
    now = asyncio.get_running_loop().time()
    return {
        "id": worker.id,
        "name": worker.name,
        "url": worker.url,
        "worker_type": worker.role,
        "bootstrap_port": worker.bootstrap_port,
        "runtime": worker.runtime,
        "model_id": worker.model,
        "instance": worker.instance,
        "revision": worker.revision,
        "labels": dict(worker.labels),
        "is_healthy": worker.healthy,
        "draining": worker.draining,
        "reason": worker.reason,
        "breaker": health.state(worker.breaker, now),
        "expires_in": None if worker.expires is None else round(worker.expires - now, 3),
        "load": worker.load,
        "in_flight": worker.in_flight,
        "served": worker.served,
        "errors": worker.errors,
        "connections": worker.pool.open_connections,
    }


def _decode(body: bytes, kind: type[Body]) -> Body:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRequest(f'a worker is {{"url", "worker_type", "bootstrap_port"}}: {error}') from error


def _accepted(worker: Worker, message: str, status: int, **more: Any) -> Response:
    return JSONResponse({"status": "accepted", "worker_id": worker.id, "message": message, **more}, status)
