"""A vLLM pair as a gateway sees it: blocks that prefill keeps for decode, and what happens to those who err.

What the real servers do (0.32, recorded): parameters that are used twice, or with another prompt, give a wrong answer
with status 200; a client that may write them ends the server; a stream or a second prompt or sample on the prefill leg
leaves blocks behind; the first of several samples on the decode leg takes them from the others; a decode worker that
has seen a request tells prefill to let go, whatever becomes of it.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tests.router.mocks import Exchange, Mock

NIXL_FIELDS = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids")
WRONG = "assenessass"


@dataclass
class Ledger:
    """What is held for whom, by (engine, name); and what must never happen."""

    held: dict[tuple[str, str], str] = field(default_factory=dict)
    """The prompt whose blocks these are."""
    given: int = 0
    taken: int = 0
    wrong: int = 0
    """Somebody used what was not there any more, or not theirs."""
    dead: list[str] = field(default_factory=list)
    """Servers that a request has ended, and why."""

    def hold(self, engine: str, name: str, prompt: str) -> None:
        self.given += 1
        self.held[engine, name] = prompt

    def take(self, engine: str, name: str, prompt: str) -> bool:
        good = self.held.pop((engine, name), None) == prompt
        self.taken += good
        self.wrong += not good
        return good

    def drop(self, engine: str) -> None:
        """The engine is gone, and its memory."""
        self.held = {key: prompt for key, prompt in self.held.items() if key[0] != engine}


def prompt_of(body: dict[str, Any]) -> str:
    return json.dumps(body.get("messages", body.get("prompt", body.get("input"))))


def answer_to(prompt: str) -> str:
    return f"answer to {prompt}"


Mood = Callable[[Exchange], Awaitable[bool]]
"""What goes wrong with one request, once decode has seen whose blocks it wants. True: nothing else happens."""


class Server(Mock):
    """What both kinds have in common."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(self.serve)
        self.ledger = ledger
        self.moods: list[Mood] = []
        """For the next requests, one each."""
        self.development = False
        """It says more of itself."""

    async def answer(self, exchange: Exchange) -> None:
        if exchange.path == "/server_info" and self.development:
            exchange.whole({"vllm_config": "VllmConfig(...)"})
        elif exchange.path in ("/server_info", "/get_server_info"):
            exchange.whole({}, 404)
        elif exchange.path == "/version":
            exchange.whole({"version": "0.32.0"})
        else:
            await super().answer(exchange)

    async def serve(self, exchange: Exchange) -> None:
        body = exchange.json
        if body.get("stream_options") and not body.get("stream"):
            exchange.whole({"error": {"message": "stream_options without stream", "code": 400}}, 400)
            return
        await self.generate(exchange, body, body.get("kv_transfer_params"))

    async def generate(self, exchange: Exchange, body: dict[str, Any], params: Any) -> None:
        raise NotImplementedError

    async def upset(self, exchange: Exchange) -> bool:
        """True: this request has been dealt with."""
        return bool(self.moods) and await self.moods.pop(0)(exchange)

    def die(self, exchange: Exchange, why: str) -> None:
        self.ledger.dead.append(why)
        self.health = 500
        exchange.reset()


