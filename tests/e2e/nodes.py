"""Engines with real (tiny) models in one process, driven by hand: unified, or prefill and decode joined for real."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from baton.base.clock import MonotonicClock
from baton.base.config import DisaggConfig, EngineConfig
from baton.base.messages import Failed, Generate, Sampling, Ticket, Tokens
from baton.worker.channel import Waker
from baton.worker.engine_process import Assembly, assemble

PATIENCE = 30.0


@dataclass(slots=True)
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, float]] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    reason: str = ""
    cached_tokens: int = 0
    error: Failed | None = None

    @property
    def done(self) -> bool:
        return bool(self.reason) or self.error is not None


class Node:
    """One engine with its answers."""

    def __init__(self, engine: EngineConfig, disagg: DisaggConfig) -> None:
        self.waker = Waker()
        self.assembly: Assembly = assemble(engine, disagg, self.waker, MonotonicClock())
        self.answers: dict[str, Answer] = {}

    @property
    def port(self) -> int:
        return self.assembly.ready.bootstrap_port

    def submit(self, request: Generate) -> None:
        self.answers[request.id] = Answer()
        self.hear(self.assembly.engine.handle(request))

    def step(self) -> None:
        self.hear(self.assembly.engine.expire())
        self.hear(self.assembly.engine.step())

    def hear(self, messages: Sequence[object]) -> None:
        for message in messages:
            if isinstance(message, Failed):
                self.answers[message.id].error = message
            elif isinstance(message, Tokens):
                answer = self.answers[message.id]
                answer.tokens += message.tokens
                answer.logprobs += [(p.token, p.logprob or 0.0) for p in message.logprobs]
                answer.prompt_logprobs += [p.logprob for p in message.prompt_logprobs]
                if message.finish is not None:
                    answer.reason = message.finish.reason
                    answer.cached_tokens = message.usage.cached_tokens if message.usage else 0

    @property
    def idle(self) -> bool:
        return all(answer.done for answer in self.answers.values())

    def close(self) -> None:
        """Lets go of everything, whoever still holds the node itself (pytest does, until the very end)."""
        self.assembly.close()
        self.waker.close()
        del self.assembly

    def assert_clean(self) -> None:
        """All pages free, nothing between prefill and decode."""
        engine = self.assembly.engine
        assert engine.role.handoffs.open == 0
        assert engine.role.handoffs.quarantined_pages == 0
        engine.audit()
        assert engine.scheduler.pool.free == engine.scheduler.pool.total


def drive(*nodes: Node, until: str = "done", patience: float = PATIENCE) -> None:
    """Step all nodes until every answer is complete and every hand-off is settled."""
    deadline = time.monotonic() + patience
    while True:
        for node in nodes:
            node.waker.clear()
            node.step()
        if all(node.idle and not node.assembly.engine.role.handoffs.open for node in nodes):
            return
        assert time.monotonic() < deadline, f"not {until} in {patience} s: {[n.answers for n in nodes]}"
        if not any(node.assembly.engine.busy for node in nodes):
            select.select([node.waker for node in nodes], [], [], 0.05)


class Pair:
    """A prefill and a decode engine, and the rooms between them."""

    def __init__(self, prefill: Node, decode: Node) -> None:
        self.prefill, self.decode = prefill, decode
        self._room = 1000

    def submit(self, id: str, tokens: Sequence[int], sampling: Sampling) -> None:
        self._room += 1
        request = Generate(id, tuple(tokens), sampling, Ticket(self._room, "127.0.0.1", self.prefill.port))
        self.decode.submit(request)
        self.prefill.submit(request)

    def run(self, requests: Sequence[tuple[str, Sequence[int], Sampling]]) -> dict[str, Answer]:
        for id, tokens, sampling in requests:
            self.submit(id, tokens, sampling)
        drive(self.prefill, self.decode)
        return {id: self.decode.answers[id] for id, _, _ in requests}

    def assert_clean(self) -> None:
        self.prefill.assert_clean()
        self.decode.assert_clean()


class Whole:
    """One undivided engine behind the same face as `Pair`."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def run(self, requests: Sequence[tuple[str, Sequence[int], Sampling]]) -> dict[str, Answer]:
        for id, tokens, sampling in requests:
            self.node.submit(Generate(id, tuple(tokens), sampling))
        drive(self.node)
        return {id: self.node.answers[id] for id, _, _ in requests}

    def assert_clean(self) -> None:
        self.node.assert_clean()


def config(model: Path, **changes: object) -> EngineConfig:
    base = EngineConfig(
        model=str(model), device="cpu", page_size=8, kv_pages=96, chunked_prefill_size=24, threads=1, max_model_len=256
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@contextmanager
def whole(engine: EngineConfig) -> Iterator[Whole]:
    node = Node(engine, DisaggConfig(mode="null"))
    try:
        yield Whole(node)
    finally:
        node.close()


@contextmanager
def pair(engine: EngineConfig, transport: str, decode: EngineConfig | None = None) -> Iterator[Pair]:
    prefill_node = Node(engine, DisaggConfig(mode="prefill", transport=transport, bootstrap_port=0))
    decode_node = Node(decode or engine, DisaggConfig(mode="decode", transport=transport))
    try:
        joined = Pair(prefill_node, decode_node)
        joined.run([("acquaintance", range(10, 20), Sampling(max_tokens=2))])  # they stay connected from here on
        yield joined
    finally:
        for node in (decode_node, prefill_node):
            node.close()
