"""Attempts after the first: streams that go on on another worker, and workers that are asked again.

The workers are mocks that speak as our own do: every piece of a stream is signed with its tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest

from baton.gateway.journey import RESUMES
from baton.router.registry import Description
from tests.gateway.stack import CHAT, RECEIPT, Stack, stack
from tests.router.mocks import Behaviour, Exchange, Mock, hang, run, until, whole

OURS = {"instance": "1", "served_model_name": "m"}
DONE = b"data: [DONE]\n\n"
STREAM = {"stream": True, "n": 2}


def piece(number: int, note: str) -> bytes:
    return b'data: {"id":"it","created":7,"n":%d}\nid: %b\n\n' % (number, note.encode())


def shown(number: int) -> bytes:
    return b'data: {"id":"it","created":7,"n":%d}\n\n' % number


def begin(exchange: Exchange) -> None:
    exchange.raw(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-baton-seed: 4711\r\n"
        b"transfer-encoding: chunked\r\n\r\n"
    )


def streaming(*pieces: bytes, end: str = "whole") -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        begin(exchange)
        for data in pieces:
            exchange.piece(data)
        await asyncio.sleep(0.02)
        if end == "reset":
            exchange.reset()
        elif end == "whole":
            exchange.end_stream()
        else:
            await exchange.gone.wait()

    return behave


FIRST = (piece(1, "0:5;1:6"), piece(2, "0:7,8;1:9!"))
REST = streaming(piece(3, "0:10!"), b"data: [DONE]\nid: \n\n")
ERROR = b'data: {"error":{"message":"the engine died","type":"server_error","param":null,"code":"unavailable"}}\n\n'


async def dripping(exchange: Exchange) -> None:
    """Always a byte, never an event."""
    begin(exchange)
    for data in FIRST:
        exchange.piece(data)
    with contextlib.suppress(TimeoutError):
        while not exchange.gone.is_set():
            exchange.piece(b":")
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def two(first: Behaviour, second: Behaviour, **options: Any) -> AsyncIterator[tuple[Stack, Mock]]:
    """Two decode workers: the first request meets with `first`, wherever it goes, and all others with `second`."""
    turns = itertools.chain([first], itertools.repeat(second))

    async def behave(exchange: Exchange) -> None:
        await next(turns)(exchange)

    usual = {
        "request_timeout": 20.0,
        "worker_wait": 5.0,
        "breaker_failures": 99,
        "stage_timeout": 0.4,
        "stall_timeout": 0.4,
        "split": "always",
    }
    async with Mock(behave, OURS) as spare, stack(RECEIPT, behave, ready=False, **{**usual, **options}) as s:
        s.prefill.info = s.decode.info = OURS
        added = s.gateway.router.add(spare.url, Description("decode"))
        await until(lambda: added.healthy and all(w.healthy for w in s.gateway.router.registry.workers))
        yield s, spare
        await s.settled()


@pytest.mark.parametrize(
    "broken",
    [
        streaming(*FIRST, end="reset"),
        streaming(*FIRST, piece(3, "0:10")[:-3], end="reset"),
        streaming(*FIRST, end="whole"),
        streaming(*FIRST, ERROR + DONE),
        streaming(*FIRST, end="never"),
        dripping,
    ],
    ids=["reset", "in a piece", "no end", "error event", "stall", "drip"],
)
def test_a_stream_goes_on_elsewhere(broken: Behaviour) -> None:
    async def main() -> None:
        async with two(broken, REST) as (s, spare):
            reply = await s.post(json={**STREAM, "bootstrap_room": 3})
            assert reply.content == shown(1) + shown(2) + shown(3) + DONE
            [again] = [e.json["baton_resume"] for e in (*s.decode.seen, *spare.seen) if "baton_resume" in e.json]
            outputs = [{"tokens": [5, 7, 8], "finished": False}, {"tokens": [6, 9], "finished": True}]
            assert again == {"outputs": outputs, "id": "it", "created": 7, "seed": 4711}

    run(main())


@pytest.mark.parametrize("end", ["reset", "never"])
def test_what_has_said_its_end_is_over_however_the_connection_ends(end: str) -> None:
    async def main() -> None:
        async with two(streaming(*FIRST, b"data: [DONE]\nid: \n\n", end=end), REST) as (s, spare):
            reply = await s.post(json=STREAM)
            assert reply.content == shown(1) + shown(2) + DONE
            assert len(s.decode.seen) + len(spare.seen) == 1

    run(main())


@pytest.mark.parametrize(
    ("second", "attempts"),
    [(whole({"error": "no"}, 400), 1), (whole({"a": "b"}), 1), (streaming(end="reset"), RESUMES)],
    ids=["refused", "no stream", "always broken"],
)
def test_what_cannot_go_on_ends_with_an_error_event(second: Behaviour, attempts: int) -> None:
    async def main() -> None:
        async with two(streaming(*FIRST, end="reset"), second) as (s, spare):
            reply = await s.post(json=STREAM)
            assert reply.content.startswith(shown(1) + shown(2) + b'data: {"error":')
            assert reply.content.endswith(DONE)
            assert reply.content.count(DONE) == 1
            again = [e for e in (*s.decode.seen, *spare.seen) if "baton_resume" in e.json]
            assert len(again) == attempts

    run(main())


@pytest.mark.parametrize("body", [{"messages": []}, {"messages": [], "stream": True}], ids=["whole", "stream"])
def test_a_decode_worker_that_never_answers_is_given_up(body: dict[str, Any]) -> None:
    async def main() -> None:
        answer = REST if "stream" in body else whole({"ok": 1})
        async with two(hang, answer) as (s, _):
            s.gateway.router.planner.speeds.decoded(1000, 0.01, 0.0)  # so fast that a whole answer is soon overdue
            reply = await s.post(json={**body, "max_tokens": 4})
            assert reply.status_code == 200
            assert s.gateway.metrics.retries == 1

    run(main())


def test_the_only_pair_is_asked_again_when_it_has_passed_a_check() -> None:
    """Its worker breaks off, stays away for a while, and comes back at the same address."""

    async def broken(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{")
        await asyncio.sleep(0.02)
        exchange.reset()

    turns = iter([broken])

    async def decode(exchange: Exchange) -> None:
        behave = next(turns, None)
        await (behave or whole({"ok": 1}))(exchange)

    async def main() -> None:
        async with stack(RECEIPT, decode, worker_wait=5.0) as s:
            s.decode.health = 503
            asked = asyncio.create_task(s.post(CHAT))
            worker = s.gateway.router.registry.find(s.decode.url)
            await until(lambda: not worker.healthy)
            assert len(s.decode.seen) == 1
            s.decode.health = 200
            assert (await asked).json() == {"ok": 1}
            assert len(s.decode.seen) == 2
            await s.settled()

    run(main())
