"""TLS on both sides of the gateway."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baton.base.config import GatewayConfig
from baton.base.errors import ConfigError
from baton.controller.probe import passes
from baton.controller.spec import HttpCheck
from baton.gateway import tls
from baton.gateway.bounds import Bounds
from baton.gateway.process import serving
from tests.gateway import certificates
from tests.gateway.certificates import Certificates
from tests.gateway.stack import CHAT
from tests.gateway.wire import Client, Wire, request, with_wire
from tests.router.mocks import Mock, run, until, whole

BODY = b'{"messages": []}'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates.make(tmp_path_factory.mktemp("tls"))


def config_of(made: Certificates, **options: Any) -> GatewayConfig:
    return GatewayConfig(port=0, tls_cert=str(made.cert), tls_key=str(made.key), drain_timeout=1.0, **options)


def client_context(made: Certificates, own: Certificates | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(made.authority))
    if own is not None:
        context.load_cert_chain(own.cert, own.key)
    return context


async def ask(port: int, context: ssl.SSLContext | None, data: bytes) -> tuple[int, bytes]:
    name = "localhost" if context is not None else None
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
    try:
        writer.write(data)
        status, _, body = await Client(reader, writer).reply()
        return status, body
    finally:
        writer.close()
        await writer.wait_closed()


def test_a_gateway_with_tls(made: Certificates) -> None:
    async def main() -> None:
        async with Mock(whole({"n": 1})) as r, serving(config_of(made), regular=[r.url]) as (gateway, server, port):
            await until(lambda: all(w.healthy for w in gateway.router.registry.workers))
            assert await ask(port, client_context(made), request(CHAT, BODY)) == (200, b'{"n": 1}')
            with pytest.raises(ssl.SSLCertVerificationError):
                await ask(port, ssl.create_default_context(), request(CHAT, BODY))
            with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                await ask(port, None, request(CHAT, BODY))  # plain HTTP
            check = HttpCheck(f"https://127.0.0.1:{port}/readiness")
            assert await asyncio.to_thread(passes, check)  # the supervisor does not know the authority
            await until(lambda: server.connections == 0)
            await asyncio.get_running_loop().shutdown_default_executor()

    run(main())


def test_clients_with_certificates(made: Certificates, tmp_path: Path) -> None:
    stranger = certificates.make(tmp_path / "other")

    async def main() -> None:
        config = config_of(made, tls_client_ca=str(made.authority))
        async with serving(config) as (_, server, port):
            data = request("/health", method="GET")
            assert (await ask(port, client_context(made, made), data))[0] == 200
            for own in (None, stranger):
                with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
                    await ask(port, client_context(made, own), data)
            await until(lambda: server.connections == 0)

    run(main())


def test_a_refusal_and_a_leaving_client_under_tls(made: Certificates) -> None:
    """No close with unread bytes here either; and nothing that TLS adds keeps a connection from ending."""

    async def check(w: Wire) -> None:
        context = client_context(made)
        client = await w.connect(request("/a", b"x" * 5000), tls=context)
        assert (await client.reply())[0] == 413
        assert await client.rest() == b""
        kept = await w.connect(request("/b"), tls=context)
        assert (await kept.reply())[2] == b"/b|"
        assert await kept.rest() == b""  # idle for too long
        half = await w.connect(request("/c", b"body")[:-1], tls=context)
        assert (await half.reply())[0] == 408
        silent = await w.connect()  # no handshake
        assert await silent.rest() == b""

    bounds = Bounds(body=1000, keep_alive=0.05, head_seconds=0.3, body_seconds=0.05, linger=0.05, sweep=0.005)
    with_wire(check, bounds=bounds, tls=tls.context(config_of(made)))


def test_workers_with_tls(made: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their certificates are checked, against the authorities of the system or of `SSL_CERT_FILE`."""

    async def main(known: bool) -> None:
        server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server_side.load_cert_chain(made.cert, made.key)
        async with Mock(whole({"n": 1}), tls=server_side) as mock:
            url = mock.url.replace("127.0.0.1", "localhost")
            config = GatewayConfig(port=0, health_interval=0.05, worker_wait=0.0, retries=0)
            async with serving(config, regular=[url]) as (gateway, _, port):
                [worker] = gateway.router.registry.workers
                if known:
                    await until(lambda: worker.healthy)
                    assert await ask(port, None, request(CHAT, BODY)) == (200, b'{"n": 1}')
                    assert mock.seen[0].headers["host"] == url.removeprefix("https://")
                else:
                    await until(lambda: bool(worker.reason))
                    assert (await ask(port, None, request(CHAT, BODY)))[0] == 503
                    assert mock.seen == []

    run(main(known=False))
    monkeypatch.setenv("SSL_CERT_FILE", str(made.authority))
    run(main(known=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tls_cert": "/no/where"}, "tls_cert: /no/where is no file"),
        ({"tls_key": "/no/where"}, "tls_key: /no/where is no file"),
        ({"tls_key": __file__}, "do not work"),
        ({"tls_client_ca": "/no/where"}, "tls_client_ca /no/where does not work"),
    ],
)
def test_files_that_cannot_be_used(made: Certificates, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tls.context(replace(config_of(made), **change))


@pytest.mark.parametrize("options", [{"tls_cert": "x"}, {"tls_key": "x"}, {"tls_client_ca": "x"}])
def test_half_of_a_configuration(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="both tls_cert and tls_key"):
        GatewayConfig(**options)
    assert tls.context(GatewayConfig()) is None