class Prefill(Server):
    def __init__(self, ledger: Ledger, connector: str = "nixl") -> None:
        super().__init__(ledger)
        self.connector = connector
        self.engine = ""
        self.open = asyncio.Event()
        """Set: prefill takes no time."""
        self.open.set()
        self.answered: Callable[[Exchange], None] = lambda exchange: None
        """Called when its answer has gone out."""
        self.edit: Callable[[dict[str, Any]], Any] = lambda params: params
        """What it makes of its own parameters."""
        self.finish = "length"

    async def start(self) -> None:
        self.engine = str(uuid.uuid4())
        await super().start()

    async def stop(self) -> None:
        self.ledger.drop(self.engine)
        await super().stop()

    async def generate(self, exchange: Exchange, body: dict[str, Any], params: Any) -> None:
        if params is not None and (not isinstance(params, dict) or params.get("do_remote_prefill")):
            self.die(exchange, "prefill: a client wrote kv_transfer_params")
            return
        await self.compute(exchange)
        if exchange.gone.is_set() or await self.upset(exchange):
            return
        name = f"cmpl-{exchange.headers['x-request-id']}-{uuid.uuid4().hex[:8]}"
        said = self.keep(exchange.path, name, body, params or {})
        if body.get("stream"):
            exchange.begin_stream()
            exchange.piece(b'data: {"choices":[]}\n\ndata: [DONE]\n\n')
            exchange.end_stream()
            return
        choice = {"index": 0, "text": "x", "finish_reason": self.finish}
        exchange.whole({"id": name, "choices": [choice], "kv_transfer_params": said})
        self.answered(exchange)

    async def compute(self, exchange: Exchange) -> None:
        """Until it is done, or nobody waits for it."""
        waits = [asyncio.ensure_future(event.wait()) for event in (exchange.gone, self.open)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    def keep(self, path: str, name: str, body: dict[str, Any], params: dict[str, Any]) -> Any:
        """Blocks for every prompt and sample; what is said of the first."""
        if not params.get("do_remote_decode"):
            return None
        prompt = body.get("prompt")
        several = path == "/v1/completions" and isinstance(prompt, list) and not isinstance(prompt[0], int)
        tokens = body.get("max_tokens", body.get("max_output_tokens", 16))
        sets = (len(prompt) if several and prompt else 1) * body.get("n", 1) * tokens
        if self.connector == "mooncake":
            if self.finish == "length":
                self.ledger.hold(self.engine, params["transfer_id"], prompt_of(body))
            return None
        for number in range(sets):
            self.ledger.hold(self.engine, name if number == 0 else f"{name}/{number}", prompt_of(body))
        return self.edit(
            {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_block_ids": [[1, 2]],
                "remote_engine_id": self.engine,
                "remote_request_id": name,
                "remote_host": "127.0.0.1",
                "remote_port": 5600,
                "tp_size": 1,
                "remote_num_tokens": 240,
                "unheard_of": {"deeply": [None, 1.50, "\u00e9"]},
            }
        )

    async def query(self, exchange: Exchange) -> None:
        """Its bootstrap server's answer."""
        exchange.whole({"0": {"engine_id": self.engine, "worker_addr": {"0": {"0": "tcp://127.0.0.1:1"}}}})


class Decode(Server):
    def __init__(self, ledger: Ledger, connector: str = "nixl") -> None:
        super().__init__(ledger)
        self.connector = connector
        self.peer: Callable[[], Prefill]
        """Whose engine it can reach (Mooncake)."""
        self.alone = 0
        """Prompts it computed itself."""
        self.open = asyncio.Event()
        """Set: nobody waits before the first token."""
        self.open.set()

    async def generate(self, exchange: Exchange, body: dict[str, Any], params: Any) -> None:
        prompt = prompt_of(body)
        right = True
        if params is None:
            self.alone += 1
        else:
            found = await self.fetch(exchange, params, prompt)
            if found is None:
                return
            right = found
        if await self.upset(exchange):
            return
        if not self.open.is_set():
            await exchange.gone.wait()
            return
        await self.say(exchange, body, answer_to(prompt) if right else WRONG)

    async def fetch(self, exchange: Exchange, params: Any, prompt: str) -> bool | None:
        """False: what came is not this prompt's; None: nothing came, and that was that."""
        if self.connector == "mooncake":
            if params["remote_engine_id"] != self.peer().engine:
                exchange.whole({"error": {"message": "Internal server error", "code": 500}}, 500)
                return None
            return self.ledger.take(params["remote_engine_id"], params["transfer_id"], prompt)
        if not isinstance(params, dict) or any(not params.get(name) for name in NIXL_FIELDS):
            self.die(exchange, "decode: parameters that are not whole")
            return None
        name, samples = params["remote_request_id"], exchange.json.get("n", 1)
        if self.connector == "nixl-push" and (name[5:-9] != exchange.headers["x-request-id"] or samples > 1):
            await exchange.gone.wait()
            return None
        return all(self.ledger.take(params["remote_engine_id"], name, prompt) for _ in range(samples))

    async def say(self, exchange: Exchange, body: dict[str, Any], text: str) -> None:
        choices = [{"index": i, "text": text, "finish_reason": "length"} for i in range(body.get("n", 1))]
        if not body.get("stream"):
            exchange.whole({"choices": choices, "kv_transfer_params": None})
            return
        exchange.begin_stream()
        exchange.piece(b"data: " + json.dumps({"choices": choices}).encode() + b"\n\n")
        exchange.piece(b"data: [DONE]\n\n")
        exchange.end_stream()


# --- moods


async def fine(exchange: Exchange) -> bool:
    return False


async def broken(exchange: Exchange) -> bool:
    exchange.raw(b"HTTP/1.1 200 OK\r\n")  # (if not even this came, the connection could have been stale)
    await asyncio.sleep(0)
    exchange.reset()
    return True


async def sick(exchange: Exchange) -> bool:
    exchange.whole({"error": {"message": "Internal server error", "type": "InternalServerError", "code": 500}}, 500)
    return True


async def sick_in_a_stream(exchange: Exchange) -> bool:
    """What vLLM's streams do: status 200, and the failure as the first event."""
    exchange.begin_stream()
    exchange.piece(b'data: {"error": {"message": "Internal server error", "code": 500}}\n\ndata: [DONE]\n\n')
    exchange.end_stream()
    return True
