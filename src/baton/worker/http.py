"""The little HTTP a front needs, straight on ASGI: bodies with a limit, replies, keys, errors in the right shape."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from baton.api.dialect import error_body
from baton.base.errors import BadRequest, BatonError, Internal, TooLarge, Unauthorized

JSON = b"application/json"
Header = tuple[bytes, bytes]
LINGER_BYTES = 64 * 2**20
"""Of a refused body, at most so much is thrown away (not kept) so that the client gets to read the refusal."""


class Hangup(Exception):
    """The client left while it was still sending."""


def header(scope: Scope, name: bytes) -> bytes | None:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


async def reply(
    send: Send,
    status: int,
    body: bytes,
    *,
    content_type: bytes = JSON,
    headers: Iterable[Header] = (),
    more: bool = False,
) -> None:
    """One whole response. `more`: the caller still has to finish it with an empty last piece."""
    fields = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def reply_json(send: Send, value: Any, status: int = 200) -> None:
    await reply(send, status, msgspec.json.encode(value))


async def reply_error(send: Send, error: BatonError, headers: Iterable[Header] = ()) -> None:
    fields = list(headers)
    if error.retry_after is not None:
        fields.append((b"retry-after", b"%d" % max(1, round(error.retry_after))))
    if error.status == 401:
        fields.append((b"www-authenticate", b"Bearer"))
    await reply(send, error.status, error_body(error), headers=fields)


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The request's body. Raises `TooLarge` without reading on, `Hangup` if the client left."""
    declared = header(scope, b"content-length")
    if declared is not None and int(declared) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Hangup
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit / 2**20:g} MiB (max-body-mb)")


async def refuse_body(receive: Receive, send: Send, error: TooLarge) -> None:
    """Say 413 and close, but throw away what the client is sending already: a connection that is closed on unread
    data is reset, and the client would never see why."""
    body = error_body(error)
    await reply(send, error.status, body, headers=[(b"connection", b"close")], more=True)
    thrown_away = 0
    while thrown_away < LINGER_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        thrown_away += len(message.get("body", b""))
        if not message.get("more_body", False):
            break
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def check_json(scope: Scope) -> None:
    """Raises `BadRequest` for a body that is declared to be something else than JSON."""
    declared = header(scope, b"content-type")
    if declared is None:
        return
    kind = declared.split(b";", 1)[0].strip().lower()
    if kind != JSON and not kind.endswith(b"+json"):
        raise BadRequest(f"the content type is {kind.decode('latin-1')!r}; send application/json")


class Guard:
    """An ASGI endpoint with what all endpoints need: the key is checked, errors become replies."""

    def __init__(self, api_key: str, handle: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._expected = f"Bearer {api_key}".encode() if api_key else None
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._check_key(scope)
            await self._handle(scope, receive, watched)
        except Hangup:
            return
        except TooLarge as error:
            await refuse_body(receive, send, error)
        except BatonError as error:
            if started:
                raise
            await reply_error(send, error)
        except Exception:
            if not started:
                await reply_error(send, Internal("an unexpected error in the worker's front; see its log"))
            raise

    def _check_key(self, scope: Scope) -> None:
        if self._expected is None:
            return
        given = header(scope, b"authorization") or b""
        if not hmac.compare_digest(given, self._expected):
            raise Unauthorized("the API key is missing or wrong; send it as: Authorization: Bearer KEY")
