"""Detokenizers against the library's own decoding; stop strings against the plain definition."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.api.detokenize import BROKEN, decoder_kind
from baton.api.stops import StopMatcher
from baton.api.text import NoTokenizer, Tokenizer, load_tokenizer
from baton.base.errors import BadRequest, ConfigError

from .models import byte_fallback, byte_level, word_piece, write

WHOLE = st.text(st.characters(exclude_characters=BROKEN + "é", exclude_categories=["Cs"]), max_size=30)
"""(The vocabulary's added token é is decoded as the byte it stands for, by the library as well.)"""


@pytest.fixture(scope="module", params=[byte_level, byte_fallback, word_piece])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write(request.param(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write(byte_level(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write(byte_fallback(), tmp_path_factory.mktemp("model"))


def streamed(tokenizer: Tokenizer, tokens: list[int], prompt: list[int], *, skip_special: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt, skip_special=skip_special)
    return [*(detokenizer.feed(token) for token in tokens), detokenizer.finish()]


@given(data=st.data(), skip=st.booleans())
def test_any_bytes_stream_as_they_decode(bytewise: Tokenizer, data: st.DataObject, skip: bool) -> None:
    tokens = data.draw(st.lists(st.integers(0, bytewise.vocab_size + 2), max_size=30))
    assert "".join(streamed(bytewise, tokens, [], skip_special=skip)) == bytewise.decode(tokens, skip_special=skip)


@given(text=st.text(max_size=40), cut=st.integers(0, 60))
def test_text_comes_back_from_any_cut(tokenizer: Tokenizer, text: str, cut: int) -> None:
    """What was the prompt and what was generated: together they are the text."""
    tokens = tokenizer.encode("a " + text)
    cut = max(1, min(cut, len(tokens)))
    whole = tokenizer.decode(tokens)
    shown = "".join(streamed(tokenizer, tokens[cut:], tokens[:cut]))
    if BROKEN not in tokenizer.decode(tokens[:cut]):  # else the first character is half in the prompt
        assert tokenizer.decode(tokens[:cut]) + shown == whole


@given(text=WHOLE)
def test_never_half_a_character(bytewise: Tokenizer, text: str) -> None:
    assert not any(BROKEN in piece for piece in streamed(bytewise, bytewise.encode(text), []))


@given(text=WHOLE)
def test_never_half_a_character_in_byte_tokens(fallback: Tokenizer, text: str) -> None:
    assert not any(BROKEN in piece for piece in streamed(fallback, fallback.encode(text), []))


def test_a_broken_run_of_byte_tokens_is_not_held_back(fallback: Tokenizer) -> None:
    tokens = [
        fallback._backend.token_to_id(f"<0x{byte:02X}>") for byte in (0xE6, 0x97, 0x41, 0xFF, 0xF0, 0x9F, 0x99, 0x82)
    ]
    assert streamed(fallback, tokens, []) == ["", "", BROKEN * 2 + "A", BROKEN, "", "", "", "🙂", ""]


def test_bytes_of_an_unfinished_prompt_are_completed(bytewise: Tokenizer) -> None:
    tokens = bytewise.encode("🚀🚀")
    assert len(tokens) > 4
    assert "".join(streamed(bytewise, tokens[2:], tokens[:2])) == "🚀🚀"


def test_special_tokens_are_hidden_or_shown(bytewise: Tokenizer) -> None:
    end = bytewise._backend.token_to_id("</s>")
    tokens = [*bytewise.encode("hello"), end]
    assert "".join(streamed(bytewise, tokens, [])) == "hello"
    assert "".join(streamed(bytewise, tokens, [], skip_special=False)) == "hello</s>"


def test_long_outputs_cost_constant_work_per_token(tokenizer: Tokenizer) -> None:
    def per_token(count: int) -> float:
        tokens = [index % tokenizer.vocab_size for index in range(count)]
        started = time.perf_counter()
        streamed(tokenizer, tokens, [])
        return (time.perf_counter() - started) / count

    per_token(500)
    assert per_token(8000) < 4 * min(per_token(500) for _ in range(3)) + 2e-6


def test_encoding(bytewise: Tokenizer) -> None:
    long = "hello there, " * 800
    assert bytewise.encode(long) == bytewise._backend.encode(long).ids
    assert bytewise.least_tokens(long) <= len(bytewise.encode(long))
    with pytest.raises(BadRequest):
        bytewise.encode("\ud800")
    with pytest.raises(BadRequest):
        bytewise.encode("\ud800" + long)


def test_token_bytes(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("hello there")
    assert (
        b"".join(tokenizer.token_bytes(token) for token in tokens).replace(b" ", b"").replace(b"##", b"")
        == b"hellothere"
    )
    assert tokenizer.token_text(tokens[0])


def test_kinds() -> None:
    assert decoder_kind(None) == "window"
    assert decoder_kind({"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}) == "byte_level"
    odd = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Metaspace"}]}
    assert decoder_kind(odd) == "window"


def test_loading(tmp_path: Path) -> None:
    assert isinstance(load_tokenizer(tmp_path), NoTokenizer)
    with pytest.raises(BadRequest, match="token ids"):
        load_tokenizer(tmp_path).encode("a")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    write(byte_level(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ConfigError, match="tokenizer_config"):
        load_tokenizer(tmp_path)


def test_named_tokens_become_special(tmp_path: Path) -> None:
    backend = byte_level()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<added token>"}')
    tokenizer = Tokenizer.load(tmp_path)
    token = backend.token_to_id("<added token>")
    assert tokenizer.decode([token]) == ""
    assert tokenizer.special_tokens == {"eos_token": "<added token>"}


# --- stop strings ------------------------------------------------------------------------------------------------

LETTERS = st.text("ab", max_size=12)


def by_definition(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The first stop string to be complete when the text is read letter by letter, the longest of those."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(
    pieces=st.lists(LETTERS, max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_stops_do_not_depend_on_the_cuts(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, matched = "", None
    for piece in pieces:
        text, matched = matcher.feed(piece)
        shown += text
        if matched is not None:
            break
        assert not any(stop in shown for stop in stops)
    if matched is None:
        shown += matcher.finish()
    assert (shown, matched) == by_definition("".join(pieces), stops)


def test_only_what_may_become_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["</end>"])
    assert matcher.feed("a <") == ("a ", None)
    assert matcher.feed("b </e") == ("<b ", None)
    assert matcher.feed("nd") == ("", None)
    assert matcher.feed("!") == ("</end!", None)
    assert matcher.feed("</end> more") == ("", "</end>")
