"""The HTTP client against servers that do what they like."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

from baton.base.errors import ConfigError
from baton.router.call import HIGH_WATER, Call, Failure, Fault
from baton.router.fetch import FetchFailed, Silence, fetch, request_bytes
from baton.router.origin import Origin
from baton.router.upstream import Pool
from tests.router.mocks import (
    Behaviour,
    Exchange,
    Mock,
    events,
    garbage,
    hang,
    reset,
    run,
    stream_then_hang,
    until,
    whole,
)


def with_pool(behave: Behaviour, check: Callable[[Mock, Pool], object], connect_timeout: float = 2.0) -> None:
    async def main() -> None:
        async with Mock(behave) as mock:
            pool = Pool(Origin.parse(mock.url), connect_timeout=connect_timeout)
            try:
                await check(mock, pool)  # type: ignore[misc]
            finally:
                await pool.close()
                assert pool.open_connections == 0

    run(main())


def start(pool: Pool, body: bytes = b"{}") -> tuple[Call, asyncio.Event]:
    news = asyncio.Event()
    return pool.call(request_bytes(pool.origin, "POST", "/x", body=body), lambda _: news.set()), news


async def finish(call: Call, news: asyncio.Event) -> bytes:
    """Everything that comes, with an end."""
    parts = [call.take()]
    while not call.done:
        await news.wait()
        news.clear()
        parts.append(call.take())
    return b"".join([*parts, call.take()])


def test_keep_alive_reuses_one_connection() -> None:
    async def check(mock: Mock, pool: Pool) -> None:
        for _ in range(20):
            call, news = start(pool)
            assert await finish(call, news) == b'{"ok": 1}'
            assert call.status == 200
        assert mock.accepted == pool.opened == 1

    with_pool(whole({"ok": 1}), check)


def test_as_many_connections_as_calls_and_all_are_reused() -> None:
    async def check(mock: Mock, pool: Pool) -> None:
        for _ in range(3):
            calls = [start(pool) for _ in range(10)]
            for call, news in calls:
                await finish(call, news)
        assert mock.accepted == 10

    with_pool(whole({}, delay=0.01), check)


def test_chunks_in_odd_pieces_are_joined() -> None:
    text = bytes(range(256)) * 40

    async def behave(exchange: Exchange) -> None:
        wire = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        for i in range(0, len(text), 997):
            piece = text[i : i + 997]
            wire += b"%X;ext=1\r\n%b\r\n" % (len(piece), piece)
        wire += b"0\r\nx-trailer: 1\r\n\r\n"
        for i in range(0, len(wire), 13):
            exchange.raw(wire[i : i + 13])
            if i % 7 == 0:
                await asyncio.sleep(0)

    async def check(mock: Mock, pool: Pool) -> None:
        for _ in range(2):
            assert await finish(*start(pool)) == text
        assert mock.accepted == 1

    with_pool(behave, check)


@pytest.mark.parametrize(
    ("behave", "fault"), [(reset, Fault.RESET), (garbage, Fault.GARBAGE)], ids=["reset", "garbage"]
)
def test_what_went_wrong_is_named(behave: Behaviour, fault: Fault) -> None:
    async def check(mock: Mock, pool: Pool) -> None:
        call, news = start(pool)
        await finish(call, news)
        assert call.failure is not None
        assert call.failure.fault is fault
        assert not call.complete

    with_pool(behave, check)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-le",
    ],
)
def test_a_truncated_reply_is_never_taken_for_a_whole_one(head: bytes) -> None:
    async def behave(exchange: Exchange) -> None:
        exchange.raw(head)
        exchange.transport.close()

    async def check(mock: Mock, pool: Pool) -> None:
        call, news = start(pool)
        await finish(call, news)
        assert not call.complete
        assert call.failure is not None
        assert call.failure.fault is Fault.RESET

    with_pool(behave, check)


def test_a_reply_that_ends_with_the_connection() -> None:
    async def behave(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.0 200 OK\r\n\r\nuntil the end")
        exchange.transport.close()

    async def check(mock: Mock, pool: Pool) -> None:
        call, news = start(pool)
        assert await finish(call, news) == b"until the end"
        assert call.complete
        await finish(*start(pool))
        assert mock.accepted == 2

    with_pool(behave, check)


def test_informational_heads_are_not_the_reply() -> None:
    async def behave(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")
        exchange.whole({"a": 1}, 201)

    async def check(mock: Mock, pool: Pool) -> None:
        call, news = start(pool)
        assert await finish(call, news) == b'{"a": 1}'
        assert call.status == 201
        assert call.header(b"link") is None

    with_pool(behave, check)


def test_bytes_after_the_reply_spoil_the_connection_not_the_next_reply() -> None:
    async def behave(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")

    async def check(mock: Mock, pool: Pool) -> None:
        for _ in range(3):
            assert await finish(*start(pool)) == b"ok"
        assert mock.accepted == 3

    with_pool(behave, check)


def test_an_endless_head_is_cut() -> None:
    async def behave(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 200 OK\r\n")
        while not exchange.gone.is_set():
            exchange.raw(b"x-a: " + b"b" * 4000 + b"\r\n")
            await asyncio.sleep(0)

    async def check(mock: Mock, pool: Pool) -> None:
        call, news = start(pool)
        await finish(call, news)
        assert call.failure is not None
        assert call.failure.fault is Fault.GARBAGE

    with_pool(behave, check)


def test_a_slow_reader_stops_the_worker() -> None:
    sent = 0

    async def behave(exchange: Exchange) -> None:
        nonlocal sent
        exchange.begin_stream()
        for _ in range(400):
            exchange.piece(b"x" * 65536)
            sent += 1
            while exchange.transport.get_write_buffer_size() and not exchange.gone.is_set():
                await asyncio.sleep(0.001)
        exchange.end_stream()

    async def check(mock: Mock, pool: Pool) -> None:
        call, news = start(pool)
        await until(lambda: call.paused)
        await asyncio.sleep(0.1)
        assert call.held < HIGH_WATER + 2**19
        assert sent < 400
        assert len(await finish(call, news)) + 0 == 400 * 65536

    with_pool(behave, check)


def test_cancel_closes_the_connection_at_once() -> None:
    async def check(mock: Mock, pool: Pool) -> None:
        call, news = start(pool)
        await until(lambda: len(mock.seen) == 1)
        call.cancel()
        call.cancel()
        await asyncio.wait_for(mock.seen[0].gone.wait(), 1)
        assert not news.is_set()
        await until(lambda: pool.open_connections == 0)

    with_pool(hang, check)


def test_cancel_at_any_moment_leaves_nothing() -> None:
    async def check(mock: Mock, pool: Pool) -> None:
        for rounds in range(30):
            call, _ = start(pool)
            for _ in range(rounds % 10):
                await asyncio.sleep(0)
            call.cancel()
        await asyncio.sleep(0.05)
        await until(lambda: pool.open_connections == pool.idle_connections)
        opened = pool.opened
        assert opened == mock.accepted
        assert await finish(*start(pool)) == b"{}"
        assert pool.opened == opened

    with_pool(whole({}), check)


def test_nobody_listens() -> None:
    async def check(mock: Mock, pool: Pool) -> None:
        await mock.stop()
        call, news = start(pool)
        await finish(call, news)
        assert call.failure is not None
        assert call.failure.fault is Fault.REFUSED
        assert "refused" in call.failure.message

    with_pool(hang, check)


def test_nobody_answers_the_call_for_a_connection() -> None:
    async def check(mock: Mock, pool: Pool) -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        crowd = [socket.socket() for _ in range(4)]
        for one in crowd:  # nobody accepts them, and the system holds no more
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        full = Pool(Origin.parse(f"http://127.0.0.1:{listener.getsockname()[1]}"), connect_timeout=0.2)
        call, news = start(full)
        await finish(call, news)
        assert call.failure == Failure(Fault.SILENT, "no connection within 0.2 s")
        with pytest.raises(Silence):
            await fetch(full, "GET", "/health", timeout=5)
        await full.close()
        for one in (listener, *crowd):
            one.close()

    with_pool(hang, check)


def test_what_is_broken_off_fails_by_that_name_and_new_calls_work() -> None:
    async def check(mock: Mock, pool: Pool) -> None:
        idle, _ = start(pool)
        await until(lambda: idle.done)
        mock.behave = stream_then_hang
        calls = [start(pool) for _ in range(3)]
        await until(lambda: all(call.received for call, _ in calls))
        pool.break_off("it hangs")
        for call, news in calls:
            await finish(call, news)
            assert call.failure == Failure(Fault.SILENT, "it hangs")
        pool.break_off("again")  # nothing runs there
        await until(lambda: not pool.open_connections)
        mock.behave = whole({})
        assert await finish(*start(pool)) == b"{}"

    with_pool(whole({}), check)


def test_a_stale_connection_is_named_so_and_fetch_replaces_it() -> None:
    async def check(mock: Mock, pool: Pool) -> None:
        await finish(*start(pool))
        mock.behave = reset
        call, news = start(pool)
        await finish(call, news)
        assert call.failure is not None
        assert call.failure.fault is Fault.STALE
        mock.behave = whole({"a": 1})
        await finish(*start(pool))
        seen = 0

        async def first_reset(exchange: Exchange) -> None:
            nonlocal seen
            seen += 1
            if seen == 1:
                exchange.reset()
            else:
                exchange.whole({"b": 2})

        mock.behave = first_reset
        reply = await fetch(pool, "GET", "/y", timeout=2)
        assert (reply.status, reply.body, seen) == (200, b'{"b": 2}', 2)

    with_pool(whole({}), check)


def test_fetch_has_a_deadline_and_a_limit() -> None:
    async def check(mock: Mock, pool: Pool) -> None:
        with pytest.raises(FetchFailed, match=r"no reply within 0\.05 s"):
            await fetch(pool, "GET", "/y", timeout=0.05)
        mock.behave = events(b"x" * 5000)
        with pytest.raises(FetchFailed, match="more than 100 bytes"):
            await fetch(pool, "GET", "/y", timeout=2, limit=100)

    with_pool(hang, check)


def test_closing_the_pool_fails_what_is_in_progress() -> None:
    async def check(mock: Mock, pool: Pool) -> None:
        open_call, open_news = start(pool)
        await until(lambda: len(mock.seen) == 1)
        fresh_call, _ = start(pool)  # still connecting
        await pool.close()
        await pool.close()
        assert open_news.is_set()
        assert open_call.failure is not None
        assert fresh_call.failure is not None

    with_pool(hang, check)


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://", "http://a b:1", "http://x:99999", "http://x/y", "http://x\r\ny:1"]
)
def test_urls_that_cannot_be_workers(url: str) -> None:
    with pytest.raises(ConfigError):
        Origin.parse(url)


def test_urls_that_can() -> None:
    assert Origin.parse("localhost:81") == Origin("localhost", 81, False)
    assert Origin.parse("http://[::1]:81/").url == "http://[::1]:81"
    assert Origin.parse("https://x.y").port == 443
