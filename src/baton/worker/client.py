"""The front's view of its engine: many requests over one channel, and the truth about the engine's life.

start ──▶ Inbox ◀── Tokens, Failed        one inbox per HTTP request, one id per sequence
probe, flush ──▶ future ◀── Load, Flushed
the channel closes ──▶ every open sequence fails with a retryable 503, at once; the engine may come back
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.base.clock import Clock
from baton.base.errors import BatonError, Unavailable
from baton.base.messages import Abort, Failed, Flush, Flushed, Generate, Load, Message, Probe, Ready, ToFront, Tokens
from baton.worker.channel import FrontEnd

log = logging.getLogger("baton.front")

FRESH = 2.0
"""Seconds the engine's last word counts as a sign of life."""
MAX_BACKLOG = 16384
"""Messages a request may leave unread (a client that does not read); then it is given up."""


class ClientGone(Exception):
    """The HTTP client hung up, or reads too slowly."""


class Inbox:
    """What the engine says to one HTTP request. `close` is its one release line: it aborts whatever still runs."""

    __slots__ = ("_client", "_gone", "_messages", "_open", "_waiter")

    def __init__(self, client: EngineClient, ids: Sequence[str]) -> None:
        self._client = client
        self._open = set(ids)
        self._messages: list[Tokens | Failed] = []
        self._waiter: asyncio.Future[None] | None = None
        self._gone = False

    async def take(self) -> list[Tokens | Failed]:
        """All messages that are there; waits for the first. Raises `ClientGone` after `hang_up`."""
        while not self._messages:
            if self._gone:
                break
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._gone:
            raise ClientGone
        messages, self._messages = self._messages, []
        return messages

    def put(self, message: Tokens | Failed) -> None:
        if isinstance(message, Failed) or message.finish is not None:
            self._open.discard(message.id)
        self._messages.append(message)
        if len(self._messages) > MAX_BACKLOG:
            self._messages.clear()
            self.close()
            self._gone = True
        self._wake()

    def hang_up(self) -> None:
        """The client is gone: whoever waits learns it now."""
        self._gone = True
        self._wake()

    def stop(self, id: str) -> None:
        """The front has seen enough of this sequence."""
        if id in self._open:
            self._open.discard(id)
            self._client.forget(id, abort=True)

    def close(self) -> None:
        for id in list(self._open):
            self.stop(id)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(frozen=True, slots=True)
class Heard:
    """A `Load` and when it came."""

    load: Load
    at: float


