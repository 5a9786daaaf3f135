"""The gateway as an application, and as a process: `run`."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import cast

from baton.base.config import GatewayConfig
from baton.base.errors import BadRequest, BatonError, ConfigError, Unauthorized
from baton.gateway import asgi
from baton.gateway.control import OPEN_PATHS, Control, new_request_id
from baton.gateway.door import Answer, Inbound
from baton.gateway.inference import PAIRED, Inference, InferenceOptions
from baton.gateway.journey import Patience
from baton.gateway.metrics import Metrics
from baton.gateway.replies import RateLimited, error_body, error_headers, refuse
from baton.gateway.server import Bounds, Server
from baton.router.call import Header
from baton.router.health import Limits
from baton.router.legs import ClientGone, Pulse
from baton.router.monitor import Rhythm
from baton.router.planner import PlannerOptions, Split
from baton.router.registry import Description, Role
from baton.router.router import Router, RouterOptions

log = logging.getLogger("baton.gateway")

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
NATIVE = frozenset({"/generate", "/tokenize", "/detokenize"})
"""Routes for workers outside /v1/."""


class Gateway:
    """The application. Made inside a running loop; `close` releases everything it owns."""

    def __init__(self, config: GatewayConfig) -> None:
        self.router = Router(_router_options(config))
        self.metrics = Metrics(self.router.registry)
        self._config = config
        self._key = b"Bearer " + config.api_key.encode() if config.api_key else b""
        self._loop = asyncio.get_running_loop()
        self._control = Control(self.router, self.metrics).app()
        patience = Patience(config.stall_timeout, config.stage_timeout, config.worker_wait, config.retries)
        options = InferenceOptions(config.request_timeout, patience, config.worker_api_key)
        self._inference = Inference(self.router, self.metrics, options)

    async def close(self) -> None:
        await self.router.close()

    async def __call__(self, inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        path = inbound.path
        if not self._allowed(inbound.headers, path):
            error = Unauthorized('this gateway wants "Authorization: Bearer <api key>", and the key must be right')
            refuse(answer, path, error, [])
        elif inbound.method in ("POST", "PUT") and (path.startswith("/v1/") or path in NATIVE):
            await self._infer(inbound, answer, pulse)
        else:
            await asgi.serve(self._control, inbound, answer, pulse)

    def refused(self, path: str, status: int, code: str, message: str) -> tuple[list[Header], bytes]:
        error = BatonError(message)
        error.status, error.code = status, code
        return error_headers(error), error_body(path, error)

    async def _infer(self, inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        path, metrics = inbound.path, self.metrics
        started = time.perf_counter()
        request_id = _request_id(inbound.headers)
        if metrics.in_flight >= self._config.max_concurrent_requests:
            error = RateLimited(
                f"{metrics.in_flight} requests are in progress, which is the limit here; try again soon"
            )
            refuse(answer, path, error, [(b"x-request-id", request_id)])
            metrics.finished(_route(path), 429, time.perf_counter() - started)
            return
        metrics.in_flight += 1
        status = 0
        try:
            await self._inference.serve(inbound, answer, pulse, request_id)
            status = answer.status
        except ClientGone:
            metrics.cancelled += 1
            status = 499
        finally:
            metrics.in_flight -= 1
            metrics.finished(_route(path), status, time.perf_counter() - started)

    def _allowed(self, headers: Sequence[Header], path: str) -> bool:
        if not self._key or path in OPEN_PATHS:
            return True
        given = [value for name, value in headers if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._key)


@contextlib.asynccontextmanager
async def serving(
    config: GatewayConfig,
    prefill: Sequence[tuple[str, int | None]] = (),
    decode: Sequence[str] = (),
    regular: Sequence[str] = (),
) -> AsyncIterator[tuple[Gateway, Server, int]]:
    """A listening gateway inside the running loop: (gateway, server, port). Leaving the block lets requests in progress
    finish, for `drain_timeout` seconds at most. Raises `ConfigError` for unusable addresses."""
    listener = bind(config.host, config.port)
    gateway = Gateway(config)
    try:
        _register(gateway.router, prefill, decode, regular)
        server = Server(gateway, Bounds(body=int(config.max_body_mb * 2**20)))
        try:
            await server.listen([listener])
            yield gateway, server, listener.getsockname()[1]
        finally:
            await server.close(config.drain_timeout)
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
    async with serving(config, prefill, decode, regular) as (_, server, port):
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        log.info("gateway listens on http://%s:%d", config.host, port)
        await server.stopped()


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
            router.add(url, Description(role, port))
        except BadRequest as error:
            raise ConfigError(error.message) from error


def _router_options(config: GatewayConfig) -> RouterOptions:
    key = config.worker_api_key or config.api_key
    return RouterOptions(
        planner=PlannerOptions(
            prefill_policy=config.prefill_policy or config.policy,
            decode_policy=config.decode_policy or config.policy,
            split=cast(Split, config.split),
            min_split_tokens=config.min_split_tokens,
        ),
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
