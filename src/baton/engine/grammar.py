"""Structured output: which tokens a grammar allows next, by the llguidance library.

A matcher per sequence follows its output tokens. It is derived state: a sequence that comes with output already
(moved from a prefill worker, or preempted) gets a matcher that is fed those tokens. This is the one place in
the engine that knows what tokens spell, and it only hands the tokenizer to the library.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from numpy.typing import NDArray
from tokenizers import Tokenizer

from baton.base.errors import BadRequest
from baton.base.messages import Grammar
from baton.engine.sequence import Sequence

COMPILED = 64
"""Compiled grammars that are kept for the next request with the same one."""

WHITESPACE = r"[ \n\r\t]{1,64}"
"""Between JSON's tokens. Bounded, because a model that has begun with blanks may never stop."""

LIMITS = LLParserLimits(verbose_errors=False)
"""The library's own limits on how large and how ambiguous a grammar may be."""


class Constraints(Protocol):
    """What the sampler asks of structured output: `Grammars`, or `NoGrammars` where there is no tokenizer."""

    def bind(self, vocab_size: int, eos_token_ids: Seq[int]) -> None:
        """Said once, by the sampler: the width of a row of logits, and which tokens end an output."""
        ...

    def allowed(self, sequence: Sequence) -> NDArray[np.bool_]:
        """Which tokens [vocab_size] may follow; once the grammar is complete, only those that end the output.

        Raises `BadRequest` with the sequence's id as `param`.
        """
        ...

    def forget(self, sequence: Sequence) -> None:
        """Idempotent."""
        ...


class NoGrammars:
    """The null object: every request for structured output is refused, by name."""

    def bind(self, vocab_size: int, eos_token_ids: Seq[int]) -> None:
        pass

    def allowed(self, sequence: Sequence) -> NDArray[np.bool_]:
        raise BadRequest("this engine has no tokenizer and serves no structured output", param=sequence.id)

    def forget(self, sequence: Sequence) -> None:
        pass


@dataclass(slots=True)
class _Follower:
    """A matcher and how far it has followed its sequence."""

    sequence: Sequence
    matcher: LLMatcher
    seen: int


class Grammars:
    """Grammars over the tokenizer of one model directory (or of one `tokenizer.json`).

    The tokenizer is read when the first request needs it, about a second for a vocabulary of 150k.
    """

    def __init__(self, tokenizer_path: str | Path, limits: LLParserLimits = LIMITS) -> None:
        path = Path(tokenizer_path)
        self._path = path / "tokenizer.json" if path.is_dir() else path
        self._limits = limits
        self._vocab_size = 0
        self._eos_token_ids: list[int] = []
        self._environment: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._followers: dict[str, _Follower] = {}

    def bind(self, vocab_size: int, eos_token_ids: Seq[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = [token for token in eos_token_ids if 0 <= token < vocab_size]

    def allowed(self, sequence: Sequence) -> NDArray[np.bool_]:
        matcher = self._follow(sequence)
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        self._check(matcher, sequence)  # a mask of an exhausted matcher would say: end here
        allowed = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(np.bool_)
        return allowed if len(allowed) == self._vocab_size else np.pad(allowed, (0, self._vocab_size - len(allowed)))

    def forget(self, sequence: Sequence) -> None:
        self._followers.pop(sequence.id, None)

    def __repr__(self) -> str:
        return f"<Grammars {len(self._compiled)} compiled, {len(self._followers)} in use>"

    def _follow(self, sequence: Sequence) -> LLMatcher:
        """The sequence's matcher, after all of its output."""
        follower = self._followers.get(sequence.id)
        if follower is None or follower.sequence is not sequence or follower.seen > sequence.total_len:
            follower = _Follower(sequence, self._start(sequence), sequence.prompt_len)
            self._followers[sequence.id] = follower
        fresh = sequence.tokens[follower.seen :]
        if fresh:
            self._feed(follower.matcher, fresh)
            self._check(follower.matcher, sequence)
            follower.seen = sequence.total_len
        return follower.matcher

    def _feed(self, matcher: LLMatcher, tokens: Seq[int]) -> None:
        for token in tokens:
            if not (matcher.is_stopped() and token in self._eos_token_ids):  # ignore_eos: the end, over and over
                matcher.consume_token(token)

    def _start(self, sequence: Sequence) -> LLMatcher:
        grammar = sequence.sampling.grammar
        assert grammar is not None
        template = self._compiled.pop(grammar, None)
        if template is None:
            template = self._compile(grammar, sequence)
        self._compiled[grammar] = template  # the youngest
        if len(self._compiled) > COMPILED:
            self._compiled.popitem(last=False)
        return template.deep_copy()

    def _compile(self, grammar: Grammar, sequence: Sequence) -> LLMatcher:
        try:
            source = _translate(grammar)
        except (ValueError, RecursionError) as error:  # that is what the library and `json` raise
            raise self._refusal(grammar, str(error), sequence) from error
        matcher = LLMatcher(self._tokenizer(sequence), source, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise self._refusal(grammar, matcher.get_error(), sequence)
        return matcher

    def _tokenizer(self, sequence: Sequence) -> LLTokenizer:
        if self._environment is None:
            if not self._path.is_file():
                raise BadRequest(
                    f"this model serves no structured output: there is no {self._path.name} beside its weights",
                    param=sequence.id,
                )
            tokenizer = Tokenizer.from_file(str(self._path))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            width = max(self._vocab_size, tokenizer.get_vocab_size(with_added_tokens=True))
            self._environment = LLTokenizer(tokenizer.to_str(), n_vocab=width, eos_token=self._eos_token_ids or None)
        return self._environment

    def _check(self, matcher: LLMatcher, sequence: Sequence) -> None:
        if matcher.is_error():
            assert sequence.sampling.grammar is not None
            raise self._refusal(sequence.sampling.grammar, matcher.get_error(), sequence)

    @staticmethod
    def _refusal(grammar: Grammar, said: str, sequence: Sequence) -> BadRequest:
        said = said.partition("<state>")[0].removesuffix("<non-verbose/>").strip()
        return BadRequest(f"the {grammar.kind} cannot be used: {said}", param=sequence.id)


def _translate(grammar: Grammar) -> str:
    """The grammar in the library's own language. Raises `ValueError`."""
    match grammar.kind:
        case "json_schema":
            return _json(grammar.source)
        case "json_object":
            return _json('{"type": "object"}')
        case "regex":
            return str(LLMatcher.grammar_from_regex(grammar.source))
        case "ebnf":
            return str(grammar_from("ebnf", grammar.source))
        case "choice":
            return _choice(grammar.source)
        case "structural_tag":
            return grammar.source


def _json(source: str) -> str:
    schema = json.loads(source)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ValueError("a schema is a JSON object")
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults={"whitespace_pattern": WHITESPACE}))


def _choice(source: str) -> str:
    choices = json.loads(source)
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("choices are a JSON array of at least one string")
    return str(grammar_from("choice", json.dumps(choices)))
