"""Token ids to text while they come: never half a character, constant work per token.

Three ways to join tokens, told apart by the `decoder` section of tokenizer.json:

    ByteLevel      GPT-2, Llama 3, Qwen, SmolLM: a token is a few bytes; the text is the UTF-8 of all bytes
    ByteFallback   Llama 2, Mistral, Gemma: a token is text (with the sign for a blank), or one byte as <0xE4>
    Window         everything else: decode the last few tokens with and without the new one, and compare
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any, Protocol

BLANK = "\u2581"
BROKEN = "\ufffd"
LONGEST_PENDING = 8
"""Tokens a window holds back at most: a character has at most four bytes, the rest is broken for good."""


class Detokenizer(Protocol):
    def feed(self, token: int) -> str:
        """The text that is certain now; `""` while a character is incomplete."""
        ...

    def finish(self) -> str:
        """What was held back: an incomplete character becomes the replacement sign."""
        ...


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies: printable Latin-1 for itself, the others
    counted upwards from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


BYTES_OF = _byte_alphabet()


def byte_level_piece(piece: str) -> bytes:
    """The bytes of a byte-level token; one with a character outside the alphabet (an added token) stands for itself."""
    try:
        return bytes([BYTES_OF[char] for char in piece])
    except KeyError:
        return piece.encode("utf-8", "replace")


def fallback_byte(piece: str) -> int | None:
    """65 of `<0x41>`; None for any other token."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return None
    return None


class ByteLevel:
    """Bytes of the tokens through one incremental UTF-8 decoder."""

    __slots__ = ("_decode", "_piece")

    def __init__(self, piece: Callable[[int], bytes], prompt: Sequence[int]) -> None:
        self._piece = piece
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        for token in prompt:  # a prompt of token ids may end inside a character
            self._decode(piece(token))

    def feed(self, token: int) -> str:
        return self._decode(self._piece(token))

    def finish(self) -> str:
        return self._decode(b"", True)


class ByteFallback:
    """Text tokens as they are; runs of byte tokens gathered until they are a character."""

    __slots__ = ("_pending", "_piece")

    def __init__(self, piece: Callable[[int], str | int], prompt: Sequence[int]) -> None:
        self._piece = piece
        self._pending = bytearray()
        for token in prompt:
            self.feed(token)

    def feed(self, token: int) -> str:
        piece = self._piece(token)
        if isinstance(piece, str):
            return self.finish() + piece if self._pending else piece
        self._pending.append(piece)
        return self._settled()

    def finish(self) -> str:
        """As the library decodes it: one replacement sign for each byte that never became a character."""
        lost = BROKEN * len(self._pending)
        self._pending.clear()
        return lost

    def _settled(self) -> str:
        settled = ""
        while self._pending:
            try:
                settled += self._pending.decode()
                self._pending.clear()
            except UnicodeDecodeError as error:
                if error.start:
                    settled += self._pending[: error.start].decode()
                    del self._pending[: error.start]
                elif error.reason == "unexpected end of data":
                    break
                else:
                    settled += BROKEN
                    del self._pending[0]
        return settled


class Window:
    """For decoders that look at neighbours (WordPiece, Metaspace, ...): text of a window with and without the new
    tokens."""

    __slots__ = ("_decode", "_read", "_tokens")

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._tokens = list(prompt)
        self._read = len(self._tokens)

    def feed(self, token: int) -> str:
        self._tokens.append(token)
        text = self._fresh()
        pending = len(self._tokens) - self._read
        if pending < LONGEST_PENDING and (not text or text.endswith(BROKEN)):
            return ""
        self._tokens = self._tokens[self._read :]
        self._read = len(self._tokens)
        return text

    def finish(self) -> str:
        text = self._fresh()
        self._read = len(self._tokens)
        return text

    def _fresh(self) -> str:
        known = self._decode(self._tokens[: self._read])
        return self._decode(self._tokens)[len(known) :]


def decoder_kind(decoder: Any) -> str:
    """`byte_level`, `byte_fallback` or `window`, from tokenizer.json's `decoder` section."""
    parts = _flat(decoder)
    kinds = {part.get("type") for part in parts}
    if kinds == {"ByteLevel"}:
        return "byte_level"
    if "ByteFallback" in kinds and all(_plain(part) for part in parts):
        return "byte_fallback"
    return "window"


def _flat(decoder: Any) -> list[dict[str, Any]]:
    if not isinstance(decoder, dict):
        return []
    if decoder.get("type") == "Sequence":
        return [part for inner in decoder.get("decoders", []) for part in _flat(inner)]
    return [decoder]


def _plain(part: dict[str, Any]) -> bool:
    match part.get("type"):
        case "ByteFallback" | "Fuse":
            return True
        case "Replace":
            return part.get("pattern") == {"String": BLANK} and part.get("content") == " "
        case "Strip":  # of the very first blank; a continuation of a prompt keeps it
            return part.get("content") == " " and part.get("start") in (0, 1) and part.get("stop") == 0
        case _:
            return False
