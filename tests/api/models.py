"""Tokenizers of the three kinds, made here; and a context around one."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from baton.api.chat import ChatTemplate
from baton.api.job import ModelContext
from baton.api.text import Tokenizer, load_tokenizer

CORPUS = ["hello there, how are you today? the quick brown fox says hello there", "ünïcödé 🙂 日本語"]
SPECIAL = ["<s>", "</s>", "<unk>"]


def byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<added token>", "é"])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 and Gemma: blanks are a sign, unknown characters are byte tokens."""
    letters = sorted(set("".join(CORPUS[:1]).replace(" ", "\u2581")) | {"\u2581"})
    vocabulary = {
        token: index for index, token in enumerate([*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *letters])
    }
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    pieces = ["[UNK]", "hello", "there", "how", "##s", "##ing", "fox", ",", "a", "##b"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def write(tokenizer: tokenizers.Tokenizer, directory: Path, template: str | None = None) -> Tokenizer:
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return Tokenizer.load(directory)


def context(directory: Path) -> ModelContext:
    tokenizer = load_tokenizer(directory)
    chat = ChatTemplate.load(directory, tokenizer.special_tokens)
    return ModelContext(("m", "alias"), tokenizer, chat, vocab_size=tokenizer.vocab_size, longest=512)
