"""One request's life as the gateway saw it: marks, stamped once where things happen. Everything shown of it (header,
metrics, spans, the dashboard's picture) is derived from these, and only when somebody looks (`baton.gateway.stages`).

    received ─▶ admitted ─▶ sent ─▶ begun ─▶ ended ─▶ finished     times of `time.monotonic` in seconds (the
                            └─ once per attempt ─┘                 loop's clock is coarse); 0.0: not yet
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from baton.gateway.trace import Trace
from baton.router.call import Header
from baton.router.target import Target


class Attempt(msgspec.Struct, eq=False):
    target: Target
    sent: float
    begun: float = 0.0
    """There was something to relay."""
    ended: float = 0.0
    lost: str = ""
    """Why it failed: role and kind; "" if it did not."""
    answer: Sequence[Header] = ()
    """The answering worker's headers; its own marks are in `Server-Timing`. Grows when its head comes."""
    receipt: Sequence[Header] = ()
    """The prefill worker's, which may come long after the answer has begun."""
    resumed: bool = False
    """It went on with a stream that another worker had begun."""


class Timeline(msgspec.Struct, eq=False):
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
    sequences: int = 1
    """Prompts times samples."""
    output_tokens: int = 0
    """Of all sequences; 0 if the worker did not say."""
    error: str = ""
    """What the client was told went wrong."""
    attempts: list[Attempt] = []
    trace: Trace | None = None
    """Set if it is traced."""

    def token_seconds(self) -> float:
        """Mean time between tokens of one sequence, in a stream that came to its end; 0.0 if that is not known."""
        tokens = self.output_tokens / self.sequences
        if not (self.stream and self.first and self.finished) or self.error or tokens <= 1:
            return 0.0
        return (self.finished - self.first) / (tokens - 1)
