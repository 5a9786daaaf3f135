"""Requests that mean one thing to one parser and another to the next: refused, or read in the only way there is; and
workers get well-formed requests only, one for one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from baton.base.config import GatewayConfig
from baton.gateway.app import Gateway
from baton.gateway.process import serving
from baton.gateway.server import Server
from tests.gateway.tap import Tap
from tests.gateway.wire import Client, Wire, with_wire
from tests.router.mocks import run, until

HOST = b"Host: h\r\n"
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: h\r\n\r\n"
CHUNKS = b"3\r\nabc\r\n0\r\n\r\n"
THREE = b"Content-Length: 3"


def post(*lines: bytes, body: bytes = b"", version: bytes = b"1.1") -> bytes:
    return b"POST /v1/x HTTP/" + version + b"\r\n" + HOST + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


def chunked(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked", body=body)


REFUSED: dict[str, tuple[bytes, int]] = {
    # lengths
    "equal lengths": (post(b"Content-Length: 3", b"Content-Length: 3", body=b"abc"), 400),
    "two lengths": (post(b"Content-Length: 3", b"Content-Length: 36", body=b"abc" + HIDDEN), 400),
    "list of lengths": (post(b"Content-Length: 3, 3", body=b"abc"), 400),
    "plus": (post(b"Content-Length: +3", body=b"abc"), 400),
    "minus": (post(b"Content-Length: -3", body=b"abc"), 400),
    "hexadecimal": (post(b"Content-Length: 0x3", body=b"abc"), 400),
    "underscore": (post(b"Content-Length: 1_0", body=b"abcdefghij"), 400),
    "fraction": (post(b"Content-Length: 3.0", body=b"abc"), 400),
    "no number": (post(b"Content-Length:", body=b"abc"), 400),
    "blank inside": (post(b"Content-Length: 1 0", body=b"abcdefghij"), 400),
    "overflow": (post(b"Content-Length: 18446744073709551619", body=b"abc"), 400),
    "very long": (post(b"Content-Length: " + b"0" * 5000 + b"3", body=b"abc"), 400),
    "folded length": (post(b"Content-Length:\r\n 3", body=b"abc"), 400),
    "vertical tab": (post(b"Content-Length: \x0b3", body=b"abc"), 400),
    # length and coding
    "length, coding": (post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n" + HIDDEN), 400),
    "coding, length": (post(b"Transfer-Encoding: chunked", b"Content-Length: 40", body=b"0\r\n\r\n" + HIDDEN), 400),
    "length in a trailer": (chunked(b"3\r\nabc\r\n0\r\nContent-Length: 40\r\n\r\n" + HIDDEN), 400),
    "coding in a trailer": (chunked(b"3\r\nabc\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n" + HIDDEN), 400),
    # codings
    "chunked, identity": (post(b"Transfer-Encoding: chunked, identity", body=CHUNKS), 400),
    "identity, chunked": (post(b"Transfer-Encoding: identity, chunked", body=CHUNKS), 501),
    "gzip, chunked": (post(b"Transfer-Encoding: gzip, chunked", body=CHUNKS), 501),
    "xchunked": (post(b"Transfer-Encoding: xchunked", body=CHUNKS), 501),
    "chunkedx": (post(b"Transfer-Encoding: chunkedx", body=CHUNKS), 501),
    "quoted": (post(b'Transfer-Encoding: "chunked"', body=CHUNKS), 501),
    "parameter": (post(b"Transfer-Encoding: chunked;q=1", body=CHUNKS), 501),
    "identity": (post(b"Transfer-Encoding: identity"), 501),
    "no coding": (post(b"Transfer-Encoding:", b"Content-Length: 3", body=b"abc"), 400),
    "twice": (post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=CHUNKS), 400),
    "twice, otherwise": (post(b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked", body=CHUNKS), 501),
    "coding after a vertical tab": (post(b"Transfer-Encoding: \x0bchunked", body=CHUNKS), 400),
    "coding before a form feed": (post(b"Transfer-Encoding: chunked\x0c", body=CHUNKS), 400),
    "folded coding": (post(b"Transfer-Encoding:\r\n chunked", body=CHUNKS), 400),
    "coding, blank, colon": (post(b"Transfer-Encoding : chunked", body=CHUNKS), 400),
    "coding in HTTP/1.0": (post(b"Transfer-Encoding: chunked", body=CHUNKS, version=b"1.0"), 501),
    # chunks
    "chunk 0x3": (chunked(b"0x3\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk +3": (chunked(b"+3\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk -1": (chunked(b"-1\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk 0_3": (chunked(b"0_3\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk, blank before": (chunked(b" 3\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk, blank after": (chunked(b"3 \r\nabc\r\n0\r\n\r\n"), 400),
    "chunk, blank, extension": (chunked(b"3 ;x\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk of no size": (chunked(b"\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk overflow": (chunked(b"10000000000000003\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk, LF": (chunked(b"3\nabc\r\n0\r\n\r\n"), 400),
    "chunk, CR": (chunked(b"3\rabc\r\n0\r\n\r\n"), 400),
    "chunk data, LF": (chunked(b"3\r\nabc\n0\r\n\r\n"), 400),
    "chunk data, nothing": (chunked(b"3\r\nabc0\r\n\r\n"), 400),
    "chunk data, other bytes": (chunked(b"3\r\nabcXX0\r\n\r\n"), 400),
    "extension, LF": (chunked(b"3;x\nabc\r\n0\r\n\r\n"), 400),
    "extension, CR": (chunked(b"3;x\ry\r\nabc\r\n0\r\n\r\n"), 400),
    "extension, NUL": (chunked(b"3;\0\r\nabc\r\n0\r\n\r\n"), 400),
    "trailer, LF": (chunked(b"3\r\nabc\r\n0\r\nX: y\n\r\n"), 400),
    # lines and headers
    "LF": (b"GET /v1/x HTTP/1.1\nHost: h\n\n", 400),
    "LF after a header": (b"GET /v1/x HTTP/1.1\r\nHost: h\nX: y\r\n\r\n", 400),
    "LF at the end": (b"GET /v1/x HTTP/1.1\r\nHost: h\r\n\n", 400),
    "CR": (b"GET /v1/x HTTP/1.1\r\nHost: h\rX: y\r\n\r\n", 400),
    "CR in a value": (post(b"X: y\rTransfer-Encoding: chunked"), 400),
    "CR CR LF": (post(b"X: y\r"), 400),
    "folded": (post(b"X: y\r\n z"), 400),
    "folded first": (b"GET /v1/x HTTP/1.1\r\n Host: h\r\n\r\n", 400),
    "blank before colon": (post(b"X : y"), 400),
    "tab before colon": (post(b"X\t: y"), 400),
    "no name": (post(b": y"), 400),
    "no colon": (post(b"X"), 400),
    "NUL in a value": (post(b"X: a\0b"), 400),
    "NUL in a name": (post(b"X\0: y"), 400),
    "control in a value": (post(b"X: a\x08b"), 400),
    "high byte in a name": (post(b"X\xff: y"), 400),
    # hosts
    "two hosts": (post(b"Host: other"), 400),
    "no host": (b"GET /v1/x HTTP/1.1\r\n\r\n", 400),
    "host with a path": (b"GET /v1/x HTTP/1.1\r\nHost: h/x\r\n\r\n", 400),
    "host with a user": (b"GET /v1/x HTTP/1.1\r\nHost: u@h\r\n\r\n", 400),
    "half a literal": (b"GET /v1/x HTTP/1.1\r\nHost: [::1\r\n\r\n", 400),
    # targets
    "authority": (b"GET h:80 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "CONNECT": (b"CONNECT h:80 HTTP/1.1\r\n" + HOST + b"\r\n" + HIDDEN, 501),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "other scheme": (b"GET ftp://h/v1/x HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "user in a URL": (b"GET http://u@h/v1/x HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "two slashes": (b"GET //v1/x HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "dots": (b"GET /v1/../workers HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "hidden dots": (b"GET /v1/%2e%2e/workers HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "fragment": (b"GET /v1/x#y HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "half an escape": (b"GET /v1/x%4 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "hidden CR LF": (b"GET /v1/x%0d%0aX:%20y HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "control in a URL": (b"GET /v1/\x01 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "NUL in a URL": (b"GET /v1/\0 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "tab in a URL": (b"GET /v1/\tx HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "high byte in a URL": (b"GET /v1/\xe9 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "high byte in a query": (b"GET /v1/x?\xe9 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "blank in a URL": (b"GET /v1/x y HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    # versions and other protocols
    "HTTP/0.9": (b"GET /v1/x\r\n\r\n", 505),
    "called HTTP/0.9": (b"GET /v1/x HTTP/0.9\r\n" + HOST + b"\r\n", 505),
    "HTTP/1.2": (b"GET /v1/x HTTP/1.2\r\n" + HOST + b"\r\n", 400),
    "HTTP/2.0": (b"GET /v1/x HTTP/2.0\r\n" + HOST + b"\r\n", 505),
    "blank after version": (b"GET /v1/x HTTP/1.1 \r\n" + HOST + b"\r\n", 400),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "RTSP": (b"DESCRIBE /v1/x RTSP/1.0\r\n" + HOST + b"\r\n", 501),
    "ICE": (b"SOURCE /v1/x ICE/1.0\r\n" + HOST + b"\r\n", 501),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "small method": (b"get /v1/x HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "unknown method": (b"HACK /v1/x HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "TRACE": (b"TRACE /v1/x HTTP/1.1\r\n" + HOST + b"\r\n", 501),
}  # fmt: skip
READ: dict[str, tuple[bytes, list[bytes]]] = {
    "nothing odd": (post(b"Content-Length: 3", body=b"abc"), [b"abc"]),
    "zeros": (post(b"Content-Length: 003", body=b"abc"), [b"abc"]),
    "blanks around": (post(b"Content-Length:\t 3 \t", body=b"abc"), [b"abc"]),
    "ChUnKeD": (post(b"Transfer-Encoding: ChUnKeD", body=CHUNKS), [b"abc"]),
    "coding, blanks around": (post(b"transfer-encoding:\t chunked ", body=CHUNKS), [b"abc"]),
    "another header's name": (post(b"Transfer_Encoding: chunked", b"Content-Length: 3", body=b"abc"), [b"abc"]),
    "zeros in chunks": (chunked(b"0003\r\nabc\r\n000\r\n\r\n"), [b"abc"]),
    "extensions": (chunked(b'3;a;b=c;d="e;\\"f"\r\nabc\r\n0;g\r\n\r\n'), [b"abc"]),
    "trailers": (chunked(b"3\r\nabc\r\n0\r\nHost: other\r\nX: y\r\n\r\n"), [b"abc"]),
    "lines before": (b"\r\n\r\n" + post(b"Content-Length: 3", body=b"abc"), [b"abc"]),
    "line between": (post(b"Content-Length: 1", body=b"a") + b"\r\n" + post(), [b"a", b""]),
    "a request as body": (post(b"Content-Length: %d" % len(HIDDEN), body=HIDDEN), [HIDDEN]),
    "absolute": (post().replace(b"/v1/x", b"http://other:99/v1/x"), [b""]),
    "escaped letter": (post().replace(b"/v1/x", b"/v1/%78"), [b""]),
    "upgrade to HTTP/2": (
        post(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings:", THREE, body=b"abc") + post(),
        [b"abc", b""],
    ),
    "upgrade, chunked": (
        post(b"Connection: upgrade", b"Upgrade: websocket", b"Transfer-Encoding: chunked", body=CHUNKS) + post(),
        [b"abc", b""],
    ),
    "two upgrades": (post(b"Connection: upgrade", b"Upgrade: a", b"Upgrade: b", THREE, body=b"abc"), [b"abc"]),
    "upgrade in a trailer": (
        post(b"Connection: upgrade", b"Transfer-Encoding: chunked", body=CHUNKS[:-2] + b"Upgrade: x\r\n\r\n") + post(),
        [b"abc", b""],
    ),
}  # fmt: skip


@pytest.mark.parametrize("split", [0, 1, 7], ids=["whole", "bytes", "pieces"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, split: int) -> None:
    """And what follows is not read."""
    data, expected = REFUSED[name]

    async def check(w: Wire) -> None:
        client = await w.connect()
        await _send(client, data + HIDDEN, split)
        status, headers, _ = await client.reply()
        assert (status, headers[b"connection"]) == (expected, b"close")
        assert await client.rest() == b""
        assert w.app.seen == []

    with_wire(check)


@pytest.mark.parametrize("split", [0, 1, 7], ids=["whole", "bytes", "pieces"])
@pytest.mark.parametrize("name", READ)
def test_read_in_the_only_way_there_is(name: str, split: int) -> None:
    data, bodies = READ[name]

    async def check(w: Wire) -> None:
        client = await w.connect()
        await _send(client, data + HIDDEN.replace(b"hidden", b"next"), split)
        for body in bodies:
            assert (await client.reply())[2] == b"/v1/x|" + body
        assert (await client.reply())[2] == b"/next|"
        assert [inbound.body for inbound in w.app.seen] == [*bodies, b""]

    with_wire(check)


async def _send(client: Client, data: bytes, split: int) -> None:
    if not split:
        client.send(data)
        return
    for i in range(0, len(data), split):
        client.send(data[i : i + split])
        await client.writer.drain()
        await asyncio.sleep(0)


# --- what reaches a worker


def test_another_spelling_of_a_path_opens_no_door() -> None:
    """Neither to what only admins may do, nor past the check of fields that steer workers."""

    async def main() -> None:
        config = GatewayConfig(port=0, drain_timeout=1.0, api_key="user", admin_api_key="admin", retries=0)
        async with Tap() as tap, serving(config, regular=[tap.url]) as (gateway, _, port):
            await until(lambda: all(w.healthy for w in gateway.router.registry.workers))
            key = b"Authorization: Bearer user"
            for path in (b"/workers", b"/%77orkers", b"http://h/workers", b"/work%65rs/", b"/%66lush_cache"):
                reply = await ask(port, post(key).replace(b"POST /v1/x", b"GET " + path))
                assert reply.startswith(b"HTTP/1.1 403 "), path
            body = b'{"prompt": "a", "bootstrap_host": "evil"}'
            for path in (b"/v1/completions", b"/v1/%63ompletions", b"http://h/v1/completions?x"):
                length = b"Content-Length: %d" % len(body)
                await ask(port, post(key, length, body=body).replace(b"/v1/x", path))
            assert len(tap.seen) == 3
            assert all(one.target.startswith(b"/v1/completions") and b"evil" not in one.body for one in tap.seen)

    run(main())


def with_tap(check: Callable[[int, Tap, Gateway, Server], Awaitable[None]], tap: Tap | None = None) -> None:
    async def main() -> None:
        config = GatewayConfig(port=0, drain_timeout=1.0, health_interval=60.0, retries=0)
        async with tap or Tap() as one, serving(config, regular=[one.url]) as (gateway, server, port):
            await until(lambda: all(w.healthy for w in gateway.router.registry.workers))
            await check(port, one, gateway, server)

    run(main())


async def ask(port: int, data: bytes) -> bytes:
    """Everything that is answered until the gateway closes, or has answered what was asked last."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    client = Client(reader, writer)
    try:
        client.send(data + b"GET /health HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        return await client.rest()
    finally:
        client.abort()


def test_workers_get_well_formed_requests_one_for_one() -> None:
    async def check(port: int, tap: Tap, gateway: Gateway, server: Server) -> None:
        for name, (data, _) in REFUSED.items():
            await ask(port, data.replace(b"GET /v1/x", b"POST /v1/x"))
            assert tap.seen == [], name
        for name, (data, bodies) in READ.items():
            await ask(port, data)
            got = [(one.method, one.target, one.body) for one in tap.seen]
            assert got == [(b"POST", b"/v1/x", body) for body in bodies], name
            tap.seen.clear()
        assert tap.malformed == []
        assert tap.leftovers() == []
        await until(lambda: server.connections == 0)

    with_tap(check)


def test_headers_of_the_connection_stay_behind() -> None:
    lines = (
        b"Connection: Keep-Alive, X-Mine",
        b"connection: x-other ,,",
        b"X-Mine: 1",
        b"X-Other: 1",
        b"X-Kept: 1",
        b"Keep-Alive: timeout=5",
        b"TE: trailers",
        b"Trailer: X",
        b"Proxy-Authorization: secret",
        b"Proxy-Connection: keep-alive",
        b"Expect: 100-continue",
        b"Content-Length: 2",
    )

    async def check(port: int, tap: Tap, gateway: Gateway, server: Server) -> None:
        await ask(port, post(*lines, body=b"{}"))
        [one] = tap.seen
        names = {name for name, _ in one.headers} - {b"traceparent", b"x-request-timeout"}
        assert names == {b"host", b"x-kept", b"content-length", b"x-request-id"}

    with_tap(check)


@pytest.mark.parametrize("value", [b"a\rb", b"a\nb", b"a\0b", b"a b", b"\xff", b"x" * 200, b""])
def test_an_odd_request_id_is_not_passed_on(value: bytes) -> None:
    async def check(port: int, tap: Tap, gateway: Gateway, server: Server) -> None:
        reply = await ask(port, post(b"X-Request-Id: " + value, b"Content-Length: 2", body=b"{}"))
        assert tap.malformed == []
        for one in tap.seen:
            [request_id] = [content for name, content in one.headers if name == b"x-request-id"]
            assert request_id != value
            assert b"x-request-id: " + request_id in reply

    with_tap(check)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n"


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (HEAD + b"x: a\r\nset-cookie: b\r\n\r\n{}", 200),
        (HEAD + b"x: a\rset-cookie: b\r\n\r\n{}", 502),
        (HEAD + b"x: a\nset-cookie: b\r\n\r\n{}", 502),
        (HEAD + b"x: a\r\n set-cookie: b\r\n\r\n{}", 502),
        (HEAD + b"x: a\0\r\n\r\n{}", 502),
        (HEAD + b"x\r\n\r\n{}", 502),
        (HEAD + b"content-length: 2\r\n\r\n{}", 502),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n", 502),
        (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\rX: y\r\ncontent-length: 2\r\n\r\n{}", 502),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", 200),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: x-hop\r\nx-hop: 1\r\nkeep-alive: 1\r\n\r\n{}", 200),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-request-id: evil\r\n\r\n{}", 200),
    ],
)  # fmt: skip
def test_answers_of_workers_cannot_break_out(answer: bytes, status: int) -> None:
    tap = Tap()

    async def check(port: int, tap: Tap, gateway: Gateway, server: Server) -> None:
        tap.answer = answer
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        client = Client(reader, writer)
        for _ in range(2):  # the second one would see what is left of the first
            client.send(post(b"Content-Length: 2", body=b"{}"))
            got, headers, body = await client.reply()
            assert got in (status, 503)  # by then its breaker may be open
            assert b"evil" not in body
            assert not {b"x-hop", b"keep-alive"} & headers.keys()
            assert headers[b"x-request-id"] != b"evil"
            if b"set-cookie" in headers:
                assert b"\r\nset-cookie" in answer
        client.abort()

    with_tap(check, tap)
