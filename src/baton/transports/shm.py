"""The way between two processes of one host: P maps D's region and copies straight into D's pages, once.

    D  listens on a nameless (abstract) Unix socket ── description: socket, token, boot id, size ──▶ P
    D  ◀── P connects; same user, known token, first use? ── the region's file descriptor (SCM_RIGHTS) ──▶ P
    P  maps it, copies and digests pages in one pass (`kernels`)
    D  ◀── end of file: P has unmapped, or is dead (the kernel closes files after it took the memory away)

The receiver cannot keep a sender out that has the mapping: `shut` settles only when the sender is gone, else the
sender's word is needed. The sender copies synchronously, so that what it says is simply true.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from baton.base.messages import Codec, CodecError, Message
from baton.transports import kernels
from baton.transports.base import Capabilities, TransportError, Write, WriteState, outside
from baton.transports.kernels import Pieces
from baton.transports.reactor import Reactor
from baton.transports.region import Region

TOKEN = 16
CONNECT_TIMEOUT = 5.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ShmDescription(Message, frozen=True, array_like=True, tag=True):
    """Where P finds D's region. `host` is the boot id: another boot is another host, or a memory long gone."""

    host: str
    socket: bytes
    token: bytes
    size: int


_CODEC = Codec(ShmDescription)


def host_id() -> str:
    """The same for all processes of a running host, different everywhere else."""
    with contextlib.suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return socket.gethostname()


def peer_uid(connection: socket.socket) -> int:
    """Whose process is at the other end, where the OS says so (Linux)."""
    if sys.platform == "linux":
        _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(uid)
    else:
        return os.getuid()


class ShmTransport:
    capabilities = Capabilities("shm", same_host=True, fenced_by_receiver=False)

    def __init__(self, region: Region, wake: Callable[[], None]) -> None:
        self._region = region
        self._wake = wake
        self._lock = threading.Lock()
        self._door: _Door | None = None

    def grant(self, near: str) -> ShmGrant:
        with self._lock:
            if self._door is None:
                self._door = _Door(self._region, self._wake)
            return self._door.grant()

    def connect(self, description: bytes) -> ShmPeer:
        try:
            where: ShmDescription = _CODEC.decode(description)
        except CodecError as error:
            raise TransportError(f"shm: {error}") from error
        if where.host != host_id():
            raise TransportError("shm: the peer is on another host")
        return ShmPeer(self._region, where)

    def close(self) -> None:
        with self._lock:
            if self._door is not None:
                self._door.close()
                self._door = None


class ShmGrant:
    """For one peer: waiting for it, held by it, or over."""

    def __init__(self, door: _Door, token: bytes, description: bytes) -> None:
        self.description = description
        self.token = token
        self._door = door
        self.connection: socket.socket | None = None
        self.over = False

    def admit(self, tag: int, ranges: Sequence[tuple[int, int]]) -> None:
        """Nothing to do: who has the mapping can write anywhere in it."""

    def shut(self, tag: int) -> bool:
        return self.settled

    def revoke(self) -> None:
        self._door.revoke(self)

    @property
    def settled(self) -> bool:
        return self.over


