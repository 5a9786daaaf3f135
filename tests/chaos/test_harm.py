"""Harm between the gateway and its workers: whatever a network or a broken server does to single answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.chaos.load import Load, assert_exact
from tests.chaos.proxy import Harm, sometimes
from tests.chaos.stage import staged
from tests.e2e.stacks import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HANGS = (Harm.MUTE, Harm.DRIP, Harm.STOP_WITHIN)
"""Found out by a clock only."""
BREAKS = [harm for harm in Harm if harm not in HANGS]


@pytest.mark.parametrize(
    ("harms", "chance", "requests"), [(BREAKS, 0.2, 102), (HANGS, 0.1, 34)], ids=["breaks", "hangs"]
)
def test_no_request_is_lost(
    stack: Stack, load: Load, tmp_path: Path, harms: Sequence[Harm], chance: float, requests: int
) -> None:
    async def main() -> None:
        async with staged(stack, tmp_path, seed=1) as stage:
            for index, proxy in enumerate(stage.proxies.values()):
                proxy.choose = sometimes(harms, chance, index)
            assert_exact(await load.ask(stage.url, requests))
            done = {harm for proxy in stage.proxies.values() for harm in proxy.done}
            assert len(done) > len(harms) // 2, f"too little harm was done: {done}"
            attempts = stage.gateways[0].metric
            assert attempts("baton_gateway_retries_total") > 0
            if harms is BREAKS:
                assert attempts("baton_gateway_resumes_total") > 0

    asyncio.run(main())
