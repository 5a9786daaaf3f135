"""Two small engines that hand over to each other, with a model whose tokens depend on every byte of their KV pages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from baton.base.clock import Clock, MonotonicClock
from baton.base.config import DisaggConfig
from baton.base.layout import KVLayout
from baton.base.messages import Abort, Failed, Generate, Sampling, Ticket, ToFront, TokenLogprob, Tokens
from baton.disagg.build import Station, build_role
from baton.engine.blocks import PagePool
from baton.engine.engine import Engine
from baton.engine.roles import Committer
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import Sequence as EngineSequence
from baton.engine.sockets import Preparation, Sampled, Slice
from baton.transports.base import Transport
from baton.transports.region import Region

PAGE_SIZE = 4
LAYOUT = KVLayout("pages-1", layers=2, kv_heads=1, head_dim=16, page_size=PAGE_SIZE, dtype="float32")
"""1,024 bytes per page, 256 per token."""
EOS = 7
VOCABULARY = 997


class PageRunner:
    """Writes recognisable bytes for every computed token, and draws the next one from a hash of all the bytes that
    are in the sequence's pages: one wrong, missing or stale page, and the answer is another one."""

    def __init__(self, region: Region, layout: KVLayout = LAYOUT, pause: float = 0.0) -> None:
        self._layout = layout
        self._pause = pause
        self._slot = layout.page_bytes // layout.page_size
        self._pages = np.frombuffer(region.memory, np.uint8).reshape(-1, layout.page_size, self._slot)

    def run(self, batch: Sequence[Slice]) -> list[Sampled]:
        if self._pause:
            time.sleep(self._pause)  # the model's work: releases the GIL as kernels do
        return [self._run(piece) for piece in batch]

    def forget(self, sequence: EngineSequence) -> None:
        pass

    def close(self) -> None:
        """Let go of the region."""
        self._pages = np.empty((0, 0, 0), np.uint8)

    def _run(self, piece: Slice) -> Sampled:
        sequence, size = piece.sequence, self._layout.page_size
        for position in range(piece.start, piece.start + piece.count):
            before = bytes(self._at(sequence, position - 1)[:8]) if position else b""
            seed = xxhash.xxh3_64_intdigest(before + sequence.tokens[position].to_bytes(4, "little"))
            slot = self._at(sequence, position)
            slot[:] = np.resize(np.frombuffer(seed.to_bytes(8, "little"), np.uint8), self._slot)
        if not piece.sample:
            return Sampled()
        length = piece.start + piece.count
        pages = self._pages[sequence.pages[: -(-length // size)]].reshape(-1, self._slot)[:length]
        draw = xxhash.xxh3_64_intdigest(pages.tobytes(), sequence.sampling.seed)
        token = draw % VOCABULARY
        wanted = sequence.sampling.logprobs is not None
        prompt = tuple(TokenLogprob(-1.0, t) for t in sequence.tokens[: sequence.prompt_len])
        return Sampled(
            token,
            TokenLogprob(-float(draw % 1000), token) if wanted else None,
            prompt if sequence.sampling.prompt_logprobs is not None and length == sequence.prompt_len else (),
        )

    def _at(self, sequence: EngineSequence, position: int) -> np.ndarray:
        size = self._layout.page_size
        return self._pages[sequence.pages[position // size], position % size]


@dataclass
class Worker:
    """An engine with a role, and what it has told its front."""

    engine: Engine
    role: Station
    region: Region
    heard: dict[str, list[ToFront]] = field(default_factory=dict)

    @property
    def pool(self) -> PagePool:
        return self.engine.scheduler.pool

    def turn(self) -> bool:
        said = self.engine.expire() + self.engine.step()
        self._note(said)
        return bool(said) or self.engine.busy

    def hear(self) -> bool:
        """Hand-offs make progress, and nothing is computed."""
        self._note(self.engine.poll())
        return True

    def _note(self, said: Sequence[object]) -> None:
        for message in said:
            assert isinstance(message, Tokens | Failed)
            self.heard.setdefault(message.id, []).append(message)

    def send(self, message: Generate | Abort) -> None:
        for answer in self.engine.handle(message):
            assert isinstance(answer, Failed)
            self.heard.setdefault(answer.id, []).append(answer)

    def ended(self, id: str) -> bool:
        last = self.heard.get(id, [None])[-1]
        return isinstance(last, Failed) or (isinstance(last, Tokens) and last.finish is not None)

    def failure(self, id: str) -> Failed:
        last = self.heard[id][-1]
        assert isinstance(last, Failed), last
        return last

    def answer(self, id: str) -> list[int]:
        parts = self.heard[id]
        assert all(isinstance(part, Tokens) for part in parts), parts
        return [token for part in parts if isinstance(part, Tokens) for token in part.tokens]

    def last(self, id: str) -> Tokens:
        last = self.heard[id][-1]
        assert isinstance(last, Tokens), last
        return last

    def idle_and_whole(self) -> bool:
        load = self.role.handoffs
        return load.open == load.waiting == 0 and self.pool.free == self.pool.total

    def close(self) -> None:
        self.engine.close()
        assert isinstance(self.engine.runner, PageRunner)
        self.engine.runner.close()
        self.region.close()


def worker(
    mode: str,
    wake: Callable[[], None],
    *,
    transports: Callable[[Region], Mapping[str, Transport]] | None = None,
    pages: int = 64,
    chunk: int = 16,
    max_running: int = 16,
    max_waiting: int = 64,
    layout: KVLayout = LAYOUT,
    clock: Clock | None = None,
    pause: float = 0.0,
    prefix_caching: bool = True,
    preparation: Preparation | None = None,
    **options: object,
) -> Worker:
    clock = clock or MonotonicClock()
    region = Region.create(pages * layout.page_bytes)
    np.frombuffer(region.memory, np.uint8)[:] = 0xAA  # stale bytes everywhere
    scheduler = Scheduler(
        PagePool(pages),
        page_size=layout.page_size,
        max_running=max_running,
        max_waiting=max_waiting,
        chunk=chunk,
        max_model_len=pages * layout.page_size,
        prefix_caching=prefix_caching,
    )
    runner = PageRunner(region, layout, pause)
    committer = Committer(scheduler, runner, (EOS,), clock)
    config = DisaggConfig(**{"mode": mode, "bootstrap_port": 0, **options})  # type: ignore[arg-type]
    made = transports(region) if transports is not None else None
    try:
        role = build_role(config, scheduler, committer, region, layout, f"{mode}-1", clock, wake, made)
    except BaseException:
        runner.close()
        region.close()
        raise
    return Worker(Engine(scheduler, runner, role, clock, preparation), role, region)


class Pair:
    """A prefill worker and a decode worker in this thread; `pump` lets both make progress."""

    def __init__(self, prefill: Worker, decode: Worker, woken: threading.Event) -> None:
        self.prefill = prefill
        self.decode = decode
        self._woken = woken

    def request(
        self,
        id: str,
        tokens: Sequence[int],
        room: int,
        *,
        port: int | None = None,
        ticket: bool = True,
        **sampling: object,
    ) -> Generate:
        given = {"max_tokens": 6, "seed": 5, **sampling}
        where = Ticket(room, "127.0.0.1", port or self.prefill.role.bootstrap_port) if ticket else None
        return Generate(id, tuple(tokens), Sampling(**given), where)  # type: ignore[arg-type]

    def ask(self, id: str, tokens: Sequence[int], room: int, **sampling: object) -> None:
        """To both sides, as a gateway does."""
        request = self.request(id, tokens, room, **sampling)  # type: ignore[arg-type]
        self.prefill.send(request)
        self.decode.send(request)

    def ask_decode_first(self, id: str, tokens: Sequence[int], room: int) -> Generate:
        """The offer is there before the prompt is computed: every chunk is pushed by itself."""
        request, free = self.request(id, tokens, room), self.decode.pool.free
        self.decode.send(request)
        self.pump(lambda: self.decode.pool.free < free, self.decode)
        self.prefill.send(request)
        sequence = next(s for s in self.prefill.engine.scheduler if s.id == id)
        end = time.monotonic() + 10
        while not sequence.stamps.offered:
            assert time.monotonic() < end
            assert not self.prefill.role.poll()
        return request

    def pump(self, until: Callable[[], bool], *workers: Worker, limit: float = 20.0) -> None:
        """Raises AssertionError if it does not come true in time."""
        end = time.monotonic() + limit
        while not until():
            assert time.monotonic() < end, (self.prefill.heard, self.decode.heard, self.prefill.role.handoffs)
            busy = [one.turn() for one in workers or (self.prefill, self.decode)]
            if not any(busy) and not until():
                self._woken.wait(0.02)
                self._woken.clear()

    def finish(self, *ids: str, limit: float = 20.0) -> None:
        self.pump(lambda: all(w.ended(id) for id in ids for w in (self.prefill, self.decode)), limit=limit)

    def settle(self, limit: float = 20.0) -> None:
        """All pages free on both sides, nothing open."""
        self.pump(lambda: self.prefill.idle_and_whole() and self.decode.idle_and_whole(), limit=limit)
        for one in (self.prefill, self.decode):
            one.engine.scheduler.check()

    def close(self) -> None:
        self.prefill.close()
        self.decode.close()


def undivided(requests: Sequence[Generate], **options: object) -> dict[str, list[int]]:
    """What one engine that does both says to the same requests."""
    one = worker("null", lambda: None, **options)  # type: ignore[arg-type]
    for request in requests:
        one.send(Generate(request.id, request.tokens, request.sampling))
    while not all(one.ended(request.id) for request in requests):
        one.turn()
    answers = {request.id: one.answer(request.id) for request in requests}
    one.close()
    return answers
