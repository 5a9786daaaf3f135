"""Mooncake's bootstrap servers: which engine a prefill worker is. Asked once for each of them, until it fails.

The first request to a prefill worker waits for its `GET /query`; those that come meanwhile wait with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container
from dataclasses import dataclass

import msgspec

from baton.router.call import Failure, Fault
from baton.router.fetch import FetchFailed, Silence, fetch
from baton.router.origin import Origin
from baton.router.registry import Worker
from baton.router.upstream import Pool

PORT = 8998
QUERY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Engine:
    id: str
    address: str
    """URL of its bootstrap server, for the decode worker."""


Told = Callable[[Engine | Failure], None]


class _Rank(msgspec.Struct):
    engine_id: str


_ranks = msgspec.json.Decoder(dict[str, _Rank])


class Directory:
    """Owns the queries in progress: `close` ends them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connect_timeout: float) -> None:
        self._loop = loop
        self._connect_timeout = connect_timeout
        self._engines: dict[Worker, Engine] = {}
        self._waiting: dict[Worker, list[Told]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def find(self, worker: Worker, told: Told) -> None:
        """`told` hears of the engine: at once if it is known, else from a later turn of the event loop."""
        engine = self._engines.get(worker)
        if engine is not None:
            told(engine)
        elif worker in self._waiting:
            self._waiting[worker].append(told)
        else:
            self._waiting[worker] = [told]
            task = self._loop.create_task(self._ask(worker))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def forget(self, worker: Worker) -> None:
        """Something went wrong there: it may be another engine by now."""
        self._engines.pop(worker, None)

    def keep(self, workers: Container[Worker]) -> None:
        """All others are away, and may be others when they come back."""
        for worker in [worker for worker in self._engines if worker not in workers]:
            del self._engines[worker]

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, worker: Worker) -> None:
        said: Engine | Failure = Failure(Fault.CANCELLED, "the gateway is closing")
        try:
            said = await self._query(worker)
        finally:
            if isinstance(said, Engine):
                self._engines[worker] = said
            for told in self._waiting.pop(worker):
                told(said)

    async def _query(self, worker: Worker) -> Engine | Failure:
        origin = Origin(worker.origin.host, worker.bootstrap_port or PORT, tls=False)
        pool = Pool(origin, connect_timeout=self._connect_timeout)
        try:
            reply = await fetch(pool, "GET", "/query", timeout=QUERY_SECONDS, limit=1 << 20)
            ranks = list(_ranks.decode(reply.body).values()) if reply.ok else []
        except FetchFailed as error:
            return Failure(Fault.SILENT if isinstance(error, Silence) else Fault.REFUSED, f"bootstrap server: {error}")
        except msgspec.MsgspecError as error:
            return Failure(Fault.GARBAGE, f"bootstrap server: {error}")
        finally:
            await pool.close()
        if len(ranks) != 1:  # with more nobody could say which of them will prefill
            return Failure(Fault.GARBAGE, f"bootstrap server: {reply.status} with {len(ranks)} engines instead of one")
        return Engine(ranks[0].engine_id, origin.url)
