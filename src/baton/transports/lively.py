"""Options of a TCP connection between workers."""

from __future__ import annotations

import socket

SILENCE_MS = 10_000
"""A peer whose host does not acknowledge for this long is dead."""


def make_lively(connection: socket.socket) -> None:
    """Small messages at once; a host that has vanished is noticed. Raises `OSError` if the connection is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wanted = (
        ("TCP_NODELAY", 1),
        ("TCP_KEEPIDLE", 4),
        ("TCP_KEEPINTVL", 2),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", SILENCE_MS),
    )
    for name, value in wanted:
        option = getattr(socket, name, None)  # not every OS has all of them
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
