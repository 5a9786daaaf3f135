"""The dashboard in a real browser: what it shows, what it asks for, and that it lets nothing in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from baton.gateway import dashboard
from tests.gateway.browser import Page, browser, found
from tests.gateway.stack import Stack, stack
from tests.gateway.test_watch import END, NOTED, receipt, stream, streamed
from tests.router.mocks import reset, run, until

Check = Callable[[Stack, Page], Awaitable[None]]
SHOWN = "document.body.dataset.ready === 'yes'"
HOSTILE = '"><img src=x onerror="window.pwned=1"><script>window.pwned=1</script>'

needs_browser = pytest.mark.skipif(found() is None, reason="there is no Chromium; apt install chromium")


def in_browser(check: Check, profile: Path, **options: Any) -> None:
    async def main() -> None:
        async with stack(receipt, stream(*NOTED, END), split="always", **options) as s:
            with await asyncio.to_thread(lambda: browser(profile)) as page:
                await check(s, page)

    run(main(), timeout=100)


def shows(page: Page, script: str) -> Awaitable[Any]:
    """Wait in another thread: the gateway is served by this one's loop."""
    return asyncio.to_thread(page.until, script)


@needs_browser
def test_what_it_shows(tmp_path: Path) -> None:
    async def check(s: Stack, page: Page) -> None:
        for _ in range(3):
            await streamed(s)
        await s.post(json={"stream": True, "messages": [], "model": HOSTILE}, headers={"x-request-id": "<b>evil</b>"})
        s.decode.behave = reset
        await s.post(headers={"x-request-id": "broken"})
        await until(lambda: len(s.gateway.recorder.recent) == 5)
        await asyncio.to_thread(page.open, f"{s.url}/dashboard")
        await shows(page, SHOWN)
        await shows(page, "document.querySelectorAll('#rows tr').length === 5")
        text = await asyncio.to_thread(page.run, "document.body.innerText")
        for worker in s.gateway.router.registry.workers:
            assert worker.name in text
        for words in ("Gateway", "5 split", "Time to first token", "<b>evil</b>"):
            assert words in text
        assert await asyncio.to_thread(page.run, "document.querySelectorAll('.tile .spark .path').length") == 4
        await asyncio.to_thread(page.run, "[...document.querySelectorAll('#rows button')].at(-1).click()")
        await shows(page, "document.querySelectorAll('dialog[open] .gantt rect').length > 5")
        lanes = await asyncio.to_thread(page.run, "[...document.querySelectorAll('.lane')].map(e => e.textContent)")
        assert lanes == ["gateway", *(w.name for w in s.gateway.router.registry.workers)]
        await asyncio.to_thread(page.run, "byId('close').click()")
        await shows(page, "open === ''")
        await asyncio.to_thread(page.run, "choose('broken')")
        await shows(page, "!!document.querySelector('dialog[open] .cutnote')")
        await asyncio.to_thread(page.run, "byId('close').click()")
        await shows(page, "open === ''")
        await asyncio.to_thread(page.run, "choose('<b>evil</b>')")
        await shows(page, "document.querySelector('dialog[open] .facts').textContent.includes('onerror')")
        assert await asyncio.to_thread(page.run, "window.pwned") is None
        assert page.console == []
        assert all(url.startswith((s.url, "data:", "about:")) for url in page.urls)

    in_browser(check, tmp_path)


@needs_browser
def test_it_lives(tmp_path: Path) -> None:
    """It follows what happens, says when nobody answers, and goes on afterwards; a pause is a pause."""

    async def check(s: Stack, page: Page) -> None:
        await asyncio.to_thread(page.open, f"{s.url}/dashboard")
        await shows(page, f"{SHOWN} && !byId('none').hidden")
        await streamed(s)
        await shows(page, "document.querySelectorAll('#rows tr').length === 1")
        worker = s.gateway.router.registry.find(s.decode.url)
        s.decode.health = 503
        await until(lambda: not worker.healthy)
        await shows(page, "!!document.querySelector('.card.decode .pill.down')")
        await asyncio.to_thread(page.run, "byId('pause').click()")
        await shows(page, "byId('live-text').textContent === 'paused'")

    in_browser(check, tmp_path)


@needs_browser
def test_it_asks_for_a_key_and_forgets_it(tmp_path: Path) -> None:
    async def check(s: Stack, page: Page) -> None:
        enter = "byId('key').value = '%s'; byId('door').requestSubmit()"
        await asyncio.to_thread(page.open, f"{s.url}/dashboard")
        await shows(page, "!byId('door').hidden && byId('main').hidden")
        await asyncio.to_thread(page.run, enter % "wrong")
        await shows(page, "byId('live-text').textContent === 'that key will not do'")
        await asyncio.to_thread(page.run, enter % "boss")
        await shows(page, f"{SHOWN} && byId('door').hidden && !byId('main').hidden")
        stored = "JSON.stringify([localStorage, sessionStorage, document.cookie, byId('key').value])"
        assert "boss" not in await asyncio.to_thread(page.run, stored)
        assert not any("boss" in url for url in page.urls)

    in_browser(check, tmp_path, api_key="user", admin_api_key="boss")


def test_the_page_needs_nobody_else() -> None:
    html = dashboard.page().html.decode()
    assert "/*style*/" not in html
    assert "/*script*/" not in html
    assert "innerHTML" not in html
    outside = [word for word in html.split() if "//" in word and "http" in word and "w3.org" not in word]
    assert outside == []
