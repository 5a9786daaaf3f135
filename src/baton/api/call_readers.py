"""One call of a tool, read character by character: three ways in which models write it.

    JsonCall     {"name": "f", "arguments": {"x": 1}}     ("parameters" is the same; any order, other keys are skipped)
    NamedCall    f[ARGS]{"x": 1}
    PythonCall   f(x=1)

A reader says after each character whether the call goes on, is complete, or cannot be one. It counts as a call from
`begun` on: a tool that was offered is named, and its arguments begin. From there on the arguments are passed on as the
model writes them; whether they are right inside, the client finds out as it always must.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Collection
from enum import Enum
from typing import Any, Protocol

BLANKS = " \t\r\n"
NO_ARGUMENTS = "{}"
LONGEST_HEAD = 256
"""Characters before the arguments of a `NamedCall` or `PythonCall`."""


class Step(Enum):
    ON = 0
    DONE = 1
    """With this character."""
    BROKEN = 2
    """This character does not belong to a call."""


class Reader(Protocol):
    name: str

    @property
    def begun(self) -> bool: ...

    def feed(self, char: str) -> Step: ...

    def take(self) -> str:
        """Text of the arguments, as JSON, since the last time."""
        ...


Opener = Callable[[str, Collection[str]], Reader | None]
"""A reader for a call that begins with this character, given the tools' names; None: no call begins so."""


class _Nested:
    """Finds the end of a string, an object or an array by counting brackets outside of strings."""

    def __init__(self, quotes: str = '"') -> None:
        self._quotes = quotes
        self._quote = ""
        self._escaped = False
        self._depth = 0

    def feed(self, char: str) -> bool:
        """Is the value complete with this character?"""
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == self._quote:
                self._quote = ""
        elif char in self._quotes:
            self._quote = char
        elif char in "{[(":
            self._depth += 1
        elif char in "}])":
            self._depth -= 1
        return not self._quote and self._depth <= 0


class _Arguments:
    """What readers share: the arguments written so far, and how much of them was taken."""

    def __init__(self) -> None:
        self.name = ""
        self._fresh: list[str] = []
        self._any = False

    @property
    def begun(self) -> bool:
        return bool(self.name) and self._any

    def take(self) -> str:
        fresh, self._fresh = "".join(self._fresh), []
        return fresh

    def _write(self, text: str) -> None:
        self._any = True
        self._fresh.append(text)


class JsonCall(_Arguments):
    """`_expected` is the set of characters that may come next outside of values; "v" stands for any value."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = names
        self._expected = "{"
        self._key: str | None = None
        self._nested: _Nested | None = None
        self._value: list[str] = []
        self._streams = False
        """The value being read is the arguments' object."""

    def feed(self, char: str) -> Step:
        if self._nested is not None:
            return self._in_nested(char)
        if self._value and (char.isalnum() or char in "+-."):
            self._value.append(char)
            return Step.ON
        if self._value and not self._end_of_value():  # a number or a word: it ends where something else begins
            return Step.BROKEN
        if char in BLANKS:
            return Step.ON
        if char not in self._expected and self._expected != "v":
            return Step.BROKEN
        return self._structure(char)

    def _structure(self, char: str) -> Step:
        if self._expected == "v" or char == '"':
            return self._begin_value(char)
        if char == "}":
            return self._end()
        self._expected = {"{": '"}', ":": "v", ",": '"'}[char]
        return Step.ON

    def _begin_value(self, char: str) -> Step:
        is_arguments = self._key in ("arguments", "parameters")
        if char in "{[" or char == '"':
            if is_arguments and (char == "[" or self._any):
                return Step.BROKEN
            self._streams = is_arguments and char == "{"
            self._nested = _Nested()
            return self._in_nested(char)
        if not (char.isalnum() or char in "+-"):
            return Step.BROKEN
        self._value.append(char)
        return Step.ON

    def _in_nested(self, char: str) -> Step:
        assert self._nested is not None
        if self._streams:
            self._write(char)
        else:
            self._value.append(char)
        if not self._nested.feed(char):
            return Step.ON
        self._nested = None
        return Step.ON if self._end_of_value() else Step.BROKEN

    def _end_of_value(self) -> bool:
        """Take note of a key or value that is complete. False: it cannot be part of a call."""
        text, self._value = "".join(self._value), []
        if self._expected != "v":
            self._key, self._expected = _decoded(text), ":"
            return isinstance(self._key, str)
        key, self._key, self._expected = self._key, None, ",}"
        if key == "name":
            name = _decoded(text)
            if self.name or not isinstance(name, str) or name not in self._names:
                return False
            self.name = name
        elif key in ("arguments", "parameters") and not self._streams:
            return self._written_otherwise(_decoded(text))
        self._streams = False
        return True

    def _written_otherwise(self, value: Any) -> bool:
        """Arguments as a JSON text in a string, or none."""
        if value is None:
            return True
        if isinstance(value, str) and isinstance(_decoded(value), dict):
            self._write(value)
            return True
        return False

    def _end(self) -> Step:
        if not self.name:
            return Step.BROKEN
        if not self._any:
            self._write(NO_ARGUMENTS)
        return Step.DONE


class NamedCall(_Arguments):
    HEAD = re.compile(r"([\w.-]+)(?:\[CALL_ID\][\w-]+)?(?:\[ARGS\])?\s*")

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = names
        self._head: list[str] = []
        self._nested = _Nested()

    def feed(self, char: str) -> Step:
        if not self._any and char != "{":
            self._head.append(char)
            fits = char.isalnum() or char in "_.-[]" or char in BLANKS
            return Step.ON if fits and len(self._head) <= LONGEST_HEAD else Step.BROKEN
        if not self._any:
            head = self.HEAD.fullmatch("".join(self._head))
            if head is None or head[1] not in self._names:
                return Step.BROKEN
            self.name = head[1]
        self._write(char)
        return Step.DONE if self._nested.feed(char) else Step.ON


class PythonCall(_Arguments):
    """Complete or nothing: Python's literals become JSON when the call is closed."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = names
        self._head: list[str] = []
        self._inside: list[str] = []
        self._nested = _Nested("'\"")

    def feed(self, char: str) -> Step:
        if not self._inside and char != "(":
            self._head.append(char)
            fits = char.isalnum() or char in "_.-"
            return Step.ON if fits and len(self._head) <= LONGEST_HEAD else Step.BROKEN
        name = "".join(self._head)
        if name not in self._names:
            return Step.BROKEN
        self._inside.append(char)
        if not self._nested.feed(char):
            return Step.ON
        arguments = _keywords("".join(self._inside))
        if arguments is None:
            return Step.BROKEN
        self.name = name
        self._write(arguments)
        return Step.DONE


def json_call(char: str, names: Collection[str]) -> Reader | None:
    return JsonCall(names) if char == "{" else None


def json_or_named_call(char: str, names: Collection[str]) -> Reader | None:
    return json_call(char, names) or (NamedCall(names) if char.isalnum() or char == "_" else None)


def python_call(char: str, names: Collection[str]) -> Reader | None:
    return PythonCall(names) if char.isalpha() or char == "_" else None


def _decoded(text: str) -> Any:
    """A JSON text's value; `...`, which is none, if it is not JSON."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return ...


def _keywords(parenthesis: str) -> str | None:
    """`{"x": 1}` of `(x=1)`; None if there is anything in it but keywords with literals that JSON can say."""
    try:
        with warnings.catch_warnings(action="ignore"):  # a model's odd escapes are nobody's bug
            call = ast.parse(f"f{parenthesis}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            return None
        values = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
