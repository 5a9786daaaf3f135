"""`Prefill`: the role of an engine that computes prompts and hands them over.

The life of a request here:

1. **Queued** (`submit`): a ticket names its room; the scheduler queues it like any other. D's offer for the room may
   have come before, or comes while the prompt waits, is computed, or is finished: nothing waits for it until 4.
2. **Met** (the offer): D has reserved pages and says which tokens it has already. The offer must fit the prompt.
3. **Computed and pushed** (`commit`, chunk by chunk): full pages go to the mover at once, which writes them to D
   while the next chunk is computed. Each push holds its pages until the mover has let go of them, so that neither
   preemption nor an abort can hand them to somebody else meanwhile.
4. **Sampled**: the first token is drawn. With an offer, the tail and the manifest follow and the sequence leaves the
   engine; without one it is parked, its pages with it, until the offer comes or patience ends.
5. **Delivered** (D accepts): the front gets the receipt, one token with finish `length`.

Lost at any stage: D is told at once, the front gets the error, and `Settled` follows when nothing moves any more.
An offer for a room that has failed already is answered with that failure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from baton.base.clock import Clock
from baton.base.config import DisaggConfig
from baton.base.errors import BadRequest, BatonError, HandoffLost, Overloaded, TimedOut
from baton.base.layout import KVLayout
from baton.base.messages import Failed, Finish, ToFront, TokenLogprob, Tokens
from baton.disagg.bootstrap import Link
from baton.disagg.handoff import Event, Handoff, Patience, State
from baton.disagg.sender import Broken, Gone, Heard, Passed, Sender, Stream
from baton.disagg.terms import unacceptable
from baton.disagg.wire import NO_EPOCH, Accepted, Cancel, Lost, Manifest, Met, Offer, Progress, Settled
from baton.engine.roles import Committer
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import Sequence
from baton.engine.sockets import HandoffLoad, Sampled, Slice

REMEMBERED = 4096
"""Failed rooms, and offers that came before their request: at most so many of each are kept."""


@dataclass(slots=True, eq=False)
class Outgoing:
    """One prompt on its way out."""

    sequence: Sequence
    handoff: Handoff
    link: Link | None = None
    offer: Offer | None = None
    stream: Stream | None = None
    pushed: int = 0
    """How many of the prompt's pages the mover has been given (D's own prefix counts)."""
    flying: int = 0
    """Pages held by pushes that have not passed."""
    first: Sampled | None = None
    """The prompt is computed, and this is how the answer begins."""
    finished: bool = False
    """The manifest is on its way after the pages."""
    told: float = 0.0
    """When D last heard of us."""


@dataclass(frozen=True, slots=True)
class Early:
    """An offer whose request has not come yet."""

    link: Link
    offer: Offer
    until: float


@dataclass(slots=True)
class Memory:
    """Of rooms that have failed, so that a late offer hears why."""

    rooms: OrderedDict[int, tuple[BatonError, float]] = field(default_factory=OrderedDict)

    def keep(self, room: int, error: BatonError, until: float) -> None:
        self.rooms[room] = (error, until)
        self.rooms.move_to_end(room)
        if len(self.rooms) > REMEMBERED:
            self.rooms.popitem(last=False)

    def forget(self, now: float) -> None:
        while self.rooms and next(iter(self.rooms.values()))[1] < now:
            self.rooms.popitem(last=False)


class Prefill:
    def __init__(
        self,
        config: DisaggConfig,
        scheduler: Scheduler,
        committer: Committer,
        sender: Sender,
        layout: KVLayout,
        clock: Clock,
        transports: tuple[str, ...],
    ) -> None:
        self.transports = transports
        self.bootstrap_port = sender.port
        self._config = config
        self._patience = Patience(config.meet_timeout, config.move_timeout, config.drain_timeout)
        self._beat = config.move_timeout / 4
        self._scheduler = scheduler
        self._committer = committer
        self._sender = sender
        self._layout = layout
        self._clock = clock
        self._rooms: dict[int, Outgoing] = {}
        """All that is not lost, by room; `_by_id` the same by sequence."""
        self._by_id: dict[str, Outgoing] = {}
        self._draining: list[Outgoing] = []
        self._streams: dict[Stream, Outgoing] = {}
        self._early: OrderedDict[int, Early] = OrderedDict()
        self._failed = Memory()
        self._unsaid: list[ToFront] = []
        """What `submit` has for the front; `poll` says it."""
        self._load = HandoffLoad()

    # --- the role ------------------------------------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        ticket = sequence.ticket
        if ticket is None:
            raise BadRequest("this is a prefill worker; the request has no bootstrap_room", param="bootstrap_room")
        if ticket.room in self._rooms:
            raise BadRequest(f"bootstrap_room {ticket.room} is in use by another request", param="bootstrap_room")
        try:
            self._check_parked()
            self._scheduler.add(sequence)
        except BatonError as error:
            self._turn_away(ticket.room, error)
            raise
        now = self._clock.now()
        outgoing = Outgoing(sequence, Handoff(ticket.room, now))
        self._rooms[ticket.room] = self._by_id[sequence.id] = outgoing
        self._failed.rooms.pop(ticket.room, None)
        early = self._early.pop(ticket.room, None)
        if early is not None:
            self._unsaid += self._meet(outgoing, early.link, early.offer)

    def poll(self) -> list[ToFront]:
        messages, self._unsaid = self._unsaid, []
        for event in self._sender.events():
            messages += self._hear(event)
        now = self._clock.now()
        for outgoing in list(self._rooms.values()):
            messages += self._look_after(outgoing, now)
        for outgoing in [o for o in self._draining if o.handoff.deadline(self._patience) <= now]:
            self._give_up_on(outgoing, now)
        self._forget(now)
        return messages

    def commit(self, batch: Seq[Slice], results: Seq[Sampled]) -> list[ToFront]:
        for piece, result in zip(batch, results, strict=True):
            self._committer.computed(piece, result)
            outgoing = self._by_id[piece.sequence.id]
            if result.token is not None:
                self._computed(outgoing, result)
            self._push(outgoing)
        return []

    def abort(self, id: str) -> bool:
        outgoing = self._by_id.get(id)
        if outgoing is None:
            return False
        self._lose(outgoing, Event.CANCELLED, HandoffLost("the prefill half of the request was cancelled"))
        return True

    @property
    def handoffs(self) -> HandoffLoad:
        self._load.open = len(self._rooms) + len(self._draining)
        self._load.quarantined_pages = sum(outgoing.flying for outgoing in self._draining)
        return self._load

    def next_deadline(self) -> float | None:
        deadlines = [o.handoff.deadline(self._patience) for o in (*self._rooms.values(), *self._draining)]
        deadlines += [o.sequence.deadline for o in self._rooms.values() if o.sequence.deadline is not None]
        deadlines += [o.told + self._beat for o in self._rooms.values() if o.link is not None]
        return min(deadlines, default=None)

    def close(self) -> None:
        self._sender.close()
        for event in self._sender.events():
            if isinstance(event, Passed):
                self._pass(event)

    # --- what comes in -------------------------------------------------------------------------------------

    def _hear(self, event: Heard | Gone | Passed | Broken) -> list[ToFront]:
        match event:
            case Passed():
                self._pass(event)
                return []
            case Broken(stream=stream, reason=reason):
                return self._fail(self._streams[stream], HandoffLost(f"pages could not be written: {reason}"))
            case Gone(link=link, reason=reason):
                return self._bereft(link, reason)
            case Heard(link=link, message=Offer() as offer):
                return self._offered(link, offer)
            case Heard(link=link, message=Accepted(room=room, epoch=epoch)):
                return self._accepted(link, room, epoch)
            case Heard(link=link, message=Cancel(room=room, epoch=epoch, message=why)):
                return self._cancelled(link, room, epoch, why)
        return []

    def _offered(self, link: Link, offer: Offer) -> list[ToFront]:
        outgoing, failed = self._rooms.get(offer.room), self._failed.rooms.get(offer.room)
        if outgoing is not None:
            if outgoing.offer is None:
                return self._meet(outgoing, link, offer)
            self._say_lost(link, offer, HandoffLost(f"room {offer.room} is taken by another decode worker"), True)
        elif failed is not None:
            self._say_lost(link, offer, failed[0], True)
        elif offer.room in self._early or len(self._early) >= REMEMBERED:
            self._say_lost(
                link, offer, Overloaded("too many offers wait for their requests, or for this very one"), True
            )
        else:
            self._early[offer.room] = Early(link, offer, self._clock.now() + self._patience.meet)
        return []

    def _meet(self, outgoing: Outgoing, link: Link, offer: Offer) -> list[ToFront]:
        """The request and its offer have found each other."""
        sequence, now = outgoing.sequence, self._clock.now()
        why = unacceptable(offer, sequence, self._layout)
        stream = None if why else self._sender.stream(link, offer)
        if stream is None:
            error = HandoffLost(why or "the decode worker is gone")
            self._say_lost(link, offer, error, True)
            return self._fail(outgoing, error)
        outgoing.link, outgoing.offer, outgoing.stream, outgoing.told = link, offer, stream, now
        self._streams[stream] = outgoing
        outgoing.pushed = offer.prefix_len // self._layout.page_size
        outgoing.handoff.epoch, outgoing.handoff.met = offer.epoch, True
        outgoing.handoff.apply(Event.OFFERED, now)
        sequence.stamps.offered = now
        link.send(Met(offer.room, offer.epoch))
        self._push(outgoing)
        return []

    def _accepted(self, link: Link, room: int, epoch: int) -> list[ToFront]:
        outgoing = self._rooms.get(room)
        if outgoing is None or outgoing.link is not link or outgoing.handoff.epoch != epoch:
            return []  # of an attempt that we gave up on meanwhile
        if outgoing.first is None or not outgoing.finished or outgoing.flying:
            return self._fail(outgoing, HandoffLost("the decode worker accepted what was not all sent"))
        return [self._deliver(outgoing, outgoing.first)]

    def _cancelled(self, link: Link, room: int, epoch: int, why: str) -> list[ToFront]:
        outgoing, early = self._rooms.get(room), self._early.get(room)
        error = HandoffLost(f"the decode worker gave up: {why}")
        if epoch == NO_EPOCH:
            return self._lose(outgoing, Event.CANCELLED, error) if outgoing and outgoing.offer is None else []
        if early is not None and early.link is link and early.offer.epoch == epoch:
            del self._early[room]
        if outgoing is not None and outgoing.link is link and outgoing.handoff.epoch == epoch:
            return self._lose(outgoing, Event.CANCELLED, error, tell=False)  # `Settled` is the answer
        if not any(o.link is link and o.handoff.epoch == epoch for o in self._draining):
            link.send(Settled(room, epoch))
        return []

    def _bereft(self, link: Link, reason: str) -> list[ToFront]:
        for room in [room for room, early in self._early.items() if early.link is link]:
            del self._early[room]
        mine = [o for o in self._rooms.values() if o.link is link]
        return [m for o in mine for m in self._fail(o, HandoffLost(f"the decode worker is gone: {reason}"))]

    def _pass(self, passed: Passed) -> None:
        """The one line that gives pushed pages back."""
        self._scheduler.pool.give_back(passed.pages)
        outgoing = self._streams[passed.stream]
        outgoing.flying -= len(passed.pages)
        outgoing.handoff.seen = self._clock.now()
        self._settle(outgoing)

    # --- progress ------------------------------------------------------------------------------------------

    def _computed(self, outgoing: Outgoing, result: Sampled) -> None:
        """The last chunk is done. The sequence takes no further part in scheduling; its pages stay."""
        assert result.token is not None
        outgoing.first = result
        outgoing.sequence.stamps.first_token = self._clock.now()
        self._scheduler.detach(outgoing.sequence)

    def _push(self, outgoing: Outgoing) -> None:
        """Give the mover what is complete and not yet given."""
        sequence, stream, size = outgoing.sequence, outgoing.stream, self._layout.page_size
        if stream is None or outgoing.finished:
            return
        end = self._layout.pages_for(sequence.prompt_len) if outgoing.first else sequence.computed_len // size
        if end > outgoing.pushed:
            pages = sequence.pages[outgoing.pushed : end]
            self._scheduler.pool.share(pages)  # the push's own hold on them, until it has passed
            if outgoing.handoff.state is State.READY:
                outgoing.handoff.apply(Event.STARTED, self._clock.now())
            stream.push(outgoing.pushed - stream.offer.prefix_len // size, pages)
            outgoing.flying += len(pages)
            outgoing.pushed = end
        if outgoing.first is not None:
            outgoing.finished = True
            stream.finish(self._manifest(stream.offer, sequence, outgoing.first))
            self._committer.leave(sequence)

    def _manifest(self, offer: Offer, sequence: Sequence, first: Sampled) -> Manifest:
        assert first.token is not None
        return Manifest(
            offer.room,
            offer.epoch,
            sequence.prompt_len,
            len(offer.pages),
            first.token,
            first.logprob,
            sequence.sampling.seed,
            sequence.usage_cached_len,
            self._layout.fingerprint,
        )

    def _deliver(self, outgoing: Outgoing, first: Sampled) -> Tokens:
        """The receipt."""
        sequence, now = outgoing.sequence, self._clock.now()
        assert first.token is not None
        outgoing.handoff.apply(Event.DELIVERED, now)
        self._remove(outgoing)
        self._settle(outgoing)
        self._load.done += 1
        self._load.bytes += outgoing.stream.bytes if outgoing.stream else 0
        self._load.seconds += now - sequence.stamps.prefilled
        sequence.stamps.delivered = sequence.stamps.finished = now
        sequence.tokens.append(first.token)
        logprobs: tuple[TokenLogprob, ...] = (first.logprob,) if first.logprob is not None else ()
        return Tokens(
            sequence.id,
            (first.token,),
            logprobs,
            tuple(sequence.prompt_logprobs),
            sequence.usage_cached_len,
            Finish("length"),
            sequence.usage(),
            sequence.stamps.freeze(),
        )

    def _look_after(self, outgoing: Outgoing, now: float) -> list[ToFront]:
        """Signs of life to D, and an end to waiting."""
        sequence, handoff = outgoing.sequence, outgoing.handoff
        if sequence.deadline is not None and sequence.deadline <= now:
            return self._lose(outgoing, Event.EXPIRED, TimedOut("the request's deadline passed"))
        if outgoing.first is None and outgoing.link is not None:
            handoff.seen = now  # ours to compute: D has nothing to answer for
        if outgoing.link is not None and now - outgoing.told >= self._beat:
            outgoing.told = now
            outgoing.link.send(Progress(handoff.room, handoff.epoch, sequence.computed_len))
        if handoff.deadline(self._patience) > now:
            return []
        waited = "come to" if handoff.state is State.WAITING else "accept the pages in"
        error = TimedOut(f"the decode worker did not {waited} room {handoff.room} in time (meet-timeout, move-timeout)")
        return self._lose(outgoing, Event.EXPIRED, error)

    # --- losing --------------------------------------------------------------------------------------------

    def _fail(self, outgoing: Outgoing, error: BatonError) -> list[ToFront]:
        return self._lose(outgoing, Event.BROKEN, error)

    def _lose(self, outgoing: Outgoing, event: Event, error: BatonError, *, tell: bool = True) -> list[ToFront]:
        """The attempt is over; the front and D (`tell`) hear why. Pages that are being read stay until they are not."""
        handoff, sequence = outgoing.handoff, outgoing.sequence
        if handoff.state is State.DRAINING:
            return []  # known already
        handoff.apply(event, self._clock.now())
        self._remove(outgoing)
        self._committer.leave(sequence)
        self._load.failed += 1
        if outgoing.stream is None or outgoing.link is None:
            self._failed.keep(handoff.room, error, self._clock.now() + self._patience.meet)
        else:
            outgoing.stream.stop = True
            self._draining.append(outgoing)
            if tell:
                self._say_lost(outgoing.link, outgoing.stream.offer, error, False)
            self._settle(outgoing)
        return [Failed.of(sequence.id, error)]

    def _settle(self, outgoing: Outgoing) -> None:
        if outgoing.handoff.state is State.DRAINING and not outgoing.flying:
            outgoing.handoff.apply(Event.SETTLED, self._clock.now())
            self._draining.remove(outgoing)
            if outgoing.link is not None:
                outgoing.link.send(Settled(outgoing.handoff.room, outgoing.handoff.epoch))
        if outgoing.handoff.state.terminal and outgoing.stream is not None:
            del self._streams[outgoing.stream]

    def _give_up_on(self, outgoing: Outgoing, now: float) -> None:
        """The mover cannot get rid of its pages: its D does not take them. Cut that D off; `Passed` follows."""
        outgoing.handoff.since = now
        if outgoing.link is not None:
            outgoing.link.close("pages could not be written in time (drain-timeout)")

    def _remove(self, outgoing: Outgoing) -> None:
        del self._rooms[outgoing.handoff.room]
        del self._by_id[outgoing.sequence.id]

    def _turn_away(self, room: int, error: BatonError) -> None:
        """Refused before it began: D hears of it now, or as soon as it asks."""
        early = self._early.pop(room, None)
        if early is not None:
            self._say_lost(early.link, early.offer, error, True)
        else:
            self._failed.keep(room, error, self._clock.now() + self._patience.meet)

    def _say_lost(self, link: Link, offer: Offer, error: BatonError, settled: bool) -> None:
        link.send(Lost(offer.room, offer.epoch, Failed.of("", error), settled))

    def _check_parked(self) -> None:
        parked = sum(1 for outgoing in self._rooms.values() if outgoing.first is not None)
        if parked >= self._config.max_handoffs:
            raise Overloaded(f"{parked} prompts wait for their decode workers already (max-handoffs)")

    def _forget(self, now: float) -> None:
        self._failed.forget(now)
        while self._early and next(iter(self._early.values())).until < now:
            _, early = self._early.popitem(last=False)
            self._say_lost(early.link, early.offer, TimedOut("the request never came to the prefill worker"), True)
