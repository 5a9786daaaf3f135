"""A stream that is cut after any of its pieces and goes on elsewhere is, to the byte, the one that was not cut."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.api.dialect import Dialect, Writer
from baton.api.job import Job, ModelContext
from baton.api.journal import Journal
from baton.api.openai import Chat, Completions
from baton.api.output import Output
from baton.api.reasoning import REASONING_FORMATS
from baton.api.resume import replay
from baton.api.sglang import Generate
from baton.api.tool_calls import TOOL_FORMATS
from baton.base.clock import ManualClock
from baton.base.errors import BadRequest
from baton.base.messages import TokenLogprob, Tokens

from .models import byte_level, context, write

MOST = 10
EOS = 1
CALL = '<tool_call>{"name": "f", "arguments": {"x": "hello"}}</tool_call>'
MESSAGES = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f"}}
CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": MOST}
USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
TEXT: dict[str, Any] = {"prompt": "hello", "max_tokens": MOST}
PARAMS = {"max_new_tokens": MOST}
BODIES: dict[str, tuple[Dialect, dict[str, Any]]] = {
    "chat": (Chat(), CHAT),
    "chat of two with usage": (Chat(), {**CHAT, "n": 2, "stream_options": {"include_usage": True}}),
    "chat with logprobs": (Chat(), {**CHAT, "logprobs": True, "top_logprobs": 2, **USAGE}),
    "chat with stops": (Chat(), {**CHAT, "n": 2, "stop": ["lo", "th", "é"], "min_tokens": 2}),
    "chat with tools": (Chat(), {**CHAT, "tools": [TOOL], "max_tokens": 2 * MOST}),
    "chat with tools and ids": (Chat(), {**CHAT, "tools": [TOOL], "return_token_ids": True}),
    "completions": (Completions(), TEXT),
    "completions with echo": (Completions(), {**TEXT, "echo": True, "n": 2}),
    "completions with logprobs": (Completions(), {**TEXT, "logprobs": 1, "stop": ["hello"], "prompt": ["a", "b"]}),
    "completions with the stop": (Completions(), {**TEXT, "stop": ["o", "x"], "include_stop_str_in_output": True}),
    "generate": (Generate(), {"text": "hello", "sampling_params": PARAMS}),
    "generate of two": (Generate(), {"text": "hello", "sampling_params": {**PARAMS, "n": 2, "stop": "lo"}}),
    "generate a batch": (Generate(), {"text": ["hello", "you"], "rid": "r", "sampling_params": PARAMS}),
}
TWO = {
    "chat of two with usage",
    "chat with stops",
    "completions with echo",
    "completions with logprobs",
    "generate of two",
    "generate a batch",
}
"""Of two sequences."""
WORDS = [*"hello there", "hello", " the", "🙂", "é", "ü", "<think>", "x", "</think>", "\n", CALL, CALL[:20], CALL[11:]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelContext:
    directory: Path = tmp_path_factory.mktemp("model")
    write(byte_level(), directory, "{{ messages[0].content }}")
    here = context(directory)
    return dataclasses.replace(
        here, reasoning=REASONING_FORMATS["qwen3"], clock=ManualClock(), eos_token_ids=(EOS,), longest=4096
    )


@dataclass
class Worker:
    """The front's half of a request, with a script for an engine. `groups`: which sequences say their next token before
    each piece is written."""

    model: ModelContext
    dialect: Dialect
    body: dict[str, Any]
    scripts: Sequence[Sequence[int]]
    pieces: list[bytes] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    """Per piece, the groups that it includes."""

    def run(self, groups: Sequence[Sequence[int]], first: int = 0) -> Worker:
        numbers = itertools.count()
        tools = dataclasses.replace(TOOL_FORMATS["hermes"], new_id=lambda: f"call_{next(numbers)}")
        model = dataclasses.replace(self.model, tools=tools)
        body = {"rid": "r", **self.body, "stream": True}
        job, writer = self.dialect.parse(json.dumps(body).encode(), model, None)
        prompts = [(k, job.prompts[k // job.n], job.plans[k // job.n]) for k in range(len(self.scripts))]
        outputs = [Output(k, job.rids[k // job.n], prompt, plan, model.tokenizer) for k, prompt, plan in prompts]
        events = replay(job, outputs, writer, model)
        journal = Journal(outputs, job.resume)
        for at in range(first, len(groups) + 1):
            if at < len(groups):
                events += self._say(job, writer, outputs, groups[at], model)
            done = all(output.ended() for output in outputs)
            if done:
                events += writer.end(outputs)
            if events:
                self.pieces.append(journal.signed(events))
                self.at.append(at + 1)
                events = b""
            if done:
                return self
        raise AssertionError("the script is too short")

    def _say(
        self, job: Job, writer: Writer, outputs: Sequence[Output], group: Sequence[int], model: ModelContext
    ) -> bytes:
        texts: dict[int, str] = {}
        for k in group:
            output, script = outputs[k], self.scripts[k]
            if output.ended():
                continue
            token, count = script[len(output.tokens)], len(output.tokens) + 1
            end = job.sampling(k, model).end(token, count, (EOS,))
            wanted = output.plan.sampling.logprobs
            tops = tuple((-token / 9 - i, i) for i in range(wanted or 0))
            logprobs = () if wanted is None else (TokenLogprob(-token / 9, token, tops),)
            texts[k] = texts.get(k, "") + output.take(Tokens("", (token,), logprobs, finish=end))
        return b"".join(writer.delta(outputs[k], text) for k, text in texts.items())


def plain(pieces: Sequence[bytes]) -> bytes:
    """Without the journal, and without the time of day."""
    for piece in pieces:
        assert re.search(rb"\nid: [0-9,:;!]*\n\n$", piece)
        assert piece.count(b"\nid: ") == 1
    text = re.sub(rb"\nid: .*", b"", b"".join(pieces))
    return re.sub(rb'"response_sent_to_client_ts":[^,]*', b"", text)


def read(pieces: Sequence[bytes], count: int, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a gateway makes of the pieces: `baton_resume`."""
    outputs = before["outputs"] if before else [{"tokens": [], "finished": False} for _ in range(count)]
    outputs = [{"tokens": list(one["tokens"]), "finished": one["finished"]} for one in outputs]
    for piece in pieces:
        line = piece.rpartition(b"\nid: ")[2].strip().decode()
        for entry in line.split(";") if line else []:
            k, _, ids = entry.partition(":")
            one = outputs[int(k)]
            assert not one["finished"]
            one["finished"] = ids.endswith("!")
            one["tokens"] += [int(id) for id in ids.rstrip("!").split(",") if id]
    resume = {"outputs": outputs, "seed": 7}
    first = json.loads(pieces[0].partition(b"\n")[0][6:]) if pieces and not before else {}
    if "created" in first:
        resume |= {"id": first["id"], "created": first["created"]}
    elif before:
        resume = {**before, **resume}
    return resume


