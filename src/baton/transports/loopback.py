"""The fake: two engines in one process, for tests and simulations. Behaves like a transport whose receiver checks."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from baton.transports import kernels
from baton.transports.base import Capabilities, TransportError, Write, WriteState, outside
from baton.transports.kernels import Pieces
from baton.transports.region import Region
from baton.transports.windows import Windows


class Network:
    """What connects the loopback transports of one process."""

    def __init__(self) -> None:
        self.grants: dict[bytes, LoopbackGrant] = {}


class LoopbackTransport:
    capabilities = Capabilities("loopback", same_host=True, fenced_by_receiver=True)

    def __init__(self, region: Region, wake: Callable[[], None], network: Network) -> None:
        self.region = region
        self._wake = wake
        self._network = network

    def grant(self, near: str) -> LoopbackGrant:
        grant = LoopbackGrant(self.region, self._wake)
        self._network.grants[grant.description] = grant
        return grant

    def connect(self, description: bytes) -> LoopbackPeer:
        grant = self._network.grants.pop(description, None)
        if grant is None or grant.settled:
            raise TransportError("loopback: nobody here offers this region (used before, or revoked)")
        return LoopbackPeer(self.region, grant)

    def close(self) -> None:
        for description, grant in list(self._network.grants.items()):
            if grant.region is self.region:
                del self._network.grants[description]


class LoopbackGrant:
    def __init__(self, region: Region, wake: Callable[[], None]) -> None:
        self.region = region
        self.description = secrets.token_bytes(16)
        self.windows = Windows()
        self._wake = wake
        self._over = False

    def admit(self, tag: int, ranges: Sequence[tuple[int, int]]) -> None:
        self.windows.admit(tag, ranges)

    def shut(self, tag: int) -> bool:
        self.windows.shut(tag)
        return True

    def revoke(self) -> None:
        self.windows.shut_all()
        self._over = True
        self._wake()

    @property
    def settled(self) -> bool:
        return self._over


class LoopbackPeer:
    def __init__(self, region: Region, grant: LoopbackGrant) -> None:
        self._source = region
        self._grant = grant
        self.alive = True

    def write(self, pieces: Pieces, tag: int) -> Write:
        write = Write(tag, int(pieces[:, 2].sum()))
        target, windows = self._grant.region, self._grant.windows
        with windows.lock:
            if not self.alive:
                write.end(WriteState.FAILED_SETTLED, "loopback: the peer was closed")
            elif why := outside(pieces, self._source.size, target.size):
                write.end(WriteState.FAILED_SETTLED, f"loopback: {why}")
            elif not windows.covers(tag, pieces):
                write.turn_away()
            else:
                write.digests = kernels.copy(target.address, self._source.address, pieces)
                write.end(WriteState.DONE)
        return write

    def poll(self, timeout: float) -> None:
        """Nothing is ever under way outside `write`."""

    def quiesce(self, timeout: float) -> bool:
        return True

    def close(self) -> None:
        if self.alive:
            self.alive = False
            self._grant.revoke()
