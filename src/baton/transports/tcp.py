"""The way between hosts: bytes go from P's pages to the socket and from the socket to D's pages, nothing in between.

    D  listens on an ephemeral port of the address that leads to P ── description: address, token, size ──▶ P
    P ── magic, token ──▶ D ── one byte: come in ──▶ P
    P ── frame: tag, number, ranges of D's region, then their bytes ──▶ D ── number, status ──▶ P

The receiver drives: before every read it looks whether the tag is still wanted and where its bytes may go; what is
not wanted goes to a scratch buffer. Once a tag is shut nothing of it reaches a page, whatever the network still holds.
A write is done when the receiver says so. Control messages are on another socket, so they never wait behind pages.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from baton.base.messages import Codec, CodecError, Message
from baton.transports import kernels
from baton.transports.base import Capabilities, TransportError, Write, WriteState, coalesced, outside
from baton.transports.kernels import Pieces
from baton.transports.lively import make_lively
from baton.transports.reactor import READ, WRITE, Reactor
from baton.transports.region import Region
from baton.transports.windows import Windows

MAGIC = b"baton-pages-tcp1"
TOKEN = 16
HEADER = struct.Struct("<QQI")
"""Tag, number of the write, count of ranges; each range is two 64-bit words: offset, bytes."""
ACK = struct.Struct("<QB")
LANDED, UNWANTED = 0, 1
MAX_RANGES = 8192
IOV = 256
"""Pieces per system call (the kernel admits 1,024; more than a few hundred do not pay)."""
BUDGET = 16 << 20
"""Bytes read from one peer before the others have their turn."""
SCRATCH = 1 << 20
CONNECT_TIMEOUT = 5.0
MAX_STRANGERS = 64


class TcpDescription(Message, frozen=True, array_like=True, tag=True):
    host: str
    port: int
    token: bytes
    size: int


_CODEC = Codec(TcpDescription)


class TcpTransport:
    capabilities = Capabilities("tcp", same_host=False, fenced_by_receiver=True)

    def __init__(self, region: Region, wake: Callable[[], None]) -> None:
        self._region = region
        self._wake = wake
        self._lock = threading.Lock()
        self._doors: dict[str, _Door] = {}
        self._reactor: Reactor | None = None

    def grant(self, near: str) -> TcpGrant:
        """Raises `OSError` if `near` is not an address of ours."""
        with self._lock:
            if self._reactor is None:
                self._reactor = Reactor("baton-tcp")
            if near not in self._doors:
                self._doors[near] = _Door(near, self._region, self._reactor, self._wake)
            return self._doors[near].grant()

    def connect(self, description: bytes) -> TcpPeer:
        try:
            where: TcpDescription = _CODEC.decode(description)
        except CodecError as error:
            raise TransportError(f"tcp: {error}") from error
        try:
            return TcpPeer(self._region, where)
        except (OSError, OverflowError) as error:
            raise TransportError(f"tcp: cannot reach {where.host}:{where.port}: {error}") from error

    def close(self) -> None:
        with self._lock:
            if self._reactor is not None:
                self._reactor.close(self._end)
                self._reactor = None

    def _end(self) -> None:
        for door in self._doors.values():
            door.close()
        self._doors.clear()


class TcpGrant:
    def __init__(self, door: _Door, token: bytes, description: bytes) -> None:
        self.description = description
        self.token = token
        self.windows = Windows()
        self.over = False
        self._door = door

    def admit(self, tag: int, ranges: Sequence[tuple[int, int]]) -> None:
        self.windows.admit(tag, ranges)

    def shut(self, tag: int) -> bool:
        self.windows.shut(tag)
        return True

    def revoke(self) -> None:
        self.over = True
        self.windows.shut_all()
        self._door.forget(self)

    @property
    def settled(self) -> bool:
        return self.over


class _Door:
    """D's listener on one of its addresses."""

    def __init__(self, host: str, region: Region, reactor: Reactor, wake: Callable[[], None]) -> None:
        self.region = region
        self.wake = wake
        self.reactor = reactor
        self.grants: dict[bytes, TcpGrant] = {}
        self._guests: set[_Guest] = set()
        self._strangers: deque[_Guest] = deque()
        self._listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._listener.bind((host, 0))
            self._listener.listen(64)
            self._listener.setblocking(False)
        except OSError:
            self._listener.close()
            raise
        self._host, self._port = self._listener.getsockname()[:2]
        reactor.call(lambda: reactor.watch(self._listener, self))

    def grant(self) -> TcpGrant:
        token = secrets.token_bytes(TOKEN)
        description = _CODEC.encode(TcpDescription(self._host, self._port, token, self.region.size))
        self.grants[token] = TcpGrant(self, token, description)
        return self.grants[token]

    def forget(self, grant: TcpGrant) -> None:
        """Not good for a connection any more; the one it has ends."""
        self.grants.pop(grant.token, None)
        self.reactor.call(partial(self._show_out, grant))

    def _show_out(self, grant: TcpGrant) -> None:
        for guest in [guest for guest in self._guests if guest.grant is grant]:
            guest.end()

    def claim(self, token: bytes) -> TcpGrant | None:
        known = next((t for t in list(self.grants) if hmac.compare_digest(t, token)), None)
        return self.grants.pop(known, None) if known is not None else None

    def ready(self, events: int) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        try:
            connection.setblocking(False)
            make_lively(connection)
        except OSError:  # gone before we looked
            connection.close()
            return
        self._strangers = deque(guest for guest in self._strangers if guest.grant is None and guest in self._guests)
        if len(self._strangers) >= MAX_STRANGERS:
            self._strangers.popleft().end()
        guest = _Guest(self, connection)
        self._guests.add(guest)
        self._strangers.append(guest)
        self.reactor.watch(connection, guest)

    def gone(self, guest: _Guest) -> None:
        self._guests.discard(guest)

    def close(self) -> None:
        self.reactor.forget(self._listener)
        self._listener.close()
        for guest in list(self._guests):
            guest.end()


