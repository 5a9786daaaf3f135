"""A gateway dies: its clients see their connections break and ask another one, and the workers let go of everything."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.chaos.load import Load, assert_exact
from tests.chaos.stage import Gateway, staged
from tests.e2e.stacks import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_one_of_two_is_killed(stack: Stack, load: Load, tmp_path: Path) -> None:
    async def main() -> None:
        async with staged(stack, tmp_path, 3, [Gateway, Gateway]) as stage:
            first, second = stage.gateways
            begun = len(load.outcomes)
            asked = asyncio.create_task(load.ask(first.url, 40, retry=lambda: second.url))
            await load.answered(begun + 5)
            first.kill()
            assert_exact(await asked)
            # leaving the block: no worker holds anything of the dead one's requests

    asyncio.run(main())


def test_the_only_one_is_killed_and_comes_back(stack: Stack, load: Load, tmp_path: Path) -> None:
    """At the same address, for clients that try until somebody answers."""

    async def main() -> None:
        async with staged(stack, tmp_path, 4) as stage:
            [gateway] = stage.gateways
            begun = len(load.outcomes)
            asked = asyncio.create_task(load.ask(gateway.url, 30, retry=lambda: gateway.url))
            await load.answered(begun + 5)
            gateway.kill()
            gateway.start()
            assert_exact(await asked)

    asyncio.run(main())
