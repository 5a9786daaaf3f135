"""The routes that generate: one handler for all dialects, streamed or not.

    read the body ─ parse (dialect) ─ start (engine) ─ take tokens ─ write
                                                          │
         the status line goes out with the first token ───┘  so that whatever fails before is a real HTTP status

A client that hangs up is noticed at once (its `receive` says so), and closing the inbox aborts the engine's side: in
every way out of the handler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace
from starlette.types import Receive, Scope, Send

from baton.api.dialect import Dialect, Writer, error_events
from baton.api.job import Job, ModelContext
from baton.api.journal import Journal
from baton.api.output import Output
from baton.api.resume import replay
from baton.base.errors import BatonError
from baton.base.messages import Failed, Tokens
from baton.base.timeout import REQUEST_TIMEOUT, allowance
from baton.worker.client import ClientGone, Inbox
from baton.worker.http import Hangup, Header, check_json, header, read_body, reply
from baton.worker.state import FrontState
from baton.worker.timing import server_timing

EVENT_STREAM: list[Header] = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
JOURNAL = b"x-baton-journal"
"""A request's header, `1`: say which tokens the stream's bytes stand for (`baton.api.journal`)."""
SEED = b"x-baton-seed"
"""The answer's, then: what unseeded samples' seeds come from."""
LONG_BODY = 16 * 1024
"""Bytes; longer requests are parsed and tokenised in a thread, so that streams go on meanwhile."""


@dataclass(slots=True, eq=False)
class Exchange:
    """One request on its way."""

    job: Job
    writer: Writer
    inbox: Inbox
    outputs: list[Output]
    by_id: dict[str, Output]
    headers: list[Header]
    """The client's request id, given back, and what belongs to a journal."""
    received: float
    last: list[float]
    """Per output: when its latest token came; 0.0 before the first."""
    unfinished: int
    due: bytes
    """Events that were not shown where the stream broke off."""
    journal: Journal | None
    sending_since: float = 0.0
    """When a write began that has not ended; 0.0: none. A client that does not read is cut by this."""
    task: asyncio.Task[object] | None = None
    cut: bool = False
    """The task was cancelled because the client does not read."""