class _Frame:
    """What a peer is sending: where it goes, and how far it is."""

    def __init__(self, tag: int, number: int, region: Region, ranges: Pieces, wanted: bool) -> None:
        self.tag = tag
        self.number = number
        self.left = int(ranges[:, 2].sum())
        self.wanted = wanted
        self._views: list[memoryview] = []
        self._next = 0
        if wanted:
            self._views = [region.memory[start : start + size] for _, start, size in coalesced(ranges).tolist()]

    def views(self) -> list[memoryview]:
        return self._views[self._next : self._next + IOV]

    def advance(self, count: int) -> None:
        self.left -= count
        while self.wanted and count:
            view = self._views[self._next]
            if count < len(view):
                self._views[self._next] = view[count:]
                return
            count -= len(view)
            self._next += 1


class _Guest:
    """One peer's connection at D: token, then frames. A state per part of a frame, so that nothing ever blocks."""

    def __init__(self, door: _Door, connection: socket.socket) -> None:
        self.grant: TcpGrant | None = None
        self._door = door
        self._connection = connection
        self._part = bytearray(len(MAGIC) + TOKEN)
        self._filled = 0
        self._complete: Callable[[bytes], None] = self._enter
        self._header = (0, 0, 0)
        self._frame: _Frame | None = None
        self._answers = bytearray()
        self._scratch = memoryview(bytearray(SCRATCH))

    def ready(self, events: int) -> None:
        try:
            if events & WRITE:
                self._answer()
            budget = BUDGET
            while budget > 0 and self._connection.fileno() >= 0:
                budget -= self._read()
        except BlockingIOError:
            return
        except (OSError, ValueError):
            self.end()

    def end(self) -> None:
        """The connection is over: no byte comes any more."""
        if self._connection.fileno() < 0:
            return
        self._door.reactor.forget(self._connection)
        self._connection.close()
        self._door.gone(self)
        self._frame = None
        if self.grant is not None:
            self.grant.over = True
            self._door.wake()

    def _read(self) -> int:
        """One system call's worth. Raises `BlockingIOError` when there is nothing, `OSError` at the end."""
        if self._frame is not None:
            return self._read_pages(self._frame)
        count = self._connection.recv_into(memoryview(self._part)[self._filled :])
        if not count:
            raise ConnectionResetError
        self._filled += count
        if self._filled == len(self._part):
            self._complete(bytes(self._part))
        return count

    def _read_pages(self, frame: _Frame) -> int:
        assert self.grant is not None
        windows = self.grant.windows
        with windows.lock:
            frame.wanted = frame.wanted and windows.is_open(frame.tag)
            if frame.wanted:
                count = self._connection.recvmsg_into(frame.views())[0]
            else:
                count = self._connection.recv_into(self._scratch[: frame.left])
        if not count:
            raise ConnectionResetError
        frame.advance(count)
        if not frame.left:
            self._answers += ACK.pack(frame.number, LANDED if frame.wanted else UNWANTED)
            self._expect(HEADER.size, self._begin)
            self._answer()
        return count

    def _expect(self, size: int, then: Callable[[bytes], None]) -> None:
        self._frame, self._part, self._filled, self._complete = None, bytearray(size), 0, then

    def _enter(self, hello: bytes) -> None:
        grant = self._door.claim(hello[len(MAGIC) :]) if hello.startswith(MAGIC) else None
        if grant is None:
            raise ConnectionRefusedError
        self.grant = grant
        self._answers += b"\1"
        self._answer()
        self._expect(HEADER.size, self._begin)

    def _begin(self, header: bytes) -> None:
        self._header = HEADER.unpack(header)
        if not 1 <= self._header[2] <= MAX_RANGES:
            raise ValueError("a frame without ranges, or with too many")
        self._expect(self._header[2] * 16, self._aim)

    def _aim(self, table: bytes) -> None:
        assert self.grant is not None
        tag, number, count = self._header
        ranges = np.zeros((count, 3), np.int64)
        ranges[:, 1:] = np.frombuffer(table, "<i8").reshape(-1, 2)
        ranges[1:, 0] = np.cumsum(ranges[:-1, 2])  # their place in the stream, so that neighbours may be joined
        if ranges[:, 1:].min() < 0 or ranges[:, 2].min() < 1 or ranges[:, 2].max() > self._door.region.size:
            raise ValueError("a range that cannot be")
        with self.grant.windows.lock:
            wanted = self.grant.windows.covers(tag, ranges)
        self._frame = _Frame(tag, number, self._door.region, ranges, wanted)

    def _answer(self) -> None:
        with contextlib.suppress(BlockingIOError):
            del self._answers[: self._connection.send(self._answers)]
        self._door.reactor.watch(self._connection, self, READ | WRITE if self._answers else READ)


