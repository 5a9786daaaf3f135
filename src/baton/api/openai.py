"""OpenAI's `/v1/completions` and `/v1/chat/completions`: requests, with the fields vLLM and SGLang add.

The answers are in `openai_replies`. Unknown keys are ignored; known ones are type-checked.
"""

from __future__ import annotations

from typing import Any

import msgspec

from baton.api.answers import AnswerFormat
from baton.api.dialect import Writer, decode, request_id
from baton.api.job import Job, ModelContext, Prompt, count_sequences, prompt_of, tickets
from baton.api.openai_chat_replies import ChatWriter
from baton.api.openai_replies import CompletionWriter, ReplyOptions
from baton.api.resume import check
from baton.api.sampling import MAX_TOP_LOGPROBS_OPENAI, Asked, Plan, build
from baton.api.structured import StructuredFields, grammar_of
from baton.api.tool_calls import openai_id
from baton.api.tools import ToolUse, tool_use
from baton.base.errors import BadRequest
from baton.base.messages import Grammar

COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions; a chat goes on as long as the context holds."""


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CommonRequest(StructuredFields, kw_only=True):
    """What both routes take."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    # vLLM and SGLang
    rid: str | None = None
    request_id: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    # refused if they carry something: an answer without them would be wrong
    prompt_logprobs: Any = None
    truncate_prompt_tokens: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    use_beam_search: Any = None
    stop_regex: Any = None
    prompt_embeds: Any = None
    lora_path: Any = None
    custom_logit_processor: Any = None


UNSUPPORTED = (
    "truncate_prompt_tokens",
    "allowed_token_ids",
    "bad_words",
    "use_beam_search",
    "stop_regex",
    "prompt_embeds",
    "lora_path",
    "custom_logit_processor",
)


class CompletionRequest(CommonRequest, kw_only=True):
    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    best_of: int | None = None


