"""One inference request, from its bytes to the last byte of its answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from baton.base.errors import BadRequest, BatonError, Unavailable
from baton.base.timeout import REQUEST_TIMEOUT, allowance, header_line
from baton.gateway.door import Answer, Inbound
from baton.gateway.merge import Merger
from baton.gateway.metrics import Metrics
from baton.gateway.relay import Relay
from baton.gateway.replies import error_body, error_headers
from baton.router import splice
from baton.router.dispatch import Leg, LegFailed, Legs, Parcel, Pulse, Target, is_event_stream
from baton.router.registry import Worker
from baton.router.router import NOBODY, Router
from baton.router.splice import Kind
from baton.router.upstream import Fault, Header

log = logging.getLogger("baton.gateway")

PAIRED: dict[str, Kind] = {
    "/generate": "generate",
    "/v1/completions": "completions",
    "/v1/chat/completions": "other",
    "/v1/responses": "other",
    "/v1/messages": "other",
}
"""Routes that go to a pair; other POST /v1/* go to one worker."""

NOT_FORWARDED = frozenset(
    {
        b"accept-encoding",
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"keep-alive",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-override-bootstrap-host",
        b"x-override-bootstrap-port",
        b"x-override-bootstrap-room",
        REQUEST_TIMEOUT,
        b"x-request-id",
    }
)
RETRYABLE_STATUSES = frozenset({502, 503})
ERROR_BODY_SECONDS = 2.0
"""How long a failed leg may take to say what is wrong."""
GRACE_SECONDS = 5.0
"""After a deadline: until a request whose client does not even read is broken off."""


@dataclass(frozen=True, slots=True)
class InferenceOptions:
    request_timeout: float
    stall_timeout: float
    retries: int
    worker_api_key: str


class Inference:
    """Answers inference requests; owns nothing but the request in hand."""

    def __init__(self, router: Router, metrics: Metrics, options: InferenceOptions) -> None:
        self._router = router
        self._metrics = metrics
        self._options = options
        self._authorization = (
            b"authorization: Bearer " + options.worker_api_key.encode() + b"\r\n" if options.worker_api_key else b""
        )

    async def serve(self, inbound: Inbound, answer: Answer, pulse: Pulse, request_id: bytes) -> None:
        """Answer it, whatever happens. Raises `ClientGone` if there is nobody to answer."""
        loop = asyncio.get_running_loop()
        started = time.perf_counter()
        relay = Relay(answer, inbound.path, [(b"x-request-id", request_id)], self._options.stall_timeout)
        try:
            seconds = allowance(_given_timeout(inbound.headers), self._options.request_timeout)
        except BadRequest as error:
            await refuse(answer, inbound.path, error, relay.headers)
            return
        deadline = Deadline(pulse, loop, seconds)
        try:
            kind = PAIRED.get(inbound.path)
            body = splice.read(inbound.body, kind) if kind else splice.opaque(inbound.body)
            parcel = Parcel(inbound.target, self._forwarded(inbound.headers, request_id), body)
            await self._attempts(parcel, relay, pulse, deadline, paired=kind is not None)
        except BatonError as error:
            if not answer.status:
                await refuse(answer, inbound.path, error, relay.headers)
            else:
                answer.abort()
        except asyncio.CancelledError:
            if not deadline.forced:
                raise
            answer.abort()
        finally:
            deadline.cancel()
        if relay.first:
            self._metrics.first_byte(inbound.path if kind else "other", relay.first - started)

    async def _attempts(self, parcel: Parcel, relay: Relay, pulse: Pulse, deadline: Deadline, *, paired: bool) -> None:
        choose = self._router.choose if paired else self._router.choose_one
        budget = Budget(self._options.retries)
        target, avoid = choose(NOBODY), NOBODY
        while True:
            legs = self._router.send(target, deadline.sent_with(parcel), pulse)
            legs.eager = bool(parcel.body.merge)
            try:
                await legs.ready()
                lost = legs.lost
                if lost is None:
                    await self._relay(legs, parcel, relay, pulse)
                    return
                self._metrics.leg_error(lost.role, _kind(lost))
                log.info("%s: attempt lost at %r", parcel.path, lost)
                if lost.fault is not Fault.STALE:
                    avoid |= {lost.worker}
                again = _again(choose, avoid, lost) if budget.allows(lost) else None
                if again is None:
                    await _pass_on(lost, relay, pulse)
                    return
            finally:
                legs.cancel()
            target = again
            self._metrics.retries += 1

    async def _relay(self, legs: Legs, parcel: Parcel, relay: Relay, pulse: Pulse) -> None:
        answer, edit = legs.answer.call, None
        events = is_event_stream(answer)
        if parcel.body.merge and legs.receipt is not None:
            merger = await _merger(legs.receipt, parcel, pulse)
            if not events:
                await relay.whole(answer, merger.whole(await _collect(legs.answer, pulse)))
                return
            edit = merger.events
        if answer.complete and not events:
            await relay.whole(answer, answer.take())
            return
        error = await relay.stream(legs, pulse, edit)
        if error is not None:
            self._metrics.leg_error(legs.answer.role, "broken_answer")
            log.warning("%s: answer broken off: %s", parcel.path, error.message)

    def _forwarded(self, headers: Sequence[Header], request_id: bytes) -> bytes:
        """The client's header lines that concern the worker."""
        own = self._authorization
        lines = [
            b"%b: %b\r\n" % header
            for header in headers
            if header[0] not in NOT_FORWARDED and not (own and header[0] == b"authorization")
        ]
        return b"%b%bx-request-id: %b\r\n" % (b"".join(lines), own, request_id)


class Budget:
    """How often one request may be sent again. Stale connections are nobody's fault and counted apart."""

    __slots__ = ("_retries", "_stale")

    def __init__(self, retries: int) -> None:
        self._retries = retries
        self._stale = 2

    def allows(self, lost: Leg) -> bool:
        """Uses up one if it does."""
        if lost.fault is Fault.STALE:
            self._stale -= 1
            return self._stale >= 0
        if lost.fault is None and lost.call.status not in RETRYABLE_STATUSES:
            return False
        self._retries -= 1
        return self._retries >= 0


class Deadline:
    """The end of a request: first told to whoever waits for a worker; then, if the client does not read, by force."""

    __slots__ = ("_loop", "_message", "_pulse", "_task", "_timer", "_until", "forced")

    def __init__(self, pulse: Pulse, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._pulse, self._loop, self._task = pulse, loop, asyncio.current_task()
        self.forced = False
        """The task was cancelled by us."""
        self._message = f"the request was not finished within {seconds:g} s"
        self._until = loop.time() + seconds
        self._timer = loop.call_at(self._until, self._expire)

    def sent_with(self, parcel: Parcel) -> Parcel:
        """The worker hears how long it has: a gateway that is lost cannot cancel."""
        left = header_line(self._until - self._loop.time())
        return Parcel(parcel.path, parcel.headers + left, parcel.body)

    def cancel(self) -> None:
        self._timer.cancel()

    def _expire(self) -> None:
        self._pulse.expire(self._message)
        if self._task is not None:
            self._timer = self._loop.call_later(GRACE_SECONDS, self._force, self._task)

    def _force(self, task: asyncio.Task[None]) -> None:
        self.forced = True
        task.cancel()


async def refuse(
    answer: Answer,
    path: str,
    error: BatonError,
    headers: list[Header],
    last: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """An error in the gateway's own name. `last` is done before the end of the answer, but after its last byte."""
    body = error_body(path, error)
    length = (b"content-length", b"%d" % len(body))
    await answer.start(error.status, [*error_headers(error), length, *headers])
    if last is not None:
        await answer.write(body, more=True)
        await last()
        body = b""
    await answer.write(body, more=False)


async def _pass_on(lost: Leg, relay: Relay, pulse: Pulse) -> None:
    """Tell the client what a worker said; raises `LegFailed` if it said nothing."""
    call = lost.call
    if lost.fault is not None:
        raise LegFailed.of(lost)
    loop = asyncio.get_running_loop()
    patience = loop.call_later(ERROR_BODY_SECONDS, pulse.expire, "a worker's error message did not end")
    try:
        while not call.done and not call.paused:
            await pulse.wait()
    finally:
        patience.cancel()
    if call.failure is not None:
        raise LegFailed.of(lost)
    await relay.whole(call, call.take())


async def _merger(receipt: Leg, parcel: Parcel, pulse: Pulse) -> Merger:
    """Waits for the prefill worker's whole reply."""
    reply, call = await _collect(receipt, pulse), receipt.call
    if call.status >= 400:
        raise LegFailed(f"prefill worker {receipt.worker.url}: status {call.status} after decode had begun")
    return Merger(parcel.body.merge, reply, stream=is_event_stream(call))


async def _collect(leg: Leg, pulse: Pulse) -> bytes:
    """The whole body of a leg, however large. Raises `LegFailed`."""
    parts = []
    while not leg.call.done:
        parts.append(leg.call.take())
        await pulse.wait()
    parts.append(leg.call.take())
    if leg.call.failure is not None:
        raise LegFailed.of(leg)
    return b"".join(parts)


def _again(choose: Callable[[frozenset[Worker]], Target], avoid: frozenset[Worker], lost: Leg) -> Target | None:
    """Where to try again, None if there is nowhere. A lost hand-off (502) may work between the same two."""
    for shunned in (avoid, NOBODY) if lost.fault is None and lost.call.status == 502 else (avoid,):
        try:
            return choose(shunned)
        except Unavailable:
            continue
    return None


def _given_timeout(headers: Sequence[Header]) -> bytes | None:
    """What the client allows itself."""
    return next((value for name, value in headers if name == REQUEST_TIMEOUT), None)


def _kind(lost: Leg) -> str:
    return lost.fault.value if lost.fault is not None else f"status_{lost.call.status // 100}xx"
