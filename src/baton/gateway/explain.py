"""`/explain`: where a request would go now, and why. Nothing is sent, learned or counted."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from baton.base.config import GatewayConfig
from baton.base.errors import BadRequest
from baton.gateway.workers import info
from baton.router import splice
from baton.router.ask import Ask
from baton.router.router import Router
from baton.router.splice import Body, Kind

MAX_TOKENS = re.compile("[0-9]{1,18}")
ROUTING_KEYS = ("x-baton-key", "x-smg-routing-key", "x-session-id")


class ExplainRoutes:
    def __init__(self, router: Router, config: GatewayConfig) -> None:
        self._router = router
        self._config = _shown(config)

    def routes(self) -> list[Route]:
        return [
            Route("/explain", self.by_query, methods=["GET"]),
            Route("/explain", self.by_body, methods=["POST"]),
        ]

    async def by_query(self, request: Request) -> Response:
        """`?model=&prompt=&max_tokens=&key=`"""
        query = request.query_params
        body: dict[str, Any] = {"model": query.get("model", ""), "prompt": query.get("prompt", "")}
        if "max_tokens" in query:
            if not MAX_TOKENS.fullmatch(query["max_tokens"]):
                raise BadRequest("max_tokens is a number", param="max_tokens")
            body["max_tokens"] = int(query["max_tokens"])
        return self._explained(json.dumps(body).encode(), "completions", query.get("key", ""))

    async def by_body(self, request: Request) -> Response:
        """An ordinary request, whichever route it is meant for."""
        key = next((request.headers[name] for name in ROUTING_KEYS if name in request.headers), "")
        raw = await request.body()
        kind: Kind = "generate" if b'"sampling_params"' in raw or b'"input_ids"' in raw else "completions"
        return self._explained(raw, kind, key)

    def _explained(self, raw: bytes, kind: Kind, key: str) -> Response:
        """Raises `BadRequest`, `NotFound`."""
        body = splice.read(raw, kind)
        ask = Ask(body.prompt_tokens, body.max_tokens, body.prompt, key.encode())
        explanation = self._router.planner.explain(ask, body.model)
        target, registry = explanation.target, self._router.registry
        usable = frozenset(registry.snapshot.workers)
        return JSONResponse(
            {
                "request": _request(body),
                "prefill": target.prefill.url if target is not None and target.prefill is not None else None,
                "answering": target.answering.url if target is not None else None,
                "why": explanation.why if target is not None else [self._router.missing(addresses=True)],
                "workers": [{**info(worker), "usable": worker in usable} for worker in registry.workers],
                "configuration": self._config,
            }
        )


def _request(body: Body) -> dict[str, Any]:
    return {"model": body.model, "prompt_tokens": body.prompt_tokens, "max_tokens": body.max_tokens}


def _shown(config: GatewayConfig) -> dict[str, Any]:
    """What is in force, without secrets: of a key only that there is one."""
    values = dataclasses.asdict(config)
    return {name: bool(value) if name.endswith("api_key") else value for name, value in values.items()}
