"""The load: sends each job at its time, or when the cap admits it, and records what comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec

from baton.base.clock import Clock
from baton.lab.client import Client, WireError
from baton.lab.config import BenchConfig
from baton.lab.endpoints import Chunk, Endpoint
from baton.lab.metrics import INTERRUPTED, Record
from baton.lab.workload import Job

DETAIL = 300
"""Characters of a server's error message that are kept."""


class Recorder:
    """Writes one answer down, chunk by chunk. Errors inside become part of the record."""

    def __init__(self, record: Record, endpoint: Endpoint, start: float) -> None:
        self.record = record
        self._endpoint = endpoint
        self._start = start

    def event(self, data: bytes, at: float) -> None:
        if data == b"[DONE]":
            return
        chunk = self._read(data)
        # An event that repeats the whole text (`/generate`) is new only if the count of tokens went up.
        grown = chunk.output_tokens is None or chunk.output_tokens > self.record.output_tokens
        if chunk.content and grown:
            self.record.chunks.append(at - self._start)
        self._note(chunk)

    def answer(self, status: int, body: bytes, config: BenchConfig) -> None:
        """The end of the answer: what is missing or wrong is named."""
        record = self.record
        record.status = status
        if status != 200:
            self.fail(f"http_{status}", body.decode(errors="replace"))
            return
        if not config.stream:
            self._note(self._read(body))
        elif not record.chunks and not record.error:
            self.fail("empty", "the answer has no content" if not body else "the answer was not a stream")
        if not record.output_tokens and record.chunks:
            record.output_tokens, record.counted = len(record.chunks), True
        record.prompt_tokens = record.prompt_tokens or record.prompt_len
        if config.ignore_eos and not record.counted and record.output_tokens != record.asked_len:
            self.fail("wrong_length", f"{record.output_tokens} tokens instead of {record.asked_len}")

    def fail(self, kind: str, detail: str) -> None:
        """The first failure is the one that counts."""
        if not self.record.error:
            self.record.error, self.record.detail = kind, detail[:DETAIL]

    def _read(self, data: bytes) -> Chunk:
        try:
            return self._endpoint.read(data)
        except msgspec.MsgspecError as error:
            self.fail("bad_chunk", f"{error}: {data[:80]!r}")
            return Chunk()

    def _note(self, chunk: Chunk) -> None:
        record = self.record
        if chunk.error:
            self.fail("stream_error", chunk.error)
        if chunk.prompt_tokens is not None:
            record.prompt_tokens = chunk.prompt_tokens
        if chunk.output_tokens is not None:
            record.output_tokens = chunk.output_tokens
        if chunk.cached_tokens is not None:
            record.cached_tokens = chunk.cached_tokens


class Load:
    """Drives jobs against a server. Cancel `run` to end it early: `records` then holds what there is."""

    def __init__(self, client: Client, endpoint: Endpoint, config: BenchConfig, clock: Clock) -> None:
        self.records: list[Record] = []
        """Of all requests that were sent, in the order of sending."""
        self.running = 0
        self.cpu_seconds = 0.0
        """What this process used while it ran."""
        self._client = client
        self._endpoint = endpoint
        self._config = config
        self._clock = clock
        self._start = 0.0

    async def run(self, jobs: Sequence[Job], on_done: Callable[[Record], None] = lambda record: None) -> list[Record]:
        """Send all jobs and wait for their answers. Failed requests are records, not exceptions."""
        self._start = self._clock.now()
        cap = asyncio.Semaphore(self._config.concurrency or max(len(jobs), 1))
        cpu = time.process_time()
        try:
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    body = self._endpoint.body(job)  # before its time has come, so that encoding delays nothing
                    await self._wait_until(job.due)
                    await cap.acquire()
                    if self._config.duration and self._elapsed() > self._config.duration:
                        break
                    group.create_task(self._ask(job, body, cap, on_done))
        finally:
            self.cpu_seconds = time.process_time() - cpu
        return self.records

    def _elapsed(self) -> float:
        return self._clock.now() - self._start

    async def _wait_until(self, due: float | None) -> None:
        if due is not None and (delay := due - self._elapsed()) > 0:
            await asyncio.sleep(delay)

    async def _ask(self, job: Job, body: bytes, cap: asyncio.Semaphore, on_done: Callable[[Record], None]) -> None:
        record = Record(job.index, job.due, len(job.prompt), job.output_len)
        recorder = Recorder(record, self._endpoint, self._start)
        self.records.append(record)
        self.running += 1
        record.sent = self._elapsed()
        try:
            async with asyncio.timeout(self._config.timeout):
                reply = await self._client.post(self._endpoint.path, body, recorder.event)
            recorder.answer(reply.status, reply.body, self._config)
            record.finished = reply.at - self._start
        except WireError as error:
            recorder.fail(error.kind, str(error))
        except TimeoutError:
            recorder.fail("timeout", f"no end after {self._config.timeout} s")
        except asyncio.CancelledError:
            recorder.fail(INTERRUPTED, "")
            raise
        finally:
            record.finished = record.finished or self._elapsed()
            self.running -= 1
            cap.release()
            on_done(record)
