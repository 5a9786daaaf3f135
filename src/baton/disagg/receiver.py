"""D's end: one connection to each P it has met, and the checking of what arrives.

Digests are checked in the I/O thread, slice by slice while the rest is on its way; the engine's thread hears of an
attempt when its first bytes came (`Started`), when all of it is there and right (`Delivered`), or wrong (`Wrong`).
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import xxhash

from baton.base.layout import KVLayout
from baton.base.messages import Message
from baton.disagg.bootstrap import CONNECT_TIMEOUT, Inbox, Link
from baton.disagg.wire import (
    DECODE_HEARS,
    NO_EPOCH,
    PROTOCOL,
    Accepted,
    Cancel,
    Hello,
    Landed,
    Manifest,
    Offer,
    Queued,
    Refused,
    Way,
    Welcome,
)
from baton.transports import kernels
from baton.transports.base import Grant, Transport
from baton.transports.reactor import Reactor
from baton.transports.region import Region

log = logging.getLogger("baton.disagg")


@dataclass(frozen=True, slots=True)
class Up:
    """The route is ready for offers."""

    route: Route


@dataclass(frozen=True, slots=True)
class Down:
    """The route is no more, or never was; why."""

    route: Route
    reason: str


@dataclass(frozen=True, slots=True)
class Said:
    """P says something that the engine's thread decides on."""

    route: Route
    message: Message


@dataclass(frozen=True, slots=True)
class Started:
    epoch: int


@dataclass(frozen=True, slots=True)
class Delivered:
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Wrong:
    """What arrived is not what was sent, or not what was agreed."""

    epoch: int
    reason: str


@dataclass(slots=True, eq=False)
class Arrival:
    """One attempt as the I/O thread sees it."""

    offer: Offer
    next: int = 0
    """How many of the offer's pages are here and right."""
    digests: bytearray = field(default_factory=bytearray)


class Receiver:
    def __init__(
        self, layout: KVLayout, instance: str, transports: Mapping[str, Transport], region: Region, inbox: Inbox
    ) -> None:
        self.layout = layout
        self.instance = instance
        self.transports = transports
        self.region = region
        self.inbox = inbox
        self._routes: dict[tuple[str, int], Route] = {}
        self._retired: list[Route] = []
        self.reactor = Reactor("baton-handoff")

    def events(self) -> list[Up | Down | Said | Started | Delivered | Wrong]:
        return self.inbox.take()

    def reach(self, host: str, port: int) -> Route:
        """The route to the prefill worker at this address; made if there is none. Returns at once, `Up` or `Down`
        follows."""
        self._retired = [route for route in self._retired if not route.settled]
        route = self._routes.get((host, port))
        if route is not None and route.cut:
            route.close("the way for pages is broken")
        if route is None or route.over:
            if route is not None:
                self._retired.append(route)
            route = self._routes[host, port] = Route(self, host, port)
        return route

    def close(self) -> None:
        """Every route ends; threads are joined."""
        routes = [*self._routes.values(), *self._retired]
        for route in routes:
            route.close("the decode worker closes")
        self.reactor.close()
        for route in routes:
            route.join()
        for transport in self.transports.values():
            transport.close()


