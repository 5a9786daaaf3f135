"""What is done to the workers while they work: seeded, and paced by the answers that come, not by time."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import signal
from collections.abc import Sequence

import psutil

from tests.chaos.load import Load
from tests.chaos.stage import Stage


class Blow(enum.Enum):
    DECODE_ENGINE = "D's engine is killed"
    DECODE_FRONT = "D's front is killed"
    PREFILL_ENGINE = "P's engine is killed"
    PREFILL_FRONT = "P's front is killed"
    PAIR = "P's and D's engines are killed"
    ALL_PREFILL = "both P's engines are killed"
    ALL_DECODE = "both D's engines are killed"
    DECODE_ENGINE_STOPS = "D's engine stands still"
    DECODE_FRONT_STOPS = "D's front stands still"
    PREFILL_ENGINE_STOPS = "P's engine stands still"
    PREFILL_FRONT_STOPS = "P's front stands still"
    DECODE_PARTED = "the network before D is split"
    PREFILL_PARTED = "the network before P is split"


class Tormentor:
    """What stands still, or is cut off, stays so until everything that was in flight then has been answered."""

    def __init__(self, stage: Stage, load: Load) -> None:
        self._stage, self._load = stage, load
        self._stopped: list[psutil.Process] = []

    async def run(self, blows: Sequence[Blow], every: int) -> None:
        """A blow after every `every` answers; of so many requests must the load consist."""
        start = len(self._load.outcomes)
        for index, blow in enumerate(blows):
            await self._load.answered(start + index * every + every // 4)
            try:
                await self._strike(blow)
                await self._load.those_in_flight()
            finally:
                self._relent()

    async def _strike(self, blow: Blow) -> None:
        stage = self._stage
        prefill, decode = (stage.random.choice(stage.names(role)) for role in ("prefill", "decode"))
        match blow:
            case Blow.DECODE_ENGINE:
                await stage.signal(decode, "engine", signal.SIGKILL)
            case Blow.DECODE_FRONT:
                await stage.signal(decode, "front", signal.SIGKILL)
            case Blow.PREFILL_ENGINE:
                await stage.signal(prefill, "engine", signal.SIGKILL)
            case Blow.PREFILL_FRONT:
                await stage.signal(prefill, "front", signal.SIGKILL)
            case Blow.PAIR:
                await self._kill_engines(prefill, decode)
            case Blow.ALL_PREFILL:
                await self._kill_engines(*stage.names("prefill"))
            case Blow.ALL_DECODE:
                await self._kill_engines(*stage.names("decode"))
            case Blow.DECODE_ENGINE_STOPS:
                self._stopped.append(await stage.signal(decode, "engine", signal.SIGSTOP))
            case Blow.DECODE_FRONT_STOPS:
                self._stopped.append(await stage.signal(decode, "front", signal.SIGSTOP))
            case Blow.PREFILL_ENGINE_STOPS:
                self._stopped.append(await stage.signal(prefill, "engine", signal.SIGSTOP))
            case Blow.PREFILL_FRONT_STOPS:
                self._stopped.append(await stage.signal(prefill, "front", signal.SIGSTOP))
            case Blow.DECODE_PARTED:
                stage.proxies[decode].part()
            case Blow.PREFILL_PARTED:
                stage.proxies[prefill].part()

    async def _kill_engines(self, *names: str) -> None:
        await asyncio.gather(*(self._stage.signal(name, "engine", signal.SIGKILL) for name in names))

    def _relent(self) -> None:
        for process in self._stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        self._stopped.clear()
        for proxy in self._stage.proxies.values():
            if proxy.parted:
                proxy.join()
