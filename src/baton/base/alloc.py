"""The allocation spec: one line of text that says which engines to run, and how many.

    native:d2t1p1                     two undivided engines
    native(P:d1t1p1|D:d2t1p1)         one prefill and two decode engines
    native[chat](D:d2|P:d1)           the same with a name; any order, missing dimensions are 1

Letters: d data parallel (for serving: independent engines), t tensor, p pipeline, c context, e expert parallel.
White space is allowed between any two tokens. One component of the experiment grammar; a whole experiment
(`+`, colocation) has no place here yet.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedEOF, UnexpectedInput, UnexpectedToken

from baton.base.errors import ConfigError, unknown

BACKENDS = ("native", "sglang", "vllm")
EXAMPLE = "native(P:d1t1p1|D:d1t1p1)"

GRAMMAR = r"""
spec: BACKEND [label] (":" dims | "(" group ("|" group)* ")")
label: "[" LABEL "]"
group: ROLE ":" dims
dims: dim+
dim: LETTER COUNT

BACKEND: /[A-Za-z_]\w*/
LABEL: /[A-Za-z_]\w*/
ROLE: /[A-Za-z_]\w*/
LETTER: /[A-Za-z]/
COUNT: /[1-9][0-9]*/
%ignore /\s+/
"""

EXPECTED = {
    "BACKEND": "a backend",
    "LABEL": "a name",
    "ROLE": "P or D",
    "LETTER": "a dimension (d, t, p, c or e)",
    "COUNT": "a number from 1",
    "COLON": '":"',
    "LPAR": '"("',
    "RPAR": '")"',
    "LSQB": '"["',
    "RSQB": '"]"',
    "VBAR": '"|"',
    "$END": "the end",
}


@dataclass(frozen=True, slots=True)
class Dims:
    """How one kind of engine is spread. `d` engines of `t * p * c` ranks; experts add no ranks."""

    d: int = 1
    t: int = 1
    p: int = 1
    c: int = 1
    e: int = 1

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.d * self.t * self.p * self.c

    def __str__(self) -> str:
        rest = "".join(f"{letter}{getattr(self, letter)}" for letter in "ce" if getattr(self, letter) != 1)
        return f"d{self.d}t{self.t}p{self.p}{rest}"


@dataclass(frozen=True, slots=True)
class Pair:
    """Prefill and decode apart."""

    prefill: Dims
    decode: Dims

    @property
    def world_size(self) -> int:
        return self.prefill.world_size + self.decode.world_size

    def __str__(self) -> str:
        return f"(P:{self.prefill}|D:{self.decode})"


@dataclass(frozen=True, slots=True)
class Allocation:
    """What a spec means. `str()` gives a spec that parses to an equal allocation."""

    backend: str
    shape: Dims | Pair
    name: str = ""

    @property
    def world_size(self) -> int:
        """Ranks in all: GPUs, where there are some."""
        return self.shape.world_size

    def __str__(self) -> str:
        label = f"[{self.name}]" if self.name else ""
        return f"{self.backend}{label}{'' if isinstance(self.shape, Pair) else ':'}{self.shape}"


def parse(text: str) -> Allocation:
    """Raises `ConfigError` with the text, a caret under the mistake and what was expected there."""
    try:
        tree = _parser().parse(text)
    except UnexpectedInput as error:
        raise _syntax_error(text, error) from None
    return _Reader(text).allocation(tree)


@functools.cache
def _parser() -> Lark:
    return Lark(GRAMMAR, start="spec", parser="lalr", lexer="contextual", maybe_placeholders=True)


class _Reader:
    """Tree to allocation; knows the text for its errors."""

    def __init__(self, text: str) -> None:
        self._text = text

    def allocation(self, tree: Tree[Token]) -> Allocation:
        backend, label, *parts = tree.children
        assert isinstance(backend, Token)
        if backend not in BACKENDS:
            raise self._error(backend, unknown("backend", backend, BACKENDS))
        name = str(label.children[0]) if isinstance(label, Tree) else ""
        trees = [part for part in parts if isinstance(part, Tree)]
        shape = self._dims(trees[0]) if trees[0].data == "dims" else self._pair(trees)
        return Allocation(str(backend), shape, name)

    def _pair(self, groups: list[Tree[Token]]) -> Pair:
        found: dict[str, Dims] = {}
        for group in groups:
            role, dims = group.children
            assert isinstance(role, Token)
            assert isinstance(dims, Tree)
            if role not in ("P", "D"):
                near = role.upper() if role.upper() in ("P", "D") else {"p": "P", "d": "D"}.get(role[:1].lower())
                hint = f' (did you mean "{near}"?)' if near else ""
                raise self._error(role, f"a group is P (prefill) or D (decode){hint}")
            if role in found:
                raise self._error(role, f"{role} is there already; one P and one D, each with d for how many engines")
            found[str(role)] = self._dims(dims)
        for wanted, what in (("P", "prefill"), ("D", "decode")):
            if wanted not in found:
                raise self._error(self._text.rindex(")"), f"no {wanted} ({what}) group; both are needed: {EXAMPLE}")
        return Pair(found["P"], found["D"])

    def _dims(self, tree: Tree[Token]) -> Dims:
        sizes: dict[str, int] = {}
        for dim in tree.children:
            assert isinstance(dim, Tree)
            letter, count = dim.children
            assert isinstance(letter, Token)
            if letter not in {field.name for field in dataclasses.fields(Dims)}:
                hint = f' (did you mean "{letter.lower()}"?)' if letter.lower() in "dtpce" else ""
                raise self._error(letter, unknown("dimension", letter, "dtpce") + hint)
            if letter in sizes:
                raise self._error(letter, f"dimension {letter} is given twice")
            sizes[str(letter)] = int(str(count))
        return Dims(**sizes)

    def _error(self, at: Token | int, message: str) -> ConfigError:
        return _error(self._text, at if isinstance(at, int) else at.start_pos or 0, message)


def _syntax_error(text: str, error: UnexpectedInput) -> ConfigError:
    at = len(text.rstrip()) if isinstance(error, UnexpectedEOF) else error.pos_in_stream or 0
    allowed: set[str] = set()
    if isinstance(error, UnexpectedToken):
        allowed = set(error.accepts or error.expected)
        if error.token.type == "$END":
            at = len(text.rstrip())
    elif isinstance(error, UnexpectedCharacters):
        allowed = set(error.allowed or ())
    if "(" not in text[:at]:
        allowed -= {"RPAR", "VBAR"}  # LALR merges states: these belong to the form with groups
    names = sorted({EXPECTED[name] for name in allowed if name in EXPECTED})
    expected = f"expected {' or '.join(names)}" if names else "not understood"
    hint = f"; for example {EXAMPLE}"
    if text[at : at + 1] == "." and '":"' in names:
        hint = '; write ":" for "."'
    elif text[at : at + 1] == "+":
        hint = "; one component only: experiments with + are not known here"
    elif text[at : at + 1] == "(" and "a dimension (d, t, p, c or e)" in names:
        hint = '; no ":" before "("'
    return _error(text, at, expected + hint)


def _error(text: str, at: int, message: str) -> ConfigError:
    """The line that holds the mistake, a caret under it, and the message."""
    start = text.rfind("\n", 0, at) + 1
    line = text[start:].split("\n", 1)[0].replace("\t", " ")
    return ConfigError(f"allocation: {message}\n    {line}\n    {' ' * (at - start)}^")
