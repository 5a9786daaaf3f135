"""What a stream cannot survive is an error event and then the end, never an end that looks like a good one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chaos.proxy import Harm, sometimes
from tests.chaos.stage import staged
from tests.e2e.stacks import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SECONDS = "5"
"""For how long a request is tried: workers that fail all the time get pauses that double."""
LONG = "one two three " * 8
CHAT = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 300, "temperature": 0, "ignore_eos": True}
TEXT = {"prompt": LONG, "max_tokens": 300, "temperature": 0, "ignore_eos": True}
PARAMS = {"max_new_tokens": 300, "temperature": 0, "ignore_eos": True}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT),
    "completions": ("/v1/completions", TEXT),
    "generate": ("/generate", {"text": LONG, "sampling_params": PARAMS}),
    "no journal": ("/generate", {"text": LONG, "sampling_params": PARAMS, "return_logprob": True}),
}


async def events_of(url: str, path: str, body: dict[str, Any]) -> tuple[int, list[str]]:
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        response = await http.post(path, json={**body, "stream": True}, headers={"x-request-timeout": SECONDS})
    return response.status_code, [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]


def assert_says_its_end(events: Iterable[str]) -> None:
    *shown, error, done = events
    assert done == "[DONE]"
    assert set(json.loads(error)["error"]) == {"message", "type", "param", "code"}
    assert not any("error" in json.loads(event) for event in shown)


@pytest.mark.parametrize("harm", [Harm.RESET_WITHIN, Harm.CUT_CLEAN])
def test_the_end_is_said(stack: Stack, tmp_path: Path, harm: Harm) -> None:
    async def main() -> None:
        async with staged(stack, tmp_path, seed=5) as stage:
            for name in stage.names("decode"):
                stage.proxies[name].choose = sometimes([harm], 1.0, 0)
            answers = await asyncio.gather(*(events_of(stage.url, *asked) for asked in BODIES.values()))
            for status, events in answers:
                assert status == 200
                assert_says_its_end(events)

    asyncio.run(main())
