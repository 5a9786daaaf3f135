"""Listening sockets."""

from __future__ import annotations

import socket

from baton.base.errors import ConfigError

BACKLOG = 4096


def bind(host: str, port: int, *, reuse: bool = False) -> socket.socket:
    """A listening socket. `reuse`: others that want that too may listen on the same port, and connections are divided
    among them. Raises `ConfigError` if the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


def bind_several(host: str, port: int, count: int, *, reuse: bool) -> list[socket.socket]:
    """`count` sockets on one port. Unless `reuse`, nobody else may be there. Raises `ConfigError`."""
    if not reuse:
        with bind(host, port) as alone:
            port = alone.getsockname()[1]
    listeners: list[socket.socket] = []
    try:
        for _ in range(count):
            listeners.append(bind(host, port, reuse=True))
            port = listeners[0].getsockname()[1]
    except ConfigError:
        for listener in listeners:
            listener.close()
        raise
    return listeners
