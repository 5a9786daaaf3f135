"""What P and D say to each other on their control connection: frozen messages, one versioned codec, never unpickled.

    D ─ Hello ──▶ P                      once per connection: who, which layout, which ways in
    D ◀ Welcome ─ P   or Refused         the way P took
    D ─ Queued ─▶ P                      D has the request and waits for pages of its own; said again while it does
    D ─ Offer ──▶ P                      room, epoch, pages to be filled
    D ◀ Met ───── P                      P has the request too; Progress while it works on it
    D ◀ Landed ── P   (many)             these pages are written, these are their digests
    D ◀ Manifest ─ P                     all of it: what must have arrived, and the first token
    D ─ Accepted ▶ P                     verified; P may forget the prompt
    D ─ Cancel ─▶ P                      not wanted any more, or wrong; answered by Settled
    D ◀ Lost ──── P                      P gives up; followed by Settled unless it says so itself
    D ◀ Settled ─ P                      nothing of this attempt will be written any more

An attempt is named by (room, epoch); D draws the epoch when its request comes, so that what arrives late cannot be
taken for something new.
Frames: four bytes of little-endian length, then the message.
"""

from __future__ import annotations

import msgspec

from baton.base.layout import KVLayout
from baton.base.messages import Codec, Failed, Message, TokenLogprob

PROTOCOL = 2
NO_EPOCH = 0
"""In a `Cancel`: the room was never offered, and will not be; there is nothing to settle."""
HEADER = 4
MAX_GREETING = 1 << 16
"""Bytes of the first frame of a connection: strangers get no more memory than this."""
MAX_FRAME = 1 << 24


class Way(msgspec.Struct, frozen=True, array_like=True):
    """A transport that D grants P, with what P's `connect` needs."""

    transport: str
    description: bytes


class Hello(Message, frozen=True, array_like=True, tag=True):
    """D -> P, first."""

    protocol: int
    instance: str
    layout: KVLayout
    ways: tuple[Way, ...]
    """D's preference first."""


class Welcome(Message, frozen=True, array_like=True, tag=True):
    """P -> D: we fit, and `transport` works."""

    protocol: int
    instance: str
    layout: KVLayout
    transport: str


class Refused(Message, frozen=True, array_like=True, tag=True):
    """P -> D: we do not fit; the connection ends."""

    message: str


class Queued(Message, frozen=True, array_like=True, tag=True):
    """D -> P: not offered yet, but it will be. P need not hurry, and must not give up."""

    room: int
    epoch: int


class Offer(Message, frozen=True, array_like=True, tag=True):
    """D -> P: these pages are yours to fill, in order, from token `prefix_len` (a multiple of the page size) on."""

    room: int
    epoch: int
    prompt_len: int
    prompt_digest: bytes
    prefix_len: int
    pages: tuple[int, ...]
    verify: bool = True
    """False: D will not look at digests."""


class Met(Message, frozen=True, array_like=True, tag=True):
    room: int
    epoch: int


class Progress(Message, frozen=True, array_like=True, tag=True):
    """P -> D: a sign of life while the prompt waits or is computed."""

    room: int
    epoch: int
    computed_len: int


class Landed(Message, frozen=True, array_like=True, tag=True):
    """P -> D: pages [first, first + n) of the offer are written; eight bytes of XXH3-64 for each."""

    room: int
    epoch: int
    first: int
    digests: bytes

    @property
    def count(self) -> int:
        return len(self.digests) // 8


class Manifest(Message, frozen=True, array_like=True, tag=True):
    """P -> D, last: what D must have by now, and how the answer begins."""

    room: int
    epoch: int
    prompt_len: int
    pages: int
    first_token: int
    logprob: TokenLogprob | None
    seed: int
    cached_tokens: int
    fingerprint: str
    digest: bytes = b""
    """XXH3-128 of all the pages' digests in order."""


class Accepted(Message, frozen=True, array_like=True, tag=True):
    room: int
    epoch: int


class Cancel(Message, frozen=True, array_like=True, tag=True):
    room: int
    epoch: int
    message: str


class Lost(Message, frozen=True, array_like=True, tag=True):
    room: int
    epoch: int
    failure: Failed
    settled: bool


class Settled(Message, frozen=True, array_like=True, tag=True):
    room: int
    epoch: int


ToPrefill = Hello | Queued | Offer | Accepted | Cancel
ToDecode = Welcome | Refused | Met | Progress | Landed | Manifest | Lost | Settled

PREFILL_HEARS = Codec(ToPrefill, PROTOCOL)
DECODE_HEARS = Codec(ToDecode, PROTOCOL)
