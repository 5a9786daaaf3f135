"""From what a client wrote to `base.messages.Sampling`: every range is checked here, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from baton.api.text import read_json
from baton.base.errors import BadRequest, ConfigError
from baton.base.messages import Grammar, Sampling

MAX_SAMPLES = 128
"""`n` and `best_of`: one sequence each."""
MAX_TOP_LOGPROBS = 128
"""/generate; the OpenAI routes allow 20."""
MAX_TOP_LOGPROBS_OPENAI = 20
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024
MAX_ROOM = 2**63
SEED_MASK = 2**63 - 1
SAME_NAMES: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request gets that says nothing: the model's own generation_config.json, as in vLLM and SGLang."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def load(cls, directory: str | Path) -> Defaults:
        """Raises `ConfigError` for a file that is there but cannot be read; odd values in it are passed over."""
        settings = read_json(Path(directory) / "generation_config.json")
        found = {field.name: settings.get(field.name) for field in fields(cls)}
        usable = {k: v for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        try:
            return msgspec.convert(usable, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"generation_config.json of {directory}: {error}") from error


NO_DEFAULTS = Defaults()


@dataclass(slots=True)
class Asked:
    """The sampling fields of any dialect under one set of names; None: not given."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[str, float] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    n: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    skip_special_tokens: bool | None = None
    keep_stop: bool | None = None
    grammar: Grammar | None = None
    names: Mapping[str, str] = field(default_factory=lambda: SAME_NAMES)
    """What this dialect calls a field, where it differs."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One prompt's validated sampling: everything but the prompt's own length and each sample's seed."""

    sampling: Sampling
    """`max_tokens` is 0 where the client named none, `seed` is -1 likewise; `sample` fills both in."""
    n: int = 1
    stops: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    keep_stop: bool = False
    """Show the stop string or stop token's text."""
    scored_only: bool = False
    """max_tokens was 0: one token is computed, none is shown (prompt logprobs)."""

    def sample(self, index: int, prompt_len: int, seed: int, *, longest: int, default: int | None) -> Sampling:
        """The sampling of sample `index`. `longest`: tokens of prompt and output together; `default`: output tokens
        if the client named none (None: as many as fit); `seed`: the sample's, if the client gave none.
        """
        max_tokens = self.sampling.max_tokens
        if not max_tokens:
            fitting = max(1, longest - prompt_len)
            wanted = fitting if default is None else max(default, self.sampling.min_tokens)
            max_tokens = min(wanted, fitting)
        if self.sampling.seed >= 0:
            seed = derived(self.sampling.seed, index)
        return msgspec.structs.replace(self.sampling, max_tokens=max_tokens, seed=seed)


def derived(seed: int, index: int) -> int:
    """A seed (or room) for sample `index` from the first one's; sample 0 keeps it. (Splitmix64, 63 bits.)"""
    if index == 0:
        return seed & SEED_MASK
    mixed = (seed + index * 0x9E3779B97F4A7C15) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) & SEED_MASK


def build(
    asked: Asked,
    vocab_size: int,
    defaults: Defaults = NO_DEFAULTS,
    *,
    zero_tokens: bool = False,
    top_logprobs: int = MAX_TOP_LOGPROBS,
) -> Plan:
    """Raises `BadRequest` naming the field. `zero_tokens`: max_tokens = 0 is allowed (score the prompt only)."""
    check = _Check(asked.names)
    max_tokens = asked.max_tokens
    if max_tokens is not None:
        check.at_least("max_tokens", max_tokens, 0 if zero_tokens else 1)
    min_tokens = check.at_least("min_tokens", asked.min_tokens or 0, 0)
    if max_tokens and min_tokens > max_tokens:
        check.refuse("min_tokens", f"is {min_tokens}, more than max_tokens ({max_tokens})")
    return Plan(
        Sampling(
            max_tokens=(max_tokens or 1) if max_tokens is not None else 0,
            seed=-1 if asked.seed is None else check.seed(asked.seed),
            min_tokens=min_tokens,
            temperature=check.between("temperature", asked.temperature, defaults.temperature, 0.0, math.inf),
            top_p=check.top_p(asked.top_p, defaults.top_p),
            top_k=check.top_k(asked.top_k, defaults.top_k),
            min_p=check.between("min_p", asked.min_p, defaults.min_p, 0.0, 1.0),
            presence_penalty=check.between("presence_penalty", asked.presence_penalty, 0.0, -2.0, 2.0),
            frequency_penalty=check.between("frequency_penalty", asked.frequency_penalty, 0.0, -2.0, 2.0),
            repetition_penalty=check.positive(
                "repetition_penalty", asked.repetition_penalty, defaults.repetition_penalty
            ),
            logit_bias=check.logit_bias(asked.logit_bias, vocab_size),
            stop_token_ids=check.token_ids("stop_token_ids", asked.stop_token_ids or (), vocab_size),
            ignore_eos=bool(asked.ignore_eos),
            logprobs=check.logprobs("logprobs", asked.logprobs, top_logprobs),
            prompt_logprobs=check.logprobs("prompt_logprobs", asked.prompt_logprobs, top_logprobs),
            prompt_logprobs_start=check.at_least("prompt_logprobs_start", asked.prompt_logprobs_start, 0),
            grammar=asked.grammar,
        ),
        n=check.samples(asked.n),
        stops=check.stops(asked.stop),
        skip_special_tokens=asked.skip_special_tokens is not False,
        keep_stop=bool(asked.keep_stop),
        scored_only=max_tokens == 0,
    )


