"""A front tells gateways of itself: real HTTP, mock gateways and a real one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.base.config import GatewayConfig
from baton.base.errors import ConfigError
from baton.gateway.app import Gateway
from baton.gateway.process import serving as gateway_serving
from baton.worker.registrar import Card, Place, Registrar, secret
from tests.router.mocks import Exchange, Mock, run, until, whole

from .rig import MODEL, Rig, serving

TTL = 0.6
COMPLETION = {"model": MODEL, "prompt": "hello", "max_tokens": 3}


@contextlib.asynccontextmanager
async def front(model_dir: Path, run_dir: Path, *gateways: str, **options: Any) -> AsyncIterator[Rig]:
    """In threads of its own, so that gateways in this loop can answer it."""
    run_dir.mkdir(exist_ok=True)
    context = serving(model_dir, run_dir, register=gateways, **{"register_ttl": TTL, **options})
    rig = await asyncio.to_thread(context.__enter__)
    try:
        yield rig
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


def stop(rig: Rig) -> None:
    rig.loop.call_soon_threadsafe(rig.front.stop)


def posts(mock: Mock) -> list[Exchange]:
    return [exchange for exchange in mock.seen if exchange.method == "POST"]


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="baton.front"):
        yield caplog


def test_it_registers_when_it_is_ready_renews_and_deregisters(model_dir: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with Mock(whole({}, 202)) as one, Mock(whole({}, 202)) as two:
            options = {"register_key": "secret", "engine": False}
            async with front(model_dir, tmp_path, one.url, two.url + "/", **options) as rig:
                async with httpx.AsyncClient() as client:
                    assert (await client.get(f"{rig.url}/health")).status_code == 503
                assert one.seen == two.seen == []  # no engine, no worker
                await asyncio.to_thread(rig.start_engine)
                await until(lambda: len(posts(one)) >= 3 and len(posts(two)) >= 3)
                for exchange in (*posts(one), *posts(two)):
                    assert exchange.path == "/workers"
                    assert exchange.headers["authorization"] == "Bearer secret"
                    assert exchange.json == {
                        "url": rig.url, "worker_type": "regular", "bootstrap_port": None, "instance": "instance-1",
                        "ttl": TTL, "runtime": "baton",
                    }  # fmt: skip
                engine = rig.engine
                assert engine is not None
                await asyncio.to_thread(engine.kill)
                count = len(posts(one))
                await until(lambda: len(posts(one)) > count)  # the front lives: that it is ill, `/health` says
                await asyncio.to_thread(rig.start_engine)
                await until(lambda: posts(one)[-1].json["instance"] == "instance-2")
                stop(rig)
                for mock in (one, two):
                    await until(lambda mock=mock: mock.seen[-1].method == "DELETE")  # type: ignore[misc]
                    assert mock.seen[-1].path == f"/workers?url=http%3A%2F%2F127.0.0.1%3A{rig.front.port}"
                await until(lambda: not rig.thread.is_alive())
                assert one.seen[-1].method == two.seen[-1].method == "DELETE"

    run(main(), 40)


def test_gateways_that_fail_do_no_harm(model_dir: Path, tmp_path: Path, quiet: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with Mock(whole({"error": "no"}, 401)) as refusing, Mock(whole({}, 202)) as gone:
            await gone.stop()
            urls = (refusing.url, gone.url, "http://no-such-host.invalid:1")
            async with front(model_dir, tmp_path, *urls) as rig, httpx.AsyncClient() as client:
                await until(lambda: len(posts(refusing)) >= 3)
                assert (await client.post(f"{rig.url}/v1/completions", json=COMPLETION)).status_code == 200
                await gone.start()
                await until(lambda: len(posts(gone)) >= 2)
                refusing.behave = whole({}, 200)
                await until(lambda: f"registered with gateway {refusing.url}" in quiet.text)
            said = [record.getMessage() for record in quiet.records if refusing.url in record.getMessage()]
            assert len(said) == 2  # only news
            assert "answers 401" in said[0]

    run(main(), 40)


def test_a_gateway_that_does_not_answer_does_not_delay_the_end_for_long(model_dir: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with Mock(whole({}, 202)) as mock, front(model_dir, tmp_path, mock.url) as rig:
            await until(lambda: bool(posts(mock)))
            mock.frozen = True
            begun = asyncio.get_running_loop().time()
            stop(rig)
            await until(lambda: not rig.thread.is_alive(), 10)
            assert asyncio.get_running_loop().time() - begun < 5

    run(main(), 40)


@contextlib.asynccontextmanager
async def gateway(port: int = 0) -> AsyncIterator[tuple[Gateway, str]]:
    async with gateway_serving(GatewayConfig(port=port, health_interval=0.1, drain_timeout=2.0)) as (made, _, at):
        yield made, f"http://127.0.0.1:{at}"


def usable(made: Gateway, *rigs: Rig) -> bool:
    return {rig.url for rig in rigs} == {worker.url for worker in made.router.registry.snapshot.workers}


def test_no_request_is_lost_while_workers_come_and_go(model_dir: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            gateway() as (made, url),
            httpx.AsyncClient(base_url=url, timeout=15) as client,
            front(model_dir, tmp_path / "one", url) as one,
        ):
            await until(lambda: usable(made, one))
            ended = asyncio.Event()

            async def ask() -> int:
                count = 0
                while not ended.is_set():
                    reply = await client.post("/v1/completions", json=COMPLETION)
                    assert reply.status_code == 200, reply.text
                    count += 1
                return count

            asking = [asyncio.create_task(ask()) for _ in range(3)]
            async with front(model_dir, tmp_path / "two", url) as two:
                await until(lambda: usable(made, one, two))
                stop(two)
                await until(lambda: usable(made, one))
                await until(lambda: not two.thread.is_alive(), 10)
            await until(lambda: len(made.router.registry.workers) == 1)
            ended.set()
            assert min(await asyncio.gather(*asking)) > 0

    run(main(), 60)


def test_a_gateway_that_was_restarted_knows_the_worker_again(model_dir: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway() as (made, url):
            port = int(url.rpartition(":")[2])
            context = front(model_dir, tmp_path, url)
            rig = await context.__aenter__()
            await until(lambda: usable(made, rig))
        try:
            async with gateway(port) as (again, _):
                await until(lambda: usable(again, rig))
        finally:
            await context.__aexit__(None, None, None)

    run(main(), 40)


# --- parts


def test_where_a_worker_is_reached() -> None:
    async def main() -> None:
        gateway = "http://127.0.0.1:9"
        assert await Place("10.0.0.1", 30).seen_from(gateway) == "http://10.0.0.1:30"
        assert await Place("::1", 30).seen_from(gateway) == "http://[::1]:30"
        assert await Place("0.0.0.0", 30).seen_from(gateway) == "http://127.0.0.1:30"
        assert await Place("0.0.0.0", 30, "https://w.example").seen_from(gateway) == "https://w.example"
        await asyncio.get_running_loop().shutdown_default_executor()

    run(main())


@pytest.mark.parametrize("url", ["gateway:8000", "ftp://g", "http://", "http://g/?x=1"])
def test_what_is_no_url_is_said_at_start(url: str) -> None:
    def card(url: str) -> Card | None:
        return None

    with pytest.raises(ConfigError, match="--register"):
        Registrar([url], Place("h", 1), "", 1.0, card)
    with pytest.raises(ConfigError, match="--advertise-url"):
        Registrar(["http://g"], Place("h", 1, url), "", 1.0, card)


def test_a_loopback_address_told_to_another_machine_is_warned_of(quiet: pytest.LogCaptureFixture) -> None:
    Registrar(["http://127.0.0.1:1"], Place("127.0.0.1", 1), "", 1.0, lambda url: None)
    assert not quiet.records
    Registrar(["http://gateway:1"], Place("127.0.0.1", 1), "", 1.0, lambda url: None)
    assert "--advertise-url" in quiet.text


def test_keys_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("abc\n")
    assert secret(f"@{tmp_path / 'key'}") == "abc"
    assert secret("plain") == "plain"
    with pytest.raises(ConfigError, match="nowhere"):
        secret(f"@{tmp_path / 'nowhere'}")
