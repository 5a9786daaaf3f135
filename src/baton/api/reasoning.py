"""A model's thoughts apart from its answer: `<think>...</think>` at the beginning of its text.

    START ─ start marker ─▶ INSIDE ─ end marker ─▶ AFTER ─ not a blank line ─▶ CONTENT
      └── anything else: INSIDE if the prompt has opened the thoughts already, else CONTENT ──▲

Blanks around thoughts and empty lines before the answer belong to the form. The result does not depend on how the text
was cut into pieces. A new format is a line in `REASONING_FORMATS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from baton.api.tool_calls import Parsed, doubtful


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    start: str = "<think>"
    end: str = "</think>"
    always: bool = False
    """The model thinks without saying the start marker, unless the prompt has ended its thoughts."""

    def opened_by(self, prompt: str) -> bool:
        """Does the model's text begin inside of thoughts after this prompt?"""
        prompt = prompt.rstrip()
        return prompt.endswith(self.start) or (self.always and not prompt.endswith(self.end))


REASONING_FORMATS = {
    "deepseek-r1": ReasoningFormat(always=True),
    "qwen3": ReasoningFormat(),
    "qwen3-thinking": ReasoningFormat(always=True),
}


class _State(Enum):
    START = 0
    INSIDE = 1
    AFTER = 2
    CONTENT = 3


class Reasoning:
    """One answer's thoughts."""

    def __init__(self, format: ReasoningFormat, inside: bool) -> None:
        self._format = format
        self._inside = inside
        self._state = _State.START
        self._held = ""
        self._begun = False
        """Something of the thoughts was shown: blanks are part of them now."""

    def feed(self, text: str) -> Parsed:
        if self._state is _State.CONTENT:
            return Parsed(text)
        text, self._held = self._held + text, ""
        if self._state is _State.START:
            text = self._start(text)
        thoughts = ""
        if self._state is _State.INSIDE:
            thoughts, text = self._think(text)
        if self._state is _State.AFTER:
            text = text.lstrip("\r\n")
            self._state = _State.CONTENT if text else _State.AFTER
        return Parsed(text, thoughts)

    def finish(self) -> Parsed:
        """The text is at its end: what was held is what it would have been without the marker."""
        held, self._held = self._held, ""
        thinking = self._state is _State.INSIDE or (self._state is _State.START and self._inside)
        return Parsed(reasoning=held) if thinking else Parsed(held)

    def _start(self, text: str) -> str:
        """Returns what comes after the start marker, or all of it if there is none."""
        begin, marker = text.lstrip(), self._format.start
        if begin.startswith(marker):
            self._state = _State.INSIDE
            return begin[len(marker) :]
        if marker.startswith(begin):
            self._held = text
            return ""
        self._state = _State.INSIDE if self._inside else _State.CONTENT
        return text

    def _think(self, text: str) -> tuple[str, str]:
        """Thoughts, and what comes after the end marker."""
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        at = text.find(self._format.end)
        if at >= 0:
            self._state = _State.AFTER
            return text[:at].rstrip(), text[at + len(self._format.end) :]
        shown = text[: doubtful(text, self._format.end)].rstrip()
        self._held = text[len(shown) :]
        return shown, ""
