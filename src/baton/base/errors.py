"""One tree of errors; each class says whose fault it is, which HTTP status it has and whether to retry.

BatonError
 ├─ ClientError           the request is wrong; the same request will fail again
 │   ├─ BadRequest  400       ├─ Unauthorized 401
 │   ├─ Forbidden   403       ├─ NotFound     404
 │   └─ TooLarge    413
 ├─ Overloaded      503   nothing is wrong; come back later (`retry_after` seconds)
 ├─ Unavailable     503   a part of the system is not there (starting, draining, dead)
 ├─ HandoffLost     502   prefill and decode lost each other; a new attempt may work
 ├─ TimedOut        504   a deadline of ours passed
 ├─ Cancelled       499   somebody asked for it
 ├─ Internal        500   our own fault
 └─ ConfigError     500   the operator's fault, raised at start
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BatonError(Exception):
    """Base of all errors this package raises on purpose."""

    status = 500
    code = "internal_error"
    retryable = False
    retry_after: float | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ClientError(BatonError):
    status, code = 400, "invalid_request_error"


class BadRequest(ClientError):
    """The request breaks the contract; `param` names the field."""


class Unauthorized(ClientError):
    status, code = 401, "authentication_error"


class Forbidden(ClientError):
    """It is known who asks, and they may not."""

    status, code = 403, "permission_error"


class NotFound(ClientError):
    status, code = 404, "not_found_error"


class TooLarge(ClientError):
    status, code = 413, "payload_too_large"


class Overloaded(BatonError):
    """The queue is full: refused early instead of discovered late."""

    status, code, retryable = 503, "overloaded", True

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(BatonError):
    status, code, retryable, retry_after = 503, "unavailable", True, 1.0


class HandoffLost(BatonError):
    status, code, retryable = 502, "handoff_lost", True


class TimedOut(BatonError):
    status, code, retryable = 504, "timeout", True

    @classmethod
    def of_request(cls) -> TimedOut:
        """The request's own."""
        return cls("the request's deadline passed (request-timeout, or the header x-request-timeout)")


class Cancelled(BatonError):
    status, code = 499, "cancelled"


class Internal(BatonError):
    pass


class ConfigError(BatonError):
    code = "config_error"


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """`unknown policy "lru2"; known: fifo, lru (did you mean "lru"?)`: the sentence for a name not in a table."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f' (did you mean "{near[0]}"?)' if near else ""
    return f'unknown {kind} "{name}"; known: {", ".join(names)}{hint}'
