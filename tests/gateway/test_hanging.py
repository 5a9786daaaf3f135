"""Workers that hang without hanging up: what runs there fails over, and who is only busy is left alone."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from baton.router.monitor import Problem, Record
from baton.router.registry import Description
from tests.gateway.stack import CHAT, RECEIPT, Stack, stack, with_stack
from tests.router.mocks import Exchange, Mock, events, hang, run, stream_then_hang, until, whole

STREAM = {"stream": True}
QUICK: dict[str, Any] = {"health_timeout": 0.2, "health_interval": 0.1}
"""A hanging worker is found out in about a second (the pause between failed checks is included)."""


def test_when_a_worker_hangs() -> None:
    silence, refusal = Problem("no reply", silent=True), Problem("503")
    record = Record(2)
    record.bad(silence, 10.0)
    assert not record.hangs(heard=0.0)
    record.bad(silence, 16.0)
    assert record.hangs(heard=9.9)
    assert not record.hangs(heard=11.0)  # a byte of a stream, after the first check was asked
    record.bad(silence, 22.0)
    assert record.hangs(heard=11.0)  # and then no more
    record.bad(refusal, 28.0)  # somebody is there
    record.bad(silence, 34.0)
    assert not record.hangs(heard=0.0)
    record.bad(silence, 40.0)
    assert record.hangs(heard=0.0)
    record.good()
    assert (record.failures, record.hangs(heard=0.0)) == (0, False)
    record.bad(silence, 50.0)
    assert not record.hangs(heard=0.0)


@pytest.mark.parametrize("hanging", ["prefill", "decode"])
@pytest.mark.parametrize("body", [{"messages": []}, STREAM], ids=["whole", "stream"])
def test_what_has_not_begun_is_tried_elsewhere(hanging: str, body: dict[str, Any]) -> None:
    async def main() -> None:
        async with Mock(whole({"from": "another"})) as other, stack(hang, hang, regular=[other], **QUICK) as s:
            worker = s.prefill if hanging == "prefill" else s.decode
            asked = asyncio.ensure_future(s.post(json=body))
            await until(lambda: bool(s.prefill.seen and s.decode.seen))
            worker.frozen = True
            started = time.perf_counter()
            reply = await asked
            assert (reply.status_code, reply.json()) == (200, {"from": "another"})
            assert time.perf_counter() - started < 3
            assert s.gateway.metrics.leg_errors == {(hanging, "silent"): 1}
            for leg in (*s.prefill.seen, *s.decode.seen):
                await asyncio.wait_for(leg.gone.wait(), 1)
            worker.frozen = False
            books = s.gateway.router.registry.find(worker.url)
            await until(lambda: books.healthy)  # it is used again when it answers again
            await s.settled()

    run(main())


def test_a_stream_that_has_begun_ends_with_an_error() -> None:
    async def check(s: Stack) -> None:
        async with s.client.stream("POST", CHAT, json=STREAM) as reply:
            parts = reply.aiter_raw()
            assert await anext(parts) == b'data: {"n":0}\n\n'
            s.decode.frozen = True
            started = time.perf_counter()
            rest = b"".join([part async for part in parts])
        assert time.perf_counter() - started < 3
        error, done = rest.strip().split(b"\n\n")
        assert done == b"data: [DONE]"
        said = json.loads(error.removeprefix(b"data: "))["error"]
        assert said["code"] == "worker_failed"
        assert "it hangs" in said["message"]

    with_stack(RECEIPT, stream_then_hang, check, **QUICK)


def test_nowhere_else_to_go() -> None:
    async def check(s: Stack) -> None:
        asked = asyncio.ensure_future(s.post())
        await until(lambda: bool(s.decode.seen))
        s.decode.frozen = True
        reply = await asked
        assert reply.status_code == 502
        assert "it hangs" in reply.json()["error"]["message"]
        refused = await s.post()
        assert refused.status_code == 503
        assert "no reply within" in refused.json()["error"]["message"]

    with_stack(hang, hang, check, **QUICK)


def test_who_streams_but_answers_no_checks_is_only_busy() -> None:
    """It gets nothing new, and keeps what it has."""

    async def check(s: Stack) -> None:
        async with s.client.stream("POST", CHAT, json=STREAM) as reply:
            parts = reply.aiter_raw()
            await anext(parts)
            s.decode.frozen = True
            await until(lambda: not s.gateway.router.registry.find(s.decode.url).healthy)
            rest = b"".join([part async for part in parts])
        assert rest.endswith(b"data: [DONE]\n\n")

    with_stack(RECEIPT, events(*[b"data: {}\n\n"] * 30, b"data: [DONE]\n\n", gap=0.05), check, **QUICK)


def test_who_refuses_checks_keeps_what_runs() -> None:
    """An engine that is restarted, a front that drains: they say so, and end their requests themselves."""
    release = asyncio.Event()

    async def slow(exchange: Exchange) -> None:
        await release.wait()
        exchange.whole({"ok": 1})

    async def check(s: Stack) -> None:
        asked = asyncio.ensure_future(s.post())
        await until(lambda: bool(s.decode.seen))
        s.decode.health = 503
        worker = s.gateway.router.registry.find(s.decode.url)
        await until(lambda: not worker.healthy)
        await asyncio.sleep(1.0)
        release.set()
        assert (await asked).json() == {"ok": 1}

    with_stack(RECEIPT, slow, check, **QUICK)


SERVER = """
import http.server, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
    def do_POST(self):
        self.send_response(200); self.send_header("content-type", "text/event-stream"); self.end_headers()
        for _ in range(10000):
            self.wfile.write(b"data: {}\\n\\n"); time.sleep(0.02)
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.mark.slow
def test_a_stopped_process() -> None:
    """As the kernel does it: connections stand, and take what is sent."""
    worker = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None

    async def main(port: int) -> None:
        async with stack(hang, hang, **QUICK) as s:
            registry = s.gateway.router.registry
            for mock in (s.prefill, s.decode):
                await s.gateway.router.remove(registry.find(mock.url))
            real = s.gateway.router.add(f"http://127.0.0.1:{port}", Description("regular"))
            await until(lambda: real.healthy)
            async with s.client.stream("POST", CHAT, json=STREAM) as reply:
                parts = reply.aiter_raw()
                await anext(parts)
                worker.send_signal(signal.SIGSTOP)
                rest = b"".join([part async for part in parts])
            assert b"it hangs" in rest
            assert rest.endswith(b"data: [DONE]\n\n")
            assert (await s.post()).status_code == 503
            worker.send_signal(signal.SIGCONT)
            await until(lambda: real.healthy)
            async with s.client.stream("POST", CHAT, json=STREAM) as reply:
                assert await anext(reply.aiter_raw())
            await until(lambda: real.in_flight == 0)

    try:
        run(main(int(worker.stdout.readline())))
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()
