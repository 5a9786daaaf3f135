"""Workers die, stand still and vanish behind a split network, and requests are answered as if nothing had happened."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.chaos.load import Load, assert_exact
from tests.chaos.stage import staged
from tests.chaos.torment import Blow, Tormentor
from tests.e2e.stacks import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BLOWS = [
    Blow.DECODE_ENGINE_STOPS,
    Blow.PREFILL_PARTED,
    Blow.DECODE_ENGINE,
    Blow.PREFILL_FRONT_STOPS,
    Blow.ALL_PREFILL,
    Blow.DECODE_FRONT,
]
"""The others come in `benchmarks/chaos.py`. Those that kill come late: who was killed needs seconds to come back."""
EVERY = 17


def test_no_request_is_lost(stack: Stack, load: Load, tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(stack, tmp_path, seed=7) as stage:
            blows = asyncio.create_task(Tormentor(stage, load).run(BLOWS, EVERY))
            try:
                outcomes = await load.ask(stage.url, EVERY * len(BLOWS))
                await blows
            finally:
                blows.cancel()
            assert_exact(outcomes)
            attempts = stage.gateways[0].metric
            assert attempts("baton_gateway_retries_total") > 0
            assert attempts("baton_gateway_resumes_total") > 0

    asyncio.run(main())
