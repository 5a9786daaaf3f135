"""What becomes of a model's text in a chat: thoughts, content and calls of tools, from one parser each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from baton.api.reasoning import Reasoning, ReasoningFormat
from baton.api.tool_calls import Parsed, ToolCalls, ToolFormat, openai_id


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How the answers of one request are to be read; the default reads nothing into them."""

    reasoning: ReasoningFormat | None = None
    thinking: bool = False
    """The text begins inside of thoughts."""
    tools: ToolFormat | None = None
    names: Collection[str] = ()
    limit: int | None = None
    new_id: Callable[[], str] = openai_id

    @property
    def plain(self) -> bool:
        return self.reasoning is None and self.tools is None

    def answer(self) -> Answer:
        return Answer(
            None if self.reasoning is None else Reasoning(self.reasoning, self.thinking),
            None if self.tools is None else ToolCalls(self.tools, self.names, self.limit),
        )

    def read(self, text: str) -> Parsed:
        """A whole text."""
        answer = self.answer()
        return joined(answer.feed(text), answer.finish())


class Answer:
    """One answer as it grows."""

    __slots__ = ("_calls", "_reasoning", "called")

    def __init__(self, reasoning: Reasoning | None, calls: ToolCalls | None) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self.called = False
        """There was a call of a tool."""

    def feed(self, text: str) -> Parsed:
        return self._read(Parsed(text) if self._reasoning is None else self._reasoning.feed(text))

    def finish(self) -> Parsed:
        rest = self._read(self._reasoning.finish()) if self._reasoning is not None else Parsed()
        return rest if self._calls is None else joined(rest, self._noted(self._calls.finish()))

    def _read(self, parsed: Parsed) -> Parsed:
        if self._calls is None or not parsed.content:
            return parsed
        content = self._noted(self._calls.feed(parsed.content))
        content.reasoning = parsed.reasoning
        return content

    def _noted(self, parsed: Parsed) -> Parsed:
        self.called = self.called or bool(parsed.calls)
        return parsed


def joined(first: Parsed, second: Parsed) -> Parsed:
    """One after the other; pieces of the same call become one."""
    calls = list(first.calls)
    for piece in second.calls:
        if calls and calls[-1].index == piece.index:
            calls[-1].arguments += piece.arguments
        else:
            calls.append(piece)
    return Parsed(first.content + second.content, first.reasoning + second.reasoning, calls)
