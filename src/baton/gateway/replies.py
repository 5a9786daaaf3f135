"""What the gateway says in its own name: errors in the shape of the route, small JSON replies."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from baton.base.errors import BatonError
from baton.gateway.door import Answer
from baton.router.call import Header

JSON: Header = (b"content-type", b"application/json")
DONE = b"data: [DONE]\n\n"
STATUS_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_encode = msgspec.json.Encoder().encode


class RateLimited(BatonError):
    """More requests at once than the gateway takes."""

    status, code, retryable, retry_after = 429, "rate_limited", True, 1.0


def refuse(answer: Answer, path: str, error: BatonError, headers: list[Header]) -> None:
    """An error in the gateway's own name."""
    body = error_body(path, error)
    answer.start(error.status, [*error_headers(error), *headers], len(body))
    answer.write(body, more=False)


def error_body(path: str, error: BatonError) -> bytes:
    """OpenAI's envelope on /v1 routes, SGLang's `{"error": "..."}` on its own ones."""
    if not path.startswith("/v1/"):
        return _encode({"error": error.message})
    return _encode({"error": envelope(error)})


def envelope(error: BatonError) -> dict[str, Any]:
    kind = STATUS_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"message": error.message, "type": kind, "param": error.param, "code": error.code}


def error_headers(error: BatonError) -> list[Header]:
    headers = [JSON]
    if error.retry_after is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after))))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def error_event(path: str, error: BatonError) -> bytes:
    """For a stream that has begun: an error event, then the end, so that no client waits or takes it for a whole."""
    return b"data: " + _encode({"error": envelope(error)}) + b"\n\n" + DONE
