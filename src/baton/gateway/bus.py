"""What the processes of one gateway tell each other: typed messages over a socket pair, through their parent.

    parent ── Begin, Event, Say, Collected, Stop ──▶ child
    child  ── Started or Failed, Event, Collect, Said ──▶ parent, which hands events on to the other children

The end of one side is the end of the connection: a child whose parent dies stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import TypeAlias

import msgspec

from baton.base.config import GatewayConfig
from baton.gateway.roster import Change, Entry, Event, Removal

LENGTH = struct.Struct("!I")


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """What to be, and who serves."""

    config: GatewayConfig
    number: int
    events: list[Event]


class Started(msgspec.Struct, frozen=True, tag="started"):
    """It takes connections."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """It cannot start, and another one could not either."""

    message: str


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """The first time: let requests finish. The second time: do not."""


class Collect(msgspec.Struct, frozen=True, tag="collect"):
    """A child wants to know the metrics of all."""

    id: int


class Say(msgspec.Struct, frozen=True, tag="say"):
    """Say your metrics."""

    id: int


class Said(msgspec.Struct, frozen=True, tag="said"):
    id: int
    text: bytes


class Collected(msgspec.Struct, frozen=True, tag="collected"):
    """The metrics of those who answered, by process."""

    id: int
    texts: dict[int, bytes]


Message: TypeAlias = Begin | Started | Failed | Stop | Collect | Say | Said | Collected | Entry | Change | Removal


class BusEnd:
    """One end of the connection between parent and child."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)

    @classmethod
    async def open(cls, sock: socket.socket) -> BusEnd:
        return cls(*await asyncio.open_unix_connection(sock=sock))

    @property
    def backlog(self) -> int:
        """Bytes the other side has not taken."""
        return self._writer.transport.get_write_buffer_size()

    def send(self, message: Message) -> None:
        """Never waits, and raises nothing: a lost connection is seen by whoever receives."""
        if not self._writer.is_closing():
            body = self._encoder.encode(message)
            self._writer.write(LENGTH.pack(len(body)) + body)

    async def receive(self) -> Message | None:
        """None: the other side is gone."""
        try:
            (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            return self._decoder.decode(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, OSError):
            return None

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
