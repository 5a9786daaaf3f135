"""Structured output over a tiny tokenizer of bytes and random logits: what comes out always fits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from baton.api.answers import AnswerFormat
from baton.api.tools import tool_use
from baton.base.errors import BadRequest
from baton.base.messages import Grammar, Sampling
from baton.engine.grammar import COMPILED, Grammars
from baton.engine.sampler import Sampler
from baton.engine.sequence import Sequence

EOS = 256
VOCAB = 264
"""More than the tokenizer has, as with models whose tables are padded."""

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory as far as grammars care: one token for each byte, one that ends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    path = tmp_path_factory.mktemp("model")
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def grammars(directory: Path) -> Grammars:
    return Grammars(directory)


def sequence(grammar: Grammar, seed: int = 0, output: tuple[int, ...] = (), **options: float) -> Sequence:
    sampling = Sampling(400, seed, grammar=grammar, **options)  # type: ignore[arg-type]
    return Sequence(f"s{seed}", [1, 2, *output], 2, sampling)


def generate(sampler: Sampler, one: Sequence, steps: int = 400) -> list[int]:
    """Tokens of the output, the end excluded, by random logits that depend on the position only."""
    while one.output_len < steps:
        generator = torch.Generator().manual_seed(one.sampling.seed * 1000 + one.total_len)
        (result,) = sampler.sample(3 * torch.randn(1, VOCAB, generator=generator), [one])
        assert result.token is not None
        if result.token == EOS:
            break
        one.tokens.append(result.token)
    return one.tokens[one.prompt_len :]


@pytest.mark.parametrize("seed", range(12))
def test_a_schemas_outputs_parse_and_fit(grammars: Grammars, tokenizer: Tokenizer, seed: int) -> None:
    text = tokenizer.decode(generate(sampler(grammars), sequence(Grammar("json_schema", json.dumps(SCHEMA)), seed)))
    value = json.loads(text)
    assert set(value) == {"name", "age", "tags"}
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 5
    assert 0 <= value["age"] <= 150
    assert len(value["tags"]) <= 3
    assert set(value["tags"]) <= {"a", "b", "ü"}


CITY = {"type": "string", "enum": ["Bern", "Oslo"]}
TOOLS = [
    {"function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"],
        "additionalProperties": False, "$defs": {"City": CITY},
    }}},
    {"function": {"name": "tree", "parameters": {
        "type": "object", "properties": {"child": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["child"],
        "additionalProperties": False,
    }}},
    {"function": {"name": "now"}},
]  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_is_one_of_the_tools(
    grammars: Grammars, tokenizer: Tokenizer, seed: int, choice: str | dict[str, object]
) -> None:
    use = tool_use(TOOLS, choice, False, None)
    assert use.grammar is not None
    assert use.format is not None
    text = tokenizer.decode(generate(sampler(grammars), sequence(use.grammar, seed)))
    (call,) = json.loads(text)
    assert list(call) == ["name", "parameters"]
    assert call["name"] in use.names
    if call["name"] == "weather":
        assert call["parameters"]["city"] in CITY["enum"]
    (found,) = AnswerFormat(tools=use.format, names=use.names).read(text).calls
    assert (found.name, json.loads(found.arguments)) == (call["name"], call["parameters"])


def sampler(grammars: Grammars) -> Sampler:
    return Sampler(VOCAB, [EOS], grammars)


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("regex", r"[0-9]{3}-(ab|cd)+x"), r"[0-9]{3}-(ab|cd)+x"),
        (Grammar("json_schema", '{"enum": [1, "z", null]}'), '1|"z"|null'),
        (Grammar("choice", json.dumps(["yes", "no", "né\n"])), "yes|no|né\n"),
        (Grammar("ebnf", 'start: "<" /[a-c]{2}/ ">"'), "<[abc]{2}>"),
        (Grammar("ebnf", 'root ::= "a" | "b" root'), "b*a"),
        (
            Grammar("structural_tag", json.dumps({"grammars": [{"lark_grammar": 'start: "f(" /[0-9]/ ")"'}]})),
            r"f\(\d\)",
        ),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_each_kind_of_grammar(
    grammars: Grammars, tokenizer: Tokenizer, grammar: Grammar, pattern: str, seed: int
) -> None:
    text = tokenizer.decode(generate(sampler(grammars), sequence(grammar, seed)))
    assert re.fullmatch(pattern, text)


def test_any_object_is_an_object_as_far_as_it_goes(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Without a schema nothing ends the strings of a random model; a greedy taste for `}` does."""
    closing = tokenizer.token_to_id("}")
    one = sequence(Grammar("json_object", ""), temperature=0.0, logit_bias=((closing, 50.0), (EOS, 60.0)))  # type: ignore[arg-type]
    assert json.loads(tokenizer.decode(generate(sampler(grammars), one))) == {}


def test_only_the_end_may_follow_a_complete_output(grammars: Grammars) -> None:
    """Also with ignore_eos and min_tokens, which cannot ask for what the grammar does not have."""
    here = sampler(grammars)
    one = sequence(Grammar("choice", '["a"]'), min_tokens=10, temperature=0.0)
    for expected in (0, None, None, None):
        (result,) = here.sample(torch.zeros(1, VOCAB), [one])
        assert result.token is not None
        if expected is None:
            assert result.token == EOS
        one.tokens.append(result.token)


