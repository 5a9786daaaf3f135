"""The tokenizer inside a GGUF file becomes tokenizer.json, tokenizer_config.json and special_tokens_map.json."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from baton.models.source import SourceFailed, write_json


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type` that matter here."""

    CONTROL = 3
    USER_DEFINED = 4


class Fields(Protocol):
    def get(self, key: str, default: Any = None) -> Any: ...

    def need(self, key: str) -> Any: ...


def _words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _words()])


PRE_TOKENIZERS = {"gpt-2": _words, "smollm": _digits_then_words}
"""How text is cut before byte-pair merging, by the name GGUF has for it. Cut wrongly, the same text gets other tokens,
so an unknown name is refused."""


def write_tokenizer(meta: Fields, into: Path) -> None:
    """Raises `SourceFailed` for a tokenizer that is not byte-level BPE of a known kind."""
    tokens: list[str] = meta.need("tokenizer.ggml.tokens")
    added = _added_tokens(tokens, meta.get("tokenizer.ggml.token_type", []))
    _tokenizer(meta, tokens, added).save(str(into / "tokenizer.json"))
    specials = _specials(meta, tokens)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(meta.get("tokenizer.ggml.add_bos_token", False)),
        "add_prefix_space": bool(meta.get("tokenizer.ggml.add_space_prefix", False)),
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(meta.need("llama.context_length")),
        "added_tokens_decoder": {str(id): _described(token) for id, token in added.items()},
        **specials,
    }
    template = meta.get("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    write_json(into / "tokenizer_config.json", config)
    write_json(into / "special_tokens_map.json", specials)


def _tokenizer(meta: Fields, tokens: list[str], added: dict[int, AddedToken]) -> Tokenizer:
    kind, cut = meta.need("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or cut not in PRE_TOKENIZERS:
        raise SourceFailed(
            f"the GGUF file's tokenizer is {kind}/{cut}; handled: "
            + ", ".join(f"gpt2/{name}" for name in PRE_TOKENIZERS)
        )
    if meta.get("tokenizer.ggml.add_bos_token", False):
        raise SourceFailed("the GGUF file's tokenizer puts a token before every text; that is not handled")
    vocabulary = {token: id for id, token in enumerate(tokens)}
    merges = [_pair(merge) for merge in meta.need("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[cut]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(added.values()))
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _added_tokens(tokens: list[str], types: list[int]) -> dict[int, AddedToken]:
    return {
        id: AddedToken(tokens[id], special=kind == TokenType.CONTROL, normalized=False)
        for id, kind in enumerate(types)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    }


def _specials(meta: Fields, tokens: list[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {name: meta.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: tokens[id] for name, id in ids.items() if id is not None}


def _described(token: AddedToken) -> dict[str, Any]:
    return {
        "content": token.content,
        "special": token.special,
        "normalized": token.normalized,
        "lstrip": token.lstrip,
        "rstrip": token.rstrip,
        "single_word": token.single_word,
    }
