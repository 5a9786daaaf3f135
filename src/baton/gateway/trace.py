"""W3C trace context: who asks, on whose behalf, and what we call our own part of it.

traceparent: 00-{trace id, 16 bytes}-{parent's span id, 8 bytes}-{flags, 1 byte}
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

TRACEPARENT = b"traceparent"
FORMAT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
SAMPLED = 1


@dataclass(frozen=True, slots=True)
class Trace:
    trace_id: int
    span_id: int
    """The gateway's own: the parent of what workers do."""
    parent_id: int
    """The client's span; 0: the trace begins here."""
    sampled: bool

    @property
    def header(self) -> bytes:
        """The line for workers."""
        return b"traceparent: 00-%032x-%016x-%02x\r\n" % (self.trace_id, self.span_id, self.sampled)


def join(traceparent: bytes | None, random: Random) -> Trace:
    """The client's trace, or a new one if it has none or a malformed one. A new one is sampled."""
    found = FORMAT.fullmatch(traceparent.strip()) if traceparent is not None else None
    span_id = _nonzero(random, 64)
    if found is not None:
        version, trace_id, parent_id, flags = (int(found[group], 16) for group in range(1, 5))
        known = version == 0 and found[5] is None
        if trace_id and parent_id and (known or 0 < version < 255):
            return Trace(trace_id, span_id, parent_id, bool(flags & SAMPLED))
    return Trace(_nonzero(random, 128), span_id, 0, True)


def _nonzero(random: Random, bits: int) -> int:
    return random.getrandbits(bits) or 1