class TcpPeer:
    """P's connection to one D."""

    def __init__(self, region: Region, where: TcpDescription) -> None:
        self._source = region
        self._size = where.size
        self._socket = socket.create_connection((where.host, where.port), CONNECT_TIMEOUT)
        self._lock = threading.Lock()
        """Whoever closes the socket waits until nobody is in it; `shutdown` sees to it that this is soon."""
        self._running: dict[int, tuple[Write, bool]] = {}
        """By number; True: the last frame of its write."""
        self._number = 0
        self._heard = bytearray()
        self.alive = True
        try:
            make_lively(self._socket)
            self._socket.sendall(MAGIC + where.token)
            if self._socket.recv(1) != b"\1":
                raise ConnectionRefusedError("the peer does not know our token (used before, or revoked)")
            self._socket.setblocking(False)
        except OSError:
            self._socket.close()
            raise
        self._poller = select.poll()
        self._poller.register(self._socket, select.POLLIN)

    def write(self, pieces: Pieces, tag: int) -> Write:
        write = Write(tag, int(pieces[:, 2].sum()))
        why = outside(pieces, self._source.size, self._size)
        if why:
            write.end(WriteState.FAILED_SETTLED, f"tcp: {why}")
            return write
        with self._lock:
            try:
                for start in range(0, len(pieces), MAX_RANGES):
                    last = start + MAX_RANGES >= len(pieces)
                    self._send(write, pieces[start : start + MAX_RANGES], tag, last)
            except OSError as error:
                self._break(f"tcp: {error}")
                write.end(WriteState.FAILED_SETTLED, f"tcp: {error}")
        write.digests = kernels.digest(self._source.address, pieces)  # while the bytes are on their way
        return write

    def poll(self, timeout: float) -> None:
        with self._lock:
            if self._running and self.alive:
                self._wait(select.POLLIN, timeout)

    def quiesce(self, timeout: float) -> bool:
        """The receiver keeps out what it does not want by itself: what failed is settled."""
        self.poll(timeout)
        return not self._running

    def close(self) -> None:
        self.alive = False
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._break("tcp: the peer was closed")
            self._socket.close()

    def _send(self, write: Write, pieces: Pieces, tag: int, last: bool) -> None:
        if not self.alive:
            raise ConnectionResetError("the peer was closed")
        self._number += 1
        self._running[self._number] = (write, last)
        table = np.ascontiguousarray(pieces[:, 1:], "<i8").tobytes()
        memory = self._source.memory
        views: list[bytes | memoryview] = [HEADER.pack(tag, self._number, len(pieces)) + table]
        views += [memory[start : start + size] for start, _, size in coalesced(pieces).tolist()]
        at = 0
        while at < len(views):
            try:
                sent = self._socket.sendmsg(views[at : at + IOV])
            except BlockingIOError:
                self._wait(select.POLLIN | select.POLLOUT, None)
                continue
            while sent:
                size = len(views[at])
                if sent < size:
                    views[at] = memoryview(views[at])[sent:]
                    break
                sent -= size
                at += 1

    def _wait(self, events: int, timeout: float | None) -> None:
        """Until the socket is ready; takes acknowledgements that are there."""
        self._poller.modify(self._socket, events)
        ready = self._poller.poll(None if timeout is None else timeout * 1000)
        if ready and ready[0][1] & ~select.POLLOUT:
            self._hear()

    def _hear(self) -> None:
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            self._break(f"tcp: {error}")
            return
        if not data:
            self._break("tcp: the peer closed the connection")
            return
        self._heard += data
        whole = len(self._heard) // ACK.size * ACK.size
        for number, status in ACK.iter_unpack(bytes(self._heard[:whole])):
            write, last = self._running.pop(number, (None, False))
            if write is None:
                continue
            if status != LANDED:
                write.turn_away()
            elif last:
                write.end(WriteState.DONE)
        del self._heard[:whole]

    def _break(self, why: str) -> None:
        self.alive = False
        for write, _ in self._running.values():
            write.end(WriteState.FAILED_SETTLED, why)
        self._running.clear()
