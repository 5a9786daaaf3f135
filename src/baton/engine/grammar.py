"""Structured output: which tokens a grammar allows next, by the llguidance library.

A matcher per sequence follows its output tokens. It is derived state: a sequence that comes with output already
(moved from a prefill worker, or preempted) gets a matcher that is fed those tokens. This is the one place in
the engine that knows what tokens spell, and it only hands the tokenizer to the library.
"""

from __future__ import annotations

import json
import threading
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


NOT_HERE = "this engine has no tokenizer and serves no structured output"


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
        raise BadRequest(NOT_HERE, param=sequence.id)

    def forget(self, sequence: Sequence) -> None:
        pass

    def warm_up(self) -> None:
        pass

    def compiled(self, grammar: Grammar) -> None:
        return None

    def compile(self, grammar: Grammar) -> object:
        raise BadRequest(NOT_HERE)


@dataclass(slots=True)
class _Follower:
    """A matcher and how far it has followed its sequence."""

    sequence: Sequence
    matcher: LLMatcher
    seen: int


class Grammars:
    """Grammars over the tokenizer of one model directory (or of one `tokenizer.json`).

    The library's table of the vocabulary takes about a second to make for 150k tokens (`warm_up`, or the first use).
    `compile` and its relatives may be called from any thread, all else is the sampler's.
    """

    def __init__(self, tokenizer_path: str | Path, limits: LLParserLimits = LIMITS) -> None:
        path = Path(tokenizer_path)
        self._path = path / "tokenizer.json" if path.is_dir() else path
        self._limits = limits
        self._vocab_size = 0
        self._eos_token_ids: list[int] = []
        self._environment: LLTokenizer | None = None
        self._making = threading.Lock()
        """The environment is made once."""
        self._shelf = threading.Lock()
        """Held for a moment only."""
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

    # --- from any thread -----------------------------------------------------------------------------------

    def warm_up(self) -> None:
        self._tokenizer()

    def compiled(self, grammar: Grammar) -> LLMatcher | None:
        with self._shelf:
            template = self._compiled.get(grammar)
            if template is not None:
                self._compiled.move_to_end(grammar)
            return template

    def compile(self, grammar: Grammar) -> LLMatcher:
        """What was compiled before is given again. Raises `BadRequest` with what the library says."""
        template = self.compiled(grammar)
        if template is not None:
            return template
        try:
            source = _translate(grammar)
        except (ValueError, RecursionError) as error:  # that is what the library and `json` raise
            raise _refusal(grammar, str(error)) from error
        template = LLMatcher(self._tokenizer(), source, log_level=0, limits=self._limits)
        if template.is_error():
            raise _refusal(grammar, template.get_error())
        with self._shelf:
            self._compiled[grammar] = template
            if len(self._compiled) > COMPILED:
                self._compiled.popitem(last=False)
        return template

    # --- inside --------------------------------------------------------------------------------------------

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
        """From what was prepared for it; compiled here and now only if nobody did."""
        grammar, template = sequence.sampling.grammar, sequence.prepared
        assert grammar is not None
        if not isinstance(template, LLMatcher):
            try:
                template = self.compile(grammar)
            except BadRequest as error:
                error.param = sequence.id
                raise
        return template.deep_copy()

    def _tokenizer(self) -> LLTokenizer:
        with self._making:
            if self._environment is None:
                self._environment = self._make_environment()
            return self._environment

    def _make_environment(self) -> LLTokenizer:
        if not self._path.is_file():
            raise BadRequest(
                f"this model serves no structured output: there is no {self._path.name} beside its weights"
            )
        tokenizer = Tokenizer.from_file(str(self._path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        width = max(self._vocab_size, tokenizer.get_vocab_size(with_added_tokens=True))
        return LLTokenizer(tokenizer.to_str(), n_vocab=width, eos_token=self._eos_token_ids or None)

    def _check(self, matcher: LLMatcher, sequence: Sequence) -> None:
        if matcher.is_error():
            assert sequence.sampling.grammar is not None
            error = _refusal(sequence.sampling.grammar, matcher.get_error())
            error.param = sequence.id
            raise error


def _refusal(grammar: Grammar, said: str) -> BadRequest:
    said = said.partition("<state>")[0].removesuffix("<non-verbose/>").strip()
    return BadRequest(f"the {grammar.kind} cannot be used: {said}")


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
