"""The answers of /v1/chat/completions: content, and thoughts and calls of tools where there is a parser for them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from baton.api.answers import AnswerFormat
from baton.api.job import Job, ModelContext
from baton.api.openai_replies import (
    LEAST_LOGPROB,
    ChatLogprobs,
    Choice,
    ContentLogprob,
    ReplyOptions,
    ReplyWriter,
    TopLogprob,
    clamp,
    stop_reason,
    to_json,
)
from baton.api.output import Output
from baton.api.tool_calls import CallPiece, Parsed
from baton.base.messages import TokenLogprob

PLAIN = AnswerFormat()


class Function(msgspec.Struct, omit_defaults=True):
    arguments: str
    name: str | msgspec.UnsetType = msgspec.UNSET


class ToolCall(msgspec.Struct):
    """In a stream, only a call's first piece has `id`, `type` and the function's name."""

    function: Function
    index: int | msgspec.UnsetType = msgspec.UNSET
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: str | msgspec.UnsetType = msgspec.UNSET


class Delta(msgspec.Struct):
    content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class Message(msgspec.Struct, omit_defaults=True):
    role: str
    content: str | None
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(Choice):
    message: Message
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatWriter(ReplyWriter):
    def __init__(
        self, id: str, context: ModelContext, job: Job, options: ReplyOptions, format: AnswerFormat = PLAIN
    ) -> None:
        super().__init__(id, context, job, options, "chat.completion")
        self._format = format
        self._answers = [] if format.plain else [format.answer() for _ in range(job.n)]
        self._text_chunks = [
            (
                self._head + b'{"index":%d,"delta":{"content":' % k,
                b'},"logprobs":null,"finish_reason":null}' + self._tail,
            )
            for k in range(job.n)
        ]
        self._plain = options.logprobs is None and not options.token_ids and not options.continuous_usage

    def delta(self, output: Output, text: str) -> bytes:
        chunk = b"" if output.opened else self._role(output)
        if self._answers:
            chunk += self._parsed(output, text)
        elif self._plain:
            if text:
                before, after = self._text_chunks[output.index]
                chunk += before + to_json(text) + after
        elif text or output.sent_tokens < len(output.tokens):
            chunk += self._rich(output, b'{"content":' + to_json(text) + b"}")
        return chunk + self._finish(output) if output.finish is not None else chunk

    def body(self, outputs: Sequence[Output]) -> bytes:
        reply = self._reply([self._choice(output) for output in outputs], outputs)
        if self._options.token_ids:
            reply.prompt_token_ids = list(outputs[0].prompt.tokens)
        return to_json(reply)

    def _role(self, output: Output) -> bytes:
        output.opened = True
        choice = (
            b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null' % output.index
        )
        if self._options.token_ids:
            choice += b',"prompt_token_ids":' + to_json(output.prompt.tokens)
        return self._frame(choice + b"}", output)

    def _parsed(self, output: Output, text: str) -> bytes:
        """What the text turned out to be; nothing while the parsers hold it back."""
        answer = self._answers[output.index]
        found = [answer.feed(text)] if text else []
        if output.finish is not None:
            found.append(answer.finish())
        delta = self._delta(found)
        if delta is not None:
            return self._rich(output, to_json(delta))
        if self._plain or output.sent_tokens == len(output.tokens):
            return b""
        return self._rich(output, b'{"content":""}')

    def _delta(self, found: Sequence[Parsed]) -> Delta | None:
        content = "".join(parsed.content for parsed in found)
        reasoning = "".join(parsed.reasoning for parsed in found)
        calls = [self._piece(piece) for parsed in found for piece in parsed.calls]
        if not (content or reasoning or calls):
            return None
        return Delta(content or msgspec.UNSET, reasoning or msgspec.UNSET, calls or msgspec.UNSET)

    def _piece(self, piece: CallPiece) -> ToolCall:
        if not piece.name:
            return ToolCall(Function(piece.arguments), piece.index)
        return ToolCall(Function(piece.arguments, piece.name), piece.index, self._format.new_id(), "function")

    def _rich(self, output: Output, delta: bytes) -> bytes:
        fresh = self._fresh(output)
        logprobs = self._logprobs(output.logprobs[fresh])
        choice = b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":null' % (
            output.index,
            delta,
            to_json(logprobs),
        )
        if self._options.token_ids:
            choice += b',"token_ids":' + to_json(output.tokens[fresh])
        return self._frame(choice + b"}", output)

    def _finish(self, output: Output) -> bytes:
        called = bool(self._answers) and self._answers[output.index].called
        choice = b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%b","stop_reason":%b}' % (
            output.index,
            (_reason(output, called) or "").encode(),
            to_json(stop_reason(output)),
        )
        return self._frame(choice, output)

    def _choice(self, output: Output) -> ChatChoice:
        parsed = Parsed(output.text) if self._format.plain else self._format.read(output.text)
        return ChatChoice(
            output.index,
            _reason(output, bool(parsed.calls)),
            self._logprobs(output.logprobs),
            stop_reason(output),
            self._message(parsed),
            list(output.tokens) if self._options.token_ids else msgspec.UNSET,
        )

    def _message(self, parsed: Parsed) -> Message:
        """`content` is null where there is something else instead."""
        content = parsed.content or (None if parsed.calls or parsed.reasoning else "")
        message = Message("assistant", content, reasoning_content=parsed.reasoning or msgspec.UNSET)
        if parsed.calls:
            message.tool_calls = [
                ToolCall(Function(call.arguments, call.name), id=self._format.new_id(), type="function")
                for call in parsed.calls
            ]
        return message

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if self._options.logprobs is None:
            return None
        return ChatLogprobs([self._content(entry) for entry in entries])

    def _content(self, entry: TokenLogprob) -> ContentLogprob:
        tops = [self._top(logprob, token) for logprob, token in entry.top]
        one = self._top(entry.logprob if entry.logprob is not None else LEAST_LOGPROB, entry.token)
        return ContentLogprob(one.token, one.bytes, one.logprob, tops)

    def _top(self, logprob: float, token: int) -> TopLogprob:
        data = self._tokenizer.token_bytes(token)
        return TopLogprob(data.decode("utf-8", "replace"), list(data), clamp(logprob))


def _reason(output: Output, called: bool) -> str | None:
    """A call that ran out of tokens has not ended in one."""
    return "tool_calls" if called and output.finish == "stop" else output.finish
