"""What is sent, and to whom."""

from __future__ import annotations

from typing import Protocol

import msgspec

from baton.router.legs import Leg, Legs, Pulse
from baton.router.registry import Worker
from baton.router.splice import Body
from baton.router.split import Decision


class Target(msgspec.Struct, frozen=True):
    """Who serves an attempt: a pair, or one worker that does everything (`prefill` None)."""

    answering: Worker
    prefill: Worker | None = None
    uncached: int = 0
    """Tokens of the prompt that whoever prefills has to compute; an estimate."""
    decision: Decision | None = None
    """Whether to divide the request was weighed up."""

    @property
    def reason(self) -> str:
        if self.decision is not None:
            return self.decision.reason
        return "whole: there is nothing to decide" if self.prefill is None else "split: there is nothing to decide"


class Parcel(msgspec.Struct):
    """What is sent, whoever gets it."""

    path: str
    """With the query."""
    headers: bytes
    """Header lines to pass on, each with its CR LF."""
    body: Body
    timeout: bytes = b""
    """The header line that says how long the worker has; another one for every attempt."""


class Dialect(Protocol):
    """How a request is sent to a target. Returns at once; everything else happens in callbacks."""

    def send(self, target: Target, parcel: Parcel, pulse: Pulse) -> Legs: ...


def dispatch(leg: Leg, parcel: Parcel, body: bytes) -> None:
    """Send a leg's request."""
    head = f"POST {parcel.path} HTTP/1.1\r\nhost: {leg.worker.origin.authority}\r\n".encode("ascii")
    request = b"%b%b%bcontent-length: %d\r\n\r\n%b" % (head, parcel.headers, parcel.timeout, len(body), body)
    leg.worker.pool.send(leg.call, request)
