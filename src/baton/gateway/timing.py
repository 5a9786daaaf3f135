"""The header `Server-Timing` for clients: what the gateway knows when an answer's head goes out, then what the workers
say of themselves, unread."""

from __future__ import annotations

from baton.gateway.timeline import Timeline
from baton.router.call import Header

SERVER_TIMING = b"server-timing"


def server_timing(timeline: Timeline) -> Header:
    """Of a request whose last attempt has begun to answer, or has failed."""
    attempt, first = timeline.attempts[-1], timeline.attempts[0]
    admitted = timeline.admitted
    parts = [
        b"gateway_queue;dur=%.3f, route;dur=%.3f"
        % (1e3 * (admitted - timeline.received), 1e3 * (first.sent - admitted))
    ]
    if attempt is not first:
        parts.append(b"retry;dur=%.3f" % (1e3 * (attempt.sent - first.sent)))
    if attempt.begun:
        parts.append(b"worker;dur=%.3f" % (1e3 * (attempt.begun - attempt.sent)))
    parts += [value for name, value in attempt.receipt if name == SERVER_TIMING]
    parts += [value for name, value in attempt.answer if name == SERVER_TIMING]
    return SERVER_TIMING, b", ".join(parts)