@st.composite
def stories(draw: st.DrawFn, model: ModelContext) -> tuple[str, list[list[int]], list[list[int]]]:
    """A request, what its sequences say, and how that is cut into pieces."""
    name = draw(st.sampled_from(list(BODIES)))
    count = 2 if name in TWO else 1
    scripts = []
    for _ in range(count):
        words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=2 * MOST))
        tokens = [token for word in words for token in model.tokenizer.encode(word)][: draw(st.integers(1, 3 * MOST))]
        scripts.append([*tokens, *[EOS] * 3])  # more than one where min_tokens wants more
    order = st.lists(st.lists(st.integers(0, count - 1), min_size=1, max_size=4), max_size=6 * MOST)
    return name, scripts, [*draw(order), *[list(range(count))] * (2 * MOST + 1)]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_cut_anywhere(model: ModelContext, data: st.DataObject) -> None:
    name, scripts, groups = data.draw(stories(model))
    dialect, body = BODIES[name]
    whole = Worker(model, dialect, body, scripts).run(groups)
    cut = data.draw(st.integers(0, len(whole.pieces) - 1), label="cut")
    resume = read(whole.pieces[:cut], len(scripts))
    if not cut:
        first = json.loads(whole.pieces[0].partition(b"\n")[0][6:])
        resume |= {"created": first["created"], "id": first["id"]} if "created" in first else {}
    start = whole.at[cut - 1] if cut else 0
    rest = Worker(model, dialect, {**body, "baton_resume": resume}, scripts).run(groups, start)
    assert plain(whole.pieces[:cut]) + plain(rest.pieces) == plain(whole.pieces)
    again = data.draw(st.integers(0, len(rest.pieces) - 1), label="again")
    resume = read(rest.pieces[:again], len(scripts), resume)
    start = rest.at[again - 1] if again else start
    third = Worker(model, dialect, {**body, "baton_resume": resume}, scripts).run(groups, start)
    assert plain(whole.pieces[:cut]) + plain(rest.pieces[:again]) + plain(third.pieces) == plain(whole.pieces)


