"""One question put to any endpoint, streamed or not; its answers have one shape, so that any two can be compared.

`/generate` is asked with httpx, the OpenAI routes with the `openai` package, which checks what it reads.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import httpx
import openai
import pytest

K = TypeVar("K")
PATIENCE = 60.0


@dataclass(frozen=True, slots=True)
class Ask:
    prompt: str
    max_tokens: int = 12
    temperature: float = 0.0
    seed: int = 7
    n: int = 1
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    grammar: tuple[str, str] | None = None
    """(`regex`, `json_schema` or `ebnf`, its text)."""
    salt: str = ""
    """Requests with different ones do not find each other's pages."""


@dataclass(slots=True)
class Said:
    """One sample."""

    text: str = ""
    finish: str | None = None
    matched: str | None = None
    """The stop string."""
    logprobs: list[float] = field(default_factory=list)
    tops: list[dict[str, float]] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    said: list[Said]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(slots=True)
class Client:
    http: httpx.AsyncClient
    api: openai.AsyncOpenAI

    async def ask(self, endpoint: str, ask: Ask, *, stream: bool) -> Answer:
        return await ENDPOINTS[endpoint](self, ask, stream)


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Client]:
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, verify=False) as http:
        yield Client(http, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http))


def ask_all(url: str, asks: Mapping[K, tuple[str, Ask, bool]], *, at_once: int) -> dict[K, Answer]:
    """Every (endpoint, question, streamed?), in this order, `at_once` of them at any time."""

    async def main() -> dict[K, Answer]:
        turn = asyncio.Semaphore(at_once)
        async with client(url) as one:

            async def put(endpoint: str, ask: Ask, stream: bool) -> Answer:
                async with turn:
                    return await one.ask(endpoint, ask, stream=stream)

            answers = await asyncio.gather(*(put(*item) for item in asks.values()))
        return dict(zip(asks, answers, strict=True))

    return asyncio.run(main())


# --- what differs: the three endpoints


