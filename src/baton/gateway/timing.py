"""The header `Server-Timing` for clients: what the gateway knows when an answer's head goes out. What workers say of
themselves stands beside it, in lines of its own."""

from __future__ import annotations

from baton.gateway.timeline import Timeline
from baton.router.call import Header

SERVER_TIMING = b"server-timing"


def server_timing(timeline: Timeline) -> list[Header]:
    """The gateway's own stages, and what P says, if its receipt has come. The last attempt has begun to answer, or has
    failed; the answering worker's header passes with its others."""
    attempts = timeline.attempts
    first, last, admitted = attempts[0], attempts[-1], timeline.admitted
    queue, route = 1e3 * (admitted - timeline.received), 1e3 * (first.sent - admitted)
    worker = 1e3 * (last.begun - last.sent) if last.begun else 0.0
    value = b"gateway_queue;dur=%.3f, route;dur=%.3f, worker;dur=%.3f" % (queue, route, worker)
    if last is not first:
        value += b", retry;dur=%.3f" % (1e3 * (last.sent - first.sent))
    headers = [(SERVER_TIMING, value)]
    if last.receipt:
        headers += [header for header in last.receipt if header[0] == SERVER_TIMING]
    return headers
