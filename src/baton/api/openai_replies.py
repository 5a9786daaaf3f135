"""OpenAI's answers on /v1/completions, and what they share with those of chats (`openai_chat_replies`): whole ones, and
stream chunks whose unchanging parts are encoded once per request.

Beside OpenAI's fields a choice carries `stop_reason` (the stop string or token id that matched, as in vLLM) and, if
`return_token_ids` was set, `token_ids` (and `prompt_token_ids`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from baton.api.dialect import DONE
from baton.api.job import Job, ModelContext
from baton.api.output import Output
from baton.api.text import TextCodec
from baton.base.messages import TokenLogprob

LEAST_LOGPROB = -9999.0
"""JSON knows no infinity."""
to_json = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class ReplyOptions:
    include_usage: bool
    continuous_usage: bool
    logprobs: int | None
    token_ids: bool


class PromptDetails(msgspec.Struct):
    cached_tokens: int


class UsageBody(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(msgspec.Struct):
    token: str
    bytes: list[int]
    logprob: float


class ContentLogprob(msgspec.Struct):
    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ContentLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct):
    """The completions route's columns, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(msgspec.Struct):
    index: int
    finish_reason: str | None
    logprobs: ChatLogprobs | TextLogprobs | None
    stop_reason: int | str | None


class TextChoice(Choice):
    text: str
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Reply(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: Sequence[Choice]
    usage: UsageBody
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


def usage_body(outputs: Sequence[Output], n: int) -> UsageBody:
    """Prompts are counted once, however many samples they have."""
    prompt = sum(outputs[k].usage.prompt_tokens for k in range(0, len(outputs), n))
    cached = sum(min(o.cached_tokens for o in outputs[k : k + n]) for k in range(0, len(outputs), n))
    completion = sum(output.usage.completion_tokens for output in outputs)
    return UsageBody(prompt, completion, prompt + completion, PromptDetails(cached))


def stop_reason(output: Output) -> int | str | None:
    """What matched, if the client asked for it: end-of-sequence tokens are not worth a mention."""
    matched = output.matched
    return matched if isinstance(matched, str) or matched in output.plan.sampling.stop_token_ids else None


def clamp(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


class ReplyWriter:
    """What both routes' writers share: the frame around every chunk."""

    def __init__(self, id: str, context: ModelContext, job: Job, options: ReplyOptions, kind: str) -> None:
        self.id = id
        self._kind = kind
        resume = job.resume
        self._created = resume.created if resume and resume.created is not None else int(time.time())
        self._context = context
        self._job = job
        self._options = options
        chunk = f"{kind}.chunk" if kind == "chat.completion" else kind
        head = {
            "id": id,
            "object": chunk,
            "created": self._created,
            "model": context.name,
            "system_fingerprint": context.fingerprint,
        }
        self._head = b"data: " + to_json(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if options.include_usage else b"]}\n\n"

    @property
    def _tokenizer(self) -> TextCodec:
        return self._context.tokenizer

    def end(self, outputs: Sequence[Output]) -> bytes:
        if not self._options.include_usage:
            return DONE
        return self._head + b'],"usage":' + to_json(usage_body(outputs, self._job.n)) + b"}\n\n" + DONE

    def _frame(self, choice: bytes, output: Output) -> bytes:
        if self._options.continuous_usage:
            return self._head + choice + b'],"usage":' + to_json(usage_body([output], 1)) + b"}\n\n"
        return self._head + choice + self._tail

    def _fresh(self, output: Output) -> slice:
        """The tokens no chunk has shown yet; they count as shown from now on."""
        start, output.sent_tokens = output.sent_tokens, len(output.tokens)
        return slice(start, output.sent_tokens)

    def _reply(self, choices: Sequence[Choice], outputs: Sequence[Output]) -> Reply:
        usage = usage_body(outputs, self._job.n)
        context = self._context
        return Reply(self.id, self._kind, self._created, context.name, context.fingerprint, choices, usage)


class CompletionWriter(ReplyWriter):
    def __init__(self, id: str, context: ModelContext, job: Job, options: ReplyOptions, *, echo: bool) -> None:
        super().__init__(id, context, job, options, "text_completion")
        self._echo = echo
        self._after = b',"logprobs":null,"finish_reason":null}' + self._tail
        self._plain = options.logprobs is None and not options.token_ids and not options.continuous_usage
        self._offsets: dict[int, int] = {}

    def delta(self, output: Output, text: str) -> bytes:
        chunk = b"" if output.opened or not self._echo else self._echoed(output)
        if self._plain:
            if text:
                chunk += self._head + b'{"index":%d,"text":' % output.index + to_json(text) + self._after
        elif (text or output.sent_tokens < len(output.tokens)) and not output.plan.scored_only:
            fresh = self._fresh(output)
            chunk += self._chunk(output, text, self._columns(output, output.logprobs[fresh]), output.tokens[fresh])
        return chunk + self._finish(output) if output.finish is not None else chunk

    def body(self, outputs: Sequence[Output]) -> bytes:
        return to_json(self._reply([self._choice(output) for output in outputs], outputs))

    def _echoed(self, output: Output) -> bytes:
        output.opened = True
        columns = None if self._options.logprobs is None else self._prompt_columns(output)
        return self._chunk(output, output.prompt.text or "", columns, [])

    def _chunk(self, output: Output, text: str, logprobs: TextLogprobs | None, tokens: list[int]) -> bytes:
        choice = b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":null' % (
            output.index,
            to_json(text),
            to_json(logprobs),
        )
        if self._options.token_ids:
            choice += b',"token_ids":' + to_json(tokens)
        return self._frame(choice + b"}", output)

    def _finish(self, output: Output) -> bytes:
        choice = b'{"index":%d,"text":"","logprobs":null,"finish_reason":"%b","stop_reason":%b}' % (
            output.index,
            (output.finish or "").encode(),
            to_json(stop_reason(output)),
        )
        return self._frame(choice, output)

    def _choice(self, output: Output) -> TextChoice:
        choice = TextChoice(output.index, output.finish, None, stop_reason(output), output.text)
        if self._options.logprobs is not None:
            columns = self._prompt_columns(output) if self._echo else TextLogprobs([], [], [], [])
            shown = [] if output.plan.scored_only else output.logprobs
            choice.logprobs = _joined(columns, self._columns(output, shown))
        if self._echo:
            choice.text = (output.prompt.text or "") + choice.text
        if self._options.token_ids:
            choice.token_ids = list(output.tokens)
            choice.prompt_token_ids = list(output.prompt.tokens)
        return choice

    def _prompt_columns(self, output: Output) -> TextLogprobs:
        """One row per prompt token; on a decode worker, which did not compute them, the logprobs are null and the
        gateway fills in the prefill worker's."""
        tokens, known = output.prompt.tokens, output.prompt_logprobs
        missing = len(tokens) - len(known)
        blank = [TokenLogprob(None, token) for token in tokens[:missing]]
        return self._rows(output, [*blank, *known])

    def _columns(self, output: Output, entries: Sequence[TokenLogprob]) -> TextLogprobs | None:
        return None if self._options.logprobs is None else self._rows(output, entries)

    def _rows(self, output: Output, entries: Sequence[TokenLogprob]) -> TextLogprobs:
        columns = TextLogprobs([], [], [], [])
        offset = self._offsets.get(output.index, 0)
        for entry in entries:
            text = self._name(entry.token)
            columns.tokens.append(text)
            columns.token_logprobs.append(None if entry.logprob is None else clamp(entry.logprob))
            columns.top_logprobs.append(self._tops(entry))
            columns.text_offset.append(offset)
            offset += len(self._tokenizer.token_text(entry.token))
        self._offsets[output.index] = offset
        return columns

    def _tops(self, entry: TokenLogprob) -> dict[str, float] | None:
        if entry.logprob is None:
            return None
        tops = {self._name(token): clamp(logprob) for logprob, token in entry.top}
        tops.setdefault(self._name(entry.token), clamp(entry.logprob))
        return tops

    def _name(self, token: int) -> str:
        """A token's text; one that is a part of a character is named by its bytes, as OpenAI does."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _joined(first: TextLogprobs, second: TextLogprobs | None) -> TextLogprobs:
    if second is None:
        return first
    return TextLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        first.top_logprobs + second.top_logprobs,
        first.text_offset + second.text_offset,
    )
