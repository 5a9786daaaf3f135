"""Health, workers, models, metrics, fan-outs, keys."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from baton.base.config import GatewayConfig
from baton.base.errors import ConfigError
from baton.gateway.process import run as run_gateway
from baton.router.registry import Description
from tests.gateway.stack import CHAT, RECEIPT, Stack, stack, with_stack
from tests.router.mocks import Exchange, Mock, events, hang, reset, run, until, whole


def test_readiness_follows_the_workers() -> None:
    async def check(s: Stack) -> None:
        reply = await s.client.get("/readiness")
        assert reply.status_code == 200
        assert reply.json() == {
            "status": "ready",
            "prefill": {"healthy": 1, "total": 1},
            "decode": {"healthy": 1, "total": 1},
            "regular": {"healthy": 0, "total": 0},
            "healthy_workers": 2,
            "total_workers": 2,
        }
        s.decode.health = 503
        decode = s.gateway.router.registry.find(s.decode.url)
        await until(lambda: not decode.healthy)
        reply = await s.client.get("/readiness")
        assert reply.status_code == 503
        assert "/health answered 503" in reply.json()["reason"]
        for path in ("/health", "/liveness"):
            assert (await s.client.get(path)).status_code == 200
        s.decode.health = 200
        await until(lambda: decode.healthy)

    with_stack(hang, hang, check)


def test_a_worker_that_is_down_at_start_is_found_later() -> None:
    async def main() -> None:
        async with Mock(whole({"late": 1})) as late:
            await late.stop()
            async with stack(hang, hang) as s:
                worker = s.gateway.router.add(late.url, Description("regular"))
                await until(lambda: "refused" in worker.reason)
                await late.start()
                await until(lambda: worker.healthy)

    run(main())


def test_workers_come_and_go_over_http() -> None:
    async def main() -> None:
        async with Mock(whole({"ok": 1})) as more, stack(RECEIPT, hang) as s:
            listed = (await s.client.get("/workers")).json()
            assert listed["stats"] == {"prefill_count": 1, "decode_count": 1, "regular_count": 0}
            assert {w["worker_type"]: w["bootstrap_port"] for w in listed["workers"]} == {
                "prefill": 8998,
                "decode": None,
            }
            new = {"url": more.url, "worker_type": "decode", "labels": {"unknown": "fields"}, "priority": 3}
            reply = await s.client.post("/workers", json=new)
            assert reply.status_code == 202
            place = reply.json()["location"]
            assert reply.json()["status"] == "accepted"
            added = s.gateway.router.registry.find(more.url)
            await until(lambda: added.healthy)
            assert (await s.client.get(place)).json()["is_healthy"]
            assert (await s.client.post("/workers", json=new)).status_code == 400
            for bad in ({}, {"url": "ftp://x"}, {"url": more.url, "worker_type": "x"}, [], "x"):
                assert (await s.client.post("/workers", json=bad)).status_code == 400
            gone = await s.client.delete("/workers", params={"url": s.decode.url})
            assert gone.status_code == 202
            assert (await s.post()).json() == {"ok": 1}
            assert (await s.client.delete(place)).status_code == 202
            assert (await s.client.delete(place)).status_code == 404
            assert (await s.client.get("/workers")).json()["total"] == 1

    run(main())


def test_info_comes_from_a_worker() -> None:
    async def decode(exchange: Exchange) -> None:
        exchange.whole({"path": exchange.path})

    async def check(s: Stack) -> None:
        for path in (
            "/v1/models",
            "/v1/models/a/b",
            "/v1/models/a%20%C3%BC",
            "/model_info",
            "/get_model_info",
            "/get_server_info",
        ):
            assert (await s.client.get(path)).json() == {"path": path}
        assert (await s.client.get("/server_info")).json() == s.decode.info
        s.decode.behave = reset
        assert (await s.client.get("/v1/models")).status_code == 503

    with_stack(hang, decode, check)


def test_fan_outs_reach_everybody() -> None:
    async def check(s: Stack) -> None:
        assert (await s.client.post("/flush_cache")).json()["success"]
        reply = await s.client.post("/abort_request", json={"rid": "r"})
        assert reply.status_code == 200
        for mock in (s.prefill, s.decode):
            assert [e.path for e in mock.seen] == ["/flush_cache", "/abort_request"]
            assert mock.seen[1].json == {"rid": "r"}
        s.decode.behave = whole({"error": "busy"}, 400)
        reply = await s.client.get("/flush_cache")
        assert reply.status_code == 502
        assert reply.json()["workers"][s.decode.url]["status"] == 400

    with_stack(whole({}), whole({}), check)


def test_a_body_that_all_workers_refuse_is_the_clients_fault() -> None:
    refusal = {"error": {"message": "rid is a number", "param": "rid"}}

    async def check(s: Stack) -> None:
        reply = await s.client.post("/abort_request", json={"rid": 5})
        assert (reply.status_code, reply.json()) == (400, refusal)
        s.prefill.behave = s.decode.behave = whole({"error": "the gateway's key, not the client's"}, 401)
        assert (await s.client.post("/abort_request", json={"rid": "r"})).status_code == 502

    with_stack(whole(refusal, 400), whole(refusal, 400), check)


@pytest.mark.parametrize("path", ["/abort_request", "/workers", "/flush_cache"])
def test_bodies_of_commands_have_a_limit_too(path: str) -> None:
    async def check(s: Stack) -> None:
        reply = await s.client.post(path, content=b" " * 3 * 2**20)
        assert reply.status_code == 413
        assert reply.headers["connection"] == "close"
        assert s.decode.seen == []

    with_stack(hang, hang, check, max_body_mb=1.0)


def test_a_worker_in_invalid_utf8() -> None:
    async def check(s: Stack) -> None:
        reply = await s.client.post("/workers", content=b'{"url": "\xff"}')
        assert reply.status_code == 400
        assert "a worker is" in reply.json()["error"]

    with_stack(hang, hang, check)


def test_keys_are_asked_for_everywhere_but_at_the_probes() -> None:
    async def check(s: Stack) -> None:
        for path in ("/health", "/readiness", "/liveness", "/metrics"):
            assert (await s.client.get(path)).status_code == 200
        for path in ("/workers", "/v1/models", "/server_info"):
            reply = await s.client.get(path)
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"] == "Bearer"
        assert (await s.post()).json()["error"]["type"] == "authentication_error"
        for wrong in ("Bearer secre", "Bearer secret2", "bearer", "secret"):
            assert (await s.post(headers={"authorization": wrong})).status_code == 401
        assert (
            await s.post(headers=[("authorization", "Bearer secret"), ("authorization", "Bearer other")])
        ).status_code == 401
        assert s.decode.seen == []
        assert (await s.post(headers={"authorization": "Bearer secret"})).status_code == 200

    with_stack(RECEIPT, whole({}), check, api_key="secret")


def test_unknown_routes() -> None:
    async def check(s: Stack) -> None:
        assert (await s.client.get("/nowhere")).json() == {"error": "GET /nowhere: no such route here"}
        reply = await s.client.get(CHAT)
        assert reply.status_code in (404, 405)
        assert reply.json()["error"]["code"]

    with_stack(hang, hang, check)


def metric(text: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def test_metrics_are_alive() -> None:
    async def check(s: Stack) -> None:
        await s.post(json={"stream": True})
        await s.post(content=b"{")
        await s.post("/v1/some/path/of/the/client", json={})
        s.decode.behave = reset
        await s.post()
        s.decode.behave = hang
        task = asyncio.create_task(s.post())
        await until(lambda: bool(s.decode.seen) and s.gateway.metrics.in_flight == 1)
        text = (await s.client.get("/metrics")).text
        task.cancel()
        await until(lambda: s.gateway.metrics.cancelled == 1)
        for name, value in {
            'baton_gateway_requests_total{route="/v1/chat/completions",status="200"}': 1,
            'baton_gateway_requests_total{route="/v1/chat/completions",status="400"}': 1,
            'baton_gateway_requests_total{route="other",status="200"}': 1,
            "baton_gateway_request_seconds_count": 4,
            "baton_gateway_ttft_seconds_count": 2,
            "baton_gateway_in_flight": 1,
            "baton_worker_healthy": 2,
            "baton_gateway_usable_workers": 2,
        }.items():
            assert metric(text, name) == value, name
        assert metric(text, "baton_gateway_leg_errors_total") >= 1
        assert metric(text, "baton_worker_load_tokens") > 0
        assert metric(text, "baton_worker_connections") >= 2
        assert "some/path" not in text

    with_stack(RECEIPT, events(b"data: 1\n\n"), check)


def test_an_address_in_use_is_said_clearly() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:\d+: Address already in use"):
            run_gateway(GatewayConfig(port=taken.getsockname()[1]), [], [], ["http://127.0.0.1:1"])


@pytest.mark.parametrize("workers", [["ftp://x"], ["http://a:1", "http://a:1"]])
def test_unusable_worker_urls_are_said_at_start(workers: list[str]) -> None:
    with pytest.raises(ConfigError):
        run_gateway(GatewayConfig(port=0), [], [], workers)


def test_as_a_process_until_sigterm() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "from baton.base.config import GatewayConfig; from baton.gateway.process import run; "
        f"run(GatewayConfig(port={port}), [('http://127.0.0.1:9', None)], ['http://127.0.0.1:9'], [])"
    ).replace("['http://127.0.0.1:9']", "['http://127.0.0.1:10']")
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.05)
        assert httpx.get(f"http://127.0.0.1:{port}/readiness").status_code == 503
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=10)
        assert b"Traceback" not in errors
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()
