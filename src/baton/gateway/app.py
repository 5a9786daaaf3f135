"""The gateway as an ASGI application, and as a process: `run`."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import uvicorn

from baton.base.config import GatewayConfig
from baton.base.errors import BadRequest, ConfigError, TooLarge, Unauthorized
from baton.gateway.control import OPEN_PATHS, Control, new_request_id
from baton.gateway.door import (
    AsgiAnswer,
    Inbound,
    Receive,
    Scope,
    Send,
    again,
    read_body,
    spawn_watch,
    swallow,
    target_of,
)
from baton.gateway.inference import PAIRED, Inference, InferenceOptions, refuse
from baton.gateway.metrics import Metrics
from baton.gateway.replies import RateLimited
from baton.router.dispatch import ClientGone, Pulse
from baton.router.health import Limits
from baton.router.monitor import Rhythm
from baton.router.registry import Role
from baton.router.router import Router, RouterOptions
from baton.router.upstream import Header

log = logging.getLogger("baton.gateway")

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
CLOSE: Header = (b"connection", b"close")
NATIVE = frozenset({"/generate", "/tokenize", "/detokenize"})
"""Routes for workers outside /v1/."""


class Gateway:
    """The ASGI application. Made inside a running loop; `close` releases everything it owns."""

    def __init__(self, config: GatewayConfig) -> None:
        self.router = Router(_router_options(config))
        self.metrics = Metrics(self.router.registry)
        self._config = config
        self._limit = int(config.max_body_mb * 2**20)
        self._key = b"Bearer " + config.api_key.encode() if config.api_key else b""
        self._loop = asyncio.get_running_loop()
        self._control = Control(self.router, self.metrics).app()
        options = InferenceOptions(config.request_timeout, config.stall_timeout, config.retries, config.worker_api_key)
        self._inference = Inference(self.router, self.metrics, options)

    async def close(self) -> None:
        await self.router.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        if not self._allowed(scope["headers"], path):
            error = Unauthorized('this gateway wants "Authorization: Bearer <api key>", and the key must be right')
            await refuse(AsgiAnswer(send), path, error, [CLOSE])
        elif scope["method"] in ("POST", "PUT") and (path.startswith("/v1/") or path in NATIVE):
            await self._infer(scope, receive, send)
        else:
            await self._manage(scope, receive, send)

    async def _manage(self, scope: Scope, receive: Receive, send: Send) -> None:
        """All that is not inference. Its bodies have the same limit."""
        try:
            body = await read_body(scope, receive, self._limit)
        except ClientGone:
            return
        except TooLarge as error:
            answer, path = AsgiAnswer(send), scope["path"]
            await refuse(answer, path, error, [CLOSE], last=lambda: swallow(receive, 4 * self._limit))
            return
        await self._control(scope, again(body, receive), send)

    async def _infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, metrics, answer = scope["path"], self.metrics, AsgiAnswer(send)
        started = time.perf_counter()
        request_id = _request_id(scope["headers"])
        own: list[Header] = [(b"x-request-id", request_id)]
        if metrics.in_flight >= self._config.max_concurrent_requests:
            error = RateLimited(
                f"{metrics.in_flight} requests are in progress, which is the limit here; try again soon"
            )
            await refuse(answer, path, error, [*own, CLOSE])
            metrics.finished(_route(path), 429, time.perf_counter() - started)
            return
        metrics.in_flight += 1
        watcher: asyncio.Task[None] | None = None
        try:
            body = await read_body(scope, receive, self._limit)
            pulse = Pulse(self._loop)
            watcher = spawn_watch(self._loop, receive, pulse.leave)
            inbound = Inbound(path, target_of(scope), scope["headers"], body)
            await self._inference.serve(inbound, answer, pulse, request_id)
        except ClientGone:
            metrics.cancelled += 1
            answer.status = 499
        except TooLarge as error:
            await refuse(answer, path, error, [*own, CLOSE], last=lambda: swallow(receive, 4 * self._limit))
        finally:
            if watcher is not None:
                watcher.cancel()
            metrics.in_flight -= 1
            metrics.finished(_route(path), answer.status, time.perf_counter() - started)

    def _allowed(self, headers: Sequence[Header], path: str) -> bool:
        if not self._key or path in OPEN_PATHS:
            return True
        given = [value for name, value in headers if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._key)


class Server(uvicorn.Server):
    """uvicorn, which tells when it listens, and leaves signals to the process."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """The first time: let requests finish. The second time: do not."""
        self.force_exit = self.should_exit
        self.should_exit = True


@contextlib.asynccontextmanager
async def serving(
    config: GatewayConfig,
    prefill: Sequence[tuple[str, int | None]] = (),
    decode: Sequence[str] = (),
    regular: Sequence[str] = (),
) -> AsyncIterator[tuple[Gateway, Server, asyncio.Task[None], int]]:
    """A listening gateway inside the running loop: (gateway, server, its task, port). Leaving the block lets requests
    in progress finish, for `drain_timeout` seconds at most. Raises `ConfigError` for unusable addresses."""
    listener = bind(config.host, config.port)
    gateway = Gateway(config)
    try:
        _register(gateway.router, prefill, decode, regular)
        server = Server(_uvicorn_config(gateway, config))
        task = asyncio.get_running_loop().create_task(server.serve(sockets=[listener]))
        await server.listening.wait()
        try:
            yield gateway, server, task, listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task
    finally:
        await gateway.close()
        listener.close()


def run(config: GatewayConfig, prefill: list[tuple[str, int | None]], decode: list[str], regular: list[str]) -> None:
    """Serve until SIGINT or SIGTERM. Raises `ConfigError` for unusable addresses."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=config.log_level.upper())
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_run(config, prefill, decode, regular))


async def _run(
    config: GatewayConfig, prefill: list[tuple[str, int | None]], decode: list[str], regular: list[str]
) -> None:
    async with serving(config, prefill, decode, regular) as (_, server, task, port):
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        log.info("gateway listens on http://%s:%d", config.host, port)
        await task


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `ConfigError` if the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(4096)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


def _register(
    router: Router, prefill: Sequence[tuple[str, int | None]], decode: Sequence[str], regular: Sequence[str]
) -> None:
    workers: list[tuple[str, Role, int | None]] = [
        *((url, "prefill", port) for url, port in prefill),
        *((url, "decode", None) for url in decode),
        *((url, "regular", None) for url in regular),
    ]
    for url, role, port in workers:
        try:
            router.add(url, role, port)
        except BadRequest as error:
            raise ConfigError(error.message) from error


def _uvicorn_config(gateway: Gateway, config: GatewayConfig) -> uvicorn.Config:
    return uvicorn.Config(
        gateway,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(config.drain_timeout)),
    )


def _router_options(config: GatewayConfig) -> RouterOptions:
    key = config.worker_api_key or config.api_key
    return RouterOptions(
        prefill_policy=config.prefill_policy or config.policy,
        decode_policy=config.decode_policy or config.policy,
        connect_timeout=config.connect_timeout,
        health=Rhythm(config.health_interval, config.health_timeout, config.health_failures),
        breaker=Limits(failures=config.breaker_failures),
        worker_headers=((b"authorization", b"Bearer " + key.encode()),) if key else (),
    )


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where there is one; asyncio's own loop elsewhere."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _request_id(headers: Sequence[Header]) -> bytes:
    """The client's if it is a decent one, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            return value
    return new_request_id()


def _route(path: str) -> str:
    """The route as a metric label: one of a fixed set."""
    return path if path in PAIRED else "other"