class _Door:
    """D's Unix socket: hands the region to those who know a token, and sees when they let go."""

    def __init__(self, region: Region, wake: Callable[[], None]) -> None:
        self._region = region
        self._wake = wake
        self._lock = threading.Lock()
        self._waiting: dict[bytes, ShmGrant] = {}
        self._folder: str | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if sys.platform == "linux":
            self._name = b"\0baton-" + secrets.token_hex(8).encode()
        else:
            self._folder = tempfile.mkdtemp(prefix="baton-")
            self._name = os.fsencode(os.path.join(self._folder, "door"))
        self._listener.bind(self._name)
        self._listener.listen(64)
        self._listener.setblocking(False)
        self._guests: set[_Guest] = set()
        self._reactor = Reactor("baton-shm")
        self._reactor.call(lambda: self._reactor.watch(self._listener, self))

    def grant(self) -> ShmGrant:
        token = secrets.token_bytes(TOKEN)
        grant = ShmGrant(self, token, _CODEC.encode(ShmDescription(host_id(), self._name, token, self._region.size)))
        with self._lock:
            self._waiting[token] = grant
        return grant

    def revoke(self, grant: ShmGrant) -> None:
        """A grant that nobody used is over at once. A used one when the peer lets go, which we ask it to."""
        with self._lock:
            unused = self._waiting.pop(grant.token, None) is not None
            if unused:
                grant.over = True
            elif grant.connection is not None and not grant.over:
                with contextlib.suppress(OSError):
                    grant.connection.shutdown(socket.SHUT_WR)
        if unused:
            self._wake()

    def ready(self, events: int) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            if peer_uid(connection) != os.getuid():
                connection.close()
                return
            guest = _Guest(self, connection)
            self._guests.add(guest)
            self._reactor.watch(connection, guest)

    def welcome(self, guest: _Guest, token: bytes) -> bool:
        """Send the region's descriptor if the token is good; in the reactor's thread."""
        with self._lock:
            known = next((t for t in self._waiting if hmac.compare_digest(t, token)), None)
            if known is None:
                return False
            grant = self._waiting.pop(known)
            grant.connection, guest.grant = guest.connection, grant
        try:
            socket.send_fds(guest.connection, [b"\1"], [self._region.fd])
        except OSError:
            return False
        return True

    def leave(self, guest: _Guest) -> None:
        """The peer closed its end or died: its mapping is gone."""
        self._reactor.forget(guest.connection)
        self._guests.discard(guest)
        with self._lock:
            if guest.grant is not None:
                guest.grant.over, guest.grant.connection = True, None
            guest.connection.close()
        if guest.grant is not None:
            self._wake()

    def close(self) -> None:
        self._reactor.close(self._end)
        if self._folder is not None:
            os.unlink(self._name)
            os.rmdir(self._folder)

    def _end(self) -> None:
        self._listener.close()
        for guest in self._guests:
            guest.connection.close()
        self._guests.clear()


class _Guest:
    """A connection to the door: first a token, then nothing until the end of file."""

    def __init__(self, door: _Door, connection: socket.socket) -> None:
        self._door = door
        self.connection = connection
        self.grant: ShmGrant | None = None
        self._token = b""

    def ready(self, events: int) -> None:
        try:
            data = self.connection.recv(TOKEN)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or self.grant is not None:  # the end, or chatter that we did not ask for
            self._door.leave(self)
            return
        self._token += data
        if len(self._token) >= TOKEN and not self._door.welcome(self, self._token):
            self._door.leave(self)


class ShmPeer:
    """P's mapping of D's region."""

    def __init__(self, region: Region, where: ShmDescription) -> None:
        self._source = region
        self._lock = threading.Lock()
        """Held while copying: whoever closes the mapping waits for the copy (a few milliseconds)."""
        self._connection, fd = _fetch(where)
        try:
            self._target: Region | None = _map(fd, where.size)
        except (ValueError, OSError, MemoryError) as error:
            self._connection.close()
            raise TransportError(f"shm: {error}") from error

    @property
    def alive(self) -> bool:
        return self._target is not None

    def write(self, pieces: Pieces, tag: int) -> Write:
        write = Write(tag, int(pieces[:, 2].sum()))
        with self._lock:
            if self._target is None:
                write.end(WriteState.FAILED_SETTLED, "shm: the peer was closed")
            elif why := outside(pieces, self._source.size, self._target.size):
                write.end(WriteState.FAILED_SETTLED, f"shm: {why}")
            else:
                write.digests = kernels.copy(self._target.address, self._source.address, pieces)
                write.end(WriteState.DONE)
        return write

    def poll(self, timeout: float) -> None:
        """Nothing is ever under way outside `write`."""

    def quiesce(self, timeout: float) -> bool:
        with self._lock:
            return True

    def close(self) -> None:
        with self._lock:
            if self._target is not None:
                self._target.close()
                self._target = None
                self._connection.close()  # after the mapping is gone: D takes it as our word for it


def _map(fd: int, size: int) -> Region:
    region = Region.attach(fd)
    if region.size != size:
        region.close()
        raise ValueError(f"the peer's region has {region.size} bytes, {size} were announced")
    region.populate()
    return region


def _fetch(where: ShmDescription) -> tuple[socket.socket, int]:
    """Show the token at D's door. Returns the connection, which stands for the mapping, and the descriptor."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(CONNECT_TIMEOUT)
        connection.connect(where.socket)
        if peer_uid(connection) != os.getuid():
            raise TransportError("shm: the peer belongs to another user")
        connection.sendall(where.token)
        data, fds, _, _ = socket.recv_fds(connection, 1, 1)
        if not data or len(fds) != 1:
            raise TransportError("shm: the peer does not know our token (used before, or revoked)")
        return connection, fds[0]
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError):
            raise TransportError(f"shm: cannot reach the peer's door: {error}") from error
        raise
