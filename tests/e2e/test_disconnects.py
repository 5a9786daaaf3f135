"""Clients that leave, abort, stall and run out of patience, in random company, at any moment of a request's life.

Whoever is polite meanwhile gets the exact answer, and afterwards nobody holds a page, a hand-off or a request.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from baton.base.config import GatewayConfig
from baton.gateway.process import serving
from tests.e2e.asking import ENDPOINTS, Answer, Ask, ask_all, unlike
from tests.e2e.asking import client as asking
from tests.e2e.stacks import Stack, client

PATIENCE = 30.0
PATHS = {"generate": "/generate", "completions": "/v1/completions", "chat": "/v1/chat/completions"}
POLITE: dict[tuple[str, str], tuple[str, Ask, bool]] = {
    (endpoint, name): (endpoint, ask, stream)
    for endpoint in ENDPOINTS
    for name, ask, stream in (
        ("short", Ask("hello"), True),
        ("long", Ask("hello there " * 14, temperature=0.8, top_logprobs=1), False),
        ("three", Ask("one two", temperature=1.0, n=3), True),
    )
}
names = itertools.count()


@dataclass(frozen=True, slots=True)
class Visit:
    """One client. `moment`: how much it reads, waits or sends before it does what it does."""

    manner: str
    endpoint: str
    words: int
    n: int
    stream: bool
    moment: int
    tokens: int = 60


class Guest:
    """A visit on a socket of its own, in bytes: nothing between it and the server is polite by itself."""

    def __init__(self, stack: Stack, visit: Visit) -> None:
        self.stack, self.visit = stack, visit
        self.rid = f"guest-{next(names)}-"
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    def request(self, connection: str = "close") -> bytes:
        visit, prompt = self.visit, "word " * self.visit.words
        sampling = {"n": visit.n, "temperature": 1.0, "ignore_eos": True}
        body: dict[str, Any] = {"model": "default", "rid": self.rid, "stream": visit.stream}
        match visit.endpoint:
            case "generate":
                body |= {"text": prompt, "sampling_params": {**sampling, "max_new_tokens": visit.tokens}}
            case "completions":
                body |= {"prompt": prompt, **sampling, "max_tokens": visit.tokens}
            case "chat":
                body |= {"messages": [{"role": "user", "content": prompt}], **sampling, "max_tokens": visit.tokens}
        data = json.dumps(body).encode()
        head = f"POST {PATHS[visit.endpoint]} HTTP/1.1\r\nhost: x\r\nconnection: {connection}\r\n"
        about = f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        return f"{head}{about}".encode() + data

    async def __aenter__(self) -> Guest:
        port = int(self.stack.url.rsplit(":", 1)[1])
        own = socket.socket()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        own.setblocking(False)
        await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", port))
        self.reader, self.writer = await asyncio.open_connection(sock=own, limit=4096)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()

    async def pause(self) -> None:
        await asyncio.sleep(self.visit.moment / 1000)

    async def listen(self, events: int) -> None:
        """Reads until so many events have begun, or to the end."""
        with suppress(OSError):
            while events > 0 and (line := await self.reader.readline()):
                events -= line.startswith(b"data: ")

    async def hear_out(self) -> None:
        with suppress(OSError):
            while await self.reader.read(65536):
                pass


# --- the manners


async def leave_while_sending(guest: Guest) -> None:
    request = guest.request()
    guest.writer.write(request[: len(request) * guest.visit.moment // 100])


async def leave_at_once(guest: Guest) -> None:
    guest.writer.write(guest.request())


async def leave_after_a_moment(guest: Guest) -> None:
    guest.writer.write(guest.request())
    await guest.pause()


async def leave_after_events(guest: Guest) -> None:
    guest.writer.write(guest.request())
    await guest.listen(guest.visit.moment)


async def reset(guest: Guest) -> None:
    """Without a goodbye: the kernel says so with RST."""
    guest.writer.write(guest.request())
    await guest.pause()
    own = guest.writer.get_extra_info("socket")
    own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    guest.writer.transport.abort()


async def close_half(guest: Guest) -> None:
    """It will say nothing more; the server may take that for a goodbye, but must not leave it hanging."""
    guest.writer.write(guest.request())
    guest.writer.write_eof()
    await guest.hear_out()


async def dawdle(guest: Guest) -> None:
    """Reads a little at a time from a buffer that holds little."""
    guest.writer.write(guest.request())
    with suppress(OSError):
        while await guest.reader.read(512):
            await asyncio.sleep(0.0005)


async def ask_twice(guest: Guest) -> None:
    """A second request behind the first, on the same connection; leaves in the first one's answer."""
    guest.writer.write(guest.request("keep-alive") * 2)
    await guest.reader.read(1)


async def abort(guest: Guest) -> None:
    """Asks for the end, of everybody or of one worker only, and hears out what comes of it."""
    places = [guest.stack.url, guest.stack.worker("prefill"), guest.stack.worker("decode")]
    guest.writer.write(guest.request())
    await guest.pause()
    async with httpx.AsyncClient(base_url=places[guest.visit.moment % 3], verify=False) as http:
        assert (await http.post("/abort_request", json={"rid": guest.rid})).status_code == 200
    await guest.hear_out()


