"""Calls of tools in a model's text, found while it comes. What is not one is content, and nothing is lost.

    text ─ begin marker ─▶ OPEN ─ first character ─▶ CALL ─ complete ─▶ AFTER ─ end marker, or anything else ─▶ text
                             ▲                                            │
                             └──────────── comma, separator ──────────────┘

Until a call has begun (see `call_readers`), its characters are held; if it turns out to be none, they are shown as they
are. Blanks beside a call are no content, except between two parts of it. The result does not depend on how the text
was cut into pieces.
A new format is a line in `TOOL_FORMATS`, and perhaps a reader.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum

from baton.api.call_readers import BLANKS, Opener, Reader, Step, json_call, json_or_named_call, python_call


def openai_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def nine_letters() -> str:
    """Mistral's templates take no other ids."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls: one, or several in brackets, or several with a separator between them."""

    opener: Opener
    begin: str = ""
    end: str = ""
    separator: str = ""
    bare: bool = False
    """A call at the very beginning of the text needs no marker."""
    special: bool = False
    """The markers are special tokens, whose text must be asked for."""
    new_id: Callable[[], str] = openai_id


HERMES = ToolFormat(json_call, "<tool_call>", "</tool_call>")
LLAMA3 = ToolFormat(json_call, "<|python_tag|>", separator=";", bare=True, special=True)
TOOL_FORMATS = {
    "hermes": HERMES,
    "qwen": HERMES,
    "qwen25": HERMES,
    "llama3": LLAMA3,
    "llama3_json": LLAMA3,
    "mistral": ToolFormat(json_or_named_call, "[TOOL_CALLS]", special=True, new_id=nine_letters),
    "pythonic": ToolFormat(python_call, "<|python_start|>", "<|python_end|>", bare=True, special=True),
}
FORCED = ToolFormat(json_call, bare=True)
"""What the grammar of `tools.forced` lets a model write."""


@dataclass(slots=True)
class CallPiece:
    """A call's beginning (with its name), or more of its arguments."""

    index: int
    name: str
    """Empty: more of a call that was named before."""
    arguments: str


@dataclass(slots=True)
class Parsed:
    """What a piece of the model's text turned out to be."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallPiece] = field(default_factory=list)


def doubtful(text: str, marker: str) -> int:
    """Where a suffix of `text` begins that may still become `marker`; its end if there is none."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return len(text) - length
    return len(text)


class _State(Enum):
    TEXT = 0
    OPEN = 1
    CALL = 2
    AFTER = 3


class ToolCalls:
    """One answer's calls; `names` are the tools that may be called, `limit` how many calls the client takes."""

    def __init__(self, format: ToolFormat, names: Collection[str], limit: int | None = None) -> None:
        self._format = format
        self._names = names
        self._limit = limit
        self._state = _State.OPEN if format.bare else _State.TEXT
        self._held: list[str] = []
        """Characters that are content if no call comes of them."""
        self._reader: Reader | None = None
        self._shown = False
        """The reader's call has an index."""
        self._count = 0
        self._in_array = False
        self._beside_call = False
        """Nothing but blanks has come after a call."""
        self._said = False
        """There is content."""
        self._out = Parsed()

    def feed(self, text: str) -> Parsed:
        at = 0
        while at < len(text):
            if self._state is _State.TEXT:
                at = len(text) - len(self._scan(text[at:]))
            elif self._step(text[at]):
                at += 1
        self._pass_on()
        return self._taken()

    def finish(self) -> Parsed:
        """The text is at its end: what was held is content, a call that has begun stays as it is."""
        held = "".join(self._held)
        if not self._beside_call or held.strip():
            self._say(held)
        return self._taken()

    def _scan(self, text: str) -> str:
        """Look for the begin marker. Returns what comes after it."""
        text, self._held = "".join(self._held) + text, []
        if self._beside_call:
            if not text.strip():
                self._held = [text]
                return ""
            self._beside_call = False
            text = text if self._said else text.lstrip()
        marker = self._format.begin
        at = text.find(marker) if marker else -1
        limit = at if at >= 0 else doubtful(text, marker)
        shown = text[:limit].rstrip() if marker else text
        self._say(shown)
        if at < 0:
            self._held = [text[len(shown) :]]
            return ""
        self._held = [text[len(shown) : at + len(marker)]]
        self._state, self._in_array = _State.OPEN, False
        return text[at + len(marker) :]

    def _step(self, char: str) -> bool:
        """One character outside of text. False: it is to be looked at again, in another state."""
        if self._state is _State.CALL:
            return self._in_call(char)
        if char in BLANKS and (self._state is _State.OPEN or not "".join(self._held).strip()):
            self._held.append(char)
            return True
        return self._opening(char) if self._state is _State.OPEN else self._after(char)

    def _opening(self, char: str) -> bool:
        if char == "[" and not self._in_array:
            self._in_array = True
            self._held.append(char)
            return True
        self._reader = self._format.opener(char, self._names)
        if self._reader is None:
            return self._no_call()
        self._state, self._shown = _State.CALL, False
        return self._in_call(char)

    def _in_call(self, char: str) -> bool:
        assert self._reader is not None
        step = self._reader.feed(char)
        if step is Step.BROKEN and not self._reader.begun:
            return self._no_call()
        if self._reader.begun:
            self._held = []
        else:
            self._held.append(char)
        if step is not Step.ON:
            self._pass_on()
            self._reader, self._state, self._beside_call = None, _State.AFTER, True
        return step is not Step.BROKEN

    def _after(self, char: str) -> bool:
        tail = "".join(self._held).strip() + char
        self._held.append(char)
        if tail == self._format.end:
            self._held, self._state = [], _State.TEXT
        elif self._format.end.startswith(tail):
            pass
        elif tail == "]" and self._in_array:
            self._held, self._in_array = [], False
        elif tail == ("," if self._in_array else self._format.separator):
            self._state = _State.OPEN
        else:
            self._held.pop()
            return self._no_call()
        return True

    def _no_call(self) -> bool:
        """What was held is content (blanks beside a call may be), and so may be what follows."""
        held = "".join(self._held)
        if not self._beside_call or held.strip():
            self._say(held)
            self._held, self._beside_call = [], False
        self._reader, self._state = None, _State.TEXT
        return False

    def _say(self, text: str) -> None:
        self._out.content += text
        self._said = self._said or bool(text)

    def _pass_on(self) -> None:
        """Show what the call under way has gained."""
        if self._reader is None or not self._reader.begun:
            return
        fresh, name = self._reader.take(), "" if self._shown else self._reader.name
        if not self._shown:
            self._shown, self._count = True, self._count + 1
        if (fresh or name) and (self._limit is None or self._count <= self._limit):
            self._out.calls.append(CallPiece(self._count - 1, name, fresh))

    def _taken(self) -> Parsed:
        out, self._out = self._out, Parsed()
        return out