class _Check:
    """Range checks with the dialect's own names in the message."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def refuse(self, name: str, problem: str) -> None:
        own = self._names.get(name, name)
        raise BadRequest(f"{own} {problem}", param=own)

    def at_least(self, name: str, value: int, least: int) -> int:
        if not least <= value < 2**31:
            self.refuse(name, f"is {value}; it must be at least {least}" + (" and fit 31 bits" if value > 0 else ""))
        return value

    def between(self, name: str, value: float | None, default: float, low: float, high: float) -> float:
        if value is None:
            return default
        if not (math.isfinite(value) and low <= value <= high):
            allowed = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            self.refuse(name, f"is {value:g}; it must be {allowed}")
        return float(value)

    def positive(self, name: str, value: float | None, default: float) -> float:
        if value is None:
            return default
        if not (math.isfinite(value) and value > 0):
            self.refuse(name, f"is {value:g}; it must be greater than 0")
        return float(value)

    def top_p(self, value: float | None, default: float) -> float:
        if value is None:
            return default
        if not 0.0 < value <= 1.0:
            self.refuse("top_p", f"is {value:g}; it must be greater than 0 and at most 1")
        return float(value)

    def top_k(self, value: int | None, default: int) -> int:
        if value is None:
            return default
        if not -1 <= value < 2**31:
            self.refuse("top_k", f"is {value}; it must be -1 or 0 (all), or at least 1")
        return value or -1

    def seed(self, value: int) -> int:
        if not -(2**63) <= value < 2**64:
            self.refuse("seed", "must fit 64 bits")
        return value & SEED_MASK

    def samples(self, value: int | None) -> int:
        n = 1 if value is None else value
        if not 1 <= n <= MAX_SAMPLES:
            self.refuse("n", f"is {n}; it must be between 1 and {MAX_SAMPLES}")
        return n

    def logprobs(self, name: str, value: int | None, most: int) -> int | None:
        if value is not None and not 0 <= value <= most:
            self.refuse(name, f"is {value}; it must be between 0 and {most}")
        return value

    def stops(self, value: str | Sequence[str] | None) -> tuple[str, ...]:
        stops = (value,) if isinstance(value, str) else tuple(value or ())
        if len(stops) > MAX_STOPS:
            self.refuse("stop", f"has {len(stops)} entries; at most {MAX_STOPS} are allowed")
        if any(not 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
            self.refuse("stop", f"has an entry that is empty or longer than {MAX_STOP_LENGTH} characters")
        return stops

    def token_ids(self, name: str, values: Sequence[int], vocab_size: int) -> tuple[int, ...]:
        for value in values:
            if not 0 <= value < vocab_size:
                self.refuse(name, f"has token id {value}; the vocabulary has {vocab_size}")
        return tuple(values)

    def logit_bias(self, bias: Mapping[str, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
        pairs = []
        for key, value in (bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 12):
                self.refuse("logit_bias", f"has key {key!r}; keys are token ids")
            if not math.isfinite(value) or abs(value) > 100:
                self.refuse("logit_bias", f"for token {key} is {value:g}; it must be between -100 and 100")
            pairs.append((int(key), float(value)))
        self.token_ids("logit_bias", [token for token, _ in pairs], vocab_size)
        return tuple(pairs)


def one_grammar(candidates: Mapping[str, Grammar | None]) -> Grammar | None:
    """At most one constraint may be given; the keys are the names the client used."""
    given = {name: grammar for name, grammar in candidates.items() if grammar is not None}
    if len(given) > 1:
        raise BadRequest(f"only one of {', '.join(given)} can be used at a time", param=next(iter(given)))
    return next(iter(given.values()), None)


def schema_grammar(schema: Any, param: str) -> Grammar | None:
    """A JSON schema as object or as JSON text."""
    if schema is None:
        return None
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadRequest(f"{param} is not JSON: {error}", param=param) from error
    if not isinstance(schema, dict | bool):
        raise BadRequest(f"{param} must be a JSON schema (an object)", param=param)
    return Grammar("json_schema", msgspec.json.encode(schema).decode())


def text_grammar(kind: Any, text: str | None) -> Grammar | None:
    return None if text is None else Grammar(kind, text)


def choice_grammar(choices: Sequence[str] | None, param: str) -> Grammar | None:
    if choices is None:
        return None
    if not choices:
        raise BadRequest(f"{param} is empty", param=param)
    return Grammar("choice", msgspec.json.encode(list(choices)).decode())


def structural_grammar(tag: Any) -> Grammar | None:
    if tag is None:
        return None
    return Grammar("structural_tag", tag if isinstance(tag, str) else msgspec.json.encode(tag).decode())


JSON_OBJECT = Grammar("json_object", '{"type":"object"}')