def test_the_width_is_the_models(grammars: Grammars) -> None:
    sampler(grammars)
    allowed = grammars.allowed(sequence(Grammar("regex", r"(.|\n)*"), seed=99))
    assert allowed.shape == (VOCAB,)
    assert not allowed[EOS + 1 :].any()


def test_a_tokenizer_larger_than_the_model(directory: Path) -> None:
    small = Grammars(directory)
    small.bind(100, [5])
    assert small.allowed(sequence(Grammar("regex", "[a-z]"))).shape == (100,)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(0, 40), forget=st.booleans())
def test_an_output_goes_on_where_it_was(directory: Path, seed: int, cut: int, forget: bool) -> None:
    """Preempted (the state was dropped) or moved to another worker (which never had it): the same words follow."""
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    whole = generate(sampler(Grammars(directory)), sequence(grammar, seed))
    here = sampler(Grammars(directory))
    one = sequence(grammar, seed)
    generate(here, one, steps=cut)
    if forget:
        here.forget(one)
    else:
        here, one = sampler(Grammars(directory)), sequence(grammar, seed, tuple(one.tokens[2:]))
    assert generate(here, one) == whole


def test_a_batch_with_and_without_grammars(grammars: Grammars, tokenizer: Tokenizer) -> None:
    here = sampler(grammars)
    free = Sequence("free", [1], 1, Sampling(9, temperature=0.0))
    bound = sequence(Grammar("choice", '["x"]'), temperature=0.0)
    logits = torch.zeros(2, VOCAB)
    logits[:, 7] = 1.0
    tokens = [result.token for result in here.sample(logits, [free, bound])]
    assert tokens == [7, tokenizer.token_to_id("x")]


def test_logprobs_do_not_see_the_grammar(grammars: Grammars) -> None:
    one = sequence(Grammar("choice", '["x"]'), logprobs=1)
    (result,) = sampler(grammars).sample(torch.zeros(1, VOCAB), [one])
    assert result.logprob is not None
    assert result.logprob.logprob == pytest.approx(torch.zeros(VOCAB).log_softmax(-1)[0].item())


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar("json_schema", "{"), "Expecting property name"),
        (Grammar("json_schema", "3"), "a schema is a JSON object"),
        (Grammar("json_schema", '{"type": "nonsense"}'), "Invalid type: nonsense"),
        (Grammar("json_schema", '{"$ref": "http://127.0.0.1/x"}'), "not present in a registry"),
        (Grammar("json_schema", "[" * 100_000), "recursion"),
        (Grammar("json_schema", '{"not": ' * 500 + "{}" + "}" * 500), "recursion"),
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("ebnf", "start: foo"), 'unknown name: "foo"'),
        (Grammar("choice", "[]"), "at least one string"),
        (Grammar("choice", "[1]"), "at least one string"),
        (Grammar("choice", "yes"), "Expecting value"),
        (Grammar("structural_tag", "{}"), "missing field"),
        (Grammar("structural_tag", "{"), "line 1 column 1"),
    ],
)
def test_a_grammar_that_does_not_compile_names_its_sequence(grammars: Grammars, grammar: Grammar, said: str) -> None:
    here = sampler(grammars)
    good = Sequence("good", [1], 1, Sampling(9))
    with pytest.raises(BadRequest, match=re.escape(said)) as caught:
        here.sample(torch.zeros(2, VOCAB), [good, sequence(grammar)])
    assert caught.value.param == "s0"
    assert grammar.kind in caught.value.message
    assert "<state>" not in caught.value.message
    assert here.sample(torch.zeros(1, VOCAB), [good])[0].token is not None


def test_output_that_does_not_fit_is_refused(grammars: Grammars) -> None:
    with pytest.raises(BadRequest, match="cannot be used") as caught:
        sampler(grammars).sample(torch.zeros(1, VOCAB), [sequence(Grammar("regex", "a+"), output=(5, 6))])
    assert caught.value.param == "s0"


def test_a_grammar_that_outgrows_its_limits_is_refused_when_it_does(directory: Path) -> None:
    """Then the library would let the output end, as if it were complete."""
    here = sampler(Grammars(directory, LLParserLimits(step_max_items=3, verbose_errors=False)))
    one = sequence(Grammar("ebnf", 'start: a\na: "x" a | "x" a "y" | b\nb: a | a "z" | "q"'))
    with pytest.raises(BadRequest, match="the ebnf cannot be used: parser error: Too many items") as caught:
        generate(here, one, 20)
    assert caught.value.param == "s0"


def test_a_model_without_tokenizer_json_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"no tokenizer\.json"):
        sampler(Grammars(tmp_path)).sample(torch.zeros(1, VOCAB), [sequence(Grammar("regex", "a"))])


def test_memory_is_bounded(directory: Path) -> None:
    """Compiled grammars are few, followers are gone with their sequences."""
    grammars = Grammars(directory)
    here = sampler(grammars)
    for number in range(2 * COMPILED):
        one = sequence(Grammar("regex", f"a{{{number + 1}}}"), number)
        here.sample(torch.zeros(1, VOCAB), [one])
        here.forget(one)
        here.forget(one)
    assert repr(grammars) == f"<Grammars {COMPILED} compiled, 0 in use>"
