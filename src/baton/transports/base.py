"""Moving bytes between the regions of two engines. A transport knows offsets and tags, nothing of requests.

    D, who owns the target                         P, who owns the source
    grant = transport.grant(near)  ── description ──▶  peer = transport.connect(description)
    grant.admit(tag, ranges)                           write = peer.write(pieces, tag)
    ...                                                write.state: running | done | failed_settled | failed_unsettled
    grant.shut(tag)  True: no byte of it can come
    grant.revoke() … grant.settled                     peer.close()

The question a transport must always be able to answer is not "did it work" but "can a byte still arrive?": a page is
given to somebody else only when the answer is no.

`grant`, `admit`, `shut`, `revoke` may be called from any thread; a `Peer` is used by one thread (`close` by any).
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from baton.base.errors import ConfigError, unknown
from baton.transports.kernels import Digests, Pieces
from baton.transports.region import Region

TRANSPORTS = {
    "shm": "baton.transports.shm:ShmTransport",
    "tcp": "baton.transports.tcp:TcpTransport",
}
"""In order of preference. Each is made with (region, wake)."""


class TransportError(Exception):
    """The peer cannot be reached, or has broken the rules; says which."""


class WriteState(enum.Enum):
    RUNNING = "running"
    DONE = "done"
    """Every byte is in the target's pages."""
    FAILED_SETTLED = "failed_settled"
    """It did not work, and nothing of it will arrive any more."""
    FAILED_UNSETTLED = "failed_unsettled"
    """It did not work, and bytes may still arrive: the target's pages are not anybody's yet."""


@dataclass(slots=True, eq=False)
class Write:
    """One `Peer.write`, and how it is doing."""

    tag: int
    bytes: int
    digests: Digests = field(default_factory=lambda: np.empty(0, np.uint64))
    """XXH3-64 of each piece as it was read from the source."""
    state: WriteState = WriteState.RUNNING
    error: str = ""
    unwanted: bool = False
    """It failed because the receiver had shut the tag: he knows, and says why elsewhere."""

    def end(self, state: WriteState, error: str = "") -> None:
        """Only the first end counts."""
        if self.state is WriteState.RUNNING:
            self.state, self.error = state, error

    def turn_away(self) -> None:
        self.end(WriteState.FAILED_SETTLED, "the receiver does not want these bytes (any more)")
        self.unwanted = True


@dataclass(frozen=True, slots=True)
class Capabilities:
    name: str
    same_host: bool
    """Works between processes of one host only."""
    fenced_by_receiver: bool
    """The receiver can keep a tag's bytes out by itself (`shut` always settles); else only the sender's word or end."""


class Peer(Protocol):
    """P's end: the region of one D, as far as its grant goes."""

    @property
    def alive(self) -> bool:
        """False: no write will ever succeed again; connect anew."""
        ...

    def write(self, pieces: Pieces, tag: int) -> Write:
        """Copy pieces of our region into theirs ([n, 3]: our offset, their offset, bytes). May return at once or when
        all is done; blocks while the wire is full. Fails by the write's state, never by raising."""
        ...

    def poll(self, timeout: float) -> None:
        """Let running writes make progress; returns when one has ended, or after `timeout` seconds."""
        ...

    def quiesce(self, timeout: float) -> bool:
        """Wait until nothing of ours is under way. True: no byte will move until the next `write`."""
        ...

    def close(self) -> None:
        """Give the mapping or the connection back. Running writes fail. Idempotent."""
        ...


class Grant(Protocol):
    """D's end: the permission for one peer to write into our region."""

    @property
    def description(self) -> bytes:
        """What the peer's `connect` needs: versioned, carries an unguessable token, good for one connection."""
        ...

    def admit(self, tag: int, ranges: Sequence[tuple[int, int]]) -> None:
        """Writes with this tag may go to these (offset, bytes) of our region."""
        ...

    def shut(self, tag: int) -> bool:
        """Writes with this tag are not wanted any more. True: none of its bytes can arrive from now on."""
        ...

    def revoke(self) -> None:
        """The peer may write no more at all. `settled` says when that is certain; `wake` is called then."""
        ...

    @property
    def settled(self) -> bool:
        """No byte can arrive through this grant: the peer has let go, is dead, or never came."""
        ...


class Transport(Protocol):
    """One engine's way of moving bytes, for both directions."""

    @property
    def capabilities(self) -> Capabilities: ...

    def grant(self, near: str) -> Grant:
        """Let one peer in; `near` is our own address on the network that leads to it. Raises `OSError`."""
        ...

    def connect(self, description: bytes) -> Peer:
        """Raises `TransportError` if this is not possible from here (another host, another user, a dead peer)."""
        ...

    def close(self) -> None:
        """Threads and sockets end; grants are revoked. Peers are closed by those who connected them."""
        ...


def create(name: str, region: Region, wake: Callable[[], None]) -> Transport:
    """Raises `ConfigError` for a name that is not in the table."""
    if name not in TRANSPORTS:
        raise ConfigError(unknown("transport", name, TRANSPORTS))
    module, _, attribute = TRANSPORTS[name].partition(":")
    made: Transport = getattr(importlib.import_module(module), attribute)(region, wake)
    return made


def outside(pieces: Pieces, here: int, there: int) -> str:
    """Why these pieces do not lie within regions of `here` and `there` bytes; `""` if they do."""
    if not len(pieces):
        return ""
    if pieces.min() < 0 or pieces[:, 2].min() < 1:
        return "a piece with a negative offset or without bytes"
    if (pieces[:, 0] + pieces[:, 2]).max() > here:
        return f"a piece beyond the end of our region of {here} bytes"
    if (pieces[:, 1] + pieces[:, 2]).max() > there:
        return f"a piece beyond the end of the peer's region of {there} bytes"
    return ""


def coalesced(pieces: Pieces) -> Pieces:
    """Neighbours that are neighbours on both sides become one piece."""
    if len(pieces) < 2:
        return pieces
    here, there, size = pieces[:, 0], pieces[:, 1], pieces[:, 2]
    joined = (here[:-1] + size[:-1] == here[1:]) & (there[:-1] + size[:-1] == there[1:])
    starts = np.flatnonzero(np.concatenate(([True], ~joined)))
    merged = pieces[starts]
    merged[:, 2] = np.add.reduceat(size, starts)
    return merged
