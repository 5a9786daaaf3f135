"""The gateway as a process: a listening socket, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence

from baton.base.config import GatewayConfig
from baton.base.errors import BadRequest, ConfigError
from baton.gateway import accesslog
from baton.gateway.app import Gateway
from baton.gateway.bounds import Bounds
from baton.gateway.server import Server
from baton.router.registry import Description, Role
from baton.router.router import Router

log = logging.getLogger("baton.gateway")


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
    accesslog.configure(config.log_level, config.log_format)
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
        _settle()
        await server.stopped()


def _settle() -> None:
    """For a process that serves from now on: what is there stays and need not be searched for garbage again, and there
    may be as many sockets as the system allows."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


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


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where there is one; asyncio's own loop elsewhere."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