def resumed(model: ModelContext, tokens: list[int], finished: bool = False, **body: Any) -> Iterator[bytes]:
    before = {"outputs": [{"tokens": tokens, "finished": finished}]}
    yield from Worker(model, Completions(), {**TEXT, **body, "baton_resume": before}, [[]]).run([]).pieces


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("text", "end", "body", "reason"),
    [
        ("hello", [], {"max_tokens": 3}, "length"),
        ("hello", [EOS], {}, "stop"),
        ("hello the", [], {"stop": [" the"]}, "stop"),
    ],
)
def test_what_has_its_end_needs_no_engine(
    model: ModelContext, text: str, end: list[int], body: dict[str, Any], reason: str, finished: bool
) -> None:
    """Shown or not: the end is said once."""
    tokens = [*model.tokenizer.encode(text), *end]
    if "max_tokens" in body:
        body = {"max_tokens": len(tokens)}
    (piece,) = resumed(model, tokens, finished, **body, stream_options={"include_usage": True})
    *events, usage, done = [part.partition(b"\nid: ")[0][6:] for part in piece.split(b"\n\n") if part]
    assert done == b"[DONE]"
    assert json.loads(usage)["usage"]["completion_tokens"] == len(tokens)
    ends = [json.loads(event)["choices"][0]["finish_reason"] for event in events]
    assert ends == ([] if finished else [reason])
    assert piece.endswith(b"id: \n\n" if finished else b"id: 0:!\n\n")


def test_an_aborted_output_stays_as_it_is(model: ModelContext) -> None:
    (piece,) = resumed(model, model.tokenizer.encode("hello"), True)
    assert piece == b"data: [DONE]\nid: \n\n"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"stream": False}, "is for streams"),
        ({"baton_resume": {"outputs": []}}, "has 0 outputs; the request has 1"),
        ({"baton_resume": {"outputs": [{"tokens": [10**6]}]}}, "token ids that are not"),
        ({"baton_resume": {"outputs": [{"tokens": [-1]}]}}, "token ids that are not"),
        ({"baton_resume": {"outputs": [{"tokens": [5] * (MOST + 1)}]}}, f"has {MOST + 1} tokens of an output that has"),
        ({"baton_resume": {"outputs": [{"tokens": [5]}], "seed": -1}}, "Expected `int` >= 0"),
        ({"echo": True, "logprobs": 1}, "logprobs of the prompt"),
        ({"baton_resume": {}}, "missing required field `outputs`"),
    ],
)
def test_what_cannot_be_resumed(model: ModelContext, body: dict[str, Any], words: str) -> None:
    whole = {**TEXT, "stream": True, "baton_resume": {"outputs": [{"tokens": [5]}]}, **body}
    with pytest.raises(BadRequest, match=words) as caught:
        Completions().parse(json.dumps(whole).encode(), model, None)
    assert (caught.value.param or "").startswith("baton_resume")


def test_generate_shows_its_past_with_logprobs(model: ModelContext) -> None:
    body = {"text": "hello", "stream": True, "return_logprob": True}
    assert not Generate().parse(json.dumps(body).encode(), model, None)[0].continuable
    body["baton_resume"] = {"outputs": [{"tokens": [5]}]}
    with pytest.raises(BadRequest, match="earlier tokens"):
        Generate().parse(json.dumps(body).encode(), model, None)


def test_seeds_go_along(model: ModelContext) -> None:
    """Unseeded: from the base that is given back, whatever the rooms; seeded: the client's."""

    def seeds(**body: Any) -> list[int]:
        whole = {**TEXT, "prompt": ["a", "b"], "n": 2, "stream": True, **body}
        job, _ = Completions().parse(json.dumps(whole).encode(), model, None)
        found = [one.sampling.seed for one in job.generates(list("wxyz"), model)]
        assert "seed" in body or found[0] == job.seed
        return found

    before = {"outputs": [{"tokens": []}] * 4}
    here = seeds(bootstrap_room=[4, 9, 2, 7])
    assert len(set(here)) == 4
    assert seeds(bootstrap_room=[4, 9, 2, 7]) == here != seeds(bootstrap_room=[5, 9, 2, 7])
    assert seeds(bootstrap_room=[5, 8, 3, 1], baton_resume={**before, "seed": here[0]}) == here
    assert seeds(baton_resume={**before, "seed": here[0]}) == here
    assert seeds(seed=3, baton_resume={**before, "seed": here[0]}) == seeds(seed=3)
