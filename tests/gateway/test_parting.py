"""A server that closes, and clients that do not know it yet: none of them is turned away."""

from __future__ import annotations

import asyncio
import socket

from baton.gateway.bounds import Bounds
from tests.gateway.wire import Wire, request, with_wire
from tests.router.mocks import until

NEVER = 60.0
SLOW = Bounds(sweep=0.005, linger=0.2, parting=NEVER)
QUICK = Bounds(sweep=0.005, linger=0.2, parting=0.05)


def test_who_is_about_to_send_gets_one_more_answer() -> None:
    async def check(w: Wire) -> None:
        fresh, kept, half = await w.connect(), await w.connect(request("/a")), await w.connect(b"GET /c HTTP/1.1\r\n")
        _, headers, _ = await kept.reply()
        assert b"connection" not in headers
        await until(lambda: w.server.connections == 3)
        closing = asyncio.create_task(w.server.close(5.0))
        await asyncio.sleep(0)
        assert w.server.connections == 3
        fresh.send(request("/b"))
        kept.send(request("/b"))
        half.send(b"host: x\r\n\r\n")
        for client in (fresh, kept, half):
            status, headers, _ = await client.reply()
            assert (status, headers[b"connection"]) == (200, b"close")
            assert await client.rest() == b""
        await asyncio.wait_for(closing, 2.0)

    with_wire(check, bounds=SLOW)


def test_who_waits_in_the_queue_is_let_in() -> None:
    async def check(w: Wire) -> None:
        # made without a turn of the loop: nobody has accepted them when the server closes
        queued = [socket.create_connection(("127.0.0.1", w.port)) for _ in range(3)]
        closing = asyncio.create_task(w.server.close(5.0))
        await until(lambda: w.server.connections == 3)
        for one in queued:
            one.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=one)
            writer.write(request("/a"))
            async with asyncio.timeout(5):
                assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()
            await writer.wait_closed()
        await asyncio.wait_for(closing, 2.0)

    with_wire(check, bounds=SLOW)


def test_who_says_nothing_does_not_hold_it_up() -> None:
    async def check(w: Wire) -> None:
        silent, half = await w.connect(), await w.connect(b"GET /c HTTP/1.1\r\n")
        await until(lambda: w.server.connections == 2)
        begun = asyncio.get_running_loop().time()
        await asyncio.wait_for(w.server.close(NEVER), 5.0)
        assert asyncio.get_running_loop().time() - begun < 2
        assert await silent.rest() == await half.rest() == b""

    with_wire(check, bounds=QUICK)


def test_who_has_been_idle_for_long_is_closed_at_once() -> None:
    async def check(w: Wire) -> None:
        silent = await w.connect()
        await until(lambda: w.server.connections == 1)
        begun = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() - begun > bounds.parting)
        closing = asyncio.create_task(w.server.close(NEVER))
        assert await silent.rest() == b""
        await asyncio.wait_for(closing, 1.0)

    bounds = Bounds(sweep=NEVER, linger=0.2, parting=0.05)
    with_wire(check, bounds=bounds)