async def run_out_of_patience(guest: Guest) -> None:
    """As a real client does it."""
    _, body = guest.request().split(b"\r\n\r\n", 1)
    timeout = (guest.visit.moment + 1) / 1000
    async with httpx.AsyncClient(base_url=guest.stack.url, timeout=timeout, verify=False) as http:
        with suppress(httpx.TimeoutException):
            await http.post(PATHS[guest.visit.endpoint], content=body, headers={"content-type": "application/json"})


MANNERS: dict[str, Callable[[Guest], Awaitable[None]]] = {
    manner.__name__: manner
    for manner in (
        leave_while_sending,
        leave_at_once,
        leave_after_a_moment,
        leave_after_events,
        reset,
        close_half,
        dawdle,
        ask_twice,
        abort,
        run_out_of_patience,
    )
}
VISITS = st.builds(
    Visit,
    manner=st.sampled_from(list(MANNERS)),
    endpoint=st.sampled_from(list(PATHS)),
    words=st.sampled_from([1, 20, 100]),  # 100 are ten chunks and more
    n=st.sampled_from([1, 1, 3]),
    stream=st.booleans(),
    moment=st.integers(0, 99),
)
EVERY_MANNER = [
    Visit(manner, list(PATHS)[at % 3], (20, 100)[at % 2], (1, 3)[at % 2], at % 4 != 3, 7 * at)
    for at, manner in enumerate(MANNERS)
]


@pytest.fixture(scope="module")
def polite(unified: Stack) -> dict[tuple[str, str], Answer]:
    return ask_all(unified.url, POLITE, at_once=len(POLITE))


Asks = dict[tuple[str, str], tuple[str, Ask, bool]]


async def receive(stack: Stack, history: list[Visit], polite: Asks) -> dict[tuple[str, str], Answer]:
    """All guests at once, the polite ones among them."""

    async def visit(one: Visit) -> None:
        try:
            async with Guest(stack, one) as guest, asyncio.timeout(PATIENCE):
                await MANNERS[one.manner](guest)
        except TimeoutError:
            raise AssertionError(f"never heard the end: {one}") from None

    async with asking(stack.url) as asker, asyncio.TaskGroup() as group:
        for one in history:
            group.create_task(visit(one))
        answers = {
            key: group.create_task(asker.ask(endpoint, ask, stream=stream))
            for key, (endpoint, ask, stream) in polite.items()
        }
    return {key: answer.result() for key, answer in answers.items()}


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # what depends on the moment cannot be shrunk
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(history=EVERY_MANNER)
@given(history=st.lists(VISITS, min_size=5, max_size=15))
def test_whoever_leaves_whenever_takes_nothing_along(
    pd: Stack, polite: dict[tuple[str, str], Answer], history: list[Visit]
) -> None:
    answers = asyncio.run(receive(pd, history, POLITE))
    assert not unlike(answers, polite.__getitem__)
    pd.settle()
    assert not unlike(ask_all(pd.url, POLITE, at_once=len(POLITE)), polite.__getitem__)


@pytest.mark.parametrize("endpoint", PATHS)
@pytest.mark.parametrize("manner", ["leave_after_events", "abort"])
def test_what_nobody_waits_for_is_not_computed(pd: Stack, endpoint: str, manner: str) -> None:
    """Pages would come back at the end of an answer, too."""
    history = [Visit(manner, endpoint, 1, 1, True, moment=3, tokens=480) for _ in range(6)]
    before = generated(pd)
    asyncio.run(receive(pd, history, {}))
    pd.settle()
    assert generated(pd) - before < 6 * 480 / 2


def generated(stack: Stack) -> int:
    """Tokens computed by the decode worker since it started."""
    with client(stack.worker("decode")) as http:
        samples = [s for f in text_string_to_metric_families(http.get("/metrics").text) for s in f.samples]
    return next(int(s.value) for s in samples if s.name == "baton_engine_generated_tokens_total")


BUSY = [
    {"prompt": "word " * words, "max_tokens": 100, "ignore_eos": True, "stream": stream, "n": n}
    for words, n in ((1, 1), (20, 3), (100, 1), (100, 3))
    for stream in (False, True)
]


@pytest.mark.parametrize("seconds", [0.01, 0.03, 0.1, 0.3])
def test_a_deadline_at_any_moment_frees_everything(pd: Stack, seconds: float) -> None:
    """A second gateway before the same workers, with little patience."""

    async def main() -> list[tuple[int, str]]:
        workers = {str(w["worker_type"]): w for w in pd.workers()}
        prefill = (str(workers["prefill"]["url"]), int(str(workers["prefill"]["bootstrap_port"])))
        config = GatewayConfig(port=0, request_timeout=seconds)
        async with serving(config, [prefill], [str(workers["decode"]["url"])]) as (gateway, _, port):
            async with asyncio.timeout(PATIENCE):
                while not all(worker.healthy for worker in gateway.router.registry.workers):
                    await asyncio.sleep(0.01)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20, verify=False) as http:
                replies = await asyncio.gather(*(http.post("/v1/completions", json=body) for body in BUSY))
        return [(reply.status_code, reply.text) for reply in replies]

    for status, text in asyncio.run(main()):
        assert status == 504 or '"code":"timeout"' in text or '"finish_reason":"length"' in text, (status, text)
