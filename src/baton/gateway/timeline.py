"""One request's life as the gateway saw it: marks, stamped once where things happen. Everything shown of it (header,
metrics, spans, the dashboard's picture) is derived from these.

    received ─▶ admitted ─▶ sent ─▶ begun ─▶ finished        times of the event loop's clock, in seconds; 0.0: not yet
                            └── once per attempt ──┘
"""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.router.target import Target


@dataclass(slots=True)
class Attempt:
    target: Target
    sent: float
    begun: float = 0.0
    """There was something to relay."""
    lost: str = ""
    """Why it failed: role and kind; "" if it did not."""
    answer_timing: bytes = b""
    """The answering worker's own marks: the value of its `Server-Timing` header."""
    receipt_timing: bytes = b""
    """The prefill worker's."""
    resumed: bool = False
    """It went on with a stream that another worker had begun."""


@dataclass(slots=True)
class Timeline:
    id: str
    route: str
    """One of a fixed set, never the client's own text."""
    received: float
    user: str = ""
    """Whose key it came with."""
    model: str = ""
    admitted: float = 0.0
    first: float = 0.0
    """The first byte of a stream went out."""
    finished: float = 0.0
    status: int = 0
    stream: bool = False
    prompt_tokens: int = 0
    """Estimated."""
    attempts: list[Attempt] = field(default_factory=list)
