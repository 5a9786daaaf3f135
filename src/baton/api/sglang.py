"""SGLang's native `/generate`: one prompt or a batch, text or token ids, streamed cumulatively."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

from baton.api.dialect import Writer, decode, request_id
from baton.api.job import Job, ModelContext, PDFields, Prompt, count_sequences, prompt_of, tickets
from baton.api.resume import check
from baton.api.sampling import (
    Asked,
    Plan,
    build,
    one_grammar,
    schema_grammar,
    structural_grammar,
    text_grammar,
)
from baton.api.sglang_replies import GenerateWriter, LogprobOptions
from baton.base.errors import BadRequest
from baton.base.messages import Grammar

NEW_TOKENS = 128
"""SGLang's default for `max_new_tokens`."""
NAMES: Mapping[str, str] = MappingProxyType(
    {
        "max_tokens": "max_new_tokens",
        "min_tokens": "min_new_tokens",
        "seed": "sampling_seed",
        "logprobs": "top_logprobs_num",
        "prompt_logprobs": "top_logprobs_num",
        "prompt_logprobs_start": "logprob_start_len",
    }
)
T = TypeVar("T")


class SamplingParams(msgspec.Struct, kw_only=True):
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_regex: str | list[str] | None = None
    ignore_eos: bool | None = None
    sampling_seed: int | None = None
    n: int | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    json_schema: Any = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: Any = None


class GenerateRequest(PDFields, kw_only=True):
    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: SamplingParams | list[SamplingParams] | None = None
    stream: bool | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    return_text_in_logprobs: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    # refused if they carry something
    input_embeds: Any = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    lora_path: Any = None
    token_ids_logprob: Any = None
    return_hidden_states: bool | list[bool] | None = None


UNSUPPORTED = (
    "input_embeds",
    "image_data",
    "video_data",
    "audio_data",
    "lora_path",
    "token_ids_logprob",
    "return_hidden_states",
)


class Generate:
    name = "generate"

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(GenerateRequest)

    def parse(self, body: bytes, context: ModelContext, rid: str | None) -> tuple[Job, Writer]:
        request: GenerateRequest = decode(self._decoder, body)
        for name in UNSUPPORTED:
            if getattr(request, name):
                raise BadRequest(f"{name} is not supported", param=name)
        inputs, batch = _inputs(request)
        count = len(inputs)
        plans = _plans(request, count, context)
        n = plans[0].n
        count_sequences(count, n)
        wanted = _each("return_logprob", request.return_logprob, count, False)
        job = Job(
            prompts=_prompts(inputs, context),
            plans=plans,
            tickets=tickets(request, count, n, context),
            stream=bool(request.stream),
            rids=_rids(request, rid, count),
            default_tokens=NEW_TOKENS,
            priority=request.priority or 0,
            cache_salt=request.cache_salt or request.extra_key or "",
            resume=request.baton_resume,
            cumulative_logprobs=any(wanted),
        )
        check(job, context)
        logprobs = LogprobOptions(wanted, bool(request.return_text_in_logprobs))
        return job, GenerateWriter(context, job, logprobs, batch=batch or n > 1)


def _inputs(request: GenerateRequest) -> tuple[list[str | list[int]], bool]:
    """The prompts, and whether the client sent a batch (then the answer is a list, even of one)."""
    if (request.text is None) == (request.input_ids is None):
        raise BadRequest("give either text or input_ids", param="text")
    if isinstance(request.text, str):
        return [request.text], False
    values: Sequence[Any] = request.text if request.text is not None else request.input_ids or []
    if not values:
        raise BadRequest("the prompt is empty", param="text" if request.text is not None else "input_ids")
    if all(isinstance(value, int) for value in values):
        return [list(values)], False
    if any(isinstance(value, int) for value in values):
        raise BadRequest("input_ids must be token ids or lists of token ids, not a mixture", param="input_ids")
    return list(values), True


def _prompts(inputs: Sequence[str | list[int]], context: ModelContext) -> list[Prompt]:
    return [prompt_of(value, context, "text" if isinstance(value, str) else "input_ids") for value in inputs]


def _each(name: str, value: Any, count: int, default: T) -> list[T]:
    """One value per prompt, from one for all or a list."""
    if isinstance(value, list):
        if len(value) != count:
            raise BadRequest(f"{name} has {len(value)} entries for {count} prompts", param=name)
        return value
    return [default if value is None else value] * count


def _plans(request: GenerateRequest, count: int, context: ModelContext) -> list[Plan]:
    params = _each("sampling_params", request.sampling_params, count, SamplingParams())
    wanted = _each("return_logprob", request.return_logprob, count, False)
    tops = _each("top_logprobs_num", request.top_logprobs_num, count, 0)
    starts = _each("logprob_start_len", request.logprob_start_len, count, -1)
    plans = [_plan(*each, context) for each in zip(params, wanted, tops, starts, strict=True)]
    if len({plan.n for plan in plans}) > 1:
        raise BadRequest("n must be the same for all prompts of a batch", param="n")
    return plans


def _plan(params: SamplingParams, wanted: bool, top: int, start: int, context: ModelContext) -> Plan:
    if params.stop_regex:
        raise BadRequest("stop_regex is not supported", param="stop_regex")
    if start < -1:
        raise BadRequest(f"logprob_start_len is {start}; it must be at least -1", param="logprob_start_len")
    asked = Asked(
        max_tokens=params.max_new_tokens,
        min_tokens=params.min_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=params.logit_bias,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        seed=params.sampling_seed,
        n=params.n,
        logprobs=top if wanted else None,
        prompt_logprobs=top if wanted and start >= 0 else None,
        prompt_logprobs_start=max(start, 0),
        skip_special_tokens=params.skip_special_tokens,
        keep_stop=params.no_stop_trim,
        grammar=_grammar(params),
        names=NAMES,
    )
    return build(asked, context.vocab_size, context.defaults, zero_tokens=True)


def _grammar(params: SamplingParams) -> Grammar | None:
    return one_grammar(
        {
            "json_schema": schema_grammar(params.json_schema, "json_schema"),
            "regex": text_grammar("regex", params.regex),
            "ebnf": text_grammar("ebnf", params.ebnf),
            "structural_tag": structural_grammar(params.structural_tag),
        }
    )


def _rids(request: GenerateRequest, header: str | None, count: int) -> list[str]:
    """One id per prompt; a single one is numbered in a batch."""
    given, resume = request.rid, request.baton_resume
    if count == 1 and resume is not None and resume.id is not None:
        return [resume.id]
    if isinstance(given, list):
        return [request_id(rid, "") for rid in _each("rid", given, count, "")]
    first = request_id(given or header, "")
    return [first] if count == 1 else [f"{first}_{index}" for index in range(count)]
