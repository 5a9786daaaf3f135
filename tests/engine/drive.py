"""An undivided engine over a built runner, driven to the end."""

from __future__ import annotations

from collections.abc import Iterable

from baton.base.clock import MonotonicClock
from baton.base.messages import Failed, Generate, Sampling, Tokens
from baton.engine.blocks import PagePool
from baton.engine.engine import Engine
from baton.engine.load import Built
from baton.engine.roles import Committer, Unified
from baton.engine.scheduler import Scheduler


def engine_of(built: Built, *, chunk: int = 7, pages: int | None = None, prefix_caching: bool = True) -> Engine:
    clock = MonotonicClock()
    scheduler = Scheduler(
        PagePool(pages or built.num_pages),
        page_size=built.layout.page_size,
        max_running=16,
        max_waiting=64,
        chunk=chunk,
        max_model_len=built.max_model_len,
        prefix_caching=prefix_caching,
    )
    committer = Committer(scheduler, built.runner, built.eos_token_ids, clock)
    return Engine(scheduler, built.runner, Unified(scheduler, committer), clock)


def request(id: str, tokens: Iterable[int], count: int, **sampling: object) -> Generate:
    settings = {"temperature": 0.0, "max_tokens": count, "ignore_eos": True, **sampling}
    return Generate(id, tuple(tokens), Sampling(**settings))  # type: ignore[arg-type]


def drive(engine: Engine, requests: Iterable[Generate]) -> dict[str, list[Tokens]]:
    """All messages of each request, after the last one is finished."""
    heard: dict[str, list[Tokens]] = {}
    for generate in requests:
        heard[generate.id] = []
        for message in engine.handle(generate):
            raise AssertionError(message)
    while engine.busy:
        for message in engine.step():
            assert not isinstance(message, Failed), message
            assert isinstance(message, Tokens)
            heard[message.id].append(message)
    engine.audit()
    assert all(messages and messages[-1].finish for messages in heard.values())
    return heard


def texts(heard: dict[str, list[Tokens]]) -> dict[str, list[int]]:
    return {id: [token for message in messages for token in message.tokens] for id, messages in heard.items()}