class Route:
    """One connection to one P, from the first try to its end; never comes back (the next one is another route)."""

    def __init__(self, receiver: Receiver, host: str, port: int) -> None:
        self.name = f"{host}:{port}"
        self.up = False
        self.over = False
        """Ended, or told to: make no more offers."""
        self.way = ""
        self._receiver = receiver
        self._lock = threading.Lock()
        self._arrivals: dict[int, Arrival] = {}
        self._grants: dict[str, Grant] = {}
        self._link: Link | None = None
        self._connector = threading.Thread(target=self._connect, args=(host, port), name="baton-connect", daemon=True)
        self._connector.start()

    # --- the engine's thread -------------------------------------------------------------------------------

    def queue(self, room: int, epoch: int) -> None:
        """There will be an offer for this room, when we have pages for it."""
        self._say(Queued(room, epoch))

    def offer(self, offer: Offer, ranges: list[tuple[int, int]]) -> None:
        """`ranges`: where in our region the offered pages are. Only when `up`."""
        self._arrivals[offer.epoch] = Arrival(offer)
        self._grants[self.way].admit(offer.epoch, ranges)
        self._say(offer)

    def accept(self, offer: Offer) -> None:
        """Verified: nothing more is expected."""
        self._arrivals.pop(offer.epoch, None)
        self._grants[self.way].shut(offer.epoch)
        self._say(Accepted(offer.room, offer.epoch))

    def refuse(self, offer: Offer, why: str, tell: bool) -> bool:
        """Not wanted any more; `tell` P. True: none of it can arrive; False: P will say when (`Settled`)."""
        self._arrivals.pop(offer.epoch, None)
        if tell:
            self._say(Cancel(offer.room, offer.epoch, why))
        return self._grants[self.way].shut(offer.epoch) or self.settled

    def call_off(self, room: int, why: str) -> None:
        """There will be no offer for this room: P need not wait for it."""
        self._say(Cancel(room, NO_EPOCH, why))

    def landed(self, epoch: int) -> int:
        """How many pages of this attempt are here."""
        arrival = self._arrivals.get(epoch)
        return 0 if arrival is None else arrival.next

    @property
    def cut(self) -> bool:
        """The control connection stands, but the way for pages does not."""
        return self.up and self._grants[self.way].settled

    @property
    def settled(self) -> bool:
        """Nothing at all can arrive through this route any more."""
        return self.over and not self._connector.is_alive() and all(g.settled for g in self._grants.values())

    def close(self, reason: str) -> None:
        with self._lock:
            self.over = True
            link = self._link
        if link is not None:
            link.close(reason)

    def join(self) -> None:
        self._connector.join()

    def _say(self, message: Message) -> None:
        if self._link is not None:
            self._link.send(message)

    # --- the connector's thread ----------------------------------------------------------------------------

    def _connect(self, host: str, port: int) -> None:
        """Names are resolved and connections made here, where it may take its time."""
        try:
            connection = socket.create_connection((host, port), CONNECT_TIMEOUT)
        except (OSError, OverflowError, UnicodeError) as error:
            self._ended(None, f"cannot reach the prefill worker at {self.name}: {error}")
            return
        try:
            self._greet(connection)
        except OSError as error:
            connection.close()
            self._ended(None, f"lost the prefill worker at {self.name}: {error}")

    def _greet(self, connection: socket.socket) -> None:
        receiver = self._receiver
        with self._lock:
            if self.over:
                raise ConnectionError("not wanted any more")
            here = connection.getsockname()[0]
            self._grants = {name: transport.grant(here) for name, transport in receiver.transports.items()}
            self._link = link = Link(connection, receiver.reactor, DECODE_HEARS, self._hear, self._ended)
            link.greeted = True  # whom we called ourselves is no stranger
        ways = tuple(Way(name, grant.description) for name, grant in self._grants.items())
        link.send(Hello(PROTOCOL, receiver.instance, receiver.layout, ways))

    # --- the I/O thread ------------------------------------------------------------------------------------

    def _hear(self, link: Link, message: Message) -> None:
        match message:
            case Landed() | Manifest():
                arrival = self._arrivals.get(message.epoch)
                if arrival is None:  # of an attempt that is over
                    return
                if isinstance(message, Landed):
                    self._check(arrival, message)
                else:
                    self._close_account(arrival, message)
            case Welcome():
                self._welcome(link, message)
            case Refused(message=why):
                link.close(f"the prefill worker at {self.name} refuses: {why}")
            case _:
                self._receiver.inbox.post(Said(self, message))

    def _welcome(self, link: Link, welcome: Welcome) -> None:
        why = self._receiver.layout.difference(welcome.layout)
        if why or self.up or welcome.protocol != PROTOCOL or welcome.transport not in self._grants:
            link.close(f"the prefill worker at {self.name} does not fit: {why or 'another protocol'}")
            return
        for name, grant in self._grants.items():
            if name != welcome.transport:
                grant.revoke()
        self.way = welcome.transport
        self.up = True
        log.info("prefill worker %s: pages come by %s", self.name, self.way)
        self._receiver.inbox.post(Up(self))

    def _check(self, arrival: Arrival, landed: Landed) -> None:
        offer, count = arrival.offer, landed.count
        if landed.first != arrival.next or len(landed.digests) != 8 * count:
            self._wrong(arrival, f"pages from {landed.first} on arrived when {arrival.next} was due")
        elif arrival.next + count > len(offer.pages):
            self._wrong(arrival, f"{arrival.next + count} pages arrived, {len(offer.pages)} were asked for")
        elif offer.verify and (bad := self._mismatch(arrival, landed)) is not None:
            self._wrong(arrival, f"page {bad} of the prompt was damaged on its way (digest differs)")
        else:
            arrival.digests += landed.digests
            arrival.next += count
            if landed.first == 0:
                self._receiver.inbox.post(Started(offer.epoch))

    def _mismatch(self, arrival: Arrival, landed: Landed) -> int | None:
        size = self._receiver.layout.page_bytes
        pieces = np.zeros((landed.count, 3), np.int64)
        pieces[:, 0] = arrival.offer.pages[landed.first : landed.first + landed.count]
        pieces[:, 0] *= size
        pieces[:, 2] = size
        digests = kernels.digest(self._receiver.region.address, pieces)
        wrong = np.flatnonzero(digests != np.frombuffer(landed.digests, "<u8"))
        return int(wrong[0]) + landed.first if len(wrong) else None

    def _close_account(self, arrival: Arrival, manifest: Manifest) -> None:
        offer = arrival.offer
        for what, got, due in (
            ("room", manifest.room, offer.room),
            ("prompt tokens", manifest.prompt_len, offer.prompt_len),
            ("pages in the manifest", manifest.pages, len(offer.pages)),
            ("pages arrived", arrival.next, len(offer.pages)),
            ("model fingerprint", manifest.fingerprint, self._receiver.layout.fingerprint),
            ("digest", manifest.digest, xxhash.xxh3_128_digest(bytes(arrival.digests))),
        ):
            if got != due:
                self._wrong(arrival, f"{what}: {got!r} instead of {due!r}")
                return
        self._receiver.inbox.post(Delivered(manifest))

    def _wrong(self, arrival: Arrival, reason: str) -> None:
        self._arrivals.pop(arrival.offer.epoch, None)
        self._receiver.inbox.post(Wrong(arrival.offer.epoch, reason))

    def _ended(self, link: Link | None, reason: str) -> None:
        with self._lock:
            self.over, self.up = True, False
        for grant in self._grants.values():
            grant.revoke()
        self._receiver.inbox.post(Down(self, reason))

    def __repr__(self) -> str:
        return f"<Route to {self.name} by {self.way or '...'}{', over' if self.over else ''}>"
