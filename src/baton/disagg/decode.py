"""`Decode`: the role of an engine that continues prompts which others have computed.

The life of a request here (without a ticket it is simply served whole, prompt and all):

1. **Waiting** (`submit`): the route to its P is made if there is none.
2. **Queued**: the route stands, pages or places are short (what is under way and what runs together never exceed
   max-running-requests). P hears of it again and again, and waits as long as the request may. Who comes to a full
   queue is refused.
3. **Offered** (`poll`): pages for the whole prompt are reserved, a known prefix shared; P gets the rest to fill.
   When P says that it has the request too, patience is measured by P's signs of life.
4. **Moving**: pages land while P computes the next ones; each is checked as it comes.
5. **Delivered**: the manifest agrees with what came. The first token is told to the front as our own, and unless it
   was the last one the sequence joins the running ones: it decodes in this very step.

Lost at any stage: the front hears at once. Pages that P may still write to are kept out of everybody's hands until
P says that it is still, or the transport knows it: its process is dead, or its bytes are kept out.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import msgspec

from baton.base.clock import Clock
from baton.base.config import DisaggConfig
from baton.base.errors import BadRequest, BatonError, Cancelled, HandoffLost, Overloaded, TimedOut
from baton.base.layout import KVLayout
from baton.base.messages import Failed, ToFront
from baton.disagg.handoff import Event, Handoff, Patience, State
from baton.disagg.receiver import Delivered, Down, Receiver, Route, Said, Started, Up, Wrong
from baton.disagg.terms import prompt_digest
from baton.disagg.wire import Lost, Manifest, Met, Offer, Progress, Settled
from baton.engine.roles import Committer
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import Sequence
from baton.engine.sockets import HandoffLoad, Sampled, Slice

Key = tuple[str, int, int]
"""Host and port of P, room."""


@dataclass(slots=True, eq=False)
class Incoming:
    """One prompt on its way here."""

    sequence: Sequence
    handoff: Handoff
    key: Key
    route: Route
    told: float = 0.0
    """Queued: when P last heard of it."""
    offer: Offer | None = None
    landed: int = 0
    """Pages that were here when we last looked."""
    started: float = 0.0
    """When the first of them came."""


class Decode:
    def __init__(
        self,
        config: DisaggConfig,
        scheduler: Scheduler,
        committer: Committer,
        receiver: Receiver,
        layout: KVLayout,
        clock: Clock,
        transports: tuple[str, ...],
    ) -> None:
        self.transports = transports
        self.bootstrap_port = 0
        self._config = config
        self._patience = Patience.of(config)
        self._scheduler = scheduler
        self._committer = committer
        self._receiver = receiver
        self._layout = layout
        self._clock = clock
        self._epochs = itertools.count(random.getrandbits(48) + 1)
        self._by_id: dict[str, Incoming] = {}
        """All that are neither done nor lost; the same by room and by epoch."""
        self._by_key: dict[Key, Incoming] = {}
        self._by_epoch: dict[int, Incoming] = {}
        self._waiting: deque[Incoming] = deque()
        """Of these, what is not offered yet."""
        self._draining: dict[int, Incoming] = {}
        """By epoch: lost, but the pages are not ours again."""
        self._arrived: deque[Sequence] = deque()
        """Begun, waiting for a place among the running, or to be prepared."""
        self._load = HandoffLoad()

    # --- the role ------------------------------------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        ticket = sequence.ticket
        if ticket is None:
            self._scheduler.add(sequence)
            return
        self._scheduler.admit(sequence)
        key = (ticket.host, ticket.port, ticket.room)
        if key in self._by_key:
            raise BadRequest(f"bootstrap_room {ticket.room} is in use by another request", param="bootstrap_room")
        if len(self._waiting) >= self._scheduler.max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests wait for pages already (max-queued-requests)")
        route = self._receiver.reach(ticket.host, ticket.port)
        handoff = Handoff(ticket.room, self._clock.now(), next(self._epochs))
        incoming = Incoming(sequence, handoff, key, route)
        self._by_id[sequence.id] = self._by_key[key] = self._by_epoch[handoff.epoch] = incoming
        self._waiting.append(incoming)

    def poll(self) -> list[ToFront]:
        messages: list[ToFront] = []
        for event in self._receiver.events():
            messages += self._hear(event)
        now = self._clock.now()
        for incoming in list(self._by_id.values()):
            messages += self._look_after(incoming, now)
        for incoming in list(self._draining.values()):
            self._drain(incoming, now)
        for id in [sequence.id for sequence in self._arrived if sequence.late(now)]:
            self.abort(id, TimedOut.of_request())
            messages.append(Failed.of(id, TimedOut.of_request()))
        self._offer_waiting()
        for incoming in self._waiting:
            self._ask_for_patience(incoming, now)
        self._adopt_arrived()
        return messages

    def commit(self, batch: Seq[Slice], results: Seq[Sampled]) -> list[ToFront]:
        messages = [
            m for piece, result in zip(batch, results, strict=True) for m in self._committer.commit(piece, result)
        ]
        self._offer_waiting()  # pages may have come free, and nothing else may wake us
        return messages

    def abort(self, id: str, error: BatonError) -> bool:
        incoming = self._by_id.get(id)
        if incoming is not None:
            why = Cancelled("the request was cancelled") if isinstance(error, Cancelled) else error
            self._lose(incoming, Event.CANCELLED, why)
            self._offer_waiting()
            return True
        sequence = next((s for s in (*self._scheduler, *self._arrived) if s.id == id), None)
        if sequence is None:
            return False
        if sequence in self._arrived:
            self._arrived.remove(sequence)
        self._committer.leave(sequence)
        self._offer_waiting()
        return True

    @property
    def handoffs(self) -> HandoffLoad:
        self._load.waiting = len(self._waiting)
        self._load.waiting_tokens = sum(incoming.sequence.given_len for incoming in self._waiting)
        self._load.open = self._under_way + len(self._draining)
        self._load.quarantined_pages = sum(len(incoming.sequence.pages) for incoming in self._draining.values())
        return self._load

    def next_deadline(self) -> float | None:
        deadlines = [i.handoff.deadline(self._patience) for i in (*self._by_id.values(), *self._draining.values())]
        held = (*(i.sequence for i in self._by_id.values()), *self._arrived)
        deadlines += [sequence.deadline for sequence in held if sequence.deadline is not None]
        deadlines += [i.told + self._patience.beat for i in self._waiting if i.handoff.state is State.QUEUED]
        return min(deadlines, default=None)

    def close(self) -> None:
        self._receiver.close()

    # --- what comes in -------------------------------------------------------------------------------------

    def _hear(self, event: Up | Down | Said | Started | Delivered | Wrong) -> list[ToFront]:
        match event:
            case Up():
                return []  # the waiting are looked at in every poll
            case Down(route=route, reason=reason):
                mine = [incoming for incoming in self._by_id.values() if incoming.route is route]
                return [m for incoming in mine for m in self._fail(incoming, HandoffLost(reason))]
            case Started(epoch=epoch):
                return self._started(epoch)
            case Delivered(manifest=manifest):
                return self._deliver(manifest)
            case Wrong(epoch=epoch, reason=reason):
                incoming = self._by_epoch.get(epoch)
                return self._fail(incoming, HandoffLost(reason)) if incoming else []
            case Said(route=route, message=message):
                return self._told(route, message)

    def _told(self, route: Route, message: object) -> list[ToFront]:
        match message:
            case Met(epoch=epoch) | Progress(epoch=epoch):
                incoming = self._by_epoch.get(epoch)
                if incoming is not None and incoming.route is route:
                    incoming.handoff.met, incoming.handoff.seen = True, self._clock.now()
            case Lost(epoch=epoch, failure=failure, settled=settled):
                incoming = self._by_epoch.get(epoch)
                messages = []
                if incoming is not None and incoming.route is route:
                    messages = self._lose(incoming, Event.BROKEN, failure.error(), tell=False)
                if settled:
                    self._settle(route, epoch)
                return messages
            case Settled(epoch=epoch):
                self._settle(route, epoch)
        return []

    def _started(self, epoch: int) -> list[ToFront]:
        incoming = self._by_epoch.get(epoch)
        if incoming is not None:
            incoming.started = self._clock.now()
            incoming.handoff.apply(Event.STARTED, incoming.started)
        return []

    def _deliver(self, manifest: Manifest) -> list[ToFront]:
        """Everything is here and right: the sequence goes on as if it had been computed here."""
        incoming = self._by_epoch.get(manifest.epoch)
        if incoming is None:
            return []
        sequence, offer, now = incoming.sequence, incoming.offer, self._clock.now()
        assert offer is not None
        incoming.handoff.apply(Event.DELIVERED, now)
        incoming.route.accept(offer)
        self._remove(incoming)
        self._load.done += 1
        self._load.bytes += len(offer.pages) * self._layout.page_bytes
        self._load.seconds += now - incoming.started
        sequence.computed_len = sequence.given_len
        sequence.usage_cached_len = manifest.cached_tokens
        if manifest.seed != sequence.sampling.seed:
            sequence.sampling = msgspec.structs.replace(sequence.sampling, seed=manifest.seed)
        sequence.stamps.delivered = now
        tokens = self._committer.accept(sequence, manifest.first_token, manifest.logprob)
        if tokens.finish is None:
            self._arrived.append(sequence)
        return [tokens]

    @property
    def _under_way(self) -> int:
        """Offered, and not running yet."""
        return len(self._by_id) - len(self._waiting) + len(self._arrived)

    # --- progress ------------------------------------------------------------------------------------------

    def _offer_waiting(self) -> None:
        """In the order they came; who waits for his route does not hold up the others."""
        for incoming in list(self._waiting):
            if incoming.route.up:
                if not self._room_for(incoming.sequence) or not self._scheduler.reserve(incoming.sequence):
                    return
                self._waiting.remove(incoming)
                self._offer(incoming)

    def _room_for(self, sequence: Sequence) -> bool:
        """Never more than can run; nothing new while a preempted one waits, and a page to grow for each that runs."""
        scheduler, under_way = self._scheduler, self._under_way
        if under_way >= self._config.max_handoffs or under_way + len(scheduler.running) >= scheduler.max_running:
            return False
        if any(waiting.retractions for waiting in scheduler.waiting):
            return False
        return scheduler.pool.free >= self._layout.pages_for(sequence.given_len) + len(scheduler.running)

    def _offer(self, incoming: Incoming) -> None:
        sequence, handoff, size = incoming.sequence, incoming.handoff, self._layout.page_size
        pages = sequence.pages[sequence.cached_len // size :]
        incoming.offer = Offer(
            handoff.room,
            handoff.epoch,
            sequence.given_len,
            prompt_digest(sequence.tokens),
            sequence.cached_len,
            tuple(pages),
            self._config.verify,
        )
        handoff.apply(Event.OFFERED, self._clock.now())
        sequence.stamps.offered = self._clock.now()
        page_bytes = self._layout.page_bytes
        incoming.route.offer(incoming.offer, [(page * page_bytes, page_bytes) for page in pages])

    def _ask_for_patience(self, incoming: Incoming, now: float) -> None:
        """P may have computed the prompt, and wait: it hears that we are here, and only short of pages."""
        handoff = incoming.handoff
        if incoming.route.up and (handoff.state is State.WAITING or now - incoming.told >= self._patience.beat):
            if handoff.state is State.WAITING:
                handoff.apply(Event.QUEUED, now)
            incoming.told = now
            incoming.route.queue(handoff.room, handoff.epoch)

    def _adopt_arrived(self) -> None:
        for sequence in [sequence for sequence in self._arrived if not sequence.held]:
            if len(self._scheduler.running) >= self._scheduler.max_running:
                return
            self._arrived.remove(sequence)
            self._scheduler.adopt(sequence)

    def _look_after(self, incoming: Incoming, now: float) -> list[ToFront]:
        handoff, sequence = incoming.handoff, incoming.sequence
        if sequence.late(now):
            return self._lose(incoming, Event.EXPIRED, TimedOut.of_request())
        if handoff.state is State.QUEUED:
            handoff.seen = now  # ours to find pages: P has nothing to answer for
        landed = incoming.route.landed(handoff.epoch)
        if landed != incoming.landed:
            incoming.landed, handoff.seen = landed, now
        if handoff.deadline(self._patience) > now:
            return []
        return self._lose(incoming, Event.EXPIRED, TimedOut(self._complaint(incoming)))

    def _complaint(self, incoming: Incoming) -> str:
        handoff, name = incoming.handoff, incoming.route.name
        if handoff.state is State.WAITING:
            return f"the prefill worker at {name} did not answer within {self._patience.meet:g} s (meet-timeout)"
        if not handoff.met:
            return f"the prefill worker at {name} never had a request for room {handoff.room} (meet-timeout)"
        return f"no sign of life from the prefill worker at {name} for {self._patience.move:g} s (move-timeout)"

    # --- losing --------------------------------------------------------------------------------------------

    def _fail(self, incoming: Incoming, error: BatonError) -> list[ToFront]:
        return self._lose(incoming, Event.BROKEN, error)

    def _lose(self, incoming: Incoming, event: Event, error: BatonError, *, tell: bool = True) -> list[ToFront]:
        """The attempt is over. `tell`: P does not know yet; else it said so itself, and will say when it is still."""
        handoff, offer = incoming.handoff, incoming.offer
        handoff.apply(event, self._clock.now())
        self._remove(incoming)
        self._load.failed += 1
        if offer is not None:
            self._draining[handoff.epoch] = incoming
            if incoming.route.refuse(offer, error.message, tell):
                self._settle(incoming.route, handoff.epoch)
        elif tell and incoming.route.up:
            incoming.route.call_off(handoff.room, error.message)
        return [Failed.of(incoming.sequence.id, error)]

    def _drain(self, incoming: Incoming, now: float) -> None:
        if incoming.route.settled:
            self._settle(incoming.route, incoming.handoff.epoch)
        elif incoming.handoff.deadline(self._patience) <= now:
            incoming.handoff.since = now
            incoming.route.close(f"no answer to a cancel within {self._patience.drain:g} s (drain-timeout)")

    def _settle(self, route: Route, epoch: int) -> None:
        """The one line that gives a lost attempt's pages back."""
        incoming = self._draining.get(epoch)
        if incoming is not None and incoming.route is route:
            del self._draining[epoch]
            incoming.handoff.apply(Event.SETTLED, self._clock.now())
            self._scheduler.release(incoming.sequence)

    def _remove(self, incoming: Incoming) -> None:
        del self._by_id[incoming.sequence.id]
        del self._by_key[incoming.key]
        del self._by_epoch[incoming.handoff.epoch]
        if incoming in self._waiting:
            self._waiting.remove(incoming)
