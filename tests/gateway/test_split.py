"""Divided or whole: what reaches the workers, and what the client is told of it."""

from __future__ import annotations

import httpx
import pytest

from baton.base.config import GatewayConfig
from baton.gateway.process import serving
from tests.gateway.stack import CHAT, RECEIPT, Stack, with_stack
from tests.router.mocks import Behaviour, Exchange, Mock, reset, run, until, whole

SHORT = {"messages": [{"role": "user", "content": "hello"}]}
LONG = {"messages": [{"role": "user", "content": "hello " * 400}]}


def decode(*, waits: bool) -> Behaviour:
    """A decode worker; `waits` in a room for ever, where nobody comes."""

    async def behave(exchange: Exchange) -> None:
        if waits and "bootstrap_room" in exchange.json:
            await exchange.gone.wait()
        else:
            exchange.whole({"ok": 1})

    return behave


def asked(body: object, *, prefill: bool = True, **options: object) -> tuple[int, int, str]:
    """(requests that P got, requests that D got without a room, the reason that the client was told)."""
    seen: list[tuple[int, int, str]] = []

    async def main() -> None:
        p = Mock(RECEIPT if prefill else reset, {"instance": "p", "disaggregation_mode": "prefill"})
        d = Mock(decode(waits=not prefill), {"instance": "d", "disaggregation_mode": "decode"})
        config = GatewayConfig(port=0, drain_timeout=1.0, health_interval=0.2, **options)  # type: ignore[arg-type]
        async with p, d, serving(config, [(p.url, 8998)], [d.url]) as (gateway, _, port):
            await until(lambda: all(w.healthy for w in gateway.router.registry.workers))
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                reply = await client.post(CHAT, json=body, headers={"x-baton-explain": "1"})
            assert reply.json() == {"ok": 1}
            alone = sum("bootstrap_room" not in exchange.json for exchange in d.seen)
            seen.append((len(p.seen), alone, reply.headers["x-baton-route"]))

    run(main())
    return seen[0]


@pytest.mark.parametrize(
    ("body", "options", "expected", "reason"),
    [
        (SHORT, {}, (0, 1), "uncached tokens < 64"),
        (SHORT, {"min_split_tokens": 4}, (0, 1), "whole: prefill side would take"),
        (LONG, {}, (1, 0), "split: prefill side takes"),
        (LONG, {"split": "never"}, (0, 1), "whole"),
        (SHORT, {"split": "always"}, (1, 0), "split"),
    ],
)
def test_what_pays_is_divided(body: object, options: dict[str, object], expected: tuple[int, int], reason: str) -> None:
    to_prefill, alone, told = asked(body, **options)
    assert (to_prefill, alone) == expected
    assert reason in told


def test_a_prefill_worker_that_fails_leaves_it_to_decode() -> None:
    to_prefill, alone, told = asked(LONG, prefill=False)
    assert to_prefill in (1, 2)  # twice, if the first loss may have been an old connection's fault
    assert alone == 1
    assert "whole" in told


def test_a_long_prompt_may_take_longer_than_a_short_one() -> None:
    """The prefill's clock reckons with what is to be computed: 20,000 tokens that take a second are no failure."""

    async def check(s: Stack) -> None:
        body = {"messages": [{"role": "user", "content": "hello " * 14_000}]}
        assert (await s.post(json=body)).json() == {"ok": 1}
        assert len(s.prefill.seen) == len(s.decode.seen) == 1

    with_stack(whole({}, delay=1.0), whole({"ok": 1}, delay=1.1), check, stage_timeout=0.3)