class GenerateRoute:
    def __init__(self, state: FrontState, dialect: Dialect) -> None:
        self._state = state
        self._dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state, received = self._state, self._state.clock.now()
        outcome = "disconnect"
        state.metrics.open_requests += 1
        try:
            outcome = await self._serve(scope, receive, send, received)
        except BatonError as error:
            outcome = error.code
            raise
        except (ClientGone, Hangup):
            return
        finally:
            state.metrics.open_requests -= 1
            state.metrics.requests[self._dialect.name, outcome] += 1

    async def _serve(self, scope: Scope, receive: Receive, send: Send, received: float) -> str:
        check_json(scope)
        deadline = received + allowance(header(scope, REQUEST_TIMEOUT), self._state.worker.request_timeout)
        body = await read_body(scope, receive, self._state.max_body)
        journal = header(scope, JOURNAL) == b"1"
        exchange = await self._begin(body, header(scope, b"x-request-id"), received, deadline, journal)
        watcher = asyncio.ensure_future(receive())  # the body is read: what comes now is the hang-up
        watcher.add_done_callback(lambda _: exchange.inbox.hang_up())
        self._state.exchanges.add(exchange)
        try:
            if exchange.job.stream:
                return await self._stream(exchange, send)
            return await self._whole(exchange, send)
        except asyncio.CancelledError as error:
            if not exchange.cut:
                raise
            raise ClientGone from error
        finally:
            self._state.exchanges.discard(exchange)
            exchange.inbox.close()
            watcher.cancel()
            self._account(exchange)

    async def _begin(
        self, body: bytes, given: bytes | None, received: float, deadline: float, journal: bool
    ) -> Exchange:
        context = self._state.context
        job, writer = await self._parse(body, context, given.decode("latin-1") if given else None)
        headers = [(b"x-request-id", given)] if given else []
        client, n = self._state.client, job.n
        total = len(job.prompts) * n
        outputs = [
            Output(k, job.rids[k // n], job.prompts[k // n], job.plans[k // n], context.tokenizer) for k in range(total)
        ]
        due = replay(job, outputs, writer, context)
        journal = journal and job.stream and job.continuable
        if journal:
            headers.append((SEED, b"%d" % job.seed))
        ids = [client.unique(o.rid if total == 1 else f"{o.rid}#{o.index}") for o in outputs]
        sequences = zip(outputs, job.generates(ids, context), strict=True)
        inbox = client.start([replace(one, deadline=deadline) for output, one in sequences if not output.ended()])
        return Exchange(
            job,
            writer,
            inbox,
            outputs,
            dict(zip(ids, outputs, strict=True)),
            headers,
            received,
            [0.0] * total,
            sum(not output.ended() for output in outputs),
            due,
            Journal(outputs, job.resume) if journal else None,
            task=asyncio.current_task(),
        )

    async def _parse(self, body: bytes, context: ModelContext, rid: str | None) -> tuple[Job, Writer]:
        if len(body) > LONG_BODY:
            loop, thread = asyncio.get_running_loop(), self._state.thread
            return await loop.run_in_executor(thread, self._dialect.parse, body, context, rid)
        return self._dialect.parse(body, context, rid)

    async def _whole(self, exchange: Exchange, send: Send) -> str:
        while exchange.unfinished:
            for message in await exchange.inbox.take():
                self._take(exchange, message)
        await self._push(exchange, send, exchange.writer.body(exchange.outputs))
        return _outcome(exchange.outputs)

    async def _push(self, exchange: Exchange, send: Send, body: bytes) -> None:
        exchange.sending_since = self._state.clock.now()
        await reply(send, 200, body, headers=[*exchange.headers, *_timing(exchange)])
        exchange.sending_since = 0.0

    async def _stream(self, exchange: Exchange, send: Send) -> str:
        started, more, events = False, True, exchange.due
        try:
            while more:
                if exchange.unfinished:
                    events += self._events(exchange, await exchange.inbox.take())
                if not started:
                    headers = [*EVENT_STREAM, *exchange.headers, *_timing(exchange)]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    started = True
                more = exchange.unfinished > 0
                if not more:
                    events += exchange.writer.end(exchange.outputs)
                if events:
                    piece = exchange.journal.signed(events) if exchange.journal is not None else events
                    exchange.sending_since = self._state.clock.now()
                    await send({"type": "http.response.body", "body": piece, "more_body": more})
                    exchange.sending_since, events = 0.0, b""
        except BatonError as error:
            if not started:
                raise
            await send({"type": "http.response.body", "body": error_events(error), "more_body": False})
            return error.code
        return _outcome(exchange.outputs)

    def _events(self, exchange: Exchange, messages: Sequence[Tokens | Failed]) -> bytes:
        """The events for these messages: what came together for one output goes out as one event."""
        if len(messages) == 1:
            output, text = self._take(exchange, messages[0])
            return exchange.writer.delta(output, text)
        texts: dict[int, str] = {}
        for message in messages:
            output, text = self._take(exchange, message)
            texts[output.index] = texts.get(output.index, "") + text
        return b"".join(exchange.writer.delta(exchange.outputs[k], text) for k, text in texts.items())

    def _take(self, exchange: Exchange, message: Tokens | Failed) -> tuple[Output, str]:
        """Raises the error of a sequence that failed; one that was aborted on request only ends."""
        output = exchange.by_id[message.id]
        if output.ended():
            return output, ""
        if isinstance(message, Tokens):
            text = output.take(message)
            self._time(exchange, output, len(message.tokens))
            if output.stopped_by_text:
                exchange.inbox.stop(message.id)
        elif message.code == "cancelled":
            text = output.abort(message.message)
        else:
            raise message.error()
        if output.ended():
            exchange.unfinished -= 1
        return output, text

    def _time(self, exchange: Exchange, output: Output, count: int) -> None:
        now, before = self._state.clock.now(), exchange.last[output.index]
        exchange.last[output.index] = now
        if before:
            self._state.metrics.between_tokens.observe((now - before) / max(count, 1), count)
        else:
            self._state.metrics.first_token.observe(now - exchange.received)

    def _account(self, exchange: Exchange) -> None:
        now = self._state.clock.now()
        for output in exchange.outputs:
            if output.finish is not None:
                self._state.metrics.end_to_end.observe(now - exchange.received)
            self._state.metrics.finished(output.usage, output.timeline)


def _timing(exchange: Exchange) -> list[Header]:
    return server_timing(output.timeline for output in exchange.outputs)


def _outcome(outputs: Sequence[Output]) -> str:
    return outputs[0].finish or "error"
