"""What every wire format offers to the worker, and the one shape of errors they share."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from baton.api.job import Job, ModelContext
from baton.api.output import Output
from baton.base.errors import BadRequest, BatonError

DONE = b"data: [DONE]\n\n"
MAX_RID = 256


class Writer(Protocol):
    """Turns one request's outputs into bytes: either `delta`..., `end`, or one `body`."""

    def delta(self, output: Output, text: str) -> bytes:
        """Events for what an output has gained since the last call, its end included; may be empty."""
        ...

    def end(self, outputs: Sequence[Output]) -> bytes:
        """Everything after the last token, `[DONE]` included."""
        ...

    def body(self, outputs: Sequence[Output]) -> bytes:
        """The whole answer, not streamed."""
        ...


class Dialect(Protocol):
    name: str

    def parse(self, body: bytes, context: ModelContext, rid: str | None) -> tuple[Job, Writer]:
        """Understand a request; `rid` is the id from its headers. Raises `ClientError`."""
        ...


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str
    retryable: bool


class ErrorBody(msgspec.Struct):
    """OpenAI's envelope, on every route; `retryable` says whether the same request may work later."""

    error: ErrorDetail


def error_body(error: BatonError) -> bytes:
    kind = error.code if error.status < 500 else "server_error"
    return msgspec.json.encode(ErrorBody(ErrorDetail(error.message, kind, error.param, error.code, error.retryable)))


def error_events(error: BatonError) -> bytes:
    """The end of a stream that had begun."""
    return b"data: " + error_body(error) + b"\n\n" + DONE


def decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """Raises `BadRequest` with the field's name for JSON that is broken, or not of the right types."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        where = re.search(r" - at `\$\.?([^`]*)`$", str(error))
        raise BadRequest(str(error), param=where.group(1) or None if where else None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error


def request_id(given: str | None, prefix: str, header: str | None = None) -> str:
    """The client's id as it is, else the prefix with the one from its headers, else with a new one."""
    if given is None:
        given = prefix + (header if header is not None else secrets.token_hex(16))
    if not 0 < len(given) <= MAX_RID:
        raise BadRequest(f"a request id must have 1 to {MAX_RID} characters", param="rid")
    return given
