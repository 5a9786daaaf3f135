"""One of several processes of a gateway: `python -m baton.gateway.child BUS LISTENER`, two inherited descriptors.

SIGTERM to this process alone lets its requests finish; its parent then starts another one in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import socket
import sys

from baton.base.errors import BatonError
from baton.gateway import accesslog
from baton.gateway.app import Gateway
from baton.gateway.bus import Begin, BusEnd, Collect, Collected, Failed, Said, Say, Started, Stop
from baton.gateway.exposition import merged
from baton.gateway.process import behind, loop_factory, settle
from baton.gateway.roster import Change, Entry, Removal
from baton.gateway.server import Server

COLLECT_SECONDS = 2.0
"""For the parent's answer; it has a shorter patience with the others."""


class Member:
    """What this process and the others tell each other."""

    def __init__(self, end: BusEnd, number: int, gateway: Gateway, server: Server) -> None:
        self._end = end
        self._number = number
        self._gateway = gateway
        self._server = server
        self._ids = itertools.count()
        self._asked: dict[int, asyncio.Future[dict[int, bytes]]] = {}
        self._own = gateway.control.exposed
        gateway.roster.told = end.send
        gateway.control.exposed = self.exposed

    async def listen(self) -> None:
        """Until the parent is gone; then this process goes, too."""
        while (message := await self._end.receive()) is not None:
            if isinstance(message, Entry | Change | Removal):
                self._gateway.roster.apply(message)
            elif isinstance(message, Stop):
                self._server.stop()
            elif isinstance(message, Say):
                self._end.send(Said(message.id, await self._own()))
            elif isinstance(message, Collected):
                asked = self._asked.pop(message.id, None)
                if asked is not None and not asked.done():
                    asked.set_result(message.texts)
        self._server.stop()

    async def exposed(self) -> bytes:
        """The metrics of all processes; if the parent does not answer, our own."""
        id = next(self._ids)
        asked = self._asked[id] = asyncio.get_running_loop().create_future()
        self._end.send(Collect(id))
        try:
            async with asyncio.timeout(COLLECT_SECONDS):
                return merged(await asked)
        except TimeoutError:
            return merged({self._number: await self._own()})
        finally:
            self._asked.pop(id, None)


async def serve(bus: socket.socket, listener: socket.socket) -> int:
    """The exit status."""
    end = await BusEnd.open(bus)
    try:
        begin = await end.receive()
        if not isinstance(begin, Begin):
            return 0  # the parent has gone
        accesslog.configure(begin.config.log_level, begin.config.log_format)
        try:
            await _serve(end, begin, listener)
        except BatonError as error:
            end.send(Failed(error.message))
            return 2
    finally:
        await end.close()
    return 0


async def _serve(end: BusEnd, begin: Begin, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    async with behind(listener, begin.config, begin.events) as (gateway, server):
        loop.add_signal_handler(signal.SIGTERM, server.stop)
        member = Member(end, begin.number, gateway, server)
        listening = loop.create_task(member.listen())
        end.send(Started())
        settle()
        await server.stopped()
    listening.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await listening


def main() -> None:
    bus, listener = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    listener.setblocking(False)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        sys.exit(runner.run(serve(bus, listener)))


if __name__ == "__main__":
    main()