class EngineClient:
    """One engine at a time; `connection` is the protocol factory of the Unix socket it connects to."""

    def __init__(self, clock: Clock, on_ready: Callable[[Ready], None]) -> None:
        self._clock = clock
        self._on_ready = on_ready
        self._end: FrontEnd | None = None
        self._inboxes: dict[str, Inbox] = {}
        self._leaving: set[str] = set()
        """Aborted by us; the engine's last word on them is on its way, and must not be taken for another request's."""
        self._answers: dict[str, asyncio.Future[Load | Flushed]] = {}
        self._numbers = itertools.count()
        self._last_word = float("-inf")
        self.ready: Ready | None = None
        """Of the engine that is, or was, connected."""
        self.heard: Heard | None = None
        self.before: Heard | None = None
        """The load before `heard`, for rates."""

    # --- the engine's side -----------------------------------------------------------------------------------

    def connection(self) -> FrontEnd:
        return FrontEnd(self._hear, self._lost)

    @property
    def connected(self) -> bool:
        """The engine has said it is ready, and has not gone since."""
        return self._end is not None

    @property
    def open_count(self) -> int:
        return len(self._inboxes)

    def close(self, reason: BatonError) -> None:
        """Fail what is open and leave the engine, which then ends."""
        end, self._end = self._end, None
        self.fail_all(reason)
        if end is not None:
            end.close()

    def fail_all(self, reason: BatonError) -> None:
        """Every open request ends with this error."""
        inboxes, self._inboxes = self._inboxes, {}
        if self._end is None:
            self._leaving.clear()
        for id, inbox in inboxes.items():
            if self._end is not None:
                self._abort(self._end, id)
            inbox.put(Failed.of(id, reason))
        answers, self._answers = self._answers, {}
        for answer in answers.values():
            if not answer.done():
                answer.set_exception(reason)

    def _hear(self, end: FrontEnd, message: ToFront) -> None:
        self._last_word = self._clock.now()
        match message:
            case Tokens(id=id) | Failed(id=id):
                inbox = self._inboxes.get(id)
                last = isinstance(message, Failed) or message.finish is not None
                if inbox is None:
                    if last:
                        self._leaving.discard(id)
                    return
                if last:
                    del self._inboxes[id]
                inbox.put(message)
            case Load(id=id):
                self.before, self.heard = self.heard, Heard(message, self._last_word)
                self._answer(id, message)
            case Flushed(id=id):
                self._answer(id, message)
            case Ready():
                self._welcome(end, message)

    def _welcome(self, end: FrontEnd, ready: Ready) -> None:
        if self._end is not None:
            log.warning("a new engine (%s) takes over from one that is still connected", ready.instance)
            self.close(Unavailable("the engine was replaced; try again"))
        self._end = end
        self.ready = ready
        self.heard = self.before = None
        log.info("engine %s is ready: %s on %s", ready.instance, ready.model_path, ready.device)
        self._on_ready(ready)

    def _lost(self, end: FrontEnd) -> None:
        if end is not self._end:
            return
        log.error("the engine is gone; %d sequences fail", len(self._inboxes))
        self._end = None
        self.fail_all(Unavailable("the engine died while it worked on this request; try again"))

    def _answer(self, id: str, message: Load | Flushed) -> None:
        answer = self._answers.pop(id, None)
        if answer is not None and not answer.done():
            answer.set_result(message)

    # --- the requests' side ----------------------------------------------------------------------------------

    def unique(self, id: str) -> str:
        """The id itself if it is free, else with a mark behind it: ids of clients may repeat, as those of a gateway's
        second attempts do."""
        taken = id in self._inboxes or id in self._leaving
        return f"{id}~{next(self._numbers)}" if taken else id

    def start(self, requests: Sequence[Generate]) -> Inbox:
        """Send the sequences of one HTTP request. Raises `Unavailable`."""
        end = self.require()
        inbox = Inbox(self, [request.id for request in requests])
        for request in requests:
            self._inboxes[request.id] = inbox
            end.send(request)
        return inbox

    def forget(self, id: str, *, abort: bool) -> None:
        self._inboxes.pop(id, None)
        if abort and self._end is not None:
            self._abort(self._end, id)

    def abort(self, prefix: str) -> int:
        """Abort every open sequence whose id begins with `prefix` (`""`: all); their requests answer with what they
        have. Returns how many."""
        ids = [id for id in self._inboxes if id.startswith(prefix)]
        if self._end is not None:
            for id in ids:
                self._end.send(Abort(id))
        return len(ids)

    def _abort(self, end: FrontEnd, id: str) -> None:
        self._leaving.add(id)
        end.send(Abort(id))

    async def probe(self, timeout: float) -> Load:
        """Ask the engine how it is. Raises `Unavailable` if it does not answer in `timeout` seconds."""
        load = await self._ask(Probe, timeout)
        assert isinstance(load, Load)
        return load

    async def flush(self, timeout: float) -> Flushed:
        flushed = await self._ask(Flush, timeout)
        assert isinstance(flushed, Flushed)
        return flushed

    async def alive(self, timeout: float) -> bool:
        """Has the engine said anything lately, or does it now? Costs nothing while it talks anyway."""
        if not self.connected:
            return False
        if self._clock.now() - self._last_word < FRESH:
            return True
        try:
            await self.probe(timeout)
        except BatonError:
            return False
        return True

    async def load(self, timeout: float) -> Load | None:
        """The engine's load now; the last known one if it is busy computing, None if there is none."""
        try:
            return await self.probe(timeout)
        except BatonError:
            return self.heard.load if self.heard is not None and self.connected else None

    async def _ask(self, question: Callable[[str], Message], timeout: float) -> Load | Flushed:
        end = self.require()
        id = f"front-{next(self._numbers)}"
        answer: asyncio.Future[Load | Flushed] = asyncio.get_running_loop().create_future()
        self._answers[id] = answer
        end.send(question(id))
        try:
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError as error:
            raise Unavailable(f"the engine has not answered for {timeout:g} s") from error
        finally:
            self._answers.pop(id, None)

    def require(self) -> FrontEnd:
        """The engine's end. Raises `Unavailable` if there is none."""
        if self._end is None:
            gone = "the engine is not there: it died and is being restarted" if self.ready else "the engine is starting"
            raise Unavailable(gone)
        return self._end
