"""P's end: a door for D workers, and for each of them a thread that writes finished pages while the next are computed.

The engine's thread calls `push` and `finish` and goes on computing; it hears `Passed` when pages are no longer read.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import numpy as np
import xxhash

from baton.base.layout import KVLayout
from baton.base.messages import Message
from baton.disagg.bootstrap import Door, Inbox, Link
from baton.disagg.wire import PREFILL_HEARS, PROTOCOL, Hello, Landed, Manifest, Offer, Refused, Welcome
from baton.transports.base import Peer, Transport, TransportError, Write, WriteState
from baton.transports.reactor import Reactor

log = logging.getLogger("baton.disagg")

SLICE = 4 << 20
"""Bytes per write: small enough that D checks one while the next is on its way, and that a cancel is soon heard."""
POLL = 0.05


@dataclass(frozen=True, slots=True)
class Heard:
    """A message from the peer."""

    link: Link
    message: Message


@dataclass(frozen=True, slots=True)
class Gone:
    """The peer's control connection has ended."""

    link: Link
    reason: str


@dataclass(frozen=True, slots=True)
class Passed:
    """A push is over, whatever came of it: its pages are not read any more."""

    stream: Stream
    pages: list[int]


@dataclass(frozen=True, slots=True)
class Broken:
    """A write failed; `Passed` follows when it is settled."""

    stream: Stream
    reason: str


@dataclass(slots=True, eq=False)
class Stream:
    """One attempt on its way to one D. `stop` is set by the engine's thread, the rest belongs to the mover."""

    mover: Mover
    offer: Offer
    stop: bool = False
    failed: bool = False
    bytes: int = 0
    digests: bytearray = field(default_factory=bytearray)

    def push(self, first: int, pages: list[int]) -> None:
        """Write our `pages` to the offer's pages from its `first` on."""
        self.mover.submit(partial(self.mover.push, self, first, pages))

    def finish(self, manifest: Manifest) -> None:
        """Once all pushes have arrived, say so."""
        self.mover.submit(partial(self.mover.finish, self, manifest))


class Sender:
    def __init__(
        self,
        host: str,
        port: int,
        layout: KVLayout,
        instance: str,
        transports: Mapping[str, Transport],
        inbox: Inbox,
    ) -> None:
        """Raises `ConfigError` if it cannot listen there."""
        self._layout = layout
        self._instance = instance
        self._transports = transports
        self._inbox = inbox
        self._movers: dict[Link, Mover] = {}
        self._reactor = Reactor("baton-bootstrap")
        try:
            self._door = Door(host, port, self._reactor, self._receive)
        except BaseException:
            self._reactor.close()
            raise
        self.port = self._door.port

    def events(self) -> list[Heard | Gone | Passed | Broken]:
        return self._inbox.take()

    def stream(self, link: Link, offer: Offer) -> Stream | None:
        """Where to push what this offer wants; None if its D is gone."""
        mover = self._movers.get(link)
        return None if mover is None else Stream(mover, offer)

    def close(self) -> None:
        """All links end; writes under way finish or fail; threads are joined. Every push has passed then."""
        movers = list(self._movers.values())
        self._reactor.close(self._end)
        for mover in movers:
            mover.stop()
            mover.join()
        for transport in self._transports.values():
            transport.close()

    def _end(self) -> None:
        self._door.close()
        for link in list(self._movers):
            link.close("the prefill worker closes")

    def _receive(self, connection: socket.socket) -> Link:
        return Link(connection, self._reactor, PREFILL_HEARS, self._hear, self._lost, Refused)

    def _hear(self, link: Link, message: Message) -> None:
        if isinstance(message, Hello) == link.greeted:  # the first must be one, the others must not
            link.close("out of turn: Hello comes first, and once")
        elif isinstance(message, Hello):
            self._greet(link, message)
        else:
            self._inbox.post(Heard(link, message))

    def _greet(self, link: Link, hello: Hello) -> None:
        why = self._unfit(hello)
        if why:
            log.warning("decode worker %s refused: %s", link.there, why)
            link.send(Refused(why))
            link.close(why)
            return
        link.greeted = True
        self._movers[link] = Mover(link, partial(self._connect, link, hello), self._layout, self._inbox)

    def _unfit(self, hello: Hello) -> str:
        if hello.protocol != PROTOCOL:
            return f"protocol {PROTOCOL} here, {hello.protocol} there"
        return self._layout.difference(hello.layout)

    def _connect(self, link: Link, hello: Hello) -> Peer | None:
        """In the mover's thread: the first way that works."""
        failures = []
        for way in hello.ways:
            transport = self._transports.get(way.transport)
            if transport is None:
                failures.append(f"{way.transport}: not offered here")
                continue
            try:
                peer = transport.connect(way.description)
            except TransportError as error:
                failures.append(str(error))
                continue
            log.info("decode worker %s comes in by %s", link.there, way.transport)
            link.send(Welcome(PROTOCOL, self._instance, self._layout, way.transport))
            return peer
        why = "no common transport: " + "; ".join(failures or ["none offered"])
        link.send(Refused(why))
        link.close(why)
        return None

    def _lost(self, link: Link, reason: str) -> None:
        mover = self._movers.pop(link, None)
        if mover is not None:
            mover.stop()
            self._inbox.post(Gone(link, reason))


