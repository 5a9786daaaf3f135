"""The server's protocol, with clients that are odd, slow, rude or gone."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from baton.gateway.bounds import Bounds
from baton.gateway.connection import MAX_AHEAD, MAX_PIPELINED
from baton.gateway.door import Answer, Inbound
from baton.router.legs import Pulse
from tests.gateway.wire import Handler, Wire, echo, request, with_wire
from tests.router.mocks import until

USUAL = Bounds(sweep=0.005, linger=0.2)
NEVER = 3600.0


async def wait_for_leaving(inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
    while True:
        await pulse.wait()


async def begin_and_wait(inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
    answer.start(200, [])
    answer.write(b"begun", more=True)
    await wait_for_leaving(inbound, answer, pulse)


def gate() -> tuple[asyncio.Event, Handler]:
    """A handler that answers when it may."""
    event = asyncio.Event()

    async def handler(inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        await event.wait()
        await echo(inbound, answer, pulse)

    return event, handler


# --- keeping connections


def test_a_connection_is_kept() -> None:
    async def check(w: Wire) -> None:
        client = await w.connect()
        for i in range(3):
            client.send(request(f"/{i}?q={i}", b"body"))
            status, headers, body = await client.reply()
            assert (status, body) == (200, b"/%d?q=%d|body" % (i, i))
            assert b"connection" not in headers
            assert b"date" in headers
            assert headers[b"x-mine"] == b"1"

    with_wire(check)


@pytest.mark.parametrize(
    ("version", "connection", "kept"),
    [
        ("1.1", "", True),
        ("1.1", "Connection: keep-alive", True),
        ("1.1", "Connection: close", False),
        ("1.1", "Connection: x, ClOsE", False),
        ("1.0", "", False),
        ("1.0", "Connection: Keep-Alive", True),
    ],
)
def test_whether_a_connection_is_kept(version: str, connection: str, kept: bool) -> None:
    async def check(w: Wire) -> None:
        client = await w.connect(request("/a", b"", *([connection] if connection else []), version=version))
        status, headers, body = await client.reply()
        assert (status, body) == (200, b"/a|")
        if kept:
            assert headers.get(b"connection") == (b"keep-alive" if version == "1.0" else None)
            client.send(request("/b", version=version))
            assert (await client.reply())[2] == b"/b|"
        else:
            assert headers[b"connection"] == b"close"
            assert await client.rest() == b""

    with_wire(check)


def test_an_idle_connection_is_closed() -> None:
    async def check(w: Wire) -> None:
        client = await w.connect(request())
        assert (await client.reply())[0] == 200
        silent = await w.connect()
        blank = await w.connect(b"\r\n\r\n")
        for one in (client, silent, blank):
            assert await one.rest() == b""

    with_wire(check, bounds=replace(USUAL, keep_alive=0.03))


def test_an_answer_may_take_longer_than_a_connection_may_idle() -> None:
    event, handler = gate()

    async def check(w: Wire) -> None:
        client = await w.connect(request())
        await until(lambda: len(w.app.seen) == 1)
        idle = await w.connect()
        assert await idle.rest() == b""  # the sweep came by
        event.set()
        assert (await client.reply())[0] == 200

    with_wire(check, handler, replace(USUAL, keep_alive=0.02))


def test_too_many_connections() -> None:
    async def check(w: Wire) -> None:
        first = [await w.connect(request()) for _ in range(2)]
        for client in first:
            assert (await client.reply())[0] == 200
        one_more = await w.connect()
        assert (await one_more.reply())[0] == 503
        first[0].abort()
        await until(lambda: w.server.connections == 1)
        assert (await (await w.connect(request())).reply())[0] == 200

    with_wire(check, bounds=replace(USUAL, connections=2))


# --- pipelining


def test_answers_come_in_the_order_of_requests() -> None:
    async def later(inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        await asyncio.sleep(0.01 if inbound.path == "/0" else 0)
        await echo(inbound, answer, pulse)

    async def check(w: Wire) -> None:
        client = await w.connect(b"".join(request(f"/{i}", b"x" * i) for i in range(20)))
        for i in range(20):
            assert (await client.reply())[2] == b"/%d|" % i + b"x" * i

    with_wire(check, later)


def test_pipelined_requests_in_single_bytes() -> None:
    async def check(w: Wire) -> None:
        client = await w.connect()
        for byte in request("/a", b"1") + request("/b", b"22"):
            client.send(bytes([byte]))
            await client.writer.drain()
            await asyncio.sleep(0)
        assert [(await client.reply())[2] for _ in range(2)] == [b"/a|1", b"/b|22"]

    with_wire(check)


def test_a_pipeline_is_bounded() -> None:
    event, handler = gate()

    async def check(w: Wire) -> None:
        client = await w.connect(b"".join(request(f"/{i}") for i in range(MAX_PIPELINED + 10)))
        await until(lambda: len(w.app.seen) == 1)
        event.set()
        for i in range(MAX_PIPELINED + 1):
            assert (await client.reply())[2] == b"/%d|" % i
        status, headers, _ = await client.reply()
        assert (status, headers[b"connection"]) == (429, b"close")
        assert await client.rest() == b""
        assert len(w.app.seen) == MAX_PIPELINED + 1

    with_wire(check, handler)


def test_large_bodies_sent_ahead_are_not_read_before_their_turn() -> None:
    event, handler = gate()
    body = b"x" * (MAX_AHEAD // 2)

    async def check(w: Wire) -> None:
        client = await w.connect()
        sending = asyncio.create_task(_send_all(client.writer, [request(f"/{i}", body) for i in range(30)]))
        await until(lambda: len(w.app.seen) == 1)
        [connection] = w.server._connections
        await until(lambda: connection._paused)
        assert connection._ahead <= 2 * MAX_AHEAD
        assert not sending.done()
        event.set()
        for i in range(30):
            assert (await client.reply())[2] == b"/%d|" % i + body
        await sending

    with_wire(check, handler)


async def _send_all(writer: asyncio.StreamWriter, pieces: list[bytes]) -> None:
    for piece in pieces:
        writer.write(piece)
        await writer.drain()


def test_what_is_no_request_is_refused_after_the_requests_before_it() -> None:
    event, handler = gate()

    async def check(w: Wire) -> None:
        client = await w.connect(request("/a") + request("/b") + b"GARBAGE\r\n\r\n")
        await until(lambda: len(w.app.seen) == 1)
        event.set()
        assert (await client.reply())[2] == b"/a|"
        assert (await client.reply())[2] == b"/b|"
        assert (await client.reply())[0] == 400
        assert await client.rest() == b""

    with_wire(check, handler)


def test_a_large_body_and_the_beginning_of_the_next_head_in_one_piece() -> None:
    async def check(w: Wire) -> None:
        body = b"x" * 5000
        client = await w.connect(request("/a", body) + request("/b")[:20])
        assert (await client.reply())[2] == b"/a|" + body
        client.send(request("/b")[20:])
        assert (await client.reply())[2] == b"/b|"

    with_wire(check, bounds=replace(USUAL, head=1000))


# --- methods and framing of answers


def test_head() -> None:
    async def check(w: Wire) -> None:
        client = await w.connect(request("/a", method="HEAD") + request("/b"))
        status, headers, _ = await client.reply(head=True)
        assert (status, headers[b"content-length"]) == (200, b"3")
        assert (await client.reply())[2] == b"/b|"

    with_wire(check)


@pytest.mark.parametrize("status", [204, 304])
def test_statuses_without_a_body(status: int) -> None:
    async def handler(inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        answer.start(status, [], 3)
        answer.write(b"abc", more=False)

    async def check(w: Wire) -> None:
        client = await w.connect(request() + request())
        for _ in range(2):
            got, headers, _ = await client.reply()
            assert got == status
            assert not {b"content-length", b"transfer-encoding"} & headers.keys()

    with_wire(check, handler)


def test_a_status_without_a_name() -> None:
    async def handler(inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        answer.start(599, [], 0)
        answer.write(b"", more=False)

    async def check(w: Wire) -> None:
        assert (await (await w.connect(request())).reply())[0] == 599

    with_wire(check, handler)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_answers_of_unknown_length(version: str) -> None:
    async def handler(inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        answer.start(200, [])
        answer.write(b"one ", more=True)
        answer.write(b"", more=True)
        await asyncio.sleep(0)
        answer.write(b"two", more=False)

    async def check(w: Wire) -> None:
        client = await w.connect(request("/a", b"", "Connection: keep-alive", version=version))
        _, headers, body = await client.reply()
        assert body == b"one two"
        assert (b"transfer-encoding" in headers) == (version == "1.1")
        assert headers.get(b"connection") == (None if version == "1.1" else b"close")

    with_wire(check, handler)


# --- requests in chunks


def test_chunks_extensions_and_trailers() -> None:
    body = b'3;a=b;c="d;\\"e"\r\nabc\r\n0002\r\nde\r\n0\r\nX-Trailer: 1\r\nAuthorization: Bearer stolen\r\n\r\n'

    async def check(w: Wire) -> None:
        client = await w.connect(request("/a", b"", "Transfer-Encoding: chunked", length=False) + body + request("/b"))
        assert (await client.reply())[2] == b"/a|abcde"
        assert (await client.reply())[2] == b"/b|"
        names = {name for name, _ in w.app.seen[0].headers}
        assert names == {b"host", b"transfer-encoding"}

    with_wire(check)


def test_a_body_of_very_many_chunks_takes_no_more_memory_than_its_bytes() -> None:
    async def check(w: Wire) -> None:
        client = await w.connect(request("/a", b"", "Transfer-Encoding: chunked", length=False))
        client.send(b"1\r\nx\r\n" * 20_000)
        await until(lambda: bool(w.server._connections) and next(iter(w.server._connections))._size == 20_000)
        assert isinstance(next(iter(w.server._connections))._body, bytearray)
        client.send(b"0\r\n\r\n")
        assert (await client.reply())[2] == b"/a|" + b"x" * 20_000

    with_wire(check)


@pytest.mark.parametrize(
    "endless",
    [b"1;" + b"e" * 100, b"0\r\nX-T: " + b"t" * 100, b"0\r\n" + b"X-T: t\r\n"],
    ids=["extension", "trailer", "trailers"],
)
def test_framing_without_end_is_refused(endless: bytes) -> None:
    async def check(w: Wire) -> None:
        client = await w.connect(request("/a", b"", "Transfer-Encoding: chunked", length=False) + endless)
        more = endless[-8:] * 100
        for _ in range(200):
            client.send(more)
            await asyncio.sleep(0)
        assert (await client.reply())[0] == 400
        assert w.app.seen == []

    with_wire(check, bounds=replace(USUAL, head=1000))


# --- Expect


def test_expect_continue() -> None:
    async def check(w: Wire) -> None:
        for _ in range(2):
            client = await w.connect(request("/a", b"body", "Expect: 100-Continue")[:-4])
            assert (await client.reply())[0] == 100
            client.send(b"body")
            assert (await client.reply())[2] == b"/a|body"

    with_wire(check)


def test_expect_continue_is_not_said_when_it_is_needless() -> None:
    async def check(w: Wire) -> None:
        for data in (
            request("/a", b"body", "Expect: 100-continue"),
            request("/a", b"", "Expect: 100-continue"),
            request("/a", b"body", "Expect: 100-continue", version="1.0"),
            request("/a", b"body", "Expect: something-else"),
        ):
            assert (await (await w.connect(data)).reply())[0] == 200

    with_wire(check)


def test_expect_continue_waits_for_the_answer_before_it() -> None:
    event, handler = gate()

    async def check(w: Wire) -> None:
        client = await w.connect(request("/a") + request("/b", b"body", "Expect: 100-continue")[:-4])
        await until(lambda: len(w.app.seen) == 1)
        event.set()
        assert (await client.reply())[2] == b"/a|"
        assert (await client.reply())[0] == 100
        client.send(b"body")
        assert (await client.reply())[2] == b"/b|body"

    with_wire(check, handler)


def test_a_refusal_comes_instead_of_continue() -> None:
    async def check(w: Wire) -> None:
        client = await w.connect(request("/a", b"x" * 101, "Expect: 100-continue")[:-101])
        assert (await client.reply())[0] == 413

    with_wire(check, bounds=replace(USUAL, body=100))


# --- limits


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "counting"])
def test_a_body_that_is_too_large(chunked: bool) -> None:
    """The client sees why, though it goes on writing for a while."""
    limit = 1 << 20
    if chunked:
        head = request("/v1/x?a", b"", "Transfer-Encoding: chunked", length=False)
        piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    else:
        head, piece = request("/v1/x?a", b"", "Content-Length: 10000000", length=False), b"x" * 0x10000

    async def check(w: Wire) -> None:
        client = await w.connect(head)
        sending = asyncio.create_task(_send_all(client.writer, [piece] * 100))
        status, headers, body = await client.reply()
        assert (status, headers[b"connection"], headers[b"x-path"]) == (413, b"close", b"/v1/x")
        assert b"1048576 bytes" in body
        await sending
        assert await client.rest() == b""
        assert w.app.seen == []
        assert w.server.refusals == {413: 1}

    with_wire(check, bounds=replace(USUAL, body=limit))


def test_a_body_of_just_the_right_size() -> None:
    async def check(w: Wire) -> None:
        client = await w.connect(request("/a", b"x" * 100))
        assert (await client.reply())[0] == 200
        client.send(request("/a", b"x" * 101))
        assert (await client.reply())[0] == 413

    with_wire(check, bounds=replace(USUAL, body=100))


@pytest.mark.parametrize(
    "data",
    [
        request("/" + "x" * 1000),
        request("/x", b"", "X: " + "y" * 1000),
        request("/x", b"", *["X: y"] * 101),
        b"GET /" + b"x" * 2000,
        b"GET / HTTP/1.1\r\nX: " + b"x" * 2000,
        b"GET / HTTP/1.1\r\n" + b"x" * 2000,
    ],
    ids=["url", "value", "number", "half a url", "half a value", "half a name"],
)
@pytest.mark.parametrize("size", [100, 5000])
def test_a_head_that_is_too_large(data: bytes, size: int) -> None:
    async def check(w: Wire) -> None:
        client = await w.connect()
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        for piece in [*pieces, *[pieces[-1][-1:] * 300] * (4 if not data.endswith(b"\n") else 0)]:
            client.send(piece)
            await asyncio.sleep(0.001)
        status, headers, _ = await client.reply()
        assert (status, headers[b"connection"]) == (431, b"close")
        assert w.app.seen == []

    with_wire(check, bounds=replace(USUAL, head=1000, headers=100))


# --- clients that are too slow


@pytest.mark.parametrize("first", [b"G", b"POST /x HTTP/1.1\r\nHost: h\r\n", b"POST /x HTTP/1.1\r\nX-"])
@pytest.mark.parametrize("dripping", [False, True])
def test_a_head_that_does_not_end(first: bytes, dripping: bool) -> None:
    async def check(w: Wire) -> None:
        client = await w.connect(first)
        drip = (
            asyncio.create_task(_drip(client.writer, b"X-Header: y\r\n" if first.endswith(b"\n") else b""))
            if dripping
            else None
        )
        status, headers, _ = await client.reply()
        assert (status, headers[b"connection"]) == (408, b"close")
        if drip is not None:
            drip.cancel()
        assert w.app.seen == []

    with_wire(check, bounds=replace(USUAL, head_seconds=0.05, body_seconds=NEVER, keep_alive=NEVER))


async def _drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    while True:
        writer.write(data)
        await asyncio.sleep(0.004)


def test_a_body_that_stops() -> None:
    async def check(w: Wire) -> None:
        client = await w.connect(request("/a", b"x" * 100)[:-1])
        assert (await client.reply())[0] == 408

    with_wire(check, bounds=replace(USUAL, head_seconds=NEVER, body_seconds=0.03, keep_alive=NEVER))


def test_a_body_that_drips() -> None:
    """Never silent for long, and never at its end."""

    async def check(w: Wire) -> None:
        client = await w.connect(request("/a", b"x" * 100_000)[:-99_000])
        drip = asyncio.create_task(_drip(client.writer, b"x"))
        assert (await client.reply())[0] == 408
        drip.cancel()

    quick = replace(USUAL, head_seconds=0.02, body_seconds=0.05, body_rate=1 << 20, keep_alive=NEVER)
    with_wire(check, bounds=quick)


def test_a_body_that_is_slow_but_steady_enough() -> None:
    async def check(w: Wire) -> None:
        client = await w.connect(request("/a", b"x" * 1000)[:-1000])
        for _ in range(10):
            await asyncio.sleep(0.005)
            client.send(b"x" * 100)
        assert (await client.reply())[0] == 200

    with_wire(check, bounds=replace(USUAL, head_seconds=0.01, body_seconds=0.03, body_rate=1, keep_alive=NEVER))


def test_a_slow_request_behind_an_answer_in_progress() -> None:
    event, handler = gate()

    async def check(w: Wire) -> None:
        client = await w.connect(request("/a") + request("/b")[:-3])
        await until(lambda: bool(w.server._connections) and next(iter(w.server._connections))._stage == "over")
        event.set()
        assert (await client.reply())[2] == b"/a|"
        assert (await client.reply())[0] == 408

    with_wire(check, handler, replace(USUAL, head_seconds=0.02))


# --- clients that do not read


def test_who_does_not_read_makes_the_application_wait() -> None:
    written = 0

    async def flood(inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        nonlocal written
        answer.start(200, [])
        for _ in range(1000):
            answer.write(b"x" * 0x10000, more=True)
            written += 1
            if answer.paused:
                await answer.drained()
                pulse.check()
        answer.write(b"", more=False)

    async def check(w: Wire) -> None:
        client = await w.connect()
        client.send(request())
        await until(lambda: written > 0)
        [connection] = w.server._connections
        await until(lambda: connection.full is not None)
        at = written
        for _ in range(20):
            await asyncio.sleep(0)
        assert written == at < 500
        assert connection._transport.get_write_buffer_size() < 1 << 20
        assert len((await client.reply())[2]) == 1000 * 0x10000

    with_wire(check, flood, replace(USUAL, send_seconds=NEVER))


@pytest.mark.parametrize("closing", [False, True], ids=["kept", "to be closed"])
def test_who_never_reads_is_dropped(closing: bool) -> None:
    async def big(inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        answer.start(200, [], 50 << 20)
        answer.write(bytes(50 << 20), more=False)

    async def check(w: Wire) -> None:
        client = await w.connect()
        client.deaf()
        client.send(request("/a", b"", *(["Connection: close"] if closing else [])))
        await until(lambda: len(w.app.seen) == 1)
        await until(lambda: w.server.connections == 0)

    with_wire(check, big, replace(USUAL, send_seconds=0.05, keep_alive=0.01))


def test_a_large_last_answer_is_not_cut_by_impatience() -> None:
    """The connection closes after it, with bytes of the client unread; but the client reads, if slowly."""

    async def big(inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        answer.start(200, [], 20 << 20)
        answer.write(bytes(20 << 20), more=False)

    async def check(w: Wire) -> None:
        client = await w.connect(request("/a", b"", "Connection: close") + b"more and more")
        assert len((await client.reply())[2]) == 20 << 20

    with_wire(check, big, replace(USUAL, send_seconds=2.0, keep_alive=0.01))


# --- clients that leave


@pytest.mark.parametrize("how", ["close", "reset", "half"])
@pytest.mark.parametrize("handler", [wait_for_leaving, begin_and_wait], ids=["before", "during"])
def test_the_application_hears_when_the_client_leaves(handler: Handler, how: str) -> None:
    """`half`: it shuts its sending side down. Nothing tells that from one which is gone."""

    async def check(w: Wire) -> None:
        client = await w.connect(request("/a") + request("/never"))
        await until(lambda: len(w.app.seen) == 1)
        if how == "close":
            client.writer.close()
        elif how == "reset":
            client.abort()
        else:
            client.writer.write_eof()
        await until(lambda: w.app.gone == 1)
        await until(lambda: w.server.connections == 0)
        assert len(w.app.seen) == 1

    with_wire(check, handler)


@pytest.mark.parametrize("sent", [b"", b"POST /x HT", request("/a", b"body")[:-2]])
def test_leaving_in_the_middle_of_a_request(sent: bytes) -> None:
    async def check(w: Wire) -> None:
        client = await w.connect(sent)
        await until(lambda: w.server.connections == 1)
        client.writer.close()
        await until(lambda: w.server.connections == 0)
        assert w.app.seen == []

    with_wire(check)


def test_leaving_while_the_application_waits_for_the_socket() -> None:
    async def flood(inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        answer.start(200, [])
        while True:
            answer.write(b"x" * 0x10000, more=True)
            await answer.drained()
            pulse.check()

    async def check(w: Wire) -> None:
        client = await w.connect(request())
        client.deaf()
        await until(lambda: any(c.full is not None for c in w.server._connections))
        client.abort()
        await until(lambda: w.app.gone == 1)

    with_wire(check, flood)


def test_writing_to_who_has_left_is_no_error() -> None:
    async def deaf(inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        while not pulse.gone:
            await asyncio.sleep(0)
        answer.start(200, [])
        answer.write(b"x", more=True)
        await answer.drained()
        answer.write(b"x", more=False)
        answer.abort()

    async def check(w: Wire) -> None:
        client = await w.connect(request())
        await until(lambda: len(w.app.seen) == 1)
        client.abort()
        await until(lambda: w.app.ended == 1)

    with_wire(check, deaf)


# --- applications that fail


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("length", [None, 100])
def test_giving_up_in_the_middle_cannot_be_taken_for_the_whole(version: str, length: int | None) -> None:
    async def handler(inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        answer.start(200, [], length)
        answer.write(b"half", more=True)
        while not inbound.path.startswith("/go"):
            await asyncio.sleep(0)
        await asyncio.sleep(0.02)  # it has been sent
        answer.abort()
        answer.write(b"nothing", more=False)

    async def check(w: Wire) -> None:
        client = await w.connect(request("/go", version=version))
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await client.reply()

    with_wire(check, handler)


def test_an_application_that_fails_before_its_answer() -> None:
    async def handler(inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        if inbound.path == "/bad":
            raise ZeroDivisionError
        await echo(inbound, answer, pulse)

    async def check(w: Wire) -> None:
        client = await w.connect(request("/bad") + request("/good"))
        status, _, body = await client.reply()
        assert (status, body.partition(b":")[0]) == (500, b"internal_error")
        assert b"ZeroDivision" not in body
        assert (await client.reply())[2] == b"/good|"

    with_wire(check, handler)


@pytest.mark.parametrize("returns", [True, False])
def test_an_application_that_ends_in_the_middle_of_its_answer(returns: bool) -> None:
    async def handler(inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        answer.start(200, [])
        answer.write(b"half", more=True)
        if not returns:
            raise ZeroDivisionError

    async def check(w: Wire) -> None:
        client = await w.connect(request() + request("/never"))
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await client.reply()
        assert len(w.app.seen) == 1

    with_wire(check, handler)


def test_an_application_that_does_not_answer_at_all() -> None:
    async def handler(inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        pass

    async def check(w: Wire) -> None:
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await (await w.connect(request())).reply()

    with_wire(check, handler)


# --- the end


def test_closing_lets_requests_finish() -> None:
    event, handler = gate()

    async def check(w: Wire) -> None:
        busy = await w.connect(request("/a") + request("/b"))
        idle = await w.connect()
        half = await w.connect(b"POST /x HTTP/1.1\r\n")
        await until(lambda: len(w.app.seen) == 1 and w.server.connections == 3)
        closing = asyncio.create_task(w.server.close(5.0))
        assert await idle.rest() == b""
        assert await half.rest() == b""
        assert not closing.done()
        event.set()
        status, headers, body = await busy.reply()
        assert (status, headers[b"connection"], body) == (200, b"close", b"/a|")
        assert await busy.rest() == b""
        await closing
        with pytest.raises(OSError):
            await w.connect()

    with_wire(check, handler)


@pytest.mark.parametrize("twice", [False, True])
def test_closing_breaks_off_what_does_not_finish(twice: bool) -> None:
    async def check(w: Wire) -> None:
        client = await w.connect(request())
        await until(lambda: len(w.app.seen) == 1)
        closing = asyncio.create_task(w.server.close(NEVER if twice else 0.02))
        if twice:
            await asyncio.sleep(0)
            w.server.stop()
            w.server.stop()
        await closing
        assert w.app.gone == 1
        assert w.server.connections == 0
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await client.reply()

    with_wire(check, begin_and_wait)