class ChatRequest(CommonRequest, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Completions:
    name = "completions"

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(CompletionRequest)

    def parse(self, body: bytes, context: ModelContext, rid: str | None) -> tuple[Job, Writer]:
        request: CompletionRequest = decode(self._decoder, body)
        context.check_model(request.model)
        _refuse_unsupported(request)
        _refuse_in_completions(request)
        plan = _completion_plan(request, context)
        special = request.add_special_tokens is not False
        prompts = [prompt_of(p, context, "prompt", special=special) for p in _prompts(request.prompt)]
        if request.echo:
            prompts = [_with_text(prompt, context) for prompt in prompts]
        name = _name(request, "cmpl-", rid)
        job = _job(request, name, prompts, plan, context, COMPLETION_TOKENS)
        options = _reply_options(request, plan)
        return job, CompletionWriter(name, context, job, options, echo=bool(request.echo))


class Chat:
    name = "chat"

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(ChatRequest)

    def parse(self, body: bytes, context: ModelContext, rid: str | None) -> tuple[Job, Writer]:
        request: ChatRequest = decode(self._decoder, body)
        context.check_model(request.model)
        _refuse_unsupported(request)
        use = tool_use(request.tools, request.tool_choice, request.parallel_tool_calls, context.tools)
        plan = _chat_plan(request, use, context)
        text = _chat_text(request, use, context)
        prompt = prompt_of(text, context, "messages", special=bool(request.add_special_tokens))
        name = _name(request, "chatcmpl-", rid)
        job = _job(request, name, [prompt], plan, context, None)
        answer = _answer_format(request, use, plan, text, context)
        return job, ChatWriter(name, context, job, _reply_options(request, plan), answer)


def _job(
    request: CommonRequest,
    name: str,
    prompts: list[Prompt],
    plan: Plan,
    context: ModelContext,
    default_tokens: int | None,
) -> Job:
    count_sequences(len(prompts), plan.n)
    job = Job(
        prompts=prompts,
        plans=[plan] * len(prompts),
        tickets=tickets(request, len(prompts), plan.n, context),
        stream=bool(request.stream),
        rids=[name] * len(prompts),
        default_tokens=default_tokens,
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
        resume=request.baton_resume,
    )
    check(job, context)
    return job


def _name(request: CommonRequest, prefix: str, header: str | None) -> str:
    resume = request.baton_resume
    if resume is not None and resume.id is not None:
        return resume.id
    return request_id(request.rid or request.request_id, prefix, header)


def _reply_options(request: CommonRequest, plan: Plan) -> ReplyOptions:
    stream = request.stream_options
    return ReplyOptions(
        include_usage=stream is not None and bool(stream.include_usage),
        continuous_usage=stream is not None and bool(stream.continuous_usage_stats),
        logprobs=plan.sampling.logprobs,
        token_ids=bool(request.return_token_ids),
    )


def _answer_format(request: ChatRequest, use: ToolUse, plan: Plan, prompt: str, context: ModelContext) -> AnswerFormat:
    """A grammar has the first word: what it lets through is no thought, and no call unless that is what it is for."""
    free = plan.sampling.grammar is None
    reasoning = None if request.separate_reasoning is False else context.reasoning
    return AnswerFormat(
        reasoning=reasoning,
        thinking=reasoning is not None and free and reasoning.opened_by(prompt),
        tools=use.format if free or use.grammar is not None else None,
        names=use.names,
        limit=use.limit,
        new_id=context.tools.new_id if context.tools is not None else openai_id,
    )


def _asked(request: CommonRequest, forced: Grammar | None = None) -> Asked:
    return Asked(
        max_tokens=request.max_tokens,
        min_tokens=request.min_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
        stop=request.stop,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=request.ignore_eos,
        seed=request.seed,
        n=request.n,
        skip_special_tokens=request.skip_special_tokens,
        keep_stop=request.include_stop_str_in_output or request.no_stop_trim,
        grammar=grammar_of(request, forced),
    )


def _completion_plan(request: CompletionRequest, context: ModelContext) -> Plan:
    asked = _asked(request)
    asked.logprobs = request.logprobs
    asked.prompt_logprobs = request.logprobs if request.echo else None
    return build(
        asked,
        context.vocab_size,
        context.defaults,
        zero_tokens=bool(request.echo),
        top_logprobs=MAX_TOP_LOGPROBS_OPENAI,
    )


def _chat_plan(request: ChatRequest, use: ToolUse, context: ModelContext) -> Plan:
    asked = _asked(request, use.grammar)
    if use.format is not None and use.format.special:
        asked.skip_special_tokens = False
    if request.max_completion_tokens is not None:
        asked.max_tokens = request.max_completion_tokens
        asked.names = {"max_tokens": "max_completion_tokens"}
    if request.top_logprobs is not None and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    if request.logprobs:
        asked.logprobs = request.top_logprobs or 0
        asked.names = {**asked.names, "logprobs": "top_logprobs"}
    return build(asked, context.vocab_size, context.defaults, top_logprobs=MAX_TOP_LOGPROBS_OPENAI)


def _prompts(value: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """The four forms of `prompt`: text, texts, token ids, lists of token ids."""
    if isinstance(value, str):
        return [value]
    if not value:
        raise BadRequest("the prompt is empty", param="prompt")
    ids = [item for item in value if isinstance(item, int)]
    if len(ids) == len(value):
        return [ids]
    texts = [item for item in value if isinstance(item, str)]
    lists = [item for item in value if isinstance(item, list)]
    if len(texts) == len(value) or len(lists) == len(value):
        return [*texts, *lists]
    raise BadRequest("prompt must be text, texts, token ids or lists of token ids, not a mixture", param="prompt")


def _with_text(prompt: Prompt, context: ModelContext) -> Prompt:
    if prompt.text is not None:
        return prompt
    return Prompt(prompt.tokens, context.tokenizer.decode(prompt.tokens, skip_special=False))


def _chat_text(request: ChatRequest, use: ToolUse, context: ModelContext) -> str:
    if not request.messages:
        raise BadRequest("messages is empty", param="messages")
    for index, message in enumerate(request.messages):
        if not isinstance(message.get("role"), str):
            raise BadRequest("a message needs a role", param=f"messages[{index}].role")
    continued = bool(request.continue_final_message)
    if continued and request.add_generation_prompt:
        raise BadRequest("continue_final_message and add_generation_prompt exclude each other", param="messages")
    extra = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        extra.setdefault("reasoning_effort", request.reasoning_effort)
    if request.documents is not None:
        extra.setdefault("documents", request.documents)
    for reserved in ("messages", "tools", "add_generation_prompt", "continue_final_message"):
        extra.pop(reserved, None)
    return context.chat.render(
        request.messages,
        tools=use.shown,
        add_generation_prompt=request.add_generation_prompt is not False and not continued,
        continue_final_message=continued,
        **extra,
    )


def _refuse_unsupported(request: CommonRequest) -> None:
    if request.prompt_logprobs is not None:
        raise BadRequest(
            "prompt_logprobs is not supported here; use echo with logprobs on /v1/completions", param="prompt_logprobs"
        )
    for name in UNSUPPORTED:
        if getattr(request, name):
            raise BadRequest(f"{name} is not supported", param=name)


def _refuse_in_completions(request: CompletionRequest) -> None:
    if request.suffix:
        raise BadRequest("suffix is not supported: the models served here only continue a text", param="suffix")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise BadRequest("best_of is supported only if equal to n", param="best_of")
