"""Answers of `/generate`. Streams are cumulative, as SGLang's are: every event repeats all text, ids and logprobs so
far. The repeated parts are kept as encoded JSON and only grown, so that an event costs a copy, not an encoding."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from baton.api.dialect import DONE
from baton.api.job import Job, ModelContext
from baton.api.openai_replies import clamp
from baton.api.output import Output
from baton.api.text import TextCodec
from baton.base.clock import Clock
from baton.base.messages import Timeline, TokenLogprob

_json = msgspec.json.Encoder().encode
Entry = tuple[float | None, int, str | None]
"""`[logprob, token id, text]`"""


@dataclass(frozen=True, slots=True)
class LogprobOptions:
    wanted: list[bool]
    """One per prompt."""
    with_text: bool


class MetaInfo(msgspec.Struct, kw_only=True):
    id: str
    finish_reason: dict[str, Any] | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    weight_version: str = "default"
    num_retractions: int
    input_token_logprobs: list[Entry] | msgspec.UnsetType = msgspec.UNSET
    output_token_logprobs: list[Entry] | msgspec.UnsetType = msgspec.UNSET
    output_token_logprobs_length: int | msgspec.UnsetType = msgspec.UNSET
    input_top_logprobs: list[list[Entry] | None] | msgspec.UnsetType = msgspec.UNSET
    output_top_logprobs: list[list[Entry] | None] | msgspec.UnsetType = msgspec.UNSET
    e2e_latency: float
    first_token_latency: float | None
    response_sent_to_client_ts: float
    timeline: dict[str, float] | None


class Answer(msgspec.Struct, kw_only=True):
    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | msgspec.UnsetType = msgspec.UNSET


def finish_reason(output: Output) -> dict[str, Any] | None:
    match output.finish:
        case None:
            return None
        case "length":
            return {"type": "length", "length": output.usage.completion_tokens}
        case "abort":
            return {"type": "abort", "message": output.message, "status_code": None, "err_type": None}
        case _:
            return {"type": "stop", "matched": output.matched}


def stages(timeline: Timeline | None) -> dict[str, float] | None:
    """When each stage began, in seconds after the engine got the request; stages that did not happen are left out."""
    if timeline is None:
        return None
    marks = msgspec.structs.asdict(timeline)
    return {name: round(at - timeline.received, 6) for name, at in marks.items() if at and name != "received"}


@dataclass(slots=True)
class _Grown:
    """One output's encoded JSON so far."""

    before: bytes
    text: bytearray = field(default_factory=bytearray)
    ids: bytearray = field(default_factory=bytearray)
    first_token: float | None = None


class GenerateWriter:
    def __init__(self, context: ModelContext, job: Job, logprobs: LogprobOptions, *, batch: bool) -> None:
        self._context = context
        self._job = job
        self._logprobs = logprobs
        self._batch = batch
        self._clock: Clock = context.clock
        self._started = self._clock.now()
        self._grown: dict[int, _Grown] = {}

    def delta(self, output: Output, text: str) -> bytes:
        fresh = output.tokens[output.sent_tokens :]
        if not fresh and not text and output.finish is None:
            return b""
        output.sent_tokens = len(output.tokens)
        grown = self._grown.get(output.index) or self._begin(output)
        if text:
            grown.text += _json(text)[1:-1]
        if fresh and not output.plan.scored_only:
            grown.ids += b"".join([b",%d" % token for token in fresh])
        if output.finish is not None or self._wants(output):
            return b"data: " + _json(self._answer(output, streamed=True)) + b"\n\n"
        counts = b',"completion_tokens":%d,"cached_tokens":%d}' % (len(output.tokens), output.cached_tokens)
        index = b',"index":%d}\n\n' % output.index if self._batch else b"}\n\n"
        ids = memoryview(grown.ids)[1:]
        parts = (
            b'data: {"text":"',
            grown.text,
            b'","output_ids":[',
            ids,
            b'],"meta_info":',
            grown.before,
            counts,
            index,
        )
        return b"".join(parts)

    def end(self, outputs: Sequence[Output]) -> bytes:
        return DONE

    def body(self, outputs: Sequence[Output]) -> bytes:
        answers = [self._answer(output, streamed=False) for output in outputs]
        return _json(answers if self._batch else answers[0])

    def _begin(self, output: Output) -> _Grown:
        meta = {"id": output.rid, "finish_reason": None, "prompt_tokens": len(output.prompt.tokens)}
        meta |= {"weight_version": "default", "num_retractions": 0}
        grown = self._grown[output.index] = _Grown(_json(meta)[:-1], first_token=self._clock.now())
        return grown

    def _answer(self, output: Output, *, streamed: bool) -> Answer:
        ids = [] if output.plan.scored_only else output.tokens
        answer = Answer(text=output.text, output_ids=ids, meta_info=self._meta(output))
        if streamed and self._batch:
            answer.index = output.index
        return answer

    def _meta(self, output: Output) -> MetaInfo:
        now = self._clock.now()
        usage = output.usage
        grown = self._grown.get(output.index)
        meta = MetaInfo(
            id=output.rid,
            finish_reason=finish_reason(output),
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            num_retractions=usage.retractions,
            e2e_latency=now - self._started,
            first_token_latency=_first_token(output, grown, self._started),
            response_sent_to_client_ts=time.time(),
            timeline=stages(output.timeline),
        )
        if self._wants(output):
            self._add_logprobs(meta, output)
        return meta

    def _wants(self, output: Output) -> bool:
        return self._logprobs.wanted[output.index // self._job.n]

    def _add_logprobs(self, meta: MetaInfo, output: Output) -> None:
        shown = [] if output.plan.scored_only else output.logprobs
        prompt = self._prompt_entries(output)
        meta.output_token_logprobs = [self._entry(entry) for entry in shown]
        meta.output_token_logprobs_length = len(shown)
        meta.input_token_logprobs = [self._entry(entry) for entry in prompt]
        if output.plan.sampling.logprobs:
            meta.output_top_logprobs = [self._tops(entry) for entry in shown]
            meta.input_top_logprobs = [self._tops(entry) for entry in prompt]

    def _prompt_entries(self, output: Output) -> list[TokenLogprob]:
        """Of the positions from `logprob_start_len` on; the very first token of a prompt has no logprob. Empty on a
        decode worker: the gateway puts the prefill worker's there."""
        sampling, known = output.plan.sampling, output.prompt_logprobs
        if sampling.prompt_logprobs is None or not known:
            return []
        tokens = output.prompt.tokens
        start = min(sampling.prompt_logprobs_start, len(tokens))
        first = [TokenLogprob(None, tokens[0])] if start == 0 else []
        count = len(tokens) - max(start, 1)
        return [*first, *known[len(known) - count :]] if count else first

    def _entry(self, entry: TokenLogprob) -> Entry:
        logprob = None if entry.logprob is None else clamp(entry.logprob)
        return logprob, entry.token, self._text(entry.token)

    def _tops(self, entry: TokenLogprob) -> list[Entry] | None:
        if entry.logprob is None:
            return None
        return [(clamp(logprob), token, self._text(token)) for logprob, token in entry.top]

    def _text(self, token: int) -> str | None:
        return self._tokenizer.token_text(token) if self._logprobs.with_text else None

    @property
    def _tokenizer(self) -> TextCodec:
        return self._context.tokenizer


def _first_token(output: Output, grown: _Grown | None, started: float) -> float | None:
    if grown is not None and grown.first_token is not None:
        return grown.first_token - started
    timeline = output.timeline
    return timeline.first_token - started if timeline is not None and timeline.first_token else None
