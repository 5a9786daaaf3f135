"""`Prefill`: the role of an engine that computes prompts and hands them over.

The life of a request here:

1. **Waiting** (`submit`): a ticket names its room; the scheduler queues it like any other. D's offer for the room may
   have come before, or comes while the prompt waits, is computed, or is finished: nothing waits for it until 4. A D
   that is short of pages says so, again and again, and is waited for as long as it does.
2. **Met** (the offer): D has reserved pages and says which tokens it has already. The offer must fit the prompt.
3. **Computed and pushed** (`commit`, chunk by chunk): full pages go to the mover at once, which writes them to D
   while the next chunk is computed. Each push holds its pages until the mover has let go of them, so that neither
   preemption nor an abort can hand them to somebody else meanwhile.
4. **Sampled**: the first token is drawn. With an offer, the tail and the manifest follow and the sequence leaves the
   engine; without one it is parked, its pages with it, until the offer comes or patience ends. If those pages are
   needed for a prompt that D has reserved pages for, they go (`_make_room`), and it is computed again when it is due:
   else P, full of prompts that D has no pages for, and D, full of pages for prompts that P has none for, would wait
   for each other.
5. **Delivered** (D accepts): the front gets the receipt, one token with finish `length`.

Lost at any stage: D is told at once, the front gets the error, and `Settled` follows when nothing moves any more.
An offer for a room that has failed already is answered with that failure.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from baton.base.clock import Clock
from baton.base.config import DisaggConfig
from baton.base.errors import BadRequest, BatonError, Cancelled, HandoffLost, Overloaded, TimedOut
from baton.base.layout import KVLayout
from baton.base.messages import Failed, ToFront, Tokens
from baton.disagg.bootstrap import Link
from baton.disagg.handoff import Event, Handoff, Patience, State
from baton.disagg.lobby import Lobby
from baton.disagg.outgoing import Outgoing
from baton.disagg.sender import Broken, Gone, Heard, Passed, Sender, Stream
from baton.disagg.terms import unacceptable
from baton.disagg.wire import NO_EPOCH, Accepted, Cancel, Lost, Met, Offer, Progress, Queued, Settled
from baton.engine.roles import Committer
from baton.engine.scheduler import Scheduler, rank
from baton.engine.sequence import Sequence
from baton.engine.sockets import HandoffLoad, Sampled, Slice


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
        self._patience = Patience.of(config)
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
        self._lobby = Lobby(config.meet_timeout)
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
        early = self._lobby.call(ticket.room)
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
        for early in self._lobby.expire(now):
            self._say_lost(
                early.link, early.offer, TimedOut("the request never came to the prefill worker"), settled=True
            )
        self._make_room()
        return messages

    def commit(self, batch: Seq[Slice], results: Seq[Sampled]) -> list[ToFront]:
        for piece, result in zip(batch, results, strict=True):
            self._committer.computed(piece, result)
            outgoing = self._by_id[piece.sequence.id]
            if result.token is not None:
                self._computed(outgoing, result)
            self._push(outgoing)
        return []

    def abort(self, id: str, error: BatonError) -> bool:
        outgoing = self._by_id.get(id)
        if outgoing is None:
            return False
        if isinstance(error, Cancelled):
            error = HandoffLost("the prefill half of the request was cancelled")
        self._lose(outgoing, Event.EXPIRED if isinstance(error, TimedOut) else Event.CANCELLED, error)
        return True

    @property
    def handoffs(self) -> HandoffLoad:
        self._load.open = len(self._rooms) + len(self._draining)
        self._load.quarantined_pages = sum(outgoing.flying for outgoing in self._draining)
        return self._load

    def next_deadline(self) -> float | None:
        deadlines = [o.handoff.deadline(self._patience) for o in (*self._rooms.values(), *self._draining)]
        deadlines += [o.sequence.deadline for o in self._rooms.values() if o.sequence.deadline is not None]
        deadlines += [o.told + self._patience.beat for o in self._rooms.values() if o.offer is not None]
        if self._stuck():
            deadlines.append(self._clock.now())
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
            case Heard(link=link, message=Queued() as queued):
                self._queued(link, queued)
                return []
            case Heard(link=link, message=Offer() as offer):
                return self._offered(link, offer)
            case Heard(link=link, message=Accepted(room=room, epoch=epoch)):
                return self._accepted(link, room, epoch)
            case Heard(link=link, message=Cancel(room=room, epoch=epoch, message=why)):
                return self._cancelled(link, room, epoch, why)
        return []

    def _queued(self, link: Link, queued: Queued) -> None:
        """D has the request, and waits for pages of its own. If we do not have it yet, D will say so again."""
        outgoing, failed = self._rooms.get(queued.room), self._lobby.failure(queued.room)
        if outgoing is None:
            if failed is not None:
                self._say_lost(link, queued, failed, settled=True)
        elif outgoing.link is None or (outgoing.link is link and outgoing.handoff.epoch == queued.epoch):
            outgoing.link, outgoing.handoff.epoch = link, queued.epoch
            if outgoing.handoff.state is State.WAITING:
                outgoing.handoff.apply(Event.QUEUED, self._clock.now())
            outgoing.handoff.seen = self._clock.now()
        elif outgoing.link is not link:
            self._say_taken(link, queued)

    def _offered(self, link: Link, offer: Offer) -> list[ToFront]:
        outgoing, failed = self._rooms.get(offer.room), self._lobby.failure(offer.room)
        if outgoing is not None:
            if outgoing.offer is None and outgoing.link in (None, link):
                return self._meet(outgoing, link, offer)
            self._say_taken(link, offer)
        elif failed is not None:
            self._say_lost(link, offer, failed, settled=True)
        elif not self._lobby.wait(link, offer, self._clock.now()):
            error = Overloaded("too many offers wait for their requests, or for this very one")
            self._say_lost(link, offer, error, settled=True)
        return []

    def _meet(self, outgoing: Outgoing, link: Link, offer: Offer) -> list[ToFront]:
        """The request and its offer have found each other."""
        sequence, now = outgoing.sequence, self._clock.now()
        why = unacceptable(offer, sequence, self._layout)
        stream = None if why else self._sender.stream(link, offer)
        if stream is None:
            error = HandoffLost(why or "the decode worker is gone")
            self._say_lost(link, offer, error, settled=True)
            return self._lose(outgoing, Event.BROKEN, error, tell=False)
        outgoing.link, outgoing.offer, outgoing.stream, outgoing.told = link, offer, stream, now
        self._streams[stream] = outgoing
        outgoing.pushed = offer.prefix_len // self._layout.page_size
        outgoing.handoff.epoch, outgoing.handoff.met = offer.epoch, True
        outgoing.handoff.apply(Event.OFFERED, now)
        sequence.stamps.offered = now
        link.send(Met(offer.room, offer.epoch))
        if outgoing.shelved:
            outgoing.shelved = False
            self._scheduler.resume(sequence)
        self._push(outgoing)
        return []

    def _accepted(self, link: Link, room: int, epoch: int) -> list[ToFront]:
        outgoing = self._rooms.get(room)
        if outgoing is None or outgoing.link is not link or outgoing.handoff.epoch != epoch:
            return []  # of an attempt that we gave up on meanwhile
        if outgoing.first is None or not outgoing.finished or outgoing.flying:
            return self._fail(outgoing, HandoffLost("the decode worker accepted what was not all sent"))
        return [self._deliver(outgoing)]

    def _cancelled(self, link: Link, room: int, epoch: int, why: str) -> list[ToFront]:
        outgoing, error = self._rooms.get(room), HandoffLost(f"the decode worker gave up: {why}")
        if epoch == NO_EPOCH:
            if outgoing is None or outgoing.offer is not None or outgoing.link not in (None, link):
                return []
            return self._lose(outgoing, Event.CANCELLED, error, tell=False)
        self._lobby.withdraw(link, room, epoch)
        if outgoing is not None and outgoing.link is link and outgoing.handoff.epoch == epoch:
            return self._lose(outgoing, Event.CANCELLED, error, tell=False)  # `Settled` is the answer
        if not any(o.link is link and o.handoff.epoch == epoch for o in self._draining):
            link.send(Settled(room, epoch))
        return []

    def _bereft(self, link: Link, reason: str) -> list[ToFront]:
        self._lobby.desert(link)
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
        end = self._layout.pages_for(sequence.given_len) if outgoing.first else sequence.computed_len // size
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
            stream.finish(outgoing.manifest(stream.offer, self._layout.fingerprint))
            self._committer.leave(sequence)

    def _deliver(self, outgoing: Outgoing) -> Tokens:
        sequence, now = outgoing.sequence, self._clock.now()
        assert outgoing.first is not None
        assert outgoing.first.token is not None
        outgoing.handoff.apply(Event.DELIVERED, now)
        self._remove(outgoing)
        self._settle(outgoing)
        self._load.done += 1
        self._load.bytes += outgoing.stream.bytes if outgoing.stream else 0
        self._load.seconds += now - sequence.stamps.prefilled
        sequence.stamps.delivered = sequence.stamps.finished = now
        sequence.tokens.append(outgoing.first.token)
        return outgoing.receipt()

    def _look_after(self, outgoing: Outgoing, now: float) -> list[ToFront]:
        """Signs of life to D, and an end to waiting."""
        sequence, handoff = outgoing.sequence, outgoing.handoff
        if sequence.late(now):
            return self._lose(outgoing, Event.EXPIRED, TimedOut.of_request())
        if outgoing.due:
            handoff.seen = now  # ours to compute: D has nothing to answer for
        if outgoing.offer is not None and outgoing.link is not None and now - outgoing.told >= self._patience.beat:
            outgoing.told = now
            outgoing.link.send(Progress(handoff.room, handoff.epoch, sequence.computed_len))
        if handoff.deadline(self._patience) > now:
            return []
        return self._lose(outgoing, Event.EXPIRED, TimedOut(outgoing.complaint(self._patience)))

    def _stuck(self) -> bool:
        """The next prompt in line has no pages and gets none by itself, prompts that D has reserved pages for wait
        behind it or are it, and pages are parked that could be had."""
        head = self._scheduler.head
        if head is None or self._scheduler.running or self._scheduler.pool.free >= self._pages_for(head):
            return False
        rooms = self._rooms.values()
        if any(o.flying for o in (*rooms, *self._draining)):
            return False  # these come free, or their D is cut off
        return any(o.parked for o in rooms) and any(o.due for o in rooms)

    def _make_room(self) -> None:
        """Parked prompts lose their pages, the last in rank first, until the next in line can be computed."""
        if not self._stuck():
            return
        head = self._scheduler.head
        assert head is not None
        parked = sorted((o for o in self._rooms.values() if o.parked), key=lambda o: rank(o.sequence))
        while parked and self._scheduler.pool.free < self._pages_for(head):
            outgoing = parked.pop()
            outgoing.first, outgoing.shelved = None, True
            self._scheduler.forfeit(outgoing.sequence)

    def _pages_for(self, sequence: Sequence) -> int:
        return self._layout.pages_for(sequence.total_len)

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
            self._lobby.fail(handoff.room, error, self._clock.now())
            if tell and outgoing.link is not None:
                outgoing.link.send(Lost(handoff.room, handoff.epoch, Failed.of("", error), True))
        else:
            outgoing.stream.stop = True
            self._draining.append(outgoing)
            if tell:
                self._say_lost(outgoing.link, outgoing.stream.offer, error, settled=False)
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
        early = self._lobby.call(room)
        if early is not None:
            self._say_lost(early.link, early.offer, error, settled=True)
        else:
            self._lobby.fail(room, error, self._clock.now())

    def _say_lost(self, link: Link, about: Offer | Queued, error: BatonError, *, settled: bool) -> None:
        link.send(Lost(about.room, about.epoch, Failed.of("", error), settled))

    def _say_taken(self, link: Link, about: Offer | Queued) -> None:
        error = HandoffLost(f"room {about.room} is taken by another decode worker")
        self._say_lost(link, about, error, settled=True)

    def _check_parked(self) -> None:
        parked = sum(1 for outgoing in self._rooms.values() if outgoing.first is not None or outgoing.shelved)
        if parked >= self._config.max_handoffs:
            raise Overloaded(f"{parked} prompts wait for their decode workers already (max-handoffs)")
