"""How a job is asked at each endpoint, and what a chunk of its answer says: one small class per wire format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from baton.base.errors import ConfigError
from baton.lab.config import BenchConfig
from baton.lab.workload import Job

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "life", "child", "world", "school", "water", "house")
"""Common words, one token each in most vocabularies."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one event, or one whole answer, says."""

    content: bool = False
    """It carries text or token ids."""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    error: str = ""


class Endpoint(Protocol):
    path: str

    def body(self, job: Job) -> bytes: ...

    def read(self, data: bytes) -> Chunk:
        """Of one event (never `[DONE]`) or one whole answer. Raises `msgspec.MsgspecError` for other JSON."""
        ...


# Only the fields that are looked at; msgspec skips the others without building objects.


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    message: _Delta | None = None

    @property
    def content(self) -> bool:
        part = self.delta or self.message
        if part is not None:
            return bool(part.content or part.reasoning_content or part.reasoning)
        return bool(self.text)


class _OpenAIChunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Meta(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


class _GenerateChunk(msgspec.Struct):
    text: str | None = None
    output_ids: list[int] = []
    meta_info: _Meta | None = None
    error: Any = None


class OpenAI:
    """`/v1/completions` and `/v1/chat/completions`: they differ in how the prompt is written."""

    def __init__(self, path: str, prompt: Callable[[Job], dict[str, Any]], config: BenchConfig, model: str) -> None:
        self.path = path
        self._prompt = prompt
        self._config = config
        self._extra = _extra(config)
        self._model = model
        self._decoder = msgspec.json.Decoder(_OpenAIChunk)

    def body(self, job: Job) -> bytes:
        config = self._config
        fields: dict[str, Any] = {"model": self._model, **self._prompt(job), "max_tokens": job.output_len}
        fields["temperature"] = config.temperature
        if config.temperature > 0:
            fields["seed"] = config.seed + job.index
        if config.ignore_eos:
            fields["ignore_eos"] = True
        if config.stream:
            fields["stream"] = True
            fields["stream_options"] = {"include_usage": True}
        return msgspec.json.encode(fields | self._extra)

    def read(self, data: bytes) -> Chunk:
        chunk = self._decoder.decode(data)
        content = any(choice.content for choice in chunk.choices)
        error = msgspec.json.encode(chunk.error).decode() if chunk.error is not None else ""
        if chunk.usage is None:
            return Chunk(content, error=error)
        usage = chunk.usage
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details is not None else None
        return Chunk(content, usage.prompt_tokens, usage.completion_tokens, cached, error)


class Generate:
    """SGLang's `/generate`: every event repeats the text so far, `meta_info` counts the tokens."""

    path = "/generate"

    def __init__(self, config: BenchConfig) -> None:
        self._config = config
        self._extra = _extra(config)
        self._decoder = msgspec.json.Decoder(_GenerateChunk)

    def body(self, job: Job) -> bytes:
        config = self._config
        prompt: dict[str, Any] = {"text": text(job)} if config.prompt_format == "text" else {"input_ids": job.prompt}
        sampling: dict[str, Any] = {
            "max_new_tokens": job.output_len,
            "temperature": config.temperature,
            "ignore_eos": config.ignore_eos,
        }
        return msgspec.json.encode(prompt | {"sampling_params": sampling, "stream": config.stream} | self._extra)

    def read(self, data: bytes) -> Chunk:
        chunk = self._decoder.decode(data)
        error = msgspec.json.encode(chunk.error).decode() if chunk.error is not None else ""
        content = bool(chunk.text or chunk.output_ids)
        if chunk.meta_info is None:
            return Chunk(content, error=error)
        meta = chunk.meta_info
        return Chunk(content, meta.prompt_tokens, meta.completion_tokens, meta.cached_tokens, error)


def text(job: Job) -> str:
    """As many common words as the prompt has tokens: about as many tokens (the answer's usage tells exactly)."""
    return " ".join(WORDS[token % len(WORDS)] for token in job.prompt)


def _extra(config: BenchConfig) -> dict[str, Any]:
    if not config.extra_body:
        return {}
    try:
        return msgspec.json.decode(config.extra_body, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ConfigError(f"extra_body is not a JSON object: {error}") from error


def endpoint(config: BenchConfig, model: str) -> Endpoint:
    """Raises `ConfigError` if the extra fields are no JSON object."""
    if config.endpoint == "generate":
        return Generate(config)
    if config.endpoint == "chat":
        return OpenAI(
            "/v1/chat/completions", lambda job: {"messages": [{"role": "user", "content": text(job)}]}, config, model
        )
    words = config.prompt_format == "text"
    return OpenAI("/v1/completions", lambda job: {"prompt": text(job) if words else job.prompt}, config, model)
