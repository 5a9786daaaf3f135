"""One inference request: what it asks for, whether it may start, and its way through the workers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

from baton.base.errors import BadRequest, BatonError
from baton.base.timeout import REQUEST_TIMEOUT, allowance
from baton.gateway import hops, journal
from baton.gateway.admission import Claim
from baton.gateway.deadlines import Deadline
from baton.gateway.door import Answer, Inbound
from baton.gateway.journey import Journey, Patience
from baton.gateway.keys import Identity
from baton.gateway.metrics import Metrics
from baton.gateway.relay import EXPLAIN, Relay
from baton.gateway.replies import refuse
from baton.gateway.timeline import Timeline
from baton.gateway.trace import TRACEPARENT, Trace
from baton.gateway.turnstile import Pass, Turnstile
from baton.router import splice
from baton.router.ask import Ask
from baton.router.call import Header
from baton.router.health import RetryBudget
from baton.router.legs import Pulse
from baton.router.router import Router
from baton.router.splice import Body, Kind
from baton.router.target import Parcel
from baton.router.wheel import Wheel

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
        b"x-baton-explain",
        b"x-baton-journal",
        b"x-override-bootstrap-host",
        b"x-override-bootstrap-port",
        b"x-override-bootstrap-room",
        REQUEST_TIMEOUT,
        b"x-request-id",
    }
)
KEYS = (b"x-baton-key", b"x-smg-routing-key", b"x-session-id")
"""Headers that hold a sticky key, the first that is there."""


@dataclass(frozen=True, slots=True)
class InferenceOptions:
    request_timeout: float
    patience: Patience
    worker_api_key: str


class Inference:
    """Answers inference requests; owns nothing but the request in hand."""

    def __init__(self, router: Router, turnstile: Turnstile, metrics: Metrics, options: InferenceOptions) -> None:
        self._router = router
        self._turnstile = turnstile
        self._metrics = metrics
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._wheel = Wheel(self._loop)
        self._budget = RetryBudget()
        self._authorization = (
            b"authorization: Bearer " + options.worker_api_key.encode() + b"\r\n" if options.worker_api_key else b""
        )

    def close(self) -> None:
        self._wheel.close()

    async def serve(
        self, inbound: Inbound, answer: Answer, pulse: Pulse, timeline: Timeline, identity: Identity
    ) -> None:
        """Answer it, whatever happens. Raises `ClientGone` if there is nobody to answer."""
        kind = PAIRED.get(inbound.path)
        request_id = timeline.id.encode("ascii")
        own: list[Header] = [(b"x-request-id", request_id)]
        relay = Relay(answer, inbound.path, own, timeline, self._loop)
        relay.explained = inbound.header(EXPLAIN) == b"1"
        try:
            seconds = allowance(inbound.header(REQUEST_TIMEOUT), self._options.request_timeout)
            body = splice.read(inbound.body, kind) if kind else splice.opaque(inbound.body)
        except BadRequest as error:
            timeline.error = error.message
            refuse(answer, inbound.path, error, own)
            return
        timeline.stream, timeline.model, timeline.prompt_tokens = body.stream, body.model, body.prompt_tokens
        timeline.sequences = body.samples or 1
        self._budget.earn()
        deadline = Deadline(pulse, self._wheel, seconds)
        passed: Pass | None = None
        try:
            passed = await self._turnstile.enter(_claim(body, identity, deadline), identity, pulse)
            timeline.admitted = monotonic()
            own += passed.headers
            headers = self._forwarded(inbound.headers, request_id, timeline.trace, journaled=body.stream)
            parcel = Parcel(inbound.target, headers, body)
            journey = Journey(
                self._router,
                self._wheel,
                self._metrics,
                self._budget,
                self._options.patience,
                parcel,
                _ask(inbound, body),
                relay,
                pulse,
                deadline,
                timeline,
                passed,
                paired=kind is not None,
            )
            await journey.run()
        except BatonError as error:
            timeline.error = error.message
            if relay.started:
                relay.broken(error)
            else:
                refuse(answer, inbound.path, error, own)
        except asyncio.CancelledError:
            if not deadline.forced:
                raise
            answer.abort()
        finally:
            deadline.cancel()
            if passed is not None:
                tokens = 0 if answer.status >= 400 else relay.output_tokens  # what failed costs its key nothing
                timeline.output_tokens = tokens or 0
                passed.leave(tokens)

    def _forwarded(
        self, headers: Sequence[Header], request_id: bytes, trace: Trace | None, *, journaled: bool
    ) -> bytes:
        """The client's header lines that concern the worker, and ours."""
        own, dropped = self._authorization, hops.dropped(NOT_FORWARDED, headers)
        lines = [
            b"%b: %b\r\n" % header
            for header in headers
            if header[0] not in dropped and not (own and header[0] == b"authorization")
        ]
        lines.append(own)
        if trace is not None:
            lines = [line for line in lines if not line.startswith(TRACEPARENT + b":")]
            lines.append(trace.header)
        if journaled:
            lines.append(journal.ASK)
        lines.append(b"x-request-id: %b\r\n" % request_id)
        return b"".join(lines)


def _claim(body: Body, identity: Identity, deadline: Deadline) -> Claim:
    return Claim(
        body.prompt_tokens,
        body.samples or 1,
        body.max_tokens,
        identity.name,
        identity.weight,
        min(body.priority, identity.priority_max),
        deadline.until,
    )


def _ask(inbound: Inbound, body: Body) -> Ask:
    key = b""
    for name, value in inbound.headers:
        if name in KEYS:
            key = value
            break
    return Ask(body.prompt_tokens, body.max_tokens, body.prompt, key)
