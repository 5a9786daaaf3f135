"""Text to token ids and back, from a model directory's tokenizer.json; no Transformers, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import msgspec
import tokenizers

from baton.api.detokenize import (
    BLANK,
    ByteFallback,
    ByteLevel,
    Detokenizer,
    Window,
    byte_level_piece,
    decoder_kind,
    fallback_byte,
)
from baton.base.errors import BadRequest, ConfigError

LONG_TEXT = 4096
"""Characters; encoding takes about half a microsecond for each."""
PROMPT_TAIL = 5
"""Tokens of the prompt a detokenizer looks back on."""
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TextCodec(Protocol):
    """`Tokenizer`, or `NoTokenizer` for a model directory without one."""

    special_tokens: Mapping[str, str]
    vocab_size: int

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the model wants around a plain text (BOS). Raises `BadRequest`."""
        ...

    def least_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens, without encoding."""
        ...

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str: ...

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for; may be a part of a character."""
        ...

    def token_text(self, token: int) -> str: ...

    def detokenizer(self, prompt: Sequence[int], *, skip_special: bool = True) -> Detokenizer:
        """For tokens that follow `prompt`."""
        ...


class Tokenizer:
    """A `tokenizers` tokenizer with what serving needs around it."""

    def __init__(self, backend: tokenizers.Tokenizer, decoder: Any, special_tokens: Mapping[str, str]) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._kind = decoder_kind(decoder)
        self.special_tokens = special_tokens
        self.special_ids = frozenset(id for id, token in backend.get_added_tokens_decoder().items() if token.special)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._longest = max(map(len, vocabulary), default=1)
        self.token_bytes: Callable[[int], bytes] = cache(self._token_bytes)
        self._text_or_byte: Callable[[int], str | int] = cache(self._piece)
        self._shown_bytes: Callable[[int], bytes] = cache(
            lambda token: b"" if token in self.special_ids else self.token_bytes(token)
        )
        self._shown_piece: Callable[[int], str | int] = cache(
            lambda token: "" if token in self.special_ids else self._text_or_byte(token)
        )

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Raises `ConfigError` if there is no tokenizer.json, or it cannot be read."""
        path = Path(directory) / "tokenizer.json"
        try:
            data = path.read_bytes()
            decoder = msgspec.json.decode(data, type=_TokenizerFile).decoder
            backend = tokenizers.Tokenizer.from_buffer(data)
        except FileNotFoundError as error:
            raise ConfigError(f"{path} is missing; only models with a fast tokenizer can be served") from error
        except Exception as error:
            raise ConfigError(f"{path} cannot be used: {error}") from error
        named = named_tokens(directory)
        known = [text for text in named.values() if backend.token_to_id(text) is not None]
        backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in known])
        return cls(backend, decoder, named)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        try:
            if len(text) > LONG_TEXT:  # the batch call lets other threads run
                return self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
            return self._backend.encode(text, add_special_tokens=special).ids
        except (TypeError, UnicodeEncodeError) as error:  # lone surrogates: JSON can say them, UTF-8 cannot
            raise BadRequest("the text is not valid Unicode", param="prompt") from error

    def least_tokens(self, text: str) -> int:
        return len(text) // self._longest

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        return self._backend.decode(list(tokens), skip_special_tokens=skip_special)

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode("utf-8", "replace")

    def detokenizer(self, prompt: Sequence[int], *, skip_special: bool = True) -> Detokenizer:
        tail = prompt[-PROMPT_TAIL:]
        match self._kind:
            case "byte_level":
                return ByteLevel(self._shown_bytes if skip_special else self.token_bytes, tail)
            case "byte_fallback":
                return ByteFallback(self._shown_piece if skip_special else self._text_or_byte, tail)
            case _:
                return Window(lambda tokens: self.decode(tokens, skip_special=skip_special), tail)

    def _piece(self, token: int) -> str | int:
        piece = self._backend.id_to_token(token) or ""
        byte = fallback_byte(piece)
        return piece.replace(BLANK, " ") if byte is None else byte

    def _token_bytes(self, token: int) -> bytes:
        if self._kind == "byte_level":
            return byte_level_piece(self._backend.id_to_token(token) or "")
        if self._kind == "byte_fallback":
            piece = self._text_or_byte(token)
            return bytes([piece]) if isinstance(piece, int) else piece.encode("utf-8", "replace")
        return self._backend.decode([token], skip_special_tokens=False).encode("utf-8", "replace")


class _Silent:
    def feed(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class NoTokenizer:
    """For a directory with weights only (dummy models, benchmarks): token ids in, token ids out, no text."""

    special_tokens: Mapping[str, str] = {}
    vocab_size = 0

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        raise BadRequest("this model came without a tokenizer; send token ids", param="prompt")

    def least_tokens(self, text: str) -> int:
        return 0

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        return ""

    def token_bytes(self, token: int) -> bytes:
        return b""

    def token_text(self, token: int) -> str:
        return ""

    def detokenizer(self, prompt: Sequence[int], *, skip_special: bool = True) -> Detokenizer:
        return _Silent()


def load_tokenizer(directory: str | Path) -> TextCodec:
    """The directory's tokenizer; `NoTokenizer` if it has no tokenizer.json. Raises `ConfigError` for a broken one."""
    if (Path(directory) / "tokenizer.json").exists():
        return Tokenizer.load(directory)
    return NoTokenizer()


class _TokenizerFile(msgspec.Struct):
    decoder: Any = None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no such file. Raises `ConfigError`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def named_tokens(directory: str | Path) -> dict[str, str]:
    """`{"bos_token": "<s>", ...}` from special_tokens_map.json and tokenizer_config.json (the latter wins)."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = read_json(Path(directory) / name)
        for key in NAMED_TOKENS:
            value = settings.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[key] = text
    return found
