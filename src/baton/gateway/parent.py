"""Several processes behind one port: their parent starts them, starts them again, tells each what the others were told,
and serves nobody itself.

It makes the listening sockets, one for each child (the kernel divides connections among them), and keeps them: what
waits in the socket of a child that died is answered by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.base.config import GatewayConfig
from baton.base.errors import ConfigError
from baton.gateway.bus import Begin, BusEnd, Collect, Collected, Failed, Message, Said, Say, Started, Stop
from baton.gateway.listen import bind_several
from baton.gateway.roster import Change, Entry, Event, Removal
from baton.gateway.table import Table
from baton.gateway.tls import scheme

log = logging.getLogger("baton.gateway")

CHILD = "baton.gateway.child"
COLLECT_SECONDS = 1.0
"""For the metrics of all children; those of one that does not answer are missing."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds before a child is started again; doubles while it dies young."""
YOUNG = 10.0
MAX_BACKLOG = 16 << 20
"""Bytes that a child may leave unread before it is taken for dead."""
GRACE = 10.0
"""Seconds beyond `drain_timeout` until a child that was told to stop is killed."""


@dataclass(slots=True)
class _Child:
    number: int
    process: asyncio.subprocess.Process
    end: BusEnd
    started: bool = False


@dataclass(slots=True)
class _Poll:
    """A child that waits for the metrics of all."""

    asker: _Child
    id: int
    expected: int
    timer: asyncio.TimerHandle
    texts: dict[int, bytes] = field(default_factory=dict)


class Parent:
    """`run` until SIGINT or SIGTERM; a second one stops children at once."""

    def __init__(self, config: GatewayConfig, workers: Sequence[Entry]) -> None:
        self._config = config
        self._table = Table()
        self._workers = workers
        self._children: dict[int, _Child] = {}
        self._polls: dict[int, _Poll] = {}
        self._numbers = itertools.count()
        self._stops = 0
        self._stopping = asyncio.Event()
        self._failure = ""
        self._announced = False
        self._listeners: list[socket.socket] = []
        self._timers: list[asyncio.TimerHandle] = []

    async def run(self) -> None:
        """Raises `ConfigError` if the port cannot be had, or no child can start."""
        config, loop = self._config, asyncio.get_running_loop()
        for entry in self._workers:
            self._table.apply(entry, loop.time())
        self._listeners = bind_several(config.host, config.port, config.processes, reuse=config.reuse_port)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        try:
            async with asyncio.TaskGroup() as group:
                for index, listener in enumerate(self._listeners):
                    group.create_task(self._keep(index, listener))
        finally:
            self._let_go()
            for timer in (*(poll.timer for poll in self._polls.values()), *self._timers):
                timer.cancel()
        if self._failure:
            raise ConfigError(self._failure)

    def _stop(self) -> None:
        self._stops += 1
        self._stopping.set()
        self._let_go()
        for child in self._children.values():
            child.end.send(Stop())
        if self._stops == 1:
            patience = self._config.drain_timeout + GRACE
            self._timers.append(asyncio.get_running_loop().call_later(patience, self._kill))

    def _kill(self) -> None:
        for child in self._children.values():
            child.process.kill()

    def _let_go(self) -> None:
        """Before the children do: connections must not wait in a socket that only we hold."""
        for listener in self._listeners:
            listener.close()

    async def _keep(self, number: int, listener: socket.socket) -> None:
        """A child in this place, until we stop."""
        loop, pause = asyncio.get_running_loop(), FIRST_PAUSE
        while not self._stopping.is_set():
            begun = loop.time()
            code = await self._live(number, listener)
            if self._stopping.is_set():
                return
            pause = min(2 * pause, LONGEST_PAUSE) if loop.time() - begun < YOUNG else FIRST_PAUSE
            log.error("gateway process %d ended (status %d); another one starts in %.1f s", number, code, pause)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()

    async def _live(self, number: int, listener: socket.socket) -> int:
        """One child's life; its exit status."""
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = (theirs.fileno(), listener.fileno())
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", CHILD, *map(str, descriptors)),
                pass_fds=descriptors,
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us
            )
        child = self._children[number] = _Child(number, process, await BusEnd.open(ours))
        try:
            events = self._table.events(asyncio.get_running_loop().time())
            child.end.send(Begin(self._config, number, events))
            for _ in range(self._stops):
                child.end.send(Stop())
            while (message := await child.end.receive()) is not None:
                self._hear(child, message)
            return await self._reap(process)
        finally:
            del self._children[number]
            await child.end.close()
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _reap(self, process: asyncio.subprocess.Process) -> int:
        """It has closed its end of the bus, as the last thing it did or by dying."""
        try:
            async with asyncio.timeout(GRACE):
                return await process.wait()
        except TimeoutError:
            process.kill()
            return await process.wait()

    def _hear(self, child: _Child, message: Message) -> None:
        if isinstance(message, Entry | Change | Removal):
            self._pass_on(child, message)
        elif isinstance(message, Started):
            child.started = True
            self._announce()
        elif isinstance(message, Failed):
            self._fail(message.message)
        elif isinstance(message, Collect):
            self._collect(child, message.id)
        elif isinstance(message, Said):
            self._said(child, message)

    def _announce(self) -> None:
        config = self._config
        if not self._announced and sum(child.started for child in self._children.values()) == config.processes:
            self._announced = True
            port = self._listeners[0].getsockname()[1] if not self._stops else config.port
            log.info(
                "gateway listens on %s://%s:%d (%d processes)", scheme(config), config.host, port, config.processes
            )

    def _fail(self, message: str) -> None:
        """At the beginning it is the operator's fault. Later on the others serve, and it is tried again."""
        log.error("a gateway process cannot start: %s", message)
        if not self._announced:
            self._failure = message
            self._stop()

    def _pass_on(self, child: _Child, event: Event) -> None:
        self._table.apply(event, asyncio.get_running_loop().time())
        for other in self._children.values():
            if other.end.backlog > MAX_BACKLOG:
                other.process.kill()
            elif other is not child:
                other.end.send(event)

    def _collect(self, asker: _Child, id: int) -> None:
        asked = [child for child in self._children.values() if child.started]
        number = next(self._numbers)
        timer = asyncio.get_running_loop().call_later(COLLECT_SECONDS, self._answer, number)
        self._polls[number] = _Poll(asker, id, len(asked), timer)
        for child in asked:
            child.end.send(Say(number))

    def _said(self, child: _Child, said: Said) -> None:
        poll = self._polls.get(said.id)
        if poll is not None:
            poll.texts[child.number] = said.text
            if len(poll.texts) == poll.expected:
                self._answer(said.id)

    def _answer(self, number: int) -> None:
        poll = self._polls.pop(number)
        poll.timer.cancel()
        poll.asker.end.send(Collected(poll.id, poll.texts))
