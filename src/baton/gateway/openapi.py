"""`GET /openapi.json`: what the gateway serves, for people's tools and for tests that try everything it allows.

Requests are described as far as clients need it, and no further: unknown fields pass to the workers.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from baton import __version__
from baton.gateway.workers import Amendment, NewWorker

Json = dict[str, Any]

TEXT: Json = {"type": "string"}
NUMBER: Json = {"type": "integer", "minimum": 0}
FLAG: Json = {"type": "boolean"}
OBJECT: Json = {"type": "object"}
TOKENS: Json = {"type": "array", "items": {"type": "integer", "minimum": 0}}
PROMPT: Json = {"anyOf": [TEXT, TOKENS, {"type": "array", "items": TEXT}, {"type": "array", "items": TOKENS}]}
MESSAGES: Json = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": TEXT},
    },
}
SAMPLING: Json = {
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "stop": {"anyOf": [TEXT, {"type": "array", "items": TEXT, "maxItems": 4}]},
    "n": {"type": "integer", "minimum": 1, "maximum": 4},
}
COMMON: Json = {
    **SAMPLING,
    "model": TEXT,
    "max_tokens": {"type": "integer", "minimum": 1},
    "stream": FLAG,
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**31},
}
MEANINGS = {
    200: "done",
    202: "accepted",
    400: "the request is wrong",
    401: "no key, or a wrong one",
    403: "this key may not do that",
    404: "no such thing",
    405: "no such method here",
    413: "the body is too large",
    415: "a body of this kind is not read",
    422: "the request is wrong",
    429: "too much at once; see Retry-After",
    500: "the worker failed",
    502: "a worker failed, or cannot be reached",
    503: "nobody can serve this now; see Retry-After",
    504: "it took too long",
}
ALWAYS = (400, 401, 403, 413, 429)
WORKERS = (404, 500, 502, 503, 504)
"""Of what is passed to workers."""


def document() -> Json:
    return {
        "openapi": "3.1.0",
        "info": {"title": "Baton", "version": __version__},
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"OpenAIError": _openai_error(), "Error": _body(["error"], error=TEXT)},
        },
        "security": [{}, {"key": []}],
        "paths": _inference() | _information() | _operation() | _workers(),
    }


class OpenApi:
    """The route."""

    def __init__(self) -> None:
        self._document = msgspec.json.encode(document())

    def routes(self) -> list[Route]:
        return [Route("/openapi.json", self.show, methods=["GET"])]

    async def show(self, request: Request) -> Response:
        return Response(self._document, media_type="application/json")


def _inference() -> Json:
    completion = _body(["prompt"], prompt=PROMPT, **COMMON, echo=FLAG, logprobs={"type": "integer", "minimum": 0})
    chat = _body(["messages"], messages=MESSAGES, **COMMON, logprobs=FLAG, top_logprobs={"type": "integer"})
    generate = _body(
        [],
        text={"anyOf": [TEXT, {"type": "array", "items": TEXT}]},
        input_ids={"anyOf": [TOKENS, {"type": "array", "items": TOKENS}]},
        sampling_params=_body([], **SAMPLING, max_new_tokens={"type": "integer", "minimum": 0}),
        stream=FLAG,
        return_logprob=FLAG,
    )
    choices = _body(["choices"], choices={"type": "array"})
    streams = {"text/event-stream": {"schema": TEXT}}
    many = {"type": "array", "items": OBJECT}
    return {
        "/v1/completions": {"post": _op("/v1", "Complete a text", choices, body=completion, more=streams)},
        "/v1/chat/completions": {"post": _op("/v1", "Answer a conversation", choices, body=chat, more=streams)},
        "/generate": {
            "post": _op("worker", "SGLang's own format", {"anyOf": [OBJECT, many]}, body=generate, more=streams)
        },
        "/tokenize": {
            "post": _op(
                "worker", "Text to token ids", OBJECT, body=_body([], prompt=TEXT, messages=MESSAGES, model=TEXT)
            )
        },
        "/detokenize": {"post": _op("worker", "Token ids to text", OBJECT, body=_body(["tokens"], tokens=TOKENS))},
    }


def _information() -> Json:
    models = _body(["object", "data"], object=TEXT, data={"type": "array", "items": OBJECT})
    return {
        "/v1/models": {"get": _op("/v1", "Which models there are", models)},
        "/v1/models/{id}": {"get": _op("/v1", "One of them", OBJECT, parameters=[_id()])},
        "/model_info": {"get": _op("/", "The model, as a worker tells", OBJECT)},
        "/server_info": {"get": _op("/", "The configuration, as a worker tells", OBJECT)},
    }


def _operation() -> Json:
    text = {"text/plain": {"schema": TEXT}}
    status = _body(["status"], status=TEXT)
    return {
        "/health": {"get": _op("/", "The process lives", status, errors=())},
        "/liveness": {"get": _op("/", "The process lives", status, errors=())},
        "/readiness": {"get": _op("/", "Somebody can serve", status, errors=(), also={503: _reply(503, status)})},
        "/metrics": {"get": _op("/", "Prometheus", None, errors=(), more=text)},
        "/loads": {"get": _op("/", "What is in flight, by worker", _body(["workers", "load"]))},
        "/stats": {"get": _op("/", "The last minute", OBJECT)},
        "/requests": {"get": _op("/", "The latest requests", OBJECT, parameters=[_query("limit", NUMBER)])},
        "/requests/{id}": {"get": _op("/", "One of them", OBJECT, parameters=[_id()])},
        "/explain": {
            "get": _op(
                "/", "Where a request would go, and why", OBJECT,
                parameters=[_query(name, TEXT) for name in ("model", "prompt", "max_tokens", "key")],
            ),
            "post": _op("/", "Where this request would go, and why", OBJECT, body=OBJECT),
        },
        "/flush_cache": {"post": _op("/", "Forget cached prefixes, on all workers", _body(["success", "workers"]))},
        "/abort_request": {
            "post": _op(
                "worker", "Abort a request, on all workers", _body(["success", "workers"]),
                body=_body([], rid=TEXT, abort_all=FLAG),
            )
        },
    }  # fmt: skip


def _workers() -> Json:
    accepted = {202: _reply(202, OBJECT)}
    change = _op(
        "/", "Amend it; nothing: a heartbeat", None, body=_schema(Amendment), parameters=[_id()], also=accepted
    )
    remove = _op("/", "Let it finish, then forget it", None, parameters=[_id(), _query("force", FLAG)], also=accepted)
    return {
        "/workers": {
            "get": _op("/", "Who serves", _body(["workers", "total"])),
            "post": _op("/", "One more", OBJECT, body=_schema(NewWorker), also=accepted),
        },
        "/workers/{id}": {
            "get": _op("/", "One of them", _body(["id", "url", "worker_type"]), parameters=[_id()]),
            "put": change,
            "delete": remove,
        },
    }


def _op(
    route: str,
    summary: str,
    result: Json | None,
    *,
    body: Json | None = None,
    more: Json | None = None,
    parameters: list[Json] | None = None,
    errors: tuple[int, ...] = ALWAYS + WORKERS,
    also: dict[int, Json] | None = None,
) -> Json:
    """`result`: the schema of status 200, None: there is no JSON; `more`: other kinds of answers with status 200."""
    error: Json = {"$ref": f"#/components/schemas/{'OpenAIError' if route == '/v1' else 'Error'}"}
    if route == "worker":  # its own errors look like OpenAI's
        error = {"anyOf": [error, {"$ref": "#/components/schemas/OpenAIError"}]}
    responses: dict[int, Json] = {status: _reply(status, error) for status in errors}
    content = ({"application/json": {"schema": result}} if result is not None else {}) | (more or {})
    if content:
        responses[200] = {"description": MEANINGS[200], "content": content}
    responses |= also or {}
    op: Json = {"summary": summary, "responses": {str(status): responses[status] for status in sorted(responses)}}
    if body is not None:
        op["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if parameters:
        op["parameters"] = parameters
    return op


def _reply(status: int, schema: Json) -> Json:
    return {"description": MEANINGS[status], "content": {"application/json": {"schema": schema}}}


def _body(required: list[str], **properties: Json) -> Json:
    return {"type": "object", "required": required, "properties": properties}


def _schema(kind: type[msgspec.Struct]) -> Json:
    """Of a structure, all in one place."""
    made = msgspec.json.schema(kind)
    (found,) = made["$defs"].values()
    return dict(found)


def _id() -> Json:
    return {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _query(name: str, schema: Json) -> Json:
    return {"name": name, "in": "query", "schema": schema}


def _openai_error() -> Json:
    nullable = {"type": ["string", "null"]}
    return _body(["error"], error=_body(["message", "type"], message=TEXT, type=TEXT, param=nullable))
