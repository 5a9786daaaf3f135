"""A sequence: one sample of one request, and everything the engine knows of it.

Lengths are named by where the data is::

    tokens    |<------ prompt_len ------>|<---- output ---->|
              |<------- given_len ------------->|              came with the request: the prompt, and output that
                                                               another worker has generated (`Generate.resumed`)
    KV pages  |<-- cached_len -->|                             found in the prefix cache at admission
              |<------------- computed_len ------------>|      in the pages now (cached part included)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.base.blockhash import BlockHash
from baton.base.messages import Generate, Sampling, Ticket, Timeline, TokenLogprob, Usage


@dataclass(slots=True)
class Stamps:
    """The mutable twin of `Timeline`: each stage is stamped once, where it happens."""

    received: float = 0.0
    scheduled: float = 0.0
    prefilled: float = 0.0
    offered: float = 0.0
    delivered: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0

    def freeze(self) -> Timeline:
        return Timeline(
            self.received, self.scheduled, self.prefilled, self.offered, self.delivered, self.first_token, self.finished
        )


@dataclass(slots=True, eq=False)
class Sequence:
    id: str
    tokens: list[int]
    """Prompt and output."""
    prompt_len: int
    sampling: Sampling
    ticket: Ticket | None = None
    priority: int = 0
    salt: str = ""
    deadline: float | None = None
    resumed: int = 0
    arrival: int = 0
    """The scheduler's number for it, from 1: the older of two is the one with the smaller number."""
    pages: list[int] = field(default_factory=list)
    """Owned by the scheduler while the sequence is in it, by whoever detached it afterwards."""
    hashes: list[BlockHash] = field(default_factory=list)
    """Of the first full pages of `tokens`, as far as they were needed."""
    published: int = 0
    """How many of `pages` are in the prefix index."""
    flushes: int = 0
    """How many flushes the prefix index had seen when `pages` were taken; after another one they stay out of it."""
    cached_len: int = 0
    computed_len: int = 0
    usage_cached_len: int = 0
    """What the user is told: cached tokens of the prompt when it was first scheduled (on P, where there is one)."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    retractions: int = 0
    held: bool = False
    """Not to be computed yet: something it needs is being prepared."""
    prepared: object | None = None
    """What was prepared, for whoever needs it (a compiled grammar, for the sampler)."""
    stamps: Stamps = field(default_factory=Stamps)

    @classmethod
    def of(cls, request: Generate, now: float) -> Sequence:
        sequence = cls(
            request.id,
            list(request.tokens),
            len(request.tokens) - request.resumed,
            request.sampling,
            request.ticket,
            request.priority,
            request.cache_salt,
            request.deadline,
            request.resumed,
        )
        sequence.stamps.received = now
        return sequence

    @property
    def total_len(self) -> int:
        return len(self.tokens)

    @property
    def given_len(self) -> int:
        return self.prompt_len + self.resumed

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def pending_len(self) -> int:
        """Tokens whose KV is still to be computed; 1 while decoding."""
        return len(self.tokens) - self.computed_len

    def late(self, now: float) -> bool:
        """Its deadline has passed."""
        return self.deadline is not None and self.deadline <= now

    def usage(self) -> Usage:
        return Usage(self.prompt_len, self.output_len, self.usage_cached_len, self.retractions)

    def __repr__(self) -> str:
        return f"<Sequence {self.id} {self.computed_len}/{self.prompt_len}+{self.output_len}, {len(self.pages)} pages>"