@dataclass(slots=True)
class _Entry:
    """What waits for its turn in the mover: for a write to end, or just for those before it."""

    stream: Stream
    write: Write | None
    then: Callable[[], None]


class Mover:
    """The thread that writes to one D, in order; acknowledgements are awaited while the next pages go out."""

    def __init__(self, link: Link, connect: Callable[[], Peer | None], layout: KVLayout, inbox: Inbox) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._link = link
        self._page_bytes = layout.page_bytes
        self._inbox = inbox
        self._pending: deque[_Entry] = deque()
        self._peer: Peer | None = None
        self._lock = threading.Lock()
        self._stopping = False
        self._over = False
        self._thread = threading.Thread(target=self._run, args=(connect,), name="baton-mover", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Have the thread do this in turn; if it has ended, do it here and now (it will find no peer)."""
        with self._lock:
            if not self._over:
                self._jobs.put(job)
                return
        job()

    def stop(self) -> None:
        """No more writes; those under way are cut off. From any thread, idempotent, does not wait."""
        with self._lock:
            self._stopping = True
            peer = self._peer
        self._jobs.put(None)
        if peer is not None:
            peer.close()

    def join(self) -> None:
        self._thread.join()

    def push(self, stream: Stream, first: int, pages: list[int]) -> None:
        """In the mover's thread. `Passed` is posted when the last write of it has ended."""
        step = max(1, SLICE // self._page_bytes)
        try:
            for start in range(0, len(pages), step):
                if self._peer is None or self._stopping or stream.stop or stream.failed:
                    break
                part = pages[start : start + step]
                write = self._peer.write(self._pieces(stream.offer, first + start, part), stream.offer.epoch)
                self._pending.append(_Entry(stream, write, partial(self._landed, stream, first + start, write)))
                self._reap()
        finally:
            self._pending.append(_Entry(stream, None, lambda: self._inbox.post(Passed(stream, pages))))
        self._reap()

    def finish(self, stream: Stream, manifest: Manifest) -> None:
        def tell() -> None:
            if not (stream.stop or stream.failed):
                digest = xxhash.xxh3_128_digest(bytes(stream.digests))
                self._link.send(msgspec.structs.replace(manifest, digest=digest))

        self._pending.append(_Entry(stream, None, tell))
        self._reap()

    def _pieces(self, offer: Offer, first: int, pages: list[int]) -> Any:
        pieces = np.empty((len(pages), 3), np.int64)
        pieces[:, 0] = pages
        pieces[:, 1] = offer.pages[first : first + len(pages)]
        pieces[:, :2] *= self._page_bytes
        pieces[:, 2] = self._page_bytes
        return pieces

    def _landed(self, stream: Stream, first: int, write: Write) -> None:
        if write.state is not WriteState.DONE:
            self._fail(stream, write)
            return
        digests = write.digests.astype("<u8").tobytes()
        stream.digests += digests
        stream.bytes += write.bytes
        if not (stream.stop or stream.failed):
            self._link.send(Landed(stream.offer.room, stream.offer.epoch, first, digests))

    def _fail(self, stream: Stream, write: Write) -> None:
        if not (stream.failed or write.unwanted):  # D's `Cancel` says why it is unwanted
            self._inbox.post(Broken(stream, write.error))
        stream.failed = True
        if self._peer is not None and not self._peer.alive:
            self._link.close(write.error)  # the way is broken, D may come back by another

    def _reap(self) -> None:
        """Take from the front of the line what has ended."""
        while self._pending and self._settled(self._pending[0]):
            self._pending.popleft().then()

    def _settled(self, entry: _Entry) -> bool:
        if entry.write is None or self._peer is None:
            return True
        if entry.write.state is not WriteState.FAILED_UNSETTLED:
            return entry.write.state is not WriteState.RUNNING
        self._fail(entry.stream, entry.write)
        return self._peer.quiesce(POLL)

    def _run(self, connect: Callable[[], Peer | None]) -> None:
        try:
            peer = connect()
            with self._lock:
                self._peer = peer
            if peer is not None:
                self._serve(peer)
        except Exception:
            log.exception("the mover to %s failed", self._link.there)
            self._link.close("an internal error of the prefill worker")
        finally:
            self._wind_up()

    def _serve(self, peer: Peer) -> None:
        while not self._stopping:
            if not self._pending:
                job = self._jobs.get()
            else:
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    peer.poll(POLL)
                    self._reap()
                    continue
            if job is not None:
                job()

    def _wind_up(self) -> None:
        """Let go of the peer's region; from here on nothing of ours moves, so that every push has passed."""
        with self._lock:
            peer, self._peer = self._peer, None
            self._stopping = True
        if peer is not None:
            peer.close()
        self._reap()
        while True:
            with self._lock:
                self._over = self._jobs.empty()
                if self._over:
                    return
            job = self._jobs.get_nowait()
            if job is not None:
                job()
