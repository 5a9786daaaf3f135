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
from typing import cast

from baton.base.config import GatewayConfig
from baton.base.errors import ConfigError
from baton.gateway import accesslog, tls
from baton.gateway.app import Gateway
from baton.gateway.bounds import Bounds
from baton.gateway.listen import bind
from baton.gateway.parent import Parent
from baton.gateway.roster import Entry, Event
from baton.gateway.server import Server
from baton.router.origin import Origin
from baton.router.registry import Connector

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
    listener = bind(config.host, config.port, reuse=config.reuse_port)
    async with behind(listener, config, workers(prefill, decode, regular)) as (gateway, server):
        yield gateway, server, listener.getsockname()[1]


@contextlib.asynccontextmanager
async def behind(
    listener: socket.socket, config: GatewayConfig, events: Sequence[Event]
) -> AsyncIterator[tuple[Gateway, Server]]:
    """As `serving`, on a socket that is there already, which is closed at the end."""
    try:
        gateway = Gateway(config)
        try:
            for event in events:
                gateway.roster.apply(event)
            server = Server(gateway, Bounds(body=int(config.max_body_mb * 2**20)), tls.context(config))
            try:
                await server.listen([listener])
                yield gateway, server
            finally:
                await server.close(config.drain_timeout)
        finally:
            await gateway.close()
    finally:
        listener.close()


def run(config: GatewayConfig, prefill: list[tuple[str, int | None]], decode: list[str], regular: list[str]) -> None:
    """Serve until SIGINT or SIGTERM. Raises `ConfigError` for unusable addresses."""
    accesslog.configure(config.log_level, config.log_format)
    entries = workers(prefill, decode, regular, cast(Connector, config.connector))
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_run(config, entries) if config.processes == 1 else Parent(config, entries).run())


async def _run(config: GatewayConfig, entries: Sequence[Entry]) -> None:
    listener = bind(config.host, config.port, reuse=config.reuse_port)
    async with behind(listener, config, entries) as (_, server):
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        log.info("gateway listens on %s://%s:%d", tls.scheme(config), config.host, listener.getsockname()[1])
        settle()
        await server.stopped()


def settle() -> None:
    """For a process that serves from now on: what is there stays and need not be searched for garbage again, and there
    may be as many sockets as the system allows."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def workers(
    prefill: Sequence[tuple[str, int | None]],
    decode: Sequence[str],
    regular: Sequence[str],
    connector: Connector = "",
) -> list[Entry]:
    """Those who serve from the start. Raises `ConfigError` for addresses that are none, or twice there."""
    entries = [
        *(Entry(Origin.parse(url).url, "prefill", port, connector=connector) for url, port in prefill),
        *(Entry(Origin.parse(url).url, "decode", connector=connector) for url in decode),
        *(Entry(Origin.parse(url).url, "regular") for url in regular),
    ]
    urls: set[str] = set()
    for entry in entries:
        if entry.url in urls:
            raise ConfigError(f"worker {entry.url} is given twice")
        urls.add(entry.url)
    return entries


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where there is one; asyncio's own loop elsewhere."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
