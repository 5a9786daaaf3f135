"""`/v1/models`: the models of all workers, each once, as one who serves it describes it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from baton.base.errors import NotFound, Unavailable
from baton.router.fetch import FetchFailed
from baton.router.registry import Worker
from baton.router.router import Router


class _Card(msgspec.Struct):
    id: str


class _Cards(msgspec.Struct):
    data: list[msgspec.Raw]


class ModelRoutes:
    def __init__(self, router: Router) -> None:
        self._router = router

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.all, methods=["GET"]),
            Route("/v1/models/{id:path}", self.one, methods=["GET"]),
        ]

    async def all(self, request: Request) -> Response:
        known = self._by_model()
        if len(known) < 2:
            return await passed_on(self._router, self._router.plan_one().answering, request)
        cards = await self._cards(list(known.values()))
        return JSONResponse({"object": "list", "data": list(cards.values())})

    async def one(self, request: Request) -> Response:
        """The worker of a single model knows its other names, too."""
        known, wanted = self._by_model(), request.path_params["id"]
        if len(known) < 2:
            return await passed_on(self._router, self._router.plan_one().answering, request)
        if wanted in known:
            return await passed_on(self._router, known[wanted], request)
        cards = await self._cards(list(known.values()))
        if wanted not in cards:
            raise NotFound(f"model {wanted!r} is not served here; served: {', '.join(sorted(cards))}", param="model")
        return JSONResponse(cards[wanted])

    def _by_model(self) -> dict[str, Worker]:
        """Somebody usable for each."""
        self._router.registry.refresh(asyncio.get_running_loop().time())
        return {worker.model: worker for worker in self._router.registry.snapshot.workers}

    async def _cards(self, workers: list[Worker]) -> dict[str, Any]:
        """By id. Who does not answer is left out; raises `Unavailable` if nobody does."""
        cards: dict[str, Any] = {}
        answered = False
        for reply in await asyncio.gather(*map(self._ask, workers)):
            answered |= reply is not None
            for raw in reply or []:
                card = msgspec.json.decode(raw, type=_Card)
                cards.setdefault(card.id, msgspec.json.decode(raw))
        if not answered:
            raise Unavailable("no worker says which models it has")
        return cards

    async def _ask(self, worker: Worker) -> list[msgspec.Raw] | None:
        try:
            reply = await self._router.ask(worker, "GET", "/v1/models")
            return msgspec.json.decode(reply.body, type=_Cards).data if reply.ok else None
        except (FetchFailed, msgspec.MsgspecError, UnicodeDecodeError):
            return None


async def passed_on(router: Router, worker: Worker, request: Request) -> Response:
    """What a worker says to this request. Raises `Unavailable` if nothing."""
    query = request.scope["query_string"].decode("ascii", "replace")
    target = request.scope["raw_path"].decode("ascii") + (f"?{query}" if query else "")
    try:
        reply = await router.ask(worker, "GET", target)
    except FetchFailed as error:
        raise Unavailable(f"{worker.name}: {error}") from error
    kind = next((value.decode("latin-1") for name, value in reply.headers if name == b"content-type"), None)
    return Response(reply.body, reply.status, media_type=kind)