async def generate(client: Client, ask: Ask, stream: bool) -> Answer:
    params: dict[str, Any] = {
        "max_new_tokens": ask.max_tokens,
        "temperature": ask.temperature,
        "sampling_seed": ask.seed,
        "n": ask.n,
        "stop": list(ask.stop),
    }
    if ask.grammar is not None:
        params[ask.grammar[0]] = ask.grammar[1]
    body: dict[str, Any] = {"text": ask.prompt, "sampling_params": params, "stream": stream, "cache_salt": ask.salt}
    if ask.top_logprobs is not None:
        body |= {"return_logprob": True, "top_logprobs_num": ask.top_logprobs}
    if not stream:
        response = await client.http.post("/generate", json=body)
        assert response.status_code == 200, response.text
        answers = response.json()
        return _generated(answers if isinstance(answers, list) else [answers])
    last: dict[int, dict[str, Any]] = {}
    async with client.http.stream("POST", "/generate", json=body) as response:
        assert response.status_code == 200, (await response.aread()).decode()
        async for event in events(response):
            before = last.get(event.get("index", 0), {"text": "", "output_ids": []})
            assert event["text"].startswith(before["text"])
            assert event["output_ids"][: len(before["output_ids"])] == before["output_ids"]
            last[event.get("index", 0)] = event
    return _generated([last[index] for index in sorted(last)])


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream that must end as streams end."""
    data, rest = b"", b""
    async for chunk in response.aiter_bytes():  # (httpx's lines end at U+2028 as well, which a random model may say)
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                data = line[6:]
                if data != b"[DONE]":
                    yield json.loads(data)
    assert data == b"[DONE]"


def _generated(answers: list[dict[str, Any]]) -> Answer:
    metas = [answer["meta_info"] for answer in answers]
    said = []
    for answer, meta in zip(answers, metas, strict=True):
        finish, matched = meta["finish_reason"]["type"], meta["finish_reason"].get("matched")
        rows = meta.get("output_top_logprobs") or []
        said.append(
            Said(
                answer["text"],
                finish,
                matched if isinstance(matched, str) else None,
                [entry[0] for entry in meta.get("output_token_logprobs") or []],
                [{str(token): logprob for logprob, token, _ in row} for row in rows],
            )
        )
    return Answer(
        said,
        metas[0]["prompt_tokens"],
        sum(meta["completion_tokens"] for meta in metas),
        min(meta["cached_tokens"] for meta in metas),
    )


def _common(ask: Ask) -> dict[str, Any]:
    return {
        "model": "default",
        "max_tokens": ask.max_tokens,
        "temperature": ask.temperature,
        "seed": ask.seed,
        "n": ask.n,
        "stop": list(ask.stop),
    }


def _streamed(stream: bool) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}} if stream else {}


async def completions(client: Client, ask: Ask, stream: bool) -> Answer:
    extra: dict[str, Any] = {"cache_salt": ask.salt}
    if ask.grammar is not None:
        names = {"regex": "guided_regex", "json_schema": "guided_json", "ebnf": "guided_grammar"}
        extra[names[ask.grammar[0]]] = ask.grammar[1]
    reply = await client.api.completions.create(
        prompt=ask.prompt, logprobs=ask.top_logprobs, extra_body=extra, **_common(ask), **_streamed(stream)
    )
    said = [Said() for _ in range(ask.n)]
    usage = None
    async for part in _parts(reply, stream):
        usage = part.usage or usage
        for choice in part.choices:
            one = _end(said[choice.index], choice)
            one.text += choice.text
            if choice.logprobs is not None:
                one.logprobs += choice.logprobs.token_logprobs
                one.tops += choice.logprobs.top_logprobs
    return _counted(said, usage)


async def chat(client: Client, ask: Ask, stream: bool) -> Answer:
    extra: dict[str, Any] = {"cache_salt": ask.salt}
    more: dict[str, Any] = {}
    match ask.grammar:
        case ("json_schema", schema):
            wrapped = {"name": "it", "schema": json.loads(schema)}
            more["response_format"] = {"type": "json_schema", "json_schema": wrapped}
        case (kind, text):
            extra["structured_outputs"] = {{"regex": "regex", "ebnf": "grammar"}[kind]: text}
    if ask.top_logprobs is not None:
        more |= {"logprobs": True, "top_logprobs": ask.top_logprobs}
    reply = await client.api.chat.completions.create(
        messages=[{"role": "user", "content": ask.prompt}],
        extra_body=extra,
        **more,
        **_common(ask),
        **_streamed(stream),
    )
    said = [Said() for _ in range(ask.n)]
    usage = None
    async for part in _parts(reply, stream):
        usage = part.usage or usage
        for choice in part.choices:
            one = _end(said[choice.index], choice)
            one.text += (choice.delta if stream else choice.message).content or ""
            for entry in (choice.logprobs.content or []) if choice.logprobs is not None else []:
                one.logprobs.append(entry.logprob)
                one.tops.append({str(top.bytes): top.logprob for top in entry.top_logprobs})
    return _counted(said, usage)


async def _parts(reply: Any, stream: bool) -> AsyncIterator[Any]:
    """The chunks of a stream; a whole answer is one."""
    if not stream:
        yield reply
        return
    async for chunk in reply:
        yield chunk


def _end(said: Said, choice: Any) -> Said:
    said.finish = choice.finish_reason or said.finish
    said.matched = (choice.model_extra or {}).get("stop_reason") or said.matched
    return said


def _counted(said: list[Said], usage: Any) -> Answer:
    assert usage is not None
    cached = usage.prompt_tokens_details.cached_tokens
    return Answer(said, usage.prompt_tokens, usage.completion_tokens, cached)


ENDPOINTS: dict[str, Callable[[Client, Ask, bool], Awaitable[Answer]]] = {
    "generate": generate,
    "completions": completions,
    "chat": chat,
}


# --- are two answers the same?


def alike(ours: Answer, theirs: Answer) -> bool:
    """All but what was cached; logprobs may differ in their last bits, as the order of additions does."""
    return (
        (ours.prompt_tokens, ours.completion_tokens) == (theirs.prompt_tokens, theirs.completion_tokens)
        and len(ours.said) == len(theirs.said)
        and all(map(_same_sample, ours.said, theirs.said))
    )


def _same_sample(ours: Said, theirs: Said) -> bool:
    return (
        replace(ours, logprobs=[], tops=[]) == replace(theirs, logprobs=[], tops=[])
        and ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
        and len(ours.tops) == len(theirs.tops)
        and all(mine == pytest.approx(other, abs=1e-3) for mine, other in zip(ours.tops, theirs.tops))
    )


def unlike(ours: Mapping[K, Answer], theirs: Callable[[K], Answer]) -> list[str]:
    """What differs, to be read in a failure."""
    return [f"{key}: {answer} is not {theirs(key)}" for key, answer in ours.items() if not alike(answer, theirs(key))]


def cut_at(text: str, stops: Iterable[str]) -> str:
    """`text` up to the first stop string."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
